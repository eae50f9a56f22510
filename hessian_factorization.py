"""What a factorization is beside its factor: the route taken, certified solves, other dampings, the trial of a float32
factor, and what is said where a solve fails. Products and factors are hessian.py's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import torch
from torch import Tensor

from hessian_checks import check_combination, checked_damping, checked_rtol, checked_vector
from hessian_costs import checked_route, num_parameters, shapes_of_layers
from hessian_linear_algebra import (
    NULL,
    UNIT_ROUNDOFF,
    MinimumNorm,
    Refined,
    column_norms,
    one_pool,
    refine,
    spectral_norm,
    unit_columns,
)

if TYPE_CHECKING:
    from hessian import Damping, LayerDerivatives

_REFINED_NUMBERS = 2**23  # right-hand sides are refined together up to this many numbers
# of the trial solve that decides whether a float32 factor will do: its residual, and in how many steps
_PROBE_RTOL, _PROBE_STEPS = 1e-8, 10
_WITHIN_ROUNDING = 30.0  # a residual missed by less may be the rounding of the products that tell it
_DENSE_TRIAL = 3000  # a failed solve tries the dense route for its error message up to this many parameters

_Setting = tuple["Damping", str, str]  # damping, route, precision


class Factor(Protocol):
    num_negative: int
    logabsdet: float

    def solve(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class CertifiedFactorization(ABC):
    """`HessianFactorization`, but for the products and factors that it is made of."""

    route: str  # 'sweep', 'dense' or 'gram'
    curvature: str  # 'hessian' or 'gauss_newton'
    damping: Damping  # as asked for: a float, or one a layer
    state_damping: float  # μ
    precision: str  # of the factor: 'float64', or 'mixed': float32
    keep: str  # 'solve' or 'inertia'
    checkpoint_layers: bool
    num_parameters: int
    num_negative_eigenvalues: int  # of H + εI, by Sylvester's law of inertia
    logabsdet: float  # log |det(H + εI)|
    _layers: tuple[LayerDerivatives, ...]  # their form is all of the matrix but ε
    _epsilons: tuple[float, ...]
    _factor: Factor | None
    _formed: object  # what the route forms whatever the damping: see `of_layers`

    _error: ClassVar[type[torch.linalg.LinAlgError]]  # SingularHessianError

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """(H + εI) v for v (P, k)."""

    @abstractmethod
    def _residual(self, v: Tensor, x: Tensor) -> Tensor:
        """v − (H + εI) x for v and x (P, k), products and sums to more digits than float64's (hessian_pairs.py)."""

    @staticmethod
    @abstractmethod
    def _factored(
        layers: tuple[LayerDerivatives, ...],
        rounded: tuple[LayerDerivatives, ...],
        epsilons: tuple[float, ...],
        route: str,
        formed: object,
        *,
        solvable: bool,
        checkpoint_layers: bool,
        definite_only: bool,
    ) -> tuple[Factor, object]:
        """The factor by `route`, in the precision of the rounded layers, and what that formed. not solvable: for the
        counts alone."""

    @classmethod
    def of_layers(
        cls,
        layers: tuple[LayerDerivatives, ...],
        damping: Damping,
        curvature: str,
        route: str,
        state_damping: float = 0.0,
        *,
        precision: str = "float64",
        keep: str = "solve",
        checkpoint_layers: bool = False,
        definite_only: bool = False,
        formed: object = None,
        fell_back: bool = False,
    ) -> Self:
        """The form of `layers` + damping·I, factored. curvature, state_damping: what was put into the layers.

        definite_only: raise _Indefinite where it is not positive definite. formed: what the route needs that no
        damping changes, if it was formed before (and is kept unchanged): the reduced inputs, H, or the Gram matrix.
        fell_back: from a float32 factor.
        """
        epsilons = damping if isinstance(damping, tuple) else (damping,) * len(layers)
        route = checked_route(
            layers,
            route,
            epsilons,
            state_damping,
            curvature=curvature,
            precision=precision,
            keep=keep,
            checkpoint_layers=checkpoint_layers,
            formed=formed is not None,
            may_mix=not fell_back,
        )
        rounded = tuple(map(in_float32, layers)) if precision == "mixed" else layers
        factor = result = None
        try:
            with one_pool(layers[0].weight.device):
                factor, formed = cls._factored(
                    layers,
                    rounded,
                    epsilons,
                    route,
                    formed,
                    solvable=keep == "solve",
                    checkpoint_layers=checkpoint_layers,
                    definite_only=definite_only,
                )
            if not math.isfinite(factor.logabsdet):
                raise cls._error(
                    f"H + damping·I has a pivot at damping={damping} that is singular, or overflowed: choose another "
                    "damping, or scale the inputs",
                    damping=damping,
                )
        except cls._error:
            if precision != "mixed":
                raise
            factor = None  # float32 overflowed, or rounded to a singular pivot
        if factor is not None:
            result = cls(
                route,
                curvature,
                damping,
                state_damping,
                precision,
                keep,
                checkpoint_layers,
                num_parameters(shapes_of_layers(layers)),
                factor.num_negative,
                factor.logabsdet,
                layers,
                epsilons,
                factor if keep == "solve" else None,
                formed if keep == "solve" or route == "sweep" else None,
            )
            if precision == "float64" or keep == "inertia" or result._probe():
                return result
        del result, factor, rounded, formed  # before the second factor takes their memory
        return cls.of_layers(
            layers,
            damping,
            curvature,
            route,
            state_damping,
            keep=keep,
            checkpoint_layers=checkpoint_layers,
            definite_only=definite_only,
            fell_back=True,
        )

    @property
    def is_positive_definite(self) -> bool:
        return self.num_negative_eigenvalues == 0

    def __repr__(self) -> str:
        return (
            f"HessianFactorization(P={self.num_parameters}, {self._dampings()}, curvature={self.curvature!r}, "
            f"route={self.route!r}, precision={self.precision!r}, "
            f"num_negative_eigenvalues={self.num_negative_eigenvalues})"
        )

    def _dampings(self) -> str:
        state = f", state_damping={self.state_damping:g}" if self.state_damping else ""
        return f"damping={self.damping}{state}"

    def with_damping(self, damping: float | Sequence[float]) -> Self:
        """The same matrix at another damping, all else as here: derivatives, QR, and where the route forms it H or the
        Gram matrix, are used again. Raises as `factorize_hessian` does."""
        damping = checked_damping(damping, len(self._layers))
        check_combination(self.route, self.curvature, self.state_damping, damping, self.checkpoint_layers)
        return self._again(damping, self.route, self.precision)

    def _again(self, damping: Damping, route: str, precision: str) -> Self:
        return self.of_layers(
            self._layers,
            damping,
            self.curvature,
            route,
            self.state_damping,
            precision=precision,
            keep=self.keep,
            checkpoint_layers=self.checkpoint_layers and route == "sweep",
            formed=self._formed if (route, precision) == (self.route, self.precision) else None,
        )

    def solve(self, v: Tensor, *, rtol: float | None = 1e-8) -> Tensor:
        """x with (H + εI) x = v, for v of shape (P,) or (P, k), float32 or float64; x has v's dtype, no graph.

        Refined until the residual stops falling, or with a float32 factor meets rtol. Each column then has
        ‖(H + εI)x − v‖ ≤ rtol ‖v‖, by an exact product in float64, before x is rounded to v's dtype; or
        SingularHessianError is raised, with the residual reached, and an rtol and (where two trials find one) a damping
        that will do. A column that misses rtol by less than 30 times may do so by the rounding of the products: its
        residual is then taken as `residual` does, and it goes on to what the rounding of x allows.
        rtol=None: one direct sweep, no product, nothing checked (and to float32's digits only, where precision is
        'mixed'). Cost: O(Σ m² + m n′) a column and a sweep, two or three sweeps as a rule, two to five more and as many
        residuals (`residual` says their cost) where products don't tell; with checkpoint_layers, two factorizations a
        sweep.
        """
        columns = checked_vector(v, self.num_parameters, self._layers[0].weight.device)
        if self._factor is None:
            raise ValueError("factored with keep='inertia': factor with keep='solve' to solve")
        if rtol is None:
            return self._direct(columns).reshape(v.shape).to(v.dtype)
        x, residual = self._certified(columns, checked_rtol(rtol))
        if not bool((residual <= rtol).all()):
            message = self._failure(columns, x, residual, rtol)
            raise self._error(message, damping=self.damping, residual=float(residual.max()))
        return x.reshape(v.shape).to(v.dtype)

    def residual(self, x: Tensor, v: Tensor) -> Tensor:
        """‖(H + εI)x − v‖/‖v‖: () for x and v of shape (P,), (k,) for (P, k). By a product to some 70 bits, which takes
        more than ten times as long as one in float64. H is that which the float64 derivatives at factor time define:
        their own rounding is not seen."""
        x_columns, columns = (
            checked_vector(y, self.num_parameters, self._layers[0].weight.device, name)
            for name, y in (("x", x), ("v", v))
        )
        if x.shape != v.shape:
            raise ValueError(
                f"x and v must have one shape, got {tuple(x.shape)} and {tuple(v.shape)}: pass the v that x solves for"
            )
        unit, scale = unit_columns(columns)
        error = self._residual(unit, x_columns / scale).contiguous()  # in the order of v: the same bits where x is 0
        norm = column_norms(unit)
        return (column_norms(error) / torch.where(norm > 0, norm, 1.0)).reshape(v.shape[1:])

    def _direct(self, v: Tensor) -> Tensor:
        dtype = torch.float32 if self.precision == "mixed" else torch.float64
        with one_pool(v.device):  # layers may be recomputed: at another number of threads, to other bits
            return self._factor.solve(v.to(dtype)).to(torch.float64)

    def _refined(self, v: Tensor, rtol: float, start: Tensor | None = None, **limits) -> Refined:
        # a step on a float32 factor adds few digits: no more of them than asked for
        limits |= {"target": rtol if self.precision == "mixed" else 0.0}
        size = max(1, _REFINED_NUMBERS // len(v))  # refinement keeps up to 40 arrays of its columns
        chunks = v.split(size, 1)
        starts = [None] * len(chunks) if start is None else start.split(size, 1)
        parts = [
            refine(self._product, self._direct, chunk, rtol, start=x, **limits)
            for chunk, x in zip(chunks, starts, strict=True)
        ]
        return Refined(*(torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)))

    def _certified(self, v: Tensor, rtol: float) -> Refined:
        """Refined, and once more by residuals in pairs where products may not tell whether rtol is met."""
        x, residual = self._refined(v, rtol)
        untold = (residual > rtol) & (residual < _WITHIN_ROUNDING * rtol)
        if bool(untold.any()):
            found = self._refined(v[:, untold], rtol, x[:, untold], residual_of=self._residual)
            x[:, untold], residual[untold] = found
        return Refined(x, residual)

    def _probe(self) -> bool:
        """Whether a float32 factor refines a fixed random v to _PROBE_RTOL in _PROBE_STEPS, or would at the rate of the
        first of them."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.num_parameters, 1, generator=generator, dtype=torch.float64)
        v = v.to(self._layers[0].weight.device)
        if bool(self._refined(v, _PROBE_RTOL, max_steps=1).residual <= _PROBE_RTOL ** (1 / _PROBE_STEPS)):
            return True
        return bool(self._refined(v, _PROBE_RTOL, max_steps=_PROBE_STEPS).residual <= _PROBE_RTOL)

    # What is said where a solve fails.

    def _failure(self, v: Tensor, x: Tensor, residual: Tensor, rtol: float) -> str:
        """Of a solve of v (P, k) that reached `residual` (k,) by x: what float64 can reach, and what would do."""
        worst, column = residual.max(0)
        x, failed = x[:, column, None], v[:, column, None]
        (x, of_x), (unit, of_v) = unit_columns(x), unit_columns(failed)
        growth = float(column_norms(x) / column_norms(unit)) * float(of_x / of_v)
        reach = UNIT_ROUNDOFF * spectral_norm(self._product, v) * growth
        mixed = ", precision='mixed'" if self.precision == "mixed" else ""
        tries: list[_Setting] = [(self.damping, self.route, "float64")] if mixed else []
        if self.route != "dense" and self.num_parameters <= _DENSE_TRIAL:
            tries.append((self.damping, "dense", "float64"))
        return (
            f"(H + damping·I)x = v was solved to a relative residual of {worst:.1e}, not to rtol={rtol:g}, at "
            f"{self._dampings()}{mixed}; the rounding of x alone may leave {reach:.0e}. "
            + self._advice(float(worst), failed, rtol, tries + self._larger(10.0, 1000.0))
        )

    def _larger(self, *factors: float) -> list[_Setting]:
        """Settings to try in place of a failed solve: this damping times each factor, where that regularizes more."""
        if min(self._epsilons) <= 0:
            return []
        scaled = [tuple(factor * epsilon for epsilon in self._epsilons) for factor in factors]
        return [(e if isinstance(self.damping, tuple) else e[0], self.route, self.precision) for e in scaled]

    def _advice(self, worst: float, v: Tensor, rtol: float, tries: list[_Setting]) -> str:
        """What would do in place of a failed solve of v (P, 1): the first of `tries` that works, or a larger rtol."""
        advice = "Pass another damping"
        for new in tries:
            try:
                residual = self._again(*new)._certified(v, rtol).residual
            except (self._error, MemoryError):  # the error that is being written counts, not this one
                continue
            if bool((residual <= rtol).all()):
                now = (self.damping, self.route, self.precision)
                names = zip(("damping", "route", "precision"), new, now, strict=True)
                changes = ", ".join(f"{name}={value!r}" for name, value, before in names if value != before)
                where = " to factorize_hessian" if new[0] == self.damping else ""
                kept = f", the same state_damping={self.state_damping:g}" if self.state_damping else ""
                advice = f"Pass {changes}{where}{kept} (tried: it reaches {residual.max():.0e})"
                break
        return advice + (f", or rtol={2 * worst:.1e} to accept this answer" if worst < 0.4 else "")


def in_float32(layer: LayerDerivatives) -> LayerDerivatives:
    output = layer.output and layer.output._replace(diagonal=layer.output.diagonal.float())
    penalty = None if layer.penalty is None else layer.penalty.float()
    tensors = {name: getattr(layer, name).float() for name in layer._fields[:5]}
    return layer._replace(output=output, penalty=penalty, **tensors)


def undamped_failure(found: MinimumNorm, v: Tensor, rtol: float, dtype: torch.dtype) -> str:
    """Of a solve of H x = v, v (P, k) from an array of `dtype`: why, and a damping that would do."""
    worst, column = found.residual.max(0)
    if found.curvature < NULL:
        factors = (1e4, 1e6)  # no small damping helps against a part of v that H does not see
        why = f"v is outside the range of H by {worst:.1e} of its norm, so that no x solves H x = v"
        if dtype == torch.float32 and worst < 1e-6:
            why += " (a float32 v is known to 6e-8 of its norm only: compute it in float64, from model.double())"
    else:
        factors = (100.0, 1e4)
        why = (
            f"what is left of v, {worst:.1e} of its norm, lies where the eigenvalues of H, about {found.curvature:.0e} "
            "of its norm, are too near 0 for float64"
        )
    advice = found.shifted._advice(float(worst), v[:, column, None], rtol, found.shifted._larger(*factors))
    return f"H x = v, undamped, was not solved to rtol={rtol:g}: {why}. {advice}"

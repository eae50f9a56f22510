"""`HessianFactorization`: solves, checks residuals, and writes the error messages of a failed solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from _hessian.argument_checks import check_combination, checked_damping, checked_rtol, checked_vector
from _hessian.costs import (
    DENSE_CHUNK,
    checked_route,
    layer_operations,
    natural_operations,
    num_parameters,
    prefers_many_classes,
    shapes_of_layers,
)
from _hessian.layers import Damping, LayerDerivatives, SingularHessianError, damping_vector
from _hessian.refinement import (
    MAX_REFINEMENTS,
    NULL,
    UNIT_ROUNDOFF,
    MinimumNorm,
    Refined,
    column_norms,
    refine,
    spectral_norm,
    unit_columns,
)
from _hessian.scipy_operators import SymmetricOperator
from _hessian.settings import Settings, dampings
from _hessian.symmetric_factor import one_pool
from _hessian.tables import html_table

_CERTIFICATE_STEPS = 8  # refinements of a random vector in which a certificate of inertia must be had
_REFINED_NUMBERS = 2**23  # right-hand sides are refined together up to this many numbers
# the trial solve that decides whether a float32 factor will do: its residual, and the most steps it may take
_PROBE_RTOL, _PROBE_STEPS = 1e-8, 10
_DENSE_TRIAL = 3000  # a failed solve tries the dense route for its error message up to this many parameters

Layers = tuple[LayerDerivatives, ...]


class Factor(Protocol):
    @property
    def num_negative(self) -> int: ...

    @property
    def logabsdet(self) -> float: ...

    def solve(self, v: Tensor) -> Tensor: ...


class System(Protocol):
    """H at one batch, or another matrix in its place, without the damping; and the ways to factor it with one."""

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_dampings(self) -> int:
        """How many dampings it takes, if not one."""

    @property
    def device(self) -> torch.device: ...

    def product(self, v: Tensor) -> Tensor:
        """H v for v (P, k)."""

    def dense(self) -> Tensor:
        """H (P, P)."""

    def damping_vector(self, damping: Damping) -> Tensor:
        """Each parameter's damping, (P, 1)."""

    def choose_route(self, settings: Settings, *, formed: bool, may_mix: bool) -> str:
        """settings.route, or what stands for 'auto'. MemoryError where it won't fit. formed: H, or the Gram matrix, is
        there already. may_mix: precision='mixed' can be advised."""

    def factor(self, settings: Settings, formed: object, definite_only: bool) -> tuple[Factor, object]:
        """The factor, and what no damping changes: H (P, P) by route 'dense', the Gram matrix by 'gram', what a sweep
        needs by 'sweep'. formed: that of an earlier factorization, or None."""

    def share_done(self, index: int) -> float:
        """Of the operations of a sweep that stops at the pivot of layer, or operation, `index`."""


class Solver(NamedTuple):
    """hessian.py's product and factorizations. This package is given them, since it may not import that module."""

    product: Callable[[Sequence[LayerDerivatives], Tensor], Tensor]  # (layers, v (P, k)) ↦ H v
    dense: Callable[[Sequence[LayerDerivatives]], Tensor]  # layers ↦ H (P, P)
    factor: Callable[[Layers, Settings, object, bool], tuple[Factor, object]]  # as `System.factor`


class Chain(NamedTuple):
    """The system of a fully connected network's layers."""

    solver: Solver
    layers: Layers

    @property
    def num_parameters(self) -> int:
        return num_parameters(shapes_of_layers(self.layers))

    @property
    def num_dampings(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device

    def product(self, v: Tensor) -> Tensor:
        numbers = len(self.layers[0].inputs) * sum(x.weight.shape[0] for x in self.layers)  # a column's
        parts = v.split(max(1, DENSE_CHUNK // (32 * numbers)), 1)
        return torch.cat([self.solver.product(self.layers, part) for part in parts], 1)

    def dense(self) -> Tensor:
        return self.solver.dense(self.layers)

    def damping_vector(self, damping: Damping) -> Tensor:
        return damping_vector(self.layers, dampings(damping, len(self.layers)))

    def choose_route(self, settings: Settings, *, formed: bool, may_mix: bool) -> str:
        return checked_route(self.layers, settings, formed=formed, may_mix=may_mix)

    def factor(self, settings: Settings, formed: object, definite_only: bool) -> tuple[Factor, object]:
        return self.solver.factor(self.layers, settings, formed, definite_only)

    def share_done(self, index: int) -> float:
        shapes, N = shapes_of_layers(self.layers), len(self.layers[0].inputs)
        many_classes = prefers_many_classes(shapes, N)
        operations = [layer_operations(shapes, layer, N, many_classes) for layer in range(len(shapes))]
        always = natural_operations(shapes, N)
        done = operations[index].pivot + sum(map(sum, operations[index + 1 :]))
        return (always + done) / (always + sum(map(sum, operations)))


@dataclass(frozen=True, eq=False, repr=False)
class HessianFactorization:
    """H + εI + (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ, or the same with JᵀΛJ in place of H, factored at one batch and one set of
    parameters; see `factorize_hessian`. Below, H + εI stands for that matrix.

    Immutable. It holds copies of all it needs: it still answers for the old parameters after they change.
    """

    route: str  # 'sweep', 'dense' or 'gram'
    curvature: str  # 'hessian' or 'gauss_newton'
    damping: Damping  # as asked for: a float, or one a layer
    state_damping: float  # μ
    precision: str  # of the factor: 'float64', or 'mixed': float32
    keep: str  # 'solve', 'disk' or 'inertia'
    checkpoint_layers: bool
    num_parameters: int
    num_negative_eigenvalues: int  # of H + εI, by Sylvester's law of inertia
    logabsdet: float  # log |det(H + εI)|
    _system: System
    _factor: Factor | None
    _formed: object

    @property
    def is_positive_definite(self) -> bool:
        return self.num_negative_eigenvalues == 0

    @cached_property
    def inertia_is_certified(self) -> bool:
        """Whether `num_negative_eigenvalues` is proved to be that of H + εI, whatever the rounding of the factor.

        With F the factored matrix and A = H + εI: if I − A F⁻¹ has no eigenvalue of size 1, none of the matrices
        between A and F is singular, so both have the same inertia. That holds exactly if refinement contracts, which is
        measured on a random vector. False where eigenvalues of H lie within rounding of −ε: choose another damping, or
        route='dense'. Cost: one direct solve and one product as a rule, at most eight of each.
        """
        v = rest = self._random_vector()
        for _ in range(_CERTIFICATE_STEPS):
            rest = rest - self._product(self._direct(rest))
            # a random vector has about 1/√P of its length along any eigenvector; where it doesn't shrink, that stays
            if float(column_norms(rest)) * math.sqrt(self.num_parameters) <= 0.1 * float(column_norms(v)):
                return True
        return False

    def _random_vector(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.num_parameters, 1, generator=generator, dtype=torch.float64)
        return v.to(self._system.device)

    def __repr__(self) -> str:
        return (
            f"HessianFactorization(P={self.num_parameters}, {self._dampings()}, curvature={self.curvature!r}, "
            f"route={self.route!r}, precision={self.precision!r}, "
            f"num_negative_eigenvalues={self.num_negative_eigenvalues})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", f"{self.num_parameters:,}"),
            ("matrix", f"{self.curvature}, {self._dampings()}"),
            ("route, precision", f"{self.route}, {self.precision}"),
            ("negative eigenvalues", f"{self.num_negative_eigenvalues:,}"),
            ("log |det|", f"{self.logabsdet:.6g}"),
        ]
        return html_table(("HessianFactorization", ""), rows)

    def _dampings(self) -> str:
        state = f", state_damping={self.state_damping:g}" if self.state_damping else ""
        return f"damping={self.damping}{state}"

    @property
    def _settings(self) -> Settings:
        return Settings(
            self.damping,
            self.curvature,
            self.route,
            self.state_damping,
            self.precision,
            self.keep,
            self.checkpoint_layers,
        )

    def with_damping(self, damping: float | Sequence[float]) -> HessianFactorization:
        """The same matrix at another damping, with the same options. Derivatives and QR are used again, and H or the
        Gram matrix where the route forms it. Raises as `factorize_hessian` does."""
        damping = checked_damping(damping, self._system.num_dampings)
        check_combination(self.route, self.curvature, self.state_damping, damping, self.checkpoint_layers)
        return self._again(self._settings._replace(damping=damping))

    def _again(self, settings: Settings) -> HessianFactorization:
        same = (settings.route, settings.precision) == (self.route, self.precision)
        return factorize_system(self._system, settings, formed=self._formed if same else None)

    def solve(self, v: Tensor, *, rtol: float | None = 1e-8) -> Tensor:
        """x with (H + εI) x = v, for v of shape (P,) or (P, k), float32 or float64; x has v's dtype, no graph.

        Each column is refined until its residual stops falling, or with a float32 factor meets rtol. Then
        ‖(H + εI)x − v‖ ≤ rtol ‖v‖, by a product in float64, before x is rounded to v's dtype. Where a column misses
        that, SingularHessianError is raised. It names the residual reached, and a change that was tried and works.
        rtol=None: one direct sweep, no product, nothing checked; with precision='mixed' to float32's digits only.
        Raises OverflowError where an entry of x is too large for v's dtype.

        Cost: O(Σ m² + m n′) a column and a sweep, two or three sweeps as a rule; with checkpoint_layers, two
        factorizations a sweep.
        """
        columns = checked_vector(v, self.num_parameters, self._system.device)
        if rtol is None:
            x = self._direct(columns)
        else:
            x, residual = self._refined(columns, checked_rtol(rtol))
            if not bool((residual <= rtol).all()):
                message = self._failure(columns, x, residual, rtol)
                raise SingularHessianError(message, damping=self.damping, residual=float(residual.max()))
        x = x.reshape(v.shape).to(v.dtype)
        if not bool(torch.isfinite(x).all()):
            cure = "pass v in float64" if v.dtype == torch.float32 else "scale v down, or choose a larger damping"
            raise OverflowError(f"x has entries that {v.dtype} can't hold: {cure}")
        return x

    def as_linear_operator(self, *, rtol: float | None = 1e-8) -> SymmetricOperator:
        """v ↦ (H + εI)⁻¹ v as a `scipy.sparse.linalg.LinearOperator` (P, P) on NumPy arrays, in float64: `solve`, with
        its certificate, cost and errors. As OPinv of `scipy.sparse.linalg.eigsh` it finds eigenvalues of H near −ε."""
        return SymmetricOperator(self.num_parameters, self._system.device, lambda v: self.solve(v, rtol=rtol))

    def residual(self, x: Tensor, v: Tensor) -> Tensor:
        """‖(H + εI)x − v‖/‖v‖: () for x and v of shape (P,), (k,) for (P, k). Cost: one product in float64."""
        x_columns, columns = (
            checked_vector(y, self.num_parameters, self._system.device, name) for name, y in (("x", x), ("v", v))
        )
        if x.shape != v.shape:
            raise ValueError(
                f"x and v must have one shape, got {tuple(x.shape)} and {tuple(v.shape)}: pass the v that x solves for"
            )
        unit, scale = unit_columns(columns)
        error = (unit - self._product(x_columns / scale)).contiguous()  # in v's layout: for x = 0 the same bits
        norm = column_norms(unit)
        return (column_norms(error) / torch.where(norm > 0, norm, 1.0)).reshape(v.shape[1:])

    def _product(self, v: Tensor) -> Tensor:
        """(H + εI) v for v (P, k)."""
        H = self._formed if self.route == "dense" else None
        product = H @ v if isinstance(H, Tensor) else self._system.product(v)
        return product + self._system.damping_vector(self.damping) * v

    def _direct(self, v: Tensor) -> Tensor:
        """One solve with the factor. Columns are scaled, so that none over- or underflows, in float32 least of all."""
        if self._factor is None:
            raise ValueError("factored with keep='inertia', which keeps nothing to solve with: pass keep='solve'")
        unit, scale = unit_columns(v)
        with one_pool(v.device):  # layers may be recomputed: at another number of threads, to other bits
            x = self._factor.solve(unit.to(torch.float32 if self.precision == "mixed" else torch.float64))
        return x.to(torch.float64) * scale

    def _refined(self, v: Tensor, rtol: float, max_steps: int = MAX_REFINEMENTS, target: float = 0.0) -> Refined:
        # a step on a float32 factor adds few digits: no more of them than asked for
        target = rtol if self.precision == "mixed" else target
        chunks = v.split(max(1, _REFINED_NUMBERS // len(v)), 1)  # refinement keeps up to 40 arrays of its columns
        parts = [
            refine(self._product, self._direct, chunk, rtol, target=target, max_steps=max_steps) for chunk in chunks
        ]
        return Refined(*(torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)))

    def _float32_suffices(self) -> bool:
        """Whether a float32 factor refines a fixed random v to _PROBE_RTOL in _PROBE_STEPS, or would at the rate of the
        first of them."""
        v = self._random_vector()
        if bool(self._refined(v, _PROBE_RTOL, 1).residual <= _PROBE_RTOL ** (1 / _PROBE_STEPS)):
            return True
        return bool(self._refined(v, _PROBE_RTOL, _PROBE_STEPS).residual <= _PROBE_RTOL)

    # the error messages of a failed solve

    def _failure(self, v: Tensor, x: Tensor, residual: Tensor, rtol: float) -> str:
        """For a solve of v (P, k) that reached `residual` (k,) by x: what float64 can reach, and what would do."""
        worst, column = residual.max(0)
        (unit_x, of_x), (unit_v, of_v) = unit_columns(x[:, column, None]), unit_columns(v[:, column, None])
        growth = float(column_norms(unit_x) / column_norms(unit_v)) * float(of_x / of_v)
        reach = UNIT_ROUNDOFF * spectral_norm(self._product, v) * growth
        mixed = ", precision='mixed'" if self.precision == "mixed" else ""
        now = self._settings
        tries = [now._replace(precision="float64")] if mixed else []
        if self.route != "dense" and self.num_parameters <= _DENSE_TRIAL:
            tries.append(now._replace(route="dense", precision="float64", keep="solve", checkpoint_layers=False))
        return (
            f"(H + damping·I)x = v was solved to a relative residual of {worst:.1e}, not to rtol={rtol:g}, at "
            f"{self._dampings()}{mixed}; the rounding of x alone may leave {reach:.0e}. "
            + self._advice(
                v,
                rtol,
                tries + self._larger_dampings(10.0, 1000.0),
                float(worst),
                lambda looser: bool((self._refined(v, looser).residual <= looser).all()),
            )
        )

    def _larger_dampings(self, *factors: float) -> list[Settings]:
        """These settings with the damping times each factor; none where that doesn't regularize."""
        now = self._settings
        if min(now.epsilons(1)) <= 0:
            return []
        damping = self.damping
        return [
            now._replace(
                damping=tuple(_short(c * e) for e in damping) if isinstance(damping, tuple) else _short(c * damping)
            )
            for c in factors
        ]

    def _advice(
        self,
        v: Tensor,
        rtol: float,
        tries: list[Settings],
        reached: float,
        solves: Callable[[float], bool],
    ) -> str:
        """The first of `tries` that solves v (P, k) to rtol, and an rtol near the residual reached, where that
        `solves`. What is advised was tried, on all of v and with all options."""
        undamped = "a damping other than 0 (without damping, hessian_inverse_vector_product finds an x if there is one)"
        found = ["another damping" if any(self._settings.epsilons(1)) else undamped]
        for settings in tries:
            try:
                residual = self._again(settings)._refined(v, rtol).residual
            except (SingularHessianError, MemoryError):  # the error that is being written counts, not this one
                continue
            if bool((residual <= rtol).all()):
                new, now = settings._asdict(), self._settings._asdict()
                changes = ", ".join(f"{name}={new[name]!r}" for name in new if new[name] != now[name])
                where = " to factorize_hessian" if settings.damping == self.damping else ""
                kept = f", the same state_damping={self.state_damping:g}" if self.state_damping else ""
                found = [f"{changes}{where}{kept} (tried: it reaches {residual.max():.0e})"]
                break
        looser = float(f"{2 * reached:.1e}")
        if reached < 0.4 and solves(looser):
            found.append(f"rtol={looser:.1e} to accept this answer")
        return f"Pass {', or '.join(found)}"


def _short(number: float) -> float:
    """To three digits, as the message prints it."""
    return float(f"{number:.3g}")


def factorize_system(
    system: System,
    settings: Settings,
    *,
    definite_only: bool = False,
    formed: object = None,
    fell_back: bool = False,
) -> HessianFactorization:
    """The system's matrix + damping·I, factored.

    definite_only: raise NotPositiveDefinite where it is not. formed: what the route needs that no damping changes, if
    it was formed before; it is kept unchanged. fell_back: from a float32 factor.
    """
    solvable = settings.keep != "inertia"
    route = system.choose_route(settings, formed=formed is not None, may_mix=not fell_back)
    settings = settings._replace(route=route)
    try:
        with one_pool(system.device):
            factor, formed = system.factor(settings, formed, definite_only)
        _check_counts(factor, settings)
        result = HessianFactorization(
            settings.route,
            settings.curvature,
            settings.damping,
            settings.state_damping,
            settings.precision,
            settings.keep,
            settings.checkpoint_layers,
            system.num_parameters,
            factor.num_negative,
            factor.logabsdet,
            system,
            factor if solvable else None,
            formed if solvable or settings.route == "sweep" else None,
        )
        if settings.precision == "float64" or not solvable or result._float32_suffices():
            return result
        del result, factor, formed  # before the second factor takes their memory
    except SingularHessianError:
        if settings.precision != "mixed":
            raise  # else float32 overflowed, or rounded to a singular pivot
    return factorize_system(system, settings._replace(precision="float64"), definite_only=definite_only, fell_back=True)


def _check_counts(factor: Factor, settings: Settings) -> None:
    """That no pivot is singular, and that rounding didn't decide the inertia where it is known."""
    if not math.isfinite(factor.logabsdet):
        raise SingularHessianError(
            f"H + damping·I has a pivot at damping={settings.damping} that is singular, or overflowed: choose another "
            "damping, or scale the inputs",
            damping=settings.damping,
        )
    if settings.curvature == "gauss_newton" and min(settings.epsilons(1)) > 0 and factor.num_negative:
        raise SingularHessianError(
            f"JᵀΛJ + damping·I is positive definite at damping={settings.damping}, but {factor.num_negative} of its "
            "eigenvalues were found negative: the damping is below the rounding of JᵀΛJ. Choose a larger damping, or "
            "scale the inputs",
            damping=settings.damping,
        )


def undamped_failure(
    found: MinimumNorm, v: Tensor, rtol: float, dtype: torch.dtype, solve: Callable[[float], MinimumNorm]
) -> str:
    """The message for a solve of H x = v, v (P, k) from an array of `dtype`: why, and a damping that would do.
    solve: the same solve to another rtol."""
    reached, shifted = float(found.residual.max()), found.shifted
    assert isinstance(shifted, HessianFactorization)
    if found.curvature < NULL:
        factors = (1e4, 1e6)  # no small damping helps against a part of v that H does not see
        why = f"v is outside the range of H by {reached:.1e} of its norm, so that no x solves H x = v"
        if dtype == torch.float32 and reached < 1e-6:
            why += " (a float32 v is known to 6e-8 of its norm only: compute it in float64, from model.double())"
    else:
        factors = (100.0, 1e4)
        why = (
            f"what is left of v, {reached:.1e} of its norm, lies where the eigenvalues of H, about "
            f"{found.curvature:.0e} of its norm, are too near 0 for float64"
        )
    advice = shifted._advice(
        v,
        rtol,
        shifted._larger_dampings(*factors),
        reached,
        lambda looser: bool((solve(looser).residual <= looser).all()),
    )
    return f"H x = v, undamped, was not solved to rtol={rtol:g}: {why}. {advice}"

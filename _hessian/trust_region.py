"""The exact trust-region step of a deep network: min gᵀp + ½ pᵀA p over ‖p‖ ≤ Δ, A = H + wI, H the full Hessian.

p is the global solution exactly if there is a multiplier λ ≥ 0 with

    (A + λI) p = −g,    A + λI ⪰ 0,    λ (Δ − ‖p‖) = 0                                          (Moré & Sorensen 1983)

H may be indefinite. Only a factorization proves that A + λI ⪰ 0, and it costs as much as tens to thousands of products
with A. So products and solves search, and factorizations prove. Let m(p) be the model's value.

    above   Let V be an orthonormal basis and T = VᵀAV. The problem on span V is solved exactly: p = V y, and
            min m ≤ m(p). V starts as a block Krylov space of g and of one random vector, for what g is orthogonal to.
    below   Weak duality: for every σ with A + σI ≻ 0, min m ≥ d(σ) = −½ gᵀ(A + σI)⁻¹g − ½ σΔ².
    loop    Factor A + σI at σ = λ(V) plus a margin that costs d at most half of the tolerated gap.
            Indefinite: the factorization stops at the first bad layer, and σ rises.
            Definite: V grows by solves with A + σI, to a rational Krylov space of p and of the eigenvector of λ_min.
            It ends where m(p) − d(σ) ≤ rtol · (−m(p)). If V stops growing before, λ(V) names a better σ.

The hard case: g is orthogonal to the eigenspace of λ_min, and ‖p(−λ_min)‖ < Δ. It needs no solve with a singular
matrix. V contains the eigenvector, by inverse iteration at σ > −λ_min. The small problem adds its multiple. d(σ) with
σ − λ ≪ λ proves the step, since half of λΔ² is part of the decrease.

References: Moré & Sorensen, Computing a trust region step, SIAM J. Sci. Stat. Comput. 4 (1983); Conn, Gould & Toint,
Trust-Region Methods (2000), ch. 7; Gould, Lucidi, Roma & Toint (1999), the step in a Krylov space; Rojas, Santos &
Sorensen (2000) and Rendl & Wolkowicz (1997), eigenvectors and duality; Ruhe (1984), rational Krylov spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from _hessian.factorization import HessianFactorization, System, factorize_system
from _hessian.layers import NotPositiveDefinite, SingularHessianError
from _hessian.refinement import UNIT_ROUNDOFF
from _hessian.settings import Settings

_SMALLEST_DAMPING = 1e-10  # relative to ‖A‖; it stands for 0: no Cholesky factorization tells a smaller one from 0


class TrustRegionStep(NamedTuple):
    """The step and how it was found; see `trust_region_step`."""

    step: Tensor  # (P,) p, in the dtype of the gradient
    damping: float  # λ, in units of loss / parameter²
    predicted_decrease: float  # −(gᵀp + ½pᵀAp) ≥ 0, by an exact product
    num_factorizations: float  # those that stopped early as the share of the operations done
    on_boundary: bool  # ‖p‖ = Δ; else λ stands for 0
    hard_case: bool  # p has a multiple of an eigenvector of λ_min that no solve gives: λ = −λ_min to rounding


# --------------------------------------------------------------------------------------- the problem in a subspace


class _Reduced(NamedTuple):
    """The problem on span V, solved. All vectors are in the coordinates of T's eigenvectors."""

    theta: np.ndarray  # (k,) eigenvalues of T, ascending
    vectors: np.ndarray  # (k, k)
    slope: np.ndarray  # (k,) b, of g
    y: np.ndarray  # (k,) of p
    damping: float  # λ
    decrease: float  # −m(p)
    smallest_damping: float  # the λ that stands for 0
    on_boundary: bool
    hard_case: bool

    def dual(self, damping: np.ndarray, radius: float) -> np.ndarray:
        """d(σ) of this problem, for an array of σ > −θ_0."""
        return -0.5 * (self.slope**2 / (self.theta + damping[..., None])).sum(-1) - 0.5 * damping * radius**2


def _solve_reduced(T: np.ndarray, c: np.ndarray, radius: float) -> _Reduced:
    """min cᵀy + ½ yᵀT y over ‖y‖ ≤ Δ, by the secular equation ‖y(λ)‖ = Δ; the hard case too.

    The unknown is δ = λ + θ_0, so that λ near −θ_0 loses no digits: y_i = −b_i/(θ_i − θ_0 + δ).
    """
    theta, vectors = np.linalg.eigh(T)
    b, distance = vectors.T @ c, theta - theta[0]
    norm = np.abs(theta).max() or 1.0
    zero = _SMALLEST_DAMPING * norm  # the λ that stands for 0
    smallest = max(zero + theta[0], UNIT_ROUNDOFF * norm)  # below, δ can't be told from 0

    def length(delta: float) -> float:
        return float(np.linalg.norm(b / (distance + delta)))

    interior_or_hard = length(smallest) <= radius
    delta = smallest
    if not interior_or_hard:
        low, high = np.log(smallest), np.log(np.linalg.norm(b) / radius)  # ‖y‖ > Δ at low, ≤ ‖b‖/δ = Δ at high
        for _ in range(80):  # bisection in log δ: 80 halvings leave rounding
            middle = 0.5 * (low + high)
            low, high = (middle, high) if length(np.exp(middle)) > radius else (low, middle)
        delta = float(np.exp(high))
    y = -b / (distance + delta)
    hard_case = interior_or_hard and bool(theta[0] < -zero)
    if hard_case:  # the sign that lowers the model: b_0 y_0 ≤ 0
        y[0] = np.copysign(np.sqrt(radius**2 - (y[1:] ** 2).sum()), -b[0] if b[0] else 1.0)
    on_boundary = hard_case or not interior_or_hard
    if on_boundary:
        y *= radius / np.linalg.norm(y)
    decrease = -float(b @ y + 0.5 * theta @ y**2)
    return _Reduced(theta, vectors, b, y, delta - theta[0], decrease, zero, on_boundary, hard_case)


def _margin(reduced: _Reduced, radius: float, gap: float) -> float:
    """The largest μ for which d(λ + μ) is below −decrease by at most `gap`: the easiest matrix to factor."""
    margins = (reduced.damping + np.abs(reduced.theta).max()) * np.geomspace(1e-12, 1e2, 300)
    allowed = margins[-reduced.decrease - reduced.dual(reduced.damping + margins, radius) <= gap]
    if len(allowed):
        return float(allowed[-1])
    return float(margins[0]) if reduced.on_boundary else 0.0  # inside, λ itself stands for 0


class _Subspace:
    """An orthonormal basis V (P, k), g in its span, and T = VᵀAV."""

    def __init__(self, product: Callable[[Tensor], Tensor], g: Tensor):
        self.product, self.g = product, g
        self._rows = g.new_empty(80, len(g))  # Vᵀ; doubled when full
        self.T = np.zeros((0, 0))

    @property
    def basis(self) -> Tensor:
        return self._rows[: len(self.T)].mT

    def extend(self, block: Tensor) -> Tensor:
        """Add what is new in the columns of block (P, j). Returns A times that, (P, i) with i ≤ j."""
        k = size = len(self.T)
        new_part = 1e-10  # a column is new if so much of it lies outside of V
        if k + block.shape[1] > len(self._rows):
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
        for column in block.mT:
            norm = torch.linalg.vector_norm(column)
            for _ in range(2):  # the second pass removes what rounding leaves
                column = column - self._rows[:size].mT @ (self._rows[:size] @ column)
            rest = torch.linalg.vector_norm(column)
            if rest > new_part * norm:
                self._rows[size] = column / rest
                size += 1
        image = self.product(self._rows[k:size].mT)
        T = np.zeros((size, size))
        T[:k, :k], T[:, k:] = self.T, (self._rows[:size] @ image).cpu().numpy()
        T[k:, :k] = T[:k, k:].T
        T[k:, k:] = 0.5 * (T[k:, k:] + T[k:, k:].T)
        self.T = T
        return image

    def solve(self, radius: float) -> _Reduced:
        c = np.zeros(len(self.T))
        c[0] = torch.linalg.vector_norm(self.g)  # g is along the first column, or zero
        return _solve_reduced(self.T, c, radius)

    def residuals(self, reduced: _Reduced) -> Tensor:
        """(P, 2): (A + λI)p + g, and (A − θ_0 I)u for the lowest Ritz vector u."""
        vectors = self.combine(reduced, reduced.y, np.eye(len(reduced.y))[0])
        r = self.product(vectors) + self.g.new_tensor([reduced.damping, -reduced.theta[0]]) * vectors
        r[:, :1] += self.g
        return r

    def combine(self, reduced: _Reduced, *coordinates: np.ndarray) -> Tensor:
        """The vectors (P, j) of coordinates in the eigenvectors of T."""
        y = reduced.vectors @ np.stack(coordinates, 1)
        return self.basis @ torch.from_numpy(y).to(self.g)


def _krylov_space(
    product: Callable[[Tensor], Tensor], g: Tensor, radius: float, rtol: float, max_blocks: int = 40
) -> _Subspace:
    """The block Krylov space of g and a random vector, until the decrease in it stops growing.

    max_blocks: of two products each.
    """
    noise = torch.randn(len(g), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(g.device)
    space, block, before = _Subspace(product, g), torch.cat([g, noise], 1), 0.0
    for step in range(1, max_blocks + 1):
        block = space.extend(block)
        if block.shape[1] == 0:
            break
        if step % 4 == 0:
            decrease = space.solve(radius).decrease
            if 0 < decrease and decrease - before <= 0.01 * rtol * decrease:
                break
            before = decrease
    return space


# ---------------------------------------------------------------------------------------------- search and proof


def factorize_definite(
    system: System, damping: float, route: str, H: Tensor | None = None
) -> tuple[HessianFactorization | None, float]:
    """H + damping·I, factored, and the share of the operations that were done. None where it is not positive definite.

    The sweep stops at the first pivot without a Cholesky factor: for ε > 0, H + εI ≻ 0 ⇔ every pivot ≻ 0 (Haynsworth).
    A failed dense factorization counts as a whole one. route: 'sweep' or 'dense'. H: if it was formed.
    """
    try:
        return factorize_system(system, Settings(damping, route=route), definite_only=True, formed=H), 1.0
    except NotPositiveDefinite as stop:
        return None, 1.0 if route == "dense" else system.share_done(stop.index)


def _prove(
    space: _Subspace,
    factorization: HessianFactorization,
    shift: float,
    radius: float,
    rtol: float,
    max_blocks: int = 12,
) -> tuple[_Reduced, float]:
    """Grow V by solves with A + σI, until m(p) is proved within rtol, or V gives no more. Returns the gap m(p) − d(σ).

    max_blocks: of two solves each. Let x ≈ (A + σI)⁻¹g with residual e. Then d(σ) follows from 2gᵀx − xᵀ(A + σI)x up to
    eᵀ(A + σI)⁻¹e/2. The gap is widened by that, bounded by the lowest Ritz value.
    """
    g, before = space.g, 0.0
    x = factorization._refined(g, 1e-8).x
    image = space.product(x) + shift * x
    error = float(((image - g) ** 2).sum())
    dual = -0.5 * float((2 * g - image).mT @ x)
    block = x
    for step in range(max_blocks):
        new = space.extend(block).shape[1]
        reduced = space.solve(radius)
        # where σ stands for 0, the bound need only hold for steps as short as the interior p
        settled = not reduced.on_boundary and shift <= 2 * reduced.smallest_damping
        length = float(np.linalg.norm(reduced.y)) if settled else radius
        gap = -reduced.decrease - dual + 0.5 * shift * length**2
        gap += 0.5 * error / max(shift + reduced.theta[0], UNIT_ROUNDOFF * shift)
        stalled = step and (not new or reduced.decrease - before <= 0.01 * rtol * reduced.decrease)
        if stalled or gap <= rtol * reduced.decrease:
            break
        before = reduced.decrease
        block = factorization._refined(space.residuals(reduced), 1e-4).x
    return reduced, gap


def solve_trust_region(
    system: System,
    g: Tensor,
    radius: float,
    weight_decay: float = 0.0,
    *,
    rtol: float = 1e-4,
    route: str = "auto",
) -> TrustRegionStep:
    """`newton.trust_region_step` for H = `system` and a finite g (P,) in float64, unchecked."""
    route = system.choose_route(Settings(1.0, route=route), formed=False, may_mix=False)
    H = system.dense() if route == "dense" else None

    def product(v: Tensor) -> Tensor:  # A v
        return (system.product(v) if H is None else H @ v) + weight_decay * v

    space = _krylov_space(product, g[:, None], radius, rtol)
    reduced = space.solve(radius)
    # A + σI is indefinite at σ = low, definite at σ = high
    work, low, high, growth, allowed, gap = 0.0, 0.0, math.inf, 0.0, 0.5 * rtol, math.inf
    max_shifts = 30
    for _ in range(max_shifts):
        margin = _margin(reduced, radius, allowed * reduced.decrease)
        shift = max(reduced.damping + margin, low + growth)
        if shift <= low or (growth and shift > high):
            shift = math.sqrt(low * high)
        factorization, share = factorize_definite(system, weight_decay + shift, route, H)
        work += share
        if factorization is None:  # −λ_min ≥ σ: V has not found λ_min, by about the residual of its lowest vector
            low, unseen = shift, float(torch.linalg.vector_norm(space.residuals(reduced)[:, 1]))
            growth = max(10 * growth, 10 * margin, unseen, 0.1 * low)
            continue
        high, growth, allowed = min(high, shift), 0.0, 0.1 * allowed
        reduced, gap = _prove(space, factorization, shift, radius, rtol)
        # λ stands for 0, and no Cholesky factorization succeeds nearer to 0: below 1e-6 ‖A‖ that is rounding
        rounding_level = 1e-6 / _SMALLEST_DAMPING * reduced.smallest_damping
        rounding = not reduced.on_boundary and high <= 10 * low <= 10 * rounding_level
        if rounding or gap <= rtol * reduced.decrease:
            step = space.combine(reduced, reduced.y)
            decrease = -float(g @ step + 0.5 * (step * product(step)).sum())
            return TrustRegionStep(step[:, 0], reduced.damping, decrease, work, reduced.on_boundary, reduced.hard_case)
    raise SingularHessianError(
        f"the trust-region step was not proved to rtol={rtol:g} with {max_shifts} shifts: its decrease is "
        f"{reduced.decrease:.3g}, the last bound was off by {gap:.1g}. Pass a larger rtol, a smaller radius, or route="
        "'dense'",
        damping=shift,
    )

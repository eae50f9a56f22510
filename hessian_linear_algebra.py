"""Dense symmetric linear algebra for hessian.py: an indefinite factorization, and refinement of solves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
UPDATE_BLOCK = 512  # symmetric updates are done by rows of blocks of this size, the lower half only
NULL = 1e-12  # relative to ‖A‖: what `minimum_norm` takes for the null space
_MAX_REFINEMENTS = 40
_PATIENCE = 5  # refinement above rtol goes on while the residual halves in this many steps
_MAX_DIRECTIONS = 20  # GCR combines a correction with at most so many earlier ones
_SHIFTS = (1e-7, 1e-8)  # relative to ‖A‖; the larger resolves fewer eigenvalues, and loses fewer digits


class SymmetricFactor(NamedTuple):
    """G = F Σ Fᵀ with F = Πᵀ L V |D|^½: Cholesky (L alone), or LDLᵀ whose 2 × 2 blocks V diagonalizes."""

    lower: Tensor  # (m, m), only the lower triangle is read
    order: Tensor | None  # (m,) Π as row order: (Π G Πᵀ) = G[order][:, order]
    pairs: Tensor  # (p,) first rows of the 2 × 2 blocks
    cosine: Tensor  # (p, 1) the eigenvectors of block i are the columns of [[cᵢ, sᵢ], [−sᵢ, cᵢ]]
    sine: Tensor  # (p, 1)
    scale: Tensor | None  # (m,) |D|^½
    signs: Tensor | None  # (m,) Σ; None where G is positive definite

    def whiten(self, b: Tensor) -> Tensor:
        """F⁻¹ b for b (m, k)."""
        if self.order is None:
            return torch.linalg.solve_triangular(self.lower, b, upper=False)
        b = torch.linalg.solve_triangular(self.lower, b[self.order], upper=False, unitriangular=True)
        return self._rotate(b, -self.sine).div_(self.scale[:, None])

    def unwhiten(self, b: Tensor) -> Tensor:
        """F⁻ᵀ b for b (m, k)."""
        if self.order is None:
            return torch.linalg.solve_triangular(self.lower.mT, b, upper=True)
        b = self._rotate(b / self.scale[:, None], self.sine)
        solved = torch.linalg.solve_triangular(self.lower.mT, b, upper=True, unitriangular=True)
        return torch.empty_like(solved).index_copy_(0, self.order, solved)

    def sign(self, b: Tensor) -> Tensor:
        """Σ b."""
        return b if self.signs is None else b * self.signs[:, None]

    def _rotate(self, b: Tensor, sine: Tensor) -> Tensor:
        if len(self.pairs):
            first, second = b[self.pairs], b[self.pairs + 1]
            b[self.pairs] = self.cosine * first + sine * second
            b[self.pairs + 1] = self.cosine * second - sine * first
        return b

    def num_negative(self) -> int:
        return 0 if self.signs is None else int((self.signs < 0).sum())

    def logabsdet(self) -> Tensor:
        return 2 * (self.lower.diagonal() if self.scale is None else self.scale).log().sum()


def factor_symmetric(G: Tensor, definite_only: bool = False) -> SymmetricFactor | None:
    """Factor G (m, m), of which the lower triangle is read; None where a pivot is exactly zero, or, where
    `definite_only`, where G is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(G)
    none = torch.empty(0, dtype=torch.long, device=G.device)
    if int(info) == 0:  # a Cholesky factor exists ⇔ G ≻ 0; asking costs a host synchronization
        return SymmetricFactor(lower, None, none, G.new_empty(0, 1), G.new_empty(0, 1), None, None)
    if definite_only:
        return None
    packed, pivots, info = torch.linalg.ldl_factor_ex(G)
    if int(info) != 0:
        return None
    lower, order, pairs = _unpack_ldl(packed, pivots)
    # Jacobi's rotation of each 2 × 2 block [[D_i, b], [b, D_{i+1}]], b ≠ 0: t = tan of its angle
    D, b = packed.diagonal().clone(), packed.diagonal(-1)[pairs]
    tau = (D[pairs + 1] - D[pairs]) / (2 * b)
    t = torch.where(tau < 0, -1.0, 1.0) / (tau.abs() + torch.hypot(tau, torch.ones_like(tau)))
    cosine = torch.rsqrt(1 + t * t)
    D[pairs] -= t * b
    D[pairs + 1] += t * b
    if not bool((D.abs() > 0).all()):  # NaN too
        return None
    return SymmetricFactor(lower, order, pairs, cosine[:, None], (t * cosine)[:, None], D.abs().sqrt(), D.sign())


def _unpack_ldl(packed: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's sytrf output (lower) → L with Π G Πᵀ = L D Lᵀ, the order Π, and the first rows of the 2 × 2 blocks.

    sytrf leaves L as a product of interchanges and elementary factors: an interchange made at step k was not applied
    to the columns before k. Column j's rows are therefore read in the order of all interchanges after j composed.
    """
    m, pivots = len(packed), pivots.tolist()
    steps, pairs, k = [], [], 0  # (first column of the block, interchanged rows)
    while k < m:
        if pivots[k] > 0:
            steps.append((k, k, pivots[k] - 1))
            k += 1
        else:
            steps.append((k, k + 1, -pivots[k] - 1))
            pairs.append(k)
            k += 2
    rows = np.empty((m, m), dtype=np.int64)  # row j: where the entries of L's column j stand in `packed`
    current, position, filled = np.arange(m), list(range(m)), m
    for k, i, j in reversed(steps):
        if i != j:
            rows[k:filled], filled = current, k
            current[position[i]], current[position[j]] = j, i
            position[i], position[j] = position[j], position[i]
    rows[:filled] = current
    order = torch.from_numpy(current.copy()).to(packed.device)
    lower = packed if filled == m else packed.mT.gather(1, torch.from_numpy(rows).to(packed.device)).mT
    pairs = torch.tensor(pairs, dtype=torch.long, device=packed.device)
    if len(pairs):
        lower = lower.clone() if lower is packed else lower
        lower[pairs + 1, pairs] = 0.0  # that entry belongs to D
    return lower, order, pairs


def subtract_gram(P: Tensor, left: Tensor, right: Tensor) -> None:
    """P ← P − leftᵀ right in place, known to be symmetric: blocks of the lower triangle only."""
    for start in range(0, len(P), UPDATE_BLOCK):
        stop = min(start + UPDATE_BLOCK, len(P))
        P[start:stop, :stop].addmm_(left[:, start:stop].mT, right[:, :stop], alpha=-1)


def mirror(P: Tensor) -> None:
    """Copy the blocks of the lower triangle, as `subtract_gram` leaves them, to the upper one."""
    for start in range(UPDATE_BLOCK, len(P), UPDATE_BLOCK):
        stop = min(start + UPDATE_BLOCK, len(P))
        P[:start, start:stop] = P[start:stop, :start].mT


class Refined(NamedTuple):
    x: Tensor  # (P, k)
    residual: Tensor  # (k,) relative


def column_norms(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=0)


def unit_columns(v: Tensor) -> tuple[Tensor, Tensor]:
    """v with columns of largest entry 1, and what they were divided by, so that no square under- or overflows."""
    scale = v.abs().amax(0)
    scale = torch.where(scale > 0, scale, 1.0)
    return v / scale, scale


def refine(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    v: Tensor,
    rtol: float,
    *,
    target: float = 0.0,
    null: float = 0.0,
) -> Refined:
    """Refine `precondition`(v) towards A x = v, all columns at once, until the residual meets `target` or stalls.

    GCR: each correction is scaled, and combined with the earlier ones, so that the residual is as small as can be. With
    a good factorization a step is one of iterative refinement; where refinement would contract slowly or diverge,
    it is a Krylov method. The residual is that of x, by a product, after each step; a step that doesn't lower it is
    dropped. Above `rtol`, slow progress goes on.
    """
    if v.shape[1] == 0:
        return Refined(v, v.new_zeros(0))
    v, scale = unit_columns(v)
    norm = column_norms(v)
    norm = torch.where(norm > 0, norm, 1.0)
    x, r, directions = torch.zeros_like(v), v, []
    residual, largest = column_norms(r) / norm, torch.zeros_like(norm)
    history = [residual]
    for _ in range(_MAX_REFINEMENTS):
        z = precondition(r)
        w = product(z)
        largest = torch.fmax(largest, column_norms(w) / column_norms(z))  # fmax passes over NaN
        for _ in range(2):  # once more: the first pass leaves what rounding left
            for old_z, old_w in directions:
                overlap = (old_w * w).sum(0)
                z, w = z - overlap * old_z, w - overlap * old_w
        # a direction that A sees only as rounding (‖A z‖ < null ‖z‖) would fit noise with an x without bound
        length = torch.where(column_norms(w) < null * column_norms(z), math.nan, column_norms(w))
        z, w = z / length, w / length
        step = (w * r).sum(0)
        candidate = x + step * z
        # from x = 0, A x is step · w itself
        candidate_r = v - product(candidate) if len(history) > 1 else r - step * w
        better = column_norms(candidate_r) / norm < residual  # False for NaN
        x, r = torch.where(better, candidate, x), torch.where(better, candidate_r, r)
        residual = column_norms(r) / norm
        history.append(residual)
        # no solver gets below u ‖A‖ ‖x‖ / ‖v‖; ‖A‖ from below, by the products seen
        floor = UNIT_ROUNDOFF * largest * column_norms(x) / norm
        falling = residual < 0.5 * history[-2]
        if len(history) > 2:  # a rate that breaks down below rtol has met rounding: one more step would only show it
            falling &= (residual > rtol) | (residual * history[-3] < 100 * history[-2] ** 2)
        if len(history) > _PATIENCE:
            falling |= (residual > rtol) & (residual < 0.5 * history[-1 - _PATIENCE])
        else:
            falling |= residual > rtol
        if not bool((falling & (residual > floor) & (residual > target)).any()):
            break
        improved = bool(better.any())
        if not improved and not directions:
            break  # the next step would be the same
        directions = [*directions, (z, w)][-_MAX_DIRECTIONS:] if improved else []
    return Refined(x * scale, residual)


def spectral_norm(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """‖A‖ from below, by power iteration from a fixed start; good to a few percent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(like), 1, generator=generator, dtype=torch.float64).to(like.device)
    for _ in range(20):
        x = product(x / column_norms(x))
    return float(column_norms(x).nan_to_num())  # NaN for A = 0


class Shifted(Protocol):
    """A + δI, factored: an exact product, and an approximate inverse."""

    def _product(self, v: Tensor) -> Tensor: ...

    def _direct(self, v: Tensor) -> Tensor: ...


class MinimumNorm(NamedTuple):
    x: Tensor  # (P, k)
    residual: Tensor  # (k,) relative
    curvature: float  # ‖A r‖/(‖A‖ ‖r‖), r what is left of the worst column where |μ| ≲ δ; below NULL: no x exists
    shifted: Shifted | None  # A + δI as used; None for v = 0


def minimum_norm(
    product: Callable[[Tensor], Tensor], factor_shifted: Callable[[float], Shifted], v: Tensor, rtol: float
) -> MinimumNorm:
    """The minimum-norm x with A x = v for a singular symmetric A, v (P, k) in its range; see `residual` for success.

    Outer: GCR on A, preconditioned by (A + δI)⁻¹ with a small shift δ, which leaves the range of A invariant. Inner:
    each of these solves is itself refined on A + δI, since rounding in the null space, which A can't see, is
    amplified by 1/δ; and the outer iteration stops short of the rounding level, where a residual is null-space noise.
    A part of v outside the range, if rtol lets it pass, is amplified likewise; x is freed of it at the end.
    """
    if not bool(v.any()):
        return MinimumNorm(torch.zeros_like(v), v.new_zeros(v.shape[1]), 0.0, None)
    v, scale = unit_columns(v)
    norm, tried = spectral_norm(product, v), []
    norm = norm if norm > 0 else 1.0  # A = 0: any shift shows that v is outside its range
    for shift in _SHIFTS:
        shifted = factor_shifted(shift * norm)

        def precondition(r: Tensor, shifted: Shifted = shifted) -> Tensor:
            return refine(shifted._product, shifted._direct, r, rtol).x

        def near_null(y: Tensor, solve: Callable = precondition, delta: float = shift * norm) -> Tensor:
            return delta * solve(delta * solve(y))  # (δ(A + δI)⁻¹)² leaves what lies where |μ| ≲ δ

        def solve_range(y: Tensor, solve: Callable = precondition) -> Refined:
            return refine(product, solve, y, rtol, target=1e-4 * rtol, null=NULL * norm)

        x, residual = solve_range(v)
        if bool((residual <= rtol).all()):
            # take out all of x that is near the null space, and solve for what A sees of that, and of what is left of v
            near, r = near_null(x), v - product(x)
            cleaned = x - near + solve_range(product(near) + r - near_null(r)).x
            cleaned_residual = column_norms(v - product(cleaned)) / torch.where(v.any(0), column_norms(v), 1.0)
            x = torch.where(cleaned_residual <= rtol, cleaned, x)
            residual = torch.where(cleaned_residual <= rtol, cleaned_residual, residual)
            return MinimumNorm(x * scale, residual, math.nan, shifted)
        column = residual.argmax()
        r = near_null(v[:, column, None] - product(x[:, column, None]))
        curvature = float(column_norms(product(r)) / column_norms(r)) / norm
        tried.append(MinimumNorm(x * scale, residual, curvature, shifted))
        if curvature < NULL:
            break
    return min(tried, key=lambda found: float(found.residual.max()))

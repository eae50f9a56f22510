"""Refinement: certified solves from an approximate inverse, and the minimum-norm solution of a singular system."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
NULL = 1e-12  # relative to ‖A‖: what `minimum_norm` takes for the null space
MAX_REFINEMENTS = 40  # steps
_PATIENCE = 5  # above rtol, stop where the residual did not halve in so many steps
_MAX_DIRECTIONS = 20  # a correction is combined with at most so many earlier ones
_SHIFTS = (1e-8, 1e-10)  # δ/‖A‖, tried in turn; the smaller resolves more eigenvalues, but its solves take more steps
_SHIFTED_RTOL = 1e-8  # of solves with A + δI


class Refined(NamedTuple):
    x: Tensor  # (P, k)
    residual: Tensor  # (k,) relative


def column_norms(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=0)


def unit_columns(v: Tensor) -> tuple[Tensor, Tensor]:
    """v with columns of largest entry in [1, 2), and what they were divided by, so that no square under- or overflows:
    powers of two, which round nothing."""
    scale = power_of_two(v.abs().amax(0))
    return v / scale, scale


def power_of_two(x: Tensor) -> Tensor:
    """The greatest one not above each entry of x ≥ 0, exactly; 1 for 0. (torch.ldexp would take it in float32.)"""
    mantissa = torch.frexp(x).mantissa  # in [½, 1)
    return torch.where(mantissa > 0, x / (2 * mantissa), 1.0)


def refine(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    v: Tensor,
    rtol: float,
    *,
    target: float = 0.0,
    null: float = 0.0,
    max_steps: int = MAX_REFINEMENTS,
) -> Refined:
    """Refine x = 0 towards A x = v, all columns at once, until the residual meets `target` or stops falling.

    GCR (Eisenstat, Elman & Schultz 1983), a residual-minimizing Krylov method with the factorization as preconditioner:
    each correction is combined with the earlier ones and scaled so that the residual is smallest. With a good
    factorization a step is one of iterative refinement. Unlike plain GCR it computes the residual anew by a product
    after each step, and drops a step that doesn't lower it. null: a direction z with ‖A z‖ < null ‖z‖ is not used.
    """
    if v.shape[1] == 0:
        return Refined(v, v.new_zeros(0))
    v, scale = unit_columns(v)
    norm = column_norms(v)
    norm = torch.where(norm > 0, norm, 1.0)
    x, r = torch.zeros_like(v), v
    directions: list[tuple[Tensor, Tensor]] = []
    residual, largest = column_norms(r) / norm, torch.zeros_like(norm)
    history = [residual]
    for _ in range(max_steps):
        z = precondition(r)
        w = product(z)
        largest = torch.fmax(largest, column_norms(w) / column_norms(z))  # fmax passes over NaN
        for _ in range(2):  # once more: the first pass leaves what rounding left
            for old_z, old_w in directions:
                overlap = (old_w * w).sum(0)
                z, w = z - overlap * old_z, w - overlap * old_w
        # such a direction would fit rounding with an x without bound
        length = torch.where(column_norms(w) < null * column_norms(z), math.nan, column_norms(w))
        z, w = z / length, w / length
        step = (w * r).sum(0)
        candidate = x + step * z
        candidate_r = r - step * w if len(history) == 1 else v - product(candidate)
        better = column_norms(candidate_r) / norm < residual  # False for NaN
        x, r = torch.where(better, candidate, x), torch.where(better, candidate_r, r)
        residual = column_norms(r) / norm
        history.append(residual)
        # rounding: no product shows less than u ‖A‖ ‖x‖ / ‖v‖; ‖A‖ from below, by the products seen
        floor = UNIT_ROUNDOFF * largest * column_norms(x) / norm
        falling = _is_falling(history, rtol)
        if not bool((falling & (residual > floor) & (residual > target)).any()):
            break
        improved = bool(better.any())
        if not improved and not directions:
            break  # the next step would be the same
        directions = [*directions, (z, w)][-_MAX_DIRECTIONS:] if improved else []
    return Refined(x * scale, residual)


def _is_falling(history: list[Tensor], rtol: float) -> Tensor:
    """(k,) whether one more step is worth its cost, from the residuals (k,) after each step so far."""
    residual = history[-1]
    falling = residual < 0.5 * history[-2]
    if len(history) > 2:  # below rtol, a rate that breaks down has met rounding
        falling &= (residual > rtol) | (residual * history[-3] < 100 * history[-2] ** 2)
    if len(history) > _PATIENCE:
        falling |= (residual > rtol) & (residual < 0.5 * history[-1 - _PATIENCE])
    else:
        falling |= residual > rtol
    return falling


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
    """The minimum-norm x with A x = v for a singular symmetric A and v (P, k) in its range.

    The residual tells whether it was found.

    The outer iteration is GCR on A. Its preconditioner, (A + δI)⁻¹ with a small shift δ, leaves the range of A
    invariant. Each of these solves is itself refined, since rounding in the null space is amplified by 1/δ and A can't
    see it. The outer iteration stops above the rounding level, where a residual is noise from the null space. A part of
    v outside the range, if rtol lets it pass, is amplified too; x is freed of it at the end.
    """
    if not bool(v.any()):
        return MinimumNorm(torch.zeros_like(v), v.new_zeros(v.shape[1]), 0.0, None)
    v, scale = unit_columns(v)
    norm, tried = spectral_norm(product, v), []
    norm = norm if norm > 0 else 1.0  # A = 0: any shift shows that v is outside its range
    for shift in _SHIFTS:
        shifted = factor_shifted(shift * norm)

        def precondition(r: Tensor, shifted: Shifted = shifted) -> Tensor:
            return refine(shifted._product, shifted._direct, r, rtol, target=_SHIFTED_RTOL).x

        def near_null(y: Tensor, solve: Callable = precondition, delta: float = shift * norm) -> Tensor:
            return delta * solve(delta * solve(y))  # (δ(A + δI)⁻¹)² leaves what lies where |μ| ≲ δ

        def solve_range(y: Tensor, solve: Callable = precondition) -> Refined:
            return refine(product, solve, y, rtol, target=1e-4 * rtol, null=NULL * norm)

        x, residual = solve_range(v)
        if bool((residual <= rtol).all()):
            # take out all of x that is near the null space, and solve for what A sees of that, and of what is left of v
            r = v - product(x)
            near_x, near_r = near_null(torch.cat([x, r], 1)).chunk(2, 1)
            cleaned = x - near_x + solve_range(product(near_x) + r - near_r).x
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

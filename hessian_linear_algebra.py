"""Dense symmetric linear algebra for hessian.py: an indefinite factorization, and refinement of solves."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.linalg import blas, lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
_UPDATE_BLOCK = 512  # without LAPACK, symmetric updates are done by rows of blocks of this size, the lower half only
_MIRROR_BLOCK = 128
_MANY_THREADS = 512  # matrices that are worth more than one thread of LAPACK
_SMALL = 128  # matrices for which calls cost more than operations
_ROTATED_COLUMNS = 256
NULL = 1e-12  # relative to ‖A‖: what `minimum_norm` takes for the null space
_MAX_REFINEMENTS = 40
_PATIENCE = 5  # refinement above rtol goes on while the residual halves in this many steps
_MAX_DIRECTIONS = 20  # GCR combines a correction with at most so many earlier ones
_SHIFTS = (1e-7, 1e-8)  # relative to ‖A‖; the larger resolves fewer eigenvalues, and loses fewer digits


class SymmetricFactor(NamedTuple):
    """G = F Σ Fᵀ with F = Πᵀ L V |D|^½ Sᵀ: Cholesky (L alone), or LDLᵀ whose 2 × 2 blocks V diagonalizes. S puts the
    positive pivots first."""

    lower: Tensor  # (m, m), only the lower triangle is read
    num_positive: int  # Σ = diag(1, …, 1, −1, …, −1)
    root: np.ndarray  # (m,) |D|^½ in the order of Σ
    interchanges: _Interchanges | None  # None for Cholesky

    def whiten(self, b: Tensor, scratch: Callable[..., Tensor] | None = None) -> Tensor:
        """F⁻¹ b for b (m, k), which may be overwritten. scratch(like, *shape): memory to work in."""
        if self.interchanges is None:
            return solve_triangular(self.lower, b)
        order, pairs, cosine, sine, sort, scale = self.interchanges
        ordered = b[order] if scratch is None else torch.index_select(b, 0, order, out=scratch(b, *b.shape))
        solved = solve_triangular(self.lower, ordered, unit=True)
        _rotate(solved, pairs, cosine, -sine)
        return torch.index_select(solved, 0, sort, out=b).div_(scale)

    def unwhiten(self, b: Tensor) -> Tensor:
        """F⁻ᵀ b for b (m, k), which may be overwritten."""
        if self.interchanges is None:
            return solve_triangular(self.lower, b, transpose=True)
        order, pairs, cosine, sine, sort, scale = self.interchanges
        b = torch.empty_like(b).index_copy_(0, sort, b / scale)
        _rotate(b, pairs, cosine, sine)
        solved = solve_triangular(self.lower, b, transpose=True, unit=True)
        return torch.empty_like(solved).index_copy_(0, order, solved)

    def sign(self, b: Tensor) -> Tensor:
        """Σ b in place."""
        b[self.num_positive :].neg_()
        return b

    def num_negative(self) -> int:
        return len(self.lower) - self.num_positive

    def logabsdet(self) -> float:
        return 2 * float(np.log(self.root).sum())


class _Interchanges(NamedTuple):
    order: Tensor  # (m,) Π as row order: (Π G Πᵀ) = G[order][:, order]
    pairs: Tensor  # (p,) first rows of the 2 × 2 blocks
    cosine: Tensor  # (p, 1) the eigenvectors of block i are the columns of [[cᵢ, sᵢ], [−sᵢ, cᵢ]]
    sine: Tensor  # (p, 1)
    sort: Tensor  # (m,) S as row order
    scale: Tensor  # (m, 1) |D|^½, sorted


def _rotate(b: Tensor, pairs: Tensor, cosine: Tensor, sine: Tensor) -> None:
    if len(pairs) == 0:
        return
    for columns in b.split(_ROTATED_COLUMNS, 1):  # a few at a time, for the memory
        first, second = columns[pairs], columns[pairs + 1]
        columns[pairs] = torch.addcmul(cosine * first, sine, second)
        columns[pairs + 1] = torch.addcmul(cosine * second, sine, first, value=-1)


def factor_symmetric(G: Tensor, definite_only: bool = False, definite_first: bool = True) -> SymmetricFactor | None:
    """Factor G (m, m), both triangles of which are read, and overwritten if it is contiguous; None where a pivot is
    exactly zero, or, where `definite_only`, where G is not positive definite. definite_first: try Cholesky first."""
    G = G.contiguous()  # what LAPACK would copy otherwise, and not overwrite
    diagonal = G.diagonal().clone()
    if definite_first or definite_only:
        lower = cholesky(G)  # a Cholesky factor exists ⇔ G ≻ 0; asking costs a host synchronization
        if lower is not None:
            return SymmetricFactor(lower, len(G), lower.diagonal().numpy(force=True), None)
        if definite_only:
            return None
        G.diagonal().copy_(diagonal)
    found = _ldl(G)
    if found is None:
        return None
    lower, D, below, order, pairs = found
    # Jacobi's rotation of each 2 × 2 block [[D_i, b], [b, D_{i+1}]], b ≠ 0: t = tan of its angle
    b = below[pairs]
    tau = (D[pairs + 1] - D[pairs]) / (2 * b)
    t = np.where(tau < 0, -1.0, 1.0) / (np.abs(tau) + np.hypot(tau, 1.0))
    cosine = 1 / np.sqrt(1 + t * t)
    D[pairs] -= t * b
    D[pairs + 1] += t * b
    if not (np.isfinite(D) & (D != 0)).all():
        return None
    sort = np.argsort(D < 0, kind="stable")
    root = np.sqrt(np.abs(D[sort]))

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(G.device)

    column = [to(x.astype(root.dtype)[:, None]) for x in (cosine, t * cosine, root)]
    interchanges = _Interchanges(to(order), to(pairs), column[0], column[1], to(sort), column[2])
    return SymmetricFactor(lower, len(G) - int((D < 0).sum()), root, interchanges)


# ------------------------------------------------------------------------- kernels: in place, on the CPU by LAPACK
#
# torch copies before it factors, zeroes the other triangle after it, and updates both halves of a symmetric matrix;
# these don't. A row-major matrix is to LAPACK its transpose: what is the lower triangle here is the upper one there.


_BLAS_THREADS = ThreadpoolController().select(user_api="blas")


@contextmanager
def one_pool(device: torch.device, size: int):
    """Let one pool of threads work at a time, torch's or LAPACK's: each spins while it waits for work, on the cores
    that the other needs, and small sweeps took ten times as long. For matrices of `size`: LAPACK's where that is large,
    else torch's. What both were set to comes back at the end."""
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    large = size >= _MANY_THREADS
    with _BLAS_THREADS.limit(limits=threads if large else 1):
        if not large:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _by_lapack(x: Tensor) -> bool:
    return x.is_cpu


_KERNELS = {
    dtype: {name: getattr(module, prefix + name) for module, names in modules for name in names}
    for dtype, prefix in ((torch.float64, "d"), (torch.float32, "s"))
    for modules in [((lapack, ("potrf", "sytrf", "syconv")), (blas, ("trsm", "trsv", "syrk")))]
}


def _lapack(name: str, like: Tensor) -> Callable:
    return _KERNELS[like.dtype][name]


def cholesky(G: Tensor) -> Tensor | None:
    """L, lower triangular, G = L Lᵀ; None where there is none. The lower triangle and the diagonal are overwritten on
    the CPU, G's strict upper triangle is not."""
    if not _by_lapack(G):
        lower, info = torch.linalg.cholesky_ex(G)
        return lower if int(info) == 0 else None
    _, info = _lapack("potrf", G)(G.numpy().T, lower=0, overwrite_a=1, clean=0)
    return G if info == 0 and bool(torch.isfinite(G.diagonal()).all()) else None


def _ldl(G: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """L with Π G Πᵀ = L D Lᵀ (of which the strict lower triangle is to be read), the diagonal of D and what stands
    below it, the order Π, and the first rows of the 2 × 2 blocks. None where a pivot is zero."""
    if _by_lapack(G):
        packed, pivots, info = _lapack("sytrf", G)(G.numpy().T, lower=1, lwork=64 * len(G), overwrite_a=1)
        if info != 0:
            return None
        D = packed.diagonal().copy()
        lower, below, _ = _lapack("syconv", G)(packed, pivots, lower=1, way=0, overwrite_a=1)
        _, order, pairs = _read_pivots(pivots.tolist())
        return torch.from_numpy(lower), D, below, order, pairs
    packed, pivots, info = torch.linalg.ldl_factor_ex(G)
    if int(info) != 0:
        return None
    D, below = packed.diagonal().numpy(force=True).copy(), packed.diagonal(-1).numpy(force=True)
    steps, order, pairs = _read_pivots(pivots.tolist())
    return _unpack_ldl(packed, steps, pairs), D, below, order, pairs


def _read_pivots(pivots: list[int]) -> tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray]:
    """Of LAPACK's sytrf (lower): its steps, each the first column of a block and the two rows interchanged; the order
    Π; and the first rows of the 2 × 2 blocks."""
    steps, order, k = [], list(range(len(pivots))), 0
    while k < len(pivots):
        row = k if pivots[k] > 0 else k + 1
        other = abs(pivots[row]) - 1
        steps.append((k, row, other))
        order[row], order[other] = order[other], order[row]
        k = row + 1
    pairs = [first for first, row, _ in steps if row > first]
    return steps, np.array(order, dtype=np.int64), np.array(pairs, dtype=np.int64)


def _unpack_ldl(packed: Tensor, steps: list[tuple[int, int, int]], pairs: np.ndarray) -> Tensor:
    """LAPACK's sytrf output (lower) → L: its syconv, which torch lacks.

    sytrf leaves L as a product of interchanges and elementary factors: an interchange made at step k was not applied
    to the columns before k. Column j's rows are therefore read in the order of all interchanges after j composed.
    """
    m = len(packed)
    rows = np.empty((m, m), dtype=np.int64)  # row j: where the entries of L's column j stand in `packed`
    current, position, filled = np.arange(m), list(range(m)), m
    for k, i, j in reversed(steps):
        if i != j:
            rows[k:filled], filled = current, k
            current[position[i]], current[position[j]] = j, i
            position[i], position[j] = position[j], position[i]
    rows[:filled] = current
    lower = packed.mT.gather(1, torch.from_numpy(rows).to(packed.device)).mT
    pairs = torch.from_numpy(pairs).to(packed.device)
    lower[pairs + 1, pairs] = 0.0  # that entry belongs to D
    return lower


def solve_triangular(lower: Tensor, b: Tensor, transpose: bool = False, unit: bool = False) -> Tensor:
    """L⁻¹b, or L⁻ᵀb, for b (m, k), on the CPU in its place if b is contiguous. `unit`: L's diagonal is ones, unread."""
    if not _by_lapack(b):
        return torch.linalg.solve_triangular(lower.mT if transpose else lower, b, upper=transpose, unitriangular=unit)
    # LAPACK's view of L: itself in column-major order, or an upper triangle
    L, flipped = (lower.numpy().T, True) if lower.is_contiguous() else (lower.numpy(), False)
    b = b.contiguous()
    if 0 in b.shape:
        return b
    if b.shape[1] == 1:
        x = b.numpy()[:, 0]
        x = _lapack("trsv", b)(L, x, lower=not flipped, trans=transpose != flipped, diag=unit, overwrite_x=1)
        return torch.from_numpy(x)[:, None]
    # from the right: bᵀ L⁻ᵀ, since bᵀ is what LAPACK sees of b
    right = dict(side=1, lower=not flipped, trans_a=transpose == flipped, diag=unit, overwrite_b=1)
    return torch.from_numpy(_lapack("trsm", b)(1.0, L, b.numpy().T, **right).T)


def subtract_gram(P: Tensor, W: Tensor, num_positive: int) -> None:
    """P ← P − W₊ᵀW₊ + W₋ᵀW₋ in the lower triangle of P, in place; W₊ (m, n) the first rows of W, W₋ the others. Where P
    is small, in all of it, which is faster there."""
    for rows, sign in ((W[:num_positive], -1.0), (W[num_positive:], 1.0)):
        if len(rows) == 0:
            continue
        if len(P) <= _SMALL:
            P.addmm_(rows.mT, rows, alpha=sign)
            continue
        if _by_lapack(P):
            assert P.is_contiguous()  # else LAPACK would update a copy
            _lapack("syrk", P)(sign, rows.numpy().T, beta=1.0, c=P.numpy().T, lower=0, overwrite_c=1)
            continue
        for start in range(0, len(P), _UPDATE_BLOCK):
            stop = min(start + _UPDATE_BLOCK, len(P))
            P[start:stop, :stop].addmm_(rows[:, start:stop].mT, rows[:, :stop], alpha=sign)


def largest_entry(P: Tensor) -> Tensor:
    return torch.linalg.vector_norm(P, math.inf)


def mirror(P: Tensor) -> None:
    """Copy the lower triangle, as `subtract_gram` leaves it, to the upper one."""
    if len(P) <= _SMALL:
        return
    for start in range(0, len(P), _MIRROR_BLOCK):
        stop = min(start + _MIRROR_BLOCK, len(P))
        P[:start, start:stop] = P[start:stop, :start].mT
        block = P[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)


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

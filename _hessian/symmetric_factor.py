"""A symmetric, indefinite matrix factored by blocks; updates of symmetric matrices by blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import blas, lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

BLOCK = 128  # symmetric matrices are factored, updated, and mirrored by blocks of this size
# What a block of pivots may add to the rest of G: _SAFE_GROWTH times ε, whose rounding is 1e-11 ε; but no less and no
# more than so many times G's largest entry.
_SAFE_GROWTH = 1e5
_PIVOT_GROWTH = (1.0, 1e3)


class SymmetricFactor(NamedTuple):
    """Π G Πᵀ = F Σ Fᵀ, Σ = ±1, F block lower triangular. The inverses of its diagonal blocks F_kk are kept, so that all
    solves are products: these run at full rate on every device, triangular solves don't."""

    matrix: Tensor  # (m, m) F_kk⁻¹ in the diagonal blocks, the rows of Fᵀ to the right of them; the rest is not read
    edges: list[int]  # rows edges[k] … edges[k + 1] are block k
    order: Tensor | None  # (m,) Π as row order, Π B = B[order]; None: as it is
    signs: Tensor | None  # (m, 1) the diagonal of Σ; None: ones
    num_negative: int
    logabsdet: float

    @property
    def is_one_block(self) -> bool:
        """Whether `matrix` is F⁻¹ Π."""
        return len(self.edges) == 2 and self.order is None

    def whiten(self, B: Tensor) -> Tensor:
        """F⁻¹ Π B for B (m, n), row-major; in B's memory, unless there is one block."""
        if self.is_one_block:
            return self.matrix @ B
        if self.order is not None:
            B.copy_(B[self.order])
        for start, stop in zip(self.edges, self.edges[1:], strict=False):
            rows = B[start:stop]
            if start:
                rows.addmm_(self.matrix[:start, start:stop].mT, B[:start], alpha=-1)
            rows.copy_(self.matrix[start:stop, start:stop] @ rows)
        return B

    # A few vectors are the rows of b (k, m): as columns, BLAS' thin products are up to fifty times slower.

    def whiten_vectors(self, b: Tensor) -> Tensor:
        """F⁻¹ Π of each row of b (k, m), which may be overwritten."""
        if self.is_one_block:
            return b @ self.matrix.mT
        if self.order is not None:
            b = b[:, self.order]
        for start, stop in zip(self.edges, self.edges[1:], strict=False):
            columns = b[:, start:stop]
            if start:
                columns = torch.addmm(columns, b[:, :start], self.matrix[:start, start:stop], alpha=-1)
            b[:, start:stop] = columns @ self.matrix[start:stop, start:stop].mT
        return b

    def unwhiten_vectors(self, b: Tensor) -> Tensor:
        """Πᵀ F⁻ᵀ of each row of b (k, m), which may be overwritten."""
        if self.is_one_block:
            return b @ self.matrix
        for start, stop in zip(self.edges[-2::-1], self.edges[:0:-1], strict=True):
            columns = b[:, start:stop]
            if stop < b.shape[1]:
                columns = torch.addmm(columns, b[:, stop:], self.matrix[start:stop, stop:].mT, alpha=-1)
            b[:, start:stop] = columns @ self.matrix[start:stop, start:stop]
        return b if self.order is None else torch.empty_like(b).index_copy_(1, self.order, b)

    def sign(self, b: Tensor) -> Tensor:
        """Σ of each row of b (k, m), in place."""
        return b if self.signs is None else b.mul_(self.signs[:, 0])

    def solve(self, v: Tensor) -> Tensor:
        """G⁻¹ v for v (m, k)."""
        return self.unwhiten_vectors(
            self.sign(self.whiten_vectors(v.mT.clone(memory_format=torch.contiguous_format)))
        ).mT


def factor_symmetric(
    G: Tensor, epsilon: float = 1.0, *, definite_only: bool = False, definite_first: bool = True
) -> SymmetricFactor | None:
    """Factor G (m, m), which is overwritten. None where a pivot is exactly zero; with `definite_only`, where G is not
    positive definite. epsilon: the damping in G. definite_first: try Cholesky until it fails.

    A block of BLOCK rows is factored by Cholesky where that exists, else by LDLᵀ with Bunch–Kaufman pivots from within
    the block. A block can have eigenvalues near 0 though G has none. Where one would therefore add too much to the rest
    (_PIVOT_GROWTH), pivots are chosen from all of the rest. In float32, which has no digits to lose, that begins at the
    first block that is not positive definite.
    """
    m = G.shape[0]  # len(G) takes ten times as long
    if m <= BLOCK:
        block = _factor_block(G, definite_only, definite_first)
        if block is None:
            return None
        # what is kept stays in G's memory: beside torch's arrays NumPy's would leave holes that neither fills
        G.copy_(block.inverse)
        return SymmetricFactor(G, [0, m], None, block.signs, block.num_negative, block.logabsdet)
    largest = float(largest_entry(G))
    low, high = _PIVOT_GROWTH
    bound = math.sqrt(min(max(low * largest, _SAFE_GROWTH * abs(epsilon)), high * largest))
    signs, order, num_negative, logabsdet = G.new_ones(m, 1), None, 0, 0.0
    edges = [0]
    while edges[-1] < m:
        start, stop = edges[-1], min(edges[-1] + block_size(m), m)
        _subtract_above(G, signs if num_negative else None, start, slice(start, stop))
        block = _factor_block(G[start:stop, start:stop], definite_only, definite_first and num_negative == 0)
        if block is None and (definite_only or stop == m):
            return None
        if G.dtype == torch.float32 and block is not None and block.signs is not None and stop < m:
            block = None
        if block is not None and stop < m:
            rows = (block.inverse if block.signs is None else block.signs * block.inverse) @ G[start:stop, stop:]
            if not definite_only and not float(largest_entry(rows)) <= bound:
                block = None
        if block is None:
            _subtract_above(G, signs if num_negative else None, start, slice(stop, m))
            rest = _factor_rest(G[start:, start:])
            if rest is None:
                return None
            assert rest.order is not None and rest.signs is not None
            order = torch.cat([torch.arange(start, device=G.device), start + rest.order])
            G[:start, start:] = G[:start, start:][:, rest.order]
            G[start:, start:] = rest.matrix
            edges += [start + edge for edge in rest.edges[1:]]
            signs[start:] = rest.signs
            num_negative, logabsdet = num_negative + rest.num_negative, logabsdet + rest.logabsdet
            break
        G[start:stop, start:stop] = block.inverse
        if stop < m:
            G[start:stop, stop:] = rows
        if block.signs is not None:
            signs[start:stop] = block.signs
        num_negative, logabsdet = num_negative + block.num_negative, logabsdet + block.logabsdet
        edges.append(stop)
    return SymmetricFactor(G, edges, order, signs if num_negative else None, num_negative, logabsdet)


def _subtract_above(G: Tensor, signs: Tensor | None, start: int, rows: slice) -> None:
    """From these rows of G, what the factored rows before `start` contribute to them."""
    if start:
        above = G[:start, rows] if signs is None else signs[:start] * G[:start, rows]
        G[rows, start:].addmm_(above.mT, G[:start, start:], alpha=-1)


# --------------------------------------------------------------------- by LAPACK: on the CPU, wherever the matrix is


_BLAS_THREADS = ThreadpoolController().select(user_api="blas")


@contextmanager
def one_pool(device: torch.device) -> Iterator[None]:
    """Give SciPy's BLAS and LAPACK one thread, until the end of the block.

    Torch has a pool of threads of its own. Each pool spins while it waits for work, on the cores that the other needs:
    with both, small sweeps took ten times as long.
    """
    if device.type != "cpu":
        yield
        return
    with _BLAS_THREADS.limit(limits=1):
        yield


_KERNELS = {
    dtype: {name: getattr(module, prefix + name) for module, names in modules for name in names}
    for dtype, prefix in ((np.dtype("float64"), "d"), (np.dtype("float32"), "s"))
    for modules in [((lapack, ("potrf", "sytrf", "syconv", "laswp")), (blas, ("trsm",)))]
}


def _lapack(name: str, like: np.ndarray) -> Callable:
    return _KERNELS[like.dtype][name]


class _Block(NamedTuple):
    inverse: Tensor  # (m, m) F⁻¹, of G = F Σ Fᵀ
    signs: Tensor | None
    num_negative: int
    logabsdet: float


class _Pivoted(NamedTuple):
    """Π G Πᵀ = L D Lᵀ by Bunch and Kaufman, V the eigenvectors of D's 2 × 2 blocks."""

    lower: np.ndarray  # (m, m) column-major, L below its diagonal of ones
    root: np.ndarray  # (m, 1) square roots of the sizes of D's eigenvalues
    signs: np.ndarray  # (m, 1) their signs
    num_negative: int
    logabsdet: float
    first: np.ndarray  # first rows of the 2 × 2 blocks
    cosine: np.ndarray  # (p, 1) V's columns in block i are [cᵢ, −sᵢ] and [sᵢ, cᵢ]
    sine: np.ndarray
    interchanges: np.ndarray  # (m,) Π: row i and row interchanges[i] are swapped, one after the other

    def rotate(self, rows: np.ndarray, start: int, stop: int) -> None:
        """Vᵀ of rows start … stop, which split no 2 × 2 block, in place."""
        first, cosine, sine = self.first, self.cosine, self.sine
        if stop - start < len(self.lower):
            inside = slice(*np.searchsorted(first, (start, stop)))
            first, cosine, sine = first[inside] - start, cosine[inside], sine[inside]
        if len(first) == 0:
            return
        second = first + 1
        for left in range(0, rows.shape[1], BLOCK):  # a few columns at a time, for the memory
            columns = rows[:, left : left + BLOCK]
            upper, lower = columns[first], columns[second]
            columns[first] = cosine * upper - sine * lower
            columns[second] = cosine * lower + sine * upper


def _block_edges(m: int, first: np.ndarray) -> list[int]:
    """Of blocks of BLOCK rows, none of which splits a 2 × 2 block."""
    edges = [0]
    while edges[-1] < m:
        stop = min(edges[-1] + BLOCK, m)
        edges.append(stop + bool((first == stop - 1).any()))
    return edges


def _converted(packed: np.ndarray, first: np.ndarray, interchanges: np.ndarray) -> np.ndarray:
    """Turn what sytrf left into L, in place, and return what is below D's diagonal, as LAPACK's syconv does.

    syconv swaps whole rows, one after the other. With contiguous columns that takes half of the factorization's time.
    Here a row is swapped in its own block of columns only, and the blocks before are gathered once.
    """
    rows, m = packed.T, len(packed)  # of Lᵀ
    below = np.zeros(m, rows.dtype)
    below[first] = rows[first, first + 1]
    rows[first, first + 1] = 0
    swaps, num_left = interchanges.tolist(), np.arange(m)
    num_left[first + 1] -= 1  # the columns left of row i's pivot, which its swap moves
    left, edges, order = num_left.tolist(), _block_edges(m, first), np.arange(m)
    for start, stop in zip(edges[-2::-1], edges[:0:-1], strict=True):
        swapped = np.arange(m)
        for i in range(start, stop):
            j = swaps[i]
            if j != i:
                block = rows[start : left[i]]
                kept = block[:, i].copy()
                block[:, i] = block[:, j]
                block[:, j] = kept
                swapped[i], swapped[j] = swapped[j], swapped[i]
        rows[start:stop, stop:] = rows[start:stop].take(order[stop:], 1)
        order = swapped[order]
    return below


def _pivoted(G: np.ndarray) -> _Pivoted | None:
    """None where a pivot is exactly zero, or not finite."""
    packed, pivots, info = _lapack("sytrf", G)(G.T, lower=1, lwork=64 * len(G))
    if info != 0:
        return None
    D = packed.diagonal().copy()
    first = (pivots < 0).nonzero()[0][::2]  # the negative pivots come in twos
    interchanges = np.abs(pivots) - 1
    interchanges[first] = first
    if len(G) <= BLOCK:
        lower, below, _ = _lapack("syconv", G)(packed, pivots, lower=1, way=0, overwrite_a=1)
    else:
        lower, below = packed, _converted(packed, first, interchanges)
    # Jacobi's rotation of each 2 × 2 block [[D_i, b], [b, D_{i+1}]], b ≠ 0: t = tan of its angle
    second, b = first + 1, below[first]
    tau = (D[second] - D[first]) / (2 * b)
    t = np.copysign(1 / (np.abs(tau) + np.hypot(tau, 1.0)), tau)
    D[first] -= t * b
    D[second] += t * b
    cosine = (1 / np.hypot(t, 1.0))[:, None]
    size = np.abs(D)
    if not size.all():
        return None
    logabsdet = float(np.log(size).sum())
    if not math.isfinite(logabsdet):
        return None
    root, signs = np.sqrt(size)[:, None], np.copysign(1.0, D)[:, None]
    sine, num_negative = t[:, None] * cosine, int(np.count_nonzero(D < 0))
    return _Pivoted(lower, root, signs, num_negative, logabsdet, first, cosine, sine, interchanges)


_FROM_RIGHT = dict(side=1, lower=1, trans_a=1, overwrite_b=1)  # a row-major matrix is to LAPACK its transpose


def _factor_block(block: Tensor, definite_only: bool, definite_first: bool) -> _Block | None:
    """By Cholesky, where that is tried and exists, else by LDLᵀ: F = Πᵀ L V |D|^½. None where a pivot is zero; with
    `definite_only`, where one is negative. On another device it costs two transfers and a synchronization."""
    G = block.numpy(force=True)
    inverse = np.eye(len(G), dtype=G.dtype).T
    if definite_first or definite_only:
        L, info = _lapack("potrf", G)(G.T, lower=1, clean=0)
        if info == 0:
            logabsdet = 2 * float(np.log(L.diagonal()).sum())
            if not math.isfinite(logabsdet):
                return None
            inverse = _lapack("trsm", G)(1.0, L, inverse, **_FROM_RIGHT).T
            return _Block(torch.from_numpy(inverse).to(block.device), None, 0, logabsdet)
        if definite_only:
            return None
        del L
    found = _pivoted(G)
    if found is None:
        return None
    inverse = _lapack("laswp", G)(inverse, found.interchanges, inc=-1, overwrite_a=1)
    inverse = _lapack("trsm", G)(1.0, found.lower, inverse, diag=1, **_FROM_RIGHT).T
    found.rotate(inverse, 0, len(G))
    inverse *= 1 / found.root
    kept, signs = (torch.from_numpy(x).to(block.device) for x in (inverse, found.signs))
    return _Block(kept, signs, found.num_negative, found.logabsdet)


def _factor_rest(rest: Tensor) -> SymmetricFactor | None:
    """By LDLᵀ with pivots from all of it. None where a pivot is zero."""
    G = rest.numpy(force=True)
    found = _pivoted(G)
    if found is None:
        return None
    m, root = len(G), found.root
    rows = found.lower.T  # Lᵀ, row-major, of which what is right of the diagonal blocks will be read
    edges, inverses = _block_edges(m, found.first), []
    for start, stop in zip(edges, edges[1:], strict=False):
        lower, inverse = found.lower[start:stop, start:stop], np.eye(stop - start, dtype=G.dtype).T
        inverse = _lapack("trsm", G)(1.0, lower, inverse, diag=1, **_FROM_RIGHT).T
        found.rotate(inverse, start, stop)
        inverses.append(inverse / root[start:stop])
    found.rotate(rows, 0, m)
    rows *= root
    for start, stop, inverse in zip(edges, edges[1:], inverses, strict=False):
        rows[start:stop, start:stop] = inverse
    order = _lapack("laswp", G)(np.arange(m, dtype=G.dtype)[:, None], found.interchanges, overwrite_a=1)[:, 0]
    matrix, order, signs = (torch.from_numpy(x).to(rest.device) for x in (rows, order, found.signs))
    return SymmetricFactor(matrix, edges, order.long(), signs, found.num_negative, found.logabsdet)


def subtract_gram(P: Tensor, W: Tensor, signs: Tensor | None) -> Tensor:
    """P ← P − Wᵀ Σ W in place, for P (n, n), W (m, n) and the diagonal of Σ (m, 1), or None for Σ = I. Returns Σ W.

    Where P is large, only its blocks on and below the diagonal change, and Σ W takes W's memory.
    """
    if P.shape[0] <= BLOCK:
        signed = W if signs is None else signs * W
        P.addmm_(signed.mT, W, alpha=-1)
        return signed
    subtract_gram_below(P, W, signs)
    return W if signs is None else W.mul_(signs)


def subtract_gram_below(P: Tensor, W: Tensor, signs: Tensor | None) -> None:
    """P ← P − Wᵀ Σ W in its blocks on and below the diagonal. By halves: BLAS is slow where one side is short."""
    n = P.shape[0]
    half = n if n <= 2 * BLOCK else n // 2 // BLOCK * BLOCK
    right = W[:, half - n :] if half < n else W
    signed = right if signs is None else signs * right
    if half == n:
        P.addmm_(signed.mT, W, alpha=-1)
        return
    P[half:, :half].addmm_(signed.mT, W[:, :half], alpha=-1)
    del signed
    subtract_gram_below(P[:half, :half], W[:, :half], signs)
    subtract_gram_below(P[half:, half:], right, signs)


def block_size(m: float) -> int:
    """Rows of a block of a matrix (m, m). Twice as many in a large one: a third less time at m = 4096."""
    return BLOCK if m <= 2048 else 2 * BLOCK


def largest_entry(P: Tensor) -> Tensor:
    least, largest = torch.aminmax(P)  # ten times as fast as the norm, on one core
    return torch.maximum(-least, largest)


def mirror(P: Tensor) -> None:
    """Copy the blocks below the diagonal, as `subtract_gram` leaves them, to above it.

    Those on the diagonal are made symmetric. Otherwise their rounding would grow from layer to layer, unseen by the
    factorization, which reads one triangle.
    """
    if P.shape[0] <= BLOCK:
        return
    for start in range(0, len(P), BLOCK):
        stop = min(start + BLOCK, len(P))
        P[:start, start:stop] = P[start:stop, :start].mT
        block = P[start:stop, start:stop]
        block.copy_((block + block.mT).mul_(0.5))

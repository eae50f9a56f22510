"""The last layer's pivot for many classes: C blocks of r × r minus a matrix of rank N, in place of a dense matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.carried_pivots import Carried
from _hessian.layers import LayerDerivatives
from _hessian.pivots import Eliminated, output_cost_to_go, singular_pivot
from _hessian.reduced_parameters import Reduced
from _hessian.symmetric_factor import subtract_gram

_CHUNK_BYTES = 2**28  # the couplings of so many classes are formed at a time


class ManyClassPivot(NamedTuple):
    """G = blockdiag(D_c) − U Uᵀ, D_c = εI + Rᵀ A_c R.

    From Λ_b = diag(d_b) − u_b u_bᵀ: A_c = diag_b(d[b, c]) and U[(q, c), b] = R[b, q] u[b, c]. The direction that adds
    the same row to every class has neither curvature nor coupling: its part q̄ of q is solved by q̄/ε. The rest sums to
    zero over the classes, and is solved by Woodbury's identity. Its capacitance I − UᵀD⁻¹U is formed without
    cancellation. Without a rank-one term in Λ (mse) there are only the blocks. B stays structured.
    """

    layer: LayerDerivatives
    basis: Tensor  # (d, r) Q
    reduced: Tensor  # (N, r) R
    damping: float
    vectors: Tensor  # (C, r, r) eigenvectors of D_c
    values: Tensor  # (C, r) its eigenvalues
    capacitance: tuple[Tensor, Tensor] | None  # eigenvalues (N,) and eigenvectors (N, N) of I − UᵀD⁻¹U
    carried: Carried | None = None  # nothing is

    @classmethod
    def factored(cls, layer: LayerDerivatives, basis: Tensor | None, reduced: Tensor, damping: float) -> ManyClassPivot:
        if basis is None:
            basis = torch.eye(reduced.shape[1], dtype=reduced.dtype, device=reduced.device)
        root = layer.loss_hessian.diagonal.mT.sqrt()[:, :, None]  # (C, N, 1) A_c^½
        scaled = root * reduced  # (C, N, r)
        values, vectors = torch.linalg.eigh(scaled.mT @ scaled)
        capacitance = None
        if layer.loss_hessian.rank_one is not None:
            # I − UᵀD⁻¹U = w (Σ_c A_c^½ (I + A_c^½ R Rᵀ A_c^½/ε)⁻¹ A_c^½) w, w = (Σ_c A_c)^−½, since u_c = w A_c
            gram, rotation = torch.linalg.eigh(scaled @ scaled.mT)  # (C, N), (C, N, N)
            inverse = (rotation / (1 + gram / damping)[:, None, :]) @ rotation.mT
            w = layer.loss_hessian.diagonal.sum(1).rsqrt()  # (N,)
            capacitance = tuple(torch.linalg.eigh(w[:, None] * (root * inverse * root.mT).sum(0) * w))
        return cls(layer, basis, reduced, damping, vectors, values + damping, capacitance)

    def _solve(self, q: Tensor) -> Tensor:
        """G⁻¹q for q (k, r, C)."""
        u = self.layer.loss_hessian.rank_one
        if self.capacitance is None or u is None:
            return self._solve_blocks(q)
        mean = q.mean(-1, keepdim=True)
        y = self._solve_blocks(q - mean)
        values, vectors = self.capacitance
        w = ((((self.reduced @ y) * u).sum(-1) @ vectors) / values) @ vectors.mT  # (k, N)
        y = y + self._solve_blocks(self.reduced.mT @ (w[:, :, None] * u))
        return y - y.mean(-1, keepdim=True) + mean / self.damping

    def _solve_blocks(self, q: Tensor) -> Tensor:
        """D⁻¹q for q (k, r, C)."""
        columns = self.vectors.mT @ q.permute(2, 1, 0)  # (C, r, k)
        return (self.vectors @ (columns / self.values[:, :, None])).permute(2, 1, 0)

    def reduce(self, P: Tensor) -> None:
        """P ← P − BᵀG⁻¹B in place, in chunks of classes; BᵀG⁻¹B = BᵀD⁻¹B + (UᵀD⁻¹B)ᵀ cap⁻¹ (UᵀD⁻¹B)."""
        layer, R = self.layer, self.reduced
        (C, width), (N, r) = layer.weight.shape, R.shape
        Q, u = self.basis[:width], layer.loss_hessian.rank_one  # (a′, r)
        correction = P.new_zeros(N, len(P))  # UᵀD⁻¹B
        curved = layer.loss_hessian.times(layer.weight)  # (N, C, a′)
        for chunk in torch.arange(C, device=P.device).split(max(1, _CHUNK_BYTES // (8 * r * len(P)))):
            B = torch.einsum("kq,bc->cqbk", Q, layer.adjoint[:, chunk])
            B += torch.einsum("bq,bck->cqbk", R, curved[:, chunk])
            scale = self.values[chunk].abs().sqrt()[:, None, :]  # (c, 1, r)
            whitening = self.vectors[chunk] / scale
            white = (whitening.mT @ B.flatten(2)).flatten(0, 1)  # (c r, n′)
            signed = subtract_gram(P, white, self.values[chunk].sign().view(-1, 1))
            if u is not None:
                U = u[:, chunk].mT[:, :, None] * R  # (c, N, r)
                correction += (U @ whitening).transpose(0, 1).flatten(1) @ signed
        if self.capacitance is not None:
            values, vectors = self.capacitance
            subtract_gram(P, vectors.mT @ correction / values.abs().sqrt()[:, None], values.sign()[:, None])

    def backward(self, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        layer = self.layer
        y = self._solve(q.unflatten(1, (-1, len(layer.weight))))
        back = layer.loss_hessian.apply(self.reduced @ y) @ layer.weight
        back = back + layer.adjoint @ (y.mT @ self.basis[: layer.weight.shape[1]].mT)
        return y, back.flatten(1), None

    def forward(self, state: Tensor, t: Tensor | None, w: Tensor | None) -> Tensor:
        y = state
        if t is not None:
            layer, (N, width) = self.layer, (len(self.reduced), self.layer.weight.shape[1])
            t = t.unflatten(1, (N, width))
            linear = layer.adjoint.mT @ t @ self.basis[:width]  # (k, C, r) S t
            y = y + self._solve(linear.mT + self.reduced.mT @ layer.loss_hessian.apply(t @ layer.weight.mT))
        return -y.flatten(1)

    def num_negative(self) -> int:
        count = int((self.values < 0).sum())
        return count if self.capacitance is None else count + int((self.capacitance[0] < 0).sum())

    def logabsdet(self) -> Tensor:
        total = self.values.abs().log().sum()
        return total if self.capacitance is None else total + self.capacitance[0].abs().log().sum()


def eliminate_many_classes(layer: LayerDerivatives, reduced: Reduced, epsilon: float, index: int) -> Eliminated:
    """The output layer's, by the structure that its pivot has with many classes."""
    if epsilon == 0 and layer.loss_hessian.zero_sum:
        raise singular_pivot(index, epsilon, "the same row added to the weights of every class changes nothing")
    pivot = ManyClassPivot.factored(layer, reduced.basis, reduced.rows, epsilon)
    P = output_cost_to_go(layer) if index else None
    if P is not None:
        pivot.reduce(P)
    negative = pivot.num_negative()
    return Eliminated(pivot, negative, float(pivot.logabsdet()), P, None, negative == 0)

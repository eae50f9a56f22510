"""The last layer's pivot for many classes: C blocks of r × r minus a matrix of rank N, in place of a dense matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.graph import Value
from _hessian.layers import LayerDerivatives
from _hessian.symmetric_factor import mirror, subtract_gram

_CHUNK_BYTES = 2**28  # the couplings of so many classes are formed at a time


class ManyClassPivot(NamedTuple):
    """G = blockdiag(D_c) − U Uᵀ, D_c = εI + Rᵀ A_c R.

    From Λ_b = diag(d_b) − u_b u_bᵀ: A_c = diag_b(d[b, c]) and U[(q, c), b] = R[b, q] u[b, c]. The direction that adds
    the same row to every class has neither curvature nor coupling: its part q̄ of q is solved by q̄/ε. The rest sums to
    zero over the classes, and is solved by Woodbury's identity. Its capacitance I − UᵀD⁻¹U is formed without
    cancellation. Without a rank-one term in Λ (mse) there are only the blocks. B stays structured.
    """

    values: tuple[Value]  # Y
    z: Value | None
    layer: LayerDerivatives
    basis: Tensor  # (d, r) Q
    reduced: Tensor  # (N, r) R
    damping: float
    vectors: Tensor  # (C, r, r) eigenvectors of D_c
    eigenvalues: Tensor  # (C, r)
    capacitance: tuple[Tensor, Tensor] | None  # eigenvalues (N,) and eigenvectors (N, N) of I − UᵀD⁻¹U

    @classmethod
    def factored(
        cls,
        value: Value,
        z: Value | None,
        layer: LayerDerivatives,
        basis: Tensor | None,
        reduced: Tensor,
        damping: float,
    ) -> ManyClassPivot:
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
        return cls((value,), z, layer, basis, reduced, damping, vectors, values + damping, capacitance)

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
        return (self.vectors @ (columns / self.eigenvalues[:, :, None])).permute(2, 1, 0)

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
            scale = self.eigenvalues[chunk].abs().sqrt()[:, None, :]  # (c, 1, r)
            whitening = self.vectors[chunk] / scale
            white = (whitening.mT @ B.flatten(2)).flatten(0, 1)  # (c r, n′)
            signed = subtract_gram(P, white, self.eigenvalues[chunk].sign().view(-1, 1))
            if u is not None:
                U = u[:, chunk].mT[:, :, None] * R  # (c, N, r)
                correction += (U @ whitening).transpose(0, 1).flatten(1) @ signed
        if self.capacitance is not None:
            values, vectors = self.capacitance
            subtract_gram(P, vectors.mT @ correction / values.abs().sqrt()[:, None], values.sign()[:, None])
        mirror(P)

    def backward(self, q: Tensor) -> tuple[Tensor, dict[Value, Tensor]]:
        layer = self.layer
        y = self._solve(q.unflatten(1, (-1, len(layer.weight))))
        if self.z is None:
            return y, {}
        back = layer.loss_hessian.apply(self.reduced @ y) @ layer.weight
        back = back + layer.adjoint @ (y.mT @ self.basis[: layer.weight.shape[1]].mT)
        return y, {self.z: back.flatten(1)}

    def forward(self, state: Tensor, t: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        y = state
        if self.z is not None:
            layer, (N, width) = self.layer, (len(self.reduced), self.layer.weight.shape[1])
            t_z = t[self.z].unflatten(1, (N, width))
            linear = layer.adjoint.mT @ t_z @ self.basis[:width]  # (k, C, r) S t
            y = y + self._solve(linear.mT + self.reduced.mT @ layer.loss_hessian.apply(t_z @ layer.weight.mT))
        return {self.values[0]: -y.flatten(1)}

    def num_negative(self) -> int:
        count = int((self.eigenvalues < 0).sum())
        return count if self.capacitance is None else count + int((self.capacitance[0] < 0).sum())

    def logabsdet(self) -> float:
        total = self.eigenvalues.abs().log().sum()
        return float(total if self.capacitance is None else total + self.capacitance[0].abs().log().sum())

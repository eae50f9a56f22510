"""Reduced parameters: the part of an operation's weights that acts on the batch; the rest is eliminated in closed form.

X acts on the batch through z̃ = R Qᵀ only: X = Y Qᵀ + X⊥, X⊥Q = 0. The elimination solves for Y. X⊥ meets nothing but
ε and λ:

    X⊥ = (V − λᵀ[t, 0]) (I − QQᵀ)/ε

So it adds −(λλᵀ) ⊗ (I − QQᵀ)/ε, without the bias, to the cost-to-go of z, and λ (V − V QQᵀ)/ε to its slope. Where there
are at least d rows, X⊥ = 0. The notation is hessian.py's, with the rows of one sample after another for N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.carried_pivots import CarriedOutside
from _hessian.graph import Value


def reduced_rows(z: Tensor) -> tuple[Tensor, Tensor | None]:
    """R (…, N, r) and Q (…, d, r) of z̃ (…, N, d). Where N ≥ d, Q is the identity (None) and R = z̃."""
    if z.shape[-2] >= z.shape[-1]:
        return z, None
    Q, R = torch.linalg.qr(z.mT)
    return R.mT.contiguous(), Q


def add_coupling(B: Tensor, adjoint: Tensor, Q: Tensor | None, width: int) -> None:
    """B += S: Y[i, q] meets t[b, k] by λ[b, i] Q[k, q]. B (r a, N width), λ (N, a), Q (d, r)."""
    S = B.view(-1, adjoint.shape[1], adjoint.shape[0], width)
    if Q is None:
        S.diagonal(dim1=0, dim2=3)[:, :, :width].add_(adjoint.mT[:, :, None])
    else:
        S.addcmul_(adjoint.mT[:, :, None], Q[:width].mT[:, None, None, :])


def subtract_outside(P: Tensor, adjoint: Tensor, outside: Tensor, epsilon: float) -> None:
    """P −= (λλᵀ) ⊗ (I − QQᵀ)/ε: what X⊥ adds. P (N width, N width), λ (N, a), I − QQᵀ (width, width)."""
    rows, width = adjoint.shape[0], outside.shape[0]
    P.view(rows, width, rows, width).addcmul_(
        (adjoint @ adjoint.mT)[:, None, :, None], outside[:, None, :], value=-1 / epsilon
    )


def _times(blocks: Tensor, matrices: Tensor) -> Tensor:
    """Blocks (g, k, a, d) times (g, d, r): (g, k, a, r), all k of one together, which is faster than k products."""
    return (blocks.flatten(1, 2) @ matrices).unflatten(1, blocks.shape[1:3])


class Reduced(NamedTuple):
    """Right-hand sides V and solutions X of g operations of one shape, together: one product serves them all.

    Each operation has G groups of channels, 1 but in convolutions. V and X are (g G, k, a, d).
    """

    own: Sequence[Value]  # Y, flat (G, r, a)
    z: Sequence[Value | None]  # the input; None where it has no tangent
    Q: Tensor | None  # (g G, d, r); None: the identity
    adjoint: Tensor  # λ (g G, N, a)
    width: int  # of the inputs without the bias; 0 where λ couples nothing
    unfold: Callable[[Tensor], Tensor]  # an input's change (k, n_z) in rows, (k, G, N, width)
    fold: Callable[[Tensor], Tensor]  # its transpose

    def split(
        self, V: Tensor, p: MutableMapping[Value, Tensor], coupled: MutableMapping[Value, Tensor]
    ) -> Tensor | None:
        """−(V Q)ᵀ (k, m) into p and, if there is any, λ V⊥ (k, n_z) without the bias into `coupled`, by Y.

        Returns V⊥ = V − V Q Qᵀ (g G, k, a, d), None for 0. V may be overwritten.
        """
        within = V if self.Q is None else _times(V, self.Q)
        p.update(zip(self.own, self._by_operation(within.mT).flatten(2).neg(), strict=True))
        if self.Q is None:
            return None
        V.sub_(_times(within, self.Q.mT))
        if self.width and any(self.z):
            pull = self._by_operation(self.adjoint[:, None] @ V[..., : self.width])
            coupled.update(zip(self.own, self.fold(pull.flatten(0, 1)).unflatten(0, pull.shape[:2]), strict=True))
        return V

    def _by_operation(self, x: Tensor) -> Tensor:
        """(g G, k, …) → (g, k, G, …)"""
        return x.unflatten(0, (len(self.own), -1)).transpose(1, 2)

    def assemble(
        self,
        t: Mapping[Value, Tensor],
        outside: Tensor | None,
        epsilons: Mapping[Value, float],
        carried: Mapping[Value, CarriedOutside],
    ) -> Tensor:
        """X = Y Qᵀ + X⊥ from the changes t of all values and V⊥, which is overwritten. carried: parts of X⊥."""
        Y = torch.stack([t[value] for value in self.own])  # (g, k, m)
        a = self.adjoint.shape[2]
        Y = Y.unflatten(2, (len(self.adjoint) // len(self.own), -1, a)).transpose(1, 2).flatten(0, 1).mT
        if self.Q is None or outside is None:
            return Y
        z = [t[value] for value in self.z if value is not None]
        if self.width and z:
            missing = [torch.zeros_like(z[0])] * (len(self.z) - len(z))  # the first layer's t_0 = 0
            rows = self.unfold(torch.cat([*missing, *z]))  # (g k, G, N, width)
            rows = rows.unflatten(0, (len(self.z), -1)).transpose(1, 2).flatten(0, 1)
            coupled = self.adjoint[:, None].mT @ rows  # (g G, k, a, width)
            outside += _times(_times(coupled, self.Q[:, : self.width]), self.Q.mT)
            outside[..., : self.width] -= coupled
        dampings = outside.new_tensor([epsilons[value] for value in self.own])
        by_operation = outside.unflatten(0, (len(self.own), -1))
        by_operation /= dampings[:, None, None, None, None]
        for i, value in enumerate(self.own):
            if value in carried:
                carried[value].insert(by_operation[i, 0], t)
        return outside.add_(_times(Y, self.Q.mT))

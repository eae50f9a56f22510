"""Reduced parameters: the part of a layer's weights that acts on the batch; the rest is eliminated in closed form.

X acts on the batch through z̃ = R Qᵀ only: X = Y Qᵀ + X⊥, X⊥Q = 0. The sweeps of hessian.py solve for Y. X⊥ meets
nothing but ε and λ:

    X⊥ = (V − λᵀ[t, 0]) (I − QQᵀ)/ε

So it adds −(λλᵀ) ⊗ (I − QQᵀ)/ε, without the bias, to the cost-to-go below, and λ (V − V QQᵀ)/ε to its slope. Where
N ≥ d, X⊥ = 0. The notation is hessian.py's; (k, …) are the blocks of k right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.layers import LayerDerivatives, same_shape_groups


class Reduced(NamedTuple):
    """z̃ = R Qᵀ. Where N ≥ d, Q is the identity (None) and R = z̃."""

    basis: Tensor | None  # (d, r) Q
    rows: Tensor  # (N, r) R
    outside: Tensor | None  # (a′, a′) I − QQᵀ without the bias; None where Q is, or where layer 1 is the only such one

    @property
    def Q(self) -> Tensor:
        assert self.basis is not None, "Q is the identity"
        return self.basis


def reduced_inputs(layers: Sequence[LayerDerivatives]) -> list[Reduced]:
    """Of every layer; one batched QR for those of one shape."""
    reduced: list[Reduced] = []
    for members in same_shape_groups(layers):
        inputs = [layers[i].inputs for i in members]
        N, d = inputs[0].shape
        if N >= d:
            reduced += [Reduced(None, rows, None) for rows in inputs]
            continue
        Q, R = torch.linalg.qr(torch.stack(inputs).mT)
        rows, outside = R.mT.contiguous(), None
        if members[-1] > 0:
            within = Q[:, : layers[members[0]].weight.shape[1]]
            outside = (within @ within.mT).neg_()
            outside.diagonal(dim1=1, dim2=2).add_(1)
        reduced += [Reduced(Q[i], rows[i], None if outside is None else outside[i]) for i in range(len(members))]
    return reduced


def _times(blocks: Tensor, matrices: Tensor) -> Tensor:
    """Blocks (g, k, a, d) times (g, d, r): (g, k, a, r), all k of a layer as one product, which is faster than k."""
    return (blocks.flatten(1, 2) @ matrices).unflatten(1, blocks.shape[1:3])


def split_right_hand_side(
    layers: Sequence[LayerDerivatives], reduced: Sequence[Reduced], V: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """For each layer −(V Q)ᵀ (k, r, a), V⊥ = V − V Q Qᵀ (k, a, d), and λ V⊥ (k, N, a′) without the bias; None for 0."""
    inside: list[Tensor] = []
    outside: list[Tensor | None] = []
    coupled: list[Tensor | None] = []
    for members in same_shape_groups(layers):
        if reduced[members[0]].basis is None:
            inside += [-V[i].mT for i in members]
            outside += [None] * len(members)
            coupled += [None] * len(members)
            continue
        blocks = torch.stack([V[i] for i in members])  # (g, k, a, d)
        bases = torch.stack([reduced[i].Q for i in members])  # (g, d, r)
        within = _times(blocks, bases)
        inside += within.mT.neg()
        outside += blocks.sub_(_times(within, bases.mT)).unbind()
        if members[-1] == 0:  # below layer 1 there is nothing
            coupled.append(None)
            continue
        width = layers[members[0]].weight.shape[1]
        coupled += (torch.stack([layers[i].adjoint for i in members])[:, None] @ blocks[..., :width]).unbind()
    return inside, outside, coupled


def assemble_solution(
    layers: Sequence[LayerDerivatives],
    reduced: Sequence[Reduced],
    epsilons: Sequence[float],
    Y: Sequence[Tensor],
    outside: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    insert_carried: Mapping[int, Callable[[Tensor], None]],
) -> list[Tensor]:
    """X = Y Qᵀ + X⊥ (k, a, d) of each layer, from V⊥ and the states t_{ℓ-1} (k, N, a′).

    insert_carried: for layers whose X⊥ was carried in part, what writes that part into X⊥ (k, a, d).
    """
    X: list[Tensor] = []
    for members in same_shape_groups(layers):
        if outside[members[0]] is None:
            X += [Y[i] for i in members]
            continue
        free = torch.stack([x for i in members if (x := outside[i]) is not None])
        bases = torch.stack([reduced[i].Q for i in members])  # (g, d, r)
        last = states[members[-1]]
        if last is not None:
            width = last.shape[2]
            t = torch.stack([torch.zeros_like(last) if (x := states[i]) is None else x for i in members])  # t_0 = 0
            coupled = torch.stack([layers[i].adjoint for i in members])[:, None].mT @ t  # (g, k, a, a′)
            free += _times(_times(coupled, bases[:, :width]), bases.mT)
            free[..., :width] -= coupled
        for x, i in zip(free.unbind(), members, strict=True):
            x /= epsilons[i]
            if i in insert_carried:
                insert_carried[i](x)
        X += free.add_(_times(torch.stack([Y[i] for i in members]), bases.mT))
    return X

"""A chain of fully connected layers as a program: each layer is one operation, with closed forms for all it does.

The notation is hessian.py's. A layer is an affine map, an activation and a skip, fused: with K = φ′P φ′ + D, the
products K A and JᵀK serve the pivot, its coupling and the cost-to-go below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.carried_pivots import CarriedOutside, Natural, carry_outside
from _hessian.checkpoints import Memory
from _hessian.graph import Value
from _hessian.layers import LayerDerivatives, flatten_groups, grouped_blocks, same_shape_groups, with_skip
from _hessian.many_classes import ManyClassPivot
from _hessian.operations import ALL, Blocks, Count, Operation, Pivot
from _hessian.reduced_parameters import Reduced, add_coupling, reduced_rows, subtract_outside
from _hessian.state import State
from _hessian.symmetric_factor import BLOCK

_TINY = 1e-30  # keeps 0/0 out
_TOGETHER = 2**16  # natural sizes are computed for layers of one shape together, up to so many numbers


class Rows(NamedTuple):
    """z̃ = R Qᵀ of one layer."""

    R: Tensor  # (N, r)
    Q: Tensor | None  # (d, r); None: the identity
    outside: Tensor | None  # (a′, a′) I − QQᵀ without the bias; None where Q is


class Layer(Operation):
    """s = R Yᵀ + t W ᵀ, t_ℓ = φ′ s + σ t; the row (q, i) of Y is Y[i, q], the row (b, i) of t_ℓ is t_ℓ[b, i]."""

    own: Value
    natural: Natural
    layer: int

    def __init__(self, derivatives: LayerDerivatives, rows: Rows, natural: Natural, index: int):
        self.derivatives, self.rows, self.natural, self.layer = derivatives, rows, natural, index + 1
        (a, width), (N, r) = derivatives.weight.shape, rows.R.shape
        self.output = _activation(index, N, a)
        self.own = Value(f"layer {index + 1}", torch.Size([r * a]), None, 1)
        self.z = _activation(index - 1, N, width) if index else None
        self.inputs = (self.own,) if self.z is None else (self.own, self.z)
        self.num_outside = a * (derivatives.inputs.shape[1] - r)

    def pull_back(self, p: Tensor, which: slice = ALL) -> list[Tensor]:
        x = self.derivatives
        p = p.view(p.shape[0], *x.slope.shape)
        slope_p = x.slope * p
        found = [(self.rows.R.mT @ slope_p).flatten(1)]
        if self.z is not None:
            found.append(with_skip(x.skip, slope_p @ x.weight, p).flatten(1))
        return found[which]

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        x, R, t = self.derivatives, self.rows.R, None
        (N, r), (a, width) = R.shape, x.weight.shape
        k = tangents[0].shape[0]
        s = R @ tangents[0].view(k, r, a)
        if self.z is not None:
            t = tangents[1].view(k, N, width)
            s = s + t @ x.weight.mT
        return with_skip(x.skip, x.slope * s, t).flatten(1)

    def add_curvature(self, blocks: Blocks) -> None:
        if self.z is not None:
            x = self.derivatives
            add_coupling(blocks(0, 1), x.adjoint, self.rows.Q, x.weight.shape[1])

    def pull_back_both(self, P: Tensor, state: State, memory: Memory) -> None:
        """JᵀK J, JᵀK A, and TᵀP T + AᵀD A."""
        x, R, z = self.derivatives, self.rows.R, self.z
        W, slope, index = x.weight, x.slope.flatten(), self.layer
        (a, width), (N, r) = W.shape, R.shape
        n, n_below = N * a, N * width
        slope_P = slope[:, None] * P if x.skip and z is not None else None  # φ′P
        K = P.mul_(slope[:, None]).mul_(slope) if slope_P is None else slope_P * slope
        K.diagonal().add_(x.curvature.flatten())
        JK = torch.mm(R.mT, K.view(N, a * n), out=memory.temporary(K, r, a * n))
        G = memory.pivot("G", index, K, r * a, r * a)
        torch.bmm(R.mT.expand(r * a, r, N), JK.view(r * a, N, a), out=G.view(r * a, r, a))
        state.add(self.own, self.own, G)
        if z is None:
            return
        KA = torch.mm(K.view(n * N, a), W, out=memory.temporary(K, n * N, width)).view(n, n_below)
        # where that fits, in the memory of K, which is done with
        below = K if n_below == n and slope_P is None else K.new_empty(n_below, n_below)
        torch.bmm(W.mT.expand(N, width, a), KA.view(N, a, n_below), out=below.view(N, width, n_below))
        if slope_P is not None:  # a = a′: TᵀPT + AᵀDA = AᵀKA + σ(Aᵀφ′P + Pφ′A) + σ²P
            cross = (W.mT @ slope_P.view(N, a, n)).view(n, n)
            below += x.skip * (cross + cross.mT)
            below.add_(P, alpha=x.skip**2)
            KA.add_(slope_P, alpha=x.skip)
        # a small factor whitens it into new memory
        B = memory.pivot("B", index, K, r * a, n_below) if r * a > BLOCK else K.new_empty(r * a, n_below)
        torch.mm(R.mT, KA.view(N, a * n_below), out=B.view(r, a * n_below))
        state.add(self.own, z, B)
        state.add(z, z, below)

    def eliminate_outside(self, epsilon: float, state: State) -> CarriedOutside | None:
        x, Q, outside = self.derivatives, self.rows.Q, self.rows.outside
        if Q is None or outside is None or self.z is None:
            return None
        adjoint, width = x.adjoint, x.weight.shape[1]
        carried = carry_outside(self.own.name, self.natural, adjoint, Q, width, epsilon)
        if carried is not None:
            adjoint = adjoint - carried.adjoint @ carried.left.mT
            state.carry(carried.value, epsilon * torch.eye(carried.value.size, dtype=Q.dtype, device=Q.device))
            state.add(carried.value, self.z, carried.coupling())
        subtract_outside(state.block(self.z, self.z), adjoint, outside, epsilon)
        return carried


class OutputLayer(Layer):
    """The last layer with the loss, ½⟨s, Λ s⟩."""

    def __init__(
        self, derivatives: LayerDerivatives, rows: Rows, natural: Natural, index: int, many_classes: bool = False
    ):
        """many_classes: its pivot has the form of many_classes.py."""
        super().__init__(derivatives, rows, natural, index)
        self.many_classes = many_classes

    def eliminate(self, state: State, memory: Memory) -> None:
        x, R, Lambda = self.derivatives, self.rows.R, self.derivatives.loss_hessian
        W, (N, r), (a, width) = x.weight, R.shape, x.weight.shape
        for value in self.inputs:
            state.enter(value)
        if not self.many_classes:
            blocks = Lambda.apply(torch.eye(a, dtype=W.dtype, device=W.device)[:, None, :].expand(a, N, a))
            outer = (R[:, :, None] * R[:, None, :]).flatten(1)  # (N, r r)
            G = (outer.mT @ blocks.transpose(0, 1).flatten(1)).view(r, r, a, a).transpose(1, 2)
            state.add(self.own, self.own, G.reshape(r * a, r * a))
        if self.z is None:
            return
        curved = Lambda.times(W)  # (N, a, a′)
        if not self.many_classes:
            state.add(self.own, self.z, torch.einsum("bq,bik->qibk", R, curved).reshape(r * a, N * width))
            self.add_curvature(lambda i, j: state.block(self.inputs[i], self.inputs[j]))
        P = W.new_zeros(N, width, N, width)  # AᵀΛA, block diagonal over the samples
        P.diagonal(dim1=0, dim2=2).copy_((W.mT @ curved).permute(1, 2, 0))
        state.add(self.z, self.z, P.view(N * width, N * width))

    def structured_pivot(self, value: Value, epsilon: float, state: State) -> tuple[Pivot, Count] | None:
        if not self.many_classes:
            return None
        x = self.derivatives
        if epsilon == 0 and x.loss_hessian.zero_sum:
            why = "the same row added to the weights of every class changes nothing"
            raise self.singular(value, epsilon, why)
        pivot = ManyClassPivot.factored(value, self.z, x, self.rows.Q, self.rows.R, epsilon)
        state.take(value)
        if self.z is not None:
            pivot.reduce(state.block(self.z, self.z))
        negative = pivot.num_negative()
        state.definite = negative == 0
        return pivot, Count(negative, pivot.logabsdet())


def _activation(index: int, N: int, a: int) -> Value:
    return Value(f"layer {index + 1} output", torch.Size([N, a]), 0, N)


class ChainProgram(NamedTuple):
    """Layers, last one with the loss."""

    layers: tuple[LayerDerivatives, ...]
    operations: list[Layer]
    eliminated: list[list[Value]]  # each layer's own parameters
    reduced: list[Reduced]

    def start(self) -> State:
        return State(self.layers[0].weight)

    def state_charge(self, operation: Operation) -> float:
        return 0.0  # it is in the layers' curvature

    def split(self, v: Tensor) -> tuple[list[Tensor], dict[Value, Tensor]]:
        return grouped_blocks(self.layers, v), {}

    def join(self, X: Sequence[Tensor], t: Mapping[Value, Tensor]) -> Tensor:
        return flatten_groups(self.layers, X)


@torch.inference_mode()
def chain_program(layers: tuple[LayerDerivatives, ...], many_classes: bool = False) -> ChainProgram:
    """All that no damping changes; one batched QR for the layers of one shape. many_classes: in the last pivot."""
    rows: list[Rows] = []
    norms: list[Tensor] = []
    couplings: list[Tensor] = []  # c of `_natural_scales`
    groups: list[tuple[list[int], Tensor | None, Tensor]] = []
    for members in same_shape_groups(layers):
        some = [layers[i] for i in members]
        R, Q = reduced_rows(torch.stack([x.inputs for x in some]))
        adjoint, outside = torch.stack([x.adjoint for x in some]), None
        if Q is not None and members[-1] > 0:
            within = Q[:, : some[0].weight.shape[1]]
            outside = (within @ within.mT).neg_()
            outside.diagonal(dim1=1, dim2=2).add_(1)
        for i in range(len(some)):
            rows.append(Rows(R[i], None if Q is None else Q[i], None if outside is None else outside[i]))
        couplings += adjoint.abs().amax((1, 2)) / R.abs().amax((1, 2)).clamp_min(_TINY)
        norms.append(torch.stack([torch.linalg.vector_norm(x, dim=(1, 2)) for x in (adjoint, R)], 1))
        groups.append((members, Q, adjoint))
    scales = _natural_scales(layers, couplings)
    sizes = [Natural(scale, *pair) for scale, pair in zip(scales, torch.cat(norms).tolist(), strict=True)]
    *hidden, last = zip(layers, rows, sizes, range(len(layers)), strict=True)
    operations = [*(Layer(*x) for x in hidden), OutputLayer(*last, many_classes)]
    reduced = [_reduced([operations[i] for i in members], Q, adjoint) for members, Q, adjoint in groups]
    return ChainProgram(layers, operations, [[x.own] for x in operations], reduced)


def _reduced(layers: Sequence[Layer], Q: Tensor | None, adjoint: Tensor) -> Reduced:
    N, width = len(layers[0].derivatives.inputs), layers[0].derivatives.weight.shape[1]
    unfold, fold = partial(torch.unflatten, dim=1, sizes=(1, N, width)), partial(torch.flatten, start_dim=1)
    return Reduced([x.own for x in layers], [x.z for x in layers], Q, adjoint, width, unfold, fold)


def _natural_scales(layers: Sequence[LayerDerivatives], couplings: Sequence[Tensor]) -> list[float]:
    """The largest entry of the cost-to-go with nothing eliminated: the Hessian of the loss in t_{ℓ-1}.

    The couplings λ of this layer and those above are counted as curvatures, c I. With nothing eliminated samples don't
    mix: P is (N, a, a), and one pass down takes O(N a³) a layer,

        P ← TᵀP T + Wᵀdiag(β φ″)W + c I,    T = φ′W + σI
    """
    if len(layers) == 1:
        return [0.0]  # below layer 1 there is nothing
    last, hidden = layers[-1], layers[1:-1]
    P = last.weight.mT @ last.loss_hessian.times(last.weight)  # (N, a′, a′)
    P.diagonal(dim1=1, dim2=2).add_(couplings[-1])
    largest = [P.abs().amax()[None]]
    for members in reversed(list(same_shape_groups(hidden, _TOGETHER))):
        weight, slope, curvature = (
            torch.stack([getattr(hidden[i], name) for i in members]) for name in ("weight", "slope", "curvature")
        )
        W = weight[:, None]
        T = slope[..., None] * W  # (g, N, a, a′)
        T.diagonal(dim1=2, dim2=3).add_(W.new_tensor([hidden[i].skip for i in members])[:, None, None])
        below = W.mT @ (curvature[..., None] * W)  # (g, N, a′, a′)
        below.diagonal(dim1=2, dim2=3).add_(torch.stack([couplings[1 + i] for i in members])[:, None, None])
        for T_l, P_below in zip(reversed(T.unbind()), reversed(below.unbind()), strict=True):
            P = P_below.baddbmm_(T_l.mT, torch.bmm(P, T_l))
        largest.append(below.abs().amax((1, 2, 3)))
    return [0.0, *torch.cat(largest[::-1]).tolist()]

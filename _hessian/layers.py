"""What every part of the solver shares: the derivatives of a layer, flat vectors as blocks, and the errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Damping = float | tuple[float, ...]  # ε, or one a layer


class SingularHessianError(torch.linalg.LinAlgError):
    """H + εI is singular, or v can't be reached to `rtol`. The message says what to change.

    layer: 1 … L, the layer whose pivot is singular, or None. damping: as asked for, or that layer's. residual: the best
    relative residual ‖(H + εI)x − v‖/‖v‖ reached, the largest over the columns, or None where nothing was solved.
    """

    def __init__(
        self,
        message: str,
        *,
        layer: int | None = None,
        damping: Damping | None = None,
        residual: float | None = None,
    ):
        super().__init__(message)
        self.layer, self.damping, self.residual = layer, damping, residual


class NotPositiveDefinite(Exception):
    """The pivot of layer `index`, counted from 0, of H + εI is not positive definite."""

    def __init__(self, index: int):
        super().__init__(index)
        self.index = index


Inputs = TypeVar("Inputs", Tensor, tuple[Tensor, ...])


class TrackedBatch(NamedTuple, Generic[Inputs]):
    """The batch of the last tracked call. The loss is a weak reference, so that its graph can be freed."""

    inputs: Inputs  # (N, a_0), or a tuple of tensors (N, …)
    targets: Tensor
    loss: Callable[[], Tensor | None]
    value: Tensor
    parameters: list[Tensor]
    autocast: bool


class TrackedDataSet(NamedTuple):
    """The batches of the last `track_batches`."""

    batches: Iterable[TrackedBatch[tuple[Tensor, ...]]]  # one pass over them; their `parameters` are empty
    sizes: list[int]
    loss: Callable[[], Tensor | None]  # of all of them
    value: Tensor
    parameters: list[Tensor]


class OutputHessian(NamedTuple):
    """Λ_b = diag(d_b) − u_b u_bᵀ for each sample b; u_b = d_b/√(1ᵀd_b), so that Λ_b 1 = 0, or no such term."""

    diagonal: Tensor  # (N, C) d ≥ 0
    zero_sum: bool

    @property
    def rank_one(self) -> Tensor | None:
        """u (N, C), or None."""
        return self.diagonal * self.diagonal.sum(1, keepdim=True).rsqrt() if self.zero_sum else None

    def apply(self, s: Tensor) -> Tensor:
        """Λ s for s of shape (…, N, C)."""
        d = self.diagonal
        if not self.zero_sum:
            return d * s
        # Λ 1 = 0: s is measured from the likeliest class, so that nothing cancels where its π is nearly 1
        s = s.expand(*s.shape[:-2], *d.shape)
        s = s - s.gather(-1, d.argmax(-1, keepdim=True).expand(*s.shape[:-1], 1))
        return d * (s - (d * s).sum(-1, keepdim=True) / d.sum(-1, keepdim=True))

    def times(self, weight: Tensor) -> Tensor:
        """Λ_b W (N, C, a′) for W (C, a′)."""
        return self.apply(weight.mT.unsqueeze(1)).permute(1, 2, 0)


class LayerDerivatives(NamedTuple):
    """What the solve needs of one layer z = f(h) + σ z_{ℓ-1}, h = z̃ W̃ᵀ: everything in float64, detached."""

    weight: Tensor  # (a, a′)  W, without the bias
    inputs: Tensor  # (N, d)   z̃, with a last column of ones where the layer has a bias
    slope: Tensor  # (N, a)    φ′(h); ones in the output layer
    curvature: Tensor  # (N, a) β φ″(h); zeros in the output layer
    adjoint: Tensor  # (N, a)  λ = β φ′(h) = ∂loss/∂h
    skip: float  # σ
    output: OutputHessian | None  # Λ in the output layer, else None

    @property
    def loss_hessian(self) -> OutputHessian:
        """Λ, of the output layer."""
        assert self.output is not None, "a hidden layer has no Λ"
        return self.output

    def in_float32(self) -> LayerDerivatives:
        return LayerDerivatives(
            self.weight.float(),
            self.inputs.float(),
            self.slope.float(),
            self.curvature.float(),
            self.adjoint.float(),
            self.skip,
            None if self.output is None else self.output._replace(diagonal=self.output.diagonal.float()),
        )


def with_skip(skip: float, out: Tensor, z: Tensor | None) -> Tensor:
    """out + σ z. z is None (zero) before layer 1. Where σ = 0, z may have another width than out."""
    return out + skip * z if skip and z is not None else out


def with_curvature(
    layers: tuple[LayerDerivatives, ...], curvature: str, state_damping: float
) -> tuple[LayerDerivatives, ...]:
    """The layers of another quadratic form: H or its Gauss–Newton part, plus (μ/N) Σ_{ℓ<L} S_ℓᵀS_ℓ.

    Without β φ″ and λ the Gauss–Newton term is left. State damping adds μ/N to β φ″.
    """
    if curvature == "gauss_newton":
        layers = tuple(
            x._replace(adjoint=torch.zeros_like(x.adjoint), curvature=torch.zeros_like(x.curvature)) for x in layers
        )
    if state_damping == 0:
        return layers
    hidden = [x._replace(curvature=x.curvature + state_damping / len(x.inputs)) for x in layers[:-1]]
    return (*hidden, layers[-1])


def same_shape_groups(layers: Sequence[LayerDerivatives], max_numbers: int | None = None) -> Iterator[list[int]]:
    """Indices of neighbouring layers of one shape, whose arrays can be stacked: one operation then serves them all.

    max_numbers: of the arrays (N, a, a′) of one group together.
    """
    shapes = [(x.weight.shape, x.inputs.shape) for x in layers]
    for shape, group in groupby(range(len(shapes)), key=shapes.__getitem__):
        members = list(group)
        size = len(members)
        if max_numbers is not None:
            size = max(1, max_numbers // (shape[0].numel() * shape[1][0]))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def grouped_blocks(layers: Sequence[LayerDerivatives], v: Tensor) -> list[Tensor]:
    """(P, k) → one (g, k, a, d) for g layers of one shape, the bias as last column: model.parameters() has each weight,
    then its bias."""
    groups: list[Tensor] = []
    rest = v.mT.contiguous()  # (k, P)
    for members in same_shape_groups(layers):
        (a, width), d, g = layers[members[0]].weight.shape, layers[members[0]].inputs.shape[1], len(members)
        these, rest = rest.tensor_split((g * a * d,), 1)
        weight, bias = these.unflatten(1, (g, a * d)).movedim(1, 0).tensor_split((a * width,), 2)  # (g, k, ·)
        groups.append(torch.cat([weight.unflatten(2, (a, width)), bias.unflatten(2, (a, d - width))], 3))
    return groups


def blocks_of(layers: Sequence[LayerDerivatives], v: Tensor) -> list[Tensor]:
    """(P, k) → one (k, a, d) a layer."""
    return [block for group in grouped_blocks(layers, v) for block in group]


def flatten_groups(layers: Sequence[LayerDerivatives], groups: Sequence[Tensor]) -> Tensor:
    """The inverse of `grouped_blocks`."""
    pieces = []
    for members, together in zip(same_shape_groups(layers), groups, strict=True):
        weight, bias = together.transpose(0, 1).tensor_split((layers[members[0]].weight.shape[1],), 3)  # (k, g, a, ·)
        pieces.append(torch.cat([weight.flatten(2), bias.flatten(2)], 2).flatten(1))
    return torch.cat(pieces, 1).mT


def flatten_blocks(layers: Sequence[LayerDerivatives], blocks: Sequence[Tensor]) -> Tensor:
    """The inverse of `blocks_of`."""
    groups = same_shape_groups(layers)
    return flatten_groups(layers, [torch.stack([blocks[i] for i in members]) for members in groups])


def forward_tangent(layers: Sequence[LayerDerivatives], X: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields s_ℓ and t_{ℓ-1}, (k, N, a) each (t_0: None), for the blocks X_ℓ (k, a, d)."""
    t = None
    for layer, block in zip(layers, X, strict=True):
        s = layer.inputs @ block.mT
        if t is not None:
            s = s + t @ layer.weight.mT
        yield s, t
        t = with_skip(layer.skip, layer.slope * s, t)


def damping_vector(layers: Sequence[LayerDerivatives], epsilons: Sequence[float]) -> Tensor:
    """Each parameter's damping, (P, 1)."""
    like = layers[0].weight
    return torch.cat(
        [like.new_full((len(x.weight) * x.inputs.shape[1], 1), e) for x, e in zip(layers, epsilons, strict=True)]
    )

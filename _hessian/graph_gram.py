"""Route 'gram' on the graph: the Jacobian of the scaled outputs, pulled back through the operations.

Samples don't mix. So one backward pass of K columns gives the derivatives of all N K scaled outputs in every
activation, (K, N × its numbers a sample). What has no sample dimension, such as a tied weight, takes N K columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from _hessian.affine_operation import Affine
from _hessian.costs import RouteCost, factor_operations
from _hessian.gram import (
    GramSystem,
    JacobianBlock,
    MetricBlock,
    OuterProducts,
    Rows,
    ScaledJacobian,
    ScaledOutput,
)
from _hessian.graph import Value
from _hessian.graph_tangents import is_charged
from _hessian.operations import CHUNK_BYTES, Operation
from _hessian.program import GraphProgram


def convex_root(loss_hessian: Tensor) -> Tensor | None:
    """S (N, C, K) with Λ_b = S_b S_bᵀ for each sample, K the largest rank. None where some Λ_b is not semidefinite.

    By eigenvectors, token by token where Λ_b couples only entries of one token: so a small block keeps its digits.
    """
    N, C, _ = loss_hessian.shape
    _, labels = connected_components((loss_hessian != 0).any(0).cpu().numpy(), directed=False)
    order = torch.from_numpy(labels).long().to(loss_hessian.device)
    counts = order.bincount()
    if not bool((counts == counts[0]).all()):
        order, counts = torch.zeros_like(order), counts.new_full((1,), C)
    places = order.argsort(stable=True).view(len(counts), -1)  # (B, c)
    values, vectors = torch.linalg.eigh(loss_hessian[:, places[:, :, None], places[:, None, :]])  # (N, B, c)
    rounding = 10 * len(places[0]) * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    if not bool(values.min() >= -1e-10 * values.abs().max()):  # of a saturated sample all digits may be rounding
        return None
    values = torch.where(values > rounding, values, 0.0)
    k = int((values > 0).sum(-1).max())  # eigenvalues are in ascending order
    roots = vectors[..., -k:] * values[..., None, -k:].sqrt() if k else vectors[..., :0]  # (N, B, c, k)
    S = loss_hessian.new_zeros(N, C, len(counts), k)
    S[:, places, torch.arange(len(counts), device=order.device)[:, None]] = roots
    return S.flatten(2)


def network_output(root: Tensor, adjoint: Tensor) -> ScaledOutput:
    """S, and w with S w = λ for λ (N, C), the loss's derivative in the outputs. w is NaN if there is none."""
    scaled = (root.mT @ adjoint[:, :, None])[:, :, 0]
    squares = root.square().sum(1)  # the columns of S_b are orthogonal
    w = torch.where(squares > 0, scaled / squares, 0.0)
    error = (root @ w[:, :, None])[:, :, 0] - adjoint
    return ScaledOutput(root, w if bool(error.norm() <= 1e-10 * adjoint.norm()) else w.fill_(math.nan))


def scaled_jacobian(program: GraphProgram, root: Tensor) -> ScaledJacobian:
    """Sᵀ times the Jacobian of the outputs, for S (N, C, K): a block for each parameter tensor."""
    N, _, K = root.shape
    return _pulled_back(program, {program.output: root.permute(2, 0, 1).flatten(1)}, (K, N))


def state_scales(program: GraphProgram) -> list[float]:
    """The mean diagonal of SᵀS/N in each parameter tensor, S the derivatives of the outputs of the affine operations
    but the last. Estimated from rᵀS of each sample, r a random sign for each output."""
    generator, N = torch.Generator().manual_seed(0), len(program.loss_hessian)
    sources = {}
    for value in (x.output for x in program.operations if is_charged(x, program)):
        signs = torch.randint(2, (1 if value.batch_dim is not None else N, value.size), generator=generator)
        sources[value] = (2 * signs - 1).to(program.loss_hessian)
    scales = []
    for block in _pulled_back(program, sources, (1, N)).blocks:
        E, similarity = block.factors(1.0)
        scales.append(float((E.square().sum(0) * similarity.diagonal()).sum()) / (N * block.size))
    return scales


def _pulled_back(program: GraphProgram, sources: Mapping[Value, Tensor], shape: tuple[int, int]) -> ScaledJacobian:
    """The derivatives of Σ ⟨source, value⟩ in all parameters, sample by sample. shape: K, N.

    sources and what is pulled back: (K, n) of activations, (K N, n) of values without a sample dimension.
    """
    K, N = shape
    found: dict[str, list[JacobianBlock]] = {name: [] for name in program.parameters}
    rows = dict(sources)
    for operation in reversed(program.operations):
        p = rows.pop(operation.output, None)
        if p is None:
            continue
        for index, value in enumerate(operation.inputs):
            if isinstance(operation, Affine) and value == operation.own:
                for name, block in _own_blocks(operation, p).items():
                    found[name].append(block)
                continue
            pulled = _pull_back(operation, p, index, N)
            rows[value] = rows[value] + pulled if value in rows else pulled
    for value, pulled in rows.items():  # parameters are left
        found[value.name].append(Rows(pulled))
    # a parameter is reduced in one operation, or a value, or has no effect
    none = program.loss_hessian.new_zeros
    blocks = [found[name][0] if found[name] else Rows(none(K * N, p)) for name, p in program.parameters.items()]
    return ScaledJacobian(blocks, shape)


def _pull_back(operation: Operation, p: Tensor, index: int, N: int) -> Tensor:
    """A_iᵀp for p (K, n_o), or (K N, n_o) without a sample dimension; the same of inputs[index]."""
    which = slice(index, index + 1)
    if operation.output.batch_dim is None or operation.inputs[index].batch_dim is not None:
        return operation.pull_back(p, which)[0]
    p = p.unflatten(1, (N, -1))  # (K, N, n_o/N)
    parts = []
    for samples in torch.arange(N, device=p.device).split(max(1, CHUNK_BYTES // (8 * p.numel()))):
        alone = p.new_zeros(len(p), len(samples), *p.shape[1:])  # one sample in each row
        alone[:, torch.arange(len(samples), device=p.device), samples] = p[:, samples]
        parts.append(operation.pull_back(alone.flatten(2).flatten(0, 1), which)[0].unflatten(0, (len(p), -1)))
    return torch.cat(parts, 1).flatten(0, 1)


def _has_outer_products(operation: Affine) -> bool:
    """Whether a sample has one row, so that its derivative in the weight is an outer product."""
    one_row = len(operation.rows) == 1 and operation.rows.shape[1] == operation.output.num_samples
    return one_row and operation.output.batch_dim is not None and not isinstance(operation.module, nn.Embedding)


def _own_blocks(operation: Affine, p: Tensor) -> Mapping[str, JacobianBlock]:
    """Of the parameters of an affine operation, from p as in `_pull_back`."""
    samples, blocks = operation.output.num_samples, list[JacobianBlock]()
    E = operation.to_rows(p).unflatten(2, (samples, -1))  # (K, G, N, T, a)
    z = operation.rows.unflatten(1, (samples, -1))  # (G, N, T, width)
    if operation.width and _has_outer_products(operation):
        blocks.append(OuterProducts(E[:, 0, :, 0].contiguous(), z[0, :, 0], operation.width))
    elif operation.width:
        X = E.permute(2, 1, 0, 4, 3).flatten(2, 3) @ z.transpose(0, 1)  # (N, G, K a, width)
        X = X.unflatten(2, (len(E), -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)  # (K N, G, a, width)
        blocks.append(Rows(operation.pieces(X)[0]))
    if len(blocks) < len(operation.parameters):
        blocks.append(Rows(E.sum(3).transpose(1, 2).flatten(0, 1).flatten(1)))
    return dict(zip(operation.parameters, blocks, strict=True))


def gram_cost(program: GraphProgram, K: int) -> RouteCost:
    """With K scaled outputs a sample."""
    N, P = len(program.loss_hessian), sum(program.parameters.values())
    n, operations, rows = N * K, 0.0, P
    product = 2 * n * n * P
    for x in program.operations:
        pulled = [v for v in x.inputs if v != getattr(x, "own", None)]
        alone = sum(v.batch_dim is None for v in pulled)  # by a sample at a time
        operations += 2 * K * x.pull_back_cost * ((len(pulled) > alone) + N * alone)
        if isinstance(x, Affine) and x.width and _has_outer_products(x):
            saved = x.adjoint.shape[2] * (x.width - 1)
            product += 2 * N * N * x.width - 2 * n * n * saved
            rows -= saved
        elif isinstance(x, Affine) and x.width:
            operations += 2 * K * x.pull_back_cost
    largest = max(x.output.size + sum(v.size for v in x.inputs) for x in program.operations)
    derivatives = sum(x.numbers for x in program.operations)
    numbers = n * rows + max(2 * n * n, 2 * K * largest)
    return RouteCost(operations + product + factor_operations(n), 2 * n * n + 4 * n * rows, 8 * (derivatives + numbers))


class ScaledBlock(NamedTuple):
    """Columns of J with the metric D = scale · I."""

    block: JacobianBlock
    scale: float

    @property
    def size(self) -> int:
        return self.block.size

    def apply(self, v: Tensor) -> Tensor:
        return self.scale * v

    def solve(self, v: Tensor) -> Tensor:
        return v / self.scale

    def transpose(self, y: Tensor) -> Tensor:
        return self.block.transpose(y[:, None])[:, 0] / self.scale


class NetworkGramSystem(GramSystem):
    """Of a `TrackedNetwork`. metric='state': D = (ρ + s) I in each parameter tensor, s that of `state_scales`."""

    def __init__(
        self,
        jacobian: ScaledJacobian,
        scales: Sequence[float],
        output: ScaledOutput,
        metric: str,
        metric_damping: float,
        weight_decay: float,
        rest: Tensor | None,
        without_residual: bool,
    ):
        super().__init__(output, metric, metric_damping, weight_decay, rest, without_residual)
        self.jacobian, self.scales = jacobian, scales

    def scaled_tangent(self, x: Tensor) -> Tensor:
        return self.jacobian.times(x[:, None])[:, 0]

    def _blocks(self, rho: float) -> tuple[Sequence[MetricBlock], Tensor]:
        blocks = [ScaledBlock(x, rho + s) for x, s in zip(self.jacobian.blocks, self.scales, strict=True)]
        return blocks, self.jacobian.weighted_gram([1 / x.scale for x in blocks])

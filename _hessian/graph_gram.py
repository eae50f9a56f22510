"""Route 'gram' on the graph: the Jacobian of the scaled outputs, pulled back through the operations.

Samples don't mix. So one backward pass of K columns gives the derivatives of all N K scaled outputs in every
activation, (K, N × its numbers a sample). What has no sample dimension, such as a tied weight, takes N K columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from _hessian.affine_operation import Affine
from _hessian.costs import RouteCost, factor_operations
from _hessian.gram import JacobianBlock, OuterProducts, Rows, ScaledJacobian
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
    if not bool((values >= -rounding).all()):
        return None
    values = torch.where(values > rounding, values, 0.0)
    k = int((values > 0).sum(-1).max())  # eigenvalues are in ascending order
    roots = vectors[..., -k:] * values[..., None, -k:].sqrt() if k else vectors[..., :0]  # (N, B, c, k)
    S = loss_hessian.new_zeros(N, C, len(counts), k)
    S[:, places.flatten(), torch.arange(len(counts), device=order.device).repeat_interleave(places.shape[1])] = (
        roots.flatten(1, 2)
    )
    return S.flatten(2)


def scaled_jacobian(program: GraphProgram, root: Tensor) -> ScaledJacobian:
    """Sᵀ times the Jacobian of the outputs, for S (N, C, K): a block for each parameter tensor."""
    N, _, K = root.shape
    found: dict[str, list[JacobianBlock]] = {name: [] for name in program.parameters}
    rows = {program.output: root.permute(2, 0, 1).flatten(1)}  # (K, n) of activations, (K N, n) of others
    for operation in reversed(program.operations):
        p = rows.pop(operation.output)
        for index, value in enumerate(operation.inputs):
            if isinstance(operation, Affine) and value == operation.own:
                for name, block in _own_blocks(operation, p).items():
                    found[name].append(block)
                continue
            pulled = _pull_back(operation, p, index, N)
            rows[value] = rows[value] + pulled if value in rows else pulled
    for value, pulled in rows.items():  # parameters are left
        found[value.name].append(Rows(pulled))
    return ScaledJacobian([_only(blocks) for blocks in found.values()], (K, N))


def _only(blocks: Sequence[JacobianBlock]) -> JacobianBlock:
    (block,) = blocks  # a parameter is either reduced in one operation, or a value
    return block


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

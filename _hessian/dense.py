"""Route 'dense': H as a matrix, in closed form for a chain of layers, else by products; and its factorization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from _hessian.costs import DENSE_CHUNK
from _hessian.layers import Damping, LayerDerivatives, NotPositiveDefinite, SingularHessianError, with_skip
from _hessian.symmetric_factor import SymmetricFactor, factor_symmetric

_CHUNK = DENSE_CHUNK // 16  # numbers in the sensitivities of one chunk of samples, and in one product over them


def dense_hessian(layers: Sequence[LayerDerivatives], product: Callable[[Tensor], Tensor]) -> Tensor:
    """H (P, P) of a chain, in closed form; checked by one product.

    With A_ℓm = ∂h_ℓ/∂h_m, B_ℓm = ∂z_ℓ/∂h_m, and D_ℓ the curvature seen by s_ℓ (Λ in the last layer, else β φ″),

        K_ℓm = Σ_{k≥ℓ} A_kℓᵀ D_k A_km
        H_ℓm[ij, pq] = Σ_b (K_ℓm[b, i, p] z̃_ℓ[b, j] + λ_ℓ[b, i] B_{ℓ-1,m}[b, j, p]) z̃_m[b, q]    for ℓ ≥ m,

    the second term for ℓ > m only. Each term is one matrix product over the samples, of 2 N P_ℓ P_m operations.
    """
    sizes = [len(x.weight) * x.inputs.shape[1] for x in layers]
    H = layers[0].weight.new_zeros(sum(sizes), sum(sizes))
    blocks = [row.split(sizes, 1) for row in H.split(sizes)]
    widths = [len(x.weight) for x in layers]
    numbers = 3 * sum(a * below for a, below in zip(widths, accumulate(widths), strict=True))  # a sample's
    N, step = len(layers[0].inputs), max(1, _CHUNK // numbers)
    for start in range(0, N, step):
        _add_samples(blocks, [_samples_last(x, slice(start, start + step)) for x in layers])
    for m, below in enumerate(layers):
        for index, layer in enumerate(layers[m:], m):
            block = blocks[m][index]
            block.copy_(block[_weights_first(below)])
            block.copy_(block[:, _weights_first(layer)])
            if index == m:
                block.copy_((block + block.mT).mul_(0.5))
            else:
                blocks[index][m].copy_(block.mT)
    check_product(H, product)
    return H


def _weights_first(layer: LayerDerivatives) -> Tensor:
    """Where the entries of model.parameters(), a weight and then its bias, are in X (a, d)."""
    width = layer.weight.shape[1]
    index = torch.arange(len(layer.weight) * layer.inputs.shape[1], device=layer.weight.device)
    weight, bias = index.view(len(layer.weight), -1).tensor_split((width,), 1)
    return torch.cat([weight.flatten(), bias.flatten()])


def _samples_last(layer: LayerDerivatives, samples: slice) -> LayerDerivatives:
    """The layer at some of the samples, with arrays (a, N) in the place of (N, a); Λ stays as it is."""
    inputs, slope, curvature, adjoint = (
        x[samples].mT.contiguous() for x in (layer.inputs, layer.slope, layer.curvature, layer.adjoint)
    )
    output = layer.output and layer.output._replace(diagonal=layer.output.diagonal[samples])
    return layer._replace(inputs=inputs, slope=slope, curvature=curvature, adjoint=adjoint, output=output)


def _add_samples(blocks: Sequence[Sequence[Tensor]], layers: Sequence[LayerDerivatives]) -> None:
    """Adds these samples' part to the blocks H_mℓ, ℓ ≥ m, for `layers` with samples last."""
    widths = [len(x.weight) for x in layers]
    tangents, K = list(_sensitivities(layers)), layers[-1].adjoint  # not used in the output layer
    for index in reversed(range(len(layers))):
        layer, (A, B) = layers[index], tangents.pop()
        if layer.output is not None:
            change = layer.output.apply(A.mT).mT.contiguous()
        else:
            change = layer.slope * K + layer.curvature * A
        if B is not None:
            back = torch.bmm(layer.weight.mT.expand(len(B), -1, -1), change[: len(B)])
            K = with_skip(layer.skip, back, K[: len(B)])
        coupling = () if B is None or not bool(layer.adjoint.any()) else B.split(widths[:index])
        for m, part in enumerate(change.split(widths[: index + 1])):
            block = blocks[m][index].unflatten(1, (widths[index], -1)).unflatten(0, (widths[m], -1))  # [p, q, i, j]
            _add_product(block.permute(0, 2, 1, 3), part, layers[m].inputs, layer.inputs)
            if m < len(coupling):
                block = block[..., : layer.weight.shape[1]]
                _add_product(block.permute(0, 3, 1, 2), coupling[m], layers[m].inputs, layer.adjoint)


def _sensitivities(layers: Sequence[LayerDerivatives]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields A_ℓm (M_ℓ, a, N) and B_{ℓ-1,m} (M_{ℓ-1}, a′, N), all m ≤ ℓ stacked: M_ℓ = a_1 + … + a_ℓ."""
    B = None
    for layer in layers:
        a, N = layer.slope.shape
        A = torch.eye(a, dtype=layer.slope.dtype, device=layer.slope.device)[:, :, None].expand(a, a, N)
        if B is not None:
            A = torch.cat([torch.bmm(layer.weight.expand(len(B), -1, -1), B), A])
        yield A, B
        change = layer.slope * A
        if B is not None and layer.skip:
            change[: len(B)].add_(B, alpha=layer.skip)
        B = change


def _add_product(block: Tensor, left: Tensor, inner: Tensor, outer: Tensor) -> None:
    """block[p, x, q, y] += Σ_b left[p, x, b] inner[q, b] outer[y, b]."""
    rows, q = left.flatten(0, 1), len(inner)
    step = max(1, _CHUNK // (q * (rows.shape[1] + len(rows))))
    for part, some in zip(block.split(step, 3), outer.split(step), strict=True):
        part += (rows @ (inner[:, None] * some).flatten(0, 1).mT).view_as(part)


def dense_matrix(product: Callable[[Tensor], Tensor], like: Tensor, num_parameters: int, columns: int) -> Tensor:
    """H (P, P), by products with so many columns at a time; checked by one more product."""
    H = like.new_empty(num_parameters, num_parameters)
    for start in range(0, num_parameters, columns):
        identity = like.new_zeros(num_parameters, min(columns, num_parameters - start))
        identity.diagonal(-start).fill_(1)
        H[:, start : start + columns] = product(identity)
    check_product(H, product)
    return H


def check_product(H: Tensor, product: Callable[[Tensor], Tensor]) -> None:
    """That H is the matrix of the products: solves are certified by it."""
    v = torch.randn(len(H), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(H)
    error, size = (H @ v - product(v)).norm(), torch.linalg.matrix_norm(H) * v.norm()
    if bool(torch.isfinite(size)) and not bool(error <= 1e-10 * size):
        raise ArithmeticError(
            f"the dense Hessian is off by {float(error / size):.1e} of its norm from a product with the same vector: "
            "is the memory or a BLAS at fault? Try route='sweep'"
        )


def factor_dense(H: Tensor, dampings: Tensor, asked: Damping, definite_only: bool) -> SymmetricFactor:
    """H + diag(ε), factored in H's memory, for dampings ε (P, 1); asked: as the user gave them."""
    H.diagonal().add_(dampings[:, 0])
    factor = factor_symmetric(H, float(dampings.abs().min()), definite_only=definite_only)
    if factor is None and definite_only:
        raise NotPositiveDefinite(0)
    if factor is None:
        raise SingularHessianError(
            f"H + damping·I, factored densely at damping={asked}, has an exactly singular pivot: choose another",
            damping=asked,
        )
    return factor

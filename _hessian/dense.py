"""Route 'dense': H as a matrix, by products with the columns of the identity; and its factorization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from _hessian.layers import Damping, NotPositiveDefinite, SingularHessianError
from _hessian.symmetric_factor import SymmetricFactor, factor_symmetric


def dense_matrix(product: Callable[[Tensor], Tensor], like: Tensor, num_parameters: int, columns: int) -> Tensor:
    """H (P, P), by products with so many columns at a time; checked by one more product."""
    H = like.new_empty(num_parameters, num_parameters)
    for start in range(0, num_parameters, columns):
        identity = like.new_zeros(num_parameters, min(columns, num_parameters - start))
        identity.diagonal(-start).fill_(1)
        H[:, start : start + columns] = product(identity)
    # solves are certified by H: that must be the matrix of the products
    v = torch.randn(num_parameters, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    error, size = (H @ v - product(v)).norm(), torch.linalg.matrix_norm(H) * v.norm()
    if bool(torch.isfinite(size)) and not bool(error <= 1e-10 * size):
        raise ArithmeticError(
            f"the dense Hessian is off by {float(error / size):.1e} of its norm from a product with the same vector: "
            "is the memory or a BLAS at fault? Try route='sweep'"
        )
    return H


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

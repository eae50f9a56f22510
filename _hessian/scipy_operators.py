"""Symmetric matrices as SciPy operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor


class SymmetricOperator(LinearOperator):
    """v ↦ apply(v) on NumPy arrays, for a symmetric `apply` of float64 tensors (P, k). It computes in float64, on the
    CPU or the given device; arrays come and go on the CPU."""

    def __init__(self, size: int, device: torch.device, apply: Callable[[Tensor], Tensor]):
        super().__init__(np.dtype(np.float64), (size, size))
        self.device, self.apply = device, apply

    def _matmat(self, v: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(v):
            raise TypeError("the operator is real, and v is complex: pass its real and its imaginary part")
        columns = torch.tensor(np.asarray(v, dtype=np.float64), device=self.device)
        return self.apply(columns).cpu().numpy()

    def _adjoint(self) -> SymmetricOperator:
        return self

    def diagonal_block(self, start: int, size: int, columns: int = 64) -> Tensor:
        """Rows and columns start … start + size of the matrix, by `size` products."""
        block = torch.empty(size, size, dtype=torch.float64, device=self.device)
        for first in range(0, size, columns):
            identity = block.new_zeros(self.shape[0], min(columns, size - first))
            identity.diagonal(-start - first).fill_(1)
            block[:, first : first + columns] = self.apply(identity)[start : start + size]
        return block

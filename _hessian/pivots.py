"""The pivot of one layer, as the backward sweep leaves it for solves, and the cost-to-go below it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.carried_pivots import Carried, Waiting
from _hessian.many_classes import ManyClassPivot
from _hessian.symmetric_factor import SymmetricFactor


class CostToGo(NamedTuple):
    P: Tensor  # (n, n), quadratic in t of this layer's outputs
    waiting: Waiting | None  # what the layers above left to this one, beside t
    definite: bool  # every pivot above was


class DensePivot(NamedTuple):
    """G = F Σ Fᵀ of Y and what waited, and the whitened coupling ΣF⁻¹B, of which everything else is made."""

    factor: SymmetricFactor
    coupling: Tensor | None  # (m, n′) ΣF⁻¹B, the carried rows of it zero; None in layer 1
    carried: Carried | None

    def backward(self, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From q (k, m): what `forward` needs of it, BᵀG⁻¹q (k, n′), and the linear terms of what is carried."""
        white = self.factor.whiten_vectors(q)
        left = None if self.carried is None else self.carried.take_linear_terms(white)
        back = None if self.coupling is None else white @ self.coupling
        return self.factor.sign(white), back, left

    def forward(self, white: Tensor, t: Tensor | None, w: Tensor | None) -> Tensor:
        """−G⁻¹(q + B t) for t (k, n′), given what was carried, w (k, k_w)."""
        if t is None:
            e = -white
        else:
            assert self.coupling is not None
            e = torch.addmm(white, t, self.coupling.mT, beta=-1, alpha=-1)
        if self.carried is not None:
            assert w is not None
            self.carried.insert_values(e, w)
        return self.factor.unwhiten_vectors(e)


Pivot = DensePivot | ManyClassPivot


class Count(NamedTuple):
    """Of eliminated pivots."""

    negative: int
    logabsdet: float

"""What the elimination of one layer leaves: its pivot, for solves, and the cost-to-go below it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from _hessian.carried_pivots import Carried, Waiting
from _hessian.layers import LayerDerivatives, SingularHessianError
from _hessian.symmetric_factor import SymmetricFactor


class CostToGo(NamedTuple):
    P: Tensor  # (n, n), quadratic in t of this layer's outputs
    waiting: Waiting | None  # what the layers above left to this one, beside t
    definite: bool  # every pivot above was

    def copied(self) -> CostToGo:
        return self._replace(P=self.P.clone())


class Pivot(Protocol):
    """What a solve needs of an eliminated layer. k right-hand sides; what the layers above left to it counts as Y."""

    @property
    def carried(self) -> Carried | None:
        """What it leaves to the layer below."""

    def backward(self, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From q (k, m): what `forward` needs of it, BᵀG⁻¹q (k, n′), and the linear terms of what is carried."""

    def forward(self, state: Tensor, t: Tensor | None, w: Tensor | None) -> Tensor:
        """−G⁻¹(q + B t) (k, m) for t (k, n′), from `backward`'s state and the values w (k, k_w) of what is carried."""


class DensePivot(NamedTuple):
    """G = F Σ Fᵀ of Y and what waited, and the whitened coupling ΣF⁻¹B, of which everything else is made."""

    factor: SymmetricFactor
    coupling: Tensor | None  # (m, n′) ΣF⁻¹B, the carried rows of it zero; None in layer 1
    carried: Carried | None

    def backward(self, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        white = self.factor.whiten_vectors(q)
        left = None if self.carried is None else self.carried.take_linear_terms(white)
        back = None if self.coupling is None else white @ self.coupling
        return self.factor.sign(white), back, left

    def forward(self, state: Tensor, t: Tensor | None, w: Tensor | None) -> Tensor:
        if t is None:
            e = -state
        else:
            assert self.coupling is not None
            e = torch.addmm(state, t, self.coupling.mT, beta=-1, alpha=-1)
        if self.carried is not None:
            assert w is not None
            self.carried.insert_values(e, w)
        return self.factor.unwhiten_vectors(e)


class Count(NamedTuple):
    """Of eliminated pivots."""

    negative: int
    logabsdet: float


class Eliminated(NamedTuple):
    """One layer's Y eliminated; its X⊥ is not yet."""

    pivot: Pivot
    negative: int  # of the pivot, without what is carried
    logabsdet: float
    P: Tensor | None  # (n′, n′) the cost-to-go below, in its lower half; None in layer 1
    waiting: Waiting | None
    definite: bool


def singular_pivot(index: int, epsilon: float, why: str) -> SingularHessianError:
    message = f"H + damping·I is singular at layer {index + 1}, damping {epsilon:g}: {why}. Choose a larger damping"
    if epsilon == 0:
        message += "; for the minimum-norm solution of H x = v call hessian_inverse_vector_product with damping=0"
    return SingularHessianError(message, layer=index + 1, damping=epsilon)


def output_cost_to_go(layer: LayerDerivatives) -> Tensor:
    """AᵀΛA of the last layer, block diagonal over the samples: (n′, n′)."""
    N, width = len(layer.inputs), layer.weight.shape[1]
    P = layer.weight.new_zeros(N, width, N, width)
    P.diagonal(dim1=0, dim2=2).copy_((layer.weight.mT @ layer.loss_hessian.times(layer.weight)).permute(1, 2, 0))
    return P.view(N * width, N * width)

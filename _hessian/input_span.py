"""A wide first layer, restricted to what a step can change in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.layers import LayerDerivatives
from _hessian.ranks import Ranks

WIDE_LAYER = 2**20  # weights of a first layer that is worth restricting


def is_wide(num_samples: int, num_inputs: int, num_units: int) -> bool:
    """Whether a first layer is restricted to the span of the samples.

    With more than 8 samples a unit the basis takes more operations than the products that it makes smaller.
    """
    return num_units * num_inputs >= WIDE_LAYER and 4 * (num_samples + 1) <= min(num_inputs, 32 * num_units)


class InputSpan(NamedTuple):
    """The first layer's weights as those of a network with N + 1 inputs, however many pixels there are.

    X (a, d) = Y Qᵀ + diag(s) U. Q is an orthonormal basis of the row space of z̃ (N, d). U is the part of W̃ outside of
    that space, with rows of length 1. The gradient lies in this set of X, with the L2 term too, and H acts on Y alone.
    So a step is one of the network with inputs [z̃Q, 0] and first weight [Y, s]. One thing differs: by the Gram route,
    metric='state' takes the mean square of an input over N + 1 inputs.
    """

    basis: Tensor  # (d, N) Q
    outside: Tensor  # (a, d) U
    width: int  # a′ = d without the bias
    inputs: Tensor  # (N, N + 1)
    weight: Tensor  # (a, N + 1)

    @classmethod
    def build(cls, layer: LayerDerivatives, bias: Tensor | None, dtype: torch.dtype, ranks: Ranks) -> InputSpan:
        """Of the samples of all ranks. Only the first rank has the basis and U. dtype: that of the batch."""
        inputs = ranks.gather(layer.inputs.to(dtype), ranks.sizes).double()
        if ranks.rank:
            none, N = layer.inputs.new_empty(0, 0), ranks.num_samples
            like = (inputs.new_empty(N, N + 1), inputs.new_empty(len(layer.weight), N + 1))
            return cls(none, none, layer.weight.shape[1], *map(ranks.broadcast, like))
        Q, R = torch.linalg.qr(inputs.mT)
        U = layer.weight if bias is None else torch.cat([layer.weight, bias.to(layer.weight)[:, None]], 1)
        Y = U @ Q
        U = U - Y @ Q.mT
        s = torch.linalg.vector_norm(U, dim=1, keepdim=True)
        U /= torch.where(s > 0, s, 1.0)
        coordinates = torch.cat([R.mT, R.new_zeros(len(R), 1)], 1), torch.cat([Y, s], 1)
        return cls(Q, U, layer.weight.shape[1], *map(ranks.broadcast, coordinates))

    def restrict(self, v: Tensor) -> Tensor:
        """The part of a flat v (P,) in the span: the coordinates (Y, s), then the other layers as they are."""
        a, d = self.outside.shape
        weight, bias, rest = v.tensor_split((a * self.width, a * d))
        weight, bias = weight.view(a, -1), bias.view(a, -1)
        Y = weight @ self.basis[: self.width] + bias @ self.basis[self.width :]
        s = torch.linalg.vecdot(weight, self.outside[:, : self.width]) + (bias * self.outside[:, self.width :]).sum(1)
        return torch.cat([torch.cat([Y, s[:, None]], 1).flatten(), rest])

    def expand(self, v: Tensor) -> Tensor:
        """The flat vector (P,) of all weights from one of `restrict`."""
        first, rest = v.tensor_split((self.weight.numel(),))
        Y, s = first.view_as(self.weight).tensor_split((len(self.inputs),), 1)
        X = torch.addcmul(Y @ self.basis.mT, s, self.outside)
        return torch.cat([X[:, : self.width].flatten(), X[:, self.width :].flatten(), rest])

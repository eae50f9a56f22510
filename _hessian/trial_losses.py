"""Losses at many trial steps, in one batched forward pass. A wide first layer is restricted to what a step changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.layers import LayerDerivatives

_TRIAL_NUMBERS = 2**26  # numbers in the trial parameters and activations that one forward pass may hold


class Steps:
    """Trial steps as sums of a few vectors, row i Σ c·v over its terms; formed one at a time, for all of them may be
    more than memory holds."""

    def __init__(self, terms: list[tuple[tuple[float, Tensor], ...]]):
        self.terms = terms

    def __len__(self) -> int:
        return len(self.terms)

    def __getitem__(self, index: int) -> Tensor:
        """(P,), a new tensor."""
        (c, v), *rest = self.terms[index]
        step = c * v
        for c, v in rest:
            step += c * v
        return step


class Candidates(NamedTuple):
    """Trial steps with the λ and the length that each has."""

    steps: Steps
    dampings: list[float]
    lengths: list[float]


class Trial(NamedTuple):
    """One of them, tried."""

    value: float  # f there
    step: Tensor | None  # (P,)
    damping: float
    length: float


class Span(NamedTuple):
    """The first layer where a step can change it: in the batch's inputs, and along each row's rest, which decays.

    X (a, d) = Y Qᵀ + diag(s) U, Q an orthonormal basis of the row space of z̃ (N, d), U the part of W̃ outside of it,
    with rows of length 1. The gradient lies in there, L2 term included, and H acts on Y alone. So a step is one of a
    network with N + 1 inputs [z̃Q, 0] and the first weight [Y, s], however many pixels there are. (metric='state' by the
    Gram route is then that of this network: its mean square of an input is one over the N + 1.)
    """

    basis: Tensor  # (d, N) Q
    outside: Tensor  # (a, d) U
    width: int  # a′ = d without the bias
    inputs: Tensor  # (N, N + 1)
    weight: Tensor  # (a, N + 1)

    @classmethod
    def of(cls, layer: LayerDerivatives, bias: Tensor | None) -> Span:
        Q, R = torch.linalg.qr(layer.inputs.mT)
        U = layer.weight if bias is None else torch.cat([layer.weight, bias.to(layer.weight)[:, None]], 1)
        Y = U @ Q
        U = U - Y @ Q.mT
        s = torch.linalg.vector_norm(U, dim=1, keepdim=True)
        U /= torch.where(s > 0, s, 1.0)
        inputs = torch.cat([R.mT, R.new_zeros(len(R), 1)], 1)
        return cls(Q, U, layer.weight.shape[1], inputs, torch.cat([Y, s], 1))

    def shrink(self, v: Tensor) -> Tensor:
        """The part of a flat v (P,) that lies in there, in the coordinates (Y, s) and those of the other layers."""
        a, d = self.outside.shape
        weight, bias, rest = v.tensor_split((a * self.width, a * d))
        weight, bias = weight.view(a, -1), bias.view(a, -1)
        Y = weight @ self.basis[: self.width] + bias @ self.basis[self.width :]
        s = torch.linalg.vecdot(weight, self.outside[:, : self.width]) + (bias * self.outside[:, self.width :]).sum(1)
        return torch.cat([torch.cat([Y, s[:, None]], 1).flatten(), rest])

    def expand(self, v: Tensor) -> Tensor:
        """The inverse: flat, (P,)."""
        first, rest = v.tensor_split((self.weight.numel(),))
        Y, s = first.view_as(self.weight).tensor_split((len(self.inputs),), 1)
        X = torch.addcmul(Y @ self.basis.mT, s, self.outside)
        return torch.cat([X[:, : self.width].flatten(), X[:, self.width :].flatten(), rest])


class Objective:
    """f at many parameter vectors at once, in one batched forward pass in the model's dtype."""

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        activate: Callable[[int, Tensor, Tensor], Tensor],
        loss: str,
        inputs: Tensor,
        targets: Tensor,
        weight_decay: float,
        span: Span | None = None,
    ):
        self.activate, self.loss, self.weight_decay = activate, loss, weight_decay
        self.inputs, self.targets = inputs, targets
        parameters = [p.detach() for linear in linears for p in linear.parameters()]
        self._biases = [linear.bias is not None for linear in linears]
        if span is not None:
            with torch.inference_mode(False):  # `gradient` needs a normal tensor
                self.inputs = span.inputs.clone().to(self.inputs.dtype)
            parameters = [span.weight, *parameters[1 + self._biases[0] :]]
            self._biases[0] = False
        self.theta = torch.cat([p.flatten().double() for p in parameters])
        self._sizes = [p.numel() for p in parameters]
        widest = max(linear.out_features for linear in linears)
        self.rows = max(1, _TRIAL_NUMBERS // (len(self.theta) + 4 * len(self.inputs) * widest))

    def logits(self, theta: Tensor) -> Tensor:
        """(k, N, C) at θ (k, P)."""
        pieces = iter(theta.to(self.inputs.dtype).split(self._sizes, 1))
        z, last = self.inputs.expand(len(theta), *self.inputs.shape), len(self._biases) - 1
        for index, bias in enumerate(self._biases):
            weight = next(pieces).view(len(theta), -1, z.shape[2]).mT
            h = torch.baddbmm(next(pieces)[:, None, :], z, weight) if bias else torch.bmm(z, weight)
            z = h if index == last else self.activate(index, h, z)
        return z

    def __call__(self, theta: Tensor) -> Tensor:
        """f (k,) at θ (k, P); where it overflows, NaN or infinite."""
        theta = theta.to(self.inputs.dtype)  # what the parameters would be
        loss = accurate_loss(self.loss, self.logits(theta).double(), self.targets)
        return loss + 0.5 * self.weight_decay * theta.double().square().sum(1) if self.weight_decay else loss

    def after(self, steps: Sequence[Tensor]) -> Tensor:
        """f (k,) after each of the steps, as many in one forward pass as memory is planned for."""
        values = []
        for start in range(0, len(steps), self.rows):
            moved = [steps[i].add_(self.theta) for i in range(start, min(start + self.rows, len(steps)))]
            values.append(self(torch.stack(moved) if len(moved) > 1 else moved[0][None]))
        return torch.cat(values)

    def gradient(self, theta: Tensor) -> Tensor:
        """∇f (P,) at θ (P,)."""
        with torch.inference_mode(False), torch.enable_grad():
            theta = theta.clone().requires_grad_()  # of an inference tensor, a normal one
            return torch.autograd.grad(self(theta[None])[0], theta)[0]


def accurate_loss(loss: str, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss (k,) of logits (k, N, C); NaN where they overflow.

    For class indices with all its digits where it is tiny: log(1 + Σ_{c≠y} exp(h_c − h_y)) keeps those that
    log Σ exp(h_c) − h_y cancels.
    """
    logits = torch.where(logits.isfinite().all(-1, keepdim=True), logits, math.nan)  # an infinite h_y is no good fit
    if loss == "mse":
        return (logits - targets.double()).square().mean((1, 2))
    if targets.is_floating_point():
        return -(targets.double() * F.log_softmax(logits, -1)).sum(-1).mean(-1)
    target = targets.expand(logits.shape[:2])[..., None]
    others = (logits - logits.gather(-1, target)).scatter(-1, target, -math.inf)
    rest = torch.logsumexp(others, -1)
    return torch.logaddexp(rest, torch.zeros_like(rest)).mean(-1)

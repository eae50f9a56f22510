"""The objective after many trial steps, in one batched forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.input_span import InputSpan


class Network(NamedTuple):
    """What a step needs of the model: its layers, and how the loss follows from them."""

    linears: list[nn.Linear]
    skips: tuple[float, ...]  # σ of each layer
    activate: Callable[[int, Tensor, Tensor], Tensor]  # (layer, h, its inputs z) ↦ the layer's output
    loss: str  # 'cross_entropy' or 'mse'


class Steps:
    """Trial steps, each a sum Σ c·v of (P,) vectors. One is formed at a time: all may be more than memory holds."""

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


class Objective:
    """f = loss + ½c‖θ‖² at many parameter vectors at once, by a forward pass in the model's dtype."""

    def __init__(
        self, network: Network, inputs: Tensor, targets: Tensor, weight_decay: float, span: InputSpan | None = None
    ):
        self.activate, self.loss, self.weight_decay = network.activate, network.loss, weight_decay
        self.inputs, self.targets = inputs, targets
        parameters = [p.detach() for linear in network.linears for p in linear.parameters()]
        self._biases = [linear.bias is not None for linear in network.linears]
        if span is not None:
            with torch.inference_mode(False):  # `gradient` needs a normal tensor
                self.inputs = span.inputs.clone().to(self.inputs.dtype)
            parameters = [span.weight, *parameters[1 + self._biases[0] :]]
            self._biases[0] = False
        self.theta = torch.cat([p.flatten().double() for p in parameters])
        self._sizes = [p.numel() for p in parameters]
        widest = max(linear.out_features for linear in network.linears)
        numbers = 2**26  # that one forward pass may hold: parameters and activations
        self.rows = max(1, numbers // (len(self.theta) + 4 * len(self.inputs) * widest))

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
        """f (k,) at θ (k, P); NaN or infinite where it overflows."""
        theta = theta.to(self.inputs.dtype)  # the parameters as the model would hold them
        loss = accurate_loss(self.loss, self.logits(theta).double(), self.targets)
        return loss + 0.5 * self.weight_decay * theta.double().square().sum(1) if self.weight_decay else loss

    def after(self, steps: Steps) -> Tensor:
        """f (k,) after each of the steps, as many in one forward pass as memory allows."""
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

    With class indices a tiny loss keeps all its digits: log(1 + Σ_{c≠y} exp(h_c − h_y)) cancels nothing, unlike
    log Σ exp(h_c) − h_y.
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

"""The objective f = loss + ½c‖θ‖² at many parameter vectors, for the trials of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from _hessian.layers import LayerDerivatives, TrackedBatch
from _hessian.losses import accurate_loss
from _hessian.network import TrackedNetwork
from _hessian.ranks import Ranks

Terms = tuple[tuple[float, Tensor], ...]  # Σ c·v, v (P,)


class Losses:
    """The loss of one batch as a function of the flat parameters, in the model's dtype."""

    theta: Tensor  # (P,) the present ones, in float64
    dtype: torch.dtype
    rows: int  # parameter vectors that one call may take

    def __call__(self, theta: Tensor) -> Tensor:
        """(k,) in float64 at θ (k, P); NaN or infinite where it overflows."""
        raise NotImplementedError

    def gradient(self, theta: Tensor) -> Tensor:
        """(P,) at θ (P,)."""
        with torch.inference_mode(False), torch.enable_grad():
            theta = theta.clone().requires_grad_()  # of an inference tensor, a normal one
            return torch.autograd.grad(self(theta[None].to(self.dtype))[0], theta)[0]


class Objective:
    """f = loss + ½c‖θ‖² of the samples of all ranks, in the model's dtype, of parameters rounded to it."""

    def __init__(self, losses: Losses, weight_decay: float, ranks: Ranks | None = None):
        self.weight_decay, self.theta, self.rows, self.dtype = weight_decay, losses.theta, losses.rows, losses.dtype
        ranks = ranks or Ranks()
        self._loss, self._loss_gradient = ranks.shared(losses), ranks.shared(losses.gradient)

    def __call__(self, theta: Tensor) -> Tensor:
        """f (k,) at θ (k, P)."""
        theta = theta.to(self.dtype)
        loss = self._loss(theta)
        return loss + 0.5 * self.weight_decay * theta.double().square().sum(1) if self.weight_decay else loss

    def after(self, steps: list[Terms]) -> Tensor:
        """f (k,) after each of the steps. Few are formed at a time: all may be more than memory holds."""
        rows, values = self.rows, []
        for start in range(0, len(steps), rows):
            values.append(self(torch.stack([self.theta + total(terms) for terms in steps[start : start + rows]])))
        return torch.cat(values)

    def gradient(self, theta: Tensor) -> Tensor:
        """∇f (P,) at θ (P,)."""
        gradient = self._loss_gradient(theta)
        return gradient + self.weight_decay * theta.to(self.dtype).double() if self.weight_decay else gradient


def total(terms: Terms) -> Tensor:
    """The step Σ c·v (P,)."""
    return sum((c * v for c, v in terms[1:]), terms[0][0] * terms[0][1])


# ------------------------------------------------------------------------------------------- of both kinds of model


class Chain(NamedTuple):
    """What the trials need of a `DeepMLPWithTracking`."""

    linears: list[nn.Linear]
    skips: tuple[float, ...]  # σ of each layer
    activate: Callable[[int, Tensor, Tensor], Tensor]  # (layer, h, its inputs z) ↦ the layer's output
    loss: str  # 'cross_entropy' or 'mse'


class ChainLosses(Losses):
    """All parameter vectors in one batched forward pass."""

    def __init__(self, chain: Chain, batch: TrackedBatch[Tensor], first: LayerDerivatives | None, num_samples: int):
        """first: the first layer, if it is restricted. num_samples: the most that a rank has."""
        self.activate, self.loss, self.inputs, self.targets = chain.activate, chain.loss, batch.inputs, batch.targets
        parameters = [p.detach() for linear in chain.linears for p in linear.parameters()]
        self._biases = [linear.bias is not None for linear in chain.linears]
        if first is not None:
            with torch.inference_mode(False):  # a gradient needs a normal tensor
                self.inputs = first.inputs.clone().to(self.inputs.dtype)
            parameters = [first.weight, *parameters[1 + self._biases[0] :]]
            self._biases[0] = False
        self.theta, self.dtype = torch.cat([p.flatten().double() for p in parameters]), self.inputs.dtype
        self._sizes = [p.numel() for p in parameters]
        widest = max(linear.out_features for linear in chain.linears)
        numbers = 2**26  # that one forward pass may hold: parameters and activations
        self.rows = max(1, numbers // (len(self.theta) + 4 * num_samples * widest))

    def logits(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """(k, N, C) at θ (k, P) and inputs (N, a)."""
        pieces = iter(theta.to(self.dtype).split(self._sizes, 1))
        z, last = inputs.expand(len(theta), *inputs.shape), len(self._biases) - 1
        for index, bias in enumerate(self._biases):
            weight = next(pieces).view(len(theta), -1, z.shape[2]).mT
            h = torch.baddbmm(next(pieces)[:, None, :], z, weight) if bias else torch.bmm(z, weight)
            z = h if index == last else self.activate(index, h, z)
        return z

    def __call__(self, theta: Tensor) -> Tensor:
        return accurate_loss(self.loss, self.logits(theta, self.inputs).double(), self.targets)


class NetworkLosses(Losses):
    """One parameter vector after the other, by the network itself."""

    rows = 1

    def __init__(self, model: TrackedNetwork, batch: TrackedBatch[tuple[Tensor, ...]]):
        self.model, self.batch = model, batch
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._shapes = list(parameters), [p.shape for p in parameters.values()]
        self.theta = torch.cat([p.flatten().double() for p in parameters.values()])
        self.dtype = next(iter(parameters.values())).dtype

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.stack([self._loss(row).double() for row in theta])

    def _loss(self, theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in self._shapes])
        parameters = {n: p.view(s) for n, p, s in zip(self._names, pieces, self._shapes, strict=True)}
        return torch.func.functional_call(self.model, parameters, (self.batch.inputs, self.batch.targets))

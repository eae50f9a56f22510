"""Elementwise activations in closed form, and the initialization that their Gaussian moments call for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An elementwise φ in closed form: φ(h), and its first two derivatives together, tensors of the shape of h."""

    value: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]]

    def first(self, h: Tensor) -> Tensor:
        return self.derivatives(h)[0]

    def second(self, h: Tensor) -> Tensor:
        return self.derivatives(h)[1]


def _tanh(h: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(h)
    first = 1 - t * t
    return first, -2 * t * first


def _sigmoid(h: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(h)
    first = s * (1 - s)
    return first, first * (1 - 2 * s)


def _softplus(h: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(h)
    return s, s * (1 - s)


def _silu(h: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(h)
    return s * (1 + h * (1 - s)), s * (1 - s) * (2 + h * (1 - 2 * s))


def _gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-h / math.sqrt(2)) + h * density, (2 - h * h) * density


def _relu(h: Tensor) -> tuple[Tensor, Tensor]:
    return (h > 0).to(h.dtype), torch.zeros_like(h)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(torch.tanh, _tanh),
    "sigmoid": Activation(torch.sigmoid, _sigmoid),
    # beyond a threshold of 40 softplus(h) = h to double precision; at torch's default, 20, that is off by 2e-9
    "softplus": Activation(lambda h: F.softplus(h, threshold=40.0), _softplus),
    "gelu": Activation(F.gelu, _gelu),
    "silu": Activation(F.silu, _silu),
    "relu": Activation(torch.relu, _relu),
}


@torch.no_grad()
def initialize(layers: Sequence[nn.Linear], skips: Sequence[float], activation: str) -> None:
    """Draw weights so that differences between samples survive forward, and gradients backward, at any depth.

    - Each layer's gain undoes the mean-square slope of the activation before it.
    - Rows of W sum to zero, which keeps that activation's mean out.
    - A branch beside a skip is scaled by 1/√(number of skips).

    Moments are those of Gaussian pre-activations (mean field), for inputs of about unit variance. Draws from torch's
    global generator.
    """
    phi, depth = ACTIVATIONS[activation], len(skips) - sum(skips)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(100))

    def gaussian_mean(f: Callable[[Tensor], Tensor], variance: float) -> float:
        return (f(nodes * math.sqrt(variance)) @ weights).item() / math.sqrt(2 * math.pi)

    # a centred relu would shrink with depth: its mean stays in. tanh has none
    centre = activation != "relu" and abs(gaussian_mean(phi.value, 1.0)) > 1e-9

    def spread(variance: float) -> float:
        mean = gaussian_mean(phi.value, variance) if centre else 0.0
        return gaussian_mean(lambda h: (phi.value(h) - mean) ** 2, variance)

    def slope(variance: float) -> float:
        return gaussian_mean(lambda h: phi.first(h) ** 2, variance)

    # where spread(q)/q grows with q, every layer amplifies samples of larger norm: start small enough
    variance = 1.0  # of h over units and samples
    while depth * math.log(spread(1.1 * variance) / spread(variance) / 1.1) > 0.25 * math.log(1.1):
        variance /= 1.5
    gain, variance = math.sqrt(variance), 1.0  # of the next layer's weights; of its inputs
    branch_gain = (slope(1.0) * max(sum(skips), 1)) ** -0.5
    for index, (linear, skip) in enumerate(zip(layers, skips, strict=True)):
        fan_out, fan_in = linear.weight.shape
        gain = branch_gain if skip else gain
        if fan_in == fan_out:
            nn.init.orthogonal_(linear.weight, gain)  # fluctuates less with depth than independent weights
        else:
            nn.init.normal_(linear.weight, 0.0, gain / math.sqrt(fan_in))
        if index and centre and fan_in > 2:
            linear.weight.sub_(linear.weight.mean(1, keepdim=True)).mul_(math.sqrt(fan_in / (fan_in - 1)))
        if linear.bias is not None:
            linear.bias.zero_()
        h_variance = gain**2 * variance
        variance, gain = skip * variance + spread(h_variance), 1.0 if skip else slope(h_variance) ** -0.5

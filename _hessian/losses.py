"""The losses: their values, and their first two derivatives in the logits, in closed form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from _hessian.layers import OutputHessian

LOSSES = ("cross_entropy", "mse")


def loss_value(loss: str, logits: Tensor, targets: Tensor) -> Tensor:
    """() for logits (N, C)."""
    if loss == "mse":
        return F.mse_loss(logits, targets)
    # the default ignore_index, −100, would leave samples out of the mean: every index must be a class
    return F.cross_entropy(logits, targets, ignore_index=-(2**62))


def loss_derivatives(loss: str, logits: Tensor, targets: Tensor) -> tuple[Tensor, OutputHessian]:
    """λ_L (N, C) and Λ at the logits (N, C)."""
    N, C = logits.shape
    if loss == "mse":
        return 2 * (logits - targets) / (N * C), OutputHessian(torch.full_like(logits, 2 / (N * C)), zero_sum=False)
    probabilities = torch.softmax(logits, 1)
    if targets.is_floating_point():
        total = targets.sum(1, keepdim=True)  # 1 but for rounding
        return (total * probabilities - targets) / N, OutputHessian(total * probabilities / N, zero_sum=True)
    onehot = F.one_hot(targets, C).bool()
    others = probabilities.masked_fill(onehot, 0.0)  # π_y − 1 = −Σ_{c≠y} π_c, without cancellation
    adjoint = torch.where(onehot, -others.sum(1, keepdim=True), others) / N
    return adjoint, OutputHessian(probabilities / N, zero_sum=True)


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

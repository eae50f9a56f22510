"""What a method is given: its settings, the objective, and the batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Data
from benchmarks.training.problems import NEWTONS, Problem
from hessian import DeepMLPWithTracking

NEWTON_BATCH = 32  # samples of a data set in Newton's exact solves


class Job(NamedTuple):
    problem: Problem
    method: str
    seed: int
    cap: float  # seconds
    rate: float | None  # learning rate; of Hessian-free, the initial damping; None for Newton
    batch: int | None  # None: all samples
    decay: float
    track: str  # loss: train on all for the loss; accuracy: hold out a validation part
    label: str

    @property
    def learning_rate(self) -> float:
        assert self.rate is not None
        return self.rate

    @property
    def settings(self) -> dict:
        """What is stored with a run. The run is used again only if all of it is unchanged."""
        settings = {**self._asdict(), "problem": self.problem.settings()}
        del settings["label"]
        if not self.problem.samples:
            if self.method in NEWTONS:
                settings["curvature_batch"] = NEWTON_BATCH
            settings["parts"] = self.seed  # it parts the data set
        return json.loads(json.dumps(settings))


class StepDone(NamedTuple):
    iterations: int = 1
    converged: bool = False


StepFunction = Callable[[], StepDone]


def accurate_loss(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Tensor:
    """The model's loss. Cross-entropy as log1p(Σ_{c≠y} exp(h_c − h_y)), which keeps its digits far below 1e-16."""
    h = model(x)
    if model.loss == "mse":
        return F.mse_loss(h, y)
    gaps = (h - h.gather(1, y[:, None])).scatter(1, y[:, None], -math.inf)
    return F.softplus(gaps.logsumexp(1)).mean()


class FlatModel:
    """All parameters of a model as one vector θ, and their gradients as another. The model's own are views of these.

    accurate: use `accurate_loss`. Line searches need it; the others take the cheaper loss.
    """

    def __init__(self, model: DeepMLPWithTracking, decay: float = 0.0, accurate: bool = False):
        self.model, self.decay, self.accurate, self.parameters = model, decay, accurate, list(model.parameters())
        self.theta = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.gradient = torch.zeros_like(self.theta)
        self.theta.grad = self.gradient
        values, gradients = self.parameter_pieces(self.theta.data), self.parameter_pieces(self.gradient)
        for p, value, gradient in zip(self.parameters, values, gradients, strict=True):
            p.data, p.grad = value, gradient

    def parameter_pieces(self, v: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return [block.view_as(p) for block, p in zip(v.split(sizes), self.parameters, strict=True)]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return accurate_loss(self.model, x, y) if self.accurate else self.model(x, y)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """loss + ½ w ‖θ‖², with its gradient left in `gradient`."""
        self.gradient.zero_()
        loss = self.loss(x, y)
        loss.backward()
        if self.decay:
            self.gradient.add_(self.theta.data, alpha=self.decay)
            return loss.detach() + 0.5 * self.decay * self.theta.data.square().sum()
        return loss.detach()

    @torch.no_grad()
    def value_at(self, theta: Tensor, x: Tensor, y: Tensor) -> float:
        self.theta.data.copy_(theta)
        return (self.loss(x, y) + 0.5 * self.decay * theta.square().sum()).item()


def batches(x: Tensor, y: Tensor, seed: int, size: int | None) -> Iterator[Data]:
    """Batches without end, shuffled anew in each epoch; size None: all samples each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None or len(x) <= size:
            yield x, y
        else:
            for batch in torch.randperm(len(x), generator=generator).split(size):
                yield x[batch], y[batch]

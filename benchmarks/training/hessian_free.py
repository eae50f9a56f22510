"""Hessian-free optimization (Martens 2010)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.problems import Data
from benchmarks.training.objective import FlatModel, Job, StepDone
from hessian import DeepMLPWithTracking

CURVATURE_BATCH = 256  # samples of a data set in the products


class HessianFree:
    """CG on (Gauss-Newton + λI) p = −g.

    - It starts at 0.95 times the last solution, and stops by relative progress.
    - The best of its iterates by the true objective is taken. A backtracking line search follows.
    - λ is adapted by the ratio of the actual to the predicted decrease.

    Products take two backward passes. They equal curvlinops' to rounding, and are five times as fast here.
    """

    def __init__(self, job: Job, model: DeepMLPWithTracking, data: Data):
        self.flat, self.data, self.damping = FlatModel(model, job.decay, accurate=True), data, job.learning_rate
        self.generator = torch.Generator().manual_seed(job.seed)
        self.solution = torch.zeros_like(self.flat.theta.data)

    def curvature(self) -> Callable[[Tensor], Tensor]:
        """v ↦ Jᵀ Λ J v + w v on a batch drawn anew. J v is the derivative of Jᵀu in u."""
        x, flat = self.data[0], self.flat
        if len(x) > CURVATURE_BATCH:
            x = x[torch.randperm(len(x), generator=self.generator)[:CURVATURE_BATCH]]
        logits = flat.model(x)
        u = torch.zeros_like(logits, requires_grad=True)
        transposed = torch.autograd.grad(logits, flat.parameters, u, create_graph=True)
        probabilities = None if flat.model.loss == "mse" else logits.detach().softmax(1)

        def product(v: Tensor) -> Tensor:
            (s,) = torch.autograd.grad(transposed, u, flat.parameter_pieces(v), retain_graph=True)
            if probabilities is None:
                s = 2 * s / s.numel()
            else:
                s = probabilities * (s - (probabilities * s).sum(1, keepdim=True)) / len(s)
            blocks = torch.autograd.grad(logits, flat.parameters, s, retain_graph=True)
            return torch.cat([block.flatten() for block in blocks]) + flat.decay * v

        return product

    def __call__(self) -> StepDone:
        flat, theta = self.flat, self.flat.theta.data.clone()
        before = flat.objective(*self.data).item()
        g, product = flat.gradient.clone(), self.curvature()
        iterates, predicted = conjugate_gradients(lambda v: product(v) + self.damping * v, -g, 0.95 * self.solution)
        self.solution = p = iterates[-1]
        after = after_last = flat.value_at(theta + p, *self.data)
        for earlier in reversed(iterates[:-1]):
            value = flat.value_at(theta + earlier, *self.data)
            if value >= after and math.isfinite(after):
                break
            p, after = earlier, value
        ratio, length = (after_last - before) / predicted if predicted < 0 else -1.0, 1.0
        while not after < before and length > 1e-4:
            length /= 2
            after = flat.value_at(theta + length * p, *self.data)
        flat.theta.data.copy_(theta + length * p if after < before else theta)
        if not ratio >= 0.25:
            self.damping *= 1.5
        elif ratio > 0.75:
            self.damping /= 1.5
        return StepDone()


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, max_iterations: int = 100
) -> tuple[list[Tensor], float]:
    """Iterates on A x = b, and q = ½ xᵀAx − bᵀx at the last one.

    The last iterate is kept, and those whose numbers grow by a factor of 1.3. Martens' rule stops: q has fallen by less
    than 5e-4 of itself an iteration, over the last tenth of them and at least ten.
    """
    r = b - product(x) if x.any() else b.clone()
    d, rr, iterates, keep = r.clone(), r @ r, [], 1.0
    values: list[float] = []
    for i in range(1, max_iterations + 1):
        Ad = product(d)
        curvature = d @ Ad
        if not curvature > 0:
            break
        alpha = rr / curvature
        x, r = x + alpha * d, r - alpha * Ad
        values.append(-0.5 * (x @ (b + r)).item())
        if i >= keep:
            iterates.append(x)
            keep *= 1.3
        back = max(10, i // 10)
        if i > back and values[-1] < 0 and values[-1 - back] - values[-1] < 5e-4 * back * -values[-1]:
            break
        rr, previous = r @ r, rr
        d = r + rr / previous * d
    if not iterates or iterates[-1] is not x:
        iterates.append(x)
    return iterates, values[-1] if values else 0.0

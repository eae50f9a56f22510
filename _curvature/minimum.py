"""`Minimum`, the certificate of a minimum, and the search for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from _curvature.counts import EigenvalueCounts
from _curvature.progress import progress
from _curvature.samples import Model, Samples, flat, trainable
from _hessian.argument_checks import checked_closure
from _hessian.quasi_newton import ROUNDING, Point, exact_round
from hessian import HessianFactorization, SingularHessianError
from newton import DampedNewton


class Minimum(NamedTuple):
    """What is known of a point θ of f = loss + ½w‖θ‖². It is true where the point is proved to be a minimum."""

    gradient_norm: float  # ‖∇f‖
    num_negative_eigenvalues: int  # of ∇²f + htol·I, by a certified inertia
    smallest_eigenvalue: float  # of ∇²f
    gtol: float
    htol: float
    weight_decay: float  # w

    def __bool__(self) -> bool:
        return self.gradient_norm <= self.gtol and self.num_negative_eigenvalues == 0

    def __str__(self) -> str:
        gradient = f"the gradient's norm is {self.gradient_norm:.1e}, {{}} {self.gtol:g}"
        inertia = f"{self.num_negative_eigenvalues or 'no'} eigenvalues lie below -{self.htol:g}"
        smallest = f"the smallest is {self.smallest_eigenvalue:.3g}"
        within = gradient.format("within" if self.gradient_norm <= self.gtol else "above")
        verdict = "A minimum" if self else "Not a minimum"
        return f"{verdict}: {within}; {inertia}, by inertia; {smallest}."


def certificate(model: Model, counts: EigenvalueCounts, gtol: float, htol: float, weight_decay: float) -> Minimum:
    """Of the tracked loss that `counts` counts for."""
    samples = Samples(model)
    batches = samples.tracked_batches(model)
    total = sum(len(y) for _, y in batches)
    g = weight_decay * flat(trainable(model))
    for x, y in batches:
        g = g + samples.gradient(x, y) * samples.weight(total) / samples.weight(len(y))
    return Minimum(
        float(g.norm()),
        counts.below(-weight_decay - htol),
        float(counts.extreme(1, -1).values[0]) + weight_decay,
        gtol,
        htol,
        weight_decay,
    )


class Search:
    """The objective f at flat parameters θ, and steps that lower it."""

    def __init__(self, model: Model, closure: Callable[[], Tensor], weight_decay: float):
        self.model, self.closure, self.weight_decay = model, checked_closure(closure), weight_decay
        self.parameters = trainable(model)
        if any(p.dtype != torch.float64 for p in self.parameters):
            raise TypeError("a certified minimum needs float64: call model.double(), and pass float64 inputs")
        self.move(flat(self.parameters))

    def __call__(self, theta: Tensor) -> Tensor:
        """f (k,) at θ (k, P)."""
        losses = torch.stack([self._tracked_loss(row).detach() for row in theta])
        return losses + 0.5 * self.weight_decay * theta.square().sum(1)

    def gradient(self, theta: Tensor) -> Tensor:
        """∇f (P,) at θ (P,)."""
        with torch.enable_grad():
            self.loss = self._tracked_loss(theta)
            g = flat(list(torch.autograd.grad(self.loss, self.parameters)))
        return g + self.weight_decay * theta

    def _tracked_loss(self, theta: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(theta, self.parameters)
        loss = self.closure()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure must return the loss, got {type(loss).__name__}: let it return "
                "model(x, y, track_activations=True)"
            )
        return loss

    def move(self, theta: Tensor) -> None:
        gradient = self.gradient(theta)
        value = float(self.loss.detach()) + 0.5 * self.weight_decay * float(theta @ theta)
        self.point = Point(theta, value, gradient)
        self.counts: EigenvalueCounts | None = None

    def eigenvalue_counts(self) -> EigenvalueCounts:
        """Of H at the present point."""
        if self.counts is None:
            self.counts = EigenvalueCounts(self.model, self.loss)
        return self.counts

    def lbfgs(self, max_steps: int) -> None:
        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            self.move(torch.from_numpy(theta).to(self.point.theta))
            return self.point.value, self.point.gradient.cpu().numpy()

        options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": 20, "gtol": 1e-7, "ftol": 0.0}
        start = self.point.theta.cpu().numpy()
        found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        self.move(torch.from_numpy(found.x).to(self.point.theta))

    def damped_newton(self, max_steps: int) -> None:
        optimizer = DampedNewton(self.model, weight_decay=self.weight_decay)
        for _ in range(max_steps):
            optimizer.step(self.closure)
            if optimizer.converged or optimizer.stalled:
                break
        self.move(flat(self.parameters))

    def newton(self, gtol: float, htol: float, max_steps: int) -> bool:
        """Rounds with H + (w + λ)I, factored anew for each. True where it came to a saddle, and left it."""
        damping, smallest = 0.0, 1e-10 * self.eigenvalue_counts().norm()
        for _ in progress(range(max_steps), "Newton"):
            if self.point.gradient_norm <= gtol:
                return self._leave_saddle(htol)
            start = self.point
            found = exact_round(self, start, self._factorized, damping, gtol=gtol, smallest=smallest, max_steps=50)
            self.move(found.point.theta)
            if found.point is start:
                return self._leave_saddle(htol)
            damping = found.next_damping
        return False

    def _factorized(self, damping: float) -> HessianFactorization | None:
        """H + (w + λ)I at the present point; None where it is not positive definite."""
        try:
            f = self.eigenvalue_counts().factorize(-self.weight_decay - damping)
        except SingularHessianError:
            return None
        return f if f.is_positive_definite else None

    def _leave_saddle(self, htol: float) -> bool:
        """At a stationary point with an eigenvalue below −htol: a step along it. Whether there was one."""
        counts = self.eigenvalue_counts()
        if counts.below(-self.weight_decay - htol) == 0:
            return False
        direction, point = counts.extreme(1, -1).vectors[:, 0], self.point
        thetas = (point.theta + sign * 10.0**-power * direction for power in range(6) for sign in (1, -1))
        below = point.value - ROUNDING * abs(point.value)
        lower = next((theta for theta in thetas if float(self(theta[None])) < below), None)
        self.move(point.theta if lower is None else lower)
        return lower is not None

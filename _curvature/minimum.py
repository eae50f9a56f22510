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
from _hessian.quasi_newton import Secant, inverse_bfgs_product
from hessian import DeepMLPWithTracking, HessianFactorization, SingularHessianError, factorize_hessian
from newton import DampedNewton

_ROUNDING = 1e-13  # of the objective: a smaller change can't be seen


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
    """The objective f along flat parameters θ, and steps that lower it."""

    def __init__(self, model: Model, closure: Callable[[], Tensor], weight_decay: float):
        self.model, self.closure, self.weight_decay = model, closure, weight_decay
        self.parameters = trainable(model)
        if any(p.dtype != torch.float64 for p in self.parameters):
            raise TypeError("a certified minimum needs float64: call model.double(), and pass float64 inputs")
        self.evaluate()

    def evaluate(self) -> None:
        """f, g and the tracked loss, at the model's parameters."""
        with torch.enable_grad():
            self.loss = self.closure()
            if not isinstance(self.loss, Tensor):
                raise TypeError(
                    f"the closure must return the loss, got {type(self.loss).__name__}: let it return "
                    "model(x, y, track_activations=True)"
                )
            g = flat(list(torch.autograd.grad(self.loss, self.parameters)))
        self.theta = flat(self.parameters)
        self.value = float(self.loss.detach()) + 0.5 * self.weight_decay * float(self.theta @ self.theta)
        self.gradient = g + self.weight_decay * self.theta
        self.gradient_norm = float(self.gradient.norm())
        self.counts: EigenvalueCounts | None = None

    def eigenvalue_counts(self) -> EigenvalueCounts:
        """Of H at the present θ."""
        if self.counts is None:
            self.counts = EigenvalueCounts(self.model, self.loss)
        return self.counts

    def move(self, theta: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(theta, self.parameters)
        self.evaluate()

    def lbfgs(self, max_steps: int) -> None:
        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            self.move(torch.from_numpy(theta).to(self.theta))
            return self.value, self.gradient.cpu().numpy()

        options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": 20, "gtol": 1e-7, "ftol": 0.0}
        start = self.theta.cpu().numpy()
        found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        self.move(torch.from_numpy(found.x).to(self.theta))

    def damped_newton(self, max_steps: int) -> None:
        if not isinstance(self.model, DeepMLPWithTracking):
            raise TypeError("start='damped_newton' is for DeepMLPWithTracking: take start='lbfgs'")
        optimizer = DampedNewton(self.model, weight_decay=self.weight_decay)
        for _ in range(max_steps):
            optimizer.step(self.closure)
            if optimizer.converged or optimizer.stalled:
                break
        self.evaluate()

    def newton(self, gtol: float, htol: float, max_steps: int) -> bool:
        """Rounds of steps with H + (w + λ)I, factored anew for each round; λ = 0 where that is positive definite and
        its first step lowers f. True where it came to a saddle, and left it."""
        damping, smallest = 0.0, 1e-10 * self.eigenvalue_counts().norm()
        for _ in progress(range(max_steps), "Newton"):
            if self.gradient_norm <= gtol:
                return self._leave_saddle(htol)
            f, damping = self._definite(damping, smallest)
            if self.quasi_newton(f, gtol) > 0:
                damping = damping / 10 if damping > smallest else 0.0
            elif damping > 1e12 * smallest:
                break
            else:
                damping = max(10 * damping, smallest)
        return False

    def quasi_newton(self, f: HessianFactorization, gtol: float, max_steps: int = 50, memory: int = 20) -> int:
        """L-BFGS steps that start from a factored Hessian: the first is a Newton step. The number of steps taken, until
        ‖g‖ ≤ gtol, or none lowers f. A step costs a gradient and a solve, thousands of times less than to factor."""
        secants: list[Secant] = []
        for step in range(max_steps):
            if self.gradient_norm <= gtol:
                return step
            theta, gradient = self.theta, self.gradient
            x = -inverse_bfgs_product(f, secants, gradient)
            if not any(self._accept(length * x) for length in (1.0, 0.3, 0.1, 0.01)):
                return step
            s, y = self.theta - theta, self.gradient - gradient
            if (sy := float(s @ y)) > 0:
                secants = [*secants[-memory:], Secant(s, y, sy)]
        return max_steps

    def _definite(self, damping: float, smallest: float) -> tuple[HessianFactorization, float]:
        """H + (w + λ)I with the least of λ, 10 λ, 100 λ, … that makes it positive definite."""
        while True:
            try:
                f = factorize_hessian(self.model, self.loss, self.weight_decay + damping)
                while not f.is_positive_definite:
                    damping = max(10 * damping, smallest)
                    f = f.with_damping(self.weight_decay + damping)
                return f, damping
            except SingularHessianError:
                damping = max(10 * damping, smallest)

    def _accept(self, step: Tensor) -> bool:
        """Take the step where it lowers f, or, where rounding hides that, g."""
        theta, value, norm = self.theta, self.value, self.gradient_norm
        self.move(theta + step)
        slack = _ROUNDING * max(abs(value), 1e-300)
        if self.value < value - slack or (self.value <= value + slack and self.gradient_norm < norm):
            return True
        self.move(theta)
        return False

    def _leave_saddle(self, htol: float) -> bool:
        """At a stationary point with an eigenvalue below −htol: a step along it. Whether there was one."""
        counts = self.eigenvalue_counts()
        if counts.below(-self.weight_decay - htol) == 0:
            return False
        direction = counts.extreme(1, -1).vectors[:, 0]
        return any(self._accept(sign * 10.0**-power * direction) for power in range(6) for sign in (1, -1))

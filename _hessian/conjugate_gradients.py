"""Inexact Newton: the curvature of all samples by conjugate gradients, preconditioned by exact solves on some."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from _hessian.gram import gauss_newton_product
from _hessian.newton_problem import Preconditioner, Solution, StepProblem


class ConjugateGradients:
    """(G + cI + λD) x = −g, G the Gauss–Newton matrix of all samples, by a few iterations for each λ.

    first_direction: (P,), minimized along before the first residual. It takes one of three iterations or more: two
    must remain to measure the progress.
    """

    def __init__(
        self,
        problem: StepProblem,
        preconditioner: Callable[[float], Preconditioner | None],
        first_direction: Tensor | None,
    ):
        self.gradient, self.iterations = problem.gradient, problem.options.cg_iterations
        self.preconditioner, self.first_direction = preconditioner, first_direction
        # products in the model's dtype, as the trials are
        single = problem.objective.inputs.dtype == torch.float32
        self._layers = tuple(x.in_float32() for x in problem.layers) if single else problem.layers
        # at the last λ: the last rᵀP⁻¹r relative to the first, r the residual and P the preconditioner
        self.progress = 1.0

    def solve(self, dampings: Sequence[float]) -> list[Solution]:
        found = []
        for damping in dampings:
            preconditioner = self.preconditioner(damping)
            x = None if preconditioner is None else self.iterate(preconditioner)
            if x is not None:
                found.append(Solution(damping, x))
        return found

    def product(self, v: Tensor) -> Tensor:
        """G v (P,)."""
        return gauss_newton_product(self._layers, v.to(self._layers[0].weight.dtype)[:, None])[:, 0].double()

    def iterate(self, preconditioner: Preconditioner, stop: float = 1e-4) -> Tensor | None:
        """x (P,). None where the preconditioner is not positive definite by rounding: λ is too small for it.

        stop: end where rᵀP⁻¹r fell by this factor.
        """
        count = self.iterations
        descent = _ConjugateDirections(lambda d: self.product(d) + preconditioner.metric(d), self.gradient)
        if self.first_direction is not None and count > 2 and descent.minimize_along(self.first_direction):
            count -= 1
        self.progress = 0.0 if count == 1 else 1.0  # one iteration can't measure it
        for i in range(count):
            d = preconditioner.inverse(descent.residual)
            squared_norm = float(descent.residual @ d)
            if i == 0:
                first = squared_norm
            else:
                self.progress = squared_norm / first
            if i > 0 and not squared_norm > stop * first:
                break
            if not (squared_norm > 0 and descent.minimize_along(d)):
                if i == 0 and descent.residual.any():
                    return None
                break
        return descent.x if descent.directions else None


class _ConjugateDirections:
    """½ xᵀAx + gᵀx, minimized along one direction after another. Each is made conjugate to all earlier ones.

    In exact arithmetic the last one would do. With rounding it doesn't.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], gradient: Tensor):
        self.product = product
        self.x, self.residual = torch.zeros_like(gradient), -gradient
        self.directions: list[tuple[Tensor, Tensor, Tensor]] = []  # d, Ad, dᵀAd

    def minimize_along(self, d: Tensor) -> bool:
        """False, and nothing done, where dᵀAd is not a positive number."""
        for other, product, curvature in self.directions:
            d = d - (d @ product / curvature) * other
        Ad = self.product(d)
        curvature = d @ Ad
        if not 0 < float(curvature) < math.inf:
            return False
        self.x = self.x + (self.residual @ d / curvature) * d
        self.residual = self.residual - (self.residual @ d / curvature) * Ad
        self.directions.append((d, Ad, curvature))
        return True

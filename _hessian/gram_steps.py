"""Gauss–Newton steps by the Gram matrix: any number of λ for one matrix, and a second-order correction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from _hessian.gram import DampedSystem, GramSystem
from _hessian.newton_problem import Preconditioner, Solution, StepProblem


class GramSteps:
    """(G + cI + λD) x = −g with G of the sub-batch, if there is one, else of all samples."""

    def __init__(self, problem: StepProblem):
        self.problem = problem

    @cached_property
    def system(self) -> GramSystem:
        """With the gradient as Jᵀw, where the batch has a w with all its digits."""
        problem, options = self.problem, self.problem.options
        layers, c = problem.curvature_layers, options.weight_decay
        if problem.all_samples:
            decay = c * problem.theta if c else None
            system = GramSystem(layers, options.metric, options.metric_damping, c, decay)
            if system.has_residual():
                return system
        return GramSystem(layers, options.metric, options.metric_damping, c, problem.gradient, without_residual=True)

    def solve(self, dampings: Sequence[float]) -> list[Solution]:
        """With a second-order correction, for the mean square loss on all samples."""
        corrected = self.problem.objective.loss == "mse" and self.problem.all_samples
        found, systems, changes = [], [], []
        for damping in dampings:
            damped = self.system.factorize(damping)
            if damped is not None:
                x, Jx = self.system.step(damped)
                found.append(Solution(damping, x))
                if corrected:  # else its matrices are no longer needed
                    systems.append(damped)
                    changes.append(Jx)
        if not systems:
            return found
        corrections = self._corrections(systems, torch.stack([x.x for x in found]), changes)
        return [x._replace(correction=y) for x, y in zip(found, corrections, strict=True)]

    def _corrections(self, systems: Sequence[DampedSystem], x: Tensor, Jx: Sequence[Tensor]) -> Tensor:
        """−½ (JᵀJ + cI + λD)⁻¹ Jᵀ Sᵀs₂ (m, P), s₂ the second derivative of the logits along x (m, P).

        This is how the solution bends as its length grows (Transtrum & Sethna 2012). s₂ is a one-sided difference. With
        cross-entropy the correction saved one step in fourteen, and cost more than that.
        """
        objective, theta = self.problem.objective, self.problem.theta
        part = 0.1  # of x: the difference is taken over it
        longest = 0.75  # correction, relative to ‖x‖
        ahead = torch.cat([theta[None], theta + part * x])
        logits = torch.cat([objective.logits(some).double() for some in ahead.split(objective.rows)])
        bends = [
            (self.system.scale(h - logits[0]) / part - s) * (2 / part) for h, s in zip(logits[1:], Jx, strict=True)
        ]
        y = torch.stack([-0.5 * s.transpose(s.solve(bend)) for s, bend in zip(systems, bends, strict=True)])
        limit = longest * torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return y * (limit / torch.linalg.vector_norm(y, dim=1, keepdim=True)).clamp(max=1.0)

    def preconditioner(self, damping: float) -> Preconditioner | None:
        damped = self.system.factorize(damping)
        if damped is None:
            return None
        return Preconditioner(lambda v: self.system.inverse(damped, v), damped.apply_metric)

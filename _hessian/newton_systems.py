"""Three ways to solve (G + cI + λD) x = −g: by the Gram matrix, by a factorization, by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from _hessian.factorization import HessianFactorization, System, factorize_system
from _hessian.gram import DampedSystem, GramSystem
from _hessian.layers import NotPositiveDefinite, SingularHessianError
from _hessian.newton_problem import Problem
from _hessian.objective import Terms
from _hessian.settings import Settings


class Solution(NamedTuple):
    x: Tensor  # (P,)
    bend: Tensor | None = None  # (P,) y

    def step(self, length: float) -> Terms:
        return ((length, self.x),)

    def bent_step(self, length: float) -> Terms:
        assert self.bend is not None
        return ((length, self.x), (length**2, self.bend))


class Systems(Protocol):
    """(G + cI + λD) x = −g for any λ."""

    exponent: int  # a step of length a asks for λ a^−exponent
    tries_smaller: bool  # smaller λ are tried as well, where f falls little

    def solve(self, damping: float) -> Solution | None:
        """None where it fails: λ is too small for the rounding."""


class Preconditioner(NamedTuple):
    """G + cI + λD with G of the sub-batch."""

    inverse: Callable[[Tensor], Tensor]  # its inverse times v (P,)
    metric: Callable[[Tensor], Tensor]  # (cI + λD) v


def definite_factorization(
    system: System, damping: float, formed: Tensor | None = None, route: str = "auto"
) -> HessianFactorization | None:
    """The system's matrix + damping·I, factored. None where it is not positive definite, or singular to rounding.

    formed: H, if it was formed.
    """
    try:
        settings = Settings(damping, route=route if formed is None else "dense")
        return factorize_system(system, settings, definite_only=True, formed=formed)
    except (NotPositiveDefinite, SingularHessianError):
        return None
    except ArithmeticError:  # where the loss is tiny, a product differs from the dense H by its rounding
        if route == "sweep":
            raise  # a derivative of torch is wrong
        return definite_factorization(system, damping, route="sweep")


class GramSteps:
    """By the Gram matrix of the Gauss–Newton matrix: one serves all λ."""

    exponent = 2

    def __init__(self, problem: Problem):
        self.problem = problem
        # with an L2 term each λ has its own matrix. With 'parameter' more λ cost more than they save
        self.tries_smaller = problem.options.metric == "state" and not problem.options.weight_decay

    @cached_property
    def system(self) -> GramSystem:
        """With the gradient as Jᵀw, where the batch has a w with all its digits."""
        problem, c = self.problem, self.problem.options.weight_decay
        if problem.options.uses_all_samples(problem.num_samples):
            system = problem.gram_system(c * problem.objective.theta if c else None)
            if system.has_residual():
                return system
        return problem.gram_system(problem.gradient, without_residual=True)

    def solve(self, damping: float) -> Solution | None:
        damped = self.system.factorize(damping)
        if damped is None:
            return None
        x, Jx = self.system.step(damped)
        return Solution(x, self._bend(damped, x, Jx) if self.problem.logits is not None else None)

    def _bend(self, damped: DampedSystem, x: Tensor, Jx: Tensor) -> Tensor:
        """−½ (JᵀJ + cI + λD)⁻¹ Jᵀ Sᵀs₂ (P,), s₂ the second derivative of the logits along x: a one-sided difference.

        This is how the solution bends as its length grows (Transtrum & Sethna 2012). Without it, curve fitting takes
        four times as long to a loss of 1e-10.
        """
        theta, part = self.problem.objective.theta, 0.1  # the difference is taken over this part of x
        assert self.problem.logits is not None
        here, ahead = self.problem.logits(torch.stack([theta, theta + part * x])).double()
        change = (self.system.scale(ahead - here) / part - Jx) * (2 / part)
        return -0.5 * damped.transpose(damped.solve(change))

    def preconditioner(self, damping: float) -> Preconditioner | None:
        damped = self.system.factorize(damping)
        if damped is None:
            return None
        return Preconditioner(lambda v: self.system.inverse(damped, v), damped.apply_metric)


class FactoredSteps:
    """By the factorizations of hessian.py. D is I; for Gauss–Newton with metric='state', ρI + Σ SᵀS/N.

    With the exact Hessian I did as well: where it serves, near a minimum, layers' changes should cancel each other.
    """

    exponent, tries_smaller = 2, False

    def __init__(self, problem: Problem, curvature: str):
        self.problem, self.curvature = problem, curvature
        self._by_state = problem.options.metric == "state" and curvature == "gauss_newton"

    @cached_property
    def _formed(self) -> Tensor | None:
        """H (P, P), where forming it is the cheapest route, and all λ share it."""
        system = self.problem.system(self.curvature)
        route = system.choose_route(Settings(1.0), formed=False, may_mix=False)
        try:
            return system.dense() if route == "dense" and not self._by_state else None
        except ArithmeticError:  # see definite_factorization
            return None

    def _shift(self, damping: float) -> float:
        """The multiple of I in cI + λD."""
        options = self.problem.options
        shift = damping * ((options.metric_damping or 0.1) if self._by_state else 1.0) + options.weight_decay
        return max(shift, 1e-10)  # H alone may be singular

    def factorized(self, damping: float) -> HessianFactorization | None:
        """The matrix at λ, factored; None where it is not positive definite."""
        system = self.problem.system(self.curvature, damping if self._by_state else 0.0)
        return definite_factorization(system, self._shift(damping), self._formed)

    def solve(self, damping: float) -> Solution | None:
        factorization, rtol = self.factorized(damping), 1e-6
        if factorization is None:
            return None
        x, residual = factorization._refined(-self.problem.gradient[:, None], rtol, target=rtol)
        return Solution(x[:, 0]) if float(residual) <= rtol else None

    def preconditioner(self, damping: float) -> Preconditioner | None:
        factorization = self.factorized(damping)
        if factorization is None:
            return None
        shift, problem = self._shift(damping), self.problem

        def metric(v: Tensor) -> Tensor:
            return shift * v + damping * problem.state_product(v) if self._by_state else shift * v

        return Preconditioner(lambda v: factorization._direct(v[:, None])[:, 0], metric)


class ConjugateGradients:
    """By a few conjugate gradients on the Gauss–Newton matrix of all samples. That of the sub-batch preconditions.

    first: (P,), a direction that is minimized along before the first residual: the last step. It takes the place of
    one iteration.
    """

    exponent, tries_smaller = 2, False

    def __init__(self, problem: Problem, sub_batch: GramSteps | FactoredSteps, first: Tensor | None):
        self.problem, self.sub_batch, self.first = problem, sub_batch, first

    def solve(self, damping: float, stop: float = 1e-2) -> Solution | None:
        """stop: the system counts as solved where rᵀP⁻¹r fell by this factor, r the residual, P the preconditioner.

        1e-4 takes more iterations and no fewer steps.
        """
        preconditioner = self.sub_batch.preconditioner(damping)
        if preconditioner is None:
            return None
        inverse, metric, product = preconditioner.inverse, preconditioner.metric, self.problem.product
        descent = ConjugateDirections(lambda d: product(d) + metric(d), self.problem.gradient)
        count = self.problem.options.cg_iterations
        if self.first is not None and count > 2:  # two are needed to see the residual fall
            count -= descent.minimize_along(self.first)
        squared_norms: list[float] = []
        self.exponent = 1  # the smaller λ, the less far a few iterations get
        for _ in range(count):
            d = inverse(descent.residual)
            squared_norms.append(float(descent.residual @ d))
            if 0 <= squared_norms[-1] <= stop * squared_norms[0]:
                self.exponent = 2
                break
            if not (squared_norms[-1] > 0 and descent.minimize_along(d)):
                if len(squared_norms) == 1:  # the preconditioner is not positive definite by rounding
                    return None
                break
        return Solution(descent.x)


class ConjugateDirections:
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

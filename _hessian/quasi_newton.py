"""Quasi-Newton steps (L-BFGS) that start from a factored Hessian instead of a multiple of the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from _hessian.damping_search import Search, Trial
from _hessian.factorization import HessianFactorization
from _hessian.trial_losses import Steps


class Secant(NamedTuple):
    """What the gradient did along a step."""

    s: Tensor  # (P,) the step
    y: Tensor  # (P,) the gradient's change
    sy: float  # sᵀy > 0


def inverse_bfgs_product(factorization: HessianFactorization, secants: Sequence[Secant], v: Tensor) -> Tensor:
    """B⁻¹v (P,), B the factored matrix after a BFGS update by each secant: the two loops of Nocedal (1980)."""
    v, parts = v.clone(), []
    for s, y, sy in reversed(secants):
        parts.append(s @ v / sy)
        v -= parts[-1] * y
    v = factorization._direct(v[:, None])[:, 0]
    for (s, y, sy), part in zip(secants, reversed(parts), strict=True):
        v += (part - y @ v / sy) * s
    return v


def quasi_newton_steps(
    search: Search,
    factorization: HessianFactorization,
    best: Trial,
    *,
    max_steps: int = 16,
    lengths: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
) -> Trial:
    """The best trial and further steps from there, as long as f falls. All use one factorization."""
    objective, theta = search.problem.objective, search.problem.theta
    step, gradient = best.step, search.problem.gradient
    secants: list[Secant] = []
    for _ in range(max_steps):
        before, gradient = gradient, objective.gradient(theta + best.step)
        change = gradient - before
        sy = float(step @ change)
        if sy > 0:  # else the matrix would not stay positive definite
            secants.append(Secant(step, change, sy))
        x = -inverse_bfgs_product(factorization, secants, gradient)
        rows = Steps([((1.0, best.step), (a, x)) for a in lengths])
        found = search.best_of(rows, [best.damping] * len(rows), lengths)
        if not found.value < best.value:
            break
        step, best = found.length * x, found._replace(length=best.length)
    return best

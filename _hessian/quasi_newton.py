"""Minimization with a factored Hessian: one factorization serves a Newton step, and quasi-Newton steps after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from _hessian.factorization import HessianFactorization

ROUNDING = 1e-13  # relative to f: smaller differences decide nothing


class Smooth(Protocol):
    def __call__(self, theta: Tensor) -> Tensor:
        """f (k,) at θ (k, P)."""

    def gradient(self, theta: Tensor) -> Tensor:
        """(P,) at θ (P,)."""


class Point(NamedTuple):
    theta: Tensor  # (P,)
    value: float  # f
    gradient: Tensor  # (P,)

    @property
    def gradient_norm(self) -> float:
        return float(torch.linalg.vector_norm(self.gradient))


class Secant(NamedTuple):
    """What the gradient did along a step."""

    s: Tensor  # (P,) the step
    y: Tensor  # (P,) the gradient's change
    sy: float  # sᵀy > 0


Inverse = Callable[[Tensor], Tensor]


def direct_solve(factorization: HessianFactorization, v: Tensor) -> Tensor:
    """For v (P,)."""
    return factorization._direct(v[:, None])[:, 0]


def inverse_bfgs_product(inverse: Inverse, secants: Sequence[Secant], v: Tensor) -> Tensor:
    """B⁻¹v (P,), B the matrix of `inverse` after a BFGS update by each secant: the two loops of Nocedal (1980)."""
    v, parts = v.clone(), []
    for s, y, sy in reversed(secants):
        parts.append(s @ v / sy)
        v -= parts[-1] * y
    v = inverse(v)
    for (s, y, sy), part in zip(secants, reversed(parts), strict=True):
        v += (part - y @ v / sy) * s
    return v


def lower_point(objective: Smooth, start: Point, x: Tensor, by_gradient: bool) -> Point | None:
    """The lowest of three points along x. by_gradient: or θ + x, if rounding hides whether f falls, and ‖g‖ does."""
    thetas = torch.stack([start.theta + a * x for a in (1.0, 0.3, 0.1)])
    values = objective(thetas)
    value, index = torch.where(values.isfinite(), values, torch.inf).min(0)
    slack = ROUNDING * abs(start.value)
    if value < start.value - slack:
        return Point(thetas[index], float(value), objective.gradient(thetas[index]))
    if by_gradient and values[0] <= start.value + slack:
        full = Point(thetas[0], float(values[0]), objective.gradient(thetas[0]))
        return full if full.gradient_norm < start.gradient_norm else None
    return None


def quasi_newton_steps(
    objective: Smooth, inverse: Inverse, start: Point, gtol: float, max_steps: int, by_gradient: bool
) -> Point:
    """A Newton step, and L-BFGS steps that start from the factored matrix, as long as they get lower.

    A step costs a gradient, a solve, and three values of f.
    """
    point, secants = start, list[Secant]()
    for _ in range(max_steps):
        x = -inverse_bfgs_product(inverse, secants, point.gradient)
        found = lower_point(objective, point, x, by_gradient)
        if found is None:
            break
        s, y = found.theta - point.theta, found.gradient - point.gradient
        point = found
        if point.gradient_norm <= gtol:
            break
        if (sy := float(s @ y)) > 0:  # else the matrix would not stay positive definite
            secants.append(Secant(s, y, sy))
    return point


class Round(NamedTuple):
    point: Point
    damping: float  # λ of the factored matrix
    num_dampings: int  # tried

    @property
    def next_damping(self) -> float:
        return 0.1 * self.damping


def exact_round(
    objective: Smooth,
    start: Point,
    factorized: Callable[[float], HessianFactorization | None],
    damping: float,
    *,
    gtol: float,
    smallest: float = 1e-10,
    max_steps: int = 16,
) -> Round:
    """Quasi-Newton steps with H + λD, at the least λ of `damping`, 10 `damping`, … that lowers f.

    factorized: the matrix at λ; None where it is not positive definite. smallest: a smaller λ stands for 0. Where no λ
    lowers f, the point is `start`. Where the model promises a decrease that rounding hides, ‖g‖ decides. Then λ begins
    at 0, and rises as long as the model promises that ‖g‖ falls by half.
    """
    end, hidden, count = start, False, 0
    while end is start and count < 40:
        count += 1
        damping = 0.0 if damping < smallest else damping
        factorization = factorized(damping)
        if factorization is not None:
            inverse = partial(direct_solve, factorization)
            end = quasi_newton_steps(objective, inverse, start, gtol, max_steps, by_gradient=hidden or damping == 0)
        if end is not start or (hidden and factorization is None):
            break
        if factorization is not None:
            x = inverse(start.gradient)
            if hidden and damping * float(torch.linalg.vector_norm(x)) > 0.5 * start.gradient_norm:
                break
            if not hidden and 0.5 * float(start.gradient @ x) <= ROUNDING * abs(start.value):
                hidden, damping = True, 0.0
                continue
        damping = max(10 * damping, smallest)
    return Round(end, damping, count)

"""How one step finds λ and its length, and the rounds with the exact Hessian: against scans and dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from _hessian import quasi_newton
from _hessian.newton_step import LENGTHS, NewtonStep
from _hessian.newton_systems import Solution
from _hessian.quasi_newton import Point, Round, Secant, exact_round, inverse_bfgs_product, quasi_newton_steps
from newton import DampedNewton
from tests.newton_oracles import closure_of, eye, state_of, step_of
from tests.oracles import Case, random_vector, relative


class Scan:
    """A search over solutions x(λ) = −g/λ; the λ that were asked for."""

    def __init__(self, exponent: int = 2, solve: Callable[[Tensor, float], Solution | None] | None = None):
        model, x, y = Case((6, 5), 14, inputs=4).build()
        optimizer = DampedNewton(model)
        self.state, self.exponent, self.asked = state_of(optimizer), exponent, list[float]()
        self.tries_smaller = False
        self.step: NewtonStep = step_of(optimizer, closure_of(model, x, y))
        self.gradient, self._solve = self.step.problem.gradient, solve or (lambda g, damping: Solution(-g / damping))

    def solve(self, damping: float) -> Solution | None:
        self.asked.append(damping)
        return self._solve(self.gradient, damping)

    def search(self, damping: float):
        self.state["damping"] = damping
        return self.step._search(self)

    def values(self, damping: float) -> Tensor:
        """f at each length of −g/λ, one after the other."""
        objective, x = self.step.objective, -self.gradient / damping
        return torch.cat([objective((objective.theta + a * x)[None]) for a in LENGTHS])


@pytest.mark.parametrize("exponent", (1, 2))
def test_the_length_with_the_lowest_objective_sets_the_next_damping(exponent):
    scan, seen = Scan(exponent), set()
    for damping in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        best, values = scan.search(damping), scan.values(damping)
        assert best.value == pytest.approx(float(values.min()), rel=1e-14)
        assert best.damping == damping and best.length == LENGTHS[int(values.argmin())]
        assert scan.state["damping"] == pytest.approx(damping / best.length**exponent)
        seen.add(best.length)
    assert min(seen) < 1 < max(seen)


def test_damping_is_raised_until_the_objective_falls():
    scan = Scan()
    best = scan.search(1e-6)
    assert scan.asked == pytest.approx([1e-6 * 10**i for i in range(len(scan.asked))])
    lower = [float(scan.values(damping).min()) < scan.step.before for damping in scan.asked]
    assert lower == [False] * (len(lower) - 1) + [True] and len(lower) > 2
    assert best.damping == scan.asked[-1] and scan.step.num_dampings == len(lower)


def test_damping_is_raised_where_the_system_is_not_solved():
    scan = Scan(solve=lambda g, damping: None if damping < 50 else Solution(-g / damping))
    assert scan.search(1.0).damping == 100.0 and scan.asked == [1.0, 10.0, 100.0]


@pytest.mark.parametrize("least", (0.0, 3e3))
def test_damping_is_lowered_while_the_objective_falls_little(least):
    """Until it falls by a fifth, or no further. least: λ below give a step uphill."""
    scan = Scan(solve=lambda g, damping: Solution(-g / damping if damping > least else g))
    scan.tries_smaller = True
    best = scan.search(1e5)
    assert scan.asked == pytest.approx([1e5 / 10**i for i in range(len(scan.asked))])
    values = [float(scan.values(damping).min()) / scan.step.before for damping in scan.asked if damping > least]
    assert values == sorted(values, reverse=True) and len(values) > 1 and values[-2] > 0.8
    assert (values[-1] > 0.8 and len(values) == len(scan.asked) - 1) if least else values[-1] <= 0.8
    assert best.value == pytest.approx(values[-1] * scan.step.before) and scan.step.num_dampings == len(scan.asked)
    assert best.damping == scan.asked[len(values) - 1]
    assert scan.state["damping"] == pytest.approx(best.damping / best.length**2)


def test_damping_where_nothing_is_found():
    """λ rises for the next step where no solution is lower; it falls where the model promises nothing."""
    uphill = Scan(solve=lambda g, damping: Solution(-g * math.inf))
    assert uphill.search(2.0).value == math.inf and uphill.state["damping"] == 200.0
    short = Scan(solve=lambda g, damping: Solution(1e-20 * g))
    assert short.search(2.0).value >= short.step.before and short.asked == [2.0] and short.state["damping"] == 0.02


def test_a_step_bends():
    """θ + a x + a² y is tried beside θ + a x."""
    scan = Scan(solve=lambda g, damping: Solution(-g / damping, -3 * g / damping))
    best, objective, x = scan.search(30.0), scan.step.objective, -scan.gradient / 30
    values = {a: objective((objective.theta + a * x + a**2 * 3 * x)[None]).item() for a in LENGTHS}
    assert best.value == pytest.approx(min(values.values()), rel=1e-14) and values[best.length] == best.value
    assert best.value < float(scan.values(30.0).min())


# ------------------------------------------------------------------------------------------------ the exact Hessian


@pytest.mark.parametrize(
    "loss, decay, earlier, count, exact",
    (
        ("cross_entropy", 0.05, 1.01, 5, True),
        ("cross_entropy", 0.05, 1.5, 5, False),
        ("cross_entropy", 0.05, 1.01, 4, False),
        ("cross_entropy", 0.0, 1.01, 5, False),
        ("mse", 0.0, 1.01, 5, True),
    ),
)
def test_the_exact_hessian_takes_over(loss, decay, earlier, count, exact):
    """Where f fell by less than 2 % in five steps, and may have a minimum with a residual."""
    model, x, y = Case((6, 5), 20, loss=loss, inputs=4).build()
    optimizer = DampedNewton(model, weight_decay=decay)
    for _ in range(8):
        optimizer.step(closure_of(model, x, y))
    step = step_of(optimizer, closure_of(model, x, y))
    step.state["objectives"] = [earlier * step.before] * count
    step.run()
    assert step.report.method == "gauss_newton" and step.report.accepted and step.state["exact"] == exact


class Dense(NamedTuple):
    """In the place of a factorization."""

    A: Tensor

    def _direct(self, v: Tensor) -> Tensor:
        return torch.linalg.solve(self.A, v)


class Function:
    """f by autograd, its exact rounds, and the λ at which H was asked for."""

    def __init__(self, f: Callable[[Tensor], Tensor], theta: Tensor):
        self.f, self.asked, self.theta = f, list[float](), theta
        self.start = Point(theta, float(f(theta)), self.gradient(theta))
        self.H = torch.func.hessian(f)(theta)

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.stack([self.f(row) for row in theta])

    def gradient(self, theta: Tensor) -> Tensor:
        return torch.func.grad(self.f)(theta)

    def factorized(self, damping: float) -> Dense | None:
        self.asked.append(damping)
        A = self.H + damping * eye(len(self.H))
        return Dense(A) if torch.linalg.eigvalsh(A)[0] > 0 else None

    def round(self, damping: float, **options) -> Round:
        return exact_round(self, self.start, self.factorized, damping, gtol=0.0, **options)


def waves(theta: Tensor) -> Tensor:
    """Indefinite where an entry is beyond ±π/2."""
    return -theta.cos().sum() + 0.1 * (theta[0] - theta[1]) ** 2 + 1e-3 * theta.square().sum()


def test_a_round_raises_damping_until_it_is_definite():
    """One step with the least such λ is the best of three lengths. More steps get lower."""
    function = Function(waves, torch.tensor([2.0, 0.5, -2.5], dtype=torch.float64))
    found = function.round(1e-4, max_steps=1)
    lowest = float(torch.linalg.eigvalsh(function.H)[0])
    assert function.asked == pytest.approx([1e-4 * 10**i for i in range(len(function.asked))])
    assert function.asked[-2] < -lowest < function.asked[-1] == found.damping == 10 * found.next_damping
    assert found.num_dampings == len(function.asked)
    x = -torch.linalg.solve(function.H + found.damping * eye(3), function.start.gradient)
    assert found.point.value == min(waves(function.theta + a * x) for a in (0.1, 0.3, 1.0))
    more = function.round(1e-4)
    assert more.point.value < found.point.value - 0.01 and more.point.gradient_norm < 1e-6


def test_a_round_raises_damping_until_the_objective_falls():
    """A Newton step for √(1 + θ²) goes from 100 to −10⁶. A λ below 1e-10 stands for 0."""
    function = Function(lambda t: (1 + t * t).sqrt().sum(), torch.tensor([100.0], dtype=torch.float64))
    found = function.round(1e-12)
    assert function.asked == pytest.approx([0.0, *(10.0**i for i in range(-10, -3 + 1))]) and found.damping == 1e-3
    assert found.point.value < 1.1


def test_a_decrease_that_rounding_hides_is_judged_by_the_gradient():
    A = torch.diag(torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64))
    hidden = Function(lambda t: 1 + 0.5 * t @ A @ t, 1e-9 * torch.ones(3, dtype=torch.float64))
    found = hidden.round(1.0)
    assert hidden.asked == [1.0, 0.0] and found.damping == 0.0
    assert found.point.gradient_norm < 1e-12 * hidden.start.gradient_norm
    # where H alone is not definite
    hidden.H = A - 2 * eye(3)
    assert hidden.round(3.0).point is hidden.start and hidden.asked[2:] == [3.0, 0.0]
    # too long a step: λ rises until ‖g‖ falls, as long as the model promises half of it
    hidden.H, rising = 0.4 * A, [3.0, 0.0, *(10.0**i for i in range(-10, 2))]
    found = hidden.round(3.0)
    assert hidden.asked[4:] == pytest.approx(rising) and found.damping == pytest.approx(10.0)
    assert found.point.gradient_norm < 0.5 * hidden.start.gradient_norm
    hidden.H = 1e-3 * A
    assert hidden.round(3.0).point is hidden.start and hidden.asked[4 + len(rising) :] == pytest.approx(rising[:-2])


def test_no_round_where_nothing_is_lower():
    function = Function(lambda t: 1 + t.sum() - t.sum().detach(), torch.ones(2, dtype=torch.float64))
    found = function.round(1.0)
    assert found.point is function.start and found.num_dampings == len(function.asked)


def test_quasi_newton_steps_are_those_of_bfgs():
    """B⁻¹v after the updates B ← B − B s sᵀB / sᵀB s + y yᵀ / sᵀy: here dense."""
    B, P = eye(9) + random_vector(9, 9) @ random_vector(9, 9).T, 9
    start, secants = B, []
    for s, v in zip(random_vector(P, 3).T, random_vector(P, 3, seed=8).T, strict=True):
        y = B @ s + (0.1 * v @ s) * v
        secants.append(Secant(s, y, float(s @ y)))
    for s, y, sy in secants:
        B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / sy
    v = random_vector(P)
    found = inverse_bfgs_product(lambda v: torch.linalg.solve(start, v), secants, v)
    assert relative(found - torch.linalg.solve(B, v), v) < 1e-12


def test_quasi_newton_steps_learn_from_the_steps_that_were_taken(monkeypatch):
    """A secant is a step and the gradient's change along it. Steps of negative curvature are left out."""
    function, seen = Function(waves, torch.tensor([2.5, 2.4, -2.5], dtype=torch.float64)), []
    gradient, points = function.gradient, [(function.theta, function.start.gradient)]
    function.gradient = lambda theta: points.append((theta, gradient(theta))) or points[-1][1]
    monkeypatch.setattr(
        quasi_newton,
        "inverse_bfgs_product",
        lambda inverse, secants, v: (seen.clear(), seen.extend(secants), inverse_bfgs_product(inverse, secants, v))[2],
    )
    end = quasi_newton_steps(function, lambda v: 0.1 * v, function.start, 1e-6, 30, by_gradient=False)
    assert end.gradient_norm <= 1e-6 and 4 < len(points) < 30 and torch.equal(end.theta, points[-1][0])
    pairs = zip(points, points[1:-1], strict=False)
    changes = [(b - a, h - g) for (a, g), (b, h) in pairs]  # the last step is learned by none
    positive = [(s, y) for s, y in changes if s @ y > 0]
    assert 0 < len(positive) == len(seen) < len(changes)
    for (s, y), secant in zip(positive, seen, strict=True):
        assert torch.equal(s, secant.s) and torch.equal(y, secant.y) and secant.sy == float(s @ y)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_other_data_begin_anew(dtype):
    """The last step, and the progress before, count on the data that they belong to."""
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    model, x = model.to(dtype), x.to(dtype)
    optimizer = DampedNewton(model, curvature_batch=8)
    for _ in range(3):
        optimizer.step(closure_of(model, x, y))
    before = state_of(optimizer)["last"].double()
    same = step_of(optimizer, closure_of(model, x, y))
    assert same.same_data and torch.equal(same._last_step(), before)
    other = step_of(optimizer, closure_of(model, x.flip(1), y))
    assert not other.same_data and other._last_step() is None
    state_of(optimizer).update(exact=True, objectives=[1.0, 1.0])
    optimizer.step(closure_of(model, x.flip(1), y))
    state = state_of(optimizer)
    assert not state["exact"] and state["objectives"] == [optimizer.report.objective]

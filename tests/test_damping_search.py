"""The search over dampings and lengths, with −g/λ as the solutions, against scans of the objective."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from _hessian.damping_search import DampingFactors, Search, Trial
from torch import Tensor

from _hessian.newton_problem import Solution
from newton import DampedNewton
from tests.newton_oracles import closure_of, problem_of
from tests.oracles import Case, random_vector

FACTORS = DampingFactors(shortened=5.0, kept=0.5, lowered=0.25)


class Descent:
    """A search at a small network, its solutions −g/λ, and the λ that were asked for."""

    def __init__(self):
        model, x, y = Case((6, 5), 14, inputs=4).build()
        closure_of(model, x, y)()
        self.problem = problem_of(DampedNewton(model))
        self.search, self.asked = Search(self.problem), []

    def solve(self, dampings: Sequence[float]) -> list[Solution]:
        self.asked += dampings
        return [Solution(damping, -self.problem.gradient / damping) for damping in dampings]

    def objective(self, step: Tensor) -> float:
        return self.problem.objective((self.problem.theta + step)[None]).item()

    def lowest(self, damping: float) -> float:
        """f after the best length of the solution at λ."""
        (solution,) = Descent.solve(self, [damping])
        return min(self.objective(a * solution.x) for a in self.search.settings.lengths)


@pytest.mark.parametrize("start", (1e-4, 1.0, 1e4))
def test_a_bracket_ends_at_the_best_damping(start):
    descent = Descent()
    found = descent.search.bracket(descent.solve, start)
    grid, factor = descent.asked.copy(), descent.search.settings.damping_factor
    assert descent.search.num_dampings == len(grid) and descent.search.largest_damping == max(grid)
    exponents = range(-6, 7)
    best = min((descent.lowest(factor**i), i) for i in exponents)
    assert found.next_damping == found.best.damping == pytest.approx(factor ** best[1], rel=1e-9)
    assert found.best.value == pytest.approx(best[0], rel=1e-9)


def test_damping_is_raised_until_the_objective_falls():
    descent, start = Descent(), 1e-6
    found = descent.search.raise_until_lower(descent.solve, start, FACTORS)
    asked = descent.asked.copy()
    steps = [10.0, 10.0, 10.0] + [100.0] * 8
    assert asked == pytest.approx([start * torch.tensor(steps[:i]).prod().item() for i in range(len(asked))])
    lower = [descent.lowest(damping) < descent.search.before for damping in asked]
    assert lower == [False] * (len(asked) - 1) + [True] and len(asked) > 2
    factor = FACTORS.shortened if found.best.length < 1 else FACTORS.kept
    assert found.next_damping == pytest.approx(factor * asked[-1])


@pytest.mark.parametrize("may_fall", (True, False))
def test_damping_falls_where_the_first_one_did_well(may_fall):
    descent = Descent()
    found = descent.search.raise_until_lower(descent.solve, 10.0, FACTORS, lambda best: may_fall)
    assert descent.asked == [10.0] and found.best.length >= 1
    assert found.next_damping == 10.0 * (FACTORS.lowered if may_fall else FACTORS.kept)


def test_no_larger_damping_is_tried_where_the_model_promises_nothing():
    descent = Descent()
    uphill = 1e-20 * descent.problem.gradient
    found = descent.search.raise_until_lower(lambda dampings: [Solution(dampings[0], uphill)], 1.0, FACTORS)
    assert descent.search.promised_nothing and descent.search.num_dampings == 1 and found.next_damping is None


def test_a_step_is_extended_by_the_best_direction():
    descent = Descent()
    step = -0.01 * descent.problem.gradient
    best = Trial(descent.objective(step), step, 1.0, 1.0)
    directions = [step, 3 * step, 0.1 * random_vector(len(step))]
    found = descent.search.add_direction(best, directions)
    assert found.value == pytest.approx(min(descent.objective(step + c * d) for c in (1.0, 3.0) for d in directions))
    assert descent.search.add_direction(best, [-step]) == best  # back to the start, and beyond


def test_a_step_is_doubled_while_the_objective_falls_by_a_tenth():
    descent = Descent()
    step, longest = -0.1 * descent.problem.gradient, max(descent.search.settings.lengths)
    best = Trial(descent.objective(step), step, 1.0, longest)
    found, doublings = descent.search.double_while_lower(best), 0
    while descent.objective(2 ** (doublings + 1) * step) < 0.9 * descent.objective(2**doublings * step):
        doublings += 1
    assert doublings > 1 and found.length == 2**doublings * longest
    assert torch.equal(found.step, 2**doublings * step)
    shorter = best._replace(length=0.5 * longest)
    assert descent.search.double_while_lower(shorter) == shorter

"""The search of one step over dampings λ and step lengths: the lowest objective that was tried wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.newton_options import Options
from _hessian.newton_problem import Solution, Solve, StepProblem
from _hessian.trial_losses import Steps

LARGEST_DAMPING = 1e16  # a larger λ is not tried
ROUNDING = 1e-13  # relative to f: differences below it decide nothing
_MAX_ROUNDS = 12  # of trials, in one search


class Trial(NamedTuple):
    """A step that was tried."""

    value: float  # f after it
    step: Tensor  # (P,)
    damping: float  # λ
    length: float  # a


class SearchResult(NamedTuple):
    """The result of a search over λ."""

    best: Trial | None  # None where no λ gave a solution
    next_damping: float | None  # λ for the next step; None where f did not fall


class SearchSettings(NamedTuple):
    damping_factor: float  # between neighbouring λ of a bracket
    lengths: tuple[float, ...]  # a
    momentum_threshold: float  # earlier steps are added to one that lowers f by less than this fraction of it


class DampingFactors(NamedTuple):
    """From the λ of an accepted step to the first λ of the next one."""

    shortened: float = 1.0  # where the best length was below 1
    kept: float = 0.1  # where λ had to be raised, or may not fall far
    lowered: float = 0.01  # where the first λ did well


# measured on the problems of `benchmark.py training`
_SETTINGS = {
    "state": SearchSettings(10.0, (0.5, 1.0, 1.5, 2.0, 3.0), 0.05),
    "parameter": SearchSettings(3.0, (0.7, 1.0, 1.4), 1.0),
    "sub_batch": SearchSettings(10.0, (1.0, 2.0), 0.2),  # few lengths: trials are on all samples, and cost the most
    "conjugate_gradients": SearchSettings(10.0, (0.5, 1.0, 2.0), 0.0),
}


def search_settings(options: Options, batch_size: int) -> SearchSettings:
    if options.uses_conjugate_gradients(batch_size):
        return _SETTINGS["conjugate_gradients"]
    return _SETTINGS[options.metric if options.uses_all_samples(batch_size) else "sub_batch"]


class Search:
    """The trials of one step, and what they found."""

    def __init__(self, problem: StepProblem):
        self.problem = problem
        self.settings = search_settings(problem.options, len(problem.objective.targets))
        self.num_dampings = 0  # tried
        self.largest_damping = 0.0  # tried
        self.promised_nothing = False  # at the last λ, which was too large
        self._before: float | None = None

    @property
    def before(self) -> float:
        """f without a step."""
        if self._before is None:
            self._before = float(self.problem.objective(self.problem.theta[None]))
        return self._before

    def within_limits(self, damping: float) -> float:
        return min(max(damping, self.problem.smallest_damping), LARGEST_DAMPING)

    def predicted_decrease(self, solution: Solution) -> float:
        """By how much x lowers f, according to the damped quadratic model."""
        return -0.5 * float(self.problem.gradient @ solution.x)

    def best_of(self, steps: Steps, dampings: Sequence[float], lengths: Sequence[float]) -> Trial:
        """The step with the lowest f, each with its λ and length. NaN counts as infinite."""
        if self._before is None:  # f itself in the same pass, so that rounding is the same
            values = self.problem.objective.after(Steps([((0.0, self.problem.theta),), *steps.terms]))
            self._before, values = float(values[0]), values[1:]
        else:
            values = self.problem.objective.after(steps)
        value, index = torch.where(values.isfinite(), values, math.inf).min(0)
        return Trial(float(value), steps[int(index)], dampings[int(index)], lengths[int(index)])

    def best_solution(self, solutions: Sequence[Solution]) -> Trial:
        """The best of all solutions and lengths."""
        terms: list[tuple[tuple[float, Tensor], ...]] = []
        dampings: list[float] = []
        for damping, x, y in solutions:
            terms += [((a, x),) for a in self.settings.lengths]
            if y is not None:
                terms += [((a, x), (a**2, y)) for a in self.settings.lengths]
            dampings += [damping] * (len(terms) - len(dampings))
        lengths = self.settings.lengths * (len(terms) // len(self.settings.lengths))
        return self.best_of(Steps(terms), dampings, lengths)

    # -------------------------------------------------------------------------------------------- search over λ

    def bracket(self, solve: Solve, start: float) -> SearchResult:
        """Try three λ around `start`, then more beyond, as long as the best one is the outermost."""
        problem, factor = self.problem, self.settings.damping_factor
        start = max(start, problem.smallest_damping)
        tried: list[float] = []
        best: Trial | None = None
        wanted = [start * factor, start, start / factor]
        for _ in range(_MAX_ROUNDS):
            tried += wanted
            if solutions := solve(wanted):
                found = self.best_solution(solutions)
                best = found if best is None or found.value < best.value else best
            if best is None or not best.value < self.before or best.damping == max(tried):
                wanted = [factor * max(tried)]
            elif best.damping == min(tried):
                wanted = [min(tried) / factor]
            else:
                break
            if not problem.smallest_damping < wanted[0] < LARGEST_DAMPING:
                break
        self.num_dampings, self.largest_damping = len(tried), max(tried)
        return SearchResult(best, best.damping if best is not None and best.value < self.before else None)

    def raise_until_lower(
        self,
        solve: Solve,
        start: float,
        factors: DampingFactors,
        may_fall: Callable[[Trial], bool] = lambda best: True,
    ) -> SearchResult:
        """Try one λ at a time, for solutions that are expensive. It is raised until f falls.

        may_fall: whether the next λ may be the lowered one, where the first λ did well.
        """
        smallest = self.problem.smallest_damping
        damping = max(start, smallest)
        best: Trial | None = None
        for trial in range(_MAX_ROUNDS):
            self.num_dampings, self.largest_damping = trial + 1, damping
            if solutions := solve([damping]):
                best = self.best_solution(solutions)
                if best.value < self.before:
                    at_once = trial == 0 and may_fall(best)
                    factor = factors.shortened if best.length < 1 else factors.lowered if at_once else factors.kept
                    return SearchResult(best, max(factor * damping, smallest))
                if not self.predicted_decrease(solutions[0]) > ROUNDING * abs(self.before):
                    self.promised_nothing = True  # and a larger λ promises less
                    break
            damping *= 10 if trial < 3 else 100
            if damping > LARGEST_DAMPING:
                break
        return SearchResult(best, None)

    # ------------------------------------------------------------------------------------ beyond the best solution

    def add_direction(self, best: Trial, directions: Sequence[Tensor]) -> Trial:
        """The best step, or its sum with a multiple of a direction (P,)."""
        rows = Steps([((1.0, best.step), (c, d)) for c in (1.0, 3.0) for d in directions])
        found = self.best_of(rows, [best.damping] * len(rows), [best.length] * len(rows))
        return found if found.value < best.value else best

    def double_while_lower(self, best: Trial) -> Trial:
        """Double the best step as long as f falls by 10 %, if the longest one tried was the best."""
        if not best.value < self.before or best.length < max(self.settings.lengths):
            return best
        for _ in range(_MAX_ROUNDS):
            found = self.best_of(Steps([((2.0, best.step),)]), [best.damping], [2.0 * best.length])
            if not found.value < 0.9 * best.value:
                break
            best = found
        return best

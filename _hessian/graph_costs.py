"""What the elimination on a graph costs, counted from the sizes of its operations; where to keep checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from _hessian.costs import RouteCost, factor_operations, update_operations, whiten_operations
from _hessian.graph import Value
from _hessian.program import GraphProgram
from _hessian.settings import Settings


class StepCost(NamedTuple):
    """Of one operation and the parameters eliminated after it. Operations to leading order; sizes in numbers."""

    operations: float
    solve_operations: float  # of a direct solve, a column
    kept: float  # in its pivots
    above: float  # the state before it
    peak: float  # the state, the pivots and temporaries, at the most


def step_costs(program: GraphProgram) -> list[StepCost]:
    """Last operation first."""
    live, found = {program.output}, []
    for operation, parameters in zip(reversed(program.operations), reversed(program.eliminated), strict=True):
        o, above = operation.output.size, _state_numbers(live)
        live.discard(operation.output)
        n = sum(value.size for value in live)
        live |= set(operation.inputs)
        inputs = sum(value.size for value in operation.inputs)
        operations, solve = 2 * operation.pull_back_cost * (n + o + inputs), 4 * operation.pull_back_cost
        kept, peak = 0.0, above + _state_numbers(live) + o * max(inputs, o)
        for value in parameters:
            live.discard(value)
            m, n = value.size, sum(value.size for value in live)
            operations += factor_operations(m) + whiten_operations(m, n) + update_operations(m, n)
            solve += 4 * m * (m + n)
            kept += m * m + m * n
            peak = max(peak, kept + _state_numbers(live) + m * n)
        found.append(StepCost(operations, solve, kept, above, peak))
    return found


def _state_numbers(live: set[Value]) -> float:
    """In the blocks of the state: of two values one block."""
    sizes = [value.size for value in live]
    return (sum(sizes) ** 2 + sum(size**2 for size in sizes)) / 2


def checkpoint_starts(program: GraphProgram) -> list[int]:
    """The operations above which a state is kept, last one first: those that take the least memory."""
    steps = step_costs(program)
    limit, total, plans = max(step.kept for step in steps), sum(step.kept for step in steps), []
    while True:
        plans.append(_plan(steps, limit))
        if limit >= total:
            break
        limit *= 1.5
    _, starts = min(plans)
    return [len(steps) - 1 - i for i in starts]


def _plan(steps: Sequence[StepCost], limit: float) -> tuple[float, list[int]]:
    """Where to begin segments whose pivots have at most `limit` numbers each, and all numbers kept then."""
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # from the end back: the states kept, and where
    for i in reversed(range(len(steps))):
        kept, rest = 0.0, []
        for j, step in enumerate(steps[i:]):
            kept += step.kept
            if kept > limit and j:
                break
            rest.append(best[-1 - j])
        states, starts = min(rest)
        best.append((steps[i].above + states, [i, *starts]))
    states, starts = best[-1]
    return states + max(_segments(steps, starts)), starts


def _segments(steps: Sequence[StepCost], starts: Sequence[int]) -> list[float]:
    """The numbers in each segment's pivots."""
    return [sum(x.kept for x in steps[i:j]) for i, j in zip(starts, [*starts[1:], len(steps)], strict=True)]


def sweep_cost(program: GraphProgram, settings: Settings) -> RouteCost:
    steps = step_costs(program)
    operations, kept = sum(x.operations for x in steps), sum(x.kept for x in steps)
    solve = sum(x.solve_operations for x in steps)
    if settings.keep != "solve":
        kept = 0.0
    elif settings.checkpoint_layers:
        starts = [len(steps) - 1 - i for i in checkpoint_starts(program)]
        kept = sum(steps[i].above for i in starts) + max(_segments(steps, starts))
        solve += 2 * operations
    derivatives = sum(x.numbers for x in program.operations)
    in_factor = 4 if settings.precision == "mixed" else 8
    rounded = in_factor * derivatives if settings.precision == "mixed" else 0.0
    numbers = kept + max(x.peak for x in steps)
    return RouteCost(operations, solve, 8 * derivatives + rounded + in_factor * numbers)

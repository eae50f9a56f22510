"""Less memory for a sweep: some costs-to-go are kept in place of the pivots, and arrays are used again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from _hessian.state import State

P = TypeVar("P")


class Memory:
    """Memory that is used again in every layer, since the C library's allocator would leave holes that nothing fits.

    It serves one temporary at a time, and the last `alive` pivots; None: each pivot gets memory of its own.
    """

    def __init__(self, alive: int | None = None):
        self._alive = alive
        self._slots: dict[tuple, Tensor] = {}

    def temporary(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialized tensor that is valid until the next call."""
        return self._slot((), like, shape)

    def pivot(self, name: str, index: int, like: Tensor, *shape: int) -> Tensor:
        """An uninitialized tensor for layer `index`, valid until it is asked for `alive` layers further down."""
        return like.new_empty(shape) if self._alive is None else self._slot((name, index % self._alive), like, shape)

    def _slot(self, key: tuple, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if key not in self._slots or self._slots[key].numel() < size:
            self._slots.pop(key, None)  # freed before the larger one is made
            self._slots[key] = like.new_empty(size)
        return self._slots[key][:size].view(shape)


# (index, state above, memory) → pivot, its counts, the state below, each time with the same bits
Eliminate = Callable[[int, State, Memory], tuple[P, object, State]]


def even_starts(num_layers: int) -> range:
    """The highest layers of segments of √L layers, last one first."""
    return range(num_layers - 1, -1, -(math.isqrt(num_layers - 1) + 1))


class Checkpoints:
    """Some of the states of an elimination. A solve recomputes the pivots from these, once on its way down and once up.

    starts: the highest index of each segment, last layer first. A state is kept at each.
    """

    def __init__(self, starts: Sequence[int]):
        self._stops = dict(zip(starts, [*starts[1:], -1], strict=True))
        self._states: dict[int, State] = {}

    def keep(self, index: int, above: State) -> None:
        """What layer `index` is eliminated from, if that begins a segment."""
        if index in self._stops:
            self._states[index] = above.copied()

    def downward(self, eliminate: Eliminate[P]) -> Iterator[P]:
        """The pivots, last layer first."""
        memory = Memory(1)
        for start in self._stops:
            yield from self._segment(eliminate, start, memory)

    def upward(self, eliminate: Eliminate[P]) -> Iterator[P]:
        """The pivots, first layer first."""
        memory = Memory(max(start - stop for start, stop in self._stops.items()))
        for start in reversed(self._stops):
            yield from reversed(list(self._segment(eliminate, start, memory)))

    def _segment(self, eliminate: Eliminate[P], start: int, memory: Memory) -> Iterator[P]:
        above = self._states[start].copied()
        for index in range(start, self._stops[start], -1):
            pivot, _, above = eliminate(index, above, memory)
            yield pivot
            del pivot

"""Less memory for a sweep: some costs-to-go are kept in place of the pivots, and arrays are used again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

P = TypeVar("P")
S = TypeVar("S", bound="State")


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


def even_starts(num_layers: int) -> range:
    """The highest layers of segments of √L layers, last one first."""
    return range(num_layers - 1, -1, -(math.isqrt(num_layers - 1) + 1))


class State(Protocol):
    """What an elimination goes on from. It may change it in place."""

    def copied(self) -> Self: ...


class Checkpoints(Generic[P, S]):
    """Some of the states of an elimination. A solve recomputes the pivots from these, once on its way down and once up.

    eliminate: (index, state above, memory) → pivot, its counts, the state below, each time with the same bits.
    starts: the highest index of each segment, last layer first. A state is kept at each.
    """

    def __init__(self, eliminate: Callable[[int, S | None, Memory], tuple[P, object, S]], starts: Sequence[int]):
        self._eliminate = eliminate
        self._stops = dict(zip(starts, [*starts[1:], -1], strict=True))
        self._states: dict[int, S | None] = {}

    def keep(self, index: int, above: S | None) -> None:
        """What layer `index` is eliminated from, if that begins a segment."""
        if index in self._stops:
            self._states[index] = None if above is None else above.copied()

    def downward(self) -> Iterator[P]:
        """The pivots, last layer first."""
        memory = Memory(1)
        for start in self._stops:
            yield from self._segment(start, memory)

    def upward(self) -> Iterator[P]:
        """The pivots, first layer first."""
        memory = Memory(max(start - stop for start, stop in self._stops.items()))
        for start in reversed(self._stops):
            yield from reversed(list(self._segment(start, memory)))

    def _segment(self, start: int, memory: Memory) -> Iterator[P]:
        kept = self._states[start]
        above = None if kept is None else kept.copied()
        for index in range(start, self._stops[start], -1):
            pivot, _, above = self._eliminate(index, above, memory)
            yield pivot
            del pivot

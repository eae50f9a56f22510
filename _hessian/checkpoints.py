"""Less memory for a sweep: every √L-th cost-to-go is kept in place of the pivots, and arrays are used again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from _hessian.pivots import CostToGo, Pivot


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


class Checkpoints:
    """Every √L-th cost-to-go. A solve recomputes the pivots from these, once on its way down and once up.

    eliminate: (index, above, memory) → pivot, its counts, the cost-to-go below, each time with the same bits.
    """

    def __init__(self, eliminate: Callable, num_layers: int):
        self._eliminate, self._last = eliminate, num_layers - 1
        self._length = math.isqrt(num_layers - 1) + 1  # of a segment
        self.segments: dict[int, CostToGo | None] = {}  # highest layer of each: the cost-to-go above it

    def keep(self, index: int, above: CostToGo | None) -> None:
        """What layer `index` is eliminated from, if that begins a segment."""
        if (self._last - index) % self._length == 0:
            self.segments[index] = _copied(above)

    def downward(self) -> Iterator[Pivot]:
        """The pivots, last layer first."""
        memory = Memory(1)
        for top in self.segments:
            yield from self._segment(top, memory)

    def upward(self) -> Iterator[Pivot]:
        """The pivots, first layer first."""
        memory = Memory(self._length)
        for top in reversed(self.segments):
            yield from reversed(list(self._segment(top, memory)))

    def _segment(self, top: int, memory: Memory) -> Iterator[Pivot]:
        above = _copied(self.segments[top])
        for index in range(top, max(top - self._length, -1), -1):
            pivot, _, above = self._eliminate(index, above, memory)
            yield pivot
            del pivot


def _copied(above: CostToGo | None) -> CostToGo | None:
    return None if above is None else above._replace(P=above.P.clone())

"""The state of an elimination: the cost-to-go P, a quadratic in all live values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from _hessian.graph import Value


class State:
    """P by blocks of two live values. A block of zeros may be absent. like: a tensor of P's dtype and device."""

    def __init__(self, like: Tensor, live: Sequence[Value] = ()) -> None:
        self.like, self.live = like, list(live)
        self.carried: list[Value] = []  # those live values that the next pivot takes
        self.definite = True  # every pivot so far was
        self._blocks: dict[tuple[Value, Value], Tensor] = {}  # one of (u, v) and (v, u)

    def copied(self) -> State:
        twin = State(self.like, self.live)
        twin.carried, twin.definite = list(self.carried), self.definite
        twin._blocks = {key: block.clone() for key, block in self._blocks.items()}
        return twin

    def enter(self, value: Value) -> None:
        if value not in self.live:
            self.live.append(value)

    def carry(self, value: Value, P: Tensor) -> None:
        """A value with its own block enters, for the next pivot."""
        self.enter(value)
        self.carried.append(value)
        self.add(value, value, P)

    def get(self, u: Value, v: Value) -> Tensor | None:
        """(n_u, n_v)"""
        if (u, v) in self._blocks:
            return self._blocks[u, v]
        return self._blocks[v, u].mT if (v, u) in self._blocks else None

    def block(self, u: Value, v: Value) -> Tensor:
        """(n_u, n_v), made if it is absent."""
        if (found := self.get(u, v)) is not None:
            return found
        return self._blocks.setdefault((u, v), self.like.new_zeros(u.size, v.size))

    def add(self, u: Value, v: Value, part: Tensor) -> None:
        """part (n_u, n_v), which may be kept."""
        if (found := self.get(u, v)) is not None:
            found.add_(part)
        else:
            self._blocks[u, v] = part

    def add_both(self, u: Value, v: Value, part: Tensor) -> None:
        """part (n_u, n_v) as the quadratic 2 t_uᵀ part t_v."""
        self.add(u, v, part + part.mT if u == v else part)

    def take(self, *values: Value) -> tuple[Tensor | None, dict[Value, Tensor]]:
        """Values leave: their own block (m, m), and those (m, n_u) of the others."""
        self.live = [u for u in self.live if u not in values]
        own = self.get(values[0], values[0]) if len(values) == 1 else self._square(values)
        found = {u: rows for u in self.live if (rows := self._rows(values, u)) is not None}
        self._blocks = {(u, v): x for (u, v), x in self._blocks.items() if u not in values and v not in values}
        return own, found

    def _square(self, values: Sequence[Value]) -> Tensor:
        sizes = [value.size for value in values]
        whole = self.like.new_zeros(sum(sizes), sum(sizes))
        for u, rows in zip(values, whole.split(sizes), strict=True):
            for v, part in zip(values, rows.split(sizes, 1), strict=True):
                if (block := self.get(u, v)) is not None:
                    part.copy_(block)
        return whole

    def _rows(self, values: Sequence[Value], u: Value) -> Tensor | None:
        """(m, n_u) of the values together."""
        found = [self.get(value, u) for value in values]
        if len(found) == 1 or all(x is None for x in found):
            return found[0]
        parts = zip(values, found, strict=True)
        return torch.cat([self.like.new_zeros(v.size, u.size) if x is None else x for v, x in parts])

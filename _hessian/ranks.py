"""The samples of one step, spread over the processes of a group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Function = Callable[[Tensor], Tensor]
_END = -1  # no function


class Ranks:
    """Each rank has a share of the samples. The first one leads: it takes every decision of a step.

    The others answer its calls of functions that are means over samples. So what is decided is the same on all ranks,
    bit for bit, on any hardware. group: None for one process, where nothing is sent.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, num_samples: int = 0, device: torch.device | None = None
    ):
        self.group, self.device, self.rank, self.sizes = group, device, 0, [num_samples]
        if group is not None:
            self.rank = dist.get_rank(group)
            counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
            dist.all_gather(counts, torch.tensor([num_samples], device=device), group)
            self.sizes = torch.cat(counts).tolist()
        self.num_samples = sum(self.sizes)
        self._starts = [0, *accumulate(self.sizes)]
        self._functions: list[Function] = []

    @property
    def _first(self) -> int:
        """Its global rank."""
        assert self.group is not None
        return dist.get_global_rank(self.group, 0)

    @property
    def own(self) -> slice:
        """This rank's samples among all."""
        return slice(self._starts[self.rank], self._starts[self.rank + 1])

    def split(self, chosen: Tensor) -> list[Tensor]:
        """Sorted indices among all samples, as those of each rank among its own."""
        pairs = zip(self._starts, self._starts[1:], strict=False)
        return [chosen[(chosen >= begin) & (chosen < end)] - begin for begin, end in pairs]

    def broadcast(self, x: Tensor) -> Tensor:
        """x of the first rank, in place."""
        if self.group is not None:
            dist.broadcast(x.detach(), self._first, self.group)
        return x

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """On the first rank the rows (n, …) of all ranks, n as in `sizes`; x elsewhere."""
        if self.group is None:
            return x
        padded = x.new_zeros(max(sizes), *x.shape[1:])  # the parts must have one shape
        padded[: len(x)] = x
        parts = None if self.rank else [torch.empty_like(padded) for _ in sizes]
        dist.gather(padded, parts, self._first, self.group)
        return x if parts is None else torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    def mean(self, x: Tensor) -> Tensor:
        """On the first rank the mean over all samples of x, a mean over each rank's own."""
        if self.group is None:
            return x
        n = self.sizes[self.rank]
        x = x * (n / self.num_samples) if n else torch.zeros_like(x)  # the mean over no samples is NaN
        dist.reduce(x, self._first, group=self.group)
        return x

    def shared(self, function: Function) -> Function:
        """`mean` of a function of θ (k, P) or v (P,), for the first rank to call in `lead`.

        Every rank must share the same functions in the same order.
        """
        if self.group is None:
            return function
        self._functions.append(function)
        index = len(self._functions) - 1

        def call(v: Tensor) -> Tensor:
            self._announce(index, v.dtype == torch.float64, v.dim() - 1, v.numel() // v.shape[-1], v.shape[-1])
            return self.mean(function(self.broadcast(v.contiguous())))

        return call

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which does it. The others answer its calls meanwhile."""
        if self.group is None:
            return work()
        found: list[Any] = [None]
        if self.rank:
            self._serve()
        else:
            found = [work()]
            self._announce(_END, 0, 0, 0, 0)
        dist.broadcast_object_list(found, self._first, self.group, self.device)
        return found[0]

    def _announce(self, *numbers: int) -> list[int]:
        return self.broadcast(torch.tensor(numbers, device=self.device)).tolist()

    def _serve(self) -> None:
        while (header := self._announce(_END, 0, 0, 0, 0))[0] != _END:
            index, in_float64, rows_given, k, P = header
            dtype = torch.float64 if in_float64 else torch.float32
            v = torch.empty((k, P) if rows_given else (P,), dtype=dtype, device=self.device)
            self.mean(self._functions[index](self.broadcast(v)))

"""The processes of a run, the ranks of torchrun, and the signals that end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from imagenet.messages import RunError, say

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
MAY_DIFFER = {"data_dir", "num_workers", "memory_gib"}  # flags that each rank may have of its own


class World(NamedTuple):
    """All ranks, as one of them sees them: the processes that torchrun started, or a single one."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over the ranks."""
        if self.ranks == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def objects(self, value: T) -> list[T]:
        """The value of every rank."""
        if self.ranks == 1:
            return [value]
        values = [value] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank. What it raises is raised on every rank."""
        if self.ranks == 1:
            return make()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except (RunError, OSError) as error:
                made[1] = error
        dist.broadcast_object_list(made, device=self.device)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def say(self, text: str) -> None:
        if self.first:
            say(text)


def check_equal_on_ranks(of_ranks: list[dict[str, Any]], remedy: str) -> None:
    """RunError that names the first difference between a rank and the first one."""
    for rank, values in enumerate(of_ranks):
        for name, value in values.items():
            if value != of_ranks[0].get(name):
                raise RunError(f"{name} is {value} on rank {rank} and {of_ranks[0].get(name)} on rank 0: {remedy}")


def choose_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:
            raise RunError(
                f"--device cuda: PyTorch sees {count} CUDA devices, and needs {local_rank + 1}: --device cpu"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise RunError("--device mps: PyTorch sees no Apple GPU here: pass --device cpu or --device auto")
    return torch.device(name)


@contextlib.contextmanager
def join_world(device_name: str, flags: dict[str, object]) -> Iterator[World]:
    """The ranks by torchrun's variables, or a single one without them.

    The ranks compare their flags before anything else: with different ones they would wait for each other for ever.
    """
    rank, ranks, local_rank = (
        int(os.environ.get(key, d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = choose_device(device_name, local_rank)
    if ranks > 1:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        mine = {name: str(value) for name, value in flags.items() if name not in MAY_DIFFER} | {"device": device.type}
        store.set(f"flags{rank}", json.dumps(mine))
        of_ranks = [json.loads(store.get(f"flags{other}")) for other in range(ranks)]
        check_equal_on_ranks(of_ranks, "start every rank with the same flags")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    yield World(rank, ranks, device)
    if ranks > 1:  # not after an error on this rank: it would wait for the others
        dist.destroy_process_group()


class Signals:
    """Notes SIGTERM and Ctrl-C for the loop, which ends after its step. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, _frame: object) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""What keeps a long run alive: its processes, the signals that end it, and checkpoints that are always whole."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

DIST_TIMEOUT = timedelta(minutes=30)


class RunError(Exception):
    """The run can't start or go on; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------------- processes


class World(NamedTuple):
    """The processes of torchrun, or the one there is."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Of each value, over the ranks."""
        if self.ranks == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def objects(self, value: object) -> list:
        """The value of every rank."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], object]) -> object:
        """What `make` returns on the first rank."""
        if self.ranks == 1:
            return make()
        values = [make() if self.first else None]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, x: Tensor) -> Tensor:
        """The rows (n, …) of all ranks, whose n may differ, rank after rank."""
        if self.ranks == 1:
            return x
        sizes = [int(n) for n in self.objects(len(x))]
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)


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
def join_world(device_name: str) -> Iterator[World]:
    """By torchrun's variables; alone without them."""
    rank, ranks, local_rank = (
        int(os.environ.get(key, d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = choose_device(device_name, local_rank)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=DIST_TIMEOUT)
    yield World(rank, ranks, device)
    if ranks > 1:  # not where this rank failed: the others would be waited for
        dist.destroy_process_group()


class Signals:
    """SIGTERM and Ctrl-C are noted, for the loop to heed after its step; a second Ctrl-C ends the process at once."""

    def __init__(self):
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


# -------------------------------------------------------------------------------------------------- checkpoints


def random_states() -> dict:
    name, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(tuple(states["numpy"]))
    random.setstate(states["python"])
    if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def write_durably(path: Path, content: bytes | Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """The whole content (or what a function writes), or what was there before, even if the machine dies.

    previous: where what was there is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content) if isinstance(content, bytes) else content(file)
        file.flush()
        os.fsync(file.fileno())
    if previous is not None and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_checkpoint(path: Path) -> dict:
    """The state, and its path; RunError where the file is not whole."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist: name a checkpoint that does") from error
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:  # what torch.load says of it
        raise RunError(f"{path} is not a whole checkpoint ({str(error).splitlines()[0][:100]})") from error
    if not (isinstance(state, dict) and {"config", "model", "step", "progress", "random"} <= state.keys()):
        raise RunError(f"{path} is no checkpoint of train_imagenet.py")
    return state | {"path": str(path)}


def latest_checkpoint(folder: Path) -> dict | None:
    """The last whole one, last.pt or the one before it; the others are named."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return read_checkpoint(path)
            except RunError as error:
                print(f"warning: {error}: it is passed over", file=sys.stderr)
    return None

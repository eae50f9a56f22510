"""The processes of a run, the signals that end it, and its files: whole checkpoints in a folder that one run owns."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pickle
import platform
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
DIST_TIMEOUT = timedelta(minutes=30)
MAY_DIFFER = {"data_dir", "num_workers", "memory_gib"}  # flags that each rank may have of its own
RUN_FILES = (
    *("metrics.csv", "curves.png", "tensorboard", "nan-batch-rank*.json"),
    *("config.json", "best.pt", "previous.pt", "last.pt"),  # last.pt is moved last: until then --resume finds it
)
# what zipfile, torch.load and the readers of a checkpoint raise if it is damaged
DAMAGED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)


class RunError(Exception):
    """The run can't start or go on. The message says why and what to do."""


def one_line(error: BaseException | str) -> str:
    """The text of an error without line breaks, or its class where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str) -> None:
    """Print; bytes of a file's name that are not UTF-8 appear as \\udc…"""
    print(text.encode(errors="backslashreplace").decode(), flush=True)


# ---------------------------------------------------------------------------------------------------- processes


class World(NamedTuple):
    """The ranks: the processes that torchrun started, or a single one."""

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

    def gather(self, x: Tensor) -> Tensor:
        """The rows (n, …) of all ranks in the order of the ranks; n may differ."""
        if self.ranks == 1:
            return x
        sizes = self.objects(len(x))
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

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
        store, *_ = next(dist.rendezvous("env://", timeout=DIST_TIMEOUT))
        mine = {name: str(value) for name, value in flags.items() if name not in MAY_DIFFER} | {"device": device.type}
        store.set(f"flags{rank}", json.dumps(mine))
        of_ranks = [json.loads(store.get(f"flags{other}")) for other in range(ranks)]
        check_equal_on_ranks(of_ranks, "start every rank with the same flags")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=DIST_TIMEOUT)
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


# -------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; RunError if another holds it. The system unlocks it when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        # a worker that outlives a killed run must not keep the lock
        os.register_at_fork(after_in_child=lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunError(
                f"{folder} is in use by process {lock.read().strip() or '(unknown)'}: wait until it ends, or pass "
                "another --checkpoint-dir"
            ) from error
        except OSError as error:
            print(f"warning: {folder} can't be locked ({error}): let no second run write to it", file=sys.stderr)
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def run_files(folder: Path) -> list[Path]:
    return [path for pattern in RUN_FILES for path in folder.glob(pattern)]


def folders_aside(folder: Path) -> Iterator[Path]:
    """DIR.1, DIR.2, …, also for a folder such as '.'"""
    return (Path(f"{folder.resolve()}.{n}") for n in count(1))


def latest_aside(folder: Path) -> Path | None:
    """The last checkpoint among the runs that were moved aside."""
    there = takewhile(Path.exists, folders_aside(folder))
    return max((path for aside in there if (path := aside / "last.pt").exists()), key=os.path.getmtime, default=None)


def move_run_aside(folder: Path) -> None:
    """Move a run's files from the folder to the next free DIR.1, DIR.2, …"""
    if not (files := run_files(folder)):
        return
    aside = next(path for path in folders_aside(folder) if not path.exists())
    aside.mkdir()
    for path in files:
        os.replace(path, aside / path.name)
    say(f"{folder} held a run: it is in {aside} now. (--resume would have gone on with it.)")


# -------------------------------------------------------------------------------------------------- checkpoints


def write_durably(path: Path, content: bytes | Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """Write a file so that after a crash it has either the whole new content or the whole old one.

    content: bytes, or a function that writes them.
    previous: where the old file is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's zip writer hides that the disk is full
            raise error.__context__ from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """Turn the errors of reading a damaged checkpoint into a RunError."""
    try:
        yield
    except DAMAGED as error:
        raise RunError(f"{path} is not a whole checkpoint ({one_line(error)[:200]})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, and its path; RunError if it is not whole."""
    if not path.exists():
        raise RunError(f"{path} does not exist: name a checkpoint that does")
    if not path.is_file():
        raise RunError(f"{path} is not a whole checkpoint (not a regular file)")
    with damage_named(path):
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not (isinstance(state, dict) and {"config", "classes", "model", "step", "progress"} <= state.keys()):
        raise RunError(f"{path} is no checkpoint of train_imagenet.py")
    with damage_named(path):
        check_like(state["classes"], [""], "classes")
        for part in ("config", "model", "step", "progress"):
            if not isinstance(state[part], dict):
                raise ValueError(f"{part} is {describe(state[part])}, expected a dict")
    return state | {"path": str(path)}


def latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in last.pt, or else in previous.pt. A file that is not whole is named."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return read_checkpoint(path)
            except RunError as error:
                print(f"warning: {error}: it is passed over", file=sys.stderr)
    return None


def check_like(saved: Any, expected: Any, name: str) -> None:
    """ValueError if `saved` is not built like `expected`: keys, kinds of numbers, shapes and types of tensors."""
    if isinstance(expected, Tensor):
        found = describe(saved)
        if found != describe(expected):
            raise ValueError(f"{name} is {found}, expected {describe(expected)}")
        if not saved.isfinite().all():
            raise ValueError(f"{name} is not finite")
    elif isinstance(expected, dict):
        if not isinstance(saved, dict):
            raise ValueError(f"{name} is {describe(saved)}, expected a dict")
        for key in expected.keys() | saved.keys():
            if key not in saved or key not in expected:
                raise ValueError(f"{name}: {key} is {'missing' if key in expected else 'not expected'}")
        for key, value in expected.items():
            check_like(saved[key], value, f"{name}: {key}")
    elif isinstance(expected, list | tuple):
        kinds = {type(value) for value in saved} if type(saved) is type(expected) else {None}
        if not (kinds <= {int, float} or kinds == {str}):
            raise ValueError(f"{name} is {describe(saved)}, expected a {type(expected).__name__} of numbers or names")
    else:
        number = type(expected) is float and type(saved) is int
        if not number and type(saved) is not type(expected):
            raise ValueError(f"{name} is {describe(saved)}, expected a {type(expected).__name__}")
        if is_number(saved) and not (abs(saved) < 2**53 if isinstance(saved, int) else math.isfinite(saved)):
            raise ValueError(f"{name} is {describe(saved)}, expected a finite number of 64 bits")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} {value.layout}".replace("torch.", "")
    return f"{value!r:.60}" if is_number(value) or isinstance(value, str) else f"a {type(value).__name__}"

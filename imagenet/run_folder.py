"""The folder of a run: locked, cleared of another run, and its files written so that a crash leaves them whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import BinaryIO

from imagenet.messages import RunError, say, warn

RUN_FILES = (
    *("metrics.csv", "curves.png", "tensorboard", "nan-batch-rank*.json"),
    *("config.json", "best.pt", "previous.pt", "last.pt"),  # last.pt is moved last: until then --resume finds it
)


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
            warn(f"{folder} can't be locked ({error}): let no second run write to it")
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
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the rename itself
    os.close(folder)

"""From the command line to the exit code: every error that a user can cause takes one line."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from imagenet.command_line import parse
from imagenet.data import DataError
from imagenet.messages import RunError, one_line, say
from imagenet.ranks import Signals, join_world
from imagenet.run_setup import run
from imagenet.training import Stopped


def known_failure(error: Exception) -> str | None:
    """The line for an error of the system or one of torch's RuntimeErrors; None for a fault of this program."""
    said = one_line(error)
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or "can't allocate memory" in said:
        return f"out of memory ({said}): pass a smaller --hessian-batch-size, --batch-size or --image-size; --resume"
    if "DataLoader worker" in said:
        return f"a process that decodes died ({said}): pass fewer --num-workers, and --resume"
    if dist.is_initialized() or isinstance(error, dist.DistError):
        return f"rank {os.environ.get('RANK', 0)} lost the others: {said}"
    return None


def main(argv: list[str] | None, description: str | None = None) -> int:
    """0: success, 1: an error, in one line on stderr, 2: wrong flags, 128 + n: stopped by signal n."""
    args = parse(argv, description)
    try:
        with Signals() as signals, join_world(args.device, vars(args)) as world:
            run(args, world, signals)
    except Stopped as stop:
        last = args.checkpoint_dir / "last.pt"
        goes_on = f": --resume goes on from {last}" if last.exists() and not args.evaluate else ""
        say(f"stopped by {signal.Signals(stop.number).name}{goes_on}", sys.stderr)
        return 128 + stop.number
    except (RunError, DataError, OSError, torch.linalg.LinAlgError) as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if (known := known_failure(error)) is None:
            raise
        say(f"error: {known}", sys.stderr)
        return 1
    return 0

"""Threads, measurements in a process of their own, and the memory that a process takes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.problems import BenchmarkError


def threads(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= (os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {os.cpu_count()}, this machine's cores: {text}")
    return int(text)


def use_threads(number: int) -> None:
    """Of torch, here and in the processes that are started."""
    torch.set_num_threads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_flush_denormal(True)


def in_process(module: str, arguments: Sequence[object], **environment: str) -> list:
    """The JSON list that `python3 -m module ARGUMENTS` prints last; ARGUMENTS as JSON too."""
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=root)
    if done.returncode:
        cause = done.stderr.strip().rpartition("\n")[2]
        raise BenchmarkError(f"{module} {json.dumps(arguments)} ended with {done.returncode}: {cause}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes(field: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

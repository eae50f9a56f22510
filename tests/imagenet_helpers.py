"""What the tests of train_imagenet.py share: short runs, runs in processes of their own, a small tree of images."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import memory_plan, progress
from imagenet.checkpoints import read_checkpoint
from imagenet.data import DummyImages
from imagenet.memory_plan import Machine, available_memory
from train_imagenet import main

DUMMY = (
    "--dummy 96 --dummy-classes 7 --image-size 8 --grayscale --hidden-dim 12 --num-layers 4 --batch-size 16 "
    "--num-workers 0 --device cpu --epochs 2 --lr 0.05"
)
HESSIAN = "--use-hessian --hessian-freq 2 --hessian-batch-size 4"

# the server imports everything once, and forks the runs that are killed
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "matplotlib.backends.backend_agg", "torch.distributed"])


def flags(text: str, **more: object) -> list[str]:
    """The words of `text`, and --name value for the rest."""
    return text.split() + [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def rates_assumed(args, device: torch.device) -> Machine:
    return Machine(1e10, 1e10, available_memory(args, device))


@pytest.fixture(autouse=True)
def neither_measured_nor_drawn(monkeypatch):
    """The machine is not measured and no curves.png is drawn: they take longer than most of these runs."""
    monkeypatch.setattr(memory_plan, "measure_machine", rates_assumed)
    monkeypatch.setattr(progress, "write_curves", lambda *_: None)


def child(argv: list[str], output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    memory_plan.measure_machine = rates_assumed
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(argv)
    sys.exit(code)


def start(argv: list[str], output: Path, **environment: str) -> Any:
    process = FORKS.Process(target=child, args=(argv, str(output), environment))
    process.start()
    return process


def finished(process: Any, seconds: float = 120) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"the run did not end in {seconds} s")
    return process.exitcode


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_ranks(of_ranks: list[list[str]], folder: Path) -> list[int]:
    """The exit codes of one rank for each list of flags."""
    common = {"WORLD_SIZE": str(len(of_ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        start(argv, folder / f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, argv in enumerate(of_ranks)
    ]
    return [finished(process) for process in processes]


def error_of(argv: list[str], capsys) -> str:
    """The one line on stderr of a run that fails with 1."""
    capsys.readouterr()
    assert main(argv) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def equal(a: object, b: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)


def end_of(folder: Path) -> dict:
    """The state that a run ends with, without its seconds and the names of its files."""
    state = read_checkpoint(folder / "last.pt")
    history = [
        {name: value for name, value in row.items() if "seconds" not in name and "per_second" not in name}
        for row in state["progress"]["history"]
    ]
    return {**{name: state[name] for name in ("model", "step")}, "history": history}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "lock"}


def jpeg(path: Path, rng: np.random.Generator, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options) -> None:
    channels: tuple[int, ...] = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8), mode).save(path, **options)


@pytest.fixture(name="tree")
def image_tree(tmp_path) -> Path:
    """Three classes of eight JPEGs of different sizes and kinds, and two of each to validate."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(("n01440764", "n01443537", "n01484850")):
        for number in range(8):
            mode = ("RGB", "L", "CMYK")[number % 3]
            jpeg(tmp_path / "train" / name / f"{name}_{number}.JPEG", rng, (20 + 7 * number, 50 - 4 * index), mode)
        for number in range(2):
            jpeg(tmp_path / "val" / name / f"val_{number}.JPEG", rng)
    return tmp_path


def on_tree(tree: Path, **more: object) -> list[str]:
    text = "--image-size 8 --hidden-dim 12 --num-layers 3 --batch-size 8 --num-workers 0 --device cpu --epochs 1"
    return [*text.split(), *flags("", **{"data_dir": tree, "checkpoint_dir": tree / "runs", **more})]


def break_images(tree: Path) -> tuple[Path, Path]:
    """One truncated in the middle, one empty."""
    first, second = sorted((tree / "train" / "n01443537").iterdir())[:2]
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    second.write_bytes(b"")
    return first, second


def rename_image(tree: Path) -> str:
    path = next((tree / "train" / "n01443537").iterdir())
    path.rename(path.with_name("other.JPEG"))
    return "image_files"


def send_signal_with_the_first_image(monkeypatch, number: int) -> None:
    item = DummyImages.__getitem__

    def signalled(self, key):
        os.kill(os.getpid(), number)
        monkeypatch.setattr(DummyImages, "__getitem__", item)
        return item(self, key)

    monkeypatch.setattr(DummyImages, "__getitem__", signalled)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))

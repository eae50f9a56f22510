"""Runs of train_imagenet.py that are stopped, killed and resumed: they end as if nobody had disturbed them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from imagenet import training
from imagenet.checkpoints import read_checkpoint
from imagenet.command_line import parse
from imagenet.data import open_data
from imagenet.messages import RunError
from imagenet.ranks import Signals, World
from imagenet.run_setup import build_run
from tests.imagenet_helpers import (
    DUMMY,
    HESSIAN,
    end_of,
    equal,
    error_of,
    finished,
    flags,
    image_tree,  # noqa: F401
    neither_measured_nor_drawn,  # noqa: F401
    start,
)
from train_imagenet import main

pytestmark = pytest.mark.slow


def interrupted(argv: list[str], folder: Path, number: int) -> int:
    """Start, send the signal as soon as there is a checkpoint, and return the exit code."""
    process = start(argv, folder.with_suffix(".log"))
    until = time.monotonic() + 60
    while not (folder / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, number)
    return finished(process)


@pytest.mark.parametrize("method", ("", HESSIAN))
@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(tmp_path, method, number, code):
    argv = flags(f"{DUMMY} {method}", epochs=6, checkpoint_minutes=0)
    folder, whole = tmp_path / "a", tmp_path / "b"
    assert interrupted([*argv, "--checkpoint-dir", str(folder)], folder, number) == code
    stopped = read_checkpoint(folder / "last.pt")["progress"]
    assert 0 < stopped["epoch"] * 6 + stopped["batch"] < 36
    assert main([*argv, "--checkpoint-dir", str(folder), "--resume"]) == 0
    assert main([*argv, "--checkpoint-dir", str(whole)]) == 0
    assert equal(end_of(folder), end_of(whole))


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_a_run_stopped_in_its_validation_goes_on_with_that(tmp_path, monkeypatch, method):
    argv = flags(f"{DUMMY} {method}", epochs=1)
    folder, whole = tmp_path / "a", tmp_path / "b"

    def stop(run):
        run.save()
        raise training.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", stop)
        assert main([*argv, "--checkpoint-dir", str(folder)]) == 143
    assert read_checkpoint(folder / "last.pt")["progress"]["batch"] == 6
    assert main([*argv, "--checkpoint-dir", str(folder), "--resume"]) == 0
    assert main([*argv, "--checkpoint-dir", str(whole)]) == 0
    assert equal(end_of(folder), end_of(whole))


def let_run(process, path: Path, seconds: float, writes: int) -> None:
    """Return when the process has ended, when the seconds are over, or when the file was replaced so many times."""
    until, seen = time.monotonic() + seconds, set()
    while process.exitcode is None and time.monotonic() < until and len(seen) <= writes:
        with contextlib.suppress(OSError):
            seen.add(path.stat().st_mtime_ns)
        process.join(0.001)


@pytest.mark.parametrize("method, kills", (("", 20), (HESSIAN.replace("size 4", "size 2"), 20)))
def test_twenty_kills_change_nothing(tmp_path, method, kills):
    """SIGKILL in the start and the loading of data (after random seconds), and in training (after random writes)."""
    argv = flags(f"{DUMMY} {method}", checkpoint_minutes=0, batch_size=4, dummy=160)
    for folder in ("first", "whole"):  # the first one waits for the server that forks to import everything
        began = time.monotonic()
        assert finished(start([*argv, "--checkpoint-dir", str(tmp_path / folder)], tmp_path / f"{folder}.log")) == 0
    seconds, rng = time.monotonic() - began, random.Random(0)
    whole, count, moments = end_of(tmp_path / "whole"), 0, set()
    for run in range(20 * kills):
        if count >= kills:
            break
        folder = tmp_path / f"run{run}"
        resumed = [*argv, "--checkpoint-dir", str(folder), "--resume"]
        while True:
            process = start(resumed, tmp_path / "run.log")
            if count >= kills:
                process.join(120)
            elif count % 2:
                let_run(process, folder / "last.pt", 120, rng.randint(1, 20))
            else:
                let_run(process, folder / "last.pt", rng.uniform(0.05, 0.5) * seconds, 1000)
            if process.exitcode is not None:
                assert process.exitcode == 0, (tmp_path / "run.log").read_text()
                break
            process.kill()
            process.join()
            count += 1
            with contextlib.suppress(RunError, OSError):
                found = read_checkpoint(folder / "last.pt")["progress"]
                moments.add((found["epoch"], found["batch"]))
        assert equal(end_of(folder), whole)
    assert count >= kills and len(moments) > 5, "the kills came too late, or at few places only"


def test_what_was_chosen_by_time_is_used_again(tmp_path):
    argv = flags(f"{DUMMY} --use-hessian", checkpoint_dir=tmp_path, hessian_seconds=1e-9, epochs=1)
    assert main(argv) == 0
    assert main([*argv, "--resume", "--epochs", "2", "--hessian-seconds", "1000"]) == 0
    assert read_checkpoint(tmp_path / "last.pt")["config"]["hessian_batch_size"] == 1


def test_flags_may_change_on_resuming(tmp_path, capsys):
    """What changes numbers is said, and is what the optimizers then go by."""
    argv = flags(f"{DUMMY} {HESSIAN}", checkpoint_dir=tmp_path)
    assert main([*argv, "--epochs", "1"]) == 0
    state = read_checkpoint(tmp_path / "last.pt")
    changed = parse([*argv, *"--weight-decay 0.5 --damping 7 --hessian-batch-size 3 --num-workers 1 --resume".split()])
    run = build_run(
        changed, World(0, 1, torch.device("cpu")), Signals(), open_data(changed), state | {"path": "last.pt"}
    )
    run.load(state)
    err = capsys.readouterr().err
    assert all(f"warning: {name} was" in err for name in ("weight_decay", "damping", "hessian_batch_size", "epochs"))
    assert "num_workers" not in err
    newton, plain = run.step.newton, run.step.plain.optimizer
    assert newton.param_groups[0]["weight_decay"] == plain.param_groups[0]["weight_decay"] == 0.5
    assert newton.param_groups[0]["curvature_batch"] == 3
    assert newton.state[newton.param_groups[0]["params"][0]]["damping"] == 7


@pytest.mark.parametrize(
    "more, named",
    (
        ("--hidden-dim 13", "hidden_dim 12 there and 13 here"),
        ("--num-layers 5", "num_layers 4 there and 5 here"),
        ("--batch-size 8", "batch_size 16 there and 8 here"),
        (HESSIAN, "use_hessian False there and True here"),
    ),
)
def test_another_run_s_checkpoint_is_refused(tmp_path, capsys, more, named):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, epochs=1)
    assert main(argv) == 0
    assert named in error_of([*argv, "--resume", *more.split()], capsys)


def test_another_number_of_ranks_is_refused(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, epochs=1)
    assert main(argv) == 0
    state = read_checkpoint(tmp_path / "last.pt")
    state["config"]["ranks"] = 2
    torch.save(state, tmp_path / "last.pt")
    assert "ranks 2 there and 1 here" in error_of([*argv, "--resume"], capsys)

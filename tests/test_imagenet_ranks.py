"""Several ranks: they are one process with the same batch, and none waits for ever."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imagenet import training
from imagenet.checkpoints import read_checkpoint
from imagenet.messages import RunError
from imagenet.ranks import Signals, World
from tests.imagenet_helpers import (
    DUMMY,
    HESSIAN,
    break_images,
    end_of,
    flags,
    image_tree,  # noqa: F401
    neither_measured_nor_drawn,  # noqa: F401
    on_tree,
    rename_image,
    run_ranks,
)
from train_imagenet import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_two_ranks_are_one_process_with_the_same_batch(tmp_path, method):
    argv = flags(f"{DUMMY} {method}", dummy=100)  # the last batch is not full
    assert main([*argv, "--checkpoint-dir", str(tmp_path / "one")]) == 0
    codes = run_ranks([[*argv, "--checkpoint-dir", str(tmp_path / "two")]] * 2, tmp_path)
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()
    one, two = (end_of(tmp_path / name) for name in ("one", "two"))
    for name, p in one["model"].items():
        assert (two["model"][name] - p).norm() <= 1e-5 * p.norm()
    assert (tmp_path / "rank1.log").read_text() == ""
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["top1"] == b["top1"]


def test_two_ranks_skip_unreadable_images_and_count_them_together(tree):
    broken = break_images(tree)
    argv = on_tree(tree, epochs=2)
    assert run_ranks([argv] * 2, tree) == [0, 0]
    assert sorted(read_checkpoint(tree / "runs" / "last.pt")["progress"]["bad"]) == sorted(map(str, broken))
    assert run_ranks([[*argv, "--max-bad-images", "1"]] * 2, tree) == [1, 1]
    assert "2 images can't be read" in (tree / "rank1.log").read_text()


def test_weights_that_differ_between_ranks_are_found(monkeypatch):
    model = torch.nn.Linear(2, 2)
    run = type("Run", (), {"model": model, "world": World(0, 2, torch.device("cpu"))})
    monkeypatch.setattr(World, "objects", lambda self, value: [value, value])
    training.check_equal_weights(run)
    monkeypatch.setattr(World, "objects", lambda self, value: [value, "another"])
    with pytest.raises(RunError, match="2 different sets of weights"):
        training.check_equal_weights(run)


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_a_rank_that_dies_stops_the_others(tmp_path, method):
    """By torchrun, as users start it: SIGKILL to one rank ends the whole with an error, well before any time-out."""
    argv = flags(f"{DUMMY} {method}", checkpoint_dir=tmp_path / "run", epochs=100000, checkpoint_minutes=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = Path(__file__).parents[1]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, str(here / "train_imagenet.py"), *argv], stderr=log, stdout=log, start_new_session=True
        )
        try:
            until = time.monotonic() + 90
            while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < until:
                time.sleep(0.05)
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            assert launcher.wait(60) != 0
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert "error: rank" in (tmp_path / "log").read_text() or "Signal 9" in (tmp_path / "log").read_text()


def test_signals_are_noted_and_a_second_interrupt_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    with Signals() as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "more, named",
    (
        ("--batch-size 32", "batch_size is 32 on rank 1 and 16 on rank 0"),
        ("--use-hessian", "use_hessian is True on rank 1 and False on rank 0"),
        ("--seed 1", "seed is 1 on rank 1 and 0 on rank 0"),
    ),
)
def test_ranks_with_different_flags_are_refused(tmp_path, more, named):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run")
    began = time.monotonic()
    assert run_ranks([argv, [*argv, *more.split()]], tmp_path) == [1, 1]
    assert time.monotonic() - began < 60
    assert named in (tmp_path / "rank0.log").read_text() + (tmp_path / "rank1.log").read_text()
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_images_are_refused(tree, tmp_path):
    shutil.copytree(tree / "train", tmp_path / "other" / "train")
    shutil.copytree(tree / "val", tmp_path / "other" / "val")
    rename_image(tmp_path / "other")
    assert run_ranks([on_tree(tree), on_tree(tree, data_dir=tmp_path / "other")], tmp_path) == [1, 1]
    assert "give every rank the same images" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize("amp", ("fp16", "bf16"))
def test_four_ranks_in_half_precision_are_one_process(tmp_path, amp):
    """Each rank scales its loss as one process does, so that fp16 overflows at the same loss scale."""
    argv = flags(DUMMY, amp=amp)
    assert main([*argv, "--checkpoint-dir", str(tmp_path / "one")]) == 0
    assert run_ranks([[*argv, "--checkpoint-dir", str(tmp_path / "four")]] * 4, tmp_path) == [0] * 4
    one, four = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "four"))
    assert one["step"]["scaler"] == four["step"]["scaler"]
    one, four = (torch.cat([p.flatten() for p in state["model"].values()]) for state in (one, four))
    assert (four - one).norm() <= 3e-3 * one.norm()

"""Wrong input of train_imagenet.py: each takes one line, and a network that is too large is told what fits."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet import memory_plan, steps
from imagenet.checkpoints import read_checkpoint
from imagenet.command_line import parse
from imagenet.data import DummyImages
from imagenet.memory_plan import SETTINGS, fit_to_memory, measure_machine
from imagenet.ranks import World
from tests.imagenet_helpers import (
    DUMMY,
    error_of,
    flags,
    image_tree,  # noqa: F401
    jpeg,
    neither_measured_nor_drawn,  # noqa: F401
    on_tree,
)
from train_imagenet import main

pytestmark = pytest.mark.slow


def spoil(tree: Path, how: str) -> Path:
    """Break the tree; the path that the error must name."""
    if how == "no folder":
        return tree / "nothing"
    if how == "no val":
        shutil.rmtree(tree / "val")
        return tree / "val"
    if how == "train is a file":
        shutil.rmtree(tree / "train")
        (tree / "train").write_text("")
        return tree / "train"
    if how == "empty train":
        shutil.rmtree(tree / "train")
        (tree / "train").mkdir()
        return tree / "train"
    if how == "images beside the classes":
        jpeg(tree / "train" / "a.JPEG", np.random.default_rng(0))
        return tree / "train" / "a.JPEG"
    if how == "empty class":
        (tree / "train" / "n09999999").mkdir()
        return tree / "train" / "n09999999"
    shutil.copytree(tree / "val" / "n01440764", tree / "val" / "n00000001")
    return tree / "val" / "n00000001"


@pytest.mark.parametrize(
    "how",
    ("no folder", "no val", "train is a file", "empty train", "images beside the classes", "empty class",
     "class of val alone"),
)  # fmt: skip
def test_data_that_is_not_as_it_should_be(tree, capsys, how):
    path = spoil(tree, how)
    more = {"data_dir": path} if how == "no folder" else {}
    assert str(path) in error_of(on_tree(tree, **more), capsys)
    assert not (tree / "runs").exists()


@pytest.mark.parametrize(
    "wrong",
    (
        "--epochs 0", "--lr -1", "--lr nan", "--lr 1e39", "--weight-decay 1e300", "--hessian-batch-size 17",
        "--amp fp16 --precision float64", "--max-bad-images -1", "--curvature fisher", "--batch-size 0",
        "--no-such-flag",
    ),
)  # fmt: skip
def test_wrong_flags_exit_with_2(wrong):
    with pytest.raises(SystemExit) as stop:
        main(flags(f"{DUMMY} {wrong}"))
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert "--device cuda" in error_of(flags(DUMMY + " --device cuda"), capsys)


@pytest.mark.parametrize("method", ("", "--use-hessian"))
def test_what_memory_forbids_stops_with_a_flag_that_makes_it_fit(tmp_path, capsys, method):
    text = f"--dummy 8 --hidden-dim 16 --num-layers 3 --batch-size 4 --num-workers 0 --epochs 1 {method}"
    argv = flags(text, checkpoint_dir=tmp_path, memory_gib=0.02)
    error = error_of(argv, capsys)
    advice = re.search(r"pass (--[a-z-]+(?: \d+)?(?: --[a-z-]+(?: \d+)?)*)", error)
    assert advice and "GiB" in error
    assert main(argv + advice[1].split()) == 0


def test_too_large_a_sub_batch_names_the_largest_that_fits(tmp_path, capsys):
    text = "--dummy 64 --image-size 16 --hidden-dim 64 --num-layers 4 --batch-size 64 --num-workers 0 --use-hessian"
    argv = flags(text, checkpoint_dir=tmp_path, memory_gib=0.3, epochs=1, hessian_seconds=1e9)
    error = error_of([*argv, "--hessian-batch-size", "64"], capsys)
    largest = int(re.search(r"pass --hessian-batch-size (\d+)", error)[1])
    assert 1 <= largest < 64
    args = parse(argv)
    fit_to_memory(args, World(0, 1, torch.device("cpu")), 1000)
    assert args.hessian_batch_size == largest


def test_estimates_of_the_recommended_settings(capsys, monkeypatch):
    """Their rows say what fits; the seconds are the operations at the rate that was measured."""
    monkeypatch.setattr(memory_plan, "measure_machine", measure_machine)
    assert main(["--estimate"]) == 0
    out = capsys.readouterr().out
    rate = float(re.search(r"at (\S+) float64 operations/s", out)[1])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    rows, of_ranks = ([cells for cells in lines if unit in cells[-2]] for unit in ("e+", " GB"))
    assert [row[0] for row in rows[::2]] == list(SETTINGS) and len(rows) == 8
    for *_, memory, chosen, size, operations, seconds in rows:
        assert float(size.split()[0]) < float(memory.split()[0]) and int(chosen.split(",")[0]) >= 1
        assert float(seconds) > 0.9 * float(operations) / rate > 0
    assert [row[0] for row in of_ranks[::2]] == list(SETTINGS) and len(of_ranks) == 8
    for _, k, one, _, _, eight, alone, others, *_ in of_ranks:
        shared = float(one) * (1 - float(alone.rstrip("%")) / 100)
        assert float(one) >= float(eight) > float(others) > 0
        assert k != "1" or float(others) == pytest.approx(shared / 8, rel=0.02)


def test_a_loss_of_nan_stops_with_its_files_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    argv, item = flags(DUMMY, checkpoint_dir=tmp_path), DummyImages.__getitem__
    assert main([*argv, "--epochs", "1"]) == 0
    before = (tmp_path / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(DummyImages, "__getitem__", lambda self, key: (item(self, key)[0] * float("nan"), 0, key[1]))
        error = error_of([*argv, "--resume"], capsys)
    (found,) = tmp_path.glob("nan-batch*.json")
    assert len(json.loads(found.read_text())["files"]) == 16 and str(found) in error and "--clip-grad-norm" in error
    assert (tmp_path / "last.pt").read_bytes() == before
    assert main([*argv, "--resume"]) == 0


def test_weights_that_overflow_are_never_saved(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path)
    assert main([*argv, "--epochs", "1"]) == 0
    before = (tmp_path / "last.pt").read_bytes()
    error_of([*argv, "--resume", "--lr", "1e38"], capsys)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_running_out_of_memory_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        torch.empty(2**60)

    monkeypatch.setattr(steps.PlainStep, "__call__", no_memory)
    assert "--hessian-batch-size" in error_of(flags(DUMMY, checkpoint_dir=tmp_path), capsys)


def test_names_that_are_not_utf_8(tree, tmp_path, capsys):
    odd = os.fsdecode(b"\xff\xfe")
    for part in ("train", "val"):
        (tree / part / "n01443537").rename(tree / part / f"n{odd}")
    for folder in ("train", "val"):
        shutil.move(tree / folder, tmp_path / odd / folder)
    (tmp_path / odd / "train" / f"n{odd}" / f"{odd}.JPEG").write_bytes(b"")
    argv = on_tree(tree, data_dir=tmp_path / odd, checkpoint_dir=tmp_path / f"runs{odd}")
    assert main(argv) == main(argv) == 0
    assert main([*argv, "--resume", "--epochs", "2"]) == 0
    assert main([*argv, "--evaluate"]) == 0
    (bad,) = read_checkpoint(tmp_path / f"runs{odd}" / "last.pt")["progress"]["bad"]
    assert bad.endswith(f"{odd}.JPEG")


@pytest.mark.parametrize(
    "name",
    (
        *("seed", "epochs", "dummy", "dummy-classes", "image-size", "hidden-dim", "num-layers", "batch-size"),
        *("num-workers", "hessian-freq", "hessian-batch-size", "max-bad-images"),
    ),
)
@pytest.mark.parametrize("value", (str(2**31), str(2**63), str(-(10**30)), "9" * 5000), ids=("31", "63", "-", "5000"))
def test_numbers_that_are_too_large(capsys, name, value):
    with pytest.raises(SystemExit) as stop:
        main(flags(f"{DUMMY} --{name}={value}"))
    assert stop.value.code == 2
    assert f"--{name}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ("image-size", "hidden-dim", "dummy-classes", "batch-size"))
def test_a_network_that_is_too_large_is_refused_at_once(tmp_path, capsys, name):
    for method in ("", "--use-hessian"):
        argv = flags(f"{DUMMY} {method} --{name} {2**31 - 1}", checkpoint_dir=tmp_path)
        assert "GiB is free" in error_of(argv, capsys)


def test_an_error_without_a_text_is_named(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(steps.PlainStep, "__call__", fail)
    assert "out of memory (MemoryError)" in error_of(flags(DUMMY, checkpoint_dir=tmp_path), capsys)

"""Tests of train_imagenet.py: real files through the real loader, runs that are killed and resumed, ranks, bad flags.

Oracles: a run that nobody disturbed, one process in place of two, SGD written out.
"""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagenet_plan
import train_imagenet
from imagenet_data import GRAY_MEAN, GRAY_STD, MEAN, STD, Batches, DummyImages, open_data, read_image, standardized
from imagenet_plan import Machine, measure_machine, memory_of
from imagenet_runtime import RunError, Signals, World, read_checkpoint, write_durably
from train_imagenet import main, parse, write_curves

DUMMY = (
    "--dummy 96 --dummy-classes 7 --image-size 8 --grayscale --hidden-dim 12 --num-layers 4 --batch-size 16 "
    "--num-workers 0 --device cpu --epochs 2 --lr 0.05"
)
HESSIAN = "--use-hessian --hessian-freq 2 --hessian-batch-size 4"
LINE = re.compile(r"Epoch (\d+): Loss=(\d+\.\d{4}), Acc=(\d+\.\d{2})%, Time=(\d+\.\d{2})s( \(Hessian: \d+\.\d{2}s\))?")

# a process that has imported everything forks the runs that are killed
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "matplotlib.backends.backend_agg", "torch.distributed"])


def flags(text: str, **more: object) -> list[str]:
    """The words of `text`, and --name value for the rest."""
    return text.split() + [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def rates_assumed(args, device: torch.device) -> Machine:
    return Machine(1e10, 1e10, memory_of(args, device))


@pytest.fixture(autouse=True)
def neither_measured_nor_drawn(monkeypatch):
    """The machine's rates, and curves.png, which take longer than most of these runs."""
    monkeypatch.setattr(imagenet_plan, "measure_machine", rates_assumed)
    monkeypatch.setattr(train_imagenet, "write_curves", lambda *_: None)


def child(argv: list[str], output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    imagenet_plan.measure_machine = rates_assumed
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(argv)
    sys.exit(code)


def start(argv: list[str], output: Path, **environment: str) -> multiprocessing.Process:
    process = FORKS.Process(target=child, args=(argv, str(output), environment))
    process.start()
    return process


def finished(process: multiprocessing.Process, seconds: float = 120) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"the run did not end in {seconds} s")
    return process.exitcode


def error_of(argv: list[str], capsys) -> str:
    """The one line on stderr of a run that fails with 1."""
    assert main(argv) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def equal(a: object, b: object) -> bool:
    """To the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)


def end_of(folder: Path) -> dict:
    """What a run must end with: all but its seconds and the names of its files."""
    state = read_checkpoint(folder / "last.pt")
    history = [
        {name: value for name, value in row.items() if "seconds" not in name and "per_second" not in name}
        for row in state["progress"]["history"]
    ]
    return {**{name: state[name] for name in ("model", "step")}, "history": history}


def jpeg(path: Path, rng: np.random.Generator, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options) -> None:
    channels = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8), mode).save(path, **options)


@pytest.fixture
def tree(tmp_path) -> Path:
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
    return flags(text, **{"data_dir": tree, "checkpoint_dir": tree / "runs", **more})


# ------------------------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_a_run_prints_and_writes_what_it_promises(tmp_path, capsys, monkeypatch, method):
    monkeypatch.setattr(train_imagenet, "write_curves", write_curves)
    assert main(flags(f"{DUMMY} {method}", checkpoint_dir=tmp_path)) == 0
    out = capsys.readouterr().out
    found = [LINE.fullmatch(line) for line in out.splitlines() if line.startswith("Epoch")]
    assert [m and m[1] for m in found] == ["1", "2"]
    assert all(bool(m[5]) == bool(method) for m in found)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [f"{float(row['train_loss']):.4f}" for row in rows] == [m[2] for m in found]
    assert [f"{float(row['top1']):.2f}" for row in rows] == [m[3] for m in found]
    assert all(bool(row["damping"]) == bool(method) for row in rows)
    assert out.splitlines()[-1].endswith(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_images"] == 96 and json.dumps(config) in out
    assert Image.open(tmp_path / "curves.png").size > (300, 100)
    assert ("finds its own length" in out) == bool(method)
    best = max(float(row["top1"]) for row in rows)
    assert main(flags(DUMMY + " --evaluate", checkpoint_dir=tmp_path)) == 0
    assert f"Top-1={best:.2f}%, Top-5=" in capsys.readouterr().out


def test_plain_steps_are_sgd(tmp_path):
    """Against SGD written out: momentum 0.9, decay, warm-up, cosine; the same batches."""
    argv = flags(DUMMY + " --precision float64", checkpoint_dir=tmp_path, weight_decay=0.01, warmup_epochs=0.5)
    assert main(argv) == 0
    args = parse(argv)
    train, _, classes = open_data(args)
    torch.manual_seed(args.seed)
    model = train_imagenet.build_model(args, classes)
    parameters, count = list(model.parameters()), 0
    velocity = [torch.zeros_like(p) for p in parameters]
    batches = Batches(len(train), 16, args.seed, True, 0, 1)
    for epoch in range(2):
        batches.epoch = epoch
        for keys in batches:
            images, targets, _ = zip(*(train[key] for key in keys), strict=True)
            x = standardized(torch.stack(images), torch.float64)
            gradients = torch.autograd.grad(model(x, torch.tensor(targets)), parameters)
            # six batches an epoch, three of warm-up
            rate = 0.05 * ((count + 1) / 4 if count < 3 else 0.5 * (1 + np.cos(np.pi * (count - 3) / 9)))
            with torch.no_grad():
                for p, g, v in zip(parameters, gradients, velocity, strict=True):
                    v.mul_(0.9).add_(g + 0.01 * p)
                    p.sub_(rate * v)
            count += 1
    trained = read_checkpoint(tmp_path / "last.pt")["model"]
    for p, q in zip(parameters, trained.values(), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-12)


def test_the_hessian_step_comes_every_so_many_batches_and_momentum_starts_anew(tmp_path, monkeypatch):
    reports, momenta, take = [], [], train_imagenet.NewtonStep.__call__

    def watched(self, *args):
        done = take(self, *args)
        reports.append(done.report is not None)
        momenta.append(len(self.plain.optimizer.state))
        return done

    monkeypatch.setattr(train_imagenet.NewtonStep, "__call__", watched)
    assert main(flags(f"{DUMMY} {HESSIAN}", checkpoint_dir=tmp_path, hessian_freq=3, epochs=1)) == 0
    assert reports == [True, False, False] * 2
    assert [m > 0 for m in momenta] == [False, True, True] * 2


@pytest.mark.parametrize(
    "more",
    (
        "--amp bf16", "--amp fp16", "--clip-grad-norm 0.1", "--lr-schedule step", "--residual --activation gelu",
        "--precision float64 --use-hessian", "--use-hessian --curvature hessian", "--use-hessian --metric parameter",
        "--use-hessian --amp bf16 --hessian-freq 2", "--use-hessian --curvature auto --damping 10",
        "--deterministic --num-workers 2",
    ),
)  # fmt: skip
def test_flags_that_work(tmp_path, more):
    try:
        assert main(flags(f"{DUMMY} {more}", checkpoint_dir=tmp_path, epochs=1)) == 0
        (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
        assert 0 < float(row["train_loss"]) < 6
    finally:
        torch.use_deterministic_algorithms(False)


def test_clipping_bounds_the_step(tmp_path):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, clip_grad_norm=1e-3, weight_decay=0, epochs=1)
    assert main(argv) == 0
    args = parse(argv)
    torch.manual_seed(args.seed)
    before = train_imagenet.build_model(args, 7).state_dict()
    after = read_checkpoint(tmp_path / "last.pt")["model"]
    moved = sum(float((after[name] - p).square().sum()) for name, p in before.items()) ** 0.5
    assert 0 < moved <= 6 * 10 * 0.05 * 1e-3  # steps × what momentum adds up to × rate × norm


def test_tensorboard_is_asked_for_by_its_flag_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in error_of(flags(DUMMY + " --tensorboard", checkpoint_dir=tmp_path), capsys)
    assert main(flags(DUMMY, checkpoint_dir=tmp_path, epochs=1)) == 0


# ------------------------------------------------------------------------------------------------------- images


def test_every_kind_of_jpeg_is_read(tmp_path):
    rng = np.random.default_rng(0)
    for mode in ("RGB", "L", "CMYK"):
        jpeg(tmp_path / "image.JPEG", rng, (40, 30), mode)
        image = read_image(str(tmp_path / "image.JPEG"))
        assert (image.mode, image.size) == ("RGB", (40, 30))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    jpeg(tmp_path / "image.JPEG", rng, (40, 30), exif=turned)
    assert read_image(str(tmp_path / "image.JPEG")).size == (30, 40)


@pytest.mark.parametrize("mean, std", ((MEAN, STD), (GRAY_MEAN, GRAY_STD)))
def test_images_are_standardized(mean, std):
    images = torch.randint(256, (2, len(mean), 3, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    assert torch.allclose(standardized(images, torch.float64), (images.double() / 255 - mean) / std, rtol=1e-12)


def test_a_tree_is_trained_on(tree, capsys):
    assert main(on_tree(tree)) == 0
    assert read_checkpoint(tree / "runs" / "last.pt")["config"]["num_classes"] == 3
    assert capsys.readouterr().err == ""


def break_images(tree: Path) -> tuple[Path, Path]:
    """One truncated in the middle, one empty."""
    first, second = sorted((tree / "train" / "n01443537").iterdir())[:2]
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    second.write_bytes(b"")
    return first, second


@pytest.mark.parametrize("workers", (0, 1))
def test_unreadable_images_are_named_counted_and_skipped(tree, capsys, workers):
    broken = break_images(tree)
    argv = on_tree(tree, epochs=3, num_workers=workers)
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert all(err.count(f"warning: {path} can't be read") == 1 for path in broken) and err.count("warning") == 2
    state = read_checkpoint(tree / "runs" / "last.pt")
    assert sorted(state["progress"]["bad"]) == sorted(map(str, broken))
    assert "2 images can't be read" in error_of([*argv, "--max-bad-images", "1"], capsys)


def test_augmentation_is_a_function_of_seed_epoch_and_index(tree):
    args = parse(on_tree(tree))
    train, val, _ = open_data(args)
    images = {key: train[key][0] for key in [(0, 3), (1, 3), (0, 4)]}
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert all(torch.equal(train[key][0], image) for key, image in reversed(images.items()))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(images[0, 3], images[1, 3])
    args.seed = 1
    assert not torch.equal(open_data(args)[0][0, 3][0], images[0, 3])
    assert torch.equal(val[None, 0][0], val[None, 0][0]) and val[None, 0][0].shape == (3, 8, 8)


def test_workers_change_nothing(tree):
    for workers in (0, 2):
        assert main(on_tree(tree, checkpoint_dir=tree / f"runs{workers}", num_workers=workers)) == 0
    assert equal(end_of(tree / "runs0"), end_of(tree / "runs2"))


def test_ranks_share_out_the_batches_of_one_process():
    def epoch(rank: int, ranks: int) -> list[list[int]]:
        return [[index for _, index in batch] for batch in Batches(43, 8, 5, True, rank, ranks)]

    whole, parts = epoch(0, 1), [epoch(rank, 4) for rank in range(4)]
    assert [sum(shares, []) for shares in zip(*parts, strict=True)] == whole
    assert sorted(sum(whole, [])) == list(range(43)) != sum(whole, [])


# ------------------------------------------------------------------------------------------------------- errors


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
        "--epochs 0", "--lr -1", "--lr nan", "--hessian-batch-size 17", "--amp fp16 --precision float64",
        "--max-bad-images -1", "--curvature fisher", "--batch-size 0", "--no-such-flag",
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
    train_imagenet.choose_by_cost(args, World(0, 1, torch.device("cpu")), 1000)
    assert args.hessian_batch_size == largest


def test_estimates_of_the_recommended_settings(capsys, monkeypatch):
    """Their rows say what fits; the seconds are the operations at the rate that was measured."""
    monkeypatch.setattr(imagenet_plan, "measure_machine", measure_machine)
    assert main(["--estimate"]) == 0
    out = capsys.readouterr().out
    rate = float(re.search(r"at (\S+) float64 operations/s", out)[1])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "GiB" in line]
    assert [row[0] for row in rows[::2]] == list(imagenet_plan.SETTINGS) and len(rows) == 8
    for *_, memory, chosen, size, operations, seconds in rows:
        assert float(size.split()[0]) < float(memory.split()[0]) and int(chosen.split(",")[0]) >= 1
        assert float(seconds) > 0.9 * float(operations) / rate > 0


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


# ------------------------------------------------------------------------------------------- killed and resumed


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
    argv = flags(f"{DUMMY} {method}", epochs=3, checkpoint_minutes=0)
    folder, whole = tmp_path / "a", tmp_path / "b"
    assert interrupted([*argv, "--checkpoint-dir", str(folder)], folder, number) == code
    stopped = read_checkpoint(folder / "last.pt")["progress"]
    assert 0 < stopped["epoch"] * 6 + stopped["batch"] < 18
    assert main([*argv, "--checkpoint-dir", str(folder), "--resume"]) == 0
    assert main([*argv, "--checkpoint-dir", str(whole)]) == 0
    assert equal(end_of(folder), end_of(whole))


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_a_run_stopped_in_its_validation_goes_on_with_that(tmp_path, monkeypatch, method):
    argv = flags(f"{DUMMY} {method}", epochs=1)
    folder, whole = tmp_path / "a", tmp_path / "b"

    def stop(run):
        run.save()
        raise train_imagenet.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_imagenet, "evaluate", stop)
        assert main([*argv, "--checkpoint-dir", str(folder)]) == 143
    assert read_checkpoint(folder / "last.pt")["progress"]["batch"] == 6
    assert main([*argv, "--checkpoint-dir", str(folder), "--resume"]) == 0
    assert main([*argv, "--checkpoint-dir", str(whole)]) == 0
    assert equal(end_of(folder), end_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize("method, kills", (("", 20), (HESSIAN.replace("size 4", "size 2"), 20)))
def test_twenty_kills_change_nothing(tmp_path, method, kills):
    """SIGKILL at random moments of a run, of the data's loading and of a checkpoint's writing as of all else."""
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
            process.join(rng.uniform(0.05, 0.5) * seconds if count < kills else 120)
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


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path)
    assert main(argv) == 0
    whole = end_of(tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:-2000])
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    captured = capsys.readouterr()
    assert f"{last} is not a whole checkpoint" in captured.err and "previous.pt: epoch 2" in captured.out
    assert equal(end_of(tmp_path), whole)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert f"no checkpoint in {tmp_path} is whole" in error_of([*argv, "--resume"], capsys)


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


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    """A user's state_dict, say."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "mine.pt")
    for flag in ("--resume", "--evaluate"):
        error = error_of(flags(f"{DUMMY} {flag} {tmp_path / 'mine.pt'}", checkpoint_dir=tmp_path / "run"), capsys)
        assert f"{tmp_path / 'mine.pt'} is no checkpoint of train_imagenet.py" in error


def test_another_number_of_ranks_is_refused(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, epochs=1)
    assert main(argv) == 0
    state = read_checkpoint(tmp_path / "last.pt")
    state["config"]["ranks"] = 2
    torch.save(state, tmp_path / "last.pt")
    assert "ranks 2 there and 1 here" in error_of([*argv, "--resume"], capsys)


def test_a_run_in_the_way_is_moved_aside(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    first = (tmp_path / "run" / "last.pt").read_bytes()
    assert main(argv) == 0
    assert (tmp_path / "run.1" / "last.pt").read_bytes() == first and (tmp_path / "run" / "last.pt").exists()
    assert "--resume" in capsys.readouterr().out


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
    run = train_imagenet.build_run(
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


def test_running_out_of_memory_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        torch.empty(2**60)

    monkeypatch.setattr(train_imagenet.PlainStep, "__call__", no_memory)
    assert "--hessian-batch-size" in error_of(flags(DUMMY, checkpoint_dir=tmp_path), capsys)


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("died")))
    with pytest.raises(OSError, match="died"):
        write_durably(path, b"after")
    assert path.read_bytes() == b"before"


# -------------------------------------------------------------------------------------------------------- ranks


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def two_ranks(argv: list[str], folder: Path) -> list[int]:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(argv, folder / f"rank{r}.log", RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    return [finished(process) for process in processes]


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_two_ranks_are_one_process_with_the_same_batch(tmp_path, method):
    argv = flags(f"{DUMMY} {method}", dummy=100)  # the last batch is not full
    assert main([*argv, "--checkpoint-dir", str(tmp_path / "one")]) == 0
    codes = two_ranks([*argv, "--checkpoint-dir", str(tmp_path / "two")], tmp_path)
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
    assert two_ranks(argv, tree) == [0, 0]
    assert sorted(read_checkpoint(tree / "runs" / "last.pt")["progress"]["bad"]) == sorted(map(str, broken))
    assert two_ranks([*argv, "--max-bad-images", "1"], tree) == [1, 1]
    assert "2 images can't be read" in (tree / "rank1.log").read_text()


def test_weights_that_differ_between_ranks_are_found(monkeypatch):
    model = torch.nn.Linear(2, 2)
    run = type("Run", (), {"model": model, "world": World(0, 2, torch.device("cpu"))})
    monkeypatch.setattr(World, "objects", lambda self, value: [value, value])
    train_imagenet.check_equal_weights(run)
    monkeypatch.setattr(World, "objects", lambda self, value: [value, "another"])
    with pytest.raises(RunError, match="2 different sets of weights"):
        train_imagenet.check_equal_weights(run)


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_others(tmp_path):
    """By torchrun, as users start it: SIGKILL to one rank ends the whole with an error, well before any time-out."""
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=100000, checkpoint_minutes=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = Path(__file__).parent
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

"""Runs of train_imagenet.py: what they print and write, their steps, their images."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import progress, steps
from imagenet.checkpoints import read_checkpoint
from imagenet.command_line import parse
from imagenet.data import GRAY_MEAN, GRAY_STD, MEAN, STD, Batches, open_data, read_image, standardized
from imagenet.memory_plan import build_model
from imagenet.progress import write_curves
from tests.imagenet_helpers import (
    DUMMY,
    HESSIAN,
    break_images,
    contents,
    end_of,
    equal,
    error_of,
    flags,
    image_tree,  # noqa: F401
    jpeg,
    neither_measured_nor_drawn,  # noqa: F401
    on_tree,
    rename_image,
    rows_of,
    run_ranks,
)
from train_imagenet import main

pytestmark = pytest.mark.slow

LINE = re.compile(r"Epoch (\d+): Loss=(\d+\.\d{4}), Acc=(\d+\.\d{2})%, Time=(\d+\.\d{2})s( \(Hessian: \d+\.\d{2}s\))?")


@pytest.mark.parametrize("method", ("", HESSIAN))
def test_a_run_prints_and_writes_what_it_promises(tmp_path, capsys, monkeypatch, method):
    monkeypatch.setattr(progress, "write_curves", write_curves)
    assert main(flags(f"{DUMMY} {method}", checkpoint_dir=tmp_path)) == 0
    out = capsys.readouterr().out
    found = [LINE.fullmatch(line) for line in out.splitlines() if line.startswith("Epoch")]
    assert [m and m[1] for m in found] == ["1", "2"]
    assert all(bool(m[5]) == bool(method) for m in found)
    rows = rows_of(tmp_path)
    assert [f"{float(row['train_loss']):.4f}" for row in rows] == [m[2] for m in found]
    assert [f"{float(row['top1']):.2f}" for row in rows] == [m[3] for m in found]
    assert all(bool(row["damping"]) == bool(method) for row in rows)
    assert out.splitlines()[-1].endswith(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_images"] == 96 and json.dumps(config) in out
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size > (300, 100)
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
    model = build_model(args, classes)
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
    reports, momenta, take = [], [], steps.NewtonStep.__call__

    def watched(self, *args):
        done = take(self, *args)
        reports.append(done.report is not None)
        momenta.append(len(self.plain.optimizer.state))
        return done

    monkeypatch.setattr(steps.NewtonStep, "__call__", watched)
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
        (row,) = rows_of(tmp_path)
        assert 0 < float(row["train_loss"]) < 6
    finally:
        torch.use_deterministic_algorithms(False)


def test_clipping_bounds_the_step(tmp_path):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, clip_grad_norm=1e-3, weight_decay=0, epochs=1)
    assert main(argv) == 0
    args = parse(argv)
    torch.manual_seed(args.seed)
    before = build_model(args, 7).state_dict()
    after = read_checkpoint(tmp_path / "last.pt")["model"]
    moved = sum(float((after[name] - p).square().sum()) for name, p in before.items()) ** 0.5
    assert 0 < moved <= 6 * 10 * 0.05 * 1e-3  # steps × what momentum adds up to × rate × norm


def test_tensorboard_is_asked_for_by_its_flag_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in error_of(flags(DUMMY + " --tensorboard", checkpoint_dir=tmp_path), capsys)
    assert main(flags(DUMMY, checkpoint_dir=tmp_path, epochs=1)) == 0


# -------------------------------------------------------------------------------------------------------------- images


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


def rename_class(tree: Path) -> str:
    for part in ("train", "val"):
        (tree / part / "n01443537").rename(tree / part / "n01443538")
    return "class 1 is 'n01443537' there and 'n01443538' here"


@pytest.mark.parametrize("spoil", (rename_class, rename_image))
def test_another_data_set_is_refused(tree, capsys, spoil):
    assert main(on_tree(tree)) == 0
    before, named = contents(tree / "runs"), spoil(tree)
    assert named in error_of([*on_tree(tree, epochs=2), "--resume"], capsys)
    if spoil is rename_class:
        assert named in error_of([*on_tree(tree), "--evaluate"], capsys)
    else:  # other images of the same classes
        assert main([*on_tree(tree), "--evaluate"]) == 0
    assert contents(tree / "runs") == before


def test_the_data_may_move(tree, tmp_path):
    assert main(on_tree(tree)) == 0
    for part in ("train", "val"):
        shutil.move(tree / part, tmp_path / "elsewhere" / part)
    assert main([*on_tree(tree, data_dir=tmp_path / "elsewhere", epochs=2), "--resume"]) == 0


@pytest.mark.parametrize("method", ("", "--use-hessian"))
@pytest.mark.parametrize("ranks", (1, 2))
def test_an_unreadable_image_alone_in_its_batch_is_skipped_and_counted(tree, capsys, method, ranks):
    jpeg(tree / "train" / "n01440764" / "one_more.JPEG", np.random.default_rng(1))
    images = sorted((tree / "train").glob("*/*.JPEG"))
    *_, ((_, last),) = Batches(len(images), 8, 0, True, 0, 1)
    images[last].write_bytes(b"")
    argv = [*on_tree(tree), *method.split()]
    assert (main(argv) if ranks == 1 else max(run_ranks([argv, argv], tree))) == 0
    state = read_checkpoint(tree / "runs" / "last.pt")
    assert state["progress"]["bad"] == [str(images[last])]
    assert main([*argv, "--resume", "--epochs", "2"] if ranks == 1 else argv) == 0
    assert "1 images can't be read" in error_of([*argv, "--max-bad-images", "0"], capsys)

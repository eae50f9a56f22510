"""Runs of train_imagenet.py that are disturbed: no checkpoint is lost, no rank waits for ever, errors take one line."""

from __future__ import annotations

import copy
import os
import random
import resource
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_imagenet
from imagenet_data import Bad, Batches, DummyImages
from imagenet_runtime import locked, read_checkpoint, write_durably
from tests.imagenet_helpers import (
    DUMMY,
    HESSIAN,
    contents,
    end_of,
    equal,
    error_of,
    flags,
    image_tree,  # noqa: F401
    jpeg,
    neither_measured_nor_drawn,  # noqa: F401
    on_tree,
    run_ranks,
    start,
)
from train_imagenet import MUST_MATCH, NETWORK, main

# ------------------------------------------------------------------------------------------- nothing is overwritten


def send_signal_with_the_first_image(monkeypatch, number: int) -> None:
    item = DummyImages.__getitem__

    def signalled(self, key):
        os.kill(os.getpid(), number)
        monkeypatch.setattr(DummyImages, "__getitem__", item)
        return item(self, key)

    monkeypatch.setattr(DummyImages, "__getitem__", signalled)


@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_an_interrupted_evaluation_writes_nothing(tmp_path, monkeypatch, capsys, number, code):
    argv = flags(DUMMY, checkpoint_dir=tmp_path)
    assert main(argv) == 0
    before = contents(tmp_path)
    send_signal_with_the_first_image(monkeypatch, number)
    assert main([*argv, "--evaluate"]) == code
    assert contents(tmp_path) == before
    assert "--resume" not in capsys.readouterr().err


def test_a_signal_before_the_first_step_writes_nothing(tmp_path, monkeypatch):
    """The images of the first batch can't be read, so that it takes no step."""

    def bad(self, key):
        os.kill(os.getpid(), signal.SIGTERM)
        return Bad(str(key), "spoiled")

    monkeypatch.setattr(DummyImages, "__getitem__", bad)
    assert main(flags(f"{DUMMY} --max-bad-images 99 --checkpoint-minutes 0", checkpoint_dir=tmp_path)) == 143
    assert contents(tmp_path) == {}


def test_a_run_resumed_in_its_validation_and_stopped_there_keeps_both_checkpoints(tmp_path, monkeypatch):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, checkpoint_minutes=0, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(train_imagenet, "evaluate", lambda run: run.stop(signal.SIGTERM))
        assert main(argv) == 143
    before = contents(tmp_path)
    assert read_checkpoint(tmp_path / "last.pt")["progress"]["batch"] == 6
    send_signal_with_the_first_image(monkeypatch, signal.SIGTERM)
    assert main([*argv, "--resume"]) == 143
    assert contents(tmp_path) == before


def test_a_run_that_goes_on_in_another_folder_moves_the_run_there_aside(tmp_path):
    first, second = tmp_path / "A", tmp_path / "B"
    steady = f"{DUMMY} --lr-schedule step --warmup-epochs 0"
    assert main(flags(steady, checkpoint_dir=first, epochs=1)) == 0
    assert main(flags(steady, checkpoint_dir=second, seed=1)) == 0
    before, source = contents(second), contents(first)
    assert main(flags(steady, checkpoint_dir=second, resume=first / "last.pt")) == 0
    assert contents(tmp_path / "B.1") == before and contents(first) == source
    assert main(flags(steady, checkpoint_dir=tmp_path / "whole")) == 0
    assert equal(end_of(second), end_of(tmp_path / "whole"))
    assert main(flags(f"{DUMMY} --evaluate", checkpoint_dir=second)) == 0  # of the best.pt there


@pytest.mark.parametrize("file", ("last.pt", "previous.pt", "best.pt", "metrics.csv", "config.json", "curves.png"))
def test_any_file_of_a_run_is_moved_aside_and_no_other(tmp_path, file):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (file, "notes.txt"):
        (folder / name).write_text(name)
    assert main(flags(DUMMY, checkpoint_dir=folder, epochs=1)) == 0
    assert contents(tmp_path / "run.1") == {file: file.encode()}
    assert (folder / "notes.txt").read_text() == "notes.txt"


@pytest.mark.parametrize("more", ("--memory-gib 1e-6", "--resume nothing.pt", "--use-hessian --memory-gib 1e-6"))
def test_a_run_that_is_refused_moves_nothing(tmp_path, capsys, more):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    before = contents(tmp_path / "run")
    error_of([*argv, *more.split()], capsys)
    assert contents(tmp_path / "run") == before and not (tmp_path / "run.1").exists()


def test_resuming_with_nothing_to_resume_names_the_run_that_was_moved_aside(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    (tmp_path / "run").rename(tmp_path / "run.1")
    assert main([*argv, "--resume"]) == 0
    assert f"--resume {tmp_path / 'run.1' / 'last.pt'}" in capsys.readouterr().out


def test_a_damaged_last_checkpoint_does_not_take_the_place_of_the_whole_one(tmp_path, monkeypatch):
    argv = flags(DUMMY, checkpoint_dir=tmp_path)
    assert main(argv) == 0
    whole = (tmp_path / "previous.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    send_signal_with_the_first_image(monkeypatch, signal.SIGTERM)
    assert main([*argv, "--resume"]) == 143
    assert (tmp_path / "previous.pt").read_bytes() == whole


@pytest.mark.parametrize("folder", (".", ""))
def test_the_present_folder_can_be_used_again(tmp_path, monkeypatch, folder):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    argv = [*DUMMY.split(), "--epochs", "1", "--checkpoint-dir", folder]
    assert main(argv) == main(argv) == 0
    assert (tmp_path / "run" / "last.pt").exists() and (tmp_path / "run.1" / "last.pt").exists()


# --------------------------------------------------------------------------------------------- one run in a folder


def test_a_second_run_in_a_folder_is_refused(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    before = contents(tmp_path / "run")
    with locked(tmp_path / "run"):
        for more in ([], ["--resume"]):
            assert f"in use by process {os.getpid()} " in error_of([*argv, *more], capsys)
        assert run_ranks([argv, argv], tmp_path) == [1, 1]
        assert f"in use by process {os.getpid()} " in (tmp_path / "rank0.log").read_text()
    assert contents(tmp_path / "run") == before
    assert run_ranks([argv, argv], tmp_path) == [0, 0]


def test_the_lock_stays_while_a_run_is_moved_aside_and_goes_with_its_process(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", checkpoint_minutes=0)
    assert main([*argv, "--epochs", "1"]) == 0
    process = start([*argv, "--epochs", "100000", "--num-workers", "1"], tmp_path / "log")
    until = time.monotonic() + 60
    while not ((tmp_path / "run.1").exists() and (tmp_path / "run" / "last.pt").exists()):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert f"in use by process {process.pid} " in error_of(argv, capsys)
    process.kill()  # its worker lives on for a few seconds
    process.join()
    assert main([*argv, "--epochs", "1"]) == 0
    assert (tmp_path / "run.2" / "last.pt").exists()


# ------------------------------------------------------------------------------------------------- data, unreadable


def rename_class(tree: Path) -> str:
    for part in ("train", "val"):
        (tree / part / "n01443537").rename(tree / part / "n01443538")
    return "class 1 is 'n01443537' there and 'n01443538' here"


def rename_image(tree: Path) -> str:
    path = next((tree / "train" / "n01443537").iterdir())
    path.rename(path.with_name("other.JPEG"))
    return "image_files"


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


# ------------------------------------------------------------------------------------------------------------ ranks


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


# ------------------------------------------------------------------------------------------- damaged checkpoints


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in nested dicts, the dicts included."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, key)
        yield from leaves(value, (*path, key))


def changed(state: dict, path: tuple, change: Callable[[dict, Any], None]) -> dict:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return state


def delete(tree: dict, key: object) -> None:
    del tree[key]


def put(value: object) -> Callable[[dict, Any], None]:
    def change(tree: dict, key: object) -> None:
        tree[key] = value

    return change


ABSURD = ("text", None, [1, "a"], {"a": 1}, torch.zeros(2, 2), 10**30, float("nan"), True)


def damaged_states(state: dict, rng: random.Random) -> Iterator[tuple[str, dict]]:
    """The flag that must refuse it, and the state."""
    weights = list(state["model"])
    for flag in ("--resume", "--evaluate"):
        for name in rng.sample(weights, 2):
            p = state["model"][name]
            yield flag, changed(state, ("model", name), delete)
            yield flag, changed(state, ("model", "layers.9.weight"), put(p))
            for other in (p.flatten()[:-1], p[None], p.double(), p * float("nan"), p.to_sparse(), None, 3):
                yield flag, changed(state, ("model", name), put(other))
        prefixed = {f"module.{name}": p for name, p in state["model"].items()}
        yield flag, {**state, "model": prefixed}
        yield flag, {**state, "model": list(state["model"].values())}
        for name in ("config", "classes", "model", "progress"):
            yield flag, changed(state, (name,), delete)
        for value in ABSURD:
            yield flag, {**state, "classes": value}
            yield flag, {**state, "config": value}
            yield flag, changed(state, ("config", rng.choice(NETWORK)), put(value if value is not True else 2))
        for name in NETWORK:
            yield flag, changed(state, ("config", name), delete)
        for name in ("num_layers", "hidden_dim", "image_size"):
            for value in (0, -1, 10**7, 10**12):
                yield flag, changed(state, ("config", name), put(value))
    for name in MUST_MATCH:
        yield "--resume", changed(state, ("config", name), delete)
    for part in ("step", "progress"):
        # the options of an optimizer are those of the flags; the method may be any text
        options = ("param_groups", "history", "scaler", "method")
        paths = [(part, *path) for path in leaves(state[part]) if not set(path) & set(options)]
        for path in rng.sample(paths, min(len(paths), 12)):
            yield "--resume", changed(state, path, delete)
            value = rng.choice(ABSURD[:5] if "newton" in path else ABSURD[:-1])
            yield "--resume", changed(state, path, put(value))
    row = {**state["progress"]["history"][0], "top1": "text"}
    for history in ([], [{}], [row], "text", state["progress"]["history"] * 2):
        yield "--resume", changed(state, ("progress", "history"), put(history))
    for batch in (-1, 7, 10**30, 0.5):
        yield "--resume", changed(state, ("progress", "batch"), put(batch))


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def damaged_files(whole: Path, folder: Path, rng: random.Random) -> Iterator[Path]:
    data, path = whole.read_bytes(), folder / "damaged.pt"
    with zipfile.ZipFile(whole) as archive:
        records = [
            (entry.header_offset + 128, entry.file_size) for entry in archive.infolist() if entry.file_size > 200
        ]
    for _ in range(8):
        offset, size = rng.choice(records)
        spoiled = bytearray(data)
        spoiled[offset + rng.randrange(size - 128)] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        yield path
        path.write_bytes(data[: rng.randrange(len(data))])
        yield path
    for content in (b"", b"text", rng.randbytes(1000)):
        path.write_bytes(content)
        yield path
    torch.save({"config": Code()}, path)
    yield path
    yield from (Path("/dev/null"), Path("/dev/zero"), folder)
    os.mkfifo(folder / "pipe")
    yield folder / "pipe"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("method", ("", HESSIAN))
def test_damaged_checkpoints_take_one_line(tmp_path, capsys, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    argv = flags(f"{DUMMY} {method}", checkpoint_dir=tmp_path / "run")
    assert main([*argv, "--epochs", "1"]) == 0
    last, path = tmp_path / "run" / "last.pt", tmp_path / "changed.pt"
    state, rng = torch.load(last, weights_only=True), random.Random(0)
    before = contents(tmp_path / "run")

    def refused(flag: str, path: Path) -> None:
        began = time.monotonic()
        error = error_of([*argv, flag, str(path)], capsys)
        named = ("is not a whole checkpoint", "of another run", "of another data set", "no checkpoint of")
        assert any(words in error for words in named), error
        assert str(path) in error and len(error) < 1000 and time.monotonic() - began < 5

    for flag, spoiled in damaged_states(state, rng):
        torch.save(spoiled, path)
        refused(flag, path)
    for file in damaged_files(last, tmp_path, rng):
        refused("--resume", file)
        refused("--evaluate", file)
    assert contents(tmp_path / "run") == before and not (tmp_path / "executed").exists()
    assert not (tmp_path / "run.1").exists()


# --------------------------------------------------------------------------------------------- other one-line errors


def test_a_disk_that_fills_at_any_place_keeps_the_old_file(tmp_path):
    state = {"weights": [torch.rand(100) for _ in range(20)]}
    path, before = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_durably(path, lambda file: torch.save(state, file))
    old = path.read_bytes()
    for size in range(0, len(old), len(old) // 46):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(OSError):
                write_durably(path, lambda file: torch.save(state, file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert contents(tmp_path) == {"last.pt": old}


def test_names_that_are_not_utf_8(tree, tmp_path):
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

    monkeypatch.setattr(train_imagenet.PlainStep, "__call__", fail)
    assert "out of memory (MemoryError)" in error_of(flags(DUMMY, checkpoint_dir=tmp_path), capsys)

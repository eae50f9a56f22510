"""Damaged checkpoints: each takes one line that says what is wrong, and nothing is written."""

from __future__ import annotations

import copy
import os
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imagenet.resuming import MUST_MATCH, NETWORK
from tests.imagenet_helpers import (
    DUMMY,
    HESSIAN,
    contents,
    end_of,
    equal,
    error_of,
    flags,
    image_tree,  # noqa: F401
    neither_measured_nor_drawn,  # noqa: F401
)
from train_imagenet import main

pytestmark = pytest.mark.slow


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
    assert f"{tmp_path} has no whole last.pt or previous.pt" in error_of([*argv, "--resume"], capsys)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    """A user's state_dict, say."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "mine.pt")
    for flag in ("--resume", "--evaluate"):
        error = error_of(flags(f"{DUMMY} {flag} {tmp_path / 'mine.pt'}", checkpoint_dir=tmp_path / "run"), capsys)
        assert f"{tmp_path / 'mine.pt'} is no checkpoint of train_imagenet.py" in error


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


def replace_by(value: object) -> Callable[[dict, Any], None]:
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
            yield flag, changed(state, ("model", "layers.9.weight"), replace_by(p))
            for other in (p.flatten()[:-1], p[None], p.double(), p * float("nan"), p.to_sparse(), None, 3):
                yield flag, changed(state, ("model", name), replace_by(other))
        prefixed = {f"module.{name}": p for name, p in state["model"].items()}
        yield flag, {**state, "model": prefixed}
        yield flag, {**state, "model": list(state["model"].values())}
        for name in ("config", "classes", "model", "progress"):
            yield flag, changed(state, (name,), delete)
        for value in ABSURD:
            yield flag, {**state, "classes": value}
            yield flag, {**state, "config": value}
            yield flag, changed(state, ("config", rng.choice(NETWORK)), replace_by(value if value is not True else 2))
        for name in NETWORK:
            yield flag, changed(state, ("config", name), delete)
        for name in ("num_layers", "hidden_dim", "image_size"):
            for value in (0, -1, 10**7, 10**12):
                yield flag, changed(state, ("config", name), replace_by(value))
    for name in MUST_MATCH:
        yield "--resume", changed(state, ("config", name), delete)
    for part in ("step", "progress"):
        # the options of an optimizer are those of the flags; the method may be any text
        options = ("param_groups", "history", "scaler", "method")
        paths = [(part, *path) for path in leaves(state[part]) if not set(path) & set(options)]
        for path in rng.sample(paths, min(len(paths), 12)):
            if path[-1] != "last":  # the first Newton step has none
                yield "--resume", changed(state, path, delete)
            value = rng.choice(ABSURD[:5] if "newton" in path else ABSURD[:-1])
            yield "--resume", changed(state, path, replace_by(value))
    row = {**state["progress"]["history"][0], "top1": "text"}
    histories: tuple[Any, ...] = ([], [{}], [row], "text", state["progress"]["history"] * 2)
    for history in histories:
        yield "--resume", changed(state, ("progress", "history"), replace_by(history))
    for batch in (-1, 7, 10**30, 0.5):
        yield "--resume", changed(state, ("progress", "batch"), replace_by(batch))


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

"""Reading a checkpoint, and finding what is wrong with it."""

from __future__ import annotations

import contextlib
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.messages import RunError, one_line, warn

# what zipfile, torch.load and the readers of a checkpoint raise if it is damaged
DAMAGED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)


@contextlib.contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """Turn the errors of reading a damaged checkpoint into a RunError."""
    try:
        yield
    except DAMAGED as error:
        raise RunError(f"{path} is not a whole checkpoint ({one_line(error)[:200]})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, and its path; RunError if it is not whole."""
    if not path.exists():
        raise RunError(f"{path} does not exist: name a checkpoint that does")
    if not path.is_file():
        raise RunError(f"{path} is not a whole checkpoint (not a regular file)")
    with damage_named(path):
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not (isinstance(state, dict) and {"config", "classes", "model", "step", "progress"} <= state.keys()):
        raise RunError(f"{path} is no checkpoint of train_imagenet.py, or one of an older version: train anew")
    with damage_named(path):
        check_like(state["classes"], [""], "classes")
        for part in ("config", "model", "step", "progress"):
            if not isinstance(state[part], dict):
                raise ValueError(f"{part} is {describe(state[part])}, expected a dict")
    return state | {"path": str(path)}


def latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in last.pt, or else in previous.pt. A file that is not whole is named."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return read_checkpoint(path)
            except RunError as error:
                warn(f"{error}: it is passed over")
    return None


def check_like(saved: Any, expected: Any, name: str) -> None:
    """ValueError if `saved` is not built like `expected`: keys, kinds of numbers, shapes and types of tensors."""
    if isinstance(expected, Tensor):
        found = describe(saved)
        if found != describe(expected):
            raise ValueError(f"{name} is {found}, expected {describe(expected)}")
        if not saved.isfinite().all():
            raise ValueError(f"{name} is not finite")
    elif isinstance(expected, dict):
        if not isinstance(saved, dict):
            raise ValueError(f"{name} is {describe(saved)}, expected a dict")
        for key in expected.keys() | saved.keys():
            if key not in saved or key not in expected:
                raise ValueError(f"{name}: {key} is {'missing' if key in expected else 'not expected'}")
        for key, value in expected.items():
            check_like(saved[key], value, f"{name}: {key}")
    elif isinstance(expected, list | tuple):
        kinds = {type(value) for value in saved} if type(saved) is type(expected) else {None}
        if not (kinds <= {int, float} or kinds == {str}):
            raise ValueError(f"{name} is {describe(saved)}, expected a {type(expected).__name__} of numbers or names")
    else:
        number = type(expected) is float and type(saved) is int
        if not number and type(saved) is not type(expected):
            raise ValueError(f"{name} is {describe(saved)}, expected a {type(expected).__name__}")
        if is_number(saved) and not (abs(saved) < 2**53 if isinstance(saved, int) else math.isfinite(saved)):
            raise ValueError(f"{name} is {describe(saved)}, expected a finite number of 64 bits")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} {value.layout}".replace("torch.", "")
    return f"{value!r:.60}" if is_number(value) or isinstance(value, str) else f"a {type(value).__name__}"

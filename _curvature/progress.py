"""The progress bar of what takes more than two seconds; silent where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    return tqdm(items, description, disable=None, delay=2, leave=False)

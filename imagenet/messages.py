"""The error of a run that can't go on, and text for a terminal."""

from __future__ import annotations

import sys
from typing import TextIO


class RunError(Exception):
    """The run can't start or go on. The message says why and what to do."""


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks; its class if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str, file: TextIO | None = None) -> None:
    """Print at once. Bytes of a file name that are not UTF-8 appear as \\udc…"""
    print(text.encode(errors="backslashreplace").decode(), file=file, flush=True)


def warn(text: str) -> None:
    say(f"warning: {text}", sys.stderr)

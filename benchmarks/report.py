"""Tables and pictures of the benchmarks."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Points = list[tuple[float, float]]


class Panel(NamedTuple):
    """One log-log plot. `marks` are points to put a ring around, `marked` says what a ring means.

    ticks: integers to label on the x-axis, in place of the powers of 10.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: dict[str, Points]
    marks: Sequence[tuple[float, float]] = ()
    marked: str = ""
    ticks: Sequence[int] = ()


class Report(NamedTuple):
    lines: list[str]  # Markdown
    panels: Sequence[Panel] = ()


def machine() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, CPU"


def formatted(value: float | None) -> str:
    """Three digits; – for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown_row(cells: Sequence[object]) -> str:
    """Floats are printed to three digits, integers with commas."""

    def text(value: object) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return formatted(value) if isinstance(value, float | None) else str(value)

    return "| " + " | ".join(map(text, cells)) + " |"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [markdown_row(row) for row in (header, ["---"] * len(header), *rows)]


def write_table(path: Path, command: str, lines: Sequence[str]) -> None:
    """Write the lines, print them, and say where they are. The first line is the command and the machine."""
    text = "\n".join([f"`python3 benchmark.py {command}`; {machine()}.", "", *lines]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"{text}\nTable: {path}")


def write_plots(path: Path, panels: Sequence[Panel]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for (name, points), marker in zip(panel.curves.items(), "osv^Dx*", strict=False):
            if points:
                axis.loglog(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        if panel.marks:
            ring = dict(marker="o", linestyle="", markersize=11, markerfacecolor="none", color="black")
            axis.loglog(*zip(*panel.marks, strict=True), label=panel.marked, **ring)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.ticks:
            axis.set_xticks(panel.ticks, [str(x) for x in panel.ticks])
            axis.set_xticks([], minor=True)
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")

"""Curves of the runs: each seed faint, their median bold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes

from benchmarks.training.problems import ALL
from benchmarks.training.runs import Run, Runs


class Panel(NamedTuple):
    title: str
    runs: Runs
    x: str  # names in a run's history
    y: str


def median_curve(runs: list[Run], x: str, y: str) -> tuple[list[float], list[float]]:
    """At every x of any seed. A run that has ended keeps its last value."""
    at = sorted({value for run in runs for value in run.history[x]})
    columns = []
    for run in runs:
        own = torch.tensor(run.history[x], dtype=torch.float64)
        index = torch.searchsorted(own, torch.tensor(at).double(), right=True) - 1
        columns.append([run.history[y][i] for i in index.clamp(min=0).tolist()])
    return at, [statistics.median(values) for values in zip(*columns, strict=True)]


def draw_panel(axis: Axes, panel: Panel, seeds: bool) -> None:
    x, y = panel.x, panel.y
    for method, runs in panel.runs.items():
        color = f"C{ALL.index(method)}"
        for run in runs if seeds and len(runs) > 1 else ():
            axis.step(run.history[x], run.history[y], where="post", color=color, alpha=0.25, linewidth=0.6)
        axis.step(*median_curve(runs, x, y), where="post", color=color, label=method, linewidth=1.6)
    ylabel = {"gradient": "‖gradient‖", "loss": "training loss"}.get(y, y + " accuracy")
    axis.set(xscale="log", xlabel=x, ylabel=ylabel, yscale="linear" if y == "test" else "log")
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)


def write_curves(path: Path, panels: Sequence[Panel], seeds: bool = True) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), constrained_layout=True)
    for axis, panel in zip(axes, panels, strict=True):
        draw_panel(axis, panel, seeds)
    fullest = max(range(len(panels)), key=lambda i: (len(panels[i].runs), i))
    axes[fullest].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Plot: {path}")

"""Tables and curves of the runs: training loss, and test accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import table
from benchmarks.training.problems import ALL, NEWTONS, PARTS, Problem
from benchmarks.training.runs import Run, Runs

LOSS_LEVELS, GRADIENT_LEVELS = (1e-2, 1e-6, 1e-10), (1e-4, 1e-8, 1e-12)


def median_and_range(values: list[float], form: str, cap: float | None = None) -> str:
    """Median (least–largest), and how many were reached, if not all. inf: not reached, printed as beyond the cap."""

    def text(value: float) -> str:
        return format(value, form) if math.isfinite(value) else "–" if cap is None else f">{cap:g}"

    reached = sum(map(math.isfinite, values))
    if not reached:
        return text(math.inf)
    median = text(statistics.median(values))
    if len(values) > 1:
        median += f" ({text(min(values))}–{text(max(values))})"
    return median + (f", {reached} of {len(values)}" if reached < len(values) else "")


def values_used(values: list[float | None], none: str) -> str:
    """Each different value of a setting once."""
    finite = sorted({value for value in values if value is not None})
    return ", ".join([f"{value:g}" for value in finite] + [none] * (None in values))


def loss_table(problem: Problem, runs: Runs) -> list[str]:
    """Times to each level, of the loss or, with weight decay, of the gradient norm."""
    key, levels = ("gradient", GRADIENT_LEVELS) if problem.weight_decay else ("loss", LOSS_LEVELS)
    symbol = "‖g‖ " if problem.weight_decay else ""
    header = ["method", "rate", *(f"s to {symbol}{level:.0e}" for level in levels), "steps", "final loss", "ms a step"]
    header += ["final ‖g‖", "converged"] if problem.weight_decay else []
    rows = []
    for method, done in runs.items():
        cells = [method, values_used([run.settings["rate"] for run in done], "–")]
        cells += [
            median_and_range([run.seconds_to(level, key) for run in done], ".3g", problem.cap) for level in levels
        ]
        cells.append(median_and_range([run.last("steps") for run in done], ".0f"))
        cells.append(median_and_range([run.last() for run in done], ".4g" if problem.weight_decay else ".1e"))
        per_step = [1e3 * run.last("seconds") / max(run.last("steps"), 1) for run in done]
        cells.append(f"{statistics.median(per_step):.3g}")
        if problem.weight_decay:
            cells.append(median_and_range([run.last("gradient") for run in done], ".1e"))
            cells.append(f"{sum(run.ended == 'converged' for run in done)} of {len(done)}")
        rows.append(cells)
    return [*table(header, rows), "", *speedups(problem, runs, key, levels)]


def speedups(problem: Problem, runs: Runs, key: str, levels: tuple[float, ...]) -> list[str]:
    """For each level the median times of newton and of the best rival, and their ratio."""
    lines, cap = [], problem.cap
    for level in levels:
        medians = {m: statistics.median([run.seconds_to(level, key) for run in done]) for m, done in runs.items()}
        rivals = {m: value for m, value in medians.items() if m not in NEWTONS}
        if not rivals or "newton" not in medians or not math.isfinite(min(medians["newton"], *rivals.values())):
            continue
        best, newton = min(rivals, key=lambda m: rivals[m]), medians["newton"]
        ours = f"{newton:.3g} s" if math.isfinite(newton) else f">{cap:g} s"
        theirs = f"best rival {best} {rivals[best]:.3g} s" if math.isfinite(rivals[best]) else f"no rival in {cap:g} s"
        line = f"{'‖g‖' if key == 'gradient' else 'Loss'} {level:.0e}, medians: newton {ours}, {theirs}"
        if math.isfinite(newton):
            more_than = "" if math.isfinite(rivals[best]) else "more than "
            line += f": {more_than}{min(rivals[best], cap) / newton:.3g} times"
        lines.append(line + ".")
    return lines


def accuracies_by_seed(runs: list[Run]) -> dict[int, float]:
    """By seed, in percent, at the step that validation chose."""
    return {run.settings["seed"]: 100 * run.at_best("test") for run in runs}


def accuracy_table(problem: Problem, runs: Runs) -> list[str]:
    header = ["method", "rate", "batch", "weight decay", "test accuracy, %", "newton − it: mean ± standard error"]
    header += ["its second", "loss then"]
    newton = accuracies_by_seed(runs.get("newton", []))
    rows = []
    for method, done in runs.items():
        accuracies = accuracies_by_seed(done)
        cells = [method, values_used([run.settings["rate"] for run in done], "–")]
        cells.append(values_used([run.settings["batch"] for run in done], "all"))
        cells.append(values_used([run.settings["decay"] for run in done], ""))
        cells.append(median_and_range(list(accuracies.values()), ".1f"))
        cells.append("–" if method == "newton" else mean_difference(problem, newton, accuracies))
        cells.append(median_and_range([run.at_best("seconds") for run in done], ".2g"))
        cells.append(median_and_range([run.at_best("loss") for run in done], ".1e"))
        rows.append(cells)
    return ["", *table(header, rows)]


def mean_difference(problem: Problem, ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Ours − theirs over the seeds that both have.

    The standard error is s √(1/n + n_test / n_train) (Nadeau & Bengio 2003). s/√n would take the parts for independent,
    but they share images.
    """
    values = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if len(values) < 2:
        return "–"
    num_train, _, num_test = PARTS[problem.data]
    error = statistics.stdev(values) * math.sqrt(1 / len(values) + num_test / num_train)
    missing = "" if len(values) == problem.accuracy_seeds else f", {len(values)} of {problem.accuracy_seeds} seeds"
    return f"{statistics.mean(values):+.2f} ± {error:.2f}{missing}"


# ------------------------------------------------------------------------------------------------------ curves


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


def write_curves(path: Path, panels: Sequence[Panel], seeds: bool = True) -> None:
    """One picture. seeds: draw each seed faint, beside the median."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), constrained_layout=True)
    for axis, (title, by_method, x, y) in zip(axes, panels, strict=True):
        for method, runs in by_method.items():
            color = f"C{ALL.index(method)}"
            for run in runs if seeds and len(runs) > 1 else ():
                axis.step(run.history[x], run.history[y], where="post", color=color, alpha=0.25, linewidth=0.6)
            axis.step(*median_curve(runs, x, y), where="post", color=color, label=method, linewidth=1.6)
        ylabel = {"gradient": "‖gradient‖", "loss": "training loss"}.get(y, y + " accuracy")
        axis.set(xscale="log", xlabel=x, ylabel=ylabel, yscale="linear" if y == "test" else "log")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    fullest = max(range(len(panels)), key=lambda i: (len(panels[i].runs), i))
    axes[fullest].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Plot: {path}")

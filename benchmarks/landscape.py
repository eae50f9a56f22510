"""The exact Hessian along training: eigenvalue counts and log|det| of a small GPT and a small ResNet at every point.

And seconds to a loss, by Adam and by `DampedNewton`.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.example_networks import GPT, ResNet, lenet_of_digits
from benchmarks.problems import Data
from benchmarks.reach import standardized_digits
from benchmarks.report import Report, table
from hessian import TrackedNetwork, factorize_hessian
from newton import DampedNewton

DAMPINGS = (1e-3, 1e-2, 0.1)  # ε: eigenvalues below −ε are counted
RATE = 3e-3
TARGETS = (0.1, 1e-3, 1e-6)  # losses
ADAM_RATES = (3e-3, 1e-2, 3e-2, 0.1)


def text_windows(windows: int, length: int) -> Data:
    """The Zen of Python, as characters: each window and the one that begins a character later."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself
        text = codecs.decode(importlib.import_module("this").s, "rot13").lower()
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(c) for c in text])
    x = torch.stack([codes[length * i : length * (i + 1) + 1] for i in range(windows)])
    return x[:, :-1], x[:, 1:]


def digits(samples: int) -> Data:
    x, y = standardized_digits(samples)
    return x.view(-1, 1, 8, 8), y


class Task(NamedTuple):
    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Data]

    def start(self) -> tuple[TrackedNetwork, Data]:
        torch.manual_seed(0)
        return TrackedNetwork(self.make().double().eval()), self.data()


def tasks(quick: bool, width: int, windows: int, channels: int, images: int) -> list[Task]:
    if quick:
        width, windows, channels, images = 2, 2, 2, 8
    gpt, resnet = partial(GPT, 2, width, 2, 16, 32), partial(ResNet, 2, channels, 10, stride=2)
    return [
        Task(f"GPT, 2 blocks of width {width}, {16 * windows} characters", gpt, partial(text_windows, windows, 16)),
        Task(f"ResNet, 2 blocks of {channels} channels, {images} digits", resnet, partial(digits, images)),
    ]


# ------------------------------------------------------------------------------------------------------ landscape


class Point(NamedTuple):
    """One point of a training run."""

    step: int
    loss: float
    below: tuple[int, ...]  # eigenvalues below −ε, by ε
    logabsdet: float  # at the least ε
    certified: int  # counts of them that are proved


class Run(NamedTuple):
    task: Task
    num_parameters: int
    points: list[Point]


def point(model: TrackedNetwork, data: Data, step: int) -> Point:
    loss = model(*data, track_activations=True)
    f = factorize_hessian(model, loss, DAMPINGS[0], route="dense")  # H is formed once for all ε
    factors = [f, *(f.with_damping(damping) for damping in DAMPINGS[1:])]
    below = tuple(x.num_negative_eigenvalues for x in factors)
    return Point(step, loss.item(), below, f.logabsdet, sum(x.inertia_is_certified for x in factors))


def train_by_adam(task: Task, steps: list[int]) -> Run:
    model, data = task.start()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    points, step = [], 0
    for stop in tqdm(steps, desc=task.name, disable=None):
        while step < stop:
            optimizer.zero_grad()
            model(*data).backward()
            optimizer.step()
            step += 1
        points.append(point(model, data, step))
    return Run(task, sum(p.numel() for p in model.parameters()), points)


def landscape(quick: bool, picture: Path) -> list[str]:
    """The table; the picture goes to a file."""
    steps = [0, 1, 10] if quick else [0, *sorted({round(10 ** (k / 5)) for k in range(18)})]
    runs = [train_by_adam(task, steps) for task in tasks(quick, 8, 8, 6, 32)]
    draw(runs, picture)
    lines = []
    for run in runs:
        header = ["step", "loss", *(f"below −{e:g}" for e in DAMPINGS), f"log\\|det(H + {DAMPINGS[0]:g} I)\\|"]
        header.append(f"counts certified, of {len(DAMPINGS)}")
        rows = [[p.step, p.loss, *p.below, f"{p.logabsdet:,.1f}", p.certified] for p in run.points]
        lines += [f"{run.task.name}, P = {run.num_parameters:,}:", "", *table(header, rows), ""]
    certified, total = sum(p.certified for r in runs for p in r.points), len(runs) * len(steps) * len(DAMPINGS)
    lines.append(
        f"Adam, rate {RATE:g}, whole batch. {certified} of {total} counts are certified (`inertia_is_certified`)."
    )
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Loss, eigenvalue counts and log|det| against steps, a column for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(6 * len(runs), 7.5), layout="constrained")
    figure.suptitle("The Hessian along training, by exact inertia", fontsize="large")
    axes = figure.subplots(3, len(runs), sharex=True, squeeze=False, height_ratios=(1, 2.6, 1))
    colors = plt.get_cmap("inferno_r")(torch.linspace(0.12, 0.8, len(DAMPINGS)).tolist())
    for (top, middle, bottom), (task, P, points) in zip(axes.T, runs, strict=True):
        steps = [p.step for p in points]
        top.semilogy(steps, [p.loss for p in points], color="black", marker=".")
        top.set_title(f"{task.name}\n{P:,} parameters", fontsize="medium")
        for index, (damping, color) in enumerate(zip(DAMPINGS, colors, strict=True)):
            counts = [p.below[index] for p in points]
            middle.fill_between(steps, counts, color=color, label=f"below −{damping:g}", linewidth=0)
            middle.plot(steps, counts, color="white", linewidth=0.8)
        middle.set_ylim(0)
        bottom.plot(steps, [p.logabsdet for p in points], color=colors[-1], marker=".")
        bottom.set_xscale("symlog", linthresh=1)
        bottom.set(xlim=(0, steps[-1]), xlabel="steps of Adam")
    axes[1, -1].legend(frameon=False)
    labels = "loss", "eigenvalues of H", f"log|det(H + εI)|\nε = {DAMPINGS[0]:g}"
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    figure.align_ylabels()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"Plot: {path}")


# ------------------------------------------------------------------------------------------------------ training


def adam_steps(model: TrackedNetwork, data: Data, rate: float) -> Iterator[float]:
    """Losses before each step."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    while True:
        optimizer.zero_grad()
        loss = model(*data)
        loss.backward()
        yield loss.item()
        optimizer.step()


def newton_steps(model: TrackedNetwork, data: Data, metric: str) -> Iterator[float]:
    """Losses before each step."""
    optimizer = DampedNewton(model, metric=metric)
    while not (optimizer.converged or optimizer.stalled):
        yield optimizer.step(lambda: model(*data, track_activations=True)).item()


class Timed(NamedTuple):
    """A run until it met all targets, or its time was over."""

    to_targets: list[float | None]  # seconds
    steps: int
    seconds: float
    loss: float

    @property
    def rank(self) -> tuple[float, ...]:
        """The lower, the better: seconds to the last target first."""
        return tuple(math.inf if x is None else x for x in reversed(self.to_targets))

    def row(self) -> list[object]:
        return [*self.to_targets, self.steps, 1e3 * self.seconds / max(1, self.steps), f"{self.loss:.0e}"]


def timed(losses: Iterator[float], max_seconds: float) -> Timed:
    found: list[float | None] = []
    started, steps = time.process_time(), -1
    for loss in losses:  # the first is that before any step
        steps += 1
        elapsed = time.process_time() - started
        while len(found) < len(TARGETS) and loss <= TARGETS[len(found)]:
            found.append(elapsed)
        if len(found) == len(TARGETS) or elapsed > max_seconds:
            break
    return Timed(found + [None] * (len(TARGETS) - len(found)), steps, elapsed, loss)


def training(quick: bool) -> Report:
    max_seconds, rows = (2 if quick else 15), []
    images = 8 if quick else 32
    lenet = Task(f"LeNet, {images} digits", lenet_of_digits, partial(digits, images))
    for task in [*tasks(quick, 8, 4, 4, images), lenet]:
        model, _ = task.start()
        name = f"{task.name}, P = {sum(p.numel() for p in model.parameters()):,}"
        by_adam = {
            rate: timed(adam_steps(*task.start(), rate), max_seconds) for rate in ADAM_RATES[:: 3 if quick else 1]
        }
        rate, best = min(by_adam.items(), key=lambda item: item[1].rank)
        rows.append([name, f"Adam, rate {rate:g}", *best.row()])
        for metric in ("parameter", "state"):
            found = timed(newton_steps(*task.start(), metric), max_seconds)
            rows.append([name, f"DampedNewton, metric='{metric}'", *found.row()])
    header = ["network", "method", *(f"s to {target:g}" for target in TARGETS), "steps", "ms a step", "loss then"]
    notes = [
        "",
        "Whole batch, one seed, the same start. Seconds are of the processor, whatever else the machine does. "
        f"A run ends at the last target, or after {max_seconds} s; –: not reached. Adam: the best of the rates "
        f"{', '.join(f'{rate:g}' for rate in by_adam)}.",
    ]
    return Report([*table(header, rows), *notes])

"""One run, the stored runs, and the choice of each method's settings."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.training.methods import step_function
from benchmarks.training.objective import Job, StepFunction, accurate_loss
from benchmarks.training.problems import NEWTONS, Problem, Split, initial_model, load
from hessian import DeepMLPWithTracking

RIVAL_LEVEL, NEWTON_LEVEL = 1e-12, 1e-20  # losses of a fixed batch at which a run stops
CHOICE_SEEDS = (1000, 1001, 1002)  # kept aside to choose settings; the first alone for the training loss
CHOICE_SECONDS = 15.0
LEARNING_RATES = {  # of Hessian-free: initial dampings
    "sgd": (1e-3, 1e-2, 3e-2, 1e-1),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (1e-3, 5e-3, 2e-2, 5e-2),
    "lbfgs": (0.1, 0.3, 1.0, 2.0),
    "hessian_free": (1e-2, 1e-1, 1.0, 10.0),
}
FIRST_ORDER, FIRST_ORDER_BATCH = ("sgd", "adam", "muon"), 64  # their batch for the training loss
BATCHES: dict[str, tuple[int | None, ...]] = {  # for test accuracy; None: all samples
    "newton": (512, 256, 128, None),
    **dict.fromkeys(FIRST_ORDER, (FIRST_ORDER_BATCH, 16, 256, 1024)),
}
L2_DECAYS, DECOUPLED_DECAYS = (0.0, 1e-4, 1e-3, 1e-2), (0.0, 1e-2, 1e-1, 1.0)


class Run(NamedTuple):
    settings: dict
    history: dict[str, list[float]]  # by name: steps, seconds, loss, …
    ended: str  # why
    cpu_share: float  # of one core

    def last(self, name: str = "loss") -> float:
        value = self.history[name][-1]
        return value if math.isfinite(value) else math.inf

    def seconds_to(self, level: float, name: str = "loss") -> float:
        pairs = zip(self.history["seconds"], self.history[name], strict=True)
        return next((seconds for seconds, value in pairs if value <= level), math.inf)

    def best_index(self) -> int:
        """The entry with the greatest validation accuracy; among equals, with the least validation loss."""
        losses = [x if math.isfinite(x) else math.inf for x in self.history["validation_loss"]]
        return max(range(len(losses)), key=lambda i: (self.history["validation"][i], -losses[i]))

    def at_best(self, name: str) -> float:
        return self.history[name][self.best_index()]


# ------------------------------------------------------------------------------------------------------ one run


@torch.no_grad()
def accuracy(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def observe(job: Job, model: DeepMLPWithTracking, split: Split) -> dict[str, float]:
    """Loss, gradient norm, accuracies. Never on the clock."""
    w, seen = job.problem.weight_decay, {"loss": accurate_loss(model, *split.train).item()}
    if w:
        parameters = list(model.parameters())
        with torch.enable_grad():
            gradients = torch.autograd.grad(accurate_loss(model, *split.train), parameters)
        squares = sum(((g + w * p) ** 2).sum().item() for g, p in zip(gradients, parameters, strict=True))
        seen["loss"] += 0.5 * w * sum((p**2).sum().item() for p in parameters)
        seen["gradient"] = math.sqrt(squares)
    if split.validation:
        seen["validation"] = accuracy(model, *split.validation)
        seen["validation_loss"] = accurate_loss(model, *split.validation).item()
    if split.test:
        seen["test"] = accuracy(model, *split.test)
    return seen


def train(
    step: StepFunction, look: Callable[[], dict[str, float]], cap: float, level: float, description: str
) -> tuple[dict[str, list[float]], str, float]:
    """The one loop: the history, why it ended, and the share of a core that it had.

    It looks after every step at first, later whenever the count has grown by a hundredth.
    """
    history: dict[str, list[float]] = {"steps": [], "seconds": []}
    count, elapsed, cpu, next_look, ended = 0, 0.0, 0.0, 0, ""
    form = "{desc} {bar} {postfix}"
    with tqdm(total=round(cap, 1), desc=description, disable=None, leave=False, bar_format=form) as bar:
        while True:
            ended = ended or ("cap" if elapsed >= cap else "")
            if count >= next_look or ended:
                seen = look()
                for name, value in {"steps": count, "seconds": elapsed, **seen}.items():
                    history.setdefault(name, []).append(value)
                next_look = max(count + 1, math.ceil(1.01 * count))
                bar.set_postfix_str(f"step {count}, loss {seen['loss']:.3e}", refresh=False)
                bar.update(min(elapsed, cap) - bar.n)
                if not math.isfinite(seen["loss"]):
                    ended = "not finite"
                elif seen["loss"] <= level:
                    ended = "level"
            if ended:
                return history, ended, cpu / max(elapsed, 1e-9)
            started, cpu_started = time.perf_counter(), time.process_time()
            try:
                done = step()
                count += done.iterations
                ended = "converged" if done.converged else ""
            except torch.linalg.LinAlgError as error:
                ended = f"error: {error}"
            elapsed, cpu = elapsed + time.perf_counter() - started, cpu + time.process_time() - cpu_started


def run_job(job: Job, warm_up: bool) -> Run:
    split = load(job.problem, job.seed, job.track == "accuracy")
    num_inputs = split.train[0].shape[1]
    model = initial_model(job.problem, num_inputs, job.seed)
    if warm_up:  # the first step of a process loads libraries, which is not the method's time
        step_function(job, initial_model(job.problem._replace(num_layers=4), num_inputs, 0), split.train)()
    step = step_function(job, model, split.train)
    level = 0.0
    if job.problem.samples:
        level = NEWTON_LEVEL if job.method in NEWTONS else RIVAL_LEVEL
    return Run(job.settings, *train(step, lambda: observe(job, model, split), job.cap, level, f"{job.label:32}"))


# --------------------------------------------------------------------------------------------------- stored runs


class Session:
    """Runs of one problem, one JSON each. A stored run with the same settings is not run again.

    redo: methods whose runs are done once more.
    """

    def __init__(self, name: str, folder: Path, redo: tuple[str, ...], quick: bool):
        self.name, self.folder, self.redo, self.quick = name, folder, redo, quick
        self.warm: set[str] = set()  # methods
        self.redone: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, job: Job) -> Run:
        path = self.folder / f"{job.label}.json"
        if path.exists() and (job.method not in self.redo or path in self.redone):
            stored = Run(**json.loads(path.read_text()))
            if stored.settings == job.settings:
                return stored
        done = run_job(job._replace(label=f"{self.name} {job.label}"), job.method not in self.warm)
        self.warm.add(job.method)
        self.redone.add(path)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(done._asdict()))
        os.replace(temporary, path)
        return done


Runs = dict[str, list[Run]]  # by method


def stored_runs(folder: Path, problem: Problem, track: str) -> Runs:
    """The runs of each method under the present settings, methods in the problem's order."""
    runs: Runs = {}
    present = json.loads(json.dumps(problem.settings()))
    for method in problem.methods:
        label = method if track == "loss" else f"{method}-accuracy"
        for seed in problem.seed_range(track):
            path = folder / f"{label}-seed{seed}.json"
            if path.exists():
                run = Run(**json.loads(path.read_text()))
                same_parts = run.settings.get("parts") == (None if problem.samples else seed)
                if run.settings["cap"] == problem.cap and same_parts and run.settings["problem"] == present:
                    runs.setdefault(method, []).append(run)
    return runs


# ----------------------------------------------------------------------------------------------------- protocol


class Choice(NamedTuple):
    rate: float | None
    batch: int | None
    decay: float


def run_method(session: Session, problem: Problem, method: str) -> None:
    """Choose the rate by the training loss and run every seed. On a data set, the same for test accuracy."""
    seconds = min(CHOICE_SECONDS, problem.cap) / (2 if session.quick else 1)

    def trained(track: str, seed: int, cap: float, choice: Choice, label: str) -> Run:
        return session.run(Job(problem, method, seed, cap, *choice, track, label))

    tried = 2 if session.quick else 4  # of the rates and batches
    rates = LEARNING_RATES.get(method, (None,))[:tried]
    choice = Choice(rates[0], FIRST_ORDER_BATCH if method in FIRST_ORDER else None, problem.weight_decay)

    def speed(choice: Choice) -> tuple[float, float]:
        """Least for the fastest run to RIVAL_LEVEL; if none gets there, for the least loss."""
        run = trained("loss", CHOICE_SEEDS[0], seconds, choice, f"rate-{method}-{choice.rate:g}")
        return max(run.last(), RIVAL_LEVEL), run.seconds_to(RIVAL_LEVEL)

    if len(rates) > 1:
        choice = min((choice._replace(rate=rate) for rate in rates), key=speed)
    for seed in problem.seed_range("loss"):
        trained("loss", seed, problem.cap, choice, f"{method}-seed{seed}")
    if problem.samples:
        return

    def score(choice: Choice) -> tuple[float, float]:
        """Means over the seeds of the validation accuracy and of the negative validation loss."""
        label = f"choice-{method}-{choice.rate}-{choice.batch}-{choice.decay}"
        seeds = CHOICE_SEEDS[:1] if session.quick else CHOICE_SEEDS
        runs = [trained("accuracy", seed, seconds, choice, f"{label}-seed{seed}") for seed in seeds]
        accuracies, losses = ([run.at_best(name) for run in runs] for name in ("validation", "validation_loss"))
        return statistics.mean(accuracies), statistics.mean(-loss for loss in losses)

    batches = BATCHES.get(method, (None,))[:tried]
    decays = DECOUPLED_DECAYS if method in ("adam", "muon") else L2_DECAYS
    choice = Choice(rates[0], batches[0], decays[2])  # the decay is chosen last
    choice = max((choice._replace(rate=rate) for rate in rates), key=score)
    choice = max((choice._replace(batch=batch) for batch in batches), key=score)
    if not session.quick:
        choice = max((choice._replace(decay=decay) for decay in decays), key=score)
    for seed in problem.seed_range("accuracy"):
        trained("accuracy", seed, problem.cap, choice, f"{method}-accuracy-seed{seed}")

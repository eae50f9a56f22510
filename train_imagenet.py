"""Train a deep fully connected network on ImageNet, by SGD or with exact damped Gauss–Newton steps.

    python3 train_imagenet.py --data-dir DIR --batch-size 256 --epochs 90 --lr 0.1 --hidden-dim 512 --num-layers 20
    python3 train_imagenet.py --data-dir DIR --batch-size 64 --epochs 90 --lr 0.01 --hidden-dim 256 --num-layers 20 \\
                              --use-hessian --hessian-freq 1 --device cuda
    torchrun --nproc-per-node=4 train_imagenet.py …      # the batch of one process, shared out
    python3 train_imagenet.py … --resume                 # goes on, bit for bit on the CPU, after whatever ended the run
    python3 train_imagenet.py --estimate                 # what a Hessian step costs here, and what fits where
    python3 train_imagenet.py --dummy …                  # generated images

DIR/train/n01440764/*.JPEG and DIR/val/n01440764/*.JPEG, any number of classes. Both methods run the same loop and
differ in their step alone: SGD with momentum, weight decay, warm-up and a cosine; with --use-hessian every
--hessian-freq-th batch takes a `DampedNewton` step (newton.py), which finds its own length. Prints one line an epoch,
and writes checkpoints, config.json, metrics.csv and curves.png to --checkpoint-dir. SIGTERM and Ctrl-C end the run
after the present step, with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hessian import ACTIVATIONS, DeepMLPWithTracking
from imagenet_data import (
    DUMMY_CLASSES,
    DUMMY_IMAGES,
    Batch,
    Batches,
    DataError,
    available_cores,
    loader_of,
    open_data,
    standardized,
)
from imagenet_plan import build_model, choose_by_cost, print_estimates
from imagenet_runtime import (
    RunError,
    Signals,
    World,
    join_world,
    latest_checkpoint,
    random_states,
    read_checkpoint,
    set_random_states,
    write_durably,
)
from newton import DampedNewton, StepReport

MOMENTUM, STEP_EPOCHS, STEP_FACTOR = 0.9, 30, 0.1
WARM_UP = 5 / 90  # of the epochs
# what the state of a run means nothing without
MUST_MATCH = (
    "num_layers", "hidden_dim", "num_classes", "image_size", "grayscale", "activation", "residual", "precision",
    "use_hessian", "batch_size", "seed", "num_images", "ranks",
)  # fmt: skip

CHANGES_NUMBERS = (
    "epochs", "lr", "lr_schedule", "warmup_epochs", "weight_decay", "clip_grad_norm", "amp", "augment", "hessian_freq",
    "hessian_batch_size", "curvature", "metric", "damping", "threads", "torch",
)  # fmt: skip


class NotFiniteError(Exception):
    """The loss of a batch is NaN or infinite."""


class Stopped(Exception):
    """By a signal, after a checkpoint."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


# ------------------------------------------------------------------------------------------------------ methods


class Step(NamedTuple):
    samples: int  # of all ranks
    loss: float  # their mean, before the step
    forward_seconds: float
    hessian_seconds: float = 0.0
    report: StepReport | None = None


def checked_loss(total: float, samples: float) -> float:
    if not samples:
        raise RunError("a whole batch could not be read: see the warnings above")
    if not math.isfinite(total):
        raise NotFiniteError
    return total / samples


class PlainStep:
    """SGD with momentum, each rank's gradient weighted by its share of the samples."""

    def __init__(
        self, model: DeepMLPWithTracking, world: World, args: argparse.Namespace, rate: Callable[[int], float]
    ):
        self.world, self.args, self.rate = world, args, rate
        ids = [world.device] if world.device.type == "cuda" else None
        self.model = model
        self.shared = DistributedDataParallel(model, device_ids=ids) if world.ranks > 1 else model
        self.optimizer = torch.optim.SGD(model.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
        self.autocast = autocast_of(args, world.device)

    def __call__(self, x: Tensor, y: Tensor, number: int) -> Step:
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.shared(x, y) if len(x) else 0.0 * self.shared(x.new_zeros(1, self.model.input_dim)).sum()
        samples, total = self.world.sum(len(x), len(x) * loss.item())
        mean, forward = checked_loss(total, samples), time.perf_counter() - began
        if self.world.ranks > 1:  # the ranks' gradients are averaged
            loss = loss * (len(x) * self.world.ranks / samples)
        self.scaler.scale(loss).backward()
        if self.args.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Step(int(samples), mean, forward)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        load_numbers(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class NewtonStep:
    """A DampedNewton step on every `freq`-th batch, a plain one on the others.

    The batch is gathered, the first rank takes the step, and the others get its weights: they are equal to the bit,
    whatever the ranks' hardware.
    """

    def __init__(self, plain: PlainStep, newton: DampedNewton, freq: int):
        self.plain, self.newton, self.freq, self.world = plain, newton, freq, plain.world

    def __call__(self, x: Tensor, y: Tensor, number: int) -> Step:
        if number % self.freq:
            return self.plain(x, y, number)
        began = time.perf_counter()
        x, y = self.world.gather(x), self.world.gather(y)
        forward = loss = report = None

        def closure() -> Tensor:
            nonlocal forward, loss
            tracked = self.plain.model(x, y, track_activations=True)
            loss = checked_loss(tracked.item() * len(x), len(x))
            forward = time.perf_counter() - began
            return tracked

        if self.world.first:
            checked_loss(0.0, len(x))
            self.newton.step(closure)
            report = self.newton.report
        if self.world.ranks > 1:
            loss, forward = self.world.from_first(lambda: (loss, forward))
            for p in self.plain.model.parameters():
                dist.broadcast(p.detach(), 0)
        self.plain.optimizer.state.clear()  # momentum of before the step points elsewhere
        return Step(len(x), loss, forward, time.perf_counter() - began - forward, report)

    def state_dict(self) -> dict:
        return {"plain": self.plain.state_dict(), "newton": self.newton.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.plain.load_state_dict(state["plain"])
        load_numbers(self.newton, state["newton"])

    def set_damping(self, damping: float) -> None:
        """In place of the one that the steps before found."""
        for numbers in self.newton.state.values():
            numbers["damping"] = numbers["hessian_damping"] = damping


def load_numbers(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The optimizer's state, with the options of this run's flags; the rate is set by each step."""
    own = ("params", "lr")
    options = [{name: value for name, value in group.items() if name not in own} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, flags in zip(optimizer.param_groups, options, strict=True):
        group.update(flags)


def autocast_of(args: argparse.Namespace, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    if args.amp is None:
        return contextlib.nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    return lambda: torch.autocast(device.type, dtype)


def rate_of(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the step's number alone."""
    warm_up = (args.epochs * WARM_UP if args.warmup_epochs is None else args.warmup_epochs) * steps_per_epoch
    total = args.epochs * steps_per_epoch

    def rate(number: int) -> float:
        if number < warm_up:
            return args.lr * (number + 1) / (warm_up + 1)
        if args.lr_schedule == "step":
            return args.lr * STEP_FACTOR ** (number // steps_per_epoch // STEP_EPOCHS)
        return args.lr * 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(total - warm_up, 1)))

    return rate


# -------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Progress:
    """Where the run is, and all that it says about itself."""

    epoch: int = 0
    batch: int = 0  # the next one; the number of batches where only validation is left
    sums: dict[str, float] = field(default_factory=dict)  # over the present epoch
    newton: dict[str, float] = field(default_factory=dict)  # of the last Newton step
    history: list[dict] = field(default_factory=list)  # one row of metrics.csv an epoch
    best: float = -1.0  # validation top-1
    bad: list[str] = field(default_factory=list)  # files that could not be read

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


def check_config(state: dict, config: dict, world: World) -> None:
    saved = state["config"]
    different = [name for name in MUST_MATCH if saved[name] != config[name]]
    if different:
        listed = ", ".join(f"{name} {saved[name]} there and {config[name]} here" for name in different)
        raise RunError(f"{state['path']} is of another run: {listed}. Pass what it has, or another --checkpoint-dir")
    for name in CHANGES_NUMBERS:
        if saved[name] != config[name] and world.first:
            print(f"warning: {name} was {saved[name]}, is {config[name]}: it goes on, not bit for bit", file=sys.stderr)


# --------------------------------------------------------------------------------------------------- one loop


@dataclass
class Run:
    args: argparse.Namespace
    config: dict
    world: World
    model: DeepMLPWithTracking
    step: PlainStep | NewtonStep
    train_loader: DataLoader
    val_loader: DataLoader
    rate: Callable[[int], float]
    signals: Signals
    progress: Progress = field(default_factory=Progress)
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return self.args.checkpoint_dir

    @property
    def batches(self) -> Batches:
        return self.train_loader.batch_sampler

    def state(self) -> dict:
        return {
            "config": self.config,
            "model": self.model.state_dict(),
            "step": self.step.state_dict(),
            "progress": asdict(self.progress),
            "random": random_states(),
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.step.load_state_dict(state["step"])
        if isinstance(self.step, NewtonStep) and self.args.damping != state["config"]["damping"]:
            self.step.set_damping(self.args.damping)
        self.progress = Progress(**state["progress"])
        set_random_states(state["random"])

    def save(self, best: bool = False) -> None:
        """By the first rank, which knows everything."""
        self.saved_at = time.monotonic()
        if not self.world.first:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise RunError(f"a weight is NaN or infinite: {remedy(self.args)}. The last checkpoint is kept")
        state = self.state()
        write_durably(self.folder / "last.pt", lambda file: torch.save(state, file), self.folder / "previous.pt")
        if best:
            write_durably(self.folder / "best.pt", lambda file: torch.save(state, file))

    def heed(self, batch: Batch) -> int:
        """What the ranks must agree on after each batch: files that can't be read, and the signal that came, or 0."""
        interrupted, terminated, bad = self.world.sum(
            self.signals.number == signal.SIGINT, self.signals.number == signal.SIGTERM, len(batch.bad)
        )
        if bad:
            for path, reason in sum(self.world.objects(batch.bad), []):
                if path not in self.progress.bad:
                    self.progress.bad.append(path)
                    if self.world.first:
                        print(f"warning: {path} can't be read and is skipped: {reason}", file=sys.stderr)
            if len(self.progress.bad) > self.args.max_bad_images:
                raise RunError(
                    f"{len(self.progress.bad)} images can't be read, the last one {self.progress.bad[-1]}: repair the "
                    f"files named above, or allow more than --max-bad-images {self.args.max_bad_images}"
                )
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0


def remedy(args: argparse.Namespace) -> str:
    if args.use_hessian:
        return "lower --lr, pass --clip-grad-norm 1 for the plain steps, or raise --damping"
    return "lower --lr, or pass --clip-grad-norm 1"


def on_device(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Images (n, inputs) and classes (n,)."""
    images, targets = (t.to(run.world.device, non_blocking=True) for t in (batch.images, batch.targets))
    dtype = next(run.model.parameters()).dtype
    if not len(targets):
        return torch.empty(0, run.model.input_dim, dtype=dtype, device=run.world.device), targets
    return standardized(images, dtype).flatten(1), targets


def progress_bar(run: Run, loader: DataLoader, name: str) -> tqdm:
    start = loader.batch_sampler.start
    silent = None if run.world.first else True  # None: where stderr is no terminal
    return tqdm(loader, name, total=len(loader.batch_sampler), initial=start, disable=silent, leave=False)


def train_epoch(run: Run) -> None:
    """From the next batch to the end of the epoch; Stopped after a checkpoint where a signal came."""
    progress, per_epoch = run.progress, len(run.batches)
    run.batches.epoch, run.batches.start = progress.epoch, progress.batch
    ended = time.perf_counter()
    for batch in progress_bar(run, run.train_loader, f"epoch {progress.epoch + 1}"):
        began = time.perf_counter()
        try:
            done = run.step(*on_device(run, batch), progress.epoch * per_epoch + progress.batch)
        except NotFiniteError as error:
            raise RunError(not_finite(run, batch)) from error
        number = run.heed(batch)
        progress.batch += 1
        progress.add(
            samples=done.samples,
            loss=done.loss * done.samples,
            data=began - ended,
            forward=done.forward_seconds,
            hessian=done.hessian_seconds,
            seconds=time.perf_counter() - ended,
        )
        if done.report:
            progress.newton = {name: getattr(done.report, name) for name in ("method", "damping", "length", "accepted")}
        if number:
            run.save()
            raise Stopped(number)
        if time.monotonic() - run.saved_at >= 60 * run.args.checkpoint_minutes:
            run.save()
        ended = time.perf_counter()


def not_finite(run: Run, batch: Batch) -> str:
    path = run.folder / f"nan-batch-rank{run.world.rank}.json"
    names = [run.train_loader.dataset.name(index) for index in batch.indices]
    where = {"epoch": run.progress.epoch + 1, "batch": run.progress.batch, "files": names}
    write_durably(path, json.dumps(where, indent=1).encode())
    return (
        f"the loss is NaN or infinite at epoch {where['epoch']}, batch {where['batch']} (its files: {path}): "
        f"{remedy(run.args)}. The last checkpoint is kept: --resume goes on from it"
    )


class Scores(NamedTuple):
    loss: float
    top1: float  # %
    top5: float


@torch.no_grad()
def evaluate(run: Run) -> Scores:
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in progress_bar(run, run.val_loader, "validation"):
        if len(batch.targets):
            x, y = on_device(run, batch)
            with autocast_of(run.args, run.world.device)():
                logits = run.model(x)
            ranks = (~(logits <= logits.gather(1, y[:, None]))).sum(1)  # of the right class; last where it is NaN
            loss = F.cross_entropy(logits.double(), y, reduction="sum")
            sums += torch.stack([loss, (ranks < 1).sum(), (ranks < 5).sum(), torch.tensor(len(y))]).double().cpu()
        if number := run.heed(batch):
            run.save()
            raise Stopped(number)
    loss, top1, top5, count = run.world.sum(*sums.tolist())
    if not count:
        raise RunError("no validation image could be read: see the warnings above")
    return Scores(loss / count, 100 * top1 / count, 100 * top5 / count)


def check_equal_weights(run: Run) -> None:
    if run.world.ranks == 1:
        return
    digest = hashlib.sha256()
    for p in run.model.parameters():
        digest.update(p.detach().cpu().numpy())
    if len(hashes := set(run.world.objects(digest.hexdigest()))) > 1:
        raise RunError(f"the ranks hold {len(hashes)} different sets of weights: resume from the last checkpoint")


def finish_epoch(run: Run) -> None:
    """Validate, print the line, save."""
    check_equal_weights(run)
    scores, progress, sums = evaluate(run), run.progress, run.progress.sums
    exact = progress.newton.get("method") == "hessian" and progress.newton["accepted"]
    progress.history.append(
        {
            "epoch": progress.epoch + 1,
            "train_loss": sums["loss"] / sums["samples"],
            "val_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            "rate": run.rate((progress.epoch + 1) * len(run.batches) - 1),
            "damping": progress.newton.get("damping", ""),
            "length": progress.newton.get("length", ""),
            "negative_eigenvalues": 0 if exact else "",  # of H + λD: the factorization found it positive definite
            "images_per_second": sums["samples"] / sums["seconds"],
            "seconds": sums["seconds"],
            "data_seconds": sums["data"],
            "forward_seconds": sums["forward"],
            "hessian_seconds": sums["hessian"],
        }
    )
    hessian = f" (Hessian: {sums['hessian']:.2f}s)" if run.args.use_hessian else ""
    progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, {}
    best = scores.top1 > progress.best
    progress.best = max(progress.best, scores.top1)
    run.save(best)
    row = progress.history[-1]
    run.world.say(
        f"Epoch {row['epoch']}: Loss={row['train_loss']:.4f}, Acc={row['top1']:.2f}%, "
        f"Time={row['seconds']:.2f}s{hessian}"
    )
    if run.world.first:
        write_metrics(run)


def write_metrics(run: Run) -> None:
    history, text = run.progress.history, io.StringIO()
    table = csv.DictWriter(text, list(history[0]))
    table.writeheader()
    table.writerows(history)
    write_durably(run.folder / "metrics.csv", text.getvalue().encode())
    write_curves(history, run.folder / "curves.png")
    if run.args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(run.folder / "tensorboard") as writer:
            for name, value in history[-1].items():
                if name != "epoch" and value != "":
                    writer.add_scalar(name, value, history[-1]["epoch"])


def write_curves(history: Sequence[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axis, names in ((losses, ("train_loss", "val_loss")), (accuracies, ("top1", "top5"))):
        for name in names:
            axis.plot(epochs, [row[name] for row in history], marker="." if len(epochs) < 40 else None, label=name)
        axis.set_xlabel("epoch")
        axis.legend()
        axis.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, dpi=100)
    write_durably(path, content.getvalue())


# ------------------------------------------------------------------------------------------------------ set-up


def build_step(args: argparse.Namespace, world: World, model: DeepMLPWithTracking, rate) -> PlainStep | NewtonStep:
    plain = PlainStep(model, world, args, rate)
    if not args.use_hessian:
        return plain
    newton = DampedNewton(
        model,
        curvature=args.curvature,
        metric=args.metric,
        curvature_batch=args.hessian_batch_size,
        weight_decay=args.weight_decay,
        damping=args.damping,
        seed=args.seed,
    )
    return NewtonStep(plain, newton, args.hessian_freq)


def prepare_folder(args: argparse.Namespace) -> dict | None:
    """The state to go on from; without --resume, a run that is in the way is moved aside, so that nothing is lost."""
    folder = args.checkpoint_dir
    if args.resume is None:
        if (folder / "last.pt").exists() or (folder / "previous.pt").exists():
            aside = next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
            os.replace(folder, aside)
            print(f"{folder} held a run: it is in {aside} now. (--resume would have gone on with it.)", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume != "auto":
        return read_checkpoint(Path(args.resume))
    found = latest_checkpoint(folder)
    if found is None:
        if list(folder.glob("*.pt")):
            raise RunError(f"no checkpoint in {folder} is whole: start anew without --resume, which moves it aside")
        print(f"no checkpoint in {folder} yet: starting from the beginning", flush=True)
    return found


def evaluate_checkpoint(args: argparse.Namespace, world: World, signals: Signals) -> None:
    path = args.checkpoint_dir / "best.pt" if args.evaluate == "best" else Path(args.evaluate)
    state = world.from_first(lambda: read_checkpoint(path))
    for name in ("num_layers", "hidden_dim", "image_size", "grayscale", "activation", "residual", "precision"):
        setattr(args, name, state["config"][name])
    args.use_hessian = False
    run = build_run(args, world, signals, open_data(args), None)
    if run.config["num_classes"] != state["config"]["num_classes"]:
        raise RunError(
            f"{path} knows {state['config']['num_classes']} classes and {args.data_dir} has {run.config['num_classes']}"
        )
    run.model.load_state_dict(state["model"])
    scores = evaluate(run)
    world.say(f"{path}: Loss={scores.loss:.4f}, Top-1={scores.top1:.2f}%, Top-5={scores.top5:.2f}%")


def build_run(
    args: argparse.Namespace, world: World, signals: Signals, data: tuple[Dataset, Dataset, int], state: dict | None
) -> Run:
    """Everything up to the first step, which what doesn't fit never takes."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed % 2**32)
    random.seed(args.seed)
    train, val, num_classes = data
    if state is not None and args.hessian_batch_size is None:
        args.hessian_batch_size = state["config"]["hessian_batch_size"]
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    config |= {"num_classes": num_classes, "num_images": len(train)}
    config |= {"ranks": world.ranks, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    if state is not None:
        check_config(state, config, world)
    choose_by_cost(args, world, num_classes)
    config["hessian_batch_size"] = args.hessian_batch_size
    model = build_model(args, num_classes).to(world.device)
    loaders = [
        loader_of(data, batches, args.num_workers, pin_memory=world.device.type == "cuda")
        for data, batches in (
            (train, Batches(len(train), args.batch_size, args.seed, True, world.rank, world.ranks)),
            (val, Batches(len(val), args.batch_size, args.seed, False, world.rank, world.ranks)),
        )
    ]
    rate = rate_of(args, len(loaders[0].batch_sampler))
    return Run(args, config, world, model, build_step(args, world, model, rate), *loaders, rate, signals)


# ------------------------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data/imagenet"), help="has train/ and val/, one folder a class in each")
    add("--dummy", type=int, nargs="?", const=DUMMY_IMAGES[0], metavar="N", help="N generated images, or 1,281,167")
    add("--dummy-classes", type=int, default=DUMMY_CLASSES)
    add("--image-size", type=int, default=224)
    add("--grayscale", action="store_true", help="a third of the inputs")
    add("--augment", choices=("standard", "none"), default="standard", help="standard: a random crop, mirrored or not")
    add("--num-workers", type=int, default=min(8, available_cores()), help="processes that decode; 0: none")
    add("--max-bad-images", type=int, default=10, help="files that may be unreadable")
    add("--hidden-dim", type=int, default=512)
    add("--num-layers", type=int, default=20, help="linear layers, the last one included")
    add("--activation", choices=tuple(ACTIVATIONS), default="tanh")
    add("--residual", action="store_true", help="a skip around each layer of equal widths")
    add("--batch-size", type=int, default=256, help="of all ranks together")
    add("--epochs", type=int, default=90)
    add("--lr", type=float, default=0.1, help="of the plain steps")
    add("--weight-decay", type=float, default=1e-4, help="c of an L2 term ½c‖θ‖², in both kinds of step")
    add("--lr-schedule", choices=("cosine", "step"), default="cosine", help="step: a tenth every 30 epochs")
    add("--warmup-epochs", type=float, default=None, help="default: 5 of 90")
    add("--clip-grad-norm", type=float, default=0.0, help="of the plain steps; 0: not clipped")
    add("--amp", choices=("bf16", "fp16"), default=None, help="autocast of the plain steps and the validation")
    add("--precision", choices=("float32", "float64"), default="float32", help="of weights; solves are in float64")
    add("--use-hessian", action="store_true")
    add("--hessian-freq", type=int, default=1, help="a Hessian step on every N-th batch, plain ones on the others")
    add("--hessian-batch-size", type=int, default=None, help="images of the curvature; default: what memory and")
    add("--hessian-seconds", type=float, default=10.0, help="of a Hessian step, estimated, allow")
    add("--curvature", choices=("gauss_newton", "hessian", "auto"), default="gauss_newton")
    add("--metric", choices=("state", "parameter"), default="state", help="what the damping charges")
    add("--damping", type=float, default=1.0, help="the first one; each step finds its own")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--memory-gib", type=float, default=None, help="memory to plan for; default: what is free")
    add("--seed", type=int, default=0)
    add("--deterministic", action="store_true", help="deterministic algorithms on a GPU too")
    add("--checkpoint-dir", type=Path, default=Path("runs/imagenet"))
    add("--checkpoint-minutes", type=float, default=10.0)
    add("--resume", nargs="?", const="auto", metavar="FILE", help="default: the last whole one in --checkpoint-dir")
    add("--evaluate", nargs="?", const="best", metavar="FILE", help="top-1 and top-5 of a checkpoint, and no training")
    add("--estimate", action="store_true", help="print what fits for the recommended settings, and no training")
    add("--tensorboard", action="store_true")
    args = parser.parse_args(argv)
    for problem in problems(args):
        parser.error(problem)
    return args


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags."""
    positive = ("image_size", "hidden_dim", "num_layers", "batch_size", "epochs", "lr", "hessian_freq", "damping")
    positive += ("hessian_seconds", "dummy", "dummy_classes", "hessian_batch_size", "memory_gib")
    for name in positive:
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            yield f"--{name.replace('_', '-')} must be positive, got {value}"
    not_negative = ("num_workers", "max_bad_images", "weight_decay", "warmup_epochs", "clip_grad_norm")
    for name in (*not_negative, "checkpoint_minutes"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            yield f"--{name.replace('_', '-')} must be ≥ 0, got {value}"
    if (args.hessian_batch_size or 0) > args.batch_size:
        yield f"--hessian-batch-size {args.hessian_batch_size} is more than --batch-size {args.batch_size}"
    if args.amp and args.precision == "float64":
        yield "--amp is for --precision float32"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        yield f"--batch-size {args.batch_size}, that of all ranks, must be a multiple of the {ranks} ranks"


def check_extras(args: argparse.Namespace, device: torch.device) -> None:
    if args.use_hessian and device.type == "mps":
        raise RunError("the Hessian step needs float64 and mps has none: pass --device cpu, or leave out --use-hessian")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise RunError(f"--tensorboard needs a package ({error}): pip install tensorboard") from error


def train(args: argparse.Namespace, world: World, signals: Signals) -> None:
    check_extras(args, world.device)
    torch.set_flush_denormal(True)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.estimate:
        return print_estimates(args, world)
    if args.evaluate:
        return evaluate_checkpoint(args, world, signals)
    data = open_data(args)  # what is wrong with it is said before a run is moved aside
    state = world.from_first(lambda: prepare_folder(args))
    run = build_run(args, world, signals, data, state)
    world.say(json.dumps(run.config))
    if world.first:
        write_durably(run.folder / "config.json", json.dumps(run.config, indent=1).encode())
    if state is not None:
        run.load(state)
        world.say(f"going on from {state['path']}: epoch {run.progress.epoch + 1}, batch {run.progress.batch}")
    while run.progress.epoch < args.epochs:
        train_epoch(run)
        finish_epoch(run)
    world.say(f"Checkpoints, metrics.csv, curves.png: {run.folder}")


def known_failure(error: RuntimeError) -> str | None:
    """What torch means by some of its RuntimeErrors, and what to do."""
    said = str(error).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        return f"out of memory ({said}): pass a smaller --hessian-batch-size, --batch-size or --image-size; --resume"
    if "DataLoader worker" in said:
        return f"a process that decodes died ({said}): pass fewer --num-workers, and --resume"
    if dist.is_initialized():
        return f"rank {dist.get_rank()} lost the others: {said}"
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with Signals() as signals, join_world(args.device) as world:
            train(args, world, signals)
    except Stopped as stop:
        name = signal.Signals(stop.number).name
        print(f"stopped by {name}: --resume goes on from {args.checkpoint_dir / 'last.pt'}", file=sys.stderr)
        return 128 + stop.number
    except (RunError, DataError, OSError, MemoryError, torch.linalg.LinAlgError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if (known := known_failure(error)) is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

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

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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
    Images,
    available_cores,
    loader_of,
    open_data,
    standardized,
)
from imagenet_plan import build_model, choose_by_cost, print_estimates, shape_of
from imagenet_runtime import (
    RunError,
    Signals,
    World,
    check_equal_on_ranks,
    check_like,
    damage_named,
    is_number,
    join_world,
    latest_aside,
    latest_checkpoint,
    locked,
    move_run_aside,
    one_line,
    read_checkpoint,
    say,
    write_durably,
)
from newton import DampedNewton, StepReport

MOMENTUM, STEP_EPOCHS, STEP_FACTOR = 0.9, 30, 0.1
WARM_UP = 5 / 90  # of the epochs
# what the state of a run means nothing without
MUST_MATCH = (
    "num_layers", "hidden_dim", "num_classes", "image_size", "grayscale", "activation", "residual", "precision",
    "use_hessian", "batch_size", "seed", "num_images", "image_files", "ranks",
)  # fmt: skip

CHANGES_NUMBERS = (
    "epochs", "lr", "lr_schedule", "warmup_epochs", "weight_decay", "clip_grad_norm", "amp", "augment", "hessian_freq",
    "hessian_batch_size", "curvature", "metric", "damping", "threads", "torch",
)  # fmt: skip


# flags that describe the network; --evaluate takes them from the checkpoint
NETWORK = ("num_layers", "hidden_dim", "image_size", "grayscale", "activation", "residual", "precision")
LARGEST = 2**31  # integer flag
SUMS = ("samples", "loss", "data", "forward", "hessian", "seconds")
NO_NEWTON_STEP = {"method": "", "damping": 0.0, "length": 0.0, "accepted": False}


class NotFiniteError(Exception):
    """The loss of a batch is NaN or infinite."""


class Stopped(Exception):
    """A signal ended the run."""

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


def checked(loss: float) -> float:
    if not math.isfinite(loss):
        raise NotFiniteError
    return loss


def sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The ranks' gradients are summed. (The default, their mean, would need a loss that is larger by their number, and
    that overflows in fp16.)"""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class PlainStep:
    """SGD with momentum. Each rank's loss is weighted by its share of the samples, and the gradients are summed."""

    def __init__(
        self, model: DeepMLPWithTracking, world: World, args: argparse.Namespace, rate: Callable[[int], float]
    ):
        self.world, self.args, self.rate = world, args, rate
        ids = [world.device] if world.device.type == "cuda" else None
        self.model = model
        self.shared: torch.nn.Module = model
        if world.ranks > 1:
            self.shared = DistributedDataParallel(model, device_ids=ids)
            self.shared.register_comm_hook(None, sum_gradients)
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
        forward = time.perf_counter() - began
        if not samples:
            return Step(0, 0.0, forward)
        mean = checked(total / samples)
        self.scaler.scale(loss * (len(x) / samples)).backward()
        if self.args.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Step(int(samples), mean, forward)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if momenta := state["optimizer"]["state"]:  # none before the first step
            own = {index: {"momentum_buffer": p} for index, p in enumerate(self.model.parameters())}
            check_like(momenta, own, "optimizer")
        load_numbers(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            check_like(state["scaler"], self.scaler.state_dict(), "scaler")
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
        loss = forward = 0.0
        report = None
        if not len(x):
            return Step(0, loss, forward)

        def closure() -> Tensor:
            nonlocal forward, loss
            tracked = self.plain.model(x, y, track_activations=True)
            loss = checked(tracked.item())
            forward = time.perf_counter() - began
            return tracked

        if self.world.first:
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
        own, saved = self.newton.state_dict()["state"][0], state["newton"]["state"][0]
        size = sum(p.numel() for p in self.plain.model.parameters())
        for name in saved.keys() | own.keys():
            if name in own:
                check_like(saved[name], own[name], f"newton: {name}")
            elif isinstance(saved[name], Tensor):  # a step
                check_like(saved[name], next(self.plain.model.parameters()).new_empty(size), f"newton: {name}")
        load_numbers(self.newton, state["newton"])

    def set_damping(self, damping: float) -> None:
        """In place of the one that the steps before found."""
        for numbers in self.newton.state.values():
            numbers["damping"] = numbers["hessian_damping"] = damping


def load_numbers(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The optimizer's state, with the options of this run's flags; the rate is set by each step."""
    own = ("params", "lr")
    if [group["params"] for group in state["param_groups"]] != [list(range(len(optimizer.param_groups[0]["params"])))]:
        raise ValueError("the optimizer has other parameters")
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


class Row(NamedTuple):
    """A line of metrics.csv."""

    epoch: int
    train_loss: float
    val_loss: float
    top1: float  # %
    top5: float
    rate: float
    damping: float | str
    length: float | str
    negative_eigenvalues: int | str  # of H + λD; known where it was factorized
    images_per_second: float
    seconds: float
    data_seconds: float
    forward_seconds: float
    hessian_seconds: float


@dataclass
class Progress:
    """Where the run is, and what it has measured."""

    epoch: int = 0
    batch: int = 0  # the next one; the number of batches if only validation is left
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))  # over the present epoch
    newton: dict[str, Any] = field(default_factory=lambda: dict(NO_NEWTON_STEP))  # the last Newton step
    history: list[dict[str, Any]] = field(default_factory=list)  # a Row for each epoch
    best: float = -1.0  # validation top-1
    bad: list[str] = field(default_factory=list)  # files that could not be read

    @classmethod
    def restored(cls, saved: dict[str, Any], num_batches: int) -> "Progress":
        """The progress in a checkpoint; ValueError if it is damaged."""
        rows = saved["history"]
        check_like({**saved, "history": []}, asdict(cls()), "progress")
        if not (saved["epoch"] == len(rows) and 0 <= saved["batch"] <= num_batches):
            raise ValueError(f"epoch {saved['epoch']}, batch {saved['batch']} of {num_batches}, history {len(rows)}")
        for row in rows:
            if tuple(row) != Row._fields or not all(is_number(value) or value == "" for value in row.values()):
                raise ValueError("a row of the history is damaged")
        return cls(**saved)


def check_config(state: dict, config: dict, world: World) -> None:
    """RunError if the checkpoint is of another run; a warning for each difference that changes numbers."""
    saved = state["config"]
    for name in (*MUST_MATCH, *CHANGES_NUMBERS):
        if name not in saved:
            raise ValueError(f"its config has no {name}")
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
    classes: list[str]
    unsaved: bool = False  # a step was taken since the last checkpoint
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
            "classes": self.classes,
            "model": self.model.state_dict(),
            "step": self.step.state_dict(),
            "progress": asdict(self.progress),
        }

    def load(self, state: dict) -> None:
        """Go on from a checkpoint; RunError if it is damaged."""
        with damage_named(state["path"]):
            check_like(state["model"], self.model.state_dict(), "model")
            self.model.load_state_dict(state["model"])
            self.step.load_state_dict(state["step"])
            if isinstance(self.step, NewtonStep) and self.args.damping != state["config"]["damping"]:
                self.step.set_damping(self.args.damping)
            self.progress = Progress.restored(state["progress"], len(self.batches))

    def save(self, best: bool = False) -> None:
        """Write last.pt and config.json, by the first rank."""
        self.saved_at, self.unsaved = time.monotonic(), False
        if not self.world.first:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise RunError(f"a weight is NaN or infinite: {remedy(self.args)}. The last checkpoint is kept")
        state = self.state()
        write_durably(self.folder / "last.pt", lambda file: torch.save(state, file), self.folder / "previous.pt")
        if best:
            write_durably(self.folder / "best.pt", lambda file: torch.save(state, file))
        write_durably(self.folder / "config.json", json.dumps(self.config, indent=1).encode())

    def stop(self, number: int) -> NoReturn:
        """End after a signal, with a checkpoint if a step was taken since the last one."""
        if self.unsaved:
            self.save()
        raise Stopped(number)

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
        run.unsaved |= done.samples > 0
        seconds = time.perf_counter() - ended
        loss = done.loss * done.samples
        values = (done.samples, loss, began - ended, done.forward_seconds, done.hessian_seconds, seconds)
        for name, value in zip(SUMS, values, strict=True):
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        if done.report:
            progress.newton = {name: getattr(done.report, name) for name in NO_NEWTON_STEP}
        if number:
            run.stop(number)
        if run.unsaved and time.monotonic() - run.saved_at >= 60 * run.args.checkpoint_minutes:
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
            run.stop(number)
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
    progress, sums, newton = run.progress, run.progress.sums, run.progress.newton
    if not sums["samples"]:
        raise RunError("no training image could be read: see the warnings above")
    scores = evaluate(run)
    stepped = newton["method"] != ""
    exact = newton["method"] == "hessian" and newton["accepted"]
    row = Row(
        epoch=progress.epoch + 1,
        train_loss=sums["loss"] / sums["samples"],
        val_loss=scores.loss,
        top1=scores.top1,
        top5=scores.top5,
        rate=run.rate((progress.epoch + 1) * len(run.batches) - 1),
        damping=newton["damping"] if stepped else "",
        length=newton["length"] if stepped else "",
        negative_eigenvalues=0 if exact else "",  # the factorization found it positive definite
        images_per_second=sums["samples"] / sums["seconds"],
        seconds=sums["seconds"],
        data_seconds=sums["data"],
        forward_seconds=sums["forward"],
        hessian_seconds=sums["hessian"],
    )
    progress.history.append(row._asdict())
    hessian = f" (Hessian: {sums['hessian']:.2f}s)" if run.args.use_hessian else ""
    progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, dict.fromkeys(SUMS, 0.0)
    # a run that goes on in another folder has no best.pt there yet
    best = scores.top1 > progress.best or not (run.folder / "best.pt").exists()
    progress.best = max(progress.best, scores.top1)
    run.save(best)
    run.world.say(
        f"Epoch {row.epoch}: Loss={row.train_loss:.4f}, Acc={row.top1:.2f}%, Time={row.seconds:.2f}s{hessian}"
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


def find_checkpoint(args: argparse.Namespace) -> dict | None:
    """The state to go on from, or None without --resume and before the first checkpoint."""
    folder = args.checkpoint_dir
    if args.resume is None:
        return None
    if args.resume != "auto":
        return read_checkpoint(Path(args.resume))
    found = latest_checkpoint(folder)
    if found is None:
        if list(folder.glob("*.pt")):
            raise RunError(f"no checkpoint in {folder} is whole: start anew without --resume, which moves it aside")
        aside = latest_aside(folder)
        hint = f" (the last run that was moved aside goes on with --resume {aside})" if aside else ""
        say(f"no checkpoint in {folder} yet: starting from the beginning{hint}")
    return found


def take_folder(args: argparse.Namespace, state: dict | None) -> None:
    """Move the run in the folder aside, unless this one goes on from its last checkpoint."""
    last, source = args.checkpoint_dir / "last.pt", Path(state["path"]) if state else None
    if source and args.resume == "auto" and source != last:
        os.replace(source, last)  # last.pt is not whole, and would become previous.pt
    elif source is None or source.resolve() != last.resolve():
        move_run_aside(args.checkpoint_dir)


def check_classes(state: dict, classes: list[str]) -> None:
    """RunError if the classes are not those of the checkpoint."""
    for index, (there, here) in enumerate(zip(state["classes"], classes, strict=False)):
        if there != here:
            raise RunError(
                f"{state['path']} is of another data set: class {index} is {there!r} there and {here!r} here"
            )
    if len(state["classes"]) != len(classes):
        raise RunError(f"{state['path']} knows {len(state['classes'])} classes, and the data has {len(classes)}")


def chosen_before(state: dict, batch_size: int) -> int | None:
    """The hessian_batch_size of the checkpoint."""
    with damage_named(state["path"]):
        size = state["config"]["hessian_batch_size"]
        if size is not None:
            check_like(size, 1, "hessian_batch_size")
            if not 1 <= size <= max(batch_size, state["config"]["batch_size"]):
                raise ValueError(f"hessian_batch_size is {size}")
        return size


def take_network(args: argparse.Namespace, state: dict) -> None:
    """Set the flags that describe the network to those of the checkpoint, whose weights must fit them."""
    config, weights = state["config"], state["model"]
    for name in NETWORK:
        check_like(config[name], getattr(args, name), name)
        setattr(args, name, config[name])
    for problem in problems(args):
        raise ValueError(problem)
    if args.activation not in ACTIVATIONS or args.precision not in ("float32", "float64"):
        raise ValueError(f"activation {args.activation!r}, precision {args.precision!r}")
    if len(weights) != 2 * args.num_layers:  # before a network of that many layers is built
        raise ValueError(f"num_layers is {args.num_layers}, with {len(weights)} weights and biases")
    check_like(weights, shape_of(args, config["num_classes"]).state_dict(), "model")


def evaluate_checkpoint(args: argparse.Namespace, world: World, signals: Signals) -> None:
    path = args.checkpoint_dir / "best.pt" if args.evaluate == "best" else Path(args.evaluate)
    state = world.from_first(lambda: read_checkpoint(path))
    args.use_hessian = False
    with damage_named(path):
        take_network(args, state)
    run = build_run(args, world, signals, open_data(args), None)
    check_classes(state, run.classes)
    run.model.load_state_dict(state["model"])
    scores = evaluate(run)
    world.say(f"{path}: Loss={scores.loss:.4f}, Top-1={scores.top1:.2f}%, Top-5={scores.top5:.2f}%")


def identify(args: argparse.Namespace, train: Dataset, val: Dataset) -> tuple[list[str], str]:
    """The names of the classes, and a digest of the names of all image files."""
    if not (isinstance(train, Images) and isinstance(val, Images)):
        return [f"{args.dummy_classes} generated classes"], "generated"
    digest, root = hashlib.blake2b(digest_size=8), str(args.data_dir / "train").removesuffix("train")
    for data in (train, val):
        for path, _ in data.folder.samples:
            digest.update(os.fsencode(path.removeprefix(root)) + b"\0")
    return train.folder.classes, digest.hexdigest()


def build_run(
    args: argparse.Namespace, world: World, signals: Signals, data: tuple[Dataset, Dataset, int], state: dict | None
) -> Run:
    """Everything up to the first step; RunError if it would not fit into memory."""
    torch.manual_seed(args.seed)
    train, val, num_classes = data
    classes, image_files = identify(args, train, val)
    facts = {"num_classes": num_classes, "num_images": len(train), "image_files": image_files}
    check_equal_on_ranks(world.objects(facts), "give every rank the same images")
    if state is not None:
        check_classes(state, classes)
        if args.hessian_batch_size is None:
            args.hessian_batch_size = chosen_before(state, args.batch_size)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()} | facts
    config |= {"ranks": world.ranks, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    if state is not None:
        with damage_named(state["path"]):
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
    return Run(args, config, world, model, build_step(args, world, model, rate), *loaders, rate, signals, classes)


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
    for name, value in vars(args).items():
        if isinstance(value, int) and abs(value) >= LARGEST:
            yield f"--{name.replace('_', '-')} must be below {LARGEST}, got {value}"
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
    data = open_data(args)
    with contextlib.ExitStack() as stack:
        world.from_first(lambda: stack.enter_context(locked(args.checkpoint_dir)))
        state = world.from_first(lambda: find_checkpoint(args))
        run = build_run(args, world, signals, data, state)
        if state is not None:
            run.load(state)
        world.from_first(lambda: take_folder(args, state))  # last: nothing is moved for a run that can't start
        world.say(json.dumps(run.config))
        if state is not None:
            world.say(f"going on from {state['path']}: epoch {run.progress.epoch + 1}, batch {run.progress.batch}")
        while run.progress.epoch < args.epochs:
            train_epoch(run)
            finish_epoch(run)
        world.say(f"Checkpoints, metrics.csv, curves.png: {run.folder}")


def known_failure(error: Exception) -> str | None:
    """The line for an error of the system or one of torch's RuntimeErrors; None for a fault of this program."""
    said = one_line(error)
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or "can't allocate memory" in said:
        return f"out of memory ({said}): pass a smaller --hessian-batch-size, --batch-size or --image-size; --resume"
    if "DataLoader worker" in said:
        return f"a process that decodes died ({said}): pass fewer --num-workers, and --resume"
    if dist.is_initialized() or isinstance(error, dist.DistError):
        return f"rank {os.environ.get('RANK', 0)} lost the others: {said}"
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with Signals() as signals, join_world(args.device, vars(args)) as world:
            train(args, world, signals)
    except Stopped as stop:
        last = args.checkpoint_dir / "last.pt"
        goes_on = f": --resume goes on from {last}" if last.exists() and not args.evaluate else ""
        print(f"stopped by {signal.Signals(stop.number).name}{goes_on}", file=sys.stderr)
        return 128 + stop.number
    except (RunError, DataError, OSError, torch.linalg.LinAlgError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
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

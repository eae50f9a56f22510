"""The loop over epochs and batches, and the validation."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hessian import DeepMLPWithTracking
from imagenet.checkpoints import check_like, damage_named
from imagenet.data import Batch, Batches, Loader, standardized
from imagenet.messages import RunError, warn
from imagenet.progress import Progress, Scores, write_metrics
from imagenet.ranks import Signals, World
from imagenet.run_folder import write_durably
from imagenet.steps import NewtonStep, NotFiniteError, PlainStep, make_autocast


class Stopped(Exception):
    """A signal ended the run."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclass
class Run:
    """A run between its steps: all that the loop needs and a checkpoint holds."""

    args: argparse.Namespace
    config: dict[str, Any]
    classes: list[str]
    world: World
    signals: Signals
    model: DeepMLPWithTracking
    step: PlainStep | NewtonStep
    learning_rate: Callable[[int], float]  # of the step's number
    train: Loader
    val: Loader
    progress: Progress = field(default_factory=Progress)
    unsaved: bool = False  # a step was taken since the last checkpoint
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return self.args.checkpoint_dir

    @property
    def batches(self) -> Batches:
        return self.train.batches

    def state(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "classes": self.classes,
            "model": self.model.state_dict(),
            "step": self.step.state_dict(),
            "progress": asdict(self.progress),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; RunError if it is damaged."""
        with damage_named(state["path"]):
            check_like(state["model"], self.model.state_dict(), "model")
            self.model.load_state_dict(state["model"])
            self.step.load_state_dict(state["step"])
            if isinstance(self.step, NewtonStep) and self.args.damping != state["config"]["damping"]:
                self.step.set_damping(self.args.damping)
            self.progress = Progress.restored(state["progress"], len(self.batches))

    def save(self, best: bool = False) -> None:
        """Write last.pt and config.json by the first rank, and best.pt if asked to."""
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

    def after_batch(self, batch: Batch) -> int:
        """Count the files that a rank could not read; the signal that came to a rank, or 0. All ranks agree on both."""
        interrupted, terminated, bad = self.world.sum(
            self.signals.number == signal.SIGINT, self.signals.number == signal.SIGTERM, len(batch.bad)
        )
        if bad:
            self.count_bad(batch)
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0

    def count_bad(self, batch: Batch) -> None:
        """Name each file that can't be read once; RunError if they are more than --max-bad-images."""
        counted = self.progress.bad
        for path, reason in (file for of_rank in self.world.objects(batch.bad) for file in of_rank):
            if path not in counted:
                counted.append(path)
                if self.world.first:
                    warn(f"{path} can't be read and is skipped: {reason}")
        if len(counted) > self.args.max_bad_images:
            raise RunError(
                f"{len(counted)} images can't be read, the last one {counted[-1]}: repair the files named above, or "
                f"allow more than --max-bad-images {self.args.max_bad_images}"
            )


def remedy(args: argparse.Namespace) -> str:
    if args.use_hessian:
        return "lower --lr, pass --clip-grad-norm 1 for the plain steps, or raise --damping"
    return "lower --lr, or pass --clip-grad-norm 1"


def inputs_and_targets(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """(n, inputs) and (n,) on the run's device."""
    images, targets = (t.to(run.world.device, non_blocking=True) for t in (batch.images, batch.targets))
    dtype = next(run.model.parameters()).dtype
    if not len(targets):
        return torch.empty(0, run.model.input_dim, dtype=dtype, device=run.world.device), targets
    return standardized(images, dtype).flatten(1), targets


def with_progress_bar(run: Run, loader: Loader, name: str) -> tqdm:
    """The batches. The bar is silent if stderr is no terminal."""
    silent = None if run.world.first else True
    batches = loader.batches
    return tqdm(loader.loader, name, total=len(batches), initial=batches.start, disable=silent, leave=False)


def train_epoch(run: Run) -> None:
    """Train from the next batch to the end of the epoch. Stopped if a signal came."""
    progress, batches = run.progress, run.batches
    batches.epoch, batches.start = progress.epoch, progress.batch
    ended = time.perf_counter()
    for batch in with_progress_bar(run, run.train, f"epoch {progress.epoch + 1}"):
        began = time.perf_counter()
        try:
            done = run.step(*inputs_and_targets(run, batch), progress.epoch * len(batches) + progress.batch)
        except NotFiniteError as error:
            raise RunError(not_finite_message(run, batch)) from error
        number = run.after_batch(batch)
        progress.batch += 1
        run.unsaved |= done.samples > 0
        progress.add(done, began - ended, time.perf_counter() - ended)
        if number:
            run.stop(number)
        if run.unsaved and time.monotonic() - run.saved_at >= 60 * run.args.checkpoint_minutes:
            run.save()
        ended = time.perf_counter()


def not_finite_message(run: Run, batch: Batch) -> str:
    """Write the names of the batch's files, and say where they are."""
    path = run.folder / f"nan-batch-rank{run.world.rank}.json"
    names = [run.train.images.name(index) for index in batch.indices]
    where = {"epoch": run.progress.epoch + 1, "batch": run.progress.batch, "files": names}
    write_durably(path, json.dumps(where, indent=1).encode())
    return (
        f"the loss is NaN or infinite at epoch {where['epoch']}, batch {where['batch']} (its files: {path}): "
        f"{remedy(run.args)}. The last checkpoint is kept: --resume goes on from it"
    )


@torch.no_grad()
def evaluate(run: Run) -> Scores:
    """The scores on all validation images. Stopped if a signal came."""
    sums, autocast = torch.zeros(4, dtype=torch.float64), make_autocast(run.args, run.world.device)
    for batch in with_progress_bar(run, run.val, "validation"):
        if len(batch.targets):
            x, y = inputs_and_targets(run, batch)
            with autocast():
                logits = run.model(x)
            ranks = (~(logits <= logits.gather(1, y[:, None]))).sum(1)  # of the right class; a NaN has the last rank
            loss = F.cross_entropy(logits.double(), y, reduction="sum")
            count = torch.full_like(loss, len(y))
            sums += torch.stack([loss, (ranks < 1).sum(), (ranks < 5).sum(), count]).double().cpu()
        if number := run.after_batch(batch):
            run.stop(number)
    total, top1, top5, samples = run.world.sum(*sums.tolist())
    if not samples:
        raise RunError("no validation image could be read: see the warnings above")
    return Scores(total / samples, 100 * top1 / samples, 100 * top5 / samples)


def check_equal_weights(run: Run) -> None:
    """RunError if the ranks hold different weights."""
    if run.world.ranks == 1:
        return
    digest = hashlib.sha256()
    for p in run.model.parameters():
        digest.update(p.detach().cpu().numpy().data)
    if len(hashes := set(run.world.objects(digest.hexdigest()))) > 1:
        raise RunError(f"the ranks hold {len(hashes)} different sets of weights: resume from the last checkpoint")


def finish_epoch(run: Run) -> None:
    """Validate, save, print the epoch's line, and write metrics.csv."""
    check_equal_weights(run)
    progress = run.progress
    if not progress.sums["samples"]:
        raise RunError("no training image could be read: see the warnings above")
    scores = evaluate(run)
    row = progress.finish_epoch(scores, run.learning_rate((progress.epoch + 1) * len(run.batches) - 1))
    # a run that goes on in another folder has no best.pt there yet
    best = scores.top1 > progress.best or not (run.folder / "best.pt").exists()
    progress.best = max(progress.best, scores.top1)
    run.save(best)
    hessian = f" (Hessian: {row.hessian_seconds:.2f}s)" if run.args.use_hessian else ""
    run.world.say(
        f"Epoch {row.epoch}: Loss={row.train_loss:.4f}, Acc={row.top1:.2f}%, Time={row.seconds:.2f}s{hessian}"
    )
    if run.world.first:
        write_metrics(progress.history, run.folder, run.args.tensorboard)

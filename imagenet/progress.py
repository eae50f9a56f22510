"""Where a run is, and what it has measured: metrics.csv and curves.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from imagenet.checkpoints import check_like, is_number
from imagenet.run_folder import write_durably
from imagenet.steps import Step

# over the batches of an epoch: images, their losses, and seconds
SUMS = ("samples", "loss", "data", "forward", "hessian", "seconds")
NO_NEWTON_STEP = {"method": "", "damping": 0.0, "length": 0.0, "accepted": False}


class Scores(NamedTuple):
    """Of the validation."""

    loss: float
    top1: float  # %
    top5: float


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
    negative_eigenvalues: int | str  # of H + λD, if it was factorized
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
    def restored(cls, saved: dict[str, Any], num_batches: int) -> Progress:
        """The progress in a checkpoint; ValueError if it is damaged."""
        rows = saved["history"]
        check_like({**saved, "history": []}, asdict(cls()), "progress")
        if not (saved["epoch"] == len(rows) and 0 <= saved["batch"] <= num_batches):
            raise ValueError(f"epoch {saved['epoch']}, batch {saved['batch']} of {num_batches}, history {len(rows)}")
        for row in rows:
            if tuple(row) != Row._fields or not all(is_number(value) or value == "" for value in row.values()):
                raise ValueError("a row of the history is damaged")
        return cls(**saved)

    def add(self, step: Step, data_seconds: float, seconds: float) -> None:
        """Add what a step did."""
        loss = step.loss * step.samples
        values = (step.samples, loss, data_seconds, step.forward_seconds, step.hessian_seconds, seconds)
        for name, value in zip(SUMS, values, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value
        if step.report:
            self.newton = {name: getattr(step.report, name) for name in NO_NEWTON_STEP}

    def finish_epoch(self, scores: Scores, rate: float) -> Row:
        """Add the epoch's row to the history, and begin the next epoch."""
        sums, newton = self.sums, self.newton
        stepped = newton["method"] != ""
        exact = newton["method"] == "hessian" and newton["accepted"]
        row = Row(
            epoch=self.epoch + 1,
            train_loss=sums["loss"] / sums["samples"],
            val_loss=scores.loss,
            top1=scores.top1,
            top5=scores.top5,
            rate=rate,
            damping=newton["damping"] if stepped else "",
            length=newton["length"] if stepped else "",
            negative_eigenvalues=0 if exact else "",  # the factorization found it positive definite
            images_per_second=sums["samples"] / sums["seconds"],
            seconds=sums["seconds"],
            data_seconds=sums["data"],
            forward_seconds=sums["forward"],
            hessian_seconds=sums["hessian"],
        )
        self.history.append(row._asdict())
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, dict.fromkeys(SUMS, 0.0)
        return row


def write_metrics(history: Sequence[dict[str, Any]], folder: Path, tensorboard: bool) -> None:
    """Write metrics.csv and curves.png, and the last row for tensorboard."""
    text = io.StringIO()
    table = csv.DictWriter(text, Row._fields)
    table.writeheader()
    table.writerows(history)
    write_durably(folder / "metrics.csv", text.getvalue().encode())
    write_curves(history, folder / "curves.png")
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / "tensorboard") as writer:
            for name, value in history[-1].items():
                if name != "epoch" and value != "":
                    writer.add_scalar(name, value, history[-1]["epoch"])


def write_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
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

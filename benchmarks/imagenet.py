"""Measure train_imagenet.py: python3 benchmark.py imagenet {throughput,steps,compare,ranks,scale} [--quick]

    throughput  images/s of the baseline's loop against a bare loop in plain PyTorch, and of decoding alone
    steps       seconds and bytes of a Hessian step at the shape of ImageNet, and what was estimated before it
    compare     --use-hessian against the baseline at equal seconds: 4,000 digits of MNIST in ImageFolder layout
    ranks       seconds of a Hessian step on two ranks with one thread each, against one; on the wall
    scale       what a step costs on 1 to 512 GPUs, by the estimate

Seconds are those of the processor, on one thread and without workers: a shared machine slows the clock on the wall.

- steps: every row is a process of its own, whose peak of resident memory is read from Linux. The machine's rates are
  measured there before the step.
- compare: the baseline gets the seconds of the Hessian run, and the best of several learning rates. The loss is that of
  the final weights on all training images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.problems import mnist_digits
from benchmarks.processes import in_process, resident_bytes
from benchmarks.ranks import ranks, scale
from benchmarks.report import markdown_row, table, write_table
from hessian import DeepMLPWithTracking
from imagenet.checkpoints import read_checkpoint
from imagenet.command_line import parse
from imagenet.data import MEAN, STD, Images, open_data, standardized
from imagenet.main import main as train_imagenet
from imagenet.memory_plan import build_model, measure_machine
from imagenet.ranks import Signals, World
from imagenet.run_setup import build_run
from imagenet.training import train_epoch
from newton import DampedNewton

LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
CPU = torch.device("cpu")


class StepShape(NamedTuple):
    layers: int
    width: int
    batch: int
    hessian_batch: int
    image_size: int = 224


STEPS = (StepShape(20, 256, 64, 4), StepShape(20, 256, 64, 8), StepShape(20, 256, 64, 16), StepShape(40, 128, 32, 4))
QUICK_STEPS = (StepShape(4, 32, 16, 4, 32),)


@contextlib.contextmanager
def processor_clock() -> Iterator[None]:
    """One thread. `time.perf_counter` gives the processor's seconds, in train_imagenet.py too."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with mock.patch("time.perf_counter", time.process_time):
        yield


def write_images(root: Path, images: np.ndarray, labels: np.ndarray, num_val: int) -> None:
    """JPEGs in ImageFolder layout of images (n, height, width) uint8; the last `num_val` are to validate."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        part = "val" if index >= len(images) - num_val else "train"
        path = root / part / f"n{label:08d}" / f"{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)


def write_photographs(root: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of smooth noise. They have about the size in bytes of photographs of ILSVRC2012."""
    rng = np.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        image = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        image = np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)
        for part in ("train",) if index % 10 else ("train", "val"):
            path = root / part / f"n{index % 20:08d}" / f"{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=85)


# --------------------------------------------------------------------------------------------------- throughput


def our_epoch(argv: list[str]) -> Callable[[], float]:
    """Seconds of one epoch of train_imagenet.py's loop."""
    args = parse(argv)
    run = build_run(args, World(0, 1, CPU), Signals(), open_data(args), None)

    def epoch() -> float:
        run.progress.batch, run.progress.sums = 0, {}
        train_epoch(run)
        run.progress.epoch += 1
        return run.progress.sums["seconds"]

    return epoch


def bare_epoch(argv: list[str]) -> Callable[[], float]:
    """The same data, network and optimizer as anybody would write them."""
    args = parse(argv)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(args.image_size),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    data = ImageFolder(str(args.data_dir / "train"), transform)
    loader = DataLoader(data, args.batch_size, shuffle=True)
    widths = [3 * args.image_size**2, *[args.hidden_dim] * (args.num_layers - 1)]
    hidden = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], len(data.classes)))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)

    def epoch() -> float:
        began, total = time.perf_counter(), 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return time.perf_counter() - began

    return epoch


def decoded_per_second(argv: list[str]) -> float:
    """Images a second of the data set alone, in one process."""
    train, _, _ = open_data(parse(argv))
    assert isinstance(train, Images)
    began = time.perf_counter()
    for index in range(len(train)):
        train[0, index]
    return len(train) / (time.perf_counter() - began)


def throughput(quick: bool, folder: Path) -> list[str]:
    count, repeats = (40, 2) if quick else (200, 5)
    rows, decoded = [], []
    for size, image_size, width in (((500, 375), 224, 256), ((500, 375), 64, 256), ((85, 64), 64, 256)):
        root = folder / f"{size[0]}"
        if not root.exists():
            write_photographs(root, count, size)
        flags = f"--image-size {image_size} --hidden-dim {width} --num-layers 20 --batch-size 40 --lr 0.01 --epochs 90"
        argv = [*flags.split(), "--data-dir", str(root), "--checkpoint-dir", str(folder), "--num-workers", "0"]
        ours, bare = our_epoch(argv), bare_epoch(argv)
        seconds = [(ours(), bare()) for _ in range(repeats + 1)][1:]  # the first one warms up
        best = [min(column) for column in zip(*seconds, strict=True)]
        jpegs, network = f"{size[0]} × {size[1]}", f"{image_size}² × 3 → 20 × {width}"
        rates = [f"{count / value:.0f}" for value in best]
        rows.append([jpegs, network, *rates, f"{best[1] / best[0]:.3f}"])
        decoded.append(f"{jpegs} to {image_size}: {decoded_per_second(argv):.0f}")
    return [
        *table(["JPEGs", "network", "ours, images/s", "bare, images/s", "ratio"], rows),
        "",
        f"The least seconds of {repeats} epochs each, alternating; batches of 40.",
        f"Decoding and augmenting alone, images/s in one process: {', '.join(decoded)}.",
    ]


# -------------------------------------------------------------------------------------------------------- steps


class MeasuredStep(NamedTuple):
    route: str
    dampings: int  # tried
    seconds: float
    estimated_seconds: float
    bytes: int
    estimated_bytes: float


def measure_step(shape: StepShape) -> MeasuredStep:
    """One Hessian step in this process."""
    torch.manual_seed(0)
    args = parse(["--estimate", "--image-size", str(shape.image_size)])
    rates = measure_machine(args, CPU)
    before = resident_bytes("VmRSS")
    model = DeepMLPWithTracking(3 * shape.image_size**2, shape.width, 1000, shape.layers - 1)
    x, y = torch.randn(shape.batch, model.input_dim), torch.randint(1000, (shape.batch,))
    optimizer = DampedNewton(
        model, curvature="gauss_newton", metric="state", curvature_batch=shape.hessian_batch, weight_decay=1e-4
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    began = time.perf_counter()
    optimizer.step(lambda: model(x, y, track_activations=True))
    seconds = time.perf_counter() - began
    assert optimizer.report is not None
    dampings = optimizer.report.num_trials
    cost = optimizer.estimate_step(shape.batch, dampings)
    estimated_seconds = cost.seconds(rates.operations, rates.traffic)
    return MeasuredStep(cost.route, dampings, seconds, estimated_seconds, resident_bytes("VmHWM") - before, cost.bytes)


def steps(quick: bool, folder: Path) -> list[str]:
    header = ["layers × width, N, sub-batch", "route", "dampings"]
    header += ["seconds", "estimated", "ratio", "GB", "estimated", "ratio"]
    rows = []
    for shape in QUICK_STEPS if quick else STEPS:
        runs: list[MeasuredStep] = []
        while len(runs) < (1 if quick else 3) and sum(run.seconds for run in runs) < 60:
            runs.append(MeasuredStep(*in_process("benchmarks.imagenet", shape)))
        found = min(runs, key=lambda run: run.seconds)
        pairs = (found.seconds, found.estimated_seconds), (found.bytes / 1e9, found.estimated_bytes / 1e9)
        cells = [f"{x:.2f}" for value, guess in pairs for x in (value, guess, guess / value)]
        name = f"{shape.layers} × {shape.width}, {shape.batch}, {shape.hessian_batch}"
        rows.append([name, found.route, str(found.dampings), *cells])
        print(markdown_row(rows[-1]), flush=True)
    return [
        *table(header, rows),
        "",
        "1,000 classes. Each step runs in a process of its own: three times, or once if it takes a minute, and the "
        "fastest counts. The estimate is for as many dampings as the step tried, at rates measured before it.",
    ]


# ------------------------------------------------------------------------------------------------------ compare


def digits(quick: bool) -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits of MNIST, 28 × 28. Quick: those of scikit-learn, 8 × 8, which need no other package."""
    if quick:
        from sklearn.datasets import load_digits

        data = load_digits()
        return (15 * data.images).astype(np.uint8), data.target
    x, y = mnist_digits()
    return x.reshape(-1, 28, 28).astype(np.uint8), y


class Trained(NamedTuple):
    epochs: int
    seconds: float
    loss: float  # of the final weights on all training images
    val_loss: float
    top1: float


def train(argv: list[str], folder: Path) -> Trained | None:
    """The end of a run of train_imagenet.py; None if it ended with an error."""
    argv = [*argv, "--checkpoint-dir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_imagenet(argv)
    if code >= 128:
        raise KeyboardInterrupt
    if code:
        return None
    args = parse(argv)
    images, _, classes = open_data(args)
    assert isinstance(images, Images)
    model = build_model(args, classes)
    state = read_checkpoint(folder / "last.pt")
    model.load_state_dict(state["model"])
    x, y, _ = zip(*(images[None, index] for index in range(len(images))), strict=True)
    with torch.no_grad():
        loss = model(standardized(torch.stack(x), torch.float32), torch.tensor(y)).item()
    history = state["progress"]["history"]
    seconds = sum(epoch["seconds"] for epoch in history)
    return Trained(len(history), seconds, loss, history[-1]["val_loss"], history[-1]["top1"])


def compare(quick: bool, folder: Path) -> list[str]:
    x, y = digits(quick)
    order = np.random.default_rng(0).permutation(len(x))[: 300 if quick else len(x)]
    write_images(folder / "digits", x[order], y[order], len(order) // 5)
    rows = []

    def add_row(network: str, method: str, run: Trained | None) -> None:
        cells = ["ended with an error", "", "", "", ""]
        if run:
            cells = [str(run.epochs), f"{run.seconds:.1f}", f"{run.loss:.2e}", f"{run.val_loss:.2f}", f"{run.top1:.1f}"]
        rows.append([network, method, *cells])
        print(markdown_row(rows[-1]), flush=True)

    for layers, width in ((6, 32),) if quick else ((6, 32), (30, 16)):
        shape = f"--image-size 28 --grayscale --augment none --num-layers {layers} --hidden-dim {width}"
        common = [*shape.split(), "--data-dir", str(folder / "digits"), "--num-workers", "0"]
        hessian = "--use-hessian --batch-size 1000 --hessian-batch-size 64 --epochs " + ("2" if quick else "10")
        run = train([*common, *hessian.split()], folder / f"hessian{layers}")
        add_row(f"{layers} × {width}", "Hessian", run)
        max_seconds = run.seconds if run else 0.0
        for rate in LEARNING_RATES[:1] if quick else LEARNING_RATES:
            plain = [*common, *f"--batch-size 64 --lr {rate} --epochs".split()]
            first_epoch = train([*plain, "1"], folder / f"probe{layers}-{rate}")
            epochs = max(1, round(max_seconds / max(first_epoch.seconds, 1e-3))) if first_epoch else 1
            run = train([*plain, str(epochs)], folder / f"plain{layers}-{rate}")
            add_row(f"{layers} × {width}", f"baseline, rate {rate:g}", run)
    header = ["network", "method", "epochs", "seconds", "training loss", "validation loss", "top-1, %"]
    return [
        *table(header, rows),
        "",
        "Seconds of the training passes, decoding included. Batches of 1,000 with the Hessian, of 64 without.",
    ]


COMMANDS = {"throughput": throughput, "steps": steps, "compare": compare, "ranks": ranks, "scale": scale}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "benchmark.py imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="small and few, for a smoke test")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, processor_clock():
        lines = COMMANDS[args.command](args.quick, Path(folder))
    path = args.out_dir / f"imagenet-{args.command}.md"
    write_table(path, f"imagenet {args.command}" + " --quick" * args.quick, lines)


if __name__ == "__main__":
    with processor_clock():
        print(json.dumps(measure_step(StepShape(*json.loads(sys.argv[1])))))

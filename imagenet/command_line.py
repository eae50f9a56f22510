"""The flags of train_imagenet.py, and what is wrong with them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path

from hessian import ACTIVATIONS
from imagenet.data import DUMMY_CLASSES, DUMMY_IMAGES, available_cores

LARGEST = 2**31  # integer flag
LARGEST_FLOAT = 3e38  # float32 ends there
PRECISIONS = ("float32", "float64")


def parse(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The flags; exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data/imagenet"), help="holds train/ and val/, a folder for each class")
    add("--dummy", type=int, nargs="?", const=DUMMY_IMAGES[0], metavar="N", help="generate N images, or 1,281,167")
    add("--dummy-classes", type=int, default=DUMMY_CLASSES)
    add("--image-size", type=int, default=224, help="pixels of a side")
    add("--grayscale", action="store_true", help="one channel: a third of the inputs")
    add("--augment", choices=("standard", "none"), default="standard", help="standard: random crops, half mirrored")
    add("--num-workers", type=int, default=min(8, available_cores()), help="processes that read images; 0: none")
    add("--max-bad-images", type=int, default=10, help="stop if more files can't be read")
    add("--hidden-dim", type=int, default=512)
    add("--num-layers", type=int, default=20, help="linear layers, with the last one")
    add("--activation", choices=tuple(ACTIVATIONS), default="tanh")
    add("--residual", action="store_true", help="a skip connection around each layer of equal widths")
    add("--batch-size", type=int, default=256, help="images of a step, of all ranks together")
    add("--epochs", type=int, default=90)
    add("--lr", type=float, default=0.1, help="learning rate of the plain steps")
    add("--weight-decay", type=float, default=1e-4, help="c of the L2 term ½c‖θ‖² in both kinds of step")
    add("--lr-schedule", choices=("cosine", "step"), default="cosine", help="step: a tenth every 30 epochs")
    add("--warmup-epochs", type=float, default=None, help="the learning rate rises for so long; default: 5 of 90")
    add("--clip-grad-norm", type=float, default=0.0, help="largest gradient norm of a plain step; 0: no limit")
    add("--amp", choices=("bf16", "fp16"), default=None, help="autocast in plain steps and in the validation")
    add("--precision", choices=PRECISIONS, default="float32", help="of the weights; Hessian solves are in float64")
    add("--use-hessian", action="store_true", help="take Newton steps")
    add("--hessian-freq", type=int, default=1, help="a Newton step on every N-th batch, plain steps on the others")
    add(
        "--hessian-batch-size",
        type=int,
        default=None,
        help="images of the exact solve; default: the most that memory and --hessian-seconds allow",
    )
    add("--hessian-seconds", type=float, default=10.0, help="most estimated seconds of a Newton step")
    add("--curvature", choices=("gauss_newton", "hessian", "auto"), default="gauss_newton")
    add(
        "--metric",
        choices=("state", "parameter"),
        default="state",
        help="damp the changes of activations (state) or of weights",
    )
    add("--damping", type=float, default=1.0, help="the first damping; each step finds the next")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--memory-gib", type=float, default=None, help="memory to plan for; default: the free memory")
    add("--seed", type=int, default=0)
    add("--deterministic", action="store_true", help="deterministic algorithms on a GPU too")
    add("--checkpoint-dir", type=Path, default=Path("runs/imagenet"))
    add("--checkpoint-minutes", type=float, default=10.0, help="a checkpoint so often, and after each epoch")
    add("--resume", nargs="?", const="auto", metavar="FILE", help="go on from FILE, or from the last checkpoint")
    add("--evaluate", nargs="?", const="best", metavar="FILE", help="only print the scores of FILE, or of best.pt")
    add("--estimate", action="store_true", help="only print what fits for the recommended settings")
    add("--tensorboard", action="store_true")
    args = parser.parse_args(argv)
    for problem in problems(args):
        parser.error(problem)
    return args


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags, a sentence each."""
    positive = (
        *("image_size", "hidden_dim", "num_layers", "batch_size", "epochs", "lr", "hessian_freq", "damping"),
        *("hessian_seconds", "dummy", "dummy_classes", "hessian_batch_size", "memory_gib"),
    )
    for name in positive:
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            yield f"--{name.replace('_', '-')} must be positive, got {value}"
    not_negative = (
        *("num_workers", "max_bad_images", "weight_decay", "warmup_epochs", "clip_grad_norm", "checkpoint_minutes"),
    )
    for name in not_negative:
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            yield f"--{name.replace('_', '-')} must be ≥ 0, got {value}"
    for name, value in vars(args).items():
        largest = LARGEST if isinstance(value, int) else LARGEST_FLOAT
        if isinstance(value, int | float) and abs(value) >= largest:
            yield f"--{name.replace('_', '-')} must be below {largest}, got {value}"
    if (args.hessian_batch_size or 0) > args.batch_size:
        yield f"--hessian-batch-size {args.hessian_batch_size} is more than --batch-size {args.batch_size}"
    if args.amp and args.precision == "float64":
        yield "--amp is for --precision float32"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        yield f"--batch-size {args.batch_size}, that of all ranks, must be a multiple of the {ranks} ranks"

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
    add("--precision", choices=PRECISIONS, default="float32", help="of weights; solves are in float64")
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

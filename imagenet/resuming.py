"""Going on from a checkpoint: which one, whether it is of this run, and what becomes of a run in the way."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hessian import ACTIVATIONS
from imagenet.checkpoints import check_like, damage_named, latest_checkpoint, read_checkpoint
from imagenet.command_line import LARGEST, PRECISIONS, problems
from imagenet.memory_plan import meta_model
from imagenet.messages import RunError, say, warn
from imagenet.ranks import World
from imagenet.run_folder import latest_aside, move_run_aside

State = dict[str, Any]  # of a checkpoint
# a run goes on only with the same
MUST_MATCH = (
    "num_layers", "hidden_dim", "num_classes", "image_size", "grayscale", "activation", "residual", "precision",
    "use_hessian", "batch_size", "seed", "num_images", "image_files", "ranks",
)  # fmt: skip

CHANGES_NUMBERS = (
    "epochs", "lr", "lr_schedule", "warmup_epochs", "weight_decay", "clip_grad_norm", "amp", "augment", "hessian_freq",
    "hessian_batch_size", "curvature", "metric", "damping", "threads", "torch",
)  # fmt: skip

# --evaluate takes these flags from the checkpoint
NETWORK = ("num_layers", "hidden_dim", "image_size", "grayscale", "activation", "residual", "precision")


def find_checkpoint(args: argparse.Namespace) -> State | None:
    """The state to go on from, or None without --resume and before the first checkpoint."""
    folder = args.checkpoint_dir
    if args.resume is None:
        return None
    if args.resume != "auto":
        return read_checkpoint(Path(args.resume))
    found = latest_checkpoint(folder)
    if found is None:
        if list(folder.glob("*.pt")):
            raise RunError(
                f"{folder} has no whole last.pt or previous.pt: pass --resume FILE, or start anew without --resume, "
                "which moves the run aside"
            )
        aside = latest_aside(folder)
        hint = f" (the last run that was moved aside goes on with --resume {aside})" if aside else ""
        say(f"no checkpoint in {folder} yet: starting from the beginning{hint}")
    return found


def check_config(state: State, config: dict[str, Any], world: World) -> None:
    """RunError if the checkpoint is of another run; a warning for each difference that changes numbers."""
    saved = state["config"]
    with damage_named(state["path"]):
        for name in (*MUST_MATCH, *CHANGES_NUMBERS):
            if name not in saved:
                raise ValueError(f"its config has no {name}")
        different = [name for name in MUST_MATCH if saved[name] != config[name]]
        changed = [name for name in CHANGES_NUMBERS if saved[name] != config[name]]
    if different:
        listed = ", ".join(f"{name} {saved[name]} there and {config[name]} here" for name in different)
        raise RunError(f"{state['path']} is of another run: {listed}. Pass what it has, or another --checkpoint-dir")
    for name in changed if world.first else ():
        warn(f"{name} was {saved[name]}, is {config[name]}: it goes on, not bit for bit")


def check_classes(state: State, classes: list[str]) -> None:
    """RunError if the classes are not those of the checkpoint."""
    for index, (there, here) in enumerate(zip(state["classes"], classes, strict=False)):
        if there != here:
            raise RunError(
                f"{state['path']} is of another data set: class {index} is {there!r} there and {here!r} here"
            )
    if len(state["classes"]) != len(classes):
        raise RunError(f"{state['path']} knows {len(state['classes'])} classes, and the data has {len(classes)}")


def chosen_before(state: State, batch_size: int) -> int | None:
    """The hessian_batch_size of the checkpoint."""
    with damage_named(state["path"]):
        size = state["config"]["hessian_batch_size"]
        if size is not None:
            check_like(size, 1, "hessian_batch_size")
            if not 1 <= size <= max(batch_size, state["config"]["batch_size"]):
                raise ValueError(f"hessian_batch_size is {size}")
        return size


def use_network_of(args: argparse.Namespace, state: State) -> None:
    """Set the flags that describe the network to those of the checkpoint; RunError if its weights do not fit them."""
    config, weights = state["config"], state["model"]
    with damage_named(state["path"]):
        for name in NETWORK:
            value = config[name]
            check_like(value, getattr(args, name), name)
            if type(value) is int and not 0 < value < LARGEST:
                raise ValueError(f"{name} is {value}")
            setattr(args, name, value)
        if args.activation not in ACTIVATIONS or args.precision not in PRECISIONS:
            raise ValueError(f"activation {args.activation!r}, precision {args.precision!r}")
        if len(weights) != 2 * args.num_layers:  # before a network of that many layers is built
            raise ValueError(f"num_layers is {args.num_layers}, with {len(weights)} weights and biases")
        check_like(weights, meta_model(args, config["num_classes"]).state_dict(), "model")
    for problem in problems(args):
        raise RunError(f"{problem}, as in {state['path']}")


def clear_folder(args: argparse.Namespace, state: State | None) -> None:
    """Move the run in the folder aside, unless this one goes on from its last checkpoint."""
    last, source = args.checkpoint_dir / "last.pt", Path(state["path"]) if state else None
    if source and args.resume == "auto" and source != last:
        os.replace(source, last)  # last.pt is not whole, and would become previous.pt
    elif not source or source.resolve() != last.resolve():
        move_run_aside(args.checkpoint_dir)

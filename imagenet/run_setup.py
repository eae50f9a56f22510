"""Everything before the first step. What can refuse comes first; the run in the way is moved last."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path

import torch

from imagenet.checkpoints import read_checkpoint
from imagenet.data import Batches, Data, make_loader, open_data
from imagenet.memory_plan import build_model, fit_to_memory, print_estimates
from imagenet.messages import RunError
from imagenet.ranks import Signals, World, check_equal_on_ranks
from imagenet.resuming import (
    State,
    check_classes,
    check_config,
    chosen_before,
    clear_folder,
    find_checkpoint,
    use_network_of,
)
from imagenet.run_folder import locked
from imagenet.steps import build_step, learning_rate_schedule
from imagenet.training import Run, evaluate, finish_epoch, train_epoch


def build_run(args: argparse.Namespace, world: World, signals: Signals, data: Data, state: State | None) -> Run:
    """A run before its first step; RunError if it does not fit into memory or goes on from another run's checkpoint."""
    torch.manual_seed(args.seed)
    classes = data.train.classes
    facts = {"num_classes": data.num_classes, "num_images": len(data.train), "image_files": data.files_digest()}
    check_equal_on_ranks(world.objects(facts), "give every rank the same images")
    if state is not None:
        check_classes(state, classes)
        if args.hessian_batch_size is None:
            args.hessian_batch_size = chosen_before(state, args.batch_size)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()} | facts
    config |= {"ranks": world.ranks, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    if state is not None:
        check_config(state, config, world)
    fit_to_memory(args, world, data.num_classes)
    config["hessian_batch_size"] = args.hessian_batch_size
    model = build_model(args, data.num_classes).to(world.device)
    train, val = (
        make_loader(
            images,
            Batches(len(images), args.batch_size, args.seed, images is data.train, world.rank, world.ranks),
            args.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        for images in (data.train, data.val)
    )
    rate = learning_rate_schedule(args, len(train.batches))
    step = build_step(args, world, model, rate)
    return Run(args, config, classes, world, signals, model, step, rate, train, val)


def evaluate_checkpoint(args: argparse.Namespace, world: World, signals: Signals) -> None:
    """Print the scores of a checkpoint. Writes nothing."""
    path = args.checkpoint_dir / "best.pt" if args.evaluate == "best" else Path(args.evaluate)
    state = world.from_first(lambda: read_checkpoint(path))
    args.use_hessian = False
    use_network_of(args, state)
    run = build_run(args, world, signals, open_data(args), None)
    check_classes(state, run.classes)
    run.model.load_state_dict(state["model"])
    scores = evaluate(run)
    world.say(f"{path}: Loss={scores.loss:.4f}, Top-1={scores.top1:.2f}%, Top-5={scores.top5:.2f}%")


def train_or_resume(args: argparse.Namespace, world: World, signals: Signals) -> None:
    """Train to the end, from the beginning or from a checkpoint."""
    data = open_data(args)
    with contextlib.ExitStack() as stack:
        world.from_first(lambda: stack.enter_context(locked(args.checkpoint_dir)))
        state = world.from_first(lambda: find_checkpoint(args))
        run = build_run(args, world, signals, data, state)
        if state is not None:
            run.load(state)
        world.from_first(lambda: clear_folder(args, state))
        world.say(json.dumps(run.config))
        if state is not None:
            world.say(f"going on from {state['path']}: epoch {run.progress.epoch + 1}, batch {run.progress.batch}")
        while run.progress.epoch < args.epochs:
            train_epoch(run)
            finish_epoch(run)
        world.say(f"Checkpoints, metrics.csv, curves.png: {run.folder}")


def check_extras(args: argparse.Namespace, device: torch.device) -> None:
    """RunError if the device or a package does not do what is asked for."""
    if args.use_hessian and device.type == "mps":
        raise RunError("the Hessian step needs float64 and mps has none: pass --device cpu, or leave out --use-hessian")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise RunError(f"--tensorboard needs a package ({error}): pip install tensorboard") from error


def run(args: argparse.Namespace, world: World, signals: Signals) -> None:
    """Do what the flags ask for."""
    check_extras(args, world.device)
    torch.set_flush_denormal(True)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.estimate:
        print_estimates(args, world)
    elif args.evaluate:
        evaluate_checkpoint(args, world, signals)
    else:
        train_or_resume(args, world, signals)

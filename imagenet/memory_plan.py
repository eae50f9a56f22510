"""The network that the flags describe, and the memory and seconds that a step of it takes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hessian import DeepMLPWithTracking
from imagenet.data import DUMMY_CLASSES
from imagenet.messages import RunError
from imagenet.ranks import World
from newton import DampedNewton, StepCost


def training_bytes(args: argparse.Namespace, num_classes: int, ranks: int) -> int:
    """The bytes of a plain step: weights, gradients, momentum, the ranks' exchange, and the batches.

    Waiting batches are bytes, the present one is numbers. Builds no network, which may be too large to build.
    """
    number = 8 if args.precision == "float64" else 4
    widths = (input_dim(args), *[args.hidden_dim] * min(args.num_layers - 1, 2), num_classes)
    num_parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
    num_parameters += max(args.num_layers - 3, 0) * (args.hidden_dim + 1) * args.hidden_dim
    images = args.batch_size // ranks * input_dim(args)
    waiting = 2 * args.num_workers + 2
    return number * num_parameters * (3 + (ranks > 1)) + images * waiting + number * images


def input_dim(args: argparse.Namespace) -> int:
    return args.image_size**2 * (1 if args.grayscale else 3)


def build_model(args: argparse.Namespace, num_classes: int) -> DeepMLPWithTracking:
    model = DeepMLPWithTracking(
        input_dim(args), args.hidden_dim, num_classes, args.num_layers - 1, args.activation, residual=args.residual
    )
    return model.to(getattr(torch, args.precision))


class Machine(NamedTuple):
    operations: float  # a second, in float64 products
    traffic: float  # bytes a second
    memory: float  # bytes that the run may take


def measure_machine(args: argparse.Namespace, device: torch.device) -> Machine:
    """Time a product, and a sum that memory bounds. Their rates turn an estimate into seconds.

    Without a Hessian step nothing is timed.
    """
    if not (args.use_hessian or args.estimate):
        return Machine(math.inf, math.inf, available_memory(args, device))
    size, numbers = (1024, 2**22) if device.type == "cpu" else (8192, 2**28)
    a = torch.rand(size, size, dtype=torch.float64, device=device)
    v = torch.rand(numbers, dtype=torch.float64, device=device)

    def seconds(work: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            work()[:1].sum().item()  # waits for a GPU
            times.append(time.perf_counter() - began)
        return min(times)

    return Machine(
        2 * size**3 / seconds(lambda: a @ a), 16 * numbers / seconds(lambda: v + 1.0), available_memory(args, device)
    )


def available_memory(args: argparse.Namespace, device: torch.device) -> float:
    """The bytes of --memory-gib, or those that are free."""
    if args.memory_gib:
        return args.memory_gib * 2**30
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):  # only Linux tells what is free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's limit; 'max' if it has none
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def meta_model(args: argparse.Namespace, num_classes: int) -> DeepMLPWithTracking:
    """The network with shapes alone."""
    with torch.device("meta"):
        return build_model(args, num_classes)


def step_cost(args: argparse.Namespace, num_classes: int, hessian_batch_size: int, ranks: int) -> StepCost:
    """Of the first rank."""
    options = dict(curvature=args.curvature, metric=args.metric, weight_decay=args.weight_decay)
    newton = DampedNewton(meta_model(args, num_classes), curvature_batch=hessian_batch_size, **options)
    return newton.estimate_step(args.batch_size, ranks=ranks)


def sub_batch_sizes(args: argparse.Namespace) -> list[int]:
    """The sizes to choose from: powers of two, and the whole batch."""
    return [k for n in range(20) if (k := 2**n) < args.batch_size] + [args.batch_size]


def largest_sub_batch(
    args: argparse.Namespace, num_classes: int, machine: Machine, ranks: int
) -> tuple[int | None, float]:
    """The largest sub-batch that fits into memory and --hessian-seconds, and the bytes of the plain steps.

    1 if every size takes longer, None if no size fits into memory.
    """
    plain, chosen = training_bytes(args, num_classes, ranks), None
    if plain > machine.memory:
        return None, plain
    for k in sub_batch_sizes(args) if args.use_hessian else ():
        cost = step_cost(args, num_classes, k, ranks)
        slow = cost.seconds(machine.operations, machine.traffic) > args.hessian_seconds
        if cost.bytes + plain > machine.memory or (slow and chosen):
            break
        chosen = k
        if slow:
            break
    return chosen, plain


def gib(size: float) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 2**33 else f"{size / 2**30:.0f} GiB"


def fit_to_memory(args: argparse.Namespace, world: World, num_classes: int) -> None:
    """Choose --hessian-batch-size if it was not given, and print what a step costs. RunError if it does not fit."""
    machine = world.from_first(lambda: measure_machine(args, world.device))
    chosen, plain = largest_sub_batch(args, num_classes, machine, world.ranks)
    if plain > machine.memory:
        raise RunError(
            too_large_message("a plain step", plain, machine, flags_that_fit(args, num_classes, machine, world.ranks))
        )
    if not args.use_hessian:
        return
    asked = args.hessian_batch_size
    cost = step_cost(args, num_classes, asked or chosen or 1, world.ranks)
    if cost.bytes + plain > machine.memory:
        fits = f"--hessian-batch-size {chosen}" if chosen else flags_that_fit(args, num_classes, machine, world.ranks)
        what = f"a Hessian step on {asked or 1} of {args.batch_size} images"
        raise RunError(too_large_message(what, cost.bytes + plain, machine, fits))
    args.hessian_batch_size = asked or chosen
    seconds = cost.seconds(machine.operations, machine.traffic)
    world.say(
        f"Hessian step: solves on {args.hessian_batch_size} of {args.batch_size} images, route {cost.route}, about "
        f"{cost.operations:.1e} operations, {gib(cost.bytes)}, {seconds:.3g} s for {cost.num_dampings} damping"
        f"{'s' * (cost.num_dampings > 1)} (measured here: {machine.operations:.1e} operations/s, "
        f"{machine.traffic:.1e} bytes/s; free: {gib(machine.memory)})"
    )
    world.say(
        "--lr drives the plain steps. The Newton step finds its own length, and SGD's momentum starts anew after it."
    )


def too_large_message(what: str, size: float, machine: Machine, fits: str) -> str:
    return f"{what} takes about {gib(size)}, and {gib(machine.memory)} is free: pass {fits}"


def flags_that_fit(args: argparse.Namespace, num_classes: int, machine: Machine, ranks: int) -> str:
    """The first of a few sets of flags that fit, with --use-hessian for a sub-batch of at least one image."""
    narrow = {"image_size": 64, "grayscale": True}
    for flags in (
        {"grayscale": True},
        {"image_size": 64},
        narrow,
        {**narrow, "hidden_dim": max(1, args.hidden_dim // 4)},
        {**narrow, "hidden_dim": max(1, args.hidden_dim // 4), "batch_size": max(1, args.batch_size // 8) * ranks},
    ):
        setup = argparse.Namespace(**{**vars(args), **flags, "hessian_batch_size": None})
        chosen, plain = largest_sub_batch(setup, num_classes, machine, ranks)
        if plain <= machine.memory and (chosen or not args.use_hessian):
            words = (
                f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in flags.items()
            )
            return " ".join(words)
    return "--image-size 32 --grayscale, a smaller --hidden-dim and --batch-size, or find more memory"


SETTINGS = {
    "Hessian": dict(batch_size=64, hidden_dim=256, num_layers=20),
    "tall and skinny": dict(batch_size=32, hidden_dim=128, num_layers=40),
    "balanced": dict(batch_size=64, hidden_dim=256, num_layers=20, hessian_freq=5),
    "short and fat": dict(batch_size=256, hidden_dim=1024, num_layers=5),
}


def print_estimates(args: argparse.Namespace, world: World) -> None:
    """Print what fits for the recommended settings, the seconds of a step on this machine, and a rank's part of it."""
    machine = measure_machine(args, world.device)
    world.say(
        f"Seconds of a step here, at {machine.operations:.2g} float64 operations/s and {machine.traffic:.2g} bytes/s:\n"
    )
    world.say("| setting | plain steps | memory | largest sub-batch | bytes | operations | seconds |")
    world.say("| --- " * 7 + "|")
    for name, setting in SETTINGS.items():
        for memory in (24, 80):
            setup = argparse.Namespace(**{**vars(args), **setting, "use_hessian": True, "hessian_seconds": math.inf})
            k, plain = largest_sub_batch(setup, DUMMY_CLASSES, machine._replace(memory=memory * 2**30), 1)
            row = f"| {name} | {gib(plain)} | {memory} GiB |"
            if k:
                cost = step_cost(setup, DUMMY_CLASSES, k, 1)
                seconds = cost.seconds(machine.operations, machine.traffic)
                row += f" {k}, {cost.route} | {gib(cost.bytes)} | {cost.operations:.1e} | {seconds:.3g} |"
            world.say(row if k else row + " none | | | |")
    world.say(
        "\nOperations of the first rank for a number of ranks, with a sub-batch of 1 and the largest in 24 GiB:\n"
    )
    world.say(
        "| setting | sub-batch | 1 | 2 | 4 | 8 ranks | not shared | other ranks, of 8 | memory, first of 8 | sent |"
    )
    world.say("| --- " * 10 + "|")
    for name, setting in SETTINGS.items():
        setup = argparse.Namespace(**{**vars(args), **setting, "use_hessian": True, "hessian_seconds": math.inf})
        largest, _ = largest_sub_batch(setup, DUMMY_CLASSES, machine._replace(memory=24 * 2**30), 1)
        for k in (1, largest) if largest else ():
            costs = [step_cost(setup, DUMMY_CLASSES, k, ranks) for ranks in (1, 2, 4, 8)]
            operations = " | ".join(f"{cost.operations:.3g}" for cost in costs)
            alone, last = costs[0].alone, costs[-1]
            world.say(
                f"| {name} | {k} | {operations} | {alone / costs[0].operations:.1%} | {last.operations - alone:.3g} | "
                f"{last.bytes / 1e9:.3g} GB | {last.sent / 1e9:.2g} GB |"
            )

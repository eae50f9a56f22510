"""The two kinds of step: SGD with momentum, and `DampedNewton`. Both are called with a batch and the step's number."""

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hessian import DeepMLPWithTracking
from imagenet.checkpoints import check_like
from imagenet.messages import RunError
from imagenet.ranks import World
from newton import DampedNewton, StepReport

MOMENTUM = 0.9
STEP_EPOCHS, STEP_FACTOR = 30, 0.1  # --lr-schedule step: a tenth every 30 epochs
WARM_UP = 5 / 90  # of the epochs


class NotFiniteError(RunError):
    """The loss of a batch is NaN or infinite."""


class Step(NamedTuple):
    """What a step did."""

    samples: int  # of all ranks
    loss: float  # their mean before the step
    forward_seconds: float
    hessian_seconds: float = 0.0
    report: StepReport | None = None


def finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NotFiniteError
    return loss


def sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum the ranks' gradients. The default, their mean, needs a larger loss, which overflows in fp16."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


class PlainStep:
    """SGD with momentum. A rank's loss is weighted by its share of the samples, and the gradients are summed.

    A batch without images is skipped.
    """

    def __init__(
        self, model: DeepMLPWithTracking, world: World, args: argparse.Namespace, rate: Callable[[int], float]
    ):
        self.model, self.world, self.args, self.rate = model, world, args, rate
        self.parallel: torch.nn.Module = model
        if world.ranks > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, device_ids=devices)
            self.parallel.register_comm_hook(None, sum_gradients)
        self.optimizer = torch.optim.SGD(model.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
        self.autocast = make_autocast(args, world.device)

    def __call__(self, x: Tensor, y: Tensor, number: int) -> Step:
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.parallel(x, y) if len(x) else 0.0 * self.parallel(x.new_zeros(1, self.model.input_dim)).sum()
        samples, total = self.world.sum(len(x), len(x) * loss.item())
        forward = time.perf_counter() - began
        if not samples:
            return Step(0, 0.0, forward)
        mean = finite(total / samples)
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
        check_dictionaries(state, "optimizer")
        if momenta := state["optimizer"]["state"]:  # none before the first step
            own = {index: {"momentum_buffer": p} for index, p in enumerate(self.model.parameters())}
            check_like(momenta, own, "optimizer")
        load_state(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            check_like(state["scaler"], self.scaler.state_dict(), "scaler")
            self.scaler.load_state_dict(state["scaler"])


class NewtonStep:
    """A DampedNewton step on every `freq`-th batch, a plain step on the others.

    Each rank holds its images. The first one decides and sends its weights to the others. So all ranks hold the same
    bits on any hardware. A batch without images is skipped.
    """

    def __init__(self, plain: PlainStep, newton: DampedNewton, freq: int):
        self.plain, self.newton, self.freq, self.world = plain, newton, freq, plain.world

    def __call__(self, x: Tensor, y: Tensor, number: int) -> Step:
        if number % self.freq:
            return self.plain(x, y, number)
        began = time.perf_counter()
        (samples,) = self.world.sum(len(x))
        if not samples:
            return Step(0, 0.0, 0.0)
        loss, forward = 0.0, 0.0

        def closure() -> Tensor | None:
            nonlocal loss, forward
            tracked = self.plain.model(x, y, track_activations=True) if len(x) else None
            (total,) = self.world.sum(0.0 if tracked is None else len(x) * tracked.item())
            loss, forward = finite(total / samples), time.perf_counter() - began
            return tracked

        self.newton.step(closure)
        self.plain.optimizer.state.clear()  # the old momentum points elsewhere now
        return Step(int(samples), loss, forward, time.perf_counter() - began - forward, self.newton.report)

    def state_dict(self) -> dict:
        return {"plain": self.plain.state_dict(), "newton": self.newton.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        check_dictionaries(state, "plain", "newton")
        self.plain.load_state_dict(state["plain"])
        own, saved = dict(self.newton.state_dict()["state"][0]), state["newton"]["state"][0]
        if "last" in saved:  # a step
            own["last"] = torch.cat([p.detach().flatten() for p in self.plain.model.parameters()])
        check_like(saved, own, "newton")
        load_state(self.newton, state["newton"])

    def set_damping(self, damping: float) -> None:
        """Start again from this λ."""
        for numbers in self.newton.state.values():
            numbers["damping"] = numbers["hessian_damping"] = damping


def check_dictionaries(state: dict, *names: str) -> None:
    """A tensor with a text as index warns before it fails."""
    for name in names:
        if not isinstance(state[name], dict):
            raise TypeError(f"{name} is a {type(state[name]).__name__}, not a dictionary")


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state but keep the options of this run's flags. (Each step sets the learning rate.)"""
    own = ("params", "lr")
    if [group["params"] for group in state["param_groups"]] != [list(range(len(optimizer.param_groups[0]["params"])))]:
        raise ValueError("the optimizer has other parameters")
    options = [{name: value for name, value in group.items() if name not in own} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, flags in zip(optimizer.param_groups, options, strict=True):
        group.update(flags)


def make_autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """The context of --amp."""
    if args.amp is None:
        return contextlib.nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    return lambda: torch.autocast(device.type, dtype)


def learning_rate_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the step's number: warm-up, then a cosine or steps."""
    warm_up = (args.epochs * WARM_UP if args.warmup_epochs is None else args.warmup_epochs) * steps_per_epoch
    total = args.epochs * steps_per_epoch

    def rate(number: int) -> float:
        if number < warm_up:
            return args.lr * (number + 1) / (warm_up + 1)
        if args.lr_schedule == "step":
            return args.lr * STEP_FACTOR ** (number // steps_per_epoch // STEP_EPOCHS)
        return args.lr * 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(total - warm_up, 1)))

    return rate


def build_step(
    args: argparse.Namespace, world: World, model: DeepMLPWithTracking, rate: Callable[[int], float]
) -> PlainStep | NewtonStep:
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
        group=dist.group.WORLD if world.ranks > 1 else None,
    )
    return NewtonStep(plain, newton, args.hessian_freq)

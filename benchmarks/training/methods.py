"""The step functions of all methods. All but Newton and Muon see the parameters as one vector: a step costs less."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.problems import Data
from benchmarks.training.hessian_free import HessianFree
from benchmarks.training.objective import NEWTON_BATCH, FlatModel, Job, StepDone, StepFunction, batches
from hessian import DeepMLPWithTracking
from newton import DampedNewton

WARM_UP = 100  # steps in which the learning rate of a first-order method grows linearly
LBFGS_SCALE = 1e6  # torch drops pairs with yᵀs < 1e-10 and ends line searches at steps of 1e-9


def first_order(job: Job, flat: FlatModel, optimizers: Sequence[torch.optim.Optimizer], data: Data) -> StepFunction:
    source, count = batches(*data, job.seed, job.batch), 0

    def step() -> StepDone:
        nonlocal count
        count += 1
        flat.objective(*next(source))
        for optimizer in optimizers:
            if count <= WARM_UP:
                optimizer.param_groups[0]["lr"] = job.learning_rate * count / WARM_UP
            optimizer.step()
        return StepDone()

    return step


def sgd(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    flat = FlatModel(model, job.decay)
    return first_order(job, flat, [torch.optim.SGD([flat.theta], job.learning_rate, momentum=0.9, fused=True)], data)


def adam(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    """Weight decay is part of the gradient if it is part of the objective. For test accuracy it is decoupled."""
    decoupled = job.track == "accuracy"
    flat = FlatModel(model, 0.0 if decoupled else job.decay)
    decay = job.decay if decoupled else 0.0
    optimizer = torch.optim.AdamW([flat.theta], job.learning_rate, weight_decay=decay, fused=True)
    return first_order(job, flat, [optimizer], data)


def muon(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    """Muon for the hidden weights, AdamW for the rest, at one learning rate (torch's match_rms_adamw)."""
    hidden = [p for layer in model.layers[1:-1] for p in layer.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    optimizers = (
        torch.optim.Muon(hidden, job.learning_rate, weight_decay=job.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, job.learning_rate, weight_decay=job.decay, fused=True),
    )
    return first_order(job, FlatModel(model), optimizers, data)


def lbfgs(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    """Five iterations a call, because each call evaluates the objective once more. It restarts when it stalls."""
    flat, previous = FlatModel(model, job.decay, accurate=True), math.inf
    optimizer = torch.optim.LBFGS(
        [flat.theta],
        job.learning_rate,
        max_iter=5,
        max_eval=10**6,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss = LBFGS_SCALE * flat.objective(*data)
        flat.gradient.mul_(LBFGS_SCALE)
        return loss

    def step() -> StepDone:
        nonlocal previous
        state = optimizer.state[flat.theta]
        before = state.get("n_iter", 0)
        loss = float(optimizer.step(closure))
        iterations = state.get("n_iter", 0) - before
        if not loss < previous:  # the call before made no progress
            state.clear()
        previous = loss
        return StepDone(iterations)

    return step


NEWTON_VARIANTS: dict[str, Callable[..., DampedNewton]] = {
    "newton": DampedNewton,
    "newton_parameter": partial(DampedNewton, metric="parameter"),
    "newton_hessian": partial(DampedNewton, curvature="hessian"),
    "newton_sweep": partial(DampedNewton, route="sweep"),
    "newton_gauss_newton": partial(DampedNewton, curvature="gauss_newton"),
}


def newton(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    """`DampedNewton`. On a fixed batch it takes all samples and stops where it has converged."""
    source, make_optimizer = batches(*data, job.seed, job.batch), NEWTON_VARIANTS[job.method]
    if not job.problem.samples:
        make_optimizer = partial(make_optimizer, curvature_batch=NEWTON_BATCH, gtol=0.0)
    optimizer = make_optimizer(model, weight_decay=job.decay, seed=job.seed)

    def step() -> StepDone:
        x, y = next(source)
        optimizer.step(lambda: model(x, y, track_activations=True))
        return StepDone(converged=optimizer.converged)

    return step


RIVALS: dict[str, Callable[[Job, DeepMLPWithTracking, Data], StepFunction]] = {
    "sgd": sgd,
    "adam": adam,
    "muon": muon,
    "lbfgs": lbfgs,
    "hessian_free": HessianFree,
}


def step_function(job: Job, model: DeepMLPWithTracking, data: Data) -> StepFunction:
    return RIVALS.get(job.method, newton)(job, model, data)

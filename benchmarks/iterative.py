"""Iterative rivals of the direct solve: MINRES, conjugate gradients, and those of curvlinops.

Each is run until the true residual is RTOL or its time is up. All take the closed-form products of this project, but
curvlinops its own. `HessianFactorization._product` is private. It is used because the public product checks the
model and takes its derivatives anew each time, which would slow the rivals down.
"""

from __future__ import annotations

import importlib
import time
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, minres
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from benchmarks.problems import RTOL, Problem, seconds
from benchmarks.report import formatted
from hessian import HessianFactorization


class Iterated(NamedTuple):
    """What an iterative method did. `failure` says why there is no residual."""

    seconds: float
    products: int
    residual: float
    failure: str = ""

    @property
    def reached(self) -> bool:
        return self.residual <= RTOL and not self.failure

    def text(self, unit: float) -> str:
        if self.failure:
            return self.failure
        units = formatted(self.seconds / unit)
        return (units if self.reached else f"> {units}, at {self.residual:.0e}") + f" ({self.products})"


class CountedProduct(LinearOperator):
    def __init__(self, f: HessianFactorization):
        super().__init__(np.dtype("float64"), (f.num_parameters, f.num_parameters))
        self.f, self.count = f, 0

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.count += 1
        return self.f._product(torch.from_numpy(x).reshape(-1, 1))[:, 0].numpy()


class _Stop(Exception):
    pass


def minres_to_rtol(problem: Problem, f: HessianFactorization, max_seconds: float) -> Iterated:
    """scipy's MINRES. The true residual is taken whenever the products have grown by 5 %, with the clock stopped."""
    v, product, next_check, residual, checking = problem.v, CountedProduct(f), 1, 1.0, 0.0

    def check(x: np.ndarray) -> None:
        nonlocal residual, checking, next_check
        now = time.perf_counter()
        late = now - started - checking > max_seconds
        if product.count >= next_check or late:
            residual = f.residual(torch.from_numpy(x), v).item()
            next_check = max(product.count + 1, int(1.05 * product.count))
            checking += time.perf_counter() - now
            if residual <= RTOL or late:
                raise _Stop

    # MINRES takes dot products by numpy: with one thread, since numpy's threads and torch's wait for each other
    with threadpool_limits(1, user_api="blas"):
        started = time.perf_counter()
        try:
            x, _ = minres(product, v.numpy(), rtol=1e-16, maxiter=10**7, callback=check)
            elapsed = time.perf_counter() - started - checking
            residual = f.residual(torch.from_numpy(x), v).item()
        except _Stop:
            elapsed = time.perf_counter() - started - checking
    return Iterated(elapsed, product.count, residual)


def cg_to_rtol(problem: Problem, f: HessianFactorization, max_seconds: float) -> Iterated:
    """Conjugate gradients. They need H + εI ≻ 0: a direction p with pᵀ(H + εI)p ≤ 0 ends them."""
    v, products, started = problem.v[:, None], 0, time.perf_counter()
    x, r, p = torch.zeros_like(v), v, v
    squared = first = float(v.mT @ v)
    while squared > (0.5 * RTOL) ** 2 * first and time.perf_counter() - started < max_seconds:
        Ap, products = f._product(p), products + 1
        curvature = float(p.mT @ Ap)
        if curvature <= 0:
            return Iterated(time.perf_counter() - started, products, 1.0, f"indefinite ({products})")
        x, r = x + squared / curvature * p, r - squared / curvature * Ap
        squared, before = float(r.mT @ r), squared
        p = r + squared / before * p
    elapsed = time.perf_counter() - started
    return Iterated(elapsed, products, f.residual(x[:, 0], problem.v).item())


class _CountedLoss(nn.CrossEntropyLoss):
    """With the classes in the last dimension. It counts its calls: one a product."""

    calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(outputs.movedim(-1, 1), targets)


def curvlinops_product(problem: Problem) -> Tensor | None:
    """curvlinops' H v; None where it is not installed."""
    try:
        curvlinops = importlib.import_module("curvlinops")
    except ImportError:
        return None
    parameters, data = list(problem.model.parameters()), [problem.data]
    return (
        curvlinops.HessianLinearOperator(problem.model, _CountedLoss(), parameters, data, check_deterministic=False)
        @ problem.v
    )


def curvlinops_to_rtol(problem: Problem, f: HessianFactorization, max_seconds: float) -> Iterated:
    """`curvlinops.CGInverseLinearOperator` on curvlinops' own Hessian.

    It has no limit of time. Its limit of iterations is as many as fit into `max_seconds`, by the time of one product.
    """
    try:
        curvlinops, examples = map(importlib.import_module, ("curvlinops", "curvlinops.examples"))
    except ImportError:
        return Iterated(0.0, 0, 1.0, "not installed")
    loss, (x, y) = _CountedLoss(), problem.data
    parameters = list(problem.model.parameters())
    H = curvlinops.HessianLinearOperator(problem.model, loss, parameters, [(x, y)], check_deterministic=False)
    A = H + f.damping * examples.IdentityLinearOperator([p.shape for p in parameters], x.device, problem.v.dtype)
    most = max(1, int(max_seconds / min(seconds(lambda: A @ problem.v) for _ in range(3))))
    settings = dict(max_iter=most, tolerance=0.5 * RTOL, eps=0.0, stop_updating_after=1e-16, max_tridiag_iter=0)
    loss.calls = 0
    started = time.perf_counter()
    solution = curvlinops.CGInverseLinearOperator(A, **settings) @ problem.v
    elapsed = time.perf_counter() - started
    return Iterated(elapsed, loss.calls, f.residual(solution, problem.v).item())


ITERATIVE = {"MINRES": minres_to_rtol, "CG": cg_to_rtol, "curvlinops' CG": curvlinops_to_rtol}

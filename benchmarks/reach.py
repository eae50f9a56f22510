"""Residual and inertia against ε: the sweep with and without carried pivots, beside a dense solve.

Two private names are used. `_hessian.carried_pivots._GROWTH` switches carrying off, which no user would want.
`HessianFactorization._refined` gives the refined solution where `solve` would raise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from _hessian import carried_pivots
from benchmarks.problems import RTOL, Data, Problem, dense_solve, draw_weights, problem_of
from benchmarks.report import Panel, Points, Report, table
from hessian import DeepMLPWithTracking, HessianFactorization, SingularHessianError

DAMPINGS = tuple(10.0**-k for k in range(-1, 9))
DENSE = "dense, 1 step"
METHODS = ("plain", "plain, 1 step", "plain, 2 steps", "plain, certified", "carried", "carried, certified", DENSE)
DRAWN = ("plain", "plain, certified", "carried", "carried, certified", DENSE)


class Net(NamedTuple):
    """gain: weights N(0, gain² / fan-in), biases 0. None: the model's own initialization times 1.2, plus N(0, 0.01)."""

    name: str
    inputs: int
    hidden: tuple[int, ...]  # widths
    batch: int
    classes: int = 10
    gain: float | None = None
    residual: bool = False
    digits: bool = False
    activation: str = "tanh"

    def build(self) -> Problem:
        torch.manual_seed(0)
        depth = len(self.hidden)
        model = DeepMLPWithTracking(
            self.inputs, self.hidden, self.classes, depth, self.activation, residual=self.residual
        ).double()
        with torch.no_grad():
            for layer in model.layers:
                for p in layer.parameters():
                    p.mul_(1.2).add_(0.1 * torch.randn_like(p))
                if self.gain is not None:
                    draw_weights(layer.parameters(), self.gain)
        return problem_of(model, self.batch, standardized_digits(self.batch) if self.digits else None)


NETS = (
    Net("30 layers of width 8, 32 digits", 64, (8,) * 29, 32, gain=1.2, digits=True),
    Net("12 layers of width 16, 5 samples", 16, (16,) * 11, 5, gain=1.0),
    Net("8 layers of width 16, 5 samples, relu", 16, (16,) * 7, 5, activation="relu"),
    Net("widths 6, 4, 7, 3 samples", 5, (6, 4, 7), 3, classes=3),
    Net(
        "20 layers, widths 3 … 7, skips, 9 samples",
        5,
        (5, 5, 4, 6, 3, 4, 7, 5, 3, 6, 4) + (5,) * 8,
        9,
        3,
        residual=True,
    ),
)


def standardized_digits(samples: int) -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:samples]).double(), torch.from_numpy(labels[:samples]).long()
    deviation = x.std(0)
    return (x - x.mean(0)) / torch.where(deviation > 0, deviation, 1.0), y


@contextlib.contextmanager
def nothing_carried() -> Iterator[None]:
    """The sweep eliminates every pivot at once, however near 0 it is."""
    bound, carried_pivots._GROWTH = carried_pivots._GROWTH, math.inf
    try:
        yield
    finally:
        carried_pivots._GROWTH = bound


def relative_residual(A: Tensor, x: Tensor, v: Tensor) -> float:
    return float(torch.linalg.vector_norm(A @ x - v) / torch.linalg.vector_norm(v))


def refined_residuals(f: HessianFactorization, A: Tensor, v: Tensor, steps: int) -> list[float]:
    """Of the direct solve, and of each step of iterative refinement x ← x + F⁻¹(v − A x)."""
    x = f.solve(v, rtol=None)
    residuals = [relative_residual(A, x, v)]
    for _ in range(steps):
        x = x + f.solve(v - A @ x, rtol=None)
        residuals.append(relative_residual(A, x, v))
    return residuals


class Measured(NamedTuple):
    residuals: dict[str, float]  # by method; NaN where it fails
    inertia_error: dict[str, int | None]  # by sweep: negative eigenvalues counted, less those of eigvalsh
    log_error: dict[str, float]  # by sweep: |log|det| − Σ log|μ + ε||
    near: int  # eigenvalues within rounding of −ε, on either side


def measure(problem: Problem, H: Tensor, eigenvalues: Tensor, damping: float) -> Measured:
    A, v = H + damping * torch.eye(len(H), dtype=H.dtype), problem.v
    negative, logabsdet = int((eigenvalues < -damping).sum()), float((eigenvalues + damping).abs().log().sum())
    residuals = dict.fromkeys(METHODS, math.nan)
    residuals[DENSE] = relative_residual(A, dense_solve(A, v), v)
    inertia_error: dict[str, int | None] = {"plain": None, "carried": None}
    log_error = dict.fromkeys(inertia_error, math.nan)
    for name in inertia_error:
        with contextlib.suppress(SingularHessianError):
            with nothing_carried() if name == "plain" else contextlib.nullcontext():
                f = problem.factorize(damping)
                steps = refined_residuals(f, A, v, 2 if name == "plain" else 0)
                residuals |= zip((name, f"{name}, 1 step", f"{name}, 2 steps"), steps, strict=False)
                residuals[f"{name}, certified"] = relative_residual(A, f._refined(v[:, None], RTOL).x[:, 0], v)
            inertia_error[name] = f.num_negative_eigenvalues - negative
            log_error[name] = abs(f.logabsdet - logabsdet)
    rounding = 1e-15 * float(eigenvalues.abs().max()) * len(H) ** 0.5
    return Measured(residuals, inertia_error, log_error, int(((eigenvalues + damping).abs() < rounding).sum()))


def reach(quick: bool) -> Report:
    nets, dampings = (NETS[-2:-1], DAMPINGS[::3]) if quick else (NETS, DAMPINGS)
    header = ["ε", *METHODS, "carried, certified / dense", "inertia off: plain", "carried"]
    header += ["log\\|det\\| off: plain", "carried", "eigenvalues at −ε"]
    lines, panels = [], []
    progress = tqdm(total=len(nets) * len(dampings), desc="reach", disable=None)
    for net in nets:
        problem, rows = net.build(), []
        curves: dict[str, Points] = {name: [] for name in DRAWN}
        H = problem.dense_hessian()
        H = (H + H.mT) / 2
        eigenvalues = torch.linalg.eigvalsh(H)
        for damping in dampings:
            found = measure(problem, H, eigenvalues, damping)
            ratio = found.residuals["carried, certified"] / found.residuals[DENSE]
            residuals = [f"{value:.0e}" for value in found.residuals.values()]
            inertia = ["failed" if value is None else value for value in found.inertia_error.values()]
            log_error = [f"{value:.0e}" for value in found.log_error.values()]
            rows.append([f"{damping:g}", *residuals, f"{ratio:.2g}", *inertia, *log_error, found.near])
            for name in DRAWN:
                curves[name].append((damping, found.residuals[name]))
            progress.update()
        lines += [f"{net.name}, P = {len(problem.v):,}, ‖H‖ = {float(eigenvalues.abs().max()):.2g}:", ""]
        lines += [*table(header, rows), ""]
        panels.append(Panel(net.name, "ε", "relative residual", curves))
    progress.close()
    lines += [
        "Residuals of (H + εI) x = v for random v; H is dense, by exact products. Plain: no pivot is carried. Then 1 "
        "or 2 steps of iterative refinement follow, or the residual-minimizing iteration of a certified solve. "
        "Carried: as shipped. Dense: LU and one step of refinement. Inertia off: negative eigenvalues counted by the "
        "sweep, less those of `torch.linalg.eigvalsh`. Of eigenvalues within rounding of −ε that can't tell the side: "
        "the last column counts them. log|det| likewise."
    ]
    return Report(lines, panels)

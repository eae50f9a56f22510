"""`python3 benchmark.py reach`: residual and inertia against ε, with and without carried pivots, beside a dense solve.

A module of its own for what the other subcommands don't need: a dense Hessian with all its eigenvalues, and the sweep
with its safeguard off.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import hessian_carried
from benchmark import Panel, Problem, draw, table, write
from hessian import DeepMLPWithTracking, HessianFactorization, SingularHessianError, hessian_vector_product

RTOL = 1e-8
DAMPINGS = tuple(10.0**-k for k in range(-1, 9))
METHODS = (
    "plain",
    "plain, 1 step",
    "plain, 2 steps",
    "plain, certified",
    "carried",
    "carried, certified",
    "dense, 1 step",
)
DRAWN = ("plain", "plain, certified", "carried", "carried, certified", "dense, 1 step")


class Net(NamedTuple):
    """Widths of the hidden layers. gain: weights N(0, gain²/fan-in) and no biases; None: 1.2 times the model's own
    initialization, all moved by N(0, 0.01), as the tests do."""

    name: str
    inputs: int
    hidden: tuple[int, ...]
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
            for linear in model.layers:
                for p in linear.parameters():
                    p.mul_(1.2).add_(0.1 * torch.randn_like(p))
                if self.gain is not None:
                    linear.weight.normal_(0, self.gain * linear.in_features**-0.5)
                    linear.bias.zero_()
        x = torch.randn(self.batch, self.inputs, dtype=torch.float64)
        y = torch.randint(self.classes, (self.batch,))
        if self.digits:
            x, y = standardized_digits(self.batch)
        v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        return Problem(model, model(x, y, track_activations=True), v)


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


def standardized_digits(samples: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x[:samples]).double(), torch.from_numpy(y[:samples]).long()
    deviation = x.std(0)
    return (x - x.mean(0)) / torch.where(deviation > 0, deviation, 1.0), y


@contextlib.contextmanager
def nothing_carried() -> Iterator[None]:
    """The sweep without its safeguard: no pivot is too near 0 for it."""
    bound, hessian_carried._GROWTH = hessian_carried._GROWTH, math.inf
    try:
        yield
    finally:
        hessian_carried._GROWTH = bound


def relative(A: Tensor, x: Tensor, v: Tensor) -> float:
    return float(torch.linalg.vector_norm(A @ x - v) / torch.linalg.vector_norm(v))


def refined_steps(f: HessianFactorization, A: Tensor, v: Tensor, steps: int) -> list[float]:
    """Residuals of the direct solve, and of each step of iterative refinement x ← x + F⁻¹(v − A x)."""
    x = f.solve(v, rtol=None)
    residuals = [relative(A, x, v)]
    for _ in range(steps):
        x = x + f.solve(v - A @ x, rtol=None)
        residuals.append(relative(A, x, v))
    return residuals


def certified(f: HessianFactorization, A: Tensor, v: Tensor) -> float:
    """Of the refined solve, whether it meets RTOL or not: `f.solve` would raise, and first try what would do."""
    return relative(A, f._refined(v[:, None], RTOL).x[:, 0], v)


def dense_residual(A: Tensor, v: Tensor) -> float:
    factors = torch.linalg.lu_factor(A)
    x = torch.linalg.lu_solve(*factors, v[:, None])
    return relative(A, (x + torch.linalg.lu_solve(*factors, v[:, None] - A @ x))[:, 0], v)


class Measured(NamedTuple):
    residuals: dict[str, float]  # by method; NaN where it fails
    off: dict[str, int | None]  # by sweep: negative eigenvalues counted, less those of eigvalsh
    log_off: dict[str, float]  # by sweep: |log|det| − Σ log|μ + ε||
    near: int  # eigenvalues within rounding of −ε, either sign


def measure(problem: Problem, H: Tensor, eigenvalues: Tensor, damping: float) -> Measured:
    A = H + damping * torch.eye(len(H), dtype=H.dtype)
    negative, logabsdet = int((eigenvalues < -damping).sum()), float((eigenvalues + damping).abs().log().sum())
    off, log_off = dict.fromkeys(("plain", "carried")), dict.fromkeys(("plain", "carried"), math.nan)
    residuals = dict.fromkeys(METHODS, math.nan)
    residuals["dense, 1 step"] = dense_residual(A, problem.v)
    for name in off:
        with contextlib.suppress(SingularHessianError):
            with nothing_carried() if name == "plain" else contextlib.nullcontext():
                f = problem.factorize(damping)
                steps = refined_steps(f, A, problem.v, 2 if name == "plain" else 0)
                residuals |= zip((name, f"{name}, 1 step", f"{name}, 2 steps"), steps, strict=False)
                residuals[f"{name}, certified"] = certified(f, A, problem.v)
            off[name] = f.num_negative_eigenvalues - negative
            log_off[name] = abs(f.logabsdet - logabsdet)
    rounding = 1e-15 * float(eigenvalues.abs().max()) * len(H) ** 0.5
    return Measured(residuals, off, log_off, int(((eigenvalues + damping).abs() < rounding).sum()))


def reach(args: argparse.Namespace) -> None:
    nets, dampings = (NETS[-2:-1], DAMPINGS[::3]) if args.quick else (NETS, DAMPINGS)
    header = ["ε", *METHODS, "carried, certified / dense", "inertia off: plain", "carried"]
    header += ["log\\|det\\| off: plain", "carried", "eigenvalues at −ε"]
    lines, panels = [], []
    progress = tqdm(total=len(nets) * len(dampings), desc="reach", disable=None)
    for net in nets:
        problem, rows = net.build(), []
        curves: dict[str, list[tuple[float, float]]] = {name: [] for name in DRAWN}
        H = hessian_vector_product(problem.model, problem.loss, torch.eye(len(problem.v), dtype=torch.float64))
        H = (H + H.mT) / 2
        eigenvalues = torch.linalg.eigvalsh(H)
        for damping in dampings:
            found = measure(problem, H, eigenvalues, damping)
            ratio = found.residuals["carried, certified"] / found.residuals["dense, 1 step"]
            off = ["failed" if value is None else value for value in found.off.values()]
            residuals = [f"{value:.0e}" for value in found.residuals.values()]
            log_off = [f"{value:.0e}" for value in found.log_off.values()]
            rows.append([f"{damping:g}", *residuals, f"{ratio:.2g}", *off, *log_off, found.near])
            for name in DRAWN:
                curves[name].append((damping, found.residuals[name]))
            progress.update()
        lines += [f"{net.name}, P = {len(problem.v):,}, ‖H‖ = {float(eigenvalues.abs().max()):.2g}:", ""]
        lines += [*table(header, rows), ""]
        panels.append(Panel(net.name, "ε", "relative residual", curves))
    progress.close()
    lines += [
        "Residuals of (H + εI) x = v, v random, H dense by exact products. Plain: no pivot is carried, then 1 or 2 "
        "steps of iterative refinement, or the residual-minimizing one of a certified solve; carried: as shipped. "
        "Dense: LU and one refinement. Inertia off: negative eigenvalues counted by the sweep, less those of "
        "`torch.linalg.eigvalsh`, which can't tell those within rounding of −ε (last column); log|det| likewise."
    ]
    draw(args, panels)
    write(args, lines)

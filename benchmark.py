"""Measure the solve: python3 benchmark.py COMMAND [--out-dir runs/benchmark] [--quick] [--threads 1]
         training:  python3 benchmark.py training PROBLEM (its own options: python3 benchmark.py training --help)
         ImageNet:  python3 benchmark.py imagenet {throughput,steps,compare}

    solve    the rows of the README's table: factor and solve in float64 and mixed precision, a second damping, beside
             a dense Hessian with LU, MINRES, CG, and curvlinops' CG (pip install curvlinops-for-pytorch), at several ε
    layers   time against the number of layers, 2 … 1,024
    width    time and residual against the width
    batch    time against the samples: Gauss–Newton by its three routes, and which one route='auto' takes
    rhs      1 … 1,024 right-hand sides at once, in shares of the rate of a matrix product
    reach    residual and inertia against ε, 10 … 1e-8: the sweep with and without carried pivots, and dense
    memory   peak memory, each case in a process of its own, beside `estimate_cost`
    shapes   150,528 inputs, 1,000 classes, and 20 layers of width 128 beside a forward and backward pass

Times of `solve` are in units of one 1000 × 1000 float64 matrix product in the same process, minima of runs that
alternate with the product, since machines are shared and noisy. Every rival gets the same closed-form products, but
curvlinops its own. Each subcommand prints a Markdown table and writes it under --out-dir, with the command and the
machine, and a picture where it has one. --quick: seconds, with fewer and smaller rows. One thread, unless --threads.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.sparse.linalg import LinearOperator, minres
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from hessian import (
    DeepMLPWithTracking,
    HessianFactorization,
    estimate_cost,
    factorize_hessian,
    hessian_vector_product,
)

DAMPING, SECOND_DAMPING, RTOL = 0.1, 0.2, 1e-8
DAMPINGS = (100.0, 10.0, 1.0, DAMPING)  # of the rows in SWEPT
DENSE_LIMIT = 6000  # parameters; beyond it the dense Hessian is not formed, its bytes are printed
OPERATIONS_LIMIT = 1e11  # a route that counts more is not run in `batch`
ROWS = ((8, 8, 64), (32, 8, 16), (64, 8, 16), (32, 32, 16), (64, 32, 8))  # width, N, layers
SWEPT = (ROWS[0], ROWS[3])
QUICK_ROWS = ((8, 8, 8), (16, 8, 8))


class Problem(NamedTuple):
    model: DeepMLPWithTracking
    loss: Tensor
    v: Tensor

    def factorize(self, damping: float = DAMPING, route: str = "sweep", **options) -> HessianFactorization:
        return factorize_hessian(self.model, self.loss, damping, route=route, **options)


def problem(width: int, batch: int, num_layers: int, classes: int = 10) -> Problem:
    """Input and hidden width equal, weights N(0, 1/width), no biases but zero ones."""
    torch.manual_seed(0)
    model = DeepMLPWithTracking(width, width, classes, num_layers - 1).double()
    with torch.no_grad():
        for linear in model.layers:
            linear.weight.normal_(0, width**-0.5)
            linear.bias.zero_()
    x, y = torch.randn(batch, width, dtype=torch.float64), torch.randint(classes, (batch,))
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    return Problem(model, model(x, y, track_activations=True), v)


# ------------------------------------------------------------------------------------------------------ methods


def dense(problem: Problem, damping: float) -> Tensor:
    """H by P products, then LU, a solve and one refinement."""
    identity = torch.eye(len(problem.v), dtype=torch.float64)
    A = hessian_vector_product(problem.model, problem.loss, identity) + damping * identity
    factors = torch.linalg.lu_factor(A)
    x = torch.linalg.lu_solve(*factors, problem.v[:, None])
    return (x + torch.linalg.lu_solve(*factors, problem.v[:, None] - A @ x))[:, 0]


class Iterated(NamedTuple):
    """What an iterative method did to reach RTOL by the true residual; `failure` in place of a residual."""

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


class _Reached(Exception):
    pass


def minres_to_rtol(problem: Problem, f: HessianFactorization, limit: float) -> Iterated:
    """MINRES on the products of f, of which it uses nothing else: they don't check the model anew each time. Stopped
    at `limit` seconds, or at RTOL by the true residual, looked at every 5 % of its products with the clock stopped."""
    v, count, next_look, residual, looking = problem.v, 0, 1, 1.0, 0.0

    def product(x):
        nonlocal count
        count += 1
        return f._product(torch.from_numpy(x).reshape(-1, 1))[:, 0].numpy()

    def look(x) -> None:
        nonlocal residual, looking, next_look
        now = time.perf_counter()
        late = now - started - looking > limit
        if count >= next_look or late:
            residual, next_look = f.residual(torch.from_numpy(x), v).item(), max(count + 1, int(1.05 * count))
            looking += time.perf_counter() - now
            if residual <= RTOL or late:
                raise _Reached

    operator = LinearOperator((len(v), len(v)), product, dtype="float64")
    # numpy's pool of threads and torch's would wait for each other: MINRES' dot products take one
    with threadpool_limits(1, user_api="blas"):
        started = time.perf_counter()
        try:
            x, _ = minres(operator, v.numpy(), rtol=1e-16, maxiter=10**7, callback=look)
            elapsed = time.perf_counter() - started - looking
            residual = f.residual(torch.from_numpy(x), v).item()
        except _Reached:
            elapsed = time.perf_counter() - started - looking
    return Iterated(elapsed, count, residual)


def cg_to_rtol(problem: Problem, f: HessianFactorization, limit: float) -> Iterated:
    """Conjugate gradients on the products of f: defined where H + εI ≻ 0, which a direction with pᵀAp ≤ 0 refutes."""
    v, count, started = problem.v[:, None], 0, time.perf_counter()
    x, r, p = torch.zeros_like(v), v, v
    squared = first = float(v.mT @ v)
    while squared > (0.5 * RTOL) ** 2 * first and time.perf_counter() - started < limit:
        Ap, count = f._product(p), count + 1
        curvature = float(p.mT @ Ap)
        if curvature <= 0:
            return Iterated(time.perf_counter() - started, count, 1.0, f"indefinite ({count})")
        x, r = x + squared / curvature * p, r - squared / curvature * Ap
        squared, before = float(r.mT @ r), squared
        p = r + squared / before * p
    elapsed = time.perf_counter() - started
    return Iterated(elapsed, count, f.residual(x[:, 0], problem.v).item())


def curvlinops_to_rtol(problem: Problem, f: HessianFactorization, limit: float) -> Iterated:
    """`curvlinops.CGInverseLinearOperator` on its own Hessian. It does not look at the clock: the iterations that fit
    into `limit` by the time of one product are its limit."""
    try:
        from curvlinops import CGInverseLinearOperator, HessianLinearOperator
        from curvlinops.examples import IdentityLinearOperator
    except ImportError:
        return Iterated(0.0, 0, 1.0, "not installed")
    model, tracked, loss, calls = problem.model, problem.model._tracked, nn.CrossEntropyLoss(), []
    loss.register_forward_hook(lambda *_: calls.append(1))  # one call a product
    parameters, batch = list(model.parameters()), (tracked.inputs, tracked.targets)
    H = HessianLinearOperator(model, loss, parameters, [batch], check_deterministic=False)
    A = H + f.damping * IdentityLinearOperator([p.shape for p in parameters], batch[0].device, batch[0].dtype)
    most = max(1, int(limit / min(seconds(lambda: A @ problem.v) for _ in range(3))))
    settings = dict(max_iter=most, tolerance=0.5 * RTOL, eps=0.0, stop_updating_after=1e-16, max_tridiag_iter=0)
    calls.clear()
    started = time.perf_counter()
    x = CGInverseLinearOperator(A, **settings) @ problem.v
    elapsed = time.perf_counter() - started
    return Iterated(elapsed, len(calls), f.residual(x, problem.v).item())


ITERATIVE = {"MINRES": minres_to_rtol, "CG": cg_to_rtol, "curvlinops' CG": curvlinops_to_rtol}


# ---------------------------------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_units(works: dict[str, Callable[[], object]], repeats: int = 3) -> tuple[dict[str, float], float]:
    """The minimum time of each in units of the product's minimum, alternating; and the unit in seconds."""
    M = torch.randn(1000, 1000, dtype=torch.float64)
    unit, best = float("inf"), dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            unit = min(unit, *(seconds(lambda: M @ M) for _ in range(3)))
            best[name] = min(best[name], seconds(work))
    return {name: value / unit for name, value in best.items()}, unit


def machine() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, CPU"


def bytes_of_dense(num_parameters: int) -> str:
    size = 8 * num_parameters**2
    return f"{size / 1e9:.3g} GB"


def formatted(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Markdown lines. Floats are printed to three digits, and integers with commas."""

    def cell(value: object) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return formatted(value) if isinstance(value, float | None) else str(value)

    return ["| " + " | ".join(map(cell, row)) + " |" for row in (header, ["---"] * len(header), *rows)]


def write(args: argparse.Namespace, lines: Sequence[str]) -> None:
    command = f"python3 benchmark.py {args.command}" + (" --quick" if args.quick else "")
    command += f" --threads {args.threads}" if args.threads != 1 else ""
    text = "\n".join([f"`{command}`; {machine()}.", "", *lines]) + "\n"
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"{args.command}.md"
    path.write_text(text)
    print(text)
    print(f"Table: {path}")


class Panel(NamedTuple):
    """One log-log picture; each curve a list of (x, y), and `marks` points to put a ring around."""

    title: str
    xlabel: str
    ylabel: str
    curves: dict[str, list[tuple[float, float]]]
    marks: Sequence[tuple[float, float]] = ()
    marked: str = ""  # what a ring means


def draw(args: argparse.Namespace, panels: Sequence[Panel]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for (name, points), marker in zip(panel.curves.items(), "osv^Dx*", strict=False):
            if points:
                axis.loglog(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        if panel.marks:
            ring = dict(marker="o", linestyle="", markersize=11, markerfacecolor="none", color="black")
            axis.loglog(*zip(*panel.marks, strict=True), label=panel.marked, **ring)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"{args.command}.png"
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


# -------------------------------------------------------------------------------------------------- subcommands


class Row(NamedTuple):
    cells: list[object]
    ours: float  # units of the certified solve
    best: tuple[str, float] | None  # the fastest iterative method that reached RTOL, and its units


def solve_row(shape: tuple[int, int, int], damping: float, limit: float) -> tuple[Row, float]:
    item = problem(*shape)
    f, mixed = item.factorize(damping), item.factorize(damping, precision="mixed")
    works = {
        "direct": lambda: item.factorize(damping).solve(item.v, rtol=None),
        "certified": lambda: item.factorize(damping).solve(item.v, rtol=RTOL),
        "mixed": lambda: item.factorize(damping, precision="mixed").solve(item.v, rtol=RTOL),
        "second": lambda: f.with_damping(SECOND_DAMPING / DAMPING * damping).solve(item.v, rtol=RTOL),
    }
    residual = f.residual(f.solve(item.v, rtol=RTOL), item.v).item()
    units, unit = in_units(works, 3 if damping == DAMPING else 2)
    dense_text = bytes_of_dense(len(item.v))
    if len(item.v) <= DENSE_LIMIT and damping != DAMPING:
        dense_text = f"as at ε = {DAMPING}"
    elif len(item.v) <= DENSE_LIMIT:
        dense_text = formatted(min(seconds(lambda: dense(item, damping)) for _ in range(2)) / unit)
    limit = max(limit, 2 * units["certified"] * unit)
    with warnings.catch_warnings(action="ignore"):  # curvlinops': that it stopped above its tolerance, as we report
        iterated = {name: method(item, f, limit) for name, method in ITERATIVE.items()}
    best = min(((x.seconds / unit, name) for name, x in iterated.items() if x.reached), default=None)
    cells = [
        ", ".join(map(str, shape)),
        len(item.v),
        damping,
        units["direct"],
        units["certified"],
        f"{formatted(units['mixed'])} ({mixed.precision})",
        units["second"],
        units["certified"] * unit,
        f"{residual:.0e}",
        "yes" if f.is_positive_definite else "no",
        dense_text,
        *(x.text(unit) for x in iterated.values()),
    ]
    return Row(cells, units["certified"], best and best[::-1]), unit


def solve(args: argparse.Namespace) -> None:
    header = ["width, N, layers", "P", "ε", "direct", "certified", "mixed, certified (kept)", "at a second ε"]
    header += ["certified, seconds", "its residual", "H + εI ≻ 0", "dense Hessian, LU", *ITERATIVE]
    shapes = QUICK_ROWS if args.quick else ROWS
    jobs = [(shape, DAMPING) for shape in shapes]
    jobs += [(s, e) for s in (shapes[:1] if args.quick else SWEPT) for e in DAMPINGS if e != DAMPING]
    rows, crossings, limit = [], [], 0.3 if args.quick else 3
    for shape, damping in tqdm(sorted(jobs, key=lambda j: (shapes.index(j[0]), -j[1])), desc="solve", disable=None):
        row, unit = solve_row(shape, damping, limit)
        rows.append(row.cells)
        where = f"{row.cells[0]} at ε = {damping:g}"
        if row.best is None:
            crossings.append(f"- {where}: certified; no iterative method got there.")
        else:
            name, units = row.best
            first = "certified" if row.ours <= units else name
            crossings.append(f"- {where}: {first} ({formatted(row.ours)} against {formatted(units)}, {name}).")
    notes = [
        "",
        f"Units of one 1000³ product ({1e3 * unit:.1f} ms); random v, 10 classes, one right-hand side. Ours: least of "
        f"three runs (two where ε is not {DAMPING}), the mixed one with the precision that was kept; at a second ε, "
        "twice the first, by `with_damping`, certified. Dense: least of two. Iterative: one run until the residual "
        f"is {RTOL:g} (products), stopped at {limit:g} s or at twice our certified time with what they had by then.",
        "",
        "Who is first to a certified residual:",
        "",
    ]
    write(args, [*table(header, rows), *notes, *crossings])


def layers(args: argparse.Namespace) -> None:
    width, batch = 16, 8
    depths = [2**k for k in range(1, 5 if args.quick else 11)]
    curves: dict[str, list[tuple[float, float]]] = {
        "certified": [],
        "direct": [],
        "dense Hessian, LU": [],
        "MINRES": [],
    }
    rows = []
    for depth in tqdm(depths, desc="layers", disable=None):
        item = problem(width, batch, depth)
        works = {rtol: lambda rtol=rtol, p=item: p.factorize().solve(p.v, rtol=rtol) for rtol in (None, RTOL)}
        units, unit = in_units(works)
        curves["direct"].append((depth, units[None] * unit))
        curves["certified"].append((depth, units[RTOL] * unit))
        dense_text = bytes_of_dense(len(item.v))
        if len(item.v) <= (3000 if args.quick else DENSE_LIMIT):
            elapsed = min(seconds(lambda p=item: dense(p, DAMPING)) for _ in range(2))
            curves["dense Hessian, LU"].append((depth, elapsed))
            dense_text = f"{1e3 * elapsed:.1f}"
        iterated = minres_to_rtol(item, item.factorize(), 0.5 if args.quick else 5)
        if iterated.reached:
            curves["MINRES"].append((depth, iterated.seconds))
        rows.append(
            [depth, len(item.v), *(1e3 * units[rtol] * unit for rtol in works), dense_text, iterated.text(1e-3)]
        )
    title = f"(H + {DAMPING} I) x = v to {RTOL:g}: width {width}, N = {batch}"
    draw(args, [Panel(title, "linear layers", "seconds", curves)])
    header = ["layers", "P", "direct, ms", "certified, ms", "dense Hessian, LU, ms", "MINRES, ms (products)"]
    write(args, table(header, rows))


def width(args: argparse.Namespace) -> None:
    batch, num_layers = 8, 8
    widths = [2**k for k in range(2, 6 if args.quick else 9)]
    times: dict[str, list[tuple[float, float]]] = {"direct": [], "certified": [], "mixed, certified": []}
    residuals: dict[str, list[tuple[float, float]]] = {name: [] for name in times}
    rows = []
    for a in tqdm(widths, desc="width", disable=None):
        item = problem(a, batch, num_layers)
        settings = {"direct": (None, "float64"), "certified": (RTOL, "float64"), "mixed, certified": (RTOL, "mixed")}
        works = {
            name: lambda p=item, rtol=rtol, precision=precision: p.factorize(precision=precision).solve(p.v, rtol=rtol)
            for name, (rtol, precision) in settings.items()
        }
        units, unit = in_units(works)
        f = item.factorize()
        for name, work in works.items():
            times[name].append((a, units[name] * unit))
            residuals[name].append((a, f.residual(work(), item.v).item()))
        cost = estimate_cost(item.model, batch)["sweep"].operations
        share = f"{cost / 2e9 / units['direct']:.0%}"
        row = [a, len(item.v), *(x[-1][1] for x in times.values()), *(f"{x[-1][1]:.0e}" for x in residuals.values())]
        rows.append([*row, share])
    title = f"N = {batch}, {num_layers} layers, ε = {DAMPING}"
    draw(args, [Panel(title, "width", "seconds", times), Panel(title, "width", "relative residual", residuals)])
    header = ["width", "P", *(f"{x}, s" for x in times), *(f"residual, {x}" for x in times)]
    header.append("direct: share of the product's rate")
    notes = ["", f"{title}. The share counts the operations of the factorization by `estimate_cost`."]
    write(args, [*table(header, rows), *notes])


def batch(args: argparse.Namespace) -> None:
    a, classes, num_layers = 8, 20, 16  # the three routes cross here
    rows, marks, curves = [], [], {"gram": [], "sweep": [], "dense": []}
    options = dict(curvature="gauss_newton")
    for N in tqdm([2**k for k in range(4 if args.quick else 10)], desc="batch", disable=None):
        item = problem(a, N, num_layers, classes)
        costs = estimate_cost(item.model, N, **options)
        works = {
            route: lambda p=item, route=route: p.factorize(route=route, **options).solve(p.v, rtol=RTOL)
            for route in curves
            if costs[route].operations < OPERATIONS_LIMIT
        }
        units, unit = in_units(works, 2)
        auto = item.factorize(route="auto", **options).route
        fastest = min(units, key=units.get)
        for route in units:
            curves[route].append((N, units[route] * unit))
        marks.append((N, units[auto] * unit))
        chosen = f"**{auto}**" if auto == fastest else f"{auto}, {units[auto] / units[fastest]:.2f} × the fastest"
        measured = [units[route] * unit if route in units else "not run" for route in curves]
        counted = [f"{costs[route].operations:.1e}" for route in curves]
        rows.append([N, N * a, N * (classes - 1), *measured, *counted, chosen, fastest])
    title = f"Gauss–Newton, width {a}, {classes} classes, {num_layers} layers, P = {len(item.v):,}"
    draw(args, [Panel(title, "samples", "seconds, certified", curves, marks, "taken by route='auto'")])
    header = ["N", "N·width", "N·(C − 1)", *(f"{x}, s" for x in curves), *(f"{x}, operations" for x in curves)]
    notes = ["", f"{title}; factor and certified solve, ε = {DAMPING}, random v. Least of two runs."]
    notes[-1] += f" Not run: more than {OPERATIONS_LIMIT:g} operations. Bold: auto takes the fastest measured."
    write(args, [*table([*header, "auto takes", "fastest"], rows), *notes])


def rhs(args: argparse.Namespace) -> None:
    a, N, num_layers = 32, 8 if args.quick else 32, 8
    item = problem(a, N, num_layers)
    f, operations = item.factorize(), estimate_cost(item.model, N)["sweep"].solve_operations
    rows, curves = [], {"direct": [], "certified": []}
    for k in tqdm([2**j for j in range(0, 7 if args.quick else 11)], desc="rhs", disable=None):
        V = torch.randn(len(item.v), k, dtype=torch.float64)
        works = {rtol: lambda V=V, rtol=rtol: f.solve(V, rtol=rtol) for rtol in (None, RTOL)}
        units, unit = in_units(works, 3 if k < 512 else 2)
        for name, rtol in zip(curves, works, strict=True):
            curves[name].append((k, units[rtol] * unit / k))
        share = operations * k / (2e9 * units[None])
        rows.append([k, units[None] * unit, 1e3 * units[None] * unit / k, f"{share:.0%}", units[RTOL] * unit])
    title = f"{a} wide, N = {N}, {num_layers} layers: n = {N * a}"
    draw(args, [Panel(title, "right-hand sides at once", "seconds a column", curves)])
    header = ["columns", "direct, s", "direct, ms a column", "share of the product's rate", "certified, s"]
    notes = ["", f"{title}, ε = {DAMPING}; factored before. A direct solve is Σ 2m² + 4 m n′ operations a column, "]
    notes[-1] += f"{operations:.3g} here; the rate is that of a 1000³ product ({1e3 * unit:.1f} ms)."
    write(args, [*table(header, rows), *notes])


def reach(args: argparse.Namespace) -> None:
    from benchmark_reach import reach

    reach(args)


def memory(args: argparse.Namespace) -> None:
    from benchmark_memory import memory

    memory(args)


def shapes(args: argparse.Namespace) -> None:
    """The shapes of ImageNet, and a whole training step's share: forward and backward beside the certified solve."""
    header = ["inputs, width, classes, layers, N", "P", "certified, seconds", "its residual"]
    header += ["forward and backward, ms", "ratio"]
    rows = []
    sizes = [(784, 128, 10, 20, 8), (150_528, 64, 10, 4, 8), (64, 64, 1000, 4, 32)]
    for inputs, width, classes, num_layers, batch in tqdm(sizes[: 1 if args.quick else 3], desc="shapes", disable=None):
        torch.manual_seed(0)
        model = DeepMLPWithTracking(inputs, width, classes, num_layers - 1).double()
        x, y = torch.randn(batch, inputs, dtype=torch.float64), torch.randint(classes, (batch,))
        v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        loss = model(x, y, track_activations=True)
        plain = min(seconds(lambda m=model, x=x, y=y: m(x, y).backward()) for _ in range(5))
        started = time.perf_counter()
        f = factorize_hessian(model, loss, 0.05)
        solved = f.solve(v)
        elapsed = time.perf_counter() - started
        rows.append(
            [
                f"{inputs:,}, {width}, {classes:,}, {num_layers}, {batch}",
                len(v),
                elapsed,
                f"{f.residual(solved, v).item():.0e}",
                1e3 * plain,
                round(elapsed / plain),
            ]
        )
    write(args, [*table(header, rows), "", "ε = 0.05, random v, one run, the model's own initialization."])


COMMANDS = {x.__name__: x for x in (solve, layers, width, batch, rhs, reach, memory, shapes)}


def threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= (os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {os.cpu_count()}, this machine's cores: {text}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["training"]:
        from benchmark_training import main as training

        return training(argv[1:])
    if argv[:1] == ["imagenet"]:
        from benchmark_imagenet import main as imagenet

        return imagenet(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rows, for a smoke test")
    parser.add_argument("--threads", type=threads, default=1, help="of torch, 1 as in the README's tables")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the processes that `memory` starts
    torch.set_flush_denormal(True)
    COMMANDS[args.command](args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

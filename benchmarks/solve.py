"""The direct solve beside a dense Hessian and iterative methods, at several ε."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.iterative import ITERATIVE
from benchmarks.problems import DAMPING, RTOL, Problem, dense_solve, in_units, seconds, square_problem
from benchmarks.report import Report, formatted, table

Shape = tuple[int, int, int]  # width, N, layers
SHAPES: list[Shape] = [(8, 8, 64), (32, 8, 16), (64, 8, 16), (32, 32, 16), (64, 32, 8)]
QUICK_SHAPES: list[Shape] = [(8, 8, 8), (16, 8, 8)]
LARGER_DAMPINGS = (100.0, 10.0, 1.0)  # where iterative methods do better: for two of the shapes
DENSE_LIMIT = 6000  # parameters; of a larger dense Hessian only the bytes are printed


def solve_by_dense_hessian(problem: Problem, damping: float = DAMPING) -> Tensor:
    A = problem.dense_hessian() + damping * torch.eye(len(problem.v), dtype=torch.float64)
    return dense_solve(A, problem.v)


def bytes_of_dense_hessian(num_parameters: int) -> str:
    return f"{8e-9 * num_parameters**2:.3g} GB"


class Row(NamedTuple):
    cells: list[object]
    winner: str  # who is first to a certified residual
    unit: float  # seconds of one matrix product


def solve_row(shape: Shape, damping: float, max_seconds: float) -> Row:
    problem = square_problem(*shape)
    f, mixed = problem.factorize(damping), problem.factorize(damping, precision="mixed")
    second = 2 * damping
    works: dict[str, Callable[[], object]] = {
        "direct": partial(problem.solve, None, damping),
        "certified": partial(problem.solve, RTOL, damping),
        "mixed": partial(problem.solve, RTOL, damping, precision="mixed"),
        "second": lambda: f.with_damping(second).solve(problem.v, rtol=RTOL),
    }
    residual = f.residual(f.solve(problem.v, rtol=RTOL), problem.v).item()
    units, unit = in_units(works, 3 if damping == DAMPING else 2)
    dense = bytes_of_dense_hessian(len(problem.v))
    if len(problem.v) <= DENSE_LIMIT:
        dense = f"as at ε = {DAMPING}"
        if damping == DAMPING:
            dense = formatted(min(seconds(partial(solve_by_dense_hessian, problem)) for _ in range(2)) / unit)
    max_seconds = max(max_seconds, 2 * units["certified"] * unit)
    with warnings.catch_warnings(action="ignore"):  # curvlinops warns where it misses its tolerance: so do the cells
        iterated = {name: method(problem, f, max_seconds) for name, method in ITERATIVE.items()}
    cells: list[object] = [
        ", ".join(map(str, shape)),
        len(problem.v),
        damping,
        units["direct"],
        units["certified"],
        f"{formatted(units['mixed'])} ({mixed.precision})",
        units["second"],
        units["certified"] * unit,
        f"{residual:.0e}",
        "yes" if f.is_positive_definite else "no",
        dense,
        *(x.text(unit) for x in iterated.values()),
    ]
    ours, where = units["certified"], f"- {cells[0]} at ε = {damping:g}"
    reached = [(x.seconds / unit, name) for name, x in iterated.items() if x.reached]
    if not reached:
        return Row(cells, f"{where}: certified; no iterative method got there.", unit)
    best, name = min(reached)
    first = "certified" if ours <= best else name
    return Row(cells, f"{where}: {first} ({formatted(ours)} against {formatted(best)}, {name}).", unit)


def solve(quick: bool) -> Report:
    header = ["width, N, layers", "P", "ε", "direct", "certified", "mixed, certified (kept)", "at a second ε"]
    header += ["certified, seconds", "its residual", "H + εI ≻ 0", "dense Hessian, LU", *ITERATIVE]
    shapes, max_seconds = (QUICK_SHAPES, 0.3) if quick else (SHAPES, 3)
    swept = QUICK_SHAPES[:1] if quick else [SHAPES[0], SHAPES[3]]
    jobs = [(shape, damping) for shape in shapes for damping in (*LARGER_DAMPINGS * (shape in swept), DAMPING)]
    rows = [solve_row(shape, damping, max_seconds) for shape, damping in tqdm(jobs, desc="solve", disable=None)]
    notes = [
        "",
        f"Times in units of one 1000³ product ({1e3 * rows[-1].unit:.1f} ms). v is random; 10 classes, one right-hand "
        f"side. Direct, certified, mixed: the least of three runs, of two where ε is not {DAMPING}. Mixed: in brackets "
        "the precision that was kept. A second ε: twice the first, by `with_damping`, certified. Dense: the least of "
        f"two runs. Iterative: one run to a residual of {RTOL:g}, in brackets the products. It is stopped after "
        f"{max_seconds:g} s, or after twice our certified time if that is longer.",
        "",
        "Who is first to a certified residual:",
        "",
    ]
    return Report([*table(header, [row.cells for row in rows]), *notes, *(row.winner for row in rows)])

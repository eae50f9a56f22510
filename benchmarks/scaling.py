"""Times of the solve against one size: layers, width, samples, right-hand sides; and at the shapes of ImageNet."""

from __future__ import annotations

import time
from functools import partial

import torch
from tqdm import tqdm

from benchmarks.iterative import minres_to_rtol
from benchmarks.problems import DAMPING, RTOL, Problem, in_units, problem_of, seconds, square_problem
from benchmarks.report import Panel, Points, Report, table
from benchmarks.solve import DENSE_LIMIT, bytes_of_dense_hessian, solve_by_dense_hessian
from hessian import DeepMLPWithTracking, estimate_cost

OPERATIONS_LIMIT = 1e11  # a route that counts more is not run in `batch`


def layers(quick: bool) -> Report:
    width, batch = 16, 8
    curves: dict[str, Points] = {name: [] for name in ("certified", "direct", "dense Hessian, LU", "MINRES")}
    rows = []
    for depth in tqdm([2**k for k in range(1, 5 if quick else 11)], desc="layers", disable=None):
        problem = square_problem(width, batch, depth)
        units, unit = in_units({"direct": partial(problem.solve, None), "certified": partial(problem.solve, RTOL)})
        for name in units:
            curves[name].append((depth, units[name] * unit))
        dense = bytes_of_dense_hessian(len(problem.v))
        if len(problem.v) <= (3000 if quick else DENSE_LIMIT):
            elapsed = min(seconds(partial(solve_by_dense_hessian, problem)) for _ in range(2))
            curves["dense Hessian, LU"].append((depth, elapsed))
            dense = f"{1e3 * elapsed:.1f}"
        iterated = minres_to_rtol(problem, problem.factorize(), 0.5 if quick else 5)
        if iterated.reached:
            curves["MINRES"].append((depth, iterated.seconds))
        milliseconds = [1e3 * value * unit for value in units.values()]
        rows.append([depth, len(problem.v), *milliseconds, dense, iterated.text(1e-3)])
    title = f"(H + {DAMPING} I) x = v to {RTOL:g}: width {width}, N = {batch}"
    header = ["layers", "P", "direct, ms", "certified, ms", "dense Hessian, LU, ms", "MINRES, ms (products)"]
    return Report(table(header, rows), [Panel(title, "linear layers", "seconds", curves)])


def width(quick: bool) -> Report:
    batch, num_layers, names = 8, 8, ("direct", "certified", "mixed, certified")
    times: dict[str, Points] = {name: [] for name in names}
    residuals: dict[str, Points] = {name: [] for name in names}
    rows = []
    for a in tqdm([2**k for k in range(2, 6 if quick else 9)], desc="width", disable=None):
        problem = square_problem(a, batch, num_layers)
        solves = (partial(problem.solve, None), partial(problem.solve, RTOL))
        works = dict(zip(names, (*solves, partial(problem.solve, RTOL, precision="mixed")), strict=True))
        units, unit = in_units(works)
        f = problem.factorize()
        for name, work in works.items():
            times[name].append((a, units[name] * unit))
            residuals[name].append((a, f.residual(work(), problem.v).item()))
        operations = estimate_cost(problem.model, batch)["sweep"].operations
        cells = [times[name][-1][1] for name in names], [f"{residuals[name][-1][1]:.0e}" for name in names]
        rows.append([a, len(problem.v), *cells[0], *cells[1], f"{operations / 2e9 / units['direct']:.0%}"])
    title = f"N = {batch}, {num_layers} layers, ε = {DAMPING}"
    header = ["width", "P", *(f"{name}, s" for name in names), *(f"residual, {name}" for name in names)]
    header.append("direct: share of the product's rate")
    notes = ["", f"{title}. The share counts the operations of the factorization by `estimate_cost`."]
    panels = Panel(title, "width", "seconds", times), Panel(title, "width", "relative residual", residuals)
    return Report([*table(header, rows), *notes], panels)


def batch(quick: bool) -> Report:
    a, classes, num_layers, curvature = 8, 20, 16, "gauss_newton"  # the three routes cross here
    curves: dict[str, Points] = {"gram": [], "sweep": [], "dense": []}
    rows, marks = [], []
    for N in tqdm([2**k for k in range(4 if quick else 10)], desc="batch", disable=None):
        problem = square_problem(a, N, num_layers, classes)
        costs = estimate_cost(problem.model, N, curvature=curvature)
        works = {
            route: partial(problem.solve, RTOL, route=route, curvature=curvature)
            for route in curves
            if costs[route].operations < OPERATIONS_LIMIT
        }
        units, unit = in_units(works, 2)
        auto = problem.factorize(route="auto", curvature=curvature).route
        fastest = min(units, key=lambda route: units[route])
        for route in units:
            curves[route].append((N, units[route] * unit))
        marks.append((N, units[auto] * unit))
        chosen = f"**{auto}**" if auto == fastest else f"{auto}, {units[auto] / units[fastest]:.2f} × the fastest"
        measured = [units[route] * unit if route in units else "not run" for route in curves]
        counted = [f"{costs[route].operations:.1e}" for route in curves]
        rows.append([N, N * a, N * (classes - 1), *measured, *counted, chosen, fastest])
    title = f"Gauss–Newton, width {a}, {classes} classes, {num_layers} layers, P = {len(problem.v):,}"
    header = ["N", "N·width", "N·(C − 1)", *(f"{x}, s" for x in curves), *(f"{x}, operations" for x in curves)]
    notes = ["", f"{title}. Factor and certified solve, ε = {DAMPING}, random v; the least of two runs."]
    notes[-1] += f" Not run: more than {OPERATIONS_LIMIT:g} operations. Bold: auto takes the fastest measured."
    panel = Panel(title, "samples", "seconds, certified", curves, marks, "taken by route='auto'")
    return Report([*table([*header, "auto takes", "fastest"], rows), *notes], [panel])


def rhs(quick: bool) -> Report:
    a, N, num_layers = 32, 8 if quick else 32, 8
    problem = square_problem(a, N, num_layers)
    f, operations = problem.factorize(), estimate_cost(problem.model, N)["sweep"].solve_operations
    curves: dict[str, Points] = {"direct": [], "certified": []}
    rows = []
    for k in tqdm([2**j for j in range(0, 7 if quick else 11)], desc="rhs", disable=None):
        V = torch.randn(len(problem.v), k, dtype=torch.float64)
        works = {"direct": partial(f.solve, V, rtol=None), "certified": partial(f.solve, V, rtol=RTOL)}
        units, unit = in_units(works, 3 if k < 512 else 2)
        for name in curves:
            curves[name].append((k, units[name] * unit / k))
        direct, share = units["direct"] * unit, operations * k / (2e9 * units["direct"])
        rows.append([k, direct, 1e3 * direct / k, f"{share:.0%}", units["certified"] * unit])
    title = f"{a} wide, N = {N}, {num_layers} layers: n = {N * a}"
    header = ["columns", "direct, s", "direct, ms a column", "share of the product's rate", "certified, s"]
    notes = ["", f"{title}, ε = {DAMPING}. The factor was made before. A direct solve takes Σ 2m² + 4 m n′ operations "]
    notes[-1] += f"a column, {operations:.3g} here. The rate is that of a 1000³ product ({1e3 * unit:.1f} ms)."
    return Report(
        [*table(header, rows), *notes], [Panel(title, "right-hand sides at once", "seconds a column", curves)]
    )


def forward_and_backward(problem: Problem) -> None:
    problem.model(*problem.data).backward()


def shapes(quick: bool) -> Report:
    header = ["inputs, width, classes, layers, N", "P", "certified, seconds", "its residual"]
    header += ["forward and backward, ms", "ratio"]
    rows = []
    sizes = [(784, 128, 10, 20, 8), (150_528, 64, 10, 4, 8), (64, 64, 1000, 4, 32)]
    for inputs, width, classes, num_layers, batch in tqdm(sizes[: 1 if quick else 3], desc="shapes", disable=None):
        torch.manual_seed(0)
        model = DeepMLPWithTracking(inputs, width, classes, num_layers - 1).double()
        problem = problem_of(model, batch)
        plain = min(seconds(partial(forward_and_backward, problem)) for _ in range(5))
        started = time.perf_counter()
        f = problem.factorize(0.05, "auto")
        solved = f.solve(problem.v)
        elapsed = time.perf_counter() - started
        residual = f"{f.residual(solved, problem.v).item():.0e}"
        shape = f"{inputs:,}, {width}, {classes:,}, {num_layers}, {batch}"
        rows.append([shape, len(problem.v), elapsed, residual, 1e3 * plain, round(elapsed / plain)])
    notes = ["", "ε = 0.05, random v, one run, the model's own initialization."]
    return Report([*table(header, rows), *notes])

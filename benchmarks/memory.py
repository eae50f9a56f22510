"""Peak memory beside `estimate_cost`. Each case is a process of its own, which prints JSON:

python3 -m benchmarks.memory '{"width": 16, "batch": 16, "layers": 8}'
"""

from __future__ import annotations

import json
import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.problems import DAMPING, problem_of
from benchmarks.processes import in_process, resident_bytes
from benchmarks.report import Report, table
from hessian import DeepMLPWithTracking, estimate_cost, factorize_hessian

RTOL = 1e-8


class Case(NamedTuple):
    width: int
    batch: int
    layers: int
    residual: bool = False
    keep: str = "solve"
    precision: str = "float64"
    checkpoint_layers: bool = False


class Measured(NamedTuple):
    peak: int  # bytes
    estimated: float
    precision: str  # kept
    factor_seconds: float
    solves: dict[str, tuple[float, float]]  # seconds and residual, by kind


def measure(case: Case) -> Measured:
    """Factor and solve in this process. The model has its own initialization and 10 classes."""
    torch.set_flush_denormal(True)
    before = resident_bytes("VmRSS")
    torch.manual_seed(0)
    model = DeepMLPWithTracking(case.width, case.width, 10, case.layers - 1, residual=case.residual).double()
    _, _, loss, v = problem_of(model, case.batch)
    _, _, _, _, keep, precision, checkpoint = case
    started = time.perf_counter()
    f = factorize_hessian(
        model, loss, DAMPING, route="sweep", precision=precision, keep=keep, checkpoint_layers=checkpoint
    )
    factor_seconds, solves = time.perf_counter() - started, {}
    for name, rtol in (("direct", None), ("certified", RTOL)) if f.keep == "solve" else ():
        started = time.perf_counter()
        solved = f.solve(v, rtol=rtol)
        solves[name] = time.perf_counter() - started, f.residual(solved, v).item()
    costs = estimate_cost(model, case.batch, precision=precision, keep=keep, checkpoint_layers=checkpoint)
    return Measured(resident_bytes("VmHWM") - before, costs["sweep"].bytes, f.precision, factor_seconds, solves)


def measure_in_process(case: Case, **environment: str) -> Measured:
    return Measured(*in_process("benchmarks.memory", case, **environment))


def memory(quick: bool) -> Report:
    header = ["net", "options", "peak, GB", "mapped singly, GB", "estimate_cost, GB", "peak / estimate", "factor, s"]
    header += ["direct solve, s", "its residual", "certified solve, s", "its residual"]
    nets = [Case(16, 16, 8)] if quick else [Case(32, 32, 16), Case(16, 16, 1000, residual=True)]
    cases = {}
    for net in nets:
        cases[net] = f"`keep='{net.keep}'`"
        cases[net._replace(keep="inertia")] = "`keep='inertia'`"
        cases[net._replace(precision="mixed")] = "`precision='mixed'`"
        cases[net._replace(checkpoint_layers=True)] = "`checkpoint_layers=True`"
    libraries = measure_in_process(Case(4, 4, 2)).peak
    rows = []
    for case, options in tqdm(cases.items(), desc="memory", disable=None):
        found = measure_in_process(case)
        net_name = f"width {case.width}, N = {case.batch}, {case.layers:,} layers" + ", skips" * case.residual
        kept = f" (kept {found.precision})" * (found.precision != case.precision)
        single = None
        if case.layers <= 16:  # the deep nets take minutes
            single = measure_in_process(case, MALLOC_MMAP_THRESHOLD_="65536").peak / 1e9
        row = [net_name, options + kept, found.peak / 1e9, single, found.estimated / 1e9]
        row += [found.peak / found.estimated, found.factor_seconds]
        for kind in ("direct", "certified"):
            elapsed, residual = found.solves.get(kind, (None, None))
            row += [elapsed, None if residual is None else f"{residual:.0e}"]
        rows.append(row)
    notes = [
        "",
        f"ε = {DAMPING}, random v, 10 classes, the model's own initialization, certified to {RTOL:g}. One run each, in "
        "a process of its own. Peak: VmHWM of /proc/self/status, less what was resident before the model was built. It "
        "holds the model, its autograd graph, a direct and a certified solve. It also holds what the libraries take at "
        f"their first call: {libraries / 1e9:.3f} GB for two layers of width 4. The estimate is of the factorization "
        "alone. Mapped singly: with MALLOC_MMAP_THRESHOLD_=65536 the C library returns every large array that is "
        "freed. The difference to the peak is what it keeps in fragments.",
    ]
    return Report([*table(header, rows), *notes])


if __name__ == "__main__":
    print(json.dumps(measure(Case(*json.loads(sys.argv[1])))))

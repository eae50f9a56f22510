"""`python3 benchmark.py memory`: peak memory above the interpreter with the modules imported, beside `estimate_cost`.

A module of its own because each case is a fresh process that imports no more than it needs:
python3 benchmark_memory.py '{"width": 32, …}' prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from hessian import DeepMLPWithTracking, estimate_cost, factorize_hessian

RTOL, DAMPING = 1e-10, 0.1
OPTIONS = {
    "keep='solve'": {},
    "keep='inertia'": {"keep": "inertia"},
    "precision='mixed'": {"precision": "mixed"},
    "checkpoint_layers=True": {"checkpoint_layers": True},
}
NETS = (
    dict(width=32, batch=32, layers=16, residual=False),
    dict(width=16, batch=16, layers=1000, residual=True),
)
QUICK_NETS = (dict(width=16, batch=16, layers=8, residual=False),)


def resident(field: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(width: int, batch: int, layers: int, residual: bool, options: dict) -> dict:
    """One case, in this process: its peak, seconds and residuals. The model's own initialization, 10 classes."""
    torch.set_flush_denormal(True)
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = DeepMLPWithTracking(width, width, 10, layers - 1, residual=residual).double()
    x, y = torch.randn(batch, width, dtype=torch.float64), torch.randint(10, (batch,))
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    loss = model(x, y, track_activations=True)
    started = time.perf_counter()
    f = factorize_hessian(model, loss, DAMPING, route="sweep", **options)
    found = {"factor": time.perf_counter() - started, "kept": f.precision}
    for name, rtol in (("direct", None), ("certified", RTOL)) if f.keep == "solve" else ():
        started = time.perf_counter()
        solved = f.solve(v, rtol=rtol)
        found[name] = time.perf_counter() - started
        found[f"{name} residual"] = f.residual(solved, v).item()
    estimated = estimate_cost(model, batch, **options)["sweep"].bytes
    return found | {"peak": resident("VmHWM") - before, "estimated": estimated}


def in_process(net: dict, options: dict, **environment: str) -> dict:
    command = [sys.executable, __file__, json.dumps(net | {"options": options})]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    return json.loads(done.stdout)


def memory(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from benchmark import table, write

    header = ["net", "options", "peak, GB", "mapped singly, GB", "estimate_cost, GB", "peak / estimate", "factor, s"]
    header += ["direct solve, s", "its residual", "certified solve, s", "its residual"]
    cases = [(net, name) for net in (QUICK_NETS if args.quick else NETS) for name in OPTIONS]
    rows = []
    tiny = in_process(dict(width=4, batch=4, layers=2, residual=False), {})
    for net, name in tqdm(cases, desc="memory", disable=None):
        found = in_process(net, OPTIONS[name])
        text = f"width {net['width']}, N = {net['batch']}, {net['layers']:,} layers" + ", skips" * net["residual"]
        kept = f" (kept {found['kept']})" * (found["kept"] != OPTIONS[name].get("precision", "float64"))
        single = None
        if net["layers"] <= 16:  # the long ones once only
            single = in_process(net, OPTIONS[name], MALLOC_MMAP_THRESHOLD_="65536")["peak"] / 1e9
        row = [text, f"`{name}`{kept}", found["peak"] / 1e9, single, found["estimated"] / 1e9]
        row += [found["peak"] / found["estimated"], found["factor"]]
        for solve in ("direct", "certified"):
            residual = found.get(f"{solve} residual")
            row += [found.get(solve), None if residual is None else f"{residual:.0e}"]
        rows.append(row)
    notes = [
        "",
        f"ε = {DAMPING}, random v, 10 classes, the model's own initialization, certified to rtol = {RTOL:g}; one run, "
        "each in a process of its own. "
        "Peak: VmHWM of /proc/self/status, less what was resident before the model was built, torch and the modules "
        "imported. It holds the model, its autograd graph, a direct and a certified solve, and what the libraries take "
        f"at their first call ({tiny['peak'] / 1e9:.3f} GB for two layers of width 4); the estimate is of the "
        "factorization. Mapped singly: the same with MALLOC_MMAP_THRESHOLD_=65536, so that the C library returns every "
        "large array that is freed; the difference is what it holds in fragments.",
    ]
    write(args, [*table(header, rows), *notes])


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

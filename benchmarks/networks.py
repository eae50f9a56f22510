"""Measure TrackedNetwork: python3 benchmark.py networks PART [--quick] [--threads 1] [--out-dir runs/benchmark]

    kinds      networks of many kinds: parameters, state, route, seconds, residual, negative eigenvalues
    blocks     a GPT against the number of its blocks: seconds, units a block, residual, bytes; beside MINRES, and a
               dense Hessian where it fits. Each row is a process of its own
    peers      a GPT at several ε, from two kinds of initial weights, beside MINRES, CG and curvlinops' CG
    landscape  the eigenvalue counts and log|det| of a GPT and a ResNet along their training by Adam
    training   seconds to three training losses: Adam against `DampedNewton` with both metrics

`blocks` takes the size of the network and the options of `factorize_hessian`. Without --width it takes a narrow and a
wide network. A unit is one 1000 × 1000 float64 matrix product in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from _hessian.network import Network
from benchmarks.example_networks import EXAMPLES, GPT, Example, ResNet, build, lenet5, vision_transformer
from benchmarks.iterative import ITERATIVE, Iterated, curvlinops_product, minres_to_rtol
from benchmarks.landscape import landscape, training
from benchmarks.problems import DAMPING, RTOL, Problem, network_problem, seconds
from benchmarks.processes import in_process, resident_bytes, threads, use_threads
from benchmarks.report import Panel, Points, Report, table, write_plots, write_table
from benchmarks.solve import bytes_of_dense_hessian
from hessian import (
    HessianFactorization,
    SingularHessianError,
    TrackedNetwork,
    factorize_hessian,
    hessian_vector_product,
)

HEADS, TOKENS, VOCABULARY = 4, 16, 65
DENSE_LIMIT = 10_000  # parameters; of a larger dense Hessian only the bytes are printed
LARGER = {
    "LeNet-5, 28 × 28 pixels": Example(lenet5, (1, 28, 28), 10, 1),
    "ResNet, 4 blocks of 16 channels, 8 × 8 pixels": Example(partial(ResNet, 4, 16, 10), (1, 8, 8), 10, 2),
    "GPT, 4 blocks of width 64, 16 tokens": Example(partial(GPT, 4, 64, 4, 16, 65, expansion=4), (16,), 65, 1),
    "torchvision's VisionTransformer, 4 layers of width 64, 17 tokens": Example(
        partial(vision_transformer, 4, 64, 4, 32, 8, 10), (3, 32, 32), 10, 1
    ),
}


def unit_seconds() -> float:
    M = torch.randn(1000, 1000, dtype=torch.float64)
    return min(seconds(lambda: M @ M) for _ in range(5))


def largest_state(f: HessianFactorization) -> int:
    """The most numbers that are live at a cut."""
    assert isinstance(f._system, Network)
    program = f._system.program
    live = {program.output}
    sizes = [program.output.size]
    for operation, parameters in zip(reversed(program.operations), reversed(program.eliminated), strict=True):
        live = (live - {operation.output} | set(operation.inputs)) - set(parameters)
        sizes.append(sum(value.size for value in live))
    return max(sizes)


# ------------------------------------------------------------------------------------------------------ kinds


class Solved(NamedTuple):
    seconds: float  # of the factorization and one certified solve
    residual: str
    f: HessianFactorization


def factor_and_solve(problem: Problem[TrackedNetwork], route: str, damping: float = DAMPING) -> Solved:
    started = time.perf_counter()
    f = problem.factorize(damping, route)
    try:
        x = f.solve(problem.v, rtol=RTOL)
    except SingularHessianError as error:
        return Solved(time.perf_counter() - started, f"missed: {error.residual:.0e}", f)
    return Solved(time.perf_counter() - started, f"{f.residual(x, problem.v).item():.0e}", f)


def kinds(quick: bool) -> Report:
    examples = dict(list(EXAMPLES.items())[:3]) if quick else EXAMPLES | LARGER
    rows = []
    for name, example in tqdm(examples.items(), desc="kinds", disable=None):
        problem = network_problem(*build(example), example.loss)
        P, auto = len(problem.v), factor_and_solve(problem, "auto")
        cells = {auto.f.route: auto}
        for route in ("sweep", "dense"):
            if route not in cells and (route == "sweep" or DENSE_LIMIT >= P):
                cells[route] = factor_and_solve(problem, route)
        row = [name, P, len(problem.data[1]), largest_state(auto.f), auto.f.route]
        for route in ("sweep", "dense"):
            row += [cells[route].seconds, cells[route].residual] if route in cells else [bytes_of_dense_hessian(P), "–"]
        certified = "yes" if auto.f.inertia_is_certified else "no"
        rows.append([*row, auto.f.num_negative_eigenvalues, certified, f"{auto.f.logabsdet:,.1f}"])
    header = ["network", "P", "N", "state", "auto takes", "elimination, s", "its residual", "dense, s", "its residual"]
    header += ["eigenvalues below −ε", "certified", "log\\|det\\|"]
    notes = [
        "",
        f"ε = {DAMPING}, random v, random data. Seconds of one factorization and one solve, certified to {RTOL:g}; one "
        "run. State: the most live numbers at a cut, parameters that wait in reduced coordinates among them. A dense "
        "Hessian that was not formed: its bytes.",
    ]
    return Report([*table(header, rows), *notes])


# ------------------------------------------------------------------------------------------------------ blocks


class Case(NamedTuple):
    """A GPT on one sample, and the options of its factorization. rival_seconds: None for twice our own time."""

    blocks: int
    width: int
    precision: str = "float64"
    checkpoint_layers: bool = False
    keep: str = "solve"
    rival_seconds: float | None = None
    dense_limit: int = DENSE_LIMIT


class Measured(NamedTuple):
    num_parameters: int
    state: int
    unit: float  # seconds
    factor: float  # seconds
    solve: float | None  # seconds; None for keep='inertia'
    residual: float | None
    precision: str  # kept
    peak: int  # bytes
    negative: int
    logabsdet: float
    dense: float | None  # seconds
    minres: list | None  # as `Iterated`

    @property
    def seconds(self) -> float:
        return self.factor + (self.solve or 0.0)


def gpt_problem(
    blocks: int, width: int, *, small_weights: bool = False, written_out: bool = False
) -> Problem[TrackedNetwork]:
    """A GPT on 16 random tokens of 65. Weights as torch draws them, or as GPT-2's."""
    torch.manual_seed(0)
    net = GPT(blocks, width, HEADS, TOKENS, VOCABULARY, expansion=4, written_out=written_out).double().eval()
    if small_weights:
        for name, p in net.named_parameters():
            if "norm" not in name:
                on_stream = "project" in name or "contract" in name
                nn.init.normal_(p, std=0.0 if "bias" in name else 0.02 * (2 * blocks) ** (-0.5 * on_stream))
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1))
    return network_problem(net, tokens[:, :-1], tokens[:, 1:])


def measure(case: Case) -> Measured:
    """In this process."""
    torch.set_flush_denormal(True)
    before, unit = resident_bytes("VmRSS"), unit_seconds()
    problem = gpt_problem(case.blocks, case.width)
    started = time.perf_counter()
    f = factorize_hessian(
        problem.model,
        problem.loss,
        DAMPING,
        route="sweep",
        precision=case.precision,
        keep=case.keep,
        checkpoint_layers=case.checkpoint_layers,
    )
    factored = time.perf_counter()
    residual = solved = minres = dense = None
    if f.keep != "inertia":
        x = f.solve(problem.v, rtol=RTOL)
        solved = time.perf_counter() - factored
        residual = f.residual(x, problem.v).item()
    peak, unit, P = resident_bytes("VmHWM") - before, min(unit, unit_seconds()), len(problem.v)
    ours = factored - started + (solved or 0.0)
    rival = 2 * ours if case.rival_seconds is None else case.rival_seconds
    if rival:
        minres = list(minres_to_rtol(problem, f, rival))
        dense = factor_and_solve(problem, "dense").seconds if P <= case.dense_limit else None
    return Measured(
        P,
        largest_state(f),
        unit,
        factored - started,
        solved,
        residual,
        f.precision,
        peak,
        f.num_negative_eigenvalues,
        f.logabsdet,
        dense,
        minres,
    )


def blocks(
    quick: bool,
    widths: list[int] | None = None,
    counts: list[int] | None = None,
    options: Case = Case(0, 0),  # noqa: B008 (immutable)
) -> Report:
    widths, counts = widths or ([4] if quick else [8, 64]), counts or ([1, 2] if quick else [2, 4, 8, 16])
    cases = [options._replace(width=width, blocks=count) for width in widths for count in counts]
    if quick and options.rival_seconds is None:
        cases = [case._replace(rival_seconds=0.5, dense_limit=1000) for case in cases]
    found = {c: Measured(*in_process("benchmarks.networks", c)) for c in tqdm(cases, desc="blocks", disable=None)}
    header = ["width, blocks", "P", "state", "factor, s", "certified solve, s", "units a block", "residual", "peak, GB"]
    header += ["eigenvalues below −ε", "log\\|det\\|", "dense, s", "MINRES, s (products)", "a unit, ms"]
    rows = []
    for case, m in found.items():
        row = [f"{case.width}, {case.blocks}", m.num_parameters, m.state, m.factor, m.solve]
        row += [m.seconds / m.unit / case.blocks, None if m.residual is None else f"{m.residual:.0e}", m.peak / 1e9]
        row += [m.negative, f"{m.logabsdet:,.1f}"]
        row.append(m.dense or bytes_of_dense_hessian(m.num_parameters))
        rows.append([*row, Iterated(*m.minres).text(1.0) if m.minres else None, f"{1e3 * m.unit:.1f}"])
    kept = sorted({m.precision for m in found.values()})
    notes = [
        "",
        f"A GPT of {HEADS} heads on {TOKENS} tokens of {VOCABULARY}, N = 1, torch's initial weights; ε = {DAMPING}, "
        f"random v, certified to {RTOL:g}. precision={options.precision!r} (kept: {', '.join(kept)}), "
        f"checkpoint_layers={options.checkpoint_layers}, keep={options.keep!r}. One run each, in a process of its own. "
        "Units a block: of factor and solve. Peak: of both, less what was resident before the network was built. "
        '"> t, at r": MINRES was stopped at t seconds with residual r. Dense: `route="dense"`, or the bytes of H.',
    ]
    return Report([*table(header, rows), *notes], [blocks_panel(width, found) for width in widths])


def blocks_panel(width: int, found: dict[Case, Measured]) -> Panel:
    of_width = {case.blocks: m for case, m in found.items() if case.width == width}
    iterated = {count: Iterated(*m.minres) for count, m in of_width.items() if m.minres}
    curves: dict[str, Points] = {
        "elimination, certified": [(count, m.seconds) for count, m in of_width.items()],
        "dense Hessian": [(count, m.dense) for count, m in of_width.items() if m.dense],
        "MINRES": [(count, x.seconds) for count, x in iterated.items()],
    }
    stopped = {count: x for count, x in iterated.items() if not x.reached}
    least = min((x.residual for x in stopped.values()), default=math.nan)
    marks = [(count, x.seconds) for count, x in stopped.items()]
    title = f"GPT of width {width}, {min(m.num_parameters for m in of_width.values()):,} to "
    title += f"{max(m.num_parameters for m in of_width.values()):,} parameters"
    marked = f"stopped at a residual of {least:.0e} or more"
    return Panel(title, "blocks", "seconds", curves, marks, marked, list(of_width))


# ------------------------------------------------------------------------------------------------------ peers


def peers(quick: bool) -> Report:
    count, width, dampings = (1, 4, (0.1,)) if quick else (4, 64, (1.0, 0.1, 1e-3))
    rows, winners = [], []
    unit = unit_seconds()
    jobs = [(small, damping) for small in (False, True) for damping in dampings]
    for small, damping in tqdm(jobs, desc="peers", disable=None):
        problem = gpt_problem(count, width, small_weights=small)
        ours = factor_and_solve(problem, "sweep", damping)
        limit = 0.5 if quick else 2 * ours.seconds
        written_out = gpt_problem(count, width, small_weights=small, written_out=True)
        with warnings.catch_warnings(
            action="ignore"
        ):  # curvlinops warns where it misses its tolerance: so do the cells
            rivals = {name: method(written_out, ours.f, limit) for name, method in ITERATIVE.items()}
        unit = min(unit, unit_seconds())
        weights = "GPT-2's" if small else "torch's"
        rows.append([weights, damping, ours.seconds, ours.residual, ours.f.num_negative_eigenvalues, rivals])
        reached = {"elimination": ours.seconds, **{k: x.seconds for k, x in rivals.items() if x.reached}}
        first, *later = sorted(reached, key=lambda name: reached[name])
        order = f"{first}, then {', '.join(later)}" if later else f"{first}, no other"
        winners.append(f"- {weights} weights, ε = {damping:g}: {order}.")
    off = curvlinops_error(gpt_problem(count, width))
    header = ["weights", "ε", "elimination", "its residual", "eigenvalues below −ε", *ITERATIVE]
    cells = [[w, e, s / unit, r, n, *(x.text(unit) for x in found.values())] for w, e, s, r, n, found in rows]
    notes = [
        "",
        f"A GPT of {count} blocks, width {width}, {HEADS} heads, {TOKENS} tokens, N = 1: P = {len(problem.v):,}, a "
        f"dense Hessian of {bytes_of_dense_hessian(len(problem.v))}. Units of one 1000³ product ({1e3 * unit:.1f} ms); "
        f"one run to a residual of {RTOL:g}, in brackets the products. Rivals get twice our time. GPT-2's weights: "
        "N(0, 0.02²), divided by √(2 × blocks) in projections onto the residual stream; biases 0. " + off,
        "",
        "Who got to a certified residual, the first one first:",
        "",
    ]
    return Report([*table(header, cells), *notes, *winners])


def curvlinops_error(problem: Problem[TrackedNetwork]) -> str:
    """How far curvlinops' product with H is off on the network as it is, in a sentence."""
    with sdpa_kernel(SDPBackend.MATH):
        product = curvlinops_product(problem)
    if product is None:
        return "curvlinops is not installed: pip install curvlinops-for-pytorch."
    exact = hessian_vector_product(problem.model, problem.loss, problem.v)
    error = (product - exact).norm() / exact.norm()
    return (
        "curvlinops got norms and attention written out. On the network as it is, its product with H is off by "
        f"{error:.0e} of its norm (torch's forward-mode derivatives of LayerNorm)."
    )


# ------------------------------------------------------------------------------------------------------ command line

PARTS: dict[str, Callable[[bool], Report]] = {"kinds": kinds, "peers": peers, "training": training}


def main(argv: list[str]) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    common.add_argument("--quick", action="store_true", help="fewer and smaller rows, for a smoke test")
    common.add_argument("--threads", type=threads, default=1)
    parser = argparse.ArgumentParser(
        "benchmark.py networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name in (*PARTS, "landscape"):
        parts.add_parser(name, parents=[common])
    of_blocks = parts.add_parser("blocks", parents=[common])
    of_blocks.add_argument("--width", type=int, nargs="+", help="of the stream; several for several panels")
    of_blocks.add_argument("--blocks", type=int, nargs="+")
    of_blocks.add_argument("--precision", choices=("float64", "mixed"), default="float64")
    of_blocks.add_argument("--checkpoint-layers", action="store_true")
    of_blocks.add_argument("--keep", choices=("solve", "disk", "inertia"), default="solve")
    of_blocks.add_argument("--rival-seconds", type=float, help="of MINRES; default twice our own; 0: no rival")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    path = args.out_dir / f"networks-{args.part}.md"
    if args.part == "blocks":
        options = Case(0, 0, args.precision, args.checkpoint_layers, args.keep, args.rival_seconds)
        report = blocks(args.quick, args.width, args.blocks, options)
    elif args.part == "landscape":
        report = Report(landscape(args.quick, path.with_suffix(".png")))
    else:
        report = PARTS[args.part](args.quick)
    if report.panels:
        write_plots(path.with_suffix(".png"), report.panels)
    write_table(
        path, "networks " + " ".join(x for x in argv if x not in ("--out-dir", str(args.out_dir))), report.lines
    )


if __name__ == "__main__":
    print(json.dumps(measure(Case(*json.loads(sys.argv[1])))))

"""Measure the solve: python3 benchmark.py {solve,layers,shapes} [--out-dir runs/benchmark] [--quick]
         training:  python3 benchmark.py training PROBLEM (its own options: python3 benchmark.py training --help)
         ImageNet:  python3 benchmark.py imagenet {throughput,steps,compare}

    solve    the rows of the README's table: factor and solve, beside a dense Hessian with LU, and MINRES
    layers   time against the number of layers, with a log-log picture
    shapes   150,528 inputs, 1,000 classes, and 20 layers of width 128 beside a forward and backward pass

Times of `solve` are in units of one 1000 × 1000 float64 matrix product in the same process, minima of runs that
alternate with the product, since machines are shared and noisy. Every rival gets the same closed-form products.
Each subcommand prints a Markdown table and writes it under --out-dir, with the command and the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# MINRES would pay for two pools of threads, numpy's and torch's, that wait for each other: its dot products take one
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from scipy.sparse.linalg import LinearOperator, minres
from torch import Tensor
from tqdm import tqdm

from hessian import DeepMLPWithTracking, factorize_hessian, hessian_vector_product

DAMPING, RTOL = 0.1, 1e-8
DENSE_LIMIT = 6000  # parameters; beyond it the dense Hessian is not formed, its bytes are printed
ROWS = ((8, 8, 64), (32, 8, 16), (64, 8, 16), (32, 32, 16), (64, 32, 8))  # width, N, layers
QUICK_ROWS = ROWS[:2]


class Problem(NamedTuple):
    model: DeepMLPWithTracking
    loss: Tensor
    v: Tensor


def problem(width: int, batch: int, num_layers: int, seed: int = 0) -> Problem:
    """Input and hidden width equal, 10 classes, weights N(0, 1/width), no biases but zero ones."""
    torch.manual_seed(seed)
    model = DeepMLPWithTracking(width, width, 10, num_layers - 1).double()
    with torch.no_grad():
        for linear in model.layers:
            linear.weight.normal_(0, width**-0.5)
            linear.bias.zero_()
    x, y = torch.randn(batch, width, dtype=torch.float64), torch.randint(10, (batch,))
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    return Problem(model, model(x, y, track_activations=True), v)


# ------------------------------------------------------------------------------------------------------ methods


def direct(problem: Problem) -> Tensor:
    return factorize_hessian(problem.model, problem.loss, DAMPING, route="sweep").solve(problem.v, rtol=None)


def certified(problem: Problem) -> Tensor:
    return factorize_hessian(problem.model, problem.loss, DAMPING, route="sweep").solve(problem.v, rtol=RTOL)


def dense(problem: Problem) -> Tensor:
    """H by P products, then LU, a solve and one refinement."""
    identity = torch.eye(len(problem.v), dtype=torch.float64)
    A = hessian_vector_product(problem.model, problem.loss, identity) + DAMPING * identity
    factors = torch.linalg.lu_factor(A)
    x = torch.linalg.lu_solve(*factors, problem.v[:, None])
    return (x + torch.linalg.lu_solve(*factors, problem.v[:, None] - A @ x))[:, 0]


class _Reached(Exception):
    pass


def minres_to_rtol(problem: Problem, limit: float) -> tuple[float, int, float]:
    """Seconds, products, and the relative residual of MINRES: stopped at `limit` seconds, or at RTOL by the true
    residual, looked at after every 25 products."""
    # factored once, outside the clock, for its products alone: they don't check the model anew each time
    operator = factorize_hessian(problem.model, problem.loss, DAMPING, route="sweep")
    v, count, state = problem.v, 0, {"residual": 1.0}

    def product(x):
        nonlocal count
        count += 1
        return operator._product(torch.from_numpy(x).reshape(-1, 1))[:, 0].numpy()

    def look(x) -> None:
        nonlocal count
        if count % 25 == 0 or time.perf_counter() - started > limit:
            state["residual"] = operator.residual(torch.from_numpy(x), v).item()
            if state["residual"] <= RTOL or time.perf_counter() - started > limit:
                raise _Reached

    started = time.perf_counter()
    try:
        shape = (len(v), len(v))
        x, _ = minres(
            LinearOperator(shape, product, dtype="float64"), v.numpy(), rtol=1e-16, maxiter=10**7, callback=look
        )
        elapsed = time.perf_counter() - started
        state["residual"] = operator.residual(torch.from_numpy(x), v).item()
    except _Reached:
        elapsed = time.perf_counter() - started
    return elapsed, count, state["residual"]


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


def write_table(lines: list[str], args: argparse.Namespace) -> None:
    command = f"python3 benchmark.py {args.command}" + (" --quick" if args.quick else "")
    text = "\n".join([f"`{command}`; {machine()}.", "", *lines]) + "\n"
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"{args.command}.md"
    path.write_text(text)
    print(text)
    print(f"Table: {path}")


def formatted(value: float) -> str:
    return f"{value:.3g}"


def solve(args: argparse.Namespace) -> None:
    lines = [
        "| width, N, layers | P | direct | certified | certified, seconds | its residual | dense Hessian, LU | "
        "MINRES to 1e-8 | products |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for width, batch, num_layers in tqdm(QUICK_ROWS if args.quick else ROWS, desc="solve", disable=None):
        item = problem(width, batch, num_layers)
        works = {"direct": lambda p=item: direct(p), "certified": lambda p=item: certified(p)}
        units, unit = in_units(works)
        f = factorize_hessian(item.model, item.loss, DAMPING, route="sweep")
        residual = f.residual(f.solve(item.v), item.v).item()
        dense_text = bytes_of_dense(len(item.v))
        if len(item.v) <= DENSE_LIMIT:
            dense_text = formatted(min(seconds(lambda p=item: dense(p)) for _ in range(2)) / unit)
        elapsed, products, reached = minres_to_rtol(item, 5 if args.quick else 20)
        minres_text = formatted(elapsed / unit) if reached <= RTOL else f"> {elapsed / unit:.0f}, at {reached:.0e}"
        lines.append(
            f"| {width}, {batch}, {num_layers} | {len(item.v):,} | {units['direct']:.2f} | {units['certified']:.2f} | "
            f"{units['certified'] * unit:.3f} | {residual:.0e} | {dense_text} | {minres_text} | {products} |"
        )
    lines += [
        "",
        f"Units of one 1000³ product ({1e3 * unit:.1f} ms); ε = {DAMPING}, random v, 10 classes.",
    ]
    lines += ["Least of three runs for direct and certified, of two for dense, one run for MINRES."]
    write_table(lines, args)


def layers(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width, batch = 16, 8
    depths = (2, 4, 8, 16, 32) if args.quick else (2, 4, 8, 16, 32, 64, 128, 256, 512)
    curves: dict[str, list[tuple[int, float]]] = {"exact, certified": [], "dense Hessian, LU": [], "MINRES": []}
    lines = [
        "| layers | P | exact, certified (ms) | dense Hessian, LU (ms) | MINRES to 1e-8 (ms) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for depth in tqdm(depths, desc="layers", disable=None):
        item = problem(width, batch, depth)
        units, unit = in_units({"certified": lambda p=item: certified(p)})
        ours, dense_text, minres_text = units["certified"] * unit, bytes_of_dense(len(item.v)), "–"
        curves["exact, certified"].append((depth, ours))
        if len(item.v) <= DENSE_LIMIT:
            elapsed = min(seconds(lambda p=item: dense(p)) for _ in range(2))
            curves["dense Hessian, LU"].append((depth, elapsed))
            dense_text = f"{1e3 * elapsed:.1f}"
        elapsed, _, reached = minres_to_rtol(item, 2 if args.quick else 10)
        minres_text = f"{1e3 * elapsed:.1f}" if reached <= RTOL else f"> {1e3 * elapsed:.0f}, at {reached:.0e}"
        if reached <= RTOL:
            curves["MINRES"].append((depth, elapsed))
        lines.append(f"| {depth} | {len(item.v):,} | {1e3 * ours:.1f} | {dense_text} | {minres_text} |")
    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for (name, points), marker in zip(curves.items(), "osv", strict=True):
        axis.loglog(*zip(*points, strict=True), marker=marker, label=name)
    axis.set(
        xlabel="linear layers", ylabel="seconds", title=f"(H + {DAMPING} I) x = v to 1e-8: width {width}, N = {batch}"
    )
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out_dir / "layers.png", dpi=120)
    write_table(lines, args)
    print(f"Plot: {args.out_dir / 'layers.png'}")


def shapes(args: argparse.Namespace) -> None:
    """The shapes of ImageNet, and a whole training step's share: forward and backward beside the certified solve."""
    lines = [
        "| inputs, width, classes, layers, N | P | certified, seconds | its residual | forward and backward, ms "
        "| ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
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
        lines.append(
            f"| {inputs:,}, {width}, {classes:,}, {num_layers}, {batch} | {len(v):,} | {elapsed:.2f} | "
            f"{f.residual(solved, v).item():.0e} | {1e3 * plain:.1f} | {elapsed / plain:.0f} |"
        )
    lines += ["", "ε = 0.05, random v, one run, the model's own initialization."]
    write_table(lines, args)


COMMANDS = {"solve": solve, "layers": layers, "shapes": shapes}


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
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    COMMANDS[args.command](args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

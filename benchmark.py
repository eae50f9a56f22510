"""Measure the solver: python3 benchmark.py COMMAND [--out-dir runs/benchmark] [--quick] [--threads 1]
          training:   python3 benchmark.py training PROBLEM (its own options: python3 benchmark.py training --help)
          ImageNet:   python3 benchmark.py imagenet {throughput,steps,compare}
          networks:   python3 benchmark.py networks {kinds,blocks,peers,landscape,training}: GPT, ResNet and others

    solve    the README's table: factor and solve in float64 and mixed precision, and a second damping, beside a dense
             Hessian with LU, MINRES, CG, and curvlinops' CG (pip install curvlinops-for-pytorch), at several ε
    layers   time against the number of layers, 2 … 1,024
    width    time and residual against the width
    batch    time against the samples: Gauss–Newton by its three routes, and the one that route='auto' takes
    rhs      1 … 1,024 right-hand sides at once, and their share of the rate of a matrix product
    reach    residual and inertia against ε, 10 … 1e-8: the sweep with and without carried pivots, and dense
    memory   peak memory, each case in a process of its own, beside `estimate_cost`
    shapes   150,528 inputs, 1,000 classes, and 20 layers of width 128, beside a forward and backward pass
    curvature  influence, spectra, evidence and hypergradients of curvature.py, beside the approximations in use
             (pip install -r requirements-optional.txt)

Each command prints a Markdown table with the command and the machine. It writes the table under --out-dir, with a
picture where there is one. --quick takes seconds, with fewer and smaller rows. Everything runs on one thread, unless
--threads says otherwise.

Times of `solve` are in units of one 1000 × 1000 float64 matrix product in the same process. They are minima of runs
that alternate with the product, since machines are shared and noisy. All rivals but curvlinops get the same products.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.curvature import curvature
from benchmarks.memory import memory
from benchmarks.problems import BenchmarkError
from benchmarks.processes import threads, use_threads
from benchmarks.reach import reach
from benchmarks.report import write_plots, write_table
from benchmarks.scaling import batch, layers, rhs, shapes, width
from benchmarks.solve import solve

MEASURED = (solve, layers, width, batch, rhs, reach, memory, shapes, curvature)
COMMANDS = {command.__name__: command for command in MEASURED}


def measure(argv: list[str]) -> None:
    if argv[:1] == ["training"]:
        from benchmarks.training.command import main as training

        return training(argv[1:])
    if argv[:1] == ["imagenet"]:
        from benchmarks.imagenet import main as imagenet

        return imagenet(argv[1:])
    if argv[:1] == ["networks"]:
        from benchmarks.networks import main as networks

        return networks(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rows, for a smoke test")
    parser.add_argument("--threads", type=threads, default=1, help="of torch, 1 as in the README's tables")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    report = COMMANDS[args.command](args.quick)
    if report.panels:
        write_plots(args.out_dir / f"{args.command}.png", report.panels)
    flags = " --quick" * args.quick + f" --threads {args.threads}" * (args.threads != 1)
    write_table(args.out_dir / f"{args.command}.md", args.command + flags, report.lines)


def main(argv: list[str] | None = None) -> int:
    try:
        measure(sys.argv[1:] if argv is None else argv)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

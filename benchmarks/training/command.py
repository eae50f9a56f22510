"""Measure training: python3 benchmark.py training PROBLEM [--out-dir runs/benchmark] [--quick] [--only METHOD,...]
                                                           [--redo METHOD,...]

PROBLEM is one of those listed below, or `all`, or `story`: a picture of depth30 and depth100 from the stored runs.

Every method starts from the same weights, on the same data, in the same loop, on one thread. Only its steps are on the
clock. Each run is a JSON file under OUT_DIR/training/PROBLEM. It is not run again while its settings are the same,
unless --redo names its method. table.md and curves.png there show all stored runs.

Training loss. Each rival gets the best of four learning rates (Hessian-free: initial dampings). The best has the least
loss after 15 seconds, or after the cap if that is less, on a seed kept aside. First-order methods warm up linearly. On
a fixed batch a rival stops at a loss of 1e-12, Newton at 1e-20. On a data set every run takes its whole time. There
Newton's batch is all samples, that of the first-order methods 64, and Newton's exact solves take 32 samples.

Test accuracy. The learning rate, the batch and the weight decay are chosen one after the other by validation accuracy,
the mean over three seeds kept aside. The batch is chosen for Newton and the first-order methods only. So Newton, L-BFGS
and Hessian-free try seven settings, the first-order methods ten. In each run the step is chosen by validation too.
Each seed parts the data set anew, in the same way for all methods. Some test parts are harder than others. So the table
also has the mean difference to Newton over the seeds, with its standard error (Nadeau & Bengio 2003: parts that overlap
are not independent).

What the errors leave out: the images are those on which the optimizer was developed, though the seeds and parts are
others. The choice of the settings has seen some images of each test part. It would vary with other seeds.

Differences from the usual methods: Hessian-free takes its products by two backward passes. L-BFGS restarts where its
line search stalls. Muon and the AdamW beside it share one learning rate (torch's match_rms_adamw).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.problems import BenchmarkError
from benchmarks.report import write_table
from benchmarks.training.problems import ALL, PROBLEMS, Problem, problem_named
from benchmarks.training.report import Panel, accuracy_table, loss_table, write_curves
from benchmarks.training.runs import Session, run_method, stored_runs


def report(name: str, problem: Problem, folder: Path, quick: bool) -> None:
    """table.md and curves.png of one problem's stored runs."""
    runs = stored_runs(folder, problem, "loss")
    if not runs:
        return
    seeds = f"{problem.seeds} seeds" + ("" if problem.samples else f" ({problem.accuracy_seeds} for test accuracy)")
    network = f"{problem.num_layers} layers of width {problem.width}"
    lines = [f"{network}; {problem.cap:g} s a run at most, {seeds}: median (least–largest).", ""]
    lines += loss_table(problem, runs)
    panels = [Panel(name, runs, "seconds", "loss"), Panel(network, runs, "steps", "loss")]
    if problem.weight_decay:
        panels.append(Panel("gradient of the objective", runs, "seconds", "gradient"))
    if accurate := stored_runs(folder, problem, "accuracy"):
        lines += accuracy_table(problem, accurate)
        panels.append(Panel("with validation", accurate, "seconds", "test"))
    shares = [run.cpu_share for done in (*runs.values(), *accurate.values()) for run in done]
    lines += ["", f"Least share of a core that a run had: {min(shares):.0%}."]
    write_table(folder / "table.md", f"training {name}{' --quick' if quick else ''}", lines)
    write_curves(folder / "curves.png", panels)


def story(folder: Path, quick: bool) -> None:
    panels = []
    for name in ("depth30", "depth100"):
        title = f"{PROBLEMS[name].num_layers} layers of width 8, 32 images, median"
        runs = stored_runs(folder / name, problem_named(name, quick), "loss")
        if not runs:
            raise BenchmarkError("story needs runs of depth30 and depth100: python3 benchmark.py training depth30")
        panels.append(Panel(title, runs, "seconds", "loss"))
    write_curves(folder / "story.png", panels, seeds=False)


def methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if unknown := set(names) - set(ALL):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}: choose from {', '.join(ALL)}")
    return names


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    root = args.out_dir / ("training-quick" if args.quick else "training")
    if args.problem == "story":
        return story(root, args.quick)
    for name in PROBLEMS if args.problem == "all" else (args.problem,):
        problem, folder = problem_named(name, args.quick), root / name
        session = Session(name, folder, args.redo, args.quick)
        for method in problem.methods:
            if not args.only or method in args.only:
                run_method(session, problem, method)
        report(name, problem, folder, args.quick)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "benchmark.py training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", choices=(*PROBLEMS, "all", "story"))
    parser.add_argument("--out-dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="half a second a run, one seed, two rates: a smoke test")
    parser.add_argument("--only", type=methods, default=(), help="methods to run, by comma; default all")
    parser.add_argument("--redo", type=methods, default=(), help="methods whose runs are done again")
    run(parser.parse_args(argv))

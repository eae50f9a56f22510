"""Several ranks: seconds of a Hessian step on two cores, and on paper on many GPUs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.report import markdown_row, table
from hessian import DeepMLPWithTracking
from newton import DampedNewton


class RankShape(NamedTuple):
    name: str
    inputs: int
    width: int
    classes: int
    layers: int
    batch: int
    sub_batch: int


SHAPES = (
    RankShape("products", 1024, 256, 10, 6, 4096, 8),
    RankShape("products", 1024, 256, 10, 6, 16384, 8),
    RankShape("solves", 1024, 128, 100, 12, 64, 32),
)
QUICK_SHAPES = (RankShape("products", 16, 8, 3, 3, 64, 4),)
REPEATS = 3


def measure_rank(rank: int, ranks: int, shape: RankShape, folder: str) -> None:
    """Steps from one start, each rank with its share. Writes their seconds, the processor's, and the new loss."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{folder}/store{shape.batch}", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    torch.manual_seed(0)
    model = DeepMLPWithTracking(shape.inputs, shape.width, shape.classes, shape.layers - 1)
    x, y = torch.randn(shape.batch, shape.inputs), torch.randint(shape.classes, (shape.batch,))
    x, y = (part.tensor_split(ranks)[rank] for part in (x, y))
    start, seconds, busy = [p.detach().clone() for p in model.parameters()], [], []
    for _ in range(REPEATS):
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=True):
                p.copy_(value)
        optimizer = DampedNewton(model, curvature="gauss_newton", curvature_batch=shape.sub_batch, group=group)
        if group is not None:
            dist.barrier()
        began, busy_before = time.perf_counter(), time.process_time()
        optimizer.step(lambda: model(x, y, track_activations=True))
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - busy_before)
    assert optimizer.report is not None
    result = [min(seconds), min(busy), optimizer.report.new_objective]
    (Path(folder) / f"{shape.batch}-{ranks}-{rank}.json").write_text(json.dumps(result))
    if group is not None:
        dist.destroy_process_group()


def ranks(quick: bool, folder: Path) -> list[str]:
    """Two ranks with one thread each against one process with one thread."""
    rows = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        for count in (1, 2):
            multiprocessing.spawn(measure_rank, (count, shape, str(folder)), count)
        results = ((folder / f"{shape.batch}-{which}.json").read_text() for which in ("1-0", "2-0", "2-1"))
        (one, busy, loss), (two, first, same), (_, second, _) = map(json.loads, results)
        size = f"{shape.layers} × {shape.width}, {shape.inputs} inputs, {shape.classes} classes"
        gap = f"{abs(same - loss) / loss:.0e}"
        rows.append(
            [shape.name, size, shape.batch, shape.sub_batch, one, two, f"{two / one:.2f}", busy, first, second, gap]
        )
        print(markdown_row(rows[-1]), flush=True)
    header = ["most of it is", "network", "N", "sub-batch", "one rank, s", "two ranks, s", "ratio"]
    header += ["processor: one rank, s", "first of two", "second", "loss differs by"]
    return [
        *table(header, rows),
        "",
        f"float32, 8 conjugate gradients, gloo, one thread a rank. The least of {REPEATS} steps from one start.",
    ]


# ------------------------------------------------------------------------------------------------------- on paper

OPERATIONS, MEMORY, LINK = 3e13, 3e12, 5e10  # a second, of a GPU: float64 operations, bytes of memory, bytes of a link
GPUS = (1, 8, 64, 512)


def scale(quick: bool, folder: Path) -> list[str]:
    """20 × 256 on ImageNet, at stated rates."""
    with torch.device("meta"):
        model = DeepMLPWithTracking(3 * 224**2, 256, 1000, 19)
    rows = []
    for k in (4, 16):
        optimizer = DampedNewton(model, curvature="gauss_newton", curvature_batch=k, weight_decay=1e-4)
        for batch in (64, 256, 1024, 4096, 16384):
            costs = [optimizer.estimate_step(batch, ranks=count) for count in GPUS]
            one, last = costs[0], costs[-1]
            seconds = [c.seconds(OPERATIONS, MEMORY) + c.sent / LINK for c in costs]
            shared, sending = (one.operations - one.alone) / OPERATIONS, last.sent / LINK
            figures = [one.operations - one.alone, one.alone, last.sent, sending]
            pays = shared / (one.seconds(OPERATIONS, MEMORY) - shared + sending)
            rows.append([k, batch, *(f"{x:.2g}" for x in (*figures, *seconds, pays))])
    header = ["sub-batch", "N", "operations, shared", "not shared", "bytes sent", "sending, s"]
    header += [f"{count} GPU{'s' * (count > 1)}, s" for count in GPUS] + ["pays up to"]
    return [
        *table(header, rows),
        "",
        f"20 layers of width 256, 150,528 inputs, 1,000 classes, float32. At {OPERATIONS:.0e} float64 operations/s, "
        f"{MEMORY:.0e} bytes/s of memory and {LINK:.0e} bytes/s of a link. A message to or from all counts once, "
        "without latency. 'Pays up to': so many GPUs need as long for what they share as one needs for the rest.",
    ]

"""`DampedNewton` on several ranks takes the step of one process, and ends on all with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from _hessian import input_span, newton_step
from _hessian.newton_systems import ConjugateGradients
from hessian import DeepMLPWithTracking, TrackedNetwork
from newton import DampedNewton
from tests.imagenet_helpers import equal
from tests.oracles import Case, relative

pytestmark = pytest.mark.slow
FORKS = multiprocessing.get_context("forkserver")  # the server imports everything once
FORKS.set_forkserver_preload([__name__])
WIDE = 500  # weights of a first layer that is restricted to the span of the inputs


class Training(NamedTuple):
    case: Case
    options: dict[str, object]
    dtype: torch.dtype = torch.float64
    steps: int = 4
    tolerance: float = 1e-12  # relative, in float64


SMALL, WIDE_INPUT = Case((6, 6, 6), 17, inputs=5), Case((6, 6), 17, inputs=90)
TRAININGS = (
    Training(SMALL, {"weight_decay": 1e-3}),
    Training(SMALL, {"curvature_batch": 6, "weight_decay": 1e-3}),
    Training(SMALL, {"curvature_batch": 6, "cg_iterations": 0, "route": "sweep"}),
    Training(SMALL, {"curvature_batch": 6, "weight_decay": 1e-3}, torch.float32),
    # these two magnify rounding, 15 quasi-Newton steps and a finite difference: one process that takes the samples in
    # another order differs by as much
    Training(SMALL, {"curvature": "hessian", "weight_decay": 1e-2}, tolerance=1e-11),
    Training(SMALL._replace(loss="mse"), {}, tolerance=1e-11),
    Training(WIDE_INPUT, {"curvature_batch": 6, "weight_decay": 1e-3}),
    Training(WIDE_INPUT, {"curvature_batch": 6, "weight_decay": 1e-3}, torch.float32),
    Training(WIDE_INPUT._replace(loss="mse"), {"route": "sweep"}),
    Training(SMALL, {"weight_decay": 1e-2}, steps=60),  # to a certified minimum, by the exact Hessian
)


class Step(NamedTuple):
    """What there is after a step."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    report: tuple[object, ...] = ()

    @property
    def parameters(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.model.values()])


def train(
    training: Training, own: slice, group: dist.ProcessGroup | None, starts: list[Step] | None = None
) -> list[Step]:
    """Steps, each from the one before, or from that of `starts`."""
    model, x, y = training.case.build()
    model, x = model.to(training.dtype), x.to(training.dtype)
    x, y = x[own], y[own].to(training.dtype) if y.is_floating_point() else y[own]
    found: list[Step] = []
    with mock.patch.object(input_span, "WIDE_LAYER", WIDE):
        optimizer = DampedNewton(model, group=group, **training.options)
        while len(found) < (len(starts) if starts else training.steps) and not optimizer.converged:
            if starts and found:
                model.load_state_dict(starts[len(found) - 1].model)
                optimizer.load_state_dict(copy.deepcopy(starts[len(found) - 1].optimizer))
            optimizer.step(lambda: model(x, y, track_activations=True) if len(x) else None)
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            found.append(Step(*states, tuple(optimizer.report)))
    return found


def start_rank(rank: int, sizes: tuple[int, ...], folder: Path) -> slice:
    """Join the others; this rank's samples."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(sizes))
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def run_ranks(work: Callable[..., None], sizes: tuple[int, ...], *rest: object) -> list[int | None]:
    """The exit codes of work(rank, sizes, *rest)."""
    ranks = [FORKS.Process(target=work, args=(rank, sizes, *rest)) for rank in range(len(sizes))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def train_all(rank: int, sizes: tuple[int, ...], folder: Path) -> None:
    own = start_rank(rank, sizes, folder)
    torch.save([train(training, own, dist.group.WORLD) for training in TRAININGS], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", ((10, 7), (0, 12, 5)))
def test_ranks_take_the_step_of_one_process_with_the_same_bits(tmp_path, sizes):
    assert run_ranks(train_all, sizes, tmp_path) == [0] * len(sizes)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(len(sizes))]
    for training, *found in zip(TRAININGS, *of_ranks, strict=True):
        for other in found[1:]:
            assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(found[0], other, strict=True)), training
            assert equal(found[0][-1].optimizer, other[-1].optimizer) and equal(found[0][-1].report, other[-1].report)
        tolerance = training.tolerance if training.dtype == torch.float64 else 1e-6
        one = train(training, slice(None), None, found[0])
        for ours, expected in zip(found[0], one, strict=True):
            assert relative(ours.parameters - expected.parameters, expected.parameters) <= tolerance, training
        assert found[0][-1].report[-1] == (training.steps == 60)  # certified


def fail(rank: int, sizes: tuple[int, ...], folder: Path, where: str) -> None:
    own, (model, x, y) = start_rank(rank, sizes, folder), SMALL.build()
    optimizer = DampedNewton(model, group=dist.group.WORLD)
    optimizer.step(lambda: model(x[own], y[own], track_activations=True))

    def failing(*_: object) -> Tensor:
        raise ArithmeticError("of this rank alone")

    patch = mock.patch.object(newton_step.NewtonStep, "run", failing) if where == "solve" and not rank else None
    if patch is not None:
        patch.start()
    bad = where == "closure" and rank == 1
    try:
        optimizer.step(failing if bad else lambda: model(x[own], y[own], track_activations=True))
    except (ArithmeticError, RuntimeError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


@pytest.mark.parametrize("where, bad", (("closure", 1), ("solve", 0)))
def test_a_rank_that_fails_ends_the_others(tmp_path, where, bad):
    """None waits for it: their connection is closed, which is an error of theirs."""
    assert run_ranks(fail, (10, 7), tmp_path, where) == [1, 1]
    assert (tmp_path / f"{bad}.txt").read_text() == "ArithmeticError: of this rank alone"
    assert (tmp_path / f"{1 - bad}.txt").read_text().startswith("RuntimeError")


def count_bytes(rank: int, sizes: tuple[int, ...], folder: Path, training: Training) -> None:
    """Write the bytes of all messages of a step, and what was estimated."""
    own, (model, x, y) = start_rank(rank, sizes, folder), training.case.build()
    optimizer = DampedNewton(model, group=dist.group.WORLD, **training.options)
    sent, calls = 0, {name: getattr(dist, name) for name in ("broadcast", "reduce", "gather")}

    def counted(name: str, tensor: Tensor, *rest: object, **more: object) -> None:
        nonlocal sent
        sent += tensor.nbytes * (len(sizes) if name == "gather" else 1)
        calls[name](tensor, *rest, **more)

    solve = partialmethod(ConjugateGradients.solve, stop=0.0)  # all iterations
    with (
        mock.patch.object(ConjugateGradients, "solve", solve),
        mock.patch.object(input_span, "WIDE_LAYER", WIDE),
        mock.patch.multiple(dist, **{name: lambda *a, name=name, **b: counted(name, *a, **b) for name in calls}),
    ):
        optimizer.step(lambda: model(x[own], y[own], track_activations=True))
        cost = optimizer.estimate_step(len(x), optimizer.report.num_trials, len(sizes))
    if rank == 0:
        torch.save((sent, cost.sent), folder / "sent.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("training", (TRAININGS[1], TRAININGS[6]))
def test_bytes_that_are_sent_are_estimated(tmp_path, training):
    assert run_ranks(count_bytes, (9, 8), tmp_path, training) == [0, 0]
    sent, estimated = torch.load(tmp_path / "sent.pt")
    assert estimated == pytest.approx(sent, rel=0.25)


@pytest.mark.parametrize("training", (TRAININGS[1], TRAININGS[6]))
def test_operations_are_shared_but_for_the_solves(monkeypatch, training):
    monkeypatch.setattr(input_span, "WIDE_LAYER", WIDE)
    model, *_ = training.case.build()
    optimizer = DampedNewton(model, **training.options)
    one, eight = (optimizer.estimate_step(64, ranks=ranks) for ranks in (1, 8))
    assert 0 < one.alone == eight.alone < one.operations and one.sent == 0 < eight.sent
    assert eight.operations - eight.alone == pytest.approx((one.operations - one.alone) / 8)


def test_a_tracked_network_and_a_copy_are_of_one_process():
    with pytest.raises(TypeError, match="group=None"):
        DampedNewton(TrackedNetwork(nn.Linear(2, 2)), group=object())
    model = DeepMLPWithTracking(2, 3, 2, 1)
    copied = copy.deepcopy(DampedNewton(model, group=object()))
    x = torch.ones(4, 2)
    loss = copied.step(lambda: copied._model(x, torch.zeros(4, dtype=torch.int64), track_activations=True))
    assert loss.isfinite() and copied.report.accepted

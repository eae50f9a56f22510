"""Operations and bytes: as estimated, as promised, and refused where they don't fit; float32; recomputed layers."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from unittest import mock

import pytest
import torch

import hessian
from _hessian import costs
from _hessian.costs import count_operations, shapes_of_layers
from _hessian.refinement import unit_columns
from benchmarks.example_networks import GPT
from hessian import (
    DeepMLPWithTracking,
    SingularHessianError,
    TrackedNetwork,
    compute_layer_derivatives,
    estimate_cost,
    factorize_hessian,
)
from tests.oracles import (
    HERE,
    Case,
    counted_operations,
    factorize_layers,
    num_parameters,
    random_vector,
    reachable_bytes,
    tracked_loss,
)


def test_routes_are_chosen_by_counted_operations():
    """Few parameters and many samples: dense; few samples: sweep. The counts are those of torch's counter."""
    for case, route in ((Case((6, 4, 7), 200), "dense"), (Case((16, 12, 14), 3, inputs=10), "sweep")):
        model, loss = tracked_loss(case)
        assert factorize_hessian(model, loss, 0.1).route == route
        layers = hessian._checked_derivatives(model, loss)
        estimate = count_operations(shapes_of_layers(layers), case.batch)
        for name in ("sweep", "dense"):
            epsilons = (1e3,) * len(layers)  # positive definite: no failed Cholesky is counted
            counted = counted_operations(lambda n=name, e=epsilons, x=layers: factorize_layers(x, e, route=n))
            assert estimate[name] == pytest.approx(counted, rel=0.15), name


def test_indefinite_layers_cost_one_more_factorization():
    """A failed Cholesky of a diagonal block, m³/3 at most in each layer, as counted here."""
    model, loss = tracked_loss(Case((7,) * 7, 5, inputs=7))
    assert not factorize_hessian(model, loss, 1e-3, route="sweep").is_positive_definite
    indefinite = counted_operations(lambda: factorize_hessian(model, loss, 1e-3, route="sweep"))
    definite = counted_operations(lambda: factorize_hessian(model, loss, 1e6, route="sweep"))
    assert definite < indefinite <= definite + 8 * (7 * 5) ** 3 // 3


def test_another_damping_costs_what_depends_on_it():
    """No derivatives, QR or natural sizes again for a sweep; for the dense and the Gram route a factorization alone."""
    case = Case((7,) * 7, 5, inputs=7)
    model, loss = tracked_loss(case)
    for route, curvature, size in (("dense", "hessian", num_parameters(model)), ("gram", "gauss_newton", 2 * 5)):
        f = factorize_hessian(model, loss, 1e6, route=route, curvature=curvature)
        again = counted_operations(lambda f=f: f.with_damping(1e5))
        assert again == pytest.approx(costs.factor_operations(size), rel=0.05)
    f = factorize_hessian(model, loss, 1e6, route="sweep")
    with mock.patch.object(torch.linalg, "qr", side_effect=AssertionError):
        again = counted_operations(lambda: f.with_damping(1e5))
    fresh = counted_operations(lambda: factorize_hessian(model, loss, 1e5, route="sweep"))
    natural = 6 * 5 * 7**3 * 6  # hidden layers above the first
    assert again < fresh - natural


def test_mixed_precision_is_decided_by_a_trial():
    """float32 where that can be refined, float64 where not; an rtol that is missed names precision='float64'."""
    model, loss = tracked_loss(Case((16, 12, 14), 3, inputs=10))
    direct = hessian.HessianFactorization._direct
    with mock.patch.object(hessian.HessianFactorization, "_direct", autospec=True, side_effect=direct) as trial:
        factorize_hessian(model, loss, 10.0, precision="mixed")
    assert trial.call_count == 1  # where it is clear, the trial is short
    v = random_vector(num_parameters(model))
    probe = torch.randn(len(v), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for damping in (1e-3, 1e-8):  # where it is not, it is as long as it takes
        solved = []
        spy = mock.patch.object(
            hessian.HessianFactorization, "_direct", lambda self, v, s=solved: s.append(direct(self, v)) or s[-1]
        )
        with spy:
            f = factorize_hessian(model, loss, damping, route="sweep", precision="mixed")
        first = f.residual(solved[0], unit_columns(probe)[0]).item()
        assert (len(solved) == 1) == (first <= 0.1), (damping, first)
        assert (first > 0.1) == (damping == 1e-8)
    kept = factorize_hessian(model, loss, 0.1, route="sweep", precision="mixed")
    assert kept.precision == "mixed" and kept._factor.program.layers[0].weight.dtype == torch.float32
    assert kept.residual(kept.solve(v, rtol=1e-12), v) <= 1e-12 < 1e-8 < kept.residual(kept.solve(v, rtol=None), v)
    with mock.patch.object(hessian.HessianFactorization, "_direct", autospec=True, side_effect=direct) as sweeps:
        loose = [kept.residual(kept.solve(v, rtol=rtol), v) for rtol in (1e-3, 1e-8)]
        calls = sweeps.call_count
        kept.solve(v, rtol=1e-12)
    assert loose[0] <= 1e-3 and loose[1] <= 1e-8
    assert calls < 2 * (sweeps.call_count - calls)  # no more steps than rtol needs
    redone = factorize_hessian(model, loss, 1e-8, route="sweep", precision="mixed")
    assert redone.precision == "float64"
    # what overflows in float32
    layers = tuple(x._replace(weight=1e30 * x.weight) for x in compute_layer_derivatives(model))
    assert factorize_layers(layers, 0.1, route="sweep", precision="mixed").precision == "float64"
    with mock.patch.object(hessian.HessianFactorization, "_float32_suffices", lambda self: True):
        poor = factorize_hessian(model, loss, 1e-8, route="sweep", precision="mixed")
    with pytest.raises(SingularHessianError, match="precision='float64'"):
        poor.solve(v, rtol=1e-6)
    exact = factorize_hessian(model, loss, 0.1, route="sweep")
    assert reachable_bytes(kept._factor) <= 0.55 * reachable_bytes(exact._factor)


@pytest.mark.parametrize("batch", [3, 12])
def test_checkpointed_layers(batch):
    """The bits of the kept factorization, from every √L-th cost-to-go; three times its operations for a direct solve,
    two more for each refinement."""
    model, loss = tracked_loss(Case((8,) * 24, batch, residual=True, inputs=8))
    v = random_vector(num_parameters(model))
    for damping in (1e4, 0.1, 1e-7):
        kept, checkpointed = (
            factorize_hessian(model, loss, damping, route="sweep", checkpoint_layers=c) for c in (False, True)
        )
        assert torch.equal(kept.solve(v, rtol=None), checkpointed.solve(v, rtol=None))
        assert kept.logabsdet == checkpointed.logabsdet
        if damping == 1e4:
            segments = checkpointed._factor._checkpoints._states
            assert len(segments) == 5
            assert reachable_bytes(*segments.values()) < 0.4 * reachable_bytes(kept._factor)
            once = counted_operations(lambda: factorize_hessian(model, loss, 1e4, route="sweep"))  # noqa: B023
            direct = counted_operations(lambda f=checkpointed: f.solve(v, rtol=None))
            assert direct <= 2.05 * once
    factor = weakref.ref(checkpointed._factor)
    del checkpointed
    assert factor() is None  # in no cycle of references: its memory is free at once


@pytest.mark.slow
def test_costs_are_estimated_within_ten_percent():
    """Operations against those counted, of every route."""
    cases = (
        Case((32, 32, 32), 8, inputs=32, classes=10),
        Case((24,) * 4, 30, residual=True, inputs=24),
        Case((40, 30), 64, inputs=12, classes=5),
    )
    for case in cases:
        model, loss = tracked_loss(case)
        for curvature in ("hessian", "gauss_newton"):
            estimates = estimate_cost(model, case.batch, curvature=curvature)
            assert set(estimates) == {"sweep", "dense"} | ({"gram"} if curvature == "gauss_newton" else set())
            for route, estimate in estimates.items():
                if route == "dense" and num_parameters(model) > 3000:
                    continue
                counted = counted_operations(
                    lambda r=route, c=curvature, m=model, x=loss: factorize_hessian(m, x, 1e3, route=r, curvature=c)
                )
                assert estimate.operations == pytest.approx(counted, rel=0.1), (case, curvature, route)


ESTIMATED = (
    {"route": "sweep"},
    {"route": "sweep", "keep": "inertia"},
    {"route": "sweep", "precision": "mixed"},
    {"route": "sweep", "checkpoint_layers": True},
    {"route": "sweep", "checkpoint_layers": True, "widths": [*range(48, 16, -2)]},
    {"route": "dense"},
    {"route": "gram", "curvature": "gauss_newton"},
)


@pytest.mark.slow
@pytest.mark.parametrize("way", ESTIMATED, ids=lambda way: "-".join(map(str, way.values()))[:30])
def test_bytes_are_estimated_within_ten_percent(way):
    """Peak resident memory of a fresh process above the same process before it factors."""
    way = dict(way)
    sizes = "60, 50, 10, 2" if way["route"] == "dense" else "32, 32, 10, 15"
    if "widths" in way:
        sizes = f"32, {way['widths']}, 10, {len(way.pop('widths'))}"
    warm_up = "32, 32, 10, 2" if way["route"] == "sweep" else "20, 20, 10, 1"
    batch = {"dense": 400, "gram": 300, "sweep": 32}[way["route"]]
    code = f"""
import torch
from hessian import *
torch.set_num_threads(1)
torch.manual_seed(0)
def peak(name):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(name)).split()[1])
def factor(*sizes, batch, **way):
    model = DeepMLPWithTracking(*sizes).double()
    x, y = torch.randn(batch, model.input_dim).double(), torch.randint(model.num_classes, (batch,))
    loss = model(x, y, track_activations=True)
    f = factorize_hessian(model, loss, 10.0, **way)  # nothing is carried
    if f.keep == "solve":
        f.solve(torch.randn(f.num_parameters).double(), rtol=None)
    return model
factor({warm_up}, batch={batch}, **{way!r})  # what is loaded and set up once
before = peak("VmRSS")
model = factor({sizes}, batch={batch}, **{way!r})
way = {way!r}
route = way.pop("route")
print(peak("VmHWM") - before, estimate_cost(model, {batch}, **way)[route].bytes)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(float, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.1), (measured / 1e6, estimated / 1e6)


def test_a_wide_input_stays_small():
    """150,528 pixels: nothing of that size squared, which no machine holds."""
    model = DeepMLPWithTracking(150_528, 4, 3, 2).double()
    loss = model(random_vector(2, 150_528), torch.tensor([0, 2]), track_activations=True)
    f = factorize_hessian(model, loss, 0.1, route="sweep")
    v = random_vector(f.num_parameters)
    assert f.residual(f.solve(v), v) <= 1e-10
    assert estimate_cost(model, 2)["sweep"].bytes < 2e7


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch):
    model, loss = tracked_loss(Case((32,) * 8, 16, inputs=32))
    estimates = estimate_cost(model, 16)
    monkeypatch.setattr(costs, "free_bytes", lambda device: 0.9 * estimates["sweep"].bytes)
    with mock.patch.object(hessian, "Sweep", side_effect=AssertionError("it started")):
        with pytest.raises(MemoryError, match="What fits") as caught:
            factorize_hessian(model, loss, 0.1, route="sweep")
    message = str(caught.value)
    for remedy in ("checkpoint_layers=True", "precision='mixed'", "keep='inertia'", "a batch of 8 samples"):
        assert remedy in message
    factorize_hessian(model, loss, 0.1, route="sweep", checkpoint_layers=True)
    # H that is there already is not charged again
    small, tracked = tracked_loss(Case((6, 4), 30))
    f = factorize_hessian(small, tracked, 0.1, route="dense")
    monkeypatch.setattr(costs, "free_bytes", lambda device: 0.6 * estimate_cost(small, 30)["dense"].bytes)
    f.with_damping(0.2)
    with pytest.raises(MemoryError):
        factorize_hessian(small, tracked, 0.2, route="dense")
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1.0)
    with pytest.raises(MemoryError, match="Narrower layers"):
        factorize_hessian(model, loss, 0.1, route="sweep")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["wide input", "many classes"])
def test_imagenet_shapes(shape):
    """150,528 inputs, width 64, 4 layers, N = 8; and 1,000 classes, width 64, N = 32: below 1e-8, under 5 GB."""
    sizes = "150528, 64, 10, 3" if shape == "wide input" else "64, 64, 1000, 3"
    batch = 8 if shape == "wide input" else 32
    code = f"""
import resource, sys, torch
from hessian import *
torch.manual_seed(0)
model = DeepMLPWithTracking({sizes})
x, y = torch.randn({batch}, model.input_dim), torch.randint(model.num_classes, ({batch},))
loss = model(x, y, track_activations=True)
v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
f = factorize_hessian(model, loss, 0.05)
print(f.route, f.residual(f.solve(v), v).item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True, text=True)
    route, residual, peak = done.stdout.split()
    assert route == "sweep" and float(residual) < 1e-8
    assert int(peak) * (1 if sys.platform == "darwin" else 1024) < 5e9


@pytest.mark.parametrize("name", ["gpt", "chain"])
def test_costs_of_a_network_are_estimated(name):
    """Operations against those counted; the fewest bytes with checkpoints; derivatives by operation."""
    torch.manual_seed(0)
    if name == "gpt":
        net, x = GPT(1, 24, 3, 8, 7, expansion=4).double().eval(), torch.randint(7, (1, 8))
        y = torch.randint(7, (1, 8))
    else:
        hidden = [part for _ in range(12) for part in (torch.nn.Linear(24, 24), torch.nn.Tanh())]
        net, x, y = (
            torch.nn.Sequential(*hidden, torch.nn.Linear(24, 5)).double(),
            torch.randn(10, 24),
            torch.arange(10) % 5,
        )
        x = x.double()
    model = TrackedNetwork(net, class_dim=-1)
    with pytest.raises(ValueError, match="shape of a sample is not known"):
        estimate_cost(model, 2)
    loss = model(x, y, track_activations=True)
    estimated = estimate_cost(model, len(x))["sweep"]
    f = factorize_hessian(model, loss, 1e3, route="sweep")  # positive definite: no failed Cholesky is counted
    counted = counted_operations(lambda: f._system.factor(f._settings, None, False))
    assert estimated.operations == pytest.approx(counted, rel=0.15)
    kept, recomputed, counts = (
        estimate_cost(model, len(x), **options)["sweep"].bytes
        for options in ({}, {"checkpoint_layers": True}, {"keep": "inertia"})
    )
    assert counts < recomputed <= kept and (name == "gpt" or recomputed < 0.6 * kept)
    assert estimate_cost(model, 2 * len(x))["sweep"].operations > 4 * estimated.operations
    assert [x.output for x in compute_layer_derivatives(model)] == [x.output for x in f._system.program.operations]

"""Steps with the curvature of all samples by conjugate gradients, preconditioned by solves with a sub-batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from _hessian.conjugate_gradients import ConjugateGradients
from torch import Tensor

from _hessian import conjugate_gradients, input_span
from _hessian.gram import GramSystem, gauss_newton_product
from _hessian.newton_problem import Preconditioner, batch_fingerprint
from hessian import DeepMLPWithTracking
from newton import DampedNewton
from tests.newton_oracles import closure_of, eye, parameters_of, state_of, step_of
from tests.oracles import Case, dense_hessian, random_vector, relative, tracked_loss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("weight_decay", (0.0, 0.03))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("route", ("gram", "sweep"))
@pytest.mark.parametrize("case, size", ((Case((6, 4, 7), 15, inputs=5), 4), (Case((6, 6, 4), 30, residual=True), 12)))
def test_conjugate_gradients_solve_with_the_curvature_of_the_whole_batch(case, size, route, metric, weight_decay):
    """Many iterations against a dense solve. One iteration is along the exact step of the sub-batch."""
    damping = 0.3
    model, loss = tracked_loss(case)
    options = {"route": route, "metric": metric, "curvature_batch": size, "weight_decay": weight_decay}
    for iterations in (1, 40):
        optimizer = DampedNewton(model, cg_iterations=iterations, **options)
        with torch.inference_mode():
            step = step_of(optimizer)
            preconditioner = step.gauss_newton.preconditioner(damping)
            x = ConjugateGradients(step.problem, step.gauss_newton.preconditioner, None).iterate(preconditioner, 1e-24)
            inverse = torch.stack([preconditioner.inverse(e) for e in eye(len(x))], 1)
            metric_matrix = torch.stack([preconditioner.metric(e) for e in eye(len(x))], 1)
            products = gauss_newton_product(step.problem.curvature_layers, eye(len(x)))
        assert relative(inverse @ (products + metric_matrix) - eye(len(x)), eye(len(x))) < 1e-8
        assert torch.linalg.eigvalsh(metric_matrix - weight_decay * eye(len(x)))[0] > 0
        exact = -torch.linalg.solve(dense_hessian(case, "gauss_newton") + metric_matrix, step.problem.gradient)
        if iterations == 40:
            assert relative(x - exact, exact) < 1e-9
        else:
            alone = -inverse @ step.problem.gradient
            assert torch.nn.functional.cosine_similarity(x, alone, 0) > 1 - 1e-12
            assert relative(x - exact, exact) > 0.01  # that sub-batch is not the batch


def test_curvature_of_the_whole_batch_fits_more_samples():
    """Of 120 samples 8 are drawn. Steps by all 120 fit better than steps by the 8 alone."""
    losses = {}
    for iterations in (0, 8):
        model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
        optimizer = DampedNewton(model, curvature_batch=8, cg_iterations=iterations, metric_damping=0.1)
        for _ in range(30):
            optimizer.step(closure_of(model, x, y))
        losses[iterations] = model(x, y).item()
    assert losses[8] < 0.2 * losses[0]


def test_damping_falls_only_where_conjugate_gradients_got_far():
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    for damping, falls in ((1.0, False), (10.0, True)):
        trained = copy.deepcopy(model)
        optimizer = DampedNewton(trained, curvature_batch=8, cg_iterations=3, damping=damping)
        optimizer.step(closure_of(trained, x, y))
        assert optimizer.report.length >= 1 and optimizer.report.num_trials == 1
        left = state_of(optimizer)["damping"]
        assert (left < optimizer.report.damping) == falls


def test_conjugate_gradients_end_where_they_converged(monkeypatch):
    """At a large λ the preconditioner is almost the matrix: two iterations of eight suffice, and λ falls."""
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    products, product = [], ConjugateGradients.product
    monkeypatch.setattr(ConjugateGradients, "product", lambda self, v: products.append(v) or product(self, v))
    optimizer = DampedNewton(model, curvature_batch=60, damping=1e3)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.num_trials == 1 and len(products) <= 2
    assert state_of(optimizer)["damping"] == pytest.approx(0.3 * 1e3)
    # a single iteration can't measure its progress: λ falls
    optimizer = DampedNewton(model, curvature_batch=60, cg_iterations=1)
    optimizer.step(closure_of(model, x, y))
    assert state_of(optimizer)["damping"] < 1


@pytest.mark.parametrize("iterations", (1, 2))
def test_few_iterations_do_not_begin_with_the_last_step(iterations, monkeypatch):
    """Two iterations must remain to measure the progress."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer = DampedNewton(model, curvature_batch=40, cg_iterations=iterations)
    iterate, progress = ConjugateGradients.iterate, []

    def recorded(systems: ConjugateGradients, preconditioner: Preconditioner) -> Tensor | None:
        x = iterate(systems, preconditioner)
        progress.append(systems.progress)
        return x

    monkeypatch.setattr(ConjugateGradients, "iterate", recorded)
    for _ in range(12):
        optimizer.step(closure_of(model, x, y))
    assert all((p == 0) == (iterations == 1) for p in progress)


def test_a_residual_of_nan_is_not_convergence(monkeypatch):
    """P⁻¹r is NaN from the second iteration on: the first one's step is taken, and λ stays."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer, calls, inverse = DampedNewton(model, curvature_batch=16), [], GramSystem.inverse
    monkeypatch.setattr(
        GramSystem,
        "inverse",
        lambda gram, damped, v: inverse(gram, damped, v) * (math.nan if calls else calls.append(v) or 1.0),
    )
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted and optimizer.report.num_trials == 1 and optimizer.report.length >= 1
    assert state_of(optimizer)["damping"] == optimizer.report.damping


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_whole_products_are_of_the_models_dtype(monkeypatch, dtype):
    model = DeepMLPWithTracking(6, 8, 3, 4).to(dtype)
    x, y, seen = random_vector(12, 6).to(dtype), torch.arange(12) % 3, set()
    monkeypatch.setattr(
        conjugate_gradients,
        "gauss_newton_product",
        lambda layers, v: seen.add(v.dtype) or gauss_newton_product(layers, v),
    )
    DampedNewton(model, curvature_batch=4).step(closure_of(model, x, y))
    assert seen == {dtype}


# ------------------------------------------------------------------------------------------------ on the same data


def test_the_fingerprint_tells_batches_apart():
    """Not the order of the samples. Also one-hot inputs, whose plain sums are equal, and batches with other targets."""
    x, y = eye(5)[[0, 1, 2, 2, 3, 4]], torch.tensor([0, 1, 2, 0, 1, 2])
    same = batch_fingerprint(x, y)
    assert batch_fingerprint(x.flip(0), y.flip(0)) == pytest.approx(same, rel=1e-12)
    for other in ((x[[1, 1, 2, 2, 3, 4]], y), (x, y[[1, 0, 2, 3, 4, 5]]), (x[:5], y[:5])):
        assert max(abs(a / b - 1) for a, b in zip(batch_fingerprint(*other), same, strict=True)) > 1e-3
    rows = torch.nn.functional.one_hot(y).double()
    for other in (rows[[1, 0, 2, 3, 4, 5]], 0.9 * rows + 0.1 / 3):
        assert batch_fingerprint(x, other) != pytest.approx(batch_fingerprint(x, rows), rel=1e-3)


@pytest.mark.parametrize("wide", (False, True))
def test_on_the_same_data_conjugate_gradients_begin_with_the_last_step(wide, monkeypatch):
    """Three iterations minimize the quadratic over the span of that step and of two preconditioned residuals."""
    monkeypatch.setattr(input_span, "WIDE_LAYER", 1 if wide else 2**20)
    model, x, y = Case((8, 6, 7), 7, inputs=50).build()
    optimizer = DampedNewton(model, curvature_batch=4, cg_iterations=3, seed=1)
    before = parameters_of(model)
    optimizer.step(closure_of(model, x, y))
    last = parameters_of(model) - before
    closure_of(model, x, y)()
    with torch.inference_mode():
        step = step_of(optimizer)
        problem, span = step.problem, step.problem.span
        assert (span is not None) == wide
        last = span.restrict(last) if wide else last
        same_data, recalled = step._recall_last_step()
        assert same_data and relative(recalled - last, last) < 1e-12
        preconditioner = step.gauss_newton.preconditioner(0.1)

        def product(v: Tensor) -> Tensor:
            return gauss_newton_product(problem.layers, v[:, None])[:, 0] + preconditioner.metric(v)

        for same in (True, False):
            systems = ConjugateGradients(problem, step.gauss_newton.preconditioner, last if same else None)
            found = systems.iterate(preconditioner, stop=0.0)
            basis = [last] if same else []
            exact, r = torch.zeros_like(found), -problem.gradient
            assert optimizer.report.accepted
            while len(basis) < 3:
                basis += [] if same and exact.count_nonzero() == 0 else [preconditioner.inverse(r)]
                V = torch.stack(basis, 1)
                A = V.mT @ torch.stack([product(v) for v in basis], 1)
                exact = V @ torch.linalg.solve(A, -(V.mT @ problem.gradient))
                r = -problem.gradient - product(exact)
            assert relative(found - exact, exact) < 1e-8


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_steps_grow_longer_only_on_the_same_data(dtype):
    """There λ falls by 0.1 where a step longer than the solution was best, and rises by 3 where a shorter one was."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    model, x, lengths, factors = model.to(dtype), x.to(dtype), {}, set()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for alternating in (False, True):
        trained, reports = copy.deepcopy(model), []
        optimizer = DampedNewton(trained, curvature_batch=16)
        state = state_of(optimizer)
        for i in range(40):
            part = slice(i % 2, None, 2) if alternating else order if i % 2 else slice(None)  # in any order
            optimizer.step(closure_of(trained, x[part], y[part]))
            reports.append(optimizer.report)
            if not alternating and i > 0:
                factor = round(state["damping"] / optimizer.report.damping, 6)
                expected = {3.0} if optimizer.report.length < 1 else {1.0}
                assert factor in (expected | {0.1} if optimizer.report.length > 1 else expected)
                factors.add(factor)
        assert all(r.new_objective < r.objective for r in reports)
        lengths[alternating] = [r.length for r in reports]
    assert factors == {0.1, 1.0, 3.0}
    assert max(lengths[False]) >= 4 and max(lengths[True]) == 2


def test_a_step_is_lengthened_only_on_the_same_data():
    """The same step twice: with and without the fingerprint of the data of the step before."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer = DampedNewton(model, curvature_batch=16)
    for _ in range(50):
        before = copy.deepcopy((model, optimizer))
        optimizer.step(closure_of(model, x, y))
        if optimizer.report.length >= 4:
            break
    for data, longest in ((state_of(before[1])["data"], math.inf), ((), 2)):
        other, copied = copy.deepcopy(before)
        state_of(copied)["data"] = data
        copied.step(closure_of(other, x, y))
        assert 2 <= copied.report.length <= longest
        assert (copied.report == optimizer.report) == (longest > 2)


def test_a_useless_preconditioner_is_not_hidden_by_the_last_step(monkeypatch):
    """Where P⁻¹r is NaN, or rᵀP⁻¹r negative, λ is raised. A last step of NaN or zero is left out."""
    inverse = GramSystem.inverse
    for broken in (lambda v: v * math.nan, lambda v: -v):
        model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
        optimizer = DampedNewton(model, curvature_batch=16)
        for _ in range(4):
            optimizer.step(closure_of(model, x, y))
        state = state_of(optimizer)
        below = 10 * state["damping"]

        def at(gram, damped, v, below=below, broken=broken):
            return broken(v) if damped.damping < below else inverse(gram, damped, v)

        with monkeypatch.context() as patch:
            patch.setattr(GramSystem, "inverse", at)
            optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted and optimizer.report.damping >= below
        for last in (math.nan, 0.0):
            state["last"] = torch.full_like(state["last"], last)
            optimizer.step(closure_of(model, x, y))
            assert optimizer.report.accepted and optimizer.report.num_trials == 1

"""Steps with the curvature of all samples by conjugate gradients, preconditioned by solves with a sub-batch."""

from __future__ import annotations

import math

import pytest
import torch

from _hessian import newton_problem
from _hessian.gram import GramSystem, gauss_newton_product
from _hessian.newton_systems import ConjugateGradients, GramSteps
from hessian import DeepMLPWithTracking
from newton import DampedNewton
from tests.newton_oracles import closure_of, problem_of, state_of
from tests.oracles import Case, random_vector

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("damping, exponent", ((0.1, 1), (30.0, 2)))
def test_damping_falls_by_the_length(damping, exponent):
    """λ/a² where three iterations solved the system, else λ/a."""
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    optimizer = DampedNewton(model, curvature_batch=8, cg_iterations=3, damping=damping)
    optimizer.step(closure_of(model, x, y))
    report = optimizer.report
    assert report.length != 1 and state_of(optimizer)["damping"] == pytest.approx(
        report.damping / report.length**exponent
    )


def test_conjugate_gradients_end_where_they_converged(monkeypatch):
    """At a large λ the preconditioner is almost the matrix: one iteration of eight suffices."""
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    problem, products = problem_of(DampedNewton(model, curvature_batch=60), closure_of(model, x, y)), []
    product = problem.product
    monkeypatch.setattr(problem, "product", lambda v: products.append(v) or product(v))
    systems = ConjugateGradients(problem, GramSteps(problem), None)
    systems.solve(1e3)
    assert len(products) == 1 and systems.exponent == 2
    systems.solve(1e-3)
    assert len(products) > 1 + 5
    few = problem_of(DampedNewton(model, curvature_batch=4, cg_iterations=2), closure_of(model, x, y))
    systems = ConjugateGradients(few, GramSteps(few), None)
    systems.solve(1e-6)
    assert systems.exponent == 1  # two iterations did not solve it


@pytest.mark.parametrize("iterations", (2, 3))
def test_conjugate_gradients_begin_along_the_last_step(iterations):
    """With the solution as first direction, nothing is left. It replaces an iteration, but not one of two."""
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    options = dict(curvature_batch=30, cg_iterations=40)
    exact = problem_of(DampedNewton(model, **options), closure_of(model, x, y))
    solution = ConjugateGradients(exact, GramSteps(exact), None).solve(0.3, stop=1e-24).x
    few = problem_of(DampedNewton(model, **options | {"cg_iterations": iterations}), closure_of(model, x, y))
    found = ConjugateGradients(few, GramSteps(few), 7.0 * solution).solve(0.3).x
    assert torch.allclose(found, solution, rtol=1e-8) == (iterations == 3)


@pytest.mark.parametrize("broken", (lambda v: v * math.nan, lambda v: -v))
def test_a_useless_preconditioner_raises_damping(broken, monkeypatch):
    """Where P⁻¹r is NaN, or rᵀP⁻¹r negative, there is no solution."""
    inverse = GramSystem.inverse
    monkeypatch.setattr(
        GramSystem,
        "inverse",
        lambda gram, damped, v: broken(v) if damped.damping < 10 else inverse(gram, damped, v),
    )
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer = DampedNewton(model, curvature_batch=16)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted and optimizer.report.damping == 10 and optimizer.report.num_trials == 2


def test_a_residual_of_nan_ends_the_iterations(monkeypatch):
    """P⁻¹r is NaN from the second iteration on: the first one's step is taken."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    calls, inverse = [], GramSystem.inverse
    monkeypatch.setattr(
        GramSystem,
        "inverse",
        lambda gram, damped, v: inverse(gram, damped, v) * (math.nan if calls else calls.append(v) or 1.0),
    )
    optimizer = DampedNewton(model, curvature_batch=16)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted and optimizer.report.num_trials == 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_whole_products_are_of_the_models_dtype(monkeypatch, dtype):
    model = DeepMLPWithTracking(6, 8, 3, 4).to(dtype)
    x, y, seen = random_vector(12, 6).to(dtype), torch.arange(12) % 3, set()
    monkeypatch.setattr(
        newton_problem, "gauss_newton_product", lambda layers, v: seen.add(v.dtype) or gauss_newton_product(layers, v)
    )
    DampedNewton(model, curvature_batch=4).step(closure_of(model, x, y))
    assert seen == {dtype}

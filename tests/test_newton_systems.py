"""The systems that a step of `DampedNewton` solves, against dense solves; and what a step costs."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from _hessian import input_span, newton_step, step_cost
from _hessian.costs import shapes_of_layers
from _hessian.gram import gauss_newton_product
from _hessian.losses import loss_value
from _hessian.newton_problem import select
from _hessian.newton_systems import ConjugateGradients, FactoredSteps, GramSteps
from _hessian.objective import accurate_loss
from _hessian.quasi_newton import exact_round
from _hessian.refinement import Refined
from hessian import DeepMLPWithTracking, HessianFactorization, compute_layer_derivatives
from newton import DampedNewton
from tests.newton_oracles import closure_of, eye, logits_jacobian, objective_gradient, output_hessian, problem_of
from tests.oracles import (
    Case,
    counted_operations,
    dense_hessian,
    dense_state_form,
    flat_function,
    random_vector,
    relative,
    tracked_loss,
)


@pytest.mark.parametrize("curvature", ("gauss_newton", "hessian"))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("batch", (3, 9, 40))
def test_factored_steps_solve_their_system(batch, metric, curvature):
    """(G + cI + λD) x = −g, where D is I, or for Gauss–Newton with metric='state' ρI + Σ SᵀS/N.

    No solution where that is not definite. By the sweep, and with 40 samples densely.
    """
    case, c, rho, seen = Case((6, 4, 7), batch), 0.02, 1e-2, set()
    model, x, y = case.build()
    optimizer = DampedNewton(model, metric=metric, weight_decay=c, metric_damping=rho)
    problem = problem_of(optimizer, closure_of(model, x, y))
    systems, g, one = FactoredSteps(problem, curvature), objective_gradient(model, x, y, c), eye(len(problem.gradient))
    D = rho * one + dense_state_form(case) if (metric, curvature) == ("state", "gauss_newton") else one
    for damping in (300.0, 30.0, 0.01):
        A = dense_hessian(case, curvature) + c * one + damping * D
        definite = bool(torch.linalg.eigvalsh(A)[0] > 0)
        seen.add(definite)
        if not definite:
            assert systems.solve(damping) is None
            continue
        exact = -torch.linalg.solve(A, g)
        assert relative(A @ systems.solve(damping).x + g, g) < 1e-6
        assert relative(systems.factorized(damping)._direct(-g[:, None])[:, 0] - exact, exact) < 1e-9
        if curvature == "gauss_newton":
            preconditioner, product = systems.preconditioner(damping), (c * one + damping * D) @ g
            assert relative(preconditioner.inverse(-g) - exact, exact) < 1e-9
            assert relative(preconditioner.metric(g) - product, product) < 1e-12
    assert seen == ({True} if curvature == "gauss_newton" else {True, False})


def test_a_damping_of_zero_is_not_quite_zero():
    """Of Gauss–Newton matrices, which are singular."""
    model, x, y = Case((6, 4, 7), 3).build()
    problem = problem_of(DampedNewton(model), closure_of(model, x, y))
    assert FactoredSteps(problem, "gauss_newton").factorized(0.0).damping == 1e-10


def test_a_solve_that_misses_its_residual_gives_no_solution(monkeypatch):
    model, x, y = Case((6, 4, 7), 9).build()
    systems = FactoredSteps(problem_of(DampedNewton(model), closure_of(model, x, y)), "gauss_newton")
    assert systems.solve(1.0) is not None
    monkeypatch.setattr(
        HessianFactorization, "_refined", lambda self, v, rtol, target: Refined(v, torch.tensor([2 * rtol]))
    )
    assert systems.solve(1.0) is None


def test_second_order_correction():
    """−½ (JᵀΛJ + λI)⁻¹ JᵀΛ s₂ with s₂ by torch.func, to 2 %: the error of the one-sided difference."""
    case, damping = Case((6, 4), 9, loss="mse"), 300.0
    model, x, y = case.build()
    optimizer = DampedNewton(model, metric="parameter", curvature="gauss_newton")
    along, ours = GramSteps(problem_of(optimizer, closure_of(model, x, y))).solve(damping)
    f, theta = flat_function(model, x)

    def slope(t: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(f, (theta + t * along,), (along,))[1]

    _, bend = torch.func.jvp(slope, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))
    weighted = torch.einsum("nab,nb->na", output_hessian(case), bend)
    right = torch.einsum("ncp,nc->p", logits_jacobian(case), weighted)
    exact = -0.5 * torch.linalg.solve(dense_hessian(case, "gauss_newton") + damping * eye(len(theta)), right)
    assert relative(ours - exact, exact) < 0.02
    model, x, y = case._replace(loss="cross_entropy").build()
    assert GramSteps(problem_of(DampedNewton(model), closure_of(model, x, y))).solve(damping).bend is None


@pytest.mark.parametrize("weight_decay", (0.0, 0.03))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("route", ("gram", "sweep"))
@pytest.mark.parametrize("case, size", ((Case((6, 4, 7), 15, inputs=5), 4), (Case((6, 6, 4), 30, residual=True), 12)))
def test_conjugate_gradients_solve_with_the_curvature_of_the_whole_batch(case, size, route, metric, weight_decay):
    """Many iterations against a dense solve. One iteration is along the exact step of the sub-batch."""
    damping, c = 0.3, weight_decay
    model, x, y = case.build()
    for iterations in (1, 40):
        optimizer = DampedNewton(
            model, cg_iterations=iterations, route=route, metric=metric, curvature_batch=size, weight_decay=c
        )
        with torch.inference_mode():
            problem = problem_of(optimizer, closure_of(model, x, y))
            sub_batch = GramSteps(problem) if route == "gram" else FactoredSteps(problem, "gauss_newton")
            found = ConjugateGradients(problem, sub_batch, None).solve(damping, stop=1e-24).x
            preconditioner, one = sub_batch.preconditioner(damping), eye(len(found))
            inverse = torch.stack([preconditioner.inverse(e) for e in one], 1)
            metric_matrix = torch.stack([preconditioner.metric(e) for e in one], 1)
            part = gauss_newton_product(problem.layers, one)
        assert relative(inverse @ (part + metric_matrix) - one, one) < 1e-8
        assert torch.linalg.eigvalsh(metric_matrix - c * one)[0] > 0
        g = objective_gradient(model, x, y, c)
        exact = -torch.linalg.solve(dense_hessian(case, "gauss_newton") + metric_matrix, g)
        if iterations == 40:
            assert relative(found - exact, exact) < 1e-9
        else:
            assert torch.nn.functional.cosine_similarity(found, -inverse @ g, 0) > 1 - 1e-12
            assert relative(found - exact, exact) > 0.01  # that sub-batch is not the batch


def test_sub_batches_are_drawn_anew_and_the_gradient_is_of_all():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model, curvature_batch=5)
    drawn = []
    for _ in range(2):
        problem, g = problem_of(optimizer, closure_of(model, x, y)), objective_gradient(model, x, y, 0.0)
        drawn.append(problem.layers[0].inputs)
        assert relative(problem.gradient - g, g) < 1e-12
        optimizer.step(closure_of(model, x, y))
    assert drawn[0].shape == (5, 5) and not torch.equal(*drawn)
    # a sub-batch is the batch of its own mean loss
    chosen = torch.tensor([0, 3, 4, 8, 11])
    closure_of(model, x, y)()
    part = select(compute_layer_derivatives(model), chosen, 14 / 5)
    closure_of(model, x[chosen], y[chosen])()
    for ours, exact in zip(part, compute_layer_derivatives(model), strict=True):
        for name in ("inputs", "slope", "curvature", "adjoint"):
            assert torch.allclose(getattr(ours, name), getattr(exact, name), rtol=1e-12, atol=1e-15)
    assert torch.allclose(part[-1].output.diagonal, compute_layer_derivatives(model)[-1].output.diagonal, rtol=1e-12)


def test_accurate_loss():
    model, x, y = Case((4,), 6).build()
    h = random_vector(6, 3)
    assert accurate_loss(model.loss, h[None], y)[0].item() == pytest.approx(
        loss_value(model.loss, h, y).item(), rel=1e-14
    )
    h = torch.zeros(6, 3, dtype=torch.float64).scatter(1, y[:, None], 50.0)
    assert accurate_loss(model.loss, h[None], y)[0].item() == pytest.approx(2 * math.exp(-50), rel=1e-12)
    assert accurate_loss(model.loss, -40 * h[None], y)[0].item() == pytest.approx(2000 + math.log(2), rel=1e-12)
    soft = torch.softmax(random_vector(6, 3), 1)
    assert accurate_loss(model.loss, h[None], soft)[0].item() == pytest.approx(
        loss_value(model.loss, h, soft).item(), rel=1e-12
    )


@pytest.mark.parametrize(
    "case, options, route",
    (
        (Case((16,) * 10, 24, inputs=16, classes=8), {"route": "gram"}, "gram"),
        (Case((16,) * 10, 24, inputs=16, classes=8), {"route": "sweep"}, "sweep"),
        (Case((12,) * 8, 20, inputs=4096, classes=300), {"curvature_batch": 6}, "sweep"),
        (Case((12,) * 8, 400, inputs=12, classes=3), {"curvature_batch": 4}, "gram"),
        (Case((4, 4), 60, inputs=4, classes=3), {"curvature": "hessian", "metric": "parameter"}, "dense"),
    ),
)
def test_a_step_is_estimated_by_its_operations(monkeypatch, case, options, route):
    """To 25 % of the operations counted in it. A model on the meta device gives the same estimate."""
    monkeypatch.setattr(step_cost, "_SWEEP_RATE", 1.0)
    monkeypatch.setattr(input_span, "WIDE_LAYER", 1000)
    solve = functools.partialmethod(ConjugateGradients.solve, stop=0.0)  # all iterations
    monkeypatch.setattr(ConjugateGradients, "solve", solve)
    monkeypatch.setattr(newton_step, "exact_round", functools.partial(exact_round, max_steps=1))
    model, x, y = case.build()
    optimizer = DampedNewton(model, damping=1e3, **options)
    counted = counted_operations(lambda: optimizer.step(closure_of(model, x, y)))
    cost = optimizer.estimate_step(len(x), optimizer.report.num_trials)
    assert cost.route == route and optimizer.report.num_trials == cost.num_dampings
    assert cost.operations == pytest.approx(counted, rel=0.25)
    assert DampedNewton(model.to("meta"), damping=1e3, **options).estimate_step(len(x), cost.num_dampings) == cost


def test_metric_is_chosen_by_the_inputs():
    one, many = DeepMLPWithTracking(1, 4, 1, 2, loss="mse"), DeepMLPWithTracking(2, 4, 1, 2, loss="mse")
    assert DampedNewton(one).param_groups[0]["metric"] == "parameter"
    assert DampedNewton(many).param_groups[0]["metric"] == "state"


def test_route_is_chosen_by_counted_operations():
    def by_gram(case: Case) -> bool:
        model, _ = tracked_loss(case)
        layers, options = compute_layer_derivatives(model), DampedNewton(model)._options()
        return step_cost.prefers_gram(shapes_of_layers(layers), case.batch, options)

    assert by_gram(Case((16, 16, 16), 20, inputs=16, classes=2))
    assert not by_gram(Case((3, 3, 3), 20, inputs=3, classes=40))

"""The systems that a step of `DampedNewton` solves, against dense solves and products; and what a step costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from _hessian.conjugate_gradients import ConjugateGradients
from _hessian.damping_search import Search, Trial
from _hessian.factored_steps import FactoredSteps, definite_factorization
from _hessian.gram_steps import GramSteps
from _hessian.trial_losses import accurate_loss
from torch import Tensor

import hessian
from _hessian import input_span, newton_problem, newton_step, quasi_newton, step_cost
from _hessian.costs import shapes_of_layers
from _hessian.losses import loss_value
from _hessian.newton_problem import sub_batch
from _hessian.quasi_newton import Secant, inverse_bfgs_product
from _hessian.refinement import Refined
from hessian import (
    DeepMLPWithTracking,
    HessianFactorization,
    OutputHessian,
    compute_layer_derivatives,
    hessian_vector_product,
)
from newton import DampedNewton
from tests.newton_oracles import (
    SOLVER,
    closure_of,
    dense_objective_hessian,
    eye,
    logits_jacobian,
    objective_gradient,
    output_hessian,
    problem_of,
)
from tests.oracles import Case, counted_operations, dense_hessian, flat_function, random_vector, relative, tracked_loss


def measured_omega(model, index: int, z: Tensor) -> Tensor:
    """Ω of hidden layer `index`, whose inputs are z, by reverse mode."""
    h = model.layers[index](z).detach()

    def above(h: Tensor) -> Tensor:
        hidden, state = [h], z[0]
        for j in range(index, len(model.layers) - 2):
            state = model.activate(j, h, state)
            h = model.layers[j + 1](state)
            hidden.append(h)
        return torch.cat(hidden)

    jacobians = torch.stack([torch.func.jacrev(above)(row) for row in h])
    return (jacobians.mT @ jacobians).mean(0)


@pytest.mark.parametrize("curvature", ("gauss_newton", "hessian"))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("batch", (3, 9))
def test_sweep_steps_solve_their_system(batch, metric, curvature):
    """(G + cI + λD) x = −g, checked by products.

    metric='parameter': D = I. metric='state': D_ℓ = (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I) + ρI in hidden layers. With fewer
    samples than inputs A_ℓ stands alone, and N replaces d in π. Ω_ℓ is the mean over samples of
    Σ_j (∂h_j/∂h_ℓ)ᵀ(∂h_j/∂h_ℓ), hidden j ≥ ℓ, by reverse mode.
    """
    case, c, damping, rho = Case((6, 4, 7), batch), 0.02, 30.0, 1e-2
    model, x, y = case.build()
    optimizer = DampedNewton(
        model, curvature=curvature, route="sweep", metric=metric, weight_decay=c, metric_damping=rho
    )
    loss = closure_of(model, x, y)()
    (solution,) = FactoredSteps(problem_of(optimizer), SOLVER, curvature).solve([damping])
    found = solution.x
    product = hessian_vector_product(model, loss, found, curvature=curvature)
    product = product + (c + damping * (rho if metric == "state" else 1.0)) * found
    if metric == "state":
        penalties, start = [], 0
        for index, linear in enumerate(model.layers):
            a, d = len(linear.weight), linear.in_features + 1
            X, start = found[start : start + a * d], start + a * d
            X = torch.cat([X[: a * (d - 1)].view(a, d - 1), X[a * (d - 1) :].view(a, 1)], 1)
            penalty = torch.zeros_like(X)
            if index < len(model.layers) - 1:
                z = x
                for below in range(index):
                    z = model.activate(below, model.layers[below](z), z)
                inputs, Omega = torch.cat([z, torch.ones(len(z), 1)], 1), measured_omega(model, index, z)
                A = inputs.mT @ inputs / len(z)
                pi = (Omega.trace() / a / (A.trace() / min(d, len(z)))).sqrt()
                if len(z) >= d:
                    A = A + math.sqrt(rho) / pi * eye(d)
                penalty = damping * (Omega + math.sqrt(rho) * pi * eye(a)) @ X @ A
            penalties += [penalty[:, :-1].flatten(), penalty[:, -1]]
        product = product + torch.cat(penalties).detach()
    g = objective_gradient(model, x, y, c)
    assert relative(product + g, g) < 1e-6


def test_polishing_steps_solve_their_system():
    """The exact Hessian in curvature='auto': (H + cI + λρI + (λ/N) Σ S_ℓᵀS_ℓ) x = −g."""
    case, c, damping, rho = Case((6, 4, 7), 9), 0.02, 30.0, 1e-2
    model, x, y = case.build()
    optimizer = DampedNewton(model, metric="state", weight_decay=c, metric_damping=rho)
    loss = closure_of(model, x, y)()
    (solution,) = FactoredSteps(problem_of(optimizer), SOLVER, "hessian").solve([damping])
    found = solution.x
    product = hessian_vector_product(model, loss, found, state_damping=damping) + (c + damping * rho) * found
    g = objective_gradient(model, x, y, c)
    assert relative(product + g, g) < 1e-6


def test_a_solve_that_misses_its_residual_gives_no_solution(monkeypatch):
    model, x, y = Case((6, 4, 7), 9).build()
    closure_of(model, x, y)()
    systems = FactoredSteps(problem_of(DampedNewton(model)), SOLVER, "gauss_newton")
    assert len(systems.solve([1.0, 2.0])) == 2
    monkeypatch.setattr(HessianFactorization, "_refined", lambda self, v, rtol: Refined(v, torch.tensor([2 * rtol])))
    assert systems.solve([1.0, 2.0]) == []


def test_the_smallest_damping_where_the_loss_rounds_to_zero():
    """It follows the probabilities of the other classes, which keep their digits."""
    probabilities = torch.tensor([[1.0, 1e-20, 2e-20], [5e-20, 1.0, 0.0]], dtype=torch.float64)
    output = OutputHessian(probabilities / 2, zero_sum=True)
    assert newton_problem._smallest_damping(0.0, output) == pytest.approx(1e-30 * 4e-20)
    assert newton_problem._smallest_damping(7.0, output) == 1e-30
    assert newton_problem._smallest_damping(0.0, output._replace(zero_sum=False)) == 1e-30


def test_second_order_correction():
    """−½ (JᵀΛJ + λI)⁻¹ JᵀΛ s₂ with s₂ by torch.func, to 2 %: the error of the one-sided difference."""
    case, damping = Case((6, 4), 9, loss="mse"), 300.0
    model, x, y = case.build()
    closure_of(model, x, y)()
    optimizer = DampedNewton(model, metric="parameter", curvature="gauss_newton")
    ((_, along, ours),) = GramSteps(problem_of(optimizer)).solve([damping])
    f, theta = flat_function(model, x)

    def slope(t: Tensor) -> Tensor:
        return torch.func.jvp(f, (theta + t * along,), (along,))[1]

    _, bend = torch.func.jvp(slope, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))
    weighted = torch.einsum("nab,nb->na", output_hessian(case), bend)
    right = torch.einsum("ncp,nc->p", logits_jacobian(case), weighted)
    exact = -0.5 * torch.linalg.solve(dense_hessian(case, "gauss_newton") + damping * eye(len(theta)), right)
    assert relative(ours - exact, exact) < 0.02


def test_quasi_newton_steps_are_those_of_bfgs():
    """B⁻¹v, B the factored matrix after the updates B ← B − B s sᵀB / sᵀB s + y yᵀ / sᵀy: here dense."""
    case, c = Case((6, 4, 7), 9), 3.0
    model, x, y = case.build()
    B = dense_objective_hessian(model, x, y, c)
    assert torch.linalg.eigvalsh(B)[0] > 0
    P, secants = len(B), []
    closure_of(model, x, y)()
    factorization = definite_factorization(hessian._SOLVER, compute_layer_derivatives(model), c)
    for s, v in zip(random_vector(P, 3).T, random_vector(P, 4).T, strict=False):
        y = B @ s + (0.1 * v @ s) * v
        secants.append(Secant(s, y, float(s @ y)))
    for s, y, sy in secants:
        B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / sy
    v = random_vector(P, 5)[:, 4]
    exact = torch.linalg.solve(B, v)
    assert relative(inverse_bfgs_product(factorization, secants, v) - exact, exact) < 1e-9


def test_quasi_newton_steps_learn_from_the_steps_that_were_taken(monkeypatch):
    """Each secant holds a step and the gradient's change along it, from where the step before ended."""
    model, x, y = Case((6, 5), 20, inputs=4, loss="mse").build()
    optimizer, seen, finished = DampedNewton(model, weight_decay=0.05), [], []

    def recorded(factorization: HessianFactorization, secants: Sequence[Secant], v: Tensor) -> Tensor:
        seen[:] = [(s.clone(), change.clone()) for s, change, _ in secants]
        return inverse_bfgs_product(factorization, secants, v)

    def traced(search: Search, factorization: HessianFactorization, best: Trial) -> Trial:
        seen.clear()
        end = quasi_newton.quasi_newton_steps(search, factorization, best)
        objective, at = search.problem.objective, search.problem.theta.clone()
        for s, change in seen:
            after = at + s
            exact = objective.gradient(after) - objective.gradient(at)
            assert relative(change - exact, exact) < 1e-8
            at = after
        finished.append(len(seen))
        return end

    monkeypatch.setattr(quasi_newton, "inverse_bfgs_product", recorded)
    monkeypatch.setattr(newton_step, "quasi_newton_steps", traced)
    for _ in range(50):
        optimizer.step(closure_of(model, x, y))
        assert not optimizer.converged
        if finished and finished[-1] >= 3:
            break
    assert finished[-1] >= 3


def test_steps_along_negative_curvature_are_no_secants(monkeypatch):
    """BFGS updates by them would make the matrix indefinite."""
    model, x, y = Case((6, 5), 14, inputs=4).build()
    closure_of(model, x, y)()
    problem, seen = problem_of(DampedNewton(model)), []
    step = -0.1 * problem.gradient
    monkeypatch.setattr(problem.objective, "gradient", lambda theta: problem.gradient - step)
    monkeypatch.setattr(quasi_newton, "inverse_bfgs_product", lambda _, secants, v: seen.append(len(secants)) or v)
    quasi_newton.quasi_newton_steps(Search(problem), None, Trial(math.inf, step, 1.0, 1.0))
    assert set(seen) == {0}


@pytest.mark.slow
def test_a_deep_minimum_takes_few_factorizations(monkeypatch):
    """Without the quasi-Newton steps it takes at least twice as many."""

    def steps(at_most: int) -> int:
        model, x, y = Case((6,) * 7, 20, inputs=4).build()
        optimizer = DampedNewton(model, weight_decay=1e-3)
        for step in range(at_most):
            optimizer.step(closure_of(model, x, y))
            if optimizer.converged:
                assert optimizer.report.certified
                return step
        return at_most

    ours = steps(100)
    monkeypatch.setattr(newton_step, "quasi_newton_steps", lambda search, factorization, best: best)
    assert ours < 100 and steps(2 * ours) == 2 * ours


def test_sub_batches_are_drawn_anew_and_the_gradient_is_of_all():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model, curvature_batch=5)
    drawn = []
    for _ in range(2):
        closure_of(model, x, y)()
        problem, g = problem_of(optimizer), objective_gradient(model, x, y, 0.0)
        drawn.append(problem.curvature_layers[0].inputs)
        assert relative(problem.gradient - g, g) < 1e-12
        optimizer.step(closure_of(model, x, y))
    assert drawn[0].shape == (5, 5) and not torch.equal(*drawn)
    # a sub-batch is the batch of its own mean loss
    chosen = torch.tensor([0, 3, 4, 8, 11])
    closure_of(model, x, y)()
    part = sub_batch(compute_layer_derivatives(model), chosen)
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
    iterate = functools.partialmethod(ConjugateGradients.iterate, stop=0.0)  # all iterations
    monkeypatch.setattr(ConjugateGradients, "iterate", iterate)
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

"""Runs of `DampedNewton`: losses fall, minima are certified, saddles are left, and λ recovers from any data."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from _hessian import input_span, newton_step
from _hessian.objective import ChainLosses
from _hessian.quasi_newton import exact_round
from hessian import DeepMLPWithTracking
from newton import DampedNewton
from tests.newton_oracles import (
    closure_of,
    dense_objective_hessian,
    objective_gradient,
    parameters_of,
    state_of,
)
from tests.oracles import Case, random_vector, relative

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "options", [{}, {"route": "sweep"}, {"curvature": "hessian"}, {"metric": "parameter"}], ids=str
)
def test_training_lowers_the_loss_at_every_step(options):
    model, x, y = Case((7, 6, 5), 12, inputs=6).build()
    optimizer, losses = DampedNewton(model, **options), []
    for _ in range(12):
        losses.append(optimizer.step(closure_of(model, x, y)).item())
        if optimizer.converged:
            break
        assert optimizer.report.accepted and optimizer.report.new_objective < optimizer.report.objective
        assert optimizer.report.objective == pytest.approx(losses[-1], rel=1e-12)
        assert all(p.grad is None for p in model.parameters())
    assert losses[-1] < 1e-2 * losses[0]


def test_thirty_layers_are_fitted_in_a_few_steps():
    torch.manual_seed(0)
    model = DeepMLPWithTracking(20, 8, 5, 29).double()
    x, y = torch.randn(24, 20, dtype=torch.float64), torch.randint(5, (24,))
    optimizer = DampedNewton(model)
    for _ in range(30):
        optimizer.step(closure_of(model, x, y))
        if optimizer.converged:
            break
    assert optimizer.report.objective < 1e-10


@pytest.mark.parametrize("options", ({}, {"route": "gram"}, {"metric": "parameter"}, {"route": "sweep"}))
def test_one_class(options):
    """The loss is zero for any weights. A step lowers the L2 term."""
    model = DeepMLPWithTracking(4, 5, 1, 2).double()
    x, y = torch.ones(3, 4).double(), torch.zeros(3, dtype=torch.long)
    optimizer = DampedNewton(model, weight_decay=0.1, **options)
    before = 0.05 * parameters_of(model).square().sum()
    for _ in range(3):
        assert optimizer.step(closure_of(model, x, y)) == 0
    assert 0.05 * parameters_of(model).square().sum() < 0.1 * before


def test_a_lost_sample_is_trained_by_the_plain_gradient():
    """π_y underflows, so that w with Jᵀw = g has no correct digits."""
    model, x, y = Case((4,), 6).build()
    with torch.no_grad():
        model.layers[-1].weight.mul_(1e4)
    y = model(x).argmin(1)
    optimizer, before = DampedNewton(model), model(x, y).item()
    assert before > 1e3
    for _ in range(10):
        optimizer.step(closure_of(model, x, y))
        if optimizer.converged:
            break
        assert optimizer.report.accepted
    assert model(x, y).item() < 0.1 * before


def test_a_float32_model_trains_in_its_own_dtype():
    torch.manual_seed(0)
    model = DeepMLPWithTracking(6, 8, 3, 4)
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    optimizer = DampedNewton(model)
    losses = [optimizer.step(closure_of(model, x, y)).item() for _ in range(8)]
    assert losses[-1] < 1e-3 * losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


# ------------------------------------------------------------------------------------------------ minima and saddles


def test_weight_decay_is_that_of_the_objective():
    """At the end ∇(loss + ½c‖θ‖²), by autograd, vanishes, and its dense Hessian is positive definite."""
    model, x, y = Case((6, 5), 20, inputs=4).build()
    optimizer = DampedNewton(model, weight_decay=0.05)
    for _ in range(300):
        optimizer.step(closure_of(model, x, y))
        if optimizer.converged:
            break
    assert optimizer.converged and optimizer.report.certified and optimizer.report.method == "none"
    assert objective_gradient(model, x, y, 0.05).norm() < 2e-12
    assert torch.linalg.eigvalsh(dense_objective_hessian(model, x, y, 0.05))[0] > 0
    before = parameters_of(model)
    optimizer.step(closure_of(model, x, y))
    assert torch.equal(before, parameters_of(model)) and optimizer.converged and not optimizer.stalled


def test_convergence_is_quadratic_at_a_minimum():
    """‖g‖ of the last Newton steps: each below a number times the square of the one before."""
    case, c = Case((6, 5), 20, inputs=4, loss="mse"), 0.05

    def norms(curvature: str, steps: int) -> list[float]:
        model, x, y = case.build()
        optimizer, found = DampedNewton(model, weight_decay=c, curvature=curvature), []
        while len(found) < steps and not optimizer.converged:
            optimizer.step(closure_of(model, x, y))
            found.append(optimizer.report.gradient_norm)
        return found

    ours = norms("auto", 200)
    assert ours[-1] < 1e-12
    assert all(b < 5000 * a**2 for a, b in zip(ours[-4:], ours[-3:], strict=False)), ours[-6:]
    # Gauss–Newton alone converges linearly there
    assert norms("gauss_newton", len(ours))[-1] > 1e-6


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
    monkeypatch.setattr(newton_step, "exact_round", functools.partial(exact_round, max_steps=1))
    assert ours < 100 and steps(2 * ours) == 2 * ours


def saddle() -> tuple[DeepMLPWithTracking, Tensor, Tensor]:
    """g = 0 and H is indefinite: the tanh units do nothing, and the last bias fits the mean."""
    model = DeepMLPWithTracking(3, (5, 4), 2, 2, loss="mse").double()
    x = random_vector(3, 8).T.contiguous()
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        # one unit is passed on, so that the last layer's weight and the first's are coupled by λ
        model.layers[1].weight[0, 0] = 1.0
        model.layers[2].bias.copy_(y.mean(0))
    return model, x, y


def test_a_strict_saddle_is_left():
    model, x, y = saddle()
    assert objective_gradient(model, x, y, 0.0).norm() < 1e-12
    assert torch.linalg.eigvalsh(dense_objective_hessian(model, x, y, 0.0))[0] < -1e-2
    optimizer = DampedNewton(model)
    optimizer.step(closure_of(model, x, y))
    report = optimizer.report
    assert report.method == "saddle" and report.accepted and not optimizer.converged
    assert report.new_objective < report.objective - 1e-3
    for _ in range(60):
        optimizer.step(closure_of(model, x, y))
    assert optimizer.report.objective < 0.1 * report.objective


def test_a_saddle_is_left_where_the_gradient_is_small_but_not_zero():
    """‖g‖ is above gtol, but the decrease along −g is below the rounding of f."""
    model, x, y = saddle()
    with torch.no_grad():
        model.layers[2].bias += 1e-10
    optimizer = DampedNewton(model)
    state_of(optimizer).update(exact=True, value=model(x, y).item())  # on the same data
    optimizer.step(closure_of(model, x, y))
    report = optimizer.report
    assert 1e-12 < report.gradient_norm < 1e-9
    assert report.method == "saddle" and report.accepted and report.new_objective < report.objective - 1e-3


def test_gauss_newton_alone_stays_on_a_saddle_and_says_so():
    model, x, y = saddle()
    optimizer, before = DampedNewton(model, curvature="gauss_newton"), parameters_of(model)
    optimizer.step(closure_of(model, x, y))
    assert torch.equal(before, parameters_of(model))
    assert not optimizer.converged and optimizer.stalled and not optimizer.report.certified


def test_no_exact_hessian_beyond_its_memory(monkeypatch):
    monkeypatch.setattr(newton_step, "HESSIAN_BYTES", 1000)
    model, x, y = Case((6, 5), 20, inputs=4).build()
    optimizer, methods = DampedNewton(model, weight_decay=0.05, gtol=1e-3), set()
    for _ in range(200):
        optimizer.step(closure_of(model, x, y))
        methods.add(optimizer.report.method)
        if optimizer.converged:
            break
    assert optimizer.converged and not optimizer.report.certified and methods == {"gauss_newton", "none"}


# ------------------------------------------------------------------------------------------- steps that find nothing

plain_logits = ChainLosses.logits


def poison_trials(monkeypatch, value: float | None) -> None:
    """Let the logits be `value` at all parameters but the present ones; None: undo that."""

    def poisoned(self: ChainLosses, theta: Tensor, inputs: Tensor) -> Tensor:
        moved = (theta.to(self.dtype) != self.theta.to(self.dtype)).any(1)
        return torch.where(moved[:, None, None], value, plain_logits(self, theta, inputs))

    monkeypatch.setattr(ChainLosses, "logits", plain_logits if value is None else poisoned)


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize(
    "options",
    ({}, {"curvature": "gauss_newton"}, {"curvature": "hessian"}, {"curvature_batch": 4}, {"route": "sweep"}),
    ids=str,
)
def test_a_step_that_finds_nothing_changes_nothing(options, poison, monkeypatch):
    torch.manual_seed(0)
    model = DeepMLPWithTracking(5, 4, 3, 2, loss="mse" if options == {} else "cross_entropy").double()
    x, y = random_vector(5, 6).T.contiguous(), torch.tensor([0, 1, 2, 0, 1, 2])
    y = torch.nn.functional.one_hot(y).double() if model.loss == "mse" else y
    optimizer = DampedNewton(model, **options)
    for _ in range(2):
        optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted
    poison_trials(monkeypatch, poison)
    before, methods = parameters_of(model), []
    for _ in range(3):
        loss = optimizer.step(closure_of(model, x, y))
        assert torch.equal(before, parameters_of(model)) and not optimizer.report.accepted
        assert optimizer.report.objective == pytest.approx(loss.item(), rel=1e-12)
        methods.append(optimizer.report.method)
    if options == {}:  # the exact Hessian is tried too
        assert methods == ["gauss_newton", "saddle", "gauss_newton"]
    poison_trials(monkeypatch, None)
    for _ in range(3):
        optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted or optimizer.converged
    assert model(x, y).item() < loss.item()


def test_damping_comes_down_from_where_the_model_promises_no_decrease():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model, curvature_batch=5, damping=1e16)
    before = model(x, y).item()
    for _ in range(50):
        optimizer.step(closure_of(model, x, y))
    assert model(x, y).item() < 0.5 * before


@pytest.mark.parametrize(
    "options",
    (
        {"curvature_batch": 4},
        {"curvature": "gauss_newton", "route": "gram"},
        {"curvature": "gauss_newton", "route": "sweep"},
        {"curvature": "hessian"},
    ),
    ids=str,
)
def test_a_tiny_damping_is_no_trap(options):
    """It may be left by other data."""
    model, x, y = Case((8, 8), 24, inputs=6).build()
    optimizer = DampedNewton(model, **options)
    state = state_of(optimizer)
    state["damping"] = state["hessian_damping"] = 1e-50
    for _ in range(20):
        optimizer.step(closure_of(model, x, y))
    assert model(x, y).item() < 1e-6


# ------------------------------------------------------------------------------------------------ a wide first layer

WIDE = Case((7, 6), 9, inputs=60, classes=4)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("size", (None, 5))
@pytest.mark.parametrize(
    "options",
    [{"route": "sweep"}, {"curvature": "hessian"}, {"metric": "parameter"}, {"metric": "parameter", "route": "sweep"}],
    ids=str,
)
def test_a_wide_first_layer_moves_in_the_span_of_its_inputs(monkeypatch, options, size, bias):
    """The same steps as with all its weights, with an L2 term. More quasi-Newton steps would magnify the rounding."""
    monkeypatch.setattr(newton_step, "exact_round", functools.partial(exact_round, max_steps=2))

    def trained(wide: int) -> tuple[Tensor, list]:
        monkeypatch.setattr(input_span, "WIDE_LAYER", wide)
        model, x, y = WIDE._replace(bias=bias).build()
        optimizer, reports = DampedNewton(model, curvature_batch=size, weight_decay=1e-2, **options), []
        for _ in range(5):
            optimizer.step(closure_of(model, x, y))
            reports.append(optimizer.report)
        return parameters_of(model), reports

    (all_weights, expected), (in_span, found) = trained(2**20), trained(1)
    assert relative(in_span - all_weights, all_weights) < 1e-11
    for a, b in zip(expected, found, strict=True):
        assert a[:2] + a[5:] == b[:2] + b[5:] and a[2:5] == pytest.approx(b[2:5], rel=1e-11)


def test_a_wide_first_layer_ends_at_a_certified_minimum(monkeypatch):
    """With curvature='auto': the gradients of the quasi-Newton steps are taken in the span, too."""
    monkeypatch.setattr(input_span, "WIDE_LAYER", 1)
    model, x, y = WIDE.build()
    optimizer, methods = DampedNewton(model, weight_decay=1e-2), set()
    for _ in range(200):
        optimizer.step(closure_of(model, x, y))
        methods.add(optimizer.report.method)
        if optimizer.converged:
            break
    assert "hessian" in methods and optimizer.report.certified
    assert torch.linalg.vector_norm(objective_gradient(model, x, y, 1e-2)) < 1e-11


def test_a_wide_first_layer_by_the_gram_route(monkeypatch):
    monkeypatch.setattr(input_span, "WIDE_LAYER", 1)
    model, x, y = WIDE.build()
    optimizer = DampedNewton(model, route="gram")
    losses = [optimizer.step(closure_of(model, x, y)).item() for _ in range(8)]
    assert losses[-1] < 1e-3 * losses[0]

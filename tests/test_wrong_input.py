"""Wrong calls and singular systems: each error says what came, what was expected, and what to do."""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch
from torch import nn

from _hessian import carried_pivots, costs
from hessian import (
    DeepMLPWithTracking,
    SingularHessianError,
    compute_layer_derivatives,
    estimate_cost,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)
from tests.oracles import (
    UNCARRIED,
    Case,
    dense_hessian,
    factorize_layers,
    num_parameters,
    raises,
    random_vector,
    relative,
    tracked_loss,
)


def test_wrong_constructor_arguments():
    raises(ValueError, "unknown activation 'elu'", DeepMLPWithTracking, 3, 4, 2, 1, "elu")
    raises(ValueError, "unknown loss", DeepMLPWithTracking, 3, 4, 2, 1, loss="hinge")
    raises(ValueError, "2 widths for num_hidden_layers=3", DeepMLPWithTracking, 3, (4, 5), 2, 3)
    raises(ValueError, "integers ≥ 1", DeepMLPWithTracking, 3, (4, 0), 2, 2)
    raises(ValueError, "integers ≥ 1", DeepMLPWithTracking, 3, 4.0, 2, 2)
    raises(ValueError, "num_hidden_layers", DeepMLPWithTracking, 3, 4, 2, -1)


def test_wrong_batches():
    model, x, y = Case((6, 4), 3).build()
    raises(ValueError, "5 numbers a sample", model, x[:, :4])
    raises(TypeError, "x is torch.int64 and the model torch.float64", model, x.long())
    raises(TypeError, "convert x with", model, x.float())
    raises(ValueError, "got list", model, [[1.0] * 5])
    raises(ValueError, "needs targets", model, x, track_activations=True)
    raises(ValueError, "int64 of shape", model, x, y[:, None])
    raises(ValueError, "int64 of shape", model, x, y.int())
    raises(ValueError, "0 … 2", model, x, torch.tensor([0, 1, 3]), track_activations=True)
    raises(ValueError, "0 … 2", model, x, torch.tensor([0, 1, -100]), track_activations=True)
    raises(IndexError, "-100", model, x, torch.tensor([0, 1, -100]))
    raises(ValueError, "off by 2", model, x, torch.ones(3, 3).double(), track_activations=True)
    raises(ValueError, "≥ 0", model, x, torch.tensor([[2.0, -1, 0]] * 3).double(), track_activations=True)
    raises(ValueError, "is empty", model, x[:0], y[:0], track_activations=True)
    raises(TypeError, "targets must be a tensor, got list", model, x, y.tolist())
    infinite = model(torch.where(x == x[0, 0], math.inf, x), y, track_activations=True)  # tanh(∞) = 1: a finite loss
    raises(ValueError, "x has infinite entries", factorize_hessian, model, infinite, 0.1)
    mse, x, targets = Case((6, 4), 3, loss="mse").build()
    raises(ValueError, "targets must be", mse, x, targets[:, :1])
    raises(ValueError, "targets must be", mse, x, targets.float())


def test_wrong_losses():
    model, x, y = Case((6, 4), 3).build()
    v = random_vector(num_parameters(model))
    raises(ValueError, "no loss was tracked", hessian_vector_product, model, model(x, y), v)
    first = model(x, y, track_activations=True)
    penalized = first + 0.5 * sum((p**2).sum() for p in model.parameters())
    raises(ValueError, r"damping \+ w", hessian_vector_product, model, penalized, v)
    second = model(x + 1, y, track_activations=True)
    raises(ValueError, "tracked last", hessian_vector_product, model, first, v)
    raises(ValueError, "tracked last", hessian_vector_product, model, model(x, y), v)
    hessian_vector_product(model, second, v)
    model.layers[1].weight.data[0, 0] += 1e-9  # .data leaves no trace in the version counter
    raises(ValueError, "parameters changed", hessian_vector_product, model, second, v)
    second = model(x, y, track_activations=True)
    model.layers[1].weight.requires_grad_(False)
    raises(ValueError, "frozen", hessian_vector_product, model, model(x, y, track_activations=True), v)
    model.layers[1].weight.requires_grad_(True)
    model.extra = nn.Parameter(torch.zeros(2))
    raises(ValueError, "none outside", hessian_vector_product, model, model(x, y, track_activations=True), v)
    del model.extra
    third = model(x, y, track_activations=True)
    model.layers[1].weight.data[:, [0, 1]] = model.layers[1].weight.data[:, [1, 0]]  # no sum or norm changes
    raises(ValueError, "parameters changed", hessian_vector_product, model, third, v)
    infinite = model(x * math.inf, y, track_activations=True)
    raises(ValueError, "the loss is nan", hessian_vector_product, model, infinite, v)
    for function in (hessian_vector_product, hessian_inverse_vector_product, factorize_hessian):
        raises(TypeError, "DeepMLPWithTracking", function, nn.Linear(5, 3), infinite, v)
    raises(TypeError, "DeepMLPWithTracking", compute_layer_derivatives, nn.Linear(5, 3))


def test_models_that_the_closed_form_does_not_describe():
    """Never a wrong number: hooks, parametrizations, tied weights and half-written subclasses are refused."""

    class Half(DeepMLPWithTracking):
        def activate(self, index, h, z):
            return 2 * h

    def hooked(model):
        model.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)

    def parametrized(model):
        torch.nn.utils.parametrizations.orthogonal(model.layers[1])

    def tied(model):
        model.layers[2].weight = model.layers[1].weight

    def normalized(model):
        model.layers[1] = nn.BatchNorm1d(5)

    x, y = torch.randn(4, 5), torch.randint(5, (4,))
    for spoil, message in (
        (hooked, "hook"),
        (parametrized, "ParametrizedLinear"),
        (tied, "untie"),
        (normalized, "BatchNorm1d"),
        (None, "override both"),
    ):
        model = (DeepMLPWithTracking if spoil else Half)(5, 5, 5, 2)
        if spoil:
            spoil(model)
        loss = model(x, y, track_activations=True)
        raises(ValueError, message, factorize_hessian, model, loss, 0.1)


def test_wrong_vectors_and_options():
    model, loss = tracked_loss(Case((6, 4), 3))
    v = random_vector(num_parameters(model))
    f = factorize_hessian(model, loss, 0.1)
    for function in (f.solve, functools.partial(hessian_vector_product, model, loss)):
        raises(ValueError, f"shape \\({len(v)},\\)", function, v[:-1])
        raises(ValueError, f"shape \\({len(v)},\\)", function, v[:, None, None])
        raises(TypeError, "float32 or float64", function, v.half())
        raises(TypeError, "float32 or float64", function, [1.0])
        raises(ValueError, "NaN", function, v * math.nan)
        raises(ValueError, "on meta", function, v.to("meta"))
    for damping in ("0.1", None, [0.1, "x", 1.0], torch.ones(2), [[0.1, 0.1, 0.1]]):
        raises(ValueError, "damping must be", factorize_hessian, model, loss, damping)
    assert factorize_hessian(model, loss, torch.full((3,), 0.5)).damping == (0.5, 0.5, 0.5)
    raises(ValueError, "rtol", f.solve, v, rtol=0.0)
    raises(ValueError, "one shape", f.residual, v, v[:, None])
    raises(TypeError, "x must be", f.residual, [1.0], v)
    raises(
        ValueError, "x is NaN or infinite in 1 of", f.residual, v.clone().index_fill_(0, torch.tensor(2), math.nan), v
    )
    raises(ValueError, "finite", factorize_hessian, model, loss, math.nan)
    raises(ValueError, "3 layers", factorize_hessian, model, loss, [0.1, 0.2])
    raises(ValueError, "curvature", factorize_hessian, model, loss, 0.1, curvature="fisher")
    raises(ValueError, "curvature", hessian_vector_product, model, loss, v, curvature="fisher")
    for mu in (-1e-3, math.nan, math.inf, [0.1, 0.1, 0.1], "0.1"):
        raises(ValueError, "state_damping must be", factorize_hessian, model, loss, 0.1, state_damping=mu)
        raises(ValueError, "state_damping must be", hessian_vector_product, model, loss, v, state_damping=mu)
    raises(ValueError, "route", factorize_hessian, model, loss, 0.1, route="gram")
    raises(ValueError, "rtol", hessian_inverse_vector_product, model, loss, v, rtol=None)


def test_singular_systems_raise():
    """Never a vector of size 1e10: the pivot's layer, or the residual and what would do."""
    case = Case((6, 4, 7), 3)
    model, loss = tracked_loss(case)
    with pytest.raises(SingularHessianError, match="layer 4") as caught:
        factorize_hessian(model, loss, 0.0, route="sweep")
    assert caught.value.layer == 4 and caught.value.damping == 0.0
    assert isinstance(caught.value, torch.linalg.LinAlgError)
    # ε is the negative of an eigenvalue, to rounding: singular for float64
    eigenvalues, vectors = torch.linalg.eigh(dense_hessian(case))
    for route in ("sweep", "dense"):
        f = factorize_hessian(model, loss, -eigenvalues[-1].item(), route=route)
        with pytest.raises(SingularHessianError, match="Pass another damping") as caught:
            f.solve(vectors[:, -1])
        assert caught.value.residual > 1e-8
    # undamped, out of range: the damping that is named works
    v = random_vector(len(eigenvalues))
    with pytest.raises(SingularHessianError, match="tried") as caught:
        hessian_inverse_vector_product(model, loss, v)
    advised = float(str(caught.value).split("Pass damping=")[1].split(" ")[0])
    A = dense_hessian(case) + advised * torch.eye(len(v), dtype=torch.float64)
    assert relative(A @ hessian_inverse_vector_product(model, loss, v, advised) - v, v) <= 1e-8
    # few samples, tiny damping: where the sweep fails, as it does without carried pivots, the dense route is named
    few, tracked = tracked_loss(UNCARRIED)
    w = random_vector(num_parameters(few))
    with (
        mock.patch.object(carried_pivots, "_GROWTH", math.inf),
        pytest.raises(SingularHessianError, match="route='dense'"),
    ):
        factorize_hessian(few, tracked, 1e-8, route="sweep").solve(w, rtol=1e-7)
    factorize_hessian(few, tracked, 1e-8, route="dense").solve(w, rtol=1e-7)
    # what float64 can't reach names an rtol that does
    f = factorize_hessian(model, loss, 1e-4, route="sweep")
    v = random_vector(len(eigenvalues))
    with pytest.raises(SingularHessianError, match="rtol=") as caught:
        f.solve(v, rtol=1e-17)
    accepted = float(str(caught.value).rsplit("rtol=", 1)[1].split(" ")[0])
    assert f.residual(f.solve(v, rtol=accepted), v) <= accepted <= 1e-9
    # all units dead: the Hessian is zero but for the last layer's, and v is not in its range
    relu = DeepMLPWithTracking(3, 4, 2, 1, "relu", loss="mse").double()
    with torch.no_grad():
        for p in relu.parameters():
            p.fill_(-1)
    dead = relu(torch.ones(2, 3).double(), torch.zeros(2, 2).double(), track_activations=True)
    with pytest.raises(SingularHessianError, match="outside the range"):
        hessian_inverse_vector_product(relu, dead, random_vector(num_parameters(relu)))


def test_empty_and_impossible_gram_matrices():
    """One class has no curvature at all; and damping 0 is refused for another damping as it is at first."""
    model, loss = tracked_loss(Case((4,), 3, classes=1))
    v = random_vector(num_parameters(model))
    f = factorize_hessian(model, loss, 0.1, curvature="gauss_newton", route="gram")
    assert relative(f.solve(v) - 10 * v, v) <= 1e-14
    with pytest.raises(ValueError, match="divides by damping"):
        f.with_damping(0.0)
    with pytest.raises(ValueError, match="divides by damping"):
        f.with_damping((0.1, 0.0))


@pytest.mark.parametrize("route", ["sweep", "dense"])
def test_overflow_raises_on_every_route(route):
    model, loss = tracked_loss(Case((4,), 3, "relu", loss="mse"))
    layers = tuple(x._replace(inputs=1e160 * x.inputs) for x in compute_layer_derivatives(model))
    for keep in ("solve", "inertia"):
        with pytest.raises(SingularHessianError):
            factorize_layers(layers, 0.1, route=route, keep=keep)


def test_errors_of_trials_do_not_hide_the_error(monkeypatch):
    """Where the trials that look for advice don't fit in memory, the failed solve is reported all the same."""
    model, loss = tracked_loss(UNCARRIED)
    v = random_vector(num_parameters(model))
    f = factorize_hessian(model, loss, 1e-8, route="sweep")
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1.0)
    with pytest.raises(SingularHessianError, match="Pass another damping"):
        f.solve(v, rtol=1e-14)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"precision": "float32"}, "choose 'float64' or 'mixed'"),
        ({"keep": "all"}, "choose 'solve', 'disk' or 'inertia'"),
        ({"keep": "disk"}, "keep='disk' is for a TrackedNetwork"),
        ({"route": "lu"}, "choose 'auto', 'sweep', 'dense' or 'gram'"),
        ({"route": "gram"}, "curvature='gauss_newton'"),
        ({"route": "gram", "curvature": "gauss_newton", "state_damping": 1.0}, "state_damping=0"),
        ({"route": "gram", "curvature": "gauss_newton", "damping": 0.0}, "divides by damping"),
        ({"route": "dense", "checkpoint_layers": True}, "for route='sweep'"),
    ],
)
def test_wrong_choices(arguments, message):
    model, loss = tracked_loss(Case((4,), 3))
    with pytest.raises(ValueError, match=message):
        factorize_hessian(model, loss, **{"damping": 0.1, **arguments})
    for estimated in ({"batch_size": 0}, {"precision": "mixd"}, {"curvature": "gn"}, {"keep": "all"}):
        with pytest.raises(ValueError, match="batch_size|choose"):
            estimate_cost(model, **{"batch_size": 3, **estimated})

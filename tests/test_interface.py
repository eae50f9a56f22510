"""What users rely on beside the numbers: dtypes, graphs, copies, pickles, and that nothing outside is touched."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from hessian import (
    ACTIVATIONS,
    DeepMLPWithTracking,
    TrackedNetwork,
    compute_layer_derivatives,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)
from newton import DampedNewton
from tests.oracles import (
    Case,
    gradient,
    num_parameters,
    random_vector,
    relative,
    tracked_loss,
)


def test_solutions_are_usable_in_a_graph():
    """What is computed in inference mode is not given out."""
    for route, options in (("sweep", {}), ("sweep", {"precision": "mixed"}), ("dense", {})):
        model, loss = tracked_loss(Case((6, 4, 7), 3))
        v = random_vector(num_parameters(model))
        for rtol in (None, 1e-8):
            x = factorize_hessian(model, loss, 10.0, route=route, **options).solve(v, rtol=rtol)
            assert not x.is_inference()
            weight = torch.ones_like(x, requires_grad=True)
            (weight * x).sum().backward()
            assert torch.equal(weight.grad, x)


def test_float32_models_and_vectors():
    """The same answers, to float32 rounding of the result; the certificate is of the float64 solution."""
    case = Case((6, 4, 7), 3)
    model, x, y = case.build()
    v = random_vector(num_parameters(model)).float()
    small = copy.deepcopy(model).float()
    loss = small(x.float(), y, track_activations=True)
    step = hessian_inverse_vector_product(small, loss, v, 0.1)
    assert step.dtype == torch.float32
    # the reference: the float32 parameters and inputs, in float64
    large = copy.deepcopy(small).double()
    reference = hessian_inverse_vector_product(
        large, large(x.float().double(), y, track_activations=True), v.double(), 0.1
    )
    assert relative(step.double() - reference, reference) <= 1e-7
    assert torch.equal(step, hessian_inverse_vector_product(small, loss, v.double(), 0.1).float())


def test_many_right_hand_sides():
    model, loss = tracked_loss(Case((6, 4, 7), 3))
    f = factorize_hessian(model, loss, 0.1, route="sweep")
    V = random_vector(f.num_parameters, 5)
    V[:, 2] = 0
    X = f.solve(V)
    assert X.shape == V.shape and not X[:, 2].any()
    for column in range(5):
        assert relative(f.solve(V[:, column]) - X[:, column], X) <= 1e-12
    assert f.residual(X, V).shape == (5,) and f.residual(X, V).max() <= 1e-12
    assert f.residual(X[:, 0], V[:, 0]).shape == ()
    assert (f.residual(torch.zeros_like(V), V) == torch.tensor([1.0, 1, 0, 1, 1])).all()
    empty = f.solve(V[:, :0])
    assert empty.shape == (f.num_parameters, 0)
    assert not hessian_inverse_vector_product(model, loss, 0 * V[:, 0]).any()
    assert relative(f.solve(V, rtol=None) - X, X) <= 1e-9


def test_activations_of_an_instance():
    """Layers of one shape, each with a φ of its own that is set on the instance: H by double backward."""
    model, x, y = Case((5, 5, 5), 4).build()

    def derivatives(index: int, h: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh((index + 1) * h)
        return (index + 1) * (1 - t * t), -2 * (index + 1) ** 2 * t * (1 - t * t)

    model.activate = lambda index, h, z: torch.tanh((index + 1) * h)
    model.activation_derivatives = derivatives
    loss = model(x, y, track_activations=True)
    v = random_vector(num_parameters(model))
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()), create_graph=True)])
    expected = torch.cat([p.flatten() for p in torch.autograd.grad(g @ v, list(model.parameters()))])
    assert relative(hessian_vector_product(model, loss, v) - expected, expected) <= 1e-12


def test_a_factorization_owns_what_it_needs():
    """It answers for the parameters at factor time after they change, and can't be changed itself."""
    for route in ("sweep", "dense"):
        model, x, y = Case((6, 4, 7), 3).build()
        loss = model(x, y, track_activations=True)
        f = factorize_hessian(model, loss, 0.1, route=route)
        v = random_vector(f.num_parameters)
        before = f.solve(v)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        x.add_(1)
        model(x, y, track_activations=True)
        assert torch.equal(f.solve(v), before)
        with pytest.raises(AttributeError):
            f.damping = 1.0


def test_objects_are_short_in_a_notebook():
    """One line, and a table."""
    model, _ = tracked_loss(Case((6, 4), 3))
    network = TrackedNetwork(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)))
    network.net[0].bias.requires_grad_(False)
    optimizer = DampedNewton(model)
    optimizer.step(lambda: model(torch.randn(3, 5).double(), torch.tensor([0, 1, 2]), track_activations=True))
    report = optimizer.report
    for item, text, rows in (
        (factorize_hessian(*tracked_loss(Case((6, 4), 3)), 0.1), "HessianFactorization(P=", 6),
        (network, "TrackedNetwork(Sequential, P=12, frozen=2, loss='cross_entropy', tracked=False)", 4),
        (report, f"StepReport({report.method}, ", 1 + len(report)),
    ):
        assert repr(item).startswith(text) and "\n" not in repr(item)
        assert item._repr_html_().count("<tr>") == rows


def test_nothing_outside_is_touched():
    model, x, y = Case((6, 4, 7), 3).build()
    v = random_vector(num_parameters(model))
    answers = []
    for backward in (None, False, True):
        model.zero_grad()
        loss = model(x, y, track_activations=True)
        if backward is not None:
            loss.backward(create_graph=backward)
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        state, dtype = torch.get_rng_state(), torch.get_default_dtype()
        parameters = [p.detach().clone() for p in model.parameters()]
        answers.append(hessian_inverse_vector_product(model, loss, v, 0.1))
        if backward:
            carrying = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert carrying.requires_grad
            assert not hessian_inverse_vector_product(model, loss, carrying).requires_grad
            model.zero_grad()  # create_graph=True makes parameters and .grad a reference cycle
        else:
            for p, old in zip(model.parameters(), grads, strict=True):
                assert (p.grad is None and old is None) or torch.equal(p.grad, old)
        assert torch.equal(state, torch.get_rng_state()) and dtype == torch.get_default_dtype()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    alive = weakref.ref(loss)
    del loss
    gc.collect()
    assert alive() is None, "the model keeps the graph of the loss alive"


def test_default_dtype_and_autocast_do_not_matter():
    model, x, y = Case((6, 4), 3).build()
    loss = model(x, y, track_activations=True)
    v = random_vector(num_parameters(model))
    expected = hessian_inverse_vector_product(model, loss, v, 0.1)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            again = hessian_inverse_vector_product(model, loss, v, 0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, expected)


def test_sequence_of_layer_derivatives():
    model, x, y = Case((6, 4), 5, "sigmoid").build()
    model(x, y, track_activations=True)
    layers = compute_layer_derivatives(model)
    assert len(layers) == 3
    assert [tuple(layer.weight.shape) for layer in layers] == [(6, 5), (4, 6), (3, 4)]
    assert all(layer.inputs.shape == (5, layer.weight.shape[1] + 1) for layer in layers)
    assert not any(t.requires_grad for layer in layers for t in layer if isinstance(t, Tensor))
    W, b = model.layers[0].weight, model.layers[0].bias
    assert torch.allclose(layers[0].inputs @ torch.cat([W, b[:, None]], 1).T, x @ W.T + b)
    g = gradient(model, model(x, y))  # λᵀz̃ is the gradient of a layer
    blocks = [torch.cat([block[:, :-1].flatten(), block[:, -1]]) for block in (v.adjoint.T @ v.inputs for v in layers)]
    assert torch.allclose(torch.cat(blocks), g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("residual", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_initialization_keeps_signal_and_gradient(activation, residual, bias):
    """The spread over the samples of z_ℓ and of β_ℓ stays within a factor of 100 from layer 1 to layer 40."""
    for width, seed in ((64, 0), (64, 1), (32, 2), (128, 3)):
        torch.manual_seed(seed)
        model = DeepMLPWithTracking(20, width, 10, 40, activation, residual=residual, bias=bias).double()
        z, states = torch.randn(64, 20, dtype=torch.float64), []
        for index, linear in enumerate(model.layers[:-1]):
            z = model.activate(index, linear(z), z)
            z.retain_grad()
            states.append(z)
        nn.functional.cross_entropy(model.layers[-1](z), torch.randint(10, (64,))).backward()
        for spread in ([z.std(0).norm().item() for z in states], [z.grad.std(0).norm().item() for z in states]):
            assert max(spread) / min(spread) < 100, (width, seed)


def test_copies_pickles_and_state_dicts():
    model, x, y = Case((6, 4), 3).build()
    loss = model(x, y, track_activations=True)
    v = random_vector(num_parameters(model))
    expected = hessian_inverse_vector_product(model, loss, v, 0.1)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = DeepMLPWithTracking(5, (6, 4), 3, 2).double()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        with pytest.raises(ValueError, match="no loss was tracked"):
            hessian_inverse_vector_product(twin, loss, v, 0.1)
        twin_loss = twin(x, y, track_activations=True)
        assert torch.equal(hessian_inverse_vector_product(twin, twin_loss, v, 0.1), expected)
    assert torch.equal(hessian_inverse_vector_product(model, loss, v, 0.1), expected)


def test_untracked_calls_are_pure():
    """torch.func transforms and torch.compile take the model; nothing is stored."""
    model, x, y = Case((6, 6, 4), 3, residual=True).build()
    logits = torch.func.vmap(lambda row: model(row[None])[0])(x)
    assert torch.allclose(logits, model(x))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, y), model(x, y))
    assert model._tracked is None
    images = torch.randn(4, 3, 32, 32)
    assert DeepMLPWithTracking(3 * 32 * 32, 8, 10, 2)(images).shape == (4, 10)

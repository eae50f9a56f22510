"""A loss over all batches of a loader: its value, gradient and H are those of all samples at once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hessian
from _hessian import data_sets, dense, program
from benchmarks.example_networks import EXAMPLES, build
from hessian import (
    DeepMLPWithTracking,
    TrackedNetwork,
    compute_layer_derivatives,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)
from newton import DampedNewton
from tests.oracles import Case, dense_hessian, gradient, raises, random_vector, relative

CASE = Case((6, 4, 7), 15, residual=True)


def loader(x: Tensor, y: Tensor, size: int = 4, shuffle: bool = False) -> DataLoader:
    """Batches of unequal sizes."""
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle)


def as_network(model: DeepMLPWithTracking) -> TrackedNetwork:
    """The same layers, without skips, in a network of plain modules."""
    return TrackedNetwork(nn.Sequential(*[part for linear in model.layers for part in (linear, nn.Tanh())][:-1]))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["chain", "network"])
def test_a_data_set_is_its_batches_together(kind, keep):
    case = CASE._replace(residual=kind == "chain")
    model, x, y = case.build()
    H, g = dense_hessian(case), gradient(model, model(x, y))
    tracked = model if kind == "chain" else as_network(model)
    loss = tracked.track_batches(loader(x.view(15, 1, 5) if kind == "chain" else x, y), keep=keep)
    assert loss.item() == pytest.approx(model(x, y).item(), rel=1e-14)
    loss.backward(create_graph=True)
    assert relative(torch.cat([p.grad.flatten() for p in model.parameters()]) - g, g) <= 1e-13
    v = random_vector(len(g), 3)
    assert relative(hessian_vector_product(tracked, loss, v) - H @ v, H @ v) <= 1e-13
    f = factorize_hessian(tracked, loss, 0.1, route="dense")
    A = H + 0.1 * torch.eye(len(g), dtype=torch.float64)
    assert relative(A @ f.solve(v) - v, v) <= 1e-12
    again = f.with_damping(0.3)
    assert relative((A + 0.2 * torch.eye(len(g)).double()) @ again.solve(v) - v, v) <= 1e-12
    eigenvalues = torch.linalg.eigvalsh(H)
    assert f.num_negative_eigenvalues == int((eigenvalues < -0.1).sum()) and f.inertia_is_certified
    undamped = hessian_inverse_vector_product(tracked, loss, g)
    assert relative(H @ undamped - g, g) <= 1e-8
    J = factorize_hessian(tracked, loss, 0.1, curvature="gauss_newton", route="dense")
    A = dense_hessian(case, "gauss_newton") + 0.1 * torch.eye(len(g), dtype=torch.float64)
    assert relative(A @ J.solve(v) - v, v) <= 1e-12


def test_a_kept_data_set_of_a_chain_is_one_batch():
    """All routes, the derivatives of each layer, and the optimizer take it."""
    model, x, y = CASE.build()
    loss = model.track_batches(loader(x, y))
    v = random_vector(sum(p.numel() for p in model.parameters()))
    for route, curvature in (("sweep", "hessian"), ("gram", "gauss_newton")):
        f = factorize_hessian(model, loss, 0.1, route=route, curvature=curvature)
        assert f.route == route and f.residual(f.solve(v), v) <= 1e-10
    assert len(compute_layer_derivatives(model)[0].inputs) == 15
    optimizer = DampedNewton(model)
    before = optimizer.step(lambda: model.track_batches(loader(x, y)))
    assert optimizer.report.accepted and model(x, y) < before


@pytest.mark.parametrize("name", ["lenet", "gpt", "a function"])
def test_data_sets_of_networks(name):
    """Convolutions; sequences; a loss of one's own. With inputs as a tuple, which a loader makes a list."""
    net, x, y = build(EXAMPLES[name])
    model = TrackedNetwork(net, EXAMPLES[name].loss)
    v = random_vector(sum(p.numel() for p in net.parameters()), 2)
    expected = hessian_vector_product(model, model(x, y, track_activations=True), v)
    for keep in (True, False):
        loss = model.track_batches([([x[:1]], y[:1]), ([x[1:]], y[1:])], keep=keep)
        assert relative(hessian_vector_product(model, loss, v) - expected, expected) <= 1e-12


def test_other_batches_are_refused():
    model, x, y = CASE.build()
    v = random_vector(sum(p.numel() for p in model.parameters()))
    shuffled = model.track_batches(loader(x, y, shuffle=True), keep=False)
    raises(ValueError, "other batches .*the first is 1, and there were 4", hessian_vector_product, model, shuffled, v)
    batches = list(loader(x, y))
    loss = model.track_batches(batches, keep=False)
    hessian_vector_product(model, loss, v)
    batches.append(batches[0])
    raises(ValueError, "the first is 5, and there were 4", hessian_vector_product, model, loss, v)
    del batches[3:]
    raises(ValueError, "the first is 4, and there were 4", hessian_vector_product, model, loss, v)
    batches.append([x[12:], y[12:].flip(0)])
    assert not torch.equal(y[12:], y[12:].flip(0))
    raises(ValueError, "the first is 4", hessian_vector_product, model, loss, v)
    kept = model.track_batches(loader(x, y, shuffle=True))  # what is kept may be shuffled
    assert torch.isfinite(hessian_vector_product(model, kept, v)).all()


def test_wrong_loaders_and_uses_are_refused():
    model, x, y = CASE.build()
    network = as_network(model)
    raises(TypeError, "an iterator can be read once", model.track_batches, iter([(x, y)]), keep=False)
    raises(ValueError, "no batches", model.track_batches, [])
    raises(TypeError, r"pairs \(x, y\)", model.track_batches, [x])
    raises(TypeError, r"pairs \(x, y\)", model.track_batches, [(x, y, y)])
    raises(TypeError, "x is torch.float32", model.track_batches, [(x.float(), y)])
    summed = TrackedNetwork(network.net, nn.CrossEntropyLoss(reduction="sum"))
    raises(ValueError, "reduction='sum'", summed.track_batches, [(x, y)])
    loss = model.track_batches(loader(x, y), keep=False)
    raises(ValueError, "keep=True", compute_layer_derivatives, model)
    raises(ValueError, "route='sweep' needs all samples", factorize_hessian, model, loss, 0.1, route="sweep")
    raises(ValueError, "precision='mixed'", factorize_hessian, model, loss, 0.1, precision="mixed")
    raises(ValueError, "keep='disk' needs all samples", factorize_hessian, model, loss, 0.1, keep="disk")
    optimizer = DampedNewton(model)
    raises(ValueError, "keep=True", optimizer.step, lambda: model.track_batches(loader(x, y), keep=False))
    loss = network.track_batches(loader(x, y))
    with mock.patch.object(data_sets, "free_bytes", lambda device: 1e5):
        raises(MemoryError, "GB free", factorize_hessian, network, loss, 0.1)


def test_the_gradient_is_that_of_the_tracked_parameters():
    """No second derivative by autograd, and none after a change."""
    model, x, y = CASE.build()
    loss = model.track_batches(loader(x, y))
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    raises(RuntimeError, "does not require grad", torch.autograd.grad, first[0].sum(), list(model.parameters()))
    loss = model.track_batches(loader(x, y))
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    raises(RuntimeError, "modified by an inplace operation", loss.backward)
    raises(ValueError, "the parameters changed", factorize_hessian, model, loss, 0.1)
    with torch.no_grad():
        assert not model.track_batches(loader(x, y)).requires_grad


@pytest.mark.parametrize("chunk", [1, 300, 3000])
def test_the_dense_hessian_in_chunks(chunk):
    """Of samples, and of the columns of one product over them."""
    model, x, y = CASE.build()
    model(x, y, track_activations=True)
    with mock.patch.object(dense, "_CHUNK", chunk):
        H = hessian._dense_hessian(compute_layer_derivatives(model))
        expected = dense_hessian(CASE)
        assert torch.equal(H, H.mT) and relative(H - expected, expected) <= 1e-14


@pytest.mark.parametrize("name", ["rectified", pytest.param("gpt", marks=pytest.mark.slow)])
def test_the_dense_hessian_of_a_network(name):
    """Columns made together under vmap equal single ones. Where vmap is wrong, H is formed column by column."""
    net, x, y = build(EXAMPLES[name])
    model = TrackedNetwork(net)
    system = hessian._system(model, model(x, y, track_activations=True))
    expected = system.product(torch.eye(system.num_parameters, dtype=torch.float64))
    H = system.dense()
    assert relative(H - expected, expected) <= 1e-12
    together = program.Products.together
    wrong = mock.patch.object(program.Products, "together", lambda self, v: 1.01 * together(self, v))
    with wrong, mock.patch.object(program.Products, "_one", autospec=True, side_effect=program.Products._one) as single:
        assert relative(system.dense() - expected, expected) <= 1e-12
    assert single.call_count > system.num_parameters

"""Route 'gram' of a `TrackedNetwork`: against dense matrices by autograd, and against the route of a chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from _hessian import network
from _hessian.costs import factor_operations
from _hessian.graph_gram import convex_root
from benchmarks.example_networks import DenselyConnected
from hessian import DeepMLPWithTracking, SingularHessianError, TrackedNetwork, estimate_cost, factorize_hessian
from tests.oracles import counted_operations, random_vector, relative
from tests.test_networks import tracked
from tests.test_newton_networks import gauss_newton


def perceptron() -> tuple[DeepMLPWithTracking, nn.Sequential]:
    """The same network twice."""
    torch.manual_seed(0)
    chain = DeepMLPWithTracking(9, 6, 4, 2).double()
    a, b, c = chain.layers
    return chain, nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c)


@pytest.mark.parametrize("num_samples", [2, 30])
def test_a_chain_as_a_network(num_samples):
    chain, net = perceptron()
    x, y, v = random_vector(num_samples, 9), torch.arange(num_samples) % 4, random_vector(130, 2)
    models = chain, TrackedNetwork(net)
    for damping in (1.0, 1e-4, -0.03):
        ours, theirs = (
            factorize_hessian(
                model, model(x, y, track_activations=True), damping, curvature="gauss_newton", route="gram"
            )
            for model in models
        )
        assert relative(ours.solve(v) - theirs.solve(v), theirs.solve(v)) <= 1e-11
        assert ours.logabsdet == pytest.approx(theirs.logabsdet, rel=1e-11)
        assert ours.num_negative_eigenvalues == theirs.num_negative_eigenvalues


SLOW = ("gpt, tied", "grouped")


@pytest.mark.parametrize("name", ["autoencoder", "binary", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)])
def test_a_damping_for_each_parameter_tensor_and_a_float32_factor(name):
    """Blocks of all kinds. Another damping for a bias than for its weight, and one below 0."""
    model, x, y, loss = tracked(name)
    G, sizes = gauss_newton(model, x, y), [p.numel() for p in model.parameters()]
    dampings = [0.1 * (1 + index % 3) for index in range(len(sizes))]
    dampings[1] = -0.4
    D, v = torch.tensor(dampings, dtype=torch.float64).repeat_interleave(torch.tensor(sizes)), random_vector(len(G))
    A = G + D.diag()
    f = factorize_hessian(model, loss, 0.1, curvature="gauss_newton", route="gram").with_damping(dampings)
    assert f.route == "gram" and relative(A @ f.solve(v, rtol=None) - v, v) <= 1e-10
    assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(A) < 0).sum()) > 0
    assert f.logabsdet == pytest.approx(torch.linalg.slogdet(A).logabsdet.item(), abs=1e-9 * len(A))
    mixed = factorize_hessian(model, loss, 0.1, curvature="gauss_newton", route="gram", precision="mixed")
    A = G + 0.1 * torch.eye(len(G), dtype=torch.float64)
    assert mixed.precision == "mixed" and relative(A @ mixed.solve(v) - v, v) <= 1e-8


def test_operations_are_what_is_counted():
    """And with_damping factors alone. With few samples 'auto' takes this route."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 40), nn.Tanh()
    )
    model = TrackedNetwork(nn.Sequential(*net, nn.Linear(40, 4)).double())
    x, y = random_vector(12, 128).view(12, 2, 8, 8), torch.arange(12) % 4
    loss = model(x, y, track_activations=True)
    f = factorize_hessian(model, loss, 0.1, curvature="gauss_newton")
    assert f.route == "gram"
    counted = counted_operations(lambda: f._system.factor(f._settings, None, False))
    assert counted == pytest.approx(estimate_cost(model, 12, curvature="gauss_newton")["gram"].operations, rel=0.1)
    again = counted_operations(lambda: f.with_damping(0.2))
    assert again == pytest.approx(factor_operations(12 * 3), rel=0.05)


def test_the_root_of_any_convex_loss():
    """Of blocks that interleave, of different ranks, and of sizes far apart: each keeps its digits."""
    A = random_vector(3, 4).view(3, 2, 2)
    small, large = 1e-20 * A @ A.mT, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).expand(3, 2, 2)
    Lambda = torch.zeros(3, 4, 4, dtype=torch.float64)
    Lambda[:, ::2, ::2], Lambda[:, 1::2, 1::2] = small, large
    S = convex_root(Lambda)
    assert S is not None and S.shape == (3, 4, 4)
    found = S @ S.mT
    assert relative(found[:, ::2, ::2] - small, small) <= 1e-14 and relative(found - Lambda, Lambda) <= 1e-14
    assert convex_root(Lambda - 1e-3 * torch.eye(4)) is None
    alone = convex_root(large)
    assert alone is not None and alone.shape == (3, 2, 1)


def test_a_loss_that_is_not_convex_is_refused():
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return torch.sin(outputs - y).sum(1)

    torch.manual_seed(0)
    model = TrackedNetwork(DenselyConnected().double(), loss)
    value = model(random_vector(4, 4), random_vector(4, 3), track_activations=True)
    with pytest.raises(ValueError, match="convex in the outputs: choose another route"):
        factorize_hessian(model, value, 0.1, curvature="gauss_newton", route="gram")
    assert set(estimate_cost(model, 4, curvature="gauss_newton")) == {"sweep", "dense"}
    model = TrackedNetwork(model.net)
    value = model(random_vector(4, 4), torch.arange(4) % 3, track_activations=True)
    with pytest.raises(SingularHessianError, match="rounding of JᵀΛJ is larger than the damping"):
        factorize_hessian(model, value, 1e-20, curvature="gauss_newton", route="gram")


def test_memory_that_is_short_names_this_route(monkeypatch):
    model, _, _, loss = tracked("mixer")
    costs = estimate_cost(model, 3, curvature="gauss_newton")
    assert costs["gram"].bytes < 0.5 * costs["dense"].bytes
    monkeypatch.setattr(network, "free_bytes", lambda device: 0.5 * costs["dense"].bytes)
    with pytest.raises(MemoryError, match="What fits: .*route='gram'"):
        factorize_hessian(model, loss, 0.1, curvature="gauss_newton", route="dense")
    monkeypatch.setattr(network, "free_bytes", lambda device: 0.5 * costs["gram"].bytes)
    with pytest.raises(MemoryError, match="by route='gram' needs"):
        factorize_hessian(model, loss, 0.1, curvature="gauss_newton", route="gram")

"""curvature.py, eigenvalues and minima: counts, eigenpairs, spectra, certificates. Oracle: dense eigenvalues."""

from __future__ import annotations

import copy
import math

import matplotlib
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from _curvature.minimum import Search
from benchmarks.example_networks import EXAMPLES, build
from curvature import (
    eigenpairs,
    eigenvalue_count,
    hessian_operator,
    is_minimum,
    minimize,
    smallest_damping,
    spectrum,
)
from hessian import SingularHessianError, TrackedNetwork, factorize_hessian
from tests.oracles import GRID, Case, dense_hessian, num_parameters, raises, random_vector, relative, tracked_loss

matplotlib.use("Agg")

SMALL = Case((6, 4, 7), 15)
NETWORKS = [
    SMALL,
    Case((4,), 20, "softplus"),
    Case((6, 4, 7), 3, "gelu", bias=False),
    Case((5, 6, 6, 4, 4, 7), 9, "silu", residual=True, loss="mse"),
]
TWENTY = [*NETWORKS, Case((), 20), Case((4,), 2), *(case for case in GRID if case.activation != "relu")][:20]


def tracked_example(name):
    """A TrackedNetwork, its loss, and its dense Hessian by double backward without vmap."""
    example = EXAMPLES[name]
    net, x, y = build(example)
    model = TrackedNetwork(net, example.loss)
    loss = model(x, y, track_activations=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        g = torch.cat([p.flatten() for p in torch.autograd.grad(model(x, y), parameters, create_graph=True)])
        rows = [torch.autograd.grad(x, parameters, retain_graph=True, materialize_grads=True) for x in g]
    return model, loss, torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])


def problems(curvature="hessian"):
    for case in NETWORKS:
        model, loss = tracked_loss(case)
        yield model, loss, dense_hessian(case, curvature)


# -------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("route", ("sweep", "dense"))
def test_operators_are_those_of_scipy(route):
    model, loss = tracked_loss(SMALL)
    H = dense_hessian(SMALL).numpy()
    f = factorize_hessian(model, loss, 0.1, route=route)
    A = H + 0.1 * np.eye(len(H))
    V = random_vector(len(H), 3).numpy()
    for operator, M in (
        (hessian_operator(model, loss), H),
        (f.as_linear_operator(), np.linalg.inv(A)),
        (hessian_operator(model, loss, curvature="gauss_newton"), dense_hessian(SMALL, "gauss_newton").numpy()),
    ):
        assert isinstance(operator, LinearOperator)
        assert operator.shape == H.shape and operator.dtype == np.float64
        scale = np.linalg.norm(M @ V)
        for product in (operator @ V, operator.matmat(V), operator.T @ V, operator.rmatmat(V)):
            assert isinstance(product, np.ndarray) and np.linalg.norm(product - M @ V) <= 1e-9 * scale
        for product in (operator @ V[:, 0], operator.rmatvec(V[:, 0]), operator.matvec(V[:, 0].astype(np.float32))):
            assert product.shape == (len(H),) and np.linalg.norm(product - M @ V[:, 0]) <= 1e-6 * scale
    raises(TypeError, "operator is real", operator.matvec, 1j * V[:, 0])
    values = eigsh(hessian_operator(model, loss), 4, sigma=-0.1, OPinv=f.as_linear_operator(), v0=V[:, 0])[0]
    expected = np.linalg.eigvalsh(H)
    assert np.abs(np.sort(values) - np.sort(expected[np.abs(expected + 0.1).argsort()[:4]])).max() <= 1e-10


def test_an_operator_owns_what_it_needs():
    model, loss = tracked_loss(SMALL)
    operator, v = hessian_operator(model, loss), random_vector(num_parameters(model)).numpy()
    before = operator @ v
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert np.array_equal(operator @ v, before)


# ------------------------------------------------------------------------------------------------ eigenvalues


def test_counts_are_those_of_dense_eigenvalues():
    for model, loss, H in problems():
        values = torch.linalg.eigvalsh(H)
        for a, b in ((-math.inf, -0.01), (-0.01, 0.003), (0.003, 0.1), (0.1, math.inf), (-math.inf, math.inf)):
            assert eigenvalue_count(model, loss, a, b) == int(((a < values) & (values < b)).sum())
    model, loss = tracked_loss(SMALL)
    raises(ValueError, "a must be less than b", eigenvalue_count, model, loss, 1.0, 0.0)
    raises(SingularHessianError, "within rounding of 0", eigenvalue_count, model, loss, -math.inf, 0.0)


@pytest.mark.parametrize("k", (3, pytest.param(20, marks=pytest.mark.slow)))
def test_eigenpairs_are_those_of_a_dense_hessian(k):
    for model, loss, H in problems():
        values, norm = torch.linalg.eigvalsh(H), torch.linalg.matrix_norm(H, 2)
        expected = {"smallest": values[:k], "largest": values[-k:]}
        for which, reference in expected.items():
            found = eigenpairs(model, loss, k, which)
            assert (found.values - reference).abs().max() <= 1e-10 * norm
            assert (found.vectors.mT @ found.vectors - torch.eye(k)).abs().max() <= 1e-8
            assert found.residuals.max() <= 1e-10 * norm
            assert (H @ found.vectors - found.vectors * found.values).norm(dim=0).max() <= 1e-10 * norm
    model, loss = tracked_loss(SMALL)
    values = torch.linalg.eigvalsh(dense_hessian(SMALL))
    near = values[(values - 0.05).abs().argsort()[:k]].sort().values
    assert (eigenpairs(model, loss, k, near=0.05).values - near).abs().max() <= 1e-12


def test_a_missed_eigenvalue_is_an_error(monkeypatch):
    """The inertia knows of it."""
    model, loss = tracked_loss(SMALL)
    from _curvature.counts import EigenPairs, EigenvalueCounts

    def without_one(self, shift, k):
        pairs = found(self, shift, k + 1)
        keep = torch.arange(k + 1) != 1
        return EigenPairs(pairs.values[keep], pairs.vectors[:, keep], pairs.residuals[keep])

    found = EigenvalueCounts._pairs_near
    monkeypatch.setattr(EigenvalueCounts, "_pairs_near", without_one)
    raises(ArithmeticError, "The inertia counts 4 inside", eigenpairs, model, loss, 4, "smallest")


@pytest.mark.parametrize("curvature", ("hessian", "gauss_newton"))
def test_a_spectrum_counts_every_bin(curvature):
    for model, loss, H in problems(curvature):
        values = torch.linalg.eigvalsh(H)
        found = spectrum(model, loss, bins=16, curvature=curvature)
        assert relative(found.eigenvalues - values, values) <= 1e-12
        counted = [
            int(((low <= values) & (values < high)).sum())
            for low, high in zip(found.edges, found.edges[1:], strict=False)
        ]
        assert found.counts.tolist() == counted and found.num_parameters == len(H)


@pytest.mark.slow
def test_counts_of_twenty_networks():
    """Every bin, by inertia alone."""
    for case in TWENTY:
        model, loss = tracked_loss(case)
        values = torch.linalg.eigvalsh(dense_hessian(case))
        found = spectrum(model, loss, bins=5, route="sweep")
        low, high = found.edges[:-1, None], found.edges[1:, None]
        assert torch.equal(found.counts, ((low <= values) & (values < high)).sum(1)) and len(found.counts) >= 5


def test_a_spectrum_by_bisection():
    """The same counts from inertia alone; with few factorizations, in fewer bins."""
    for case in (Case((5, 6, 6, 4, 4, 7), 3), Case((6, 4, 7), 3, "gelu", bias=False)):
        model, loss = tracked_loss(case)
        values = torch.linalg.eigvalsh(dense_hessian(case))
        for most, bins in ((64, 12), (64, [-50.0, -0.1, -1e-3, 1e-3, 0.02, 0.3, 50.0]), (4, 12)):
            found = spectrum(model, loss, bins, route="sweep", max_factorizations=most)
            low, high = found.edges[:-1, None], found.edges[1:, None]
            assert torch.equal(found.counts, ((low <= values) & (values < high)).sum(1))
            assert found.eigenvalues is None
        assert len(found.edges) == 6
        raises(ValueError, "enclose them all", spectrum, model, loss, [0.1, 1e9], route="sweep")


def test_spectra_of_blocks():
    for model, loss, H in ((*tracked_loss(SMALL), dense_hessian(SMALL)), tracked_example("gpt, half frozen")):
        found, start = spectrum(model, loss, by="parameter"), 0
        for name, p in model.named_parameters():
            if p.requires_grad:
                block = slice(start, start + p.numel())
                values = torch.linalg.eigvalsh(H[block, block])
                assert (found.pop(name).eigenvalues - values).abs().max() <= 1e-10 * (1 + values.abs().max())
                start += p.numel()
        assert start == len(H) and not found


def test_any_network():
    for name in ("lenet", "autoencoder"):
        model, loss, H = tracked_example(name)
        values = torch.linalg.eigvalsh(H)
        assert (eigenpairs(model, loss, 2, "smallest").values - values[:2]).abs().max() <= 1e-10 * values.abs().max()
        assert eigenvalue_count(model, loss, 0.02, math.inf) == int((values > 0.02).sum())
        found = spectrum(model, loss, bins=8)
        assert relative(found.eigenvalues - values, values) <= 1e-10 and found.num_parameters == len(H)


def test_a_spectrum_is_drawn_and_printed():
    model, loss = tracked_loss(SMALL)
    found = spectrum(model, loss, bins=8)
    axes = found.plot()
    assert axes.get_xscale() == "symlog" and axes.get_yscale() == "log"
    assert sum(bar.get_height() for bar in axes.patches) == found.num_parameters
    assert repr(found).startswith("Spectrum(P=123, curvature='hessian', ")
    assert found._repr_html_().count("<tr>") == 1 + int((found.counts > 0).sum())
    raises(ValueError, "bins must be at least 1", spectrum, model, loss, 0)
    raises(ValueError, "ascending edges", spectrum, model, loss, [0.0, 0.0])
    raises(ValueError, "unknown by='layer'", spectrum, model, loss, by="layer")


# ---------------------------------------------------------------------------------------------------- minima


def test_the_smallest_damping_is_found_to_one_percent():
    for model, loss, H in problems():
        values = torch.linalg.eigvalsh(H)
        least = max(-float(values[0]), 1e-10 * float(values.abs().max()))
        found = smallest_damping(model, loss)
        assert factorize_hessian(model, loss, found).is_positive_definite
        assert 0.95 * least <= found <= 1.07 * least if least < 1e-8 else least <= found <= 1.01 * least


@pytest.mark.parametrize("start", ("lbfgs", "damped_newton"))
def test_a_minimum_is_certified(start):
    model, x, y = SMALL.build()
    loss = model(x, y, track_activations=True)
    before = is_minimum(model, loss, weight_decay=0.02)
    assert not before and str(before).startswith("Not a minimum: the gradient's norm is ")
    if start == "lbfgs":
        raises(TypeError, "the closure must return the loss", minimize, model, lambda: None)
    found = minimize(model, lambda: model(x, y, track_activations=True), 0.02, start=start)
    assert found and found.gradient_norm <= 1e-10 and str(found).startswith("A minimum: ")
    # the oracles: autograd, and dense eigenvalues
    theta = torch.cat([p.flatten() for p in model.parameters()])
    loss = model(x, y, track_activations=True)
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))]) + 0.02 * theta
    assert abs(float(g.detach().norm()) - found.gradient_norm) <= 1e-13
    P = num_parameters(model)
    H = torch.from_numpy(hessian_operator(model, loss) @ np.eye(P))
    assert abs(float(torch.linalg.eigvalsh(H)[0]) + 0.02 - found.smallest_eigenvalue) <= 1e-10


def test_the_matrix_of_a_round_is_definite():
    """H + (w + λ)I at the start of the round, wherever f was evaluated since."""
    model, x, y = SMALL.build()
    H, one = dense_hessian(SMALL), torch.eye(num_parameters(model), dtype=torch.float64)
    least = -float(torch.linalg.eigvalsh(H)[0]) - 0.02
    search = Search(model, lambda: model(x, y, track_activations=True), 0.02)
    assert least > 0 and search._factorized(0.9 * least) is None
    search(search.point.theta + one[:2])
    v, damping = search.point.gradient, 1.1 * least
    exact = torch.linalg.solve(H + (0.02 + damping) * one, v)
    assert relative(search._factorized(damping).solve(v) - exact, exact) <= 1e-8


def test_a_minimum_of_any_network():
    net, x, y = build(EXAMPLES["densely connected"])
    for start in ("lbfgs", "damped_newton"):
        model = TrackedNetwork(copy.deepcopy(net))
        assert minimize(model, lambda m=model: m(x, y, track_activations=True), 0.05, start=start)
    model = TrackedNetwork(net.float())
    raises(TypeError, "needs float64", minimize, model, lambda: model(x.float(), y, track_activations=True))


@pytest.mark.parametrize("away", (0.0, 1e-8))
def test_a_saddle_is_left(away):
    """All weights 0 is a saddle of a network with two layers. L-BFGS stands still there, and 1e-8 away from it."""
    model, x, y = Case((4,), 20, loss="mse").build()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.layers[-1].bias.copy_(y.mean(0) / (1 + 1e-3 * 3 / 2) + away)
    loss = model(x, y, track_activations=True)
    at_saddle = is_minimum(model, loss, weight_decay=1e-3)
    assert at_saddle.num_negative_eigenvalues > 0
    found = minimize(model, lambda: model(x, y, track_activations=True), 1e-3)
    assert found and model(x, y) < loss - 0.01

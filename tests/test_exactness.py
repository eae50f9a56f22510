"""Products, solves, inertia and determinants against dense matrices: every kind of layer, loss, damping and route."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

import hessian
from _hessian import symmetric_factor
from _hessian.chain import chain_program
from _hessian.elimination import Sweep
from _hessian.layers import LayerDerivatives
from _hessian.many_classes import ManyClassPivot
from _hessian.symmetric_factor import factor_symmetric
from hessian import (
    ACTIVATIONS,
    SingularHessianError,
    compute_layer_derivatives,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)
from tests.oracles import (
    DAMPINGS,
    DEEP,
    GRID,
    Case,
    case_id,
    dense_hessian,
    dense_residual,
    dense_state_form,
    gradient,
    layered,
    num_parameters,
    random_vector,
    relative,
    tracked_loss,
)

QUICK_GRID = [case if index % 8 == 0 else pytest.param(case, marks=pytest.mark.slow) for index, case in enumerate(GRID)]


@pytest.mark.parametrize("case", QUICK_GRID, ids=lambda case: case_id(case))
def test_exact_on_the_grid(case):
    """Products, residuals, inertia and determinant against the dense matrix: both curvatures, both routes, every ε."""
    model, loss = tracked_loss(case)
    size = num_parameters(model)
    v, identity = random_vector(size, 2), torch.eye(size, dtype=torch.float64)
    H = dense_hessian(case)
    assert relative(hessian_vector_product(model, loss, v) - H @ v, H @ v) <= 1e-12
    for curvature in ("hessian", "gauss_newton"):
        H = dense_hessian(case, curvature)
        for damping in DAMPINGS + ((-0.01,) if curvature == "hessian" else ()):
            A = H + damping * identity
            eigenvalues = torch.linalg.eigvalsh(A)
            allowed = max(10 * dense_residual(A, v), 1e-13)
            for route in ("sweep", "dense"):
                f = factorize_hessian(model, loss, damping, curvature=curvature, route=route)
                x = f.solve(v)
                # the oracle's H and the products' H are each rounded once: that difference is no error of the solve
                rounding = relative(A @ x - f._product(x), v)
                assert rounding <= (1e-14 if len(case.hidden) < 10 else 1e-12) * relative(A.norm() * x, v)
                assert relative(A @ x - v, v) <= allowed + 2 * rounding, (curvature, damping, route)
                assert f.route == route
                # an eigenvalue within rounding of 0 may count either way
                sure = eigenvalues.abs() > 1e-13 * eigenvalues.abs().max()
                low = int((eigenvalues[sure] < 0).sum())
                assert low <= f.num_negative_eigenvalues <= low + int((~sure).sum())
                condition = (eigenvalues.abs().max() / eigenvalues.abs()).sum().item()
                error = abs(f.logabsdet - eigenvalues.abs().log().sum().item())
                assert error <= 1e-14 * condition + 1e-12 * size


@pytest.mark.slow
def test_the_grid_is_indefinite():
    """At most points H + εI has negative eigenvalues, so that the grid tests what Cholesky can't do."""
    negative = 0
    for case in GRID:
        model, loss = tracked_loss(case)
        negative += not factorize_hessian(model, loss, 1e-3).is_positive_definite
    assert negative > 0.6 * len(GRID)


@pytest.mark.parametrize("case", GRID[::9], ids=case_id)
def test_products_match_double_backward(case):
    model, loss = tracked_loss(case)
    parameters = list(model.parameters())
    v = random_vector(num_parameters(model))
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = torch.autograd.grad(g @ v, parameters, allow_unused=True)  # a linear model's may not depend on some
    expected = torch.cat(
        [(torch.zeros_like(p) if r is None else r).flatten() for p, r in zip(parameters, rows, strict=True)]
    )
    assert relative(hessian_vector_product(model, loss, v) - expected, expected) <= 1e-12


@pytest.mark.parametrize("case", GRID[::7], ids=case_id)
def test_undamped_on_the_gradient(case):
    """Residual ≤ 1e-8 and the pseudo-inverse's x wherever no eigenvalue lies between 1e-12 and 1e-5 of ‖H‖."""
    model, loss = tracked_loss(case)
    g = gradient(model, loss)
    eigenvalues, vectors = torch.linalg.eigh(dense_hessian(case))
    size = eigenvalues.abs() / eigenvalues.abs().max()
    try:
        x = hessian_inverse_vector_product(model, loss, g)
    except SingularHessianError as error:
        assert ((size > 1e-12) & (size < 1e-5)).any(), "raised though the spectrum has a gap"
        assert "damping=" in str(error)
        return
    assert relative(dense_hessian(case) @ x - g, g) <= 1e-8
    if not ((size > 1e-12) & (size < 1e-5)).any():
        kept = size > 1e-9
        pseudo_inverse = vectors[:, kept] @ ((vectors[:, kept].T @ g) / eigenvalues[kept])
        assert relative(x - pseudo_inverse, pseudo_inverse) <= 1e-6


@pytest.mark.slow
def test_undamped_solves_are_few():
    """One factorization and a dozen sweeps where the spectrum has a gap; deep nets, which have a continuum of tiny
    eigenvalues, are solved too, at a second, smaller shift."""
    direct = hessian.HessianFactorization._direct
    for case, factorizations, sweeps in (
        (Case((6, 4, 7), 3), 1, 12),
        (Case((6, 4, 7), 15), 1, 12),
        (Case((5, 5, 4), 9, residual=True), 1, 12),
        (Case((16, 12, 14), 3, "relu", inputs=10), 1, 12),
        (Case((8,) * 19, 8, residual=True, inputs=8), 2, 160),
        (Case((8, 7) * 14 + (8,), 32, inputs=20, classes=10), 2, 130),
    ):
        model, loss = tracked_loss(case)
        g = gradient(model, loss)
        with mock.patch.object(hessian.HessianFactorization, "_direct", autospec=True, side_effect=direct) as calls:
            x = hessian_inverse_vector_product(model, loss, g)
        assert relative(hessian_vector_product(model, loss, x) - g, g) <= 1e-9
        assert len({id(call.args[0]) for call in calls.call_args_list}) <= factorizations
        assert calls.call_count <= sweeps


def test_undamped_grid_has_gaps():
    """So that the test above checks minimum-norm solutions: some of its cases have the gap."""
    gaps = 0
    for case in GRID[::7]:
        size = torch.linalg.eigvalsh(dense_hessian(case)).abs()
        size = size / size.max()
        gaps += not ((size > 1e-12) & (size < 1e-5)).any()
    assert gaps >= 4


def test_damping_for_each_layer():
    case = Case((6, 4, 7), 3)
    model, loss = tracked_loss(case)
    epsilons = [0.5, 0.01, 2.0, -0.3]
    diagonal = torch.cat(
        [
            torch.full((sum(p.numel() for p in m.parameters()),), e, dtype=torch.float64)
            for m, e in zip(model.layers, epsilons, strict=True)
        ]
    )
    A, v = dense_hessian(case) + torch.diag(diagonal), random_vector(num_parameters(model))
    for route in ("sweep", "dense"):
        f = factorize_hessian(model, loss, epsilons, route=route)
        assert relative(A @ f.solve(v) - v, v) <= 1e-12
        assert f.num_negative_eigenvalues == (torch.linalg.eigvalsh(A) < 0).sum()
        assert f.damping == tuple(epsilons)


STATE_CASES = (
    Case((), 3),  # no hidden layer: nothing to charge
    Case((4,), 20, "softplus"),
    Case((6, 4, 7), 1, bias=False),
    Case((6, 4, 7), 3, "silu", "mse"),
    Case((6, 4, 7), 15, "sigmoid"),
    Case((5, 6, 6, 4, 4, 7), 3, residual=True),
    Case((5, 6, 6, 4, 4, 7), 15, "gelu", "mse", residual=True),
    Case((5, 6, 6, 4, 4, 7), 15, "relu", residual=True, bias=False),
    Case(DEEP, 12),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", STATE_CASES, ids=case_id)
def test_state_damping(case):
    """H + εI + (μ/N) Σ S_ℓᵀS_ℓ against its dense matrix: products, solves, certificates, inertia, determinant."""
    model, loss = tracked_loss(case)
    size = num_parameters(model)
    v, identity, form = random_vector(size, 2), torch.eye(size, dtype=torch.float64), dense_state_form(case)
    for curvature in ("hessian", "gauss_newton"):
        for mu, damping in ((0.3, 1e-2), (20.0, 1e-3), (1e-3, -0.01)):
            H = dense_hessian(case, curvature) + mu * form
            product = hessian_vector_product(model, loss, v, curvature=curvature, state_damping=mu)
            assert relative(product - H @ v, H @ v) <= 1e-12
            A = H + damping * identity
            eigenvalues = torch.linalg.eigvalsh(A)
            for route in ("sweep", "dense"):
                f = factorize_hessian(model, loss, damping, curvature=curvature, route=route, state_damping=mu)
                x = f.solve(v)
                allowed = max(10 * dense_residual(A, v), 1e-14 * relative(A.norm() * x, v))
                assert relative(A @ x - v, v) <= allowed, (curvature, mu, damping, route)
                assert f.residual(x, v).max() <= max(allowed, 1e-8)
                assert f.num_negative_eigenvalues == (eigenvalues < 0).sum()
                condition = (eigenvalues.abs().max() / eigenvalues.abs()).sum().item()
                error = abs(f.logabsdet - eigenvalues.abs().log().sum().item())
                assert error <= 1e-14 * condition + 1e-12 * size
                assert f.state_damping == mu and f"damping={damping}, state_damping={mu:g}" in repr(f)
    assert "state_damping" not in repr(factorize_hessian(model, loss, 1.0))


def test_state_damping_shows_in_errors():
    """A failed solve with a state damping says so, and its advice keeps it."""
    case, mu = Case((6, 4, 7), 3), 2.0
    model, loss = tracked_loss(case)
    v = random_vector(num_parameters(model))
    with pytest.raises(SingularHessianError, match="damping=1e-06, state_damping=2;") as caught:
        factorize_hessian(model, loss, 1e-6, state_damping=mu, route="sweep").solve(v, rtol=1e-11)
    assert "the same state_damping=2 (tried: it reaches" in str(caught.value)
    advised = float(str(caught.value).split("Pass damping=")[1].split(",")[0])
    f = factorize_hessian(model, loss, advised, state_damping=mu)
    assert f.residual(f.solve(v, rtol=1e-11), v) <= 1e-11


def many_class_sweep(layers: tuple[LayerDerivatives, ...], damping: float) -> Sweep:
    program = chain_program(layers, many_classes=True)
    return Sweep(program, {operation.own: damping for operation in program.operations})


@pytest.mark.parametrize("batch", [2, 3, 30])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_many_class_pivot(batch, loss):
    """The structured last pivot against the dense oracle: below and above the width, both signs of damping."""
    for hidden in ((), (6, 4)):
        case = Case(hidden, batch, loss=loss, classes=9, soft=batch == 3)
        model, tracked = tracked_loss(case)
        layers = hessian._checked_derivatives(model, tracked)
        v = random_vector(num_parameters(model), 3)
        for damping in (1.0, 1e-2, 1e-4, -0.003):
            A = dense_hessian(case) + damping * torch.eye(len(v), dtype=torch.float64)
            sweep = many_class_sweep(layers, damping)
            assert isinstance(next(sweep.downward()).pivots[0], ManyClassPivot)
            x = sweep.solve(v)
            assert relative(A @ x - v, v) <= 1e-5
            x = x + sweep.solve(v - A @ x)
            assert relative(A @ x - v, v) <= max(10 * dense_residual(A, v), 1e-13)
            eigenvalues = torch.linalg.eigvalsh(A)
            assert sweep.num_negative == (eigenvalues < 0).sum()
            assert sweep.logabsdet == pytest.approx(eigenvalues.abs().log().sum().item(), rel=1e-9)


def test_many_class_split():
    """Without the zero-sum split Woodbury's identity loses the direction that adds the same row to every class."""
    model, loss = tracked_loss(Case((), 16, classes=40, inputs=20))
    layers = hessian._checked_derivatives(model, loss)
    v = random_vector(num_parameters(model), 1)
    x = many_class_sweep(layers, 1e-6).solve(v)
    assert relative(hessian._product(layers, x) + 1e-6 * x - v, v) <= 1e-6


@pytest.mark.parametrize("growth", [1e3, 1.0, 0.0])
def test_blocks(growth, monkeypatch):
    """Several diagonal blocks, which small nets don't reach otherwise, and pivots from all that is left of them."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 4)
    monkeypatch.setattr(symmetric_factor, "_PIVOT_GROWTH", (0.0, growth))
    for case in (Case((6, 4, 7), 3), Case((5, 5, 4), 9, residual=True)):
        model, loss = tracked_loss(case)
        v = random_vector(num_parameters(model), 3)
        f = factorize_hessian(model, loss, 0.1, route="sweep")
        assert float(f.residual(f.solve(v, rtol=None), v).max()) <= 1e-10
        H = dense_hessian(case)
        assert f.num_negative_eigenvalues == (torch.linalg.eigvalsh(H) < -0.1).sum() > 0


def test_scale_of_the_right_hand_side():
    """Squares of tiny or huge entries under- or overflow: the certificate holds for these too."""
    model, loss = tracked_loss(Case((6, 4, 7), 15))
    f = factorize_hessian(model, loss, 0.1)
    v = random_vector(f.num_parameters)
    x = f.solve(v)
    for scale in (1e-200, 1e200):
        assert relative(f.solve(scale * v) / scale - x, x) <= 1e-12
        assert f.residual(f.solve(scale * v), scale * v) <= 1e-12
        assert f.residual(0 * v, scale * v) == 1
        with pytest.raises(SingularHessianError, match="outside the range"):
            hessian_inverse_vector_product(model, loss, scale * v)
    largest = v * (1.2e308 / v.abs().max())
    f = factorize_hessian(model, loss, 10.0)  # x is not above v
    assert f.residual(0 * v, largest) == 1
    assert relative(f.solve(largest) / 1e308 - f.solve(largest / 1e308), v) <= 1e-12


def test_undamped_answer_has_minimum_norm():
    """Also where rtol lets a part of v outside the range pass, as in a float32 gradient."""
    case = Case((6, 4, 7), 15)
    model, loss = tracked_loss(case)
    eigenvalues, vectors = torch.linalg.eigh(dense_hessian(case))
    kept = eigenvalues.abs() > 1e-9 * eigenvalues.abs().max()
    g = gradient(model, loss)
    outside = vectors[:, ~kept] @ random_vector(int((~kept).sum()))
    for part, rtol in ((1e-9, 1e-8), (1e-7, 1e-6), (1e-5, 1e-4)):
        v = g + part * g.norm() / outside.norm() * outside
        x = hessian_inverse_vector_product(model, loss, v, rtol=rtol)
        expected = vectors[:, kept] @ ((vectors[:, kept].T @ v) / eigenvalues[kept])
        assert relative(x - expected, expected) <= 1e-7


def test_well_fitted_batches_keep_their_digits():
    """λ and Λ where every π_y is nearly 1: against the same in exact arithmetic on the logits' differences."""
    model, x, y = Case((), 6).build()
    with torch.no_grad():
        model.layers[0].weight.mul_(40)
        y = model(x).argmax(1)
    model(x, y, track_activations=True)
    (layer,) = compute_layer_derivatives(model)
    h = model(x).detach().numpy().astype("longdouble")
    import numpy

    e = numpy.exp(h - h.max(1, keepdims=True))
    pi = e / e.sum(1, keepdims=True)
    others = pi.copy()
    others[numpy.arange(6), y.numpy()] = 0
    exact = others / 6
    exact[numpy.arange(6), y.numpy()] = -others.sum(1) / 6
    assert numpy.abs(layer.adjoint.numpy() / exact - 1).max() <= 1e-11
    s = random_vector(6, 3)
    t = s.numpy().astype("longdouble") - s.numpy()[numpy.arange(6), y.numpy()][:, None]
    Lambda_s = pi * (t - (pi * t).sum(1, keepdims=True)) / 6
    assert numpy.abs(layer.output.apply(s).numpy() / Lambda_s - 1).max() <= 1e-9


def test_degenerate_matrices():
    swap = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)  # no 1 × 1 pivot exists
    assert factor_symmetric(swap).num_negative == 1
    assert factor_symmetric(torch.zeros(3, 3, dtype=torch.float64)) is None
    assert factor_symmetric(torch.full((3, 3), math.nan, dtype=torch.float64)) is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_derivatives(activation):
    h = torch.cat([torch.linspace(-45, 45, 181), torch.linspace(-3, 3, 50)]).double().requires_grad_()
    phi = ACTIVATIONS[activation]
    (first,) = torch.autograd.grad(phi.value(h).sum(), h, create_graph=True)
    assert (phi.first(h) - first).abs().max() <= 1e-14
    second = torch.autograd.grad(first.sum(), h)[0] if first.requires_grad else torch.zeros_like(h)
    assert (phi.second(h) - second).abs().max() <= 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("batch", [3, 15])
def test_every_way_to_factor(curvature, batch):
    """Routes, precisions, what is kept, and other dampings give one answer, one inertia and one determinant."""
    case = Case((6, 4, 7), batch, residual=batch == 3)
    model, loss = tracked_loss(case)
    v = random_vector(num_parameters(model), 2)
    H = hessian_vector_product(model, loss, torch.eye(len(v), dtype=torch.float64), curvature=curvature)
    ways = [{"route": "sweep"}, {"route": "sweep", "checkpoint_layers": True}, {"route": "dense"}]
    ways += [{"route": "sweep", "precision": "mixed"}, {"route": "dense", "precision": "mixed"}]
    ways += [{"route": "gram"}] if curvature == "gauss_newton" else []
    for damping in (0.7, -0.0123, (0.1, 0.3, 0.2, 0.4)):
        diagonal = damping if isinstance(damping, float) else layered(model, damping)
        A = H + diagonal * torch.eye(len(v), dtype=torch.float64)
        expected = torch.linalg.solve(A, v)
        for way in ways:
            fresh = factorize_hessian(model, loss, damping, curvature=curvature, **way)
            again = factorize_hessian(model, loss, 0.25, curvature=curvature, **way).with_damping(damping)
            assert torch.equal(fresh.solve(v), again.solve(v))
            assert fresh.damping == again.damping == damping
            for f in (fresh, again):
                assert relative(f.solve(v) - expected, expected) <= 1e-8
                assert f.num_negative_eigenvalues == (torch.linalg.eigvalsh(A) < 0).sum()
                tolerance = 1e-4 if f.precision == "mixed" else 1e-9
                assert f.logabsdet == pytest.approx(torch.linalg.slogdet(A).logabsdet.item(), rel=tolerance)
        counts = factorize_hessian(model, loss, damping, curvature=curvature, route="sweep", keep="inertia")
        assert counts.num_negative_eigenvalues == (torch.linalg.eigvalsh(A) < 0).sum()
        with pytest.raises(ValueError, match="keep='solve'"):
            counts.solve(v)

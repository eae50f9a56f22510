"""Tests of hessian.py: `pytest test_hessian.py -v`, or `python3 test_hessian.py`. Without the long ones: -m "not slow".

Oracles: the dense Hessian by torch.func.hessian, double backward, central differences of the loss, and closed forms;
everything in float64, seeded, hidden widths unequal, batches below and above the widths.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hessian
from _hessian import carried_pivots, costs, symmetric_factor
from _hessian.costs import count_operations, shapes_of_layers
from _hessian.factorization import Settings
from _hessian.refinement import spectral_norm, unit_columns
from _hessian.symmetric_factor import factor_symmetric, mirror, subtract_gram
from hessian import (
    ACTIVATIONS,
    DeepMLPWithTracking,
    SingularHessianError,
    compute_layer_derivatives,
    estimate_cost,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)

HERE = Path(__file__).resolve().parent
DAMPINGS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
DEEP = (3, 5, 4, 6, 3, 4, 7, 5, 3, 6, 4, 5, 3, 7, 4, 6, 5, 3, 4, 6)  # 20 hidden layers, neighbours unequal


class Case(NamedTuple):
    hidden: tuple[int, ...]
    batch: int
    activation: str = "tanh"
    loss: str = "cross_entropy"
    residual: bool = False
    bias: bool = True
    inputs: int = 5
    classes: int = 3
    soft: bool = False  # rows of probabilities as targets

    def build(self, seed: int = 0, scale: float = 1.0) -> tuple[DeepMLPWithTracking, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DeepMLPWithTracking(
                self.inputs,
                self.hidden,
                self.classes,
                len(self.hidden),
                self.activation,
                bias=self.bias,
                residual=self.residual,
                loss=self.loss,
            ).double()
        with torch.no_grad():  # away from the special point of initialization: biases random, weights larger
            for p in model.parameters():
                p.mul_(1.2).add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        x = scale * torch.randn(self.batch, self.inputs, generator=generator, dtype=torch.float64)
        if self.loss == "mse":
            y = torch.randn(self.batch, self.classes, generator=generator, dtype=torch.float64)
        elif self.soft:
            y = torch.rand(self.batch, self.classes, generator=generator, dtype=torch.float64).softmax(1)
        else:
            y = torch.randint(self.classes, (self.batch,), generator=generator)
        return model, x, y


SHAPES = [((), 1), ((), 20), ((4,), 2), ((4,), 20), ((6, 4, 7), 1), ((6, 4, 7), 3), ((6, 4, 7), 15)]
GRID = (
    [Case(h, n, a, bias=b) for a in ACTIVATIONS for h, n in SHAPES[2:] for b in (True, False)]
    + [Case(h, n, loss="mse", bias=b) for h, n in SHAPES for b in (True, False)]
    + [Case(h, n, soft=True) for h, n in SHAPES]
    # skips: around the first layer (5 → 5), and around layers 3 and 5
    + [
        Case((5, 6, 6, 4, 4, 7), n, a, loss, residual=True, bias=n != 3)
        for a in ACTIVATIONS
        for n, loss in ((1, "cross_entropy"), (3, "mse"), (3, "cross_entropy"), (15, "cross_entropy"))
    ]
    + [Case(DEEP, n, a) for n, a in ((1, "tanh"), (2, "gelu"), (12, "tanh"), (12, "relu"))]
    + [Case((5,) + DEEP[1:12] + (5,) * 8, n, residual=True) for n in (2, 9)]
    + [Case((16, 12, 14), n, inputs=10) for n in (3, 9)]
)


def case_id(case: Case) -> str:
    flags = [case.activation, case.loss] + [name for name in ("residual", "soft") if getattr(case, name)]
    return "-".join([*flags, f"L{len(case.hidden) + 1}", f"N{case.batch}"] + ([] if case.bias else ["nobias"]))


def random_vector(size: int, columns: int | None = None, seed: int = 7) -> Tensor:
    shape = (size,) if columns is None else (size, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tracked_loss(case: Case, **kwargs) -> tuple[DeepMLPWithTracking, Tensor]:
    model, x, y = case.build(**kwargs)
    return model, model(x, y, track_activations=True)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def flat_function(model: nn.Module, x: Tensor, *targets: Tensor):
    """θ ↦ model(x, *targets) as a function of the flat parameters, and θ."""
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach() for p in model.parameters()]

    def f(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in parameters])
        views = {n: t.view_as(p) for n, t, p in zip(names, pieces, parameters, strict=True)}
        return torch.func.functional_call(model, views, (x, *targets))

    return f, torch.cat([p.flatten() for p in parameters])


@functools.lru_cache(maxsize=4)
def dense_hessian(case: Case, curvature: str = "hessian") -> Tensor:
    model, x, y = case.build()
    if curvature == "hessian":
        f, theta = flat_function(model, x, y)
        return torch.func.hessian(f)(theta)
    f, theta = flat_function(model, x)
    J = torch.func.jacrev(f)(theta).flatten(0, 1)  # (N C, P)
    in_logits = nn.functional.mse_loss if case.loss == "mse" else nn.functional.cross_entropy
    Lambda = torch.func.hessian(lambda h: in_logits(h, y))(f(theta)).reshape(len(J), len(J))
    return J.T @ Lambda @ J


@functools.lru_cache(maxsize=4)
def dense_state_form(case: Case) -> Tensor:
    """Σ_{ℓ<L} S_ℓᵀS_ℓ / N from the Jacobians of the hidden layers' pre-activations, by torch.func and hooks."""
    model, x, _ = case.build()
    size, hidden = num_parameters(model), []
    for linear in model.layers:
        linear.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    f, theta = flat_function(model, x)

    def pre_activations(theta: Tensor) -> tuple[Tensor, ...]:
        hidden.clear()
        f(theta)
        return tuple(hidden)

    jacobians = torch.func.jacrev(pre_activations)(theta)[:-1]  # (N, a, P) each; the last, of the logits, is left out
    zero = torch.zeros(size, size, dtype=torch.float64)
    return sum((S.flatten(0, 1).T @ S.flatten(0, 1) / case.batch for S in jacobians), zero)


def relative(error: Tensor, reference: Tensor) -> float:
    return (error.norm() / reference.norm()).item()


def dense_residual(A: Tensor, v: Tensor) -> float:
    """The residual of torch.linalg.solve on the dense matrix with one refinement."""
    x = torch.linalg.solve(A, v)
    x = x + torch.linalg.solve(A, v - A @ x)
    return relative(A @ x - v, v)


# ------------------------------------------------------------------------------------------- the promised ten


def test_hessian_inverse_correctness_on_gradient():
    for case in (
        Case((6, 4, 7), 3),
        Case((6, 4, 7), 15),
        Case((4,), 20, "softplus"),
        Case((5, 5, 4), 9, residual=True),
    ):
        model, loss = tracked_loss(case)
        g = gradient(model, loss)
        x = hessian_inverse_vector_product(model, loss, g)
        assert relative(dense_hessian(case) @ x - g, g) <= 1e-8


def test_hessian_inverse_on_random_vector():
    """H x = v has no solution for a general v, which is said; the damped system has one."""
    case = Case((6, 4, 7), 15)
    model, loss = tracked_loss(case)
    v = random_vector(num_parameters(model))
    with pytest.raises(SingularHessianError, match="outside the range") as caught:
        hessian_inverse_vector_product(model, loss, v)
    assert 0.1 < caught.value.residual <= 1 and caught.value.damping == 0.0
    A = dense_hessian(case) + 0.1 * torch.eye(len(v), dtype=torch.float64)
    x = hessian_inverse_vector_product(model, loss, v, damping=0.1)
    assert relative(A @ x - v, v) <= 1e-12
    assert relative(x - torch.linalg.solve(A, v), x) <= 1e-10


def counted_operations(work) -> int:
    """Operations of `work()`: products by torch's counter; factorizations and triangular solves by formulas."""
    aten = torch.ops.aten
    by_torch = {
        aten.linalg_cholesky_ex: lambda shape, *_, out_shape=None, **__: math.prod(shape[:-2]) * shape[-1] ** 3 // 3,
        aten.linalg_solve_triangular: lambda shape, b, *_, out_shape=None, **__: math.prod(b) * shape[-1],
        aten.addmm_: lambda c, a, b, *_, out_shape=None, **__: 2 * math.prod(a) * b[-1],
        aten.baddbmm_: lambda c, a, b, *_, out_shape=None, **__: 2 * math.prod(a) * b[-1],
    }
    formulas = {
        "potrf": lambda G, **_: len(G) ** 3 // 3,
        "sytrf": lambda G, **_: len(G) ** 3 // 3,
        "trsm": lambda _, L, b, **__: b.size * len(L),
        "syconv": lambda *_, **__: 0,
        "laswp": lambda *_, **__: 0,
    }
    kernel, count = symmetric_factor._lapack, 0

    def counting(name, like):
        def call(*args, **kwargs):
            nonlocal count
            count += formulas[name](*args, **kwargs)
            return kernel(name, like)(*args, **kwargs)

        return call

    with (
        mock.patch.object(symmetric_factor, "_lapack", counting),
        FlopCounterMode(display=False, custom_mapping=by_torch) as counter,
    ):
        work()
    return counter.get_total_flops() + count


def operations_at_depth(num_layers: int, batch: int = 5, width: int = 7, damping: float = 1e6) -> int:
    model, loss = tracked_loss(Case((width,) * (num_layers - 1), batch, inputs=width))
    v = random_vector(num_parameters(model))

    def work():
        factorization = factorize_hessian(model, loss, damping, route="sweep")
        assert factorization.is_positive_definite  # otherwise a failed Cholesky would be counted as a whole one
        factorization.solve(v, rtol=None)

    with mock.patch.object(symmetric_factor, "BLOCK", 1):  # small beside the matrices, as it is in large nets
        return counted_operations(work)


@pytest.mark.parametrize("num_layers", [2, 4, 8, 12])
def test_computational_cost_per_depth(num_layers):
    """One more hidden layer costs m³/3 + m²n + m n² (factor, whiten the coupling, update half), plus the
    structured products; so the O(m³) step is counted, and depth L costs (L − 2) hidden layers and two ends."""
    N, a, r = 5, 7, 5  # N < a + 1 inputs: pivots of size m = a r = a N = n
    d, m, n = a + 1, a * r, N * a
    cubic = m**3 // 3 + m * m * n + m * n * n + m * m + 2 * m * n  # the last two: blocks of size 1
    forming = 2 * r * n * n + 2 * r * m * n  # JᵀK, JᵀKJ
    forming += 2 * a * n * n + 2 * a * n * n + 2 * r * n * n  # KA, AᵀKA, JᵀKA
    forming += 2 * N * N * a + 2 * r * a * a  # λλᵀ, QQᵀ
    forming += 6 * N * a**3  # the natural size of the cost-to-go
    derivatives = 4 * N * a * a  # forward and backward pass
    sweeps = 4 * m * n + 2 * m * m  # B t, Bᵀy; F⁻¹, F⁻ᵀ
    sweeps += 2 * N * a * a * 3 + 2 * N * a * d  # pW, λ(V − VQQᵀ), λᵀt; z̃Xᵀ
    sweeps += 2 * a * d * r * 5 + 2 * N * r * a + 2 * N * a * a  # V Q and back, Y Qᵀ, X⊥; Rᵀ(φ′p); tWᵀ
    layer = operations_at_depth(num_layers + 1) - operations_at_depth(num_layers)
    assert cubic > 0.45 * layer
    assert layer == pytest.approx(cubic + forming + derivatives + sweeps, rel=0.02)


@pytest.mark.slow
def test_scaling_is_linear():
    """Operations and kept bytes are affine in the number of layers, to the last digit; the peak of memory follows."""
    operations = [operations_at_depth(L) for L in (8, 16, 24, 32, 40, 48, 56, 64)]
    assert len({b - a for a, b in zip(operations, operations[1:], strict=False)}) == 1
    kept = []
    for num_layers in (8, 16, 32, 64):
        model, loss = tracked_loss(Case((7,) * (num_layers - 1), 5, inputs=7))
        kept.append(reachable_bytes(factorize_hessian(model, loss, 1e6, route="sweep")))
    assert kept[1] - kept[0] == (kept[2] - kept[1]) / 2 == (kept[3] - kept[2]) / 4
    low, middle, high = (peak_bytes(num_layers) for num_layers in (40, 80, 120))
    assert 0 < high - middle <= 1.3 * (middle - low)  # quadratic growth: 1.67


def reachable_bytes(*roots) -> int:
    """Bytes of all tensor storages that can be reached from the objects, each counted once."""
    storages, stack = {}, list(roots)
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif dataclasses.is_dataclass(item):
            stack += [getattr(item, field.name) for field in dataclasses.fields(item)]
        elif isinstance(item, (list, tuple)):
            stack += item
        elif isinstance(item, hessian._Sweep):
            stack += vars(item).values()
    return sum(storages.values())


def peak_bytes(num_layers: int) -> int:
    """Peak resident memory of a fresh process that factors and solves at width 32, N = 16."""
    code = (
        "import resource, torch; torch.set_num_threads(1); from test_hessian import *\n"
        f"model, loss = tracked_loss(Case((32,) * {num_layers - 1}, 16, inputs=32))\n"
        "factorize_hessian(model, loss, 0.1, route='sweep').solve(random_vector(num_parameters(model)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"
    )
    # glibc: give freed arrays back at once, or the peak measures fragmentation
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, cwd=HERE, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
def test_numerical_stability_at_scale(scale):
    """Loss, ε and v scaled together leave x unchanged. And the inputs scaled. Both as accurate as a dense solve."""
    case = Case((6, 4, 7), 15, loss="mse")
    model, x, y = case.build()
    v = random_vector(num_parameters(model))
    reference = factorize_hessian(model, model(x, y, track_activations=True), 0.1).solve(v)
    H = dense_hessian(case)
    # a loss scaled by `scale` has the same derivatives times it, in the layers' adjoints, curvatures and Λ
    layers = [
        layer._replace(
            adjoint=scale * layer.adjoint,
            curvature=scale * layer.curvature,
            output=layer.output and layer.output._replace(diagonal=scale * layer.output.diagonal),
        )
        for layer in compute_layer_derivatives(model)
    ]
    for route in ("sweep", "dense"):
        scaled = hessian._factorize(tuple(layers), Settings((0.1 * scale,) * 4, route=route))
        assert relative(scaled.solve(scale * v) - reference, reference) <= 1e-10
        A = scale * (H + 0.1 * torch.eye(len(v), dtype=torch.float64))
        assert relative(A @ scaled.solve(v) - v, v) <= max(10 * dense_residual(A, v), 1e-13)
    for loss in ("cross_entropy", "mse"):
        model, x, y = case._replace(loss=loss).build(scale=scale)
        f, theta = flat_function(model, x, y)
        H = torch.func.hessian(f)(theta)
        A = H + 0.1 * torch.eye(len(v), dtype=torch.float64)
        for route in ("sweep", "dense"):
            solved = factorize_hessian(model, model(x, y, track_activations=True), 0.1, route=route).solve(v)
            assert relative(A @ solved - v, v) <= max(10 * dense_residual(A, v), 1e-13)


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("case", GRID, ids=case_id)
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
            sweep = hessian._Sweep(layers, [damping] * len(layers), None, True)
            assert isinstance(next(sweep.downward()), hessian.ManyClassPivot)
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
    x = hessian._Sweep(layers, [1e-6], None, True).solve(v)
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


@pytest.mark.parametrize("block, growth", [(128, 1e3), (7, 1.0), (7, 0.1), (1, 1.0)])
def test_symmetric_factor(block, growth, monkeypatch):
    """G = F Σ Fᵀ with interchanges, 2 × 2 pivots and blocks, against eigenvalues; an exactly singular G gives None."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", block)
    monkeypatch.setattr(symmetric_factor, "_PIVOT_GROWTH", (growth, growth))
    for m in (1, 2, 3, 17, 64, 129):
        M = random_vector(m, m, seed=m)
        for G in (M + M.T, M @ M.T, -(M @ M.T), torch.block_diag(M @ M.T, -M - M.T)):
            factor = factor_symmetric(G.clone())
            white = factor.whiten(torch.eye(len(G), dtype=G.dtype))  # F⁻¹
            signs = torch.ones(len(G), 1).double() if factor.signs is None else factor.signs
            rebuilt = white @ G @ white.mT - torch.diag(signs[:, 0])
            inverse = factor.solve(torch.eye(len(G), dtype=G.dtype))
            eigenvalues = torch.linalg.eigvalsh(G)
            condition = (eigenvalues.abs().max() / eigenvalues.abs().min()).item()
            assert rebuilt.abs().max() <= 1e-14 * condition * m
            vectors = factor.whiten_vectors(torch.eye(len(G), dtype=G.dtype)).mT
            assert relative(vectors - white, white) <= 1e-13 * condition
            assert relative(G @ inverse - torch.eye(len(G), dtype=G.dtype), G) <= 1e-13 * condition
            assert factor.num_negative == (eigenvalues < 0).sum() == (signs < 0).sum()
            assert factor.logabsdet == pytest.approx(eigenvalues.abs().log().sum().item(), abs=1e-13 * condition)
            assert (factor_symmetric(G.clone(), definite_only=True) is None) == bool((eigenvalues < 0).any())


def test_blocks_that_are_nearly_singular_are_not_eliminated_alone(monkeypatch):
    """[[δ, B], [Bᵀ, 0]]: no eigenvalue is small, but a block's own pivots are δ, whose elimination adds BᵀB/δ."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 4)
    B = torch.linalg.qr(random_vector(12, 12)).Q
    for delta in (0.0, 1e-14, -1e-14):
        G = torch.zeros(24, 24, dtype=torch.float64)
        G[:12, 12:], G[12:, :12] = B, B.T
        G[:12, :12].diagonal().fill_(delta)
        v = random_vector(24, 2)
        factor = factor_symmetric(G.clone())
        assert factor.num_negative == 12
        assert relative(G @ factor.solve(v) - v, v) <= 1e-14


@pytest.mark.parametrize("n", [3, 128, 129, 300])
def test_cost_to_go_is_symmetric(n):
    """P − WᵀΣW, to the bit where P has blocks: what is not symmetric would grow from layer to layer."""
    P, W, signs = random_vector(n, n), random_vector(17, n, seed=1), random_vector(17, 1, seed=2).sign()
    P = P + P.mT
    expected = P - W.mT @ (signs * W)
    rounded = P + 1e-15 * random_vector(n, n, seed=3)
    signed = subtract_gram(rounded, W.clone(), signs)
    mirror(rounded)
    assert relative(signed - signs * W, W) == 0
    assert relative(rounded - expected, expected) <= 1e-14
    assert n <= 128 or torch.equal(rounded, rounded.mT)


def test_one_block_with_interchanges(monkeypatch):
    """A row more than a block, the last of them in a 2 × 2 pivot, and no pivot in the block alone: one block, whose
    rows are not in order."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 4)
    found = 0
    for seed in range(40):
        G = random_vector(5, 5, seed=seed)
        G = G + G.mT
        G[0, :4] = G[:4, 0] = 0.0
        G[0, 4] = G[4, 0] = 1.0
        factor = factor_symmetric(G.clone())
        found += factor.edges == [0, 5] and factor.order is not None
        v = random_vector(5, 3)
        assert relative(G @ factor.solve(v) - v, v) <= 1e-11
        white = factor.whiten(v.clone())
        assert relative(factor.whiten_vectors(v.mT.clone()).mT - white, white) <= 1e-11
        assert relative(white.mT @ factor.sign(white.mT.clone()).mT - v.mT @ factor.solve(v), v) <= 1e-9
    assert found > 0


@pytest.mark.parametrize("block", [1, 4, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interchanges_are_those_of_lapack(block, dtype, monkeypatch):
    """L, its rows in order, and D's off-diagonals: bit for bit what LAPACK's syconv makes of the same factor."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", block)
    for m, diagonal in ((2, 0.0), (33, 1.0), (64, 0.0), (65, 3.0)):
        G = random_vector(m, m, seed=m).to(dtype)
        G = G + G.mT
        G.diagonal().mul_(diagonal)  # 0: many pivots are 2 × 2
        sytrf, syconv = (symmetric_factor._lapack(name, G.numpy()) for name in ("sytrf", "syconv"))
        packed, pivots, _ = sytrf(G.numpy(), lower=1)
        expected, below, _ = syconv(packed, pivots, lower=1, way=0)
        first = (pivots < 0).nonzero()[0][::2]
        interchanges = abs(pivots) - 1
        interchanges[first] = first
        lower = packed.copy(order="F")
        found = symmetric_factor._converted(lower, first, interchanges)
        assert len(first) > m // 8 or diagonal
        assert (found == below).all() and (torch.tensor(lower - expected).tril() == 0).all()


def test_float32_factor_is_as_good_as_lu():
    """Backward error of the blocks' explicit inverses at a thousand rows, where float32 has no digits to lose."""
    M = random_vector(1024, 1024)
    G, v = M + M.mT, random_vector(1024, 4, seed=1)
    low = factor_symmetric(G.float()).solve(v.float()).double()
    lu = torch.linalg.solve(G.float(), v.float()).double()
    ours, theirs = (torch.linalg.norm(G @ x - v) / torch.linalg.norm(x) for x in (low, lu))
    assert ours <= 3 * theirs


def test_growth_is_allowed_where_the_damping_hides_its_rounding(monkeypatch):
    """The same matrix with blocks, and at a small damping with pivots from all of it."""
    monkeypatch.setattr(symmetric_factor, "BLOCK", 8)
    M = random_vector(32, 32)
    assert factor_symmetric(M + M.T, 1.0).order is None
    assert factor_symmetric(M + M.T, 1e-8).order is not None


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


def test_degenerate_matrices():
    swap = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)  # no 1 × 1 pivot exists
    assert factor_symmetric(swap).num_negative == 1
    assert factor_symmetric(torch.zeros(3, 3, dtype=torch.float64)) is None
    assert factor_symmetric(torch.full((3, 3), math.nan, dtype=torch.float64)) is None


def test_matches_central_differences_of_the_loss():
    """An oracle without any automatic differentiation: ⟨v, H v⟩ by differences of the loss."""
    model, x, y = Case((6, 4, 7), 15, residual=True).build()
    f, theta = flat_function(model, x, y)
    v = random_vector(len(theta)) / len(theta) ** 0.5
    h = 5e-3
    points = [f(theta + k * h * v).item() for k in (-2, -1, 0, 1, 2)]
    second = (-points[0] + 16 * points[1] - 30 * points[2] + 16 * points[3] - points[4]) / (12 * h * h)
    loss = model(x, y, track_activations=True)
    assert (v @ hessian_vector_product(model, loss, v)).item() == pytest.approx(second, rel=1e-6)


# ---------------------------------------------------------------------------------------------- the interface


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


def test_routes_are_chosen_by_counted_operations():
    """Few parameters and many samples: dense; few samples: sweep. The counts are those of torch's counter."""
    for case, route in ((Case((6, 4, 7), 200), "dense"), (Case((16, 12, 14), 3, inputs=10), "sweep")):
        model, loss = tracked_loss(case)
        assert factorize_hessian(model, loss, 0.1).route == route
        layers = hessian._checked_derivatives(model, loss)
        estimate = count_operations(shapes_of_layers(layers), case.batch)
        for name in ("sweep", "dense"):
            epsilons = (1e3,) * len(layers)  # positive definite: no failed Cholesky is counted
            counted = counted_operations(
                lambda n=name, e=epsilons, x=layers: hessian._factorize(x, Settings(e, route=n))
            )
            assert estimate[name] == pytest.approx(counted, rel=0.15), name


def test_indefinite_layers_cost_one_more_factorization():
    """A failed Cholesky of a diagonal block, m³/3 at most in each layer, as counted here."""
    model, loss = tracked_loss(Case((7,) * 7, 5, inputs=7))
    assert not factorize_hessian(model, loss, 1e-3, route="sweep").is_positive_definite
    indefinite = counted_operations(lambda: factorize_hessian(model, loss, 1e-3, route="sweep"))
    definite = counted_operations(lambda: factorize_hessian(model, loss, 1e6, route="sweep"))
    assert definite < indefinite <= definite + 8 * (7 * 5) ** 3 // 3


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_derivatives(activation):
    h = torch.cat([torch.linspace(-45, 45, 181), torch.linspace(-3, 3, 50)]).double().requires_grad_()
    phi = ACTIVATIONS[activation]
    (first,) = torch.autograd.grad(phi.value(h).sum(), h, create_graph=True)
    assert (phi.first(h) - first).abs().max() <= 1e-14
    second = torch.autograd.grad(first.sum(), h)[0] if first.requires_grad else torch.zeros_like(h)
    assert (phi.second(h) - second).abs().max() <= 1e-14


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
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


def test_promised_loop():
    """The loop of the documentation, at its sizes, as written: three batches of N = 8, default float32 model."""
    torch.manual_seed(0)
    model = DeepMLPWithTracking(input_dim=784, hidden_dim=128, num_classes=10, num_hidden_layers=19, activation="tanh")
    assert len(model.layers) == 20
    dataloader = [(torch.randn(8, 1, 28, 28), torch.randint(10, (8,))) for _ in range(3)]
    for x, y in dataloader:
        model.zero_grad()
        loss = model(x, y, track_activations=True)
        loss.backward(create_graph=True)
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        try:
            step = hessian_inverse_vector_product(model, loss, grad)
        except SingularHessianError as error:
            assert isinstance(error, Exception)  # so that the handlers of older code, however wide, still catch it
            damping = float(str(error).split("damping=")[1].split(" ")[0])
            step = hessian_inverse_vector_product(model, loss, grad, damping=damping)
        else:
            damping = 0.0
        assert step.shape == grad.shape and not step.requires_grad
        back = hessian_vector_product(model, loss, step.double()) + damping * step.double()
        # certified in float64, then rounded to float32: 2⁻²⁴ ‖H + εI‖ ‖x‖
        norm = spectral_norm(lambda u, m=model, n=loss: hessian_vector_product(m, n, u), step) + damping
        assert (back - grad.detach().double()).norm() <= 2**-23 * norm * step.norm() + 1e-8 * grad.detach().norm()


# ------------------------------------------------------------------------------------------------ wrong input


def raises(kind, match, function, *args, **kwargs):
    with pytest.raises(kind, match=match):
        function(*args, **kwargs)


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


def test_refinement_is_needed_and_certified():
    """Few samples, small damping: a direct sweep loses its digits to pivots near 0; the certified solve has them."""
    case = Case((16, 12, 14), 3, inputs=10)
    model, loss = tracked_loss(case)
    v = random_vector(num_parameters(model))
    for damping in (1e-4, 1e-6):
        f = factorize_hessian(model, loss, damping, route="sweep")
        direct, certified = f.residual(f.solve(v, rtol=None), v), f.residual(f.solve(v), v)
        A = dense_hessian(case) + damping * torch.eye(len(v), dtype=torch.float64)
        assert direct > 1.5 * certified
        assert certified <= max(10 * dense_residual(A, v), 1e-13)


# ------------------------------------------------------------------------------ small damping, precision, memory

REACH = (
    Case((6, 4, 7), 3),
    Case((6, 4, 7), 15),
    Case((5, 5, 4), 2, residual=True),
    Case((16, 12, 14), 3, inputs=10),
    Case((8, 7) * 14, 32, inputs=20),
    Case((8, 7) * 14, 4, inputs=20),
    Case((8,) * 29, 5, residual=True, inputs=8),
)


UNCARRIED = Case((16, 12, 14), 3, "relu", inputs=10)  # a net that the sweep fails on at 1e-8 without carried pivots
REACH += (UNCARRIED, Case((20,) * 9, 5, "relu", inputs=20, classes=10))


@pytest.mark.parametrize(
    "case", REACH, ids=lambda case: f"{len(case.hidden)}x{case.hidden[0]}-{case.batch}-{case.activation}"
)
def test_reach(case):
    """ε from 10 to 1e-8: the residual is that of a dense LU with one refinement, inertia and determinant are exact."""
    model, loss = tracked_loss(case)
    v = random_vector(num_parameters(model))
    H = hessian_vector_product(model, loss, torch.eye(len(v), dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh((H + H.T) / 2)
    f = factorize_hessian(model, loss, 1.0, route="sweep")
    for damping in (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        A = H + damping * torch.eye(len(v), dtype=torch.float64)
        f = f.with_damping(damping)
        expected = max(dense_residual(A, v), 1e-15)
        assert f.residual(f.solve(v, rtol=max(10 * expected, 1e-12)), v) <= max(10 * expected, 1e-12)
        assert f.num_negative_eigenvalues == (eigenvalues < -damping).sum()
        assert f.logabsdet == pytest.approx(torch.linalg.slogdet(A).logabsdet.item(), rel=1e-6)


@pytest.mark.parametrize("batch, residual", [(15, False), (3, False), (3, True)])
def test_natural_scales(batch, residual):
    """Against second derivatives of each sample's loss in z_{ℓ-1}, and the couplings' curvatures c_j ‖t_{j-1}‖²/2."""
    model, x, y = Case((6, 4, 4, 7), batch, residual=residual).build()
    model(x, y, track_activations=True)
    layers = compute_layer_derivatives(model)
    formed = carried_pivots.prepare(layers)
    pairs = list(zip(layers, formed.reduced, strict=True))
    couplings = [(layer.adjoint.abs().max() / reduced.rows.abs().max()).item() for layer, reduced in pairs]
    assert formed.scales[0] == 0.0
    for index in range(1, len(layers)):

        def states(z: Tensor, index: int = index) -> list[Tensor]:
            """z_{ℓ-1} and those that follow from it, the logits last."""
            found = [z]
            for j in range(index, len(layers)):
                h = model.layers[j](found[-1])
                found.append(h if j == len(layers) - 1 else model.activate(j, h, found[-1]))
            return found

        largest = 0.0
        for row, label in zip(layers[index].inputs[:, : layers[index].weight.shape[1]], y, strict=True):
            P = torch.func.hessian(lambda z, label=label: -torch.log_softmax(states(z)[-1], 0)[label] / batch)(row)
            for j, J in enumerate(torch.func.jacrev(lambda z: states(z)[:-1])(row)):
                P = P + couplings[index + j] * J.mT @ J
            largest = max(largest, P.abs().max().item())
        assert formed.scales[index] == pytest.approx(largest, rel=1e-10)
        assert formed.couplings[index] == pytest.approx(layers[index].adjoint.norm().item(), rel=1e-12)


def test_carried_pivots_are_needed():
    """Without them the sweep loses everything at ε = 1e-8 where there are fewer samples than units; both kinds are
    carried, rows of pivots and parts of X⊥, and nothing is at ordinary dampings."""
    model, loss = tracked_loss(UNCARRIED)
    v = random_vector(num_parameters(model))
    H = hessian_vector_product(model, loss, torch.eye(len(v), dtype=torch.float64))
    negative = int((torch.linalg.eigvalsh((H + H.T) / 2) < -1e-8).sum())
    with mock.patch.object(carried_pivots, "_GROWTH", math.inf):
        plain = factorize_hessian(model, loss, 1e-8, route="sweep")
    with pytest.raises(SingularHessianError):
        plain.solve(v, rtol=1e-2)
    f = factorize_hessian(model, loss, 1e-8, route="sweep")
    f.solve(v, rtol=1e-7)
    assert f.num_negative_eigenvalues == negative != plain.num_negative_eigenvalues
    carried = [pivot.carried for pivot in f._factor.downward() if pivot.carried is not None]
    assert any(len(c.rows) for c in carried) and any(c.left is not None for c in carried)
    ordinary = factorize_hessian(model, loss, 0.1, route="sweep")
    assert all(pivot.carried is None for pivot in ordinary._factor.downward())


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


def layered(model: DeepMLPWithTracking, damping: tuple[float, ...]) -> Tensor:
    """Each parameter's damping."""
    pairs = zip(model.layers, damping, strict=True)
    return torch.cat([torch.full((num_parameters(linear),), e, dtype=torch.float64) for linear, e in pairs])


def test_another_damping_costs_what_depends_on_it():
    """No derivatives, QR or natural sizes again for a sweep; for the dense and the Gram route a factorization alone."""
    case = Case((7,) * 7, 5, inputs=7)
    model, loss = tracked_loss(case)
    for route, curvature, size in (("dense", "hessian", num_parameters(model)), ("gram", "gauss_newton", 2 * 5)):
        f = factorize_hessian(model, loss, 1e6, route=route, curvature=curvature)
        again = counted_operations(lambda f=f: f.with_damping(1e5))
        assert again == pytest.approx(costs.factor_operations(size), rel=0.05)
    f = factorize_hessian(model, loss, 1e6, route="sweep")
    with mock.patch.object(torch.linalg, "qr", side_effect=AssertionError):
        again = counted_operations(lambda: f.with_damping(1e5))
    fresh = counted_operations(lambda: factorize_hessian(model, loss, 1e5, route="sweep"))
    natural = 6 * 5 * 7**3 * 6  # hidden layers above the first
    assert again < fresh - natural


def test_mixed_precision_is_decided_by_a_trial():
    """float32 where that can be refined, float64 where not; an rtol that is missed names precision='float64'."""
    model, loss = tracked_loss(Case((16, 12, 14), 3, inputs=10))
    direct = hessian.HessianFactorization._direct
    with mock.patch.object(hessian.HessianFactorization, "_direct", autospec=True, side_effect=direct) as trial:
        factorize_hessian(model, loss, 10.0, precision="mixed")
    assert trial.call_count == 1  # where it is clear, the trial is short
    v = random_vector(num_parameters(model))
    probe = torch.randn(len(v), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for damping in (1e-3, 1e-8):  # where it is not, it is as long as it takes
        solved = []
        spy = mock.patch.object(
            hessian.HessianFactorization, "_direct", lambda self, v, s=solved: s.append(direct(self, v)) or s[-1]
        )
        with spy:
            f = factorize_hessian(model, loss, damping, route="sweep", precision="mixed")
        first = f.residual(solved[0], unit_columns(probe)[0]).item()
        assert (len(solved) == 1) == (first <= 0.1), (damping, first)
        assert (first > 0.1) == (damping == 1e-8)
    kept = factorize_hessian(model, loss, 0.1, route="sweep", precision="mixed")
    assert kept.precision == "mixed" and kept._factor.layers[0].weight.dtype == torch.float32
    assert kept.residual(kept.solve(v, rtol=1e-12), v) <= 1e-12 < 1e-8 < kept.residual(kept.solve(v, rtol=None), v)
    with mock.patch.object(hessian.HessianFactorization, "_direct", autospec=True, side_effect=direct) as sweeps:
        loose = [kept.residual(kept.solve(v, rtol=rtol), v) for rtol in (1e-3, 1e-8)]
        calls = sweeps.call_count
        kept.solve(v, rtol=1e-12)
    assert loose[0] <= 1e-3 and loose[1] <= 1e-8
    assert calls < 2 * (sweeps.call_count - calls)  # no more steps than rtol needs
    redone = factorize_hessian(model, loss, 1e-8, route="sweep", precision="mixed")
    assert redone.precision == "float64"
    # what overflows in float32
    layers = tuple(x._replace(weight=1e30 * x.weight) for x in compute_layer_derivatives(model))
    assert hessian._factorize(layers, Settings(0.1, route="sweep", precision="mixed")).precision == "float64"
    with mock.patch.object(hessian.HessianFactorization, "_float32_suffices", lambda self: True):
        poor = factorize_hessian(model, loss, 1e-8, route="sweep", precision="mixed")
    with pytest.raises(SingularHessianError, match="precision='float64'"):
        poor.solve(v, rtol=1e-6)
    exact = factorize_hessian(model, loss, 0.1, route="sweep")
    assert reachable_bytes(kept._factor) <= 0.55 * reachable_bytes(exact._factor)


@pytest.mark.parametrize("batch", [3, 12])
def test_checkpointed_layers(batch):
    """The bits of the kept factorization, from every √L-th cost-to-go; three times its operations for a direct solve,
    two more for each refinement."""
    model, loss = tracked_loss(Case((8,) * 24, batch, residual=True, inputs=8))
    v = random_vector(num_parameters(model))
    for damping in (1e4, 0.1, 1e-7):
        kept, checkpointed = (
            factorize_hessian(model, loss, damping, route="sweep", checkpoint_layers=c) for c in (False, True)
        )
        assert torch.equal(kept.solve(v, rtol=None), checkpointed.solve(v, rtol=None))
        assert kept.logabsdet == checkpointed.logabsdet
        if damping == 1e4:
            segments = checkpointed._factor._checkpoints.segments
            assert len(segments) == 5
            assert reachable_bytes(*segments.values()) < 0.4 * reachable_bytes(kept._factor)
            once = counted_operations(lambda: factorize_hessian(model, loss, 1e4, route="sweep"))  # noqa: B023
            direct = counted_operations(lambda f=checkpointed: f.solve(v, rtol=None))
            assert direct <= 2.05 * once


def test_costs_are_estimated_within_ten_percent():
    """Operations against those counted, of every route."""
    cases = (
        Case((32, 32, 32), 8, inputs=32, classes=10),
        Case((24,) * 4, 30, residual=True, inputs=24),
        Case((40, 30), 64, inputs=12, classes=5),
    )
    for case in cases:
        model, loss = tracked_loss(case)
        for curvature in ("hessian", "gauss_newton"):
            estimates = estimate_cost(model, case.batch, curvature=curvature)
            assert set(estimates) == {"sweep", "dense"} | ({"gram"} if curvature == "gauss_newton" else set())
            for route, estimate in estimates.items():
                if route == "dense" and num_parameters(model) > 3000:
                    continue
                counted = counted_operations(
                    lambda r=route, c=curvature, m=model, x=loss: factorize_hessian(m, x, 1e3, route=r, curvature=c)
                )
                assert estimate.operations == pytest.approx(counted, rel=0.1), (case, curvature, route)


ESTIMATED = (
    {"route": "sweep"},
    {"route": "sweep", "keep": "inertia"},
    {"route": "sweep", "precision": "mixed"},
    {"route": "sweep", "checkpoint_layers": True},
    {"route": "sweep", "checkpoint_layers": True, "widths": [*range(48, 16, -2)]},
    {"route": "dense"},
    {"route": "gram", "curvature": "gauss_newton"},
)


@pytest.mark.slow
@pytest.mark.parametrize("way", ESTIMATED, ids=lambda way: "-".join(map(str, way.values()))[:30])
def test_bytes_are_estimated_within_ten_percent(way):
    """Peak resident memory of a fresh process above the same process before it factors."""
    way = dict(way)
    sizes = "60, 50, 10, 2" if way["route"] == "dense" else "32, 32, 10, 15"
    if "widths" in way:
        sizes = f"32, {way['widths']}, 10, {len(way.pop('widths'))}"
    warm_up = "32, 32, 10, 2" if way["route"] == "sweep" else "20, 20, 10, 1"
    batch = {"dense": 400, "gram": 300, "sweep": 32}[way["route"]]
    code = f"""
import torch
from hessian import *
torch.set_num_threads(1)
torch.manual_seed(0)
def peak(name):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(name)).split()[1])
def factor(*sizes, batch, **way):
    model = DeepMLPWithTracking(*sizes).double()
    x, y = torch.randn(batch, model.input_dim).double(), torch.randint(model.num_classes, (batch,))
    loss = model(x, y, track_activations=True)
    f = factorize_hessian(model, loss, 10.0, **way)  # nothing is carried
    if f.keep == "solve":
        f.solve(torch.randn(f.num_parameters).double(), rtol=None)
    return model
factor({warm_up}, batch={batch}, **{way!r})  # what is loaded and set up once
before = peak("VmRSS")
model = factor({sizes}, batch={batch}, **{way!r})
way = {way!r}
route = way.pop("route")
print(peak("VmHWM") - before, estimate_cost(model, {batch}, **way)[route].bytes)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(float, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.1), (measured / 1e6, estimated / 1e6)


def test_a_wide_input_stays_small():
    """150,528 pixels: nothing of that size squared, which no machine holds."""
    model = DeepMLPWithTracking(150_528, 4, 3, 2).double()
    loss = model(random_vector(2, 150_528), torch.tensor([0, 2]), track_activations=True)
    f = factorize_hessian(model, loss, 0.1, route="sweep")
    v = random_vector(f.num_parameters)
    assert f.residual(f.solve(v), v) <= 1e-10
    assert estimate_cost(model, 2)["sweep"].bytes < 2e7


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
            hessian._factorize(layers, Settings(0.1, route=route, keep=keep))


def test_errors_of_trials_do_not_hide_the_error(monkeypatch):
    """Where the trials that look for advice don't fit in memory, the failed solve is reported all the same."""
    model, loss = tracked_loss(UNCARRIED)
    v = random_vector(num_parameters(model))
    f = factorize_hessian(model, loss, 1e-8, route="sweep")
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1.0)
    with pytest.raises(SingularHessianError, match="Pass another damping"):
        f.solve(v, rtol=1e-14)


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch):
    model, loss = tracked_loss(Case((32,) * 8, 16, inputs=32))
    estimates = estimate_cost(model, 16)
    monkeypatch.setattr(costs, "free_bytes", lambda device: 0.9 * estimates["sweep"].bytes)
    with mock.patch.object(hessian, "_Sweep", side_effect=AssertionError("it started")):
        with pytest.raises(MemoryError, match="What fits") as caught:
            factorize_hessian(model, loss, 0.1, route="sweep")
    message = str(caught.value)
    for remedy in ("checkpoint_layers=True", "precision='mixed'", "keep='inertia'", "a batch of 8 samples"):
        assert remedy in message
    factorize_hessian(model, loss, 0.1, route="sweep", checkpoint_layers=True)
    # H that is there already is not charged again
    small, tracked = tracked_loss(Case((6, 4), 30))
    f = factorize_hessian(small, tracked, 0.1, route="dense")
    monkeypatch.setattr(costs, "free_bytes", lambda device: 0.6 * estimate_cost(small, 30)["dense"].bytes)
    f.with_damping(0.2)
    with pytest.raises(MemoryError):
        factorize_hessian(small, tracked, 0.2, route="dense")
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1.0)
    with pytest.raises(MemoryError, match="Narrower layers"):
        factorize_hessian(model, loss, 0.1, route="sweep")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"precision": "float32"}, "choose 'float64' or 'mixed'"),
        ({"keep": "all"}, "choose 'solve' or 'inertia'"),
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


# --------------------------------------------------------------------------------------- size, documents, types


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["wide input", "many classes"])
def test_imagenet_shapes(shape):
    """150,528 inputs, width 64, 4 layers, N = 8; and 1,000 classes, width 64, N = 32: below 1e-8, under 5 GB."""
    sizes = "150528, 64, 10, 3" if shape == "wide input" else "64, 64, 1000, 3"
    batch = 8 if shape == "wide input" else 32
    code = f"""
import resource, sys, torch
from hessian import *
torch.manual_seed(0)
model = DeepMLPWithTracking({sizes})
x, y = torch.randn({batch}, model.input_dim), torch.randint(model.num_classes, ({batch},))
loss = model(x, y, track_activations=True)
v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
f = factorize_hessian(model, loss, 0.05)
print(f.route, f.residual(f.solve(v), v).item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True, text=True)
    route, residual, peak = done.stdout.split()
    assert route == "sweep" and float(residual) < 1e-8
    assert int(peak) * (1 if sys.platform == "darwin" else 1024) < 5e9


def code_blocks(name: str) -> list[str]:
    return [part.split("```")[0] for part in (HERE / name).read_text().split("```python\n")[1:]]


@pytest.mark.parametrize("document", ["README.md", "USAGE.md"])
def test_documented_code_runs(document):
    """The Python blocks of a document run from top to bottom, in one namespace; what they assert holds."""
    blocks = code_blocks(document)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)


def test_public_names_are_documented():
    for name in hessian.__all__:
        item = getattr(hessian, name)
        assert name in (HERE / "USAGE.md").read_text() or name in (HERE / "README.md").read_text(), name
        if isinstance(item, type) or callable(item):
            assert len(item.__doc__ or "") > 40, name


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", *sys.argv[1:]]))

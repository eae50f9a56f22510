"""The promised tests of hessian.py, and of what its documents promise. All others are in tests/.

    pytest test_hessian.py -v            or    python3 test_hessian.py
    pytest -m "not slow"                 all tests but the long ones

Oracles (tests/oracles.py): the dense Hessian by torch.func.hessian, differences of the loss, counted operations.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

import curvature
import hessian
import newton
from _hessian import symmetric_factor
from _hessian.refinement import spectral_norm
from hessian import (
    DeepMLPWithTracking,
    SingularHessianError,
    compute_layer_derivatives,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)
from tests.oracles import (
    HERE,
    Case,
    counted_operations,
    dense_hessian,
    dense_residual,
    factorize_layers,
    flat_function,
    gradient,
    num_parameters,
    random_vector,
    reachable_bytes,
    relative,
    tracked_loss,
)


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


def peak_bytes(num_layers: int) -> int:
    """Peak resident memory of a fresh process that factors and solves at width 32, N = 16."""
    code = (
        "import resource, torch; torch.set_num_threads(1); from test_hessian import *\n"
        "from benchmarks.processes import resident_bytes\n"
        f"model, loss = tracked_loss(Case((32,) * {num_layers - 1}, 16, inputs=32))\n"
        "factorize_hessian(model, loss, 0.1, route='sweep').solve(random_vector(num_parameters(model)))\n"
        # on Linux ru_maxrss begins at the peak of the process that started this one
        "linux = sys.platform == 'linux'\n"
        "print(resident_bytes('VmHWM') if linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
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
        scaled = factorize_layers(layers, (0.1 * scale,) * 4, route=route)
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


@pytest.mark.slow
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


# the public names, and their arguments with defaults; after * by keyword only
PUBLIC = {
    "hessian": {
        "ACTIVATIONS": None,
        "Activation": "value, derivatives",
        "DeepMLPWithTracking": "input_dim, hidden_dim, num_classes, num_hidden_layers, activation='tanh', *, "
        "bias=True, residual=False, loss='cross_entropy'",
        "HessianFactorization": None,
        "LayerDerivatives": "weight, inputs, slope, curvature, adjoint, skip, output",
        "OutputHessian": "diagonal, zero_sum",
        "RouteCost": "operations, solve_operations, bytes",
        "SingularHessianError": "message, *, layer=None, damping=None, residual=None",
        "OperationDerivatives": "region, tensors, beta",
        "TrackedNetwork": "net, loss='cross_entropy', *, class_dim=None, closed_forms=None",
        "compute_layer_derivatives": "model",
        "estimate_cost": "model, batch_size, *, curvature='hessian', precision='float64', keep='solve', "
        "checkpoint_layers=False",
        "factorize_hessian": "model, loss, damping, *, curvature='hessian', route='auto', state_damping=0.0, "
        "precision='float64', keep='solve', checkpoint_layers=False",
        "hessian_inverse_vector_product": "model, loss, v, damping=0.0, *, rtol=1e-08",
        "hessian_vector_product": "model, loss, v, *, curvature='hessian', state_damping=0.0",
    },
    "newton": {
        "DampedNewton": "model, *, curvature='auto', metric='auto', route='auto', curvature_batch=None, "
        "cg_iterations=8, weight_decay=0.0, damping=1.0, metric_damping=None, gtol=1e-12, htol=1e-08, seed=0, "
        "group=None",
        "StepCost": "route, num_dampings, operations, traffic, bytes, alone, sent",
        "StepReport": "method, accepted, objective, new_objective, gradient_norm, damping, length, num_trials, "
        "certified",
        "TrustRegionStep": "step, damping, predicted_decrease, num_factorizations, on_boundary, hard_case",
        "trust_region_step": "model, loss, gradient, radius, *, weight_decay=0.0, rtol=0.0001, route='auto'",
    },
    "curvature": {
        "EigenPairs": "values, vectors, residuals",
        "Influences": "indices, values",
        "Laplace": "model, loss, prior_precision, curvature='gauss_newton', *, noise=1.0",
        "Minimum": "gradient_norm, num_negative_eigenvalues, smallest_eigenvalue, gtol, htol, weight_decay",
        "Predictive": "mean, covariance, noise, probabilities",
        "Spectrum": "edges, counts, curvature, eigenvalues, num_factorizations",
        "eigenpairs": "model, loss, k, which='largest', *, near=None, curvature='hessian'",
        "eigenvalue_count": "model, loss, a, b, *, curvature='hessian'",
        "hessian_operator": "model, loss, *, curvature='hessian'",
        "hypergradient": "model, loss, val_loss, weight_decay",
        "influence": "model, loss, test_x, test_y, damping, *, curvature='hessian'",
        "is_minimum": "model, loss, htol=1e-08, *, gtol=1e-08, weight_decay=0.0",
        "minimize": "model, closure, weight_decay=0.0, *, start='lbfgs', max_start_steps=1000, max_steps=50, "
        "gtol=1e-10, htol=1e-08",
        "self_influence": "model, loss, damping, *, curvature='hessian'",
        "smallest_damping": "model, loss, *, rtol=0.01",
        "spectrum": "model, loss, bins=24, *, by=None, curvature='hessian', route='auto', max_factorizations=64",
        "top_influences": "model, loss, test_x, test_y, damping, k=10, *, curvature='hessian'",
    },
}


@pytest.mark.parametrize("module", [hessian, newton, curvature], ids=lambda module: module.__name__)
def test_public_names_and_signatures(module):
    expected = PUBLIC[module.__name__]
    assert sorted(module.__all__) == sorted(expected)
    for name, arguments in expected.items():
        if arguments is not None:
            parameters = inspect.signature(getattr(module, name)).parameters.values()
            plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
            assert str(inspect.Signature(plain)) == f"({arguments})", name
    for kind in (hessian.DeepMLPWithTracking, hessian.TrackedNetwork):
        assert str(inspect.signature(kind.track_batches)).startswith("(self, loader: ")
        assert inspect.signature(kind.track_batches).parameters["keep"].default is True
    methods = ("solve", "residual", "with_damping", "is_positive_definite", "inertia_is_certified")
    assert all(hasattr(hessian.HessianFactorization, name) for name in methods)


def test_public_names_are_documented():
    for module, name in [(hessian, name) for name in hessian.__all__] + [(curvature, n) for n in curvature.__all__]:
        item = getattr(module, name)
        assert name in (HERE / "USAGE.md").read_text() or name in (HERE / "README.md").read_text(), name
        if isinstance(item, type) or callable(item):
            assert len(item.__doc__ or "") > 40, name


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-v", *sys.argv[1:]]))

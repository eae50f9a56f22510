"""The Gram matrix of damped Gauss–Newton steps, against dense Jacobians and Hessians by torch.func."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from _hessian import step_cost
from _hessian.costs import shapes_of_layers
from _hessian.gram import ChainGramSystem, gauss_newton_product, scaled_output, split_damping
from hessian import compute_layer_derivatives
from newton import DampedNewton
from tests.newton_oracles import eye, logits_jacobian, output_hessian
from tests.oracles import (
    Case,
    case_id,
    counted_operations,
    dense_hessian,
    flat_function,
    gradient,
    random_vector,
    relative,
    tracked_loss,
)

GRAM_CASES = (
    Case((6, 4, 7), 3),
    Case((6, 4, 7), 15, "gelu"),
    Case((6, 6, 6, 4), 9, residual=True),
    Case((6, 4, 7), 9, loss="mse", bias=False),
    Case((16, 12, 14), 5, soft=True, inputs=10),
    Case((), 4),
    Case((6, 5), 7, classes=2),
)


def state_metric(case: Case, rho: float) -> Tensor:
    """D (P, P) by its definition: A from each layer's inputs, Ω by autograd through the later pre-activations."""
    model, x, _ = case.build()
    zs, hs, z = [], [], x
    for index, linear in enumerate(model.layers):
        zs.append(z)
        hs.append(linear(z))
        z = model.activate(index, hs[-1], z) if index + 1 < len(model.layers) else hs[-1]
    blocks = []
    for index, linear in enumerate(model.layers):
        a, d = linear.weight.shape[0], linear.weight.shape[1] + (linear.bias is not None)
        if index + 1 == len(model.layers):
            blocks.append(rho * eye(a * d))
            continue
        Omega = torch.zeros(a, a, dtype=torch.float64)
        for later in hs[index:-1]:
            for unit in later.sum(0):  # samples don't mix: the gradient of a sum holds each one's
                (row,) = torch.autograd.grad(unit, hs[index], retain_graph=True)
                Omega += row.T @ row / len(x)
        inputs = zs[index] if linear.bias is None else torch.cat([zs[index], torch.ones(len(x), 1)], 1)
        A = (inputs.T @ inputs / len(x)).detach()
        if len(x) < d:  # so few samples can't tell it
            A = A.trace() / d * eye(d)
        pi = (Omega.trace() / a / (A.trace() / d)).sqrt()
        left, right = Omega + math.sqrt(rho) * pi * eye(a), A + math.sqrt(rho) / pi * eye(d)
        # the flat order has the whole weight first, then the bias
        D = torch.kron(left, right).view(a, d, a, d)
        width = linear.weight.shape[1]
        order = [i * d + j for i in range(a) for j in range(width)] + [i * d + width for i in range(a) if d > width]
        blocks.append(D.reshape(a * d, a * d)[order][:, order])
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("case", GRAM_CASES, ids=case_id)
def test_scaled_output(case):
    model, loss = tracked_loss(case)
    last = compute_layer_derivatives(model)[-1]
    root, residual = scaled_output(last)
    assert relative(root @ root.mT - output_hessian(case), output_hessian(case)) < 1e-14
    assert relative((root @ residual[:, :, None])[:, :, 0] - last.adjoint, last.adjoint) < 1e-14
    # no column of S is redundant, so w is the only one
    assert root.shape[2] == case.classes - (case.loss == "cross_entropy")


def test_scaled_output_of_a_fitted_sample_keeps_its_digits():
    model, x, y = Case((4,), 6).build()
    with torch.no_grad():
        model.layers[-1].weight.mul_(300)
    y = model(x).argmax(1)
    model(x, y, track_activations=True)
    last = compute_layer_derivatives(model)[-1]
    root, residual = scaled_output(last)
    h = model(x).detach()
    other = torch.ones_like(h).scatter(1, y[:, None], 0).bool()
    exact = -torch.exp(0.5 * (h - h.gather(1, y[:, None])))[other].view(6, 2) / math.sqrt(6)  # −√(π_c/π_y)/√N
    assert exact.abs().max() < 1e-3 and relative(residual - exact, exact) < 1e-12
    assert relative((root @ residual[:, :, None])[:, :, 0] - last.adjoint, last.adjoint) < 1e-12


@pytest.mark.parametrize("weight_decay", (0.0, 0.03))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("case", GRAM_CASES, ids=case_id)
def test_gram_system(case, metric, weight_decay):
    """x and J x against dense solves, for the batch's gradient and for any gradient; D against its definition."""
    model, loss = tracked_loss(case)
    layers = compute_layer_derivatives(model)
    theta = flat_function(model, case.build()[1])[1]
    rho, damping, c = 0.02, 0.07, weight_decay
    D = state_metric(case, rho + c / damping) if metric == "state" else (1 + c / damping) * eye(len(theta))
    if metric == "state" and c:  # λD contains cI, and the rest is positive semidefinite
        assert torch.linalg.eigvalsh(damping * D)[0] >= c
    A, g = dense_hessian(case, "gauss_newton") + damping * D, gradient(model, loss)
    any_gradient = random_vector(len(theta))
    for rest, alone, full in (
        (c * theta if c else None, False, g + c * theta),
        (any_gradient, True, any_gradient),
        (any_gradient, False, g + any_gradient),
    ):
        system = ChainGramSystem(layers, metric, rho, c, rest, without_residual=alone)
        x, Jx = system.step(system.factorize(damping))
        exact = torch.linalg.solve(A, -full)
        assert relative(x - exact, exact) < 1e-9
        J = torch.einsum("nck,ncp->knp", system.root, logits_jacobian(case)).flatten(0, 1)
        assert relative(Jx - J @ exact, J @ exact) < 1e-9
    damped, v = system.factorize(damping), any_gradient
    for ours, exact in (
        (system.inverse(damped, v), torch.linalg.solve(A, v)),
        (damped.apply_metric(v), damping * D @ v),
        (damped.solve_metric(v), torch.linalg.solve(damping * D, v)),
        (gauss_newton_product(layers, v[:, None])[:, 0], dense_hessian(case, "gauss_newton") @ v),
    ):
        assert relative(ours - exact, exact) < 1e-9


@pytest.mark.parametrize("metric", ["parameter", "state"])
def test_gram_operations_are_what_is_counted(metric):
    """The closed form, to leading order, against counted products and factorizations: to 15 %."""
    model, loss = tracked_loss(Case((16,) * 10, 24, inputs=16, classes=8))
    layers, K, N = compute_layer_derivatives(model), 7, 24
    elementwise = 2 * (N * K) ** 2 * len(layers)  # a product and a sum, which the counter doesn't see
    counted = counted_operations(lambda: ChainGramSystem(layers, metric, 1e-2, 0.1, None).factorize(1.0)) + elementwise
    options = DampedNewton(model, metric=metric)._options()
    assert counted == pytest.approx(step_cost._gram_operations(shapes_of_layers(layers), N, options), rel=0.15)


def test_a_metric_that_overflows_gives_no_step():
    model, loss = tracked_loss(Case((6, 4, 7), 3))
    layers = [x._replace(weight=1e200 * x.weight) for x in compute_layer_derivatives(model)]
    assert ChainGramSystem(layers, "state", 1e-4, 0.0, None).factorize(1.0) is None


def test_split_damping_of_dead_inputs():
    of_Omega, of_A = split_damping(eye(3), torch.zeros(4, 2, dtype=torch.float64), 0.01)
    assert of_Omega.item() == of_A.item() == pytest.approx(0.1)

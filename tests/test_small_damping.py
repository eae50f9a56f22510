"""Dampings down to 1e-8: refinement and carried pivots reach what a dense solve reaches."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from _hessian import carried_pivots
from _hessian.chain import chain_program
from hessian import (
    SingularHessianError,
    compute_layer_derivatives,
    factorize_hessian,
    hessian_vector_product,
)
from tests.oracles import (
    UNCARRIED,
    Case,
    dense_hessian,
    dense_residual,
    num_parameters,
    random_vector,
    tracked_loss,
)


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


REACH = (
    Case((6, 4, 7), 3),
    Case((6, 4, 7), 15),
    Case((5, 5, 4), 2, residual=True),
    Case((16, 12, 14), 3, inputs=10),
)

REACH += (UNCARRIED,)
LARGE = (
    Case((8, 7) * 14, 32, inputs=20),
    Case((8, 7) * 14, 4, inputs=20),
    Case((8,) * 29, 5, residual=True, inputs=8),
    Case((20,) * 9, 5, "relu", inputs=20, classes=10),
)


@pytest.mark.parametrize(
    "case",
    [*REACH, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)],
    ids=lambda case: f"{len(case.hidden)}x{case.hidden[0]}-{case.batch}-{case.activation}",
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
    operations = chain_program(layers).operations
    couplings = [(x.derivatives.adjoint.abs().max() / x.rows.R.abs().max()).item() for x in operations]
    assert operations[0].natural.scale == 0.0
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
        assert operations[index].natural.scale == pytest.approx(largest, rel=1e-10)
        assert operations[index].natural.coupling == pytest.approx(layers[index].adjoint.norm().item(), rel=1e-12)


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
    steps = list(f._factor.downward())
    assert any(step.pivots[0].carried is not None for step in steps)
    assert any(step.outside is not None for step in steps)
    ordinary = factorize_hessian(model, loss, 0.1, route="sweep")
    assert all(step.pivots[0].carried is None and step.outside is None for step in ordinary._factor.downward())

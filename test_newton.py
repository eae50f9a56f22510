"""Tests of newton.py and what it is made of: hessian_gram.py, trust_region.py, factorizations that stop early.

Oracles: Jacobians and Hessians by torch.func, autograd. That of the trust region's best decrease is a dense
eigendecomposition and Lagrangian duality, max over λ of
−½ gᵀ(A + λI)⁻¹g − ½ λΔ², which has no hard case; H comes from torch.func.hessian. Everything in float64, seeded,
neighbouring widths unequal.
"""

from __future__ import annotations

import copy
import functools
import io
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import hessian
import newton
from _hessian import trust_region
from _hessian.gram import (
    GramSystem,
    count_gram_operations,
    gauss_newton_product,
    scaled_output,
    split_damping,
)
from _hessian.losses import loss_value
from _hessian.refinement import Refined
from _hessian.trial_losses import accurate_loss
from hessian import (
    DeepMLPWithTracking,
    HessianFactorization,
    SingularHessianError,
    compute_layer_derivatives,
    factorize_hessian,
    hessian_vector_product,
)
from newton import DampedNewton, TrustRegionStep, _Step, _sub_batch, trust_region_step
from tests.oracles import (
    Case,
    case_id,
    counted_operations,
    dense_hessian,
    dense_state_form,
    flat_function,
    gradient,
    num_parameters,
    raises,
    random_vector,
    relative,
    tracked_loss,
)

RADII = (1e-6, 0.1, 1.0, 10.0, 1e5)


class Problem(NamedTuple):
    """A network after so many steps of Adam on its loss + ½w‖θ‖²."""

    case: Case
    steps: int = 0
    weight_decay: float = 0.0


PROBLEMS = (
    Problem(Case((6, 4, 7), 3)),
    Problem(Case((6, 4, 7), 15, "relu")),
    Problem(Case((6, 4, 7), 15, loss="mse", bias=False)),
    Problem(Case((16, 12, 14), 9, "gelu", inputs=10)),
    Problem(Case((5, 6, 6, 4, 4, 7), 15, residual=True)),
    Problem(Case((5, 6, 6, 4, 4, 7), 3, "silu", "mse", residual=True)),
    Problem(Case((9, 8, 11) * 4, 6, inputs=7, classes=5)),
    Problem(Case((), 20)),  # convex: singular for cross-entropy, definite for mse
    Problem(Case((), 20, loss="mse")),
    Problem(Case((9, 8), 40, loss="mse"), steps=500, weight_decay=0.3),  # a definite minimum
    Problem(Case((9, 8, 7), 40), steps=300),  # saddles with small negative curvature, |λ_min| down to 1e-3 ‖H‖
    Problem(Case((9, 8, 7), 40, loss="mse"), steps=600),
    Problem(Case((9, 8, 11), 40, inputs=7, classes=5), steps=800, weight_decay=1e-3),
    Problem(Case((9, 8, 11), 6, inputs=7, classes=5), steps=400, weight_decay=1e-3),
)
INDEFINITE = tuple(p for p in PROBLEMS if p.case.hidden and p.weight_decay < 0.1)


def problem_id(problem: Problem) -> str:
    return case_id(problem.case) + f"-{problem.steps}-{problem.weight_decay}"


class Dense(NamedTuple):
    """A problem's model and loss, ∇(loss + ½w‖θ‖²), and the eigendecomposition of A = H + wI."""

    model: hessian.DeepMLPWithTracking
    loss: Tensor
    gradient: Tensor
    A: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @property
    def norm(self) -> float:
        return float(self.eigenvalues.abs().max())

    def lowest(self) -> Tensor:
        """(P, j), an orthonormal basis of the eigenspace of λ_min."""
        return self.eigenvectors[:, self.eigenvalues - self.eigenvalues[0] < 1e-9 * self.norm]

    def best_decrease(self, g: Tensor, radius: float) -> float:
        """The dual's maximum, by ternary search in log(λ + λ_min): the dual is concave in λ. λ > 0 only if needed."""
        theta, b = self.eigenvalues, self.eigenvectors.T @ g
        if theta[0] > -1e-12 * self.norm:
            curved = theta > 1e-11 * self.norm
            step = b[curved] / theta[curved]
            if step.norm() <= radius and b[~curved].norm() <= 1e-12 * b.norm():
                return float(0.5 * (step * b[curved]).sum())

        def dual(log_delta: float) -> float:
            delta = math.exp(log_delta)
            return float(-0.5 * (b**2 / (theta - theta[0] + delta)).sum() - 0.5 * (delta - theta[0]) * radius**2)

        low = math.log(max(1e-17 * self.norm, float(theta[0])))
        high = math.log(10 * self.norm + b.norm() / radius)
        for _ in range(120):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            low, high = (left, high) if dual(left) < dual(right) else (low, right)
        return -dual(low)


@functools.cache
def dense(problem: Problem) -> Dense:
    model, x, y = problem.case.build()
    w, parameters = problem.weight_decay, list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(problem.steps):
        optimizer.zero_grad()
        (model(x, y) + 0.5 * w * sum((p**2).sum() for p in parameters)).backward()
        optimizer.step()
    loss = model(x, y, track_activations=True)
    f, theta = flat_function(model, x, y)
    A = torch.func.hessian(f)(theta) + w * torch.eye(len(theta), dtype=torch.float64)
    g = gradient(model, loss) + w * theta
    return Dense(model, loss, g, A, *torch.linalg.eigh(0.5 * (A + A.T)))


def vectors(problem: Problem) -> dict[str, Tensor]:
    """The gradient; any vector; one in the hard case to rounding, one nearly in it; and zero."""
    d = dense(problem)
    U = d.lowest()
    hard = d.gradient - U @ (U.T @ d.gradient)
    hard = hard - U @ (U.T @ hard)
    found = {
        "gradient": d.gradient,
        "random": random_vector(len(d.gradient)),
        "hard": hard,
        "nearly hard": hard + 1e-7 * hard.norm() * U[:, 0],
        "zero": torch.zeros_like(hard),
    }
    if problem not in INDEFINITE:  # λ_min ≥ 0 is no hard case; so small a part near the null space is left unused
        del found["nearly hard"]
    return found


@functools.cache
def steps(problem: Problem) -> dict[tuple[str, float, str], TrustRegionStep]:
    d = dense(problem)
    return {
        (name, radius, route): trust_region_step(
            d.model, d.loss, g, radius, weight_decay=problem.weight_decay, route=route
        )
        for name, g in vectors(problem).items()
        for radius in RADII
        for route in ("sweep", "dense")
    }


def check_step(step: TrustRegionStep, d: Dense, g: Tensor, radius: float, rtol: float = 1.01e-4) -> None:
    """The decrease of the best step within rtol, and what the fields say."""
    p = step.step
    decrease = -float(g @ p + 0.5 * p @ d.A @ p)
    best = d.best_decrease(g, radius)
    assert abs(decrease - best) <= rtol * best, (decrease, best)
    assert p.norm() <= radius * (1 + 1e-12)
    assert step.on_boundary == (p.norm() >= radius * (1 - 1e-9))
    assert step.predicted_decrease == pytest.approx(decrease, rel=1e-8, abs=1e-12 * d.norm * float(p @ p))
    assert step.damping >= 0 and step.damping + d.eigenvalues[0] >= -1e-3 * max(step.damping, 1e-7 * d.norm)
    if not step.on_boundary:
        assert step.damping <= 1.01e-10 * d.norm  # 0


# ------------------------------------------------------------------------------------------------ the global step


@pytest.mark.parametrize("problem", PROBLEMS, ids=problem_id)
def test_global_optimum(problem):
    """Gradients, any vector, the hard case, nearly the hard case, g = 0; tiny to huge radii; both routes."""
    d = dense(problem)
    for (name, radius, _), step in steps(problem).items():
        g = vectors(problem)[name]
        check_step(step, d, g, radius)
        error = d.A @ step.step + step.damping * step.step + g
        assert error.norm() <= 0.01 * (g.norm() + step.damping * radius)  # √rtol


def test_the_problems_have_every_case():
    """Interior steps, boundary steps, hard ones; curvature of either sign: so that the test above tests them."""
    found = [step for problem in PROBLEMS for step in steps(problem).values()]
    assert sum(not step.on_boundary for step in found) >= 30
    assert sum(step.hard_case for step in found) >= 150
    assert sum(step.on_boundary and not step.hard_case for step in found) >= 300
    lowest = [float(dense(p).eigenvalues[0]) / dense(p).norm for p in PROBLEMS]
    assert sum(x < -0.1 for x in lowest) >= 4 and sum(-0.02 < x < -1e-4 for x in lowest) >= 3
    assert sum(x > 1e-3 for x in lowest) >= 2


def test_number_of_factorizations():
    counts = [step.num_factorizations for problem in PROBLEMS for step in steps(problem).values()]
    assert torch.tensor(counts).median() <= 1.5
    assert sum(counts) / len(counts) <= 2 and max(counts) <= 5


@pytest.mark.parametrize("problem", INDEFINITE, ids=problem_id)
def test_hard_case(problem):
    """g ⟂ the eigenspace of λ_min, a large ball: λ = −λ_min, and the eigenvector takes p to the boundary."""
    d, U = dense(problem), dense(problem).lowest()
    for route in ("sweep", "dense"):
        step = steps(problem)["hard", 1e5, route]
        assert step.hard_case and step.on_boundary
        assert step.damping == pytest.approx(-float(d.eigenvalues[0]), rel=1e-5)
        assert (U.T @ step.step).norm() > 0.99 * step.step.norm()
        assert not steps(problem)["gradient", 1.0, route].hard_case


def test_hard_case_takes_the_lower_sign():
    """T = diag(−1, 1, 2): λ = 1 gives y = −c/(T + λ) off the eigenvector, which goes against the slope along it."""
    T = np.diag([-1.0, 1.0, 2.0])
    for slope in (1e-20, -1e-20):
        found = trust_region._solve_reduced(T, np.array([slope, 0.4, 0.3]), 5.0)
        y = found.vectors @ found.y
        assert found.hard_case and found.damping == pytest.approx(1.0, rel=1e-14)
        assert y[1:] == pytest.approx([-0.2, -0.1], rel=1e-12)
        assert y[0] == pytest.approx(-np.sign(slope) * math.sqrt(25 - 0.05), rel=1e-12)


@pytest.mark.parametrize("problem", INDEFINITE, ids=problem_id)
def test_zero_gradient_at_a_saddle(problem):
    d = dense(problem)
    for radius in RADII:
        step = steps(problem)["zero", radius, "sweep"]
        assert step.step.norm() == pytest.approx(radius, rel=1e-12) and step.hard_case
        assert step.predicted_decrease == pytest.approx(-0.5 * float(d.eigenvalues[0]) * radius**2, rel=1e-4)


def test_zero_gradient_at_a_minimum():
    for problem in PROBLEMS:
        if problem not in INDEFINITE:
            step = steps(problem)["zero", 1.0, "sweep"]
            assert not step.step.any() and not step.on_boundary and step.predicted_decrease == 0


def test_interior_step_is_newtons():
    """Where A is definite and the ball large, p = −A⁻¹g: at the minimum with an L2 term, and for a convex loss."""
    for problem in PROBLEMS[8:10]:
        d = dense(problem)
        step = steps(problem)["gradient", 1e5, "sweep"]
        assert not step.on_boundary and step.damping <= 1.01e-10 * d.norm
        assert relative(step.step + torch.linalg.solve(d.A, d.gradient), step.step) <= 1e-4


def test_tighter_proof():
    problem = PROBLEMS[10]
    d = dense(problem)
    for name, g in vectors(problem).items():
        for radius in (0.1, 10.0):
            step = trust_region_step(d.model, d.loss, g, radius, rtol=1e-9)
            check_step(step, d, g, radius, rtol=2e-9)
            assert step.num_factorizations <= 5, name


# ------------------------------------------------------------------------------------------- search against proof


@pytest.mark.parametrize("problem", PROBLEMS[6:14:2] + PROBLEMS[11:12], ids=problem_id)
def test_a_poor_search_is_found_out(problem, monkeypatch):
    """A Krylov space of 3 blocks misses λ_min: the factorizations say so, and the step is still the best one."""
    monkeypatch.setattr(trust_region, "_KRYLOV_STEPS", 3)
    d, counts = dense(problem), []
    for g in vectors(problem).values():
        for radius in (0.1, 10.0, 1e5):
            step = trust_region_step(d.model, d.loss, g, radius, weight_decay=problem.weight_decay)
            check_step(step, d, g, radius)
            counts.append(step.num_factorizations)
    assert torch.tensor(counts).median() <= 5
    assert max(counts) > 1.5 or d.eigenvalues[0] > -1e-12 * d.norm


def test_inaccurate_solves_prove_nothing(monkeypatch):
    """Solves that are off by 1 % widen the gap: an error, not a step that is called proved."""
    refined = HessianFactorization._refined

    def inaccurate(self, v: Tensor, rtol: float) -> Refined:
        return Refined(1.01 * refined(self, v, rtol).x, torch.full(v.shape[1:], 0.01, dtype=torch.float64))

    monkeypatch.setattr(HessianFactorization, "_refined", inaccurate)
    d = dense(PROBLEMS[9])
    with pytest.raises(SingularHessianError, match="not proved to rtol=0.0001.*Pass a larger rtol"):
        trust_region_step(d.model, d.loss, d.gradient, 1e5, weight_decay=0.3)


def test_rounding_near_zero(monkeypatch):
    """A semidefinite matrix whose Cholesky factorization fails below 1e-8 ‖A‖: that λ stands for 0 then, in few trials;
    but failures up to 1e-4 ‖A‖ are never taken for rounding."""
    d, factorize = dense(PROBLEMS[8]), trust_region.factorize_definite
    for least, proved in ((1e-8, True), (1e-4, False)):

        def failing(solver, layers, damping, route, H=None, least=least * d.norm):
            return factorize(solver, layers, damping, route, H) if damping > least else (None, 1.0)

        monkeypatch.setattr(trust_region, "factorize_definite", failing)
        if proved:
            step = trust_region_step(d.model, d.loss, d.gradient, 1e5)
            check_step(step, d, d.gradient, 1e5)
            assert step.num_factorizations <= 8
        else:
            raises(SingularHessianError, "not proved", trust_region_step, d.model, d.loss, d.gradient, 1e5)


# --------------------------------------------------------------------------------------------------- other callers


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_modified_curvature(curvature, mu):
    """What an optimizer passes: layers with a state damping or Gauss–Newton curvature, and an L2 term."""
    for case in (Case((9, 8, 11), 6), Case((6, 4, 7), 15)):
        model, loss = tracked_loss(case)
        g, w = gradient(model, loss), 1e-3
        A = dense_hessian(case, curvature) + mu * dense_state_form(case)
        A = A + w * torch.eye(len(g), dtype=torch.float64)
        d = Dense(model, loss, g, A, *torch.linalg.eigh(0.5 * (A + A.T)))
        layers = hessian._modified(compute_layer_derivatives(model), curvature, mu)
        for radius in (0.1, 1.0, 100.0):
            check_step(trust_region.solve_trust_region(hessian._SOLVER, layers, g, radius, w), d, g, radius)


def test_float32_vectors():
    d = dense(PROBLEMS[0])
    step = trust_region_step(d.model, d.loss, d.gradient.float(), 0.5)
    assert step.step.dtype == torch.float32 and not step.step.requires_grad
    assert relative(step.step.double() - trust_region_step(d.model, d.loss, d.gradient, 0.5).step, step.step) <= 1e-5


def test_same_answer_each_time_and_nothing_outside_is_touched():
    d = dense(PROBLEMS[6])
    state, before = torch.get_rng_state(), [p.clone() for p in d.model.parameters()]
    first, second = (trust_region_step(d.model, d.loss, d.gradient, 0.5) for _ in range(2))
    assert torch.equal(first.step, second.step) and first[1:] == second[1:]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(d.model.parameters(), before, strict=True))


def test_wrong_input():
    model, loss = tracked_loss(Case((6, 4), 3))
    g = random_vector(num_parameters(model))
    for radius in (0.0, -1.0, math.nan, math.inf, None, [1.0]):
        raises(ValueError, "radius must be a finite number > 0", trust_region_step, model, loss, g, radius)
    raises(ValueError, f"shape \\({len(g)},\\)", trust_region_step, model, loss, g[1:], 1.0)
    raises(ValueError, "one at a time", trust_region_step, model, loss, g[:, None], 1.0)
    raises(ValueError, "NaN", trust_region_step, model, loss, g * math.nan, 1.0)
    raises(TypeError, "float32 or float64", trust_region_step, model, loss, g.half(), 1.0)
    raises(ValueError, "weight_decay must be", trust_region_step, model, loss, g, 1.0, weight_decay=-1e-3)
    raises(ValueError, "rtol", trust_region_step, model, loss, g, 1.0, rtol=0.0)
    raises(ValueError, "route", trust_region_step, model, loss, g, 1.0, route="gram")
    raises(ValueError, "tracked last", trust_region_step, model, loss + 0, g, 1.0)


# ---------------------------------------------------------------------------------------- factorizations that stop


@pytest.mark.parametrize("case", [p.case for p in PROBLEMS[:8]] + [Case((6,), 2, classes=40, inputs=30)], ids=case_id)
def test_definite_factorizations(case):
    """A factorization exactly where A + εI is definite, the same as without the early stop; else a share below 1."""
    model, loss = tracked_loss(case)
    layers, eigenvalues = compute_layer_derivatives(model), torch.linalg.eigvalsh(dense_hessian(case))
    v, shares = random_vector(num_parameters(model)), []
    lowest = float(eigenvalues[0].clamp(max=-1e-7))
    for factor in (1e-3, 0.1, 0.5, 0.999, 1.001, 2.0, 100.0):
        damping = -factor * lowest
        definite = bool(eigenvalues[0] + damping > 0)
        for route in ("sweep", "dense"):
            f, share = trust_region.factorize_definite(hessian._SOLVER, layers, damping, route)
            assert (f is not None) == definite
            if definite:
                whole = factorize_hessian(model, loss, damping, route=route)
                assert share == 1.0 and torch.equal(f._direct(v[:, None]), whole._direct(v[:, None]))
            elif route == "sweep":
                shares.append(share)
    if eigenvalues[0] < -1e-7:
        assert all(0 < share <= 1 for share in shares) and shares == sorted(shares)


def test_an_early_stop_saves_what_it_says():
    """The share of operations, against torch's counter: a stop in the layers near the output is cheap."""
    model, loss = tracked_loss(Case((9, 8, 11) * 4, 6, inputs=7, classes=5))
    layers = compute_layer_derivatives(model)
    lowest = float(torch.linalg.eigvalsh(hessian._dense_hessian(layers))[0])
    whole = counted_operations(
        lambda: trust_region.factorize_definite(hessian._SOLVER, layers, -1.01 * lowest, "sweep")
    )
    shares = []
    for factor in (0.9, 0.1, 0.01, 1e-3):
        found = []
        done = counted_operations(
            lambda e=-factor * lowest, out=found: out.append(
                trust_region.factorize_definite(hessian._SOLVER, layers, e, "sweep")
            )
        )
        ((f, share),) = found
        assert f is None and share == pytest.approx(done / whole, rel=0.25, abs=0.02)
        shares.append(share)
    assert shares[-1] < 0.5


def test_dense_matrix_given():
    """A Hessian formed before is used, and kept."""
    model, loss = tracked_loss(Case((6, 4, 7), 15))
    layers, H = compute_layer_derivatives(model), dense_hessian(Case((6, 4, 7), 15))
    H, v = H.clone(), random_vector(len(H))
    damping = 1.0 - float(torch.linalg.eigvalsh(H)[0])
    f, _ = trust_region.factorize_definite(
        hessian._SOLVER, layers, damping, "dense", 2 * H + damping * torch.eye(len(H)).double()
    )
    solved = f._direct(v[:, None])[:, 0]
    assert relative(2 * H @ solved + 2 * damping * solved - v, v) <= 1e-12
    before = H.clone()
    trust_region.factorize_definite(hessian._SOLVER, layers, damping, "dense", H)
    assert torch.equal(H, before)


# ----------------------------------------------------------------------------------------------- the Gram route

GRAM_CASES = (
    Case((6, 4, 7), 3),
    Case((6, 4, 7), 15, "gelu"),
    Case((6, 6, 6, 4), 9, residual=True),
    Case((6, 4, 7), 9, loss="mse", bias=False),
    Case((16, 12, 14), 5, soft=True, inputs=10),
    Case((), 4),
    Case((6, 5), 7, classes=2),
)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def logits_jacobian(case: Case) -> Tensor:
    """(N, C, P), by torch.func."""
    model, x, _ = case.build()
    f, theta = flat_function(model, x)
    return torch.func.jacrev(f)(theta)


def output_hessian(case: Case) -> Tensor:
    """Λ (N, C, C), by torch.func, from logits that are parameters."""
    model, x, y = case.build()
    logits = model(x).detach()
    C = logits.shape[1]
    H = torch.func.hessian(lambda h: loss_value(model.loss, h.view_as(logits), y))(logits.flatten())
    H = H.view(len(x), C, len(x), C)
    return torch.stack([H[b, :, b] for b in range(len(x))])


def gauss_newton(case: Case) -> Tensor:
    J = logits_jacobian(case)
    return torch.einsum("nap,nab,nbq->pq", J, output_hessian(case), J)


def state_metric(case: Case, rho: float) -> Tensor:
    """D (P, P) of the definition: A from each layer's inputs, Ω from Jacobians of later pre-activations by autograd."""
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
    """x against a dense solve, for a gradient of the batch, for any gradient, and J x; D against its definition."""
    model, loss = tracked_loss(case)
    layers = compute_layer_derivatives(model)
    theta = flat_function(model, case.build()[1])[1]
    rho, damping, c = 0.02, 0.07, weight_decay
    D = state_metric(case, rho + c / damping) if metric == "state" else (1 + c / damping) * eye(len(theta))
    if metric == "state" and c:  # ½c‖θ‖² is in λD, and nothing is negative beside it
        assert torch.linalg.eigvalsh(damping * D)[0] >= c
    A, g = gauss_newton(case) + damping * D, gradient(model, loss)
    any_gradient = random_vector(len(theta))
    for rest, alone, full in (
        (c * theta if c else None, False, g + c * theta),
        (any_gradient, True, any_gradient),
        (any_gradient, False, g + any_gradient),
    ):
        system = GramSystem(layers, metric, rho, c, rest, without_residual=alone)
        x, Jx = system.step(system.at(damping))
        exact = torch.linalg.solve(A, -full)
        assert relative(x - exact, exact) < 1e-9
        J = torch.einsum("nck,ncp->knp", system.root, logits_jacobian(case)).flatten(0, 1)
        assert relative(Jx - J @ exact, J @ exact) < 1e-9
    damped, v = system.at(damping), any_gradient
    for ours, exact in (
        (system.inverse(damped, v), torch.linalg.solve(A, v)),
        (damped.apply_metric(v), damping * D @ v),
        (damped.solve_metric(v), torch.linalg.solve(damping * D, v)),
        (gauss_newton_product(layers, v[:, None])[:, 0], gauss_newton(case) @ v),
    ):
        assert relative(ours - exact, exact) < 1e-9


@pytest.mark.parametrize(
    "metric, weight_decay", [("parameter", 0.0), ("parameter", 0.1), ("state", 0.0), ("state", 0.1)]
)
def test_gram_operations_are_what_is_counted(metric, weight_decay):
    """The closed form against counted products and factorizations, to 15 %: it leaves out what is of lower order."""
    model, loss = tracked_loss(Case((16,) * 10, 24, inputs=16, classes=8))
    layers, dampings = compute_layer_derivatives(model), (0.1, 1.0, 10.0)

    def work():
        system = GramSystem(layers, metric, 1e-2, weight_decay, None)
        for damping in dampings:
            system.at(damping)

    K, N = 7, 24
    num_matrices = len(dampings) if metric == "state" and weight_decay else 1
    elementwise = 2 * (N * K) ** 2 * len(layers) * num_matrices  # a product and a sum, which the counter doesn't see
    counted = counted_operations(work) + elementwise
    assert counted == pytest.approx(count_gram_operations(layers, metric, weight_decay, 3), rel=0.15)


def test_a_metric_that_overflows_gives_no_step():
    model, loss = tracked_loss(Case((6, 4, 7), 3))
    layers = [x._replace(weight=1e200 * x.weight) for x in compute_layer_derivatives(model)]
    assert GramSystem(layers, "state", 1e-4, 0.0, None).at(1.0) is None


def test_a_lost_sample_is_trained_by_the_plain_gradient():
    """Where π_y underflows, w with Jᵀw = g has no digits."""
    model, x, y = Case((4,), 6).build()
    with torch.no_grad():
        model.layers[-1].weight.mul_(1e4)
    y = model(x).argmin(1)
    optimizer, before = DampedNewton(model), model(x, y).item()
    assert before > 1e3
    for _ in range(10):
        optimizer.step(closure_of(model, x, y))
        if optimizer.converged:
            break
        assert optimizer.report.accepted
    assert model(x, y).item() < 0.1 * before


# --------------------------------------------------------------------------------------------- the optimizer


def closure_of(model, x, y):
    return lambda: model(x, y, track_activations=True)


def parameters_of(model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense_objective_hessian(model, x, y, weight_decay: float) -> Tensor:
    f, theta = flat_function(model, x, y)
    return torch.func.hessian(f)(theta) + weight_decay * eye(len(theta))


def objective_gradient(model, x, y, weight_decay: float) -> Tensor:
    parameters = list(model.parameters())
    f = model(x, y) + 0.5 * weight_decay * sum((p**2).sum() for p in parameters)
    return torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters)])


@pytest.mark.parametrize(
    "options", [{}, {"route": "sweep"}, {"curvature": "hessian"}, {"metric": "parameter"}], ids=str
)
def test_training_lowers_the_loss_at_every_step(options):
    model, x, y = Case((7, 6, 5), 12, inputs=6).build()
    optimizer, losses = DampedNewton(model, **options), []
    for _ in range(12):
        losses.append(optimizer.step(closure_of(model, x, y)).item())
        assert optimizer.report.accepted and optimizer.report.new_objective < optimizer.report.objective
        assert optimizer.report.objective == pytest.approx(losses[-1], rel=1e-12)
        assert all(p.grad is None for p in model.parameters())
    assert losses[-1] < 1e-2 * losses[0]


def test_thirty_layers_are_fitted_in_a_few_steps():
    torch.manual_seed(0)
    model = DeepMLPWithTracking(20, 8, 5, 29).double()
    x, y = torch.randn(24, 20, dtype=torch.float64), torch.randint(5, (24,))
    optimizer = DampedNewton(model)
    for _ in range(30):
        optimizer.step(closure_of(model, x, y))
        if optimizer.converged:
            break
    assert optimizer.report.objective < 1e-10


@pytest.mark.parametrize("options", ({}, {"route": "gram"}, {"metric": "parameter"}, {"route": "sweep"}))
def test_one_class(options):
    """A loss of zero, whatever the weights: the L2 term is all that a step lowers."""
    model = DeepMLPWithTracking(4, 5, 1, 2).double()
    x, y = torch.ones(3, 4).double(), torch.zeros(3, dtype=torch.long)
    optimizer = DampedNewton(model, weight_decay=0.1, **options)
    before = 0.05 * parameters_of(model).square().sum()
    for _ in range(3):
        assert optimizer.step(closure_of(model, x, y)) == 0
    assert 0.05 * parameters_of(model).square().sum() < 0.1 * before


def measured_omega(model, index: int, z: Tensor) -> Tensor:
    """Ω of hidden layer `index`, whose inputs are z, by reverse mode."""
    h = model.layers[index](z).detach()

    def above(h: Tensor) -> Tensor:
        hidden, state = [h], z[0]
        for j in range(index, len(model.layers) - 2):
            state = model.activate(j, h, state)
            h = model.layers[j + 1](state)
            hidden.append(h)
        return torch.cat(hidden)

    jacobians = torch.stack([torch.func.jacrev(above)(row) for row in h])
    return (jacobians.mT @ jacobians).mean(0)


@pytest.mark.parametrize("curvature", ("gauss_newton", "hessian"))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("batch", (3, 9))
def test_sweep_steps_solve_their_system(batch, metric, curvature):
    """Against products: (G + cI + λD) x = −g, D_ℓ = (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I) + ρI in hidden layers with
    metric='state' (A_ℓ alone where it has more rows than there are samples, π by N in place of d), else D = I.

    Ω by reverse mode: the mean over samples of Σ_j (∂h_j/∂h_ℓ)ᵀ(∂h_j/∂h_ℓ), j ≥ ℓ hidden."""
    case, c, damping, rho = Case((6, 4, 7), batch), 0.02, 30.0, 1e-2
    model, x, y = case.build()
    optimizer = DampedNewton(
        model, curvature=curvature, route="sweep", metric=metric, weight_decay=c, metric_damping=rho
    )
    loss = closure_of(model, x, y)()
    step = _Step(optimizer, compute_layer_derivatives(model))
    candidates = step.exact_steps(curvature, [damping])
    found = candidates.steps[candidates.lengths.index(1.0)]
    product = hessian_vector_product(model, loss, found, curvature=curvature)
    product = product + (c + damping * (rho if metric == "state" else 1.0)) * found
    if metric == "state":
        penalties, start = [], 0
        for index, linear in enumerate(model.layers):
            a, d = len(linear.weight), linear.in_features + 1
            X, start = found[start : start + a * d], start + a * d
            X = torch.cat([X[: a * (d - 1)].view(a, d - 1), X[a * (d - 1) :].view(a, 1)], 1)
            penalty = torch.zeros_like(X)
            if index < len(model.layers) - 1:
                z = x
                for below in range(index):
                    z = model.activate(below, model.layers[below](z), z)
                inputs, Omega = torch.cat([z, torch.ones(len(z), 1)], 1), measured_omega(model, index, z)
                A = inputs.mT @ inputs / len(z)
                pi = (Omega.trace() / a / (A.trace() / min(d, len(z)))).sqrt()
                if len(z) >= d:
                    A = A + math.sqrt(rho) / pi * eye(d)
                penalty = damping * (Omega + math.sqrt(rho) * pi * eye(a)) @ X @ A
            penalties += [penalty[:, :-1].flatten(), penalty[:, -1]]
        product = product + torch.cat(penalties).detach()
    g = objective_gradient(model, x, y, c)
    assert relative(product + g, g) < 1e-6


def test_polishing_steps_solve_their_system():
    """With curvature='auto' the exact Hessian's: (H + cI + λρI + (λ/N) Σ S_ℓᵀS_ℓ) x = −g."""
    case, c, damping, rho = Case((6, 4, 7), 9), 0.02, 30.0, 1e-2
    model, x, y = case.build()
    optimizer = DampedNewton(model, metric="state", weight_decay=c, metric_damping=rho)
    loss = closure_of(model, x, y)()
    candidates = _Step(optimizer, compute_layer_derivatives(model)).exact_steps("hessian", [damping])
    found = candidates.steps[candidates.lengths.index(1.0)]
    product = hessian_vector_product(model, loss, found, state_damping=damping) + (c + damping * rho) * found
    g = objective_gradient(model, x, y, c)
    assert relative(product + g, g) < 1e-6


def test_quasi_newton_steps_are_those_of_bfgs():
    """−B⁻¹v with B the factored matrix after the updates B ← B − B s sᵀB / sᵀB s + y yᵀ / sᵀy, here dense."""
    case, c = Case((6, 4, 7), 9), 3.0
    model, x, y = case.build()
    B = dense_objective_hessian(model, x, y, c)
    assert torch.linalg.eigvalsh(B)[0] > 0
    P, pairs, closure = len(B), [], closure_of(model, x, y)
    closure()
    factorization = newton._definite_factorization(compute_layer_derivatives(model), c)
    for s, v in zip(random_vector(P, 3).T, random_vector(P, 4).T, strict=False):
        y = B @ s + (0.1 * v @ s) * v
        pairs.append((s, y, float(s @ y)))
    for s, y, along in pairs:
        B = B - torch.outer(B @ s, B @ s) / (s @ B @ s) + torch.outer(y, y) / along
    v = random_vector(P, 5)[:, 4]
    exact = torch.linalg.solve(B, v)
    assert relative(newton._quasi_newton(factorization, pairs, v) - exact, exact) < 1e-9


def test_a_deep_minimum_takes_few_factorizations(monkeypatch):
    """What one factorization gives is followed by quasi-Newton steps: without them it takes twice as many and more."""

    def steps(following: int, at_most: int) -> int:
        monkeypatch.setattr(newton, "_FOLLOWING", following)
        model, x, y = Case((6,) * 7, 20, inputs=4).build()
        optimizer = DampedNewton(model, weight_decay=1e-3)
        for step in range(at_most):
            optimizer.step(closure_of(model, x, y))
            if optimizer.converged:
                assert optimizer.report.certified
                return step
        return at_most

    ours = steps(newton._FOLLOWING, 100)
    assert ours < 100 and steps(0, 2 * ours) == 2 * ours


def test_second_order_correction():
    """−½ (JᵀΛJ + λI)⁻¹ JᵀΛ s₂ with s₂ by torch.func along x: to 2 %, the error of the one-sided difference."""
    case, damping = Case((6, 4), 9, loss="mse"), 300.0
    model, x, y = case.build()
    closure_of(model, x, y)()
    step = _Step(DampedNewton(model, metric="parameter", curvature="gauss_newton"), compute_layer_derivatives(model))
    found = step.gram_steps([damping])
    n = len(found.lengths) // 2
    at = found.lengths.index(1.0)
    ours, along = found.steps[n + at] - found.steps[at], found.steps[at]
    f, theta = flat_function(model, x)

    def slope(t: Tensor) -> Tensor:
        return torch.func.jvp(f, (theta + t * along,), (along,))[1]

    _, bend = torch.func.jvp(slope, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))
    weighted = torch.einsum("nab,nb->na", output_hessian(case), bend)
    right = torch.einsum("ncp,nc->p", logits_jacobian(case), weighted)
    exact = -0.5 * torch.linalg.solve(gauss_newton(case) + damping * eye(len(theta)), right)
    assert relative(ours - exact, exact) < 0.02


def test_weight_decay_is_that_of_the_objective():
    """At the end ∇(loss + ½c‖θ‖²) by autograd vanishes, and the dense Hessian of it is positive definite."""
    model, x, y = Case((6, 5), 20, inputs=4).build()
    optimizer = DampedNewton(model, weight_decay=0.05)
    for _ in range(300):
        optimizer.step(closure_of(model, x, y))
        if optimizer.converged:
            break
    assert optimizer.converged and optimizer.report.certified and optimizer.report.method == "none"
    assert objective_gradient(model, x, y, 0.05).norm() < 2e-12
    assert torch.linalg.eigvalsh(dense_objective_hessian(model, x, y, 0.05))[0] > 0
    before = parameters_of(model)
    optimizer.step(closure_of(model, x, y))
    assert torch.equal(before, parameters_of(model)) and optimizer.converged and not optimizer.stalled


def test_convergence_is_quadratic_at_a_minimum():
    """‖g‖ of the last Newton steps: each below a number times the square of the one before."""
    case, c = Case((6, 5), 20, inputs=4, loss="mse"), 0.05

    def norms(curvature: str, steps: int) -> list[float]:
        model, x, y = case.build()
        optimizer, found = DampedNewton(model, weight_decay=c, curvature=curvature), []
        while len(found) < steps and not optimizer.converged:
            optimizer.step(closure_of(model, x, y))
            found.append(optimizer.report.gradient_norm)
        return found

    ours = norms("auto", 200)
    assert ours[-1] < 1e-12
    assert all(b < 5000 * a**2 for a, b in zip(ours[-4:], ours[-3:], strict=False)), ours[-6:]
    # Gauss–Newton alone converges linearly there
    assert norms("gauss_newton", len(ours))[-1] > 1e-6


def saddle() -> tuple[DeepMLPWithTracking, Tensor, Tensor]:
    """All hidden weights zero: tanh units that do nothing, and a last bias that fits the mean. g = 0, H indefinite."""
    model = DeepMLPWithTracking(3, (5, 4), 2, 2, loss="mse").double()
    x = random_vector(3, 8).T.contiguous()
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        # one unit is passed on, so that the last layer's weight and the first's are coupled by λ
        model.layers[1].weight[0, 0] = 1.0
        model.layers[2].bias.copy_(y.mean(0))
    return model, x, y


def test_a_strict_saddle_is_left():
    model, x, y = saddle()
    assert objective_gradient(model, x, y, 0.0).norm() < 1e-12
    assert torch.linalg.eigvalsh(dense_objective_hessian(model, x, y, 0.0))[0] < -1e-2
    optimizer = DampedNewton(model)
    optimizer.step(closure_of(model, x, y))
    report = optimizer.report
    assert report.method == "saddle" and report.accepted and not optimizer.converged
    assert report.new_objective < report.objective - 1e-3
    for _ in range(60):
        optimizer.step(closure_of(model, x, y))
    assert optimizer.report.objective < 0.1 * report.objective


def test_a_saddle_is_left_where_the_gradient_is_small_only():
    """‖g‖ is above gtol, but a step along −g lowers f by nothing that can be seen."""
    model, x, y = saddle()
    with torch.no_grad():
        model.layers[2].bias += 1e-10
    optimizer = DampedNewton(model)
    optimizer.state[optimizer.param_groups[0]["params"][0]].update(polishing=True, decrease=0.0, gradient_norm=math.inf)
    optimizer.step(closure_of(model, x, y))
    report = optimizer.report
    assert 1e-12 < report.gradient_norm < 1e-9
    assert report.method == "saddle" and report.accepted and report.new_objective < report.objective - 1e-3


def test_gauss_newton_alone_stays_on_a_saddle_and_says_so():
    model, x, y = saddle()
    optimizer, before = DampedNewton(model, curvature="gauss_newton"), parameters_of(model)
    optimizer.step(closure_of(model, x, y))
    assert torch.equal(before, parameters_of(model))
    assert not optimizer.converged and optimizer.stalled and not optimizer.report.certified


def poison_trials(monkeypatch, value: float | None) -> None:
    """Logits that overflow wherever the parameters differ from the present ones."""

    def poisoned(self, theta: Tensor) -> Tensor:
        out = plain_logits(self, theta)
        moved = (theta.to(self.inputs.dtype) != self.theta.to(self.inputs.dtype)).any(1)
        return torch.where(moved[:, None, None], value, out)

    monkeypatch.setattr(newton.Objective, "logits", plain_logits if value is None else poisoned)


plain_logits = newton.Objective.logits


@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize(
    "options",
    ({}, {"curvature": "gauss_newton"}, {"curvature": "hessian"}, {"curvature_batch": 4}, {"route": "sweep"}),
    ids=str,
)
def test_a_step_that_finds_nothing_changes_nothing(options, poison, monkeypatch):
    torch.manual_seed(0)
    model = DeepMLPWithTracking(5, 4, 3, 2, loss="mse" if options == {} else "cross_entropy").double()
    x, y = random_vector(5, 6).T.contiguous(), torch.tensor([0, 1, 2, 0, 1, 2])
    y = torch.nn.functional.one_hot(y).double() if model.loss == "mse" else y
    optimizer = DampedNewton(model, **options)
    for _ in range(2):
        optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted
    poison_trials(monkeypatch, poison)
    before = parameters_of(model)
    for _ in range(3):  # in 'auto', the exact Hessian is tried too
        loss = optimizer.step(closure_of(model, x, y))
        assert torch.equal(before, parameters_of(model)) and not optimizer.report.accepted
        assert optimizer.report.objective == pytest.approx(loss.item(), rel=1e-12)
    poison_trials(monkeypatch, None)
    for _ in range(3):
        optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted or optimizer.converged
    assert model(x, y).item() < loss.item()


def test_one_bad_batch_does_not_end_gauss_newton(monkeypatch):
    torch.manual_seed(0)
    model = DeepMLPWithTracking(5, 4, 3, 2).double()
    x, y = random_vector(5, 6).T.contiguous(), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer, methods = DampedNewton(model), []
    for step in range(8):
        poison_trials(monkeypatch, math.nan if step == 2 else None)
        optimizer.step(closure_of(model, x, y))
        methods.append(optimizer.report.method)
    assert methods[2] == "gauss_newton" and methods[4] == "gauss_newton", methods


RESUMED = (
    (Case((6, 5), 14, inputs=4), {}, 12, {"gauss_newton"}),
    (Case((6, 5), 14, inputs=4), {"curvature_batch": 5, "weight_decay": 1e-3}, 12, {"gauss_newton"}),
    (Case((6, 5), 20, inputs=4), {"weight_decay": 0.05}, 31, {"gauss_newton", "hessian", "none"}),
    (Case((6, 5), 14, inputs=4), {"curvature": "hessian"}, 12, {"hessian"}),
    (Case((6, 5), 14, inputs=1, loss="mse"), {}, 12, {"gauss_newton"}),
)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("case, options, steps, methods", RESUMED, ids=str)
def test_a_run_goes_on_bit_for_bit(case, options, steps, methods, dtype):
    """Stopped after any step, stored, and loaded into a new model; and it repeats exactly."""

    def build(seed: int = 0):
        model, x, y = case.build(seed=seed)
        return model.to(dtype), x.to(dtype), y.to(dtype) if y.is_floating_point() else y

    model, x, y = build()
    optimizer, states, seen = DampedNewton(model, **options), [], set()
    for _ in range(steps):
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        optimizer.step(closure_of(model, x, y))
        seen.add(optimizer.report.method)
    if dtype == torch.float64:
        assert seen == methods
    end = parameters_of(model)
    for stop in (1, steps // 2, steps - 4, steps - 1):
        buffer = io.BytesIO()
        torch.save(states[stop], buffer)
        buffer.seek(0)
        parameters, state = torch.load(buffer, weights_only=True)
        second, _, _ = build(seed=1)
        second.load_state_dict(parameters)
        optimizer = DampedNewton(second, **options)
        optimizer.load_state_dict(state)
        torch.randn(3)  # the global generator is not read
        for _ in range(steps - stop):
            optimizer.step(closure_of(second, x, y))
        assert torch.equal(parameters_of(second), end)


def test_copies_go_on():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model)
    optimizer.step(closure_of(model, x, y))
    other, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, copied)):
        o.step(closure_of(m, x, y))
    assert torch.equal(parameters_of(model), parameters_of(other)) and copied.report == optimizer.report


def test_sub_batches_are_drawn_anew_and_the_gradient_is_of_all():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model, curvature_batch=5)
    drawn = []
    for _ in range(2):
        closure_of(model, x, y)()
        layers = compute_layer_derivatives(model)
        step = _Step(optimizer, layers)
        drawn.append(step.curvature_layers[0].inputs)
        g = objective_gradient(model, x, y, 0.0)
        assert relative(step.gradient - g, g) < 1e-12
        optimizer.step(closure_of(model, x, y))
    assert drawn[0].shape == (5, 5) and not torch.equal(*drawn)
    # a sub-batch is the batch of its own mean loss
    chosen = torch.tensor([0, 3, 4, 8, 11])
    closure_of(model, x, y)()
    part = _sub_batch(compute_layer_derivatives(model), chosen)
    closure_of(model, x[chosen], y[chosen])()
    for ours, exact in zip(part, compute_layer_derivatives(model), strict=True):
        for name in ("inputs", "slope", "curvature", "adjoint"):
            assert torch.allclose(getattr(ours, name), getattr(exact, name), rtol=1e-12, atol=1e-15)
    assert torch.allclose(part[-1].output.diagonal, compute_layer_derivatives(model)[-1].output.diagonal, rtol=1e-12)


@pytest.mark.parametrize("weight_decay", (0.0, 0.03))
@pytest.mark.parametrize("metric", ("state", "parameter"))
@pytest.mark.parametrize("route", ("gram", "sweep"))
@pytest.mark.parametrize("case, size", ((Case((6, 4, 7), 15, inputs=5), 4), (Case((6, 6, 4), 30, residual=True), 12)))
def test_conjugate_gradients_solve_with_the_curvature_of_the_whole_batch(
    case, size, route, metric, weight_decay, monkeypatch
):
    """Against a dense solve; and one iteration is along the exact step of the sub-batch."""
    monkeypatch.setattr(newton, "_CG_DONE", 1e-24)
    damping = 0.3
    model, loss = tracked_loss(case)
    options = {"route": route, "metric": metric, "curvature_batch": size, "weight_decay": weight_decay}
    for iterations in (1, 40):
        optimizer = DampedNewton(model, cg_iterations=iterations, **options)
        with torch.inference_mode():
            step = _Step(optimizer, compute_layer_derivatives(model))
            preconditioner = step.preconditioner(damping)
            x = step.conjugate_gradients(preconditioner)
            inverse = torch.stack([preconditioner.inverse(e) for e in eye(len(x))], 1)
            metric_matrix = torch.stack([preconditioner.metric(e) for e in eye(len(x))], 1)
            products = gauss_newton_product(step.curvature_layers, eye(len(x)))
        assert relative(inverse @ (products + metric_matrix) - eye(len(x)), eye(len(x))) < 1e-8
        assert torch.linalg.eigvalsh(metric_matrix - weight_decay * eye(len(x)))[0] > 0
        exact = -torch.linalg.solve(gauss_newton(case) + metric_matrix, step.gradient)
        if iterations == 40:
            assert relative(x - exact, exact) < 1e-9
        else:
            alone = -inverse @ step.gradient
            assert torch.nn.functional.cosine_similarity(x, alone, 0) > 1 - 1e-12
            assert relative(x - exact, exact) > 0.01  # that sub-batch is not the batch


def test_curvature_of_the_whole_batch_fits_more_samples():
    """120 samples, curvature from 8: thirty steps with products of all of them, and with those of the eight alone."""
    losses = {}
    for iterations in (0, 8):
        model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
        optimizer = DampedNewton(model, curvature_batch=8, cg_iterations=iterations, metric_damping=0.1)
        for _ in range(30):
            optimizer.step(closure_of(model, x, y))
        losses[iterations] = model(x, y).item()
    assert losses[8] < 0.2 * losses[0]


def test_damping_falls_only_where_conjugate_gradients_got_far():
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    for damping, falls in ((1.0, False), (10.0, True)):
        trained = copy.deepcopy(model)
        optimizer = DampedNewton(trained, curvature_batch=8, cg_iterations=3, damping=damping)
        optimizer.step(closure_of(trained, x, y))
        assert optimizer.report.length >= 1 and optimizer.report.num_trials == 1
        left = optimizer.state[optimizer.param_groups[0]["params"][0]]["damping"]
        assert (left < optimizer.report.damping) == falls


def test_conjugate_gradients_end_where_they_are_solved_for(monkeypatch):
    """At a large λ the preconditioner is all but the matrix: two iterations of eight, and λ falls."""
    model, x, y = Case((8, 8, 8), 120, inputs=6, classes=5).build()
    products, whole_product = [], _Step.whole_product
    monkeypatch.setattr(_Step, "whole_product", lambda self, v: products.append(v) or whole_product(self, v))
    optimizer = DampedNewton(model, curvature_batch=60, damping=1e3)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.num_trials == 1 and len(products) <= 2
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["damping"] == pytest.approx(0.3 * 1e3)
    # a single iteration can't tell whether it got far
    optimizer = DampedNewton(model, curvature_batch=60, cg_iterations=1)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["damping"] < 1


@pytest.mark.parametrize("wide", (False, True))
def test_on_the_same_data_conjugate_gradients_begin_with_the_last_step(wide, monkeypatch):
    """Three iterations: the quadratic's least point on the span of that step and of two preconditioned residuals."""
    monkeypatch.setattr(newton, "_CG_DONE", 0.0)
    monkeypatch.setattr(newton, "_WIDE_LAYER", 1 if wide else 2**20)
    model, x, y = Case((8, 6, 7), 7, inputs=50).build()
    optimizer = DampedNewton(model, curvature_batch=4, cg_iterations=3, seed=1)
    before = parameters_of(model)
    optimizer.step(closure_of(model, x, y))
    last = parameters_of(model) - before
    closure_of(model, x, y)()
    with torch.inference_mode():
        step = _Step(optimizer, compute_layer_derivatives(model))
        assert (step.span is not None) == wide
        last = step.span.shrink(last) if wide else last
        step.look_back()
        assert step.on_same_data and relative(step.last - last, last) < 1e-12
        preconditioner = step.preconditioner(0.1)
        for same in (True, False):
            step.last = last if same else None
            found = step.conjugate_gradients(preconditioner)

            def product(v):
                return gauss_newton_product(step.layers, v[:, None])[:, 0] + preconditioner.metric(v)

            basis = [last] if same else []
            exact, r = torch.zeros_like(found), -step.gradient
            assert optimizer.report.accepted
            while len(basis) < 3:
                basis += [] if same and exact.count_nonzero() == 0 else [preconditioner.inverse(r)]
                V = torch.stack(basis, 1)
                A = V.mT @ torch.stack([product(v) for v in basis], 1)
                exact = V @ torch.linalg.solve(A, -(V.mT @ step.gradient))
                r = -step.gradient - product(exact)
            assert relative(found - exact, exact) < 1e-8


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_steps_grow_longer_on_the_same_data_alone(dtype):
    """λ falls there, by 0.1, where a longer step than the solution was wanted, and rises by 3 where a shorter one."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    model, x, lengths, factors = model.to(dtype), x.to(dtype), {}, set()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for alternating in (False, True):
        trained, reports = copy.deepcopy(model), []
        optimizer = DampedNewton(trained, curvature_batch=16)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        for i in range(40):
            part = slice(i % 2, None, 2) if alternating else order if i % 2 else slice(None)  # in any order
            optimizer.step(closure_of(trained, x[part], y[part]))
            reports.append(optimizer.report)
            if not alternating and i > 0:
                factor = round(state["damping"] / optimizer.report.damping, 6)
                expected = {3.0} if optimizer.report.length < 1 else {1.0}
                assert factor in (expected | {0.1} if optimizer.report.length > 1 else expected)
                factors.add(factor)
        assert all(r.new_objective < r.objective for r in reports)
        lengths[alternating] = [r.length for r in reports]
    assert factors == {0.1, 1.0, 3.0}
    assert max(lengths[False]) >= 4 and max(lengths[True]) == 2


def test_a_step_that_is_lengthened_is_not_on_other_data():
    """The same step but for what the optimizer knows of the data of the one before."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer = DampedNewton(model, curvature_batch=16)
    while not optimizer.report or optimizer.report.length < 4:
        before = copy.deepcopy((model, optimizer))
        optimizer.step(closure_of(model, x, y))
    for data, longest in ((before[1].state[before[1].param_groups[0]["params"][0]]["data"], math.inf), ((), 2)):
        other, copied = copy.deepcopy(before)
        copied.state[copied.param_groups[0]["params"][0]]["data"] = data
        copied.step(closure_of(other, x, y))
        assert 2 <= copied.report.length <= longest
        assert (copied.report == optimizer.report) == (longest > 2)


def test_data_are_known_again_by_what_is_in_them():
    """Also where all sums of inputs are alike, as with one-hot rows, and where the targets alone differ."""
    x, y = eye(5)[[0, 1, 2, 2, 3, 4]], torch.tensor([0, 1, 2, 0, 1, 2])
    same = newton._fingerprint(x, y)
    assert newton._fingerprint(x.flip(0), y.flip(0)) == pytest.approx(same, rel=1e-12)
    for other in ((x[[1, 1, 2, 2, 3, 4]], y), (x, y[[1, 0, 2, 3, 4, 5]]), (x[:5], y[:5])):
        assert max(abs(a / b - 1) for a, b in zip(newton._fingerprint(*other), same, strict=True)) > 1e-3
    rows = torch.nn.functional.one_hot(y).double()
    for other in (rows[[1, 0, 2, 3, 4, 5]], 0.9 * rows + 0.1 / 3):
        assert newton._fingerprint(x, other) != pytest.approx(newton._fingerprint(x, rows), rel=1e-3)


def test_a_useless_preconditioner_is_not_hidden_by_the_last_step(monkeypatch):
    """Where P⁻¹r is NaN, or rᵀP⁻¹r negative, the step asks for a larger λ; and a last step of no use is left out."""
    inverse = newton.GramSystem.inverse
    for broken in (lambda v: v * math.nan, lambda v: -v):
        model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
        optimizer = DampedNewton(model, curvature_batch=16)
        for _ in range(4):
            optimizer.step(closure_of(model, x, y))
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        below = 10 * state["damping"]

        def at(gram, damped, v, below=below, broken=broken):
            return broken(v) if damped.damping < below else inverse(gram, damped, v)

        with monkeypatch.context() as patch:
            patch.setattr(newton.GramSystem, "inverse", at)
            optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted and optimizer.report.damping >= below
        for last in (math.nan, 0.0):
            state["last"] = torch.full_like(state["last"], last)
            optimizer.step(closure_of(model, x, y))
            assert optimizer.report.accepted and optimizer.report.num_trials == 1


@pytest.mark.parametrize("iterations", (1, 2))
def test_few_iterations_do_not_begin_with_the_last_step(iterations, monkeypatch):
    """Nothing would be left that tells how far they get."""
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer = DampedNewton(model, curvature_batch=40, cg_iterations=iterations)
    conjugate_gradients, residuals = _Step.conjugate_gradients, []

    def recorded(step, preconditioner):
        x = conjugate_gradients(step, preconditioner)
        residuals.append(step.cg_residual)
        return x

    monkeypatch.setattr(_Step, "conjugate_gradients", recorded)
    for _ in range(12):
        optimizer.step(closure_of(model, x, y))
    assert all((r == 0) == (iterations == 1) for r in residuals)


def test_a_residual_that_is_no_number_is_not_solved(monkeypatch):
    model, x, y = Case((8, 8), 60, inputs=6, classes=5).build()
    optimizer, calls, inverse = DampedNewton(model, curvature_batch=16), [], newton.GramSystem.inverse
    monkeypatch.setattr(
        newton.GramSystem,
        "inverse",
        lambda gram, damped, v: inverse(gram, damped, v) * (math.nan if calls else calls.append(v) or 1.0),
    )
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.accepted and optimizer.report.num_trials == 1 and optimizer.report.length >= 1
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["damping"] == optimizer.report.damping


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_whole_products_are_of_the_models_dtype(monkeypatch, dtype):
    model = DeepMLPWithTracking(6, 8, 3, 4).to(dtype)
    x, y, seen = random_vector(12, 6).to(dtype), torch.arange(12) % 3, set()
    monkeypatch.setattr(
        newton, "gauss_newton_product", lambda layers, v: seen.add(v.dtype) or gauss_newton_product(layers, v)
    )
    DampedNewton(model, curvature_batch=4).step(closure_of(model, x, y))
    assert seen == {dtype}


def test_damping_comes_down_from_where_it_promises_nothing():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model, curvature_batch=5, damping=1e16)
    before = model(x, y).item()
    for _ in range(50):
        optimizer.step(closure_of(model, x, y))
    assert model(x, y).item() < 0.5 * before


def test_damping_comes_back_from_that_of_data_that_were_fitted():
    """λ of 1e-50, and then other samples: the λ that none of twelve was enough for is where the next step begins."""
    for options in (
        {"curvature_batch": 4, "cg_iterations": 8},
        {"curvature_batch": 4, "cg_iterations": 1},
        {"curvature": "gauss_newton", "route": "gram"},
        {"curvature": "gauss_newton", "route": "sweep"},
        {"curvature": "hessian"},
    ):
        model, x, y = Case((8, 8), 24, inputs=6).build()
        optimizer = DampedNewton(model, **options)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state["damping"] = state["hessian_damping"] = 1e-50
        accepted = []
        for _ in range(3):
            optimizer.step(closure_of(model, x, y))
            accepted.append(optimizer.report.accepted)
        assert accepted[-1]


def test_the_least_damping_falls_with_the_loss_and_comes_back():
    """Below a loss of 1e-30 a λ of 1e-30 would be all that counts: steps along the gradient. Of other data λ is not
    that of those that were fitted."""
    model, x, y = Case((8, 8), 12, inputs=6).build()
    optimizer = DampedNewton(model, curvature_batch=8, gtol=0.0)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    for _ in range(85):
        optimizer.step(closure_of(model, x, y))
    assert accurate_loss(model.loss, model(x)[None], y).item() < 1e-36
    assert state["damping"] < 1e-36
    fitted = copy.deepcopy(model.state_dict())
    _, x, y = Case((8, 8), 12, inputs=6).build(seed=1)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.damping > 1e-15  # twelve trials from 1e-30, or fewer and accepted
    for options in (
        {"curvature_batch": 8},
        {"curvature": "gauss_newton", "route": "gram", "cg_iterations": 0},
        {"curvature": "gauss_newton", "route": "sweep", "cg_iterations": 0},
        {"curvature": "hessian"},
    ):
        model.load_state_dict(fitted)
        optimizer = DampedNewton(model, **options)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state["damping"] = state["hessian_damping"] = 1e-40
        for _ in range(6):
            optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted


def test_no_inputs_leave_nothing_to_balance():
    of_Omega, of_A = split_damping(eye(3), torch.zeros(4, 2, dtype=torch.float64), 0.01)
    assert of_Omega.item() == of_A.item() == pytest.approx(0.1)


def test_a_checkpoint_of_before_conjugate_gradients_goes_on_without_them():
    model, x, y = Case((6, 5), 14, inputs=4).build()
    optimizer = DampedNewton(model, curvature_batch=5, cg_iterations=0)
    state = optimizer.state_dict()
    del state["param_groups"][0]["cg_iterations"], state["state"][0]["data"]
    optimizer = DampedNewton(model, curvature_batch=5)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["cg_iterations"] == 0
    optimizer.step(closure_of(model, x, y))
    optimizer.param_groups[0]["cg_iterations"] = 8
    for _ in range(2):
        optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted


def test_accurate_loss():
    model, x, y = Case((4,), 6).build()
    h = random_vector(6, 3)
    assert accurate_loss(model.loss, h[None], y)[0].item() == pytest.approx(loss_value(model.loss, h, y).item(), rel=1e-14)
    h = torch.zeros(6, 3, dtype=torch.float64).scatter(1, y[:, None], 50.0)
    assert accurate_loss(model.loss, h[None], y)[0].item() == pytest.approx(2 * math.exp(-50), rel=1e-12)
    assert accurate_loss(model.loss, -40 * h[None], y)[0].item() == pytest.approx(2000 + math.log(2), rel=1e-12)
    soft = torch.softmax(random_vector(6, 3), 1)
    assert accurate_loss(model.loss, h[None], soft)[0].item() == pytest.approx(loss_value(model.loss, h, soft).item(), rel=1e-12)


WIDE = Case((7, 6), 9, inputs=60, classes=4)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("size", (None, 5))
@pytest.mark.parametrize(
    "options",
    [{"route": "sweep"}, {"curvature": "hessian"}, {"metric": "parameter"}, {"metric": "parameter", "route": "sweep"}],
    ids=str,
)
def test_a_wide_first_layer_moves_in_the_span_of_its_inputs(monkeypatch, options, size, bias):
    """The same steps as in all its weights, earlier steps and decay included."""

    def trained(wide: int) -> tuple[Tensor, list]:
        monkeypatch.setattr(newton, "_WIDE_LAYER", wide)
        model, x, y = WIDE._replace(bias=bias).build()
        optimizer, reports = DampedNewton(model, curvature_batch=size, weight_decay=1e-2, **options), []
        for _ in range(5):
            optimizer.step(closure_of(model, x, y))
            reports.append(optimizer.report)
        return parameters_of(model), reports

    (all_weights, expected), (in_span, found) = trained(2**20), trained(1)
    assert relative(in_span - all_weights, all_weights) < 1e-11
    for a, b in zip(expected, found, strict=True):
        assert a[:2] + a[5:] == b[:2] + b[5:] and a[2:5] == pytest.approx(b[2:5], rel=1e-11)


def test_a_wide_first_layer_is_polished_to_a_certified_minimum(monkeypatch):
    """With curvature='auto': the gradients on the way there are taken in the span, too."""
    monkeypatch.setattr(newton, "_WIDE_LAYER", 1)
    model, x, y = WIDE.build()
    optimizer, methods = DampedNewton(model, weight_decay=1e-2), set()
    for _ in range(200):
        optimizer.step(closure_of(model, x, y))
        methods.add(optimizer.report.method)
        if optimizer.converged:
            break
    assert "hessian" in methods and optimizer.report.certified
    assert torch.linalg.vector_norm(objective_gradient(model, x, y, 1e-2)) < 1e-11


def test_quasi_newton_steps_learn_from_the_steps_that_were_taken(monkeypatch):
    """Each pair is a step and what it did to the gradient, from where the one before ended."""
    model, x, y = Case((6, 5), 20, inputs=4, loss="mse").build()
    optimizer, seen, finished = DampedNewton(model, weight_decay=0.05), [], []
    quasi_newton, followed = newton._quasi_newton, _Step.followed

    def recorded(factorization, pairs, v):
        seen[:] = [(s.clone(), change.clone()) for s, change, _ in pairs]
        return quasi_newton(factorization, pairs, v)

    def traced(step, best):
        seen.clear()
        end = followed(step, best)
        at = step.theta.clone()
        for s, change in seen:
            after = at + s
            exact = step.objective.gradient(after) - step.objective.gradient(at)
            assert relative(change - exact, exact) < 1e-8
            at = after
        finished.append(len(seen))
        return end

    monkeypatch.setattr(newton, "_quasi_newton", recorded)
    monkeypatch.setattr(_Step, "followed", traced)
    while not (finished and finished[-1] >= 3):
        optimizer.step(closure_of(model, x, y))
        assert not optimizer.converged


def test_a_wide_first_layer_by_the_gram_route(monkeypatch):
    monkeypatch.setattr(newton, "_WIDE_LAYER", 1)
    model, x, y = WIDE.build()
    optimizer = DampedNewton(model, route="gram")
    losses = [optimizer.step(closure_of(model, x, y)).item() for _ in range(8)]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("route", ["gram", "sweep"])
def test_what_a_step_leaves_can_be_differentiated(route):
    torch.manual_seed(0)
    model = DeepMLPWithTracking(5, 4, 3, 3).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    optimizer = DampedNewton(model, route=route)
    loss = optimizer.step(lambda: model(x, y, track_activations=True))
    assert optimizer.report.accepted
    kept = [loss, *model.parameters(), *optimizer.state_dict()["state"][0].values()]
    assert not any(t.is_inference() for t in kept if isinstance(t, torch.Tensor))
    model(x, y).backward()


@pytest.mark.parametrize(
    "case, options, route",
    (
        (Case((16,) * 10, 24, inputs=16, classes=8), {"route": "gram"}, "gram"),
        (Case((16,) * 10, 24, inputs=16, classes=8), {"route": "sweep"}, "sweep"),
        (Case((12,) * 8, 20, inputs=4096, classes=300), {"curvature_batch": 6}, "sweep"),
        (Case((12,) * 8, 400, inputs=12, classes=3), {"curvature_batch": 4}, "gram"),
        (Case((4, 4), 60, inputs=4, classes=3), {"curvature": "hessian", "metric": "parameter"}, "dense"),
    ),
)
def test_a_step_is_estimated_by_its_operations(monkeypatch, case, options, route):
    """To 25 % of what is counted in it; on the meta device as on the model itself."""
    monkeypatch.setattr(newton, "_SWEEP_RATE", 1.0)
    monkeypatch.setattr(newton, "_WIDE_LAYER", 1000)
    monkeypatch.setattr(newton, "_CG_DONE", 0.0)  # all iterations
    model, x, y = case.build()
    optimizer = DampedNewton(model, damping=1e3, **options)
    counted = counted_operations(lambda: optimizer.step(closure_of(model, x, y)))
    cost = optimizer.estimate_step(len(x), optimizer.report.num_trials)
    assert cost.route == route and optimizer.report.num_trials == cost.num_dampings
    assert cost.operations == pytest.approx(counted, rel=0.25)
    assert DampedNewton(model.to("meta"), damping=1e3, **options).estimate_step(len(x), cost.num_dampings) == cost


def test_metric_is_chosen_by_the_inputs():
    one, many = DeepMLPWithTracking(1, 4, 1, 2, loss="mse"), DeepMLPWithTracking(2, 4, 1, 2, loss="mse")
    assert DampedNewton(one).param_groups[0]["metric"] == "parameter"
    assert DampedNewton(many).param_groups[0]["metric"] == "state"


def test_route_is_chosen_by_counted_operations():
    def by_gram(case: Case) -> bool:
        model, _ = tracked_loss(case)
        return _Step(DampedNewton(model), compute_layer_derivatives(model)).by_gram()

    assert by_gram(Case((16, 16, 16), 20, inputs=16, classes=2))
    assert not by_gram(Case((3, 3, 3), 20, inputs=3, classes=40))


def test_a_float32_model_trains_in_its_own_dtype():
    torch.manual_seed(0)
    model = DeepMLPWithTracking(6, 8, 3, 4)
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    optimizer = DampedNewton(model)
    losses = [optimizer.step(closure_of(model, x, y)).item() for _ in range(8)]
    assert losses[-1] < 1e-3 * losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


def test_wrong_optimizer_arguments():
    model, x, y = Case((4,), 3).build()
    raises(TypeError, "must be a DeepMLPWithTracking, got Linear", DampedNewton, torch.nn.Linear(2, 2))
    raises(ValueError, "unknown curvature 'fisher'", DampedNewton, model, curvature="fisher")
    raises(ValueError, "unknown metric", DampedNewton, model, metric="euclidean")
    raises(ValueError, "unknown route", DampedNewton, model, route="dense")
    raises(ValueError, "curvature_batch must be an integer ≥ 1", DampedNewton, model, curvature_batch=0)
    raises(
        TypeError,
        "closure must return the loss, got NoneType: .* `return model",
        DampedNewton(model).step,
        lambda: None,
    )
    raises(ValueError, "route='gram' has the Gauss–Newton", DampedNewton, model, route="gram", curvature="hessian")
    raises(ValueError, "weight_decay", DampedNewton, model, weight_decay=-1.0)
    raises(ValueError, "damping must be positive", DampedNewton, model, damping=0.0)
    raises(ValueError, "curvature_batch must", DampedNewton, model, curvature_batch=True)
    raises(ValueError, "cg_iterations must be an integer ≥ 0, .* got -1", DampedNewton, model, cg_iterations=-1)
    optimizer = DampedNewton(model)
    optimizer.param_groups[0]["route"] = "dense"
    raises(ValueError, "unknown route 'dense'", optimizer.step, closure_of(model, x, y))
    optimizer = DampedNewton(model)
    replaced, _, _ = Case((4,), 3).build()
    model.layers[0] = replaced.layers[0]
    raises(ValueError, "other parameters than at construction", optimizer.step, closure_of(model, x, y))
    optimizer = DampedNewton(model)
    raises(ValueError, "one parameter group", optimizer.add_param_group, {"params": []})
    tracked = model(x, y, track_activations=True)
    raises(ValueError, "not the loss that the model tracked", optimizer.step, lambda: model(x, y))
    assert tracked.requires_grad


def test_options_may_be_changed_on_the_way():
    """As for any optimizer, in param_groups: Gauss–Newton asked for in the middle of a polish."""
    case = Case((6, 5), 20, inputs=4, loss="mse")
    model, x, y = case.build()
    optimizer = DampedNewton(model, weight_decay=0.05)
    while optimizer.report is None or optimizer.report.method != "hessian":
        optimizer.step(closure_of(model, x, y))
    optimizer.param_groups[0]["curvature"] = "gauss_newton"
    optimizer.step(closure_of(model, x, y))
    assert optimizer.report.method == "gauss_newton"


def test_no_exact_hessian_beyond_its_memory(monkeypatch):
    monkeypatch.setattr(newton, "_EXACT_BYTES", 0)
    monkeypatch.setattr(_Step, "is_dense", lambda self: False)
    model, x, y = Case((6, 5), 20, inputs=4, loss="mse").build()
    optimizer, methods = DampedNewton(model, weight_decay=0.05, gtol=1e-6), set()
    for _ in range(200):
        optimizer.step(closure_of(model, x, y))
        methods.add(optimizer.report.method)
        if optimizer.converged:
            break
    assert optimizer.converged and not optimizer.report.certified and methods == {"gauss_newton", "none"}

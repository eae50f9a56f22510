"""The trust-region step, and factorizations that stop early.

Oracles: H by torch.func. The best decrease by a dense eigendecomposition and Lagrangian duality: the maximum over λ of
−½ gᵀ(A + λI)⁻¹g − ½ λΔ², which has no hard case. Everything is in float64 and seeded; neighbouring widths are unequal.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from _hessian import trust_region
from _hessian.layers import with_curvature
from _hessian.refinement import Refined
from hessian import (
    DeepMLPWithTracking,
    HessianFactorization,
    SingularHessianError,
    compute_layer_derivatives,
    factorize_hessian,
)
from newton import TrustRegionStep, trust_region_step
from tests.oracles import (
    Case,
    case_id,
    chain,
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
    """A network after some steps of Adam on its loss + ½w‖θ‖²."""

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

    model: DeepMLPWithTracking
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
    """The gradient, a random vector, one in the hard case, one nearly in it, and zero."""
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
    if problem not in INDEFINITE:  # λ_min ≥ 0 is no hard case, and so small a part near the null space is not used
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
    """The decrease is that of the best step, within rtol, and the fields are true."""
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


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS, ids=problem_id)
def test_global_optimum(problem):
    """All vectors, tiny to huge radii, both routes."""
    d = dense(problem)
    for (name, radius, _), step in steps(problem).items():
        g = vectors(problem)[name]
        check_step(step, d, g, radius)
        error = d.A @ step.step + step.damping * step.step + g
        assert error.norm() <= 0.01 * (g.norm() + step.damping * radius)  # √rtol


@pytest.mark.slow
def test_the_problems_have_every_case():
    """Interior, boundary and hard steps, and curvature of either sign. Else the test above would test less."""
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
    """g is orthogonal to the eigenspace of λ_min, the ball is large: λ = −λ_min, and p is mostly the eigenvector."""
    d, U = dense(problem), dense(problem).lowest()
    for route in ("sweep", "dense"):
        step = steps(problem)["hard", 1e5, route]
        assert step.hard_case and step.on_boundary
        assert step.damping == pytest.approx(-float(d.eigenvalues[0]), rel=1e-5)
        assert (U.T @ step.step).norm() > 0.99 * step.step.norm()
        assert not steps(problem)["gradient", 1.0, route].hard_case


def test_hard_case_takes_the_lower_sign():
    """T = diag(−1, 1, 2): y = −c/(T + 1) off the eigenvector. The part along it goes against the slope."""
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
    """Where A is definite and the ball large, p = −A⁻¹g: near a minimum with an L2 term, and for a convex loss."""
    for problem in PROBLEMS[8:10]:
        d = dense(problem)
        step = steps(problem)["gradient", 1e5, "sweep"]
        assert not step.on_boundary and step.damping <= 1.01e-10 * d.norm
        assert relative(step.step + torch.linalg.solve(d.A, d.gradient), step.step) <= 1e-4


@pytest.mark.slow
def test_tighter_proof():
    problem = PROBLEMS[10]
    d = dense(problem)
    for name, g in vectors(problem).items():
        for radius in (0.1, 10.0):
            step = trust_region_step(d.model, d.loss, g, radius, rtol=1e-9)
            check_step(step, d, g, radius, rtol=2e-9)
            assert step.num_factorizations <= 5, name


# ----------------------------------------------------------------------------------------------- search and proof


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS[6:14:2] + PROBLEMS[11:12], ids=problem_id)
def test_a_poor_search_is_found_out(problem, monkeypatch):
    """A Krylov space of 3 blocks misses λ_min. The factorizations tell, and the step is still the best one."""
    search = functools.partial(trust_region._krylov_space, max_blocks=3)
    monkeypatch.setattr(trust_region, "_krylov_space", search)
    d, counts = dense(problem), []
    for g in vectors(problem).values():
        for radius in (0.1, 10.0, 1e5):
            step = trust_region_step(d.model, d.loss, g, radius, weight_decay=problem.weight_decay)
            check_step(step, d, g, radius)
            counts.append(step.num_factorizations)
    assert torch.tensor(counts).median() <= 5
    assert max(counts) > 1.5 or d.eigenvalues[0] > -1e-12 * d.norm


def test_inaccurate_solves_prove_nothing(monkeypatch):
    """Solves that are off by 1 % widen the gap: an error is raised."""
    refined = HessianFactorization._refined

    def inaccurate(self: HessianFactorization, v: Tensor, rtol: float) -> Refined:
        return Refined(1.01 * refined(self, v, rtol).x, torch.full(v.shape[1:], 0.01, dtype=torch.float64))

    monkeypatch.setattr(HessianFactorization, "_refined", inaccurate)
    d = dense(PROBLEMS[9])
    with pytest.raises(SingularHessianError, match="not proved to rtol=0.0001.*Pass a larger rtol"):
        trust_region_step(d.model, d.loss, d.gradient, 1e5, weight_decay=0.3)


def test_rounding_near_zero(monkeypatch):
    """A is semidefinite, and its Cholesky factorization fails up to some λ.

    Up to 1e-8 ‖A‖ that is rounding, and this λ stands for 0. Up to 1e-4 ‖A‖ it is not taken for rounding.
    """
    d, factorize = dense(PROBLEMS[8]), trust_region.factorize_definite
    for least, proved in ((1e-8, True), (1e-4, False)):

        def failing(system, damping, route, H=None, least=least * d.norm):
            return factorize(system, damping, route, H) if damping > least else (None, 1.0)

        monkeypatch.setattr(trust_region, "factorize_definite", failing)
        if proved:
            step = trust_region_step(d.model, d.loss, d.gradient, 1e5)
            check_step(step, d, d.gradient, 1e5)
            assert step.num_factorizations <= 8
        else:
            raises(SingularHessianError, "not proved", trust_region_step, d.model, d.loss, d.gradient, 1e5)


# ------------------------------------------------------------------------------------------------------ interface


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_modified_curvature(curvature, mu):
    """Layers with a state damping or Gauss–Newton curvature, and an L2 term: what the optimizer passes."""
    for case in (Case((9, 8, 11), 6), Case((6, 4, 7), 15)):
        model, loss = tracked_loss(case)
        g, w = gradient(model, loss), 1e-3
        A = dense_hessian(case, curvature) + mu * dense_state_form(case)
        A = A + w * torch.eye(len(g), dtype=torch.float64)
        d = Dense(model, loss, g, A, *torch.linalg.eigh(0.5 * (A + A.T)))
        layers = with_curvature(compute_layer_derivatives(model), curvature, mu)
        for radius in (0.1, 1.0, 100.0):
            check_step(trust_region.solve_trust_region(chain(layers), g, radius, w), d, g, radius)


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
        raises(ValueError, "radius must be positive and finite", trust_region_step, model, loss, g, radius)
    raises(ValueError, f"shape \\({len(g)},\\)", trust_region_step, model, loss, g[1:], 1.0)
    raises(ValueError, "one at a time", trust_region_step, model, loss, g[:, None], 1.0)
    raises(ValueError, "NaN", trust_region_step, model, loss, g * math.nan, 1.0)
    raises(TypeError, "float32 or float64", trust_region_step, model, loss, g.half(), 1.0)
    raises(ValueError, "weight_decay must be", trust_region_step, model, loss, g, 1.0, weight_decay=-1e-3)
    raises(ValueError, "rtol", trust_region_step, model, loss, g, 1.0, rtol=0.0)
    raises(ValueError, "route", trust_region_step, model, loss, g, 1.0, route="gram")
    raises(ValueError, "tracked last", trust_region_step, model, loss + 0, g, 1.0)


# ---------------------------------------------------------------------------------- factorizations that stop early


@pytest.mark.slow
@pytest.mark.parametrize("case", [p.case for p in PROBLEMS[:8]] + [Case((6,), 2, classes=40, inputs=30)], ids=case_id)
def test_definite_factorizations(case):
    """Where A + εI is definite, the factorization that an early stop doesn't change; else the share that was done."""
    model, loss = tracked_loss(case)
    system, eigenvalues = chain(compute_layer_derivatives(model)), torch.linalg.eigvalsh(dense_hessian(case))
    v, shares = random_vector(num_parameters(model)), []
    lowest = float(eigenvalues[0].clamp(max=-1e-7))
    for factor in (1e-3, 0.1, 0.5, 0.999, 1.001, 2.0, 100.0):
        damping = -factor * lowest
        definite = bool(eigenvalues[0] + damping > 0)
        for route in ("sweep", "dense"):
            f, share = trust_region.factorize_definite(system, damping, route)
            assert (f is not None) == definite
            if definite:
                whole = factorize_hessian(model, loss, damping, route=route)
                assert share == 1.0 and torch.equal(f._direct(v[:, None]), whole._direct(v[:, None]))
            elif route == "sweep":
                shares.append(share)
    if eigenvalues[0] < -1e-7:
        assert all(0 < share <= 1 for share in shares) and shares == sorted(shares)


def test_an_early_stop_saves_what_it_says():
    """The share of operations, against torch's counter. A stop in a layer near the output is cheap."""
    model, loss = tracked_loss(Case((9, 8, 11) * 4, 6, inputs=7, classes=5))
    system = chain(compute_layer_derivatives(model))
    lowest = float(torch.linalg.eigvalsh(system.dense())[0])
    whole = counted_operations(lambda: trust_region.factorize_definite(system, -1.01 * lowest, "sweep"))
    shares = []
    for factor in (0.9, 0.1, 0.01, 1e-3):
        found = []
        done = counted_operations(
            lambda e=-factor * lowest, out=found: out.append(trust_region.factorize_definite(system, e, "sweep"))
        )
        ((f, share),) = found
        assert f is None and share == pytest.approx(done / whole, rel=0.25, abs=0.02)
        shares.append(share)
    assert shares[-1] < 0.5


def test_dense_matrix_given():
    """A Hessian that was formed before is used, and not changed."""
    model, loss = tracked_loss(Case((6, 4, 7), 15))
    system, H = chain(compute_layer_derivatives(model)), dense_hessian(Case((6, 4, 7), 15))
    H, v = H.clone(), random_vector(len(H))
    damping = 1.0 - float(torch.linalg.eigvalsh(H)[0])
    given = 2 * H + damping * torch.eye(len(H)).double()
    f, _ = trust_region.factorize_definite(system, damping, "dense", given)
    solved = f._direct(v[:, None])[:, 0]
    assert relative(2 * H @ solved + 2 * damping * solved - v, v) <= 1e-12
    before = H.clone()
    trust_region.factorize_definite(system, damping, "dense", H)
    assert torch.equal(H, before)

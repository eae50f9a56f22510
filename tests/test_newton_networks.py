"""`DampedNewton` and `trust_region_step` on networks of one's own, against dense matrices by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from _hessian import network
from _hessian.graph_gram import state_scales
from _hessian.newton_problem import NetworkProblem
from _hessian.newton_step import NewtonStep
from _hessian.newton_systems import ConjugateGradients, FactoredSteps, GramSteps
from benchmarks.example_networks import EXAMPLES, GPT, Example, TwoInputs, build
from hessian import TrackedNetwork
from newton import DampedNewton, trust_region_step
from tests.newton_oracles import Closure, eye, parameters_of, problem_of, state_of
from tests.oracles import random_vector, relative
from tests.test_networks import oracle


def lenet() -> nn.Module:
    """Smooth, so that it has minima."""
    first = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


CASES = {name: EXAMPLES[name] for name in ("residual", "autoencoder", "weighted", "a function", "recurrent")}
CASES |= {
    "lenet": Example(lenet, (1, 6, 6), 3, 6),
    "a sum": Example(lenet, (1, 6, 6), 3, 6, nn.CrossEntropyLoss(reduction="sum")),
    "gpt": Example(lambda: GPT(1, 2, 1, 3, 4), (3,), 4, 2),
    "gpt, tied": Example(lambda: GPT(1, 4, 2, 3, 5, tied=True), (3,), 5, 2),
    "gpt, half frozen": EXAMPLES["gpt, half frozen"],
}
QUICK = ("lenet", "gpt, tied", "two inputs", "autoencoder")


def model_of(name: str) -> tuple[TrackedNetwork, Tensor | tuple[Tensor, ...], Tensor]:
    torch.manual_seed(0)
    if name == "two inputs":
        return TrackedNetwork(TwoInputs().double()), (random_vector(5, 4), random_vector(5, 5)), torch.arange(5) % 4
    net, x, y = build(CASES[name])
    loss = CASES[name].loss
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    return TrackedNetwork(net, loss, class_dim=-1 if name.startswith("gpt") else None), x, y


def closure_of(model: TrackedNetwork, x: Tensor | tuple[Tensor, ...], y: Tensor) -> Closure:
    return lambda: model(x, y, track_activations=True)


def trainable(model: TrackedNetwork) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def objective(model: TrackedNetwork, x: Tensor | tuple[Tensor, ...], y: Tensor, weight_decay: float) -> Tensor:
    return model(x, y) + 0.5 * weight_decay * sum(p.square().sum() for p in trainable(model))


def gradient(model: TrackedNetwork, x: Tensor | tuple[Tensor, ...], y: Tensor, weight_decay: float = 0.0) -> Tensor:
    f = objective(model, x, y, weight_decay)
    return torch.cat([g.flatten() for g in torch.autograd.grad(f, trainable(model))])


def jacobian(outputs: list[Tensor], model: TrackedNetwork) -> Tensor:
    """Of all their entries, (n, P), one after another."""
    rows = []
    for entry in torch.cat([z.flatten() for z in outputs]):
        found = torch.autograd.grad(entry, trainable(model), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def gauss_newton(model: TrackedNetwork, x: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
    outputs = model(x)
    J = jacobian([outputs], model)
    of_loss = torch.autograd.functional.hessian(lambda h: model.loss_value(h, y), outputs.detach())
    return J.T @ of_loss.reshape(len(J), len(J)) @ J


class AffineOutputs(TorchFunctionMode):
    """Records them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        z = function(*args, **(kwargs or {}))
        if function in (F.linear, F.conv2d, F.embedding):
            self.found.append(z)
        return z


def state_matrix(model: TrackedNetwork, x: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Σ SᵀS/N over the outputs of affine operations, but the last."""
    with AffineOutputs() as outputs:
        last = model(x)
    S = jacobian([z for z in outputs.found if z.requires_grad and z is not last], model)
    return S.T @ S / len(last)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*CASES, "two inputs")],
)
def test_every_system_is_solved(name, monkeypatch):
    """The gradient; both curvatures and metrics, by H and by elimination, and an indefinite matrix refused.

    Then two steps that lower f, and leave frozen parameters alone.
    """
    model, x, y = model_of(name)
    c, rho, damping = 0.01, 0.3, 0.7
    g = gradient(model, x, y, c)
    curvatures = {"gauss_newton": gauss_newton(model, x, y), "hessian": oracle(model, x, y)}
    assert torch.linalg.eigvalsh(curvatures["hessian"])[0] < -c
    S, routes = state_matrix(model, x), set()
    for metric, D in (("parameter", eye(len(g))), ("state", rho * eye(len(g)) + S)):
        optimizer = DampedNewton(model, metric=metric, metric_damping=rho, weight_decay=c, curvature="gauss_newton")
        problem = problem_of(optimizer, closure_of(model, x, y))
        assert relative(problem.gradient - g, g) <= 1e-12
        for curvature, G in curvatures.items():
            A = G + c * eye(len(g)) + (100 * eye(len(g)) if curvature == "hessian" else damping * D)  # definite
            expected = torch.linalg.solve(A, -g)
            for few in (500, 0):
                monkeypatch.setattr(network, "FEW_PARAMETERS", few)
                systems = FactoredSteps(problem, curvature)
                solution = systems.solve(100 if curvature == "hessian" else damping)
                assert solution is not None and relative(solution.x - expected, expected) <= 1e-5, (metric, curvature)
                if curvature == "hessian":
                    routes.add(systems.factorized(100).route)
                    assert systems.factorized(0.0) is None
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        for _ in range(2):
            before = objective(model, x, y, c).item()
            optimizer.step(closure_of(model, x, y))
            assert optimizer.report.accepted and objective(model, x, y, c).item() < before
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        model, x, y = model_of(name)  # as it was
    assert bool(frozen) == (name == "gpt, half frozen") and routes == {"dense", "sweep"}


def gram_metric(problem: NetworkProblem, rho: float) -> Tensor:
    """D (P,), as the system has it."""
    program = problem.system("gauss_newton").program
    scales = state_scales(program) if problem.options.metric == "state" else [1.0] * len(program.parameters)
    of_all = 0.0 if problem.options.metric == "parameter" else rho
    sizes = torch.tensor(list(program.parameters.values()))
    return (torch.tensor(scales, dtype=torch.float64) + of_all).repeat_interleave(sizes)


@pytest.mark.parametrize("c", [0.0, 0.01])
@pytest.mark.parametrize("metric", ["parameter", "state"])
@pytest.mark.parametrize("name", ["lenet", "autoencoder", pytest.param("gpt, tied", marks=pytest.mark.slow)])
def test_gram_systems(name, metric, c):
    """x, J x and the preconditioner against dense solves; the gradient as Jᵀw and as any vector."""
    model, x, y = model_of(name)
    rho, damping = 0.3, 0.7
    optimizer = DampedNewton(model, metric=metric, metric_damping=rho, weight_decay=c, route="gram")
    problem = problem_of(optimizer, closure_of(model, x, y))
    g, theta = gradient(model, x, y), torch.cat([p.detach().flatten() for p in trainable(model)])
    D = damping * gram_metric(problem, rho) + c  # ρ + c/λ in the place of ρ
    A, v = gauss_newton(model, x, y) + D.diag(), random_vector(len(g))
    for rest, alone, full in ((c * theta if c else None, False, g + c * theta), (v, True, v), (v, False, g + v)):
        system = problem.gram_system(rest, without_residual=alone)
        damped = system.factorize(damping)
        step, J_step = system.step(damped)
        expected = torch.linalg.solve(A, -full)
        assert system.has_residual() and relative(step - expected, expected) <= 1e-10
        assert relative(J_step - system.scaled_tangent(expected), J_step) <= 1e-10
    expected = torch.linalg.solve(A, v)
    assert relative(system.inverse(damped, v) - expected, expected) <= 1e-10
    assert relative(damped.apply_metric(v) - D * v, v) <= 1e-13
    solution = NewtonStep(problem, trainable(model), state_of(optimizer)).gauss_newton.solve(damping)
    expected = torch.linalg.solve(A, -(g + c * theta))
    assert solution is not None and relative(solution.x - expected, expected) <= 1e-10


def test_the_scales_of_the_state_metric():
    """The mean diagonal of SᵀS/N: exactly, if a sample has one pre-activation; else by random signs."""
    torch.manual_seed(0)
    alone = TrackedNetwork(nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 3)).double())
    cases = [((alone, random_vector(5, 3), torch.arange(5) % 3), 1e-12)]
    for (model, x, y), rtol in [*cases, (model_of("lenet"), 0.5), (model_of("autoencoder"), 0.5)]:
        problem = problem_of(DampedNewton(model), closure_of(model, x, y))
        program = problem.system("gauss_newton").program
        diagonal = state_matrix(model, x).diagonal().split(list(program.parameters.values()))
        assert state_scales(program) == pytest.approx([float(part.mean()) for part in diagonal], rel=rtol)


def test_a_gradient_outside_of_the_range_has_no_residual():
    """Of a sample that is wrong beyond rounding. The step is the same system's, without w."""
    model, x, y = model_of("lenet")
    with torch.no_grad():
        model.net[-1].weight.mul_(1e3)
    problem = problem_of(DampedNewton(model, route="gram"), closure_of(model, x, y))
    assert not problem.gram_system(None).has_residual()
    solution = GramSteps(problem).solve(10.0)
    A = gauss_newton(model, x, y) + 10 * gram_metric(problem, 0.1).diag()
    expected = torch.linalg.solve(A, -gradient(model, x, y))
    assert solution is not None and relative(solution.x - expected, expected) <= 1e-8


@pytest.mark.parametrize(
    "name, stop, route",
    [("lenet", 5, "auto"), ("lenet", 5, "gram"), pytest.param("gpt", 10, "auto", marks=pytest.mark.slow)],
)
def test_a_run_ends_at_a_certified_minimum_and_goes_on_bit_for_bit(name, stop, route):
    model, x, y = model_of(name)
    c = 0.02
    optimizer, saved, objectives = DampedNewton(model, weight_decay=c, route=route), None, []
    for step in range(150):
        if step == stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.step(closure_of(model, x, y))
        objectives.append(optimizer.report.objective)
        if optimizer.converged:
            break
    assert optimizer.converged and optimizer.report.certified and saved is not None
    assert all(after <= before * (1 + 1e-13) for before, after in zip(objectives, objectives[1:], strict=False))
    assert gradient(model, x, y, c).norm() <= 2e-12
    assert torch.linalg.eigvalsh(oracle(model, x, y))[0] + c > 0
    again, _, _ = model_of(name)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    continued = DampedNewton(again, weight_decay=c, route=route)
    again.load_state_dict(saved[0])
    continued.load_state_dict(saved[1])
    for _ in range(stop, len(objectives)):
        continued.step(closure_of(again, x, y))
    assert torch.equal(parameters_of(model), parameters_of(again))
    assert repr(continued.report) == repr(optimizer.report)


@pytest.mark.parametrize("route", ["sweep", "gram"])
@pytest.mark.parametrize("metric", ["parameter", "state"])
def test_conjugate_gradients_with_a_sub_batch(metric, route):
    model, x, y = model_of("lenet")
    options = {"metric": metric, "route": route, "metric_damping": 0.3, "curvature_batch": 4, "cg_iterations": 80}
    optimizer = DampedNewton(model, **options)
    problem = problem_of(optimizer, closure_of(model, x, y))
    by_gram = route == "gram"
    systems = ConjugateGradients(
        problem, GramSteps(problem) if by_gram else FactoredSteps(problem, "gauss_newton"), None
    )
    solution = systems.solve(0.5, stop=1e-26)
    chosen = [i for i in range(6) if any(torch.equal(x[i], z) for z in problem._sub_batch.batch.inputs[0])]
    assert len(chosen) == 4
    D = eye(len(problem.gradient))
    D = D if metric == "parameter" else 0.3 * D + state_matrix(model, x[chosen])
    D = gram_metric(problem, 0.3).diag() if by_gram else D
    expected = torch.linalg.solve(gauss_newton(model, x, y) + 0.5 * D, -problem.gradient)
    assert solution is not None and relative(solution.x - expected, expected) <= 1e-10
    sub_batch = gauss_newton(model, x[chosen], y[chosen])
    v = random_vector(len(D))
    found = problem.system("gauss_newton").product(v[:, None])[:, 0]
    assert relative(found - sub_batch @ v, sub_batch @ v) <= 1e-12
    for _ in range(4):
        before = model(x, y).item()
        optimizer.step(closure_of(model, x, y))
        assert optimizer.report.accepted and model(x, y).item() < before


def test_a_sub_batch_of_a_sum_has_the_size_of_the_whole():
    """Of equal samples, any sub-batch has the curvature of all."""
    model, x, y = model_of("a sum")
    x, y = x[:1].expand(6, -1, -1, -1), y[:1].expand(6)
    whole, part = (DampedNewton(model, curvature_batch=k, cg_iterations=0) for k in (None, 2))
    steps = [
        FactoredSteps(problem_of(optimizer, closure_of(model, x, y)), "gauss_newton").solve(1.0).x
        for optimizer in (whole, part)
    ]
    assert relative(steps[1] - steps[0], steps[0]) <= 1e-5


def test_a_float32_model_takes_nearly_the_step_of_a_float64_one():
    moved = []
    for dtype in (torch.float32, torch.float64):
        model, x, y = model_of("lenet")
        model, x = model.float().to(dtype), x.float().to(dtype)
        start, optimizer = parameters_of(model), DampedNewton(model)
        optimizer.step(closure_of(model, x, y))
        moved.append(parameters_of(model).double() - start)
        losses = [optimizer.step(closure_of(model, x, y)).item() for _ in range(4)]
        assert losses == sorted(losses, reverse=True) and parameters_of(model).dtype == dtype
    assert relative(moved[0] - moved[1], moved[1]) <= 1e-5


def test_wrong_use():
    model, x, y = model_of("lenet")
    by_gram = TrackedNetwork(model.net, lambda outputs, y: torch.sin(outputs).sum(1))
    with pytest.raises(ValueError, match="convex in the outputs: choose another route"):
        DampedNewton(by_gram, route="gram").step(closure_of(by_gram, x, y))
    optimizer = DampedNewton(model)
    with pytest.raises(TypeError, match="call hessian.estimate_cost"):
        optimizer.estimate_step(6)
    with pytest.raises(ValueError, match="needed as one batch: call model"):
        optimizer.step(lambda: model.track_batches(DataLoader(TensorDataset(x, y), batch_size=2)))
    with pytest.raises(ValueError, match="other parameters than at construction"):
        model.net[0].weight.requires_grad_(False)
        optimizer.step(closure_of(model, x, y))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters are frozen"):
        DampedNewton(model)
    training = TrackedNetwork(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double())
    with pytest.raises(ValueError, match=r"random: call .eval\(\)"):
        DampedNewton(training).step(closure_of(training, random_vector(3, 4), torch.arange(3)))


@pytest.mark.parametrize("radius", [0.01, 1.0])
def test_the_trust_region_step(radius):
    """Against the maximum of the dual, in the eigenvectors of H, which is indefinite."""
    model, x, y = model_of("lenet")
    g, (theta, Q) = gradient(model, x, y), torch.linalg.eigh(oracle(model, x, y))
    assert theta[0] < 0
    found = trust_region_step(model, model(x, y, track_activations=True), g, radius)
    dampings = -theta[0] + torch.logspace(-12, 4, 20_001, dtype=torch.float64)
    dual = -0.5 * ((Q.T @ g) ** 2 / (theta + dampings[:, None])).sum(1) - 0.5 * dampings * radius**2
    best = -float(dual.max())
    step = Q.T @ found.step
    assert found.step.norm() <= radius * (1 + 1e-9) and found.on_boundary
    assert -float(g @ found.step + 0.5 * (theta * step**2).sum()) == pytest.approx(found.predicted_decrease, rel=1e-9)
    assert (1 - 1e-4) * best <= found.predicted_decrease <= (1 + 1e-4) * best


def test_a_loss_of_ones_own_is_fitted_to_rounding():
    """Its second derivatives lose their digits with the loss. Steps go on, and none raises the loss."""
    model, x, y = model_of("lenet")
    model = TrackedNetwork(model.net, lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"))
    optimizer, losses = DampedNewton(model), []
    for _ in range(14):
        losses.append(optimizer.step(closure_of(model, x, y)).item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-9

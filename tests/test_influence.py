"""curvature.py, what depends on the data: influence, evidence, hypergradients. Oracles: dense matrices, retraining."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.example_networks import EXAMPLES, build
from curvature import Laplace, hypergradient, influence, is_minimum, minimize, self_influence, spectrum, top_influences
from hessian import DeepMLPWithTracking, TrackedNetwork, hessian_vector_product
from tests.oracles import Case, flat_function, num_parameters, raises, relative

DECAY = 0.02
PROBLEMS = {
    "cross-entropy": Case((6, 4), 15),
    "mse": Case((6, 4), 15, loss="mse"),
    "skips": Case((5, 6, 6), 9, "gelu", residual=True),
    "soft": Case((4,), 8, soft=True),
    "lenet": EXAMPLES["lenet"],
    "autoencoder": EXAMPLES["autoencoder"],
    "gpt, written out": EXAMPLES["gpt, written out"],
}


def problem(name):
    """Model, x, y, and a test set of 4 samples."""
    case = PROBLEMS[name]
    if isinstance(case, Case):
        model, x, y = case.build()
        return model, x, y, *case._replace(batch=4).build(seed=1)[1:]
    net, x, y = build(case._replace(batch=6))
    return TrackedNetwork(net, case.loss), x, y, *build(case._replace(batch=4), seed=1)[1:]


def gradient_of(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def gradients_one_by_one(model, x, y):
    """∇ℓ_b (P, N) by a plain loop."""
    return torch.stack([gradient_of(model(x[b : b + 1], y[b : b + 1]), model) for b in range(len(y))], 1)


def dense(model, loss, **options):
    return hessian_vector_product(model, loss, torch.eye(num_parameters(model), dtype=torch.float64), **options)


# -------------------------------------------------------------------------------------------------- influence


@pytest.mark.parametrize("name", PROBLEMS)
def test_influence_is_its_formula(name):
    model, x, y, test_x, test_y = problem(name)
    loss = model(x, y, track_activations=True)
    A = dense(model, loss) + 5.0 * torch.eye(num_parameters(model))
    train, test = gradients_one_by_one(model, x, y), gradients_one_by_one(model, test_x, test_y)
    expected = train.T @ torch.linalg.solve(A, test) / len(y)
    found = influence(model, loss, test_x, test_y, 5.0)
    assert found.shape == (len(y), 4) and relative(found - expected, expected) <= 1e-9
    own = (train * torch.linalg.solve(A, train)).sum(0) / len(y)
    assert relative(self_influence(model, loss, 5.0) - own, own) <= 1e-9
    top = top_influences(model, loss, test_x[2:3], test_y[2:3], 5.0, k=3)
    assert torch.equal(top.indices, expected[:, 2].abs().argsort(descending=True)[:3])
    assert relative(top.values - expected[top.indices, 2], expected) <= 1e-9


def test_influence_predicts_retraining():
    """The derivative by the weight of a sample, by finite differences of retrained minima."""
    model, x, y, test_x, test_y = problem("cross-entropy")
    assert minimize(model, lambda: model(x, y, track_activations=True), DECAY)
    predicted = influence(model, model(x, y, track_activations=True), test_x, test_y, DECAY)
    weight = 1e-3  # of its own weight is taken from sample 0

    def test_losses(sign):
        tilted = copy.deepcopy(model)
        weights = torch.ones(len(y), dtype=torch.float64)
        weights[0] -= sign * weight
        losses = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none")  # noqa: E731

        def tilted_loss(outputs, targets):
            return weights[: len(targets)] * losses(outputs, targets)

        # without reset_parameters, so that torch.fx sees plain layers
        net = nn.Sequential(*[z for layer in tilted.layers for z in (layer, nn.Tanh())][:-1])
        found = TrackedNetwork(net, tilted_loss)
        assert minimize(found, lambda: found(x, y, track_activations=True), DECAY, gtol=1e-12)
        return losses(net(test_x), test_y).detach()

    measured = (test_losses(1) - test_losses(-1)) / (2 * weight)
    assert relative(predicted[0] - measured, measured) <= 1e-5


def test_influence_refuses_what_it_does_not_describe():
    model, x, y, test_x, test_y = problem("cross-entropy")
    loss = model(x, y, track_activations=True)
    for curved in (lambda: influence(model, loss, test_x, test_y, 1e-3), lambda: self_influence(model, loss, 1e-3)):
        raises(ValueError, "negative eigenvalues at damping=0.001: .*smallest_damping", curved)
    raises(ValueError, "same M samples .*got 4 and \\(3,\\)", influence, model, loss, test_x, test_y[:3], 9.0)
    raises(ValueError, "takes one test sample, got 4", top_influences, model, loss, test_x, test_y, 9.0)
    net, x, y = build(EXAMPLES["weighted"])
    weighted = TrackedNetwork(net, EXAMPLES["weighted"].loss)
    loss = weighted.double()(x, y, track_activations=True)
    raises(ValueError, "don't add up to that of", self_influence, weighted, loss, 9.0)


def test_a_sum_is_no_mean():
    """With reduction='sum' a sample's weight is 1."""
    net, x, y = build(EXAMPLES["densely connected"])
    found = []
    for reduction, scale in (("mean", 1.0), ("sum", len(y))):
        model = TrackedNetwork(net, nn.CrossEntropyLoss(reduction=reduction))
        loss = model(x, y, track_activations=True)
        found.append(self_influence(model, loss, 5.0 * scale))
    assert relative(found[0] - found[1], found[0]) <= 1e-12


# -------------------------------------------------------------------------------------------------- evidence


@pytest.mark.parametrize("curvature", ("hessian", "gauss_newton"))
@pytest.mark.parametrize("name", ("cross-entropy", "mse", "soft", "autoencoder"))
def test_the_evidence_is_its_formula(name, curvature):
    model, x, y, *_ = problem(name)
    noise, N = 0.7, len(y)
    prior = 500.0
    loss = model(x, y, track_activations=True)
    scale, constant = float(N), 0.0
    if model.loss == "mse":
        scale, constant = y.numel() / (2 * noise**2), y.numel() * math.log(noise * math.sqrt(2 * math.pi))
    P, theta = num_parameters(model), torch.cat([p.detach().flatten() for p in model.parameters()])
    precision = scale * dense(model, loss, curvature=curvature) + prior * torch.eye(P)
    expected = -scale * loss.item() - constant - 0.5 * prior * float(theta @ theta)
    expected += 0.5 * (P * math.log(prior) - float(torch.logdet(precision)))
    found = Laplace(model, loss, prior, curvature, noise=noise)
    assert abs(found.log_evidence - expected) <= 1e-9 * abs(expected)
    for other in (found, found.with_prior((prior,) * found.factorization._system.num_dampings)):
        h = 1e-4
        by_differences = [
            (found.with_prior(prior + h).log_evidence - found.with_prior(prior - h).log_evidence) / (2 * h)
        ]
        total = sum(torch.as_tensor(other.log_evidence_derivative).reshape(-1).tolist())
        assert abs(total - by_differences[0]) <= 1e-6 * abs(by_differences[0])
    assert f"log_evidence={found.log_evidence:.6g}" in repr(found) and "log evidence" in found._repr_html_()


@pytest.mark.parametrize("per_layer", (False, True))
@pytest.mark.parametrize("curvature", ("gauss_newton", "hessian"))
def test_the_prior_is_fitted(per_layer, curvature):
    """A stationary point of the evidence, and larger than beside it. A linear model's exact Hessian is positive."""
    model, x, y = Case((6, 4) if curvature == "gauss_newton" else (), 15, loss="mse").build()
    assert minimize(model, lambda: model(x, y, track_activations=True), 0.05)
    loss = model(x, y, track_activations=True)
    found = Laplace(model, loss, 5.0, curvature, noise=0.5).fit_prior_precision(per_layer)
    priors = torch.as_tensor(found.prior_precision).reshape(-1)
    slopes = torch.as_tensor(found.log_evidence_derivative).reshape(-1) * priors  # by log δ
    assert len(priors) == (len(model.layers) if per_layer else 1) and slopes.abs().max() <= 1e-4
    for factor in (0.9, 1.1):
        beside = (factor * priors).tolist()
        assert found.with_prior(beside if per_layer else beside[0]).log_evidence < found.log_evidence


def test_no_evidence_where_there_is_no_minimum():
    model, x, y, *_ = problem("cross-entropy")
    found = Laplace(model, model(x, y, track_activations=True), 1e-3, "hessian")
    count = found.factorization.num_negative_eigenvalues
    with pytest.raises(torch.linalg.LinAlgError, match=f"no Gaussian posterior: {count} eigenvalues"):
        _ = found.log_evidence
    assert count > 0 and "not positive definite" in repr(found)
    raises(ValueError, "prior_precision must be a finite number > 0", found.with_prior, 0.0)
    net = TrackedNetwork(nn.Linear(3, 2), nn.CrossEntropyLoss())
    loss = net(torch.randn(4, 3), torch.randint(2, (4,)), track_activations=True)
    raises(TypeError, "pass its name", Laplace, net, loss, 1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    flat = Laplace(model, model(x, y, track_activations=True), 1.0)
    raises(ArithmeticError, "grows with δ for ever", flat.fit_prior_precision)


@pytest.mark.parametrize("name", ("cross-entropy", "mse", "lenet"))
def test_predictions_are_those_of_the_linearized_network(name):
    model, x, y, test_x, test_y = problem(name)
    loss = model(x, y, track_activations=True)
    noise = 0.7
    found = Laplace(model, loss, 3.0, noise=noise).predictive(test_x)
    f, theta = flat_function(model, test_x)
    J = torch.func.jacrev(f)(theta)  # (M, C, P)
    scale = y.numel() / (2 * noise**2) if model.loss == "mse" else len(y)
    precision = scale * dense(model, loss, curvature="gauss_newton") + 3.0 * torch.eye(len(theta))
    covariance = J @ torch.linalg.solve(precision, J.mT)
    assert torch.equal(found.mean, f(theta)) or relative(found.mean - f(theta), found.mean) <= 1e-12
    assert relative(found.covariance - covariance, covariance) <= 1e-8
    variance = covariance.diagonal(dim1=1, dim2=2)
    if model.loss == "mse":
        assert relative(found.variance - variance - noise**2, variance) <= 1e-8 and found.probabilities is None
    else:
        probit = (f(theta) / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
        assert relative(found.probabilities - probit, probit) <= 1e-8 and found.noise == 0


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ("cross-entropy", "mse"))
def test_evidence_and_predictions_of_laplace_torch(name, float64):
    """The full Gauss–Newton Laplace approximation of laplace-torch, which takes torch's default dtype."""
    laplace = pytest.importorskip("laplace", reason="pip install -r requirements-optional.txt")
    model, x, y, test_x, _ = problem(name)
    likelihood = "regression" if name == "mse" else "classification"
    net = nn.Sequential(*[z for layer in model.layers for z in (layer, nn.Tanh())][:-1])
    theirs = laplace.Laplace(net, likelihood, "all", "full", sigma_noise=0.75 if name == "mse" else 1.0)
    theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), len(y)))
    ours = Laplace(model, model(x, y, track_activations=True), 1.0, noise=0.75)
    for prior in (0.125, 1.0, 32.0):
        theirs.prior_precision = prior
        ours = ours.with_prior(prior)
        evidence = float(theirs.log_marginal_likelihood())
        assert abs(ours.log_evidence - evidence) <= 1e-6 * abs(evidence)
        covariance = theirs._glm_predictive_distribution(test_x)[1]
        assert relative(ours.predictive(test_x).covariance - covariance, covariance) <= 1e-8


# --------------------------------------------------------------------------------------------- hypergradient


@pytest.mark.parametrize("name", ("cross-entropy", "mse", "autoencoder"))
def test_hypergradients_are_differences_of_retrained_minima(name):
    model, x, y, test_x, test_y = problem(name)

    def retrained(decays):
        """The validation loss at the minimum with a decay for each damping, by Newton steps on a dense Hessian."""
        tilted = copy.deepcopy(model)
        for _ in range(30):
            loss = tilted(x, y, track_activations=True)
            theta = torch.cat([p.detach().flatten() for p in tilted.parameters()])
            g = gradient_of(loss, tilted) + decays * theta
            if g.norm() <= 1e-13:
                break
            step = torch.linalg.solve(dense(tilted, loss) + torch.diag(decays), g)
            torch.nn.utils.vector_to_parameters(theta - step, tilted.parameters())
        assert g.norm() <= 1e-12
        return float(tilted(test_x, test_y).detach())

    assert minimize(model, lambda: model(x, y, track_activations=True), 0.05)
    loss = model(x, y, track_activations=True)
    found = hypergradient(model, loss, model(test_x, test_y), 0.05)
    everything, h = torch.full((num_parameters(model),), 0.05, dtype=torch.float64), 1e-5
    measured = (retrained(everything + h) - retrained(everything - h)) / (2 * h)
    assert abs(found - measured) <= 1e-6 * max(1.0, abs(measured))
    groups = list(model.layers) if isinstance(model, DeepMLPWithTracking) else [[p] for p in model.parameters()]
    each = hypergradient(model, loss, model(test_x, test_y), (0.05,) * len(groups))
    assert isinstance(each, tuple) and len(each) == len(groups) and abs(sum(each) - found) <= 1e-12
    sizes = [sum(p.numel() for p in getattr(group, "parameters", lambda g=group: g)()) for group in groups]
    first = everything.clone()
    first[: sizes[0]] += h
    second = everything.clone()
    second[: sizes[0]] -= h
    assert abs((retrained(first) - retrained(second)) / (2 * h) - each[0]) <= 1e-6 * max(1.0, abs(each[0]))


def test_hypergradient_needs_a_graph_and_a_minimum():
    model, x, y, test_x, test_y = problem("cross-entropy")
    loss = model(x, y, track_activations=True)
    raises(ValueError, "with its graph", hypergradient, model, loss, loss.detach(), 0.05)
    raises(ValueError, "negative eigenvalues at damping=0.001", hypergradient, model, loss, model(test_x, test_y), 1e-3)


# ------------------------------------------------------------------------------------------ a whole data set


@pytest.mark.parametrize("name", ("cross-entropy", "lenet"))
@pytest.mark.parametrize("keep", (True, False))
def test_batches_are_a_data_set(name, keep):
    """The loss of a DataLoader's batches gives what that of all samples at once gives."""
    model, x, y, test_x, test_y = problem(name)

    def answers(loss):
        posterior = Laplace(model, loss, 500.0)
        return [
            influence(model, loss, test_x, test_y, 5.0),
            self_influence(model, loss, 5.0),
            torch.tensor([posterior.log_evidence, is_minimum(model, loss).gradient_norm], dtype=torch.float64),
            posterior.predictive(test_x).covariance,
            spectrum(model, loss).eigenvalues,
        ]

    expected = answers(model(x, y, track_activations=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    for found, reference in zip(answers(model.track_batches(loader, keep=keep)), expected, strict=True):
        assert relative(found - reference, reference) <= 1e-9

"""Wrong calls of a `TrackedNetwork`, and networks that the elimination does not describe: one line each, no number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import eigenpairs, minimize
from hessian import (
    DeepMLPWithTracking,
    SingularHessianError,
    TrackedNetwork,
    factorize_hessian,
    hessian_inverse_vector_product,
)
from tests.oracles import random_vector
from tests.test_networks import oracle

X, Y = random_vector(24).view(6, 4), torch.tensor([0, 2, 1, 1, 0, 2])


class Net(nn.Module):
    """4 inputs, 5 tanh units, 3 outputs; `middle` is what a test changes."""

    def __init__(self, middle=torch.tanh, then=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.middle, self.then = middle, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.b(self.middle(self.a(x))))


def factorize(net: nn.Module, x=X, y=Y, loss="cross_entropy", **options):
    model = TrackedNetwork(net, loss)
    return factorize_hessian(model, model(x, y, track_activations=True), 0.1, **options)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (X[:, :3], Y, r"x: \(6, 3\) of torch.float64; its parameters are torch.float64"),
        (
            X.long(),
            Y,
            r"x: \(6, 4\) of torch.int64; its parameters are torch.float64. Where the dtypes differ, convert",
        ),
        (X.float(), Y, "convert x or the network"),
        (X.numpy(), Y, "x must be a tensor or a tuple of tensors, got ndarray"),
        ((), Y, "x must be a tensor or a tuple of tensors, got none"),
        (X, Y.tolist(), "targets must be a tensor, got list: make one by torch.as_tensor"),
        (X, Y[:4], r"N samples .*and so must targets: .*targets \(4,\)"),
        (X[0], Y[0], r"N samples .*x \(4,\)"),
        (X[:0], Y[:0], "the batch is empty"),
        (X, Y.int(), r"must be torch.int64 of shape \(6,\).*got \(6,\) of torch.int32"),
        (X, Y.double(), r"must be torch.int64 of shape \(6,\).*got \(6,\) of torch.float64"),
        (X, Y[:, None], r"of shape \(6,\).*got \(6, 1\)"),
        (X, Y + 1, "must lie in 0 … 2, got 1 … 3"),
        (X, torch.full((6,), -100), "all targets are -100, which is ignored"),
        (X * math.nan, Y, "the loss is nan: look for NaN"),
        (torch.where(X == X[0, 0], math.inf, X), Y, "derivatives .* are NaN or infinite: look for infinity"),
    ],
)
def test_wrong_batches(x, y, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        factorize(Net(), x, y)


@pytest.mark.parametrize(
    "loss, y, message",
    [
        ("mse", X[:, 0], r"targets of mse must have the outputs' shape.*\(6, 3\).*got \(6,\)"),
        (nn.MSELoss(), X[:, :1], r"targets of MSELoss.*\(6, 3\).*got \(6, 1\)"),
        ("binary_cross_entropy", torch.ones(6, 3).long(), r"shape and dtype.*got \(6, 3\) of torch.int64"),
        (F.cross_entropy, Y, r"one loss a sample, \(6,\), got \(\): take reduction='none'"),
        (None, Y, "unknown loss None.*or pass a function or a loss module"),
        (nn.CrossEntropyLoss, Y, "unknown loss <class.*such as nn.CrossEntropyLoss()"),
    ],
)
def test_wrong_losses(loss, y, message):
    with pytest.raises(ValueError, match=message):
        factorize(Net(), X, y, loss)


def test_classes_in_another_dimension():
    net, tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double(), torch.arange(10).view(2, 5) % 7
    for model in (TrackedNetwork(net, class_dim=1), TrackedNetwork(net, nn.CrossEntropyLoss())):
        with pytest.raises(
            ValueError, match=r"shape \(2, 7\).*classes in dimension 1; got \(2, 5\).*class_dim=1 or -1"
        ):
            model(tokens, tokens, track_activations=True)
    with pytest.raises(ValueError, match=r"needs outputs \(N, C\) or \(N, …, C\), got \(6,\)"):
        factorize(Net(then=lambda x: x[:, 0]))


def discarded(h: Tensor) -> Tensor:
    h.sin_()
    return h


def without_graph(h: Tensor) -> Tensor:
    with torch.no_grad():
        factor = torch.tanh(h)
    return h * factor


def depends_on_samples(h: Tensor) -> Tensor:
    assert h.shape[0] < 10
    return h


def loop_over_samples(h: Tensor) -> Tensor:
    return torch.stack([row.tanh() for row in h])


class KeptInALambda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.call = lambda x: self.b(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    "net, message",
    [
        (KeptInALambda().double(), r"not one of its own, at line [0-9]+ of test_network_errors.py, `self.call"),
        (Net(discarded), "other outputs or derivatives than the network: take out in-place operations"),
        (Net(without_graph), "other outputs or derivatives .*torch.no_grad"),
        (Net(depends_on_samples), "line [0-9]+ of test_network_errors.py, `assert h.shape.*data or on the number of"),
        (Net(loop_over_samples), "line [0-9]+ of test_network_errors.py, `return torch.stack.*number of samples"),
        (Net(then=lambda x: (x, x)), "must return one tensor .*, got tuple: wrap it in a module"),
        (Net(nn.RReLU()), "RReLU in training mode, which is random: call .eval"),
        (nn.DataParallel(Net()), "is wrapped .*DataParallel.*pass the plain module"),
        (torch.compile(Net()), "is wrapped .*OptimizedModule.*pass the plain module"),
        (nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3).double())).eval(), "parametrized weight"),
        (nn.Sequential(nn.Linear(4, 3, dtype=torch.cdouble)), "complex parameters"),
        (nn.Sequential(nn.Embedding(9, 3, sparse=True)), "sparse=False"),
        (TrackedNetwork(Net()), "none of this library's, got TrackedNetwork"),
        (DeepMLPWithTracking(4, 5, 3, 1), "none of this library's, got DeepMLPWithTracking"),
    ],
)
def test_networks_that_are_refused(net, message):
    for route, keep in (("sweep", "inertia"), ("dense", "solve")):
        with pytest.raises((ValueError, TypeError), match=message):
            factorize(net, route=route, keep=keep)


def test_a_kept_activation():
    net = Net()
    net.middle = lambda h: setattr(net, "kept", h) or torch.tanh(h)
    with pytest.raises(TypeError, match="keeps a tensor with its graph as .kept.*kept.detach()"):
        factorize(net)


def test_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave torch.inference_mode()"):
        factorize(Net())


def test_a_loss_that_couples_samples():
    """Elimination would miscount; the dense route forms H by products, and is right."""

    def spread(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs - outputs.mean(0)).square().sum(1)

    def pairs(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs * outputs.roll(3, 0)).sum(1)  # samples i and i + 3 alone

    net = Net()
    with pytest.raises(ValueError, match="depends on the outputs of other samples"):
        factorize(net, loss=pairs, route="sweep")
    for options in ({"keep": "inertia"}, {"curvature": "gauss_newton"}):
        with pytest.raises(ValueError, match="the loss of a sample depends on .* other samples.*route='dense'"):
            factorize(net, loss=spread, route="sweep", **options)
    eigenvalues = torch.linalg.eigvalsh(oracle(TrackedNetwork(net, spread), X, Y))
    assert factorize(net, loss=spread, route="dense").num_negative_eigenvalues == int((eigenvalues < -0.1).sum())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Centred(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(2, keepdim=True), bias)


class Tripled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(super().forward(x), self.bias)


def hooked() -> nn.Linear:
    linear = nn.Linear(4, 5)
    linear.register_forward_hook(lambda module, inputs, outputs: 2 * outputs.square())
    return linear


@pytest.mark.parametrize(
    "make", [lambda: Doubled(4, 5), lambda: Centred(1, 2, 2), lambda: Tripled(4), lambda: Rectified(4, 5), hooked]
)
def test_kinds_of_torch_that_compute_something_else(make):
    """Subclasses with a `forward` of their own and modules with hooks are looked into."""
    torch.manual_seed(0)
    first = make()
    shape = (1, 4) if isinstance(first, nn.Conv1d) else (4,)
    net = nn.Sequential(nn.Unflatten(1, shape), first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    net(X.float())
    net.double()
    model = TrackedNetwork(net)
    A = oracle(model, X, Y) + 0.1 * torch.eye(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    f = factorize_hessian(model, model(X, Y, track_activations=True), 0.1, route="sweep", keep="inertia")
    assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(A) < 0).sum())
    assert f.logabsdet == pytest.approx(float(torch.linalg.slogdet(A).logabsdet), abs=1e-9)


class WithTargets(Net):
    """As GPTs are often written: targets and options have defaults."""

    def forward(self, x: Tensor, targets: Tensor | None = None, scale: float = 2.0, double: bool = True):
        logits = scale * super().forward(x)
        if targets is not None:
            return logits, F.cross_entropy(logits, targets)
        return logits + logits if double else logits


def test_arguments_with_defaults():
    net = WithTargets()
    model = TrackedNetwork(net)
    f = factorize_hessian(model, model(X, Y, track_activations=True), 0.1, route="sweep")
    H, v = oracle(model, X, Y), random_vector(f.num_parameters)
    x = f.solve(v)
    assert (H @ x + 0.1 * x - v).norm() <= 1e-10 * v.norm()
    assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(H) < -0.1).sum())


def test_wrong_arguments_elsewhere():
    model = TrackedNetwork(Net())
    loss = model(X, Y, track_activations=True)
    v = random_vector(sum(p.numel() for p in model.parameters()))
    with pytest.raises(ValueError, match="rtol must lie between 0 and 1, got '1e-8'"):
        hessian_inverse_vector_product(model, loss, v, 0.1, rtol="1e-8")
    with pytest.raises(
        SingularHessianError, match="a damping other than 0 .*without damping, hessian_inverse_vector_product"
    ):
        factorize_hessian(model, loss, 0.0).solve(v)
    for k in (0, 3.0):
        with pytest.raises(ValueError, match="k must be an integer from 1"):
            eigenpairs(model, loss, k)
    with pytest.raises(TypeError, match="closure must be a function .*, got Tensor"):
        minimize(model, loss, 0.1)
    with pytest.raises(TypeError, match="or a TrackedNetwork, got Net: wrap a network by"):
        factorize_hessian(model.net, loss, 0.1)

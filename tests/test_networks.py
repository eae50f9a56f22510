"""Networks of one's own: `TrackedNetwork` against torch.autograd.functional.hessian, by all routes.

torch.func.hessian is no oracle here: torch 2.14's second derivatives of LayerNorm are wrong under vmap. A test shows
it.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from _hessian import general_operation, network, operations
from _hessian.trace import layer_norm
from benchmarks.example_networks import EXAMPLES, DenselyConnected, TwoInputs, build
from hessian import (
    DeepMLPWithTracking,
    HessianFactorization,
    OperationDerivatives,
    SingularHessianError,
    TrackedNetwork,
    factorize_hessian,
    hessian_inverse_vector_product,
    hessian_vector_product,
)
from tests.oracles import dense_residual, random_vector, relative


def oracle(model: TrackedNetwork, x: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
    """H, by double backward of the user's own network."""
    names = [name for name, p in model.net.named_parameters() if p.requires_grad]
    parameters = tuple(p.detach() for p in model.net.parameters() if p.requires_grad)
    inputs = x if isinstance(x, tuple) else (x,)

    def loss(*values: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model.net, dict(zip(names, values, strict=True)), inputs)
        return model.loss_value(outputs, y)

    with sdpa_kernel(SDPBackend.MATH):
        blocks = torch.autograd.functional.hessian(loss, parameters)
    sizes = [p.numel() for p in parameters]
    return torch.cat(
        [
            torch.cat([block.reshape(m, n) for block, n in zip(row, sizes, strict=True)], 1)
            for row, m in zip(blocks, sizes, strict=True)
        ]
    )


def tracked(name: str) -> tuple[TrackedNetwork, Tensor, Tensor, Tensor]:
    net, x, y = build(EXAMPLES[name])
    loss = EXAMPLES[name].loss
    model = TrackedNetwork(net, loss.double() if isinstance(loss, nn.Module) else loss)
    if name.startswith("gpt"):
        model.class_dim = -1
    return model, x, y, model(x, y, track_activations=True)


QUICK = ("residual", "recurrent", "densely connected", "autoencoder", "rectified")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES]
)
def test_exact_for_every_kind_of_network(name):
    """Solves, inertia, determinant; both curvatures, all routes, ε from 1 to 1e-6 and below 0; and state damping."""
    model, x, y, loss = tracked(name)
    H = oracle(model, x, y)
    identity, v = torch.eye(len(H), dtype=torch.float64), random_vector(len(H), 2)
    assert relative(hessian_vector_product(model, loss, v) - H @ v, H @ v) <= 1e-12
    for curvature, mu in (("hessian", 0.0), ("gauss_newton", 0.0), ("hessian", 0.3)):
        if (curvature, mu) != ("hessian", 0.0):
            H = hessian_vector_product(model, loss, identity, curvature=curvature, state_damping=mu)
            assert relative(H - H.T, H) <= 1e-12
        factored: list[HessianFactorization] = []
        for damping in (1.0, 1e-2, 1e-6, -0.0503) if mu == 0 else (0.1,):
            A = (H + H.T) / 2 + damping * identity
            allowed = max(10 * dense_residual(A, v), 1e-13)
            factored = factored or [
                factorize_hessian(model, loss, damping, curvature=curvature, route=route, state_damping=mu)
                for route in ("sweep", "dense", *(["gram"] if curvature == "gauss_newton" else []))
            ]
            for f in (x.with_damping(damping) for x in factored):
                X = f.solve(v, rtol=max(allowed, 1e-12))
                assert not X.requires_grad
                assert relative(A @ X - v, v) <= 2 * max(allowed, 1e-12), (curvature, damping, f.route)
                assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(A) < 0).sum())
                expected = torch.linalg.slogdet(A).logabsdet.item()
                assert f.logabsdet == pytest.approx(expected, abs=1e-6 * len(A) + 1e-9 / abs(damping))
            if damping == 1.0:
                assert all(f.inertia_is_certified for f in factored)


def test_gauss_newton_is_the_part_without_second_derivatives_of_the_network():
    model, x, y, loss = tracked("mixer")
    names = [name for name, _ in model.net.named_parameters()]

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model.net, dict(zip(names, values, strict=True)), (x,))

    parameters = tuple(p.detach() for p in model.net.parameters())
    J = torch.cat([j.flatten(2).flatten(0, 1) for j in torch.autograd.functional.jacobian(outputs, parameters)], 1)
    Lambda = torch.autograd.functional.hessian(lambda h: F.cross_entropy(h, y), outputs(*parameters))
    G = J.T @ Lambda.reshape(len(J), len(J)) @ J
    v = random_vector(len(G), 2)
    found = hessian_vector_product(model, loss, v, curvature="gauss_newton")
    assert relative(found - G @ v, G @ v) <= 1e-12


def test_a_damping_for_each_parameter_tensor():
    """Also another for a bias than for its weight."""
    for name in ("residual", "gpt, tied", "recurrent"):
        model, x, y, loss = tracked(name)
        sizes = [p.numel() for p in model.parameters()]
        dampings = [0.1 * (1 + index % 3) for index in range(len(sizes))]
        H, v = oracle(model, x, y), random_vector(sum(sizes))
        A = (
            H
            + torch.cat([torch.full((n,), e, dtype=torch.float64) for n, e in zip(sizes, dampings, strict=True)]).diag()
        )
        for route in ("sweep", "dense"):
            f = factorize_hessian(model, loss, dampings, route=route)
            assert relative(A @ f.solve(v) - v, v) <= 1e-9
            assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(A) < 0).sum())
            assert f.logabsdet == pytest.approx(torch.linalg.slogdet(A).logabsdet.item(), abs=1e-9 * len(A))


@pytest.mark.parametrize("name", ["residual", "densely connected", pytest.param("gpt, tied", marks=pytest.mark.slow)])
def test_float32_factors_and_checkpoints(name, monkeypatch):
    """Bit for bit the same where pivots are recomputed; the same certificate where the factor is float32."""
    model, x, y, loss = tracked(name)
    H, v = oracle(model, x, y), random_vector(sum(p.numel() for p in model.net.parameters()), 2)
    plain = factorize_hessian(model, loss, 0.1, route="sweep")
    monkeypatch.setattr(network, "checkpoint_starts", lambda program: range(len(program.operations) - 1, -1, -3))
    again = factorize_hessian(model, loss, 0.1, checkpoint_layers=True)
    assert again.route == "sweep" and not again._factor._steps
    assert torch.equal(plain.solve(v, rtol=None), again.solve(v, rtol=None))
    for options in ({}, {"checkpoint_layers": True}, {"curvature": "gauss_newton"}):
        f = factorize_hessian(model, loss, 0.1, route="sweep", precision="mixed", **options)
        assert f.precision == "mixed" and f._factor.program.reduced and f.solve(v, rtol=None).dtype == torch.float64
        A = H + 0.1 * torch.eye(len(H), dtype=torch.float64)
        if not options.get("curvature"):
            assert relative(A @ f.solve(v) - v, v) <= 1e-8
            assert 1e-12 < relative(A @ f.solve(v, rtol=None) - v, v) <= 1e-3  # it is float32
            assert f.num_negative_eigenvalues == plain.num_negative_eigenvalues
            assert f.logabsdet == pytest.approx(plain.logabsdet, abs=1e-3 * len(H))
        assert f.residual(f.solve(v), v).max() <= 1e-8
    monkeypatch.setattr(mmap, "PAGESIZE", 16)
    on_disk = factorize_hessian(model, loss, 0.1, keep="disk")
    assert on_disk.route == "sweep" and torch.equal(plain.solve(v, rtol=None), on_disk.solve(v, rtol=None))
    with pytest.raises(SingularHessianError, match="Pass"):  # whose advice tries other options
        on_disk.solve(v, rtol=1e-18)
    counts = factorize_hessian(model, loss, 0.1, route="sweep", keep="inertia")
    assert counts.logabsdet == plain.logabsdet and counts._factor is None


def test_components_that_meet_in_the_second_derivatives_alone():
    """At weights of zero no first derivative tells that queries meet keys."""
    net, x, y = build(EXAMPLES["gpt"])
    for name, p in net.named_parameters():
        if "qkv" in name:
            nn.init.zeros_(p[: 2 * len(p) // 3])
    model = TrackedNetwork(net, class_dim=-1)
    loss = model(x, y, track_activations=True)
    H = oracle(model, x, y)
    v = random_vector(len(H))
    f = factorize_hessian(model, loss, 0.1, route="sweep")
    assert relative(H @ f.solve(v) + 0.1 * f.solve(v) - v, v) <= 1e-9


def test_two_inputs():
    torch.manual_seed(0)
    model = TrackedNetwork(TwoInputs().double().eval())
    x, y = (random_vector(3, 4), random_vector(3, 5)), torch.tensor([0, 3, 1])
    loss = model(x, y, track_activations=True)
    H, v = oracle(model, x, y), random_vector(73)
    solved = hessian_inverse_vector_product(model, loss, v, damping=0.1)
    assert relative(H @ solved + 0.1 * solved - v, v) <= 1e-10


def test_the_same_as_the_fully_connected_network():
    torch.manual_seed(0)
    chain = DeepMLPWithTracking(5, (6, 4), 3, 2, "gelu").double()
    net = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)).double()
    for ours, theirs in zip(chain.layers, net[::2], strict=True):
        theirs.load_state_dict(ours.state_dict())
    x, y = random_vector(4, 5), torch.tensor([0, 2, 1, 1])
    graph = TrackedNetwork(net.eval())
    v = random_vector(79, 2)
    for options in ({}, {"curvature": "gauss_newton"}, {"state_damping": 0.5}):
        f, g = (
            factorize_hessian(model, model(x, y, track_activations=True), 0.01, route="sweep", **options)
            for model in (chain, graph)
        )
        assert relative(f.solve(v) - g.solve(v), v) <= 1e-9
        assert f.num_negative_eigenvalues == g.num_negative_eigenvalues
        assert f.logabsdet == pytest.approx(g.logabsdet, rel=1e-12)


def test_float32_networks_and_undamped_solves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()
    model = TrackedNetwork(net)
    x, y = torch.randn(4, 2, 6), torch.tensor([0, 2, 1, 1])
    loss = model(x, y, track_activations=True)
    assert torch.equal(model(x), net(x)) and list(model.parameters()) == list(net.parameters())
    v = torch.randn(sum(p.numel() for p in net.parameters()))
    f = factorize_hessian(model, loss, 0.1)
    assert f.solve(v).dtype == torch.float32 and f.residual(f.solve(v.double()), v.double()) <= 1e-10
    double = TrackedNetwork(net.double())
    loss = double(x.double(), y, track_activations=True)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    solved = hessian_inverse_vector_product(double, loss, gradient)
    assert relative(hessian_vector_product(double, loss, solved) - gradient, gradient) <= 1e-8


def test_torch_is_wrong_where_this_says():
    """The fault that the written-out norms avoid. When torch is mended this fails: then they can go."""
    w, z = random_vector(3, 4), random_vector(20, seed=1)

    def loss(norm, z: Tensor) -> Tensor:
        return (w * torch.tanh(norm(z[:12].view(3, 4), (4,), z[12:16], z[16:]))).sum()

    right = torch.autograd.functional.hessian(lambda z: loss(F.layer_norm, z), z)
    assert relative(torch.func.hessian(lambda z: loss(F.layer_norm, z))(z) - right, right) > 0.01
    assert relative(torch.func.hessian(lambda z: loss(layer_norm, z))(z) - right, right) <= 1e-14


def test_wrong_derivatives_are_found(monkeypatch):
    """A second derivative that is off by 1 %: the operation is named, and there is no number."""
    model, x, y, loss = tracked("mixer")
    original = operations.Elementwise.__init__

    def wrong(self, *arguments):
        original(self, *arguments)
        self.second = [[1.01 * x for x in row] for row in self.second]

    def wrong_second(self):
        return {pair: 1.01 * M for pair, M in second_derivatives(self).items()}

    second_derivatives = general_operation.General._second_derivatives
    with monkeypatch.context() as context:
        context.setattr(general_operation.General, "_second_derivatives", wrong_second)
        with pytest.raises(ArithmeticError, match="torch's derivatives of"):
            factorize_hessian(model, loss, 1e-4, route="sweep")
    monkeypatch.setattr(operations.Elementwise, "__init__", wrong)
    for keep in ("solve", "inertia"):
        with pytest.raises(ArithmeticError, match="torch's derivatives of gelu.*route='dense'"):
            factorize_hessian(model, loss, 1e-4, route="sweep", keep=keep)
    v = random_vector(sum(p.numel() for p in model.parameters()))
    f = factorize_hessian(model, loss, 1e-4, route="dense")  # which the message names
    assert f.residual(f.solve(v), v) <= 1e-8


class Encoder(nn.Module):
    """nn.MultiheadAttention, and norms before it, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(x)
        attended, _ = self.attention(y, y, y, need_weights=False)
        z, _ = self.attention(y, x + attended, y)
        return self.out(z[:, 0])


@pytest.mark.slow
def test_multihead_attention():
    torch.manual_seed(0)
    model = TrackedNetwork(Encoder().double().eval())
    x, y = random_vector(30).view(2, 5, 3), torch.tensor([0, 2])
    loss = model(x, y, track_activations=True)
    H = oracle(model, x, y)
    v = random_vector(len(H))
    f = factorize_hessian(model, loss, 0.1, route="sweep")
    assert relative(H @ f.solve(v) + 0.1 * f.solve(v) - v, v) <= 1e-9
    assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(H) < -0.1).sum())


class Unused(nn.Module):
    """Parameters that the loss does not depend on: never called, called for nothing, or cut off."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.used, self.other = way, nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "called":
            self.other(x)
        if self.way == "cut off":
            x = x + torch.tanh(self.other(x)).detach()
        return self.used(x)


@pytest.mark.parametrize("way", ["never", "called", "cut off"])
@pytest.mark.parametrize("route", ["sweep", "dense"])
def test_unused_parameters_are_refused(way, route):
    model = TrackedNetwork(Unused(way).double().eval())
    x, y = random_vector(3, 4), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match="does not depend on other.weight, other.bias"):
        factorize_hessian(model, model(x, y, track_activations=True), 0.1, route=route)
    model.net.other.requires_grad_(False)
    factorize_hessian(model, model(x, y, track_activations=True), 0.1, route=route)


class Sized(nn.Module):
    """Loops, branches, asserts and constants by sizes, as people write them. Steps: of any number up to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.i, self.h, self.o = nn.Embedding(4, 2), nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        N, steps, width = x.size()
        assert steps <= 4 and x.ndim == len(x.shape) == x.dim(), f"{steps} steps"
        x = x + self.position(torch.arange(steps)) / math.sqrt(x.size(-1))
        h, mask = torch.zeros(N, 3, dtype=x.dtype), torch.tril(torch.ones(steps, steps, dtype=x.dtype))
        x = (mask @ x).view(*x.shape[:-1], width)
        for step in range(x.shape[1]):
            h = torch.tanh(self.i(x[:, step]) + self.h(h))
        for z in x.unbind(1):
            h = h + self.i(z).sin()
        return self.o(h if x.shape[1:].numel() < 9 and len(self.o.weight.shape) == 2 else -h)


@pytest.mark.parametrize("steps", [1, 3])
def test_sizes_are_constants_of_the_graph(steps):
    """Of one batch, and of batches that have other sizes each."""
    torch.manual_seed(0)
    model, batches = TrackedNetwork(Sized().double()), []
    for n, s in ((3, steps), (2, 4), (1, steps)):
        batches.append((random_vector(n * s, 2).view(n, s, 2), torch.arange(n) % 2))
    (x, y), *_ = batches
    loss = model(x, y, track_activations=True)
    H, v = oracle(model, x, y), random_vector(sum(p.numel() for p in model.parameters()))
    f = factorize_hessian(model, loss, 0.1, route="sweep")
    assert relative(H @ f.solve(v) + 0.1 * f.solve(v) - v, v) <= 1e-12
    assert f.num_negative_eigenvalues == int((torch.linalg.eigvalsh(H) < -0.1).sum())
    single = [
        hessian_vector_product(model, model(x, y, track_activations=True), v, state_damping=0.3) for x, y in batches
    ]
    expected = sum(len(x) / 6 * product for (x, _), product in zip(batches, single, strict=True))
    product = hessian_vector_product(model, model.track_batches(batches), v, state_damping=0.3)
    assert relative(product - expected, expected) <= 1e-12


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "net, message",
    [
        (nn.Sequential(nn.LSTM(4, 3)), "LSTM.*loop over time steps"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), "parametrized weight"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "mixes the samples: call .eval"),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), "random: call .eval"),
        (nn.Sequential(nn.Linear(4, 3), Branching()), "can't trace.*Control flow"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(0)), "samples that don't mix"),
    ],
)
def test_what_is_refused(net, message):
    net = net.double()
    with pytest.raises((TypeError, ValueError), match=message):
        outputs = 3
        model = TrackedNetwork(net, lambda out, y: (out[0] if isinstance(out, tuple) else out).square().sum(1))
        x = random_vector(outputs, 4)
        factorize_hessian(model, model(x, x, track_activations=True), 0.1, route="sweep")


def test_wrong_calls():
    net = DenselyConnected().double().eval()
    x, y = random_vector(3, 4), torch.tensor([0, 2, 1])
    for arguments, message in (((3,), "must be a torch.nn.Module"), ((net, "hinge"), "unknown loss 'hinge'")):
        with pytest.raises((TypeError, ValueError), match=message):
            TrackedNetwork(*arguments)
    for forms in ({"Tanh": SquareDerivatives}, {nn.Tanh: nn.Tanh}, [nn.Tanh]):
        with pytest.raises(TypeError, match="closed_forms must map kinds of modules to"):
            TrackedNetwork(net, closed_forms=forms)
    with pytest.raises(ValueError, match="reduction='mean' or 'sum'"):
        TrackedNetwork(net, nn.MSELoss(reduction="none"))
    model = TrackedNetwork(net)
    loss = model(x, y, track_activations=True)
    for options, message in (
        ({"route": "gram"}, "needs curvature='gauss_newton'"),
        ({"route": "gram", "curvature": "gauss_newton", "keep": "disk"}, "for route='sweep'"),
        ({"route": "dense", "keep": "disk"}, "for route='sweep'"),
        ({"damping": (0.1, 0.2)}, "one for each of the 6.*parameter tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            factorize_hessian(model, loss, **{"damping": 0.1, **options})
    with pytest.raises(ValueError, match="class_dim=1"):
        TrackedNetwork(nn.Identity())._class_dim(torch.zeros(2, 3, 3), torch.zeros(2, 3).long())
    with torch.no_grad():
        net.a.bias.add_(1)
    with pytest.raises(ValueError, match="parameters changed"):
        factorize_hessian(model, loss, 0.1)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class SquareDerivatives(OperationDerivatives):
    second = 2.0

    def __init__(self, region, tensors, beta):
        super().__init__(region, tensors, beta)
        self.slope, self.curvature = 2 * tensors[0].flatten(), self.second * beta.flatten()

    def pull_back(self, p, which=slice(None)):
        return [self.slope * p][which]

    def push_forward(self, tangents):
        return self.slope * tangents[0]

    def add_curvature(self, blocks):
        blocks(0, 0).diagonal().add_(self.curvature)


class WrongDerivatives(SquareDerivatives):
    second = 2.1


def test_closed_forms_of_a_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), Square(), nn.Linear(4, 3)).double()
    x, y = random_vector(5, 3), torch.tensor([0, 2, 1, 1, 0])
    given, found, wrong = (
        TrackedNetwork(net, closed_forms=forms)
        for forms in ({Square: SquareDerivatives}, None, {Square: WrongDerivatives})
    )
    f, g = (
        factorize_hessian(model, model(x, y, track_activations=True), 0.1, route="sweep") for model in (given, found)
    )
    assert isinstance(f._system.program.operations[1], SquareDerivatives)
    assert f.logabsdet == pytest.approx(g.logabsdet, rel=1e-12)
    with pytest.raises(ArithmeticError, match="derivatives of _1"):
        factorize_hessian(wrong, wrong(x, y, track_activations=True), 0.1, route="sweep")
    model = TrackedNetwork(net, closed_forms={nn.Sequential: SquareDerivatives})
    with pytest.raises(ValueError, match="Sequential has parameters"):
        factorize_hessian(model, model(x, y, track_activations=True), 0.1, route="sweep")

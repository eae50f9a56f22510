"""What the exact Hessian of a trained network answers, and its rivals: K-FAC, EKFAC and the stochastic
Lanczos density of curvlinops; laplace-torch; CG; Neumann series; the Gauss–Newton matrix."""

from __future__ import annotations

import copy
import importlib
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor, nn
from tqdm import tqdm

from _curvature.minimum import Search
from _curvature.samples import Model, Samples
from _hessian.quasi_newton import direct_solve, quasi_newton_steps
from benchmarks.problems import BenchmarkError, Data, seconds
from benchmarks.report import Report, formatted, table
from curvature import Laplace, eigenpairs, eigenvalue_count, hessian_operator, hypergradient, minimize, spectrum
from hessian import DeepMLPWithTracking, HessianFactorization, factorize_hessian

DECAY = 1e-2
LEFT_OUT, QUICK_LEFT_OUT = 40, 3  # training samples that are left out, each for a retraining
CG_COLUMNS = 20  # test losses for CG, which takes a product for each in every step


def package(name: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BenchmarkError(f"the rivals need {name}: pip install {install}") from error


class Trained(NamedTuple):
    """A network at a certified minimum of the mean loss + ½ DECAY ‖θ‖² on digits, and digits that it has not seen."""

    model: DeepMLPWithTracking
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def tracked(self) -> Tensor:
        return self.model(self.x, self.y, track_activations=True)


def plain(model: DeepMLPWithTracking) -> nn.Module:
    """The same layers for the rivals, which look for modules."""
    return nn.Sequential(*[z for layer in model.layers for z in (layer, nn.Tanh())][:-1])


def digits() -> tuple[Tensor, Tensor]:
    """All of scikit-learn's digits in a fixed random order, columns standardized over the first 1,437."""
    from sklearn.datasets import load_digits

    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    deviation = x[:1437].std(0)
    return (x - x[:1437].mean(0)) / torch.where(deviation > 0, deviation, 1.0), y.long()


def trained(quick: bool) -> Trained:
    x, y = digits()
    train, hidden = (200, 8) if quick else (1437, 32)
    torch.manual_seed(0)
    model = DeepMLPWithTracking(64, hidden, 10, num_hidden_layers=2).double()
    problem = Trained(model, x[:train], y[:train], x[1437:], y[1437:])
    found = minimize(model, problem.tracked, DECAY)
    if not found:
        raise BenchmarkError(f"training found no minimum: {found}")
    return problem


# -------------------------------------------------------------------------------------------------- influence


def retrained(model: Model, x: Tensor, y: Tensor, decay: float, f: HessianFactorization, gtol: float = 1e-10) -> Model:
    """A copy at the minimum for these data and this weight decay, to ‖gradient‖ ≤ gtol. `f` is a factorization at a
    minimum nearby: steps that start from it are cheap."""
    other = copy.deepcopy(model)
    search = Search(other, lambda: other(x, y, track_activations=True), decay)
    search.move(quasi_newton_steps(search, partial(direct_solve, f), search.point, gtol, 300, by_gradient=True).theta)
    if search.point.gradient_norm > gtol:
        search.newton(gtol, 1e-8, 20)
    if (norm := search.point.gradient_norm) > max(gtol, 1e-10):
        raise BenchmarkError(f"retraining left a gradient of norm {norm:.1e}: is {f} near the minimum?")
    return other


def leave_one_out(
    model: Model, x: Tensor, y: Tensor, test: Data, decay: float, f: HessianFactorization, left_out: list[int]
) -> Tensor:
    """What retraining without each of these samples does to the test losses, (k, M); the others keep their weight 1/N.
    `f`: at the minimum with all of them."""
    rows, N = [], len(y)
    for index in tqdm(left_out, desc="leave one out", disable=None):
        others = torch.arange(N) != index
        rows.append(losses(retrained(model, x[others], y[others], decay * N / (N - 1), f), *test))
    return torch.stack(rows) - losses(model, *test)


@torch.no_grad()
def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each sample (N,)."""
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def conjugate_gradients(product: Callable[[Tensor], Tensor], columns: Tensor, steps: int, rtol: float = 0.0) -> Tensor:
    """CG on (H + DECAY·I) X = columns, each column by itself, all products together; stopped when all reach rtol."""
    x, r, p = torch.zeros_like(columns), columns, columns
    squared = first = r.square().sum(0)
    for _ in range(steps):
        if bool((squared <= rtol**2 * first).all()):
            break
        Ap = product(p) + DECAY * p
        step = squared / (p * Ap).sum(0)
        x, r = x + step * p, r - step * Ap
        squared, before = r.square().sum(0), squared
        p = r + squared / before * p
    return x


def kronecker_factored(kind: str, net: nn.Module, x: Tensor, y: Tensor, decay: float, columns: Tensor) -> Tensor:
    """curvlinops' K-FAC or EKFAC of the Gauss–Newton matrix, inverted with the exact damping, times columns (P, k)."""
    curvlinops = package("curvlinops", "curvlinops-for-pytorch")
    operator = getattr(curvlinops, f"{kind}LinearOperator")(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(x, y)],
        fisher_type=curvlinops.FisherType.TYPE2,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    return curvlinops.KFACInverseLinearOperator(operator, damping=decay, use_exact_damping=True) @ columns


def influence_table(problem: Trained, quick: bool) -> list[str]:
    N, M = len(problem.y), len(problem.test_y)
    samples, loss = Samples(problem.model), problem.tracked()
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    left_out = chosen[: QUICK_LEFT_OUT if quick else LEFT_OUT].sort().values
    test = torch.cat(list(samples.gradients(problem.test_x, problem.test_y))).mT.contiguous()
    train = torch.cat(list(samples.gradients(problem.x[left_out], problem.y[left_out])))

    def exact(curvature: str) -> Tensor:
        return factorize_hessian(problem.model, loss, DECAY, curvature=curvature).solve(test)

    def kronecker(kind: str) -> Callable[[], Tensor]:
        return partial(kronecker_factored, kind, plain(problem.model), problem.x, problem.y, DECAY, test)

    f = factorize_hessian(problem.model, loss, DECAY)
    unseen = problem.test_x, problem.test_y
    truth = leave_one_out(problem.model, problem.x, problem.y, unseen, DECAY, f, left_out.tolist())
    solved = f.solve(test)
    methods: dict[str, Callable[[], Tensor]] = {"exact Hessian": lambda: exact("hessian")}
    product = hessian_operator(problem.model, loss).apply
    for n in (10, 100) if quick else (10, 100, 1000):
        methods[f"CG, {n} products"] = partial(conjugate_gradients, product, test[:, :CG_COLUMNS], n)
    methods["Gauss–Newton, exact"] = lambda: exact("gauss_newton")
    methods["EKFAC (curvlinops)"] = kronecker("EKFAC")
    methods["K-FAC (curvlinops)"] = kronecker("KFAC")
    rows: list[list[object]] = []
    for name, method in methods.items():
        started = time.perf_counter()
        X = method()
        elapsed = time.perf_counter() - started
        columns = X.shape[1]
        predicted, measured, reference = train @ X / N, truth[:, :columns], solved[:, :columns]
        error = ((predicted - measured).abs() / measured.abs()).median()
        correlation = torch.corrcoef(torch.stack([predicted.flatten(), measured.flatten()]))[0, 1]
        off = float((X - reference).norm() / reference.norm())
        rows.append([name, columns, f"{100 * float(error):.3g} %", float(correlation), f"{off:.0e}", elapsed])
    header = ["inverse", "test losses", "median error of an effect", "correlation", "‖X − exact‖/‖exact‖", "seconds"]
    note = [
        f"{len(left_out)} of {N:,} training images left out, drawn at random; their effects on {M} test losses, "
        f"against the minima retrained without them to ‖gradient‖ ≤ 1e-10. X: the {M} solves. Weight decay {DECAY:g}, "
        f"P = {f.num_parameters:,}.",
        "",
    ]
    return ["**Influence.**", "", *table(header, rows), "", *note]


# --------------------------------------------------------------------------------------------------- spectrum


def lanczos_distribution(net: nn.Module, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Grid, and distribution function on it, of curvlinops' stochastic Lanczos density; 128 Lanczos vectors, twice."""
    curvlinops = package("curvlinops", "curvlinops-for-pytorch")
    torch.manual_seed(0)
    parameters = list(net.parameters())
    H = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
    grid, density = curvlinops.lanczos_approximate_spectrum(H, 128, num_repeats=2)
    distribution = np.cumsum(density.numpy())
    return grid.numpy(), distribution / distribution[-1]


def smallest_by_products(problem: Trained, loss: Tensor) -> str:
    """SciPy's Lanczos on products with H, for the most negative eigenvalue."""
    started = time.perf_counter()
    start = np.random.default_rng(0).standard_normal(sum(p.numel() for p in problem.model.parameters()))
    try:
        value = eigsh(hessian_operator(problem.model, loss), 1, which="SA", v0=start, return_eigenvectors=False)[0]
    except ArpackNoConvergence:
        return f"did not converge in {formatted(time.perf_counter() - started)} s"
    return f"{value:.6g}, {formatted(time.perf_counter() - started)} s"


def spectrum_table(problem: Trained, quick: bool) -> list[str]:
    loss, threshold = problem.tracked(), -DECAY / 4
    started = time.perf_counter()
    found = spectrum(problem.model, loss, route="dense")
    of_all = time.perf_counter() - started
    assert found.eigenvalues is not None
    values = found.eigenvalues.numpy()
    counted: list[int] = []
    of_count = seconds(lambda: counted.append(eigenvalue_count(problem.model, loss, -np.inf, threshold)))
    started = time.perf_counter()
    grid, distribution = lanczos_distribution(plain(problem.model), problem.x, problem.y)
    of_lanczos = time.perf_counter() - started
    exact = np.searchsorted(values, grid) / len(values)
    off = float(np.abs(distribution - exact).max())
    below = round(len(values) * float(np.interp(threshold, grid, distribution)))
    started = time.perf_counter()
    pair = eigenpairs(problem.model, loss, 1, "smallest")
    of_pair = f"{float(pair.values[0]):.6g}, {formatted(time.perf_counter() - started)} s"
    header = ["question", "exact", "approximation"]
    rows: list[list[object]] = [
        [
            "distribution function of all eigenvalues",
            f"{formatted(of_all)} s",
            f"off by {off:.2f}, {formatted(of_lanczos)} s",
        ],
        [
            f"eigenvalues below {threshold:g}",
            f"{counted[0]}, {formatted(of_count)} s",
            f"{below}, from the same density",
        ],
        ["the smallest eigenvalue", of_pair, smallest_by_products(problem, loss)],
    ]
    note = "Approximations: curvlinops' stochastic Lanczos density (128 vectors, twice); SciPy's eigsh on products."
    return ["**Spectrum.**", "", *table(header, rows), "", f"{found!r}. {note}", ""]


# --------------------------------------------------------------------------------------------------- evidence


NOISE, PRIORS = 0.125, [2.0**k for k in range(-5, 6)]


def sine_regression(width: int) -> tuple[DeepMLPWithTracking, Tensor, Tensor]:
    """A network at a minimum of its mean square on 120 points, with the weight decay of a prior precision of 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 120, dtype=torch.float64)[:, None]
    y = torch.sin(3 * torch.pi * x) + NOISE * torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = DeepMLPWithTracking(1, width, 1, 2, loss="mse").double()
    minimize(model, lambda: model(x, y, track_activations=True), 2 * NOISE**2 / len(x))
    return model, x, y


def evidence_by_laplace_torch(model: DeepMLPWithTracking, x: Tensor, y: Tensor, structure: str) -> list[float]:
    laplace = package("laplace", "laplace-torch")
    found = laplace.Laplace(plain(model), "regression", "all", structure, sigma_noise=NOISE)
    found.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), len(x)))
    values = []
    for prior in PRIORS:
        found.prior_precision = prior
        values.append(float(found.log_marginal_likelihood()))
    return values


def evidence_table(problem: Trained, quick: bool) -> list[str]:
    """A regression on a sine: log evidence at 11 prior precisions."""
    width = 8 if quick else 32
    model, x, y = sine_regression(width)
    loss = model(x, y, track_activations=True)

    def ours(curvature: str) -> list[float]:
        first = Laplace(model, loss, 1.0, curvature, noise=NOISE)
        return [evidence_or_nan(first.with_prior(prior)) for prior in PRIORS]

    methods: dict[str, Callable[[], list[float]]] = {
        "Laplace, Gauss–Newton": partial(ours, "gauss_newton"),
        "laplace-torch, full": partial(evidence_by_laplace_torch, model, x, y, "full"),
        "laplace-torch, Kronecker": partial(evidence_by_laplace_torch, model, x, y, "kron"),
        "laplace-torch, diagonal": partial(evidence_by_laplace_torch, model, x, y, "diag"),
        "Laplace, exact Hessian": partial(ours, "hessian"),
    }
    rows: list[list[object]] = []
    reference: list[float] = []
    torch.set_default_dtype(torch.float64)  # which laplace-torch takes
    try:
        for name, method in methods.items():
            method()  # the first call of a package pays for its imports
            started = time.perf_counter()
            values = method()
            elapsed = time.perf_counter() - started
            reference = reference or values
            off = np.nanmax(np.abs(np.array(values) - np.array(reference)))
            rows.append([name, f"{off:.1e}", PRIORS[int(np.nanargmax(values))], sum(np.isnan(values)), elapsed])
    finally:
        torch.set_default_dtype(torch.float32)
    P = sum(p.numel() for p in model.parameters())
    header = ["posterior", "largest difference, nats", "best prior precision", "no evidence at", "seconds"]
    note = (
        f"Regression of {len(x)} points on 1 → {width} → {width} → 1, P = {P:,}; log evidence at {len(PRIORS)} prior "
        "precisions from 1/32 to 32, the same parameters in all; differences are those to the first row. Without "
        "evidence: H + prior is indefinite there."
    )
    return ["**Evidence.**", "", *table(header, rows), "", note, ""]


def evidence_or_nan(posterior: Laplace) -> float:
    return posterior.log_evidence if posterior.factorization.is_positive_definite else float("nan")


# ---------------------------------------------------------------------------------------------- hypergradient


def hypergradient_table(problem: Trained, quick: bool) -> list[str]:
    """d test loss/d weight decay; the truth by central differences of retrained minima."""
    loss, model = problem.tracked(), problem.model
    parameters = list(model.parameters())
    f = factorize_hessian(model, loss, DECAY)
    val_loss = model(problem.test_x, problem.test_y)
    g = torch.cat([p.flatten() for p in torch.autograd.grad(val_loss, parameters, retain_graph=True)])
    theta = torch.cat([p.detach().flatten() for p in parameters])

    def at_minimum(decay: float) -> float:
        found = retrained(model, problem.x, problem.y, decay, f, gtol=1e-12)
        return float(losses(found, problem.test_x, problem.test_y).mean())

    h = 1e-3 * DECAY
    truth = (at_minimum(DECAY + h) - at_minimum(DECAY - h)) / (2 * h)

    def by_cg(rtol: float) -> float:
        return -float(conjugate_gradients(product, g[:, None], 10_000, rtol)[:, 0] @ theta)

    product = hessian_operator(model, loss).apply
    largest = float(eigenpairs(model, loss, 1).values[0]) + DECAY

    def neumann(terms: int) -> float:
        term, total = g / largest, torch.zeros_like(g)
        for _ in range(terms):
            total += term
            term = term - (product(term[:, None])[:, 0] + DECAY * term) / largest
        return -float(total @ theta)

    def gauss_newton() -> float:
        return -float(factorize_hessian(model, loss, DECAY, curvature="gauss_newton").solve(g) @ theta)

    methods: dict[str, Callable[[], float]] = {
        "hypergradient": lambda: hypergradient(model, loss, val_loss, DECAY),
        "the same, factored before": lambda: -float(f.solve(g) @ theta),
        "CG to 1e-5": lambda: by_cg(1e-5),
        "CG to 1e-2": lambda: by_cg(1e-2),
        "Neumann series, 100 terms": lambda: neumann(100),
        "Neumann series, 10,000 terms": lambda: neumann(10_000),
        "Gauss–Newton, exact": gauss_newton,
    }
    rows: list[list[object]] = []
    for name, method in methods.items():
        started = time.perf_counter()
        value = method()
        elapsed = time.perf_counter() - started
        rows.append([name, f"{value:.6g}", f"{abs(value / truth - 1):.1e}", elapsed])
    header = ["method", "d test loss/d weight decay", "relative error", "seconds"]
    note = f"The truth, {truth:.8g}, is a central difference of two minima that were retrained to 1e-10 or better."
    return ["**Hypergradient.**", "", *table(header, rows), "", note]


def curvature(quick: bool) -> Report:
    package("curvlinops", "curvlinops-for-pytorch")
    with warnings.catch_warnings(action="ignore"):  # of the rivals
        started = time.perf_counter()
        problem = trained(quick)
        shape = " → ".join(map(str, (64, *(layer.out_features for layer in problem.model.layers))))
        lines = [
            f"{len(problem.y):,} digits, {shape}, trained to a certified minimum in "
            f"{formatted(time.perf_counter() - started)} s. Test accuracy "
            f"{100 * float((problem.model(problem.test_x).argmax(1) == problem.test_y).double().mean()):.1f} %.",
            "",
        ]
        for part in (influence_table, spectrum_table, evidence_table, hypergradient_table):
            lines += part(problem, quick)
    return Report(lines)

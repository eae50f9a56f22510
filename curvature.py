"""What the exact Hessian of a trained network is for: spectra, minima, influence, evidence, hypergradients.

    loss = model(x, y, track_activations=True)
    print(is_minimum(model, loss, weight_decay=0.01))
    effects = influence(model, loss, test_x, test_y, damping=0.01)     # (N, M)
    spectrum(model, loss).plot()

All functions take a tracked loss, of a `DeepMLPWithTracking` or of any `TrackedNetwork`. They are short: each is a
formula over factorizations, solves and inertias of H + εI, H the Hessian of the tracked loss in the P parameters that
are not frozen. Nothing is approximated but where the docstring says so. Vectors are in the order of
`model.parameters()`; results are in float64.

Weight decay. The solver sees the plain loss. A network that was trained with a term ½w‖θ‖² has its minimum there, not
where ∇loss = 0. So pass w: as `weight_decay`, or in `damping`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from _curvature.counts import EigenPairs, EigenvalueCounts
from _curvature.laplace import Laplace, Predictive, sums_by_damping
from _curvature.minimum import Minimum, Search, certificate
from _curvature.progress import progress
from _curvature.samples import Inputs, Model, Samples, check_memory, flat, num_parameters, num_samples, split, trainable
from _curvature.spectrum import Spectrum, by_bisection, checked_edges, of_eigenvalues
from _hessian.argument_checks import checked_nonnegative
from _hessian.scipy_operators import SymmetricOperator
from hessian import HessianFactorization, _system, factorize_hessian

__all__ = [
    "EigenPairs",
    "Influences",
    "Laplace",
    "Minimum",
    "Predictive",
    "Spectrum",
    "eigenpairs",
    "eigenvalue_count",
    "hessian_operator",
    "hypergradient",
    "influence",
    "is_minimum",
    "minimize",
    "self_influence",
    "smallest_damping",
    "spectrum",
    "top_influences",
]

_ALL_EIGENVALUES = 3000  # up to so many parameters, all eigenvalues take seconds
_COLUMNS = 2**25  # numbers of right-hand sides that are solved together


# ------------------------------------------------------------------------------------------------- eigenvalues


@torch.no_grad()
def hessian_operator(model: Model, loss: Tensor, *, curvature: str = "hessian") -> SymmetricOperator:
    """v ↦ H v as a `scipy.sparse.linalg.LinearOperator` (P, P) on NumPy arrays, in float64.

    It answers for the present parameters after they change. Cost of a product: as `hessian_vector_product`; the
    derivatives are taken once. `HessianFactorization.as_linear_operator()` is that of (H + εI)⁻¹.
    """
    system = _system(model, loss, curvature)
    return SymmetricOperator(system.num_parameters, system.device, system.product)


@torch.no_grad()
def eigenvalue_count(model: Model, loss: Tensor, a: float, b: float, *, curvature: str = "hessian") -> int:
    """How many eigenvalues of H lie in (a, b): exact, by the inertia of H − aI and H − bI. a and b may be infinite.

    Cost: two factorizations, a solve and a product for each. SingularHessianError where an eigenvalue lies within
    rounding of a or b. The many zeros of a cross-entropy Hessian do so at 0: choose ±1e-8 of the largest eigenvalue.
    Reference: Sylvester (1852).
    """
    if not a < b:
        raise ValueError(f"a must be less than b, got ({a!r}, {b!r})")
    counts = EigenvalueCounts(model, loss, curvature)
    return counts.below(b) - counts.below(a)


@torch.no_grad()
def eigenpairs(
    model: Model,
    loss: Tensor,
    k: int,
    which: str = "largest",
    *,
    near: float | None = None,
    curvature: str = "hessian",
) -> EigenPairs:
    """k eigenpairs of H: values (k,) ascending, vectors (P, k), and residuals ‖H u − μ u‖ (k,).

    which: 'largest' or 'smallest', with their sign. near: the k nearest to this number, in place of `which`.

    Where H is formed (`route`, as 'auto' in `factorize_hessian` decides, and where k ≥ P/4), by LAPACK. Else by shift
    and invert: Lanczos iterations (ARPACK) with (H − σI)⁻¹. The inertia then proves that none between was missed.
    Eigenvalues nearer to each other than 1e-10 ‖H‖ are not told apart; of a multiple one, any vectors are returned.
    Cost: about six factorizations; when H is formed 4 P³/3 operations, else up to ten more factorizations and a few
    dozen solves.
    Raises ArithmeticError where some were missed, SingularHessianError where no inertia could be had.
    """
    P = num_parameters(model)
    if not isinstance(k, int) or not 1 <= k <= P:
        raise ValueError(f"k must be an integer from 1 to the number of parameters, {P}, got {k!r}")
    if which not in ("largest", "smallest"):
        raise ValueError(f"unknown which={which!r}: choose 'largest' or 'smallest', or pass near=")
    counts = EigenvalueCounts(model, loss, curvature, "dense" if 4 * k >= P else "auto")
    return counts.nearest(near, k) if near is not None else counts.extreme(k, 1 if which == "largest" else -1)


@overload
def spectrum(
    model: Model,
    loss: Tensor,
    bins: int | Sequence[float] = 24,
    *,
    by: None = None,
    curvature: str = "hessian",
    route: str = "auto",
    max_factorizations: int = 64,
) -> Spectrum: ...


@overload
def spectrum(
    model: Model,
    loss: Tensor,
    bins: int | Sequence[float] = 24,
    *,
    by: Literal["parameter"],
    curvature: str = "hessian",
    route: str = "auto",
    max_factorizations: int = 64,
) -> dict[str, Spectrum]: ...


@torch.no_grad()
def spectrum(
    model: Model,
    loss: Tensor,
    bins: int | Sequence[float] = 24,
    *,
    by: Literal["parameter"] | None = None,
    curvature: str = "hessian",
    route: str = "auto",
    max_factorizations: int = 64,
) -> Spectrum | dict[str, Spectrum]:
    """Exact numbers of eigenvalues of H in bins; `.plot(ax)` draws them.

    bins: on each side of zero, equal in the logarithm, from the largest magnitude down by eight decades; one more bin
        lies around zero. Or ascending edges that enclose all eigenvalues.
    by: 'parameter' for the diagonal block of each parameter tensor instead, as a dict of one Spectrum for each name.
    curvature: 'hessian' or 'gauss_newton'. route: as in `factorize_hessian`.
    max_factorizations: of the bisection. If it is too small, neighbouring bins are joined; the counts stay exact.

    With route='dense', or up to 3,000 parameters, H is formed and all eigenvalues are computed: 4 P³/3 operations, and
    24 P² bytes. Else the bins are counted by bisection on the inertia, and `.eigenvalues` is None. A block of p
    parameters takes p products with H, 4 p³/3 operations and 16 p² bytes.
    Raises MemoryError before a matrix is formed that doesn't fit; SingularHessianError where an eigenvalue lies within
    rounding of an edge. Not checked: rounding of the computed eigenvalues, about 1e-15 ‖H‖ √P, next to an edge.
    """
    if isinstance(bins, int) and bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = bins if isinstance(bins, int) else checked_edges(bins)
    if by is not None:
        return _spectra_by_parameter(model, hessian_operator(model, loss, curvature=curvature), edges, curvature, by)
    if route == "auto" and num_parameters(model) <= _ALL_EIGENVALUES:
        route = "dense"
    counts = EigenvalueCounts(model, loss, curvature, route)
    above = 1.5 * counts.norm() or 1.0
    f = counts.factorize(above)
    if not isinstance(f._formed, Tensor) or f.route != "dense":
        return by_bisection(counts, edges, curvature, max_factorizations)
    values = torch.linalg.eigvalsh(f._formed)
    if int((values < above).sum()) != f.num_negative_eigenvalues:
        raise ArithmeticError("the eigenvalues and the inertia disagree: is the memory or a LAPACK at fault?")
    return of_eigenvalues(values, edges, curvature, counts.num_factorizations)


def _spectra_by_parameter(
    model: Model, operator: SymmetricOperator, bins: int | Tensor, curvature: str, by: str
) -> dict[str, Spectrum]:
    if by != "parameter":
        raise ValueError(f"unknown by={by!r}: choose 'parameter', or leave it out for all of H")
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    largest = max(size for _, size in named)
    check_memory(f"the block of a parameter with {largest:,} entries", 16 * largest**2, operator.device)
    found, start = {}, 0
    for name, size in progress(named, "blocks"):
        found[name] = of_eigenvalues(torch.linalg.eigvalsh(operator.diagonal_block(start, size)), bins, curvature)
        start += size
    return found


# ----------------------------------------------------------------------------------------------------- minima


@torch.no_grad()
def is_minimum(
    model: Model, loss: Tensor, htol: float = 1e-8, *, gtol: float = 1e-8, weight_decay: float = 0.0
) -> Minimum:
    """Whether f = loss + ½w‖θ‖² has a minimum at the present θ: a certificate, which prints as a sentence.

    It holds (`bool`) where ‖∇f‖ ≤ gtol and ∇²f + htol·I has no negative eigenvalue, by a certified inertia.
    `.gradient_norm`, `.num_negative_eigenvalues`, and `.smallest_eigenvalue` of ∇²f = H + wI. gtol is in units of
    loss / parameter; htol and weight_decay (w) are in units of loss / parameter².

    Cost: a gradient, and about six factorizations. Raises SingularHessianError where an eigenvalue lies within
    rounding of −htol: choose another one.
    """
    checked = (checked_nonnegative(*x) for x in (("gtol", gtol), ("htol", htol), ("weight_decay", weight_decay)))
    return certificate(model, EigenvalueCounts(model, loss), *checked)


@torch.no_grad()
def smallest_damping(model: Model, loss: Tensor, *, rtol: float = 0.01) -> float:
    """The least ε > 0, up to a factor of 1 + rtol, that makes H + εI positive definite: −λ_min.

    Where no eigenvalue lies below −1e-10 ‖H‖, that number is returned: float64 sees no smaller one. Both sides are
    proved by inertia. A weight decay counts in ε. Cost: about six factorizations.
    """
    counts = EigenvalueCounts(model, loss)
    epsilon = max(-float(counts.extreme(1, -1).values[0]), 1e-10 * counts.norm()) * (1 + rtol / 2)
    while counts.below(-epsilon) > 0:
        epsilon *= 1 + rtol / 4
    return epsilon


def minimize(
    model: Model,
    closure: Callable[[], Tensor],
    weight_decay: float = 0.0,
    *,
    start: str = "lbfgs",
    max_start_steps: int = 1000,
    max_steps: int = 50,
    gtol: float = 1e-10,
    htol: float = 1e-8,
) -> Minimum:
    """Move the model's parameters to a certified minimum of f = loss + ½w‖θ‖², as the functions above presume.

    closure: returns model(x, y, track_activations=True), always of the same data. weight_decay: w, in units of
    loss / parameter². start: 'lbfgs', L-BFGS for up to `max_start_steps` steps, or 'damped_newton', which takes deep
    networks further. Then up to `max_steps` rounds: a factorization of the exact H + wI, and quasi-Newton steps with
    it. Where that is indefinite a multiple of I is added. At a saddle the step is along the most negative eigenvector.

    Returns the certificate of the point that was reached, as `is_minimum` does: look whether it holds. It can't without
    a weight decay where the minimum lies at infinity, as it does for separable classes.
    Cost: L-BFGS by gradients; then about ten factorizations. A factorization is used again while it serves.
    Raises TypeError for a float32 model. Reference: Nocedal & Wright (2006), chapters 3 and 7.
    """
    if start not in ("lbfgs", "damped_newton"):
        raise ValueError(f"unknown start {start!r}: choose 'lbfgs' or 'damped_newton'")
    gtol, htol = checked_nonnegative("gtol", gtol), checked_nonnegative("htol", htol)
    search = Search(model, closure, checked_nonnegative("weight_decay", weight_decay))
    with torch.no_grad():
        approach = search.damped_newton if start == "damped_newton" else search.lbfgs
        approach(max_start_steps)
        while search.newton(gtol, htol, max_steps):  # from a saddle
            approach(max_start_steps)
        return certificate(model, search.eigenvalue_counts(), gtol, htol, search.weight_decay)


# ------------------------------------------------------------------------------------------------- influence


class Influences(NamedTuple):
    """Training samples, by the size of their effect on one test loss: the largest first."""

    indices: Tensor  # (k,) in the tracked batch
    values: Tensor  # (k,) change of the test loss when the sample is left out; > 0 where the sample helps


@torch.no_grad()
def influence(
    model: Model, loss: Tensor, test_x: Inputs, test_y: Tensor, damping: float, *, curvature: str = "hessian"
) -> Tensor:
    """First-order change of each test loss when a training sample is left out, (N, M): row i is training sample i of
    the tracked loss, column t test sample t.

        effect[i, t] = ∇ℓ_tᵀ (H + εI)⁻¹ ∇ℓ_i / N

    test_x, test_y: (M, …), as the model takes them. damping: ε, the weight decay w of the training plus what you add;
    in units of loss / parameter².

    This is the derivative, times one, of the minimum of (1/N) Σ_j ℓ_j + ½w‖θ‖² as sample i loses its weight 1/N. The
    others keep theirs: to retrain, take the mean over N − 1 samples with a weight decay of w N/(N − 1).

    Cost: one factorization, M solves, N + M gradients of single samples, 8 N M bytes. H + εI must be positive definite,
    or the parameters are no minimum: ValueError, with the number of its negative eigenvalues. A loss that is no plain
    mean, or sum, over its samples is refused. Not checked: that the gradient of the whole loss vanishes (`is_minimum`),
    and how far the effect is from linear. Reference: Koh & Liang (2017).
    """
    f, samples = _definite(model, loss, damping, curvature), Samples(model)
    batches = samples.tracked_batches(model)
    N, M = sum(len(y) for _, y in batches), num_samples(test_x)
    if test_y.shape[:1] != (M,):
        raise ValueError(
            f"test_x and test_y must have the same M samples in their first dimension, got {M} and "
            f"{tuple(test_y.shape)}: for one sample pass test_x[i : i + 1] and test_y[i : i + 1]"
        )
    check_memory(f"the influence of {N:,} samples on {M:,}", 8 * N * M, f._system.device)
    columns = max(1, _COLUMNS // f.num_parameters)
    parts = []
    tests = list(zip(split(test_x, columns), test_y.split(columns), strict=True))
    for x, y in progress(tests, "influence"):
        X = f.solve(torch.cat(list(samples.gradients(x, y, "the test loss"))).mT)  # (P, M)
        parts.append(torch.cat([G @ X for batch in batches for G in samples.gradients(*batch)]))
    return torch.cat(parts, 1) * samples.weight(N)


@torch.no_grad()
def self_influence(model: Model, loss: Tensor, damping: float, *, curvature: str = "hessian") -> Tensor:
    """First-order change of each training sample's own loss when it is left out, (N,): the diagonal of `influence` on
    the training set. It is large for samples that are mislabelled or alone of their kind. Arguments, errors and what
    is not checked: as there. Cost: N solves."""
    f, samples = _definite(model, loss, damping, curvature), Samples(model)
    batches = samples.tracked_batches(model)
    N = sum(len(y) for _, y in batches)
    chunks = (G for batch in batches for G in samples.gradients(*batch))
    found = [(G * f.solve(G.mT).mT).sum(1) for G in progress(chunks, "self-influence")]
    return torch.cat(found) * samples.weight(N)


def top_influences(
    model: Model,
    loss: Tensor,
    test_x: Inputs,
    test_y: Tensor,
    damping: float,
    k: int = 10,
    *,
    curvature: str = "hessian",
) -> Influences:
    """The k training samples with the largest effect on the loss of one test sample, (1, …); see `influence`."""
    effects = influence(model, loss, test_x, test_y, damping, curvature=curvature)
    if effects.shape[1] != 1:
        raise ValueError(f"top_influences takes one test sample, got {effects.shape[1]}: pass test_x[i : i + 1]")
    effects = effects[:, 0]
    indices = effects.abs().topk(min(k, len(effects))).indices
    return Influences(indices, effects[indices])


def _definite(model: Model, loss: Tensor, damping: float | Sequence[float], curvature: str) -> HessianFactorization:
    f = factorize_hessian(model, loss, damping, curvature=curvature)
    if not f.is_positive_definite:
        raise ValueError(
            f"H + damping·I has {f.num_negative_eigenvalues} negative eigenvalues at damping={damping}: the parameters "
            "are no minimum with that weight decay: train on (minimize), or pass what smallest_damping says"
        )
    return f


# --------------------------------------------------------------------------------------------- hypergradient


@overload
def hypergradient(model: Model, loss: Tensor, val_loss: Tensor, weight_decay: float) -> float: ...


@overload
def hypergradient(model: Model, loss: Tensor, val_loss: Tensor, weight_decay: Sequence[float]) -> tuple[float, ...]: ...


def hypergradient(
    model: Model, loss: Tensor, val_loss: Tensor, weight_decay: float | Sequence[float]
) -> float | tuple[float, ...]:
    """d val_loss/dw at the minimum θ(w) of loss + ½w‖θ‖²: exactly, by implicit differentiation.

        d val_loss/dw = −∇val_lossᵀ (H + wI)⁻¹ θ

    loss: the tracked training loss. val_loss: model(val_x, val_y), with its graph, at the same parameters.
    weight_decay: w, in units of loss / parameter²; one number, or one a layer (of a TrackedNetwork: a parameter
    tensor). The result has its form.

    Cost: one factorization, one solve, one backward pass. H + wI must be positive definite: ValueError. Not checked:
    that ∇loss + wθ = 0 (`is_minimum`); elsewhere the formula means nothing.
    Reference: Bengio (2000); Lorraine, Vicol & Duvenaud (2020).
    """
    parameters = trainable(model)
    if not isinstance(val_loss, Tensor) or not val_loss.requires_grad:
        raise ValueError("val_loss must be model(val_x, val_y) with its graph, computed outside of torch.no_grad()")
    gradient = flat(list(torch.autograd.grad(val_loss, parameters, retain_graph=True)))
    f = _definite(model, loss, weight_decay, "hessian")
    products = -f.solve(gradient) * flat(parameters)
    sums = sums_by_damping(f, products).tolist()
    return tuple(sums) if isinstance(f.damping, tuple) else sums[0]

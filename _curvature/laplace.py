"""`Laplace`: evidence and predictions of the Gaussian posterior around trained parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from _curvature.progress import progress
from _curvature.samples import Inputs, Model, Samples, flat, trainable
from _hessian.layers import Damping
from _hessian.tables import html_table
from hessian import DeepMLPWithTracking, HessianFactorization, factorize_hessian

Prior = float | Sequence[float]


class Predictive(NamedTuple):
    """Of the linearized network at M inputs with C outputs each."""

    mean: Tensor  # (M, C) outputs of the trained network
    covariance: Tensor  # (M, C, C) of the outputs, exact
    noise: float  # σ of the targets, in regression; else 0
    probabilities: Tensor | None  # (M, C) in classification, by the probit approximation; else None

    @property
    def variance(self) -> Tensor:
        """(M, C): of each output; in regression that of a target, with the noise σ²."""
        return self.covariance.diagonal(dim1=1, dim2=2) + self.noise**2


class Laplace:
    """The Gaussian posterior N(θ, Σ) around trained parameters θ, with a Gaussian prior of mean 0 on them.

        Σ⁻¹ = s G + diag(δ)       s·loss = −log p(data | θ), up to a constant
        log evidence = −s·loss − c − ½ θᵀdiag(δ)θ + ½ Σ log δ − ½ log det Σ⁻¹

    G is the Gauss–Newton matrix or the exact Hessian of the tracked mean loss. s is the number of targets N for
    cross-entropies, and N·C/(2σ²) for 'mse'; c = N·C log(σ√2π) there, else 0. A loss function is read as the −log p of
    each sample.

    prior_precision: δ > 0, in units of 1/parameter²: one number, or one a layer (of a TrackedNetwork: a parameter
        tensor). θ minimizes s·loss + ½ θᵀdiag(δ)θ, as Laplace's method presumes, if the weight decay was δ/s.
    curvature: 'gauss_newton', positive semidefinite; or 'hessian'. Where the exact Σ⁻¹ is not positive definite there
        is no Gaussian and no evidence: a LinAlgError says so, with the number of its negative eigenvalues.
    noise: σ of the targets' noise, for 'mse'.

    Cost: one factorization. A further prior by `with_prior` costs what `HessianFactorization.with_damping` does.
    Not checked: that θ is a minimum (see `is_minimum`).
    Reference: MacKay (1992); Immer et al. (2021), evidence by Gauss–Newton; Daxberger et al. (2021), laplace-torch.
    """

    def __init__(
        self,
        model: Model,
        loss: Tensor,
        prior_precision: Prior,
        curvature: str = "gauss_newton",
        *,
        noise: float = 1.0,
    ):
        if not 0 < noise < math.inf:
            raise ValueError(f"noise must be a finite number > 0, the σ of the targets, got {noise!r}")
        self._samples = Samples(model)
        self._theta = flat(trainable(model))
        self._noise = noise if model.loss == "mse" else 0.0
        if isinstance(model.loss, nn.Module):
            raise TypeError(
                "Laplace needs a loss whose likelihood it knows, and got a loss module: pass its name "
                "('cross_entropy', 'mse', 'binary_cross_entropy'), or a function of outputs and targets with one "
                "−log p a sample"
            )
        self.loss, self.curvature = float(loss.detach()), curvature
        self._scale, self._constant = 0.0, 0.0
        for _, targets in self._samples.tracked_batches(model):
            self._scale += _num_targets(model, targets)
        if self._noise:
            self._constant = self._scale * math.log(noise * math.sqrt(2 * math.pi))
            self._scale /= 2 * noise**2
        damping = _scaled(_checked_prior(prior_precision), 1 / self._scale)
        self._factorization = factorize_hessian(model, loss, damping, curvature=curvature)
        formed = self._factorization._formed
        # of G, or of the Gram matrix: once for all priors
        self._eigenvalues = cache(lambda: torch.linalg.eigvalsh(formed) if isinstance(formed, Tensor) else None)

    @property
    def factorization(self) -> HessianFactorization:
        """G + diag(δ)/s, factored."""
        return self._factorization

    @property
    def prior_precision(self) -> Damping:
        return _scaled(self._factorization.damping, self._scale)

    def with_prior(self, prior_precision: Prior) -> Laplace:
        """The same posterior with another prior."""
        other = object.__new__(type(self))
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_inverse_traces"})
        damping = _scaled(_checked_prior(prior_precision), 1 / self._scale)
        other._factorization = self._factorization.with_damping(damping)
        return other

    @property
    def _priors(self) -> Tensor:
        """δ of each parameter (P,)."""
        return self._scale * self._factorization._system.damping_vector(self._factorization.damping)[:, 0]

    def _checked_definite(self) -> HessianFactorization:
        if not self._factorization.is_positive_definite:
            raise torch.linalg.LinAlgError(
                f"there is no Gaussian posterior: {self._factorization.num_negative_eigenvalues} eigenvalues of s H + "
                f"diag(δ) are negative at prior_precision={self.prior_precision}. The parameters are no minimum with "
                "this prior: train on (see minimize), or pass a larger prior_precision, or curvature='gauss_newton'"
            )
        return self._factorization

    @property
    def log_evidence(self) -> float:
        """log p(data), in nats. LinAlgError where Σ⁻¹ is not positive definite."""
        f, priors = self._checked_definite(), self._priors
        log_likelihood = -self._scale * self.loss - self._constant
        log_ratio = f.logabsdet + len(priors) * math.log(self._scale) - float(priors.log().sum())
        return log_likelihood - 0.5 * float(priors @ self._theta.square()) - 0.5 * log_ratio

    @property
    def log_evidence_derivative(self) -> Damping:
        """∂ log evidence/∂δ, one a prior: ½ (n/δ − ‖θ‖² − tr Σ) of its n parameters.

        Cost: for one prior, all eigenvalues of the matrix that the route forms, once for all priors; else P solves.
        """
        sizes, norms, values = self._by_prior()
        return _plain(0.5 * (sizes / values - norms - self._inverse_traces), self.prior_precision)

    def _by_prior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each prior: the number n of its parameters, ‖θ‖² over them, and δ."""
        columns = torch.ones_like(self._theta), self._theta.square(), self._priors
        sizes, norms, priors = (sums_by_damping(self._factorization, x) for x in columns)
        return sizes, norms, priors / sizes

    def fit_prior_precision(self, per_layer: bool = False, *, rtol: float = 1e-6, max_steps: int = 200) -> Laplace:
        """The Laplace approximation at the prior precision with the largest evidence, near the present one.

        per_layer: one prior a layer (of a TrackedNetwork: a parameter tensor). θ stays as it is. By MacKay's fixed
        point δ = (n − δ tr Σ)/‖θ‖², until δ changes by less than rtol. Cost: a few dozen `with_prior` and derivatives.
        Raises ArithmeticError where it doesn't settle. With the exact Hessian the evidence grows without bound towards
        a prior at which Σ⁻¹ is singular: LinAlgError where the search gets beyond it. Not checked: that no other
        maximum is higher.
        """
        count = self._factorization._system.num_dampings
        present = self.prior_precision
        if per_layer and isinstance(present, float):
            present = (present,) * count
        found = self.with_prior(present)
        for _ in progress(range(max_steps), "prior precision"):
            sizes, norms, values = found._by_prior()
            traces = found._inverse_traces
            if not bool((norms > 0).all()):
                raise ArithmeticError("all parameters of a prior are 0: its evidence grows with δ for ever")
            determined = sizes - values * traces  # parameters that the data determine
            target = torch.where(determined > 0, determined / norms, sizes / (norms + traces))
            new = target.clamp(values / 10, values * 10)
            found = found.with_prior(_plain(new, present))
            if bool(((new / values).log().abs() < rtol).all()):
                found._checked_definite()
                return found
        raise ArithmeticError(
            f"the prior precision did not settle in {max_steps} steps, and stands at {found.prior_precision}: the "
            "evidence may have no maximum"
        )

    @cached_property
    def _inverse_traces(self) -> Tensor:
        """tr Σ over the parameters of each prior."""
        f, P = self._checked_definite(), len(self._theta)
        if isinstance(f.damping, float) and (values := self._eigenvalues()) is not None:
            zeros = P - len(values)  # G has the eigenvalues of the Gram matrix, and zeros
            return ((1 / (values + f.damping)).sum() + zeros / f.damping)[None] / self._scale
        diagonal, columns = torch.empty_like(self._theta), max(1, 2**23 // P)
        for start in progress(range(0, P, columns), "trace"):
            identity = self._theta.new_zeros(P, min(columns, P - start))
            identity.diagonal(-start).fill_(1)
            diagonal[start : start + columns] = f.solve(identity).diagonal(-start)
        return sums_by_damping(self._factorization, diagonal) / self._scale

    def predictive(self, x: Inputs) -> Predictive:
        """Mean and exact covariance of the outputs at x, of the network linearized at θ: f(x), and J Σ Jᵀ.

        x: (M, …), as the model takes it. Outputs of other shape than (M, C) are flattened. Probabilities in
        classification: softmax, or the sigmoid, of f/√(1 + π/8 var f). Cost: M·C solves, and as many backward passes.
        """
        f = self._checked_definite()
        means, covariances = [], []
        for outputs, J in self._samples.jacobians(x):
            k, C, P = J.shape
            X = f.solve(J.reshape(k * C, P).mT.contiguous()).mT.reshape(k, C, P)
            covariances.append(J @ X.mT / self._scale)
            means.append(outputs)
        mean, covariance = torch.cat(means), torch.cat(covariances)
        covariance = (covariance + covariance.mT) / 2
        probabilities = None
        shrunk = mean / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
        if self._samples.model.loss == "binary_cross_entropy":
            probabilities = shrunk.sigmoid()
        elif self._samples.model.loss == "cross_entropy":
            probabilities = shrunk.softmax(1)
        return Predictive(mean, covariance, self._noise, probabilities)

    def __repr__(self) -> str:
        f = self._factorization
        evidence = f"log_evidence={self.log_evidence:.6g}" if f.is_positive_definite else "not positive definite"
        return (
            f"Laplace(P={f.num_parameters}, prior_precision={self.prior_precision}, curvature={self.curvature!r}, "
            f"{evidence})"
        )

    def _repr_html_(self) -> str:
        f = self._factorization
        rows: list[tuple[str, object]] = [
            ("parameters", f.num_parameters),
            ("curvature", self.curvature),
            ("prior precision", self.prior_precision),
            ("negative eigenvalues", f.num_negative_eigenvalues),
            ("log evidence, nats", f"{self.log_evidence:.6g}" if f.is_positive_definite else "none"),
        ]
        return html_table(("Laplace", ""), rows)


def sums_by_damping(f: HessianFactorization, values: Tensor) -> Tensor:
    """Sums of values (P,) over the parameters of each damping of f: (1,) for a single one."""
    if isinstance(f.damping, float):
        return values.sum()[None]
    count = f._system.num_dampings
    index = f._system.damping_vector(tuple(map(float, range(count))))[:, 0].long()
    return values.new_zeros(count).index_add(0, index, values)


def _num_targets(model: Model, targets: Tensor) -> float:
    """What the mean of the loss was taken over."""
    if not isinstance(model.loss, str):
        return float(len(targets))
    if model.loss == "cross_entropy" and targets.is_floating_point():  # rows of probabilities
        class_dim = 1 if isinstance(model, DeepMLPWithTracking) else model.class_dim or 1
        return targets.numel() / targets.shape[class_dim]
    return float(targets.numel())


def _checked_prior(prior: Prior) -> Damping:
    values = torch.as_tensor(prior, dtype=torch.float64)
    if values.dim() > 1 or not bool(((values > 0) & torch.isfinite(values)).all()):
        raise ValueError(f"prior_precision must be a finite number > 0, or one a layer, got {prior!r}")
    return values.item() if values.dim() == 0 else tuple(values.tolist())


def _scaled(values: Damping, factor: float) -> Damping:
    return tuple(factor * x for x in values) if isinstance(values, tuple) else factor * values


def _plain(values: Tensor, like: Damping) -> Damping:
    return tuple(values.tolist()) if isinstance(like, tuple) else values.item()

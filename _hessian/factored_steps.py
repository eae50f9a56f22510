"""Steps by the factorizations of hessian.py, one for each λ: Gauss–Newton or exact Hessian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from _hessian.costs import cheapest_route, shapes_of_layers
from _hessian.factorization import HessianFactorization, Layers, Solver, factorize
from _hessian.gram import split_damping, state_weights
from _hessian.layers import NotPositiveDefinite, OutputHessian, SingularHessianError, with_curvature
from _hessian.newton_problem import Preconditioner, Solution, StepProblem
from _hessian.settings import Settings


def definite_factorization(
    solver: Solver, layers: Layers, shift: float, H: Tensor | None = None
) -> HessianFactorization | None:
    """H + shift·I, factored. None where it is not positive definite, or singular to rounding. H: if it was formed."""
    try:
        settings = Settings(shift, route="auto" if H is None else "dense")
        return factorize(solver, layers, settings, definite_only=True, formed=H)
    except (NotPositiveDefinite, SingularHessianError):
        return None


class FactoredSteps:
    """(G + cI + λD) x = −g with G of the sub-batch, if there is one, else of all samples.

    curvature: 'gauss_newton', or 'hessian': then G is H.
    """

    def __init__(self, problem: StepProblem, solver: Solver, curvature: str):
        self.problem, self.solver, self.curvature = problem, solver, curvature
        self._polishes = curvature == "hessian" and problem.options.curvature == "auto"
        self._last: tuple[float, HessianFactorization | None] | None = None  # in a polish: at the last λ

    def solve(self, dampings: Sequence[float]) -> list[Solution]:
        found, rtol = [], 1e-6
        for damping in dampings:
            factorization = self.factorized(damping)
            if factorization is None:
                continue
            x, residual = factorization._refined(-self.problem.gradient[:, None], rtol)
            if float(residual) <= rtol:  # else this λ is too small for float64, and a larger one is tried
                found.append(Solution(damping, x[:, 0]))
        return found

    def preconditioner(self, damping: float) -> Preconditioner | None:
        product = self.solver.product
        layers, shift = self.damped_layers(damping)
        factorization = definite_factorization(self.solver, layers, shift)
        if factorization is None:
            return None
        no_curvature = OutputHessian(torch.zeros_like(layers[-1].loss_hessian.diagonal), zero_sum=False)
        metric = (*layers[:-1], layers[-1]._replace(output=no_curvature))
        return Preconditioner(
            lambda v: factorization._direct(v[:, None])[:, 0], lambda v: product(metric, v[:, None])[:, 0] + shift * v
        )

    def factorized(self, damping: float) -> HessianFactorization | None:
        """The matrix at λ, factored; None where it is not positive definite."""
        if self._last is not None and self._last[0] == damping:
            return self._last[1]
        self.release()  # one at a time in memory
        layers, shift = self.damped_layers(damping)
        H = self.dense_hessian if self.curvature == "hessian" and layers is self.problem.curvature_layers else None
        factorization = definite_factorization(self.solver, layers, shift, H)
        if self._polishes:  # quasi-Newton steps use it again
            self._last = (damping, factorization)
        return factorization

    def release(self) -> None:
        """Free the memory of the last factorization."""
        self._last = None

    @cached_property
    def is_dense(self) -> bool:
        """Whether forming H is the cheapest route."""
        layers = self.problem.curvature_layers
        return cheapest_route(shapes_of_layers(layers), len(layers[0].inputs)) == "dense"

    @cached_property
    def dense_hessian(self) -> Tensor | None:
        """H (P, P), where forming it is the cheapest route."""
        return self.solver.dense(self.problem.curvature_layers) if self.is_dense else None

    @cached_property
    def _state_weights(self) -> list[Tensor]:
        return state_weights(self.problem.curvature_layers)

    def damped_layers(self, damping: float) -> tuple[Layers, float]:
        """The matrix G + cI + λD as layers, and the multiple of the identity that remains."""
        problem, options = self.problem, self.problem.options
        damping = 0.0 if damping <= problem.smallest_damping else damping
        by_state = damping > 0 and options.metric == "state"
        # in the bent valleys about a minimum the layers' changes should cancel: only their joint change is penalized
        joint = by_state and self._polishes
        floor = 1e-10  # H alone may be singular
        shift = max(damping * (options.metric_damping if by_state else 1.0) + options.weight_decay, floor)
        layers = with_curvature(problem.curvature_layers, self.curvature, damping if joint else 0.0)
        return self._penalized(layers, damping) if by_state and not joint else layers, shift

    def _penalized(self, layers: Layers, damping: float) -> Layers:
        """With λ (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I) in each hidden layer, A_ℓ = z̃ᵀz̃/N.

        This penalizes what the change of the layer's weights alone does to all hidden pre-activations. In a layer with
        more inputs than samples A_ℓ stands alone, and π² = (tr Ω / a) / (tr A / N).
        """
        hidden = []
        for layer, weights in zip(layers[:-1], self._state_weights, strict=True):
            N, d = layer.inputs.shape
            of_Omega, of_A = split_damping(weights, layer.inputs, self.problem.options.metric_damping)
            Omega = weights.clone()
            Omega.diagonal().add_(of_Omega * math.sqrt(min(N, d) / d))
            shift = N * of_A if N >= d else None
            hidden.append(layer._replace(penalty=(damping / N) * Omega, penalty_shift=shift))
        return (*hidden, layers[-1])

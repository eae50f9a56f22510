"""Certified numbers of eigenvalues below a shift, and eigenpairs that are proved to be complete by them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from _curvature.samples import Model
from _hessian.refinement import spectral_norm
from _hessian.scipy_operators import SymmetricOperator
from hessian import HessianFactorization, SingularHessianError, _system, factorize_hessian

_ROUNDING = 1e-10  # of ‖H‖: eigenvalues nearer to each other than that are not told apart


class EigenPairs(NamedTuple):
    """Eigenvalues (k,) in ascending order, eigenvectors (P, k) of length 1, and ‖H u − μ u‖ (k,) of each pair."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class EigenvalueCounts:
    """The numbers of eigenvalues of H, or of JᵀΛJ, below any shift. What no shift changes is formed once."""

    def __init__(self, model: Model, loss: Tensor, curvature: str = "hessian", route: str = "auto"):
        self._arguments = model, loss, curvature, route
        self.system = _system(model, loss, curvature)
        self.num_parameters = self.system.num_parameters
        self.num_factorizations = 0
        self._last: HessianFactorization | None = None

    def norm(self) -> float:
        """‖H‖, from below, good to a few percent."""
        return spectral_norm(self.system.product, torch.empty(self.num_parameters, device=self.system.device))

    def operator(self) -> SymmetricOperator:
        return SymmetricOperator(self.num_parameters, self.system.device, self.system.product)

    def factorize(self, shift: float) -> HessianFactorization:
        """H − shift·I."""
        self.num_factorizations += 1
        if self._last is None:
            model, loss, curvature, route = self._arguments
            self._last = factorize_hessian(model, loss, -shift, curvature=curvature, route=route)
        elif self._last.damping != -shift:
            self._last = self._last.with_damping(-shift)
        return self._last

    def below(self, shift: float) -> int:
        """How many eigenvalues lie below the shift. SingularHessianError where one lies within rounding of it."""
        if math.isinf(shift):
            return 0 if shift < 0 else self.num_parameters
        try:
            f = self.factorize(shift)
            certified = f.inertia_is_certified
        except SingularHessianError:
            certified = False
        if not certified:
            raise SingularHessianError(
                f"an eigenvalue lies within rounding of {shift:g}, so that those below it can't be counted: choose "
                f"another bound, further away by 1e-8 of the largest eigenvalue, or route='dense'",
                damping=-shift,
            )
        return f.num_negative_eigenvalues

    def below_near(self, shift: float, away: float) -> int:
        """Below the shift, or a bound that is a few times further along `away` (signed) where that can't be counted."""
        for factor in (0.0, 1.0, 10.0, 100.0):
            try:
                return self.below(shift + factor * away)
            except SingularHessianError as error:
                last = error
        raise last

    def nearest(self, shift: float, k: int) -> EigenPairs:
        """The k eigenpairs nearest to the shift, by shift and invert; complete by inertia."""
        pairs = self._shift_and_invert(shift, k)
        tolerance = max(_ROUNDING * self.norm(), 10 * float(pairs.residuals.max()))
        distance = (pairs.values - shift).abs()
        radius = float(distance.max())
        low, high = shift - radius, shift + radius
        # no eigenvalue inside is missing, and the last one's neighbourhood has as many as were found
        inside = self.below_near(high - tolerance, -tolerance) - self.below_near(low + tolerance, tolerance)
        around = self.below_near(high + tolerance, tolerance) - self.below_near(low - tolerance, -tolerance)
        found = int((distance < radius - tolerance).sum())
        if inside > found or around < k:
            raise ArithmeticError(
                f"ARPACK found {k} eigenvalues in {low:g} … {high:g}, {found} of them inside. The inertia counts "
                f"{inside} inside, and {around} with the bounds: ask for more, k={k + 1}, or another shift"
            )
        return pairs

    def _shift_and_invert(self, shift: float, k: int) -> EigenPairs:
        P = self.num_parameters
        if 4 * k >= P or P <= 64:  # ARPACK needs k < P, and does little for that many
            H = self.system.product(torch.eye(P, dtype=torch.float64, device=self.system.device))
            values, vectors = torch.linalg.eigh((H + H.mT) / 2)
            chosen = (values - shift).abs().argsort()[:k].sort().values
            return self._with_residuals(values[chosen], vectors[:, chosen])
        start = np.random.default_rng(0).standard_normal(P)  # ARPACK's own would be drawn from the global generator
        inverse = self.factorize(shift).as_linear_operator()
        values, vectors = eigsh(
            self.operator(), k, sigma=shift, OPinv=inverse, v0=start, ncv=min(P, max(2 * k + 1, 40))
        )
        order = np.argsort(values)
        device = self.system.device
        return self._with_residuals(
            torch.from_numpy(values[order]).to(device), torch.from_numpy(vectors[:, order]).to(device)
        )

    def _with_residuals(self, values: Tensor, vectors: Tensor) -> EigenPairs:
        return EigenPairs(values, vectors, (self.system.product(vectors) - vectors * values).norm(dim=0))

    def extreme(self, k: int, sign: int) -> EigenPairs:
        """The k smallest (sign −1) or largest (+1) eigenpairs: those nearest to a shift that lies outside of all."""
        norm = self.norm()
        if norm == 0:
            return self.nearest(sign * 1.0, k)
        outside = self._lanczos(sign, norm)
        margin = 0.02 * abs(outside) + 1e-6 * norm
        while self.below_near(outside + sign * margin, sign * margin) != (0 if sign < 0 else self.num_parameters):
            margin *= 4
        return self.nearest(outside + sign * margin, k)

    def _lanczos(self, sign: int, norm: float) -> float:
        """The extreme eigenvalue to a few percent, from inside."""
        if self.num_parameters <= 64:
            return sign * norm
        start = np.random.default_rng(0).standard_normal(self.num_parameters)
        which = "LA" if sign > 0 else "SA"
        try:
            found = eigsh(
                self.operator(), 1, which=which, v0=start, ncv=30, tol=0.02, maxiter=3, return_eigenvectors=False
            )
            return float(found[0])
        except ArpackError:  # not converged: the inertia decides how far out to go
            return sign * norm

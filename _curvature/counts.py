"""Certified numbers of eigenvalues below a shift, and eigenpairs that are proved to be complete by them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import eigsh
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
        self.system = _system(model, loss, curvature)
        self.num_parameters = self.system.num_parameters
        self._arguments = model, loss, curvature, "dense" if self.num_parameters <= 64 else route
        self.num_factorizations = 0
        self._last: HessianFactorization | None = None

    def norm(self) -> float:
        """‖H‖, from below, good to a few percent."""
        return spectral_norm(self.system.product, torch.empty(self.num_parameters, device=self.system.device))

    def operator(self) -> SymmetricOperator:
        return SymmetricOperator(self.num_parameters, self.system.device, self.system.product)

    def factorize(self, shift: float) -> HessianFactorization:
        """H − shift·I."""
        if self._last is not None and self._last.damping == -shift:
            return self._last
        self.num_factorizations += 1
        if self._last is None:
            model, loss, curvature, route = self._arguments
            self._last = factorize_hessian(model, loss, -shift, curvature=curvature, route=route)
        else:
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
        """The k eigenpairs nearest to the shift; complete by inertia."""
        pairs = self._pairs_near(shift, k)
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
                f"{k} eigenvalues were found in {low:g} … {high:g}, {found} of them inside. The inertia counts "
                f"{inside} inside, and {around} with the bounds: ask for more, k={k + 1}, or another shift"
            )
        return pairs

    def _pairs_near(self, shift: float, k: int) -> EigenPairs:
        """By LAPACK where H is formed, else by Lanczos iterations (ARPACK) with (H − σI)⁻¹."""
        f, P = self.factorize(shift), self.num_parameters
        if f.route == "dense" and isinstance(f._formed, Tensor):
            below = f.num_negative_eigenvalues
            wanted = (max(0, below - k), min(P, below + k) - 1)
            values, vectors = scipy.linalg.eigh(f._formed.cpu().numpy(), subset_by_index=wanted, driver="evr")
        else:
            start = np.random.default_rng(0).standard_normal(P)  # ARPACK's own is from the global generator
            inverse, subspace = f.as_linear_operator(), min(P, max(2 * k + 1, 40))
            values, vectors = eigsh(self.operator(), k, sigma=shift, OPinv=inverse, v0=start, ncv=subspace)
        chosen = np.sort(np.abs(values - shift).argsort()[:k])
        order = chosen[values[chosen].argsort()]
        device = self.system.device
        return self._with_residuals(
            torch.from_numpy(values[order]).to(device), torch.from_numpy(vectors[:, order]).to(device)
        )

    def _with_residuals(self, values: Tensor, vectors: Tensor) -> EigenPairs:
        return EigenPairs(values, vectors, (self.system.product(vectors) - vectors * values).norm(dim=0))

    def extreme(self, k: int, sign: int) -> EigenPairs:
        """The k smallest (sign −1) or largest (+1) eigenpairs: those nearest to a shift that lies outside of all. Where
        H isn't formed, bisection moves the shift to within 10 % of the spectrum, for fast convergence."""
        outside = 1.5 * self.norm() or 1.0
        inside, none_beyond = 1e-6 * outside, 0 if sign < 0 else self.num_parameters
        formed = self.factorize(sign * outside).route == "dense"
        while not formed and outside > 1.1 * inside:
            middle = math.sqrt(inside * outside)
            if self.below_near(sign * middle, 1e-3 * sign * middle) == none_beyond:
                outside = middle
            else:
                inside = middle
        return self.nearest(sign * outside, k)

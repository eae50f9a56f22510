"""One step of `DampedNewton`: a Gauss–Newton step, a round with the exact Hessian, or a step away from a saddle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.layers import SingularHessianError
from _hessian.newton_options import State
from _hessian.newton_problem import Problem
from _hessian.newton_systems import ConjugateGradients, FactoredSteps, GramSteps, Systems, definite_factorization
from _hessian.objective import Terms, total
from _hessian.quasi_newton import ROUNDING, Point, exact_round
from _hessian.tables import html_table
from _hessian.trust_region import solve_trust_region

LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # a; (1,) alone takes up to 2.5 times as many steps
SMALLEST_DAMPING, LARGEST_DAMPING = 1e-200, 1e16  # of λ
PATIENCE, LEAST_PROGRESS = 5, 0.02  # Gauss–Newton is slow if f falls by less than this part in so many steps
HESSIAN_BYTES = 2**32  # the exact Hessian is not factored beyond


class StepReport(NamedTuple):
    """What one step did; NaN where a figure doesn't apply."""

    method: str  # 'gauss_newton', 'hessian', 'saddle' (negative curvature), or 'none' (it stands at a stationary point)
    accepted: bool
    objective: float  # loss and L2 term before the step
    new_objective: float
    gradient_norm: float  # ‖g‖ before the step
    damping: float  # λ
    length: float  # a
    num_trials: int  # λ tried
    certified: bool  # H + (c + htol)I was found positive definite at a point with ‖g‖ ≤ gtol

    def __repr__(self) -> str:
        return (
            f"StepReport({self.method}, {'accepted' if self.accepted else 'rejected'}, f = {self.objective:.6g} → "
            f"{self.new_objective:.6g}, ‖g‖={self.gradient_norm:.2g}, λ={self.damping:.2g}, length={self.length:.2g}, "
            f"trials={self.num_trials}, certified={self.certified})"
        )

    def _repr_html_(self) -> str:
        return html_table(("StepReport", ""), self._asdict().items())


class Trial(NamedTuple):
    """A step that was tried."""

    value: float  # f after it
    step: Terms
    damping: float  # λ
    length: float  # a


class NewtonStep:
    """One step. `run` moves the parameters, updates the state, and sets `report` and the two flags."""

    report: StepReport

    def __init__(self, problem: Problem, parameters: Sequence[Tensor], state: State):
        self.problem, self.parameters, self.state = problem, parameters, state
        self.options, self.objective = problem.options, problem.objective
        self.gradient_norm = float(torch.linalg.vector_norm(problem.gradient))
        self.all_samples = self.options.uses_all_samples(problem.num_samples)
        self.converged = self.stalled = False
        self.num_dampings = 0  # tried

    @cached_property
    def before(self) -> float:
        """f without a step."""
        return float(self.objective(self.objective.theta[None]))

    @cached_property
    def same_data(self) -> bool:
        """Whether f is as the last step left it, but for rounding. As a rule no other batch has the same f."""
        return math.isclose(self.before, self.state["value"], rel_tol=1e-3)

    @cached_property
    def gauss_newton(self) -> Systems:
        problem = self.problem
        systems = GramSteps(problem) if problem.prefers_gram() else FactoredSteps(problem, "gauss_newton")
        by_products = self.options.uses_conjugate_gradients(problem.num_samples)
        return ConjugateGradients(problem, systems, self._last_step()) if by_products else systems

    def _last_step(self) -> Tensor | None:
        if not self.same_data or "last" not in self.state:
            return None
        step = self.state["last"].to(self.problem.gradient)
        return step if self.problem.span is None else self.problem.span.restrict(step)

    @cached_property
    def hessian(self) -> FactoredSteps:
        return FactoredSteps(self.problem, "hessian")

    def run(self) -> None:
        state, curvature = self.state, self.options.curvature
        state["step"] += 1
        state["exact"] = state["exact"] and self.same_data
        if self.gradient_norm <= self.options.gtol:
            self._stationary_step()
        elif curvature == "hessian" or (curvature == "auto" and state["exact"] and self.all_samples):
            self._exact_step()
        else:
            self._gauss_newton_step()

    # --------------------------------------------------------------------------------------------- Gauss–Newton

    def _gauss_newton_step(self) -> None:
        state, trial = self.state, self._search(self.gauss_newton)  # f comes with the trials
        progress = [*(state["objectives"] if self.same_data else []), self.before][-(PATIENCE + 1) :]
        accepted = self._finish("gauss_newton", trial)
        slow = len(progress) > PATIENCE and self.before > (1 - LEAST_PROGRESS) * progress[0]
        state["objectives"] = progress
        if self.options.curvature == "auto" and (not accepted or (slow and self.problem.may_leave_residual)):
            if self._may_factorize_hessian():
                state["exact"], state["objectives"], self.stalled = True, [], False

    def _search(self, systems: Systems) -> Trial | None:
        """The lowest f over a few lengths. λ is raised until f falls. Then the length sets λ for the next step.

        A longer step wants a smaller λ: λ/a², or λ/a where the system was not solved exactly.
        """
        damping = max(self.state["damping"], SMALLEST_DAMPING)
        best: Trial | None = None
        while damping <= LARGEST_DAMPING:
            trial = self._try(systems, damping)
            if trial is not None:
                best = trial
                if best.value < self.before:
                    if systems.tries_smaller:
                        best = self._lower_damping(systems, best)
                    self._set_damping(best.damping * best.length**-systems.exponent)
                    return best
                if not -0.5 * float(self.problem.gradient @ best.step[0][1]) > ROUNDING * abs(self.before):
                    self._set_damping(0.01 * self.state["damping"])  # a larger λ promises even less
                    return best
            damping *= 10
        self._set_damping(100 * self.state["damping"])  # λ was that of other data
        return best

    def _lower_damping(self, systems: Systems, best: Trial) -> Trial:
        """Lower λ as long as f falls further, until it has fallen by a fifth. A plateau may want a far smaller one."""
        while best.value > 0.8 * self.before:
            trial = self._try(systems, 0.1 * best.damping)
            if trial is None or not trial.value < best.value:
                break
            best = trial
        return best

    def _try(self, systems: Systems, damping: float) -> Trial | None:
        """The lowest f over a few lengths. None where there is no solution at this λ."""
        self.num_dampings += 1
        solution = systems.solve(damping)
        if solution is None:
            return None
        steps = [(solution.step(a), damping, a) for a in LENGTHS]
        if solution.bend is not None:
            steps += [(solution.bent_step(a), damping, a) for a in LENGTHS]
        return self._lowest(steps)

    def _set_damping(self, damping: float) -> None:
        self.state["damping"] = min(max(damping, SMALLEST_DAMPING), LARGEST_DAMPING)

    def _lowest(self, steps: Sequence[tuple[Terms, float, float]]) -> Trial:
        """The trial with the lowest f, of steps with their λ and length. NaN counts as infinite."""
        values = self.objective.after([((0.0, self.objective.theta),), *(terms for terms, *_ in steps)])
        self.before, values = float(values[0]), values[1:]  # of the same pass, so that rounding is the same
        value, index = torch.where(values.isfinite(), values, math.inf).min(0)
        return Trial(float(value), *steps[int(index)])

    # --------------------------------------------------------------------------------------------- exact Hessian

    def _exact_step(self) -> None:
        state, theta = self.state, self.objective.theta
        start = Point(theta, self.before, self.problem.gradient)
        found = exact_round(
            self.objective, start, self.hessian.factorized, state["hessian_damping"], gtol=self.options.gtol
        )
        self.num_dampings = found.num_dampings
        if found.point is not start:
            state["hessian_damping"] = found.next_damping
            trial = Trial(found.point.value, ((1.0, found.point.theta - theta),), found.damping, 1.0)
            self._finish("hessian", trial, lower=True)
        elif self.hessian.factorized(0.0) is None:
            state["exact"] = self._finish("saddle", self._negative_curvature_trial())
        else:
            state["exact"] = self._finish("hessian", None)

    def _may_factorize_hessian(self) -> bool:
        """Whether the curvature is that of all samples, and the memory allowed for H suffices."""
        return self.all_samples and self.problem.hessian_bytes() <= HESSIAN_BYTES

    # -------------------------------------------------------------------------------------- at a stationary point

    def _stationary_step(self) -> None:
        """Where ‖g‖ ≤ gtol: no step at a minimum, a step along negative curvature at a saddle."""
        self.state["objectives"] = []
        certified = self._is_second_order_point() if self._may_factorize_hessian() else None
        self.converged = certified is not False
        if self.converged or self.options.curvature == "gauss_newton":
            self._finish("none", None, certified=bool(certified))
        else:
            self._finish("saddle", self._negative_curvature_trial())

    def _is_second_order_point(self) -> bool:
        system, shift = self.problem.system("hessian"), self.options.weight_decay + self.options.htol
        route = "dense" if len(self.problem.gradient) <= 3000 else "auto"  # the dense route is more reliable
        return definite_factorization(system, shift, route=route) is not None

    def _negative_curvature_trial(self) -> Trial | None:
        """The best trial along the trust-region step, which is a direction of negative curvature where g ≈ 0."""
        system, g = self.problem.system("hessian"), self.problem.gradient
        try:  # a rough step is enough, and where the negative curvature is weak no better one can be proved
            found = solve_trust_region(system, g, 1.0, self.options.weight_decay, rtol=0.1)
        except (SingularHessianError, ArithmeticError):  # the point is too nearly semidefinite for float64
            return None
        lengths = [sign * 10 ** (-0.5 * power) for power in range(9) for sign in (1.0, -1.0)]
        return self._lowest([(((a, found.step),), found.damping, a) for a in lengths])

    # ---------------------------------------------------------------------------------------------------- the end

    def _finish(self, method: str, trial: Trial | None, *, lower: bool = False, certified: bool = False) -> bool:
        """Take the trial if f falls, and report. lower: it was found to be lower before."""
        value, damping, length = (math.nan,) * 3 if trial is None else (trial.value, trial.damping, trial.length)
        accepted = trial is not None and (lower or value < self.before)
        if trial is not None and accepted:
            step = total(trial.step)
            self._update(step if self.problem.span is None else self.problem.span.expand(step))
        self.state["value"] = value if accepted else self.before
        self.stalled = not accepted and not self.converged
        self.report = StepReport(
            method, accepted, self.before, value, self.gradient_norm, damping, length, self.num_dampings, certified
        )
        return accepted

    def _update(self, step: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self.options.uses_conjugate_gradients(self.problem.num_samples):
                # in the parameters' dtype, as load_state_dict would leave it
                self.state["last"] = step.to(self.parameters[0], copy=True)
            for p, piece in zip(self.parameters, step.split([p.numel() for p in self.parameters]), strict=True):
                p.add_(piece.view_as(p))  # the sum in float64

"""One step of `DampedNewton`: which curvature it takes, how it searches, and what it leaves for the next step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.conjugate_gradients import ConjugateGradients
from _hessian.costs import shapes_of_layers
from _hessian.damping_search import ROUNDING, DampingFactors, Search, SearchResult, Trial
from _hessian.factored_steps import FactoredSteps, definite_factorization
from _hessian.factorization import Solver
from _hessian.gram_steps import GramSteps
from _hessian.layers import SingularHessianError
from _hessian.newton_options import MOMENTUM_DECAYS, PATIENCE, State
from _hessian.newton_problem import StepProblem, batch_fingerprint
from _hessian.quasi_newton import quasi_newton_steps
from _hessian.step_cost import prefers_gram, sweep_bytes
from _hessian.tables import html_table
from _hessian.trial_losses import Steps
from _hessian.trust_region import solve_trust_region

_INVISIBLE_DECREASE = 1e-9  # relative to f: trials can't compare a smaller decrease


class StepReport(NamedTuple):
    """What one step did; NaN where a figure doesn't apply."""

    method: str  # 'gauss_newton', 'hessian', 'saddle' (negative curvature), or 'none' (it stands at a stationary point)
    accepted: bool
    objective: float  # loss and L2 term before the step
    new_objective: float
    gradient_norm: float  # ‖g‖ before the step
    damping: float  # λ
    length: float  # a, of x alone where other steps were added to it
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


class NewtonStep:
    """One step. `run` moves the parameters, updates the state, and sets `report` and the two flags.

    With curvature='auto' the steps are Gauss–Newton steps. Where these get slow, a polish begins: steps with the exact
    Hessian, until they find nothing or get slow themselves.
    """

    report: StepReport

    def __init__(self, problem: StepProblem, parameters: Sequence[Tensor], state: State, solver: Solver):
        self.problem, self.parameters, self.state, self.solver = problem, parameters, state, solver
        self.options = problem.options
        self.search = Search(problem)
        self.converged = self.stalled = False

    @cached_property
    def gauss_newton(self) -> GramSteps | FactoredSteps:
        layers = self.problem.curvature_layers
        if prefers_gram(shapes_of_layers(layers), len(layers[0].inputs), self.options):
            return GramSteps(self.problem)
        return FactoredSteps(self.problem, self.solver, "gauss_newton")

    @cached_property
    def hessian(self) -> FactoredSteps:
        return FactoredSteps(self.problem, self.solver, "hessian")

    def run(self) -> None:
        state, auto = self.state, self.options.curvature == "auto"
        state["step"] += 1
        if self.problem.gradient_norm <= self.options.gtol:
            self._stationary_step()
        elif self.options.curvature == "hessian" or (auto and state["polishing"] and self.problem.all_samples):
            self._hessian_step()
        else:
            self._gauss_newton_step()

    # -------------------------------------------------------------------------------------- at a stationary point

    def _stationary_step(self) -> None:
        """Where ‖g‖ ≤ gtol: no step at a minimum, a step along negative curvature at a saddle."""
        certified = self._is_second_order_point() if self._may_factorize_hessian() else None
        self.converged = certified is not False
        if self.converged or self.options.curvature == "gauss_newton":
            self._finish("none", None, certified=bool(certified))
        else:
            self._finish("saddle", self._negative_curvature_step())

    def _may_factorize_hessian(self) -> bool:
        """Whether the curvature is that of all samples, and H can be factored in the memory allowed for it."""
        if not self.problem.all_samples or self.hessian.is_dense:
            return self.problem.all_samples
        layers = self.problem.layers
        return sweep_bytes(shapes_of_layers(layers), len(layers[0].inputs)) <= 2**32

    def _is_second_order_point(self) -> bool:
        layers, solver = self.problem.layers, self.solver
        H = solver.dense(layers) if len(self.problem.theta) <= 3000 else None  # the dense route is more reliable
        return definite_factorization(solver, layers, self.options.weight_decay + self.options.htol, H) is not None

    def _negative_curvature_step(self) -> Trial | None:
        """The best trial along the trust-region step, which is a direction of negative curvature where g ≈ 0."""
        problem = self.problem
        try:  # a rough step is enough, and where the negative curvature is weak no better one can be proved
            found = solve_trust_region(
                self.solver, problem.layers, problem.gradient, 1.0, self.options.weight_decay, rtol=0.1
            )
        except SingularHessianError:  # the point is too nearly semidefinite for float64
            return None
        lengths = [sign * a for a in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4) for sign in (1.0, -1.0)]
        steps = Steps([((a, found.step),) for a in lengths])
        return self.search.best_of(steps, [found.damping] * len(lengths), lengths)

    # --------------------------------------------------------------------------------------------- Gauss–Newton

    def _gauss_newton_step(self) -> None:
        state, options, problem = self.state, self.options, self.problem
        found = self._search_by_conjugate_gradients() if problem.conjugate_gradients else self._search_directly()
        if found.next_damping is not None:
            state["damping"] = found.next_damping
        accepted = self._finish("gauss_newton", self._add_momentum(found.best))
        objectives = [*state["objectives"], self.search.before][-(state["patience"] + 1) :]
        state["objectives"] = objectives
        slow = len(objectives) > state["patience"] and self.search.before > (1 - 0.02) * objectives[0]
        may_polish = options.curvature == "auto" and self._may_factorize_hessian()
        if may_polish and (not accepted or (slow and self._predicted_decrease_is_small())):
            self._begin_polish(accepted)
        elif not accepted:
            damping = self.search.largest_damping  # none up to there helped: λ was that of other data
            if not problem.all_samples and not options.cg_iterations:
                damping = 100.0 * state["damping"]  # one solve with few samples: the next draw may do better
            if self.search.promised_nothing:
                damping = 0.01 * state["damping"]
            state["damping"] = self.search.within_limits(damping)

    def _begin_polish(self, accepted: bool) -> None:
        """accepted: whether the last Gauss–Newton step was."""
        state, objectives = self.state, self.state["objectives"]
        state["decrease"] = (objectives[0] - self.search.before) / max(len(objectives) - 1, 1)
        state["polishing"], state["polished"], state["failed"] = True, 0, not accepted
        state["objectives"] = []
        state["gradient_norm"] = math.inf
        self.stalled = False

    def _search_directly(self) -> SearchResult:
        start, factors = self.state["damping"], DampingFactors()
        if isinstance(self.gauss_newton, GramSteps):
            return self.search.bracket(self.gauss_newton.solve, start)
        if self.problem.all_samples and self.options.metric == "state":
            factors = DampingFactors(shortened=3.0, kept=1.0, lowered=0.1)
        return self.search.raise_until_lower(self.gauss_newton.solve, start, factors)

    def _search_by_conjugate_gradients(self) -> SearchResult:
        """On the data of the last step, conjugate gradients begin along that step, and the new step may be lengthened.

        On other data a long step could fit the batch at the cost of the rest.
        """
        same_data, last_step = self._recall_last_step()
        systems = ConjugateGradients(self.problem, self.gauss_newton.preconditioner, last_step)
        factors, solved = DampingFactors(shortened=10.0, kept=1.0, lowered=0.3), 0.03
        if same_data:
            factors, solved = DampingFactors(shortened=3.0, kept=1.0, lowered=0.1), 0.01

        def may_fall(best: Trial) -> bool:
            """Only where conjugate gradients got far: with a smaller λ they get less far.

            On the same data, only where a longer step was wanted. Else λ would fall until G is large against it.
            """
            return 0 <= systems.progress <= solved and not (same_data and best.length <= 1)

        found = self.search.raise_until_lower(systems.solve, self.state["damping"], factors, may_fall)
        return found._replace(best=self.search.double_while_lower(found.best)) if found.best and same_data else found

    def _recall_last_step(self) -> tuple[bool, Tensor | None]:
        """Whether the data are those of the last step, and that step (P,)."""
        state, span = self.state, self.problem.span
        data = batch_fingerprint(self.problem.batch.inputs, self.problem.batch.targets)
        before = state.get("data") or (math.nan,) * 3
        state["data"] = data
        same_data = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(data, before, strict=True))
        if not same_data or state.get("last") is None:
            return same_data, None
        last = state["last"].to(self.problem.theta)
        return True, last if span is None else span.restrict(last)

    def _add_momentum(self, best: Trial | None) -> Trial | None:
        """The best trial, or its sum with a part of the earlier steps, if that is better.

        Along a narrow bent valley the steps are short and point the same way. Elsewhere, earlier steps would lead a
        deep network to where its quadratic model fails.
        """
        threshold, before = self.search.settings.momentum_threshold, self.search.before
        if best is None or self.state["step"] == 1 or not (1 - threshold) * before < best.value < before:
            return best
        momentum, span = self.state["momentum"], self.problem.span
        along = [(1 - decay) * m.double() for decay, m in zip(MOMENTUM_DECAYS, momentum, strict=True)]
        return self.search.add_direction(best, along if span is None else [span.restrict(m) for m in along])

    def _predicted_decrease_is_small(self) -> bool:
        """Whether the Gauss–Newton model, hardly damped, promises to lower f by less than a tenth.

        Then f has a residual there. The model lacks its curvature, and more Gauss–Newton steps won't help.
        """
        damping = max(1e-6 * self.state["damping"], self.problem.smallest_damping)
        solutions = self.gauss_newton.solve([damping])
        return bool(solutions) and self.search.predicted_decrease(solutions[0]) < 0.1 * self.search.before

    # --------------------------------------------------------------------------------------------- exact Hessian

    def _hessian_step(self) -> None:
        state, auto = self.state, self.options.curvature == "auto"
        start = max(state["hessian_damping"], self.problem.smallest_damping)
        method, trial = "hessian", self._hessian_trial()
        lower = trial is not None and trial.value < self.search.before
        if auto and not (lower or state["ending"]) and self.hessian.factorized(self.problem.smallest_damping) is None:
            method, trial = "saddle", self._negative_curvature_step()
        accepted = self._finish(method, trial, judged_by_gradient=state["ending"])
        if auto:
            self._end_polish_if_slow(trial if accepted else None, start)
        elif not accepted:  # none up to the largest λ helped: it was that of other data
            state["hessian_damping"] = self.search.within_limits(self.search.largest_damping)

    def _hessian_trial(self) -> Trial | None:
        """The best step with the exact Hessian. Sets state['ending'] where only ‖g‖ can tell that it is good."""
        state, search = self.state, self.search
        trial = self._undamped_step() if state["ending"] else None
        if trial is not None:
            return trial
        start = state["hessian_damping"]
        if self.hessian.is_dense and self.options.metric == "parameter":  # H is formed once for all λ
            found = search.bracket(self.hessian.solve, start)
        else:
            found = search.raise_until_lower(self.hessian.solve, start, DampingFactors())
        if found.next_damping is not None:
            state["hessian_damping"] = found.next_damping
        trial = (
            self._add_quasi_newton_steps(found.best)
            if self.options.curvature == "auto"
            else self._add_momentum(found.best)
        )
        state["ending"] = False
        if trial is None or not search.before - trial.value > _INVISIBLE_DECREASE * abs(search.before):
            undamped = self._undamped_step()
            state["ending"] = undamped is not None
            trial = undamped or trial
        return trial

    def _add_quasi_newton_steps(self, best: Trial | None) -> Trial | None:
        """The best trial, and quasi-Newton steps from there."""
        if best is None or not best.value < self.search.before:
            return best
        factorization = self.hessian.factorized(best.damping)
        return best if factorization is None else quasi_newton_steps(self.search, factorization, best)

    def _undamped_step(self) -> Trial | None:
        """Newton's step, where it promises a smaller decrease than f can show. It is good if f stays and ‖g‖ falls."""
        solutions = self.hessian.solve([self.problem.smallest_damping])
        if not solutions:
            return None
        problem, before, after = self.problem, self.search.before, self.problem.theta + solutions[0].x
        if not 0 <= self.search.predicted_decrease(solutions[0]) <= _INVISIBLE_DECREASE * abs(before):
            return None
        value = float(problem.objective(after[None]))
        if not value <= before + ROUNDING * abs(before):
            return None
        norm = float(torch.linalg.vector_norm(problem.objective.gradient(after)))
        return Trial(value, solutions[0].x, 0.0, 1.0) if norm < problem.gradient_norm else None

    def _end_polish_if_slow(self, accepted: Trial | None, start: float) -> None:
        """Back to Gauss–Newton where the exact Hessian found nothing, or is slow and far from the end.

        It is slow if three things hold: Gauss–Newton steps lowered f by more for their cost; ‖g‖ does not fall fast; λ
        had to be raised from `start`, or the step to be shortened. Where Gauss–Newton found nothing, it gets one step.
        """
        state, norm = self.state, self.problem.gradient_norm
        cost = 5  # of such a step, in Gauss–Newton steps: 4 to 6 at 30 layers
        converging = accepted is not None and (state["ending"] or norm < 0.5 * state["gradient_norm"])
        decrease = self.search.before - accepted.value if accepted else 0.0
        struggling = accepted is not None and (accepted.damping > start or accepted.length < 1)
        slow = decrease < cost * state["decrease"] and struggling and not converging
        state["gradient_norm"], state["polished"] = norm, state["polished"] + 1
        if accepted is None or slow or (state["failed"] and not state["ending"]):
            state["polishing"] = False
            if state["polished"] < PATIENCE:
                state["patience"] *= 2

    # ---------------------------------------------------------------------------------------------------- the end

    def _finish(
        self, method: str, trial: Trial | None, *, judged_by_gradient: bool = False, certified: bool = False
    ) -> bool:
        """Accept the trial if f falls, or if it was judged by its gradient; and report."""
        self.hessian.release()  # its memory is for the update
        accepted = trial is not None and (judged_by_gradient or trial.value < self.search.before)
        if trial is not None and accepted:
            step = trial.step if self.problem.span is None else self.problem.span.expand(trial.step)
            with torch.inference_mode(False), torch.no_grad():
                self._update(step)
        self.stalled = not accepted and not self.converged
        value, damping, length = (math.nan,) * 3 if trial is None else (trial.value, trial.damping, trial.length)
        self.report = StepReport(
            method,
            accepted,
            self.search.before,
            value,
            self.problem.gradient_norm,
            damping,
            length,
            self.search.num_dampings,
            certified,
        )
        return accepted

    def _update(self, step: Tensor) -> None:
        """Add a step (P,) to the parameters, and keep it for later steps."""
        like, state = self.parameters[0], self.state
        # in the parameters' dtype, as load_state_dict would leave it; a new tensor, since a state_dict may share it
        if self.problem.conjugate_gradients:
            state["last"] = step.to(like, copy=True)
        else:
            momentum = state["momentum"].to(like)
            state["momentum"] = (momentum.new_tensor(MOMENTUM_DECAYS)[:, None] * momentum).add_(step.to(momentum))
        for p, piece in zip(self.parameters, step.split([p.numel() for p in self.parameters]), strict=True):
            p.copy_(p + piece.view_as(p))  # the sum in float64

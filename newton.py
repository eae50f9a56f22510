"""Training by damped Newton steps whose length is measured in activations, and the exact trust-region step.

    optimizer = DampedNewton(model)
    for _ in range(100):
        loss = optimizer.step(lambda: model(x, y, track_activations=True))
        if optimizer.converged:
            break

Let f be the objective, loss + ½c‖θ‖², and g its gradient. A step is θ + a x, where

    (G + cI + λD) x = −g.

G is the Gauss–Newton matrix JᵀΛJ. λ > 0 is the damping, D the metric, a > 0 the length. One step:

    repeat  solve for x; f at θ + a x for a = ¼, ½, 1, 2, 4, in one forward pass; λ ← 10 λ
    until   one of them lowers f; take the lowest; λ ← λ/a² (λ/a where x was not solved for exactly)

With metric='state' by the Gram route, and without an L2 term, another λ costs little. There, where f falls by less than
a fifth, λ/10, λ/100, … are tried too, as long as f falls further.

A step is good as long as the linearization of the network holds. In a deep network that ends when the pre-activations
of some layer change too much. A short change of the parameters can do that, and a long one need not. So D measures the
change of activations (metric='state').

Near a minimum with a residual Gauss–Newton gets slow. There the exact Hessian H takes its place. H + (c + λ)I is
factored, with λ raised until it is positive definite. It serves a Newton step and up to 15 quasi-Newton steps after it.

References: Levenberg (1944), Marquardt (1963); Tassa, Erez & Todorov (2012), damping of states; Transtrum & Sethna
(2012), the second-order correction; Moré & Sorensen (1983), the trust-region step; Nocedal (1980), L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor

from _hessian.argument_checks import (
    as_one_batch,
    checked_closure,
    checked_nonnegative,
    checked_positive,
    checked_rtol,
    checked_vector,
)
from _hessian.network import TrackedNetwork, network_at_batch
from _hessian.newton_options import Options, State, initial_state
from _hessian.newton_problem import ChainProblem, NetworkProblem, Problem
from _hessian.newton_step import NewtonStep, StepReport
from _hessian.objective import Chain
from _hessian.ranks import Ranks
from _hessian.step_cost import StepCost, estimate_step_cost
from _hessian.trust_region import TrustRegionStep, solve_trust_region
from hessian import _SOLVER, DeepMLPWithTracking, Model, _checked_derivatives, _system

__all__ = ["DampedNewton", "StepCost", "StepReport", "TrustRegionStep", "trust_region_step"]


class DampedNewton(torch.optim.Optimizer):
    """Damped Gauss–Newton and Newton steps with exact solves, by the conventions of `torch.optim`.

    `step(closure)`: the closure returns model(x, y, track_activations=True). It need not call backward. Each step
    lowers the objective on that batch, or leaves the parameters as they are, bit for bit. One exception: at the end of
    a quadratic convergence f shows no difference. There ‖g‖ must fall, and f may rise by its rounding, 1e-13 of it.

    curvature: 'gauss_newton'; 'hessian', the exact H in every step; 'auto': Gauss–Newton, and the exact H to leave
    saddles, and where Gauss–Newton finds nothing or gets slow: f falls by less than 2 % in five steps. (Being slow does
    not count with cross-entropy and no L2 term. There the minimum lies at infinity as a rule, and H tends to JᵀΛJ.)
    metric: D, what λ penalizes. 'parameter': ‖x‖². 'state': the change of all hidden pre-activations (below). 'auto':
    'state', but 'parameter' for a `DeepMLPWithTracking` of one input. A small ResNet took 6 to 8 steps to a loss of 0.1
    with 'state', and more than 60 with 'parameter'; a small GPT took 7 or 8 with either.
    route: how Gauss–Newton systems are solved. 'gram': in N·C unknowns. 'sweep': by a
    factorization, as in hessian.py. 'auto': the one with fewer counted operations.
    curvature_batch: k. G is that of k samples, drawn anew for each step from (seed, step). None: of all samples. The
    gradient and the trial objectives are always those of the whole batch.
    cg_iterations: of conjugate gradients, at most. With a curvature_batch they solve the Gauss–Newton system of all
    samples, and the exact solve with the k samples is their preconditioner. 0: the curvature of the k samples alone.
    weight_decay: c of the L2 term ½c‖θ‖², exactly: in f, g, the curvature and the trials. (SGD's weight_decay.)
    damping: the first λ. Each step finds its own from there.
    metric_damping: ρ, see below. None: 0.1; 1e-4 by the Gram route of a `DeepMLPWithTracking`, all samples.
    gtol, htol: `converged` is set where ‖g‖ ≤ gtol and H + (c + htol) I is positive definite, by its inertia: a
    second-order stationary point; then `.report.certified` is True. H is not examined where curvature_batch leaves
    samples out, or where its factorization would take more than 4 GB. There ‖g‖ ≤ gtol suffices, and
    `.report.certified` is False. A float32 model can't reach the default gtol.
    seed: of the sub-batches.
    group: the processes of torch.distributed that take a step together; None: this one alone. They have the same model
    and options. Each closure returns the mean loss of the rank's own samples, None where it has none. The step is that
    of all samples, and all ranks end with the same parameters, bit for bit. `estimate_step` tells what is shared. The
    others wait while the first rank solves, as long as the group's timeout lets them.

    Results. `.report`: a StepReport of the last step. `.converged`: whether the last step found the point stationary.
    `.stalled`: whether nothing that it tried lowered f. No clock and no global random state is read. A run repeats
    exactly, as far as torch does (on CUDA ask it to). It goes on bit for bit after `load_state_dict`.

    The metric 'state', of Gauss–Newton steps; with the exact H, D = I. By a factorization: D = ρI + Σ SᵀS/N, with S x
    the change of a layer's pre-activations: the state damping of hessian.py. By the Gram route of a `TrackedNetwork`:
    D = (ρ + s)I in each parameter tensor, s the mean diagonal of its part of Σ SᵀS/N, estimated by random signs. By
    that of a `DeepMLPWithTracking`: D = (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I) in hidden layers, ρI in the output layer.
    Ω_ℓ measures what a change of layer ℓ's pre-activations does to all hidden ones. A_ℓ is z̃ᵀz̃/N, or with fewer
    samples than inputs a multiple of I. π² is the ratio of their mean eigenvalues, Ω_ℓ's to A_ℓ's.

    Cost of a step with k samples and K = C − 1 (or C). By the Gram route: 2 (kK)² Σa operations for a matrix, and
    (kK)³/3 for each λ tried, of which there is one as a rule. By a factorization: one for each λ. For the trials of a
    λ: five forward passes on the whole batch. For each iteration of conjugate gradients: 4 forward passes, and two
    vectors of all parameters kept; from step to step, one vector. For each quasi-Newton step: a gradient, a solve,
    three trials. `estimate_step` tells it before.

    A wide first layer, of 2²⁰ weights or more and with four times more inputs than samples, is restricted to what a
    step can change in it. The steps are the same, except with metric='state' by the Gram route.

    Raises what `factorize_hessian` raises for a loss that is not the tracked one. Not checked: whether the closure
    returns the loss of the same data at each step; it need not.
    """

    _group: dist.ProcessGroup | None = None

    def __init__(
        self,
        model: Model,
        *,
        curvature: str = "auto",
        metric: str = "auto",
        route: str = "auto",
        curvature_batch: int | None = None,
        cg_iterations: int = 8,
        weight_decay: float = 0.0,
        damping: float = 1.0,
        metric_damping: float | None = None,
        gtol: float = 1e-12,
        htol: float = 1e-8,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        if not isinstance(model, DeepMLPWithTracking | TrackedNetwork):
            raise TypeError(
                f"model must be a DeepMLPWithTracking or a TrackedNetwork, got {type(model).__name__}: pass the model "
                "itself, or TrackedNetwork(net)"
            )
        if group is not None and isinstance(model, TrackedNetwork):
            raise TypeError("a group of ranks is for a DeepMLPWithTracking: pass group=None for a TrackedNetwork")
        if metric == "auto":
            metric = "parameter" if isinstance(model, DeepMLPWithTracking) and model.input_dim == 1 else "state"
        options = Options(
            curvature=curvature,
            metric=metric,
            route=route,
            curvature_batch=curvature_batch,
            cg_iterations=cg_iterations,
            weight_decay=weight_decay,
            metric_damping=metric_damping,
            gtol=gtol,
            htol=htol,
            seed=seed,
        )
        damping = checked_positive("damping", damping, "pass 1.0, the default")
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("all parameters are frozen (requires_grad=False): leave requires_grad=True on some")
        super().__init__(parameters, options._asdict())
        self._model, self._group = model, group
        self._options()
        self.report: StepReport | None = None
        self.converged = self.stalled = False
        self.state[self.param_groups[0]["params"][0]] = initial_state(damping)

    def __getstate__(self) -> dict[str, object]:
        own = {name: self.__dict__[name] for name in ("_model", "report", "converged", "stalled")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("cg_iterations", 0)  # a checkpoint of a version without conjugate gradients
        for p, own in self.state.items():  # that of an older version has other keys
            known = {name: own[name] for name in State.__annotations__ if name in own}
            self.state[p] = {**initial_state(own["damping"]), **known}

    def add_param_group(self, param_group: dict[str, object]) -> None:
        if self.param_groups:
            raise ValueError("DampedNewton has one parameter group, all parameters of the model: H couples them all")
        super().add_param_group(param_group)

    def _options(self) -> Options:
        """As they stand in the parameter group: they may have been changed there."""
        options = Options(*(self.param_groups[0][name] for name in Options._fields))
        options.check()
        return options

    def _chain(self) -> Chain:
        model = self._model
        if isinstance(model, TrackedNetwork):
            raise TypeError(
                "estimate_step is for a DeepMLPWithTracking: call hessian.estimate_cost, for what a factorization takes"
            )
        return Chain(model._linears(), model.skips, model.activate, model.loss)

    def estimate_step(self, batch_size: int, num_dampings: int = 1, ranks: int = 1) -> StepCost:
        """What a step on a batch of this size takes, before it is taken. The model may be one on the meta device.

        num_dampings: λ that it tries (`report.num_trials`): one, and others where f does not fall, or falls little.
        Quasi-Newton steps after one with the exact Hessian are not counted.
        """
        return estimate_step_cost(self._chain(), self._options(), batch_size, num_dampings, ranks)

    def _problem(self, loss: Tensor, options: Options, step: int, empty: bool = False) -> Problem:
        model = self._model
        if isinstance(model, TrackedNetwork):
            return NetworkProblem(model, network_at_batch(model, loss), options, step)
        layers, batch = _checked_derivatives(model, loss), as_one_batch(model._tracked)
        ranks = Ranks(self._group, 0 if empty else len(batch.inputs), batch.inputs.device)
        return ChainProblem(self._chain(), batch, layers, options, step, _SOLVER, ranks)

    def _lead(self, problem: Problem) -> tuple[StepReport, bool, bool, State]:
        """Take the step."""
        parameters = self.param_groups[0]["params"]
        state: State = self.state[parameters[0]]
        step = NewtonStep(problem, parameters, state)
        step.run()
        for_all = state.copy()
        for_all.pop("last", None)  # large: it is sent as the parameters are
        return step.report, step.converged, step.stalled, for_all

    def _loss_of_no_sample(self) -> Tensor:
        """On a rank without samples: a sample that is tracked for its shapes, and weighs nothing."""
        model, parameter = self._model, self.param_groups[0]["params"][0]
        assert isinstance(model, DeepMLPWithTracking), "checked at construction"
        x = parameter.new_zeros(1, model.input_dim)
        logits = model(x)
        targets = torch.zeros_like(logits) if model.loss == "mse" else logits.argmax(1)
        return model(x, targets, track_activations=True)

    @overload
    def step(self, closure: Callable[[], Tensor | None]) -> Tensor: ...

    @overload  # an error, with a cure: other optimizers of torch allow it
    def step(self, closure: Callable[[], float] | None = None) -> NoReturn: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float | None] | None = None) -> Tensor:
        """One step. Returns the closure's loss: the one before the step."""
        options = self._options()
        with torch.enable_grad():
            loss = checked_closure(closure)()
        empty = loss is None and self._group is not None
        if empty:
            loss = self._loss_of_no_sample()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure must return the loss, got {type(loss).__name__}: let it end with "
                "`return model(x, y, track_activations=True)`"
            )
        parameters, now = self.param_groups[0]["params"], [p for p in self._model.parameters() if p.requires_grad]
        if len(parameters) != len(now) or any(p is not q for p, q in zip(parameters, now, strict=True)):
            raise ValueError("the model has other parameters than at construction: make a new DampedNewton of it")
        self.converged = self.stalled = False
        state: State = self.state[parameters[0]]
        with torch.autocast(loss.device.type, enabled=False):
            # inference mode saves a fifth of a small network's time
            with torch.inference_mode(isinstance(self._model, DeepMLPWithTracking)):
                problem = self._problem(loss, options, state["step"], empty)
                self.report, self.converged, self.stalled, new_state = problem.ranks.lead(lambda: self._lead(problem))
        state.update(new_state)
        shared = list(parameters)
        if self._group is not None and options.uses_conjugate_gradients(problem.num_samples):
            shared.append(state.setdefault("last", torch.nn.utils.parameters_to_vector(parameters).zero_()))
        for x in shared:
            problem.ranks.broadcast(x)
        return loss


@torch.no_grad()
def trust_region_step(
    model: Model,
    loss: Tensor,
    gradient: Tensor,
    radius: float,
    *,
    weight_decay: float = 0.0,
    rtol: float = 1e-4,
    route: str = "auto",
) -> TrustRegionStep:
    """The global minimizer p of gᵀp + ½ pᵀ(H + wI)p over ‖p‖ ≤ radius, H the exact Hessian at the tracked `loss`.

    gradient: g, (P,), float32 or float64, in the order of `model.parameters()`: any vector, not only the loss's
    gradient. g = 0 at a saddle gives a step along an eigenvector of λ_min. radius: Δ > 0, in units of parameters.
    weight_decay: w ≥ 0, of an L2 term ½w‖θ‖² in the objective, in units of loss / parameter². Its gradient, wθ, is the
    caller's to add to g. rtol: the decrease is proved to be within rtol of the best one, relative to itself. route: as
    in `factorize_hessian`.

    Cost: one factorization as a rule, up to four seen. Besides: up to 80 products with H, two dozen solves for each
    factorization, and memory for as many vectors (P,). On one core, a step took 2.7 times as long as a factorization
    with 30 layers of width 8 and 32 samples. With 8 layers of width 16 and 64 samples it took 1.1 times as long.
    Products, solves and the small problems are in float64.

    Differences from Moré & Sorensen's algorithm. The secular equation is solved in a subspace, and factorizations only
    prove. It stops by the duality gap, not by ‖p‖ − Δ. p is a combination of vectors, so (A + λI)p = −g holds to about
    √rtol, with A = H + wI. No λ below 1e-10 ‖A‖ is tried, since a cross-entropy Hessian is singular: inside the ball
    that λ stands for 0. What only a smaller λ would use is left: weaker negative curvature, and parts of g near the
    null space.

    Raises ValueError or TypeError for input that doesn't fit, SingularHessianError where float64 does not suffice for
    the proof. Not checked: the rounding of the factorizations. The sweep can find a semidefinite matrix indefinite by
    rounding, with N below the width and λ below about 1e-7 ‖A‖. There the step is returned unproved.
    """
    system = _system(model, loss)
    num_parameters = system.num_parameters
    if not isinstance(gradient, Tensor) or gradient.shape != (num_parameters,):
        found = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
        raise ValueError(f"gradient must be a tensor of shape ({num_parameters},), got {found}: one at a time")
    g = checked_vector(gradient, num_parameters, system.device)
    radius, weight_decay = (
        checked_positive("radius", radius, "it is the greatest length of the step"),
        checked_nonnegative("weight_decay", weight_decay),
    )
    if route not in ("auto", "sweep", "dense"):
        raise ValueError(f"unknown route {route!r}: choose 'auto', 'sweep' or 'dense'")
    step = solve_trust_region(system, g[:, 0], radius, weight_decay, rtol=checked_rtol(rtol), route=route)
    return step._replace(step=step.step.to(gradient.dtype))

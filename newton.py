"""Training by damped Newton steps whose length is measured in activations, and the exact trust-region step.

    optimizer = DampedNewton(model)
    for _ in range(100):
        loss = optimizer.step(lambda: model(x, y, track_activations=True))
        if optimizer.converged:
            break

With f the objective (loss and L2 term ½c‖θ‖²), g its gradient and G a curvature, a step is θ + a x,

    (G + cI + λD) x = −g,

G the Gauss–Newton matrix JᵀΛJ or the exact Hessian H. A step is good as long as the linearization of the network
holds, and in a deep network that ends when the pre-activations of some layer change too much, which a short change of
parameters can do and a long one need not: so D measures the change of activations (metric='state'). λ and a are found
by trial: each system is solved exactly for a few λ (with a sub-batch, by conjugate gradients that its exact solve
preconditions), the true objective is taken at a few lengths of each solution, all in one batched forward pass, and the
lowest one wins.

References: Levenberg (1944), Marquardt (1963); Tassa, Erez & Todorov (2012), damping of states; Transtrum & Sethna
(2012), the second-order correction; Moré & Sorensen (1983), the trust-region step; Nocedal (1980), L-BFGS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.argument_checks import checked_nonnegative, checked_radius, checked_rtol, checked_vector
from _hessian.costs import count_operations, factor_operations, route_costs, shapes_of_layers
from _hessian.factorization import Settings
from _hessian.gram import (
    DampedSystem,
    GramSystem,
    count_gram_operations,
    count_state_weights,
    gauss_newton_product,
    split_damping,
    state_weights,
)
from _hessian.layers import NotPositiveDefinite
from _hessian.trial_losses import Candidates, Objective, Span, Steps, Trial
from _hessian.trust_region import TrustRegionStep, solve_trust_region
from hessian import (
    _SOLVER,
    DeepMLPWithTracking,
    HessianFactorization,
    LayerDerivatives,
    OutputHessian,
    SingularHessianError,
    _checked_derivatives,
    _dense_hessian,
    _factorize,
    _modified,
    _product,
)

__all__ = ["DampedNewton", "StepCost", "StepReport", "TrustRegionStep", "trust_region_step"]


class _Search(NamedTuple):
    """How λ and the length are varied; by metric, measured on the problems of `benchmark.py training`."""

    factor: float  # between one λ and the next
    lengths: tuple[float, ...]
    valley: float  # where the best trial lowers f by less than this part of it, it is extended along earlier steps


_SEARCH = {
    "state": _Search(10.0, (0.5, 1.0, 1.5, 2.0, 3.0), 0.05),
    "parameter": _Search(3.0, (0.7, 1.0, 1.4), 1.0),
    "sub-batch": _Search(10.0, (1.0, 2.0), 0.2),  # where trials on all samples are what costs
    "conjugate-gradients": _Search(10.0, (0.5, 1.0, 2.0), 0.0),
}
_MEMORIES = (0.0, 0.8, 0.95)  # decays of the sums of earlier steps that the best trial is extended along
_EXTENSIONS = (1.0, 3.0)  # times (1 − decay) of such a sum
_FOLLOWING = 16  # quasi-Newton steps with one factorization, at most
_FOLLOWING_LENGTHS = (0.1, 0.3, 1.0, 3.0)  # of each
_FOLLOWING_COST = 5  # in Gauss–Newton steps, of an exact Hessian's step with those that follow (30 layers: 4 to 6)
_SADDLE_LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)  # both ways along a direction of negative curvature
_SADDLE_RTOL = 0.1  # of the model's decrease along it
# times λ, after a step that had to be shortened, after one that took a larger λ, and after one that went well at once;
# by conjugate gradients the middle one also where they did not get far and, on the same data, no longer step was wanted
_CLIMB = (1.0, 0.1, 0.01)
_CLIMB_STATE = (3.0, 1.0, 0.1)  # of Gauss–Newton steps by the sweeps with metric='state', at all samples
_CLIMB_CG, _CLIMB_AGAIN = (10.0, 1.0, 0.3), (3.0, 1.0, 0.1)  # of conjugate gradients; on the data of the last step
_CG_SOLVED, _CG_SOLVED_AGAIN = 0.03, 0.01  # of rᵀP⁻¹r, at the last of them: λ may fall
_CG_DONE = 1e-4  # likewise: no more of them
_SAME_DATA = 1e-6  # relative, of sums over the samples
_WORTH_DOUBLING = 0.9  # of f at half the length
_MAX_TRIALS = 12  # rounds of trials in a step
# λ; at the least one, times a cross-entropy below 1, with which the curvature falls, none is left
_LEAST_DAMPING, _LARGEST_DAMPING = 1e-30, 1e16
_LEAST_LOSS = 1e-200  # for it: λ stays a number above 0
_FLOOR = 1e-10  # of the damping of parameters in factorizations, the L2 term included: H alone may be singular
_EXACT_BYTES = 2**32  # 'auto' uses the exact Hessian, and certifies by it, where a factorization takes no more
_DENSE_CERTIFICATE = 3000  # up to so many parameters a dense factorization certifies, which is the more reliable
_SOLVE_RTOL = 1e-6
_DIFFERENCE = 0.1  # the second derivative along x is taken by a difference over this part of x
_LONGEST_CORRECTION = 0.75  # of ‖x‖
_SLOW_STEPS, _SLOW_DECREASE = 5, 0.02  # Gauss–Newton is slow: so many steps lowered f by less than this part of it
_LITTLE_LEFT = 0.1  # and its undamped model promises less than this part of f
_ROUNDING = 1e-13  # relative to f: what decides nothing
_INVISIBLE = 1e-9  # relative to f: a decrease that trials can't be compared by
# vectors of all parameters in float64: kept in a step, alive beside them around the solve, and (of the reduced) in it
_KEPT_VECTORS, _UPDATE_VECTORS, _SOLVE_VECTORS = 4, 7, 20
# and passed through memory that is new to the process: in a step, for each λ, for each trial
_STEP_TRAFFIC, _SOLVE_TRAFFIC, _TRIAL_TRAFFIC = 32, 130, 6
_PRODUCT_TRAFFIC = 20  # likewise, for each iteration of conjugate gradients
# of a product's rate, by a sweep's counted operations (one core, four samples and 128 units: 0.6; 256 units and four:
# 0.75, eight: 0.82, sixteen: 0.83): small products and the factors of small blocks are slower
_SWEEP_RATE = 0.8
_SPAN_PASSES = 3  # products of the span's basis with a first layer, in a step
_WIDE_LAYER = 2**20  # weights; a first layer of so many, and few samples, is restricted to the samples' span


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


class StepCost(NamedTuple):
    """What a step takes, to leading order: `DampedNewton.estimate_step`."""

    route: str  # 'gram', 'sweep' or 'dense'
    num_dampings: int  # λ tried
    operations: float  # of float64; one of a float32 forward pass counts as half
    traffic: float  # bytes read and written by what is bound by memory
    bytes: float  # at the peak, the model and the batch included

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        return self.operations / operations_per_second + self.traffic / bytes_per_second


class _Preconditioner(NamedTuple):
    """G + cI + λD with G of the sub-batch, as maps of (P,)."""

    inverse: Callable[[Tensor], Tensor]
    metric: Callable[[Tensor], Tensor]  # cI + λD alone


def _scale_of_curvature(output: OutputHessian) -> float:
    """Of cross-entropy the mean of Σ π over all classes but the likeliest: the loss, where that is right, to all the
    digits that the model's own has not. Of mse 1."""
    if not output.zero_sum:
        return 1.0
    return float(output.diagonal.scatter(1, output.diagonal.argmax(1, keepdim=True), 0.0).sum())


def _sub_batch(layers: Sequence[LayerDerivatives], chosen: Tensor) -> tuple[LayerDerivatives, ...]:
    """The derivatives of the mean loss over some of the samples: all that is linear in ∂loss grows by N/k."""
    factor = len(layers[0].inputs) / len(chosen)

    def of_chosen(layer: LayerDerivatives) -> LayerDerivatives:
        output = layer.output
        if output is not None:
            output = OutputHessian(output.diagonal[chosen] * factor, output.zero_sum)
        return layer._replace(
            inputs=layer.inputs[chosen],
            slope=layer.slope[chosen],
            curvature=layer.curvature[chosen] * factor,
            adjoint=layer.adjoint[chosen] * factor,
            output=output,
        )

    return tuple(map(of_chosen, layers))


def _fingerprint(inputs: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Sums over a batch's samples that hardly any other batch has, whatever the samples' order."""

    def weights(width: int) -> Tensor:
        return torch.arange(1, width + 1, dtype=inputs.dtype, device=inputs.device).cos()

    of_input = (inputs @ weights(inputs.shape[1])).double()
    of_target = targets.double() if targets.ndim == 1 else targets.double() @ weights(targets.shape[1]).double()
    return float(len(inputs)), float(of_input.square().sum()), float((of_input * (of_target + 1)).sum())


def _gradient(layers: Sequence[LayerDerivatives]) -> Tensor:
    """∂loss/∂θ (P,): λᵀz̃ of each layer, its weight, then its bias."""
    pieces = []
    for (_, width, _), alike in groupby(layers, lambda x: (*x.weight.shape, x.inputs.shape[1])):
        alike = list(alike)
        if len(alike) == 1:  # no copies of what may be large
            X = (alike[0].adjoint.mT @ alike[0].inputs)[None]
        else:
            X = torch.stack([x.adjoint for x in alike]).mT @ torch.stack([x.inputs for x in alike])
        pieces.append(torch.cat([X[:, :, :width].flatten(1), X[:, :, width:].flatten(1)], 1).flatten())
    return torch.cat(pieces)


class DampedNewton(torch.optim.Optimizer):
    """Damped Gauss–Newton and Newton steps with exact solves, by the conventions of `torch.optim`.

    `step(closure)`: the closure returns model(x, y, track_activations=True), and need not call backward. Each step
    lowers the objective on that batch, or leaves the parameters as they are, bit for bit. (At the very end of a
    quadratic convergence f shows no difference: there ‖g‖ must fall, and f may rise by its rounding, 1e-13 of it.)

    curvature: 'gauss_newton' (JᵀΛJ), 'hessian' (the exact H), or 'auto': Gauss–Newton, and the exact Hessian where
    that gets slow at a minimum with a residual, and to leave saddles.
    metric: what λ penalizes. 'parameter': ‖x‖². 'state': the change of all hidden pre-activations that each layer's
    part of x causes by itself, Ω_ℓ ⊗ A_ℓ (`hessian_gram.state_weights`; A_ℓ = z̃ᵀz̃/N). 'auto': 'parameter' for models of
    one input (curve fitting, where activations are nearly collinear), else 'state'.
    route: of the Gauss–Newton system. 'gram': in N·C unknowns; 'sweep': layer by layer, as hessian.py does; 'auto': by
    counted operations. Each solves its own system exactly. With metric='state' D_ℓ = (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I)
    in hidden layers, ρ = `metric_damping` (`hessian_gram.GramSystem`), and D_L = ρI; by the sweeps, and with the exact
    Hessian, ρI besides in the hidden layers (λρ + c ≥ 1e-10). In a layer with more inputs than samples A_ℓ is a
    multiple of I by the Gram route, and has no (√ρ/π) I by the others. Where 'auto' uses the exact Hessian, D is ρI and
    the layers' joint change, Σ_{ℓ<L} S_ℓᵀS_ℓ/N (the state damping of hessian.py),
    and its step goes on by up to 16 quasi-Newton steps from the same factorization (L-BFGS, which starts from it in
    place of a multiple of I): each costs a gradient, a solve and four trials, and where a valley bends, they lower f by
    far more than other factorizations in their place. They keep 32 vectors of all parameters meanwhile.
    curvature_batch: k: a sub-batch of k samples, drawn anew each step from (seed, step), in place of all (None). The
    exact solve with its curvature, and D, is the preconditioner of `cg_iterations` conjugate gradients with the
    Gauss–Newton curvature of the whole batch (inexact Newton: they end sooner where the residual's square, in the
    preconditioner's norm, fell by 1e-4); λ falls only where they got far, or cg_iterations is 1. Where the data are
    those of the last step (sums over them tell), the first of three iterations or more is along that step, λ falls by
    more, but only where a longer step was wanted, and then the length is doubled as long as f falls by a tenth. The
    gradient and the trial objectives are those of the whole batch. cg_iterations=0, and curvature='hessian': the
    curvature is of the sub-batch alone.
    weight_decay: c of ½c‖θ‖² over all parameters, exactly: in f, g, the curvature and the trials. (SGD's weight_decay.)
    damping: the first λ; found anew by each step. metric_damping: None for 1e-4, or 0.1 with a curvature_batch.
    gtol, htol: `converged` is set where ‖g‖ ≤ gtol and H + (c + htol) I is positive definite, by its inertia: a
    second-order stationary point, `.report.certified`. Where curvature_batch leaves samples out, or the factorization
    would take more than 4 GB, H is not examined: there ‖g‖ ≤ gtol suffices, and `.report.certified` is False. (A
    float32 model can't reach the default gtol.) Where the sweeps certify, with more than 3,000 parameters, the caveat
    of `factorize_hessian` about tiny dampings holds for htol.

    `.report` is a StepReport of the last step, `.converged` whether the last step found the point stationary,
    `.stalled` whether nothing that it tried lowered f. No clock and no global random state is read: a run repeats
    exactly (as far as torch does: on CUDA ask it to), and goes on bit for bit after `load_state_dict`.

    Cost of a step, k samples, K = C − 1 (or C) and P parameters: the Gram route's 2 (kK)² Σa + (kK)³/3 for each λ, or a
    sweep for each λ (`factorize_hessian`); 3 to 15 forward passes on the whole batch for the trials, and 4 for each
    iteration of conjugate gradients, which keep two vectors each.
    `estimate_step` says it before. A first layer of 2²⁰ weights or more, with four times more inputs than samples, is
    restricted to what a step can change (newton_trials.py): the same step, but for a state metric by the Gram route.
    Raises what `factorize_hessian` raises for a loss that is not the tracked one. Not checked: that the closure returns
    the loss of the same data at each step; it need not.
    """

    def __init__(
        self,
        model: DeepMLPWithTracking,
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
    ):
        if not isinstance(model, DeepMLPWithTracking):
            raise TypeError(f"model must be a DeepMLPWithTracking, got {type(model).__name__}: pass the model itself")
        if metric == "auto":
            metric = "parameter" if model.input_dim == 1 else "state"
        if metric_damping is None:
            metric_damping = 1e-4 if curvature_batch is None else 0.1
        options = dict(
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
        _check_options(options)
        if not (0 < damping < math.inf):
            raise ValueError(f"damping must be positive and finite, got {damping!r}")
        super().__init__(list(model.parameters()), options)
        self._model = model
        self.report: StepReport | None = None
        self.converged = self.stalled = False
        self.state[self.param_groups[0]["params"][0]] = {
            "step": 0,
            "damping": damping,  # λ of Gauss–Newton
            "hessian_damping": damping,  # λ of the exact Hessian
            "polishing": False,
            "polished": 0,  # steps since
            "failed": False,  # because Gauss–Newton found nothing
            "ending": False,  # f shows no difference any more
            "patience": _SLOW_STEPS,  # Gauss–Newton steps before the exact Hessian is tried
            "data": (),  # of the last step by conjugate gradients
            "objectives": [],  # of the last Gauss–Newton steps
            "momentum": next(model.parameters()).new_zeros(
                len(_MEMORIES), sum(p.numel() for p in model.parameters()), requires_grad=False
            ),
        }

    def __getstate__(self) -> dict:
        own = {name: self.__dict__[name] for name in ("_model", "report", "converged", "stalled")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("cg_iterations", 0)  # of a version that had none

    def add_param_group(self, param_group: dict) -> None:
        if self.param_groups:
            raise ValueError("DampedNewton has one parameter group, all parameters of the model: H couples them all")
        super().add_param_group(param_group)

    def estimate_step(self, batch_size: int, num_dampings: int | None = None) -> StepCost:
        """What a step on a batch of this size takes, before it is taken; the model may be one on the meta device.

        num_dampings: λ that it tries (`report.num_trials`); None: 3 by the Gram route without conjugate gradients,
        which brackets the best one, else 1, the least: a λ that is not good enough is raised, for another solve. The
        steps of a polish are not counted.
        """
        return _step_cost(self._model, self.param_groups[0], batch_size, num_dampings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step; returns the closure's loss, that before the step."""
        _check_options(self.param_groups[0])  # they may have been changed
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the closure must return the loss, got {type(loss).__name__}: let it end with "
                "`return model(x, y, track_activations=True)`"
            )
        mine, now = self.param_groups[0]["params"], list(self._model.parameters())
        if len(mine) != len(now) or any(p is not q for p, q in zip(mine, now, strict=True)):
            raise ValueError("the model has other parameters than at construction: make a new DampedNewton of it")
        with torch.autocast(loss.device.type, enabled=False):
            layers = _checked_derivatives(self._model, loss)
            with torch.inference_mode():  # what outlives the step is made outside of it
                step = _Step(self, layers)
                del layers  # of a wide first layer the step keeps less
                step.take()
        return loss


def _check_options(options: dict) -> None:
    for name, choices in (
        ("curvature", ("auto", "gauss_newton", "hessian")),
        ("metric", ("state", "parameter")),
        ("route", ("auto", "gram", "sweep")),
    ):
        if options[name] not in choices:
            choices = ("auto", *choices) if name == "metric" else choices
            raise ValueError(f"unknown {name} {options[name]!r}: choose one of {', '.join(map(repr, choices))}")
    size = options["curvature_batch"]
    if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
        raise ValueError(f"curvature_batch must be an integer ≥ 1, or None for all, got {size!r}")
    count = options["cg_iterations"]
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
        raise ValueError(
            f"cg_iterations must be an integer ≥ 0, 0 for the curvature of the sub-batch alone, got {count!r}"
        )
    if options["route"] == "gram" and options["curvature"] == "hessian":
        raise ValueError("route='gram' has the Gauss–Newton curvature only: pass route='sweep' or curvature='auto'")
    if not (0 < options["metric_damping"] < math.inf):
        raise ValueError(f"metric_damping must be positive and finite, got {options['metric_damping']!r}")
    for name in ("weight_decay", "gtol", "htol"):
        checked_nonnegative(name, options[name])


class _Step:
    """One step of a DampedNewton: everything that lives no longer than that."""

    def __init__(self, optimizer: DampedNewton, layers: tuple[LayerDerivatives, ...]):
        self.optimizer = optimizer
        scale = max(float(optimizer._model._tracked.value), _scale_of_curvature(layers[-1].output))
        self.least = _LEAST_DAMPING * min(max(scale, _LEAST_LOSS), 1.0)
        self.span = None
        if _is_wide(*layers[0].inputs.shape, len(layers[0].weight)):
            self.span = Span.of(layers[0], optimizer._model.layers[0].bias)
            layers = (layers[0]._replace(weight=self.span.weight, inputs=self.span.inputs), *layers[1:])
        self.layers = layers
        (self.group,) = optimizer.param_groups
        self.state = optimizer.state[self.group["params"][0]]
        self.weight_decay = self.group["weight_decay"]
        model = optimizer._model
        tracked = model._tracked
        self.objective = Objective(
            model._linears(), model.activate, model.loss, tracked.inputs, tracked.targets, self.weight_decay, self.span
        )
        self.theta = self.objective.theta
        self.gradient = _gradient(layers)
        if self.weight_decay:
            self.gradient = self.gradient + self.weight_decay * self.theta
        self.gradient_norm = float(torch.linalg.vector_norm(self.gradient))
        N, size = len(layers[0].inputs), self.group["curvature_batch"]
        self.of_batch = size is None or size >= N
        self.search = _SEARCH[_search_kind(self.group, self.of_batch)]
        if not self.of_batch:
            generator = torch.Generator().manual_seed(1_000_003 * self.group["seed"] + self.state["step"])
            chosen = torch.randperm(N, generator=generator)[:size].sort().values
            layers = _sub_batch(layers, chosen.to(layers[0].inputs.device))
        self.curvature_layers = layers
        self.before = math.nan
        self.num_trials = 0
        self.largest = 0.0  # λ tried
        self.cautious = False  # the last λ was so large that the model promised nothing
        # rᵀP⁻¹r over its first value (after the last step's share), r the residual and P the preconditioner
        self.cg_residual = 1.0
        self.on_same_data = False  # as the last step, by conjugate gradients
        self.last: Tensor | None = None  # that step (P,)
        self._gram: GramSystem | None = None
        self._whole: tuple[LayerDerivatives, ...] | None = None  # all samples'; of a float32 model in float32
        self._dense: Tensor | None = None
        self._Omega: list[Tensor] | None = None
        self._factorized: tuple[str, float, HessianFactorization | None] | None = None

    # ---------------------------------------------------------------------------------------------- the decision

    def take(self) -> None:
        optimizer, state, group = self.optimizer, self.state, self.group
        optimizer.converged = optimizer.stalled = False
        state["step"] += 1
        if self.gradient_norm <= group["gtol"]:
            certified = self.is_second_order_point() if self.may_factorize() else None
            optimizer.converged = certified is not False
            if optimizer.converged or group["curvature"] == "gauss_newton":
                self.before = float(self.objective(self.theta[None]))
                self.finish("none", None, certified=bool(certified))
            else:
                self.finish("saddle", self.down_from_saddle())
        elif group["curvature"] == "hessian" or (group["curvature"] == "auto" and state["polishing"] and self.of_batch):
            self.newton()
        else:
            self.gauss_newton()

    def gauss_newton(self) -> None:
        state, may_polish = self.state, self.group["curvature"] == "auto" and self.may_factorize()
        if self.group["cg_iterations"] and not self.of_batch:
            self.look_back()
            found = self.lengthened(self.climb(self.cg_steps, "damping"))
        elif self.by_gram():
            found = self.bracket(self.gram_steps, "damping")
        else:
            found = self.climb(self.sweep_steps, "damping")
        accepted = self.finish("gauss_newton", self.extended(found))
        state["objectives"] = [*state["objectives"], self.before][-(state["patience"] + 1) :]
        slow = (
            len(state["objectives"]) > state["patience"] and self.before > (1 - _SLOW_DECREASE) * state["objectives"][0]
        )
        if may_polish and (not accepted or (slow and self.little_left())):
            # what its steps lowered f by, on the average
            state["decrease"] = (state["objectives"][0] - self.before) / max(len(state["objectives"]) - 1, 1)
            state["polishing"], state["polished"], state["failed"] = True, 0, not accepted
            state["objectives"] = []
            state["gradient_norm"] = math.inf
            self.optimizer.stalled = False
        elif not accepted:
            # none up to the largest: λ was that of other data; of one solve alone, the next draw may do better
            damping = self.largest if self.of_batch or self.group["cg_iterations"] else 100.0 * state["damping"]
            if self.cautious:
                damping = 0.01 * state["damping"]
            state["damping"] = min(max(damping, self.least), _LARGEST_DAMPING)

    def newton(self) -> None:
        """A step with the exact Hessian; in 'auto', off a saddle where it finds none, and then Gauss–Newton again where
        that lowered f by more for its cost, ‖g‖ does not fall fast, and λ had to rise or the step to be shortened: far
        from the end. One step where Gauss–Newton found nothing."""
        state, before = self.state, max(self.state["hessian_damping"], self.least)
        trial = self.last_digits() if state["ending"] else None
        if trial is None:
            dense = self.is_dense() and self.group["metric"] == "parameter"
            search = self.bracket if dense else self.climb
            trial, state["ending"] = search(self.hessian_steps, "hessian_damping"), False
            trial = self.followed(trial) if self.group["curvature"] == "auto" else self.extended(trial)
            if trial is None or not self.before - trial.value > _INVISIBLE * abs(self.before):
                end = self.last_digits()
                trial, state["ending"] = end or trial, end is not None
        method, lower = "hessian", state["ending"] or (trial is not None and trial.value < self.before)
        if not lower and self.group["curvature"] == "auto" and self.factorized("hessian", self.least) is None:
            method, trial = "saddle", self.down_from_saddle()
        accepted = self.finish(method, trial, certain=state["ending"])
        if self.group["curvature"] != "auto":
            if not accepted:  # none up to there: λ was that of other data
                state["hessian_damping"] = min(max(self.largest, self.least), _LARGEST_DAMPING)
            return
        decrease = self.before - trial.value if accepted else 0.0
        converging = accepted and (state["ending"] or self.gradient_norm < 0.5 * state["gradient_norm"])
        state["gradient_norm"], state["polished"] = self.gradient_norm, state["polished"] + 1
        struggling = accepted and (trial.damping > before or trial.length < 1)
        slow = decrease < _FOLLOWING_COST * state["decrease"] and struggling and not converging
        if not accepted or slow or (state["failed"] and not state["ending"]):
            state["polishing"] = False
            if state["polished"] < _SLOW_STEPS:
                state["patience"] *= 2

    def may_factorize(self) -> bool:
        """Whether the curvature is that of the whole batch, and H can be factored in the memory allowed for it."""
        return self.of_batch and (self.is_dense() or _sweep_bytes(self.layers) <= _EXACT_BYTES)

    def is_second_order_point(self) -> bool:
        shift = self.weight_decay + self.group["htol"]
        few = len(self.theta) <= _DENSE_CERTIFICATE
        H = _dense_hessian(self.layers) if few else None
        return _definite_factorization(self.layers, shift, H) is not None

    def down_from_saddle(self) -> Trial | None:
        """The best trial along a direction of negative curvature: of the trust-region step, here from where g ≈ 0."""
        try:  # a direction is all that is needed: where eigenvalues are negative by little, more can't be proved
            found = solve_trust_region(_SOLVER, self.layers, self.gradient, 1.0, self.weight_decay, rtol=_SADDLE_RTOL)
        except SingularHessianError:  # nothing proved: the point is too nearly semidefinite for float64
            if math.isnan(self.before):
                self.before = float(self.objective(self.theta[None]))
            return None
        lengths = [sign * length for length in _SADDLE_LENGTHS for sign in (1.0, -1.0)]
        steps = Steps([((length, found.step),) for length in lengths])
        return self.best_of(Candidates(steps, [found.damping] * len(lengths), lengths))

    def little_left(self) -> bool:
        """Whether the Gauss–Newton model, hardly damped, promises to lower f by a small part of it only: then f has a
        residual there, which that model can't see the curvature of, and more of its steps won't help."""
        damping = max(1e-6 * self.state["damping"], self.least)
        steps = self.gram_steps([damping], corrected=False) if self.by_gram() else self.sweep_steps([damping])
        if steps is None:
            return False
        x = steps.steps[steps.lengths.index(1.0)]
        return -0.5 * float(self.gradient @ x) < _LITTLE_LEFT * self.before

    # ------------------------------------------------------------------------------------------------- the search

    def best_of(self, candidates: Candidates) -> Trial:
        """The candidate with the lowest f; NaN counts as infinite."""
        steps = candidates.steps
        if math.isnan(self.before):  # f itself in the same pass, so that rounding is the same
            steps = Steps([((0.0, self.theta),), *steps.terms])
        values = self.objective.after(steps)
        if math.isnan(self.before):
            self.before, values = float(values[0]), values[1:]
        value, index = torch.where(values.isfinite(), values, math.inf).min(0)
        return Trial(float(value), candidates.steps[index], candidates.dampings[index], candidates.lengths[index])

    def bracket(self, steps_at: Callable[[Sequence[float]], Candidates | None], key: str) -> Trial | None:
        """The best of three λ around the last, then of more beyond, as long as the best one is the outermost."""
        start, factor = max(self.state[key], self.least), self.search.factor
        tried, best = [], None
        wanted = [start * factor, start, start / factor]
        for _ in range(_MAX_TRIALS):
            tried += wanted
            candidates = steps_at(wanted)
            if candidates is not None:
                found = self.best_of(candidates)
                best = found if best is None or found.value < best.value else best
            if best is None or not best.value < self.before or best.damping == max(tried):
                wanted = [factor * max(tried)]
            elif best.damping == min(tried):
                wanted = [min(tried) / factor]
            else:
                break
            if not self.least < wanted[0] < _LARGEST_DAMPING:
                break
        self.num_trials, self.largest = len(tried), max(tried)
        if best is not None and best.value < self.before:
            self.state[key] = best.damping
        return best

    def climb(self, steps_at: Callable[[Sequence[float]], Candidates | None], key: str) -> Trial | None:
        """One λ, where each costs a factorization: raised until f falls, lowered for the next step if all went well."""
        damping, best = max(self.state[key], self.least), None
        factors, solved = _CLIMB, math.inf
        if key == "damping" and not self.of_batch and self.group["cg_iterations"]:
            factors, solved = (_CLIMB_AGAIN, _CG_SOLVED_AGAIN) if self.on_same_data else (_CLIMB_CG, _CG_SOLVED)
        elif key == "damping" and self.of_batch and self.group["metric"] == "state":
            factors = _CLIMB_STATE
        shortened, raised, at_once = factors
        for trial in range(_MAX_TRIALS):
            self.num_trials, self.largest = trial + 1, damping
            candidates = steps_at([damping])
            if candidates is not None:
                best = self.best_of(candidates)
                if best.value < self.before:
                    # where conjugate gradients did not get far, a smaller λ would leave them further away; and where
                    # the step was not to be longer, λ falling by more than f ends where G is large against it
                    stay = trial or not 0 <= self.cg_residual <= solved or (self.on_same_data and best.length <= 1)
                    factor = shortened if best.length < 1 else raised if stay else at_once
                    self.state[key] = max(factor * damping, self.least)
                    return best
                if not self.promised(candidates) > _ROUNDING * abs(self.before):  # a larger λ promises even less
                    self.cautious = True
                    break
            damping *= 10 if trial < 3 else 100
            if damping > _LARGEST_DAMPING:
                break
        return best

    def promised(self, candidates: Candidates) -> float:
        """By how much the damped model says that x lowers f."""
        return -0.5 * float(self.gradient @ candidates.steps[candidates.lengths.index(1.0)])

    def extended(self, best: Trial | None) -> Trial | None:
        """The best trial, or it and a part of what earlier steps had in common, if that is better: along a narrow bent
        valley the steps are short and alike. Elsewhere it would lead a deep network out of what its model knows."""
        if best is None or not (1 - self.search.valley) * self.before < best.value < self.before:
            return best
        if self.state["step"] == 1:
            return best
        along = [(1 - memory) * m.double() for memory, m in zip(_MEMORIES, self.state["momentum"], strict=True)]
        if self.span is not None:
            along = [self.span.shrink(m) for m in along]
        rows = Steps([((1.0, best.step), (c, m)) for c in _EXTENSIONS for m in along])
        found = self.best_of(Candidates(rows, [best.damping] * len(rows), [best.length] * len(rows)))
        return found if found.value < best.value else best

    def lengthened(self, best: Trial | None) -> Trial | None:
        """The best trial, or it twice as long, four times, and on as long as f falls by a tenth: where the longest was
        the best, and on the data of the last step, for a batch can be fitted at the cost of the others."""
        if best is None or not best.value < self.before or not self.on_same_data:
            return best
        if best.length < max(self.search.lengths):
            return best
        for _ in range(_MAX_TRIALS):
            longer = Candidates(Steps([((2.0, best.step),)]), [best.damping], [2.0 * best.length])
            found = self.best_of(longer)
            if not found.value < _WORTH_DOUBLING * best.value:
                break
            best = found
        return best

    def followed(self, best: Trial | None) -> Trial | None:
        """The best trial and up to 16 steps from there by the same factorization, corrected by what the gradient did
        along the earlier ones of them (L-BFGS, with (H + cI + λD)⁻¹ in place of its first multiple of I)."""
        if best is None or not best.value < self.before:
            return best
        factorization = self.factorized("hessian", best.damping)
        step, gradient, pairs = best.step, self.gradient, []
        for _ in range(_FOLLOWING):
            before, gradient = gradient, self.objective.gradient(self.theta + best.step)
            change = gradient - before
            along = float(step @ change)
            if along > 0:  # else the matrix would not stay positive definite
                pairs.append((step, change, along))
            x = -_quasi_newton(factorization, pairs, gradient)
            rows = Steps([((1.0, best.step), (a, x)) for a in _FOLLOWING_LENGTHS])
            found = self.best_of(Candidates(rows, [best.damping] * len(rows), [*_FOLLOWING_LENGTHS]))
            if not found.value < best.value:
                break
            step, best = found.length * x, found._replace(length=best.length)
        return best

    def last_digits(self) -> Trial | None:
        """Newton's step, undamped, where it promises less than f can show: taken if f stays and ‖g‖ falls."""
        candidates = self.hessian_steps([self.least])
        if candidates is None:
            return None
        x = candidates.steps[candidates.lengths.index(1.0)]
        if math.isnan(self.before):
            self.before = float(self.objective(self.theta[None]))
        if not 0 <= -0.5 * float(self.gradient @ x) <= _INVISIBLE * abs(self.before):
            return None
        value = float(self.objective((self.theta + x)[None]))
        flat = value <= self.before + _ROUNDING * abs(self.before)
        if flat and float(torch.linalg.vector_norm(self.objective.gradient(self.theta + x))) < self.gradient_norm:
            return Trial(value, x, 0.0, 1.0)
        return None

    def finish(self, method: str, trial: Trial | None, *, certain: bool = False, certified: bool = False) -> bool:
        """Accept the trial if f falls (or if it is certain), and report."""
        self._factorized = None  # its memory is for the update
        optimizer = self.optimizer
        accepted = trial is not None and (certain or trial.value < self.before)
        if accepted:
            step = trial.step if self.span is None else self.span.expand(trial.step)
            with torch.inference_mode(False), torch.no_grad():
                self.move(step)
        optimizer.stalled = not accepted and not optimizer.converged
        value, _, damping, length = trial or Trial(math.nan, None, math.nan, math.nan)
        optimizer.report = StepReport(
            method, accepted, self.before, value, self.gradient_norm, damping, length, self.num_trials, certified
        )
        return accepted

    def move(self, step: Tensor) -> None:
        """The parameters, and the sums of earlier steps, by a step (P,)."""
        parameters = self.group["params"]
        # in the parameters' dtype, as load_state_dict would leave it; a new tensor, since a state_dict may share it
        if self.search.valley:
            momentum = self.state["momentum"].to(parameters[0])
            self.state["momentum"] = (momentum.new_tensor(_MEMORIES)[:, None] * momentum).add_(step.to(momentum))
        else:
            self.state["last"] = step.to(parameters[0], copy=True)
        for p, piece in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p.copy_(p + piece.view_as(p))  # the sum in float64

    # ------------------------------------------------------------------------------------------------ the systems

    def by_gram(self) -> bool:
        return _by_gram(self.curvature_layers, self.group)

    def gram_system(self) -> GramSystem:
        """That of this step, with the gradient as Jᵀw where the batch has a w with all its digits."""
        if self._gram is None:
            rest = self.weight_decay * self.theta if self.weight_decay else None
            options = (self.curvature_layers, self.group["metric"], self.group["metric_damping"], self.weight_decay)
            if self.of_batch:
                self._gram = GramSystem(*options, rest)
            if not self.of_batch or not self._gram.has_residual():
                self._gram = GramSystem(*options, self.gradient, without_residual=True)
        return self._gram

    def gram_steps(self, dampings: Sequence[float], corrected: bool = True) -> Candidates | None:
        gram, found, systems = self.gram_system(), {}, []
        corrected = corrected and self.optimizer._model.loss == "mse" and self.of_batch
        for damping in dampings:
            damped = gram.at(damping)
            if damped is not None:
                found[damping] = gram.step(damped)
                systems += [damped] if corrected else []  # else its matrices are no longer needed
        if not found:
            return None
        x, Jx = zip(*found.values(), strict=True)
        y = self.corrections(systems, torch.stack(x), torch.stack(Jx)) if corrected else None
        return self.candidates(list(found), x, y)

    def corrections(self, systems: Sequence[DampedSystem], x: Tensor, Jx: Tensor) -> Tensor:
        """−½ (JᵀJ + cI + λD)⁻¹ Jᵀ Sᵀs₂ (m, P), s₂ the second derivative of the logits along x, by a one-sided
        difference: the bend of the curve that the solution follows as the length grows (Transtrum & Sethna 2012). For
        the mean square alone: with cross-entropy it saved one step in fourteen, and cost more than that."""
        ahead = torch.cat([self.theta[None], self.theta + _DIFFERENCE * x])
        logits = torch.cat([self.objective.logits(part).double() for part in ahead.split(self.objective.rows)])
        bends = [
            (self._gram.scale(h - logits[0]) / _DIFFERENCE - s) * (2 / _DIFFERENCE)
            for h, s in zip(logits[1:], Jx, strict=True)
        ]
        y = torch.stack([-0.5 * s.transpose(s.solve(bend)) for s, bend in zip(systems, bends, strict=True)])
        longest = _LONGEST_CORRECTION * torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return y * (longest / torch.linalg.vector_norm(y, dim=1, keepdim=True)).clamp(max=1.0)

    def candidates(
        self, dampings: Sequence[float], x: Sequence[Tensor], y: Sequence[Tensor] | None = None
    ) -> Candidates:
        """a x, and a x + a² y where there are corrections y, for each λ and length a."""
        lengths = self.search.lengths
        rows = [[((a, step),) for a in lengths] for step in x]
        if y is not None:
            rows = [
                [*plain, *(((a, step), (a**2, bend)) for a in lengths)]
                for plain, step, bend in zip(rows, x, y, strict=True)
            ]
            lengths = lengths + lengths
        return Candidates(Steps(sum(rows, [])), [d for d in dampings for _ in lengths], [*lengths] * len(dampings))

    def look_back(self) -> None:
        """Whether the data are those of the last step, and then that step: before the systems take their memory."""
        tracked, state = self.optimizer._model._tracked, self.state
        data, before = _fingerprint(tracked.inputs, tracked.targets), state.get("data") or (math.nan,) * 3
        self.on_same_data = all(math.isclose(a, b, rel_tol=_SAME_DATA) for a, b in zip(data, before, strict=True))
        state["data"] = data
        if self.on_same_data and state.get("last") is not None:
            self.last = state["last"].to(self.theta)
            self.last = self.last if self.span is None else self.span.shrink(self.last)

    def cg_steps(self, dampings: Sequence[float]) -> Candidates | None:
        found = {}
        for damping in dampings:
            preconditioner = self.preconditioner(damping)
            x = None if preconditioner is None else self.conjugate_gradients(preconditioner)
            if x is not None:
                found[damping] = x
        return self.candidates(list(found), list(found.values())) if found else None

    def conjugate_gradients(self, preconditioner: _Preconditioner) -> Tensor | None:
        """(G + cI + λD) x = −g with G of the whole batch, by a few iterations; None where rounding leaves no first."""
        x, r, count = torch.zeros_like(self.gradient), -self.gradient, self.group["cg_iterations"]
        earlier = []  # directions, their products, and dᵀAd

        def minimize_along(d: Tensor) -> bool:
            """False where dᵀAd is not a positive number."""
            nonlocal x, r
            for other, product, curvature in earlier:  # against all of them, or rounding would come to decide the step
                d = d - (d @ product / curvature) * other
            Ad = self.whole_product(d) + preconditioner.metric(d)
            curvature = d @ Ad
            if not 0 < float(curvature) < math.inf:
                return False
            x = x + (r @ d / curvature) * d
            r = r - (r @ d / curvature) * Ad
            earlier.append((d, Ad, curvature))
            return True

        # two iterations must remain, to tell whether they get far
        if self.last is not None and count > 2 and minimize_along(self.last):
            count -= 1
        self.cg_residual = 0.0 if count == 1 else 1.0  # of a single iteration it can't be told
        for i in range(count):
            d = preconditioner.inverse(r)
            left = float(r @ d)
            if i == 0:
                first = left
            else:
                self.cg_residual = left / first
            if i > 0 and not left > _CG_DONE * first:
                break
            if not (left > 0 and minimize_along(d)):
                if i == 0 and r.any():
                    return None  # of no use as a preconditioner at this λ, whatever the last step gave
                break
        return x if earlier else None

    def whole_product(self, v: Tensor) -> Tensor:
        """JᵀΛJ v (P,) of the whole batch; of a float32 model in float32, as the trials are."""
        if self._whole is None:
            single = self.objective.inputs.dtype == torch.float32
            self._whole = tuple(x.in_float32() for x in self.layers) if single else self.layers
        return gauss_newton_product(self._whole, v.to(self._whole[0].weight.dtype)[:, None])[:, 0].double()

    def preconditioner(self, damping: float) -> _Preconditioner | None:
        if self.by_gram():
            gram = self.gram_system()
            damped = gram.at(damping)
            if damped is None:
                return None
            return _Preconditioner(lambda v: gram.inverse(damped, v), damped.apply_metric)
        layers, shift = self.damped_layers("gauss_newton", damping)
        factorization = _definite_factorization(layers, shift)
        if factorization is None:
            return None
        without = OutputHessian(torch.zeros_like(layers[-1].output.diagonal), zero_sum=False)
        metric = (*layers[:-1], layers[-1]._replace(output=without))
        return _Preconditioner(
            lambda v: factorization._direct(v[:, None])[:, 0], lambda v: _product(metric, v[:, None])[:, 0] + shift * v
        )

    def sweep_steps(self, dampings: Sequence[float]) -> Candidates | None:
        return self.exact_steps("gauss_newton", dampings)

    def hessian_steps(self, dampings: Sequence[float]) -> Candidates | None:
        return self.exact_steps("hessian", dampings)

    def is_dense(self) -> bool:
        """Whether forming H is the cheaper route."""
        operations = _operations(self.curvature_layers)
        return min(operations, key=operations.get) == "dense"

    def dense_hessian(self) -> Tensor | None:
        """H as a matrix, formed once a step, where that is the cheaper route."""
        if self._dense is None and self.is_dense():
            self._dense = _dense_hessian(self.curvature_layers)
        return self._dense

    def penalized(self, layers: tuple[LayerDerivatives, ...], damping: float) -> tuple[LayerDerivatives, ...]:
        """λ (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I) in each hidden layer, A_ℓ = z̃ᵀz̃/N: what the change of its weights alone
        does to all hidden pre-activations. A_ℓ stands alone where a layer has more inputs than samples, π² then being
        (tr Ω / a) / (tr A / N)."""
        if self._Omega is None:
            self._Omega = state_weights(self.curvature_layers)
        hidden = []
        for layer, Omega in zip(layers[:-1], self._Omega, strict=True):
            N, d = layer.inputs.shape
            of_Omega, of_A = split_damping(Omega, layer.inputs, self.group["metric_damping"])
            Omega = Omega.clone()
            Omega.diagonal().add_(of_Omega * math.sqrt(min(N, d) / d))
            shift = N * of_A if N >= d else None
            hidden.append(layer._replace(penalty=(damping / N) * Omega, penalty_shift=shift))
        return (*hidden, layers[-1])

    def damped_layers(self, curvature: str, damping: float) -> tuple[tuple[LayerDerivatives, ...], float]:
        """The curvature and λD + cI: layers whose form is all of it but a multiple of the identity, and that."""
        left = 0.0 if damping <= self.least else damping
        by_state = left > 0 and self.group["metric"] == "state"
        # in the bent valleys about a minimum the exact Hessian does better if the layers' changes may cancel
        jointly = by_state and curvature == "hessian" and self.group["curvature"] == "auto"
        shift = max(left * (self.group["metric_damping"] if by_state else 1.0) + self.weight_decay, _FLOOR)
        layers = _modified(self.curvature_layers, curvature, left if jointly else 0.0)
        return self.penalized(layers, left) if by_state and not jointly else layers, shift

    def exact_steps(self, curvature: str, dampings: Sequence[float]) -> Candidates | None:
        """x by a factorization for each λ; left out where the matrix is not positive definite, or solved badly."""
        found = {}
        for damping in dampings:
            factorization = self.factorized(curvature, damping)
            if factorization is None:
                continue
            x, residual = factorization._refined(-self.gradient[:, None], _SOLVE_RTOL)
            if float(residual) <= _SOLVE_RTOL:  # else this λ is too small for float64, and a larger one is tried
                found[damping] = x[:, 0]
        return self.candidates(list(found), list(found.values())) if found else None

    def factorized(self, curvature: str, damping: float) -> HessianFactorization | None:
        """Its matrix at λ; None where it is not positive definite. The last one of a polish is kept."""
        if self._factorized is None or self._factorized[:2] != (curvature, damping):
            self._factorized = None  # one at a time in memory
            layers, shift = self.damped_layers(curvature, damping)
            H = self.dense_hessian() if curvature == "hessian" and layers is self.curvature_layers else None
            factorization = _definite_factorization(layers, shift, H)
            if curvature != "hessian" or self.group["curvature"] != "auto":
                return factorization  # it is not used again
            self._factorized = (curvature, damping, factorization)
        return self._factorized[2]


def _quasi_newton(
    factorization: HessianFactorization, pairs: Sequence[tuple[Tensor, Tensor, float]], v: Tensor
) -> Tensor:
    """B⁻¹v (P,), B the factored matrix after a BFGS update by each (s, y, sᵀy > 0), y the gradient's change along s."""
    v, parts = v.clone(), []
    for s, y, along in reversed(pairs):
        parts.append(s @ v / along)
        v -= parts[-1] * y
    v = factorization._direct(v[:, None])[:, 0]
    for (s, y, along), part in zip(pairs, reversed(parts), strict=True):
        v += (part - y @ v / along) * s
    return v


def _search_kind(group: dict, of_batch: bool) -> str:
    if of_batch:
        return group["metric"]
    return "conjugate-gradients" if group["cg_iterations"] and group["curvature"] != "hessian" else "sub-batch"


def _is_wide(N: int, d: int, a: int) -> bool:
    """Whether a first layer of d inputs and a units is worth restricting to the batch's span."""
    return a * d >= _WIDE_LAYER and d >= 4 * (N + 1)


def _by_gram(layers: Sequence[LayerDerivatives], group: dict) -> bool:
    """Whether Gauss–Newton steps are by the Gram matrix: as asked for, or by counted operations."""
    if group["route"] == "auto":
        operations = _operations(layers)
        return count_gram_operations(layers, group["metric"], group["weight_decay"], 3) <= min(operations.values())
    return group["route"] == "gram"


def _meta_layers(model: DeepMLPWithTracking, batch_size: int) -> tuple[LayerDerivatives, ...]:
    """The shapes of the layers' derivatives, without numbers."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64, device="meta")

    layers = []
    for linear, skip in zip(model.layers, model.skips, strict=True):
        a, d = len(linear.weight), linear.weight.shape[1] + (linear.bias is not None)
        output = None
        if linear is model.layers[-1]:
            output = OutputHessian(empty(batch_size, a), model.loss == "cross_entropy")
        state = empty(batch_size, a)
        layers.append(
            LayerDerivatives(empty(*linear.weight.shape), empty(batch_size, d), state, state, state, skip, output)
        )
    return tuple(layers)


def _step_cost(model: DeepMLPWithTracking, group: dict, batch_size: int, num_dampings: int | None) -> StepCost:
    """By counting: the solves' leading terms, the passes over the whole batch, and the vectors of all parameters."""
    size, N, P = group["curvature_batch"], batch_size, sum(p.numel() for p in model.parameters())
    of_batch = size is None or size >= N
    layers = _meta_layers(model, N)
    a, d = len(layers[0].weight), layers[0].inputs.shape[1]
    half = 0.5 if next(model.parameters()).dtype == torch.float32 else 1.0
    operations = 2 * N * P * (half + 3)  # the closure's forward pass, and the closed form's forward, backward, gradient
    kept_vectors, update_vectors = _KEPT_VECTORS, _UPDATE_VECTORS
    if _is_wide(N, d, a):
        # the model, its three momenta, the weights that were tracked, and U; then the step, the momenta that follow,
        # and the sum of a weight and its piece, in float64
        kept_vectors, update_vectors = 5 * half + 1, 1 + 3 * half + (2 if half < 1 else 1)
        weight, inputs = (torch.empty(rows, N + 1, device="meta") for rows in (a, N))
        layers = (layers[0]._replace(weight=weight, inputs=inputs), *layers[1:])
        operations += 4 * d * N**2 + 2 * N * d * a * _SPAN_PASSES
    reduced = sum(len(layer.weight) * layer.inputs.shape[1] for layer in layers)
    layers = layers if of_batch else _sub_batch(layers, torch.arange(size, device="meta"))
    counted = _operations(layers)
    route = min(counted, key=counted.get)
    if group["curvature"] != "hessian" and _by_gram(layers, group):
        route = "gram"
    kind = _search_kind(group, of_batch)
    tries = num_dampings or (3 if route == "gram" and kind != "conjugate-gradients" else 1)
    trials = tries * len(_SEARCH[kind].lengths)
    operations += 2 * N * reduced * half * trials
    traffic = 8 * (P * _STEP_TRAFFIC + reduced * (_TRIAL_TRAFFIC * trials + _SOLVE_TRAFFIC * tries))
    state = 8 * sum(len(layer.weight) for layer in layers)  # bytes of a sample's
    if route == "gram":
        n = len(layers[0].inputs) * (len(layers[-1].weight) - layers[-1].output.zero_sum)
        matrices = tries if group["metric"] == "state" and group["weight_decay"] else 1
        operations += count_gram_operations(layers, group["metric"], group["weight_decay"], tries)
        traffic += 8 * n * n * (4 * len(layers) * matrices + 4 * tries)
        kept, solve = 8 * n * n + 2 * n * state, 8 * 4 * n * n + 3 * n * state
    elif route == "sweep":
        operations += counted[route] * tries / _SWEEP_RATE
        operations += count_state_weights(layers) if group["metric"] == "state" else 0
        kept, solve = 0, _sweep_bytes(layers)
    else:
        formed_once = group["curvature"] == "hessian" and group["metric"] == "parameter"
        forming = counted[route] - factor_operations(reduced)
        operations += tries * factor_operations(reduced) + (1 if formed_once else tries) * forming
        kept, solve = 0, 8 * 3 * reduced**2
    if kind == "conjugate-gradients":
        # each iteration: a product with the whole batch, and a solve with the sub-batch, which reads its factor
        count = tries * group["cg_iterations"]
        operations += count * (8 * N * reduced * half + 3 * solve / 8)
        traffic += count * (8 * reduced * _PRODUCT_TRAFFIC + solve)
        solve += 8 * reduced * (2 * group["cg_iterations"])
        if half < 1:
            solve += 4 * (N * 2 * d + reduced) + 2.5 * N * state
    batch = 8 * N * 2 * d + 5 * N * state
    alive = max(solve + 8 * reduced * _SOLVE_VECTORS, kept + 8 * P * update_vectors)
    return StepCost(route, tries, operations, traffic, batch + 8 * P * kept_vectors + alive)


def _operations(layers: Sequence[LayerDerivatives]) -> Mapping[str, float]:
    """Of a factorization of the curvature by each route of hessian.py, 'gram' apart."""
    return count_operations(shapes_of_layers(layers), len(layers[0].inputs))


def _sweep_bytes(layers: Sequence[LayerDerivatives]) -> float:
    return route_costs(shapes_of_layers(layers), len(layers[0].inputs))["sweep"].bytes


def _definite_factorization(
    layers: tuple[LayerDerivatives, ...], shift: float, H: Tensor | None = None
) -> HessianFactorization | None:
    """H + shift·I, factored; None where it is not positive definite, or singular to rounding. H: if it was formed."""
    try:
        settings = Settings(shift, route="auto" if H is None else "dense")
        return _factorize(layers, settings, definite_only=True, formed=H)
    except (NotPositiveDefinite, SingularHessianError):
        return None


@torch.no_grad()
def trust_region_step(
    model: DeepMLPWithTracking,
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
    gradient; g = 0 at a saddle gives a step along an eigenvector of λ_min. radius: Δ > 0, in units of parameters.
    weight_decay: w ≥ 0, of an L2 term ½w‖θ‖² in the objective (its gradient, wθ, is the caller's to add to g), in units
    of loss / parameter². rtol: the decrease is proved to be within rtol of the best one, relative to itself. route: as
    in `factorize_hessian`.

    Cost: one factorization as a rule, up to four seen; beside them up to 80 products with H, two dozen solves a
    factorization, and memory for as many vectors (P,). On one core a step took 2.7 times as long as a factorization at
    30 layers of width 8 with 32 samples, where those are small, and 1.1 times at 8 layers of width 16 with 64.
    Products, solves and the small problems are in float64.

    Unlike Moré & Sorensen's algorithm, the secular equation is solved in a subspace, and factorizations only prove; the
    stop is by the duality gap, not by ‖p‖ − Δ; p is a combination of vectors, so that (A + λI)p = −g holds to about
    √rtol. No λ below 1e-10 ‖A‖ is tried (a cross-entropy Hessian is singular): inside the ball that λ stands for 0, and
    what only a smaller one would use is left, negative curvature and parts of g near the null space alike.
    Raises ValueError or TypeError for input that doesn't fit, SingularHessianError where float64 does not suffice for
    the proof. Not checked: the rounding of the factorizations. Where the sweep finds a semidefinite matrix indefinite
    by rounding, as it can with N below the width and λ below about 1e-7 ‖A‖, the step is returned unproved there.
    """
    layers = _checked_derivatives(model, loss)
    num_parameters = sum(p.numel() for p in model.parameters())
    if not isinstance(gradient, Tensor) or gradient.shape != (num_parameters,):
        came = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
        raise ValueError(f"gradient must be a tensor of shape ({num_parameters},), got {came}: one at a time")
    g = checked_vector(gradient, num_parameters, layers[0].weight.device)
    radius, weight_decay = checked_radius(radius), checked_nonnegative("weight_decay", weight_decay)
    if route not in ("auto", "sweep", "dense"):
        raise ValueError(f"unknown route {route!r}: choose 'auto', 'sweep' or 'dense'")
    found = solve_trust_region(_SOLVER, layers, g[:, 0], radius, weight_decay, rtol=checked_rtol(rtol), route=route)
    return found._replace(step=found.step.to(gradient.dtype))

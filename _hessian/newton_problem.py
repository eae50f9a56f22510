"""What one step of `DampedNewton` works on: the objective, its gradient, and matrices of its curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from _hessian import factorization
from _hessian.costs import RouteCost, route_costs, shapes_of_layers
from _hessian.factorization import Solver, System
from _hessian.gram import ChainGramSystem, GramSystem, gauss_newton_product
from _hessian.input_span import InputSpan, is_wide
from _hessian.layers import LayerDerivatives, OutputHessian, TrackedBatch, same_shape_groups, with_curvature
from _hessian.network import Network, NetworkAtBatch, TrackedNetwork
from _hessian.newton_options import Options
from _hessian.objective import Chain, ChainLosses, NetworkLosses, Objective
from _hessian.ranks import Ranks
from _hessian.settings import Settings
from _hessian.step_cost import prefers_gram


class Problem(Protocol):
    """f(θ + x) ≈ f + gᵀx + ½ xᵀ(G + cI)x at one batch.

    The curvature is that of the sub-batch, if there is one. The rest is of all samples.
    """

    options: Options
    ranks: Ranks
    num_samples: int
    objective: Objective
    gradient: Tensor  # (P,) g
    may_leave_residual: bool  # whether G may not tend to H at the minimum, as with an L2 term
    # (k, N, C) at θ (k, P), for the second-order correction of Gauss–Newton steps. It pays for the mean square loss
    logits: Callable[[Tensor], Tensor] | None

    @property
    def span(self) -> InputSpan | None:
        """θ, g and steps are in its coordinates."""

    def prefers_gram(self) -> bool:
        """Whether Gauss–Newton steps are by the Gram matrix: as asked for, or by counted operations."""

    def gram_system(self, rest: Tensor | None, without_residual: bool = False) -> GramSystem:
        """Of the sub-batch."""

    def hessian_bytes(self) -> float:
        """Memory to factor H."""

    def system(self, curvature: str, state_damping: float = 0.0) -> System:
        """H or JᵀΛJ, plus the state damping."""

    def state_product(self, v: Tensor) -> Tensor:
        """Σ SᵀS v/N for v (P,), S v the change of all hidden pre-activations."""

    def product(self, v: Tensor) -> Tensor:
        """JᵀΛJ v of all samples, for v (P,)."""


def sub_batch_indices(options: Options, num_samples: int, step: int) -> Tensor | None:
    """(k,); None for all samples."""
    k = options.curvature_samples(num_samples)
    if k == num_samples:
        return None
    generator = torch.Generator().manual_seed(1_000_003 * options.seed + step)
    return torch.randperm(num_samples, generator=generator)[:k].sort().values


class ChainProblem:
    """Of a `DeepMLPWithTracking`; with a wide first layer, in the span of its inputs.

    Of several ranks, each has its own samples; the first one also has the rows of the sub-batch.
    """

    logits: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        chain: Chain,
        batch: TrackedBatch[Tensor],
        layers: tuple[LayerDerivatives, ...],
        options: Options,
        step: int,
        solver: Solver,
        ranks: Ranks,
    ):
        self.options, self.ranks, self.num_samples, self._solver = options, ranks, ranks.num_samples, solver
        dtype, self.span = batch.inputs.dtype, None
        if not ranks.sizes[ranks.rank]:  # what was tracked stands for no sample
            batch = batch._replace(inputs=batch.inputs[:0], targets=batch.targets[:0])
            layers = select(layers, slice(0), 1.0)
        if is_wide(self.num_samples, layers[0].inputs.shape[1], len(layers[0].weight)):
            self.span = InputSpan.build(layers[0], chain.linears[0].bias, dtype, ranks)
            layers = (layers[0]._replace(weight=self.span.weight, inputs=self.span.inputs[ranks.own]), *layers[1:])
        losses = ChainLosses(chain, batch, layers[0] if self.span else None, max(ranks.sizes))
        self.objective = Objective(losses, options.weight_decay, ranks)
        self.gradient = ranks.mean(_loss_gradient(layers)) + options.weight_decay * self.objective.theta
        self.may_leave_residual = options.weight_decay > 0 or chain.loss != "cross_entropy"
        chosen = sub_batch_indices(options, self.num_samples, step)
        self.layers = sub_batch(layers, chosen, ranks)
        if chain.loss == "mse" and chosen is None:
            inputs = self.layers[0].inputs[:, : self.layers[0].weight.shape[1]].to(dtype)
            self.logits = partial(losses.logits, inputs=inputs)
        # products in the model's dtype, as the trials are
        single = dtype == torch.float32 and chosen is not None
        self._own_layers = tuple(x.in_float32() for x in layers) if single else layers
        self._product = ranks.shared(lambda v: gauss_newton_product(self._own_layers, v[:, None])[:, 0])

    def prefers_gram(self) -> bool:
        return prefers_gram(shapes_of_layers(self.layers), len(self.layers[0].inputs), self.options)

    def gram_system(self, rest: Tensor | None, without_residual: bool = False) -> GramSystem:
        options = self.options
        rho = options.metric_damping or (1e-4 if options.uses_all_samples(self.num_samples) else 0.1)
        return ChainGramSystem(self.layers, options.metric, rho, options.weight_decay, rest, without_residual)

    def hessian_bytes(self) -> float:
        return _bytes(route_costs(shapes_of_layers(self.layers), self.num_samples))

    def system(self, curvature: str, state_damping: float = 0.0) -> System:
        return factorization.Chain(self._solver, with_curvature(self.layers, curvature, state_damping))

    def state_product(self, v: Tensor) -> Tensor:
        *hidden, last = with_curvature(self.layers, "gauss_newton", 1.0)
        last = last._replace(output=OutputHessian(torch.zeros_like(last.loss_hessian.diagonal), zero_sum=False))
        return self._solver.product((*hidden, last), v[:, None])[:, 0]

    def product(self, v: Tensor) -> Tensor:
        return self._product(v.to(self._own_layers[0].weight.dtype)).double()


class NetworkProblem:
    """Of a `TrackedNetwork`."""

    logits: Callable[[Tensor], Tensor] | None = None
    span = None

    def __init__(self, model: TrackedNetwork, at_batch: NetworkAtBatch, options: Options, step: int):
        self.options, self.ranks, self.num_samples = options, Ranks(), len(at_batch.batch.inputs[0])
        in_float64 = Objective(NetworkLosses(at_batch.copied, at_batch.batch), options.weight_decay)
        tracked = model._tracked
        assert isinstance(tracked, TrackedBatch), "checked with the loss"
        in_own_dtype = Objective(NetworkLosses(model, tracked), options.weight_decay)
        self.objective = in_float64 if in_own_dtype.dtype == torch.float64 else in_own_dtype
        self.gradient = in_float64.gradient(self.objective.theta)
        chosen = sub_batch_indices(options, self.num_samples, step)
        self._sub_batch = at_batch if chosen is None else at_batch.of_samples(chosen.to(self.gradient.device))
        self._all_samples = at_batch.system("gauss_newton")
        self._systems: dict[str, Network] = {}
        self.may_leave_residual = options.weight_decay > 0 or model.loss != "cross_entropy"

    def prefers_gram(self) -> bool:
        route = self.options.route
        settings = Settings(1.0, route=route)
        chosen = route != "sweep" and self.system("gauss_newton").choose_route(settings, formed=False, may_mix=False)
        return chosen == "gram"

    def gram_system(self, rest: Tensor | None, without_residual: bool = False) -> GramSystem:
        metric, rho, c = self.options.metric, self.options.metric_damping or 0.1, self.options.weight_decay
        return self.system("gauss_newton").gram_system(metric, rho, c, rest, without_residual)

    def hessian_bytes(self) -> float:
        return _bytes(self.system("hessian").costs(Settings()))

    def system(self, curvature: str, state_damping: float = 0.0) -> Network:
        if curvature not in self._systems:
            self._systems[curvature] = self._sub_batch.system(curvature)
        return self._systems[curvature]._replace(state_damping=state_damping)

    def state_product(self, v: Tensor) -> Tensor:
        return self.system("gauss_newton").state_product(v[:, None])[:, 0]

    def product(self, v: Tensor) -> Tensor:
        return self._all_samples.product(v[:, None])[:, 0]


def _bytes(costs: Mapping[str, RouteCost]) -> float:
    """Of the route with the fewest operations."""
    return min(costs.values(), key=lambda cost: cost.operations).bytes


def _loss_gradient(layers: Sequence[LayerDerivatives]) -> Tensor:
    """∂loss/∂θ (P,): λᵀz̃ of each layer, its weight, then its bias."""
    pieces = []
    for members in same_shape_groups(layers):
        group, width = [layers[i] for i in members], layers[members[0]].weight.shape[1]
        if len(group) == 1:  # no copies of what may be large
            X = (group[0].adjoint.mT @ group[0].inputs)[None]
        else:
            X = torch.stack([x.adjoint for x in group]).mT @ torch.stack([x.inputs for x in group])
        pieces.append(torch.cat([X[:, :, :width].flatten(1), X[:, :, width:].flatten(1)], 1).flatten())
    return torch.cat(pieces)


def sub_batch(layers: Sequence[LayerDerivatives], chosen: Tensor | None, ranks: Ranks) -> tuple[LayerDerivatives, ...]:
    """The derivatives of the mean loss over the chosen samples of all ranks, None: all. Of use on the first rank."""
    if chosen is None and ranks.group is None:
        return tuple(layers)
    chosen = torch.arange(ranks.num_samples) if chosen is None else chosen
    parts = ranks.split(chosen)
    own = select(layers, parts[ranks.rank].to(layers[0].inputs.device), len(layers[0].inputs) / len(chosen))
    if ranks.group is None:
        return own
    last = own[-1].loss_hessian
    rows = [rows for x in own for rows in (x.inputs, x.slope, x.curvature, x.adjoint)] + [last.diagonal]
    together = ranks.gather(torch.cat(rows, 1), [len(part) for part in parts])
    *pieces, diagonal = (x.contiguous() for x in together.split([x.shape[1] for x in rows], 1))
    names = ("inputs", "slope", "curvature", "adjoint")
    found = [x._replace(**dict(zip(names, pieces[4 * i :], strict=False))) for i, x in enumerate(own)]
    return (*found[:-1], found[-1]._replace(output=last._replace(diagonal=diagonal)))


def select(layers: Sequence[LayerDerivatives], samples: Tensor | slice, factor: float) -> tuple[LayerDerivatives, ...]:
    """Those of some samples. factor: of what is linear in ∂loss."""
    return tuple(
        layer._replace(
            inputs=layer.inputs[samples],
            slope=layer.slope[samples],
            curvature=layer.curvature[samples] * factor,
            adjoint=layer.adjoint[samples] * factor,
            output=layer.output and layer.output._replace(diagonal=layer.output.diagonal[samples] * factor),
        )
        for layer in layers
    )

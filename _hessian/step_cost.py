"""What a step of `DampedNewton` takes, counted from shapes before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.costs import count_operations, factor_operations, route_costs, shapes_of_layers
from _hessian.damping_search import search_settings
from _hessian.gram import count_gram_operations, count_state_weights
from _hessian.gram_steps import prefers_gram
from _hessian.input_span import is_wide
from _hessian.layers import LayerDerivatives, OutputHessian
from _hessian.newton_options import Options
from _hessian.newton_problem import sub_batch
from _hessian.trial_losses import Network

_SWEEP_RATE = 0.8  # of the rate of large products: a sweep's are small (0.6 at 4 samples, 128 units; 0.83 at 16, 256)


class StepCost(NamedTuple):
    """What a step takes, to leading order: `DampedNewton.estimate_step`."""

    route: str  # 'gram', 'sweep' or 'dense'
    num_dampings: int  # λ tried
    operations: float  # of float64; one of a float32 forward pass counts as half
    traffic: float  # bytes read and written by what is bound by memory
    bytes: float  # at the peak, the model and the batch included

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        return self.operations / operations_per_second + self.traffic / bytes_per_second


class _Solves(NamedTuple):
    """The cost of the solves by one route."""

    operations: float
    traffic: float
    kept_bytes: float  # from the solves to the update
    bytes: float  # while solving


def sweep_bytes(layers: Sequence[LayerDerivatives]) -> float:
    """Memory of a factorization by the sweep."""
    return route_costs(shapes_of_layers(layers), len(layers[0].inputs))["sweep"].bytes


def estimate_step_cost(network: Network, options: Options, batch_size: int, num_dampings: int | None) -> StepCost:
    """The solves' leading terms, the passes over the whole batch, and the vectors of all parameters."""
    N, all_layers = batch_size, _shapes_as_layers(network, batch_size)
    a, d = len(all_layers[0].weight), all_layers[0].inputs.shape[1]
    P = sum(x.weight.shape[0] * x.inputs.shape[1] for x in all_layers)
    single = network.linears[0].weight.dtype == torch.float32
    half = 0.5 if single else 1.0
    operations = 2 * N * P * (half + 3)  # the closure's forward pass; then forward, backward and gradient in float64
    kept_vectors, update_vectors = 4.0, 7.0  # of P numbers in float64
    if is_wide(N, d, a):
        # kept: the model, its three momenta, the tracked weights, and U
        # update: the step, the next momenta, and the sum of a weight and its step in float64
        kept_vectors, update_vectors = 5 * half + 1, 1 + 3 * half + (2 if single else 1)
        weight, inputs = (torch.empty(rows, N + 1, device="meta") for rows in (a, N))
        all_layers = (all_layers[0]._replace(weight=weight, inputs=inputs), *all_layers[1:])
        operations += 4 * d * N**2 + 2 * N * d * a * 3  # the span's basis, and three products with it
    reduced = sum(len(layer.weight) * layer.inputs.shape[1] for layer in all_layers)
    layers = all_layers
    if not options.uses_all_samples(N):
        layers = sub_batch(all_layers, torch.arange(options.curvature_batch or N, device="meta"))
    route = _route(layers, options)
    tries = num_dampings or (3 if route == "gram" and not options.uses_conjugate_gradients(N) else 1)
    solves = _SOLVES[route](layers, options, tries)
    trials = tries * len(search_settings(options, N).lengths)
    operations += 2 * N * reduced * half * trials + solves.operations
    # what passes through memory that is new to the process: in the step, for each trial, and for each λ
    traffic = 8 * (P * 32 + reduced * (6 * trials + 130 * tries)) + solves.traffic
    state = _state_bytes(all_layers)
    solve_bytes = solves.bytes
    if options.uses_conjugate_gradients(N):
        # each iteration: a product with all samples, and a solve with the sub-batch, which reads its factor
        count = tries * options.cg_iterations
        operations += count * (8 * N * reduced * half + 3 * solves.bytes / 8)
        traffic += count * (8 * reduced * 20 + solves.bytes)
        solve_bytes += 8 * reduced * (2 * options.cg_iterations)
        solve_bytes += 4 * (N * 2 * d + reduced) + 2.5 * N * state if single else 0
    batch = 8 * N * 2 * d + 5 * N * state
    at_once = 20  # vectors of the reduced parameters around a solve
    peak = max(solve_bytes + 8 * reduced * at_once, solves.kept_bytes + 8 * P * update_vectors)
    return StepCost(route, tries, operations, traffic, batch + 8 * P * kept_vectors + peak)


def _shapes_as_layers(network: Network, batch_size: int) -> tuple[LayerDerivatives, ...]:
    """The layers' derivatives without numbers."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64, device="meta")

    layers = []
    for linear, skip in zip(network.linears, network.skips, strict=True):
        a, d = len(linear.weight), linear.weight.shape[1] + (linear.bias is not None)
        output = None
        if linear is network.linears[-1]:
            output = OutputHessian(empty(batch_size, a), network.loss == "cross_entropy")
        state = empty(batch_size, a)
        layers.append(
            LayerDerivatives(empty(*linear.weight.shape), empty(batch_size, d), state, state, state, skip, output)
        )
    return tuple(layers)


def _state_bytes(layers: Sequence[LayerDerivatives]) -> int:
    """Of one sample's pre-activations."""
    return 8 * sum(len(layer.weight) for layer in layers)


def _operations(layers: Sequence[LayerDerivatives]) -> dict[str, float]:
    """Of one factorization by each route but 'gram'."""
    return dict(count_operations(shapes_of_layers(layers), len(layers[0].inputs)))


def _route(layers: Sequence[LayerDerivatives], options: Options) -> str:
    if options.curvature != "hessian" and prefers_gram(layers, options):
        return "gram"
    operations = _operations(layers)
    return min(operations, key=lambda route: operations[route])


def _gram_solves(layers: Sequence[LayerDerivatives], options: Options, tries: int) -> _Solves:
    N, by_state = len(layers[0].inputs), options.metric == "state"
    n = N * (len(layers[-1].weight) - layers[-1].loss_hessian.zero_sum)
    matrices = tries if by_state and options.weight_decay else 1
    return _Solves(
        operations=count_gram_operations(layers, options.metric, options.weight_decay, tries),
        traffic=8 * n * n * (4 * len(layers) * matrices + 4 * tries),
        kept_bytes=8 * n * n + 2 * n * _state_bytes(layers),
        bytes=8 * 4 * n * n + 3 * n * _state_bytes(layers),
    )


def _sweep_solves(layers: Sequence[LayerDerivatives], options: Options, tries: int) -> _Solves:
    operations = _operations(layers)["sweep"] * tries / _SWEEP_RATE
    operations += count_state_weights(layers) if options.metric == "state" else 0
    return _Solves(operations, 0, 0, sweep_bytes(layers))


def _dense_solves(layers: Sequence[LayerDerivatives], options: Options, tries: int) -> _Solves:
    P = sum(len(layer.weight) * layer.inputs.shape[1] for layer in layers)
    forming = _operations(layers)["dense"] - factor_operations(P)
    times_formed = 1 if options.curvature == "hessian" and options.metric == "parameter" else tries
    return _Solves(tries * factor_operations(P) + times_formed * forming, 0, 0, 8 * 3 * P**2)


_SOLVES = {"gram": _gram_solves, "sweep": _sweep_solves, "dense": _dense_solves}

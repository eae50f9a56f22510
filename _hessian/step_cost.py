"""What a step of `DampedNewton` takes, counted from shapes before it is taken."""

from __future__ import annotations

from typing import NamedTuple

import torch

from _hessian.costs import (
    LayerShape,
    cheapest_route,
    count_operations,
    factor_operations,
    num_parameters,
    num_scaled_outputs,
    route_costs,
    shapes_of_linears,
)
from _hessian.input_span import is_wide
from _hessian.newton_options import Options
from _hessian.objective import Chain

_SWEEP_RATE = 0.8  # of the rate of large products: a sweep's are small (0.6 at 4 samples, 128 units; 0.83 at 16, 256)

Shapes = tuple[LayerShape, ...]


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


def count_gram_operations(shapes: Shapes, N: int, options: Options, num_dampings: int) -> float:
    """Of the Gram matrices and their factorizations, to leading order."""
    n, by_state = N * num_scaled_outputs(shapes), options.metric == "state"
    num_matrices = num_dampings if by_state and options.weight_decay else 1
    matrix = 2 * n**2 * sum(x.a + 1 for x in shapes)  # EᵀE, and its product with z̃z̃ᵀ
    weights = _count_state_weights(shapes, N) if by_state else 0
    return num_matrices * matrix + weights + num_dampings * n**3 / 3


def _count_state_weights(shapes: Shapes, N: int) -> float:
    """Of `gram.state_weights`, to leading order."""
    return sum(4 * N * x.a**2 * x.width for x in shapes[1:-1])


def prefers_gram(shapes: Shapes, N: int, options: Options) -> bool:
    """Whether Gauss–Newton steps are by the Gram matrix: as asked for, or by counted operations for three λ."""
    if options.route != "auto":
        return options.route == "gram"
    return count_gram_operations(shapes, N, options, 3) <= min(count_operations(shapes, N).values())


def sweep_bytes(shapes: Shapes, N: int) -> float:
    """Memory of a factorization by the sweep."""
    return route_costs(shapes, N)["sweep"].bytes


def estimate_step_cost(chain: Chain, options: Options, batch_size: int, num_dampings: int | None) -> StepCost:
    """The solves' leading terms, the passes over the whole batch, and the vectors of all parameters."""
    shapes, N = shapes_of_linears(chain.linears, chain.skips, chain.loss == "cross_entropy"), batch_size
    (a, _, d, *_), P = shapes[0], num_parameters(shapes)
    single = chain.linears[0].weight.dtype == torch.float32
    half = 0.5 if single else 1.0
    operations = 2 * N * P * (half + 3)  # the closure's forward pass; then forward, backward and gradient in float64
    kept_vectors, update_vectors = 4.0, 7.0  # of P numbers in float64
    if is_wide(N, d, a):
        # kept: the model, its three momenta, the tracked weights, and U
        # update: the step, the next momenta, and the sum of a weight and its step in float64
        kept_vectors, update_vectors = 5 * half + 1, 1 + 3 * half + (2 if single else 1)
        shapes = (shapes[0]._replace(width=N + 1, d=N + 1), *shapes[1:])
        operations += 4 * d * N**2 + 2 * N * d * a * 3  # the span's basis, and three products with it
    reduced, sample_bytes, k = num_parameters(shapes), _sample_bytes(shapes), options.curvature_samples(N)
    by_gram = options.curvature != "hessian" and prefers_gram(shapes, k, options)
    route = "gram" if by_gram else cheapest_route(shapes, k)
    tries = num_dampings or (3 if by_gram and not options.uses_conjugate_gradients(N) else 1)
    solves = _SOLVES[route](shapes, k, options, tries)
    trials = tries * 3
    operations += 2 * N * reduced * half * trials + solves.operations
    # through memory that is new to the process: in the step, for each trial, and for each λ
    traffic = 8 * (P * 32 + reduced * (6 * trials + 130 * tries)) + solves.traffic
    solve_bytes = solves.bytes
    if options.uses_conjugate_gradients(N):
        # each iteration: a product with all samples, and a solve with the sub-batch, which reads its factor
        count = tries * options.cg_iterations
        operations += count * (8 * N * reduced * half + 3 * solves.bytes / 8)
        traffic += count * (8 * reduced * 20 + solves.bytes)
        solve_bytes += 8 * reduced * (2 * options.cg_iterations)
        solve_bytes += 4 * (N * 2 * d + reduced) + 2.5 * N * sample_bytes if single else 0
    around_solve = 20  # vectors of the reduced parameters
    peak = max(solve_bytes + 8 * reduced * around_solve, solves.kept_bytes + 8 * P * update_vectors)
    batch = 8 * N * 2 * d + 5 * N * sample_bytes
    return StepCost(route, tries, operations, traffic, batch + 8 * P * kept_vectors + peak)


def _sample_bytes(shapes: Shapes) -> int:
    """Of one sample's pre-activations."""
    return 8 * sum(x.a for x in shapes)


def _gram_solves(shapes: Shapes, N: int, options: Options, tries: int) -> _Solves:
    n, sample_bytes = N * num_scaled_outputs(shapes), _sample_bytes(shapes)
    matrices = tries if options.metric == "state" and options.weight_decay else 1
    return _Solves(
        operations=count_gram_operations(shapes, N, options, tries),
        traffic=8 * n * n * (4 * len(shapes) * matrices + 4 * tries),
        kept_bytes=8 * n * n + 2 * n * sample_bytes,
        bytes=8 * 4 * n * n + 3 * n * sample_bytes,
    )


def _sweep_solves(shapes: Shapes, N: int, options: Options, tries: int) -> _Solves:
    operations = count_operations(shapes, N)["sweep"] * tries / _SWEEP_RATE
    operations += _count_state_weights(shapes, N) if options.metric == "state" else 0
    return _Solves(operations, 0, 0, sweep_bytes(shapes, N))


def _dense_solves(shapes: Shapes, N: int, options: Options, tries: int) -> _Solves:
    P = num_parameters(shapes)
    forming = count_operations(shapes, N)["dense"] - factor_operations(P)
    times_formed = 1 if options.curvature == "hessian" and options.metric == "parameter" else tries
    return _Solves(tries * factor_operations(P) + times_formed * forming, 0, 0, 8 * 3 * P**2)


_SOLVES = {"gram": _gram_solves, "sweep": _sweep_solves, "dense": _dense_solves}

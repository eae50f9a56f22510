"""What a step of `DampedNewton` takes, counted from shapes before it is taken."""

from __future__ import annotations

from typing import NamedTuple

import torch

from _hessian.costs import (
    LayerShape,
    cheapest_route,
    count_operations,
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


class _Solve(NamedTuple):
    operations: float
    traffic: float
    bytes: float


class StepCost(NamedTuple):
    """What a step takes, to leading order: `DampedNewton.estimate_step`."""

    route: str  # 'gram', 'sweep' or 'dense'
    num_dampings: int  # λ tried
    operations: float  # of float64; one of a float32 forward pass counts as half
    traffic: float  # bytes read and written by what is bound by memory
    bytes: float  # at the peak, the model and the batch included
    alone: float  # of the operations: those that more ranks do not share
    sent: float  # bytes between the first rank and the others; a message to all counts once

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        return self.operations / operations_per_second + self.traffic / bytes_per_second


def prefers_gram(shapes: Shapes, N: int, options: Options) -> bool:
    """Whether Gauss–Newton steps are by the Gram matrix: as asked for, or by counted operations."""
    if options.route != "auto":
        return options.route == "gram"
    return _gram_operations(shapes, N, options) <= min(count_operations(shapes, N).values())


def _gram_operations(shapes: Shapes, N: int, options: Options) -> float:
    """Of a Gram matrix and its factorization, to leading order."""
    n = N * num_scaled_outputs(shapes)
    weights = sum(4 * N * x.a**2 * x.width for x in shapes[1:-1]) if options.metric == "state" else 0
    return 2 * n**2 * sum(x.a + 1 for x in shapes) + weights + n**3 / 3  # EᵀE, and its product with z̃z̃ᵀ


def estimate_step_cost(chain: Chain, options: Options, batch_size: int, num_dampings: int, ranks: int) -> StepCost:
    """Of the first rank: the solves' leading terms, passes over its samples, and the vectors of all parameters."""
    shapes, N = shapes_of_linears(chain.linears, chain.skips, chain.loss == "cross_entropy"), batch_size
    (a, _, d, *_), P = shapes[0], num_parameters(shapes)
    single = chain.linears[0].weight.dtype == torch.float32
    half = 0.5 if single else 1.0
    own = -(-N // ranks)  # samples
    shared = 2 * own * P * (half + 3)  # the closure's forward pass; then forward, backward and gradient in float64
    alone, sent, gathered = 0.0, 8 * half * P, options.curvature_samples(N)  # sent at least: the new weights
    kept_vectors, update_vectors = 3.0, 3.0  # of P numbers in float64
    if is_wide(N, d, a):
        # kept: the model, the tracked weights, the last step, and U
        # update: the step, and the sum of a weight and its step in float64
        kept_vectors, update_vectors = 3 * half + 1, 1 + (2 if single else 1)
        shapes = (shapes[0]._replace(width=N + 1, d=N + 1), *shapes[1:])
        alone += 4 * d * N**2 + 4 * N * d * a  # the span's basis, and two products with it
        shared += 2 * own * (N + 1) * a  # the gradient in it
        sent, gathered = sent + 8 * N * (half * d + N + a), N
    reduced, sample_bytes, k = num_parameters(shapes), _sample_bytes(shapes), options.curvature_samples(N)
    by_gram = options.curvature != "hessian" and prefers_gram(shapes, k, options)
    route = "gram" if by_gram else cheapest_route(shapes, k)
    solve = _solve_cost(route, shapes, k, options)
    trials = 6 * num_dampings  # with f itself
    shared += 2 * own * reduced * half * trials
    alone += num_dampings * solve.operations
    sent += 8 * (reduced * (1 + half * trials) + k * sum(x.d + 3 * x.a for x in shapes))
    # through memory that is new to the process: in the step, for each trial, and for each λ
    traffic = 8 * (P * 32 + reduced * (6 * trials + 130 * num_dampings)) + num_dampings * solve.traffic
    solve_bytes = solve.bytes
    if options.uses_conjugate_gradients(N):
        # each iteration: a product with all samples, and a solve with the sub-batch, which reads its factor
        count = num_dampings * options.cg_iterations
        shared += count * 8 * own * reduced * half
        alone += count * 3 * solve.bytes / 8
        sent += count * 8 * 2 * reduced * half + 8 * half * P  # and the last step
        traffic += count * (8 * reduced * 20 + solve.bytes)
        solve_bytes += 8 * reduced * (2 * options.cg_iterations)
        solve_bytes += 4 * (own * 2 * d + reduced) + 2.5 * own * sample_bytes if single else 0
    around_solve = 20  # vectors of the reduced parameters
    peak = max(solve_bytes + 8 * reduced * around_solve, 8 * P * update_vectors)
    batch = 8 * own * 2 * d + 5 * own * sample_bytes + (8 * gathered * 2 * d if ranks > 1 else 0)
    needed = batch + 8 * P * kept_vectors + peak
    return StepCost(route, num_dampings, shared + alone, traffic, needed, alone, sent if ranks > 1 else 0.0)


def _sample_bytes(shapes: Shapes) -> int:
    """Of one sample's pre-activations."""
    return 8 * sum(x.a for x in shapes)


def _solve_cost(route: str, shapes: Shapes, N: int, options: Options) -> _Solve:
    """For one λ."""
    if route == "gram":
        n = N * num_scaled_outputs(shapes)
        traffic = 8 * n * n * 4 * (len(shapes) + 1)
        return _Solve(_gram_operations(shapes, N, options), traffic, 8 * 4 * n * n + 3 * n * _sample_bytes(shapes))
    operations, needed = count_operations(shapes, N)[route], route_costs(shapes, N)[route].bytes
    return _Solve(operations / (_SWEEP_RATE if route == "sweep" else 1), 0, needed)

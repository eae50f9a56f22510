"""What a factorization costs, by route: operations and bytes, counted from shapes alone, before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from _hessian.layers import LayerDerivatives
from _hessian.settings import Settings
from _hessian.symmetric_factor import block_size

DENSE_CHUNK = 2**27  # bytes: temporaries of the dense Hessian are formed in chunks of this
_CLASS_CHUNK = 2**28  # bytes: the couplings of many classes are formed in chunks of this
_PLAIN = Settings()
_cached = lru_cache(maxsize=64)  # one factorization asks for the same more than once, and so does the next one


class LayerShape(NamedTuple):
    """a × a′ weights (a × d with the bias), skip or not; `zero_sum`: the last layer's Λ has 1 in its null space."""

    a: int
    width: int
    d: int
    skip: bool
    zero_sum: bool


class RouteCost(NamedTuple):
    """What one factorization takes, in float64, or in float32 with precision='mixed'."""

    operations: float  # floating-point additions and multiplications to factor
    solve_operations: float  # of one direct solve, a column
    bytes: float  # at its peak: what is kept, and temporaries

    def __str__(self) -> str:
        return f"{self.operations:.2g} operations, {self.bytes / 1e9:.2g} GB"


def shapes_of_layers(layers: Sequence[LayerDerivatives]) -> tuple[LayerShape, ...]:
    zero_sum = layers[-1].loss_hessian.zero_sum
    return tuple(
        LayerShape(x.weight.shape[0], x.weight.shape[1], x.inputs.shape[1], bool(x.skip), zero_sum) for x in layers
    )


def shapes_of_linears(linears: Sequence[nn.Linear], skips: Sequence[float], zero_sum: bool) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(x.out_features, x.in_features, x.in_features + (x.bias is not None), bool(skip), zero_sum)
        for x, skip in zip(linears, skips, strict=True)
    )


class LayerOperations(NamedTuple):
    pivot: float  # to form and factor it
    eliminate: float  # to subtract it from the cost-to-go, and form that


def factor_operations(m: float) -> float:
    """Of a symmetric matrix (m, m) by blocks; of a small one, with its inverse."""
    return m**3 / 3 + min(block_size(m), m) * m**2


def whiten_operations(m: float, n: float) -> float:
    """F⁻¹B for B (m, n)."""
    return (m + min(block_size(m), m)) * m * n


def update_operations(m: float, n: float) -> float:
    """WᵀW for W (m, n), one half of it by blocks; of a small one, all of it."""
    return (n + min(block_size(n), n)) * m * n


def layer_operations(shapes: Sequence[LayerShape], index: int, N: int, many_classes: bool = False) -> LayerOperations:
    """Floating-point operations of the sweep in one layer; nothing carried."""
    (a, width, d, skip, _), first, last = shapes[index], index == 0, index == len(shapes) - 1
    r = min(N, d)
    m, n, below = a * r, N * a, 0 if first else N * width
    update = update_operations(m, below)  # BᵀG⁻¹B
    if many_classes and last:
        return LayerOperations(10 * a * (r**3 + N**3), 2 * m * r * below + update)
    eliminate = whiten_operations(m, below) + update
    if last:
        form = 2 * r * r * N * a * a
        return LayerOperations(form + factor_operations(m), eliminate + (0 if first else 2 * N * a * width * width))
    couple = 2 * width * n * n + 2 * a * width * N * below + 2 * N * m * below  # K A, Aᵀ K A, Jᵀ K A
    couple += 2 * n * N * a * width if skip else 0  # Aᵀφ′P
    return LayerOperations(2 * r * n * n + 2 * r * m * n + factor_operations(m), 0 if first else couple + eliminate)


def natural_operations(shapes: Sequence[LayerShape], N: int) -> float:
    """Of the natural sizes of all costs-to-go, before a sweep."""
    hidden = sum(2 * N * x.width * x.a * (x.a + 2 * x.width) for x in shapes[1:-1])  # P T, TᵀP T, Wᵀdiag(β φ″)W
    return hidden + (2 * N * shapes[-1].width ** 2 * shapes[-1].a if len(shapes) > 1 else 0)  # Wᵀ Λ W


@_cached
def prefers_many_classes(shapes: tuple[LayerShape, ...], N: int) -> bool:
    """Whether the last pivot is cheaper in its many-class form: where its dense form would dominate the sweep."""
    rest = sum(sum(layer_operations(shapes, index, N)) for index in range(len(shapes) - 1))
    dense, many = (sum(layer_operations(shapes, len(shapes) - 1, N, form)) for form in (False, True))
    return dense > rest + many


def num_parameters(shapes: Sequence[LayerShape]) -> int:
    return sum(x.a * x.d for x in shapes)


def product_operations(shapes: Sequence[LayerShape], N: int) -> float:
    """Of one product H v."""
    return sum(N * x.a * (4 * x.d + (8 * x.width if index else 0)) for index, x in enumerate(shapes))


def _dense_operations(shapes: Sequence[LayerShape], N: int, coupled: bool) -> float:
    """To form H: the sensitivities of each layer to those below, and two products over the samples a pair of layers."""
    operations, parameters, widths = 0.0, 0.0, 0.0  # those below
    for x in shapes:
        coupling = x.a * x.width * parameters if coupled else 0
        operations += 2 * N * (2 * widths * x.a * x.width + x.a * x.d * (parameters + x.a * x.d) + coupling)
        parameters, widths = parameters + x.a * x.d, widths + x.a
    return operations


def num_scaled_outputs(shapes: Sequence[LayerShape]) -> int:
    """K, the columns of Λ's square root."""
    return shapes[-1].a - shapes[-1].zero_sum


@_cached
def count_operations(shapes: tuple[LayerShape, ...], N: int, gauss_newton: bool = False) -> Mapping[str, float]:
    """Floating-point operations of each route's factorization, to leading order."""
    many, P = prefers_many_classes(shapes, N), num_parameters(shapes)
    operations = {
        "sweep": sum(sum(layer_operations(shapes, index, N, many)) for index in range(len(shapes)))
        + natural_operations(shapes, N),
        "dense": _dense_operations(shapes, N, not gauss_newton) + factor_operations(P),
    }
    derivatives = 4 * N * P
    if gauss_newton:
        n = N * num_scaled_outputs(shapes)
        jacobian = sum(2 * n * x.a * x.width for x in shapes[1:])
        operations["gram"] = 2 * n * n * sum(x.a for x in shapes) + jacobian + factor_operations(n)
        operations["gram"] += 2 * N * N * sum(x.d for x in shapes)  # z̃z̃ᵀ
    return MappingProxyType({route: count + derivatives for route, count in operations.items()})


def cheapest_route(shapes: tuple[LayerShape, ...], N: int, gauss_newton: bool = False) -> str:
    operations = count_operations(shapes, N, gauss_newton)
    return min(operations, key=lambda route: operations[route])


def _solve_operations(shapes: Sequence[LayerShape], N: int, route: str) -> float:
    if route == "dense":
        return 2 * num_parameters(shapes) ** 2
    if route == "gram":
        return 2 * (N * num_scaled_outputs(shapes)) ** 2 + product_operations(shapes, N)
    pairs = [(x.a * min(N, x.d), N * x.width if index else 0) for index, x in enumerate(shapes)]
    return sum(2 * m * m + 4 * m * below for m, below in pairs)


def _sweep_numbers(shapes: Sequence[LayerShape], N: int, keep: str, checkpoint: bool) -> float:
    """Numbers at the peak of a sweep, or of its solve where that recomputes."""
    last, many = len(shapes) - 1, prefers_many_classes(shapes, N)

    def kept(index: int) -> float:
        x = shapes[index]
        r, m = min(N, x.d), x.a * min(N, x.d)
        if many and index == last:
            return x.a * (r * r + r) + N * N
        return m * m + (m * N * x.width if index else 0)

    def work(index: int) -> float:
        """Temporaries beyond what is kept, at their most in one layer, with the cost-to-go above or below it."""
        x = shapes[index]
        r, n, below = min(N, x.d), N * x.a, N * x.width if index else 0
        m = x.a * r
        if many and index == last:
            chunk = min(x.a * r * below, _CLASS_CHUNK / 8)
            return max(3 * x.a * N * N + 2 * x.a * r * r, below**2 + 3 * chunk + N * x.a * x.width)
        if index == last:
            form = N * x.a * (x.a + x.width) + N * r * r + m * m
            return max(form, below**2 + m * below)
        scratch = max(m * n, n * below, m * below)
        if x.skip and index:  # φ′P, K and their products beside it
            return 2 * n * n + 3 * below**2 + scratch
        return n * n + scratch + (below**2 if below != n else 0)

    def reused(alive: int) -> float:
        """Of hidden layers' pivots, where the memory of so many is used again: each as large as the largest it held."""
        m = [x.a * min(N, x.d) for x in shapes[:last]]
        coupling = [rows * N * x.width if index else 0 for index, (rows, x) in enumerate(zip(m, shapes, strict=False))]
        return sum(max(m[i::alive]) ** 2 + max(coupling[i::alive]) for i in range(min(alive, last)))

    layers = range(len(shapes))
    if keep == "inertia":
        return max([kept(last) + work(last), *(reused(1) + work(index) for index in layers[:last])])
    if not checkpoint:
        suffix, peak = 0.0, 0.0
        for index in reversed(layers):
            suffix += kept(index)
            peak = max(peak, suffix + work(index))
        return peak
    length = int((len(shapes) - 1) ** 0.5) + 1
    tops = list(reversed(layers))[::length]
    boundaries = sum((N * shapes[top].a) ** 2 for top in tops if top != last)
    copied = max((N * shapes[top].a) ** 2 for top in tops)  # a segment is recomputed from a copy
    return boundaries + copied + kept(last) + reused(length) + max(map(work, layers))


@_cached
def route_costs(shapes: tuple[LayerShape, ...], N: int, settings: Settings = _PLAIN) -> Mapping[str, RouteCost]:
    """Of each route that settings.curvature has; neither the damping nor settings.route matters."""
    P, operations = num_parameters(shapes), count_operations(shapes, N, settings.curvature == "gauss_newton")
    derivatives = sum(x.a * x.width + N * x.d + 3 * N * x.a + min(N, x.d) * (N + x.d) for x in shapes)
    outside = sum(x.width**2 for x in shapes[1:] if N < x.d)  # of the samples' span
    sensitivities = sum(x.a * below for x, below in zip(shapes, accumulate(x.a for x in shapes), strict=True))
    sweep = outside + _sweep_numbers(shapes, N, settings.keep, settings.checkpoint_layers)
    mixed = settings.precision == "mixed"
    needed = {
        "sweep": 8 * derivatives + (4 * (derivatives + sweep) if mixed else 8 * sweep),
        "dense": 8 * derivatives + 8 * P * P + max(8 * P * P, min(DENSE_CHUNK, 8 * (3 * N * sensitivities + P * P))),
    }
    if "gram" in operations:
        n = N * num_scaled_outputs(shapes)
        needed["gram"] = 8 * (derivatives + 2 * n * n + 2 * n * sum(x.a for x in shapes))
    return MappingProxyType(
        {r: RouteCost(operations[r], _solve_operations(shapes, N, r), needed[r]) for r in operations}
    )


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had on the device; infinite where it isn't known."""
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = float("inf")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        if "MemAvailable" in fields:
            free = 1024 * float(fields["MemAvailable"].split()[0])
    limit, used, statistics = (f"/sys/fs/cgroup/memory.{name}" for name in ("max", "current", "stat"))
    if os.path.exists(limit) and os.path.exists(used):  # of a container
        with open(limit) as limit_file, open(used) as used_file, open(statistics) as statistics_file:
            allowed, taken = limit_file.read().strip(), float(used_file.read())
            cached = dict(line.split() for line in statistics_file).get("file", 0)  # given back when asked for
            if allowed != "max":
                free = min(free, float(allowed) - taken + float(cached))
    return free


def checked_route(layers: Sequence[LayerDerivatives], settings: Settings, *, formed: bool, may_mix: bool) -> str:
    """settings.route, or for 'auto' the one with the fewest operations; MemoryError where it won't fit, naming the
    changes that make it fit. formed: H, or the Gram matrix, is there already. may_mix: precision='mixed' can be
    chosen."""
    if settings.keep == "disk":
        raise ValueError(
            "keep='disk' is for a TrackedNetwork: choose 'solve', or checkpoint_layers=True for less memory"
        )
    shapes, N, device = shapes_of_layers(layers), len(layers[0].inputs), layers[0].weight.device
    # the Gram route knows no state damping, and divides by ε
    may_gram = settings.curvature == "gauss_newton" and settings.state_damping == 0 and all(settings.epsilons(1))
    route, free = settings.route, free_bytes(device)
    if route == "auto":
        route = "sweep" if settings.checkpoint_layers else cheapest_route(shapes, N, may_gram)

    def needs(route: str, N: int, settings: Settings) -> float:
        return route_costs(shapes, N, settings._replace(damping=0.0, route="auto", state_damping=0.0))[route].bytes

    needed = needs(route, N, settings) / (2 if formed and route != "sweep" else 1)
    if needed <= free:
        return route
    no_checkpoints = ", checkpoint_layers=False" if settings.checkpoint_layers else ""
    remedies = [
        f"route={other!r}{no_checkpoints}"
        for other in count_operations(shapes, N, may_gram)
        if other != route and needs(other, N, settings) <= free
    ]
    if route == "sweep":
        changes = [("checkpoint_layers=True", settings._replace(checkpoint_layers=True))]
        changes += [("precision='mixed'", settings._replace(precision="mixed"))] if may_mix else []
        changes += [("keep='inertia' (counts only, no solves)", settings._replace(keep="inertia"))]
        remedies += [name for name, changed in changes if needs(route, N, changed) <= free]
    smaller = N
    while smaller > 1 and needs(route, smaller, settings) > free:
        smaller //= 2
    if needs(route, smaller, settings) <= free:
        remedies.append(f"a batch of {smaller} samples")
    raise MemoryError(
        f"the factorization by route={route!r} at {N} samples needs {needed / 1e9:.3g} GB, and {device} has "
        f"{free / 1e9:.3g} GB free. "
        + (f"What fits: {'; '.join(remedies)}" if remedies else "Narrower layers, or another device, would do")
    )

"""What the tests share: small seeded networks, and oracles for them: dense Hessians by torch.func, counted operations.

Everything is in float64. Hidden widths are unequal, batches below and above the widths.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hessian
from _hessian import symmetric_factor
from _hessian.elimination import Sweep
from _hessian.factorization import Chain, HessianFactorization, factorize_system
from _hessian.layers import LayerDerivatives
from _hessian.operations import Operation
from _hessian.settings import Settings
from _hessian.state import State
from hessian import ACTIVATIONS, DeepMLPWithTracking

HERE = Path(__file__).resolve().parent.parent  # the repository

DAMPINGS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)

DEEP = (3, 5, 4, 6, 3, 4, 7, 5, 3, 6, 4, 5, 3, 7, 4, 6, 5, 3, 4, 6)  # 20 hidden layers, neighbours unequal


class Case(NamedTuple):
    hidden: tuple[int, ...]
    batch: int
    activation: str = "tanh"
    loss: str = "cross_entropy"
    residual: bool = False
    bias: bool = True
    inputs: int = 5
    classes: int = 3
    soft: bool = False  # rows of probabilities as targets

    def build(self, seed: int = 0, scale: float = 1.0) -> tuple[DeepMLPWithTracking, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DeepMLPWithTracking(
                self.inputs,
                self.hidden,
                self.classes,
                len(self.hidden),
                self.activation,
                bias=self.bias,
                residual=self.residual,
                loss=self.loss,
            ).double()
        with torch.no_grad():  # away from the special point of initialization: biases random, weights larger
            for p in model.parameters():
                p.mul_(1.2).add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        x = scale * torch.randn(self.batch, self.inputs, generator=generator, dtype=torch.float64)
        if self.loss == "mse":
            y = torch.randn(self.batch, self.classes, generator=generator, dtype=torch.float64)
        elif self.soft:
            y = torch.rand(self.batch, self.classes, generator=generator, dtype=torch.float64).softmax(1)
        else:
            y = torch.randint(self.classes, (self.batch,), generator=generator)
        return model, x, y


SHAPES = [((), 1), ((), 20), ((4,), 2), ((4,), 20), ((6, 4, 7), 1), ((6, 4, 7), 3), ((6, 4, 7), 15)]

GRID = (
    [Case(h, n, a, bias=b) for a in ACTIVATIONS for h, n in SHAPES[2:] for b in (True, False)]
    + [Case(h, n, loss="mse", bias=b) for h, n in SHAPES for b in (True, False)]
    + [Case(h, n, soft=True) for h, n in SHAPES]
    # skips: around the first layer (5 → 5), and around layers 3 and 5
    + [
        Case((5, 6, 6, 4, 4, 7), n, a, loss, residual=True, bias=n != 3)
        for a in ACTIVATIONS
        for n, loss in ((1, "cross_entropy"), (3, "mse"), (3, "cross_entropy"), (15, "cross_entropy"))
    ]
    + [Case(DEEP, n, a) for n, a in ((1, "tanh"), (2, "gelu"), (12, "tanh"), (12, "relu"))]
    + [Case((5,) + DEEP[1:12] + (5,) * 8, n, residual=True) for n in (2, 9)]
    + [Case((16, 12, 14), n, inputs=10) for n in (3, 9)]
)


def case_id(case: Case) -> str:
    flags = [case.activation, case.loss] + [name for name in ("residual", "soft") if getattr(case, name)]
    return "-".join([*flags, f"L{len(case.hidden) + 1}", f"N{case.batch}"] + ([] if case.bias else ["nobias"]))


def random_vector(size: int, columns: int | None = None, seed: int = 7) -> Tensor:
    shape = (size,) if columns is None else (size, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tracked_loss(case: Case, **kwargs) -> tuple[DeepMLPWithTracking, Tensor]:
    model, x, y = case.build(**kwargs)
    return model, model(x, y, track_activations=True)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def flat_function(model: nn.Module, x: Tensor, *targets: Tensor):
    """θ ↦ model(x, *targets) as a function of the flat parameters, and θ."""
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach() for p in model.parameters()]

    def f(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in parameters])
        views = {n: t.view_as(p) for n, t, p in zip(names, pieces, parameters, strict=True)}
        return torch.func.functional_call(model, views, (x, *targets))

    return f, torch.cat([p.flatten() for p in parameters])


def chain(layers: Sequence[LayerDerivatives]) -> Chain:
    """The system of these layers."""
    return Chain(hessian._SOLVER, tuple(layers))


def factorize_layers(layers: Sequence[LayerDerivatives], *settings, **named) -> HessianFactorization:
    return factorize_system(chain(layers), Settings(*settings, **named))


@functools.lru_cache(maxsize=4)
def dense_hessian(case: Case, curvature: str = "hessian") -> Tensor:
    model, x, y = case.build()
    if curvature == "hessian":
        f, theta = flat_function(model, x, y)
        return torch.func.hessian(f)(theta)
    f, theta = flat_function(model, x)
    J = torch.func.jacrev(f)(theta).flatten(0, 1)  # (N C, P)
    in_logits = nn.functional.mse_loss if case.loss == "mse" else nn.functional.cross_entropy
    Lambda = torch.func.hessian(lambda h: in_logits(h, y))(f(theta)).reshape(len(J), len(J))
    return J.T @ Lambda @ J


@functools.lru_cache(maxsize=4)
def dense_state_form(case: Case) -> Tensor:
    """Σ_{ℓ<L} S_ℓᵀS_ℓ / N from the Jacobians of the hidden layers' pre-activations, by torch.func and hooks."""
    model, x, _ = case.build()
    size, hidden = num_parameters(model), []
    for linear in model.layers:
        linear.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    f, theta = flat_function(model, x)

    def pre_activations(theta: Tensor) -> tuple[Tensor, ...]:
        hidden.clear()
        f(theta)
        return tuple(hidden)

    jacobians = torch.func.jacrev(pre_activations)(theta)[:-1]  # (N, a, P) each; the last, of the logits, is left out
    zero = torch.zeros(size, size, dtype=torch.float64)
    return sum((S.flatten(0, 1).T @ S.flatten(0, 1) / case.batch for S in jacobians), zero)


def relative(error: Tensor, reference: Tensor) -> float:
    return (error.norm() / reference.norm()).item()


def dense_residual(A: Tensor, v: Tensor) -> float:
    """The residual of torch.linalg.solve on the dense matrix with one refinement."""
    x = torch.linalg.solve(A, v)
    x = x + torch.linalg.solve(A, v - A @ x)
    return relative(A @ x - v, v)


def counted_operations(work) -> int:
    """Operations of `work()`: products by torch's counter; factorizations and triangular solves by formulas."""
    aten = torch.ops.aten
    by_torch = {
        aten.linalg_cholesky_ex: lambda shape, *_, out_shape=None, **__: math.prod(shape[:-2]) * shape[-1] ** 3 // 3,
        aten.linalg_solve_triangular: lambda shape, b, *_, out_shape=None, **__: math.prod(b) * shape[-1],
        aten.addmm_: lambda c, a, b, *_, out_shape=None, **__: 2 * math.prod(a) * b[-1],
        aten.baddbmm_: lambda c, a, b, *_, out_shape=None, **__: 2 * math.prod(a) * b[-1],
    }
    formulas = {
        "potrf": lambda G, **_: len(G) ** 3 // 3,
        "sytrf": lambda G, **_: len(G) ** 3 // 3,
        "trsm": lambda _, L, b, **__: b.size * len(L),
        "syconv": lambda *_, **__: 0,
        "laswp": lambda *_, **__: 0,
    }
    kernel, count = symmetric_factor._lapack, 0

    def counting(name, like):
        def call(*args, **kwargs):
            nonlocal count
            count += formulas[name](*args, **kwargs)
            return kernel(name, like)(*args, **kwargs)

        return call

    with (
        mock.patch.object(symmetric_factor, "_lapack", counting),
        FlopCounterMode(display=False, custom_mapping=by_torch) as counter,
    ):
        work()
    return counter.get_total_flops() + count


def reachable_bytes(*roots) -> int:
    """Bytes of all tensor storages that can be reached from the objects, each counted once."""
    storages, stack = {}, list(roots)
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif dataclasses.is_dataclass(item):
            stack += [getattr(item, field.name) for field in dataclasses.fields(item)]
        elif isinstance(item, (list, tuple)):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (Sweep, Operation, State)):
            stack += vars(item).values()
    return sum(storages.values())


def raises(kind, match, function, *args, **kwargs):
    with pytest.raises(kind, match=match):
        function(*args, **kwargs)


UNCARRIED = Case((16, 12, 14), 3, "relu", inputs=10)  # a net that the sweep fails on at 1e-8 without carried pivots


def layered(model: DeepMLPWithTracking, damping: tuple[float, ...]) -> Tensor:
    """Each parameter's damping."""
    pairs = zip(model.layers, damping, strict=True)
    return torch.cat([torch.full((num_parameters(linear),), e, dtype=torch.float64) for linear, e in pairs])

"""Operations of a network with their derivatives at one batch, by kind: elementwise, linear, general, affine.

An operation o = f(u₁, u₂, …) has Jacobians A_i = ∂f/∂u_i. With β the loss's derivative in o, M_ij are the second
derivatives of ⟨β, f⟩. Vectors are flat as in `Value`, k of them together: (k, n). All kinds share one protocol.
General operations have a file of their own (general_operation.py), as have affine ones (affine_operation.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from _hessian.carried_pivots import CarriedOutside, Natural
from _hessian.checkpoints import Memory
from _hessian.graph import Region, Value
from _hessian.layers import SingularHessianError
from _hessian.state import State

CHUNK_BYTES = 2**27  # derivatives are formed in chunks of this
DERIVATIVE_RTOL = 1e-7  # of the check against double backward
ALL = slice(None)

Blocks = Callable[[int, int], Tensor]  # i, j ↦ the block (n_i, n_j) of a symmetric matrix


class Count(NamedTuple):
    """Of eliminated dimensions."""

    negative: int
    logabsdet: float


class Pivot(Protocol):
    """What a solve needs of eliminated values y, which B couples to those that were live then. k right-hand sides."""

    @property
    def values(self) -> tuple[Value, ...]: ...

    def backward(self, q: Tensor) -> tuple[Tensor, dict[Value, Tensor]]:
        """From q (k, m): what `forward` needs of it, and BᵀG⁻¹q (k, n_u) by values u."""

    def forward(self, state: Tensor, t: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        """−G⁻¹(q + B t), by the values y, from `backward`'s state and the changes t of the values that were live."""


class Operation:
    """What the elimination needs of an operation. k vectors together are (k, n)."""

    output: Value
    inputs: tuple[Value, ...]
    z: Value | None = None  # the input that its parameters meet, and they themselves, where they are reduced
    own: Value | None = None
    num_outside: int = 0  # the dimensions of X⊥
    layer: int | None = None  # its number, 1 … L, in a chain of layers
    natural: Natural | None = None  # sizes, where it asks for carried pivots
    rounded: ClassVar[tuple[str, ...]] = ()  # attributes that `in_float32` rounds

    @property
    def pull_back_cost(self) -> float:
        """Multiplications of `pull_back` for one vector."""
        return self.output.size

    @property
    def numbers(self) -> float:
        """How many it keeps."""
        return 3 * self.output.size

    def pull_back(self, p: Tensor, which: slice = ALL) -> list[Tensor]:
        """A_iᵀ p (k, n_i) of inputs[which], for p (k, n_o). In memory of their own."""
        raise NotImplementedError

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        """Σ A_i t_i (k, n_o), for t_i (k, n_i)."""
        raise NotImplementedError

    def add_curvature(self, blocks: Blocks) -> None:
        """M_ij added to the blocks(i, j), i ≤ j, in their dtype."""
        raise NotImplementedError

    def in_float32(self) -> Self:
        """The same operation with derivatives in float32."""
        twin = copy.copy(self)
        for name in self.rounded:
            setattr(twin, name, _in_float32(getattr(self, name)))
        return twin

    # the elimination

    def eliminate(self, state: State, memory: Memory) -> None:
        """Its output leaves the state, and its inputs enter."""
        P, rows = state.take(self.output)
        for value in self.inputs:
            state.enter(value)
        for u in list(rows):
            for value, part in zip(self.inputs, self.pull_back_in_place(rows.pop(u).mT), strict=True):
                state.add_both(u, value, part)
        if P is not None:
            self.pull_back_both(P, state, memory)
        self.add_curvature(lambda i, j: state.block(self.inputs[i], self.inputs[j]))

    def pull_back_in_place(self, p: Tensor) -> list[Tensor]:
        """`pull_back` of a p that may be overwritten."""
        return self.pull_back(p)

    def pull_back_both(self, P: Tensor, state: State, memory: Memory) -> None:
        """A_iᵀ P A_j of all inputs, added to the state. P may be overwritten."""
        for i, part in enumerate(self.pull_back(P)):
            blocks = self.pull_back(part.mT.contiguous(), slice(i, None))
            for value, block in zip(self.inputs[i:], blocks, strict=True):
                state.add(self.inputs[i], value, block)

    def singular(self, value: Value, epsilon: float, why: str) -> SingularHessianError:
        """For a pivot of its parameter."""
        message = f"H + damping·I is singular at {value.name}, damping {epsilon:g}: {why}. Choose a larger damping"
        if epsilon == 0:
            message += "; for the minimum-norm solution of H x = v call hessian_inverse_vector_product with damping=0"
        return SingularHessianError(message, layer=self.layer, damping=epsilon)

    def structured_pivot(self, value: Value, epsilon: float, state: State) -> tuple[Pivot, Count] | None:
        """A parameter eliminated in a form of its own, where it has one."""

    def eliminate_outside(self, epsilon: float, state: State) -> CarriedOutside | None:
        """X⊥ leaves. Returns the parts of it that are carried."""


def _in_float32(x: Tensor | list | None) -> Tensor | list | None:
    if isinstance(x, Tensor):
        return x.float()
    return x if x is None else [_in_float32(part) for part in x]


class Probe(NamedTuple):
    """Random directions, and the derivatives along them by double backward, flat."""

    cotangent: Tensor  # p (1, n_o)
    tangents: list[Tensor]  # t_i (1, n_i)
    pulled: list[Tensor]  # A_iᵀ p
    second: list[Tensor]  # Σ_j M_ij t_j


class OperationDerivatives(Operation):
    """Derivatives of an operation without parameters of its own, at one batch. Subclass it to give a kind of module
    closed forms (USAGE shows one): `__init__`, `pull_back`, `push_forward` and `add_curvature`.

    `output` and `inputs` are `Value`s, whose `unflatten` gives (k, n) its shape, (k, *shape), and `flatten` takes it.
    rounded: names of the attributes that a factor in float32 takes in float32.
    """

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        """tensors: the inputs' values, in float64. beta: β, the loss's derivative in the output."""
        self.output, self.inputs = region.output, region.inputs
        self._region, self._tensors, self._beta = region, tensors, beta

    def check_derivatives(self) -> None:
        """Compare derivatives along random directions with a double backward, without vmap: torch's derivatives of some
        functions are wrong under vmap. Raises ArithmeticError where they differ."""
        probe = self._probe()
        self._compare(self.pull_back(probe.cotangent), probe.pulled)
        self._compare(self._times_second(probe.tangents), probe.second)

    def _times_second(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Σ_j M_ij t_j of each input."""
        blocks: dict[tuple[int, int], Tensor] = {}
        sizes = [value.size for value in self.inputs]
        self.add_curvature(lambda i, j: blocks.setdefault((i, j), self._beta.new_zeros(sizes[i], sizes[j])))
        products = [torch.zeros_like(t) for t in tangents]
        for (i, j), M in blocks.items():
            products[i] += tangents[j] @ M.mT
            if i != j:
                products[j] += tangents[i] @ M
        return products

    def _probe(self) -> Probe:
        generator = torch.Generator().manual_seed(0)

        def random(n: int) -> Tensor:
            return torch.randn(1, n, generator=generator, dtype=torch.float64).to(self._beta)

        leaves = [x.clone().requires_grad_() for x in self._tensors]
        tangents = [random(value.size) for value in self.inputs]
        cotangent = random(self.output.size)
        with torch.enable_grad():
            out = self._region.run(*leaves)
            pulled = gradients((self.output.unflatten(cotangent)[0] * out).sum(), leaves)
            gradient = gradients((self._beta * out).sum(), leaves, create_graph=True)
            along = [
                (g * value.unflatten(t)[0]).sum() for g, value, t in zip(gradient, self.inputs, tangents, strict=True)
            ]
            second = gradients(total(along), leaves)
        flat = [[v.flatten(x[None]) for v, x in zip(self.inputs, part, strict=True)] for part in (pulled, second)]
        return Probe(cotangent, tangents, *flat)

    def _compare(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        self._refuse(largest_error(found, expected))

    def _refuse(self, error: float) -> None:
        if not error <= DERIVATIVE_RTOL:
            names = ", ".join(value.name for value in self.inputs)
            raise ArithmeticError(
                f"torch's derivatives of {self.output.name}, from {names}, are off by {error:.1e}. Please report "
                "the operation; until then write it with other functions of torch, or use route='dense'"
            )


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to what is expected, and absolute where that is 0."""
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-300)) if bool(b.any()) else float(a.norm())
        for a, b in zip(found, expected, strict=True)
    )


class Elementwise(OperationDerivatives):
    """Diagonal derivatives, after inputs are broadcast to the output's shape."""

    rounded = ("slopes", "second")

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        super().__init__(region, tensors, beta)
        shape = region.output.shape
        leaves = [x.expand(shape).clone().requires_grad_() for x in tensors]
        with torch.enable_grad():
            out = region.run(*leaves)
            slopes = gradients(out.sum(), leaves, create_graph=True)
            second = [gradients((beta * slope).sum(), leaves) for slope in slopes]
        self.slopes = [self._flat(x) for x in slopes]
        self.second = [[self._flat(x) for x in row] for row in second]
        self._index = [self._positions(value) for value in region.inputs]

    @property
    def is_plain(self) -> bool:
        """Whether it is φ(u) of one activation, entry by entry."""
        return len(self.inputs) == 1 and self._index[0] is None and self.inputs[0].batch_dim is not None

    def _flat(self, x: Tensor) -> Tensor:
        return self.output.flatten(x.detach()[None])[0]

    def _positions(self, value: Value) -> Tensor | None:
        """Where each entry of the output comes from in the flat input; None: from the same place."""
        places = torch.arange(value.size, device=self.slopes[0].device)
        index = self._flat(value.unflatten(places[None])[0].expand(self.output.shape))
        return None if torch.equal(index, places) else index

    def _gather(self, i: int, t: Tensor) -> Tensor:
        return t if (index := self._index[i]) is None else t[:, index]

    def _scatter(self, i: int, p: Tensor) -> Tensor:
        if (index := self._index[i]) is None:
            return p
        return p.new_zeros(len(p), self.inputs[i].size).index_add_(1, index, p)

    def pull_back(self, p: Tensor, which: slice = ALL) -> list[Tensor]:
        return [self._scatter(i, p * self.slopes[i]) for i in range(len(self.inputs))[which]]

    def pull_back_in_place(self, p: Tensor) -> list[Tensor]:
        return [p.mul_(self.slopes[0])] if self.is_plain else self.pull_back(p)

    def pull_back_both(self, P: Tensor, state: State, memory: Memory) -> None:
        if self.is_plain:
            state.add(self.inputs[0], self.inputs[0], P.mul_(self.slopes[0]).mul_(self.slopes[0][:, None]))
        else:
            super().pull_back_both(P, state, memory)

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        return total(
            [slope * self._gather(i, t) for i, (slope, t) in enumerate(zip(self.slopes, tangents, strict=True))]
        )

    def add_curvature(self, blocks: Blocks) -> None:
        places = torch.arange(self.output.size, device=self.slopes[0].device)
        for i, row in enumerate(self.second):
            for j, entries in enumerate(row):
                if j >= i and bool(entries.any()):
                    rows, columns = (places if (index := self._index[x]) is None else index for x in (i, j))
                    blocks(i, j).index_put_((rows, columns), entries, accumulate=True)

    def _times_second(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        gathered = [self._gather(j, t) for j, t in enumerate(tangents)]
        return [
            self._scatter(i, total([entries * t for entries, t in zip(row, gathered, strict=True)]))
            for i, row in enumerate(self.second)
        ]


class Linear(OperationDerivatives):
    """Second derivatives are zero here. Jacobians are applied by autograd in float64, never stored."""

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        super().__init__(region, tensors, beta)
        self._transpose = transposed_jacobian(region.run, tensors)
        self._zero = torch.zeros_like(beta)
        numbers = sum(x.numel() for x in tensors) + beta.numel()
        self._chunk = max(1, CHUNK_BYTES // (8 * numbers))

    def pull_back(self, p: Tensor, which: slice = ALL) -> list[Tensor]:
        def transpose(cotangent: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.clone() for x in self._transpose(cotangent.double())[which])  # may be views of one tensor

        found = torch.func.vmap(transpose, chunk_size=self._chunk)(self.output.unflatten(p))
        return [value.flatten(x).to(p.dtype) for value, x in zip(self.inputs[which], found, strict=True)]

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        forward = transposed_jacobian(self._transpose, [self._zero])
        unflat = tuple(value.unflatten(t).double() for value, t in zip(self.inputs, tangents, strict=True))
        found = torch.func.vmap(lambda *t: forward(t)[0], chunk_size=self._chunk)(*unflat)
        return self.output.flatten(found).to(tangents[0].dtype)

    def add_curvature(self, blocks: Blocks) -> None:
        pass


def transposed_jacobian(function: Callable, at: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Cotangents of the function's output ↦ those of its inputs."""
    return torch.func.vjp(function, *at)[1]


def gradients(of: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """∂of/∂leaf; zeros where there is no dependence."""
    if not of.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(of, leaves, create_graph=create_graph, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def total(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, without changing the first."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result

"""A network at one batch as a program of differentiated operations, and products with its Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from _hessian.affine_operation import Affine
from _hessian.argument_checks import check_used
from _hessian.general_operation import ClosedForms, linearize
from _hessian.graph import AffineNode, Builder, Value
from _hessian.operations import Operation, transposed_jacobian
from _hessian.reduced_parameters import Reduced
from _hessian.state import State
from _hessian.trace import Traced


class GraphProgram(NamedTuple):
    """A network at one batch: all that its Hessian is made of."""

    operations: list[Operation]
    parameters: dict[str, int]  # trainable ones and their sizes, in the order of the flat vectors
    output: Value
    loss_hessian: Tensor  # (N, C, C) Λ, C the outputs of a sample
    eliminated: list[list[Value]]  # by operation: the parameters that are eliminated once it is
    state_damping: float = 0.0  # μ/N, added to the curvature in the outputs of affine operations but the last

    @property
    def reduced(self) -> list[Reduced]:
        return [x.reduced for x in self.affine if x.reduced is not None]

    @property
    def affine(self) -> list[Affine]:
        return [x for x in self.operations if isinstance(x, Affine)]

    def in_float32(self) -> GraphProgram:
        operations = [operation.in_float32() for operation in self.operations]
        return self._replace(operations=operations, loss_hessian=self.loss_hessian.float())

    def start(self) -> State:
        """The state above all operations."""
        N, C = self.loss_hessian.shape[:2]
        P = self.loss_hessian.new_zeros(N, C, N, C)
        P.diagonal(dim1=0, dim2=2).copy_(self.loss_hessian.permute(1, 2, 0))
        state = State(self.loss_hessian, [self.output])
        state.add(self.output, self.output, P.view(N * C, N * C))
        return state

    def state_charge(self, operation: Operation) -> float:
        """What state damping adds to the curvature in its output."""
        return self.state_damping if isinstance(operation, Affine) and operation.output != self.output else 0.0

    def values(self) -> dict[Value, list[str]]:
        """The parameters as values, and the names that each holds."""
        own = {x.own: x.parameters for x in self.affine}
        return {value: own.get(value, [value.name]) for values in self.eliminated for value in values}

    def split(self, v: Tensor) -> tuple[list[Tensor], dict[Value, Tensor]]:
        """v (P, k) as blocks (g G, k, a, d) of `reduced`, and −v (k, n) of the other parameters."""
        pieces = dict(zip(self.parameters, v.mT.split(list(self.parameters.values()), 1), strict=True))  # (k, ·) each
        blocks = [x.block([pieces[name] for name in x.parameters]) for x in self.affine if x.own is not None]
        others = {value: -pieces[value.name] for value in self.values() if value.name in pieces}
        return [x.transpose(0, 1) for x in blocks], others

    def join(self, X: Sequence[Tensor], t: Mapping[Value, Tensor]) -> Tensor:
        """The inverse: x (P, k) from its blocks, and the changes t of the other parameters."""
        found = {value.name: x for value, x in t.items() if value.name in self.parameters}
        for operation, block in zip([x for x in self.affine if x.own is not None], X, strict=True):
            found |= dict(zip(operation.parameters, operation.pieces(block.transpose(0, 1)), strict=True))
        return torch.cat([found[name] for name in self.parameters], 1).mT


def elimination_points(operations: Sequence[Operation], output: Value, parameters: set[Value]) -> list[list[Value]]:
    """When to eliminate each parameter: after the operation that uses it first; or after one before that, if fewer
    numbers are live then, with its own parameters, and at no time between are there more. Large ones first."""
    first_use: dict[Value, int] = {}
    for index, operation in enumerate(operations):
        for value in parameters.intersection(operation.inputs):
            first_use.setdefault(value, index)
    sizes, live = [0] * len(operations), {output}  # of the live values but parameters, once an operation is eliminated
    for index in reversed(range(len(operations))):
        live = (live - {operations[index].output}) | (set(operations[index].inputs) - parameters)
        sizes[index] = sum(value.size for value in live)
    points: list[list[Value]] = [[] for _ in operations]
    for value, index in first_use.items():
        best, least, others = index, sizes[index], 0
        for i in reversed(range(index)):
            others += sum(x.size for x in parameters.intersection(operations[i].inputs))
            if sizes[i] + others > least:
                break
            if sizes[i] + others < least:
                best, least = i, sizes[i] + others
        points[best].append(value)
    return [sorted(values, key=lambda value: -value.size) for values in points]


def make_program(
    traced: Traced,
    inputs: Sequence[Tensor],
    trainable: Mapping[str, int],
    loss: Callable[[Tensor], Tensor],
    gauss_newton: bool,
    separate_biases: bool = False,
    closed_forms: ClosedForms = MappingProxyType({}),
) -> tuple[GraphProgram, Builder]:
    """loss: outputs (N, …) ↦ the mean loss, in float64. trainable: names and sizes of the parameters.

    Raises ArithmeticError where torch's derivatives of an operation, under vmap, are not those of a double backward.
    """
    builder = Builder(traced, inputs, list(trainable), tuple(closed_forms))
    graph = builder.build(separate_biases)
    betas = builder.adjoints(loss)
    operations: list[Operation] = []
    for node in graph.operations:
        beta = betas[node.output]
        beta = torch.zeros_like(beta) if gauss_newton else beta
        if isinstance(node, AffineNode):
            operations.append(Affine(node, beta))
        else:
            operations.append(linearize(node, [graph.tensors[x] for x in node.inputs], beta, closed_forms))
    outputs = graph.tensors[graph.output]
    parameters = {
        value for x in operations for value in x.inputs if value.batch_dim is None and value.name in trainable
    }
    parameters |= {x.own for x in operations if isinstance(x, Affine) and x.own is not None}
    points = elimination_points(operations, graph.output, parameters)
    program = GraphProgram(operations, dict(trainable), graph.output, loss_hessian(loss, outputs), points)
    return program, builder


def loss_hessian(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Λ (N, C, C), C the numbers that the network returns for a sample. ValueError for a loss that couples samples."""
    N = len(outputs)
    C = outputs.numel() // N
    second = transposed_jacobian(torch.func.grad(loss), [outputs])
    unit = torch.eye(C, dtype=outputs.dtype, device=outputs.device)[:, None].expand(C, N, C)
    rows = torch.func.vmap(lambda c: second(c)[0], chunk_size=256)(unit.reshape(C, *outputs.shape))
    v = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=outputs.dtype).to(outputs.device)
    index = torch.arange(N, device=outputs.device)
    for bit in range((N - 1).bit_length()):  # any two samples differ in a bit of their index
        chosen = (index >> bit) % 2 == 1
        if bool(second(v * chosen.view(N, *(1,) * (v.dim() - 1)))[0][~chosen].any()):
            raise ValueError(
                "the loss of a sample depends on the outputs of other samples, which elimination does not allow: take "
                "a loss of single samples, or route='dense'"
            )
    return rows.reshape(C, N, C).transpose(0, 1)


class Products:
    """H v or JᵀΛJ v by double backward of the network itself: no graph of operations, no vmap. So a wrong derivative of
    an operation shows in the residual of a solve."""

    def __init__(self, net: nn.Module, inputs: Sequence[Tensor], loss: Callable[[Tensor], Tensor], gauss_newton: bool):
        self._parameters = [p for p in net.parameters() if p.requires_grad]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the CPU's flash kernel has no second derivative
            outputs = net(*inputs)
            total = loss(outputs)
            names = [name for name, p in net.named_parameters() if p.requires_grad]
            used = torch.autograd.grad(total, self._parameters, retain_graph=True, allow_unused=True)
            check_used([name for name, g in zip(names, used, strict=True) if g is None])
            self._map = _JacobianProducts(outputs, self._parameters) if gauss_newton else None
            self._of = [outputs] if gauss_newton else self._parameters
            self._gradient = torch.autograd.grad(total, self._of, create_graph=True, allow_unused=True)

    def __call__(self, v: Tensor) -> Tensor:
        """For v (P, k)."""
        return torch.stack([self._one(column) for column in v.mT], 1) if v.shape[1] else v

    def together(self, v: Tensor) -> Tensor:
        """The same under vmap, where torch has derivatives that are wrong: to be checked."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(self._one, 1, 1)(v)

    def _one(self, v: Tensor) -> Tensor:
        if self._map is not None:
            (tangent,) = _second(self._gradient, [self._map.forward(v)], self._of)
            return self._map.transpose(tangent)
        pieces = v.split([p.numel() for p in self._parameters])
        return _flat(_second(self._gradient, pieces, self._parameters))


class StateProducts:
    """Σ SᵀS v over the affine operations but the last, S v their outputs' change along v."""

    def __init__(self, builder: Builder, program: GraphProgram):
        charged = {x.output for x in program.operations if isinstance(x, Affine)} - {program.output}
        of = {builder.names[name]: p for name, p in builder.traced.named_parameters(remove_duplicate=False)}
        parameters = [of[name] for name in program.parameters]
        with torch.enable_grad():
            self._maps = [_JacobianProducts(x, parameters) for x in builder.with_graph(charged)]

    def __call__(self, v: Tensor) -> Tensor:
        columns = [sum((m.transpose(m.forward(c)) for m in self._maps), torch.zeros_like(c)) for c in v.mT]
        return torch.stack(columns, 1)


class _JacobianProducts:
    """J v and Jᵀw of outputs in the parameters; J v as the derivative of Jᵀw in w."""

    def __init__(self, outputs: Tensor, parameters: Sequence[Tensor]):
        self._outputs, self._parameters = outputs, parameters
        self._weights = torch.zeros_like(outputs, requires_grad=True)
        self._product = torch.autograd.grad(outputs, parameters, self._weights, create_graph=True, allow_unused=True)

    def forward(self, v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in self._parameters])
        return _second(self._product, pieces, [self._weights])[0]

    def transpose(self, w: Tensor) -> Tensor:
        found = torch.autograd.grad(self._outputs, self._parameters, w, retain_graph=True, allow_unused=True)
        return _flat([torch.zeros_like(p) if g is None else g for g, p in zip(found, self._parameters, strict=True)])


def _second(gradient: Sequence[Tensor | None], directions: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of ⟨gradient, directions⟩; zeros where there is none."""
    pairs = [(g, d.view_as(g)) for g, d in zip(gradient, directions, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in of]
    found = torch.autograd.grad(
        [g for g, _ in pairs], list(of), [d for _, d in pairs], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, of, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])

"""Elimination on the graph: operation after operation in reverse, with the live values as the state.

At any cut between two operations, the live values are those made before it and used after it. P is the cost-to-go, a
quadratic in all of them. One operation o = f(u₁, u₂, …) is eliminated by

    P_iu += A_iᵀ P_ou      P_ij += A_iᵀ P_oo A_j + M_ij      for live u ≠ o.

Parameters are values too, in reduced coordinates where one operation has them for itself. A parameter y is eliminated
after its last operation in this order, or later, once fewer values are live (`elimination_points`):

    G = εI + P_yy      B = P_y·      P −= BᵀG⁻¹B.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.affine_operation import Affine
from _hessian.checkpoints import Checkpoints, Memory
from _hessian.graph import Value
from _hessian.layers import NotPositiveDefinite, SingularHessianError
from _hessian.operations import Elementwise, Operation
from _hessian.symmetric_factor import SymmetricFactor, factor_symmetric, mirror, subtract_gram_below


class Program(NamedTuple):
    """A network at one batch: all that its Hessian is made of."""

    operations: list[Operation]
    parameters: dict[str, int]  # trainable ones and their sizes, in the order of the flat vectors
    output: Value
    loss_hessian: Tensor  # (N, C, C) Λ, C the outputs of a sample
    eliminated: list[list[Value]]  # by operation: the parameters that are eliminated once it is
    state_charge: float = 0.0  # μ/N, added to the curvature in the outputs of affine operations but the last

    def in_float32(self) -> Program:
        operations = [operation.in_float32() for operation in self.operations]
        return self._replace(operations=operations, loss_hessian=self.loss_hessian.float())


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


class State:
    """P by blocks of two live values. A block of zeros may be absent."""

    def __init__(self) -> None:
        self.live: list[Value] = []
        self._blocks: dict[tuple[Value, Value], Tensor] = {}  # one of (u, v) and (v, u)

    def copied(self) -> State:
        twin = State()
        twin.live, twin._blocks = list(self.live), {key: block.clone() for key, block in self._blocks.items()}
        return twin

    def enter(self, value: Value) -> None:
        if value not in self.live:
            self.live.append(value)

    def get(self, u: Value, v: Value) -> Tensor | None:
        """(n_u, n_v)"""
        if (u, v) in self._blocks:
            return self._blocks[u, v]
        return self._blocks[v, u].mT if (v, u) in self._blocks else None

    def block(self, u: Value, v: Value, like: Tensor) -> Tensor:
        """(n_u, n_v), made if it is absent."""
        if (found := self.get(u, v)) is not None:
            return found
        return self._blocks.setdefault((u, v), like.new_zeros(u.size, v.size))

    def pop(self, u: Value, v: Value) -> Tensor | None:
        found = self.get(u, v)
        self._blocks.pop((u, v), None)
        self._blocks.pop((v, u), None)
        return found

    def add(self, u: Value, v: Value, part: Tensor) -> None:
        """part (n_u, n_v), which may be kept."""
        if (found := self.get(u, v)) is not None:
            found.add_(part)
        else:
            self._blocks[u, v] = part

    def add_both(self, u: Value, v: Value, part: Tensor) -> None:
        """part (n_u, n_v) as the quadratic 2 t_uᵀ part t_v."""
        self.add(u, v, part + part.mT if u == v else part)

    def take(self, value: Value) -> tuple[Tensor | None, dict[Value, Tensor]]:
        """A value leaves: its own block, and those (n_u, n_value) of the others."""
        own = self.pop(value, value)
        self.live.remove(value)
        found = {u: self.pop(u, value) for u in self.live}
        return own, {u: block for u, block in found.items() if block is not None}


class Pivot(NamedTuple):
    """A parameter eliminated: G = F Σ Fᵀ, ΣF⁻¹B over the values live then."""

    factor: SymmetricFactor
    coupling: Tensor  # (m, n)
    places: dict[Value, slice]  # in the columns of the coupling

    def on_disk(self) -> Pivot:
        factor = self.factor._replace(matrix=_mapped(self.factor.matrix))
        return self._replace(factor=factor, coupling=_mapped(self.coupling))

    def backward(self, q: Tensor) -> tuple[Tensor, dict[Value, Tensor]]:
        """From q (k, m): what `forward` needs, and BᵀG⁻¹q by values."""
        white = self.factor.whiten_vectors(q.contiguous())
        back = white @ self.coupling
        return self.factor.sign(white), {value: back[:, place] for value, place in self.places.items()}

    def forward(self, state: Tensor, tangents: Mapping[Value, Tensor]) -> Tensor:
        """−G⁻¹(q + B t) (k, m)."""
        e = -state
        for value, place in self.places.items():
            e = torch.addmm(e, tangents[value], self.coupling[:, place].mT, alpha=-1)
        return self.factor.unwhiten_vectors(e)


def _mapped(x: Tensor) -> Tensor:
    """x in a temporary file that is deleted with it, read as it is used."""
    if x.numel() < mmap.PAGESIZE:
        return x
    with tempfile.TemporaryFile() as file:
        x.numpy().tofile(file)
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


class Step(NamedTuple):
    """One operation eliminated, and the parameters after it."""

    operation: Operation
    pivots: list[tuple[Value, Pivot]]

    def on_disk(self) -> Step:
        return self._replace(pivots=[(value, pivot.on_disk()) for value, pivot in self.pivots])


class Count(NamedTuple):
    negative: int
    logabsdet: float


class GraphSweep:
    """H + diag(ε), factored by elimination on the graph.

    keep: what becomes of the pivots, as in `factorize_hessian`.
    starts: recompute them in each solve instead, from states kept above these operations.
    """

    def __init__(
        self,
        program: Program,
        epsilons: Mapping[str, float],
        *,
        definite_only: bool,
        keep: str,
        starts: Sequence[int] = (),
    ):
        self.program, self.epsilons, self._definite_only = program, epsilons, definite_only
        self._checkpoints = Checkpoints(self._eliminate, starts) if starts else None
        affine = [x for x in program.operations if isinstance(x, Affine)]
        self._named = {x.own: x.parameters[0] for x in affine if x.own is not None}  # which have one damping
        self._steps: list[Step] = []  # last operation first
        self.num_negative, self.logabsdet = 0, 0.0
        state = self._at_output()
        for index in reversed(range(len(program.operations))):
            if self._checkpoints is not None:
                self._checkpoints.keep(index, state)
            step, count, state = self._eliminate(index, state)
            self.num_negative, self.logabsdet = self.num_negative + count.negative, self.logabsdet + count.logabsdet
            if keep != "inertia" and self._checkpoints is None:
                self._steps.append(step.on_disk() if keep == "disk" else step)
            del step  # its memory is free before the next one is made

    def _at_output(self) -> State:
        N, C = self.program.loss_hessian.shape[:2]
        P = self.program.loss_hessian.new_zeros(N, C, N, C)
        P.diagonal(dim1=0, dim2=2).copy_(self.program.loss_hessian.permute(1, 2, 0))
        state, output = State(), self.program.output
        state.enter(output)
        state.add(output, output, P.view(N * C, N * C))
        return state

    def _eliminate(self, index: int, state: State | None, memory: Memory | None = None) -> tuple[Step, Count, State]:
        """The operation, and the parameters after it. The state is changed in place."""
        assert state is not None
        operation, counts = self.program.operations[index], []
        self._eliminate_operation(operation, state)
        if isinstance(operation, Affine) and operation.own is not None:
            counts.append(self._eliminate_outside(operation, index, state))
        pivots = [(value, self._eliminate_parameter(value, state, index)) for value in self.program.eliminated[index]]
        counts += [Count(pivot.factor.num_negative, pivot.factor.logabsdet) for _, pivot in pivots]
        return (
            Step(operation, pivots),
            Count(sum(x.negative for x in counts), sum(x.logabsdet for x in counts)),
            state,
        )

    def _eliminate_operation(self, operation: Operation, state: State) -> None:
        o, inputs, zero = operation.output, operation.inputs, self.program.loss_hessian
        P, rows = state.take(o)
        for value in inputs:
            state.enter(value)
        if isinstance(operation, Affine) and o != self.program.output and self.program.state_charge:
            P = zero.new_zeros(o.size, o.size) if P is None else P
            P.diagonal().add_(self.program.state_charge)
        if isinstance(operation, Elementwise) and operation.is_plain:
            slope = operation.slopes[0]
            for u, block in rows.items():
                state.add_both(u, inputs[0], block.mul_(slope))
            if P is not None:
                state.add(inputs[0], inputs[0], P.mul_(slope).mul_(slope[:, None]))
        else:
            for u, block in rows.items():
                for value, part in zip(inputs, operation.pull_back(block), strict=True):
                    state.add_both(u, value, part)
            del rows
            if P is not None:
                self._pull_back_both(operation, P, state)
        operation.add_curvature(lambda i, j: state.block(inputs[i], inputs[j], zero))

    def _pull_back_both(self, operation: Operation, P: Tensor, state: State) -> None:
        """A_iᵀ P A_j for all inputs."""
        inputs, count = operation.inputs, len(operation.inputs)
        own = operation.own if isinstance(operation, Affine) else None
        if isinstance(operation, Affine) and own is not None:
            count -= 1
            PJ = operation.to_parameters(operation.to_rows(P))
            state.add(own, own, operation.to_parameters_from_left(PJ))
            del PJ
        for i, part in enumerate(operation.pull_back(P, slice(count))):
            if isinstance(operation, Affine) and own is not None:
                state.add(own, inputs[i], operation.to_parameters_from_left(part))
            blocks = operation.pull_back(part.mT.contiguous(), slice(i, count))
            for value, block in zip(inputs[i:], blocks, strict=False):
                state.add(inputs[i], value, block)

    # pivots

    def _eliminate_outside(self, operation: Affine, index: int, state: State) -> Count:
        """X⊥, in closed form."""
        outside, epsilon = operation.num_outside(), self.epsilons[operation.parameters[0]]
        if not outside:
            return Count(0, 0.0)
        if epsilon == 0:
            raise self._singular(operation.output.name, epsilon, "some weights don't act on this batch")
        if self._definite_only and epsilon < 0:
            raise NotPositiveDefinite(index)
        if operation.couples and operation.z is not None:
            operation.subtract_outside(state.block(operation.z, operation.z, operation.adjoint), epsilon)
        return Count(outside if epsilon < 0 else 0, outside * math.log(abs(epsilon)))

    def _epsilon(self, value: Value) -> float:
        return self.epsilons[self._named.get(value, value.name)]

    def _eliminate_parameter(self, value: Value, state: State, index: int) -> Pivot:
        epsilon, zero = self._epsilon(value), self.program.loss_hessian
        G, coupled = state.take(value)
        G = zero.new_zeros(value.size, value.size) if G is None else G.contiguous()
        G.diagonal().add_(epsilon)
        factor = factor_symmetric(G, epsilon, definite_only=self._definite_only)
        if factor is None and self._definite_only:
            raise NotPositiveDefinite(index)
        if factor is None or not math.isfinite(factor.logabsdet):
            raise self._singular(value.name, epsilon, "its pivot is singular, or overflowed")
        W, places = zero.new_empty(value.size, sum(u.size for u in coupled)), {}
        stop = 0
        for u, block in coupled.items():
            places[u] = slice(stop, stop := stop + u.size)
            W[:, places[u]] = block.mT
        del coupled
        if places:
            W = self._subtract(factor.whiten(W), factor.signs, places, state)
        return Pivot(factor, W, places)

    def _subtract(self, W: Tensor, signs: Tensor | None, places: Mapping[Value, slice], state: State) -> Tensor:
        """P −= WᵀΣW in the live values. Returns ΣW."""
        for i, (u, of_u) in enumerate(places.items()):
            P = state.block(u, u, W)
            subtract_gram_below(P, W[:, of_u], signs)
            mirror(P)
            signed = W[:, of_u] if signs is None else signs * W[:, of_u]
            for v in list(places)[:i]:
                state.block(u, v, W).addmm_(signed.mT, W[:, places[v]], alpha=-1)
        return W if signs is None else W.mul_(signs)

    def _singular(self, name: str, epsilon: float, why: str) -> SingularHessianError:
        return SingularHessianError(
            f"H + damping·I is singular at {name}, damping {epsilon:g}: {why}. Choose a larger damping", damping=epsilon
        )

    # solves

    def _downward(self) -> Iterator[Step]:
        return iter(self._steps) if self._checkpoints is None else self._checkpoints.downward()

    def _upward(self) -> Iterator[Step]:
        return reversed(self._steps) if self._checkpoints is None else self._checkpoints.upward()

    def solve(self, v: Tensor) -> Tensor:
        """(H + diag(ε))⁻¹ v for v (P, k)."""
        sizes = self.program.parameters
        pieces = dict(zip(sizes, v.mT.split(list(sizes.values()), 1), strict=True))  # (k, ·) each
        p: dict[Value, Tensor] = {}  # slopes of the cost-to-go at 0, by live values
        outside: dict[Value, Tensor | None] = {}  # V⊥
        states: dict[Value, Tensor] = {}
        for step in self._downward():
            operation = step.operation
            p_o = p.pop(operation.output, None)
            if p_o is not None:
                for value, part in zip(operation.inputs, operation.pull_back(p_o), strict=True):
                    _add(p, value, part)
            if isinstance(operation, Affine) and operation.own is not None:
                V = operation.block([pieces[name] for name in operation.parameters])  # (k, G, a, d)
                pieces[operation.own.name], free = split_right_hand_side(operation, V)
                outside[operation.own] = free
                if free is not None and operation.couples and operation.z is not None:
                    pull = operation.fold(operation.adjoint @ free[..., : operation.width])
                    _add(p, operation.z, pull / self._epsilon(operation.own))
            for value, pivot in step.pivots:
                q = p.pop(value) - pieces[value.name] if value in p else -pieces[value.name]
                states[value], back = pivot.backward(q)
                for other, part in back.items():
                    _add(p, other, -part)
        return self._roll_out(states, outside)

    def _roll_out(self, states: Mapping[Value, Tensor], outside: Mapping[Value, Tensor | None]) -> Tensor:
        t: dict[Value, Tensor] = {}
        for step in self._upward():
            operation = step.operation
            for value, pivot in reversed(step.pivots):
                t[value] = pivot.forward(states[value], t)
            t[operation.output] = operation.push_forward([t[value] for value in operation.inputs])
        found = {value.name: x for value, x in t.items() if value.name in self.program.parameters}
        for operation in self.program.operations:
            if isinstance(operation, Affine) and operation.own is not None:
                X = _assemble_solution(operation, t, outside[operation.own], self._epsilon(operation.own))
                found |= dict(zip(operation.parameters, operation.pieces(X), strict=True))
        return torch.cat([found[name] for name in self.program.parameters], 1).mT


def _add(p: dict[Value, Tensor], value: Value, part: Tensor) -> None:
    p[value] = p[value] + part if value in p else part


def split_right_hand_side(operation: Affine, V: Tensor) -> tuple[Tensor, Tensor | None]:
    """For V (k, G, a, d): (V Q)ᵀ as (k, m), and V⊥ (k, G, a, d) or None for 0."""
    if operation.Q is None:
        return V.mT.flatten(1), None
    within = V @ operation.Q
    return within.mT.flatten(1), V - within @ operation.Q.mT


def _assemble_solution(operation: Affine, t: Mapping[Value, Tensor], outside: Tensor | None, epsilon: float) -> Tensor:
    """X = Y Qᵀ + X⊥ (k, G, a, d)."""
    assert operation.R is not None and operation.own is not None
    Y = t[operation.own].unflatten(1, (operation.groups, operation.R.shape[2], -1)).mT  # (k, G, a, r)
    if operation.Q is None or outside is None:
        return Y
    if operation.couples and operation.z is not None:
        coupled = operation.adjoint.mT @ operation.unfold_tangent(t[operation.z])  # (k, G, a, width)
        outside = outside + coupled @ operation.Q[:, : operation.width] @ operation.Q.mT
        outside[..., : operation.width] -= coupled
    return Y @ operation.Q.mT + outside / epsilon

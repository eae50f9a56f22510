"""Elimination on the graph: operation after operation in reverse, with the live values as the state.

At any cut between two operations, the live values are those made before it and used after it. P is the cost-to-go, a
quadratic in all of them. One operation o = f(u₁, u₂, …) is eliminated by

    P_iu += A_iᵀ P_ou      P_ij += A_iᵀ P_oo A_j + M_ij      for live u ≠ o

and an affine operation's own parameters, or a parameter at its first use, by

    G = εI + JᵀP_oo J      B = JᵀP_o· (and S)      P −= BᵀG⁻¹B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.costs import factor_operations
from _hessian.graph import Value
from _hessian.layers import NotPositiveDefinite, SingularHessianError
from _hessian.operations import Affine, Elementwise, Operation
from _hessian.symmetric_factor import BLOCK, SymmetricFactor, factor_symmetric, mirror, subtract_gram


class Program(NamedTuple):
    """A network at one batch: all that its Hessian is made of."""

    operations: list[Operation]
    parameters: dict[str, int]  # trainable ones and their sizes, in the order of the flat vectors
    output: Value
    loss_hessian: Tensor  # (N, C, C) Λ, C the outputs of a sample
    born: list[list[Value]]  # parameters that are values, by the operation that uses each of them first
    state_charge: float = 0.0  # μ/N, added to the curvature in the outputs of affine operations but the last

    def cost(self) -> tuple[float, float]:
        """Floating-point operations of the elimination, to leading order, and the numbers at its peak."""
        live = {self.output: self.output.size}
        operations, kept, peak = 0.0, 0.0, 0.0
        for operation, born in zip(reversed(self.operations), reversed(self.born), strict=True):
            o = live.pop(operation.output, 0)
            if not o:
                continue
            n = sum(live.values())
            live |= {value: value.size for value in operation.inputs}
            inputs, after = sum(value.size for value in operation.inputs), sum(live.values())
            operations += 2 * operation.pull_back_cost * (n + o + inputs)
            kept += operation.numbers
            peak = max(peak, kept + 2 * max(n + o, after) ** 2)
            pivots = []
            if isinstance(operation, Affine) and operation.size:
                pivots = [operation.size]
                operations += 2 * operation.size * len(operation.adjoint[0]) * (n + o + operation.size)
            for m in pivots + [value.size for value in born]:
                operations += factor_operations(m) + (m + min(BLOCK, m)) * m * after + (after + BLOCK) * m * after
                kept += m * m + m * after
            for value in born:
                live.pop(value)
        return operations, max(peak, kept)


class State:
    """P over the live values."""

    def __init__(self, value: Value, P: Tensor):
        self.P = P
        self.places = {value: slice(0, value.size)}

    def replace(self, removed: Value, added: Iterable[Value]) -> None:
        """Take out one value, and add those of the others that are not live, with rows and columns of zeros."""
        P, places = self.P, self.places
        kept = [value for value in places if value != removed]
        new = [value for value in added if value not in places]
        stop, self.places = 0, {}
        for value in kept + new:
            self.places[value] = slice(stop, stop + value.size)
            stop += value.size
        self.P = P.new_zeros(stop, stop)
        for u in kept:
            for v in kept:
                self.P[self.places[u], self.places[v]] = P[places[u], places[v]]

    def block(self, u: Value, v: Value) -> Tensor:
        return self.P[self.places[u], self.places[v]]

    def scale(self, output: Value, value: Value, slope: Tensor, second: Tensor) -> None:
        """The output's place becomes that of the value it is an elementwise function of: φ′P φ′ + diag(β φ″)."""
        place = self.places.pop(output)
        self.places[value] = place
        self.P[:, place] *= slope
        self.P[place] *= slope[:, None]
        self.block(value, value).diagonal().add_(second)


class Pivot(NamedTuple):
    """Parameters eliminated at one place: G = F Σ Fᵀ, ΣF⁻¹B over the values live then."""

    factor: SymmetricFactor
    coupling: Tensor  # (m, n)
    places: dict[Value, slice]  # in the columns of the coupling

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


class Step(NamedTuple):
    """One operation eliminated."""

    operation: Operation
    own: Pivot | None  # of an affine operation's own parameters
    born: list[tuple[Value, Pivot]]  # of parameters first used here


class GraphSweep:
    """H + diag(ε), factored by elimination on the graph."""

    def __init__(self, program: Program, epsilons: Mapping[str, float], *, definite_only: bool, solvable: bool):
        self.program, self.epsilons, self.definite_only = program, epsilons, definite_only
        self.num_negative, self.logabsdet = 0, 0.0
        self.steps: list[Step] = []  # in reverse order
        N, C = program.loss_hessian.shape[:2]
        P = program.loss_hessian.new_zeros(N, C, N, C)
        P.diagonal(dim1=0, dim2=2).copy_(program.loss_hessian.permute(1, 2, 0))
        state = State(program.output, P.view(N * C, N * C))
        for index in range(len(program.operations) - 1, -1, -1):
            if program.operations[index].output in state.places:
                step = self._eliminate(index, state)
                if solvable:
                    self.steps.append(step)

    def _eliminate(self, index: int, state: State) -> Step:
        operation, own = self.program.operations[index], None
        o = operation.output
        live = [value for value in state.places if value != o]
        if isinstance(operation, Affine) and o != self.program.output:
            state.block(o, o).diagonal().add_(self.program.state_charge)
        if isinstance(operation, Elementwise) and operation.is_plain and operation.inputs[0] not in state.places:
            state.scale(o, operation.inputs[0], operation.slopes[0], operation.second[0][0])
            return Step(operation, None, [])
        columns = state.P[:, state.places[o]]
        JK = G = None
        if isinstance(operation, Affine) and operation.size:
            JK = operation.to_parameters(columns)  # (n, m) rows are live values
            G = operation.to_parameters(JK[state.places[o]].mT.contiguous())
        pulled = operation.pull_back(columns)
        places = state.places
        state.replace(o, operation.inputs)
        for value, block in zip(operation.inputs, pulled, strict=True):
            for u in live:
                part = block[places[u]]  # (n_u, n_i)
                state.block(u, value).add_(part)
                state.block(value, u).add_(part.mT)
            again = operation.pull_back(block[places[o]].mT.contiguous())
            for other, part in zip(operation.inputs, again, strict=True):
                state.block(value, other).add_(part)
        operation.add_curvature(lambda i, j: state.block(operation.inputs[i], operation.inputs[j]))
        if JK is not None and G is not None and isinstance(operation, Affine):
            own = self._eliminate_own(operation, index, state, live, places, JK, G)
        born = [(value, self._eliminate_value(value, index, state)) for value in self.program.born[index]]
        return Step(operation, own, born)

    def _eliminate_own(
        self,
        operation: Affine,
        index: int,
        state: State,
        live: Sequence[Value],
        places: Mapping[Value, slice],
        JK: Tensor,
        G: Tensor,
    ) -> Pivot:
        epsilon = self._epsilon(operation.parameters)
        G.diagonal().add_(epsilon)
        B = G.new_zeros(len(G), len(state.P))
        for u in live:
            B[:, state.places[u]] += JK[places[u]].mT
        of_output = JK[places[operation.output]].mT.contiguous()
        for value, block in zip(operation.inputs, operation.pull_back(of_output), strict=True):
            B[:, state.places[value]] += block
        if operation.couples and operation.z is not None:
            B[:, state.places[operation.z]] += operation.coupling()
        pivot = self._pivot(operation.output.name, G, B, epsilon, state)
        outside = operation.num_outside()
        if outside:
            if epsilon == 0:
                raise self._singular(operation.output.name, epsilon, "some weights don't act on this batch")
            self.num_negative += outside if epsilon < 0 else 0
            self.logabsdet += outside * math.log(abs(epsilon))
            if self.definite_only and epsilon < 0:
                raise NotPositiveDefinite(index)
            if operation.z is not None:
                operation.subtract_outside(state.block(operation.z, operation.z), epsilon)
        return pivot

    def _eliminate_value(self, value: Value, index: int, state: State) -> Pivot:
        epsilon = self._epsilon([value.name])
        G, places = state.block(value, value).clone(), state.places
        G.diagonal().add_(epsilon)
        rows = state.P[places[value]]
        kept = [u for u in places if u != value]
        B = torch.cat([rows[:, places[u]] for u in kept], 1) if kept else rows.new_empty(len(G), 0)
        state.replace(value, ())
        return self._pivot(value.name, G, B.contiguous(), epsilon, state)

    def _epsilon(self, names: Sequence[str]) -> float:
        return self.epsilons[names[0]]

    def _pivot(self, name: str, G: Tensor, B: Tensor, epsilon: float, state: State) -> Pivot:
        factor = factor_symmetric(G, epsilon, definite_only=self.definite_only)
        if factor is None and self.definite_only:
            raise NotPositiveDefinite(0)
        if factor is None or not math.isfinite(factor.logabsdet):
            raise self._singular(name, epsilon, "its pivot is singular, or overflowed")
        self.num_negative += factor.num_negative
        self.logabsdet += factor.logabsdet
        W = factor.whiten(B) if B.shape[1] else B
        if B.shape[1]:
            W = subtract_gram(state.P, W, factor.signs)
            mirror(state.P)
        return Pivot(factor, W, dict(state.places))

    def _singular(self, name: str, epsilon: float, why: str) -> SingularHessianError:
        return SingularHessianError(
            f"H + damping·I is singular at {name}, damping {epsilon:g}: {why}. Choose a larger damping", damping=epsilon
        )

    # solves

    def solve(self, v: Tensor) -> Tensor:
        """(H + diag(ε))⁻¹ v for v (P, k)."""
        sizes = self.program.parameters
        pieces = dict(zip(sizes, v.mT.split(list(sizes.values()), 1), strict=True))  # (k, ·) each
        p: dict[Value, Tensor] = {}  # slopes of the cost-to-go at 0, by live values
        states: list[tuple[Tensor | None, Tensor | None, list[Tensor]]] = []
        for step in self.steps:
            operation, own = step.operation, None
            p_o = p.pop(operation.output, None)
            outside = None
            if p_o is not None:
                for value, part in zip(operation.inputs, operation.pull_back(p_o), strict=True):
                    _add(p, value, part)
            if step.own is not None and isinstance(operation, Affine):
                V = operation.block([pieces[name] for name in operation.parameters])  # (k, G, a, d)
                inside, outside = _split_right_hand_side(operation, V)
                q = -inside if p_o is None else operation.to_parameters(p_o) - inside
                own, back = step.own.backward(q)
                for value, part in back.items():
                    _add(p, value, -part)
                if outside is not None and operation.couples and operation.z is not None:
                    pull = operation.fold(operation.adjoint @ outside[..., : operation.width])
                    _add(p, operation.z, pull / self._epsilon(operation.parameters))
            born = []
            for value, pivot in step.born:
                p_v = p.pop(value, None)
                state, back = pivot.backward(-pieces[value.name] if p_v is None else p_v - pieces[value.name])
                born.append(state)
                for other, part in back.items():
                    _add(p, other, -part)
            states.append((own, outside, born))
        return self._roll_out(states, v)

    def _roll_out(self, states: Sequence[tuple[Tensor | None, Tensor | None, list[Tensor]]], v: Tensor) -> Tensor:
        t: dict[Value, Tensor] = {}
        found: dict[str, Tensor] = {}
        for step, (own, outside, born) in zip(reversed(self.steps), reversed(states), strict=True):
            operation = step.operation
            for (value, pivot), state in zip(reversed(step.born), reversed(born), strict=True):
                t[value] = found[value.name] = pivot.forward(state, t)
            tangents = [t[value] for value in operation.inputs]
            out = operation.push_forward(tangents) if tangents else v.new_zeros(v.shape[1], operation.output.size)
            if step.own is not None and own is not None and isinstance(operation, Affine):
                y = step.own.forward(own, t)
                out = out + operation.from_parameters(y)
                X = _assemble_solution(operation, y, outside, t, self._epsilon(operation.parameters))
                found |= dict(zip(operation.parameters, operation.pieces(X), strict=True))
            t[operation.output] = out
        return torch.cat([found[name] for name in self.program.parameters], 1).mT


def _add(p: dict[Value, Tensor], value: Value, part: Tensor) -> None:
    p[value] = p[value] + part if value in p else part


def _split_right_hand_side(operation: Affine, V: Tensor) -> tuple[Tensor, Tensor | None]:
    """For V (k, G, a, d): (V Q)ᵀ as (k, m), and V⊥ (k, G, a, d) or None for 0."""
    if operation.Q is None:
        return V.mT.flatten(1), None
    within = V @ operation.Q
    return within.mT.flatten(1), V - within @ operation.Q.mT


def _assemble_solution(
    operation: Affine, y: Tensor, outside: Tensor | None, t: Mapping[Value, Tensor], epsilon: float
) -> Tensor:
    """X = Y Qᵀ + X⊥ (k, G, a, d)."""
    assert operation.R is not None
    Y = y.unflatten(1, (operation.groups, operation.R.shape[2], -1)).mT  # (k, G, a, r)
    if operation.Q is None or outside is None:
        return Y
    if operation.couples and operation.z is not None:
        coupled = operation.adjoint.mT @ operation.unfold_tangent(t[operation.z])  # (k, G, a, width)
        outside = outside + coupled @ operation.Q[:, : operation.width] @ operation.Q.mT
        outside[..., : operation.width] -= coupled
    return Y @ operation.Q.mT + outside / epsilon

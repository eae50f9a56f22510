"""Elimination: operation after operation in reverse, with the live values as the state.

At any cut between two operations, the live values are those made before it and used after it. P is the cost-to-go, a
quadratic in all of them. One operation o = f(u₁, u₂, …) is eliminated by

    P_iu += A_iᵀ P_ou      P_ij += A_iᵀ P_oo A_j + M_ij      for live u ≠ o.

Parameters are values too, in reduced coordinates where one operation has them for itself. A parameter y is eliminated
with its last operation in this order, or later, once fewer values are live:

    G = εI + P_yy      B = P_y·      P −= BᵀG⁻¹B.

A solve goes through the same operations downward, for the slopes p of the cost-to-go at 0, and then upward, for the
changes t of all values. A chain of layers is the simplest case: one value is live.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.carried_pivots import Carried, CarriedOutside, carry
from _hessian.chain import ChainProgram
from _hessian.checkpoints import Checkpoints, Memory
from _hessian.graph import Value
from _hessian.layers import NotPositiveDefinite
from _hessian.operations import Count, Operation, Pivot
from _hessian.program import GraphProgram
from _hessian.state import State
from _hessian.symmetric_factor import SymmetricFactor, factor_symmetric, mirror, subtract_gram_below

Program = ChainProgram | GraphProgram


class DensePivot(NamedTuple):
    """G = F Σ Fᵀ of a parameter and what was carried to it, and ΣF⁻¹B by the values live then."""

    values: tuple[Value, ...]
    factor: SymmetricFactor
    couplings: dict[Value, Tensor]  # (m, n_u), the carried rows of it zero
    carried: Carried | None

    def on_disk(self) -> DensePivot:
        factor = self.factor._replace(matrix=_mapped(self.factor.matrix))
        return self._replace(factor=factor, couplings={u: _mapped(x) for u, x in self.couplings.items()})

    def backward(self, q: Tensor) -> tuple[Tensor, dict[Value, Tensor]]:
        white = self.factor.whiten_vectors(q)
        back = {} if self.carried is None else {self.carried.value: -self.carried.take_linear_terms(white)}
        for value, coupling in self.couplings.items():
            back[value] = white @ coupling
        return self.factor.sign(white), back

    def forward(self, state: Tensor, t: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        e, sign = state, -1.0
        for value, coupling in self.couplings.items():
            e, sign = torch.addmm(e, t[value], coupling.mT, beta=sign, alpha=-1), 1.0
        e = -e if sign < 0 else e
        if self.carried is not None:
            self.carried.insert(e, t)
        y = self.factor.unwhiten_vectors(e)
        if len(self.values) == 1:
            return {self.values[0]: y}
        return dict(zip(self.values, y.split([value.size for value in self.values], 1), strict=True))


def _mapped(x: Tensor) -> Tensor:
    """x in a temporary file that is deleted with it, read as it is used."""
    if x.numel() < mmap.PAGESIZE:
        return x
    with tempfile.TemporaryFile() as file:
        x.contiguous().numpy().tofile(file)
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


class Step(NamedTuple):
    """One operation eliminated, and parameters after it."""

    operation: Operation
    pivots: list[Pivot]
    outside: CarriedOutside | None

    def on_disk(self) -> Step:
        return self._replace(pivots=[x.on_disk() if isinstance(x, DensePivot) else x for x in self.pivots])


class Sweep:
    """H + diag(ε), factored by elimination: its counts, and its pivots for solves.

    epsilons: of each parameter. definite_only: raise NotPositiveDefinite at the first operation whose pivots are not.
    keep: what becomes of the pivots, as in `factorize_hessian`.
    starts: recompute them in each solve instead, from states kept above these operations.
    """

    def __init__(
        self,
        program: Program,
        epsilons: Mapping[Value, float],
        *,
        definite_only: bool = False,
        keep: str = "solve",
        starts: Sequence[int] = (),
    ):
        self.program, self.epsilons, self._definite_only = program, epsilons, definite_only
        # what torch does beside the arithmetic is a third of a small network's time; a graph needs autograd
        self._mode = torch.inference_mode if isinstance(program, ChainProgram) else torch.no_grad
        self._checkpoints = Checkpoints(starts) if starts else None
        self._steps: list[Step] = []  # last operation first
        self.num_negative, self.logabsdet = 0, 0.0
        keeps = keep != "inertia" and self._checkpoints is None
        with self._mode():
            memory, state = Memory(None if keeps else 1), program.start()
            for index in reversed(range(len(program.operations))):
                if self._checkpoints is not None:
                    self._checkpoints.keep(index, state)
                step, count, state = self._eliminate(index, state, memory)
                self.num_negative, self.logabsdet = self.num_negative + count.negative, self.logabsdet + count.logabsdet
                if keeps:
                    self._steps.append(step.on_disk() if keep == "disk" else step)
                del step  # or it would live on while the next one is made

    def _eliminate(self, index: int, state: State, memory: Memory) -> tuple[Step, Count, State]:
        """The operation, and parameters after it. The state is changed in place."""
        operation = self.program.operations[index]
        outside, epsilon = operation.num_outside, 0.0 if operation.own is None else self.epsilons[operation.own]
        if outside and epsilon == 0 and operation.own is not None:
            why = f"{outside} directions of its weights don't act on this batch"
            raise operation.singular(operation.own, epsilon, why)
        if charge := self.program.state_charge(operation):
            state.block(operation.output, operation.output).diagonal().add_(charge)
        operation.eliminate(state, memory)
        pivots, negative, logabsdet = [], 0, 0.0
        for value in self.program.eliminated[index]:
            pivot, count = self._eliminate_parameter(value, operation, state, index)
            pivots.append(pivot)
            negative, logabsdet = negative + count.negative, logabsdet + count.logabsdet
        carried = None
        if outside:
            carried = operation.eliminate_outside(epsilon, state)
            outside -= 0 if carried is None else carried.value.size
            negative, logabsdet = negative + outside * (epsilon < 0), logabsdet + outside * math.log(abs(epsilon))
        if self._definite_only and negative:
            raise NotPositiveDefinite(index)
        return Step(operation, pivots, carried), Count(negative, logabsdet), state

    def _eliminate_parameter(self, value: Value, operation: Operation, state: State, index: int) -> tuple[Pivot, Count]:
        """And with it what was carried."""
        epsilon = self.epsilons[value]
        structured = operation.structured_pivot(value, epsilon, state)
        if structured is not None:
            return structured
        values, state.carried = (value, *state.carried), []
        G, coupled = state.take(*values)
        G = state.like.new_zeros(value.size, value.size) if G is None else G.contiguous()
        (G[: value.size, : value.size] if values[1:] else G).diagonal().add_(epsilon)
        factor = factor_symmetric(G, epsilon, definite_only=self._definite_only, definite_first=state.definite)
        if factor is None and self._definite_only:
            raise NotPositiveDefinite(index)
        if factor is None or not math.isfinite(factor.logabsdet):
            raise operation.singular(value, epsilon, "its pivot is singular, or overflowed")
        negative, logabsdet, carried = factor.num_negative, factor.logabsdet, None
        state.definite = state.definite and negative == 0
        if not coupled:
            return DensePivot(values, factor, {}, None), Count(negative, logabsdet)
        W, places = _side_by_side(coupled)
        del coupled
        W = factor.whiten(W)
        found = None if operation.natural is None else carry(value.name, operation.natural, factor, W)
        if found is not None:  # its rows count with the next pivot
            carried, coupling, d = found
            state.carry(carried.value, torch.diag(d))
            for u, place in places.items():
                state.add(carried.value, u, coupling[:, place])
            negative, logabsdet = negative - int((d < 0).sum()), logabsdet - float(d.abs().log().sum())
        couplings = _subtract(W, factor.signs, places, state)
        return DensePivot(values, factor, couplings, carried), Count(negative, logabsdet)

    # solves

    def downward(self) -> Iterator[Step]:
        """Last operation first."""
        return iter(self._steps) if self._checkpoints is None else self._checkpoints.downward(self._eliminate)

    def upward(self) -> Iterator[Step]:
        """First operation first."""
        return reversed(self._steps) if self._checkpoints is None else self._checkpoints.upward(self._eliminate)

    def solve(self, v: Tensor) -> Tensor:
        """(H + diag(ε))⁻¹ v for v (P, k)."""
        with self._mode():
            x = self._solve(v)
        return x.clone()  # for use in an autograd graph

    def _solve(self, v: Tensor) -> Tensor:
        groups = self.program.reduced
        blocks, p = self.program.split(v)  # p: slopes of the cost-to-go at 0, by live values
        coupled: dict[Value, Tensor] = {}
        outside = [group.split(V, p, coupled) for group, V in zip(groups, blocks, strict=True)]
        del blocks
        states: list[Tensor] = []
        for step in self.downward():
            operation, own, z = step.operation, step.operation.own, step.operation.z
            p_o = p.pop(operation.output, None)
            if p_o is not None:
                for value, part in zip(operation.inputs, operation.pull_back(p_o), strict=True):
                    _add(p, value, part)
            for pivot in step.pivots:
                q = [p.pop(value) for value in pivot.values]
                state, back = pivot.backward(q[0] if len(q) == 1 else torch.cat(q, 1))
                states.append(state)
                for value, part in back.items():
                    _add(p, value, part, -1)
            if own is not None and z is not None and own in coupled:
                _add(p, z, coupled[own], 1 / self.epsilons[own])
                if step.outside is not None:
                    pairs = zip(groups, outside, strict=True)
                    (V,) = [x[group.own.index(own)] for group, x in pairs if x is not None and own in group.own]
                    pull, p[step.outside.value] = step.outside.split_right_hand_side(V)
                    _add(p, z, pull, -1 / self.epsilons[own])
        del pivot, step
        return self._roll_out(states, outside)

    def _roll_out(self, states: list[Tensor], outside: Sequence[Tensor | None]) -> Tensor:
        t: dict[Value, Tensor] = {}
        carried: dict[Value, CarriedOutside] = {}
        for step in self.upward():
            operation = step.operation
            for pivot in reversed(step.pivots):
                t |= pivot.forward(states.pop(), t)
            t[operation.output] = operation.push_forward([t[value] for value in operation.inputs])
            if step.outside is not None and operation.own is not None:
                carried[operation.own] = step.outside
        pairs = zip(self.program.reduced, outside, strict=True)
        return self.program.join([group.assemble(t, V, self.epsilons, carried) for group, V in pairs], t)


def _add(p: MutableMapping[Value, Tensor], value: Value, part: Tensor, factor: float = 1.0) -> None:
    """p[value] += factor · part"""
    if value in p:
        part = torch.add(p[value], part, alpha=factor)
    elif factor != 1:
        part = factor * part
    p[value] = part


def _side_by_side(blocks: Mapping[Value, Tensor]) -> tuple[Tensor, dict[Value, slice]]:
    """Blocks (m, n_u) as one matrix, and each block's columns."""
    if len(blocks) == 1:
        ((value, block),) = blocks.items()
        return block.contiguous(), {value: slice(None)}
    places, stop = {}, 0
    for value in blocks:
        places[value] = slice(stop, stop := stop + value.size)
    return torch.cat(list(blocks.values()), 1), places


def _subtract(W: Tensor, signs: Tensor | None, places: Mapping[Value, slice], state: State) -> dict[Value, Tensor]:
    """P −= WᵀΣW in the live values. Returns ΣW by values; W is overwritten."""
    parts = {value: W[:, place] if len(places) > 1 else W for value, place in places.items()}
    for i, (u, of_u) in enumerate(parts.items()):
        subtract_gram_below(P := state.block(u, u), of_u, signs)
        mirror(P)
        for v in list(parts)[:i]:
            signed = of_u if signs is None else signs * of_u
            state.block(u, v).addmm_(signed.mT, parts[v], alpha=-1)
    if signs is not None:
        W.mul_(signs)
    return parts

"""JᵀΛJ and Σ SᵀS as matrices: the changes of all activations along each parameter, pushed forward on the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.affine_operation import Affine
from _hessian.graph import Value
from _hessian.operations import Operation
from _hessian.program import GraphProgram

TANGENT_BYTES = 2**30  # matrices are formed this way within this, else column by column


class TangentCost(NamedTuple):
    operations: float
    bytes: float


def _parameters(operation: Operation, value: Value) -> list[str]:
    """Those that an input of the operation holds, if it is not an activation."""
    return operation.parameters if isinstance(operation, Affine) and value == operation.own else [value.name]


def _by_first_use(program: GraphProgram) -> dict[str, slice]:
    """Places of the parameters in the order of their first use."""
    names = [name for x in program.operations for value in x.inputs for name in _parameters(x, value)]
    places, stop = {}, 0
    for name in dict.fromkeys(name for name in names if name in program.parameters):
        places[name] = slice(stop, stop := stop + program.parameters[name])
    return places


def _own_tangents(operation: Operation, value: Value, program: GraphProgram) -> Iterator[tuple[str, Tensor]]:
    """The derivatives (k, n_value) of an input of the operation in each of the parameters that it holds."""
    names = _parameters(operation, value)
    sizes, like = [program.parameters[name] for name in names], program.loss_hessian
    pieces = torch.eye(sum(sizes), dtype=like.dtype, device=like.device).split(sizes, 1)
    tangents = pieces[0]
    if isinstance(operation, Affine) and value == operation.own and operation.reduced is not None:
        coordinates: dict[Value, Tensor] = {}
        operation.reduced.split(operation.block(pieces).transpose(0, 1), coordinates, {})
        tangents = -coordinates[value]
    return zip(names, tangents.split(sizes), strict=True)


def _tangents(program: GraphProgram) -> Iterator[tuple[Operation, Tensor]]:
    """Each operation, and the derivatives (k, n_o) of its output in the k parameters used so far, first use first."""
    places, known, k = _by_first_use(program), dict[Value, Tensor](), 0
    last_use = {value: index for index, x in enumerate(program.operations) for value in x.inputs}
    for index, operation in enumerate(program.operations):
        new = [value for value in operation.inputs if value not in known]
        k = max([k, *(places[name].stop for value in new for name in _parameters(operation, value))])
        arguments = []
        for value in operation.inputs:
            t = program.loss_hessian.new_zeros(k, value.size)
            if value in known:
                t[: len(known[value])] = known[value]
            else:
                for name, part in _own_tangents(operation, value, program):
                    t[places[name]] = part
            arguments.append(t)
        known[operation.output] = operation.push_forward(arguments)
        yield operation, known[operation.output]
        known = {value: t for value, t in known.items() if last_use.get(value, 0) > index}


def is_charged(operation: Operation, program: GraphProgram) -> bool:
    """Whether the state damping is on its output."""
    return isinstance(operation, Affine) and operation.output != program.output


def gauss_newton_and_state_matrix(program: GraphProgram, by_state: bool) -> tuple[Tensor, Tensor]:
    """JᵀΛJ (P, P), and Σ SᵀS (P, P), S the change of the outputs of the affine operations but the last.

    by_state: else the second is 0.
    """
    P, (N, C, _), places = sum(program.parameters.values()), program.loss_hessian.shape, _by_first_use(program)
    states = program.loss_hessian.new_zeros(P, P)
    for operation, t in _tangents(program):
        if by_state and is_charged(operation, program):
            states[: len(t), : len(t)].addmm_(t, t.mT)
    J = t  # of the output, which comes last
    scaled = (J.view(-1, N, C).transpose(0, 1) @ program.loss_hessian).transpose(0, 1)
    order = torch.cat([torch.arange(P, device=t.device)[places[name]] for name in program.parameters])
    return (J @ scaled.flatten(1).mT)[order[:, None], order], states[order[:, None], order]


def tangent_cost(program: GraphProgram, by_state: bool) -> TangentCost:
    P, charged = sum(program.parameters.values()), [x for x in program.operations if is_charged(x, program)]
    rows = program.output.size + sum(x.output.size for x in charged if by_state)
    forward = sum(x.pull_back_cost for x in program.operations)
    largest = max(x.output.size + sum(value.size for value in x.inputs) for x in program.operations)
    return TangentCost(2 * P * (forward + P * rows), 8 * P * 4 * largest)

"""An operation with dense derivatives: attention, norms, softmax, pooling, products of activations, …"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from scipy.sparse import bmat, coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from _hessian.graph import Region, Value, kind_of
from _hessian.operations import (
    ALL,
    CHUNK_BYTES,
    DERIVATIVE_RTOL,
    Blocks,
    Elementwise,
    Linear,
    OperationDerivatives,
    largest_error,
    total,
    transposed_jacobian,
)


class Split(NamedTuple):
    """A flat vector (n,) as K parts of c entries. Entries in no part are zero."""

    number: int  # K
    entries: Tensor | None = None  # (K, c) places in the flat vector; None: one part after the other

    def places(self, n: int, device: torch.device) -> Tensor:
        """(K, c)"""
        return torch.arange(n, device=device).view(self.number, -1) if self.entries is None else self.entries

    def cut(self, p: Tensor) -> Tensor:
        """(k, n) → (K, k, c)"""
        p = p if self.entries is None else p.index_select(1, self.entries.flatten())
        return p.unflatten(1, (self.number, -1)).transpose(0, 1)

    def join(self, parts: Tensor, n: int) -> Tensor:
        """The inverse of `cut`: (k, n)."""
        p = parts.transpose(0, 1).flatten(1)
        if self.entries is None:
            return p
        joined = p.new_empty(len(p), n).index_copy_(1, self.entries.flatten(), p)
        if self.entries.numel() < n:
            joined[:, ~torch.isin(torch.arange(n, device=p.device), self.entries)] = 0
        return joined


_WHOLE = Split(1)


class General(OperationDerivatives):
    """Activations are split into components that don't meet in this operation: samples, and within them tokens, heads,
    windows. Derivatives have one dense block a component, A_i (K, c_o, c_i). For a parameter without the batch: one in
    all, (1, n_o, n_i). Second derivatives are formed where they are added, and not kept."""

    rounded = ("_jacobians",)

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        super().__init__(region, tensors, beta)
        self._transpose = transposed_jacobian(region.run, tensors)
        self._by_samples()
        self._by_components()

    # derivatives

    def _rows(self, transpose: Callable, value: Value, rows: Split, to: Value, columns: Split) -> Tensor:
        """The derivative of `value` in `to`, from cotangents ↦ `transpose`: (K, c_value, c_to)."""
        numbers = sum(x.size for x in (*self.inputs, self.output))
        pieces = []
        for part in rows.places(value.size, self._beta.device).T.split(max(1, CHUNK_BYTES // (64 * numbers))):
            unit = self._beta.new_zeros(len(part), value.size).scatter_(1, part, 1.0)  # one entry of every component
            found = torch.func.vmap(transpose)(value.unflatten(unit))
            pieces.append(columns.cut(to.flatten(found).detach()))
        return torch.cat(pieces, 1).contiguous()

    def _by_samples(self) -> None:
        self._split = {value: Split(value.num_samples) for value in (self.output, *self.inputs)}
        forward = transposed_jacobian(self._transpose, [torch.zeros_like(self._beta)])
        zeros = [torch.zeros_like(x) for x in self._tensors]
        self._jacobians = []
        for i, value in enumerate(self.inputs):
            if value.batch_dim is None:  # as a rule there are fewer numbers in a parameter than in the outputs

                def column(t: Tensor, i: int = i) -> Tensor:
                    return forward((*zeros[:i], t, *zeros[i + 1 :]))[0]

                A = self._rows(column, value, _WHOLE, self.output, _WHOLE).mT.contiguous()
            else:
                rows, columns = self._splits(self.output, value)
                A = self._rows(lambda p, i=i: self._transpose(p)[i], self.output, rows, value, columns)
            self._jacobians.append(A)

    def _splits(self, *values: Value) -> list[Split]:
        """By components, if all are activations."""
        whole = any(value.batch_dim is None for value in values)
        return [_WHOLE if whole else self._split[value] for value in values]

    def _by_components(self) -> None:
        """Split the samples into the components of the first derivatives, if these are all alike."""
        inputs = [i for i, value in enumerate(self.inputs) if value.batch_dim is not None]
        local = _components([(self._jacobians[i] != 0).any(0) for i in inputs])
        if local is None:
            return
        outputs, *columns = local
        for i, places in zip(inputs, columns, strict=True):
            A = self._jacobians[i][:, outputs[:, :, None], places[:, None, :]]
            self._jacobians[i] = A.flatten(0, 1)
        for value, places in zip([self.output, *(self.inputs[i] for i in inputs)], local, strict=True):
            start = torch.arange(0, value.size, value.size // value.num_samples, device=places.device)
            entries = (start[:, None, None] + places).flatten(0, 1)
            self._split[value] = Split(len(entries), entries)

    def _second_derivatives(self) -> dict[tuple[int, int], Tensor]:
        """M_ij (K, c_i, c_j) by (i, j): i ≤ j, or i a parameter."""

        def gradient(*x: Tensor) -> tuple[Tensor, ...]:
            return transposed_jacobian(self._region.run, x)(self._beta)

        second = transposed_jacobian(gradient, self._tensors)
        zeros = [torch.zeros_like(x) for x in self._tensors]
        found = {}
        for i, j in combinations_with_replacement(range(len(zeros)), 2):
            # from a parameter's side, whose rows are not summed over the samples
            r, c = (j, i) if self.inputs[j].batch_dim is None else (i, j)

            def row(cotangent: Tensor, r: int = r, c: int = c) -> Tensor:
                return second((*zeros[:r], cotangent, *zeros[r + 1 :]))[c]

            rows, columns = self._splits(self.inputs[r], self.inputs[c])
            found[r, c] = self._rows(row, self.inputs[r], rows, self.inputs[c], columns)
        return found

    def _error(self, second: Mapping[tuple[int, int], Tensor]) -> float:
        probe, inputs = self._probe(), self.inputs
        products = [torch.zeros_like(t) for t in probe.tangents]
        for (i, j), M in second.items():
            rows, columns = self._splits(inputs[i], inputs[j])
            products[i] += rows.join(columns.cut(probe.tangents[j]) @ M.mT, inputs[i].size)
            if i != j:
                products[j] += columns.join(rows.cut(probe.tangents[i]) @ M, inputs[j].size)
        return largest_error(products, probe.second)

    # the protocol

    @property
    def pull_back_cost(self) -> float:
        return sum(A.numel() for A in self._jacobians)

    @property
    def numbers(self) -> float:
        return self.pull_back_cost

    def pull_back(self, p: Tensor, which: slice = ALL) -> list[Tensor]:
        found = []
        for value, A in list(zip(self.inputs, self._jacobians, strict=True))[which]:
            rows, columns = self._splits(self.output, value)
            found.append(columns.join(rows.cut(p) @ A, value.size))
        return found

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        found = []
        for value, A, t in zip(self.inputs, self._jacobians, tangents, strict=True):
            rows, columns = self._splits(self.output, value)
            found.append(rows.join(columns.cut(t) @ A.mT, self.output.size))
        return total(found)

    def add_curvature(self, blocks: Blocks) -> None:
        if not bool(self._beta.any()):
            return
        second = self._second_derivatives()
        error = self._error(second)
        if error > DERIVATIVE_RTOL and self._split[self.output].entries is not None:
            # components that meet in the second derivatives alone: first ones are zero where weights are
            dtype = self._jacobians[0].dtype
            self._by_samples()
            self._jacobians = [A.to(dtype) for A in self._jacobians]
            second = self._second_derivatives()
            error = self._error(second)
        self._refuse(error)
        for (i, j), M in second.items():
            if bool(M.any()):
                rows, columns = (
                    split.places(self.inputs[x].size, M.device)
                    for x, split in zip((i, j), self._splits(self.inputs[i], self.inputs[j]), strict=True)
                )
                block = blocks(i, j)
                block.index_put_((rows[:, :, None], columns[:, None, :]), M.to(block.dtype), accumulate=True)

    def check_derivatives(self) -> None:
        """Of the first derivatives. Second ones are checked where they are added."""
        probe = self._probe()
        self._compare(self.pull_back(probe.cotangent), probe.pulled)


def _components(patterns: Sequence[Tensor]) -> list[Tensor] | None:
    """The connected components of an operation, from where its Jacobians (a_o, a_i) in the inputs are not zero.

    Places (K, c_o) of the outputs, then (K, c_i) of each input. None where the components are not all alike. What is
    constant, or has no effect, belongs to none.
    """
    pattern = torch.cat(list(patterns), 1).cpu().numpy()
    _, labels = connected_components(bmat([[None, coo_array(pattern)], [coo_array(pattern.T), None]]), directed=False)
    parts = torch.from_numpy(labels).long().split([len(patterns[0]), *(x.shape[1] for x in patterns)])
    counts = torch.stack([part.bincount(minlength=int(labels.max()) + 1) for part in parts])
    real = ((counts[0] > 0) & (counts[1:].sum(0) > 0)).nonzero()[:, 0]
    if not bool((counts[:, real] == counts[:, real[:1]]).all()) or not bool(counts[:, real].all()):
        return None
    local = []
    for part in parts:
        inside = torch.isin(part, real).nonzero()[:, 0]
        order = part[inside].argsort(stable=True)
        local.append(inside[order].view(len(real), -1).to(patterns[0].device))
    return local


ClosedForms = Mapping[type[nn.Module], type[OperationDerivatives]]


def check_closed_forms(closed_forms: object) -> None:
    pairs = closed_forms.items() if isinstance(closed_forms, Mapping) else [(closed_forms, None)]
    for module, derivatives in pairs:
        if not (_is_kind_of(module, nn.Module) and _is_kind_of(derivatives, OperationDerivatives)):
            raise TypeError(
                "closed_forms must map kinds of modules to subclasses of OperationDerivatives, such as "
                f"{{MyModule: MyDerivatives}}; got {module!r}: {derivatives!r}"
            )


def _is_kind_of(x: object, kind: type) -> bool:
    return isinstance(x, type) and issubclass(x, kind)


def linearize(
    region: Region, tensors: Sequence[Tensor], beta: Tensor, closed_forms: ClosedForms
) -> OperationDerivatives:
    """The region with its derivatives, checked."""
    kinds: dict[str, type[OperationDerivatives]]
    kinds = {"elementwise": Elementwise, "linear": Linear, "general": General}
    if region.module is None:
        operation = kinds[kind_of(region, tensors)](region, tensors, beta)
    else:
        kind = next(found for module, found in closed_forms.items() if isinstance(region.module, module))
        operation = kind(region, tensors, beta)
    operation.check_derivatives()
    return operation

"""Affine operations: nn.Linear on (…, d), convolutions, nn.Embedding. Reduced coordinates of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.checkpoints import Memory
from _hessian.graph import AffineNode, Value
from _hessian.operations import ALL, Blocks, Operation, total
from _hessian.reduced_parameters import Reduced, add_coupling, reduced_rows, subtract_outside
from _hessian.state import State


class Affine(Operation):
    """h = z Wᵀ + b in rows: T a sample, G groups of channels. z̃ (G, N T, d) are its inputs, unfolded, with a one for b.

    W and b are values, and inputs of the operation like z. Those that are used here alone are one value together, in
    reduced coordinates Y (G, r, a): with z̃ = R Qᵀ, the columns of z̃ for these alone, X = Y Qᵀ + X⊥.
    """

    rounded = ("rows", "adjoint", "weights", "R", "Q")

    def __init__(self, node: AffineNode, beta: Tensor):
        self.output, self.module, self.weight = node.output, node.module, node.weight.detach()
        self.z = node.inputs
        weight_value, bias_value = node.live
        self.live = node.live
        self.groups = getattr(node.module, "groups", 1)
        self.rows = self._unfold(node.z)  # (G, N T, width)
        self.adjoint = self.to_rows(node.output.flatten(beta[None]))[0]  # λ (G, N T, a)
        self.weights = self._grouped(self.weight)  # (G, a, width)
        self.width = self.rows.shape[2] if node.reduced[0] is not None else 0  # of W in X
        ones = self.rows.new_ones(*self.rows.shape[:2], 1)
        parts = [self.rows] * (node.reduced[0] is not None) + [ones] * (node.reduced[1] is not None)
        self.parameters = [name for name in node.reduced if name is not None]
        self.R = self.Q = None
        if parts:
            self.R, self.Q = reduced_rows(torch.cat(parts, 2))  # (G, N T, r), (G, d, r)
        self.d = sum(part.shape[2] for part in parts)
        if self.Q is not None:
            self.num_outside = self.groups * self.adjoint.shape[2] * (self.d - self.Q.shape[2])
        size = 0 if self.R is None else self.R.shape[2] * self.adjoint.shape[2] * self.groups  # m = G r a
        self.own = Value(f"{node.output.name}.parameters", torch.Size([size]), None, 1) if size else None  # Y
        self.inputs = tuple(x for x in (node.inputs, weight_value, bias_value, self.own) if x is not None)

    # rows

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, nn.Conv1d | nn.Conv2d)

    def _grouped(self, W: Tensor) -> Tensor:
        """A weight (or k of them, in front) as (…, G, a, width)."""
        if isinstance(self.module, nn.Embedding):
            return W.mT.unsqueeze(-3)
        if self.is_convolution:
            return W.flatten(-self.weight.dim() + 1).unflatten(-2, (self.groups, -1))
        return W.unsqueeze(-3)

    def _unfold(self, z: Tensor) -> Tensor:
        if isinstance(self.module, nn.Embedding):
            rows = F.one_hot(z.flatten(), len(self.weight)).to(self.weight)[None]
            if self.module.padding_idx is not None:  # no gradient goes there
                rows[..., self.module.padding_idx] = 0
            return rows
        if not self.is_convolution:
            z = z if self.z is None else self.z.flatten(z[None])[0]
            return z.reshape(1, -1, self.weight.shape[1])
        return self._windows(z[None])[0]

    def _windows(self, z: Tensor) -> Tensor:
        """What the outputs of a convolution see of z (k, N, C, …): (k, G, N T, width), by one copy."""
        z = z.unsqueeze(-2) if isinstance(self.module, nn.Conv1d) else z
        kernel, dilation, (top, left), stride = _window(self.module)
        z = F.pad(z, (left, left, top, top)).unflatten(2, (self.groups, -1))  # (k, N, G, C/G, height, width)
        (k, N, G, C), (row, column) = z.shape[:4], z.stride()[4:]
        places = [
            (n - d * (m - 1) - 1) // s + 1 for n, m, d, s in zip(z.shape[4:], kernel, dilation, stride, strict=True)
        ]
        steps = (row * stride[0], column * stride[1], row * dilation[0], column * dilation[1])
        seen = z.as_strided((k, N, G, C, *places, *kernel), (*z.stride()[:4], *steps))
        return seen.permute(0, 2, 1, 4, 5, 3, 6, 7).reshape(k, G, N * places[0] * places[1], -1)

    def to_rows(self, p: Tensor) -> Tensor:
        """Of the output (k, n_o): (k, G, N T, a)."""
        if self.is_convolution:
            p = p.unflatten(1, (self.output.num_samples, self.groups, len(self.weight) // self.groups, -1))
            return p.permute(0, 2, 1, 4, 3).flatten(2, 3)
        return p.unflatten(1, (1, -1, self.output.shape[-1]))

    def from_rows(self, h: Tensor) -> Tensor:
        """The inverse of `to_rows`."""
        if self.is_convolution:
            h = h.unflatten(2, (self.output.num_samples, -1))  # (k, G, N, T, a)
            return h.permute(0, 2, 1, 4, 3).flatten(1)
        return h.flatten(1)

    def fold(self, u: Tensor) -> Tensor:
        """The transpose of unfolding: u (k, G, N T, width) ↦ (k, n_z)."""
        if not self.is_convolution:
            return u.flatten(1)
        assert self.z is not None
        u = u.unflatten(2, (self.output.num_samples, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)  # (k, N, C·kernel, T)
        size = self.z.shape[2:] if isinstance(self.module, nn.Conv2d) else (1, self.z.shape[2])
        return F.fold(u.flatten(0, 1), size, *_window(self.module)).reshape(len(u), -1)

    def unfold_tangent(self, t: Tensor) -> Tensor:
        """z's change (k, n_z) in rows: (k, G, N T, width)."""
        assert self.z is not None
        if not self.is_convolution:
            return t.unflatten(1, (1, -1, self.weights.shape[2]))
        return self._windows(self.z.unflatten(t))

    # the protocol

    @property
    def pull_back_cost(self) -> float:
        return self.adjoint.numel() * self.weights.shape[2]

    @property
    def numbers(self) -> float:
        return self.rows.numel() + self.adjoint.numel() + 2 * self.weights.numel()

    def pull_back(self, p: Tensor, which: slice = ALL) -> list[Tensor]:
        rows, (weight, bias) = self.to_rows(p), self.live
        parts = [
            None if self.z is None else lambda: self.fold(rows @ self.weights),
            None if weight is None else lambda: self._flat_weight(rows.mT @ self.rows),
            None if bias is None else lambda: rows.sum(2).flatten(1),
            None if self.own is None else lambda: self.to_parameters(rows),
        ]
        return [part() for part in [x for x in parts if x is not None][which]]

    def to_parameters_from_left(self, P: Tensor) -> Tensor:
        """JᵀP (m, k), for P (n_o, k). Without transposed copies, which P may be too large for."""
        assert self.R is not None
        if self.is_convolution:
            rows = P.unflatten(0, (self.output.num_samples, self.groups, len(self.weight) // self.groups, -1))
            rows = rows.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)  # (G, N T, a k)
        else:
            rows = P.view(1, self.R.shape[1], -1)
        return (self.R.mT @ rows).view(-1, P.shape[1])

    def _flat_weight(self, X: Tensor) -> Tensor:
        """(k, G, a, width) as the flat weight (k, ·)."""
        return (X.mT if isinstance(self.module, nn.Embedding) else X).flatten(1)

    def _weight_tangent(self, t: Tensor) -> Tensor:
        """The inverse of `_flat_weight`."""
        return self._grouped(t.unflatten(1, self.weight.shape))

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        rest, rows = list(tangents), []
        if self.z is not None:
            t = rest.pop(0)
            parts = t.split(max(1, 2**18 // self.rows.numel()))  # unfolded, a part stays in the cache
            rows.append(torch.cat([self.unfold_tangent(part) @ self.weights.mT for part in parts]))
        weight, bias = self.live
        if weight is not None:
            rows.append(self.rows @ self._weight_tangent(rest.pop(0)).mT)
        if bias is not None:
            h = rest.pop(0).unflatten(1, (self.groups, 1, -1))
            rows.append(h.expand(len(h), *self.adjoint.shape))
        if self.own is not None and self.R is not None:
            rows.append(self.R @ rest.pop(0).unflatten(1, (self.groups, self.R.shape[2], -1)))
        return self.from_rows(total(rows))

    def add_curvature(self, blocks: Blocks) -> None:
        """λ couples W and X to z: ⟨λ, δW δz⟩, and S of Y, which meets z̃[b, k] by λ[g, b, i] Q[g, k, q]."""
        if self.z is None or not bool(self.adjoint.any()):
            return
        if self.live[0] is not None:
            self._add_product(blocks(0, 1))
        if self.couples:
            S, (G, rows, a) = blocks(len(self.inputs) - 1, 0), self.adjoint.shape
            if not self.is_convolution:
                add_coupling(S, self.adjoint[0], None if self.Q is None else self.Q[0], self.width)
                return
            Q = self._weight_part()
            T = Q.new_zeros(G, Q.shape[2], a, G, rows, self.width)
            for g in range(G):
                T[g, :, :, g] = self.adjoint[g].T[None, :, :, None] * Q[g].T[:, None, None, :]
            S.add_(self.fold(T.flatten(0, 2)))

    def _add_product(self, block: Tensor) -> None:
        """⟨λ, δW δz⟩ added to the block (n_z, n_W)."""
        G, rows, a = self.adjoint.shape
        width = self.weights.shape[2]
        unit = torch.eye(width, dtype=self.adjoint.dtype, device=self.adjoint.device)
        for g in range(G):
            # of W[g, i, k]: λ[g, ·, i] in column k
            of_weight = self.adjoint.new_zeros(a, width, G, rows, width)
            of_weight[:, :, g] = self.adjoint[g].T[:, None, :, None] * unit[None, :, None, :]
            index = torch.arange(self.weight.numel(), device=unit.device)
            places = self._grouped(index.view(self.weight.shape))[g].flatten()
            block.index_add_(1, places, self.fold(of_weight.flatten(0, 1)).T)

    # its own parameters

    def to_parameters(self, rows: Tensor) -> Tensor:
        """Jᵀ p (k, m), for p (k, n_o) in rows."""
        assert self.R is not None
        return (self.R.mT @ rows).flatten(1)

    @property
    def couples(self) -> bool:
        """Whether λ couples X to z."""
        return self.z is not None and self.width > 0

    def _weight_part(self) -> Tensor:
        """Q (G, width, r) without the bias."""
        assert self.R is not None
        if self.Q is not None:
            return self.Q[:, : self.width]
        unit = torch.eye(self.width, self.d, dtype=self.R.dtype, device=self.R.device)
        return unit.expand(self.groups, -1, -1)

    @property
    def reduced(self) -> Reduced | None:
        if self.own is None:
            return None
        width = self.width if self.couples else 0
        return Reduced([self.own], [self.z], self.Q, self.adjoint, width, self.unfold_tangent, self.fold)

    def pull_back_both(self, P: Tensor, state: State, memory: Memory) -> None:
        own, others = self.own, [value for value in self.inputs if value != self.own]
        if own is not None:
            PJ = self.to_parameters(self.to_rows(P))
            state.add(own, own, self.to_parameters_from_left(PJ))
            del PJ
        for i, part in enumerate(self.pull_back(P, slice(len(others)))):
            if own is not None:
                state.add(own, others[i], self.to_parameters_from_left(part))
            blocks = self.pull_back(part.mT.contiguous(), slice(i, len(others)))
            for value, block in zip(others[i:], blocks, strict=True):
                state.add(others[i], value, block)

    def eliminate_outside(self, epsilon: float, state: State) -> None:
        if self.Q is None or self.z is None or not self.couples:
            return
        P, (G, rows, a) = state.block(self.z, self.z), self.adjoint.shape
        if not self.is_convolution:
            Q = self.Q[0, : self.width]
            unit = torch.eye(self.width, dtype=Q.dtype, device=Q.device)
            subtract_outside(P, self.adjoint[0], unit - Q @ Q.mT, epsilon)
            return
        free = torch.linalg.qr(self.Q, mode="complete").Q[:, : self.width, self.Q.shape[2] :]
        for g in range(G):
            L = self.adjoint[g] if a <= rows else torch.linalg.qr(self.adjoint[g].mT).R.mT  # λλᵀ = L Lᵀ
            C = free.new_zeros(L.shape[1], free.shape[2], G, rows, self.width)
            C[:, :, g] = L.T[:, None, :, None] * free[g].T[None, :, None, :]
            folded = self.fold(C.flatten(0, 1))
            P.addmm_(folded.mT, folded, alpha=-1 / epsilon)

    def block(self, pieces: Sequence[Tensor]) -> Tensor:
        """X (k, G, a, d), from one flat tensor (k, ·) for each of its parameters."""
        parts = []
        for name, piece in zip(self.parameters, pieces, strict=True):
            is_weight = self.width > 0 and name == self.parameters[0]
            parts.append(self._weight_tangent(piece) if is_weight else piece.unflatten(1, (self.groups, -1, 1)))
        return torch.cat(parts, 3)

    def pieces(self, X: Tensor) -> list[Tensor]:
        """The inverse of `block`."""
        weight, bias = X.tensor_split((self.width,), 3)
        found = [self._flat_weight(weight[:, 0] if self.groups == 1 else weight)] if self.width else []
        return found + ([bias.flatten(1)] if bias.shape[3] else [])


class _Window(NamedTuple):
    """A convolution's, in the order of the arguments of F.unfold and F.fold. One of sequences has height 1."""

    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]


def _window(m: nn.Module) -> _Window:
    assert isinstance(m, nn.Conv1d | nn.Conv2d)
    if m.padding_mode != "zeros":
        raise ValueError(f"a convolution with padding_mode={m.padding_mode!r} is not supported: use F.pad before it")
    total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    if m.padding == "same" and any(x % 2 for x in total):
        raise ValueError("a convolution with padding='same' and an even kernel is not supported: use F.pad before it")
    padding = [x // 2 * (m.padding == "same") for x in total] if isinstance(m.padding, str) else m.padding

    def pair(x: Sequence[int], height: int) -> tuple[int, int]:
        return (height, x[0]) if len(x) == 1 else (x[0], x[1])

    return _Window(pair(m.kernel_size, 1), pair(m.dilation, 1), pair(padding, 0), pair(m.stride, 1))

"""Operations of a network with their derivatives at one batch, by kind: elementwise, linear, general, affine.

An operation o = f(u₁, u₂, …) has Jacobians A_i = ∂f/∂u_i. With β the loss's derivative in o, M_ij are the second
derivatives of ⟨β, f⟩. Vectors are flat as in `Value`, k of them together: (k, n). All kinds share one protocol, and
an affine one has parameters beside it (`Affine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _hessian.graph import AffineNode, Region, Value, kind_of

_CHUNK_BYTES = 2**27  # derivatives of a general operation are formed in chunks of this

Blocks = Callable[[int, int], Tensor]  # i, j ↦ the block (n_i, n_j) of a matrix


class Operation(Protocol):
    output: Value
    inputs: tuple[Value, ...]

    @property
    def pull_back_cost(self) -> float:
        """Multiplications of `pull_back` for one vector."""

    @property
    def numbers(self) -> float:
        """How many it keeps."""

    def pull_back(self, p: Tensor) -> list[Tensor]:
        """A_iᵀ p (k, n_i) of each input, for p (k, n_o)."""

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        """Σ A_i t_i (k, n_o), for t_i (k, n_i)."""

    def add_curvature(self, blocks: Blocks) -> None:
        """M_ij added to the blocks, for all i and j."""

    def times_curvature(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Σ_j M_ij t_j (k, n_i) of each input."""


class RegionOperation:
    """What the kinds that are not affine share."""

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        self.output, self.inputs = region.output, region.inputs
        self._region, self._tensors, self._beta = region, tensors, beta

    def pull_back(self, p: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def add_curvature(self, blocks: Blocks) -> None:
        raise NotImplementedError

    def times_curvature(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    @property
    def pull_back_cost(self) -> float:
        """Multiplications for one vector."""
        return self.output.size

    @property
    def numbers(self) -> float:
        """Kept."""
        return 3 * self.output.size

    def derivative_error(self) -> float:
        """How far the first and second derivatives are off along random directions, relative to themselves."""
        generator = torch.Generator().manual_seed(0)

        def random(n: int) -> Tensor:
            return torch.randn(1, n, generator=generator, dtype=torch.float64).to(self._beta)

        leaves = [x.clone().requires_grad_() for x in self._tensors]
        directions = [random(value.size) for value in self.inputs]
        cotangent = random(self.output.size)
        with torch.enable_grad():
            out = self._region.run(*leaves)
            first = _gradients((self.output.unflatten(cotangent)[0] * out).sum(), leaves)
            gradient = _gradients((self._beta * out).sum(), leaves, create_graph=True)
            along = [
                (g * value.unflatten(d)[0]).sum() for g, value, d in zip(gradient, self.inputs, directions, strict=True)
            ]
            second = _gradients(_sum(along), leaves)
        found = self.pull_back(cotangent) + self.times_curvature(directions)
        expected = [v.flatten(x[None]) for v, x in zip(self.inputs * 2, first + second, strict=True)]
        pairs = zip(found, expected, strict=True)
        return max(
            float((a - b).norm() / b.norm().clamp_min(1e-300)) if bool(b.any()) else float(a.norm()) for a, b in pairs
        )


class Elementwise(RegionOperation):
    """Diagonal derivatives, after inputs are broadcast to the output's shape."""

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        super().__init__(region, tensors, beta)
        shape = region.output.shape
        leaves = [x.expand(shape).clone().requires_grad_() for x in tensors]
        with torch.enable_grad():
            out = region.run(*leaves)
            slopes = _gradients(out.sum(), leaves, create_graph=True)
            second = [_gradients((beta * slope).sum(), leaves) for slope in slopes]
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

    def pull_back(self, p: Tensor) -> list[Tensor]:
        return [self._scatter(i, p * slope) for i, slope in enumerate(self.slopes)]

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        return _sum(
            [slope * self._gather(i, t) for i, (slope, t) in enumerate(zip(self.slopes, tangents, strict=True))]
        )

    def add_curvature(self, blocks: Blocks) -> None:
        places = torch.arange(self.output.size, device=self.slopes[0].device)
        for i, row in enumerate(self.second):
            for j, entries in enumerate(row):
                if bool(entries.any()):
                    rows, columns = (places if (index := self._index[x]) is None else index for x in (i, j))
                    blocks(i, j).index_put_((rows, columns), entries, accumulate=True)

    def times_curvature(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        gathered = [self._gather(j, t) for j, t in enumerate(tangents)]
        return [
            self._scatter(i, _sum([entries * t for entries, t in zip(row, gathered, strict=True)]))
            for i, row in enumerate(self.second)
        ]


class Linear(RegionOperation):
    """Second derivatives are zero here. Jacobians are applied by autograd, never stored."""

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        super().__init__(region, tensors, beta)
        self._transpose = transposed_jacobian(region.run, tensors)
        self._zero = torch.zeros_like(beta)
        numbers = sum(x.numel() for x in tensors) + beta.numel()
        self._chunk = max(1, _CHUNK_BYTES // (8 * numbers))

    def pull_back(self, p: Tensor) -> list[Tensor]:
        found = torch.func.vmap(self._transpose, chunk_size=self._chunk)(self.output.unflatten(p))
        return [value.flatten(x) for value, x in zip(self.inputs, found, strict=True)]

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        forward = transposed_jacobian(self._transpose, [self._zero])
        unflat = tuple(value.unflatten(t) for value, t in zip(self.inputs, tangents, strict=True))
        return self.output.flatten(torch.func.vmap(lambda *t: forward(t)[0], chunk_size=self._chunk)(*unflat))

    def add_curvature(self, blocks: Blocks) -> None:
        pass

    def times_curvature(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(t) for t in tangents]


class General(RegionOperation):
    """Dense derivatives, one block a sample for activations: A_i (N, a_o, a_i), M_ij (N, a_i, a_j). For parameters
    without the batch: A_i (1, n_o, n_i), M_ij (1, n_i, n_j)."""

    def __init__(self, region: Region, tensors: Sequence[Tensor], beta: Tensor):
        super().__init__(region, tensors, beta)
        transpose = transposed_jacobian(region.run, tensors)
        self.jacobians = [
            self._rows(transpose, (self.output,), 0, i, per_sample=self._per_sample(i)) for i in range(len(tensors))
        ]

        def gradient(*x: Tensor) -> tuple[Tensor, ...]:
            return transposed_jacobian(region.run, x)(beta)

        second = transposed_jacobian(gradient, tensors)
        self.second: dict[tuple[int, int], Tensor] = {}
        for i in range(len(tensors)):
            for j in range(i, len(tensors)):
                per_sample = self._per_sample(i) and self._per_sample(j)
                # from the parameter's side, whose rows are not summed over the samples
                r, c = (j, i) if self._per_sample(i) and not per_sample else (i, j)
                rows = self._rows(lambda cotangents: second(cotangents), self.inputs, r, c, per_sample)
                self.second[i, j] = rows if (r, c) == (i, j) else rows.mT

    @property
    def pull_back_cost(self) -> float:
        return sum(A.numel() for A in self.jacobians)

    @property
    def numbers(self) -> float:
        return sum(A.numel() for A in self.jacobians) + sum(M.numel() for M in self.second.values())

    def _per_sample(self, i: int) -> bool:
        return self.inputs[i].batch_dim is not None

    def _rows(self, transpose: Callable, outputs: Sequence[Value], r: int, c: int, per_sample: bool) -> Tensor:
        """Rows (N, a_r, a_c) of the Jacobian whose transpose is given, or (1, n_r, n_c): from output r to input c."""
        value, N = outputs[r], outputs[r].num_samples if per_sample else 1
        a = value.size // N
        zeros = [torch.zeros(x.shape, dtype=torch.float64) for x in outputs]

        def row(cotangent: Tensor) -> Tensor:
            cotangents = [cotangent if i == r else zero for i, zero in enumerate(zeros)]
            found = transpose(cotangents[0] if outputs[0] is self.output else tuple(cotangents))
            return found[c]

        numbers = sum(x.size for x in (*self.inputs, self.output))
        pieces = []
        for start in range(0, a, size := max(1, _CHUNK_BYTES // (64 * numbers))):
            stop = min(start + size, a)
            unit = torch.zeros(stop - start, N, a, dtype=torch.float64)
            unit[torch.arange(stop - start), :, torch.arange(start, stop)] = 1
            rows = torch.func.vmap(row)(value.unflatten(unit.flatten(1)))
            pieces.append(self.inputs[c].flatten(rows).detach())
        return torch.cat(pieces).unflatten(1, (N, -1)).transpose(0, 1).contiguous()

    def pull_back(self, p: Tensor) -> list[Tensor]:
        return [torch.einsum("kno,noi->kni", p.unflatten(1, (len(A), -1)), A).flatten(1) for A in self.jacobians]

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        return _sum(
            [
                torch.einsum("kni,noi->kno", t.unflatten(1, (len(A), -1)), A).flatten(1)
                for t, A in zip(tangents, self.jacobians, strict=True)
            ]
        )

    def add_curvature(self, blocks: Blocks) -> None:
        for (i, j), M in self.second.items():
            N = len(M)
            for r, c, entries in ((i, j, M), (j, i, M.mT))[: 1 if i == j else 2]:
                block = blocks(r, c)
                block.view(N, -1, N, block.shape[1] // N).diagonal(dim1=0, dim2=2).add_(entries.permute(1, 2, 0))

    def times_curvature(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        products = [torch.zeros_like(t) for t in tangents]
        for (i, j), M in self.second.items():
            for r, c, entries in ((i, j, M), (j, i, M.mT))[: 1 if i == j else 2]:
                t = tangents[c].unflatten(1, (len(M), -1))
                products[r] += torch.einsum("nij,knj->kni", entries, t).flatten(1)
        return products


def transposed_jacobian(function: Callable, at: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Cotangents of the function's output ↦ those of its inputs."""
    return torch.func.vjp(function, *at)[1]


def _gradients(total: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """∂total/∂leaf; zeros where there is no dependence."""
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class Affine:
    """h = z Wᵀ + b in rows: T a sample, G groups of channels. z̃ (G, N T, d) are its inputs, unfolded, with a one for b.

    W and b that are used here alone are eliminated here, in reduced coordinates Y (G, r, a): with z̃ = R Qᵀ, the
    columns of z̃ for these alone, X = Y Qᵀ + X⊥. Elsewhere they are values, and inputs of the operation like z.
    """

    def __init__(self, node: AffineNode, beta: Tensor):
        self.output, self.module, self.weight = node.output, node.module, node.weight.detach()
        self.z = node.inputs
        weight_value, bias_value = node.live
        self.inputs = tuple(x for x in (node.inputs, weight_value, bias_value) if x is not None)
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
            z = torch.cat(parts, 2)
            self.R = z
            if z.shape[1] < z.shape[2]:
                Q, R = torch.linalg.qr(z.mT)
                self.R, self.Q = R.mT.contiguous(), Q  # (G, N T, r), (G, d, r)
        self.d = sum(part.shape[2] for part in parts)

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
        columns = self._unfolded(z)  # (N, C·kernel, T)
        return columns.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def _unfolded(self, z: Tensor) -> Tensor:
        z = z.unsqueeze(-2) if isinstance(self.module, nn.Conv1d) else z
        return F.unfold(z, *_window(self.module))

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
        columns = self._unfolded(self.z.unflatten(t).flatten(0, 1)).unflatten(0, (len(t), -1))  # (k, N, C·kernel, T)
        return columns.unflatten(2, (self.groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)

    # the protocol

    @property
    def pull_back_cost(self) -> float:
        return self.adjoint.numel() * self.weights.shape[2]

    @property
    def numbers(self) -> float:
        return self.rows.numel() + self.adjoint.numel() + 2 * self.weights.numel()

    def pull_back(self, p: Tensor) -> list[Tensor]:
        rows = self.to_rows(p)
        found = []
        if self.z is not None:
            found.append(self.fold(rows @ self.weights))
        weight, bias = self.live
        if weight is not None:
            found.append(self._flat_weight(rows.mT @ self.rows))
        if bias is not None:
            found.append(rows.sum(2).flatten(1))
        return found

    def _flat_weight(self, X: Tensor) -> Tensor:
        """(k, G, a, width) as the flat weight (k, ·)."""
        return (X.mT if isinstance(self.module, nn.Embedding) else X).flatten(1)

    def _weight_tangent(self, t: Tensor) -> Tensor:
        """The inverse of `_flat_weight`."""
        return self._grouped(t.unflatten(1, self.weight.shape))

    def push_forward(self, tangents: Sequence[Tensor]) -> Tensor:
        rest = list(tangents)
        total = None
        if self.z is not None:
            total = self.unfold_tangent(rest.pop(0)) @ self.weights.mT
        weight, bias = self.live
        if weight is not None:
            h = self.rows @ self._weight_tangent(rest.pop(0)).mT
            total = h if total is None else total + h
        if bias is not None:
            h = rest.pop(0).unflatten(1, (self.groups, 1, -1))
            total = h.expand(len(h), *self.adjoint.shape) if total is None else total + h
        assert total is not None
        return self.from_rows(total)

    def add_curvature(self, blocks: Blocks) -> None:
        """⟨λ, δW δz⟩, where both are values."""
        if self.z is None or self.live[0] is None:
            return
        G, rows, a = self.adjoint.shape
        width = self.weights.shape[2]
        unit = torch.eye(width, dtype=self.adjoint.dtype, device=self.adjoint.device)
        for g in range(G):
            # of W[g, i, k]: λ[g, ·, i] in column k
            of_weight = self.adjoint.new_zeros(a, width, G, rows, width)
            of_weight[:, :, g] = self.adjoint[g].T[:, None, :, None] * unit[None, :, None, :]
            folded = self.fold(of_weight.flatten(0, 1))  # (a·width, n_z)
            index = torch.arange(self.weight.numel(), device=unit.device)
            places = self._weight_tangent(index[None])[0, g].flatten()
            blocks(1, 0).index_add_(0, places, folded)
            blocks(0, 1).index_add_(1, places, folded.T)

    def times_curvature(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        products = [torch.zeros_like(t) for t in tangents]
        if self.z is not None and self.live[0] is not None:
            u, X = self.unfold_tangent(tangents[0]), self._weight_tangent(tangents[1])
            products[0] = self.fold(self.adjoint @ X)
            products[1] = self._flat_weight(self.adjoint.mT @ u)
        return products

    # its own parameters

    @property
    def size(self) -> int:
        """m = G r a, the size of the pivot; 0 without parameters of its own."""
        return 0 if self.R is None else self.R.shape[2] * self.adjoint.shape[2] * self.groups

    def to_parameters(self, p: Tensor) -> Tensor:
        """Jᵀ p (k, m), for p (k, n_o)."""
        assert self.R is not None
        return (self.R.mT @ self.to_rows(p)).flatten(1)

    def from_parameters(self, y: Tensor) -> Tensor:
        """J y (k, n_o), for y (k, m)."""
        assert self.R is not None
        return self.from_rows(self.R @ y.unflatten(1, (self.groups, self.R.shape[2], -1)))

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

    def coupling(self) -> Tensor:
        """S (m, n_z): Y[g, q, i] meets z̃[b, k] by λ[g, b, i] Q[g, k, q]."""
        Q, (G, rows, a) = self._weight_part(), self.adjoint.shape
        r = Q.shape[2]
        S = Q.new_zeros(G, r, a, G, rows, self.width)
        for g in range(G):
            S[g, :, :, g] = self.adjoint[g].T[None, :, :, None] * Q[g].T[:, None, None, :]
        return self.fold(S.flatten(0, 2))

    def subtract_outside(self, P: Tensor, epsilon: float) -> None:
        """P −= (λλᵀ) ⊗ (I − QQᵀ)/ε, folded: what X⊥ adds to the cost-to-go P (n_z, n_z) of z."""
        if self.Q is None or not self.couples:
            return
        G, rows, a = self.adjoint.shape
        if not self.is_convolution:
            Q = self.Q[0, : self.width]
            outside = torch.eye(self.width, dtype=Q.dtype, device=Q.device) - Q @ Q.mT
            similarity = self.adjoint[0] @ self.adjoint[0].mT
            P.view(rows, self.width, rows, self.width).addcmul_(
                similarity[:, None, :, None], outside[:, None, :], value=-1 / epsilon
            )
            return
        free = torch.linalg.qr(self.Q, mode="complete").Q[:, : self.width, self.Q.shape[2] :]
        for g in range(G):
            L = self.adjoint[g] if a <= rows else torch.linalg.qr(self.adjoint[g].mT).R.mT  # λλᵀ = L Lᵀ
            C = free.new_zeros(L.shape[1], free.shape[2], G, rows, self.width)
            C[:, :, g] = L.T[:, None, :, None] * free[g].T[None, :, None, :]
            folded = self.fold(C.flatten(0, 1))
            P.addmm_(folded.mT, folded, alpha=-1 / epsilon)

    def num_outside(self) -> int:
        """The dimensions of X⊥."""
        return 0 if self.Q is None else self.groups * self.adjoint.shape[2] * (self.d - self.Q.shape[2])

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


def linearize(region: Region, tensors: Sequence[Tensor], beta: Tensor) -> RegionOperation:
    kind = {"elementwise": Elementwise, "linear": Linear, "general": General}[kind_of(region, tensors)]
    return kind(region, tensors, beta)

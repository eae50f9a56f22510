"""Gauss–Newton systems by the Gram matrix: N K unknowns instead of P, for any number of dampings.

Let Λ_b = S_b S_bᵀ for each sample b, with K columns in S. Let J (K N, P) be the Jacobian of the scaled logits Sᵀh_L.
Then the Gauss–Newton matrix of the loss is JᵀJ. One backward pass of K columns a sample gives E_ℓ = S_bᵀ ∂h_L/∂h_ℓ.
Let the metric D be a Kronecker product in each layer, D_ℓ = Ω_ℓ ⊗ A_ℓ: Ω on the outputs, A on the inputs. Then the Gram
matrix M is a sum of Hadamard products, and nothing of size P × P is formed:

    M = J D⁻¹ Jᵀ = Σ_ℓ (E Ω_ℓ⁻¹ Eᵀ) ∘ (z̃ A_ℓ⁻¹ z̃ᵀ)
    (JᵀJ + λD) x = −Jᵀw − g   ⇔   x = −D⁻¹ (Jᵀy + g/λ),   y = (M + λ)⁻¹ (w − J D⁻¹g/λ)

Cost: 2 (N K)² Σ (a + 1) operations for M, (N K)³/3 for each λ, and 4 N Σ a³ for metric='state'. `GramSystem` says how
an L2 term enters.

Notation as in hessian.py. Neighbouring layers of one shape are stacked: g layers in a group.

References: Jacot, Gabriel & Hongler (2018), the Gram matrix; Martens & Grosse (2015), Kronecker factors of a layer and
the split π of their damping; Tassa, Erez & Todorov (2012), steps measured in states.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from _hessian.layers import (
    LayerDerivatives,
    SingularHessianError,
    blocks_of,
    flatten_blocks,
    forward_tangent,
    with_skip,
)
from _hessian.symmetric_factor import factor_symmetric


class ScaledOutput(NamedTuple):
    """The square root of Λ, and the residual w."""

    root: Tensor  # (N, C, K) S with Λ_b = S_b S_bᵀ
    residual: Tensor  # (N, K) w with λ_b = S_b w_b


def scaled_output(layer: LayerDerivatives) -> ScaledOutput:
    """S and w of the output layer; K = C, or C − 1 where the columns of Λ_b sum to zero.

    In the latter case let r be the likeliest class, and Q the Householder matrix that takes √π to e_r. Then S_b is
    (diag(√π) − π√πᵀ)/√N times all columns of Q but r. In this closed form nothing cancels where π_r is nearly 1.
    """
    d, adjoint = layer.loss_hessian.diagonal, layer.adjoint  # (N, C)
    N, C = d.shape
    if not layer.loss_hessian.zero_sum:
        root = d.sqrt()
        return ScaledOutput(torch.diag_embed(root), adjoint / root)
    scale = d.sum(1, keepdim=True).sqrt()  # √(1/N): Λ_b = (diag(π) − ππᵀ) scale²
    pi = d / scale**2
    r = d.argmax(1, keepdim=True)
    others = torch.arange(C - 1, device=d.device).expand(N, C - 1)
    others = others + (others >= r)  # (N, K) every class but r
    root_r, rest = pi.gather(1, r).sqrt(), pi.gather(1, others)
    total = rest.sum(1, keepdim=True)  # 1 − π_r
    q = rest / torch.where(total > 0, total, 1.0)
    # (I − √π √πᵀ) after the reflection: rows k ≠ r: δ_kc − q_k (1 + √π_r); row r: √π_r
    block = torch.diag_embed(torch.ones_like(rest)) - (q * (1 + root_r))[:, :, None]
    S = d.new_empty(N, C, C - 1)
    S.scatter_(1, others[:, :, None].expand(N, C - 1, C - 1), block)
    S.scatter_(1, r[:, :, None].expand(N, 1, C - 1), root_r[:, :, None].expand(N, 1, C - 1))
    S *= (scale * rest.sqrt())[:, None, :]
    # w_c = λ_c/√π_c + √π_c λ_r/(√π_r (1 − √π_r)), over the scale
    tiny = torch.finfo(d.dtype).tiny
    root_rest = rest.sqrt().clamp_min(tiny)
    gap = (total / (1 + root_r)).clamp_min(tiny)
    w = adjoint.gather(1, others) / root_rest + rest.sqrt() * adjoint.gather(1, r) / (root_r * gap)
    return ScaledOutput(S, w / scale)


def output_jacobians(layers: Sequence[LayerDerivatives], root: Tensor) -> list[Tensor]:
    """E_ℓ = Sᵀ ∂h_L/∂h_ℓ (K, N, a) of each layer, first layer first: one backward pass of K columns a sample."""
    E, beta = [root.permute(2, 0, 1).contiguous()], None
    for above, layer in zip(reversed(layers[1:]), reversed(layers[:-1]), strict=True):
        beta = with_skip(above.skip, E[-1] @ above.weight, beta)
        E.append(beta * layer.slope)
    return E[::-1]


def state_weights(layers: Sequence[LayerDerivatives]) -> list[Tensor]:
    """Ω_ℓ (a, a) of each hidden layer: what a change u of h_ℓ does to all hidden pre-activations, mean over samples.

    uᵀΩ u = Σ_j ‖δh_j‖² over hidden layers j ≥ ℓ, by the recursion

    Ω_{ℓ,b} = I + φ′Π_ℓ φ′,   Π_{ℓ-1} = WᵀΩ_ℓ W + σ (Wᵀφ′Π_ℓ + Π_ℓ φ′W) + σ²Π_ℓ,   Π_{L-1} = 0,   W = W_ℓ
    """
    Omega, Pi, eye = [], None, layers[0].slope.new_empty(0, 0)
    for index, layer in reversed(list(enumerate(layers[:-1]))):
        N, a = layer.slope.shape
        if len(eye) != a:
            eye = torch.eye(a, dtype=layer.slope.dtype, device=layer.slope.device)
        if Pi is None:
            weight = eye.expand(N, a, a)
        else:
            slope_Pi = layer.slope[:, :, None] * Pi
            weight = torch.addcmul(eye, slope_Pi, layer.slope[:, None, :])
        Omega.append(weight.mean(0))
        if index == 0:
            break
        below = layer.weight.mT @ (weight @ layer.weight)
        if layer.skip and Pi is not None:
            cross = layer.weight.mT @ slope_Pi
            below = below + layer.skip * (cross + cross.mT) + layer.skip**2 * Pi
        Pi = below
    return Omega[::-1]


class MetricBlock(Protocol):
    """Parameters that follow each other, with their part of J and of the metric D. Vectors (P,) are their parts."""

    @property
    def size(self) -> int: ...

    def apply(self, v: Tensor) -> Tensor:
        """D v"""

    def solve(self, v: Tensor) -> Tensor:
        """D⁻¹ v"""

    def transpose(self, y: Tensor) -> Tensor:
        """D⁻¹ Jᵀ y for y (K N,)."""


class _LayerGroup(NamedTuple):
    """g neighbouring layers of one shape, whitened by their part of the metric, D_ℓ = Ω_ℓ ⊗ A_ℓ."""

    inputs: Tensor  # (g, N, d) z̃ C⁻ᵀ
    outputs: Tensor  # (g, a, K N) F⁻¹ Eᵀ
    output_factor: Tensor | None  # (g, a, a) F: Ω = F Fᵀ; None: the identity
    input_factor: Tensor  # (g, d, d) C: A = C Cᵀ; or (g or 1, 1, 1), a multiple of the identity
    width: int  # a′, the inputs but the bias
    num_columns: int  # K

    def unwhiten(self, U: Tensor) -> Tensor:
        """F⁻ᵀ U C⁻¹ for U (g, a, d)."""
        if self.output_factor is not None:
            U = torch.linalg.solve_triangular(self.output_factor.mT, U, upper=True)
        return _solve_right(self.input_factor, U, upper=False)

    def solve(self, v: Tensor) -> Tensor:
        X = self._unflatten(v)  # Ω⁻¹ X A⁻¹
        if self.output_factor is not None:
            X = torch.linalg.solve_triangular(self.output_factor, X, upper=False)
        return self._flatten(self.unwhiten(_solve_right(self.input_factor.mT, X, upper=True)))

    def apply(self, v: Tensor) -> Tensor:
        X = self._unflatten(v)  # Ω X A
        if self.output_factor is not None:
            X = self.output_factor @ (self.output_factor.mT @ X)
        if self.input_factor.shape[2] == 1:
            return self._flatten(X * self.input_factor**2)
        return self._flatten((X @ self.input_factor) @ self.input_factor.mT)

    def transpose(self, y: Tensor) -> Tensor:
        weighted = self.outputs * y  # (g, a, K N)
        if self.num_columns != 1:
            weighted = weighted.unflatten(2, (self.num_columns, self.inputs.shape[1])).sum(2)  # (g, a, N)
        return self._flatten(self.unwhiten(weighted @ self.inputs))

    @property
    def size(self) -> int:
        return self.outputs.shape[1] * self.inputs[:, 0].numel()

    def _flatten(self, X: Tensor) -> Tensor:
        """(g, a, d) → the layers' part of a flat vector: each weight, then its bias."""
        return torch.cat([X[:, :, : self.width].flatten(1), X[:, :, self.width :].flatten(1)], 1).flatten()

    def _unflatten(self, v: Tensor) -> Tensor:
        """The inverse of `_flatten`."""
        a, d = self.outputs.shape[1], self.inputs.shape[2]
        weight, bias = v.view(len(self.inputs), -1).split((a * self.width, a * (d - self.width)), 1)
        return torch.cat([weight.unflatten(1, (a, self.width)), bias.unflatten(1, (a, d - self.width))], 2)


def _solve_right(C: Tensor, X: Tensor, upper: bool) -> Tensor:
    """X C⁻¹, C triangular, or (…, 1, 1) a multiple of the identity."""
    return X / C if C.shape[2] == 1 else torch.linalg.solve_triangular(C, X, upper=upper, left=False)


def _identity_group(inputs: Tensor, outputs: Tensor, multiple: float, width: int, K: int) -> _LayerGroup:
    """D = multiple · I, for z̃ (g, N, d) and Eᵀ (g, a, K N)."""
    root = math.sqrt(multiple)
    return _LayerGroup(inputs, outputs / root, None, inputs.new_full((1, 1, 1), root), width, K)


def split_damping(Omega: Tensor, inputs: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """√ρ π and √ρ/π (…), to be added to Ω (…, a, a) and to A = z̃ᵀz̃/N. π² = (tr Ω / a) / (tr A / d)."""
    mean_Omega, mean_A = Omega.diagonal(dim1=-2, dim2=-1).mean(-1), inputs.square().mean((-2, -1))
    # dead inputs (A = 0) leave nothing to balance
    pi = torch.where(mean_A > 0, mean_Omega / mean_A, 1.0).sqrt()
    return math.sqrt(rho) * pi, math.sqrt(rho) / pi


def _state_group(inputs: Tensor, outputs: Tensor, Omega: Tensor, rho: float, width: int, K: int) -> _LayerGroup:
    """D = (Ω + √ρ π I) ⊗ (A + (√ρ/π) I), π as in `split_damping`, for z̃ (g, N, d) and Eᵀ (g, a, K N).

    A = z̃ᵀz̃/N. With fewer samples than inputs, N < d, A is the multiple of the identity with the same trace: directions
    that no sample has would otherwise cost next to nothing.
    """
    N, d = inputs.shape[1:]
    of_Omega, of_A = (x[:, None] for x in split_damping(Omega, inputs, rho))
    Omega = Omega.clone()
    Omega.diagonal(dim1=1, dim2=2).add_(of_Omega)
    if N < d:
        C = (inputs.square().mean((1, 2))[:, None] + of_A).sqrt()[:, :, None]
    else:
        A = inputs.mT @ inputs / N
        A.diagonal(dim1=1, dim2=2).add_(of_A)
        C = torch.linalg.cholesky(A)
    F = torch.linalg.cholesky(Omega)
    eye = torch.eye(F.shape[2], dtype=F.dtype, device=F.device)
    outputs = torch.linalg.solve_triangular(F, eye, upper=False) @ outputs  # of the outputs it would make two copies
    return _LayerGroup(_solve_right(C.mT, inputs, upper=True), outputs, F, C, width, K)


class DampedSystem(NamedTuple):
    """M + λ, factored: a `GramSystem` at one λ."""

    blocks: Sequence[MetricBlock]
    matrix: Tensor  # (K N, K N) M
    factor: Tensor  # (K N, K N) the Cholesky factor of M + λ
    damping: float  # λ; with metric='parameter', λ + c

    def solve(self, y: Tensor) -> Tensor:
        """(M + λ)⁻¹ y for y (K N,)."""
        return torch.cholesky_solve(y[:, None], self.factor)[:, 0]

    def apply_metric(self, v: Tensor) -> Tensor:
        """λ D v, for v (P,)."""
        return self.damping * torch.cat([block.apply(part) for block, part in self._parts(v)])

    def solve_metric(self, v: Tensor) -> Tensor:
        """(λ D)⁻¹ v, for v (P,)."""
        return torch.cat([block.solve(part) for block, part in self._parts(v)]) / self.damping

    def _parts(self, v: Tensor) -> Iterable[tuple[MetricBlock, Tensor]]:
        return zip(self.blocks, v.split([block.size for block in self.blocks]), strict=True)

    def transpose(self, y: Tensor) -> Tensor:
        """D⁻¹ Jᵀ y (P,) for y (K N,)."""
        return torch.cat([block.transpose(y) for block in self.blocks])


class GramSystem(ABC):
    """(JᵀJ + cI + λD) x = −Jᵀw − g at one batch, for any λ > 0. c is the factor of an L2 term ½c‖θ‖².

    metric='parameter': D = I. metric='state': D contains ρI, and measures the change of activations besides.

    With metric='state' and c > 0, ρ + c/λ replaces ρ. Then λD contains cI exactly, and what it contains besides is
    positive semidefinite and vanishes with λ. This takes a Gram matrix for each λ.

    rest: g (P,), the part of the gradient that Jᵀw doesn't hold, or None. residual: w (N, K), of the batch.
    without_residual: w = 0, all of the gradient is in `rest`.
    """

    def __init__(
        self,
        output: ScaledOutput,
        metric: str,
        metric_damping: float,
        weight_decay: float,
        rest: Tensor | None,
        without_residual: bool,
    ):
        self.metric, self.metric_damping, self.weight_decay = metric, metric_damping, weight_decay
        self.root, w = output.root, output.residual.mT.flatten()  # (K N,)
        self.shape = (self.root.shape[2], len(self.root))  # K, N
        self.residual = torch.zeros_like(w) if without_residual else w
        self.rest = rest
        self._whitened: tuple[float, Sequence[MetricBlock], Tensor] | None = None  # for the last ρ

    @abstractmethod
    def _blocks(self, rho: float) -> tuple[Sequence[MetricBlock], Tensor]:
        """J with the metric, and M."""

    @abstractmethod
    def scaled_tangent(self, x: Tensor) -> Tensor:
        """J x (K N,) for x (P,)."""

    def factorize(self, damping: float) -> DampedSystem | None:
        """M + λ, factored. None where, by overflow or rounding, it or a factor of the metric has no Cholesky factor."""
        state = self.metric == "state"
        shift = damping if state else damping + self.weight_decay
        rho = self.metric_damping + self.weight_decay / damping if state else 1.0
        try:
            if self._whitened is None or self._whitened[0] != rho:
                self._whitened = (rho, *self._blocks(rho))
        except torch.linalg.LinAlgError:
            return None
        _, blocks, M = self._whitened
        shifted = M.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        return DampedSystem(blocks, M, factor, shift) if int(info) == 0 else None

    def has_residual(self) -> bool:
        """Whether w is accurate. It is not for a sample whose π_y underflows."""
        largest = 1e100  # of √N w; squares of larger ones overflow
        return bool((self.residual.abs() * math.sqrt(self.shape[1]) < largest).all())  # False for NaN

    def step(self, damped: DampedSystem) -> tuple[Tensor, Tensor]:
        """x (P,) and J x (K N,)."""
        if self.rest is None:
            y = damped.solve(self.residual)
            return -damped.transpose(y), -(damped.matrix @ y)
        scaled = damped.solve_metric(self.rest)
        J_scaled = self.scaled_tangent(scaled)
        y = damped.solve(self.residual - J_scaled)
        return -damped.transpose(y) - scaled, -(damped.matrix @ y) - J_scaled

    def inverse(self, damped: DampedSystem, v: Tensor) -> Tensor:
        """(JᵀJ + cI + λD)⁻¹ v, for v (P,)."""
        scaled = damped.solve_metric(v)
        return scaled - damped.transpose(damped.solve(self.scaled_tangent(scaled)))

    def scale(self, logits: Tensor) -> Tensor:
        """Sᵀ times changes of the logits (N, C): (K N,)."""
        return torch.einsum("nck,nc->kn", self.root, logits).flatten()


class ChainGramSystem(GramSystem):
    """Of a fully connected network's layers.

    metric='state': D measures the change of all hidden pre-activations, mean over the batch. In hidden layers
    D_ℓ = (Ω_ℓ + √ρ π I) ⊗ (A_ℓ + (√ρ/π) I), in the output layer D_L = ρI. Ω_ℓ is that of `state_weights`. A_ℓ = z̃ᵀz̃/N;
    where N < d, the multiple of I with the same trace.
    """

    def __init__(
        self,
        layers: Sequence[LayerDerivatives],
        metric: str,
        metric_damping: float,
        weight_decay: float,
        rest: Tensor | None,
        without_residual: bool = False,
    ):
        super().__init__(scaled_output(layers[-1]), metric, metric_damping, weight_decay, rest, without_residual)
        self.layers = layers
        self._jacobians = output_jacobians(layers, self.root)
        self._Omega = state_weights(layers) if metric == "state" else []

    def scaled_tangent(self, x: Tensor) -> Tensor:
        return self.scale(_logit_tangent(self.layers, x[:, None])[0])

    def _blocks(self, rho: float) -> tuple[Sequence[MetricBlock], Tensor]:
        groups = self._groups(rho)
        factors = (z for x in groups for z in zip(x.outputs, x.inputs @ x.inputs.mT, strict=True))
        return groups, _gram_matrix(factors, self.shape)

    def _groups(self, rho: float) -> list[_LayerGroup]:
        groups, last, K = [], len(self.layers) - 1, self.shape[0]
        shapes = [(layer.weight.shape, layer.inputs.shape[1], i == last) for i, layer in enumerate(self.layers)]
        for (weight, _, is_last), indices in groupby(range(last + 1), key=shapes.__getitem__):
            members = list(indices)
            inputs = torch.stack([self.layers[i].inputs for i in members])
            outputs = torch.stack([self._jacobians[i].flatten(0, 1) for i in members]).mT
            if self.metric == "parameter" or is_last:
                groups.append(_identity_group(inputs, outputs, rho, weight[1], K))
            else:
                Omega = torch.stack([self._Omega[i] for i in members])
                groups.append(_state_group(inputs, outputs, Omega, rho, weight[1], K))
        return groups


def _gram_matrix(factors: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int]) -> Tensor:
    """M = Σ_ℓ (EᵀE) ∘ (z̃z̃ᵀ), (K N, K N). factors: E (a, K N) and z̃z̃ᵀ (N, N) or (1, 1) of each, both whitened."""
    K, N = shape
    M = product = torch.empty(0)
    for index, (E, similarity) in enumerate(factors):
        if index == 0:
            M, product = E.new_zeros(K, N, K, N), E.new_empty(K * N, K * N)
        torch.mm(E.mT, E, out=product)
        M.addcmul_(product.view_as(M), similarity[None, :, None, :])
    return M.view(K * N, K * N)


class JacobianBlock(Protocol):
    """Columns of J, of p parameters that follow each other and share a damping."""

    @property
    def size(self) -> int:
        """p"""

    def factors(self, weight: float) -> tuple[Tensor, Tensor]:
        """weight · J Jᵀ as `_gram_matrix` takes it."""

    def times(self, v: Tensor) -> Tensor:
        """J v (K N, k) for v (p, k)."""

    def transpose(self, y: Tensor) -> Tensor:
        """Jᵀy (p, k) for y (K N, k)."""


class Rows(NamedTuple):
    """J as it is."""

    rows: Tensor  # (K N, p)

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def factors(self, weight: float) -> tuple[Tensor, Tensor]:
        return self.rows.mT, self.rows.new_full((1, 1), weight)

    def times(self, v: Tensor) -> Tensor:
        return self.rows @ v

    def transpose(self, y: Tensor) -> Tensor:
        return self.rows.mT @ y


class OuterProducts(NamedTuple):
    """Row (k, b) of J is the outer product of E[k, b] and z̃[b]: a weight, then its bias if z̃ has a column for it."""

    outputs: Tensor  # (K, N, a) E
    inputs: Tensor  # (N, d) z̃
    width: int  # of the weight

    @property
    def size(self) -> int:
        return self.outputs.shape[2] * self.inputs.shape[1]

    def factors(self, weight: float) -> tuple[Tensor, Tensor]:
        return self.outputs.flatten(0, 1).mT, weight * (self.inputs @ self.inputs.mT)

    def times(self, v: Tensor) -> Tensor:
        a, d = self.outputs.shape[2], self.inputs.shape[1]
        weight, bias = v.mT.split((a * self.width, a * (d - self.width)), 1)
        X = torch.cat([weight.unflatten(1, (a, self.width)), bias.unflatten(1, (a, d - self.width))], 2)
        s = self.inputs @ X.mT  # (k, N, a)
        return (self.outputs.transpose(0, 1) @ s.permute(1, 2, 0)).transpose(0, 1).flatten(0, 1)

    def transpose(self, y: Tensor) -> Tensor:
        K, N, _ = self.outputs.shape
        delta = self.outputs.permute(1, 2, 0) @ y.unflatten(0, (K, N)).transpose(0, 1)  # (N, a, k)
        X = delta.permute(2, 1, 0) @ self.inputs  # (k, a, d)
        return torch.cat([X[:, :, : self.width].flatten(1), X[:, :, self.width :].flatten(1)], 1).mT


class ScaledJacobian:
    """J (K N, P), the derivatives of the scaled outputs Sᵀh, in blocks of the parameters."""

    def __init__(self, blocks: Sequence[JacobianBlock], shape: tuple[int, int]):
        self.blocks, self.shape = blocks, shape  # K, N

    @classmethod
    def of_chain(cls, layers: Sequence[LayerDerivatives]) -> ScaledJacobian:
        """A block for each layer."""
        root = scaled_output(layers[-1]).root  # (N, C, K)
        pairs = zip(output_jacobians(layers, root), layers, strict=True)
        blocks = [OuterProducts(E, x.inputs, x.weight.shape[1]) for E, x in pairs]
        return cls(blocks, (root.shape[2], len(root)))

    @cached_property
    def gram(self) -> Tensor:
        """J Jᵀ (K N, K N)"""
        return self.weighted_gram([1.0] * len(self.blocks))

    def weighted_gram(self, weights: Sequence[float]) -> Tensor:
        """J W Jᵀ, with one weight a block."""
        pairs = zip(self.blocks, weights, strict=True)
        return _gram_matrix((block.factors(weight) for block, weight in pairs), self.shape)

    def times(self, v: Tensor) -> Tensor:
        """J v (K N, k) for v (P, k)."""
        pieces = v.split([block.size for block in self.blocks])
        first, *rest = (block.times(piece) for block, piece in zip(self.blocks, pieces, strict=True))
        return sum(rest, first)

    def transpose(self, y: Tensor) -> Tensor:
        """Jᵀy (P, k) for y (K N, k)."""
        return torch.cat([block.transpose(y) for block in self.blocks])


class GramFactor:
    """JᵀJ + D, D the dampings, by I + J D⁻¹Jᵀ in N K unknowns: route 'gram' of hessian.py.

    Solves: (JᵀJ + D)⁻¹v = D⁻¹ (v − Jᵀ (I + J D⁻¹Jᵀ)⁻¹ J D⁻¹v).
    Inertia: [[D, Jᵀ], [J, −I]] may be eliminated from either end. So the negative eigenvalues of JᵀJ + D are as many as
    those of D, less those of I + J D⁻¹Jᵀ; and its determinant is the product of theirs.
    """

    def __init__(self, jacobian: ScaledJacobian, epsilons: Sequence[float]):
        """epsilons: one for each block of the Jacobian."""
        self._jacobian = jacobian
        pairs = list(zip(jacobian.blocks, epsilons, strict=True))
        scale = max(map(abs, epsilons))
        plain = len(set(epsilons)) == 1  # then J Jᵀ serves for any damping
        M = jacobian.gram if plain else jacobian.weighted_gram([scale / epsilon for epsilon in epsilons])
        self._damping = torch.cat([M.new_full((block.size, 1), epsilon) for block, epsilon in pairs])
        shifted = M / (epsilons[0] if plain else scale)
        damping = epsilons[0] if plain else tuple(epsilons)
        if not torch.finfo(M.dtype).eps * float(torch.linalg.matrix_norm(shifted)) < 1:
            raise SingularHessianError(
                f"rounding of JᵀΛJ is larger than the damping, {damping}: choose a larger one, or scale the inputs",
                damping=damping,
            )
        shifted.diagonal().add_(1)
        factor = factor_symmetric(shifted)
        if factor is None:
            raise SingularHessianError(
                f"JᵀΛJ + damping·I has an exactly singular Gram matrix at damping={damping}: choose another",
                damping=damping,
            )
        self._factor = factor
        self.num_negative = int((self._damping < 0).sum()) - factor.num_negative
        self.logabsdet = float(self._damping.abs().log().sum()) + factor.logabsdet

    def solve(self, v: Tensor) -> Tensor:
        """(JᵀJ + D)⁻¹v for v (P, k)."""
        scaled = v / self._damping
        y = self._factor.solve(self._jacobian.times(scaled))
        return scaled - self._jacobian.transpose(y) / self._damping


def gauss_newton_product(layers: Sequence[LayerDerivatives], v: Tensor) -> Tensor:
    """JᵀΛJ v for v (P, k): two passes through the network."""
    return _transposed(layers, layers[-1].loss_hessian.apply(_logit_tangent(layers, v)))


def _logit_tangent(layers: Sequence[LayerDerivatives], v: Tensor) -> Tensor:
    """∂h_L/∂θ v (k, N, C) for v (P, k)."""
    for s, _ in forward_tangent(layers, blocks_of(layers, v)):
        logits = s
    return logits


def _transposed(layers: Sequence[LayerDerivatives], delta: Tensor) -> Tensor:
    """(∂h_L/∂θ)ᵀ of δ (k, N, C): (P, k)."""
    products, beta = [], None
    for layer in reversed(layers):
        if beta is not None:
            delta = layer.slope * beta
        products.append(delta.mT @ layer.inputs)
        beta = with_skip(layer.skip, delta @ layer.weight, beta)
    return flatten_blocks(layers, products[::-1])

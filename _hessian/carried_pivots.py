"""Carried pivots: coordinates whose elimination would lose digits are eliminated in the layer below.

The pivot G of hessian.py is a Schur complement of layers ℓ … L alone. It can have an eigenvalue near 0 that couples
strongly, though H + εI has none. Eliminating it would add numbers to P that are huge and cancel later. Such coordinates
w of Y, and parts of X⊥ (whose pivot is ε), wait. P is then a quadratic in t and w, and the next pivot that of Y and w:

    ½ [t; w]ᵀ [[P, bᵀ], [b, diag(d)]] [t; w]      [[εI + JᵀK J, JᵀK_tw], [·, diag(d)]]      K_tw = φ′bᵀ
    coupling    [S + JᵀK A; K_wt A + σb]

Layer 1, which couples to nothing, eliminates all that is left. At dampings of 1e-3 or more, nothing waits as a rule.

Reference: Duff & Reid (1983), where they are called delayed pivots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.layers import LayerDerivatives, same_shape_groups
from _hessian.reduced_parameters import Reduced, reduced_inputs
from _hessian.symmetric_factor import SymmetricFactor

_TINY = 1e-30  # keeps 0/0 out
_TOGETHER = 2**16  # natural sizes are computed for layers of one shape together, up to so many numbers
_GROWTH = 1e4  # a pivot that would add more than so many times the cost-to-go's natural size to it is carried


class SweepInputs(NamedTuple):
    """What a sweep needs of the layers that no damping changes."""

    reduced: list[Reduced]
    scales: list[float]  # the natural size of the cost-to-go below each layer, see `_natural_scales`
    couplings: list[float]  # ‖λ‖ of each layer


def prepare(layers: Sequence[LayerDerivatives]) -> SweepInputs:
    reduced = reduced_inputs(layers)
    adjoints = (torch.stack([layers[i].adjoint for i in members]) for members in same_shape_groups(layers))
    norms = torch.cat([torch.linalg.vector_norm(adjoint, dim=(1, 2)) for adjoint in adjoints])
    return SweepInputs(reduced, _natural_scales(layers, reduced), norms.tolist())


def _natural_scales(layers: Sequence[LayerDerivatives], reduced: Sequence[Reduced]) -> list[float]:
    """The largest entry of the cost-to-go with nothing eliminated: the Hessian of the loss in t_{ℓ-1}.

    The couplings λ of this layer and those above are counted as curvatures, c I. With nothing eliminated samples don't
    mix: P is (N, a, a), and one pass down takes O(N a³) a layer,

        P ← TᵀP T + Wᵀdiag(β φ″)W + c I,    T = φ′W + σI
    """
    if len(layers) == 1:
        return [0.0]  # below layer 1 there is nothing
    last, hidden = layers[-1], layers[1:-1]
    couplings: list[Tensor] = []
    for members in same_shape_groups(layers, _TOGETHER):
        adjoint, rows = (
            torch.stack([layers[i].adjoint for i in members]),
            torch.stack([reduced[i].rows for i in members]),
        )
        couplings += adjoint.abs().amax((1, 2)) / rows.abs().amax((1, 2)).clamp_min(_TINY)
    P = last.weight.mT @ last.loss_hessian.times(last.weight)  # (N, a′, a′)
    P.diagonal(dim1=1, dim2=2).add_(couplings[-1])
    largest = [P.abs().amax()[None]]
    for members in reversed(list(same_shape_groups(hidden, _TOGETHER))):
        weight, slope, curvature = (
            torch.stack([getattr(hidden[i], name) for i in members]) for name in ("weight", "slope", "curvature")
        )
        W = weight[:, None]
        T = slope[..., None] * W  # (g, N, a, a′)
        T.diagonal(dim1=2, dim2=3).add_(W.new_tensor([hidden[i].skip for i in members])[:, None, None])
        below = W.mT @ (curvature[..., None] * W)  # (g, N, a′, a′)
        below.diagonal(dim1=2, dim2=3).add_(torch.stack([couplings[1 + i] for i in members])[:, None, None])
        for T_l, P_below in zip(reversed(T.unbind()), reversed(below.unbind()), strict=True):
            P = P_below.baddbmm_(T_l.mT, torch.bmm(P, T_l))
        largest.append(below.abs().amax((1, 2, 3)))
    return [0.0, *torch.cat(largest[::-1]).tolist()]


class Waiting(NamedTuple):
    """What is carried, as the layer below sees it: ½ wᵀdiag(d) w + wᵀb t."""

    coupling: Tensor  # (k, n′) b
    values: Tensor  # (k,) d


class CarriedOutside(NamedTuple):
    """The parts U Z Q⊥ᵀ of X⊥ that are carried, Z (j, d − r)."""

    left: Tensor  # (a, j) U, orthonormal
    basis: Tensor  # (d, d − r) Q⊥

    @property
    def size(self) -> int:
        """The numbers in Z."""
        return self.left.shape[1] * self.basis.shape[1]

    def split_right_hand_side(self, layer: LayerDerivatives, V: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
        """For the right-hand side V (k, a, d) and V⊥: λ(I − UUᵀ)V⊥ (k, N, a′) of the parts that are not carried, and
        the linear term −UᵀV Q⊥ in Z (k, j (d − r))."""
        U, free = self.left, outside[:, :, : layer.weight.shape[1]]
        return layer.adjoint @ (free - U @ (U.mT @ free)), -(U.mT @ V @ self.basis).flatten(1)

    def replace(self, x: Tensor, Z: Tensor) -> None:
        """x ← (I − UUᵀ)x + U Z Q⊥ᵀ, for X⊥ (k, a, d) and Z (k, j (d − r))."""
        U = self.left
        x += U @ Z.unflatten(1, (U.shape[1], -1)) @ self.basis.mT - U @ (U.mT @ x)


class Carried(NamedTuple):
    """What a layer leaves to the one below: some of the coordinates e = Fᵀ[Y; w] of its pivot, e = root · ω, and parts
    of X⊥. ω, then Z, are the w of the layer below."""

    rows: Tensor  # (k₁,) which of e
    root: Tensor  # (k₁,)
    outside: CarriedOutside | None

    def take_linear_terms(self, white: Tensor) -> Tensor:
        """The linear terms (k, k₁) in ω, taken out of those in e (k, m)."""
        terms = self.root * white[:, self.rows]
        white[:, self.rows] = 0.0
        return terms

    def insert_values(self, e: Tensor, w: Tensor) -> None:
        """ω into its places in e (k, m)."""
        e[:, self.rows] = self.root * w[:, : len(self.rows)]

    def remaining(self, adjoint: Tensor) -> Tensor:
        """λ(I − UUᵀ), of the parts of X⊥ that are not carried."""
        if self.outside is None:
            return adjoint
        U = self.outside.left
        return adjoint - (adjoint @ U) @ U.mT


def carry(
    layer: LayerDerivatives,
    inputs: SweepInputs,
    index: int,
    epsilon: float,
    factor: SymmetricFactor,
    W: Tensor,
) -> tuple[Carried | None, Waiting | None]:
    """Which pivots of layer `index` to leave to the one below, and their quadratic there; as a rule none (None).

    Carried is a pivot whose elimination would add more than _GROWTH times its natural size to the cost-to-go. Its row
    of the whitened coupling W is set to zero. ω is scaled so that all couplings to t are of the size of Y's.
    """
    reduced, scale, norm = inputs.reduced[index], inputs.scales[index], inputs.couplings[index]
    if not 0 < scale < math.inf:  # nothing couples, or overflow, which is found elsewhere
        return None, None
    bound = _GROWTH * scale
    basis = reduced.basis if norm > math.sqrt(bound * abs(epsilon)) else None
    if basis is None and float(torch.linalg.vector_norm(W)) <= math.sqrt(bound):
        return None, None  # no row of W is longer than all of it
    length = torch.linalg.vector_norm(W, dim=1)
    rows = (length > math.sqrt(bound)).nonzero()[:, 0]
    outside = None if basis is None else _carried_outside(layer, basis, bound * abs(epsilon))
    if len(rows) == 0 and outside is None:
        return None, None
    root = scale * torch.linalg.vector_norm(reduced.rows) / length[rows]
    coupling = root[:, None] * W[rows]
    values = root**2
    if factor.signs is not None:
        values = values * factor.signs[rows, 0]
    W[rows] = 0.0
    if outside is not None:
        free = outside.basis[: layer.weight.shape[1]]
        of_outside = torch.einsum("bi,kj->ijbk", layer.adjoint @ outside.left, free).reshape(-1, W.shape[1])
        coupling = torch.cat([coupling, of_outside])
        values = torch.cat([values, values.new_full((len(of_outside),), epsilon)])
    return Carried(rows, root, outside), Waiting(coupling, values)


def _carried_outside(layer: LayerDerivatives, basis: Tensor, bound: float) -> CarriedOutside | None:
    """The parts of X⊥ that λ couples by more than the bound (‖λ u‖² for a unit u), for Q (d, r)."""
    _, s, V = torch.linalg.svd(layer.adjoint, full_matrices=False)
    left = V[s * s > bound].mT
    if left.shape[1] == 0:
        return None
    return CarriedOutside(left, torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :])


def with_carried(
    layer: LayerDerivatives, R: Tensor, waiting: Waiting, G: Tensor, B: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """G and B of [Y; w]: K_wt = P_wt φ′, K_ww = P_ww, and w meets t_{ℓ-1} by K_wt A + σ P_wt."""
    k, N, m = len(waiting.coupling), len(R), len(G)
    K = waiting.coupling * layer.slope.flatten()  # (k, n)
    extended = G.new_zeros(m + k, m + k)
    extended[:m, :m] = G
    extended[m:, :m] = (R.mT @ K.view(k, N, -1)).flatten(1)
    extended[:m, m:] = extended[m:, :m].mT
    extended[m:, m:].diagonal().copy_(waiting.values)
    if B is None:
        return extended, None
    rows = (K.view(k * N, -1) @ layer.weight).view(k, -1)
    if layer.skip:
        rows.add_(waiting.coupling, alpha=layer.skip)
    return extended, torch.cat([B, rows])

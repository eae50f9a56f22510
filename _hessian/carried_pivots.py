"""Carried pivots: coordinates whose elimination would lose digits are eliminated with the next parameters.

A pivot G is a Schur complement of the operations above alone. It can have an eigenvalue near 0 that couples strongly,
though H + εI has none. Eliminating it would add numbers to P that are huge and cancel later. Such coordinates w of Y,
and parts of X⊥ (whose pivot is ε), stay live. P is then a quadratic in t and w, and the next pivot that of Y and w:

    ½ [t; w]ᵀ [[P, bᵀ], [b, diag(d)]] [t; w]      [[εI + JᵀK J, JᵀK_tw], [·, diag(d)]]      K_tw = φ′bᵀ
    coupling    [S + JᵀK A; K_wt A + σb]

The first layer, which couples to nothing, eliminates all that is left. At dampings of 1e-3 or more, nothing is carried
as a rule. An operation asks for it by knowing the natural size of its inputs' cost-to-go.

Reference: Duff & Reid (1983), where they are called delayed pivots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from _hessian.graph import Value
from _hessian.symmetric_factor import SymmetricFactor

_GROWTH = 1e4  # a pivot that would add more than so many times the cost-to-go's natural size to it is carried


class Natural(NamedTuple):
    """Sizes of one operation that are known before anything is eliminated."""

    scale: float  # the largest entry of the cost-to-go of its inputs
    coupling: float  # ‖λ‖
    rows: float  # ‖R‖

    @property
    def bound(self) -> float:
        """Of what a pivot may add to the cost-to-go. Infinite where nothing couples."""
        return _GROWTH * self.scale or math.inf  # NaN or infinite after an overflow, which is found elsewhere


class Carried(NamedTuple):
    """Some of the coordinates e = Fᵀ[Y; w] of a pivot stay live, e = root · ω."""

    value: Value  # ω
    rows: Tensor  # (k₁,) which of e
    root: Tensor  # (k₁,)

    def take_linear_terms(self, white: Tensor) -> Tensor:
        """The linear terms (k, k₁) in ω, taken out of those in e (k, m)."""
        terms = self.root * white[:, self.rows]
        white[:, self.rows] = 0.0
        return terms

    def insert(self, e: Tensor, t: Mapping[Value, Tensor]) -> None:
        """ω into its places in e (k, m)."""
        e[:, self.rows] = self.root * t[self.value]


def carry(name: str, natural: Natural, factor: SymmetricFactor, W: Tensor) -> tuple[Carried, Tensor, Tensor] | None:
    """Which pivots to carry, their coupling b (k₁, n) and d (k₁,); as a rule none.

    Carried is a pivot whose elimination would add more than `natural.bound` to the cost-to-go. Its row of the whitened
    coupling W is set to zero. ω is scaled so that all couplings to t are of the size of Y's.
    """
    limit = math.sqrt(natural.bound)
    if not float(torch.linalg.vector_norm(W)) > limit:  # no row of W is longer than all of it
        return None
    length = torch.linalg.vector_norm(W, dim=1)
    rows = (length > limit).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    root = natural.scale * natural.rows / length[rows]
    coupling, values = root[:, None] * W[rows], root**2
    if factor.signs is not None:
        values = values * factor.signs[rows, 0]
    W[rows] = 0.0
    return Carried(Value(f"{name}, carried", rows.shape, None, 1), rows, root), coupling, values


class CarriedOutside(NamedTuple):
    """The parts U Z Q⊥ᵀ of X⊥ stay live, Z (j, d − r)."""

    value: Value  # Z
    left: Tensor  # (a, j) U, orthonormal
    basis: Tensor  # (d, d − r) Q⊥
    adjoint: Tensor  # (N, j) λU
    width: int  # of the inputs without the bias

    def coupling(self) -> Tensor:
        """Of Z to z, (j (d − r), n_z)."""
        return torch.einsum("bj,kq->jqbk", self.adjoint, self.basis[: self.width]).flatten(2).flatten(0, 1)

    def split_right_hand_side(self, outside: Tensor) -> tuple[Tensor, Tensor]:
        """From V⊥ (k, a, d): λ UUᵀV⊥ (k, n_z), which is not X⊥'s any more, and the linear term −UᵀV Q⊥ in Z."""
        part = self.left.mT @ outside
        return (self.adjoint @ part[..., : self.width]).flatten(1), -(part @ self.basis).flatten(1)

    def insert(self, x: Tensor, t: Mapping[Value, Tensor]) -> None:
        """x ← (I − UUᵀ)x + U Z Q⊥ᵀ, for X⊥ (k, a, d)."""
        U, Z = self.left, t[self.value]
        x += U @ Z.unflatten(1, (U.shape[1], -1)) @ self.basis.mT - U @ (U.mT @ x)


def carry_outside(
    name: str, natural: Natural, adjoint: Tensor, Q: Tensor, width: int, epsilon: float
) -> CarriedOutside | None:
    """The parts of X⊥ that λ (N, a) couples too strongly: ‖λu‖²/ε beyond the bound for a unit u. For Q (d, r)."""
    limit = natural.bound * abs(epsilon)
    if not natural.coupling > math.sqrt(limit):
        return None
    _, s, V = torch.linalg.svd(adjoint, full_matrices=False)
    left = V[s * s > limit].mT
    if left.shape[1] == 0:
        return None
    basis = torch.linalg.qr(Q, mode="complete").Q[:, Q.shape[1] :]
    value = Value(f"{name}, outside", torch.Size([left.shape[1] * basis.shape[1]]), None, 1)
    return CarriedOutside(value, left, basis, adjoint @ left, width)

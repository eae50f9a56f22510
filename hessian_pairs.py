"""Numbers of twice float64's digits, for residuals that float64 products can't tell from their rounding.

A number is high + low (Dekker 1971), |low| a rounding of high. A product of matrices splits both operands into leading
bits, few enough for their product to be exact in float64 in any order, and the rest, whose products are as much smaller
(Ozaki, Ogita, Oishi & Rump 2012, with two pieces): for sums of n terms the error is n^1.5 · 2⁻⁷⁹ or so of the largest
entries' product, where float64's is up to n · 2⁻⁵³ of it.

Formulas of matrix calculus, linear in the tensor that a Pair takes the place of, need no change: the arithmetic is by
operators, `tensor @ pair` included. Entries above 1e300 overflow to NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_linear_algebra import power_of_two

_DIGITS = 53
_SPLITTER = 2.0**27 + 1


@dataclass(frozen=True, eq=False)
class Pair:
    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Pair:
        return cls(x, torch.zeros_like(x))

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    @property
    def mT(self) -> Pair:
        return Pair(self.high.mT, self.low.mT)

    def __getitem__(self, index) -> Pair:
        return Pair(self.high[index], self.low[index])

    def __setitem__(self, index, value: Pair) -> None:
        self.high[index], self.low[index] = value.high, value.low

    def expand(self, *shape: int) -> Pair:
        return Pair(self.high.expand(*shape), self.low.expand(*shape))

    def gather(self, dim: int, index: Tensor) -> Pair:
        return Pair(self.high.gather(dim, index), self.low.gather(dim, index))

    def __neg__(self) -> Pair:
        return Pair(-self.high, -self.low)

    def __add__(self, other: Pair | Tensor) -> Pair:
        other = other if isinstance(other, Pair) else Pair.of(other)
        total = self.high + other.high
        part = total - self.high
        error = (self.high - (total - part)) + (other.high - part)
        return _normalized(total, error + (self.low + other.low))

    __radd__ = __add__

    def __iadd__(self, other: Pair | Tensor) -> Pair:
        total = self + other
        self.high.copy_(total.high)
        self.low.copy_(total.low)
        return self

    add_ = __iadd__

    def __sub__(self, other: Pair | Tensor) -> Pair:
        return self + -other

    def __rsub__(self, other: Tensor) -> Pair:
        return -self + other

    def __mul__(self, factor: Tensor | float) -> Pair:
        if isinstance(factor, Pair):
            return NotImplemented
        product, error = _two_product(self.high, factor)
        return _normalized(product, error + self.low * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Pair) -> Pair:
        quotient = self.high / divisor.high
        return _normalized(quotient, (self - divisor * quotient).high / divisor.high)

    def __matmul__(self, matrix: Tensor) -> Pair:
        if isinstance(matrix, Pair):
            return NotImplemented
        bits = (_DIGITS - math.ceil(math.log2(max(matrix.shape[-2], 2)))) // 2
        leading, rest = _split(self.high, bits, -1)
        leading_of_matrix, rest_of_matrix = _split(matrix, bits, -2)
        return _normalized(leading @ leading_of_matrix, leading @ rest_of_matrix + rest @ matrix + self.low @ matrix)

    def __rmatmul__(self, matrix: Tensor) -> Pair:
        return (self.mT @ matrix.mT).mT

    def sum(self, dim: int, keepdim: bool) -> Pair:
        """Over the last dimension, which stays."""
        if dim != -1 or not keepdim:
            raise NotImplementedError("a sum of pairs is over the last dimension, with keepdim=True")
        return self @ self.high.new_ones(self.shape[-1], 1)


def _normalized(high: Tensor, low: Tensor) -> Pair:
    """Of |low| ≪ |high|, the same sum with low below a rounding of high."""
    total = high + low
    return Pair(total, low - (total - high))


def _two_product(x: Tensor, y: Tensor | float) -> tuple[Tensor, Tensor]:
    """x y rounded, and the rest of it, exactly (Veltkamp's halves: no fused multiply-add is relied on)."""
    (x1, x2), (y1, y2) = _halves(x), _halves(y)
    product = x * y
    return product, ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2


def _halves(x: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    large = _SPLITTER * x
    high = large - (large - x)
    return high, x - high


def _split(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """The leading bits of the entries, counted from the largest along `dim`, and the rest."""
    # beside this number x is rounded to multiples of 2^(1 - bits) of that power of two, x being below twice it
    large = (1.5 * 2.0 ** (_DIGITS - bits)) * power_of_two(x.abs().amax(dim, keepdim=True))
    leading = (x + large) - large
    return leading, x - leading

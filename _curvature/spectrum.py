"""`Spectrum`: how many eigenvalues lie in each bin, and its picture; counted by eigenvalues or by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from _curvature.counts import EigenvalueCounts
from _curvature.progress import progress
from _hessian.tables import html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 8  # of the magnitudes that are shown, down from the largest


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Exact numbers of eigenvalues in bins. `edges` (B + 1,) ascend; `counts` (B,) are the eigenvalues between
    neighbouring edges. All P eigenvalues lie between the first edge and the last."""

    edges: Tensor
    counts: Tensor
    curvature: str  # 'hessian' or 'gauss_newton'
    eigenvalues: Tensor | None  # (P,) ascending, where H was formed
    num_factorizations: int

    @property
    def num_parameters(self) -> int:
        return int(self.counts.sum())

    def _parts(self) -> tuple[int, int, int]:
        """Eigenvalues in bins below, around and above zero."""
        low, high = self.edges[:-1], self.edges[1:]
        parts = (high <= 0, (low < 0) & (high > 0), low >= 0)
        negative, around, positive = (int(self.counts[part].sum()) for part in parts)
        return negative, around, positive

    def __repr__(self) -> str:
        negative, around, positive = self._parts()
        return (
            f"Spectrum(P={self.num_parameters}, curvature={self.curvature!r}, {negative} below, {around} around and "
            f"{positive} above zero, in {float(self.edges[0]):.3g} … {float(self.edges[-1]):.3g})"
        )

    def _repr_html_(self) -> str:
        """The bins that are not empty."""
        bins = zip(self.edges.tolist(), self.edges[1:].tolist(), self.counts.tolist(), strict=False)
        rows = [(f"{low:.3g} … {high:.3g}", count) for low, high, count in bins if count]
        return f"<p>{self!r}</p>" + html_table(("eigenvalues", "how many"), rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of the counts, on axes that are logarithmic both ways from zero. Needs matplotlib."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure(figsize=(7, 3), layout="constrained").add_subplot()
        magnitudes = self.edges.abs()
        linear = float(magnitudes[magnitudes > 0].min())
        ax.set_xscale("symlog", linthresh=linear, linscale=0.5)
        low, high = self.edges[:-1].numpy(), self.edges[1:].numpy()
        middle = (low + high) / 2
        for chosen, color in ((middle < -linear, "tab:red"), (abs(middle) <= linear, "0.6"), (middle > linear, "C0")):
            ax.bar(low[chosen], self.counts.numpy()[chosen], (high - low)[chosen], align="edge", color=color)
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.7)
        top = int(np.floor(np.log10(max(abs(low[0]), abs(high[-1])))))
        decades = [10.0**d for d in range(top, int(np.ceil(np.log10(linear))) - 1, -2)]
        ax.set_xticks([*(-x for x in decades), 0.0, *reversed(decades)])
        ax.minorticks_off()
        ax.set(xlabel="eigenvalue", ylabel="how many")
        return ax


def symmetric_edges(bins: int, largest: float) -> Tensor:
    """±largest … ±1e-8 largest in equal steps of the logarithm, so many a side, and one bin around zero."""
    side = torch.logspace(-DECADES, 0, bins + 1, dtype=torch.float64) * largest
    return torch.cat([-side.flip(0), side])


def checked_edges(bins: Sequence[float] | Tensor) -> Tensor:
    edges = torch.as_tensor(bins, dtype=torch.float64, device="cpu")
    if edges.dim() != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise ValueError(f"bins must be an integer, or at least two ascending edges, got {bins!r}")
    return edges


def of_eigenvalues(values: Tensor, bins: int | Tensor, curvature: str, num_factorizations: int = 0) -> Spectrum:
    """From all eigenvalues (P,)."""
    values = values.cpu()
    largest = float(values.abs().max())
    edges = bins if isinstance(bins, Tensor) else symmetric_edges(bins, 1.0001 * largest or 1.0)
    below = torch.searchsorted(values, edges)
    below[0], below[-1] = _within(int(below[0]), int(below[-1]), len(values), edges)
    return Spectrum(edges, below.diff(), curvature, values, num_factorizations)


def by_bisection(counts: EigenvalueCounts, bins: int | Tensor, curvature: str, max_factorizations: int) -> Spectrum:
    """By the inertia at the edges. The fullest intervals are halved first; an empty one is left alone. Edges that
    `max_factorizations` doesn't allow are left out."""
    P = counts.num_parameters
    if isinstance(bins, Tensor):
        edges = bins
        below = {i: counts.below(float(edges[i])) for i in (0, len(edges) - 1)}
    else:
        edges, below = _enclosing(counts, bins)
    _within(below[0], below[len(edges) - 1], P, edges)
    for _ in progress(range(max_factorizations), "inertia"):
        known = sorted(below)
        halved = [(below[j] - below[i], i, j) for i, j in zip(known, known[1:], strict=False) if j > i + 1]
        count, i, j = max(halved, default=(0, 0, 0))
        if count == 0:
            break
        below[(i + j) // 2] = counts.below(float(edges[(i + j) // 2]))
    known = sorted(below)
    numbers = torch.tensor([below[i] for i in known])
    return Spectrum(edges[known], numbers.diff(), curvature, None, counts.num_factorizations)


def _enclosing(counts: EigenvalueCounts, bins: int) -> tuple[Tensor, dict[int, int]]:
    """Edges that enclose all eigenvalues, and the counts below the outermost."""
    largest = 1.1 * counts.norm() or 1.0
    while True:
        edges = symmetric_edges(bins, largest)
        below = {0: counts.below(float(edges[0])), len(edges) - 1: counts.below(float(edges[-1]))}
        if (below[0], below[len(edges) - 1]) == (0, counts.num_parameters):
            return edges, below
        largest *= 2


def _within(below: int, at_most: int, num_parameters: int, edges: Tensor) -> tuple[int, int]:
    """That no eigenvalue lies outside of the edges."""
    if (below, at_most) != (0, num_parameters):
        raise ValueError(
            f"{below} eigenvalues lie below the first edge, {float(edges[0]):g}, and {num_parameters - at_most} above "
            f"the last, {float(edges[-1]):g}: pass edges that enclose them all, or a number of bins"
        )
    return below, at_most

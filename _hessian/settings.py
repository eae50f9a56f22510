"""The options of `factorize_hessian`, checked."""

from __future__ import annotations

from typing import NamedTuple

from _hessian.layers import Damping


class Settings(NamedTuple):
    damping: Damping = 0.0
    curvature: str = "hessian"
    route: str = "auto"
    state_damping: float = 0.0
    precision: str = "float64"
    keep: str = "solve"
    checkpoint_layers: bool = False

    def epsilons(self, num_layers: int) -> tuple[float, ...]:
        """ε of each layer."""
        return dampings(self.damping, num_layers)


def dampings(damping: Damping, count: int) -> tuple[float, ...]:
    """One for each of `count`."""
    return damping if isinstance(damping, tuple) else (damping,) * count

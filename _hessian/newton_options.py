"""What the user of `DampedNewton` chooses, and what one step leaves for the next."""

from __future__ import annotations

import math
from numbers import Integral
from typing import NamedTuple, NotRequired, TypedDict

from torch import Tensor

from _hessian.argument_checks import checked_nonnegative, checked_positive


class Options(NamedTuple):
    """The options of `DampedNewton`, which explains them. The optimizer's parameter group holds them by name."""

    curvature: str
    metric: str
    route: str
    curvature_batch: int | None
    cg_iterations: int
    weight_decay: float
    metric_damping: float | None
    gtol: float
    htol: float
    seed: int

    def check(self) -> None:
        for name, value, choices in (
            ("curvature", self.curvature, ("auto", "gauss_newton", "hessian")),
            ("metric", self.metric, ("state", "parameter")),
            ("route", self.route, ("auto", "gram", "sweep")),
        ):
            if value not in choices:
                choices = ("auto", *choices) if name == "metric" else choices
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")
        if self.curvature_batch is not None and not _is_integer(self.curvature_batch, 1):
            raise ValueError(
                f"curvature_batch must be an integer ≥ 1, or None for all samples, got {self.curvature_batch!r}"
            )
        if not _is_integer(self.cg_iterations, 0):
            raise ValueError(
                "cg_iterations must be an integer ≥ 0, 0 for the curvature of the sub-batch alone, got "
                f"{self.cg_iterations!r}"
            )
        if self.route == "gram" and self.curvature == "hessian":
            raise ValueError("route='gram' has the Gauss–Newton curvature only: pass route='sweep' or curvature='auto'")
        if not _is_integer(self.seed, -math.inf):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.metric_damping is not None:
            checked_positive("metric_damping", self.metric_damping, "pass None for the default")
        for name, number in (("weight_decay", self.weight_decay), ("gtol", self.gtol), ("htol", self.htol)):
            checked_nonnegative(name, number)

    def curvature_samples(self, batch_size: int) -> int:
        """How many samples the curvature is of."""
        return min(batch_size, self.curvature_batch or batch_size)

    def uses_all_samples(self, batch_size: int) -> bool:
        return self.curvature_samples(batch_size) == batch_size

    def uses_conjugate_gradients(self, batch_size: int) -> bool:
        """Whether the sub-batch preconditions conjugate gradients on the whole batch."""
        return self.curvature != "hessian" and self.cg_iterations > 0 and not self.uses_all_samples(batch_size)


def _is_integer(value: object, minimum: float) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


class State(TypedDict):
    """The optimizer's `state`, saved in checkpoints."""

    step: int  # steps so far
    damping: float  # λ that the next Gauss–Newton step tries first
    hessian_damping: float  # the same for the exact Hessian
    exact: bool  # whether curvature='auto' takes the exact Hessian
    value: float  # f after the last step
    objectives: list[float]  # f before the last Gauss–Newton steps, all on the same data
    last: NotRequired[Tensor]  # (P,) the last step, where conjugate gradients begin on the same data


def initial_state(damping: float) -> State:
    return {
        "step": 0,
        "damping": damping,
        "hessian_damping": damping,
        "exact": False,
        "value": math.nan,
        "objectives": [],
    }

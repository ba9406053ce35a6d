"""PACE: SGD that is pulled towards the average that it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nqm.algorithms.averaging import EMA, SWA
from nqm.algorithms.base import (
    Algorithm,
    Draw,
    Gradient,
    LimitingCase,
    Rate,
    State,
    Value,
    check_fraction,
)
from nqm.algorithms.optimizers import SGD
from nqm.algorithms.time_dependence import TimeDependence
from nqm.errors import check_number
from nqm.problems.quadratic import FloatArray

#: Least share of an iterate in the average with `Pace.power`, as in the authors' code.
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Pace(Algorithm):
    """x' = x - lr g + pull (1 - decay) (a - x); a' = decay a + (1 - decay) x'; a is evaluated.

    Au & Block 2026, "Training for the model you return" (arXiv 2606.25086), around SGD in place of
    AdamW. Their code lets 1 - decay fall, as ``power`` = 0.2 does. Its pull is, for every weight,
    min(1, lr c (1 - decay) / (sqrt(v) + eps)) with Adam's second moment v of its gradients: this
    is not linear, and has no counterpart here. At a constant decay it is stable iff
    lr h < 2 (1 - pull decay (1 - decay) / (1 + decay)).

    Parameters
    ----------
    decay : float
        Share of the average that a step keeps, in [0, 1). Of no effect with `power`.
    pull : float
        Strength of the pull, in [0, 1]; 0 is an EMA of SGD.
    power : float, optional
        In place of `decay`, 1 - decay = max((1 + t)^-power, 1e-4) in step t = 0, 1, ...; > 0. No
        two steps are then equal, so solvers take each of them.
    """

    decay: float = 0.99
    pull: float = 0.5
    power: float | None = None

    coordinates = ("x", "ema")

    def __post_init__(self) -> None:
        check_fraction("Pace.decay", self.decay)
        check_fraction("Pace.pull", self.pull, closed_high=True)
        if self.power is not None:
            check_number("Pace.power", self.power, low=0.0, closed_low=False)

    @property
    def time(self) -> TimeDependence:
        return TimeDependence(update_never_repeats=self.power is not None)

    def _share(self, t: Any) -> Any:
        """1 - decay in step t, which may be an array."""
        if self.power is None:
            return 1.0 - self.decay
        return np.maximum((1.0 + t) ** -self.power, LEAST_SHARE)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, average = state
        share = self._share(t)
        x = (1.0 - self.pull * share) * x + self.pull * share * average - lr * gradient(x)
        kept = self.decay if self.power is None else 1.0 - share
        return x, kept * average + share * x

    def weights(self, state: State, t: int) -> Value:
        return state[1]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return x, x

    def limits(self) -> tuple[LimitingCase, ...]:
        constant = replace(self, power=None)
        uniform = replace(self, power=1.0, pull=0.0)
        return (
            LimitingCase("pull = 0", replace(constant, pull=0.0), EMA(SGD(), self.decay)),
            LimitingCase("decay = 0", replace(constant, decay=0.0), SGD()),
            LimitingCase("power = 1, pull = 0", uniform, SWA(), until=round(1.0 / LEAST_SHARE)),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        if self.power is not None:
            return None
        d = self.decay
        return 2.0 * (1.0 - self.pull * d * (1.0 - d) / (1.0 + d)) / curvature

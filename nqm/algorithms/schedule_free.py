"""Schedule-free SGD: the gradient is taken between the iterate and its average."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nqm.algorithms.averaging import SWA
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
from nqm.algorithms.time_dependence import TimeDependence
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class ScheduleFree(Algorithm):
    """y = (1 - beta) z + beta x; z' = z - lr g(y); x' = x + (z' - x) / t; x is evaluated.

    Defazio et al. 2024, "The road less scheduled", with uniform weights of iterates. beta = 0 is
    Polyak-Ruppert averaging (SWA of every step), beta = 1 primal averaging. Late steps are stable
    if lr h (1 - beta) < 2, step t only if t > (1 + a + beta lr h) / (2 (1 + a)) with
    a = 1 - lr h (1 - beta): near that edge the first steps amplify. No two steps are equal, so
    solvers take each of them.

    Parameters
    ----------
    beta : float
        Weight of the average in the point of the gradient, in [0, 1].
    """

    beta: float = 0.9
    coordinates = ("z", "x averaged")

    def __post_init__(self) -> None:
        check_fraction("ScheduleFree.beta", self.beta, closed_high=True)

    @property
    def time(self) -> TimeDependence:
        return TimeDependence(update_never_repeats=True)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        z, x = state
        z = z - lr * gradient((1.0 - self.beta) * z + self.beta * x)
        share = 1.0 / (t + 1.0)
        return z, (1.0 - share) * x + share * z

    def weights(self, state: State, t: int) -> Value:
        return state[1]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return x, x

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("beta = 0", replace(self, beta=0.0), SWA()),)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        if self.beta == 1.0:  # late steps change x by a share that tends to 0
            return np.full_like(curvature, np.inf)
        return 2.0 / ((1.0 - self.beta) * curvature)

"""Schedule-free SGD and primal averaging: the gradient lies between iterate and average."""

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
from nqm.errors import check_integer
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class ScheduleFree(Algorithm):
    """y = (1 - beta) z + beta x; z' = z - r lr g(y); x' = x + c (z' - x); x is evaluated.

    Defazio et al. 2024, "The road less scheduled". The share c = r^2 / sum r^2 weighs every iterate
    with the square of its rate, as the authors' code does by default (``weight_lr_power`` = 2);
    r = min((t + 1) / warmup, 1) is the optimizer's own warm-up. Without it c = 1 / (t + 1), and
    beta = 0 is Polyak-Ruppert averaging (SWA of every step), beta = 1 primal averaging. A schedule
    of the phase changes the steps only; that code weighs by the largest rate so far, so a falling
    one does not change its weights either. Late steps are stable if lr h (1 - beta) < 2, step t
    (without warm-up) only if t > (1 + a + beta lr h) / (2 (1 + a)) with a = 1 - lr h (1 - beta):
    near that edge the first steps amplify. No two steps are equal, so solvers take each of them.

    Parameters
    ----------
    beta : float
        Weight of the average in the point of the gradient, in [0, 1].
    warmup : int
        Steps of a linear warm-up to `lr`, which the weights of the average follow; 0 for none.
    """

    beta: float = 0.9
    warmup: int = 0

    coordinates = ("z", "x averaged")

    def __post_init__(self) -> None:
        check_fraction("ScheduleFree.beta", self.beta, closed_high=True)
        check_integer("ScheduleFree.warmup", self.warmup, 0)

    @property
    def time(self) -> TimeDependence:
        return TimeDependence(update_never_repeats=True)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        z, x = state
        rise, share = self._shares(t)
        z = z - rise * lr * gradient((1.0 - self.beta) * z + self.beta * x)
        return z, (1.0 - share) * x + share * z

    def _shares(self, t: Any) -> tuple[Any, Any]:
        """Factor r of the rate, and share c of the new iterate; t may be an array."""
        n, w = t + 1.0, float(max(self.warmup, 1))
        rise = np.minimum(n / w, 1.0)
        # 1^2 + ... + k^2 = k (k + 1) (2 k + 1) / 6, then one for every step at the full rate.
        k = np.minimum(n, w)
        total = k * (k + 1.0) * (2.0 * k + 1.0) / (6.0 * w * w) + np.maximum(n - w, 0.0)
        return rise, rise**2 / total

    def weights(self, state: State, t: int) -> Value:
        return state[1]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return x, x

    def limits(self) -> tuple[LimitingCase, ...]:
        plain = replace(self, warmup=0)
        return (
            LimitingCase("beta = 0, warmup = 0", replace(plain, beta=0.0), SWA()),
            LimitingCase("warmup = 1", replace(self, warmup=1), plain),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        if self.beta == 1.0:  # late steps change x by a share that tends to 0
            return np.full_like(curvature, np.inf)
        return 2.0 / ((1.0 - self.beta) * curvature)


@dataclass(frozen=True)
class PrimalAverage(Algorithm):
    """y = (1 - beta) z + beta x; z' = z - lr g(y); x' = decay x + (1 - decay) z'; x is evaluated.

    Generalized primal averaging (GPA) of plain SGD, Defazio et al. 2025, "Smoothing DiLoCo with
    primal averaging for faster training of LLMs" (arXiv 2512.17131): schedule-free with an
    exponential in place of the uniform average. The paper's mu_x is `decay`, its mu_y `beta`.

    Parameters
    ----------
    decay : float
        Share of the average that a step keeps, in [0, 1).
    beta : float
        Weight of the average in the point of the gradient, in [0, 1].
    """

    decay: float = 0.99
    beta: float = 0.9

    coordinates = ("z", "x averaged")

    def __post_init__(self) -> None:
        check_fraction("PrimalAverage.decay", self.decay)
        check_fraction("PrimalAverage.beta", self.beta, closed_high=True)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        z, x = state
        z = z - lr * gradient((1.0 - self.beta) * z + self.beta * x)
        return z, self.decay * x + (1.0 - self.decay) * z

    def weights(self, state: State, t: int) -> Value:
        return state[1]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return x, x

    def limits(self) -> tuple[LimitingCase, ...]:
        return (
            LimitingCase("decay = 0", replace(self, decay=0.0), SGD()),
            LimitingCase("beta = 0", replace(self, beta=0.0), EMA(SGD(), self.decay)),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        # Trace 1 + decay - lr h (1 - decay beta), determinant decay (1 - lr h (1 - beta)).
        both = 2.0 * self.decay * self.beta
        return 2.0 * (1.0 + self.decay) / ((1.0 + self.decay - both) * curvature)

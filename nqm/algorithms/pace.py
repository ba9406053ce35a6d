"""PACE: SGD that is pulled towards the average that it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nqm.algorithms.averaging import EMA
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
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class Pace(Algorithm):
    """x' = x - lr g + pull (1 - decay) (a - x); a' = decay a + (1 - decay) x'; a is evaluated.

    Au & Block 2026, "Training for the model you return" (arXiv 2606.25086), around SGD in place of
    AdamW and at a constant decay; their code has 1 - decay = (1 + t)^-0.2 and a pull in proportion
    to the rate. It is stable iff lr h < 2 (1 - pull decay (1 - decay) / (1 + decay)).

    Parameters
    ----------
    decay : float
        Share of the average that a step keeps, in [0, 1).
    pull : float
        Strength of the pull, in [0, 1]; 0 is an EMA of SGD.
    """

    decay: float = 0.99
    pull: float = 0.5

    coordinates = ("x", "ema")

    def __post_init__(self) -> None:
        check_fraction("Pace.decay", self.decay)
        check_fraction("Pace.pull", self.pull, closed_high=True)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, average = state
        share = 1.0 - self.decay
        x = (1.0 - self.pull * share) * x + self.pull * share * average - lr * gradient(x)
        return x, self.decay * average + share * x

    def weights(self, state: State, t: int) -> Value:
        return state[1]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return x, x

    def limits(self) -> tuple[LimitingCase, ...]:
        return (
            LimitingCase("pull = 0", replace(self, pull=0.0), EMA(SGD(), self.decay)),
            LimitingCase("decay = 0", replace(self, decay=0.0), SGD()),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        d = self.decay
        return 2.0 * (1.0 - self.pull * d * (1.0 - d) / (1.0 + d)) / curvature

"""SGD with stale gradients, as asynchronous and pipelined training take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nqm.algorithms.base import Algorithm, Draw, Gradient, LimitingCase, Rate, State, Value
from nqm.algorithms.optimizers import SGD
from nqm.errors import check_integer
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class DelayedSGD(Algorithm):
    """x' = x - lr g(the iterate of `delay` steps ago); the start counts as all before it.

    The last iterates are a shift register. Stable iff 0 < lr h < 2 sin(pi / (2 (2 delay + 1)))
    (Levin & May 1976, "A note on difference-delay equations"): about pi / 2 divided by the delay.

    Parameters
    ----------
    delay : int
        Age of the gradient in steps, >= 0.
    """

    delay: int = 1

    def __post_init__(self) -> None:
        check_integer("DelayedSGD.delay", self.delay, 0)

    @property
    def coordinates(self) -> tuple[str, ...]:
        return ("x", *(f"x {age} ago" for age in range(1, self.delay + 1)))

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        return (state[0] - lr * gradient(state[-1]), *state[:-1])

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return (x,) * (self.delay + 1)

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("delay = 0", replace(self, delay=0), SGD()),)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return 2.0 * np.sin(np.pi / (2.0 * (2.0 * self.delay + 1.0))) / curvature

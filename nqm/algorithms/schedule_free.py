"""Schedule-free SGD: an average that is also where part of the gradient is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nqm.algorithms.base import Algorithm, Gradient, Rate, State, Value, check_fraction


@dataclass(frozen=True)
class ScheduleFree(Algorithm):
    """y = (1 - beta) z + beta x; z' = z - lr g(y); x' = x + (z' - x) / t; x is evaluated.

    Defazio et al. 2024, "The road less scheduled", at constant weights. beta 0 is Polyak-Ruppert
    averaging (SWA of every step), beta 1 primal averaging. Late steps are stable while
    lr h (1 - beta) < 2, step t only once t > (1 + a + beta lr h) / (2 (1 + a)) with
    a = 1 - lr h (1 - beta): near that edge the first steps amplify. Stepped one by one: no two
    steps are alike.
    """

    beta: float = 0.9
    coordinates = ("z", "x averaged")

    def __post_init__(self) -> None:
        check_fraction("ScheduleFree.beta", self.beta, closed_high=True)

    @property
    def ages(self) -> bool:
        return True

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        z, x = state
        z = z - lr * gradient((1.0 - self.beta) * z + self.beta * x)
        share = 1.0 / (t + 1.0)
        return z, (1.0 - share) * x + share * z

    def weights(self, state: State, t: int) -> Value:
        return state[1]

    def embed(self, draw: Callable[[], Value], normal: Callable[[], Value]) -> State:
        x = draw()
        return x, x

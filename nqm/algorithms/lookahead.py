"""Lookahead: slow weights that follow the fast ones every k steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from nqm.algorithms.base import (
    Algorithm,
    Gradient,
    Optimizer,
    Rate,
    State,
    Value,
    check_algorithm,
    check_fraction,
    ends,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import check_integer


@dataclass(frozen=True)
class Lookahead(Algorithm):
    """Every k steps: slow += alpha (x - slow); x = slow. Slow weights are evaluated.

    Zhang et al. 2019, "Lookahead optimizer: k steps forward, 1 step back". The inner optimizer's
    momentum is kept across the synchronisation.
    """

    inner: Optimizer = field(default_factory=SGD)
    k: int = 5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_algorithm("Lookahead.inner", self.inner, Optimizer)
        check_integer("Lookahead.k", self.k, 1)
        check_fraction("Lookahead.alpha", self.alpha, closed_high=True)

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (*self.inner.coordinates, "slow")

    @property
    def period(self) -> int:
        return math.lcm(self.inner.period, self.k)

    @property
    def beats(self) -> tuple[int, ...] | None:
        return None if self.inner.beats is None else (*self.inner.beats, self.k)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, *buffers = self.inner.update(state[:-1], gradient, lr, t)
        slow = state[-1]
        if ends(t, self.k):
            slow = slow + self.alpha * (x - slow)
            x = slow
        return (x, *buffers, slow)

    def weights(self, state: State, t: int) -> Value:
        return state[-1]

    def embed(self, draw: Callable[[], Value], normal: Callable[[], Value]) -> State:
        inner = self.inner.embed(draw, normal)
        return (*inner, inner[0])

"""Lookahead: slow weights that follow the fast ones every k steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nqm.algorithms.base import (
    Algorithm,
    Draw,
    Gradient,
    LimitingCase,
    Optimizer,
    Rate,
    State,
    Value,
    check_algorithm,
    check_fraction,
)
from nqm.algorithms.optimizers import SGD
from nqm.algorithms.time_dependence import TimeDependence, is_last_of_period
from nqm.errors import check_integer
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class Lookahead(Algorithm):
    """Every k steps: slow += alpha (x - slow); x = slow. Slow weights are evaluated.

    Zhang et al. 2019, "Lookahead optimizer: k steps forward, 1 step back". The inner optimizer's
    momentum is kept across the synchronisation.

    Parameters
    ----------
    inner : Optimizer
        Optimizer of the fast weights x.
    k : int
        Steps between synchronisations, >= 1.
    alpha : float
        Step size of the slow weights, in [0, 1].
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
    def time(self) -> TimeDependence:
        return self.inner.time.with_period(self.k)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, *buffers = self.inner.update(state[:-1], gradient, lr, t)
        slow = state[-1]
        if is_last_of_period(t, self.k):
            slow = slow + self.alpha * (x - slow)
            x = slow
        return (x, *buffers, slow)

    def weights(self, state: State, t: int) -> Value:
        return state[-1]

    def embed(self, draw: Draw, normal: Draw) -> State:
        inner = self.inner.embed(draw, normal)
        return (*inner, inner[0])

    def limits(self) -> tuple[LimitingCase, ...]:
        return (
            LimitingCase("k = 1, alpha = 1", replace(self, k=1, alpha=1.0), self.inner),
            LimitingCase("alpha = 1", replace(self, alpha=1.0), self.inner, every=self.k),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        if self.alpha == 0.0:  # the slow weights never move
            return np.full_like(curvature, np.inf)
        return edge_with_rounds(self.inner, self.k, 2.0 / self.alpha, curvature)


def edge_with_rounds(
    inner: Optimizer, steps: int, outer_edge: float | FloatArray, curvature: FloatArray
) -> FloatArray | None:
    """Compute the edge of a method of `steps` inner steps and one outer step along their sum.

    With inner SGD a round is one outer step on curvature 1 - r^steps, r = 1 - lr h: stable while
    0 < 1 - r^steps < outer_edge.

    Parameters
    ----------
    inner : Optimizer
        Optimizer of the inner steps.
    steps : int
        Inner steps of a round, >= 1.
    outer_edge : float or ndarray, shape (d,)
        Curvature up to which the outer step is stable, > 0; 2 / alpha for a plain one.
    curvature : ndarray, shape (d,)
        Eigenvalues h > 0 of the Hessian.

    Returns
    -------
    ndarray, shape (d,), or None
        Learning rate of each direction; None for inner momentum, for which no closed form is known.
    """
    if not isinstance(inner, SGD):
        return None
    if steps % 2:  # r^steps = 1 - outer_edge has one root
        at_edge = np.copysign(np.abs(1.0 - outer_edge) ** (1.0 / steps), 1.0 - outer_edge)
    else:  # where r^steps >= 0 >= 1 - outer_edge only r = -1, with r^steps = 1, is left
        root = np.maximum(1.0 - outer_edge, 0.0) ** (1.0 / steps)
        at_edge = np.where(np.less(outer_edge, 1.0), root, -1.0)
    return np.asarray((1.0 - at_edge) / curvature)

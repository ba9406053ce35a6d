"""Weights of low precision, with the second moments of stochastic rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from nqm.algorithms.base import (
    Around,
    Gradient,
    LimitingCase,
    Optimizer,
    Rate,
    State,
    check_algorithm,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import check_number


@dataclass(frozen=True)
class Rounded(Around):
    """Stochastic rounding of weights to a grid of spacing `pitch` after every step, as added noise.

    Rounding up with probability equal to the fraction f is unbiased with variance
    pitch^2 f (1 - f). For weights spread over many cells the average is pitch^2 / 6, which is added
    here as Gaussian noise, independent of the batch size. This is valid while the scatter of a step
    is large compared with the pitch (`SampledSGD` rounds literally, by Monte Carlo). SWA of it is
    SWALP (Yang et al. 2019): averaging reduces rounding noise as 1 / snapshots.

    Parameters
    ----------
    inner : Optimizer
        Optimizer of the weights; its buffers have full precision.
    pitch : float
        Spacing of the grid, in units of the weights, >= 0.
    """

    inner: Optimizer = field(default_factory=SGD)
    pitch: float = 0.01

    def __post_init__(self) -> None:
        check_algorithm("Rounded.inner", self.inner, Optimizer)
        check_number("Rounded.pitch", self.pitch, low=0.0)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, *buffers = self.inner.update(state, gradient, lr, t)
        return (x + self.pitch / math.sqrt(6.0) * gradient.normal(), *buffers)

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("pitch = 0", replace(self, pitch=0.0), self.inner),)

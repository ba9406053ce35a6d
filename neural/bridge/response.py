"""Response of the mean of the weights to a constant force, for SGD and heavy ball, exactly.

Along curvature h, a constant unit force moves weights that were at rest by

    b' = momentum b + 1 - h p,    p' = p + lr b',

and an average over time by a' = keep a + share p'. One step is a matrix of (p, b, a, 1), and t
steps are its t-th power. Nothing is subtracted in it that is nearly equal, so that flat directions
keep their digits: psi(h), the displacement after t steps, is lr t at h = 0 without momentum. A
displacement of the checkpoint along h is multiplied by 1 - h psi(h).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from neural.bridge.config import Training
from neural.bridge.iterate_averages import TimeAverage

FloatArray = NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]
#: A time: number of steps, or an average over time.
When = float | TimeAverage


def response(training: Training, when: When, delay: float = 0.0) -> Function:
    """Displacement psi(h) by a constant unit force, by curvature h.

    Parameters
    ----------
    training : Training
        Gives learning rate and momentum.
    when : float or TimeAverage
        Number of steps t, or an average of psi over t.
    delay : float
        Number of steps before the force begins to act, rounded; at most those of the first phase.

    Returns
    -------
    callable
        psi; maps an array of curvatures h to an array of the same shape. For SGD it is
        (1 - (1 - lr h)^t) / h.
    """
    phases = when.phases if isinstance(when, TimeAverage) else ((round(when), 0.0, 1.0),)
    (first, keep_first, share_first), *later = phases
    phases = ((max(first - round(delay), 0), keep_first, share_first), *later)
    lr, momentum = training.lr, training.momentum

    def psi(h: FloatArray) -> FloatArray:
        h = np.asarray(h, dtype=float)
        state = np.zeros((*h.shape, 4, 1))
        state[..., 3, 0] = 1.0
        with np.errstate(over="ignore", invalid="ignore"):  # beyond the edge of stability
            for steps, keep, share in phases:
                step = np.zeros((*h.shape, 4, 4))
                step[..., 1, 0], step[..., 1, 1], step[..., 1, 3] = -h, momentum, 1.0
                step[..., 0, :] = lr * step[..., 1, :]
                step[..., 0, 0] += 1.0
                step[..., 2, :] = share * step[..., 0, :]
                step[..., 2, 2], step[..., 3, 3] = keep, 1.0
                state = np.linalg.matrix_power(step, steps) @ state
        return np.asarray(state[..., 2, 0])

    return psi


def flat_below_zero(psi: Function) -> Function:
    """Replace negative curvature by zero in a response.

    On a quadratic, displacements along negative curvature grow exponentially; the loss, which is
    bounded from below, bends back.

    Parameters
    ----------
    psi : callable
        Result of `response`.

    Returns
    -------
    callable
    """
    return lambda h: psi(np.maximum(h, 0.0))

"""Optimised learning rates of one-pass least squares: its loss by steps, and the exact adjoint.

A step of SGD maps the second moments s of all directions (`nqm.problems.least_squares`) to

    s_i' = ((1 - lr h_i)^2 + lr^2 h_i^2 / B) s_i + lr^2 h_i / B (2 L + s2),   2 L = sum m_j h_j s_j.

The adjoint p, the final loss per unit of second moment, goes backwards by the transposed map, in
which the number sum_i lr^2 h_i / B p_i takes the place of 2 L.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.limits import check_memory
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray
from nqm.tuning.lbfgs import SLOWEST, descend, stable, stated_start
from nqm.tuning.piecewise_loss import equal_pieces

#: Constant rates tried as starts.
STARTS = 24


def least_squares_loss(
    problem: LeastSquares, lr: FloatArray, lengths: NDArray[np.int64], batch_size: float
) -> tuple[float, FloatArray]:
    """Compute the final expected loss of SGD at piecewise-constant rates, and its gradient.

    Parameters
    ----------
    problem : LeastSquares
        One-pass least-squares problem of d directions.
    lr : ndarray, shape (pieces,)
        Learning rate of each piece.
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece.
    batch_size : float
        Examples of one minibatch.

    Returns
    -------
    loss : float
        Expected loss after the last step, without the irreducible part.
    by_lr : ndarray, shape (pieces,)
        Exact derivative of the loss by each rate.
    """
    h, noise = problem.curvature, problem.label_noise
    seen = problem.multiplicity * h
    rates = np.repeat(lr, lengths)
    held = np.empty((rates.size + 1, h.size))
    held[0] = problem.initial_mean**2 + problem.initial_variance
    with np.errstate(over="ignore", invalid="ignore"):
        for t, rate in enumerate(rates):
            s, gain = held[t], rate * rate * h / batch_size
            held[t + 1] = ((1.0 - rate * h) ** 2 + gain * h) * s + gain * (seen @ s + noise)
        p = 0.5 * seen
        loss, slope = float(p @ held[-1]), np.empty(rates.size)
        for t in range(rates.size - 1, -1, -1):
            rate, s = rates[t], held[t]
            gain = rate * rate * h / batch_size
            by_rate = (2.0 * rate * h / batch_size - 2.0 * (1.0 - rate * h)) * h * s
            by_rate += 2.0 * rate * h / batch_size * (seen @ s + noise)
            slope[t] = p @ by_rate
            p = ((1.0 - rate * h) ** 2 + gain * h) * p + (gain @ p) * seen
    edges = np.concatenate([[0], np.cumsum(lengths)])
    sums = np.concatenate([[0.0], np.cumsum(slope)])
    return loss, np.asarray(sums[edges[1:]] - sums[edges[:-1]])


def optimised_rates(
    problem: LeastSquares,
    pieces: int,
    steps: int,
    batch_size: float,
    highest_lr: float | None,
    start: ArrayLike | None,
) -> tuple[FloatArray, NDArray[np.int64], float, float]:
    """Optimise piecewise-constant rates, from the best constant rate and from a decay to 0.

    Parameters
    ----------
    problem : LeastSquares
        One-pass least-squares problem.
    pieces, steps : int
        Number of pieces of equal length, and of steps.
    batch_size : float
        Examples of one minibatch.
    highest_lr : float or None
        Upper bound of the rates; None for 2 / h of the largest curvature h.
    start : array_like, shape (pieces,), or None
        Rates to begin with in place of these starts.

    Returns
    -------
    lr, lengths : ndarray, shape (pieces,)
        Rate and steps of each piece.
    loss, highest_lr : float
        Exact expected loss at the end, and the bound.

    Raises
    ------
    NQMError
        If `start` does not hold one rate > 0 for each piece, or it would take too much memory.
    """
    check_memory("best_piecewise.steps", steps, (steps + 1.0) * problem.directions)
    lengths = equal_pieces(steps, pieces)
    edge = stable(problem.additive())
    high = edge if highest_lr is None else highest_lr

    def at(rates: FloatArray) -> tuple[float, FloatArray]:
        return least_squares_loss(problem, rates, lengths, batch_size)

    low = SLOWEST * min(high, edge)
    if start is None:
        constants = np.geomspace(1e-4, 1.0, STARTS) * min(high, edge)
        losses = [at(np.full(pieces, rate))[0] for rate in constants]
        best = constants[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))]
        left = 1.0 - (np.arange(pieces) + 0.5) / pieces
        begins = [np.full(pieces, best), np.clip(2.0 * best * left, low, high)]
    else:
        begins = [stated_start(start, pieces)]
    rates = descend(at, begins, np.full(pieces, low), np.full(pieces, high))
    return rates, lengths, at(rates)[0], high

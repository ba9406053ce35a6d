"""Rates of least loss by bounded quasi-Newton in their logarithms, from coarse pieces to fine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from nqm.errors import check_number
from nqm.problems.quadratic import FloatArray, Problem
from nqm.tuning.piecewise_loss import equal_pieces, maps

#: Slowest rate of a schedule, relative to the fastest.
SLOWEST = 1e-9
#: Loss that counts as none: without noise one direction is learnt exactly.
LEAST = 1e-300
#: Pieces of the coarsest grid, and by how much the next one is finer.
COARSE, FINER = 12, 4
#: Loss and its gradient by the rates.
Objective = Callable[[FloatArray], tuple[float, FloatArray]]


def fastest(problem: Problem, highest_lr: float | None) -> float:
    """Upper bound of the rates: as stated, or 2 / h of the largest curvature."""
    high = 2.0 / problem.curvature.max() if highest_lr is None else highest_lr
    check_number("highest_lr", high, low=0.0, closed_low=False)
    return float(high)


def descend(
    objective: Objective, starts: Sequence[FloatArray], low: FloatArray, high: FloatArray
) -> FloatArray:
    """Best rates found by L-BFGS-B from each of `starts`, between `low` and `high`."""

    def logarithmic(z: FloatArray) -> tuple[float, FloatArray]:
        rates = np.exp(z)
        loss, gradient = objective(rates)
        if not math.isfinite(loss):
            return math.inf, np.zeros_like(z)
        loss = max(loss, LEAST)
        return math.log(loss), gradient * rates / loss

    bounds = np.log(np.stack([low, high], axis=1))
    found = [
        minimize(
            logarithmic,
            np.clip(np.log(rates), bounds[:, 0], bounds[:, 1]),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds.tolist(),
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-8, "maxcor": 30},
        )
        for rates in starts
    ]
    best = min(found, key=lambda result: float(result.fun))
    return np.asarray(np.clip(np.exp(best.x), low, high))


def from_coarse(
    objective: Callable[[NDArray[np.int64]], Objective],
    steps: int,
    pieces: int,
    high: float,
    starts: Callable[[int], Sequence[FloatArray]],
) -> FloatArray:
    """`descend` on few pieces first, then from what these found on four times as many.

    Parameters
    ----------
    objective : callable
        From the lengths of pieces to what is minimised over their rates.
    starts : callable
        From the number of pieces of the coarsest grid to the rates to begin with.
    """
    counts = [pieces]
    while counts[0] > COARSE:
        counts.insert(0, -(-counts[0] // FINER))
    guesses: Sequence[FloatArray] = starts(counts[0])
    for count, finer in zip(counts, [*counts[1:], pieces], strict=True):
        ends = np.full(count, SLOWEST * high), np.full(count, high)
        rates = descend(objective(equal_pieces(steps, count)), guesses, *ends)
        guesses = [np.exp(np.interp(_middles(steps, finer), _middles(steps, count), np.log(rates)))]
    return rates


def _middles(steps: int, pieces: int) -> FloatArray:
    lengths = equal_pieces(steps, pieces)
    return np.asarray(np.cumsum(lengths) - 0.5 * lengths)


def usual_starts(
    problem: Problem, steps: int, batch_size: float, high: float
) -> Callable[[int], list[FloatArray]]:
    """The best constant rate of a grid, and rates that decay as the flattest direction is learnt.

    Returned as a function of the number of pieces.
    """
    constant = best_constant(problem, steps, batch_size, high)

    def starts(pieces: int) -> list[FloatArray]:
        ages = (np.arange(pieces) + 0.5) * steps / pieces
        decaying = 1.0 / (1.0 / high + ages * problem.curvature.min())
        return [np.full(pieces, constant), decaying]

    return starts


def best_constant(problem: Problem, steps: int, batch_size: float, high: float) -> float:
    """Best of a geometric grid of constant rates."""
    rates = np.geomspace(1e-8 * high, 0.999 * high, 100)
    a, q, _, _ = maps(problem, rates, np.full(100, steps), np.full(100, batch_size))
    start = problem.initial_mean**2 + problem.initial_variance
    return float(rates[int(np.argmin((a * start + q) @ problem.weight))])

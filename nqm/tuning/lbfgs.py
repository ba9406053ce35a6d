"""Optimisation of learning rates by L-BFGS-B in their logarithms, from few pieces to many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigvalsh_tridiagonal
from scipy.optimize import minimize

from nqm.errors import NQMError, check_number
from nqm.problems.quadratic import FloatArray, Problem
from nqm.tuning.piecewise_loss import equal_pieces, maps

#: Slowest rate of a schedule, relative to the fastest.
SLOWEST = 1e-9
#: Largest default bound of the rates, in units of 2 / h of the largest curvature.
LARGEST = 1e100
#: Largest number of times that the bound of the rates is raised fourfold.
RAISES = 8
#: Smaller losses count as this one: without noise one direction is learnt exactly.
LEAST = 1e-300
#: Pieces of the coarsest grid, and by how much the next one is finer.
COARSE, FINER = 12, 4
#: Takes rates (pieces,); returns the loss and its gradient by the rates (pieces,).
Objective = Callable[[FloatArray], tuple[float, FloatArray]]


def stable(problem: Problem) -> float:
    """Rate 2 / h of the largest curvature h, beyond which that direction is amplified.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.

    Returns
    -------
    float
        The rate.

    Raises
    ------
    NQMError
        If no direction has a curvature above 0.
    """
    largest = float(problem.curvature.max())
    if largest == 0.0:
        raise NQMError("no direction has a curvature above 0, so that no rate changes the loss")
    return 2.0 / largest


def fastest(problem: Problem, highest_lr: float | None) -> float:
    """Upper bound of the learning rates.

    No rate of an optimal schedule exceeds 1 / h of the smallest curvature: above it every factor
    (1 - lr h)^2 and the noise lr^2 v grow with the rate. Rates beyond 2 / h of the largest
    curvature are of use: they amplify sharp directions, which later steps contract.

    Parameters
    ----------
    problem : Problem
        Its smallest curvature h > 0 that has a loss sets the default bound.
    highest_lr : float or None
        Bound that the user states, > 0; None for 1 / h, or 2 / h of the largest curvature where
        that is larger.

    Returns
    -------
    float
        `highest_lr`, or the default bound.
    """
    if highest_lr is None:
        edge, curved = stable(problem), problem.curvature[problem.weight > 0]
        with np.errstate(over="ignore"):
            high = max(float(1.0 / curved.min(initial=problem.curvature.max())), edge)
        high = min(high, LARGEST * edge)
    else:
        high = highest_lr
    check_number("highest_lr", high, low=0.0, closed_low=False)
    return float(high)


def stated_start(start: ArrayLike, pieces: int) -> FloatArray:
    """Check the rates that a user states as the start of `best_piecewise`.

    Parameters
    ----------
    start : array_like, shape (pieces,)
        Rates, > 0.
    pieces : int
        Number of pieces.

    Returns
    -------
    ndarray, shape (pieces,)
        The rates.

    Raises
    ------
    NQMError
        If `start` does not hold one rate > 0 for each piece.
    """
    begin = np.asarray(start, dtype=np.float64)
    if begin.shape != (pieces,) or not np.all(begin > 0):
        raise NQMError(f"best_piecewise.start must hold {pieces} rates > 0; got {start!r:.60}")
    return begin


def optimise(
    objective: Callable[[NDArray[np.int64]], Objective],
    problem: Problem,
    steps: int,
    pieces: int,
    batch_size: float,
    high: float,
) -> FloatArray:
    """Optimise rates up to `high`: stable ones first, then under bounds that are raised fourfold.

    A rate for every step also starts from optima without noise of all steps and of the first few.

    Parameters
    ----------
    objective : callable
        Takes the lengths of pieces in steps; returns the objective of `descend` for their rates.
    problem : Problem
        Condensed problem.
    steps, pieces : int
        Steps of all pieces together, and their number.
    batch_size : float
        Examples of one minibatch, for the starts.
    high : float
        Upper bound of the rates.

    Returns
    -------
    ndarray, shape (pieces,)
        Rates of least loss: a local minimum, no worse than the one with stable rates.
    """
    capped = min(high, stable(problem))
    starts = usual_starts(problem, steps, batch_size, capped)
    rates = from_coarse(objective, steps, pieces, capped, starts)
    lengths = equal_pieces(steps, pieces)
    low, last = np.full(pieces, SLOWEST * capped), objective(lengths)
    # Many local minima differ in their highest rate: it is raised step by step.
    caps = [4.0**k * capped for k in range(1, RAISES) if 4.0**k * capped < high]
    for cap in [*caps, high] if high > capped else []:
        decays = usual_starts(problem, steps, batch_size, cap)
        found = from_coarse(objective, steps, pieces, cap, decays)
        rates = descend(last, [rates, found], low, np.full(pieces, cap))
    if pieces >= steps:
        begins = [rates]
        for count in sorted({steps, *(-(-steps // n) for n in (2, 4, 8))}):
            free = noiseless_rates(problem, count, 0.5 * capped)
            if free.max() <= high:
                begins.append(rates.copy())
                begins[-1][np.flatnonzero(lengths)[:count]] = free
        rates = descend(last, begins, low, np.full(pieces, high))
    return rates


def noiseless_rates(problem: Problem, steps: int, rest: float) -> FloatArray:
    """Rates of least loss without gradient noise, the highest first.

    Their reciprocals are the roots of the polynomial prod (1 - lr_t x) of least
    sum w s prod (1 - lr_t h)^2, which is orthogonal to all lower degrees in the measure w s h: the
    eigenvalues of its Jacobi matrix, by Lanczos (Fischer 1996, "Polynomial based iteration methods
    for symmetric linear systems"). Chebyshev's steps are the case of his measure.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    steps : int
        Number of rates.
    rest : float
        Rate of the steps that are left when every direction has one of its own.

    Returns
    -------
    ndarray, shape (steps,)
        Learning rates, > 0.
    """
    h = problem.curvature
    measure = problem.weight * h * (problem.initial_mean**2 + problem.initial_variance)
    h, measure = h[measure > 0], measure[measure > 0]
    nodes, place = np.unique(h, return_inverse=True)
    if nodes.size <= steps:
        rates = 1.0 / nodes
    else:
        summed = np.bincount(place, measure).astype(np.float64)
        roots = eigvalsh_tridiagonal(*_jacobi(nodes, summed, steps))
        rates = np.asarray(1.0 / roots, dtype=np.float64)
    filled = np.full(steps, rest)
    filled[: rates.size] = rates
    return np.asarray(np.sort(filled)[::-1])


def _jacobi(nodes: FloatArray, measure: FloatArray, size: int) -> tuple[FloatArray, FloatArray]:
    """Diagonal and off-diagonal of the Jacobi matrix of a discrete measure."""
    basis, diagonal, beside = np.zeros((size, nodes.size)), np.zeros(size), np.zeros(size)
    q = np.sqrt(measure / measure.sum())
    for k in range(size):
        basis[k] = q
        diagonal[k] = q @ (nodes * q)
        q = nodes * q
        for _ in range(2):  # twice keeps the basis orthogonal to rounding
            q = q - basis[: k + 1].T @ (basis[: k + 1] @ q)
        beside[k] = np.linalg.norm(q)
        q = q / beside[k]
    return diagonal, beside[:-1]


def descend(
    objective: Objective, starts: Sequence[FloatArray], low: FloatArray, high: FloatArray
) -> FloatArray:
    """Minimise the logarithm of a loss over the logarithms of the rates by L-BFGS-B.

    Parameters
    ----------
    objective : callable
        Takes rates (pieces,); returns the loss and its gradient by the rates.
    starts : sequence of ndarray, shape (pieces,)
        Rates to begin with; the best result of all starts is returned.
    low, high : ndarray, shape (pieces,)
        Bounds of the rates, > 0.

    Returns
    -------
    ndarray, shape (pieces,)
        Rates of least loss: a local minimum.
    """

    def logarithmic(z: FloatArray) -> tuple[float, FloatArray]:
        rates = np.exp(z)
        loss, gradient = objective(rates)
        if not math.isfinite(loss):
            return math.inf, np.zeros_like(z)
        loss = max(loss, LEAST)
        return math.log(loss), gradient * rates / loss

    bounds = np.log(np.stack([low, high], axis=1))
    results = [
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
    best = min(results, key=lambda result: float(result.fun))
    return np.asarray(np.clip(np.exp(best.x), low, high))


def from_coarse(
    objective: Callable[[NDArray[np.int64]], Objective],
    steps: int,
    pieces: int,
    high: float,
    starts: Callable[[int], Sequence[FloatArray]],
) -> FloatArray:
    """Optimise few pieces first, then start from their rates with four times as many.

    Parameters
    ----------
    objective : callable
        Takes the lengths of pieces in steps; returns the objective of `descend` for their rates.
    steps : int
        Steps of all pieces together.
    pieces : int
        Number of pieces of the result.
    high : float
        Upper bound of the rates; the lower one is `SLOWEST` times this.
    starts : callable
        Takes the number of pieces of the coarsest grid; returns the rates to begin with.

    Returns
    -------
    ndarray, shape (pieces,)
        Rates of least loss: a local minimum.
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
    """Rates to begin an optimisation with: constant ones, and ones that decay like 1 / t.

    The constant rate is the best of a grid. The decay has the time scale of the smallest curvature.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    steps : int
        Steps of the schedule.
    batch_size : float
        Examples of one minibatch.
    high : float
        Upper bound of the rates.

    Returns
    -------
    callable
        Takes the number of pieces; returns a list of two arrays of rates, shape (pieces,).
    """
    constant = best_constant(problem, steps, batch_size, high)

    def starts(pieces: int) -> list[FloatArray]:
        ages = (np.arange(pieces) + 0.5) * steps / pieces
        decaying = 1.0 / (1.0 / high + ages * problem.curvature.min())
        return [np.full(pieces, constant), decaying]

    return starts


def best_constant(problem: Problem, steps: int, batch_size: float, high: float) -> float:
    """Constant rate of least expected loss on a geometric grid of 100 rates.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    steps : int
        Steps of SGD.
    batch_size : float
        Examples of one minibatch.
    high : float
        Upper bound of the rates; the grid reaches from 1e-8 to 0.999 of it.

    Returns
    -------
    float
        Learning rate.
    """
    rates = np.geomspace(1e-8 * high, 0.999 * high, 100)
    a, q, _, _ = maps(problem, rates, np.full(100, steps), np.full(100, batch_size))
    start = problem.initial_mean**2 + problem.initial_variance
    with np.errstate(over="ignore", invalid="ignore"):  # where rates diverge
        losses = (a * start + q) @ problem.weight
    return float(rates[int(np.argmin(np.where(np.isnan(losses), np.inf, losses)))])

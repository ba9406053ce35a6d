"""Optimised learning-rate schedules: piecewise constant, up to one rate for every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.errors import check_integer, check_number
from nqm.limits import check_memory
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem
from nqm.problems.quadrature import condense
from nqm.schedule import Piecewise
from nqm.tuning.lbfgs import (
    SLOWEST,
    Objective,
    descend,
    fastest,
    optimise,
    stable,
    stated_start,
)
from nqm.tuning.piecewise_loss import Evaluated, equal_pieces, evaluate, final_loss
from nqm.tuning.schedule_least_squares import optimised_rates
from nqm.tuning.sensitivity import WITHIN, Flatness, flatness
from nqm.words import short_html, short_repr

#: Blocks of the condensed spectrum: SGD's responses are smooth, and 1e-13 is reached by wide ones.
WIDTH = 0.5
#: Relative distance of the exact loss from that on the blocks above which the blocks are narrowed,
#: while directions times pieces are not above this number.
FITS, MOST = 1e-4, 2_000_000


@dataclass(frozen=True)
class BestSchedule:
    """A schedule and the loss it ends with.

    Attributes
    ----------
    lr, lengths : ndarray, shape (pieces,)
        Learning rate and number of steps of each piece; with fewer steps than pieces some
        lengths are 0.
    steps : int
        Steps in all: the sum of `lengths`.
    loss : float
        Exact expected loss at the end, over every direction.
    at_bound : bool
        Whether some rate lies at the highest allowed.
    flat : mapping
        ``"lr"``: interval of each rate while all others stay. ``"scale"``: interval of a factor
        on all rates; none goes beyond the highest allowed.
    """

    lr: FloatArray
    lengths: NDArray[np.int64]
    steps: int
    loss: float
    at_bound: bool
    flat: Mapping[str, Flatness] = field(default_factory=dict, repr=False)

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def schedule(self) -> Piecewise:
        """The rates as a `Piecewise` schedule, to be used in a `Phase`."""
        return as_piecewise(self.lr, self.lengths)


def as_piecewise(values: ArrayLike, lengths: NDArray[np.int64]) -> Piecewise:
    """Write values of pieces as a `Piecewise` schedule.

    Parameters
    ----------
    values : array_like, shape (pieces,)
        Value of each piece (a learning rate or a batch size).
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece; pieces of 0 steps are left out.

    Returns
    -------
    Piecewise
        Schedule over the sum of `lengths` steps.
    """
    used = lengths > 0
    edges = np.cumsum(lengths[used])[:-1]
    return Piecewise(tuple(map(float, np.asarray(values)[used])), tuple(map(int, edges)))


def best_piecewise(
    problem: Problem | LeastSquares,
    pieces: int,
    steps: int,
    batch_size: float = 1.0,
    *,
    highest_lr: float | None = None,
    start: ArrayLike | None = None,
    within: float = WITHIN,
) -> BestSchedule:
    """Find the piecewise-constant rates of least expected loss of SGD after `steps` steps.

    Bounded quasi-Newton (L-BFGS-B) in the logarithms of the rates, on the condensed spectrum
    (`nqm.condense`), from the best constant rate, from rates that decay and, for a rate for every
    step, from the optimum without noise; many pieces start from the optimum of a quarter as many.
    The optimum is a local one: the loss is not convex in the rates. On wide spectra at low noise
    local minima differ much, and another `highest_lr` may find a better one. Steps beyond 2 / h of
    the largest curvature h amplify that direction; the best schedules at low noise have them.
    With ``pieces = steps`` every step has a rate of its own, and at the optimum

        lr_t = sum p h s / sum p (h^2 s + v / B)

    or the bound, where s is the second moment before the step and p the adjoint after it
    (`nqm.tuning.piecewise_loss`). In one direction p cancels: the greedy rate is the best one.

    Least squares is followed step by step, at a cost of steps times directions for each evaluation
    (`nqm.tuning.schedule_least_squares`); `condense` it first where it has many directions.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Noisy quadratic problem; for a preconditioned one see `Problem.precondition`.
    pieces : int
        Number of pieces of equal length, each with a rate of its own, >= 1.
    steps : int
        Steps of SGD, >= 1.
    batch_size : float
        Examples of one minibatch, > 0.
    highest_lr : float, optional
        Upper bound of the rates; by default 1 / h of the smallest curvature h, which no optimal
        rate exceeds, and 2 / h of the largest for least squares.
        A bound of 2 / h of the largest curvature keeps every step stable by itself.
    start : array_like, shape (pieces,), optional
        Rates to begin the optimisation with, > 0, in place of the starts above.
    within : float
        Relative rise of the loss that the intervals in `flat` allow.

    Returns
    -------
    BestSchedule
        Its loss is exact, over every direction of `problem`. `flat` is empty for least squares.

    Raises
    ------
    NQMError
        If an argument is out of range, `start` has a wrong shape, or it would take too much memory.
    """
    problem = any_problem("best_piecewise", problem)
    check_integer("best_piecewise.pieces", pieces, 1)
    check_memory("best_piecewise.pieces", pieces, 10.0 * pieces)
    check_integer("best_piecewise.steps", steps, 1)
    check_number("best_piecewise.batch_size", batch_size, low=0.0, closed_low=False)
    if isinstance(problem, LeastSquares):
        if highest_lr is not None:
            check_number("best_piecewise.highest_lr", highest_lr, low=0.0, closed_low=False)
        rates, lengths, loss, high = optimised_rates(
            problem, pieces, steps, batch_size, highest_lr, start
        )
        return BestSchedule(rates, lengths, steps, loss, _reaches(high, rates, lengths))
    high, width, best = fastest(problem, highest_lr), WIDTH, None
    while True:
        small = condense(problem, width=width)
        found = optimised(small, pieces, steps, batch_size, high, start)
        exact = on_all(found, problem, batch_size)
        best = exact if best is None or exact.loss < best.loss else best
        # Many steps and little noise fit the nodes of a block rather than its directions.
        fits = abs(exact.loss - found.loss) <= FITS * exact.loss
        if fits or small.directions * pieces > MOST or small.directions == problem.directions:
            return with_flatness(best, small, batch_size, high, within)
        width /= 8.0


def optimised(
    problem: Problem,
    pieces: int,
    steps: int,
    batch_size: float,
    highest_lr: float | None,
    start: ArrayLike | None,
) -> BestSchedule:
    """Optimise the rates on a condensed problem, without intervals of near-optimal values.

    Parameters
    ----------
    problem : Problem
        Condensed problem.
    pieces, steps : int
        Number of pieces and of steps.
    batch_size : float
        Examples of one minibatch.
    highest_lr : float or None
        Upper bound of the rates; None for the one of `nqm.tuning.lbfgs.fastest`.
    start : array_like, shape (pieces,), or None
        Rates to begin with; None for those of `nqm.tuning.lbfgs.optimise`.

    Returns
    -------
    BestSchedule
        Its loss is that of the condensed problem; `flat` is empty.

    Raises
    ------
    NQMError
        If `start` does not hold one rate > 0 for each piece.
    """
    high = fastest(problem, highest_lr)

    def objective(lengths: NDArray[np.int64]) -> Objective:
        def at(rates: FloatArray) -> tuple[float, FloatArray]:
            run = evaluate(problem, rates, lengths, batch_size)
            return run.loss, run.by_lr

        return at

    lengths = equal_pieces(steps, pieces)
    if start is None:
        rates = optimise(objective, problem, steps, pieces, batch_size, high)
    else:
        begin = stated_start(start, pieces)
        low = SLOWEST * min(high, stable(problem))
        ends = np.full(pieces, low), np.full(pieces, high)
        rates = descend(objective(lengths), [begin], *ends)
    loss = evaluate(problem, rates, lengths, batch_size).loss
    return BestSchedule(rates, lengths, steps, loss, _reaches(high, rates, lengths))


def _reaches(high: float, rates: FloatArray, lengths: NDArray[np.int64]) -> bool:
    """Whether a rate that is used is at its upper bound."""
    return bool(np.any(rates[lengths > 0] >= high * (1 - 1e-9)))


def on_all(found: BestSchedule, problem: Problem, batch_size: float) -> BestSchedule:
    """Replace the loss of a schedule by the one over every direction of the full problem.

    Parameters
    ----------
    found : BestSchedule
        Schedule optimised on a condensed problem.
    problem : Problem
        The full problem.
    batch_size : float
        Examples of one minibatch.

    Returns
    -------
    BestSchedule
        The same rates with their exact loss.
    """
    return replace(found, loss=final_loss(problem, found.lr, found.lengths, batch_size))


def with_flatness(
    found: BestSchedule,
    problem: Problem,
    batch_size: float,
    highest_lr: float | None,
    within: float,
) -> BestSchedule:
    """Add intervals of near-optimal rates to a schedule.

    Parameters
    ----------
    found : BestSchedule
        Optimised schedule.
    problem : Problem
        Condensed problem on which losses are compared.
    batch_size : float
        Examples of one minibatch.
    highest_lr : float or None
        Upper bound of the rates; None for the one of `nqm.tuning.lbfgs.fastest`.
    within : float
        Relative rise of the loss allowed.

    Returns
    -------
    BestSchedule
        The same schedule with `flat` filled in.
    """
    run = evaluate(problem, found.lr, found.lengths, batch_size)
    return replace(found, flat=flat_rates(run, fastest(problem, highest_lr), within))


def flat_rates(run: Evaluated, high: float, within: float) -> dict[str, Flatness]:
    """Intervals of near-optimal rates.

    Parameters
    ----------
    run : Evaluated
        The optimum.
    high : float
        Upper bound of the rates.
    within : float
        Relative rise of the loss allowed.

    Returns
    -------
    dict of str to Flatness
        "lr": interval of each rate while all others stay, shape (pieces,); "scale": interval of a
        common factor on all rates.
    """

    def scaled(factor: FloatArray) -> FloatArray:
        rates = np.minimum(factor * run.lr, high)
        return np.asarray(evaluate(run.problem, rates, run.lengths, run.batch_size).loss)

    low = SLOWEST * min(high, stable(run.problem))
    return {
        "lr": flatness(run.moved, run.lr, low, high, within=within),
        "scale": flatness(scaled, 1.0, SLOWEST, high / run.lr.min(), within=within),
    }

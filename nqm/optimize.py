"""Optimised learning-rate schedules: piecewise constant, by exact gradients of the expected loss.

A piece of n steps at rate lr maps the second moment of a direction to a s + q (`nqm.problem` has
the notation), with

    a = (1 - lr h)^2n,      q = lr^2 (v / B) (1 - a) / (1 - (1 - lr h)^2).

The expected loss at the end is linear in the last second moments, so one sweep backwards through
the pieces gives its derivative by every rate at the cost of a second evaluation (Zhang et al. 2019,
section 4.4, optimise the same schedules by automatic differentiation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from nqm.condense import condense
from nqm.errors import NQMError, check_integer, check_number
from nqm.problem import FloatArray, Problem
from nqm.schedule import Piecewise

#: Slowest rate of a schedule, relative to the fastest.
SLOWEST = 1e-9
#: Blocks of the condensed spectrum: SGD's responses are smooth, and 1e-13 is reached by wide ones.
WIDTH = 0.5


@dataclass(frozen=True)
class BestSchedule:
    """A schedule and the loss it ends with.

    Attributes
    ----------
    rates, lengths : ndarray, shape (pieces,)
        Learning rate and number of steps of each piece; with fewer steps than pieces some
        lengths are 0.
    steps : int
    loss : float
        Exact expected loss at the end, over every direction.
    at_bound : bool
        Whether some rate lies at the highest allowed.
    """

    rates: FloatArray
    lengths: NDArray[np.int64]
    steps: int
    loss: float
    at_bound: bool

    @property
    def schedule(self) -> Piecewise:
        """For a `Phase`."""
        used = self.lengths > 0
        edges = np.cumsum(self.lengths[used])[:-1]
        return Piecewise(tuple(map(float, self.rates[used])), tuple(map(int, edges)))


def equal_pieces(steps: int, pieces: int) -> NDArray[np.int64]:
    """Lengths of `pieces` pieces of `steps` steps, as equal as whole numbers can be."""
    edges = np.rint(np.linspace(0, steps, pieces + 1)).astype(np.int64)
    return np.diff(edges)


def piecewise_loss(
    problem: Problem, rates: ArrayLike, lengths: ArrayLike, batch_size: float = 1.0
) -> tuple[float, FloatArray]:
    """Expected loss of SGD at the end of piecewise-constant rates, and its gradient.

    Parameters
    ----------
    problem : Problem
    rates : array_like, shape (pieces,)
        Any positive rates; beyond 2 / h a piece amplifies.
    lengths : array_like, shape (pieces,)
        Steps of each piece, >= 0.
    batch_size : float

    Returns
    -------
    loss : float
    gradient : ndarray, shape (pieces,)
        d loss / d rate, exact: one sweep forwards, one backwards.
    """
    lr, n = np.asarray(rates, dtype=np.float64), np.asarray(lengths)
    a, q, a_slope, q_slope = _maps(problem, lr, n, batch_size)
    s = np.empty((len(a) + 1, problem.directions))
    s[0] = problem.initial_mean**2 + problem.initial_variance
    for k in range(len(a)):
        s[k + 1] = a[k] * s[k] + q[k]
    loss = float(problem.weight @ s[-1])
    gradient = np.empty(len(a))
    adjoint = problem.weight
    for k in range(len(a) - 1, -1, -1):
        gradient[k] = adjoint @ (a_slope[k] * s[k] + q_slope[k])
        adjoint = adjoint * a[k]
    return loss, gradient


def _maps(
    problem: Problem, rates: FloatArray, lengths: NDArray[Any], batch_size: float
) -> tuple[FloatArray, ...]:
    """Both a and q of every piece, and their derivatives by its rate, (pieces, d) each."""
    lr, n = rates[:, None], lengths[:, None]
    h, v = problem.curvature, problem.noise_variance / batch_size
    u = lr * h
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # log |1 - u|, accurate near u = 0 and near u = 2.
        log_r = np.where(u < 1.0, np.log1p(-u), np.log1p(u - 2.0))
        power = np.where(n > 0, 2.0 * n * log_r, 0.0)
        a, fallen = np.exp(power), -np.expm1(power)
        # Sum of r^2t over the piece and its slope by u; at u = 0 and u = 2 both are 0 / 0, and
        # close to there the slope's numerator cancels: its limit is used.
        width = u * (2.0 - u)
        total = np.where(width != 0.0, fallen / width, n)
        a_slope = np.where((n > 0) & (u != 1.0), -2.0 * n * a / (1.0 - u), 0.0)
        inside = np.abs(n * width) > 1e-8
        slope = np.where(
            inside, (-a_slope - total * 2.0 * (1.0 - u)) / width, n * (n - 1) * np.sign(u - 1.0)
        )
        q = lr**2 * v * total
        return a, q, a_slope * h, 2.0 * lr * v * total + lr**2 * v * h * slope


def best_piecewise(
    problem: Problem,
    pieces: int,
    steps: int,
    batch_size: float = 1.0,
    *,
    highest_lr: float | None = None,
    start: ArrayLike | None = None,
) -> BestSchedule:
    """Rates of `pieces` equal pieces with the least expected loss of SGD after `steps` steps.

    Bounded quasi-Newton (L-BFGS-B) in the logarithms of the rates, on the condensed spectrum
    (`nqm.condense`), from the best constant rate and from rates that decay. The optimum is a
    local one: the loss is not convex in the rates.

    Parameters
    ----------
    problem : Problem
        Preconditioned, if so wanted (`Problem.precondition`).
    pieces, steps : int
    batch_size : float
    highest_lr : float, optional
        2 / h of the largest curvature by default, beyond which that direction is amplified.
    start : array_like, shape (pieces,), optional
        Rates to begin with, in place of the two starts above.

    Returns
    -------
    BestSchedule
        Its loss is exact, over every direction of `problem`.
    """
    check_integer("best_piecewise.pieces", pieces, 1)
    check_integer("best_piecewise.steps", steps, 1)
    check_number("best_piecewise.batch_size", batch_size, low=0.0, closed_low=False)
    small = condense(problem, width=WIDTH)
    found = _best(small, pieces, steps, batch_size, highest_lr, start)
    return _on_all(found, problem, batch_size)


def fewest_steps_piecewise(
    problem: Problem,
    pieces: int,
    batch_size: float,
    target: float,
    *,
    highest_lr: float | None = None,
    horizon: int = 10**8,
) -> BestSchedule:
    """Schedule of the fewest steps whose expected loss at the end meets `target`.

    The optimised loss falls with the number of steps (up to the rounding of lengths), so the number
    is bracketed and interpolated on logarithmic scales until it and one step fewer have both been
    optimised.

    Raises
    ------
    NQMError
        If `horizon` steps do not suffice.
    """
    check_integer("fewest_steps_piecewise.pieces", pieces, 1)
    check_number("fewest_steps_piecewise.batch_size", batch_size, low=0.0, closed_low=False)
    check_number(
        "fewest_steps_piecewise.target", target, low=0.0, high=problem.initial_loss,
        closed_low=False, closed_high=False,
    )  # fmt: skip
    small = condense(problem, width=WIDTH)

    def at(count: int) -> Callable[[int, BestSchedule | None], BestSchedule]:
        def optimised(steps: int, near: BestSchedule | None) -> BestSchedule:
            start = None if near is None else near.rates
            return _best(small, count, steps, batch_size, highest_lr, start)

        return optimised

    # A constant rate first: quick, and an upper limit for every schedule.
    low, high = None, at(1)(1, None)
    while high.loss > target:
        if high.steps >= horizon:
            raise NQMError(
                f"fewest_steps_piecewise: {horizon} steps at a constant rate do not reach the "
                f"target {target:g}; raise horizon, target or batch_size"
            )
        low, high = high, at(1)(min(4 * high.steps, horizon), None)
    high = _narrow(low, high, at(1), target)
    if pieces > 1:
        low, high = None, at(pieces)(high.steps, None)
        while low is None and high.steps > 1:
            half = at(pieces)(high.steps // 2, high)
            low, high = (None, half) if half.loss <= target else (half, high)
        high = _narrow(low, high, at(pieces), target)
    found = _on_all(high, problem, batch_size)
    while found.loss > target:  # by rounding, where the loss all but equals the target
        found = _on_all(at(pieces)(found.steps + 1, found), problem, batch_size)
    return found


def _narrow(
    low: BestSchedule | None,
    high: BestSchedule,
    at: Callable[[int, BestSchedule | None], BestSchedule],
    target: float,
) -> BestSchedule:
    """The first to meet the target between `low`, which does not, and `high`, which does."""
    halve = False
    while low is not None and high.steps - low.steps > 1:
        ends = [math.log(low.steps), math.log(high.steps)]
        value = [math.log(found.loss / target) for found in (low, high)]
        share = 0.5 if halve else min(max(value[0] / (value[0] - value[1]), 0.001), 0.999)
        guess = round(math.exp(ends[0] + share * (ends[1] - ends[0])))
        middle = at(min(max(guess, low.steps + 1), high.steps - 1), high)
        # Halve after a step that left most of the bracket: interpolation creeps from one side.
        before = high.steps - low.steps
        low, high = (low, middle) if middle.loss <= target else (middle, high)
        halve = high.steps - low.steps > 0.5 * before and not halve
    return high


def _on_all(found: BestSchedule, problem: Problem, batch_size: float) -> BestSchedule:
    """With the loss over every direction."""
    return replace(found, loss=piecewise_loss(problem, found.rates, found.lengths, batch_size)[0])


def _best(
    problem: Problem,
    pieces: int,
    steps: int,
    batch_size: float,
    highest_lr: float | None,
    start: ArrayLike | None,
) -> BestSchedule:
    high = 2.0 / problem.curvature[0] if highest_lr is None else float(highest_lr)
    check_number("best_piecewise.highest_lr", high, low=0.0, closed_low=False)
    lengths = equal_pieces(steps, pieces)
    bounds = (math.log(SLOWEST * high), math.log(high))

    def objective(z: FloatArray) -> tuple[float, FloatArray]:
        rates = np.exp(z)
        loss, gradient = piecewise_loss(problem, rates, lengths, batch_size)
        return math.log(loss), gradient * rates / loss

    if start is None:
        ages = (np.arange(pieces) + 0.5) * steps / pieces
        decaying = 1.0 / (1.0 / high + ages * problem.curvature[-1])
        starts = [np.full(pieces, _constant(problem, steps, batch_size, high)), decaying]
    else:
        starts = [np.asarray(start, dtype=np.float64)]
        if starts[0].shape != (pieces,) or not np.all(starts[0] > 0):
            raise NQMError(f"best_piecewise.start must hold {pieces} rates > 0; got {start!r:.60}")
    found = [
        minimize(
            objective,
            np.clip(np.log(rates), *bounds),
            jac=True,
            method="L-BFGS-B",
            bounds=[bounds] * pieces,
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-8, "maxcor": 30},
        )
        for rates in starts
    ]
    best = min(found, key=lambda result: float(result.fun))
    rates = np.minimum(np.exp(best.x), high)
    at_bound = bool(np.any(rates[lengths > 0] >= high * (1 - 1e-9)))
    return BestSchedule(rates, lengths, steps, math.exp(best.fun), at_bound)


def _constant(problem: Problem, steps: int, batch_size: float, high: float) -> float:
    """Best of a geometric grid of constant rates."""
    rates = np.geomspace(1e-8 * high, 0.999 * high, 100)
    a, q, _, _ = _maps(problem, rates, np.full(100, steps), batch_size)
    start = problem.initial_mean**2 + problem.initial_variance
    return float(rates[int(np.argmin((a * start + q) @ problem.weight))])

"""Search for the schedule that meets a target loss in the fewest steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import check_memory
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import Problem
from nqm.problems.quadrature import condense
from nqm.tuning.lbfgs import fastest
from nqm.tuning.schedule import WIDTH, BestSchedule, on_all, optimised, with_flatness
from nqm.tuning.sensitivity import WITHIN


def fewest_steps_piecewise(
    problem: Problem,
    pieces: int,
    batch_size: float,
    target: float,
    *,
    highest_lr: float | None = None,
    horizon: int = 10**8,
) -> BestSchedule:
    """Find the piecewise-constant schedule of SGD that meets `target` in the fewest steps.

    The optimised loss falls with the number of steps (up to the rounding of lengths), so the number
    is bracketed and interpolated on logarithmic scales until it and one step fewer have both been
    optimised.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares).
    pieces : int
        Number of pieces of equal length, each with a rate of its own, >= 1.
    batch_size : float
        Examples of one minibatch, > 0.
    target : float
        Expected loss at the end, > 0 and below the loss at the start.
    highest_lr : float, optional
        Upper bound of the rates; 1 / h of the smallest curvature by default.
    horizon : int
        Largest number of steps considered.

    Returns
    -------
    BestSchedule
        Its `steps` are the fewest; its loss is exact, over every direction of `problem`.

    Raises
    ------
    NQMError
        If `horizon` steps at a constant rate do not reach the target, or an argument is out of
        range.
    """
    problem = additive_only("fewest_steps_piecewise", problem)
    check_integer("fewest_steps_piecewise.pieces", pieces, 1)
    check_memory("fewest_steps_piecewise.pieces", pieces, 10.0 * pieces)
    check_number("fewest_steps_piecewise.batch_size", batch_size, low=0.0, closed_low=False)
    check_number(
        "fewest_steps_piecewise.target",
        target,
        low=0.0,
        high=problem.initial_loss,
        closed_low=False,
        closed_high=False,
    )
    small, fastest_lr = condense(problem, width=WIDTH), fastest(problem, highest_lr)

    def at(count: int) -> Callable[[int, BestSchedule | None], BestSchedule]:
        def best(steps: int, near: BestSchedule | None) -> BestSchedule:
            start = None if near is None else near.lr
            return optimised(small, count, steps, batch_size, fastest_lr, start)

        return best

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
    found = on_all(high, problem, batch_size)
    while found.loss > target:  # by rounding, where the loss all but equals the target
        found = on_all(at(pieces)(found.steps + 1, found), problem, batch_size)
    return with_flatness(found, small, batch_size, fastest_lr, WITHIN)


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

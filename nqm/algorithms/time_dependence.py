"""Dependence of one step of a method on its number t."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A step so late that a method whose steps never repeat changes negligibly; a multiple of usual
#: periods.
LATE = 720_720 * 10**6


@dataclass(frozen=True)
class TimeDependence:
    """Dependence of `update` and `weights` of an algorithm on the step number t; none by default.

    Attributes
    ----------
    periods : tuple of int
        Numbers n such that `update` depends on whether step t is the last of n (see
        `is_last_of_period`): a synchronisation, a snapshot.
    modulus : int
        `update` may depend on t modulo this number, >= 1.
    update_never_repeats : bool
        Whether `update` depends on t itself, as a mean over all steps does. Then no two steps are
        equal: solvers take each of them and there is no steady state. With period 1, `update` must
        accept an array of times t.
    weights_never_repeat : bool
        Whether `weights` depends on more than t modulo `period`, as a mean over a growing number of
        snapshots does.
    """

    periods: tuple[int, ...] = ()
    modulus: int = 1
    update_never_repeats: bool = False
    weights_never_repeat: bool = False

    @property
    def period(self) -> int:
        """Steps after which `update` repeats (if it does); 1 if it does not depend on t."""
        return math.lcm(self.modulus, *self.periods)

    @property
    def distinct_periods(self) -> tuple[int, ...] | None:
        """`periods` above 1, smallest first; None if any step may differ from any other."""
        if self.modulus > 1 or self.update_never_repeats:
            return None
        return tuple(sorted({period for period in self.periods if period > 1}))

    def with_period(self, period: int) -> TimeDependence:
        """Add a period, for a method that also acts at the last of every `period` steps.

        Parameters
        ----------
        period : int
            Steps, >= 1.

        Returns
        -------
        TimeDependence
            With `period` among its periods.
        """
        return self if period == 1 else replace(self, periods=(*self.periods, period))

    def reduced(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        """Reduce times modulo the period; unchanged for a method whose steps never repeat.

        Parameters
        ----------
        t : ndarray of int
            Step numbers, 0-based.

        Returns
        -------
        ndarray of int
            Shape of t. Equal numbers are equal steps, and each is the number of such a step. If
            only the last step of one period differs from the others, the others share one number.
        """
        if self.update_never_repeats:
            return t
        periods = self.distinct_periods
        if periods is None or len(periods) > 1:
            return t % self.period
        period = periods[0] if periods else 1
        return np.where((t + 1) % period == 0, period - 1, 0)

    def groups(self, times: NDArray[Any]) -> Iterator[tuple[NDArray[np.int64], Any]]:
        """Split distinct times into groups whose transitions can be extracted together.

        Parameters
        ----------
        times : ndarray, shape (T,)
            As `reduced` returns them.

        Yields
        ------
        rows : ndarray of int
            Positions in `times`.
        t : int or ndarray, shape (rows, 1)
            Time to pass to `update` for these rows.
        """
        if self.update_never_repeats and self.period == 1:
            yield np.arange(times.size), times[:, None]
            return
        for t in np.unique(times):
            yield np.flatnonzero(times == t), int(t)

    def one_cycle(self) -> range:
        """Times of one whole period; of a late one for a method whose steps never repeat.

        Returns
        -------
        range
            `period` step numbers.
        """
        first = LATE if self.update_never_repeats else 0
        return range(first, first + self.period)

    def products(self, steps: int) -> float:
        """Estimate the number of matrix products that compose the transition of `steps` steps.

        `nqm.solvers.moments.compose_span` uses powers between the ends of periods.

        Parameters
        ----------
        steps : int
            Number of steps.

        Returns
        -------
        float
            Number of products, to order of magnitude.
        """
        return _products(self.distinct_periods, steps)


def _products(periods: tuple[int, ...] | None, steps: int) -> float:
    if periods is None or steps <= 1:
        return float(steps)
    if not periods:
        return 1.0
    whole = math.lcm(*periods)
    if steps > 2 * whole:
        return 3.0 * _products(periods, whole) + 1.0
    longest = periods[-1]
    inside = _products(periods[:-1], min(longest - 1, steps))
    return min(float(steps), (inside + 1.0) * (1.0 + steps / longest))


def is_last_of_period(t: int, period: int) -> bool:
    """Tell whether step t is the last of a period: (t + 1) is a multiple of `period`.

    Parameters
    ----------
    t : int
        Step number, 0-based; may be an array if `period` is 1.
    period : int
        Steps, >= 1.

    Returns
    -------
    bool
        Always True if `period` is 1.
    """
    return period == 1 or (t + 1) % period == 0

"""How one step of a method depends on its number t."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A step so late that a method whose steps never repeat has all but stopped changing; a multiple of
#: usual periods.
LATE = 720_720 * 10**6


@dataclass(frozen=True)
class TimeDependence:
    """How `update` and `weights` of an algorithm depend on the step number t.

    The default is a method that does not look at t.

    Attributes
    ----------
    periods : tuple of int
        Numbers n of steps for which `update` asks whether step t is the last of n (see
        `is_last_of_period`): a synchronisation, a snapshot.
    modulus : int
        `update` may look at all of t modulo this number, >= 1.
    update_never_repeats : bool
        Whether `update` looks at t itself, as a mean over all steps does. No two steps are alike
        then: jumps are walked and there is no steady state. With period 1, `update` must take an
        array of times t.
    weights_never_repeat : bool
        Whether `weights` looks at t beyond its remainder modulo `period`, as a mean over a growing
        number of snapshots does.
    """

    periods: tuple[int, ...] = ()
    modulus: int = 1
    update_never_repeats: bool = False
    weights_never_repeat: bool = False

    @property
    def period(self) -> int:
        """Steps after which `update` repeats (where it does); 1 if it does not look at t."""
        return math.lcm(self.modulus, *self.periods)

    @property
    def distinct_periods(self) -> tuple[int, ...] | None:
        """`periods` above 1, smallest first; None where any step may differ from any other."""
        if self.modulus > 1 or self.update_never_repeats:
            return None
        return tuple(sorted({period for period in self.periods if period > 1}))

    def with_period(self, period: int) -> TimeDependence:
        """The same, for a method that also acts at the last of every `period` steps.

        Parameters
        ----------
        period : int
            Steps, >= 1.

        Returns
        -------
        TimeDependence
        """
        return self if period == 1 else replace(self, periods=(*self.periods, period))

    def reduced(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        """Times reduced modulo the period; unchanged where no two steps are alike.

        Parameters
        ----------
        t : ndarray of int
            Step numbers, 0-based.

        Returns
        -------
        ndarray of int
            Shape of t. Equal numbers stand for equal steps, and each is the number of such a step.
            Where only the last step of one period differs from the others, the others share one
            number.
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
            What `update` is given for them.
        """
        if self.update_never_repeats and self.period == 1:
            yield np.arange(times.size), times[:, None]
            return
        for t in np.unique(times):
            yield np.flatnonzero(times == t), int(t)

    def one_cycle(self) -> range:
        """Times of one whole period; of a late one where no two steps are alike.

        Returns
        -------
        range
            `period` step numbers.
        """
        first = LATE if self.update_never_repeats else 0
        return range(first, first + self.period)

    def products(self, steps: int) -> float:
        """About how many matrix products compose the transition of `steps` steps.

        The rule of `nqm.solvers.moments.compose_span`: powers between the ends of periods.

        Parameters
        ----------
        steps : int

        Returns
        -------
        float
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
    """Whether step t is the last of `period` steps: (t + 1) is a multiple of `period`.

    Parameters
    ----------
    t : int
        Step number, 0-based; an array is taken where `period` is 1.
    period : int
        >= 1.

    Returns
    -------
    bool
    """
    return period == 1 or (t + 1) % period == 0

"""Two methods, one run each: which has the lower loss, and how many runs show it.

With Gaussian weights the losses are weighted sums of non-central chi-squares, and their difference
D = L_a - L_b is one with weights of both signs. Its cumulant generating function K(t) = K_a(t) +
K_b(-t) is analytic between its first singularities on either side of 0, and

    P(D > 0) = (1 / 2 pi i) integral of exp(K(t)) / t dt

along a line that crosses the real axis between 0 and the singularity on the right (for P(D < 0)
on the left, with the other sign). The integrand decays algebraically, which a double-exponential
rule takes in its stride (Takahasi & Mori 1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from nqm.distribution import LossDistribution
from nqm.errors import NQMError, check_integer, check_number
from nqm.problems.quadratic import FloatArray
from nqm.words import short_html, short_repr

#: Relative agreement of two rules that is asked for.
AGREEMENT = 1e-9
#: Points of the coarsest rule, and most halvings of its spacing.
POINTS, HALVINGS = 65, 8
#: Ends of the rule in its own variable: exp(pi / 2 sinh 4) is 1e18.
REACH = 4.0
#: By how much the contour leans to the side on which exp(-t gap) decays.
LEAN = 0.5
#: Where no singularity limits a contour it may cross the axis so many times farther out.
EDGELESS = 1e3
#: Most runs that are searched.
MOST_RUNS = 10**9


@dataclass(frozen=True)
class Versus:
    """Losses of independent runs of two methods.

    Attributes
    ----------
    probability : float
        Probability that one run of the first method has a lower loss than one of the second. Two
        losses that are equal for sure count one half.
    difference : float
        Mean loss of the second method less that of the first.
    difference_sd : float
        Standard deviation of the difference of one run of each.
    runs : int or None
        Runs of each method with which a two-sided Welch test tells the means apart with the
        stated power, as if their losses were Gaussian; None if the means are equal. Skewed losses
        need somewhat fewer or more while `runs` is below some tens.
    ordered_runs : int or None
        Runs of each with which the better method has the lower mean with a probability of at least
        the stated power (exact); None if the means are equal.
    """

    probability: float
    difference: float
    difference_sd: float
    runs: int | None
    ordered_runs: int | None

    __repr__ = short_repr
    _repr_html_ = short_html


def compare_runs(
    first: LossDistribution, second: LossDistribution, *, level: float = 0.05, power: float = 0.9
) -> Versus:
    """Compare the losses of independent runs of two methods.

    Parameters
    ----------
    first, second : LossDistribution
        Losses of both methods, for instance entries of `Trajectory.distributions`.
    level : float
        Two-sided level of the test, in (0, 1).
    power : float
        Probability that the test finds the difference, in (level, 1).

    Returns
    -------
    Versus
        Probability that the first wins in one run, and runs needed to show the difference.

    Raises
    ------
    NQMError
        If `level` or `power` is out of range, or the probability is not accurate to 1e-9.
    """
    check_number(
        "compare_runs.level", level, low=0.0, high=1.0, closed_low=False, closed_high=False
    )
    check_number(
        "compare_runs.power", power, low=level, high=1.0, closed_low=False, closed_high=False
    )
    difference = second.mean - first.mean
    return Versus(
        probability=win_probability(first, second),
        difference=difference,
        difference_sd=math.hypot(first.sd, second.sd),
        runs=_runs(difference, first.sd, second.sd, level, power),
        ordered_runs=_ordered_runs(first, second, power),
    )


def win_probability(first: LossDistribution, second: LossDistribution, *, runs: int = 1) -> float:
    """Compute the probability that a loss, or the mean of some, is below an independent one.

    Parameters
    ----------
    first, second : LossDistribution
        The two losses.
    runs : int
        Independent runs of each whose mean losses are compared, >= 1.

    Returns
    -------
    float
        P(first < second), and half of the probability that they are equal. Two rules of integration
        agree to 1e-9, relative to it or to its complement where that is smaller.

    Raises
    ------
    NQMError
        If this accuracy is not reached.
    """
    check_integer("win_probability.runs", runs, 1)
    gap = first.offset - second.offset
    if not first.sd and not second.sd:
        return 0.5 if gap == 0.0 else float(gap < 0.0)
    if runs == 1 and not second.sd:
        return first.cdf(second.offset)
    if runs == 1 and not first.sd:
        return 1.0 - second.cdf(first.offset)
    unit = math.hypot(first.sd, second.sd)
    form = _Difference.of(first, second, unit, runs)
    above = first.mean < second.mean  # then P(D > 0) is the smaller part, found without cancelling
    found = form.tail(1.0 if above else -1.0)
    return float(1.0 - found if above else found)


@dataclass(frozen=True)
class _Difference:
    """Generating function of D = gap + sum of chi-squares with weights of both signs."""

    count: FloatArray
    spread: FloatArray
    place: FloatArray
    gap: float

    @classmethod
    def of(
        cls, first: LossDistribution, second: LossDistribution, unit: float, runs: int
    ) -> _Difference:
        """The difference of the means of `runs` losses each, in units of `unit`."""
        parts = [(one.parts, sign) for one, sign in ((first, 1.0), (second, -1.0))]
        return cls(
            runs * np.concatenate([count for (count, _, _), _ in parts]),
            np.concatenate([sign * spread / (unit * runs) for (_, spread, _), sign in parts]),
            np.concatenate([sign * place / (unit * runs) for (_, _, place), sign in parts]),
            (first.offset - second.offset) / unit,
        )

    def generating(self, t: FloatArray) -> FloatArray:
        """K(t) of complex t, shape (k,)."""
        rest = 1.0 - 2.0 * self.spread * t[:, None]
        terms = -0.5 * np.log(rest) + self.place * t[:, None] / rest
        return np.asarray(terms @ self.count + self.gap * t)

    def tail(self, side: float) -> float:
        """P(D > 0) for side 1, P(D < 0) for side -1."""
        largest = float((side * self.spread).max())
        if largest <= 0.0:  # D varies to the other side only, and the gap decides
            largest = float(np.abs(self.spread).max()) / EDGELESS
        edge = 0.5 / largest

        def exponent(log_t: float) -> float:
            t = side * math.exp(log_t)
            return float(self.generating(np.array([t + 0j]))[0].real) - log_t

        top = math.log(edge) - 1e-12
        place = minimize_scalar(exponent, bounds=(top - 60.0, top), method="bounded").x
        cross = side * math.exp(float(place))
        height, lean = abs(cross), LEAN * np.sign(-self.gap)

        def values(w: FloatArray) -> FloatArray:
            y = np.sinh(0.5 * np.pi * np.sinh(w))
            way = 0.5 * np.pi * np.cosh(w) * np.cosh(0.5 * np.pi * np.sinh(w))
            bent, bend = lean * (np.hypot(1.0, y) - 1.0), lean * y / np.hypot(1.0, y)
            t = cross + height * (1j * y + bent)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                found = np.exp(self.generating(t)) / t * (1j + bend) * height * way
            return np.where(np.isfinite(found), found, 0.0)

        # The lower half is the conjugate of the upper one: twice the real part of f / i.
        grid = np.linspace(0.0, REACH, POINTS)
        each = values(grid)
        total, step = float((0.5 * each[0] + each[1:].sum()).imag), grid[1]
        old = total * step / np.pi
        for _ in range(HALVINGS):
            between = grid[:-1] + 0.5 * step
            total += float(values(between).sum().imag)
            grid, step = np.sort(np.concatenate([grid, between])), 0.5 * step
            new = total * step / np.pi
            if abs(new - old) <= AGREEMENT * abs(new):
                return float(min(1.0, max(0.0, side * new)))
            old = new
        raise NQMError(
            "win_probability: the probability is not accurate to 1e-9 for these losses; compare "
            "samples of nqm.sample"
        )


def _runs(
    difference: float, first_sd: float, second_sd: float, level: float, power: float
) -> int | None:
    """Fewest runs of each with which Welch's test has the power; None if it never has."""
    from scipy import stats  # slow to load

    if difference == 0.0:
        return None
    square = first_sd**2 + second_sd**2
    if square == 0.0:
        return 2
    share = square**2 / (first_sd**4 + second_sd**4)

    def enough(n: int) -> bool:
        degrees = share * (n - 1)
        away = abs(difference) * math.sqrt(n / square)
        if degrees > 1e4:
            return bool(away >= stats.norm.isf(level / 2) + stats.norm.ppf(power))
        cut = stats.t.isf(level / 2, degrees)
        return bool(stats.nct.sf(cut, degrees, away) >= power)

    return _fewest(enough, 2)


def _ordered_runs(first: LossDistribution, second: LossDistribution, power: float) -> int | None:
    """Fewest runs of each whose means are in the right order with probability `power`."""
    if first.mean == second.mean:
        return None
    better, worse = (first, second) if first.mean < second.mean else (second, first)
    return _fewest(lambda n: win_probability(better, worse, runs=n) >= power, 1)


def _fewest(enough: Callable[[int], bool], low: int) -> int | None:
    """Least number from `low` on that is enough; None beyond `MOST_RUNS`."""
    high = low
    while not enough(high):
        if high > MOST_RUNS:
            return None
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high

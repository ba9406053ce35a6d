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
from statistics import NormalDist

import numpy as np
from scipy.optimize import minimize_scalar

from nqm.distribution import LossDistribution
from nqm.errors import NQMError, check_integer, check_number
from nqm.problems.quadratic import FloatArray, Problem
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
#: Least sd of the difference of two dependent losses, in units of theirs: its square is known to
#: rounding over the square of this.
ALIKE = 1e-4
#: Relative difference of two losses that is rounding; and of directions in a chi-square.
ROUNDING = 1e-13
#: Largest shift of a square that is not taken for a linear term.
SHIFT = 1e3
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
    _check_test(level, power)
    return Versus(
        probability=win_probability(first, second),
        difference=second.mean - first.mean,
        difference_sd=math.hypot(first.sd, second.sd),
        runs=_runs(second.mean - first.mean, first.sd, second.sd, level, power),
        ordered_runs=_ordered_runs(first, second, power),
    )


def _check_test(level: float, power: float) -> None:
    check_number(
        "compare_runs.level", level, low=0.0, high=1.0, closed_low=False, closed_high=False
    )
    check_number(
        "compare_runs.power", power, low=level, high=1.0, closed_low=False, closed_high=False
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
    """Generating function of D = gap + sum of squares with weights of both signs.

    Each of `count` independent terms is ``spread (g + shift)^2 + 2 b g`` of a standard normal g,
    with place = spread shift^2, and linear = b^2 where the square's weight is too small for it.
    """

    count: FloatArray
    spread: FloatArray
    place: FloatArray
    linear: FloatArray
    gap: float

    @classmethod
    def of(
        cls, first: LossDistribution, second: LossDistribution, unit: float, runs: int
    ) -> _Difference:
        """The difference of the means of `runs` losses each, in units of `unit`."""
        parts = [(one.parts, sign) for one, sign in ((first, 1.0), (second, -1.0))]
        count, spread, place = (
            np.concatenate([part[k] * (sign if k else 1.0) for part, sign in parts])
            for k in range(3)
        )
        gap = first.offset - second.offset
        return cls(count, spread, place, np.zeros_like(spread), gap).mean_of(runs, unit)

    def mean_of(self, runs: int, unit: float) -> _Difference:
        """The mean of so many independent ones, in units of `unit`."""
        size = unit * runs
        return _Difference(
            runs * self.count,
            self.spread / size,
            self.place / size,
            self.linear / size**2,
            self.gap / unit,
        )

    def generating(self, t: FloatArray) -> FloatArray:
        """K(t) of complex t, shape (k,)."""
        t = t[:, None]
        rest = 1.0 - 2.0 * self.spread * t
        terms = -0.5 * np.log(rest) + (self.place + 2.0 * self.linear * t) * t / rest
        return np.asarray(terms @ self.count + self.gap * t[:, 0])

    def tail(self, side: float) -> float:
        """P(D > 0) for side 1, P(D < 0) for side -1."""
        largest = float((side * self.spread).max())
        if largest <= 0.0:  # no singularity on this side; the gap or the linear terms decide
            largest = float(np.abs(self.spread).max()) / EDGELESS
        if largest == 0.0:  # D is Gaussian
            return NormalDist().cdf(side * self.gap / (2.0 * math.sqrt(self.count @ self.linear)))
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


@dataclass(frozen=True)
class QuadraticDifference:
    """D = L_first - L_second of two losses whose weights are jointly Gaussian by direction.

    Attributes
    ----------
    form : _Difference
        Its generating function.
    mean, sd : float
    """

    form: _Difference
    mean: float
    sd: float

    @classmethod
    def of(cls, problem: Problem, mean: FloatArray, covariance: FloatArray) -> QuadraticDifference:
        """Build it from the moments of both weights.

        With covariance F F', W = h/2 diag(1, -1) and F' W F = U diag(spread) U' it is, for every
        direction, a sum of spread g^2 + 2 b g with b = U' F' W mean, and mean' W mean.

        Parameters
        ----------
        problem : Problem
            With independent directions.
        mean : ndarray, shape (d, 2)
        covariance : ndarray, shape (d, 2, 2)

        Returns
        -------
        QuadraticDifference

        Raises
        ------
        NQMError
            If the losses are so alike that rounding decides.
        """
        used = problem.weight > 0.0
        count = problem.multiplicity[used]
        half = problem.weight[used] / count
        mean, covariance = mean[used], covariance[used]
        size = covariance[:, [0, 1], [0, 1]].max(axis=1, initial=0.0) + (mean**2).max(axis=1)
        gaps = mean[:, 0] - mean[:, 1], *(covariance[:, 0] - covariance[:, 1]).T
        scale = np.sqrt(size), size, size
        if all((np.abs(g) <= ROUNDING * s).all() for g, s in zip(gaps, scale, strict=True)):
            none = np.zeros(0)
            return cls(_Difference(none, none, none, none, 0.0), 0.0, 0.0)
        sd = np.sqrt(np.einsum("dii->di", covariance))
        unit = np.where(sd > 0.0, sd, 1.0)  # each loss has a scale of its own
        values, vectors = np.linalg.eigh(covariance / (unit[:, :, None] * unit[:, None, :]))
        root = sd[:, :, None] * vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
        signed = half[:, None, None] * root * np.array([1.0, -1.0])[:, None]  # W F
        spread, axes = np.linalg.eigh(root.swapaxes(1, 2) @ signed)
        linear = np.einsum("dij,dki,dk->dj", axes, signed, mean)
        fixed = half * (mean[:, 0] ** 2 - mean[:, 1] ** 2)
        total = float(count @ (spread.sum(axis=1) + fixed))
        squares = 2.0 * spread**2 + 4.0 * linear**2
        difference_sd = math.sqrt(float(count @ squares.sum(axis=1)))
        own = 2.0 * half[:, None] ** 2 * np.einsum("dii->di", covariance) * (
            np.einsum("dii->di", covariance) + 2.0 * mean**2
        )  # fmt: skip
        loss_sd = math.sqrt(float(count @ own.sum(axis=1)))
        if difference_sd < ALIKE * loss_sd and np.abs(covariance[:, 0, 1]).any():
            raise NQMError(
                "the two losses differ by less than 1e-4 of their scatter, and rounding would "
                "decide which is the lower one; compare programs that differ more"
            )
        squared = np.abs(linear) <= SHIFT * np.abs(spread)
        place = np.divide(
            linear**2, spread, out=np.zeros_like(linear), where=squared & (spread != 0)
        )
        gap = float(count @ (fixed - place.sum(axis=1)))
        moving = squares > 0.0
        counts = np.broadcast_to(count[:, None], spread.shape)
        form = _Difference(
            counts[moving],
            spread[moving],
            place[moving],
            np.where(squared, 0.0, linear**2)[moving],
            gap,
        )
        return cls(form, total, difference_sd)

    def negative(self, runs: int = 1) -> float:
        """P(mean of `runs` differences < 0), and half of the probability that it is 0.

        Parameters
        ----------
        runs : int
            Independent pairs, >= 1.

        Returns
        -------
        float

        Raises
        ------
        NQMError
            If it is not accurate to 1e-9.
        """
        if not self.sd:
            return 0.5 if self.form.gap == 0.0 else float(self.form.gap < 0.0)
        form = self.form.mean_of(runs, self.sd)
        below = self.mean > 0.0  # then P(D < 0) is the smaller part, found without cancelling
        found = form.tail(-1.0 if below else 1.0)
        return float(found if below else 1.0 - found)


def compare_difference(
    difference: QuadraticDifference,
    sds: tuple[float, float] | None,
    level: float,
    power: float,
) -> Versus:
    """Compare two methods by the law of the difference of their losses.

    Parameters
    ----------
    difference : QuadraticDifference
        Loss of the first less that of the second.
    sds : (float, float), optional
        Standard deviations of both losses for Welch's test of independent runs; a paired test by
        default.
    level, power : float
        As in `compare_runs`.

    Returns
    -------
    Versus
    """
    _check_test(level, power)
    gap = 0.0 - difference.mean  # and not -0
    sign = 1.0 if gap > 0.0 else -1.0

    def ordered(runs: int) -> bool:
        below = difference.negative(runs)
        return (below if sign > 0.0 else 1.0 - below) >= power

    runs = _pairs(gap, difference.sd, level, power) if sds is None else None
    return Versus(
        probability=difference.negative(),
        difference=gap,
        difference_sd=difference.sd,
        runs=runs if sds is None else _runs(gap, *sds, level, power),
        ordered_runs=None if gap == 0.0 else _fewest(ordered, 1),
    )


def _pairs(difference: float, sd: float, level: float, power: float) -> int | None:
    """Fewest pairs of runs with which a paired t test has the power; None if it never has."""
    from scipy import stats  # slow to load

    if difference == 0.0:
        return None
    if sd == 0.0:
        return 2

    def enough(n: int) -> bool:
        away = abs(difference) * math.sqrt(n) / sd
        if n > 1e4:
            return bool(away >= stats.norm.isf(level / 2) + stats.norm.ppf(power))
        return bool(stats.nct.sf(stats.t.isf(level / 2, n - 1), n - 1, away) >= power)

    return _fewest(enough, 2)


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

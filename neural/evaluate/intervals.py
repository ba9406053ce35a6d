"""Means over seeds with Student-t intervals, and over examples with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nqm.errors import NQMError, check_integer, check_number

#: Beyond so many resamples an interval's ends do not change any more.
MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True)
class Interval:
    """Mean over independent runs with a confidence interval.

    Attributes
    ----------
    mean : float
        Mean of the runs' values.
    sd : float
        Sample standard deviation (n - 1); NaN for one run.
    low, high : float
        Ends of the two-sided interval of the mean, Student's t or bootstrap; NaN for one run.
    n : int
        Number of runs.
    level : float
        Coverage of the interval, in (0, 1).
    """

    mean: float
    sd: float
    low: float
    high: float
    n: int
    level: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:.4g} (1 run)"
        return (
            f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] "
            f"({100 * self.level:g} %, sd {self.sd:.2g}, {self.n} runs)"
        )


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Compute mean, standard deviation and Student-t interval of one number per run.

    Parameters
    ----------
    values : sequence of float, length n >= 1
        One number for each run.
    level : float
        Coverage, in (0, 1).

    Returns
    -------
    Interval

    Raises
    ------
    NQMError
        If there is no value, they are not one-dimensional, or `level` is out of range.
    """
    check_number("mean_interval: level", level, low=0, high=1, closed_low=False, closed_high=False)
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise NQMError(f"mean_interval: expected one value per run; got shape {x.shape}")
    n, mean = x.size, float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, math.nan, n, level)
    from scipy.special import stdtrit

    sd = float(x.std(ddof=1))
    reach = float(stdtrit(n - 1, 0.5 + level / 2)) * sd / math.sqrt(n)
    return Interval(mean, sd, mean - reach, mean + reach, n, level)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Compute the interval of the mean of a - b over runs that share a seed (paired t test).

    Parameters
    ----------
    a, b : sequence of float, length n
        One number for each run; entry i of both belongs to the same seed.
    level : float
        Coverage, in (0, 1).

    Returns
    -------
    Interval
        Of the difference.

    Raises
    ------
    NQMError
        If the lengths differ, there is no value, or `level` is out of range.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise NQMError(
            f"paired_difference: a and b must pair up by seed; got shapes {x.shape} and {y.shape}"
        )
    return mean_interval((x - y).tolist(), level)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    level: float = 0.95,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Compute the percentile bootstrap interval of the mean of a - b over examples (Efron 1979).

    Parameters
    ----------
    a, b : sequence of float, length n
        One number for each example, e.g. its loss under two models.
    level : float
        Coverage, in (0, 1).
    resamples : int
        Draws of n examples with replacement.
    seed : int

    Returns
    -------
    Interval
        Of the difference; `n` is the number of examples.

    Raises
    ------
    NQMError
        If the lengths differ, there is no value or one is not finite, or a setting is out of range.
    """
    check_integer("paired_bootstrap: resamples", resamples, 1)
    if resamples > MOST_RESAMPLES:
        raise NQMError(
            f"paired_bootstrap: resamples must be at most {MOST_RESAMPLES:,}; got {resamples:,}"
        )
    check_integer("paired_bootstrap: seed", seed, 0)
    plain = paired_difference(a, b, level)
    if not math.isfinite(plain.mean):
        raise NQMError("paired_bootstrap: a and b must be finite numbers")
    if plain.n == 1:
        return plain
    from scipy.stats import bootstrap

    apart = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    found = bootstrap(
        (apart,), np.mean, n_resamples=resamples, confidence_level=level, method="percentile",
        batch=max(1, 2**22 // apart.size), random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(plain.mean, plain.sd, float(found.low), float(found.high), plain.n, level)

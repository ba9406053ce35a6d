"""Flatness of an optimum: the interval of each parameter in which the loss stays close to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.errors import check_number
from nqm.problems.quadratic import FloatArray
from nqm.words import short_html, short_repr

#: Relative rise of the loss that still counts as flat.
WITHIN = 0.01
#: Distances from the optimum at which the loss is evaluated: shares of the logarithmic distance
#: to the bound.
_LOOKS = np.geomspace(1e-4, 1.0, 40)


@dataclass(frozen=True)
class Flatness:
    """Interval of each parameter, all others fixed, in which the loss stays close to the optimum.

    Attributes
    ----------
    low, high : ndarray, shape of the parameter
        Ends of the interval around the optimum in which the loss stays below (1 + `within`) times
        the optimum; the bound of the search where it does so all the way there.
    within : float
        Relative rise of the loss allowed.
    """

    low: FloatArray
    high: FloatArray
    within: float

    __repr__ = short_repr
    _repr_html_ = short_html


def flatness(
    loss: Callable[[FloatArray], FloatArray],
    at: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    within: float = WITHIN,
) -> Flatness:
    """Find the interval of each positive parameter in which the loss stays close to the optimum.

    Evaluates 40 points outwards, at growing distances, and bisects before the first one whose loss
    exceeds the limit.

    Parameters
    ----------
    loss : callable
        Takes an array x of the shape of `at`; returns losses of that shape: entry k is the loss
        with parameter k at x[k] and all others at the optimum. `nqm.scan` over rates has this form.
    at : array_like, > 0
        The optimum.
    low, high : array_like, > 0
        Bounds of the search, broadcast to `at`.
    within : float
        Relative rise of the loss allowed, > 0.

    Returns
    -------
    Flatness
        Ends of the intervals, of the shape of `at`.

    Raises
    ------
    NQMError
        If `within` is not > 0.
    """
    check_number("flatness.within", within, low=0.0, closed_low=False)
    best = np.asarray(at, dtype=np.float64)
    limit = (1.0 + within) * np.asarray(loss(best))

    def end(bound: ArrayLike) -> FloatArray:
        with np.errstate(over="ignore", invalid="ignore"):
            way = np.log(np.asarray(bound) / best)

            def inside(share: FloatArray) -> NDArray[np.bool_]:
                return np.asarray(loss(best * np.exp(share * way)) <= limit)

            good, bad = np.zeros(best.shape), np.full(best.shape, np.inf)
            for look in _LOOKS:
                still = np.isinf(bad)
                if not still.any():
                    break
                stays = inside(np.full(best.shape, look))
                good = np.where(still & stays, look, good)
                bad = np.where(still & ~stays, look, bad)
            left = np.isfinite(bad)
            bad = np.where(left, bad, 1.0)
            for _ in range(35):
                middle = 0.5 * (good + bad)
                stays = inside(middle)
                good, bad = np.where(stays, middle, good), np.where(stays, bad, middle)
            return np.asarray(np.where(left, best * np.exp(good * way), bound))

    return Flatness(end(low), end(high), within)


def flat_numbers(losses: Mapping[int, float], *, within: float = WITHIN) -> Flatness:
    """Interval of a whole number around its optimum, from losses known at some numbers.

    It holds the known numbers around the best one, up to the first on each side whose loss exceeds
    the limit.

    Parameters
    ----------
    losses : mapping of int to float
        Loss of each number evaluated.
    within : float
        Relative rise of the loss allowed, > 0.

    Returns
    -------
    Flatness
        Scalar ends of the interval.

    Raises
    ------
    NQMError
        If `within` is not > 0.
    """
    check_number("flatness.within", within, low=0.0, closed_low=False)
    values = np.array(sorted(losses))
    loss = np.array([losses[value] for value in values.tolist()])
    best = int(np.argmin(loss))
    out = np.flatnonzero(~(loss <= (1.0 + within) * loss[best]))
    first = out[out < best].max(initial=-1) + 1
    last = out[out > best].min(initial=values.size) - 1
    return Flatness(np.asarray(values[first], float), np.asarray(values[last], float), within)

"""Numbers of twice double precision, as an unevaluated sum high + low of two doubles.

1 - lr h is rounded to a double with a relative error of 1e-16, which n steps multiply by n. Held in
two doubles (Dekker 1971, "A floating-point technique for extending the available precision") its
error is 1e-32, and that of 10^16 steps 1e-16. `Algorithm.update` needs sums, differences and
products only, so there is nothing else here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nqm.problems.quadratic import FloatArray

#: Splits a double into two halves whose products are exact.
SPLITTER = 2.0**27 + 1.0


class DoubleDouble:
    """An array of high + low, with low below half a unit in the last place of high.

    Parameters
    ----------
    high, low : array_like
        The two parts, of shapes that broadcast.
    """

    __array_ufunc__ = None  # so that NumPy calls our operators for an array on the left

    def __init__(self, high: Any, low: Any = 0.0):
        self.high: Any = high
        self.low: Any = low

    def __add__(self, other: Any) -> DoubleDouble:
        high, low = _parts(other)
        total, rest = two_sum(self.high, high)
        return DoubleDouble(*_quick_two_sum(total, rest + (self.low + low)))

    def __mul__(self, other: Any) -> DoubleDouble:
        high, low = _parts(other)
        product, rest = two_product(self.high, high)
        return DoubleDouble(*_quick_two_sum(product, rest + (self.high * low + self.low * high)))

    def __neg__(self) -> DoubleDouble:
        return DoubleDouble(-self.high, -self.low)

    def __sub__(self, other: Any) -> DoubleDouble:
        high, low = _parts(other)
        return self + DoubleDouble(-high, -low)

    def __rsub__(self, other: Any) -> DoubleDouble:
        negative = -self
        return negative.__add__(other)

    __radd__ = __add__
    __rmul__ = __mul__


def _parts(value: Any) -> tuple[Any, Any]:
    if isinstance(value, DoubleDouble):
        return value.high, value.low
    return np.asarray(value, dtype=np.float64), np.float64(0.0)


def two_sum(a: Any, b: Any) -> tuple[FloatArray, FloatArray]:
    """Add two doubles without error (Knuth).

    Parameters
    ----------
    a, b : float or ndarray
        Of shapes that broadcast.

    Returns
    -------
    total, rest : ndarray
        Rounded sum, and its rounding error: total + rest = a + b exactly.
    """
    total = a + b
    second = total - a
    return total, (a - (total - second)) + (b - second)


def two_product(a: Any, b: Any) -> tuple[FloatArray, FloatArray]:
    """Multiply two doubles without error (Dekker, Veltkamp).

    Parameters
    ----------
    a, b : float or ndarray
        Of shapes that broadcast; below 1e300, so that splitting does not overflow.

    Returns
    -------
    product, rest : ndarray
        Rounded product, and its rounding error: product + rest = a * b exactly.
    """
    product = a * b
    a1, a2 = _split(a)
    b1, b2 = _split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _split(a: Any) -> tuple[Any, Any]:
    scaled = SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def _quick_two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    total = a + b
    return total, b - (total - a)

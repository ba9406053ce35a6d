"""Tolerances by kind, named once, and the two comparisons made with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

#: Two exact computations of one number.
IDENTITY = 1e-12
#: A long jump by powers against a walk or a closed form.
JUMP = 1e-9
#: Standard errors a Monte Carlo mean may be away at a fixed seed.
SIGMAS = 4.5


def agree(actual: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    """Assert equality, relative to each entry and, near zero, to the largest entry."""
    expected = np.asarray(expected, dtype=float)
    assert np.isfinite(expected).all(), "the reference itself is not finite"
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def agree_each(actual: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    """Assert equality relative to each entry alone."""
    assert np.isfinite(np.asarray(expected, dtype=float)).all()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=0.0)


def within_error(actual: ArrayLike, expected: ArrayLike, standard_error: ArrayLike) -> None:
    """Assert that Monte Carlo means lie within `SIGMAS` standard errors."""
    gap = np.abs(np.asarray(actual, dtype=float) - np.asarray(expected, dtype=float))
    assert np.isfinite(gap).all()
    random = np.broadcast_to(np.asarray(standard_error) > 0, gap.shape)
    assert np.all(gap[~random] <= IDENTITY), "differs where nothing is random"
    away = gap[random] / np.broadcast_to(standard_error, gap.shape)[random]
    assert np.all(away < SIGMAS), f"{away.max():.2f} standard errors away"


def half_digit(printed: str) -> float:
    """Half of the last digit of a printed number, e.g. 5e-7 for '2.222e-3'."""
    mantissa, _, power = printed.partition("e")
    digits = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(power or 0) - digits)

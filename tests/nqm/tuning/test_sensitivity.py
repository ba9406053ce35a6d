"""Flatness of an optimum: closed forms, bounds, and runs of whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nqm
from nqm import SGD, NQMError, Problem
from nqm.tuning import flatness
from nqm.tuning.integer_search import search_numbers
from nqm.tuning.sensitivity import flat_numbers
from tests.tolerances import agree_each


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 10.0), st.floats(0.01, 10.0), st.floats(1e-4, 0.5))
def test_one_step_in_one_direction(h, v, within):
    """The loss is a parabola in the rate: c (lr - best)^2 = within * least."""
    problem = Problem([h], [v])
    best = h / (h**2 + v)
    least, c = 0.5 * h * v / (h**2 + v), 0.5 * h * (h**2 + v)
    half = np.sqrt(within * least / c)
    flat = flatness(
        lambda lr: nqm.scan(problem, SGD(), lr, 1).loss, [best], 1e-9, 1e9, within=within
    )
    agree_each(flat.high, [best + half], 1e-6)
    if half < best:
        np.testing.assert_allclose(flat.low, [best - half], rtol=1e-6, atol=1e-8 * best)
    else:
        assert flat.low == 1e-9


def test_each_parameter_has_its_own_ends_and_bounds():
    """Valleys log(x)^2 of different width; NaN counts as outside."""
    width = np.array([0.1, 1.0, 10.0])

    def loss(x):
        return np.where(x > 50.0, np.nan, 1.0 + width * np.log(x) ** 2)

    flat = flatness(loss, np.ones(3), 1e-3, 100.0, within=0.5)
    ends = np.sqrt(0.5 / width)
    agree_each(flat.low, np.exp(-ends), 1e-9)
    agree_each(flat.high, np.exp(ends), 1e-9)
    flat = flatness(loss, np.ones(3), 0.9, 1.0, within=0.5)
    agree_each(flat.low, np.maximum(np.exp(-ends), 0.9), 1e-9)
    agree_each(flat.high, np.ones(3), 1e-12)
    flat = flatness(loss, np.ones(3), 0.9, 100.0, within=10.0)
    assert flat.high[0] == pytest.approx(50.0)


def test_run_of_whole_numbers():
    flat = flat_numbers({1: 1.0, 2: 1.2, 5: 1.05, 7: 1.0 - 1e-9, 8: 1.09, 20: 1.3}, within=0.1)
    assert (flat.low, flat.high) == (5, 8)
    flat = flat_numbers({3: 2.0}, within=0.1)
    assert (flat.low, flat.high) == (3, 3)
    flat = flat_numbers({1: np.inf, 2: 1.0, 3: np.inf}, within=0.1)
    assert (flat.low, flat.high) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 3000), st.floats(0.5, 3.0))
def test_search_of_a_valley_finds_its_bottom(bottom, more, power):
    high = bottom + more

    def loss(x):
        assert 1 <= x <= high
        return 1.0 + abs(np.log(x / bottom)) ** power

    losses = search_numbers(loss, 1, high)
    assert min(losses, key=lambda x: losses[x]) == bottom
    assert len(losses) < 70


def test_misuse_is_an_error():
    with pytest.raises(NQMError, match="within"):
        flatness(lambda x: x, [1.0], 0.5, 2.0, within=0.0)

"""The distribution of the loss against SciPy's chi-squares and against draws."""

from __future__ import annotations

import literal
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tolerances import IDENTITY, SIGMAS, agree_each

import nqm
from nqm import SGD, LatePhase, MultiplicativeLatePhase, NQMError, Problem
from nqm.distribution import LossDistribution, loss_quantile

LEVELS = (0.001, 0.05, 0.3, 0.5, 0.9, 0.99, 0.9999)
#: What the integral promises (its own tolerances are 1e-10).
CDF = 1e-8


def equal(count: float, mean: float, variance: float, h: float = 0.7) -> LossDistribution:
    problem = Problem([h], 1.0, count)
    return LossDistribution(problem, np.array([mean]), np.array([variance]))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 1000])
def test_equal_directions_are_a_chi_square(count):
    """Loss = h s / 2 times chi-square with `count` degrees of freedom."""
    found, reference = equal(count, 0.0, 2.0), stats.chi2(count, scale=0.7)
    for level in LEVELS:
        x = reference.ppf(level)
        assert found.cdf(x) == pytest.approx(level, abs=CDF)
        assert found.quantile(level) == pytest.approx(x, rel=1e-6, abs=CDF / reference.pdf(x))


@pytest.mark.parametrize("count", [1, 2, 7, 200])
@pytest.mark.parametrize("mean", [0.3, 2.0])
def test_shifted_equal_directions_are_a_noncentral_chi_square(count, mean):
    """Shift count mean^2 / s."""
    found = equal(count, mean, 0.5)
    reference = stats.ncx2(count, count * mean**2 / 0.5, scale=0.7 * 0.5 / 2)
    for level in LEVELS:
        x = reference.ppf(level)
        assert found.cdf(x) == pytest.approx(level, abs=CDF)
        assert found.quantile(level) == pytest.approx(x, rel=1e-6, abs=CDF / reference.pdf(x))


def test_two_equal_directions_are_exponential():
    problem = Problem([0.5, 1.0], 1.0)
    found = LossDistribution(problem, np.zeros(2), np.array([2.0, 1.0]))  # h s = 1 in both
    for x in (1e-3, 0.1, 1.0, 5.0, 20.0):
        assert found.cdf(x) == pytest.approx(1 - np.exp(-x), abs=CDF)
    for level in LEVELS:
        assert found.quantile(level) == pytest.approx(-np.log1p(-level), rel=1e-6)


def test_two_unequal_directions_twice_are_hypoexponential():
    """Exp(a) + Exp(b): 1 - (a e^(-x/a) - b e^(-x/b)) / (a - b)."""
    a, b = 1.0, 0.2
    found = LossDistribution(Problem([1.0, 0.2], 1.0, 2.0), np.zeros(2), np.ones(2))
    for x in (0.01, 0.3, 1.0, 4.0, 12.0):
        expected = 1 - (a * np.exp(-x / a) - b * np.exp(-x / b)) / (a - b)
        assert found.cdf(x) == pytest.approx(expected, abs=CDF)


def test_general_weights_are_what_is_drawn():
    """Empirical frequencies at known thresholds, in binomial standard errors."""
    h = np.array([1.0, 0.5, 0.1, 0.01, 0.0])
    mean, var = np.array([1.0, 0.0, -3.0, 5.0, 9.0]), np.array([0.2, 1.0, 0.0, 30.0, 4.0])
    found = LossDistribution(Problem(h, 1.0, [1, 2, 1, 3, 1]), mean, var)
    rng, n = np.random.default_rng(8), 200_000
    index = np.array([0, 1, 1, 2, 3, 3, 3, 4])
    x = mean[index] + np.sqrt(var[index]) * rng.standard_normal((n, index.size))
    losses = x**2 @ (0.5 * h[index])
    assert losses.min() >= found.offset == 0.5 * 0.1 * 9.0  # the direction that does not move
    for level in (0.01, 0.2, 0.5, 0.8, 0.99):
        x_level = found.quantile(level)
        share = np.mean(losses <= x_level)
        assert abs(share - level) < SIGMAS * np.sqrt(level * (1 - level) / n)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.floats(-2, 2), st.floats(0.01, 3)), min_size=1,
             max_size=5),
    st.floats(0.01, 0.99),
)  # fmt: skip
def test_quantile_inverts_a_rising_cdf(directions, level):
    h, mean, var = np.array(directions).T
    found = LossDistribution(Problem(h, 1.0), mean, var)
    x = found.quantile(level)
    assert found.cdf(x) == pytest.approx(level, abs=1e-7)
    assert found.cdf(0.9 * x) < level < found.cdf(1.1 * x)
    assert found.cdf(-1.0) == found.cdf(0.0) == 0.0
    assert found.cdf(x + 60 * found.sd) == pytest.approx(1.0, abs=1e-7)


def test_moments_of_the_distribution():
    """Mean sum m h (s + mean^2) / 2 and the literal variance."""
    h, m = np.array([1.0, 0.3, 0.05]), np.array([1.0, 4.0, 2.5])
    mean, var = np.array([0.5, -1.0, 2.0]), np.array([0.2, 0.7, 3.0])
    found = LossDistribution(Problem(h, 1.0, m), mean, var)
    assert found.mean == pytest.approx(0.5 * (m * h) @ (mean**2 + var), rel=IDENTITY)
    assert found.sd**2 == pytest.approx(literal.loss_variance(h, mean, var, m), rel=IDENTITY)


def test_a_loss_without_noise_is_a_step():
    found = LossDistribution(Problem([2.0], 1.0), np.array([3.0]), np.array([0.0]))
    assert (found.cdf(8.999), found.cdf(9.0)) == (0.0, 1.0)
    assert found.quantile(0.3) == 9.0


def test_extreme_weights():
    """Curvatures over 12 orders: the large one rules, as a single chi-square."""
    problem = Problem([1.0, 1e-12], 1.0)
    reference = stats.chi2(1, scale=0.5)
    for level in (0.05, 0.5, 0.95):
        found = loss_quantile(problem, np.zeros(2), np.ones(2), level)
        assert found == pytest.approx(reference.ppf(level), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("algorithm", [SGD(), LatePhase(3, spread=0.5)])
def test_loss_sd_and_quantiles_of_a_trajectory(algorithm, problem):
    result = nqm.solve(problem, nqm.constant(algorithm, 0.3, 12), [0, 5, 12])
    mean, var = result.weight_mean, result.weight_variance
    expected = [
        literal.loss_variance(problem.curvature, m, s) for m, s in zip(mean, var, strict=True)
    ]
    agree_each(result.loss_sd**2, expected, IDENTITY)
    drawn = nqm.sample(problem, nqm.constant(algorithm, 0.3, 12), [0, 5, 12], replicas=20_000)
    for row, bands in enumerate(result.quantiles((0.05, 0.5, 0.95))):
        for level, x in zip((0.05, 0.5, 0.95), bands, strict=True):
            share = np.mean(drawn.samples[row] <= x)
            assert abs(share - level) < SIGMAS * np.sqrt(level * (1 - level) / 20_000)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1e-9, float("nan")])
def test_levels_beyond_the_integral_are_errors(level):
    with pytest.raises(NQMError, match=r"quantile\.level"):
        equal(3, 0.0, 1.0).quantile(level)


def test_quantiles_need_weights_by_direction():
    problem = Problem([1.0, 0.5], 1e-4, minimum=1.0)
    scalar = nqm.constant(MultiplicativeLatePhase(2, coupling="scalar"), 0.1, 3)
    with pytest.raises(NQMError, match="Gaussian weights"):
        nqm.solve(problem, scalar).quantiles()

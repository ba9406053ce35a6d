"""The distribution of the loss against SciPy's chi-squares and against draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import nqm
from nqm import SGD, LatePhase, MultiplicativeLatePhase, NQMError, Problem
from nqm.distribution import LossDistribution, _Sum, loss_quantile
from tests import literal
from tests.tolerances import IDENTITY, SIGMAS, agree_each

LEVELS = (1e-12, 1e-4, 0.05, 0.3, 0.5, 0.9, 0.9999, 1 - 1e-12)
#: What is promised of a probability, relative to it or to what is left to 1.
CDF = 1e-8


def close_to(level: float, probability: float, rest: float) -> None:
    """Assert that a distribution function and its complement have this level."""
    if level > 0.5:
        assert rest == pytest.approx(1.0 - level, rel=CDF)
    else:
        assert probability == pytest.approx(level, rel=CDF)


def equal(count: float, mean: float, variance: float, h: float = 0.7) -> LossDistribution:
    problem = Problem([h], 1.0, count)
    return LossDistribution(problem, np.array([mean]), np.array([variance]))


@pytest.mark.parametrize("count", [0.3, 1, 2, 3, 5, 40, 1000])
def test_equal_directions_are_a_chi_square(count):
    """Loss = h s / 2 times chi-square with `count` degrees of freedom."""
    found, reference = equal(count, 0.0, 2.0), stats.chi2(count, scale=0.7)
    for level in LEVELS:
        x = found.quantile(level)
        close_to(level, reference.cdf(x), reference.sf(x))
        assert found.cdf(x) == pytest.approx(level, rel=CDF)


@pytest.mark.parametrize("count", [1, 2, 7, 200])
@pytest.mark.parametrize("shift", [0.3, 30.0, 1e4, 1e8])
def test_shifted_equal_directions_are_a_noncentral_chi_square(count, shift):
    """Of shift count mean^2 / s, from a thousandth of the sd above zero to 5000 of them."""
    found = equal(count, np.sqrt(0.5 * shift / count), 0.5)
    reference = stats.ncx2(count, shift, scale=0.7 * 0.5 / 2)
    for level in LEVELS:
        x = found.quantile(level)
        close_to(level, reference.cdf(x), reference.sf(x))
        assert found.cdf(x) == pytest.approx(level, rel=CDF)


def test_one_direction_in_closed_form():
    """P(h x^2 / 2 <= l) = P(|x| <= sqrt(2 l / h)), down to the smallest levels."""
    found = LossDistribution(Problem([2.0], 1.0), np.array([1.5]), np.array([0.25]))
    for level in (1e-12, 1e-6, 1e-3, 0.4):
        edge = np.sqrt(found.quantile(level))
        # The density hardly changes over the little interval that small levels fill.
        share = stats.norm(1.5, 0.5).cdf(edge) - stats.norm(1.5, 0.5).cdf(-edge)
        if level < 1e-5:
            share = 2 * edge * stats.norm(1.5, 0.5).pdf(0.0) * (1 + edge**2 * (3**2 - 1) / 6 / 0.25)
        assert share == pytest.approx(level, rel=CDF)


def test_a_mean_far_above_the_deviation():
    """A known start and one step of little noise: all but normal, with the skewness of the sum.

    Cornish and Fisher's expansion leaves out terms of the order of skewness^2 = 1e-8 of an sd.
    """
    h = 1.0 / np.arange(1, 101)
    problem = Problem(h, 0.01 * h, initial_mean=1.0, initial_variance=0.0)
    result = nqm.solve(problem, nqm.constant(SGD(), 0.1, 1, batch_size=4096), [1])
    mean, var = 1.0 - 0.1 * h, 0.1**2 * 0.01 * h / 4096
    assert result.weight_variance[0] == pytest.approx(var, rel=IDENTITY)
    sd = np.sqrt(np.sum(h**2 * (0.5 * var**2 + mean**2 * var)))
    third = np.sum(h**3 * (var**3 + 3 * mean**2 * var**2))  # third cumulant, 8 a^3 + 24 a^2 b
    middle = 0.5 * np.sum(h * (mean**2 + var))
    for level, found in zip((0.05, 0.5, 0.95), result.quantiles((0.05, 0.5, 0.95))[0], strict=True):
        z = stats.norm.ppf(level)
        expected = middle + sd * (z + (z**2 - 1) / 6 * third / sd**3)
        assert abs(found - expected) < 1e-6 * sd
        assert 2.4 < found < 2.5


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


direction = st.tuples(
    st.floats(-12, 0).map(lambda x: 10**x),  # curvature
    st.one_of(st.just(0.0), st.floats(-4, 4).map(lambda x: 10**x)),  # mean
    st.floats(-8, 0).map(lambda x: 10**x),  # variance
    st.sampled_from([1.0, 1.0, 2.0, 300.0, 0.5]),  # multiplicity
)


@settings(max_examples=40)
@given(st.lists(direction, min_size=1, max_size=6))
def test_quantile_inverts_a_rising_cdf(directions):
    """Over twelve orders of curvature, means of nothing to 10^8 deviations, broken counts."""
    h, mean, var, count = np.array(directions).T
    found = LossDistribution(Problem(h, 1.0, count), mean, var)
    losses = [found.quantile(level) for level in LEVELS]
    assert np.all(np.diff(losses) >= 0.0)
    # A loss is a number of 53 bits: that much of an sd cannot be told apart in it.
    blur = 4e-16 * found.mean / found.sd
    for level, x in zip(LEVELS, losses, strict=True):
        if x == 0.0:  # below the smallest number there is
            assert found.cdf(1e-280 * found.mean) > level
            continue
        scale = level if level < 0.5 else 1.0 - level
        slack = (CDF + 20 * blur) * scale + (2e-16 if level > 0.5 else 0.0)
        assert abs(found.cdf(x) - level) <= slack
    assert found.cdf(-1.0) == found.cdf(0.0) == 0.0
    assert found.cdf(found.mean + 1e4 * found.sd) == pytest.approx(1.0, abs=1e-7)


def hypoexponential(x: float, scale: list[float]) -> float:
    """P(sum of exponentials > x): two equal directions make one exponential of mean h s."""
    shares = [np.prod([s / (s - r) for r in scale if r != s]) for s in scale]
    return float(np.array(shares) @ np.exp(-x / np.array(scale)))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=5, unique=True), st.sampled_from(LEVELS))
def test_pairs_of_scales_far_apart_are_a_sum_of_exponentials(powers, level):
    scale = [3.0**-power for power in powers]
    found = LossDistribution(Problem(scale, 1.0, 2.0), np.zeros(len(scale)), np.ones(len(scale)))
    rest = hypoexponential(found.quantile(level), scale)
    # The alternating sum of the reference cancels by up to the product of its coefficients.
    lost = 1e-15 * max(abs(np.prod([s / (s - r) for r in scale if r != s])) for s in scale)
    goal = 1.0 - level
    assert abs(rest - goal) <= CDF * min(level, goal) + 10 * lost


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


@pytest.mark.parametrize("algorithm", [SGD(), LatePhase(3, spread=0.5, gamma="mean")])
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


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1e-13, float("nan")])
def test_levels_out_of_reach_are_errors(level):
    with pytest.raises(NQMError, match=r"quantile\.level"):
        equal(3, 0.0, 1.0).quantile(level)


def test_quantiles_need_weights_by_direction():
    problem = Problem([1.0, 0.5], 1e-4, minimum=1.0)
    scalar = nqm.constant(MultiplicativeLatePhase(2, coupling="scalar", gamma="mean"), 0.1, 3)
    with pytest.raises(NQMError, match="Gaussian weights"):
        nqm.solve(problem, scalar).quantiles()


# --- the cumulant generating function ----------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["equal", "harmonic", "counted"])
def test_the_generating_function_is_the_sum_of_its_logarithms(kind, shift, centred):
    """Also where the angle of the product of all factors has turned many times."""
    d = 700
    spread = np.full(d, 0.9) if kind == "equal" else 1.0 / np.arange(1, d + 1)
    count = np.repeat([1.0, 2.5], d // 2) if kind == "counted" else np.ones(d)
    form = _Sum.of(count, spread, shift * spread)
    # Left of the first singularity, far up, and above all singularities.
    t = np.concatenate([-(10.0 ** np.arange(-3, 4)), [0.3, 0.54]])[:, None]
    t = (t + 1j * np.array([0.0, 1e-3, 0.1, 1.0, 30.0, 1e4])).reshape(-1)
    t = t[(t.imag > 0.0) | (t.real < 0.5)]
    u = 2.0 * form.spread * t[:, None]
    terms = -0.5 * (np.log1p(-u) + (u if centred else 0.0))
    terms = terms + form.place * t[:, None] / (1.0 - u) * (u if centred else 1.0)
    right = terms @ form.count
    np.testing.assert_allclose(form.generating(t, centred), right, rtol=1e-12, atol=1e-12)
    for one, value in zip(t, right, strict=True):
        found = form.around(complex(one), centred)
        assert found[0] == pytest.approx(value.real, rel=1e-11, abs=1e-11)
        a, b, r = form.spread, form.place, 1.0 / (1.0 - 2.0 * form.spread * one)
        slope = (a * r + b * r**2) @ form.count - (form.mean if centred else 0.0)
        second = (2.0 * a**2 * r**2 + 4.0 * a * b * r**3) @ form.count
        assert found[1] == pytest.approx(slope, rel=1e-11, abs=1e-11)
        assert found[2] == pytest.approx(second, rel=1e-11)
        nearest = np.abs(0.5 / form.spread - one).min()
        assert found[3] == pytest.approx(nearest, rel=1e-12)


@pytest.mark.parametrize("level", [1e-6, 0.02, 0.5, 0.9, 1 - 1e-6])
def test_the_probability_is_imhofs_integral(level):
    """P(Q > x) = 1/2 + the integral of sin(theta(u)) / (pi u rho(u)) over u > 0 (Imhof 1961)."""
    h, variance, mean = np.array([3.0, 1.0, 0.4, 0.1]), np.array([1.0, 2.0, 0.5, 3.0]), 0.6
    found = LossDistribution(Problem(h, 1.0, [1, 2, 1, 3]), np.full(4, mean), variance)
    x, w, n = found.quantile(level), 0.5 * h * variance, np.array([1, 2, 1, 3])
    moved = mean**2 / variance

    nodes, weights = np.polynomial.legendre.leggauss(12)
    u = (np.arange(4000)[:, None] + 0.5 + 0.5 * nodes) * 0.5  # sides of length 1/2
    wu = w * u[..., None]
    theta = 0.5 * (np.arctan(wu) + moved * wu / (1 + wu**2)) @ n - 0.5 * x * u
    rho = np.exp((0.25 * np.log1p(wu**2) + 0.5 * moved * wu**2 / (1 + wu**2)) @ n)
    tail = 0.5 + 0.25 * np.sum(np.sin(theta) / (np.pi * u * rho) @ weights)
    # The oscillating integral itself is right to about 1e-9.
    assert tail == pytest.approx(1.0 - level, abs=3e-9)


def test_directions_that_stand_for_several_are_several():
    h, n = np.array([2.0, 0.7, 0.3]), np.array([1, 3, 50])
    binned = LossDistribution(Problem(h, 1.0, n), np.array([0.1, 0.2, 0.3]), 0.5 / h)
    single = LossDistribution(
        Problem(np.repeat(h, n), 1.0), np.repeat([0.1, 0.2, 0.3], n), np.repeat(0.5 / h, n)
    )
    for level in LEVELS:
        assert binned.quantile(level) == pytest.approx(single.quantile(level), rel=CDF)

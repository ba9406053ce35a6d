"""Which loss is lower: closed forms, and Monte Carlo of the literal algorithms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from nqm import (
    SGD,
    HeavyBall,
    LossDistribution,
    NQMError,
    Problem,
    compare_runs,
    constant,
    sample,
    solve,
    win_probability,
)
from nqm.cli import main
from nqm.problems.spectra import harmonic


def law(spread, mean=0.0, *, count=1, curvature=1.0):
    problem = Problem(np.full(np.size(spread), curvature), 1.0, np.full(np.size(spread), count))
    mean = np.broadcast_to(mean, np.shape(spread)).astype(float)
    return LossDistribution(problem, np.atleast_1d(mean), np.atleast_1d(np.asarray(spread, float)))


@pytest.mark.parametrize(("count", "ratio"), [(1, 3.0), (1, 1e6), (2, 5.0), (7, 1.3), (100, 5.0)])
def test_equal_curvatures_make_a_ratio_of_chi_squares(count, ratio):
    """P(a chi2_n < b chi2_n) is the F distribution's, far into its tail."""
    first, second = law([1.0], count=count), law([ratio], count=count)
    assert 1 - win_probability(first, second) == pytest.approx(
        stats.f.sf(ratio, count, count), rel=1e-9, abs=1e-14
    )
    assert win_probability(second, first) == pytest.approx(
        stats.f.sf(ratio, count, count), rel=1e-9
    )


def test_exponential_losses():
    """Two directions of one curvature have an exponential loss; the rates' shares win."""
    first, second = law([0.7], count=2), law([0.4], count=2)
    assert win_probability(first, second) == pytest.approx(0.4 / 1.1, rel=1e-9)


def test_sides_add_up_and_equals_are_even():
    rng = np.random.default_rng(4)
    first, second = (law(rng.exponential(size=30), rng.normal(size=30)) for _ in range(2))
    total = win_probability(first, second) + win_probability(second, first)
    assert total == pytest.approx(1.0, abs=1e-12)
    assert win_probability(first, first) == pytest.approx(0.5, rel=1e-9)


def test_losses_that_do_not_vary():
    fixed, higher, varying = law([0.0], 1.0), law([0.0], 2.0), law([1.0])
    assert win_probability(fixed, higher) == 1.0
    assert win_probability(higher, fixed) == 0.0
    assert win_probability(fixed, fixed) == 0.5
    # The loss of the varying one is chi2_1 / 2, that of the fixed one 1 / 2.
    assert win_probability(varying, fixed) == pytest.approx(stats.chi2.cdf(1.0, 1), rel=1e-9)
    assert win_probability(fixed, varying) == pytest.approx(stats.chi2.sf(1.0, 1), rel=1e-9)
    for runs in (2, 5):  # a mean of chi-squares
        value = stats.chi2.sf(runs, runs)
        assert win_probability(fixed, varying, runs=runs) == pytest.approx(value, rel=1e-8)
        value = stats.chi2.cdf(runs, runs)
        assert win_probability(varying, fixed, runs=runs) == pytest.approx(value, rel=1e-8)
    partly = law([1.0, 0.0], [0.0, 1.0])  # chi2_1 / 2 + 1 / 2: the contour leans
    value = stats.norm.expect(lambda z: stats.chi2.cdf(z**2 + 1.0, 1), epsabs=1e-12)
    assert win_probability(varying, partly) == pytest.approx(value, rel=1e-8)
    assert compare_runs(fixed, fixed).runs is None
    assert compare_runs(fixed, higher).runs == 2


@pytest.fixture(scope="module")
def pair():
    h = harmonic(20)
    problem = Problem(h, h, initial_mean=1.0, initial_variance=0.2)
    programs = constant(SGD(), 0.15, 60), constant(HeavyBall(0.8), 0.1, 60)
    laws = [next(solve(problem, program, [60]).distributions()) for program in programs]
    drawn = [
        sample(problem, program, [60], replicas=20_000, seed=seed).samples[0]
        for seed, program in enumerate(programs)
    ]
    return laws, drawn


def test_two_methods_against_monte_carlo(pair):
    (first, second), (a, b) = pair
    found = compare_runs(first, second)
    wins = a < b
    assert abs(wins.mean() - found.probability) < 4.5 * wins.std() / np.sqrt(wins.size)
    assert 0.05 < abs(found.probability - 0.5) < 0.45
    gap = b - a
    assert abs(gap.mean() - found.difference) < 4.5 * gap.std() / np.sqrt(gap.size)
    assert gap.std() == pytest.approx(found.difference_sd, rel=0.03)


def test_means_of_several_runs(pair):
    (first, second), (a, b) = pair
    means = [part[:18_000].reshape(-1, 3).mean(axis=1) for part in (a, b)]
    wins = means[0] < means[1]
    expected = win_probability(first, second, runs=3)
    assert abs(wins.mean() - expected) < 4.5 * wins.std() / np.sqrt(wins.size)
    ordered = compare_runs(first, second, power=0.9).ordered_runs
    better, worse = (first, second) if first.mean < second.mean else (second, first)
    assert win_probability(better, worse, runs=ordered) >= 0.9
    assert win_probability(better, worse, runs=ordered - 1) < 0.9
    # The mean of n exponential losses is a gamma variable: chi-squares of n times the count.
    one, other = law([1.0], count=2), law([1.4], count=2)
    value = stats.f.cdf(1.4, 20, 20)
    assert win_probability(one, other, runs=10) == pytest.approx(value, rel=1e-9)


def test_the_runs_have_the_power():
    """Welch's test of so many drawn losses finds the difference in the share of cases asked for."""
    first, second = law(np.full(30, 1.0)), law(np.full(30, 1.15))
    runs = compare_runs(first, second, level=0.05, power=0.8).runs
    assert 50 < runs < 200
    rng = np.random.default_rng(7)
    a, b = (scale * rng.chisquare(30, (1500, runs)) / 2 for scale in (1.0, 1.15))
    found = stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05
    # 2 % for losses that are not Gaussian, and the scatter of a share.
    assert abs(found.mean() - 0.8) < 0.02 + 4.5 * np.sqrt(0.16 / 1500)
    # Equal sds and the known formula of two Gaussian means.
    z = stats.norm.isf(0.025) + stats.norm.ppf(0.8)
    rough = z**2 * (first.sd**2 + second.sd**2) / (second.mean - first.mean) ** 2
    assert runs == pytest.approx(rough, abs=3)


def test_correlated_directions_count():
    """Two directions with one noise: the loss is one chi-square of twice the weight."""
    problem = Problem([1.0, 1.0], 1.0, noise_correlation=[[1.0, 1.0], [1.0, 1.0]])
    first = LossDistribution(problem, np.zeros(2), np.ones((2, 2)))
    second = law([1.5])
    assert win_probability(first, second) == pytest.approx(stats.f.cdf(0.75, 1, 1), rel=1e-9)


def test_the_command(tmp_path):
    for name, lr in (("low", 0.02), ("high", 0.4)):
        (tmp_path / f"{name}.toml").write_text(
            "problem = {curvature = [1.0, 0.5], noise_variance = [1.0, 0.5]}\n"
            f"phase = [{{algorithm = 'sgd', lr = {lr}, steps = 200}}]\n"
        )
    files = [str(tmp_path / f"{name}.toml") for name in ("low", "high")]
    command = ["versus", files[0], files[1], "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert set(row) == {
        "loss", "other_loss", "probability", "difference", "difference_sd", "runs", "ordered_runs"
    }  # fmt: skip
    assert row["difference"] == pytest.approx(row["other_loss"] - row["loss"])
    assert row["probability"] > 0.8
    same = CliRunner().invoke(main, [*command, "--set", "phase.0.lr=0.4"])
    assert json.loads(same.stdout)["rows"][0][2] == pytest.approx(0.5)
    diverged = CliRunner().invoke(main, [*command, "--set", "phase.0.lr=3.0"])
    assert diverged.exit_code == 2


@pytest.mark.parametrize("options", [{"level": 0.0}, {"power": 0.01}, {"power": 1.0}])
def test_misuse_is_an_error(options):
    with pytest.raises(NQMError, match=next(iter(options))):
        compare_runs(law([1.0]), law([2.0]), **options)

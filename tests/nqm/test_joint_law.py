"""Joint law of losses: closed forms, and Monte Carlo of the literal algorithms, step by step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Cosine,
    Ensemble,
    Federated,
    HeavyBall,
    LatePhase,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    PrimalAverage,
    Problem,
    ScheduleFree,
    compare_runs,
    constant,
    joint_losses,
    solve,
    steps_to_target,
)
from nqm.cli import main
from nqm.problems.spectra import harmonic
from tests.tolerances import IDENTITY, JUMP, SIGMAS, agree, within_error

H = np.array([1.0, 0.6, 0.3, 0.1])
PROBLEM = Problem(H, 2.0 * H, initial_mean=1.0, initial_variance=0.3)
AT = [0, 5, 20, 60]
REPLICAS = 40_000


@pytest.fixture(scope="module")
def literal():
    """Losses (2, 60 + 1, replicas) of SGD with batch 4, and of heavy ball on the same minibatches.

    The second one's minibatches have 8 examples: the first one's, and four more.
    """
    rng = np.random.default_rng(3)
    shape = (4, REPLICAS)
    x = 1.0 + np.sqrt(0.3) * rng.standard_normal(shape)
    y, buffer = x.copy(), np.zeros(shape)
    h, sd = H[:, None], np.sqrt(2.0 * H / 4.0)[:, None]
    losses = [[0.5 * H @ x**2, 0.5 * H @ y**2]]
    for _ in range(60):
        e, f = sd * rng.standard_normal(shape), sd * rng.standard_normal(shape)
        x = x - 0.3 * (h * x + e)
        buffer = 0.7 * buffer + h * y + 0.5 * (e + f)
        y = y - 0.15 * buffer
        losses.append([0.5 * H @ x**2, 0.5 * H @ y**2])
    return np.array(losses).swapaxes(0, 1)


PAIR = constant(SGD(), 0.3, 60, batch_size=4), constant(HeavyBall(0.7), 0.15, 60, batch_size=8)


def share(event):
    return event.mean(), event.std() / np.sqrt(event.size)


def test_the_exact_law_against_the_literal_algorithms(literal):
    joint = joint_losses(PROBLEM, PAIR, AT)
    drawn = literal[:, AT]
    within_error(joint.loss, drawn.mean(axis=2), drawn.std(axis=2) / np.sqrt(REPLICAS))
    flat = drawn.reshape(8, -1)
    gaps = flat - flat.mean(axis=1, keepdims=True)
    products = gaps[:, None] * gaps[None]
    error = products.std(axis=2) / np.sqrt(REPLICAS)
    within_error(joint.covariance.reshape(8, 8), products.mean(axis=2), error)
    assert joint.correlation[0, 3, 1, 3] > 0.3  # of one stream of minibatches
    for first, second in [((0, 3), (1, 3)), ((0, 2), (1, 1)), ((0, 3), (0, 2)), ((1, 2), (1, 3))]:
        event = drawn[first] < drawn[second]
        within_error(joint.win_probability(first, second), *share(event))
    means = drawn[:, 3].reshape(2, -1, 4).mean(axis=2)
    within_error(joint.win_probability(runs=4), *share(means[0] < means[1]))


def test_whole_runs_against_the_literal_algorithms(literal):
    joint = joint_losses(PROBLEM, PAIR, AT)
    draws, drawn = joint.draw(REPLICAS, seed=1), literal[:, AT]

    def same(found, event):
        mean, error = share(event)
        within_error(found.probability, mean, np.sqrt(2.0) * error)
        assert found.low < found.probability < found.high

    below = (drawn[0] < drawn[1])[1:].all(axis=0)  # the start is the same
    assert 0.02 < below.mean() < 0.98
    same(draws.always_below(), below)
    same(draws.best_below(0.2, 1), drawn[1].min(axis=0) < 0.2)
    table = draws.time_to_target(0.3)
    for row, step in enumerate(AT):
        event = (drawn[0, : row + 1] <= 0.3).any(axis=0)
        mean, error = share(event)
        assert table["step"][row] == step
        within_error(table["reached"][row], mean, np.sqrt(2.0) * error)
        assert table["reached_low"][row] <= mean + SIGMAS * error
    found = draws.best_quantiles((0.1, 0.5))
    assert [(drawn[0].min(axis=0) < x).mean() for x in found] == pytest.approx([0.1, 0.5], abs=0.02)


def test_the_interval_is_binomial():
    joint = joint_losses(PROBLEM, PAIR, [60])
    draws = joint.draw(500, seed=2)
    found = draws.always_below()
    wins = int((draws.loss[0, 0] < draws.loss[1, 0]).sum())
    expected = stats.binomtest(wins, 500).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)
    nothing = draws.best_below(0.0)
    assert nothing.low == 0.0
    assert nothing.high == pytest.approx(1.0 - 0.025 ** (1 / 500), rel=1e-9)
    assert draws.best_below(1e9).high == 1.0


def test_one_direction_of_sgd_in_closed_form():
    """Cov(x_s, x_t) = r^(t - s) Var x_s, and the loss of a zero-mean Gaussian."""
    h, lr, v, steps = 0.5, 0.4, 3.0, [10**6, 10**6 + 7]
    problem = Problem([h], [v])
    joint = joint_losses(problem, Phase(SGD(), lr, 10**9, 2), steps)
    r = 1.0 - lr * h
    s = lr * v / 2 / (h * (2.0 - lr * h))
    variance = 0.5 * h**2 * np.array([[s**2, (r**7 * s) ** 2], [(r**7 * s) ** 2, s**2]])
    agree(joint.covariance[0, :, 0, :], variance, JUMP)
    assert joint.win_probability((0, 0), (0, 1)) == pytest.approx(0.5, rel=1e-8)


def test_two_gaussians_of_one_noise_in_closed_form():
    """P(x^2 < y^2) of two centred Gaussians is an angle, as x^2 - y^2 = (x - y) (x + y)."""
    h, v = 1.0, 1.0
    problem = Problem([h], [v], initial_variance=0.0)
    rates = 0.2, 0.5
    joint = joint_losses(problem, [constant(SGD(), lr, 10**6) for lr in rates], [10**6])
    a, b = 1.0 - np.array(rates)
    x, y, c = (p * q * v / (1 - (1 - p) * (1 - q)) for p, q in [(0.2, 0.2), (0.5, 0.5), (0.2, 0.5)])
    rho = (x - y) / np.sqrt((x + y - 2 * c) * (x + y + 2 * c))  # of x - y and x + y
    assert joint.win_probability() == pytest.approx(np.arccos(rho) / np.pi, rel=1e-9)
    assert a * b < 1
    correlation = c / np.sqrt(x * y)
    assert joint.correlation[0, 0, 1, 0] == pytest.approx(correlation**2, rel=1e-9)


def test_noise_that_cancels_leaves_a_gaussian_difference():
    """One rate, two starts of one noise: (x - y) is fixed, so that x^2 - y^2 is Gaussian."""
    lr, r, v = 0.1, 0.9, 2.0
    problem = Problem([1.0], [v], initial_mean=1.0, initial_variance=0.0)
    # The second program stands still for a phase at a rate that is all but zero.
    later = [Phase(SGD(), 1e-300, 5, 1e300), Phase(SGD(), lr, 20)]
    first = [Phase(SGD(), lr, 5, 1e300), Phase(SGD(), lr, 20)]
    joint = joint_losses(problem, [first, later], [25])
    x, y = r**25, r**20
    variance = lr**2 * v * (1 - r**40) / (1 - r**2)
    # 1/2 (x^2 - y^2) = 1/2 (x - y) (x + y + 2 noise)
    z = (x + y) / (2.0 * np.sqrt(variance))
    assert joint.win_probability() == pytest.approx(stats.norm.cdf(z), rel=1e-9)
    assert joint.compare().difference_sd == pytest.approx((y - x) * np.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize(
    "program",
    [
        constant(EMA(HeavyBall(0.5), 0.9), 0.2, 60, batch_size=3),
        [Phase(SGD(), Cosine(0.5, 0.0, over=20), 20), Phase(SWA(), 0.3, 40, 2)],
        [Phase(SGD(), 0.2, 20), Phase(LatePhase(3, gamma="mean", spread=0.1), 0.2, 40)],
        [Phase(LAWA(SGD(), 4, 3), 0.2, 30), Phase(LAWA(SGD(), 4, 3), 0.1, 30)],
        constant(ScheduleFree(), 0.5, 60),
        [Phase(PrimalAverage(), 0.3, 0), Phase(PrimalAverage(), 0.3, 60)],
        constant(Federated(2, 4, curvatures=(0.5, 1.5), shifts=(1.5, -0.5)), 0.2, 60),
        constant(Ensemble(3, SGD(), starts="own"), 0.2, 60),
    ],
    ids=lambda program: type(getattr(program, "phases", program)[-1].algorithm).__name__,
)
def test_every_method_has_its_own_moments(program):
    """Means and variances of the losses are those of `solve`, alone and beside another program."""
    problem = PROBLEM.replace(minimum=0.5)
    exact = solve(problem, program, AT)
    alone = joint_losses(problem, [program, PAIR[0]], AT, streams="own")
    agree(alone.loss[0], exact.loss, IDENTITY)
    agree(alone.loss_sd[0], exact.loss_sd, IDENTITY)
    if not isinstance(getattr(program, "phases", program)[0].algorithm, Federated):
        beside = joint_losses(problem, [PAIR[1], program], AT)
        agree(beside.loss[1], exact.loss, IDENTITY)
        agree(beside.loss_sd[1], exact.loss_sd, IDENTITY)
        assert np.linalg.eigvalsh(beside.correlation.reshape(8, 8)).min() > -1e-12


def test_long_programs_jump():
    """A billion steps, with a cycle of 12 of schedule and method, agree with `solve`."""
    rate = Cosine(0.3, 0.1, over=10**7)
    programs = [
        constant(LAWA(SGD(), 3, 4), 0.3, 10**9, batch_size=2),
        [Phase(SGD(), rate, 4000), Phase(SGD(), 0.01, 10**9 - 4000, 2)],
    ]
    at = [1, 3999, 4001, 10**6, 10**9]
    joint = joint_losses(PROBLEM, programs, at)
    for row, program in enumerate(programs):
        agree(joint.loss[row], solve(PROBLEM, program, at).loss, JUMP)
    assert 0.0 < joint.correlation[0, 4, 1, 4] < 1.0


def test_independent_streams_are_compare_runs():
    joint = joint_losses(PROBLEM, PAIR, [60], streams="own")
    laws = [next(solve(PROBLEM, program, [60]).distributions()) for program in PAIR]
    found, known = joint.compare(level=0.01, power=0.8), compare_runs(*laws, level=0.01, power=0.8)
    assert found.probability == pytest.approx(known.probability, rel=1e-9)
    assert found.difference_sd == pytest.approx(known.difference_sd, rel=IDENTITY)
    assert (found.runs, found.ordered_runs) == (known.runs, known.ordered_runs)
    assert abs(joint.correlation[0, 0, 1, 0]) == 0.0
    a, b = joint.draw(20_000).loss[:, 0]
    within_error((a < b).mean(), known.probability, 0.5 / np.sqrt(20_000))


def test_pairs_have_the_power(literal):
    """A paired test of so many drawn pairs finds the difference in the share asked for."""
    joint = joint_losses(PROBLEM, PAIR, [60])
    found = joint.compare(power=0.8)
    gaps = (literal[1, 60] - literal[0, 60])[: REPLICAS // found.runs * found.runs]
    tests = stats.ttest_1samp(gaps.reshape(-1, found.runs), 0.0, axis=1).pvalue < 0.05
    # 3 % for losses that are not Gaussian, and the scatter of a share.
    assert abs(tests.mean() - 0.8) < 0.03 + SIGMAS * np.sqrt(0.16 / tests.size)
    assert found.difference_sd == pytest.approx(gaps.std(), rel=0.03)
    independent = joint_losses(PROBLEM, PAIR, [60], streams="own").compare(power=0.8)
    assert found.runs < independent.runs


def test_equal_programs_tie_and_counts_add_up():
    same = joint_losses(PROBLEM, [PAIR[0], PAIR[0]], [60])
    assert same.win_probability() == 0.5
    assert same.compare().runs is None
    assert joint_losses(PROBLEM, PAIR, [0]).win_probability() == 0.5
    assert not same.draw(10).always_below().probability
    counted = Problem([1.0], [1.0], [3.0])
    three = Problem(np.ones(3), np.ones(3))
    pair = constant(SGD(), 0.2, 30), constant(SGD(), 0.4, 30)
    one, other = (joint_losses(problem, pair, [30]) for problem in (counted, three))
    assert one.win_probability() == pytest.approx(other.win_probability(), rel=1e-9)
    agree(one.covariance, other.covariance, IDENTITY)
    with pytest.raises(NQMError, match="expanded"):
        one.draw(10)


def test_a_program_that_has_ended_keeps_its_weights():
    short = constant(SGD(), 0.3, 20, batch_size=4)
    joint = joint_losses(PROBLEM, [short, PAIR[1]], AT)
    expected = solve(PROBLEM, short, [0, 5, 20]).loss
    agree(joint.loss[0], [*expected, expected[-1]], IDENTITY)
    assert joint.correlation[0, 2, 0, 3] == pytest.approx(1.0, rel=IDENTITY)


def test_the_expected_crossing_is_amid_those_of_runs():
    problem = Problem(harmonic(50), harmonic(50))
    program = constant(SGD(), 0.1, 1000, batch_size=4)
    crossing = steps_to_target(problem, program, 0.1).step
    joint = joint_losses(problem, program, range(0, 1001, 10))
    table = joint.draw(2000).time_to_target(0.1)
    half = table["step"][np.searchsorted(table["reached"], 0.5)]
    assert 0.5 * crossing < half <= crossing + 10  # a run may be below its mean for a moment


def test_draws_keep_coordinates_of_any_scale():
    """At a rate of 1e-10 the noise of x is 1e-20 of that of its momentum, and all of its law."""
    lr, problem = 1e-10, Problem([1.0, 2.0], [3.0, 1.0], initial_variance=0.0)
    joint = joint_losses(problem, constant(HeavyBall(0.5), lr, 100), [50, 100])
    loss = joint.draw(20_000).loss[0]
    within_error(loss.mean(axis=1), joint.loss[0], loss.std(axis=1) / np.sqrt(20_000))
    # Of two losses of different scales only the larger one's sign counts.
    far = joint_losses(problem, [constant(SGD(), 1e-10, 100), constant(SGD(), 0.1, 100)], [100])
    assert far.win_probability() == pytest.approx(1.0, abs=1e-8)
    assert far.win_probability((1, 0), (0, 0)) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(
    ("problem", "programs", "options", "words"),
    [
        (PROBLEM, PAIR, {"streams": "shared"}, "streams"),
        (PROBLEM, [], {}, "list of programs"),
        (PROBLEM, [SGD()], {}, r"programs\[0\]"),
        (PROBLEM, PAIR, {"at": [61]}, "record.at"),
        (PROBLEM, constant(SGD(), 3.0, 10**4), {}, "diverges"),
        (PROBLEM, constant(LAWA(SGD(), 1, 10**5), 0.1, 10), {}, "window"),
        (PROBLEM, [constant(MultiplicativeLatePhase(2), 0.1, 5)], {}, "linear"),
        (
            PROBLEM,
            [PAIR[0], constant(Federated(2, 2, curvatures=(0.5, 1.5)), 0.1, 60)],
            {},
            "minibatches",
        ),
        (
            Problem([1.0, 1.0], 1.0, noise_correlation=[[1.0, 0.5], [0.5, 1.0]]),
            PAIR,
            {},
            "correlated",
        ),
    ],
)
def test_misuse_is_an_error(problem, programs, options, words):
    with pytest.raises(NQMError, match=words):
        joint_losses(problem, programs, **options)


def test_misuse_of_the_result_is_an_error():
    joint = joint_losses(PROBLEM, PAIR, [60])
    with pytest.raises(NQMError, match="program"):
        joint.win_probability((2, 0))
    with pytest.raises(NQMError, match="record"):
        joint.win_probability((0, 0), (1, 1))
    with pytest.raises(NQMError, match="replicas"):
        joint.draw(0)
    with pytest.raises(NQMError, match="target"):
        joint.draw(5).time_to_target(float("nan"))
    with pytest.raises(NQMError, match=r"target must lie in \(0, inf\); got 0"):
        joint.draw(5).time_to_target(0.0)
    near = joint_losses(PROBLEM, [PAIR[0], constant(SGD(), 0.3 + 1e-7, 60, batch_size=4)], [60])
    with pytest.raises(NQMError, match="rounding"):
        near.win_probability()


def test_the_commands(tmp_path):
    text = """problem = {{curvature = [1.0, 0.5], noise_variance = [1.0, 0.5]}}
phase = [{{algorithm = 'sgd', lr = {lr}, steps = 200, batch_size = 4}}]
record = {{at = [0, 50, 200]}}
"""
    for name, lr in (("low", 0.05), ("high", 0.4)):
        (tmp_path / f"{name}.toml").write_text(text.format(lr=lr))
    low, high = (str(tmp_path / f"{name}.toml") for name in ("low", "high"))

    def row(*command):
        result = CliRunner().invoke(main, [*command, "--json"])
        assert result.exit_code == 0, result.output
        table = json.loads(result.stdout)
        return [dict(zip(table["columns"], line, strict=True)) for line in table["rows"]]

    problem = Problem([1.0, 0.5], [1.0, 0.5])
    programs = [constant(SGD(), lr, 200, batch_size=4) for lr in (0.05, 0.4)]
    joint = joint_losses(problem, programs, [0, 50, 200])
    (found,) = row("versus", low, high, "--streams", "common", "--replicas", "300", "--seed", "5")
    assert found["probability"] == pytest.approx(joint.win_probability(), rel=1e-9)
    assert found["runs"] == joint.compare().runs
    below = joint.draw(300, seed=5).always_below()
    assert (found["always_below"], found["always_low"]) == (below.probability, below.low)
    (own,) = row("versus", low, high)
    (drawn,) = row("versus", low, high, "--replicas", "300")
    assert own.items() <= drawn.items() or own["probability"] == pytest.approx(drawn["probability"])
    assert "always_below" not in own
    rows = row("time-to-target", high, "--target", "0.1", "--replicas", "400", "--seed", "1")
    alone = joint_losses(problem, programs[1], [0, 50, 200])
    table = alone.draw(400, seed=1).time_to_target(0.1)
    assert [one["reached"] for one in rows] == table["reached"].tolist()
    assert [one["loss"] for one in rows] == pytest.approx(alone.loss[0].tolist())
    other = CliRunner().invoke(
        main, ["versus", low, high, "--streams", "common", "--set", "problem.curvature=[1.0, 0.4]"]
    )
    assert other.exit_code == 2
    assert "problem" in other.output

"""Monte Carlo: multiplicative late-phase weights, intervals, multiplicities, workers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import nqm
from nqm import (
    SGD,
    Cosine,
    Cyclic,
    LatePhase,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Problem,
    Program,
    Status,
)
from tests import literal
from tests.tolerances import IDENTITY, SIGMAS, agree, agree_each, within_error

STEPS = 25


@pytest.fixture
def away(problem) -> Problem:
    """A minimum away from zero, of either sign, and a start near it."""
    return problem.replace(minimum=[1.0, -2.0, 0.5], initial_mean=[0.2, 0.1, -0.1],
                           initial_variance=[0.02, 0.0, 0.01])  # fmt: skip


def simulate(problem, algorithm, steps, replicas, rng, *, lr, member_lr, batch_size):
    """Path of mean model and members by the independent simulator."""
    shape = (replicas, problem.directions)
    noise = np.zeros(shape) if rng is None else rng.standard_normal(shape)
    start = problem.initial_mean + np.sqrt(problem.initial_variance) * noise
    return literal.late_phase_multiplicative(
        problem.curvature, problem.noise_variance, start, lr, batch_size, steps, rng,
        minimum=problem.minimum, members=algorithm.members, member_lr=member_lr,
        gamma=algorithm.base_scale, factor=algorithm.factor, spread=algorithm.spread,
        scalar=algorithm.coupling == "scalar",
    )  # fmt: skip


MULTIPLICATIVE = [
    MultiplicativeLatePhase(3, gamma="mean"),
    MultiplicativeLatePhase(1, 0.7),
    MultiplicativeLatePhase(2, 0.5, factor=1.5, spread=0.05),
    MultiplicativeLatePhase(3, coupling="scalar", gamma="mean"),
    MultiplicativeLatePhase(2, 0.2, factor=0.8, spread=0.05, coupling="scalar"),
]
every_algorithm = pytest.mark.parametrize("algorithm", MULTIPLICATIVE, ids=repr)


@every_algorithm
def test_multiplicative_deterministic_path(algorithm, away):
    """Without noise, spread and initial variance every replica is the noiseless simulation."""
    quiet = away.replace(noise_variance=0.0, initial_variance=0.0)
    calm = MultiplicativeLatePhase(
        algorithm.members, algorithm.gamma, algorithm.factor, 0.0, algorithm.coupling
    )
    lrs = Cosine(0.2, 0.05, STEPS)
    phase = Phase(calm, lrs, STEPS, member_lr=0.1)
    mean, members = simulate(
        quiet, calm, STEPS, 1, None, lr=lrs(np.arange(STEPS)), member_lr=0.1, batch_size=1
    )
    drawn = nqm.sample(quiet, Program((phase,)), range(STEPS + 1), replicas=2)
    half = 0.5 * quiet.curvature
    agree(drawn.samples, np.repeat(mean[:, 0, None] ** 2 @ half, 2, axis=1), IDENTITY)
    agree(drawn.member_loss, (members[:, :, 0] ** 2 @ half).mean(axis=1), IDENTITY)


@every_algorithm
def test_multiplicative_is_the_simulator(algorithm, away):
    """Two independent Monte Carlos, with noise well beyond first order."""
    replicas, at = 6000, [0, 1, 5, STEPS]
    phase = Phase(algorithm, 0.2, STEPS, 4, member_lr=0.1)
    drawn = nqm.sample(away, Program((phase,)), at, replicas=replicas, seed=1)
    rng = np.random.default_rng(2)
    mean, members = simulate(
        away, algorithm, STEPS, replicas, rng, lr=0.2, member_lr=0.1, batch_size=4
    )
    half = 0.5 * away.curvature
    losses = mean[at] ** 2 @ half, (members[at] ** 2 @ half).mean(axis=1)
    pairs = [(drawn.loss, drawn.stderr), (drawn.member_loss, drawn.member_stderr)]
    for sample, (level, error) in zip(losses, pairs, strict=True):
        other = sample.std(axis=1, ddof=1) / np.sqrt(replicas)
        within_error(level, sample.mean(axis=1), np.hypot(error, other))
    # The distribution too, not only its mean.
    for row, t in enumerate(at[1:], 1):
        assert stats.ks_2samp(drawn.samples[row], losses[0][at.index(t)]).pvalue > 1e-5


def test_multiplicative_under_schedules_is_the_simulator(away):
    replicas, lr, size = 6000, Cosine(0.3, 0.1, 20), Cyclic(8, 2, 3, "linear")
    algorithm = MultiplicativeLatePhase(2, gamma="mean")
    phase = Phase(algorithm, lr, STEPS, size, member_lr=Cyclic(0.2, 0.1, 4))
    drawn = nqm.sample(away, Program((phase,)), [STEPS], replicas=replicas, seed=1)
    t = np.arange(STEPS)
    mean, _ = simulate(
        away, algorithm, STEPS, replicas, np.random.default_rng(2), lr=lr(t),
        member_lr=Cyclic(0.2, 0.1, 4)(t), batch_size=size(t),
    )  # fmt: skip
    losses = mean[-1] ** 2 @ (0.5 * away.curvature)
    error = np.hypot(drawn.stderr, losses.std(ddof=1) / np.sqrt(replicas))
    within_error(drawn.loss, [losses.mean()], error)


def test_a_late_multiplicative_phase_starts_from_the_weights_before(away):
    replicas, algorithm = 6000, MultiplicativeLatePhase(2, gamma="mean")
    program = Program((Phase(SGD(), 0.2, 8), Phase(algorithm, 0.1, 6), Phase(SGD(), 0.1, 4)))
    at = [8, 9, 14, 15, 18]
    drawn = nqm.sample(away, program, at, replicas=replicas, seed=1)
    h, v, rng = away.curvature, away.noise_variance, np.random.default_rng(2)
    start = away.initial_mean + np.sqrt(away.initial_variance) * rng.standard_normal((replicas, 3))
    first = literal.sgd(h, v, start, 0.2, 1, 8, rng)
    mean, _ = literal.late_phase_multiplicative(
        h, v, first[-1], 0.1, 1, 6, rng, minimum=away.minimum, members=2, member_lr=0.1, gamma=0.5
    )
    path = np.concatenate([first, mean[1:], literal.sgd(h, v, mean[-1], 0.1, 1, 4, rng)[1:]])
    losses = path[at] ** 2 @ (0.5 * h)
    other = losses.std(axis=1, ddof=1) / np.sqrt(replicas)
    within_error(drawn.loss, losses.mean(axis=1), np.hypot(drawn.stderr, other))


# ------------------------------------------------------------------ first order in the noise


def first_order_ratio(v: float, replicas: int) -> np.ndarray:
    """First-order over Monte Carlo loss after 40 steps: of the mean model and the member.

    64 equal directions are as many samples of one. The same seed draws the same normals at every
    v, so ratios at two v differ by what the noise does beyond first order, hardly by chance.
    """
    problem = Problem(np.ones(64), v, initial_mean=0.0, initial_variance=0.0, minimum=1.0)
    program = nqm.constant(MultiplicativeLatePhase(2, factor=0.5, gamma="mean"), 0.1, 40)
    drawn = nqm.sample(problem, program, [40], replicas=replicas, seed=4)
    exact = nqm.solve(problem, program, [40])
    assert exact.kind == "first_order"
    return np.array([exact.loss[0] / drawn.loss[0], exact.member_loss[0] / drawn.member_loss[0]])


def test_first_order_agrees_at_little_noise():
    # One of 64 * 6000 squared normals has relative deviation sqrt(2); the bias is below v.
    error = np.sqrt(2 / (64 * 6000))
    assert np.all(np.abs(first_order_ratio(1e-4, 6000) - 1) < SIGMAS * error + 1e-4)


def test_first_order_error_shrinks_with_the_noise():
    """Quartering v divides the relative error by four, up to the next order's v times a few."""
    limit = first_order_ratio(1e-8, 6000)
    gaps = [first_order_ratio(v, 6000) / limit - 1 for v in (0.32, 0.08, 0.02)]
    assert np.all(np.abs(gaps[0]) > 0.1)  # there is an error to speak of
    np.testing.assert_allclose(gaps[0] / gaps[1], 4.0, rtol=0.15)
    np.testing.assert_allclose(gaps[1] / gaps[2], 4.0, rtol=0.15)


def test_first_order_transient_is_the_additive_form(away):
    """Rates a = member_lr (w* / factor)^2 and b = gamma lr factor^2 in the additive form."""
    lr, member_lr, k, factor = 0.1, 0.05, 3, 1.25
    algorithm = MultiplicativeLatePhase(k, 0.5, factor)
    phase = Phase(algorithm, lr, 30, 2, member_lr=member_lr)
    result = nqm.solve(away, Program((phase,)), [30])
    a, b = literal.multiplicative_rates(away.minimum, factor, lr, member_lr, 0.5)
    s0 = away.initial_mean**2 + away.initial_variance
    for i, (h, v) in enumerate(zip(away.curvature, away.noise_variance, strict=True)):
        mean, _ = literal.late_phase_moment(
            np.array([h]), np.array([v]), b[i], 2, k, a[i], 1.0, s0[i], 30
        )
        second = result.weight_mean[0, i] ** 2 + result.weight_variance[0, i]
        agree_each(second, mean[0], IDENTITY)


def test_scalar_first_order_agrees_at_little_noise():
    """One phi for five directions: theta0 couples them all."""
    problem = Problem(
        [1.0, 0.5, 0.2, 0.1, 0.05], 1e-4 * np.arange(1, 6), initial_mean=0.0,
        initial_variance=0.0, minimum=[1.0, -0.5, 0.8, 0.3, 1.5],
    )  # fmt: skip
    program = nqm.constant(
        MultiplicativeLatePhase(3, coupling="scalar", gamma="mean"), 0.1, 40, batch_size=2
    )
    exact = nqm.solve(problem, program, [1, 10, 40])
    drawn = nqm.sample(problem, program, [1, 10, 40], replicas=20_000, seed=4)
    assert exact.kind == "first_order"
    within_error(drawn.loss, exact.loss, np.hypot(drawn.stderr, 1e-3 * exact.loss))
    error = np.hypot(drawn.member_stderr, 1e-3 * exact.member_loss)
    within_error(drawn.member_loss, exact.member_loss, error)
    agree(exact.loss_sd, drawn.loss_sd, 0.05)  # 20 000 draws of a skewed loss


@pytest.mark.parametrize("coupling", ["elementwise", "scalar"])
def test_multiplicative_needs_a_minimum_away_from_zero(coupling, away):
    program = nqm.constant(MultiplicativeLatePhase(2, coupling=coupling, gamma="mean"), 0.1, 5)
    flat = away.replace(minimum=[1.0, 0.0, 1.0])
    for method in (nqm.solve, nqm.sample):
        with pytest.raises(NQMError, match=r"problem\.minimum != 0"):
            method(flat, program)


def test_multiplicative_overflow_is_a_status(away):
    program = nqm.constant(MultiplicativeLatePhase(2, gamma="mean"), 5.0, 200)
    drawn = nqm.sample(away, program, [0, 200], replicas=4)
    assert drawn.status == [Status.FINISHED, Status.DIVERGED]


# ------------------------------------------------------------------ the sampler itself


@pytest.mark.parametrize("spread", [0, 1])
def test_a_whole_number_is_a_number(away, spread):
    """Factors of an integer type would be rounded at every step."""
    losses = [
        nqm.sample(
            away, Phase(MultiplicativeLatePhase(3, factor=factor, spread=spread), 0.05, 9), [9],
            replicas=20,
        ).loss
        for factor in (2, 2.0)
    ]  # fmt: skip
    assert losses[0] == losses[1]


@every_algorithm
def test_multiplicative_does_not_depend_on_workers(algorithm, away):
    program = Program((Phase(SGD(), 0.1, 3), Phase(algorithm, 0.1, 4)))
    runs = [nqm.sample(away, program, replicas=75, seed=11, workers=w) for w in (1, 2, 3)]
    for other in runs[1:]:
        np.testing.assert_array_equal(other.samples, runs[0].samples)
        np.testing.assert_array_equal(other.member_loss, runs[0].member_loss)


def test_more_replicas_go_on_from_fewer(problem):
    """Blocks have generators of their own, so the first full blocks stay what they were."""
    program = nqm.constant(LatePhase(2, gamma="mean"), 0.1, 5)
    few = nqm.sample(problem, program, [5], replicas=64, seed=3)
    more = nqm.sample(problem, program, [5], replicas=150, seed=3)
    np.testing.assert_array_equal(more.samples[:, :64], few.samples)


def test_statistics_are_those_of_the_samples(problem):
    drawn = nqm.sample(problem, nqm.constant(SGD(), 0.3, 9), [0, 9], replicas=101, seed=2)
    assert drawn.kind == "sample"
    agree_each(drawn.loss, drawn.samples.mean(axis=1), IDENTITY)
    agree_each(drawn.loss_sd, drawn.samples.std(axis=1, ddof=1), IDENTITY)
    agree_each(drawn.stderr, stats.sem(drawn.samples, axis=1), IDENTITY)
    for level in (0.5, 0.95):
        low, high = drawn.interval(level)
        expected = stats.t.interval(level, 100, drawn.loss, drawn.stderr)
        agree_each(low, expected[0], IDENTITY)
        agree_each(high, expected[1], IDENTITY)
    quantiles = np.quantile(drawn.samples, (0.05, 0.5, 0.95), axis=1).T
    np.testing.assert_array_equal(drawn.quantiles(), quantiles)


def test_intervals_cover(problem):
    """95 % intervals of 40 runs hold the exact loss as often as they should (binomial)."""
    program = nqm.constant(SGD(), 0.3, 9)
    exact = nqm.solve(problem, program, [9]).loss[0]
    hits = 0
    for seed in range(300):
        low, high = nqm.sample(problem, program, [9], replicas=40, seed=seed).interval()
        hits += int(low[0] <= exact <= high[0])
    # The loss is skewed, so Student's t falls a little short of 95 % at n = 40.
    assert stats.binomtest(hits, 300, 0.93).pvalue > 1e-4


def test_a_direction_counted_many_times_is_drawn_once(problem):
    """Unbiased, with m times its standard deviation; written out, with sqrt(m) times."""
    counted = problem.replace(multiplicity=[9.0, 1.0, 4.0])
    program = nqm.constant(SGD(), 0.3, 6, batch_size=2)
    exact = nqm.solve(counted, program, [6])
    var, mean = exact.weight_variance[0], exact.weight_mean[0]
    one = (counted.curvature / 2) ** 2 * (2 * var**2 + 4 * mean**2 * var)
    drawn = nqm.sample(counted, program, [6], replicas=4000, seed=1)
    sd = np.sqrt(counted.multiplicity**2 @ one)
    within_error(drawn.loss, exact.loss, sd / np.sqrt(4000))
    agree(drawn.stderr[0], sd / np.sqrt(4000), 0.1)  # estimated from 4000 skewed losses
    assert np.isnan(drawn.loss_sd).all()  # the loss itself varies less
    with pytest.raises(NQMError, match="multiplicity 1"):
        drawn.quantiles()
    whole = nqm.sample(counted.expanded(), program, [6], replicas=4000, seed=1)
    agree(exact.loss_sd[0], np.sqrt(counted.multiplicity @ one), IDENTITY)
    within_error(whole.loss, exact.loss, exact.loss_sd / np.sqrt(4000))
    agree(whole.loss_sd[0], exact.loss_sd[0], 0.1)


def test_progress_counts_replicas(problem):
    seen: list[int] = []
    program = nqm.constant(SGD(), 0.3, 2)
    nqm.sample(problem, program, replicas=70, workers=2, progress=seen.append)
    assert sum(seen) == 70


def test_many_distinct_steps_are_sampled_in_pieces(monkeypatch, problem):
    program = Program((Phase(LatePhase(2, gamma="mean"), Cosine(0.4, 0.1, 60), 60),))
    whole = nqm.sample(problem, program, replicas=20, seed=5)
    monkeypatch.setattr("nqm.solvers.sample.CHUNK", 100)
    parts = nqm.sample(problem, program, replicas=20, seed=5)
    np.testing.assert_array_equal(parts.samples, whole.samples)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": 1}, "replicas"),
        ({"replicas": 10.5}, "replicas"),
        ({"seed": -1}, "seed"),
        ({"workers": 0}, "workers"),
        ({"at": [7]}, r"record\.at"),
    ],
)
def test_misuse_is_an_error(options, words, problem):
    with pytest.raises(NQMError, match=words):
        nqm.sample(problem, nqm.constant(SGD(), 0.1, 5), **options)


def test_exact_results_have_no_interval(problem):
    with pytest.raises(NQMError, match="analytic"):
        nqm.solve(problem, nqm.constant(SGD(), 0.1, 5)).interval()
    drawn = nqm.sample(problem, nqm.constant(SGD(), 0.1, 5), replicas=4)
    with pytest.raises(NQMError, match=r"interval\.level"):
        drawn.interval(1.5)

"""Control variates: unbiased, honest about their error, exact where the method is linear."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import nqm
from nqm import (
    SGD,
    SWA,
    Adam,
    HeavyBall,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Problem,
    Program,
    SampledSGD,
    SignSGD,
    constant,
)
from nqm.solvers import control_variates as control
from nqm.solvers import sample
from tests.tolerances import IDENTITY, agree, agree_each, within_error

AT = [0, 1, 5, 30]
PLACED = Problem(
    [1.0, 0.3, 0.05], [0.05, 0.1, 0.03], initial_mean=[0.2, 0.1, -0.1],
    initial_variance=[0.02, 0.0, 0.01], minimum=[1.0, -2.0, 0.7],
)  # fmt: skip
METHODS = {
    "members": (MultiplicativeLatePhase(3, gamma="mean"), 0.2),
    "spread": (MultiplicativeLatePhase(2, 0.7, factor=1.3, spread=0.02), 0.1),
    "no base rate": (MultiplicativeLatePhase(2, 0.0), 0.1),
    "clipped": (SampledSGD(threshold=0.3, momentum=0.5), 0.1),
    "heavy tails": (SampledSGD(threshold=0.5, dof=4.0), 0.1),
    "rounded": (SampledSGD(pitch=0.05), 0.2),
    "sign": (SignSGD(), 0.01),
    "sign, heavy tails": (SignSGD(dof=3.0), 0.01),
    "signum": (SignSGD(momentum=0.8), 0.01),
    "adam": (Adam(beta2=0.95), 0.01),
}
every_method = pytest.mark.parametrize("name", METHODS)


def twins(problem, program, at, replicas, seed):
    """Losses (records, R) of the twins alone and their stated expectation (records,)."""
    start = control.Start.of(problem, program, at)
    plan = sample._Plan(problem, program, at, fast=False, start=start)
    draws = sample._Draws(np.random.SeedSequence(seed), problem, fast=False)
    twin = plan.run(draws, replicas)[2]
    return twin.loss, twin.expected


@every_method
def test_the_twins_expected_loss_is_exact(name):
    """Its recursion for the moments against the mean of the twins themselves."""
    algorithm, lr = METHODS[name]
    loss, expected = twins(PLACED, constant(algorithm, lr, 30, batch_size=2), AT, 8000, 3)
    within_error(loss.mean(axis=1), expected, loss.std(axis=1, ddof=1) / np.sqrt(8000))


@every_method
def test_adjusted_means_agree_with_plain_ones(name):
    """Few controlled replicas against many others; the samples are those of the plain run."""
    algorithm, lr = METHODS[name]
    program = constant(algorithm, lr, 30, batch_size=2)
    plain = nqm.sample(PLACED, program, AT, replicas=20_000, seed=1)
    drawn = nqm.sample(PLACED, program, AT, replicas=500, seed=2, control=True)
    within_error(drawn.loss, plain.loss, np.hypot(drawn.stderr, plain.stderr))
    error = np.hypot(drawn.member_stderr, plain.member_stderr)
    within_error(drawn.member_loss, plain.member_loss, error)
    same = nqm.sample(PLACED, program, AT, replicas=500, seed=2)
    np.testing.assert_array_equal(same.samples, drawn.samples)
    # Gains at these settings go from 1.3 (signum after 30 steps) to beyond 1000.
    assert np.all(drawn.speed_up[1:] > 1.1)
    agree_each(drawn.speed_up, (same.stderr / drawn.stderr) ** 2, IDENTITY)
    agree_each(same.speed_up, np.ones(len(AT)), IDENTITY)


@pytest.mark.parametrize(
    ("algorithm", "limit", "lr"),
    [
        (SampledSGD(), SGD(), 0.3),
        (SampledSGD(momentum=0.6, dof=5.0), HeavyBall(0.6), 0.3),
        (Adam(beta1=0.0, beta2=0.9, epsilon=1e12), SGD(), 0.3e12),
    ],
)
def test_a_linear_method_is_its_own_twin(algorithm, limit, lr, problem):
    """Five replicas give the exact loss; an interval of no width."""
    drawn = nqm.sample(
        problem, constant(algorithm, lr, 30, batch_size=2), AT, replicas=5, control=True
    )
    rate = lr * 1e-12 if isinstance(algorithm, Adam) else lr
    exact = nqm.solve(problem, constant(limit, rate, 30, batch_size=2), AT)
    agree(drawn.loss, exact.loss, 1e-9)  # a regression on five points
    low, high = drawn.interval()
    assert np.all(high - low < 1e-6 * exact.loss)


def test_little_noise_makes_the_twin_first_order():
    """At v = 1e-6 its expected loss is that of `nqm.solve`'s first order, up to v."""
    quiet = PLACED.replace(noise_variance=1e-6, initial_mean=0.0, initial_variance=0.0)
    program = constant(MultiplicativeLatePhase(3, factor=1.2, gamma="mean"), 0.2, 30)
    _, expected = twins(quiet, program, AT[1:], 2, 0)
    agree_each(expected, nqm.solve(quiet, program, AT[1:]).loss, 1e-4)


def test_the_twin_of_long_runs_drifts_to_the_balance():
    """theta^2 / phi^2 ends at gamma lr / member_lr to lowest order in the rates (theory page)."""
    problem = Problem([1.0], [0.5], initial_mean=0.0, initial_variance=0.0, minimum=1.0)
    program = constant(MultiplicativeLatePhase(2, gamma="mean"), 0.05, 20_000)
    start = control.Start.of(problem, program, [20_000])
    plan = sample._Plan(problem, program, [20_000], fast=False, start=start)
    draws = sample._Draws(np.random.SeedSequence(0), problem, fast=False)
    moments = plan.run(draws, 2)[2].moments
    theta, phi = moments[5, 0], moments[6, 0]
    ratio = nqm.balance_point(problem, MultiplicativeLatePhase(2, gamma="mean"), 0.05).ratio[0]
    agree_each(theta / phi, ratio, 0.1)  # its rates and noise are not small


def test_intervals_cover():
    """95 % intervals from 40 replicas against 100 000 plain ones, over 300 seeds."""
    problem = PLACED.replace(noise_variance=0.5)
    program = constant(MultiplicativeLatePhase(2, gamma="mean"), 0.2, 20)
    truth = nqm.sample(problem, program, [20], replicas=100_000, seed=1)
    hits = 0
    for seed in range(300):
        drawn = nqm.sample(problem, program, [20], replicas=40, seed=seed + 2, control=True)
        low, high = drawn.interval()
        hits += int(low[0] <= truth.loss[0] <= high[0])
    # Skewed losses: Student's t falls a little short, as it does for plain means.
    assert stats.binomtest(hits, 300, 0.93).pvalue > 1e-4
    assert drawn.speed_up[0] > 2.0


def test_the_error_is_that_of_a_regression_line():
    """Against SciPy's intercept of y on z, with z measured from its expectation."""
    rng = np.random.default_rng(0)
    z = 1.3 + rng.standard_normal(9)
    y = rng.standard_normal(9) + z
    line = stats.linregress(z - 1.0, y)
    loss, stderr = control.adjust(y[None], z[None], np.array([1.0]))
    agree_each([loss[0], stderr[0]], [line.intercept, line.intercept_stderr], IDENTITY)
    with np.errstate(invalid="ignore"):  # a control that does not vary, or is not finite
        for bad in (np.full(9, 2.0), np.full(9, np.inf)):
            loss, stderr = control.adjust(y[None], bad[None], np.array([2.0]))
            agree_each([loss[0], stderr[0]], [y.mean(), stats.sem(y)], IDENTITY)


def test_phases_before_and_between():
    """SGD with an average first, exact; then two kinds of nonlinear phase, one restarted."""
    late, clipped = (
        MultiplicativeLatePhase(2, spread=0.01, gamma="mean"),
        SampledSGD(0.5, threshold=0.4),
    )
    program = Program((
        Phase(SGD(), 0.3, 6), Phase(SWA(), 0.2, 6), Phase(late, 0.1, 5), Phase(late, 0.05, 5),
        Phase(late, 0.1, 5, restart=True), Phase(clipped, 0.1, 8), Phase(clipped, 0.05, 5),
    ))  # fmt: skip
    at = [0, 6, 12, 13, 17, 22, 27, 35, 40]
    drawn = nqm.sample(PLACED, program, at, replicas=500, seed=2, control=True)
    exact = nqm.solve(PLACED, Program(program.phases[:2]), at[:3])
    agree(drawn.loss[:3], exact.loss, 1e-9)
    plain = nqm.sample(PLACED, program, at, replicas=20_000, seed=1)
    error = np.hypot(drawn.stderr, plain.stderr)
    within_error(drawn.loss[3:], plain.loss[3:], error[3:])
    assert np.all(drawn.speed_up[3:] > 3.0)


def test_numbers_do_not_depend_on_workers(problem):
    program = constant(SampledSGD(threshold=0.4), 0.2, 9)
    runs = [
        nqm.sample(problem, program, replicas=75, seed=1, workers=w, control=True) for w in (1, 3)
    ]
    np.testing.assert_array_equal(runs[0].loss, runs[1].loss)
    np.testing.assert_array_equal(runs[0].stderr, runs[1].stderr)


def test_sign_twin_against_a_literal_linear_recursion():
    """From the minimum: y' = (1 - kappa h) y - lr (2/pi) asin(..) sign e, walked by hand."""
    h, v, lr, steps = 0.8, 1.5, 0.05, 40
    problem = Problem([h], [v], initial_mean=0.0, initial_variance=0.0)
    _, expected = twins(problem, constant(SignSGD(), lr, steps), [steps], 2, 0)
    variance = 0.0
    for _ in range(steps):
        total = np.sqrt(v + h**2 * variance)
        gain = lr * h * np.sqrt(2 / np.pi) / total
        push = lr * 2 / np.pi * np.arcsin(np.sqrt(v) / total)
        variance = (1 - gain) ** 2 * variance + push**2
    agree_each(expected[0], 0.5 * h * variance, IDENTITY)


# ------------------------------------------------------------------ common random numbers


def sweep(**more):
    base = {
        "problem": {
            "curvature": [1.0, 0.1], "noise_variance": 0.1, "minimum": 1.0,
            "initial_variance": 0.01,
        },
        "phase": [
            {"algorithm": "late_phase_multiplicative", "members": 2, "gamma": "mean", "lr": 0.1,
             "steps": 30}
        ],
        "record": {"at": [30]}, "method": "sample", "replicas": 200, "seed": 7, **more,
    }  # fmt: skip
    return nqm.Sweep(base, {"phase.0.lr": [0.1, 0.11]}).run()


def test_cells_of_a_sweep_can_share_one_stream():
    problem = Problem([1.0, 0.1], 0.1, initial_variance=0.01, minimum=1.0)
    runs = [
        nqm.sample(
            problem,
            constant(MultiplicativeLatePhase(2, gamma="mean"), lr, 30),
            [30],
            replicas=200,
            seed=7,
        )
        for lr in (0.1, 0.11)
    ]
    own, common = sweep(), sweep(streams="common")
    agree_each(common["loss"], [run.loss[0] for run in runs], IDENTITY)
    assert not np.any(own["loss"] == common["loss"])
    # The difference scatters less by what the runs have in common.
    apart = sum(run.loss_sd[0] ** 2 for run in runs)
    assert np.var(runs[0].samples[0] - runs[1].samples[0], ddof=1) < apart / 50
    assert own["case"].nunique() == common["case"].nunique() == 2


def test_a_file_can_ask_for_a_control_variate():
    plain, controlled = sweep(streams="common"), sweep(streams="common", control=True)
    assert np.all(controlled["stderr"] < 0.5 * plain["stderr"])
    assert np.all(controlled["loss_sd"] == plain["loss_sd"])
    with pytest.raises(NQMError, match="streams 'comon' is unknown"):
        sweep(streams="comon")
    with pytest.raises(NQMError, match="control is for method 'sample'"):
        sweep(control=True, method="jump")


@pytest.mark.parametrize(
    ("phases", "options", "words"),
    [
        ([SGD()], {}, "nqm.solve is exact"),
        ([SignSGD(), SGD()], {}, r"phase\.1 is linear after"),
        ([MultiplicativeLatePhase(2, coupling="scalar", gamma="mean")], {}, "elementwise"),
        ([SignSGD()], {"replicas": 2}, "replicas must be an integer >= 3"),
    ],
)
def test_misuse_is_an_error(phases, options, words):
    program = Program(tuple(Phase(algorithm, 0.1, 2) for algorithm in phases))
    with pytest.raises(NQMError, match=words):
        nqm.sample(PLACED, program, control=True, **options)
    with pytest.raises(NQMError, match="speed_up is for Monte Carlo"):
        _ = nqm.solve(PLACED, constant(SGD(), 0.1, 2)).speed_up


def test_divergence_is_a_status():
    program = constant(MultiplicativeLatePhase(2, gamma="mean"), 5.0, 200)
    drawn = nqm.sample(PLACED, program, [0, 200], replicas=8, control=True)
    assert drawn.status == [nqm.Status.FINISHED, nqm.Status.DIVERGED]

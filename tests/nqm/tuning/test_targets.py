"""Targets against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import nqm
from nqm import (
    SGD,
    SWA,
    Cyclic,
    Ensemble,
    HeavyBall,
    LatePhase,
    Lookahead,
    MultiplicativeLatePhase,
    Nesterov,
    NQMError,
    Phase,
    Piecewise,
    Problem,
    Program,
    Status,
    best_lr,
    best_lr_and_momentum,
    critical_batch_size,
    stability_edge,
    steps_to_target,
)
from nqm.tuning.steps_to_target import fewest_steps
from tests import literal
from tests.tolerances import IDENTITY, agree_each

# ------------------------------------------------------------------ stability edge


@given(st.floats(1e-4, 1e3), st.floats(0.0, 0.999), st.integers(1, 20), st.floats(0.0, 2.0))
def test_edges_of_any_setting(h, mu, members, gamma):
    problem, top = Problem([0.3 * h, h], 1.0), np.array([h])
    # The edge is where the radius is 1 + 1e-9; its slope in lr is 2 / edge or, for heavy ball
    # near mu = 1, about (1 + mu) / (1 - mu) times less.
    slack = 1e-8 / (1 - mu)
    edges = {
        HeavyBall(mu): literal.heavy_ball_limit(top, mu)[0],
        Nesterov(mu): literal.nesterov_limit(top, mu)[0],
        LatePhase(members, gamma): 2 / (h * (1 + gamma * members)),
        LatePhase(members, gamma, inner=HeavyBall(mu)): literal.heavy_ball_limit(top, mu)[0]
        / (1 + gamma * members),
    }
    for algorithm, expected in edges.items():
        assert stability_edge(problem, algorithm) == pytest.approx(expected, rel=slack)


def test_members_may_be_the_first_to_go():
    """With member_lr = 5 lr and gamma = 0: member_lr h < 2."""
    problem = Problem([0.5], 1.0)
    found = stability_edge(problem, LatePhase(3, 0.0), member_lr_ratio=5.0)
    assert found == pytest.approx(2 / (5 * 0.5), rel=1e-8)


def test_what_is_never_unstable():
    assert stability_edge(Problem([0.0], 1.0), SGD()) == np.inf
    assert stability_edge(Problem([1.0], 1.0), Lookahead(SGD(), 2, 0.0)) == np.inf


# ------------------------------------------------------------------ best rate


def test_best_rate_of_one_step(problem):
    """The rate sum h^2 s / sum (h^3 s + h v), from the derivative of the loss after one step."""
    h, v = problem.curvature, problem.noise_variance / 4
    s = problem.initial_mean**2 + problem.initial_variance
    found = best_lr(problem, lambda lr: nqm.constant(SGD(), lr, 1, batch_size=4), 1e-3, 10.0)
    rate = (h**2 @ s) / (h**3 @ s + h @ v)
    # A minimum is known to the root of the loss's own precision.
    assert found.lr == pytest.approx(rate, rel=1e-5)
    agree_each(found.loss, 0.5 * h @ ((1 - rate * h) ** 2 * s + rate**2 * v), 1e-10)
    assert not found.at_edge
    assert np.isnan(found.momentum)


@pytest.mark.parametrize("steps", [20, 2000])
def test_best_rate_of_many_steps(steps, problem):
    h, v = problem.curvature, problem.noise_variance
    s0 = problem.initial_mean**2 + problem.initial_variance

    def loss(log_lr: float) -> float:
        return float(0.5 * h @ literal.sgd_moment(h, v, np.exp(log_lr), 2, s0, steps))

    rates = np.linspace(np.log(1e-4), np.log(1.99), 2000)
    best = rates[np.argmin([loss(z) for z in rates])]
    exact = minimize_scalar(
        loss, bounds=(best - 0.01, best + 0.01), method="bounded", options={"xatol": 1e-9}
    )
    found = best_lr(problem, lambda lr: nqm.constant(SGD(), lr, steps, batch_size=2), 1e-4, 1.99)
    assert found.lr == pytest.approx(np.exp(exact.x), rel=1e-4)
    agree_each(found.loss, exact.fun, 1e-9)
    for lr in (found.flat_low, found.flat_high):
        assert loss(np.log(lr)) <= 1.1 * exact.fun * (1 + 1e-9)
    # The next rates outside, one grid step of 10^(4.3 / 40) further, are not within 10 %.
    step = (1.99 / 1e-4) ** (1 / 40)
    assert loss(np.log(found.flat_low / step)) > 1.1 * exact.fun
    assert loss(np.log(found.flat_high * step)) > 1.1 * exact.fun


def test_best_rate_at_the_end_of_the_range_says_so(problem):
    found = best_lr(problem, lambda lr: nqm.constant(SGD(), lr, 3), 1e-5, 1e-4)
    assert found.at_edge
    assert found.lr == pytest.approx(1e-4, rel=1e-3)


def test_best_rate_over_diverging_ones(problem):
    """Overflowing rates lose; a range of nothing else is an error."""

    def run(lr: float) -> Program:
        return nqm.constant(SGD(), lr, 10**5)

    assert best_lr(problem, run, 0.01, 50.0).lr < 2.0
    with pytest.raises(NQMError, match=r"every rate in 5\.\.50 diverges"):
        best_lr(problem, run, 5.0, 50.0)


def heavy_ball_losses(problem: Problem, lr: float, mu: float, steps: int) -> np.ndarray:
    """Loss of heavy ball after 0 .. steps, by its second-moment recursion."""
    total = np.zeros(steps + 1)
    fields = (problem.curvature, problem.noise_variance, problem.initial_mean,
              problem.initial_variance)  # fmt: skip
    for h, v, mean, var in zip(*fields, strict=True):
        a = np.array([[1 - lr * h, -lr * mu], [h, mu]])
        q = v * np.array([[lr**2, -lr], [-lr, 1.0]])
        s = np.array([[mean**2 + var, 0.0], [0.0, 0.0]])
        for t in range(steps + 1):
            total[t] += 0.5 * h * s[0, 0]
            s = a @ s @ a.T + q
    return total


def test_best_rate_and_momentum_beats_a_grid(problem):
    steps = 30
    quiet = problem.replace(noise_variance=0.01)
    found = best_lr_and_momentum(
        quiet, lambda lr, mu: nqm.constant(HeavyBall(mu), lr, steps), 1e-2, 3.9, points=21
    )
    grid = [
        heavy_ball_losses(quiet, lr, mu, steps)[-1]
        for mu in np.linspace(0.0, 0.95, 20)
        for lr in np.geomspace(0.05, 3.9, 25)
        if lr < 2 * (1 + mu)
    ]
    assert found.loss <= min(grid)
    assert found.loss > 0.8 * min(grid)  # and is not something else altogether
    agree_each(heavy_ball_losses(quiet, found.lr, found.momentum, steps)[-1], found.loss, 1e-9)
    assert found.table().loc[0, "momentum"] == found.momentum


# ------------------------------------------------------------------ steps to a target

#: Under-damped: the loss falls and rises again.
SWINGS = Problem([1.0, 0.05], [1e-3, 1e-3], initial_mean=[1.0, 1.0], initial_variance=0.0)
HORIZON = 600


def swings(lr: float = 0.1, mu: float = 0.95) -> tuple[Phase, np.ndarray]:
    return Phase(HeavyBall(mu), lr, HORIZON), heavy_ball_losses(SWINGS, lr, mu, HORIZON)


def bisection(path: np.ndarray, target: float) -> int:
    """Steps to a target for those who take the loss to be monotone."""
    low, high = 0, len(path) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if path[middle] <= target else (middle, high)
    return high


def first_and_last(path: np.ndarray, target: float) -> tuple[int, int]:
    below = path <= target
    return int(np.argmax(below)), int(len(path) - np.argmin(below[::-1])) if not below.all() else 0


def test_oscillating_loss_first_and_last_crossing():
    phase, path = swings()
    fooled = 0
    for target in np.geomspace(2 * path[-1], 0.9 * path[0], 40):
        first, last = first_and_last(path, target)
        found = steps_to_target(SWINGS, phase, float(target))
        stays = steps_to_target(SWINGS, phase, float(target), crossing="last")
        assert found.status is Status.REACHED
        assert (found.step, stays.step) == (first, last)
        assert found.examples == first
        agree_each(found.loss, path[first], 1e-10)
        agree_each(stays.loss, path[last], 1e-10)
        assert found.scanned
        fooled += bisection(path, target) != first
    assert fooled > 5  # THEORY 1.3: the loss is not monotone, bisection lands elsewhere


@pytest.mark.parametrize("mu", [0.9, 0.99])
def test_fast_swings_between_grid_points_are_seen(mu):
    """Near lr h = 2 (1 + mu) every second step is a swing; the search grid is 5 % wide."""
    problem = Problem([1.0], [1e-9], initial_mean=1.0, initial_variance=0.0)
    phase = Phase(HeavyBall(mu), 2.3, HORIZON)
    path = heavy_ball_losses(problem, 2.3, mu, HORIZON)
    for target in np.geomspace(1.5 * path[-20:].max(), 0.9 * path.max(), 25):
        first, last = first_and_last(path, target)
        found = steps_to_target(problem, phase, float(target))
        stays = steps_to_target(problem, phase, float(target), crossing="last")
        assert (found.step, stays.step) == (first, last)


def test_a_dip_under_the_floor_is_a_crossing():
    """Momentum overshoots before the noise has built up: the loss dips below its floor."""
    problem = Problem([1.0], [1.0], initial_mean=5.0, initial_variance=0.0)
    phase = Phase(HeavyBall(0.99), 0.05, HORIZON)
    path = heavy_ball_losses(problem, 0.05, 0.99, HORIZON)
    floor = 0.5 * literal.heavy_ball_steady(np.ones(1), np.ones(1), 0.05, 1, 0.99)[0]
    dip = int(np.argmin(path[:100]))
    assert path[dip] < 0.95 * floor
    target = 0.9 * floor
    found = steps_to_target(problem, phase, target)
    assert found.status is Status.REACHED
    assert found.step == np.argmax(path <= target)
    assert found.floor == pytest.approx(floor, rel=1e-9)
    never = steps_to_target(problem, phase, 0.5 * path.min())
    assert never.status is Status.NOT_REACHED
    assert np.isnan([never.step, never.examples, never.loss]).all()


@settings(max_examples=15)
@given(st.floats(1e-7, 1e-2), st.floats(1.05, 50.0))
def test_monotone_case_closed_form_over_many_steps(lr, over):
    """One direction from above the floor: T = ceil(log((target - s*)/(s0 - s*)) / log r^2)."""
    h, v, s0 = np.array([0.8]), np.array([0.5]), 100.0
    star = float(literal.sgd_steady(h, v, lr, 1)[0])
    wanted = min(over * star, 0.5 * s0)
    problem = Problem(h, v, initial_mean=0.0, initial_variance=s0)
    found = steps_to_target(problem, Phase(SGD(), lr, 10**10), 0.4 * wanted)
    steps = np.log((wanted - star) / (s0 - star)) / (2 * np.log1p(-lr * 0.8))
    assert found.status is Status.REACHED
    # Rounding in the loss may move the crossing of a nearly flat curve by a share of steps.
    assert abs(found.step - np.ceil(steps)) <= 1 + 1e-8 * steps
    assert found.examples == found.step


def test_below_the_floor_is_not_reached(problem):
    h, v = problem.curvature, problem.noise_variance
    floor = 0.5 * h @ literal.sgd_steady(h, v, 0.3, 2)
    for horizon in (100, 10**9):
        phase = Phase(SGD(), 0.3, horizon, 2)
        for crossing in ("first", "last"):
            found = steps_to_target(problem, phase, 0.99 * floor, crossing=crossing)
            assert found.status is Status.NOT_REACHED
            assert found.floor == pytest.approx(floor, rel=1e-10)
            assert np.isnan(found.step)


def test_diverging_is_said(problem):
    phase = Phase(SGD(), 5.0, 10**6)
    for crossing in ("first", "last"):
        found = steps_to_target(problem, phase, 1e-3, crossing=crossing)
        assert found.status is Status.DIVERGED


def test_a_start_below_the_target_is_step_zero(problem):
    for crossing in ("first", "last"):
        found = steps_to_target(problem, Phase(SGD(), 0.01, 50), 1e6, crossing=crossing)
        assert (found.step, found.examples) == (0, 0.0)
        assert found.loss == pytest.approx(problem.initial_loss, rel=IDENTITY)


def test_examples_follow_the_batch_schedule(problem):
    """Under schedules of rate and batch the path is the product formula's."""
    quiet = problem.replace(noise_variance=0.01)
    phase = Phase(LatePhase(2, gamma="mean"), Cyclic(0.3, 0.1, 4), 400, Piecewise((2, 8), (30,)))
    t = np.arange(400)
    lrs = 2 * (0.1 + 0.1 * (1 + np.cos(np.pi * (t % 4) / 3)))  # lambda = lr + (1/2) 2 lr
    sizes = np.where(t < 30, 2, 8)
    h, s0 = quiet.curvature, quiet.initial_mean**2 + quiet.initial_variance
    path = np.array([
        0.5 * h @ literal.sgd_moment_sequence(h, quiet.noise_variance / 2, lrs[:n], sizes[:n], s0)
        for n in range(61)
    ])  # fmt: skip
    target = float(0.5 * (path[49] + path[50]))
    found = steps_to_target(quiet, phase, target)
    assert found.step == np.argmax(path <= target)
    assert found.step > 40
    assert found.examples == 2 * (30 * 2 + (found.step - 30) * 8)


def test_averages_have_no_floor(problem):
    """SWA: the variance falls like one over the steps; the crossing is where literal's is."""
    h, v = problem.curvature, problem.noise_variance
    s0 = problem.initial_mean**2 + problem.initial_variance
    path = np.array([0.5 * h @ s0] + [
        0.5 * h @ literal.snapshot_average(h, v, 0.3, 1, s0, 1, n) for n in range(1, 301)
    ])  # fmt: skip
    target = float(path[250])
    found = steps_to_target(problem, Phase(SWA(), 0.3, 10**5), target * (1 + 1e-12))
    assert np.isnan(found.floor)
    assert found.step == np.argmax(path <= target)


# ------------------------------------------------------------------ fewest steps, critical batch

BATCHES = [1, 4, 16, 64, 256]
NOISY = Problem([1.0, 0.5, 0.2, 0.1], [1.0, 0.5, 0.2, 0.1], initial_mean=0.0)
TARGET = 0.02


def brute_steps(batch_size: float, noise: float = 1.0) -> int:
    """Fewest steps over 300 rates, from the closed form at every step."""
    h, v = NOISY.curvature, noise * NOISY.noise_variance / batch_size
    t = np.arange(6000)[:, None]
    best = 10**9
    for lr in np.geomspace(1e-3, 1.999, 300):
        square = (1 - lr * h) ** 2
        star = lr**2 * v / (1 - square)
        losses = (star + square**t * (1 - star)) @ (0.5 * h)
        hit = np.flatnonzero(losses <= TARGET)
        best = min(best, int(hit[0]) if hit.size else best)
    return best


def test_fewest_steps_is_brute_force():
    for batch_size in (4, 64):
        lr, found = fewest_steps(NOISY, Phase(SGD(), 1.0, 10**6, batch_size), TARGET)
        brute = brute_steps(batch_size)
        assert found.step <= brute * 1.02  # 41 + 17 rates against 300
        h, v = NOISY.curvature, NOISY.noise_variance
        before, after = (
            0.5 * h @ literal.sgd_moment(h, v, lr, batch_size, 1.0, int(found.step) - back)
            for back in (1, 0)
        )
        assert after <= TARGET < before


def test_critical_batch_size():
    found = critical_batch_size(NOISY, SGD(), TARGET, BATCHES)
    table = found.table
    assert table["batch_size"].tolist() == BATCHES
    brute = np.array([brute_steps(b) for b in BATCHES])
    np.testing.assert_allclose(table["step"], brute, rtol=0.02, atol=1)
    np.testing.assert_allclose(table["examples"], table["step"] * table["batch_size"])
    # Its defining property, by brute force at that very batch size: twice the steps of a huge
    # batch, twice the examples of a tiny one. Four directions are no hyperbola: to a third.
    huge, tiny = brute_steps(1e6), brute_steps(1) * 1
    at = brute_steps(found.critical)
    assert at == pytest.approx(2 * huge, rel=0.35)
    assert at * found.critical == pytest.approx(2 * tiny, rel=0.35)
    agree_each(found.least_examples, found.critical * found.least_steps, IDENTITY)
    fit = found.least_steps * (1 + found.critical / np.array(BATCHES))
    agree_each(table["fit"], fit, 1e-9)


def test_a_batch_size_that_does_not_reach_the_target_is_a_row():
    """It is told, and the fit is that of the others."""
    found = critical_batch_size(NOISY, SGD(), TARGET, [1e-6, *BATCHES], max_steps=10**5)
    assert found.table["status"].tolist() == ["not_reached"] + ["reached"] * len(BATCHES)
    assert found.table.iloc[0][["lr", "step", "examples", "fit"]].isna().all()
    others = critical_batch_size(NOISY, SGD(), TARGET, BATCHES, max_steps=10**5)
    assert (found.critical, found.least_steps) == (others.critical, others.least_steps)


def test_critical_batch_size_is_proportional_to_the_noise():
    """Noise enters as v / B: eight times the noise at eight times the batch is the same run."""
    before = critical_batch_size(NOISY, SGD(), TARGET, BATCHES)
    louder = NOISY.replace(noise_variance=8 * NOISY.noise_variance)
    after = critical_batch_size(louder, SGD(), TARGET, [8 * b for b in BATCHES])
    assert after.critical == pytest.approx(8 * before.critical, rel=1e-6)
    assert after.least_steps == pytest.approx(before.least_steps, rel=1e-6)


def test_critical_batch_size_of_late_phase_counts_members():
    """In law SGD at rate 2 lr with batch K B: critical / K, the same least steps."""
    one = critical_batch_size(NOISY, SGD(), TARGET, [4, 16, 64, 256])
    many = critical_batch_size(NOISY, LatePhase(4, gamma="mean"), TARGET, [1, 4, 16, 64])
    assert many.table["step"].tolist() == one.table["step"].tolist()
    assert many.table["examples"].tolist() == one.table["examples"].tolist()
    assert many.critical == pytest.approx(one.critical / 4, rel=1e-6)


# ------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: steps_to_target(p, Phase(SGD(), 0.1, 9), 0.0), "target"),
        (lambda p: steps_to_target(p, Phase(SGD(), 0.1, 9), float("nan")), "target"),
        (lambda p: steps_to_target(p, Phase(SGD(), 0.1, 9), 1.0, crossing="third"), "crossing"),
        (lambda p: stability_edge(p, SGD(), member_lr_ratio=0.0), "member_lr_ratio"),
        (lambda p: best_lr(p, lambda lr: nqm.constant(SGD(), lr, 3), 0.0, 1.0), r"best_lr\.low"),
        (lambda p: best_lr(p, lambda lr: nqm.constant(SGD(), lr, 3), 1.0, 0.5), r"best_lr\.high"),
        (lambda p: best_lr(p, lambda lr: nqm.constant(SGD(), lr, 3), 0.1, 1.0, points=2), "points"),
        (lambda p: critical_batch_size(p, SGD(), 1e-3, [1, 2, 4], max_steps=10),
         "0 of 3 batch sizes.*raise the target"),
        (lambda p: critical_batch_size(p, SGD(), 2 * p.initial_loss, [1, 2, 4]), "target.*start"),
        (lambda p: fewest_steps(p, Phase(SGD(), 1.0, 10), 1e-9), "target"),
        (lambda p: fewest_steps(p, Phase(MultiplicativeLatePhase(2, gamma="mean"), 1.0, 10), 0.1),
         "MultiplicativeLatePhase has no exact moments"),
        (lambda p: steps_to_target(p, Phase(Ensemble(2), 0.1, 9), -1.0), "target"),
    ],
)  # fmt: skip
def test_misuse_is_an_error(call, words, problem):
    with pytest.raises(NQMError, match=words):
        call(problem)


# ------------------------------------------------------------------ whole programs


def brute(problem, phases, target, crossing):
    steps = sum(phase.steps for phase in phases)
    losses = nqm.solve(problem, phases, range(steps + 1), jump=False).loss
    if crossing == "first":
        hits = np.flatnonzero(losses <= target)
        return int(hits[0]) if hits.size else None
    above = np.flatnonzero(losses > target)
    return None if above.size and above[-1] == steps else int(above[-1]) + 1


@pytest.mark.parametrize("crossing", ["first", "last"])
@pytest.mark.parametrize("share", [0.99, 0.3, 0.06, 0.02, 0.001])
def test_a_program_of_phases_by_trying_every_step(crossing, share, problem):
    """SGD, then late-phase members with a drop of the rate, then a fast phase that rises again."""
    phases = [
        Phase(SGD(), 0.3, 60, 2),
        Phase(LatePhase(4, gamma="mean"), 0.05, 300, 2),
        Phase(SGD(), 0.6, 40, 2),
    ]
    target = share * problem.initial_loss
    found = nqm.steps_to_target(problem, phases, target, crossing=crossing)
    expected = brute(problem, phases, target, crossing)
    if expected is None:
        assert found.status == "not_reached"
        return
    assert found.step == expected
    agree_each(found.loss, nqm.solve(problem, phases, [expected]).loss[0], 1e-9)
    first, late = min(expected, 60), min(max(expected - 60, 0), 300)
    assert found.examples == 2 * first + 8 * late + 2 * max(expected - 360, 0)


def test_a_long_program_without_taking_every_step():
    """Loss of the floor's approach: the first step after the drop of the rate, in closed form."""
    problem = Problem([1.0], 1.0)
    high, low, drop = 0.1, 1e-5, 10**7
    settled, floor = high / (2 - high), low / (2 - low)
    target = 0.5 * (floor + (settled - floor) * 1e-3)
    phases = [Phase(SGD(), high, drop), Phase(SGD(), low, 10**7)]
    found = nqm.steps_to_target(problem, phases, target)
    assert found.step == drop + int(np.ceil(np.log(1e-3) / (2 * np.log1p(-low))))
    assert not found.scanned
    agree_each(found.floor, 0.5 * floor, 1e-9)

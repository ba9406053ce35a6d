"""Rates, momentum, average and batch sizes together: gradients, bounds, and literal simulation."""

from __future__ import annotations

import numpy as np
import pytest

from nqm import NQMError, Problem, best_linear, best_piecewise, sample, solve
from nqm.problems.least_squares import power_law
from nqm.problems.spectra import harmonic
from nqm.tuning.joint import SETTINGS, linear_loss
from tests.tolerances import IDENTITY, JUMP, agree_each, within_error

STEPS = 30


@pytest.fixture
def small() -> Problem:
    h = harmonic(12)
    return Problem(h, 0.3 * h, initial_mean=0.5, initial_variance=0.75)


def literal_loss(problem, lr, momentum, decay, batch_size):
    """Second moments of (x, b, y) by matrices, for complex settings too."""
    total = 0.0
    for h, v, m, s, weight in zip(
        problem.curvature, problem.noise_variance, problem.initial_mean,
        problem.initial_variance, problem.weight, strict=True,
    ):  # fmt: skip
        start = np.array([[1.0, 0.0, 1.0]])
        moment = (m**2 + s) * start.T @ start
        for rate, mu, kept, size in zip(lr, momentum, decay, batch_size, strict=True):
            step = np.array([[1 - rate * h, -rate * mu, 0.0], [h, mu, 0.0], [0.0, 0.0, 1.0]])
            push = np.array([-rate, 1.0, 0.0])
            mean = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0 - kept, 0.0, kept]])
            step, push = mean @ step, mean @ push
            moment = step @ moment @ step.T + v / size * np.outer(push, push)
        total = total + weight * moment[2, 2]
    return total


def test_gradients_are_complex_steps_through_the_recursion(small):
    rng = np.random.default_rng(1)
    at = [
        rng.uniform(0.1, 3.0, 9), rng.uniform(0.0, 0.95, 9), rng.uniform(0.0, 0.99, 9),
        rng.uniform(1.0, 8.0, 9),
    ]  # fmt: skip
    loss, slopes = linear_loss(small, *at)
    agree_each(loss, literal_loss(small, *at), JUMP)
    for k, name in enumerate(SETTINGS):
        for t in range(9):
            shifted = [array.astype(complex) for array in at]
            shifted[k][t] += 1e-30j
            expected = literal_loss(small, *shifted).imag / 1e-30
            assert slopes[name][t] == pytest.approx(expected, rel=1e-9, abs=1e-11 * loss)


@pytest.fixture(scope="module")
def joint():
    h = harmonic(12)
    problem = Problem(h, 0.3 * h, initial_mean=0.5, initial_variance=0.75)
    return problem, best_linear(problem, 4, STEPS, 4.0)


def test_it_is_no_worse_than_any_part_and_above_the_bound(joint):
    problem, best = joint
    parts = [best_linear(problem, 4, STEPS, 4.0, free=[name]).loss for name in SETTINGS]
    rates = best_piecewise(problem, 4, STEPS, 4.0)
    agree_each(parts[0], rates.loss, 1e-6)  # two searches for one optimum
    assert best.loss < 0.9 * min(parts)
    total = 1.0 / (1.0 + STEPS * 4 * problem.curvature**2 / problem.noise_variance)
    agree_each(best.bound, problem.weight @ total, IDENTITY)  # the start has E x^2 = 1
    assert best.regret == best.loss - best.bound > 0.0
    # What is left is that all directions share their settings, and pieces their steps.
    assert best.loss < 1.15 * best.bound


def test_its_gradient_vanishes_where_no_bound_holds_it(joint):
    """A factor on any piece's rate, by finite differences, lowers the loss by nothing."""
    problem, best = joint
    steps = [np.repeat(each, best.lengths) for each in
             (best.lr, best.momentum, best.decay, best.batch_size)]  # fmt: skip
    edges = np.cumsum(best.lengths)
    for first, last in zip(edges - best.lengths, edges, strict=True):
        change = []
        for factor in (0.99, 1.01):
            rates = steps[0].copy()
            rates[first:last] *= factor
            change.append(literal_loss(problem, rates, *steps[1:]) / best.loss - 1.0)
        assert min(change) > -1e-6


def test_its_program_does_it(joint):
    problem, best = joint
    assert best.program.steps == STEPS == best.lengths.sum()
    assert best.program.examples([STEPS])[0] == pytest.approx(4 * STEPS, rel=IDENTITY)
    assert best.batch_size.min() >= 1.0
    agree_each(solve(problem, best.program, [STEPS]).loss, best.loss, JUMP)
    drawn = sample(problem, best.program, [STEPS], replicas=4000, seed=2)
    within_error(drawn.loss, best.loss, drawn.stderr)


def test_settings_that_are_not_free_stay(small):
    best = best_linear(small, 3, STEPS, 4.0, free=("lr", "decay"), highest_lr=1.5)
    assert best.momentum.tolist() == [0.0] * 3
    assert best.batch_size.tolist() == [4.0] * 3
    assert best.lr.max() <= 1.5 * (1 + 1e-12)
    only = best_linear(small, 3, STEPS, 0.5, free="momentum")
    assert np.ptp(only.lr) == 0.0
    assert best_linear(small, 10, 3).lengths.tolist() == [1, 1, 1]


def test_the_bound_holds_on_random_problems():
    rng = np.random.default_rng(5)
    for _ in range(6):
        h = 10 ** rng.uniform(-2, 0, 3)
        problem = Problem(
            h, 10 ** rng.uniform(-3, 1, 3), initial_variance=10 ** rng.uniform(-1, 1, 3)
        )
        best = best_linear(problem, int(rng.integers(1, 5)), int(rng.integers(1, 12)), 2.0)
        assert best.regret > -1e-9 * best.bound
    # In one direction SGD at the greedy rates is the Kalman filter, and reaches the bound.
    one = best_linear(Problem([0.7], [0.4]), 8, 8, free="lr")
    agree_each(one.loss, one.bound, 1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"free": ("lr", "mu")}, "free 'mu' is unknown"),
        ({"free": ()}, "must name settings"),
        ({"batch_size": 0.5}, "batch_size"),
        ({"pieces": 0}, "pieces"),
        ({"problem": power_law(5, alpha=1.0, beta=0.7)}, "best_linear needs a Problem"),
    ],
)
def test_misuse_is_an_error(small, changes, said):
    with pytest.raises(NQMError, match=said):
        best_linear(**{"problem": small, "pieces": 2, "steps": 5, **changes})


def test_intervals_end_where_the_loss_has_risen(small):
    """By the recursion in matrices: at both ends of each setting's interval, unless at a bound."""
    best = best_linear(small, 3, STEPS, 4.0, within=0.02)
    assert set(best.flat) == {"lr", "momentum", "decay"}
    at = [np.repeat(getattr(best, name), best.lengths) for name in SETTINGS]
    least = literal_loss(small, *at)
    inner = 0
    for k, name in enumerate(SETTINGS[:3]):
        flat, own = best.flat[name], getattr(best, name)
        assert flat.within == 0.02
        assert np.all((flat.low <= own + 1e-12) & (own - 1e-12 <= flat.high))
        for piece in range(3):
            for end in (flat.low[piece], flat.high[piece]):
                moved = own.copy()
                moved[piece] = end
                changed = [*at]
                changed[k] = np.repeat(moved, best.lengths)
                rise = literal_loss(small, *changed) / least - 1.0
                assert rise < 0.02 + 1e-6
                inner += abs(rise - 0.02) < 1e-5
    assert inner >= 6  # most of the 18 ends are no bound of the search


def test_intervals_are_of_what_is_free(small):
    assert set(best_linear(small, 2, STEPS, free=["lr", "batch_size"], batch_size=4.0).flat) == {
        "lr"
    }
    with pytest.raises(NQMError, match="within"):
        best_linear(small, 2, STEPS, within=0.0)

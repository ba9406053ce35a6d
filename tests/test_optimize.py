"""Optimised schedules: exact gradients, known optima, and nothing better nearby."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import SGD, NQMError, Phase, Problem, Program
from nqm.optimize import best_piecewise, equal_pieces, fewest_steps_piecewise, piecewise_loss
from nqm.solvers.search import search
from nqm.spectra import harmonic
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree_each


@pytest.fixture
def problem() -> Problem:
    rng = np.random.default_rng(2)
    h = harmonic(30)
    return Problem(h, h**0.6, initial_mean=rng.normal(size=30), initial_variance=rng.random(30))


def literal_loss(problem, rates, lengths, batch_size):
    """Step by step, s' = (1 - lr h)^2 s + lr^2 v / B; rates may be complex."""
    h, v = problem.curvature, problem.noise_variance / batch_size
    s = problem.initial_mean**2 + problem.initial_variance
    for lr, count in zip(rates, lengths, strict=True):
        for _ in range(count):
            s = (1 - lr * h) ** 2 * s + lr**2 * v
    return problem.weight @ s


RATES = np.array([0.4, 1.0, 2.0 - 1e-7, 2.0, 2.2, 1e-9, 0.02])
LENGTHS = np.array([3, 1, 40, 7, 2, 60, 0])


def test_gradient_is_the_complex_steps_and_finite_differences(problem):
    """At u = 1 and u = 2, where the closed form is 0 / 0 or has no logarithm, too."""
    loss, gradient = piecewise_loss(problem, RATES, LENGTHS, 4.0)
    agree_each(loss, literal_loss(problem, RATES, LENGTHS, 4.0), IDENTITY)
    for k in range(RATES.size):
        tiny = RATES.astype(complex)
        tiny[k] += 1e-30j
        exact = literal_loss(problem, tiny, LENGTHS, 4.0).imag / 1e-30
        # The slope of the sum is a limit at u = 2 exactly and cancels a little around it.
        np.testing.assert_allclose(gradient[k], exact, rtol=1e-8, atol=1e-14)
    # Second-order differences of our own function, away from the corners.
    rates, lengths = np.array([0.3, 1.3, 0.7]), np.array([5, 10, 30])
    _, gradient = piecewise_loss(problem, rates, lengths, 4.0)
    for k in range(3):
        ends = [rates + sign * 1e-5 * np.eye(3)[k] for sign in (1, -1)]
        up, down = (piecewise_loss(problem, end, lengths, 4.0)[0] for end in ends)
        assert (up - down) / 2e-5 == pytest.approx(gradient[k], rel=1e-6)


def test_flat_and_slow_directions():
    problem = Problem([1.0, 1e-12, 0.0], [0.5, 0.5, 0.5])
    loss, gradient = piecewise_loss(problem, [0.3, 0.1], [10, 10**6], 1.0)
    program = Program((Phase(SGD(), 0.3, 10), Phase(SGD(), 0.1, 10**6)))
    agree_each(loss, nqm.solve(problem, program, [program.steps]).loss[0], JUMP)
    assert np.isfinite(gradient).all()


def test_one_direction_is_the_kalman_filter():
    """Free rates in one direction: 1 / s' = 1 / s + h^2 / v."""
    h, v, s, steps, batch = 0.5, 2.0, 3.0, 20, 4
    problem = Problem([h], [v], initial_mean=0.0, initial_variance=s)
    found = best_piecewise(problem, steps, steps, batch)
    final = 1.0 / (1.0 / s + steps * h**2 * batch / v)
    agree_each(found.loss, 0.5 * h * final, 1e-9)
    seconds = 1.0 / (1.0 / s + np.arange(steps) * h**2 * batch / v)
    # The optimum is flat: rates are known to the root of the tolerance on the loss.
    np.testing.assert_allclose(found.rates, h * seconds / (h**2 * seconds + v / batch), rtol=1e-3)
    assert not found.at_bound


def test_optimum_beats_constant_rates_and_its_neighbours(problem):
    steps, batch = 300, 8.0
    found = best_piecewise(problem, 6, steps, batch)
    assert found.lengths.tolist() == [50] * 6
    start = problem.initial_mean**2 + problem.initial_variance
    constant = [
        problem.weight @ literal.sgd_moment(problem.curvature, problem.noise_variance, lr, batch,
                                            start, steps)
        for lr in np.geomspace(1e-3, 1.999, 300)
    ]  # fmt: skip
    assert found.loss < 0.9 * min(constant)
    rng = np.random.default_rng(0)
    for _ in range(50):
        rates = np.minimum(found.rates * np.exp(0.1 * rng.normal(size=6)), 2.0)
        assert piecewise_loss(problem, rates, found.lengths, batch)[0] >= found.loss * (1 - 1e-9)
    # Kuhn and Tucker: no slope inside, none inwards at the bound.
    loss, gradient = piecewise_loss(problem, found.rates, found.lengths, batch)
    agree_each(loss, found.loss, IDENTITY)
    slope = gradient * found.rates / loss
    inside = found.rates < 2.0 * (1 - 1e-9)
    assert np.all(np.abs(slope[inside]) < 1e-5)
    assert np.all(slope[~inside] < 1e-5)
    assert found.at_bound == (not inside.all())


def test_one_piece_is_the_best_constant_rate(problem):
    found = best_piecewise(problem, 1, 50, 2.0)
    best = nqm.best_lr(problem, lambda lr: nqm.constant(SGD(), lr, 50, batch_size=2), 1e-3, 1.999)
    agree_each(found.loss, best.loss, 1e-9)


def test_schedule_runs_as_a_phase(problem):
    """More pieces than steps as well: empty pieces are left out."""
    for pieces, steps in ((4, 103), (7, 3)):
        found = best_piecewise(problem, pieces, steps, 4.0)
        assert found.lengths.sum() == steps
        program = Program((Phase(SGD(), found.schedule, steps, 4.0),))
        agree_each(found.loss, nqm.solve(problem, program, [steps]).loss[0], JUMP)
    assert equal_pieces(103, 4).tolist() == [26, 26, 25, 26]


def test_highest_rate_and_a_start_of_ones_own(problem):
    capped = best_piecewise(problem, 5, 40, 64.0, highest_lr=0.3)
    assert capped.at_bound
    assert capped.rates.max() <= 0.3
    again = best_piecewise(problem, 5, 40, 64.0, highest_lr=0.3, start=np.full(5, 0.1))
    agree_each(again.loss, capped.loss, 1e-8)


@pytest.mark.parametrize("pieces", [1, 5])
def test_fewest_steps(pieces):
    h = harmonic(400)
    problem = Problem(h, h)
    found = fewest_steps_piecewise(problem, pieces, 64.0, 0.05)
    shorter = best_piecewise(problem, pieces, found.steps - 1, 64.0)
    assert found.loss <= 0.05 < shorter.loss
    # n / (2 C B), the bound of Zhang et al. 2019
    assert found.steps > 400 / (2 * 0.05 * 64)
    if pieces == 1:
        rates = np.geomspace(0.5 * found.rates[0], 2.0 * found.rates[0], 400)
        table = search(problem, SGD(), rates, [64.0], 0.05)
        assert found.steps <= table["step"].iloc[0] <= found.steps + 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: best_piecewise(p, 0, 5), "pieces"),
        (lambda p: best_piecewise(p, 2, 0), "steps"),
        (lambda p: best_piecewise(p, 2, 5, 0.0), "batch_size"),
        (lambda p: best_piecewise(p, 2, 5, highest_lr=0.0), "highest_lr"),
        (lambda p: best_piecewise(p, 2, 5, start=[0.1]), "start must hold 2 rates"),
        (lambda p: fewest_steps_piecewise(p, 2, 1.0, 1e3), "target"),
        (lambda p: fewest_steps_piecewise(p, 2, 1.0, 1e-3, horizon=50), "raise horizon"),
    ],
)
def test_misuse_is_an_error(call, words, problem):
    with pytest.raises(NQMError, match=words):
        call(problem)

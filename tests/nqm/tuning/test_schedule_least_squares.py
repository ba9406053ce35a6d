"""Best rates of one-pass least squares: gradients, the greedy law, the additive limit."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import SGD, NQMError, Phase, Piecewise, Program, WarmupStableDecay
from nqm.problems.least_squares import LeastSquares, power_law
from nqm.tuning.schedule_least_squares import least_squares_loss
from tests.tolerances import IDENTITY, agree, agree_each

PROBLEM = LeastSquares([1.0, 0.3, 0.05], 0.2, [1.0, -2.0, 0.5], 0.3, multiplicity=[1.0, 2.0, 4.0])


def test_loss_is_that_of_the_schedule_and_its_gradient_that_of_differences():
    lr, lengths = np.array([0.4, 0.2, 0.05]), np.array([7, 0, 12])
    loss, slope = least_squares_loss(PROBLEM, lr, lengths, 3.0)
    program = Program((Phase(SGD(), Piecewise((0.4, 0.05), (7,)), 19, 3.0),))
    agree_each([loss], nqm.solve(PROBLEM, program, [19]).loss, IDENTITY)
    step = 1e-6
    for piece in range(3):
        moved = [
            least_squares_loss(PROBLEM, lr + sign * step * np.eye(3)[piece], lengths, 3.0)[0]
            for sign in (1, -1)
        ]
        # Central differences: an error of the order step^2 and 1e-16 / step.
        assert slope[piece] == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-8)


def test_greedy_rates_are_best_in_one_direction():
    """A step leaves ((1 - lr h)^2 + 2 (lr h)^2 / B) s + lr^2 h s2 / B: each is least in turn."""
    h, noise, batch, s = 0.7, 0.5, 4.0, 2.0
    rates = []
    for _ in range(12):
        lr = s / (h * s * (1 + 2 / batch) + noise / batch)
        s = ((1 - lr * h) ** 2 + 2 * (lr * h) ** 2 / batch) * s + lr**2 * h * noise / batch
        rates.append(lr)
    found = nqm.best_piecewise(LeastSquares([h], noise, 0.0, 2.0), 12, 12, batch)
    agree_each([found.loss], [0.5 * h * s], IDENTITY)
    agree(found.lr, rates, 1e-4)
    assert not found.at_bound


def test_large_batches_have_the_best_rates_of_additive_noise():
    """B -> infinity at fixed s2 / B: only v_i = h_i s2 is left of the noise."""
    scale, small = 1e9, power_law(20, 1.0, 0.7, 0.05)
    edge = 2.0 / small.curvature.max()
    expected = nqm.best_piecewise(small.additive(), 6, 120, 1.0, highest_lr=edge)
    found = nqm.best_piecewise(
        small.replace(label_noise=0.05 * scale), 6, 120, scale, highest_lr=edge
    )
    agree_each([found.loss], [expected.loss], 1e-6)


def test_it_is_better_than_the_usual_schedules():
    problem, steps = power_law(60, 1.0, 0.7, 0.01), 400
    found = nqm.best_piecewise(problem, 20, steps, 4.0)
    check = nqm.solve(problem, Phase(SGD(), found.schedule, steps, 4.0), [steps]).loss[0]
    agree_each([found.loss], [check], IDENTITY)
    assert found.loss <= nqm.best_piecewise(problem, 1, steps, 4.0).loss
    for peak in np.geomspace(0.1, 1.5, 8):
        for decay in (100, 200, 400):
            rate = WarmupStableDecay(peak, peak / 1000, 0, steps - decay, decay)
            loss = nqm.solve(problem, Phase(SGD(), rate, steps, 4.0), [steps]).loss[0]
            assert not loss < 0.999 * found.loss


def test_mistakes_are_named():
    with pytest.raises(NQMError, match="start must hold 3 rates"):
        nqm.best_piecewise(PROBLEM, 3, 9, start=[0.1])
    with pytest.raises(NQMError, match="highest_lr"):
        nqm.best_piecewise(PROBLEM, 3, 9, highest_lr=-1.0)
    with pytest.raises(NQMError, match=r"best_piecewise\.steps"):
        nqm.best_piecewise(PROBLEM, 3, 10**12)

"""LAWA with long windows: a mean of correlated iterates, in closed form."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import nqm
from nqm import EMA, LAWA, SGD, SWA, HeavyBall, LatePhase, Phase, Problem
from tests.tolerances import IDENTITY, JUMP, agree_each


def mean_loss(h: float, v: float, lr: float, steps: int, every: int, window: int) -> float:
    """Loss of the mean of the last snapshots of SGD from x = 1, by their covariances.

    Cov(x_s, x_t) = r^(t - s) Var(x_s) for s < t, with r = 1 - lr h.
    """
    r = 1 - lr * h
    last = steps // every
    times = every * np.arange(max(last - window, 0) + 1, last + 1)
    variance = lr**2 * v * (1 - r ** (2 * times)) / (1 - r * r)
    apart = r ** np.abs(times[:, None] - times)
    covariance = apart * np.minimum.outer(variance, variance)
    return float(0.5 * h * (np.mean(r**times) ** 2 + covariance.mean()))


@pytest.mark.parametrize("window", [13, 100, 2000])
@pytest.mark.parametrize("every", [1, 3])
def test_a_long_window_is_the_mean_of_its_snapshots(every, window):
    """Before it is full, when it is just full, between two snapshots, and long after."""
    h, v, lr = 0.7, 0.3, 0.02
    problem = Problem([h], [v], initial_mean=1.0, initial_variance=0.0)
    full = window * every
    at = sorted({every, 5 * every, full - 1, full, full + 1, full + every + 1, 3 * full, 9000})
    at = [step for step in at if every <= step <= 9000]
    found = nqm.solve(problem, Phase(LAWA(SGD(), every, window), lr, 9000), at)
    agree_each(found.loss, [mean_loss(h, v, lr, t, every, window) for t in at], JUMP)


PROGRAMS = {
    "one phase": [Phase(LAWA(SGD(), 3, 14), 0.1, 150)],
    "goes on": [Phase(HeavyBall(0.9), 0.2, 37), Phase(LAWA(HeavyBall(0.9), 2, 15), 0.1, 100, 3)],
    "members": [
        Phase(HeavyBall(0.9), 0.2, 10),
        Phase(LAWA(LatePhase(3, "mean", inner=HeavyBall(0.9)), 2, 15), 0.1, 100),
    ],
    "restarts": [Phase(EMA(SGD()), 0.2, 10), Phase(LAWA(SGD(), 1, 15), 0.1, 60, restart=True)],
    "after an average of its kind": [
        Phase(SWA(SGD(), 1), 0.1, 9),
        Phase(LAWA(SGD(), 1, 13), 0.1, 60),
    ],
    "after its own kind": [Phase(LAWA(SGD(), 1, 13), 0.1, 9), Phase(LAWA(SGD(), 1, 13), 0.2, 60)],
    "diverges": [Phase(LAWA(SGD(), 3, 14), 1.2, 150)],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_window_is_what_its_own_state_gives(name):
    program = PROGRAMS[name]
    problem = Problem([2.0, 0.5, 0.01], [1.0, 0.3, 0.1], minimum=0.4, initial_mean=0.2)
    at = range(0, sum(phase.steps for phase in program) + 1, 7)
    found = nqm.solve(problem, program, at)
    with mock.patch("nqm.solvers.moving_window.fits", return_value=False):
        right = nqm.solve(problem, program, at)
    for column in ("loss", "bias", "variance", "member_loss", "stated_sd", "weight_variance"):
        agree_each(getattr(found, column), getattr(right, column), IDENTITY)
    assert found.status == right.status
    assert found.runaway == right.runaway
    assert found.examples.tolist() == right.examples.tolist()


def test_a_window_of_ten_thousand_is_that_of_swa_until_it_is_full():
    problem = Problem([1.0, 0.1], [1.0, 0.2])
    for steps in (9_999, 10_000):
        window = nqm.solve(problem, Phase(LAWA(HeavyBall(0.9), 1, 10_000), 0.1, steps), [steps])
        swa = nqm.solve(problem, Phase(SWA(HeavyBall(0.9)), 0.1, steps), [steps])
        agree_each(window.loss, swa.loss, IDENTITY)

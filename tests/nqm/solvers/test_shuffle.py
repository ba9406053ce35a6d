"""Shuffled epochs against runs over real permutations of fixed examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nqm import EMA, SGD, SWA, HeavyBall, LatePhase, Nesterov, NQMError, Phase, Problem, steady
from nqm.algorithms.base import Algorithm
from nqm.solvers.shuffle import shuffled_steady
from tests.tolerances import IDENTITY, agree, within_error

EXAMPLES, BATCH = 24, 4
CURVATURE = np.array([1.0, 0.2, 0.02])
VARIANCE = np.array([0.5, 2.0, 1.0])


def examples() -> np.ndarray:
    """A noise vector for every example: mean 0, population variance as stated."""
    noise = np.random.default_rng(0).standard_normal((EXAMPLES, 3))
    noise -= noise.mean(0)
    return noise * np.sqrt(VARIANCE) / noise.std(0)


def problem(variance: np.ndarray = VARIANCE) -> Problem:
    return Problem(CURVATURE, variance)


def sgd(x, buffers, g, lr):
    return x - lr * g, buffers


def heavy_ball(x, buffers, g, lr):
    b = 0.9 * buffers[0] + g
    return x - lr * b, (b, buffers[1])


def nesterov(x, buffers, g, lr):
    b = 0.9 * buffers[0] + g
    return x - lr * (g + 0.9 * b), (b, buffers[1])


def ema(x, buffers, g, lr):
    x = x - lr * g
    return x, (buffers[0], 0.8 * buffers[1] + 0.2 * x)


@pytest.mark.parametrize(
    ("algorithm", "step", "evaluated", "lr"),
    [
        (SGD(), sgd, None, 0.3),
        (HeavyBall(0.9), heavy_ball, None, 0.1),
        (Nesterov(0.9), nesterov, None, 0.05),
        (EMA(SGD(), 0.8), ema, 1, 0.3),
    ],
    ids=["sgd", "heavy ball", "nesterov", "ema"],
)
def test_runs_over_permutations(algorithm: Algorithm, step, evaluated, lr: float) -> None:
    found = shuffled_steady(problem(), Phase(algorithm, lr, 1, BATCH), EXAMPLES)
    rng = np.random.default_rng(1)
    runs, noise, steps = 600, examples(), EXAMPLES // BATCH
    x = rng.standard_normal((runs, 3)) * np.sqrt(found.weight_variance)
    buffers = (np.zeros_like(x), x.copy())
    losses, ends = np.zeros(runs), np.zeros(runs)
    burn_in, measured = 250, 60  # epochs; the slowest direction forgets in some 30
    for epoch in range(burn_in + measured):
        order = rng.permuted(np.tile(np.arange(EXAMPLES), (runs, 1)), axis=1)
        for t in range(steps):
            batch = order[:, t * BATCH : (t + 1) * BATCH]
            g = CURVATURE * x + noise[batch].mean(1)
            x, buffers = step(x, buffers, g, lr)
            if epoch >= burn_in:
                weights = x if evaluated is None else buffers[evaluated]
                losses += (0.5 * CURVATURE * weights**2).sum(1) / (measured * steps)
        if epoch >= burn_in:
            ends += (0.5 * CURVATURE * weights**2).sum(1) / measured
    root = np.sqrt(runs)
    within_error(losses.mean(), found.loss, losses.std(ddof=1) / root)
    within_error(ends.mean(), found.loss_at_end, ends.std(ddof=1) / root)


@given(st.floats(0.01, 1.5), st.integers(2, 40))
def test_the_closed_form_of_sgd(lr: float, steps: int) -> None:
    n = steps * BATCH
    found = shuffled_steady(problem(), Phase(SGD(), lr, 1, BATCH), n)
    r = 1.0 - lr * CURVATURE
    v = VARIANCE / BATCH * (n - BATCH) / (n - 1) * steps / (steps - 1)
    powers = r[:, None] ** np.arange(steps)
    added = lr**2 * v * ((powers**2).sum(1) - powers.sum(1) ** 2 / steps)
    end = added / (1.0 - r ** (2 * steps))
    agree(found.loss_at_end, 0.5 * (CURVATURE * end).sum(), 1e-9)


def test_long_epochs_are_drawing_with_replacement() -> None:
    phase = Phase(HeavyBall(0.5), 0.3, 1, BATCH)
    fast = Problem(np.array([1.0, 0.5]), np.ones(2))
    free = steady(fast, phase)
    long = shuffled_steady(fast, phase, 4_000 * BATCH)
    assert long.loss == pytest.approx(free.loss, rel=5e-3)
    assert long.loss < free.loss


def test_members_on_one_epoch_are_one_model_on_their_joint_batch() -> None:
    members, lr = 3, 0.05
    late = Phase(LatePhase(members, gamma="mean"), lr, 1, 2, lr)
    plain = Phase(SGD(), 2 * lr, 1, 2 * members)
    one = shuffled_steady(problem(), late, 24)
    other = shuffled_steady(problem(), plain, 24)
    agree(one.weight_variance, other.weight_variance, 1e-9)


def test_beyond_the_edge_there_is_no_steady_state() -> None:
    found = shuffled_steady(problem(), Phase(SGD(), 2.1, 1, BATCH), EXAMPLES)
    assert found.radius == pytest.approx(1.1, rel=IDENTITY)
    assert found.loss == np.inf


@pytest.mark.parametrize(
    ("phase", "count", "message"),
    [
        (Phase(SGD(), 0.1, 1, 5), 24, "examples must be at least two steps of 5"),
        (Phase(SGD(), 0.1, 1, 24), 24, "at least two steps of 24"),
        (Phase(SWA(SGD()), 0.1, 1, 4), 24, "linear method at constant rates"),
    ],
)
def test_mistakes(phase: Phase, count: int, message: str) -> None:
    with pytest.raises(NQMError, match=message):
        shuffled_steady(problem(), phase, count)

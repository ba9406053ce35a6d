"""What counts as diverged: what is unstable, and not what is merely larger than a small start."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import (
    SGD,
    Adam,
    Ensemble,
    HeavyBall,
    LatePhase,
    LeastSquares,
    Linear,
    Phase,
    Problem,
    Program,
    Rounded,
    SampledSGD,
    SignSGD,
    Status,
    WeightDecay,
)

#: Starts 1e-20 from the minimum: every stable loss is more than 1e12 times the start's.
SMALL = Problem([1.0, 0.3], [0.5, 2.0], initial_mean=1e-20, initial_variance=0.0, minimum=1.0)
STABLE = {
    "sgd": Phase(SGD(), 0.1, 300),
    "heavy ball": Phase(HeavyBall(0.9), 0.05, 300),
    "a schedule": Phase(SGD(), Linear(0.3, 0.01, 300), 300),
    "a small batch": Phase(SGD(), 0.1, 300, batch_size=1e-3),
    "ensemble": Phase(Ensemble(4), 0.1, 300),
    "spread of members": Phase(LatePhase(3, spread=1e8, gamma="mean"), 1e-6, 5),
    "decay to the origin": Phase(WeightDecay(SGD(), 0.5), 0.1, 300),
    "rounding": Phase(Rounded(SGD(), pitch=1e6), 0.1, 300),
}
SAMPLED = {
    "adam": Phase(Adam(), 0.5, 100),
    "sign": Phase(SignSGD(), 1e3, 101),
    "clipped": Phase(SampledSGD(threshold=1.0), 1e4, 100),
    "heavy tails": Phase(SampledSGD(dof=3.0), 0.1, 100),
}
FAR = Problem([1.0], [1.0], initial_mean=1.0, initial_variance=0.0)


@pytest.mark.parametrize("name", STABLE)
def test_a_stable_run_from_a_small_start_has_finished(name: str) -> None:
    phase = STABLE[name]
    quiet = SMALL.replace(noise_variance=0.0) if name == "decay to the origin" else SMALL
    at = [0, 1, phase.steps]
    for found in (
        nqm.solve(quiet, phase, at),
        nqm.solve(quiet, phase, at, jump=False),
        nqm.sample(quiet, phase, at, replicas=4),
    ):
        assert found.loss[-1] > 1e12 * quiet.initial_loss
        assert found.status == [Status.FINISHED] * 3


@pytest.mark.parametrize("name", SAMPLED)
def test_a_bounded_or_stable_sampled_run_has_finished(name: str) -> None:
    found = nqm.sample(SMALL, SAMPLED[name], [0, SAMPLED[name].steps], replicas=4)
    assert found.loss[-1] > 1e12 * SMALL.initial_loss
    assert found.status == [Status.FINISHED] * 2


def test_least_squares_from_a_small_start_has_finished() -> None:
    problem = LeastSquares([1.0, 0.3], 0.1, initial_mean=1e-20, initial_variance=0.0)
    for found in (
        nqm.solve(problem, Phase(SGD(), 0.1, 50), [50]),
        nqm.sample(problem, Phase(SGD(), 0.1, 50), [50], replicas=4),
    ):
        assert found.status == [Status.FINISHED]


@pytest.mark.parametrize("start", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1.0])
def test_an_unstable_run_has_diverged_from_any_start(start: float, noise: float) -> None:
    problem = Problem([1.0], [noise], initial_mean=start, initial_variance=0.0)
    # |1 - 2.5| = 1.5: 700 steps multiply the start by 1e123, which is no overflow yet.
    phase = Phase(SGD(), 2.5, 700)
    for found in (nqm.solve(problem, phase, [700]), nqm.sample(problem, phase, [700], replicas=4)):
        assert np.isfinite(found.loss).all()
        assert found.status == [Status.DIVERGED]
    # At rates that never repeat no radius is known; the growth alone tells.
    growing = Program((Phase(SGD(), Linear(2.5, 3.0, 700), 700),))
    assert nqm.solve(problem, growing, [700]).status == [Status.DIVERGED]


def test_a_loss_of_the_start_s_own_size_has_finished() -> None:
    huge = FAR.replace(initial_mean=1e100)
    assert nqm.solve(huge, Phase(SGD(), 0.1, 5), [0, 5]).status == [Status.FINISHED] * 2

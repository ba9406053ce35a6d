"""Noise that is correlated in time, against closed forms and covariances written out."""

from __future__ import annotations

import numpy as np
import pytest

from nqm import (
    EMA,
    SGD,
    SWA,
    CorrelatedNoise,
    Ensemble,
    HeavyBall,
    LatePhase,
    LeastSquares,
    LocalSGD,
    NQMError,
    Phase,
    Problem,
    best_average,
    constant,
    sample,
    solve,
    steady,
)
from nqm.tuning.information import program_bound
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, within_error

H = np.array([1.0, 0.3, 0.01])
V = np.array([2.0, 1.0, 1.0])
PROBLEM = Problem(H, V, initial_variance=0.5)


@pytest.mark.parametrize("rho", [0.0, 0.7, -0.5, 0.99])
def test_steady_state_of_sgd(rho):
    """Solve s (1 - r^2) = lr^2 v / B (1 + r rho) / (1 - r rho)."""
    lr, r = 0.4, 1.0 - 0.4 * H
    expected = literal.sgd_steady(H, V, lr, 4) * (1.0 + r * rho) / (1.0 - r * rho)
    found = steady(PROBLEM, Phase(CorrelatedNoise(SGD(), rho), lr, 1, 4))
    assert found.loss == pytest.approx(0.5 * H @ expected, rel=JUMP)
    long = solve(PROBLEM, constant(CorrelatedNoise(SGD(), rho), lr, 10**9, batch_size=4), [10**9])
    agree(long.weight_variance[0], expected, JUMP)


@pytest.mark.parametrize("rho", [0.8, -0.6])
def test_moments_are_those_of_the_noises_covariance(rho):
    """x_T is linear in T noises of covariance v / B (rho^|s - t| - rho^(s + t + 2))."""
    lr, steps, size = 0.3, 25, 2
    t = np.arange(steps)
    noise = rho ** np.abs(t[:, None] - t) - rho ** (t[:, None] + t + 2.0)
    found = solve(PROBLEM, constant(CorrelatedNoise(SGD(), rho), lr, steps, batch_size=size), [25])
    for i, (h, v) in enumerate(zip(H, V, strict=True)):
        kernel = -lr * (1.0 - lr * h) ** (steps - 1 - t)
        start = (1.0 - lr * h) ** (2 * steps) * 0.5
        expected = start + v / size * kernel @ noise @ kernel
        assert found.weight_variance[0, i] == pytest.approx(expected, rel=IDENTITY)


def test_a_long_average_leaves_the_summed_correlation():
    """The mean of N iterates tends to v / (B h^2 N) (1 + rho) / (1 - rho)."""
    n, rho = 10**7, 0.6
    phases = [Phase(CorrelatedNoise(SGD(), rho), 0.5, 10**5, 4)]
    phases.append(Phase(SWA(CorrelatedNoise(SGD(), rho)), 0.5, n, 4))
    found = solve(PROBLEM, phases, [10**5 + n])
    expected = literal.average_limit(H, V, 4, n) * (1.0 + rho) / (1.0 - rho)
    np.testing.assert_allclose(found.weight_variance[0, :2], expected[:2], rtol=1e-5)


@pytest.mark.parametrize(
    "inner",
    [
        LatePhase(3, gamma="mean", minibatch=0.3, spread=0.1),
        LatePhase(3, gamma="mean", directions=(0,)),
        Ensemble(2, HeavyBall(0.5), starts="own"),
        LocalSGD(2, 3),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_members_have_noises_of_their_own(inner):
    """The modes' moments against Monte Carlo of all members."""
    method = CorrelatedNoise(inner, 0.6)
    program = [Phase(method, 0.2, 20, 4), Phase(EMA(method, 0.5), 0.1, 20, 4)]
    exact = solve(PROBLEM, program, [10, 20, 40])
    drawn = sample(PROBLEM, program, [10, 20, 40], replicas=8000, seed=2)
    within_error(drawn.loss, exact.loss, drawn.stderr)
    within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)


def test_late_phase_after_a_single_chain():
    """The noise of one chain is not that of three members: they begin with none."""
    late = CorrelatedNoise(LatePhase(3, gamma="mean"), 0.9)
    program = [Phase(CorrelatedNoise(SGD(), 0.9), 0.2, 20), Phase(late, 0.1, 10)]
    exact, drawn = solve(PROBLEM, program, [25]), sample(PROBLEM, program, [25], replicas=20_000)
    within_error(drawn.loss, exact.loss, drawn.stderr)
    within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)


def test_bounds_by_examples_are_not_claimed():
    """With negative correlation noise cancels, and a run beats what fresh noise allows."""
    method = CorrelatedNoise(SGD(), -0.9)
    assert np.isnan(program_bound(PROBLEM, constant(method, 0.1, 100), [100])).all()
    assert np.isnan(program_bound(PROBLEM, constant(EMA(method), 0.1, 100), [100])).all()
    found = best_average(PROBLEM, constant(method, 0.5, 200))
    assert np.isnan(found.bound)
    fresh = program_bound(PROBLEM, constant(SGD(), 0.5, 200), [200])[0]
    assert found.loss < fresh
    same = constant(CorrelatedNoise(SGD(), 0.0), 0.5, 200)
    assert program_bound(PROBLEM, same, [200])[0] == fresh


@pytest.mark.parametrize("correlation", [1.0, -1.0, float("nan"), "0.5"])
def test_correlation_is_below_one(correlation):
    with pytest.raises(NQMError, match="correlation"):
        CorrelatedNoise(SGD(), correlation)


def test_least_squares_is_refused():
    with pytest.raises(NQMError, match="one gradient per member and step"):
        solve(LeastSquares([1.0, 0.5], 0.1), constant(CorrelatedNoise(), 0.1, 10))

"""The best average of a run's iterates: brute force on the literal recursion, and draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

import nqm
from nqm import (
    EMA,
    SGD,
    SWA,
    Cosine,
    Ensemble,
    HeavyBall,
    LatePhase,
    Lookahead,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    PolynomialAverage,
    Problem,
    WeightDecay,
    best_average,
    constant,
)
from tests.tolerances import IDENTITY, JUMP, SIGMAS, agree, agree_each


def iterates_of_heavy_ball(h, lrs, momentum, noise):
    """Heavy ball on numbers from a start of 1: every iterate, for `noise` of each step."""
    x, b, out = 1.0, 0.0, [1.0]
    for lr, e in zip(lrs, noise, strict=True):
        b = momentum * b + h * x + e
        x = x - lr * b
        out.append(x)
    return np.array(out)


def moment_by_responses(problem, lrs, momentum, batch_size):
    """M from the response of every iterate to the start and to each step's noise."""
    steps = len(lrs)
    moment = np.zeros((steps + 1, steps + 1))
    for i, h in enumerate(problem.curvature):
        start = iterates_of_heavy_ball(h, lrs, momentum, np.zeros(steps))
        second = problem.initial_mean[i] ** 2 + problem.initial_variance[i]
        joint = second * np.outer(start, start)
        for unit in np.eye(steps):
            kick = iterates_of_heavy_ball(h, lrs, momentum, unit) - start
            joint += problem.noise_variance[i] / batch_size * np.outer(kick, kick)
        moment += 0.5 * problem.multiplicity[i] * h * joint
    return moment


def test_joint_moments_by_responses(problem):
    counted = problem.replace(multiplicity=[1.0, 2.0, 30.0])
    lr = Cosine(0.5, 0.05, 20)
    best = best_average(counted, Phase(HeavyBall(0.6), lr, 24, 3))
    expected = moment_by_responses(counted, lr(np.arange(24)), 0.6, 3)
    agree(best.moment, expected, JUMP)
    agree(best.first, np.arange(25), IDENTITY)
    agree_each(best.loss, 1 / np.linalg.solve(expected, np.ones(25)).sum(), 1e-8)
    agree_each(best.last_loss, expected[-1, -1], JUMP)
    searched = minimize(
        lambda a: a @ expected @ a, np.full(25, 1 / 25), jac=lambda a: 2 * expected @ a,
        method="SLSQP", bounds=[(0, 1)] * 25, options={"ftol": 1e-16, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
    )  # fmt: skip
    kept = best_average(counted, Phase(HeavyBall(0.6), lr, 24, 3), nonnegative=True)
    agree_each(kept.loss, searched.fun, 1e-7)  # of the search
    assert kept.loss <= searched.fun * (1 + JUMP)


def test_blocks_are_means_of_iterates(problem):
    program = Phase(HeavyBall(0.5), Cosine(0.4, 0.1, 50), 60, 2)
    whole = best_average(problem, program)
    coarse = best_average(problem, program, blocks=11)
    assert coarse.last[-1] == 60
    assert len(coarse.weights) <= 11
    assert np.array_equal(coarse.first[1:], coarse.last[:-1] + 1)
    mean = np.zeros((len(coarse.weights), 61))
    for row, first, last in zip(mean, coarse.first, coarse.last, strict=True):
        row[first : last + 1] = 1 / (last - first + 1)
    agree(coarse.moment, mean @ whole.moment @ mean.T, JUMP)
    weights = coarse.iterate_weights
    assert weights.sum() == pytest.approx(1.0)
    agree_each(coarse.loss, weights @ whole.moment @ weights, JUMP)
    assert whole.loss <= coarse.loss <= 1.05 * whole.loss


@pytest.mark.parametrize(
    "phases",
    [
        [Phase(SGD(), 0.3, 4, 2), Phase(LatePhase(3, "mean", 0.4), 0.1, 6, 2)],
        [Phase(HeavyBall(0.5), 0.2, 4), Phase(LatePhase(3, inner=HeavyBall(0.5), directions=(0,)),
                                              0.1, 3, member_lr=0.05)],
        [Phase(SGD(), 0.3, 3), Phase(EMA(SGD(), 0.7), Cosine(0.3, 0.1, 5), 7)],
        [Phase(SGD(), 0.3, 3), Phase(SWA(SGD(), 2), 0.2, 7), Phase(SGD(), 0.1, 3, restart=True)],
        [Phase(LatePhase(2), 0.1, 3), Phase(LatePhase(4), 0.05, 3), Phase(SGD(), 0.1, 0)],
        [Phase(Ensemble(3, starts="own"), 0.3, 6), Phase(PolynomialAverage(), 0.2, 5)],
        [Phase(SGD(), 0.3, 3), Phase(WeightDecay(HeavyBall(0.4), 0.3), 0.2, 6)],
        [Phase(WeightDecay(SGD(), 0.3, "start"), 0.3, 4), Phase(WeightDecay(SGD(), 0.2), 0.2, 4)],
        [Phase(Lookahead(SGD(), 3), 0.3, 5), Phase(Lookahead(SGD(), 3), 0.1, 5)],
    ],
)  # fmt: skip
def test_diagonal_is_the_loss_of_each_iterate(problem, phases):
    """The solver's own loss after every step, through every way of handing over."""
    placed = problem.replace(minimum=[0.5, -1.0, 2.0])
    best = best_average(placed, phases)
    steps = sum(phase.steps for phase in phases)
    agree(np.diag(best.moment), nqm.solve(placed, phases, range(steps + 1)).loss, JUMP)
    values = np.linalg.eigvalsh(best.moment)
    assert values[0] > -1e-12 * values[-1]


def test_by_draws(problem):
    """Runs of late phases drawn literally: SGD, then two members from its end."""
    rng = np.random.default_rng(1)
    runs, lr, batch = 20_000, 0.4, 2
    h, v = problem.curvature, problem.noise_variance
    best = best_average(
        problem, [Phase(SGD(), lr, 6, batch), Phase(LatePhase(2, gamma=0.0), 0.2, 5, batch)]
    )
    x = problem.initial_mean + rng.normal(size=(runs, 3)) * np.sqrt(problem.initial_variance)
    average = best.weights[0] * x
    members = [x, x]
    for step in range(11):
        rate = lr if step < 6 else 0.2

        def moved(x, rate=rate):
            return x - rate * (h * x + rng.normal(size=(runs, 3)) * np.sqrt(v / batch))

        members = [moved(members[0])] * 2 if step < 6 else [moved(one) for one in members]
        average = average + best.weights[step + 1] * (members[0] + members[1]) / 2
    losses = 0.5 * average**2 @ h
    error = losses.std() / np.sqrt(runs)
    assert abs(losses.mean() - best.loss) < SIGMAS * error
    assert error < 0.02 * best.loss


def test_averages_in_use_are_no_better():
    problem = Problem(1.0 / np.arange(1, 31), 1.0 / np.arange(1, 31))
    best = best_average(problem, constant(SGD(), 0.5, 80, batch_size=4))
    for method in (SGD(), SWA(SGD()), EMA(SGD(), 0.9), PolynomialAverage(SGD(), 3.0)):
        loss = nqm.solve(problem, constant(method, 0.5, 80, batch_size=4), [80]).loss[0]
        assert best.loss < loss
    # A long run, in blocks, comes as near to the bound as any method can.
    long = best_average(problem, constant(SGD(), 0.5, 10**6, batch_size=4), blocks=100)
    assert long.bound < long.loss < 1.001 * long.bound


def test_ratios_by_an_independent_program():
    """Written in plain NumPy, all 501 iterates: bound 0.83, weights >= 0 1.04 of the best."""
    h = 1.0 / np.arange(1, 101)
    problem = nqm.condense(Problem(h, 0.01 * h))
    best = best_average(problem, constant(SGD(), 1.98, 500, batch_size=4), blocks=501)
    assert best.bound / best.loss == pytest.approx(0.83, abs=0.011)
    kept = best_average(problem, constant(SGD(), 1.98, 500, batch_size=4), nonnegative=True)
    assert kept.loss / best.loss == pytest.approx(1.04, abs=0.006)


def test_edge_cases(problem):
    nothing = best_average(problem, constant(SGD(), 0.1, 0))
    agree(nothing.weights, [1.0], IDENTITY)
    agree_each(nothing.loss, problem.initial_loss, IDENTITY)
    still = best_average(problem.replace(initial_mean=0.0, initial_variance=0.0),
                         constant(SGD(), 0.1, 5))  # fmt: skip
    assert still.loss == 0.0
    assert list(still.table().columns) == ["first", "last", "weight"]
    one = best_average(problem, constant(SGD(), 0.1, 50), blocks=1)
    assert len(one.weights) <= 3


def test_mistakes(problem):
    with pytest.raises(NQMError, match="linear"):
        best_average(problem, constant(MultiplicativeLatePhase(2), 0.1, 5))
    with pytest.raises(NQMError, match="diverges"):
        best_average(problem, constant(SGD(), 1e6, 5000))
    with pytest.raises(NQMError, match="blocks"):
        best_average(problem, constant(SGD(), 0.1, 5), blocks=0)
    with pytest.raises(NQMError, match="needs a Problem"):
        best_average(nqm.LeastSquares([1.0]), constant(SGD(), 0.1, 5))
    with pytest.raises(NQMError, match="must be in the first phase"):
        best_average(problem, [Phase(SGD(), 0.1, 2), Phase(Ensemble(2, starts="own"), 0.1, 2)])

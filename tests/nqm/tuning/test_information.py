"""What no method could reach: the posterior by brute force, by draws, and the roster against it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nqm
from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Ensemble,
    Federated,
    HeavyBall,
    LatePhase,
    LocalSGD,
    Lookahead,
    Nesterov,
    NQMError,
    Phase,
    PolynomialAverage,
    PrimalAverage,
    Problem,
    QuasiHyperbolicMomentum,
    Rounded,
    ScheduleFree,
    SignSGD,
    WeightDecay,
    best_average,
    information_bound,
    stability_edge,
)
from nqm.tuning import program_bound
from tests.tolerances import IDENTITY, JUMP, SIGMAS, agree, agree_each


def posterior(problem, batch_size, steps):
    """Bayes' rule one gradient at a time: 1 / s' = 1 / s + h^2 B / v."""
    s = problem.initial_variance.copy()
    for _ in range(steps):
        s = 1.0 / (1.0 / s + problem.curvature**2 * batch_size / problem.noise_variance)
    return float(0.5 * np.sum(problem.multiplicity * problem.curvature * s))


def test_bayes_rule_step_by_step(problem):
    counted = problem.replace(multiplicity=[1.0, 2.5, 7.0])
    for steps in (0, 1, 7):
        agree_each(information_bound(counted, 3, steps), posterior(counted, 3, steps), IDENTITY)
    table = information_bound(counted, [[1], [3]], [0, 7])
    assert table.shape == (2, 2)
    agree_each(table[1, 1], posterior(counted, 3, 7), IDENTITY)
    assert table[0, 0] == table[1, 0]


def test_the_estimate_that_reaches_it_by_draws():
    """Ridge regression on the gradients of a run of SGD, whose points do not matter."""
    rng = np.random.default_rng(3)
    h, v, s = np.array([1.0, 0.3, 0.05]), np.array([0.4, 2.0, 0.01]), np.array([1.0, 0.5, 3.0])
    steps, batch, runs = 12, 2, 40_000
    start = rng.normal(size=(runs, 3)) * np.sqrt(s)  # w - w*; the method knows w
    moved = np.zeros((runs, 3))
    told = np.zeros((runs, 3))
    for _ in range(steps):
        gradient = h * (start + moved) + rng.normal(size=(runs, 3)) * np.sqrt(v / batch)
        told += gradient - h * moved  # what it says about h times the start
        moved -= 0.4 * gradient
    guess = h * told / (h**2 * steps + v / batch / s)
    losses = 0.5 * ((start - guess) ** 2) @ h
    bound = information_bound(Problem(h, v, initial_variance=s), batch, steps)
    error = losses.std() / np.sqrt(runs)
    assert abs(losses.mean() - bound) < SIGMAS * error
    assert error < 0.01 * bound


@pytest.mark.parametrize("rank", [4, 2])
def test_correlated_noise_by_normal_equations(rank):
    """S - S H (H S H + C / n)^-1 H S, Gauss's posterior, also for noise of low rank."""
    rng = np.random.default_rng(5)
    h = np.array([1.0, 0.5, 0.2, 0.1])
    half = rng.normal(size=(4, rank))
    root = rng.normal(size=(4, 4))
    problem = Problem.from_matrices(np.diag(h), half @ half.T, initial_covariance=root @ root.T)
    n, start, seen = 6 * 2, root @ root.T, np.diag(h)
    gain = np.linalg.inv(seen @ start @ seen + half @ half.T / n)
    after = start - start @ seen @ gain @ seen @ start
    expected = 0.5 * np.trace(seen @ after)
    agree_each(information_bound(problem, 2, 6), expected, 1e-8)  # of the subtraction here
    # Methods that treat each direction on its own gain nothing from correlations.
    alone = problem.replace(noise_correlation=None, initial_correlation=None)
    linear = information_bound(problem, 2, 6, methods="linear")
    assert linear == information_bound(alone, 2, 6)
    assert linear > expected
    agree_each(information_bound(problem, 2, 0), problem.initial_loss, JUMP)


def test_limits(problem):
    exact = problem.replace(noise_variance=[0.0, 2.0, 0.0])
    only = 0.5 * 0.3 / (1 / 0.7 + 0.3**2 * 5 / 2.0)
    agree_each(information_bound(exact, 1, 5), only, IDENTITY)
    known = problem.replace(initial_variance=0.0)
    assert information_bound(known, 1, 5) == 0.0
    place = known.initial_mean**2
    agree_each(
        information_bound(known, 1, 5, methods="linear"),
        posterior(known.replace(initial_variance=place), 1, 5),
        IDENTITY,
    )
    flat = problem.replace(curvature=[1.0, 0.3, 0.0])
    assert information_bound(flat, 1, 5) < information_bound(problem, 1, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 5), "batch_size must be > 0"),
        ((1, -1), "steps must be >= 0"),
        ((1, "x"), "steps must hold numbers"),
        ((1, float("nan")), "steps must hold numbers"),
        (([1, 2], [1, 2, 3]), "must broadcast"),
    ],
)
def test_mistakes(problem, arguments, words):
    with pytest.raises(NQMError, match=words):
        information_bound(problem, *arguments)


def test_mistaken_problem(problem):
    with pytest.raises(NQMError, match="needs a Problem"):
        information_bound(nqm.LeastSquares([1.0]), 1, 1)
    with pytest.raises(NQMError, match="methods"):
        information_bound(problem, 1, 1, methods="all")


def test_programs_count_all_their_examples_and_starts(problem):
    phases = [Phase(SGD(), 0.2, 5, 2), Phase(LatePhase(3, gamma="mean"), 0.1, 4, 2)]
    agree(
        program_bound(problem, phases, [0, 5, 9]),
        [information_bound(problem, 1, n, methods="linear") for n in (0, 5 * 2, 5 * 2 + 4 * 3 * 2)],
        IDENTITY,
    )
    own = nqm.constant(Ensemble(4, starts="own"), 0.2, 3)
    told = problem.initial_mean**2 + problem.initial_variance / 4
    least = posterior(problem.replace(initial_mean=0.0, initial_variance=told), 1, 12)
    agree_each(program_bound(problem, own, [3]), [least], IDENTITY)
    # The best member of many starts is no method of one start: below the bound of one.
    far = problem.replace(initial_mean=0.0, noise_variance=1e6)
    many = nqm.solve(far, own, [0]).loss[0]
    assert program_bound(far, own, [0])[0] <= many * (1 + IDENTITY) < far.initial_loss / 3


def test_no_bound_for_methods_that_know_the_origin(problem):
    """Weight decay towards the minimum itself needs no gradient: it would beat any bound."""
    decayed = nqm.constant(WeightDecay(SGD(), 0.5), 0.4, 60)
    assert nqm.solve(problem.replace(noise_variance=1e3), decayed, [60]).bias[0] < 1e-6
    federated = nqm.constant(Federated(2, 3, curvatures=(1.5, 0.5)), 0.1, 5)
    for program in (decayed, federated, nqm.constant(SignSGD(), 0.1, 5)):
        assert np.isnan(program_bound(problem, program, [3, 5])).all()
    kept = nqm.constant(WeightDecay(SGD(), 0.5, "start"), 0.4, 60)
    assert np.isfinite(program_bound(problem, kept, [60])).all()


def test_columns_of_a_run_and_a_sweep():
    base = {
        "problem": {"curvature": [1.0, 0.1], "noise_variance": 0.5, "initial_mean": 0.3},
        "phase": [{"algorithm": "sgd", "lr": 0.2, "steps": 10, "batch_size": 2}],
        "record": {"at": [0, 10], "bound": True},
    }
    from nqm.runs import config

    table = config.build(base).table()
    problem = Problem([1.0, 0.1], 0.5, initial_mean=0.3)
    agree(table["bound"], information_bound(problem, 2, [0, 10], methods="linear"), IDENTITY)
    agree(table["regret"], table["loss"] - table["bound"], IDENTITY)
    assert table["regret"][0] == pytest.approx(0.0, abs=1e-15)
    cells = nqm.Sweep(base, {"phase.0.lr": [0.1, 0.2]}).run()
    agree(cells["bound"][2:], table["bound"], IDENTITY)
    with pytest.raises(NQMError, match=r"record\.bound"):
        nqm.Sweep(base, {"record.bound": [True, False]}).run()
    squares = {"inputs": "gaussian", "curvature": [1.0]}
    with pytest.raises(NQMError, match=r"record\.bound"):
        config.build(base | {"problem": squares})


# ------------------------------------------------------------------ the roster never beats it

METHODS = [
    SGD(),
    HeavyBall(0.8),
    Nesterov(0.9),
    QuasiHyperbolicMomentum(0.9, 0.7),
    EMA(SGD(), 0.9),
    SWA(HeavyBall(0.6), 2),
    LAWA(SGD(), 2, 3),
    PolynomialAverage(SGD(), 3.0),
    ScheduleFree(0.9),
    ScheduleFree(0.9, 10),
    PrimalAverage(0.95, 0.9),
    Lookahead(HeavyBall(0.5), 4, 0.5),
    LocalSGD(3, 4),
    Ensemble(3),
    Ensemble(3, starts="own"),
    LatePhase(4, gamma="mean"),
    LatePhase(3, "mean", 0.4, inner=HeavyBall(0.5), directions=(0,)),
    EMA(LatePhase(2, gamma="mean", spread=0.3), 0.8),
    WeightDecay(SGD(), 0.1, "start"),
    Rounded(SGD(), 0.1),
]


@st.composite
def cases(draw):
    """A problem of a few directions and a program of one or two phases, far below the edge."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d = int(rng.integers(1, 6))
    h = 10.0 ** rng.uniform(-3, 0, d)
    problem = Problem(
        h,
        10.0 ** rng.uniform(-4, 2, d),
        multiplicity=rng.uniform(0.5, 9.0, d),
        initial_mean=rng.choice([0.0, 1.0]) * rng.normal(size=d),
        initial_variance=rng.choice([0.0, 1.0], d, p=[0.2, 0.8]) * 10.0 ** rng.uniform(-2, 1, d),
    )
    phases = []
    for _ in range(draw(st.integers(1, 2))):
        algorithm = METHODS[draw(st.integers(0, len(METHODS) - 1))]
        if phases and "own" in getattr(algorithm, "starts", ""):
            algorithm = SGD()
        edge = min(stability_edge(problem, algorithm), 1e4)
        steps = int(10.0 ** rng.uniform(0, 2))
        phases.append(
            Phase(algorithm, edge * 10.0 ** rng.uniform(-2.5, 0), steps, rng.choice([1, 4]))
        )
    return problem, phases


def never_beaten(case):
    problem, phases = case
    last = sum(phase.steps for phase in phases)
    at = sorted({0, 1, last // 2, last})
    bounds = program_bound(problem, phases, at)
    losses = nqm.solve(problem, phases, at).loss
    assert np.all(losses >= bounds * (1 - JUMP))


@given(cases())
@settings(max_examples=60)
def test_no_method_beats_the_bound(case):
    never_beaten(case)


@pytest.mark.slow
@given(cases())
@settings(max_examples=1000)
def test_no_method_beats_the_bound_on_a_thousand_problems(case):
    never_beaten(case)


@given(cases())
@settings(max_examples=15)
def test_the_best_average_lies_between(case):
    problem, phases = case
    best = best_average(problem, phases, blocks=60)
    kept = best_average(problem, phases, blocks=60, nonnegative=True)
    assert best.bound * (1 - JUMP) <= best.loss <= kept.loss * (1 + JUMP)
    assert best.weights.sum() == pytest.approx(1.0)
    assert (kept.weights >= 0).all()
    # The last block may hold several iterates, whose mean is not the last.
    if best.first[-1] == best.last[-1]:
        assert kept.loss <= best.last_loss * (1 + JUMP)

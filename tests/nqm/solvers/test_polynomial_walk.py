"""Steps as polynomials in rates and curvature: against exact fractions, and matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nqm import (
    EMA,
    SGD,
    HeavyBall,
    LatePhase,
    Lookahead,
    MultiplicativeLatePhase,
    Phase,
    Problem,
    Program,
    ScheduleFree,
    solve,
)
from nqm.algorithms import Optimizer
from nqm.schedule import Cosine
from nqm.solvers import moments
from nqm.solvers._kernels import polynomial_steps
from nqm.solvers.polynomial_walk import Layout
from nqm.step_polynomial import step_polynomial, step_table, ties
from nqm.transition import extract, noise_moment
from tests.nqm.test_contract import CASES
from tests.tolerances import IDENTITY, agree, agree_each

COSINE = Cosine(0.5, 0.05, 12)


def mixed(directions: int) -> Problem:
    """Curvatures and noise without a common factor, and a start with mean and variance."""
    h = np.geomspace(1.0, 1e-3, directions)
    return Problem(h, 0.3 * h + 0.1, initial_mean=0.5 + h, initial_variance=0.7)


@pytest.fixture
def matrix_by_matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Solve with matrices that are extracted for every step."""

    def solved(*args: Any, **more: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("nqm.solvers.moments.walk", lambda *a, **k: None)
            return solve(*args, **more)

    return solved


def fractions_of_late_phase(
    h: float, v: float, mean: float, variance: float, settings: Any, members: int, momentum: float
) -> list[Fraction]:
    """E w^2 of the mean model of late-phase heavy ball, gamma = 1 / K, in exact arithmetic.

    The literal state (theta, b, phi_1, b_1, ..., phi_K, b_K) and its second moments are moved by
    the equations of the paper, each member with a minibatch of its own.
    """
    h, v, mu = Fraction(h), Fraction(v), Fraction(momentum)
    n, share = 2 * members + 2, Fraction(1, members)
    moment = [[Fraction(0)] * n for _ in range(n)]
    moment[0][0] = Fraction(mean) ** 2 + Fraction(variance)
    readout = [Fraction(1), Fraction(0)] + [share, Fraction(0)] * members
    seen = []
    for lr, member_lr, batch in ([Fraction(float(x)) for x in row] for row in settings):
        rows = [[Fraction(0)] * (n + members) for _ in range(n)]  # of the state and of each noise
        rows[1][1] = mu
        for k in range(members):
            phi, b, noise = 2 * k + 2, 2 * k + 3, n + k
            rows[b][b] = mu
            for buffer, scale in ((1, share), (b, Fraction(1))):
                rows[buffer][0] += scale * h
                rows[buffer][phi] += scale * h
                rows[buffer][noise] += scale
        for place, rate in [(0, lr)] + [(2 * k + 2, member_lr) for k in range(members)]:
            rows[place] = [-rate * x for x in rows[place + 1]]
            rows[place][place] += 1
        half = [
            [sum(row[k] * moment[k][c] for k in range(n) if row[k]) for c in range(n)]
            for row in rows
        ]
        moment = [
            [
                sum(half[r][k] * rows[c][k] for k in range(n) if rows[c][k])
                + v / batch * sum(rows[r][k] * rows[c][k] for k in range(n, n + members))
                for c in range(n)
            ]
            for r in range(n)
        ]
        square = sum(readout[r] * readout[c] * moment[r][c] for r in range(n) for c in range(n))
        seen.append(Fraction(square))
    return seen


def test_a_scheduled_late_phase_is_exact_fractions_step_by_step():
    problem = Problem([1.0, 0.3], [0.5, 1.0], initial_mean=[1.0, -0.5], initial_variance=[0.2, 1.0])
    late = LatePhase(2, gamma="mean", inner=HeavyBall(0.75))
    phase = Phase(late, COSINE, 12, 4, member_lr=0.03)
    expected = np.zeros(12)
    for i in range(2):
        squares = fractions_of_late_phase(
            problem.curvature[i],
            problem.noise_variance[i],
            problem.initial_mean[i],
            problem.initial_variance[i],
            phase.settings(0, 12),
            members=2,
            momentum=0.75,
        )
        expected += [float(problem.weight[i] * Fraction(s)) for s in squares]
    every = solve(problem, phase, range(1, 13))
    agree_each(every.loss, expected, IDENTITY)
    agree_each(solve(problem, phase, [5, 12]).loss, expected[[4, 11]], IDENTITY)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_method_is_walked_as_matrix_by_matrix(case, matrix_by_matrix):
    """Both parts of the loss, the members', the spread of the loss and the weights themselves."""
    member_lr = case.member_lr
    schedule = Cosine(case.lr, 0.1 * case.lr, 12)
    first = Phase(SGD(), schedule, 4, 2)
    phase = Phase(case.algorithm, schedule, 12, 3, member_lr=member_lr)
    alone = any("own" in str(vars(part)) for part in _inside(case.algorithm))
    program = Program((phase,) if alone else (first, phase))
    at = [0, 1, 3, 7, program.steps]
    ours, plain = solve(mixed(5), program, at), matrix_by_matrix(mixed(5), program, at)
    for name in ("loss", "bias", "variance", "member_loss", "loss_sd", "weight_mean",
                 "weight_variance"):  # fmt: skip
        agree(getattr(ours, name), getattr(plain, name), IDENTITY)


def _inside(algorithm: Any) -> list[Any]:
    parts = [algorithm]
    while hasattr(parts[-1], "inner"):
        parts.append(parts[-1].inner)
    return parts


def test_only_few_methods_are_no_polynomials():
    modes = [(c.name, m.algorithm) for c in CASES for m in c.algorithm.modes()]
    left = {name for name, chain in modes if step_polynomial(chain, np.array([0])) is None}
    assert len(left) < 0.1 * len(modes), left


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_polynomials_are_the_extracted_matrices(case):
    h, lr, member_lr = np.array([0.0, 0.3, 2.0]), 0.7, 0.2
    for mode in case.algorithm.modes():
        chain = mode.algorithm
        for t in {0, chain.time.period - 1}:
            polynomial = step_polynomial(chain, np.array([t]))
            if polynomial is None:
                continue
            n = len(chain.coordinates)
            table = step_table(polynomial, np.array([0]), np.array([[[lr, member_lr]]]), n)
            matrix = np.zeros((3, n, n))
            powers = h[:, None] ** np.arange(table.matrix.shape[2])
            matrix[:, polynomial.row, polynomial.column] = powers @ table.matrix[0, 0]
            noise = np.zeros((n, n))
            added = table.drive[0, 0] * 1.7 + table.own[0, 0]
            for (i, j), value in zip(table.driven, added, strict=True):
                noise[i, j] = noise[j, i] = value
            rates = (lr, member_lr) if chain.rate_count == 2 else lr
            step = extract(chain, h, rates, t)
            agree(matrix, step.matrix, IDENTITY)
            agree(noise, noise_moment(step, np.full(3, 1.7))[0], IDENTITY)


@pytest.mark.parametrize("directions", [1, polynomial_steps.WIDE, polynomial_steps.WIDE + 1, 300])
def test_blocks_do_not_matter(directions):
    """The loss of many directions is the sum of their losses one by one."""
    problem = mixed(directions)
    phase = Phase(EMA(HeavyBall(0.5), 0.9), COSINE, 12, 3)
    whole = solve(problem, phase, [6, 12])
    alone = np.zeros(2)
    for i in range(directions):
        one = slice(i, i + 1)
        part = replace(
            problem,
            curvature=problem.curvature[one],
            noise_variance=problem.noise_variance[one],
            multiplicity=problem.multiplicity[one],
            initial_mean=problem.initial_mean[one],
            initial_variance=problem.initial_variance[one],
            minimum=problem.minimum[one],
        )
        alone += solve(part, phase, [6, 12]).loss
    agree_each(whole.loss, alone, IDENTITY)
    assert whole.weight_mean.shape == (2, directions)


@pytest.mark.parametrize("chosen", [(0, 2), 0.5])
def test_members_in_some_directions(chosen, matrix_by_matrix):
    phase = Phase(LatePhase(3, directions=chosen), COSINE, 12, 2, member_lr=0.1)
    ours, plain = solve(mixed(5), phase, [3, 12]), matrix_by_matrix(mixed(5), phase, [3, 12])
    for name in ("loss", "member_loss", "loss_sd", "weight_variance"):
        agree_each(getattr(ours, name), getattr(plain, name), IDENTITY)


@pytest.mark.parametrize("minimum", [2.0, [1.0, 2.0, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_rates_that_differ_by_direction(minimum, matrix_by_matrix):
    """The first order of multiplicative weights has rates in proportion to the minimum squared."""
    problem = replace(mixed(5), minimum=minimum)
    phase = Phase(MultiplicativeLatePhase(3, gamma="mean"), COSINE, 12, 2, member_lr=0.02)
    ours, plain = solve(problem, phase, [3, 12]), matrix_by_matrix(problem, phase, [3, 12])
    agree_each(ours.loss, plain.loss, IDENTITY)
    agree_each(ours.member_loss, plain.member_loss, IDENTITY)


@pytest.mark.parametrize(("directions", "programs"), [(3, 1), (3, 50), (128, 2), (200, 3)])
def test_every_direction_has_one_lane_and_one_part(directions, programs):
    """Runs of lanes in order, none in two blocks, with the factors of their directions."""
    scales = np.ones(directions), np.arange(directions) % 3.0
    for factors in (None, scales):
        layout = Layout.of(factors, directions, programs)
        owner = np.full((2, layout.blocks * polynomial_steps.WIDE), -1)
        for block, first, last, group, program in layout.part.tolist():
            assert 0 <= first < last <= polynomial_steps.WIDE
            lanes = block * polynomial_steps.WIDE + np.arange(first, last)
            assert (owner[:, lanes] == -1).all()
            owner[:, lanes] = [[program], [group - program * len(layout.factors)]]
        assert (np.diff(layout.part[:, 0]) >= 0).all()
        program, group = owner[:, layout.lane]
        assert np.unique(layout.lane).size == directions * programs == (owner[0] >= 0).sum()
        assert program.tolist() == np.repeat(np.arange(programs), directions).tolist()
        stated = np.ones((directions, 2)) if factors is None else np.stack(scales, axis=1)
        agree(layout.factors[group], np.tile(stated, (programs, 1)), 0.0)


@pytest.mark.parametrize("inner", [SGD(), HeavyBall(0.6), EMA(HeavyBall(0.5), 0.9)])
def test_a_start_that_is_carried_as_a_vector_is_the_matrix(inner):
    """Also in a second phase, whose start is one random number again, and between two chunks."""
    problem = mixed(5)
    phases = [Phase(inner, COSINE, 12, 3), Phase(HeavyBall(0.3), COSINE, 9, 3)]
    roots = [state.root for state in moments.at_start(inner, problem)]
    assert roots[0].shape == (5, len(inner.coordinates))

    def without(*given):
        return [replace(state, root=None) for state in begin(*given)]

    begin = moments.begin
    for at in ([12, 21], [5, 9, 21]):
        whole = solve(problem, phases, at)
        with mock.patch.object(moments, "begin", without):
            plain = solve(problem, phases, at)
        with mock.patch.object(moments, "TABLE", 5 * len(inner.coordinates) ** 2):
            cut = solve(problem, phases, at)
        for name in ("loss", "bias", "variance", "loss_sd", "weight_variance"):
            agree_each(getattr(whole, name), getattr(plain, name), IDENTITY)
            assert getattr(whole, name).tolist() == getattr(cut, name).tolist()


@dataclass(frozen=True)
class _Normalised(Optimizer):
    """A direction scaled by its rate in ways that are no polynomial."""

    way: str

    def direction(self, buffers, g):
        return g, ()

    def update(self, state, gradient, lr, t):
        if self.way == "quotient":
            return (state[0] - lr / (1.0 + lr) * gradient(state[0]),)
        if self.way == "decision":
            return (state[0] - np.where(lr > 0.1, lr, 0.1) * gradient(state[0]),)
        if self.way == "equality":
            return (state[0] - np.where(lr == 0.5, 2.0 * lr, lr) * gradient(state[0]),)
        if self.way == "function":
            return (state[0] - np.sqrt(lr) * gradient(state[0]),)
        return (state[0] - lr * lr * lr * gradient(state[0]),)


@pytest.mark.parametrize("way", ["quotient", "decision", "equality", "function", "degree"])
def test_what_is_no_polynomial_is_walked_all_the_same(way):
    algorithm = _Normalised(way)
    assert step_polynomial(algorithm, np.array([0])) is None
    problem = Problem([1.0], [0.5], initial_mean=1.0, initial_variance=0.0)
    phase = Phase(algorithm, COSINE, 12, 1)
    effective = {
        "quotient": lambda lr: lr / (1 + lr),
        "decision": lambda lr: max(lr, 0.1),
        "equality": lambda lr: 2 * lr if lr == 0.5 else lr,
        "function": np.sqrt,
        "degree": lambda lr: lr**3,
    }[way]
    square = 1.0
    for lr in phase.settings(0, 12)[:, 0]:
        rate = effective(lr)
        square = (1 - rate) ** 2 * square + rate**2 * 0.5
    agree_each(solve(problem, phase, [12]).loss, [0.5 * square], IDENTITY)


def test_steps_that_never_repeat_and_long_walks_in_pieces(monkeypatch, matrix_by_matrix):
    phase = Phase(ScheduleFree(0.9), COSINE, 40, 2)
    plain = matrix_by_matrix(mixed(3), phase, [1, 17, 40])
    monkeypatch.setattr("nqm.solvers.moments.TABLE", 28)  # seven steps of two coordinates
    told: list[int] = []
    monkeypatch.setattr("nqm.solvers.moments.WALKED", 60)
    ours = solve(mixed(3), phase, [1, 17, 40], progress=told.append)
    agree_each(ours.loss, plain.loss, IDENTITY)
    assert sum(told) == 40
    assert len(told) > 3


def test_a_method_with_a_period_under_a_schedule(matrix_by_matrix):
    phase = Phase(Lookahead(HeavyBall(0.5), 3, 0.4), COSINE, 12, 2)
    ours, plain = solve(mixed(4), phase, range(13)), matrix_by_matrix(mixed(4), phase, range(13))
    agree_each(ours.loss, plain.loss, IDENTITY)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_covariances_are_products_of_matrices(n):
    """Of quadratic polynomials, in any number of lanes; the lanes beside them stay."""
    rng = np.random.default_rng(n)
    wide, count, pairs = polynomial_steps.WIDE, 37, n * (n + 1) // 2
    h, v = rng.uniform(size=(2, wide))
    table = rng.normal(size=(1, 1, 3, n * n))
    a = np.einsum("pe,pi->ie", table[0, 0], h ** np.arange(3)[:, None]).reshape(wide, n, n)
    root = rng.normal(size=(wide, n, n))
    covariance, (i, j) = root @ root.swapaxes(1, 2), np.tril_indices(n)
    packed, mean = np.ascontiguousarray(covariance[:, i, j].T), rng.normal(size=(n, wide))
    noise = rng.normal(size=2 * pairs)
    given = np.concatenate([h, v])
    moved, carried = packed.copy(), mean.copy()
    matrix, vector = (getattr(polynomial_steps, f"_{name}{n}") for name in ("matrix", "vector"))
    matrix(table, 0, 0, given, moved.reshape(-1), count, tuple(noise))
    vector(table, 0, 0, given, carried.reshape(-1), count)
    expected = (a @ covariance @ a.swapaxes(1, 2))[:, i, j].T
    expected += noise[:pairs, None] * v + noise[pairs:, None]
    agree(moved[:, :count], expected[:, :count], IDENTITY)
    agree(carried[:, :count], np.einsum("irc,ci->ri", a, mean)[:, :count], IDENTITY)
    assert (moved[:, count:] == packed[:, count:]).all()
    assert (carried[:, count:] == mean[:, count:]).all()


@pytest.mark.parametrize("gamma", ["mean", "sum", 0.3])
def test_the_base_and_the_members_have_one_momentum(gamma):
    """Both begin at 0 and see one gradient, times gamma K and times 1."""
    late = LatePhase(3, gamma=gamma, inner=HeavyBall(0.7))
    mean, deviation = (mode.algorithm for mode in late.modes())
    found = ties(mean, (1, 2))
    assert found.kept.size == 2
    ratio = late.base_scale * 3
    agree(found.factor[1] / found.factor[2], ratio, IDENTITY)
    assert ties(deviation, (1,)).kept.tolist() == [0, 1]
    assert ties(mean, (2,)).kept.tolist() == [0, 1, 2]


def test_momentum_that_is_kept_from_the_phase_before_is_not_tied(matrix_by_matrix):
    """The base goes on with a momentum and the members' begins at 0; a later phase has neither."""
    late = LatePhase(3, gamma="mean", inner=HeavyBall(0.5))
    first, last = Phase(HeavyBall(0.5), COSINE, 5, 2), Phase(late, COSINE, 6, 2, member_lr=0.1)
    other = replace(last, algorithm=replace(late, gamma=2.0))
    for phases in ([first, last], [last, other], [last, last]):
        steps = sum(phase.steps for phase in phases)
        ours, plain = (
            solve(mixed(4), phases, [7, steps]),
            matrix_by_matrix(mixed(4), phases, [7, steps]),
        )
        for name in ("loss", "member_loss", "loss_sd", "weight_mean", "weight_variance"):
            agree(getattr(ours, name), getattr(plain, name), IDENTITY)
    states = moments.at_start(late, mixed(4))
    assert [state.still for state in states] == [(1, 2), (0, 1)]
    law = moments.law_of(last, mixed(4))
    kept, _ = moments.hand_over(mixed(4), states, law, moments.law_of(other, mixed(4)), 6)
    assert [state.still for state in kept] == [(), ()]
    same, _ = moments.hand_over(mixed(4), states, law, law, 6)
    assert [state.still for state in same] == [(1, 2), (0, 1)]

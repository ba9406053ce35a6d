"""Soups, snapshots and stars: closed forms, and greedy choice by a noisy validation set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

import nqm
from nqm import (
    SGD,
    SWA,
    Cyclic,
    Ensemble,
    HeavyBall,
    LatePhase,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Problem,
    Program,
    Soup,
    WeightDecay,
    constant,
)
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, half_digit, within_error

RATES, STEPS = (0.05, 0.2, 0.5, 0.2), (10, 10, 20, 40)


def runs():
    return [constant(SGD(), lr, t, batch_size=2) for lr, t in zip(RATES, STEPS, strict=True)]


@pytest.fixture
def soup(problem):
    return Soup.of_runs(problem, runs())


def moment_of(problem):
    """M_ij = sum h/2 (a_i a_j s_0 + [i = j] v_i) with a_i = (1 - lr_i h)^T_i."""
    h, s0 = problem.curvature, problem.initial_mean**2 + problem.initial_variance
    gain = np.array([(1 - lr * h) ** t for lr, t in zip(RATES, STEPS, strict=True)])
    noise = np.array([
        literal.sgd_moment(h, problem.noise_variance, lr, 2, 0.0, t)
        for lr, t in zip(RATES, STEPS, strict=True)
    ])  # fmt: skip
    return np.einsum("d,id,jd->ij", 0.5 * h * s0, gain, gain) + np.diag(noise @ (0.5 * h))


def test_moments_of_runs(soup, problem):
    agree(soup.moment, moment_of(problem), IDENTITY)
    for i, program in enumerate(runs()):
        alone = nqm.solve(problem, program, [program.steps]).loss[0]
        agree_each(soup.loss(np.eye(4)[i]), alone, IDENTITY)


def test_equal_runs_are_an_ensemble(problem):
    algorithm = HeavyBall(0.6)
    soup = Soup.of_runs(problem, [constant(algorithm, 0.2, 30)] * 5)
    ensemble = nqm.solve(problem, constant(Ensemble(5, algorithm), 0.2, 30), [30])
    agree_each(soup.loss(soup.uniform()), ensemble.loss[0], IDENTITY)
    agree_each(np.diag(soup.moment), np.full(5, ensemble.member_loss[0]), IDENTITY)
    # Exchangeable ingredients: nothing beats the plain mean.
    agree_each(soup.optimal(), soup.uniform(), JUMP)


def test_optimal_weights_against_a_numerical_search(soup):
    moment = soup.moment
    free = minimize(
        lambda w: w @ moment @ w, soup.uniform(), jac=lambda w: 2 * moment @ w, method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-15},
    )  # fmt: skip
    best = soup.optimal()
    assert best.sum() == pytest.approx(1.0, abs=1e-14)
    agree(best, free.x, 1e-5)  # of the search
    assert soup.loss(best) <= free.fun * (1 + IDENTITY)
    agree_each(soup.loss(best), 1 / np.linalg.inv(moment).sum(), JUMP)
    kept = minimize(
        lambda w: w @ moment @ w, soup.uniform(), jac=lambda w: 2 * moment @ w, method="SLSQP",
        bounds=[(0, 1)] * 4, options={"ftol": 1e-15},
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    nonnegative = soup.optimal(nonnegative=True)
    assert nonnegative.min() == 0.0 > best.min()  # the constraint is at work
    agree(nonnegative, kept.x, 1e-5)
    order = [soup.loss(w) for w in (best, nonnegative, soup.greedy(), soup.uniform())]
    assert order == sorted(order)


def test_inverse_variance_weights(problem):
    """Ingredients without a common start: w_i ~ 1 / L_i."""
    settled = problem.replace(initial_mean=0.0, initial_variance=0.0)
    soup = Soup.of_runs(settled, runs())
    inverse = 1 / np.diag(soup.moment)
    agree_each(soup.optimal(), inverse / inverse.sum(), JUMP)
    agree_each(soup.optimal(nonnegative=True), inverse / inverse.sum(), JUMP)


def test_runs_that_are_pulled_to_a_place(problem):
    """A soup of L2 runs has a mean of its own; against the literal simulation."""
    placed = problem.replace(minimum=[1.0, -2.0, 0.5])
    programs = [
        constant(WeightDecay(SGD(), 0.2), 0.3, 8), constant(HeavyBall(0.5), 0.1, 12),
        constant(LatePhase(2, spread=0.3, gamma="mean"), 0.2, 5),
    ]  # fmt: skip
    soup = Soup.of_runs(placed, programs)
    weights = np.array([0.5, 0.2, 0.3])
    rng, replicas = np.random.default_rng(5), 20_000
    sd = np.sqrt(placed.initial_variance)
    start = placed.initial_mean + sd * rng.standard_normal((replicas, 3))
    problem_of = placed.curvature, placed.noise_variance, start
    ends = [
        literal.weight_decay(*problem_of, 0.3, 1, 8, rng, decay=0.2, anchor=-placed.minimum)[-1],
        literal.heavy_ball(*problem_of, 0.1, 1, 12, rng, momentum=0.5)[-1],
        literal.late_phase(
            *problem_of, 0.2, 1, 5, rng, members=2, member_lr=0.2, gamma=0.5, spread=0.3
        )[0][-1],
    ]
    losses = np.tensordot(weights, ends, 1) ** 2 @ placed.weight
    within_error(losses.mean(), soup.loss(weights), losses.std() / np.sqrt(replicas))


# ------------------------------------------------------------------ snapshots and stars


def sse(v, a, m):
    """Variance of the mean of m snapshots of an AR(1) chain."""
    return v / m**2 * (m + 2 * sum((m - d) * a**d for d in range(1, m)))


def star(v, a, m):
    """The same for m - 1 branches of the first."""
    return v / m**2 * (m + 2 * (m - 1) * a + (m - 1) * (m - 2) * a**2)


@pytest.mark.parametrize("members", [1, 2, 3, 5, 9])
def test_snapshots_and_stars_of_a_stationary_cycle(members, problem):
    """At stationarity: variances V/M^2 [M + 2 sum (M - d) a^d], V/M^2 [M + 2(M-1)a + ...a^2]."""
    cycle = Program((Phase(SGD(), Cyclic(0.5, 0.05, 6), 6, 2),))
    h = problem.curvature
    lrs = cycle.phases[0].settings(0, 6)[:, 0]
    a = np.prod(1 - np.outer(lrs, h), axis=0)
    q = literal.sgd_moment_sequence(h, problem.noise_variance, lrs, np.full(6, 2), 0.0)
    v = q / (1 - a**2)
    settled = problem.replace(initial_mean=0.0, initial_variance=v)
    for soup, form in (
        (Soup.of_snapshots(settled, cycle, members), sse),
        (Soup.of_star(settled, cycle, members), star),
    ):
        agree_each(soup.loss(soup.uniform()), 0.5 * h @ form(v, a, members), IDENTITY)


@pytest.mark.parametrize(("a", "ratio"), [(0.73, "1.067"), (0.57, "1.080"), (0.36, "1.062")])
def test_five_snapshots_beat_a_star(a, ratio):
    """Worked example at h = 0.3, M = 5; equal up to M = 3."""
    h = 0.3
    lr = (1 - a) / h
    settled = Problem([h], [1.0], initial_variance=lr**2 / (1 - a**2))
    cycle = constant(SGD(), lr, 1)

    def compared(members):
        soups = Soup.of_star(settled, cycle, members), Soup.of_snapshots(settled, cycle, members)
        star, sse = (soup.loss(soup.uniform()) for soup in soups)
        return star / sse

    # a itself is printed to two digits, which moves the ratio by up to 0.0006.
    assert compared(5) == pytest.approx(float(ratio), abs=half_digit(ratio) + 6e-4)
    agree_each([compared(m) for m in (1, 2, 3)], [1, 1, 1], IDENTITY)


def test_snapshots_are_swa_over_cycles(problem):
    """Plain SGD has nothing to restart: the same mean through `solve`, optimum weights included."""
    cycle = Program((Phase(SGD(), Cyclic(0.5, 0.05, 6), 6, 2),))
    soup = Soup.of_snapshots(problem, cycle, 4)
    whole = Program((Phase(SWA(SGD(), 6), Cyclic(0.5, 0.05, 6), 24, 2),))
    agree_each(soup.loss(soup.uniform()), nqm.solve(problem, whole, [24]).loss[0], IDENTITY)


def test_branches_with_cycles_of_their_own(problem):
    """x_1 = a x_0 + e_1, x_k = b x_1 + e_k, written out."""
    first, branch = constant(SGD(), 0.1, 7), constant(SGD(), 0.4, 3)
    soup = Soup.of_star(problem, first, 3, branch)
    h, v = problem.curvature, problem.noise_variance
    s0 = problem.initial_mean**2 + problem.initial_variance
    b = (1 - 0.4 * h) ** 3
    s1 = literal.sgd_moment(h, v, 0.1, 1, s0, 7)
    s2 = literal.sgd_moment(h, v, 0.4, 1, s1, 3)
    per_pair = [[s1, b * s1, b * s1], [b * s1, s2, b**2 * s1], [b * s1, b**2 * s1, s2]]
    agree(soup.moment, np.array(per_pair) @ (0.5 * h), IDENTITY)


# ------------------------------------------------------------------ greedy


def test_greedy_by_hand(soup, problem):
    moment = moment_of(problem)
    order = sorted(range(4), key=lambda i: moment[i, i])
    kept, best = [], np.inf
    for i in order:
        tried = [*kept, i]
        loss = sum(moment[j, k] for j in tried for k in tried) / len(tried) ** 2
        if loss < best:
            kept, best = tried, loss
    expected = np.where(np.isin(np.arange(4), kept), 1 / len(kept), 0.0)
    assert soup.greedy().tolist() == expected.tolist()
    assert 1 < len(kept) < 4  # neither a single model nor all of them


def test_greedy_by_the_true_loss_never_loses(soup):
    found = soup.sample_greedy(np.inf, replicas=300, seed=1)
    assert np.all(found.loss <= found.single_loss)
    assert np.all((found.size >= 1) & (found.size <= 4))


def test_greedy_on_no_information_is_a_random_pick(problem):
    """A validation loss of pure noise: the first ingredient is the one of least e'x."""
    settled = problem.replace(initial_mean=0.0, initial_variance=0.0)
    soup = Soup.of_runs(settled, [runs()[1]] * 2)
    found = soup.sample_greedy(1e-12, replicas=4000, seed=2)
    # The mean of two has e'x between theirs, so it never looks better than the best alone.
    assert np.all(found.size == 1)
    np.testing.assert_array_equal(found.loss, found.single_loss)
    # min e'x prefers the larger |x|: such a choice is worse than none.
    assert found.loss.mean() > soup.moment[0, 0]


def test_more_validation_data_choose_better(soup):
    losses = [
        soup.sample_greedy(n, replicas=2000, seed=3).loss.mean() for n in (3.0, 300.0, np.inf)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_one_ingredient_by_monte_carlo(problem):
    """With a single ingredient nothing is chosen: the mean loss is exact."""
    soup = Soup.of_runs(problem, runs()[1:2])
    found = soup.sample_greedy(10.0, replicas=4000, seed=4)
    exact = nqm.solve(problem, runs()[1], [10])
    within_error(found.loss.mean(), exact.loss[0], exact.loss_sd[0] / np.sqrt(4000))


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Soup.of_runs(p, []), "at least one program"),
        (lambda p: Soup.of_runs(p, [constant(SGD(), 5.0, 5000)]), "ingredient diverges"),
        (lambda p: Soup.of_runs(p, [constant(Ensemble(2, starts="own"), 0.1, 5)]), "share their"),
        (lambda p: Soup.of_runs(p, [constant(MultiplicativeLatePhase(2), 0.1, 5)]), "linear"),
        (lambda p: Soup.of_snapshots(p, constant(SGD(), 0.1, 5), 0), r"Soup\.members"),
        (lambda p: Soup.of_star(p, constant(SGD(), 0.1, 5), 0), r"Soup\.members"),
        (lambda p: Soup.of_runs(p, runs()).loss([1.0]), r"shape \(4,\); got \(1,\)"),
        (lambda p: Soup.of_runs(p.replace(noise_variance=0.0), runs()[1:2] * 2).optimal(),
         "linearly dependent"),
        (lambda p: Soup.of_runs(p, runs()).sample_greedy(0.0), "validation_size"),
        (lambda p: Soup.of_runs(p.replace(multiplicity=2.0), runs()).sample_greedy(5), "expanded"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, words, problem):
    with pytest.raises(NQMError, match=words):
        make(problem)

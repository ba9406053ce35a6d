"""One-pass least squares: exact moments against drawn inputs, matrix recursions, closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import block_diag
from scipy.optimize import brentq
from scipy.special import gamma, gammainc

import nqm
from figures import scaling
from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Cyclic,
    Ensemble,
    Federated,
    HeavyBall,
    LatePhase,
    LocalSGD,
    Lookahead,
    MultiplicativeLatePhase,
    Nesterov,
    NQMError,
    Phase,
    Piecewise,
    PolynomialAverage,
    Problem,
    Program,
    Rounded,
    ScheduleFree,
    Status,
    WarmupStableDecay,
    WeightDecay,
)
from nqm.problems.least_squares import LeastSquares, power_law
from nqm.problems.random_features import random_features
from nqm.solvers.least_squares.moments import solve, steady
from nqm.solvers.least_squares.sample import sample
from nqm.tuning.stability_least_squares import stability_edge
from paper_repro import scaling as study
from paper_repro.study import Scale
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, within_error

PROBLEM = LeastSquares(
    [1.0, 0.5, 0.1], 0.5, [1.0, -1.0, 2.0], 0.2, minimum=[1.0, 2.0, -1.0]
)  # three directions that differ in everything


def one(algorithm: Any, lr: Any = 0.15, steps: int = 30, batch: Any = 2, **more: Any) -> Program:
    return Program((Phase(algorithm, lr, steps, batch, **more),))


PROGRAMS = {
    "sgd": one(SGD()),
    "heavy ball": one(HeavyBall(0.6)),
    "nesterov": one(Nesterov(0.6)),
    "ema": one(EMA(SGD(), 0.8)),
    "swa": one(SWA()),
    "lawa": one(LAWA(HeavyBall(0.5), every=2, window=3)),
    "lookahead": one(Lookahead(HeavyBall(0.5))),
    "polynomial": one(PolynomialAverage()),
    "schedule-free": one(ScheduleFree()),
    "weight decay": one(WeightDecay(SGD(), 0.3)),
    "rounded": one(Rounded(SGD(), 0.3)),
    "ensemble": one(Ensemble(3, starts="own")),
    "ensemble of heavy balls": one(Ensemble(3, HeavyBall(0.5))),
    "local": one(LocalSGD(3, 4)),
    "late": one(LatePhase(3, spread=0.3, gamma="mean")),
    "late, shared minibatch": one(LatePhase(3, spread=2.0, minibatch="shared", gamma="mean")),
    "late, half of it shared": one(LatePhase(3, spread=2.0, minibatch=0.5, gamma="mean")),
    "late, one direction": one(LatePhase(3, directions=(0,), spread=1.0, gamma="mean")),
    "late, two rates": one(LatePhase(2, 1.0, inner=HeavyBall(0.5)), lr=0.08, member_lr=0.2),
    "phases": Program(
        (
            Phase(HeavyBall(0.6), 0.1, 12, 2),
            Phase(LatePhase(3, inner=HeavyBall(0.6), spread=0.2, gamma="mean"), 0.08, 12),
            Phase(SWA(), WarmupStableDecay(0.2, 0.01, 3, 5, 8), 16, Piecewise((1, 4), (7,))),
        )
    ),
    "decay after a phase": Program(
        (Phase(SGD(), 0.1, 15), Phase(WeightDecay(SGD(), 0.3), 0.2, 15))
    ),
}


# ------------------------------------------------------------------ independent computations


@pytest.mark.parametrize("name", PROGRAMS)
def test_moments_are_those_of_drawn_inputs_and_labels(name):
    program = PROGRAMS[name]
    at = [0, 1, program.steps // 2, program.steps]
    exact = solve(PROBLEM, program, at)
    drawn = sample(PROBLEM, program, at, replicas=10_000, seed=7)
    within_error(drawn.loss, exact.loss, drawn.stderr)
    within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)
    np.testing.assert_array_equal(drawn.examples, exact.examples)


def matrices(
    momentum: float, lr: float, batch: float, steps: int, labels: float, start: Any
) -> Any:
    """E L of heavy ball by the full second moment of (u, b), E u u' with all its cross terms.

    By Wick's theorem a minibatch's gradient noise has covariance
    (H S H + H tr(H S) + s2 H) / B with S = E u u'.
    """
    h = np.diag(PROBLEM.curvature)
    eye, d = np.eye(len(h)), len(h)
    step = np.block([[eye - lr * h, -lr * momentum * eye], [h, momentum * eye]])
    enter = np.vstack([-lr * eye, eye])
    second = block_diag(start, np.zeros((d, d)))
    for _ in range(steps):
        s = second[:d, :d]
        noise = (h @ s @ h + h * np.trace(h @ s) + labels * h) / batch
        second = step @ second @ step.T + enter @ noise @ enter.T
    return 0.5 * np.trace(h @ second[:d, :d])


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_matrix_recursion_with_all_cross_moments(momentum):
    algorithm = HeavyBall(momentum) if momentum else SGD()
    start = np.outer(PROBLEM.initial_mean, PROBLEM.initial_mean)
    start += np.diag(PROBLEM.initial_variance)
    for steps in (1, 2, 25):
        found = solve(PROBLEM, one(algorithm, 0.2, steps, 3), [steps])
        bias = matrices(momentum, 0.2, 3, steps, 0.0, start)
        variance = matrices(momentum, 0.2, 3, steps, PROBLEM.label_noise, 0 * start)
        agree_each(found.bias, [bias], IDENTITY)
        agree_each(found.variance, [variance], IDENTITY)
        agree_each(found.loss, [bias + variance], IDENTITY)


def test_volterra_equation_of_sgd():
    """2 L(t) = F(t) + sum_s K(t - 1 - s) (2 L(s) + s2), as in Paquette et al. 2021 and 2024."""
    problem, lr, batch, steps = power_law(40, 0.8, 0.6, 0.3), 0.3, 2, 60
    h, b = problem.curvature, problem.initial_mean
    q = (1 - lr * h) ** 2 + lr**2 * h**2 / batch
    powers = q ** np.arange(steps + 1)[:, None]
    twice = powers @ (h * b**2)
    kernel = powers @ (lr**2 * h**2 / batch)
    for t in range(1, steps + 1):
        twice[t] += kernel[:t][::-1] @ (twice[:t] + problem.label_noise)
    found = solve(problem, one(SGD(), lr, steps, batch), range(steps + 1))
    agree_each(found.loss, 0.5 * twice, IDENTITY)


@pytest.mark.parametrize("name", PROGRAMS)
def test_large_batches_with_noisy_labels_leave_additive_noise(name):
    """B -> infinity at fixed s2 / B: only v_i = h_i s2 is left of the noise."""
    scale = 1e12
    phases = tuple(
        Phase(p.algorithm, p.lr, p.steps, scale, p.member_lr) for p in PROGRAMS[name].phases
    )
    small = tuple(Phase(p.algorithm, p.lr, p.steps, 1, p.member_lr) for p in phases)
    problem = PROBLEM.replace(label_noise=0.5 * scale)
    at = [0, 1, 14, 17, 30]
    found = solve(problem, Program(phases), at)
    additive = Problem(
        PROBLEM.curvature,
        0.5 * PROBLEM.curvature,
        initial_mean=PROBLEM.initial_mean,
        initial_variance=PROBLEM.initial_variance,
        minimum=PROBLEM.minimum,
    )
    expected = nqm.solve(additive, Program(small), at)
    for column in ("loss", "bias", "variance", "member_loss"):
        agree(getattr(found, column), getattr(expected, column), JUMP)


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("name", ["sgd", "late", "phases", "decay after a phase"])
def test_bias_and_variance_are_two_problems(name):
    program = PROGRAMS[name]
    whole = solve(PROBLEM, program, [7, 30])
    silent = solve(PROBLEM.replace(label_noise=0.0), program, [7, 30])
    agree_each(whole.bias, silent.loss, IDENTITY)
    agree_each(whole.loss, whole.bias + whole.variance, IDENTITY)
    if name == "sgd":
        settled = PROBLEM.replace(initial_mean=0.0, initial_variance=0.0)
        agree_each(whole.variance, solve(settled, program, [7, 30]).loss, IDENTITY)


def test_equal_directions_may_be_counted():
    counted = LeastSquares([1.0, 0.2], 0.1, [1.0, 2.0], 0.5, multiplicity=[2, 3])
    written = LeastSquares([1, 1, 0.2, 0.2, 0.2], 0.1, [1, 1, 2, 2, 2], 0.5)
    for program in (PROGRAMS["heavy ball"], PROGRAMS["late"]):
        agree_each(solve(counted, program).loss, solve(written, program).loss, IDENTITY)
    phase = Phase(HeavyBall(), 0.05, 1, 4)
    agree_each(steady(counted, phase).loss, steady(written, phase).loss, IDENTITY)
    agree_each(counted.initial_loss, written.initial_loss, IDENTITY)
    agree_each(stability_edge(counted, SGD()), stability_edge(written, SGD()), JUMP)


def test_flat_directions_cost_nothing():
    flat = LeastSquares([1.0, 0.0], 0.1, 1.0, 0.0)
    curved = LeastSquares([1.0], 0.1, 1.0, 0.0)
    program = PROGRAMS["heavy ball"]
    agree_each(solve(flat, program).loss, solve(curved, program).loss, IDENTITY)
    phase = Phase(HeavyBall(0.5), 0.1, 1, 2)
    found = steady(flat, phase)
    agree_each(found.loss, steady(curved, phase).loss, IDENTITY)
    assert np.isnan(found.second_moment[1])
    assert steady(LeastSquares([0.0], 0.1), phase).loss == 0.0
    assert stability_edge(LeastSquares([0.0], 0.1), SGD()) == np.inf


# ------------------------------------------------------------------ steady states and stability


def kappa(lr: float, batch: float, h: Any, count: Any = 1.0) -> tuple[Any, float]:
    """w_i and kappa = sum h_i w_i of SGD."""
    w = lr / (batch * (2 - lr * h * (1 + 1 / batch)))
    return w, float(np.sum(count * h * w))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_steady_state_of_sgd(batch):
    """s_i = w_i s2 / (1 - kappa), 2 L = kappa s2 / (1 - kappa)."""
    problem, lr = LeastSquares([1.0, 0.5, 0.1], 0.3, multiplicity=[1, 2, 3]), 0.2
    w, total = kappa(lr, batch, problem.curvature, problem.multiplicity)
    found = steady(problem, Phase(SGD(), lr, 1, batch))
    agree_each(found.kappa, total, IDENTITY)
    agree_each(found.second_moment, w * 0.3 / (1 - total), IDENTITY)
    agree_each(found.loss, 0.5 * total * 0.3 / (1 - total), IDENTITY)
    agree_each(found.radius, np.max((1 - lr * problem.curvature) ** 2
                                    + (lr * problem.curvature) ** 2 / batch), IDENTITY)  # fmt: skip


STEADY = {
    "heavy ball": Phase(HeavyBall(0.6), 0.1, 1, 2),
    "ema": Phase(EMA(SGD(), 0.8), 0.2, 1, 2),
    "lawa": Phase(LAWA(every=2, window=3), 0.2, 1, 2),
    "lookahead": Phase(Lookahead(HeavyBall(0.5), 4), 0.1, 1, 2),
    "late": Phase(
        LatePhase(3, inner=HeavyBall(0.5), minibatch=0.5, gamma="mean"), 0.1, 1, 2, member_lr=0.05
    ),
    "late, one direction": Phase(LatePhase(3, directions=(0,), gamma="mean"), 0.1, 1, 2),
    "ensemble": Phase(EMA(Ensemble(3), 0.8), 0.2, 1, 2),
    "local": Phase(LocalSGD(3, 4), 0.2, 1, 2),
    "weight decay": Phase(WeightDecay(HeavyBall(0.5), 0.3), 0.1, 1, 2),
    "rounded": Phase(Rounded(SGD(), 0.3), 0.2, 1, 2),
    "cyclic": Phase(SGD(), Cyclic(0.4, 0.1, 5), 1, 2),
}


@pytest.mark.parametrize("name", STEADY)
def test_long_walks_end_in_the_steady_state(name):
    phase = STEADY[name]
    steps = 2400  # a multiple of every period, and long past the flattest direction's memory
    walk = Phase(phase.algorithm, phase.lr, steps, phase.batch_size, phase.member_lr)
    end, found = solve(PROBLEM, Program((walk,)), [steps]), steady(PROBLEM, phase)
    agree_each(end.loss, [found.loss], JUMP)
    agree_each(end.member_loss, [found.member_loss], JUMP)
    assert found.status is Status.FINISHED
    assert found.kappa < 1
    assert (found.deviation > 0).any() == (found.member_loss > found.loss)
    assert list(found.table().columns)[:2] == ["loss", "member_loss"]


def test_edge_of_sgd_is_where_kappa_is_one():
    """One direction: lr h (B + 2) = 2 B; with B = 1 the 2 / 3 of least mean squares."""
    for batch in (1, 2, 50):
        edge = stability_edge(LeastSquares([0.4], 1.0), SGD(), batch)
        agree_each(edge, 2 * batch / (0.4 * (batch + 2)), JUMP)
    problem = power_law(200, 0.6, 0.5, 1.0)
    edge = stability_edge(problem, SGD(), 4)
    own = 2 / (1 + 1 / 4)
    known = brentq(lambda lr: kappa(lr, 4, problem.curvature)[1] - 1, 1e-6, own * (1 - 1e-9))
    agree_each(edge, known, JUMP)
    # Two equal clusters of 500: the edge falls as one over their trace.
    wide = LeastSquares([1.0, 0.5], 1.0, multiplicity=500)
    assert stability_edge(wide, SGD(), 1) < 2 / (0.5 * 750)


@pytest.mark.parametrize(
    "algorithm",
    [
        SGD(),
        HeavyBall(0.8),
        SWA(HeavyBall(0.5)),
        Lookahead(SGD(), 3),
        LatePhase(3, gamma="mean"),
        LocalSGD(2, 3),
    ],
    ids=lambda a: type(a).__name__,
)
def test_edge_brackets_divergence(algorithm):
    problem = PROBLEM.replace(multiplicity=4.0)
    edge = stability_edge(problem, algorithm, 2)
    assert edge < nqm.stability_edge(problem.additive(), algorithm)
    below, above = (
        solve(problem, one(algorithm, factor * edge, 3000, 2), [1500, 3000])
        for factor in (0.98, 1.02)
    )
    assert below.status == [Status.FINISHED] * 2
    assert above.status == [Status.DIVERGED] * 2
    assert above.bias[1] > 100 * above.bias[0] > 0
    assert below.bias[1] < below.bias[0]
    if not isinstance(algorithm, SWA):
        unsettled = steady(problem, Phase(algorithm, 1.02 * edge, 1, 2))
        assert unsettled.status is Status.DIVERGED
        assert np.isnan(unsettled.loss)


def test_edge_of_large_batches_is_the_ordinary_one():
    for algorithm in (SGD(), HeavyBall(0.8), LatePhase(3, gamma="mean")):
        edge = stability_edge(PROBLEM, algorithm, 1e12)
        agree_each(edge, nqm.stability_edge(PROBLEM.additive(), algorithm), 1e-8)  # 1 / B is left


# ------------------------------------------------------------------ families


def test_random_features_are_the_regression_they_stand_for():
    problem = random_features(6, 20, 0.8, 0.7, 0.2, seed=3)
    w = np.random.default_rng(3).standard_normal((20, 6)) / np.sqrt(6)
    j = np.arange(1.0, 21)
    data, b = np.diag(j**-1.6), j**-0.7
    covariance = w.T @ data @ w
    best = np.linalg.solve(covariance, w.T @ data @ b)
    misfit = b @ data @ b - b @ data @ w @ best
    agree_each(problem.label_noise, 0.2 + misfit, JUMP)
    agree_each(problem.irreducible_loss, 0.5 * (0.2 + misfit), JUMP)
    agree_each(np.sort(problem.curvature), np.linalg.eigvalsh(covariance), JUMP)
    # All zero weights: the loss is half the labels' variance.
    agree_each(problem.initial_loss + problem.irreducible_loss, 0.5 * (b @ data @ b + 0.2), JUMP)
    agree_each(np.linalg.norm(problem.minimum), np.linalg.norm(best), JUMP)
    # As many features as data: nothing is out of reach.
    agree(random_features(20, 20, 0.8, 0.7, 0.2).label_noise, 0.2, JUMP)
    assert random_features(6, 20, seed=3).key() != random_features(6, 20, seed=4).key()


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_random_features_trained_in_their_own_coordinates(momentum):
    """SGD on the weights of W'x: data, labels and misfit are drawn, nothing is diagonal."""
    features, hidden, alpha, beta, s2 = 4, 9, 0.6, 0.4, 0.1
    lr, batch, steps, replicas = 0.1, 2, 40, 20_000
    rng = np.random.default_rng(11)
    w = np.random.default_rng(5).standard_normal((hidden, features)) / np.sqrt(features)
    j = np.arange(1.0, hidden + 1)
    target = j**-beta
    theta = np.zeros((replicas, features))
    buffer = np.zeros_like(theta)
    for _ in range(steps):
        x = j**-alpha * rng.standard_normal((replicas, batch, hidden))
        y = x @ target + np.sqrt(s2) * rng.standard_normal((replicas, batch))
        seen = x @ w
        residual = np.einsum("rbf,rf->rb", seen, theta) - y
        buffer = momentum * buffer + np.einsum("rbf,rb->rf", seen, residual) / batch
        theta -= lr * buffer
    error = theta @ w.T - target
    losses = 0.5 * np.sum((j**-alpha * error) ** 2, axis=1) + 0.5 * s2
    problem = random_features(features, hidden, alpha, beta, s2, seed=5)
    algorithm = HeavyBall(momentum) if momentum else SGD()
    exact = solve(problem, one(algorithm, lr, steps, batch), [steps])
    within_error(
        losses.mean(), exact.loss[0] + problem.irreducible_loss, losses.std() / np.sqrt(replicas)
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.7), (0.75, 0.9)])
def test_source_limited_scaling_law(alpha, beta):
    """Without noise L(t) = 1/2 sum_j j^(-2 alpha - 2 beta) (1 - lr h_j)^(2 t).

    As an integral over u = 2 lr t j^(-2 alpha), with p = (2 alpha + 2 beta - 1) / (2 alpha),

        L = gamma(p; u_d, u_1) / (4 alpha) (2 lr t)^(-p) (1 - p (p + 1) / (4 t) + O(t^-2)),

    the incomplete gamma function between both ends and the last factor from
    (1 - x)^(2 t) = exp(-2 x t - x^2 t ...). The exponent -p is F_pp's in Paquette et al. 2024.
    """
    d, lr, at = 4000, 0.2, np.array([1000, 3000])
    problem = power_law(d, alpha, beta)
    found = solve(problem, one(SGD(), lr, int(at[-1]), 1e12), at.tolist()).loss
    p = (2 * alpha + 2 * beta - 1) / (2 * alpha)
    tau = 2 * lr * at
    part = gamma(p) * (gammainc(p, tau) - gammainc(p, tau * d ** (-2 * alpha)))
    law = part * tau**-p / (4 * alpha)
    agree_each(found, law * (1 - p * (p + 1) / (4 * at)), 3e-6)  # the next order: 1 / t^2
    slope = np.diff(np.log(found)) / np.diff(np.log(at))
    agree_each(slope, [-p], 1e-3)  # 1 / t


def test_noise_limited_scaling_law():
    """Where beta > alpha the noise of drawing inputs wins: L(t) ~ t^(-2 + 1 / (2 alpha)).

    F(t) then falls faster than the kernel K(t) of the Volterra equation, whose solution inherits
    the kernel's tail: 2 L(t) -> K(t) sum F / (1 - kappa)^2 (Paquette et al. 2024, phase III).
    """
    alpha, lr, at = 1.0, 0.2, [2000, 6000]
    problem = power_law(2000, alpha, 2.0)
    found = solve(problem, one(SGD(), lr, at[-1], 1), at).loss
    h, b = problem.curvature, problem.initial_mean
    q = (1 - lr * h) ** 2 + (lr * h) ** 2
    total, kernel = np.sum((lr * h) ** 2 / (1 - q)), [np.sum((lr * h) ** 2 * q**t) for t in at]
    law = 0.5 * np.array(kernel) * np.sum(h * b**2 / (1 - q)) / (1 - total) ** 2
    agree_each(found, law, 0.02)  # corrections fall as t^(-1/2 alpha) or faster
    assert abs(found[1] / law[1] - 1) < abs(found[0] / law[0] - 1)
    slope = np.diff(np.log(found)) / np.diff(np.log(at))
    agree_each(slope, [-2 + 1 / (2 * alpha)], 0.01)


# ------------------------------------------------------------------ the figure


def line(ax: Any, gid: str) -> Any:
    (found,) = [line for line in ax.lines if line.get_gid() == gid]
    return found.get_xydata()


def test_frontier_is_the_least_loss_so_far():
    table = pd.DataFrame(
        {
            "features": [2, 2, 4, 4, 4],
            "compute": [10, 30, 20, 40, 20],
            "loss": [3.0, 2.0, 2.5, 2.2, 0.1],
            "stderr": 0.1,
            "kind": ["exact"] * 4 + ["sample"],
        }
    )
    ax = scaling.frontier(table)
    np.testing.assert_array_equal(line(ax, "least"), [[10, 3], [20, 2.5], [30, 2], [40, 2]])
    np.testing.assert_array_equal(line(ax, "4"), [[20, 2.5], [40, 2.2]])


def test_decay_is_shown_relative_to_the_best_share():
    rows = {"decay": [0.2, 0.6, 1.0], "noise": 0.1, "loss": [4.0, 2.0, 3.0], "kind": "exact"}
    ax = scaling.decay_start(pd.DataFrame(rows))
    np.testing.assert_array_equal(line(ax, "0.1"), [[0.2, 2.0], [0.6, 1.0], [1.0, 1.5]])
    np.testing.assert_array_equal(line(ax, "0.1/best"), [[0.6, 1.0]])


def test_study_of_scaling_laws():
    table = study.compute(Scale.SMOKE)
    assert all(claim.passed for claim in study.claims(table))
    assert len(study.draw(table).axes) == 2
    table.loc[table["kind"] == "sample", "loss"] *= 2.0
    assert not all(claim.passed for claim in study.claims(table))


# ------------------------------------------------------------------ a user's mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LeastSquares([1.0, -1.0]), "problem.curvature must be >= 0; got -1 at index 1"),
        (lambda: LeastSquares([1.0], -1.0), r"problem.label_noise must lie in \[0, inf\); got -1"),
        (lambda: LeastSquares([1.0], 0.0, [1, 2]), "problem.initial_mean has 2 entries"),
        (lambda: power_law(0), "power_law.directions must be an integer >= 1"),
        (lambda: power_law(10, alpha=-1), "power_law.alpha must lie"),
        (lambda: power_law(10**6, alpha=60), "power_law.alpha must leave curvatures above 0"),
        (lambda: random_features(2, 4, seed=-1), "random_features.seed must be"),
        (
            lambda: solve(PROBLEM, one(MultiplicativeLatePhase(2, gamma="mean"))),
            "least squares needs a linear method; MultiplicativeLatePhase",
        ),
        (
            lambda: solve(PROBLEM, one(Federated(2, 2))),
            "one gradient per member and step; Federated takes 2",
        ),
        (lambda: steady(PROBLEM, Phase(SWA(), 0.1, 1)), "swa has no steady state"),
        (lambda: stability_edge(PROBLEM, ScheduleFree()), "ScheduleFree's do not"),
        (lambda: stability_edge(PROBLEM, SGD(), 0), "stability_edge.batch_size must lie"),
        (lambda: sample(PROBLEM, one(SGD(), batch=1.5)), "whole examples; got 1.5"),
        (lambda: sample(PROBLEM.replace(multiplicity=2.0), one(SGD())), "multiplicity 1"),
        (
            lambda: sample(PROBLEM, one(MultiplicativeLatePhase(2, gamma="mean"))),
            "needs a linear method",
        ),
        (lambda: solve(PROBLEM, PROGRAMS["sgd"]).quantiles(), "quantiles need Gaussian weights"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(NQMError, match=message):
        call()


def test_keys_tell_problems_apart():
    assert PROBLEM.key() == PROBLEM.replace().key()
    assert len({PROBLEM.replace(**{name: 0.7}).key() for name in
                ("label_noise", "initial_mean", "initial_variance", "multiplicity", "minimum")}
               | {PROBLEM.key()}) == 6  # fmt: skip


def test_progress_counts_every_step():
    told: list[int] = []
    solve(PROBLEM, PROGRAMS["phases"], progress=told.append)
    assert sum(told) == PROGRAMS["phases"].steps

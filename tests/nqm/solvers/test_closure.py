"""Moment closure of multiplicative weights: one step by brute force, whole runs by sampling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nqm import (
    SGD,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Problem,
    balance_point,
    constant,
    moment_closure,
    sample,
    solve,
)
from nqm.schedule import Cosine
from nqm.solvers.closure_elementwise import Elementwise
from nqm.solvers.closure_scalar import Scalar
from tests.tolerances import IDENTITY, JUMP, agree, agree_each

H, V, MINIMUM, LR, MEMBER_LR, K = 0.8, 0.3, 1.3, 0.2, 0.15, 3


def test_one_step_is_the_step_of_all_members_by_quadrature():
    """Nodes of (theta, phi_1, phi_2, phi_3), each moved by the paper's equations."""
    mean = np.array([1.2, 1.1, 1.1, 1.1])
    covariance = np.full((4, 4), 0.02) + np.diag([0.0, 0.03, 0.03, 0.03])
    covariance[0] = covariance[:, 0] = [0.05, -0.01, -0.01, -0.01]
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    root = np.linalg.cholesky(covariance)
    first, second = np.zeros(4), np.zeros((4, 4))
    scale = LR / K
    for place in itertools.product(range(6), repeat=4):
        share = np.prod(weights[list(place)]) / (2 * np.pi) ** 2
        theta, *phi = mean + root @ nodes[list(place)]
        phi = np.array(phi)
        g = H * (theta * phi - MINIMUM)
        new = np.concatenate([[theta - scale * phi @ g], phi - MEMBER_LR * theta * g])
        push = np.vstack([-scale * phi, -MEMBER_LR * theta * np.eye(3)])  # of each e_k
        first += share * new
        second += share * (np.outer(new, new) + V * push @ push.T)
    second -= np.outer(first, first)

    problem = Problem([H], [2 * V], minimum=MINIMUM)
    start = Elementwise(
        np.ones(1),
        *(np.array([[x]]) for x in (1.2, 1.1, 0.05, -0.01, 0.02 + 0.03 / 3, 0.03)),
    )
    new = start.step(problem, MultiplicativeLatePhase(K, gamma="mean"), LR, MEMBER_LR, 2.0)
    agree([new.theta[0, 0], new.phi[0, 0]], first[:2], IDENTITY)
    agree(new.var_theta[0], second[:1, 0], IDENTITY)
    agree(new.cross[0], second[0, 1:2], IDENTITY)
    agree(new.apart[0], [second[1, 1] - second[1, 2]], IDENTITY)
    agree(new.var_phi[0], [second[1, 2] + (second[1, 1] - second[1, 2]) / K], IDENTITY)


def test_one_step_of_a_scalar_factor_is_the_step_of_all_members_by_quadrature():
    """Nodes of (theta_1, theta_2, phi_1, phi_2), correlated noise in both directions."""
    h, w, members = np.array([0.8, 0.3]), np.array([1.3, -0.9]), 2
    noise = np.array([[0.3, 0.1], [0.1, 0.2]])
    mean = np.array([1.2, -0.8, 1.1, 1.1])
    covariance = np.array(
        [
            [0.05, 0.02, -0.01, -0.01],
            [0.02, 0.04, 0.015, 0.015],
            [-0.01, 0.015, 0.05, 0.02],
            [-0.01, 0.015, 0.02, 0.05],
        ]
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    root = np.linalg.cholesky(covariance)
    first, second, loss, member = np.zeros(4), np.zeros((4, 4)), 0.0, 0.0
    scale = LR / members
    for place in itertools.product(range(6), repeat=4):
        share = np.prod(weights[list(place)]) / (2 * np.pi) ** 2
        state = mean + root @ nodes[list(place)]
        theta, phi = state[:2], state[2:]
        loss += share * 0.5 * h @ (theta * phi.mean() - w) ** 2
        member += share * np.mean([0.5 * h @ (theta * one - w) ** 2 for one in phi])
        g = [h * (theta * one - w) for one in phi]
        pulls = [MEMBER_LR * theta @ one for one in g]
        new = np.concatenate([theta - scale * (phi[0] * g[0] + phi[1] * g[1]), phi - pulls])
        first += share * new
        second += share * np.outer(new, new)
        for k, one in enumerate(phi):  # noise of each member's own minibatch
            push = np.zeros((4, 2))
            push[:2] = -scale * one * np.eye(2)
            push[2 + k] = -MEMBER_LR * theta
            second += share * push @ noise @ push.T
    second -= np.outer(first, first)

    variance = np.diag(noise)
    correlation = noise / np.sqrt(np.outer(variance, variance))
    problem = Problem(h, 2 * variance, minimum=w, noise_correlation=correlation)
    start = Scalar(mean[:2], 1.1, covariance[:2, :2], covariance[:2, 2], 0.035, 0.03)
    algorithm = MultiplicativeLatePhase(members, gamma="mean", coupling="scalar")
    agree(start.losses(problem, algorithm)[:2], [loss, member], IDENTITY)
    new = start.step(problem, algorithm, LR, MEMBER_LR, 2.0)
    agree([*new.theta, new.phi], first[:3], IDENTITY)
    agree(new.var_theta, second[:2, :2], IDENTITY)
    agree(new.cross, second[:2, 2], IDENTITY)
    agree(new.apart, second[2, 2] - second[2, 3], IDENTITY)
    agree(new.var_phi, 0.5 * (second[2, 2] + second[2, 3]), IDENTITY)


def test_a_scalar_factor_is_near_monte_carlo_where_the_first_order_is_not():
    problem = Problem([1.0, 0.5, 0.2], 0.1, initial_variance=0.01, minimum=[1.0, -0.7, 0.5])
    late = MultiplicativeLatePhase(4, gamma="mean", spread=0.01, coupling="scalar")
    program = constant(late, 0.3, 300)
    drawn = sample(problem, program, [5, 300], replicas=12_000, seed=4)
    closed, first = moment_closure(problem, program, [5, 300]), solve(problem, program, [5, 300])
    for which in ("loss", "member_loss"):
        error = getattr(drawn, "stderr" if which == "loss" else "member_stderr")
        off = np.abs(getattr(closed, which) - getattr(drawn, which))
        assert np.all(off < 0.01 * getattr(drawn, which) + 3 * error)
    agree_each(closed.loss_sd, drawn.loss_sd, 0.05)  # 3 % is its standard error
    assert abs(first.loss[1] / drawn.loss[1] - 1) > 0.05


def test_a_scalar_factor_begins_with_the_covariance_of_the_phases_before():
    """With noise and rates near 0 the first order is exact, and it is dense as well."""
    problem = Problem(
        [1.0, 0.5], [1e-10, 2e-10], initial_variance=1e-10, minimum=[1.0, -0.7],
        noise_correlation=[[1.0, 0.8], [0.8, 1.0]],
    )  # fmt: skip
    before = Phase(SGD(), 0.3, 20)
    late = Phase(MultiplicativeLatePhase(3, gamma="mean", coupling="scalar"), 0.1, 15)
    closed = moment_closure(problem, [before, late], [20, 35])
    exact = solve(problem, before, [20])
    ((mean, covariance),) = exact.weight_moments()
    variance = np.diag(covariance)
    later = problem.replace(
        initial_mean=mean,
        initial_variance=variance,
        initial_correlation=covariance / np.sqrt(np.outer(variance, variance)),
    )
    agree_each(closed.loss, solve(later, late, [0, 15]).loss, 1e-4)  # of the order of the noise
    agree_each(closed.loss_sd, solve(later, late, [0, 15]).loss_sd, 1e-4)


def test_it_is_near_monte_carlo_where_the_first_order_is_not():
    problem = Problem([1.0], [0.25], initial_variance=0.0, minimum=1.0)
    program = constant(MultiplicativeLatePhase(4, gamma="mean"), 0.1, 400)
    drawn = sample(problem, program, [400], replicas=12_000, seed=3)
    error = drawn.stderr[0] / drawn.loss[0]
    closed, first = moment_closure(problem, program, [400]), solve(problem, program, [400])
    assert abs(closed.loss[0] / drawn.loss[0] - 1) < 0.01 + 3 * error
    assert abs(closed.member_loss[0] / drawn.member_loss[0] - 1) < 0.01 + 3 * error
    assert abs(closed.loss_sd[0] / drawn.loss_sd[0] - 1) < 0.1
    assert first.loss[0] / drawn.loss[0] - 1 < -0.03
    assert closed.kind == "closure"
    assert np.isnan(closed.bias[0])


def test_it_drifts_to_the_long_run_floor():
    """The balance of both factors is of first order in the noise; so is the difference allowed."""
    problem = Problem([1.0], [0.02], initial_variance=0.0, minimum=1.0)
    late = MultiplicativeLatePhase(4, gamma="mean")
    program = constant(late, 0.3, 8000)
    floor = balance_point(problem, late, 0.3).loss
    closed = moment_closure(problem, program, [40, 8000]).loss
    assert abs(closed[1] / floor - 1) < 0.03
    assert abs(closed[0] / floor - 1) > 0.1
    agree_each(closed[0], solve(problem, program, [40]).loss[0], 0.03)


@pytest.mark.parametrize("coupling", ["elementwise", "scalar"])
def test_random_starts_arrive_at_the_hyperbola(coupling):
    """Each start ends on theta phi = w*; a Gaussian over the ends would have 40 times the loss."""
    problem = Problem([1.0], [2e-5], initial_mean=0.012, initial_variance=0.0038, minimum=1.0)
    late = MultiplicativeLatePhase(4, gamma="mean", factor=0.5, coupling=coupling)
    phase = Phase(late, 0.032, 25, member_lr=0.061)
    drawn = sample(problem, phase, [25], replicas=20_000, seed=5)
    closed = moment_closure(problem, phase, [25])
    assert abs(closed.loss[0] - drawn.loss[0]) < 0.01 * drawn.loss[0] + 3 * drawn.stderr[0]
    near = 0.01 * drawn.member_loss[0] + 3 * drawn.member_stderr[0]
    assert abs(closed.member_loss[0] - drawn.member_loss[0]) < near


def test_without_steps_of_the_members_it_is_exact():
    problem = Problem([1.0, 0.3], [0.5, 0.2], initial_mean=0.4, initial_variance=0.3, minimum=0.7)
    (limit,) = MultiplicativeLatePhase(3, gamma="mean", factor=2.0).limits()
    phase = Phase(limit.algorithm, 0.1, 30, 4, member_lr=1e-300)
    equal = Phase(limit.equals, limit.equal_rates((0.1, 1e-300)), 30, 4 * limit.batch_size)
    at = [0, 1, 30]
    closed, exact = moment_closure(problem, phase, at), solve(problem, equal, at)
    agree_each(closed.loss, exact.loss, JUMP)
    agree_each(closed.loss_sd, exact.loss_sd, JUMP)


def test_phases_go_on():
    problem = Problem([1.0, 0.3], [0.05, 0.02], minimum=0.7, initial_variance=0.1)
    late = MultiplicativeLatePhase(3, gamma="mean", spread=0.01)
    before = Phase(SGD(), 0.2, 20, 2)
    rates = Cosine(0.1, 0.01, 30)
    whole = moment_closure(problem, [before, Phase(late, rates, 30)], [0, 10, 20, 35, 50])
    exact = solve(problem, before, [0, 10, 20])
    agree_each(whole.loss[:2], exact.loss[:2], IDENTITY)
    # The start of the late phase: the weights, and the members' spread of w_k = theta phi_k.
    mean, variance = exact.weight_mean[2], exact.weight_variance[2]
    square = variance + (0.7 + mean) ** 2
    expected = problem.weight @ (mean**2 + variance + square * 0.01 / 3)
    agree_each(whole.loss[2], expected, IDENTITY)
    values = rates(np.arange(30))
    halves = [before, Phase(late, values[:15], 15), Phase(late, values[15:], 15)]
    agree_each(moment_closure(problem, halves, [35, 50]).loss, whole.loss[3:], IDENTITY)
    fresh = moment_closure(
        problem, [*halves[:2], Phase(late, values[15:], 15, restart=True)], [35, 50]
    )
    agree_each(fresh.loss[0], whole.loss[3], IDENTITY)
    assert fresh.loss[1] != whole.loss[4]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([Phase(SGD(), 0.1, 5)], "use nqm.solve"),
        ([Phase(MultiplicativeLatePhase(2), 0.1, 5), Phase(SGD(), 0.1, 5)], "got SGD"),
        (
            [
                Phase(MultiplicativeLatePhase(2, coupling="scalar"), 0.1, 5),
                Phase(MultiplicativeLatePhase(2), 0.1, 5),
            ],
            "one coupling",
        ),
    ],
)
def test_what_it_does_not_handle_is_refused(phases, said):
    with pytest.raises(NQMError, match=said):
        moment_closure(Problem([1.0], [0.1], minimum=1.0), phases)


def test_a_run_away_is_a_status():
    problem = Problem([1.0], [0.1], minimum=1.0)
    program = constant(MultiplicativeLatePhase(2), 3.0, 60)
    assert moment_closure(problem, program, [60]).status == ["diverged"]

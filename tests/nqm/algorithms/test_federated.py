"""FedProx and SCAFFOLD: fixed points and stationary variances in closed form."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import (
    SGD,
    Federated,
    FedProx,
    HeavyBall,
    LocalSGD,
    Nesterov,
    NQMError,
    Phase,
    Piecewise,
    Scaffold,
    stability_edge,
)
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, within_error

LR, BATCH = 0.3, 2
CURVATURES, SHIFTS = (0.4, 1.0, 1.6), (2.0, -0.8, 0.0)
UNEQUAL = (0.5, 0.2, 0.3)


@pytest.fixture
def placed(problem):
    return problem.replace(minimum=[1.0, -2.0, 0.5])


def minima(problem):
    return np.outer(SHIFTS, problem.minimum)


def round_of(problem, local_steps, prox):
    """Response r_k of a client to the server, its gain g_k on its minimum, its noise q_k."""
    h = np.outer(CURVATURES, problem.curvature)
    a = 1 - LR * (h + prox)
    pull = 1 - a**local_steps
    r = a**local_steps + pull * prox / (h + prox)
    noise = LR**2 * problem.noise_variance / BATCH * (1 - a ** (2 * local_steps)) / (1 - a**2)
    return r, pull * h / (h + prox), noise


@pytest.mark.parametrize("prox", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("local_steps", [1, 2, 6, 50])
def test_fedprox_settles_where_the_round_maps_to_itself(local_steps, prox, placed):
    """Sum g m / (3 - sum r) and sum q / 9 / (1 - (sum r / 3)^2)."""
    algorithm = FedProx(3, local_steps, curvatures=CURVATURES, shifts=SHIFTS, prox=prox)
    found = nqm.steady(placed, Phase(algorithm, LR, 1, BATCH))
    r, gain, noise = round_of(placed, local_steps, prox)
    agree(gain, 1 - r, IDENTITY)
    fixed = np.sum(gain * minima(placed), axis=0) / (3 - r.sum(axis=0))
    np.testing.assert_allclose(found.weight_mean, fixed, atol=IDENTITY)
    variance = noise.sum(axis=0) / 9 / (1 - r.mean(axis=0) ** 2)
    agree_each(found.weight_variance, variance, JUMP)
    agree_each(found.loss, placed.weight @ (fixed**2 + variance), JUMP)
    assert np.all((np.abs(fixed) < 1e-14) == (local_steps == 1))


def test_a_strong_pull_removes_the_drift(placed):
    """As prox grows the round becomes one short step on the clients' mean loss."""
    drift = [
        np.abs(nqm.steady(
            placed, Phase(FedProx(3, 20, curvatures=CURVATURES, shifts=SHIFTS, prox=p), 0.01, 1)
        ).weight_mean).max()
        for p in (0.0, 1.0, 10.0, 100.0)
    ]  # fmt: skip
    assert drift[0] > drift[1] > drift[2] > drift[3]
    # To first order in c h the round's gain is c h T (1 - c h U), and the drift U times one thing:
    # U = lr (H - 1) / 2 without a pull, and 1 / prox where lr prox = 1.
    agree_each(drift[3] / drift[0], 0.01 / (0.01 * 19 / 2), 0.1)


@pytest.mark.parametrize("inner", [SGD(), HeavyBall(0.5)], ids=repr)
@pytest.mark.parametrize("local_steps", [1, 2, 6, 50])
def test_scaffold_settles_at_the_true_minimum(local_steps, inner, placed):
    algorithm = Scaffold(3, local_steps, inner, curvatures=CURVATURES, shifts=SHIFTS)
    found = nqm.steady(placed, Phase(algorithm, LR, 1, BATCH))
    # Of minima at a distance of order 1.
    np.testing.assert_allclose(found.weight_mean, 0.0, atol=1e-14)
    federated = Federated(3, local_steps, inner, curvatures=CURVATURES, shifts=SHIFTS)
    drift = np.abs(nqm.steady(placed, Phase(federated, LR, 1, BATCH)).weight_mean)
    assert np.all(drift > 1e-4) == (local_steps > 1)


def test_clients_that_differ_in_place_only_have_the_law_of_local_sgd(placed):
    """Equal curvatures: no drift, and the corrections of the mean sum to zero."""
    settings = {"clients": 3, "local_steps": 5}
    shifted = Scaffold(**settings, shifts=(2.0, -1.5, -0.5))
    found = nqm.steady(placed, Phase(shifted, LR, 1, BATCH))
    plain = nqm.steady(placed, Phase(LocalSGD(**settings), LR, 1, BATCH))
    agree_each(found.loss, plain.loss, JUMP)
    np.testing.assert_allclose(found.weight_mean, 0.0, atol=1e-14)


def test_shares_weigh_the_clients(placed):
    """Fixed points sum p g m / sum p g and 0; variance sum p^2 q / (1 - (sum p r)^2)."""
    p = np.array(UNEQUAL)
    shifts = (1.0, -1.6, 0.2)
    curvatures = (0.4, 1.0, 2.0)
    # 0.2 + 0.2 + 0.6 = 1, and 0.2 - 0.32 + 0.12 = 0.
    settings = {"curvatures": curvatures, "shifts": shifts, "shares": UNEQUAL}
    h = np.outer(curvatures, placed.curvature)
    a = 1 - LR * (h + 0.2)
    pull = (1 - a**6) * h / (h + 0.2)
    noise = LR**2 * placed.noise_variance / BATCH * (1 - a**12) / (1 - a**2)
    found = nqm.steady(placed, Phase(FedProx(3, 6, **settings, prox=0.2), LR, 1, BATCH))
    fixed = p @ (pull * np.outer(shifts, placed.minimum)) / (p @ pull)
    np.testing.assert_allclose(found.weight_mean, fixed, atol=IDENTITY)
    agree_each(found.weight_variance, p**2 @ noise / (1 - (1 - p @ pull) ** 2), JUMP)
    found = nqm.steady(placed, Phase(Scaffold(3, 6, **settings), LR, 1, BATCH))
    np.testing.assert_allclose(found.weight_mean, 0.0, atol=1e-14)


@pytest.mark.parametrize(
    ("algorithm", "simulate", "options"),
    [
        (FedProx(3, 3, Nesterov(0.4), prox=0.3, curvatures=CURVATURES, shifts=SHIFTS),
         literal.fedprox, {"prox": 0.3, "inner": "nesterov", "momentum": 0.4}),
        (Scaffold(3, 3, outer_lr=0.8, curvatures=CURVATURES, shifts=SHIFTS),
         literal.scaffold, {"outer_lr": 0.8}),
        (Scaffold(3, 3, curvatures=(0.4, 1.0, 2.0), shifts=(1.0, -1.6, 0.2), shares=UNEQUAL),
         literal.scaffold,
         {"curvatures": (0.4, 1.0, 2.0), "shares": UNEQUAL, "shifts": (1.0, -1.6, 0.2)}),
        (FedProx(3, 3, prox=0.3, curvatures=(0.4, 1.0, 2.0), shares=UNEQUAL), literal.fedprox,
         {"prox": 0.3, "curvatures": (0.4, 1.0, 2.0), "shares": UNEQUAL, "shifts": (0, 0, 0)}),
    ],
    ids=["fedprox", "scaffold", "scaffold-shares", "fedprox-shares"],
)  # fmt: skip
def test_paths_against_the_literal_simulation(algorithm, simulate, options, placed):
    """Clients with minima of their own; the mean exactly, the loss within its error."""
    program = nqm.constant(algorithm, LR, 17, batch_size=BATCH)
    exact = nqm.solve(placed, program, range(18))
    given = {"clients": 3, "local_steps": 3, "curvatures": CURVATURES, **options}
    given["minima"] = np.outer(given.pop("shifts", SHIFTS), placed.minimum)
    problem_of = placed.curvature, placed.noise_variance
    mean, _ = simulate(*problem_of, placed.initial_mean[None], LR, BATCH, 17, None, **given)
    agree(exact.weight_mean, mean[:, 0], IDENTITY)
    rng, replicas = np.random.default_rng(3), 4000
    sd = np.sqrt(placed.initial_variance)
    start = placed.initial_mean + sd * rng.standard_normal((replicas, 3))
    drawn, _ = simulate(*problem_of, start, LR, BATCH, 17, rng, **given)
    within_error((drawn[17] ** 2 @ placed.weight).mean(), exact.loss[17],
                 exact.loss_sd[17] / np.sqrt(replicas))  # fmt: skip


def test_controls_follow_a_schedule(placed):
    """The mean of a round's gradients needs no rate: written out for two rates within rounds."""
    program = nqm.Program((
        Phase(Scaffold(2, 2, curvatures=(1.5, 0.5), shifts=(0.5, -1.5)),
              Piecewise([0.4, 0.1, 0.2, 0.0], [1, 2, 3]), 6),
    ))  # fmt: skip
    h, x = placed.curvature, placed.initial_mean
    c = np.array([[1.5], [0.5]])
    m = np.outer([0.5, -1.5], placed.minimum)
    control = np.zeros((2, 3))
    for lrs in ((0.4, 0.1), (0.2, 0.0), (0.0, 0.0)):
        y, gathered = np.stack([x, x]), np.zeros((2, 3))
        for lr in lrs:
            g = c * h * (y - m)
            y = y - lr * (g - control + control.mean(axis=0))
            gathered += g / 2
        x, control = y.mean(axis=0), gathered
    agree(nqm.solve(placed, program, [6]).weight_mean[0], x, IDENTITY)


def test_edges_known_by_hand():
    """Server: (1 - a^H) h / (h + prox) = 2 / outer_lr. Controls: sum_{i<H} r^i = 2 H."""
    one = nqm.Problem([1.0], [1.0])
    # a^3 = 1 - 4, a = -3^(1/3), with lr (1 + 1) = 1 - a.
    assert stability_edge(one, FedProx(2, 3, prox=1.0)) == pytest.approx((1 + 3 ** (1 / 3)) / 2)
    slow = Scaffold(2, 3, outer_lr=0.5)
    assert slow.stability_edge(np.ones(1)) is None
    # The controls: 1 + r + r^2 = 6 at r = -(1 + sqrt 21) / 2 is beyond the server's r^3 = -3.
    assert stability_edge(one, slow) == pytest.approx(1 + 3 ** (1 / 3), rel=1e-8)
    still = Scaffold(2, 3, outer_lr=0.01)  # the server's r^3 = -199 comes after it
    assert stability_edge(one, still) == pytest.approx(1 + (1 + 21**0.5) / 2, rel=1e-8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FedProx(2, prox=-0.1), r"FedProx\.prox must lie in \[0"),
        (lambda: FedProx(2, curvatures=(1.0, 2.0)), r"FedProx\.curvatures must average to 1"),
        (lambda: Scaffold(2, shifts=(1.0, 2.0)), r"Scaffold\.shifts times curvatures"),
        (lambda: FedProx(2, shares=(0.5, 0.4)), r"FedProx\.shares must sum to 1; got 0\.9"),
        (lambda: Federated(2, shares=(1.0, 0.0)), r"Federated\.shares must lie in \(0"),
        (lambda: Federated(2, shares=(1.0,)), r"Federated\.shares must hold one number"),
        (
            lambda: Federated(2, curvatures=(1.5, 0.5), shares=(0.2, 0.8)),
            "must average to 1; got 0.7",
        ),
        (lambda: Scaffold(3, curvatures=(1.0,)), r"Scaffold\.curvatures must hold one number"),
    ],
)
def test_misuse_names_the_field(build, words):
    with pytest.raises(NQMError, match=words):
        build()


def test_shifts_need_a_minimum_to_be_a_part_of(problem):
    with pytest.raises(NQMError, match=r"Scaffold\.shifts are in units of problem\.minimum"):
        nqm.solve(problem, nqm.constant(Scaffold(2, shifts=(1.0, -1.0)), 0.1, 5))

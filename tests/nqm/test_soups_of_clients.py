"""Soups of clients on losses of their own; ambiguity, mean member and weights by direction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nqm
from nqm import (
    EMA,
    SGD,
    Federated,
    HeavyBall,
    LeastSquares,
    NQMError,
    Problem,
    Soup,
    WeightDecay,
    constant,
)
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, within_error

#: Losses of three clients: curvature, noise and minimum, by direction.
CURVATURE = np.array([[1.0, 0.1], [0.4, 0.5], [1.6, 0.0]])
NOISE = np.array([[0.3, 0.2], [1.0, 0.1], [0.0, 0.4]])
MINIMUM = np.array([[1.0, -1.0], [-2.0, 0.5], [0.5, 3.0]])
SHARES = np.array([0.5, 0.2, 0.3])
RATES, STEPS = (0.2, 0.5, 0.4), (7, 12, 5)


def mean_loss(shares=SHARES, **fields):
    """The clients' mean loss as a problem: curvature sum p h, minimum sum p h m / sum p h."""
    curved = shares[:, None] * CURVATURE
    return Problem(
        curved.sum(0), 0.1, minimum=(curved * MINIMUM).sum(0) / curved.sum(0), **fields
    )  # fmt: skip


def client(k, **fields):
    return Problem(CURVATURE[k], NOISE[k], minimum=MINIMUM[k], **fields)


def clients(steps=STEPS):
    return [
        (client(k), constant(SGD(), lr, t, batch_size=2))
        for k, (lr, t) in enumerate(zip(RATES, steps, strict=True))
    ]


TARGET = mean_loss(initial_mean=[0.7, -0.4], initial_variance=[0.5, 2.0])


def test_moments_written_out():
    """x_k = m_k + r_k (x_0 - m_k) + noise q_k about the target's minimum, entry by entry."""
    soup = Soup.of_clients(TARGET, clients())
    h, start = TARGET.curvature, TARGET.initial_variance
    r = np.array([(1 - lr * c) ** t for lr, t, c in zip(RATES, STEPS, CURVATURE, strict=True)])
    away = MINIMUM - TARGET.minimum
    place = r * TARGET.initial_mean + (1 - r) * away
    noise = [
        literal.sgd_moment(CURVATURE[k], NOISE[k], RATES[k], 2, 0.0, STEPS[k]) for k in range(2)
    ]
    noise.append(np.array([0.0, 0.4**2 * 0.4 / 2 * 5]))  # no noise; a walk in a flat direction
    expected = np.einsum("d,id,jd->ij", h / 2, place, place)
    expected += np.einsum("d,id,jd,d->ij", h / 2, r, r, start)
    expected += np.diag(np.array(noise) @ (h / 2))
    agree(soup.moment, expected, IDENTITY)
    # The clients' own start is not looked at.
    elsewhere = [(p.replace(initial_mean=9.0, initial_variance=0.0), run) for p, run in clients()]
    np.testing.assert_array_equal(Soup.of_clients(TARGET, elsewhere).moment, soup.moment)


def test_against_the_literal_simulation():
    """Clients with methods of their own, one pulled to the origin of weight space."""
    rng, replicas = np.random.default_rng(8), 20_000
    sd = np.sqrt(TARGET.initial_variance)
    x0 = TARGET.initial_mean + sd * rng.standard_normal((replicas, 2))
    away = MINIMUM - TARGET.minimum
    runs = [HeavyBall(0.5), EMA(SGD(), 0.8), WeightDecay(SGD(), 0.2)]
    ends = [
        literal.heavy_ball(CURVATURE[0], NOISE[0], x0 - away[0], 0.2, 1, 9, rng, momentum=0.5)[-1],
        literal.ema(CURVATURE[1], NOISE[1], x0 - away[1], 0.3, 1, 9, rng, beta=0.8)[-1],
        literal.weight_decay(
            CURVATURE[2], NOISE[2], x0 - away[2], 0.2, 1, 9, rng, decay=0.2, anchor=-MINIMUM[2]
        )[-1],
    ]
    soup = Soup.of_clients(
        TARGET,
        [(client(k), constant(run, 0.3 if k == 1 else 0.2, 9)) for k, run in enumerate(runs)],
    )
    x = np.array(ends) + away[:, None]
    losses = np.tensordot(SHARES, x, 1) ** 2 @ TARGET.weight
    within_error(losses.mean(), soup.loss(SHARES), losses.std() / np.sqrt(replicas))
    member = np.tensordot(SHARES, x**2 @ TARGET.weight, 1)
    within_error(member.mean(), soup.member_loss(SHARES), member.std() / np.sqrt(replicas))
    apart = member - losses
    within_error(apart.mean(), soup.ambiguity(SHARES), apart.std() / np.sqrt(replicas))


def test_a_round_of_federated_training_is_a_soup_of_clients(problem):
    placed = problem.replace(minimum=[1.0, -2.0, 0.5])
    curvatures, shifts = (0.4, 1.0, 1.6), (2.0, -0.8, 0.0)
    soup = Soup.of_clients(placed, [
        (placed.replace(curvature=c * placed.curvature, minimum=(1 + s) * placed.minimum),
         constant(HeavyBall(0.6), 0.3, 5, batch_size=2))
        for c, s in zip(curvatures, shifts, strict=True)
    ])  # fmt: skip
    federated = Federated(3, 5, HeavyBall(0.6), curvatures=curvatures, shifts=shifts)
    whole = nqm.solve(placed, constant(federated, 0.3, 5, batch_size=2), [5])
    agree_each(soup.loss(soup.uniform()), whole.loss[0], IDENTITY)


def test_clients_that_share_the_target_are_runs(problem):
    runs = [constant(SGD(), lr, t) for lr, t in zip(RATES, STEPS, strict=True)]
    soup = Soup.of_clients(problem, [(problem, run) for run in runs])
    agree_each(soup.moment, Soup.of_runs(problem, runs).moment, IDENTITY)
    # And equal curvatures leave the shares as the weights.
    for other in (soup, Soup.of_runs(problem, runs)):
        agree_each(other.curvature_weighted(SHARES), np.tile(SHARES, (3, 1)), IDENTITY)


# ------------------------------------------------------------------ curvature weights


def test_curvature_weights_remove_the_bias_of_converged_clients():
    """Plain means settle at sum p m, weights p h at the minimum of the summed loss."""
    curved = np.maximum(CURVATURE, 0.01)  # none flat, so that all converge
    pull = SHARES[:, None] * curved
    minimum = (pull * MINIMUM).sum(0) / pull.sum(0)
    target = Problem(pull.sum(0), 0.1, minimum=minimum, initial_variance=4.0)
    soup = Soup.of_clients(
        target,
        [
            (Problem(curved[k], 0.0, minimum=MINIMUM[k]), constant(SGD(), 0.6, 10**5))
            for k in range(3)
        ],
    )
    bias = 0.5 * target.curvature @ (SHARES @ MINIMUM - minimum) ** 2
    assert bias > 0.05
    agree_each(soup.loss(SHARES), bias, JUMP)
    agree_each(soup.curvature_weighted(SHARES), (pull / pull.sum(0)).T, IDENTITY)
    assert soup.loss(soup.curvature_weighted(SHARES)) < 1e-28


def test_a_flat_client_has_no_say_and_a_flat_direction_the_shares():
    flat = Problem([1.0, 0.0], 0.1)
    soup = Soup.of_clients(flat, [
        (flat.replace(curvature=h), constant(SGD(), 0.1, 3))
        for h in ([1.0, 0.0], [3.0, 0.0], [0.0, 0.0])
    ])  # fmt: skip
    agree_each(soup.curvature_weighted(), [[0.25, 0.75, 0.0], [1 / 3] * 3], IDENTITY)
    p = np.array([2.0, 1.0, 5.0])  # normalised
    agree_each(soup.curvature_weighted(p), [[0.4, 0.6, 0.0], p / 8], IDENTITY)


def test_more_clients_do_not_remove_the_bias():
    """Copies of two clients average their noise away, and not the distance of their mean."""
    target = Problem([1.0], [1.0], initial_variance=0.0)
    pair = [(Problem([0.5], [1.0], minimum=3.0), constant(SGD(), 0.5, 200)),
            (Problem([1.5], [1.0], minimum=-1.0), constant(SGD(), 0.5, 200))]  # fmt: skip
    many = Soup.of_clients(target, pair * 50)
    bias = 0.5 * 1.0**2  # of the mean place, (3 - 1) / 2, from sum h m = 0
    noise = 0.5 * sum(0.5 / (h * (2 - 0.5 * h)) for h in (0.5, 1.5)) * 50 / 100**2
    agree_each(many.loss(many.uniform()), bias + noise, JUMP)
    assert many.loss(many.curvature_weighted()) < 0.02 < bias


# ------------------------------------------------------------------ invariants

finite = st.floats(-3.0, 3.0)
shares_of_three = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).filter(
    lambda w: sum(w) > 0.1
)


@given(
    weights=st.lists(finite, min_size=3, max_size=3).filter(lambda w: abs(sum(w)) > 0.3),
    steps=st.lists(st.integers(0, 40), min_size=3, max_size=3),
)
def test_loss_is_mean_member_less_ambiguity(weights, steps):
    w = np.array(weights) / sum(weights)
    soup = Soup.of_clients(TARGET, clients(steps))
    by_direction = np.stack([w, w[::-1]])
    for given_weights in (w, by_direction):
        parts = soup.member_loss(given_weights), soup.ambiguity(given_weights)
        scale = np.abs(w).sum() ** 2 * np.abs(soup.moment).max()
        assert soup.loss(given_weights) == pytest.approx(
            parts[0] - parts[1], abs=IDENTITY * scale, rel=IDENTITY
        )
    agree_each(soup.member_loss(w), w @ np.diag(soup.moment), 1e-10)  # signs cancel
    # Equal rows are weights for all directions.
    agree_each(soup.loss(np.stack([w, w])), soup.loss(w), 1e-10)


@given(weights=shares_of_three, order=st.permutations(range(3)))
def test_convex_weights_never_lose_and_the_order_does_not_matter(weights, order):
    w = np.array(weights) / sum(weights)
    soup = Soup.of_clients(TARGET, clients())
    assert soup.ambiguity(w) >= 0.0
    assert soup.loss(w) <= soup.member_loss(w) * (1 + IDENTITY)
    other = Soup.of_clients(TARGET, [clients()[k] for k in order])
    for name in ("loss", "member_loss", "ambiguity"):
        agree_each(getattr(other, name)(w[list(order)]), getattr(soup, name)(w), JUMP)
    agree_each(other.curvature_weighted(w[list(order)]),
               soup.curvature_weighted(w)[:, list(order)], IDENTITY)  # fmt: skip


def test_one_ingredient_of_weight_1_is_itself():
    soup = Soup.of_clients(TARGET, clients())
    for k in range(3):
        alone = np.eye(3)[k]
        assert soup.loss(alone) == soup.moment[k, k]
        assert soup.ambiguity(alone) == 0.0
        agree_each(soup.member_loss(alone), soup.moment[k, k], IDENTITY)


def test_defaults_are_the_uniform_soup():
    soup = Soup.of_clients(TARGET, clients())
    assert soup.ambiguity() == soup.ambiguity(soup.uniform())
    assert soup.member_loss() == soup.member_loss(soup.uniform())
    agree_each(soup.member_loss(), np.trace(soup.moment) / 3, IDENTITY)


def test_ambiguity_keeps_its_digits_where_ingredients_are_nearly_equal():
    """Two runs a million apart from the minimum in common and 1e-10 apart from one another."""
    far = Problem([1.0], [1e-20], initial_mean=1e6, initial_variance=0.0)
    soup = Soup.of_runs(far, [constant(SGD(), 1e-3, 1)] * 2)
    # E of h/2 (x_1 - x_2)^2 / 4, Var x = lr^2 v.
    agree_each(soup.ambiguity(), 0.5 * 2e-26 / 4, IDENTITY)
    # The difference of the two losses, each 5e11, knows nothing of it.
    assert not 1e-27 < soup.member_loss() - soup.loss(soup.uniform()) < 1e-26


# ------------------------------------------------------------------ stars and snapshots


def transient(a, q, s0, members):
    """Losses of a chain and of a star from E x^2 = s0, h = 2, by the sums of the definitions."""
    s = [a * a * s0 + q]
    for _ in range(members - 1):
        s.append(a * a * s[-1] + q)
    chain = sum(
        a ** abs(j - i) * s[min(i, j)] for i in range(members) for j in range(members)
    )  # fmt: skip
    s1, m = s[0], members
    star = s1 + (m - 1) * (2 * a * s1 + a * a * s1 + q) + (m - 1) * (m - 2) * a * a * s1
    return chain / m**2, star / m**2


@given(
    a=st.floats(0.0, 0.99),
    above=st.floats(0.0, 50.0),
    members=st.integers(1, 7),
)
def test_a_star_is_never_better_than_snapshots_from_above_the_floor(a, above, members):
    """StarSSE >= SSE while the loss descends; at the floor they are equal up to three members."""
    lr, h = (1 - a) / 2.0, 2.0
    floor = lr**2 / (1 - a**2)
    start = (1.0 + above) * floor
    problem = Problem([h], [1.0], initial_variance=start)
    soups = [
        make(problem, constant(SGD(), lr, 1), members) for make in (Soup.of_snapshots, Soup.of_star)
    ]
    chain, star = (soup.loss(soup.uniform()) for soup in soups)
    agree_each([chain, star], transient(a, lr**2, start, members), 1e-10)
    assert star >= chain * (1 - IDENTITY)
    # A star's ambiguity is its mean member less the soup.
    s1 = a * a * start + lr**2
    member = (s1 + (members - 1) * (a * a * s1 + lr**2)) / members
    scale = max(member, 1e-300)
    assert soups[1].ambiguity() == pytest.approx(member - star, abs=1e-10 * scale)


def test_below_the_floor_a_star_is_the_better_one():
    """From the minimum itself a chain climbs on: (S_1 - S_2)(a^2 + 2 a) / M^2 at M = 3."""
    settled = Problem([2.0], [1.0], initial_variance=0.0)
    cycle = constant(SGD(), 0.2, 1)
    chain, star = (
        soup.loss(soup.uniform())
        for soup in (Soup.of_snapshots(settled, cycle, 3), Soup.of_star(settled, cycle, 3))
    )
    a, q = 0.6, 0.04
    agree_each(star - chain, (q - (a * a * q + q)) * (a * a + 2 * a) / 9, JUMP)


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Soup.of_clients(TARGET, []), r"list of \(problem, program\); got \[\]"),
        (lambda: Soup.of_clients(TARGET, TARGET), r"list of \(problem, program\)"),
        (lambda: Soup.of_clients(None, clients()), "must be a Problem; got None"),
        (lambda: Soup.of_clients(LeastSquares([1.0, 0.1], 0.1), clients()), "the target needs"),
        (lambda: Soup.of_clients(TARGET, [client(0)]), r"client 0 must be \(problem, program\)"),
        (lambda: Soup.of_clients(TARGET, [(client(0), None)]), "program"),
        (lambda: Soup.of_clients(TARGET, [*clients(), (Problem([1.0], 1.0), clients()[0][1])]),
         "client 3 has 1 directions, the target 2"),
        (lambda: Soup.of_clients(TARGET, [(client(0, multiplicity=2.0), clients()[0][1])]),
         "client 0 must have the target's multiplicity"),
        (lambda: Soup.of_clients(TARGET.replace(expected_losses_only=True), clients()),
         "quadrature nodes"),
        (lambda: Soup.of_clients(
            TARGET, [(client(0, noise_correlation=np.full((2, 2), 0.5) + np.eye(2) / 2),
                      clients()[0][1])]), "client 0 has correlated noise"),
        (lambda: Soup.of_clients(TARGET, [(client(0), constant(SGD(), 9.0, 5000))]), "diverges"),
        (lambda: Soup.of_clients(TARGET, clients()).ambiguity([0.5, 0.2, 0.2]), "sum to 1"),
        (lambda: Soup.of_clients(TARGET, clients()).ambiguity([0.5, 0.5]),
         r"shape \(3,\), or \(2, 3\) for weights by direction; got \(2,\)"),
        (lambda: Soup.of_clients(TARGET, clients()).member_loss(np.full((3, 2), 0.5)), "shape"),
        (lambda: Soup.of_clients(TARGET, clients()).curvature_weighted([1.0]), r"shape \(3,\)"),
        (lambda: Soup.of_clients(TARGET, clients()).curvature_weighted([1.0, -1.0, 0.0]), ">= 0"),
        (lambda: Soup.of_clients(TARGET, clients()).curvature_weighted([0.0] * 3), "not all 0"),
        (lambda: Soup.of_clients(TARGET, clients()).curvature_weighted([np.nan, 1, 1]),
         "shares must hold finite numbers"),
        (lambda: Soup.of_clients(TARGET, clients()).loss("equal"), "weights must hold finite"),
        (lambda: Soup.of_clients(TARGET, clients()).member_loss(np.inf), "weights must"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, words):
    with pytest.raises(NQMError, match=words):
        make()

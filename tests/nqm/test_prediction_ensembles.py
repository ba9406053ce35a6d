"""Ensembles of predictions against quadrature of a classifier; rounding against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nqm import NQMError, Problem
from nqm.prediction_ensembles import (
    ROUNDINGS,
    PredictionEnsemble,
    rounding_cost,
    rounding_error,
)
from tests.tolerances import IDENTITY, agree_each, within_error

# ------------------------------------------------------------------ a classifier of two weights

INPUTS = np.random.default_rng(4).standard_normal((12, 2))
#: Labels that no line separates, so that curvature and gradients differ.
LABELS = np.array([1, -1, 1, 1, -1, 1, -1, -1, 1, 1, -1, 1])
WEIGHTS = np.array([0.8, -0.5])
ROOT = np.array([[1.0, 0.0], [0.4, 0.7]])  # e = size * ROOT n, n standard normal


def margins(w):
    return LABELS * (w @ INPUTS.T)


def loss(w):
    """Mean logistic loss, cross-entropy of two classes, at weights (..., 2)."""
    return np.logaddexp(0.0, -margins(w)).mean(axis=-1)


def traces(size):
    """tr(HS) and tr(FS) from the textbook Hessian and gradients of logistic regression."""
    p = 1 / (1 + np.exp(-margins(WEIGHTS)))
    gradients = -(LABELS * (1 - p))[:, None] * INPUTS
    hessian = (INPUTS * (p * (1 - p))[:, None]).T @ INPUTS / len(INPUTS)
    uncentred = gradients.T @ gradients / len(INPUTS)
    s = size**2 * ROOT @ ROOT.T
    return np.trace(hessian @ s), np.trace(uncentred @ s)


def expected(size, members):
    """Mean member, mean of weights and of predictions, by Gauss-Hermite quadrature."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(7)
    weight = weight / weight.sum()
    draws = np.array(list(itertools.product(nodes, repeat=2 * members)))
    chance = np.array(list(itertools.product(weight, repeat=2 * members))).prod(axis=1)
    w = WEIGHTS + size * draws.reshape(-1, members, 2) @ ROOT.T
    probability = 1 / (1 + np.exp(-margins(w)))
    return (
        chance @ loss(w).mean(axis=1),
        chance @ loss(w.mean(axis=1)),
        chance @ -np.log(probability.mean(axis=1)).mean(axis=-1),
    )


@pytest.mark.parametrize("members", [1, 2])
def test_the_law_is_the_leading_order_of_the_exact_losses(members):
    """Halving the errors leaves a sixteenth of what the law misses, which is of fourth order."""
    left = []
    for size in (0.1, 0.05):
        law = PredictionEnsemble(float(loss(WEIGHTS)), *traces(size))
        stated = law.member_loss, law.weight_mean_loss(members), law.ensemble_loss(members)
        exact = expected(size, members)
        np.testing.assert_allclose(np.array(stated) - law.loss, np.array(exact) - law.loss,
                                   rtol=3 * size**2, atol=3 * size**4)  # fmt: skip
        left.append(np.abs(np.array(exact) - stated))
    # The sixth order is a few parts in a hundred of the fourth.
    agree_each(left[0] / left[1], np.full(3, 16.0), 0.05)


def test_many_members_by_monte_carlo():
    """Eight members; errors enter with both signs, which removes their odd orders from the mean."""
    size, members, replicas = 0.05, 8, 20_000
    law = PredictionEnsemble(float(loss(WEIGHTS)), *traces(size))
    normal = np.random.default_rng(7).standard_normal((replicas, members, 2))
    both = []
    for sign in (1, -1):
        w = WEIGHTS + sign * size * normal @ ROOT.T
        probability = 1 / (1 + np.exp(-margins(w)))
        ensemble = -np.log(probability.mean(axis=1)).mean(axis=-1)
        member = loss(w).mean(axis=1)
        both.append([member, ensemble, member - ensemble, loss(w.mean(axis=1))])
    drawn = np.mean(both, axis=0) - np.array([law.loss, law.loss, 0.0, law.loss])[:, None]
    stated = [
        law.member_loss - law.loss, law.ensemble_loss(8) - law.loss, law.ambiguity(8),
        law.weight_mean_loss(8) - law.loss,
    ]  # fmt: skip
    fourth = 4 * size**2 * np.abs(stated)  # 1 %, for what is of fourth order
    gap = np.maximum(np.abs(drawn.mean(axis=1) - stated) - fourth, 0.0)
    within_error(gap, np.zeros(4), drawn.std(axis=1) / np.sqrt(replicas))


def test_a_calibrated_model_gains_nothing_and_an_overconfident_one_does():
    """Labels drawn by the model itself: F = H (Bartlett). By a model of half the logits: F > H."""
    z = INPUTS @ WEIGHTS
    for sureness, gains in ((1.0, False), (0.5, True)):
        chance, p = 1 / (1 + np.exp(-sureness * z)), 1 / (1 + np.exp(-z))
        # Second moment of the gradient (p - y) x over y ~ Bernoulli(chance).
        square = chance * (1 - p) ** 2 + (1 - chance) * p**2
        f, h = (np.mean(a * (INPUTS**2).sum(axis=1)) for a in (square, p * (1 - p)))
        assert (f > h * (1 + IDENTITY)) == gains
        law = PredictionEnsemble(1.0, float(h), float(f))
        assert (law.break_even < 1000) == gains


positive = st.floats(1e-3, 10.0)


@given(loss=positive, hessian=positive, gradient=st.floats(0.0, 10.0), members=st.integers(1, 50))
def test_an_ensemble_gains_beyond_break_even_and_only_there(loss, hessian, gradient, members):
    law = PredictionEnsemble(loss, hessian, gradient)
    if abs(members - law.break_even) > 1e-6 * members:
        assert (law.ensemble_loss(members) < loss) == (members > law.break_even)
    assert law.member_loss - law.ensemble_loss(members) == pytest.approx(
        law.ambiguity(members), abs=1e-12 * (loss + hessian + gradient)
    )
    assert law.weight_mean_loss(members) > loss  # a mean of weights never gains
    assert law.ensemble_loss(1) == law.weight_mean_loss(1) == law.member_loss


def test_break_even_by_hand():
    assert PredictionEnsemble(1.0, 1.0, 4.0).break_even == pytest.approx(4 / 3)  # so from K = 2 on
    assert PredictionEnsemble(1.0, 3.0, 4.0).break_even == 4.0
    assert PredictionEnsemble(1.0, 3.0, 4.0).ensemble_loss(4) == 1.0
    for never in ((1.0, 1.0), (2.0, 1.0), (0.0, 0.0)):
        assert PredictionEnsemble(1.0, *never).break_even == np.inf
    assert PredictionEnsemble(1.0, 0.0, 1.0).break_even == 1.0
    assert PredictionEnsemble(1.0, -1.0, 1.0).break_even < 1.0  # one member gains already


# ------------------------------------------------------------------ rounding


def rounded(kind, f, members, replicas, rng):
    """Mean error of copies of the number f, rounded to whole numbers, from the definitions."""
    shape = (replicas, members)
    if kind == "nearest":
        return np.full(replicas, np.round(f) - f)
    if kind == "gaussian":
        return (np.sqrt(f * (1 - f)) * rng.standard_normal(shape)).mean(axis=1)
    u = rng.random(shape)
    if kind == "antithetic":
        u[:, 1::2] = 1 - u[:, ::2]
    return ((u < f) - f).mean(axis=1)


@pytest.mark.parametrize(
    ("kind", "members"),
    [(kind, k) for kind in ROUNDINGS for k in (1, 2, 6) if kind != "antithetic" or k > 1],
)
@pytest.mark.parametrize("f", [0.0, 0.2, 0.7])
def test_rounding_errors_are_those_of_rounding(kind, members, f):
    error = rounded(kind, f, members, 40_000, np.random.default_rng(1)) ** 2
    # (Nearest rounding draws nothing, and rounds in the last digit.)
    standard_error = error.std() / 200 + 1e-14
    within_error(error.mean(), rounding_error(kind, members, f), standard_error)


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_mean_over_a_cell(kind):
    """Spread evenly: the integral over f from 0 to 1, by Gauss's rule on both halves."""
    nodes, weight = np.polynomial.legendre.leggauss(3)
    f = np.concatenate([(nodes + 1) / 4, (nodes + 3) / 4])
    mean = np.tile(weight / 4, 2) @ rounding_error(kind, 2, f)
    agree_each(rounding_error(kind, 2), mean, IDENTITY)


def test_costs_of_the_table():
    """tr(H) D^2 / 12, / 24 and / 48 for an antithetic pair, on a problem whose weights are many."""
    h, pitch = np.array([3.0, 1.0, 0.5]), 0.1
    unit = h.sum() * pitch**2
    agree_each(rounding_cost(h.sum(), pitch, "stochastic"), unit / 12, IDENTITY)
    agree_each(rounding_cost(h, pitch, "gaussian", 3), unit / 36, IDENTITY)
    agree_each(rounding_cost(h, pitch, "nearest"), unit / 24, IDENTITY)
    agree_each(rounding_cost(h, pitch, "antithetic", 2), unit / 48, IDENTITY)
    # Two independent copies cost what one nearest does, and no more copies of the nearest help.
    agree_each(rounding_cost(h, pitch, "stochastic", 2), unit / 24, IDENTITY)
    agree_each(rounding_cost(h, pitch, "nearest", 9), unit / 24, IDENTITY)


def test_cost_of_given_weights_by_monte_carlo():
    """Each weight at its own place of its own grid, against the loss of rounded weights."""
    rng, replicas = np.random.default_rng(5), 20_000
    problem = Problem([3.0, 1.0, 0.5], 1.0)
    w, pitch = np.array([0.43, -0.91, 0.08]), np.array([0.1, 0.4, 0.25])
    f = w / pitch % 1
    for kind, members in (("stochastic", 3), ("nearest", 1), ("antithetic", 4), ("gaussian", 2)):
        errors = [rounded(kind, fraction, members, replicas, rng) for fraction in f]
        loss = (pitch * np.stack(errors, axis=1)) ** 2 @ problem.weight
        cost = rounding_cost(problem.curvature, pitch, kind, members, f)
        within_error(loss.mean(), cost, loss.std() / np.sqrt(replicas))


@given(members=st.integers(1, 8), bits=st.integers(2, 8), h=positive)
def test_copies_never_beat_one_model_of_the_same_memory(members, bits, h):
    """K models of b bits against one of K b bits, rounded to the nearest of its finer grid."""
    pitch = 2.0 / (2**bits - 2)  # of weights in [-1, 1]
    finer = 2.0 / (2 ** (members * bits) - 2)
    one = rounding_cost(h, finer, "nearest")
    for kind in ("stochastic", "gaussian", "nearest"):
        assert rounding_cost(h, pitch, kind, members) >= one
    if members % 2 == 0:
        assert rounding_cost(h, pitch, "antithetic", members) >= one


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: PredictionEnsemble(np.nan, 1.0, 1.0),
            r"PredictionEnsemble\.loss must be a finite",
        ),
        (lambda: PredictionEnsemble(1.0, 1.0, -1.0), r"PredictionEnsemble\.gradient_trace must"),
        (lambda: PredictionEnsemble(1.0, 1.0, 1.0).ensemble_loss(0), "members must be an integer"),
        (lambda: PredictionEnsemble(1.0, 1.0, 1.0).weight_mean_loss(1.5), "members must be"),
        (lambda: rounding_error("up"), "rounding 'up' is unknown"),
        (lambda: rounding_error("antithetic", 3), "members must be even"),
        (lambda: rounding_error("nearest", 1, 1.2), r"fraction must lie in \[0, 1\]; got 1.2"),
        (lambda: rounding_cost([1.0, np.nan], 0.1, "nearest"), "curvature must hold finite"),
        (lambda: rounding_cost(1.0, -0.1, "nearest"), "pitch must be >= 0; got -0.1"),
        (
            lambda: rounding_cost(1.0, "fine", "nearest"),
            "pitch must hold finite",
        ),
        (lambda: rounding_error("nearest", 1, [0.1, None]), "fraction must hold finite numbers"),
        (lambda: rounding_cost([1.0, 2.0], [0.1] * 3, "nearest"), r"one shape; got \(2,\), \(3,\)"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(NQMError, match=words):
        make()

"""Extraction against printed matrices, and composition against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov

from nqm import EMA, LAWA, SGD, SWA, Ensemble, HeavyBall, LatePhase, Lookahead, Nesterov
from nqm.solvers._kernels.powers import compose_exact, power, stationary
from nqm.transition import (
    embedding,
    extract,
    member_readout,
    minibatches,
    noise_moment,
    readout,
    spectral_radius,
)
from tests.tolerances import IDENTITY, JUMP, agree, agree_each

H, LR, MU, BETA, ALPHA = 0.7, 0.3, 0.8, 0.6, 0.4
R = 1 - LR * H

PRINTED = {
    "sgd": (SGD(), [[R]], [[-LR]]),
    # Here b' = mu b + g and x' = x - lr b' (THEORY 1, heavy ball).
    "heavy_ball": (HeavyBall(MU), [[R, -LR * MU], [H, MU]], [[-LR], [1]]),
    "nesterov": (
        Nesterov(MU),
        [[1 - LR * H * (1 + MU), -LR * MU**2], [H, MU]],
        [[-LR * (1 + MU)], [1]],
    ),
    "ema": (
        EMA(SGD(), BETA),
        [[R, 0], [(1 - BETA) * R, BETA]],
        [[-LR], [-LR * (1 - BETA)]],
    ),
    "swa": (SWA(), [[R, 0], [R, 1]], [[-LR], [-LR]]),
    "lawa": (LAWA(SGD(), 1, 2), [[R, 0, 0], [R, 0, 0], [0, 1, 0]], [[-LR], [-LR], [0]]),
    "lookahead at a sync": (
        Lookahead(SGD(), 1, ALPHA),
        [[ALPHA * R, 1 - ALPHA], [ALPHA * R, 1 - ALPHA]],
        [[-ALPHA * LR], [-ALPHA * LR]],
    ),
    "ensemble": (Ensemble(2), [[R, 0], [0, R]], [[-LR, 0], [0, -LR]]),
}


@pytest.mark.parametrize("name", PRINTED)
def test_printed_matrices(name):
    algorithm, matrix, noise = PRINTED[name]
    step = extract(algorithm, [H], LR)
    agree(step.matrix[0], matrix, IDENTITY)
    agree(step.noise[0], noise, IDENTITY)


@pytest.mark.parametrize("minibatch", ["own", "shared"])
def test_printed_matrices_of_late_phase(minibatch):
    """State (theta, phi_1, phi_2): theta' = theta - lr gamma sum g, phi' = phi - member_lr g."""
    gamma, member_lr = 0.5, 0.1
    step = extract(LatePhase(2, gamma, minibatch), [H], (LR, member_lr))
    b, a = LR * gamma, member_lr
    matrix = [[1 - 2 * b * H, -b * H, -b * H], [-a * H, 1 - a * H, 0], [-a * H, 0, 1 - a * H]]
    noise = [[-b, -b], [-a, 0], [0, -a]] if minibatch == "own" else [[-2 * b], [-a], [-a]]
    agree(step.matrix[0], matrix, IDENTITY)
    agree(step.noise[0], noise, IDENTITY)
    # Exact invariant of THEORY 1.1: member_lr theta - gamma K lr mean(phi).
    invariant = np.array([a, -b, -b])
    agree(invariant @ step.matrix[0], invariant, IDENTITY)
    assert np.abs(invariant @ step.noise[0]).max() < 1e-17


def test_lookahead_between_syncs_leaves_the_slow_weights():
    step = extract(Lookahead(SGD(), 3, ALPHA), [H], LR, t=1)
    agree(step.matrix[0], [[R, 0], [0, 1]], IDENTITY)
    agree(step.noise[0], [[-LR], [0]], IDENTITY)


def test_minibatches_are_counted_by_running_the_update():
    counts = {
        SGD(): 1, Nesterov(0.5): 1, Ensemble(5): 5, LatePhase(4, gamma="mean"): 4,
        LatePhase(4, "mean", minibatch="shared"): 1, EMA(Ensemble(3)): 3, Lookahead(SGD(), 7): 1,
    }  # fmt: skip
    for algorithm, count in counts.items():
        assert minibatches(algorithm) == count


def test_embedding_says_how_a_phase_starts():
    draws, normals = embedding(LatePhase(2, spread=0.25, gamma="mean"))
    assert draws.tolist() == [[1.0], [0.0], [0.0]]
    assert normals.tolist() == [[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]]
    draws, normals = embedding(Ensemble(2, HeavyBall(0.5), "own"))
    assert draws.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert normals.shape == (4, 0)
    draws, _ = embedding(EMA(Ensemble(2)))
    assert draws.tolist() == [[1.0]] * 4


def test_readouts():
    assert readout(LatePhase(2, gamma="mean"), 5).tolist() == [1.0, 0.5, 0.5]
    assert member_readout(LatePhase(2, gamma="mean"), 5).tolist() == [
        [1.0, 1.0, 0.0],
        [1.0, 0.0, 1.0],
    ]
    assert member_readout(SGD(), 5).shape == (0, 1)
    swa = SWA(SGD(), 3)
    assert [readout(swa, t).tolist() for t in (0, 2, 3, 8, 9)] == [
        [1, 0], [1, 0], [0, 1], [0, 0.5], [0, 1 / 3],
    ]  # fmt: skip


def test_noise_moment():
    step = extract(Ensemble(2), [H, 2 * H], LR)
    expected = [np.eye(2) * LR**2 * 3.0, np.eye(2) * LR**2 * 5.0]
    agree(noise_moment(step, [3.0, 5.0]), expected, IDENTITY)


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_spectral_radius_of_heavy_ball(mu):
    """Complex roots of z^2 - (1 + mu - lr h) z + mu between (1 -+ sqrt(mu))^2: radius sqrt(mu)."""
    inside = np.linspace((1 - np.sqrt(mu)) ** 2, (1 + np.sqrt(mu)) ** 2, 7)[1:-1]
    radius = spectral_radius(extract(HeavyBall(mu), inside, 1.0).matrix)
    agree_each(radius, np.full(5, np.sqrt(mu)), IDENTITY)
    beyond = np.array([2 * (1 + mu)])
    agree_each(spectral_radius(extract(HeavyBall(mu), beyond, 1.0).matrix), [1.0], 1e-12)


def test_spectral_radius_of_an_overflow_is_infinite():
    matrix = np.array([[[0.5, 0.0], [0.0, -0.25]], [[np.inf, 0.0], [0.0, 0.0]], [[np.nan] * 2] * 2])
    assert spectral_radius(matrix).tolist() == [0.5, np.inf, np.inf]
    assert spectral_radius(np.array([[[-3.0]]])).tolist() == [3.0]


@st.composite
def chains(draw):
    """A contraction A and Q = C C' for a few directions, from a seed."""
    d, n = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    matrix = rng.standard_normal((d, n, n))
    matrix *= draw(st.floats(0.1, 0.99)) / np.linalg.norm(matrix, 2, axis=(1, 2))[:, None, None]
    c = rng.standard_normal((d, n, 2))
    return matrix, c @ c.swapaxes(1, 2)


@given(chains(), st.integers(0, 40))
def test_power_is_repetition(chain, steps):
    matrix, noise = chain
    many, added = np.empty_like(matrix), np.empty_like(noise)
    power(matrix, noise, steps, many, added)
    total = np.zeros_like(noise)
    for j in range(steps):
        a = np.linalg.matrix_power(matrix, j)
        total += a @ noise @ a.swapaxes(1, 2)
    agree(many, np.linalg.matrix_power(matrix, steps), 1e-11)
    agree(added, total, 1e-11)


@given(chains(), chains())
def test_composition_is_the_affine_product(first, second):
    if first[0].shape != second[0].shape:
        return
    (a1, q1), (a2, q2) = first, second
    a, q, low, none = np.empty_like(a1), np.empty_like(q1), np.empty_like(a1), np.zeros_like(a1)
    compose_exact(a1, q1, none, a2, q2, none, a, q, low)
    agree(a, a2 @ a1, IDENTITY)
    agree(q, a2 @ q1 @ a2.swapaxes(1, 2) + q2, IDENTITY)


@given(chains())
def test_stationary_solves_the_lyapunov_equation(chain):
    matrix, noise = chain
    found = np.empty_like(noise)
    stationary(matrix, noise, found)
    for a, q, s in zip(matrix, noise, found, strict=True):
        agree(s, solve_discrete_lyapunov(a, q), JUMP)
        agree(a @ s @ a.T + q, s, JUMP)

"""Deterministic equivalents of random features: moments, the Marchenko-Pastur law, draws, laws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

import nqm
from nqm import SGD, NQMError, Phase, constant, solve
from nqm.problems.random_features import random_features, random_features_equivalent

#: Error of the quadrature that `random_features_equivalent` accepts is 1e-6 of all eigenvalues.
QUADRATURE = 1e-5
SIZES = [(4, 10), (64, 500), (50, 40), (300, 20_000)]


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.7), (0.4, 0.3)])
@pytest.mark.parametrize(("features", "hidden"), SIZES)
def test_first_moments_are_those_of_sample_covariances(features, hidden, alpha, beta):
    """E tr S^k and E s' S^k s for S = L^(1/2) W W' L^(1/2), to leading order in 1 / features."""
    problem = random_features_equivalent(features, hidden, alpha, beta)
    j = np.arange(1.0, hidden + 1)
    data, m = j ** (-2 * alpha), features
    signal = data * j ** (-2 * beta)
    t1, t2, t3 = (float((data**k).sum()) for k in (1, 2, 3))
    s1, s2 = (float(signal @ data**k) for k in (1, 2))
    count, x = problem.multiplicity, problem.curvature
    assert count.sum() == pytest.approx(min(features, hidden), rel=QUADRATURE)
    assert count @ x == pytest.approx(t1, rel=QUADRATURE)
    assert count @ x**2 == pytest.approx(t2 + t1**2 / m, rel=QUADRATURE)
    assert count @ x**3 == pytest.approx(t3 + 3 * t1 * t2 / m + t1**3 / m**2, rel=QUADRATURE)
    seen = count * x * problem.initial_variance
    assert seen.sum() + problem.label_noise == pytest.approx(signal.sum(), rel=QUADRATURE)
    assert seen @ x == pytest.approx(s1, rel=QUADRATURE)
    assert seen @ x**2 == pytest.approx(s2 + t1 * s1 / m, rel=QUADRATURE)


def test_equal_eigenvalues_have_the_marchenko_pastur_law():
    features, hidden = 30, 60
    problem = random_features_equivalent(features, hidden, 0.0, 0.0)
    ratio = hidden / features
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    assert low < problem.curvature.min() < problem.curvature.max() < high
    # By partial integration with the density sqrt((high - x)(x - low)) / (2 pi x):
    # E 1 / x = 1 / (ratio - 1), and E 1 / x^2 = ratio / (ratio - 1)^3.
    inverse = problem.multiplicity @ problem.curvature**-1 / features
    square = problem.multiplicity @ problem.curvature**-2 / features
    assert inverse == pytest.approx(1 / (ratio - 1), rel=QUADRATURE)
    assert square == pytest.approx(ratio / (ratio - 1) ** 3, rel=QUADRATURE)
    assert problem.label_noise == pytest.approx(hidden - features, rel=QUADRATURE)


def test_misfit_solves_its_equation():
    features, hidden, alpha, beta = 20, 3000, 0.8, 0.6
    j = np.arange(1.0, hidden + 1)
    data = j ** (-2 * alpha)
    k = brentq(lambda k: (data / (data + k)).sum() - features, 1e-9, 1e3, xtol=1e-15, rtol=1e-14)
    misfit = float((data * j ** (-2 * beta) * k / (data + k)).sum())
    found = random_features_equivalent(features, hidden, alpha, beta, label_noise=0.25)
    assert found.label_noise == pytest.approx(0.25 + misfit, rel=1e-4)


def test_draws_scatter_about_it():
    """Losses of 40 draws of W, and their mean within 1 / features of the equivalent."""
    features, hidden, program = 100, 400, constant(SGD(), 0.2, 1000, batch_size=4)
    at = [1, 10, 100, 1000]
    problem = random_features_equivalent(features, hidden, 0.6, 0.3)
    found = solve(problem, program, at).loss + problem.irreducible_loss
    draws = [random_features(features, hidden, 0.6, 0.3, seed=seed) for seed in range(40)]
    losses = np.array([solve(p, program, at).loss + p.irreducible_loss for p in draws])
    error = losses.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(losses.mean(axis=0) - found) < 4 * error + 2 * found / features)


def volterra(forcing, kernel):
    """P(t) = F(t) + sum_(s < t) K(t - 1 - s) P(s), step by step."""
    risk = np.empty_like(forcing)
    for t in range(len(risk)):
        risk[t] = forcing[t] + kernel[:t][::-1] @ risk[:t]
    return risk


def one_step(z, lr, batch_size):
    """Factor of a mode's squared error in a step (Paquette et al. 2024, with lr = gamma B)."""
    return 1.0 - 2.0 * lr * z + lr**2 * (1.0 + 1.0 / batch_size) * z**2


SETTINGS = pytest.mark.parametrize(
    ("features", "hidden", "alpha", "beta"),
    [(50, 200, 1.0, 0.3), (50, 200, 1.0, 0.7), (100, 1000, 0.7, 1.2)],
    ids=["Ia", "II", "III"],
)
AT = [0, 1, 10, 100, 1000]


@SETTINGS
def test_one_draw_solves_the_published_volterra_equation(features, hidden, alpha, beta):
    """Of the risk E (y - W'x)^2 = P, from an eigendecomposition of L^(1/2) W W' L^(1/2)."""
    lr, size = 0.4, 4
    data = np.arange(1.0, hidden + 1) ** (-2 * alpha)
    signal = np.sqrt(data) * np.arange(1.0, hidden + 1) ** -beta
    w = np.random.default_rng(3).standard_normal((hidden, features)) / np.sqrt(features)
    values, basis = np.linalg.eigh(np.sqrt(data)[:, None] * (w @ w.T) * np.sqrt(data))
    powers = one_step(values, lr, size) ** np.arange(1001)[:, None]
    forcing = powers @ (basis.T @ signal) ** 2
    risk = volterra(forcing, lr**2 / size * powers @ values**2)
    problem = random_features(features, hidden, alpha, beta, seed=3)
    run = solve(problem, constant(SGD(), lr, 1000, batch_size=size), AT)
    np.testing.assert_allclose(2 * (run.loss + problem.irreducible_loss), risk[AT], rtol=1e-11)


@SETTINGS
def test_the_equivalent_solves_the_published_volterra_equation(features, hidden, alpha, beta):
    """F and K are contour integrals of the published resolvent, 1 / (j^(-2 alpha) m(z) - z).

    m (1 + 1/d sum_j l_j / (l_j m - z)) = 1 is solved by Newton's method along the upper half of
    the contour, which crosses the real axis left of 0 and right of all eigenvalues.
    """
    lr, size, left, right, steps = 0.4, 4, 2e-4, 2.5, 1001
    data = np.arange(1.0, hidden + 1) ** (-2 * alpha)
    signal = data * np.arange(1.0, hidden + 1) ** (-2 * beta)
    knots = np.concatenate([[0.0], np.geomspace(left, right, 20)])
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = 0.5 * np.diff(knots)
    u = (knots[:-1] + half + nodes[:, None] * half).T.ravel()
    z = u - left + 0.3j * u * (1.0 - u / right)
    dz = (1.0 + 0.3j * (1.0 - 2.0 * u / right)) * (weights[:, None] * half).T.ravel()
    m, resolvent = 1.0 + 0j, np.empty((z.size, hidden), dtype=complex)
    for i in range(z.size - 1, -1, -1):
        for _ in range(60):
            inverse = 1.0 / (data * m - z[i])
            one = 1.0 + data @ inverse / features
            change = (m * one - 1.0) / (one - m * (data**2 @ inverse**2) / features)
            m -= change
            if abs(change) < 1e-15 * abs(m):
                break
        resolvent[i] = 1.0 / (data * m - z[i])
    seen, count = resolvent @ signal, resolvent.sum(axis=1) * z**2
    forcing, kernel, power = np.empty(steps), np.empty(steps), dz / np.pi
    for t in range(steps):
        forcing[t], kernel[t] = (seen @ power).imag, lr**2 / size * (count @ power).imag
        power = power * one_step(z, lr, size)
    assert forcing[0] == pytest.approx(signal.sum(), rel=1e-9)  # the contour encloses all
    problem = random_features_equivalent(features, hidden, alpha, beta)
    run = solve(problem, constant(SGD(), lr, steps - 1, batch_size=size), AT)
    found = 2 * (run.loss + problem.irreducible_loss)
    np.testing.assert_allclose(found, volterra(forcing, kernel)[AT], rtol=1e-6)


#: Exponents of loss and size (Paquette et al. 2024), by the balance of two parts of the loss at
#: C = d t: d^(1 - 2 alpha - 2 beta), t^(-(2 alpha + 2 beta - 1) / (2 alpha)),
#: d^-1 t^(-1 + 1 / (2 alpha)) and t^(-2 + 1 / (2 alpha)).
PUBLISHED = {
    "Ia": (1.0, 0.3, (1 / 3 - 1) * (1 + 0.3 - 0.5), 1 / 3),
    "II": (1.0, 0.7, -(2 * 1.7 - 1) / (2 * 1.7), 0.7 / 1.7),
    "III": (1.0, 1.2, (1 - 4) / 4, 1 / 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_compute_optimal_exponents_are_the_published_ones(name):
    alpha, beta, loss, size = PUBLISHED[name]
    sizes = np.unique(np.geomspace(12, 1200, 8).astype(int)).tolist()
    problems = {m: random_features_equivalent(m, 20_000, alpha, beta) for m in sizes}
    found = nqm.compute_optimal(problems, Phase(SGD(), 0.1, 10**9), [1e5, 3e5, 1e6])
    # Exponents of finite sizes still approach the asymptotic ones.
    assert found.loss_exponent == pytest.approx(loss, abs=0.04)
    assert found.size_exponent == pytest.approx(size, abs=0.03)
    assert set(found.table["features"]) <= set(sizes)
    assert len(found.best) == 3


def test_mistakes_are_named():
    problems = {m: random_features_equivalent(m, 100) for m in (4, 8, 16)}
    phase = Phase(SGD(), 0.1, 100)
    with pytest.raises(NQMError, match="three sizes; got 2"):
        nqm.compute_optimal({4: problems[4], 8: problems[8]}, phase, [10, 100])
    with pytest.raises(NQMError, match="two entries; got 1"):
        nqm.compute_optimal(problems, phase, [100])
    with pytest.raises(NQMError, match="budget 100 the best size is at the end"):
        nqm.compute_optimal(problems, phase, [100, 200])
    with pytest.raises(NQMError, match="no size affords a step within the budget 1"):
        nqm.compute_optimal(problems, Phase(SGD(), 0.1, 10**6), [1, 1000])
    with pytest.raises(NQMError, match="batch size must be constant"):
        nqm.compute_optimal(problems, Phase(SGD(), 0.1, 2, [1, 2]), [10, 100])
    with pytest.raises(NQMError, match=r"random_features_equivalent.features must be"):
        random_features_equivalent(0, 10)
    with pytest.raises(NQMError, match="multiplicity 1"):
        nqm.sample(problems[4], constant(SGD(), 0.1, 3), replicas=2)

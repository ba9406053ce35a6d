"""Optimised schedules: exact gradients, known optima, and nothing better nearby."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import nqm
from nqm import SGD, NQMError, Phase, Problem, Program
from nqm.problems.spectra import harmonic
from nqm.tuning import best_piecewise, equal_pieces, fewest_steps_piecewise, piecewise_loss
from nqm.tuning.grid_search import search
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree_each


@pytest.fixture
def problem() -> Problem:
    rng = np.random.default_rng(2)
    h = harmonic(30)
    return Problem(h, h**0.6, initial_mean=rng.normal(size=30), initial_variance=rng.random(30))


def literal_loss(problem, rates, lengths, batch_size):
    """Step by step, s' = (1 - lr h)^2 s + lr^2 v / B; rates and batch sizes may be complex."""
    h, v = problem.curvature, problem.noise_variance
    s = problem.initial_mean**2 + problem.initial_variance
    sizes = np.broadcast_to(batch_size, np.shape(rates))
    for lr, count, size in zip(rates, lengths, sizes, strict=True):
        for _ in range(count):
            s = (1 - lr * h) ** 2 * s + lr**2 * v / size
    return problem.weight @ s


def complex_steps(loss, at):
    """Gradient of `loss` without cancellation."""
    tiny = 1e-30j * np.eye(at.size)
    return np.array([loss(at + step).imag / 1e-30 for step in tiny])


RATES = np.array([0.4, 1.0, 2.0 - 1e-7, 2.0, 2.2, 1e-9, 0.02])
LENGTHS = np.array([3, 1, 40, 7, 2, 60, 0])
SIZES = np.array([4.0, 1.0, 7.5, 2.0, 0.3, 100.0, 1.0])


def test_gradients_are_the_complex_steps(problem):
    """At u = 1 and u = 2, where the closed form is 0 / 0 or has no logarithm, too."""
    for sizes in (4.0, SIZES):
        loss, by_rate, by_batch = piecewise_loss(problem, RATES, LENGTHS, sizes)
        agree_each(loss, literal_loss(problem, RATES, LENGTHS, sizes), IDENTITY)
        exact = complex_steps(lambda lr, b=sizes: literal_loss(problem, lr, LENGTHS, b), RATES)
        # The slope of the sum is a limit at u = 2 exactly and cancels a little around it.
        np.testing.assert_allclose(by_rate, exact, rtol=1e-8, atol=1e-14)
    exact = complex_steps(lambda b: literal_loss(problem, RATES, LENGTHS, b), SIZES)
    np.testing.assert_allclose(by_batch, exact, rtol=1e-9, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 1.9), st.integers(0, 6), st.floats(0.5, 50.0)),
        min_size=1,
        max_size=6,
    )
)
def test_gradients_of_any_pieces(pieces):
    """One-step pieces alone take a path of their own, which any list of lengths 1 walks."""
    h = harmonic(5)
    problem = Problem(h, 0.3, multiplicity=np.arange(1.0, 6.0), initial_mean=0.5)
    rates, lengths, sizes = (np.array(part) for part in zip(*pieces, strict=True))
    for n in (lengths, np.ones_like(lengths)):
        loss, by_rate, by_batch = piecewise_loss(problem, rates, n, sizes)
        assert loss == pytest.approx(literal_loss(problem, rates, n, sizes), rel=1e-11)
        exact = complex_steps(lambda lr, n=n: literal_loss(problem, lr, n, sizes), rates)
        np.testing.assert_allclose(by_rate, exact, rtol=1e-8, atol=1e-10 * loss)
        exact = complex_steps(lambda b, n=n: literal_loss(problem, rates, n, b), sizes)
        np.testing.assert_allclose(by_batch, exact, rtol=1e-8, atol=1e-10 * loss)


def test_gradient_is_that_of_finite_differences(problem):
    rates, lengths = np.array([0.3, 1.3, 0.7]), np.array([5, 10, 30])
    _, gradient, _ = piecewise_loss(problem, rates, lengths, 4.0)
    for k in range(3):
        ends = [rates + sign * 1e-5 * np.eye(3)[k] for sign in (1, -1)]
        up, down = (piecewise_loss(problem, end, lengths, 4.0)[0] for end in ends)
        assert (up - down) / 2e-5 == pytest.approx(gradient[k], rel=1e-6)


def test_flat_and_slow_directions():
    problem = Problem([1.0, 1e-12, 0.0], [0.5, 0.5, 0.5])
    loss, gradient, _ = piecewise_loss(problem, [0.3, 0.1], [10, 10**6], 1.0)
    program = Program((Phase(SGD(), 0.3, 10), Phase(SGD(), 0.1, 10**6)))
    agree_each(loss, nqm.solve(problem, program, [program.steps]).loss[0], JUMP)
    assert np.isfinite(gradient).all()


def test_one_direction_is_the_kalman_filter():
    """Free rates in one direction: 1 / s' = 1 / s + h^2 / v."""
    h, v, s, steps, batch = 0.5, 2.0, 3.0, 20, 4
    problem = Problem([h], [v], initial_mean=0.0, initial_variance=s)
    found = best_piecewise(problem, steps, steps, batch)
    final = 1.0 / (1.0 / s + steps * h**2 * batch / v)
    agree_each(found.loss, 0.5 * h * final, 1e-9)
    seconds = 1.0 / (1.0 / s + np.arange(steps) * h**2 * batch / v)
    # The optimum is flat: rates are known to the root of the tolerance on the loss.
    np.testing.assert_allclose(found.lr, h * seconds / (h**2 * seconds + v / batch), rtol=1e-3)
    assert not found.at_bound


def coordinate_sweep(problem, rates, batch, high):
    """Each rate in turn set to its best with all others fixed: the loss is quadratic in it."""
    h, v = problem.curvature, problem.noise_variance / batch
    p = [problem.weight]
    for lr in rates[:0:-1]:
        p.append(p[-1] * (1 - lr * h) ** 2)
    s = problem.initial_mean**2 + problem.initial_variance
    new = np.empty_like(rates)
    for t, adjoint in enumerate(reversed(p)):
        new[t] = min(adjoint @ (h * s) / (adjoint @ (h**2 * s + v)), high)
        s = (1 - new[t] * h) ** 2 * s + new[t] ** 2 * v
    return new, problem.weight @ s


@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_free_rates_obey_the_equation_of_the_optimum(problem, noise):
    steps, batch = 300, 2.0
    noisy = problem.replace(noise_variance=noise * problem.noise_variance)
    found = best_piecewise(noisy, steps, steps, batch)
    rates, loss = coordinate_sweep(noisy, found.lr, batch, 30.0)
    assert found.loss * (1 - 1e-7) < loss <= found.loss * (1 + IDENTITY)
    np.testing.assert_allclose(found.lr, rates, rtol=5e-3)
    coarse = best_piecewise(noisy, 20, steps, batch)
    assert found.loss < coarse.loss


def test_flatness_of_a_schedule_is_the_literal_losses(problem):
    found = best_piecewise(problem, 4, 40, 8.0, within=0.05)
    flat = found.flat["lr"]
    for k in range(4):
        for end in (flat.low[k], flat.high[k]):
            rates = found.lr.copy()
            rates[k] = end
            risen = literal_loss(problem, rates, found.lengths, 8.0) / found.loss
            assert risen == pytest.approx(1.05, rel=1e-6) or (end == 30.0 and risen < 1.05)
    scale = found.flat["scale"]
    for factor in (scale.low, scale.high):
        rates = np.minimum(factor * found.lr, 30.0)
        risen = literal_loss(problem, rates, found.lengths, 8.0) / found.loss
        assert risen == pytest.approx(1.05, rel=1e-6)
    assert scale.low < 1 < scale.high


def test_optimum_beats_constant_rates_and_its_neighbours(problem):
    steps, batch = 300, 8.0
    found = best_piecewise(problem, 6, steps, batch)
    assert found.lengths.tolist() == [50] * 6
    start = problem.initial_mean**2 + problem.initial_variance
    constant = [
        problem.weight @ literal.sgd_moment(problem.curvature, problem.noise_variance, lr, batch,
                                            start, steps)
        for lr in np.geomspace(1e-3, 1.999, 300)
    ]  # fmt: skip
    assert found.loss < 0.9 * min(constant)
    rng = np.random.default_rng(0)
    for _ in range(50):
        rates = np.minimum(found.lr * np.exp(0.1 * rng.normal(size=6)), 2.0)
        assert piecewise_loss(problem, rates, found.lengths, batch)[0] >= found.loss * (1 - 1e-9)
    # Kuhn and Tucker: no slope inside, none inwards at the bound.
    loss, gradient, _ = piecewise_loss(problem, found.lr, found.lengths, batch)
    agree_each(loss, found.loss, IDENTITY)
    slope = gradient * found.lr / loss
    assert np.all(np.abs(slope) < 1e-5)
    assert not found.at_bound
    capped = best_piecewise(problem, 20, 20, 1e4, highest_lr=2.0)
    loss, gradient, _ = piecewise_loss(problem, capped.lr, capped.lengths, 1e4)
    slope, inside = gradient * capped.lr / loss, capped.lr < 2.0 * (1 - 1e-9)
    assert np.all(np.abs(slope[inside]) < 1e-5)
    assert np.all(slope[~inside] < 1e-5)
    assert capped.at_bound
    assert not inside.all()


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("noise", [1.0, 0.01, 0.0])
def test_few_steps_against_a_search_over_all_rates(steps, noise):
    """Differential evolution knows neither gradients nor starts; rates beyond 2 / h are found."""
    h, v = np.array([1.0, 0.3, 0.11, 0.05]), noise * np.array([1.0, 0.2, 0.3, 0.05])
    problem = Problem(h, v, initial_mean=np.array([0.5, 1.0, 0.0, 2.0]))
    found = best_piecewise(problem, steps, steps)

    def loss(rates):
        return literal_loss(problem, rates, [1] * steps, 1.0)

    searched = scipy.optimize.differential_evolution(
        loss, [(0.0, 40.0)] * steps, tol=1e-12, seed=1, popsize=20, maxiter=400
    )
    assert found.loss == pytest.approx(searched.fun, rel=1e-6)
    assert found.loss == pytest.approx(loss(found.lr), rel=1e-12)
    if noise < 1:
        assert found.lr.max() > 2.0
        assert found.loss < 0.75 * best_piecewise(problem, steps, steps, highest_lr=2.0).loss


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_without_noise_the_steps_are_chebyshevs(steps):
    """Starts h^-2 at the nodes of Chebyshev's own discrete measure make his polynomials optimal."""
    count, low, high = 40, 0.02, 1.0
    z = np.cos((2 * np.arange(count) + 1) * np.pi / (2 * count))
    h = 0.5 * (high + low) + 0.5 * (high - low) * z
    problem = Problem(h, 0.0, initial_variance=h**-2.0)
    found = best_piecewise(problem, steps, steps)
    roots = np.cos((2 * np.arange(steps) + 1) * np.pi / (2 * steps))
    rates = 1 / (0.5 * (high + low) + 0.5 * (high - low) * roots)
    np.testing.assert_allclose(np.sort(found.lr), np.sort(rates), rtol=1e-4)
    start = -(high + low) / (high - low)
    ratio = np.cos(steps * np.arccos(z)) / np.cosh(steps * np.arccosh(-start))
    assert found.loss == pytest.approx(0.5 * np.sum(ratio**2 / h), rel=1e-6)


def test_the_published_cost_of_stable_rates():
    """Harmonic spectrum, C = noise H, B = 4; 14 times by an independent optimiser."""
    h = harmonic(100)
    for steps, noise, low, high in ((100, 1e-3, 12.5, 14.5),):
        problem = Problem(h, noise * h)
        free = best_piecewise(problem, steps, steps, 4.0)
        capped = best_piecewise(problem, steps, steps, 4.0, highest_lr=2.0)
        assert low < capped.loss / free.loss < high
        assert free.loss > nqm.information_bound(problem, 4.0, steps)
        assert not free.at_bound


def test_no_rate_above_the_reciprocal_of_the_smallest_curvature_is_of_use(problem):
    """There the loss rises with every rate, whatever the others are."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        rates = np.exp(rng.uniform(-3, 4, 5))
        k = rng.integers(5)
        rates[k] = 30.0 * (1 + rng.random())
        assert piecewise_loss(problem, rates, rng.integers(1, 4, 5), 2.0)[1][k] > 0


def test_one_piece_is_the_best_constant_rate(problem):
    found = best_piecewise(problem, 1, 50, 2.0)
    best = nqm.best_lr(problem, lambda lr: nqm.constant(SGD(), lr, 50, batch_size=2), 1e-3, 1.999)
    agree_each(found.loss, best.loss, 1e-9)


def test_schedule_runs_as_a_phase(problem):
    """More pieces than steps as well: empty pieces are left out."""
    for pieces, steps in ((4, 103), (7, 3)):
        found = best_piecewise(problem, pieces, steps, 4.0)
        assert found.lengths.sum() == steps
        program = Program((Phase(SGD(), found.schedule, steps, 4.0),))
        agree_each(found.loss, nqm.solve(problem, program, [steps]).loss[0], JUMP)
    assert equal_pieces(103, 4).tolist() == [26, 26, 25, 26]


def test_highest_rate_and_a_start_of_ones_own(problem):
    capped = best_piecewise(problem, 5, 40, 64.0, highest_lr=0.3)
    assert capped.at_bound
    assert capped.lr.max() <= 0.3
    again = best_piecewise(problem, 5, 40, 64.0, highest_lr=0.3, start=np.full(5, 0.1))
    agree_each(again.loss, capped.loss, 1e-8)


@pytest.mark.parametrize("pieces", [1, 5])
def test_fewest_steps(pieces):
    h = harmonic(400)
    problem = Problem(h, h)
    found = fewest_steps_piecewise(problem, pieces, 64.0, 0.05)
    shorter = best_piecewise(problem, pieces, found.steps - 1, 64.0)
    assert found.loss <= 0.05 < shorter.loss
    # n / (2 C B), the bound of Zhang et al. 2019
    assert found.steps > 400 / (2 * 0.05 * 64)
    if pieces == 1:
        rates = np.geomspace(0.5 * found.lr[0], 2.0 * found.lr[0], 400)
        table = search(problem, SGD(), rates, [64.0], 0.05)
        assert found.steps <= table["step"].iloc[0] <= found.steps + 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: best_piecewise(p, 0, 5), "pieces"),
        (lambda p: best_piecewise(p, 2, 0), "steps"),
        (lambda p: best_piecewise(p, 2, 5, 0.0), "batch_size"),
        (lambda p: best_piecewise(p, 2, 5, highest_lr=0.0), "highest_lr"),
        (lambda p: best_piecewise(p, 2, 5, start=[0.1]), "start must hold 2 rates"),
        (lambda p: fewest_steps_piecewise(p, 2, 1.0, 1e3), "target"),
        (lambda p: fewest_steps_piecewise(p, 2, 1.0, 1e-3, horizon=50), "raise horizon"),
    ],
)
def test_misuse_is_an_error(call, words, problem):
    with pytest.raises(NQMError, match=words):
        call(problem)

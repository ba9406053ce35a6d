"""Batch sizes at equal data: Lagrange's condition, closed forms, SciPy and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import nqm
from nqm import NQMError, Problem
from nqm.problems.spectra import harmonic
from nqm.tuning import best_batches, best_piecewise, piecewise_loss
from nqm.tuning.batch_sizes import allocate, allocate_whole
from tests.tolerances import IDENTITY, JUMP, agree_each


@pytest.fixture
def problem() -> Problem:
    h = harmonic(20)
    return Problem(h, 2.0 * h, initial_mean=0.5)


def test_one_direction_is_lagranges_closed_form():
    """B_t in proportion to lr times the root of the adjoint, |1 - lr h|^(steps - 1 - t)."""
    h, v, s, lr, steps, examples = 0.8, 3.0, 2.0, 0.25, 12, 500
    problem = Problem([h], [v], initial_mean=0.0, initial_variance=s)
    found = best_batches(problem, steps, examples, lr=lr, steps=steps)
    root = (1 - lr * h) ** np.arange(steps - 1, -1, -1)
    agree_each(found.batch_sizes, examples * root / root.sum(), JUMP)
    noise = lr**2 * v * root.sum() ** 2 / examples
    agree_each(found.loss, 0.5 * h * ((1 - lr * h) ** (2 * steps) * s + noise), JUMP)


@pytest.mark.parametrize("steps", [10, 40])
def test_one_direction_with_free_rates_is_the_kalman_filter(steps):
    """Only the number of examples counts: 1 / s' = 1 / s + N h^2 / v, for any batches."""
    h, v, s, examples = 0.5, 2.0, 3.0, 200
    problem = Problem([h], [v], initial_mean=0.0, initial_variance=s)
    found = best_batches(problem, steps, examples, steps=steps)
    agree_each(found.loss, 0.5 * h / (1 / s + examples * h**2 / v), 1e-8)


def test_bounds_and_many_directions_agree_with_scipy(problem):
    lr, lengths, examples = 0.4, np.array([25, 25, 25, 25]), 300
    found = best_batches(problem, 4, examples, lr=lr, steps=100)
    assert found.batch_sizes[0] == 1.0  # the bound is active here
    rates = np.full(4, lr)

    def objective(sizes):
        loss, _, by_batch = piecewise_loss(problem, rates, lengths, sizes)
        return loss, by_batch

    by_scipy = minimize(
        objective,
        np.full(4, 3.0),
        jac=True,
        method="SLSQP",
        bounds=[(1.0, None)] * 4,
        constraints={
            "type": "eq",
            "fun": lambda b: lengths @ b - examples,
            "jac": lambda b: lengths,
        },
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert by_scipy.success
    agree_each(found.loss, by_scipy.fun, 1e-8)
    np.testing.assert_allclose(found.batch_sizes, by_scipy.x, rtol=1e-3)


pieces = st.lists(st.tuples(st.floats(0.0, 1e3), st.integers(1, 50)), min_size=1, max_size=8).map(
    lambda pairs: tuple(np.array(part) for part in zip(*pairs, strict=True))
)


@settings(max_examples=150, deadline=None)
@given(pieces, st.floats(1.0, 20.0))
def test_allocation_meets_kuhn_and_tucker(pieces, average):
    noise, lengths = pieces
    noise = np.where(noise < 1e-6, 0.0, noise)
    examples = average * lengths.sum()
    sizes = allocate(noise, lengths, examples, 1.0)
    agree_each(lengths @ sizes, examples, 1e-9)
    assert np.all(sizes >= 1.0)
    price = noise / (lengths * sizes**2)
    free = sizes > 1.0 + 1e-9
    if noise.any() and free.any():
        np.testing.assert_allclose(price[free], price[free].max(), rtol=1e-7)
        assert np.all(price[~free] <= price[free].max() * (1 + 1e-7))


@pytest.mark.parametrize("seed", range(5))
def test_whole_examples_are_the_best_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    lengths, examples = np.full(3, 4), 4 * int(rng.integers(8, 25)) + 3
    noise = rng.exponential(size=3) ** 2
    sizes = allocate(noise, lengths, examples, 1)
    whole = allocate_whole(noise, lengths, examples, 1, sizes)
    options = itertools.product(range(1, examples // 4 + 1), repeat=3)
    best = min(noise @ (1 / np.array(b)) for b in options if 4 * sum(b) <= examples)
    agree_each(noise @ (1 / whole), best, IDENTITY)
    assert noise @ (1 / sizes) <= best
    assert lengths @ whole <= examples


def test_number_of_steps_is_the_best_of_all(problem):
    examples = 90
    found = best_batches(problem, 5, examples, lr=0.5)
    losses = {t: best_batches(problem, 5, examples, lr=0.5, steps=t).loss for t in range(1, 91)}
    assert found.steps == min(losses, key=lambda t: losses[t])
    agree_each(found.loss, min(losses.values()), IDENTITY)
    flat = found.flat["steps"]
    inside = range(int(flat.low), int(flat.high) + 1)
    assert all(losses[t] <= 1.01 * found.loss for t in inside)


def test_rates_and_batches_together(problem):
    """Nothing better nearby within the budget, and better than either alone."""
    steps, examples = 60, 400
    found = best_batches(problem, 6, examples, steps=steps)
    agree_each(found.lengths @ found.batch_sizes, examples, IDENTITY)
    assert found.loss < best_piecewise(problem, 6, steps, examples / steps).loss
    for lr in (0.2, 0.5, 1.0):
        assert found.loss < best_batches(problem, 6, examples, lr=lr, steps=steps).loss
    rng = np.random.default_rng(0)
    for scale in (0.3, 0.1, 0.01):
        for _ in range(30):
            rates = np.minimum(found.lr * np.exp(scale * rng.normal(size=6)), 2.0)
            sizes = found.batch_sizes * np.exp(scale * rng.normal(size=6))
            sizes = np.maximum(sizes * examples / (found.lengths @ sizes), 1.0)
            if found.lengths @ sizes <= examples * (1 + IDENTITY):
                loss, _, _ = piecewise_loss(problem, rates, found.lengths, sizes)
                assert loss >= found.loss * (1 - 1e-9)


def test_program_spends_the_budget_and_ends_with_the_loss(problem):
    for given_lr in (None, 0.5):
        found = best_batches(problem, 4, 300, lr=given_lr, steps=50)
        run = nqm.solve(problem, found.program, [50])
        agree_each(found.whole_loss, run.loss[0], JUMP)
        assert 300 - found.lengths.min() < run.examples[0] <= 300
        assert found.loss <= found.whole_loss
        assert ("lr" in found.flat) == (given_lr is None)


def test_flatness_holds_the_data(problem):
    found = best_batches(problem, 3, 600, lr=0.3, steps=60)
    flat = found.flat["batch_sizes"]
    for k, end in itertools.product(range(3), ("low", "high")):
        sizes = found.batch_sizes.copy()
        sizes[k] = getattr(flat, end)[k]
        others = np.arange(3) != k
        sizes[others] *= (600 - 20 * sizes[k]) / (20 * sizes[others].sum())
        loss, _, _ = piecewise_loss(problem, found.lr, found.lengths, sizes)
        assert loss == pytest.approx(1.01 * found.loss, rel=1e-7) or sizes[k] == 1.0
    single = best_batches(problem, 1, 600, lr=0.3, steps=60)
    assert single.batch_sizes == single.flat["batch_sizes"].low == [10.0]


def test_no_noise_and_one_step():
    found = best_batches(Problem([1.0, 0.5], 0.0), 3, 30, lr=0.5, steps=6)
    assert found.whole.tolist() == [5, 5, 5]
    assert best_batches(Problem([1.0], 1.0), 4, 1).steps == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pieces": 0}, "pieces"),
        ({"examples": 0}, "examples"),
        ({"smallest": 0}, "smallest"),
        ({"lr": -1.0}, "lr"),
        ({"steps": 0}, "steps"),
        ({"steps": 101}, "100 examples pay for 100 steps"),
        ({"steps": 51, "smallest": 2}, "pay for 50 steps of 2"),
    ],
)
def test_misuse_is_an_error(changes, words, problem):
    with pytest.raises(NQMError, match=words):
        best_batches(problem, **({"pieces": 2, "examples": 100} | changes))

"""Amortized model ensembling: closed forms, PyTorch's optimizers, and what it cannot win."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from nqm import AME, SGD, NQMError, Problem, Soup, constant
from nqm.amortized import random_basis
from nqm.problems.spectra import harmonic
from tests.tolerances import IDENTITY, agree, agree_each, within_error

ALL = ("gd", "adagrad", "adam", "adadelta", "sign")


def models(n=5, d=4, seed=0, replicas=()):
    return np.random.default_rng(seed).standard_normal((*replicas, n, d))


def settled(n, v=1.0, h=2.0):
    """A soup of n independent ingredients N(0, v) in one direction, h / 2 = 1."""
    problem = Problem([h], [v], initial_mean=0.0, initial_variance=0.0)
    # One step of rate 1 from the minimum: its noise alone.
    return Soup.of_runs(problem, [constant(SGD(), 1.0, 1)] * n)


# ------------------------------------------------------------------ identities, draw by draw


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_descent_at_harmonic_rates_is_the_uniform_soup(order, passes):
    x = models()
    for pivot in (x[0], np.full(4, 1e3)):
        merged = AME("gd", passes=passes, order=order).merge(x, pivot)
        np.testing.assert_allclose(merged, x.mean(axis=0), atol=1e-15)


@given(
    lr=st.floats(0.01, 1.9), passes=st.integers(1, 4), pivot=st.floats(-5, 5), n=st.integers(1, 6)
)
def test_descent_at_a_constant_rate_is_a_weighted_mean(lr, passes, pivot, n):
    """rho^T p + lr sum_i rho^(T - i) x_i, rho = 1 - lr."""
    x = models(n)
    seen = np.concatenate([x] * passes)
    rho, steps = 1 - lr, len(seen)
    weights = lr * rho ** np.arange(steps - 1, -1, -1)
    expected = rho**steps * pivot + weights @ seen
    scale = max(1.0, abs(rho)) ** steps * (abs(pivot) + np.abs(x).max())
    np.testing.assert_allclose(AME("gd", lr, passes).merge(x, np.full(4, pivot)), expected,
                               atol=IDENTITY * scale)  # fmt: skip


@given(lr=st.floats(0.0, 1.0), passes=st.integers(1, 5), pivot=st.floats(-5, 5))
def test_full_batch_descent_is_a_point_between_pivot_and_soup(lr, passes, pivot):
    """(1 - c) p + c soup with c = 1 - (1 - lr)^E: WiSE-FT between the two."""
    x = models()
    c = 1 - (1 - lr) ** passes
    merged = AME("gd", lr, passes, batch="all").merge(x, np.full(4, pivot))
    np.testing.assert_allclose(merged, (1 - c) * pivot + c * x.mean(axis=0), atol=IDENTITY * 10)


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [("gd", 0.3), ("adagrad", 0.3), ("adam", 0.02)],
    ids=["gd", "adagrad", "adam"],
)
def test_full_batch_converges_to_the_soup(optimizer, lr):
    x = models()
    merged = AME(optimizer, lr, 4000, batch="all").merge(x, x[0])
    np.testing.assert_allclose(merged, x.mean(axis=0), atol=1e-10)


@pytest.mark.parametrize("n", [3, 7, 8])
def test_signs_find_the_median(n):
    """Passes of falling steps settle between the two middle values (at it if n is odd)."""
    x = models(n, 6, seed=2)
    passes = 1000
    lrs = np.repeat(np.geomspace(0.3, 1e-6, passes), n)
    merged = AME("sign", list(lrs), passes).merge(x, x[0])
    middle = np.sort(x, axis=0)[(n - 1) // 2 : n // 2 + 1]
    within = n * 0.3 * 1e-3  # far above the last steps, far below the gaps
    assert np.all(merged > middle[0] - within)
    assert np.all(merged < middle[-1] + within)


@pytest.mark.parametrize("batch", ["one", "all"])
@pytest.mark.parametrize(
    ("optimizer", "lr", "name"),
    [("gd", 0.3, "SGD"), ("adagrad", 0.3, "Adagrad"), ("adam", 0.1, "Adam"),
     ("adadelta", 1.0, "Adadelta")],
)  # fmt: skip
def test_optimizers_are_those_of_pytorch(optimizer, lr, name, batch):
    torch = pytest.importorskip("torch")
    x = models()
    w = torch.tensor(x[0].copy(), requires_grad=True)
    stepper = getattr(torch.optim, name)([w], lr=lr)
    for toward in list(x) * 3 if batch == "one" else [x.mean(axis=0)] * 3:
        stepper.zero_grad()
        (0.5 * (w - torch.tensor(toward)) ** 2).sum().backward()
        stepper.step()
    agree(AME(optimizer, lr, 3, batch=batch).merge(x, x[0]), w.detach().numpy(), 1e-10)


@pytest.mark.parametrize("optimizer", ALL)
def test_one_ingredient_that_is_the_pivot_stays(optimizer):
    x = models(1)
    np.testing.assert_array_equal(AME(optimizer, 0.1, 3).merge(x, x[0]), x[0])


@pytest.mark.parametrize("optimizer", ALL)
@given(shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_merging_moves_along_with_the_models(optimizer, shift, seed):
    x = models(seed=seed)
    rule, pivot = AME(optimizer, 0.1, 2), x.mean(axis=0)  # where no difference is ever zero
    moved = rule.merge(x + shift, pivot + shift) - shift
    np.testing.assert_allclose(moved, rule.merge(x, pivot), atol=1e-9)


def test_a_stack_is_merged_one_by_one():
    x = models(replicas=(3, 2))
    for rule in (AME("adam", 0.1, 2), AME("adagrad", 0.2, 2, batch="all")):
        merged = rule.merge(x, x[..., 0, :])
        for i, j in np.ndindex(3, 2):
            np.testing.assert_array_equal(merged[i, j], rule.merge(x[i, j], x[i, j, 0]))


def test_only_descent_is_the_same_in_every_basis():
    x, q = models(), random_basis(4, np.random.default_rng(1))
    agree(q @ q.T, np.eye(4), IDENTITY)
    for optimizer in ALL:
        rule = AME(optimizer, 0.2, 2)
        plain, turned = rule.merge(x, x[0]), rule.merge(x @ q, x[0] @ q) @ q.T
        assert np.allclose(plain, turned, atol=1e-12) == (optimizer == "gd")


def test_every_pass_is_shuffled_anew():
    """At rate 1 descent ends at the last ingredient it sees, each as often as the others."""
    x = np.broadcast_to(np.arange(3.0)[:, None], (3000, 3, 1))
    rule = AME("gd", 1.0, 2, order="shuffled")
    last = rule.merge(x, x[:, 0], np.random.default_rng(0))[:, 0]
    counts = np.bincount(last.astype(int), minlength=3)
    within_error(counts / 3000, np.full(3, 1 / 3), np.sqrt(2 / 9 / 3000))
    first = AME("gd", [1.0, 0, 0, 0, 0, 0], 2, order="shuffled")
    other = first.merge(x, x[:, 0], np.random.default_rng(0))[:, 0]
    within_error((last == other).mean(), 1 / 3, np.sqrt(2 / 9 / 3000))  # independent


# ------------------------------------------------------------------ expected losses of soups


def within(sample, expected):
    within_error(sample.mean(), expected, sample.std() / np.sqrt(len(sample)))


@pytest.mark.parametrize(("lr", "n"), [(0.3, 8), (0.7, 3)])
def test_loss_of_one_pass_and_of_many(lr, n):
    """rho^2N p^2 + v lr^2 (1 - rho^2N) / (1 - rho^2); v lr (1 + rho^N) / ((2 - lr)(1 - rho^N))."""
    soup, rho, v = settled(n, v=0.5), 1 - lr, 0.5
    found = soup.ame(AME("gd", lr), pivot=2.0, replicas=20_000, seed=1)
    tail = rho ** (2 * n)
    within(found.loss, tail * 4 + v * lr**2 * (1 - tail) / (1 - rho**2))
    within(found.soup_loss, v / n)
    agree_each(found.pivot_loss, np.full(20_000, 4.0), IDENTITY)
    many = soup.ame(AME("gd", lr, 60), replicas=20_000, seed=2)
    within(many.loss, v * lr * (1 + rho**n) / ((2 - lr) * (1 - rho**n)))
    within(many.pivot_loss, v)  # the first ingredient


def test_many_passes_at_a_constant_rate_cost_half_a_soup_more():
    """A worked example: N = 8, lr = 0.3, by exact weights of the fixed point of one pass."""
    rho = 0.7 ** np.arange(7, -1, -1)
    weights = 0.3 * rho / (1 - 0.7**8)
    assert 8 * weights @ weights == pytest.approx(1.584, abs=5e-4)
    x = models(8)
    agree_each(AME("gd", 0.3, 200).merge(x, x[0]), weights @ x, IDENTITY)


def test_signs_lose_what_the_median_loses():
    """Variance of the median of 7 normals, by integrating its density."""
    found = settled(7).ame(
        AME("sign", list(np.repeat(np.geomspace(0.2, 1e-4, 300), 7)), 300), replicas=8000, seed=3
    )

    def density(x):
        return 140 * norm.cdf(x) ** 3 * norm.sf(x) ** 3 * norm.pdf(x)

    variance = quad(lambda x: x**2 * density(x), -8, 8)[0]
    assert quad(density, -8, 8)[0] == pytest.approx(1.0)
    within(found.loss, variance)
    assert found.loss.mean() > 1.4 * found.soup_loss.mean()  # pi / 2 of many


def test_the_joint_law_of_the_ingredients_is_drawn():
    """Ingredients share their start: the losses drawn against the exact ones."""
    problem = Problem([1.0, 0.3, 0.02], [0.5, 2.0, 0.1], initial_mean=[1.0, -2.0, 0.5])
    soup = Soup.of_star(problem, constant(SGD(), 0.3, 4), 4)
    found = soup.ame(AME("gd"), replicas=20_000, seed=4)
    agree(found.loss, found.soup_loss, IDENTITY)
    within(found.soup_loss, soup.loss(soup.uniform()))
    within(found.pivot_loss, soup.moment[0, 0])
    again = soup.ame(AME("gd"), replicas=20_000, seed=4)
    agree_each(again.loss, found.loss, IDENTITY)
    from_soup = soup.ame(AME("gd", 0.0), pivot="soup", replicas=50)
    agree_each(from_soup.loss, from_soup.soup_loss, IDENTITY)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "lr"), [("adagrad", 0.3), ("adam", 0.1), ("adadelta", 1.0), ("sign", 0.05)]
)
def test_no_optimizer_beats_the_soup(optimizer, lr, rotated):
    """Independent ingredients of one law: the plain mean is the best there is."""
    d = 16
    problem = Problem(harmonic(d), harmonic(d), initial_variance=0.0)
    soup = Soup.of_runs(problem, [constant(SGD(), 0.5, 4)] * 8)
    for passes in (1, 30):
        found = soup.ame(AME(optimizer, lr, passes), rotated=rotated, replicas=400, seed=5)
        worse = found.loss - found.soup_loss
        assert worse.mean() > -3 * worse.std() / 20
        assert found.loss.mean() < found.pivot_loss.mean()
    # The same draws, seen in another basis.
    other = soup.ame(AME(optimizer, lr), rotated=not rotated, replicas=400, seed=5)
    agree(other.pivot_loss, found.pivot_loss, IDENTITY)
    assert not np.allclose(other.loss, found.loss, rtol=1e-3)


@pytest.mark.parametrize("pivot", ["first", "soup"])
@pytest.mark.parametrize("optimizer", ALL)
def test_one_ingredient_is_its_own_merge_in_any_basis(optimizer, pivot):
    """A step of rounding would be a whole step of signs, or of Adam."""
    problem = Problem(harmonic(16), harmonic(16))
    soup = Soup.of_runs(problem, [constant(SGD(), 0.5, 4)])
    found = soup.ame(AME(optimizer, 0.3, 5), pivot=pivot, replicas=50)
    agree_each(found.loss, found.pivot_loss, IDENTITY)
    agree_each(found.loss, found.soup_loss, IDENTITY)


@pytest.mark.parametrize("rotated", [True, False])
def test_a_pivot_that_is_given_is_in_the_eigenbasis(rotated):
    problem = Problem(harmonic(16), harmonic(16))
    soup = Soup.of_runs(problem, [constant(SGD(), 0.5, 4)] * 2)
    place = np.linspace(-1, 2, 16)
    found = soup.ame(AME("adam", 0.0), pivot=place, rotated=rotated, replicas=20)
    agree_each(found.loss, np.full(20, 0.5 * harmonic(16) @ place**2), IDENTITY)
    agree_each(found.pivot_loss, found.loss, IDENTITY)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AME("adamw"), "AME.optimizer 'adamw' is unknown; did you mean 'adam'"),
        (lambda: AME(lr=-0.1), r"AME\.lr must lie in \[0"),
        (lambda: AME(lr="x"), r"AME\.lr must lie"),
        (lambda: AME(lr=[0.1, np.nan]), r"AME\.lr must lie"),
        (lambda: AME(passes=0), r"AME\.passes must be an integer >= 1"),
        (lambda: AME(order="random"), r"AME\.order 'random' is unknown"),
        (lambda: AME(batch=2), r"AME\.batch 2 is unknown"),
        (lambda: settled(3).ame(AME(lr=[0.1] * 4)), "one rate for each of the 3 steps; got 4"),
        (lambda: settled(3).ame("adam"), r"Soup\.ame needs a rule, e\.g\. AME\('adam', 0\.1\)"),
        (lambda: settled(3).ame(AME(), pivot="last"), "pivot must be 'first', 'soup' or a place"),
        (lambda: settled(3).ame(AME(), pivot=[1.0, 2.0]), r"place of shape \(1,\)"),
        (lambda: settled(3).ame(AME(), pivot=np.inf), "pivot must hold finite numbers; got inf"),
        (lambda: settled(3).ame(AME(), pivot=None), "pivot must hold finite numbers; got None"),
        (lambda: settled(3).ame(AME(), replicas=0), "replicas must be"),
        (lambda: settled(3).ame(AME(), seed=-1), "seed must be"),
        (lambda: settled(3).ame(AME("adam", passes=10**9), replicas=10**6), "multiplications"),
        (lambda: Soup.of_runs(Problem([1.0], 1.0, 3.0), [constant(SGD(), 0.1, 3)]).ame(AME()),
         r"Soup\.ame needs multiplicity 1; use problem\.expanded"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, words):
    with pytest.raises(NQMError, match=words):
        make()

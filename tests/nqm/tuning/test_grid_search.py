"""The search over a whole grid finds what looking at every step of every setting finds."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import EMA, SGD, HeavyBall, LatePhase, Nesterov, NQMError, Problem
from nqm.problems.quadrature import condense
from nqm.problems.spectra import harmonic, power_law
from nqm.tuning.grid_search import _Chain, _Run, doubling_grid, search
from tests.tolerances import IDENTITY, JUMP, agree_each


def harmonic_problem(directions: int) -> Problem:
    h = harmonic(directions)
    return Problem(h, h)


def rough_problem() -> Problem:
    """Noise not in proportion to curvature, every direction with a start of its own."""
    rng = np.random.default_rng(5)
    h = power_law(90, exponent=1.3, largest=2.5)
    return Problem(h, 0.3, initial_mean=rng.normal(size=90), initial_variance=rng.random(90))


# ------------------------------------------------------------------ the condensed spectrum


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_condensed_losses_are_those_of_every_direction(exponent):
    rng = np.random.default_rng(1)
    h = harmonic(5000)
    problem = Problem(h, h**exponent, initial_mean=rng.normal(size=5000), initial_variance=0.1)
    small = condense(problem)
    assert small.directions < 260
    agree_each(small.initial_loss, problem.initial_loss, IDENTITY)
    agree_each(small.multiplicity.sum(), 5000, IDENTITY)
    # Hardly damped momentum swings within a block, here by 6 radians: quadrature to 1e-7.
    cases = (SGD(), JUMP), (HeavyBall(0.9), JUMP), (EMA(decay=0.999), JUMP), (HeavyBall(0.99), 1e-7)
    for algorithm, tolerance in cases:
        program = nqm.constant(algorithm, 0.7, 10_000, batch_size=16)
        at = [1, 30, 1000, 10_000]
        whole, few = (nqm.solve(p, program, at) for p in (problem, small))
        for part in ("bias", "variance"):
            gap = np.abs(getattr(few, part) - getattr(whole, part))
            assert np.all(gap <= tolerance * whole.loss)


def test_condense_leaves_what_it_cannot_improve():
    few = Problem([3.0, 1.0, 0.0, 1.0, 0.9], [1.0, 2.0, 3.0, 4.0, 5.0])
    same = condense(few)
    assert same.curvature.tolist() == pytest.approx([3.0, 1.0, 1.0, 0.9], rel=1e-15)
    assert same.noise_variance.tolist() == [1.0, 2.0, 4.0, 5.0]
    equal = Problem(np.full(100, 0.5), np.arange(100.0))  # one curvature: no block to speak of
    assert condense(equal).directions == 100


def test_condense_counts_multiplicities():
    """A spectrum with counts condenses as the one written out."""
    h, count = harmonic(400), np.resize([1.0, 3.0], 400)
    binned = Problem(h, h, multiplicity=count)
    program = nqm.constant(SGD(), 0.5, 200)
    losses = [
        nqm.solve(p, program, [200]).loss
        for p in (binned, condense(binned), condense(binned.expanded()))
    ]
    agree_each(losses[1], losses[0], JUMP)
    agree_each(losses[2], losses[0], JUMP)


# ------------------------------------------------------------------ losses of one setting


@pytest.mark.parametrize(
    "algorithm", [SGD(), HeavyBall(0.95), HeavyBall(0.0), Nesterov(0.9), EMA(decay=0.97)]
)
def test_every_step_is_the_general_solvers(algorithm):
    problem = rough_problem()
    run = _Run(problem, _Chain.of(algorithm), 0.3)
    program = nqm.constant(algorithm, 0.3, 700, batch_size=3)
    for first, last in ((0, 1), (0, 200), (137, 700), (699, 700)):
        path = run.losses(first, last, 3.0)
        agree_each(path, nqm.solve(problem, program, range(first, last + 1)).loss, JUMP)


def test_table_is_the_general_solvers():
    """Responses at the doubled steps against a problem of one direction."""
    grid = doubling_grid(5000)
    assert grid[:40].tolist() == [*range(1, 32), *range(32, 50, 2)]
    assert grid[-16] <= 5000 <= grid[-1]
    assert np.all(np.diff(grid) / grid[:-1] <= np.maximum(1 / grid[:-1], 1 / 16))
    u = np.array([1e-3, 0.4, 1.7])
    for algorithm in (HeavyBall(0.9), EMA(decay=0.9)):
        started, noisy = _Chain.of(algorithm).table(u, grid.size)
        for i, lr in enumerate(u):
            one = Problem([1.0], [1.0], initial_mean=1.0, initial_variance=0.0)
            found = nqm.solve(one, nqm.constant(algorithm, lr, int(grid[-1])), grid)
            np.testing.assert_allclose(0.5 * started[:, i], found.bias, rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(0.5 * noisy[:, i], found.variance, rtol=1e-9)


# ------------------------------------------------------------------ the search


def heavy_ball_path(problem, momenta, rates, steps):
    """Bias and noise of every setting after every step, (steps + 1, momenta, rates), literally."""
    h, v, w = problem.curvature, problem.noise_variance, problem.weight
    mu, lr = np.asarray(momenta)[:, None, None], rates[:, None]
    start = np.broadcast_to(
        problem.initial_mean**2 + problem.initial_variance, (len(momenta), rates.size, h.size)
    )
    out = []
    for xx, q in ((start, 0.0 * v), (0.0 * start, v)):
        xb, bb, path = 0.0 * start, 0.0 * start, []
        for _ in range(steps + 1):
            path.append(xx @ w)
            # b' = mu b + h x + e;  x' = x - lr b'
            new_bb = mu**2 * bb + 2 * mu * h * xb + h**2 * xx + q
            x_new_b = mu * xb + h * xx  # E x b'
            xx, xb, bb = xx - 2 * lr * x_new_b + lr**2 * new_bb, x_new_b - lr * new_bb, new_bb
        out.append(np.array(path))
    return out


def ema_path(problem, decays, rates, steps):
    """The same of an average of SGD's iterates that starts at the first."""
    h, v, w = problem.curvature, problem.noise_variance, problem.weight
    beta, lr = np.asarray(decays)[:, None, None], rates[:, None]
    r = 1 - lr * h
    start = np.broadcast_to(
        problem.initial_mean**2 + problem.initial_variance, (len(decays), rates.size, h.size)
    )
    out = []
    for aa, q in ((start, 0.0 * v), (0.0 * start, v)):
        xx, xa, path = aa, aa, []
        for _ in range(steps + 1):
            path.append(aa @ w)
            new_xx = r**2 * xx + lr**2 * q
            aa = beta**2 * aa + 2 * beta * (1 - beta) * r * xa + (1 - beta) ** 2 * new_xx
            xa, xx = beta * r * xa + (1 - beta) * new_xx, new_xx
        out.append(np.array(path))
    return out


def brute(bias, noise, stable, size, target):
    """Fewest steps over all settings, and whether bisection of the winner would find them."""
    loss = bias + noise / size
    met = (loss <= target) & stable
    steps = np.where(met.any(axis=0), met.argmax(axis=0), 10**9)
    k, i = np.unravel_index(steps.argmin(), steps.shape)
    low, high = 0, len(loss) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss[middle, k, i] <= target else (middle, high)
    return steps[k, i], high == steps[k, i], loss


HORIZON = 1500
BATCHES = [2.0, 16.0, 128.0, 1e5]


@pytest.mark.parametrize(
    ("problem", "targets"),
    [(harmonic_problem(40), (0.3, 0.05)), (rough_problem(), (0.2, 0.02)),
     (harmonic_problem(600).precondition(harmonic(600) ** -0.5), (0.4, 0.05))],
    ids=["harmonic", "rough", "preconditioned"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["heavy ball", "ema"])
def test_search_is_brute_force(problem, targets, method):
    rates = np.geomspace(1e-3, 3.0, 18) / problem.curvature.max()
    memories = [0.0, 0.6, 0.9, 0.97, 0.99]
    top = rates * problem.curvature.max()
    with np.errstate(over="ignore", invalid="ignore"):
        if method == "ema":
            algorithms = [EMA(decay=b) for b in memories]
            bias, noise = ema_path(problem, memories, rates, HORIZON)
            stable = np.tile(top < 2, (5, 1))
        else:
            algorithms = [HeavyBall(mu) for mu in memories]
            bias, noise = heavy_ball_path(problem, memories, rates, HORIZON)
            stable = top < 2 * (1 + np.array(memories)[:, None])
        for target in targets:
            table = search(problem, algorithms, rates, BATCHES, target, horizon=HORIZON)
            assert table["batch_size"].tolist() == BATCHES
            assert (table["unstable"] == (~stable).sum()).all()
            for row in table.itertuples():
                steps, _, loss = brute(bias, noise, stable, row.batch_size, target)
                if steps > HORIZON:
                    assert row.status == "not_reached"
                    assert np.isnan([row.step, row.lr, row.loss]).all()
                    continue
                assert (row.status, row.step) == ("reached", steps)
                assert row.examples == steps * row.batch_size
                i = int(np.argmin(np.abs(rates - row.lr)))
                path = loss[:, row.algorithm, i]
                assert path[steps] <= target < path[steps - 1]
                agree_each([row.loss_before, row.loss], path[steps - 1 : steps + 1], JUMP)
            assert (table["status"] == "reached").any()


def test_swings_below_the_target_count():
    """Hardly any damping and no noise: the first crossing is a dip that bisection steps over."""
    problem = Problem([1.0, 0.9], [1e-9, 1e-9], initial_mean=1.0, initial_variance=0.0)
    rates, algorithms = np.geomspace(0.01, 0.02, 3), [HeavyBall(0.999)]
    bias, noise = heavy_ball_path(problem, [0.999], rates, HORIZON)
    fooled = 0
    for target in (0.4, 0.1, 0.03):
        steps, same, _ = brute(bias, noise, np.ones(3, bool), 1.0, target)
        (row,) = search(problem, algorithms, rates, [1.0], target).to_dict("records")
        assert (row["step"], row["scanned"]) == (steps, True)
        fooled += not same
    assert fooled


def test_ten_thousand_directions_and_the_published_count(monkeypatch):
    """B = 2^14, C = 0.01: 7213 is the last step above the target, over every direction."""
    problem = harmonic_problem(10_000)
    rates = np.geomspace(1e-5, 10**0.5, 100)
    table = search(problem, SGD(), rates, [4.0, 2.0**14], 0.01, horizon=10**8)
    assert table["step"].iloc[1] - 1 == 7213
    for row in table.itertuples():
        program = nqm.constant(SGD(), row.lr, int(row.step), batch_size=row.batch_size)
        before, at = nqm.solve(problem, program, [int(row.step) - 1, int(row.step)]).loss
        # At 1.5 million steps one step is 5e-7 of the loss: far more than the solvers differ.
        assert at <= 0.01 < before
        agree_each([row.loss_before, row.loss], [before, at], 1e-9)
    assert table["scanned"].all()
    monkeypatch.setattr("nqm.tuning.grid_search.FROM_START", 10**4)
    again = search(problem, SGD(), rates, [4.0, 2.0**14], 0.01, horizon=10**8)
    assert again["step"].tolist() == table["step"].tolist()
    assert again["scanned"].tolist() == [False, True]


def test_problems_are_searched_side_by_side():
    """Of different largest curvature, and each as if it were alone."""
    problems = [harmonic_problem(50), rough_problem()]
    algorithms = [HeavyBall(0.0), HeavyBall(0.9)]
    rates = np.geomspace(1e-2, 1.0, 23)
    both = search(problems, algorithms, rates, BATCHES, 0.2)
    for i, problem in enumerate(problems):
        alone = search(problem, algorithms, rates, BATCHES, 0.2)
        for name in ("step", "lr", "algorithm", "loss"):
            np.testing.assert_array_equal(both.loc[both["problem"] == i, name], alone[name])


def test_one_rate_and_only_unstable_ones():
    problem = harmonic_problem(30)
    (row,) = search(problem, SGD(), [0.5], [1e4], 0.1).to_dict("records")
    losses = nqm.solve(problem, nqm.constant(SGD(), 0.5, 400, batch_size=1e4), range(401)).loss
    assert row["step"] == np.argmax(losses <= 0.1)
    (row,) = search(problem, SGD(), [2.5, 5.0], [1e4], 0.1).to_dict("records")
    assert row["status"] == "not_reached"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithms": LatePhase(2, gamma="mean")}, "LatePhase: use fewest_steps"),
        ({"algorithms": EMA(HeavyBall(0.9))}, "EMA: use fewest_steps"),
        ({"lr": [0.1, 0.2, 0.3]}, "geometric grid"),
        ({"lr": [0.2, 0.1]}, "geometric grid"),
        ({"lr": [0.0, 0.1]}, "lr must hold numbers > 0"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"batch_sizes": [0.0]}, "batch_sizes"),
        ({"target": 0.0}, "search.target"),
        ({"target": 1e6}, "met at the start"),
        ({"horizon": 0}, "search.horizon"),
    ],
)
def test_misuse_is_an_error(changes, words):
    call = {
        "problems": harmonic_problem(5), "algorithms": SGD(), "lr": [0.1, 0.2],
        "batch_sizes": [1.0], "target": 0.1, "horizon": 100,
    }  # fmt: skip
    with pytest.raises(NQMError, match=words):
        search(**(call | changes))
    with pytest.raises(NQMError, match="points"):
        condense(harmonic_problem(5), points=0)
    with pytest.raises(NQMError, match="width"):
        condense(harmonic_problem(5), width=0.0)

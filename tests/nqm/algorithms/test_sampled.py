"""Methods by Monte Carlo only, each against an exact limit or an exact law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import nqm
from nqm import (
    SGD,
    Adam,
    HeavyBall,
    NQMError,
    Phase,
    Piecewise,
    Problem,
    Program,
    Rounded,
    SampledSGD,
    SignSGD,
    constant,
)
from nqm.runs import config
from tests import literal
from tests.tolerances import IDENTITY, agree_each, within_error

AT = [0, 1, 5, 20]


def sampled(problem, algorithm, lr, at=AT, replicas=3000, seed=5, batch_size=2):
    program = constant(algorithm, lr, at[-1], batch_size=batch_size)
    return nqm.sample(problem, program, at, replicas=replicas, seed=seed)


def quiet(problem):
    """No noise and a known start: one deterministic path."""
    return problem.replace(noise_variance=0.0, initial_variance=0.0)


# ------------------------------------------------------------------ bias correction


def test_adam_with_large_epsilon_is_heavy_ball_under_bias_correction(problem):
    """Mean m = (1 - b) sum b^j g over 1 - b^t: heavy ball, its rate (1 - b) / (1 - b^t) at step t.

    A rate that changes multiplies the whole buffer, as it does in PyTorch's form.
    """
    beta, steps, lr = 0.7, 20, 0.3
    t = np.arange(1, steps + 1)
    rates = tuple(lr * (1 - beta) / (1 - beta**t))
    schedule = Piecewise(rates, tuple(range(1, steps)))
    exact = nqm.solve(problem, Program((Phase(HeavyBall(beta), schedule, steps, 2),)), AT)
    drawn = sampled(problem, Adam(beta1=beta, beta2=0.9, epsilon=1e12), lr * 1e12)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(3000))


# ------------------------------------------------------------------ the update rules themselves


def literal_path(problem, rule, steps):
    """Noiseless textbook loop; `rule` maps (g, state, t) to a step."""
    x, state, losses = problem.initial_mean, {}, []
    for t in range(1, steps + 1):
        losses.append(problem.weight @ x**2)
        x = x - rule(problem.curvature * x, state, t)
    return np.array([*losses, problem.weight @ x**2])


def adam_rule(g, state, t, lr=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3):
    """Algorithm 1 of Kingma & Ba 2015."""
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g**2
    m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
    return lr * m / (np.sqrt(v) + epsilon)


def clip_rule(g, state, t, lr=0.1, threshold=0.4):
    return lr * g * min(1.0, threshold / np.sqrt(np.sum(COUNTS * g**2)))


def signum_rule(g, state, t, lr=0.1, momentum=0.6):
    state["b"] = momentum * state.get("b", 0.0) + g
    return lr * np.sign(state["b"])


COUNTS = np.array([1.0, 2.0, 5.0])
RULES = {
    "adam": (Adam(beta1=0.8, beta2=0.9, epsilon=1e-3), adam_rule),
    "clip": (SampledSGD(threshold=0.4), clip_rule),
    "signum": (SignSGD(momentum=0.6), signum_rule),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_without_noise(name, problem):
    algorithm, rule = RULES[name]
    still = quiet(problem).replace(multiplicity=COUNTS)
    drawn = sampled(still, algorithm, 0.1, list(range(21)), replicas=2)
    agree_each(drawn.loss, literal_path(still, rule, 20), IDENTITY)
    # In two phases: buffers and Adam's count of steps go on.
    halves = Program((Phase(algorithm, 0.1, 8), Phase(algorithm, 0.1, 12)))
    both = nqm.sample(still, halves, range(21), replicas=2)
    np.testing.assert_array_equal(both.samples, drawn.samples)
    # Restarted, or after something else, they begin anew.
    again = Program((Phase(algorithm, 0.1, 8), Phase(algorithm, 0.1, 12, restart=True)))
    fresh = nqm.sample(still, again, range(21), replicas=2)
    assert np.array_equal(fresh.samples, drawn.samples) == (name == "clip")


def test_phases_of_different_kinds(problem):
    """Linear, not linear, linear: the evaluated weights are handed over."""
    program = Program((
        Phase(SGD(), 0.3, 4, 2), Phase(SampledSGD(momentum=0.5), 0.2, 5, 2),
        Phase(SGD(), 0.1, 3, 2),
    ))  # fmt: skip
    same = Program((
        Phase(SGD(), 0.3, 4, 2), Phase(HeavyBall(0.5), 0.2, 5, 2, restart=True),
        Phase(SGD(), 0.1, 3, 2, restart=True),
    ))  # fmt: skip
    at = [4, 6, 9, 12]
    exact = nqm.solve(problem, same, at)
    drawn = nqm.sample(problem, program, at, replicas=3000, seed=8)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(3000))


@pytest.mark.parametrize("algorithm", [Adam(), SignSGD(dof=3.0), SampledSGD(pitch=0.1)])
def test_numbers_do_not_depend_on_workers_or_records(algorithm, problem):
    program = constant(algorithm, 0.05, 9)
    few = nqm.sample(problem, program, [9], replicas=75, seed=1, workers=1)
    all_steps = nqm.sample(problem, program, range(10), replicas=75, seed=1, workers=3)
    np.testing.assert_array_equal(few.samples[0], all_steps.samples[-1])


# ------------------------------------------------------------------ sign SGD


def test_sign_sgd_is_an_exact_chain_on_a_lattice():
    """The weight stays on x_0 + lr Z; it steps up with probability Phi(-h x / sd)."""
    h, v, lr, steps = 0.7, 1.3, 0.1, 60
    problem = Problem([h], [v], initial_mean=0.55, initial_variance=0.0)
    k = np.arange(-steps, steps + 1)
    x = 0.55 + lr * k
    up = stats.norm.cdf(-h * x / np.sqrt(v / 2))
    law = (k == 0).astype(float)
    at, losses, spreads = [1, 7, steps], [], []
    for t in range(1, steps + 1):
        law = np.roll(law * up, 1) + np.roll(law * (1 - up), -1)
        if t in at:
            loss = 0.5 * h * x**2
            losses.append(law @ loss)
            spreads.append(np.sqrt(law @ loss**2 - (law @ loss) ** 2))
    replicas = 4000
    drawn = sampled(problem, SignSGD(), lr, at, replicas=replicas)
    within_error(drawn.loss, losses, np.array(spreads) / np.sqrt(replicas) + 1e-15)


def test_sign_sgd_settles_where_the_linearised_drift_says():
    """Small rates: SGD at lr sqrt(2/pi)/sd with noise lr^2, so E x^2 = lr sd sqrt(pi/8) / h."""
    h, v, lr = 1.0, 4.0, 0.02
    kappa = lr * h * np.sqrt(2 / np.pi / v)
    floor = lr**2 / (1 - (1 - kappa) ** 2)
    assert floor == pytest.approx(lr * np.sqrt(v * np.pi / 8) / h, rel=kappa)
    problem = Problem([h] * 50, [v] * 50, initial_variance=floor)
    drawn = sampled(problem, SignSGD(), lr, [600], replicas=300, batch_size=1)
    # erf falls short of its slope at 0 by h^2 E x^4 / (6 v E x^2) = h^2 floor / (2 v) < 0.4 %.
    error = drawn.stderr[0] / 25 / h
    assert abs(drawn.loss[0] / 25 / h - floor) < 4.5 * error + 0.004 * floor


# ------------------------------------------------------------------ clipping, tails, rounding


def test_clipping_bounds_every_step(problem):
    """A tiny threshold: each step has length lr * threshold, whatever the noise."""
    start = problem.replace(initial_variance=0.0, initial_mean=[100.0, 0.0, 0.0])
    drawn = sampled(start, SampledSGD(threshold=1e-3, dof=2.5), 1.0, [1, 4], replicas=50)
    bound = 0.5 * (100.0 - 1e-3 * np.array([1, 4])) ** 2
    assert np.all(drawn.samples >= bound[:, None] * (1 - IDENTITY))


def test_clipping_tames_heavy_tails(problem):
    """With dof near 2 the loss hardly has a variance; clipping brings its scatter down."""
    wild = sampled(problem, SampledSGD(dof=2.1), 0.3, [40], replicas=2000)
    tame = sampled(problem, SampledSGD(dof=2.1, threshold=2.0), 0.3, [40], replicas=2000)
    assert np.quantile(tame.samples, 0.999) < np.quantile(wild.samples, 0.999)


@pytest.mark.parametrize("dof", [2.5, 4.0, 30.0])
def test_noise_has_students_law(dof):
    """One step from the minimum with lr 1: x = -e; quantiles of e against SciPy."""
    problem = Problem([1.0], [3.0], initial_variance=0.0)
    drawn = sampled(problem, SampledSGD(dof=dof), 1.0, [1], replicas=20_000)
    size = np.sqrt(2 * drawn.samples[0] / (3.0 / 2))
    found = stats.kstest(size * np.sqrt(dof / (dof - 2)), lambda t: 2 * stats.t.cdf(t, dof) - 1)
    assert found.pvalue > 1e-5


def test_rounding_is_unbiased_with_variance_f_times_1_minus_f():
    """One noiseless step to a known place in a cell, the grid through the origin of w."""
    h, lr, pitch = np.array([0.5, 1.0, 0.2]), 0.3, 0.25
    minimum = np.array([0.1, -0.37, 2.0])
    problem = Problem(h, 0.0, initial_mean=[1.0, 0.4, -3.0], initial_variance=0.0, minimum=minimum)
    x = (1 - lr * h) * problem.initial_mean
    w = x + minimum
    low = np.floor(w / pitch) * pitch
    f = (w - low) / pitch
    up, down = 0.5 * h * (low + pitch - minimum) ** 2, 0.5 * h * (low - minimum) ** 2
    expected = np.sum(f * up + (1 - f) * down)
    assert expected == pytest.approx(0.5 * h @ (x**2 + pitch**2 * f * (1 - f)), rel=1e-14)
    sd = np.sqrt(np.sum(f * (1 - f) * (up - down) ** 2))
    drawn = sampled(problem, SampledSGD(pitch=pitch), lr, [1], replicas=5000)
    within_error(drawn.loss, expected, sd / np.sqrt(5000))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rounding_spread_over_cells_adds_a_sixth_of_its_square(momentum, problem):
    """The linear law of `Rounded`: off by about exp(-2 (pi sd / pitch)^2)."""
    placed = problem.replace(noise_variance=2.0, minimum=[0.3, 1.0, -0.2])
    pitch, replicas = 2 * 0.3 * np.sqrt(2.0 / 2), 8000
    drawn = sampled(placed, SampledSGD(momentum=momentum, pitch=pitch), 0.3, replicas=replicas)
    inner = HeavyBall(momentum) if momentum else SGD()
    exact = nqm.solve(placed, constant(Rounded(inner, pitch), 0.3, AT[-1], batch_size=2), AT)
    error = exact.loss_sd / np.sqrt(replicas)
    within_error(drawn.loss, exact.loss, error)
    plain = nqm.solve(placed, constant(inner, 0.3, AT[-1], batch_size=2), AT)
    assert exact.loss[-1] - plain.loss[-1] > 9 * error[-1]  # so the comparison has teeth


def test_a_coarse_grid_settles_above_sgd(problem):
    """At its floor, real rounding against s* (lr^2 v + pitch^2/6) / (1 - r^2)."""
    h, v, lr, pitch = np.array([0.8]), np.array([1.0]), 0.2, 0.3
    floor = literal.sgd_steady(h, v + pitch**2 / 6 / lr**2, lr, 1)
    many = Problem(np.full(40, h), np.full(40, v), initial_variance=floor[0])
    drawn = sampled(many, SampledSGD(pitch=pitch), lr, [60], replicas=400, batch_size=1)
    per_direction = drawn.loss[0] / 40 / (0.5 * h[0])
    error = drawn.stderr[0] / 40 / (0.5 * h[0])
    assert abs(per_direction - floor[0]) < 4.5 * error
    assert per_direction - 4.5 * error > literal.sgd_steady(h, v, lr, 1)[0]


# ------------------------------------------------------------------ every way in


@pytest.mark.parametrize(
    "phase",
    [
        {"algorithm": "sampled_sgd", "threshold": 2, "dof": 3, "pitch": 0.01, "momentum": 0.5},
        {"algorithm": "sign_sgd", "momentum": 0.5},
        {"algorithm": "adam", "beta2": 0.9},
    ],
)
def test_a_file_reaches_every_method(phase):
    mapping = {
        "problem": {"curvature": [1.0, 0.1], "noise_variance": 1.0},
        "phase": [{"lr": 0.05, "steps": 40, **phase}],
        "method": "sample",
        "replicas": 200,
    }
    losses = config.build(mapping).solve().loss
    assert losses[-1] < losses[0]
    with pytest.raises(NQMError, match="has no exact moments; use method 'sample'"):
        config.build({**mapping, "method": "jump"}).solve()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SampledSGD(dof=2.0), r"SampledSGD\.dof must lie in \(2, inf\)"),
        (lambda: SampledSGD(pitch=-1.0), r"SampledSGD\.pitch"),
        (lambda: SampledSGD(threshold=0.0), r"SampledSGD\.threshold"),
        (lambda: SignSGD(momentum=1.0), r"SignSGD\.momentum"),
        (lambda: Adam(beta1=1.0), r"Adam\.beta1"),
        (lambda: Adam(beta2=-0.1), r"Adam\.beta2"),
        (lambda: Adam(epsilon=0.0), r"Adam\.epsilon"),
        (lambda: nqm.SWA(Adam()), r"SWA\.inner must be an Algorithm; got Adam"),
    ],
)
def test_misuse_names_the_field(build, words):
    with pytest.raises(NQMError, match=words):
        build()


def test_divergence_is_a_status(problem):
    wild = nqm.sample(problem, constant(SampledSGD(pitch=0.1), 50.0, 2000), [2000], replicas=4)
    assert wild.status == [nqm.Status.DIVERGED]

"""Steady states beyond constant rates, and scans over many rates."""

from __future__ import annotations

import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest

import nqm
from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Cosine,
    Cyclic,
    Ensemble,
    HeavyBall,
    LatePhase,
    Lookahead,
    MultiplicativeLatePhase,
    Nesterov,
    NQMError,
    Phase,
    Problem,
    Rounded,
    Status,
    WeightDecay,
)
from nqm.solvers._kernels import scans
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree_each

#: Two units in the last place.
ROUNDED = 2.0 * np.finfo(np.float64).eps

# ------------------------------------------------------------------ steady states


def cyclic_floor(h, v, lrs, sizes):
    """End of a cycle of SGD: q / (1 - rho^2), with rho the product and q the noise of a cycle."""
    q = literal.sgd_moment_sequence(h, v, lrs, sizes, 0.0)
    return q / (1 - np.prod((1 - np.multiply.outer(lrs, h)) ** 2, axis=0))


def test_cyclic_rates_and_batches(problem):
    phase = Phase(SGD(), Cyclic(0.5, 0.1, 3, "linear"), 1, Cyclic(8, 2, 4, "linear"))
    lrs, sizes = np.tile([0.5, 0.3, 0.1], 4), np.tile([8, 6, 4, 2], 3)
    h, v = problem.curvature, problem.noise_variance
    found = nqm.steady(problem, phase)
    agree_each(found.weight_variance, cyclic_floor(h, v, lrs, sizes), JUMP)
    assert found.radius == pytest.approx(np.prod(1 - lrs * h.min()), rel=1e-12)


def test_lawa_over_a_cycle_of_rates(problem):
    """One snapshot at the end of every cycle of 5, two of them averaged."""
    lrs = np.linspace(0.4, 0.2, 5)
    phase = Phase(LAWA(SGD(), 5, 2), Cyclic(0.4, 0.2, 5, "linear"), 1)
    h, v = problem.curvature, problem.noise_variance
    floor = cyclic_floor(h, v, lrs, np.ones(5))
    rho = np.prod(1 - np.multiply.outer(lrs, h), axis=0)
    expected = (floor + floor + 2 * rho * floor) / 4  # two snapshots of covariance rho floor
    agree_each(nqm.steady(problem, phase).weight_variance, expected, JUMP)


def test_multiplicities_and_member_loss(problem):
    counted = problem.replace(multiplicity=[1.0, 10.0, 2.5])
    phase = Phase(LatePhase(4, gamma="mean"), 0.2, 1, 2)
    h, v = problem.curvature, problem.noise_variance
    mean, deviation = literal.late_phase_steady(h, v, 0.2, 2, 4, 0.2, 0.25)
    found = nqm.steady(counted, phase)
    half = 0.5 * h * [1.0, 10.0, 2.5]
    agree_each(found.loss, half @ mean, IDENTITY)
    agree_each(found.member_loss, half @ (mean + deviation), IDENTITY)
    row = found.table().iloc[0]
    assert (row["loss"], row["status"], row["kind"]) == (found.loss, "finished", "exact")


def test_flat_directions_cost_nothing():
    problem = Problem([1.0, 0.0], [1.0, 1.0])
    found = nqm.steady(problem, Phase(LatePhase(2, gamma="mean"), 0.3, 1))
    assert found.status is Status.FINISHED
    assert np.isnan(found.weight_variance).tolist() == [False, True]
    mean, _ = literal.late_phase_steady(np.array([1.0]), np.array([1.0]), 0.3, 1, 2, 0.3, 0.5)
    agree_each(found.loss, 0.5 * mean[0], IDENTITY)


def test_a_wholly_flat_problem_has_no_loss():
    found = nqm.steady(Problem([0.0], 1.0), Phase(SGD(), 0.3, 1))
    assert (found.loss, found.status) == (0.0, Status.FINISHED)


def test_multiplicative_is_said_to_be_first_order(problem):
    lr, member_lr, gamma, factor, k = 0.1, 0.05, 0.5, 1.25, 3
    moved = problem.replace(minimum=[1.0, -2.0, 0.5])
    phase = Phase(MultiplicativeLatePhase(k, gamma, factor), lr, 1, 2, member_lr=member_lr)
    a, b = literal.multiplicative_rates(moved.minimum, factor, lr, member_lr, gamma)
    h, v = moved.curvature, moved.noise_variance
    mean = literal.sgd_steady(h, v / k, a + k * b, 2)
    deviation = literal.sgd_steady(h, v * (1 - 1 / k), a, 2)
    found = nqm.steady(moved, phase)
    assert found.kind == "first_order"
    agree_each(found.weight_variance, mean, IDENTITY)
    agree_each(found.deviation_variance, deviation, IDENTITY)


@pytest.mark.parametrize("lr", [1e-6, 1e-9])
def test_tiny_rates_keep_their_digits(lr, problem):
    """1 - r^2 is near lr h: doubling loses about eps / (lr h) of the floor, not more."""
    found = nqm.steady(problem, Phase(SGD(), lr, 1))
    expected = literal.sgd_steady(problem.curvature, problem.noise_variance, lr, 1)
    agree_each(found.weight_variance, expected, 1e-15 / (lr * 0.02))


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (Phase(SGD(), Cosine(0.3, 0.1, 10), 100), "constant or cyclic"),
        (Phase(SGD(), 0.1, 100, Cosine(8, 2, 10)), "constant or cyclic"),
        (Phase(SWA(), 0.1, 1), "swa has no steady state"),
        (Phase(SWA(LatePhase(2, gamma="mean"), 3), 0.1, 1), "swa has no steady state"),
    ],
)
def test_what_never_settles_is_an_error(phase, words, problem):
    with pytest.raises(NQMError, match=words):
        nqm.steady(problem, phase)


# ------------------------------------------------------------------ scans

RATES = np.array([1e-4, 0.03, 0.3, 0.9])


@pytest.mark.parametrize("steps", [0, 1, 20, 10**6])
def test_scan_of_sgd_is_the_closed_form(steps, problem):
    h, v = problem.curvature, problem.noise_variance
    s0 = problem.initial_mean**2 + problem.initial_variance
    found = nqm.scan(problem, SGD(), RATES, steps, batch_size=2)
    expected = [0.5 * h @ literal.sgd_moment(h, v, lr, 2, s0, steps) for lr in RATES]
    agree_each(found.loss, expected, JUMP if steps > 100 else IDENTITY)
    bias = [0.5 * h @ ((1 - lr * h) ** (2 * steps) * s0) for lr in RATES]
    np.testing.assert_allclose(found.bias, bias, rtol=JUMP, atol=1e-300)
    agree_each(found.bias + found.variance, found.loss, IDENTITY)
    np.testing.assert_array_equal(found.member_loss, found.loss)


@pytest.mark.parametrize("steps", [1, 20, 1001])
def test_scan_of_late_phase_is_the_closed_form(steps, problem):
    h, v = problem.curvature, problem.noise_variance
    s0 = problem.initial_mean**2 + problem.initial_variance
    member = np.array([0.5, 0.01, 0.1, 0.2])
    found = nqm.scan(problem, LatePhase(3, 0.2, spread=0.3), RATES, steps, member_lr=member)
    for i, (lr, member_lr) in enumerate(zip(RATES, member, strict=True)):
        mean, deviation = literal.late_phase_moment(
            h, v, lr, 1, 3, member_lr, 0.2, s0, steps, spread=0.3
        )
        agree_each(found.loss[i], 0.5 * h @ mean, 1e-11)
        agree_each(found.member_loss[i], 0.5 * h @ (mean + deviation), 1e-11)


@pytest.mark.parametrize(
    "algorithm",
    [HeavyBall(0.7), EMA(SGD(), 0.9), SWA(SGD(), 3), LAWA(SGD(), 2, 3), Ensemble(2, starts="own"),
     Lookahead(HeavyBall(0.5), 4, 0.5), SWA(LatePhase(2, gamma="mean"), 2)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 11, 240])
def test_scan_is_one_program_per_rate(algorithm, steps, problem):
    """Steps that are and are not a multiple of the period; the solver has its own oracle."""
    found = nqm.scan(problem, algorithm, RATES, steps, batch_size=3)
    for i, lr in enumerate(RATES):
        result = nqm.solve(
            problem, nqm.constant(algorithm, float(lr), steps, batch_size=3), [steps], jump=False
        )
        for name in ("loss", "bias", "variance", "member_loss"):
            np.testing.assert_allclose(
                getattr(found, name)[i], getattr(result, name)[0], rtol=JUMP, atol=1e-300
            )


def test_scan_in_pieces_is_the_scan(monkeypatch, problem):
    whole = nqm.scan(problem, Lookahead(SGD(), 3, 0.5), np.linspace(0.01, 1, 50), 100)
    monkeypatch.setattr("nqm.solvers.scan.CHUNK", 100)
    parts = nqm.scan(problem, Lookahead(SGD(), 3, 0.5), np.linspace(0.01, 1, 50), 100)
    np.testing.assert_array_equal(parts.loss, whole.loss)


def test_diverged_rates_are_not_finite_and_warn_of_nothing(problem):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nqm.scan(problem, HeavyBall(0.5), [0.1, 30.0], 10**6)
    assert np.isfinite(found.loss).tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: nqm.scan(p, SGD(), [0.1, 0.0], 5), "lr must hold"),
        (lambda p: nqm.scan(p, SGD(), [np.nan], 5), "lr must hold"),
        (
            lambda p: nqm.scan(p, LatePhase(2, gamma="mean"), [0.1], 5, member_lr=-1.0),
            "member_lr must hold",
        ),
        (lambda p: nqm.scan(p, SGD(), [0.1], -5), r"scan\.steps"),
        (lambda p: nqm.scan(p, SGD(), [0.1], 5, batch_size=0), r"scan\.batch_size"),
        (
            lambda p: nqm.scan(p, MultiplicativeLatePhase(2, gamma="mean"), [0.1], 5),
            "MultiplicativeLatePhase",
        ),
    ],
)
def test_bad_scans_are_errors(call, words, problem):
    with pytest.raises(NQMError, match=words):
        call(problem)


LANES = {
    "sgd": SGD(),
    "decay": WeightDecay(SGD(), 0.2),
    "rounded": Rounded(SGD(), 0.01),
    "heavy_ball": HeavyBall(0.9),
    "nesterov": Nesterov(0.8),
    "ema": EMA(decay=0.98),
    "late": LatePhase(3, 0.2, spread=0.3),
}


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("steps", [1, 2, 3, 1000, 70_001])
def test_scan_of_many_directions_at_once_is_that_of_one_by_one(name, steps, monkeypatch):
    """40 directions fill a block of lanes and a part of the next; some rates diverge."""
    h = np.concatenate([np.geomspace(1e-6, 2.0, 39), [0.0]])
    problem = Problem(h, 0.3 + h, initial_mean=0.4, minimum=-0.7)
    rates = np.concatenate([np.geomspace(1e-4, 0.4, 7), [5.0]])
    found = nqm.scan(problem, LANES[name], rates, steps, batch_size=3)
    monkeypatch.setattr("nqm.solvers.scan._in_lanes", lambda *_: None)
    right = nqm.scan(problem, LANES[name], rates, steps, batch_size=3)
    for one, other in ((found.bias, right.bias), (found.variance, right.variance)):
        finite = np.isfinite(other)
        assert finite[:-1].all()
        agree_each(one[finite], other[finite], JUMP)
        assert not np.isfinite(one[~finite]).any()


@pytest.mark.parametrize("steps", [1, 2, 999, 10**6, 10**13])
def test_the_closed_form_of_one_coordinate_has_all_digits(steps):
    """Against 60 digits, with 1 - lr h within 1e-9 of 1, +-1/2, 0, near -1, -1 and beyond it."""
    for h in (1e-9, 0.5, 1.0, 1.5, 2.0 - 2.0**-40, 2.0, 2.0 + 1e-12):
        found = nqm.scan(Problem([h], [0.25], initial_variance=1.75), SGD(), [1.0], steps)
        with localcontext() as digits:
            digits.prec = 60
            square = (1 - Decimal(h)) ** 2
            power = square**steps
            summed = Decimal(steps) if square == 1 else (power - 1) / (square - 1)
            expected = [Decimal(h) / 2 * part for part in (power * Decimal("1.75"), summed)]
        agree_each(found.bias, float(expected[0]), IDENTITY)
        agree_each(found.variance, float(expected[1] * Decimal("0.25")), IDENTITY)


def test_logarithm_and_exponential_of_the_closed_form():
    """Within two units in the last place of the C library's."""
    x = np.concatenate([np.linspace(1e-3, 3.0, 999), 1.0 + 10.0 ** np.arange(-15.0, -1), [1e-300]])
    y = np.concatenate([np.linspace(-700.0, 700.0, 999), 10.0 ** np.arange(-15.0, 0), [0.0, -0.4]])
    agree_each(np.array([scans._log(value) for value in x]), np.log(x), ROUNDED)
    power, less = np.array([scans._exp(value) for value in y]).T
    agree_each(power, np.exp(y), ROUNDED)
    agree_each(less, np.expm1(y), ROUNDED)
    assert scans._exp(-709.0) == (0.0, -1.0)
    assert scans._exp(710.0) == (np.inf, np.inf)


@pytest.mark.parametrize(
    "inner",
    [
        SGD(),
        HeavyBall(0.7),
        EMA(SGD(), 0.9),
        LatePhase(3, gamma="mean", inner=HeavyBall(0.5), directions=(0, 1)),
    ],
    ids=lambda inner: type(inner).__name__,
)
@pytest.mark.parametrize("every", [1, 3])
def test_long_windows_settle_as_their_snapshots_carried_along(inner, every, problem, monkeypatch):
    phase = Phase(LAWA(inner, every, 20), 0.3, 1, 4)
    found = nqm.steady(problem, phase)
    monkeypatch.setattr("nqm.solvers.moving_window.SHORT", 10**9)
    carried = nqm.steady(problem, phase)
    agree_each([found.loss, found.member_loss], [carried.loss, carried.member_loss], JUMP)
    agree_each(found.weight_variance, carried.weight_variance, JUMP)
    assert found.radius == pytest.approx(carried.radius, rel=1e-6)  # a power of that of one step


def test_a_window_of_a_million_snapshots_in_closed_form():
    """Its variance is s / w (1 + r^k) / (1 - r^k), less 2 s r^k (1 - r^(k w)) / (w (1 - r^k))^2."""
    h, v, lr, every, window = np.array([1.0, 0.2]), np.array([2.0, 1.0]), 0.3, 3, 10**6
    found = nqm.steady(Problem(h, v), Phase(LAWA(SGD(), every, window), lr, 1, 4))
    s, r = literal.sgd_steady(h, v, lr, 4), (1.0 - lr * h) ** every
    near = s / window * (1.0 + r) / (1.0 - r)
    expected = near - 2.0 * s * r * (1.0 - r**window) / (window * (1.0 - r)) ** 2
    agree_each(found.weight_variance, expected, JUMP)


@pytest.mark.parametrize("variance", [0.01, 0.4])
@pytest.mark.parametrize("lr", [0.02, 0.1])
@pytest.mark.parametrize(
    ("start", "inside"), [({}, True), ({"initial_mean": 0.3}, False)], ids=["minimum", "off"]
)
def test_a_first_order_steady_state_says_whether_it_is_in_range(variance, lr, start, inside):
    """Against the moment closure, when the start has decayed to 1e-3 of its loss."""
    start = {"minimum": 1.0, "initial_variance": 0.0} | start
    problem = Problem([1.0], [variance], **start)
    late = MultiplicativeLatePhase(4, gamma="mean")
    found = nqm.steady(problem, Phase(late, lr, 1))
    steps = int(np.ceil(np.log(1e-3) / (2.0 * np.log(found.radius))))
    truth = nqm.moment_closure(problem, Phase(late, lr, steps), [steps])
    off = abs(found.loss / truth.loss[0] - 1), abs(found.member_loss / truth.member_loss[0] - 1)
    assert (max(off) < 0.05) == inside  # the estimate is that of all first-order results
    assert found.in_range == inside
    assert found.table()["in_range"].tolist() == [inside]


def test_steady_tables_of_exact_results_are_in_range(problem):
    assert nqm.steady(problem, Phase(SGD(), 0.1, 1)).table()["in_range"].all()
    assert nqm.steady(nqm.LeastSquares([1.0], 0.1), Phase(SGD(), 0.1, 1)).table()["in_range"].all()
    late = Phase(MultiplicativeLatePhase(4), 50.0, 1)
    one = Problem([1.0], [1.0], minimum=1.0)
    assert not nqm.steady(one, late).table()["in_range"].any()

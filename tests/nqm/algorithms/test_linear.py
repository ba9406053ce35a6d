"""Closed forms of local SGD, differing clients, weight decay, rounding, partial replication."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import (
    EMA,
    LAWA,
    ROSTER,
    SGD,
    SWA,
    Algorithm,
    Federated,
    HeavyBall,
    LatePhase,
    LocalSGD,
    Lookahead,
    Nesterov,
    NQMError,
    Phase,
    PolynomialAverage,
    Program,
    QuasiHyperbolicMomentum,
    Rounded,
    ScheduleFree,
    WeightDecay,
)
from nqm.runs import config
from nqm.transition import extract, spectral_radius
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, within_error

LR, BATCH = 0.3, 2


def second_moment(result, row=-1):
    return result.weight_mean[row] ** 2 + result.weight_variance[row]


def start_moment(problem):
    return problem.initial_mean**2 + problem.initial_variance


# ------------------------------------------------------------------ local SGD


def transformed(problem, clients, local_steps):
    """A round of local steps as one step of a method: h~ = 1 - r^H, v~ = q_H / M."""
    r = 1 - LR * problem.curvature
    q = literal.sgd_moment(problem.curvature, problem.noise_variance, LR, BATCH, 0.0, local_steps)
    return 1 - r**local_steps, q / clients


@pytest.mark.parametrize(
    ("outer", "form", "more"),
    [
        (SGD(), literal.sgd_steady, {}),
        (HeavyBall(0.6), literal.heavy_ball_steady, {"momentum": 0.6}),
        (Nesterov(0.9), literal.nesterov_steady, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("outer_lr", [0.7, 1.0])
def test_diloco_is_momentum_on_the_transformed_problem(outer, form, more, outer_lr, problem):
    algorithm = LocalSGD(4, 5, SGD(), outer, outer_lr)
    found = nqm.steady(problem, Phase(algorithm, LR, 1, BATCH))
    h, v = transformed(problem, 4, 5)
    agree_each(found.weight_variance, form(h, v, outer_lr, 1, **more), JUMP)
    # At the end of a round all clients are at the server's model.
    agree(found.deviation_variance, np.zeros(3), IDENTITY)


@pytest.mark.parametrize("rounds", [1, 7, 100_000])
def test_fedavg_round_by_round(rounds, problem):
    program = nqm.constant(LocalSGD(4, 5), LR, 5 * rounds, batch_size=BATCH)
    h, v = transformed(problem, 4, 5)
    expected = literal.sgd_moment(h, v, 1.0, 1, start_moment(problem), rounds)
    agree_each(second_moment(nqm.solve(problem, program)), expected, JUMP)


def test_workers_drift_apart_within_a_round(problem):
    """After j local steps a client is (1 - 1/M) q_j from the mean, whatever went before."""
    program = nqm.constant(LocalSGD(4, 5), LR, 15, batch_size=BATCH)
    result = nqm.solve(problem, program, range(16))
    for t in range(16):
        h, v = problem.curvature, problem.noise_variance
        apart = 0.75 * literal.sgd_moment(h, v, LR, BATCH, 0.0, t % 5)
        agree(result.member_loss[t] - result.loss[t], 0.5 * h @ apart, 1e-11)


# ------------------------------------------------------------------ clients that differ

CURVATURES, SHIFTS = (0.5, 1.0, 1.5), (-0.9, 0.15, 0.2)


@pytest.fixture
def placed(problem):
    """The same problem with its minimum away from the origin."""
    return problem.replace(minimum=[1.0, -2.0, 0.5])


@pytest.mark.parametrize("local_steps", [1, 2, 6])
def test_client_drift(local_steps, placed):
    """Fixed point of FedAvg: sum_k (1 - rho_k) (x - x_k) = 0 with rho_k = (1 - lr c_k h)^H."""
    algorithm = Federated(3, local_steps, curvatures=CURVATURES, shifts=SHIFTS)
    found = nqm.steady(placed, Phase(algorithm, LR, 1, BATCH))
    pull = 1 - (1 - LR * np.outer(CURVATURES, placed.curvature)) ** local_steps
    expected = np.sum(pull * np.outer(SHIFTS, placed.minimum), axis=0) / pull.sum(axis=0)
    np.testing.assert_allclose(found.weight_mean, expected, atol=IDENTITY)
    assert np.all((np.abs(expected) < 1e-15) == (local_steps == 1))
    # Variance: server' = mean_k rho_k server + noise q_k / M^2 of each client.
    rho = 1 - pull
    q = (
        sum(
            literal.sgd_moment(
                c * placed.curvature, placed.noise_variance, LR, BATCH, 0.0, local_steps
            )
            for c in CURVATURES
        )
        / 9
    )
    variance = q / (1 - rho.mean(axis=0) ** 2)
    agree_each(found.weight_variance, variance, JUMP)
    agree_each(found.loss, placed.weight @ (expected**2 + variance), JUMP)


def test_clients_against_the_literal_simulation(placed):
    algorithm = Federated(3, 3, HeavyBall(0.5), Nesterov(0.4), 0.8, CURVATURES, SHIFTS)
    program = nqm.constant(algorithm, LR, 17, batch_size=BATCH)
    exact = nqm.solve(placed, program, range(18))
    path, _ = literal.local_sgd(
        placed.curvature, placed.noise_variance, placed.initial_mean[None], LR, BATCH, 17, None,
        clients=3, local_steps=3, inner="heavy_ball", momentum=0.5, outer="nesterov",
        outer_lr=0.8, outer_momentum=0.4, curvatures=CURVATURES,
        minima=np.outer(SHIFTS, placed.minimum),
    )  # fmt: skip
    agree(exact.weight_mean, path[:, 0], IDENTITY)
    drawn = nqm.sample(placed, program, [3, 17], replicas=2000, seed=4)
    within_error(drawn.loss, exact.loss[[3, 17]], exact.loss_sd[[3, 17]] / np.sqrt(2000))


# ------------------------------------------------------------------ weight decay


@pytest.mark.parametrize("toward", ["origin", "start"])
@pytest.mark.parametrize(
    ("inner", "decoupled", "pull"),
    [
        (SGD(), False, 1.0), (HeavyBall(0.6), False, 1.0), (Nesterov(0.6), False, 1.0),
        (SGD(), True, 1.0),
        # Momentum multiplies the gradient by 1 / (1 - mu) and not the decoupled decay.
        (HeavyBall(0.6), True, 0.4), (LatePhase(3, gamma="mean"), False, 1.0),
        (EMA(HeavyBall(0.6), 0.8), False, 1.0),
    ],
)  # fmt: skip
def test_decay_shifts_the_fixed_point(inner, decoupled, pull, toward, placed):
    """Fixed point: h x + pull decay (x - anchor) = 0."""
    decay = 0.2
    if isinstance(inner, EMA):
        algorithm = EMA(WeightDecay(inner.inner, decay, toward, decoupled), inner.decay)
    else:
        algorithm = WeightDecay(inner, decay, toward, decoupled)
    gain = pull * decay / (placed.curvature + pull * decay)
    anchor = -placed.minimum if toward == "origin" else placed.initial_mean
    found = nqm.steady(placed, Phase(algorithm, LR, 1, BATCH))
    agree_each(found.weight_mean, gain * anchor, IDENTITY)
    end = nqm.solve(placed, nqm.constant(algorithm, LR, 10**6, batch_size=BATCH), [10**6])
    agree_each(end.loss[0], found.loss, JUMP)
    agree_each(end.member_loss[0], found.member_loss, JUMP)
    agree_each(end.weight_variance[0], found.weight_variance, JUMP)


@pytest.mark.parametrize("toward", ["origin", "start"])
def test_coupled_decay_is_sgd_on_a_sharper_problem(toward, placed):
    """Curvature h + decay about the new minimum; a start's spread reaches the anchor too."""
    decay, steps = 0.2, 11
    program = nqm.constant(WeightDecay(SGD(), decay, toward), LR, steps, batch_size=BATCH)
    result = nqm.solve(placed, program, [steps])
    h = placed.curvature + decay
    rest = decay / h * (-placed.minimum if toward == "origin" else placed.initial_mean)
    r = (1 - LR * h) ** steps
    agree_each(result.weight_mean[0], rest + r * (placed.initial_mean - rest), IDENTITY)
    kept = r if toward == "origin" else r + (1 - r) * decay / h
    noise = literal.sgd_moment(h, placed.noise_variance, LR, BATCH, 0.0, steps)
    agree_each(result.weight_variance[0], kept**2 * placed.initial_variance + noise, IDENTITY)


@pytest.mark.parametrize("toward", ["origin", "start"])
@pytest.mark.parametrize("inner", [HeavyBall(0.6), LatePhase(3, spread=0.3, gamma="mean")])
@pytest.mark.parametrize("then", [None, "ema"])
def test_decay_in_a_later_phase(inner, toward, then, placed):
    """The anchor is set when its phase begins and goes on into a phase that adds to it."""
    decayed = WeightDecay(inner, 0.2, toward)
    first, second = Phase(HeavyBall(0.6), LR, 4, BATCH), Phase(decayed, 0.1, 5, BATCH)
    phases = [first, second, *([Phase(EMA(decayed, 0.5), 0.1, 4, BATCH)] if then else [])]
    program = Program(tuple(phases))
    at = [4, 6, 9, program.steps]
    exact = nqm.solve(placed, program, at)
    drawn = nqm.sample(placed, program, at, replicas=3000, seed=1)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(3000))
    error = np.hypot(drawn.member_stderr, 1e-3 * exact.member_loss)
    within_error(drawn.member_loss, exact.member_loss, error)
    # Noiseless: the literal loop, momentum and all.
    if isinstance(inner, HeavyBall) and then is None:
        x, b = placed.initial_mean, np.zeros(3)
        for t in range(9):
            if t == 4:
                anchor = x if toward == "start" else -placed.minimum
            pull = 0.2 * (x - anchor) if t >= 4 else 0.0
            b = 0.6 * b + placed.curvature * x + pull
            x = x - (LR if t < 4 else 0.1) * b
        agree_each(exact.weight_mean[2], x, IDENTITY)


# ------------------------------------------------------------------ low precision

PITCH = 0.4


@pytest.mark.parametrize("steps", [1, 100, 10**6])
def test_rounding_adds_a_sixth_of_its_square(steps, problem):
    """Moments: s' = r^2 s + lr^2 v / B + pitch^2 / 6; no batch makes the last term smaller."""
    h, v = problem.curvature, problem.noise_variance
    for batch in (BATCH, 1e12):
        noise = v / batch + PITCH**2 / 6 / LR**2
        program = nqm.constant(Rounded(SGD(), PITCH), LR, steps, batch_size=batch)
        expected = literal.sgd_moment(h, noise, LR, 1, start_moment(problem), steps)
        agree_each(second_moment(nqm.solve(problem, program, [steps])), expected, JUMP)
    found = nqm.steady(problem, Phase(Rounded(SGD(), PITCH), LR, 1, BATCH))
    floor = (LR**2 * v / BATCH + PITCH**2 / 6) / (1 - (1 - LR * h) ** 2)
    agree_each(found.weight_variance, floor, JUMP)


def test_swalp_averages_rounding_away(problem):
    """SWA on top: the uniform mean's closed form, which falls as 1 / N."""
    h, v = problem.curvature, problem.noise_variance
    noise = v / BATCH + PITCH**2 / 6 / LR**2
    for n in (1, 5, 60):
        program = nqm.constant(SWA(Rounded(SGD(), PITCH)), LR, n, batch_size=BATCH)
        expected = literal.snapshot_average(h, noise, LR, 1, start_moment(problem), 1, n)
        agree_each(second_moment(nqm.solve(problem, program, [n])), expected, IDENTITY)
    n = 10**7
    program = nqm.constant(SWA(Rounded(SGD(), PITCH)), LR, n, batch_size=BATCH)
    long = nqm.solve(problem, program, [n])
    agree_each(long.weight_variance[0], noise / (h**2 * n), 3e-5)  # 1 / (lr h n) and more, flattest


# ------------------------------------------------------------------ averages over all the past


@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_schedule_free_settles_only_late_near_its_edge(beta):
    """Step t alone is stable iff 2 (1 + a) > (1 + a + u beta) / t, a = 1 - u (1 - beta) (Jury)."""
    seen = set()
    for u in np.linspace(0.13, 2.47, 25) / (1 - beta):
        a = 1 - u * (1 - beta)
        for t in (1, 3, 10, 100):
            step = extract(ScheduleFree(beta), [1.0], u, t - 1)
            # det = a (1 - 1/t) must stay below 1 in size, and the other root above -1.
            stable = 2 * (1 + a) > (1 + a + u * beta) / t and abs(a * (1 - 1 / t)) < 1
            assert (spectral_radius(step.matrix)[0] < 1) == stable
            seen.add(stable)
    assert seen == {True, False}


def test_polynomial_weights_in_closed_form(problem):
    """Loss of sum_s w_s x_s from the covariances r^|s - u| of SGD at its floor."""
    n, eta = 40, 2
    floor = nqm.steady(problem, Phase(SGD(), LR, 1)).weight_variance
    settled = problem.replace(initial_mean=0.0, initial_variance=floor)
    result = nqm.solve(settled, nqm.constant(PolynomialAverage(SGD(), eta), LR, n), [n])
    s = np.arange(1, n + 1)
    w = s * (s + 1) / np.sum(s * (s + 1))
    for i, h in enumerate(problem.curvature):
        covariance = floor[i] * (1 - LR * h) ** np.abs(s[:, None] - s)
        agree_each(result.weight_variance[0, i], w @ covariance @ w, IDENTITY)


@pytest.mark.parametrize(
    "algorithm", [ScheduleFree(), PolynomialAverage(LatePhase(2, gamma="mean"))]
)
def test_what_ages_never_settles(algorithm, problem):
    with pytest.raises(NQMError, match="has no steady state: each of its steps differs"):
        nqm.steady(problem, Phase(algorithm, 0.1, 1))


def test_steps_to_target_of_a_method_that_ages(problem):
    phase = Phase(ScheduleFree(0.5), 0.4, 2000, 4)
    path = nqm.solve(problem, Program((phase,)), range(2001)).loss
    found = nqm.steps_to_target(problem, phase, 0.05)
    assert found.step == np.flatnonzero(path <= 0.05)[0]


# ------------------------------------------------------------------ part of the examples in common


@pytest.mark.parametrize("q", [0.0, 0.25, 0.9, 1.0])
def test_correlated_minibatches(q, problem):
    """Mean noise v (q + (1 - q) / K), deviation v (1 - q) (1 - 1/K), examples q + (1 - q) K."""
    k, h, v = 4, problem.curvature, problem.noise_variance
    phase = Phase(LatePhase(k, minibatch=q, gamma="mean"), LR, 10, BATCH)
    found = nqm.steady(problem, phase)
    agree_each(
        found.weight_variance, literal.sgd_steady(h, v * (q + (1 - q) / k), 2 * LR, BATCH), JUMP
    )
    apart = literal.sgd_steady(h, v * (1 - q) * (1 - 1 / k), LR, BATCH)
    agree(found.deviation_variance, apart, JUMP)
    agree_each(phase.examples(10), 10 * BATCH * (q + (1 - q) * k), IDENTITY)


# ------------------------------------------------------------------ partial replication


def partial(**more):
    return LatePhase(4, 0.2, directions=(1,), **more)


@pytest.mark.parametrize("steps", [1, 50, 10**6])
def test_partial_replication_direction_by_direction(steps, problem):
    """Without members: SGD at gamma K lr with batch K B. With them: rate lambda."""
    h, v, s0 = problem.curvature, problem.noise_variance, start_moment(problem)
    phase = Phase(partial(spread=0.3), LR, steps, BATCH, member_lr=0.1)
    result = nqm.solve(problem, Program((phase,)), [steps])
    alone = literal.sgd_moment(h, v / 4, 0.8 * LR, BATCH, s0, steps)
    mean, apart = literal.late_phase_moment(h, v, LR, BATCH, 4, 0.1, 0.2, s0, steps, 0.3)
    expected = np.where([0, 1, 0], mean, alone)
    agree_each(second_moment(result), expected, JUMP)
    spread = 0.5 * h @ (apart * [0, 1, 0])
    agree_each(result.member_loss[0], 0.5 * h @ expected + spread, JUMP)
    if steps == 10**6:
        found = nqm.steady(problem, phase)
        agree_each(found.loss, result.loss[0], JUMP)
        agree_each(found.member_loss, result.member_loss[0], JUMP)
        assert found.deviation_variance[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: EMA(a, 0.5), lambda a: SWA(a, 2)])
def test_partial_replication_in_a_later_phase(wrap, problem):
    program = Program((
        Phase(HeavyBall(0.5), LR, 5, BATCH),
        Phase(wrap(partial(spread=0.3, inner=HeavyBall(0.5))), 0.1, 6, BATCH, member_lr=0.2),
    ))  # fmt: skip
    exact = nqm.solve(problem, program, [5, 8, 11])
    drawn = nqm.sample(problem, program, [5, 8, 11], replicas=3000, seed=2)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(3000))
    error = np.hypot(drawn.member_stderr, 1e-3 * exact.member_loss)
    within_error(drawn.member_loss, exact.member_loss, error)


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        (0.0, [0, 0, 0, 0]), (0.39, [0, 0, 0, 0]), (0.4, [0, 1, 0, 0]), (0.5, [0, 1, 0, 1]),
        (1.0, [1, 1, 1, 1]), ((0, 2), [1, 0, 1, 0]), ((), [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_which_directions_have_members(directions, expected, problem):
    """A fraction counts multiplicity, sharpest first."""
    counted = nqm.Problem([0.1, 1.0, 0.2, 0.3], 1.0, multiplicity=[2, 4, 3, 1])
    mask = LatePhase(2, directions=directions, gamma="mean").member_mask(counted)
    assert mask.tolist() == expected


def test_other_directions_are_other_members(problem):
    """Members do not go on where the replicated directions change."""
    first, second = (
        LatePhase(3, directions=(0,), gamma="mean"),
        LatePhase(3, directions=(1,), gamma="mean"),
    )
    program = Program((Phase(first, LR, 9, BATCH), Phase(second, LR, 1, BATCH)))
    one = nqm.solve(problem, program, [9, 10])
    # After one step from a common point only direction 1's own noise sets members apart.
    apart = 0.5 * problem.curvature[1] * LR**2 * problem.noise_variance[1] / BATCH * (1 - 1 / 3)
    agree_each(one.member_loss[1] - one.loss[1], apart, 1e-11)


# ------------------------------------------------------------------ every way in


SCANNED = [
    LocalSGD(3, 4, Nesterov(0.5), HeavyBall(0.3), 0.8),
    Federated(3, 2, curvatures=CURVATURES, shifts=SHIFTS),
    ScheduleFree(0.7), PolynomialAverage(LatePhase(2), 2.0), PolynomialAverage(Lookahead(), 0.5),
    WeightDecay(HeavyBall(0.5), 0.1), WeightDecay(LatePhase(2), 0.1, "start"), Rounded(SGD(), 0.3),
    WeightDecay(Rounded(SGD(), 0.3), 0.1),
    LAWA(Rounded(Nesterov(0.5), 0.3), 2, 2), LatePhase(3, "mean", minibatch=0.4, directions=0.7),
    EMA(LatePhase(3, spread=0.2, directions=(0,), gamma="mean"), 0.6),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", SCANNED, ids=lambda a: type(a).__name__)
def test_scan_is_solve(algorithm, placed):
    rates, member = np.array([0.05, 0.2]), np.array([0.1, 0.3])
    two = algorithm.rate_count == 2
    found = nqm.scan(
        placed, algorithm, rates, 37, batch_size=BATCH, member_lr=member if two else None
    )
    for i, lr in enumerate(rates):
        phase = Phase(algorithm, lr, 37, BATCH, member_lr=member[i] if two else None)
        one = nqm.solve(placed, Program((phase,)), [37])
        for name in ("loss", "bias", "variance", "member_loss"):
            agree_each(getattr(found, name)[i], getattr(one, name)[0], 1e-11)


#: Parameters that a file gives; the defaults where a method is not named here.
TABLES = {
    "quasi_hyperbolic_momentum": {"momentum": 0.8, "nu": 0.5},
    "local_sgd": {"clients": 2, "local_steps": 3, "outer_lr": 0.7,
                  "outer": {"algorithm": "nesterov", "momentum": 0.5}},
    "federated": {"clients": 2, "local_steps": 3, "curvatures": [1.5, 0.5], "shifts": [1, -3]},
    "schedule_free": {"beta": 0.5},
    "polynomial_average": {"inner": "late_phase", "eta": 2},
    "weight_decay": {"inner": {"algorithm": "heavy_ball", "momentum": 0.5}, "decay": 0.1,
                     "decoupled": True},
    "rounded": {"pitch": 0.1},
    "swa": {"inner": {"algorithm": "rounded", "pitch": 0.1}},
    "late_phase": {"members": 3, "minibatch": 0.25, "directions": [0]},
    "ema": {"inner": {"algorithm": "late_phase", "members": 2, "directions": 0.5}},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name, cls in ROSTER.items() if issubclass(cls, Algorithm)]
)
def test_a_file_reaches_every_method(name):
    mapping = {
        "problem": {"curvature": [1.0, 0.1], "noise_variance": 1.0, "minimum": 1.0},
        "phase": [{"algorithm": name, "lr": 0.1, "steps": 12, **TABLES.get(name, {})}],
        "replicas": 300,
    }
    run = config.build(mapping)
    exact = run.solve()
    drawn = config.build({**mapping, "method": "sample"}).solve()
    within_error(drawn.loss[-1], exact.loss[-1], exact.loss_sd[-1] / np.sqrt(300))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: QuasiHyperbolicMomentum(1.0), r"QuasiHyperbolicMomentum\.momentum must lie in"),
        (lambda: QuasiHyperbolicMomentum(0.9, 1.1), r"QuasiHyperbolicMomentum\.nu must lie in"),
        (lambda: LocalSGD(0), r"LocalSGD\.clients"),
        (lambda: LocalSGD(2, 0), r"LocalSGD\.local_steps"),
        (lambda: LocalSGD(2, outer=SWA()), r"LocalSGD\.outer"),
        (lambda: LocalSGD(2, outer_lr=0.0), r"LocalSGD\.outer_lr"),
        (lambda: Federated(3, curvatures=(1.0, 1.0)), "one number for each of the 3 clients"),
        (lambda: Federated(2, curvatures=(1.0, 2.0)), r"Federated\.curvatures must average to 1"),
        (lambda: Federated(2, shifts=(1.0, 2.0)), r"Federated\.shifts times curvatures"),
        (lambda: Federated(2, curvatures=(3.0, -1.0)), r"Federated\.curvatures must lie in"),
        (lambda: ScheduleFree(1.1), r"ScheduleFree\.beta"),
        (lambda: EMA(ScheduleFree()), "EMA.inner must not average"),
        (lambda: PolynomialAverage(SGD(), -1.0), r"PolynomialAverage\.eta"),
        (lambda: WeightDecay(SWA()), r"put it inside SWA"),
        (lambda: WeightDecay(ScheduleFree()), r"put it inside ScheduleFree"),
        (lambda: WeightDecay(SGD(), -0.1), r"WeightDecay\.decay"),
        (lambda: WeightDecay(SGD(), 0.1, "zero"), "must be 'origin' or 'start'; got 'zero'"),
        (
            lambda: WeightDecay(LatePhase(2, gamma="mean"), 0.1, decoupled=True),
            "must be an Optimizer",
        ),
        (lambda: Rounded(LatePhase(2, gamma="mean")), r"Rounded\.inner must be an Optimizer"),
        (lambda: Rounded(SGD(), -0.1), r"Rounded\.pitch"),
        (
            lambda: LatePhase(2, minibatch=1.5, gamma="mean"),
            r"LatePhase\.minibatch must lie in \[0, 1\]",
        ),
        (
            lambda: LatePhase(2, directions=1.5, gamma="mean"),
            r"LatePhase\.directions must lie in \[0, 1\]",
        ),
        (
            lambda: LatePhase(2, directions=(-1,), gamma="mean"),
            r"LatePhase\.directions must be an integer",
        ),
    ],
)
def test_misuse_names_the_field(build, words):
    with pytest.raises(NQMError, match=words):
        build()


@pytest.mark.parametrize("algorithm", [
    Federated(2, shifts=(1.0, -1.0)), SWA(WeightDecay(Federated(2, shifts=(1.0, -1.0)))),
])  # fmt: skip
def test_shifts_need_a_minimum_to_be_a_part_of(algorithm, problem):
    for solver in (nqm.solve, nqm.sample):
        with pytest.raises(NQMError, match=r"Federated\.shifts are in units of problem\.minimum"):
            solver(problem, nqm.constant(algorithm, 0.1, 5))
    with pytest.raises(NQMError, match=r"Federated\.shifts are in units"):
        nqm.scan(problem, algorithm, [0.1], 5)


def test_directions_beyond_the_problem(problem):
    with pytest.raises(NQMError, match=r"LatePhase\.directions must lie in 0\.\.2"):
        nqm.solve(problem, nqm.constant(LatePhase(2, directions=(3,), gamma="mean"), 0.1, 5))

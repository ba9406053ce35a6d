"""Phase changes: what is handed over, against simulators chained by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import nqm
from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Constant,
    Cosine,
    Cyclic,
    Ensemble,
    HeavyBall,
    Joined,
    LatePhase,
    Lookahead,
    MultiplicativeLatePhase,
    Nesterov,
    NQMError,
    Phase,
    Piecewise,
    Problem,
    Program,
    Warmup,
)
from nqm.program import steps_for
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, within_error

Array = np.ndarray
REPLICAS = 4000


def starts(problem: Problem, replicas: int, rng: np.random.Generator | None) -> Array:
    shape = (replicas, problem.directions)
    noise = np.zeros(shape) if rng is None else rng.standard_normal(shape)
    return problem.initial_mean + np.sqrt(problem.initial_variance) * noise


def snapshots(path: Array, every: int) -> Array:
    """Running mean of a path's snapshots; axis 0 is time."""
    out = [path[0]]
    for t in range(1, len(path)):
        taken = path[every : t + 1 : every]
        out.append(taken.mean(axis=0) if len(taken) else path[t])
    return np.stack(out)


Chain = Callable[..., tuple[Array, Array]]


def check(problem: Problem, program: Program, chain: Chain, at: list[int]) -> None:
    """Solver = sampler = hand-made chain: mean exactly, second moments and members by z-score.

    ``chain(h, v, start, rng)`` returns the evaluated path and the members' path, as
    (steps + 1, members, replicas, d).
    """
    h, v = problem.curvature, problem.noise_variance
    exact = nqm.solve(problem, program, at)
    walked = nqm.solve(problem, program, at, jump=False)
    for name in ("loss", "member_loss", "bias", "loss_sd"):
        agree_each(getattr(walked, name), getattr(exact, name), JUMP)

    path, _ = chain(h, v, starts(problem, 1, None), None)
    assert len(path) == program.steps + 1
    agree(exact.weight_mean, path[at, 0], IDENTITY)

    rng = np.random.default_rng(5)
    path, members = chain(h, v, starts(problem, REPLICAS, rng), rng)
    mean, var = exact.weight_mean, exact.weight_variance
    error = np.sqrt((2 * var**2 + 4 * mean**2 * var) / REPLICAS)
    within_error((path[at] ** 2).mean(axis=1), mean**2 + var, error)
    losses = (members[at] ** 2 @ (0.5 * h)).mean(axis=1)
    spread = losses.std(axis=1, ddof=1) / np.sqrt(REPLICAS)
    within_error(losses.mean(axis=1), exact.member_loss, spread)

    drawn = nqm.sample(problem, program, at, replicas=REPLICAS, seed=9)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(REPLICAS))
    within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)


def test_sgd_then_late_phase_then_swa_on_top(problem):
    """The main recipe: cosine to T0, spawn K = 10, average both mean model and members."""
    t0, t1, t2, batch = 12, 7, 9, 2
    cosine = Cosine(0.6, 0.1, t0)
    late = LatePhase(10, 0.1)
    program = Program((
        Phase(SGD(), cosine, t0, batch),
        Phase(late, 0.3, t1, batch, member_lr=0.2),
        Phase(SWA(late, 2), 0.3, t2, batch, member_lr=0.2),
    ))  # fmt: skip

    def chain(h, v, start, rng):
        lrs = 0.1 + 0.25 * (1 + np.cos(np.pi * np.arange(t0) / t0))
        first = literal.sgd(h, v, start, lrs, batch, t0, rng)
        mean, members = literal.late_phase(
            h, v, first[-1], 0.3, batch, t1 + t2, rng, members=10, member_lr=0.2, gamma=0.1
        )
        top, tops = snapshots(mean[t1:], 2), snapshots(members[t1:], 2)
        path = np.concatenate([first, mean[1 : t1 + 1], top[1:]])
        alone = np.repeat(first[:, None], 10, axis=1)
        return path, np.concatenate([alone, members[1 : t1 + 1], tops[1:]])

    check(problem, program, chain, [0, 1, t0, t0 + 1, t0 + t1, t0 + t1 + 1, 24, t0 + t1 + t2])


def late_by_hand(
    h, v, theta, b, phi, b_phi, *, lr, member_lr, gamma, mu, batch, steps, rng
) -> tuple[Array, Array]:
    """Late-phase weights with heavy-ball momentum from any state; paths without the start."""
    path = []
    for _ in range(steps):
        noise = np.zeros(phi.shape) if rng is None else rng.standard_normal(phi.shape)
        g = h * (theta + phi) + np.sqrt(v / batch) * noise
        b, b_phi = mu * b + gamma * g.sum(axis=0), mu * b_phi + g
        theta, phi = theta - lr * b, phi - member_lr * b_phi
        path.append(theta + phi)
    w = np.stack(path)
    return w.mean(axis=1), w


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_momentum_goes_on_in_the_base_weights_and_members_start_fresh(problem, restart, spread):
    t0, t1, mu, k = 9, 6, 0.7, 3
    late = LatePhase(k, 0.5, spread=spread, inner=HeavyBall(mu))
    program = Program((
        Phase(HeavyBall(mu), 0.2, t0, 2),
        Phase(late, 0.1, t1, 4, member_lr=0.15, restart=restart),
    ))  # fmt: skip

    def chain(h, v, start, rng):
        x, b = start, np.zeros_like(start)
        first = [x]
        for _ in range(t0):
            noise = np.zeros(x.shape) if rng is None else rng.standard_normal(x.shape)
            b = mu * b + h * x + np.sqrt(v / 2) * noise
            x = x - 0.2 * b
            first.append(x)
        shape = (k, *x.shape)
        phi = np.zeros(shape) if rng is None else np.sqrt(spread) * rng.standard_normal(shape)
        mean, members = late_by_hand(
            h, v, x, 0 * b if restart else b, phi, np.zeros(shape), lr=0.1, member_lr=0.15,
            gamma=0.5, mu=mu, batch=4, steps=t1, rng=rng,
        )  # fmt: skip
        alone = np.repeat(np.stack(first)[:, None], k, axis=1)
        return np.concatenate([np.stack(first), mean]), np.concatenate([alone, members])

    check(problem, program, chain, [t0, t0 + 1, t0 + 2, t0 + t1])


def test_late_phase_after_late_phase_goes_on_unless_restarted(problem):
    late, t0, t1 = LatePhase(3, 0.5, spread=0.3), 6, 5
    options = {"members": 3, "gamma": 0.5}
    goes_on = Program((Phase(late, 0.3, t0), Phase(late, 0.1, t1, member_lr=0.2)))
    anew = Program((Phase(late, 0.3, t0), Phase(late, 0.1, t1, member_lr=0.2, restart=True)))

    def one(h, v, start, rng):
        lrs = np.repeat([0.3, 0.1], [t0, t1])
        member_lrs = np.repeat([0.3, 0.2], [t0, t1])
        return literal.late_phase(
            h, v, start, lrs, 1, t0 + t1, rng, member_lr=member_lrs, spread=0.3, **options
        )

    def two(h, v, start, rng):
        mean, members = literal.late_phase(
            h, v, start, 0.3, 1, t0, rng, member_lr=0.3, spread=0.3, **options
        )
        again, spawned = literal.late_phase(
            h, v, mean[-1], 0.1, 1, t1, rng, member_lr=0.2, spread=0.3, **options
        )
        return np.concatenate([mean, again[1:]]), np.concatenate([members, spawned[1:]])

    check(problem, goes_on, one, [0, t0, t0 + 1, t0 + t1])
    check(problem, anew, two, [0, t0, t0 + 1, t0 + t1])


LRS = [0.3, 0.1]


@pytest.mark.parametrize(
    ("algorithm", "simulate"),
    [
        (SWA(SGD(), 3), lambda *p: literal.swa(*p, every=3)),
        (LAWA(SGD(), 3, 2), lambda *p: literal.lawa(*p, every=3, window=2)),
        (EMA(Nesterov(0.6), 0.8),
         lambda *p: literal.ema(*p, beta=0.8, inner="nesterov", momentum=0.6)),
        (HeavyBall(0.7), lambda *p: literal.heavy_ball(*p, momentum=0.7)),
        (Lookahead(HeavyBall(0.5), 5, 0.4),
         lambda *p: literal.lookahead(*p, k=5, alpha=0.4, inner="heavy_ball", momentum=0.5)),
    ],
    ids=lambda a: type(a).__name__,
)  # fmt: skip
def test_two_phases_of_one_method_are_one_run(problem, algorithm, simulate):
    """Snapshots and synchronisations are counted across the phase change."""
    program = Program((Phase(algorithm, LRS[0], 7), Phase(algorithm, LRS[1], 6, 4)))

    def chain(h, v, start, rng):
        lrs, sizes = np.repeat(LRS, [7, 6]), np.repeat([1, 4], [7, 6])
        path = simulate(h, v, start, lrs, sizes, 13, rng)
        return path, path[:, None]

    check(problem, program, chain, [0, 6, 7, 8, 9, 13])


def test_average_becomes_the_iterate(problem):
    """A phase that cannot go on starts from the weights that the one before it evaluates."""
    program = Program((Phase(EMA(HeavyBall(0.6), 0.8), 0.3, 7), Phase(SGD(), 0.1, 5)))

    def chain(h, v, start, rng):
        first = literal.ema(h, v, start, 0.3, 1, 7, rng, beta=0.8, inner="heavy_ball", momentum=0.6)
        path = np.concatenate([first, literal.sgd(h, v, first[-1], 0.1, 1, 5, rng)[1:]])
        return path, path[:, None]

    check(problem, program, chain, [0, 7, 8, 12])


def test_members_collapse_to_their_mean(problem):
    program = Program((
        Phase(LatePhase(3, 1 / 3), 0.3, 6),
        Phase(Ensemble(2, HeavyBall(0.5)), 0.2, 5),
        Phase(SGD(), 0.1, 4),
    ))  # fmt: skip

    def chain(h, v, start, rng):
        mean, late = literal.late_phase(
            h, v, start, 0.3, 1, 6, rng, members=3, member_lr=0.3, gamma=1 / 3
        )
        soup, runs = literal.ensemble(
            h, v, mean[-1], 0.2, 1, 5, rng, members=2, inner="heavy_ball", momentum=0.5
        )
        tail = literal.sgd(h, v, soup[-1], 0.1, 1, 4, rng)
        path = np.concatenate([mean, soup[1:], tail[1:]])
        members = np.concatenate([
            np.repeat(late, 2, axis=1), np.repeat(runs[1:], 3, axis=1),
            np.repeat(tail[1:, None], 6, axis=1),
        ])  # fmt: skip
        return path, members

    check(problem, program, chain, [0, 6, 7, 11, 12, 15])


def test_a_different_snapshot_interval_starts_a_new_average(problem):
    """Its snapshots cannot be counted with the old ones: the average becomes the iterate."""
    program = Program((Phase(SWA(SGD(), 1), 0.3, 5), Phase(SWA(SGD(), 2), 0.3, 6)))

    def chain(h, v, start, rng):
        first = literal.swa(h, v, start, 0.3, 1, 5, rng, every=1)
        second = literal.swa(h, v, first[-1], 0.3, 1, 6, rng, every=2)
        path = np.concatenate([first, second[1:]])
        return path, path[:, None]

    check(problem, program, chain, [5, 6, 7, 11])


def test_swa_on_top_of_momentum_keeps_it(problem):
    program = Program((Phase(HeavyBall(0.7), 0.2, 6), Phase(SWA(HeavyBall(0.7), 2), 0.1, 6)))

    def chain(h, v, start, rng):
        lrs = np.repeat([0.2, 0.1], 6)
        whole = literal.heavy_ball(h, v, start, lrs, 1, 12, rng, momentum=0.7)
        path = np.concatenate([whole[:7], snapshots(whole[6:], 2)[1:]])
        return path, path[:, None]

    check(problem, program, chain, [6, 7, 8, 12])


def test_own_starts_belong_to_the_first_phase(problem):
    own = Ensemble(2, starts="own")
    for later in (own, SWA(own), Ensemble(2, HeavyBall(0.5), "own")):
        program = Program((Phase(SGD(), 0.1, 3), Phase(later, 0.1, 3)))
        for method in (nqm.solve, nqm.sample):
            with pytest.raises(NQMError, match=r"starts = 'own'.*first phase.*'common'"):
                method(problem, program)


def test_own_starts_may_go_on_under_an_average(problem):
    own = Ensemble(2, starts="own")
    program = Program((Phase(own, 0.3, 4), Phase(SWA(own, 2), 0.3, 5)))
    at = [4, 5, 6, 9]
    exact = nqm.solve(problem, program, at)
    drawn = nqm.sample(problem, program, at, replicas=REPLICAS, seed=2)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(REPLICAS))
    within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)


@pytest.mark.parametrize("second", ["same", "restarted", "additive"])
def test_multiplicative_phases_are_handed_over_alike(second):
    """First-order moments and sampling agree on what goes on (small noise, 1 % of the loss)."""
    problem = Problem([1.0, 0.3], 1e-4, initial_variance=0.0, minimum=1.0)
    first = MultiplicativeLatePhase(3, gamma="mean")
    later = {"same": first, "restarted": first, "additive": LatePhase(3, gamma="mean")}[second]
    program = Program((
        Phase(first, 0.2, 60), Phase(later, 0.01, 3, restart=second == "restarted"),
    ))  # fmt: skip
    exact = nqm.solve(problem, program, [60, 61, 63])
    drawn = nqm.sample(problem, program, [60, 61, 63], replicas=REPLICAS, seed=2)
    error = np.hypot(drawn.member_stderr, 1e-3 * exact.member_loss)
    within_error(drawn.member_loss, exact.member_loss, error)
    within_error(drawn.loss, exact.loss, np.hypot(drawn.stderr, 1e-3 * exact.loss))


# ------------------------------------------------------------------ schedules of rate and batch

PROGRAMS = {
    "cyclic rate and batch": Program((
        Phase(SGD(), Cyclic(0.4, 0.1, 6), 200, Cyclic(8, 2, 4, "linear")),
    )),
    "swa at the end of each cycle": Program((Phase(SWA(SGD(), 5), Cyclic(0.4, 0.1, 5), 203, 3),)),
    "piecewise batch": Program((
        Phase(LatePhase(3, "mean"), Piecewise((0.3, 0.1), (70,)), 190, Piecewise((1, 8), (101,)),
              member_lr=Cyclic(0.2, 0.1, 3, "triangle")),
    )),
    "warm-up, then cycles": Program((
        Phase(HeavyBall(0.5), Warmup(10, Cyclic(0.3, 0.1, 7)), 150),
        Phase(EMA(HeavyBall(0.5), 0.9), Joined((Constant(0.1), Cosine(0.2, 0.1, 20)), (33,)), 90),
    )),
    "lookahead out of step with the cycle": Program((
        Phase(Lookahead(SGD(), 4, 0.5), Cyclic(0.4, 0.1, 6), 31),
        Phase(Lookahead(SGD(), 4, 0.5), Cyclic(0.4, 0.1, 6), 130),
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_jump_is_walk_under_schedules(name, problem):
    program = PROGRAMS[name]
    at = sorted({0, 1, 5, 17, 18, 71, 100, 101, 102, 130, program.steps})
    jumped = nqm.solve(problem, program, at)
    walked = nqm.solve(problem, program, at, jump=False)
    for column in ("loss", "bias", "variance", "member_loss", "loss_sd"):
        agree_each(getattr(jumped, column), getattr(walked, column), JUMP)


def test_sgd_under_schedules_closed_form(problem):
    """Any sequence of rates and batch sizes, by the product formula."""
    program = PROGRAMS["cyclic rate and batch"]
    t = np.arange(200)
    lrs = 0.1 + 0.15 * (1 + np.cos(np.pi * (t % 6) / 5))
    sizes = 2 + 6 * (1 - (t % 4) / 3)
    s0 = problem.initial_mean**2 + problem.initial_variance
    for steps in (1, 17, 200):
        result = nqm.solve(problem, program, [steps])
        expected = literal.sgd_moment_sequence(
            problem.curvature, problem.noise_variance, lrs[:steps], sizes[:steps], s0
        )
        second = result.weight_mean[0] ** 2 + result.weight_variance[0]
        agree_each(second, expected, 1e-11)  # a product of 200 factors, either way


def test_examples_count_every_minibatch():
    """Sum of batch sizes, times the members that draw their own minibatch."""
    cases = [
        (SGD(), 1), (HeavyBall(0.9), 1), (SWA(SGD(), 3), 1), (Lookahead(SGD(), 3), 1),
        (LatePhase(4, "mean"), 4), (LatePhase(4, "mean", minibatch="shared"), 1), (Ensemble(3), 3),
        (EMA(LatePhase(4, gamma="mean")), 4), (MultiplicativeLatePhase(5, gamma="mean"), 5),
    ]  # fmt: skip
    for algorithm, draws in cases:
        phase = Phase(algorithm, 0.1, 50, Piecewise((2, 16), (20,)))
        for steps in (0, 1, 20, 21, 50):
            expected = draws * sum(2 if t < 20 else 16 for t in range(steps))
            assert phase.examples(steps) == expected
    phases = (
        Phase(SGD(), 0.1, 10, 4),
        Phase(LatePhase(3, gamma="mean"), 0.1, 10, Cyclic(6, 2, 3, "linear")),
    )
    counts = Program(phases).examples([0, 10, 11, 12, 13, 14, 20])
    np.testing.assert_allclose(counts, [0, 40, 58, 70, 76, 94, 40 + 3 * (3 * 12 + 6)])


def test_steps_for_pays_with_examples():
    assert steps_for(SGD(), 100, batch_size=8) == 12
    assert steps_for(LatePhase(3, gamma="mean"), 100, batch_size=8) == 4


# ------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Program(()), "at least one phase"),
        (lambda: Phase("sgd", 0.1, 1), "phase.algorithm"),
        (lambda: Phase(SGD(), 0.0, 1), "phase.lr"),
        (lambda: Phase(SGD(), float("nan"), 1), "phase.lr"),
        (lambda: Phase(SGD(), 0.1, -1), "phase.steps"),
        (lambda: Phase(SGD(), 0.1, 1.5), "phase.steps"),
        (lambda: Phase(SGD(), 0.1, 1, 0), "phase.batch_size"),
        (lambda: Phase(SGD(), 0.1, 1, member_lr=0.1), "phase.member_lr.*SGD"),
        (lambda: Phase(LatePhase(2, gamma="mean"), 0.1, 1, member_lr=-0.1), "phase.member_lr"),
        (lambda: HeavyBall(1.0), "HeavyBall.momentum"),
        (lambda: Nesterov(-0.1), "Nesterov.momentum"),
        (lambda: EMA(SGD(), 1.0), "EMA.decay"),
        (lambda: EMA("sgd"), "EMA.inner"),
        (lambda: SWA(SGD(), 0), "SWA.every"),
        (lambda: EMA(SWA()), "EMA.inner must not average snapshots"),
        (lambda: SWA(LAWA()), "SWA.inner must not average snapshots"),
        (lambda: LAWA(SGD(), 1, 0), "LAWA.window"),
        (lambda: Lookahead(SGD(), 0), "Lookahead.k"),
        (lambda: Lookahead(SGD(), 5, 1.1), "Lookahead.alpha"),
        (lambda: Lookahead(SWA()), "Lookahead.inner"),
        (lambda: Ensemble(0), "Ensemble.members"),
        (lambda: Ensemble(2, starts="mine"), "Ensemble.starts"),
        (lambda: LatePhase(0, gamma="mean"), "LatePhase.members"),
        (lambda: LatePhase(True, gamma="mean"), "LatePhase.members"),
        (lambda: LatePhase(2, -1.0), "LatePhase.gamma"),
        (lambda: LatePhase(2, spread=-1.0, gamma="mean"), "LatePhase.spread"),
        (lambda: LatePhase(2, minibatch="both", gamma="mean"), "LatePhase.minibatch"),
        (lambda: LatePhase(2, inner=SWA(), gamma="mean"), "LatePhase.inner"),
        (lambda: MultiplicativeLatePhase(2, factor=0.0, gamma="mean"), "factor"),
        (lambda: MultiplicativeLatePhase(2, coupling="rowwise", gamma="mean"), "coupling"),
    ],
)
def test_misuse_names_the_field(build, words):
    with pytest.raises(NQMError, match=words):
        build()


def test_numpy_numbers_are_numbers(problem):
    """A loop over an array hands over np.int64 and np.float64."""
    phase = Phase(
        LatePhase(np.int64(3), np.float32(0.5)), np.float64(0.1), np.int64(4), np.int64(2)
    )
    same = Phase(LatePhase(3, 0.5), 0.1, 4, 2)
    a, b = (nqm.solve(problem, Program((p,)), [4]) for p in (phase, same))
    assert (a.loss[0], a.examples[0]) == (b.loss[0], b.examples[0])
    for value in (np.bool_(True), np.int64(0), np.float64(2.0)):
        with pytest.raises(NQMError, match=r"LatePhase\.members"):
            LatePhase(value, gamma="mean")


@pytest.mark.parametrize("at", [[-1], [11], [], [0.5]])
def test_recorded_steps_are_checked(at, problem):
    with pytest.raises(NQMError, match=r"record\.at"):
        nqm.solve(problem, nqm.constant(SGD(), 0.1, 10), at)


def test_recorded_steps_are_sorted_and_distinct(problem):
    result = nqm.solve(problem, nqm.constant(SGD(), 0.1, 10), [7, 0, 7, 3])
    assert result.steps.tolist() == [0, 3, 7]
    assert result.examples.tolist() == [0.0, 3.0, 7.0]
    assert result.loss[0] == pytest.approx(problem.initial_loss, rel=IDENTITY)


def test_ema_on_running_members_begins_at_each_member():
    """One step by hand: a member's EMA is beta d + (1 - beta) d' of its own deviation d."""
    h, v, lr, members, beta, batch = 0.7, 2.0, 0.2, 3, 0.9, 4
    late = LatePhase(members, gamma="mean")
    phases = (Phase(late, lr, 40, batch), Phase(EMA(late, decay=beta), lr, 5, batch))
    result = nqm.solve(Problem([h], [v]), Program(phases), [40, 41])

    def averaged(variance, rate, noise):
        keep = beta + (1 - beta) * (1 - rate * h)
        return keep**2 * variance + (1 - beta) ** 2 * rate**2 * noise

    share, rest = v / batch / members, v / batch * (1 - 1 / members)
    mean, deviation = 1.0, 0.0
    for _ in range(40):
        mean = (1 - 2 * lr * h) ** 2 * mean + (2 * lr) ** 2 * share
        deviation = (1 - lr * h) ** 2 * deviation + lr**2 * rest
    before = 0.5 * h * (mean + deviation)
    after = 0.5 * h * (averaged(mean, 2 * lr, share) + averaged(deviation, lr, rest))
    agree(result.member_loss, [before, after], IDENTITY)

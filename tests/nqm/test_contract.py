"""Every law, for every member of the roster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov

import nqm
import nqm.algorithms
from nqm import (
    EMA,
    LAWA,
    ROSTER,
    SGD,
    SWA,
    Adam,
    Algorithm,
    CorrelatedNoise,
    DelayedSGD,
    Ensemble,
    Federated,
    FedProx,
    HeavyBall,
    LatePhase,
    LocalSGD,
    Lookahead,
    MultiplicativeLatePhase,
    Nesterov,
    Pace,
    Phase,
    PolynomialAverage,
    PrimalAverage,
    Problem,
    Program,
    QuasiHyperbolicMomentum,
    Rounded,
    SampledSGD,
    Scaffold,
    ScheduleFree,
    SignSGD,
    Status,
    WeightDecay,
)
from nqm.algorithms import LimitingCase, Nonlinear, Sampled
from nqm.transition import Transition, embedding, extract, member_readout, minibatches, readout
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree, agree_each, within_error

Array = np.ndarray
Path = tuple[Array, Array | None]
STEPS = 13

# ------------------------------------------------------------------ the roster and its oracles


@dataclass(frozen=True)
class Case:
    """An algorithm at given rates, with the literal simulator that is its oracle.

    ``path(h, v, start, batch_size, steps, rng)`` returns the path of the evaluated weights and
    that of the members (None for a single chain).
    """

    name: str
    algorithm: Algorithm
    path: Callable[..., Path]
    lr: float = 0.3
    member_lr: float | None = None

    @property
    def rates(self) -> Any:
        """What `update` takes as lr."""
        if self.algorithm.rate_count == 1:
            return self.lr
        return self.lr, self.lr if self.member_lr is None else self.member_lr

    def program(self, steps: int, batch_size: float = 2) -> Program:
        return Program(
            (Phase(self.algorithm, self.lr, steps, batch_size, member_lr=self.member_lr),)
        )


def single(simulate: Callable[..., Array], lr: float = 0.3, **options: Any) -> Callable[..., Path]:
    def path(h, v, start, batch_size, steps, rng):
        return simulate(h, v, start, lr, batch_size, steps, rng, **options), None

    return path


def many(simulate: Callable[..., Path], lr: float = 0.3, **options: Any) -> Callable[..., Path]:
    def path(h, v, start, batch_size, steps, rng):
        return simulate(h, v, start, lr, batch_size, steps, rng, **options)

    return path


def average_of(path: Array, every: int, window: int | None = None) -> Array:
    """SWA or LAWA of a path of weights, from the definition; axis 0 is time."""
    out = []
    for t in range(len(path)):
        taken = path[every : t + 1 : every]
        latest = taken[-window:] if window else taken
        out.append(latest.mean(axis=0) if len(taken) else path[t])
    return np.stack(out)


def ema_of(path: Array, beta: float) -> Array:
    """Moving average of a path of weights, from the definition."""
    out = [path[0]]
    for x in path[1:]:
        out.append(beta * out[-1] + (1 - beta) * x)
    return np.stack(out)


def on_top(average: Callable[..., Array], below: Callable[..., Path], **options: Any) -> Any:
    def path(*problem):
        mean, members = below(*problem)
        return average(mean, **options), None if members is None else average(members, **options)

    return path


def clients(
    simulate: Callable[..., Path] = literal.local_sgd, **options: Any
) -> Callable[..., Path]:
    """Clients that differ: their models have no place in the member loss."""
    together = many(simulate, **options)
    return lambda *problem: (together(*problem)[0], None)


def late(**options: Any) -> Callable[..., Path]:
    options = {"lr": 0.3, "member_lr": 0.3} | options
    return many(literal.late_phase, **options)


def _inners() -> list[tuple[Any, dict[str, Any]]]:
    return [
        (SGD(), {}),
        (HeavyBall(0.6), {"inner": "heavy_ball", "momentum": 0.6}),
        (Nesterov(0.6), {"inner": "nesterov", "momentum": 0.6}),
    ]


def _cases() -> list[Case]:
    cases = [
        Case("sgd", SGD(), single(literal.sgd)),
        Case("heavy_ball", HeavyBall(0.8), single(literal.heavy_ball, momentum=0.8)),
        Case("nesterov", Nesterov(0.8), single(literal.nesterov, momentum=0.8)),
        Case("quasi_hyperbolic", QuasiHyperbolicMomentum(0.8, 0.6),
             single(literal.quasi_hyperbolic_momentum, beta=0.8, nu=0.6)),
    ]  # fmt: skip
    for inner, said in _inners():
        tag = said.get("inner", "sgd")
        cases += [
            Case(f"ema-{tag}", EMA(inner, 0.7), single(literal.ema, beta=0.7, **said)),
            Case(f"swa-{tag}", SWA(inner, 3), single(literal.swa, every=3, **said)),
            Case(f"lookahead-{tag}", Lookahead(inner, 3, 0.4),
                 single(literal.lookahead, k=3, alpha=0.4, **said)),
            Case(f"ensemble-{tag}", Ensemble(3, inner), many(literal.ensemble, members=3, **said)),
            Case(f"late-{tag}", LatePhase(3, inner=inner, gamma="mean"),
                 late(members=3, gamma=1 / 3, **said)),
        ]  # fmt: skip
    cases += [
        Case("swa-every-step", SWA(), single(literal.swa, every=1)),
        Case("lawa-sgd", LAWA(SGD(), 2, 3), single(literal.lawa, every=2, window=3)),
        Case("lawa-heavy_ball", LAWA(HeavyBall(0.6), 1, 4),
             single(literal.lawa, every=1, window=4, inner="heavy_ball", momentum=0.6)),
        Case("lookahead-even", Lookahead(SGD(), 4, 0.5), single(literal.lookahead, k=4, alpha=0.5)),
        Case("ensemble-own", Ensemble(3, starts="own"),
             many(literal.ensemble, members=3, starts="own")),
        Case("ensemble-own-heavy_ball", Ensemble(2, HeavyBall(0.6), "own"),
             many(literal.ensemble, members=2, starts="own", inner="heavy_ball", momentum=0.6)),
        Case("late-gamma-1", LatePhase(3, 1.0), late(members=3, gamma=1.0)),
        Case("late-member_lr", LatePhase(3, 0.5), late(members=3, gamma=0.5, member_lr=0.1),
             member_lr=0.1),
        Case("late-shared", LatePhase(3, minibatch="shared", gamma="mean"),
             late(members=3, gamma=1 / 3, minibatch="shared")),
            Case("late-spread", LatePhase(3, "mean", spread=0.4),
                 late(members=3, gamma=1 / 3, spread=0.4)),
        Case("late-shared-spread-heavy_ball",
             LatePhase(2, 0.7, "shared", 0.4, HeavyBall(0.6)),
             late(lr=0.2, members=2, gamma=0.7, minibatch="shared", spread=0.4, member_lr=0.1,
                  inner="heavy_ball", momentum=0.6),
             lr=0.2, member_lr=0.1),
        Case("late-gamma-0", LatePhase(3, 0.0), late(members=3, gamma=0.0)),
        Case("swa-late", SWA(LatePhase(3, spread=0.4, gamma="mean"), 2),
             on_top(average_of, late(members=3, gamma=1 / 3, spread=0.4), every=2)),
        Case("lawa-late", LAWA(LatePhase(2, gamma="mean"), 2, 2),
             on_top(average_of, late(members=2, gamma=0.5), every=2, window=2)),
        Case("ema-late-heavy_ball", EMA(LatePhase(2, inner=HeavyBall(0.6), gamma="mean"), 0.7),
             on_top(ema_of, beta=0.7,
                    below=late(members=2, gamma=0.5, inner="heavy_ball", momentum=0.6))),
        Case("ema-ensemble-own", EMA(Ensemble(2, starts="own"), 0.7),
             on_top(ema_of, many(literal.ensemble, members=2, starts="own"), beta=0.7)),
        Case("ema-lookahead", EMA(Lookahead(SGD(), 3, 0.4), 0.7),
             on_top(ema_of, single(literal.lookahead, k=3, alpha=0.4), beta=0.7)),
        Case("swa-ema", SWA(EMA(SGD(), 0.7), 2),
             on_top(average_of, single(literal.ema, beta=0.7), every=2)),
        Case("late-overlap", LatePhase(3, minibatch=0.3, gamma="mean"),
             late(members=3, gamma=1 / 3, minibatch=0.3)),
        Case("late-partial", LatePhase(3, 0.5, spread=0.4, inner=HeavyBall(0.6), directions=(0, 2)),
             late(lr=0.2, members=3, gamma=0.5, spread=0.4, replicated=[1, 0, 1], member_lr=0.1,
                  inner="heavy_ball", momentum=0.6),
             lr=0.2, member_lr=0.1),
        Case("ema-late-partial", EMA(LatePhase(3, spread=0.4, directions=0.4, gamma="mean"), 0.7),
             on_top(ema_of, beta=0.7,
                    below=late(members=3, gamma=1 / 3, spread=0.4, replicated=[1, 0, 0]))),
        Case("polynomial-sgd", PolynomialAverage(SGD(), 3),
             single(literal.polynomial_average, eta=3)),
        Case("polynomial-nesterov", PolynomialAverage(Nesterov(0.6), 1),
             single(literal.polynomial_average, eta=1, inner="nesterov", momentum=0.6)),
        Case("polynomial-lookahead", PolynomialAverage(Lookahead(SGD(), 3, 0.4), 0),
             on_top(average_of, single(literal.lookahead, k=3, alpha=0.4), every=1)),
        Case("pace", Pace(0.7, 0.6), single(literal.pace, decay=0.7, pull=0.6)),
        Case("pace-power", Pace(pull=0.6, power=0.2), single(literal.pace, pull=0.6, power=0.2)),
        Case("delayed", DelayedSGD(2), single(literal.delayed_sgd, delay=2)),
        Case("correlated", CorrelatedNoise(SGD(), 0.7),
             single(literal.correlated_noise, correlation=0.7)),
        Case("correlated-heavy_ball", CorrelatedNoise(HeavyBall(0.6), -0.5),
             single(literal.correlated_noise, correlation=-0.5, inner="heavy_ball", momentum=0.6)),
        Case("swa-correlated", SWA(CorrelatedNoise(SGD(), 0.7), 2),
             on_top(average_of, single(literal.correlated_noise, correlation=0.7), every=2)),
        Case("schedule_free", ScheduleFree(0.6), single(literal.schedule_free, beta=0.6)),
        Case("schedule_free-warmup", ScheduleFree(0.6, 7),
             single(literal.schedule_free, beta=0.6, warmup=7)),
        Case("primal_average", PrimalAverage(0.8, 0.6),
             single(literal.primal_average, mu_x=0.8, mu_y=0.6)),
        Case("fedavg", LocalSGD(3, 4), many(literal.local_sgd, clients=3, local_steps=4)),
        Case("diloco", LocalSGD(3, 3, Nesterov(0.6), Nesterov(0.5), 0.7),
             many(literal.local_sgd, clients=3, local_steps=3, inner="nesterov", momentum=0.6,
                  outer="nesterov", outer_lr=0.7, outer_momentum=0.5)),
        Case("swa-local_sgd", SWA(LocalSGD(2, 2, outer=HeavyBall(0.4)), 3),
             on_top(average_of, many(literal.local_sgd, clients=2, local_steps=2,
                                     outer="heavy_ball", outer_momentum=0.4), every=3)),
        Case("federated", Federated(2, 3, HeavyBall(0.6), HeavyBall(0.3), 0.8, (1.5, 0.5)),
             clients(clients=2, local_steps=3, inner="heavy_ball", momentum=0.6,
                     outer="heavy_ball", outer_lr=0.8, outer_momentum=0.3, curvatures=(1.5, 0.5))),
        Case("federated-shares", Federated(2, 3, curvatures=(1.5, 0.75), shares=(1 / 3, 2 / 3)),
             clients(clients=2, local_steps=3, curvatures=(1.5, 0.75), shares=(1 / 3, 2 / 3))),
        Case("fedprox", FedProx(2, 3, HeavyBall(0.6), curvatures=(1.5, 0.5), prox=0.4),
             clients(literal.fedprox, prox=0.4, clients=2, local_steps=3, inner="heavy_ball",
                     momentum=0.6, curvatures=(1.5, 0.5))),
        Case("scaffold", Scaffold(2, 3, outer_lr=0.8, curvatures=(1.5, 0.5)),
             clients(literal.scaffold, clients=2, local_steps=3, outer_lr=0.8,
                     curvatures=(1.5, 0.5))),
        Case("decay-coupled", WeightDecay(Nesterov(0.6), 0.2),
             single(literal.weight_decay, decay=0.2, anchor=np.zeros(3), inner="nesterov",
                    momentum=0.6)),
        Case("decay-decoupled", WeightDecay(HeavyBall(0.6), 0.2, decoupled=True),
             single(literal.weight_decay, decay=0.2, anchor=np.zeros(3), inner="heavy_ball",
                    momentum=0.6, decoupled=True)),
        Case("decay-start", WeightDecay(HeavyBall(0.6), 0.2, "start"),
             single(literal.weight_decay, decay=0.2, anchor="start", inner="heavy_ball",
                    momentum=0.6)),
        Case("decay-start-late", WeightDecay(LatePhase(3, spread=0.4, gamma="mean"), 0.2, "start"),
             late(members=3, gamma=1 / 3, spread=0.4, decay=0.2)),
        Case("ema-decay", EMA(WeightDecay(SGD(), 0.2, "start", True), 0.7),
             on_top(ema_of, beta=0.7, below=single(
                 literal.weight_decay, decay=0.2, anchor="start", decoupled=True))),
        Case("rounded", Rounded(SGD(), 0.5), single(literal.rounded, pitch=0.5)),
        Case("swa-rounded", SWA(Rounded(HeavyBall(0.6), 0.5), 2),
             on_top(average_of, every=2, below=single(
                 literal.rounded, pitch=0.5, inner="heavy_ball", momentum=0.6))),
    ]  # fmt: skip
    return cases


def settles(algorithm: Algorithm) -> bool:
    """Whether there is a steady state: not for means over all the past."""
    return not algorithm.time.update_never_repeats and not isinstance(algorithm, SWA)


CASES = _cases()
every_case = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
settling = pytest.mark.parametrize(
    "case", [c for c in CASES if settles(c.algorithm)], ids=lambda c: c.name
)


def test_roster_is_covered():
    """Each linear algorithm by name occurs above (what is not linear has files of its own)."""
    covered = {type(c.algorithm) for c in CASES}
    assert all(getattr(nqm, cls.__name__) is cls for cls in ROSTER.values())
    assert covered == {cls for cls in ROSTER.values() if issubclass(cls, Algorithm)}


def starts_own(algorithm: Algorithm) -> bool:
    inner = getattr(algorithm, "inner", algorithm)
    return "own" in (getattr(algorithm, "starts", ""), getattr(inner, "starts", ""))


def start_of(case: Case, problem: Problem, replicas: int, rng: np.random.Generator | None) -> Array:
    """Start of the literal simulators: a draw, or the mean without a generator."""
    shape = (replicas, problem.directions)
    if starts_own(case.algorithm):
        shape = (case.algorithm.member_count, *shape)
    noise = np.zeros(shape) if rng is None else rng.standard_normal(shape)
    return problem.initial_mean + np.sqrt(problem.initial_variance) * noise


# ------------------------------------------------------------------ one statement, one transition


class NumericGradient:
    """Minibatch gradient on numbers; remembers the noise it drew."""

    def __init__(self, h: Array, rng: np.random.Generator):
        self.h, self.rng = h, rng
        self.drawn: list[Array] = []
        self.normals: list[Array] = []
        self.batches: dict[int, Array] = {}
        self.examples = 0.0

    def __call__(self, x: Any, batch: int | None = None, size: float = 1.0) -> Any:
        if batch is None or batch not in self.batches:
            noise = self.rng.standard_normal(self.h.shape)
            self.drawn.append(noise)
            self.examples += size
            if batch is not None:
                self.batches[batch] = noise
        else:
            noise = self.batches[batch]
        return self.h * x + noise / np.sqrt(size)

    def normal(self) -> Any:
        self.normals.append(self.rng.standard_normal(self.h.shape))
        return self.normals[-1]


def step_of(algorithm: Algorithm, h: Array, rates: Any, t: int) -> Transition:
    time = algorithm.time
    return extract(algorithm, h, rates, t if time.update_never_repeats else t % time.period)


def check_extraction(algorithm: Algorithm, lr: Any, h: Array, seed: int) -> None:
    """Literal `update` on random numbers = A z + C e, at every residue of t and beyond."""
    rng = np.random.default_rng(seed)
    n = len(algorithm.coordinates)
    for t in range(2 * algorithm.time.period + 1):
        z = rng.standard_normal((n, h.size))
        gradient = NumericGradient(h, rng)
        new = np.array([np.broadcast_to(x, h.shape) for x in
                        algorithm.update(tuple(z), gradient, lr, t)])  # fmt: skip
        step = step_of(algorithm, h, lr, t)
        assert step.noise.shape[-1] == len(gradient.drawn)
        assert minibatches(algorithm) == pytest.approx(gradient.examples, rel=1e-15)
        predicted = np.einsum("dij,jd->id", step.matrix, z)
        predicted += np.einsum("dij,jd->id", step.noise, np.array(gradient.drawn))
        own = np.array(gradient.normals).reshape(-1, h.size)
        predicted += np.einsum("dij,jd->id", step.own, own)
        agree(predicted, new, IDENTITY)


@every_case
def test_extracted_matrices_are_the_literal_update(case, problem):
    check_extraction(case.algorithm, case.rates, problem.curvature, 1)
    for mode in case.algorithm.modes():
        check_extraction(mode.algorithm, case.rates, problem.curvature, 2)


@every_case
def test_extraction_broadcasts_curvature_and_rates(case):
    h, lr = np.array([1.0, 0.1]), np.array([0.1, 0.2, 0.3])[:, None]
    two = case.algorithm.rate_count == 2
    wide = extract(case.algorithm, h[None, :], (lr, 2 * lr) if two else lr)
    for i, rate in enumerate(lr[:, 0]):
        one = extract(case.algorithm, h, (rate, 2 * rate) if two else rate)
        np.testing.assert_array_equal(wide.matrix[i], one.matrix)
        np.testing.assert_array_equal(wide.noise[i], one.noise)


# ------------------------------------------------------------------ moments against the literature


@every_case
def test_mean_is_the_deterministic_path(case, problem):
    """Noise and initial variance do not touch the mean: it is the noiseless simulation."""
    start = start_of(case, problem, 1, None)
    path, _ = case.path(problem.curvature, problem.noise_variance, start, 2, STEPS, None)
    for jump in (True, False):
        result = nqm.solve(problem, case.program(STEPS), range(STEPS + 1), jump=jump)
        agree(result.weight_mean, path[:, 0], IDENTITY)


@every_case
def test_zero_noise_is_the_deterministic_path(case, problem):
    quiet = problem.replace(noise_variance=0.0, initial_variance=0.0, multiplicity=[1, 3, 0.5])
    case = replace(case, algorithm=without(without(case.algorithm, "spread"), "pitch"))
    path, members = case.path(
        quiet.curvature, quiet.noise_variance, start_of(case, quiet, 1, None), 2, STEPS, None
    )
    result = nqm.solve(quiet, case.program(STEPS), range(STEPS + 1))
    half = 0.5 * quiet.multiplicity * quiet.curvature
    agree(result.loss, path[:, 0] ** 2 @ half, IDENTITY)
    assert not result.variance.any()
    chains = path[:, None] if members is None else members
    agree(result.member_loss, (chains[:, :, 0] ** 2 @ half).mean(axis=1), IDENTITY)


def without(algorithm: Any, name: str) -> Any:
    """The same algorithm whose members start together (spread), or that is exact (pitch)."""
    if getattr(algorithm, name, 0.0):
        return replace(algorithm, **{name: 0.0})
    inner = getattr(algorithm, "inner", None)
    if inner is not None and without(inner, name) is not inner:
        return replace(algorithm, inner=without(inner, name))
    return algorithm


@every_case
def test_moments_are_the_simulators(case, problem):
    """Second moment by direction and average member's loss, with exact standard errors."""
    replicas, rng = 4000, np.random.default_rng(7)
    path, members = case.path(
        problem.curvature, problem.noise_variance, start_of(case, problem, replicas, rng), 2,
        STEPS, rng,
    )  # fmt: skip
    at = [0, 1, 2, 6, STEPS]
    result = nqm.solve(problem, case.program(STEPS), at)
    mean, var = result.weight_mean, result.weight_variance
    error = np.sqrt((2 * var**2 + 4 * mean**2 * var) / replicas)
    within_error((path[at] ** 2).mean(axis=1), mean**2 + var, error)
    within_error(path[at].mean(axis=1), mean, np.sqrt(var / replicas))
    if members is not None:
        losses = (members[at] ** 2 @ (0.5 * problem.curvature)).mean(axis=1)
        sd = [dense(case, problem, t).member_loss_sd for t in at]
        within_error(losses.mean(axis=1), result.member_loss, np.array(sd) / np.sqrt(replicas))


def closed(case: str, form: Callable[..., Any], lr: float = 0.3, **options: Any) -> Any:
    return pytest.param(case, form, {"lr": lr} | options, id=f"{case}-{form.__name__}")


CASE = {c.name: c for c in CASES}


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        closed("sgd", literal.sgd_moment),
        closed("late-sgd", literal.late_phase_moment, members=3, member_lr=0.3, gamma=1 / 3),
        closed("late-gamma-1", literal.late_phase_moment, members=3, member_lr=0.3, gamma=1.0),
        closed("late-member_lr", literal.late_phase_moment, members=3, member_lr=0.1, gamma=0.5),
        closed("late-shared", literal.late_phase_moment, members=3, member_lr=0.3, gamma=1 / 3,
               minibatch="shared"),
        closed("late-spread", literal.late_phase_moment, members=3, member_lr=0.3, gamma=1 / 3,
               spread=0.4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 100, 10**6])
def test_transient_closed_forms(name, form, options, steps, problem):
    s0 = problem.initial_mean**2 + problem.initial_variance
    h, v = problem.curvature, problem.noise_variance
    expected = form(h, v, batch_size=2, s0=s0, steps=steps, **options)
    mean, deviation = expected if isinstance(expected, tuple) else (expected, 0.0)
    result = nqm.solve(problem, CASE[name].program(steps), [steps])
    tolerance = IDENTITY if steps <= 100 else JUMP
    agree_each(result.weight_mean[0] ** 2 + result.weight_variance[0], mean, tolerance)
    agree_each(result.loss[0], 0.5 * h @ mean, tolerance)
    agree_each(result.member_loss[0], 0.5 * h @ (mean + deviation), tolerance)


@pytest.mark.parametrize("starts", ["common", "own"])
@pytest.mark.parametrize("steps", [1, 100, 10**6])
def test_ensemble_closed_form(starts, steps, problem):
    h, v = problem.curvature, problem.noise_variance
    expected = literal.ensemble_moment(
        h, v, 0.3, 2, 3, problem.initial_mean, problem.initial_variance, steps, starts
    )
    program = nqm.constant(Ensemble(3, starts=starts), 0.3, steps, batch_size=2)
    result = nqm.solve(problem, program, [steps])
    agree_each(result.weight_mean[0] ** 2 + result.weight_variance[0], expected, JUMP)
    # A member is one run of SGD.
    s0 = problem.initial_mean**2 + problem.initial_variance
    member = literal.sgd_moment(h, v, 0.3, 2, s0, steps)
    agree_each(result.member_loss[0], 0.5 * h @ member, JUMP)


@pytest.mark.parametrize(("every", "window"), [(1, None), (3, None), (2, 3), (1, 5)])
@pytest.mark.parametrize("snapshots", [1, 2, 50])
def test_snapshot_averages_closed_form(every, window, snapshots, problem):
    s0 = problem.initial_mean**2 + problem.initial_variance
    h, v = problem.curvature, problem.noise_variance
    expected = literal.snapshot_average(h, v, 0.3, 2, s0, every, snapshots, window)
    algorithm = SWA(SGD(), every) if window is None else LAWA(SGD(), every, window)
    result = nqm.solve(problem, nqm.constant(algorithm, 0.3, snapshots * every, batch_size=2))
    agree_each(result.weight_mean[-1] ** 2 + result.weight_variance[-1], expected, IDENTITY)


@pytest.mark.parametrize("h", [1e-3, 1e-5, 1e-7, 1e-9])
def test_tail_average_keeps_its_digits_where_the_textbook_form_cancels(h):
    """THEORY 1.3: eta h N << 1 at eta = 1/8, N = 64."""
    curvature, v = np.array([h]), np.array([2.0])
    problem = Problem(curvature, v, initial_mean=0.0, initial_variance=0.5)
    result = nqm.solve(problem, nqm.constant(SWA(), 0.125, 64))
    expected = literal.uniform_average(1 - 0.125 * curvature, 0.125**2 * v, 0.5, 64)
    agree_each(result.weight_variance[-1], expected, IDENTITY)


def test_long_tail_average_meets_polyak_juditsky(problem):
    """After n steps v / (h^2 n), whatever the rate; corrections are of order 1 / (lr h n)."""
    n = 10**7
    result = nqm.solve(problem, nqm.constant(SWA(), 0.3, n, batch_size=2), [n])
    limit = literal.average_limit(problem.curvature, problem.noise_variance, 2, n)
    agree_each(result.weight_variance[-1], limit, 2e-5)  # 2 / (0.3 * 0.02 * n) = 3e-5 at most


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (4, 0.5), (5, 0.8), (5, 1.0)])
@pytest.mark.parametrize("syncs", [1, 7, 200_000])
def test_lookahead_closed_form(k, alpha, syncs, problem):
    s0 = problem.initial_mean**2 + problem.initial_variance
    expected = literal.lookahead_moment(
        problem.curvature, problem.noise_variance, 0.3, 2, k, alpha, s0, syncs
    )
    program = nqm.constant(Lookahead(SGD(), k, alpha), 0.3, k * syncs, batch_size=2)
    result = nqm.solve(problem, program, [k * syncs])
    agree_each(result.weight_mean[-1] ** 2 + result.weight_variance[-1], expected, JUMP)


# ------------------------------------------------------------------ literal form = the two modes


def member_mask(algorithm: Algorithm, problem: Problem) -> Array:
    """1 where a direction has members of its own, else 0."""
    mask = algorithm.member_mask(problem)
    return np.ones(problem.directions) if mask is None else mask


def rates_by_direction(case: Case, problem: Problem) -> Any:
    """What `update` takes as lr: without members, their rate is none."""
    if case.algorithm.rate_count == 1:
        return case.lr
    lr, member_lr = case.rates
    return lr, member_lr * member_mask(case.algorithm, problem)


@dataclass(frozen=True)
class Dense:
    loss: float
    member_loss: float
    loss_sd: float
    member_loss_sd: float


def dense(case: Case, problem: Problem, steps: int, batch_size: float = 2) -> Dense:
    """The full second moment of the literal algorithm, all members and buffers, in NumPy."""
    algorithm, h = case.algorithm, problem.curvature
    draws, normals = embedding(algorithm)
    mean = np.outer(problem.initial_mean, draws.sum(axis=1))
    cov = problem.initial_variance[:, None, None] * (draws @ draws.T)
    cov = cov + member_mask(algorithm, problem)[:, None, None] * (normals @ normals.T)
    v = problem.noise_variance[:, None, None] / batch_size
    rates = rates_by_direction(case, problem)
    for t in range(steps):
        step = step_of(algorithm, h, rates, t)
        a, c, own = step.matrix, step.noise, step.own
        mean = np.einsum("dij,dj->di", a, mean)
        cov = a @ cov @ a.swapaxes(1, 2) + v * (c @ c.swapaxes(1, 2)) + own @ own.swapaxes(1, 2)
    read = readout(algorithm, steps)[None]
    rows = member_readout(algorithm, steps) if algorithm.member_count else read

    def losses(rows: Array) -> tuple[float, float]:
        """Mean and deviation of the average loss over chains, from Isserlis' theorem."""
        mu, s = mean @ rows.T, rows @ cov @ rows.T
        level = problem.weight @ (mu**2 + np.einsum("dkk->dk", s)).mean(axis=1)
        pairs = 2 * s**2 + 4 * mu[:, :, None] * mu[:, None, :] * s
        per_copy = problem.multiplicity * (h / 2) ** 2
        return float(level), float(np.sqrt(per_copy @ pairs.mean(axis=(1, 2))))

    return Dense(*np.array([losses(read), losses(rows)]).T.ravel())


@every_case
def test_modes_are_the_literal_algorithm(case, problem):
    """Mean-model and average-member loss agree with the literal (K+1)-coordinate form."""
    problem = problem.replace(multiplicity=[1.0, 2.5, 4.0])
    result = nqm.solve(problem, case.program(STEPS), range(STEPS + 1))
    exact = [dense(case, problem, t) for t in range(STEPS + 1)]
    agree_each(result.loss, [e.loss for e in exact], IDENTITY)
    agree_each(result.member_loss, [e.member_loss for e in exact], IDENTITY)
    agree_each(result.loss_sd, [e.loss_sd for e in exact], IDENTITY)
    noise = sum(mode.noise_share for mode in case.algorithm.modes())
    assert noise == pytest.approx(1.0, abs=1e-15)  # mean + deviation = one member's minibatch


# ------------------------------------------------------------------ properties, random members

_rate = st.floats(0.01, 0.5)
_fraction = st.floats(0.0, 0.95)


@st.composite
def optimizers(draw: Any) -> Any:
    kind = draw(st.sampled_from([SGD, HeavyBall, Nesterov, QuasiHyperbolicMomentum]))
    if kind is QuasiHyperbolicMomentum:
        return kind(draw(_fraction), draw(st.floats(0.0, 1.0)))
    return kind() if kind is SGD else kind(draw(_fraction))


@st.composite
def algorithms(draw: Any) -> Algorithm:
    inner = draw(optimizers())
    members = draw(st.integers(1, 4))
    base = draw(st.sampled_from([
        inner,
        Lookahead(inner, draw(st.integers(1, 5)), draw(_fraction)),
        LocalSGD(members, draw(st.integers(1, 4)), inner, draw(optimizers()), draw(_rate)),
        Rounded(inner, draw(_fraction)),
        Ensemble(members, inner, draw(st.sampled_from(["common", "own"]))),
        LatePhase(members, draw(st.floats(0.0, 1.0)), draw(st.sampled_from(["own", "shared", 0.4])),
                  draw(st.sampled_from([0.0, 0.3])), inner, draw(st.sampled_from([None, 0.5]))),
    ]))  # fmt: skip
    every = draw(st.integers(1, 4))
    return draw(st.sampled_from([
        base, EMA(base, draw(_fraction)), SWA(base, every),
        LAWA(base, every, draw(st.integers(1, 3))), PolynomialAverage(base, 4 * draw(_fraction)),
        ScheduleFree(draw(_fraction)),
    ]))  # fmt: skip


@st.composite
def cases(draw: Any) -> Case:
    algorithm = draw(algorithms())
    member_lr = draw(_rate) if algorithm.rate_count == 2 else None
    return Case("random", algorithm, literal.sgd, draw(_rate), member_lr)


@st.composite
def problems(draw: Any) -> Problem:
    d = draw(st.integers(1, 3))

    # Sizes whose squares and products underflow have fewer than 53 bits: no identity holds there.
    def vector(low: float, high: float) -> list[float]:
        number = st.floats(low, high).map(lambda x: x if abs(x) > 1e-100 else 0.0)
        return draw(st.lists(number, min_size=d, max_size=d))

    # A variance is squared on the way to the loss's own: below 1e-100 that underflows, and no
    # relative accuracy is left in double precision. None at all is another matter.
    noise = vector(1e-100, 2.0)
    if draw(st.booleans()):
        noise = [0.0 if draw(st.booleans()) else value for value in noise]
    return Problem(vector(1e-3, 1.5), noise, vector(0.5, 5.0), vector(-2.0, 2.0), vector(0.01, 1.0))


@given(cases(), problems(), st.integers(0, 25))
def test_modes_are_the_literal_algorithm_for_any_member(case, problem, steps):
    result = nqm.solve(problem, case.program(steps), [steps])
    exact = dense(case, problem, steps)
    # Heavy momentum amplifies rounding tenfold, and where the start cancels (momentum 1/2 at
    # lr h = 1/2 after two steps) the dense form, which holds start and noise in one number, has
    # the rounding of the start.
    rounding = 1e-14 * problem.initial_loss
    np.testing.assert_allclose(result.loss, [exact.loss], 1e-11, rounding)
    np.testing.assert_allclose(result.member_loss, [exact.member_loss], 1e-11, rounding)


@given(cases(), problems(), st.lists(st.integers(0, 90), min_size=1, max_size=4))
def test_jump_is_walk_for_any_member(case, problem, at):
    program = case.program(90)
    jumped = nqm.solve(problem, program, at)
    walked = nqm.solve(problem, program, at, jump=False)
    for name in ("loss", "bias", "variance", "member_loss", "loss_sd"):
        agree(getattr(jumped, name), getattr(walked, name), JUMP)
    np.testing.assert_array_equal(jumped.examples, walked.examples)


@given(cases(), problems(), st.floats(0.1, 30.0), st.integers(0, 25))
def test_only_lr_times_curvature_matters(case, problem, c, steps):
    """(h, lr) -> (c h, lr / c) with v -> c^2 v leaves the path of x alone; the loss grows by c.

    lr e is kept if e grows by c; the loss is linear in h; start and spread are positions.
    """
    scaled = problem.replace(
        curvature=c * problem.curvature, noise_variance=c**2 * problem.noise_variance
    )
    member = None if case.member_lr is None else case.member_lr / c
    slow = replace(case, lr=case.lr / c, member_lr=member)
    before = nqm.solve(problem, case.program(steps), [steps])
    after = nqm.solve(scaled, slow.program(steps), [steps])
    for name in ("loss", "bias", "variance", "member_loss", "loss_sd"):
        agree(getattr(after, name), c * getattr(before, name), 1e-10)


@given(cases(), problems(), st.floats(0.1, 30.0), st.integers(0, 25))
def test_noise_and_batch_size_enter_as_their_ratio(case, problem, c, steps):
    louder = problem.replace(noise_variance=c * problem.noise_variance)
    before = nqm.solve(problem, case.program(steps, 2), [steps])
    after = nqm.solve(louder, case.program(steps, 2 * c), [steps])
    agree(after.loss, before.loss, 1e-11)
    agree(after.member_loss, before.member_loss, 1e-11)
    agree(after.examples, c * before.examples, IDENTITY)


@given(cases(), problems(), st.integers(0, 25))
def test_loss_is_start_plus_noise_over_batch_size(case, problem, steps):
    """E L = (part of the start) + (part of the noise) / B exactly (THEORY 1)."""
    quiet = nqm.solve(problem.replace(noise_variance=0.0), case.program(steps), [steps])
    one = nqm.solve(problem, case.program(steps, 1), [steps])
    five = nqm.solve(problem, case.program(steps, 5), [steps])
    agree(five.loss, quiet.loss + (one.loss - quiet.loss) / 5, 1e-11)


@every_case
def test_bias_and_variance(case, problem):
    """Bias: the loss without gradient noise. Variance: the loss from the optimum. Sum: the loss."""
    at = range(STEPS + 1)
    whole = nqm.solve(problem, case.program(STEPS), at)
    fixed = replace(case, algorithm=without(case.algorithm, "spread"))
    exact = replace(case, algorithm=without(case.algorithm, "pitch"))
    bias = nqm.solve(problem.replace(noise_variance=0.0), exact.program(STEPS), at)
    optimum = problem.replace(initial_mean=0.0, initial_variance=0.0)
    variance = nqm.solve(optimum, fixed.program(STEPS), at)
    agree(whole.bias, bias.loss, IDENTITY)
    agree(whole.variance, variance.loss, IDENTITY)
    agree(whole.loss, bias.loss + variance.loss, IDENTITY)


# ------------------------------------------------------------------ jumps


@every_case
def test_jump_is_walk(case, problem):
    at = [0, 1, 7, 100, 101, 777, 1000]
    jumped = nqm.solve(problem, case.program(1000), at)
    walked = nqm.solve(problem, case.program(1000), at, jump=False)
    for name in ("loss", "bias", "variance", "member_loss", "loss_sd"):
        agree_each(getattr(jumped, name), getattr(walked, name), JUMP)


@pytest.mark.parametrize("off", [0.0, 1e-9, -1e-9])
def test_heavy_ball_near_critical_damping(off):
    """At lr h = (1 - s)^2, mu = s^2: double eigenvalue, A^j = s^j I + j s^(j-1) (A - s I)."""
    s, lr, steps = 0.99, 0.5, 1000
    h = (1 - s) ** 2 / lr * (1 + off)
    problem = Problem([h], [2.0], initial_mean=1.0, initial_variance=0.0)
    result = nqm.solve(problem, nqm.constant(HeavyBall(s**2), lr, steps), [steps])
    a = np.array([[1 - lr * h, -lr * s**2], [h, s**2]])
    j = np.arange(steps + 1.0)[:, None, None]
    powers = s**j * np.eye(2) + j * s ** (j - 1) * (a - s * np.eye(2))
    # Off the double root by 1e-9 relative, the powers move by about (j (1 - s))^2 1e-9 / 2.
    tolerance = JUMP if off == 0.0 else 1e-7
    agree_each(result.weight_mean[0], powers[-1, 0, :1], tolerance)
    kicks = powers[:-1, 0] @ np.array([-lr, 1.0])
    agree_each(result.weight_variance[0], [2.0 * np.sum(kicks**2)], tolerance)
    long = nqm.solve(problem, nqm.constant(HeavyBall(s**2), lr, 10**6), [10**6])
    steady = literal.heavy_ball_steady(problem.curvature, problem.noise_variance, lr, 1, s**2)
    agree_each(long.weight_variance[0], steady, JUMP)


# ------------------------------------------------------------------ steady states


def cycle(algorithm: Algorithm, rates: Any, h: float, v: float) -> tuple[Array, Array]:
    """(A, Q) of one period of the algorithm in one direction, composed in NumPy."""
    a, q = np.eye(len(algorithm.coordinates)), 0.0
    for t in range(algorithm.time.period):
        step = extract(algorithm, np.array([h]), rates, t)
        a_t, c_t, own = step.matrix[0], step.noise[0], step.own[0]
        a, q = a_t @ a, a_t @ (q * np.ones_like(a)) @ a_t.T + v * c_t @ c_t.T + own @ own.T
    return a, q


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if settles(c.algorithm) and not c.algorithm.constants
     and c.algorithm.member_mask(Problem([1.0] * 3, 1.0)) is None],
    ids=lambda c: c.name,
)  # fmt: skip
def test_steady_state_solves_the_lyapunov_equation(case, problem):
    found = nqm.steady(problem, case.program(1).phases[0])
    assert found.status is Status.FINISHED
    variances = []
    for mode in case.algorithm.modes():
        row = []
        for h, v in zip(problem.curvature, problem.noise_variance, strict=True):
            a, q = cycle(mode.algorithm, case.rates, h, mode.noise_share * v / 2)
            c = readout(mode.algorithm, 1000 * mode.algorithm.time.period)
            row.append(c @ solve_discrete_lyapunov(a, q) @ c)
        variances.append(np.array(row))
    agree_each(found.weight_variance, variances[0], JUMP)
    agree_each(found.loss, 0.5 * problem.curvature @ variances[0], JUMP)
    agree_each(found.member_loss, 0.5 * problem.curvature @ sum(variances), JUMP)
    if len(variances) > 1:
        agree(found.deviation_variance, variances[1], JUMP)


@settling
def test_steady_state_is_where_a_long_run_ends(case, problem):
    steps = 720_720  # a multiple of every period in the roster
    end = nqm.solve(problem, case.program(steps), [steps])
    found = nqm.steady(problem, case.program(1).phases[0])
    agree_each(end.loss[0], found.loss, JUMP)
    agree_each(end.member_loss[0], found.member_loss, JUMP)


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        closed("sgd", literal.sgd_steady),
        closed("heavy_ball", literal.heavy_ball_steady, momentum=0.8),
        closed("nesterov", literal.nesterov_steady, momentum=0.8),
        closed("quasi_hyperbolic", literal.quasi_hyperbolic_steady, beta=0.8, nu=0.6),
        closed("ema-sgd", literal.ema_steady, beta=0.7),
        closed("lookahead-sgd", literal.lookahead_steady, k=3, alpha=0.4),
        closed("lookahead-even", literal.lookahead_steady, k=4, alpha=0.5),
        closed("late-sgd", literal.late_phase_steady, members=3, member_lr=0.3, gamma=1 / 3),
        closed("late-gamma-1", literal.late_phase_steady, members=3, member_lr=0.3, gamma=1.0),
        closed("late-member_lr", literal.late_phase_steady, members=3, member_lr=0.1, gamma=0.5),
        closed("late-shared", literal.late_phase_steady, members=3, member_lr=0.3, gamma=1 / 3,
               minibatch="shared"),
    ],
)  # fmt: skip
def test_steady_closed_forms(name, form, options, problem):
    expected = form(problem.curvature, problem.noise_variance, batch_size=2, **options)
    mean, deviation = expected if isinstance(expected, tuple) else (expected, np.zeros(3))
    found = nqm.steady(problem, CASE[name].program(1).phases[0])
    agree_each(found.weight_variance, mean, IDENTITY)
    agree(found.deviation_variance, deviation, IDENTITY)
    agree_each(found.loss, 0.5 * problem.curvature @ mean, IDENTITY)
    agree_each(found.member_loss, 0.5 * problem.curvature @ (mean + deviation), IDENTITY)


# ------------------------------------------------------------------ sampling


@every_case
def test_sampling_is_the_moments(case, problem):
    """|z| < 4.5 with the standard error known in advance, mean model and average member."""
    replicas, at = 2017, [0, 1, 6, STEPS]
    drawn = nqm.sample(problem, case.program(STEPS), at, replicas=replicas, seed=3)
    exact = nqm.solve(problem, case.program(STEPS), at)
    root = np.sqrt(replicas)
    within_error(drawn.loss, exact.loss, exact.loss_sd / root)
    sd = np.array([dense(case, problem, t).member_loss_sd for t in at])
    within_error(drawn.member_loss, exact.member_loss, sd / root)
    agree(drawn.stderr, exact.loss_sd / root, 0.2)  # of an estimated deviation
    agree(drawn.member_stderr, sd / root, 0.2)
    np.testing.assert_array_equal(drawn.examples, exact.examples)


@every_case
def test_sampling_does_not_depend_on_workers(case, problem):
    """Bitwise, with a last block that is not full."""
    runs = [
        nqm.sample(problem, case.program(5), [0, 2, 5], replicas=75, seed=11, workers=w)
        for w in (1, 2, 3)
    ]
    for other in runs[1:]:
        np.testing.assert_array_equal(other.samples, runs[0].samples)
        np.testing.assert_array_equal(other.member_loss, runs[0].member_loss)
    again = nqm.sample(problem, case.program(5), [0, 2, 5], replicas=75, seed=12, workers=1)
    assert not np.array_equal(again.samples, runs[0].samples)


@every_case
def test_recording_does_not_change_a_sample(case, problem):
    few = nqm.sample(problem, case.program(9), [9], replicas=40, seed=1)
    all_steps = nqm.sample(problem, case.program(9), range(10), replicas=40, seed=1)
    np.testing.assert_array_equal(few.samples[0], all_steps.samples[-1])


# ------------------------------------------------------------------ limits, from the roster itself


class _Bare(nqm.algorithms.Optimizer):
    """A method with a parameter that states neither limits nor an edge."""

    buffers = ("b",)

    def direction(self, buffers: Any, g: Any) -> Any:
        return g, buffers


def edges(method: Any, problem: Problem, member_lr_ratio: float = 1.0) -> Any:
    """Closed-form edge of each direction, (d,); None where a method has none."""
    if isinstance(method, MultiplicativeLatePhase):
        return method.stability_edge(problem, member_lr_ratio)
    if isinstance(method, Algorithm):
        ratio = member_lr_ratio * member_mask(method, problem)
        return method.stability_edge(problem.curvature, ratio)
    return method.stability_edge(problem.curvature)


def unstated(method: Any, problem: Problem) -> list[str]:
    """What a member of the roster leaves out; without parameters there is nothing at a limit."""
    left = []
    if not method.limits() and (not is_dataclass(method) or fields(method)):
        left.append("limits")
    if edges(method, problem) is None:
        left.append("stability_edge")
    return left


@pytest.fixture
def placed(problem):
    """The same problem with its minimum away from the origin."""
    return problem.replace(minimum=[1.0, -2.0, 0.5])


@pytest.mark.parametrize("name", ROSTER)
def test_every_member_states_its_limits_and_its_edge(name, placed):
    method = ROSTER[name]()
    assert unstated(method, placed) == []
    for limit in method.limits():
        assert type(limit.algorithm) is ROSTER[name]
        assert limit.equals != limit.algorithm


def test_a_member_that_states_neither_is_seen(placed):
    assert unstated(_Bare(), placed) == ["limits", "stability_edge"]
    assert unstated(SGD(), placed) == []


SAMPLED = [cls() for cls in ROSTER.values() if issubclass(cls, Nonlinear)] + [
    MultiplicativeLatePhase(2, 0.7, factor=1.5, coupling="scalar"),
    SampledSGD(momentum=0.6, threshold=2.0), SampledSGD(dof=8.0, momentum=0.6),
    SignSGD(dof=8.0, pitch=0.1), Adam(beta1=0.5, pitch=0.1),
]  # fmt: skip
LIMITS = {
    f"{name}: {limit.setting}": limit
    for name, method in [(c.name, c.algorithm) for c in CASES] + [(repr(m), m) for m in SAMPLED]
    for limit in method.limits()
}
LINEAR_LIMITS = [name for name, limit in LIMITS.items() if isinstance(limit.algorithm, Algorithm)]


def both_sides(limit: LimitingCase, problem: Problem) -> tuple[Program, Program, list[int]]:
    """A limit as two programs, and the steps at which they must agree."""
    steps = STEPS if limit.until is None else min(STEPS, limit.until)
    rates = (0.3, 0.1) if limit.algorithm.rate_count == 2 else 0.3

    def program(method: Any, rates: Any, batch_size: float) -> Program:
        lr, member_lr = rates if isinstance(rates, tuple) else (rates, None)
        return Program((Phase(method, lr, steps, batch_size, member_lr=member_lr),))

    return (
        program(limit.algorithm, limit.rates(rates), 2),
        program(limit.equals, limit.equal_rates(rates), 2 * limit.batch_size),
        list(range(0, steps + 1, limit.every)),
    )


@pytest.mark.parametrize("name", LINEAR_LIMITS)
def test_limits_exactly(name, placed):
    limit = LIMITS[name]
    at_limit, equal, at = both_sides(limit, placed)
    special, general = nqm.solve(placed, at_limit, at), nqm.solve(placed, equal, at)
    for column in ("loss", "bias", "variance", *(["member_loss"] if limit.members else [])):
        agree_each(getattr(special, column), getattr(general, column), IDENTITY)
    np.testing.assert_allclose(special.examples, general.examples, rtol=IDENTITY)


@pytest.mark.parametrize("name", LIMITS)
def test_limits_by_monte_carlo(name, placed):
    """The literal algorithm at its limit against the other method's exact moments."""
    limit, replicas = LIMITS[name], 400
    at_limit, equal, at = both_sides(limit, placed)
    at = at[:: max(1, len(at) // 3)]
    drawn = nqm.sample(placed, at_limit, at, replicas=replicas, seed=9, workers=1)
    if isinstance(limit.equals, Nonlinear):  # then the same random numbers take the same steps
        other = nqm.sample(placed, equal, at, replicas=replicas, seed=9, workers=1)
        agree_each(drawn.loss, other.loss, JUMP)
        return
    exact = nqm.solve(placed, equal, at)
    error = exact.loss_sd / np.sqrt(replicas)
    if getattr(limit.algorithm, "dof", None) is not None:  # the loss of heavy tails scatters more
        error = drawn.stderr
    within_error(drawn.loss, exact.loss, error)
    np.testing.assert_allclose(drawn.examples, exact.examples, rtol=IDENTITY)
    if not limit.algorithm.member_count:
        np.testing.assert_array_equal(drawn.member_loss, drawn.loss)


# ------------------------------------------------------------------ edges, from the roster itself

EDGED = {c.name: (c.algorithm, 1.0) for c in CASES} | {
    "swa-heavy_ball-fast": (SWA(HeavyBall(0.8), 3), 1.0),
    "lookahead-k-1": (Lookahead(SGD(), 1, 0.4), 1.0),
    "lookahead-still": (Lookahead(SGD(), 3, 0.0), 1.0),
    "lookahead-alpha-1": (Lookahead(SGD(), 5, 1.0), 1.0),
    "primal averaging": (ScheduleFree(1.0), 1.0),
    "local_sgd-odd": (LocalSGD(3, 3, outer=HeavyBall(0.5)), 1.0),
    # The server's step is too long once 1 - r^H passes 0.8: before r = 0.
    "local_sgd-long-step": (LocalSGD(3, 4, outer_lr=2.5), 1.0),
    "local_sgd-long-step-odd": (LocalSGD(3, 3, outer=Nesterov(0.5), outer_lr=2.0), 1.0),
    "federated-again-flat": (Federated(2, 2, curvatures=(1.5, 0.5)), 1.0),
    "federated-long-step": (Federated(2, 2, curvatures=(1.5, 0.5), outer_lr=3.0), 1.0),
    "federated-one-step": (Federated(2, 1, outer=HeavyBall(0.3), curvatures=(1.5, 0.5)), 1.0),
    "fedprox-equal": (FedProx(3, 4, prox=0.3), 1.0),
    "fedprox-odd": (FedProx(2, 3, prox=0.5), 1.0),
    "fedprox-long-step": (FedProx(2, 4, outer_lr=2.5, prox=0.2), 1.0),
    "fedprox-flat-beside-prox": (FedProx(2, 2, outer_lr=1.9, prox=0.01), 1.0),
    "fedprox-differ": (FedProx(2, 2, curvatures=(1.5, 0.5), prox=0.2), 1.0),
    "fedprox-differ-long-step": (FedProx(2, 2, outer_lr=3.0, curvatures=(1.5, 0.5), prox=0.2), 1.0),
    "federated-shares": (Federated(2, 2, curvatures=(2.5, 0.5), shares=(0.25, 0.75)), 1.0),
    "fedprox-shares":
        (FedProx(2, 2, curvatures=(2.5, 0.5), shares=(0.25, 0.75), prox=0.2), 1.0),
    "fedprox-one-step": (FedProx(2, 1, outer=HeavyBall(0.3), curvatures=(1.5, 0.5), prox=2.0), 1.0),
    "scaffold-odd": (Scaffold(3, 3), 1.0),
    "scaffold-even": (Scaffold(2, 4, outer=Nesterov(0.5)), 1.0),
    "scaffold-one-step": (Scaffold(2, 1, outer=HeavyBall(0.3), curvatures=(1.5, 0.5)), 1.0),
    "scaffold-alone": (Scaffold(1, 3, outer_lr=0.5), 1.0),
    "quasi_hyperbolic-sgd": (QuasiHyperbolicMomentum(0.7, 0.0), 1.0),
    "quasi_hyperbolic-default": (QuasiHyperbolicMomentum(), 1.0),
    "quasi_hyperbolic-nu-1": (QuasiHyperbolicMomentum(0.9, 1.0), 1.0),
    "local_sgd-quasi_hyperbolic": (LocalSGD(2, 3, outer=QuasiHyperbolicMomentum(0.6, 0.8)), 1.0),
    "late-quasi_hyperbolic": (LatePhase(2, "mean", inner=QuasiHyperbolicMomentum(0.6, 0.3)), 0.5),
    "decay-decoupled-quasi_hyperbolic":
        (WeightDecay(QuasiHyperbolicMomentum(0.7, 0.8), 0.3, decoupled=True), 1.0),
    "decay-decoupled-nesterov": (WeightDecay(Nesterov(0.7), 0.3, decoupled=True), 1.0),
    "late-fast-members": (LatePhase(3, 0.1), 2.0),
    "late-gamma-0-heavy_ball": (LatePhase(3, 0.0, inner=HeavyBall(0.8)), 0.5),
    "late-still-elsewhere": (LatePhase(3, 0.0, directions=(1,)), 1.0),
}  # fmt: skip
EDGED = {
    name: (method, ratio)
    for name, (method, ratio) in EDGED.items()
    if method.stability_edge(np.ones(3)) is not None
}


def radius(algorithm: Algorithm, h: Array, rates: Any) -> Array:
    """Largest eigenvalue in size of one period of any mode, (d,), composed in NumPy."""
    worst = np.zeros(h.size)
    for mode in algorithm.modes():
        chain = mode.algorithm
        composed = np.eye(len(chain.coordinates))
        for t in chain.time.one_cycle():
            composed = extract(chain, h, rates, t).matrix @ composed
        worst = np.maximum(worst, np.abs(np.linalg.eigvals(composed)).max(axis=-1))
    return worst


@pytest.mark.parametrize("name", EDGED)
def test_closed_edges_are_where_the_spectral_radius_passes_1(name, placed):
    """In each direction, and nowhere below; and where the numerical search finds them."""
    method, ratio = EDGED[name]
    edge = edges(method, placed, ratio)
    own_ratio = ratio * member_mask(method, placed)

    def at(lr: Array) -> Array:
        rates = (lr, own_ratio * lr) if method.rate_count == 2 else lr
        return radius(method, placed.curvature, rates)

    finite = np.isfinite(edge)
    reach = np.where(finite, edge, 50.0 / placed.curvature)
    for share in np.linspace(0.04, 0.96, 24):
        assert np.all(at(share * reach) < 1 + 1e-9)  # which a running sum or an anchor has of 1
    assert np.all(at((1 - 1e-6) * reach) < 1 + 1e-9)
    assert np.all(at((1 + 1e-6) * reach)[finite] > 1 + 1e-8)
    # A bisection of |eigenvalue| = 1 + 1e-9.
    assert nqm.stability_edge(placed, method, member_lr_ratio=ratio) == pytest.approx(
        float(np.min(edge)), rel=1e-8
    )


@pytest.mark.parametrize(
    ("method", "known"),
    [
        (SGD(), literal.sgd_limit),
        (HeavyBall(0.8), lambda h: literal.heavy_ball_limit(h, 0.8)),
        (Nesterov(0.8), lambda h: literal.nesterov_limit(h, 0.8)),
        # Gitman et al. 2019: alpha < 2 (1 + beta) / (L (1 + beta (1 - 2 nu))).
        (QuasiHyperbolicMomentum(0.75, 0.5), lambda h: 3.5 / h),
        # 1 - r^3 = 2 / alpha at r = -3^(1/3), beyond SGD's own limit.
        (Lookahead(SGD(), 3, 0.5), lambda h: (1 + 3 ** (1 / 3)) / h),
        # mean_k (1 - c_k u)^2 = 1 - 2 u + 1.25 u^2 is 1 again at u = 1.6.
        (Federated(2, 2, curvatures=(1.5, 0.5)), lambda h: 1.6 / h),
        (LatePhase(3, gamma="mean"), lambda h: 1 / h),
    ],
    ids=lambda value: repr(value) if isinstance(value, Algorithm) else "",
)
def test_edges_of_the_literature(method, known, placed):
    agree_each(edges(method, placed), known(placed.curvature), IDENTITY)


def test_edge_of_factors_is_that_of_their_first_order(placed):
    """Lr h (gamma K phi^2 + ratio theta^2) = 2 in the steepest of the scaled directions."""
    method, ratio = MultiplicativeLatePhase(3, 0.7, factor=1.5), 0.4
    edge = np.min(edges(method, placed, ratio))
    for share, status in ((1 - 1e-6, Status.FINISHED), (1 + 1e-6, Status.DIVERGED)):
        lr = share * edge
        found = nqm.steady(placed, Phase(method, lr, 1, member_lr=ratio * lr))
        assert found.status is status


BOUNDED = [
    method
    for method in SAMPLED
    if isinstance(method, Sampled) and np.isinf(method.stability_edge(np.ones(1))).all()
]


@pytest.mark.parametrize("method", BOUNDED, ids=repr)
def test_bounded_steps_have_no_edge(method, problem):
    """At a huge rate the distance grows no faster than the number of steps.

    No step is longer than 20 lr: 1 for signs, threshold / (1 - momentum) <= 5 for clipping, and
    (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) <= 19 for Adam. Twice SGD's own edge would
    multiply the weights by 3 in every step.
    """
    lr, steps = 1e6, 400
    drawn = nqm.sample(problem, nqm.constant(method, lr, steps), [steps], replicas=20, workers=1)
    assert drawn.loss[0] < 0.5 * problem.curvature.sum() * (10 + 20 * lr * steps) ** 2
    assert {type(method) for method in BOUNDED} == {SampledSGD, SignSGD, Adam}


def one_of_each() -> list[str]:
    """Names of one case of each class whose edge is finite."""
    chosen: dict[Any, str] = {}
    for name, (method, _) in EDGED.items():
        if np.isfinite(method.stability_edge(np.ones(1))).all():
            chosen.setdefault((type(method), type(getattr(method, "inner", None))), name)
    return list(chosen.values())


@pytest.mark.parametrize("name", one_of_each())
def test_instability_is_reported_at_the_edge(name, problem):
    method, ratio = EDGED[name]
    expected = float(np.min(edges(method, problem, ratio)))

    def phase(lr: float, steps: int) -> Phase:
        return Phase(method, lr, steps, member_lr=ratio * lr if method.rate_count == 2 else None)

    def status(problem: Problem, share: float, at: list[int], steps: int) -> list[Status]:
        return nqm.solve(problem, Program((phase(share * expected, steps),)), at).status

    far = 2000 if method.time.update_never_repeats else 200_000
    assert status(problem, 1 + 1e-2, [far], far) == [Status.DIVERGED]
    assert status(problem, 1 - 1e-2, [far // 100, far], far) == [Status.FINISHED] * 2
    # From the optimum the loss is still small after 20 steps: only the radius can tell.
    rest = problem.replace(initial_mean=0.0, initial_variance=0.0)
    assert status(rest, 1 + 1e-3, [20], 200_000) == [Status.DIVERGED]
    assert status(rest, 1 - 1e-3, [20], 200_000) == [Status.FINISHED]
    if settles(method):
        found = nqm.steady(problem, phase((1 + 1e-3) * expected, 1))
        assert found.status is Status.DIVERGED
        assert np.isnan(found.loss)
        assert found.radius > 1
        stable = nqm.steady(problem, phase((1 - 1e-3) * expected, 1))
        assert stable.status is Status.FINISHED
        assert np.isfinite(stable.loss)
        assert stable.radius < 1


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_lookahead_stability_condition(k, alpha, problem):
    """Each rate is stable iff 0 < alpha (1 - r^k) < 2 in every direction."""
    algorithm = Lookahead(SGD(), k, alpha)
    seen = set()
    for lr in np.linspace(0.1, 4.0, 40):
        stable = bool(np.all(literal.lookahead_stable(problem.curvature, lr, k, alpha)))
        found = nqm.steady(problem, Phase(algorithm, float(lr), 1))
        assert (found.status is Status.FINISHED) == stable
        seen.add(stable)
    assert seen == {True, False}


@every_case
def test_overflow_is_a_status_and_not_a_warning(case, problem):
    """Far beyond the edge numbers overflow; every solver still returns rows."""
    wild = replace(case, lr=50.0, member_lr=None)
    for result in (
        nqm.solve(problem, wild.program(2000), [0, 2000]),
        nqm.solve(problem, wild.program(2000), [0, 2000], jump=False),
        nqm.sample(problem, wild.program(2000), [0, 2000], replicas=4),
    ):
        assert result.status == [Status.FINISHED, Status.DIVERGED]
        assert result.table()["status"].tolist() == ["finished", "diverged"]
    if settles(case.algorithm):
        assert nqm.steady(problem, wild.program(1).phases[0]).status is Status.DIVERGED

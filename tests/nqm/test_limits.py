"""Sizes: what is large but simple is quick, and what would not fit or end is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nqm
from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Adam,
    Constant,
    Cosine,
    Cyclic,
    Ensemble,
    Joined,
    LatePhase,
    LeastSquares,
    LocalSGD,
    Lookahead,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    PolynomialAverage,
    Problem,
    Soup,
    constant,
)
from nqm.problems.least_squares import power_law
from nqm.problems.random_features import random_features
from nqm.problems.spectra import harmonic, log_uniform, marchenko_pastur
from nqm.solvers.moments import Map, compose_span
from nqm.transition import extract, noise_moment
from tests.tolerances import IDENTITY, JUMP, agree, agree_each

P = Problem(harmonic(20), 0.1, minimum=1.0)
LS = LeastSquares(harmonic(20), 0.1)
BILLION, HUGE = 10**9, 2**53
FALL = nqm.Linear(0.1, 0.0, HUGE)  # steps that never repeat are taken one by one

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "members": (lambda: LatePhase(BILLION, "mean"), "LatePhase.members must be at most 1000000"),
    "ensemble": (lambda: Ensemble(BILLION), "Ensemble.members must be at most"),
    "clients": (lambda: LocalSGD(BILLION), "LocalSGD.clients must be at most"),
    "window": (lambda: LAWA(window=BILLION), "LAWA.window must be at most"),
    "dense": (lambda: nqm.solve(P, Phase(LAWA(window=10**5), FALL, 10)), "LAWA = 100001 needs"),
    "factors": (
        lambda: nqm.sample(P, Phase(MultiplicativeLatePhase(BILLION), 0.1, 5)), "the members of M"),
    "sampled members": (
        lambda: nqm.sample(P, Phase(Ensemble(10**6), 0.1, 5)), "members of Ensemble = 1000000"),
    "own starts": (
        lambda: nqm.solve(P, Phase(Ensemble(10**5, starts="own"), 0.1, 5)), "own starts"),
    "walk": (lambda: nqm.solve(P, Phase(SGD(), Cosine(0.1, 0.0, HUGE), HUGE)), "phase.0.steps"),
    "no jumps": (lambda: nqm.solve(P, Phase(SGD(), 0.1, HUGE), jump=False), "phase.0.steps"),
    "ageing": (lambda: nqm.solve(P, Phase(PolynomialAverage(), 0.1, HUGE)), "9.0072e.15 steps"),
    "ageing scan": (lambda: nqm.scan(P, PolynomialAverage(), 0.1, HUGE), "scan.steps"),
    "cycle": (lambda: nqm.solve(P, Phase(SGD(), Cyclic(0.1, 0.0, HUGE // 2), HUGE)), "phase.0.st"),
    "steady": (lambda: nqm.steady(P, Phase(SGD(), Cyclic(0.1, 0.0, HUGE // 2), 1)), "the period"),
    "target": (lambda: nqm.steps_to_target(P, Phase(PolynomialAverage(), 0.1, HUGE), 0.1), "steps"),
    "records": (lambda: nqm.solve(P, Phase(SGD(), 0.1, 2**70), range(2**70)), "in record.at"),
    "replicas": (lambda: nqm.sample(P, PHASE, replicas=BILLION), "replicas = 1000000000 .* GiB"),
    "replicas adam": (lambda: nqm.sample(P, Phase(Adam(), 0.1, 5), replicas=10**12), "replicas ="),
    "steps": (lambda: nqm.sample(P, Phase(SGD(), 0.1, HUGE)), "phase.0.steps = 9.0"),
    "least squares": (lambda: nqm.solve(LS, Phase(SGD(), FALL, HUGE)), "phase.steps = 9"),
    "its cycle": (lambda: nqm.steady(LS, Phase(SGD(), Cyclic(0.1, 0.0, 10**8), 1)), "the period"),
    "its batch": (lambda: nqm.sample(LS, Phase(SGD(), 0.1, 5, BILLION)), "phase.0.batch_size = 1"),
    "its replicas": (lambda: nqm.sample(LS, PHASE, replicas=BILLION), "replicas = 1000000000"),
    "its members": (lambda: nqm.sample(LS, Phase(LatePhase(10**6), 0.1, 5)), "the members = 1000"),
    "directions": (lambda: harmonic(10**12), "spectrum.directions = 1000000000000 .* TiB"),
    "log uniform": (lambda: log_uniform(10**12), "spectrum.directions"),
    "random matrix": (lambda: marchenko_pastur(10**12), "spectrum.directions"),
    "model": (lambda: power_law(10**12), "power_law.directions"),
    "features": (lambda: random_features(10**6, 10**6), "random_features.features"),
    "hidden": (lambda: random_features(10, BILLION), "random_features.hidden"),
    "decomposition": (lambda: random_features(10**4, 11_000), "multiplications of a singular"),
    "expanded": (lambda: P.replace(multiplicity=1e12).expanded(), "sum of multiplicity = 2000000"),
    "epoch": (lambda: nqm.shuffled_steady(P, PHASE, 10**12), "shuffled_steady.examples"),
    "pieces": (lambda: nqm.best_piecewise(P, 10**12, 10**12), "best_piecewise.pieces"),
    "batches": (lambda: nqm.best_batches(P, 10**12, 10**13), "best_batches.pieces"),
    "points": (
        lambda: nqm.best_lr(P, lambda lr: PHASE, 0.1, 1.0, points=10**12), "best_lr.points"),
    "soup": (lambda: Soup.of_snapshots(P, constant(SGD(), 0.1, 5), BILLION), "Soup.members"),
}  # fmt: skip
PHASE = Phase(SGD(), 0.1, 10)


@pytest.fixture(autouse=True)
def _eight_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit on every machine."""
    monkeypatch.setenv("NQM_MEMORY", "8")


@pytest.mark.parametrize("name", REFUSED)
def test_too_large_is_told_at_once(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(NQMError, match=words):
        call()


def test_the_limit_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQM_MEMORY", "0.001")
    with pytest.raises(NQMError, match=r"the limit is 1\.02 MiB: lower replicas, or set"):
        nqm.sample(P, PHASE, replicas=10**5)
    monkeypatch.setenv("NQM_MEMORY", "plenty")
    with pytest.raises(NQMError, match="NQM_MEMORY must be a number of GiB"):
        nqm.sample(P, PHASE)


@pytest.mark.parametrize(
    "make",
    [Ensemble, lambda k: LatePhase(k, "mean"), LocalSGD, lambda k: EMA(LatePhase(k, "mean"))],
)
def test_a_hundred_thousand_members_are_the_law_of_few(make: Callable[[int], Any]) -> None:
    """Loss = bias + variance / K and a minibatch each: linear in 1 / K, linear in K."""
    of = {k: nqm.solve(P, Phase(make(k), 0.05, 40), [40]) for k in (1, 2, 10**5)}
    half = of[2].variance - of[1].variance / 2  # 0 but for what members share (nothing here)
    agree_each(of[10**5].bias, of[1].bias, IDENTITY)
    agree_each(of[10**5].variance + half, of[1].variance / 10**5, 1e-9)  # `half` is rounding
    assert of[10**5].examples == 10**5 * of[1].examples


@pytest.mark.parametrize(
    "make",
    [lambda n: SWA(every=n), lambda n: Lookahead(k=n), lambda n: LocalSGD(2, n),
     lambda n: SWA(Lookahead(k=7), n), lambda n: nqm.WeightDecay(LocalSGD(2, n), 0.1),
     lambda n: LAWA(every=n, window=2)],
)  # fmt: skip
def test_long_periods_are_crossed_by_stretches_of_equal_steps(make: Callable[[int], Any]) -> None:
    phase = Phase(make(1000), 0.05, 2500)
    at = [1, 999, 1000, 1001, 2000, 2500]
    jumped, walked = nqm.solve(P, phase, at), nqm.solve(P, phase, at, jump=False)
    for name in ("loss", "bias", "variance", "member_loss"):
        agree_each(getattr(jumped, name), getattr(walked, name), JUMP)
    shorter = Phase(make(1000), 0.05, 700)  # shorter than its period
    agree_each(nqm.solve(P, shorter).loss, nqm.solve(P, shorter, jump=False).loss, JUMP)
    # A billion steps to a period: by then only the floor is left.
    far = nqm.solve(P, Phase(make(10**9), 0.05, 3 * 10**9 + 5))
    assert np.isfinite(far.loss).all()


@pytest.mark.parametrize(
    "algorithm",
    [SGD(), SWA(every=4), Lookahead(k=3), SWA(Lookahead(k=3), 5), EMA(LocalSGD(2, 3)),
     SWA(LocalSGD(2, 6), 10), LAWA(LocalSGD(2, 3), 2, 4), SWA(every=100)],
)  # fmt: skip
@pytest.mark.parametrize(("first", "last"), [(0, 1), (2, 3), (2, 40), (7, 161), (30, 60)])
def test_spans_are_their_steps_one_by_one(algorithm: Any, first: int, last: int) -> None:
    made: list[int] = []

    def step(t: int) -> Map:
        made.append(t)
        one = extract(algorithm, np.array([0.5, 1.0]), 0.1, t)
        return Map(one.matrix, noise_moment(one, 1.0), one.low)

    moved, noisy, _ = compose_span(step, algorithm.time, first, last)
    assert len(made) <= 4  # as many as two periods can tell apart
    a, q = np.broadcast_to(np.eye(moved.shape[-1]), moved.shape), np.zeros_like(moved)
    alike = algorithm.time.reduced(np.arange(first, last))
    for t, same in zip(range(first, last), alike, strict=True):
        one, added, _ = step(t)
        np.testing.assert_array_equal(step(int(same))[0], one)
        a, q = one @ a, one @ q @ one.swapaxes(-1, -2) + added
    agree(moved, a, IDENTITY)
    agree(noisy, q, IDENTITY)


def test_a_trillion_bins_are_no_array() -> None:
    binned = P.binned(10**12)
    assert binned.directions == P.directions
    agree_each(np.sort(binned.curvature), np.sort(P.curvature), IDENTITY)


def test_a_crossing_far_away_is_found() -> None:
    """(1 - lr h)^2t halves the loss at t = log 2 / (2 lr h), here 3.5e13 steps away."""
    one = Problem([1.0], [0.0])
    found = nqm.steps_to_target(one, Phase(SGD(), 1e-14, 10**18), 0.25)
    agree_each(found.step, np.log(2.0) / -(2.0 * np.log1p(-1e-14)), JUMP)


def test_joined_schedules_of_any_length() -> None:
    schedule = Joined((Constant(0.1), Constant(0.2)), (HUGE,))
    found = nqm.solve(P, Phase(SGD(), schedule, HUGE + 10**6), [HUGE, HUGE + 10**6])
    rates = np.array([0.1, 0.2])
    h = P.curvature[:, None]
    floor = (0.5 * h * rates**2 * 0.1 / (1.0 - (1.0 - rates * h) ** 2)).sum(axis=0)
    agree_each(found.loss, floor, JUMP)

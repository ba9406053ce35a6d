"""Real torch training of a noisy quadratic through `neural.LatePhase` obeys the laws of `nqm`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import nqm
from neural import LatePhase
from neural.quadratic.train import (
    NoiseStream,
    NoisyQuadratic,
    draw_start,
    late_settings,
    measure_law,
    minibatch_loss,
    train_quadratic,
)
from nqm import NQMError, Phase, Problem, Program
from nqm.algorithms.base import Gradient, Mode, Rate, State, Value
from nqm.algorithms.time_dependence import TimeDependence
from tests.tolerances import IDENTITY, SIGMAS, agree, within_error

RUNS = 800


@pytest.fixture
def away() -> Problem:
    """A minimum away from the origin, for factors."""
    return Problem(
        curvature=[1.0, 0.3],
        noise_variance=[0.1, 0.2],
        initial_mean=[0.5, -0.4],
        initial_variance=[0.1, 0.2],
        minimum=[2.0, -1.5],
    )


def agrees(problem: Problem, program: Program, at: list[int], **settings: object) -> None:
    table = measure_law(problem, program, at, runs=RUNS, **settings)
    within_error(table.measured, table.predicted, table.stderr)
    assert set(table.weights) == {"averaged", "member"}
    assert len(table) == 2 * len(at)


def test_an_example_has_the_gradient_it_should(problem):
    """By autograd, of one example: h x + noise in every run."""
    start = draw_start(problem, 4, 0)
    noise = NoiseStream(problem, 4, 1).draw(1, 3)[0][0]
    for factor in (None, 2.0):
        model = NoisyQuadratic(problem.replace(minimum=0.7), start, factor)
        minibatch_loss(model(noise)).backward()
        g = problem.curvature * start + noise.mean(0).numpy()
        by_theta, by_phi = (1.0, 1.0) if factor is None else (factor, (start + 0.7) / factor)
        agree(model.theta.grad, by_theta * g, IDENTITY)
        agree(model.phi.grad, by_phi * g, IDENTITY)
        agree(model.loss(), 0.5 * start**2 @ problem.curvature, IDENTITY)


INNER = {"sgd": nqm.SGD(), "heavy_ball": nqm.HeavyBall(0.8), "nesterov": nqm.Nesterov(0.8)}


@pytest.mark.parametrize(("members", "gamma"), [(2, 1.0), (5, "mean"), (10, "mean"), (10, "sum")])
@pytest.mark.parametrize("inner", list(INNER))
def test_additive_members_after_plain_training(problem, inner, members, gamma):
    """Momentum goes on over T0 in the base and begins at zero in members; they start spread."""
    first = INNER[inner]
    late = nqm.LatePhase(members, gamma, spread=0.2, inner=first)
    phases = (Phase(first, 0.05, 6, 2), Phase(late, 0.03, 24, 2, member_lr=0.06))
    agrees(problem, Program(phases), [0, 3, 6, 7, 8, 12, 30])


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"minibatch": "shared"}, {}),
        ({}, {"fused": True}),
        ({}, {"idle_steps": "first"}),
        ({}, {"idle_steps": "every"}),
    ],
)
def test_the_law_is_the_same(problem, settings, options):
    """One batch for all; one pass for all; idle steps without momentum and decay."""
    late = nqm.LatePhase(4, **settings)
    phase = Phase(late, nqm.Cosine(0.1, 0.01, 20), 20, 3, member_lr=0.1)
    agrees(problem, Program((phase,)), [0, 1, 10, 20], **options)


@pytest.mark.parametrize("inner", [nqm.SGD(), nqm.HeavyBall(0.5)])
def test_steady_state(problem, inner):
    problem = problem.replace(curvature=[1.0, 0.5, 0.3])
    phase = Phase(nqm.LatePhase(5, inner=inner, gamma="mean"), 0.1, 120, member_lr=0.1)
    steady = nqm.steady(problem, phase)
    found = train_quadratic(problem, Program((phase,)), [100, 110, 120], runs=RUNS)
    for losses, expected in ((found.averaged, steady.loss), (found.member, steady.member_loss)):
        error = losses.std(axis=1, ddof=1) / math.sqrt(RUNS)
        within_error(losses.mean(axis=1), expected, error)
    assert found.member.mean() > 1.2 * found.averaged.mean()  # or the two laws are one


@pytest.mark.parametrize(("members", "gamma", "factor"), [(2, 1.0, 1.0), (5, "mean", 2.0)])
def test_multiplicative_members_follow_their_samples(away, members, gamma, factor):
    late = nqm.MultiplicativeLatePhase(members, gamma, factor=factor, spread=0.05)
    late_phase = Phase(late, 0.03, 30, member_lr=0.05)
    before = (Phase(nqm.SGD(), 0.05, 5),) if factor == 1.0 else ()
    agrees(away, Program((*before, late_phase)), [0, 1, 6, 20, 30])


def test_multiplicative_members_with_momentum_in_the_limit_of_little_noise(away):
    """First order: additive members at rates lr phi^2 and member_lr theta^2, momentum and all.

    The error is of relative order noise and displacement, here 1e-3, beside one standard error
    of a few percent.
    """
    small = away.replace(
        noise_variance=[1e-6, 2e-6], initial_mean=0.0, initial_variance=1e-6, minimum=[2.0, -2.0]
    )
    late, lr_scale, member_scale = nqm.MultiplicativeLatePhase(4, gamma="mean").first_order(small)
    inner = nqm.HeavyBall(0.8)
    phase = Phase(
        replace(late, inner=inner), 0.05 * lr_scale[0], 40, member_lr=0.02 * member_scale[0]
    )
    law = nqm.solve(small, Program((phase,)), [1, 10, 40])
    model = NoisyQuadratic(small, draw_start(small, RUNS, 3), 1.0)
    torch_late = LatePhase(model, 4, "name:phi", gamma="mean")
    base = torch.optim.SGD([model.theta], lr=0.05, momentum=0.8)
    own = torch_late.optimizer_like(base, lr=0.02)
    stream, losses = NoiseStream(small, RUNS, 4), {}
    for step in range(1, 41):
        torch_late.step(stream.draw(4), minibatch_loss, base, own)
        losses[step] = torch_late.averaged().loss()
    found = np.stack([losses[step] for step in law.steps])
    within_error(found.mean(1), law.loss, found.std(axis=1, ddof=1) / math.sqrt(RUNS))


# ------------------------------------------------------------------ what `nqm` has no class for


@dataclass(frozen=True)
class Literal(nqm.LatePhase):
    """All K + 1 chains as they are, as members differ; `reads` one of them, or the mean (-1)."""

    reads: int = -1

    def modes(self) -> tuple[Mode, ...]:
        return (Mode("mean", self, 1.0),)

    def weights(self, state: State, t: int) -> Value:
        return (
            super().weights(state, t)
            if self.reads < 0
            else self.member_weights(state, t)[self.reads]
        )


@dataclass(frozen=True)
class Short(Literal):
    """Every other cycle is one minibatch: member 0 moves alone (leftover="members")."""

    @property
    def time(self) -> TimeDependence:
        return TimeDependence(modulus=2)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        if t % 2 == 0:
            return super().update(state, gradient, lr, t)
        base, (first, *rest) = self._split(state)
        step, buffers = self.inner.direction(first[1:], gradient(base[0] + first[0]))
        return sum(rest, start=(*base, first[0] - lr[1] * step, *buffers))


@dataclass(frozen=True)
class Idle(Literal):
    """Members step on a gradient of zero in others' turns (idle_steps="every")."""

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        base, members = self._split(state)
        summed, moved = 0.0, list(members)
        for turn in range(self.members):
            g = gradient(base[0] + moved[turn][0])
            summed = summed + g
            for k, (phi, *buffers) in enumerate(moved):
                step, new = self.inner.direction(tuple(buffers), g if k == turn else 0.0 * g)
                moved[k] = (phi - lr[1] * step, *new)
        step, new = self.inner.direction(base[1:], self.base_scale * summed)
        return sum(moved, start=(base[0] - lr[0] * step, *new))


@pytest.mark.parametrize("kind", [Short, Idle])
def test_short_cycles_and_idle_steps_with_momentum(problem, kind):
    """Stated literally they are linear: the engine of the theory takes them as they are."""
    cycles, at, usual = (
        12,
        [1, 2, 7, 12],
        nqm.LatePhase(3, inner=nqm.HeavyBall(0.8), spread=0.1, gamma="mean"),
    )
    phase = Phase(usual, 0.05, cycles, member_lr=0.05)

    def law(which: type[Literal], reads: int) -> np.ndarray:
        literal = which(3, usual.gamma, inner=usual.inner, spread=0.1, reads=reads)
        return nqm.solve(problem, Program((replace(phase, algorithm=literal),)), at).loss

    model = NoisyQuadratic(problem, draw_start(problem, RUNS, 5))
    torch_late = LatePhase(
        model,
        idle_steps="every" if kind is Idle else "none",
        seed=6,
        **late_settings(usual, problem.directions),
    )
    base = torch.optim.SGD([model.theta], lr=0.05, momentum=0.8)
    own, stream, losses = torch_late.optimizer_like(base), NoiseStream(problem, RUNS, 7), {}
    for step in range(cycles):
        count = 1 if kind is Short and step % 2 else 3
        torch_late.step(stream.draw(count), minibatch_loss, base, own)
        models = (torch_late.averaged(), *(torch_late.member(k) for k in range(3)))
        losses[step + 1] = [one.loss() for one in models]
    seen = np.array([losses[step] for step in at])  # (records, models, runs)
    error = seen.std(axis=2, ddof=1) / math.sqrt(RUNS)
    models = range(-1, 3)
    within_error(seen.mean(2), np.stack([law(kind, k) for k in models], axis=1), error)
    # Whole cycles without idle steps are another law, by more than the error of this one.
    gap = np.abs(seen.mean(2) - np.stack([law(Literal, k) for k in models], axis=1)) / error
    assert gap.max() > 2 * SIGMAS


def test_the_same_seed_is_the_same_run(problem):
    program = Program((Phase(nqm.LatePhase(2, spread=0.1, gamma="mean"), 0.1, 3),))
    one, same, other = (train_quadratic(problem, program, runs=8, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.member, same.member)
    assert not np.array_equal(one.member[1:], other.member[1:])


LATE = Phase(nqm.LatePhase(2, gamma="mean"), 0.1, 3)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((Phase(nqm.SGD(), 0.1, 3),), r"needs late-phase weights.*got \['SGD'\]"),
        ((LATE, LATE), "needs late-phase weights"),
        ((Phase(nqm.HeavyBall(), 0.1, 3), LATE), "the optimizer of the phase before"),
        ((Phase(nqm.LatePhase(2, minibatch=0.5, gamma="mean"), 0.1, 3),), "or one for all"),
        ((replace(LATE, batch_size=1.5),), "needs whole batch sizes"),
    ],
)
def test_mistakes_are_one_line(problem, phases, message):
    with pytest.raises(NQMError, match=message) as caught:
        train_quadratic(problem, Program(phases), runs=4)
    assert "\n" not in str(caught.value)

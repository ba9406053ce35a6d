"""Schedules against their formulas, and the periods they declare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

import nqm
from nqm import (
    SGD,
    Constant,
    Cooldown,
    Cosine,
    Cyclic,
    Exponential,
    Joined,
    Linear,
    NQMError,
    PerStep,
    Phase,
    Piecewise,
    Power,
    Program,
    Schedule,
    Warmup,
    WarmupStableDecay,
)
from nqm.problems.quadratic import FloatArray
from nqm.schedule import SCHEDULES, as_schedule
from tests.tolerances import IDENTITY, agree_each, within_error

FORMULAS = {
    "constant": (Constant(0.3), lambda t: 0.3),
    "piecewise": (
        Piecewise((0.3, 0.1, 0.2), (4, 9)), lambda t: 0.3 if t < 4 else 0.1 if t < 9 else 0.2),
    "linear": (Linear(1.0, 0.2, 10), lambda t: 1.0 - 0.08 * t if t < 10 else 0.2),
    "cosine": (
        Cosine(1.0, 0.2, 10),
        lambda t: 0.2 + 0.4 * (1 + math.cos(math.pi * t / 10)) if t < 10 else 0.2),
    "wsd": (
        WarmupStableDecay(1.0, 0.2, 4, 5, 8),
        lambda t: (t + 1) / 4 if t < 4 else 1.0 if t < 9 else max(0.2, 1.0 - 0.1 * (t - 9))),
    "cyclic": (
        Cyclic(1.0, 0.2, 5), lambda t: 0.2 + 0.4 * (1 + math.cos(math.pi * (t % 5) / 4))),
    "cyclic linear": (Cyclic(1.0, 0.2, 5, "linear"), lambda t: 1.0 - 0.2 * (t % 5)),
    "cyclic triangle": (
        Cyclic(1.0, 0.2, 5, "triangle"), lambda t: [1.0, 0.6, 0.2, 0.6, 1.0][t % 5]),
    "power": (Power(0.8, 5, 0.5), lambda t: 0.8 / math.sqrt(1 + t / 5)),
    "inverse time": (Power(0.8, 5), lambda t: 0.8 / (1 + t / 5)),
    "exponential": (Exponential(0.8, 0.1, 6), lambda t: 0.8 * 0.125 ** (min(t, 6) / 6)),
    "per step": (PerStep((0.5, 0.2, 0.7)), lambda t: [0.5, 0.2, 0.7][min(t, 2)]),
    "cooldown": (Cooldown(0.4, 5, 8), lambda t: 0.4 * (1 - math.sqrt(min(max(t - 5, 0) / 8, 1)))),
    "cooldown to a share": (
        Cooldown(Linear(1.0, 0.2, 10), 3, 8, 0.25, "linear"),
        lambda t: (1.0 - 0.08 * min(t, 10)) * (1 - 0.75 * min(max(t - 3, 0) / 8, 1))),
    "cooldown cosine": (
        Cooldown(Constant(0.4), 5, 8, 0.5, "cosine"),
        lambda t: 0.4 * (0.75 + 0.25 * math.cos(math.pi * min(max(t - 5, 0) / 8, 1)))),
    "warmup": (Warmup(4, Linear(1.0, 0.2, 10)),
               lambda t: min((t + 1) / 4, 1) * (1.0 - 0.08 * min(t, 10))),
    "joined": (
        Joined((Constant(0.3), Linear(1.0, 0.5, 5), Constant(0.1)), (3, 4)),
        lambda t: 0.3 if t < 3 else 1.0 - 0.1 * (t - 3) if t < 7 else 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_values(name):
    schedule, formula = FORMULAS[name]
    expected = [formula(t) for t in range(30)]
    agree_each(schedule(np.arange(30)), expected, IDENTITY)
    for t in (0, 3, 4, 7, 29):  # a single step is a number of shape ()
        assert np.shape(schedule(t)) == ()
        assert float(schedule(t)) == pytest.approx(expected[t], rel=IDENTITY)


def test_every_schedule_is_tried():
    assert {type(schedule) for schedule, _ in FORMULAS.values()} == set(SCHEDULES.values())


_value = st.floats(0.01, 10.0)
_length = st.integers(1, 15)


def _joined(parts: Any) -> st.SearchStrategy[Schedule]:
    return st.lists(st.tuples(parts, _length), min_size=1, max_size=3).map(
        lambda pairs: Joined(tuple(p for p, _ in pairs), tuple(n for _, n in pairs[1:]))
    )


schedules = st.recursive(
    st.one_of(
        st.builds(Constant, _value),
        st.builds(Linear, _value, _value, _length),
        st.builds(Cosine, _value, _value, _length),
        st.builds(
            Cyclic, _value, _value, _length, st.sampled_from(["cosine", "linear", "triangle"])
        ),
        st.builds(WarmupStableDecay, _value, _value, st.integers(0, 9), st.integers(0, 9), _length),
        st.builds(Power, _value, _length, st.floats(0.1, 2.0)),
        st.builds(Exponential, _value, _value, _length),
        st.builds(PerStep, st.lists(_value, min_size=1, max_size=9)),
        st.lists(st.tuples(_value, _length), min_size=1, max_size=4).map(
            lambda pairs: Piecewise(
                tuple(v for v, _ in pairs), tuple(np.cumsum([n for _, n in pairs[1:]]).tolist())
            )
        ),
    ),
    lambda parts: st.one_of(
        st.builds(Warmup, _length, parts),
        st.builds(
            Cooldown,
            parts,
            st.integers(0, 20),
            _length,
            st.floats(0.1, 1.0),
            st.sampled_from(["sqrt", "linear", "cosine"]),
        ),
        _joined(parts),
    ),
    max_leaves=4,
)


@given(schedules, st.integers(1, 80))
def test_segments_tile_the_steps_and_really_repeat(schedule, steps):
    position = 0
    values = schedule(np.arange(steps))
    assert np.all(values > 0)
    for start, stop, period in schedule.segments(steps):
        assert start == position
        assert stop > start
        position = stop
        if period is not None:
            stretch = values[start:stop]
            np.testing.assert_allclose(stretch[period:], stretch[:-period], rtol=1e-14)
    assert position == steps


@pytest.mark.parametrize(
    ("schedule", "steps", "segments"),
    [
        (Constant(1.0), 9, [(0, 9, 1)]),
        (Piecewise((1.0, 2.0), (4,)), 9, [(0, 4, 1), (4, 9, 1)]),
        (Cosine(1.0, 0.1, 4), 9, [(0, 4, None), (4, 9, 1)]),
        (Cyclic(1.0, 0.1, 4), 9, [(0, 9, 4)]),
        (
            WarmupStableDecay(1.0, 0.1, 2, 3, 2),
            9,
            [(0, 2, None), (2, 5, 1), (5, 7, None), (7, 9, 1)],
        ),
        (Warmup(3, Cyclic(1.0, 0.1, 4)), 9, [(0, 3, None), (3, 9, 4)]),
        (Cooldown(1.0, 3, 4), 12, [(0, 3, 1), (3, 7, None), (7, 12, 1)]),
        (Cooldown(Cyclic(1.0, 0.1, 4), 9, 4), 9, [(0, 9, 4)]),
        (Exponential(1.0, 0.1, 4), 9, [(0, 4, None), (4, 9, 1)]),
        (PerStep((1.0, 2.0)), 2, [(0, 2, None)]),
        (Joined((Constant(1.0), Cyclic(1.0, 0.1, 2)), (5,)), 9, [(0, 5, 1), (5, 9, 2)]),
    ],
)
def test_segments_are_as_wide_as_they_can_be(schedule, steps, segments):
    """Else nothing would be jumped over; a schedule may not declare less than this."""
    assert list(schedule.segments(steps)) == segments


def test_a_number_is_a_constant():
    assert as_schedule(0.5, "lr") == Constant(0.5)
    assert as_schedule(Cyclic(1.0, 0.1, 2), "lr") == Cyclic(1.0, 0.1, 2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Constant(0.0), r"Constant\.value"),
        (lambda: Constant("fast"), r"Constant\.value"),
        (lambda: Piecewise((1.0, -1.0), (3,)), r"Piecewise\.values"),
        (lambda: Piecewise((1.0,), (3,)), "one entry more"),
        (lambda: Piecewise((1.0, 2.0, 3.0), (5, 5)), r"Piecewise\.boundaries"),
        (lambda: Piecewise((1.0, 2.0), (0,)), r"Piecewise\.boundaries"),
        (lambda: Piecewise((1.0, 2.0), (2.5,)), r"Piecewise\.boundaries"),
        (lambda: Linear(1.0, -0.1, 3), r"Linear\.end"),
        (lambda: Linear(0.0, 0.0, 3), "must not all be 0"),
        (lambda: Piecewise((0.0, 0.0), (3,)), "must not all be 0"),
        (lambda: WarmupStableDecay(0.0, 0.0, 0, 0, 1), r"WarmupStableDecay\.peak"),
        (lambda: Cyclic(0.0, 0.0, 3), r"Cyclic\.high"),
        (lambda: Phase(SGD(), 0.1, 5, Linear(4.0, 0.0, 4)), "batch_size must be > 0.* 0 at step 4"),
        (lambda: Linear(1.0, 0.1, 0), r"Linear\.over"),
        (lambda: Cosine(float("nan"), 0.1, 3), r"Cosine\.start"),
        (lambda: Cosine(1.0, 0.1, 2.5), r"Cosine\.over"),
        (lambda: WarmupStableDecay(1.0, 0.1, -1, 0, 1), r"WarmupStableDecay\.warmup"),
        (lambda: WarmupStableDecay(1.0, 0.1, 0, 0, 0), r"WarmupStableDecay\.decay"),
        (lambda: Cyclic(1.0, 0.1, 0), r"Cyclic\.period"),
        (lambda: Cyclic(1.0, 0.1, 3, "sine"), r"Cyclic\.shape.*'sine'"),
        (lambda: Warmup(0, Constant(1.0)), r"Warmup\.steps"),
        (lambda: Joined((Constant(1.0),), (3,)), "one part more"),
        (lambda: Joined((Constant(1.0), Constant(2.0)), (0,)), r"Joined\.lengths"),
        (lambda: as_schedule("fast", r"phase.lr"), r"phase\.lr"),
        (lambda: as_schedule(-1.0, r"phase.batch_size"), r"phase\.batch_size"),
    ],
)
def test_bad_input_names_the_field(build, words):
    with pytest.raises(NQMError, match=words):
        build()


#: Schedules that end at 0, or pass through it, and from which step on they stay there.
ENDING = {
    "linear": Linear(0.4, 0.0, 12),
    "from zero": Linear(0.0, 0.4, 12),
    "cosine": Cosine(0.4, 0.0, 12),
    "wsd": WarmupStableDecay(0.4, 0.0, 3, 4, 5),
    "cyclic": Cyclic(0.4, 0.0, 5),
    "piecewise": Piecewise((0.4, 0.0, 0.2), (5, 9)),
    "warmup": Warmup(3, Cosine(0.4, 0.0, 12)),
    "joined": Joined((Linear(0.4, 0.0, 4), Constant(0.2)), (6,)),
}


@pytest.mark.parametrize("name", ENDING)
def test_a_rate_may_be_zero(name, problem):
    """Exact losses are those of the recursion, and where the rate is 0 nothing moves."""
    schedule, steps = ENDING[name], 20
    program = Program((Phase(SGD(), schedule, steps, 2),))
    moment = problem.initial_mean**2 + problem.initial_variance
    expected = [problem.weight @ moment]
    for lr in schedule(np.arange(steps)):
        kicked = lr**2 * problem.noise_variance / 2
        moment = (1.0 - lr * problem.curvature) ** 2 * moment + kicked
        expected.append(problem.weight @ moment)
    at = range(steps + 1)
    for jump in (True, False):
        found = nqm.solve(problem, program, at, jump=jump)
        agree_each(found.loss, expected, IDENTITY)
        assert set(found.status) == {nqm.Status.FINISHED}
    still = np.flatnonzero(schedule(np.arange(steps)) == 0.0)
    assert still.size
    agree_each(found.loss[still + 1], found.loss[still], 0.0)
    for precision in ("float64", "float32"):
        drawn = nqm.sample(problem, program, at, replicas=600, precision=precision)
        within_error(drawn.loss, expected, drawn.stderr)
    nqm.sample(problem, Program((Phase(nqm.Adam(), schedule, steps),)), [steps], replicas=4)


def test_least_is_the_least_value():
    for schedule in (*ENDING.values(), *(schedule for schedule, _ in FORMULAS.values())):
        least = schedule(np.arange(60)).min()
        assert 0.0 <= schedule.least <= least * (1.0 + IDENTITY)


def test_a_cycle_down_to_zero_settles(problem):
    """The steady state at the end of a cycle of rates is the fixed point of its moments."""
    schedule = Cyclic(0.4, 0.0, 5)
    keep, kicked = np.ones(3), np.zeros(3)
    for lr in schedule(np.arange(5)):
        factor = (1.0 - lr * problem.curvature) ** 2
        keep, kicked = factor * keep, factor * kicked + lr**2 * problem.noise_variance
    found = nqm.steady(problem, Phase(SGD(), schedule, 1))
    agree_each(found.loss, problem.weight @ (kicked / (1.0 - keep)), 1e-11)  # 1 - keep cancels


def test_a_joined_schedule_asks_only_the_parts_of_its_steps() -> None:
    """Of many parts, so that a program costs a look-up a step, not one for each part as well."""
    asked: list[int] = []

    @dataclass(frozen=True)
    class Noting(Schedule):
        number: int

        def __call__(self, step: ArrayLike) -> FloatArray:
            asked.append(self.number)
            return np.full(np.shape(step), float(self.number))

    joined = Joined(tuple(Noting(i) for i in range(1, 101)), (2,) * 99)
    np.testing.assert_array_equal(joined([3, 4, 0, 500]), [2.0, 3.0, 1.0, 100.0])
    assert sorted(asked) == [1, 2, 3, 100]


def test_a_joined_schedule_counts_its_steps_exactly() -> None:
    with pytest.raises(NQMError, match=r"sum of Joined\.lengths must be at most"):
        Joined((Constant(1.0),) * 3, (2**53, 2**53))


def test_an_array_of_rates(problem):
    """A list or array is a rate for every step: the recursion itself."""
    rates = np.array([0.5, 0.0, 0.2, 0.7])
    mean, variance = problem.initial_mean, problem.initial_variance
    for rate in rates:
        gain = 1 - rate * problem.curvature
        mean, variance = gain * mean, gain**2 * variance + rate**2 * problem.noise_variance / 2
    expected = 0.5 * problem.curvature @ (mean**2 + variance)
    for lr in (rates, rates.tolist(), tuple(rates), PerStep(tuple(rates))):
        loss = nqm.solve(problem, Phase(SGD(), lr, 4, [2] * 4), [4]).loss[0]
        assert loss == pytest.approx(expected, rel=IDENTITY)
    with pytest.raises(NQMError, match=r"phase\.lr holds 4 values for 5 steps"):
        Phase(SGD(), rates, 5)
    with pytest.raises(NQMError, match=r"phase\.batch_size holds 1"):
        Phase(SGD(), 0.1, 2, [4])
    with pytest.raises(NQMError, match=r"phase\.batch_size must be > 0 at every step"):
        Phase(SGD(), 0.1, 2, [4, 0])
    with pytest.raises(NQMError, match="steady state needs"):
        nqm.steady(problem, Phase(SGD(), rates, 4))


@pytest.mark.parametrize("values", [[], [0.1, -0.1], [0.1, float("nan")], ["a"], [[0.1], [0.2]]])
def test_no_array_of_rates(values):
    with pytest.raises(NQMError, match=r"phase\.lr"):
        Phase(SGD(), values, 1)


def test_rates_may_end_at_zero(problem):
    """The step at rate 0 changes nothing: the loss after it is the loss before it."""
    falling = [
        Linear(0.5, 0.0, 9),
        Cosine(0.5, 0.0, 9),
        Cooldown(0.5, 3, 6),
        WarmupStableDecay(0.5, 0.0, 2, 3, 4),
        Warmup(2, Linear(0.5, 0.0, 9)),
    ]
    for schedule in falling:
        losses = nqm.solve(problem, Phase(SGD(), schedule, 20), [9, 10, 20]).loss
        assert losses[0] == pytest.approx(losses[2], rel=IDENTITY)
        assert losses[0] == pytest.approx(losses[1], rel=IDENTITY)


def test_parts_may_be_numbers():
    assert Warmup(4, 0.2) == Warmup(4, Constant(0.2))
    assert Joined((0.2, 0.1), (3,)) == Joined((Constant(0.2), Constant(0.1)), (3,))
    for build in (lambda: Warmup(4, "x"), lambda: Joined((SGD(),), ()), lambda: Cooldown(-1, 2, 3)):
        with pytest.raises(NQMError, match=r"Warmup\.then|Joined\.parts|Cooldown\.of"):
            build()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Power(0.0, 3), "Power.start"),
        (lambda: Power(0.1, 3, 0.0), "Power.exponent"),
        (lambda: Exponential(0.1, 0.0, 3), "Exponential.end"),
        (lambda: Cooldown(0.1, -1, 3), "Cooldown.begin"),
        (lambda: Cooldown(0.1, 1, 3, 1.5), "Cooldown.end"),
        (lambda: Cooldown(0.1, 1, 3, 0.5, "square"), "Cooldown.shape"),
    ],
)
def test_new_mistakes(build, words):
    with pytest.raises(NQMError, match=words):
        build()


def test_lists_and_cooldowns_in_files():
    from nqm.runs import config

    def phase(lr):
        return {
            "problem": {"curvature": [1.0], "noise_variance": 0.5},
            "phase": [{"algorithm": "sgd", "lr": lr, "steps": 3}],
        }

    run = config.build(phase([0.1, 0.2, 0.3]))
    assert run.program.phases[0].lr == PerStep((0.1, 0.2, 0.3))
    cool = {"schedule": "cooldown", "of": {"schedule": "cosine", "start": 1, "end": 0, "over": 9},
            "begin": 1, "over": 2}  # fmt: skip
    assert config.build(phase(cool)).program.phases[0].lr == Cooldown(Cosine(1, 0, 9), 1, 2)
    with pytest.raises(NQMError, match=r"phase\.0\.lr"):
        config.build(phase([0.1, "a", 0.3]))

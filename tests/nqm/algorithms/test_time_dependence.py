"""What a method says of the step number is all that the solvers may rely on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nqm
from nqm import EMA, SGD, SWA, Algorithm, Lookahead, Phase, PolynomialAverage, ScheduleFree
from nqm.algorithms.time_dependence import TimeDependence, is_last_of_period
from tests.tolerances import IDENTITY, JUMP, agree_each

times = st.builds(
    TimeDependence,
    st.lists(st.integers(1, 12), max_size=3).map(tuple),
    st.sampled_from([1, 1, 2, 5]),
    st.booleans(),
)


def seen(time: TimeDependence, t: int) -> Any:
    """All that `update` may tell of step t."""
    if time.update_never_repeats:
        return t
    return [(t + 1) % n == 0 for n in time.periods], t % time.modulus


@given(times, st.integers(0, 10**6))
def test_reduced_times_stand_for_equal_steps(time, first):
    t = np.arange(first, first + 200)
    reduced = time.reduced(t)
    assert reduced.shape == t.shape
    for a, b in zip(t.tolist(), reduced.tolist(), strict=True):
        assert seen(time, a) == seen(time, b)
        assert seen(time, a) == seen(time, a + time.period) or time.update_never_repeats
    covered = [t[rows] for rows, _ in time.groups(t)]
    assert sorted(np.concatenate(covered)) == t.tolist()
    assert len(time.one_cycle()) == time.period
    assert 1.0 <= time.products(200) <= 200.0


@pytest.mark.parametrize("every", [1, 2, 7])
def test_the_last_step_of_a_period(every):
    assert [t for t in range(21) if is_last_of_period(t, every)] == list(
        range(every - 1, 21, every)
    )


@pytest.mark.parametrize(
    ("algorithm", "time"),
    [
        (SGD(), TimeDependence()),
        (Lookahead(SGD(), 1), TimeDependence()),
        (EMA(Lookahead(SGD(), 4)), TimeDependence((4,))),
        (SWA(Lookahead(SGD(), 4), 6), TimeDependence((4, 6), weights_never_repeat=True)),
        (ScheduleFree(), TimeDependence(update_never_repeats=True)),
        (PolynomialAverage(Lookahead(SGD(), 4)), TimeDependence((4,), update_never_repeats=True)),
    ],
)
def test_time_of_what_is_around_another_method(algorithm, time):
    assert algorithm.time == time


@dataclass(frozen=True)
class Strides(Algorithm):
    """Steps of 1, 2 and 3 times the rate in turn."""

    coordinates = ("x",)

    @property
    def time(self) -> TimeDependence:
        return TimeDependence(modulus=3)

    def update(self, state: Any, gradient: Any, lr: Any, t: int) -> Any:
        return (state[0] - (1 + t % 3) * lr * gradient(state[0]),)

    def weights(self, state: Any, t: int) -> Any:
        return state[0]

    def embed(self, draw: Any, normal: Any) -> Any:
        return (draw(),)


@pytest.mark.parametrize("jump", [True, False])
def test_a_method_that_looks_at_a_remainder(jump, problem):
    """Mean prod (1 - k lr h); variance of a cycle sum_k (k lr)^2 v prod of the later factors^2."""
    lr, h = 0.2, problem.curvature
    r1, r2, r3 = (1 - k * lr * h for k in (1, 2, 3))
    at = [2, 3, 301]
    found = nqm.solve(problem, Phase(Strides(), lr, 301), at, jump=jump)
    mean = np.stack([r1 * r2, r1 * r2 * r3, (r1 * r2 * r3) ** 100 * r1]) * problem.initial_mean
    np.testing.assert_allclose(found.weight_mean, mean, rtol=JUMP, atol=1e-300)
    noise = lr**2 * problem.noise_variance * ((r2 * r3) ** 2 + 4 * r3**2 + 9)
    steady = nqm.steady(problem, Phase(Strides(), lr, 1))
    agree_each(steady.weight_variance, noise / (1 - (r1 * r2 * r3) ** 2), IDENTITY)
    drawn = nqm.sample(problem, Phase(Strides(), lr, 301), at, replicas=500, workers=1)
    assert np.all(np.abs(drawn.loss - found.loss) < 4.5 * found.loss_sd / np.sqrt(500))

"""The best learning rate, where it is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from test_bridge_verdict import cells
from tiny_landscapes import Bowl

from neural.best_rate import POINTS, View, best_rate, best_rates, measured_best, predicted
from neural.chains import Training
from neural.drift import measure_drift
from neural.local_model import LocalModel, measure
from neural.prediction import predict
from nqm import SGD, Phase, Program, solve


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl((2.0, 0.7, 0.2), away=0.5)


@pytest.fixture(scope="module")
def measured(bowl: Bowl) -> tuple[LocalModel, list[View]]:
    local = measure(bowl.landscape, None)
    return local, [View(measure_drift(bowl.landscape, local, 0.3, 4, 30, samples=2))]


def test_one_step_has_its_best_rate_in_closed_form(
    bowl: Bowl, measured: tuple[LocalModel, list[View]]
) -> None:
    """|g|^2 / (g' H g + tr(H C) / (B K)) (McCandlish et al. 2018, eq. 2.6)."""
    g, h = bowl.landscape.gradient().numpy(), bowl.hessian
    sizes = (1, 3, 10)
    noise = np.trace(h @ bowl.noise) / 4.0
    expected = [g @ g / (g @ h @ g + noise / k) for k in sizes]
    told: list[int] = []
    found = best_rate(*measured, Training(0.05, 4, 1), sizes, count=1, progress=told.append)
    assert found == pytest.approx(expected, rel=2e-3)
    assert sum(told) > POINTS
    assert expected[2] > 2.0 * expected[0]


def test_of_many_steps_it_is_that_of_nqm(measured: tuple[LocalModel, list[View]]) -> None:
    local, _ = measured
    problem = local.problem()
    found = best_rate(*measured, Training(0.05, 4, 12), (1, 8), count=1)
    for k, rate in zip((1, 8), found, strict=True):
        averaged = problem.replace(noise_variance=problem.noise_variance / k)

        def loss(x: float, averaged=averaged) -> float:
            program = Program((Phase(SGD(), float(np.exp(x)), 12, batch_size=4),))
            return float(solve(averaged, program, at=[12]).loss[-1])

        best = minimize_scalar(loss, bounds=np.log([0.01, 0.9]), options={"xatol": 1e-6})
        assert rate == pytest.approx(np.exp(best.x), rel=3e-3)


def test_between_two_views_it_is_what_both_say(measured: tuple[LocalModel, list[View]]) -> None:
    """At the geometric mean of their rates as much of one as of the other; beyond, the nearest."""
    local, (view,) = measured
    drift = view.drift
    force = np.array([0.3, -0.2, 0.1])
    pushed = [
        View(replace(drift, lr=lr, top=(size * force, size * force)))
        for lr, size in ((0.2, 1.0), (0.8, 2.0))
    ]
    training = Training(0.4, 4, 12)
    low, high = (predict(local, one.drift, training, [12]) for one in pushed)
    mixed = predicted(local, pushed, training, [12])
    for name in ("descent", "cross", "floor", "excess"):
        middle = 0.5 * (getattr(low, name) + getattr(high, name))
        assert getattr(mixed, name) == pytest.approx(middle, rel=1e-12)
    assert low.floor != pytest.approx(high.floor, rel=0.01)
    for lr, one in ((0.1, pushed[0]), (0.2, pushed[0]), (0.8, pushed[1]), (0.9, pushed[1])):
        training = Training(lr, 4, 12)
        assert predicted(local, pushed[::-1], training, [12]) == predict(
            local, one.drift, training, [12]
        )


def test_at_a_minimum_the_lowest_is_best(bowl: Bowl) -> None:
    still = Bowl((2.0, 0.7, 0.2)).landscape
    local = measure(still, None)
    drift = measure_drift(still, local, 0.3, 4, 30, samples=2)
    assert best_rate(local, [View(drift)], Training(0.05, 4, 30), (1, 4)) == [None, None]


def test_a_parabola_through_three_losses() -> None:
    lr = np.array([0.4, 0.05, 0.1, 0.2, 0.8])
    table = pd.DataFrame({"lr": lr, "measured": 3.0 * np.log(lr / 0.17) ** 2 - 5.0})
    assert measured_best(table) == pytest.approx(0.17, rel=1e-9)
    # What is not next to the lowest does not matter, if it is higher.
    far = table.assign(measured=table["measured"].where(lr != 0.8, np.inf))
    assert measured_best(far) == pytest.approx(0.17, rel=1e-9)
    assert measured_best(table[lr > 0.15]) is None
    assert measured_best(table[lr < 0.15]) is None
    assert measured_best(table.assign(measured=np.nan)) is None
    near = table.assign(measured=table["measured"].where(lr != 0.1, np.inf))
    assert measured_best(near) is None


def test_a_table_of_both(measured: tuple[LocalModel, list[View]]) -> None:
    given = {"sampling": "with replacement", "steps": 12, "batch_size": 4}
    # Losses of K = 1 fall and rise again; those of K = 2 fall.
    table = pd.concat(
        [
            cells(0.05, (1.0, 1.0), **given),
            cells(0.1, (1.0, 1.0), **given),
            cells(0.2, (4.0, 1.0), **given),
            cells(0.1, (1.0, 1.0), **given | {"batch_size": 8}),
            cells(0.1, (0.1, 0.1), **given | {"weights": "swa"}),
        ]
    )
    found = best_rates(table, *measured, count=1)
    assert list(found["members"]) == [1, 2]
    assert set(found["batch_size"]) == {4}  # of the other only one rate was tried
    training = Training(0.05, 4, 12)
    assert list(found["predicted"]) == best_rate(*measured, training, (1, 2), count=1)
    assert 0.05 < found["measured"][0] < 0.2
    assert np.isnan(found["measured"][1])
    two = table[table["lr"] < 0.2]
    assert best_rates(two, *measured, count=1).empty
    low = best_rate(*measured, replace(training, lr=1.0), (1,), count=1)
    assert low[0] == pytest.approx(found["predicted"][0], rel=3e-3), "the range does not matter"

"""The best learning rate, where it is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from neural.bridge.best_lr import POINTS, best_lr, best_lrs, measured_best, predict_between
from neural.bridge.config import Training
from neural.bridge.gaussian import WeightGaussian, measure_gaussian
from neural.bridge.prediction import predict_loss
from neural.curvature.local_quadratic import measure_local
from nqm import SGD, Phase, Program, solve
from tests.neural.bridge.test_verdict import cells
from tests.tiny_risks import Bowl


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl((2.0, 0.7, 0.2), away=0.5)


@pytest.fixture(scope="module")
def gaussian(bowl: Bowl) -> WeightGaussian:
    local = measure_local(bowl.risk, None)
    return measure_gaussian(bowl.risk, local, Training(0.3, 4, 30), displacements=2)


def test_one_step_has_its_best_rate_in_closed_form(bowl: Bowl, gaussian: WeightGaussian) -> None:
    """|g|^2 / (g' H g + tr(H C) / (B K)) (McCandlish et al. 2018, eq. 2.6)."""
    g, h = bowl.risk.gradient().numpy(), bowl.hessian
    sizes = (1, 3, 10)
    noise = np.trace(h @ bowl.noise) / 4.0
    expected = [g @ g / (g @ h @ g + noise / k) for k in sizes]
    told: list[int] = []
    found = best_lr([gaussian], Training(0.05, 4, 1), sizes, records=1, progress=told.append)
    assert found == pytest.approx(expected, rel=2e-3)
    assert sum(told) > POINTS
    assert expected[2] > 2.0 * expected[0]


def test_of_many_steps_it_is_that_of_nqm(gaussian: WeightGaussian) -> None:
    problem = gaussian.checkpoint.problem()
    found = best_lr([gaussian], Training(0.05, 4, 12), (1, 8), records=1)
    for k, rate in zip((1, 8), found, strict=True):
        averaged = problem.replace(noise_variance=problem.noise_variance / k)

        def loss(x: float, averaged=averaged) -> float:
            program = Program((Phase(SGD(), float(np.exp(x)), 12, batch_size=4),))
            return float(solve(averaged, program, at=[12]).loss[-1])

        best = minimize_scalar(loss, bounds=np.log([0.01, 0.9]), options={"xatol": 1e-6})
        assert rate == pytest.approx(np.exp(best.x), rel=3e-3)


def test_between_two_trainings_it_is_what_both_say(gaussian: WeightGaussian) -> None:
    """At the geometric mean of their rates as much of one as of the other; beyond, the nearest."""
    force, pushed = np.array([0.3, -0.2, 0.1]), []
    for lr, size in ((0.2, 1.0), (0.8, 2.0)):
        own = replace(gaussian.training, lr=lr)
        drift = replace(gaussian.drift, training=own, force_top=(size * force, size * force))
        pushed.append(replace(gaussian, training=own, drift=drift))
    training = Training(0.4, 4, 12)
    low, high = (predict_loss(one.scaled_to(training), [12]) for one in pushed)
    mixed = predict_between(pushed, training, [12])
    for name in ("descent", "cross", "floor", "excess"):
        middle = 0.5 * (getattr(low, name) + getattr(high, name))
        assert getattr(mixed, name) == pytest.approx(middle, rel=1e-12)
    assert low.floor != pytest.approx(high.floor, rel=0.01)
    for lr, one in ((0.1, pushed[0]), (0.2, pushed[0]), (0.8, pushed[1]), (0.9, pushed[1])):
        training = Training(lr, 4, 12)
        expected = predict_loss(one.scaled_to(training), [12])
        assert predict_between(pushed[::-1], training, [12]) == expected


def test_at_a_minimum_the_lowest_is_best() -> None:
    still, training = Bowl((2.0, 0.7, 0.2)).risk, Training(0.3, 4, 30)
    gaussian = measure_gaussian(still, measure_local(still, None), training, displacements=2)
    assert best_lr([gaussian], replace(training, lr=0.05), (1, 4)) == [None, None]


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


def test_a_table_of_both(gaussian: WeightGaussian) -> None:
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
    found = best_lrs(table, [gaussian], records=1)
    assert list(found["members"]) == [1, 2]
    assert set(found["batch_size"]) == {4}  # of the other only one rate was tried
    training = Training(0.05, 4, 12)
    assert list(found["predicted"]) == best_lr([gaussian], training, (1, 2), records=1)
    assert 0.05 < found["measured"][0] < 0.2
    assert np.isnan(found["measured"][1])
    two = table[table["lr"] < 0.2]
    assert best_lrs(two, [gaussian], records=1).empty
    low = best_lr([gaussian], replace(training, lr=1.0), (1,), records=1)
    assert low[0] == pytest.approx(found["predicted"][0], rel=3e-3), "the range does not matter"

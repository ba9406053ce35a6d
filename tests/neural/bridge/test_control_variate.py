"""The control variate: nothing on average, and most of the scatter of what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neural.bridge.comparison import measure_training
from neural.bridge.config import Plan, Training
from neural.bridge.control_variate import ControlVariate, measure_control_variate
from neural.bridge.iterate_averages import ExponentialMean, TailMean
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import measure_local
from tests.tiny_risks import Bowl, tanh_risk
from tests.tolerances import within_error

TRAINING = Training(0.2, 8, 30)


def control_of(training: Training) -> ControlVariate:
    risk = tanh_risk()
    found = measure_control_variate(
        risk, measure_local(risk, 8, noise_samples=2, lanczos_steps=4), training
    )
    assert found is not None
    return found


@pytest.mark.parametrize("training", [TRAINING, replace(TRAINING, lr=0.05, momentum=0.8)], ids=str)
@pytest.mark.parametrize("members", [1, 3])
def test_it_is_nothing_on_average(training: Training, members: int) -> None:
    """Of the slope's term and of the square's, each by itself."""
    control = control_of(training)
    when = [1, 11, 30, TailMean(30), ExponentialMean(30, 0.9)]
    z = control.responses([(0, run) for run in range(1500)], when)
    flat = replace(control, slope=0.0 * control.slope)
    both, square = (one.of(z, when, members) for one in (control, flat))
    for found in (square, both - square):
        assert found.shape == (1500 // members, len(when))
        within_error(found.mean(0), np.zeros(len(when)), found.std(0) / np.sqrt(len(found)))


def test_with_it_taken_off_the_losses_of_a_network_scatter_less() -> None:
    risk, training = tanh_risk(), replace(TRAINING, lr=0.05)
    control = measure_control_variate(
        risk, measure_local(risk, 30, noise_samples=1, lanczos_steps=1), training
    )
    table = measure_training(risk, training, Plan((1, 4), 256, 2), control=control).table
    assert (table["error"] < 0.5 * table["plain_error"]).all()
    apart = table["plain_error"] + table["error"]
    within_error(table["measured"], table["plain"], apart)
    few = Plan((1, 4), 32, 2)
    table = measure_training(risk, training, few, control=control).table
    alone = measure_training(risk, training, few).table
    for name, same in (("measured", "plain"), ("error", "plain_error")):
        np.testing.assert_array_equal(alone[name], table[same])


def test_it_is_left_out_where_it_would_add_scatter() -> None:
    """Slopes of ten times their size send the quadratic's runs to where no network is."""
    risk = tanh_risk()
    control = control_of(TRAINING)
    wild = replace(control, slopes=10.0 * control.slopes)
    plan = Plan((1, 4), 16, 2)
    table = measure_training(risk, TRAINING, plan, control=wild).table
    np.testing.assert_array_equal(table["measured"], table["plain"])
    np.testing.assert_array_equal(table["error"], table["plain_error"])
    calm = measure_training(risk, TRAINING, plan, control=control).table
    assert (calm["error"] <= calm["plain_error"]).any()


def test_what_is_left_of_the_slope_is_looked_at_too() -> None:
    risk = Bowl((2.0, 0.7, 0.2), away=0.5).risk
    # One eigenpair; of two directions more Lanczos finds all that there is.
    control = measure_control_variate(
        risk, measure_local(risk, 1, noise_samples=1, lanczos_steps=2), TRAINING
    )
    table = measure_training(risk, TRAINING, Plan((1, 4), 16, 2), control=control).table
    assert (table["error"] < 1e-9 * table["plain_error"]).all()


def test_where_nothing_is_known_of_it(tmp_path: Path) -> None:
    risk = Bowl((2.0, 0.7, 0.2)).risk
    local = measure_local(risk, None)
    assert measure_control_variate(risk, local, replace(TRAINING, lr=1.01)) is None
    hill = replace(local, pairs=replace(local.pairs, values=-local.pairs.values))
    assert measure_control_variate(risk, hill, TRAINING) is None
    cache = Cache(tmp_path)
    for _ in range(2):
        assert measure_control_variate(risk, local, TRAINING, cache) is not None
        assert len(list(tmp_path.rglob("example_slopes-*.npz"))) == 1

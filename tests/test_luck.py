"""The luck of the draw: nothing on average, and most of the scatter of what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_landscapes import Bowl, tanh_landscape
from tolerances import within_error

from neural.bridge import Plan, measure_training
from neural.chains import Training
from neural.local_model import measure
from neural.luck import Luck, measure_luck
from neural.time_averages import ExponentialMean, TailMean

TRAINING = Training(0.2, 8, 30)


def luck_of(training: Training) -> Luck:
    landscape = tanh_landscape()
    found = measure_luck(landscape, measure(landscape, 8, draws=2, products=4), training)
    assert found is not None
    return found


@pytest.mark.parametrize("training", [TRAINING, replace(TRAINING, lr=0.05, momentum=0.8)], ids=str)
@pytest.mark.parametrize("members", [1, 3])
def test_luck_is_nothing_on_average(training: Training, members: int) -> None:
    """Of the slope's term and of the square's, each by itself."""
    luck = luck_of(training)
    when = [1, 11, 30, TailMean(30), ExponentialMean(30, 0.9)]
    z = luck.responses([(0, chain) for chain in range(1500)], when)
    flat = replace(luck, slope=0.0 * luck.slope)
    both, square = (one.of(z, when, members) for one in (luck, flat))
    for found in (square, both - square):
        assert found.shape == (1500 // members, len(when))
        within_error(found.mean(0), np.zeros(len(when)), found.std(0) / np.sqrt(len(found)))


def test_less_the_luck_a_network_scatters_less() -> None:
    landscape, training = tanh_landscape(), replace(TRAINING, lr=0.05)
    luck = measure_luck(landscape, measure(landscape, 30, draws=1, products=1), training)
    table = measure_training(landscape, training, Plan((1, 4), 256, 2), luck=luck).table
    assert (table["error"] < 0.5 * table["plain_error"]).all()
    apart = table["plain_error"] + table["error"]
    within_error(table["measured"], table["plain"], apart)
    alone = measure_training(landscape, training, Plan((1, 4), 256, 2)).table
    for name, same in (("measured", "plain"), ("error", "plain_error")):
        np.testing.assert_array_equal(alone[name], table[same])


def test_what_is_left_of_the_slope_is_looked_at_too() -> None:
    landscape = Bowl((2.0, 0.7, 0.2), away=0.5).landscape
    # One eigenpair; of two directions more Lanczos finds all that there is.
    luck = measure_luck(landscape, measure(landscape, 1, draws=1, products=2), TRAINING)
    table = measure_training(landscape, TRAINING, Plan((1, 4), 16, 2), luck=luck).table
    assert (table["error"] < 1e-9 * table["plain_error"]).all()


def test_where_nothing_is_known_of_it(tmp_path: Path) -> None:
    landscape = Bowl((2.0, 0.7, 0.2)).landscape
    local = measure(landscape, None)
    assert measure_luck(landscape, local, replace(TRAINING, sampling="shuffled")) is None
    assert measure_luck(landscape, local, replace(TRAINING, lr=1.01)) is None
    hill = replace(local, pairs=replace(local.pairs, values=-local.pairs.values))
    assert measure_luck(landscape, hill, TRAINING) is None
    for _ in range(2):
        assert measure_luck(landscape, local, TRAINING, tmp_path) is not None
        assert len(list(tmp_path.rglob("slopes-3-*.npz"))) == 1

"""Losses without noise of all rates, from one path, against a path of each rate's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from neural.bridge.config import ITERATE, Plan, Training
from neural.bridge.iterate_averages import Running
from neural.bridge.noise_free import NoiseFreePaths
from neural.bridge.sgd_chains import noise_free
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import measure_local
from tests.tiny_risks import Bowl

CURVATURE = (2.0, 0.7, 0.02)
PLAN = Plan(members=(1,), runs=1, records=3, decay=0.9)
RATES = [0.06, 0.15, 0.4]


def trainings(rates: Sequence[float] = RATES, momentum: float = 0.0) -> list[Training]:
    return [Training(lr, 4, 40, momentum) for lr in rates]


def own_path(bowl: Bowl, training: Training) -> dict[str, float]:
    averages = Running(PLAN.averages(training), bowl.risk.weights)
    losses = noise_free(bowl.risk, training, training.record_steps(PLAN.records), seen=averages)
    start = bowl.risk.loss()
    found = {name: bowl.risk.loss(mean) - start for name, mean in averages.values.items()}
    return found | {ITERATE: losses.mean() - start}


def worst(bowl: Bowl, paths: NoiseFreePaths) -> float:
    """Largest relative difference of a change of the loss."""
    differences = []
    for training in paths.trainings:
        found = paths.changes(training)
        differences += [abs(found[k] / v - 1.0) for k, v in own_path(bowl, training).items()]
    return max(differences)


def test_on_a_quadratic_one_path_is_exact_for_all_rates() -> None:
    bowl = Bowl(CURVATURE, away=0.5)
    steps: list[int] = []
    local = measure_local(bowl.risk, None)
    paths = NoiseFreePaths(bowl.risk, local, trainings(), PLAN, progress=steps.append)
    assert worst(bowl, paths) < 1e-9
    assert sum(steps) == 40
    assert paths.changes(trainings()[0])["noise_change"] == pytest.approx(0.0, abs=1e-9)


def test_near_a_quadratic_it_is_right_to_the_order_of_the_rate() -> None:
    """Third derivatives change the descent by some per cent, and the difference far less."""
    bowl, quadratic = Bowl(CURVATURE, away=0.5, cubic=0.1), Bowl(CURVATURE, away=0.5)
    local = measure_local(bowl.risk, None)
    paths = NoiseFreePaths(bowl.risk, local, trainings(), PLAN)
    change = [own_path(each, trainings()[0])[ITERATE] for each in (bowl, quadratic)]
    assert abs(change[0] / change[1] - 1.0) > 0.02
    assert worst(bowl, paths) < 2e-3


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_paths_that_go_back_and_forth_serve_their_own_rate_alone(momentum: float) -> None:
    bowl = Bowl(CURVATURE, away=0.5)
    local = measure_local(bowl.risk, None)
    every = trainings([0.06, 0.15, 0.7], momentum)
    paths = NoiseFreePaths(bowl.risk, local, every, PLAN)
    assert paths.together(every[2]) == [0.7]
    assert paths.together(every[0]) == ([0.15, 0.06] if momentum == 0.0 else [0.06])
    assert worst(bowl, paths) < 1e-9


def test_a_path_that_turns_out_to_go_back_and_forth_is_not_shared() -> None:
    """The curvature has grown on the way: told here by a local model of a quarter of it."""
    bowl = Bowl(CURVATURE, away=0.5)
    local = measure_local(bowl.risk, None)
    less = replace(local, pairs=replace(local.pairs, values=local.pairs.values / 4.0))
    steps: list[int] = []
    every = trainings([0.06, 0.9])
    paths = NoiseFreePaths(bowl.risk, less, every, PLAN, progress=steps.append)
    assert paths.together(every[0]) == [0.9, 0.06]
    assert worst(bowl, paths) < 1e-9
    assert sum(steps) == 80


def test_the_paths_are_read_from_the_cache(tmp_path) -> None:
    bowl = Bowl(CURVATURE, away=0.5)
    local = measure_local(bowl.risk, None)
    first, again = (
        [
            NoiseFreePaths(bowl.risk, local, trainings(), PLAN, Cache(tmp_path)).changes(each)
            for each in trainings()
        ]
        for _ in range(2)
    )
    assert first == again
    assert len(list(tmp_path.glob("noise_free_path-*"))) == 1
    assert np.isfinite(list(first[0].values())).all()

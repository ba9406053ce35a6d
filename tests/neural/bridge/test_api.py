"""The bridge in three calls: what they do is what their parts do, and nothing is done twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
from torch import Tensor

from neural.bridge import api
from neural.bridge.api import compare, measure, predict
from neural.bridge.best_lr import best_lrs
from neural.bridge.comparison import Outcome, compare_training
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.gaussian import measure_averages, measure_gaussian
from neural.bridge.measure_smoothing import measure_descent
from neural.bridge.noise_free_path import farthest, measure_path
from neural.bridge.prediction import predict_each
from neural.bridge.smoothing import Smoothing
from neural.bridge.timing import STAGES, cost_table
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import measure_local
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, tanh_risk
from tests.tolerances import agree, within_error

CONFIG = BridgeConfig(
    eigenpairs=6, noise_samples=2, lanczos_steps=4, displacements=4, averaging_displacements=1,
    lr_times_sharpness=(0.1, 0.2, 0.4), batch_sizes=(4, 8), steps=12,
)  # fmt: skip
PLAN = Plan(members=(1, 2), runs=4, records=2)


@dataclass(frozen=True)
class Bridge:
    """What the calls gave, the files they left, and what they reported."""

    folder: Path
    cache: Cache
    found: Outcome
    told: list[tuple[str, float]]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Bridge:
    """One bridge of `CONFIG`, measured and trained; tests that add files take a copy of these."""
    folder = tmp_path_factory.mktemp("bridge")
    risk, cache = tanh_risk(), Cache(folder)
    told: list[tuple[str, float]] = []
    measured = measure(risk, CONFIG, cache=cache, progress=lambda *one: told.append(one))
    found = compare(measured, PLAN, progress=lambda *one: told.append(one))
    return Bridge(folder, cache, found, told)


def test_the_three_calls_are_their_parts() -> None:
    risk = tanh_risk()
    measured = measure(risk, CONFIG, seed=3)
    local = measure_local(risk, 6, noise_samples=2, lanczos_steps=4, seed=3)
    agree(measured.local.points()[1], local.points()[1], 1e-9)
    trainings = CONFIG.trainings(local.largest)
    assert [one.training for one in measured.gaussians] == trainings
    settings = {"displacements": 4, "averaging_displacements": 1, "lanczos_steps": 4, "seed": 3}
    reference = CONFIG.reference(local.largest)
    paths = {training.lr: measure_path(risk, training, Plan()) for training in trainings}
    ends = {"path": paths[reference.lr], "far": paths[farthest(trainings).lr]}
    still = measure_descent(risk, local, reference, seed=3, **ends)
    averages = measure_averages(risk, still, **settings)
    predicted, found = predict(measured, PLAN), compare(measured, PLAN)
    for i, (training, gaussian) in enumerate(zip(trainings, measured.gaussians, strict=True)):
        expected = measure_gaussian(
            risk, local, training, averages, path=paths[training.lr], **settings
        )
        agree(gaussian.mean, expected.mean, 1e-9)
        alone = compare_training(risk, expected, PLAN)
        rows = slice(6 * i, 6 * (i + 1))
        for table in (found.table, predicted.table):
            part = table.iloc[rows]["predicted"]
            np.testing.assert_allclose(part, alone.table["predicted"], rtol=1e-7)
        measured_losses = found.table.iloc[rows]["measured"]
        np.testing.assert_allclose(measured_losses, alone.table["measured"], rtol=1e-7)
        # The course is the prediction at each of its steps.
        at = training.course_steps(PLAN.records)
        losses = [one.change(2) for one in predict_each(expected, at)]
        course = predicted.course
        held = course[(course["lr"] == training.lr) & (course["members"] == 2)]
        held = held[held["batch_size"] == training.batch_size]
        assert held["step"].tolist() == at
        np.testing.assert_allclose(held["predicted"], losses, rtol=1e-7)
    assert predicted.table["measured"].isna().all()
    assert len(found.table) == len(predicted.table) == 4 * 2 * 3
    assert list(found.table.index) == list(range(24)), "rows are numbered through"


def test_a_quadratic_does_what_is_predicted_of_it() -> None:
    risk = Bowl((2.0, 0.7, 0.2), away=0.3).risk
    config = replace(CONFIG, eigenpairs=0)
    table = compare(measure(risk, config), replace(PLAN, runs=64)).table
    agree(table["measured"], table["predicted"], 1e-8)  # less the control variate
    within_error(table["plain"], table["predicted"], table["plain_error"])
    iterate = table[table["weights"] == "iterate"]  # or it would tell little
    assert (iterate["plain_error"] < 0.4 * iterate["predicted_rise"]).all()


def test_defaults_are_those_of_the_command() -> None:
    risk = Bowl((2.0, 0.7, 0.2), away=0.3).risk
    measured = measure(risk, BridgeConfig(eigenpairs=0))
    assert [one.training.lr * 2.0 for one in measured.gaussians] == pytest.approx(
        [0.0625, 0.125, 0.25, 0.5], rel=1e-6
    )
    assert {one.training.steps for one in measured.gaussians} == {1000}
    assert set(predict(measured).table["members"]) == {1, 2, 4, 8, 16}


def refuse(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("computed again")


def test_a_second_call_computes_nothing(bridge: Bridge) -> None:
    cache, found, folder = bridge.cache, bridge.found, bridge.folder
    log, files = dict(cache.log), set(folder.iterdir())
    stages = {stage for stage, _ in log}
    assert {"eigenpairs", "krylov", "averages", "slopes", "force", "training"} <= stages
    assert len(files) == len(log)

    again = tanh_risk()
    for name in ("hessian_product", "hessian", "example_gradients", "weighted_gradient"):
        setattr(again, name, refuse)
    whole, gradients = again.loss_and_gradient, []

    def counted(w: Tensor) -> tuple[float, Tensor]:
        gradients.append(w)
        return whole(w)

    again.loss_and_gradient = counted  # type: ignore[method-assign]
    for other in (cache, Cache(folder)):
        gradients.clear()
        repeated = compare(measure(again, CONFIG, cache=other), PLAN)
        pd.testing.assert_frame_equal(repeated.table, found.table)
        pd.testing.assert_frame_equal(repeated.course, found.course)
        assert other.log == log
        assert len(gradients) <= 1  # that of the checkpoint, which is no stage
    assert set(folder.iterdir()) == files


def test_what_a_stage_takes_is_that_of_when_it_was_computed(bridge: Bridge) -> None:
    """A configuration that finds its results there reports the seconds of the one before it."""
    risk, first, second = tanh_risk(), bridge.cache, Cache(bridge.folder)
    less = replace(CONFIG, lr_times_sharpness=CONFIG.lr_times_sharpness[1:], batch_sizes=(4,))
    # The reference training is the one before the last rate: still the same.
    assert less.reference(1.0) == CONFIG.reference(1.0)
    compare(measure(risk, less, cache=second), PLAN)
    assert second.log.items() < first.log.items()
    before, after = (
        cost_table(risk, 1.0, cache.log).set_index("stage")["seconds"] for cache in (first, second)
    )
    not_asked = {"minimise", "test loss", "density of the spectrum"}
    expected = [one for one in STAGES if one not in not_asked]
    assert list(before.index) == list(after.index) == expected
    for stage in ("curvature and noise", "averages"):
        assert after[stage] == before[stage] > 0.0
    for stage in ("third derivatives", "training"):
        assert 0.0 < after[stage] < before[stage]


def test_another_seed_and_other_settings_are_measured_anew(tmp_path: Path) -> None:
    risk, config = tanh_risk(), replace(CONFIG, lr_times_sharpness=(0.1,))
    config = replace(config, batch_sizes=(4,))

    def stages(config: BridgeConfig, seed: int = 0) -> set[str]:
        cache, before = Cache(tmp_path), set(tmp_path.iterdir())
        measure(risk, config, seed=seed, cache=cache)
        return {path.name.partition("-")[0] for path in set(tmp_path.iterdir()) - before}

    whole = {"eigenpairs", "krylov", "trace", "slopes", "force", "averages", "descent"}
    assert stages(config) == whole | {"noise_free_path"}
    assert stages(config) == set()
    # The path draws nothing, but the rate may differ: the largest curvature is rounded differently.
    assert stages(config, seed=1) - {"noise_free_path"} == whole
    assert stages(replace(config, averaging_displacements=2)) >= {"averages"}
    assert stages(replace(config, displacements=6)) >= {"slopes", "force"}
    assert stages(replace(config, steps=13)) >= {"slopes", "force", "averages"}
    assert stages(replace(config, eigenpairs=5)) >= {"eigenpairs", "slopes", "force", "averages"}


def test_stages_are_reported_with_their_share(bridge: Bridge) -> None:
    told = bridge.told
    stages = list(dict.fromkeys(stage for stage, _ in told))
    trained = [f"train {i} of 4" for i in (1, 2, 3, 4)]
    paths = [stage for stage in stages if stage.endswith(", without noise")]
    assert len(paths) == 3, "one for each rate"
    assert [stage for stage in stages if stage not in paths] == [
        "curvature and noise",
        "averages",
        "third derivatives",
        *trained,
    ]
    for stage in stages:
        shares = [share for name, share in told if name == stage]
        assert shares == sorted(shares)
        assert 0.0 <= shares[0] < shares[-1] <= 0.99
        if stage != "curvature and noise":  # of which it is a guess
            assert shares[-1] == 0.99


def test_the_test_loss_is_that_of_the_last_weights() -> None:
    risk = Bowl((2.0, 0.7, 0.2), away=0.3).risk
    config = replace(CONFIG, eigenpairs=0, lr_times_sharpness=(0.2,), batch_sizes=(4,))
    measured = measure(risk, config)
    found = compare(measured, PLAN, test=risk.loss).table
    last = compare(measured, replace(PLAN, records=1)).table
    iterate = found["weights"] == "iterate"
    expected = last.loc[iterate, "plain"] + risk.loss()
    np.testing.assert_allclose(found.loc[iterate, "test_loss"], expected, rtol=1e-9)


def test_best_rates_are_found_among_the_gaussians() -> None:
    risk = Bowl((2.0, 0.7, 0.2), away=0.3).risk
    measured = measure(risk, replace(CONFIG, eigenpairs=0))
    found = best_lrs(predict(measured, PLAN).table, measured.gaussians, records=PLAN.records)
    assert list(found["members"]) == [1, 2]
    assert found["measured"].isna().all(), "nothing was trained"
    assert (found["predicted"].diff()[1:] > 0.0).all(), "more members stand a higher rate"


def test_what_does_not_fit_is_told_before_anything_is_measured() -> None:
    risk = tanh_risk()
    risk.hessian_product = refuse  # type: ignore[method-assign]
    for size, told in ((7, "divides the 40 examples.*got 7"), (40, "two minibatches or more")):
        config = replace(CONFIG, sampling="shuffled", batch_sizes=(size,))
        with pytest.raises(NQMError, match=told):
            measure(risk, config)


def test_a_test_loss_that_does_not_fit_is_told_in_one_line(bridge: Bridge) -> None:
    risk = tanh_risk()
    measured = measure(risk, CONFIG, cache=Cache(bridge.folder))
    (x, y), _ = risk.batches
    cases: list[tuple[Any, str]] = [
        ("cifar10", r"test must be an EmpiricalRisk, e\.g\. risk\.on\(batches\).*got a str"),
        (risk.on([(x, y + 9)]), r"labels must lie in 0\.\."),
        (risk.on([(x[..., :1, :], y)]), "takes images of 1 x 2 x 2; got 1 x 1 x 2"),
    ]
    for test, told in cases:
        for call in (predict, compare):
            with pytest.raises(NQMError, match=told) as error:
                call(measured, PLAN, test=test)
            assert "\n" not in str(error.value)


def test_averages_are_taken_at_a_rate_that_is_stable_where_descent_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a rate beyond the edge there the scatter has no bound, and all averages would be lost."""
    risk = tanh_risk()
    local = measure_local(risk, None)

    curvature = 4.0 * np.diag(local.pairs.values)

    def grown(*args: Any, **options: Any) -> Smoothing:
        still = measure_descent(*args, **options)
        return replace(still, descent=tuple(replace(x, curvature=curvature) for x in still.descent))

    monkeypatch.setattr(api, "measure_descent", grown)
    options: Any = {"seed": 0, "cache": Cache(), "progress": None}
    for rates, expected in (((0.1, 0.3, 0.6), 0.3), ((0.1, 0.2, 0.6, 0.7), 0.2), ((0.3, 0.1), 0.3)):
        config = replace(CONFIG, lr_times_sharpness=rates)
        still = api.stable_descent(risk, local, lambda training: None, config=config, **options)
        assert still.training.lr == pytest.approx(expected / local.largest, rel=1e-12)
    config = replace(CONFIG, lr_times_sharpness=(0.6, 0.5))
    with pytest.raises(NQMError, match=r"no learning rate is stable .* lower bridge\.lr_times_sh"):
        api.stable_descent(risk, local, lambda training: None, config=config, **options)

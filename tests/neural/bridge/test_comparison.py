"""Prediction beside training, on losses that are exactly what the theory takes them for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from neural.bridge.comparison import (
    COLUMNS,
    COURSE,
    compare_training,
    measure_training,
    predict_training,
    training_work,
)
from neural.bridge.config import Plan, Training
from neural.bridge.gaussian import measure_gaussian
from neural.bridge.noise_free_path import measure_path
from neural.bridge.prediction import Prediction, predict_loss
from neural.bridge.scatter import largest_stable_lr
from neural.bridge.sgd_chains import noise_free
from neural.bridge.verdict import verdict
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import measure_local
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, gaussian_of, quadratic, scatter, slide, tanh_risk
from tests.tolerances import IDENTITY, agree, within_error

CURVATURE = (2.0, 0.7, 0.2)


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl(CURVATURE, away=0.5)


# --- the prediction ------------------------------------------------------------------------------


def test_the_parts_add_up() -> None:
    found = Prediction(descent=-8.0, cross=-0.5, floor=2.0, excess=12.0)
    assert (found.rise(), found.rise(4)) == (13.5, 4.5)
    assert (found.change(), found.change(4)) == (5.5, -3.5)
    assert found.members_at_floor == 6.0
    for floor in (0.0, -1.0):
        assert replace(found, floor=floor).members_at_floor == np.inf


def test_losses_are_recorded_in_the_second_half() -> None:
    assert Training(0.1, 1, 100).record_steps(5) == [60, 70, 80, 90, 100]
    assert Training(0.1, 1, 100).record_steps(1) == [100]
    assert Training(0.1, 1, 3).record_steps(5) == [2, 3]
    assert Training(0.1, 1, 1).record_steps(5) == [1]
    assert Training(0.1, 1, 100).course_steps(2) == [1, 3, 6, 12, 25, 75, 100]
    assert Training(0.1, 1, 3).course_steps(5) == [2, 3]


def test_the_effective_rate_and_the_ratio_of_noise() -> None:
    """Heavy ball takes 1 / (1 - momentum) steps' worth of a gradient; covariance goes as lr / B."""
    slow, fast = Training(0.02, 8, 10, momentum=0.9), Training(0.1, 4, 10)
    assert slow.effective_lr == pytest.approx(0.2, rel=1e-12)
    assert fast.effective_lr == 0.1
    assert fast.noise_ratio(fast) == 1.0
    assert slow.noise_ratio(fast) == pytest.approx(1.0, rel=1e-12)
    assert replace(fast, lr=0.3).noise_ratio(slow) == pytest.approx(3.0, rel=1e-12)


def test_a_prediction_is_the_literal_recursion(bowl: Bowl) -> None:
    training, at = Training(0.3, 4, 30), (10, 30)
    h, g = bowl.hessian, bowl.risk.gradient().numpy()
    found = predict_loss(gaussian_of(bowl, training), at)
    walked = [quadratic(g, h, slide(g, h, 0.3, t)) for t in at]
    assert found.descent == pytest.approx(np.mean(walked), rel=1e-9)
    spread = [0.5 * np.trace(h @ scatter(h, bowl.noise, 0.3, 4, t)) for t in at]
    assert found.excess == pytest.approx(np.mean(spread), rel=1e-9)
    assert abs(found.floor) + abs(found.cross) < 1e-12


@pytest.mark.parametrize(("momentum", "at"), [(0.0, 1.0), (0.5, 1.5)])
def test_the_edge(bowl: Bowl, momentum: float, at: float) -> None:
    """2 (1 + momentum) / h."""
    local = measure_local(bowl.risk, None)
    found = largest_stable_lr(local, Training(0.1, 4, 10, momentum))
    assert found == pytest.approx(at, rel=1e-6)


# --- and what training does ----------------------------------------------------------------------

PLAIN = Training(0.3, 4, 30)


@pytest.mark.parametrize(
    ("training", "plan", "away"),
    [
        (PLAIN, Plan((1, 4), 256), 0.5),
        (replace(PLAIN, lr=0.9), Plan((1, 4), 256), 0.0),
        (Training(0.06, 4, 100, momentum=0.8), Plan((1, 4), 256), 0.0),
        (Training(0.2, 32, 128, sampling="shuffled"), Plan((1, 4), 96, 64), 0.0),
        (Training(0.06, 8, 23, 0.8, sampling="shuffled"), Plan((1, 4), 96, 5), 0.0),
        (replace(PLAIN, steps=15), Plan((2, 3), 40, 3, late_phase="all"), 0.5),
    ],
    ids=["plain", "near the edge", "momentum", "shuffled", "part of an epoch", "members"],
)
def test_training_does_what_is_predicted(training: Training, plan: Plan, away: float) -> None:
    bowl = Bowl(CURVATURE, away=away)
    gaussian = gaussian_of(bowl, training)
    if away:
        gaussian = replace(gaussian, path=measure_path(bowl.risk, training, plan))
    found = compare_training(bowl.risk, gaussian, plan)
    assert list(found.table.columns) == COLUMNS
    table = found.table[found.table["weights"] == "iterate"]
    assert len(found.table) == 6
    assert list(table["members"]) == list(plan.members)
    assert set(table["way"]) == {plan.late_phase or "runs"}
    within_error(table["plain"], table["predicted"], table["plain_error"])
    saved = table[table["members"] > 1]
    if plan.late_phase:
        assert saved["gain"].isna().all(), "members are no runs by themselves"
    course = found.course
    assert list(course.columns) == COURSE
    # Less the control variate every run of a quadratic does what is expected.
    agree(table["measured"], table["predicted"], 1e-9)
    agree(course["measured"], course["predicted"], 1e-9)
    assert (table["error"] < 1e-9 * table["plain_error"]).all()
    if not plan.late_phase:
        agree(saved["gain"], saved["predicted_gain"], 1e-9)
    assert sorted(set(course["step"])) == training.course_steps(plan.records)
    late = course[course["step"] > training.steps / 2].groupby("members")["measured"].mean()
    np.testing.assert_allclose(late, table["measured"], rtol=1e-9)
    calm = noise_free(bowl.risk, training, training.record_steps(plan.records)).mean()
    start = bowl.risk.loss()
    np.testing.assert_allclose(table["noise_free"], calm - start, rtol=1e-9, atol=1e-12)
    expected = 0.0 if away else np.nan
    np.testing.assert_allclose(table["noise_change_on_path"], expected, atol=1e-9)
    # Else the experiment would tell little.
    assert (table["plain_error"] < 0.35 * table["predicted_rise"]).all()


def test_noise_changes_on_the_way() -> None:
    risk, training = tanh_risk(), Training(0.5, 8, 12)
    local = measure_local(risk, None)
    plan = Plan((1, 2), 2, 1)
    path = measure_path(risk, training, plan)
    gaussian = measure_gaussian(risk, local, training, path=path, displacements=2)
    found = compare_training(risk, gaussian, plan).table
    weights, traces = risk.weights.clone(), []
    for _ in range(training.steps + 1):
        gradients = torch.cat(list(risk.at(weights).example_gradients())).numpy()
        traces.append(np.trace(np.cov(gradients, rowvar=False)))
        weights -= training.lr * risk.gradient(weights)
    change = traces[-1] / traces[0] - 1.0
    assert abs(change) > 0.01
    np.testing.assert_allclose(found["noise_change_on_path"], change, rtol=1e-9)


def test_on_a_quadratic_it_does_not_matter_which_weights_are_members(bowl: Bowl) -> None:
    training = replace(PLAIN, steps=6)
    found = [
        measure_training(bowl.risk, training, Plan((2,), 4, late_phase=select)).table
        for select in ("all", "name:first")
    ]
    agree(found[0]["measured"], found[1]["measured"], 1e-9)


def test_shuffled_epochs_are_not_draws_with_replacement(bowl: Bowl) -> None:
    shuffled = Training(0.2, 32, 128, sampling="shuffled")
    gaussian = gaussian_of(bowl, shuffled)
    drawn = gaussian.scaled_to(replace(shuffled, sampling="with replacement"))
    found = [predict_loss(one, [128]).excess for one in (gaussian, drawn)]
    assert found[0] < 0.75 * found[1]


def test_a_rate_beyond_the_edge_is_told(bowl: Bowl) -> None:
    wild = Training(1.01, 4, 6)
    gaussian = gaussian_of(bowl, wild)
    assert not gaussian.stable
    assert predict_loss(gaussian, [6]).excess == np.inf
    table = compare_training(bowl.risk, gaussian, Plan((1, 2), 4)).table
    assert np.isposinf(table["excess"]).all()
    assert np.isfinite(table["measured"]).all()
    lines = verdict(table, gaussian.checkpoint)
    assert not any("cells within" in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_runs_that_diverged_are_tabulated_without_a_warning(bowl: Bowl) -> None:
    table = measure_training(
        bowl.risk, Training(1.5, 4, 1200), Plan((1, 2), 4), test=lambda w: np.inf
    ).table
    assert np.isposinf(table[["measured", "test_loss"]]).all(axis=None)
    assert table[["error", "gain", "test_gain"]].isna().all(axis=None)


@pytest.mark.parametrize("late_phase", [None, "all"])
@pytest.mark.parametrize("tested", [True, False])
def test_progress_counts_gradients_and_losses(
    bowl: Bowl, late_phase: str | None, tested: bool
) -> None:
    told: list[int] = []
    training = replace(PLAIN, steps=8)
    plan = Plan((2, 4), 8, records=2, late_phase=late_phase)
    test = bowl.risk.on(bowl.risk.batches) if tested else None
    measure_training(bowl.risk, training, plan, test=test, progress=told.append)
    assert sum(told) == training_work(training, plan, bowl.risk, test)
    least = 2 * training.batch_size * 8 * 8
    assert sum(told) > least + 8 * bowl.risk.examples


def test_a_second_call_does_not_train(bowl: Bowl, tmp_path: Path) -> None:
    gaussian = gaussian_of(bowl, PLAIN)
    told: list[int] = []

    def run(training: Training, plan: Plan, scale: float | None = None) -> pd.DataFrame:
        told.clear()
        test = None if scale is None else (lambda w: scale * float(w.sum()))
        found = compare_training(
            bowl.risk, gaussian.scaled_to(training), plan,
            test=test, cache=Cache(tmp_path), progress=told.append,
        )  # fmt: skip
        return found.table

    plan = Plan((1, 2), 4)
    short = replace(PLAIN, steps=5)
    first = run(short, plan)
    assert sum(told) == training_work(short, plan, bowl.risk)
    again = run(short, plan)
    assert not told
    pd.testing.assert_frame_equal(first, again)
    for other, way in (
        (replace(short, lr=0.2), plan),
        (replace(short, momentum=0.1), plan),
        (short, replace(plan, seed=1)),
        (short, replace(plan, decay=0.5)),
        (short, Plan((2,), 4, late_phase="all")),
    ):
        run(other, way)
        assert told
        run(other, way)
        assert not told
    # Losses on test data are not among what was kept.
    assert first["test_loss"].isna().all()
    tested = run(short, plan, 1.0)["test_loss"]
    assert tested.notna().all()
    # Nor are those of another test loss.
    np.testing.assert_allclose(run(short, plan, 3.0)["test_loss"], 3.0 * tested, rtol=1e-12)


def test_a_prediction_alone_has_the_same_form(bowl: Bowl) -> None:
    gaussian, plan = gaussian_of(bowl, PLAIN), Plan((1, 2, 4), 4)
    alone = predict_training(gaussian, plan)
    both = compare_training(bowl.risk, gaussian, plan)
    names = ["members", "weights", "predicted", "predicted_rise", "floor", "excess"]
    names += ["effective_runs"]
    pd.testing.assert_frame_equal(alone.table[names], both.table[names])
    assert alone.table["measured"].isna().all()
    assert list(alone.course.columns) == COURSE
    # Beforehand for every K; really looked at in the first half for the ends only.
    early = both.course[both.course["step"] <= 15]
    assert set(early["members"]) == {1, 4}
    wanted = ["members", "step"]
    joined = both.course.merge(alone.course, on=wanted, validate="1:1")
    assert len(joined) == len(both.course)
    np.testing.assert_array_equal(joined["predicted_x"], joined["predicted_y"])


def test_members_share_their_test_losses(bowl: Bowl) -> None:
    table = measure_training(
        bowl.risk, replace(PLAIN, steps=3), Plan((1, 4), 4), test=lambda w: float(w.sum())
    ).table
    # A linear loss: the mean over groups is the same for every K.
    for weights, rows in table.groupby("weights"):
        one, other = rows["test_loss"]
        assert one == pytest.approx(other, rel=IDENTITY), weights
    assert table["test_loss"].nunique() > 2  # the averages are others
    assert np.isnan(table["error"][1])  # of one group


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": (1, 16), "runs": 8}, "at most the 8 runs; got 16"),
        ({"members": (1, 4), "late_phase": "all"}, "at least 2 with late_phase; got 1"),
        ({"members": (0,)}, "members must be an integer >= 1; got 0"),
        ({"members": ()}, r"members must have at least one entry and no duplicates; got \(\)"),
        ({"members": (2, 2)}, r"members must have at least one entry .* got \(2, 2\)"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\); got 1.0"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(NQMError, match=message) as told:
        Plan(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)

"""Summaries over seeds against SciPy's intervals and tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from neural.training.summary import per_seed, summarise
from tests.tolerances import IDENTITY


def rows(arm: str, weights: str, values: dict[int, Any], **extra: Any) -> list[dict[str, Any]]:
    """Values by seed; a list holds those of members."""
    made = []
    for seed, value in values.items():
        members = list(enumerate(value)) if isinstance(value, list) else [(-1, value)]
        made += [
            {
                "arm": arm, "seed": seed, "status": "finished", "weights": weights, "member": k,
                "data": "test", "metric": "accuracy", "value": one,
            }
            | extra
            for k, one in members
        ]  # fmt: skip
    return made


BASE = {0: 0.91, 1: 0.93, 2: 0.90, 4: 0.94}
SWA = {0: 0.92, 1: 0.95, 2: 0.91, 4: 0.945}
# Seed 2 diverged, and the seeds are in another order.
LATE = {4: 0.97, 0: 0.925, 1: 0.93}
MEMBERS = {4: [0.9, 0.92], 0: [0.8, 0.9], 1: [0.95, 0.95]}


@pytest.fixture
def results() -> pd.DataFrame:
    blank = {"metric": "", "data": "", "status": "diverged"}
    return pd.DataFrame(
        [
            *rows("base", "iterate", BASE),
            *rows("base", "iterate", {0: 7.0, 1: 8.0}, metric="nll"),
            *rows("base", "iterate", {0: 0.5, 1: 0.6}, data="svhn"),
            *rows("base", "swa", SWA),
            *rows("late", "averaged", LATE),
            *rows("late", "member", MEMBERS),
            *rows("late", "", {2: np.nan}, **blank),
            *rows("late", "deep_ensemble_averaged", {-1: 0.99}),
        ]
    )


def line(table: pd.DataFrame, arm: str, weights: str) -> pd.Series[Any]:
    chosen = table[(table["arm"] == arm) & (table["weights"] == weights)]
    assert len(chosen) == 1
    return chosen.iloc[0]


def interval(values: list[float]) -> tuple[float, float]:
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return max(low, 0.0), min(high, 1.0)  # no accuracy lies beyond


@pytest.mark.parametrize(
    ("arm", "weights", "values"),
    [
        ("base", "iterate", [0.91, 0.93, 0.90, 0.94]),
        ("base", "swa", [0.92, 0.95, 0.91, 0.945]),
        ("late", "averaged", [0.97, 0.925, 0.93]),
        ("late", "member", [0.91, 0.85, 0.95]),
    ],
)
def test_mean_and_interval_are_scipys(
    results: pd.DataFrame, arm: str, weights: str, values: list[float]
) -> None:
    found = line(summarise(results), arm, weights)
    assert found["n"] == len(values)
    np.testing.assert_allclose(found["mean"], np.mean(values), rtol=IDENTITY)
    np.testing.assert_allclose(found["sd"], np.std(values, ddof=1), rtol=IDENTITY)
    np.testing.assert_allclose([found["low"], found["high"]], interval(values), rtol=IDENTITY)


@pytest.mark.parametrize(
    ("arm", "weights", "values"),
    [("base", "swa", SWA), ("late", "averaged", LATE), ("late", "member", MEMBERS)],
)
def test_difference_is_scipys_paired_test(
    results: pd.DataFrame, arm: str, weights: str, values: dict[int, Any]
) -> None:
    found = line(summarise(results), arm, weights)
    own = [float(np.mean(value)) for value in values.values()]
    test = stats.ttest_rel(own, [BASE[seed] for seed in values])
    bounds = test.confidence_interval(0.95)
    expected = np.mean(own) - np.mean([BASE[seed] for seed in values])
    np.testing.assert_allclose(found["difference"], expected, rtol=1e-10)
    np.testing.assert_allclose(found["difference_low"], bounds.low, rtol=1e-9)
    np.testing.assert_allclose(found["difference_high"], bounds.high, rtol=1e-9)


def test_what_is_compared_has_no_difference(results: pd.DataFrame) -> None:
    table = summarise(results)
    assert np.isnan(line(table, "base", "iterate")["difference"])
    # One number has neither interval nor pair.
    ensemble = line(table, "late", "deep_ensemble_averaged")
    assert ensemble["n"] == 1
    assert ensemble["mean"] == 0.99
    assert np.isnan(ensemble[["sd", "low", "high", "difference"]].astype(float)).all()
    assert len(table) == 5  # the diverged run is no model


def test_metric_and_data_are_chosen(results: pd.DataFrame) -> None:
    assert line(summarise(results, "nll"), "base", "iterate")["mean"] == 7.5
    assert len(summarise(results, "nll")) == 1
    other = summarise(results, "accuracy", "svhn")
    assert line(other, "base", "iterate")["mean"] == pytest.approx(0.55)
    assert summarise(results, "brier").empty


def test_late_phase_may_come_first() -> None:
    table = pd.DataFrame(
        [
            *rows("late", "averaged", {0: 0.5, 1: 0.7}),
            *rows("late", "averaged_outputs", {0: 0.6, 1: 0.9}),
            *rows("base", "iterate", {0: 0.4, 1: 0.4}),
        ]
    )
    made = summarise(table)
    assert line(made, "base", "iterate")["difference"] == pytest.approx(-0.2)
    assert line(made, "late", "averaged_outputs")["difference"] == pytest.approx(0.15)


def test_first_arm_that_diverged_leaves_nothing_to_compare_with(results: pd.DataFrame) -> None:
    lost = results[results["arm"] == "late"].copy()
    blank = {"metric": "", "data": "", "status": "diverged"}
    made = summarise(pd.concat([pd.DataFrame(rows("base", "", {0: np.nan}, **blank)), lost]))
    assert set(made["arm"]) == {"late"}
    assert "difference" not in made


def test_each_seed_has_the_interval_beside_it(results: pd.DataFrame) -> None:
    table = per_seed(results)
    members = table[(table["arm"] == "late") & (table["weights"] == "member")]
    assert dict(zip(members["seed"], members["value"], strict=True)) == pytest.approx(
        {4: 0.91, 0: 0.85, 1: 0.95}
    )
    low, high = interval([0.91, 0.85, 0.95])
    np.testing.assert_allclose(members["low"], low, rtol=IDENTITY)
    np.testing.assert_allclose(members["high"], high, rtol=IDENTITY)
    assert per_seed(results, "brier").empty

"""Panels of combined models show the numbers of their table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures import combine
from neural.combine.plots import draw
from tests.tolerances import IDENTITY, JUMP, agree


@pytest.fixture
def table() -> pd.DataFrame:
    def row(
        rule: str, space: str, nll: float, passes: int = 1, **more: object
    ) -> dict[str, object]:
        return {
            "rule": rule, "space": space, "repair": "none", "member": "", "data": "test",
            "nll": nll, "nll_tuned": 0.9 * nll, "mean_member_nll": 0.5, "passes": passes,
            "accuracy": 1.0 - nll, "predicted": 1.1 * nll, "predicted_from": "surrogate", **more,
        }  # fmt: skip

    rows = [row("member", "weights", 0.4 + 0.1 * k, member=str(k)) for k in range(3)]
    rows += [row("mean_member", "", 0.5)]
    rows += [row("uniform", "weights", 0.3), row("uniform", "weights", 0.35, repair="statistics")]
    rows += [row("ensemble", "probabilities", 0.2, 3), row("ensemble", "logits", 0.25, 3)]
    rows += [{**one, "data": "fog 3", "accuracy": one["accuracy"] - 0.1} for one in rows]  # type: ignore[operator]
    return pd.DataFrame(rows)


def test_panels(table: pd.DataFrame) -> None:
    test = table[table["data"] == "test"]
    lines = {line.get_gid(): line for line in combine.decomposition(test).lines}
    agree(np.sort(lines["weights"].get_xdata()), [0.3, 0.35], IDENTITY)
    agree(lines["probabilities"].get_xdata(), [0.2], IDENTITY)
    agree(lines["mean"].get_xdata(), [0.5] * 4, IDENTITY)
    names = [t.get_text() for t in combine.decomposition(test).get_yticklabels()]
    assert names == ["uniform, none", "uniform, statistics", "ensemble", "ensemble (logits)"]
    lines = {line.get_gid(): line for line in combine.predicted(test).lines}
    for gid, losses in (
        ("weights", [0.3, 0.35]),
        ("probabilities", [0.2]),
        ("member", [0.4, 0.5, 0.6]),
    ):
        agree(lines[gid].get_xdata(), losses, IDENTITY)
        agree(lines[gid].get_ydata(), 1.1 * np.array(losses), IDENTITY)
    lines = {line.get_gid(): line for line in combine.passes(test).lines}
    agree(lines["logits"].get_xdata(), [3], IDENTITY)
    agree(lines["logits tuned"].get_ydata(), [0.9 * 0.25], IDENTITY)
    lines = {line.get_gid(): line for line in combine.soup_scatter(table).lines}
    agree(lines["member"].get_ydata(), np.array([0.5, 0.4, 0.3]), IDENTITY)
    agree(lines["ensemble"].get_xdata(), [0.8], IDENTITY)


def test_a_prediction_that_is_not_believed_says_so(table: pd.DataFrame) -> None:
    table["predicted_from"] = "outside the quadratic range"
    assert "outside" in combine.predicted(table).get_title()


def test_page(table: pd.DataFrame, tmp_path: Path) -> None:
    files = draw(table, tmp_path, "three nets")
    assert [one.name for one in files] == ["compare.png", "compare.pdf"]
    assert all(one.stat().st_size > 5000 for one in files)


def test_ingredients_are_lines_over_the_best_member():
    rows = [
        (rule, space, k, 0.1 * k + shift, 1.0 - 0.1 * k - shift)
        for rule, space, shift in (
            ("member", "weights", 0.0), ("uniform", "weights", 0.2),
            ("ensemble", "logits", 0.3),
        )
        for k in (2, 1, 3)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["rule", "space", "members", "accuracy", "nll"])
    for metric, best in (("accuracy", 0.3), ("nll", 0.7)):
        lines = {line.get_gid(): line for line in combine.ingredients(table, metric=metric).lines}
        assert set(lines) == {"member", "best member", "uniform soup", "ensemble (logits)"}
        assert lines["best member"].get_ydata()[0] == pytest.approx(best)
        assert list(lines["uniform soup"].get_xdata()) == [1, 2, 3]
        shown = table[(table["rule"] == "uniform")].sort_values("members")[metric]
        assert list(lines["uniform soup"].get_ydata()) == list(shown)


def test_cycles_are_lines_that_break_and_dots() -> None:
    rows = [
        ("a", 0, "test", 0, 10, 0.5), ("a", 1, "test", 0, 10, 0.7), ("a", 0, "test", 0, 20, 0.3),
        ("a", 1, "test", 0, 20, 0.3), ("a", 0, "test", 1, 10, 0.4), ("a", 0, "test", 1, 30, np.nan),
        ("a", 0, "test", 1, 40, 0.2), ("a", 0, "snapshot", 0, 20, 0.2),
        ("a", 1, "snapshot", 0, 20, 0.4), ("b", 0, "schedule", 0, 5, 9.0),
        ("b", 0, "test", 0, 5, 0.1),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["arm", "seed", "row", "cycle", "step", "error"])
    drawn: dict[str, list[list[list[float]]]] = {}
    for line in combine.cycle(table).lines:
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        drawn.setdefault(str(line.get_gid()), []).append([x.tolist(), y.tolist()])
    agree(drawn["a/mean"][0], [[10, 20], [0.6, 0.3]], IDENTITY)
    agree(drawn["a/mean"][1], [[10, 40], [0.4, 0.2]], IDENTITY)
    agree(drawn["a/snapshots"][0], [[20], [0.3]], IDENTITY)
    assert len(drawn["a/seed"]) == 3  # two in the first cycle, one in the second
    agree(drawn["b/mean"][0], [[5], [0.1]], IDENTITY)
    assert "b/seed" not in drawn


def test_shift_over_seeds_has_means_and_intervals() -> None:
    rows = [
        (rule, "weights", member, "none", seed, data, value + 0.01 * seed - (data != "test") * 0.2)
        for seed in (0, 1, 2)
        for rule, member, value in (
            ("member", "a", 0.7), ("member", "b", 0.6), ("uniform", "", 0.8),
        )
        for data in ("test", "fog 3", "contrast 3")
    ]  # fmt: skip
    names = ["rule", "space", "member", "repair", "seed", "data", "accuracy"]
    lines = combine.soup_scatter(pd.DataFrame(rows, columns=names)).lines
    named = {line.get_gid(): line for line in lines}
    assert len(named["member"].get_xdata()) == 6
    agree(named["uniform"].get_xdata(), [0.81], IDENTITY)
    agree(named["uniform"].get_ydata(), [0.61], IDENTITY)
    # Student's t of three values 0.01 apart: 4.302653 * 0.01 / sqrt(3) on either side.
    half = 4.302652729911275 * 0.01 / 3**0.5
    across, up = lines[1:3]
    agree(across.get_xdata(), [0.81 - half, 0.81 + half], JUMP)
    agree(up.get_ydata(), [0.61 - half, 0.61 + half], JUMP)


def test_rates_of_cycles_are_lines_over_a_band_without_cycles() -> None:
    table = pd.DataFrame(
        {
            "way": ["local", "SSE", "SSE"], "lr_scale": [np.nan, 4, 0.25], "mean": [5.0, 2.0, 1.0],
            "low": [4.0, 1.5, 0.5], "high": [6.0, 3.0, 1.5],
        }
    )  # fmt: skip
    ax = combine.cycle_rates(table)
    named = {line.get_gid(): line for line in ax.lines}
    agree(list(named["local"].get_ydata()), [5.0, 5.0], IDENTITY)
    (bars,) = ax.containers
    agree(np.asarray(bars.lines[0].get_xdata(), float), [0.25, 4.0], IDENTITY)
    agree(np.asarray(bars.lines[0].get_ydata(), float), [1.0, 2.0], IDENTITY)
    agree(bars.lines[2][0].get_segments()[1], [[4.0, 1.5], [4.0, 3.0]], IDENTITY)

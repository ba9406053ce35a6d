"""The bridge's panels show the numbers of its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from figures import bridge
from neural.bridge.comparison import COURSE
from neural.bridge.plots import draw_bridge
from tests.neural.bridge.test_verdict import cells
from tests.tolerances import IDENTITY, agree


@pytest.fixture
def table() -> pd.DataFrame:
    parts = [
        cells(lr, (1.0, 1.1, 0.8), batch_size=size, weights=weights)
        for lr, size in ((0.1, 8), (0.2, 8), (0.4, 8), (0.2, 16))
        for weights in ("iterate", "swa", "ema")
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def course() -> pd.DataFrame:
    rows = [
        {"lr": lr, "batch_size": size, "members": k, "step": step, "predicted": lr * step / k,
         "measured": 1.1 * lr * step / k, "error": 0.01}
        for lr, size in ((0.4, 8), (0.1, 8), (0.2, 8), (0.2, 16))
        for k in (1, 2, 4)
        for step in (2, 4, 8)
    ]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=COURSE)


def line(ax: Axes, gid: str) -> Line2D:
    found = [one for one in ax.lines if one.get_gid() == gid]
    assert len(found) == 1, [one.get_gid() for one in ax.lines]
    return found[0]


def test_the_course_is_that_of_the_middle_rate(course: pd.DataFrame) -> None:
    ax = bridge.course(course)
    for k in (1, 4):
        x, y = line(ax, f"K = {k}/predicted").get_data()
        agree(x, [2, 4, 8], IDENTITY)
        agree(y, 0.2 * np.array([2, 4, 8]) / k, IDENTITY)
    assert len(ax.containers) == 2
    drawn = [np.asarray(c.lines[0].get_ydata(), dtype=float) for c in ax.containers]
    agree(drawn, [1.1 * 0.2 * np.array([2, 4, 8]) / k for k in (1, 4)], IDENTITY)


def test_every_cell_has_its_residual(table: pd.DataFrame) -> None:
    ax = bridge.residuals(table, 2.0)
    drawn = [np.asarray(c.lines[0].get_data(), dtype=float) for c in ax.containers]
    assert sum(points.shape[1] for points in drawn) == len(table)
    agree(np.sort(np.concatenate(drawn, 1)[1]), np.sort(table["ratio"]), IDENTITY)
    # Every one nearest to its own lr h_max.
    for x, ratio in np.concatenate(drawn, 1).T:
        rate = min((0.2, 0.4, 0.8), key=lambda r, x=x: abs(np.log(r / x)))
        assert abs(np.log(x / rate)) < 0.5 * np.log(2.0)
        assert ratio in (1.0, 1.1, 0.8)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.2", "0.4", "0.8"]


def test_averages_are_lines_of_their_own(table: pd.DataFrame) -> None:
    ax = bridge.averages(table)
    for weights in ("iterate", "swa", "ema"):
        x, y = line(ax, f"{bridge.AVERAGES.get(weights, weights)}/predicted").get_data()
        agree(x, [0.1, 0.2, 0.4], IDENTITY)
        agree(y, [10.0, 5.0, 2.5], IDENTITY)
    # Other panels are of the weights themselves.
    assert len(line(bridge.against_rate(table), "K = 1/predicted").get_xdata()) == 3
    assert len(line(bridge.against_batch_size(table), "K = 1/predicted").get_xdata()) == 2


def test_what_is_saved_of_the_test_loss(table: pd.DataFrame) -> None:
    ks = np.array([np.nan, 2.0, 3.0])
    table = table.assign(
        predicted_test_gain=np.tile(0.1 * ks, len(table) // 3),
        test_gain=np.tile(-0.2 * ks, len(table) // 3),
        test_gain_error=0.01,
    )
    ax = bridge.held_out(table)
    for lr in ("0.1", "0.2", "0.4"):
        x, y = line(ax, f"{lr}/predicted").get_data()
        agree(x, [2, 3], IDENTITY)
        agree(y, [0.2, 0.3], IDENTITY)
    drawn = [np.asarray(c.lines[0].get_ydata(), dtype=float) for c in ax.containers]
    agree(drawn, [[-0.4, -0.6]] * 3, IDENTITY)


@pytest.mark.parametrize(
    "case",
    [
        "rises below zero have no logarithm",
        pytest.param("nothing was measured", marks=pytest.mark.slow),
        "nothing was measured, and one batch size alone",
        "nothing was predicted",
    ],
)
def test_the_page_is_drawn_of_any_table(
    case: str, table: pd.DataFrame, course: pd.DataFrame, tmp_path: Path
) -> None:
    spectrum = pd.DataFrame(
        {"curvature": [2.0, 1.0], "count": 1.0, "noise_variance": [0.3, 0.1], "kind": "pair"}
    )
    if case.startswith("nothing was measured"):
        names = ["measured", "error", "measured_rise", "ratio", "ratio_error"]
        table = table.assign(**dict.fromkeys(names, np.nan))
        course = course.assign(measured=np.nan, error=np.nan)
    elif case == "nothing was predicted":  # beyond the edge of stability
        names = ["predicted", "predicted_rise", "measured_rise", "ratio", "ratio_error", "floor"]
        table = table.assign(**dict.fromkeys(names, np.nan))
        course = course.assign(predicted=np.nan)
    else:
        table = table.assign(predicted_rise=-table["predicted_rise"], ratio=-table["ratio"])
    if case.startswith("rises below zero"):  # and with a panel of the test loss
        table = table.assign(predicted_test_gain=-0.1, test_gain=0.1, test_gain_error=0.01)
    if case.endswith("alone"):
        table = table[table["batch_size"] == table["batch_size"].iloc[0]]
    paths = draw_bridge(table, course, spectrum, tmp_path, case)
    assert [path.name for path in paths] == ["bridge.png", "bridge.pdf"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_an_empty_panel_says_so(table: pd.DataFrame) -> None:
    panels = (bridge.against_members, bridge.against_rate, bridge.averages)
    for panel in panels:
        assert not panel(table).texts
        words = [text.get_text() for text in panel(table.assign(predicted_rise=np.nan)).texts]
        assert words == ["not predicted"]
    words = [text.get_text() for text in bridge.residuals(table.assign(ratio=np.nan), 2.0).texts]
    assert words == ["nothing to compare"]


def test_the_law_goes_through_the_stiffest() -> None:
    h = np.array([4.0, 2.0, 1.0, 0.01])
    noise = 3.0 * h**1.5
    table = pd.DataFrame({"curvature": h, "noise_variance": noise, "kind": "pair"})
    x, y = np.asarray(line(bridge.noise_against_curvature(table, 1.5), "law").get_data())
    agree(x, [1.0, 4.0], IDENTITY)
    agree(y, 3.0 * x**1.5, 1e-12)
    assert not [n for n in bridge.noise_against_curvature(table).lines if n.get_gid() == "law"]


def test_ratios_show_every_rate_and_batch_size() -> None:
    table = pd.DataFrame([
        {"lr_times_sharpness": lr, "batch_size": size, "members": k, "ratio": lr + k,
         "ratio_error": 0.1}
        for lr, size in ((0.25, 32), (0.5, 32), (0.25, 8)) for k in (1, 4)
    ])  # fmt: skip
    ax = bridge.ratios(table, rates=[0.125, 0.25, 0.5])
    filled, hollow = line(ax, "0.25/32"), line(ax, "0.25/8")
    agree(filled.get_ydata(orig=False), [1.25, 4.25], IDENTITY)
    assert filled.get_color() == hollow.get_color()
    assert hollow.get_markerfacecolor() == "white"
    assert {text.get_text() for text in ax.texts} == {"$B$ = 8"}
    assert ax.get_legend_handles_labels()[1] == ["0.25", "0.5"]


def test_bars_of_residuals_end_below_the_legend(table: pd.DataFrame) -> None:
    ax = bridge.residuals(table.assign(ratio_error=5.0), 1.0)
    ax.figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    boxes = [one.get_clip_box() for part in ax.containers for one in part.get_children()]
    assert boxes
    assert all(box.y1 <= legend.y0 for box in boxes)

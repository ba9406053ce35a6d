"""Figures show the numbers of their tables: data are read back from the artists."""

import itertools
import json
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from figures import (
    clients,
    collapse,
    curves,
    digits,
    floors,
    multiplicative,
    over_time,
    rate_map,
    runs,
    style,
)


def artist(ax, gid):
    (line,) = [line for line in ax.lines if line.get_gid() == gid]
    return line


def bars(ax, gid):
    """Lower and upper ends of the error bars whose markers have this gid."""
    (container,) = [c for c in ax.containers if c[0].get_gid() == gid]
    segments = np.array(container[2][0].get_segments())
    return segments[:, 0, 1], segments[:, 1, 1]


def tidy(**columns):
    return pd.DataFrame(columns)


def test_curves_draw_theory_as_a_line_and_samples_as_markers_with_95_percent_bars():
    table = tidy(
        x=[2, 1, 1, 2],
        loss=[0.5, 1.0, 1.1, 0.4],
        stderr=[0, 0, 0.1, 0.2],
        series="a",
        kind=["exact", "exact", "sample", "sample"],
    )
    ax = curves.curves(table, x="x")
    np.testing.assert_array_equal(artist(ax, "a").get_xydata(), [[1, 1.0], [2, 0.5]])
    np.testing.assert_array_equal(artist(ax, "a/sample").get_xydata(), [[1, 1.1], [2, 0.4]])
    assert artist(ax, "a/sample").get_linestyle() == "None"
    assert artist(ax, "a/sample").get_markerfacecolor() == "white"
    low, high = bars(ax, "a/sample")
    np.testing.assert_allclose(high - low, 2 * 1.96 * np.array([0.1, 0.2]))


def test_curves_label_each_group_once():
    table = tidy(x=[1, 1], loss=[1.0, 1.0], stderr=0.1, series="a", kind=["exact", "sample"])
    ax = curves.curves(table, x="x", labels={"a": "theory"})
    assert ax.get_legend_handles_labels()[1] == ["theory"]


def test_given_axes_are_used_and_the_backend_is_left_alone():
    ax = Figure().subplots()
    before = mpl.get_backend(auto_select=False)
    table = tidy(x=[1.0], loss=[1.0], stderr=[0.0], series=["a"], kind=["exact"])
    assert curves.curves(table, x="x", ax=ax) is ax
    assert mpl.get_backend(auto_select=False) == before


def test_importing_figures_loads_no_pyplot():
    code = (
        "import sys, figures.curves, figures.floors, figures.rate_map;"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def steady_table():
    rows = [
        {"series": series, "members": k, "lr": lr, "kind": kind, "loss": scale * lr / k,
         "stderr": 0.01 * lr * (kind == "sample")}
        for series in ("mean model", "average member")
        for k in (1, 2, 4)
        for lr in (0.1, 0.2)
        for kind, scale in (("first_order", 1.0), ("sample", 1.1), ("long_run", 2.0))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_floors_by_rate(steady_table):
    ax = floors.by_rate(steady_table)
    np.testing.assert_allclose(artist(ax, "0.1").get_xydata(), [[1, 0.1], [2, 0.05], [4, 0.025]])
    np.testing.assert_allclose(artist(ax, "0.2/long_run").get_ydata(orig=False), [0.4, 0.2, 0.1])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"]


def test_floors_ratio_is_sample_over_theory(steady_table):
    ax = floors.ratio(steady_table)
    np.testing.assert_allclose(artist(ax, "0.1/ratio").get_ydata(orig=False), 1.1)


def test_floors_compared_keeps_the_long_run_apart(steady_table):
    ax = floors.compared(steady_table[steady_table["lr"] == 0.1])
    np.testing.assert_allclose(
        artist(ax, "mean model, long run").get_ydata(orig=False), [0.2, 0.1, 0.05]
    )
    np.testing.assert_allclose(
        artist(ax, "average member").get_ydata(orig=False), [0.1, 0.05, 0.025]
    )


def test_rate_map_shows_losses_edge_and_best():
    rates = [0.1, 0.2, 0.4]
    grid = tidy(lr=np.tile(rates, 2), members=np.repeat([1, 2], 3), kind="exact",
                loss=[1.0, 2.0, 3.0, 4.0, 5.0, np.nan])  # fmt: skip
    marks = tidy(lr=[0.5, 0.3, 0.1, 0.2], members=[1, 2, 1, 2], loss=1.0,
                 kind=["edge", "edge", "best", "best"])  # fmt: skip
    ax = rate_map.rate_map(pd.concat([grid, marks]))
    mesh = ax.collections[0]
    values = mesh.get_array().reshape(3, 2)
    np.testing.assert_array_equal(values[:, 0], [1, 2, 3])
    assert values.mask.tolist() == [[False, False], [False, False], [False, True]]
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[:, 0, 1], 0.1 * 2.0 ** np.array([-0.5, 0.5, 1.5, 2.5]))
    np.testing.assert_array_equal(artist(ax, "edge").get_ydata(orig=False), [0.5, 0.3])
    np.testing.assert_array_equal(artist(ax, "best").get_ydata(orig=False), [0.1, 0.2])


@pytest.fixture
def collapse_table():
    rows = [
        {"members": k, "gamma_rule": gamma, "lr": 0.1, "effective_lr": rate, "batch_size": 2,
         "loss": curve, "curve": curve, "stderr": 0.1 * curve, "kind": "sample",
         "curvature": 1.0, "noise_variance": 1.0, "directions": 1}
        for k, gamma, rate in ((1, "1/K", 0.2), (4, "1/K", 0.2), (4, "1", 0.5))
        for curve in [rate / (2 * (2 - rate) * k * 2)]
    ]  # fmt: skip
    sgd = [
        {"kind": "curve", "effective_lr": rate, "loss": rate / (2 * (2 - rate))}
        for rate in np.geomspace(0.1, 1.9, 300)
    ]
    return pd.DataFrame(rows + sgd)


def test_collapsed_points_lie_on_the_drawn_curve(collapse_table):
    ax = collapse.collapsed(collapse_table)
    rate, loss = artist(ax, "sgd").get_data()
    for gid in ("1/K/1/sample", "1/K/4/sample", "1/4/sample"):
        x, y = artist(ax, gid).get_xydata()[0]
        assert y == pytest.approx(np.interp(x, rate, loss), rel=1e-3)


def test_scattered_points_keep_their_loss_and_remainder_is_one(collapse_table):
    ax = collapse.scattered(collapse_table)
    expected = collapse_table.loc[1, "loss"]
    assert artist(ax, "1/K/4/sample").get_ydata(orig=False)[0] == pytest.approx(expected)
    ax = collapse.remainder(collapse_table)
    assert artist(ax, "1/4/sample").get_ydata(orig=False)[0] == pytest.approx(1.0)
    low, high = bars(ax, "1/4/sample")
    assert high - low == pytest.approx(2 * 1.96 * 0.1)


@pytest.fixture
def switch_table():
    rows = [
        {"series": series, "examples": x, "loss": 3.0 / x, "bias": 1.0 / x, "variance": 2.0 / x,
         "stderr": 0.1, "kind": kind}
        for series in over_time.LOOKS
        for x in ((10, 20) if series != "SGD to T0" else (1, 10))
        for kind in ("exact", "sample")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_switch_and_its_parts(switch_table):
    ax = over_time.switch(switch_table)
    np.testing.assert_allclose(artist(ax, "mean model").get_ydata(orig=False), [0.3, 0.15])
    assert any(set(line.get_xdata()) == {10} for line in ax.lines)  # the switch is marked
    ax = over_time.parts(switch_table)
    bias = artist(ax, "mean model/bias").get_ydata(orig=False)
    variance = artist(ax, "mean model/variance").get_ydata(orig=False)
    np.testing.assert_allclose(bias + variance, [0.3, 0.15])


def test_multiplicative_floors_course_and_error():
    k = np.array([1, 2, 4, 8])
    floor = pd.concat(
        tidy(members=k, loss=scale / k, stderr=0.01, kind=kind)
        for kind, scale in
        (("first_order", 1), ("long_run", 2), ("sample, short", 1.1), ("sample, long", 2.1))
    )  # fmt: skip
    ax = multiplicative.floors(floor)
    np.testing.assert_allclose(artist(ax, "long_run").get_ydata(orig=False), 2 / k)
    np.testing.assert_allclose(artist(ax, "sample, short").get_ydata(orig=False), 1.1 / k)
    course = tidy(members=2, step=[10.0, 100.0], loss=[2.0, 3.0], stderr=0.2, quasi_steady=2.0,
                  long_run=4.0, kind="sample")  # fmt: skip
    closed = course.assign(kind="closure", loss=[2.2, 3.2], stderr=0.0)
    ax = multiplicative.course(pd.concat([course, closed]))
    np.testing.assert_allclose(artist(ax, "2/closure").get_ydata(orig=False), [1.1, 1.6])
    np.testing.assert_allclose(artist(ax, "2/course").get_ydata(orig=False), [1.0, 1.5])
    error = tidy(lr=0.1, variance=[1e-3, 1e-2], loss=[-2e-3, -2e-2], stderr=1e-4,
                 series="average member")  # fmt: skip
    hidden = error.assign(series="mean model", loss=[1e-5, 1e-2])
    ax = multiplicative.first_order_error(pd.concat([error, hidden]))
    np.testing.assert_allclose(artist(ax, "0.1/error").get_ydata(orig=False), [2e-3, 2e-2])
    np.testing.assert_allclose(artist(ax, "0.1/linear").get_ydata(orig=False), [2e-3, 2e-2])
    np.testing.assert_allclose(
        artist(ax, "mean/error").get_ydata(orig=False), [1e-2]
    )  # 0.1 s.e.: left out


def test_an_error_map_has_every_error_in_per_cent():
    table = pd.DataFrame(
        {"variance": [0.1, 0.2, 0.1, 0.2], "lr": [0.3, 0.3, 0.4, 0.4],
         "error": [0.01, -0.02, 0.003, -0.5], "in_range": [True, True, True, False]}
    )  # fmt: skip
    ax = multiplicative.error_map(table)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 0): "+1.0", (1, 0): "-2.0", (0, 1): "+0.3", (1, 1): "(-50.0)"}


def test_digits_ratio_divides_by_the_additive_theory():
    rows = tidy(step=[1, 10] * 3, loss=[2.0, 1.0, 3.0, 1.2, 3.3, 1.3], stderr=0.2, members=4,
                lr=0.1, kind=np.repeat(["additive", "exact", "sample"], 2),
                additive_loss=[2.0, 1.0] * 3)  # fmt: skip
    ax = digits.ratio(rows, x="step")
    np.testing.assert_allclose(artist(ax, "4/exact").get_ydata(orig=False), [1.5, 1.2])
    np.testing.assert_allclose(artist(ax, "4/sample").get_ydata(orig=False), [1.65, 1.3])
    ax = digits.transient(rows)
    np.testing.assert_allclose(artist(ax, "4/additive").get_ydata(orig=False), [2.0, 1.0])


def test_saved_files_carry_the_parameters(tmp_path):
    parameters = {"figure": "x", "settings": {"lr": [0.1, 0.2]}}
    with style.context():
        figure = style.new_figure()
        assert isinstance(figure.subplots(), Axes)
    png, pdf = style.save(figure, tmp_path / "x", parameters)
    with Image.open(png) as image:
        assert json.loads(image.text["Parameters"]) == parameters
        assert image.size == (700, 520)  # 3.5 in at 200 dpi
    content = pdf.read_bytes()
    assert b"/Keywords" in content
    assert b"/Type3" not in content  # fonts are embedded as TrueType
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pdf", "x.png"]


def test_style_leaves_the_users_settings_alone():
    before = dict(mpl.rcParams)
    with style.context():
        assert mpl.rcParams["font.size"] == 8
    assert dict(mpl.rcParams) == before


def test_curves_and_arms_are_told_apart_without_colour():
    looks = [style.look(i) for i in range(36)]
    assert len({(one["marker"], str(one["linestyle"])) for one in looks}) == 36
    assert len({one["color"] for one in looks[:12]}) == 12
    # Ordered numbers: lightness grows from one to the next.
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in style.shades(7)]
    assert light == sorted(light)
    table = pd.DataFrame(
        [{"arm": f"arm_{i}", "seed": 0, "epoch": e, "accuracy": 0.1 * i, "drift": 1.0, "round": e}
         for i in range(9) for e in (1, 2)]
    )  # fmt: skip
    for ax in (runs.over_epochs(table), clients.over_rounds(table)):
        drawn = ax.get_legend().get_lines()
        assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn}) == 9
        assert len({line.get_color() for line in drawn}) == 9


def test_a_page_has_letters_and_its_title_as_plain_text(tmp_path):
    figure = style.new_figure()
    axes = figure.subplots(1, 2)
    axes[1].set_title("right")
    paths = style.finish(figure, tmp_path / "page", "cost in $ and {", axes)
    assert [path.name for path in paths] == ["page.png", "page.pdf"]
    assert [ax.get_title(loc="left") for ax in axes] == ["(a)", "(b) right"]
    with Image.open(paths[0]) as image:
        assert json.loads(image.text["Parameters"]) == {"title": "cost in $ and {"}


def test_the_legend_shows_line_and_marker_of_theory_and_simulation():
    table = pd.DataFrame(
        {"x": [1, 2, 1, 2], "loss": [1.0, 2.0, 1.1, 2.1], "stderr": [0, 0, 0.1, 0.1],
         "kind": ["exact", "exact", "sample", "sample"], "series": "one"}
    )  # fmt: skip
    ax = curves.curves(table, x="x")
    (handle,), (text,) = ax.get_legend_handles_labels()
    assert text == "one"
    assert handle.get_marker() == "o"
    assert handle.get_linestyle() == "-"


@pytest.mark.parametrize(("scale", "columns"), [("linear", 1), ("log", 3)])
def test_a_legend_above_covers_no_data(scale, columns):
    figure = style.new_figure(2.3, 2.2)
    ax = figure.subplots()
    for i in range(4):
        ax.plot([1, 2, 3], [1.0 + i, 100.0 + i, 1000.0], label=f"arm {i}")
    ax.set_yscale(scale)
    style.legend_above(ax, columns)
    figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    points = np.vstack([ax.transData.transform(line.get_xydata()) for line in ax.lines])
    assert points[:, 1].max() < box.y0


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.35), (1.0, 40.0), (0.011, 0.5)])
def test_a_short_logarithmic_axis_has_a_few_plain_numbers(low, high):
    with style.context():
        figure = style.new_figure(2.3, 2.0)
        ax = figure.subplots()
        ax.plot([low, high], [1, 2])
        ax.set_xscale("log")
        style.plain_log(ax.xaxis)
        figure.draw_without_rendering()
    shown = [text for text in ax.get_xticklabels() if text.get_text()]
    seen = [one for one in shown if low <= float(one.get_text()) <= high]
    assert 2 <= len(seen) <= 6
    boxes = [one.get_window_extent() for one in seen]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert not [text for text in ax.get_xticklabels(minor=True) if text.get_text()]


def test_symbols_of_a_text_are_typeset():
    text = "K = 2, lr h_max, until T0, 1 + eta; Kappa, th, $5, can't"
    expected = r"$K$ = 2, lr $h_{\max}$, until $T_0$, 1 + $\eta$; Kappa, th, \$5, can't"
    assert style.typeset(text) == expected

"""Pictures of the bridge: spectrum, gradient noise, predicted and measured losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, NullLocator

from figures.style import (
    REFERENCE,
    axes_or_new,
    legend_above,
    legend_free,
    look,
    members_axis,
    ordered,
    plain_log,
    shades,
    typeset,
)

#: Factors around 1 that are drawn as bands: good agreement of prediction and measurement.
BANDS = (1.2, 1.05)
#: Names of averages over time.
AVERAGES = {"swa": "SWA", "ema": "EMA"}
#: Largest factor from 1 on the axis of ratios.
FAR = 3.0
#: Shares of the largest noise (curvature) below which a direction counts as noiseless (soft).
NOISELESS, STIFF = 1e-9, 0.02


def spectrum(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw a histogram of the absolute curvatures, by sign.

    Parameters
    ----------
    table : DataFrame
        Columns curvature, count, kind: a row per eigenpair (``pair``) or node of the bulk
        (``bulk``).
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A histogram's gid is ``h > 0`` or ``h < 0``.
    """
    ax = axes_or_new(ax)
    counted = table[table["kind"] != "bulk noise"]
    size = counted["curvature"].abs()
    low = max(float(size.max()) * 1e-6, float(size[size > 0].min()))
    edges = np.geomspace(low, float(size.max()) * 1.01, 25)
    for sign, name, line in ((1, "h > 0", "-"), (-1, "h < 0", (0, (3, 1)))):
        rows = counted[np.sign(counted["curvature"]) == sign]
        if rows.empty:
            continue
        heights, _ = np.histogram(rows["curvature"].abs(), edges, weights=rows["count"])
        ax.stairs(heights, edges, color=REFERENCE, ls=line, label=typeset(name), gid=name)
    ax.set(
        xscale="log", yscale="log", xlabel="|curvature $h$|", ylabel="directions", title="spectrum"
    )
    legend_free(ax)
    return ax


def noise_against_curvature(
    table: pd.DataFrame, exponent: float = math.nan, *, ax: Axes | None = None
) -> Axes:
    """Draw the gradient noise of one example against the curvature.

    Parameters
    ----------
    table : DataFrame
        Columns curvature, noise_variance, kind; eigenpairs (``pair``) of positive curvature are
        drawn.
    exponent : float
        Exponent of a power law drawn through the directions of largest curvature; none is drawn if
        NaN.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Gids ``pairs`` and ``law``.
    """
    ax = axes_or_new(ax)
    rows = table[(table["kind"] == "pair") & (table["curvature"] > 0)]
    # Directions of weight decay alone carry rounding in place of noise.
    rows = rows[rows["noise_variance"] > NOISELESS * rows["noise_variance"].max()]
    h, c = rows["curvature"], rows["noise_variance"]
    ax.plot(h, c, "o", color="0.55", ms=2.5, gid="pairs")
    if math.isfinite(exponent):
        stiff = h > STIFF * h.max()
        ends = np.array([h[stiff].min(), h.max()])
        line = np.exp(np.log(c[stiff] / h[stiff] ** exponent).mean()) * ends**exponent
        ax.plot(ends, line, color=REFERENCE, lw=0.8, label=f"exponent {exponent:.2f}", gid="law")
        ax.legend(loc="upper left")
    ax.set(
        xscale="log", yscale="log", xlabel="curvature $h$", ylabel="noise variance", title="noise"
    )
    for axis in (ax.xaxis, ax.yaxis):  # names of ticks between decades would overlap
        axis.set_minor_formatter(NullFormatter())
        plain_log(axis)
    return ax


def against_members(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the rise of the loss by noise against K, a shade for each learning rate.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.api.compare` makes it: columns lr, batch_size, members, weights,
        predicted_rise, measured_rise, error, floor. Rows of the first batch size and of the iterate
        are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Lines are predictions, markers measurements with two standard errors; dotted: the floor.
    """
    ax = axes_or_new(ax)
    rows = _first_size(table)
    colors = shades(rows["lr"].nunique(), "plasma")  # those of K are another map
    for i, (lr, one) in enumerate(rows.groupby("lr")):
        _lines(ax, one, "members", i, f"{lr:.2g}", color=colors[i])
        if (one["floor"] > 0).all():
            ax.axhline(one["floor"].iloc[0], color=colors[i], lw=0.6, ls=":")
    members_axis(ax, sorted(map(int, table["members"].unique())))
    ax.set(
        yscale="log", xlabel="members $K$", ylabel="rise of the loss", title="members (dots: floor)"
    )
    legend_above(ax, 3, "lr")
    _say_if_empty(ax, rows["predicted_rise"])
    return ax


def _rate_axes(ax: Axes, rates: pd.Series[float]) -> None:
    """Rise of the loss against the learning rate, with the rates themselves as ticks."""
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="rise of the loss")
    ticks = sorted(rates.unique())
    ax.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def against_rate(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the rise of the loss by noise against the learning rate, for at most four K.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.api.compare` makes it: columns lr, batch_size, members, weights,
        predicted_rise, measured_rise, error. Rows of the first batch size and of the iterate are
        drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Lines are predictions, markers measurements with two standard errors.
    """
    ax = axes_or_new(ax)
    rows = _first_size(table)
    sizes = sorted(rows["members"].unique())
    colors = _of_members(table)
    for i, k in enumerate(sizes[:: max(1, (len(sizes) + 1) // 3)]):
        _lines(ax, rows[rows["members"] == k], "lr", i, f"$K$ = {k}", color=colors[k])
    _rate_axes(ax, rows["lr"])
    ax.set_title("learning rate")
    legend_above(ax, 3)
    plain_log(ax.yaxis)
    _say_if_empty(ax, rows["predicted_rise"])
    return ax


def against_batch_size(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the rise of the loss by noise against the batch size, for at most four K.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.api.compare` makes it: columns lr, batch_size, members, weights,
        predicted_rise, measured_rise, error. Rows of the iterate at the learning rate with the most
        batch sizes are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Lines are predictions, markers measurements with two standard errors.
    """
    ax = axes_or_new(ax)
    tried = table.groupby("lr")["batch_size"].nunique()
    lr = float(tried.index[int(tried.to_numpy().argmax())])
    rows = table[(table["lr"] == lr) & (table["weights"] == "iterate")]
    sizes = sorted(rows["members"].unique())
    colors = _of_members(table)
    for i, k in enumerate(sizes[:: max(1, (len(sizes) + 1) // 3)]):
        _lines(ax, rows[rows["members"] == k], "batch_size", i, f"$K$ = {k}", color=colors[k])
    members_axis(ax, sorted(map(int, rows["batch_size"].unique())))
    ax.set(yscale="log", xlabel="batch size", ylabel="rise of the loss")
    ax.set_title(f"batch size, lr {lr:.2g}")
    legend_above(ax, 3)
    plain_log(ax.yaxis)
    _say_if_empty(ax, rows["predicted_rise"])
    return ax


def course(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the change of the loss over time, for the smallest and the largest K.

    Parameters
    ----------
    table : DataFrame
        The course of `neural.bridge.api.compare`: columns lr, batch_size, members, step, predicted,
        measured, error. Rows of the first batch size and of the middle learning rate are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Lines are predictions, markers measurements with two standard errors.
    """
    ax = axes_or_new(ax)
    rows = table[_at_first_size(table)]
    rates = sorted(rows["lr"].unique())
    lr = rates[len(rates) // 2]
    rows = rows[rows["lr"] == lr]
    colors = _of_members(table)
    for i, k in enumerate(sorted({rows["members"].min(), rows["members"].max()})):
        own = rows[rows["members"] == k]
        _lines(
            ax, own, "step", i, f"$K$ = {k}", ("predicted", "measured", "error"), color=colors[k]
        )
    ax.axhline(0.0, color=REFERENCE, lw=0.6, zorder=0)
    ax.set(xscale="log", xlabel="step", ylabel="change of the loss", title=f"course, lr {lr:.2g}")
    legend_above(ax)
    plain_log(ax.xaxis)
    return ax


def averages(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the rise of the loss against the learning rate, for each average over time.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.api.compare` makes it: columns lr, batch_size, members, weights,
        predicted_rise, measured_rise, error. Rows of the first batch size and of the smallest K are
        drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A colour for each kind of weights; lines are predictions, markers measurements.
    """
    ax = axes_or_new(ax)
    rows = table[_at_first_size(table)]
    fewest = rows["members"].min()
    for i, (weights, one) in enumerate(rows.groupby("weights", sort=False)):
        name = AVERAGES.get(str(weights), str(weights))
        _lines(ax, one[one["members"] == fewest], "lr", i, name)
    _rate_axes(ax, rows["lr"])
    ax.set_title(f"averages over time, $K$ = {fewest}")
    legend_above(ax, 3)
    plain_log(ax.yaxis)
    _say_if_empty(ax, rows["predicted_rise"])
    return ax


def held_out(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what averaging K runs saves of the test loss, a colour per learning rate.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.api.compare` makes it: columns lr, batch_size, members, weights,
        predicted_test_gain, test_gain, test_gain_error. Rows of the first batch size and of the
        iterate are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Lines are predictions, markers measurements with two standard errors.
    """
    ax = axes_or_new(ax)
    rows = _first_size(table)
    rows = rows[rows["predicted_test_gain"].notna()]
    colors = shades(rows["lr"].nunique(), "plasma")
    columns = ("predicted_test_gain", "test_gain", "test_gain_error")
    for i, (lr, one) in enumerate(rows.groupby("lr")):
        _lines(ax, one, "members", i, f"{lr:.2g}", columns, color=colors[i])
    members_axis(ax, sorted(map(int, rows["members"].unique())))
    ax.axhline(0.0, color=REFERENCE, lw=0.6, zorder=0)
    ax.set(xlabel="members $K$", ylabel="test loss saved", title="test loss")
    legend_above(ax, 3, "lr")
    return ax


def ratios(
    table: pd.DataFrame, rates: Sequence[float] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw measured over predicted rise of the loss against K, a shade for each learning rate.

    Parameters
    ----------
    table : DataFrame
        Columns lr_times_sharpness, batch_size, members, ratio and ratio_error (NaN where there is
        none). Markers of the first batch size are filled; others are named at their curve.
    rates : sequence of float, optional
        Learning rates of all panels of a page, which share their looks; by default the table's.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Error bars are one standard error; a gid is ``LR/BATCH_SIZE``. The legend is left to the
        caller.
    """
    ax = axes_or_new(ax)
    for shade, band in zip(("#f2f2f2", "#dddddd"), BANDS, strict=True):
        ax.axhspan(1.0 / band, band, color=shade, zorder=0)
    ax.axhline(1.0, color=REFERENCE, lw=0.7, zorder=0)
    named = sorted(table["lr_times_sharpness"].unique() if rates is None else rates)
    looks = dict(zip(named, ordered(len(named), "plasma"), strict=True))
    first = table["batch_size"].iloc[0]
    cases = table.groupby(["lr_times_sharpness", "batch_size"], sort=False)
    others: list[tuple[float, float, str]] = []
    for i, ((lr, size), rows) in enumerate(cases):
        own = looks[lr]
        aside = 1.06 ** (i - (cases.ngroups - 1) / 2)  # so that every bar is seen
        x = rows["members"] * aside
        ax.errorbar(
            x, rows["ratio"], rows["ratio_error"].fillna(0.0), color=own["color"],
            ls=own["linestyle"], marker=own["marker"], ms=3.0, lw=0.7, mew=0.7,
            mfc=own["color"] if size == first else "white", gid=f"{lr:g}/{size:g}",
            label=f"{lr:g}" if size == first else "_",
        )  # fmt: skip
        if size != first:
            others.append((float(rows["ratio"].iloc[-1]), float(x.iloc[-1]), f"$B$ = {size:g}"))
    middle = (len(others) - 1) / 2
    for i, (end, x_end, name) in enumerate(sorted(others)):  # names of near ends stand apart
        ax.annotate(name, (x_end, end), xytext=(5, 5 * (i - middle)), fontsize=5.5,
                    textcoords="offset points", va="center")  # fmt: skip
    members_axis(ax, sorted(map(int, table["members"].unique())))
    ax.set(yscale="log", xlabel="members $K$", ylabel="measured / predicted")
    ends = table["ratio"].min(), table["ratio"].max()
    ax.set_ylim(min(0.9 * ends[0], 0.78), max(1.12 * ends[1], 1.33))
    plain_log(ax.yaxis)
    return ax


def residuals(table: pd.DataFrame, largest: float, *, ax: Axes | None = None) -> Axes:
    """Draw measured over predicted rise of every cell, with two standard errors.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.api.compare` makes it: columns lr, momentum, batch_size, members, weights,
        ratio, ratio_error. K grows from left to right; markers of the first batch size are filled.
    largest : float
        Largest curvature h_max.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A marker's gid is ``ratio/WEIGHTS/first`` or, for other batch sizes, ``.../other``.
    """
    ax = axes_or_new(ax)
    scaled = table["lr"] / (1.0 - table["momentum"]) * largest
    rates, sizes = sorted(scaled.unique()), sorted(table["members"].unique())
    at_first = _at_first_size(table)
    width = 0.7 * np.diff(np.log(rates)).min(initial=np.log(2.0))
    for i, (weights, one) in enumerate(table.groupby("weights", sort=False)):
        rank = (one["members"].map(sizes.index) + 0.25 * (i + 1)) / len(sizes) - 0.5
        x = scaled[one.index] * np.exp(width * rank)
        name = AVERAGES.get(str(weights), str(weights))
        for first in (True, False):
            held = at_first[one.index] == first
            ax.errorbar(
                x[held], one["ratio"][held], 2.0 * one["ratio_error"][held],
                fmt=look(i)["marker"], color=look(i)["color"], ms=2.5, lw=0.7,
                mfc=None if first else "white", mew=0.7, label=name if first else None,
                gid=f"ratio/{weights}/{'first' if first else 'other'}",
            )  # fmt: skip
    for shade, band in zip(("#f2f2f2", "#dddddd"), BANDS, strict=True):
        ax.axhspan(1.0 / band, band, color=shade, zorder=0)
    ax.axhline(1.0, color=REFERENCE, lw=0.7, zorder=0)
    ends = pd.concat(
        [table["ratio"] - 2.0 * table["ratio_error"], table["ratio"] + 2.0 * table["ratio_error"]]
    )
    unit = r"lr $h_{\max}$" + (" / (1 - momentum)" if table["momentum"].any() else "")
    ax.set(xscale="log", yscale="log", ylabel="measured / predicted")
    ax.set_ylim(
        max(np.nanmin([ends.min(), 0.75]), 1.0 / FAR), min(np.nanmax([ends.max(), 1.33]), FAR)
    )
    ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    low, high = ax.get_ylim()
    shown = [y for y in (0.33, 0.5, 0.7, 0.83, 1.0, 1.2, 1.5, 2.0, 3.0) if low <= y <= high]
    ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.set_title("all cells")
    ax.set_xlabel(f"{unit}\n($K$ from left to right; hollow: other $B$)")
    # Bars that end beyond the axis end at it, not behind the legend.
    shown_part = Rectangle((0.0, low), 1.0, high - low, transform=ax.get_yaxis_transform())
    for part in (one for container in ax.containers for one in container.get_children()):
        part.set_clip_path(shown_part)
    legend_above(ax, 3)
    _say_if_empty(ax, table["ratio"], "nothing to compare")
    return ax


def _say_if_empty(ax: Axes, values: pd.Series[float], words: str = "not predicted") -> None:
    """Say so where there is no value, as beyond the range of the theory."""
    if not np.isfinite(values).any():
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks([])
            axis.set_minor_locator(NullLocator())
        ax.text(0.5, 0.25, words, transform=ax.transAxes, ha="center", gid="empty")


def _at_first_size(table: pd.DataFrame) -> pd.Series[bool]:
    first: pd.Series[bool] = table["batch_size"] == table["batch_size"].iloc[0]
    return first


def _first_size(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the iterate at the first batch size."""
    held: pd.DataFrame = table[_at_first_size(table) & (table["weights"] == "iterate")]
    return held


def _lines(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    i: int,
    name: str,
    columns: tuple[str, str, str] = ("predicted_rise", "measured_rise", "error"),
    *,
    color: Any = None,
) -> None:
    """Prediction as a line, measurement as markers with two standard errors."""
    rows, own = rows.sort_values(x), look(i)
    color = own["color"] if color is None else color
    line: dict[str, Any] = {"color": color, "ls": own["linestyle"]}
    gid = name.replace("$", "")
    ax.plot(rows[x], rows[columns[0]], gid=f"{gid}/predicted", **line)
    ax.errorbar(
        rows[x], rows[columns[1]], 2.0 * rows[columns[2]], fmt=own["marker"], color=color, ms=3.0,
        lw=0.7, gid=f"{gid}/measured",
    )  # fmt: skip
    ax.plot([], [], marker=own["marker"], ms=3.0, label=name, **line)


def _of_members(table: pd.DataFrame) -> dict[int, Any]:
    """Shade of every K of a page."""
    sizes = sorted(table["members"].unique())
    return dict(zip(sizes, shades(len(sizes)), strict=True))

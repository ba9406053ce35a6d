"""Training runs compared: a number per seed and its interval, and curves over epochs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from figures.style import REFERENCE, axes_or_new, look
from nqm.table import label

#: Line style of averages over time.
AVERAGED = (0, (4, 1.5))


def comparison(table: pd.DataFrame, *, metric: str = "accuracy", ax: Axes | None = None) -> Axes:
    """Draw the result of every model of every arm, with seeds, mean and interval.

    Parameters
    ----------
    table : DataFrame
        Columns arm, weights, seed, value, mean, low, high; a row per seed. The mean of the first
        arm's first model is the reference line.
    metric : str
        Metric of the values, for the label of the axis.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A row per model; gids ``seeds``, ``interval`` and ``mean``.
    """
    ax = axes_or_new(ax)
    arms = list(dict.fromkeys(table["arm"]))
    models = list(dict.fromkeys(zip(table["arm"], table["weights"], strict=True)))
    for place, (arm, weights) in enumerate(models):
        rows = table[(table["arm"] == arm) & (table["weights"] == weights)]
        own = look(arms.index(arm))
        color = own["color"]
        heights = [place] * len(rows)
        ax.plot(rows["value"], heights, "o", color=color, alpha=0.35, ms=2.5, gid="seeds")
        mean, low, high = (float(rows[name].iloc[0]) for name in ("mean", "low", "high"))
        if low == low:  # not NaN: more than one seed
            ax.plot([low, high], [place, place], "-", color=color, lw=1.0, gid="interval")
        ax.plot([mean], [place], own["marker"], color=color, gid="mean")
    ax.axvline(float(table["mean"].iloc[0]), color=REFERENCE, lw=0.7, ls=(0, (2, 2)), zorder=0)
    names = [f"{arm}: {weights}".replace("_", " ") for arm, weights in models]
    ax.set_yticks(range(len(models)), names)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.set_xlabel(f"test {label(metric)}")
    return ax


def means(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw published means of models with their spreads.

    Parameters
    ----------
    table : DataFrame
        Columns model, mean, spread (standard deviation over seeds, NaN for a single value) and,
        optionally, series. The first row is the reference line.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A row for each model, series side by side; a gid is the series. The label of the axis is
        left to the caller.
    """
    ax = axes_or_new(ax)
    rows = table if "series" in table else table.assign(series="")
    places = {name: i for i, name in enumerate(dict.fromkeys(rows["model"]))}
    series = list(dict.fromkeys(rows["series"]))
    for i, name in enumerate(series):
        own, one = look(i), rows[rows["series"] == name]
        y = one["model"].map(places) + 0.22 * (i - (len(series) - 1) / 2)
        ax.errorbar(
            one["mean"], y, xerr=one["spread"].fillna(0.0), fmt=own["marker"], color=own["color"],
            capsize=2.0, elinewidth=0.9, label=name, gid=name or "means",
        )  # fmt: skip
    ax.axvline(float(table["mean"].iloc[0]), color=REFERENCE, lw=0.7, ls=(0, (2, 2)), zorder=0)
    ax.set_yticks(range(len(places)), list(places))
    ax.set_ylim(len(places) - 0.5, -0.5)
    if len(series) > 1:
        # Above the axes: rows fill them.
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(series))
    return ax


def over_epochs(
    table: pd.DataFrame,
    *,
    column: str = "accuracy",
    ax: Axes | None = None,
    starts: Mapping[str, int] | None = None,
) -> Axes:
    """Draw one column of the history against epochs, a colour per arm.

    An arm that averages over time has a second, dashed curve: that of the average.

    Parameters
    ----------
    table : DataFrame
        Columns arm, seed, epoch, and `column`; optionally ``average_{column}``, NaN where there is
        no average.
    column : str
        Name of a metric, or ``loss``.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.
    starts : mapping of str to int, optional
        Arm -> T0, epochs done when its members begin: a dotted line.

    Returns
    -------
    Axes
        Seeds are thin (gid ``ARM/seed``), their mean is thick (``ARM/mean``), that of the average
        is dashed (``ARM/average``), T0 is dotted (``ARM/T0``).
    """
    ax = axes_or_new(ax)
    for i, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        own = look(i)
        color, line = own["color"], own["linestyle"]
        for _, one in rows.groupby("seed"):
            ax.plot(one["epoch"], one[column], color=color, alpha=0.25, lw=0.6, gid=f"{arm}/seed")
        mean = rows.groupby("epoch")[column].mean()
        name = str(arm).replace("_", " ")
        ax.plot(mean.index, mean, color=color, ls=line, label=name, gid=f"{arm}/mean")
        averaged = _averaged(rows, f"average_{column}")
        if len(averaged):
            ax.plot(averaged.index, averaged, color=color, ls=AVERAGED, gid=f"{arm}/average")
        if starts and str(arm) in starts:
            ax.axvline(starts[str(arm)], color=color, lw=0.8, ls=":", zorder=0, gid=f"{arm}/T0")
    said = "cross-entropy (nats)" if column == "loss" else label(column)
    ax.set(xlabel="epochs", ylabel=f"test {said}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if column == "loss" and table[column].max() > 10.0 * table[column].min():
        ax.set_yscale("log")
    extra = []
    if f"average_{column}" in table and table[f"average_{column}"].notna().any():
        extra.append(Line2D([], [], color=REFERENCE, ls=AVERAGED, label="average over time"))
    if starts:
        extra.append(Line2D([], [], color=REFERENCE, lw=0.8, ls=":", label="$T_0$: members begin"))
    handles = [*ax.get_legend_handles_labels()[0], *extra]
    # Above the axes: curves and T0 may be anywhere within.
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    return ax


def _averaged(rows: pd.DataFrame, column: str) -> pd.Series[float]:
    """Mean over seeds of the average's curve; empty of an arm that does not average."""
    if column not in rows:
        return pd.Series(dtype=float)
    return rows.groupby("epoch")[column].mean().dropna()

"""Training runs compared: a number per seed and its interval, and curves over epochs."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from figures.style import MARKERS, PALETTE, REFERENCE, axes_or_new
from nqm.table import label


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
        color = PALETTE[arms.index(arm) % len(PALETTE)]
        heights = [place] * len(rows)
        ax.plot(rows["value"], heights, "o", color=color, alpha=0.35, ms=2.5, gid="seeds")
        mean, low, high = (float(rows[name].iloc[0]) for name in ("mean", "low", "high"))
        if low == low:  # not NaN: more than one seed
            ax.plot([low, high], [place, place], "-", color=color, lw=1.0, gid="interval")
        ax.plot([mean], [place], MARKERS[arms.index(arm) % len(MARKERS)], color=color, gid="mean")
    ax.axvline(float(table["mean"].iloc[0]), color=REFERENCE, lw=0.7, ls=(0, (2, 2)), zorder=0)
    names = [f"{arm}: {weights}".replace("_", " ") for arm, weights in models]
    ax.set_yticks(range(len(models)), names)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.set_xlabel(f"test {label(metric)}")
    return ax


def over_epochs(table: pd.DataFrame, *, column: str = "accuracy", ax: Axes | None = None) -> Axes:
    """Draw one column of the history against epochs, a colour per arm.

    Parameters
    ----------
    table : DataFrame
        Columns arm, seed, epoch, and `column`.
    column : str
        Name of a metric, or ``loss``.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Seeds are thin (gid ``ARM/seed``), their mean is thick (``ARM/mean``).
    """
    ax = axes_or_new(ax)
    for i, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        color = PALETTE[i % len(PALETTE)]
        for _, one in rows.groupby("seed"):
            ax.plot(one["epoch"], one[column], color=color, alpha=0.25, lw=0.6, gid=f"{arm}/seed")
        mean = rows.groupby("epoch")[column].mean()
        name = str(arm).replace("_", " ")
        ax.plot(mean.index, mean, color=color, label=name, gid=f"{arm}/mean")
    said = "cross-entropy (nats)" if column == "loss" else label(column)
    ax.set(xlabel="epochs", ylabel=f"test {said}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if column == "loss" and table[column].max() > 10.0 * table[column].min():
        ax.set_yscale("log")
    ax.legend(loc="best")
    return ax

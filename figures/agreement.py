"""Agreement of classifiers beyond chance, and what some weights of an ensemble gain over others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from figures.style import COLORMAP, REFERENCE, axes_or_new, look
from nqm.table import label

#: People in the table of kappa, as a line below the matrix names them.
_PEOPLE = {
    "rater": "one rater",
    "rater_or_neutral": "with neutral answers",
    "panel": "half of them",
}
#: Cells darker than this carry white numbers.
_DARK = 0.6
#: Colour and pattern of the bars of each metric.
BARS = {
    "accuracy": {"color": look(3)["color"]},
    "nll": {"color": look(0)["color"]},
    "nll_tuned": {"color": "white", "edgecolor": look(0)["color"], "hatch": "//////"},
}


def kappa(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Cohen's kappa of every two, as a matrix with its numbers.

    Parameters
    ----------
    table : DataFrame
        Columns first, second and kappa; those that are second to none are named below.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    names = list(dict.fromkeys(table["second"]))
    inside = table[table["first"].isin(names)]
    order = list(dict.fromkeys(inside["first"]))
    values = inside.pivot(index="first", columns="second", values="kappa").loc[order, order]
    matrix = values.to_numpy(dtype=float)
    apart = matrix[~np.eye(len(order), dtype=bool)]
    low, high = float(np.nanmin(apart)), float(np.nanmax(apart))
    # One's own agreement is 1 and tells nothing: left white.
    shown = np.where(np.eye(len(order), dtype=bool), np.nan, matrix)
    ax.imshow(shown, cmap=COLORMAP, vmin=low, vmax=high, gid="kappa")
    for i, j in zip(*np.nonzero(np.isfinite(shown)), strict=True):
        dark = (shown[i, j] - low) < _DARK * (high - low)
        ax.text(j, i, f"{shown[i, j]:.2f}", ha="center", va="center", fontsize=6,
                color="white" if dark else "black")  # fmt: skip
    ax.set_xticks(range(len(order)), order, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(order)), order)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    others = table[~table["first"].isin(names)]
    named = [
        (_PEOPLE.get(row["first"], row["first"]), row["kappa"]) for _, row in others.iterrows()
    ]
    if named:
        said = ", ".join(f"{name} {value:.2f}" for name, value in named)
        ax.set_xlabel(f"people with the label\n{said}", fontsize=6)
    ax.set_title("Cohen's kappa")
    return ax


def gains(
    table: pd.DataFrame, *, columns: Sequence[str] = ("accuracy",), ax: Axes | None = None
) -> Axes:
    """Bars of what each rule gains over another one, with intervals; to the right is better.

    Parameters
    ----------
    table : DataFrame
        Columns rule, member and, for every name X of `columns`, X_gain, X_gain_low, X_gain_high.
    columns : sequence of str
        Metrics of one unit; the bars are labelled, and a legend is left to the caller.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    rows = table[table[f"{columns[0]}_gain"].notna()]
    names = [row["member"] or row["rule"].replace("_", " ") for _, row in rows.iterrows()]
    y = np.arange(len(rows))[::-1].astype(float)
    height = 0.8 / len(columns)
    for k, column in enumerate(columns):
        value, low, high = (
            rows[f"{column}_gain{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")
        )
        at = y + (len(columns) - 1 - 2 * k) * height / 2
        own = BARS.get(column, {"color": look(k + len(BARS))["color"]})
        ax.barh(at, value, height, label=label(f"{column}_gain"), **own,
                xerr=[value - low, high - value], gid=column,
                error_kw={"lw": 0.7, "ecolor": REFERENCE, "capsize": 1.5})  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.axvline(0.0, color=REFERENCE, lw=0.7)
    ax.set_yticks(y, names)
    ax.set_xlabel(label(f"{columns[0]}_gain"))
    ax.set_title("gains")
    return ax

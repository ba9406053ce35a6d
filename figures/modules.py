"""Modules combined for a domain that none of them has seen: what each score gains."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from figures.combine import SHAPES, SPACES
from figures.style import REFERENCE, axes_or_new, legend_free
from nqm.table import label


def scores(
    table: pd.DataFrame, *, column: str = "accuracy", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """Draw one metric of every way of combining, with its interval over splits.

    Parameters
    ----------
    table : DataFrame
        Columns score, kept, weighting, space, `column` and the half width of its interval.
    column : str
    legend : bool
        False leaves the legend to the page.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    rows = table[table[column].notna()]
    parts = zip(rows["score"], rows["kept"], rows["weighting"], strict=True)
    names = [
        (f"{score} {kept} {how}" if how else str(score))
        .replace("_", " ")
        .replace("tfidf", "TF-IDF")
        for score, kept, how in parts
    ]
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    # The first row on top; axes of two panels may be shared.
    y = -np.array([places[name] for name in names], dtype=float)
    for shift, (space, color) in zip((0.2, 0.0, -0.2), SPACES.items(), strict=True):
        held = (rows["space"] == space).to_numpy()
        if held.any():
            ax.errorbar(
                rows[column][held], y[held] + shift, xerr=rows[f"{column}_half"][held],
                fmt=SHAPES[space], ms=2.5, color=color, label=space, elinewidth=0.8, gid=space,
            )  # fmt: skip
    none = rows[rows["score"] == "no_module"]
    if len(none):
        here = float(none[column].iloc[0])
        ax.axvline(here, color=REFERENCE, lw=0.7, zorder=0, label="no module")
    ax.set_yticks([-i for i in places.values()], list(places))
    ax.set_xlabel(label(column))
    if legend:
        legend_free(ax)
    return ax

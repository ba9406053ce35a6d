"""Theory as lines, simulation as open markers with error bars: the core of most figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from figures.style import MARKERS, PALETTE, axes_or_new

#: Half-width of a 95 % interval in standard errors.
WIDTH95 = 1.96

#: Appearance of one group; keys of `Line2D`.
Look = Mapping[str, Any]


def curves(  # noqa: PLR0913 - options, by keyword
    table: pd.DataFrame,
    *,
    x: str,
    y: str = "loss",
    error: str = "stderr",
    by: str = "series",
    looks: Mapping[Any, Look] | None = None,
    labels: Mapping[Any, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One colour per group; rows of kind ``sample`` as markers, all others as a line.

    Parameters
    ----------
    table : DataFrame
        Columns `x`, `y`, `error`, `by` and ``kind``.
    looks : mapping, optional
        Line properties by group; the palette in order of appearance by default.
    labels : mapping, optional
        Legend entry by group; the group's name by default. "" leaves it out.
    ax : Axes, optional

    Returns
    -------
    Axes
        Every line's gid is ``GROUP``, every set of markers' ``GROUP/sample``.
    """
    ax = axes_or_new(ax)
    for index, (group, rows) in enumerate(table.groupby(by, sort=False)):
        look: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)]}
        look |= dict((looks or {}).get(group, {}))
        marker = look.pop("marker", MARKERS[index % len(MARKERS)])
        name = str(group) if labels is None else labels.get(group, str(group))
        sampled = rows["kind"] == "sample"
        theory = rows[~sampled].sort_values(x)
        if len(theory):
            label = name or "_"
            ax.plot(theory[x], theory[y], label=label, gid=str(group), **look)
        if sampled.any():
            points = rows[sampled].sort_values(x)
            label = "_" if len(theory) or not name else name
            color, zorder = look["color"], 3 + float(look.get("zorder", 0.0))
            own = {"label": label, "marker": marker, "color": color, "zorder": zorder}
            markers(points, x, y, error, ax, gid=f"{group}/sample", **own)
    return ax


def markers(
    points: pd.DataFrame, x: str, y: str, error: str, ax: Axes, *, gid: str, **look: Any
) -> None:
    """Open markers with 95 % error bars; `gid` names the markers' line."""
    drawn = ax.errorbar(
        points[x],
        points[y],
        yerr=WIDTH95 * np.asarray(points[error], dtype=float),
        linestyle="none",
        markerfacecolor="white",
        markeredgewidth=0.9,
        elinewidth=0.9,
        capsize=2.0,
        **look,
    )
    drawn[0].set_gid(gid)

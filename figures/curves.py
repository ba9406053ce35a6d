"""Theory as lines, simulation as open markers with error bars: the core of most figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from figures import style
from figures.style import axes_or_new

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
    """Draw one colour per group: markers for rows of kind ``sample``, a line for all others.

    Parameters
    ----------
    table : DataFrame
        Columns `x`, `y`, `error`, `by` and ``kind``.
    x, y : str
        Columns of the coordinates.
    error : str
        Column with the standard error of `y`, for rows of kind ``sample``.
    by : str
        Column that names the groups.
    looks : mapping, optional
        Line properties by group; `figures.style.look` in order of appearance by default.
    labels : mapping, optional
        Legend entry by group; the group's name by default. "" gives no entry.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A line has the gid ``GROUP``, its markers ``GROUP/sample``.
    """
    ax = axes_or_new(ax)
    for index, (group, rows) in enumerate(table.groupby(by, sort=False)):
        own = style.look(index)
        look: dict[str, Any] = own if looks is None else {"color": own["color"]}
        look |= dict((looks or {}).get(group, {}))
        marker = look.pop("marker", own["marker"])
        name = str(group) if labels is None else labels.get(group, str(group))
        sampled = rows["kind"] == "sample"
        theory = rows[~sampled].sort_values(x)
        if len(theory):
            label = name or "_"
            ax.plot(theory[x], theory[y], label=label, gid=str(group), **look)
        if sampled.any():
            points = rows[sampled].sort_values(x)
            label = "_" if len(theory) or not name else name
            if len(theory) and name:  # the legend shows line and marker of a group together
                ax.lines[-1].set_label("_")
                both = look | {"marker": marker, "markerfacecolor": "white", "label": name}
                ax.plot([], [], **both)
            color, zorder = look["color"], 3 + float(look.get("zorder", 0.0))
            drawn = {"label": label, "marker": marker, "color": color, "zorder": zorder}
            markers(points, x, y, error, ax, gid=f"{group}/sample", **drawn)
    return ax


def markers(
    points: pd.DataFrame, x: str, y: str, error: str, ax: Axes, *, gid: str, **look: Any
) -> None:
    """Draw open markers with 95 % error bars.

    Parameters
    ----------
    points : DataFrame
        One row per marker.
    x, y, error : str
        Columns of the coordinates, and of the standard error of `y`.
    ax : Axes
        Axes to draw on.
    gid : str
        Identifier of the markers' line.
    **look
        Passed to `Axes.errorbar`, e.g. color, marker, label.
    """
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

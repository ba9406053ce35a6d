"""Expected loss through a late-phase switch, against examples seen."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from figures.curves import curves
from figures.style import PALETTE, REFERENCE, axes_or_new
from nqm.table import label

LOOKS: dict[str, dict[str, Any]] = {
    "SGD to T0": {"color": REFERENCE, "marker": "D"},
    "mean model": {"color": PALETTE[0], "marker": "o"},
    "average member": {"color": PALETTE[1], "marker": "s", "linestyle": (0, (4, 1.5))},
    "SGD goes on": {"color": PALETTE[2], "marker": "^", "linestyle": (0, (5, 1, 1, 1))},
    "SGD, lambda, K B": {"color": PALETTE[4], "linestyle": (0, (1, 1.6)), "linewidth": 2.6},
}
LABELS = {
    "SGD to T0": r"SGD until $T_0$",
    "mean model": "late-phase, mean model",
    "average member": "late-phase, average member",
    "SGD goes on": "SGD goes on, equal examples",
    "SGD, lambda, K B": r"SGD at $\lambda$, batch $KB$",
}


def _finish(table: pd.DataFrame, ax: Axes) -> Axes:
    start = table.loc[table["series"] == "mean model", "examples"].min()
    ax.axvline(start, color="0.6", linewidth=0.8, zorder=0)
    ax.annotate("$T_0$", (start, 0.0), xycoords=("data", "axes fraction"), xytext=(2, 3),
                textcoords="offset points", fontsize=7, color="0.4")  # fmt: skip
    ax.set(yscale="log", xlabel=f"{label('examples')} seen")
    return ax


def switch(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the expected loss of every method against the examples seen.

    Parameters
    ----------
    table : DataFrame
        Columns series (keys of `LOOKS`), kind, examples, loss, stderr.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Theory has lines, simulation markers; the vertical line is the switch.
    """
    ax = axes_or_new(ax)
    curves(table, x="examples", looks=LOOKS, labels=LABELS, ax=ax)
    ax.set_ylabel(label("loss"))
    ax.legend(loc="upper right")
    return _finish(table, ax)


def parts(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw bias and variance of the late-phase mean model and of SGD without a switch.

    Parameters
    ----------
    table : DataFrame
        Columns series, kind, examples, bias, variance; rows of kind ``exact`` are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Bias is solid, variance dashed; a gid is ``SERIES/PART``.
    """
    ax = axes_or_new(ax)
    exact = table[table["kind"] == "exact"]
    for series in ("SGD to T0", "SGD goes on", "mean model"):
        rows = exact[exact["series"] == series].sort_values("examples")
        for part, style in (("bias", "-"), ("variance", "--")):
            text = "_" if series == "SGD to T0" else f"{LABELS[series].split(',')[0]}: {part}"
            look: dict[str, Any] = {
                "color": LOOKS[series]["color"],
                "linestyle": style,
                "label": text,
            }
            ax.plot(rows["examples"], rows[part], gid=f"{series}/{part}", **look)
    ax.set_ylabel("part of the expected loss")
    ax.legend(loc="upper right")
    _finish(table, ax)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 1e-7 * high), 10 * high)  # room for the legend
    return ax

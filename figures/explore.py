"""Two pictures for the controls of ``nqm explore``: loss over examples, loss against the rate."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from figures.style import PALETTE, REFERENCE, axes_or_new, ordered
from nqm.table import label

#: Series of the first picture: what the legend says, and the look.
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "before": ("SGD until $T_0$", {"color": REFERENCE}),
    "mean model": ("mean model", {"color": PALETTE[0]}),
    "average member": ("average member", {"color": PALETTE[1], "linestyle": "--"}),
    "sgd": ("SGD goes on", {"color": PALETTE[2], "linestyle": ":"}),
}


def over_examples(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw expected losses against the examples seen.

    Parameters
    ----------
    table : DataFrame
        Columns series (keys of `LOOKS`), examples, loss.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    for name, (text, look) in LOOKS.items():
        rows = table[table["series"] == name]
        if len(rows):
            ax.plot(rows["examples"], rows["loss"], label=text, gid=name, **look)
    ax.set(yscale="log", xlabel=f"{label('examples')} seen", ylabel=label("loss"))
    ax.legend()
    return ax


def against_rate(table: pd.DataFrame, lr: float, members: int, *, ax: Axes | None = None) -> Axes:
    """Draw the loss at the end against the learning rate, a line for each K.

    Parameters
    ----------
    table : DataFrame
        Columns members, lr, loss.
    lr : float
        The chosen rate: a vertical line.
    members : int
        The chosen K: its line is the thickest.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    sizes = table.groupby("members")
    for own, (size, rows) in zip(ordered(sizes.ngroups), sizes, strict=True):
        look = {"color": own["color"], "linestyle": own["linestyle"]}
        look["linewidth"] = 2.2 if size == members else 1.0
        ax.plot(rows["lr"], rows["loss"], label=f"$K$ = {size}", gid=f"K{size}", **look)
    ax.axvline(lr, color=REFERENCE, linewidth=0.8, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="learning rate after $T_0$", ylabel="loss at the end")
    if table["members"].nunique() > 1:
        ax.legend()
    return ax

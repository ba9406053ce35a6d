"""Scaling laws: loss against compute by model size, and against when a rate starts to decay."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from figures.curves import curves
from figures.style import COLORMAP, REFERENCE, axes_or_new, ordered


def _ordered(values: list[Any], colormap: str = COLORMAP) -> dict[Any, dict[str, Any]]:
    """Dark for small to light for large, told apart by line and marker as well."""
    return dict(zip(values, ordered(len(values), colormap), strict=True))


def frontier(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss against compute, a colour per model size.

    Parameters
    ----------
    table : DataFrame
        Columns features, compute, loss, kind.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Gid ``least`` (dotted) is the least loss within each budget.
    """
    ax = axes_or_new(ax)
    looks = _ordered(sorted(table["features"].unique()))
    curves(table, x="compute", by="features", looks=looks, ax=ax)
    spent = table[table["kind"] != "sample"].sort_values("compute")
    least = spent["loss"].cummin()
    look: dict[str, Any] = {"color": REFERENCE, "linewidth": 2.2, "linestyle": (0, (1, 1.6))}
    look["label"] = "best size"
    ax.plot(spent["compute"], least, gid="least", zorder=4, **look)
    ax.set(xscale="log", yscale="log", ylabel="expected loss + irreducible loss")
    ax.set_xlabel("compute (features $\\times$ examples)")
    ax.legend(title="features", loc="lower left")
    return ax


def decay_start(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the final loss against the share of steps in the decay, over the best loss.

    Parameters
    ----------
    table : DataFrame
        Columns decay (share of all steps), noise, loss, kind: one curve per label noise.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Dots (gid ``NOISE/best``) are the best shares.
    """
    ax = axes_or_new(ax)
    best = table.groupby("noise")["loss"].transform("min")
    relative = table.assign(relative=table["loss"] / best)
    looks = _ordered(sorted(table["noise"].unique()), "plasma")  # sizes have the other map
    names = {noise: f"{noise:g}" for noise in looks}
    curves(relative, x="decay", y="relative", by="noise", looks=looks, labels=names, ax=ax)
    for noise, rows in relative.groupby("noise"):
        best_share = rows["decay"].to_numpy()[rows["relative"].argmin()]
        own = looks[noise] | {"linestyle": "none"}
        ax.plot(best_share, 1.0, gid=f"{noise}/best", clip_on=False, **own)
    ax.set(xlabel="share of the steps spent on the decay", ylabel="final loss / best final loss")
    ax.set(xlim=(0.0, 1.0), ylim=(0.98, 2.5))
    ax.legend(title="label noise $\\sigma^2$", loc="upper right")
    return ax

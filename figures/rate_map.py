"""Heat map of the expected loss over (K, learning rate)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from figures.style import COLORMAP, UNSTABLE, axes_or_new, members_axis


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cell borders half-way between values on a logarithmic axis."""
    log = np.log(values)
    middle = (log[1:] + log[:-1]) / 2
    return np.asarray(np.exp(np.r_[2 * log[0] - middle[0], middle, 2 * log[-1] - middle[-1]]))


def rate_map(
    table: pd.DataFrame,
    *,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the loss as colour over K and the learning rate.

    Parameters
    ----------
    table : DataFrame
        Columns members, lr, loss, kind: ``exact`` for the grid (NaN where unstable), ``best`` and
        ``edge`` with one row per K.
    limits : (float, float), optional
        Range of the colours, to share between panels; by default the range of the losses.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Unstable cells are grey; gid ``edge`` is the stability edge, ``best`` the best rates.
    """
    ax = axes_or_new(ax)
    grid = table[table["kind"] == "exact"].pivot(index="lr", columns="members", values="loss")
    low, high = limits or (float(np.nanmin(grid)), float(np.nanmax(grid)))
    sizes = grid.columns.to_numpy(dtype=float)
    ax.set_facecolor(UNSTABLE)
    ax.pcolormesh(
        _edges(sizes),
        _edges(grid.index.to_numpy(dtype=float)),
        np.ma.masked_invalid(grid.to_numpy()),
        norm=LogNorm(low, high),
        cmap=COLORMAP,
        rasterized=True,
    )
    edge = table[table["kind"] == "edge"].sort_values("members")
    best = table[table["kind"] == "best"].sort_values("members")
    ax.plot(edge["members"], edge["lr"], color="black", linewidth=1.4, gid="edge")
    ax.plot(
        best["members"], best["lr"], "o-", color="white", markeredgecolor="black", gid="best",
        linewidth=0.8, markersize=4,
    )  # fmt: skip
    ax.set(yscale="log", xlabel="members $K$", ylabel=r"learning rate $\eta$")
    members_axis(ax, [int(k) for k in sizes])
    rates = grid.index.to_numpy(dtype=float)
    ax.set_ylim(_edges(rates)[0], _edges(rates)[-1])
    first = edge.iloc[0]
    ax.annotate(
        "unstable", (first["members"] * 1.1, min(first["lr"] * 1.15, rates[-1] * 0.95)),
        fontsize=7, va="bottom", ha="left",
    )  # fmt: skip
    return ax

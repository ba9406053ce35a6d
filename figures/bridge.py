"""A network beside its quadratic picture: spectrum, noise, and losses predicted and measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from figures.style import MARKERS, PALETTE, REFERENCE, axes_or_new, members_axis

#: A predicted and a measured rise within this factor agree well: drawn as a band.
BAND = 1.2
#: Shares of the largest below which a direction counts as noiseless, or is left out of the law.
NOISELESS, STIFF = 1e-9, 0.02


def spectrum(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How many directions there are, by size of their curvature.

    Parameters
    ----------
    table : DataFrame
        Columns curvature, count, kind; a row per eigenpair (``pair``) or node of the bulk
        (``bulk``).
    ax : Axes, optional
    """
    ax = axes_or_new(ax)
    counted = table[table["kind"] != "bulk noise"]
    size = counted["curvature"].abs()
    low = max(float(size.max()) * 1e-6, float(size[size > 0].min()))
    edges = np.geomspace(low, float(size.max()) * 1.01, 25)
    for sign, name, color in ((1, "h > 0", PALETTE[0]), (-1, "h < 0", PALETTE[1])):
        rows = counted[np.sign(counted["curvature"]) == sign]
        if rows.empty:
            continue
        heights, _ = np.histogram(rows["curvature"].abs(), edges, weights=rows["count"])
        ax.stairs(heights, edges, color=color, label=name, gid=name)
    ax.set(
        xscale="log", yscale="log", xlabel="|curvature h|", ylabel="directions", title="spectrum"
    )
    ax.legend(loc="best")
    return ax


def noise_against_curvature(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Gradient noise of one example along the stiffest directions.

    Parameters
    ----------
    table : DataFrame
        Columns curvature, noise_variance, kind.
    ax : Axes, optional
    """
    ax = axes_or_new(ax)
    rows = table[(table["kind"] == "pair") & (table["curvature"] > 0)]
    # Directions of weight decay alone carry rounding in place of noise.
    rows = rows[rows["noise_variance"] > NOISELESS * rows["noise_variance"].max()]
    h, c = rows["curvature"], rows["noise_variance"]
    ax.plot(h, c, "o", color=PALETTE[0], ms=2.5, gid="pairs")
    if (h > STIFF * h.max()).sum() > 1:
        stiff = h > STIFF * h.max()
        slope, offset = np.polyfit(np.log(h[stiff]), np.log(c[stiff]), 1)
        ends = np.array([h[stiff].min(), h.max()])
        line = np.exp(offset) * ends**slope
        ax.plot(ends, line, color=REFERENCE, lw=0.8, label=f"exponent {slope:.2f}", gid="law")
        ax.legend(loc="upper left")
    ax.set(xscale="log", yscale="log", xlabel="curvature h", ylabel="noise variance", title="noise")
    return ax


def against_members(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What noise adds to the loss of the mean of K, at the first batch size.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.compare` makes it.
    ax : Axes, optional
    """
    ax = axes_or_new(ax)
    rows = _first_size(table)
    for i, (lr, one) in enumerate(rows.groupby("lr")):
        _lines(ax, one, "members", i, f"lr {lr:.2g}")
        if (one["floor"] > 0).all():
            ax.axhline(one["floor"].iloc[0], color=PALETTE[i % len(PALETTE)], lw=0.6, ls=":")
    members_axis(ax, sorted(map(int, table["members"].unique())))
    ax.set(yscale="log", xlabel="K", ylabel="rise of the loss", title="members (dots: floor)")
    ax.legend(loc="best")
    return ax


def against_rate(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The same against the learning rate, for a few K."""
    ax = axes_or_new(ax)
    rows = _first_size(table)
    sizes = sorted(rows["members"].unique())
    for i, k in enumerate(sizes[:: max(1, (len(sizes) + 1) // 3)]):
        _lines(ax, rows[rows["members"] == k], "lr", i, f"K = {k}")
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="rise of the loss")
    ax.set_title("learning rate")
    ax.legend(loc="best")
    return ax


def against_batch_size(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The same against the batch size, at the learning rate that most sizes were tried with."""
    ax = axes_or_new(ax)
    tried = table.groupby("lr")["batch_size"].nunique()
    lr = float(tried.index[int(tried.to_numpy().argmax())])
    rows = table[table["lr"] == lr]
    sizes = sorted(rows["members"].unique())
    for i, k in enumerate(sizes[:: max(1, (len(sizes) + 1) // 3)]):
        _lines(ax, rows[rows["members"] == k], "batch_size", i, f"K = {k}")
    members_axis(ax, sorted(map(int, rows["batch_size"].unique())))
    ax.set(yscale="log", xlabel="batch size", ylabel="rise of the loss")
    ax.set_title(f"batch size, lr {lr:.2g}")
    ax.legend(loc="best")
    return ax


def ratios(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Measured over predicted rise, with two standard errors."""
    ax = axes_or_new(ax)
    for i, (lr, one) in enumerate(table.groupby("lr")):
        ax.errorbar(
            one["members"] * (1.0 + 0.05 * i), one["ratio"], 2.0 * one["ratio_error"],
            fmt=MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)], ms=2.5, lw=0.7,
            label=f"lr {lr:.2g}", gid=f"ratio/{lr:g}",
        )  # fmt: skip
    ax.axhspan(1.0 / BAND, BAND, color="#eeeeee", zorder=0)
    ax.axhline(1.0, color=REFERENCE, lw=0.7, zorder=0)
    members_axis(ax, sorted(map(int, table["members"].unique())))
    ax.set(xlabel="K", ylabel="measured / predicted", title=f"ratio (band: factor {BAND})")
    return ax


def _first_size(table: pd.DataFrame) -> pd.DataFrame:
    held: pd.DataFrame = table[table["batch_size"] == table["batch_size"].iloc[0]]
    return held


def _lines(ax: Axes, rows: pd.DataFrame, x: str, i: int, name: str) -> None:
    """Prediction as a line, measurement as markers with two standard errors."""
    rows = rows.sort_values(x)
    color = PALETTE[i % len(PALETTE)]
    ax.plot(rows[x], rows["predicted_rise"], color=color, label=name, gid=f"{name}/predicted")
    ax.errorbar(
        rows[x], rows["measured_rise"], 2.0 * rows["error"], fmt=MARKERS[i % len(MARKERS)],
        color=color, ms=3.0, lw=0.7, gid=f"{name}/measured",
    )  # fmt: skip

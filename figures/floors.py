"""Steady-state expected loss against the number of members K."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from figures.curves import curves, markers
from figures.style import MARKERS, PALETTE, REFERENCE, axes_or_new, members_axis

#: Learning rates of the mean model: shades of its colour, which has no other meaning.
BLUES = ("#002B45", PALETTE[0], PALETTE[5])
#: Everything compared at one learning rate: how it looks, and what it is called.
COMPARED: dict[str, tuple[dict[str, Any], str]] = {
    "mean model": ({"color": PALETTE[0], "marker": "o"}, "mean model"),
    "average member": ({"color": PALETTE[1], "marker": "s"}, "average member"),
    "K runs": ({"color": PALETTE[2], "marker": "^", "linestyle": "--"}, "mean of $K$ runs"),
    "SGD, lr, K B": (
        {"color": PALETTE[3], "marker": "x", "linestyle": ":"},
        r"SGD at $\eta$, batch $KB$",
    ),
    "SGD, lambda, K B": (
        {"color": PALETTE[4], "marker": "+", "linestyle": ":", "linewidth": 2.4},
        r"SGD at $\lambda = 2\eta$, batch $KB$",
    ),
    "SGD, equal data": (
        {"color": "0.35", "marker": "D", "linestyle": "-."},
        r"SGD at $\eta$, batch $B$ (equal data)",
    ),
    "mean model, long run": ({"color": PALETTE[0], "linestyle": ":"}, "mean model, long run"),
    "average member, long run": (
        {"color": PALETTE[1], "linestyle": ":"},
        "average member, long run",
    ),
}


def _finish(table: pd.DataFrame, ax: Axes) -> Axes:
    ax.set(yscale="log", xlabel="members $K$", ylabel="steady expected loss")
    members_axis(ax, sorted(int(k) for k in table["members"].unique()))
    return ax


def by_rate(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the steady loss of the mean model against K, a shade per learning rate.

    Parameters
    ----------
    table : DataFrame
        Columns series, kind, members, lr, loss, stderr; rows of one model and series ``mean model``
        are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Theory has lines, simulation markers; long-run floors are dotted.
    """
    ax = axes_or_new(ax)
    chosen = table[table["series"] == "mean model"]
    rates = sorted(chosen["lr"].unique(), reverse=True)
    looks: dict[Any, dict[str, Any]] = {lr: {"color": BLUES[i % 3]} for i, lr in enumerate(rates)}
    chosen = chosen.sort_values("lr", ascending=False)
    labels = {lr: rf"$\eta$ = {lr:.3g}" for lr in rates}
    curves(chosen[chosen["kind"] != "long_run"], x="members", by="lr", looks=looks, labels=labels,
           ax=ax)  # fmt: skip
    for lr, rows in chosen[chosen["kind"] == "long_run"].groupby("lr", sort=False):
        rows = rows.sort_values("members")
        ax.plot(rows["members"], rows["loss"], ":", gid=f"{lr}/long_run", **looks[lr])
    ax.legend(loc="lower left", title="learning rate", alignment="left")
    return _finish(table, ax)


def ratio(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw simulation over theory of the mean model against K, with 95 % intervals.

    Parameters
    ----------
    table : DataFrame
        Columns series, kind, members, lr, loss, stderr; rows of one model and series ``mean model``
        are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A shade per learning rate; points of one K are set side by side. A gid is ``LR/ratio``.
    """
    ax = axes_or_new(ax)
    chosen = table[table["series"] == "mean model"]
    theory = chosen[chosen["kind"].isin(["exact", "first_order"])]
    wide = chosen[chosen["kind"] == "sample"].merge(
        theory[["members", "lr", "loss"]], on=["members", "lr"], suffixes=("", "_theory")
    )
    rates = sorted(wide["lr"].unique(), reverse=True)
    for lr, rows in wide.groupby("lr"):
        i = rates.index(lr)
        aside = 1.09 ** (i - (len(rates) - 1) / 2)
        points = rows.assign(
            members=rows["members"] * aside,
            loss=rows["loss"] / rows["loss_theory"],
            stderr=rows["stderr"] / rows["loss_theory"],
        )
        look = {"color": BLUES[i % 3], "marker": MARKERS[i], "markersize": 3.0}
        markers(points, "members", "loss", "stderr", ax, **look, gid=f"{lr}/ratio")
    ax.axhline(1.0, color=REFERENCE, linewidth=1.0, zorder=1)
    ax.set(xlabel="members $K$", ylabel="simulation / theory")
    members_axis(ax, sorted(int(k) for k in table["members"].unique()))
    return ax


def compared(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the steady loss of all methods at one learning rate against K.

    Parameters
    ----------
    table : DataFrame
        Columns series, kind, members, lr, loss, stderr; the series are the keys of `COMPARED`, rows
        of one learning rate.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Theory has lines, simulation markers.
    """
    ax = axes_or_new(ax)
    series = table["series"].where(table["kind"] != "long_run", table["series"] + ", long run")
    shown = table.assign(series=series)
    order = {name: i for i, name in enumerate(COMPARED)}
    shown = shown.sort_values("series", key=lambda column: column.map(order))
    looks = {name: look for name, (look, _) in COMPARED.items()}
    labels = {name: label for name, (_, label) in COMPARED.items()}
    curves(shown, x="members", looks=looks, labels=labels, ax=ax)
    return _finish(table, ax)

"""Steps, rates and schedules against batch size, after Zhang et al. 2019."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from figures.style import REFERENCE, axes_or_new, look, ordered, plain_log

#: How each method is drawn; a colour is a preconditioner.
LOOKS: dict[str, tuple[dict[str, Any], str]] = {
    "momentum": ({"linestyle": "-"}, "with momentum"),
    "schedule": ({"linestyle": "-"}, "10-piece schedule"),
    "EMA": ({"linestyle": "-"}, "SGD with EMA"),
    "SGD": ({"linestyle": (0, (4, 1.6))}, "SGD, constant rate"),
}
#: Alone in a figure, plain SGD needs no dashes.
SOLID = {"linestyle": "-"}


def _batch_axis(ax: Axes, sizes: pd.Series) -> None:
    """Powers of two, ticked where they are few enough to read."""
    ax.set_xscale("log", base=2)
    low, high = int(np.log2(sizes.min())), int(np.log2(sizes.max()))
    every = 2 if high - low <= 12 else 4
    ax.set_xticks([2.0**k for k in range(low, high + 1, every)],
                  [f"$2^{{{k}}}$" for k in range(low, high + 1, every)])  # fmt: skip
    ax.xaxis.minorticks_off()
    ax.set_xlabel("batch size $B$")


def _looks(values: list[float]) -> dict[float, dict[str, Any]]:
    """Dark to light for small to large values, told apart by line and marker as well."""
    return dict(zip(sorted(values), ordered(len(values)), strict=True))


def _mark(index: int) -> dict[str, Any]:
    """Colour and marker of a preconditioner, or of a method alone in its figure."""
    own = look(index)
    return {"color": own["color"], "marker": own["marker"], "markersize": 2.6}


def _curves(table: pd.DataFrame, y: str, ax: Axes) -> list[Line2D]:
    """One line per method and preconditioner; a point that was not reached leaves a gap.

    Every line's gid is ``SERIES/EXPONENT``. Returns handles for a legend.
    """
    exponents = sorted(table["exponent"].dropna().unique())
    methods = [name for name in LOOKS if (table["series"] == name).any()]
    keys = table[["series", "exponent"]].drop_duplicates().itertuples(index=False)
    for series, exponent in keys:
        rows = table[(table["series"] == series) & (table["exponent"] == exponent)]
        rows = rows.sort_values("batch_size")
        place = exponents.index(exponent)
        line = dict(LOOKS[series][0]) if len(methods) > 1 else SOLID
        # Two methods and no preconditioners: colours tell the methods apart.
        place = place if len(exponents) > 1 else methods.index(series)
        gid = f"{series}/{exponent:g}"
        ax.plot(rows["batch_size"], rows[y], gid=gid, **_mark(place), **line)
    handles = []
    if len(exponents) > 1:
        handles = [Line2D([], [], label=_power(g), **_mark(i)) for i, g in enumerate(exponents)]
    if len(methods) > 1:
        alone = len(exponents) == 1
        handles += [
            Line2D([], [], label=LOOKS[name][1], **LOOKS[name][0],
                   **(_mark(i) if alone else {"color": "0.35"}))
            for i, name in enumerate(methods)
        ]  # fmt: skip
    return handles


def _power(exponent: float) -> str:
    return "no preconditioner" if exponent == 0 else f"$h^{{-{exponent:g}}}$"


def training_curves(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss against steps, a colour per learning rate.

    Parameters
    ----------
    table : DataFrame
        Columns step, loss, lr, kind: ``exact`` for the curves, ``floor`` with one row per rate.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Curves have the gid ``LR``, floors (dotted) ``LR/floor``.
    """
    ax = axes_or_new(ax)
    path, floor = table[table["kind"] == "exact"], table[table["kind"] == "floor"]
    rates = sorted(path["lr"].unique(), reverse=True)
    colors = {lr: own["color"] for lr, own in _looks(rates).items()}  # names stand at the floors
    for lr in rates:
        rows = path[(path["lr"] == lr) & (path["step"] > 0)].sort_values("step")
        ax.plot(rows["step"], rows["loss"], color=colors[lr], gid=f"{lr:g}")
        level = float(floor.loc[floor["lr"] == lr, "loss"].iloc[0])
        ax.axhline(level, color=colors[lr], linestyle=":", linewidth=0.9, gid=f"{lr:g}/floor")
        ax.annotate(rf"$\eta$ = {lr:.3g}", (1.0, level), xycoords=ax.get_yaxis_transform(),
                    xytext=(4, 0), textcoords="offset points", va="center", fontsize=7,
                    color=colors[lr])  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="training step", ylabel="expected loss")
    ax.set_xlim(1, path["step"].max())
    plain_log(ax.yaxis)
    return ax


def targets(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the fewest steps against the batch size, a colour per target.

    Parameters
    ----------
    table : DataFrame
        Columns batch_size, step, target.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A curve's gid is its target; a dotted line of slope -1 has ``TARGET/scaling``.
    """
    ax = axes_or_new(ax)
    levels = sorted(table["target"].unique(), reverse=True)
    looks = _looks(levels)
    for target in levels:
        rows = table[table["target"] == target].sort_values("batch_size")
        own = looks[target] | {"linestyle": "-", "markersize": 2.6}
        name = f"{target:.3g}"
        ax.plot(rows["batch_size"], rows["step"], label=name, gid=f"{target:g}", **own)
        sizes = rows["batch_size"].to_numpy(dtype=float)
        scaled = rows["step"].iloc[0] * sizes[0] / sizes
        seen = scaled >= 0.3 * float(rows["step"].min())
        ax.plot(sizes[seen], scaled[seen], color=REFERENCE, linewidth=0.6, linestyle=":",
                zorder=1, gid=f"{target:g}/scaling")  # fmt: skip
    ax.plot([], [], color=REFERENCE, linewidth=0.6, linestyle=":", label="equal examples")
    ax.set(yscale="log", ylabel="steps to target")
    _batch_axis(ax, table["batch_size"])
    ax.legend(title="target loss", loc="upper right")
    plain_log(ax.yaxis)
    return ax


def steps(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the fewest steps against the batch size, with the bound.

    Parameters
    ----------
    table : DataFrame
        Columns batch_size, step, series, exponent, kind: ``bound`` for the reference line.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A colour per preconditioner, a line style per method; a gid is ``SERIES/EXPONENT``.
    """
    ax = axes_or_new(ax)
    line = table[table["kind"] == "bound"].sort_values("batch_size")
    found = table[table["kind"] != "bound"]
    handles = _curves(found, "step", ax)
    ax.plot(line["batch_size"], line["step"], color=REFERENCE, linewidth=1.0, linestyle=":",
            gid="bound", label="bound")  # fmt: skip
    handles += [ax.lines[-1]]
    ax.set(yscale="log", ylabel="steps to target")
    ax.set_ylim(0.5 * found["step"].min(), 2.0 * found["step"].max())
    _batch_axis(ax, found["batch_size"])
    ax.legend(handles=handles, loc="upper right")
    plain_log(ax.yaxis)
    return ax


def best_rates(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the best constant rate against the batch size, a colour per preconditioner.

    Parameters
    ----------
    table : DataFrame
        Columns batch_size, lr, exponent, kind, edge.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Gid ``edge`` is the stability edge.
    """
    ax = axes_or_new(ax)
    found = table[table["kind"] == "exact"].assign(series="SGD")
    handles = _curves(found, "lr", ax)
    edge = float(table["edge"].iloc[0])
    ax.axhline(edge, color=REFERENCE, linewidth=0.8, linestyle=":", gid="edge")
    ax.annotate("stability edge", (found["batch_size"].min(), 1.1 * edge), fontsize=7, va="bottom")
    ax.set(yscale="log", ylabel=r"best learning rate $\eta$")
    ax.set_ylim(top=1.8 * edge)  # room for the edge's name
    _batch_axis(ax, found["batch_size"])
    ax.legend(handles=handles, loc="lower right")
    plain_log(ax.yaxis)
    return ax


def effective_rates(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the best effective rate lr / (1 - momentum) against the batch size.

    Parameters
    ----------
    table : DataFrame
        Columns batch_size, effective_lr, series, exponent.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A colour per preconditioner, a line style per method; a gid is ``SERIES/EXPONENT``.
    """
    ax = axes_or_new(ax)
    handles = _curves(table, "effective_lr", ax)
    ax.set(yscale="log", ylabel=r"effective rate $\eta / (1 - \mu)$")
    _batch_axis(ax, table["batch_size"])
    ax.legend(handles=handles, loc="lower right")
    plain_log(ax.yaxis)
    return ax


def memories(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw 1 - momentum of the best setting against the batch size.

    Parameters
    ----------
    table : DataFrame
        Columns batch_size, momentum, series, exponent.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A colour per preconditioner, a line style per method; a gid is ``SERIES/EXPONENT``.
    """
    ax = axes_or_new(ax)
    _curves(table.assign(left=1.0 - table["momentum"]), "left", ax)
    ax.set(yscale="log", ylabel=r"best $1 - \mu$")
    _batch_axis(ax, table["batch_size"])
    plain_log(ax.yaxis)
    return ax


def schedules(table: pd.DataFrame, *, share: bool = False, ax: Axes | None = None) -> Axes:
    """Draw the rates of optimised schedules over time, a colour per batch size.

    Parameters
    ----------
    table : DataFrame
        Columns begin, length, lr, batch_size, step: one row per piece.
    share : bool
        Draw against the share of training, not against steps.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A curve's gid is its batch size.
    """
    ax = axes_or_new(ax)
    sizes = sorted(table["batch_size"].unique())
    looks = _looks(sizes)
    for size in sizes:
        rows = table[(table["batch_size"] == size) & (table["length"] > 0)].sort_values("begin")
        total = float(rows["step"].iloc[0])
        edges = np.r_[rows["begin"], total] / (total if share else 1.0)
        label = f"$2^{{{round(np.log2(size))}}}$"
        own = {name: looks[size][name] for name in ("color", "linestyle")}
        ax.stairs(rows["lr"], edges, linewidth=1.2, baseline=None, label=label, gid=f"{size:g}",
                  **own)  # fmt: skip
    ax.set(yscale="log", ylabel=r"learning rate $\eta$")
    if share:
        ax.set(xlabel="share of training", xlim=(0, 1))
        ax.legend(title="batch size $B$", loc="lower left", ncols=2, columnspacing=1.0)
    else:
        ax.set(xscale="log", xlabel="training step")
        ax.set_xlim(left=0.5 * float(table.loc[table["begin"] > 0, "begin"].min()))
    plain_log(ax.yaxis)
    return ax

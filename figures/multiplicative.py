"""Multiplicative late-phase weights: floors, their approach, and the first-order error."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from figures.curves import markers
from figures.style import MARKERS, REFERENCE, axes_or_new, members_axis, ordered, shades
from nqm.table import label


def floors(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw quasi-steady and long-run floors against K, with simulations.

    Parameters
    ----------
    table : DataFrame
        Columns kind (``first_order``, ``long_run``, ``sample, short``, ``sample, long``), members,
        loss, stderr.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A gid is the kind; ``guide`` is a line of slope -1/2.
    """
    ax = axes_or_new(ax)
    by = {kind: rows.sort_values("members") for kind, rows in table.groupby("kind")}
    looks = (
        ("first_order", "sample, short", "quasi-steady", "-"),
        ("long_run", "sample, long", "long run", "--"),
    )
    for i, (theory, run, name, style) in enumerate(looks):
        rows = by[theory]
        ax.plot(rows["members"], rows["loss"], style, color=REFERENCE, label=name, gid=theory)
        look = {"color": REFERENCE, "marker": MARKERS[i]}
        markers(by[run], "members", "loss", "stderr", ax, label="_", **look, gid=run)
    late = by["long_run"]
    k = late["members"].to_numpy(dtype=float)
    guide = 1.6 * float(late["loss"].iloc[-1]) * (k / k[-1]) ** -0.5
    ax.plot(k[-4:], guide[-4:], color="0.5", linewidth=0.8, gid="guide")
    ax.text(k[-3], 1.15 * guide[-3], r"$K^{-1/2}$", fontsize=7, color="0.3", va="bottom")
    ax.set(yscale="log", xlabel="members $K$", ylabel=label("loss"), title="floors")
    members_axis(ax, [int(value) for value in k])
    ax.legend(loc="lower left")
    return ax


def course(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss over time by simulation and closure, in units of the quasi-steady floor.

    Parameters
    ----------
    table : DataFrame
        Columns kind (``sample`` or ``closure``), members, step, loss, stderr, quasi_steady,
        long_run.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A colour per K; lines: the moment closure; dashed: the long-run floors.
    """
    ax = axes_or_new(ax)
    colors = shades(table["members"].nunique())
    for i, (k, each) in enumerate(table.groupby("members")):
        closed = each[each["kind"] == "closure"].sort_values("step")
        rows = each[each["kind"] == "sample"].sort_values("step")
        line = closed["loss"] / closed["quasi_steady"]
        ax.plot(closed["step"], line, color=colors[i], linewidth=1.0, gid=f"{k}/closure")
        unit = rows["quasi_steady"]
        points = rows.assign(loss=rows["loss"] / unit, stderr=rows["stderr"] / unit)
        look = {"color": colors[i], "marker": MARKERS[i], "markersize": 3.2}
        look["label"] = f"$K$ = {k}"
        markers(points, "step", "loss", "stderr", ax, **look, gid=f"{k}/course")
        end = float(rows["long_run"].iloc[0] / unit.iloc[0])
        last = float(table["step"].max())
        ax.plot([last / 3, 1.6 * last], [end, end], "--", color=colors[i], linewidth=1.0)
    ax.axhline(1.0, color=REFERENCE, linewidth=1.0, zorder=1)
    ax.set(xscale="log", xlabel="cycles", ylabel="loss / quasi-steady floor", title="the way there")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    ax.legend(loc="upper left", handletextpad=0.3, ncols=2, columnspacing=0.8)
    return ax


def first_order_error(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the absolute relative error of the first order against the noise variance.

    The average member has open markers, with lines proportional to v fitted to variances up to
    3.1e-3; the mean model, at the largest rate, has crosses. Points within two standard errors of
    zero are omitted: a logarithmic axis cannot show them.

    Parameters
    ----------
    table : DataFrame
        Columns series (``mean model``, ``average member``), lr, variance, loss (the relative
        error), stderr.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Gids ``LR/error``, ``LR/linear`` and ``mean/error``.
    """
    ax = axes_or_new(ax)
    seen = table[table["loss"].abs() > 2.0 * table["stderr"]]
    seen = seen.assign(loss=seen["loss"].abs()).sort_values("variance")
    member = seen[seen["series"] == "average member"]
    rates = member.groupby("lr")
    for own, (lr, rows) in zip(ordered(rates.ngroups, "plasma"), rates, strict=True):
        look = {"color": own["color"], "marker": own["marker"]}
        look["label"] = rf"member, $\eta$ = {lr:g}"
        markers(rows, "variance", "loss", "stderr", ax, **look, gid=f"{lr}/error")
        weight = 1.0 / (rows["stderr"] / rows["loss"]) ** 2 * (rows["variance"] <= 3.1e-3)
        scale = float(np.average(rows["loss"] / rows["variance"], weights=weight))
        v = np.array([table["variance"].min(), table["variance"].max()])
        ax.plot(v, scale * v, color=own["color"], linewidth=1.0, zorder=1, gid=f"{lr}/linear")
    largest = float(table["lr"].max())
    mean = seen[(seen["series"] == "mean model") & (seen["lr"] == largest)]
    look = {"color": REFERENCE, "marker": "x", "label": rf"mean, $\eta$ = {largest:g}"}
    markers(mean, "variance", "loss", "stderr", ax, **look, gid="mean/error")
    ax.set(xscale="log", yscale="log", title="error of the first order")
    ax.set(xlabel="noise variance $v$ of a minibatch", ylabel="|simulation / first order - 1|")
    ax.legend(loc="upper left", handletextpad=0.3)
    low, high = ax.get_ylim()
    ax.set_ylim(low, 8 * high)
    return ax


def error_map(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw relative errors as a map over noise variance and learning rate.

    Parameters
    ----------
    table : DataFrame
        Columns variance, lr, error (relative) and in_range; one row for each pair.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        A cell has its error in per cent, in brackets where the result says it is out of range;
        its colour is the error's size, from 0 to 20 %.
    """
    ax = axes_or_new(ax)
    grid = table.pivot(index="lr", columns="variance", values="error")
    inside = table.pivot(index="lr", columns="variance", values="in_range").to_numpy()
    errors = grid.to_numpy(dtype=float)
    shown = np.abs(errors)
    ax.imshow(shown, origin="lower", aspect="auto", cmap="Oranges", vmin=0.0, vmax=0.2, gid="map")
    for i, j in np.ndindex(*shown.shape):
        text = f"{100.0 * errors[i, j]:+.1f}"
        text = text if inside[i, j] else f"({text})"
        color = "white" if shown[i, j] > 0.15 else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize=6, color=color)
    ax.set_xticks(range(grid.shape[1]), [f"{v:g}" for v in grid.columns])
    ax.set_yticks(range(grid.shape[0]), [f"{lr:g}" for lr in grid.index])
    ax.set(xlabel="noise variance $v$", ylabel=r"rate $\eta$")
    return ax

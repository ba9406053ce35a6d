"""Training of a real linear regression beside two theories of it."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from figures.curves import markers
from figures.style import REFERENCE, axes_or_new, members_axis, ordered
from nqm.table import label

#: Additive theory dashed, exact moments with state-dependent noise solid, training as markers.
STYLES = {"additive": (0, (4, 1.5)), "exact": "-"}
#: Map of the shades of a quantity: a page shows K and rates, each in colours of its own.
MAPS = {"members": "viridis", "lr": "plasma"}


def _draw(table: pd.DataFrame, x: str, by: str, text: str, ax: Axes) -> Axes:
    groups = table.groupby(by)
    for own, (group, rows) in zip(ordered(groups.ngroups, MAPS[by]), groups, strict=True):
        for kind, style in STYLES.items():
            line = rows[rows["kind"] == kind].sort_values(x)
            ax.plot(
                line[x], line["loss"], linestyle=style, color=own["color"], gid=f"{group}/{kind}"
            )
        look = {"color": own["color"], "marker": own["marker"], "label": f"{text} = {group:g}"}
        run = rows[rows["kind"] == "sample"]
        markers(run, x, "loss", "stderr", ax, markersize=3.5, **look, gid=f"{group}/sample")
    return ax


def _styles(ax: Axes) -> None:
    """Legend entries of the two theories."""
    for kind, text in (("additive", "additive theory"), ("exact", "exact moments")):
        ax.plot([], [], linestyle=STYLES[kind], color=REFERENCE, label=text)


def transient(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss over cycles at one rate, a colour per K.

    Parameters
    ----------
    table : DataFrame
        Columns kind (``additive``, ``exact``, ``sample``), loss, stderr, step, members; rows of one
        rate.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        The additive theory is dashed, exact moments are solid, training has markers; a gid is
        ``GROUP/KIND``.
    """
    ax = _draw(table, "step", "members", "$K$", axes_or_new(ax))
    _styles(ax)
    ax.set(xscale="log", yscale="log", xlabel="cycles", ylabel="training loss - minimum")
    ax.legend(loc="lower left")
    return ax


def against_members(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss at one time against K, a colour per rate.

    Parameters
    ----------
    table : DataFrame
        Columns kind (``additive``, ``exact``, ``sample``), loss, stderr, members, lr; rows of one
        step.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        The additive theory is dashed, exact moments are solid, training has markers; a gid is
        ``GROUP/KIND``.
    """
    ax = _draw(table, "members", "lr", r"$\eta$", axes_or_new(ax))
    ax.set(yscale="log", xlabel="members $K$", ylabel="training loss - minimum")
    members_axis(ax, sorted(int(k) for k in table["members"].unique()))
    ax.legend(loc="lower left")
    return ax


def ratio(table: pd.DataFrame, *, x: str, ax: Axes | None = None) -> Axes:
    """Draw the loss over the additive theory, against time or rate, a colour per K.

    Parameters
    ----------
    table : DataFrame
        Columns kind (``additive``, ``exact``, ``sample``), loss, stderr, additive_loss, members,
        step, lr; rows of one rate (`x` = step) or one step (lr).
    x : {"step", "lr"}
        Column of the x axis.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Exact moments are solid, training has markers, set side by side for `x` = lr.
    """
    table = table.assign(
        loss=table["loss"] / table["additive_loss"],
        stderr=table["stderr"] / table["additive_loss"],
    )
    if x == "lr":  # set the sizes side by side, so that every marker is seen
        sizes = sorted(table["members"].unique())
        aside = table["members"].map({k: i - (len(sizes) - 1) / 2 for i, k in enumerate(sizes)})
        table["lr"] *= 1.0 + 0.025 * aside * (table["kind"] == "sample")
    ax = _draw(table, x, "members", "$K$", axes_or_new(ax))
    for line in [line for line in ax.lines if str(line.get_gid()).endswith("/additive")]:
        line.remove()
    ax.axhline(1.0, color=REFERENCE, linestyle=STYLES["additive"], linewidth=1.0, gid="additive")
    ax.set(ylabel="loss / additive theory")
    if x == "step":
        ax.set(xscale="log", xlabel="cycles")
    else:
        rates = sorted(table.loc[table["kind"] == "exact", "lr"].unique())
        ax.set(xlabel=rf"{label('lr')} $\eta$", xscale="log")
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.xaxis.minorticks_off()
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    ax.legend(loc="upper left", ncols=3, columnspacing=1.0, handletextpad=0.3)
    return ax

"""Late-phase settings before and after the change of variables to (lambda, K B)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from figures.curves import markers
from figures.style import MARKERS, REFERENCE, axes_or_new, plain_log, shades


def _drawn(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of simulations; those of theory where nothing is simulated."""
    sampled = table["kind"] == "sample"
    drawn = table[sampled] if sampled.any() else table[table["kind"] == "exact"]
    return drawn.astype({"members": int})


def _points(table: pd.DataFrame, ax: Axes, x: str, scaled: bool, legend: bool) -> None:
    """Monte Carlo points: colour is K, marker is gamma."""
    run = _drawn(table)
    colors = shades(run["members"].nunique())
    for i, (gamma, of_gamma) in enumerate(run.groupby("gamma_rule", sort=False)):
        for j, (k, rows) in enumerate(of_gamma.groupby("members")):
            factor = rows["members"] * rows["batch_size"] if scaled else 1.0
            points = rows.assign(loss=rows["loss"] * factor, stderr=rows["stderr"] * factor)
            label = f"$K$ = {k}" if legend and i == 0 else "_"
            look = {"color": colors[j], "marker": MARKERS[i], "label": label}
            markers(
                points, x, "loss", "stderr", ax, markersize=3.5, **look, gid=f"{gamma}/{k}/sample"
            )


def scattered(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss of every setting against the base learning rate.

    Parameters
    ----------
    table : DataFrame
        Columns members, batch_size, gamma_rule, lr, effective_lr, kind, loss, stderr; rows of kind
        ``sample`` are drawn.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Colour is K, marker is gamma; points of one rate are shifted by K. A gid is
        ``GAMMA/K/sample``.
    """
    ax = axes_or_new(ax)
    table = _drawn(table)
    # Points that share a rate are moved aside by K, so that each is seen.
    sizes = sorted(table["members"].unique())
    aside = {k: 1.12 ** (i - (len(sizes) - 1) / 2) for i, k in enumerate(sizes)}
    moved = table.assign(lr=table["lr"] * table["members"].map(aside))
    _points(moved, ax, "lr", scaled=False, legend=True)
    ax.set(xscale="log", yscale="log", title="at the base learning rate")
    rates = sorted(table["lr"].unique())
    ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    ax.xaxis.minorticks_off()
    ax.set(xlabel=r"base learning rate $\eta_\theta$", ylabel="expected loss")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.35)
    ax.legend(ncols=2, loc="upper left", columnspacing=0.8, handletextpad=0.2)
    return ax


def collapsed(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw loss times K B against lambda, with the closed form of plain SGD.

    Parameters
    ----------
    table : DataFrame
        Columns members, batch_size, gamma_rule, lr, effective_lr, kind, loss, stderr; rows of kind
        ``sample`` are drawn (``exact`` if there are none), and the curve of kind ``curve``: loss of
        plain SGD at one example.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Colour is K, marker is gamma; the curve's gid is ``sgd``.
    """
    ax = axes_or_new(ax)
    _points(table, ax, "effective_lr", scaled=True, legend=False)
    curve = table[table["kind"] == "curve"].sort_values("effective_lr")
    look: dict[str, Any] = {"color": REFERENCE, "zorder": 1, "label": "plain SGD", "gid": "sgd"}
    ax.plot(curve["effective_lr"], curve["loss"], **look)
    for i, gamma in enumerate(table["gamma_rule"].dropna().unique()):
        look = {"marker": MARKERS[i], "color": "0.4", "markerfacecolor": "white"}
        ax.plot([], [], linestyle="none", label=rf"$\gamma = {gamma}$", **look)
    ax.set(xscale="log", yscale="log", title="in SGD's own terms")
    ax.set(xlabel=r"$\lambda = \eta_\phi + \gamma K \eta_\theta$")
    ax.set(ylabel=r"expected loss $\times\ K B$")
    plain_log(ax.xaxis)
    ax.legend(loc="upper left")
    return ax


def remainder(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the simulated loss over the closed form of plain SGD, against lambda.

    Parameters
    ----------
    table : DataFrame
        Columns members, batch_size, gamma_rule, lr, effective_lr, kind, loss, stderr; rows of kind
        ``sample`` are drawn. Also curve, the closed form.
    ax : Axes, optional
        Axes to draw on; by default those of a new figure.

    Returns
    -------
    Axes
        Colour is K, marker is gamma.
    """
    ax = axes_or_new(ax)
    run = _drawn(table)
    ratio = run.assign(loss=run["loss"] / run["curve"], stderr=run["stderr"] / run["curve"])
    _points(ratio, ax, "effective_lr", scaled=False, legend=False)
    ax.axhline(1.0, color=REFERENCE, zorder=1, linewidth=1.0)
    reach = 1e-3 + 1.25 * float((np.abs(ratio["loss"] - 1.0) + 1.96 * ratio["stderr"]).max())
    ax.set(xscale="log", ylim=(1 - reach, 1 + reach), title="what is left over")
    ax.set(xlabel=r"$\lambda$", ylabel="simulation / SGD's closed form")
    plain_log(ax.xaxis)
    return ax

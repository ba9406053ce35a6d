"""Every method's final loss at equal data, over that of SGD at its best constant rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from figures.curves import WIDTH95
from figures.style import PALETTE, REFERENCE, axes_or_new

#: What the losses are divided by, and the reference drawn beside it.
UNIT, HONEST = "sgd", "sgd_linear"
_TICK: dict[str, Any] = {
    "marker": "|", "linestyle": "none", "markersize": 9.0, "markeredgewidth": 1.6
}  # fmt: skip
_MARKER: dict[str, Any] = {
    "linestyle": "none", "markersize": 3.6, "markerfacecolor": "white",
    "markeredgewidth": 0.9,
}  # fmt: skip
_BOUND: dict[str, Any] = {"color": PALETTE[3], "linewidth": 1.0, "linestyle": (0, (1, 1.5))}
#: Colour of each family of methods, and the marker of its simulations.
COLORS = {"last iterate": REFERENCE, "mean over time": PALETTE[0], "mean over runs": PALETTE[1]}
SHAPES = dict(zip(COLORS, ("D", "o", "s"), strict=True))
_UNIT: dict[str, Any] = {"color": "0.6", "linewidth": 0.8}
_HONEST = _UNIT | {"linestyle": (0, (4, 3))}


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Return exact losses over that of SGD at a constant rate.

    Parameters
    ----------
    table : DataFrame
        Columns method, spectrum, noise, kind, loss; rows of kind ``exact`` are used.

    Returns
    -------
    DataFrame
        Index: method; columns: (spectrum, noise).
    """
    exact = table[table["kind"] == "exact"]
    wide = exact.pivot_table(
        index="method", columns=["spectrum", "noise"], values="loss", sort=False
    )
    return wide / wide.loc[UNIT]


def order(table: pd.DataFrame) -> list[str]:
    """Order the methods by their mean rank over the problems.

    Parameters
    ----------
    table : DataFrame
        Columns method, spectrum, noise, kind, loss, as for `ratios`.

    Returns
    -------
    list of str
        The best method first; equal losses share a rank.
    """
    rank = ratios(table).round(6).rank().mean(axis=1)
    return [str(name) for name in rank.sort_values(kind="stable").index]


def panel(table: pd.DataFrame, rows: list[str], *, ax: Axes | None = None) -> Axes:
    """One problem: ticks are theory, open markers simulation with 95 % error bars.

    Parameters
    ----------
    table : DataFrame
        Columns method, label, family, kind, loss, stderr, bound; of one problem.
    rows : list of str
        Methods from the top down.
    ax : Axes, optional

    Returns
    -------
    Axes
        A tick's gid is ``METHOD``, its marker's ``METHOD/sample``; the gid ``bound`` marks what no
        linear method could reach.
    """
    ax = axes_or_new(ax)
    exact, run = (table[table["kind"] == kind].set_index("method") for kind in ("exact", "sample"))
    theory = exact["loss"].to_dict()
    unit = theory[UNIT]
    drawn = (run[["loss", "stderr"]] / unit).to_dict()
    ax.axvline(1.0, zorder=1, **_UNIT)
    ax.axvline(theory[HONEST] / unit, gid="honest", zorder=1, **_HONEST)
    ax.axvline(exact["bound"].iloc[0] / unit, gid="bound", zorder=1, **_BOUND)
    for y, name in enumerate(rows):
        family = exact["family"].to_dict()[name]
        color = COLORS[family]
        ratio = theory[name] / unit
        ax.plot([1.0, ratio], [y, y], color=color, linewidth=0.8, alpha=0.35, zorder=2)
        ax.plot([ratio], [y], color=color, zorder=3, gid=name, **_TICK)
        width = [WIDTH95 * drawn["stderr"][name]]
        look: Any = _MARKER | {"color": color, "marker": SHAPES[family]}
        look |= {"elinewidth": 0.9, "zorder": 4}
        bar = ax.errorbar([drawn["loss"][name]], [y], xerr=width, **look)
        bar[0].set_gid(f"{name}/sample")
    ax.set(xscale="log", ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(np.arange(len(rows)), [exact["label"].to_dict()[name] for name in rows])
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.spines["left"].set_visible(False)
    return ax


def page(table: pd.DataFrame, figure: Figure) -> None:
    """Draw a panel per problem, noise by row and spectrum by column.

    Parameters
    ----------
    table : DataFrame
        Columns method, spectrum, noise, kind, loss, label, family, stderr, bound.
    figure : Figure
        Empty figure to draw on. All panels have the same order of methods.
    """
    noises, spectra = table["noise"].unique(), table["spectrum"].unique()
    grid = figure.subplots(len(noises), len(spectra), sharex="row", sharey=True, squeeze=False)
    rows = order(table)
    for i, noise in enumerate(noises):
        for j, spectrum in enumerate(spectra):
            chosen = (table["noise"] == noise) & (table["spectrum"] == spectrum)
            ax = panel(table[chosen], rows, ax=grid[i, j])
            ax.set_title(f"{spectrum}, {noise}", loc="left")
    for ax in grid[:, 0]:
        low, high = ax.get_xlim()
        subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs))
    figure.supxlabel("final loss / that of SGD at its best constant rate, equal data", fontsize=8)
    columns = 4 if len(spectra) > 1 else 2
    figure.legend(handles=_legend(), loc="outside upper center", ncols=columns, fontsize=7)


def _legend() -> list[Line2D]:
    """Colours and shapes of families, theory, simulations, and the vertical lines."""
    families = [
        Line2D([], [], label=f"{name}, simulated", color=color, marker=SHAPES[name], **_MARKER)
        for name, color in COLORS.items()
    ]
    return [
        *families,
        Line2D([], [], label="theory", color=REFERENCE, **_TICK),
        Line2D([], [], label="SGD, constant rate", **_UNIT),
        Line2D([], [], label="SGD, linear decay", **_HONEST),
        Line2D([], [], label="bound of linear methods", **_BOUND),
    ]

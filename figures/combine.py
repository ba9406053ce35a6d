"""Combined models: soups and ensembles beside their members, predicted and measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from figures.plot import t_interval
from figures.style import (
    COLORMAP,
    LINES,
    MARKERS,
    MORE,
    MORE_MARKERS,
    PALETTE,
    REFERENCE,
    axes_or_new,
    legend_above,
    legend_free,
    look,
)
from nqm.table import label as axis_label

#: Colour of what is averaged, and its marker.
SPACES = {"weights": PALETTE[0], "probabilities": PALETTE[1], "logits": PALETTE[2]}
SHAPES = dict(zip(SPACES, MARKERS, strict=False))
MEMBER = "#888888"
#: Colour and line of each way to round; pages show what is averaged beside it.
ROUNDING = {
    "stochastic": (PALETTE[3], LINES[0]),
    "nearest": (PALETTE[4], LINES[4]),
    "antithetic": (PALETTE[5], LINES[2]),
    "gaussian": (MORE[0], LINES[3]),
}


def name_of(row: pd.Series) -> str:
    """Name of a combined model for an axis.

    Parameters
    ----------
    row : Series
        Entries rule, space and repair.

    Returns
    -------
    str
    """
    name = str(row["rule"]).replace("_", " ")
    if str(row["rule"]).startswith("ensemble"):
        return name if row["space"] == "probabilities" else f"{name} ({row['space']})"
    several = row.get("several_repairs", False)
    return f"{name}, {row['repair']}" if several else name


def decomposition(table: pd.DataFrame, *, legend: bool = True, ax: Axes | None = None) -> Axes:
    """Loss of every combination: the mean member's, less what combining gains.

    Parameters
    ----------
    table : DataFrame
        Columns rule, space, repair, nll and mean_member_nll of one set of data, a row a
        combination.
    legend : bool
        False leaves the legend to the page.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    rows = _combined(table)
    y = np.arange(len(rows))[::-1]
    for at, (_, row) in zip(y, rows.iterrows(), strict=True):
        ax.plot([row["mean_member_nll"], row["nll"]], [at, at], color=MEMBER, lw=0.8, zorder=1)
    ax.plot(rows["mean_member_nll"], y, "|", color=REFERENCE, label="mean member", gid="mean")
    for space, color in SPACES.items():
        held = (rows["space"] == space).to_numpy()
        if held.any():
            ax.plot(rows["nll"][held], y[held], SHAPES[space], color=color, label=space, gid=space)
    ax.set_yticks(y, [name_of(row) for _, row in rows.iterrows()])
    ax.set(xlabel="negative log-likelihood (nats)", title="what combining gains")
    _log_if_wide(ax, "x", pd.concat([rows["nll"], rows["mean_member_nll"]]))
    if legend:
        legend_free(ax)
    return ax


def predicted(table: pd.DataFrame, *, legend: bool = True, ax: Axes | None = None) -> Axes:
    """Predicted against measured loss, one point a model.

    Parameters
    ----------
    table : DataFrame
        Columns rule, space, nll, predicted and predicted_from.
    legend : bool
        False leaves the legend to the page.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    rows = table[(table["predicted"] > 0) & np.isfinite(table["predicted"])]
    single = rows["rule"] == "member"
    mean = rows["rule"] == "mean_member"
    groups = [
        ("member", rows[single], MEMBER, "."),
        ("mean member", rows[mean], REFERENCE, "|"),  # as in `decomposition`
    ]
    for space, color in SPACES.items():
        part = rows[~single & ~mean & (rows["space"] == space)]
        groups.append((space, part, color, SHAPES[space]))
    for label, part, color, marker in groups:
        if len(part):
            ax.plot(part["nll"], part["predicted"], marker, color=color, label=label, gid=label)
    if len(rows):
        ends = np.array(
            [rows[["nll", "predicted"]].min().min(), rows[["nll", "predicted"]].max().max()]
        )
        ends = ends * [0.97, 1.03]
        ax.plot(ends, ends, color=REFERENCE, lw=0.7, zorder=0, gid="identity")
        both = pd.concat([rows["nll"], rows["predicted"]])
        for axis in "xy":
            _log_if_wide(ax, axis, both)
        if legend:
            legend_free(ax)
    inside = bool((rows["predicted_from"] == "surrogate").all())
    ax.set(
        xlabel="measured loss (nats)",
        ylabel="predicted loss (nats)",
        title="prediction" if inside else "prediction (outside its range)",
    )
    return ax


def ways(
    table: pd.DataFrame, *, names: Iterable[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Predicted against measured loss of every way of combining, over several comparisons.

    Parameters
    ----------
    table : DataFrame
        Columns comparison, space, nll, predicted and mean_member_nll: a row a way.
    names : iterable of str, optional
        Comparisons of all panels of a page, which have their colours by this order; by default
        those of the table.
    ax : Axes, optional

    Returns
    -------
    Axes
        Both losses relative to the mean member's, so that all comparisons fit; one colour a
        comparison, one marker for what is averaged.
    """
    ax = axes_or_new(ax)
    colors = _of_comparisons(table["comparison"] if names is None else names)
    for name in dict.fromkeys(table["comparison"]):
        color, face = colors[name]
        here = table[table["comparison"] == name]
        for space, marker in SHAPES.items():
            part = here[here["space"] == space]
            x, y = part["nll"], part["predicted"]
            mean = part["mean_member_nll"]
            ax.plot(x / mean, y / mean, marker, color=color, mfc=face, gid=f"{name} {space}")
        ax.plot([], [], "s", color=color, mfc=face, label=name)
    for space, marker in SHAPES.items():
        ax.plot([], [], marker, color=MEMBER, label=f"mean of {space}")
    both = pd.concat([table["nll"], table["predicted"]]) / pd.concat([table["mean_member_nll"]] * 2)
    ends = [float(both.min()) * 0.97, float(both.max()) * 1.03]
    ax.plot(ends, ends, color=REFERENCE, lw=0.7, zorder=0, gid="identity")
    ax.axvline(1.0, color=REFERENCE, lw=0.5, ls=":", zorder=0)
    for axis in "xy":
        _log_if_wide(ax, axis, both)
    ax.set(xlabel="measured loss / mean member", ylabel="predicted loss / mean member")
    return ax


def _of_comparisons(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and face of every comparison: those after the palette are hollow."""
    colors = (*PALETTE, *MORE)
    return {
        name: (colors[i % len(colors)], colors[i] if i < len(PALETTE) else "none")
        for i, name in enumerate(dict.fromkeys(names))
    }


def passes(table: pd.DataFrame, *, legend: bool = True, ax: Axes | None = None) -> Axes:
    """Loss against what a prediction costs.

    Parameters
    ----------
    table : DataFrame
        Columns rule, space, passes, nll and nll_tuned of one set of data.
    legend : bool
        False leaves the legend to the page.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    single = table[table["rule"] == "member"]
    ax.plot(single["passes"], single["nll"], ".", color=MEMBER, label="member", gid="member")
    for space, color in SPACES.items():
        part = _combined(table)
        part = part[part["space"] == space]
        if len(part):
            shape = SHAPES[space]
            ax.plot(part["passes"], part["nll"], shape, color=color, label=space, gid=space)
            ax.plot(
                part["passes"], part["nll_tuned"], shape, mfc="none", color=color,
                gid=f"{space} tuned",
            )  # fmt: skip
    ax.plot([], [], "o", mfc="none", color=MEMBER, label="tuned temperature")
    largest = int(table["passes"].max())
    ticks = sorted({1, largest} | {2**k for k in range(int(math.log2(largest)) + 1)})
    ax.set_xscale("log")
    ax.set_xticks(ticks, [str(one) for one in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="forward passes", ylabel="negative log-likelihood (nats)", title="cost")
    _log_if_wide(ax, "y", pd.concat([table["nll"], table["nll_tuned"]]).dropna())
    if legend:
        legend_free(ax)
    return ax


def soup_scatter(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Accuracy on the test set against the mean accuracy on shifted sets.

    Parameters
    ----------
    table : DataFrame
        Columns rule, space, member, repair, data and accuracy; and seed, if there are several.
    ax : Axes, optional

    Returns
    -------
    Axes
        Of several seeds, members are points of every seed, and others are means with 95 %
        intervals of Student's t.
    """
    ax = axes_or_new(ax)
    keys = ["rule", "space", "member", "repair", "seed"]
    held = table if "seed" in table else table.assign(seed=0)
    test = held[held["data"] == "test"].set_index(keys)["accuracy"]
    shifted = held[held["data"] != "test"].groupby(keys)["accuracy"].mean()
    both = pd.concat({"test": test, "shift": shifted}, axis=1).dropna().reset_index()
    single = both[both["rule"] == "member"]
    ax.plot(single["test"], single["shift"], ".", color=MEMBER, label="member", gid="member")
    others = both[~both["rule"].isin(["member", "mean_member"])].reset_index(drop=True)
    others["several_repairs"] = _several(others)
    shapes = itertools.cycle((*MARKERS, *MORE_MARKERS))
    alike = others.groupby(["rule", "space", "repair"], sort=False)
    for (_, rows), shape in zip(alike, shapes, strict=False):
        name, color = name_of(rows.iloc[0]), SPACES[rows["space"].iloc[0]]
        x, y = rows["test"].mean(), rows["shift"].mean()
        if len(rows) > 1:
            across, up = (np.clip(t_interval(rows[name]), 0.0, 1.0) for name in ("test", "shift"))
            ax.plot(across, [y, y], color=color, lw=0.6)
            ax.plot([x, x], up, color=color, lw=0.6)
        ax.plot(x, y, shape, color=color, mfc="white", ms=5.5, label=name, gid=name)
    ax.set(xlabel="accuracy, test", ylabel="accuracy, shifted (mean)", title="shift")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6)
    return ax


def ingredients(table: pd.DataFrame, *, metric: str = "accuracy", ax: Axes | None = None) -> Axes:
    """A metric of soups and ensembles against the number of their members.

    Parameters
    ----------
    table : DataFrame
        Columns rule (``member``: the one of this number alone), space, members and the metric, of
        one set of data.
    metric : str
        Column. The best single member by it is dashed.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    single = table[table["rule"] == "member"]
    ax.plot(single["members"], single[metric], ".", color=MEMBER, label="member", gid="member")
    best = single[metric].max() if metric == "accuracy" else single[metric].min()
    ax.axhline(best, ls="--", lw=1, color=MEMBER, label="best member", gid="best member")
    for (rule, space), part in table[table["rule"] != "member"].groupby(["rule", "space"]):
        name = "uniform soup" if rule == "uniform" else f"ensemble ({space})"
        part = part.sort_values("members")
        ax.plot(part["members"], part[metric], ".-", color=SPACES[str(space)], label=name, gid=name)
    ax.set(xlabel="members", ylabel=axis_label(metric))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return ax


def _combined(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of combinations, those with several repairs marked."""
    rows = table[~table["rule"].isin(["member", "mean_member"])].copy()
    rows["several_repairs"] = _several(rows)
    return rows


def _several(rows: pd.DataFrame) -> bool:
    return bool(rows.loc[rows["space"] == "weights", "repair"].nunique() > 1)


def _log_if_wide(ax: Axes, axis: str, values: pd.Series) -> None:
    """A logarithmic axis where values span more than a factor of 8."""
    if len(values) and values.min() > 0 and values.max() / values.min() > 8:
        ax.set(**{f"{axis}scale": "log"})


def budget(
    table: pd.DataFrame,
    *,
    cost: str = "bits",
    metric: str = "nll",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A metric of low-precision ensembles against what they cost; hollow at tuned temperatures.

    Parameters
    ----------
    table : DataFrame
        Columns rule, rounding, grid_bits, bits, passes, and the metric; with ``nll_tuned`` as well
        if the metric is ``nll``.
    cost : {"bits", "passes"}
        Bits held for each weight, or forward passes of a prediction.
    metric : str
    legend : bool
        False leaves the legend to the page.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    tuned = metric == "nll"
    grids = sorted(set(table["grid_bits"].tolist()) - {0}, reverse=True)
    shapes = dict(zip(grids, MARKERS * len(grids), strict=False))
    shown = table[table["rule"].isin(["rtn", "ensemble"])]
    for rounding, grid in (
        shown[["rounding", "grid_bits"]].drop_duplicates().itertuples(index=False)
    ):
        # Noise without a grid is no way to save memory.
        if cost == "bits" and rounding == "gaussian":
            continue
        (color, dashes), shape = ROUNDING[rounding], shapes[grid]
        line = shown[(shown["rounding"] == rounding) & (shown["grid_bits"] == grid)]
        line = line.sort_values(cost)
        name = f"{rounding} {grid}"
        own: dict[str, Any] = {"color": color, "ls": dashes, "marker": shape}
        ax.plot(line[cost], line[metric], lw=0.8, gid=name, **own)
        if tuned:
            ax.plot(line[cost], line["nll_tuned"], lw=0.6, mfc="none", gid=f"{name} tuned", **own)
    plain = table[table["rule"] == "float"].iloc[0]
    ax.axhline(plain[metric], color=REFERENCE, lw=0.7, gid="float")
    if tuned:
        ax.axhline(plain["nll_tuned"], color=REFERENCE, lw=0.7, ls="--", gid="float tuned")
    for rounding, (color, dashes) in ROUNDING.items():
        if (table["rounding"] == rounding).any():
            ax.plot([], [], color=color, ls=dashes, label=rounding)
    for grid, shape in shapes.items():
        ax.plot([], [], shape, color=MEMBER, label=f"{grid} bits")
    ax.plot([], [], "-", color=REFERENCE, lw=0.7, label="the model")
    if tuned:
        ax.plot([], [], "--", color=REFERENCE, lw=0.7, label="the model, tuned temperature")
        ax.plot([], [], "o", mfc="none", color=MEMBER, label="tuned temperature")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    words = {"bits": ("bits held for a weight", "memory"), "passes": ("forward passes", "time")}
    ax.set(xlabel=words[cost][0], ylabel=axis_label(metric), title=words[cost][1])
    if legend:
        legend_free(ax, fontsize=6, ncols=2)
    return ax


def curve(
    table: pd.DataFrame, *, data: str = "test", metric: str = "error", ax: Axes | None = None
) -> Axes:
    """A metric along a curve between two models, the straight line in grey.

    Parameters
    ----------
    table : DataFrame
        Columns path, t, data, accuracy and nll.
    data : {"test", "train"}
    metric : {"error", "nll"}
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    rows = table[table["data"] == data].sort_values("t")
    looks = (("line", MEMBER, LINES[1], "straight line"), ("curve", PALETTE[0], "-", "curve"))
    for path, color, dashes, name in looks:
        part = rows[rows["path"] == path]
        values = _metric(part, metric)
        ax.plot(part["t"], values, color=color, ls=dashes, label=name, gid=path)
        ends = [0, -1]
        if path == "curve":
            ax.plot(
                part["t"].iloc[ends],
                values.iloc[ends],
                "o",
                color=REFERENCE,
                label="ends",
                gid="ends",
            )
    ax.set(
        xlabel="position $t$ on the path", ylabel=_METRICS[metric], title=f"{data} {_SHORT[metric]}"
    )
    if metric == "nll":
        _log_if_wide(ax, "y", rows["nll"])
    legend_above(ax, 3)
    return ax


def cycle(table: pd.DataFrame, *, column: str = "error", ax: Axes | None = None) -> Axes:
    """Rate, test error or distance in cycles of the rate, a colour an arm; dots at snapshots.

    Parameters
    ----------
    table : DataFrame
        Columns arm, seed, row (``schedule``, ``test`` or ``snapshot``), cycle (lines of two cycles
        do not hang together), step, and `column`.
    column : {"lr", "error", "distance"}
    ax : Axes, optional

    Returns
    -------
    Axes
        Seeds are thin (gid ``ARM/seed``), their mean is thick (``ARM/mean``), dots are means of
        the snapshots (``ARM/snapshots``).
    """
    ax = axes_or_new(ax)
    whole = "schedule" if column == "lr" else "test"
    for i, arm in enumerate(dict.fromkeys(table["arm"])):
        color = look(i)["color"]
        own = table[(table["arm"] == arm) & table[column].notna()]
        lines = own[own["row"] == whole]
        several = lines["seed"].nunique() > 1
        for _, part in lines.groupby("cycle"):
            mean = part.set_index("step")[column]  # a rate has two values where it jumps
            if several:
                for _, one in part.groupby("seed"):
                    x, y = one["step"], one[column]
                    ax.plot(x, y, color=color, alpha=0.25, lw=0.6, gid=f"{arm}/seed")
                mean = mean.groupby(level=0).mean()
            ax.plot(mean.index, mean, color=color, gid=f"{arm}/mean")
        dots = own[own["row"] == "snapshot"].groupby("step")[column].mean()
        name = str(arm).replace("_", " ")
        marker = look(i)["marker"]
        ax.plot(dots.index, dots, marker, color=color, label=name, gid=f"{arm}/snapshots")
    words = {"error": "test error", "distance": "distance from start of cycles"}
    ax.set(xlabel="minibatches", ylabel=words.get(column, axis_label(column)))
    return ax


def cycle_rates(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A metric of snapshots' soup or ensemble against the rate of their cycles, with intervals.

    Parameters
    ----------
    table : DataFrame
        Columns way, lr_scale (rate over that of the first epochs; NaN where there are no cycles,
        which is a band), mean, low and high.
    ax : Axes, optional

    Returns
    -------
    Axes
        Gids are the ways. The label of the metric is left to the caller.
    """
    ax = axes_or_new(ax)
    for i, (way, rows) in enumerate(table.groupby("way", sort=False)):
        own = look(i)
        if rows["lr_scale"].isna().all():
            mean, low, high = rows[["mean", "low", "high"]].iloc[0]
            ax.axhspan(low, high, color=MEMBER, alpha=0.2, lw=0)
            ax.axhline(mean, color=MEMBER, ls="--", lw=1.0, label=way, gid=way)
            continue
        rows = rows.sort_values("lr_scale")
        reach = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
        ax.errorbar(
            rows["lr_scale"], rows["mean"], yerr=reach, color=own["color"], fmt=own["marker"] + "-",
            capsize=2.0, elinewidth=0.9, label=way, gid=way,
        )  # fmt: skip
    rates = sorted(table["lr_scale"].dropna().unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.set_xlabel("rate of the cycles / first rate")
    return ax


def plane(
    table: pd.DataFrame,
    *,
    metric: str = "nll",
    path: NDArray[np.float64] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Contours of a test metric on the plane through three models.

    Parameters
    ----------
    table : DataFrame
        Columns corner (empty for points of the grid), x, y, accuracy and nll.
    metric : {"nll", "error"}
    path : ndarray, shape (points, 2), optional
        A curve on the plane.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    rows = table[table["corner"] == ""]
    values = _metric(rows, metric)
    grid = pd.DataFrame({"x": rows["x"], "y": rows["y"], "z": values})
    z = grid.pivot_table(index="y", columns="x", values="z")
    # Levels by rank: loss far away is many times that between the models.
    levels = np.unique(np.quantile(values[np.isfinite(values)], np.linspace(0.0, 1.0, 12)))
    if len(levels) > 1:
        norm = BoundaryNorm(levels, 256)
        drawn = ax.contourf(z.columns, z.index, z, levels=levels, cmap=COLORMAP, norm=norm)
        ax.figure.colorbar(drawn, ax=ax, format="%.3g", label=_METRICS[metric])
    corners = table[table["corner"] != ""]
    ax.plot(corners["x"], corners["y"], "o", color="white", mec=REFERENCE, gid="corners")
    if path is not None:
        ax.plot(path[:, 0], path[:, 1], color="white", lw=1.2, gid="path")
    ax.set(
        xlabel="distance of weights", ylabel="distance of weights", title=f"test {_SHORT[metric]}"
    )
    wide, high = np.ptp(rows["x"]), np.ptp(rows["y"])
    if 0.4 < high / wide < 2.5:  # a flat strip would be too small to see
        ax.set_aspect("equal")
    return ax


_METRICS = {"error": "share of wrong predictions", "nll": "negative log-likelihood (nats)"}
_SHORT = {"error": "error", "nll": "loss"}


def _metric(table: pd.DataFrame, metric: str) -> pd.Series:
    return 1.0 - table["accuracy"] if metric == "error" else table["nll"]

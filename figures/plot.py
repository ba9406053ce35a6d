"""A picture of any table, of columns that `figures.columns` chooses.

The drawing is seaborn's (line, scatter and point plots, heat maps), the look the project's. Rows
that differ by nothing but a seed are averaged, with an interval by Student's t.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.columns import (
    REPEATS,
    TIMES,
    Choice,
    Columns,
    check_columns,
    distinct,
    in_words,
    is_number,
    resolve,
)
from figures.style import COLORMAP, context, look, new_figure, plain_log, write
from nqm.errors import NQMError, NQMWarning
from nqm.table import COLUMNS, label

#: Largest number of colours and line styles of texts, and of panels.
LOOKS, PANELS = 24, 24
#: Numbers with more values than this are shades of one map; so many of them are in the legend.
SHADES = 6
#: Positive values whose largest is so many times their least get a logarithmic axis.
WIDE = 12.0
#: Curves with at most so many points have a marker and an error bar at each.
FEW = 12
#: Text in a file's title, by which a picture of this module is known.
MARK = "nqm plot"
ENDINGS = (".png", ".pdf", ".svg")

#: Colour, marker and dashes of every value of a column.
_Looks = dict[Any, dict[str, Any]]


def plot(table: pd.DataFrame, choice: Choice | None = None, axes: Sequence[str] = ()) -> Figure:
    """Draw a table.

    Parameters
    ----------
    table : DataFrame
        Tidy: one row for each case and record.
    choice : Choice, optional
        What is drawn where; what it leaves open follows from the table.
    axes : sequence of str
        Columns that are axes of a sweep: they are set, not measured.

    Returns
    -------
    Figure
        A notebook's cell that ends with it shows it.

    Raises
    ------
    NQMError
        If a column does not exist or cannot be drawn so, or if rows differ in a column that is not
        shown.
    """
    if table.empty:
        raise NQMError("the table has no rows; there is nothing to draw")
    asked = Choice() if choice is None else choice
    check_columns(table, asked)
    columns = Columns.of(table, axes)
    chosen = resolve(table, asked, columns)
    rows = table if chosen.kind == "scatter" else columns.cases(table, chosen.shown)
    if len(rows) < len(table):
        last = columns.clock
        _warn(f"drawn is the last {last} of each case; --x {last} draws all of them")
    rows = _over_members(rows, chosen, columns)
    if chosen.kind == "heatmap":
        return _heatmap(rows, chosen)
    if is_number(rows[str(chosen.x)]):
        return _curves(rows, chosen)
    return _named_rows(rows, chosen)


def _over_members(rows: pd.DataFrame, chosen: Choice, columns: Columns) -> pd.DataFrame:
    """Mean over the members of one run, which are not independent as runs are."""
    others = [name for name in columns.repeats if name != "member"]
    if "member" not in columns.repeats or not others or "member" in chosen.shown:
        return rows
    measured = str(chosen.hue if chosen.kind == "heatmap" else chosen.y)
    keys = [
        n for n in rows.columns if n in {*chosen.shown, *columns.names, *others, *TIMES, "metric"}
    ]
    if chosen.kind == "scatter" or measured in keys:
        return rows
    means: pd.DataFrame = (
        rows.groupby(keys, dropna=False, sort=False)[measured].mean().reset_index()
    )
    return means


# --- curves and points ----------------------------------------------------------------------------


def _curves(table: pd.DataFrame, chosen: Choice) -> Figure:
    x, y = str(chosen.x), str(chosen.y)
    table = _finite(_finite(table, y), x)
    table, logx = _scaled(table, x, chosen.logx)
    table, logy = _scaled(table, y, chosen.logy)
    looks = _looks(table, chosen)
    with context():
        figure, axes = _page(table, chosen, (2.7, 2.4), wider=1.3 if looks else 0.0)
        for ax, rows in axes:
            _one_panel(rows, chosen, ax, looks)
            ax.set(xlabel=_words_of(x), ylabel=_label(y, rows, chosen.col == "metric"))
            whole = {"integer": True} if table[x].dtype.kind in "iu" else {}
            ax.set_xscale("log") if logx else ax.locator_params(axis="x", **whole)
            ax.set_yscale("log") if logy else None
            plain_log(ax.xaxis)
            plain_log(ax.yaxis)
        _finish(figure, [ax for ax, _ in axes], table, chosen, looks)
    return figure


def _one_panel(rows: pd.DataFrame, chosen: Choice, ax: Axes, looks: dict[str, _Looks]) -> None:
    import seaborn as sns

    named: dict[str, Any] = {"data": rows, "x": chosen.x, "y": chosen.y, "ax": ax, "legend": False}
    for place, given in looks.items():
        named |= {place: getattr(chosen, place), f"{place}_order": list(given)}
    if "hue" in looks:
        named["palette"] = {value: one["color"] for value, one in looks["hue"].items()}
    else:
        named["color"] = look(0)["color"]
    few = rows[str(chosen.x)].nunique() <= FEW
    # Colours of texts are repeated by markers and dashes; shades of numbers are not.
    marked = looks.get("style") or looks.get("hue") or {None: look(0)}
    if chosen.kind == "scatter" or few:
        named["markers"] = {value: one["marker"] for value, one in marked.items()}
    if chosen.kind == "line":
        named["dashes"] = {value: _dashes(one) for value, one in marked.items()}
    if "style" not in looks and "hue" in looks:
        named |= {"style": chosen.hue, "style_order": list(looks["hue"])}
    elif not looks:
        named |= {"marker": look(0)["marker"] if few or chosen.kind == "scatter" else None}
        named = {key: value for key, value in named.items() if key not in ("markers", "dashes")}
    if chosen.kind == "scatter":
        sns.scatterplot(**named, s=14, linewidth=0.3)
        return
    if few:
        named |= {"err_style": "bars", "err_kws": {"capsize": 2}}
        named |= {"markersize": 4, "markeredgewidth": 0.4}
    sns.lineplot(**named, errorbar=t_interval)


def _named_rows(table: pd.DataFrame, chosen: Choice) -> Figure:
    """Names down the side, numbers to the right: means with intervals, or points."""
    import seaborn as sns

    x, y = str(chosen.x), str(chosen.y)
    if chosen.logx:
        raise NQMError(f"--logx: {x} holds texts, which have no logarithmic axis")
    table, log = _scaled(_finite(table, y), y, chosen.logy)
    table = table.assign(**{x: table[x].astype(str)})
    order = distinct(table[x])
    looks = _looks(table, chosen)
    hues = looks.get("hue", {None: look(0)})
    named: dict[str, Any] = {"x": y, "y": x, "order": order, "legend": False}
    if "hue" in looks:
        named |= {"hue": chosen.hue, "hue_order": list(hues)}
        named["palette"] = {value: one["color"] for value, one in hues.items()}
    else:
        named["color"] = look(0)["color"]
    with context():
        height = 0.5 + len(order) * (0.14 + 0.1 * len(hues))
        figure, axes = _page(table, chosen, (2.7, height), wider=1.3 if looks else 0.0)
        for ax, rows in axes:
            if chosen.kind == "scatter":
                sns.stripplot(rows, ax=ax, size=3, jitter=False, dodge="hue" in looks, **named)
            else:
                marks = [one["marker"] for one in hues.values()]
                sns.pointplot(
                    rows, ax=ax, errorbar=t_interval, linestyles="none",
                    markers=marks if "hue" in looks else marks[0],
                    dodge=0.5 if len(marks) > 1 else False, markersize=4,
                    err_kws={"linewidth": 1.0}, **named,
                )  # fmt: skip
            ax.set(xlabel=_label(y, rows, chosen.col == "metric"), ylabel="")
            words = label if x == "metric" else in_words
            ax.set_yticks(range(len(order)), [words(value) for value in order])
            ax.set_xscale("log") if log else ax.locator_params(axis="x", nbins=4)
            plain_log(ax.xaxis)
        _finish(figure, [ax for ax, _ in axes], table, chosen, looks)
    return figure


def t_interval(values: Any) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; NaN for fewer than two values.

    Parameters
    ----------
    values : array_like, shape (n,)
        NaN is left out.

    Returns
    -------
    low, high : float
    """
    from scipy import stats  # slow to load

    held = np.asarray(values, dtype=float)
    held = held[np.isfinite(held)]
    if held.size < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, held.size - 1) * held.std(ddof=1) / np.sqrt(held.size)
    return float(held.mean() - half), float(held.mean() + half)


# --- heat maps ------------------------------------------------------------------------------------


def _heatmap(table: pd.DataFrame, chosen: Choice) -> Figure:
    import seaborn as sns

    x, y, hue = str(chosen.x), str(chosen.y), str(chosen.hue)
    table = _finite(table, hue)
    low, high = float(table[hue].min()), float(table[hue].max())
    # All cells of a panel that lack a value are grey.
    norm = LogNorm(low, high) if low > 0 and high > WIDE * low else mpl.colors.Normalize(low, high)
    with context():
        figure, axes = _page(table, chosen, (2.9, 2.5), wider=0.5, shared=False)
        for ax, rows in axes:
            cells = rows.pivot_table(index=y, columns=x, values=hue, aggfunc="mean")
            if is_number(table[y]):
                cells = cells.sort_index(ascending=False)  # large values at the top
            sns.heatmap(
                cells, ax=ax, cmap=COLORMAP, norm=norm, cbar=False, fmt=".3g",
                annot=cells.size <= 64 and len(axes) == 1, annot_kws={"fontsize": 6},
                xticklabels=[in_words(value) for value in cells.columns],
                yticklabels=[in_words(value) for value in cells.index],
            )  # fmt: skip
            ax.set(xlabel=_words_of(x), ylabel=_words_of(y), facecolor="0.85")
            ax.tick_params(axis="x", rotation=90 if len(cells.columns) > 6 else 0)
            ax.tick_params(axis="y", rotation=0)
        used = [ax for ax, _ in axes]
        figure.colorbar(used[0].collections[0], ax=used, label=_label(hue, table), pad=0.02)
        _note(figure, table)
    return figure


# --- parts of a page ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """Title of one panel, and its rows."""

    title: str
    rows: pd.DataFrame


def _page(
    table: pd.DataFrame,
    chosen: Choice,
    size: tuple[float, float],
    *,
    wider: float,
    shared: bool = True,
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with one panel for each value of `col`; panels of several metrics share no axis."""
    panels = _panels(table, chosen)
    shared = shared and chosen.col != "metric"
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    width = 4.2 if len(panels) == 1 else size[0]
    figure = new_figure(width * columns + wider, size[1] * lines + 0.4)
    grid = figure.subplots(lines, columns, sharex=shared, sharey=shared, squeeze=False).ravel()
    for ax in grid[len(panels) :]:
        ax.remove()
    for ax, panel in zip(grid, panels, strict=False):
        ax.set_title(panel.title)
    return figure, [(ax, one.rows) for ax, one in zip(grid, panels, strict=False)]


def _panels(table: pd.DataFrame, chosen: Choice) -> list[_Panel]:
    if chosen.col is None:
        return [_Panel("", table)]
    found = distinct(table[chosen.col])
    _check_count("--col", chosen.col, len(found), PANELS)
    panels = []
    for value in found:
        title = in_words(value)
        if chosen.col == "metric" and str(value) in COLUMNS:
            title = label(str(value))
        elif is_number(table[chosen.col]):
            title = f"{_words_of(chosen.col)} = {title}"
        panels.append(_Panel(title, table[table[chosen.col] == value]))
    return panels


def _looks(table: pd.DataFrame, chosen: Choice) -> dict[str, _Looks]:
    """Colour, marker and line of each value of `hue` and of `style`."""
    looks: dict[str, _Looks] = {}
    for place in ("hue", "style"):
        column = getattr(chosen, place)
        if column is None:
            continue
        found = distinct(table[column])
        if place == "hue" and is_number(table[column]) and len(found) > SHADES:
            plain = {"marker": "o", "linestyle": "-"}
            looks[place] = {v: plain | {"color": c} for v, c in _shades(found).items()}
        else:
            _check_count(f"--{place}", column, len(found), LOOKS)
            looks[place] = {value: look(i) for i, value in enumerate(found)}
    return looks


def _shades(values: Sequence[float]) -> dict[float, Any]:
    """Colours of numbers from one map, by their size or by its logarithm."""
    numbers = np.asarray(values, dtype=float)
    if numbers.min() > 0 and numbers.max() > WIDE * numbers.min():
        numbers = np.log(numbers)
    place = (numbers - numbers.min()) / np.ptp(numbers)
    ends = 0.92 * place  # the last yellow is too light for a line
    return {v: mpl.colormaps[COLORMAP](at) for v, at in zip(values, ends, strict=True)}


def _dashes(one: dict[str, Any]) -> Any:
    """Dashes as seaborn states them: a tuple, or a text for a solid line."""
    return "" if one["linestyle"] == "-" else one["linestyle"][1]


def _finish(
    figure: Figure, axes: list[Axes], table: pd.DataFrame, chosen: Choice, looks: dict[str, _Looks]
) -> None:
    if chosen.col != "metric":
        for ax in axes:
            ax.label_outer()
    entries: list[Line2D] = []
    for place in looks:
        column = str(getattr(chosen, place))
        if place == "style" and column == chosen.hue:
            continue
        given = list(looks[place].items())
        if len(given) > LOOKS or (len(given) > SHADES and place == "hue" and _is_shaded(given)):
            ends = np.linspace(0, len(given) - 1, min(SHADES, len(given))).round().astype(int)
            given = [given[i] for i in ends]
        entries.append(Line2D([], [], linestyle="none", label=_words_of(column)))
        for value, one in given:
            shown = dict(one)
            if place == "style":
                shown["color"] = "0.3"
            elif "style" in looks and column != chosen.style:
                shown |= {"marker": None, "linestyle": "-"}
            if chosen.kind == "scatter" or not is_number(table[str(chosen.x)]):
                shown |= {"linestyle": "none", "marker": shown["marker"] or "o"}
            elif table[str(chosen.x)].nunique() > FEW:
                shown["marker"] = None
            entries.append(Line2D([], [], label=in_words(value), **shown))
    if entries:
        figure.legend(handles=entries, loc="outside right center", handlelength=2.4)
    _note(figure, table)


def _is_shaded(given: list[tuple[Any, dict[str, Any]]]) -> bool:
    return len({(one["marker"], one["linestyle"]) for _, one in given}) == 1


def _note(figure: Figure, table: pd.DataFrame) -> None:
    """How many repetitions are averaged."""
    # A result of no single run or member has -1 or nothing there.
    counts = {n: len({*table[n].dropna()} - {-1, ""}) for n in REPEATS if n in table}
    several = [f"{count} {name}s" for name, count in counts.items() if count > 1]
    if several:
        said = f"mean of {', '.join(several)}; 95 % interval by Student's t"
        figure.supxlabel(said, fontsize=6, color="0.4")


def _label(name: str, rows: pd.DataFrame, titled: bool = False) -> str:
    """Label of a measured column; a column ``value`` has that of its metric, unless a title has."""
    if name == "value" and "metric" in rows and rows["metric"].nunique() == 1:
        return "" if titled else label(str(rows["metric"].iloc[0]))
    # A history has the loss of a network, a run of the theory that of a quadratic.
    return "cross-entropy (nats)" if name == "loss" and "train_loss" in rows else _words_of(name)


def _words_of(name: str) -> str:
    """Label of a column; a foreign name is no formula."""
    return label(name) if label(name) != name else in_words(name)


def _scaled(table: pd.DataFrame, name: str, asked: bool | None) -> tuple[pd.DataFrame, bool]:
    """Rows that can be drawn on the axis of a column, and whether it is logarithmic."""
    numbers = table[name].to_numpy(dtype=float)
    positive = numbers > 0
    if asked is None:
        wide = bool(positive.all() and numbers.max() > WIDE * numbers.min())
        return table, wide and not (name in TIMES and _even(numbers))
    if asked and not positive.any():
        raise NQMError(f"{name} has no value > 0 for a logarithmic axis")
    if asked and not positive.all():
        _warn(f"{int((~positive).sum())} rows with {name} <= 0 are not on the logarithmic axis")
        table = table[positive]
    return table, asked


def _even(numbers: Any) -> bool:
    """Whether times are evenly spaced, or nearly so."""
    steps = np.diff(np.unique(numbers))
    return bool(np.ptp(steps) <= 0.5 * steps.max()) if steps.size else True


def _finite(table: pd.DataFrame, name: str) -> pd.DataFrame:
    finite = np.isfinite(table[name].to_numpy(dtype=float))
    if not finite.any():
        raise NQMError(f"{name} has no finite value; there is nothing to draw")
    if not finite.all():
        _warn(f"{int((~finite).sum())} rows without a finite {name} are not drawn")
    kept: pd.DataFrame = table[finite]
    return kept


def _warn(text: str) -> None:
    warnings.warn(NQMWarning(text), stacklevel=4)


def _check_count(where: str, name: str, count: int, most: int) -> None:
    if count > most:
        raise NQMError(
            f"{where} {name} has {count} values, more than {most}; keep some by --where "
            f"{name}=VALUE,VALUE"
        )


# --- files ----------------------------------------------------------------------------------------


def check_picture(path: Path) -> None:
    """Check that a picture can be written.

    Parameters
    ----------
    path : Path

    Raises
    ------
    NQMError
        If its ending is unknown, or if a file of its name was not drawn by this module.
    """
    if path.suffix.lower() not in ENDINGS:
        raise NQMError(f"--out {path}: must end in {', '.join(ENDINGS)}")
    if path.exists() and (not path.is_file() or MARK.encode() not in path.read_bytes()):
        raise NQMError(f"{path} was not drawn by nqm plot; move it or use --out OTHER")


def save(figure: Figure, path: Path, source: str, choice: Choice) -> None:
    """Write a picture, all or nothing.

    Parameters
    ----------
    figure : Figure
    path : Path
        Its ending is the format.
    source : str
        Name of the table.
    choice : Choice
        As stated; kept in the file.
    """
    stated = {one.name: getattr(choice, one.name) for one in fields(choice)}
    held = {name: value for name, value in stated.items() if value is not None}
    write(figure, path, f"{MARK} {source}", held)

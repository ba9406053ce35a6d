"""What a picture of any table shows: columns named by the user, or by what the table holds.

The x axis gets the time of training, or the swept value with the most values; the y axis the loss
or another measured column. What else tells rows apart becomes colour, panels and line style. Rows
that differ by nothing but a seed may be averaged; where rows differ by anything else that is not
shown, the error names the column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from nqm.errors import NQMError, check_word, shown, suggest

KINDS = ("line", "scatter", "heatmap")
#: Columns of one clock each, in the order in which they are preferred.
TIMES = ("epoch", "round", "step", "examples")
#: Columns of repetitions: rows that differ in these alone are averaged.
REPEATS = ("seed", "split", "replica", "member")
#: Measured columns in the order in which they are preferred.
MEASURED = ("loss", "value", "accuracy", "nll", "measured", "ratio", "seconds")
#: Numbers that are set, not measured; whole numbers, texts and truth values are taken as set too.
SET = ("lr", "member_lr", "effective_lr", "lr_times_sharpness", "batch_size", "gamma", "momentum",
       "decay", "weight_decay", "noise", "target", "exponent", "t")  # fmt: skip
#: Columns that neither tell rows apart nor are measured.
ASIDE = ("case", "status", "label", "key")
#: Largest number of panels and line styles that are chosen without being asked for.
PANELS, STYLES = 6, 6
#: Largest number of characters of a value in a legend.
LONGEST = 48


@dataclass(frozen=True)
class Choice:
    """What is drawn where.

    Attributes
    ----------
    x, y : str, optional
        Columns of the axes.
    hue : str, optional
        Column shown by colour; the value of a cell in a heat map.
    col : str, optional
        Column with one panel for each value.
    style : str, optional
        Column shown by line style and marker.
    kind : {"line", "scatter", "heatmap"}, optional
        Form of the picture.
    logx, logy : bool, optional
        Whether the axes are logarithmic.
    """

    x: str | None = None
    y: str | None = None
    hue: str | None = None
    col: str | None = None
    style: str | None = None
    kind: str | None = None
    logx: bool | None = None
    logy: bool | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Chosen columns by what they are for."""
        held = {name: getattr(self, name) for name in ("x", "y", "hue", "col", "style")}
        return {name: column for name, column in held.items() if column is not None}

    @property
    def shown(self) -> list[str]:
        """Columns of the places that tell rows apart: all but the measured one."""
        measured = "hue" if self.kind == "heatmap" else "y"
        return [column for place, column in self.columns.items() if place != measured]

    def given(self, role: str, column: str) -> Choice:
        """The same with a column at a place.

        Parameters
        ----------
        role : {"x", "y", "hue", "col", "style"}
        column : str

        Returns
        -------
        Choice
        """
        changes: dict[str, Any] = {role: column}
        return replace(self, **changes)


def where(table: pd.DataFrame, conditions: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Keep the rows with these values.

    Parameters
    ----------
    table : DataFrame
    conditions : iterable of (str, str)
        Column and value; several values between commas keep the rows with any of them.

    Returns
    -------
    DataFrame

    Raises
    ------
    NQMError
        If there is no such column or no such value; the message names those that exist.
    """
    for name, text in conditions:
        _check_column(table, "--where", name)
        wanted = text.split(",")
        held = table[name]
        if is_number(held):
            try:
                numbers = [float(one) for one in wanted]
            except ValueError:
                raise NQMError(f"--where {name}: {shown(text)} is no number") from None
            kept = np.isclose(held.to_numpy(dtype=float)[:, None], numbers, rtol=1e-9).any(axis=1)
        else:
            kept = held.astype(str).isin(wanted).to_numpy()
        if not kept.any():
            there = ", ".join(in_words(one) for one in distinct(held)[:12])
            raise NQMError(f"--where {name}: no row has {shown(text)}; it has {there}")
        table = table[kept]
    return table


def swept(table: pd.DataFrame, axes: Iterable[str]) -> list[str]:
    """Columns of the axes of a sweep, whose names in the metadata are dotted keys.

    Parameters
    ----------
    table : DataFrame
    axes : iterable of str
        Keys, also several between commas.

    Returns
    -------
    list of str
    """
    parts = [part.strip() for axis in axes for part in axis.split(",")]
    forms = [(f"sweep.{part}", part, part.rpartition(".")[2]) for part in parts]
    found = (next((name for name in names if name in table), None) for names in forms)
    return [name for name in found if name is not None]


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are.

    Attributes
    ----------
    names : list of str
        Axes of a sweep and texts with several values, and the whole numbers and rates without
        which rows could not be told apart. A rate that follows a schedule is none of these.
    repeats : list of str
        Seeds, where there are several.
    clock : str or None
        Column of time, if cases have several rows that differ by it.
    """

    names: list[str]
    repeats: list[str]
    clock: str | None

    @classmethod
    def of(cls, table: pd.DataFrame, axes: Sequence[str] = ()) -> Columns:
        """Find them.

        Parameters
        ----------
        table : DataFrame
        axes : sequence of str
            Columns that are axes of a sweep.

        Returns
        -------
        Columns
        """
        varying = [n for n in names_of(table) if table[n].nunique(dropna=False) > 1]
        aside = {*ASIDE, *TIMES, *REPEATS} - {*axes}
        if "train_loss" in table:  # in a history an arm goes on with the average of its members
            aside.add("weights")
        texts = [n for n in varying if not is_number(table[n]) and n not in aside]
        names = [n for n in dict.fromkeys([*axes, *texts]) if n in varying]
        repeats = [n for n in REPEATS if n in varying and n not in names]
        apart = [*names, *repeats]
        times = [n for n in TIMES if n in varying and n not in names]
        clock = [n for n in times if _groups(table, [*apart, n]) > _groups(table, apart)][:1]
        whole = [n for n in varying if table[n].dtype.kind in "iu" and n not in aside]
        rates = [n for n in dict.fromkeys([*whole, *SET]) if n in varying and n not in names]
        added = _splitting(table, [*apart, *clock], rates)
        return cls([*names, *added], repeats, clock[0] if clock else None)

    def cases(self, table: pd.DataFrame, drawn: Iterable[str]) -> pd.DataFrame:
        """Rows to draw: those of the last time of each case, unless time is drawn.

        Parameters
        ----------
        table : DataFrame
        drawn : iterable of str

        Returns
        -------
        DataFrame
        """
        if self.clock is None or {*drawn} & {*TIMES}:
            return table
        apart = [*self.names, *self.repeats]
        time = table[self.clock]
        groups = table.groupby(apart, dropna=False)[self.clock] if apart else None
        return table[time == (time.max() if groups is None else groups.transform("max"))]

    def left(self, table: pd.DataFrame, drawn: Iterable[str]) -> list[str]:
        """Columns not drawn in which rows differ that would be averaged.

        Parameters
        ----------
        table : DataFrame
            As `cases` returns it.
        drawn : iterable of str
            Columns of the axes, colours, panels and styles.

        Returns
        -------
        list of str
        """
        shown = [name for name in dict.fromkeys(drawn) if name in table]
        free = [name for name in self.names if name not in shown]
        # A line over time joins the rows of one text or swept value, whatever their times.
        fixed = [n for n in free if not is_number(table[n])]
        still = [name for name in shown if name not in TIMES]
        found = _splitting(table, [*still, *self.repeats], fixed, unique=False)
        return found + _splitting(table, [*shown, *self.repeats, *found],
                                  [n for n in free if n not in fixed])  # fmt: skip


def _splitting(
    table: pd.DataFrame, keys: Sequence[str], candidates: Iterable[str], *, unique: bool = True
) -> list[str]:
    """Candidates that divide rows which agree in `keys`; with `unique` no more than are needed."""
    found: list[str] = []
    groups = _groups(table, keys)
    for name in candidates:
        if unique and groups == len(table):
            break
        finer = _groups(table, [*keys, *found, name])
        if finer > groups:
            groups = finer
            found.append(name)
    return found


def _groups(table: pd.DataFrame, keys: Sequence[str]) -> int:
    unlike = list(dict.fromkeys(keys))
    return int(table.groupby(unlike, dropna=False, sort=False).ngroups) if unlike else 1


def resolve(table: pd.DataFrame, asked: Choice, columns: Columns) -> Choice:
    """Fill in what is left open.

    Parameters
    ----------
    table : DataFrame
    asked : Choice
        Its columns exist.
    columns : Columns
        Of this table.

    Returns
    -------
    Choice
        With x, y and kind.

    Raises
    ------
    NQMError
        If the table has no fitting column, or rows differ in a column that finds no place.
    """
    if asked.kind == "heatmap":
        return _resolve_heatmap(table, asked, columns)
    x = asked.x or _default_x(table, columns, {*asked.columns.values()})
    y = asked.y or _default_y(table, {x, *columns.names, *asked.columns.values()})
    if not is_number(table[y]):
        raise NQMError(f"--y {y} holds texts; give a column of numbers, e.g. {_numbers(table)}")
    measured = is_number(table[x]) and x not in (*columns.names, *columns.repeats, *TIMES, *SET)
    measured = measured and table[x].dtype.kind == "f"
    chosen = replace(asked, x=x, y=y, kind=asked.kind or ("scatter" if measured else "line"))
    if chosen.kind == "line":
        return _placed(table, chosen, columns)
    texts = [n for n in columns.names if not is_number(table[n]) and n not in chosen.shown]
    few = [name for name in texts if table[name].nunique() <= PANELS]
    return chosen if asked.hue or not few else chosen.given("hue", few[0])


def _placed(table: pd.DataFrame, chosen: Choice, columns: Columns) -> Choice:
    """Give each column that tells rows apart a place: panels for a metric, then colour first."""
    rows = columns.cases(table, chosen.shown)
    left = columns.left(rows, chosen.shown)
    if "metric" in left and chosen.col is None:
        chosen = replace(chosen, col="metric")
    if "kind" in left and chosen.style is None:
        chosen = replace(chosen, style="kind")
    for place, most in (("hue", math.inf), ("col", PANELS), ("style", STYLES)):
        left = columns.left(rows, chosen.shown)
        fits = [name for name in left if table[name].nunique() <= most]
        if getattr(chosen, place) is None and fits:
            chosen = chosen.given(place, fits[0])
    if left := columns.left(rows, chosen.shown):
        differing = " and ".join(_value_words(table, name) for name in left)
        raise NQMError(
            f"rows that would be averaged differ in {differing}: give it a place by --hue, --col "
            f"or --style, or keep some rows by --where {left[0]}=VALUE"
        )
    return chosen


def _resolve_heatmap(table: pd.DataFrame, asked: Choice, columns: Columns) -> Choice:
    times = [columns.clock] if columns.clock is not None else []
    free = [name for name in (*columns.names, *times) if name not in asked.shown]
    for place in ("x", "y"):
        if getattr(asked, place) is None:
            if not free:
                raise NQMError(
                    "a heatmap needs two columns with several values each that are set, not "
                    f"measured; give --{place}, one of {_columns(table)}"
                )
            asked = asked.given(place, free.pop(0))
    hue = asked.hue or _default_y(table, {*columns.names, *asked.shown})
    if not is_number(table[hue]):
        raise NQMError(f"--hue {hue} holds texts; a heatmap shows numbers: {_numbers(table)}")
    rows = columns.cases(table, asked.shown)
    left = columns.left(rows, asked.shown)
    if left and asked.col is None:
        asked = replace(asked, col=left[0])
        left = columns.left(rows, asked.shown)
    if left:
        raise NQMError(
            f"cells would average over {' and '.join(_value_words(table, n) for n in left)}; keep "
            f"one by --where {left[0]}=VALUE"
        )
    return replace(asked, hue=hue)


def _default_x(table: pd.DataFrame, columns: Columns, taken: set[str]) -> str:
    clock = [] if columns.clock is None or columns.clock in taken else [columns.clock]
    numbers = [n for n in columns.names if is_number(table[n]) and n not in taken]
    numbers.sort(key=lambda name: -len(set(table[name])))
    if clock and (not numbers or table[clock[0]].nunique() > 8):
        return clock[0]
    texts = [n for n in columns.names if not is_number(table[n]) and n not in (*taken, "metric")]
    choices = [*[n for n in numbers if table[n].nunique() > 2], *texts, *numbers]
    aside = {*taken, *ASIDE, *REPEATS}
    measured = [n for n in names_of(table) if is_number(table[n]) and n not in aside]
    apart = [*columns.names, *columns.repeats, *clock]
    if len(measured) > 1 and _groups(table, apart) < len(table):
        choices = []  # nothing tells rows apart: points, of two measured columns
    choices += measured[:1] if len(measured) > 1 else [*columns.repeats, *measured]
    if len(measured) == 1 and "metric" in columns.names:
        choices = choices if choices[0] != measured[0] else ["metric"]
    if not choices:
        raise NQMError(f"no column fits the x axis; give --x, one of {_columns(table)}")
    return choices[0]


def _default_y(table: pd.DataFrame, taken: set[str]) -> str:
    numbers = [
        n for n in names_of(table) if is_number(table[n]) and n not in {*taken, *TIMES, *ASIDE}
    ]
    preferred = [name for name in MEASURED if name in numbers]
    floats = [name for name in numbers if table[name].dtype.kind == "f"]
    choices = [*preferred, *floats, *numbers]
    if not choices:
        raise NQMError(f"no column of numbers is left for the y axis; it has {_columns(table)}")
    return choices[0]


def check_columns(table: pd.DataFrame, asked: Choice) -> None:
    """Raise NQMError unless the columns exist and the options fit each other."""
    for place, name in asked.columns.items():
        _check_column(table, f"--{place}", name)
    if asked.x is not None and asked.x == asked.y:
        raise NQMError(f"--x and --y are both {asked.x}; give two columns")
    if asked.kind is not None:
        check_word("--kind", asked.kind, KINDS)
    for name in ("style", "logx", "logy") if asked.kind == "heatmap" else ():
        if getattr(asked, name) is not None:
            raise NQMError(f"--{name} has no meaning in a heatmap; drop it")


def _check_column(table: pd.DataFrame, where: str, name: str) -> None:
    if name not in table:
        raise NQMError(f"{where}: no column {shown(name)}{suggest(name, map(str, table.columns))}")


def names_of(table: pd.DataFrame) -> list[str]:
    """Names of the columns."""
    return [str(name) for name in table.columns]


def _columns(table: pd.DataFrame) -> str:
    return ", ".join(names_of(table))


def _numbers(table: pd.DataFrame) -> str:
    return ", ".join(n for n in names_of(table) if is_number(table[n]))


def is_number(values: pd.Series[Any]) -> bool:
    """Whether a column holds numbers; truth values are none."""
    return bool(pd.api.types.is_numeric_dtype(values)) and values.dtype != bool


def distinct(values: pd.Series[Any]) -> list[Any]:
    """Values that occur: numbers in order of size, texts in order of appearance."""
    found = list(dict.fromkeys(values.dropna()))
    return sorted(found) if is_number(values) else found


def _value_words(table: pd.DataFrame, name: str) -> str:
    values = distinct(table[name])
    some = ", ".join(in_words(one) for one in values[:4])
    return f"{name} ({some}{', ...' if len(values) > 4 else ''})"


def in_words(value: Any) -> str:
    """A value as a legend writes it."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | float | np.integer | np.floating):
        number = float(value)
        return f"{number:.6g}" if number.is_integer() else f"{number:.3g}"
    text = str(value).replace("_", " ").replace("$", r"\$") or "none"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 13]} ... {text[-8:]}"

"""Objects that hold arrays in one line, and as a small HTML table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from html import escape
from typing import Any

import numpy as np

#: Longest array that is written out.
WRITTEN = 6
#: Largest number of characters of a cell, and of rows of a table, in HTML.
CELL, ROWS = 120, 20


def array_words(array: np.ndarray[Any, Any]) -> str:
    """An array in few words.

    Parameters
    ----------
    array : ndarray

    Returns
    -------
    str
        Its entries if they are few, else its shape and range: ``<1000: 0.001 to 1>``.
    """
    if array.size <= WRITTEN:
        return np.array2string(array, precision=6, separator=", ").replace("\n", "")
    shape = " x ".join(str(n) for n in array.shape)
    if array.dtype.kind not in "iuf":
        return f"<{shape}>"
    return f"<{shape}: {range_words(array)}>"


def range_words(array: np.ndarray[Any, Any]) -> str:
    """Smallest and largest number of an array, in words.

    Parameters
    ----------
    array : ndarray
        Numbers; NaN is left out.

    Returns
    -------
    str
        As ``0.001 to 1``, or ``all 1``.
    """
    known = array[~np.isnan(array)]
    if not known.size:
        return "all nan"
    low, high = known.min(), known.max()
    return f"all {low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def short_repr(self: Any) -> str:
    """``repr`` of a dataclass with arrays: what differs from the defaults, arrays in few words.

    Parameters
    ----------
    self : dataclass

    Returns
    -------
    str
    """
    parts = (
        f"{name}={array_words(value) if isinstance(value, np.ndarray) else repr(value)}"
        for name, value in stated_fields(self).items()
    )
    return f"{type(self).__name__}({', '.join(parts)})"


def words(value: Any) -> str:
    """A value of a field in few words.

    Parameters
    ----------
    value : object

    Returns
    -------
    str
        At most `CELL` characters.
    """
    if isinstance(value, np.ndarray):
        text = array_words(value)
    elif isinstance(value, float | np.floating):
        text = f"{value:.6g}"
    elif isinstance(value, str):
        text = value
    else:
        text = repr(value)
    return text if len(text) <= CELL else f"{text[: CELL - 4]} ..."


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A small HTML table; it sets no colours, so that it is readable on any background.

    Parameters
    ----------
    title : str
        Caption.
    columns : sequence of str
        Names of the columns; none for no header.
    rows : iterable of sequence
        Cells, as `words` writes them. Rows after the first `ROWS` are counted only.

    Returns
    -------
    str
    """

    def row(tag: str, cells: Iterable[Any]) -> str:
        style = ' style="text-align: left"'
        return f"<tr>{''.join(f'<{tag}{style}>{escape(words(c))}</{tag}>' for c in cells)}</tr>"

    held = list(rows)
    lines = [row("td", cells) for cells in held[:ROWS]]
    if len(held) > ROWS:
        lines.append(row("td", [f"and {len(held) - ROWS} more"]))
    head = f"<thead>{row('th', columns)}</thead>" if columns else ""
    caption = f'<caption style="text-align: left"><b>{escape(words(title))}</b></caption>'
    return f"<table>{caption}{head}<tbody>{''.join(lines)}</tbody></table>"


def html_list(title: str, entries: Mapping[str, Any]) -> str:
    """A small HTML table of names and values; entries that are None are left out.

    Parameters
    ----------
    title : str
        Caption.
    entries : mapping of str to object

    Returns
    -------
    str
    """
    return html_table(title, (), [one for one in entries.items() if one[1] is not None])


def short_html(self: Any) -> str:
    """``_repr_html_`` of a dataclass: what `short_repr` says, one row for each field.

    Parameters
    ----------
    self : dataclass

    Returns
    -------
    str
    """
    return html_list(type(self).__name__, stated_fields(self))


def stated_fields(self: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults; all arrays.

    Parameters
    ----------
    self : dataclass

    Returns
    -------
    dict of str to object
        Without those that are None or excluded from ``repr``.
    """
    held: dict[str, Any] = {}
    for one in fields(self):
        value = getattr(self, one.name)
        if not one.repr or value is None:
            continue
        if isinstance(value, np.ndarray) or one.default is MISSING or value != one.default:
            held[one.name] = value
    return held

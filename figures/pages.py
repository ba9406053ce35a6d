"""Numbers of the documentation's pages, inserted from small tables.

The tables lie beside the pages as CSV, in ``tables/``, with every number as it was published. A
page says where one goes::

    <!-- table: NAME -->          the rows of tables/NAME.csv follow, up to
    <!-- end of table -->

    <!-- = within(ratios("NAME"), 15) -->33 of 35<!-- end -->     a value worked out from tables

In a table's header ``X ±`` after X is its uncertainty, written into the same cell, and ``X [%]`` is
X in per cent. Values are Python expressions of the functions in `VALUES`. ::

    python -m figures.pages docs/*.md      # make gallery

renders all of a page. Both kinds of comment are hidden wherever Markdown is shown, but a value's
must not begin a line, as that would end the paragraph.
"""

from __future__ import annotations

import csv
import fnmatch
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

#: Only lines of a table may stand in it: a page whose markers do not fit loses nothing.
_TABLE = re.compile(r"(<!-- table: (\w+) -->)\n(?:\n|\|[^\n]*\n)*(<!-- end of table -->)")
_VALUE = re.compile(r"(<!-- = (.+?) -->).*?(<!-- end -->)", re.DOTALL)
PERCENT = " [%]"
UNCERTAINTY = " ±"


def markdown(path: Path) -> str:
    """Format a CSV file as a Markdown table.

    Parameters
    ----------
    path : Path
        The CSV file, with a header.

    Returns
    -------
    str
        Ends with a line break.

    Raises
    ------
    ValueError
        If a row is longer or shorter than the header.
    """
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    places = [i for i, name in enumerate(header) if not name.endswith(UNCERTAINTY)]
    lines = [[header[i].removesuffix(PERCENT) for i in places], ["---"] * len(places)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path.name}: {len(row)} cells under {len(header)} names: {row}")
        lines.append([_cell(header, row, i) for i in places])
    return "".join(_line(cells) for cells in lines)


def _cell(header: list[str], row: list[str], i: int) -> str:
    if not row[i]:
        return ""
    value = f"{row[i]} %" if header[i].endswith(PERCENT) else row[i]
    error = header[i].removesuffix(PERCENT) + UNCERTAINTY
    spread = row[i + 1] if header[i + 1 : i + 2] == [error] else ""
    return f"{value} ± {spread}" if spread else value


def _line(cells: list[str]) -> str:
    if set(cells) == {"---"}:
        return f"|{'|'.join(cells)}|\n"
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def ratios(folder: Path, name: str, where: str = "", columns: str = "K = *") -> pd.Series[float]:
    """Return the numbers of some columns of a table, without their uncertainties.

    Parameters
    ----------
    folder : Path
        Folder of the tables; given by `render`.
    name : str
        Name of the table.
    where : str
        Condition on rows, as `DataFrame.query` takes it; all rows by default.
    columns : str
        Pattern of column names, with ``*`` for any characters.

    Returns
    -------
    Series
        Row by row; empty cells are omitted.
    """
    table = pd.read_csv(folder / f"{name}.csv")
    rows = table.query(where) if where else table
    names = [one for one in fnmatch.filter(table.columns, columns) if not one.endswith(UNCERTAINTY)]
    return pd.Series(rows[names].to_numpy(dtype=float).ravel()).dropna()


def within(values: pd.Series[float], percent: float) -> str:
    """Count the ratios that are within some per cent of 1.

    Parameters
    ----------
    values : Series
        Ratios.
    percent : float
        Largest distance from 1, in per cent.

    Returns
    -------
    str
        For example "33 of 35".
    """
    close = (values - 1.0).abs() <= percent / 100.0 + 1e-9
    return f"{int(close.sum())} of {len(values)}"


def off(*values: pd.Series[float]) -> str:
    """Return the largest distance of a ratio from 1, in per cent.

    Parameters
    ----------
    *values : Series
        Ratios.

    Returns
    -------
    str
        A whole number.
    """
    return f"{max(100.0 * (one - 1.0).abs().max() for one in values):.0f}"


def entry(folder: Path, name: str, row: str, column: str) -> str:
    """Return one cell of a table as it is written.

    Parameters
    ----------
    folder : Path
        Folder of the tables; given by `render`.
    name : str
        Name of the table.
    row : str
        First cell of the row.
    column : str
        Name of the column.

    Returns
    -------
    str
    """
    table = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
    return str(table.set_index(table.columns[0]).loc[row, column])


#: What the expressions of a page may call; the first two look into its folder of tables.
VALUES: dict[str, Callable[..., Any]] = {
    "ratios": ratios,
    "entry": entry,
    "within": within,
    "off": off,
}


def render(page: str, folder: Path) -> str:
    """Replace the tables and values of a page by those of the CSV files.

    Parameters
    ----------
    page : str
        Text of the page, in Markdown.
    folder : Path
        Folder of the tables.

    Returns
    -------
    str
        Text of the page.
    """
    names = VALUES | {name: partial(VALUES[name], folder) for name in ("ratios", "entry")}
    page = _TABLE.sub(lambda at: f"{at[1]}\n\n{markdown(folder / f'{at[2]}.csv')}\n{at[3]}", page)
    return _VALUE.sub(lambda at: f"{at[1]}{eval(at[2], names)}{at[3]}", page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        path.write_text(render(text, path.parent / "tables"), encoding="utf-8")

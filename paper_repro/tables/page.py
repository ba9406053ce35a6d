"""Tables as text for a terminal, as CSV, and as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nqm import __version__
from nqm.errors import NQMError
from nqm.table import replacing, write_table
from paper_repro.tables.collect import Line, Measured
from paper_repro.tables.rows import Published, Saved, Source, Table

Filled = Sequence[tuple[Table, Sequence[Line]]]
#: What a cell says where there is no number.
UNKNOWN, MISSING = "not established", "not run"


def write_tables(filled: Filled, out: Path) -> list[Path]:
    """Write ``tables.html`` and one CSV file per table.

    Parameters
    ----------
    filled : sequence of (Table, sequence of Line)
        As `collect` returns it.
    out : Path
        Folder of the files; it is made if it does not exist.

    Returns
    -------
    list of Path
        Paths of the page and of the CSV files.

    Raises
    ------
    NQMError
        If the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NQMError(f"cannot make the folder {out}: {error.strerror}") from None
    paths = []
    for table, lines in filled:
        path = out / f"table_{table.name}.csv"
        metadata = {"version": __version__, "title": table.title, "unit": table.unit}
        write_table(path, as_frame(lines), metadata)
        paths.append(path)
    page = out / "tables.html"
    with replacing(page) as stream:
        stream.write(_page(filled).encode())
    return [page, *paths]


def as_text(filled: Filled) -> str:
    """Format all tables for a terminal, one line per row.

    Parameters
    ----------
    filled : sequence of (Table, sequence of Line)
        As `collect` returns it.

    Returns
    -------
    str
    """
    parts = []
    for table, lines in filled:
        cells = [_cells(table, line) for line in lines]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        parts.append(f"{table.title} ({table.unit}): {table.paper} | ours | smaller scale")
        for *first, smaller in cells:
            padded = (cell.ljust(width) for cell, width in zip(first, widths, strict=True))
            parts.append("  " + "  ".join((*padded, "; ".join(smaller))).rstrip())
        parts.append("")
    return "\n".join(parts)


def as_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """Return a table as a DataFrame with one row per method.

    Parameters
    ----------
    lines : sequence of Line
        Lines of one table.

    Returns
    -------
    DataFrame
        Numbers of the paper and ours, in the unit of the table (NaN if there are none), and their
        source.
    """
    return pd.DataFrame([_record(line) for line in lines])


def _record(line: Line) -> dict[str, object]:
    paper, ours, source = line.row.paper, line.ours, line.row.source
    nan = math.nan
    return {
        "method": line.row.method,
        "paper_mean": nan if paper.mean is None else paper.mean,
        "paper_sd": nan if paper.sd is None else paper.sd,
        "paper_n": nan if paper.n is None else float(paper.n),
        "paper_words": paper.words,
        "mean": nan if ours is None else ours.mean,
        "sd": nan if ours is None else ours.sd,
        "n": 0 if ours is None else ours.n,
        "diverged": 0 if ours is None else ours.diverged,
        "status": "run" if ours is not None else MISSING,
        "hardware": "" if ours is None else ours.hardware,
        "smaller_scale": "; ".join(f"{one.title}: {one.mean:.6g}" for one in line.smaller),
        **_origin(source),
    }


def _origin(source: Source | Saved) -> dict[str, str]:
    """Recipe, arm, weights, metric and data; of saved tables `data` says which rows count."""
    if isinstance(source, Saved):
        return {
            "recipe": "",
            "arm": "",
            "weights": "",
            "metric": source.column,
            "data": source.words,
        }
    return {
        "recipe": source.recipe,
        "arm": source.arm,
        "weights": source.weights,
        "metric": source.metric,
        "data": "+".join(source.data),
    }


def _cells(table: Table, line: Line) -> tuple[str, str, str, list[str]]:
    """Method, paper, ours, and one text for each result at a smaller scale."""
    ours = MISSING
    if line.ours is not None:
        ours = _measured(table, line.ours)
    if line.left_out:
        ours += " (runs with other settings are left out)"
    smaller = [f"{one.title}: {_measured(table, one)}" for one in line.smaller]
    return line.row.method, _published(table, line.row.paper), ours, smaller


def _published(table: Table, paper: Published) -> str:
    if paper.mean is None:
        return f"{UNKNOWN}; {paper.words}" if paper.words else UNKNOWN
    return _number(table, paper.mean, paper.sd, paper.n)


def _measured(table: Table, one: Measured) -> str:
    text = _number(table, one.mean, None if math.isnan(one.sd) else one.sd, one.n)
    return f"{text}, {one.diverged} diverged" if one.diverged else text


def _number(table: Table, mean: float, sd: float | None, n: int | None) -> str:
    text = f"{mean:.{table.digits}f}"
    text += "" if sd is None else f" ± {sd:.{table.digits}f}"
    return text if n is None else f"{text} (n = {n})"


def _page(filled: Filled) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("paper_repro"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    tables = [
        {
            "name": table.name,
            "title": table.title,
            "paper": table.paper,
            "unit": table.unit,
            "note": table.note,
            "rows": [
                {
                    "cells": _cells(table, line),
                    "source": line.row.source,
                    "ours": line.ours,
                }
                for line in lines
            ],
        }
        for table, lines in filled
    ]
    rows = [line for _, lines in filled for line in lines]
    return environment.get_template("tables.html.j2").render(
        tables=tables,
        version=__version__,
        run=sum(line.ours is not None for line in rows),
        total=len(rows),
    )

"""Pictures of a comparison, from its table."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from figures import combine, style


def draw(table: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw a page of pictures of a comparison, as PNG and PDF.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.comparison.compare`.
    folder : Path
        Folder for ``compare.png`` and ``compare.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    mpl.use("Agg")
    test = table[table["data"] == "test"]
    shifted = bool((table["data"] != "test").any())
    rules = int((~test["rule"].isin(["member", "mean_member"])).sum())
    with style.context():
        height = max(2.4, 0.9 + 0.17 * rules)
        figure = style.new_figure(style.PAGE, height * (2 if shifted else 1))
        axes = figure.subplot_mosaic("abc;ddd" if shifted else "abc")
        combine.decomposition(test, ax=axes["a"])
        combine.predicted(test, ax=axes["b"])
        combine.passes(test, ax=axes["c"])
        if shifted:
            combine.soup_scatter(table, ax=axes["d"])
        style.panel_letters(list(axes.values()))
        figure.suptitle(title, fontsize=9, parse_math=False)
    return style.save(figure, folder / "compare", {"title": title})

"""Pictures of a comparison, from its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from numpy.typing import NDArray

from figures import agreement, combine, style
from neural.combine.comparison import INSIDE, OUTSIDE
from neural.combine.ranking import candidates


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
    test = table[table["data"] == "test"]
    shifted = bool((table["data"] != "test").any())
    rules = int((~test["rule"].isin(["member", "mean_member"])).sum())
    with style.context():
        height = max(2.4, 0.9 + 0.17 * rules)
        figure = style.new_figure(style.PAGE, height * (2 if shifted else 1))
        predicted = bool(test["predicted"].notna().any())
        top = "abc" if predicted else "aac"
        axes = figure.subplot_mosaic(f"{top};ddd" if shifted else top)
        combine.decomposition(test, legend=False, ax=axes["a"])
        if predicted:
            combine.predicted(test, legend=False, ax=axes["b"])
        combine.passes(test, legend=False, ax=axes["c"])
        if shifted:
            combine.soup_scatter(table, ax=axes["d"])
        # Rows may fill all of a panel: what they name alike stands below.
        figure.legend(*_shared(axes[one] for one in top), loc="outside lower center", ncols=7)
    return style.finish(figure, folder / "compare", title, axes.values())


def draw_growth(table: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw accuracy and losses against the number of members, as PNG and PDF.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.growth.growth`.
    folder : Path
        Folder for ``growth.png`` and ``growth.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    test = table[table["data"] == "test"]
    with style.context():
        figure = style.new_figure(style.PAGE, 2.8)
        axes = figure.subplots(1, 3)
        for ax, metric in zip(axes, ("accuracy", "nll", "nll_tuned"), strict=True):
            combine.ingredients(test, metric=metric, ax=ax)
            handles, labels = ax.get_legend_handles_labels()
            ax.get_legend().remove()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return style.finish(figure, folder / "growth", title, axes)


def _shared(axes: Iterable[Axes]) -> tuple[list[Artist], list[str]]:
    """Legend of several panels, in which every name stands once."""
    named: dict[str, Artist] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        named |= {name: one for name, one in zip(labels, handles, strict=True) if name not in named}
    return list(named.values()), list(named)


def draw_ranking(tables: Mapping[str, pd.DataFrame], folder: Path, title: str) -> list[Path]:
    """Draw predicted against measured losses of several comparisons, as PNG and PDF.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Name -> table of `neural.combine.comparison.compare`.
    folder : Path
        Folder for ``ranking.png`` and ``ranking.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    rows = pd.concat([candidates(table).assign(comparison=name) for name, table in tables.items()])
    far = rows["predicted_from"] == OUTSIDE
    panels = {INSIDE: rows[~far], OUTSIDE: rows[far]}
    panels = {name: part for name, part in panels.items() if len(part)}
    with style.context():
        figure = style.new_figure(style.PAGE, 4.3)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, part) in zip(axes, panels.items(), strict=True):
            combine.ways(part, names=rows["comparison"], ax=ax)
            ax.set_title(name)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return style.finish(figure, folder / "ranking", title, axes)


def draw_low_precision(table: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw a page about low precision, as PNG and PDF: loss against bits and passes, prediction.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.low_precision.low_precision`.
    folder : Path
        Folder for ``low_precision.png`` and ``low_precision.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    with style.context():
        figure = style.new_figure(style.PAGE, 3.2)
        axes = figure.subplots(1, 3)
        combine.budget(table, cost="bits", legend=False, ax=axes[0])
        combine.budget(table, cost="passes", legend=False, ax=axes[1])
        # Where they are not to be believed, they lie far off and hide those that are.
        believed = table[table["predicted_from"] != OUTSIDE]
        combine.predicted(believed, legend=False, ax=axes[2])
        figure.legend(*_shared(axes[1:]), loc="outside lower center", ncols=5)
    return style.finish(figure, folder / "low_precision", title, axes)


def draw_curve(table: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw a curve between two models, as PNG and PDF: train loss and test error along it.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.curve.judge_curve`.
    folder : Path
        Folder for ``curve.png`` and ``curve.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    with style.context():
        figure = style.new_figure(style.PAGE, 2.6)
        axes = figure.subplots(1, 2)
        combine.curve(table, data="train", metric="nll", ax=axes[0])
        combine.curve(table, data="test", metric="error", ax=axes[1])
    return style.finish(figure, folder / "curve", title, axes)


def draw_plane(
    table: pd.DataFrame, folder: Path, title: str, path: NDArray[np.float64] | None = None
) -> list[Path]:
    """Draw the plane through three models, as PNG and PDF: contours of test loss and error.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.curve.judge_plane`.
    folder : Path
        Folder for ``plane.png`` and ``plane.pdf``.
    title : str
    path : ndarray, shape (points, 2), optional
        A curve on the plane.

    Returns
    -------
    list of Path
        The files.
    """
    with style.context():
        figure = style.new_figure(style.PAGE, 2.9)
        axes = figure.subplots(1, 2)
        combine.plane(table, metric="nll", path=path, ax=axes[0])
        combine.plane(table, metric="error", path=path, ax=axes[1])
    return style.finish(figure, folder / "plane", title, axes)


def draw_gates(table: pd.DataFrame, people: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw ensembles of text classifiers, as PNG and PDF: kappa of every two, gains of weights.

    Parameters
    ----------
    table, people : DataFrame
        See `neural.combine.text_ensembles.compare_gates`.
    folder : Path
        Folder for ``gates.png`` and ``gates.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    # Single models lose ten times what weights can gain, and have panels of their own.
    alone = table["rule"].isin(["member", "control", "best"])
    with style.context():
        figure = style.new_figure(style.PAGE, 3.9)
        axes = figure.subplot_mosaic("abc;ade", width_ratios=(1.5, 1.0, 1.0))
        agreement.kappa(people, ax=axes["a"])
        for (left, right), rows in (("bc", table[alone]), ("de", table[~alone])):
            agreement.gains(rows, columns=("accuracy",), ax=axes[left])
            losses = [one for one in ("nll", "nll_tuned") if f"{one}_gain" in rows]
            agreement.gains(rows, columns=losses, ax=axes[right])
            axes[right].set_yticklabels([])
        for name, text in zip(
            "bcde", ("one model", "one model", "weights", "weights"), strict=True
        ):
            axes[name].set_title(text)
        shown = axes["e"].get_legend_handles_labels()
        if len(shown[1]) > 1:
            figure.legend(*shown, loc="outside lower right", ncols=2)
    return style.finish(figure, folder / "gates", title, axes.values())

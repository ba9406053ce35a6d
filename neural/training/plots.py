"""Figures of an experiment, drawn from its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from figures import combine, runs, style
from neural.training.summary import per_seed


def draw(
    results: pd.DataFrame,
    history: pd.DataFrame,
    folder: Path,
    title: str,
    starts: Mapping[str, int] | None = None,
) -> list[Path]:
    """Draw curves over epochs, and the test metric of every model, as PNG and PDF.

    Parameters
    ----------
    results : DataFrame
        Result of `neural.training.experiment.run_experiment`.
    history : DataFrame
        Result of `neural.training.experiment.histories`.
    folder : Path
        Folder for ``comparison.png`` and ``comparison.pdf``.
    title : str
        Title of the figure; plain text, not mathematics.
    starts : mapping of str to int, optional
        Arm -> T0, epochs done when its members begin; marked on the curves.

    Returns
    -------
    list of Path
        The files that were written; empty if every run diverged.
    """
    metric = "bpc" if (results["metric"] == "bpc").any() else "accuracy"
    compared = per_seed(results, metric)
    if compared.empty:
        return []
    models = len(compared.drop_duplicates(["arm", "weights"]))
    with style.context():
        figure = style.new_figure(style.PAGE, 1.0 + 0.16 * max(models, 10))
        left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.15])
        column = "loss" if metric == "bpc" else "accuracy"
        runs.over_epochs(history, column=column, ax=left, starts=starts)
        runs.comparison(compared, metric=metric, ax=right)
        if column == "accuracy":  # leave early epochs out of the range of the axis
            settled = history.loc[history["epoch"] >= history["epoch"].max() / 3, column]
            drawn = history[[name for name in (column, f"average_{column}") if name in history]]
            left.set_ylim(
                float(settled.min()) - 0.005, min(float(drawn.max().max()) + 0.005, 1.0005)
            )
    return style.finish(figure, folder / "comparison", title)


def draw_cycles(table: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw rate, test error and distance over the cycles of snapshots, as PNG and PDF.

    Parameters
    ----------
    table : DataFrame
        Result of `neural.training.cycles.cycles`.
    folder : Path
        Folder for ``cycles.png`` and ``cycles.pdf``.
    title : str
        Title of the figure; plain text, not mathematics.

    Returns
    -------
    list of Path
        The files that were written; empty without snapshots.
    """
    if table.empty:
        return []
    kinds = list(dict.fromkeys(table["kind"]))
    columns = ("lr", "error", "distance")
    with style.context():
        width = min(style.PAGE, 1.2 + 2.4 * len(kinds))
        figure = style.new_figure(width, 5.2)
        axes = figure.subplots(3, len(kinds), sharex="col", sharey="row", squeeze=False)
        for column, kind in enumerate(kinds):
            part = table[table["kind"] == kind]
            for ax, name in zip(axes[:, column], columns, strict=True):
                combine.cycle(part, column=name, ax=ax)
                ax.label_outer()
            axes[0, column].set_title(kind)
            axes[-1, column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2)
    return style.finish(figure, folder / "cycles", title, axes.flat)

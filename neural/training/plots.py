"""Pictures of an experiment, from its tables."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from figures import runs, style
from neural.training.summary import per_seed


def draw(results: pd.DataFrame, history: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Curves over epochs, and every model's test metric over seeds, as PNG and PDF.

    Parameters
    ----------
    results, history : DataFrame
        As `neural.training.experiment` collects them.
    folder : Path
        Takes ``comparison.png`` and ``comparison.pdf``.
    title : str

    Returns
    -------
    list of Path
        Empty if every run diverged.
    """
    mpl.use("Agg")  # into files only
    metric = "bpc" if (results["metric"] == "bpc").any() else "accuracy"
    compared = per_seed(results, metric)
    if compared.empty:
        return []
    models = len(compared.drop_duplicates(["arm", "weights"]))
    with style.context():
        figure = style.new_figure(style.PAGE, 1.0 + 0.16 * max(models, 10))
        left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.15])
        column = "loss" if metric == "bpc" else "accuracy"
        runs.over_epochs(history, column=column, ax=left)
        runs.comparison(compared, metric=metric, ax=right)
        if column == "accuracy":  # what early epochs do is not the question
            settled = history.loc[history["epoch"] >= history["epoch"].max() / 3, column]
            left.set_ylim(float(settled.min()) - 0.005, float(history[column].max()) + 0.005)
        figure.suptitle(title, fontsize=9, parse_math=False)  # a "$" of the user's is one
    return style.save(figure, folder / "comparison", {"title": title})

"""Pictures of an experiment, from its tables."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from figures import bridge, runs, style
from neural.noise import noise_exponent
from neural.summary import per_seed


def draw(results: pd.DataFrame, history: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Curves over epochs, and every model's test metric over seeds, as PNG and PDF.

    Parameters
    ----------
    results, history : DataFrame
        As `neural.experiment` collects them.
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


def draw_bridge(
    table: pd.DataFrame, course: pd.DataFrame, spectrum: pd.DataFrame, folder: Path, title: str
) -> list[Path]:
    """A page of pictures of a bridge, as PNG and PDF.

    Parameters
    ----------
    table, course, spectrum : DataFrame
        As `neural.bridge_run` makes them.
    folder : Path
        Takes ``bridge.png`` and ``bridge.pdf``.
    title : str
    """
    mpl.use("Agg")
    with style.context():
        figure = style.new_figure(style.PAGE, 6.6)
        several = table["batch_size"].nunique() > 1
        axes = figure.subplot_mosaic("abc;def;ghh" if several else "abc;def;ggg")
        pairs = spectrum[spectrum["kind"] == "pair"]
        h, noise = (pairs[name].to_numpy(float) for name in ("curvature", "noise_variance"))
        bridge.spectrum(spectrum, ax=axes["a"])
        bridge.noise_against_curvature(spectrum, noise_exponent(h, noise), ax=axes["b"])
        bridge.course(course, ax=axes["c"])
        bridge.against_members(table, ax=axes["d"])
        bridge.against_rate(table, ax=axes["e"])
        last = "gh" if several else "fg"
        if several:
            bridge.against_batch_size(table, ax=axes["f"])
        bridge.averages(table, ax=axes[last[0]])
        bridge.residuals(table, float(h.max()), ax=axes[last[1]])
        style.panel_letters(list(axes.values()))
        figure.suptitle(title, fontsize=9, parse_math=False)  # a "$" of the user's is one
    return style.save(figure, folder / "bridge", {"title": title})

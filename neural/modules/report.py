"""What a table of compositions shows: means with intervals, claims that it tests, a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neural.combine.comparison import SURROGATE
from neural.combine.pool import POOLS
from neural.evaluate.intervals import mean_interval
from nqm import keys

if TYPE_CHECKING:
    import pandas as pd


def settings_key(config: Any, *without: str) -> dict[str, Any]:
    """What differs from the defaults, but for some settings; the task is always stated.

    Parameters
    ----------
    config : dataclass
        Settings with a `task`.
    *without : str
        Names that are left out.

    Returns
    -------
    dict of str to object
    """
    found = keys.differing(config)
    return {"task": config.task, **{n: v for n, v in found.items() if n not in without}}


def reported(table: pd.DataFrame, out: Path) -> tuple[pd.DataFrame, list[str]]:
    """Write what a table shows beside it.

    Parameters
    ----------
    table : DataFrame
        Of `neural.modules.composition.compositions`, with ``split`` and ``target``.
    out : Path
        Folder of ``modules.parquet``.

    Returns
    -------
    summary : DataFrame
        See `summary`.
    lines : list of str
        See `claims`; and the files.
    """
    means = summary(table)
    target = out / "modules_summary.csv"
    means.to_csv(target, index=False)
    files = [out / "modules.parquet", target, *draw(means, out)]
    return means, [*claims(table), *map(str, files)]


def claims(table: pd.DataFrame) -> list[str]:
    """What the table says of the claims of Holtermann et al. 2024, in sentences.

    Parameters
    ----------
    table : DataFrame
        See `reported`.

    Returns
    -------
    list of str
        Of each pool, how often its loss is at most that of the averaged parameters, over all
        targets, splits, scores and numbers of modules above one.
    """
    lines = []
    for pool, part in pairs(table).groupby("space", sort=False):
        lines.append(
            f"ensemble of {pool}: loss at most that of the averaged parameters in "
            f"{part['lower'].mean():.0%} of {len(part)} pairs, median ratio "
            f"{part['ratio'].median():.4f}"
        )
    return lines


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Ensembles of several modules beside the average of the same modules' parameters.

    Parameters
    ----------
    table : DataFrame
        See `reported`.

    Returns
    -------
    DataFrame
        One row for each pool, target, split, score and number of modules above one: ``split``,
        ``target``, ``score``, ``kept``, ``weighting``, ``space`` (the pool), ``lower`` (whether the
        ensemble's loss is at most that of the average) and ``ratio`` of the two losses.
    """
    import pandas as pd

    several = table[(table["members"] > 1) & (table["kept"] > 1)]
    case = ["split", "target", "score", "kept", "weighting"]
    by = several.pivot_table(index=case, columns="space", values="nll", sort=False)
    found = []
    for pool in (name for name in POOLS if name in by):
        both = by[["weights", pool]].dropna()
        lower = (both[pool] <= both["weights"]).astype(float)
        part = pd.DataFrame({"space": pool, "lower": lower, "ratio": both[pool] / both["weights"]})
        found.append(part.reset_index())
    columns = [*case, "space", "lower", "ratio"]
    return pd.concat(found) if found else pd.DataFrame(columns=columns)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over targets, then over splits, with 95 % intervals over splits.

    Parameters
    ----------
    table : DataFrame
        See `reported`.

    Returns
    -------
    DataFrame
        One row for each way of combining: score, kept, weighting, space, then mean and half width
        of accuracy, nll, nll_tuned, and of nll minus that of the uniform average (by split), mean
        predicted loss, and the share of predictions that are to be believed. Splits share texts, so
        that intervals are too narrow rather than too wide.
    """
    import pandas as pd

    rows = []
    average = (table["score"] == "uniform") & (table["space"] == "weights")
    uniform = table[average].groupby("split")["nll"].mean()
    by = ["score", "kept", "weighting", "space"]
    # A member of another name for each target: their mean.
    for key, group in table.groupby(by, sort=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        means = group.groupby("split")[["accuracy", "nll", "nll_tuned"]].mean()
        means["nll_minus_uniform"] = means["nll"] - uniform
        for name in map(str, means):
            values = means[name].dropna()
            found = mean_interval(values.tolist()) if len(values) else None
            row[name] = found.mean if found else math.nan
            row[f"{name}_half"] = found.half_width if found else math.nan
        row["predicted"] = group["predicted"].mean()
        row["believed"] = float((group["predicted_from"] == SURROGATE).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def draw(means: pd.DataFrame, out: Path) -> list[Path]:
    """Draw the summary, as PNG and PDF: accuracy, and loss at a tuned temperature.

    Parameters
    ----------
    means : DataFrame
        See `summary`.
    out : Path

    Returns
    -------
    list of Path
    """
    from figures import modules as pictures
    from figures import style

    with style.context():
        figure = style.new_figure(style.PAGE, 4.6)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, column in zip(axes, ("accuracy", "nll_tuned"), strict=True):
            pictures.scores(means, column=column, legend=False, ax=ax)  # rows fill the panels
        shown = axes[0].get_legend_handles_labels()
        figure.legend(*shown, loc="outside lower center", ncols=4)
    return style.save(figure, out / "modules", {"table": "modules_summary"})

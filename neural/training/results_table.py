"""Results of runs in words: a table of models, and what the seeds say of their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click
import pandas as pd

from neural.training.averages import AVERAGES
from neural.training.summary import reference_model, summarise

#: Metric -> heading, factor, decimals, whether more is better, and the unit of differences.
METRICS: dict[str, tuple[str, float, int, bool, str]] = {
    "accuracy": ("accuracy %", 100.0, 2, True, "points of accuracy"),
    "bpc": ("bits/char", 1.0, 4, False, "bits per character"),
    "nll": ("nll", 1.0, 4, False, "nats of test loss"),
    "ece": ("ece %", 100.0, 2, False, "points of calibration error"),
    "brier": ("brier", 1.0, 4, False, "of the Brier score"),
}
#: Models that cost one pass of one network, and are some arm's own single model.
SINGLE = ("iterate", "averaged", "snapshot_soup", *AVERAGES)
_SEVERAL = ("ensemble", "snapshot_ensemble", "mc_dropout")
BEST = "*"


def compare(results: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """Compare all models by all metrics of the test set.

    Parameters
    ----------
    results : DataFrame
        Result of `neural.training.experiment.run_experiment`.
    reference : str, optional
        Arm with which the others are compared; the first one by default.

    Returns
    -------
    DataFrame
        Columns metric, those of `summarise`, and verdict.

    Raises
    ------
    NQMError
        If there is no such arm.
    """
    frames = []
    for metric in _present(results):
        summary = summarise(results, metric, reference=reference)
        model = reference_model(results, metric, reference)
        rows = summary.to_dict("records")
        verdicts = [verdict(row, metric, model) for row in rows]
        summary.insert(0, "metric", metric)
        frames.append(summary.assign(verdict=verdicts))
    columns = ["metric", "arm", "weights", "n", "mean", "sd", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "pairs", "verdict"]
    joined = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return joined.reindex(columns=columns)


def _present(results: pd.DataFrame) -> list[str]:
    test = results[results["data"] == "test"]
    return [metric for metric in METRICS if (test["metric"] == metric).any()]


def verdict(row: Any, metric: str, reference: tuple[str, str] | None) -> str:
    """Say in words whether a model differs from the reference.

    Parameters
    ----------
    row : mapping
        A row of `summarise`.
    metric : str
        A key of `METRICS`.
    reference : (str, str) or None
        Arm and weights of the reference.

    Returns
    -------
    str
        Empty for the reference itself, and where no seed is common to both.
    """
    difference = row.get("difference", math.nan)
    if reference is None or not math.isfinite(difference):
        return ""
    _, factor, decimals, more, unit = METRICS[metric]
    own, other = _name(row["arm"], row["weights"]), _name(*reference)

    def said(value: float) -> str:
        return f"{factor * value:.{decimals}f}"

    pairs, low, high = int(row["pairs"]), row["difference_low"], row["difference_high"]
    if pairs == 1:
        side = "above" if difference > 0 else "below" if difference < 0 else "equal to"
        gap = f" by {said(abs(difference))} {unit}" if difference else ""
        return f"{own} {side} {other}{gap}; of one seed there is no interval"
    if low == high:  # as of a few test images; the width 0 would claim too much
        if not difference:
            return f"{own} and {other} are equal in each of {pairs} seeds"
        side = "better" if (difference > 0) == more else "worse"
        return (
            f"{own} {side} than {other} by {said(abs(difference))} {unit} in each of {pairs} "
            "seeds; equal differences give no interval"
        )
    if low <= 0.0 <= high:
        return (
            f"no difference seen between {own} and {other}: {said(difference)} {unit}, "
            f"95 % interval {said(low)} to {said(high)}, {pairs} seeds"
        )
    better = (difference > 0) == more
    ends = sorted((abs(low), abs(high)))
    return (
        f"{own} {'better' if better else 'worse'} than {other} by {said(abs(difference))} {unit}, "
        f"95 % interval {said(ends[0])} to {said(ends[1])}, {pairs} seeds"
    )


def _name(arm: str, weights: str) -> str:
    return f"{arm} ({weights})"


def text(results: pd.DataFrame, *, reference: str | None = None, style: bool = True) -> list[str]:
    """Write the results of runs as lines.

    Parameters
    ----------
    results : DataFrame
        Result of `neural.training.experiment.run_experiment`.
    reference : str, optional
        Arm with which the others are compared; the first one by default.
    style : bool
        True: the best single model is bold. False: it has a star.

    Returns
    -------
    list of str
        Single models, models that take several passes, verdicts, and the runs that diverged.

    Raises
    ------
    NQMError
        If there is no such arm.
    """
    compared = compare(results, reference)
    metrics = list(dict.fromkeys(compared["metric"]))
    lines = []
    if metrics:
        main = "bpc" if "bpc" in metrics else metrics[0]
        shown = [main, *(m for m in metrics if m not in (main, "brier"))]
        lines += _tables(compared, shown, style)
        lines.append("")
        judged = compared[(compared["metric"] == main) & compared["weights"].isin(SINGLE)]
        lines += [f"- {said}" for said in judged["verdict"] if said]
    diverged = results.loc[results["status"] == "diverged", ["arm", "seed"]].to_numpy()
    return lines + [f"diverged: {arm}, seed {seed}" for arm, seed in diverged]


def _tables(compared: pd.DataFrame, metrics: Sequence[str], style: bool) -> list[str]:
    """Rows of models: the main metric with its interval, the others' means, the seeds."""
    cells: dict[tuple[str, str], list[str]] = {}
    best: dict[int, list[tuple[str, str]]] = {}
    for column, metric in enumerate(metrics):
        _, factor, decimals, more, _ = METRICS[metric]
        rows = compared[compared["metric"] == metric].to_dict("records")
        # Equal as printed is equal.
        single = {
            (row["arm"], row["weights"]): round(factor * row["mean"], decimals)
            for row in rows
            if not several(row["weights"])
        }
        if single:
            top = (max if more else min)(single.values())
            best[column] = [model for model, value in single.items() if value == top]
        for row in rows:
            said = f"{factor * row['mean']:.{decimals}f}"
            if column == 0 and math.isfinite(row["low"]):
                low, high = (f"{factor * row[end]:.{decimals}f}" for end in ("low", "high"))
                said += f" [{low}, {high}]"
            entry = cells.setdefault((row["arm"], row["weights"]), [""] * len(metrics))
            entry[column] = said
    seeds = {(row["arm"], row["weights"]): row["n"] for row in compared.to_dict("records")}
    head = ["model", *(METRICS[metric][0] for metric in metrics), "seeds"]
    body = [[_label(*model), *entry, str(seeds[model])] for model, entry in cells.items()]
    widths = [max(len(row[k]) for row in [head, *body]) for k in range(len(head))]
    lines = [_line(head, widths, style=style, bold=range(len(head)))]
    extra: list[str] = []
    for model, shown in zip(cells, body, strict=True):
        marked = [column + 1 for column, top in best.items() if model in top]
        (extra if several(model[1]) else lines).append(
            _line(shown, widths, style=style, bold=marked, star=not style)
        )
    if extra:
        lines += ["These take several networks or passes for one prediction:", *extra]
    return [
        *lines,
        "",
        "[ ]: 95 % interval of the mean over seeds (Student's t, cut at the ends of the range)",
        f"{'bold' if style else BEST}: best single model",
    ]


def several(weights: str) -> bool:
    """Tell whether a model takes several networks or passes for one prediction.

    Parameters
    ----------
    weights : str
        Name of the model (see `neural.training.report`).

    Returns
    -------
    bool
    """
    return weights in _SEVERAL or weights.startswith("deep_ensemble")


def _label(arm: str, weights: str) -> str:
    return f"{arm}: {weights}"


def _line(
    row: Sequence[str],
    widths: Sequence[int],
    *,
    style: bool,
    bold: Sequence[int] = (),
    star: bool = False,
) -> str:
    said = []
    for column, (word, width) in enumerate(zip(row, widths, strict=True)):
        marked = column in bold
        gap = " " * (width - len(word))
        shown = click.style(word, bold=True) if style and marked else word
        shown += BEST if star and marked else " "
        said.append(shown + gap if column < 2 else gap + shown)
    return " ".join(said).rstrip()

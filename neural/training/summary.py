"""Summaries over seeds, from the table of an experiment's results."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from neural.evaluate import mean_interval, paired_difference


def summarise(results: pd.DataFrame, metric: str = "accuracy", data: str = "test") -> pd.DataFrame:
    """Compute mean, standard deviation and interval of a metric for every model of every arm.

    Parameters
    ----------
    results : DataFrame
        Result of `neural.training.experiment.run_experiment`.
    metric, data : str
        Rows with these entries in the columns `metric` and `data` are used.

    Returns
    -------
    DataFrame
        Columns arm, weights, n (number of seeds), mean, sd, low, high (95 %, Student's t), and
        difference, difference_low, difference_high: difference from the first arm's model without
        averaging over time, paired by seed. Members are averaged within each seed first.
    """
    groups = _groups(results, metric, data)
    reference = _reference(groups, str(results["arm"].iloc[0]))
    rows = []
    for (arm, weights), values in groups.items():
        interval = mean_interval(values.tolist())
        row = {"arm": arm, "weights": weights, "n": interval.n, "mean": interval.mean}
        row |= {"sd": interval.sd, "low": interval.low, "high": interval.high}
        seeds = [] if reference is None else values.index.intersection(reference.index).tolist()
        if reference is not None and reference is not values and len(seeds) > 1:
            gap = paired_difference(values[seeds].tolist(), reference[seeds].tolist())
            row |= {"difference": gap.mean}
            row |= {"difference_low": gap.low, "difference_high": gap.high}
        rows.append(row)
    return pd.DataFrame(rows)


def per_seed(results: pd.DataFrame, metric: str = "accuracy", data: str = "test") -> pd.DataFrame:
    """List the value of every seed, with the mean and the interval over seeds beside it.

    Parameters
    ----------
    results, metric, data
        See `summarise`.

    Returns
    -------
    DataFrame
        Columns arm, weights, seed, value, mean, low, high (95 %, Student's t).
    """
    rows = []
    for (arm, weights), values in _groups(results, metric, data).items():
        interval = mean_interval(values.tolist())
        for seed, value in values.items():
            row = {"arm": arm, "weights": weights, "seed": seed, "value": value}
            rows.append(row | {"mean": interval.mean, "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def _groups(results: pd.DataFrame, metric: str, data: str) -> dict[tuple[str, str], pd.Series]:
    """(arm, weights) -> values by seed."""
    chosen = results[(results["metric"] == metric) & (results["data"] == data)]
    return {
        (str(arm), str(weights)): rows.groupby("seed")["value"].mean()
        for (arm, weights), rows in chosen.groupby(["arm", "weights"], sort=False)
    }


def _reference(groups: Mapping[tuple[str, str], pd.Series], arm: str) -> pd.Series | None:
    """Values by seed of the model with which the others are compared."""
    names = ("iterate", "averaged")
    return next((groups[arm, name] for name in names if (arm, name) in groups), None)

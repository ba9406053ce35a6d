"""Summaries over seeds, from the table of an experiment's results."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from neural.evaluate import mean_interval, paired_difference
from nqm.errors import NQMError, shown, suggest

#: Models without averaging over time.
_PLAIN = ("iterate", "averaged")
#: Metric -> ends of its range, at which intervals are cut: that leaves their coverage as it is.
RANGES = {
    "accuracy": (0.0, 1.0),
    "ece": (0.0, 1.0),
    "brier": (0.0, 2.0),
    "nll": (0.0, math.inf),
    "bpc": (0.0, math.inf),
}


def summarise(
    results: pd.DataFrame,
    metric: str = "accuracy",
    data: str = "test",
    *,
    reference: str | None = None,
) -> pd.DataFrame:
    """Compute mean, standard deviation and interval of a metric for every model of every arm.

    Parameters
    ----------
    results : DataFrame
        Result of `neural.training.experiment.run_experiment`.
    metric, data : str
        Rows with these entries in the columns `metric` and `data` are used.
    reference : str, optional
        Arm with which the others are compared; the first one by default.

    Returns
    -------
    DataFrame
        Columns arm, weights, n (number of seeds), mean, sd, low, high (95 %, Student's t, cut at
        the ends of the metric's range), and difference, difference_low, difference_high, pairs:
        difference from the reference's model without averaging over time, paired by seed, and the
        number of pairs. Of one pair there is no interval. Members are averaged within each seed
        first.

    Raises
    ------
    NQMError
        If there is no such arm.
    """
    arms = list(dict.fromkeys(results["arm"].astype(str)))
    if reference is not None and reference not in arms:
        raise NQMError(f"there is no arm {shown(reference)}{suggest(reference, arms)}")
    groups = _groups(results, metric, data)
    compared = _reference(groups, arms[0] if reference is None else reference)
    rows = []
    for (arm, weights), values in groups.items():
        interval = mean_interval(values.tolist())
        low, high = within_range(metric, interval.low, interval.high)
        row = {"arm": arm, "weights": weights, "n": interval.n, "mean": interval.mean}
        row |= {"sd": interval.sd, "low": low, "high": high}
        seeds = [] if compared is None else values.index.intersection(compared.index).tolist()
        if compared is not None and compared is not values and seeds:
            gap = paired_difference(values[seeds].tolist(), compared[seeds].tolist())
            row |= {"difference": gap.mean, "pairs": gap.n}
            row |= {"difference_low": gap.low, "difference_high": gap.high}
        rows.append(row)
    return pd.DataFrame(rows)


def reference_model(
    results: pd.DataFrame, metric: str, reference: str | None = None
) -> tuple[str, str] | None:
    """Name the model with which `summarise` compares the others.

    Parameters
    ----------
    results, metric, reference
        See `summarise`.

    Returns
    -------
    (str, str) or None
        Arm and weights; None if the arm has no such model.
    """
    groups = _groups(results, metric, "test")
    arm = str(results["arm"].iloc[0]) if reference is None else reference
    return next(((arm, name) for name in _PLAIN if (arm, name) in groups), None)


def within_range(metric: str, low: float, high: float) -> tuple[float, float]:
    """Cut an interval at the ends of the metric's range.

    Parameters
    ----------
    metric : str
        A metric, see `RANGES`; others have no ends.
    low, high : float
        The interval; NaN stays.

    Returns
    -------
    low, high : float
    """
    least, most = RANGES.get(metric, (-math.inf, math.inf))
    return max(low, least) if low == low else low, min(high, most) if high == high else high


def per_seed(results: pd.DataFrame, metric: str = "accuracy", data: str = "test") -> pd.DataFrame:
    """List the value of every seed, with the mean and the interval over seeds beside it.

    Parameters
    ----------
    results, metric, data
        See `summarise`.

    Returns
    -------
    DataFrame
        Columns arm, weights, seed, value, mean, low, high (95 %, Student's t, cut at the ends of
        the metric's range).
    """
    rows = []
    for (arm, weights), values in _groups(results, metric, data).items():
        interval = mean_interval(values.tolist())
        low, high = within_range(metric, interval.low, interval.high)
        for seed, value in values.items():
            row = {"arm": arm, "weights": weights, "seed": seed, "value": value}
            rows.append(row | {"mean": interval.mean, "low": low, "high": high})
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
    return next((groups[arm, name] for name in _PLAIN if (arm, name) in groups), None)

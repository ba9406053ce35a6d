"""The learning rate at which training from a checkpoint gains most, predicted and measured.

A low rate gets nowhere in so many steps, a high one adds noise. From a checkpoint that is not a
minimum the loss therefore has a least value in between, at a rate that rises with K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from neural.bridge import ITERATE
from neural.chains import Training
from neural.drift import Drift
from neural.local_model import LocalModel
from neural.prediction import Prediction, edge, looks, predict
from neural.smoothing import Smoothing

if TYPE_CHECKING:
    import pandas as pd

#: Rates of the first search, and how far below the lowest one asked for it begins.
POINTS, BELOW = 24, 16.0


@dataclass(frozen=True)
class View:
    """A network as the scatter of one training sees it.

    Attributes
    ----------
    drift : Drift
    smoothing : Smoothing, optional
    """

    drift: Drift
    smoothing: Smoothing | None = None


def best_rate(
    local: LocalModel,
    views: Sequence[View],
    training: Training,
    members: Sequence[int],
    *,
    count: int = 5,
    progress: Callable[[int], None] | None = None,
) -> list[float | None]:
    """The rate at which the predicted loss of the mean of K is least, for every K.

    Parameters
    ----------
    local : LocalModel
    views : sequence of View
        Of one rate or more. Between two the prediction is that of both, in proportion to log lr;
        beyond, the nearest is scaled.
    training : Training
        The lowest rate of interest; steps, batch size and momentum.
    members : sequence of int
        K.
    count : int
        Looks at a training, over which its loss is averaged (`neural.prediction.looks`).
    progress : callable, optional
        Told that one more rate has been tried: at first `POINTS`, then some for every K.

    Returns
    -------
    list of float or None
        Between a sixteenth of the training's rate and the edge of stability; None where the loss
        is least at an end of that.
    """
    at = looks(training, count)
    known: dict[float, Prediction] = {}

    def change(x: float, k: int) -> float:
        if x not in known:
            known[x] = predicted(local, views, replace(training, lr=float(np.exp(x))), at)
            if progress is not None:
                progress(1)
        return float(np.nan_to_num(known[x].change(k), nan=np.inf))

    grid = np.linspace(np.log(training.lr / BELOW), np.log(edge(local, training)), POINTS)
    found: list[float | None] = []
    for k in members:
        least = int(np.argmin([change(x, k) for x in grid]))
        if least in (0, POINTS - 1):
            found.append(None)
            continue
        within = (grid[least - 1], grid[least + 1])
        best = minimize_scalar(change, within, within, (k,), "bounded", options={"xatol": 1e-3})
        found.append(float(np.exp(best.x)))
    return found


def predicted(
    local: LocalModel, views: Sequence[View], training: Training, at: Sequence[int]
) -> Prediction:
    """The prediction by the two views next to a training."""
    views = sorted(views, key=lambda view: view.drift.lr)
    x = np.log([view.drift.lr for view in views])
    place = np.interp(np.log(training.lr / (1.0 - training.momentum)), x, np.arange(len(x)))
    lower = int(place)
    near = views[lower : lower + 2]
    low = predict(local, near[0].drift, training, at, near[0].smoothing)
    part = place - lower
    if part == 0.0:
        return low
    high = predict(local, near[1].drift, training, at, near[1].smoothing)
    both = zip(astuple(low), astuple(high), strict=True)
    return Prediction(*((1.0 - part) * one + part * other for one, other in both))


def measured_best(table: pd.DataFrame) -> float | None:
    """The rate of least measured loss: a parabola in log lr through the lowest and its neighbours.

    Parameters
    ----------
    table : DataFrame
        Columns lr, measured; one row per rate.

    Returns
    -------
    float or None
        None where the lowest is the first or the last, or a loss is not finite.
    """
    rows = table.sort_values("lr")
    losses = rows["measured"].to_numpy()
    if np.isnan(losses).any():
        return None
    least = int(np.argmin(losses))
    near = slice(least - 1, least + 2)
    if least in (0, len(rows) - 1) or not np.isfinite(losses[near]).all():
        return None
    x = np.log(rows["lr"].to_numpy()[near])
    # From the middle one, where a parabola keeps its digits.
    bent, slope, _ = np.polyfit(x - x[1], losses[near], 2)
    return float(np.exp(x[1] - slope / (2.0 * bent))) if bent > 0 else None


def best_rates(
    table: pd.DataFrame,
    local: LocalModel,
    views: Sequence[View],
    *,
    count: int = 5,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Both of them, for every K and for every batch size at which three rates were tried.

    Parameters
    ----------
    table : DataFrame
        As `neural.bridge.compare` makes it, of all trainings.
    local : LocalModel
    views : sequence of View
        Of the trainings.
    count : int
        Looks at a training.
    progress : callable, optional
        As of `best_rate`.

    Returns
    -------
    DataFrame
        Columns way, batch_size, members, predicted, measured; NaN where there is none in reach.
    """
    import pandas as pd

    columns = ["way", "batch_size", "members", "predicted", "measured"]
    rows = []
    held = table[table["weights"] == ITERATE]
    for _, one in held.groupby(["way", "batch_size"], sort=False):
        if one["lr"].nunique() < 3:
            continue
        first = one.iloc[0]
        size = int(first["batch_size"])
        training = Training(
            float(one["lr"].min()), size, int(first["steps"]), float(first["momentum"]),
            str(first["sampling"]),
        )  # fmt: skip
        sizes = [int(k) for k in one["members"].unique()]
        own = [view for view in views if view.drift.batch_size == size]
        best = best_rate(local, own, training, sizes, count=count, progress=progress)
        for k, rate in zip(sizes, best, strict=True):
            rows.append((first["way"], size, k, rate, measured_best(one[one["members"] == k])))
    found = pd.DataFrame(rows, columns=columns)
    return found.astype({"predicted": float, "measured": float})

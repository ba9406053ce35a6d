"""The learning rate with the lowest loss after training from a checkpoint, predicted and measured.

At a low rate the loss hardly decreases in the given steps; a high rate adds noise. From a
checkpoint that is not a minimum the loss is therefore lowest at some rate in between, and this
rate increases with K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from neural.bridge.config import ITERATE, Training
from neural.bridge.gaussian import WeightGaussian, nearest_gaussians
from neural.bridge.prediction import Prediction, predict_loss, weighted
from neural.bridge.scatter import largest_stable_lr

if TYPE_CHECKING:
    import pandas as pd

#: Number of learning rates on the search grid, and ratio of the training's rate to the lowest one.
POINTS, BELOW = 24, 16.0


def best_lr(
    gaussians: Sequence[WeightGaussian],
    training: Training,
    members: Sequence[int],
    *,
    records: int = 5,
    progress: Callable[[int], None] | None = None,
) -> list[float | None]:
    """Find the learning rate of lowest predicted loss of the mean of K runs, for every K.

    Parameters
    ----------
    gaussians : sequence of WeightGaussian
        Measured at one learning rate or more (see `nearest_gaussians`).
    training : Training
        Gives steps, batch size and momentum; its rate is the lowest one of interest.
    members : sequence of int
        Values of K.
    records : int
        Number of recorded losses that are averaged (`Training.record_steps`).
    progress : callable, optional
        Called with 1 after every rate that is predicted: `POINTS` times for the grid, then a few
        times for every K.

    Returns
    -------
    list of float or None
        One learning rate for each K, between 1/16 of the training's rate and the edge of stability;
        None if the loss is lowest at an end of that range.
    """
    local, at = gaussians[0].checkpoint, training.record_steps(records)
    known: dict[float, Prediction] = {}

    def change(x: float, k: int) -> float:
        if x not in known:
            known[x] = predict_between(gaussians, replace(training, lr=float(np.exp(x))), at)
            if progress is not None:
                progress(1)
        return float(np.nan_to_num(known[x].change(k), nan=np.inf))

    low, high = training.lr / BELOW, largest_stable_lr(local, training)
    grid = np.linspace(np.log(low), np.log(high), POINTS)
    best: list[float | None] = []
    for k in members:
        least = int(np.argmin([change(x, k) for x in grid]))
        if least in (0, POINTS - 1):
            best.append(None)
            continue
        ends = (grid[least - 1], grid[least + 1])
        with np.errstate(invalid="ignore"):  # infinite beyond the edge of the averaged curvature
            optimum = minimize_scalar(change, ends, ends, (k,), "bounded", options={"xatol": 1e-3})
        best.append(float(np.exp(optimum.x)))
    return best


def predict_between(
    gaussians: Sequence[WeightGaussian], training: Training, at: Sequence[int]
) -> Prediction:
    """Predict the loss at any learning rate from Gaussians measured at others.

    Parameters
    ----------
    gaussians : sequence of WeightGaussian
        Measured at different learning rates.
    training : Training
        The training to predict.
    at : sequence of int
        Steps over which the loss is averaged.

    Returns
    -------
    Prediction
        Weighted mean, term by term, of the predictions from the nearest two Gaussians.
    """
    near = nearest_gaussians(gaussians, training)
    return weighted((weight, predict_loss(gaussian, at)) for weight, gaussian in near)


def measured_best(table: pd.DataFrame) -> float | None:
    """Find the learning rate of lowest measured loss, by a parabola in log lr.

    The parabola goes through the lowest loss and its two neighbours.

    Parameters
    ----------
    table : DataFrame
        Columns lr, measured; one row per rate.

    Returns
    -------
    float or None
        None if the lowest loss is at the first or last rate, if a loss is NaN, or if one of the
        three losses is not finite.
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
    # Relative to the middle point: the fit loses digits if x is far from zero.
    bent, slope, _ = np.polyfit(x - x[1], losses[near], 2)
    return float(np.exp(x[1] - slope / (2.0 * bent))) if bent > 0 else None


def best_lrs(
    table: pd.DataFrame,
    gaussians: Sequence[WeightGaussian],
    *,
    records: int = 5,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Predicted and measured best learning rate for every K.

    Batch sizes with fewer than three learning rates are left out.

    Parameters
    ----------
    table : DataFrame
        Losses of all trainings, made by `neural.bridge.api.compare`.
    gaussians : sequence of WeightGaussian
        Gaussian of the weights, one for each training.
    records, progress
        See `best_lr`.

    Returns
    -------
    DataFrame
        Columns way, batch_size, members, predicted, measured (the two learning rates); NaN where
        no best rate was found.
    """
    import pandas as pd

    columns = ["way", "batch_size", "members", "predicted", "measured"]
    rows = []
    iterates = table[table["weights"] == ITERATE]
    for _, group in iterates.groupby(["way", "batch_size"], sort=False):
        if group["lr"].nunique() < 3:
            continue
        first = group.iloc[0]
        size = int(first["batch_size"])
        training = Training(
            float(group["lr"].min()),
            size,
            int(first["steps"]),
            float(first["momentum"]),
            str(first["sampling"]),
        )
        sizes = [int(k) for k in group["members"].unique()]
        own = [gaussian for gaussian in gaussians if gaussian.training.batch_size == size]
        best: list[float | None] = []
        if own[0].members is None:
            best = best_lr(own, training, sizes, records=records, progress=progress)
        else:  # every K has Gaussians of its own
            for k in sizes:
                of_k = [gaussian for gaussian in own if gaussian.members == k]
                best += best_lr(of_k, training, [k], records=records, progress=progress)
        for k, lr in zip(sizes, best, strict=True):
            rows.append((first["way"], size, k, lr, measured_best(group[group["members"] == k])))
    return pd.DataFrame(rows, columns=columns).astype({"predicted": float, "measured": float})

"""A summary of a bridge's results in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from neural.bridge.config import ITERATE, SHUFFLED
from neural.bridge.kinks import KINKED
from neural.bridge.prediction import Prediction
from neural.curvature.gradient_noise import noise_exponent
from neural.curvature.local_quadratic import LocalQuadratic

if TYPE_CHECKING:
    import pandas as pd


#: Relative change of the noise by scatter up to which a first-order correction is taken to hold.
#: Its change along noise-free descent has no bound: it is measured, and not extrapolated.
FEEDBACK = 0.4
#: Largest part of the rise by noise that may be due to the slope that descent leaves (`cross`): the
#: displacement along it is known less well than the scatter.
ALONG_SLOPE = 0.4
#: A measured rise within this fraction of its prediction counts as predicted.
CLOSE = 0.25
#: Largest standard error of a measured rise, relative to its prediction, that decides anything.
DECIDES = 0.5


def verdict(
    table: pd.DataFrame,
    local: LocalQuadratic,
    best: pd.DataFrame | None = None,
    cost: pd.DataFrame | None = None,
) -> list[str]:
    """Summarise the results of a bridge in sentences.

    Parameters
    ----------
    table : DataFrame
        Made by `neural.bridge.api.compare`, of trainings that differ in learning rate and batch
        size.
    local : LocalQuadratic
        Slope, curvature and noise at the checkpoint.
    best : DataFrame, optional
        Made by `neural.bridge.best_lr.best_lrs`.
    cost : DataFrame, optional
        Made by `neural.bridge.timing.cost_table`.

    Returns
    -------
    list of str
        One or two sentences each.
    """
    near, diverged = in_range(table) & ~along_slope(table), np.isinf(table["measured"])
    counted = table[near & ~diverged]
    predicted = counted[np.isfinite(counted["predicted_rise"]) & (counted["predicted_rise"] > 0)]
    trained = bool(table["measured"].notna().any())
    lines = list(_headline(table, predicted, trained))
    if not near.all():
        cells = f"{int(near.sum())} of {len(table)} cells are" if near.any() else "No cell is"
        lines.append(
            f"{cells} within the range of the theory (scatter predicted to change the noise by "
            f"less than {FEEDBACK:.0%}, and the slope that descent leaves to make less than "
            f"{ALONG_SLOPE:.0%} of the rise)" + ("; only those are counted." if near.any() else ".")
        )
    lines += _diverged(table[diverged])
    change = table[~diverged & table["measured"].notna() & np.isfinite(table["predicted"])]
    if len(change):
        off = (change["measured"] / change["predicted"] - 1.0).abs()
        lines.append(
            "The whole change of the training loss, descent included, differs from its prediction "
            f"by {off.median():.1%} (median of all cells), {off.max():.1%} at most."
        )
    if trained and len(predicted):
        lines += _agreement(predicted, local)
    lines += _test_loss(counted)
    if best is not None:
        lines += _best(best, trained)
    lines += _floors(predicted[predicted["weights"] == ITERATE])
    lines += _trust(table)
    if (table["sampling"] == SHUFFLED).any():
        lines.append(
            "Shuffled epochs: every minibatch has a curvature of its own, and the noise of that "
            "does not cancel within an epoch. It is left out: rises are larger than predicted, "
            "those of averages over time most."
        )
    negative = local.negative_share()
    exponent = noise_exponent(local.pairs.values, np.diag(local.noise))
    lines += [
        f"Largest curvature {local.largest:.4g}; plain SGD is stable up to lr = "
        f"{2.0 / local.largest:.3g} on the quadratic.",
        f"{negative[0]:.1%} of the noise and {negative[1]:.1%} of the squared slope lie along "
        "negative curvature, for which the quadratic makes no prediction.",
        f"Noise along the stiffest directions goes as h^{exponent:.2f}; the noise "
        f"scale tr C / |g|^2 is {_noise_scale(local):.3g} examples.",
    ]
    if cost is not None:
        stages = [
            f"{stage} {epochs:.3g}"
            for stage, epochs in zip(cost["stage"], cost["epochs"], strict=True)
        ]
        lines.append(f"Cost in epochs, gradients of all training examples: {', '.join(stages)}.")
    return lines


def _headline(whole: pd.DataFrame, table: pd.DataFrame, trained: bool) -> Iterator[str]:
    """Whether to trust the prediction, what to do if not, and its best cell."""
    if table.empty:
        yield f"Do not trust this prediction: {_remedy(whole)}"
        return
    if not trained:
        yield (
            f"Not tried by training. {len(table)} of {len(whole)} cells are within the range of "
            "the theory."
        )
    else:
        off, error = (table["ratio"] - 1.0).abs(), table["ratio_error"]
        sure = error <= DECIDES
        right = int(((off <= 2.0 * error) | (off <= CLOSE))[sure].sum())
        of = int(sure.sum())
        if not of:
            words = "Not decided: no rise is measured well enough. Raise plan.runs, to at least "
            yield words + "twice the largest K."
        else:
            share = right / of
            word = "Trust" if share >= 0.9 else "Trust in part" if share >= 0.5 else "Do not trust"
            yield (
                f"{word}: what noise adds to the training loss is as predicted, within {CLOSE:.0%} "
                f"or two standard errors, in {right} of {of} cells that decide."
            )
    row = table.iloc[int(np.argmin(table["predicted"]))]
    at = "" if row["weights"] == ITERATE else f", {row['weights']}"
    measured = f", measured {row['measured']:+.3g}" if np.isfinite(row["measured"]) else ""
    yield (
        f"Least training loss predicted: lr = {row['lr']:.3g}, B = {row['batch_size']}, "
        f"K = {row['members']}{at}; change {row['predicted']:+.3g}{measured}."
    )


def _remedy(table: pd.DataFrame) -> str:
    """What to do where no cell is within the range of the theory, by what excludes most of them."""
    if (~in_range(table)).mean() >= 0.5:
        return (
            "the learning rates are too high for it, or the minibatches too small. Lower "
            "bridge.lr_times_sharpness, or raise bridge.batch_sizes."
        )
    if along_slope(table).any():
        return (
            "the checkpoint is too far from a minimum of its loss. Minimise first, e.g. by --set "
            "bridge.minimise=300."
        )
    return "no rise by noise is predicted, or all runs diverged. Lower bridge.lr_times_sharpness."


def _diverged(table: pd.DataFrame) -> Iterator[str]:
    """Trainings of which a run left every bound; their losses are infinite."""
    if len(table):
        rates = ", ".join(f"{lr:.3g}" for lr in sorted(table["lr"].unique()))
        yield f"Runs diverged at lr = {rates}; those losses are not counted."


def in_range(table: pd.DataFrame) -> pd.Series[bool]:
    """Rows whose noise is predicted to change little enough by scatter for first order to hold.

    Parameters
    ----------
    table : DataFrame
        Column ``noise_growth``; NaN where nothing was measured, which counts as no change.

    Returns
    -------
    Series of bool
    """
    return ~(table["noise_growth"].abs() > FEEDBACK)


def along_slope(table: pd.DataFrame) -> pd.Series[bool]:
    """Rows whose rise by noise is, in too large a part, a displacement along a slope.

    Parameters
    ----------
    table : DataFrame
        Columns ``cross`` and ``predicted_rise``.

    Returns
    -------
    Series of bool
    """
    return table["cross"].abs() > ALONG_SLOPE * table["predicted_rise"].abs()


def rank_order(table: pd.DataFrame) -> tuple[int, int]:
    """Count pairs of trainings whose losses are predicted in the right order.

    Only pairs whose measured losses differ by more than two standard errors are counted.

    Parameters
    ----------
    table : DataFrame
        Columns predicted, measured, error; a row for every K and learning rate.

    Returns
    -------
    right, pairs : int
        Number of pairs in the right order, and number of pairs that are counted.
    """
    rows = table[["predicted", "measured", "error"]].to_numpy(dtype=float)
    signs = [
        np.sign(a[0] - b[0]) == np.sign(a[1] - b[1])
        for a, b in combinations(rows, 2)
        if abs(a[1] - b[1]) > 2.0 * np.hypot(a[2], b[2])
    ]
    return int(sum(signs)), len(signs)


def _agreement(table: pd.DataFrame, local: LocalQuadratic) -> Iterator[str]:
    """Agreement of measured and predicted losses."""
    iterate = table[table["weights"] == ITERATE]
    apart = np.abs(np.log(iterate["ratio"].clip(lower=1e-9)))
    counts = [int((apart < np.log(bound)).sum()) for bound in (1.05, 1.2, 1.5)]
    yield (
        f"{counts[0]}, {counts[1]} and {counts[2]} of {len(iterate)} rises within a factor 1.05, "
        "1.2 and 1.5 (averages over time apart)."
    )
    slow = table["lr"] / (1.0 - table["momentum"]) * local.largest <= 0.5
    for weights, rows in table[slow].groupby("weights", sort=False):
        name = "W" if weights == ITERATE else f"{weights}: w"
        yield (
            f"{name}here lr h_max <= 0.5: measured rise over predicted {rows['ratio'].min():.2f} "
            f"to {rows['ratio'].max():.2f}."
        )
    sure = table[table["ratio_error"].notna()]
    if len(sure):
        near = (sure["ratio"] - 1.0).abs() <= 2.0 * sure["ratio_error"]
        yield (
            "Measured and predicted rise differ by less than two standard errors in "
            f"{int(near.sum())} of {len(sure)} cells, averages over time included; the standard "
            f"error is {sure['ratio_error'].median():.0%} of the prediction (median)."
        )
    gain = iterate[iterate["gain"].notna()]
    if len(gain):
        ratio = gain["gain"] / gain["predicted_gain"]
        yield (
            "Gain by averaging (loss of one run less that of K): measured over predicted "
            f"{ratio.min():.2f} to {ratio.max():.2f}."
        )
    orders = [rank_order(rows) for _, rows in iterate.groupby(["way", "batch_size"])]
    right, pairs = (sum(column) for column in zip(*orders, strict=True))
    yield (
        f"Rank order of K and lr right in {right} of {pairs} pairs whose measured losses are two "
        "standard errors apart."
    )


def _trust(table: pd.DataFrame) -> Iterator[str]:
    """Predicted and measured changes of the noise, which must be small for first order to hold."""
    known = table[table["noise_growth"].notna()]
    if len(known):
        yield (
            "The scatter of the weights is predicted to change their noise by "
            f"{_range(known['noise_growth'])}."
        )
        if (kinks := known["kink_fraction"].max()) > 0.01:
            told = f"Kinks of the loss add {kinks:.0%} to curvature along the stiffest directions"
            if kinks > KINKED:
                told += (
                    "; what they add to the floor is not predicted, and averaging many runs may "
                    "save less"
                )
            yield f"{told}."
    far = known[known["noise_growth"].abs() > FEEDBACK].drop_duplicates(["lr", "batch_size"])
    if len(far):
        cells = ", ".join(
            f"lr = {lr:.3g} at B = {size}"
            for lr, size in zip(far["lr"], far["batch_size"], strict=True)
        )
        yield (
            f"Unreliable (noise predicted to change by more than {FEEDBACK:.0%}, beyond the "
            f"validity of first order): {cells}."
        )
    on_path = table.loc[table["noise_change_on_path"].notna(), "noise_change_on_path"]
    if len(on_path):
        yield f"On the noise-free path the noise changes by {_range(on_path)}."


def _range(changes: pd.Series[float]) -> str:
    low, high = (
        "any bound" if np.isinf(x) else f"{x:+.0%}" if abs(x) < 100.0 else f"{x:+.0e} times"
        for x in (changes.min(), changes.max())
    )
    return low if low == high else f"{low} to {high}"


def _floors(table: pd.DataFrame) -> Iterator[str]:
    """The K beyond which averaging gains little."""
    for (way, size, lr), rows in table.groupby(["way", "batch_size", "lr"], sort=True):
        terms = rows.iloc[0][["descent", "cross", "floor", "excess"]]
        enough = Prediction(*terms).members_at_floor
        pays = (
            f"beyond K = {enough:.0f} the floor is most of the loss"
            if enough < 1e4
            else "no K reaches the floor"
        )
        yield f"{way}, lr = {lr:.3g}, B = {size}: {pays}."


def _test_loss(table: pd.DataFrame) -> Iterator[str]:
    """What averaging does to the test loss, predicted and measured."""
    known = table[table["predicted_test_gain"].notna()]
    if known.empty:
        off = (table["test_loss"] - table["predicted_test_loss"]).dropna()
        if len(off):  # one group of runs, or late-phase members: there is no gain over single runs
            yield f"Test loss: measured less predicted {off.min():+.2g} to {off.max():+.2g}."
        elif table["test_loss"].notna().any():
            yield "Test losses are in the table; there is no prediction of them."
        return
    for weights, rows in known.groupby("weights", sort=False):
        members = rows["members"].max()
        most = rows[rows["members"] == members]["predicted_test_gain"]
        of = "one run" if members == 1 else f"the mean of {members} runs"
        of = of if weights == ITERATE else f"{weights} of {of}"
        yield (
            f"Test loss of a single run less that of {of}: {most.min():+.2g} to "
            f"{most.max():+.2g} predicted."
        )
    tried = known[known["test_gain"].notna()]
    if tried.empty:
        return
    right = np.sign(tried["test_gain"]) == np.sign(tried["predicted_test_gain"])
    sure = tried["test_gain"].abs() > 2.0 * tried["test_gain_error"]
    ratio = tried["test_gain"] / tried["predicted_test_gain"]
    near = (ratio - 1.0).abs() <= 0.25
    error = np.hypot(tried["test_gain_error"], tried["predicted_test_gain_error"].fillna(0.0))
    agree = (tried["test_gain"] - tried["predicted_test_gain"]).abs() <= 2.0 * error
    yield (
        f"What averaging saves of the test loss: sign right in {int(right.sum())} of {len(tried)} "
        f"cells, in {int(right[sure].sum())} of the {int(sure.sum())} that are two standard errors "
        f"from 0; size within 25% in {int(near.sum())}, and within two standard errors in "
        f"{int(agree.sum())}; measured over predicted "
        f"{ratio.quantile(0.1):.2f} to {ratio.quantile(0.9):.2f} (80% of cells)."
    )


def _best(best: pd.DataFrame, trained: bool) -> Iterator[str]:
    """Best learning rates, for the smallest and the largest K."""
    for (way, size), rows in best.groupby(["way", "batch_size"], sort=False):
        rows = rows.sort_values("members")
        for i in sorted({0, len(rows) - 1}):
            row = rows.iloc[i]
            predicted, measured = row["predicted"], row["measured"]
            words = f"{predicted:.3g} predicted" if predicted > 0 else "predicted to be the lowest"
            if trained:
                words += (
                    f", {measured:.3g} measured"
                    if measured > 0
                    else ", measured best not within the grid"
                )
            if predicted > 0 and measured > 0:
                words += f", ratio {measured / predicted:.2f}"
            yield f"{way}, B = {size}, K = {row['members']}: best lr {words}."


def _noise_scale(local: LocalQuadratic) -> float:
    """Gradient noise scale tr C / |g|^2, in examples."""
    squared = float(local.points()[2].sum())
    return local.noise_trace / squared if squared > 0 else np.inf

"""The results of a bridge in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from neural.bridge.comparison import ITERATE
from neural.bridge.prediction import Prediction
from neural.curvature.gradient_noise import noise_exponent
from neural.curvature.local_quadratic import LocalQuadratic

if TYPE_CHECKING:
    import pandas as pd


#: Relative change of the noise beyond which a first-order correction is not valid.
FEEDBACK = 0.4


def verdict(
    table: pd.DataFrame,
    local: LocalQuadratic,
    best: pd.DataFrame | None = None,
    cost: pd.DataFrame | None = None,
) -> list[str]:
    """Summarise the results, one or two sentences a line.

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
    """
    negative = local.negative_share()
    exponent = noise_exponent(local.pairs.values, np.diag(local.noise))
    lines = [
        f"Largest curvature {local.largest:.4g}; plain SGD is stable up to lr = "
        f"{2.0 / local.largest:.3g} on the quadratic.",
        f"{negative[0]:.1%} of the noise and {negative[1]:.1%} of the squared slope lie along "
        "negative curvature, for which the quadratic makes no prediction.",
        f"Noise along the stiffest directions goes as h^{exponent:.2f}; the noise "
        f"scale tr C / |g|^2 is {_noise_scale(local):.3g} examples.",
    ]
    held = table[np.isfinite(table["predicted_rise"]) & (table["predicted_rise"] > 0)]
    trained = not held["measured"].isna().all()
    if trained:
        lines += _agreement(held, local)
    lines += _trust(table)
    lines += _floors(held[held["weights"] == ITERATE])
    if best is not None:
        lines += _best(best, trained)
    if cost is not None:
        parts = [
            f"{stage} {epochs:.3g}"
            for stage, epochs in zip(cost["stage"], cost["epochs"], strict=True)
        ]
        lines.append(f"Cost in epochs, gradients of all training examples: {', '.join(parts)}.")
    if not table["test"].isna().all():
        lines.append("Test losses are in the table; the theory does not predict them.")
    return lines


def rank_order(table: pd.DataFrame) -> tuple[int, int]:
    """Count pairs of trainings whose order is predicted right.

    Only pairs whose measured losses differ by more than two standard errors count.

    Parameters
    ----------
    table : DataFrame
        Columns predicted, measured, error; a row for every K and learning rate.

    Returns
    -------
    right, pairs : int
        Number of pairs in the right order, and of all pairs that count.
    """
    rows = table[["predicted", "measured", "error"]].to_numpy(dtype=float)
    signs = [
        np.sign(one[0] - other[0]) == np.sign(one[1] - other[1])
        for one, other in combinations(rows, 2)
        if abs(one[1] - other[1]) > 2.0 * np.hypot(one[2], other[2])
    ]
    return int(sum(signs)), len(signs)


def _agreement(held: pd.DataFrame, local: LocalQuadratic) -> Iterator[str]:
    """Agreement of measured and predicted losses."""
    iterate = held[held["weights"] == ITERATE]
    for bound in (1.05, 1.2, 1.5):
        near = np.abs(np.log(iterate["ratio"].clip(lower=1e-9))) < np.log(bound)
        yield f"{int(near.sum())} of {len(iterate)} cells within a factor {bound:g}."
    stiff = held["lr"] / (1.0 - held["momentum"]) * local.largest <= 0.5
    for weights, rows in held[stiff].groupby("weights", sort=False):
        name = "W" if weights == ITERATE else f"{weights}: w"
        yield (
            f"{name}here lr h_max <= 0.5: measured rise over predicted {rows['ratio'].min():.2f} "
            f"to {rows['ratio'].max():.2f}."
        )
    gain = iterate[iterate["gain"].notna()]
    if len(gain):
        ratio = gain["gain"] / gain["predicted_gain"]
        yield (
            "Gain by averaging (loss of one run less that of K): measured over predicted "
            f"{ratio.min():.2f} to {ratio.max():.2f}."
        )
    counts = [rank_order(rows) for _, rows in iterate.groupby(["way", "batch_size"])]
    right, pairs = (sum(part) for part in zip(*counts, strict=True))
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
            yield f"Kinks of the loss add {kinks:.0%} to curvature along the stiffest directions."
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
    calm = table.loc[table["noise_change_on_path"].notna(), "noise_change_on_path"]
    if len(calm):
        line = f"On the noise-free path the noise changes by {_range(calm)}"
        if calm.abs().max() > FEEDBACK:
            line += ", beyond the validity of first order: minimise further before measuring"
        yield f"{line}."


def _range(changes: pd.Series[float]) -> str:
    low, high = (
        f"{x:+.0%}" if abs(x) < 100.0 else f"{x:+.0e} times" for x in (changes.min(), changes.max())
    )
    return low if low == high else f"{low} to {high}"


def _floors(held: pd.DataFrame) -> Iterator[str]:
    """The K beyond which averaging gains little."""
    for (way, size, lr), rows in held.groupby(["way", "batch_size", "lr"], sort=True):
        first = rows.iloc[0]
        parts = first[["descent", "cross", "floor", "excess"]]
        enough = Prediction(*parts).members_at_floor
        pays = (
            f"beyond K = {enough:.0f} the floor is most of the loss"
            if enough < 1e4
            else "no K reaches the floor"
        )
        yield f"{way}, lr = {lr:.3g}, B = {size}: {pays}."


def _best(best: pd.DataFrame, trained: bool) -> Iterator[str]:
    """Best learning rates, for the smallest and the largest K."""
    for (way, size), rows in best.groupby(["way", "batch_size"], sort=False):
        rows = rows.sort_values("members")
        for i in sorted({0, len(rows) - 1}):
            row = rows.iloc[i]
            one, other = row["predicted"], row["measured"]
            words = f"{one:.3g} predicted" if one > 0 else "predicted to be the lowest"
            if trained:
                words += (
                    f", {other:.3g} measured"
                    if other > 0
                    else ", measured best not within the grid"
                )
            if one > 0 and other > 0:
                words += f", ratio {other / one:.2f}"
            yield f"{way}, B = {size}, K = {row['members']}: best lr {words}."


def _noise_scale(local: LocalQuadratic) -> float:
    """Gradient noise scale tr C / |g|^2, in examples."""
    squared = float(local.points()[2].sum())
    return local.noise_trace / squared if squared > 0 else np.inf

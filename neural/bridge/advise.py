"""Advice: which learning rate and average to train with, and when more members end.

Only cells that were predicted within the validity of the theory count, and no cell that training
has contradicted; beside them rates at which short runs stayed near the minimum. Without any there
is no advice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neural.bridge.config import INDEPENDENT, ITERATE
from neural.bridge.prediction import Prediction
from neural.bridge.verdict import FEEDBACK, in_range
from nqm.errors import NQMError, check_integer, check_number
from nqm.table import read_table

if TYPE_CHECKING:
    import pandas as pd

#: Columns of `neural.bridge.quick`: number of the short runs from which noise is scaled, their
#: steps and rate, and how many of them left the minimum. NaN where nothing was tried.
TRIED, TRIED_STEPS, TRIED_LR, LEFT = "probe_runs", "probe_steps", "probe_lr", "probe_left"
#: What the averages over time are, for readers of the advice.
AVERAGES = {
    "swa": "the mean over the second half of the steps",
    "ema": "an exponential mean of steps",
}
#: Factor between measured and predicted rise from which on training contradicts a prediction.
CONTRADICTED = 1.5
#: Share of the expected fall from which on a lower rate, without noise, is worth telling.
NEARLY = 0.9


@dataclass(frozen=True)
class Advice:
    """What to train, and what it rests on.

    Attributes
    ----------
    lr : float
        Learning rate.
    batch_size : int
        Examples of one minibatch.
    weights : str
        The weights themselves, or an average over time.
    members : int
        Number of runs, or of late-phase members, whose weights are averaged, K.
    change : float
        Predicted change of the training loss from the checkpoint's with this average.
    single : float or None
        The same of a single run's last weights at the same rate; None for late-phase members.
    basis : {"prediction", "short runs", "bridge"}
        What it rests on: theory alone, short runs at this rate, or trainings of a bridge.
    words : tuple of str
        The advice in sentences.
    """

    lr: float
    batch_size: int
    weights: str
    members: int
    change: float
    single: float | None
    basis: str
    words: tuple[str, ...]


def read_bridge(folder: Path) -> pd.DataFrame:
    """Read the table of losses of a bridge.

    Parameters
    ----------
    folder : Path
        Folder that ``nqm neural bridge`` has written.

    Returns
    -------
    DataFrame

    Raises
    ------
    NQMError
        If the folder holds no finished bridge.
    """
    path = folder / "bridge.parquet"
    if not path.exists():
        raise NQMError(
            f"{folder} holds neither a run nor a finished bridge; give a run, or measure first: "
            f"nqm neural bridge RUN --out {folder}"
        )
    return read_table(path)


def advise(table: pd.DataFrame, members: int | None = None, worth: float = 0.01) -> Advice:
    """Choose learning rate, batch size and average of least predicted training loss.

    Parameters
    ----------
    table : DataFrame
        Made by `neural.bridge.api.compare` or `predict`, or by
        `neural.bridge.quick.measure_for_advice`.
    members : int, optional
        Largest number of runs that may be averaged; by default the largest of the table. Late-phase
        members are advised in a number that the table has.
    worth : float
        Smallest saving for which one more run is advised, relative to what noise costs a single
        run at the same rate; of late-phase members, to what it costs the fewest.

    Returns
    -------
    Advice

    Raises
    ------
    NQMError
        If no cell of the table is reliable, or a number is out of range.
    """
    check_asked(members, worth)
    most = int(table["members"].max()) if members is None else members
    if set(table["way"]) != {INDEPENDENT}:
        return _of_late_phase(table, most, worth)
    cells = table[table["members"] == table["members"].min()]
    left = _believed(cells)
    best: tuple[float, pd.Series, Prediction, int] | None = None
    for _, row in left.iterrows():
        prediction = Prediction(*(float(row[term.name]) for term in fields(Prediction)))
        whole = _single(left, row)
        count = next(
            (
                k
                for k in range(1, most)
                if prediction.rise(k) - prediction.rise(k + 1) < worth * whole.rise(1)
            ),
            most,
        )
        count = max(count, int(row["members"]))
        change = prediction.change(count)
        if best is None or change < best[0]:
            best = change, row, prediction, count
    assert best is not None
    change, row, prediction, count = best
    single = _single(left, row).change(1)
    basis, reason = _rests_on(table, cells, left, row)
    words = [*_choice(row, count, change, single)]
    words += _stop(prediction, _single(left, row), count, most)
    words += reason
    if basis == "short runs":
        words += _safer(cells, row, change)
    words += [*_left(cells), *_ends(cells, left, row), *_test(table, row, count)]
    chosen = (float(row["lr"]), int(row["batch_size"]), str(row["weights"]))
    return Advice(*chosen, count, change, single, basis, tuple(words))


def _of_late_phase(table: pd.DataFrame, most: int, worth: float) -> Advice:
    """Advice for late-phase members: each K has a prediction of its own, at its own best rate."""
    first = int(table["members"].min())
    if most < first:
        raise NQMError(f"members must be at least {first}, the smallest K measured; got {most}")
    cells = table[table["members"] <= most]
    left = _believed(cells)
    best = left.sort_values("predicted").drop_duplicates("members").sort_values("members")
    row, whole = best.iloc[0], float(best["predicted_rise"].iloc[0])
    stop = f"K = {{}} is the largest of the reliable K up to {most}."
    for _, more in best.iloc[1:].iterrows():
        buys = (row["predicted"] - more["predicted"]) / (more["members"] - row["members"]) / whole
        if buys < worth:
            stop = (
                f"Stop at K = {{}}: up to {int(more['members'])}, one more member buys {buys:.1%} "
                f"of what noise costs K = {int(best['members'].iloc[0])}."
            )
            break
        row = more
    count, change = int(row["members"]), float(row["predicted"])
    basis, reason = _rests_on(table, cells, left, row)
    averaged = row["weights"] in AVERAGES
    of = f"the {row['weights'].upper()} of their mean" if averaged else "their mean"
    words = [
        f"Train {int(row['steps'])} steps at lr = {row['lr']:.3g}, B = {int(row['batch_size'])}, "
        f"with {count} late-phase members of {row['way']}, and take {of}.",
        f"Expected change of the training loss: {change:+.3g}.",
        stop.format(count),
        *reason,
        *_ends(cells[cells["members"] == count], left[left["members"] == count], row),
    ]
    chosen = (float(row["lr"]), int(row["batch_size"]), str(row["weights"]))
    return Advice(*chosen, count, change, None, basis, tuple(words))


def _believed(cells: pd.DataFrame) -> pd.DataFrame:
    """The reliable cells; NQMError if there are none."""
    left = cells[reliable(cells)]
    if left.empty:
        raise NQMError(
            f"no advice: none of the {len(cells)} trainings and averages is predicted reliably "
            f"(noise changes by more than {FEEDBACK:.0%}, the rate is unstable, or training "
            "contradicts it); lower bridge.lr_times_sharpness, raise the batch size, or minimise "
            "further"
        )
    return left


def check_asked(members: int | None, worth: float) -> None:
    """Check what `advise` is asked for.

    Parameters
    ----------
    members, worth
        See `advise`.

    Raises
    ------
    NQMError
        If a number is out of range.
    """
    if members is not None:
        check_integer("members", members, 1)
    check_number("worth", worth, low=0.0, closed_low=False)


def reliable(rows: pd.DataFrame) -> pd.Series[bool]:
    """Rows whose prediction is within the validity of first order, and not contradicted.

    Parameters
    ----------
    rows : DataFrame
        Made by `neural.bridge.api.compare` or `predict`, or by `measure_for_advice`.

    Returns
    -------
    Series of bool
    """
    known = np.isfinite(rows["predicted"]) & (rows["predicted_rise"] > 0) & in_range(rows)
    room = 2.0 * rows["ratio_error"].fillna(0.0)
    high = rows["ratio"] - room > CONTRADICTED
    low = rows["ratio"] + room < 1.0 / CONTRADICTED
    near: pd.Series[bool] = known & ~high & ~low
    return near


def _single(rows: pd.DataFrame, row: pd.Series[float]) -> Prediction:
    """Prediction of the last weights at a row's rate and batch size; the row's own without one."""
    same = (rows["lr"] == row["lr"]) & (rows["batch_size"] == row["batch_size"])
    iterate = rows[same & (rows["weights"] == ITERATE)]
    chosen = row if iterate.empty else iterate.iloc[0]
    return Prediction(*(float(chosen[term.name]) for term in fields(Prediction)))


def _what(weights: str, members: int) -> str:
    """What to take, e.g. "average the last weights of 8 runs"."""
    taken = "take" if members == 1 else "average"
    runs = "a single run" if members == 1 else f"{members} runs"
    if weights not in AVERAGES:
        return f"{taken} the last weights of {runs}"
    return f"{taken} the {weights.upper()} of {runs} ({AVERAGES[weights]})"


def _choice(row: pd.Series[float], count: int, change: float, single: float) -> list[str]:
    what = _what(str(row["weights"]), count)
    return [
        f"Train {int(row['steps'])} steps at lr = {row['lr']:.3g}, B = {int(row['batch_size'])}, "
        f"and {what}.",
        f"Expected change of the training loss: {change:+.3g}. With a single run's last weights: "
        f"{single:+.3g}.",
    ]


def _stop(own: Prediction, single: Prediction, count: int, most: int) -> list[str]:
    buys = (own.rise(count) - own.rise(count + 1)) / single.rise(1)
    end = f"K = {count} is the most you asked for" if count == most else f"Stop at K = {count}"
    return [f"{end}: one more run would save {buys:.1%} of what noise costs a single run."]


def _safer(cells: pd.DataFrame, row: pd.Series[float], change: float) -> list[str]:
    """The next lower rate, if it is hardly worse."""
    below = cells[(cells["lr"] < row["lr"]) & (cells["batch_size"] == row["batch_size"])]
    below = below.dropna(subset="descent")
    lr = below["lr"].max()
    best = float(below.loc[below["lr"] == lr, "descent"].min())  # NaN if there is no such rate
    if not best <= NEARLY * change < 0.0:
        return []
    return [f"Safer and hardly worse: at lr = {lr:.3g} the loss changes by {best:+.3g} at best."]


def _left(cells: pd.DataFrame) -> list[str]:
    """Rates at which a short run left the minimum."""
    if LEFT not in cells:
        return []
    rates = sorted(cells.loc[cells[LEFT] > 0, "lr"].unique())
    told = ", ".join(f"{lr:.3g}" for lr in rates)
    return [f"Too high: at lr = {told} short runs left the minimum."] if rates else []


def _ends(cells: pd.DataFrame, rows: pd.DataFrame, row: pd.Series[float]) -> list[str]:
    """Tell if the best rate is at an end of the grid, and nothing says that it ends there."""
    known = cells.loc[np.isfinite(cells["predicted"]), "lr"]
    near = rows.loc[rows["weights"] == row["weights"], "lr"]
    if known.nunique() < 2:
        return []
    if row["lr"] == known.min():
        return ["This is the lowest of the rates: a better one may lie beyond."]
    if row["lr"] == near.max() and not _left(cells):
        return ["This is the highest of the reliable rates: a better one may lie beyond."]
    return []


def _test(table: pd.DataFrame, row: pd.Series[float], count: int) -> list[str]:
    """What the chosen average does to the test loss."""
    same = np.logical_and.reduce(
        [table[name] == row[name] for name in ("lr", "batch_size", "weights")]
    )
    rows = table[same & table["predicted_test_gain"].notna()]
    if rows.empty:
        return ["The test loss is not predicted for it."]
    near = rows.iloc[int((rows["members"] - count).abs().to_numpy().argmin())]
    gain, error = near["predicted_test_gain"], near["predicted_test_gain_error"]
    what = f"the test loss by {gain:.2g} ± {error:.1g} (K = {int(near['members'])})"
    if abs(gain) <= 2.0 * error:
        return [f"It is not clear whether it lowers the test loss: by {gain:+.2g} ± {error:.1g}."]
    if gain < 0:
        return [f"It is predicted to raise {what.replace(f'{gain:.2g}', f'{-gain:.2g}')}."]
    return [f"It is predicted to lower {what}."]


def _rests_on(
    table: pd.DataFrame, cells: pd.DataFrame, left: pd.DataFrame, row: pd.Series[float]
) -> tuple[str, list[str]]:
    """What the advice rests on, in a word and in sentences."""
    if TRIED in row and row[TRIED] > 0:
        where = "at this rate" if row[TRIED_LR] == row["lr"] else f"at lr = {row[TRIED_LR]:.3g}"
        return "short runs", [
            f"This rests on {int(row[TRIED])} short runs of {int(row[TRIED_STEPS])} steps {where}, "
            "all of which stayed near the minimum, and on noise-free descent. That a whole "
            "training stays is likely, not certain."
        ]
    words = [f"{len(left)} of {len(cells)} trainings and averages are predicted reliably."]
    ratio = table.loc[reliable(table), "ratio"].dropna()
    if ratio.empty:
        return "prediction", [
            *words,
            "This rests on the prediction alone: nothing was trained at this rate.",
        ]
    low, high = ratio.quantile(0.1), ratio.quantile(0.9)
    return "bridge", [
        *words,
        f"Measured over predicted rise of their {len(ratio)} trained cells: {low:.2f} to "
        f"{high:.2f} (80% of them).",
    ]

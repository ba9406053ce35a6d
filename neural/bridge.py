"""The bridge: what theory predicts of a network, beside what training from the checkpoint does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.chains import Training, group_losses, noise_free, train_chains, train_late_phase
from neural.curvature import Landscape
from neural.drift import Drift
from neural.local_model import Kept, LocalModel, fingerprint
from neural.luck import Luck, measure_luck
from neural.noise import trace
from neural.prediction import looks, predict, predict_each
from neural.smoothing import Smoothing
from neural.time_averages import ExponentialMean, Running, TailMean, TimeAverage
from nqm.errors import NQMError, check_integer, check_number

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]
#: The noise-free path is trained, not predicted, where descent is more than this of the excess.
STILL = 0.01
#: Chains and seeds at most: seeds of late-phase runs are a thousand times as large.
MOST = 10**9
MOST_LOOKS = 10**6
#: Looks at the course of a training in its first half.
EARLY = 5
#: The weights themselves, beside averages of them over time.
ITERATE = "iterate"
MEASURED = ["measured", "error", "gain", "gain_error", "plain", "plain_error", "test"]
COLUMNS = [
    "way", "lr", "momentum", "batch_size", "sampling", "steps", "members", "weights", "predicted",
    "measured", "error", "predicted_rise", "measured_rise", "ratio", "ratio_error", "descent",
    "predicted_gain", "gain", "gain_error", "noise_free", "cross", "floor", "excess", "share",
    "worth", "creases", "octave", "growth", "kinks", "fading", "plain", "plain_error", "test",
]  # fmt: skip
COURSE = [
    "way", "lr", "momentum", "batch_size", "sampling", "steps", "members", "step", "predicted",
    "measured", "error",
]  # fmt: skip


def course_steps(training: Training, count: int) -> list[int]:
    """`looks`, and before them steps that double, for the course alone."""
    early = {training.steps >> halvings for halvings in range(2, 2 + EARLY)} - {0}
    return sorted(early | set(looks(training, count)))


@dataclass(frozen=True)
class Plan:
    """How trainings are looked at.

    Attributes
    ----------
    members : tuple of int
        Sizes K of the groups of chains whose weights are averaged.
    chains : int
        At least the largest K; twice that for an interval.
    looks : int
        Over the second half of the steps.
    late_phase : str, optional
        Weights to replicate on a shared base, in place of chains of their own; every group of K is
        then a run of `neural.late_phase.LatePhase`.
    ema : float
        Decay of the exponential mean of a chain's weights, looked at beside the mean over the
        second half of its steps.
    seed : int
    """

    members: tuple[int, ...] = (1, 2, 4, 8, 16)
    chains: int = 32
    looks: int = 5
    late_phase: str | None = None
    ema: float = 0.99
    seed: int = 0

    def averages(self, training: Training) -> tuple[TimeAverage, ...]:
        """Averages over time that are looked at; of late-phase members none."""
        if self.late_phase is not None:
            return ()
        return TailMean(training.steps), ExponentialMean(training.steps, self.ema)

    def __post_init__(self) -> None:
        check_integer("looks", self.looks, 1)
        check_number("looks", self.looks, high=MOST_LOOKS)
        check_number("chains", self.chains, low=1, high=MOST)
        check_integer("seed", self.seed, 0)
        check_number("seed", self.seed, low=0, high=MOST)
        for k in self.members:
            check_integer("members", k, 1)
        check_number("ema", self.ema, low=0.0, high=1.0, closed_high=False)
        if max(self.members) > self.chains:
            raise NQMError(
                f"members must be at most the {self.chains} chains; got {max(self.members)}"
            )
        if self.late_phase is not None and min(self.members) < 2:
            raise NQMError(
                f"members must be at least 2 with late_phase; got {min(self.members)}; of chains a "
                "single one may be looked at"
            )


@dataclass(frozen=True)
class Outcome:
    """What was found of a training.

    Attributes
    ----------
    table : DataFrame
        A row for every K and kind of weights: the iterate, averaged over its looks, and averages
        over time, looked at in the end.
    course : DataFrame
        A row for every K and step at which the iterate is looked at; in the first half of the
        steps for the smallest and the largest K only.
    """

    table: pd.DataFrame
    course: pd.DataFrame


def measure_training(
    landscape: Landscape,
    training: Training,
    plan: Plan,
    *,
    luck: Luck | None = None,
    test: Callable[[Tensor], float] | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Really train from the checkpoint, and average.

    Parameters
    ----------
    landscape : Landscape
    training : Training
    plan : Plan
    luck : Luck, optional
        Of this training, to be taken off what is measured; the table has both.
    test : callable, optional
        Test loss of a weight vector, looked at once at the end.
    folder : Path, optional
        Keeps the result, and gives it when asked again.
    progress : callable, optional
        Told of minibatches done.

    Returns
    -------
    Outcome
        Columns members, weights (members, step), measured, error: change of the training loss from
        the checkpoint's, mean over groups (and looks), its standard error over groups. In the table
        also gain, gain_error: the mean loss of the group's own chains less that of their mean, in
        which what they have in common cancels; plain, plain_error: measured as it is, luck and all;
        and test, the mean test loss.
    """
    at, late = course_steps(training, plan.looks), looks(training, plan.looks)
    ends = {min(plan.members), max(plan.members)}
    kept = Kept(folder, f"{fingerprint(landscape)}-{plan.seed}")
    start = landscape.loss()

    def losses(k: int, snapshots: dict[str, list[Tensor]], groups_of: int) -> dict[str, Any]:
        found = {}
        for weights, held in snapshots.items():
            part = held if weights != ITERATE or k in ends else held[-len(late) :]
            found[f"{weights}{k}"] = group_losses(landscape.loss, part, groups_of) - start
            if test is not None:
                found[f"test-{weights}{k}"] = group_losses(test, held[-1:], groups_of)
        return found

    def chains() -> dict[str, Any]:
        averages = Running(plan.averages(training), landscape.weights.repeat(plan.chains, 1))
        held = train_chains(
            landscape, training, plan.chains, at, seed=plan.seed, seen=averages, progress=progress
        )
        snapshots = {ITERATE: [w for _, w in held]}
        snapshots |= {name: [mean] for name, mean in averages.values.items()}
        found = [losses(k, snapshots, k) for k in plan.members]
        return {name: array for one in found for name, array in one.items()}

    def run(k: int, seed: int) -> Iterator[tuple[int, Tensor]]:
        select = plan.late_phase or "all"
        return train_late_phase(landscape, training, k, select, at, seed=seed, progress=progress)

    def members() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for k in plan.members:
            runs = [torch.stack([w for _, w in run(k, seed)]) for seed in _runs(plan, k)]
            found |= losses(k, {ITERATE: list(torch.stack(runs, 1))}, 1)
        return found

    said = "-".join(f"{value}".replace(" ", "_") for value in asdict(training).values())
    how = "-".join(map(str, (*plan.members, plan.chains, plan.looks, f"ema{plan.ema:g}")))
    way = "chains" if plan.late_phase is None else f"late_phase-{plan.late_phase}".replace("*", "")
    tested = "" if test is None else "-test"
    known = kept(f"{way}-{said}-{how}{tested}", chains if plan.late_phase is None else members)
    return _tabulate(known, training, plan, luck)


def _tabulate(known: dict[str, Any], training: Training, plan: Plan, luck: Luck | None) -> Outcome:
    """Means and errors of what was measured of every group of chains, or run of members."""
    import pandas as pd

    at, count = course_steps(training, plan.looks), len(looks(training, plan.looks))
    averages = plan.averages(training)
    columns = {ITERATE: slice(0, len(at))}
    columns |= {one.name: slice(i, i + 1) for i, one in enumerate(averages, len(at))}
    off = {} if luck is None else _draws(luck, plan, [*at, *averages])
    rows, course = [], []
    for weights, part in columns.items():
        held = {k: known[f"{weights}{k}"] for k in plan.members}
        if off:
            held = {k: plain - off[k][:, part][:, -plain.shape[1] :] for k, plain in held.items()}
        for k, found in held.items():
            plain = known[f"{weights}{k}"]
            scores = known.get(f"test-{weights}{k}")
            rows.append(
                (
                    k,
                    weights,
                    *_mean(found[:, -count:].mean(1)),
                    *_gain(held.get(1), found, k, count),
                    *_mean(plain[:, -count:].mean(1)),
                    np.nan if scores is None else float(scores.mean()),
                )
            )
            if weights == ITERATE:
                steps = at[-found.shape[1] :]
                course += [(k, t, *_mean(one)) for t, one in zip(steps, found.T, strict=True)]
    return Outcome(
        pd.DataFrame(rows, columns=["members", "weights", *MEASURED]),
        pd.DataFrame(course, columns=["members", "step", "measured", "error"]),
    )


def _keys(plan: Plan, members: int) -> tuple[tuple[int, int], ...]:
    """By which chains, or members of one run after the other, draw their minibatches."""
    if plan.late_phase is None:
        return tuple((plan.seed, chain) for chain in range(plan.chains))
    return tuple((seed, k) for seed in _runs(plan, members) for k in range(members))


def _runs(plan: Plan, members: int) -> list[int]:
    """Seeds of late-phase runs of K members: two at least."""
    return [1000 * plan.seed + group for group in range(max(plan.chains // members, 2))]


def _draws(luck: Luck, plan: Plan, when: list[int | TimeAverage]) -> dict[int, FloatArray]:
    """The luck of every K, shape (groups, times)."""
    keys = {k: _keys(plan, k) for k in plan.members}
    z = {one: luck.responses(one, when) for one in set(keys.values())}
    return {k: luck.of(z[one], when, k) for k, one in keys.items()}


def _gain(
    single: FloatArray | None, mean: FloatArray, members: int, late: int
) -> tuple[float, float]:
    """What averaging saves each group of chains; NaN of members, which are no chains."""
    if single is None or members == 1:
        return np.nan, np.nan
    own = single[: len(mean) * members].reshape(len(mean), members, -1).mean(1)
    return _mean((own[:, -late:] - mean[:, -late:]).mean(1))


def _mean(each: FloatArray) -> tuple[float, float]:
    """Mean and its standard error; NaN of a single one."""
    error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else np.nan
    return float(each.mean()), error


def foresee(
    local: LocalModel,
    drift: Drift,
    training: Training,
    plan: Plan,
    smoothing: Smoothing | None = None,
) -> Outcome:
    """The prediction alone, in the form of `compare`; what would be measured is NaN."""
    import pandas as pd

    late = looks(training, plan.looks)
    seen = {ITERATE: predict(local, drift, training, late, smoothing)}
    for average in plan.averages(training):
        seen[average.name] = predict(local, drift, training, [average], smoothing)
    stated = {"way": plan.late_phase or "chains"} | asdict(training)
    rate = training.lr / (1.0 - training.momentum)
    growth = np.nan if smoothing is None else smoothing.growth(rate, training.batch_size)
    kinks = np.nan if smoothing is None else smoothing.creased()
    rows = [
        stated
        | asdict(found)
        | {"members": k, "weights": weights, "noise_free": found.descent}
        | {"predicted": found.change(k), "predicted_rise": found.rise(k)}
        | {"predicted_gain": found.rise(1) - found.rise(k), "growth": growth, "kinks": kinks}
        for weights, found in seen.items()
        for k in plan.members
    ]
    at = course_steps(training, plan.looks)
    each = predict_each(local, drift, training, at, smoothing)
    course = [
        stated | {"members": k, "step": step, "predicted": found.change(k)}
        for k in plan.members
        for step, found in zip(at, each, strict=True)
    ]
    return Outcome(
        pd.DataFrame(rows).reindex(columns=COLUMNS), pd.DataFrame(course).reindex(columns=COURSE)
    )


def compare(
    landscape: Landscape,
    local: LocalModel,
    drift: Drift,
    training: Training,
    plan: Plan,
    *,
    smoothing: Smoothing | None = None,
    test: Callable[[Tensor], float] | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Prediction beside measurement.

    Returns
    -------
    Outcome
        In the table: the training; members, weights; predicted and measured change of the loss
        from the checkpoint's, its standard error; what noise adds, predicted and measured
        (``predicted_rise``, ``measured_rise``), and their ratio; what averaging saves a single run
        (``predicted_gain``, ``gain``); the parts of the prediction; by which part of itself the
        noise is predicted to grow under scatter (``growth``), kinks add to the curvature
        (``kinks``), and the noise has changed at the end of the noise-free path (``fading``, where
        that is trained); the test loss. In the course: predicted and measured change at every look.
    """
    both = foresee(local, drift, training, plan, smoothing)
    luck = measure_luck(landscape, local, training, folder)
    real = measure_training(
        landscape, training, plan, luck=luck, test=test, folder=folder, progress=progress
    )
    table = both.table
    table[MEASURED] = real.table[MEASURED]
    parts = table.drop_duplicates("weights").set_index("weights")
    scatter = parts["excess"].fillna(
        np.inf
    )  # of averages of shuffled epochs there is no prediction
    if not (parts["descent"].abs() <= STILL * scatter / max(plan.members)).all():
        kept = Kept(folder, fingerprint(landscape))
        stated = (training.lr, training.momentum, training.steps, plan.looks, plan.ema)
        name = "-".join(map(str, ("noise_free_path", *stated)))
        calm = kept(name, lambda: _noise_free(landscape, local, training, plan))
        table["noise_free"] = [float(calm[name]) for name in table["weights"]]
        table["fading"] = float(calm["fading"])
    table["measured_rise"] = table["measured"] - table["noise_free"]
    table["ratio"] = table["measured_rise"] / table["predicted_rise"]
    table["ratio_error"] = table["error"] / table["predicted_rise"].abs()
    names = ["measured", "error"]
    course = both.course.drop(columns=names).merge(real.course, on=["members", "step"])
    return Outcome(table, course[COURSE])


def _noise_free(
    landscape: Landscape, local: LocalModel, training: Training, plan: Plan
) -> dict[str, Any]:
    """Change of the loss without noise, for every kind of weights; and that of the noise itself."""
    averages = Running(plan.averages(training), landscape.weights)
    end = landscape.weights

    def seen(step: int, weights: Tensor) -> None:
        nonlocal end
        averages(step, weights)
        end = weights

    losses = noise_free(landscape, training, looks(training, plan.looks), seen=seen)
    found = {name: np.array(landscape.loss(mean)) for name, mean in averages.values.items()}
    found[ITERATE] = np.array(losses.mean())
    change = {name: loss - local.loss for name, loss in found.items()}
    population = 1.0 - 1.0 / landscape.examples  # as the local model has it
    noise = population * trace(landscape.at(end))
    return change | {"fading": np.array(noise / local.noise_trace - 1.0)}

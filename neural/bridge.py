"""The bridge: what theory predicts of a network, beside what training from the checkpoint does.

Predicted from slope, curvature, noise and third derivatives at the checkpoint; nothing is fitted to
any training run. The loss of the mean of K runs after t steps is

    L(checkpoint) + descent + cross + floor + excess / K:

noise-free descent, the drift of the mean (`neural.drift`), and the excess that `nqm` gives for the
noise of one run, with curvature and noise as the scatter sees them (`neural.smoothing`). Late-phase
members on a shared base draw K minibatches for one base step, so that at gamma = "mean" their
average is plain SGD on minibatches of K B: the same 1/K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.chains import Training, group_losses, noise_free, train_chains, train_late_phase
from neural.curvature import Landscape
from neural.drift import Drift, descent
from neural.local_model import Kept, LocalModel, fingerprint
from neural.smoothing import Smoothing
from nqm import SGD, HeavyBall, Phase, Program, solve
from nqm.errors import NQMError, check_integer
from nqm.solvers.shuffle import shuffled_steady
from nqm.targets import stability_edge

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]
#: The noise-free path is trained, not predicted, where descent is more than this of the excess.
STILL = 0.01


@dataclass(frozen=True)
class Prediction:
    """The loss after training, taken apart; all relative to the checkpoint's loss.

    Attributes
    ----------
    descent : float
        Noise-free descent on the quadratic.
    cross : float
        What the drift does to that.
    floor : float
        The loss that the drift leaves in the mean of any number of members.
    excess : float
        Expected excess of a single run due to noise; that of K is its K-th part. Infinite where
        the quadratic is unstable.
    share : float
        Part of the excess that is due to curvature which the scatter itself has changed
        (`neural.smoothing`): of K members it falls as 1 / K^2.
    """

    descent: float
    cross: float
    floor: float
    excess: float
    share: float = 0.0

    def rise(self, members: float = 1.0) -> float:
        """What noise adds to the loss of the mean of K members."""
        excess = (self.excess - self.share) / members + 0.5 * self.share / members**2
        return self.cross + self.floor + excess

    def change(self, members: float = 1.0) -> float:
        """Expected change of the loss of the mean of K members."""
        return self.descent + self.rise(members)

    @property
    def enough(self) -> float:
        """Members at which the floor is as large as what is left of the excess."""
        return self.excess / self.floor if self.floor > 0 else float("inf")


def predict(
    local: LocalModel,
    drift: Drift,
    training: Training,
    at: Iterable[int],
    smoothing: Smoothing | None = None,
) -> Prediction:
    """What a training does to the loss, averaged over the steps `at`.

    Parameters
    ----------
    local : LocalModel
    drift : Drift
    training : Training
        Shuffled epochs are taken to be at their steady state: their noise cancels over an epoch.
    at : iterable of int
    smoothing : Smoothing, optional
        Take curvature and noise as the scatter sees them.
    """
    at = sorted(set(at))
    rate, size = training.lr / (1.0 - training.momentum), training.batch_size
    share = 0.0
    if smoothing is not None:
        local = smoothing.at(rate, size)
        share = float(np.mean([smoothing.share(rate, size, t) for t in at]))
    if training.lr >= edge(local, training):
        return Prediction(np.nan, np.nan, np.nan, np.inf)
    problem = local.problem().replace(initial_mean=0.0)
    phase = Phase(_method(training), training.lr, at[-1], batch_size=training.batch_size)
    if training.sampling == "shuffled":
        excess = shuffled_steady(problem, phase, local.examples).loss
    else:
        excess = float(np.mean(solve(problem, Program((phase,)), at=at).loss))
    pieces = [
        (descent(local, rate, t), drift.cross(rate, size, t), drift.floor(rate, size, t))
        for t in at
    ]
    fall, cross, floor = (float(value) for value in np.mean(pieces, axis=0))
    return Prediction(fall, cross, floor, excess, share)


def edge(local: LocalModel, training: Training) -> float:
    """Learning rate from which the quadratic is unstable."""
    return float(stability_edge(local.problem(), _method(training)))


def _method(training: Training) -> SGD | HeavyBall:
    return HeavyBall(momentum=training.momentum) if training.momentum else SGD()


def looks(training: Training, count: int) -> list[int]:
    """Steps over the second half of a training at which it is looked at."""
    half = training.steps / 2.0
    return sorted({round(half + half * i / count) for i in range(1, count + 1)})


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
    seed : int
    """

    members: tuple[int, ...] = (1, 2, 4, 8, 16)
    chains: int = 32
    looks: int = 5
    late_phase: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("looks", self.looks, 1)
        if max(self.members) > self.chains:
            raise NQMError(
                f"members must be at most the {self.chains} chains; got {max(self.members)}"
            )
        if self.late_phase is not None and min(self.members) < 2:
            raise NQMError(
                f"members must be at least 2 with late_phase; got {min(self.members)}; of chains a "
                "single one may be looked at"
            )


def measure_training(
    landscape: Landscape,
    training: Training,
    plan: Plan,
    *,
    test: Callable[[Tensor], float] | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Really train from the checkpoint, and average.

    Parameters
    ----------
    landscape : Landscape
    training : Training
    plan : Plan
    test : callable, optional
        Test loss of a weight vector, looked at once at the end.
    folder : Path, optional
        Keeps the result, and gives it when asked again.
    progress : callable, optional
        Told of minibatches done.

    Returns
    -------
    DataFrame
        Columns members, measured, error, test: change of the training loss from the checkpoint's,
        mean over groups and looks, its standard error over groups, and the mean test loss.
    """
    import pandas as pd

    at = looks(training, plan.looks)
    kept = Kept(folder, f"{fingerprint(landscape)}-{plan.seed}")
    start = landscape.loss()

    def chains() -> dict[str, Any]:
        held = train_chains(landscape, training, plan.chains, at, seed=plan.seed, progress=progress)
        weights = [w for _, w in held]
        found = {}
        for k in plan.members:
            found[str(k)] = group_losses(landscape.loss, weights, k) - start
            if test is not None:
                found[f"test{k}"] = group_losses(test, weights[-1:], k)
        return found

    def run(k: int, group: int) -> Iterator[tuple[int, Tensor]]:
        select, seed = plan.late_phase or "all", 1000 * plan.seed + group
        return train_late_phase(landscape, training, k, select, at, seed=seed, progress=progress)

    def members() -> dict[str, Any]:
        found = {}
        for k in plan.members:
            runs = [
                torch.stack([w for _, w in run(k, group)])
                for group in range(max(plan.chains // k, 2))
            ]
            weights = list(torch.stack(runs, 1))
            found[str(k)] = group_losses(landscape.loss, weights, 1) - start
            if test is not None:
                found[f"test{k}"] = group_losses(test, weights[-1:], 1)
        return found

    said = "-".join(f"{value}".replace(" ", "_") for value in asdict(training).values())
    how = "-".join(map(str, (*plan.members, plan.chains, plan.looks)))
    way = "chains" if plan.late_phase is None else f"late_phase-{plan.late_phase}".replace("*", "")
    tested = "" if test is None else "-test"
    losses = kept(f"{way}-{said}-{how}{tested}", chains if plan.late_phase is None else members)
    rows = []
    for k in plan.members:
        each = losses[str(k)].mean(1)
        error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else np.nan
        scores = losses.get(f"test{k}")
        rows.append(
            {
                "members": k,
                "measured": float(each.mean()),
                "error": error,
                "test": np.nan if scores is None else float(scores.mean()),
            }
        )
    return pd.DataFrame(rows)


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
) -> pd.DataFrame:
    """Prediction beside measurement, a row for every K.

    Returns
    -------
    DataFrame
        The training; members; predicted and measured change of the loss from the checkpoint's, its
        standard error; what noise adds, predicted and measured (``predicted_rise``,
        ``measured_rise``), and their ratio; the parts of the prediction; the test loss.
    """
    at = looks(training, plan.looks)
    found = predict(local, drift, training, at, smoothing)
    table = measure_training(landscape, training, plan, test=test, folder=folder, progress=progress)
    calm = found.descent
    if not abs(calm) <= STILL * found.excess / max(plan.members):
        kept = Kept(folder, fingerprint(landscape))
        name = f"noise_free-{training.lr}-{training.momentum}-{training.steps}-{plan.looks}"
        path = kept(name, lambda: {"loss": noise_free(landscape, training, at)})
        calm = float(path["loss"].mean()) - landscape.loss()
    for name, value in (asdict(training) | asdict(found)).items():
        table[name] = value
    table["way"] = plan.late_phase or "chains"
    table["noise_free"] = calm
    table["predicted"] = [found.change(k) for k in table["members"]]
    table["predicted_rise"] = [found.rise(k) for k in table["members"]]
    table["measured_rise"] = table["measured"] - calm
    table["ratio"] = table["measured_rise"] / table["predicted_rise"]
    table["ratio_error"] = table["error"] / table["predicted_rise"]
    return table[COLUMNS]


COLUMNS = [
    "way", "lr", "momentum", "batch_size", "sampling", "steps", "members", "predicted", "measured",
    "error", "predicted_rise", "measured_rise", "ratio", "ratio_error", "descent", "noise_free",
    "cross", "floor", "excess", "share", "test",
]  # fmt: skip


def verdict(table: pd.DataFrame, local: LocalModel) -> list[str]:
    """What the table says, in plain words.

    Parameters
    ----------
    table : DataFrame
        As `compare` makes it, of trainings that differ in learning rate and batch size.
    local : LocalModel
    """
    import pandas as pd

    lines = [
        f"Largest curvature {local.largest:.4g}; plain SGD is stable up to lr = "
        f"{2.0 / local.largest:.3g} on the quadratic."
    ]
    negative = local.negative_share()
    lines.append(
        f"{negative[0]:.1%} of the noise and {negative[1]:.1%} of the squared slope lie along "
        "negative curvature, of which the quadratic says nothing."
    )
    held = table[np.isfinite(table["predicted_rise"]) & (table["predicted_rise"] > 0)]
    trained = not held["measured"].isna().all()
    for bound in (1.05, 1.2, 1.5) if trained else ():
        near = np.abs(np.log(held["ratio"].clip(lower=1e-9))) < np.log(bound)
        lines.append(f"{int(near.sum())} of {len(held)} cells within a factor {bound:g}.")
    stiff = held[held["lr"] / (1.0 - held["momentum"]) * local.largest <= 0.5]
    if trained and len(stiff):
        lines.append(
            f"Where lr h_max <= 0.5: measured rise over predicted {stiff['ratio'].min():.2f} to "
            f"{stiff['ratio'].max():.2f}."
        )
    grouped = held.groupby(["way", "batch_size", "lr"], sort=True)
    for (way, size, lr), rows in grouped:
        first = rows.iloc[0]
        enough = first["excess"] / first["floor"] if first["floor"] > 0 else np.inf
        pays = (
            f"beyond K = {enough:.0f} the floor is most of the loss"
            if enough < 1e4
            else ("no floor within reach of K")
        )
        lines.append(f"{way}, lr = {lr:.3g}, B = {size}: {pays}.")
    for (way, size, k), rows in held.groupby(["way", "batch_size", "members"], sort=True):
        if rows["lr"].nunique() < 3:
            continue
        tried = rows.set_index("lr")
        best = f"{float(tried['predicted'].idxmin()):.3g} predicted"
        if trained:
            best += f", {float(tried['measured'].idxmin()):.3g} measured"
        lines.append(f"{way}, B = {size}, K = {k}: best lr of those tried {best}.")
    if not pd.isna(table["test"]).all():
        lines.append("Test losses stand in the table; the theory does not predict them.")
    return lines

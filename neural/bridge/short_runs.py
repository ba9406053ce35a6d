"""Losses of trainings to come, from a few short runs and the path of noise-free descent.

Short runs (`neural.bridge.probe`) tell at which learning rates a network stays near its minimum,
and what noise adds to the loss there. They begin at the highest rate and at a quarter of it. Where
runs leave, the next lower rate is tried; where the highest rate is the best one, twice that rate.

The loss of a mean of many runs is that of noise-free descent, which is followed to the end of the
training (`neural.bridge.descent_path`). What noise adds is scaled from the short run to the
training by three laws of first order: it is proportional to the learning rate and to the trace of
the noise where each ends; it has grown further as steps^a, with the exponent a that the short run
shows; and the floor of the mean is proportional to the square of rate and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neural.bridge.advise import LEFT, TRIED, TRIED_LR, TRIED_STEPS
from neural.bridge.comparison import COLUMNS
from neural.bridge.config import ITERATE, Plan, Training
from neural.bridge.descent_path import DescentPath, follow_descent, path_work
from neural.bridge.iterate_averages import TimeAverage
from neural.bridge.prediction import Prediction
from neural.bridge.probe import Probe, probe, probe_steps, stiffest
from neural.curvature import gradient_noise
from neural.curvature.examples import joined
from neural.curvature.risk import EmpiricalRisk, is_cross_entropy
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Examples from which the trace of the noise is measured; only its ratios count.
TRACED = 256
#: How often the highest rate may be doubled.
DOUBLINGS = 3
#: One row of the table.
Row = dict[str, Any]


class ShortRuns:
    """Short runs of trainings from one checkpoint, and what follows from them.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    plan : Plan
        Averages over time, numbers of members, and the seed.
    sharpness : float
        Largest curvature at the checkpoint.
    runs : int
        Number of short runs at a rate, at least 3.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        plan: Plan,
        sharpness: float,
        runs: int,
        progress: Progress | None = None,
    ):
        self.risk, self.plan, self.sharpness, self.runs = risk, plan, sharpness, runs
        self.progress = progress
        self.start, self.stiff = risk.loss(), stiffest(risk)
        self.path: DescentPath | None = None
        self._few = _some(risk, TRACED)
        self._traces: dict[tuple[float, int], float] = {}

    def rows(self, trainings: Sequence[Training]) -> list[Row]:
        """Rows of trainings of one batch size, and of higher rates where these are better.

        Parameters
        ----------
        trainings : sequence of Training
            They differ in their learning rates alone.

        Returns
        -------
        list of dict
            Of rates above one at which a run left, and of these, losses are NaN.
        """
        rates = sorted(trainings, key=lambda training: training.lr)
        known = self._probed(rates[::-2][:2], {})
        while (below := _below(rates, known)) and len(below) < len(rates):
            if below[-1].lr in known:
                break
            known = self._probed(below[-1:], known)
        rows = self._rows_of(below, known)
        doublings = 0
        while below == rates and doublings < DOUBLINGS and _best(rows, self) == rates[-1].lr:
            rates = [*rates, replace(rates[-1], lr=2.0 * rates[-1].lr)]
            known, doublings = self._probed(rates[-1:], known), doublings + 1
            below = _below(rates, known)
            rows += self._rows_of([each for each in below if each == rates[-1]], known)
        for training in rates[len(below) :]:
            if training.lr in known:
                none = Prediction(*[np.nan] * 4)
                rows += self._each(training, known[training.lr], ITERATE, none)
        return rows

    def _probed(
        self, trainings: Sequence[Training], known: dict[float, Probe]
    ) -> dict[float, Probe]:
        """Probes by learning rate, with those of some more trainings."""
        stage = "short runs, lr = " + ", ".join(f"{each.lr:.3g}" for each in trainings)
        work = self.runs * len(trainings) * probe_steps(trainings[0])
        told = counted(self.progress, stage, work)
        new = probe(self.risk, trainings, self.plan, self.runs, self.stiff, told)
        return known | {each.training.lr: each for each in new}

    def _rows_of(self, trainings: Sequence[Training], known: dict[float, Probe]) -> list[Row]:
        """Rows of trainings at rates at which no run left."""
        if not trainings:
            return []
        longest = max(training.effective_lr * training.steps for training in trainings)
        if self.path is None or longest > self.path.times[-1]:
            work = path_work(longest, self.sharpness)
            if self.path is not None:
                work -= path_work(float(self.path.times[-1]), self.sharpness)
            told = counted(self.progress, f"descent to lr steps = {longest:.3g}", max(work, 1))
            self.path = follow_descent(self.risk, longest, self.sharpness, told, self.path)
        rows = []
        stayed = [each for each in known.values() if not each.left]
        for training in trainings:
            near = min(stayed, key=lambda each: abs(np.log(each.training.lr / training.lr)))
            rows += self._scaled(training, near)
        return rows

    def _scaled(self, training: Training, short: Probe) -> list[Row]:
        """Rows of a training: evaluated descent, and the noise of short runs near by."""
        assert self.path is not None
        lr_ratio = training.lr / short.training.lr
        noise = lr_ratio * self._trace(training) / self._trace(short.training)
        longer = (training.steps / short.training.steps) ** short.growth
        whole, part = self.plan.averages(training), self.plan.averages(short.training)
        times: list[tuple[str, int | TimeAverage, int | TimeAverage, float]] = [
            (ITERATE, training.steps, short.training.steps, 1.0),
            *((a.name, a, b, _settled(a, b)) for a, b in zip(whole, part, strict=True)),
        ]
        rows = []
        for weights, at, before, settled in times:
            excess, runs = short.excess(weights), short.plain
            there = self.risk.loss(self.path.mean(short.training, before))
            floor = max(short.losses[weights][1] - excess / runs - there, 0.0)
            own = Prediction(
                self.risk.loss(self.path.mean(training, at)) - self.start,
                0.0,
                floor * noise**2,
                excess * noise * longer * settled ** (1.0 - short.growth),
            )
            rows += self._each(training, short, weights, own)
        return rows

    def _trace(self, training: Training) -> float:
        """Trace of the noise where the descent of a training ends."""
        assert self.path is not None
        key = training.effective_lr, training.steps
        if key not in self._traces:
            end = self._few.at(self.path.mean(training, training.steps))
            self._traces[key] = gradient_noise.trace(end)
        return self._traces[key]

    def _each(self, training: Training, short: Probe, weights: str, own: Prediction) -> list[Row]:
        """Rows of a training and an average over time, for every K."""
        seen = {
            TRIED: short.runs,
            TRIED_STEPS: short.training.steps,
            TRIED_LR: short.training.lr,
            LEFT: short.left,
        }
        return [row_of(training, self.plan, own, k, weights) | seen for k in self.plan.members]


def row_of(training: Training, plan: Plan, own: Prediction, members: int, weights: str) -> Row:
    """One row of the table, without indicators of the theory.

    Parameters
    ----------
    training, plan
        The training, and its kind of runs.
    own : Prediction
        Terms of the loss.
    members : int
        Number of members, K.
    weights : str
        The last weights, or an average over time.

    Returns
    -------
    dict
    """
    row = dict.fromkeys(COLUMNS, np.nan) | {"way": plan.way} | asdict(training) | asdict(own)
    row |= {"members": members, "weights": weights, "noise_free": own.descent}
    return row | changes_of(own, members)


def changes_of(own: Prediction, members: int) -> dict[str, float]:
    """Columns that follow from a prediction and K.

    Parameters
    ----------
    own : Prediction
        Terms of the loss.
    members : int
        Number of members, K.

    Returns
    -------
    dict of str to float
    """
    rises = {"predicted_rise": own.rise(members), "predicted_gain": own.rise() - own.rise(members)}
    return rises | {"predicted": own.change(members)}


def table_of(risk: EmpiricalRisk, rows: list[Row], start: float) -> pd.DataFrame:
    """Table of the rows, without those below any possible loss: cross-entropy is not negative.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    rows : list of dict
        Made by `row_of` and others.
    start : float
        Loss of the checkpoint.

    Returns
    -------
    DataFrame
    """
    import pandas as pd

    columns = [*COLUMNS, TRIED, TRIED_STEPS, TRIED_LR, LEFT]
    table = pd.DataFrame(rows, columns=columns, dtype=None if rows else float)
    if is_cross_entropy(risk.example_loss):
        table = table[~(table["predicted"] <= -start)]
    return table


def _best(rows: list[Row], measured: ShortRuns) -> float:
    """Learning rate of least predicted loss; NaN if none is possible."""
    table = table_of(measured.risk, rows, measured.start).dropna(subset="predicted")
    return float(table.sort_values("predicted")["lr"].iloc[0]) if len(table) else np.nan


def _below(rates: Sequence[Training], known: dict[float, Probe]) -> list[Training]:
    """Trainings at rates below all those at which a run left."""
    edge = min((lr for lr, each in known.items() if each.left), default=np.inf)
    return [training for training in rates if training.lr < edge]


def _settled(whole: TimeAverage, part: TimeAverage) -> float:
    """Growth of an average's variance with the steps where the weights' scatter is at rest.

    With independent weights it is the ratio of the sums of squared shares. It is 1 at least: an
    average over more steps may scatter less, which is not counted, as slow directions do not.
    """
    sums = [float(np.sum(each.weights() ** 2)) for each in (whole, part)]
    return max(sums[0] / sums[1], 1.0)


def _some(risk: EmpiricalRisk, count: int) -> EmpiricalRisk:
    """The loss of some examples, evenly chosen."""
    tensors, make = joined(risk.batches)
    chosen = torch.linspace(0, risk.examples - 1, min(count, risk.examples)).long()

    def picked(tensor: Tensor) -> Tensor:
        return tensor[chosen.to(tensor.device)]

    share = torch.full((len(chosen),), 1.0 / len(chosen)).to(risk.weights)
    return risk.sampled([make([picked(tensor) for tensor in tensors])], [share])

"""Losses of trainings to come, from a few short runs and the path of noise-free descent.

Short runs (`neural.bridge.probe`) tell at which learning rates a network stays near its minimum,
and what noise adds to the loss there. They begin at the highest rate, a quarter of it and twice
it. Where runs leave, the next lower rate is tried. Twice the highest rate counts only where the
highest is the best one.

To leading order the mean of many runs follows noise-free descent (`neural.bridge.descent_path`),
which is followed to half of the end of the training, or less far where curvature grows, and
extrapolated from there. What noise adds is scaled from the short run to the training by four laws
of first order. The scatter is proportional to the learning rate and to the trace of the noise where
each ends, and has grown further as steps^a, with the exponent a that the short run shows. Noise
slows the descent of the mean: it is as far as noise-free descent at a rate 2^-b times as high, with
b proportional to the rate and otherwise constant. Where half of the rate does not explain the loss
of the mean, the rest is its floor, proportional to the square of rate and noise.
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
from neural.curvature.example_losses import is_cross_entropy
from neural.curvature.examples import joined
from neural.curvature.risk import EmpiricalRisk
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Examples from which the trace of the noise is measured; only its ratios count.
TRACED = 256
#: Descent takes at most so many times the gradients that it takes if curvature does not grow.
DESCENT_ROOM = 1.25
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
        self._known: dict[tuple[float, int | TimeAverage, float], float] = {}

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
        # A single rate is one that was asked for.
        beyond = [replace(rates[-1], lr=2.0 * rates[-1].lr)] if len(rates) > 1 else []
        known = self._probed([*beyond, *rates[::-2][:2]], {})
        while (below := _below(rates, known)) and len(below) < len(rates):
            if below[-1].lr in known:
                break
            known = self._probed(below[-1:], known)
        rows = self._rows_of(below, known)
        best = table_of(self.risk, rows, self.start).dropna(subset="predicted")
        if len(best) and best.sort_values("predicted")["lr"].iloc[0] == rates[-1].lr:
            rows += self._rows_of(_below(beyond, known), known)
        for short in known.values():
            if short.left:
                training = replace(short.training, steps=rates[0].steps)
                rows += self._each(training, short, ITERATE, Prediction(*[np.nan] * 4))
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
        """Rows of trainings at rates at which no run left, increasing.

        Noise only adds to the loss. Where descent alone ends above what a higher rate is expected
        to reach, the noise is not scaled.
        """
        if not trainings:
            return []
        longest = 0.5 * trainings[-1].effective_lr * trainings[-1].steps
        self.path = follow_descent(
            self.risk,
            longest,
            self.sharpness,
            progress=self.progress,
            known=self.path,
            most=int(DESCENT_ROOM * path_work(longest, self.sharpness)),
        )
        rows: list[Row] = []
        best = np.inf
        stayed = [each for each in known.values() if not each.left]
        for training in reversed(trainings):
            descent = self._descent(training, training.steps)
            if descent > best:
                rows += given_up(training, self.plan, descent)
                continue
            near = min(stayed, key=lambda each: abs(np.log(each.training.lr / training.lr)))
            rows += self._scaled(training, near)
            best = table_of(self.risk, rows, self.start)["predicted"].min()
        return rows

    def _scaled(self, training: Training, short: Probe) -> list[Row]:
        """Rows of a training: its descent, and the noise of short runs near by."""
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
            there, slower = self._descents(short.training, before)
            behind = max(short.losses[weights][1] - excess / runs - self.start - there, 0.0)
            lag = min(behind / slower, 1.0) if slower > 0.0 else 0.0
            reached, slower_then = self._descents(training, at)
            own = Prediction(
                reached,
                min(lag * lr_ratio, 1.0) * slower_then,
                (behind - lag * slower) * noise**2,
                excess * noise * longer * settled ** (1.0 - short.growth),
            )
            rows += self._each(training, short, weights, own)
        return rows

    def _descents(self, training: Training, when: int | TimeAverage) -> tuple[float, float]:
        """Change of the loss by noise-free descent, and how much less it falls at half the rate."""
        whole = self._descent(training, when)
        half = self._descent(replace(training, lr=0.5 * training.lr), when)
        return whole, max(half - whole, 0.0)

    def _descent(self, training: Training, when: int | TimeAverage) -> float:
        """Change of the loss by noise-free descent, after some steps or of an average.

        Where a training ends after the path, an average lags behind the last weights as with a
        lower rate whose training ends on it.
        """
        assert self.path is not None
        key = training.effective_lr, when, float(self.path.times[-1])
        if key not in self._known:
            near = self._on_path(training)
            loss = self.risk.loss(self.path.mean(near, when))
            if near is not training:
                before = self.start + self._descent(near, near.steps)
                end = self.path.losses[-1] - self.path.fall(training.effective_lr * training.steps)
                loss = loss * end / before if self.path.positive else loss + end - before
            self._known[key] = loss - self.start
        return self._known[key]

    def _on_path(self, training: Training) -> Training:
        """The training, or one of half its rate, and so on, that ends on the path."""
        assert self.path is not None
        room = float(self.path.times[-1]) * (1.0 + 1e-9)
        while training.effective_lr * training.steps > room:
            training = replace(training, lr=0.5 * training.lr)
        return training

    def _trace(self, training: Training) -> float:
        """Trace of the noise where the descent of a training ends, or on the path before."""
        assert self.path is not None
        near = self._on_path(training)
        key = near.effective_lr, near.steps
        if key not in self._traces:
            end = self._few.at(self.path.mean(near, near.steps))
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


def given_up(training: Training, plan: Plan, descent: float) -> list[Row]:
    """Rows of a training of which descent alone is known, of its last weights.

    Parameters
    ----------
    training, plan
        The training, and its kind of runs.
    descent : float
        Change of the loss by noise-free descent.

    Returns
    -------
    list of dict
        For every K, with the descent as the expected change.
    """
    own = Prediction(descent, *[np.nan] * 3)
    return [row_of(training, plan, own, k, ITERATE) | {"predicted": descent} for k in plan.members]


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

"""What theory predicts of a training from a checkpoint.

Predicted from slope, curvature, noise and third derivatives at the checkpoint; nothing is fitted to
any training run. The loss of the mean of K runs after t steps is

    L(checkpoint) + descent + cross + floor + excess / K:

noise-free descent, the drift of the mean (`neural.drift`), and the excess that `nqm` gives for the
noise of one run, with curvature and noise as the scatter sees them (`neural.smoothing`). Averages
over time (`neural.time_averages`) have the same parts. Late-phase members on a shared base draw K
minibatches for one base step, so that at gamma = "mean" their average is plain SGD on minibatches
of K B: the same 1/K.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from neural.chains import Training
from neural.drift import Drift, descent
from neural.local_model import LocalModel
from neural.smoothing import Smoothing
from neural.time_averages import TimeAverage
from nqm import SGD, HeavyBall, Phase, Program, solve
from nqm.problem import Problem
from nqm.solvers.shuffle import shuffled_steady
from nqm.targets import stability_edge


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
    worth : float
        Runs that an average over time is worth, by the excess; 1 of the iterate.
    creases : float
        What kinks (`neural.kinks`) cost a single run beyond their part of the excess.
    octave : float
        What they cost more, times the members, for every halving of the scatter's width.
    """

    descent: float
    cross: float
    floor: float
    excess: float
    share: float = 0.0
    worth: float = 1.0
    creases: float = 0.0
    octave: float = 0.0

    def rise(self, members: float = 1.0) -> float:
        """What noise adds to the loss of the mean of K members."""
        excess = (self.excess - self.share) / members + 0.5 * self.share / (members**2 * self.worth)
        halvings = 0.5 * np.log2(members * self.worth)
        kinks = (self.creases + halvings * self.octave) / members
        return float(self.cross + self.floor + excess + kinks)

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
    at: Iterable[int | TimeAverage],
    smoothing: Smoothing | None = None,
) -> Prediction:
    """What a training does to the loss, averaged over `at`.

    Parameters
    ----------
    local : LocalModel
    drift : Drift
    training : Training
        Shuffled epochs are taken to be at their steady state: their noise cancels over an epoch.
    at : iterable of int or TimeAverage
        Steps at which the iterate is looked at, or averages over time.
    smoothing : Smoothing, optional
        Take curvature and noise as the scatter sees them.
    """
    each = predict_each(local, drift, training, list(at), smoothing)
    return Prediction(*map(float, np.mean([astuple(one) for one in each], axis=0)))


def predict_each(
    local: LocalModel,
    drift: Drift,
    training: Training,
    at: Sequence[int | TimeAverage],
    smoothing: Smoothing | None = None,
) -> list[Prediction]:
    """`predict` of every look or average by itself."""
    rate, size = training.lr / (1.0 - training.momentum), training.batch_size
    if smoothing is not None:
        local = smoothing.at(rate, size)
    if training.lr >= edge(local, training):
        return [Prediction(np.nan, np.nan, np.nan, np.inf)] * len(at)
    problem = local.problem().replace(initial_mean=0.0)
    steps = [when if isinstance(when, int) else when.steps for when in at]
    excesses = expected_excess(problem, training, local.examples, [*at, *steps])
    found = []
    for when, step, excess, iterate in zip(at, steps, excesses, excesses[len(at) :], strict=False):
        worth = iterate / excess if isinstance(when, TimeAverage) else 1.0
        share = creases = octave = 0.0
        if smoothing is not None:
            share = smoothing.share(rate, size, step, local) / worth
            kinks, part = smoothing.kinks, smoothing.creases(rate, size, step, local) / worth
            creases, octave = part * (kinks.cost - 1.0), part * kinks.octave
        found.append(
            Prediction(
                descent(local, rate, when),
                drift.cross(rate, size, when),
                drift.floor(rate, size, when),
                excess,
                share,
                worth,
                creases,
                octave,
            )
        )
    return found


def expected_excess(
    problem: Problem, training: Training, examples: int, at: Sequence[int | TimeAverage]
) -> list[float]:
    """Loss that noise adds to one run, by `nqm`.

    Parameters
    ----------
    problem : Problem
        Started at its minimum.
    training : Training
        Below the edge of stability.
    examples : int
        N, of which shuffled epochs are made.
    at : sequence of int or TimeAverage
        Of averages over shuffled epochs it is NaN: the steady state says nothing of how the steps
        of an epoch are correlated.
    """
    method, lr, size = _method(training), training.lr, training.batch_size
    shuffled = training.sampling == "shuffled"
    steps = sorted({when for when in at if isinstance(when, int)})
    known: dict[int, float] = {}
    if steps:
        phase = Phase(method, lr, steps[-1], batch_size=size)
        if shuffled:
            known = dict.fromkeys(steps, shuffled_steady(problem, phase, examples).loss)
        else:
            losses = solve(problem, Program((phase,)), at=steps).loss
            known = dict(zip(steps, map(float, losses), strict=True))
    found = []
    for when in at:
        if isinstance(when, int):
            found.append(known[when])
        elif shuffled:
            found.append(np.nan)
        else:
            losses = solve(problem, when.program(method, lr, size), at=[when.steps]).loss
            found.append(float(losses[-1]))
    return found


def edge(local: LocalModel, training: Training) -> float:
    """Learning rate from which the quadratic is unstable."""
    return float(stability_edge(local.problem(), _method(training)))


def _method(training: Training) -> SGD | HeavyBall:
    return HeavyBall(momentum=training.momentum) if training.momentum else SGD()


def looks(training: Training, count: int) -> list[int]:
    """Steps over the second half of a training at which it is looked at."""
    half = training.steps / 2.0
    return sorted({round(half + half * i / count) for i in range(1, count + 1)})

"""Predicted change of the loss by a training from a checkpoint.

The prediction uses slope, curvature, noise and third derivatives at the checkpoint; nothing is
fitted to any training run. The loss of the mean of K runs after t steps is

    L(checkpoint) + descent + cross + floor + excess / K:

the change by noise-free descent, two terms for the drift of the mean (`neural.bridge.drift`), and
the excess loss that `nqm` computes for the noise of one run, with curvature and noise averaged over
the weights of the training (`neural.bridge.gaussian`). Averages over time
(`neural.bridge.iterate_averages`) have the same terms. The mean of K late-phase members on a shared
base takes K minibatches in a step, which divides the excess by K as well; the other terms are those
of the members' own scatter (`neural.bridge.shared_base`), and differ for every K.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from neural.bridge.config import SHUFFLED, Training
from neural.bridge.drift import descent
from neural.bridge.gaussian import WeightGaussian
from neural.bridge.iterate_averages import TimeAverage
from neural.bridge.scatter import covariance, responses
from neural.bridge.shared_base import SharedBaseQuadratic
from neural.bridge.shuffled import sums_at_end
from neural.bridge.smoothing import Kinks
from neural.curvature.local_quadratic import LocalQuadratic
from nqm import Phase, Program, solve
from nqm.problems.quadratic import Problem


@dataclass(frozen=True)
class Prediction:
    """Change of the loss by a training, relative to the checkpoint's loss, term by term.

    Attributes
    ----------
    descent : float
        Change by noise-free descent, on its path if that was trained, else on the quadratic.
    cross : float
        Change by the drift acting along the slope that descent leaves.
    floor : float
        Loss caused by the drift in the mean of any number of members.
    excess : float
        Expected excess loss of a single run due to noise; the mean of K runs has 1/K of it.
        Infinite where the quadratic is unstable.
    curvature_change_part : float
        Part of `excess` that is due to the change of curvature by the run's own covariance; in the
        mean of K members it falls as 1 / K^2.
    effective_runs : float
        Effective number of independent runs: excess of the iterate over that of an average over
        time; 1 for the iterate itself. For late-phase members, the squared width of one member's
        scatter relative to that of an independent run, at most 1.
    nonsmooth_excess : float
        Excess loss of a single run due to kinks (`neural.bridge.kinks`), beyond their part of
        `excess`.
    log2_slope : float
        Increase of K times `nonsmooth_excess` for every halving of the standard deviation of the
        weights.
    """

    descent: float
    cross: float
    floor: float
    excess: float
    curvature_change_part: float = 0.0
    effective_runs: float = 1.0
    nonsmooth_excess: float = 0.0
    log2_slope: float = 0.0

    def rise(self, members: float = 1.0) -> float:
        """Expected increase of the loss by noise, in the mean of K members.

        Parameters
        ----------
        members : float
            Number of members, K >= 1.

        Returns
        -------
        float
            `cross`, `floor` and the excess of the mean.
        """
        part, runs = self.curvature_change_part, self.effective_runs
        excess = (self.excess - part) / members + 0.5 * part / (members**2 * runs)
        halvings = 0.5 * np.log2(members * runs)
        kinks = (self.nonsmooth_excess + halvings * self.log2_slope) / members
        return float(self.cross + self.floor + excess + kinks)

    def change(self, members: float = 1.0) -> float:
        """Expected change of the loss of the mean of K members: `descent` plus `rise`.

        Parameters
        ----------
        members : float
            Number of members, K >= 1.

        Returns
        -------
        float
            Relative to the loss of the checkpoint; negative if training lowers the loss.
        """
        return self.descent + self.rise(members)

    @property
    def members_at_floor(self) -> float:
        """Number of members K at which the floor equals excess / K; infinite without a floor."""
        return self.excess / self.floor if self.floor > 0 else float("inf")


def weighted(parts: Iterable[tuple[float, Prediction]]) -> Prediction:
    """Weighted mean of predictions, term by term.

    Parameters
    ----------
    parts : iterable of (float, Prediction)
        Weights, which add up to 1, and predictions.

    Returns
    -------
    Prediction
    """
    parts = list(parts)
    means = {
        term.name: sum(weight * getattr(prediction, term.name) for weight, prediction in parts)
        for term in fields(Prediction)
    }
    return Prediction(**means)


def predict_loss(gaussian: WeightGaussian, at: Iterable[int | TimeAverage]) -> Prediction:
    """Predict the change of the loss by a training, averaged over steps.

    Parameters
    ----------
    gaussian : WeightGaussian
        Gaussian of the weights in the training.
    at : iterable of int or TimeAverage
        Steps after which the loss of the iterate is recorded, or averages over time.

    Returns
    -------
    Prediction
    """
    each = predict_each(gaussian, list(at))
    return weighted((1.0 / len(each), prediction) for prediction in each)


def predict_each(gaussian: WeightGaussian, at: Sequence[int | TimeAverage]) -> list[Prediction]:
    """`predict_loss` for every step or average separately.

    Parameters
    ----------
    gaussian, at
        See `predict_loss`.

    Returns
    -------
    list of Prediction
        One for each entry of `at`. Beyond the edge of stability the excess is infinite and the
        other terms are NaN.
    """
    if not gaussian.stable:
        return [Prediction(np.nan, np.nan, np.nan, np.inf)] * len(at)
    training, local, drift = gaussian.training, gaussian.local, gaussian.drift
    problem = local.problem().replace(initial_mean=0.0)
    steps = [when if isinstance(when, int) else when.steps for when in at]
    excesses = expected_excess(problem, training, local.examples, [*at, *steps])
    predictions, width, path = [], _width(local, training), gaussian.path
    smoothing, parts = gaussian.smoothing, [(0.0, 0.0)] * len(at)
    if smoothing is not None:
        parts = smoothing.excess_parts(training, steps, local)
    for when, part, excess, iterate in zip(at, parts, excesses, excesses[len(at) :], strict=False):
        # Far from a minimum the noise may be predicted to vanish.
        runs = iterate / excess if isinstance(when, TimeAverage) and excess > 0.0 else 1.0
        change_part, kink_part = (each / runs for each in part)
        kinks = Kinks.none() if smoothing is None else smoothing.kinks
        predictions.append(
            Prediction(
                descent=_fall(gaussian, when),
                cross=drift.cross(training, when, path),
                floor=drift.floor(training, when),
                excess=excess,
                curvature_change_part=change_part,
                effective_runs=runs / width,
                nonsmooth_excess=kink_part * (kinks.cost_ratio - 1.0),
                log2_slope=kink_part * kinks.log2_slope,
            )
        )
    return predictions


def _fall(gaussian: WeightGaussian, when: int | TimeAverage) -> float:
    """Change of the loss by noise-free descent.

    Beyond the end of its path the loss goes on to fall in proportion to that of the quadratic.
    """
    local, training, path = gaussian.local, gaussian.training, gaussian.path
    if path is None:
        return descent(local, training, when)
    fall = path.change(training, when)
    if path.covers(training, when):
        return fall
    ends = descent(local, training, when), descent(local, path.training, path.training.steps)
    return fall * max(ends[0] / ends[1], 1.0) if ends[1] < 0.0 else fall


def _width(local: LocalQuadratic, training: Training) -> float:
    """K times the mean model's covariance relative to a member's; 1 for independent runs."""
    if not isinstance(local, SharedBaseQuadratic):
        return 1.0
    member, single = covariance(local, training), covariance(local.mean_model, training)
    return float(np.sum(member * single) / max(float(np.sum(member * member)), 1e-300))


def expected_excess(
    problem: Problem, training: Training, examples: int, at: Sequence[int | TimeAverage]
) -> list[float]:
    """Expected excess loss of one run due to noise, computed by `nqm`.

    Parameters
    ----------
    problem : Problem
        Its initial mean is its minimum.
    training : Training
        The training; its learning rate is below the edge of stability.
    examples : int
        Number of examples of a shuffled epoch, N.
    at : sequence of int or TimeAverage
        Steps, and averages over time.

    Returns
    -------
    list of float
        One for each entry of `at`.
    """
    if training.sampling == SHUFFLED:
        return _shuffled_excess(problem, training, examples, at)
    method, lr, size = training.algorithm, training.lr, training.batch_size
    steps = sorted({when for when in at if isinstance(when, int)})
    known: dict[int, float] = {}
    if steps:
        phase = Phase(method, lr, steps[-1], batch_size=size)
        losses = solve(problem, Program((phase,)), at=steps).loss
        known = dict(zip(steps, map(float, losses), strict=True))
    return [
        known[when]
        if isinstance(when, int)
        else float(solve(problem, when.program(method, lr, size), at=[when.steps]).loss[-1])
        for when in at
    ]


def _shuffled_excess(
    problem: Problem, training: Training, examples: int, at: Sequence[int | TimeAverage]
) -> list[float]:
    """`expected_excess` of shuffled epochs, whose noise cancels."""
    lr, size = training.effective_lr, training.batch_size
    last = max((when for when in at if isinstance(when, int)), default=1)
    of_iterate = responses(lr * problem.curvature, replace(training, steps=last))
    weight = 0.5 * problem.multiplicity * problem.curvature * problem.noise_variance
    excesses = []
    for when in at:
        if isinstance(when, int):
            rows = of_iterate[:when]
        else:
            rows = responses(lr * problem.curvature, training, when)
        excesses.append(lr**2 / size * float(weight @ sums_at_end(rows, examples, size)))
    return excesses

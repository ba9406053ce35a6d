"""The path of noise-free descent from a checkpoint, in few gradients.

Gradient descent at a rate below the edge of stability follows the gradient flow dw / dt = -g(w),
with the time t = lr steps: the paths of all learning rates are one curve, and a lower rate ends
earlier on it. The flow is integrated by Runge-Kutta-Legendre steps of second order (Meyer, Balsara
& Aslam 2012): s gradients cover a time of (s^2 + s - 2) / (2 h_max), where s steps of descent at
the edge of stability cover 2 s / h_max.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import Training
from neural.bridge.iterate_averages import TimeAverage
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError
from nqm.progress import Progress, counted

FloatArray = NDArray[np.float64]
#: Room for a curvature that grows along the path. Where it grows further, the loss rises, and the
#: step is taken again with twice the curvature, so many times at most.
ROOM, RETRIES = 1.2, 8
#: Where the gradient grows to so many times that at the start of a step, curvature has grown.
STEEP = 4.0
#: Largest logarithm of the ratio of one doubling's fall to that of the last: that of a fall in
#: proportion to time.
STEADY = math.log(2.0)


@dataclass(frozen=True)
class DescentPath:
    """Weights of noise-free descent at some times.

    Attributes
    ----------
    times : ndarray, shape (n,)
        Learning rate times steps; increasing, the first is 0.
    weights, slopes : Tensor, shape (n, p)
        Weights at these times, and the gradients of the loss there. In between, the weights are
        cubic in time (Hermite).
    losses : ndarray, shape (n,)
        Losses at these times.
    work : int
        Number of gradients that were taken.
    """

    times: FloatArray
    weights: Tensor
    slopes: Tensor
    losses: FloatArray
    work: int

    @property
    def positive(self) -> bool:
        """Whether the losses are positive, so that their falls are relative ones (`fall`)."""
        return bool(self.losses.min() > 0.0)

    def mean(self, training: Training, when: int | TimeAverage) -> Tensor:
        """Weights of a training without noise, after some steps or averaged over time.

        Parameters
        ----------
        training : Training
            Gives the effective learning rate.
        when : int or TimeAverage
            Number of steps, or an average over them.

        Returns
        -------
        Tensor, shape (p,)
        """
        if isinstance(when, int):
            steps, each = np.array([float(when)]), np.ones(1)
        else:
            each = when.weights()
            steps = np.arange(1.0, len(each) + 1.0)
        times = training.effective_lr * steps
        before = np.clip(np.searchsorted(self.times, times) - 1, 0, len(self.times) - 2)
        span = np.diff(self.times)[before]
        x = (times - self.times[before]) / span
        ends = x**2 * (3.0 - 2.0 * x)
        shares, pulls = np.zeros((2, len(self.times)))
        np.add.at(shares, before, each * (1.0 - ends))
        np.add.at(shares, before + 1, each * ends)
        np.add.at(pulls, before, each * span * x * (1.0 - x) ** 2)
        np.add.at(pulls, before + 1, each * span * x**2 * (x - 1.0))
        shares[0] += 1.0 - each.sum()  # what an average still has of the checkpoint
        on_nodes = torch.from_numpy(shares).to(self.weights) @ self.weights
        return on_nodes - torch.from_numpy(pulls).to(self.weights) @ self.slopes

    def fall(self, time: float) -> float:
        """By how much the loss falls from the end of the path to a later time, extrapolated.

        The falls of the last two doublings of the time are continued as a power of time. They are
        falls of the logarithm of the loss if it is positive, and stays so; else of the loss itself.
        The last doubling of a descent costs nearly half as much as all before it. The last times of
        the path must double, as they do unless it was continued by another factor.

        Parameters
        ----------
        time : float
            Learning rate times steps, at least that of the end.

        Returns
        -------
        float
            At least 0.
        """
        known = self.losses[-3:]
        before, last = -np.diff(np.log(known) if self.positive else known)
        if not min(before, last) > 0.0:
            return 0.0
        power = min(math.log(last / before), STEADY)
        ahead = math.log2(time / self.times[-1])
        # Its limit is the ratio where the power is 0.
        ratio = -math.expm1(power * ahead) / math.expm1(-power) if power else ahead
        fall = last * ratio
        return float(-known[-1] * math.expm1(-fall) if self.positive else fall)


def follow_descent(
    risk: EmpiricalRisk,
    longest: float,
    sharpness: float,
    *,
    progress: Progress | None = None,
    known: DescentPath | None = None,
    most: int | None = None,
) -> DescentPath:
    """Follow noise-free descent of the loss from the risk's weights.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    longest : float
        Last time, learning rate times steps.
    sharpness : float
        Largest curvature at the start.
    progress : callable, optional
        Called with the name of the stage and the fraction of it that is done.
    known : DescentPath, optional
        A shorter path from these weights, which is continued.
    most : int, optional
        Number of gradients of the whole path after which it ends early, but not before it has
        four times.

    Returns
    -------
    DescentPath

    Raises
    ------
    NQMError
        If the loss does not fall, however short the steps are.
    """
    if known is not None and longest <= known.times[-1]:
        return known
    bound = sharpness * ROOM
    if known is None:
        times, weights = _times(longest, sharpness), [risk.weights]
        (loss, slope), work = risk.loss_and_gradient(), 0
        losses, slopes = [loss], [slope]
    else:
        doublings = math.ceil(math.log2(longest / known.times[-1]))
        more = np.geomspace(known.times[-1], longest, doublings + 1)
        times, weights = np.array([*known.times, *more[1:]]), list(known.weights)
        losses, slopes, work = [*known.losses], [*known.slopes], known.work
        loss, slope = losses[-1], slopes[-1]
    expected = path_work(longest, sharpness) - work
    told = counted(progress, f"descent to lr steps = {longest:.3g}", max(expected, 1))
    for span in np.diff(times[len(weights) - 1 :]):
        for attempt in range(RETRIES):
            stages = _stages(float(span) * bound)
            if most is not None and len(weights) > 3 and work + stages > most:
                return _path(times, weights, slopes, losses, work)
            end, work = _step(risk, weights[-1], slope, float(span), stages, told), work + stages
            if end is not None:
                end_loss, end_slope = risk.loss_and_gradient(end)
                if end_loss <= loss + 1e-6 * abs(loss):
                    break
            if attempt == RETRIES - 1:
                raise NQMError(
                    f"noise-free descent from the checkpoint cannot be followed: curvature grows "
                    f"beyond {bound:.3g}; lower bridge.steps or bridge.lr_times_sharpness"
                )
            bound *= 2.0
        assert end is not None
        loss, slope = end_loss, end_slope
        weights.append(end)
        slopes.append(slope)
        losses.append(loss)
    return _path(times, weights, slopes, losses, work)


def _path(
    times: FloatArray, weights: list[Tensor], slopes: list[Tensor], losses: list[float], work: int
) -> DescentPath:
    known = times[: len(weights)]
    return DescentPath(known, torch.stack(weights), torch.stack(slopes), np.array(losses), work)


def path_work(longest: float, sharpness: float) -> int:
    """Number of gradients of `follow_descent` where curvature does not grow.

    Parameters
    ----------
    longest, sharpness
        See `follow_descent`.

    Returns
    -------
    int
    """
    spans = np.diff(_times(longest, sharpness))
    return sum(_stages(float(span) * sharpness * ROOM) for span in spans)


def _times(longest: float, sharpness: float) -> FloatArray:
    """Times of the path, each twice the one before, from 1 / (2 h_max) on; at least four."""
    doublings = max(math.ceil(math.log2(longest * sharpness)), 1) + 1
    return np.array([0.0, *(longest * 2.0**-k for k in range(doublings, -1, -1))])


def _stages(span: float) -> int:
    """Smallest odd number of stages that is stable for a time in units of 1 / h_max."""
    least = math.ceil((math.sqrt(9.0 + 8.0 * span) - 1.0) / 2.0)
    return max(least + 1 - least % 2, 3)


def _step(
    risk: EmpiricalRisk,
    start: Tensor,
    slope: Tensor,
    span: float,
    stages: int,
    told: Callable[[int], None],
) -> Tensor | None:
    """One Runge-Kutta-Legendre step; coefficients as in the paper, with b of the stages j.

    None where it is seen to be unstable before its end.
    """
    share = 4.0 / (stages**2 + stages - 2.0) * span
    b = [1.0 / 3.0] * 2 + [(j * j + j - 2.0) / (2.0 * j * (j + 1.0)) for j in range(2, stages + 1)]
    before, now, steepest = start, start - b[1] * share * slope, STEEP * slope.norm()
    for j in range(2, stages + 1):
        ahead = (2.0 * j - 1.0) / j * b[j] / b[j - 1]
        back = -(j - 1.0) / j * b[j] / b[j - 2]
        gradient = risk.gradient(now)
        if not gradient.norm() <= steepest:
            return None
        force = gradient - (1.0 - b[j - 1]) * slope
        latest = ahead * now + back * before + (1.0 - ahead - back) * start - ahead * share * force
        before, now = now, latest
    told(stages)
    return now

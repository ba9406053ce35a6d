"""Averages of the weights over the steps of one run: during training, and exactly on quadratics.

An average a_t moves a fraction `share` of the way to the weights w_t after every step,

    a_t = a_(t-1) + share(t) (w_t - a_(t-1)),      a_0 = w_0 the checkpoint.

On a quadratic without noise, a displacement along curvature h is multiplied by (1 - lr h)^t in t
steps. The displacement of the average is multiplied by the weighted mean of these powers: `left`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nqm import EMA, SWA, Phase, Program
from nqm.algorithms.base import Optimizer
from nqm.errors import check_integer, check_number

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class TimeAverage(ABC):
    """An average over the steps of one run, evaluated after the last one.

    Attributes
    ----------
    steps : int
        T, the number of steps of the run.
    name : str
        Name of the average in tables.
    """

    steps: int
    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)

    @abstractmethod
    def share(self, step: int) -> float:
        """Fraction of the distance to the weights that the average moves after a step.

        Parameters
        ----------
        step : int
            Number of the step, from 1.

        Returns
        -------
        float
            In [0, 1].
        """

    def weights(self) -> FloatArray:
        """Weight of every step's weights in the average after the last step.

        Returns
        -------
        ndarray, shape (T,)
            Of w_1 ... w_T; what is missing to a sum of 1 is the weight of the checkpoint.
        """
        shares = np.array([self.share(step) for step in range(1, self.steps + 1)])
        kept = np.append(np.cumprod(1.0 - shares[:0:-1])[::-1], 1.0)
        return np.asarray(shares * kept)

    @abstractmethod
    def left(self, u: FloatArray) -> FloatArray:
        """Mean of (1 - u)^t over t = 0 ... T with the average's weights.

        Parameters
        ----------
        u : ndarray
            Learning rate times curvature, lr h.

        Returns
        -------
        ndarray, shape of `u`
            Factor by which a displacement of the checkpoint is multiplied in the average.
        """

    @property
    @abstractmethod
    def age(self) -> float:
        """Mean of t over t = 0 ... T with the average's weights, in steps."""

    @abstractmethod
    def program(self, method: Optimizer, lr: float, batch_size: float) -> Program:
        """The run and its average as a program of `nqm`.

        Parameters
        ----------
        method : Optimizer
            Optimizer of the run.
        lr : float
            Learning rate.
        batch_size : float
            Examples of one minibatch.

        Returns
        -------
        Program
        """


@dataclass(frozen=True)
class TailMean(TimeAverage):
    """SWA: the uniform mean of the weights after every step of the second half, t > T // 2."""

    name: ClassVar[str] = "swa"

    @property
    def start(self) -> int:
        """Number of steps before the first one that is averaged."""
        return self.steps // 2

    def share(self, step: int) -> float:
        """Return 1 / n at the n-th step of the second half, and 0 before.

        Parameters
        ----------
        step : int
            Number of the step, from 1.

        Returns
        -------
        float
            In [0, 1].
        """
        return 1.0 / (step - self.start) if step > self.start else 0.0

    def left(self, u: FloatArray) -> FloatArray:
        """Return (1 - u)^(s + 1) (1 - (1 - u)^n) / (n u), with s = T // 2 and n = T - s.

        Parameters
        ----------
        u : ndarray
            Learning rate times curvature, lr h.

        Returns
        -------
        ndarray, shape of `u`
            Mean of (1 - u)^t over the steps of the second half.
        """
        count = self.steps - self.start
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # expm1 and log1p: 1 - (1 - u)^n would lose its digits at small u.
            lost = np.where(u < 1.0, -np.expm1(count * np.log1p(-np.minimum(u, 1.0))), 0.0)
            mean = np.where(u < 1.0, lost, 1.0 - power(u, count)) / (u * count)
            return power(u, self.start + 1) * np.where(u == 0.0, 1.0, mean)

    @property
    def age(self) -> float:
        """Mean of t over the averaged steps, (s + 1 + T) / 2."""
        return 0.5 * (self.start + 1 + self.steps)

    def program(self, method: Optimizer, lr: float, batch_size: float) -> Program:
        """Return a program with a phase of the optimizer, then a phase of `nqm.SWA`.

        Parameters
        ----------
        method : Optimizer
            Optimizer of the run.
        lr : float
            Learning rate.
        batch_size : float
            Examples of one minibatch.

        Returns
        -------
        Program
            The second phase has the steps that are averaged.
        """
        first = Phase(method, lr, self.start, batch_size=batch_size)
        rest = Phase(SWA(method), lr, self.steps - self.start, batch_size=batch_size)
        return Program((first, rest))


@dataclass(frozen=True)
class ExponentialMean(TimeAverage):
    """EMA: every step moves the average by 1 - decay towards the weights.

    Attributes
    ----------
    decay : float
        Share of the average that a step keeps, beta in [0, 1).
    """

    decay: float = 0.99
    name: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("decay", self.decay, low=0.0, high=1.0, closed_high=False)

    def share(self, step: int) -> float:
        """Return 1 - beta.

        Parameters
        ----------
        step : int
            Number of the step; not used.

        Returns
        -------
        float
            In (0, 1].
        """
        return 1.0 - self.decay

    def left(self, u: FloatArray) -> FloatArray:
        """Return beta^T + (1 - beta) r (r^T - beta^T) / (r - beta), with r = 1 - u.

        Parameters
        ----------
        u : ndarray
            Learning rate times curvature, lr h.

        Returns
        -------
        ndarray, shape of `u`
            Mean of (1 - u)^t over all steps with exponential weights.
        """
        r, beta, steps = 1.0 - u, self.decay, self.steps
        gap = r - beta
        same = np.abs(gap) < 1e-9
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            apart = (power(u, steps) - beta**steps) / np.where(same, 1.0, gap)
            sum_of_powers = np.where(same, steps * beta ** (steps - 1), apart)
            return beta**steps + (1.0 - beta) * r * sum_of_powers

    @property
    def age(self) -> float:
        """Mean of t with exponential weights, T - beta (1 - beta^T) / (1 - beta)."""
        beta = self.decay
        return self.steps - beta * (1.0 - beta**self.steps) / (1.0 - beta)

    def program(self, method: Optimizer, lr: float, batch_size: float) -> Program:
        """Return a program with one phase of `nqm.EMA`.

        Parameters
        ----------
        method : Optimizer
            Optimizer of the run.
        lr : float
            Learning rate.
        batch_size : float
            Examples of one minibatch.

        Returns
        -------
        Program
            It has all steps of the run.
        """
        return Program((Phase(EMA(method, self.decay), lr, self.steps, batch_size=batch_size),))


class Running:
    """Averages that are updated step by step, without storing the path.

    Parameters
    ----------
    averages : iterable of TimeAverage
        The averages to compute.
    start : Tensor
        Weights at step 0, of one run, shape (p,), or of many, shape (runs, p).

    Attributes
    ----------
    values : dict of str to Tensor
        Current value of every average, by its name.
    """

    def __init__(self, averages: Iterable[TimeAverage], start: Tensor):
        self.averages = tuple(averages)
        self.values = {average.name: start.detach().clone() for average in self.averages}

    def __call__(self, step: int, weights: Tensor) -> None:
        """Update the averages with the weights after a step.

        Parameters
        ----------
        step : int
            Number of the step, from 1.
        weights : Tensor, shape of `start`
            Weights after the step.
        """
        for average in self.averages:
            if share := average.share(step):
                self.values[average.name].lerp_(weights, share)


def power(u: FloatArray, steps: float) -> FloatArray:
    """Compute (1 - u)^steps, accurately also at small u.

    Parameters
    ----------
    u : ndarray
        Learning rate times curvature.
    steps : float
        Whole number of steps.

    Returns
    -------
    ndarray, shape of `u`
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        small = np.exp(steps * np.log1p(-np.minimum(u, 1.0)))
        return np.where(u < 1.0, small, (1.0 - u) ** round(steps))

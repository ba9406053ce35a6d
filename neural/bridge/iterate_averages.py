"""Averages of the weights over the steps of one run: during training, and exactly on quadratics.

An average a_t moves a fraction `share` of the way to the weights w_t after every step,

    a_t = a_(t-1) + share(t) (w_t - a_(t-1)),      a_0 = w_0 the checkpoint.

How the mean of the weights moves in an average is in `neural.bridge.response`.
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

    @property
    @abstractmethod
    def phases(self) -> tuple[tuple[int, float, float], ...]:
        """Phases of the run with (steps, keep, share), in which a step makes a keep + share w of a.

        From a = 0 on, the value after the last step is that of the average.
        """

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

    @property
    def phases(self) -> tuple[tuple[int, float, float], ...]:
        """The first half, of which nothing is kept, and the second, with equal weights."""
        count = self.steps - self.start
        return (self.start, 0.0, 0.0), (count, 1.0, 1.0 / count)

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

    @property
    def phases(self) -> tuple[tuple[int, float, float], ...]:
        """One phase of all steps."""
        return ((self.steps, self.decay, 1.0 - self.decay),)

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

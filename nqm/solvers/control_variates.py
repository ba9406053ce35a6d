"""Control variates: a linear twin of a method that is not linear, driven by the same noise.

The twin of one direction is a deterministic mean, and a deviation that is linear in the noise that
the method draws:

    b' = momentum b + pull d + push e,      d' = d - step b',      loss = sum weight (mean + d)^2

with one coefficient per step and direction. Its expected loss is therefore known exactly for any
coefficients, and the regression of the method's loss on the twin's loss removes the scatter that
both share. Good coefficients remove more of it:

- multiplicative late-phase weights: the first order in the noise about theta^2 and phi^2, which
  drift as `nqm.solvers.multiplicative_long_run` says. pull = h, push e = the mean of the members'
  noise, step = member_lr theta^2 + gamma K lr phi^2;
- clipped SGD: the threshold over the root of the expected squared norm, where that is above it;
- Adam: m over the root of the expected s, with its bias correction;
- sign steps: by statistical linearisation (Booton 1954, "Nonlinear control systems with random
  inputs"): the mean step lr erf and its slope at the mean, driven by sign(e); with momentum by e.

Stochastic rounding has no part in the twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from nqm.algorithms.base import Algorithm
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.sampled import Sampled
from nqm.errors import NQMError
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Program
from nqm.solvers._kernels.twins import FIELDS, evaluate_twin
from nqm.solvers.moments import solve


def peak(algorithm: Sampled) -> float:
    """Twice the density at 0 of the noise, of variance 1: the slope of the mean sign at 0.

    Parameters
    ----------
    algorithm : Sampled
        Its `tail` is the degrees of freedom of the noise, inf for normal noise.

    Returns
    -------
    float
        sqrt(2 / pi) for normal noise; larger for Student's t.
    """
    dof = algorithm.tail
    if math.isinf(dof):
        return math.sqrt(2.0 / math.pi)
    log_ratio = math.lgamma(0.5 * (dof + 1.0)) - math.lgamma(0.5 * dof)
    return 2.0 * math.exp(log_ratio) / math.sqrt(math.pi * (dof - 2.0))


@dataclass(frozen=True)
class Start:
    """Exact state of the twin at the start of the first phase that is not linear.

    Attributes
    ----------
    index : int
        Position of that phase.
    mean, variance : ndarray, shape (d,)
        Moments of the weights from which it starts.
    loss : ndarray, shape (records,)
        Expected loss at the records of the phases before it.
    """

    index: int
    mean: FloatArray
    variance: FloatArray
    loss: FloatArray

    @classmethod
    def of(cls, problem: Problem, program: Program, wanted: list[int]) -> Self:
        """Compute the exact moments of the linear phases with which a program begins.

        Parameters
        ----------
        problem : Problem
            Noisy quadratic problem.
        program : Program
            With a phase that is not linear.
        wanted : list of int
            Steps of the whole program that are recorded, rising.

        Returns
        -------
        Start
            Moments at the first phase that is not linear.

        Raises
        ------
        NQMError
            If all phases are linear, or a phase has no twin.
        """
        kinds = [isinstance(phase.algorithm, Algorithm) for phase in program.phases]
        if all(kinds):
            raise NQMError("control is for methods that are not linear; nqm.solve is exact here")
        index = kinds.index(False)
        for i, phase in enumerate(program.phases[index:], index):
            if kinds[i]:
                raise NQMError(
                    f"control: phase.{i} is linear after one that is not; put linear phases first"
                )
            if isinstance(phase.algorithm, MultiplicativeLatePhase) and phase.algorithm.scalar:
                raise NQMError(f"control: phase.{i}.coupling must be 'elementwise'; got 'scalar'")
        if not index:
            return cls(0, problem.initial_mean, problem.initial_variance, np.empty(0))
        before = Program(program.phases[:index])
        exact = solve(problem, before, [*(s for s in wanted if s <= before.steps), before.steps])
        assert exact.weight_mean is not None
        assert exact.weight_variance is not None
        known = [row for row, step in enumerate(exact.steps) if step in wanted]
        return cls(index, exact.weight_mean[-1], exact.weight_variance[-1], exact.loss[known])


@dataclass
class Twin:
    """State of the twins of one block of replicas, advanced in place by the kernels.

    All arrays are empty if there is no control variate.

    Attributes
    ----------
    moments : ndarray, shape (`FIELDS`, d)
        Mean, second moments and coefficients: `field` in the kernels.
    delta, buffer : ndarray, shape (replicas, d)
        Deviation of each twin from the mean, and its momentum buffer.
    expected : ndarray, shape (records,)
        Expected loss of the twin.
    loss : ndarray, shape (records, replicas)
        Loss of each twin.
    """

    moments: FloatArray
    delta: FloatArray
    buffer: FloatArray
    expected: FloatArray
    loss: FloatArray

    @classmethod
    def of(cls, problem: Problem, start: Start | None, records: int, replicas: int) -> Self:
        """Create the twins at the start of a program.

        Parameters
        ----------
        problem : Problem
            Noisy quadratic problem.
        start : Start or None
            Exact state at the first phase that is not linear; None for no twins.
        records, replicas : int
            Shape of the recorded losses.

        Returns
        -------
        Twin
            Arrays that the kernels fill.
        """
        if start is None:
            none = np.empty((0, 0))
            return cls(none, none, none, np.empty(0), none)
        moments = np.zeros((FIELDS, problem.directions))
        moments[0], moments[1] = start.mean, start.variance
        expected = np.zeros(records)
        expected[: len(start.loss)] = start.loss
        shape = (replicas, problem.directions)
        loss = np.zeros((records, replicas))
        return cls(moments, np.empty(shape), np.zeros(shape), expected, loss)

    @property
    def arrays(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Arrays in the order of the kernels' arguments."""
        return self.moments, self.delta, self.buffer, self.expected, self.loss

    def record(self, row: int, problem: Problem) -> None:
        """Record the twins' losses and their expectation at the current state.

        Parameters
        ----------
        row : int
            Record to fill.
        problem : Problem
            Gives the weight of each direction in the loss.
        """
        if self.delta.size:
            self.expected[row] = evaluate_twin(
                self.moments, problem.weight, self.delta, self.loss[row]
            )

    def begin_optimizer(self) -> None:
        """Set the momentum buffers and their moments to zero."""
        if self.delta.size:
            self.moments[2:8] = 0.0
            self.buffer[...] = 0.0

    def begin_factors(
        self, problem: Problem, algorithm: MultiplicativeLatePhase, phi: FloatArray
    ) -> None:
        """Start a phase of multiplicative late-phase weights.

        Parameters
        ----------
        problem : Problem
            Gives the minimum.
        algorithm : MultiplicativeLatePhase
            Number of members, first factor and spread.
        phi : ndarray, shape (replicas, K, d)
            Factors with which the members start; they displace the mean model by their mean.
        """
        if not self.delta.size:
            return
        self.begin_optimizer()
        mean, variance = self.moments[0], self.moments[1]
        place = problem.minimum + mean
        self.delta += (place + self.delta) * (phi.mean(axis=1) / algorithm.factor - 1.0)
        offsets = algorithm.spread * (place**2 + variance)
        variance += offsets / algorithm.members
        self.moments[5] = (place / algorithm.factor) ** 2
        self.moments[6] = algorithm.factor**2
        self.moments[7] = offsets * (1.0 - 1.0 / algorithm.members)


def adjust(
    samples: FloatArray, control: FloatArray, expected: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Adjust the mean of `samples` by regression on a control variate of known mean.

    The slope is estimated from the same sample. For jointly normal losses the estimate is unbiased
    and its error, that of a regression line away from its centre, has n - 2 degrees of freedom;
    otherwise both hold up to O(1/n) (Lavenberg & Welch 1981, "A perspective on the use of control
    variables"). Where the control is not finite or does not vary, the plain mean is returned.

    Parameters
    ----------
    samples, control : ndarray, shape (records, n)
        Losses of the method and of its twin for n replicas.
    expected : ndarray, shape (records,)
        Exact expectation of `control`.

    Returns
    -------
    mean, error : ndarray, shape (records,)
        Adjusted mean and its standard error.
    """
    n = samples.shape[1]
    away = control.mean(axis=1) - expected
    z = control - control.mean(axis=1, keepdims=True)
    middle = samples.mean(axis=1)
    y = samples - middle[:, None]
    square = np.einsum("ri,ri->r", z, z)
    used = np.isfinite(square) & (square > 0.0)
    z, away, square = np.where(used[:, None], z, 0.0), away * used, np.where(used, square, 1.0)
    away[~used] = 0.0
    slope = np.einsum("ri,ri->r", z, y) / square
    left = y - slope[:, None] * z
    variance = np.einsum("ri,ri->r", left, left) / (n - 1 - used)
    return middle - slope * away, np.sqrt(variance * (1.0 / n + away**2 / square))

"""Control variates: a linear twin of a method that is not linear, driven by the same noise.

The twin of one direction is a mean that nothing random enters, and a deviation that is linear in
the noise the method draws:

    b' = momentum b + pull d + push e,      d' = d - step b',      loss = sum weight (mean + d)^2

with coefficients that are numbers by step and direction. So its expected loss is known exactly,
whatever they are, and the regression of the method's loss on the twin's takes away the scatter that
both share. The better the coefficients, the more that is:

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
from nqm.solvers import _kernels
from nqm.solvers.moments import solve


def peak(algorithm: Sampled) -> float:
    """Twice the density at 0 of the noise, of variance 1: the slope of the mean sign at 0."""
    dof = algorithm.tail
    if math.isinf(dof):
        return math.sqrt(2.0 / math.pi)
    log_ratio = math.lgamma(0.5 * (dof + 1.0)) - math.lgamma(0.5 * dof)
    return 2.0 * math.exp(log_ratio) / math.sqrt(math.pi * (dof - 2.0))


@dataclass(frozen=True)
class Start:
    """What the twin has exactly before the first phase that is not linear.

    Attributes
    ----------
    index : int
        That phase.
    mean, variance : ndarray, shape (d,)
        Of the weights it starts from.
    loss : ndarray, shape (records,)
        Expected loss at the records before it.
    """

    index: int
    mean: FloatArray
    variance: FloatArray
    loss: FloatArray

    @classmethod
    def of(cls, problem: Problem, program: Program, wanted: list[int]) -> Self:
        """Exact moments of the linear phases that a program begins with.

        Raises
        ------
        NQMError
            Where there is nothing to control, or a phase has no twin.
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
    """State of one block's twins, as the kernels advance it; empty arrays for none.

    Attributes
    ----------
    moments : ndarray, shape (`_kernels.FIELDS`, d)
        What is deterministic: `field` there.
    delta, buffer : ndarray, shape (replicas, d)
    expected : ndarray, shape (records,)
    loss : ndarray, shape (records, replicas)
    """

    moments: FloatArray
    delta: FloatArray
    buffer: FloatArray
    expected: FloatArray
    loss: FloatArray

    @classmethod
    def of(cls, problem: Problem, start: Start | None, records: int, replicas: int) -> Self:
        """Twins before the first phase, where they are what `start` says; none without it."""
        if start is None:
            none = np.empty((0, 0))
            return cls(none, none, none, np.empty(0), none)
        moments = np.zeros((_kernels.FIELDS, problem.directions))
        moments[0], moments[1] = start.mean, start.variance
        expected = np.zeros(records)
        expected[: len(start.loss)] = start.loss
        shape = (replicas, problem.directions)
        loss = np.zeros((records, replicas))
        return cls(moments, np.empty(shape), np.zeros(shape), expected, loss)

    @property
    def arrays(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """What the kernels take."""
        return self.moments, self.delta, self.buffer, self.expected, self.loss

    def record(self, row: int, problem: Problem) -> None:
        """Note the twin's loss before a step."""
        if self.delta.size:
            self.expected[row] = _kernels.evaluate_twin(
                self.moments, problem.weight, self.delta, self.loss[row]
            )

    def begin_optimizer(self) -> None:
        """Buffers start anew, at zero."""
        if self.delta.size:
            self.moments[2:8] = 0.0
            self.buffer[...] = 0.0

    def begin_factors(
        self, problem: Problem, algorithm: MultiplicativeLatePhase, phi: FloatArray
    ) -> None:
        """Members are spawned with factors phi (replicas, K, d) at w + its relative offsets."""
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
    """Mean of `samples` given that of `control`, by least squares, and its standard error.

    The slope comes from the sample itself. For jointly normal losses the estimate is unbiased and
    its error, that of a regression line away from its centre, goes with n - 2 degrees of freedom;
    otherwise both hold up to O(1/n) (Lavenberg & Welch 1981, "A perspective on the use of control
    variables"). Where the control is not finite or does not vary, it is the plain mean.

    Parameters
    ----------
    samples, control : ndarray, shape (records, n)
    expected : ndarray, shape (records,)

    Returns
    -------
    mean, error : ndarray, shape (records,)
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

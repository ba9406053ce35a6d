"""Results of the solvers: losses at recorded steps, their status and their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nqm.algorithms.base import Around
from nqm.algorithms.members import LatePhase
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.rounding import Rounded
from nqm.algorithms.sampled import Sampled, SampledSGD
from nqm.errors import NQMError, check_number
from nqm.problems.quadratic import FloatArray, Problem, Quadratic
from nqm.words import html_list, short_repr

if TYPE_CHECKING:
    from nqm.distribution import LossDistribution
    from nqm.program import Program


class Status(StrEnum):
    """Outcome of a run; divergence is a status, not an exception."""

    FINISHED = "finished"
    REACHED = "reached"
    NOT_REACHED = "not_reached"
    DIVERGED = "diverged"


class Kind(StrEnum):
    """How a loss was computed: exact moments, Monte Carlo, or a stated approximation."""

    EXACT = "exact"
    SAMPLE = "sample"
    FIRST_ORDER = "first_order"
    LONG_RUN = "long_run"
    CLOSURE = "closure"


#: A finite loss counts as diverged if it exceeds the bound of a stable run by this factor.
RUNAWAY = 1e12
#: Largest estimated relative error at which a first-order loss counts as within its range.
WITHIN_RANGE = 0.05


def runaway(problem: Problem, program: Program) -> float:
    """Compute the loss above which a run counts as diverged even if it is finite.

    It is `RUNAWAY` times a bound of a stable run: the loss of the start, of the origin (to which
    weight decay pulls), of the members' spread, and of the noise of all steps added up, at the
    highest rate of plain SGD, 2 / h of the largest curvature h.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    program : Program
        Phases that are run.

    Returns
    -------
    float
        Infinite for methods whose steps are bounded for any gradient: they do not diverge, and
        their loss has the scale of their rate.
    """
    top = float(problem.curvature.max())
    if top == 0.0 or any(_bounded(phase.algorithm) for phase in program.phases):
        return math.inf
    with np.errstate(over="ignore"):
        square = problem.initial_mean**2 + problem.initial_variance
        for phase in program.phases:
            own = _own_noise(phase.algorithm)
            kick = (2.0 / top) ** 2 * problem.noise_variance / phase.least_batch_size + own
            square = square + phase.steps * kick + own + (1.0 + own) * problem.minimum**2
        limit = RUNAWAY * float(problem.weight @ square)
    return limit if limit > 0.0 else math.inf


def _bounded(algorithm: object) -> bool:
    """Whether a step is bounded for any gradient: signs, Adam, clipping."""
    if not isinstance(algorithm, Sampled):
        return False
    return not isinstance(algorithm, SampledSGD) or algorithm.threshold is not None


def _own_noise(algorithm: object) -> float:
    """Variance that a method adds itself: by rounding, or by the initial spread of members."""
    if isinstance(algorithm, Rounded | Sampled):
        return algorithm.pitch**2
    if isinstance(algorithm, LatePhase | MultiplicativeLatePhase):
        return algorithm.spread
    return _own_noise(algorithm.inner) if isinstance(algorithm, Around) else 0.0


#: Smallest distance of a quantile's level from 0 and from 1.
TAIL = 1e-12


def check_level(where: str, level: object) -> None:
    """Check the level of a quantile.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    level : object
        Must be a number from 1e-12 to 1 - 1e-12.

    Raises
    ------
    NQMError
        If it is not.
    """
    check_number(where, level, low=TAIL, high=1.0 - TAIL)


def check_sampled(problem: Quadratic, levels: Sequence[float], replicas: int) -> None:
    """Check that Monte Carlo can estimate quantiles of the loss.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Must have multiplicity 1 in every direction.
    levels : sequence of float
        Levels of the quantiles, in (0, 1).
    replicas : int
        Independent runs; at least 1 / min(level, 1 - level) are needed.

    Raises
    ------
    NQMError
        If a direction stands for several, or the replicas are too few for a level.
    """
    problem.check_distribution("quantiles")
    if np.any(problem.multiplicity != 1.0):
        raise NQMError(
            "quantiles by Monte Carlo need multiplicity 1: a direction that stands for several is "
            "drawn once and counted so many times; use problem.expanded(), or exact quantiles"
        )
    for level in levels:
        if min(level, 1.0 - level) * replicas < 1.0 - 1e-9:
            raise NQMError(
                f"quantiles: level {level:g} needs at least {1.0 / min(level, 1.0 - level):.3g} "
                f"replicas; got {replicas}"
            )


@dataclass(frozen=True)
class Trajectory:
    """Expected loss at recorded steps. Arrays have shape (records,) unless stated.

    Attributes
    ----------
    problem : Problem
        The problem solved.
    kind : Kind
        Exact moments, Monte Carlo, or a stated approximation.
    steps, examples : ndarray
        Steps and training examples since the start of the program.
    loss : ndarray
        Expected loss of the evaluated weights (the mean model), without the irreducible constant.
    bias, variance : ndarray
        Loss without gradient noise, and loss due to gradient noise alone (start at the minimum);
        they add up to `loss`. NaN from Monte Carlo.
    member_loss : ndarray
        Expected loss of the average member; equal to `loss` for a single chain.
    stated_sd : ndarray or None
        `loss_sd` if it is known at once; None if it needs the covariances `pairs`.
    stderr, member_stderr : ndarray
        Monte Carlo standard errors; 0 for analytic results.
    weight_mean, weight_variance : ndarray, shape (records, d)
        First two moments of the evaluated weights by direction (analytic results only).
    samples : ndarray, shape (records, replicas)
        Loss of every replica (Monte Carlo only).
    unstable : ndarray of bool, optional
        Whether the transition at the record amplifies some direction and the loss has grown.
    runaway : float
        Loss above which the run counts as diverged even if it is finite (`runaway`).
    controlled : bool
        Whether a control variate has adjusted the means (`nqm.sample`).
    pairs : callable, optional
        Returns an iterator of covariances between directions, (d, d) with a zero diagonal, one per
        record; called only when the distribution of the loss is needed.
    range_errors : callable, optional
        Returns the estimated relative error of a first-order result at each record; called only
        when `in_range` is needed.
    """

    problem: Problem
    kind: Kind
    steps: NDArray[np.int64]
    examples: FloatArray
    loss: FloatArray
    bias: FloatArray
    variance: FloatArray
    member_loss: FloatArray
    stated_sd: FloatArray | None = field(repr=False)
    stderr: FloatArray
    member_stderr: FloatArray
    weight_mean: FloatArray | None = field(default=None, repr=False)
    weight_variance: FloatArray | None = field(default=None, repr=False)
    samples: FloatArray | None = field(default=None, repr=False)
    unstable: NDArray[np.bool_] | None = field(default=None, repr=False)
    runaway: float = math.inf
    controlled: bool = False
    pairs: Callable[[], Iterator[FloatArray]] | None = field(default=None, repr=False)
    range_errors: Callable[[], FloatArray] | None = field(default=None, repr=False)

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        """Table that a notebook shows."""
        title = f"{type(self).__name__} ({self.kind})"
        if not len(self.steps):
            return html_list(title, {"records": 0})
        drawn = self.samples is not None

        def last(value: FloatArray, error: FloatArray) -> str:
            return f"{value[-1]:.6g}" + (f" ± {error[-1]:.2g} (standard error)" if drawn else "")

        entries = {
            "problem": f"{self.problem.directions} directions",
            "records": f"{len(self.steps)}, steps {self.steps[0]} to {self.steps[-1]}",
            "examples": self.examples[-1],
            "replicas": None if self.samples is None else self.samples.shape[1],
            "first loss": self.loss[0],
            "last loss": last(self.loss, self.stderr),
            "average member's": None
            if np.array_equal(self.member_loss, self.loss, equal_nan=True)
            else last(self.member_loss, self.member_stderr),
            "bias and variance": None if drawn else f"{self.bias[-1]:.6g}, {self.variance[-1]:.6g}",
            "status": self.status[-1],
        }
        return html_list(title, entries)

    @classmethod
    def of_samples(
        cls,
        problem: Problem,
        program: Program,
        steps: Sequence[int],
        loss: FloatArray,
        member_loss: FloatArray,
    ) -> Self:
        """Build a Monte Carlo result from the losses of all replicas.

        Parameters
        ----------
        problem : Problem
            The problem sampled.
        program : Program
            Phases that were run.
        steps : sequence of int
            Recorded steps.
        loss, member_loss : ndarray, shape (records, replicas)
            Loss of the mean model and of the average member.

        Returns
        -------
        Trajectory
            Means with standard errors, of kind SAMPLE.
        """
        unknown = np.full(len(steps), np.nan)
        # A direction that stands for several is drawn once, so the drawn losses scatter too much.
        counted = problem.expected_losses_only or bool(np.any(problem.multiplicity != 1.0))
        root = np.sqrt(loss.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            sd, member_sd = (part.std(axis=1, ddof=1) for part in (loss, member_loss))
            return cls(
                problem=problem,
                kind=Kind.SAMPLE,
                steps=np.array(steps, dtype=np.int64),
                examples=program.examples(steps),
                loss=loss.mean(axis=1),
                bias=unknown,
                variance=unknown,
                member_loss=member_loss.mean(axis=1),
                stated_sd=np.where(counted, np.nan, sd),
                stderr=sd / root,
                member_stderr=member_sd / root,
                samples=loss,
                runaway=runaway(problem, program),
            )

    @property
    def status(self) -> list[Status]:
        """Status at each recorded step: FINISHED or DIVERGED."""
        lost = ~np.isfinite(self.loss) | (self.loss > self.runaway)
        if self.unstable is not None:
            lost |= self.unstable
        return [Status.DIVERGED if bad else Status.FINISHED for bad in lost]

    @cached_property
    def in_range(self) -> NDArray[np.bool_]:
        """Whether a first-order loss is estimated to be within 5 % of the true one, by record.

        The estimate (`nqm.solvers.first_order_range`) counts the mean model's and the average
        member's loss. True for results of every other kind; of these, those of a moment closure
        are approximations without an estimate of their error.
        """
        if self.range_errors is None:
            return np.ones(len(self.steps), dtype=bool)
        return np.asarray(self.range_errors() <= WITHIN_RANGE)

    def table(self) -> pd.DataFrame:
        """Tabulate the result.

        Returns
        -------
        DataFrame
            One row per recorded step with columns step, examples, loss, member_loss, bias,
            variance, loss_sd, stderr, member_stderr, status, kind, in_range.
        """
        return pd.DataFrame(
            {
                "step": self.steps,
                "examples": self.examples,
                "loss": self.loss,
                "member_loss": self.member_loss,
                "bias": self.bias,
                "variance": self.variance,
                "loss_sd": self.loss_sd,
                "stderr": self.stderr,
                "member_stderr": self.member_stderr,
                "status": [str(status) for status in self.status],
                "kind": str(self.kind),
                "in_range": self.in_range,
            }
        )

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Compute a confidence interval of the expected loss by Student's t (Monte Carlo only).

        Parameters
        ----------
        level : float
            Coverage, in (0, 1].

        Returns
        -------
        low, high : ndarray, shape (records,)
            Ends of the interval.

        Raises
        ------
        NQMError
            For an analytic result, or a level out of range.
        """
        check_number("interval.level", level, low=0.0, high=1.0, closed_low=False)
        if self.samples is None:
            raise NQMError("interval is for Monte Carlo results; this one is analytic and exact")
        from scipy import stats  # slow to load

        degrees = self.samples.shape[1] - (2 if self.controlled else 1)
        width = stats.t.ppf(0.5 + level / 2, degrees) * self.stderr
        return self.loss - width, self.loss + width

    @property
    def speed_up(self) -> FloatArray:
        """Factor by which plain means would need more replicas for the same standard error.

        Monte Carlo only; 1 without a control variate, infinite where it removes the whole error.

        Raises
        ------
        NQMError
            For an analytic result.
        """
        if self.samples is None:
            raise NQMError("speed_up is for Monte Carlo results; this one is analytic and exact")
        with np.errstate(divide="ignore", invalid="ignore"):
            sd = self.samples.std(axis=1, ddof=1)
            return np.asarray((sd / self.stderr) ** 2 / self.samples.shape[1])

    def quantiles(self, levels: tuple[float, ...] = (0.05, 0.5, 0.95)) -> FloatArray:
        """Compute quantiles of the loss from run to run.

        Analytic results use the exact distribution of the loss for Gaussian weights
        (`nqm.distribution.LossDistribution`); Monte Carlo results use the sorted replicas.

        Parameters
        ----------
        levels : tuple of float
            Probabilities, from 1e-12 to 1 - 1e-12.

        Returns
        -------
        ndarray, shape (records, levels)
            Losses; an analytic result has NaN where the run has diverged.

        Raises
        ------
        NQMError
            If a level is out of range or needs more replicas, for Monte Carlo of directions that
            stand for several, and in the cases of `distributions`.
        """
        for level in levels:
            check_level("quantiles: level", level)
        if self.samples is not None:
            check_sampled(self.problem, levels, self.samples.shape[1])
            return np.quantile(self.samples, levels, axis=1).T
        rows = zip(self.distributions(), self.status, strict=True)
        return np.array(
            [
                [np.nan] * len(levels)
                if law is None or status is Status.DIVERGED
                else [law.quantile(level) for level in levels]
                for law, status in rows
            ]
        )

    def distributions(self) -> Iterator[LossDistribution | None]:
        """Compute the distribution of the loss at each record, lazily.

        Yields
        ------
        LossDistribution or None
            Distribution from run to run; None where the weights are not finite.

        Raises
        ------
        NQMError
            If the result has no Gaussian weights, if the problem has `expected_losses_only`, or if
            directions are correlated and too many for their covariance to be computed
            (`nqm.solvers.correlated`).
        """
        from nqm.distribution import LossDistribution

        for mean, variance in self.weight_moments():
            finite = np.isfinite(mean).all() and np.isfinite(variance).all()
            yield LossDistribution(self.problem, mean, variance) if finite else None

    def weight_moments(self) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Compute the moments of the evaluated weights at each record, lazily.

        Yields
        ------
        mean : ndarray, shape (d,)
            Mean of the distance from the minimum.
        covariance : ndarray, shape (d,) or (d, d)
            Variances, or for correlated directions the whole covariance.

        Raises
        ------
        NQMError
            If the result has no Gaussian weights, or the covariance would take too much work.
        """
        if self.weight_mean is None or self.weight_variance is None:
            raise NQMError(f"quantiles need Gaussian weights; a {self.kind} result has none")
        moments = zip(self.weight_mean, self.weight_variance, strict=True)
        if self.pairs is None:
            yield from moments
            return
        for (mean, variance), pairs in zip(moments, self.pairs(), strict=True):
            yield mean, pairs + np.diag(variance)

    @cached_property
    def loss_sd(self) -> FloatArray:
        """Standard deviation of the loss from run to run, shape (records,).

        For correlated directions it is computed on first use, and NaN if that would take too much
        memory or time (`nqm.solvers.correlated`). For Monte Carlo it is NaN if a direction stands
        for several: it is drawn once, so the drawn losses vary more than the loss does. It is NaN
        for a problem with `expected_losses_only`.
        """
        if self.problem.expected_losses_only:
            return np.full(len(self.steps), np.nan)
        if self.stated_sd is not None:
            return self.stated_sd
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                square = [self._variance(*moments) for moments in self.weight_moments()]
            except NQMError:
                return np.full(len(self.steps), np.nan)
            return np.sqrt(square)

    def _variance(self, mean: FloatArray, covariance: FloatArray) -> float:
        """Variance of the loss, for a covariance (d, d)."""
        pushed, spread = self.problem.curvature * mean, self.problem.curvature[:, None] * covariance
        return float(pushed @ covariance @ pushed + 0.5 * np.sum(spread * spread.T))

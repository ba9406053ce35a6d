"""The joint law of losses: of two programs in one run, and of one run at several times.

The weights at the records are jointly Gaussian (`nqm.solvers.joint`), and losses are quadratic
forms of them. Means, covariances and the probability that one of two losses is the lower one are
exact. Probabilities of whole runs (lower at every record, least loss of a run, first record below
a target) are shares of exact draws of the records, with binomial intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.limits import check_memory
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program
from nqm.solvers.joint import Chain, chain, linear_only
from nqm.versus import QuadraticDifference, Versus, compare_difference
from nqm.words import short_html, short_repr

#: Whether programs see one stream of minibatches, or each its own.
STREAMS = ("own", "common")
#: Numbers of a block of draws.
BLOCK = 2_000_000


@dataclass(frozen=True)
class Share:
    """A probability as the share of drawn runs.

    Attributes
    ----------
    probability : float
        The share.
    low, high : float
        95 % interval of the probability (Clopper & Pearson 1934).
    """

    probability: float
    low: float
    high: float

    @classmethod
    def of(cls, events: NDArray[np.bool_]) -> Share:
        """Count events.

        Parameters
        ----------
        events : ndarray of bool, shape (replicas,)

        Returns
        -------
        Share
        """
        from scipy.stats import beta  # slow to load

        n, k = events.size, int(np.count_nonzero(events))
        low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
        high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
        return cls(k / n, low, high)


@dataclass(frozen=True)
class LossDraws:
    """Losses of whole runs at the records, drawn from their joint law.

    Attributes
    ----------
    steps : ndarray of int, shape (records,)
    loss : ndarray, shape (programs, records, replicas)
        Runs of equal number belong together: with common streams they saw the same minibatches.
    """

    steps: NDArray[np.int64]
    loss: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    def always_below(self, first: int = 0, second: int = 1) -> Share:
        """Estimate the probability that one program's loss is the lower one at every record.

        Records at which the two losses are equal for sure, such as a common start, do not count.

        Parameters
        ----------
        first, second : int
            Numbers of the programs.

        Returns
        -------
        Share
            P(first < second at every record).
        """
        a, b = self._of(first), self._of(second)
        differ = (a != b).any(axis=1)
        return Share.of((a < b)[differ].all(axis=0) & differ.any())

    def best_below(self, loss: float, program: int = 0) -> Share:
        """Estimate the probability that the best recorded checkpoint of a run is below a loss.

        Parameters
        ----------
        loss : float
        program : int
            Number of the program.

        Returns
        -------
        Share
            P(least loss over the records < loss).
        """
        check_number("best_below.loss", loss)
        return Share.of(self._of(program).min(axis=0) < loss)

    def best_quantiles(
        self, levels: Sequence[float] = (0.05, 0.5, 0.95), program: int = 0
    ) -> FloatArray:
        """Estimate quantiles of the loss of the best recorded checkpoint of a run.

        Parameters
        ----------
        levels : sequence of float
            Probabilities, in [0, 1].
        program : int
            Number of the program.

        Returns
        -------
        ndarray, shape (levels,)
            Losses.
        """
        for level in levels:
            check_number("best_quantiles.levels", level, low=0.0, high=1.0)
        return np.asarray(np.quantile(self._of(program).min(axis=0), levels))

    def time_to_target(self, target: float, program: int = 0) -> pd.DataFrame:
        """Estimate the law of the first recorded step at which a run's loss is at a target.

        A loss that is there between two records only is not seen.

        Parameters
        ----------
        target : float
            Loss of the run, not an expected one.
        program : int
            Number of the program.

        Returns
        -------
        DataFrame
            One row for each record with columns step, reached, reached_low, reached_high: the
            probability that the target was reached by then, and its 95 % interval.
        """
        check_number("time_to_target.target", target, low=0.0, closed_low=False)
        reached = np.logical_or.accumulate(self._of(program) <= target, axis=0)
        shares = [Share.of(row) for row in reached]
        return pd.DataFrame(
            {
                "step": self.steps,
                "reached": [one.probability for one in shares],
                "reached_low": [one.low for one in shares],
                "reached_high": [one.high for one in shares],
            }
        )

    def _of(self, program: int) -> FloatArray:
        return np.asarray(self.loss[_numbered("program", program, len(self.loss))])


@dataclass(frozen=True)
class JointLosses:
    """Losses of programs at recorded steps with their joint law.

    Attributes
    ----------
    problem : Problem
    steps : ndarray of int, shape (records,)
    streams : str
        Whether the programs see one stream of minibatches ("common"), or each its own.
    loss : ndarray, shape (programs, records)
        Expected losses.
    laws, moments : tuple
        Joint Gaussian laws of the weights, of all programs together or of each, on which the
        methods rest.
    """

    problem: Problem
    steps: NDArray[np.int64]
    streams: str
    loss: FloatArray
    laws: tuple[Chain, ...] = field(repr=False)
    moments: tuple[_Moments, ...] = field(repr=False)

    __repr__ = short_repr
    _repr_html_ = short_html

    @cached_property
    def covariance(self) -> FloatArray:
        """Covariances of losses, shape (programs, records, programs, records); exact."""
        programs, records = self.loss.shape
        check_memory("joint_losses: records", records, 2.0 * float(programs * records) ** 2)
        weight, count = self.problem.weight, self.problem.multiplicity
        half = np.divide(weight, count, out=np.zeros_like(weight), where=count > 0)
        out = np.zeros((programs, records, programs, records))
        for chain_, place in zip(self.moments, self._programs, strict=True):
            for row in range(records):
                x = chain_.mean[:, row]
                for other, cross in chain_.onwards(row):
                    # Cov of h/2 x^2 and h/2 y^2 is (h/2)^2 (2 c^2 + 4 m_x m_y c).
                    y = chain_.mean[:, other]
                    both = 2.0 * cross + 4.0 * x[:, None] * y[None, :]
                    part = np.einsum("d,pqd->pq", weight * half, both * cross)
                    out[np.ix_(place, [row], place, [other])] = part[:, None, :, None]
                    out[np.ix_(place, [other], place, [row])] = part.T[:, None, :, None]
        return out

    @property
    def loss_sd(self) -> FloatArray:
        """Standard deviations of the losses from run to run, shape (programs, records)."""
        weight, count = self.problem.weight, self.problem.multiplicity
        half = np.divide(weight, count, out=np.zeros_like(weight), where=count > 0)
        mean = np.concatenate([one.mean for one in self.moments])
        variance = np.concatenate([one.variance for one in self.moments])
        square = (2.0 * variance + 4.0 * mean**2) * variance
        return np.asarray(np.sqrt(square @ (weight * half)))

    @property
    def correlation(self) -> FloatArray:
        """Correlations of losses, as `covariance`; NaN where a loss does not vary."""
        sd = self.loss_sd
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.covariance / sd[:, :, None, None] / sd)

    def win_probability(
        self,
        first: tuple[int, int] = (0, -1),
        second: tuple[int, int] = (1, -1),
        *,
        runs: int = 1,
    ) -> float:
        """Compute the probability that one of two losses is the lower one (exact).

        Parameters
        ----------
        first, second : (int, int)
            Number of the program, and of the record; -1 is the last one.
        runs : int
            Independent pairs of runs whose mean losses are compared, >= 1.

        Returns
        -------
        float
            P(first < second), and half of the probability that they are equal; accurate as
            `nqm.win_probability`.
        """
        check_integer("win_probability.runs", runs, 1)
        return self._difference(first, second).negative(runs)

    def compare(
        self, first: int = 0, second: int = 1, *, level: float = 0.05, power: float = 0.9
    ) -> Versus:
        """Compare two programs at the last record, as `nqm.compare_runs` does.

        With common streams runs come in pairs, and `runs` is the number of pairs with which a
        paired t test tells the means apart.

        Parameters
        ----------
        first, second : int
            Numbers of the programs.
        level, power : float
            As in `nqm.compare_runs`.

        Returns
        -------
        Versus
        """
        difference = self._difference((first, -1), (second, -1))
        paired = self.streams == "common"
        a, b = (float(self.loss_sd[k, -1]) for k in (first, second))
        return compare_difference(difference, None if paired else (a, b), level, power)

    def draw(self, replicas: int = 10_000, *, seed: int = 0) -> LossDraws:
        """Draw whole runs at the records; exact draws, whose cost is independent of the steps.

        Parameters
        ----------
        replicas : int
            Runs of each program, >= 1.
        seed : int
            Seed of all draws, >= 0.

        Returns
        -------
        LossDraws

        Raises
        ------
        NQMError
            If a direction stands for several, or they do not fit into memory.
        """
        check_integer("draw.replicas", replicas, 1)
        check_integer("draw.seed", seed, 0)
        if np.any(self.problem.multiplicity != 1.0):
            raise NQMError(
                "draw needs multiplicity 1: a direction that stands for several would be drawn "
                "once; use problem.expanded()"
            )
        programs, records = self.loss.shape
        check_memory("draw.replicas", replicas, 3.0 * programs * records * replicas)
        loss = np.empty((programs, records, replicas))
        generators = np.random.SeedSequence(seed).spawn(len(self.laws))
        for one, place, source in zip(self.laws, self._programs, generators, strict=True):
            rng = np.random.Generator(np.random.SFC64(source))
            size = max(link.matrix.shape[1] for link in one.links)
            block = max(1, BLOCK // (self.problem.directions * size))
            for begin in range(0, replicas, block):
                end = min(begin + block, replicas)
                for row, weights in one.draw(rng, end - begin):
                    loss[place, row, begin:end] = np.einsum(
                        "d,pdr->pr", self.problem.weight, weights**2
                    )
        return LossDraws(self.steps, loss)

    @property
    def _programs(self) -> list[list[int]]:
        """Programs of each chain."""
        everyone = list(range(len(self.loss)))
        return [everyone] if self.streams == "common" else [[p] for p in everyone]

    def _difference(self, first: tuple[int, int], second: tuple[int, int]) -> QuadraticDifference:
        programs, records = self.loss.shape
        (p, s), (q, t) = (
            (_numbered("program", k, programs), _numbered("record", row, records))
            for k, row in (first, second)
        )
        common = self.streams == "common" or p == q
        a, b = (self.moments[0 if self.streams == "common" else k] for k in (p, q))
        i, j = (p, q) if self.streams == "common" else (0, 0)
        covariance = np.zeros((self.problem.directions, 2, 2))
        covariance[:, 0, 0], covariance[:, 1, 1] = a.variance[i, s], b.variance[j, t]
        if common:
            (u, row), (v, later) = ((i, s), (j, t)) if s <= t else ((j, t), (i, s))
            cross = next(c for other, c in a.onwards(row) if other == later)
            covariance[:, 0, 1] = covariance[:, 1, 0] = cross[u, v]
        mean = np.stack([a.mean[i, s], b.mean[j, t]], axis=1)
        if common and (i, s) == (j, t):
            covariance[...] = 0.0  # a loss against itself
            mean[...] = 0.0
        return QuadraticDifference.of(self.problem, mean, covariance)


class _Moments:
    """Means and variances of the weights of one chain at its records."""

    def __init__(self, links: Chain):
        self.links = links.links
        self.states = links.states()
        recorded = [k for k, link in enumerate(self.links) if link.row is not None]
        self.at = recorded
        self.mean = np.stack(
            [np.einsum("pn,dn->pd", self.links[k].readouts, self.states[k][0]) for k in recorded],
            axis=1,
        )
        self.variance = np.stack(
            [
                np.einsum(
                    "pm,dmn,pn->pd",
                    self.links[k].readouts,
                    self.states[k][1],
                    self.links[k].readouts,
                )
                for k in recorded
            ],
            axis=1,
        )

    def onwards(self, row: int) -> Iterator[tuple[int, FloatArray]]:
        """Covariances (programs, programs, d) of the weights at a record with those from it on."""
        at = self.at[row]
        state: FloatArray = self.states[at][1] @ self.links[at].readouts.T  # (d, n, programs)
        for k in range(at, len(self.links)):
            link = self.links[k]
            if k > at:
                state = link.matrix @ state
            if link.row is not None:
                yield link.row, np.einsum("qn,dnp->pqd", link.readouts, state)


def joint_losses(
    problem: Problem,
    programs: Program | Phase | Sequence[Program | Phase | Sequence[Phase]],
    at: Sequence[int] | None = None,
    *,
    streams: str = "common",
) -> JointLosses:
    """Compute the joint law of the losses of programs at recorded steps.

    Parameters
    ----------
    problem : Problem
        With independent directions.
    programs : list of Program, or one Program or Phase
        Linear methods. A program that has ended keeps its weights.
    at : sequence of int, optional
        Steps to record, up to the last one of the longest program; about 100 by default.
    streams : {"common", "own"}
        "common": all start from the same weights and see the same minibatch in every step; of two
        batch sizes the smaller minibatch is part of the larger one, and K members' minibatches are
        one of K times the size. "own": independent runs, with starts of their own.

    Returns
    -------
    JointLosses

    Raises
    ------
    NQMError
        If a method is not linear, directions are correlated, a program diverges to infinity, the
        methods' minibatches cannot be common, or it would take too much memory or time.
    """
    problem = additive_only("joint_losses", problem)
    problem.check_distribution("joint_losses")
    if problem.correlated:
        raise NQMError(
            "joint_losses: directions of this problem are correlated; compare its ends by "
            "nqm.compare_runs, or runs by nqm.sample"
        )
    if streams not in STREAMS:
        raise NQMError(f"joint_losses.streams must be 'common' or 'own'; got {shown(streams)}")
    one = isinstance(programs, Program | Phase)
    given = [programs] if one else programs
    if not isinstance(given, list | tuple) or not given:
        raise NQMError(f"joint_losses needs a list of programs; got {shown(programs)}")
    named = [as_program(f"joint_losses.programs[{k}]", each) for k, each in enumerate(given)]
    linear_only("joint_losses", named)
    wanted = max(named, key=lambda program: program.steps).recorded(at)
    groups = [named] if streams == "common" else [[program] for program in named]
    with np.errstate(over="ignore", invalid="ignore"):
        laws = tuple(chain(problem, group, wanted) for group in groups)
        moments = tuple(_Moments(one) for one in laws)
        mean = np.concatenate([one.mean for one in moments])
        second = np.concatenate([one.variance for one in moments]) + mean**2
        loss = second @ problem.weight
    if not np.isfinite(loss).all():
        raise NQMError("joint_losses: a program diverges; lower its rates")
    return JointLosses(problem, np.array(wanted, dtype=np.int64), streams, loss, laws, moments)


def _numbered(where: str, number: int, count: int) -> int:
    """A number from -count to count - 1, as one from 0."""
    check_integer(where, number, -count)
    if number >= count:
        raise NQMError(f"{where} must be below {count}, their number; got {number}")
    return number % count

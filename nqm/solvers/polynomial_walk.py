"""Walk through steps whose matrices are polynomials in rates and curvature.

The kernel `walk_polynomial` forms the matrices itself, in many directions at once, so that a step
whose rate never repeats costs as little as one that does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Mode
from nqm.problems.quadratic import FloatArray, Problem
from nqm.solvers._kernels.polynomial_steps import WIDE, walk_polynomial
from nqm.step_polynomial import StepPolynomial, step_polynomial, step_table
from nqm.words import short_html, short_repr

#: Most different factors on the rates of a phase: directions of one factor are walked together.
GROUPS = 4


@dataclass(frozen=True)
class Steps:
    """Steps of one mode, in order.

    Attributes
    ----------
    settings : ndarray, shape (T, rates + 1)
        Rates, then the batch size.
    times : ndarray of int, shape (T,)
        Time of each step, reduced modulo the period.
    readout : ndarray, shape (T, n)
        Evaluated weights after each step as a linear form of the state, where they are asked for.
    record : ndarray of int, shape (T,)
        Number of the record after each step, or -1.
    """

    settings: FloatArray
    times: NDArray[np.int64]
    readout: FloatArray
    record: NDArray[np.int64]

    __repr__ = short_repr
    _repr_html_ = short_html


@dataclass(frozen=True)
class State:
    """Moments of one mode, changed in place.

    Attributes
    ----------
    mean : ndarray, shape (d, n)
        Mean of the state.
    started, noisy : ndarray, shape (d, n, n)
        Covariance due to the start and due to gradient noise.
    """

    mean: FloatArray
    started: FloatArray
    noisy: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html


@dataclass(frozen=True)
class Seen:
    """Evaluated weights of one mode at some records.

    Attributes
    ----------
    sums : ndarray, shape (records, 4)
        Loss of the mean, of the variance due to the start and of that due to noise; and the
        variance of the loss.
    mean, variance : ndarray, shape (records, d) or (0, d)
        Moments by direction, where they are asked for.
    """

    sums: FloatArray
    mean: FloatArray
    variance: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def of(cls, problem: Problem, mean: FloatArray, started: FloatArray, noisy: FloatArray) -> Seen:
        """Sum up one record.

        Parameters
        ----------
        problem : Problem
            Gives the loss.
        mean, started, noisy : ndarray, shape (d,)
            Mean, and the variance due to the start and to noise.

        Returns
        -------
        Seen
            With one record.
        """
        variance, square, weight = started + noisy, mean**2, problem.weight
        scatter = square_weight(problem) @ (variance * (0.5 * variance + square))
        sums = np.array([[weight @ square, weight @ started, weight @ noisy, scatter]])
        return cls(sums, mean[None], variance[None])

    @classmethod
    def joined(cls, parts: Sequence[Seen], directions: int) -> Seen:
        """Join records in order.

        Parameters
        ----------
        parts : sequence of Seen
            May be empty.
        directions : int
            d.

        Returns
        -------
        Seen
            All records.
        """
        if len(parts) == 1:
            return parts[0]
        none = np.empty((0, directions))
        return cls(
            np.concatenate([np.empty((0, 4)), *(part.sums for part in parts)]),
            np.concatenate([none, *(part.mean for part in parts)]),
            np.concatenate([none, *(part.variance for part in parts)]),
        )


def square_weight(problem: Problem) -> FloatArray:
    """Twice the variance of the loss per unit of squared variance of the weights, (d,).

    Parameters
    ----------
    problem : Problem
        Gives curvature and multiplicity.

    Returns
    -------
    ndarray, shape (d,)
        n h^2.
    """
    return np.asarray(problem.multiplicity * problem.curvature**2)


def polynomials(
    mode: Mode, times: NDArray[np.int64]
) -> tuple[StepPolynomial, NDArray[np.int64]] | None:
    """Extract the distinct steps of one mode.

    Parameters
    ----------
    mode : Mode
        Mean model or member deviation.
    times : ndarray of int, shape (T,)
        As `TimeDependence.reduced` returns them.

    Returns
    -------
    polynomial : StepPolynomial
        One entry for each distinct time.
    kind : ndarray of int, shape (T,)
        Entry of each step.
        None in place of both if the steps are no such polynomials.
    """
    if times.size == 0 or (times == times[0]).all():
        distinct, kind = times[:1], np.zeros(times.size, dtype=np.int64)
    else:
        distinct, kind = np.unique(times, return_inverse=True)
    polynomial = step_polynomial(mode.algorithm, distinct)
    return None if polynomial is None else (polynomial, kind.reshape(-1))


def groups(
    scales: tuple[FloatArray, ...] | None, directions: int
) -> list[tuple[slice | NDArray[np.int64], FloatArray]] | None:
    """Divide the directions by the factors on their rates.

    Parameters
    ----------
    scales : tuple of ndarray, shape (d,), or None
        Factors on each rate.
    directions : int
        d.

    Returns
    -------
    list of (slice or ndarray of int, ndarray), or None
        Directions and their factors; None if there are more than `GROUPS` different ones.
    """
    if scales is None:
        return [(slice(0, directions), np.ones(2))]
    each = np.stack(scales, axis=1)
    if (each == each[0]).all():
        return [(slice(0, directions), each[0])]
    distinct, which = np.unique(each, axis=0, return_inverse=True)
    if len(distinct) > GROUPS:
        return None
    return [(np.flatnonzero(which.reshape(-1) == i), row) for i, row in enumerate(distinct)]


def walk(
    problem: Problem,
    mode: Mode,
    scales: tuple[FloatArray, ...] | None,
    state: State,
    steps: Steps,
    losses: FloatArray | None = None,
    *,
    moments: bool = True,
) -> Seen | None:
    """Take steps of one mode.

    Parameters
    ----------
    problem : Problem
        Gives curvature, noise variance and weight of each direction.
    mode : Mode
        Mean model or member deviation.
    scales : tuple of ndarray, shape (d,), or None
        Factors on each rate.
    state : State
        Changed in place.
    steps : Steps
        Their settings and records.
    losses : ndarray, shape (T,), optional
        The expected loss after each step is added to it.
    moments : bool
        Whether the moments by direction are asked for, beside the sums.

    Returns
    -------
    Seen or None
        The records; None, with nothing done, if the steps are not polynomials or the directions
        have too many different rates.
    """
    parts = groups(scales, problem.directions)
    found = polynomials(mode, steps.times) if parts is not None else None
    if parts is None or found is None:
        return None
    polynomial, kind = found
    n = len(mode.algorithm.coordinates)
    rates = np.ones((len(steps.settings), 2))
    rates[:, : steps.settings.shape[1] - 1] = steps.settings[:, :-1]
    share = mode.noise_share / steps.settings[:, [-1]]
    count = int(steps.record.max(initial=-1)) + 1
    rows = count if moments else 0
    sums, square = np.zeros((count, 4)), square_weight(problem)
    seen = np.empty((2, rows, problem.directions if len(parts) > 1 else 0))
    added = np.zeros(0) if losses is None else losses
    for chosen, factor in parts:
        table = step_table(polynomial, kind, rates * factor, n)
        laid = _Rows.of(state, chosen)
        here = np.empty((2, rows, len(laid.mean), WIDE))
        walk_polynomial(
            table.matrix,
            table.fixed,
            table.first,
            table.column,
            table.driven,
            table.drive * share,
            table.own,
            _blocks(problem.curvature[chosen, None]),
            _blocks(problem.noise_variance[chosen, None]),
            laid.mean,
            laid.started,
            laid.noisy,
            laid.moving,
            steps.readout,
            steps.record,
            sums,
            here,
            problem.weight[chosen],
            square[chosen],
            added,
        )
        laid.store(state, chosen)
        flat = here.reshape(2, rows, len(laid.mean) * WIDE)[:, :, : laid.size]
        if len(parts) == 1:
            # A few directions are copied out of a block that would hold much more memory.
            seen = flat if 2 * laid.size > WIDE else flat.copy()
        else:
            seen[:, :, chosen] = flat
    return Seen(sums, seen[0], seen[1])


@dataclass(frozen=True)
class _Rows:
    """A state in the kernel's layout: blocks of directions, which run along the last axis."""

    size: int
    mean: FloatArray
    started: FloatArray
    noisy: FloatArray
    moving: NDArray[np.bool_]

    @classmethod
    def of(cls, state: State, chosen: slice | NDArray[np.int64]) -> _Rows:
        mean = state.mean[chosen]
        i, j = _lower(mean.shape[1])
        started, noisy = state.started[chosen][:, i, j], state.noisy[chosen][:, i, j]
        moving = np.array([mean.any(), started.any(), True])
        return cls(len(mean), _blocks(mean), _blocks(started), _blocks(noisy), moving)

    def store(self, state: State, chosen: slice | NDArray[np.int64]) -> None:
        i, j = _lower(self.mean.shape[1])
        state.mean[chosen] = self._unblocked(self.mean)
        for whole, rows in ((state.started, self.started), (state.noisy, self.noisy)):
            packed, square = self._unblocked(rows), whole[chosen]
            square[:, i, j] = square[:, j, i] = packed
            whole[chosen] = square

    def _unblocked(self, rows: FloatArray) -> FloatArray:
        return rows.swapaxes(1, 2).reshape(-1, rows.shape[1])[: self.size]


def _blocks(values: FloatArray) -> FloatArray:
    """Directions (d, k) as blocks (b, k, `WIDE`), filled up with 0."""
    wide = WIDE
    whole = np.zeros((-(-len(values) // wide) * wide, values.shape[1]))
    whole[: len(values)] = values
    return np.ascontiguousarray(whole.reshape(-1, wide, values.shape[1]).swapaxes(1, 2))


@functools.cache
def _lower(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places (i, j <= i) of a packed covariance, in order."""
    return np.tril_indices(n)

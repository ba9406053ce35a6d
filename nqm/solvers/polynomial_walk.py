"""Walk through steps whose matrices are polynomials in rates and curvature.

The kernel `walk_polynomial` forms the matrices itself, in many directions at once, so that a step
whose rate never repeats costs as little as one that does. Programs that differ in their rates alone
are walked together: their directions are put side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Mode
from nqm.problems.quadratic import FloatArray, Problem
from nqm.solvers._kernels.polynomial_steps import (
    HEAD,
    WIDE,
    empty_blocks,
    fill_blocks,
    walk_polynomial,
)
from nqm.step_polynomial import StepPolynomial, step_polynomial, step_table, ties
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class Steps:
    """Steps of one mode of P programs, in order.

    Attributes
    ----------
    settings : ndarray, shape (P, T, rates + 1)
        Rates, then the batch size, which is the same in all programs.
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
    """Moments of one mode in the d directions of each of P programs, changed in place.

    Attributes
    ----------
    mean : ndarray, shape (P d, n)
        Mean of the state.
    started, noisy : ndarray, shape (P d, n, n)
        Covariance due to the start and due to gradient noise.
    root : ndarray, shape (P d, n), or None
        A vector u with `started` = u u', which is carried in place of it, if it is known.
    still : tuple of int
        Coordinates that were 0 when the method started.
    """

    mean: FloatArray
    started: FloatArray
    noisy: FloatArray
    root: FloatArray | None = None
    still: tuple[int, ...] = ()

    __repr__ = short_repr
    _repr_html_ = short_html


@dataclass(frozen=True)
class Seen:
    """Evaluated weights of one mode at some records.

    Attributes
    ----------
    sums : ndarray, shape (records, P, 4)
        Loss of the mean, of the variance due to the start and of that due to noise; and the
        variance of the loss.
    mean, variance : ndarray, shape (records, P d) or (0, P d)
        Moments by direction, where they are asked for.
    """

    sums: FloatArray
    mean: FloatArray
    variance: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def of(
        cls,
        problem: Problem,
        mean: FloatArray,
        started: FloatArray,
        noisy: FloatArray,
        programs: int = 1,
        *,
        moments: bool = True,
    ) -> Seen:
        """Sum up one record.

        Parameters
        ----------
        problem : Problem
            Of d directions for each of P programs.
        mean, started, noisy : ndarray, shape (P d,)
            Mean, and the variance due to the start and to noise.
        programs : int
            P.
        moments : bool
            Whether the moments by direction are asked for.

        Returns
        -------
        Seen
            With one record.
        """
        d, variance, square = problem.directions // programs, started + noisy, mean**2
        weight, scatter = problem.weight[:d], variance * (0.5 * variance + square)
        pairs = (weight, square), (weight, started), (weight, noisy)
        # One by one, as a product of matrices need not round as that of its rows.
        sums = [
            [one @ part[i : i + d] for one, part in (*pairs, (square_weight(problem)[:d], scatter))]
            for i in range(0, mean.size, d)
        ]
        rows = slice(None) if moments else slice(0)
        return cls(np.array([sums]), mean[None][rows], variance[None][rows])

    @classmethod
    def joined(cls, parts: Sequence[Seen], directions: int, programs: int = 1) -> Seen:
        """Join records in order.

        Parameters
        ----------
        parts : sequence of Seen
            May be empty.
        directions : int
            Those of all programs, P d.
        programs : int
            P.

        Returns
        -------
        Seen
            All records.
        """
        if len(parts) == 1:
            return parts[0]
        none = np.empty((0, directions))
        return cls(
            np.concatenate([np.empty((0, programs, 4)), *(part.sums for part in parts)]),
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
    mode: Mode, times: NDArray[np.int64], still: tuple[int, ...] = ()
) -> tuple[StepPolynomial, NDArray[np.int64]] | None:
    """Extract the distinct steps of one mode.

    Parameters
    ----------
    mode : Mode
        Mean model or member deviation.
    times : ndarray of int, shape (T,)
        As `TimeDependence.reduced` returns them.
    still : tuple of int
        As in `nqm.step_polynomial.ties`.

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
    polynomial = step_polynomial(mode.algorithm, distinct, still)
    return None if polynomial is None else (polynomial, kind.reshape(-1))


@dataclass(frozen=True)
class Layout:
    """Where the d directions of each of P programs lie in the kernel's blocks of `WIDE` lanes.

    A program lies in as many blocks as if it were alone, those of few directions side by side, so
    that its sums are rounded alike.

    Attributes
    ----------
    lane : ndarray of int, shape (P d,)
        Number of the lane of each direction.
    blocks : int
        Number of blocks.
    part : ndarray of int, shape (parts, 5)
        See `walk_polynomial`; the groups of each program follow those of the one before.
    factors : ndarray, shape (groups of one program, 2)
        Factors on the rates.
    """

    lane: NDArray[np.int64]
    blocks: int
    part: NDArray[np.int64]
    factors: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def of(cls, scales: tuple[FloatArray, ...] | None, directions: int, programs: int) -> Layout:
        """Lay out directions; those with the same factors on their rates lie together.

        Parameters
        ----------
        scales : tuple of ndarray, shape (d,), or None
            Factors on each rate, the same in all programs.
        directions, programs : int
            d and P.

        Returns
        -------
        Layout
            Of all programs.
        """
        if scales is None:
            return _equal_rates(directions, programs)
        return cls._of(scales, directions, programs)

    @classmethod
    def _of(cls, scales: tuple[FloatArray, ...] | None, directions: int, programs: int) -> Layout:
        factors, rank = np.ones((1, 2)), np.arange(directions)
        bounds = np.array([0, directions])
        if scales is not None:
            each = np.ones((directions, 2))
            each[:, : len(scales)] = np.stack(scales, axis=1)
            factors, which = np.unique(each, axis=0, return_inverse=True)
            rank[np.argsort(which.reshape(-1), kind="stable")] = np.arange(directions)
            bounds = np.searchsorted(np.sort(which.reshape(-1)), np.arange(len(factors) + 1))
        edges = np.unique(np.concatenate([bounds, np.arange(0, directions, WIDE)]))
        low, high = edges[:-1], edges[1:]
        group = np.searchsorted(bounds, low, side="right") - 1
        # Lanes from the start of one program to that of the next, but at the end of a block.
        beside = max(1, WIDE // directions)
        program = np.arange(programs)[:, None]
        size = 1 if beside > 1 else -(-directions // WIDE)
        first = program // beside * size * WIDE + program % beside * directions
        block = (first + low) // WIDE
        part = np.stack(
            np.broadcast_arrays(
                block,
                first + low - block * WIDE,
                first + high - block * WIDE,
                program * len(factors) + group,
                program,
            ),
            axis=2,
        )
        return cls(
            (first + rank).reshape(-1),
            -(-programs // beside) * size,
            np.ascontiguousarray(part.reshape(-1, 5)),
            factors,
        )


@functools.lru_cache(maxsize=8)
def _equal_rates(directions: int, programs: int) -> Layout:
    """The layout without factors on the rates, kept from one call to the next."""
    return Layout._of(None, directions, programs)


def walk(
    problem: Problem,
    layout: Layout,
    mode: Mode,
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
        Of d directions for each of P programs.
    layout : Layout
        Of these, with the factors on their rates.
    mode : Mode
        Mean model or member deviation.
    state : State
        Changed in place.
    steps : Steps
        Their settings and records.
    losses : ndarray, shape (T,), optional
        The expected loss after each step is added to it, of one program.
    moments : bool
        Whether the moments by direction are asked for, beside the sums.

    Returns
    -------
    Seen or None
        The records; None, with nothing done, if the steps are not polynomials.
    """
    found = polynomials(mode, steps.times, state.still)
    if found is None:
        return None
    polynomial, kind = found
    tied = ties(mode.algorithm, state.still)
    settings, factors, k = steps.settings, layout.factors, tied.kept.size
    rates = np.ones((len(settings), len(factors), settings.shape[1], 2))
    used = settings.shape[2] - 1
    rates[..., :used] = settings[:, None, :, :-1] * factors[:, None, :used]
    share = mode.noise_share / settings[0, :, [-1]].reshape(-1, 1)
    count = int(steps.record.max(initial=-1)) + 1
    rows = count if moments else 0
    sums = np.zeros((count, len(settings), 4))
    table = step_table(polynomial, kind, rates.reshape(-1, *rates.shape[2:]), k)
    given = problem.curvature, problem.noise_variance, problem.weight, square_weight(problem)
    root = np.empty((0, state.mean.shape[1])) if state.root is None else state.root
    moments_by_direction = state.mean, root, state.started, state.noisy
    blocks, moving = np.zeros((layout.blocks, HEAD + k * (k + 3), WIDE)), np.zeros(3, dtype=bool)
    fill_blocks(layout.lane, tied.kept, *given, *moments_by_direction, blocks, moving)
    here = np.empty((2, rows, layout.blocks, WIDE))
    walk_polynomial(
        table.matrix,
        (table.first, table.column, table.fixed),
        (table.driven, table.drive * share, table.own),
        layout.part,
        blocks,
        moving,
        steps.readout @ tied.whole,
        steps.record,
        sums,
        here,
        np.zeros(0) if losses is None else losses,
    )
    empty_blocks(layout.lane, tied.source, tied.factor, k, blocks, *moments_by_direction)
    seen = here.reshape(2, rows, layout.blocks * WIDE)[:, :, layout.lane]
    return Seen(sums, seen[0], seen[1])

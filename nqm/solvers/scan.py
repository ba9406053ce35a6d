"""Exact expected loss at many constant learning rates at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.algorithms.base import Algorithm, Mode
from nqm.double_double import DoubleDouble
from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import check_walk
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem, numbers_above_zero
from nqm.solvers._kernels.fast_normals import LANES
from nqm.solvers._kernels.powers import ONE_DOUBLE
from nqm.solvers._kernels.scans import scan1, scan2
from nqm.solvers.moments import CHUNK, Map, Moments, at_start, compose_span, power, then
from nqm.step_polynomial import DEGREE, exact_matrix, step_polynomial, step_table
from nqm.transition import extract, noise_moment, readout
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class Scan:
    """Expected loss after a number of steps, for every learning rate; arrays of shape (L,).

    Entries of rates that diverge are inf or NaN.

    Attributes
    ----------
    lr : ndarray
        Learning rates.
    loss : ndarray
        Expected loss of the evaluated weights (the mean model).
    bias, variance : ndarray
        Parts of `loss`: without gradient noise, and due to gradient noise.
    member_loss : ndarray
        Expected loss of the average member.
    """

    lr: FloatArray
    loss: FloatArray
    bias: FloatArray
    variance: FloatArray
    member_loss: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html


def scan(
    problem: Problem,
    algorithm: Algorithm,
    lr: ArrayLike,
    steps: int,
    *,
    batch_size: float = 1,
    member_lr: ArrayLike | None = None,
) -> Scan:
    """Compute the exact expected loss after `steps` steps at many constant learning rates.

    Costs O(log steps) per direction and rate (O(steps) for a method whose steps never repeat).

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares); the run begins at its start.
    algorithm : Algorithm
        Linear method.
    lr : array_like, shape (L,)
        Learning rates, > 0.
    steps : int
        Number of steps, >= 0.
    batch_size : float
        Examples of one minibatch, > 0.
    member_lr : float or array_like, shape (L,), optional
        Learning rates of late-phase members, > 0; equal to `lr` by default.

    Returns
    -------
    Scan
        Loss and its parts for each rate.

    Raises
    ------
    NQMError
        If the method is not linear or does not fit the problem, or an argument is out of range.
    """
    problem = additive_only("scan", problem)
    if not isinstance(algorithm, Algorithm):
        raise NQMError(f"scan needs exact moments; {type(algorithm).__name__} has none")
    check_integer("scan.steps", steps, 0)
    check_number("scan.batch_size", batch_size, low=0.0, closed_low=False)
    rates = member_rates = numbers_above_zero("scan.lr", lr)
    if member_lr is not None:
        member_rates = numbers_above_zero("scan.member_lr", member_lr)
        if member_rates.size not in (1, rates.size):
            raise NQMError(
                f"scan.member_lr must have one entry or as many as lr, {rates.size}; "
                f"got {member_rates.size}"
            )
        member_rates = np.broadcast_to(member_rates, rates.shape)
    algorithm.check(problem)
    mask = algorithm.member_mask(problem)
    member_scale = np.ones(problem.directions) if mask is None else mask
    modes = algorithm.modes()
    starts = at_start(algorithm, problem)
    bias = np.zeros((len(modes), rates.size))
    variance = np.zeros_like(bias)
    d = problem.directions
    with np.errstate(over="ignore", invalid="ignore"):
        for i, (mode, start) in enumerate(zip(modes, starts, strict=True)):
            if mask is None and steps:
                found = _in_lanes(problem, mode, start, (rates, member_rates), steps, batch_size)
                if found is not None:
                    bias[i], variance[i] = found
                    continue
            size = max(1, CHUNK // (d * start.mean.shape[1] ** 2))
            for first in range(0, rates.size, size):
                part = slice(first, first + size)
                two = rates[part, None], member_rates[part, None] * member_scale
                many, added = _power(problem, mode, two, steps, batch_size)
                count = many.shape[0] // d
                mean = np.einsum("dij,dj->di", many, np.tile(start.mean, (count, 1)))
                started = many @ np.tile(start.started, (count, 1, 1)) @ many.swapaxes(1, 2)
                c = readout(mode.algorithm, steps)
                square = (mean @ c) ** 2 + np.einsum("i,dij,j->d", c, started, c)
                noisy = np.einsum("i,dij,j->d", c, added, c)
                bias[i, part] = square.reshape(count, d) @ problem.weight
                variance[i, part] = noisy.reshape(count, d) @ problem.weight
        return Scan(
            lr=rates,
            loss=bias[0] + variance[0],
            bias=bias[0],
            variance=variance[0],
            member_loss=bias.sum(axis=0) + variance.sum(axis=0),
        )


def _in_lanes(
    problem: Problem,
    mode: Mode,
    start: Moments,
    two: tuple[FloatArray, FloatArray],
    steps: int,
    batch_size: float,
) -> tuple[FloatArray, FloatArray] | None:
    """Bias and variance (L,) of one or two coordinates whose equal steps are polynomials.

    None for other methods.
    """
    algorithm = mode.algorithm
    n = len(algorithm.coordinates)
    if n > 2 or algorithm.time.period > 1 or algorithm.time.update_never_repeats:
        return None
    found, polynomial = exact_matrix(algorithm), step_polynomial(algorithm, np.zeros(1, np.int64))
    if found is None or polynomial is None:
        return None
    count = two[0].size
    table = step_table(polynomial, np.zeros(count, np.int64), np.stack(two, axis=1)[None], n)
    drive, own = np.zeros((2, count, n * (n + 1) // 2))
    place = table.driven[:, 0] * (table.driven[:, 0] + 1) // 2 + table.driven[:, 1]
    drive[:, place], own[:, place] = table.drive[0] * (mode.noise_share / batch_size), table.own[0]
    rows, columns = np.tril_indices(n)
    start_mean, spread = _lanes(start.mean), _lanes(start.started[:, rows, columns])
    given = _coefficients(*found, two), drive, own, steps
    directions = _lanes(problem.curvature[:, None])[0], _lanes(problem.noise_variance[:, None])[0]
    read = readout(algorithm, steps)
    bias, noisy = np.zeros((2, count))
    if n == 1:
        square = read[0] ** 2
        second = square * (start_mean[0] ** 2 + spread[0])
        scan1(*given, *directions, second, problem.weight, bias, noisy)
        return bias, square * noisy
    scan2(*given, *directions, start_mean, spread, read, problem.weight, bias, noisy)
    return bias, noisy


def _lanes(values: FloatArray) -> FloatArray:
    """Values (d, k) of directions as (k, blocks, LANES), filled up with 0."""
    d, k = values.shape
    whole = np.zeros((k, -(-d // LANES) * LANES))
    whole[:, :d] = values.T
    return whole.reshape(k, -1, LANES)


def _coefficients(
    powers: NDArray[np.int64], matrix: FloatArray, two: tuple[FloatArray, FloatArray]
) -> FloatArray:
    """Coefficients of 1, h, h^2 in each entry of A in two doubles, (2, L, 3, n n)."""
    count = two[0].size
    size = matrix.shape[2] ** 2
    out = np.zeros((2, count, DEGREE + 1, size))
    for (i, j, c), high, low in zip(powers, *matrix, strict=True):
        term = DoubleDouble(high.reshape(1, size), low.reshape(1, size))
        for rate, times in zip(two, (i, j), strict=True):
            for _ in range(times):
                term = term * rate[:, None]
        whole = DoubleDouble(out[0, :, c], out[1, :, c]) + term
        out[0, :, c], out[1, :, c] = whole.high, whole.low
    return out


def _power(
    problem: Problem,
    mode: Mode,
    two: tuple[FloatArray, FloatArray],
    steps: int,
    batch_size: float,
) -> tuple[FloatArray, FloatArray]:
    """A and Q of all steps together, (L * d, n, n) each; the rates `two` broadcast to (L, d)."""
    algorithm = mode.algorithm
    v = mode.noise_share * problem.noise_variance / batch_size
    rates = two if algorithm.rate_count == 2 else two[0]

    exact = steps > ONE_DOUBLE and not algorithm.time.update_never_repeats

    def step_at(t: int) -> Map:
        step = extract(algorithm, problem.curvature, rates, t, exact=exact)
        n = step.matrix.shape[-1]
        parts = step.matrix, noise_moment(step, v), step.low
        return Map(*(part.reshape(-1, n, n) for part in parts))

    if algorithm.time.update_never_repeats:  # no two steps are equal
        check_walk("scan.steps", steps, "no two of them are alike")
        many, added = (np.zeros_like(part) for part in step_at(0)[:2])
        many += np.eye(many.shape[-1])
        for t in range(steps):
            a, q, _ = step_at(t)
            many, added = a @ many, a @ added @ a.swapaxes(1, 2) + q
        return many, added
    period = algorithm.time.period
    cycles, rest = divmod(steps, period)
    parts: list[Map | None] = []
    if cycles or not rest:
        cycle = compose_span(step_at, algorithm.time, 0, period)
        parts.append(power(cycle, cycles))
    if rest:
        parts.append(compose_span(step_at, algorithm.time, 0, rest))
    whole = functools.reduce(then, parts, None)
    assert whole is not None
    return whole.matrix, whole.noise

"""The least expected loss that any method could reach with a number of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError, check_word, shown
from nqm.limits import check_memory
from nqm.problems.correlation import covariance
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program
from nqm.transition import embedding

#: Kinds of methods that a bound holds for.
METHODS = ("any", "linear")
#: Relative size below which the noise along a combination of directions counts as none.
NOISELESS = 1e-13


def information_bound(
    problem: Problem, batch_size: ArrayLike, steps: ArrayLike, *, methods: str = "any"
) -> FloatArray | float:
    """Compute the least expected loss that `steps` minibatch gradients allow.

    A minibatch gradient at any point tells the minimum along a direction with the precision
    h^2 B / v. From a start of variance s the mean of the posterior, which no estimate beats in
    expected loss (the Bayes risk), has after n gradients

        bound = 1/2 sum_i m_i h_i / (1 / s_i + n h_i^2 B / v_i),

    whatever the rates, momenta or averages. Only the number of examples n B matters.

    Parameters
    ----------
    problem : Problem
        Its noise must not depend on the weights.
    batch_size : array_like
        Examples of one minibatch, > 0.
    steps : array_like
        Number of minibatches, >= 0; broadcasts with `batch_size`.
    methods : {"any", "linear"}
        ``"any"``: whatever algorithm, also one that knows the mean of the start, the noise's
        covariance and the eigenvectors. ``"linear"``: methods with exact moments in this package.
        They do not know where in direction the minimum lies, so that ``initial_mean**2`` counts as
        variance, and they treat each direction on its own, so that correlations are of no use to
        them. This bound is higher.

    Returns
    -------
    float, or ndarray of the common shape
        Expected loss, without ``irreducible_loss``.

    Raises
    ------
    NQMError
        If an argument is out of range, or the problem is least squares.
    """
    problem = additive_only("information_bound", problem)
    check_word("information_bound.methods", methods, METHODS)
    size = _numbers("batch_size", batch_size)
    count = _numbers("steps", steps)
    if not (size > 0).all():
        raise NQMError(f"information_bound.batch_size must be > 0; got {shown(batch_size)}")
    if not (count >= 0).all():
        raise NQMError(f"information_bound.steps must be >= 0; got {shown(steps)}")
    try:
        examples = size * count
    except ValueError:
        raise NQMError(
            "information_bound.batch_size and steps must broadcast; "
            f"got shapes {size.shape} and {count.shape}"
        ) from None
    losses = bound(problem, examples.reshape(-1), methods=methods).reshape(examples.shape)
    return float(losses) if losses.ndim == 0 else losses


def bound(
    problem: Problem, examples: FloatArray, *, methods: str = "any", starts: int = 1
) -> FloatArray:
    """Compute the bound after some numbers of examples.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    examples : ndarray, shape (n,)
        Examples drawn, >= 0.
    methods : {"any", "linear"}
        As in `information_bound`.
    starts : int
        Independent draws of the start that a method sees; their mean is nearer to the minimum.

    Returns
    -------
    ndarray, shape (n,)
        Expected losses.
    """
    if methods == "any" and problem.correlated:
        return np.array([_correlated(problem, float(n), starts) for n in examples])
    start = problem.initial_variance / starts
    if methods == "linear":
        start = start + problem.initial_mean**2
    kept = (problem.weight > 0) & (start > 0)
    weight, start = problem.weight[kept], start[kept]
    h, v = problem.curvature[kept], problem.noise_variance[kept]
    losses = np.empty(len(examples))
    for i, n in enumerate(examples):
        with np.errstate(divide="ignore", over="ignore"):
            told = n * h**2 * start / v if n > 0 else np.zeros_like(h)  # infinite without noise
        losses[i] = weight @ (start / (1.0 + told))
    return losses


def program_bound(
    problem: Problem,
    program: Program | Phase | Sequence[Phase],
    at: Sequence[int] | None = None,
    *,
    methods: str = "linear",
) -> FloatArray:
    """Compute the bound after some steps of a program.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    program : Program, Phase or sequence of Phase
        Its examples count, of all members and clients together, and the independent starts that
        `Ensemble` draws with ``starts = "own"``.
    at : sequence of int, optional
        Steps of the whole program; about 100 by default.
    methods : {"linear", "any"}
        As in `information_bound`.

    Returns
    -------
    ndarray, shape (len(at),)
        Expected losses. NaN where the bound does not hold: methods without exact moments, noise
        that is correlated in time, and methods that know the origin of weight space (weight decay
        towards it, federated clients), which may be the minimum.

    Raises
    ------
    NQMError
        If an argument is wrong, or the problem is least squares.
    """
    problem = additive_only("program_bound", problem)
    check_word("program_bound.methods", methods, METHODS)
    program = as_program("program_bound.program", program)
    wanted = program.recorded(at)
    algorithms = [phase.algorithm for phase in program.phases]
    first = algorithms[0]
    linear = [one for one in algorithms if isinstance(one, Algorithm)]
    known = any("origin" in one.constants.values() or not one.independent_noise for one in linear)
    if known or len(linear) < len(algorithms) or not isinstance(first, Algorithm):
        return np.full(len(wanted), np.nan)
    starts = embedding(first)[0].shape[1]
    return bound(problem, program.examples(wanted), methods=methods, starts=starts)


def _numbers(name: str, value: ArrayLike) -> FloatArray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full((), np.nan)
    if not np.isfinite(array).all():
        raise NQMError(f"information_bound.{name} must hold numbers; got {shown(value)}")
    return array


def _correlated(problem: Problem, examples: float, starts: int) -> float:
    """Half of tr(H P), with P the posterior covariance for correlated noise or start.

    With the start's covariance F F' and gradients z = H x + e, P = F (1 + n F' H C^-1 H F)^-1 F'
    where C is regular; along noiseless combinations one gradient leaves nothing.
    """
    d = problem.directions
    check_memory("information_bound: directions that are correlated", d, 6.0 * d**2)
    start = covariance(problem.initial_correlation, problem.initial_variance / starts)
    values, vectors = np.linalg.eigh(start)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))
    if examples > 0:
        noise = covariance(problem.noise_correlation, problem.noise_variance)
        values, vectors = np.linalg.eigh(noise)
        seen = vectors.T @ (problem.curvature[:, None] * factor)
        noisy = values > NOISELESS * d * values[-1]
        if not noisy.all():
            _, singular, rows = np.linalg.svd(seen[~noisy])
            top = singular.max(initial=0.0)
            free = rows[np.count_nonzero(singular > NOISELESS * d * top) :].T
            factor, seen = factor @ free, seen @ free
        told = seen[noisy] * np.sqrt(examples / values[noisy])[:, None]
        stacked = np.vstack([told, np.eye(told.shape[1])])
        triangle: FloatArray = np.asarray(np.linalg.qr(stacked, mode="r"))
        factor = np.linalg.solve(triangle.T, factor.T).T
    return float(problem.weight @ np.einsum("ij,ij->i", factor, factor))

"""Expected loss of SGD after piecewise-constant rates and batch sizes, and its exact gradients.

A piece of n steps at rate lr and batch size B maps the second moment of a direction to a s + q
(`nqm.problems.quadratic` has the notation), with

    a = (1 - lr h)^2n,      q = lr^2 (v / B) (1 - a) / (1 - (1 - lr h)^2).

The expected loss at the end is linear in the last second moments, so one sweep backwards gives the
adjoint p, the loss at the end per unit of second moment after each piece, and with it the
derivative by every rate and every batch size at the cost of a second evaluation (Zhang et al. 2019,
section 4.4, optimise the same rates by automatic differentiation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.errors import NQMError, shown
from nqm.limits import check_memory
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem, numbers_above_zero


def equal_pieces(steps: int, pieces: int) -> NDArray[np.int64]:
    """Lengths of pieces that are as equal as whole numbers of steps allow.

    Parameters
    ----------
    steps : int
        Steps of all pieces together.
    pieces : int
        Number of pieces; with fewer steps than pieces some lengths are 0.

    Returns
    -------
    ndarray of int, shape (pieces,)
        Steps of each piece; their sum is `steps`.

    Raises
    ------
    NQMError
        If so many pieces do not fit in memory.
    """
    check_memory("pieces", pieces, 8.0 * pieces)
    edges = np.rint(np.linspace(0, steps, pieces + 1)).astype(np.int64)
    return np.diff(edges)


def piecewise_loss(
    problem: Problem, lr: ArrayLike, lengths: ArrayLike, batch_size: ArrayLike = 1.0
) -> tuple[float, FloatArray, FloatArray]:
    """Compute the final expected loss of SGD at piecewise-constant rates, and its gradients.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares).
    lr : array_like, shape (pieces,)
        Learning rate of each piece, > 0; a rate above 2 / h amplifies the direction of curvature h.
    lengths : array_like, shape (pieces,)
        Steps of each piece: whole numbers >= 0.
    batch_size : float or array_like, shape (pieces,)
        Examples of one minibatch, > 0.

    Returns
    -------
    loss : float
        Expected loss after the last piece.
    by_lr, by_batch : ndarray, shape (pieces,)
        Exact derivatives of the loss by each rate and by each batch size.

    Raises
    ------
    NQMError
        If an array has a wrong length or entries out of range, or the problem is least squares.
    """
    problem = additive_only("piecewise_loss", problem)
    rates = numbers_above_zero("piecewise_loss.lr", lr)
    size = numbers_above_zero("piecewise_loss.batch_size", batch_size)
    n = np.asarray(lengths)
    if n.shape != rates.shape or n.dtype.kind not in "iuf" or not np.all((n >= 0) & (n % 1 == 0)):
        raise NQMError(
            f"piecewise_loss.lengths must hold {rates.size} whole numbers >= 0, one for each rate; "
            f"got {shown(lengths)}"
        )
    if size.size not in (1, rates.size):
        raise NQMError(
            f"piecewise_loss.batch_size must have one entry or one for each of {rates.size} rates; "
            f"got {size.size}"
        )
    run = evaluate(problem, rates, n, size)
    return run.loss, run.by_lr, -run.noise / run.batch_size


@dataclass(frozen=True)
class Evaluated:
    """Results of the sweep forwards (moments) and the sweep backwards (adjoint).

    Attributes
    ----------
    problem : Problem
        The problem evaluated.
    lr, lengths, batch_size : ndarray, shape (pieces,)
        Learning rate, steps and batch size of each piece.
    loss : float
        Expected loss at the end.
    by_lr : ndarray, shape (pieces,)
        Derivative of `loss` by each rate.
    noise : ndarray, shape (pieces,)
        Part of the final loss due to the gradient noise of each piece; proportional to 1 / B.
    moments : ndarray, shape (pieces + 1, d)
        E x^2 before each piece, and at the end.
    adjoint : ndarray, shape (pieces, d)
        Loss at the end per unit of second moment after each piece.
    """

    problem: Problem
    lr: FloatArray
    lengths: NDArray[Any]
    batch_size: FloatArray
    loss: float
    by_lr: FloatArray
    noise: FloatArray
    moments: FloatArray
    adjoint: FloatArray

    def moved(self, lr: FloatArray) -> FloatArray:
        """Final loss with one rate changed, for every piece at once.

        Parameters
        ----------
        lr : ndarray, shape (pieces,)
            New rates.

        Returns
        -------
        ndarray, shape (pieces,)
            Entry k is the loss with piece k at lr[k] and all other rates unchanged.
        """
        a, q, _, _ = maps(self.problem, lr, self.lengths, self.batch_size)
        change = a * self.moments[:-1] + q - self.moments[1:]
        return np.asarray(self.loss + np.einsum("kd,kd->k", self.adjoint, change))


def evaluate(
    problem: Problem, lr: ArrayLike, lengths: ArrayLike, batch_size: ArrayLike = 1.0
) -> Evaluated:
    """Evaluate piecewise-constant SGD and keep moments and adjoint; arguments are not checked.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    lr, lengths : array_like, shape (pieces,)
        Learning rate, > 0, and steps, >= 0, of each piece.
    batch_size : float or array_like, shape (pieces,)
        Examples of one minibatch, > 0.

    Returns
    -------
    Evaluated
        Loss and gradient, infinite or NaN where the rates diverge.

    Raises
    ------
    NQMError
        If so many pieces do not fit in memory.
    """
    rates, n = np.asarray(lr, dtype=np.float64), np.asarray(lengths)
    check_memory("the number of pieces", rates.size, 10.0 * rates.size * problem.directions)
    size = np.array(np.broadcast_to(np.asarray(batch_size, dtype=np.float64), rates.shape))
    a, q, a_slope, q_slope = maps(problem, rates, n, size)
    s = np.empty((len(a) + 1, problem.directions))
    s[0] = problem.initial_mean**2 + problem.initial_variance
    adjoint = np.ones_like(a)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # where rates diverge
        for k in range(len(a)):
            s[k + 1] = a[k] * s[k] + q[k]
        np.cumprod(a[:0:-1], axis=0, out=adjoint[-2::-1])
        adjoint *= problem.weight
        by_lr = np.einsum("kd,kd->k", adjoint, a_slope * s[:-1] + q_slope)
        noise = np.einsum("kd,kd->k", adjoint, q)
        loss = float(problem.weight @ s[-1])
    return Evaluated(problem, rates, n, size, loss, by_lr, noise, s, adjoint)


def final_loss(
    problem: Problem, lr: ArrayLike, lengths: ArrayLike, batch_size: ArrayLike = 1.0
) -> float:
    """Compute the loss of `piecewise_loss` without gradients, in the memory of one piece.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem; may have many directions.
    lr, lengths : array_like, shape (pieces,)
        Learning rate, > 0, and steps, >= 0, of each piece.
    batch_size : float or array_like, shape (pieces,)
        Examples of one minibatch, > 0.

    Returns
    -------
    float
        Expected loss after the last piece.
    """
    rates, n = np.asarray(lr, dtype=np.float64), np.asarray(lengths)
    size = np.broadcast_to(np.asarray(batch_size, dtype=np.float64), rates.shape)
    s = problem.initial_mean**2 + problem.initial_variance
    for k in range(rates.size):
        a, q, _, _ = maps(problem, rates[k : k + 1], n[k : k + 1], size[k : k + 1])
        s = a[0] * s + q[0]
    return float(problem.weight @ s)


def maps(
    problem: Problem, lr: FloatArray, lengths: NDArray[Any], batch_size: FloatArray
) -> tuple[FloatArray, ...]:
    """Coefficients of the map s -> a s + q of the second moment over each piece.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    lr, lengths, batch_size : ndarray, shape (pieces,)
        Learning rate, steps and batch size of each piece.

    Returns
    -------
    tuple of ndarray, shape (pieces, d)
        a, q, and their derivatives by the rate of the piece.
    """
    rates, n = lr[:, None], lengths[:, None]
    h, v = problem.curvature, problem.noise_variance / batch_size[:, None]
    u = rates * h
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        if np.all(n == 1):  # a free rate for every step
            return (1.0 - u) ** 2, rates**2 * v, -2.0 * (1.0 - u) * h, 2.0 * rates * v
        # log |1 - u|, accurate near u = 0 and near u = 2.
        log_r = np.where(u < 1.0, np.log1p(-u), np.log1p(u - 2.0))
        power = np.where(n > 0, 2.0 * n * log_r, 0.0)
        a, fallen = np.exp(power), -np.expm1(power)
        # Sum of r^2t over the piece and its slope by u; at u = 0 and u = 2 both are 0 / 0, and
        # close to there the slope's numerator cancels: its limit is used.
        width = u * (2.0 - u)
        total = np.where(width != 0.0, fallen / width, n)
        a_slope = np.where((n > 0) & (u != 1.0), -2.0 * n * a / (1.0 - u), 0.0)
        inside = np.abs(n * width) > 1e-8
        slope = np.where(
            inside, (-a_slope - total * 2.0 * (1.0 - u)) / width, n * (n - 1) * np.sign(u - 1.0)
        )
        q = rates**2 * v * total
        return a, q, a_slope * h, 2.0 * rates * v * total + rates**2 * v * h * slope

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
    """Lengths of `pieces` pieces of `steps` steps, as equal as whole numbers can be."""
    check_memory("pieces", pieces, 8.0 * pieces)
    edges = np.rint(np.linspace(0, steps, pieces + 1)).astype(np.int64)
    return np.diff(edges)


def piecewise_loss(
    problem: Problem, lr: ArrayLike, lengths: ArrayLike, batch_size: ArrayLike = 1.0
) -> tuple[float, FloatArray, FloatArray]:
    """Expected loss of SGD at the end of piecewise-constant rates, and its gradients.

    Parameters
    ----------
    problem : Problem
    lr : array_like, shape (pieces,)
        Any positive rates; beyond 2 / h a piece amplifies.
    lengths : array_like, shape (pieces,)
        Steps of each piece, >= 0.
    batch_size : float or array_like, shape (pieces,)
        Any positive numbers.

    Returns
    -------
    loss : float
    by_lr, by_batch : ndarray, shape (pieces,)
        d loss / d rate and d loss / d batch size, exact: one sweep forwards, one backwards.
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
    """One sweep forwards and one backwards.

    Attributes
    ----------
    lr, lengths, batch_size, by_lr : ndarray, shape (pieces,)
    loss : float
    noise : ndarray, shape (pieces,)
        What the gradient noise of each piece adds to the loss at the end; it falls as 1 / B.
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
        """Loss at the end with piece k alone at lr[k], for every k at once."""
        a, q, _, _ = maps(self.problem, lr, self.lengths, self.batch_size)
        change = a * self.moments[:-1] + q - self.moments[1:]
        return np.asarray(self.loss + np.einsum("kd,kd->k", self.adjoint, change))


def evaluate(
    problem: Problem, lr: ArrayLike, lengths: ArrayLike, batch_size: ArrayLike = 1.0
) -> Evaluated:
    """`piecewise_loss` with all that the two sweeps computed."""
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
    """The loss of `piecewise_loss` alone, with memory for one piece: for all directions."""
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
    """Both a and q of every piece, and their derivatives by its rate, (pieces, d) each."""
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

"""Quadrature of a spectrum in log curvature: few nodes in place of many directions.

Every expected loss is a sum over directions of a function that is smooth in log h. A block of
directions, narrow in log h, is therefore replaced by the nodes of the Gauss rule of its counting
measure (Golub & Welsch 1969; Gautschi 2004, "Orthogonal polynomials", section 2.2),
which sums polynomials of degree 2 points - 1 in log h over the block exactly. The other two
measures that a loss needs, that of the start and that of the noise, are interpolated on the same
nodes.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from scipy.linalg import eigh_tridiagonal

from nqm.errors import NQMError, check_integer, check_number
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem


@overload
def condense(problem: Problem, *, points: int = ..., width: float = ...) -> Problem: ...
@overload
def condense(problem: LeastSquares, *, points: int = ..., width: float = ...) -> LeastSquares: ...
def condense(
    problem: Problem | LeastSquares, *, points: int = 8, width: float = 0.2
) -> Problem | LeastSquares:
    """Replace the directions of a problem by few nodes with the same expected losses.

    It keeps sixteen moments of a block, `Problem.binned` only two: with the defaults 10^4
    directions of the harmonic spectrum become 268, and expected losses at constant or scheduled
    rates agree to about 1e-12 relative for SGD and its averages and for moderate momentum. The
    error grows where responses swing within one block, which hardly damped momentum makes them do:
    1e-7 at momentum 0.999 and 1e-4 at 0.9999 were measured (10^4 steps at lr h = 0.01). The result
    has `expected_losses_only`: the distribution of the loss, correlations between directions and
    the minimum do not carry over.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Directions of zero curvature, which have no loss, are dropped.
    points : int
        Number of nodes of a block, >= 1; a block of at most as many directions is not changed.
    width : float
        Width of a block in log curvature, > 0.

    Returns
    -------
    Problem or LeastSquares
        Of the same class, largest curvature first, with fractional multiplicities.

    Raises
    ------
    NQMError
        If no direction has a curvature above 0, or `points` or `width` is out of range.
    """
    problem = any_problem("condense", problem)
    check_integer("condense: points", points, 1)
    check_number("condense: width", width, low=0.0, closed_low=False)
    kept = np.flatnonzero(problem.curvature > 0)
    if not kept.size:
        raise NQMError("condense: every direction is flat; give a curvature above 0")
    order = kept[np.argsort(-problem.curvature[kept], kind="stable")]
    log_h = np.log(problem.curvature[order])
    count = problem.multiplicity[order]
    start = problem.initial_mean[order] ** 2 + problem.initial_variance[order]
    additive = problem if isinstance(problem, Problem) else problem.additive()
    noise = additive.noise_variance[order]
    x, m, s, v = _condensed(log_h, count, start, noise, points, width)
    if isinstance(problem, LeastSquares):  # whose noise follows from the curvature
        return LeastSquares(np.exp(x), problem.label_noise, 0.0, s, m)
    return Problem(
        np.exp(x),
        v,
        multiplicity=m,
        initial_variance=s,
        irreducible_loss=problem.irreducible_loss,
        expected_losses_only=True,
    )


def condensed_measure(
    atom: FloatArray, share: FloatArray, *, points: int = 8, width: float = 0.2
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Reatom atoms by few, with the same integrals of what is smooth in their logarithm.

    Parameters
    ----------
    atom : ndarray, shape (d,)
        Positions, > 0, largest first.
    share : ndarray, shape (d,)
        A second measure on the same atoms, >= 0.
    points, width : int, float
        As for `condense`.

    Returns
    -------
    atom, count, share : ndarray
        Atoms, largest first: how many each stands for, and its part of the second measure.
    """
    if not atom.size:
        return atom, atom, atom
    log = np.log(atom)
    ones, each = np.ones(log.size), share / atom
    x, count, each, _ = _condensed(log, ones, each, np.zeros_like(ones), points, width)
    return np.exp(x), count, count * each * np.exp(x)


def _condensed(
    log: FloatArray,
    count: FloatArray,
    start: FloatArray,
    noise: FloatArray,
    points: int,
    width: float,
) -> tuple[FloatArray, ...]:
    """Nodes of all blocks of falling `log`, with their counts, starts and noise."""
    label = ((log[0] - log) / width).astype(np.int64)
    blocks: list[tuple[FloatArray, ...]] = []
    for block in np.split(np.arange(log.size), np.flatnonzero(np.diff(label)) + 1):
        entry = log[block], count[block], start[block], noise[block]
        blocks.append(_gauss(*entry, points) if block.size > points else entry)
    return tuple(np.concatenate(part) for part in zip(*blocks, strict=True))


def _gauss(
    x: FloatArray, count: FloatArray, start: FloatArray, noise: FloatArray, points: int
) -> tuple[FloatArray, ...]:
    """Nodes of one block with counts, starts and noise; the block itself if no rule fits."""
    middle, half = (x[0] + x[-1]) / 2, (x[0] - x[-1]) / 2
    if np.unique(x).size <= points or half <= 0:
        return x, count, start, noise
    t = (x - middle) / half
    # Stieltjes' procedure on the atoms of the block.
    diagonal, off = np.empty(points), np.empty(points - 1)
    before, now, norm = np.zeros_like(t), np.ones_like(t), float(count.sum())
    for k in range(points):
        diagonal[k] = np.sum(count * t * now**2) / norm
        after = (t - diagonal[k]) * now - (off[k - 1] ** 2 if k else 0.0) * before
        if k < points - 1:
            grown = float(np.sum(count * after**2))
            off[k], norm = np.sqrt(grown / norm), grown
            before, now = now, after
    nodes, vectors = eigh_tridiagonal(diagonal, off)
    weight = count.sum() * vectors[0] ** 2
    # Lagrange's basis at the atoms: sum of c_i F(x_i) = sum over nodes of F times sum c_i l(x_i).
    basis = np.ones((points, t.size))
    for j in range(points):
        others = np.delete(nodes, j)
        basis[j] = np.prod((t[:, None] - others) / (nodes[j] - others), axis=1)
    h, node_h = np.exp(x), np.exp(middle + half * nodes)
    begun, noisy = basis @ (count * h * start), basis @ (count * h * noise)
    if (begun < 0).any() or (noisy < 0).any():
        return x, count, start, noise
    place = np.argsort(-nodes)
    fields = middle + half * nodes, weight, begun / (weight * node_h), noisy / (weight * node_h)
    return tuple(field[place] for field in fields)

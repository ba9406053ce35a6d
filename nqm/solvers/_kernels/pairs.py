"""Covariances between pairs of directions, step by step and at once.

Second moments of two directions i > j, S_ij = E z_i z_j' less the means' (d, d, n, n):
S_ij' = A_i S_ij A_j' + c_ij P_i P_j'. They drive no expected loss, only how losses vary.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.small_matrices import carry_pair, copy


@jit
def propagate_pairs(matrix, push, kind, covariance, cross):
    """Take T steps of the covariances between pairs of directions, one by one.

    Parameters
    ----------
    matrix : ndarray, shape (s, d, n, n)
        A of each kind of step.
    push : ndarray, shape (s, d, n, m)
        P of each kind of step: coefficients of the noise.
    kind : ndarray of int, shape (T,)
        Kind of each step.
    covariance : ndarray, shape (d, d)
        Covariance of the noise in each of the m minibatches.
    cross : ndarray, shape (d, d, n, n)
        Covariances of the states of directions i > j, changed in place.
    """
    d, n, columns = push.shape[1], push.shape[2], push.shape[3]
    half = np.empty((n, n))
    for i in range(d):
        for j in range(i):
            pair, c = cross[i, j], covariance[i, j]
            for t in range(kind.size):
                k = kind[t]
                carry_pair(matrix[k, i], pair, matrix[k, j], pair, half)
                for r in range(n):
                    for q in range(n):
                        total = 0.0
                        for m in range(columns):
                            total += push[k, i, r, m] * push[k, j, q, m]
                        pair[r, q] += c * total


@jit
def power_pairs(squares, steps, added, cross):
    """Take equal steps of the covariances between pairs of directions, in O(log steps).

    Parameters
    ----------
    squares : ndarray, shape (bits, d, n, n)
        Powers 1, 2, 4, ... of A.
    steps : int
        Number of steps, below 2^bits.
    added : ndarray, shape (d, d, n, n)
        Covariance that the noise of one step adds.
    cross : ndarray, shape (d, d, n, n)
        Covariances of the states of directions i > j, changed in place.
    """
    d, n = squares.shape[1], squares.shape[2]
    half, sums, next_sums = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    for i in range(d):
        for j in range(i):
            pair = cross[i, j]
            copy(added[i, j], sums)
            left = steps
            for bit in range(squares.shape[0]):
                a, b = squares[bit, i], squares[bit, j]
                if left & 1:
                    carry_pair(a, pair, b, pair, half)
                    for r in range(n):
                        for c in range(n):
                            pair[r, c] += sums[r, c]
                left >>= 1
                if left == 0:
                    break
                carry_pair(a, sums, b, next_sums, half)
                for r in range(n):
                    for c in range(n):
                        sums[r, c] += next_sums[r, c]

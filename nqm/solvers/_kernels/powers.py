"""Equal steps at once: compositions, powers and steady states of the second moments."""

from __future__ import annotations

import math

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.small_matrices import copy, size, then, times, times_exact

#: Steps that one double carries: their rounding is 7e-12, well below the 1e-9 that is promised.
ONE_DOUBLE = 2**16
#: Largest entry of a power of A that adds nothing to a steady state any more, in any units.
_GONE = 1e-40


@jit
def power(matrix, noise, steps, out_matrix, out_noise):
    """Compose equal steps for every direction by repeated squaring, in O(log steps).

    Parameters
    ----------
    matrix, noise : ndarray, shape (d, n, n)
        A and Q of one step.
    steps : int
        Number of steps, >= 0.
    out_matrix, out_noise : ndarray, shape (d, n, n)
        Outputs A and Q; arrays other than the inputs.
    """
    d, n = matrix.shape[0], matrix.shape[1]
    a, q = np.empty((n, n)), np.empty((n, n))
    a2, q2, half = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    for i in range(d):
        if n == 1:
            square, noisy, left = matrix[i, 0, 0], noise[i, 0, 0], steps
            total, drift = 1.0, 0.0
            while left > 0:
                if left & 1:
                    drift = square * square * drift + noisy
                    total *= square
                left >>= 1
                if left:
                    noisy += square * square * noisy
                    square *= square
            out_matrix[i, 0, 0], out_noise[i, 0, 0] = total, drift
            continue
        copy(matrix[i], a)
        copy(noise[i], q)
        whole, summed = out_matrix[i], out_noise[i]
        for r in range(n):
            for c in range(n):
                whole[r, c] = 1.0 if r == c else 0.0
                summed[r, c] = 0.0
        left = steps
        while left > 0:
            if left & 1:
                then(whole, summed, a, q, a2, q2, half)
                copy(a2, whole)
                copy(q2, summed)
            left >>= 1
            if left:
                then(a, q, a, q, a2, q2, half)
                copy(a2, a)
                copy(q2, q)


@jit
def compose_exact(matrix1, noise1, low1, matrix2, noise2, low2, matrix, noise, low):
    """Compose step 1, then step 2, for every direction, with matrices of two doubles.

    Parameters
    ----------
    matrix1, noise1, low1, matrix2, noise2, low2 : ndarray, shape (d, n, n)
        A and Q of both steps; A is matrix + low.
    matrix, noise, low : ndarray, shape (d, n, n)
        Outputs; arrays other than the inputs.
    """
    half, plain = np.empty(matrix1.shape[1:]), np.empty(matrix1.shape[1:])
    for i in range(matrix1.shape[0]):
        then(matrix1[i], noise1[i], matrix2[i], noise2[i], plain, noise[i], half)
        times_exact(matrix2[i], low2[i], matrix1[i], low1[i], matrix[i], low[i])
        _keep_finite(plain, matrix[i], low[i])


@jit
def _keep_finite(plain, matrix, low):
    """Replace entries that overflowed in two doubles by their value in one double."""
    n = plain.shape[0]
    for r in range(n):
        for c in range(n):
            if not (math.isfinite(matrix[r, c]) and math.isfinite(low[r, c])):
                matrix[r, c], low[r, c] = plain[r, c], 0.0


@jit
def power_exact(matrix, noise, low, steps, always, out_matrix, out_noise, out_low):
    """Raise to a power as `power` does, in two doubles if one would lose digits.

    One double loses `steps` units in the last place, or fewer if the power becomes negligible
    before. This loss is accepted up to `ONE_DOUBLE` steps unless `always`.

    Parameters
    ----------
    matrix, noise, low : ndarray, shape (d, n, n)
        One step; A is matrix + low.
    steps : int
        Number of steps, >= 0.
    always : bool
        Use two doubles from two steps on.
    out_matrix, out_noise, out_low : ndarray, shape (d, n, n)
        Outputs; arrays other than the inputs.
    """
    d, n = matrix.shape[0], matrix.shape[1]
    a, a_low, q = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    a2, a2_low, q2 = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    half, plain = np.empty((n, n)), np.empty((n, n))
    power(matrix, noise, steps, out_matrix, out_noise)
    out_low[:] = 0.0
    if steps <= (1 if always else ONE_DOUBLE):
        if steps == 1:
            out_low[:] = low
        return
    for i in range(d):
        if not always and _faint_soon(matrix[i], a, a2):
            continue
        copy(matrix[i], a)
        copy(low[i], a_low)
        copy(noise[i], q)
        whole, whole_low, summed = out_matrix[i], out_low[i], out_noise[i]
        copy(whole, plain)
        for r in range(n):
            for c in range(n):
                whole[r, c] = 1.0 if r == c else 0.0
                whole_low[r, c] = 0.0
                summed[r, c] = 0.0
        left = steps
        while left > 0:
            if left & 1:
                then(whole, summed, a, q, a2, q2, half)
                copy(q2, summed)
                times_exact(a, a_low, whole, whole_low, a2, a2_low)
                copy(a2, whole)
                copy(a2_low, whole_low)
            left >>= 1
            if left:
                then(a, q, a, q, a2, q2, half)
                copy(q2, q)
                times_exact(a, a_low, a, a_low, a2, a2_low)
                copy(a2, a)
                copy(a2_low, a_low)
        _keep_finite(plain, whole, whole_low)


@jit
def _faint_soon(matrix, a, a2):
    """Whether `ONE_DOUBLE` steps reduce any start below 1e-20 of itself."""
    copy(matrix, a)
    steps = 1
    while steps < ONE_DOUBLE:
        times(a, a, a2)
        copy(a2, a)
        steps *= 2
    return size(a) < 1e-20


@jit
def stationary_exact(matrix, noise, low, out):
    """Solve as `stationary` does, in two doubles if one would lose digits.

    Parameters
    ----------
    matrix, noise, low : ndarray, shape (d, n, n)
        One step; A is matrix + low, of spectral radius < 1.
    out : ndarray, shape (d, n, n)
        Output S.
    """
    d, n = matrix.shape[0], matrix.shape[1]
    a, a_low, q = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    a2, a2_low, q2, half = np.empty((n, n)), np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    stationary(matrix, noise, out)
    for i in range(d):
        if _faint_soon(matrix[i], a, a2):
            continue
        copy(matrix[i], a)
        copy(low[i], a_low)
        copy(noise[i], q)
        for _ in range(64):
            then(a, q, a, q, a2, q2, half)
            copy(q2, q)
            times_exact(a, a_low, a, a_low, a2, a2_low)
            copy(a2, a)
            copy(a2_low, a_low)
            if size(a) < _GONE:
                break
        copy(q, out[i])


@jit
def stationary(matrix, noise, out):
    """Solve S = A S A' + Q for every direction by doubling; the caller checks stability.

    Each round squares A, so the error falls as radius^(2^round): 64 rounds reach any radius < 1.
    It ends when the power of A is negligible. A small change of S would not be a sign of
    convergence, because the contribution of a slow mode is tiny at first.

    Parameters
    ----------
    matrix, noise : ndarray, shape (d, n, n)
        A, of spectral radius < 1, and Q of one step.
    out : ndarray, shape (d, n, n)
        Output S.
    """
    d, n = matrix.shape[0], matrix.shape[1]
    a, q = np.empty((n, n)), np.empty((n, n))
    a2, q2, half = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    for i in range(d):
        copy(matrix[i], a)
        copy(noise[i], q)
        for _ in range(64):
            then(a, q, a, q, a2, q2, half)
            copy(a2, a)
            copy(q2, q)
            if size(a) < _GONE:
                break
        copy(q, out[i])

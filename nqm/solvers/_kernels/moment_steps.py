"""The first two moments step by step, for a few directions with any matrices."""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit


@jit
def propagate_moments(matrix, noise, kind, mean, covariance, readout, record, weight, loss):
    """Take T steps of the first two moments, one by one.

    Parameters
    ----------
    matrix, noise : ndarray, shape (s, d, n, n)
        A and Q = C C' Var e of each kind of step.
    kind : ndarray of int, shape (T,)
        Kind of each step.
    mean, covariance : ndarray, shape (d, n) and (d, n, n)
        Moments of the state, changed in place.
    readout : ndarray, shape (T, n)
        Evaluated weights after each step as a linear form of the state; used if `record`.
    record : bool
        Whether losses are recorded.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    loss : ndarray, shape (T,)
        The expected loss after each step is added to it if `record`.
    """
    d, n = mean.shape
    new_mean = np.empty(n)
    half = np.empty((n, n))
    for i in range(d):
        if n == 1:
            mu, var = mean[i, 0], covariance[i, 0, 0]
            for t in range(kind.size):
                k = kind[t]
                a = matrix[k, i, 0, 0]
                mu *= a
                var = a * a * var + noise[k, i, 0, 0]
                if record:
                    loss[t] += weight[i] * readout[t, 0] ** 2 * (mu * mu + var)
            mean[i, 0], covariance[i, 0, 0] = mu, var
            continue
        mu_i, cov_i = mean[i], covariance[i]
        for t in range(kind.size):
            a, q = matrix[kind[t], i], noise[kind[t], i]
            for r in range(n):
                total = 0.0
                for c in range(n):
                    total += a[r, c] * mu_i[c]
                new_mean[r] = total
                for c in range(n):
                    total = 0.0
                    for k in range(n):
                        total += a[r, k] * cov_i[k, c]
                    half[r, c] = total
            for r in range(n):
                mu_i[r] = new_mean[r]
                for c in range(r + 1):
                    total = q[r, c]
                    for k in range(n):
                        total += half[r, k] * a[c, k]
                    cov_i[r, c] = total
                    cov_i[c, r] = total
            if record:
                mu, v = 0.0, 0.0
                for r in range(n):
                    mu += readout[t, r] * mu_i[r]
                    total = 0.0
                    for c in range(n):
                        total += cov_i[r, c] * readout[t, c]
                    v += readout[t, r] * total
                loss[t] += weight[i] * (mu * mu + v)

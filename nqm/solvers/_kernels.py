"""All compiled code: plain arrays in, plain arrays out, nothing known of algorithms.

Kept in one file because numba's on-disk cache does not see an edit to a compiled function that
lives elsewhere. NaN semantics are IEEE (no fastmath), so a diverging case stays visible.
Shapes: d directions, n state coordinates, m noise columns, s kinds of step, T steps, R replicas.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_jit = njit(cache=True, nogil=True, error_model="numpy")


@_jit
def propagate_moments(matrix, noise, kind, mean, covariance, readout, record, weight, loss):
    """Every step of the first two moments; `mean` (d, n) and `covariance` (d, n, n) in place.

    matrix, noise : (s, d, n, n) A and Q = C C' Var e of each kind; kind : (T,).
    Where `record` is true, the expected loss after each step is added to `loss` (T,);
    readout : (T, n) evaluated weights, weight : (d,) loss per unit of second moment.
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


@_jit
def _times(a, b, out):
    n = a.shape[0]
    for r in range(n):
        for c in range(n):
            total = 0.0
            for k in range(n):
                total += a[r, k] * b[k, c]
            out[r, c] = total


@_jit
def _then(a1, q1, a2, q2, a, q, half):
    """(a, q) = first step 1, then step 2; `a`, `q` may be none of the inputs."""
    n = a1.shape[0]
    _times(a2, a1, a)
    _times(a2, q1, half)
    for r in range(n):
        for c in range(r + 1):
            total = q2[r, c]
            for k in range(n):
                total += half[r, k] * a2[c, k]
            q[r, c] = total
            q[c, r] = total


@_jit
def compose(matrix1, noise1, matrix2, noise2, matrix, noise):
    """Step 1 then step 2 for every direction; outputs (d, n, n) distinct from the inputs."""
    half = np.empty(matrix1.shape[1:])
    for i in range(matrix1.shape[0]):
        _then(matrix1[i], noise1[i], matrix2[i], noise2[i], matrix[i], noise[i], half)


@_jit
def power(matrix, noise, steps, out_matrix, out_noise):
    """`steps` equal steps for every direction, by repeated squaring: O(log steps)."""
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
        a[:], q[:] = matrix[i], noise[i]
        whole, summed = out_matrix[i], out_noise[i]
        whole[:], summed[:] = np.eye(n), np.zeros((n, n))
        left = steps
        while left > 0:
            if left & 1:
                _then(whole, summed, a, q, a2, q2, half)
                whole[:], summed[:] = a2, q2
            left >>= 1
            if left:
                _then(a, q, a, q, a2, q2, half)
                a[:], q[:] = a2, q2


@_jit
def stationary(matrix, noise, out):
    """Fixed point of S = A S A' + Q for every direction by doubling; the caller checks stability.

    Each round squares A, so the error falls as radius^(2^round): 64 rounds reach any radius < 1.
    """
    d, n = matrix.shape[0], matrix.shape[1]
    a, q = np.empty((n, n)), np.empty((n, n))
    a2, q2, half = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    for i in range(d):
        a[:], q[:] = matrix[i], noise[i]
        for _ in range(64):
            _then(a, q, a, q, a2, q2, half)
            change = np.abs(q2 - q).max()
            a[:], q[:] = a2, q2
            if change <= 1e-17 * np.abs(q).max():
                break
        out[i] = q


@_jit
def sample_linear(
    rng,
    values,
    column,
    row,
    noise_columns,
    kind,
    record,
    readout,
    members,
    weight,
    state,
    loss,
    member_loss,
):
    """Literal steps of R replicas; `state` (R, d, n) in place.

    values : (s, d, nonzeros) entries of [A | C sd(e)] in rows; column : (nonzeros,);
    row : (n + 1,) where each row begins; noise_columns : m.
    record : (T,) index of the output row or -1; readout : (records, n);
    members : (records, K, n); loss, member_loss : (records, R).
    """
    replicas, d, n = state.shape
    z = np.empty(n + noise_columns)
    single = n == 1 and noise_columns == 1 and column.size == 2
    for t in range(kind.size):
        v, out = values[kind[t]], record[t]
        if single:
            c2 = readout[out, 0] ** 2 if out >= 0 else 0.0
            for r in range(replicas):
                total = 0.0
                x = state[r]
                if out >= 0:
                    for i in range(d):
                        y = v[i, 0] * x[i, 0] + v[i, 1] * rng.standard_normal()
                        x[i, 0] = y
                        total += weight[i] * (y * y)
                    loss[out, r] = c2 * total
                    member_loss[out, r] = loss[out, r]  # one coordinate: at most one member
                else:
                    for i in range(d):
                        x[i, 0] = v[i, 0] * x[i, 0] + v[i, 1] * rng.standard_normal()
            continue
        for r in range(replicas):
            for i in range(d):
                for j in range(n):
                    z[j] = state[r, i, j]
                for j in range(noise_columns):
                    z[n + j] = rng.standard_normal()
                for j in range(n):
                    total = 0.0
                    for p in range(row[j], row[j + 1]):
                        total += v[i, p] * z[column[p]]
                    state[r, i, j] = total
        if out >= 0:
            evaluate(state, readout[out], members[out], weight, loss[out], member_loss[out])


@_jit
def evaluate(state, readout, members, weight, loss, member_loss):
    """Loss (R,) of the evaluated weights and mean loss of the members, from state (R, d, n)."""
    replicas, d, n = state.shape
    count = members.shape[0]
    for r in range(replicas):
        total, member_total = 0.0, 0.0
        for i in range(d):
            x = 0.0
            for j in range(n):
                x += readout[j] * state[r, i, j]
            total += weight[i] * (x * x)
            for k in range(count):
                x = 0.0
                for j in range(n):
                    x += members[k, j] * state[r, i, j]
                member_total += weight[i] * (x * x)
        loss[r] = total
        member_loss[r] = member_total / count if count else np.nan


@_jit
def sample_multiplicative(
    rng,
    curvature,
    minimum,
    noise_sd,
    base_lr,
    member_lr,
    scalar,
    theta,
    phi,
    record,
    weight,
    loss,
    member_loss,
):
    """Multiplicative late-phase steps; theta (R, d) and phi (R, K, d) or (R, K, 1) in place.

    noise_sd : (T, d) of one minibatch; base_lr : (T,) with gamma in it; member_lr : (T,).
    record : (T,) index of the output row or -1; loss, member_loss : (records, R).
    """
    replicas, d = theta.shape
    count = phi.shape[1]
    gradient = np.empty((count, d))
    for t in range(record.size):
        for r in range(replicas):
            for k in range(count):
                for i in range(d):
                    f = phi[r, k, 0 if scalar else i]
                    gradient[k, i] = (
                        curvature[i] * (theta[r, i] * f - minimum[i])
                        + noise_sd[t, i] * rng.standard_normal()
                    )
            for i in range(d):
                pull = 0.0
                old = theta[r, i]
                for k in range(count):
                    f = phi[r, k, 0 if scalar else i]
                    pull += f * gradient[k, i]
                    if scalar:
                        gradient[k, i] *= old
                    else:
                        phi[r, k, i] = f - member_lr[t] * old * gradient[k, i]
                theta[r, i] = old - base_lr[t] * pull
            if scalar:
                for k in range(count):
                    phi[r, k, 0] -= member_lr[t] * gradient[k].sum()
        if record[t] >= 0:
            evaluate_multiplicative(
                theta, phi, minimum, scalar, weight, loss[record[t]], member_loss[record[t]]
            )


@_jit
def evaluate_multiplicative(theta, phi, minimum, scalar, weight, loss, member_loss):
    """Loss (R,) of the mean model theta * mean phi, and mean loss of its members."""
    replicas, d = theta.shape
    count = phi.shape[1]
    for r in range(replicas):
        total, member_total = 0.0, 0.0
        for i in range(d):
            mean = 0.0
            for k in range(count):
                x = theta[r, i] * phi[r, k, 0 if scalar else i] - minimum[i]
                member_total += weight[i] * (x * x)
                mean += x
            mean /= count
            total += weight[i] * (mean * mean)
        loss[r] = total
        member_loss[r] = member_total / count


@_jit
def draw_normals(rng, count):
    """Sum of `count` normals: the cost of merely drawing them, for the benchmarks."""
    total = 0.0
    for _ in range(count):
        total += rng.standard_normal()
    return math.fabs(total)

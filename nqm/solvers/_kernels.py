"""All compiled code: plain arrays in, plain arrays out, nothing known of algorithms.

Kept in one file because numba's on-disk cache does not see an edit to a compiled function that
lives elsewhere. NaN semantics are IEEE (no fastmath), so a diverging case stays visible.
Shapes: d directions, n state coordinates, m noise columns, s kinds of step, T steps, R replicas.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from nqm.solvers.ziggurat import TAIL_START, tables

_jit = njit(cache=True, nogil=True, error_model="numpy")

_ACCEPT, _WIDTH, _HEIGHT = tables()
_ONE, _THREE, _EIGHT, _NINE, _ELEVEN, _24, _40 = (np.uint64(n) for n in (1, 3, 8, 9, 11, 24, 40))
_LAYER, _PLACE = np.uint64(0xFF), np.uint64(0x000FFFFFFFFFFFFF)
_UNIT = 2.0**-53


@_jit
def _next(state):
    """Next 64 bits of SFC64; `state` is (a, b, c, counter)."""
    a, b, c, counter = state[0], state[1], state[2], state[3]
    bits = a + b + counter
    state[0] = b ^ (b >> _ELEVEN)
    state[1] = c + (c << _THREE)
    state[2] = ((c << _24) | (c >> _40)) + bits
    state[3] = counter + _ONE
    return bits


@_jit
def _unit(state):
    return (_next(state) >> _ELEVEN) * _UNIT


@_jit
def _second_try(state, bits, x):
    """What follows when the fast test fails: the tail, a wedge, or NaN for a rejection."""
    layer = bits & _LAYER
    if layer == 0:
        while True:
            beyond = -math.log1p(-_unit(state)) / TAIL_START
            if -2.0 * math.log1p(-_unit(state)) > beyond * beyond:
                break
        # A bit of the place, which the draw does not use otherwise, chooses the side.
        side = (bits >> _NINE) & _PLACE
        return -(TAIL_START + beyond) if (side >> _EIGHT) & _ONE else TAIL_START + beyond
    rise = _HEIGHT[layer - _ONE] - _HEIGHT[layer]
    if rise * _unit(state) + _HEIGHT[layer] < math.exp(-0.5 * x * x):
        return x
    return np.nan


@_jit
def fill_normals(state, out):
    """Standard normals into `out` (any length), from SFC64 `state` (4,) uint64, advanced in place.

    The stream of ``numpy.random.Generator(SFC64).standard_normal``, without a call for each draw.
    """
    a, b, c, counter = state[0], state[1], state[2], state[3]
    for i in range(out.size):
        while True:
            bits = a + b + counter
            a = b ^ (b >> _ELEVEN)
            b = c + (c << _THREE)
            c = ((c << _24) | (c >> _40)) + bits
            counter += _ONE
            layer = bits & _LAYER
            place = (bits >> _NINE) & _PLACE
            # Negate without a branch (a random one is mispredicted half the time), and convert
            # from a signed integer, which takes one instruction.
            side = np.int64((bits >> _EIGHT) & _ONE)
            x = ((np.int64(place) ^ -side) + side) * _WIDTH[layer]
            if place >= _ACCEPT[layer]:
                state[0], state[1], state[2], state[3] = a, b, c, counter
                x = _second_try(state, bits, x)
                a, b, c, counter = state[0], state[1], state[2], state[3]
                if math.isnan(x):
                    continue
            out[i] = x
            break
    state[0], state[1], state[2], state[3] = a, b, c, counter


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


# Plain loops on purpose: array expressions multiply the time these kernels take to compile.
@_jit
def _copy(a, out):
    n = a.shape[0]
    for r in range(n):
        for c in range(n):
            out[r, c] = a[r, c]


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
        _copy(matrix[i], a)
        _copy(noise[i], q)
        whole, summed = out_matrix[i], out_noise[i]
        for r in range(n):
            for c in range(n):
                whole[r, c] = 1.0 if r == c else 0.0
                summed[r, c] = 0.0
        left = steps
        while left > 0:
            if left & 1:
                _then(whole, summed, a, q, a2, q2, half)
                _copy(a2, whole)
                _copy(q2, summed)
            left >>= 1
            if left:
                _then(a, q, a, q, a2, q2, half)
                _copy(a2, a)
                _copy(q2, q)


@_jit
def stationary(matrix, noise, out):
    """Fixed point of S = A S A' + Q for every direction by doubling; the caller checks stability.

    Each round squares A, so the error falls as radius^(2^round): 64 rounds reach any radius < 1.
    """
    d, n = matrix.shape[0], matrix.shape[1]
    a, q = np.empty((n, n)), np.empty((n, n))
    a2, q2, half = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    for i in range(d):
        _copy(matrix[i], a)
        _copy(noise[i], q)
        for _ in range(64):
            _then(a, q, a, q, a2, q2, half)
            change, size = 0.0, 0.0
            for r in range(n):
                for c in range(n):
                    change = max(change, abs(q2[r, c] - q[r, c]))
                    size = max(size, abs(q2[r, c]))
            _copy(a2, a)
            _copy(q2, q)
            if change <= 1e-17 * size:
                break
        _copy(q, out[i])


@_jit
def _step_single(keep, push, normal, x):
    for i in range(keep.size):
        x[i, 0] = keep[i] * x[i, 0] + push[i] * normal[i]


@_jit
def _sum_squares(weight, x):
    """Sum of weight x^2 in four interleaved sums, which do not wait for one another."""
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    whole = weight.size - weight.size % 4
    for i in range(0, whole, 4):
        s0 += weight[i] * (x[i, 0] * x[i, 0])
        s1 += weight[i + 1] * (x[i + 1, 0] * x[i + 1, 0])
        s2 += weight[i + 2] * (x[i + 2, 0] * x[i + 2, 0])
        s3 += weight[i + 3] * (x[i + 3, 0] * x[i + 3, 0])
    for i in range(whole, weight.size):
        s0 += weight[i] * (x[i, 0] * x[i, 0])
    return (s0 + s1) + (s2 + s3)


@_jit
def sample_linear(
    generator,
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

    generator : (4,) SFC64 state, in place.
    values : (s, d, nonzeros) entries of [A | C sd(e)] in rows; column : (nonzeros,);
    row : (n + 1,) where each row begins; noise_columns : m.
    record : (T,) index of the output row or -1; readout : (records, n);
    members : (records, K, n); loss, member_loss : (records, R).
    """
    replicas, d, n = state.shape
    z = np.empty(n + noise_columns)
    normal = np.empty(d * noise_columns)
    single = n == 1 and noise_columns == 1 and column.size == 2
    # Contiguous coefficients for the fast path, which is bound by memory and by the draws.
    keep, push = values[:, :, 0].copy(), values[:, :, values.shape[2] - 1].copy()
    for t in range(kind.size):
        v, out = values[kind[t]], record[t]
        for r in range(replicas):
            fill_normals(generator, normal)
            if single:
                _step_single(keep[kind[t]], push[kind[t]], normal, state[r])
                if out >= 0:
                    square = readout[out, 0] ** 2
                    loss[out, r] = square * _sum_squares(weight, state[r])
                    member_loss[out, r] = loss[out, r]  # one coordinate: at most one member
                continue
            for i in range(d):
                for j in range(n):
                    z[j] = state[r, i, j]
                for j in range(noise_columns):
                    z[n + j] = normal[i * noise_columns + j]
                for j in range(n):
                    total = 0.0
                    for p in range(row[j], row[j + 1]):
                        total += v[i, p] * z[column[p]]
                    state[r, i, j] = total
        if out >= 0 and not single:
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
    generator,
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
    """Multiplicative late-phase steps, `generator` as above.

    theta (R, d) and phi (R, K, d) or (R, K, 1) in place.

    noise_sd : (T, d) of one minibatch; base_lr : (T,) with gamma in it; member_lr : (T,).
    record : (T,) index of the output row or -1; loss, member_loss : (records, R).
    """
    replicas, d = theta.shape
    count = phi.shape[1]
    gradient = np.empty((count, d))
    normal = np.empty(count * d)
    for t in range(record.size):
        for r in range(replicas):
            fill_normals(generator, normal)
            for k in range(count):
                for i in range(d):
                    f = phi[r, k, 0 if scalar else i]
                    gradient[k, i] = (
                        curvature[i] * (theta[r, i] * f - minimum[i])
                        + noise_sd[t, i] * normal[k * d + i]
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
                    total = 0.0
                    for i in range(d):
                        total += gradient[k, i]
                    phi[r, k, 0] -= member_lr[t] * total
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

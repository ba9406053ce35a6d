"""All compiled code: functions of plain arrays, independent of the classes of algorithms.

All in one file, because numba's cache on disk does not notice an edit to a compiled function in
another file. NaN semantics are IEEE (no fastmath), so a diverging case stays visible.
Shapes: d directions, n state coordinates, m noise columns, s kinds of step, T steps, R replicas.
Arrays are float64 unless a type is stated.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import warnings
from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic

from nqm.solvers.fast_normals import COS, LANES, LOG, SIN
from nqm.solvers.ziggurat import TAIL_START, tables


@functools.cache
def _say_uncached() -> None:
    """Warn once that nothing is cached; not in workers, whose parent has warned already."""
    if multiprocessing.parent_process() is None:
        text = (
            "no folder for numba's cache can be written to, so every process compiles for some "
            "seconds; set NUMBA_CACHE_DIR to one that can"
        )
        warnings.warn_explicit(text, RuntimeWarning, "nqm", 0)


def _jit(function: Any) -> Any:
    """Compile on first use; cache on disk if a folder can be written to, else in this process."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # "no locator available": no folder can be written to
        _say_uncached()
        return njit(nogil=True, error_model="numpy")(function)


_ACCEPT, _WIDTH, _HEIGHT = tables()
_ONE, _THREE, _EIGHT, _NINE, _ELEVEN, _24, _40 = (np.uint64(n) for n in (1, 3, 8, 9, 11, 24, 40))
_LAYER, _PLACE = np.uint64(0xFF), np.uint64(0x000FFFFFFFFFFFFF)
_UNIT = 2.0**-53
_SPLITTER = 2.0**27 + 1.0
#: Steps that one double carries: their rounding is 7e-12, well below the 1e-9 that is promised.
ONE_DOUBLE = 2**16
#: Largest entry of a power of A that adds nothing to a steady state any more, in any units.
_GONE = 1e-40


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
    """Slow part of the ziggurat: a draw of the tail or of a wedge; NaN for a rejection."""
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
    """Draw standard normals: the stream of ``numpy.random.Generator(SFC64).standard_normal``.

    Parameters
    ----------
    state : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    out : ndarray, any length
        Filled with the draws.
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


# --- Steps that are polynomials in h, many directions at once ------------------------------------
# `WIDE` directions are a row of numbers for each entry of the state, so that every operation runs
# along directions; covariances are packed, entry (i, j <= i) in row i (i + 1) / 2 + j. Rows of
# constant length and, for up to three coordinates, at constant places are what lets the compiler
# use vector instructions without checks.

#: Directions of one block.
WIDE = 128


@_jit
def _packed(i, j):
    return i * (i + 1) // 2 + j if i >= j else j * (j + 1) // 2 + i


@_jit
def _row_times(out, o, a, p, count, x, k):
    """Row o of out = sum over `count` entries from p of a times the rows k[0], k[1], ... of x."""
    if count == 0:
        for i in range(WIDE):
            out[o, i] = 0.0
    elif count == 1:
        k0 = k[0]
        for i in range(WIDE):
            out[o, i] = a[p, i] * x[k0, i]
    else:
        k0, k1 = k[0], k[1]
        for i in range(WIDE):
            out[o, i] = a[p, i] * x[k0, i] + a[p + 1, i] * x[k1, i]
        for e in range(2, count):
            k0 = k[e]
            for i in range(WIDE):
                out[o, i] += a[p + e, i] * x[k0, i]


@_jit
def _conjugate1(a, s):
    for i in range(WIDE):
        s[i] = a[i] * a[i] * s[i]


@_jit
def _conjugate2(a, s):
    for i in range(WIDE):
        a00, a01, a10, a11 = a[i], a[WIDE + i], a[2 * WIDE + i], a[3 * WIDE + i]
        s00, s10, s11 = s[i], s[WIDE + i], s[2 * WIDE + i]
        h00, h01 = a00 * s00 + a01 * s10, a00 * s10 + a01 * s11
        h10, h11 = a10 * s00 + a11 * s10, a10 * s10 + a11 * s11
        s[i] = h00 * a00 + h01 * a01
        s[WIDE + i] = h10 * a00 + h11 * a01
        s[2 * WIDE + i] = h10 * a10 + h11 * a11


@_jit
def _conjugate3(a, s):
    for i in range(WIDE):
        a00, a01, a02 = a[i], a[WIDE + i], a[2 * WIDE + i]
        a10, a11, a12 = a[3 * WIDE + i], a[4 * WIDE + i], a[5 * WIDE + i]
        a20, a21, a22 = a[6 * WIDE + i], a[7 * WIDE + i], a[8 * WIDE + i]
        s00, s10, s11 = s[i], s[WIDE + i], s[2 * WIDE + i]
        s20, s21, s22 = s[3 * WIDE + i], s[4 * WIDE + i], s[5 * WIDE + i]
        h0 = a00 * s00 + a01 * s10 + a02 * s20
        h1 = a00 * s10 + a01 * s11 + a02 * s21
        h2 = a00 * s20 + a01 * s21 + a02 * s22
        s[i] = h0 * a00 + h1 * a01 + h2 * a02
        h0 = a10 * s00 + a11 * s10 + a12 * s20
        h1 = a10 * s10 + a11 * s11 + a12 * s21
        h2 = a10 * s20 + a11 * s21 + a12 * s22
        s[WIDE + i] = h0 * a00 + h1 * a01 + h2 * a02
        s[2 * WIDE + i] = h0 * a10 + h1 * a11 + h2 * a12
        h0 = a20 * s00 + a21 * s10 + a22 * s20
        h1 = a20 * s10 + a21 * s11 + a22 * s21
        h2 = a20 * s20 + a21 * s21 + a22 * s22
        s[3 * WIDE + i] = h0 * a00 + h1 * a01 + h2 * a02
        s[4 * WIDE + i] = h0 * a10 + h1 * a11 + h2 * a12
        s[5 * WIDE + i] = h0 * a20 + h1 * a21 + h2 * a22


@_jit
def _conjugate_rows(a, first, column, packed, half, rows):
    """As the above, for the entries of a sparse A: row p of `a` is its entry p."""
    n = first.size - 1
    for step in range(2):  # half = A S, then S = half A'
        for r in range(n):
            for c in range(n if step == 0 else r + 1):
                o = r if step == 0 else c
                begin, count = first[o], first[o + 1] - first[o]
                for e in range(count):
                    k = column[begin + e]
                    rows[e] = _packed(k, c) if step == 0 else r * n + k
                if step == 0:
                    _row_times(half, r * n + c, a, begin, count, packed, rows)
                else:
                    _row_times(packed, _packed(r, c), a, begin, count, half, rows)


@_jit
def _fill_entry(a, p, table, e, h):
    """Row p of `a`: entry e of A, a polynomial in h, by Horner's rule."""
    c0, c1, c2 = table[0, e], 0.0, 0.0
    if table.shape[0] > 1:
        c1 = table[1, e]
    if table.shape[0] > 2:
        c2 = table[2, e]
    for i in range(WIDE):
        a[p, i] = c0 + h[i] * (c1 + h[i] * c2)


@_jit
def _add_row(out, o, factor, x, k):
    for i in range(WIDE):
        out[o, i] += factor * x[k, i]


@_jit
def _read_rows(read, readout, m, s, q):
    """Rows of `read`: mean of a linear form of the state, and both parts of its variance."""
    read[:] = 0.0
    for r in range(readout.size):
        if readout[r] != 0.0:
            _add_row(read, 0, readout[r], m, r)
            for c in range(r + 1):
                factor = readout[r] * readout[c] * (1.0 if r == c else 2.0)
                if factor != 0.0:
                    _add_row(read, 1, factor, s, _packed(r, c))
                    _add_row(read, 2, factor, q, _packed(r, c))


@_jit
def _move_rows(a, first, column, m, s, q, moving, half, new, rows):
    """One step of mean m, and of covariances s and q without noise, of those that are `moving`."""
    n = first.size - 1
    if moving[0]:
        for r in range(n):
            if n <= 3:
                for c in range(n):
                    rows[c] = c
                _row_times(new, r, a, r * n, n, m, rows)
            else:
                _row_times(new, r, a, first[r], first[r + 1] - first[r], m, column[first[r] :])
        m[:] = new
    for part in range(1, 3):
        x = s if part == 1 else q
        if not moving[part]:
            continue
        if n == 1:
            _conjugate1(a.reshape(-1), x.reshape(-1))
        elif n == 2:
            _conjugate2(a.reshape(-1), x.reshape(-1))
        elif n == 3:
            _conjugate3(a.reshape(-1), x.reshape(-1))
        else:
            _conjugate_rows(a, first, column, x, half, rows)


@_jit
def walk_polynomial(
    table,
    fixed,
    first,
    column,
    driven,
    drive,
    own,
    curvature,
    noise_variance,
    mean,
    started,
    noisy,
    moving,
    readout,
    record,
    sums,
    seen,
    weight,
    square_weight,
    loss,
):
    """Take T steps of the first two moments, whose matrices are polynomials in the curvature.

    Directions lie in b blocks of `WIDE`; those beyond the last one have curvature, noise and state
    0. Covariances are packed: p = n (n + 1) / 2.

    Parameters
    ----------
    table : ndarray, shape (T, degree + 1, e)
        Coefficients of 1, h, h^2 of each entry of A; degree <= 2.
    fixed : ndarray of bool, shape (e,)
        Whether an entry is the same in all T steps.
    first : ndarray of int, shape (n + 1,)
        Index of the first entry of each row of A.
    column : ndarray of int, shape (e,)
        Column of each entry.
    driven : ndarray of int, shape (k, 2)
        Pairs of coordinates (i, j <= i) to whose covariance noise adds.
    drive, own : ndarray, shape (T, k)
        Added covariance per unit of `noise_variance`, and independently of it.
    curvature, noise_variance : ndarray, shape (b, 1, WIDE)
        h, and the variance of the noise of one minibatch of size 1.
    mean : ndarray, shape (b, n, WIDE)
        Mean of the state, changed in place.
    started, noisy : ndarray, shape (b, p, WIDE)
        Covariance due to the start, which no noise drives, and due to noise; changed in place.
    moving : ndarray of bool, shape (3,)
        Whether `mean`, `started` and `noisy` may be other than 0.
    readout : ndarray, shape (T, n)
        Evaluated weights after each step as a linear form of the state, where something is
        recorded.
    record : ndarray of int, shape (T,)
        The row of `sums` and `seen` for the moments after each step, or -1.
    sums : ndarray, shape (records, 4)
        Parts of the loss of the evaluated weights are added to it: of their mean, of their variance
        due to the start and of that due to noise; and the variance of the loss.
    seen : ndarray, shape (2, records, b, WIDE) or (2, 0, b, WIDE)
        Outputs, unless empty: mean and variance of the evaluated weights.
    weight, square_weight : ndarray, shape (d,)
        Loss per unit of second moment, and twice the variance of the loss per unit of squared
        variance.
    loss : ndarray, shape (T,) or (0,)
        The expected loss after each step is added to it, if it is not empty.
    """
    n = mean.shape[1]
    short = n <= 3
    # The rows of A: all of them for a short state, the entries for a longer one.
    a = np.zeros((n * n if short else column.size, WIDE))
    half = np.zeros((1 if short else n * n, WIDE))
    new, read, one = np.zeros((n, WIDE)), np.zeros((3, WIDE)), np.ones((1, WIDE))
    rows, place = np.zeros(n, np.int64), np.arange(column.size)
    if short:
        for r in range(n):
            for e in range(first[r], first[r + 1]):
                place[e] = r * n + column[e]
    for b in range(mean.shape[0]):
        m, s, q, h = mean[b], started[b], noisy[b], curvature[b, 0]
        for t in range(table.shape[0]):
            for e in range(column.size):
                if t == 0 or not fixed[e]:
                    _fill_entry(a, place[e], table[t], e, h)
            _move_rows(a, first, column, m, s, q, moving, half, new, rows)
            for p in range(driven.shape[0]):
                k = _packed(driven[p, 0], driven[p, 1])
                _add_row(q, k, drive[t, p], noise_variance[b], 0)
                if own[t, p] != 0.0:
                    _add_row(q, k, own[t, p], one, 0)
            out = record[t]
            if out < 0 and loss.size == 0:
                continue
            _read_rows(read, readout[t], m, s, q)
            s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
            for i in range(min(WIDE, weight.size - b * WIDE)):
                square, variance = read[0, i] * read[0, i], read[1, i] + read[2, i]
                s0 += weight[b * WIDE + i] * square
                s1 += weight[b * WIDE + i] * read[1, i]
                s2 += weight[b * WIDE + i] * read[2, i]
                s3 += square_weight[b * WIDE + i] * variance * (0.5 * variance + square)
            if loss.size > 0:
                loss[t] += s0 + s1 + s2
            if out >= 0:
                sums[out, 0] += s0
                sums[out, 1] += s1
                sums[out, 2] += s2
                sums[out, 3] += s3
                if seen.shape[1] > 0:
                    for i in range(WIDE):
                        seen[0, out, b, i] = read[0, i]
                        seen[1, out, b, i] = read[1, i] + read[2, i]


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
    """Compose step 1, then step 2, for every direction.

    Parameters
    ----------
    matrix1, noise1, matrix2, noise2 : ndarray, shape (d, n, n)
        A and Q of both steps.
    matrix, noise : ndarray, shape (d, n, n)
        Outputs A and Q; arrays other than the inputs.
    """
    half = np.empty(matrix1.shape[1:])
    for i in range(matrix1.shape[0]):
        _then(matrix1[i], noise1[i], matrix2[i], noise2[i], matrix[i], noise[i], half)


@_jit
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


# --- Equal steps of one or two coordinates at many rates ------------------------------------------
# As `power_exact`, but with directions along vector lanes and from the highest bit of the number of
# steps on: A^2t and Q_2t = Q_t + A^t Q_t A^t' for each bit, one more step for each that is set. An
# error in A^t doubles with every squaring to come, so that the last `_PLAIN` of them need no more
# than one double: theirs is 2^_PLAIN units in the last place, 1e-13.

#: Last squarings, which are done in one double.
_PLAIN = 10
#: Smaller powers of A add nothing to Q, and their squares are 0.
_NOTHING = 1e-155
#: Largest number whose product has two doubles.
_HUGE = 1e290


def _fused(_, a, b, c):
    """Fused a * b + c: see `_rounded_once`."""
    return a(a, a, a), lambda context, builder, signature, args: builder.fma(*args)


_fma64: Any = intrinsic(_fused)


@_jit
def _product2(ah, al, bh, bl):
    """(ah + al)(bh + bl) as high and low, not yet normal."""
    high = ah * bh
    return high, _fma64(ah, bh, -high) + (ah * bl + al * bh)


@_jit
def _sum2(ah, al, bh, bl):
    """Sum of two numbers of two doubles; of one double, if it is not finite or huge."""
    high = ah + bh
    second = high - ah
    low = ((ah - (high - second)) + (bh - second)) + (al + bl)
    total = high + low
    kept = abs(total) < _HUGE
    return (total if kept else high), ((low - (total - high)) if kept else 0.0)


@_jit
def _entry2(c, rate, e, h):
    """Entry e of A at curvature h, by Horner's rule; c (2, L, 3, entries)."""
    high, low = _product2(c[0, rate, 2, e], c[1, rate, 2, e], h, 0.0)
    high, low = _sum2(high, low, c[0, rate, 1, e], c[1, rate, 1, e])
    high, low = _product2(high, low, h, 0.0)
    return _sum2(high, low, c[0, rate, 0, e], c[1, rate, 0, e])


@_jit
def _all_below(values, limit):
    below = True
    for i in range(values.size - 1, -1, -1):
        below = abs(values[i]) < limit
        if not below:
            break
    return below


@_jit
def _rest_below(a, limit):
    return _all_below(a[1], limit) and _all_below(a[2], limit) and _all_below(a[3], limit)


@_jit
def _bits(steps):
    count = 0
    while steps >> count > 0:
        count += 1
    return count


@_jit
def scan1(coefficients, drive, own, steps, curvature, variance, start, weight, bias, noisy):
    """Compute the loss of one coordinate after equal steps, for many rates and directions.

    Parameters
    ----------
    coefficients : ndarray, shape (2, L, 3, 1)
        Of 1, h, h^2 in the entry of A, in two doubles, for each rate.
    drive, own : ndarray, shape (L, 1)
        Q of one step per unit of `variance`, and independently of it.
    steps : int
        Number of steps, >= 1.
    curvature, variance : ndarray, shape (b, LANES)
        h and the variance of a minibatch's noise; 0 beyond the last direction.
    start : ndarray, shape (b, LANES)
        Second moment of the start.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    bias, noisy : ndarray, shape (L,)
        Outputs: loss due to the start and to noise.
    """
    count = _bits(steps)
    ah, al, a1, l1, q, q1 = np.empty((6, LANES))
    s0, s1 = np.empty((2, LANES))
    for rate in range(bias.size):
        s0[:], s1[:] = 0.0, 0.0
        for b in range(curvature.shape[0]):
            h, v = curvature[b], variance[b]
            for i in range(LANES):
                high, low = _entry2(coefficients, rate, 0, h[i])
                ah[i], al[i], a1[i], l1[i] = high, low, high, low
                q1[i] = drive[rate, 0] * v[i] + own[rate, 0]
                q[i] = q1[i]
            for bit in range(count - 2, -1, -1):
                if bit >= _PLAIN:
                    for i in range(LANES):
                        q[i] += ah[i] * ah[i] * q[i]
                        high, low = _product2(ah[i], al[i], ah[i], al[i])
                        ah[i], al[i] = _sum2(high, 0.0, low, 0.0)
                else:
                    for i in range(LANES):
                        square = ah[i] * ah[i]
                        q[i] += square * q[i]
                        ah[i] = square + 2.0 * ah[i] * al[i]
                        al[i] = 0.0
                if (steps >> bit) & 1:
                    for i in range(LANES):
                        q[i] = a1[i] * a1[i] * q[i] + q1[i]
                        high, low = _product2(ah[i], al[i], a1[i], l1[i])
                        ah[i], al[i] = _sum2(high, 0.0, low, 0.0)
                if bit > 0 and _all_below(ah, _NOTHING):
                    ah[:] = 0.0
                    break
            for i in range(min(LANES, weight.size - b * LANES)):
                s0[i] += weight[b * LANES + i] * (ah[i] * ah[i] * start[b, i])
                s1[i] += weight[b * LANES + i] * q[i]
        bias[rate], noisy[rate] = s0.sum(), s1.sum()


@_jit
def _dot2(ah, al, bh, bl, ch, cl, dh, dl):
    """A b + c d, all of two doubles."""
    high, low = _product2(ah, al, bh, bl)
    other, rest = _product2(ch, cl, dh, dl)
    return _sum2(high, low, other, rest)


@_jit
def _step2(a, base, q, first):
    """Lanes of A -> base A and Q -> base Q base' + first; `a`, `base` of two doubles."""
    for i in range(LANES):
        b0, b1, b2, b3 = base[0, i], base[1, i], base[2, i], base[3, i]
        l0, l1, l2, l3 = base[4, i], base[5, i], base[6, i], base[7, i]
        u0, u1 = b0 * q[0, i] + b1 * q[1, i], b0 * q[1, i] + b1 * q[2, i]
        w0, w1 = b2 * q[0, i] + b3 * q[1, i], b2 * q[1, i] + b3 * q[2, i]
        q[0, i] = u0 * b0 + u1 * b1 + first[0, i]
        q[1, i] = u0 * b2 + u1 * b3 + first[1, i]
        q[2, i] = w0 * b2 + w1 * b3 + first[2, i]
        a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
        k0, k1, k2, k3 = a[4, i], a[5, i], a[6, i], a[7, i]
        a[0, i], a[4, i] = _dot2(b0, l0, a0, k0, b1, l1, a2, k2)
        a[1, i], a[5, i] = _dot2(b0, l0, a1, k1, b1, l1, a3, k3)
        a[2, i], a[6, i] = _dot2(b2, l2, a0, k0, b3, l3, a2, k2)
        a[3, i], a[7, i] = _dot2(b2, l2, a1, k1, b3, l3, a3, k3)


@_jit
def _double_noise2(a, q):
    """Lanes of Q -> Q + A Q A'."""
    for i in range(LANES):
        a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
        q0, q1, q2 = q[0, i], q[1, i], q[2, i]
        u0, u1 = a0 * q0 + a1 * q1, a0 * q1 + a1 * q2
        w0, w1 = a2 * q0 + a3 * q1, a2 * q1 + a3 * q2
        q[0, i] = q0 + (u0 * a0 + u1 * a1)
        q[1, i] = q1 + (u0 * a2 + u1 * a3)
        q[2, i] = q2 + (w0 * a2 + w1 * a3)


@_jit
def _square2(a, plain):
    """Lanes of A -> A A, in one double if `plain`."""
    if plain:
        for i in range(LANES):
            a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
            k0, k1, k2, k3 = a[4, i], a[5, i], a[6, i], a[7, i]
            trace, cross = a0 + a3, a1 * a2
            rest, apart = k0 + k3, a1 * k2 + k1 * a2
            a[0, i] = a0 * a0 + cross + (2.0 * a0 * k0 + apart)
            a[1, i] = a1 * trace + (a1 * rest + k1 * trace)
            a[2, i] = a2 * trace + (a2 * rest + k2 * trace)
            a[3, i] = a3 * a3 + cross + (2.0 * a3 * k3 + apart)
            a[4, i], a[5, i], a[6, i], a[7, i] = 0.0, 0.0, 0.0, 0.0
        return
    for i in range(LANES):
        a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
        k0, k1, k2, k3 = a[4, i], a[5, i], a[6, i], a[7, i]
        trace, rest = _sum2(a0, k0, a3, k3)
        cross, apart = _product2(a1, k1, a2, k2)
        high, low = _product2(a0, k0, a0, k0)
        a[0, i], a[4, i] = _sum2(high, low, cross, apart)
        high, low = _product2(a3, k3, a3, k3)
        a[3, i], a[7, i] = _sum2(high, low, cross, apart)
        high, low = _product2(a1, k1, trace, rest)
        a[1, i], a[5, i] = _sum2(high, 0.0, low, 0.0)
        high, low = _product2(a2, k2, trace, rest)
        a[2, i], a[6, i] = _sum2(high, 0.0, low, 0.0)


@_jit
def scan2(
    coefficients, drive, own, steps, curvature, variance, mean, start, read, weight, bias, noisy
):
    """Compute the loss of two coordinates after equal steps, for many rates and directions.

    Parameters
    ----------
    coefficients : ndarray, shape (2, L, 3, 4)
        Of 1, h, h^2 in the entries of A, row by row.
    drive, own : ndarray, shape (L, 3)
        Entries (0, 0), (1, 0) and (1, 1) of Q of one step.
    steps, curvature, variance
        See `scan1`.
    mean, start : ndarray, shape (2, b, LANES) and (3, b, LANES)
        Mean and covariance of the start.
    read : ndarray, shape (2,)
        Evaluated weights as a linear form of the state.
    weight, bias, noisy
        See `scan1`.
    """
    count, c0, c1 = _bits(steps), read[0], read[1]
    a, base = np.empty((8, LANES)), np.empty((8, LANES))
    q, first = np.empty((3, LANES)), np.empty((3, LANES))
    s0, s1 = np.empty((2, LANES))
    for rate in range(bias.size):
        s0[:], s1[:] = 0.0, 0.0
        for b in range(curvature.shape[0]):
            for e in range(4):
                for i in range(LANES):
                    high, low = _entry2(coefficients, rate, e, curvature[b, i])
                    a[e, i], a[4 + e, i], base[e, i], base[4 + e, i] = high, low, high, low
            for e in range(3):
                for i in range(LANES):
                    first[e, i] = drive[rate, e] * variance[b, i] + own[rate, e]
                    q[e, i] = first[e, i]
            for bit in range(count - 2, -1, -1):
                _double_noise2(a, q)
                _square2(a, bit < _PLAIN)
                if (steps >> bit) & 1:
                    _step2(a, base, q, first)
                if bit > 0 and _all_below(a[0], _NOTHING) and _rest_below(a, _NOTHING):
                    a[:] = 0.0
                    break
            for i in range(min(LANES, weight.size - b * LANES)):
                g0, g1 = c0 * a[0, i] + c1 * a[2, i], c0 * a[1, i] + c1 * a[3, i]
                moved = g0 * mean[0, b, i] + g1 * mean[1, b, i]
                spread = g0 * g0 * start[0, b, i] + g1 * g1 * start[2, b, i]
                spread += 2.0 * g0 * g1 * start[1, b, i]
                s0[i] += weight[b * LANES + i] * (moved * moved + spread)
                random = c0 * c0 * q[0, i] + 2.0 * c0 * c1 * q[1, i] + c1 * c1 * q[2, i]
                s1[i] += weight[b * LANES + i] * random
        bias[rate], noisy[rate] = s0.sum(), s1.sum()


# Second moments of two directions i > j at once, S_ij = E z_i z_j' less the means' (d, d, n, n):
# S_ij' = A_i S_ij A_j' + c_ij P_i P_j'. They drive no expected loss, only how losses vary.


@_jit
def _carry_pair(left, pair, right, out, half):
    """`out` = left pair right'; `out` may be `pair`."""
    n = left.shape[0]
    _times(left, pair, half)
    for r in range(n):
        for c in range(n):
            total = 0.0
            for k in range(n):
                total += half[r, k] * right[c, k]
            out[r, c] = total


@_jit
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
                _carry_pair(matrix[k, i], pair, matrix[k, j], pair, half)
                for r in range(n):
                    for q in range(n):
                        total = 0.0
                        for m in range(columns):
                            total += push[k, i, r, m] * push[k, j, q, m]
                        pair[r, q] += c * total


@_jit
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
            _copy(added[i, j], sums)
            left = steps
            for bit in range(squares.shape[0]):
                a, b = squares[bit, i], squares[bit, j]
                if left & 1:
                    _carry_pair(a, pair, b, pair, half)
                    for r in range(n):
                        for c in range(n):
                            pair[r, c] += sums[r, c]
                left >>= 1
                if left == 0:
                    break
                _carry_pair(a, sums, b, next_sums, half)
                for r in range(n):
                    for c in range(n):
                        sums[r, c] += next_sums[r, c]


@_jit
def _add_product(high, low, ah, al, bh, bl):
    """High + low + (ah + al)(bh + bl), all in two doubles: see `nqm.double_double`."""
    product = ah * bh
    scaled = _SPLITTER * ah
    a1 = scaled - (scaled - ah)
    a2 = ah - a1
    scaled = _SPLITTER * bh
    b1 = scaled - (scaled - bh)
    b2 = bh - b1
    rest = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2 + (ah * bl + al * bh)
    total = high + product
    second = total - high
    rest += low + ((high - (total - second)) + (product - second))
    rounded = total + rest
    return rounded, rest - (rounded - total)


@_jit
def _times_exact(a, a_low, b, b_low, out, out_low):
    n = a.shape[0]
    for r in range(n):
        for c in range(n):
            high, low = 0.0, 0.0
            for k in range(n):
                high, low = _add_product(high, low, a[r, k], a_low[r, k], b[k, c], b_low[k, c])
            out[r, c], out_low[r, c] = high, low


@_jit
def compose_exact(matrix1, noise1, low1, matrix2, noise2, low2, matrix, noise, low):
    """Compose as `compose` does, with matrices of two doubles.

    Parameters
    ----------
    matrix1, noise1, low1, matrix2, noise2, low2 : ndarray, shape (d, n, n)
        Both steps; A is matrix + low.
    matrix, noise, low : ndarray, shape (d, n, n)
        Outputs; arrays other than the inputs.
    """
    half, plain = np.empty(matrix1.shape[1:]), np.empty(matrix1.shape[1:])
    for i in range(matrix1.shape[0]):
        _then(matrix1[i], noise1[i], matrix2[i], noise2[i], plain, noise[i], half)
        _times_exact(matrix2[i], low2[i], matrix1[i], low1[i], matrix[i], low[i])
        _keep_finite(plain, matrix[i], low[i])


@_jit
def _keep_finite(plain, matrix, low):
    """Replace entries that overflowed in two doubles by their value in one double."""
    n = plain.shape[0]
    for r in range(n):
        for c in range(n):
            if not (math.isfinite(matrix[r, c]) and math.isfinite(low[r, c])):
                matrix[r, c], low[r, c] = plain[r, c], 0.0


@_jit
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
        _copy(matrix[i], a)
        _copy(low[i], a_low)
        _copy(noise[i], q)
        whole, whole_low, summed = out_matrix[i], out_low[i], out_noise[i]
        _copy(whole, plain)
        for r in range(n):
            for c in range(n):
                whole[r, c] = 1.0 if r == c else 0.0
                whole_low[r, c] = 0.0
                summed[r, c] = 0.0
        left = steps
        while left > 0:
            if left & 1:
                _then(whole, summed, a, q, a2, q2, half)
                _copy(q2, summed)
                _times_exact(a, a_low, whole, whole_low, a2, a2_low)
                _copy(a2, whole)
                _copy(a2_low, whole_low)
            left >>= 1
            if left:
                _then(a, q, a, q, a2, q2, half)
                _copy(q2, q)
                _times_exact(a, a_low, a, a_low, a2, a2_low)
                _copy(a2, a)
                _copy(a2_low, a_low)
        _keep_finite(plain, whole, whole_low)


@_jit
def _size(a):
    """Largest absolute value of an entry."""
    size = 0.0
    for r in range(a.shape[0]):
        for c in range(a.shape[1]):
            size = max(size, abs(a[r, c]))
    return size


@_jit
def _faint_soon(matrix, a, a2):
    """Whether `ONE_DOUBLE` steps reduce any start below 1e-20 of itself."""
    _copy(matrix, a)
    steps = 1
    while steps < ONE_DOUBLE:
        _times(a, a, a2)
        _copy(a2, a)
        steps *= 2
    return _size(a) < 1e-20


@_jit
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
        _copy(matrix[i], a)
        _copy(low[i], a_low)
        _copy(noise[i], q)
        for _ in range(64):
            _then(a, q, a, q, a2, q2, half)
            _copy(q2, q)
            _times_exact(a, a_low, a, a_low, a2, a2_low)
            _copy(a2, a)
            _copy(a2_low, a_low)
            if _size(a) < _GONE:
                break
        _copy(q, out[i])


@_jit
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
        _copy(matrix[i], a)
        _copy(noise[i], q)
        for _ in range(64):
            _then(a, q, a, q, a2, q2, half)
            _copy(a2, a)
            _copy(q2, q)
            if _size(a) < _GONE:
                break
        _copy(q, out[i])


@_jit
def _correlate(root, normal, columns):
    """Correlate independent normals (d * columns,) in place by root (d, r); none if r = 0."""
    rank = root.shape[1]
    if rank == 0:
        return
    for i in range(root.shape[0] - 1, -1, -1):
        for c in range(columns):
            total = 0.0
            for j in range(min(i + 1, rank)):
                total += root[i, j] * normal[j * columns + c]
            normal[i * columns + c] = total


#: Directions and replicas that a step takes together: what it reads stays in the cache.
_PIECE, _GROUP = 256, 2


@_jit
def _rows_of(count, a, p, x, k0, k1, k2, b, new, j):
    """Row j of `new` = rows p, p + 1, ... of a times rows k0, k1, k2 of x, up to `count` terms."""
    if count == 0:
        for i in range(x.shape[2]):
            new[j, i] = 0.0
    elif count == 1:
        for i in range(x.shape[2]):
            new[j, i] = a[p, b, i] * x[k0, b, i]
    elif count == 2:
        for i in range(x.shape[2]):
            new[j, i] = a[p, b, i] * x[k0, b, i] + a[p + 1, b, i] * x[k1, b, i]
    else:
        for i in range(x.shape[2]):
            new[j, i] = (
                a[p, b, i] * x[k0, b, i]
                + a[p + 1, b, i] * x[k1, b, i]
                + a[p + 2, b, i] * x[k2, b, i]
            )


@_jit
def _step_rows(a, column, row, x, at, noise, b, new):
    """Set rows `at`, at + 1, ... of x to A x + C e, with e in its rows from `noise` on."""
    n = row.size - 1
    for j in range(n):
        p, count = row[j], row[j + 1] - row[j]
        c0, c1, c2 = (
            column[p],
            column[min(p + 1, column.size - 1)],
            column[min(p + 2, column.size - 1)],
        )
        k0 = at + c0 if c0 < n else noise + c0 - n
        k1 = at + c1 if c1 < n else noise + c1 - n
        k2 = at + c2 if c2 < n else noise + c2 - n
        _rows_of(count, a, p, x, k0, k1, k2, b, new, j)
        for e in range(p + 3, p + count):
            c0 = column[e]
            k0 = at + c0 if c0 < n else noise + c0 - n
            for i in range(x.shape[2]):
                new[j, i] += a[e, b, i] * x[k0, b, i]
    for j in range(n):
        for i in range(x.shape[2]):
            x[at + j, b, i] = new[j, i]


@_jit
def _step_single(a, x, at, noise, b):
    """As `_step_rows`, of one coordinate and normal: no other row is needed."""
    for i in range(x.shape[2]):
        x[at, b, i] = a[0, b, i] * x[at, b, i] + a[1, b, i] * x[noise, b, i]


@_jit
def _step_pair(a, x, at, noise, b):
    """As `_step_rows`, of two coordinates and a normal, A and C without gaps."""
    for i in range(x.shape[2]):
        x0, x1, e = x[at, b, i], x[at + 1, b, i], x[noise, b, i]
        x[at, b, i] = a[0, b, i] * x0 + a[1, b, i] * x1 + a[2, b, i] * e
        x[at + 1, b, i] = a[3, b, i] * x0 + a[4, b, i] * x1 + a[5, b, i] * e


@_jit
def _step_triple(a, x, at, noise, b):
    """As `_step_pair`, of three coordinates."""
    for i in range(x.shape[2]):
        x0, x1, x2, e = x[at, b, i], x[at + 1, b, i], x[at + 2, b, i], x[noise, b, i]
        x[at, b, i] = a[0, b, i] * x0 + a[1, b, i] * x1 + a[2, b, i] * x2 + a[3, b, i] * e
        x[at + 1, b, i] = a[4, b, i] * x0 + a[5, b, i] * x1 + a[6, b, i] * x2 + a[7, b, i] * e
        x[at + 2, b, i] = a[8, b, i] * x0 + a[9, b, i] * x1 + a[10, b, i] * x2 + a[11, b, i] * e


@_jit
def _step_directions(a, column, row, x, at, noise, noise_columns, new):
    """Take one step of a group of replicas: rows at[g] on of x, and its normals noise[g] on."""
    n = row.size - 1
    whole = noise_columns == 1 and a.shape[0] == n * (n + 1) and n <= 3
    for b in range(x.shape[1]):
        for g in range(at.size):
            if whole and n == 1:
                _step_single(a, x, at[g], noise[g], b)
            elif whole and n == 2:
                _step_pair(a, x, at[g], noise[g], b)
            elif whole:
                _step_triple(a, x, at[g], noise[g], b)
            else:
                _step_rows(a, column, row, x, at[g], noise[g], b, new)


@_jit
def _read_loss(readout, weight, x, at, read):
    """Sum of weight (readout x)^2 of the state in rows `at` on, in four interleaved sums.

    The processor can add these at the same time.
    """
    d = weight.size
    one = True
    for j in range(readout.size):
        if readout[j] != 0.0:
            if one:
                for i in range(d):
                    read[i] = readout[j] * x[at + j, i]
            else:
                for i in range(d):
                    read[i] += readout[j] * x[at + j, i]
            one = False
    if one:
        return 0.0
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    whole = d - d % 4
    for i in range(0, whole, 4):
        s0 += weight[i] * (read[i] * read[i])
        s1 += weight[i + 1] * (read[i + 1] * read[i + 1])
        s2 += weight[i + 2] * (read[i + 2] * read[i + 2])
        s3 += weight[i + 3] * (read[i + 3] * read[i + 3])
    for i in range(whole, d):
        s0 += weight[i] * (read[i] * read[i])
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
    root,
    drawn,
):
    """Simulate T literal steps of a linear method for R replicas.

    Parameters
    ----------
    generator : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    values : ndarray, shape (s, d, nonzeros)
        Nonzero entries of [A | C sd(e)] of each kind of step, row by row.
    column : ndarray of int, shape (nonzeros,)
        Column of each entry.
    row : ndarray of int, shape (n + 1,)
        Index of the first entry of each row.
    noise_columns : int
        m: normals drawn per direction and step.
    kind, record : ndarray of int, shape (T,)
        Kind of each step, and the record after it or -1.
    readout, members : ndarray, shape (records, n) and (records, K, n)
        Evaluated weights and members as linear forms of the state.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    state : ndarray, shape (R, d, n)
        State of each replica, changed in place.
    loss, member_loss : ndarray, shape (records, R)
        Outputs.
    root : ndarray, shape (d, r)
        Root of the noise's correlation matrix; r = 0 for independent directions.
    drawn : int
        Noise columns that are minibatches, the first ones; only these are correlated.
    """
    replicas, d, n = state.shape
    rank, shared = root.shape[1], np.empty(d * drawn)
    normal = np.empty(d * noise_columns)
    # Directions run along the last axis of all that a step reads and writes. One array holds the
    # states and a group's normals: no part of it needs an array of its own, which would cost time.
    pieces = -(-d // _PIECE)
    width = -(-d // pieces)
    across = np.zeros((values.shape[0], values.shape[2], pieces * width))
    for k in range(values.shape[0]):
        for i in range(d):
            for p in range(values.shape[2]):
                across[k, p, i] = values[k, i, p]
    x = np.zeros((replicas * n + _GROUP * noise_columns, pieces * width))
    pieced, new = x.reshape(x.shape[0], pieces, width), np.empty((n, width))
    steps = across.reshape(values.shape[0], values.shape[2], pieces, width)
    for r in range(replicas):
        for i in range(d):
            for j in range(n):
                x[r * n + j, i] = state[r, i, j]
    for t in range(kind.size):
        v, out = steps[kind[t]], record[t]
        for begin in range(0, replicas, _GROUP):
            group = np.arange(min(_GROUP, replicas - begin))
            at, noise = (begin + group) * n, replicas * n + group * noise_columns
            for g in group:
                if noise_columns == 1:
                    fill_normals(generator, x[noise[g], :d])
                    _correlate(root, x[noise[g], :d], drawn)
                    continue
                fill_normals(generator, normal)
                if rank > 0:
                    for i in range(d):
                        for j in range(drawn):
                            shared[i * drawn + j] = normal[i * noise_columns + j]
                    _correlate(root, shared, drawn)
                    for i in range(d):
                        for j in range(drawn):
                            normal[i * noise_columns + j] = shared[i * drawn + j]
                for j in range(noise_columns):
                    for i in range(d):
                        x[noise[g] + j, i] = normal[i * noise_columns + j]
            _step_directions(v, column, row, pieced, at, noise, noise_columns, new)
        if out < 0:
            continue
        for r in range(replicas):
            loss[out, r] = _read_loss(readout[out], weight, x, r * n, normal)
            total = 0.0
            for k in range(members.shape[1]):
                total += _read_loss(members[out, k], weight, x, r * n, normal)
            member_loss[out, r] = total / members.shape[1] if members.shape[1] else np.nan
    for r in range(replicas):
        for i in range(d):
            for j in range(n):
                state[r, i, j] = x[r * n + j, i]


@_jit
def evaluate(state, readout, members, weight, loss, member_loss):
    """Compute the loss of the evaluated weights and the mean loss of the members.

    Parameters
    ----------
    state : ndarray, shape (R, d, n)
        State of each replica.
    readout, members : ndarray, shape (n,) and (K, n)
        Evaluated weights and members as linear forms of the state.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    loss, member_loss : ndarray, shape (R,)
        Outputs; `member_loss` is NaN if K = 0.
    """
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


#: Rules of `sample_optimizer`, in the order of the classes of `nqm.algorithms.sampled`.
CLIPPED, SIGN, ADAM = 0, 1, 2

# --- The linear twin of a method that is not linear: see `nqm.solvers.control_variates` ----------
# `field` (FIELDS, d) holds deterministic numbers of each direction: the mean of the weights, the
# variance of the twin's deviation from it, its covariance with the buffer and the buffer's
# variance, the buffer's mean, three numbers specific to the method, and the twin's coefficients.

_MEAN, _VARIANCE, _CROSS, _BUFFER, _BUFFER_MEAN, _OWN, _SECOND, _APART = range(8)
_PULL, _PUSH, _STEP = 8, 9, 10
FIELDS = 11


@_jit
def _move_twin(field, momentum, noise, delta, buffer):
    """Twin of one replica: b' = momentum b + pull delta + push noise, delta' = delta - step b'."""
    for i in range(delta.size):
        b = momentum * buffer[i] + field[_PULL, i] * delta[i] + field[_PUSH, i] * noise[i]
        buffer[i] = b
        delta[i] -= field[_STEP, i] * b


@_jit
def _move_moments(field, i, momentum, step):
    """Second moments of the twin after that step, exact for noise of variance 1."""
    pull, push = field[_PULL, i], field[_PUSH, i]
    cross = momentum * field[_CROSS, i] + pull * field[_VARIANCE, i]
    own = momentum * momentum * field[_BUFFER, i] + push * push
    own += pull * (momentum * field[_CROSS, i] + cross)
    field[_STEP, i] = step
    field[_VARIANCE, i] += step * (step * own - 2.0 * cross)
    field[_CROSS, i] = cross - step * own
    field[_BUFFER, i] = own


@_jit
def evaluate_twin(field, weight, delta, loss):
    """Compute the loss of every twin and its expectation.

    Parameters
    ----------
    field : ndarray, shape (FIELDS, d)
        Deterministic state of the twin.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    delta : ndarray, shape (R, d)
        Deviation of each twin from the mean.
    loss : ndarray, shape (R,)
        Output.

    Returns
    -------
    float
        Expected loss of the twin.
    """
    for r in range(delta.shape[0]):
        total = 0.0
        for i in range(weight.size):
            x = field[_MEAN, i] + delta[r, i]
            total += weight[i] * (x * x)
        loss[r] = total
    expected = 0.0
    for i in range(weight.size):
        expected += weight[i] * (field[_MEAN, i] * field[_MEAN, i] + field[_VARIANCE, i])
    return expected


@_jit
def _factors_field(field, curvature, minimum, noise_sd, base_lr, member_lr, count):
    """Twin of multiplicative late-phase weights, and the drift of E theta^2 and E phi^2.

    Noise moves the pair along theta phi = w: steps without noise conserve theta^2 / base_lr -
    K phi^2 / member_lr, to which noise adds base_lr G^2 - member_lr theta^2 sum g^2.
    """
    for i in range(curvature.size):
        h, mean, noise = curvature[i], field[_MEAN, i], noise_sd[i] * noise_sd[i]
        theta, phi, apart = field[_OWN, i], field[_SECOND, i], field[_APART, i]
        a, b = member_lr * theta, base_lr * phi
        rate = a + count * b
        joint = h * h * (mean * mean + field[_VARIANCE, i]) + noise / count
        alone = joint + h * h * apart + noise * (1.0 - 1.0 / count)
        field[_PULL, i], field[_PUSH, i] = h, noise_sd[i] / math.sqrt(count)
        _move_moments(field, i, 0.0, rate)
        field[_APART, i] = (1.0 - a * h) ** 2 * apart + a * a * noise * (1.0 - 1.0 / count)
        curved = base_lr * count * member_lr
        field[_MEAN, i] = mean - rate * h * mean + curved * (minimum[i] + mean) * joint
        theta += base_lr * base_lr * count * count * phi * joint
        phi += member_lr * a * alone
        w = minimum[i] + field[_MEAN, i]
        excess, slope = theta * phi - w * w, theta * member_lr + phi * base_lr * count
        root = math.sqrt(max(slope * slope - 4.0 * curved * excess, 0.0))
        slide = 2.0 * excess / (slope + root) if slope + root > 0.0 else 0.0
        field[_OWN, i] = theta - base_lr * count * slide
        field[_SECOND, i] = phi - member_lr * slide


@_jit
def _optimizer_field(
    field, rule, momentum, setting, epsilon, peak, done, curvature, noise_sd, lr, multiplicity
):
    """Twin of one step of `sample_optimizer`, by statistical linearisation; `peak` 2 f(0)."""
    d = curvature.size
    square = 0.0
    for i in range(d):
        h, s = curvature[i], noise_sd[i]
        second = field[_MEAN, i] * field[_MEAN, i] + field[_VARIANCE, i]
        square += multiplicity[i] * (h * h * second + s * s)
    clip = setting / math.sqrt(square) if rule == CLIPPED and square > setting * setting else 1.0
    for i in range(d):
        h, s, mean, variance = curvature[i], noise_sd[i], field[_MEAN, i], field[_VARIANCE, i]
        step = lr
        if rule == ADAM:
            fresh = h * h * (mean * mean + variance) + s * s
            field[_SECOND, i] = setting * field[_SECOND, i] + (1.0 - setting) * fresh
            scale = math.sqrt(field[_SECOND, i] / (1.0 - setting**done)) + epsilon
            step = lr / ((1.0 - momentum**done) * scale)
            field[_PULL, i], field[_PUSH, i] = (1.0 - momentum) * h, (1.0 - momentum) * s
            shift = momentum * field[_BUFFER_MEAN, i] + (1.0 - momentum) * h * mean
            drift = step * shift
        elif rule == SIGN:
            shift = momentum * field[_BUFFER_MEAN, i] + h * mean
            spread = s * s + h * h * variance
            if momentum > 0.0:
                spread += momentum * momentum * field[_BUFFER, i]
                spread += 2.0 * momentum * h * field[_CROSS, i]
            spread = math.sqrt(spread)
            z = shift / spread if spread > 0.0 else (math.inf if shift > 0.0 else -math.inf)
            slope = peak * math.exp(-0.5 * z * z) / spread if spread > 0.0 else 0.0
            drift = lr * math.erf(z / math.sqrt(2.0))
            if momentum > 0.0:
                field[_PULL, i], field[_PUSH, i] = h, s
                step = lr * slope
            else:  # the twin is driven by the sign of the noise
                field[_PULL, i] = slope * h
                agree = math.asin(min(s / spread, 1.0)) if spread > 0.0 else 0.0
                field[_PUSH, i] = 2.0 / math.pi * agree * math.erfc(abs(z) / math.sqrt(2.0))
        else:
            field[_PULL, i], field[_PUSH, i] = clip * h, clip * s
            shift = momentum * field[_BUFFER_MEAN, i] + clip * h * mean
            drift = lr * shift
        field[_BUFFER_MEAN, i] = shift
        field[_MEAN, i] = mean - drift
        _move_moments(field, i, momentum, step)


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
    field,
    delta,
    buffer,
    expected,
    twin_loss,
    root,
):
    """Simulate T steps of multiplicative late-phase weights for R replicas.

    Parameters
    ----------
    generator : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    curvature, minimum : ndarray, shape (d,)
        Hessian eigenvalues h and minimum w*.
    noise_sd : ndarray, shape (T, d)
        Standard deviation of the gradient noise of one minibatch.
    base_lr, member_lr : ndarray, shape (T,)
        gamma times the rate of the base weights, and the rate of the factors.
    scalar : bool
        Whether one factor per member multiplies all directions.
    theta, phi : ndarray, shape (R, d) and (R, K, d), or (R, K, 1) if `scalar`
        Base weights and members' factors, changed in place.
    record : ndarray of int, shape (T,)
        Record after each step, or -1.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    loss, member_loss : ndarray, shape (records, R)
        Outputs.
    field, delta, buffer : ndarray, shape (FIELDS, d), (R, d) and (R, d)
        State of the twins, changed in place; no twins if `delta` is empty.
    expected, twin_loss : ndarray, shape (records,) and (records, R)
        Outputs of the twins.
    root : ndarray, shape (d, r)
        Root of the noise's correlation matrix; r = 0 for independent directions.
    """
    replicas, d = theta.shape
    count = phi.shape[1]
    gradient = np.empty((count, d))
    normal = np.empty(count * d)
    controlled, common = delta.size > 0, np.empty(d)
    for t in range(record.size):
        if controlled:
            _factors_field(field, curvature, minimum, noise_sd[t], base_lr[t], member_lr[t], count)
        for r in range(replicas):
            fill_normals(generator, normal)
            for k in range(count):
                _correlate(root, normal[k * d : (k + 1) * d], 1)
            if controlled:
                common[:] = 0.0
                for k in range(count):
                    for i in range(d):
                        common[i] += normal[k * d + i] / math.sqrt(count)
                _move_twin(field, 0.0, common, delta[r], buffer[r])
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
            if controlled:
                expected[record[t]] = evaluate_twin(field, weight, delta, twin_loss[record[t]])


@_jit
def evaluate_multiplicative(theta, phi, minimum, scalar, weight, loss, member_loss):
    """Compute the loss of the mean model theta * mean phi and the mean loss of the members.

    Parameters
    ----------
    theta, phi : ndarray, shape (R, d) and (R, K, d), or (R, K, 1) if `scalar`
        Base weights and members' factors.
    minimum : ndarray, shape (d,)
        Minimum w*.
    scalar : bool
        Whether one factor per member multiplies all directions.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    loss, member_loss : ndarray, shape (R,)
        Outputs.
    """
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


# --- Two coordinates at constant rates: the search for the fewest steps --------------------------
# d directions, T steps. One direction is z' = A z + b e; with z_0 the start of unit size and c what
# is read, E (c z_T)^2 = (c A^T z_0)^2 + sum over t < T of (c A^t b)^2: two plain trajectories.

#: Smaller responses are set to 0. The fourth power of this is still a normal number; denormal ones
#: would be slow.
_FAINT = 1e-75
#: Steps of the doubling grid are 1 .. 2 _BASE - 1, then _BASE .. 2 _BASE - 1 times powers of two.
_BASE = 16


@_jit
def double_responses(matrix, kick, start, read, started, noisy):
    """Compute squared responses of two coordinates at all steps of the doubling grid.

    Every grid step from 2 _BASE on is twice an earlier one, so each costs one squaring.

    Parameters
    ----------
    matrix, kick : ndarray, shape (d, 2, 2) and (d, 2)
        A, and b of the noise, of one step z' = A z + b e.
    start, read : ndarray, shape (2,)
        z_0 per unit of the start, and the evaluated weights c as a linear form of z.
    started, noisy : ndarray, shape (d, grid)
        Outputs: (c A^t z_0)^2, and the variance of c z_t per unit of noise variance.
    """
    a, b, c, e = np.empty(_BASE), np.empty(_BASE), np.empty(_BASE), np.empty(_BASE)
    p, q, s = np.empty(_BASE), np.empty(_BASE), np.empty(_BASE)
    z0, z1, c0, c1 = start[0], start[1], read[0], read[1]
    rounds = (started.shape[1] - (2 * _BASE - 1)) // _BASE
    for i in range(matrix.shape[0]):
        m00, m01, m10, m11 = matrix[i, 0, 0], matrix[i, 0, 1], matrix[i, 1, 0], matrix[i, 1, 1]
        k0, k1 = kick[i, 0], kick[i, 1]
        a0, b0, e0, d0 = 1.0, 0.0, 0.0, 1.0
        p0, q0, s0 = 0.0, 0.0, 0.0
        for t in range(2 * _BASE - 1):
            a0, b0, e0, d0 = (
                m00 * a0 + m01 * e0,
                m00 * b0 + m01 * d0,
                m10 * a0 + m11 * e0,
                m10 * b0 + m11 * d0,
            )
            u0, u1, w0, w1 = (
                m00 * p0 + m01 * q0,
                m00 * q0 + m01 * s0,
                m10 * p0 + m11 * q0,
                m10 * q0 + m11 * s0,
            )
            p0 = u0 * m00 + u1 * m01 + k0 * k0
            q0 = u0 * m10 + u1 * m11 + k0 * k1
            s0 = w0 * m10 + w1 * m11 + k1 * k1
            y = c0 * (a0 * z0 + b0 * z1) + c1 * (e0 * z0 + d0 * z1)
            started[i, t] = y * y
            noisy[i, t] = c0 * c0 * p0 + 2.0 * c0 * c1 * q0 + c1 * c1 * s0
            if t >= _BASE - 1:
                j = t - (_BASE - 1)
                a[j], b[j], c[j], e[j], p[j], q[j], s[j] = a0, b0, e0, d0, p0, q0, s0
        for r in range(rounds):
            at = 2 * _BASE - 1 + r * _BASE
            for j in range(_BASE):
                a0, b0, e0, d0 = a[j], b[j], c[j], e[j]
                p0, q0, s0 = p[j], q[j], s[j]
                u0, u1 = a0 * p0 + b0 * q0, a0 * q0 + b0 * s0
                w0, w1 = e0 * p0 + d0 * q0, e0 * q0 + d0 * s0
                p[j] = p0 + u0 * a0 + u1 * b0
                q[j] = q0 + u0 * e0 + u1 * d0
                s[j] = s0 + w0 * e0 + w1 * d0
                trace, cross = a0 + d0, b0 * e0
                a0, b0, e0, d0 = a0 * a0 + cross, b0 * trace, e0 * trace, d0 * d0 + cross
                a[j] = a0 if abs(a0) > _FAINT else 0.0
                b[j] = b0 if abs(b0) > _FAINT else 0.0
                c[j] = e0 if abs(e0) > _FAINT else 0.0
                e[j] = d0 if abs(d0) > _FAINT else 0.0
                y = c0 * (a[j] * z0 + b[j] * z1) + c1 * (c[j] * z0 + e[j] * z1)
                started[i, at + j] = y * y
                noisy[i, at + j] = c0 * c0 * p[j] + 2.0 * c0 * c1 * q[j] + c1 * c1 * s[j]


@_jit
def jump_responses(matrix, kick, start, read, steps, state, impulse, noisy):
    """Compute the responses of two coordinates after a number of steps, in O(log steps).

    Parameters
    ----------
    matrix, kick : ndarray, shape (d, 2, 2) and (d, 2)
        A, and b of the noise, of one step z' = A z + b e.
    start, read : ndarray, shape (2,)
        z_0 per unit of the start, and the evaluated weights c as a linear form of z.
    steps : int
        Number of steps, >= 0.
    state, impulse : ndarray, shape (d, 2)
        Outputs: A^steps z_0 and A^steps b.
    noisy : ndarray, shape (d,)
        Output: variance of c z per unit of noise variance.
    """
    c0, c1 = read[0], read[1]
    for i in range(matrix.shape[0]):
        a0, b0, e0, d0 = matrix[i, 0, 0], matrix[i, 0, 1], matrix[i, 1, 0], matrix[i, 1, 1]
        k0, k1 = kick[i, 0], kick[i, 1]
        p0, q0, s0 = k0 * k0, k0 * k1, k1 * k1
        ma, mb, me, md = 1.0, 0.0, 0.0, 1.0
        mp, mq, ms = 0.0, 0.0, 0.0
        left = steps
        while left > 0:
            if left & 1:
                u0, u1 = a0 * mp + b0 * mq, a0 * mq + b0 * ms
                w0, w1 = e0 * mp + d0 * mq, e0 * mq + d0 * ms
                mp, mq, ms = (
                    p0 + u0 * a0 + u1 * b0,
                    q0 + u0 * e0 + u1 * d0,
                    s0 + w0 * e0 + w1 * d0,
                )
                ma, mb, me, md = (
                    a0 * ma + b0 * me,
                    a0 * mb + b0 * md,
                    e0 * ma + d0 * me,
                    e0 * mb + d0 * md,
                )
            left >>= 1
            if left:
                u0, u1 = a0 * p0 + b0 * q0, a0 * q0 + b0 * s0
                w0, w1 = e0 * p0 + d0 * q0, e0 * q0 + d0 * s0
                p0, q0, s0 = (
                    p0 + u0 * a0 + u1 * b0,
                    q0 + u0 * e0 + u1 * d0,
                    s0 + w0 * e0 + w1 * d0,
                )
                trace, cross = a0 + d0, b0 * e0
                a0, b0, e0, d0 = a0 * a0 + cross, b0 * trace, e0 * trace, d0 * d0 + cross
                if abs(a0) + abs(b0) + abs(e0) + abs(d0) < _FAINT:
                    a0, b0, e0, d0 = 0.0, 0.0, 0.0, 0.0
        state[i, 0] = ma * start[0] + mb * start[1]
        state[i, 1] = me * start[0] + md * start[1]
        impulse[i, 0] = ma * k0 + mb * k1
        impulse[i, 1] = me * k0 + md * k1
        noisy[i] = c0 * c0 * mp + 2.0 * c0 * c1 * mq + c1 * c1 * ms


@_jit
def orbit(matrix, state, out):
    """Compute state, A state, A^2 state, ... for every direction.

    Parameters
    ----------
    matrix, state : ndarray, shape (d, 2, 2) and (d, 2)
        A and the first vector.
    out : ndarray, shape (T, d, 2)
        Output; its first row is `state`.
    """
    for i in range(matrix.shape[0]):
        a, b, c, e = matrix[i, 0, 0], matrix[i, 0, 1], matrix[i, 1, 0], matrix[i, 1, 1]
        x, y = state[i, 0], state[i, 1]
        for t in range(out.shape[0]):
            out[t, i, 0], out[t, i, 1] = x, y
            x, y = a * x + b * y, c * x + e * y
            x = x if abs(x) > _FAINT else 0.0
            y = y if abs(y) > _FAINT else 0.0


# --- The law of the loss: see `nqm.distribution` --------------------------------------------------
# A direction of multiplicity n has the generating function (1 - u)^(-n/2) exp(n shift t / (1 - u))
# with u = 2 spread t. Factors of equal n are multiplied; their product has one logarithm, whose
# angle only falls, by less than pi with each factor of Im t >= 0, so that its turns can be counted.

#: Nodes of one block.
NODES = 64
#: A product outside of 1 / _FAR .. _FAR is scaled, at every fourth factor; the largest |u|.
_FAR, LARGEST_U = 1e60, 1e30
#: Directions of |u| below this are summed by a series.
SMALL_U = 0.3


@_jit
def _rescale(pr, pi, scale):
    for k in range(NODES):
        size = abs(pr[k]) + abs(pi[k])
        if size > _FAR or size < 1.0 / _FAR:
            scale[k] += math.log(size)
            pr[k] /= size
            pi[k] /= size


@_jit
def cumulants(count, spread, shift, series, centred, real, imaginary, out_real, out_imaginary):
    """Compute the cumulant generating function of the loss at complex t, Im t >= 0.

    Parameters
    ----------
    count, spread, shift : ndarray, shape (d,)
        n, spread and place of `nqm.distribution`, the largest spread first, of |2 spread t| below
        `LARGEST_U`.
    series : ndarray, shape (terms, d + 1)
        Column j holds the power series in t of the sum over directions j, j + 1, ...
    centred : bool
        Whether t times the mean is left out.
    real, imaginary : ndarray, shape (k,)
        t; k a multiple of 64.
    out_real, out_imaginary : ndarray, shape (k,)
        Outputs.
    """
    d = spread.size
    pr, pi, scale, turns = np.empty((4, NODES))
    ar, ai = np.empty((2, NODES))
    for first in range(0, real.size, NODES):
        x, y = real[first : first + NODES], imaginary[first : first + NODES]
        linear, largest = 0.0, 0.0
        for k in range(NODES):
            pr[k], pi[k], scale[k], turns[k] = 1.0, 0.0, 0.0, 0.0
            ar[k], ai[k] = 0.0, 0.0
            largest = max(largest, math.hypot(x[k], y[k]))
        near = d
        while near > 0 and 2.0 * spread[near - 1] * largest < SMALL_U:
            near -= 1
        for p in range(series.shape[0] - 1, -1, -1):
            c = 0.0 if centred and p == 1 else series[p, near]
            for k in range(NODES):
                old = ar[k]
                ar[k] = old * x[k] - ai[k] * y[k] + c
                ai[k] = old * y[k] + ai[k] * x[k]
        for i in range(near):
            a, b, n = 2.0 * spread[i], count[i] * shift[i], count[i]
            linear += n * a
            for k in range(NODES):
                fr, fi, old = 1.0 - a * x[k], -a * y[k], pi[k]
                pi[k] = pr[k] * fi + old * fr
                pr[k] = pr[k] * fr - old * fi
                turns[k] += 1.0 if (old < 0.0) & (pi[k] >= 0.0) else 0.0
            if b != 0.0:
                for k in range(NODES):
                    fr, fi = 1.0 - a * x[k], a * y[k]
                    g = b / (fr * fr + fi * fi)
                    qr, qi = g * (x[k] * fr - y[k] * fi), g * (x[k] * fi + y[k] * fr)
                    if centred:
                        qr, qi = a * (qr * x[k] - qi * y[k]), a * (qr * y[k] + qi * x[k])
                    ar[k] += qr
                    ai[k] += qi
            last = i == near - 1 or count[i + 1] != n
            if i % 4 == 3 or last:
                _rescale(pr, pi, scale)
            if last:
                for k in range(NODES):
                    size = 0.5 * math.log(pr[k] * pr[k] + pi[k] * pi[k]) + scale[k]
                    ar[k] -= 0.5 * n * size
                    ai[k] -= 0.5 * n * (math.atan2(pi[k], pr[k]) - 2.0 * math.pi * turns[k])
                    pr[k], pi[k], scale[k], turns[k] = 1.0, 0.0, 0.0, 0.0
        for k in range(NODES):
            linear_part = 0.5 * linear if centred else 0.0
            out_real[first + k] = ar[k] - linear_part * x[k]
            out_imaginary[first + k] = ai[k] - linear_part * y[k]


@_jit
def cumulants_around(count, spread, shift, real, imaginary, out):
    """Compute the derivatives of the cumulant generating function at one complex t.

    Parameters
    ----------
    count, spread, shift : ndarray, shape (d,)
        n, spread and place of `nqm.distribution`.
    real, imaginary : float
        t.
    out : ndarray, shape (7,)
        Outputs: real part of K(t); K' and K'' as real and imaginary parts; the same sum as K
        without the parts linear in t; and the distance from t to the closest singularity.
    """
    value, linear = 0.0, 0.0
    s1r, s1i, s2r, s2i = 0.0, 0.0, 0.0, 0.0
    nearest = math.inf
    product, before = 1.0, -1.0
    for i in range(spread.size):
        a, n = spread[i], count[i]
        fr, fi = 1.0 - 2.0 * a * real, -2.0 * a * imaginary
        size = fr * fr + fi * fi
        rr, ri = fr / size, -fi / size
        if n != before or product > _FAR or product < 1.0 / _FAR:
            value -= 0.25 * before * math.log(product)
            product, before = 1.0, n
        product *= size
        nearest = min(nearest, 0.25 * size / (a * a))
        # s = spread r, p = shift r^2: K' = s + p, K'' = 2 s (s + 2 p).
        sr, si = a * rr, a * ri
        pr, pi = shift[i] * (rr * rr - ri * ri), 2.0 * shift[i] * rr * ri
        s1r += n * (sr + pr)
        s1i += n * (si + pi)
        tr, ti = sr + 2.0 * pr, si + 2.0 * pi
        s2r += 2.0 * n * (sr * tr - si * ti)
        s2i += 2.0 * n * (sr * ti + si * tr)
        value += n * shift[i] * (real * rr - imaginary * ri)
        linear += n * (a + shift[i])
    value -= 0.25 * before * math.log(product)
    out[0], out[1], out[2], out[3], out[4] = value, s1r, s1i, s2r, s2i
    out[5], out[6] = value - linear * real, math.sqrt(nearest)


@_jit
def cumulant_slope(count, spread, shift, t, centred):
    """Compute the derivative of the cumulant generating function at real t, less the mean.

    Parameters
    ----------
    count, spread, shift : ndarray, shape (d,)
        n, spread and place of `nqm.distribution`.
    t : float
    centred : bool
        Whether the mean is subtracted, without a loss of digits.

    Returns
    -------
    float
    """
    total = 0.0
    for i in range(spread.size):
        u = 2.0 * spread[i] * t
        r = 1.0 / (1.0 - u)
        if centred:
            total += count[i] * (u * r * (spread[i] + shift[i] * (2.0 - u) * r))
        else:
            total += count[i] * r * (spread[i] + shift[i] * r)
    return total


# --- Optimizers that are not linear, stochastic rounding, heavy-tailed noise ---------------------


@_jit
def _student(state, dof):
    """Student's t by the polar method of Bailey (1994), scaled to unit variance; dof > 2."""
    radius = math.sqrt((dof - 2.0) * math.expm1(-2.0 / dof * math.log1p(-_unit(state))))
    return radius * math.cos(2.0 * math.pi * _unit(state))


@_jit
def sample_optimizer(
    generator,
    rule,
    momentum,
    setting,
    epsilon,
    dof,
    pitch,
    age,
    curvature,
    minimum,
    noise_sd,
    lr,
    multiplicity,
    x,
    first,
    second,
    record,
    loss,
    field,
    delta,
    buffer,
    expected,
    twin_loss,
    peak,
    root,
):
    """Simulate T steps of clipped SGD, sign SGD or Adam for R replicas.

    Parameters
    ----------
    generator : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    rule : {CLIPPED, SIGN, ADAM}
        Update rule.
    momentum, setting, epsilon : float
        Momentum (Adam: beta1); clipping threshold or Adam's beta2; Adam's epsilon.
    dof : float
        Degrees of freedom of Student's t noise; inf for normal noise.
    pitch : float
        Spacing of the grid to which weights are rounded stochastically; 0 for no rounding.
    age : int
        Steps taken before.
    curvature, minimum : ndarray, shape (d,)
        Hessian eigenvalues h and minimum w*.
    noise_sd : ndarray, shape (T, d)
        Standard deviation of the gradient noise of one minibatch.
    lr : ndarray, shape (T,)
        Learning rate of each step.
    multiplicity : ndarray, shape (d,)
        Number of directions that each one stands for.
    x, first, second : ndarray, shape (R, d)
        Distance from the minimum, and the two buffers of the rule, changed in place.
    record : ndarray of int, shape (T,)
        Record after each step, or -1.
    loss : ndarray, shape (records, R)
        Output.
    field, delta, buffer : ndarray, shape (FIELDS, d), (R, d) and (R, d)
        State of the twins, changed in place; no twins if `delta` is empty.
    expected, twin_loss : ndarray, shape (records,) and (records, R)
        Outputs of the twins.
    peak : float
        Twice the density at 0 of the noise, of variance 1.
    root : ndarray, shape (d, r)
        Root of the correlation matrix of normal noise; r = 0 for independent directions.
    """
    replicas, d = x.shape
    gradient = np.empty(d)
    controlled, signs = delta.size > 0, rule == SIGN and momentum == 0.0
    weight, driving = 0.5 * multiplicity * curvature, np.empty(d)
    for t in range(record.size):
        done = age + t + 1
        if controlled:
            _optimizer_field(
                field,
                rule,
                momentum,
                setting,
                epsilon,
                peak,
                done,
                curvature,
                noise_sd[t],
                lr[t],
                multiplicity,
            )
        for r in range(replicas):
            if math.isinf(dof):
                fill_normals(generator, gradient)
                _correlate(root, gradient, 1)
            else:
                for i in range(d):
                    gradient[i] = _student(generator, dof)
            if controlled:
                for i in range(d):
                    driving[i] = math.copysign(1.0, gradient[i]) if signs else gradient[i]
                _move_twin(field, momentum, driving, delta[r], buffer[r])
            square = 0.0
            for i in range(d):
                gradient[i] = curvature[i] * x[r, i] + noise_sd[t, i] * gradient[i]
                square += multiplicity[i] * gradient[i] * gradient[i]
            norm = math.sqrt(square)
            clip = setting / norm if rule == CLIPPED and norm > setting else 1.0
            for i in range(d):
                g = clip * gradient[i]
                if rule == ADAM:
                    first[r, i] = momentum * first[r, i] + (1.0 - momentum) * g
                    second[r, i] = setting * second[r, i] + (1.0 - setting) * g * g
                    mean = first[r, i] / (1.0 - momentum**done)
                    scale = math.sqrt(second[r, i] / (1.0 - setting**done)) + epsilon
                    step = mean / scale
                else:
                    step = momentum * first[r, i] + g
                    first[r, i] = step
                    if rule == SIGN:
                        step = 1.0 if step > 0.0 else (-1.0 if step < 0.0 else step)
                x[r, i] -= lr[t] * step
                if pitch > 0.0:
                    cell = (x[r, i] + minimum[i]) / pitch
                    low = math.floor(cell) if math.isfinite(cell) else cell
                    up = 1.0 if _unit(generator) < cell - low else 0.0
                    x[r, i] = (low + up) * pitch - minimum[i]
            if record[t] >= 0:
                total = 0.0
                for i in range(d):
                    total += 0.5 * multiplicity[i] * curvature[i] * (x[r, i] * x[r, i])
                loss[record[t], r] = total
        if controlled and record[t] >= 0:
            expected[record[t]] = evaluate_twin(field, weight, delta, twin_loss[record[t]])


# --- Monte Carlo with single-precision normals: one lane per replica -----------------------------
# Lanes are the last axis of every array here, so that each inner loop is one of vector instructions
# without any reassociation (short ones over a `width` known only when they run: the compiler would
# unroll a known one before it could vectorise it). Casts keep integers at 32 bits.
# See `nqm.solvers.fast_normals`.

#: Steps whose normals are drawn at once; even. Normals and losses of a tile stay in the L1 cache.
_TILE = 32
_U1, _U3, _U7, _U9, _U11, _U21, _U25 = (np.uint32(n) for n in (1, 3, 7, 9, 11, 21, 25))
_U29, _U30, _SIGN = np.uint32(29), np.uint32(30), np.uint32(0x80000000)
_F1, _F_2, _ROOT_HALF = np.float32(1.0), np.float32(-2.0), np.int32(0x3F3504F3)
_U_STEP, _U_HALF, _T_STEP, _T_HALF = (np.float32(2.0**-n) for n in (31, 32, 29, 30))
# Minus twice the logarithm is what is wanted.
_W0, _W1, _W2, _W3, _W4, _W5, _W6 = (np.float32(-2.0 * c) for c in LOG)
_W_LN2 = np.float32(-2.0 * math.log(2.0))
_S0, _S1, _S2, _S3 = (np.float32(c) for c in SIN)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in COS)


def _rounded_once(_, a, b, c):
    """Fused a * b + c as an explicit instruction: the compiler may not fuse on its own."""
    return a(a, a, a), lambda context, builder, signature, args: builder.fma(*args)


_fma: Any = intrinsic(_rounded_once)


@_jit
def _xoshiro(a, b, c, d):
    """32 bits of xoshiro128++ and the next state."""
    total = np.uint32(a + d)
    bits = np.uint32(np.uint32(np.uint32(total << _U7) | np.uint32(total >> _U25)) + a)
    shifted = np.uint32(b << _U9)
    c, d = np.uint32(c ^ a), np.uint32(d ^ b)
    b, a = np.uint32(b ^ c), np.uint32(a ^ d)
    c = np.uint32(c ^ shifted)
    d = np.uint32(np.uint32(d << _U11) | np.uint32(d >> _U21))
    return bits, a, b, c, d


@_jit
def _box_muller(p, q):
    """Two normals: p chooses the radius, q an angle below pi/4, the octant by its last bits."""
    u = _fma(np.float32(np.int32(p >> _U1)), _U_STEP, _U_HALF)
    bits = np.float32(u).view(np.int32)
    exponent = np.int32(np.int32(bits - _ROOT_HALF) >> 23)
    f = np.int32(bits - np.int32(exponent << 23)).view(np.float32) - _F1
    w = _fma(f, _fma(f, _fma(f, _fma(f, _fma(f, _fma(f, _W6, _W5), _W4), _W3), _W2), _W1), _W0)
    radius = math.sqrt(_fma(np.float32(exponent), _W_LN2, f * _fma(f, _fma(f, w, _F1), _F_2)))
    t = _fma(np.float32(np.int32(q >> _U3)), _T_STEP, _T_HALF)
    y = t * t
    sine = radius * (t * _fma(y, _fma(y, _fma(y, _S3, _S2), _S1), _S0))
    cosine = radius * _fma(y, _fma(y, _fma(y, _C3, _C2), _C1), _C0)
    swap = (q & _U1) != 0
    first, second = (sine, cosine) if swap else (cosine, sine)
    first = np.uint32(np.float32(first).view(np.uint32) ^ np.uint32(np.uint32(q << _U30) & _SIGN))
    second = np.uint32(np.float32(second).view(np.uint32) ^ np.uint32(np.uint32(q << _U29) & _SIGN))
    return np.uint32(first).view(np.float32), np.uint32(second).view(np.float32)


@_jit
def fill_lanes(lanes, out):
    """Draw single-precision standard normals, one stream per lane.

    Parameters
    ----------
    lanes : ndarray of uint32, shape (4, LANES)
        xoshiro128++ states, advanced in place.
    out : ndarray of float32, shape (even, LANES)
        Filled with the draws.
    """
    for j in range(0, out.shape[0], 2):
        for r in range(LANES):
            a, b, c, d = lanes[0, r], lanes[1, r], lanes[2, r], lanes[3, r]
            p, a, b, c, d = _xoshiro(a, b, c, d)
            q, a, b, c, d = _xoshiro(a, b, c, d)
            lanes[0, r], lanes[1, r], lanes[2, r], lanes[3, r] = a, b, c, d
            out[j, r], out[j + 1, r] = _box_muller(p, q)


@_jit
def _advance_lanes(values, column, row, normal, first, new, x):
    """Set x to A x + C e for every lane; x, `new` (n, LANES), e from row `first` of `normal`."""
    n, width = x.shape
    for j in range(n):
        if row[j] == row[j + 1]:
            for r in range(width):
                new[j, r] = 0.0
        for p in range(row[j], row[j + 1]):
            v, c = values[p], column[p]
            if p == row[j]:
                if c < n:
                    for r in range(width):
                        new[j, r] = v * x[c, r]
                else:
                    for r in range(width):
                        new[j, r] = v * normal[first + c - n, r]
            elif c < n:
                for r in range(width):
                    new[j, r] += v * x[c, r]
            else:
                for r in range(width):
                    new[j, r] += v * normal[first + c - n, r]
    for j in range(n):
        for r in range(width):
            x[j, r] = new[j, r]


@_jit
def _add_loss(readout, weight, x, read, loss):
    """Add weight (readout x)^2 of every lane to `loss` (LANES,)."""
    for r in range(read.size):
        read[r] = 0.0
    for j in range(x.shape[0]):
        c = readout[j]
        if c != 0.0:
            for r in range(read.size):
                read[r] += c * x[j, r]
    for r in range(read.size):
        loss[r] += weight * (read[r] * read[r])


@_jit
def sample_lanes(
    lanes,
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
    """Simulate as `sample_linear` does, for LANES replicas at once with float32 normals.

    Parameters
    ----------
    lanes : ndarray of uint32, shape (4, LANES)
        xoshiro128++ states, advanced in place.
    values : ndarray, shape (d, s, nonzeros)
        Nonzero entries of [A | C sd(e)]; directions first, unlike in `sample_linear`.
    column, row, noise_columns, kind, record, readout, members, weight
        See `sample_linear`.
    state : ndarray, shape (d, n, LANES)
        State of each replica, changed in place.
    loss, member_loss : ndarray, shape (records, LANES)
        Outputs; zero before the call.
    """
    d, n, width = state.shape
    count = members.shape[1]
    normal = np.empty((_TILE * noise_columns, width), dtype=np.float32)
    new, read = np.empty((n, width)), np.empty(width)
    # Short states take several steps in one pass over the lanes, so that it pays to begin one.
    whole = noise_columns == 1 and n <= 3 and column.size == n * (n + 1)
    for first in range(0, kind.size, _TILE):
        last = min(first + _TILE, kind.size)
        drawn = (last - first) * noise_columns
        for i in range(d):
            fill_lanes(lanes, normal[: drawn + drawn % 2])
            x, a, t = state[i], values[i], first
            while t < last:
                out, e, added = record[t], t - first, False
                if whole and t + 3 < last and record[t] + record[t + 1] + record[t + 2] == -3:
                    k0, k1, k2, k3 = kind[t], kind[t + 1], kind[t + 2], kind[t + 3]
                    if n == 1:
                        _four_singles(a, k0, k1, k2, k3, normal, e, x)
                    elif n == 2:
                        _two_pairs(a, k0, k1, normal, e, x)
                        _two_pairs(a, k2, k3, normal, e + 2, x)
                    else:
                        for s in range(4):
                            _one_triple(a, kind[t + s], normal, e + s, x)
                    t, out = t + 4, record[t + 3]
                elif whole and n == 1 and out >= 0:
                    keep, push = a[kind[t], 0], a[kind[t], 1]
                    c = weight[i] * (readout[out, 0] * readout[out, 0])
                    for r in range(width):
                        y = keep * x[0, r] + push * normal[e, r]
                        x[0, r] = y
                        loss[out, r] += c * (y * y)
                    t, added = t + 1, True
                else:
                    _advance_lanes(a[kind[t]], column, row, normal, e * noise_columns, new, x)
                    t += 1
                if out < 0:
                    continue
                if not added:
                    _add_loss(readout[out], weight[i], x, read, loss[out])
                for k in range(count):
                    _add_loss(members[out, k], weight[i] / count, x, read, member_loss[out])


@_jit
def _four_singles(a, k0, k1, k2, k3, normal, e, x):
    """Take four steps of one coordinate, with the kinds k0, ... and the normals from row e on."""
    b0, b1, b2, b3 = a[k0, 0], a[k1, 0], a[k2, 0], a[k3, 0]
    c0, c1, c2, c3 = a[k0, 1], a[k1, 1], a[k2, 1], a[k3, 1]
    for r in range(x.shape[1]):
        y = b0 * x[0, r] + c0 * normal[e, r]
        y = b1 * y + c1 * normal[e + 1, r]
        y = b2 * y + c2 * normal[e + 2, r]
        x[0, r] = b3 * y + c3 * normal[e + 3, r]


@_jit
def _two_pairs(a, k, m, normal, e, x):
    """Take two steps of two coordinates, with the kinds k and m."""
    a0, a1, a2, a3, a4, a5 = a[k, 0], a[k, 1], a[k, 2], a[k, 3], a[k, 4], a[k, 5]
    b0, b1, b2, b3, b4, b5 = a[m, 0], a[m, 1], a[m, 2], a[m, 3], a[m, 4], a[m, 5]
    for r in range(x.shape[1]):
        y, z, g = x[0, r], x[1, r], normal[e, r]
        y, z = a0 * y + a1 * z + a2 * g, a3 * y + a4 * z + a5 * g
        g = normal[e + 1, r]
        x[0, r] = b0 * y + b1 * z + b2 * g
        x[1, r] = b3 * y + b4 * z + b5 * g


@_jit
def _one_triple(a, k, normal, e, x):
    """Take a step of three coordinates."""
    a0, a1, a2, a3 = a[k, 0], a[k, 1], a[k, 2], a[k, 3]
    b0, b1, b2, b3 = a[k, 4], a[k, 5], a[k, 6], a[k, 7]
    c0, c1, c2, c3 = a[k, 8], a[k, 9], a[k, 10], a[k, 11]
    for r in range(x.shape[1]):
        w, y, z, g = x[0, r], x[1, r], x[2, r], normal[e, r]
        x[0, r] = a0 * w + a1 * y + a2 * z + a3 * g
        x[1, r] = b0 * w + b1 * y + b2 * z + b3 * g
        x[2, r] = c0 * w + c1 * y + c2 * z + c3 * g


@_jit
def momentum_average(lr, momentum, share, noise, curvature, variance, start, weight, slope):
    """Final loss of an average of heavy ball, and its derivatives by the settings of every step.

    b' = momentum b + h x + e;  x' = x - lr b';  y' = (1 - share) y + share x'; y is evaluated.

    Parameters
    ----------
    lr, momentum, share, noise : ndarray, shape (T,)
        Settings of each step; `noise` is 1 / batch size.
    curvature, variance, start, weight : ndarray, shape (d,)
        h, noise of one example, second moment of the start, and weight of E y^2 in the loss.
    slope : ndarray, shape (4, T)
        Output: derivatives by the four settings; zero before the call.

    Returns
    -------
    float
        Expected loss of y after the last step.
    """
    steps = lr.size
    held = np.empty((steps, 9))  # xx, xb, bb, xy, by, yy before; b'b', xb', yb' after
    loss = 0.0
    for i in range(curvature.size):
        h, v = curvature[i], variance[i]
        xx, xb, bb = start[i], 0.0, 0.0
        xy, by, yy = start[i], 0.0, start[i]
        for t in range(steps):
            rate, m, c = lr[t], momentum[t], share[t]
            bb1 = h * h * xx + 2.0 * h * m * xb + m * m * bb + noise[t] * v
            xb1 = h * xx + m * xb
            yb1 = h * xy + m * by
            held[t, 0], held[t, 1], held[t, 2] = xx, xb, bb
            held[t, 3], held[t, 4], held[t, 5] = xy, by, yy
            held[t, 6], held[t, 7], held[t, 8] = bb1, xb1, yb1
            xx = xx - 2.0 * rate * xb1 + rate * rate * bb1
            xb, bb = xb1 - rate * bb1, bb1
            moved = xy - rate * yb1
            yy = (1.0 - c) ** 2 * yy + 2.0 * c * (1.0 - c) * moved + c * c * xx
            xy = (1.0 - c) * moved + c * xx
            by = (1.0 - c) * yb1 + c * xb
        loss += weight[i] * yy
        p_xx, p_xb, p_bb, p_xy, p_by, p_yy = 0.0, 0.0, 0.0, 0.0, 0.0, weight[i]
        for t in range(steps - 1, -1, -1):
            rate, m, c = lr[t], momentum[t], share[t]
            xx, xb, bb = held[t, 0], held[t, 1], held[t, 2]
            xy, by, yy = held[t, 3], held[t, 4], held[t, 5]
            bb1, xb1, yb1 = held[t, 6], held[t, 7], held[t, 8]
            xx1 = xx - 2.0 * rate * xb1 + rate * rate * bb1
            moved = xy - rate * yb1
            q = 1.0 - c
            slope[2, t] += (
                p_xy * (xx1 - moved)
                + p_by * (xb1 - rate * bb1 - yb1)
                + 2.0 * p_yy * (-q * yy + (q - c) * moved + c * xx1)
            )
            p_moved = q * p_xy + 2.0 * c * q * p_yy
            p_xx1 = p_xx + c * p_xy + c * c * p_yy
            p_x1b1 = p_xb + c * p_by
            slope[0, t] += 2.0 * p_xx1 * (rate * bb1 - xb1) - p_x1b1 * bb1 - p_moved * yb1
            p_bb1 = p_bb + rate * rate * p_xx1 - rate * p_x1b1
            p_xb1 = p_x1b1 - 2.0 * rate * p_xx1
            p_yb1 = q * p_by - rate * p_moved
            slope[1, t] += 2.0 * p_bb1 * (h * xb + m * bb) + p_xb1 * xb + p_yb1 * by
            slope[3, t] += p_bb1 * v
            p_xx = p_xx1 + h * h * p_bb1 + h * p_xb1
            p_xb = 2.0 * h * m * p_bb1 + m * p_xb1
            p_bb = m * m * p_bb1
            p_xy = p_moved + h * p_yb1
            p_by = m * p_yb1
            p_yy = q * q * p_yy
    return loss

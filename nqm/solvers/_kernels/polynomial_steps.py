"""The first two moments step by step, where matrices are polynomials in the curvature.

`WIDE` directions are a row of numbers for each entry of the state, so that every operation runs
along directions; covariances are packed, entry (i, j <= i) in row i (i + 1) / 2 + j. Rows of
constant length and, for up to three coordinates, at constant places are what lets the compiler
use vector instructions without checks.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit

#: Directions of one block.
WIDE = 128


@jit
def _packed(i, j):
    return i * (i + 1) // 2 + j if i >= j else j * (j + 1) // 2 + i


@jit
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


@jit
def _conjugate1(a, s):
    for i in range(WIDE):
        s[i] = a[i] * a[i] * s[i]


@jit
def _conjugate2(a, s):
    for i in range(WIDE):
        a00, a01, a10, a11 = a[i], a[WIDE + i], a[2 * WIDE + i], a[3 * WIDE + i]
        s00, s10, s11 = s[i], s[WIDE + i], s[2 * WIDE + i]
        h00, h01 = a00 * s00 + a01 * s10, a00 * s10 + a01 * s11
        h10, h11 = a10 * s00 + a11 * s10, a10 * s10 + a11 * s11
        s[i] = h00 * a00 + h01 * a01
        s[WIDE + i] = h10 * a00 + h11 * a01
        s[2 * WIDE + i] = h10 * a10 + h11 * a11


@jit
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


@jit
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


@jit
def _fill_entry(a, p, table, e, h):
    """Row p of `a`: entry e of A, a polynomial in h, by Horner's rule."""
    c0, c1, c2 = table[0, e], 0.0, 0.0
    if table.shape[0] > 1:
        c1 = table[1, e]
    if table.shape[0] > 2:
        c2 = table[2, e]
    for i in range(WIDE):
        a[p, i] = c0 + h[i] * (c1 + h[i] * c2)


@jit
def _add_row(out, o, factor, x, k):
    for i in range(WIDE):
        out[o, i] += factor * x[k, i]


@jit
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


@jit
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


@jit
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

"""The first two moments step by step, where matrices are polynomials in the curvature.

`WIDE` directions are a row of numbers for each entry of the state, so that every operation runs
along directions; covariances are packed, entry (i, j <= i) in row i (i + 1) / 2 + j. Rows of
constant length and, for up to three coordinates, at constant places are what lets the compiler
use vector instructions without checks.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import fma, jit

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
            out[o, i] = fma(a[p + 1, i], x[k1, i], a[p, i] * x[k0, i])
        for e in range(2, count):
            k0 = k[e]
            for i in range(WIDE):
                out[o, i] = fma(a[p + e, i], x[k0, i], out[o, i])


@jit
def _dot2(a, b, c, d):
    return fma(c, d, a * b)


@jit
def _dot3(a, b, c, d, e, f):
    return fma(e, f, fma(c, d, a * b))


@jit
def _carry1(a, m):
    for i in range(WIDE):
        m[i] = a[i] * m[i]


@jit
def _carry2(a, m):
    for i in range(WIDE):
        m0, m1 = m[i], m[WIDE + i]
        m[i] = _dot2(a[i], m0, a[WIDE + i], m1)
        m[WIDE + i] = _dot2(a[2 * WIDE + i], m0, a[3 * WIDE + i], m1)


@jit
def _carry3(a, m):
    for i in range(WIDE):
        m0, m1, m2 = m[i], m[WIDE + i], m[2 * WIDE + i]
        m[i] = _dot3(a[i], m0, a[WIDE + i], m1, a[2 * WIDE + i], m2)
        m[WIDE + i] = _dot3(a[3 * WIDE + i], m0, a[4 * WIDE + i], m1, a[5 * WIDE + i], m2)
        m[2 * WIDE + i] = _dot3(a[6 * WIDE + i], m0, a[7 * WIDE + i], m1, a[8 * WIDE + i], m2)


@jit
def _conjugate1(a, s, v, drive, own):
    """Set S to A S A' + drive v + own, packed."""
    d0, o0 = drive[0], own[0]
    for i in range(WIDE):
        s[i] = a[i] * a[i] * s[i] + fma(d0, v[i], o0)


@jit
def _conjugate2(a, s, v, drive, own):
    d0, d1, d2, o0, o1, o2 = drive[0], drive[1], drive[2], own[0], own[1], own[2]
    for i in range(WIDE):
        a00, a01, a10, a11 = a[i], a[WIDE + i], a[2 * WIDE + i], a[3 * WIDE + i]
        s00, s10, s11, e = s[i], s[WIDE + i], s[2 * WIDE + i], v[i]
        h00, h01 = _dot2(a00, s00, a01, s10), _dot2(a00, s10, a01, s11)
        h10, h11 = _dot2(a10, s00, a11, s10), _dot2(a10, s10, a11, s11)
        s[i] = _dot2(h00, a00, h01, a01) + fma(d0, e, o0)
        s[WIDE + i] = _dot2(h10, a00, h11, a01) + fma(d1, e, o1)
        s[2 * WIDE + i] = _dot2(h10, a10, h11, a11) + fma(d2, e, o2)


@jit
def _conjugate3(a, s, v, drive, own):
    d0, d1, d2, d3, d4, d5 = drive[0], drive[1], drive[2], drive[3], drive[4], drive[5]
    o0, o1, o2, o3, o4, o5 = own[0], own[1], own[2], own[3], own[4], own[5]
    for i in range(WIDE):
        a00, a01, a02 = a[i], a[WIDE + i], a[2 * WIDE + i]
        a10, a11, a12 = a[3 * WIDE + i], a[4 * WIDE + i], a[5 * WIDE + i]
        a20, a21, a22 = a[6 * WIDE + i], a[7 * WIDE + i], a[8 * WIDE + i]
        s00, s10, s11 = s[i], s[WIDE + i], s[2 * WIDE + i]
        s20, s21, s22, e = s[3 * WIDE + i], s[4 * WIDE + i], s[5 * WIDE + i], v[i]
        h0 = _dot3(a00, s00, a01, s10, a02, s20)
        h1 = _dot3(a00, s10, a01, s11, a02, s21)
        h2 = _dot3(a00, s20, a01, s21, a02, s22)
        s[i] = _dot3(h0, a00, h1, a01, h2, a02) + fma(d0, e, o0)
        h0 = _dot3(a10, s00, a11, s10, a12, s20)
        h1 = _dot3(a10, s10, a11, s11, a12, s21)
        h2 = _dot3(a10, s20, a11, s21, a12, s22)
        s[WIDE + i] = _dot3(h0, a00, h1, a01, h2, a02) + fma(d1, e, o1)
        s[2 * WIDE + i] = _dot3(h0, a10, h1, a11, h2, a12) + fma(d2, e, o2)
        h0 = _dot3(a20, s00, a21, s10, a22, s20)
        h1 = _dot3(a20, s10, a21, s11, a22, s21)
        h2 = _dot3(a20, s20, a21, s21, a22, s22)
        s[3 * WIDE + i] = _dot3(h0, a00, h1, a01, h2, a02) + fma(d3, e, o3)
        s[4 * WIDE + i] = _dot3(h0, a10, h1, a11, h2, a12) + fma(d4, e, o4)
        s[5 * WIDE + i] = _dot3(h0, a20, h1, a21, h2, a22) + fma(d5, e, o5)


@jit
def _conjugate_rows(a, first, column, packed, half, rows):
    """Set S to A S A' for the entries of a sparse A: row p of `a` is its entry p."""
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
def tabulate(powers, matrix, noise, own, kind, rates, table, drive, added, fixed):
    """Evaluate the polynomials of steps at the rates of every step, still as polynomials in h.

    Parameters
    ----------
    powers, matrix, noise, own : ndarray
        See `nqm.step_polynomial.StepPolynomial`.
    kind : ndarray of int, shape (T,)
        Time of each step, as an index of `matrix`.
    rates : ndarray, shape (g, T, 2)
        lr and member_lr of each step, in each of g groups of directions.
    table : ndarray, shape (g, T, degree + 1, e)
        Output: coefficients of 1, h, h^2 of each entry of A; zero before the call.
    drive, added : ndarray, shape (g, T, p)
        Outputs: what a unit of gradient-noise variance, and the method's own noise, add to the
        covariance of each pair of driven coordinates (i, j <= i); zero before the call.
    fixed : ndarray of bool, shape (e,)
        Output: whether an entry is the same in all T steps; true before the call.
    """
    terms, entries = matrix.shape[1], matrix.shape[2]
    driven, drawn, fresh = noise.shape[2], noise.shape[3], own.shape[3]
    pushed, kicked = np.empty((driven, drawn)), np.empty((driven, fresh))
    for g in range(rates.shape[0]):
        for t in range(kind.size):
            pushed[:], kicked[:] = 0.0, 0.0
            for k in range(terms):
                factor, c = 1.0, powers[k, 2]
                for r in range(2):
                    if powers[k, r] == 1:
                        factor *= rates[g, t, r]
                    elif powers[k, r] == 2:
                        factor *= rates[g, t, r] * rates[g, t, r]
                for e in range(entries):
                    if matrix[kind[t], k, e] != 0.0:
                        table[g, t, c, e] += factor * matrix[kind[t], k, e]
                if c == 0:
                    for i in range(driven):
                        for m in range(drawn):
                            if noise[kind[t], k, i, m] != 0.0:
                                pushed[i, m] += factor * noise[kind[t], k, i, m]
                        for m in range(fresh):
                            if own[kind[t], k, i, m] != 0.0:
                                kicked[i, m] += factor * own[kind[t], k, i, m]
            for i in range(driven):
                for j in range(i + 1):
                    p = _packed(i, j)
                    for m in range(drawn):
                        drive[g, t, p] += pushed[i, m] * pushed[j, m]
                    for m in range(fresh):
                        added[g, t, p] += kicked[i, m] * kicked[j, m]
            for c in range(table.shape[2]):
                for e in range(entries):
                    fixed[e] &= table[g, t, c, e] == table[g, 0, c, e]


@jit
def _fill_entry(a, p, table, e, h, first, last):
    """Lanes of row p of `a`: entry e of A, a polynomial in h, by Horner's rule."""
    c0, c1, c2 = table[0, e], 0.0, 0.0
    if table.shape[0] > 1:
        c1 = table[1, e]
    if table.shape[0] > 2:
        c2 = table[2, e]
    if last - first == WIDE:
        for i in range(WIDE):
            a[p, i] = c0 + h[i] * (c1 + h[i] * c2)
        return
    row, x = a[p, first:last], h[first:last]
    for i in range(row.size):
        row[i] = c0 + x[i] * (c1 + x[i] * c2)


@jit
def _add_noise(q, k, drive, own, variance, first, last):
    row, v = q[k, first:last], variance[first:last]
    for i in range(row.size):
        row[i] += fma(drive, v[i], own)


@jit
def _add_row(out, o, factor, x, k):
    for i in range(WIDE):
        out[o, i] += factor * x[k, i]


@jit
def _square_row(read, o):
    for i in range(WIDE):
        read[o, i] *= read[o, i]


@jit
def _read_rows(read, readout, m, u, s, q, lone):
    """Rows of `read`: mean of a linear form of the state, and both parts of its variance."""
    read[:] = 0.0
    for r in range(readout.size):
        if readout[r] != 0.0:
            _add_row(read, 0, readout[r], m, r)
            if lone:
                _add_row(read, 1, readout[r], u, r)
            for c in range(r + 1):
                factor = readout[r] * readout[c] * (1.0 if r == c else 2.0)
                if factor != 0.0:
                    if not lone:
                        _add_row(read, 1, factor, s, _packed(r, c))
                    _add_row(read, 2, factor, q, _packed(r, c))
    if lone:
        _square_row(read, 1)


@jit
def _move_vector(a, first, column, m, new):
    """One step of a mean."""
    n = first.size - 1
    if n == 1:
        _carry1(a.reshape(-1), m.reshape(-1))
    elif n == 2:
        _carry2(a.reshape(-1), m.reshape(-1))
    elif n == 3:
        _carry3(a.reshape(-1), m.reshape(-1))
    else:
        for r in range(n):
            _row_times(new, r, a, first[r], first[r + 1] - first[r], m, column[first[r] :])
        m[:] = new


@jit
def _move_covariance(a, first, column, x, v, drive, own, half, rows):
    """One step of a covariance; of more than three coordinates without noise."""
    n = first.size - 1
    if n == 1:
        _conjugate1(a.reshape(-1), x.reshape(-1), v, drive, own)
    elif n == 2:
        _conjugate2(a.reshape(-1), x.reshape(-1), v, drive, own)
    elif n == 3:
        _conjugate3(a.reshape(-1), x.reshape(-1), v, drive, own)
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
    part,
    curvature,
    noise_variance,
    mean,
    root,
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

    Directions of one or of several programs lie in lanes of b blocks of `WIDE`. A part is a run of
    lanes of one block whose directions have the same rates and belong to the same program. Lanes
    of no part have curvature, noise and state 0. Covariances are packed: p = n (n + 1) / 2.

    Parameters
    ----------
    table : ndarray, shape (g, T, degree + 1, e)
        Coefficients of 1, h, h^2 of each entry of A; degree <= 2; for each group of directions
        with the same rates.
    fixed : ndarray of bool, shape (e,)
        Whether an entry is the same in all T steps.
    first : ndarray of int, shape (n + 1,)
        Index of the first entry of each row of A.
    column : ndarray of int, shape (e,)
        Column of each entry.
    driven : ndarray of int, shape (k, 2)
        Pairs of coordinates (i, j <= i) to whose covariance noise adds.
    drive, own : ndarray, shape (g, T, k)
        Added covariance per unit of `noise_variance`, and independently of it.
    part : ndarray of int, shape (parts, 5)
        Block, rising; first lane, last one plus 1; group; program.
    curvature, noise_variance : ndarray, shape (b, 1, WIDE)
        h, and the variance of the noise of one minibatch of size 1.
    mean : ndarray, shape (b, n, WIDE)
        Mean of the state, changed in place.
    root : ndarray, shape (b, n, WIDE)
        As `moving` says, u with covariance u u' due to the start; changed in place.
    started, noisy : ndarray, shape (b, p, WIDE)
        Covariance due to the start, which no noise drives, and due to noise; changed in place.
    moving : ndarray of bool, shape (3,)
        Whether `mean`, `root` and `started` may be other than 0; not both of the last two.
    readout : ndarray, shape (T, n)
        Evaluated weights after each step as a linear form of the state, where something is
        recorded.
    record : ndarray of int, shape (T,)
        The row of `sums` and `seen` for the moments after each step, or -1.
    sums : ndarray, shape (records, programs, 4)
        Parts of the loss of the evaluated weights are added to it: of their mean, of their variance
        due to the start and of that due to noise; and the variance of the loss.
    seen : ndarray, shape (2, records, b, WIDE) or (2, 0, b, WIDE)
        Outputs, unless empty: mean and variance of the evaluated weights.
    weight, square_weight : ndarray, shape (b, 1, WIDE)
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
    new, read = np.zeros((n, WIDE)), np.zeros((3, WIDE))
    rows, place = np.zeros(n, np.int64), np.arange(column.size)
    if short:
        for r in range(n):
            for e in range(first[r], first[r + 1]):
                place[e] = r * n + column[e]
    begin, end = 0, 0
    pushed, kicked, nothing = np.zeros((3, 6))
    for b in range(mean.shape[0]):
        begin = end
        while end < part.shape[0] and part[end, 0] == b:
            end += 1
        # What lies in lanes of no part is never read.
        whole = end == begin + 1
        alone = short and whole
        m, u, s, q = mean[b], root[b], started[b], noisy[b]
        h, v = curvature[b, 0], noise_variance[b, 0]
        for t in range(table.shape[1]):
            for e in range(column.size):
                if t == 0 or not fixed[e]:
                    for j in range(begin, end):
                        _fill_entry(a, place[e], table[part[j, 3], t], e, h, part[j, 1], part[j, 2])
            if moving[0]:
                _move_vector(a, first, column, m, new)
            if moving[1]:
                _move_vector(a, first, column, u, new)
            if moving[2]:
                _move_covariance(a, first, column, s, v, nothing, nothing, half, rows)
            for p in range(driven.shape[0] if alone else 0):
                k, g = _packed(driven[p, 0], driven[p, 1]), part[begin, 3]
                pushed[k], kicked[k] = drive[g, t, p], own[g, t, p]
            if alone:
                _move_covariance(a, first, column, q, v, pushed, kicked, half, rows)
            else:
                _move_covariance(a, first, column, q, v, nothing, nothing, half, rows)
            for p in range(0 if alone else driven.shape[0]):
                k = _packed(driven[p, 0], driven[p, 1])
                for j in range(begin, end):
                    g = part[j, 3]
                    _add_noise(q, k, drive[g, t, p], own[g, t, p], v, part[j, 1], part[j, 2])
            out = record[t]
            if out < 0 and loss.size == 0:
                continue
            _read_rows(read, readout[t], m, u, s, q, moving[1])
            for j in range(begin, end):
                s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
                for i in range(part[j, 1], part[j, 2]):
                    square, variance = read[0, i] * read[0, i], read[1, i] + read[2, i]
                    s0 += weight[b, 0, i] * square
                    s1 += weight[b, 0, i] * read[1, i]
                    s2 += weight[b, 0, i] * read[2, i]
                    s3 += square_weight[b, 0, i] * variance * (0.5 * variance + square)
                if loss.size > 0:
                    loss[t] += s0 + s1 + s2
                if out >= 0:
                    program = part[j, 4]
                    sums[out, program, 0] += s0
                    sums[out, program, 1] += s1
                    sums[out, program, 2] += s2
                    sums[out, program, 3] += s3
            if out >= 0 and seen.shape[1] > 0:
                for i in range(WIDE):
                    seen[0, out, b, i] = read[0, i]
                    seen[1, out, b, i] = read[1, i] + read[2, i]

"""The first two moments step by step, where matrices are polynomials in the curvature.

`WIDE` directions are a row of numbers for each entry of the state, so that every operation runs
along directions; covariances are packed, entry (i, j <= i) in row i (i + 1) / 2 + j. Rows at
constant places of one array are what lets the compiler use vector instructions without checks; of
up to three coordinates the matrices are formed in its registers. Products are fused explicitly, so
that a direction's numbers do not depend on which others are beside it.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import fma, jit

#: Directions of one block, and rows of a block before those of the state.
WIDE, HEAD = 128, 4
#: No noise: what drives the six covariances of three coordinates.
_STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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
def _coefficients(table, g, t, e):
    return table[g, t, 0, e], table[g, t, 1, e], table[g, t, 2, e]


@jit
def _parabola(k, h):
    return fma(h, fma(h, k[2], k[1]), k[0])


@jit
def _vector1(table, g, t, h, m, count):
    k = _coefficients(table, g, t, 0)
    for i in range(count):
        m[i] *= _parabola(k, h[i])


@jit
def _vector2(table, g, t, h, m, count):
    k0, k1 = _coefficients(table, g, t, 0), _coefficients(table, g, t, 1)
    k2, k3 = _coefficients(table, g, t, 2), _coefficients(table, g, t, 3)
    for i in range(count):
        z, m0, m1 = h[i], m[i], m[WIDE + i]
        m[i] = _dot2(_parabola(k0, z), m0, _parabola(k1, z), m1)
        m[WIDE + i] = _dot2(_parabola(k2, z), m0, _parabola(k3, z), m1)


@jit
def _vector3(table, g, t, h, m, count):
    k0, k1 = _coefficients(table, g, t, 0), _coefficients(table, g, t, 1)
    k2, k3 = _coefficients(table, g, t, 2), _coefficients(table, g, t, 3)
    k4, k5 = _coefficients(table, g, t, 4), _coefficients(table, g, t, 5)
    k6, k7 = _coefficients(table, g, t, 6), _coefficients(table, g, t, 7)
    k8 = _coefficients(table, g, t, 8)
    for i in range(count):
        z, m0, m1, m2 = h[i], m[i], m[WIDE + i], m[2 * WIDE + i]
        m[i] = _dot3(_parabola(k0, z), m0, _parabola(k1, z), m1, _parabola(k2, z), m2)
        m[WIDE + i] = _dot3(_parabola(k3, z), m0, _parabola(k4, z), m1, _parabola(k5, z), m2)
        m[2 * WIDE + i] = _dot3(_parabola(k6, z), m0, _parabola(k7, z), m1, _parabola(k8, z), m2)


@jit
def _matrix1(table, g, t, h, s, count, noise):
    k, (d0, o0) = _coefficients(table, g, t, 0), noise
    for i in range(count):
        a = _parabola(k, h[i])
        s[i] = fma(a * a, s[i], fma(d0, h[WIDE + i], o0))


@jit
def _matrix2(table, g, t, h, s, count, noise):
    k0, k1 = _coefficients(table, g, t, 0), _coefficients(table, g, t, 1)
    k2, k3 = _coefficients(table, g, t, 2), _coefficients(table, g, t, 3)
    d0, d1, d2, o0, o1, o2 = noise
    for i in range(count):
        z, v = h[i], h[WIDE + i]
        s0, s1, s2 = s[i], s[WIDE + i], s[2 * WIDE + i]
        a0, a1, b0, b1 = _parabola(k0, z), _parabola(k1, z), _parabola(k2, z), _parabola(k3, z)
        p0, p1 = _dot2(a0, s0, a1, s1), _dot2(a0, s1, a1, s2)
        s[i] = fma(p1, a1, fma(p0, a0, fma(d0, v, o0)))
        s[WIDE + i] = fma(p1, b1, fma(p0, b0, fma(d1, v, o1)))
        p0, p1 = _dot2(b0, s0, b1, s1), _dot2(b0, s1, b1, s2)
        s[2 * WIDE + i] = fma(p1, b1, fma(p0, b0, fma(d2, v, o2)))


@jit
def _matrix3(table, g, t, h, s, count, noise):
    k0, k1 = _coefficients(table, g, t, 0), _coefficients(table, g, t, 1)
    k2, k3 = _coefficients(table, g, t, 2), _coefficients(table, g, t, 3)
    k4, k5 = _coefficients(table, g, t, 4), _coefficients(table, g, t, 5)
    k6, k7 = _coefficients(table, g, t, 6), _coefficients(table, g, t, 7)
    k8 = _coefficients(table, g, t, 8)
    d0, d1, d2, d3, d4, d5, o0, o1, o2, o3, o4, o5 = noise
    for i in range(count):
        z, v = h[i], h[WIDE + i]
        s0, s1, s2 = s[i], s[WIDE + i], s[2 * WIDE + i]
        s3, s4, s5 = s[3 * WIDE + i], s[4 * WIDE + i], s[5 * WIDE + i]
        a0, a1, a2 = _parabola(k0, z), _parabola(k1, z), _parabola(k2, z)
        b0, b1, b2 = _parabola(k3, z), _parabola(k4, z), _parabola(k5, z)
        c0, c1, c2 = _parabola(k6, z), _parabola(k7, z), _parabola(k8, z)
        p0 = _dot3(a0, s0, a1, s1, a2, s3)
        p1 = _dot3(a0, s1, a1, s2, a2, s4)
        p2 = _dot3(a0, s3, a1, s4, a2, s5)
        s[i] = fma(p2, a2, fma(p1, a1, fma(p0, a0, fma(d0, v, o0))))
        s[WIDE + i] = fma(p2, b2, fma(p1, b1, fma(p0, b0, fma(d1, v, o1))))
        s[3 * WIDE + i] = fma(p2, c2, fma(p1, c1, fma(p0, c0, fma(d3, v, o3))))
        p0 = _dot3(b0, s0, b1, s1, b2, s3)
        p1 = _dot3(b0, s1, b1, s2, b2, s4)
        p2 = _dot3(b0, s3, b1, s4, b2, s5)
        s[2 * WIDE + i] = fma(p2, b2, fma(p1, b1, fma(p0, b0, fma(d2, v, o2))))
        s[4 * WIDE + i] = fma(p2, c2, fma(p1, c1, fma(p0, c0, fma(d4, v, o4))))
        p0 = _dot3(c0, s0, c1, s1, c2, s3)
        p1 = _dot3(c0, s1, c1, s2, c2, s4)
        p2 = _dot3(c0, s3, c1, s4, c2, s5)
        s[5 * WIDE + i] = fma(p2, c2, fma(p1, c1, fma(p0, c0, fma(d5, v, o5))))


@jit
def _run1(table, drive, own, moving, g, start, stop, h, m, u, s, q, count):
    """Steps [start, stop) of one part of one coordinate; each array is a view."""
    mean, root, begun = moving[0], moving[1], moving[2]
    for t in range(start, stop):
        if mean:
            _vector1(table, g, t, h, m, count)
        if root:
            _vector1(table, g, t, h, u, count)
        if begun:
            _matrix1(table, g, t, h, s, count, (0.0, 0.0))
        d, o = drive[g, t], own[g, t]
        _matrix1(table, g, t, h, q, count, (d[0], o[0]))


@jit
def _run2(table, drive, own, moving, g, start, stop, h, m, u, s, q, count):
    """Steps [start, stop) of one part of two coordinates; each array is a view."""
    mean, root, begun = moving[0], moving[1], moving[2]
    for t in range(start, stop):
        if mean:
            _vector2(table, g, t, h, m, count)
        if root:
            _vector2(table, g, t, h, u, count)
        if begun:
            _matrix2(table, g, t, h, s, count, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        d, o = drive[g, t], own[g, t]
        _matrix2(table, g, t, h, q, count, (d[0], d[1], d[2], o[0], o[1], o[2]))


@jit
def _run3(table, drive, own, moving, g, start, stop, h, m, u, s, q, count):
    """Steps [start, stop) of one part of three coordinates; each array is a view."""
    mean, root, begun = moving[0], moving[1], moving[2]
    for t in range(start, stop):
        if mean:
            _vector3(table, g, t, h, m, count)
        if root:
            _vector3(table, g, t, h, u, count)
        if begun:
            _matrix3(table, g, t, h, s, count, _STILL)
        d, o = drive[g, t], own[g, t]
        _matrix3(
            table,
            g,
            t,
            h,
            q,
            count,
            (d[0], d[1], d[2], d[3], d[4], d[5], o[0], o[1], o[2], o[3], o[4], o[5]),
        )


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
    table : ndarray, shape (g, T, 3, e)
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
def _fill_entry(a, e, table, h, first, last):
    """Lanes of row e of `a`: entry e of A, a polynomial in h, by Horner's rule."""
    row, z, k = a[e, first:last], h[first:last], (table[0, e], table[1, e], table[2, e])
    for i in range(row.size):
        row[i] = _parabola(k, z[i])


@jit
def _add_noise(q, k, drive, own, variance, first, last):
    row, v = q[k, first:last], variance[first:last]
    for i in range(row.size):
        row[i] += fma(drive, v[i], own)


@jit
def _record(rows, n, lone, readout, t, part, j, out, sums, seen, loss):
    """Losses of the evaluated weights of one part after step t; `rows` (R, WIDE) is its block."""
    p = n * (n + 1) // 2
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    for i in range(part[j, 1], part[j, 2]):
        mean, started, noisy = 0.0, 0.0, 0.0
        for r in range(n):
            if readout[t, r] != 0.0:
                mean += readout[t, r] * rows[HEAD + r, i]
                if lone:
                    started += readout[t, r] * rows[HEAD + n + r, i]
                for c in range(r + 1):
                    factor = readout[t, r] * readout[t, c] * (1.0 if r == c else 2.0)
                    if factor != 0.0:
                        k = HEAD + 2 * n + _packed(r, c)
                        if not lone:
                            started += factor * rows[k, i]
                        noisy += factor * rows[k + p, i]
        started = started * started if lone else started
        square, variance = mean * mean, started + noisy
        s0 += rows[2, i] * square
        s1 += rows[2, i] * started
        s2 += rows[2, i] * noisy
        s3 += rows[3, i] * variance * (0.5 * variance + square)
        if out >= 0 and seen.shape[1] > 0:
            seen[0, out, part[j, 0], i] = mean
            seen[1, out, part[j, 0], i] = variance
    if loss.size > 0:
        loss[t] += s0 + s1 + s2
    if out >= 0:
        program = part[j, 4]
        sums[out, program, 0] += s0
        sums[out, program, 1] += s1
        sums[out, program, 2] += s2
        sums[out, program, 3] += s3


@jit
def fill_blocks(
    lane,
    kept,
    curvature,
    noise_variance,
    weight,
    square_weight,
    mean,
    root,
    started,
    noisy,
    x,
    moving,
):
    """Write a problem and moments by direction into the blocks of `walk_polynomial`.

    Parameters
    ----------
    lane : ndarray of int, shape (d,)
        Lane of each direction.
    kept : ndarray of int, shape (k,)
        Coordinates that are walked.
    curvature, noise_variance, weight, square_weight : ndarray, shape (d,)
        h; the variance of the noise of one minibatch of size 1; loss per unit of second moment;
        and twice the variance of the loss per unit of squared variance.
    mean : ndarray, shape (d, n)
        Mean of the state.
    root : ndarray, shape (d, n) or (0, n)
        A vector u with `started` = u u', unless it is empty.
    started, noisy : ndarray, shape (d, n, n)
        Covariance due to the start and due to noise.
    x : ndarray, shape (b, HEAD + k (k + 3), WIDE)
        Output, zero before: the four numbers of each direction, then `mean`, `root`, `started`
        (unless there is a root) and `noisy`, of which the last two are packed.
    moving : ndarray of bool, shape (3,)
        Output: whether `mean`, `root` and `started` have other numbers than 0; false before.
    """
    alone, k = root.shape[0] > 0, kept.size
    p = k * (k + 1) // 2
    for d in range(lane.size):
        b, i = lane[d] // WIDE, lane[d] % WIDE
        x[b, 0, i], x[b, 1, i] = curvature[d], noise_variance[d]
        x[b, 2, i], x[b, 3, i] = weight[d], square_weight[d]
        for r in range(k):
            x[b, HEAD + r, i] = mean[d, kept[r]]
            moving[0] |= mean[d, kept[r]] != 0.0
            if alone:
                x[b, HEAD + k + r, i] = root[d, kept[r]]
                moving[1] |= root[d, kept[r]] != 0.0
            for c in range(r + 1):
                o = HEAD + 2 * k + _packed(r, c)
                x[b, o + p, i] = noisy[d, kept[r], kept[c]]
                if not alone:
                    x[b, o, i] = started[d, kept[r], kept[c]]
                    moving[2] |= started[d, kept[r], kept[c]] != 0.0


@jit
def empty_blocks(lane, source, factor, k, x, mean, root, started, noisy):
    """Read moments by direction from blocks: the inverse of `fill_blocks`.

    Parameters
    ----------
    lane : ndarray of int, shape (d,)
        Lane of each direction.
    source : ndarray of int, shape (n,)
        The coordinate of the blocks of which each one is a multiple.
    factor : ndarray, shape (n,)
        By which factor.
    k : int
        Number of coordinates of the blocks.
    x, mean, root, started, noisy : ndarray
        As in `fill_blocks`; the last four are the outputs.
    """
    alone = root.shape[0] > 0
    p = k * (k + 1) // 2
    for d in range(lane.size):
        b, i = lane[d] // WIDE, lane[d] % WIDE
        for r in range(source.size):
            mean[d, r] = factor[r] * x[b, HEAD + source[r], i]
            if alone:
                root[d, r] = factor[r] * x[b, HEAD + k + source[r], i]
            for c in range(r + 1):
                o, scale = HEAD + 2 * k + _packed(source[r], source[c]), factor[r] * factor[c]
                begun = root[d, r] * root[d, c] if alone else scale * x[b, o, i]
                started[d, r, c] = started[d, c, r] = begun
                noisy[d, r, c] = noisy[d, c, r] = scale * x[b, o + p, i]


@jit
def walk_polynomial(table, entries, noise, part, x, moving, readout, record, sums, seen, loss):
    """Take T steps of the first two moments, whose matrices are polynomials in the curvature.

    Directions of one or of several programs lie in lanes of b blocks of `WIDE`. A part is a run of
    lanes of one block whose directions have the same rates and belong to the same program. Lanes
    of no part are never read.

    Parameters
    ----------
    table : ndarray, shape (g, T, 3, e)
        Coefficients of 1, h, h^2 of each entry of A, for each group of directions with the same
        rates.
    entries : tuple of (ndarray of int (k + 1,), ndarray of int (e,), ndarray of bool (e,))
        Index of the first entry of each row of A; the column of each entry, where up to three
        coordinates have all; and whether an entry is the same in all T steps.
    noise : tuple of (ndarray of int (q, 2), ndarray (g, T, q), ndarray (g, T, q))
        Pairs of coordinates (i, j <= i) to whose covariance noise adds, all of them for up to three
        coordinates; and what it adds per unit of noise variance, and independently of it.
    part : ndarray of int, shape (parts, 5)
        Block, rising; first lane, last one plus 1; group; program.
    x : ndarray, shape (b, HEAD + k (k + 3), WIDE)
        As `fill_blocks` makes it; changed in place.
    moving : ndarray of bool, shape (3,)
        Whether mean, root and covariance due to the start may be other than 0; not both of the
        last two.
    readout : ndarray, shape (T, k)
        Evaluated weights after each step as a linear form of the state, where something is
        recorded.
    record : ndarray of int, shape (T,)
        The row of `sums` and `seen` for the moments after each step, or -1.
    sums : ndarray, shape (records, programs, 4)
        Parts of the loss of the evaluated weights are added to it: of their mean, of their variance
        due to the start and of that due to noise; and the variance of the loss.
    seen : ndarray, shape (2, records, b, WIDE) or (2, 0, b, WIDE)
        Outputs, unless empty: mean and variance of the evaluated weights.
    loss : ndarray, shape (T,) or (0,)
        The expected loss after each step is added to it, if it is not empty.
    """
    if readout.shape[1] <= 3:
        _walk_short(table, noise, part, x, moving, readout, record, sums, seen, loss)
    else:
        _walk_long(table, entries, noise, part, x, moving, readout, record, sums, seen, loss)


@jit
def _walk_short(table, noise, part, x, moving, readout, record, sums, seen, loss):
    _, drive, own = noise
    n, flat = readout.shape[1], x.reshape(-1)
    for j in range(part.shape[0]):
        h = flat[part[j, 0] * x.shape[1] * WIDE + part[j, 1] :]
        m = h[HEAD * WIDE :]
        u = m[n * WIDE :]
        s = u[n * WIDE :]
        q = s[n * (n + 1) // 2 * WIDE :]
        rows, g, count, t = x[part[j, 0]], part[j, 3], part[j, 2] - part[j, 1], 0
        while t < record.size:
            start, t = t, t + 1
            while t < record.size and record[t - 1] < 0 and loss.size == 0:
                t += 1
            if n == 1:
                _run1(table, drive, own, moving, g, start, t, h, m, u, s, q, count)
            elif n == 2:
                _run2(table, drive, own, moving, g, start, t, h, m, u, s, q, count)
            else:
                _run3(table, drive, own, moving, g, start, t, h, m, u, s, q, count)
            out = record[t - 1]
            if out >= 0 or loss.size > 0:
                _record(rows, n, moving[1], readout, t - 1, part, j, out, sums, seen, loss)


@jit
def _walk_long(table, entries, noise, part, x, moving, readout, record, sums, seen, loss):
    (begin, column, fixed), (driven, drive, own) = entries, noise
    n = readout.shape[1]
    p = n * (n + 1) // 2
    a, half, new = np.zeros((column.size, WIDE)), np.zeros((n * n, WIDE)), np.zeros((n, WIDE))
    which, start, end = np.zeros(n, np.int64), 0, 0
    for b in range(x.shape[0]):
        start = end
        while end < part.shape[0] and part[end, 0] == b:
            end += 1
        rows, h, v = x[b], x[b, 0], x[b, 1]
        m, u = rows[HEAD : HEAD + n], rows[HEAD + n : HEAD + 2 * n]
        s, q = rows[HEAD + 2 * n : HEAD + 2 * n + p], rows[HEAD + 2 * n + p :]
        for t in range(table.shape[1]):
            for e in range(column.size):
                if t == 0 or not fixed[e]:
                    for j in range(start, end):
                        _fill_entry(a, e, table[part[j, 3], t], h, part[j, 1], part[j, 2])
            if moving[0]:
                _move_vector(a, begin, column, m, new)
            if moving[1]:
                _move_vector(a, begin, column, u, new)
            if moving[2]:
                _conjugate_rows(a, begin, column, s, half, which)
            _conjugate_rows(a, begin, column, q, half, which)
            for k in range(driven.shape[0]):
                o = _packed(driven[k, 0], driven[k, 1])
                for j in range(start, end):
                    g = part[j, 3]
                    _add_noise(q, o, drive[g, t, k], own[g, t, k], v, part[j, 1], part[j, 2])
            if record[t] >= 0 or loss.size > 0:
                for j in range(start, end):
                    _record(rows, n, moving[1], readout, t, part, j, record[t], sums, seen, loss)


@jit
def _move_vector(a, begin, column, m, new):
    """One step of a mean, for the entries of a sparse A."""
    for r in range(begin.size - 1):
        count = begin[r + 1] - begin[r]
        _row_times(new, r, a, begin[r], count, m, column[begin[r] :])
    m[:] = new

"""Monte Carlo of linear methods, in double precision."""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.normals import correlate, fill_normals

#: Directions and replicas that a step takes together: what it reads stays in the cache.
_PIECE, _GROUP = 256, 2


@jit
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


@jit
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


@jit
def _step_single(a, x, at, noise, b):
    """As `_step_rows`, of one coordinate and normal: no other row is needed."""
    for i in range(x.shape[2]):
        x[at, b, i] = a[0, b, i] * x[at, b, i] + a[1, b, i] * x[noise, b, i]


@jit
def _step_pair(a, x, at, noise, b):
    """As `_step_rows`, of two coordinates and a normal, A and C without gaps."""
    for i in range(x.shape[2]):
        x0, x1, e = x[at, b, i], x[at + 1, b, i], x[noise, b, i]
        x[at, b, i] = a[0, b, i] * x0 + a[1, b, i] * x1 + a[2, b, i] * e
        x[at + 1, b, i] = a[3, b, i] * x0 + a[4, b, i] * x1 + a[5, b, i] * e


@jit
def _step_triple(a, x, at, noise, b):
    """As `_step_pair`, of three coordinates."""
    for i in range(x.shape[2]):
        x0, x1, x2, e = x[at, b, i], x[at + 1, b, i], x[at + 2, b, i], x[noise, b, i]
        x[at, b, i] = a[0, b, i] * x0 + a[1, b, i] * x1 + a[2, b, i] * x2 + a[3, b, i] * e
        x[at + 1, b, i] = a[4, b, i] * x0 + a[5, b, i] * x1 + a[6, b, i] * x2 + a[7, b, i] * e
        x[at + 2, b, i] = a[8, b, i] * x0 + a[9, b, i] * x1 + a[10, b, i] * x2 + a[11, b, i] * e


@jit
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


@jit
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


@jit
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
                    correlate(root, x[noise[g], :d], drawn)
                    continue
                fill_normals(generator, normal)
                if rank > 0:
                    for i in range(d):
                        for j in range(drawn):
                            shared[i * drawn + j] = normal[i * noise_columns + j]
                    correlate(root, shared, drawn)
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


@jit
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

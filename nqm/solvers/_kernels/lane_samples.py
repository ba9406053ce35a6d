"""Monte Carlo of linear methods with single-precision normals, one lane for each replica.

Inner loops run over a `width` known only when they run: the compiler would unroll a known one
before it could vectorise it.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.lanes import fill_lanes

#: Steps whose normals are drawn at once; even. Normals and losses of a tile stay in the L1 cache.
_TILE = 32


@jit
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


@jit
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


@jit
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
    equal = _equal_steps(kind, record)
    for first in range(0, kind.size, _TILE):
        last = min(first + _TILE, kind.size)
        drawn = (last - first) * noise_columns
        for i in range(d):
            fill_lanes(lanes, normal[: drawn + drawn % 2])
            x, a, t = state[i], values[i], first
            while t < last:
                out, e, added = record[t], t - first, False
                alike = min(equal[t], last - t) if whole else 0
                taken = alike - alike % (8 if n == 1 else 4)
                if taken:
                    if n == 1:
                        _eight_singles(a, kind[t], normal, e, e + taken, x)
                    elif n == 2:
                        _four_pairs(a, kind[t], normal, e, e + taken, x)
                    else:
                        _four_triples(a, kind[t], normal, e, e + taken, x)
                    t, out = t + taken, record[t + taken - 1]
                elif whole and t + 3 < last and record[t] + record[t + 1] + record[t + 2] == -3:
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


@jit
def _equal_steps(kind, record):
    """Number of steps from each one on that are of its kind, with no record but after the last."""
    equal = np.ones(kind.size, np.int64)
    for t in range(kind.size - 2, -1, -1):
        if kind[t] == kind[t + 1] and record[t] < 0:
            equal[t] += equal[t + 1]
    return equal


@jit
def _eight_singles(a, k, normal, first, last, x):
    """Take equal steps of one coordinate, eight in a pass, with the normals in these rows."""
    b, c = a[k, 0], a[k, 1]
    for e in range(first, last, 8):
        for r in range(x.shape[1]):
            y = b * x[0, r] + c * normal[e, r]
            y = b * y + c * normal[e + 1, r]
            y = b * y + c * normal[e + 2, r]
            y = b * y + c * normal[e + 3, r]
            y = b * y + c * normal[e + 4, r]
            y = b * y + c * normal[e + 5, r]
            y = b * y + c * normal[e + 6, r]
            x[0, r] = b * y + c * normal[e + 7, r]


@jit
def _four_pairs(a, k, normal, first, last, x):
    """Take equal steps of two coordinates, four in a pass."""
    a0, a1, a2, a3, a4, a5 = a[k, 0], a[k, 1], a[k, 2], a[k, 3], a[k, 4], a[k, 5]
    for e in range(first, last, 4):
        for r in range(x.shape[1]):
            y, z, g = x[0, r], x[1, r], normal[e, r]
            y, z = a0 * y + a1 * z + a2 * g, a3 * y + a4 * z + a5 * g
            g = normal[e + 1, r]
            y, z = a0 * y + a1 * z + a2 * g, a3 * y + a4 * z + a5 * g
            g = normal[e + 2, r]
            y, z = a0 * y + a1 * z + a2 * g, a3 * y + a4 * z + a5 * g
            g = normal[e + 3, r]
            x[0, r], x[1, r] = a0 * y + a1 * z + a2 * g, a3 * y + a4 * z + a5 * g


@jit
def _four_triples(a, k, normal, first, last, x):
    """Take equal steps of three coordinates, four in a pass."""
    a0, a1, a2, a3, a4, a5 = a[k, 0], a[k, 1], a[k, 2], a[k, 3], a[k, 4], a[k, 5]
    a6, a7, a8, a9, a10, a11 = a[k, 6], a[k, 7], a[k, 8], a[k, 9], a[k, 10], a[k, 11]
    for e in range(first, last, 4):
        for r in range(x.shape[1]):
            w, y, z, g = x[0, r], x[1, r], x[2, r], normal[e, r]
            w, y, z = (
                a0 * w + a1 * y + a2 * z + a3 * g,
                a4 * w + a5 * y + a6 * z + a7 * g,
                a8 * w + a9 * y + a10 * z + a11 * g,
            )
            g = normal[e + 1, r]
            w, y, z = (
                a0 * w + a1 * y + a2 * z + a3 * g,
                a4 * w + a5 * y + a6 * z + a7 * g,
                a8 * w + a9 * y + a10 * z + a11 * g,
            )
            g = normal[e + 2, r]
            w, y, z = (
                a0 * w + a1 * y + a2 * z + a3 * g,
                a4 * w + a5 * y + a6 * z + a7 * g,
                a8 * w + a9 * y + a10 * z + a11 * g,
            )
            g = normal[e + 3, r]
            x[0, r] = a0 * w + a1 * y + a2 * z + a3 * g
            x[1, r] = a4 * w + a5 * y + a6 * z + a7 * g
            x[2, r] = a8 * w + a9 * y + a10 * z + a11 * g


@jit
def _four_singles(a, k0, k1, k2, k3, normal, e, x):
    """Take four steps of one coordinate, with the kinds k0, ... and the normals from row e on."""
    b0, b1, b2, b3 = a[k0, 0], a[k1, 0], a[k2, 0], a[k3, 0]
    c0, c1, c2, c3 = a[k0, 1], a[k1, 1], a[k2, 1], a[k3, 1]
    for r in range(x.shape[1]):
        y = b0 * x[0, r] + c0 * normal[e, r]
        y = b1 * y + c1 * normal[e + 1, r]
        y = b2 * y + c2 * normal[e + 2, r]
        x[0, r] = b3 * y + c3 * normal[e + 3, r]


@jit
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


@jit
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

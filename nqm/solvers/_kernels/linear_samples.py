"""Monte Carlo of linear methods: the replicas of a block are lanes that advance together.

Every direction goes through a tile of steps alone: its state and normals stay in the L1 cache, and
its matrix is a few numbers. What a step does to the rows of the state is the same for every
direction, and is written down once for a tile, as combinations of rows (`vectors.combine`).
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.fast_normals import LANES
from nqm.solvers._kernels.lanes import fill_lanes
from nqm.solvers._kernels.normals import fill_normals
from nqm.solvers._kernels.vectors import TERMS, add_square, aligned, combine, move

#: Rows of normals that are drawn at once for a direction: they and the state fill the L1 cache.
_ROWS = 32
#: Columns of an operation: to add or to set, number of terms, row, its sources, first coefficient.
_ADDS, _TERMS, _TO, _FROM, _COEFFICIENT = 0, 1, 2, 3, 3 + TERMS


@jit
def _free(taken, row):
    """First row from this one on that is not taken."""
    while taken[row]:
        row += 1
    return row


@jit
def _write_down(first, column, same, pattern, kind, columns, n, operations, begin, at):
    """Write down the operations of some steps.

    A coordinate that another one's old or new value becomes unchanged takes over its row.

    Parameters
    ----------
    first, column, same : ndarray of int
        See `sample_linear`.
    pattern : ndarray of int, shape (s,)
        Pattern of each kind of step.
    kind : ndarray of int, shape (T,)
        Kind of each step.
    columns, n : int
        Normals of one step, and coordinates.
    operations : ndarray of int, shape (as many as needed, 4 + TERMS)
        Output.
    begin : ndarray of int, shape (T + 1,)
        Output: first operation of each step.
    at : ndarray of int, shape (T + 1, n)
        Output: row of each coordinate before each step, and at the end. Rows below 2 n are for
        coordinates, those after that for normals.
    """
    count = 0
    for j in range(n):
        at[0, j] = j
    for t in range(kind.size):
        g, old, new = pattern[kind[t]], at[t], at[t + 1]
        begin[t], row = count, 0
        taken = np.zeros(2 * n + 1, np.bool_)
        for j in range(n):
            taken[old[j]] = True
        for j in range(n):
            c = same[g, j]
            if c >= 0:
                new[j] = old[c] if c < n else new[c - n]
                continue
            row = _free(taken, row)
            new[j], taken[row] = row, True
            p = first[g, j]
            while True:
                terms = min(first[g, j + 1] - p, TERMS)
                operation = operations[count]
                operation[_ADDS], operation[_TERMS], operation[_TO] = p > first[g, j], terms, row
                operation[_COEFFICIENT] = kind[t] * column.shape[1] + p
                for s in range(terms):
                    c = column[g, p + s]
                    operation[_FROM + s] = old[c] if c < n else 2 * n + t * columns + c - n
                count, p = count + 1, p + terms
                if p == first[g, j + 1]:
                    break
    begin[kind.size] = count


@jit
def _count_operations(first, same, pattern, kind):
    """Number of operations that `_write_down` writes."""
    count = 0
    for t in range(kind.size):
        g = pattern[kind[t]]
        for j in range(same.shape[1]):
            if same[g, j] < 0:
                terms = first[g, j + 1] - first[g, j]
                count += max(1, (terms + TERMS - 1) // TERMS)
    return count


@jit
def _single_terms(readout):
    """Coordinate that each readout (records, n) reads alone, or -1, and its squared coefficient."""
    coordinate, square = np.full(readout.shape[0], -1), np.zeros(readout.shape[0])
    for k in range(readout.shape[0]):
        terms = 0
        for j in range(readout.shape[1]):
            if readout[k, j] != 0.0:
                terms, coordinate[k], square[k] = terms + 1, j, readout[k, j] * readout[k, j]
        if terms != 1:
            coordinate[k] = -1
    return coordinate, square


@jit
def _add_loss(readout, weight, x, at, spare, loss, out):
    """Add weight (readout x)^2 of every lane to row `out` of `loss`; row `spare` of x is free."""
    adds = False
    for j in range(readout.size):
        if readout[j] != 0.0:
            combine(x, adds, 1, spare, (at[j], 0, 0, 0), readout, j)
            adds = True
    if adds:
        add_square(loss, out, x, spare, weight)


@jit
def _draw(streams, lanes, single, i, replicas, x, row, rows):
    """Draw the normals of direction i into rows of x, for the lanes that are replicas.

    Single-precision ones are drawn into `single` first: twice as many of them are made at once.
    """
    if lanes.size > 0:
        fill_lanes(lanes, single[: rows + rows % 2])
        for k in range(rows):
            move(x, row + k, single, k)
    elif replicas == LANES:
        fill_normals(streams[i], x[row : row + rows].reshape(rows * LANES))
    else:
        for k in range(row, row + rows):
            fill_normals(streams[i], x[k, :replicas])


@jit
def _correlate(root, columns, drawn, noise):
    """Correlate the directions of the first `drawn` columns of noise (d * columns, LANES)."""
    for i in range(root.shape[0] - 1, -1, -1):
        for c in range(drawn):
            spare = noise.shape[0] - 1
            adds = False
            for j in range(min(i + 1, root.shape[1])):
                combine(noise, adds, 1, spare, (j * columns + c, 0, 0, 0), root[i], j)
                adds = True
            move(noise, i * columns + c, noise, spare)


@jit
def sample_linear(
    streams,
    lanes,
    values,
    first,
    column,
    same,
    pattern,
    noise_columns,
    kind,
    record,
    readout,
    members,
    weight,
    replicas,
    state,
    loss,
    member_loss,
    root,
    drawn,
):
    """Simulate T literal steps of a linear method for the replicas of a block.

    Parameters
    ----------
    streams : ndarray of uint64, shape (d, 4)
        SFC64 state of every direction, advanced in place. A direction draws step by step, column
        by column, replica by replica: the same normals however the steps are divided.
    lanes : ndarray of uint32, shape (4, LANES) or (4, 0)
        xoshiro128++ states, advanced in place: if there are any, normals are of single precision.
    values : ndarray, shape (d, s, nonzeros)
        Nonzero entries of [A | C sd(e)] of each kind of step, row by row, for each direction.
    first : ndarray of int, shape (g, n + 1)
        Index of the first entry of each row, for each pattern of entries.
    column : ndarray of int, shape (g, nonzeros)
        Column of each entry.
    same : ndarray of int, shape (g, n)
        Coordinate whose old value the new one of this row is, or n + an earlier coordinate whose
        new value it is; -1 if it is computed.
    pattern : ndarray of int, shape (s,)
        Pattern of each kind of step.
    noise_columns : int
        m: normals drawn per direction and step.
    kind, record : ndarray of int, shape (T,)
        Kind of each step, and the record after it or -1.
    readout, members : ndarray, shape (records, n) and (records, K, n)
        Evaluated weights and members as linear forms of the state.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    replicas : int
        Lanes that are replicas, the first ones; losses of the others mean nothing.
    state : ndarray, shape (n, d, LANES)
        State of each replica, changed in place.
    loss, member_loss : ndarray, shape (records, LANES)
        Outputs; zero before the call.
    root : ndarray, shape (d, r)
        Root of the noise's correlation matrix; r = 0 for independent directions.
    drawn : int
        Noise columns that are minibatches, the first ones; only these are correlated.
    """
    n, d = state.shape[0], state.shape[1]
    count, correlated = members.shape[1], root.shape[1] > 0
    tile = 1
    while not correlated and 2 * tile * noise_columns <= _ROWS:
        tile *= 2
    normals, spare = 2 * n, 2 * n + tile * noise_columns
    x = aligned(spare + 1)
    noise = aligned(d * noise_columns + 1 if correlated else 0)
    begin, at = np.empty(tile + 1, np.int64), np.empty((tile + 1, n), np.int64)
    alone, square = _single_terms(readout)
    rows = state.reshape(n * d, LANES)
    flat = values.reshape(d, values.shape[1] * values.shape[2])
    single = np.empty((tile * noise_columns + 1, LANES), np.float32)
    for start in range(0, kind.size, tile):
        steps = min(tile, kind.size - start)
        kinds = kind[start : start + steps]
        operations = np.zeros((_count_operations(first, same, pattern, kinds), 4 + TERMS), np.int64)
        _write_down(first, column, same, pattern, kinds, noise_columns, n, operations, begin, at)
        if correlated:
            for i in range(d):
                _draw(streams, lanes, single, i, replicas, noise, i * noise_columns, noise_columns)
            _correlate(root, noise_columns, drawn, noise)
        for i in range(d):
            if correlated:
                for c in range(noise_columns):
                    move(x, normals + c, noise, i * noise_columns + c)
            else:
                _draw(streams, lanes, single, i, replicas, x, normals, steps * noise_columns)
            for j in range(n):
                move(x, j, rows, j * d + i)
            a = flat[i]
            # No function in these loops: a call counts its arrays, which takes as long as a step.
            for t in range(steps):
                for o in range(begin[t], begin[t + 1]):
                    combine(
                        x,
                        operations[o, _ADDS] != 0,
                        operations[o, _TERMS],
                        operations[o, _TO],
                        (
                            operations[o, _FROM],
                            operations[o, _FROM + 1],
                            operations[o, _FROM + 2],
                            operations[o, _FROM + 3],
                        ),
                        a,
                        operations[o, _COEFFICIENT],
                    )
                out = record[start + t]
                if out < 0:
                    continue
                if alone[out] >= 0:
                    add_square(loss, out, x, at[t + 1, alone[out]], weight[i] * square[out])
                else:
                    _add_loss(readout[out], weight[i], x, at[t + 1], spare, loss, out)
                for k in range(count):
                    form, share = members[out, k], weight[i] / count
                    _add_loss(form, share, x, at[t + 1], spare, member_loss, out)
            for j in range(n):
                move(rows, j * d + i, x, at[steps, j])

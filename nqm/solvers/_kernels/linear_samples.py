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
from nqm.solvers._kernels.vectors import (
    CODE_BITS,
    MOVED,
    SIZES,
    add_loss,
    advance,
    aligned,
    combine,
    move,
)

#: Rows of normals that are drawn at once for a direction: they and the state fill the L1 cache.
_ROWS = 32
#: Columns of an operation: row and its first coefficient, the same of a second row or -1, first
#: of the rows that both are combined from, and their number.
_TO, _ENTRY, _OTHER, _OTHER_ENTRY, _FROM, _TERMS = 0, 1, 2, 3, 4, 5


@jit
def _size(n, columns):
    """Index of (n, columns) in `SIZES`, or -1."""
    for k in range(len(SIZES)):
        if SIZES[k][0] == n and SIZES[k][1] == columns:
            return k
    return -1


@jit
def _codes(first, column, same):
    """Code of a step of each pattern, as `advance` takes it."""
    codes = np.zeros(same.shape[0], np.int64)
    for g in range(same.shape[0]):
        for j in range(same.shape[1]):
            code = MOVED + same[g, j]
            if same[g, j] < 0:
                code = 0
                for p in range(first[g, j], first[g, j + 1]):
                    code |= 1 << column[g, p]
            codes[g] |= code << (CODE_BITS * j)
    return codes


@jit
def _free(taken, row):
    """First row from this one on that is not taken."""
    while taken[row]:
        row += 1
    return row


@jit
def _write_down(first, column, same, pattern, kind, columns, operations, sources, begin, at):
    """Write down the operations of some steps.

    A coordinate that another one's old or new value becomes unchanged takes over its row. Two
    coordinates in sequence that are combined from the same ones are one operation.

    Parameters
    ----------
    first, column, same : ndarray of int
        See `sample_linear`.
    pattern : ndarray of int, shape (s,)
        Pattern of each kind of step.
    kind : ndarray of int, shape (T,)
        Kind of each step.
    columns : int
        Normals of one step.
    operations : ndarray of int, shape (>= T n, 6)
        Output.
    sources : ndarray of int, shape (>= T * entries of a step,)
        Output: rows that the operations combine.
    begin : ndarray of int, shape (T + 1,)
        Output: first operation of each step.
    at : ndarray of int, shape (T + 1, n)
        Output: row of each coordinate before each step, and at the end. Rows below 2 n are for
        coordinates, those after that for normals.
    """
    n, count, used = at.shape[1], 0, 0
    for j in range(n):
        at[0, j] = j
    for t in range(kind.size):
        g, old, new = pattern[kind[t]], at[t], at[t + 1]
        begin[t], row, paired = count, 0, False
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
            p, terms = first[g, j], first[g, j + 1] - first[g, j]
            if paired and terms == operations[count - 1, _TERMS]:
                alike = column[g, p : p + terms] == column[g, p - terms : p]
                if alike.all():
                    operations[count - 1, _OTHER] = row
                    operations[count - 1, _OTHER_ENTRY] = kind[t] * column.shape[1] + p
                    paired = False
                    continue
            operation = operations[count]
            operation[_TO], operation[_ENTRY] = row, kind[t] * column.shape[1] + p
            operation[_OTHER], operation[_FROM], operation[_TERMS] = -1, used, terms
            for c in column[g, p : p + terms]:
                sources[used] = old[c] if c < n else 2 * n + t * columns + c - n
                used += 1
            count += 1
            paired = True
    begin[kind.size] = count


@jit
def _draw(streams, i, replicas, x, row, rows):
    """Draw the normals of direction i into rows of x, for the lanes that are replicas."""
    if replicas == LANES:
        fill_normals(streams[i], x[row : row + rows].reshape(rows * LANES))
    else:
        for k in range(row, row + rows):
            fill_normals(streams[i], x[k, :replicas])


@jit
def _correlate(root, columns, drawn, noise):
    """Correlate the directions of the first `drawn` columns of noise (d * columns, LANES)."""
    d, rank = root.shape
    spare, sources = noise.shape[0] - 1, np.empty(rank, np.int64)
    flat = root.reshape(d * rank)
    for i in range(d - 1, -1, -1):
        for c in range(drawn):
            for j in range(rank):
                sources[j] = j * columns + c
            combine(noise, spare, i * rank, -1, 0, sources, 0, min(i + 1, rank), flat)
            move(noise, i * columns + c, noise, spare)


@jit
def _stops(record, stops):
    """Write down after which steps losses are recorded, and the last one; give their number."""
    count = 0
    for t in range(record.size):
        if record[t] >= 0 or t == record.size - 1:
            stops[count] = t
            count += 1
    return count


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
    count, correlated, fast = members.shape[1], root.shape[1] > 0, lanes.size > 0
    size = _size(n, noise_columns)
    few = size >= 0  # few enough for `advance`
    codes = _codes(first, column, same) if few else np.zeros(same.shape[0], np.int64)
    tile = 1
    while not correlated and 2 * tile * noise_columns <= _ROWS:
        tile *= 2
    normals = 2 * n
    x = aligned(normals + tile * noise_columns)
    noise = aligned(d * noise_columns + 1) if correlated else x
    single = np.empty((tile * noise_columns + 1, LANES), np.float32)
    begin, at = np.empty(tile + 1, np.int64), np.empty((tile + 1) * n, np.int64)
    operations = np.empty((tile * n, 6), np.int64)
    sources = np.empty(tile * column.shape[1], np.int64)
    code, entry, stops = np.empty((3, tile), np.int64)
    rows = state.reshape(n * d, LANES)
    flat = values.reshape(d, values.shape[1] * values.shape[2])
    reads, forms = readout.reshape(readout.size), members.reshape(members.size)
    place = np.empty(n, np.int64)
    board, spots = (rows, place) if few else (x, at)
    for start in range(0, kind.size, tile):
        steps = min(tile, kind.size - start)
        kinds, records = kind[start : start + steps], record[start : start + steps]
        drawn_rows = steps * noise_columns
        drawn_single = single[: drawn_rows + drawn_rows % 2]
        pauses = _stops(records, stops)
        if not few:
            _write_down(
                first, column, same, pattern, kinds, noise_columns, operations, sources, begin,
                at.reshape(tile + 1, n),
            )  # fmt: skip
        for t in range(steps):
            code[t], entry[t] = codes[pattern[kinds[t]]], kinds[t] * column.shape[1]
        if correlated:
            for i in range(d):
                _draw(streams, i, replicas, noise, i * noise_columns, noise_columns)
            _correlate(root, noise_columns, drawn, noise)
        for i in range(d):
            if fast:
                fill_lanes(lanes, drawn_single)
            elif not correlated:
                _draw(streams, i, replicas, x, normals, drawn_rows)
            # No function in these loops: a call counts its arrays, which takes as long as a step.
            a, here = flat[i], i * noise_columns if correlated else normals
            for j in range(n):
                place[j] = j * d + i
            if not few:
                for k in range(drawn_rows):
                    if fast:
                        move(x, normals + k, single, k)
                    elif correlated:
                        move(x, normals + k, noise, here + k)
                for j in range(n):
                    move(x, j, rows, place[j])
            since = 0
            for s in range(pauses):
                until = stops[s] + 1
                if few and fast:
                    advance(size, rows, place, single, 0, since, until, code, a, entry)
                elif few:
                    advance(size, rows, place, noise, here, since, until, code, a, entry)
                else:
                    for o in range(begin[since], begin[until]):
                        combine(
                            x,
                            operations[o, _TO],
                            operations[o, _ENTRY],
                            operations[o, _OTHER],
                            operations[o, _OTHER_ENTRY],
                            sources,
                            operations[o, _FROM],
                            operations[o, _TERMS],
                            a,
                        )
                since, out, spot = until, records[until - 1], 0 if few else until * n
                if out < 0:
                    continue
                add_loss(loss, out, board, spots, spot, reads, out * n, n, weight[i])
                for k in range(count):
                    form, share = (out * count + k) * n, weight[i] / count
                    add_loss(member_loss, out, board, spots, spot, forms, form, n, share)
            if not few:
                for j in range(n):
                    move(rows, place[j], x, at[steps * n + j])

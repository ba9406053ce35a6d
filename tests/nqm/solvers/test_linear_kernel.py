"""Compiled steps of linear methods: bit for bit those of NumPy, over random patterns of entries."""

from __future__ import annotations

import numpy as np
import pytest

from nqm.solvers._kernels import fast_normals
from nqm.solvers._kernels.fast_normals import LANES
from nqm.solvers._kernels.lanes import fill_lanes
from nqm.solvers._kernels.linear_samples import sample_linear
from nqm.solvers._kernels.normals import fill_normals, streams
from nqm.solvers._kernels.vectors import SIZES

DIRECTIONS, STEPS, PATTERNS, KINDS, RECORDS, MEMBERS = 3, 75, 4, 9, 5, 2
#: Coordinates and normals: all that stay in registers, and some that do not.
PROGRAMS = [*SIZES, (3, 2), (5, 2), (6, 4)]
Pattern = list[int | list[int]]


def random_pattern(rng: np.random.Generator, n: int, m: int) -> Pattern:
    """Columns that each row combines, or the old or earlier new coordinate that it takes over."""
    rows: Pattern = []
    for j in range(n):
        if rng.random() < 0.3:
            rows.append(int(rng.integers(n + j)))
        elif j and rng.random() < 0.3 and isinstance(rows[-1], list):
            rows.append(rows[-1])  # two rows of the same columns
        else:
            size = 0 if j and rng.random() < 0.1 else int(rng.integers(1, n + m + 1))
            rows.append(sorted(rng.choice(n + m, size, replace=False).tolist()))
    return rows


def packed(patterns: list[Pattern], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`first`, `column` and `same` of `sample_linear`."""
    lists = [[row if isinstance(row, list) else [] for row in rows] for rows in patterns]
    first = np.array([np.cumsum([0, *map(len, rows)]) for rows in lists])
    column = np.zeros((len(patterns), max(1, first[:, -1].max())), dtype=np.int64)
    for g, rows in enumerate(lists):
        column[g, : first[g, -1]] = [c for row in rows for c in row]
    same = [[row if isinstance(row, int) else -1 for row in rows] for rows in patterns]
    return first, column, np.array(same).reshape(-1, n)


def normals(fast: bool, m: int) -> np.ndarray:
    """Draws (directions, steps * m, LANES): a stream per direction, or one in tiles of rows."""
    seed = np.random.SeedSequence(1)
    drawn = np.empty((DIRECTIONS, STEPS * m, LANES))
    if not fast:
        for state, out in zip(streams(seed, DIRECTIONS), drawn, strict=True):
            fill_normals(state, out.reshape(-1))
        return drawn
    lanes, tile = fast_normals.lanes(seed), 2 ** int(np.log2(32 // m)) * m
    for start in range(0, STEPS * m, tile):
        for out in drawn[:, start : start + tile]:
            single = np.empty((len(out) + len(out) % 2, LANES), dtype=np.float32)
            fill_lanes(lanes, single)
            out[...] = single[: len(out)]
    return drawn


@pytest.mark.parametrize("fast", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize(("n", "m"), PROGRAMS)
def test_steps_are_the_products_and_sums_of_their_entries(n: int, m: int, fast: bool) -> None:
    rng = np.random.default_rng(100 * n + m)
    patterns = [random_pattern(rng, n, m) for _ in range(PATTERNS)]
    first, column, same = packed(patterns, n)
    pattern = np.r_[np.arange(PATTERNS), rng.integers(PATTERNS, size=KINDS - PATTERNS)]
    values = 0.5 * rng.standard_normal((DIRECTIONS, KINDS, column.shape[1]))
    kind = rng.integers(KINDS, size=STEPS)
    record = np.full(STEPS, -1)
    record[[0, 5, 6, 40, STEPS - 1]] = np.arange(RECORDS)
    reads = rng.standard_normal((RECORDS, n)) * (rng.random((RECORDS, n)) < 0.7)
    members = rng.standard_normal((RECORDS, MEMBERS, n))
    weight = rng.random(DIRECTIONS)
    begun = rng.standard_normal((n, DIRECTIONS, LANES))

    expected = np.zeros((2, RECORDS, LANES))
    ended, drawn = np.empty_like(begun), normals(fast, m)
    for i in range(DIRECTIONS):
        state = begun[:, i].copy()
        for t in range(STEPS):
            columns = [*state, *drawn[i, t * m : (t + 1) * m]]
            new: list[np.ndarray] = []
            entries = iter(values[i, kind[t]])
            for row in patterns[pattern[kind[t]]]:
                if isinstance(row, int):
                    new.append([*state, *new][row])
                    continue
                products = [next(entries) * columns[c] for c in row]
                new.append(sum(products[1:], products[0]) if products else np.zeros(LANES))
            state = np.array(new)
            if record[t] >= 0:
                forms = [(0, reads[record[t]], weight[i])]
                forms += [(1, form, weight[i] / MEMBERS) for form in members[record[t]]]
                for to, form, share in forms:
                    read = sum(c * x for c, x in zip(form, state, strict=True) if c)
                    expected[to, record[t]] += share * (read * read)
        ended[:, i] = state

    loss = np.zeros((2, RECORDS, LANES))
    seed = np.random.SeedSequence(1)
    lanes = fast_normals.lanes(seed)[:, : LANES if fast else 0]
    sample_linear(
        streams(seed, 0 if fast else DIRECTIONS), lanes, values, first, column, same, pattern, m,
        kind, record, reads, members, weight, LANES, begun, loss[0], loss[1],
        np.empty((DIRECTIONS, 0)), m,
    )  # fmt: skip
    np.testing.assert_array_equal(begun, ended)
    np.testing.assert_array_equal(loss, expected)

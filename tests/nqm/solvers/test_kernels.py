"""The compiled generator draws NumPy's stream, and compiled kernels equal their Python twins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nqm.solvers._kernels import compiling
from nqm.solvers._kernels.moment_steps import propagate_moments
from nqm.solvers._kernels.normals import fill_normals
from nqm.solvers._kernels.ziggurat import LAYERS, TAIL_START, tables
from tests.tolerances import IDENTITY


def generator(seed: int) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.Generator(np.random.SFC64(seed))
    return rng, rng.bit_generator.state["state"]["state"].copy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_normals_are_numpys_stream(seed: int) -> None:
    rng, state = generator(seed)
    out = np.empty(1_000_003)  # beyond every branch: wedges (1 in 100) and tails (1 in 4000)
    fill_normals(state, out)
    reference = rng.standard_normal(out.size)
    assert np.abs(reference).max() > TAIL_START, "the tail was not visited"
    np.testing.assert_allclose(out, reference, rtol=0, atol=IDENTITY)
    np.testing.assert_array_equal(state, rng.bit_generator.state["state"]["state"])


def test_normals_in_pieces_are_the_normals_at_once() -> None:
    _, one = generator(3)
    _, two = generator(3)
    whole, parts = np.empty(1000), np.empty(1000)
    fill_normals(one, whole)
    for part in np.split(parts, [1, 17, 400]):
        fill_normals(two, part)
    np.testing.assert_array_equal(whole, parts)


def test_normals_are_normal() -> None:
    _, state = generator(4)
    out = np.empty(2_000_000)
    fill_normals(state, out)
    assert stats.kstest(out[:200_000], "norm").pvalue > 1e-4
    for beyond in (2.0, 3.0, 4.0, TAIL_START):
        expected = 2 * out.size * stats.norm.sf(beyond)
        count = np.count_nonzero(np.abs(out) > beyond)
        assert abs(count - expected) < 4.5 * np.sqrt(expected)


def test_ziggurat_layers_have_equal_area() -> None:
    _, width, height = tables()
    edge = width * 2.0**52
    tail = np.sqrt(np.pi / 2) * 2 * stats.norm.sf(TAIL_START)
    base = TAIL_START * height[-1] + tail
    # Layer i spans heights f(x_i)..f(x_{i-1}) over 0..x_i; the top one closes at f(0) = 1.
    areas = edge[1:] * (height[:-1] - height[1:])
    assert edge.size == LAYERS
    np.testing.assert_allclose(areas, base, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_compiled_moments_equal_their_python_twin(n: int) -> None:
    rng = np.random.default_rng(n)
    d, kinds, steps = 3, 2, 7
    matrix = rng.normal(size=(kinds, d, n, n)) * 0.5
    root = rng.normal(size=(kinds, d, n, n))
    noise = root @ root.swapaxes(-1, -2)
    kind = rng.integers(kinds, size=steps)
    readout, weight = rng.normal(size=(steps, n)), rng.uniform(size=d)
    results = []
    for kernel in (propagate_moments, propagate_moments.py_func):
        mean, covariance, loss = np.ones((d, n)), np.tile(np.eye(n), (d, 1, 1)), np.zeros(steps)
        kernel(matrix, noise, kind, mean, covariance, readout, True, weight, loss)
        results.append((mean, covariance, loss))
    for compiled, plain in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=IDENTITY, atol=IDENTITY)


UNCACHED = """
import warnings
from numba.core import caching

caching.CacheImpl._locator_classes = []  # as where no folder can be written to

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from nqm.solvers._kernels.normals import fill_normals

import numpy as np

normal = np.empty(3)
fill_normals(np.arange(4, dtype=np.uint64), normal)
print(len(told), told[0].category.__name__, "NUMBA_CACHE_DIR" in str(told[0].message), *normal)
"""


def test_without_a_place_for_the_cache_kernels_still_run():
    """One warning, and the same numbers as with a cache."""
    done = subprocess.run([sys.executable, "-c", UNCACHED], capture_output=True, text=True)
    normal = np.empty(3)
    fill_normals(np.arange(4, dtype=np.uint64), normal)
    assert done.stdout.split() == ["1", "RuntimeWarning", "True", *map(str, normal)], done.stderr


INNER = """
from kernels.compiling import jit

@jit
def inner(x):
    return x + 1
"""
OUTER = """
from kernels.compiling import jit
from kernels.inside import inner

@jit
def outer(x):
    return 10 * inner(x)
"""
CALLED = "from kernels.outside import outer; print(outer(2), sum(outer.stats.cache_hits.values()))"


def test_an_edit_of_another_file_is_not_hidden_by_the_cache(tmp_path: Path) -> None:
    """10 (2 + 1), the same from the cache, and 10 (2 + 5) after an edit of the inner function."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    shutil.copy(compiling.__file__, folder)
    (folder / "outside.py").write_text(OUTER)
    there = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    told = []
    for added in (1, 1, 5):
        (folder / "inside.py").write_text(INNER.replace("x + 1", f"x + {added}"))
        run = [sys.executable, "-c", CALLED]
        done = subprocess.run(run, env=there, capture_output=True, text=True)
        told.append(done.stdout.split())
    assert told == [["30", "0"], ["30", "1"], ["70", "0"]], done.stderr

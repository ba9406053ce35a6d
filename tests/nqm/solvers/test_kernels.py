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

import nqm
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


class Words(np.random.bit_generator.ISeedSequence):
    """A seed that is these words."""

    def __init__(self, words: np.ndarray):
        self.words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        assert (n_words, np.dtype(dtype)) == (len(self.words), np.uint64)
        return self.words


@pytest.mark.parametrize("pieces", [(7,), (3, 4)])
def test_a_direction_draws_a_stream_of_its_own(pieces: tuple[int, ...]) -> None:
    """SGD by NumPy's SFC64, one for each direction, step by step however phases divide them."""
    problem = nqm.Problem([1.0, 0.3, 0.05], [1.0, 2.0, 0.5], initial_variance=0.0, initial_mean=1.0)
    program = nqm.Program(tuple(nqm.Phase(nqm.SGD(), 0.1, steps) for steps in pieces))
    drawn = nqm.sample(problem, program, [7], replicas=5, seed=3)
    (block,) = np.random.SeedSequence(3).spawn(1)
    words = np.random.Philox(block.spawn(2)[1]).random_raw(9).reshape(3, 3)
    weights = []
    for i, (h, v) in enumerate(zip(problem.curvature, problem.noise_variance, strict=True)):
        rng, x = np.random.Generator(np.random.SFC64(Words(words[i]))), np.ones(5)
        for _ in range(7):
            x = x - 0.1 * (h * x + np.sqrt(v) * rng.standard_normal(5))
        weights.append(x)
    expected = np.asarray(problem.weight @ np.square(weights))
    np.testing.assert_allclose(drawn.samples[0], expected, rtol=IDENTITY)


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

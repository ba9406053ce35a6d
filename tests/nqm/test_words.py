"""Representations of objects with arrays are short, and say what is in them."""

from __future__ import annotations

import numpy as np
import pytest

from nqm import SGD, Phase, Problem, Program, solve
from nqm.problems.spectra import harmonic
from nqm.words import array_words


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([1.0, 0.25]), "[1.  , 0.25]"),
        (np.zeros((2, 5)), "<2 x 5: all 0>"),
        (np.arange(1.0, 9.0), "<8: 1 to 8>"),
        (np.array([1.0, np.nan] * 5), "<10: all 1>"),
        (np.array(["a"] * 9), "<9>"),
        (np.empty((0, 3)), "[]"),
        (np.array([True] * 9), "<9>"),
    ],
)
def test_an_array_in_few_words(array: np.ndarray, words: str) -> None:
    assert array_words(array) == words


def test_a_problem_of_many_directions_prints_one_short_line() -> None:
    problem = Problem(harmonic(1000), noise_variance=harmonic(1000))
    line = repr(problem)
    assert "\n" not in line
    assert len(line) < 300
    assert line.startswith("Problem(curvature=<1000: 0.001 to 1>")
    path = solve(problem, Program((Phase(SGD(), 0.5, 20, 1),)))
    assert len(repr(path)) < 1000


def test_all_nan_does_not_warn() -> None:
    assert array_words(np.full(9, np.nan)) == "<9: all nan>"

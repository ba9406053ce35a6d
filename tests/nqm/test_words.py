"""Representations of objects with arrays are short, and say what is in them."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from nqm import SGD, LatePhase, LeastSquares, Phase, Problem, Program, sample, solve, steady
from nqm.problems.spectra import harmonic
from nqm.runs.sweep import Sweep
from nqm.schedule import Linear
from nqm.words import CELL, ROWS, array_words, html_table, short_repr


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


class _Cells(HTMLParser):
    """Texts of the rows of a table; every tag that is opened must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("table", "caption", "b", "thead", "tbody", "tr", "th", "td")
        assert "color" not in str(attrs)  # dark and light backgrounds
        self.open.append(tag)
        if tag in ("tr", "caption"):
            self.rows.append([])
        if tag in ("th", "td", "caption"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def rows(value: Any) -> list[list[str]]:
    """Rows of the table that a notebook shows, the caption first."""
    text = value if isinstance(value, str) else value._repr_html_()
    parser = _Cells()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert len(text) < 5000
    return parser.rows


def entries(value: Any) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(value)[1:]}


def test_html_of_a_problem() -> None:
    assert rows(Problem(harmonic(1000), 2.0 * harmonic(1000))) == [
        ["Problem"],
        ["directions", "1000"],
        ["curvature h", "0.001 to 1"],
        ["noise variance v", "0.002 to 2 (v = 2 h)"],
        ["start", "mean all 0, variance all 1"],
        # 1/2 sum 1/i over 1000 directions: half the harmonic number 7.485471
        ["initial loss", "3.74274"],
    ]
    other = entries(Problem([1.0, 0.5], [1.0, 0.0], multiplicity=[2, 3], irreducible_loss=0.25))
    assert other["directions"] == "2, which stand for 5"
    assert other["noise variance v"] == "0 to 1"
    assert other["irreducible loss"] == "0.25"
    assert entries(Problem([0.0], [0.0]))["noise variance v"] == "all 0"
    assert "yes" in entries(Problem.from_matrices([[2, 1], [1, 3]], [[1, 0], [0, 4]])).values()
    assert entries(LeastSquares([1.0, 2.0], 0.5))["label noise"] == "0.5"


def test_html_of_a_program_and_of_one_phase() -> None:
    late = Phase(LatePhase(5), 0.1, 50, 4, member_lr=0.2)
    program = Program((Phase(SGD(), Linear(0.1, 0.01, 100), 100), late))
    shown = rows(program)
    assert shown[0] == ["Program of 150 steps"]
    assert shown[1] == ["phase", "method", "steps", "lr", "member_lr", "batch_size"]
    number, method, steps, lr, member_lr, batch_size = shown[2]
    assert (number, method, steps, member_lr, batch_size) == ("0", "SGD()", "100", "", "1")
    assert lr.startswith("Linear(")
    assert shown[3][2:] == ["50", "0.1", "0.2", "4"]
    assert rows(late)[2][2:] == ["50", "0.1", "0.2", "4"]
    many = Program(tuple(Phase(SGD(), 0.1, 1) for _ in range(ROWS + 7)))
    assert rows(many)[-1] == ["and 7 more"]
    endless = Program((Phase(SGD(), Linear(0.1, 0.01, 10**15), 10**15, Linear(1, 4, 10**15)),))
    assert rows(endless)[0] == ["Program of 1000000000000000 steps"]
    long = Phase(SGD(), np.linspace(0.1, 0.2, 5000), 5000)
    assert len(rows(long)[2][3]) <= CELL


def test_html_of_results() -> None:
    problem = Problem([1.0], [1.0], initial_mean=1.0, initial_variance=0.0)
    # One step at lr 1 jumps to the noise: loss 1/2; from the start's 1/2.
    path = solve(problem, Program((Phase(SGD(), 1.0, 3),)), [0, 1])
    shown = entries(path)
    assert rows(path)[0] == ["Trajectory (exact)"]
    assert shown["records"] == "2, steps 0 to 1"
    assert shown["first loss"] == shown["last loss"] == "0.5"
    assert shown["bias and variance"] == "0, 0.5"
    assert shown["status"] == "finished"
    assert "average member's" not in shown
    drawn = entries(sample(problem, Program((Phase(SGD(), 1.0, 3),)), [3], replicas=7, seed=0))
    assert drawn["replicas"] == "7"
    assert "±" in drawn["last loss"]
    late = entries(solve(problem, Program((Phase(LatePhase(2), 0.1, 9),)), [9]))
    assert float(late["average member's"]) > float(late["last loss"])
    diverged = entries(solve(problem, Program((Phase(SGD(), 3.0, 900),)), [900]))
    assert diverged["status"] == "diverged"
    # lr v / (2 (2 - lr h)) = 0.25 / 3.5 at lr = 0.25
    assert float(entries(steady(problem, Phase(SGD(), 0.25, 1)))["loss"]) == pytest.approx(
        0.25 / 3.5, rel=1e-5
    )


def test_html_of_a_sweep() -> None:
    base = {"problem": {"curvature": [1.0], "noise_variance": 1.0}}
    base |= {"phase": [{"algorithm": "sgd", "lr": 0.1, "steps": 5}]}
    axes = {"phase.0.lr": list(np.linspace(0.1, 0.9, 9)), "phase.0.steps": [5, 7]}
    assert rows(Sweep(base, axes)) == [
        ["Sweep of 18 cells"],
        ["axis", "values", "which are"],
        ["phase.0.lr", "9", "0.1, 0.2, ..., 0.9"],
        ["phase.0.steps", "2", "5, 7"],
    ]


def test_html_is_escaped() -> None:
    shown = html_table("<b>&", ("<i>",), [("</td><script>", '"x"')])
    assert "<script>" not in shown
    assert rows(shown) == [["<b>&"], ["<i>"], ["</td><script>", '"x"']]


def test_every_short_representation_has_a_table() -> None:
    """Classes with a one-line ``repr`` of their own, found by a walk over the modules."""
    import importlib
    import pkgutil

    import nqm

    found = set()
    for module in pkgutil.walk_packages(nqm.__path__, "nqm."):
        held = vars(importlib.import_module(module.name)).values()
        classes = [one for one in held if isinstance(one, type)]
        found |= {one for one in classes if vars(one).get("__repr__") is short_repr}
    assert len(found) > 10
    assert not [one for one in found if not hasattr(one, "_repr_html_")]

"""What the eight figures share: the problem, its preconditioned forms, the published shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nqm.algorithms.base import Algorithm
from nqm.problems.quadratic import FloatArray, Problem
from nqm.problems.spectra import harmonic
from nqm.tuning.grid_search import search

#: Preconditioners are h^-exponent.
EXPONENTS = (0.0, 0.25, 0.5, 0.75)
#: Added to 1 - (1 - lr h)^2 in the published notebook, against a division by zero.
GUARD = 1e-8
#: Steps at B = 2^14, C = 0.01 as the published notebook counts them (last step above the target).
NOTEBOOK_STEPS = 7447


def model(directions: int) -> Problem:
    """h_i = 1/i, C = H, start N(0, I)."""
    h = harmonic(directions)
    return Problem(h, h)


def preconditioned(directions: int, exponents: Sequence[float] = EXPONENTS) -> list[Problem]:
    """The model under each preconditioner h^-exponent."""
    problem = model(directions)
    return [problem.precondition(problem.curvature**-g) for g in exponents]


def powers_of_two(lowest: int, highest: int, every: int = 1) -> tuple[int, ...]:
    """2^lowest, ..., 2^highest."""
    return tuple(2**k for k in range(lowest, highest + 1, every))


def slow_momenta(count: int, smallest: float = 1e-5) -> FloatArray:
    """1 - mu geometric from 1 down to `smallest`: 0 first, the longest memory last."""
    momenta = 1.0 - np.geomspace(1.0, smallest, count)
    momenta[0] = 0.0
    return momenta


def rounded_down(problem: Problem, bins: int = 100) -> Problem:
    """Every curvature rounded down to the next of `bins` geometric edges, as the notebook does."""
    h = problem.curvature
    edges = np.geomspace(h.min(), h.max(), bins)
    edges[0], edges[-1] = h.min(), h.max()
    place, count = np.unique(np.searchsorted(edges, h, side="right") - 1, return_counts=True)
    return Problem(edges[place], edges[place], multiplicity=count)


def bound(directions: int, target: float, batch_sizes: Sequence[int]) -> pd.DataFrame:
    """Rows of the reference n / (2 C B): what a flat prior would have to learn by sampling."""
    sizes = np.asarray(batch_sizes, dtype=np.float64)
    step = directions / (2.0 * target * sizes)
    return pd.DataFrame({"batch_size": sizes, "step": step, "series": "bound", "kind": "bound"})


def over_bound(table: pd.DataFrame) -> float:
    """Smallest ratio of steps to the bound's, over a table that holds both."""
    line = table[table["kind"] == "bound"].set_index("batch_size")["step"]
    exact = table[table["kind"] == "exact"].dropna(subset="step")
    return float((exact["step"] / exact["batch_size"].map(line)).min())


def curves(table: pd.DataFrame, by: str | list[str]) -> dict[Any, pd.DataFrame]:
    """Rows of each curve by batch size."""
    return {key: rows.sort_values("batch_size") for key, rows in table.groupby(by)}


def turning_point(rows: pd.DataFrame) -> float:
    """Fewest examples over fewest steps: the batch size at which the two limits meet."""
    return float(rows["examples"].min() / rows["step"].min())


def fewest(
    problems: Sequence[Problem],
    exponents: Sequence[float],
    algorithms: Sequence[Algorithm],
    memories: Sequence[float],
    rates: FloatArray,
    batch_sizes: Sequence[int],
    target: float,
) -> pd.DataFrame:
    """`nqm.search` with the exponent and the winner's memory (momentum, decay) by name."""
    found = search(problems, algorithms, rates, batch_sizes, target, horizon=10**9)
    found["exponent"] = np.asarray(exponents, dtype=float)[found["problem"]]
    memory = np.asarray(memories, dtype=float)[found["algorithm"]]
    found["momentum"] = np.where(found["status"] == "reached", memory, np.nan)
    return found.drop(columns=["problem", "algorithm"]).assign(target=target, kind="exact")

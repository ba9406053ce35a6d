"""Parts shared by the eight figures: the problem, preconditioners, the notebook's shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError
from nqm.problems.quadratic import FLAT, FloatArray, Problem
from nqm.problems.spectra import harmonic
from nqm.tuning.grid_search import search

#: Preconditioners are h^-exponent.
EXPONENTS = (0.0, 0.25, 0.5, 0.75)
#: Added to 1 - (1 - lr h)^2 in the published notebook, against a division by zero.
GUARD = 1e-8
#: Steps at B = 2^14, C = 0.01 as the published notebook counts them (last step above the target).
NOTEBOOK_STEPS = 7447


def model(directions: int) -> Problem:
    """Return the problem h_i = 1/i, C = H, start N(0, I).

    Parameters
    ----------
    directions : int
        Number of directions.

    Returns
    -------
    Problem
    """
    h = harmonic(directions)
    return Problem(h, h)


def curved(problem: Problem) -> Problem:
    """Return the directions of a problem that have curvature: the others have no loss.

    Parameters
    ----------
    problem : Problem
        Some curvature is > 0.

    Returns
    -------
    Problem
        Without correlations, on which expected losses do not depend.
    """
    kept = problem.curvature > FLAT * problem.curvature.max()
    names = ("curvature", "noise_variance", "multiplicity", "initial_mean", "initial_variance")
    values = {name: getattr(problem, name)[kept] for name in (*names, "minimum")}
    return problem.replace(**values, noise_correlation=None, initial_correlation=None)


def on_target(problem: Problem, target: float, directions: int) -> float:
    """Return the target that is the same share of a problem's loss at the start as the model's.

    Parameters
    ----------
    problem : Problem
    target : float
        Of `model`.
    directions : int
        Number of directions of `model`.

    Returns
    -------
    float
        `target` itself for `model`.

    Raises
    ------
    NQMError
        If the start has no loss.
    """
    if not problem.initial_loss > 0.0:
        raise NQMError("a target needs a loss at the start; give problem.initial_mean or variance")
    return target * (problem.initial_loss / model(directions).initial_loss)


def preconditioned(problem: Problem, exponents: Sequence[float] = EXPONENTS) -> list[Problem]:
    """Return a problem under each preconditioner (h / h_max)^-exponent.

    Parameters
    ----------
    problem : Problem
        All curvatures are > 0.
    exponents : sequence of float

    Returns
    -------
    list of Problem
        One for each exponent; all have the same largest curvature.
    """
    h = problem.curvature
    return [problem.precondition((h / h.max()) ** -g) for g in exponents]


def powers_of_two(lowest: int, highest: int, every: int = 1) -> tuple[int, ...]:
    """Return 2^lowest, ..., 2^highest.

    Parameters
    ----------
    lowest, highest : int
        Exponents, both included if `every` divides their difference.
    every : int
        Step of the exponent.

    Returns
    -------
    tuple of int
    """
    return tuple(2**k for k in range(lowest, highest + 1, every))


def slow_momenta(count: int, smallest: float = 1e-5) -> FloatArray:
    """Return momenta mu with 1 - mu geometric from 1 to `smallest`.

    Parameters
    ----------
    count : int
        Number of momenta.
    smallest : float
        Last value of 1 - mu.

    Returns
    -------
    ndarray, shape (count,)
        From 0 (no memory) to the longest memory.
    """
    momenta = 1.0 - np.geomspace(1.0, smallest, count)
    momenta[0] = 0.0
    return momenta


def rounded_down(problem: Problem, bins: int = 100) -> Problem:
    """Round every curvature down to a geometric edge, as the published notebook does.

    Parameters
    ----------
    problem : Problem
        Must have C = H and multiplicity 1.
    bins : int
        Number of edges from the smallest to the largest curvature.

    Returns
    -------
    Problem
        One direction per occupied bin, with its multiplicity.
    """
    h = problem.curvature
    edges = np.geomspace(h.min(), h.max(), bins)
    edges[0], edges[-1] = h.min(), h.max()
    place, count = np.unique(np.searchsorted(edges, h, side="right") - 1, return_counts=True)
    return Problem(edges[place], edges[place], multiplicity=count)


def bound(problem: Problem, target: float, batch_sizes: Sequence[int]) -> pd.DataFrame:
    """Return the reference sum(m v / h) / (2 C B) as rows of a table; n / (2 C B) for `model`.

    After N examples the posterior mean under a flat prior has the variance v / (h^2 N) along a
    direction, hence the expected loss sum(m v / h) / (2 N): the reference is the number of steps of
    B examples until this loss is C.

    Parameters
    ----------
    problem : Problem
        All curvatures are > 0.
    target : float
        Target loss C.
    batch_sizes : sequence of int
        Batch sizes B.

    Returns
    -------
    DataFrame
        ``batch_size``, ``step``, and ``series`` and ``kind``, both ``bound``.
    """
    sizes = np.asarray(batch_sizes, dtype=np.float64)
    noise = float((problem.multiplicity * (problem.noise_variance / problem.curvature)).sum())
    step = noise / (2.0 * target * sizes)
    return pd.DataFrame({"batch_size": sizes, "step": step, "series": "bound", "kind": "bound"})


def over_bound(table: pd.DataFrame) -> float:
    """Return the smallest ratio of steps to the bound.

    Parameters
    ----------
    table : DataFrame
        Rows of kind ``exact`` and ``bound`` at the same batch sizes.

    Returns
    -------
    float
    """
    line = table[table["kind"] == "bound"].set_index("batch_size")["step"]
    exact = table[table["kind"] == "exact"].dropna(subset="step")
    return float((exact["step"] / exact["batch_size"].map(line)).min())


def curves(table: pd.DataFrame, by: str | list[str]) -> dict[Any, pd.DataFrame]:
    """Split a table into curves, each sorted by batch size.

    Parameters
    ----------
    table : DataFrame
    by : str or list of str
        Columns that identify a curve.

    Returns
    -------
    dict
        Value of `by` (a tuple for several columns) -> rows of the curve.
    """
    return {key: rows.sort_values("batch_size") for key, rows in table.groupby(by)}


def turning_point(rows: pd.DataFrame) -> float:
    """Return the batch size at which the curve turns: fewest examples over fewest steps.

    Parameters
    ----------
    rows : DataFrame
        One curve, with ``examples`` and ``step``.

    Returns
    -------
    float
    """
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
    """Search the settings of fewest steps, with exponent and memory as columns.

    Parameters
    ----------
    problems : sequence of Problem
        One for each preconditioner.
    exponents : sequence of float
        Exponent of each problem's preconditioner.
    algorithms : sequence of Algorithm
        Candidates.
    memories : sequence of float
        Momentum or decay of each algorithm.
    rates : ndarray
        Learning rates, a geometric grid.
    batch_sizes : sequence of int
    target : float
        Target loss.

    Returns
    -------
    DataFrame
        As `nqm.search` returns it, with ``exponent``, ``momentum`` (of the best algorithm; NaN if
        the target is not reached), ``target`` and ``kind`` in place of indices.
    """
    found = search(problems, algorithms, rates, batch_sizes, target, horizon=10**9)
    found["exponent"] = np.asarray(exponents, dtype=float)[found["problem"]]
    memory = np.asarray(memories, dtype=float)[found["algorithm"]]
    found["momentum"] = np.where(found["status"] == "reached", memory, np.nan)
    return found.drop(columns=["problem", "algorithm"]).assign(target=target, kind="exact")

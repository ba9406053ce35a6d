"""Curvature spectra, and gradient noise that is a power of the curvature.

Each function returns eigenvalues, largest first; `two_cluster` returns multiplicities as well.
`power_noise` gives the noise variance C = scale * H^exponent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import check_memory
from nqm.problems.quadratic import FloatArray, Problem


def harmonic(directions: int, largest: float = 1.0) -> FloatArray:
    """Harmonic spectrum h_i = largest / i (Zhang et al. 2019).

    Parameters
    ----------
    directions : int
        Number of eigenvalues, >= 1.
    largest : float
        Largest eigenvalue, > 0.

    Returns
    -------
    ndarray, shape (directions,)
        Eigenvalues, largest first.
    """
    return power_law(directions, exponent=1.0, largest=largest)


def power_law(directions: int, exponent: float = 1.0, largest: float = 1.0) -> FloatArray:
    """Power-law spectrum h_i = largest * i^-exponent.

    Parameters
    ----------
    directions : int
        Number of eigenvalues, >= 1.
    exponent : float
        Decay of the spectrum, >= 0.
    largest : float
        Largest eigenvalue, > 0.

    Returns
    -------
    ndarray, shape (directions,)
        Eigenvalues, largest first.
    """
    _check_directions(directions)
    check_number("spectrum.exponent", exponent, low=0.0)
    check_number("spectrum.largest", largest, low=0.0, closed_low=False)
    return largest * np.arange(1.0, directions + 1) ** -exponent


def log_uniform(directions: int, smallest: float = 1e-3, largest: float = 1.0) -> FloatArray:
    """Eigenvalues evenly spaced in log h, largest first.

    Parameters
    ----------
    directions : int
        Number of eigenvalues, >= 1.
    smallest, largest : float
        Ends of the spectrum, 0 < smallest <= largest.

    Returns
    -------
    ndarray, shape (directions,)
        Eigenvalues, largest first.
    """
    _check_directions(directions)
    check_number("spectrum.largest", largest, low=0.0, closed_low=False)
    check_number("spectrum.smallest", smallest, low=0.0, high=largest, closed_low=False)
    return np.geomspace(largest, smallest, directions)


def marchenko_pastur(directions: int, ratio: float = 0.5, scale: float = 1.0) -> FloatArray:
    """Quantiles of the Marchenko-Pastur law: eigenvalues of X'X / N for random X of size N x p.

    Parameters
    ----------
    directions : int
        Number of eigenvalues; entry i is the quantile at (i + 1/2) / directions, so for
        ratio > 1 a share 1 - 1 / ratio of them is exactly zero.
    ratio : float
        p / N > 0.
    scale : float
        Variance of the entries of X; the mean eigenvalue in the limit.

    Returns
    -------
    ndarray, shape (directions,)
        Eigenvalues, largest first.
    """
    _check_directions(directions)
    check_number("spectrum.ratio", ratio, low=0.0, closed_low=False)
    check_number("spectrum.scale", scale, low=0.0, closed_low=False)
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    # x = low + (high - low) sin^2(a) removes the square-root singularities at both edges.
    angle = np.linspace(0.0, np.pi / 2, 20_001)
    x = low + (high - low) * np.sin(angle) ** 2
    width = (high - low) * np.sin(angle) * np.cos(angle)
    density = np.divide(width**2, np.pi * ratio * x, where=x > 0, out=np.zeros_like(x))
    if low == 0.0:  # ratio 1: the limit of sin^2 cos^2 / sin^2
        density[0] = (high - low) / (np.pi * ratio)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    mass = min(1.0, 1.0 / ratio)
    cumulative = 1.0 - mass + mass * cumulative / cumulative[-1]
    quantile = (np.arange(directions) + 0.5) / directions
    h = np.where(quantile < 1.0 - mass, 0.0, np.interp(quantile, cumulative, x))
    return scale * h[::-1]


def _check_directions(directions: int) -> None:
    """Raise NQMError unless `directions` is >= 1 and six numbers for each fit in memory."""
    check_integer("spectrum.directions", directions, 1)
    check_memory("spectrum.directions", directions, 6.0 * directions)


def two_cluster(
    outliers: int, bulk: int, outlier: float = 1.0, bulk_value: float = 1e-2
) -> tuple[FloatArray, FloatArray]:
    """Spectrum of a few large eigenvalues and a bulk of equal small ones.

    Parameters
    ----------
    outliers, bulk : int
        Number of directions in each cluster.
    outlier, bulk_value : float
        Eigenvalue of each cluster, > 0.

    Returns
    -------
    curvature, multiplicity : ndarray, shape (2,)
        Eigenvalue and number of directions of each cluster.
    """
    check_integer("spectrum.outliers", outliers, 1)
    check_integer("spectrum.bulk", bulk, 1)
    check_number("spectrum.outlier", outlier, low=0.0, closed_low=False)
    check_number("spectrum.bulk_value", bulk_value, low=0.0, closed_low=False)
    return np.array([outlier, bulk_value]), np.array([float(outliers), float(bulk)])


def power_noise(curvature: ArrayLike, scale: float = 1.0, exponent: float = 1.0) -> FloatArray:
    """Noise variance v = scale * h^exponent.

    Parameters
    ----------
    curvature : array_like, shape (d,)
        Eigenvalues h of the Hessian.
    scale : float
        Noise variance at h = 1, >= 0.
    exponent : float
        1 for C proportional to H, 0 for C proportional to I; >= 0.

    Returns
    -------
    ndarray, shape (d,)
        Variance of one example's gradient along each direction.
    """
    check_number("noise.scale", scale, low=0.0)
    check_number("noise.exponent", exponent, low=0.0)
    h = np.asarray(curvature, dtype=np.float64)
    return scale * h**exponent


def read_problem(path: str | Path) -> Problem:
    """Read a problem from a CSV or Parquet table whose columns are fields of `Problem`.

    Parameters
    ----------
    path : str or Path
        Table with one row per direction. The columns ``curvature`` and ``noise_variance`` are
        required; ``multiplicity``, ``initial_mean``, ``initial_variance`` and ``minimum`` are
        optional.
        Correlated directions have d more columns ``noise_correlation.0``, ``noise_correlation.1``,
        ... (and ``initial_correlation.0``, ...): the columns of that matrix. A column
        ``expected_losses_only`` of true says that the rows are quadrature nodes.

    Returns
    -------
    Problem
        Noisy quadratic problem of as many directions as the table has rows.

    Raises
    ------
    NQMError
        If the file cannot be read, a column is missing, or `Problem` refuses a value.
    """
    from nqm.table import read_table

    table = read_table(Path(path))
    matrices = ("noise_correlation", "initial_correlation")
    mark = "expected_losses_only"
    others = ("irreducible_loss", *matrices, mark)
    known = [name for name in Problem.__dataclass_fields__ if name not in others]
    for name in ("curvature", "noise_variance"):
        if name not in table.columns:
            raise NQMError(f"{path}: column {name!r} is missing; known columns: {', '.join(known)}")
    fields: dict[str, Any] = {n: table[n].to_numpy() for n in known if n in table.columns}
    for name in matrices:
        columns = [f"{name}.{i}" for i in range(len(table))]
        present = [column for column in table.columns if str(column).startswith(f"{name}.")]
        if present:
            if sorted(present) != sorted(columns):
                raise NQMError(
                    f"{path}: {name} needs the columns {columns[0]} to {columns[-1]}, one a row; "
                    f"got {len(present)}"
                )
            fields[name] = table[columns].to_numpy()
    if mark in table.columns:
        fields[mark] = bool(table[mark].any())
    return Problem(**fields)

"""Curvature spectra, and gradient noise that is a power of the curvature.

Each function returns eigenvalues, largest first; `two_cluster` returns multiplicities as well.
`power_noise` gives the noise variance C = scale * H^exponent.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nqm.errors import NQMError, NQMWarning, check_integer, check_number
from nqm.files import check_regular
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
        Table with one row per direction, as `read_fields` reads it. The columns ``curvature`` and
        ``noise_variance`` are required.

    Returns
    -------
    Problem
        Noisy quadratic problem of as many directions as the table has rows.

    Raises
    ------
    NQMError
        If the file cannot be read, a column is missing, or `Problem` refuses a value.
    """
    fields = read_fields(path)
    if "noise_variance" not in fields:
        known = ", ".join(_COLUMNS)
        raise NQMError(f"{path}: column 'noise_variance' is missing; known columns: {known}")
    return Problem(**fields)


#: Fields of `Problem` that are columns, and the names that tools for spectra give to two of them.
_COLUMNS = (
    "curvature",
    "noise_variance",
    "multiplicity",
    "initial_mean",
    "initial_variance",
    "minimum",
)
_ALIASES = {"eigenvalue": "curvature", "weight": "multiplicity"}
#: Eigenvalues below zero down to this share of the largest count as errors of their measurement.
NEGATIVE = 0.01


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read fields of a problem: a table of columns, or an array of eigenvalues.

    Parameters
    ----------
    path : str or Path
        A ``.npy`` file of eigenvalues, or a CSV or Parquet table with one row per direction. Its
        column ``curvature`` is required; ``noise_variance``, ``multiplicity``, ``initial_mean``,
        ``initial_variance`` and ``minimum`` are optional. ``eigenvalue`` is another name of
        ``curvature``, ``weight`` of ``multiplicity``. Correlated directions have d more columns
        ``noise_correlation.0``, ``noise_correlation.1``, ... (and ``initial_correlation.0``, ...):
        the columns of that matrix. A column ``expected_losses_only`` of true says that the rows
        are quadrature nodes.

    Returns
    -------
    dict of str to Any
        Arguments of `Problem`. Eigenvalues from -1 % of the largest to 0, which measured spectra
        have, are set to 0 with a warning.

    Raises
    ------
    NQMError
        If the file cannot be read, a column is missing or stated twice, or an eigenvalue is further
        below 0.
    """
    path = Path(path)
    fields = {"curvature": _array(path)} if path.suffix.lower() == ".npy" else _columns(path)
    fields["curvature"] = _clipped(path, fields["curvature"])
    return fields


def _columns(path: Path) -> dict[str, Any]:
    from nqm.table import read_table

    table = read_table(path)
    for alias, name in _ALIASES.items():
        if alias in table.columns and name in table.columns:
            raise NQMError(f"{path}: columns {alias!r} and {name!r} are the same; drop one")
    table = table.rename(columns=_ALIASES)
    if "curvature" not in table.columns:
        known = ", ".join((*_COLUMNS, *_ALIASES))
        raise NQMError(f"{path}: column 'curvature' is missing; known columns: {known}")
    fields: dict[str, Any] = {n: table[n].to_numpy() for n in _COLUMNS if n in table.columns}
    for name in ("noise_correlation", "initial_correlation"):
        columns = [f"{name}.{i}" for i in range(len(table))]
        present = [column for column in table.columns if str(column).startswith(f"{name}.")]
        if present:
            if sorted(present) != sorted(columns):
                raise NQMError(
                    f"{path}: {name} needs the columns {columns[0]} to {columns[-1]}, one a row; "
                    f"got {len(present)}"
                )
            fields[name] = table[columns].to_numpy()
    mark = "expected_losses_only"
    if mark in table.columns:
        fields[mark] = bool(table[mark].any())
    return fields


def _array(path: Path) -> FloatArray:
    """Eigenvalues of a .npy file, largest first."""
    size = check_regular(path)
    check_memory(f"{path}: numbers", size / 8, 2.0 * size / 8)
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NQMError(f"{path} is no array of numbers ({error!s:.80})") from None
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iuf":
        shape = getattr(values, "shape", None)
        raise NQMError(f"{path} must hold eigenvalues, an array of one axis; got shape {shape}")
    return np.sort(values.astype(np.float64))[::-1]


def _clipped(path: Path, curvature: Any) -> Any:
    """Eigenvalues with slightly negative ones set to 0."""
    try:
        values = np.asarray(curvature, dtype=np.float64)
    except (TypeError, ValueError):
        return curvature  # `Problem` names the value that is no number
    below = values < 0
    if not below.any() or not np.isfinite(values).all():
        return curvature
    least, largest = float(values.min()), float(values.max())
    if -least > NEGATIVE * largest:
        raise NQMError(
            f"{path}: eigenvalue {least:g} is below zero by more than 1 % of the largest, "
            f"{largest:g}; a quadratic loss has a minimum: drop such directions"
        )
    warnings.warn(
        f"{path}: {np.count_nonzero(below)} eigenvalues below zero, the least {least:g}, are set "
        "to 0",
        NQMWarning,
        stacklevel=3,
    )
    return np.maximum(values, 0.0)

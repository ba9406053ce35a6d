"""Correlation between directions, for gradient noise that does not commute with the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.errors import NQMError
from nqm.words import short_html, short_repr

FloatArray = NDArray[np.float64]

#: Covariances below this share of the largest variance count as rounding errors.
ROUNDING = 1e-13
#: The smallest eigenvalue of a stated correlation may be this far below zero.
SEMIDEFINITE = 1e-9


@dataclass(frozen=True, eq=False)
class Correlation:
    """Correlations between the d directions of a problem.

    Attributes
    ----------
    matrix : ndarray, shape (d, d)
        Symmetric, positive semi-definite, with ones on the diagonal; read-only.
    """

    matrix: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    def __post_init__(self) -> None:
        self.matrix.flags.writeable = False

    @classmethod
    def of(cls, name: str, value: ArrayLike | Correlation, size: int) -> Correlation:
        """Validate a correlation matrix.

        Parameters
        ----------
        name : str
            Name of the field, for error messages.
        value : array_like, shape (size, size), or Correlation
            Correlation matrix.
        size : int
            Number d of directions.

        Returns
        -------
        Correlation
            `value` itself if it is one already.

        Raises
        ------
        NQMError
            If it is not a correlation matrix of that size.
        """
        if isinstance(value, Correlation):
            if len(value.matrix) != size:
                raise NQMError(
                    f"{name} has {len(value.matrix)} directions but curvature has {size}"
                )
            return value
        try:
            matrix = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise NQMError(f"{name} must hold numbers; got {value!r:.80}") from None
        if matrix.shape != (size, size):
            raise NQMError(f"{name} must have shape ({size}, {size}); got {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise NQMError(f"{name} must be finite; got NaN or infinity")
        if np.abs(matrix - matrix.T).max() > SEMIDEFINITE:
            raise NQMError(f"{name} must be symmetric; it differs from its transpose")
        diagonal = np.diag(matrix)
        if np.abs(diagonal - 1.0).max() > SEMIDEFINITE:
            worst = diagonal[np.abs(diagonal - 1.0).argmax()]
            raise NQMError(
                f"{name} must have ones on its diagonal (variances are stated apart); got {worst:g}"
            )
        least = float(np.linalg.eigvalsh(matrix)[0])
        if least < -SEMIDEFINITE * size:
            raise NQMError(f"{name} must be positive semi-definite; least eigenvalue: {least:g}")
        return cls(0.5 * (matrix + matrix.T))

    @classmethod
    def of_factor(cls, factor: FloatArray) -> tuple[FloatArray, Self | None]:
        """Split the covariance F F' into variances and correlation.

        Parameters
        ----------
        factor : ndarray, shape (d, r)
            F.

        Returns
        -------
        variance : ndarray, shape (d,)
            Diagonal of the covariance.
        correlation : Correlation or None
            None if the covariance is diagonal up to rounding.
        """
        variance = np.einsum("ij,ij->i", factor, factor)
        covariance = factor @ factor.T
        np.fill_diagonal(covariance, 0.0)
        if np.abs(covariance).max(initial=0.0) <= ROUNDING * variance.max(initial=0.0):
            return variance, None
        sd = np.where(variance > 0.0, np.sqrt(variance), 1.0)
        matrix = covariance / np.outer(sd, sd)
        np.fill_diagonal(matrix, 1.0)
        return variance, cls(matrix)

    @cached_property
    def root(self) -> FloatArray:
        """Lower triangular L of shape (d, r) with L L' = matrix: Cholesky's factor if regular."""
        values, vectors = np.linalg.eigh(self.matrix)
        kept = values > 1e-15 * len(values) * values[-1]
        factor = vectors[:, kept] * np.sqrt(values[kept])
        root = np.ascontiguousarray(np.tril(np.transpose(np.linalg.qr(factor.T, mode="r"))))
        root /= np.sqrt(np.einsum("ij,ij->i", root, root))[:, None]
        root.flags.writeable = False
        return root

    def covariance(self, variance: FloatArray) -> FloatArray:
        """Build the covariance of directions with this correlation.

        Parameters
        ----------
        variance : ndarray, shape (d,)
            Variance of each direction, >= 0.

        Returns
        -------
        ndarray, shape (d, d)
            Covariance matrix.
        """
        sd = np.sqrt(variance)
        return np.asarray(self.matrix * np.outer(sd, sd))


def covariance(correlation: Correlation | None, variance: FloatArray) -> FloatArray:
    """Build the covariance of directions that may be independent.

    Parameters
    ----------
    correlation : Correlation or None
        None for independent directions.
    variance : ndarray, shape (d,)
        Variance of each direction, >= 0.

    Returns
    -------
    ndarray, shape (d, d)
        Covariance matrix, diagonal for independent directions.
    """
    return np.diag(variance) if correlation is None else correlation.covariance(variance)

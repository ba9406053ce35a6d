"""Eigenvalues of an empirical risk's curvature: the largest, and the density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from neural.curvature.lanczos import lanczos_pairs, lanczos_together
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import check_integer

FloatArray = NDArray[np.float64]
#: Called with the number of products with the curvature done since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs of the curvature H, which is the Hessian or its Gauss-Newton part.

    Attributes
    ----------
    values : ndarray, shape (k,)
        Eigenvalues h, decreasing.
    vectors : ndarray, shape (p, k)
        Eigenvectors v, one in each column, orthonormal.
    residuals : ndarray, shape (k,)
        ``|H v - h v|``: an exact eigenvalue lies within that distance of h.
    """

    values: FloatArray
    vectors: FloatArray
    residuals: FloatArray


@dataclass(frozen=True)
class Density:
    """Density of the eigenvalues, as weighted points; known eigenpairs are not included.

    Attributes
    ----------
    values : ndarray, shape (m,)
        Positions of the points, increasing.
    counts : ndarray, shape (m,)
        Number of eigenvalues that each point represents, not whole; the sum is their number.
    """

    values: FloatArray
    counts: FloatArray

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(self.values @ self.counts)


def operator(risk: EmpiricalRisk, progress: Progress | None = None) -> LinearOperator:
    """Wrap the curvature as a SciPy operator, computed in the risk's precision.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    progress : callable, optional
        Called with 1 after every product with the curvature.

    Returns
    -------
    LinearOperator, (p, p)
    """

    def product(v: FloatArray) -> FloatArray:
        direction = torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(risk.weights)
        result = risk.curvature_product(direction).double().cpu().numpy()
        if progress is not None:
            progress(1)
        return np.asarray(result)

    shape = (risk.size, risk.size)
    return LinearOperator(shape, matvec=product, dtype=np.float64)


def products(
    risk: EmpiricalRisk, progress: Progress | None = None
) -> Callable[[FloatArray], FloatArray]:
    """Make a function that multiplies several vectors with the curvature together.

    Parameters
    ----------
    risk, progress
        See `operator`.

    Returns
    -------
    callable
        Maps vectors, shape (m, p), to their products, shape (m, p); for `lanczos_together`.
    """

    def apply(rows: FloatArray) -> FloatArray:
        images = risk.curvature_products(torch.from_numpy(rows).to(risk.weights), progress)
        return np.asarray(images.double().cpu().numpy())

    return apply


def leading_pairs(
    risk: EmpiricalRisk, count: int, *, seed: int = 0, progress: Progress | None = None
) -> Eigenpairs:
    """Approximate the largest eigenvalues and their vectors by one run of Lanczos.

    Of `leading_products` many products the stiff pairs are exact to rounding, those of the flat
    end are not; but the vectors are orthonormal and the curvature is diagonal along them, so that a
    quadratic in these coordinates has errors of the second order of the residuals alone.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    count : int
        Number of eigenpairs, at least 1.
    seed : int
        Seed of the start vector.
    progress : callable, optional
        Called with 1 after every product with the curvature.

    Returns
    -------
    Eigenpairs
        Fewer than `count` if the curvature has fewer different eigenvalues.
    """
    check_integer("count", count, 1)
    start = np.random.default_rng(seed).standard_normal(risk.size)
    nodes, residuals = lanczos_pairs(operator(risk, progress), start, leading_products(count))
    chosen = slice(-1, -min(count, len(nodes.values)) - 1, -1)
    return Eigenpairs(nodes.values[chosen], nodes.vectors[:, chosen], residuals[chosen])


def leading_products(count: int) -> int:
    """Number of products with the curvature of `leading_pairs`.

    Parameters
    ----------
    count : int
        Number of eigenpairs.

    Returns
    -------
    int
    """
    return 20 + count + count // 2


def density(
    risk: EmpiricalRisk,
    known: Eigenpairs | None = None,
    *,
    probes: int = 5,
    steps: int = 80,
    seed: int = 0,
    progress: Progress | None = None,
) -> Density:
    """Estimate the density of the spectrum by stochastic Lanczos quadrature.

    Each random probe is orthogonal to the known eigenvectors; `steps` Lanczos steps give the Gauss
    quadrature of its measure (Golub & Meurant 2010; Ghorbani et al. 2019), which is exact for
    moments up to order 2 `steps` - 1.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    known : Eigenpairs, optional
        Eigenpairs that are left out of the density.
    probes, steps : int
        Number of probes, and of products with the curvature for each.
    seed : int
        Seed of the probes.
    progress : callable, optional
        Called with 1 after every product with the curvature.

    Returns
    -------
    Density
    """
    check_integer("probes", probes, 1)
    check_integer("steps", steps, 1)
    out = np.zeros((risk.size, 0)) if known is None else known.vectors
    left = risk.size - out.shape[1]
    starts = list(np.random.default_rng(seed).standard_normal((probes, risk.size)))
    values, weights = [], []
    for probe in lanczos_together(products(risk, progress), starts, steps, out):
        values.append(probe.values)
        weights.append(probe.amplitudes**2 / np.sum(probe.amplitudes**2))
    joined = np.concatenate(values)
    counts = np.concatenate(weights) * left / probes
    order = np.argsort(joined)
    return Density(joined[order], counts[order])


def binned(spectrum: Density, bins: int) -> Density:
    """Reduce a density to fewer points with the same number of eigenvalues and the same trace.

    Parameters
    ----------
    spectrum : Density
        The density.
    bins : int
        Number of intervals of equal width in the cube root of the eigenvalue. The points of an
        interval are replaced by their mean.

    Returns
    -------
    Density
    """
    check_integer("bins", bins, 1)
    scale = np.cbrt(spectrum.values)
    edges = np.linspace(scale[0], scale[-1], bins + 1)
    group = np.clip(np.searchsorted(edges, scale, side="right") - 1, 0, bins - 1)
    counts = np.zeros(bins)
    sums = np.zeros(bins)
    np.add.at(counts, group, spectrum.counts)
    np.add.at(sums, group, spectrum.counts * spectrum.values)
    filled = counts > 0
    return Density(sums[filled] / counts[filled], counts[filled])

"""Eigenvalues of an empirical risk's curvature: both ends one by one, the bulk as a density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from neural.curvature.lanczos import lanczos_nodes
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError, check_integer, check_number

FloatArray = NDArray[np.float64]
#: Told that one more product with the curvature is done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs of the curvature H, which is the Hessian or its Gauss-Newton part.

    Attributes
    ----------
    values : ndarray, shape (k,)
        Falling.
    vectors : ndarray, shape (p, k)
    residuals : ndarray, shape (k,)
        ``|H v - h v|``: a true eigenvalue lies within that distance.
    """

    values: FloatArray
    vectors: FloatArray
    residuals: FloatArray


@dataclass(frozen=True)
class Density:
    """A spectrum as weighted points: the bulk without the eigenpairs taken out of it.

    Attributes
    ----------
    values : ndarray, shape (m,)
        Rising.
    counts : ndarray, shape (m,)
        Eigenvalues that each point stands for; they sum to those of the bulk.
    """

    values: FloatArray
    counts: FloatArray

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(self.values @ self.counts)


def eigenpairs(
    risk: EmpiricalRisk,
    count: int,
    end: str = "top",
    *,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The `count` largest or smallest eigenvalues, by Lanczos (ARPACK).

    Parameters
    ----------
    risk : EmpiricalRisk
    count : int
        Less than the number of weights.
    end : {"top", "bottom"}
        Algebraically largest or smallest. The Hessian of a network in training has negative ones.
    tolerance : float
        Relative accuracy at which ARPACK stops.
    seed : int
        Seed of the start vector.
    progress : callable, optional
        Called with 1 after every product with the curvature.

    Returns
    -------
    Eigenpairs

    Raises
    ------
    NQMError
        If `count` or `end` is out of range, or the eigenpairs do not converge.
    """
    check_integer("count", count, 1)
    if count >= risk.size:
        raise NQMError(f"count must be less than the {risk.size} weights; got {count}")
    if end not in ("top", "bottom"):
        raise NQMError(f"end must be 'top' or 'bottom'; got {end!r}")
    start = np.random.default_rng(seed).standard_normal(risk.size)
    try:
        values, vectors = eigsh(
            operator(risk, progress),
            k=count,
            which="LA" if end == "top" else "SA",
            tol=tolerance,
            v0=start,
        )
    except ArpackNoConvergence as error:
        raise NQMError(
            f"only {len(error.eigenvalues)} of {count} eigenpairs converged; ask for fewer, or "
            "raise the tolerance"
        ) from None
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    apply = operator(risk, progress)
    products = np.stack([apply.matvec(v) for v in vectors.T], 1)
    return Eigenpairs(values, vectors, np.linalg.norm(products - vectors * values, axis=0))


def operator(risk: EmpiricalRisk, progress: Progress | None = None) -> LinearOperator:
    """The curvature as a SciPy operator, computed in the risk's precision.

    Parameters
    ----------
    risk : EmpiricalRisk
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


def density(
    risk: EmpiricalRisk,
    known: Eigenpairs | None = None,
    *,
    probes: int = 5,
    steps: int = 80,
    seed: int = 0,
    progress: Progress | None = None,
) -> Density:
    """Density of the rest of the spectrum, by stochastic Lanczos quadrature.

    Each random probe is orthogonal to the known eigenvectors; `steps` Lanczos steps give the Gauss
    quadrature of its measure (Golub & Meurant 2010; Ghorbani et al. 2019), which is exact for
    moments up to order 2 `steps` - 1.

    Parameters
    ----------
    risk : EmpiricalRisk
    known : Eigenpairs, optional
        Removed from the spectrum.
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
    apply = operator(risk, progress)
    rng = np.random.default_rng(seed)
    values, weights = [], []
    for _ in range(probes):
        probe = lanczos_nodes(apply, rng.standard_normal(risk.size), steps, out)
        values.append(probe.values)
        weights.append(probe.amplitudes**2 / np.sum(probe.amplitudes**2))
    joined = np.concatenate(values)
    counts = np.concatenate(weights) * left / probes
    order = np.argsort(joined)
    return Density(joined[order], counts[order])


def binned(spectrum: Density, bins: int) -> Density:
    """A density on fewer points, with the same count and the same trace.

    Parameters
    ----------
    spectrum : Density
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
    held = counts > 0
    return Density(sums[held] / counts[held], counts[held])


def trace_estimate(risk: EmpiricalRisk, probes: int = 10, seed: int = 0) -> tuple[float, float]:
    """Estimate the trace of the curvature with random signs (Hutchinson 1990).

    Parameters
    ----------
    risk : EmpiricalRisk
    probes : int
        Number of random vectors, at least 2.
    seed : int

    Returns
    -------
    trace, standard_error : float
    """
    check_number("probes", probes, low=2)
    rng = np.random.default_rng(seed)
    apply = operator(risk)
    values = []
    for _ in range(probes):
        signs = rng.choice([-1.0, 1.0], risk.size)
        values.append(float(signs @ apply.matvec(signs)))
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(probes))

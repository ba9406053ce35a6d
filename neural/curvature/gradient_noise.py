"""Gradient noise of an empirical risk: the covariance of the gradients of single examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError

FloatArray = NDArray[np.float64]
#: Directions of less than this fraction of the largest curvature are left out of power laws.
STIFF = 0.02


@dataclass(frozen=True)
class PowerLaw:
    """Gradient noise as a power of curvature, noise = scale h^exponent.

    Attributes
    ----------
    scale : float
        Noise variance at curvature 1.
    exponent : float
        1 if noise is proportional to curvature.
    """

    scale: float
    exponent: float


def trace(risk: EmpiricalRisk) -> float:
    """Compute the trace of the covariance of the gradient of an example drawn from these N.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.

    Returns
    -------
    float
        With denominator N: minibatches are drawn so.

    Raises
    ------
    NQMError
        If there is only one example.
    """
    return covariance_and_trace(risk, np.zeros((risk.size, 0)))[1]


def covariance(risk: EmpiricalRisk, vectors: FloatArray | None = None) -> FloatArray:
    """Compute the covariance of the gradient of an example drawn from these N along directions.

    One pass over the data suffices for any number of directions: the covariances of batches are
    pooled (Chan, Golub & LeVeque 1983).

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    vectors : ndarray, shape (p, k), optional
        Directions, one in each column; by default every weight is one, for few weights.

    Returns
    -------
    ndarray, shape (k, k)
        With denominator N: minibatches are drawn so.

    Raises
    ------
    NQMError
        If there is only one example.
    """
    return covariance_and_trace(risk, vectors)[0]


def covariance_and_trace(
    risk: EmpiricalRisk, vectors: FloatArray | None = None
) -> tuple[FloatArray, float]:
    """`covariance` along some directions and `trace`, in one pass over the data.

    Parameters
    ----------
    risk, vectors
        See `covariance`.

    Returns
    -------
    covariance : ndarray, shape (k, k)
        With denominator N: minibatches are drawn so.
    trace : float
        That of the covariance of all weights.

    Raises
    ------
    NQMError
        If there is only one example.
    """
    count = risk.size if vectors is None else vectors.shape[1]
    mean, products = np.zeros(count), np.zeros((count, count))
    total, squares = np.zeros(risk.size), 0.0
    done = 0
    for gradients in risk.example_gradients():
        g = gradients.double().cpu().numpy()
        total += g.sum(0)
        squares += float(np.einsum("ij,ij->", g, g))
        g = g if vectors is None else g @ vectors
        centre = g.mean(0)
        apart, off, share = g - centre, centre - mean, len(g) / (done + len(g))
        products += apart.T @ apart + done * share * np.outer(off, off)
        mean += share * off
        done += len(g)
    if done < 2:
        raise NQMError(f"gradient noise needs at least two examples; got {done}")
    return products / done, (squares - float(total @ total) / done) / done


def fit_power_law(curvature: FloatArray, noise: FloatArray) -> PowerLaw:
    """Fit noise = scale curvature^exponent by least squares in the logarithms.

    Parameters
    ----------
    curvature, noise : ndarray, shape (k,)
        Curvature and noise variance along k directions. Directions without noise, and those below
        `STIFF` times the largest curvature, are left out: their curvature is mostly weight decay,
        and they follow no power law.

    Returns
    -------
    PowerLaw

    Raises
    ------
    NQMError
        If fewer than two directions remain.
    """
    chosen = (curvature > max(STIFF * curvature.max(initial=0.0), 0.0)) & (noise > 0)
    if chosen.sum() < 2:
        raise NQMError("a power law needs at least two stiff directions with positive noise")
    exponent, log_scale = np.polyfit(np.log(curvature[chosen]), np.log(noise[chosen]), 1)
    return PowerLaw(float(np.exp(log_scale)), float(exponent))


def noise_exponent(curvature: FloatArray, noise: FloatArray) -> float:
    """Exponent of `fit_power_law`; NaN if fewer than two directions can be fitted.

    Parameters
    ----------
    curvature, noise : ndarray, shape (k,)
        See `fit_power_law`.

    Returns
    -------
    float
        The exponent.
    """
    try:
        return fit_power_law(curvature, noise).exponent
    except NQMError:
        return float("nan")


@dataclass(frozen=True)
class NoiseScale:
    """Gradient noise scale ``B_simple = tr C / |g|^2`` (McCandlish et al. 2018).

    Attributes
    ----------
    trace : float
        Unbiased estimate of the trace of the covariance of one example's gradient, tr C.
    squared_gradient : float
        Unbiased estimate of the squared norm of the mean gradient, ``|g|^2``; it may be negative.
    """

    trace: float
    squared_gradient: float

    @property
    def value(self) -> float:
        """The noise scale in examples; infinite if `squared_gradient` is not positive."""
        return self.trace / self.squared_gradient if self.squared_gradient > 0 else float("inf")


def noise_scale(small: FloatArray, large: FloatArray, sizes: tuple[float, float]) -> NoiseScale:
    """Estimate the noise scale from squared norms of minibatch gradients at two batch sizes.

    Numerator and denominator are averaged separately and divided last (McCandlish et al. 2018,
    appendix A.1).

    Parameters
    ----------
    small, large : ndarray
        Squared norms of the gradients of minibatches of the smaller and of the larger size.
    sizes : tuple of float
        The two batch sizes.

    Returns
    -------
    NoiseScale

    Raises
    ------
    NQMError
        If the sizes are not positive and increasing.
    """
    b, big = sizes
    if not 0 < b < big:
        raise NQMError(f"sizes must be positive and increasing; got {b:g} and {big:g}")
    at_small, at_large = float(np.mean(small)), float(np.mean(large))
    trace = (at_small - at_large) / (1.0 / b - 1.0 / big)
    return NoiseScale(trace, (big * at_large - b * at_small) / (big - b))

"""Gradient noise of an empirical risk: how the slopes of single examples scatter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError

FloatArray = NDArray[np.float64]
#: Share of the largest curvature below which a direction says nothing of the noise's law.
STIFF = 0.02


@dataclass(frozen=True)
class PowerLaw:
    """Noise against curvature, c = scale h^exponent.

    Attributes
    ----------
    scale, exponent : float
    """

    scale: float
    exponent: float


def trace(risk: EmpiricalRisk) -> float:
    """Trace of the covariance of the examples' gradients.

    Parameters
    ----------
    risk : EmpiricalRisk

    Returns
    -------
    float

    Raises
    ------
    NQMError
        If there is only one example.
    """
    mean = torch.zeros(risk.size, dtype=torch.float64)
    squares = 0.0
    for gradients in risk.example_gradients():
        g = gradients.double().cpu()
        mean += g.sum(0)
        squares += float(g.square().sum())
    n = risk.examples
    if n < 2:
        raise NQMError("gradient noise needs at least two examples; got 1")
    return (squares - float((mean / n).square().sum()) * n) / (n - 1)


def covariance(risk: EmpiricalRisk, vectors: FloatArray | None = None) -> FloatArray:
    """Covariance of the examples' gradients along some directions.

    It takes one pass over the data for any number of directions: the covariances of batches are
    pooled (Chan, Golub & LeVeque 1983).

    Parameters
    ----------
    risk : EmpiricalRisk
    vectors : ndarray, shape (p, k), optional
        Directions; the weights themselves by default, which must then be few.

    Returns
    -------
    ndarray, shape (k, k)

    Raises
    ------
    NQMError
        If there is only one example.
    """
    count = risk.size if vectors is None else vectors.shape[1]
    mean, products = np.zeros(count), np.zeros((count, count))
    done = 0
    for gradients in risk.example_gradients():
        g = gradients.double().cpu().numpy()
        g = g if vectors is None else g @ vectors
        centre = g.mean(0)
        apart, off, share = g - centre, centre - mean, len(g) / (done + len(g))
        products += apart.T @ apart + done * share * np.outer(off, off)
        mean += share * off
        done += len(g)
    if done < 2:
        raise NQMError(f"gradient noise needs at least two examples; got {done}")
    return products / (done - 1)


def fit_power_law(curvature: FloatArray, noise: FloatArray) -> PowerLaw:
    """Fit noise = scale curvature^exponent by least squares in the logarithms.

    Parameters
    ----------
    curvature, noise : ndarray, shape (k,)
        Directions without noise, and those below `STIFF` times the largest curvature, are left out:
        there, weight decay is most of the curvature, and no law holds.

    Returns
    -------
    PowerLaw

    Raises
    ------
    NQMError
        If fewer than two directions are left.
    """
    held = (curvature > max(STIFF * curvature.max(initial=0.0), 0.0)) & (noise > 0)
    if held.sum() < 2:
        raise NQMError("a power law needs at least two stiff directions with positive noise")
    exponent, log_scale = np.polyfit(np.log(curvature[held]), np.log(noise[held]), 1)
    return PowerLaw(float(np.exp(log_scale)), float(exponent))


def noise_exponent(curvature: FloatArray, noise: FloatArray) -> float:
    """Exponent of `fit_power_law`; NaN if fewer than two directions can be fitted.

    Parameters
    ----------
    curvature, noise : ndarray, shape (k,)

    Returns
    -------
    float
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
    trace, squared_gradient, value : float
        Unbiased numerator and denominator, and their ratio in examples.
    """

    trace: float
    squared_gradient: float

    @property
    def value(self) -> float:
        """Examples at which noise and gradient are of one size; infinite at a minimum."""
        return self.trace / self.squared_gradient if self.squared_gradient > 0 else float("inf")


def noise_scale(small: FloatArray, large: FloatArray, sizes: tuple[float, float]) -> NoiseScale:
    """Noise scale from squared norms of minibatch gradients at two batch sizes.

    Numerator and denominator are averaged separately and divided last (McCandlish et al. 2018,
    appendix A.1).

    Parameters
    ----------
    small, large : ndarray
        ``|g|^2`` of minibatches of the smaller and the larger size.
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
    s, l = float(np.mean(small)), float(np.mean(large))  # noqa: E741
    return NoiseScale((s - l) / (1.0 / b - 1.0 / big), (big * l - b * s) / (big - b))

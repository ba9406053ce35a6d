"""Gradient noise of a landscape: how the slopes of single examples scatter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from neural.curvature import Landscape
from neural.spectrum import Eigenpairs
from nqm.errors import NQMError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """Noise against curvature, c = scale h^exponent.

    Attributes
    ----------
    scale, exponent : float
    """

    scale: float
    exponent: float

    def __call__(self, h: ArrayLike) -> FloatArray:
        """Noise variance at curvature h; none where h <= 0."""
        h = np.asarray(h, dtype=np.float64)
        return np.where(h > 0, self.scale * np.maximum(h, 1e-300) ** self.exponent, 0.0)


def along(
    landscape: Landscape, vectors: FloatArray, progress: Callable[[int], None] | None = None
) -> FloatArray:
    """Variance over examples of the slope along each direction, shape (k,).

    One forward derivative of the vector of losses per direction gives the slopes of all examples:
    no example's gradient is ever formed.

    Parameters
    ----------
    landscape : Landscape
    vectors : ndarray, shape (p, k)
        Of length 1.
    progress : callable, optional
        Told that one more direction is done.
    """
    found = []
    for v in vectors.T:
        slopes = landscape.example_slopes(torch.from_numpy(v.copy()).to(landscape.weights))
        found.append(float(slopes.double().var(correction=1)))
        if progress is not None:
            progress(1)
    return np.array(found)


def trace(landscape: Landscape) -> float:
    """Trace of the covariance of the examples' gradients."""
    mean = torch.zeros(landscape.size, dtype=torch.float64)
    squares = 0.0
    for gradients in landscape.example_gradients():
        g = gradients.double().cpu()
        mean += g.sum(0)
        squares += float(g.square().sum())
    n = landscape.examples
    if n < 2:
        raise NQMError("noise needs two examples at least; got 1")
    return (squares - float((mean / n).square().sum()) * n) / (n - 1)


def covariance(landscape: Landscape) -> FloatArray:
    """Covariance of the examples' gradients, shape (p, p), for few weights."""
    gradients = torch.cat(list(landscape.example_gradients())).double().cpu().numpy()
    return np.atleast_2d(np.cov(gradients, rowvar=False))


def fit_power_law(curvature: FloatArray, noise: FloatArray) -> PowerLaw:
    """Least squares in the logarithms, over directions of positive curvature and noise."""
    held = (curvature > 0) & (noise > 0)
    if held.sum() < 2:
        raise NQMError("a power law needs two directions of positive curvature and noise at least")
    exponent, log_scale = np.polyfit(np.log(curvature[held]), np.log(noise[held]), 1)
    return PowerLaw(float(np.exp(log_scale)), float(exponent))


def bulk_law(pairs: Eigenpairs, noise: FloatArray, rest: FloatArray, total: float) -> PowerLaw:
    """Power law of the bulk: the exponent of the top directions, the scale of what is left.

    Parameters
    ----------
    pairs : Eigenpairs
    noise : ndarray, shape (k,)
        Along them.
    rest : ndarray
        Curvatures of the bulk, one for each direction (or repeated by count).
    total : float
        Trace of the noise of all directions.
    """
    law = fit_power_law(pairs.values, noise)
    shape = float(PowerLaw(1.0, law.exponent)(rest).sum())
    left = total - float(noise.sum())
    return PowerLaw(max(left, 0.0) / shape if shape > 0 else 0.0, law.exponent)


@dataclass(frozen=True)
class NoiseScale:
    """Gradient noise scale B_simple = tr C / |g|^2 (McCandlish et al. 2018).

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

    Numerator and denominator are averaged each by itself, and divided last.

    Parameters
    ----------
    small, large : ndarray
        |g|^2 of minibatches of the smaller and the larger size.
    sizes : tuple of float
        The two batch sizes.
    """
    b, big = sizes
    if not 0 < b < big:
        raise NQMError(f"sizes must rise and be positive; got {b:g} and {big:g}")
    s, l = float(np.mean(small)), float(np.mean(large))  # noqa: E741
    return NoiseScale((s - l) / (1.0 / b - 1.0 / big), (big * l - b * s) / (big - b))

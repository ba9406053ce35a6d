"""Corruptions by noise: of the sensor, of photon counts, of dead pixels.

In this package images are float32 (N, C, H, W) in [0, 1]. Results may leave that range; the caller
clips them.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def gaussian_noise(x: Tensor, sd: float, rng: Generator) -> Tensor:
    """Add sensor noise: x + sd eps, eps ~ N(0, 1).

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    sd : float
        Standard deviation of the noise.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return x + sd * torch.randn(x.shape, generator=rng)


def speckle_noise(x: Tensor, sd: float, rng: Generator) -> Tensor:
    """Add noise in proportion to the signal: x (1 + sd eps), eps ~ N(0, 1).

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    sd : float
        Standard deviation of the noise, relative to the signal.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return x * (1 + sd * torch.randn(x.shape, generator=rng))


def shot_noise(x: Tensor, photons: float, rng: Generator) -> Tensor:
    """Draw Poisson counts with mean ``photons x`` and divide by `photons`; variance x / photons.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    photons : float
        Mean count at x = 1.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return torch.poisson(x * photons, generator=rng) / photons


def impulse_noise(x: Tensor, share: float, rng: Generator) -> Tensor:
    """Replace a fraction of all values by 0 or 1, with equal probability.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    share : float
        Fraction of the values that are replaced, in [0, 1].
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    u = torch.rand(x.shape, generator=rng)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))

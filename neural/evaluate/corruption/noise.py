"""Corruptions by noise: of the sensor, of photon counts, of dead pixels.

Here and beside: images are float32 (N, C, H, W) in [0, 1]; results may leave that range and are
clipped by the caller; all randomness comes from `rng`.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def gaussian_noise(x: Tensor, sd: float, rng: Generator) -> Tensor:
    """Sensor noise: x + sd eps.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    sd : float
        Standard deviation.
    rng : Generator

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return x + sd * torch.randn(x.shape, generator=rng)


def speckle_noise(x: Tensor, sd: float, rng: Generator) -> Tensor:
    """Noise in proportion to the signal: x (1 + sd eps).

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    sd : float
        Relative standard deviation.
    rng : Generator

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return x * (1 + sd * torch.randn(x.shape, generator=rng))


def shot_noise(x: Tensor, photons: float, rng: Generator) -> Tensor:
    """Poisson counts with mean ``photons x``, scaled back: variance x / photons.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    photons : float
        Mean count at x = 1.
    rng : Generator

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return torch.poisson(x * photons, generator=rng) / photons


def impulse_noise(x: Tensor, share: float, rng: Generator) -> Tensor:
    """Replace a share of all values by 0 or 1, at even odds.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    share : float
        In [0, 1].
    rng : Generator

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    u = torch.rand(x.shape, generator=rng)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))

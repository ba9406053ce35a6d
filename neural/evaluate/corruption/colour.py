"""Corruptions of brightness, contrast and colour, and fog."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

#: Weights of red, green and blue in luma (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)
#: Brightness of thick fog.
AIRLIGHT = 0.9


def brightness(x: Tensor, shift: float, rng: Generator) -> Tensor:
    """Add light: x + shift.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    shift : float
        Added to every value.
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    return x + shift


def contrast(x: Tensor, factor: float, rng: Generator) -> Tensor:
    """Reduce contrast: m + factor (x - m), m the mean of each image and channel.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    factor : float
        Factor of the differences from the mean; 1 changes nothing.
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def saturate(x: Tensor, factor: float, rng: Generator) -> Tensor:
    """Strengthen colours: g + factor (x - g), g the luma of each pixel; grey images do not change.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    factor : float
        Factor of the differences from the luma; 1 changes nothing.
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    if x.shape[1] != len(LUMA):
        return x
    grey = (x * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    return grey + factor * (x - grey)


def fog(x: Tensor, depth: float, rng: Generator) -> Tensor:
    """Add fog by Koschmieder's law, x e^-d + A (1 - e^-d), with optical depth d = depth * plasma.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    depth : float
        Largest optical depth.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    transmission = torch.exp(-depth * plasma(len(x), x.shape[2], x.shape[3], rng))
    return x * transmission + AIRLIGHT * (1 - transmission)


def plasma(n: int, height: int, width: int, rng: Generator) -> Tensor:
    """Draw fractal clouds: noise on grids of 2, 3, 5, 9, ... points a side, each half as strong.

    Parameters
    ----------
    n : int
        Number of images.
    height, width : int
        Size of an image, in pixels.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (n, 1, height, width)
        Scaled to the range from 0 to 1 in every image.
    """
    cloud, size, strength = torch.zeros(n, 1, height, width), 2, 1.0
    while size <= max(height, width):
        grid = torch.rand(n, 1, size, size, generator=rng)
        smooth = functional.interpolate(grid, (height, width), mode="bilinear", align_corners=True)
        cloud, size, strength = cloud + strength * smooth, 2 * size - 1, strength / 2
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    return (cloud - low) / (high - low).clamp_min(1e-6)

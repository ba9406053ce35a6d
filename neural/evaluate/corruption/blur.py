"""Corruptions by averaging over neighbouring pixels: lens, focus, motion. Lengths are in pixels.

Kernels sum to 1 and the edge is repeated at borders, so that constant images do not change.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional


def gaussian_blur(x: Tensor, sigma: float, rng: Generator) -> Tensor:
    """Filter with a Gaussian kernel, cut at four standard deviations.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    sigma : float
        Standard deviation, in pixels.
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    reach = math.ceil(4 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    return convolve(convolve(x, kernel[None, :, None]), kernel[None, None, :])


def defocus_blur(x: Tensor, radius: float, rng: Generator) -> Tensor:
    """Filter with a disk, its rim weighted by the distance over one pixel.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    radius : float
        Radius, in pixels.
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    dy, dx = _offsets(math.ceil(radius))
    return convolve(x, (radius + 0.5 - torch.hypot(dx, dy)).clamp(0, 1)[None])


def motion_blur(x: Tensor, length: float, rng: Generator) -> Tensor:
    """Blur by straight motion, in a random direction for each image.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    length : float
        Length of the motion, in pixels.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    dy, dx = _offsets(math.ceil(length / 2))
    angle = math.pi * torch.rand(len(x), 1, 1, generator=rng)
    along = (dx * angle.cos() + dy * angle.sin()).abs()
    across = (dy * angle.cos() - dx * angle.sin()).abs()
    return convolve(x, (1 - across).clamp(0, 1) * (length / 2 + 0.5 - along).clamp(0, 1))


def convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """Filter each image with its kernel, scaled to sum to 1.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images.
    kernels : Tensor, shape (N, k, l) or (1, k, l), k and l odd
        One kernel for each image, or one for all.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    n, c = x.shape[:2]
    kernels = (kernels / kernels.sum((1, 2), keepdim=True))[:, None]
    tall, wide = kernels.shape[2] // 2, kernels.shape[3] // 2
    pad = [wide, wide, tall, tall]
    if len(kernels) == 1:
        padded = functional.pad(x.reshape(n * c, 1, *x.shape[2:]), pad, mode="replicate")
        return functional.conv2d(padded, kernels).reshape(x.shape)
    padded = functional.pad(x.transpose(0, 1), pad, mode="replicate")
    return functional.conv2d(padded, kernels, groups=n).transpose(0, 1)


def _offsets(reach: int) -> tuple[Tensor, Tensor]:
    """Row and column offsets of a (2 reach + 1) square window from its centre."""
    steps = torch.arange(-reach, reach + 1.0)
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    return dy, dx

"""Corruptions by resampling and compression: pixelate, JPEG, elastic deformation."""

from __future__ import annotations

import io
import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

from neural.evaluate.corruption.blur import gaussian_blur

#: Standard deviation, in pixels, of the Gaussian filter that smooths elastic displacements.
STIFFNESS = 3.0


def pixelate(x: Tensor, scale: float, rng: Generator) -> Tensor:
    """Divide rows and columns into ``scale * size`` groups of neighbours; average each block.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    scale : float
        Number of groups relative to the number of rows or columns, in (0, 1].
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """

    def averaging(side: int) -> Tensor:
        group = torch.arange(side) * max(1, round(scale * side)) // side
        same = (group[:, None] == group).float()
        return same / same.sum(1, keepdim=True)

    return averaging(x.shape[2]) @ x @ averaging(x.shape[3]).T


def jpeg_compression(x: Tensor, quality: float, rng: Generator) -> Tensor:
    """Encode and decode each image with Pillow at the given quality; 1 or 3 channels.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    quality : float
        Pillow's JPEG quality, 1 to 95.
    rng : Generator
        Not used: there is nothing random.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    import numpy as np
    from PIL import Image

    pixels = (x * 255).round().to(torch.uint8).movedim(1, -1).contiguous().numpy()
    decoded = np.empty_like(pixels)
    for i, image in enumerate(pixels):
        buffer = io.BytesIO()
        grey = image.shape[-1] == 1
        Image.fromarray(image[..., 0] if grey else image).save(buffer, "JPEG", quality=int(quality))
        decoded[i] = np.asarray(Image.open(buffer)).reshape(image.shape)
    return torch.from_numpy(decoded).movedim(-1, 1) / 255


def elastic_transform(x: Tensor, shift: float, rng: Generator) -> Tensor:
    """Move each pixel by a smooth Gaussian displacement.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Images with values in [0, 1].
    shift : float
        Standard deviation along each axis, in pixels.
    rng : Generator
        Source of the random numbers.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    n, _, height, width = x.shape
    # White noise with a margin, so that the borders move like the rest.
    margin = math.ceil(4 * STIFFNESS)
    white = torch.randn(n, 2, height + 2 * margin, width + 2 * margin, generator=rng)
    field = gaussian_blur(white, STIFFNESS, rng)[..., margin:-margin, margin:-margin]
    # The filter leaves a standard deviation of 1 / (2 sqrt(pi) STIFFNESS).
    field = shift * 2 * math.sqrt(math.pi) * STIFFNESS * field
    columns = torch.arange(width) + field[:, 0]
    rows = torch.arange(height)[:, None] + field[:, 1]
    grid = torch.stack([columns, rows], -1)
    size = torch.tensor([width, height])
    return functional.grid_sample(
        x, (2 * grid + 1) / size - 1, padding_mode="border", align_corners=False
    )

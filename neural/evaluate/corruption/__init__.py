"""Image corruptions in the style of CIFAR-10-C, and a reader of the published files.

The kinds and their five severities follow the idea of Hendrycks & Dietterich (2019), but the
implementations and strengths are this library's: numbers measured with `corrupt` are
"CIFAR-10-C style" and cannot be compared with published CIFAR-10-C numbers. For these, read the
published files with `load_cifar10_c`. Lengths are in pixels, for images of about 32 x 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from neural.evaluate.corruption.blur import defocus_blur, gaussian_blur, motion_blur
from neural.evaluate.corruption.cifar10_c import CIFAR10C, load_cifar10_c
from neural.evaluate.corruption.colour import brightness, contrast, fog, saturate
from neural.evaluate.corruption.noise import (
    gaussian_noise,
    impulse_noise,
    shot_noise,
    speckle_noise,
)
from neural.evaluate.corruption.resample import elastic_transform, jpeg_compression, pixelate
from nqm.errors import NQMError, check_integer, suggest

__all__ = ["CIFAR10C", "CORRUPTIONS", "Corruption", "corrupt", "load_cifar10_c"]


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption and its five strengths.

    Attributes
    ----------
    apply : callable
        ``apply(images, strength, rng)`` takes float32 images (N, C, H, W) in [0, 1] and returns
        corrupted ones.
    strengths : tuple of five floats
        Strengths of severities 1 to 5; see the docstring of `apply` for their unit.
    """

    apply: Callable[[Tensor, float, Generator], Tensor]
    strengths: tuple[float, float, float, float, float]


#: Every corruption by name.
CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": Corruption(gaussian_noise, (0.03, 0.05, 0.07, 0.09, 0.12)),
        "shot_noise": Corruption(shot_noise, (400, 200, 100, 60, 40)),
        "impulse_noise": Corruption(impulse_noise, (0.01, 0.02, 0.035, 0.055, 0.08)),
        "speckle_noise": Corruption(speckle_noise, (0.06, 0.1, 0.14, 0.18, 0.24)),
        "gaussian_blur": Corruption(gaussian_blur, (0.45, 0.6, 0.75, 0.9, 1.1)),
        "defocus_blur": Corruption(defocus_blur, (0.6, 0.9, 1.2, 1.5, 1.9)),
        "motion_blur": Corruption(motion_blur, (1.5, 2.5, 3.5, 4.5, 6.0)),
        "brightness": Corruption(brightness, (0.05, 0.1, 0.16, 0.23, 0.3)),
        "contrast": Corruption(contrast, (0.75, 0.55, 0.4, 0.3, 0.2)),
        "saturate": Corruption(saturate, (1.4, 1.8, 2.3, 2.9, 3.6)),
        "fog": Corruption(fog, (0.35, 0.6, 0.9, 1.3, 1.8)),
        "pixelate": Corruption(pixelate, (0.9, 0.8, 0.65, 0.5, 0.4)),
        "jpeg_compression": Corruption(jpeg_compression, (80, 60, 45, 30, 18)),
        "elastic_transform": Corruption(elastic_transform, (0.3, 0.5, 0.7, 0.95, 1.25)),
    }
)


def corrupt(pixels: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt a batch of images.

    Parameters
    ----------
    pixels : Tensor of uint8, shape (N, C, H, W)
        Images with C = 1 or 3 channels.
    name : str
        Name of the corruption, one of `CORRUPTIONS`.
    severity : int
        Severity from 1 (mild) to 5.
    seed : int
        Seed of the random numbers. They are drawn for the whole batch: corrupt a test set in one
        call, not in batches of varying size.

    Returns
    -------
    Tensor of uint8, shape (N, C, H, W)
        On the device of `pixels`. It is computed on the CPU and does not depend on the device.

    Raises
    ------
    NQMError
        If the name is unknown, the severity is out of range, or the images have another form.
    """
    if name not in CORRUPTIONS:
        raise NQMError(f"corrupt: unknown corruption {name!r}{suggest(name, CORRUPTIONS)}")
    check_integer("corrupt: severity", severity, 1)
    if severity > 5:
        raise NQMError(f"corrupt: severity must lie in 1..5; got {severity}")
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise NQMError(
            "corrupt: expected uint8 pixels (N, C, H, W) with C = 1 or 3; got "
            f"{pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    corruption = CORRUPTIONS[name]
    rng = Generator().manual_seed(seed)
    with torch.no_grad():
        damaged = corruption.apply(pixels.cpu() / 255, corruption.strengths[severity - 1], rng)
        return (damaged.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().to(pixels.device)

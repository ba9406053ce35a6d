"""Random crop, flip and cutout of a whole batch in a handful of vectorised calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from nqm.errors import NQMError, check_integer, suggest

#: Augmentations by name; `cutout` is asked for by its size instead.
AUGMENTATIONS = ("crop", "flip")
#: One number for each channel.
Constants = Sequence[float] | Tensor


@dataclass(frozen=True)
class Draws:
    """The random numbers of an augmentation, one column for each image.

    Attributes
    ----------
    table : Tensor
        (5, N) int64: row and column offset of the crop in the padded image, mirrored (0 or 1),
        row and column of the cutout's centre. One table, so one copy to the device.
    padding : int
        Pixels of zero padding the offsets refer to.
    cutout : int
        Side of the hole; 0 for none.
    moves : bool
        Whether any offset or mirroring was asked for.
    """

    table: Tensor
    padding: int
    cutout: int
    moves: bool

    def __getitem__(self, part: slice) -> Draws:
        return replace(self, table=self.table[:, part])

    def to(self, device: torch.device | str) -> Draws:
        """Copy the draws to a device.

        Parameters
        ----------
        device : torch.device or str

        Returns
        -------
        Draws
        """
        return replace(self, table=self.table.to(device))


def check_augmentation(names: Sequence[str], cutout: int, padding: int) -> None:
    """Check the names and sizes of an augmentation.

    Parameters
    ----------
    names : sequence of {"crop", "flip"}
    cutout : int
        Side of the square hole, pixels.
    padding : int
        Zero pixels added on each side before the crop.

    Raises
    ------
    NQMError
        If a name is unknown or a size is negative.
    """
    if isinstance(names, str):
        raise NQMError(f"augment must be a sequence of names, e.g. ['crop', 'flip']; got {names!r}")
    for name in names:
        if name == "cutout":
            raise NQMError("cutout is asked for by its size: cutout=16, not a name in augment")
        if name not in AUGMENTATIONS:
            raise NQMError(f"unknown augmentation {name!r}{suggest(name, AUGMENTATIONS)}")
    check_integer("cutout", cutout, 0)
    check_integer("padding", padding, 0)


def draw(
    generator: torch.Generator,
    count: int,
    size: tuple[int, int],
    names: Sequence[str] = (),
    *,
    cutout: int = 0,
    padding: int = 4,
) -> Draws:
    """Draw the augmentation of `count` images.

    Parameters
    ----------
    generator : torch.Generator
        On the CPU.
    count : int
        Images.
    size : (int, int)
        Their height and width, pixels.
    names : sequence of {"crop", "flip"}
        Without "crop" every offset is the centre's, without "flip" nothing is mirrored.
    cutout : int
        Side of the square hole, pixels; its centre is uniform over the image.
    padding : int
        Zero pixels added on each side before the crop; offsets are uniform on 0 ... 2 padding.

    Returns
    -------
    Draws
    """
    check_augmentation(names, cutout, padding)
    padding = padding if "crop" in names else 0
    table = torch.zeros((5, count), dtype=torch.int64)
    limits = (2 * padding + 1, 2 * padding + 1, 2 if "flip" in names else 1)
    holes = size if cutout else (1, 1)
    for row, limit in enumerate((*limits, *holes)):
        if limit > 1:
            torch.randint(limit, (count,), generator=generator, out=table[row])
    return Draws(table, padding, cutout, moves=bool(names))


def crop_and_flip(pixels: Tensor, draws: Draws) -> Tensor:
    """Crop each padded image at its offset and mirror it where drawn.

    Padding is with pixel 0 and comes before normalisation, as in the usual CIFAR recipe.

    Parameters
    ----------
    pixels : Tensor
        (N, C, H, W), any dtype.
    draws : Draws
        For N images, on the same device.

    Returns
    -------
    Tensor
        (N, C, H, W), a new tensor.
    """
    count, channels, height, width = pixels.shape
    pad = draws.padding
    padded = functional.pad(pixels, (pad, pad, pad, pad)) if pad else pixels
    top, left, mirrored = draws.table[:3]
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device)
    columns = left[:, None] + torch.where(mirrored[:, None] > 0, width - 1 - columns, columns)
    # One gather over flat positions: on a CPU 4 to 6 times faster than indexing by broadcast.
    flat = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    flat = flat.reshape(count, 1, height * width).expand(count, channels, height * width)
    return padded.reshape(count, channels, -1).gather(2, flat).view(pixels.shape)


def cut_out(inputs: Tensor, draws: Draws) -> Tensor:
    """Fill a square of each image with 0, in place (DeVries & Taylor 2017).

    The square spans rows c - s//2 ... c - s//2 + s - 1 around its centre c and is clipped at the
    border. After normalisation 0 is the mean colour.

    Parameters
    ----------
    inputs : Tensor
        (N, C, H, W) float, normalised.
    draws : Draws
        For N images.

    Returns
    -------
    Tensor
        `inputs`, changed in place.
    """
    inside = []
    for centre, length in zip(draws.table[3:], inputs.shape[2:], strict=True):
        first = (centre - draws.cutout // 2)[:, None]
        positions = torch.arange(length, device=inputs.device)
        inside.append(((positions >= first) & (positions < first + draws.cutout)).to(inputs.dtype))
    hole = inside[0][:, :, None] * inside[1][:, None, :]
    # A product, since on a CPU masked_fill_ takes ten times as long.
    return inputs.mul_((1 - hole)[:, None])


def normalise(pixels: Tensor, mean: Constants, std: Constants) -> Tensor:
    """``(pixels / 255 - mean) / std`` per channel, in float32.

    Parameters
    ----------
    pixels : Tensor
        (N, C, H, W) uint8.
    mean, std : sequence of float or Tensor
        One for each channel, in units of full brightness.

    Returns
    -------
    Tensor
        float32, shape of `pixels`.

    Raises
    ------
    NQMError
        If there is not one number for each channel.
    """
    if not len(mean) == len(std) == pixels.shape[1]:
        raise NQMError(
            f"mean and std must have one number for each of {pixels.shape[1]} channels; "
            f"got {len(mean)} and {len(std)}"
        )
    # A tensor already on the device is used as it is; a stream passes those.
    centre, scale = (
        torch.as_tensor(c, dtype=torch.float32, device=pixels.device)[:, None, None]
        for c in (mean, std)
    )
    return pixels.float().mul_(1 / (255 * scale)).sub_(centre / scale)


def augment_batch(
    pixels: Tensor,
    generator: torch.Generator,
    names: Sequence[str] = (),
    *,
    mean: Constants,
    std: Constants,
    cutout: int = 0,
    padding: int = 4,
) -> Tensor:
    """Augment and normalise one batch: crop, flip, normalise, cutout, in this order.

    Parameters
    ----------
    pixels : Tensor
        (N, C, H, W) uint8, left as it is.
    generator : torch.Generator
        On the CPU; the result depends on nothing else that is random.
    names : sequence of str
        As for `draw`.
    mean, std : sequence of float or Tensor
        One for each channel.
    cutout, padding : int
        As for `draw`.

    Returns
    -------
    Tensor
        (N, C, H, W) float32.

    Raises
    ------
    NQMError
        For an unknown name, a negative size or a wrong number of channels.
    """
    height, width = pixels.shape[2:]
    draws = draw(generator, len(pixels), (height, width), names, cutout=cutout, padding=padding)
    return apply(pixels, draws.to(pixels.device), mean, std)


def apply(pixels: Tensor, draws: Draws, mean: Constants, std: Constants) -> Tensor:
    """Apply N draws to N images, one each (see `augment_batch`).

    Parameters
    ----------
    pixels : Tensor, shape (N, C, H, W)
        uint8.
    draws : Draws
    mean, std : sequence of float or Tensor
        One number per channel, in units of full brightness.

    Returns
    -------
    Tensor, shape (N, C, H, W)
        float32, normalised.
    """
    inputs = normalise(crop_and_flip(pixels, draws) if draws.moves else pixels, mean, std)
    return cut_out(inputs, draws) if draws.cutout else inputs

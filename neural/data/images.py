"""Labelled images in memory, and the streams of batches over them.

A set is held as bytes on the device that trains, and a batch is augmented there in one vectorised
call. Every random number of an epoch depends only on (seed, epoch) and a position in it, so a
stream continued at any batch yields what the uninterrupted one would have, on any device and for
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neural.data.augment import apply, check_augmentation, draw, normalise
from neural.data.sampling import EpochPlan, check_sampling, epoch_order, keyed_generator
from nqm.errors import NQMError, check_integer


@dataclass(frozen=True)
class Images:
    """Images and their labels.

    Attributes
    ----------
    pixels : Tensor
        (N, C, H, W) uint8.
    labels : Tensor
        (N,) int64; -1 where an image has none.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != torch.uint8:
            raise NQMError(
                f"Images.pixels must be (N, C, H, W) uint8; "
                f"got {tuple(self.pixels.shape)} {self.pixels.dtype}"
            )
        if self.labels.shape != self.pixels.shape[:1] or self.labels.dtype != torch.int64:
            raise NQMError(
                f"Images.labels must be ({len(self.pixels)},) int64, one for each image; "
                f"got {tuple(self.labels.shape)} {self.labels.dtype}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> Images:
        """Copy the images to a device.

        Parameters
        ----------
        device : torch.device or str

        Returns
        -------
        Images
        """
        return Images(self.pixels.to(device), self.labels.to(device))

    def subset(self, n: int, seed: int = 0) -> Images:
        """Draw `n` random images, as evenly over the classes as their sizes allow.

        Parameters
        ----------
        n : int
            Images wanted, at most all.
        seed : int
            Which ones; they stay in the order of the set.

        Returns
        -------
        Images

        Raises
        ------
        NQMError
            If there are not that many.
        """
        return self._at(self._dealt(n, seed))

    def split(self, n: int, seed: int = 0) -> tuple[Images, Images]:
        """Split the images in two: those of `subset`, and all others.

        Parameters
        ----------
        n, seed : int
            See `subset`.

        Returns
        -------
        subset, rest : Images

        Raises
        ------
        NQMError
            If there are not more than `n`.
        """
        if n >= len(self):
            raise NQMError(f"n must be below the {len(self)} images there are; got {n}")
        chosen = self._dealt(n, seed)
        others = torch.ones(len(self), dtype=torch.bool)
        others[chosen] = False
        return self._at(chosen), self._at(others.nonzero()[:, 0])

    def _at(self, index: Tensor) -> Images:
        index = index.to(self.pixels.device)
        return Images(self.pixels[index], self.labels[index])

    def _dealt(self, n: int, seed: int) -> Tensor:
        """Indices of n random images, increasing, as evenly over the classes as can be."""
        check_integer("n", n, 1)
        if n > len(self):
            raise NQMError(f"n must be at most the {len(self)} images there are; got {n}")
        order = torch.randperm(len(self), generator=keyed_generator(seed))
        labels = self.labels.cpu()[order]
        # Deal round by round: first one of every class, then a second one, and so on.
        by_class = torch.argsort(labels, stable=True)
        _, sizes = torch.unique_consecutive(labels[by_class], return_counts=True)
        first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        rounds = torch.empty_like(labels)
        rounds[by_class] = torch.arange(len(self)) - first
        return order[torch.argsort(rounds, stable=True)[:n]].sort().values


@dataclass(frozen=True)
class ImageData:
    """A set of images by the name it is loaded under.

    Attributes
    ----------
    name, label : str
        For the command line, and for tables and figures.
    train : Images or None
        None for a set that only serves as out-of-distribution data.
    test : Images
    classes : int
        0 if the images have no labels.
    mean, std : tuple of float
        The normalisation training uses, per channel, in units of full brightness. Data of another
        distribution are shown to a network under the constants it was trained with.
    """

    name: str
    label: str
    train: Images | None
    test: Images
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.test.pixels.shape[1:]
        return channels, height, width


class ImageBatches:
    """The training stream: augmented, normalised batches, epoch by epoch.

    Parameters
    ----------
    images : Images
        Moved to `device` once, as bytes.
    batch_size : int
        Examples of a global batch, over all ranks.
    mean, std : sequence of float
        Normalisation per channel.
    augment : sequence of {"crop", "flip"}
        In the usual CIFAR recipe both.
    cutout : int
        Side of a square hole, pixels; 0 for none.
    padding : int
        Zero pixels on each side of which a crop may take some.
    sampling : {"shuffle", "replacement"}
        A permutation each epoch, or independent draws (as many).
    drop_last : bool
        Leave out an incomplete last batch.
    seed : int
        Of order and augmentation.
    device : torch.device or str
    rank, world : int
        Rank r of w gets the r-th of w parts of every global batch.
    dtype : torch.dtype
        Of the images yielded; arithmetic is in float32.
    memory_format : torch.memory_format, optional
        E.g. `torch.channels_last`.

    Raises
    ------
    NQMError
        For an unknown name or a number out of range.
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        images: Images,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[str] = (),
        cutout: int = 0,
        padding: int = 4,
        sampling: str = "shuffle",
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        check_augmentation(augment, cutout, padding)
        check_sampling(sampling)
        check_integer("seed", seed, 0)
        self.plan = EpochPlan(len(images), batch_size, drop_last=drop_last, rank=rank, world=world)
        self.images = images.to(device)
        self.mean, self.std = (torch.tensor(list(c), device=device) for c in (mean, std))
        normalise(self.images.pixels[:1], self.mean, self.std)  # speaks up before training does
        self.augment, self.cutout, self.padding = tuple(augment), cutout, padding
        self.sampling, self.seed = sampling, seed
        self.dtype, self.memory_format = dtype, memory_format

    def __len__(self) -> int:
        """Batches of one epoch."""
        return self.plan.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch, from batch `start` on.

        A run that resumes at batch `start` gets the same batches, bit for bit, as one without a
        break.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        start : int
            Number of batches already done.

        Returns
        -------
        iterator of (Tensor, Tensor)
            (B, C, H, W) images and (B,) int64 labels, on the device.

        Raises
        ------
        NQMError
            If `epoch` is not a whole number from 0 on.
        """
        check_integer("epoch", epoch, 0)
        return self._batches(epoch, self.plan.slices(start))

    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels = self.images.pixels, self.images.labels
        count, _, height, width = pixels.shape
        # Order and augmentation are drawn for the whole epoch: they belong to positions in it,
        # so neither the first batch asked for nor the rank matters, and they are copied once.
        order = epoch_order(count, self.sampling, keyed_generator(self.seed, epoch, 0))
        draws = draw(
            keyed_generator(self.seed, epoch, 1), count, (height, width), self.augment,
            cutout=self.cutout, padding=self.padding,
        ).to(pixels.device)  # fmt: skip
        order = order.to(pixels.device)
        for part in parts:
            chosen = order[part]
            # index_select: on a CPU many times faster than indexing with a tensor.
            inputs = apply(pixels.index_select(0, chosen), draws[part], self.mean, self.std)
            yield self._laid_out(inputs), labels.index_select(0, chosen)

    def _laid_out(self, inputs: Tensor) -> Tensor:
        if self.memory_format is None:
            return inputs.to(self.dtype)
        return inputs.to(self.dtype, memory_format=self.memory_format)


def evaluation_batches(
    images: Images,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, normalised and otherwise as it is.

    Parameters
    ----------
    images : Images
        May stay elsewhere; one batch at a time is moved.
    batch_size : int
        The last batch holds what is left.
    mean, std : sequence of float
        Normalisation per channel.
    device : torch.device or str

    Yields
    ------
    (Tensor, Tensor)
        (B, C, H, W) float32 images and (B,) int64 labels, on the device.
    """
    check_integer("batch_size", batch_size, 1)
    for low in range(0, len(images), batch_size):
        pixels = images.pixels[low : low + batch_size].to(device)
        yield normalise(pixels, mean, std), images.labels[low : low + batch_size].to(device)

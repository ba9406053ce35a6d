"""Images too many for memory: read, decoded and cropped by worker processes as they are needed."""

from __future__ import annotations

import io
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from neural.data.augment import normalise
from neural.data.formats import Bytes, damaged, is_image, read_npz
from neural.data.sampling import EpochPlan, epoch_order, keyed_generator
from nqm.errors import NQMError, check_integer

try:
    import simplejpeg as _simplejpeg
except ImportError:  # it belongs to the extra `vision`
    _simplejpeg = None

if TYPE_CHECKING:
    from PIL.Image import Image

#: Share of the image's area, and width over height, of a training crop (Szegedy et al. 2015).
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


class EncodedImages(Protocol):
    """Encoded images with labels; what a stream reads from."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Parameters
        ----------
        index : int
            Number of the image.

        Returns
        -------
        bytes
        """

    def where(self, index: int) -> str:
        """Name of an image in error messages.

        Parameters
        ----------
        index : int
            Number of the image.

        Returns
        -------
        str
        """


@dataclass(frozen=True)
class ImageFolder:
    """Images in one folder for each class; the rank of the sorted folder names is the label.

    Attributes
    ----------
    paths : tuple of Path
    labels : Tensor
        (N,) int64.
    names : tuple of str
        Class folders.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    names: tuple[str, ...]

    @classmethod
    def scan(cls, folder: Path) -> ImageFolder:
        """List the images below the class folders of `folder`.

        Parameters
        ----------
        folder : Path
            Holds one folder of images per class.

        Returns
        -------
        ImageFolder

        Raises
        ------
        NQMError
            If there is no such folder, or no image in a class folder.
        """
        if not folder.is_dir():
            raise NQMError(f"no folder {folder}; it must hold one folder of images for each class")
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        paths: list[Path] = []
        labels: list[int] = []
        for label, entry in enumerate(classes):
            found = sorted(path for path in entry.rglob("*") if is_image(path.name))
            if not found:
                raise NQMError(f"class folder {entry} holds no image; remove it or fill it")
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise NQMError(f"{folder} must hold one folder of images for each class; got none")
        return cls(tuple(paths), torch.tensor(labels), tuple(entry.name for entry in classes))

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Parameters
        ----------
        index : int
            Number of the image.

        Returns
        -------
        bytes
        """
        return self.paths[index].read_bytes()

    def where(self, index: int) -> str:
        """Path of an image.

        Parameters
        ----------
        index : int
            Number of the image.

        Returns
        -------
        str
        """
        return str(self.paths[index])


@dataclass(frozen=True)
class ImagePack:
    """JPEG images joined end to end in an .npz: `jpeg`, `lengths`, `y`, and `name` by class.

    Attributes
    ----------
    path : Path
    joined : ndarray
        uint8.
    ends : ndarray
        (N + 1,) int64: image i is ``joined[ends[i]:ends[i + 1]]``.
    labels : Tensor
        (N,) int64.
    names : tuple of str
        Class names.
    """

    path: Path
    joined: Bytes
    ends: np.ndarray[tuple[int], np.dtype[np.int64]]
    labels: Tensor
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> ImagePack:
        """Read a pack of images.

        Parameters
        ----------
        path : Path
            An .npz file with the arrays jpeg, lengths, y and name.

        Returns
        -------
        ImagePack

        Raises
        ------
        NQMError
            If an array is missing or the lengths do not fit.
        """
        joined, lengths, labels, names = read_npz(path, ("jpeg", "lengths", "y", "name"))
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if ends[-1] != len(joined) or len(labels) != len(lengths):
            raise damaged(path, f"{len(joined)} bytes where the lengths add up to {ends[-1]}")
        return cls(path, joined, ends, torch.from_numpy(labels.astype(np.int64)),
                   tuple(str(name) for name in names))  # fmt: skip

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Parameters
        ----------
        index : int
            Number of the image.

        Returns
        -------
        bytes
        """
        return self.joined[self.ends[index] : self.ends[index + 1]].tobytes()

    def where(self, index: int) -> str:
        """File of the pack and number of the image.

        Parameters
        ----------
        index : int
            Number of the image.

        Returns
        -------
        str
        """
        return f"{self.path}: image {index}"


@dataclass(frozen=True)
class StreamData:
    """A set of encoded images by the name it is loaded under.

    Attributes
    ----------
    name, label : str
        For the command line, and for tables and figures.
    train, test : EncodedImages
    classes : int
    mean, std : tuple of float
        Normalisation per channel.
    resize : int
        Shorter side, pixels, to which a test image is brought before its centre is cropped.
    size : int
        Side of the square that a network sees, pixels.
    """

    name: str
    label: str
    train: EncodedImages
    test: EncodedImages
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int = 256
    size: int = 224


def random_crop_box(
    width: int, height: int, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Box of a random-resized crop (Szegedy et al. 2015), as torchvision draws it.

    The area is a uniform share of the image's in `SCALE`, the aspect ratio log-uniform in
    `RATIO`, the position uniform; after ten misfits the largest centred box of a permitted ratio.

    Parameters
    ----------
    width, height : int
        Size of the image, pixels.
    generator : Generator

    Returns
    -------
    (int, int, int, int)
        Left, top, right and bottom, pixels.
    """
    for _ in range(10):
        u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (SCALE[0] + (SCALE[1] - SCALE[0]) * u)
        ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * v)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=generator))
            top = int(torch.randint(height - h + 1, (), generator=generator))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def training_view(image: Image, size: int, generator: torch.Generator) -> Image:
    """Random-resized crop to `size` pixels (bilinear), mirrored with probability 1/2.

    Parameters
    ----------
    image : Image
    size : int
        Side of the square view, pixels.
    generator : Generator
        Draws the box and the mirroring.

    Returns
    -------
    Image
    """
    from PIL.Image import Resampling, Transpose

    box = random_crop_box(*image.size, generator)
    view = image.crop(box).resize((size, size), Resampling.BILINEAR)
    if torch.rand((), generator=generator) < 0.5:
        view = view.transpose(Transpose.FLIP_LEFT_RIGHT)
    return view


def evaluation_view(image: Image, size: int, resize: int) -> Image:
    """Scale the shorter side to `resize` pixels (bilinear), then cut the central square.

    Parameters
    ----------
    image : Image
    size : int
        Side of the square view, pixels.
    resize : int
        Length of the shorter side, pixels.

    Returns
    -------
    Image
    """
    from PIL.Image import Resampling

    width, height = image.size
    short = min(width, height)
    scaled = (resize * width // short, resize * height // short)
    if scaled != image.size:
        image = image.resize(scaled, Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


#: Batches that each worker process decodes ahead.
PREFETCHED = 4
#: Number of an epoch, and of an image.
_Index = tuple[int, int]


def decoded(content: bytes) -> Image:
    """Decode an image, by simplejpeg if it is installed: the same pixels in less time.

    Parameters
    ----------
    content : bytes
        Of a file of any format that Pillow reads.

    Returns
    -------
    Image
        In RGB.

    Raises
    ------
    OSError, ValueError, SyntaxError, DecompressionBombError
        If it is damaged or too large.
    """
    from PIL import Image

    if _simplejpeg is not None:
        # What it refuses, e.g. another format, is Pillow's.
        with suppress(ValueError):
            height, width, colours, _ = _simplejpeg.decode_jpeg_header(content)
            if colours == "YCbCr" and height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                return Image.fromarray(_simplejpeg.decode_jpeg(content))
    with Image.open(io.BytesIO(content)) as opened:
        return opened.convert("RGB")


class _Views(torch.utils.data.Dataset[tuple[Tensor, int] | str]):
    """Decoded views of the images; a failure is returned as its message, see `FolderBatches`."""

    def __init__(
        self, images: EncodedImages, *, train: bool, size: int, resize: int, seed: int
    ) -> None:
        self.images, self.train, self.size, self.resize = images, train, size, resize
        self.seed = seed

    def __getitem__(self, index: _Index) -> tuple[Tensor, int] | str:
        from PIL import Image

        epoch, number = index
        try:
            image = decoded(self.images.read(number))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return str(damaged(self.images.where(number), str(error).partition("\n")[0]))
        if self.train:
            generator = keyed_generator(self.seed, epoch, 1, number)
            view = training_view(image, self.size, generator)
        else:
            view = evaluation_view(image, self.size, self.resize)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1)
        return pixels, int(self.images.labels[number])


@dataclass
class _Asked(torch.utils.data.Sampler[list[_Index]]):
    """The batches that were asked for last; worker processes go on from one epoch to the next."""

    epoch: int = 0
    batches: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[_Index]]:
        for batch in self.batches:
            yield [(self.epoch, number) for number in batch.tolist()]

    def __len__(self) -> int:
        return len(self.batches)


def _ignore_stops(worker: int) -> None:
    """A batch system signals every process; the one that trains still needs images to stop.

    SIGTERM of the process that trains ends a worker: at its exit Python sends it and waits.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows, which have no batch systems
        return
    stops = (signal.SIGTERM, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)

    def listen() -> None:
        while True:
            told = signal.sigwaitinfo(stops)
            if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _collate(examples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    pixels, labels = [], []
    for example in examples:
        if isinstance(example, str):
            return example
        pixels.append(example[0])
        labels.append(example[1])
    return torch.stack(pixels), torch.tensor(labels)


class FolderBatches:
    """Batches of encoded images, decoded in worker processes.

    The same interface and the same exact resume as `ImageBatches`: the view of an image depends
    only on (seed, epoch, its index), whatever the number of workers.

    Parameters
    ----------
    images : EncodedImages
        An `ImageFolder` or an `ImagePack`.
    batch_size : int
        Examples of a global batch, over all ranks.
    mean, std : sequence of float
        Normalisation per channel.
    train : bool
        Shuffled, random-resized crops and mirroring; else in order, centre crops.
    size : int
        Side of the square that a network sees, pixels.
    resize : int
        Shorter side of a test image before its centre crop, pixels; at least `size`.
    drop_last : bool
        Leave out an incomplete last batch.
    seed : int
    device : torch.device or str
    rank, world : int
        Rank r of w gets the r-th of w parts of every global batch.
    workers : int
        Processes, which stay from the first epoch on; 0 decodes in this one.
    dtype : torch.dtype
        Of the images yielded; arithmetic is in float32.
    memory_format : torch.memory_format, optional
        E.g. `torch.channels_last`.

    Raises
    ------
    NQMError
        For a number out of range; while iterating, for an image that cannot be read.
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        images: EncodedImages,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        train: bool = True,
        size: int = 224,
        resize: int = 256,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        check_integer("size", size, 1)
        check_integer("resize", resize, size)
        check_integer("seed", seed, 0)
        check_integer("workers", workers, 0)
        self.plan = EpochPlan(
            len(images.labels), batch_size, drop_last=drop_last, rank=rank, world=world
        )
        self.images, self.train, self.size, self.resize = images, train, size, resize
        self.mean, self.std = (torch.tensor(list(c), device=device) for c in (mean, std))
        self.seed, self.device, self.workers = seed, torch.device(device), workers
        normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), mean, std)  # reports a mistake now
        self.dtype, self.memory_format = dtype, memory_format or torch.contiguous_format
        self._asked = _Asked()
        self._kept: torch.utils.data.DataLoader[Any] | None = None
        self._busy = False

    def __len__(self) -> int:
        """Batches of one epoch."""
        return self.plan.batches

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch, from batch `start` on.

        A run that resumes at batch `start` gets the same batches, bit for bit, as one without a
        break.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        start : int
            Number of batches already done; they are not decoded.

        Returns
        -------
        iterator of (Tensor, Tensor)
            (B, 3, size, size) images and (B,) int64 labels, on the device.

        Raises
        ------
        NQMError
            If `epoch` is not a whole number from 0 on.
        """
        check_integer("epoch", epoch, 0)
        return self._batches(epoch, self.plan.slices(start))

    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        count = self.plan.count
        order = torch.arange(count)
        if self.train:
            order = epoch_order(count, "shuffle", keyed_generator(self.seed, epoch, 0))
        for batch in self._decoded(_Asked(epoch, [order[part] for part in parts])):
            if isinstance(batch, str):  # raised in a worker, it would be a page of traceback
                raise NQMError(batch)
            pixels, labels = (part.to(self.device, non_blocking=True) for part in batch)
            inputs = normalise(pixels, self.mean, self.std)
            yield inputs.to(self.dtype, memory_format=self.memory_format), labels

    def _decoded(self, asked: _Asked) -> Iterator[tuple[Tensor, Tensor] | str]:
        """Decode batches; a second iteration at the same time has worker processes of its own."""
        if self._busy:
            yield from self._loader(asked)
            return
        self._busy = True
        try:
            if self._kept is None:
                self._kept = self._loader(self._asked)
            self._asked.epoch, self._asked.batches = asked.epoch, asked.batches
            yield from self._kept
        finally:
            self._busy = False

    def _loader(self, asked: _Asked) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(
            _Views(self.images, train=self.train, size=self.size, resize=self.resize,
                   seed=self.seed),
            batch_sampler=asked,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.workers > 0,
            prefetch_factor=PREFETCHED if self.workers else None,
            worker_init_fn=_ignore_stops,
            # Seeds of processes are not drawn from torch's own generator: dropout uses that one,
            # and a resumed run begins another iteration.
            generator=torch.Generator(),
        )  # fmt: skip

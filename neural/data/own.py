"""The user's own data: images of a folder, an .npz file or a Hugging Face data set, and text files.

Images up to `LARGEST` pixels a side are held in memory as bytes, and all that is known of the
sets of the catalogue applies to them. Larger ones are read as they are needed, as ImageNet is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.data import formats
from neural.data.folder import EncodedImages, ImageFolder, StreamData
from neural.data.image_sets import IMAGENET_STATS, images_of
from neural.data.images import ImageData, Images
from neural.data.text import TextData
from nqm.errors import NQMError
from nqm.limits import memory_limit

#: Largest side, in pixels, of images that are held in memory.
LARGEST = 64
#: Names of the part that tests, in the order of search.
TESTS = ("test", "val", "validation", "valid")
#: A test image's shorter side over its central square, as for ImageNet: 256 to 224.
MARGIN = 8 / 7


def folder(path: Path, size: int) -> ImageData | StreamData:
    """Open a folder with ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE`` (or ``test``).

    Parameters
    ----------
    path : Path
        The folder.
    size : int
        Side of the images that the network sees, in pixels.

    Returns
    -------
    ImageData or StreamData
        In memory up to `LARGEST` pixels.

    Raises
    ------
    NQMError
        If a part is missing, the parts have different classes, or an image is damaged.
    """
    test = next((path / name for name in TESTS if (path / name).is_dir()), path / TESTS[1])
    parts = ImageFolder.scan(path / "train"), ImageFolder.scan(test)
    if parts[0].names != parts[1].names:
        odd = sorted(set(parts[0].names) ^ set(parts[1].names))
        raise NQMError(f"{path}: train and {test.name} must have the same class folders; got {odd}")
    return _opened(path, parts[0], parts[1], len(parts[0].names), size)


@dataclass(frozen=True)
class _Rows:
    """Encoded images in a column of a Hugging Face data set."""

    rows: Any
    column: str
    labels: Tensor
    path: Path

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Parameters
        ----------
        index : int

        Returns
        -------
        bytes
        """
        cell = self.rows[index][self.column]
        if cell.get("bytes") is None:
            return Path(cell["path"]).read_bytes()
        return bytes(cell["bytes"])

    def where(self, index: int) -> str:
        """Name of an image in error messages.

        Parameters
        ----------
        index : int

        Returns
        -------
        str
        """
        return f"{self.path}: image {index}"


def huggingface(path: Path, size: int) -> ImageData | StreamData:
    """Open a data set that ``datasets`` has saved by ``save_to_disk``, with train and test parts.

    Parameters
    ----------
    path : Path
        Folder of the saved `DatasetDict`; each part has one column of images and one of class
        labels.
    size : int
        Side of the images that the network sees, in pixels.

    Returns
    -------
    ImageData or StreamData
        In memory up to `LARGEST` pixels.

    Raises
    ------
    NQMError
        If `datasets` is not installed, a part or column is missing, or an image is damaged.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise NQMError(
            "data.name = 'huggingface' needs the package datasets; run: pip install datasets"
        ) from error
    try:
        parts = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises what it likes
        reason = " ".join(str(error).split())
        raise NQMError(f"data.path {path} is no saved data set: {reason:.150}") from error
    names = list(parts) if isinstance(parts, dict) else []
    test = next((name for name in TESTS if name in names), None)
    if "train" not in names or test is None:
        raise NQMError(f"{path} must have the parts train and test; it has {names or 'no parts'}")
    features = parts["train"].features
    chosen = []
    for kind in ("Image", "ClassLabel"):
        found = [name for name, value in features.items() if type(value).__name__ == kind]
        if len(found) != 1:
            raise NQMError(f"{path} must have one column of kind {kind}; it has {found}")
        chosen += found
    image, label = chosen
    opened = []
    for name in ("train", test):
        rows = parts[name].cast_column(image, datasets.Image(decode=False))
        labels = torch.tensor(list(rows[label]), dtype=torch.int64)
        opened.append(_Rows(rows, image, labels, path / name))
    return _opened(path, opened[0], opened[1], int(features[label].num_classes), size)


def npz(path: Path, size: int | None) -> ImageData:
    """Read arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of an .npz file.

    Parameters
    ----------
    path : Path
        The file. Images are uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3
        channels; labels are whole numbers from 0.
    size : int, optional
        Not used: the arrays have a size.

    Returns
    -------
    ImageData

    Raises
    ------
    NQMError
        If an array is missing, or has another shape or type.
    """
    if size is not None:
        raise NQMError(
            f"data.size would be ignored (the arrays have one); leave it out; got {size}"
        )
    arrays = formats.read_npz(path, ("x_train", "y_train", "x_test", "y_test"))
    parts = []
    for name, pixels, labels in zip(("train", "test"), arrays[::2], arrays[1::2], strict=True):
        if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise NQMError(
                f"{path}: y_{name} must hold one whole number for each image; got {labels.dtype} "
                f"of shape {labels.shape} for x_{name} of shape {pixels.shape}"
            )
        if labels.min() < 0:
            raise NQMError(f"{path}: y_{name} must count classes from 0; got {labels.min()}")
        parts.append(images_of(_channels_first(f"{path}: x_{name}", pixels), labels))
    shapes = [part.pixels.shape[1:] for part in parts]
    if shapes[0] != shapes[1]:
        raise NQMError(f"{path}: x_train and x_test must hold images of one shape; got {shapes}")
    return _in_memory(path, parts[0], parts[1], 1 + int(parts[0].labels.max()))


def text(path: Path, size: int | None) -> TextData:
    """Open a text: one file, or all files of a folder and of the folders in it.

    Parameters
    ----------
    path : Path
        A file, or a folder, whose files are joined in the order of their paths; hidden ones are
        left out. A folder with ``train`` and ``test``, each a folder or a file with any ending, has
        its parts (and ``valid``) from there.
    size : None
        Of images; must not be given.

    Returns
    -------
    TextData
        Bytes as they are. Without parts the text is split 90/5/5 per cent in order.

    Raises
    ------
    NQMError
        If there is no text, only one of the parts train and test, or more than the memory holds.
    """
    if size is not None:
        raise NQMError(f"data.size must be left out: a text has none; got {size}")
    label = path.resolve().name
    places = {name: _place(path, name) for name in _PARTS}
    if places["train"] is None and places["test"] is None:
        raw = _bytes_of(path)
        train, valid, test = raw.tensor_split((len(raw) * 90 // 100, len(raw) * 95 // 100))
        return TextData("own", label, train, valid, test)
    for name in ("train", "test"):
        if places[name] is None:
            raise NQMError(
                f"{path} must hold both parts of the text, train and test, or neither; {name} is "
                "missing"
            )
    empty = torch.empty(0, dtype=torch.uint8)
    train, valid, test = (empty if place is None else _bytes_of(place) for place in places.values())
    return TextData("own", label, train, valid, test)


#: Parts of a text, each a folder or a file of that name.
_PARTS = ("train", "valid", "test")


def _place(path: Path, part: str) -> Path | None:
    """The folder or file of one part of a text in a folder; None if there is none."""
    if not path.is_dir():
        return None
    found = [one for one in sorted(path.iterdir()) if one.name == part or one.stem == part]
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise NQMError(f"{path}: only one place may hold the part {part}; got {names}")
    return found[0] if found else None


def _bytes_of(path: Path) -> Tensor:
    """The bytes of a file, or of all files of a folder one after another."""
    files = [path]
    if path.is_dir():
        below = ((file, file.relative_to(path).parts) for file in sorted(path.rglob("*")))
        files = [f for f, parts in below if f.is_file() and not any(p[0] == "." for p in parts)]
    try:
        count = sum(file.stat().st_size for file in files)
        if count > memory_limit():
            raise NQMError(f"{path}: its text takes {count / 2**30:,.1f} GiB; choose fewer files")
        raw = bytearray().join(file.read_bytes() for file in files)
    except OSError as error:
        raise NQMError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not raw:
        raise NQMError(f"{path} holds no text")
    return torch.frombuffer(raw, dtype=torch.uint8)


def _channels_first(where: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8:
        raise NQMError(f"{where} must be uint8, 0 to 255; got {pixels.dtype}")
    if pixels.ndim == 3:
        return pixels[:, None]
    last = pixels.ndim == 4 and pixels.shape[3] in (1, 3)
    first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    if first == last:
        raise NQMError(
            f"{where} must be (N, H, W), or have 1 or 3 channels as its last or second axis; "
            f"got {pixels.shape}"
        )
    return pixels.transpose(0, 3, 1, 2) if last else pixels


def _opened(
    path: Path, train: EncodedImages, test: EncodedImages, classes: int, size: int
) -> ImageData | StreamData:
    if size > LARGEST:
        resize = round(size * MARGIN)
        label = path.resolve().name
        return StreamData("own", label, train, test, classes, *IMAGENET_STATS, resize, size)
    count = (len(train.labels) + len(test.labels)) * 3 * size**2
    if count > memory_limit():
        raise NQMError(
            f"{path}: its images take {count / 2**30:,.1f} GiB at data.size = {size}; choose a "
            f"smaller size, or one above {LARGEST}, at which they are read as they are needed"
        )
    return _in_memory(path, _decoded(path, train, size), _decoded(path, test, size), classes)


def _decoded(path: Path, images: EncodedImages, size: int) -> Images:
    numbers = range(len(images.labels))
    encoded, names = (images.read(i) for i in numbers), (images.where(i) for i in numbers)
    pixels = formats.decode_all(encoded, names, len(numbers), path, size)
    return images_of(pixels, images.labels.numpy())


def _in_memory(path: Path, train: Images, test: Images, classes: int) -> ImageData:
    """Images with the mean and standard deviation of each channel of the training part."""
    for name, part in (("train", train), ("test", test)):
        if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < classes:
            raise NQMError(
                f"{path}: labels of {name} must lie in 0 to {classes - 1}, the classes of train; "
                f"got {int(part.labels.min())} to {int(part.labels.max())}"
            )
    # By counts of the 256 levels: exact, and without a copy as floating-point numbers.
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in train.pixels.unbind(1):
        counts = torch.bincount(channel.reshape(-1).int(), minlength=256).double()
        share = counts / counts.sum()
        mean = float(share @ levels)
        means.append(mean)
        stds.append(float((share @ (levels - mean) ** 2).sqrt()) or 1.0)
    label = path.resolve().name
    return ImageData("own", label, train, test, classes, tuple(means), tuple(stds))


def sized(build: Callable[[Path, int], ImageData | StreamData]) -> Callable[..., Any]:
    """Make a function that refuses a missing size.

    Parameters
    ----------
    build : callable
        Takes a path and a size.

    Returns
    -------
    callable
    """

    def made(path: Path, size: int | None) -> ImageData | StreamData:
        if size is None:
            raise NQMError("data.size is missing: the side of the images in pixels, e.g. 32")
        return build(path, size)

    return made


#: ``data.name`` -> one line, and the function that opens ``data.path`` at ``data.size``.
OWN: dict[str, tuple[str, Callable[..., ImageData | StreamData | TextData]]] = {
    "folder": ("own images in path/train/CLASS and path/val/CLASS, at size pixels", sized(folder)),
    "npz": ("own arrays x_train, y_train, x_test, y_test in the file path", npz),
    "huggingface": (
        "own data set saved by datasets' save_to_disk in path, at size pixels",
        sized(huggingface),
    ),
    "text": ("own text, as bytes: the file path, or all files below the folder path", text),
}

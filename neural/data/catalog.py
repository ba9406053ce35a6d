"""Every set of data by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neural.data import image_sets, text_sets
from neural.data.cache import cache_folder
from neural.data.fetch import Store
from neural.data.folder import StreamData
from neural.data.images import ImageData
from neural.data.text import TextData
from nqm.errors import NQMError, suggest

Data = ImageData | StreamData | TextData


@dataclass(frozen=True)
class Size:
    """Size of a set of data, as published.

    Attributes
    ----------
    train, test : int
        Numbers of images, or of symbols of a text.
    classes : int
        Number of classes; of a text, of different symbols.
    image : tuple of int
        Channels, height and width; empty for a text.
    streamed : bool
        Whether the images are read from disk as they are needed.
    """

    train: int
    test: int
    classes: int
    image: tuple[int, ...] = ()
    streamed: bool = False


@dataclass(frozen=True)
class Entry:
    """One set: what it is, who makes it, and where else its files may lie."""

    description: str
    build: Callable[[Store], Data]
    folders: tuple[str, ...] = ()


def data_root(root: Path | str | None = None) -> Path:
    """The folder of all data: `root`, else the variable NQM_DATA, else the user's cache.

    Parameters
    ----------
    root : Path or str, optional
        Folder given by the caller.

    Returns
    -------
    Path
    """
    return Path(root or os.environ.get("NQM_DATA") or cache_folder()).expanduser()


def load(name: str, root: Path | str | None = None, *, download: bool = True) -> Data:
    """Load a set of data by name.

    Parameters
    ----------
    name : str
        One of `DATASETS`.
    root : Path or str, optional
        Folder of all data; else the environment variable NQM_DATA, else
        ``~/.cache/late-phase-nqm``. Files are searched in ``root/name`` and in the root itself.
    download : bool
        Whether missing files may be fetched from where they are published, into ``root/name``.

    Returns
    -------
    ImageData, StreamData or TextData

    Raises
    ------
    NQMError
        For an unknown name, a file that is missing and cannot be fetched, or a damaged one.

    Notes
    -----
    Where several processes start together, let one of them load first: the others are refused while
    it downloads.
    """
    if name not in _ENTRIES:
        raise NQMError(f"unknown data set {name!r}{suggest(name, _ENTRIES)}")
    entry = _ENTRIES[name]
    return entry.build(Store(data_root(root), name, entry.folders, download))


def load_images(name: str, root: Path | str | None = None, *, download: bool = True) -> ImageData:
    """Load a data set of images in memory.

    Parameters
    ----------
    name : str
        Name of the set.
    root : path, optional
        Folder of data files, as for `load`.
    download : bool
        Whether missing public files are downloaded.

    Returns
    -------
    ImageData

    Raises
    ------
    NQMError
        If the set is a text or is streamed from disk, or as `load`.
    """
    data = load(name, root, download=download)
    if not isinstance(data, ImageData):
        kind = "a text" if isinstance(data, TextData) else "streamed from disk"
        raise NQMError(f"data set {name!r} is {kind}; images in memory are needed, e.g. 'cifar10'")
    return data


_ENTRIES: dict[str, Entry] = {
    "digits": Entry("1,797 digits of 8x8, embedded in scikit-learn", image_sets.digits),
    "fashion_mnist": Entry(
        "70,000 grey 28x28 images of clothes, 10 classes",
        image_sets.idx("Fashion-MNIST", 0.2860, 0.3530),
        # The last is where Debian's package dataset-fashion-mnist puts it.
        ("FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    ),
    "mnist": Entry(
        "70,000 grey 28x28 digits", image_sets.idx("MNIST", 0.1307, 0.3081), ("MNIST/raw",)
    ),
    "cifar10": Entry("60,000 colour 32x32 images, 10 classes", image_sets.cifar10),
    "cifar100": Entry("60,000 colour 32x32 images, 100 classes", image_sets.cifar100),
    "cifar10_q75": Entry(
        "CIFAR-10 after JPEG at quality 75, not the original", image_sets.cifar10_q75
    ),
    "cifar10_lossless_part": Entry("9,057 original images of CIFAR-10", image_sets.cifar10_part),
    "svhn": Entry("99,289 colour 32x32 house-number digits", image_sets.svhn),
    "lsun_resized": Entry(
        "LSUN at 32x32 (ODIN), out-of-distribution", image_sets.odin("LSUN (resized)")
    ),
    "tiny_imagenet_resized": Entry(
        "TinyImageNet at 32x32 (ODIN), out-of-distribution",
        image_sets.odin("TinyImageNet (resized)"),
    ),
    "emnist_letters": Entry(
        "grey 28x28 letters, 26 classes", image_sets.emnist_letters, ("EMNIST/raw",)
    ),
    "imagenet32": Entry("ImageNet images at 32x32, out-of-distribution", image_sets.imagenet32),
    "imagenet": Entry("ImageNet from folders train and val, streamed", image_sets.imagenet),
    "imagenet_sample": Entry(
        "one 224x224 image of each ImageNet class, streamed", image_sets.imagenet_sample
    ),
    "enwik8": Entry("10^8 bytes of Wikipedia, split 90/5/5", text_sets.enwik8),
    "wikitext2_bytes": Entry("2.4 MB of Wikipedia as bytes", text_sets.wikitext2),
    "python_docs": Entry("0.5 MB of English, embedded in Python", text_sets.python_docs),
}

#: name -> one line.
DATASETS: dict[str, str] = {name: entry.description for name, entry in _ENTRIES.items()}

_SMALL, _COLOUR, _LARGE = (1, 28, 28), (3, 32, 32), (3, 224, 224)
#: Sizes of sets that runs train on, so that a run's cost is known without its data.
SIZES: dict[str, Size] = {
    "digits": Size(1347, 450, 10, (1, 8, 8)),
    "fashion_mnist": Size(60_000, 10_000, 10, _SMALL),
    "mnist": Size(60_000, 10_000, 10, _SMALL),
    "cifar10": Size(50_000, 10_000, 10, _COLOUR),
    "cifar100": Size(50_000, 10_000, 100, _COLOUR),
    "cifar10_q75": Size(50_000, 10_000, 10, _COLOUR),
    "cifar10_lossless_part": Size(8125, 932, 10, _COLOUR),
    "svhn": Size(73_257, 26_032, 10, _COLOUR),
    "imagenet": Size(1_281_167, 50_000, 1000, _LARGE, streamed=True),
    "imagenet_sample": Size(1000, 1000, 1000, _LARGE, streamed=True),
    "enwik8": Size(90_000_000, 5_000_000, 205),
    "wikitext2_bytes": Size(1_065_599, 1_256_452, 138),
}

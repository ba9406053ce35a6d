"""Loaders of image sets: from files to tensors. A function has the name of its set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from neural.data import formats
from neural.data.cache import cached
from neural.data.fetch import File, Store, checksum
from neural.data.folder import ImageFolder, ImagePack, StreamData
from neural.data.formats import Bytes, damaged
from neural.data.images import ImageData, Images
from neural.data.published import FILES
from nqm.errors import NQMError

#: Mean and standard deviation per channel, as published.
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def images_of(pixels: Bytes, labels: NDArray[np.generic] | None = None) -> Images:
    """Make `Images` from arrays.

    Parameters
    ----------
    pixels : ndarray, shape (N, C, H, W)
        uint8.
    labels : ndarray, shape (N,), optional
        Class numbers; -1 for all images by default.

    Returns
    -------
    Images
    """
    if labels is None:
        labels = np.full(len(pixels), -1)
    array = np.ascontiguousarray(pixels)
    if not array.flags.writeable:  # torch shares memory, and warns of what it may not write
        array = array.copy()
    return Images(torch.from_numpy(array), torch.from_numpy(labels.astype(np.int64)))


def digits(store: Store) -> ImageData:
    """Load scikit-learn's digits, with 16 grey levels scaled to 0 to 255.

    Parameters
    ----------
    store : Store
        Not used: scikit-learn contains the images.

    Returns
    -------
    ImageData
        1,347 training and 450 test images of 8x8; the split is always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    content = load_digits()
    pixels = np.rint(content.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(
        pixels, content.target, test_size=450, stratify=content.target, random_state=0
    )
    train = images_of(parts[0], parts[2])
    values = train.pixels.double() / 255
    mean, std = float(values.mean()), float(values.std())
    return ImageData(
        "digits", "Digits 8x8", train, images_of(parts[1], parts[3]), 10, (mean,), (std,)
    )


def idx(label: str, mean: float, std: float) -> Callable[[Store], ImageData]:
    """Return the loader of MNIST, or of a set in its format.

    Parameters
    ----------
    label : str
        Name of the set for people.
    mean, std : float
        Mean and standard deviation of the pixels, scaled to [0, 1].

    Returns
    -------
    callable
        ``build(store)`` returns `ImageData` from four idx files with ten classes.
    """

    def build(store: Store) -> ImageData:
        arrays = [formats.read_idx_gz(path) for path in store.get_all(FILES[store.name])]
        train, test = (images_of(arrays[i][:, None], arrays[i + 1]) for i in (0, 2))
        return ImageData(store.name, label, train, test, 10, (mean,), (std,))

    return build


def cifar10(store: Store) -> ImageData:
    """Load CIFAR-10 from its python archive (Krizhevsky 2009).

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        50,000 training and 10,000 test images of 32x32, 10 classes.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    (path,) = store.get_all(FILES[store.name])
    folder = "cifar-10-batches-py"
    parts = [[f"{folder}/data_batch_{i}" for i in range(1, 6)], [f"{folder}/test_batch"]]
    train, test = (images_of(*part) for part in formats.read_cifar(path, parts, b"labels"))
    return ImageData("cifar10", "CIFAR-10", train, test, 10, *CIFAR10_STATS)


def cifar100(store: Store) -> ImageData:
    """Load CIFAR-100 with fine labels from its python archive (Krizhevsky 2009).

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        50,000 training and 10,000 test images of 32x32, 100 classes.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    (path,) = store.get_all(FILES[store.name])
    parts = [["cifar-100-python/train"], ["cifar-100-python/test"]]
    train, test = (images_of(*part) for part in formats.read_cifar(path, parts, b"fine_labels"))
    return ImageData("cifar100", "CIFAR-100", train, test, 100, *CIFAR100_STATS)


def cifar10_q75(store: Store) -> ImageData:
    """Load CIFAR-10 after JPEG at quality 75.

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        All 60,000 images. Results on it must not be reported as CIFAR-10.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    (path,) = store.get_all(FILES[store.name])
    header, scans, lengths, *labels = formats.read_npz(
        path, ("header", "scans", "lengths", "y_train", "y_test")
    )
    count = len(lengths)
    if count != len(labels[0]) + len(labels[1]) or lengths.sum(dtype=np.int64) != len(scans):
        raise damaged(path, f"{count} images, {len(labels[0])} + {len(labels[1])} labels")
    start = header.tobytes()

    def decode() -> Bytes:
        # The 60,000 files share their header and their end-of-image marker.
        whole = (start + scan + b"\xff\xd9" for scan in formats.pieces(scans, lengths))
        names = (f"{path}: image {i}" for i in range(count))
        return formats.decode_all(whole, names, count, path)

    pixels = cached(f"cifar10_q75-{checksum(path, File(path.name))}", decode)
    split = len(labels[0])
    return ImageData(
        "cifar10_q75", "CIFAR-10 (JPEG q75)", images_of(pixels[:split], labels[0]),
        images_of(pixels[split:], labels[1]), 10, *CIFAR10_STATS,
    )  # fmt: skip


def cifar10_part(store: Store) -> ImageData:
    """Load some original images of CIFAR-10 from two lossless WebP mosaics.

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        8,125 training and 932 test images.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    (path,) = store.get_all(FILES[store.name])
    parts = []
    for part in ("train", "test"):
        mosaic, labels = formats.read_npz(path, (f"webp_{part}", f"y_{part}"))
        pixels = formats.decode(mosaic.tobytes(), f"{path}:webp_{part}")
        parts.append(images_of(formats.tiles(pixels, 32, len(labels)), labels))
    label = f"CIFAR-10 ({len(parts[0]):,} train, {len(parts[1]):,} test)"
    return ImageData("cifar10_lossless_part", label, parts[0], parts[1], 10, *CIFAR10_STATS)


def svhn(store: Store) -> ImageData:
    """Load the street-view house numbers (Netzer et al. 2011) without the extra set.

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        Cropped digits of 32x32, 10 classes.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    paths = store.get_all(FILES[store.name])
    train, test = (images_of(*formats.read_svhn(path)) for path in paths)
    return ImageData(
        "svhn", "SVHN", train, test, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    )


def odin(label: str) -> Callable[[Store], ImageData]:
    """Return the loader of a set of the ODIN paper (Liang et al. 2018).

    Parameters
    ----------
    label : str
        Name of the set for people.

    Returns
    -------
    callable
        ``build(store)`` returns `ImageData` with out-of-distribution test images only, from a
        folder in a .tar.gz.
    """

    def build(store: Store) -> ImageData:
        (path,) = store.get_all(FILES[store.name])
        test = images_of(formats.read_tar_of_images(path))
        return ImageData(store.name, label, None, test, 0, *IMAGENET_STATS)

    return build


def emnist_letters(store: Store) -> ImageData:
    """Load EMNIST letters (Cohen et al. 2017).

    The official archive is used if it is there, else a pack of its test images; if neither is
    there, the archive is fetched.

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        Grey images of 28x28, 26 classes. The pack has no training images.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    archive, pack = FILES["emnist_letters"]
    train = None
    packed = store.find(pack)
    if packed is not None and store.find(archive) is None:
        pixels, labels = formats.read_npz(packed, ("x", "y"))
        test = images_of(pixels[:, None], labels)
    else:
        kinds = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
        members = [f"gzip/emnist-letters-{kind}-ubyte.gz" for kind in kinds]
        arrays = formats.read_idx_zip(store.get(archive), members)
        # The archive holds every image mirrored along its diagonal, and counts letters from 1.
        train, test = (
            images_of(arrays[i].transpose(0, 2, 1)[:, None], arrays[i + 1] - 1) for i in (0, 2)
        )
    return ImageData("emnist_letters", "EMNIST letters", train, test, 26, (0.1722,), (0.3309,))


def imagenet32(store: Store) -> ImageData:
    """Load ImageNet images at 32x32, without labels.

    They come from the sample of one image per class if it is there, else from a folder of images.

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    ImageData
        Test images only.

    Raises
    ------
    NQMError
        If neither the sample nor images are there, or an image is damaged.
    """
    (file,) = FILES["imagenet_sample"]
    path = store.find(file)
    if path is not None:
        pack = ImagePack.open(path)
        encoded = (pack.read(i) for i in range(len(pack.labels)))
        names = [pack.where(i) for i in range(len(pack.labels))]
    else:
        found = sorted(p for p in store.home.rglob("*") if formats.is_image(p.name))
        if not found:
            raise NQMError(
                f"imagenet32 needs {file.name} in {store.root}, or images in {store.home}; "
                "found neither"
            )
        encoded, names = (p.read_bytes() for p in found), [str(p) for p in found]
    pixels = formats.decode_all(encoded, names, len(names), store.home, resize=32)
    return ImageData("imagenet32", "ImageNet 32x32", None, images_of(pixels), 0, *IMAGENET_STATS)


def imagenet(store: Store) -> StreamData:
    """Open ImageNet (Russakovsky et al. 2015) in folders train and val of class folders.

    Parameters
    ----------
    store : Store
        Folders in which train and val are searched; nothing is downloaded.

    Returns
    -------
    StreamData

    Raises
    ------
    NQMError
        If the folders are missing, or have different classes.
    """
    places = [place for place in store.places() if (place / "train").is_dir()]
    if not places:
        raise NQMError(
            f"imagenet needs {store.home}/train and {store.home}/val, each with one folder of "
            "images for each class; it is not fetched (https://image-net.org asks you to register)"
        )
    train, test = ImageFolder.scan(places[0] / "train"), ImageFolder.scan(places[0] / "val")
    if train.names != test.names:
        raise NQMError(f"{places[0]}: train and val must have the same class folders")
    return StreamData("imagenet", "ImageNet", train, test, len(train.names), *IMAGENET_STATS)


def imagenet_sample(store: Store) -> StreamData:
    """Open a pack of one ImageNet image per class.

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    StreamData
        Training and test images are the same: it is meant for pipelines and throughput, not for
        accuracy.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    (path,) = store.get_all(FILES[store.name])
    pack = ImagePack.open(path)
    label = f"ImageNet sample ({len(pack.labels):,} images, train = test)"
    # They are centre crops already, so a test sees all of each.
    return StreamData(
        "imagenet_sample", label, pack, pack, len(pack.names), *IMAGENET_STATS, resize=224
    )

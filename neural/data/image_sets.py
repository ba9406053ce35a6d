"""How the files of each image set become tensors. The functions are named like the sets."""

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
    """scikit-learn's digits, their 16 grey levels spread over a byte; always the same split."""
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
    """MNIST or a set in its format: four idx files, ten classes."""

    def build(store: Store) -> ImageData:
        arrays = [formats.read_idx_gz(path) for path in store.get_all(FILES[store.name])]
        train, test = (images_of(arrays[i][:, None], arrays[i + 1]) for i in (0, 2))
        return ImageData(store.name, label, train, test, 10, (mean,), (std,))

    return build


def cifar10(store: Store) -> ImageData:
    """CIFAR-10 from its python archive (Krizhevsky 2009)."""
    (path,) = store.get_all(FILES[store.name])
    folder = "cifar-10-batches-py"
    parts = [[f"{folder}/data_batch_{i}" for i in range(1, 6)], [f"{folder}/test_batch"]]
    train, test = (images_of(*part) for part in formats.read_cifar(path, parts, b"labels"))
    return ImageData("cifar10", "CIFAR-10", train, test, 10, *CIFAR10_STATS)


def cifar100(store: Store) -> ImageData:
    """CIFAR-100, fine labels, from its python archive (Krizhevsky 2009)."""
    (path,) = store.get_all(FILES[store.name])
    parts = [["cifar-100-python/train"], ["cifar-100-python/test"]]
    train, test = (images_of(*part) for part in formats.read_cifar(path, parts, b"fine_labels"))
    return ImageData("cifar100", "CIFAR-100", train, test, 100, *CIFAR100_STATS)


def cifar10_q75(store: Store) -> ImageData:
    """CIFAR-10, all images, after JPEG at quality 75: never to be called CIFAR-10 alone."""
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
    """Some original images of CIFAR-10, in two lossless WebP mosaics."""
    (path,) = store.get_all(FILES[store.name])
    parts = []
    for part in ("train", "test"):
        mosaic, labels = formats.read_npz(path, (f"webp_{part}", f"y_{part}"))
        pixels = formats.decode(mosaic.tobytes(), f"{path}:webp_{part}")
        parts.append(images_of(formats.tiles(pixels, 32, len(labels)), labels))
    label = f"CIFAR-10 ({len(parts[0]):,} train, {len(parts[1]):,} test)"
    return ImageData("cifar10_lossless_part", label, parts[0], parts[1], 10, *CIFAR10_STATS)


def svhn(store: Store) -> ImageData:
    """Street-view house numbers, cropped digits (Netzer et al. 2011), without the extra set."""
    paths = store.get_all(FILES[store.name])
    train, test = (images_of(*formats.read_svhn(path)) for path in paths)
    return ImageData(
        "svhn", "SVHN", train, test, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    )


def odin(label: str) -> Callable[[Store], ImageData]:
    """Out-of-distribution images of the ODIN paper (Liang et al. 2018), a folder in a .tar.gz."""

    def build(store: Store) -> ImageData:
        (path,) = store.get_all(FILES[store.name])
        test = images_of(formats.read_tar_of_images(path))
        return ImageData(store.name, label, None, test, 0, *IMAGENET_STATS)

    return build


def emnist_letters(store: Store) -> ImageData:
    """EMNIST letters (Cohen et al. 2017): the official archive, else a pack of its test images."""
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
    """ImageNet at 32x32: the sample of one image for each class, else a folder of images."""
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
    """ImageNet (Russakovsky et al. 2015) as folders train and val of class folders."""
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
    """A pack of one image for each class: for pipelines and throughput, not for accuracy."""
    (path,) = store.get_all(FILES[store.name])
    pack = ImagePack.open(path)
    label = f"ImageNet sample ({len(pack.labels):,} images, train = test)"
    # They are centre crops already, so a test sees all of each.
    return StreamData(
        "imagenet_sample", label, pack, pack, len(pack.names), *IMAGENET_STATS, resize=224
    )

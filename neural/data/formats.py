"""Published file formats of image sets -> NumPy arrays. No network, no names of sets."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nqm.errors import NQMError
from nqm.files import check_regular

Bytes = NDArray[np.uint8]


def damaged(where: object, why: object) -> NQMError:
    """The error for a file that does not hold what its format promises.

    Parameters
    ----------
    where : object
        Name of the file.
    why : object
        Reason.

    Returns
    -------
    NQMError
        The error, to be raised by the caller.
    """
    return NQMError(f"{where} cannot be read ({why}); delete it and run again")


def read_idx(raw: bytes, where: object) -> Bytes:
    """An idx file of bytes (LeCun's MNIST format): big-endian sizes, then the values.

    Parameters
    ----------
    raw : bytes
        The uncompressed file.
    where : object
        What an error message calls it.

    Returns
    -------
    ndarray
        uint8, of the shape that the file states.
    """
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise damaged(where, "not an idx file of bytes")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != np.prod(shape, dtype=np.int64):
        raise damaged(where, f"{values.size} values for shape {shape}")
    return values.reshape(shape)


def read_idx_gz(path: Path) -> Bytes:
    """Read a gzipped idx file (see `read_idx`).

    Parameters
    ----------
    path : Path

    Returns
    -------
    ndarray
        uint8, of the shape that the file states.
    """
    with gzip.open(path) as stream:
        return read_idx(stream.read(), path)


def read_idx_zip(path: Path, members: Sequence[str]) -> list[Bytes]:
    """Read gzipped idx files from a zip archive.

    Parameters
    ----------
    path : Path
        The archive.
    members : sequence of str
        Names of the files in it.

    Returns
    -------
    list of ndarray
        One array per member.
    """
    with zipfile.ZipFile(path) as archive:
        known = set(archive.namelist())
        for member in members:
            if member not in known:
                raise damaged(path, f"it has no {member}")
        return [
            read_idx(gzip.decompress(archive.read(member)), f"{path}:{member}")
            for member in members
        ]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dictionaries, lists, strings, bytes and plain arrays; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # NumPy moved the module at version 2.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: str.encode(text, str(encoding))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data need")


def unpickle_arrays(stream: BinaryIO, where: object) -> dict[bytes, Any]:
    """Read a pickled dictionary of arrays and lists; no code in the pickle is run.

    Parameters
    ----------
    stream : binary file
        Written by Python 2 or 3.
    where : object
        What an error message calls it.

    Returns
    -------
    dict of bytes to object
    """
    try:
        content = _ArraysOnly(stream, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(where, error) from error
    if not isinstance(content, dict):
        raise damaged(where, f"it holds a {type(content).__name__}, not a dictionary")
    return content


def read_cifar(
    path: Path, parts: Sequence[Sequence[str]], key: bytes
) -> list[tuple[Bytes, NDArray[np.int64]]]:
    """Images of the python archive of CIFAR-10 or -100 (Krizhevsky 2009).

    Parameters
    ----------
    path : Path
        The .tar.gz; nothing is extracted to disk.
    parts : sequence of sequence of str
        For each part, the members it joins, in order.
    key : bytes
        ``b"labels"`` or ``b"fine_labels"``.

    Returns
    -------
    list of (ndarray, ndarray)
        For each part (N, 3, 32, 32) uint8 and (N,) int64.
    """
    wanted = {member for part in parts for member in part}
    batches: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(path, "r|gz") as archive:  # one pass: seeking in a gzip is slow
        for member in archive:
            stream = archive.extractfile(member) if member.name in wanted else None
            if stream is not None:
                data = io.BytesIO(stream.read())
                batches[member.name] = unpickle_arrays(data, f"{path}:{member.name}")
    try:
        return [
            (
                np.concatenate([batches[name][b"data"] for name in part]).reshape(-1, 3, 32, 32),
                np.concatenate([batches[name][key] for name in part]).astype(np.int64),
            )
            for part in parts
        ]
    except (KeyError, ValueError) as error:
        raise damaged(path, f"it lacks or mismatches {error}") from error


def read_svhn(path: Path) -> tuple[Bytes, NDArray[np.int64]]:
    """Cropped digits of SVHN (Netzer et al. 2011), a MATLAB file.

    Parameters
    ----------
    path : Path
        A .mat file.

    Returns
    -------
    (ndarray, ndarray)
        (N, 3, 32, 32) uint8 and (N,) int64; the file's 10 stands for digit 0.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path)
        pixels, labels = content["X"], content["y"]
    except Exception as error:  # a damaged .mat raises nearly anything
        raise damaged(path, error) from error
    return pixels.transpose(3, 2, 0, 1), labels.ravel().astype(np.int64) % 10


def read_tar_of_images(path: Path) -> Bytes:
    """Every image of a .tar.gz, in the order of their names.

    Parameters
    ----------
    path : Path

    Returns
    -------
    ndarray
        (N, 3, H, W) uint8.
    """
    encoded = {}
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            # Archives made on a Mac hold a "._name" beside each image.
            if member.isfile() and not name.startswith(".") and is_image(name):
                stream = archive.extractfile(member)
                encoded[member.name] = stream.read() if stream else b""
    names = sorted(encoded)
    return decode_all((encoded[n] for n in names), (f"{path}:{n}" for n in names), len(names), path)


def is_image(name: str) -> bool:
    """True if a file name has an ending of an image format.

    Parameters
    ----------
    name : str

    Returns
    -------
    bool
    """
    return name.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


def decode(encoded: bytes, where: object, resize: int | None = None) -> Bytes:
    """One encoded image as RGB.

    Parameters
    ----------
    encoded : bytes
        JPEG, PNG or WebP.
    where : object
        What an error message calls it.
    resize : int, optional
        Side of the square to which its central square is brought, by box averaging.

    Returns
    -------
    ndarray
        (H, W, 3) uint8.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            rgb = image.convert("RGB")
            if resize is not None and rgb.size != (resize, resize):
                side = min(rgb.size)
                left, top = ((length - side) // 2 for length in rgb.size)
                box = (left, top, left + side, top + side)
                rgb = rgb.resize((resize, resize), Image.Resampling.BOX, box)
            return np.asarray(rgb)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise damaged(where, str(error) or type(error).__name__) from error


def decode_all(
    encoded: Iterable[bytes],
    where: Iterable[object],
    count: int,
    source: object,
    resize: int | None = None,
) -> Bytes:
    """Decode images of one size into one array.

    Parameters
    ----------
    encoded : iterable of bytes
        Content of each file.
    where : iterable of object
        Name of each image in error messages.
    count : int
        Number of images, N.
    source : object
        Name of the whole set in error messages.
    resize : int, optional
        Passed on to `decode`.

    Returns
    -------
    ndarray, shape (N, 3, H, W)
        uint8.
    """
    out: Bytes | None = None
    for i, (one, name) in enumerate(zip(encoded, where, strict=True)):
        pixels = decode(one, name, resize).transpose(2, 0, 1)
        if out is None:
            out = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != out.shape[1:]:
            raise damaged(name, f"{pixels.shape} where the images before it have {out.shape[1:]}")
        out[i] = pixels
    if out is None:
        raise damaged(source, "it holds no image")
    return out


def read_npz(path: Path, keys: Sequence[str]) -> list[NDArray[Any]]:
    """Read arrays from an .npz file; pickled objects are refused.

    Parameters
    ----------
    path : Path
    keys : sequence of str
        Names of the arrays.

    Returns
    -------
    list of ndarray
        In the order of `keys`.
    """
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            return [content[key] for key in keys]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error


def pieces(joined: Bytes, lengths: NDArray[Any]) -> Iterator[bytes]:
    """Cut byte strings that were joined end to end.

    Parameters
    ----------
    joined : ndarray, shape (sum(lengths),)
        uint8.
    lengths : ndarray, shape (N,)
        Bytes of each string.

    Yields
    ------
    bytes
    """
    view = joined.tobytes()
    ends = np.cumsum(lengths, dtype=np.int64)
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        yield view[end - length : end]


def tiles(mosaic: Bytes, side: int, count: int) -> Bytes:
    """The first `count` square tiles of a mosaic, row by row.

    Parameters
    ----------
    mosaic : ndarray
        (rows * side, columns * side, 3) uint8.
    side : int
        Of one tile, pixels.
    count : int
        Tiles in use.

    Returns
    -------
    ndarray
        (count, 3, side, side) uint8.
    """
    rows, columns = mosaic.shape[0] // side, mosaic.shape[1] // side
    cut = mosaic.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(rows * columns, 3, side, side)[:count]

"""Loaders of texts: from files to tensors. A function has the name of its set."""

from __future__ import annotations

import platform
import zipfile

import torch

from neural.data.fetch import Store
from neural.data.published import FILES
from neural.data.text import TextData


def _text(name: str, label: str, raw: bytes, cuts: tuple[int, int]) -> TextData:
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    train, valid, test = tokens.tensor_split(cuts)
    return TextData(name, label, train, valid, test)


def enwik8(store: Store) -> TextData:
    """Load enwik8, the first 10^8 bytes of a Wikipedia dump (Mahoney 2006).

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    TextData
        Bytes, split 90/5/5 per cent in order.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    (path,) = store.get_all(FILES[store.name])
    with zipfile.ZipFile(path) as archive:
        raw = archive.read(archive.namelist()[0])
    cuts = (len(raw) * 90 // 100, len(raw) * 95 // 100)
    return _text("enwik8", "enwik8", raw, cuts)


def wikitext2(store: Store) -> TextData:
    """Load WikiText-2's validation and test files as bytes (Merity et al. 2016).

    Parameters
    ----------
    store : Store
        Place of the files on disk; it downloads missing ones if it may.

    Returns
    -------
    TextData
        The first 95 % of the validation file for training, its rest for validation, and the test
        file.

    Raises
    ------
    NQMError
        If a file is missing and cannot be fetched, or is damaged.
    """
    valid, test = (path.read_bytes() for path in store.get_all(FILES[store.name]))
    cuts = (len(valid) * 95 // 100, len(valid))
    label = "WikiText-2 bytes (trained on its valid file, tested on its test file)"
    return _text("wikitext2_bytes", label, valid + test, cuts)


def python_docs(store: Store) -> TextData:
    """Load the help topics that come with Python.

    Parameters
    ----------
    store : Store
        Not used: Python contains the text.

    Returns
    -------
    TextData
        Bytes, split 90/5/5 per cent in order; the text depends on Python's version.
    """
    from pydoc_data.topics import topics

    raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    version = ".".join(platform.python_version_tuple()[:2])
    cuts = (len(raw) * 90 // 100, len(raw) * 95 // 100)
    return _text("python_docs", f"Python {version} documentation", raw, cuts)

"""Decoded images kept between runs, in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from neural.data.formats import Bytes
from nqm.errors import NQMError
from nqm.files import check_regular, replacing


def cache_folder() -> Path:
    """``~/.cache/late-phase-nqm``, or its place under ``XDG_CACHE_HOME``.

    Returns
    -------
    Path
        ``$XDG_CACHE_HOME/late-phase-nqm`` if that variable is set.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "late-phase-nqm"


def cached(key: str, make: Callable[[], Bytes]) -> Bytes:
    """The array stored under `key`; it is computed and stored if it is missing.

    Parameters
    ----------
    key : str
        File name without extension; must change with what the array is made of.
    make : callable
        Computes the array.

    Returns
    -------
    ndarray
    """
    path = cache_folder() / "decoded" / f"{key}.npy"
    try:
        check_regular(path)
        stored: Bytes = np.load(path, allow_pickle=False)
        return stored
    except (OSError, ValueError, EOFError):  # absent or damaged: made anew
        pass
    array = make()
    with suppress(OSError, NQMError):  # a full or read-only disk costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as out:
            np.save(out, array)
    return array

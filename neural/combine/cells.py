"""Parts of a comparison on disk: a killed one can continue, and nothing is computed twice."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.files import check_regular, replacing

Arrays = dict[str, NDArray[Any]]


class Cells:
    """Arrays by what they were computed from.

    Parameters
    ----------
    folder : Path, optional
        Where they are kept; without it they are kept in memory.
    about : mapping, optional
        What identifies the data: part of the keys of cells that depend on them.
    """

    def __init__(self, folder: Path | None = None, about: Mapping[str, Any] | None = None):
        self.folder, self.about = folder, dict(about or {})
        self._held: dict[str, Arrays] = {}

    def on(self, about: Mapping[str, Any]) -> Cells:
        """The same cells for other data.

        Parameters
        ----------
        about : mapping
            What identifies the data.

        Returns
        -------
        Cells
        """
        other = copy(self)
        other.about = dict(about)
        return other

    def on_data(self, what: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Arrays of a cell that depends on the data.

        Parameters
        ----------
        what : mapping
            What else they depend on; names in `about` may be the same.
        make : callable
            Computes them.

        Returns
        -------
        dict of str to ndarray
        """
        return self.get({**what, "about": self.about}, make)

    def get(self, what: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Arrays of one cell; computed only if they are not there yet.

        Parameters
        ----------
        what : mapping
            All that the arrays depend on: texts, numbers, lists and mappings of these.
        make : callable
            Computes them.

        Returns
        -------
        dict of str to ndarray

        Raises
        ------
        NQMError
            If the file of the cell is damaged, or cannot be written.
        """
        key = keys.key({"version": __version__, **what})[:32]
        if self.folder is None:
            if key not in self._held:
                self._held[key] = make()
            return self._held[key]
        path = self.folder / f"{key}.npz"
        if path.exists():
            return _read(path)
        arrays = make()
        content = io.BytesIO()
        extra: Any = arrays
        np.savez(content, **extra)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(content.getbuffer())
        return arrays


def _read(path: Path) -> Arrays:
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except Exception as error:  # a damaged file makes a reader stumble in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(f"{path} is damaged ({reason:.80}); delete it and run again") from None


def described(value: Any) -> dict[str, Any]:
    """What identifies a rule: its class, and what differs from the defaults.

    Parameters
    ----------
    value : dataclass

    Returns
    -------
    dict
        Of texts, numbers, lists and mappings.
    """

    def nested(entry: Any) -> Any:
        return described(entry) if is_dataclass(entry) and not isinstance(entry, type) else entry

    return {"kind": type(value).__name__, **keys.differing(value, nested)}

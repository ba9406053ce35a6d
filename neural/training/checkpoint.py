"""Checkpoints: written completely or not at all, and read without executing code in them."""

from __future__ import annotations

import argparse
import io
import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from nqm.errors import NQMError
from nqm.files import check_regular
from nqm.table import replacing


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file, completely or not at all.

    Parameters
    ----------
    path : Path
        The file.
    content : mapping
        Name -> tensor, number, string, or a container of them.

    Raises
    ------
    NQMError
        If the file cannot be written, e.g. on a full disk; an older file of that name remains.
    """
    written = io.BytesIO()  # torch's own writer hides errors of the system, e.g. a full disk
    torch.save(dict(content), written)
    with replacing(path) as stream:
        stream.write(written.getbuffer())


class BackgroundWriter:
    """Writes checkpoints in a thread while training goes on; one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, path: Path, content: Mapping[str, Any]) -> None:
        """Copy tensors to the host now, and write the file later; see `save`.

        Parameters
        ----------
        path : Path
            The file.
        content : mapping
            See `save`.

        Raises
        ------
        NQMError
            If the last file could not be written.
        """
        self.wait()
        copies = pytree.tree_map_only(torch.Tensor, _copy_on_host, dict(content))
        self._thread = threading.Thread(target=self._write, args=(path, copies))
        self._thread.start()

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        try:
            save(path, content)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait until the last file is written.

        Raises
        ------
        NQMError
            If it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _copy_on_host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file that `save` wrote; no code in the file is executed.

    Parameters
    ----------
    path : Path
        The file.
    device : torch.device or str
        Device of the tensors.

    Returns
    -------
    dict of str to Any
        Content of the file.

    Raises
    ------
    NQMError
        If the file is missing, is cut short, or holds more than tensors and plain values.
    """
    return _read(path, device, "delete it and run again")


def load_foreign(path: Path) -> dict[str, Any]:
    """Read a checkpoint that other software wrote; no code in the file is executed.

    Parameters
    ----------
    path : Path
        A file of torch, or a .safetensors file. Beside tensors it may hold NumPy scalars and the
        options of a command line (argparse).

    Returns
    -------
    dict of str to Any
        Content of the file; tensors are on the CPU.

    Raises
    ------
    NQMError
        If the file is missing or damaged, or holds objects of other kinds.
    """
    check_regular(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Any] = load_file(path)
            return tensors
        except (SafetensorError, OSError) as error:
            raise NQMError(f"{path} is not a complete safetensors file ({error!s:.100})") from None
    with torch.serialization.safe_globals(_harmless()):
        return _read(path, "cpu", "fetch or save it anew")


def _harmless() -> list[Any]:
    """Harmless classes that checkpoints often hold: NumPy scalars and argparse options."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdg"}
    # In NumPy 1 the module has another name.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds, argparse.Namespace]


def _read(path: Path, device: torch.device | str, advice: str) -> dict[str, Any]:
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if refused:
            raise NQMError(
                f"{path} holds a {refused[1]}, and only tensors and plain values are read; save "
                "its state dict alone"
            ) from None
        if str(error).startswith("Weights only load failed"):
            raise NQMError(
                f"{path} is not a complete checkpoint: it is damaged, or a pickle that torch.save "
                f"did not write, which may run code and is not read; {advice}"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(f"{path} is not a complete checkpoint ({reason:.100}); {advice}") from None
    if not isinstance(content, dict):
        raise NQMError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content

"""Checkpoints: written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nqm.errors import NQMError
from nqm.table import replacing


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values; the file takes its name once all is on disk.

    Raises
    ------
    NQMError
        When it cannot be written, e.g. on a full disk; an older file of that name stays.
    """
    written = io.BytesIO()  # torch's own writer hides the system's error, e.g. that a disk is full
    torch.save(dict(content), written)
    with replacing(path) as stream:
        stream.write(written.getbuffer())


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save` wrote.

    Raises
    ------
    NQMError
        When the file is missing, cut short or holds more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise NQMError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file makes torch's reader stumble in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(
            f"{path} is not a complete checkpoint ({reason:.100}); delete it and run again"
        ) from None
    if not isinstance(content, dict):
        raise NQMError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content

"""The published CIFAR-10-C files (Hendrycks & Dietterich 2019).

Every corruption has a file ``<corruption>.npy``, uint8 (50,000, 32, 32, 3): the 10,000 test images
at severity 1, then at 2, up to 5. The labels are in ``labels.npy``, shape (50,000,).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nqm.errors import NQMError, check_integer, suggest
from nqm.files import check_regular

SEVERITIES = 5


@dataclass(frozen=True)
class CIFAR10C:
    """A folder of CIFAR-10-C files, read on demand.

    Attributes
    ----------
    folder : Path
        The folder.
    names : tuple of str
        Names of the corruptions that have a file, sorted.
    """

    folder: Path
    names: tuple[str, ...]

    def subset(self, name: str, severity: int) -> tuple[Tensor, Tensor]:
        """Read the images of one corruption at one severity.

        Parameters
        ----------
        name : str
            Name of the corruption, one of `names`.
        severity : int
            Severity from 1 to 5.

        Returns
        -------
        pixels : Tensor of uint8, shape (N, 3, 32, 32)
            The images; N is 10,000 for the published files.
        labels : Tensor of int64, shape (N,)
            Class numbers, 0 to 9.

        Raises
        ------
        NQMError
            If there is no such file or severity, or a file is not of the published form.
        """
        if name not in self.names:
            raise NQMError(f"CIFAR-10-C: no file for {name!r}{suggest(name, self.names)}")
        check_integer("CIFAR-10-C: severity", severity, 1)
        if severity > SEVERITIES:
            raise NQMError(f"CIFAR-10-C: severity must lie in 1..{SEVERITIES}; got {severity}")
        images, labels = _read(self.folder / f"{name}.npy"), _read(self.folder / "labels.npy")
        form = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (32, 32, 3)
        if not form or labels.shape != images.shape[:1] or len(images) % SEVERITIES:
            raise NQMError(
                f"{self.folder / name}.npy: expected uint8 (5 N, 32, 32, 3) and labels.npy (5 N,); "
                f"got {images.dtype} {images.shape} and {labels.shape}; fetch CIFAR-10-C.tar again"
            )
        n = len(images) // SEVERITIES
        chosen = slice((severity - 1) * n, severity * n)
        pixels = torch.from_numpy(np.array(images[chosen])).movedim(-1, 1).contiguous()
        return pixels, torch.from_numpy(np.array(labels[chosen], dtype=np.int64))


def load_cifar10_c(folder: str | Path) -> CIFAR10C:
    """Open a folder of published CIFAR-10-C files.

    Parameters
    ----------
    folder : path
        Folder with ``labels.npy`` and a ``.npy`` file for each corruption.

    Returns
    -------
    CIFAR10C

    Raises
    ------
    NQMError
        If ``labels.npy`` or every corruption is missing.
    """
    folder = Path(folder)
    names = tuple(sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels"))
    if not names or not (folder / "labels.npy").is_file():
        raise NQMError(
            f"{folder}: expected labels.npy and one .npy file per corruption; "
            "unpack CIFAR-10-C.tar and give the folder that it makes"
        )
    return CIFAR10C(folder, names)


def _read(path: Path) -> NDArray[np.generic]:
    check_regular(path)
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NQMError(
            f"{path}: not a readable .npy file ({error}); fetch CIFAR-10-C.tar again"
        ) from error
    return array

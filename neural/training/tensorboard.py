"""Write the history of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nqm.errors import NQMError

#: Columns of the history that are written.
CURVES = ("train_loss", "loss", "accuracy", "lr", "spread")


class Board:
    """Writer of the event files of one run.

    Parameters
    ----------
    folder : Path
        Folder of the run; events are written to its subfolder ``tensorboard``.
    step : int
        Number of minibatches done. Events of an earlier process with larger numbers are removed.

    Raises
    ------
    NQMError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise NQMError(
                "--tensorboard needs a package: pip install 'late-phase-nqm[tensorboard]'"
            ) from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row of the history.

        Parameters
        ----------
        row : mapping
            Column -> value; the columns `CURVES` and ``step`` are used.
        """
        for name in CURVES:
            self._writer.add_scalar(name, row[name], row["step"])
        self._writer.flush()

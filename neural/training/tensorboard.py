"""Curves for TensorBoard, while a run is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nqm.errors import NQMError

#: Columns of the history that are drawn.
CURVES = ("train_loss", "loss", "accuracy", "lr", "spread")


class Board:
    """Event files of one run.

    Parameters
    ----------
    folder : Path
        Of the run; events go to ``tensorboard`` below it.
    step : int
        Minibatches done: what an earlier process noted beyond is taken back.

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
            Column -> value; `CURVES` and ``step`` are read.
        """
        for name in CURVES:
            self._writer.add_scalar(name, row[name], row["step"])
        self._writer.flush()

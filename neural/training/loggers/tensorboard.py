"""``--log tensorboard``: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from neural.training.loggers.base import LoggedRun


class TensorBoardLogger:
    """Write the numbers of one run to its subfolder ``tensorboard``.

    Parameters
    ----------
    run : LoggedRun
        The run. Events of an earlier process beyond ``run.step`` are removed.
    """

    def __init__(self, run: LoggedRun):
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers at one step.

        Parameters
        ----------
        step : int
            Minibatches used so far.
        numbers : mapping of str to float
            By name.
        """
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        """Close the files.

        Parameters
        ----------
        status : str
            ``finished``, ``diverged`` or ``killed``.
        """
        self._writer.close()

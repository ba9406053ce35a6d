"""``--log wandb``: Weights & Biases.

Its own environment variables say where to: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import wandb

from neural.training.loggers.base import LoggedRun


class WandbLogger:
    """Send the numbers of one run to Weights & Biases.

    Parameters
    ----------
    run : LoggedRun
        The run; a killed one goes on under its id.
    """

    def __init__(self, run: LoggedRun):
        self._run: Any = wandb.init(
            id=run.id,
            name=run.name,
            config=dict(run.config),
            dir=str(run.folder),
            resume="allow",
            reinit="create_new",  # runs of one process follow one another
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send numbers of one step.

        Parameters
        ----------
        step : int
            Minibatches used so far.
        numbers : mapping of str to float
            By name.
        """
        self._run.log(dict(numbers), step=step)

    def close(self, status: str) -> None:
        """End the run.

        Parameters
        ----------
        status : str
            ``finished``, ``diverged`` or ``killed``.
        """
        self._run.finish(exit_code=0 if status == "finished" else 1)

"""What a logger is told of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: Numbers at points between evaluations: epochs done, mean training loss since the last point.
POINT = ("epoch", "train_loss", "lr")
#: Numbers at evaluations, those of the history: test loss and accuracy of the model, and of the
#: average over time if there is one; distance of the members from their mean.
EVALUATION = ("loss", "accuracy", "average_loss", "average_accuracy", "spread")
NUMBERS = (*POINT, *EVALUATION)


@dataclass(frozen=True)
class LoggedRun:
    """A run, as a logger needs it.

    Attributes
    ----------
    folder : Path
        Folder of the run, to write into.
    name : str
        Arm and seed, as ``late_phase/seed0``.
    id : str
        Text that no other run has, and that stays the same when a killed run goes on.
    config : mapping
        Configuration of the run, nested tables of plain values.
    step : int
        Minibatches used so far; above 0 where a killed run goes on.
    """

    folder: Path
    name: str
    id: str
    config: Mapping[str, Any]
    step: int


class Logger(Protocol):
    """Takes the numbers of one run while it is trained; made from a `LoggedRun`."""

    def log(self, step: int, numbers: Mapping[str, float], /) -> None:
        """Take numbers of one step.

        Parameters
        ----------
        step : int
            Minibatches used so far; the same step may come twice, with different names.
        numbers : mapping of str to float
            Some of `NUMBERS`, by name.
        """

    def close(self, status: str, /) -> None:
        """Take leave of the run.

        Parameters
        ----------
        status : str
            ``finished``, ``diverged``, or ``killed`` if it was interrupted.
        """

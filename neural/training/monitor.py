"""What a run tells while it is trained: how far it is, and numbers for loggers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

from neural.training.config import describe
from neural.training.loggers import LoggedRun, Logger, make_loggers
from neural.training.loggers.base import EVALUATION
from neural.training.run_folder import RunFolder
from neural.training.run_progress import RunProgress
from neural.training.state import TrainState
from nqm import keys
from nqm.errors import NQMWarning

#: Seconds between two writings of ``progress.json``.
WRITE_EVERY = 1.0


class Monitor:
    """Writes ``progress.json`` of a run, and feeds its loggers, in the first of its processes.

    Its losses are those of its own process: between evaluations no process waits for another.

    Parameters
    ----------
    train_state : TrainState
        State of the run, where training begins or goes on.
    log : RunFolder
        Folder of the run.
    """

    def __init__(self, train_state: TrainState, log: RunFolder):
        self._state, self._log = train_state, log
        self._begun, self._first = time.monotonic(), train_state.done
        self._written = -float("inf")
        self._counted = self._losses()
        names = train_state.runtime.loggers if log.writes else ()
        self._loggers = make_loggers(names, _logged(train_state, log)) if names else []

    def point(self) -> None:
        """Tell loggers of the steps since the last point; called between steps."""
        if not self._loggers:
            return
        total, count = self._losses()
        new, steps = total - self._counted[0], count - self._counted[1]
        self._counted = (total, count)
        if steps:
            state = self._state
            lr = float(state.optimizer.param_groups[0]["lr"])
            self._tell({"epoch": state.epoch, "train_loss": new / steps, "lr": lr})

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Tell loggers of an evaluation, with which a new mean of the training loss begins.

        Parameters
        ----------
        row : mapping
            Row of the history (see `neural.training.report.during`).
        """
        self._counted = (0.0, 0.0)
        self._tell({name: row[name] for name in EVALUATION if name in row})

    def write(self) -> None:
        """Replace ``progress.json``, unless that was done just now."""
        now, state = time.monotonic(), self._state
        if not self._log.writes or now - self._written < WRITE_EVERY:
            return
        self._written = now
        done, batches = state.done - self._first, len(state.task.stream)
        total, count = self._losses()
        last = state.rows[-1] if state.rows else {}
        nan = float("nan")
        self._log.write_progress(
            RunProgress(
                epoch=state.epoch,
                epochs=state.run.train.epochs,
                # Right after an evaluation there is no step yet of which to tell.
                train_loss=total / count if count else last.get("train_loss", nan),
                evaluated=last.get("epoch", 0),
                loss=last.get("loss", nan),
                accuracy=last.get("accuracy", nan),
                seconds_per_epoch=(now - self._begun) / done * batches if done else nan,
            )
        )

    def close(self, status: str) -> None:
        """Close the loggers.

        Parameters
        ----------
        status : str
            ``finished``, ``diverged``, or ``killed``.
        """
        loggers, self._loggers = self._loggers, []
        for logger in loggers:
            try:
                logger.close(status)
            except Exception as error:
                _warn(logger, error)

    def _losses(self) -> tuple[float, float]:
        """Sum and number of the losses since the last evaluation; waits for the GPU."""
        total, count = self._state.losses.tolist()
        return total, count

    def _tell(self, numbers: Mapping[str, float]) -> None:
        for logger in list(self._loggers):
            try:
                logger.log(self._state.done, numbers)
            except Exception as error:  # a full disk, somebody else's code: training goes on
                self._loggers.remove(logger)
                _warn(logger, error)


def _logged(train_state: TrainState, log: RunFolder) -> LoggedRun:
    folder = log.path.resolve()
    return LoggedRun(
        folder=folder,
        name=f"{folder.parent.name}/{folder.name}",
        id=keys.key({"run": log.key, "folder": str(folder)})[:16],
        config=describe(train_state.run),
        step=train_state.done,
    )


def _warn(logger: Logger, error: Exception) -> None:
    name = type(logger).__name__
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    warnings.warn(f"{name} has stopped ({reason:.200}); training goes on", NQMWarning, stacklevel=2)

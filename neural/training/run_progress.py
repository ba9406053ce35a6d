"""How far a run is: the file ``progress.json`` in its folder while it is trained.

`nqm neural watch` and the display of ``nqm neural train`` read it; nothing else does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nqm.errors import NQMError
from nqm.files import check_regular, replacing

#: Name of the file.
FILE = "progress.json"


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes
    ----------
    epoch : float
        Epochs done, with the share of the present one.
    epochs : int
        Epochs of the run.
    train_loss : float
        Mean training loss since the evaluation before, nats.
    evaluated : int
        Epochs done at the last evaluation; 0 if there was none.
    loss, accuracy : float
        On the test set at the last evaluation; NaN if there was none.
    seconds_per_epoch : float
        Of this process; NaN if not known yet.
    """

    epoch: float
    epochs: int
    train_loss: float = math.nan
    evaluated: int = 0
    loss: float = math.nan
    accuracy: float = math.nan
    seconds_per_epoch: float = math.nan

    @property
    def left(self) -> float:
        """Estimated seconds to the end of training; NaN if not known."""
        return max(0.0, self.epochs - self.epoch) * self.seconds_per_epoch


def write_progress(folder: Path, progress: RunProgress) -> None:
    """Replace the file of a run.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    progress : RunProgress
        How far it is.
    """
    content = {k: v if math.isfinite(v) else None for k, v in asdict(progress).items()}
    with replacing(folder / FILE, durable=False) as stream:
        stream.write(json.dumps(content).encode())


def read_progress(folder: Path) -> RunProgress | None:
    """Read the file of a run.

    Parameters
    ----------
    folder : Path
        Folder of the run.

    Returns
    -------
    RunProgress or None
        None if there is no such file, or it holds something else.
    """
    try:
        check_regular(folder / FILE)
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return _restored(content)
    except (NQMError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _restored(content: Mapping[str, Any]) -> RunProgress:
    """Numbers of the file; raises KeyError, TypeError or ValueError where one is missing."""
    values: dict[str, Any] = {}
    for field in fields(RunProgress):
        value = content[field.name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(field.name)
        values[field.name] = math.nan if value is None else value
    if not (values["epoch"] >= 0 and values["epochs"] >= 0 and values["evaluated"] >= 0):
        raise ValueError("epochs")
    return RunProgress(**values)

"""Finished runs: their models again, measured anew or handed on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from neural import checkpoint, report
from neural.config import EvaluateConfig, RunConfig, describe
from neural.late_phase import LatePhase
from neural.making import make_late, make_model, plain_model
from neural.runlog import open_run
from neural.task import Place, Task, open_task
from nqm.errors import NQMError


@dataclass(frozen=True)
class Opened:
    """A finished run.

    Attributes
    ----------
    model : Module
        Its single model, with plain weights.
    late : LatePhase or None
        Base and members, if it has any.
    """

    run: RunConfig
    task: Task
    model: nn.Module
    late: LatePhase | None


def reopen(folder: str | Path, place: Place | None = None) -> Opened:
    """Models of a finished run.

    Raises
    ------
    NQMError
        If there is no run in the folder, or it is not finished.
    """
    folder, place = Path(folder), place or Place()
    run, stated = open_run(folder)
    if stated["status"] != "finished":
        state = stated["status"] or "not finished; train it on first"
        raise NQMError(f"the run in {folder} is {state}")
    task = open_task(run, place)
    model = plain_model(run.model, task)
    model.load_state_dict(checkpoint.load(folder / "model.pt"))
    late = None
    if run.late_phase is not None:
        late = make_late(make_model(run.model, task, start=False), run)
        late.load_state_dict(checkpoint.load(folder / "late.pt"))
        late = late.to(place.device)
    return Opened(run, task, model.to(place.device), late)


def measure(opened: Opened, settings: EvaluateConfig, root: Path | None = None) -> pd.DataFrame:
    """Test metrics of the single model, and whatever else `settings` asks for.

    Returns
    -------
    DataFrame
        Columns data, metric, value.
    """
    ood = report.ood_images(opened.task, settings.ood, root)
    rows: list[dict[str, Any]] = [
        {"data": "test", "metric": name, "value": value}
        for name, value in report.test_metrics(opened.model, opened.task).items()
    ]
    rows += report.beyond(opened.model, opened.late, opened.task, settings, ood)
    return pd.DataFrame(rows, columns=["data", "metric", "value"])


def export(folder: str | Path, out: str | Path, member: int | None = None) -> Path:
    """Write a run's single model, or one member, as safetensors.

    Other tools read it as a plain state dict of the architecture; the run's configuration is in its
    metadata.

    Parameters
    ----------
    folder : str or Path
        Of a finished run.
    out : str or Path
        Ends in .safetensors; an existing file is not overwritten.
    member : int, optional
    """
    from safetensors.torch import save

    from nqm.table import replacing

    out = Path(out)
    if out.suffix != ".safetensors":
        raise NQMError(f"{out}: the name must end in .safetensors; got {out.suffix!r}")
    if out.exists():
        raise NQMError(f"{out} exists; move it away or choose another name")
    if member is None:
        run, _ = open_run(folder)
        state = checkpoint.load(Path(folder) / "model.pt")
    else:
        opened = reopen(folder)
        if opened.late is None:
            raise NQMError(f"the run in {folder} has no members; leave --member out")
        state, run = opened.late.member(member).state_dict(), opened.run
    content = save(_independent(state), metadata={"run": json.dumps(describe(run))})
    with replacing(out) as stream:
        stream.write(content)
    return out


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, as tied weights do.
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}

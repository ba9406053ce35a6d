"""Finished runs: load, measure and export their models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from neural.late_phase.members import LatePhase
from neural.serving.folder import misfit
from neural.training import checkpoint, report
from neural.training.build import make_late, make_model, plain_model
from neural.training.config import EvaluateConfig, RunConfig, describe, run_key
from neural.training.run_folder import open_run
from neural.training.task import DTYPES, Runtime, Task, open_task
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.keys import differing
from nqm.progress import Progress, counted
from nqm.table import Stamp, read_table, replacing, write_table, writing


@dataclass(frozen=True)
class Opened:
    """A finished run.

    Attributes
    ----------
    run : RunConfig
        Its configuration.
    task : Task
        Its data and loss.
    model : Module
        Its single model, with plain weights.
    late : LatePhase or None
        Base and members; None if it has no members.
    """

    run: RunConfig
    task: Task
    model: nn.Module
    late: LatePhase | None


def open_finished(folder: str | Path) -> RunConfig:
    """Read the configuration of a finished run.

    Parameters
    ----------
    folder : str or Path
        The run's folder.

    Returns
    -------
    RunConfig

    Raises
    ------
    NQMError
        If there is no run, it is not finished, or its ``run.json`` is damaged.
    """
    run, stated = open_run(folder)
    if (status := stated["status"]) != "finished":
        raise NQMError(f"the run in {folder} is {status or 'not finished; train it on first'}")
    return run


def load_state(module: nn.Module, path: Path) -> None:
    """Load weights of a run into a module.

    Parameters
    ----------
    module : Module
        The module; its weights are changed in place.
    path : Path
        File that the run has written.

    Raises
    ------
    NQMError
        If the file is not a state dict of this module: other names, shapes or kinds of numbers.
    """
    content = checkpoint.load(path)
    if reason := misfit(content, module):
        raise NQMError(f"{path} does not fit the model of its run.json: {reason}; train it again")
    module.load_state_dict(content)


def reopen(folder: str | Path, runtime: Runtime | None = None) -> Opened:
    """Load the models of a finished run.

    Parameters
    ----------
    folder : str or Path
        The run's folder.
    runtime : Runtime, optional
        Device and data folder; one CPU by default.

    Returns
    -------
    Opened

    Raises
    ------
    NQMError
        If there is no run in the folder, it is not finished, or its files do not fit together.
    """
    folder, runtime = Path(folder), runtime or Runtime()
    run = open_finished(folder)
    task = open_task(run, runtime)
    dtype = DTYPES[run.train.precision]  # of the weights, and of the images that the task gives
    model = plain_model(run.model, task).to(dtype)
    load_state(model, folder / "model.pt")
    late = None
    if run.late_phase is not None:
        late = make_late(make_model(run.model, task, start=False).to(dtype), run)
        load_state(late, folder / "late.pt")
        late = late.to(runtime.device)
    return Opened(run, task, model.to(runtime.device), late)


def measure(
    opened: Opened,
    settings: EvaluateConfig,
    root: Path | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure the single model of a run.

    Parameters
    ----------
    opened : Opened
        The run, from `reopen`.
    settings : EvaluateConfig
        What to measure beside test metrics.
    root : Path, optional
        Folder of the data files.
    progress : callable, optional
        Called as ``progress("evaluation", share)``.

    Returns
    -------
    DataFrame
        Columns data, metric, value.

    Raises
    ------
    NQMError
        If the settings do not fit the run's data.
    """
    more = counted(progress, "evaluation", float(1 + report.rows_beyond(settings)))
    more(0)
    ood = report.ood_images(opened.task, settings.ood, root)
    rows: list[dict[str, Any]] = [
        {"data": "test", "metric": name, "value": value}
        for name, value in report.test_metrics(opened.model, opened.task).items()
    ]
    more(1)
    for row in report.beyond(opened.model, opened.late, opened.task, settings, ood):
        rows.append(row)
        more(1)
    return pd.DataFrame(rows, columns=["data", "metric", "value"])


def evaluate_run(
    opened: Opened,
    settings: EvaluateConfig,
    out: str | Path | None = None,
    root: Path | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure the single model of a run and write a table, or read the table if it is complete.

    Parameters
    ----------
    opened : Opened
        The run, from `reopen`.
    settings : EvaluateConfig
        What to measure beside test metrics.
    out : str or Path, optional
        The .parquet or .csv table; it is locked while it is computed, and is written completely or
        not at all. If it holds the results of the same settings already, it is read.
    root : Path, optional
        Folder of the data files.
    progress : callable, optional
        Called as ``progress("evaluation", share)``.

    Returns
    -------
    DataFrame
        Columns data, metric, value.

    Raises
    ------
    NQMError
        If the settings do not fit the run; if `out` holds anything else, is being written by
        another process, or cannot be written.
    """
    if settings.line and opened.late is None:
        raise NQMError("--line goes from a member to the average, and this run has no members")
    if out is None:
        return measure(opened, settings, root, progress)
    key = keys.key({"run": run_key(opened.run), "asked": differing(settings)})
    config = {"run": describe(opened.run), "evaluate": asdict(settings)}
    stamp = Stamp(key, __version__, config)
    with writing(out, stamp) as missing:
        if missing:
            write_table(out, measure(opened, settings, root, progress), stamp.metadata())
        return read_table(out)


def export(folder: str | Path, out: str | Path, member: int | None = None) -> Path:
    """Write a run's single model, or one member, as safetensors.

    Other tools read the file as a plain state dict of the architecture; its metadata hold the run's
    configuration.

    Parameters
    ----------
    folder : str or Path
        Folder of a finished run.
    out : str or Path
        File to write; its name ends in .safetensors. An existing file is not overwritten.
    member : int, optional
        Number of the member, from 0; the single model by default.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    NQMError
        If the run cannot be read or has no such member, or the file exists.
    """
    folder = Path(folder)
    about: dict[str, Any] = {}

    def state() -> Mapping[str, Tensor]:
        run = open_finished(folder)
        about["run"] = describe(run)
        if member is None:
            return _single(folder, run)
        opened = reopen(folder)
        if opened.late is None:
            raise NQMError(f"the run in {folder} has no members; leave --member out")
        return opened.late.member(member).state_dict()

    return write_weights(out, state, about)


def write_weights(
    out: str | Path, state: Callable[[], Mapping[str, Any]], about: Mapping[str, Any]
) -> Path:
    """Write a state dict as safetensors.

    Parameters
    ----------
    out : str or Path
        Ends in .safetensors; an existing file is not overwritten.
    state : callable
        Makes the state dict; called once the name is found good.
    about : mapping
        Metadata of the file, values that JSON can hold; read after `state` was called.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    NQMError
        If the name ends otherwise, or the file is there already.
    """
    from safetensors.torch import save

    out = Path(out)
    if out.suffix != ".safetensors":
        raise NQMError(f"{out}: the name must end in .safetensors; got {out.suffix!r}")
    if out.exists():
        raise NQMError(f"{out} exists; move it away or choose another name")
    tensors = _independent(state())
    content = save(tensors, metadata={name: json.dumps(value) for name, value in about.items()})
    with replacing(out) as stream:
        stream.write(content)
    return out


def _single(folder: Path, run: RunConfig) -> Mapping[str, Tensor]:
    """State dict of a run's single model, compared with the model if its data are available."""
    path = folder / "model.pt"
    content = checkpoint.load(path)
    others = {name: value for name, value in content.items() if not isinstance(value, Tensor)}
    wrong = [f"{name!r} holds a {type(value).__name__}" for name, value in others.items()]
    if wrong or not content:
        raise NQMError(f"{path} is no model: {[*wrong, 'it is empty'][0]}; train the run again")
    try:
        task = open_task(run, Runtime())
    except NQMError:  # without data the number of classes, and so the model, is unknown
        return content
    load_state(plain_model(run.model, task), path)
    return content


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, as tied weights do.
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}

"""Complete runs: found below folders, and their results and histories joined into tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from neural.evaluate import classification_metrics, ensemble_log_probs
from neural.training.averages import AVERAGES
from neural.training.config import describe, run_key
from neural.training.run_folder import RunFolder, open_run
from neural.training.watch import arm_and_seed, read_plan, run_folders
from nqm.errors import NQMError
from nqm.keys import difference


@dataclass(frozen=True)
class Finished:
    """A complete run, finished or diverged.

    Attributes
    ----------
    arm : str
        Name of its arm.
    seed : int
        Its seed; runs of two arms with one seed are a pair.
    folder : RunFolder
        Its files.
    """

    arm: str
    seed: int
    folder: RunFolder


def find_runs(paths: Sequence[Path]) -> tuple[list[Finished], int]:
    """Find the complete runs at or below folders.

    An arm is the path of its runs below the folder that the given ones have in common. Runs that
    have no folder ``seedN``, as the cells of a sweep, are named by the settings in which they
    differ.

    Parameters
    ----------
    paths : sequence of Path
        Folders of runs, arms or experiments.

    Returns
    -------
    runs : list of Finished
        In the order of the recipe's arms where an experiment tells it.
    incomplete : int
        Number of runs there that are not complete.

    Raises
    ------
    NQMError
        If there is no run at or below a path, the files of one are damaged, or runs of one arm
        differ in more than their seed.
    """
    common = Path(os.path.commonpath([path.resolve() for path in paths]))
    found: dict[Path, RunFolder] = {}
    order: list[str] = []
    incomplete = 0
    for path in paths:
        folders, experiments = run_folders(path)
        begun = [folder for folder in folders if (folder / "run.json").is_file()]
        if not begun:
            raise NQMError(f"there is no run at or below {path}; give the --out of a training")
        for experiment in experiments:
            lead = experiment.resolve().relative_to(common).as_posix()
            order += [f"{lead}/{arm}".removeprefix("./") for arm in read_plan(experiment).arms]
        for folder in begun:
            run = RunFolder(folder, open_run(folder)[0], writes=False)
            if run.status is not None:
                found[folder.resolve()] = run
        incomplete += sum(folder.resolve() not in found for folder in folders)
    named: list[Finished] = []
    single: dict[Path, RunFolder] = {}
    for folder, run in found.items():
        arm, seed = arm_and_seed(folder, common)
        if seed:
            named.append(Finished(arm, int(seed), run))
        else:
            single[folder] = run
    _check_alike(named)
    named += _by_settings(single, common)
    named.sort(key=lambda one: order.index(one.arm) if one.arm in order else len(order))
    return named, incomplete


def _check_alike(runs: Sequence[Finished]) -> None:
    """Raise NQMError if runs of an arm, which are averaged over, have different settings."""
    first: dict[str, Finished] = {}
    for run in runs:
        other = first.setdefault(run.arm, run)
        one, two = (replace(r.folder.run, seed=0) for r in (other, run))
        if run_key(one) != run_key(two):
            differ = difference(describe(one), describe(two))
            raise NQMError(
                f"{other.folder.path} and {run.folder.path} are runs of one arm with different "
                f"settings ({differ}); give them in two commands"
            )


def _by_settings(runs: Mapping[Path, RunFolder], common: Path) -> list[Finished]:
    """Runs named by the settings in which they differ; by their folders if they do not."""
    settings = {path: dict(_leaves(describe(run.run))) for path, run in runs.items()}
    names = dict.fromkeys(name for own in settings.values() for name in own)
    differ = [
        name
        for name in names
        if name != "seed" and len({repr(own.get(name)) for own in settings.values()}) > 1
    ]
    made = []
    for path, run in runs.items():
        said = [f"{name}={settings[path].get(name)}" for name in differ]
        folder = path.parent if path != common else path
        arm = ", ".join(said) or folder.name
        made.append(Finished(arm, run.run.seed, run))
    return made


def _leaves(table: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{lead}{name}.")
        else:
            yield f"{lead}{name}", value


def collect(runs: Sequence[Finished]) -> pd.DataFrame:
    """Read the results of runs into one table, and add deep ensembles.

    Parameters
    ----------
    runs : sequence of Finished
        Complete runs.

    Returns
    -------
    DataFrame
        See `neural.training.experiment.run_experiment`.
    """
    frames: list[pd.DataFrame] = []
    for run in runs:
        result = run.folder.result()
        if result.empty:
            blank = {"weights": "", "member": -1, "data": "", "metric": "", "value": np.nan}
            result = pd.DataFrame([blank])
        lead = {"arm": run.arm, "seed": run.seed, "status": run.folder.status}
        frames.append(pd.DataFrame({**lead, **{n: result[n] for n in result.columns}}))
    table: pd.DataFrame = pd.concat(frames, ignore_index=True)
    ensembles = pd.DataFrame(list(_deep_ensembles(runs)))
    return pd.concat([table, ensembles], ignore_index=True)


def histories(runs: Sequence[Finished]) -> pd.DataFrame:
    """Read the evaluations during training of several runs into one table.

    Parameters
    ----------
    runs : sequence of Finished
        Complete runs.

    Returns
    -------
    DataFrame
        Columns arm, seed, and those of a run's history (see `neural.training.report.during`).
    """
    frames = []
    for run in runs:
        history = run.folder.history()
        history.insert(0, "arm", run.arm)
        history.insert(1, "seed", run.seed)
        frames.append(history)
    return pd.concat(frames, ignore_index=True)


def starts(runs: Sequence[Finished]) -> dict[str, int]:
    """T0 of every arm with late-phase members.

    Parameters
    ----------
    runs : sequence of Finished
        Runs.

    Returns
    -------
    dict of str to int
        Name of the arm -> epochs done when its members begin.
    """
    return {
        run.arm: run.folder.run.late_phase.start_epoch
        for run in runs
        if run.folder.run.late_phase is not None
    }


def _deep_ensembles(runs: Sequence[Finished]) -> Iterator[dict[str, Any]]:
    """Metrics of the mean prediction over an arm's seeds, for every single model."""
    for arm in dict.fromkeys(run.arm for run in runs):
        predictions = [
            arrays for run in runs if run.arm == arm and (arrays := run.folder.predictions())
        ]
        if len(predictions) < 2:
            continue
        labels = torch.from_numpy(predictions[0]["labels"])
        for weights in ("iterate", "averaged", "snapshot_soup", *AVERAGES):
            if weights not in predictions[0]:
                continue
            stacked = torch.stack([torch.from_numpy(arrays[weights]) for arrays in predictions])
            metrics = classification_metrics(ensemble_log_probs(stacked), labels)
            lead = {"arm": arm, "seed": -1, "status": "finished", "member": -1, "data": "test"}
            for metric, value in metrics.items():
                name = f"deep_ensemble_{weights}"
                yield {**lead, "weights": name, "metric": metric, "value": value}

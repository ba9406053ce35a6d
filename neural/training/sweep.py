"""Sweeps of training runs, by the machinery of the theory's sweeps.

A file names a recipe and the axes::

    recipe = "digits_bn"
    arm = "late_phase"
    [sweep]
    seed = [0, 1, 2]
    "late_phase.members" = [2, 5, 10]

Every cell is one run of one arm; what is no key of the file's own is an entry of the recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from neural.data import load
from neural.data.catalog import data_root
from neural.training import preflight
from neural.training.config import RunConfig, describe, restore, run_key
from neural.training.recipe import load_recipe, make_recipe, merge
from neural.training.task import Runtime, open_task
from neural.training.train import train
from nqm import keys
from nqm.errors import NQMError, suggest
from nqm.runs import toml
from nqm.runs.sweep import Work

_OWN = ("recipe", "scale", "arm", "seed")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    run: RunConfig
    runtime: Runtime = field(default_factory=Runtime)

    def check(self) -> None:
        """Raise NQMError if its data, sizes, selections or cycles do not fit (see `preflight`)."""
        run = replace(self.run, seed=0)
        asked = keys.key({"run": run_key(run), "root": str(data_root(self.runtime.root))})
        if asked not in _SOUND:
            data = _loaded(run.data.name, data_root(self.runtime.root))
            preflight.check_run(run, self.runtime, open_task(run, self.runtime, data))
            _SOUND.add(asked)


#: Keys of runs that were found sound; cells that differ by their seed are alike.
_SOUND: set[str] = set()
#: The cells of a sweep have one data set, as a rule.
_loaded = lru_cache(maxsize=1)(load)


def work(runs: Path, runtime: Runtime) -> Work:
    """How a sweep builds, names and trains its cells, where a cell is a training run.

    Parameters
    ----------
    runs : Path
        Folder that holds one folder per cell, named by its key: a killed sweep continues inside a
        cell.
    runtime : Runtime

    Returns
    -------
    Work
    """
    made = partial(build, runtime=runtime)
    return Work(made, key, partial(_train, runs=runs, runtime=runtime), _describe, _comparable)


def build(
    mapping: Mapping[str, Any], folder: str | Path = ".", runtime: Runtime | None = None
) -> Cell:
    """Build the run of one cell.

    Parameters
    ----------
    mapping : mapping
        ``recipe``, and optionally ``scale``, ``arm`` (the recipe's last by default) and ``seed``;
        other entries change the recipe's.
    folder : str or Path
        Where the path of a recipe of one's own starts from.
    runtime : Runtime, optional
        Where it will be trained.

    Returns
    -------
    Cell

    Raises
    ------
    NQMError
        If an entry is unknown, missing or out of range.
    """
    toml.require("", mapping, "recipe")
    name = toml.leaf("recipe", mapping["recipe"], str)
    path = str(Path(folder, name)) if name.endswith(".toml") else name
    made = load_recipe(path, toml.leaf("scale", mapping.get("scale", "full"), str))
    changed = copy.deepcopy(dict(made.mapping))
    changes = {name: value for name, value in mapping.items() if name not in _OWN}
    merge(changed, changes)
    arms = make_recipe(made.name, changed, made.scale).arms
    arm = toml.leaf("arm", mapping.get("arm", list(arms)[-1]), str)
    if arm not in arms:
        raise NQMError(f"arm {arm!r} is not one of recipe {made.name}{suggest(arm, arms)}")
    _check_effect(arm, changed["arm"][arm], changes)
    seed = toml.leaf("seed", mapping.get("seed", 0), int)
    return Cell(replace(arms[arm], seed=seed), runtime or Runtime())


def _check_effect(arm: str, table: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise NQMError if the arm does not use what is changed, or states it itself."""
    for name in ("late_phase", "average"):
        if name in changes and name not in table.get("use", ()):
            raise NQMError(f"{name} changes nothing: arm {arm!r} does not use it; choose another")
    left = [("", table, changes)]
    while left:
        where, own, new = left.pop()
        for name in own.keys() & new.keys():
            if isinstance(own[name], Mapping) and isinstance(new[name], Mapping):
                left.append((f"{where}{name}.", own[name], new[name]))
            else:
                raise NQMError(
                    f"{where}{name} changes nothing: arm {arm!r} states its own; "
                    f"change arm.{arm}.{where}{name}"
                )


def key(mapping: Mapping[str, Any], folder: str | Path = ".") -> str:
    """Content key of a cell: of what its run has that differs from the defaults.

    Parameters
    ----------
    mapping : mapping
        With ``recipe``, as `build` takes it; of a part without it the part itself counts.
    folder : str or Path
        As of `build`.

    Returns
    -------
    str
    """
    return run_key(build(mapping, folder).run) if "recipe" in mapping else keys.key(mapping)


def _describe(mapping: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    return describe(build(mapping, folder).run) if "recipe" in mapping else dict(mapping)


def _comparable(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a table says of its run, with what was added to the settings since."""
    try:
        return describe(restore(described))
    except NQMError:  # settings that no longer exist
        return described


def _train(cell: Cell, key: str, *, runs: Path, runtime: Runtime) -> pd.DataFrame:
    outcome = train(cell.run, runs / key[:16], runtime)
    if outcome.result.empty:
        nothing = {"weights": "", "member": -1, "data": "", "metric": "", "value": float("nan")}
        return pd.DataFrame([{"status": outcome.status, **nothing}])
    return outcome.result.assign(status=outcome.status)

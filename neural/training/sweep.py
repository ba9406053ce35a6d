"""Sweeps of training runs, with the sweeps of `nqm.runs`.

A file names a recipe and the axes::

    recipe = "digits_bn"
    arm = "late_phase"
    [sweep]
    seed = [0, 1, 2]
    "late_phase.members" = [2, 5, 10]

Every cell is one run of one arm. Keys other than ``recipe``, ``scale``, ``arm`` and ``seed`` are
entries of the recipe.
"""

from __future__ import annotations

import copy
import os
import platform
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from neural.data import Data
from neural.data.catalog import data_root
from neural.training import preflight
from neural.training.config import DataConfig, RunConfig, describe, restore, run_key
from neural.training.gpu_scale import check_device
from neural.training.recipe import OPTIONAL, load_recipe, make_recipe, merge
from neural.training.task import Runtime, load_data, open_task
from neural.training.train import train
from nqm import keys
from nqm.errors import NQMError, suggest
from nqm.files import locked
from nqm.runs import toml
from nqm.runs.sweep import Work

_OWN = ("recipe", "scale", "arm", "seed")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes
    ----------
    run : RunConfig
        Its configuration.
    runtime : Runtime
        Device and folder of data files.
    scale : str
        Scale of its recipe.
    """

    run: RunConfig
    runtime: Runtime = field(default_factory=Runtime)
    scale: str = "full"

    def check(self) -> None:
        """Check that the run can be trained (see `neural.training.preflight.check_run`).

        Raises
        ------
        NQMError
            If its data, sizes, selections or cycles do not fit.
        """
        run = replace(self.run, seed=0)
        asked = keys.key({"run": run_key(run), "root": str(data_root(self.runtime.root))})
        if asked not in _SOUND:
            data = _loaded(
                run.data.name, run.data.path, run.data.size, data_root(self.runtime.root)
            )
            preflight.check_run(run, self.runtime, open_task(run, self.runtime, data))
            _SOUND.add(asked)


#: Keys of runs that passed the check. Cells that differ by their seed only are checked once.
_SOUND: set[str] = set()


#: Of one data set, since the cells of a sweep usually share it.
@lru_cache(maxsize=1)
def _loaded(name: str, path: str | None, size: int | None, root: Path) -> Data:
    return load_data(DataConfig(name, path=path, size=size), root)


@dataclass(frozen=True)
class Remote:
    """Where a worker of a cluster trains: each has a GPU of its own machine, if there is one.

    Attributes
    ----------
    device : str, optional
        Name of the device; by default a GPU that no other worker of the machine has taken, or the
        CPU.
    root : Path, optional
        Folder of data files; by default that of the worker's NQM_DATA.
    threads, data_workers : int, optional
        See `neural.training.cli_options.make_runtime`.
    """

    device: str | None = None
    root: Path | None = None
    threads: int | None = None
    data_workers: int | None = None

    def runtime(self) -> Runtime:
        """Make the runtime, in the worker.

        Returns
        -------
        Runtime

        Raises
        ------
        NQMError
            If the device cannot be used.
        """
        from neural.training.cli_options import make_runtime

        device = self.device or _own_gpu()
        return make_runtime(
            device, self.root, self.threads, trains=True, data_workers=self.data_workers
        )


#: Locks of the GPU that this process has taken, held to its end.
_GPU: list[Any] = []
#: Torch's random state is that of the process: a worker with several threads trains one run at a
#: time.
_ONE = threading.Lock()


def _own_gpu() -> str:
    """Take a GPU that no other process of this machine has taken so; ``cpu`` if there is none."""
    count = torch.cuda.device_count()
    if not count:
        return "cpu"
    if not _GPU:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        for index in range(count):
            named = keys.key({"visible": visible, "gpu": index})
            lock = locked(Path(tempfile.gettempdir(), f"nqm-gpu-{os.getuid()}-{named[:16]}"))
            try:
                lock.__enter__()
            except NQMError:
                continue
            _GPU.extend([f"cuda:{index}", lock])
            break
        else:
            raise NQMError(
                f"all {count} GPUs of {platform.node()} are taken by other workers; start one "
                "worker for each GPU"
            )
    return str(_GPU[0])


def work(runs: Path, runtime: Runtime, remote: Remote | None = None) -> Work:
    """Functions by which a sweep builds, names and trains its cells.

    Parameters
    ----------
    runs : Path
        Folder for one folder per cell, named by the cell's key. A killed sweep continues inside a
        cell.
    runtime : Runtime
        Device and folder of data files.
    remote : Remote, optional
        Where the workers of a cluster train; by default by `runtime`.

    Returns
    -------
    Work
        Argument of `nqm.runs.sweep.Sweep.from_file`.
    """
    made = partial(build, runtime=runtime)
    solve = partial(_train, runs=runs, runtime=remote or runtime)
    return Work(made, key, solve, _describe, _comparable)


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
        Folder to which the path of a recipe file is relative.
    runtime : Runtime, optional
        Device and folder of data files; one CPU by default.

    Returns
    -------
    Cell
        The run and its runtime.

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
    arm = toml.leaf("arm", mapping.get("arm", list(changed["arm"])[-1]), str)
    recipe = make_recipe(made.name, changed, made.scale, needed=(arm,))
    arms = recipe.arms
    if arm not in arms:
        raise NQMError(f"arm {arm!r} is not one of recipe {made.name}{suggest(arm, arms)}")
    _check_effect(arm, changed["arm"][arm.partition("/")[0]], changes)
    seed = toml.leaf("seed", mapping.get("seed", 0), int)
    run = replace(arms[arm], seed=recipe.run_seed(arm, seed))
    return Cell(run, runtime or Runtime(), made.scale)


def _check_effect(arm: str, table: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise NQMError if the arm does not use what is changed, or states it itself."""
    for name in OPTIONAL:
        if name in changes and name not in table.get("use", ()):
            raise NQMError(f"{name} changes nothing: arm {arm!r} does not use it; choose another")
    pending = [("", table, changes)]
    while pending:
        where, own, new = pending.pop()
        for name in own.keys() & new.keys():
            if isinstance(own[name], Mapping) and isinstance(new[name], Mapping):
                pending.append((f"{where}{name}.", own[name], new[name]))
            else:
                raise NQMError(
                    f"{where}{name} changes nothing: arm {arm!r} has its own; "
                    f"change arm.{arm}.{where}{name}"
                )


def key(mapping: Mapping[str, Any], folder: str | Path = ".") -> str:
    """Content key of a cell, made of the entries of its run that differ from the defaults.

    Parameters
    ----------
    mapping : mapping
        See `build`; the key of a mapping without ``recipe`` is that of the mapping itself.
    folder : str or Path
        See `build`.

    Returns
    -------
    str
        Hexadecimal digits.
    """
    return run_key(build(mapping, folder).run) if "recipe" in mapping else keys.key(mapping)


def _describe(mapping: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    return describe(build(mapping, folder).run) if "recipe" in mapping else dict(mapping)


def _comparable(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete the settings that a table was written with by entries that were added since."""
    try:
        return describe(restore(described))
    except NQMError:  # settings that no longer exist
        return described


def _train(cell: Cell, key: str, *, runs: Path, runtime: Runtime | Remote) -> pd.DataFrame:
    with _ONE:
        here = runtime.runtime() if isinstance(runtime, Remote) else runtime
        check_device(cell.scale, here.device)
        outcome = train(cell.run, runs / key[:16], here)
    if outcome.result.empty:
        blank = {"weights": "", "member": -1, "data": "", "metric": "", "value": float("nan")}
        return pd.DataFrame([{"status": outcome.status, **blank}])
    return outcome.result.assign(status=outcome.status)

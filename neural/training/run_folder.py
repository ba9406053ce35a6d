"""The folder of one run: configuration, checkpoint and results.

::

    run.json           configuration, its key, versions, hardware, status
    checkpoint.pt      state from which training continues; deleted at the end
    progress.json      how far training is, written every second; deleted at the end
    epoch120.pt        checkpoint for runs with the same beginning
    history.parquet    one row per evaluation during training
    result.parquet     one row per metric at the end
    model.pt           the single model, a plain state dict
    late.pt            base and all members, if there are any
    predictions.npz    log-probabilities on the test set, and its labels
    members/           snapshots, if there are any, and members.json, the list of them
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.training import checkpoint
from neural.training.config import RunConfig, describe, restore, run_key
from neural.training.report import Report
from neural.training.run_progress import FILE, RunProgress, write_progress
from neural.training.snapshots import FOLDER, LIST, file_name, kept_list
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.files import check_regular, is_lock, is_temporary, locked, replacing, tidy_lock
from nqm.keys import difference
from nqm.table import read_table, write_table

#: Status of a run -> its tables.
TABLES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "finished": ("history", "result"),
    "diverged": ("history",),
}
#: Columns that a table must have.
_COLUMNS = {
    "history": {"epoch"},
    "result": {"weights", "member", "data", "metric", "value"},
}
#: Files that a complete run does not have.
PASSING = ("checkpoint.pt", FILE)


class RunFolder:
    """One run on disk.

    Parameters
    ----------
    path : Path
        The folder; `begun` creates it if it is missing.
    run : RunConfig
        Configuration of the run that the folder holds, or will hold.
    writes : bool
        False to change nothing on disk, as in all but the first of several processes.
    world : int
        Number of processes that train the run.
    background : bool
        True to write ``checkpoint.pt`` while training goes on. Its tensors are then copied first,
        which takes memory of the host.

    Attributes
    ----------
    key : str
        Content key of the run (see `nqm.keys`).
    stated : dict
        Content of ``run.json``.

    Raises
    ------
    NQMError
        If the folder holds another run, or anything else, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        run: RunConfig,
        *,
        writes: bool = True,
        world: int = 1,
        background: bool = False,
    ):
        self.path, self.run, self.writes, self.world = path, run, writes, world
        self._writer = checkpoint.BackgroundWriter() if background else None
        mapping = describe(run)
        self.key = run_key(run)
        stated = read_json(path)
        if stated is not None:
            _check_same(path, stated, run)
        self.stated: dict[str, Any] = stated or {
            "key": self.key,
            "status": None,
            "config": mapping,
            "digest": keys.key(mapping),
            "versions": versions(),
        }
        if any(not (path / f"{name}.parquet").exists() for name in TABLES[self.status]):
            self.stated["status"] = None  # a table was deleted: compute it again
        if self.status is not None and writes:
            self._tidy()
            tidy_lock(path, folder=True)

    @property
    def status(self) -> str | None:
        """``finished``, ``diverged``, or None if training or evaluation is not complete."""
        value: str | None = self.stated["status"]
        return value

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Lock the folder for the block, and write ``run.json`` at its beginning.

        Yields
        ------
        None

        Raises
        ------
        NQMError
            If another process trains this run, or has just finished it.
        """
        if not self.writes:
            yield
            return
        with locked(self.path, folder=True):
            if RunFolder(self.path, self.run).status is not None:
                raise NQMError(f"{self.path} was finished just now by another process; run again")
            self.stated["world"] = self.world
            self._write_json()
            self._tidy()
            try:
                yield
            finally:
                self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises
        ------
        NQMError
            If it could not be written.
        """
        if self._writer is not None:
            self._writer.wait()

    def _tidy(self) -> None:
        """Remove temporary files of a killed process, and what a complete run needs no more."""
        for path in self.path.iterdir() if self.writes else ():
            over = path.name in PASSING and self.status is not None
            if is_temporary(path) or over:
                path.unlink(missing_ok=True)

    def checkpoint(self, start: Path | None) -> dict[str, Any] | None:
        """Read the checkpoint from which training continues.

        Its tensors are on the CPU. On a GPU they would need the memory a second time, and so would
        counts of steps, which Adam reads: it would then wait for the GPU once for every weight.

        Parameters
        ----------
        start : Path, optional
            Checkpoint of another run, used if this run has none of its own.

        Returns
        -------
        dict or None
            A state for `TrainState.load_state_dict`; None if training starts from the beginning.

        Raises
        ------
        NQMError
            If the file is damaged.
        """
        file = self._first_checkpoint(start)
        return None if file is None else checkpoint.load(file)

    def _first_checkpoint(self, start: Path | None) -> Path | None:
        own = self.path / "checkpoint.pt"
        return own if own.exists() else start

    def check_world(self, start: Path | None) -> None:
        """Check that the checkpoint is that of as many processes as now.

        Each process normalises its own part of a minibatch, so that another number of processes
        trains another model with BatchNorm.

        Parameters
        ----------
        start : Path, optional
            See `checkpoint`.

        Raises
        ------
        NQMError
            If it was written by another number of processes.
        """
        file = self._first_checkpoint(start)
        stated = None if file is None else read_json(file.parent)
        before = self.world if stated is None else stated.get("world", self.world)
        if before != self.world:
            how = "without torchrun" if before == 1 else f"by torchrun --nproc-per-node {before}"
            many = "process" if before == 1 else "processes"
            raise NQMError(
                f"{file} was written by {before} {many}, and now there are {self.world}; go on "
                f"{how}, or delete it"
            )

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint.

        Parameters
        ----------
        state : mapping
            State of the run, from `TrainState.state_dict`.
        """
        if not self.writes:
            return
        write = checkpoint.save if self._writer is None else self._writer.save
        write(self.path / "checkpoint.pt", state)

    def keep(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint for other runs, and replace that of this run.

        Parameters
        ----------
        epoch : int
            Number of epochs done.
        state : mapping
            See `save`.
        """
        if self.writes:
            checkpoint.save(self.path / f"epoch{epoch}.pt", state)
            self.save(state)

    def write_snapshot(self, member: int, state: Mapping[str, Tensor]) -> None:
        """Write one snapshot.

        Parameters
        ----------
        member : int
            0 to M - 1.
        state : mapping of str to Tensor
            Plain state dict, on the CPU.
        """
        if not self.writes:
            return
        from safetensors.torch import save

        (self.path / FOLDER).mkdir(exist_ok=True)
        with replacing(self.path / FOLDER / file_name(member)) as stream:
            stream.write(save(dict(state)))

    def snapshots(self) -> list[Callable[[], dict[str, Tensor]]]:
        """Readers of the run's snapshots, in order.

        Returns
        -------
        list of callable
            Each returns a state dict. Empty of a run without snapshots, and for processes that
            write nothing.
        """
        kept = self.run.snapshots
        if kept is None or not self.writes:
            return []
        files = [self.path / FOLDER / file_name(k) for k in range(kept.members)]
        return [partial(checkpoint.load_foreign, file) for file in files]

    def check_snapshots(self, taken: int) -> None:
        """Check that snapshots which a checkpoint counts are there.

        Parameters
        ----------
        taken : int
            How many were taken.

        Raises
        ------
        NQMError
            If one is missing.
        """
        for k in range(taken if self.writes else 0):
            if not (file := self.path / FOLDER / file_name(k)).is_file():
                raise NQMError(f"{file} is missing; delete {self.path} and run again")

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the table of evaluations.

        Parameters
        ----------
        rows : sequence of mapping
            One for each evaluation during training.
        """
        if self.writes:
            self._write_table("history", pd.DataFrame(rows))

    def history(self) -> pd.DataFrame:
        """Read the table of evaluations during training.

        Returns
        -------
        DataFrame
            One row for each evaluation; empty if there is no table.
        """
        return self._read_table("history")

    def result(self) -> pd.DataFrame:
        """Read the table of metrics at the end.

        Returns
        -------
        DataFrame
            One row for each metric; empty if the run diverged.
        """
        return self._read_table("result")

    def predictions(self) -> dict[str, NDArray[Any]]:
        """Read the log-probabilities of each single model on the test set, and the labels.

        Returns
        -------
        dict of str to ndarray
            Name of the model -> array of shape (N, C); ``labels`` -> shape (N,). Empty if the run
            wrote none, as for text.

        Raises
        ------
        NQMError
            If the file is damaged.
        """
        path = self.path / "predictions.npz"
        if not path.exists():
            return {}
        check_regular(path)
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays = dict(content)
            rows = len(arrays["labels"])
            for name, array in arrays.items():
                if array.ndim != 1 + (name != "labels") or len(array) != rows:
                    raise ValueError("its shapes do not fit")
        except Exception as error:  # a damaged file may raise errors of many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NQMError(
                f"{path} holds no predictions ({reason:.80}); delete {self.path} and run again"
            ) from None
        return arrays

    def finish(self, status: str, report: Report | None) -> None:
        """Write the result and the final status, and delete the checkpoint.

        Parameters
        ----------
        status : {"finished", "diverged"}
            The final status.
        report : Report, optional
            The result; None for a run that diverged.
        """
        if not self.writes:
            return
        self.wait()
        if report is not None:
            self._write_table("result", report.table)
            checkpoint.save(self.path / "model.pt", report.model)
            if report.late is not None:
                checkpoint.save(self.path / "late.pt", report.late)
            if report.predictions:
                with replacing(self.path / "predictions.npz") as stream:
                    arrays: dict[str, Any] = dict(report.predictions)
                    np.savez_compressed(stream, **arrays)
            if self.run.snapshots is not None:
                with replacing(self.path / FOLDER / LIST) as stream:
                    stream.write(kept_list(self.run.snapshots.entries()))
        self.stated["status"] = status
        self._write_json()
        for name in PASSING:
            (self.path / name).unlink(missing_ok=True)

    def write_progress(self, progress: RunProgress) -> None:
        """Replace ``progress.json``.

        Parameters
        ----------
        progress : RunProgress
            How far the run is.
        """
        if self.writes:
            with suppress(NQMError):  # it is only looked at
                write_progress(self.path, progress)

    def _write_table(self, name: str, table: pd.DataFrame) -> None:
        metadata = {"key": self.key, "version": __version__}
        write_table(self.path / f"{name}.parquet", table, metadata)

    def _read_table(self, name: str) -> pd.DataFrame:
        path = self.path / f"{name}.parquet"
        if not path.exists():
            return pd.DataFrame()
        table = read_table(path)
        missing = sorted(_COLUMNS[name] - set(table.columns))
        if missing and len(table):  # a run that diverged at once has a table without rows
            raise NQMError(f"{path} has no column {missing[0]}; delete it and run again")
        return table

    def _write_json(self) -> None:
        if not self.writes:
            return
        with replacing(self.path / "run.json") as stream:
            stream.write(json.dumps(self.stated, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read ``run.json`` of a run's folder.

    Parameters
    ----------
    path : Path
        The folder.

    Returns
    -------
    dict or None
        Content of the file; None if the folder is empty or missing.

    Raises
    ------
    NQMError
        If the folder holds something else, or the file is damaged.
    """
    file = path / "run.json"
    if file.exists():
        check_regular(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _check_stated(content)
        return dict(content)
    except FileNotFoundError:
        # Locks and temporary files may be those of a run that is just beginning, or was killed.
        if path.is_dir() and any(not (is_temporary(p) or is_lock(p)) for p in path.iterdir()):
            raise NQMError(f"{_no_run(path)}; nothing was overwritten") from None
        return None
    except NotADirectoryError:
        raise NQMError(f"{path} is a file, not the folder of a run; choose another") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(f"{file} cannot be read ({reason:.80}); delete the folder") from None


def check_no_run(out: Path) -> None:
    """Check that a folder for results does not belong to a single run.

    Parameters
    ----------
    out : Path
        Folder for results.

    Raises
    ------
    NQMError
        If the folder holds the files of a run.
    """
    if (out / "run.json").is_file():
        raise NQMError(f"{out} is the folder of a run and takes no other results; choose another")


def _check_stated(content: Any) -> None:
    """Raise ValueError unless the content of a ``run.json`` has its entries and their types."""
    kinds = {"key": str, "config": dict, "versions": dict, "status": str | None}
    if not isinstance(content, dict):
        raise ValueError("not a table")
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"it has no {name}")
        if not isinstance(content[name], kind):
            raise ValueError(f"its {name} is {content[name]!r:.40}")
    if not isinstance(world := content.get("world", 1), int) or world < 1:
        raise ValueError(f"its world is {world!r:.40}")
    if content["status"] not in TABLES:
        raise ValueError(f"its status is {content['status']!r:.40}")


def _check_same(path: Path, stated: Mapping[str, Any], run: RunConfig) -> None:
    """Raise NQMError if a folder holds another run than the one asked for.

    The configurations are compared, not their keys: ``run.json`` has every entry written out, so
    that it can be completed with the defaults of this version.
    """
    before: Mapping[str, Any] = stated["config"]
    try:
        old = restore(before)
    except NQMError:  # settings that no longer exist
        same = False
    else:
        before, same = describe(old), run_key(old) == run_key(run)
    if not same:
        differ = difference(before, describe(run)) or "another configuration"
        raise NQMError(
            f"{path} was trained with {differ}; use --out OTHER; nothing was overwritten"
        )
    _check_untouched(path, stated)


def _check_untouched(path: Path, stated: Mapping[str, Any]) -> None:
    """Raise NQMError unless the configuration is the one that the run was trained with."""
    # In older versions there was no digest, and the key was that of the whole configuration.
    if keys.key(stated["config"]) != stated.get("digest", stated["key"]):
        raise NQMError(
            f"{path / 'run.json'} was changed after training, so that its configuration may not be "
            "that of the run; train it again"
        )


def open_run(path: str | Path) -> tuple[RunConfig, dict[str, Any]]:
    """Read the configuration of a run on disk, finished or not.

    Parameters
    ----------
    path : str or Path
        The run's folder.

    Returns
    -------
    run : RunConfig
        Its configuration.
    stated : dict
        Content of its ``run.json``.

    Raises
    ------
    NQMError
        If there is no run, or its ``run.json`` is damaged or was changed.
    """
    folder = Path(path)
    stated = read_json(folder) if (folder / "run.json").exists() else None
    if stated is None:
        raise NQMError(_no_run(folder))
    try:
        run = restore(stated["config"])
    except (NQMError, TypeError, RecursionError) as error:
        file = folder / "run.json"
        raise NQMError(f"{file} is damaged: {error!s:.150}; train the run again") from None
    _check_untouched(folder, stated)
    return run, stated


def _no_run(folder: Path) -> str:
    """Message that a folder is not that of a run, with the folder to use instead if known."""
    for depth, kind in (("*", "an arm"), ("*/*", "an experiment"), ("*/*/*", "an experiment")):
        runs = sorted(path.parent for path in folder.glob(f"{depth}/run.json"))
        if runs:
            return f"{folder} is {kind}; give one of its runs: {runs[0]}"
    why = "it holds no run.json" if folder.exists() else "there is no such folder"
    return f"{folder} is not the folder of a run: {why}"


def versions() -> dict[str, str]:
    """Versions of the software, and the hardware.

    Returns
    -------
    dict of str to str
        Keys late-phase-nqm, torch, python, hardware and threads.
    """
    cuda = torch.cuda.is_available()
    return {
        "late-phase-nqm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "threads": str(torch.get_num_threads()),
    }

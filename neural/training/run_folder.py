"""The folder of one run: what it was, where it stands, what came out.

::

    run.json           configuration, its key, versions, hardware
    checkpoint.pt      where training goes on; gone when it is finished
    epoch120.pt        kept for runs with the same beginning
    history.parquet    one row per evaluation during training
    result.parquet     one row per metric at the end
    model.pt           the single model, a plain state dict
    late.pt            base and all members, if there are any
    predictions.npz    log-probabilities on the test set, and its labels
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from neural.training import checkpoint
from neural.training.config import RunConfig, describe, restore, run_key
from neural.training.report import Report
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.files import check_regular, is_lock, is_temporary, locked, replacing, tidy_lock
from nqm.keys import difference
from nqm.table import read_table, write_table

#: Status -> the tables there are.
TABLES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "finished": ("history", "result"),
    "diverged": ("history",),
}
#: Columns that its tables have at least.
_COLUMNS = {
    "history": {"epoch"},
    "result": {"weights", "member", "data", "metric", "value"},
}


class RunFolder:
    """One run on disk.

    Parameters
    ----------
    path : Path
        The folder; `begun` makes it where it is missing.
    run : RunConfig
        The run that the folder holds, or will hold.
    writes : bool
        False for all but the first of several processes.

    Attributes
    ----------
    key : str
        Content key of the run (see `nqm.keys`).
    stated : dict
        What ``run.json`` says, or will say.

    Raises
    ------
    NQMError
        If the folder holds another run, or anything else, or cannot be written.
    """

    def __init__(self, path: Path, run: RunConfig, *, writes: bool = True):
        self.path, self.run, self.writes = path, run, writes
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
            self.stated["status"] = None  # deleted, to be computed again
        if self.status is not None and writes:
            self._tidy()
            tidy_lock(path, folder=True)

    @property
    def status(self) -> str | None:
        """``finished``, ``diverged``, or None while there is something left to do."""
        value: str | None = self.stated["status"]
        return value

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Write down what is about to be trained; no other process writes to the folder meanwhile.

        Yields
        ------
        None

        Raises
        ------
        NQMError
            If another process trains this run, or has done so just now.
        """
        if not self.writes:
            yield
            return
        with locked(self.path, folder=True):
            if RunFolder(self.path, self.run).status is not None:
                raise NQMError(f"{self.path} was finished just now by another process; run again")
            self._write_json()
            self._tidy()
            yield

    def _tidy(self) -> None:
        """Remove what a process left that was killed while it wrote, or at the very end."""
        for left in self.path.iterdir() if self.writes else ():
            if is_temporary(left) or (left.name == "checkpoint.pt" and self.status is not None):
                left.unlink(missing_ok=True)

    def checkpoint(self, device: torch.device, start: Path | None) -> dict[str, Any] | None:
        """Read the checkpoint that training goes on from.

        Parameters
        ----------
        device : torch.device
        start : Path, optional
            Checkpoint of another run, taken if this one has none of its own.

        Returns
        -------
        dict or None
            None if training begins anew.

        Raises
        ------
        NQMError
            If the file is damaged.
        """
        own = self.path / "checkpoint.pt"
        if own.exists():
            return checkpoint.load(own, device)
        return None if start is None else checkpoint.load(start, device)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint.

        Parameters
        ----------
        state : mapping
            As `neural.training.checkpoint.save` takes it.
        """
        if self.writes:
            checkpoint.save(self.path / "checkpoint.pt", state)

    def keep(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Keep a checkpoint for other runs; this run goes on from it as well.

        Parameters
        ----------
        epoch : int
            Epochs done.
        state : mapping
            As of `save`.
        """
        if self.writes:
            checkpoint.save(self.path / f"epoch{epoch}.pt", state)
            self.save(state)

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
            Empty if there is none.
        """
        return self._read_table("history")

    def result(self) -> pd.DataFrame:
        """Read the table of metrics at the end.

        Returns
        -------
        DataFrame
            Empty if the run diverged.
        """
        return self._read_table("result")

    def predictions(self) -> dict[str, NDArray[Any]]:
        """Log-probabilities of each single model on the test set, and the labels.

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
                kept = dict(content)
            rows = len(kept["labels"])
            if any(one.ndim != 1 + (name != "labels") or len(one) != rows
                   for name, one in kept.items()):  # fmt: skip
                raise ValueError("its shapes do not fit")
        except Exception as error:  # a damaged file makes a reader stumble in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NQMError(
                f"{path} holds no predictions ({reason:.80}); delete {self.path} and run again"
            ) from None
        return kept

    def finish(self, status: str, report: Report | None) -> None:
        """Write the result, and that nothing is left to do.

        Parameters
        ----------
        status : {"finished", "diverged"}
        report : Report, optional
            None of a run that diverged.
        """
        if not self.writes:
            return
        if report is not None:
            self._write_table("result", report.table)
            checkpoint.save(self.path / "model.pt", report.model)
            if report.late is not None:
                checkpoint.save(self.path / "late.pt", report.late)
            if report.predictions:
                with replacing(self.path / "predictions.npz") as stream:
                    arrays: dict[str, Any] = dict(report.predictions)
                    np.savez_compressed(stream, **arrays)
        self.stated["status"] = status
        self._write_json()
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def _write_table(self, name: str, table: pd.DataFrame) -> None:
        metadata = {"key": self.key, "version": __version__}
        write_table(self.path / f"{name}.parquet", table, metadata)

    def _read_table(self, name: str) -> pd.DataFrame:
        path = self.path / f"{name}.parquet"
        if not path.exists():
            return pd.DataFrame()
        table = read_table(path)
        missing = sorted(_COLUMNS[name] - set(table.columns))
        if missing and len(table):  # of a run that diverged at once there is no row
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
        None if the folder is empty or missing.

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
        # A file that is being written, or was when the process was killed, is no one's.
        if path.is_dir() and any(not (is_temporary(one) or is_lock(one)) for one in path.iterdir()):
            raise NQMError(f"{_no_run(path)}; nothing was overwritten") from None
        return None
    except NotADirectoryError:
        raise NQMError(f"{path} is a file, not the folder of a run; choose another") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(f"{file} cannot be read ({reason:.80}); delete the folder") from None


def check_no_run(out: Path) -> None:
    """Refuse a folder that belongs to a single run as the folder of other results.

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
    """Raise ValueError unless a ``run.json`` says what one says."""
    kinds = {"key": str, "config": dict, "versions": dict, "status": str | None}
    if not isinstance(content, dict):
        raise ValueError("not a table")
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"it has no {name}")
        if not isinstance(content[name], kind):
            raise ValueError(f"its {name} is {content[name]!r:.40}")
    if content["status"] not in TABLES:
        raise ValueError(f"its status is {content['status']!r:.40}")


def _check_same(path: Path, stated: Mapping[str, Any], run: RunConfig) -> None:
    """Raise NQMError if a folder holds another run than the one asked for.

    The configurations are compared, not their keys: ``run.json`` states all that there was to
    state, so that it can be held against this version's own defaults.
    """
    before: Mapping[str, Any] = stated["config"]
    try:
        held = restore(before)
    except NQMError:  # settings that no longer exist
        same = False
    else:
        before, same = describe(held), run_key(held) == run_key(run)
    if not same:
        differ = difference(before, describe(run)) or "another configuration"
        raise NQMError(
            f"{path} was trained with {differ}; use --out OTHER; nothing was overwritten"
        )
    _check_untouched(path, stated)


def _check_untouched(path: Path, stated: Mapping[str, Any]) -> None:
    """Raise NQMError unless the configuration is the one that the run was trained with."""
    # Before there was a digest, the key was that of the whole configuration.
    if keys.key(stated["config"]) != stated.get("digest", stated["key"]):
        raise NQMError(
            f"{path / 'run.json'} was changed after training: its configuration is not the one it "
            "was written with; train it again"
        )


def open_run(path: str | Path) -> tuple[RunConfig, dict[str, Any]]:
    """Configuration of a run on disk, whether it is finished or not.

    Parameters
    ----------
    path : str or Path
        The run's folder.

    Returns
    -------
    run : RunConfig
    stated : dict
        All that its ``run.json`` says.

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
    """Why a folder is not that of a run, and which to give instead."""
    for depth, kind in (("*", "an arm"), ("*/*", "an experiment")):
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
    """
    cuda = torch.cuda.is_available()
    return {
        "late-phase-nqm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "threads": str(torch.get_num_threads()),
    }

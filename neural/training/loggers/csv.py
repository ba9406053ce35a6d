"""``--log csv``: one file in the run's folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from contextlib import suppress

from neural.training.loggers.base import NUMBERS, LoggedRun

#: Columns of the file.
COLUMNS = ("step", *NUMBERS)


class CsvLogger:
    """Append the numbers of one run to its file ``log.csv``.

    Numbers of one step are in one row or in several; a cell without a number is empty.

    Parameters
    ----------
    run : LoggedRun
        The run. Rows of an earlier process beyond ``run.step`` are removed.
    """

    def __init__(self, run: LoggedRun):
        path = run.folder / "log.csv"
        kept = []
        with suppress(FileNotFoundError), open(path, encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                # A killed process may leave half a row, the last.
                if row.get(COLUMNS[-1]) is not None and _step(row) <= run.step:
                    kept.append({name: row.get(name, "") for name in COLUMNS})
        self._stream = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115  see close
        self._rows = csv.DictWriter(self._stream, COLUMNS, restval="")
        self._rows.writeheader()
        self._rows.writerows(kept)
        self._stream.flush()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append a row.

        Parameters
        ----------
        step : int
            Minibatches used so far.
        numbers : mapping of str to float
            By name, see `NUMBERS`.
        """
        self._rows.writerow({"step": step, **numbers})
        self._stream.flush()

    def close(self, status: str) -> None:
        """Close the file.

        Parameters
        ----------
        status : str
            ``finished``, ``diverged`` or ``killed``.
        """
        self._stream.close()


def _step(row: Mapping[str, str]) -> float:
    try:
        return int(row["step"])
    except (KeyError, ValueError):
        return float("inf")

"""Finished cells of a sweep on disk, one line each, so that a killed sweep goes on.

The results themselves stay on disk: in memory there is where each one's line begins, eight bytes a
cell, and what the columns hold.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from nqm import __version__
from nqm.errors import NQMError
from nqm.table import check_stamp

#: A result of one cell: its table's columns as lists.
Result = dict[str, list[Any]]
#: Seconds between two forced writes to the disk.
SYNC = 0.2


class Columns:
    """Names of the results' columns, the types of value in each, and the rows so far."""

    def __init__(self) -> None:
        self.kinds: dict[str, set[type]] = {}
        self.rows = 0

    def see(self, result: Result) -> None:
        """Take one more result into account."""
        for name, values in result.items():
            self.kinds.setdefault(name, set()).update(map(type, values))
        self.rows += len(result["case"])

    def dtypes(self) -> dict[str, str]:
        """One type for each column, as pandas names it."""
        return {name: _dtype(kinds) for name, kinds in self.kinds.items()}


def _dtype(kinds: set[type]) -> str:
    for dtype, known in (("bool", {bool}), ("int64", {int}), ("float64", {int, float})):
        if kinds <= known:
            return dtype
    return "str"


class Journal:
    """Results by cell: ``journal[index]``; a context manager that holds the file.

    A line that was being written when the process died has no end and is dropped; floats, NaN and
    infinities come back exactly.

    Parameters
    ----------
    path : Path
        After the first line, which says of which sweep, one line of JSON per cell.
    key : str
        Content key of the sweep.
    cells : int
        Of the whole sweep.
    """

    def __init__(self, path: Path, key: str, cells: int):
        self.path = path
        self.header = {"key": key, "version": __version__}
        self.columns = Columns()
        self._begins = np.full(cells, -1, dtype=np.int64)
        self._known = 0
        self._synced = 0.0

    def __len__(self) -> int:
        return self._known

    def __contains__(self, index: int) -> bool:
        return bool(self._begins[index] >= 0)

    def __getitem__(self, index: int) -> Result:
        self._stream.seek(self._begins[index])
        result: Result = json.loads(self._stream.readline())[1]
        return result

    def __enter__(self) -> Self:
        first = (json.dumps(self.header) + "\n").encode()
        try:
            self._stream = open(self.path, "a+b")
        except OSError as error:
            raise NQMError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            whole = self._read(first)
            self._stream.truncate(whole)
            if not whole:
                self._stream.write(first)
                self._flush()
        except BaseException as error:
            self._stream.close()
            if isinstance(error, OSError):
                raise NQMError(f"cannot write {self.path}: {error.strerror}") from None
            raise
        return self

    def _read(self, first: bytes) -> int:
        """Note every cell's place; returns the bytes of all whole lines."""
        self._stream.seek(0)
        header = self._stream.readline()
        if not header.endswith(b"\n"):
            if header and not first.startswith(header):
                check_stamp(self.path, {}, self.header["key"], __version__)
            return 0
        check_stamp(self.path, self._parsed(header, dict), self.header["key"], __version__)
        place = len(header)
        while (line := self._stream.readline()).endswith(b"\n"):
            index, result = self._parsed(line, list)
            self._note(index, result, place)
            place += len(line)
        return place

    def _parsed(self, line: bytes, kind: type) -> Any:
        try:
            content = json.loads(line)
        except ValueError:
            raise NQMError(f"{self.path} is damaged; delete it to compute all cells anew") from None
        return content if isinstance(content, kind) else kind()

    def _note(self, index: int, result: Result, place: int) -> None:
        self._known += self._begins[index] < 0
        self._begins[index] = place
        self.columns.see(result)

    def add(self, index: int, result: Result) -> None:
        """Keep a cell: handed to the system at once, forced to the disk every now and then."""
        place = self._stream.seek(0, os.SEEK_END)
        self._stream.write((json.dumps([index, result]) + "\n").encode())
        self._stream.flush()
        self._note(index, result, place)
        # A killed process loses nothing that was flushed; only a power cut could.
        if time.monotonic() - self._synced > SYNC:
            self._flush()

    def _flush(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flush()
        self._stream.close()


class Memory(dict[int, Result]):
    """A journal of a sweep that writes no file."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = Columns()

    def add(self, index: int, result: Result) -> None:
        """Keep a cell."""
        self[index] = result
        self.columns.see(result)


Known = Journal | Memory

"""Finished cells of a sweep on disk, one line each, so that a killed sweep can continue.

Results stay on disk: memory holds the position and the checksum of each line, twelve bytes per
cell, and the types of the columns.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from nqm.errors import NQMError, shown
from nqm.files import check_regular, locked, sync_folder
from nqm.table import COLUMNS, Stamp

#: A result of one cell: its table's columns as lists.
Result = dict[str, list[Any]]
#: Seconds between two forced writes to the disk.
SYNC = 0.2
#: Types of values in a table.
_VALUES = {bool, int, float, str, type(None)}
#: Types of values in a known column, by the pandas name of its type.
_KINDS: dict[str, set[type]] = {
    "bool": {bool},
    "int64": {int},
    "float64": {float, int, type(None)},
    "str": {str, type(None)},
}


class Columns:
    """Names of the results' columns, the types of values in each, and the number of rows."""

    def __init__(self) -> None:
        self.kinds: dict[str, set[type]] = {}
        self.rows = 0

    def see(self, result: Result) -> None:
        """Add the columns and rows of one more result.

        Parameters
        ----------
        result : dict of str to list
            Columns of the table of one cell.

        Raises
        ------
        NQMError
            If its columns differ from those of earlier results.
        """
        if self.kinds and self.kinds.keys() != result.keys():
            odd = ", ".join(sorted(self.kinds.keys() ^ result.keys()))
            raise NQMError(f"not every cell has the columns {odd}; sweep them one by one")
        for name, values in result.items():
            self.kinds.setdefault(name, set()).update(map(type, values))
        self.rows += len(result["case"])

    def dtypes(self) -> dict[str, str]:
        """Find one type for each column.

        Returns
        -------
        dict of str to str
            Type by column, as pandas names it: bool, int64, float64 or str.
        """
        return {name: _dtype(kinds) for name, kinds in self.kinds.items()}


def _dtype(kinds: set[type]) -> str:
    for dtype, known in (("bool", {bool}), ("int64", {int}), ("float64", {int, float})):
        if kinds <= known:
            return dtype
    return "str"


class Journal:
    """Results by cell, ``journal[index]``; a context manager that locks the file.

    A line that was not complete when the process died is dropped. Floats, NaN and infinities are
    kept exactly. Only one process at a time can have the file open.

    Parameters
    ----------
    path : Path
        File whose first line identifies the sweep, followed by one line of JSON per cell.
    stamp : Stamp
        Identity of the sweep.
    cells : int
        Number of cells of the whole sweep.

    Raises
    ------
    NQMError
        On entering, if the file belongs to another sweep or is damaged, if another process has it
        open, or if it cannot be written.
    """

    def __init__(self, path: Path, stamp: Stamp, cells: int):
        self.path, self.stamp = path, stamp
        self.columns = Columns()
        self._begins = np.full(cells, -1, dtype=np.int64)
        self._sums = np.zeros(cells, dtype=np.uint32)
        self._known = 0
        self._synced = 0.0

    def __len__(self) -> int:
        return self._known

    def __contains__(self, index: int) -> bool:
        return bool(self._begins[index] >= 0)

    def __getitem__(self, index: int) -> Result:
        place = int(self._begins[index])
        self._stream.seek(place)
        line = self._stream.readline()
        if zlib.crc32(line) == self._sums[index]:
            return json.loads(line)[1]  # type: ignore[no-any-return]
        found, _ = self._cell(line, place)
        why = "it has changed" if found == index else f"it should hold cell {index}, not {found}"
        raise self._damaged(place, why)

    def __enter__(self) -> Self:
        first = (json.dumps(self.stamp.metadata()) + "\n").encode()
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            try:
                if self.path.exists():
                    check_regular(self.path)
                self._stream = stack.enter_context(open(self.path, "a+b"))
                whole = self._read(first)
                self._stream.truncate(whole)
                if not whole:
                    self._stream.write(first)
                    self._flush()
                    sync_folder(self.path.parent)
            except OSError as error:
                raise NQMError(f"cannot write {self.path}: {error.strerror}") from None
            self._open = stack.pop_all()
        return self

    def _read(self, first: bytes) -> int:
        """Store the position of every cell; return the number of bytes of all complete lines."""
        self._stream.seek(0)
        header = self._stream.readline()
        if not header.endswith(b"\n"):
            if header and not first.startswith(header):
                self.stamp.check(self.path, {})
            return 0
        try:
            stated = json.loads(header)
        except (ValueError, RecursionError):
            stated = None
        self.stamp.check(self.path, stated if isinstance(stated, dict) else {})
        place = len(header)
        while (line := self._stream.readline()).endswith(b"\n"):
            index, result = self._cell(line, place)
            if index in self:
                raise self._damaged(place, f"cell {index} is there twice")
            try:
                self._note(index, result, place, line)
            except NQMError as error:
                raise self._damaged(place, str(error)) from None
            place += len(line)
        return place

    def _cell(self, line: bytes, place: int) -> tuple[int, Result]:
        """Index and result of a line; NQMError if `add` has not written it like this."""
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            raise self._damaged(place, "it is not JSON") from None
        why = _fault(content, len(self._begins))
        if why:
            raise self._damaged(place, why)
        index, result = content
        return index, result

    def _damaged(self, place: int, why: str) -> NQMError:
        self._stream.seek(0)
        number = self._stream.read(place).count(b"\n") + 1
        return NQMError(
            f"{self.path}: line {number} is damaged ({why}); delete this line to have its cell "
            "computed anew, or the file to have all"
        )

    def check(self, index: int, case: str) -> None:
        """Check that the line of a cell has the right case.

        Parameters
        ----------
        index : int
            Index of the cell.
        case : str
            First 16 digits of the case's content key.

        Raises
        ------
        NQMError
            If the line belongs to another case.
        """
        if (found := self[index]["case"][0]) != case:
            place = int(self._begins[index])
            raise self._damaged(place, f"cell {index} is case {case}, not {found:.16}")

    def _note(self, index: int, result: Result, place: int, line: bytes) -> None:
        self.columns.see(result)
        self._known += 1
        self._begins[index], self._sums[index] = place, zlib.crc32(line)

    def add(self, index: int, result: Result) -> None:
        """Append the result of a cell.

        The line is passed to the system at once, and forced to the disk every `SYNC` seconds: a
        killed process loses nothing, a power failure at most the last results.

        Parameters
        ----------
        index : int
            Index of the cell.
        result : dict of str to list
            Columns of its table.

        Raises
        ------
        ValueError
            If the cell has a result already.
        """
        if index in self:
            raise ValueError(f"cell {index} is in {self.path} already")
        place = self._stream.seek(0, os.SEEK_END)
        line = (json.dumps([index, result]) + "\n").encode()
        self._stream.write(line)
        self._stream.flush()
        self._note(index, result, place, line)
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
        with self._open:
            self._flush()

    def delete(self) -> None:
        """Remove the file, which is still locked."""
        self.path.unlink(missing_ok=True)


def _fault(content: Any, cells: int) -> str:
    """Fault of the content of a line; empty if there is none."""
    if not isinstance(content, list) or len(content) != 2:
        return "it is no pair of an index and a result"
    index, result = content
    if type(index) is not int or not 0 <= index < cells:
        return f"the index must lie in 0..{cells - 1}; got {shown(index, 40)}"
    if not isinstance(result, dict) or "case" not in result:
        return "its result is no table with a column case"
    if not all(isinstance(values, list) for values in result.values()):
        return "a column is no list"
    if len({len(values) for values in result.values()}) != 1 or not result["case"]:
        return "its columns are not of one length"
    for name, values in result.items():
        if not set(map(type, values)) <= _VALUES or any(
            type(value) is int and abs(value) >= 2**63 for value in values
        ):
            return f"a value in column {shown(name, 40)} is no number and no text"
    for name, values in result.items():
        kinds = _KINDS[COLUMNS[name].dtype] if name in COLUMNS else _VALUES
        if not set(map(type, values)) <= kinds:
            return f"a value in column {name} is not of its type, {COLUMNS[name].dtype}"
    if len(set(result["case"])) != 1 or type(result["case"][0]) is not str:
        return "its rows are not of one case"
    return ""


class Memory(dict[int, Result]):
    """Journal of a sweep in memory only, without a file."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = Columns()

    def add(self, index: int, result: Result) -> None:
        """Store the result of a cell.

        Parameters
        ----------
        index : int
            Index of the cell.
        result : dict of str to list
            Columns of its table.
        """
        self[index] = result
        self.columns.see(result)


Known = Journal | Memory

"""Sweeps: one configuration over a grid of values, which can be interrupted at any time.

Finished cells are written to a journal next to the output, one line each. A sweep that is run again
reads them from there. After the last cell the table is written in the order of the cells: its bytes
do not depend on which process computed which cell, on the order, or on interruptions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from nqm import __version__, keys
from nqm.errors import NQMError, shown
from nqm.runs import config, toml
from nqm.runs.executors import Workers
from nqm.runs.journal import Columns, Journal, Known, Memory, Result
from nqm.runs.rates import Alike, Grid, lone_keys
from nqm.runs.toml import copied
from nqm.table import Stamp, dtype_name, read_table, write_frames, writing
from nqm.words import WRITTEN, html_table

#: Up to this number of cells, all of them are built and checked before the first is computed.
BUILT_FIRST = 2000
#: Largest number of cells that are sent to a worker together, and of those alike in all but rates.
CHUNK, TOGETHER = 32, 1000
#: Largest number of chunks that an executor has at a time.
WAITING = 256
#: Number of cells whose rows are in memory together while the table is written.
CELLS = 20_000
#: Largest number of cells of a sweep, and of values of an axis.
MOST = 10_000_000


@dataclass(frozen=True)
class Work:
    """Kind of computation of the cells of a sweep: functions that a worker can import.

    Attributes
    ----------
    build : callable
        ``build(mapping, folder)`` returns a run with a method ``check()``, or raises NQMError.
    key : callable
        ``key(mapping, folder)`` returns the content key.
    solve : callable
        ``solve(run, key)`` returns the table of one cell.
    describe : callable
        ``describe(mapping, folder)`` returns the configuration for the table's metadata.
    plain : callable
        Takes a result of `describe`, of this or an earlier version; returns the form in which two
        are compared.
    absent : str
        Text in messages for an entry that such a form lacks.
    alike : callable, optional
        ``alike(mapping, folder, names)`` returns what computes cells that differ in the rates
        `names` alone, together and with the results of `solve`; None if they cannot be.
    """

    build: Callable[[Mapping[str, Any], str | Path], Any]
    key: Callable[[Mapping[str, Any], str | Path], str]
    solve: Callable[[Any, str], pd.DataFrame]
    describe: Callable[[Mapping[str, Any], str | Path], dict[str, Any]]
    plain: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    absent: str = "none"
    alike: Callable[[Mapping[str, Any], str | Path, Sequence[str]], Alike | None] | None = None


def _solve(run: config.Run, key: str) -> pd.DataFrame:
    """Table of a run of the theory, with its own random numbers unless streams is "common"."""
    if run.streams == "common":
        return run.table()
    stream = hashlib.sha256(f"{run.seed}:{key}".encode()).digest()
    return replace(run, seed=int.from_bytes(stream[:7], "big")).table()


THEORY = Work(
    config.build,
    config.key,
    _solve,
    config.resolve_files,
    config.without_defaults,
    config.ABSENT,
    Alike.of,
)


@dataclass(frozen=True)
class Case:
    """One cell: its index, its value on every axis, and its configuration."""

    index: int
    values: dict[str, Any]
    mapping: dict[str, Any]

    def __str__(self) -> str:
        settings = ", ".join(f"{name} = {value!r:.40}" for name, value in self.values.items())
        return f"case {self.index} ({settings})"


@dataclass(frozen=True)
class Group:
    """Cells that differ in rates alone, of which `case` is the first.

    Attributes
    ----------
    case : Case
    alike : Alike
        Computes them.
    grid : Grid
        Their rates.
    """

    case: Case
    alike: Alike
    grid: Grid

    @property
    def index(self) -> list[int]:
        """Indices of all cells, rising."""
        found: list[int] = (self.case.index + self.grid.offset).tolist()
        return found

    def keys(self, cells: Sequence[int]) -> list[str]:
        """Content keys of the cells at these positions in `index`."""
        return self.alike.keys(self.grid.texts_of(cells))

    def part(self, cells: Sequence[int]) -> Together:
        """The cells at these positions in `index`, for a worker."""
        index = (self.case.index + self.grid.offset[cells]).tolist()
        values = self.grid.values_of(cells)
        return Together(self.case.mapping, index, self.keys(cells), self.grid.names, values)


@dataclass(frozen=True)
class Together:
    """Cells that are computed in one call.

    Attributes
    ----------
    mapping : dict
        Configuration of a cell that differs from them in rates alone.
    index : list of int
    keys : list of str
        Content keys.
    names : sequence of str
        Dotted keys of the rates.
    values : list of list of float
        For each of `names` the rate of every cell.
    """

    mapping: dict[str, Any]
    index: list[int]
    keys: list[str]
    names: Sequence[str]
    values: list[list[float]]


@dataclass(frozen=True)
class Sweep:
    """A configuration and axes: dotted keys, each with a list of values.

    Parameters
    ----------
    base : mapping
        Configuration, as `nqm.runs.toml.load` returns it.
    axes : mapping of str to sequence
        ``{"phase.0.lr": [0.1, 0.2], "phase.0.members": [1, 10]}``; the last axis varies fastest.
        Keys between commas vary together:
        ``{"phase.0.lr, phase.0.steps": [[0.1, 50], [0.2, 20]]}``.
    folder : str or Path
        Folder to which file names in `base` are relative.
    work : Work
        Kind of computation; a run of the theory by default.
    """

    base: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    folder: str | Path = "."
    work: Work = THEORY

    def __post_init__(self) -> None:
        base = {name: value for name, value in self.base.items() if name != "sweep"}
        object.__setattr__(self, "base", copied(base))
        axes = {name: [_plain(v) for v in values] for name, values in self.axes.items()}
        for name, values in axes.items():
            if not values:
                raise NQMError(f"sweep.{name} must hold at least one value; got none")
            for value in values if len(_parts(name)) > 1 else ():
                if not isinstance(value, list) or len(value) != len(_parts(name)):
                    raise NQMError(
                        f"sweep.{name} must hold lists of {len(_parts(name))} values, one for each "
                        f"key; got {shown(value, 40)}"
                    )
        _check_axes(self.base, axes)
        object.__setattr__(self, "axes", axes)
        if len(self) > MOST:
            sizes = " x ".join(str(len(values)) for values in axes.values())
            raise NQMError(
                f"sweep has {sizes} = {len(self)} cells, more than {MOST}; take fewer values"
            )

    @classmethod
    def from_file(
        cls, path: str | Path, overrides: Sequence[str] = (), work: Work = THEORY
    ) -> Self:
        """Read a sweep from a TOML file with a ``[sweep]`` table.

        Parameters
        ----------
        path : str or Path
            TOML file.
        overrides : sequence of str
            As in `nqm.runs.toml.load`.
        work : Work
            Kind of computation; a run of the theory by default.

        Returns
        -------
        Sweep
            File names in it are relative to the folder of `path`.

        Raises
        ------
        NQMError
            If the file has no such table or an axis is wrong; the message names its dotted key.
        """
        mapping = toml.load(path, overrides)
        if "sweep" not in mapping:
            raise NQMError(
                f'{path} has no [sweep] table; add e.g. "phase.0.lr" = [0.1, 0.2] in one'
            )
        return cls(mapping, read_axes(mapping["sweep"]), Path(path).parent, work)

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def _repr_html_(self) -> str:
        """Table that a notebook shows."""
        rows = [(name, len(values), _first_values(values)) for name, values in self.axes.items()]
        return html_table(f"Sweep of {len(self)} cells", ("axis", "values", "which are"), rows)

    def cases(self) -> Iterator[Case]:
        """Make every cell, in order.

        Yields
        ------
        Case
            The last axis varies fastest.
        """
        for index, values in enumerate(itertools.product(*self.axes.values())):
            yield self._case(index, dict(zip(self.axes, values, strict=True)))

    @cached_property
    def _strides(self) -> dict[str, int]:
        """By how much the index of a cell rises along each axis."""
        stride, strides = 1, {}
        for name, values in reversed(list(self.axes.items())):
            strides[name], stride = stride, stride * len(values)
        return strides

    @cached_property
    def _grid(self) -> Grid | None:
        """The axes of rates, if cells that differ in them alone can be computed together."""
        if self.work.alike is None:
            return None
        axes = {name: (_parts(name), values) for name, values in self.axes.items()}
        return Grid.of(self.base, axes, self._strides)

    def _grouped(self) -> tuple[Iterator[Group], Iterable[Case]]:
        """Cells that are computed together; and all others, to be asked for afterwards."""
        grid = self._grid
        if grid is None:
            return iter(()), self.cases()
        alone: list[int] = []
        return self._groups(grid, alone), self._others(grid, alone)

    def _groups(self, grid: Grid, alone: list[int]) -> Iterator[Group]:
        assert self.work.alike is not None
        axes = self.axes
        first = {name: values[:1] if name in grid.axes else values for name, values in axes.items()}
        for place in itertools.product(*(range(len(values)) for values in first.values())):
            at = dict(zip(axes, place, strict=True))
            index = sum(i * self._strides[name] for name, i in at.items())
            case = self._case(index, {name: axes[name][i] for name, i in at.items()})
            alike = self.work.alike(case.mapping, self.folder, grid.names)
            if alike is None or not alike.takes(grid):
                alone.append(index)
            else:
                yield Group(case, alike, grid)

    def _others(self, grid: Grid, alone: list[int]) -> Iterator[Case]:
        for index in np.sort(np.add.outer(alone, grid.offset), axis=None).tolist():
            yield self._at(int(index))

    def _at(self, index: int) -> Case:
        """The cell of this index."""
        places = {n: index // stride % len(self.axes[n]) for n, stride in self._strides.items()}
        return self._case(index, {name: self.axes[name][places[name]] for name in self.axes})

    def _case(self, index: int, values: dict[str, Any]) -> Case:
        mapping = copied(self.base)
        for name, value in values.items():
            _assign(mapping, name, copied(value))
        return Case(index, values, mapping)

    @property
    def key(self) -> str:
        """Content key of the whole sweep."""
        axes, grid = [], self._grid
        rates = dict(zip(grid.names, grid.texts, strict=True)) if grid is not None else {}
        for name, values in self.axes.items():
            if name in rates:
                axes.append([name, list(lone_keys(name, rates[name]))])
                continue
            alone: list[dict[str, Any]] = [{} for _ in values]
            for mapping, value in zip(alone, values, strict=True):
                _assign(mapping, name, value)
            axes.append([name, [self.work.key(mapping, self.folder) for mapping in alone]])
        return keys.key({"base": self.work.key(self.base, self.folder), "axes": axes})

    @property
    def stamp(self) -> Stamp:
        """Identity of the sweep in its table and journal."""
        config, work = self.work.describe(self.base, self.folder), self.work
        return Stamp(self.key, __version__, config, work.plain, work.absent, self.axes)

    def run(
        self,
        out: str | Path | None = None,
        executor: Executor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> pd.DataFrame:
        """Compute every cell that has no result yet.

        Parameters
        ----------
        out : str or Path, optional
            Table to write (.parquet or .csv). A finished table of the same sweep is returned at
            once; a file with other content is refused.
        executor : Executor, optional
            Any executor of `concurrent.futures`; this process by default. It does not change the
            result.
        progress : callable, optional
            Called with the number of cells finished since the last call.

        Returns
        -------
        DataFrame
            One row per cell and recorded step: the axes, ``case`` (the cell's content key), and
            the columns of `Trajectory.table`. Diverged cells have rows as well. Each Monte Carlo
            cell has random numbers of its own, seeded by (seed, case); with
            ``streams = "common"`` all cells use those of the seed alone.

        Raises
        ------
        NQMError
            If a cell cannot be built, before anything is computed; the message names the cell.
        """
        if out is None:
            self._check()
            known = Memory()
            self._fill(known, executor, progress)
            return pd.concat(self._frames(known), ignore_index=True)
        self.write(out, executor, progress)
        return read_table(out)

    def write(
        self,
        out: str | Path,
        executor: Executor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write the table of `run`, which need not fit in memory.

        Parameters
        ----------
        out, executor, progress
            As in `run`.

        Raises
        ------
        NQMError
            As `run`; also if another process writes the table.
        """
        stamp, report = self.stamp, progress if progress is not None else _silent
        with writing(out, stamp) as missing:
            if missing:
                self._write(out, stamp, executor, report)
            else:
                report(len(self))

    def _write(
        self,
        out: str | Path,
        stamp: Stamp,
        executor: Executor | None,
        report: Callable[[int], None],
    ) -> None:
        """Compute the cells that the journal lacks, write the table and remove the journal."""
        self._check()
        with Journal(Path(f"{out}.journal.jsonl"), stamp, len(self)) as journal:
            self._check_known(journal)
            report(len(journal))
            self._fill(journal, executor, report)
            frames, columns = self._frames(journal), journal.columns
            write_frames(out, frames, self._dtypes(columns), columns.rows, stamp.metadata())
            journal.delete()

    def _check(self) -> None:
        """Build all cells, or every value of every axis once if there are more than `BUILT_FIRST`.

        No two cells may be the same run, because then one of the values has no effect.
        """
        grid = self._grid
        axes = {name: v for name, v in self.axes.items() if grid is None or name not in grid.axes}
        if len(self) > BUILT_FIRST and math.prod(map(len, axes.values())) > BUILT_FIRST:
            first = {name: values[0] for name, values in self.axes.items()}
            for name, values in self.axes.items():
                self._check_group(self._case(-1, first | {name: value}) for value in values)
            return
        groups, others = self._grouped()
        # An error is told of the first cell that has it, as if there were no groups.
        cases = [group.case for group in groups]
        self._check_group(sorted([*cases, *others], key=lambda case: case.index))

    def _check_group(self, cases: Iterable[Case]) -> None:
        seen: dict[str, Case] = {}
        for case in cases:
            _build(case, self.folder, self.work, checked=True)
            twin = seen.setdefault(self.work.key(case.mapping, self.folder), case)
            if twin is not case:
                raise NQMError(
                    f"{case} is the same run as {twin}; drop the values that change nothing"
                )

    def _check_known(self, journal: Journal) -> None:
        """Raise NQMError unless every line of the journal has the case of its cell."""
        if not len(journal):
            return
        groups, others = self._grouped()
        for group in groups:
            index = group.index
            known = [i for i, cell in enumerate(index) if cell in journal]
            for i, key in zip(known, group.keys(known), strict=True):
                journal.check(index[i], key[:16])
        for case in others:
            if case.index in journal:
                journal.check(case.index, self.work.key(case.mapping, self.folder)[:16])

    def _fill(
        self, known: Known, executor: Executor | None, progress: Callable[[int], None] | None
    ) -> None:
        """Compute the cells that have no result yet."""
        share = (len(self) - len(known)) // 64
        sizes = (1, TOGETHER) if executor is None else (CHUNK, max(CHUNK, min(TOGETHER, share)))
        tasks = self._tasks(known, max(1, min(sizes[0], share)), sizes[1])
        done = _here if executor is None else partial(_by, executor)
        for index, result in done(tasks, self.folder, self.work):
            known.add(index, result)
            if progress is not None:
                progress(1)

    def _tasks(self, known: Known, size: int, together: int) -> Iterator[Task]:
        """Divide the cells without a result into calls of `compute`."""
        groups, others = self._grouped()
        for group in groups:
            index = group.index
            left = [i for i, cell in enumerate(index) if cell not in known]
            for first in range(0, len(left), together):
                yield group.part(left[first : first + together])
        cases = (case for case in others if case.index not in known)
        while chunk := list(itertools.islice(cases, size)):
            yield chunk

    def _dtypes(self, columns: Columns) -> dict[str, str]:
        """Types of all columns, axes first."""
        own = columns.dtypes()
        axes = _Axes(self.axes, own)
        return axes.dtypes | own

    def _frames(self, known: Known) -> Iterator[pd.DataFrame]:
        """Tables of all results in the order of the cells, `CELLS` of them at a time."""
        own = known.columns.dtypes()
        axes = _Axes(self.axes, own)
        numbered = enumerate(itertools.product(*axes.rows))
        while part := list(itertools.islice(numbered, CELLS)):
            columns: dict[str, list[Any]] = {name: [] for name in (*axes.names, *own)}
            for index, front in part:
                result = known[index]
                for name, value in zip(axes.names, itertools.chain(*front), strict=True):
                    columns[name].extend([value] * len(result["case"]))
                for name in own:
                    columns[name].extend(result[name])
            yield pd.DataFrame(columns).astype(axes.dtypes | own)


class _Axes:
    """Axes as columns of the table.

    The name of a column is the last part of its key if that is unique. A column holds numbers,
    texts, or any values as JSON text. `rows` has, for every axis, its values by column.
    """

    def __init__(self, axes: Mapping[str, Sequence[Any]], taken: Collection[str]):
        short = {part: part.rpartition(".")[2] for axis in axes for part in _parts(axis)}
        count = list(short.values()).count
        self.dtypes: dict[str, str] = {}
        self.rows: list[list[tuple[Any, ...]]] = []
        for axis, values in axes.items():
            parts = _parts(axis)
            columns = [
                _column(one) for one in (zip(*values, strict=True) if parts[1:] else [values])
            ]
            self.rows.append(list(zip(*columns, strict=True)))
            for part, column in zip(parts, columns, strict=True):
                name = short[part]
                full = count(name) > 1 or name.isdigit() or name in taken
                name = part if full else name
                name = f"sweep.{part}" if name in taken else name
                self.dtypes[name] = dtype_name(pd.Series(list(column)))
        self.names = list(self.dtypes)


def _first_values(values: Sequence[Any]) -> str:
    """Values of an axis in words: all of them if they are few, else the ends."""
    texts = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in values]
    if len(values) > WRITTEN:
        texts = [*texts[:2], "...", texts[-1]]
    return ", ".join(texts)


def _parts(name: str) -> list[str]:
    """Dotted keys of an axis: one, or several between commas."""
    return [part.strip() for part in name.split(",")]


def _assign(mapping: dict[str, Any], name: str, value: Any) -> None:
    """Set the entries of one axis."""
    parts = _parts(name)
    for part, one in zip(parts, value if parts[1:] else [value], strict=True):
        toml.assign(mapping, part, one)


#: Cells of one call of `compute`.
Task = Sequence[Case] | Together


def _here(tasks: Iterator[Task], folder: str | Path, work: Work) -> Iterator[tuple[int, Result]]:
    for task in tasks:
        yield from compute(task, folder, work)


def _by(
    executor: Executor, tasks: Iterator[Task], folder: str | Path, work: Work
) -> Iterator[tuple[int, Result]]:
    """Results in the order in which they finish; at most `WAITING` tasks are submitted."""
    pending: set[Future[list[tuple[int, Result]]]] = set()
    try:
        while True:
            for task in itertools.islice(tasks, WAITING - len(pending)):
                pending.add(executor.submit(compute, task, folder, work))
            if not pending:
                return
            done, pending = wait(pending, return_when="FIRST_COMPLETED")
            for future in done:
                yield from future.result()
    finally:
        # Python 3.11 fails if the pool cancels work that was cancelled here already.
        for future in () if isinstance(executor, Workers) else pending:
            future.cancel()


def read_axes(table: Any) -> dict[str, list[Any]]:
    """Read the axes of a ``[sweep]`` table.

    Parameters
    ----------
    table : mapping
        Dotted keys, or several between commas, each with a list of values, or with
        ``{geomspace = [a, b, count]}``, ``{linspace = [a, b, count]}`` or
        ``{range = [a, b, step]}``, which include both ends.

    Returns
    -------
    dict of str to list
        Values by dotted key.

    Raises
    ------
    NQMError
        If an axis is wrong; the message names it.
    """
    if not isinstance(table, Mapping) or not table:
        raise NQMError("sweep must be a table of dotted keys and lists; got something else")
    axes: dict[str, list[Any]] = {}
    for name, value in table.items():
        if name in axes:
            raise NQMError(f"sweep.{name} is there twice; drop one")
        if isinstance(value, list):
            axes[name] = value
        elif isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in _GRIDS:
            axes[name] = _grid(f"sweep.{name}", *next(iter(value.items())))
        elif isinstance(value, Mapping) and value:
            # An unquoted dotted key is a nested table in TOML.
            for inner, values in read_axes(value).items():
                if f"{name}.{inner}" in axes:
                    raise NQMError(f"sweep.{name}.{inner} is there twice; drop one")
                axes[f"{name}.{inner}"] = values
        else:
            raise NQMError(
                f"sweep.{name} must be a list or one of {', '.join(_GRIDS)}; got {shown(value, 40)}"
            )
    return axes


_GRIDS = ("geomspace", "linspace", "range")


def _grid(where: str, kind: str, numbers: Any) -> list[Any]:
    if (
        not isinstance(numbers, list)
        or len(numbers) != 3
        or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    ):
        raise NQMError(f"{where}.{kind} must hold three numbers; got {shown(numbers)}")
    a, b, last = numbers
    if kind == "range":
        if last == 0 or (b - a) / last < 0:
            raise NQMError(
                f"{where}.range must step from its first to its second; got {shown(numbers)}"
            )
        steps = (b - a) / last + 1e-9  # infinite where it overflows
        _check_count(f"{where}.range", steps + 1)
        values = [a + i * last for i in range(int(steps) + 1)]
    else:
        if type(last) is not int or last < 1:
            raise NQMError(f"{where}.{kind} needs a whole count >= 1; got {shown(last)}")
        _check_count(f"{where}.{kind}", last)
        if kind == "geomspace" and (a <= 0 or b <= 0):
            raise NQMError(f"{where}.geomspace needs ends > 0; got {a!r} and {b!r}")
        with np.errstate(all="ignore"):
            space = np.linspace if kind == "linspace" else np.geomspace
            values = space(float(a), float(b), last).tolist()
    if not all(math.isfinite(value) for value in values):
        raise NQMError(f"{where}.{kind} exceeds the range of numbers; got {shown(numbers)}")
    return values if kind == "range" else [_whole(value) for value in values]


def _check_count(where: str, count: float) -> None:
    if count > MOST:
        raise NQMError(f"{where} makes {count:.4g} values, more than {MOST}; take fewer")


def _check_axes(base: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> None:
    """Raise NQMError unless every axis sets an entry of its own."""
    paths: dict[str, tuple[str | int, ...]] = {}
    for axis in axes:
        for name in _parts(axis):
            if not name:
                raise NQMError(f"sweep.{axis}: a key is missing beside a comma")
            if name in paths:
                raise NQMError(f"sweep.{name} is there twice; drop one")
            paths[name] = toml.path_of(base, name)
    owners: dict[tuple[str | int, ...], str] = {}
    for name, path in paths.items():
        if path[0] == "sweep":
            raise NQMError(f"sweep.{name}: the axes of a sweep are no axis; drop it")
        if path == ("record",) or path[:2] in (("record", "quantiles"), ("record", "bound")):
            raise NQMError(f"sweep.{name}: all cells have the same columns; set it in [record]")
        if path in owners:
            raise NQMError(f"sweep.{owners[path]} and sweep.{name} are the same entry; drop one")
        owners[path] = name
    for name, path in paths.items():
        for length in range(1, len(path)):
            if outer := owners.get(path[:length]):
                raise NQMError(
                    f"sweep.{name} is a part of sweep.{outer}, which is an axis too; drop one"
                )


def _whole(value: float) -> float:
    """Round a number that is whole up to rounding errors, because counts must be whole."""
    near = round(value) if abs(value) <= toml.LARGEST else value
    return near if abs(value - near) <= 1e-12 * abs(value) else value


def compute(task: Task, folder: str | Path, work: Work = THEORY) -> list[tuple[int, Result]]:
    """Compute some cells, in this process or in a worker.

    Parameters
    ----------
    task : sequence of Case, or Together
        The cells.
    folder : str or Path
        Folder to which file names are relative.
    work : Work
        Kind of computation.

    Returns
    -------
    list of (int, dict)
        Index of each cell and its table, as lists by column.

    Raises
    ------
    NQMError
        If a cell cannot be computed; the message names it.
    """
    if isinstance(task, Together):
        return _together(task, folder, work)
    results = []
    for case in task:
        run = _build(case, folder, work)
        key = work.key(case.mapping, folder)
        try:
            table = work.solve(run, key)
        except NQMError as error:
            raise NQMError(f"{case}: {error}") from None
        result = {str(name): table[name].tolist() for name in table.columns}
        results.append((case.index, {"case": [key[:16]] * len(table)} | result))
    return results


def _together(task: Together, folder: str | Path, work: Work) -> list[tuple[int, Result]]:
    """Cells that differ in rates alone."""
    alike = work.alike and work.alike(task.mapping, folder, task.names)
    assert alike is not None  # as it was when the task was made
    columns = alike.results(task.values)
    return [
        (index, {"case": [key[:16]] * len(result["step"])} | result)
        for index, key, result in zip(task.index, task.keys, columns, strict=True)
    ]


def _build(case: Case, folder: str | Path, work: Work, *, checked: bool = False) -> Any:
    try:
        run = work.build(case.mapping, folder)
        if checked:
            run.check()
        return run
    except NQMError as error:
        raise NQMError(f"{case}: {error}") from None


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays as Python's own."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _column(values: Sequence[Any]) -> Sequence[Any]:
    """Values of an axis as one column: all numbers, all texts, or everything as JSON text."""
    for kinds in ((int, float), (str,), (bool,)):
        if all(type(value) in kinds for value in values):
            wide = kinds == (int, float) and any(abs(value) > toml.LARGEST for value in values)
            return [float(value) for value in values] if wide else values
    return [json.dumps(value) for value in values]


def _silent(count: int) -> None:
    pass

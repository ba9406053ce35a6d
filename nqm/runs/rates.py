"""Cells of a sweep that differ in rates alone, which are computed together."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from nqm import keys
from nqm.errors import NQMError
from nqm.program import Program
from nqm.runs import config
from nqm.runs.journal import Result
from nqm.runs.toml import path_of
from nqm.schedule import Constant, Schedule

if TYPE_CHECKING:
    from nqm.solvers.many_rates import Rates

#: Entries of a phase that are rates.
ENTRIES = ("lr", "member_lr")
#: Least number of cells for which it is worth while.
FEW = 8


class Place(NamedTuple):
    """A number that states a rate, or an entry of its schedule.

    Attributes
    ----------
    phase, entry : int
        Number of the phase, and of the rate in `ENTRIES`.
    part : str or None
        Entry of the schedule; None for a constant rate.
    """

    phase: int
    entry: int
    part: str | None


def place_of(base: Mapping[str, Any], name: str) -> Place | None:
    """Find the rate that a dotted key states.

    Parameters
    ----------
    base : mapping
        Configuration.
    name : str
        Dotted key.

    Returns
    -------
    Place or None
        None if it is no rate and no entry of one.
    """
    path = path_of(base, name)
    if len(path) not in (3, 4) or path[0] != "phase" or path[2] not in ENTRIES:
        return None
    part = path[3] if len(path) == 4 else None
    if not isinstance(path[1], int) or not isinstance(part, str | None):
        return None
    return Place(path[1], ENTRIES.index(path[2]), part)


def are_rates(values: Sequence[Any]) -> bool:
    """Tell whether all values are numbers that a rate may have, no two of them equal.

    Parameters
    ----------
    values : sequence
        Values of an axis.

    Returns
    -------
    bool
        False for schedules.
    """
    plain = all(type(value) in (int, float) and 0.0 < value < math.inf for value in values)
    return plain and max(values) < 1e300 and len(set(values)) == len(values)


def lone_keys(name: str, texts: Sequence[str]) -> Iterator[str]:
    """Make the content keys of configurations of nothing but a rate.

    Parameters
    ----------
    name : str
        Dotted key of the rate.
    texts : sequence of str
        Canonical text of each rate.

    Yields
    ------
    str
        As `nqm.runs.config.key` makes it.
    """
    parts = [json.dumps(part) for part in name.split(".")]
    before, after = "".join(f"{{{part}: " for part in parts), "}" * len(parts)
    for text in texts:
        yield hashlib.sha256(f"{before}{text}{after}".encode()).hexdigest()


@dataclass(frozen=True)
class Grid:
    """The axes of a sweep that are rates, and the L cells that they make of one.

    Attributes
    ----------
    axes : tuple of str
        Their names.
    names : tuple of str
        Dotted keys of all rates; an axis may set several together.
    values : tuple of list
        For each of `names` its values along its axis.
    texts : tuple of list of str
        The same in their canonical text.
    offset : ndarray of int, shape (L,)
        Indices of the cells, rising, less that of the first.
    rows : ndarray of int, shape (names, L)
        Which of `values` each cell has.
    fitting : dict
        What `Alike.takes` has found out.
    """

    axes: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[list[float], ...]
    texts: tuple[list[str], ...]
    offset: NDArray[np.int64]
    rows: NDArray[np.int64]
    fitting: dict[Any, bool] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        base: Mapping[str, Any],
        axes: Mapping[str, tuple[Sequence[str], Sequence[Any]]],
        strides: Mapping[str, int],
    ) -> Self | None:
        """Find the axes of rates.

        Parameters
        ----------
        base : mapping
            Configuration.
        axes : mapping of str to (sequence of str, sequence)
            For each axis its dotted keys, and its values: lists, if there are several keys.
        strides : mapping of str to int
            By how much the index of a cell rises along each axis.

        Returns
        -------
        Grid or None
            None if so few cells differ in rates alone that it is not worth while.
        """
        offset, rows = np.zeros(1, np.int64), np.zeros((0, 1), np.int64)
        names: list[str] = []
        columns: list[list[float]] = []
        chosen = []
        for axis, (parts, values) in axes.items():
            split = [list(one) for one in zip(*values, strict=True)] if parts[1:] else [values]
            known = all(place_of(base, part) is not None for part in parts)
            if not known or not all(are_rates(column) for column in split):
                continue
            step = np.arange(len(values))
            rows = np.repeat(rows, step.size, axis=1)
            rows = np.vstack([rows, *[np.tile(step, offset.size)] * len(parts)])
            offset = (offset[:, None] + strides[axis] * step).reshape(-1)
            names.extend(parts)
            columns.extend(list(column) for column in split)
            chosen.append(axis)
        if offset.size < FEW:
            return None
        texts = tuple([keys.text(value) for value in column] for column in columns)
        return cls(tuple(chosen), tuple(names), tuple(columns), texts, offset, rows)

    def values_of(self, cells: Sequence[int]) -> list[list[float]]:
        """Rates of some cells.

        Parameters
        ----------
        cells : sequence of int
            Positions in `offset`.

        Returns
        -------
        list of list of float
            For each of `names`.
        """
        return self._of(self.values, cells)

    def texts_of(self, cells: Sequence[int]) -> list[list[str]]:
        """Canonical texts of the rates of some cells; parameters as in `values_of`.

        Parameters
        ----------
        cells : sequence of int
            Positions in `offset`.

        Returns
        -------
        list of list of str
            For each of `names`.
        """
        return self._of(self.texts, cells)

    def _of(self, held: tuple[list[Any], ...], cells: Sequence[int]) -> list[list[Any]]:
        picked = self.rows[:, cells].tolist()
        return [[one[i] for i in row] for one, row in zip(held, picked, strict=True)]


@dataclass(frozen=True)
class Alike:
    """Cells that differ in rates alone.

    Attributes
    ----------
    run : Run
        One of them.
    places : tuple of Place
        The rates in which they differ.
    order : tuple of int
        Order of these rates in the canonical text of a configuration.
    pieces : tuple of str
        This text before, between and after them.
    """

    run: config.Run
    places: tuple[Place, ...]
    order: tuple[int, ...]
    pieces: tuple[str, ...]

    @classmethod
    def of(
        cls, mapping: Mapping[str, Any], folder: str | Path, names: Sequence[str]
    ) -> Self | None:
        """Find out whether cells can be computed together.

        Parameters
        ----------
        mapping : mapping
            Configuration of one of them.
        folder : str or Path
            Folder to which file names in it are relative.
        names : sequence of str
            Dotted keys of the rates in which they differ.

        Returns
        -------
        Alike or None
            None if they must be computed one by one, also if their configuration is wrong.
        """
        # The solver's compiled code is loaded only where it is needed.
        from nqm.solvers.many_rates import fits

        places = [place_of(mapping, name) for name in names]
        try:
            run = config.build(mapping, folder)
            at = run.program.recorded(run.at)
            if run.method != "jump" or run.quantiles or run.bound:
                return None
            known = tuple(place for place in places if place is not None)
            if len(known) < len(places) or not fits(run.problem, run.program, at):
                return None
        except NQMError:
            return None
        if not all(_is_stated(run.program, place) for place in known):
            return None
        plain = config.without_defaults(config.resolve_files(mapping, folder))
        marks = [f"\0rate {number}" for number in range(len(known))]
        own = []
        for mark, place in zip(marks, known, strict=True):
            table, entry = plain["phase"][place.phase], ENTRIES[place.entry]
            if place.part is not None:
                table, entry = table[entry], place.part
            own.append(table[entry])
            table[entry] = mark
        text = keys.text(plain)
        order = sorted(range(len(known)), key=lambda i: text.find(json.dumps(marks[i])))
        pieces = []
        for i in order:
            before, _, text = text.partition(json.dumps(marks[i]))
            pieces.append(before)
        made = cls(run, known, tuple(order), (*pieces, text))
        stated = [[keys.text(value)] for value in own]
        return made if made.keys(stated) == [config.key(mapping, folder)] else None

    def takes(self, grid: Grid) -> bool:
        """Tell whether every cell has a program, and the same stretches of constant rates.

        Parameters
        ----------
        grid : Grid
            Rates of the cells.

        Returns
        -------
        bool
            False also if a schedule is wrong, which the cell itself will say.
        """
        for phase, entry in {place[:2] for place in self.places if place.part is not None}:
            rows = [i for i, place in enumerate(self.places) if place[:2] == (phase, entry)]
            of, steps = self._schedule(phase, entry), self.run.program.phases[phase].steps
            # Asked for whenever a sweep goes through its cells, and for every group of them.
            asked = of, steps, tuple(rows)
            if asked not in grid.fitting:
                grid.fitting[asked] = self._fit(grid, rows, of, steps)
            if not grid.fitting[asked]:
                return False
        return True

    def _fit(self, grid: Grid, rows: list[int], of: Schedule, steps: int) -> bool:
        """Whether one rate of a phase is a schedule in every cell, with the segments of `of`."""
        segments = list(of.segments(steps))
        for cell in np.unique(grid.rows[rows], axis=1).T.tolist():
            values = [grid.values[i][j] for i, j in zip(rows, cell, strict=True)]
            try:
                made = self._made(of, rows, values)
            except NQMError:
                return False
            if list(made.segments(steps)) != segments:
                return False
        return True

    def keys(self, texts: Sequence[Sequence[str]]) -> list[str]:
        """Content keys of cells.

        Parameters
        ----------
        texts : sequence of sequence of str
            For each of `places` the canonical text of each cell's rate.

        Returns
        -------
        list of str
            As `nqm.runs.config.key` makes them.
        """
        first, *rest = self.pieces
        made = []
        for row in zip(*(texts[i] for i in self.order), strict=True):
            whole = first + "".join(a + b for a, b in zip(row, rest, strict=True))
            made.append(hashlib.sha256(whole.encode()).hexdigest())
        return made

    def results(self, values: Sequence[Sequence[float]]) -> Iterator[Result]:
        """Compute cells.

        Parameters
        ----------
        values : sequence of sequence of float
            For each of `places` each cell's rate.

        Yields
        ------
        dict of str to list
            Columns of its table.
        """
        from nqm.solvers.many_rates import most, solve_rates

        problem, program = self.run.additive("sweep"), self.run.program
        at, size = program.recorded(self.run.at), most(problem, program)
        for first in range(0, len(values[0]), size):
            columns = [one[first : first + size] for one in values]
            yield from solve_rates(problem, program, self._rates(columns), at).columns()

    def _rates(self, columns: Sequence[Sequence[float]]) -> list[Rates]:
        """Both rates of every phase, for each cell."""
        rates: list[Rates] = []
        for index, phase in enumerate(self.run.program.phases):
            lr = self._schedules(index, 0, columns)
            member = lr if phase.member_lr is None else self._schedules(index, 1, columns)
            rates.append((lr, member))
        return rates

    def _schedules(
        self, phase: int, entry: int, columns: Sequence[Sequence[float]]
    ) -> list[Schedule]:
        """One rate of a phase, for each cell."""
        of = self._schedule(phase, entry)
        rows = [i for i, place in enumerate(self.places) if place[:2] == (phase, entry)]
        if not rows:
            return [of] * len(columns[0])
        cells = zip(*(columns[i] for i in rows), strict=True)
        return [self._made(of, rows, values) for values in cells]

    def _schedule(self, phase: int, entry: int) -> Schedule:
        """The rate of the first cell."""
        found: Any = getattr(self.run.program.phases[phase], ENTRIES[entry])
        return found if isinstance(found, Schedule) else Constant(1.0)

    def _made(self, of: Any, rows: Sequence[int], values: Sequence[float]) -> Schedule:
        """A schedule with other numbers."""
        names = tuple(self.places[i].part for i in rows)
        if None in names:
            return Constant(float(values[0]))
        return _changed(of, names, tuple(values))


@functools.lru_cache(maxsize=2**15)
def _changed(of: Any, names: tuple[str, ...], values: tuple[float, ...]) -> Schedule:
    """A schedule with other numbers: asked for when cells are checked, and when they are solved."""
    made: Schedule = replace(of, **dict(zip(names, values, strict=True)))
    return made


def _is_stated(program: Program, place: Place) -> bool:
    """Whether keys hold this entry for any value: it is a rate, or has no default."""
    if place.part is None:
        return True
    schedule: Any = getattr(program.phases[place.phase], ENTRIES[place.entry])
    known = {one.name: one.default for one in fields(schedule)}
    return known.get(place.part, 0) is MISSING

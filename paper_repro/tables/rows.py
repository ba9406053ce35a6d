"""Rows of a table of the paper: methods, published numbers, and the runs to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published value.

    Attributes
    ----------
    mean, sd : float, optional
        In the table's unit; None where it could not be established.
    n : int, optional
        Number of seeds.
    words : str
        The paper's statement where it gives no number.
    """

    mean: float | None = None
    sd: float | None = None
    n: int | None = None
    words: str = ""


#: For a row whose published value could not be established.
UNKNOWN = Published()


@dataclass(frozen=True)
class Source:
    """Rows of an experiment's ``results.parquet`` that give one of our values.

    Attributes
    ----------
    recipe, arm, weights, metric : str
        As `neural.training.experiment.run_experiment` names them.
    data : tuple of str
        Names of the data sets; the value of a seed is the mean over them.
    """

    recipe: str
    arm: str
    weights: str
    metric: str = "accuracy"
    data: tuple[str, ...] = ("test",)

    @property
    def words(self) -> str:
        """Where the value comes from, for the page."""
        return f"{self.recipe}, {self.arm}, {self.weights}"


@dataclass(frozen=True)
class Saved:
    """A value in the tables that a command saves, of which every folder gives one.

    Attributes
    ----------
    kind : str
        Which table: a name of `paper_repro.tables.saved.KINDS`.
    column : str
        The value's column.
    where : mapping of str to object
        Column to the value it has, or to a tuple of values, in the rows that count.
    by : str
        Column by whose values rows are averaged first; none by default.
    take : {"mean", "max", "min"}
        What of the rows, or of these averages, is the value.
    """

    kind: str
    column: str
    where: Mapping[str, Any] = field(default_factory=dict)
    by: str = ""
    take: str = "mean"

    @property
    def words(self) -> str:
        """Where the value comes from, for the page."""
        shown = (
            f"{name} {' or '.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self.where.items()
        )
        first = self.column if self.take == "mean" else f"{self.take} {self.column}"
        return ", ".join((f"{self.kind}: {first}", *shown))


@dataclass(frozen=True)
class Row:
    """One method in a table.

    Attributes
    ----------
    method : str
        Name of the method, as the paper has it.
    paper : Published
        The published value.
    source : Source or Saved
        The same experiment here; only the full scale of a recipe is compared with the paper.
    related : tuple of Source
        The same comparison on data that are easier to obtain.
    """

    method: str
    paper: Published
    source: Source | Saved
    related: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table of a paper.

    Attributes
    ----------
    name, title : str
        Name of the file, and title on the page.
    unit : str
        Unit of all numbers.
    rows : tuple of Row
        In the order of the paper.
    digits : int
        Digits after the decimal point, as the paper prints them.
    factor : float
        Factor from a metric's unit to the unit of the table.
    note : str
        Differences from the paper that a reader must know.
    reduced : bool
        Whether the scale ``cpu`` of a recipe is a meaningful comparison.
    paper : str
        Whose table it is.
    """

    name: str
    title: str
    unit: str
    rows: tuple[Row, ...]
    digits: int = 2
    factor: float = 100.0
    note: str = ""
    reduced: bool = True
    paper: str = "von Oswald et al. 2021"

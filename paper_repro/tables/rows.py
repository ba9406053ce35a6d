"""Rows of a table of the paper: methods, published numbers, and the runs to compare with."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class Row:
    """One method in a table.

    Attributes
    ----------
    method : str
        Name of the method, as the paper has it.
    paper : Published
        The published value.
    source : Source
        The same experiment here; only its full scale is compared with the paper.
    related : tuple of Source
        The same comparison on data that are easier to obtain.
    """

    method: str
    paper: Published
    source: Source
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

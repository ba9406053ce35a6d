"""What a table of the paper states: methods, published numbers, and the runs that answer them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A number of the paper.

    Attributes
    ----------
    mean, sd : float, optional
        In the table's unit; None where it could not be established.
    n : int, optional
        Seeds.
    words : str
        What the paper says where it gives no number.
    """

    mean: float | None = None
    sd: float | None = None
    n: int | None = None
    words: str = ""


#: A row of the paper, or one of ours, of which no number of the paper could be established.
UNKNOWN = Published()


@dataclass(frozen=True)
class Source:
    """Where a number of ours comes from: rows of an experiment's ``results.parquet``.

    Attributes
    ----------
    recipe, arm, weights, metric : str
        As `neural.training.experiment.run_experiment` names them.
    data : tuple of str
        Several: the mean over them, for each seed.
    """

    recipe: str
    arm: str
    weights: str
    metric: str = "accuracy"
    data: tuple[str, ...] = ("test",)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes
    ----------
    method : str
    paper : Published
    source : Source
        The same experiment; only its full scale counts as ours.
    related : tuple of Source
        The same comparison on data that are easier to come by.
    """

    method: str
    paper: Published
    source: Source
    related: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes
    ----------
    name, title : str
    unit : str
        Of all its numbers.
    rows : tuple of Row
    digits : int
        After the point, as the paper prints them.
    factor : float
        From a metric's own unit to the table's.
    note : str
        What a reader has to know.
    reduced : bool
        Whether the small version of a recipe says anything about the method.
    """

    name: str
    title: str
    unit: str
    rows: tuple[Row, ...]
    digits: int = 2
    factor: float = 100.0
    note: str = ""
    reduced: bool = True

"""Protocol of a figure's module, its numerical claims, and the names of all figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike

from nqm.errors import NQMError, suggest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from nqm.problems.quadratic import Problem

#: Largest |z| of a Monte Carlo comparison that still counts as agreement.
Z_LIMIT = 4.5

#: Name on the command line -> module, in the order of the report.
STUDIES = {
    "collapse": "paper_repro.collapse",
    "steady_state": "paper_repro.steady_state",
    "switch": "paper_repro.switch",
    "rate_map": "paper_repro.rate_map",
    "multiplicative": "paper_repro.multiplicative",
    "closure": "paper_repro.closure",
    "digits": "paper_repro.digits",
}

#: The figures of Zhang et al. 2019, a page of their own.
ZHANG2019 = {
    "zhang2019_training": "paper_repro.zhang2019.training_curves",
    "zhang2019_targets": "paper_repro.zhang2019.targets",
    "zhang2019_rate": "paper_repro.zhang2019.optimal_rate",
    "zhang2019_schedules": "paper_repro.zhang2019.schedules",
    "zhang2019_momentum": "paper_repro.zhang2019.momentum",
    "zhang2019_effective_rate": "paper_repro.zhang2019.effective_rate",
    "zhang2019_ema": "paper_repro.zhang2019.averaging",
    "zhang2019_scheduled_steps": "paper_repro.zhang2019.scheduled_steps",
}

#: Learning curves and schedules where the noise depends on the state.
SCALING = {"scaling": "paper_repro.scaling"}

#: Every method at equal data.
RANKING = {"ranking": "paper_repro.ranking"}

#: Group name on the command line -> its figures; each group has its own page.
GROUPS = {"all": STUDIES, "zhang2019": ZHANG2019, "scaling": SCALING, "ranking": RANKING}


#: Figures of any problem; `on_problem` computes them.
ON_ANY = ("switch", "rate_map", "collapse", "steady_state", "ranking", *ZHANG2019)
#: Why the others are of their own problem.
OWN_ONLY = {
    "multiplicative": "it is one direction with its minimum at 1",
    "closure": "it is one direction with its minimum at 1",
    "digits": "it is a regression on images",
    "scaling": "it is a least-squares problem with its own inputs",
}


class Scale(StrEnum):
    """Amount of computation: the published figure, or a small version for a quick check."""

    FULL = "full"
    SMOKE = "smoke"


@dataclass(frozen=True)
class Claim:
    """One numerical check, passed or failed.

    Attributes
    ----------
    text : str
        What is claimed, in words.
    measured : float
        Number that is checked.
    rule : str
        Condition on `measured`, in words.
    passed : bool
        Whether `measured` satisfies the rule.
    """

    text: str
    measured: float
    rule: str
    passed: bool


class Study(Protocol):
    """Functions and constants that every module in `GROUPS` has."""

    TITLE: str
    #: What the picture shows, in two sentences.
    SUMMARY: str

    def settings(self, scale: Scale) -> Any:
        """Return all parameters of the computation.

        Parameters
        ----------
        scale : Scale
            Full or smoke.

        Returns
        -------
        object
            A frozen dataclass.
        """

    def compute(self, scale: Scale) -> pd.DataFrame:
        """Compute a tidy table with all numbers that are drawn and checked.

        Parameters
        ----------
        scale : Scale
            Full or smoke.

        Returns
        -------
        DataFrame
        """

    def draw(self, table: pd.DataFrame) -> Figure:
        """Draw the figure from the table alone.

        Parameters
        ----------
        table : DataFrame
            As `compute` returns it.

        Returns
        -------
        Figure
        """

    def claims(self, table: pd.DataFrame) -> list[Claim]:
        """Check the numbers of the table.

        Parameters
        ----------
        table : DataFrame
            As `compute` returns it.

        Returns
        -------
        list of Claim
            In the order of the report.
        """


def find(name: str) -> Study:
    """Return the module of a figure.

    Parameters
    ----------
    name : str
        Name on the command line, a key of a group in `GROUPS`.

    Returns
    -------
    Study

    Raises
    ------
    NQMError
        If there is no such figure; the message suggests a similar name.
    """
    known = STUDIES | ZHANG2019 | SCALING | RANKING
    if name not in known:
        raise NQMError(f"no figure is called {name!r}{suggest(name, known)}")
    return cast(Study, import_module(known[name]))


def on_problem(name: str, problem: Problem) -> Callable[[Scale], pd.DataFrame]:
    """Return the computation of a figure on another problem.

    Parameters
    ----------
    name : str
        Name of the figure.
    problem : Problem
        Its learning rates become multiples of 1 / its largest curvature.

    Returns
    -------
    callable
        Takes a `Scale`, returns the table.

    Raises
    ------
    NQMError
        If the figure is of its own problem only, or the problem is not one of additive noise with
        some curvature.
    """
    from nqm.problems.quadratic import Problem as Additive

    compute_on = getattr(find(name), "compute_on", None)
    if compute_on is None:
        raise NQMError(
            f"figure {name!r} is of its own problem only ({OWN_ONLY[name]}); "
            f"those of any problem are {', '.join(ON_ANY)}"
        )
    if not isinstance(problem, Additive) or not problem.curvature.max() > 0.0:
        raise NQMError(
            f"figure {name!r} needs a problem with additive noise and a curvature > 0; got a "
            f"{type(problem).__name__}"
        )
    return lambda scale: cast("pd.DataFrame", compute_on(problem, scale))


def listed() -> dict[str, str]:
    """Describe every figure in one line, without loading what draws it.

    Returns
    -------
    dict of str to str
        First line of each module's docstring, by the figure's name.
    """
    import ast
    from importlib.util import find_spec

    found = {}
    for name, module in (STUDIES | ZHANG2019 | SCALING | RANKING).items():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        mark = "; --set problem.file=FILE" if name in ON_ANY else ""
        found[name] = doc.partition("\n")[0].removeprefix("Figure: ").removesuffix(".") + mark
    return found


def agrees(text: str, measured: ArrayLike, expected: ArrayLike, stderr: ArrayLike) -> Claim:
    """Claim that every Monte Carlo estimate is within `Z_LIMIT` standard errors of theory.

    Parameters
    ----------
    text : str
        What is claimed, in words.
    measured, expected, stderr : array_like, shape (n,)
        Estimates, values of the theory, and standard errors of the estimates.

    Returns
    -------
    Claim
        Its number is the largest abs(z).
    """
    difference = np.asarray(measured, dtype=float) - np.asarray(expected, dtype=float)
    z = np.atleast_1d(difference / np.asarray(stderr, dtype=float))
    worst = float(np.abs(z).max())
    rule = f"largest |z| of {z.size} comparisons < {Z_LIMIT:g}"
    return Claim(text, worst, rule, worst < Z_LIMIT)


def estimate(text: str, measured: float, expected: float, stderr: float) -> Claim:
    """Claim that one Monte Carlo estimate agrees with theory within `Z_LIMIT` errors.

    Parameters
    ----------
    text : str
        What is claimed, in words.
    measured, expected, stderr : float
        Estimate, value of the theory, standard error of the estimate.

    Returns
    -------
    Claim
        Its number is the estimate.
    """
    rule = f"{expected:.4g} within {Z_LIMIT:g} standard errors ({stderr:.2g})"
    return Claim(text, float(measured), rule, bool(abs(measured - expected) < Z_LIMIT * stderr))


def close(text: str, measured: float, expected: float, tolerance: float) -> Claim:
    """Claim that a number is close to its expected value.

    Parameters
    ----------
    text : str
        What is claimed, in words.
    measured, expected : float
    tolerance : float
        Largest difference, relative to `expected`.

    Returns
    -------
    Claim
        Its number is `measured`.
    """
    rule = f"{expected:.4g} within {tolerance:.2g} of it"
    error = abs(measured - expected)
    return Claim(text, float(measured), rule, bool(error <= tolerance * abs(expected)))


def identical(text: str, measured: ArrayLike, expected: ArrayLike, limit: float = 1e-12) -> Claim:
    """Claim that two exact results agree up to rounding.

    Parameters
    ----------
    text : str
        What is claimed, in words.
    measured, expected : array_like
        Two results of one shape; `expected` is not 0.
    limit : float
        Largest relative difference.

    Returns
    -------
    Claim
        Its number is the largest relative difference.
    """
    expected = np.asarray(expected, dtype=float)
    worst = float(np.max(np.abs(np.asarray(measured, dtype=float) / expected - 1.0)))
    return Claim(text, worst, f"largest relative difference <= {limit:g}", worst <= limit)


def between(text: str, measured: float, low: float, high: float) -> Claim:
    """Claim that low <= measured <= high.

    Parameters
    ----------
    text : str
        What is claimed, in words.
    measured : float
    low, high : float
        Bounds; an infinite one is not stated in the rule.

    Returns
    -------
    Claim
        Its number is `measured`.
    """
    parts = [f">= {low:.4g}"] * math.isfinite(low) + [f"<= {high:.4g}"] * math.isfinite(high)
    return Claim(text, float(measured), " and ".join(parts), bool(low <= measured <= high))


#: Largest number of updates of one weight in a simulation beside theory: seconds.
QUICK = 2e8


def quick(problem: Problem, members: int, steps: int, replicas: int) -> bool:
    """Whether a simulation is quick enough to stand beside theory.

    Parameters
    ----------
    problem : Problem
    members, steps, replicas : int
        Of the simulation.

    Returns
    -------
    bool
    """
    return problem.directions * members * steps * replicas <= QUICK


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Return the least-squares slope of log y against log x.

    Parameters
    ----------
    x, y : array_like, shape (n,)
        Positive.

    Returns
    -------
    float
    """
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def passed(claims: Iterable[Claim]) -> int:
    """Count the claims that hold.

    Parameters
    ----------
    claims : iterable of Claim

    Returns
    -------
    int
    """
    return sum(claim.passed for claim in claims)

"""Figure: the best constant rate against batch size under four preconditioners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import SGD
from nqm.problems.quadratic import Problem
from paper_repro.study import Claim, Scale, between, slope
from paper_repro.zhang2019.common import (
    EXPONENTS,
    bound,
    curved,
    curves,
    fewest,
    model,
    on_target,
    over_bound,
    powers_of_two,
    preconditioned,
    turning_point,
)

TITLE = "Zhang et al. 2019: best learning rate against batch size"
SUMMARY = (
    "The constant rate that meets the target in the fewest steps (a) grows in proportion to the "
    "batch until it nears the stability edge 2, and a stronger preconditioner h^-g keeps it "
    "growing to larger batches; (b) has the steps that go with it. Rates are on a grid 3 % apart, "
    "four times as fine as the published one."
)


@dataclass(frozen=True)
class Settings:
    """Preconditioners h^-g; the published range of rates."""

    directions: int = 10_000
    exponents: tuple[float, ...] = EXPONENTS
    target: float = 0.01
    batch_sizes: tuple[int, ...] = powers_of_two(2, 21)
    lowest_lr: float = 1e-5
    highest_lr: float = 10**0.5
    rates: int = 400


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, batch sizes and rates.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(directions=200, batch_sizes=powers_of_two(2, 20, 2), rates=200)
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the best constant rate under every preconditioner, and the bound.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row per ``exponent`` and ``batch_size``, and rows of the bound.
    """
    return compute_on(model(settings(scale).directions), scale)


def compute_on(problem: Problem, scale: Scale) -> pd.DataFrame:
    """Compute the table on another problem, in its own units.

    Parameters
    ----------
    problem : Problem
        With additive noise. Rates are in units of 1 / its largest curvature, the target is the same
        share of its loss at the start; directions without curvature are left out.
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        As `compute` returns it.
    """
    s, problem = settings(scale), curved(problem)
    target, sharpest = on_target(problem, s.target, s.directions), problem.curvature.max()
    rates = np.geomspace(s.lowest_lr, s.highest_lr, s.rates) / sharpest
    problems = preconditioned(problem, s.exponents)
    found = fewest(problems, s.exponents, [SGD()], [0.0], rates, s.batch_sizes, target)
    table = pd.concat([found, bound(problem, target, s.batch_sizes)], ignore_index=True)
    return table.assign(lowest_lr=s.lowest_lr / sharpest, edge=2.0 / sharpest)


def draw(table: pd.DataFrame) -> Figure:
    """Draw best rates and fewest steps against batch size.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        Two panels.
    """
    with context():
        figure = new_figure(PAGE, 2.9)
        axes = figure.subplots(1, 2)
        panels.best_rates(table, ax=axes[0])
        panels.steps(table.assign(series="SGD").where(table["kind"] != "bound", table), ax=axes[1])
        panel_letters(list(axes))
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check linear scaling, saturation, and the effect of preconditioning.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    exact = table[(table["kind"] == "exact") & (table["status"] == "reached")]
    inside = exact[exact["lr"] > 1.02 * exact["lowest_lr"]]  # not at the end of the search
    by = curves(inside, "exponent")
    plain, strongest = by[min(by)], by[max(by)]
    turn = {g: turning_point(rows) for g, rows in by.items()}
    slopes = [slope(rows["batch_size"][:4], rows["lr"][:4]) for rows in by.values()]
    return [
        between("rate in proportion to the batch: smallest slope of the four smallest batches",
                min(slopes), 0.85, 1.15),
        between("the same, largest slope", max(slopes), 0.85, 1.15),
        between("SGD's rate at the largest batch (edge 2)", float(plain["lr"].iloc[-1]), 1.7, 2.0),
        between("smallest ratio of turning points (examples / steps), stronger over weaker",
                min(turn[b] / turn[a] for a, b in zip(sorted(turn), sorted(turn)[1:],
                                                      strict=False)), 1.5, np.inf),
        between("fewest steps at the largest batch, SGD over the strongest preconditioner",
                float(plain["step"].iloc[-1] / strongest["step"].iloc[-1]), 5.0, np.inf),
        between("no steps below n / (2 C B): smallest ratio",
                over_bound(table), 1.0, np.inf),
    ]  # fmt: skip

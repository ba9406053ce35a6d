"""Figure: steps against batch size with and without an exponential average of the iterates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import context, new_figure
from nqm.algorithms import EMA, SGD
from nqm.problems.quadratic import Problem
from nqm.program import constant
from nqm.solvers.moments import solve
from paper_repro.study import Claim, Scale, between, identical
from paper_repro.zhang2019.common import (
    bound,
    curved,
    fewest,
    model,
    on_target,
    over_bound,
    powers_of_two,
    slow_momenta,
    turning_point,
)

TITLE = "Zhang et al. 2019: exponential moving average"
SUMMARY = (
    "Averaging the iterates of SGD saves a factor of six in examples at small batches and nothing "
    "at large ones, where noise is no limit: it reaches the fewest steps at a smaller batch. Its "
    "average starts at the first iterate and is not normalised by its weights."
)


@dataclass(frozen=True)
class Settings:
    """The published grids: 100 rates, 20 decays with 1 - decay from 1 to 1e-5."""

    directions: int = 10_000
    target: float = 0.01
    batch_sizes: tuple[int, ...] = powers_of_two(2, 20, 2)
    lowest_lr: float = 1e-8
    highest_lr: float = 10.0
    rates: int = 100
    decays: int = 20


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, rates and decays.

    Returns
    -------
    Settings
    """
    return Settings(directions=200, rates=60, decays=10) if scale is Scale.SMOKE else Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the fewest steps to the target with and without EMA.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row per method (``series``) and batch size (kind ``exact``), rows of the bound, and the
        direct solution of one winner (kind ``solved``).
    """
    problem = model(settings(scale).directions)
    table = compute_on(problem, scale)
    winner = (table["series"] == "EMA") & (table["batch_size"] == 256)
    return pd.concat([table, _solved(problem, table[winner])], ignore_index=True)


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
        As `compute` returns it; without the direct solution.
    """
    s, problem = settings(scale), curved(problem)
    target = on_target(problem, s.target, s.directions)
    rates = np.geomspace(s.lowest_lr, s.highest_lr, s.rates) / problem.curvature.max()
    decays = slow_momenta(s.decays)
    with_ema = fewest([problem], [0.0], [EMA(decay=float(b)) for b in decays], list(decays),
                      rates, s.batch_sizes, target)  # fmt: skip
    plain = fewest([problem], [0.0], [SGD()], [0.0], rates, s.batch_sizes, target)
    frames = [
        with_ema.assign(series="EMA"),
        plain.assign(series="SGD"),
        bound(problem, target, s.batch_sizes),
    ]
    return pd.concat(frames, ignore_index=True)


def _solved(problem: Problem, rows: pd.DataFrame) -> pd.DataFrame:
    """The crossing of one winner by the library's general solver."""
    (row,) = rows.to_dict("records")
    step = int(row["step"])
    program = constant(EMA(decay=row["momentum"]), row["lr"], step, batch_size=row["batch_size"])
    before, at = solve(problem, program, [step - 1, step]).loss
    return rows.assign(loss=at, loss_before=before, kind="solved", series="EMA")


def draw(table: pd.DataFrame) -> Figure:
    """Draw steps against batch size.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        One panel.
    """
    with context():
        figure = new_figure(4.4, 3.0)
        panels.steps(table[table["kind"] != "solved"], ax=figure.subplots())
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check what averaging saves, and at which batch sizes.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    exact = table[table["kind"] == "exact"].sort_values("batch_size")
    ema, plain = (exact[exact["series"] == name] for name in ("EMA", "SGD"))
    gain = plain["step"].to_numpy() / ema["step"].to_numpy()
    solved = table[table["kind"] == "solved"]
    same = ema[ema["batch_size"] == 256]
    return [
        between("gain at the smallest batch (SGD's steps over EMA's)", float(gain[0]), 3.0, np.inf),
        between("gain at the largest batch", float(gain[-1]), 1.0, 1.05),
        between("the turning point moves to a smaller batch: factor",
                turning_point(ema) / turning_point(plain), 0.0, 0.5),
        between("no steps below n / (2 C B): smallest ratio", over_bound(table), 1.0, np.inf),
        identical("loss at and before the crossing at B = 256: search against the general solver",
                  same[["loss", "loss_before"]], solved[["loss", "loss_before"]], 1e-10),
    ]  # fmt: skip

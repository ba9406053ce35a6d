"""Figure: steps against batch size with and without momentum, under four preconditioners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import context, new_figure
from nqm.algorithms import HeavyBall
from nqm.problems.quadratic import Problem
from paper_repro.study import Claim, Scale, between
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
    slow_momenta,
    turning_point,
)

TITLE = "Zhang et al. 2019: momentum and preconditioning"
SUMMARY = (
    "Heavy-ball momentum saves little at small batches and a factor of dozens at large ones, where "
    "SGD (dashed) has stopped gaining; preconditioning saves examples at small batches and steps "
    "at large ones. For each of the 8000 settings of preconditioner, rate and momentum what counts "
    "is the first crossing, so that a swing below the target is one."
)


@dataclass(frozen=True)
class Settings:
    """The published grids: 100 rates, 20 momenta with 1 - mu from 1 to 1e-5."""

    directions: int = 10_000
    exponents: tuple[float, ...] = EXPONENTS
    target: float = 0.01
    batch_sizes: tuple[int, ...] = powers_of_two(2, 20, 2)
    lowest_lr: float = 1e-8
    highest_lr: float = 10.0
    rates: int = 100
    momenta: int = 20


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, preconditioners, rates and momenta.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(directions=200, exponents=(0.0, 0.5), rates=60, momenta=10)
    return Settings()


def searched(problem: Problem, s: Settings) -> pd.DataFrame:
    """Search the best settings of heavy ball (momentum 0 included) and of SGD.

    Parameters
    ----------
    problem : Problem
        All curvatures are > 0; see `compute_on` for its units.
    s : Settings
        Grids, target and preconditioners.

    Returns
    -------
    DataFrame
        A row per ``series`` (``momentum``, ``SGD``), ``exponent`` and ``batch_size``, as `fewest`
        returns it.
    """
    rates = np.geomspace(s.lowest_lr, s.highest_lr, s.rates) / problem.curvature.max()
    problems = preconditioned(problem, s.exponents)
    target = on_target(problem, s.target, s.directions)
    momenta = slow_momenta(s.momenta).tolist()
    frames = []
    for series, choices in (("momentum", momenta), ("SGD", momenta[:1])):
        algorithms = [HeavyBall(mu) for mu in choices]
        found = fewest(
            problems, s.exponents, algorithms, choices, rates, s.batch_sizes, target
        ).assign(series=series)
        frames.append(found)
    return pd.concat(frames, ignore_index=True)


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the fewest steps with and without momentum, and the bound.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row per method (``series``), preconditioner (``exponent``) and batch size, and rows of the
        bound.
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
    lines = bound(problem, on_target(problem, s.target, s.directions), s.batch_sizes)
    return pd.concat([searched(problem, s), lines], ignore_index=True)


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
        figure = new_figure(5.0, 3.3)
        panels.steps(table, ax=figure.subplots())
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check what momentum and preconditioning save, and at which batch sizes.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    exact = table[table["kind"] == "exact"]
    wide = exact.pivot(index=["exponent", "batch_size"], columns="series", values="step")
    gain = wide["SGD"] / wide["momentum"]
    plain = gain.loc[0.0]
    curve = curves(exact, ["series", "exponent"])
    strongest = float(exact["exponent"].max())
    turn = {key: turning_point(rows) for key, rows in curve.items()}
    return [
        between("momentum never needs more steps: smallest gain over SGD", float(gain.min()),
                1.0, np.inf),
        between("small batch (up to 64), plain gradients: largest gain by momentum",
                float(plain.loc[:64].max()), 1.0, 1.25),
        between("largest batch, plain gradients: gain by momentum", float(plain.iloc[-1]),
                5.0, np.inf),
        between("momentum moves the turning point to a larger batch: factor, plain gradients",
                turn["momentum", 0.0] / turn["SGD", 0.0], 3.0, np.inf),
        between("so does the strongest preconditioner alone: factor",
                turn["SGD", strongest] / turn["SGD", 0.0], 3.0, np.inf),
        between("and it saves examples at the smallest batch: factor",
                float(curve["SGD", 0.0]["examples"].iloc[0]
                      / curve["SGD", strongest]["examples"].iloc[0]), 1.5, np.inf),
        between("no steps below n / (2 C B): smallest ratio", over_bound(table), 1.0, np.inf),
        between("loss one step before the crossing over the target, smallest",
                float((exact["loss_before"] / exact["target"]).min()), 1 + 1e-12, np.inf),
    ]  # fmt: skip

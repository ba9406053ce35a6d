"""Figure: steps against batch size with optimised schedules of 10 pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import context, new_figure
from nqm.algorithms import SGD
from nqm.problems.quadratic import Problem
from nqm.tuning import BestSchedule, fewest_steps_piecewise
from nqm.tuning.stability import stability_edge
from paper_repro.study import Claim, Scale, between
from paper_repro.zhang2019.common import (
    EXPONENTS,
    bound,
    curved,
    curves,
    model,
    on_target,
    over_bound,
    powers_of_two,
    preconditioned,
    turning_point,
)

TITLE = "Zhang et al. 2019: steps with optimised schedules"
SUMMARY = (
    "Ten constant pieces, optimised for every batch size, close most of the gap between the best "
    "constant rate (dashed) and the bound n / (2 C B) at small batches and change little at large "
    "ones. Both are free of any grid of rates."
)


@dataclass(frozen=True)
class Settings:
    """SGD under preconditioners h^-g; rates up to 2 / h of the preconditioned problem."""

    directions: int = 10_000
    exponents: tuple[float, ...] = EXPONENTS
    target: float = 0.01
    pieces: int = 10
    batch_sizes: tuple[int, ...] = powers_of_two(2, 20, 2)


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, preconditioners and batch sizes.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        sizes = powers_of_two(2, 20, 6)
        return Settings(directions=200, exponents=(0.0, 0.5), batch_sizes=sizes)
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the fewest steps with optimised schedules and constant rates, and the bound.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row per ``series`` (``schedule``, ``SGD``), ``exponent`` and ``batch_size``, and rows of
        the bound.
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
    target = on_target(problem, s.target, s.directions)
    rows = []
    for g, one in zip(s.exponents, preconditioned(problem, s.exponents), strict=True):
        for size in s.batch_sizes:
            for series, pieces in (("schedule", s.pieces), ("SGD", 1)):
                edge = stability_edge(one, SGD())
                best = fewest_steps_piecewise(one, pieces, size, target, highest_lr=edge)
                rows.append(_row(best, series, g, size))
    found = pd.DataFrame(rows).assign(target=target, kind="exact")
    return pd.concat([found, bound(problem, target, s.batch_sizes)], ignore_index=True)


def _row(best: BestSchedule, series: str, exponent: float, size: int) -> dict[str, object]:
    row = {"series": series, "exponent": exponent, "batch_size": float(size)}
    measured = {"step": float(best.steps), "examples": float(best.steps * size), "loss": best.loss}
    return row | measured | {"first_lr": best.lr[0], "last_lr": best.lr[-1]}


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
    """Check what schedules save, and at which batch sizes.

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
    wide = exact.pivot(index=["exponent", "batch_size"], columns="series", values="step")
    plain = (wide["SGD"] / wide["schedule"]).loc[0.0]
    turn = {key: turning_point(rows) for key, rows in curves(exact, ["series", "exponent"]).items()}
    return [
        between("a schedule never needs more steps: smallest gain",
                float((wide["SGD"] / wide["schedule"]).min()), 1.0, np.inf),
        between("gain at the smallest batch, plain gradients", float(plain.iloc[0]), 2.0, np.inf),
        between("gain at the largest batch, plain gradients", float(plain.iloc[-1]), 1.0, 1.25),
        between("loss at the end over the target, largest",
                float((exact["loss"] / exact["target"]).max()), 0.0, 1.0),
        between("the turning point moves to a smaller batch: factor, plain gradients",
                turn["schedule", 0.0] / turn["SGD", 0.0], 0.0, 0.5),
        between("no steps below n / (2 C B): smallest ratio", over_bound(table), 1.0, np.inf),
    ]  # fmt: skip

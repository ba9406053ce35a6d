"""Figure: the best effective rate lr / (1 - momentum) against batch size."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.problems.quadratic import Problem
from paper_repro.study import Claim, Scale, between, slope
from paper_repro.zhang2019 import momentum
from paper_repro.zhang2019.common import curved, curves, model
from paper_repro.zhang2019.momentum import Settings, searched

TITLE = "Zhang et al. 2019: effective learning rate"
SUMMARY = (
    "With momentum the best effective rate lr / (1 - mu) (a) keeps growing with the batch after "
    "that of SGD (dashed) has met the stability edge; (b) has the momentum that goes with it. Many "
    "pairs of rate and momentum are nearly as good at small batches, hence the steps of the grid."
)


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        Passed to `momentum.settings`: this figure has the same parameters.

    Returns
    -------
    Settings
    """
    return momentum.settings(scale)


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the best effective rate of every method, preconditioner and batch size.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row for each, as `momentum.searched` returns it, with ``effective_lr`` = lr / (1 -
        momentum).
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
    found = searched(curved(problem), settings(scale))
    return found.assign(effective_lr=found["lr"] / (1.0 - found["momentum"]))


def draw(table: pd.DataFrame) -> Figure:
    """Draw effective rates and momenta against batch size.

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
        panels.effective_rates(table, ax=axes[0])
        panels.memories(table[table["series"] == "momentum"], ax=axes[1])
        panel_letters(list(axes))
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check linear scaling, and that the effective rate exceeds 2.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    curve = curves(table, ["series", "exponent"])
    heavy, plain = curve["momentum", 0.0], curve["SGD", 0.0]
    left = 1.0 - heavy["momentum"]
    small = int((plain["batch_size"] <= 64).sum())
    ratio = heavy["effective_lr"].to_numpy() / plain["effective_lr"].to_numpy()
    middle = heavy["batch_size"] <= 2**14
    return [
        between("effective rate in proportion to the batch up to 2^14 (momentum): slope",
                slope(heavy["batch_size"][middle], heavy["effective_lr"][middle]), 0.7, 1.1),
        between("SGD's best rate stays below the edge 2", float(plain["effective_lr"].max()),
                0.0, 2.0),
        between("largest effective rate with momentum over SGD's",
                float(heavy["effective_lr"].max() / plain["effective_lr"].max()), 5.0, np.inf),
        between("at small batches (up to 64) the two effective rates agree: largest ratio",
                float(ratio[:small].max()), 0.5, 2.0),
        between("memory 1 / (1 - mu) is shorter at a larger batch: last over first",
                float(left.iloc[0] / left.iloc[-1]), 0.0, 0.1),
    ]  # fmt: skip

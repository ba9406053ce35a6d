"""Loss over ensemble size and learning rate, at fixed cycles and at a fixed number of examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import rate_map as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import LatePhase
from nqm.problems.quadratic import Problem
from nqm.problems.spectra import harmonic
from nqm.program import constant
from nqm.solvers.scan import scan
from nqm.tuning.constant_lr import best_lr
from nqm.tuning.stability import stability_edge
from paper_repro.study import Claim, Scale, between, identical

TITLE = "Loss over ensemble size and learning rate"
SUMMARY = (
    "At a fixed number of cycles (a) more members always help, because every member brings its own "
    "examples; at a fixed number of examples (b, c) the best loss of each column rises with K, as "
    "it does for large minibatches. The stable range ends at eta h = 1 when the base gradient is "
    "the mean over members (gamma = 1/K), and shrinks as 2 / (1 + K) when it is the sum (gamma = "
    "1); dots mark the best rate for each K."
)

PANELS = {
    "cycles": ("1/K", "fixed cycles, $\\gamma = 1/K$"),
    "examples": ("1/K", "fixed examples, $\\gamma = 1/K$"),
    "examples, sum": ("1", "fixed examples, $\\gamma = 1$"),
}


@dataclass(frozen=True)
class Settings:
    """h_i = 1/i, C = H, start N(0, I), B = 1, eta_phi = eta_theta = lr, from the first step."""

    directions: int = 200
    members: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    cycles: int = 256
    examples: int = 16384
    lowest_lr: float = 1e-3
    highest_lr: float = 2.0
    rates: int = 70


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, ensemble sizes and rates.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(directions=30, members=(1, 4, 16, 64), rates=28)
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute exact losses on the grid, best rates and stability edges.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        Rows of kind ``exact`` (a cell of the grid; ``loss`` is NaN at and above the edge), ``best``
        (the best rate of a column) and ``edge`` (``lr`` is the stability edge), by ``panel``,
        ``members``, ``gamma_rule`` and ``lr``.
    """
    h = harmonic(settings(scale).directions)
    return compute_on(Problem(h, h), scale)


def compute_on(problem: Problem, scale: Scale) -> pd.DataFrame:
    """Compute the table on another problem; rates are in units of 1 / its largest curvature.

    Parameters
    ----------
    problem : Problem
        With additive noise.
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        As `compute` returns it.
    """
    s, sharpest = settings(scale), float(problem.curvature.max())
    s = replace(s, lowest_lr=s.lowest_lr / sharpest, highest_lr=s.highest_lr / sharpest,
                directions=problem.directions)  # fmt: skip
    rates = np.geomspace(s.lowest_lr, s.highest_lr, s.rates)
    frames: list[pd.DataFrame] = []
    for panel, (rule, _) in PANELS.items():
        for k in s.members:
            late = LatePhase(k, 1.0 / k if rule == "1/K" else 1.0)
            steps = s.cycles if panel == "cycles" else s.examples // k
            edge = stability_edge(problem, late)
            found = scan(problem, late, rates, steps)
            loss = np.where(found.lr < edge, found.loss, np.nan)
            best = best_lr(problem, _runs(late, steps), s.lowest_lr / 10, 0.999 * edge, points=25)
            parts: list[tuple[str, Any, Any]] = [
                ("exact", rates, loss),
                ("best", [best.lr], [best.loss]),
                ("edge", [edge], [np.nan]),
            ]
            for kind, lr, value in parts:
                frame = pd.DataFrame({"lr": lr, "loss": value, "kind": kind})
                frames.append(frame.assign(panel=panel, members=k, gamma_rule=rule, steps=steps))
    table = pd.concat(frames, ignore_index=True)
    fixed = {"directions": s.directions, "batch_size": 1, "initial_loss": problem.initial_loss}
    return table.assign(**fixed)


def _runs(late: LatePhase, steps: int) -> Any:
    return lambda lr: constant(late, lr, steps)


def draw(table: pd.DataFrame) -> Figure:
    """Draw one map per panel, on one colour scale.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        Three panels and a colour bar.
    """
    with context():
        figure = new_figure(PAGE, 2.8)
        axes = figure.subplots(1, 3, sharey=True)
        # Cells next to the edge may be far above the start's loss; they take the last colour.
        grid = table[table["kind"] == "exact"]
        limits = (float(grid["loss"].min()), float(grid["initial_loss"].iloc[0]))
        for ax, (panel, (_, title)) in zip(axes, PANELS.items(), strict=True):
            panels.rate_map(table[table["panel"] == panel], limits=limits, ax=ax)
            ax.set_title(title)
        for ax in axes[1:]:
            ax.set_ylabel("")
        figure.colorbar(
            axes[0].collections[0], ax=list(axes), label="expected loss", pad=0.01, extend="max"
        )
        panel_letters(list(axes))
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check edges and best rates (the largest curvature is 1).

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    edge = table[table["kind"] == "edge"]
    closed = np.where(edge["gamma_rule"] == "1/K", 1.0, 2.0 / (1.0 + edge["members"]))
    best = table[table["kind"] == "best"].set_index(["panel", "members"])["loss"]
    grid = table[table["kind"] == "exact"].groupby(["panel", "members"])["loss"].min()
    step = {panel: best[panel].sort_index().to_numpy() for panel in PANELS}
    return [
        identical("stability edge = 2 / (h (1 + gamma K))", edge["lr"], closed, 1e-9),
        between("best rate found / best on the grid, largest over all columns",
                float((best / grid).max()), 0.0, 1.0),
        between("fixed cycles: largest ratio of best losses, K doubled or more over K before",
                float((step["cycles"][1:] / step["cycles"][:-1]).max()), 0.0, 1.0),
        between("fixed examples: smallest ratio of best losses, K > 1 over K = 1",
                float((step["examples"][1:] / step["examples"][0]).min()), 1.0, np.inf),
        identical("fixed examples: the best loss does not depend on gamma (same lambda)",
                  step["examples"], step["examples, sum"], 1e-6),
    ]  # fmt: skip

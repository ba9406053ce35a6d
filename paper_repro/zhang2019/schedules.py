"""Figure: the best schedule of 50 constant pieces for nine batch sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import SGD
from nqm.problems.quadratic import Problem
from nqm.program import Phase, Program
from nqm.solvers.moments import solve
from nqm.tuning import best_piecewise, fewest_steps_piecewise
from nqm.tuning.stability import stability_edge
from paper_repro.study import Claim, Scale, between, identical
from paper_repro.zhang2019.common import curved, model, on_target, powers_of_two

TITLE = "Zhang et al. 2019: optimised learning-rate schedules"
SUMMARY = (
    "Rates of 50 equal pieces that meet the target in the fewest steps, for nine batch sizes, "
    "against training time (a) and its share (b): a larger batch holds the highest stable rate "
    "longer and decays later. Rates are found by exact gradients of the expected loss; what is "
    "reported is a local optimum."
)


@dataclass(frozen=True)
class Settings:
    """Plain SGD; rates up to 2 / h."""

    directions: int = 10_000
    target: float = 0.01
    pieces: int = 50
    batch_sizes: tuple[int, ...] = powers_of_two(4, 12)


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, pieces and batch sizes.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(directions=200, pieces=10, batch_sizes=powers_of_two(4, 12, 4))
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the best schedule for every batch size.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row per batch size and piece: ``begin``, ``length`` (steps) and ``lr`` of the piece;
        ``step``, ``loss``, ``direct`` (loss by the general solver), ``loss_before`` (best loss in
        one step fewer) and ``constant_step`` of the batch size.
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
    edge = stability_edge(problem, SGD())  # the figures are of stable rates
    frames = []
    for size in s.batch_sizes:
        best = fewest_steps_piecewise(problem, s.pieces, size, target, highest_lr=edge)
        shorter = best_piecewise(
            problem, s.pieces, best.steps - 1, size, start=best.lr, highest_lr=edge
        )
        constant = fewest_steps_piecewise(problem, 1, size, target, highest_lr=edge)
        program = Program((Phase(SGD(), best.schedule, best.steps, size),))
        direct = solve(problem, program, [best.steps]).loss[0]
        begins = np.cumsum(best.lengths) - best.lengths
        frame = pd.DataFrame({"begin": begins, "length": best.lengths, "lr": best.lr})
        frames.append(frame.assign(
            batch_size=size, step=best.steps, loss=best.loss, direct=direct,
            loss_before=shorter.loss, constant_step=constant.steps,
        ))  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    return table.assign(target=target, directions=problem.directions, kind="exact")


def draw(table: pd.DataFrame) -> Figure:
    """Draw rates against steps, and against the share of training.

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
        axes = figure.subplots(1, 2, sharey=True)
        panels.schedules(table, ax=axes[0])
        panels.schedules(table, share=True, ax=axes[1])
        axes[1].set_ylabel("")
        panel_letters(list(axes))
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check that schedules meet the target, save steps, and decay later at larger batches.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    runs = table.groupby("batch_size").first().sort_index()
    gain = runs["constant_step"] / runs["step"]
    held = table[table["lr"] > 1.0].groupby("batch_size")["length"].sum() / runs["step"]
    held = held.fillna(0.0).sort_index()
    per_run = len(table) / len(runs)
    last = table.groupby("batch_size")["lr"].agg(lambda lr: lr.iloc[-1] / lr.max())
    bound = table["directions"].iloc[0] / (2 * runs["target"] * runs.index)
    return [
        identical("loss by pieces = loss by the general solver", runs["loss"], runs["direct"],
                  1e-10),
        between("loss at the end over the target, largest",
                float((runs["loss"] / runs["target"]).max()), 0.0, 1.0),
        between("best loss found in one step fewer over the target, smallest",
                float((runs["loss_before"] / runs["target"]).min()), 1 + 1e-12, np.inf),
        between("steps at the best constant rate over these, smallest batch",
                float(gain.iloc[0]), 2.0, np.inf),
        between("the same, largest batch", float(gain.iloc[-1]), 1.0, 1.5),
        between("share of steps at a rate above 1 grows with the batch: smallest change, which "
                "may be a piece down", float(held.diff().min()), -1.0 / per_run, 1.0),
        between("from the smallest batch to the largest it grows by",
                float(held.iloc[-1] - held.iloc[0]), 0.2, 1.0),
        between("the last rate is below the highest: largest ratio", float(last.max()), 0.0, 0.9),
        between("no steps below n / (2 C B): smallest ratio", float((runs["step"] / bound).min()),
                1.0, np.inf),
    ]  # fmt: skip

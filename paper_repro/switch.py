"""Expected loss over time through a late-phase switch, beside SGD on the same examples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import over_time as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import SGD, LatePhase
from nqm.problems.quadratic import Problem
from nqm.problems.spectra import harmonic
from nqm.program import Phase, Program
from nqm.solvers.moments import solve
from nqm.solvers.sample import sample
from paper_repro.study import Claim, Scale, agrees, between, identical

TITLE = "Expected loss through a late-phase switch"
SUMMARY = (
    "After the switch at T0 the mean model's variance drops within a few cycles, because each step "
    "now averages K minibatches, while its bias falls more slowly per example than that of SGD "
    "going on (rate lambda = 2 eta once per K minibatches against eta on every one). "
    "The dotted line, SGD at lambda on batch K B, coincides with the mean model: the switch is a "
    "change of rate and batch size."
)


@dataclass(frozen=True)
class Settings:
    """h_i = 1/i, C = H, start at x = 1; gamma = 1/K and eta_phi = eta_theta = lr."""

    directions: int = 100
    lr: float = 0.4
    batch_size: int = 4
    members: int = 10
    switch_step: int = 100
    cycles: int = 100
    marks: int = 8
    replicas: int = 60
    seed: int = 2


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions, cycles, marks and replicas.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(directions=40, cycles=60, marks=5, replicas=30)
    return Settings()


def programs(s: Settings) -> dict[str, Program]:
    """Return the three programs that spend the same examples after T0.

    Parameters
    ----------
    s : Settings
        Rates, batch size, members, and steps before and after T0.

    Returns
    -------
    dict of str to Program
        ``mean model`` (late-phase weights), ``SGD goes on`` (the same rate and batch) and ``SGD,
        lambda, K B``.
    """
    first = Phase(SGD(), s.lr, s.switch_step, s.batch_size)
    late = Phase(LatePhase(s.members, gamma="mean"), s.lr, s.cycles, s.batch_size)
    goes_on = Phase(SGD(), s.lr, s.cycles * s.members, s.batch_size)
    same = Phase(SGD(), 2.0 * s.lr, s.cycles, s.batch_size * s.members)
    return {
        "mean model": Program((first, late)),
        "SGD goes on": Program((first, goes_on)),
        "SGD, lambda, K B": Program((first, same)),
    }


def compute(scale: Scale) -> pd.DataFrame:
    """Compute exact curves and Monte Carlo marks of every program.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        By ``series`` and ``step``: ``examples``, ``loss``, ``bias``, ``variance``, ``stderr``,
        ``kind`` (``exact`` or ``sample``). Series ``SGD to T0`` is the common first phase,
        ``average member`` has the loss of one member.
    """
    h = harmonic(settings(scale).directions)
    return compute_on(Problem(h, h, initial_mean=1.0, initial_variance=0.0), scale)


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
    s = settings(scale)
    s = replace(s, lr=s.lr / float(problem.curvature.max()), directions=problem.directions)
    frames = []
    for index, (series, program) in enumerate(programs(s).items()):
        pace = (program.steps - s.switch_step) // s.cycles
        cycles = np.unique(np.geomspace(1, s.cycles, 80).round().astype(int))
        marked = np.unique(np.geomspace(3, s.cycles, s.marks).round().astype(int))
        before = np.unique(np.geomspace(1, s.switch_step, 40).round().astype(int))
        lines = [0, *before, *(s.switch_step + pace * cycles)]
        points = [*before[8::8], *(s.switch_step + pace * marked)]
        exact = solve(problem, program, lines).table()
        run = sample(problem, program, points, replicas=s.replicas, seed=s.seed * 10 + index)
        both = pd.concat([exact, run.table()])
        late = both["step"] >= s.switch_step
        if index == 0:
            frames.append(both[both["step"] <= s.switch_step].assign(series="SGD to T0"))
            members = both[both["step"] > s.switch_step].assign(series="average member")
            frames.append(
                members.assign(
                    loss=members["member_loss"],
                    bias=np.nan,
                    variance=np.nan,
                    stderr=members["member_stderr"],
                )
            )
        shown = both[late & ((both["kind"] == "exact") | (both["step"] > s.switch_step))]
        frames.append(shown.assign(series=series))
    table = pd.concat(frames, ignore_index=True)
    return table.assign(
        directions=s.directions, lr=s.lr, batch_size=s.batch_size, members=s.members,
        switch_step=s.switch_step, replicas=s.replicas, seed=s.seed,
    )  # fmt: skip


def draw(table: pd.DataFrame) -> Figure:
    """Draw the loss, and its bias and variance.

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
        figure = new_figure(PAGE, 3.0)
        whole, parts = figure.subplots(1, 2)
        # SGD at lambda lies on the mean model: its markers would only cover the others.
        coincides = (table["series"] == "SGD, lambda, K B") & (table["kind"] == "sample")
        panels.switch(table[~coincides], ax=whole)
        whole.set_title("expected loss")
        panels.parts(table, ax=parts)
        parts.set_title("bias and variance")
        panel_letters([whole, parts])
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check the simulation, and the loss after the switch against that of SGD.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    keys = ["series", "examples"]
    exact = table[table["kind"] == "exact"]
    wide = table[table["kind"] == "sample"].merge(exact, on=keys, suffixes=("", "_exact"))
    by = {name: rows.sort_values("examples") for name, rows in exact.groupby("series")}
    late, same, sgd = by["mean model"], by["SGD, lambda, K B"], by["SGD goes on"]
    end, other = late.iloc[-1], sgd.iloc[-1]
    whole = late["bias"] + late["variance"]
    return [
        agrees(
            "simulation of every method against exact moments",
            wide["loss"], wide["loss_exact"], wide["stderr"],
        ),
        identical("late-phase mean model = SGD at lambda on batch K B, at every step",
                  late["loss"], same["loss"]),
        identical("bias + variance = loss", whole, late["loss"]),
        between("variance at the end, late-phase over SGD at equal examples",
                float(end["variance"] / other["variance"]), 0.0, 1.0),
        between("bias at the end, late-phase over SGD at equal examples",
                float(end["bias"] / other["bias"]), 1.0, np.inf),
    ]  # fmt: skip

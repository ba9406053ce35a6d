"""Figure: expected loss over time at five learning rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import figures.zhang2019 as panels
from figures.style import context, new_figure
from nqm.algorithms import SGD
from nqm.problems.quadratic import Problem
from nqm.program import Phase, constant
from nqm.solvers.moments import solve
from nqm.solvers.steady import steady
from paper_repro.study import Claim, Scale, between, close, identical
from paper_repro.zhang2019.common import GUARD, model

TITLE = "Zhang et al. 2019: training curves"
SUMMARY = (
    "Expected loss of SGD at batch size 1 for five constant rates: a larger rate falls faster and "
    "settles on a higher floor. The floors (dotted) are exact; the published notebook adds 1e-8 to "
    "1 - (1 - lr h)^2, which makes the floor of a small rate too low."
)

#: Steps after which who is ahead is claimed.
EARLY = 10


@dataclass(frozen=True)
class Settings:
    """n = 5000, h_i = 1/i, C = H, start N(0, I), B = 1; the five rates are our choice."""

    directions: int = 5000
    batch_size: int = 1
    rates: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01)
    steps: int = 10**7
    guard_directions: int = 10_000
    guard_rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    points: int = 161


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer directions and recorded steps.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(directions=200, points=41, guard_directions=200)
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the expected loss over time at every rate, and the floors.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        Rows of kind ``exact`` (by ``lr`` and ``step``), ``floor`` (the steady loss of a rate,
        ``closed``: in closed form) and ``guard`` (the floor with the notebook's guard).
    """
    return compute_on(model(settings(scale).directions), scale)


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
    at = sorted({0, EARLY} | {int(t) for t in np.geomspace(1, s.steps, s.points)})
    frames = []
    for rate in s.rates:
        lr = rate / sharpest
        path = solve(problem, constant(SGD(), lr, s.steps, batch_size=s.batch_size), at)
        found = path.table()[["step", "loss", "bias", "variance", "kind"]].assign(lr=lr)
        floor = steady(problem, Phase(SGD(), lr, 1, s.batch_size)).loss
        row = {"lr": lr, "loss": floor, "closed": sgd_floor(problem, lr), "kind": "floor"}
        frames += [found, pd.DataFrame([row])]
    wide = model(s.guard_directions)
    frames += [
        pd.DataFrame([{"lr": lr, "closed": floor_of(wide, lr), "kind": "guard",
                       "loss": floor_of(wide, lr, GUARD)}])
        for lr in s.guard_rates
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True).assign(guard_directions=s.guard_directions)


def sgd_floor(problem: Problem, lr: float) -> float:
    """Return the steady loss at B = 1 in closed form, 1/2 sum m lr v / (2 - lr h) over h > 0.

    Parameters
    ----------
    problem : Problem
    lr : float
        Learning rate, below 2 / h.

    Returns
    -------
    float
    """
    h, v, m = problem.curvature, problem.noise_variance, problem.multiplicity
    return 0.5 * float(np.sum(np.where(h > 0.0, m * lr * v / (2.0 - lr * h), 0.0)))


def floor_of(problem: Problem, lr: float, guard: float = 0.0) -> float:
    """Return the steady loss at B = 1, C = H: 1/2 sum u^2 / (1 - (1 - u)^2 + guard).

    Parameters
    ----------
    problem : Problem
        Its curvature h; u = lr h.
    lr : float
        Learning rate, below 2 / h.
    guard : float
        Constant that the published notebook adds, against a division by zero.

    Returns
    -------
    float
    """
    u = lr * problem.curvature
    return 0.5 * float(np.sum(u**2 / (u * (2 - u) + guard)))


def draw(table: pd.DataFrame) -> Figure:
    """Draw the loss against steps, one curve per rate.

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
        figure = new_figure(4.6, 2.9)
        panels.training_curves(table, ax=figure.subplots())
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check the floors, their order, and the effect of the guard.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    floor = table[table["kind"] == "floor"].sort_values("lr", ascending=False)
    path = table[table["kind"] == "exact"]
    last = path[path["step"] == path["step"].max()].sort_values("lr", ascending=False)
    early = path[path["step"] == EARLY].sort_values("lr", ascending=False)["loss"]
    guard = table[table["kind"] == "guard"].sort_values("lr")
    low = 1.0 - guard["loss"].to_numpy() / guard["closed"].to_numpy()
    found = [
        identical("floor = 1/2 sum u / (2 - u) with u = lr h",
                  floor["loss"], floor["closed"], 1e-10),
        identical("loss at the end = floor, for rates of at least 0.1",
                  last["loss"].iloc[:3], floor["loss"].iloc[:3], 1e-9),
        between("a larger rate has the higher floor: smallest ratio of neighbours",
                float((floor["loss"].to_numpy()[:-1] / floor["loss"].to_numpy()[1:]).min()),
                2.0, np.inf),
        between("and is ahead after 10 steps, below the noisiest two: smallest ratio of neighbours",
                float((early.to_numpy()[3:] / early.to_numpy()[2:-1]).min()), 1.0, np.inf),
        between("the notebook's guard lowers every floor: least share", float(low.min()), 1e-6, 1),
    ]  # fmt: skip
    if int(table["guard_directions"].iloc[0]) == 10_000:
        found += [
            close(f"share lost to the guard at lr = {lr:g}, {float(share):.2g} as measured on the "
                  "notebook's formula", measured, float(share), 0.06)
            for lr, measured, share in zip(guard["lr"], low, ("0.18", "0.041", "0.005"),
                                           strict=True)
        ]  # fmt: skip
    return found

"""Scaling laws of one-pass least squares: model size by compute, and the start of a decay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures.scaling import decay_start, frontier
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import SGD
from nqm.problems.least_squares import power_law
from nqm.problems.random_features import random_features
from nqm.program import Phase, Program, constant
from nqm.schedule import WarmupStableDecay
from nqm.solvers.least_squares.moments import solve, steady
from nqm.solvers.least_squares.sample import sample
from paper_repro.study import Claim, Scale, agrees, between, close

TITLE = "Scaling laws of one-pass least squares"
SUMMARY = (
    "With power-law random features every model size saturates at what it cannot express, so the "
    "best size grows with the compute (left). How long a warmup-stable-decay schedule should "
    "decay is set by the noise of the labels: not at all without any, from the start with much "
    "of it (right)."
)


@dataclass(frozen=True)
class Settings:
    """h_j = j^(-2 alpha), target j^(-beta); plain SGD."""

    alpha: float = 1.0
    beta: float = 0.7
    batch_size: int = 4
    hidden: int = 500
    features: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    lr: float = 0.4
    steps: int = 4000
    directions: int = 200
    noises: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1)
    peak: float = 0.5
    horizon: int = 1000
    shares: int = 20
    replicas: int = 400
    seed: int = 0


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer features, directions, steps and decay lengths.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(features=(4, 8, 16), steps=1000, directions=60, horizon=200, shares=5)
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the curves of both panels, and Monte Carlo of the smallest model.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        Rows of ``panel`` ``frontier`` (by ``features`` and ``step``: ``compute``, ``loss`` with the
        irreducible part, ``floor``, the steady loss) and ``decay`` (by ``noise`` and ``decay``, the
        share of the steps in the decay: final ``loss``).
    """
    s = settings(scale)
    at = np.unique(np.geomspace(1, s.steps, 60).astype(int)).tolist()
    frames = []
    for size in s.features:
        problem = random_features(size, s.hidden, s.alpha, s.beta, seed=s.seed)
        program = constant(SGD(), s.lr, s.steps, batch_size=s.batch_size)
        runs = [solve(problem, program, at).table()]
        if size == s.features[0]:
            marks = [step for step in at if step <= 100][::6]
            short = constant(SGD(), s.lr, 100, batch_size=s.batch_size)
            runs.append(sample(problem, short, marks, replicas=s.replicas, seed=s.seed).table())
        run = pd.concat(runs)
        floor, phase = problem.irreducible_loss, program.phases[0]
        frames.append(
            run.assign(
                panel="frontier",
                features=float(size),
                compute=size * run["examples"],
                loss=run["loss"] + floor,
                floor=floor / (1.0 - steady(problem, phase).kappa),
            )
        )
    for noise in s.noises:
        for share in np.linspace(1 / s.shares, 1.0, s.shares):
            last = round(share * s.horizon)
            rate = WarmupStableDecay(s.peak, s.peak / 1000, 0, s.horizon - last, last)
            program = Program((Phase(SGD(), rate, s.horizon, s.batch_size),))
            problem = power_law(s.directions, s.alpha, s.beta, noise)
            run = solve(problem, program, [s.horizon]).table()
            frames.append(run.assign(panel="decay", noise=noise, decay=share))
    return pd.concat(frames, ignore_index=True).assign(alpha=s.alpha, beta=s.beta, lr=s.lr)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the loss over compute, and the final loss over the length of the decay.

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
        figure = new_figure(PAGE, 2.8)
        left, right = figure.subplots(1, 2)
        size = table[table["panel"] == "frontier"].astype({"features": int})
        frontier(size, ax=left)
        left.set_title("random features")
        decay_start(table[table["panel"] == "decay"], ax=right)
        right.set_title("warmup-stable-decay")
        panel_letters([left, right])
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check Monte Carlo, the floor, the best sizes, and the best lengths of the decay.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    size, decay = (table[table["panel"] == name] for name in ("frontier", "decay"))
    exact = size[size["kind"] == "exact"]
    both = size[size["kind"] == "sample"].merge(exact, on=["features", "step"])
    spent = exact.sort_values("compute")
    best = spent[spent["loss"] <= spent["loss"].cummin()]
    last = exact[exact["features"] == exact["features"].min()].iloc[-1]
    shares = decay.loc[decay.groupby("noise")["loss"].idxmin()].sort_values("noise")["decay"]
    return [
        agrees(
            "drawn inputs against exact moments, smallest model",
            both["loss_x"], both["loss_y"], both["stderr_x"],
        ),
        close("the smallest model ends at what it cannot express / (1 - kappa)",
              float(last["loss"]), float(last["floor"]), 1e-4),
        between("best size at the largest compute over that at the smallest",
                float(best["features"].iloc[-1] / best["features"].iloc[0]), 2.0, np.inf),
        between("smallest increase of the best share of decay from one label noise to the next",
                float(np.diff(shares).min()), 0.0, np.inf),
    ]  # fmt: skip

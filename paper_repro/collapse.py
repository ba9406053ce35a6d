"""Additive late-phase weights are plain SGD at rate lambda with batch K B."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import collapse as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import LatePhase
from nqm.problems.quadratic import FLAT, Problem
from nqm.program import Phase, constant
from nqm.solvers.sample import sample
from nqm.solvers.steady import steady
from paper_repro.study import Claim, Scale, agrees, between, identical, quick

TITLE = "Every late-phase setting lies on one curve"
SUMMARY = (
    "Steady-state loss of the mean model for every combination of ensemble size K, gradient scale "
    "gamma and the two learning rates: scattered against the base learning rate, but one curve "
    "once drawn as loss times K B against lambda = eta_phi + gamma K eta_theta. "
    "That curve is plain SGD at rate lambda on a minibatch of K B, so an advantage seen at a fixed "
    "learning rate is a change of rate and batch size."
)


@dataclass(frozen=True)
class Settings:
    """One curvature; `directions` independent copies of it sharpen the Monte Carlo."""

    curvature: float = 1.0
    noise_variance: float = 1.0
    directions: int = 8
    batch_size: int = 2
    members: tuple[int, ...] = (1, 2, 4, 8, 16)
    gammas: tuple[str, ...] = ("1/K", "1")
    base_lr: tuple[float, ...] = (0.02, 0.08, 0.3)
    member_lr: tuple[float, ...] = (0.02, 0.15, 1.0)
    largest_rate: float = 1.8
    settle: float = 4.0
    replicas: int = 600
    seed: int = 4


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has two ensemble sizes, two member rates and a third of the replicas.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(members=(1, 4), member_lr=(0.15, 1.0), replicas=200)
    return Settings()


def sgd_floor(lr: float, examples: float, problem: Problem) -> float:
    """Return plain SGD's steady-state loss, lr v / (2 (2 - lr h) batch) per direction.

    Parameters
    ----------
    lr : float
        Learning rate, below 2 / h.
    examples : float
        Examples in a minibatch.
    problem : Problem
        Its directions of curvature h > 0 and noise variance v are summed over.

    Returns
    -------
    float
    """
    h = problem.curvature
    loss = lr * problem.noise_variance / (2.0 * (2.0 - lr * h) * examples)
    return float((problem.multiplicity * loss)[h > 0].sum())


def compute(scale: Scale) -> pd.DataFrame:
    """Compute exact and sampled steady states of every stable combination of settings.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        Two rows for each combination (kind ``exact`` and ``sample``): its settings,
        ``effective_lr`` (lambda), ``loss``, ``stderr``, and ``curve``, the loss of plain SGD at
        lambda on batch K B.
    """
    s = settings(scale)
    problem = Problem(np.full(s.directions, s.curvature), s.noise_variance, initial_variance=0.0)
    return compute_on(problem, scale)


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
        As `compute` returns it. Runs are simulated from the minimum, where that is quick.
    """
    s, h = settings(scale), problem.curvature
    unit, curved = float(h.max()), h[h > FLAT * h.max()]
    problem = problem.replace(initial_mean=0.0, initial_variance=0.0, initial_correlation=None)
    rows: list[dict[str, Any]] = []
    cases = product(s.members, s.gammas, s.base_lr, s.member_lr)
    for index, (k, name, base, member) in enumerate(cases):
        gamma = 1.0 / k if name == "1/K" else 1.0
        if member + gamma * k * base > s.largest_rate:
            continue
        lr, member_lr = base / unit, member / unit
        rate = member_lr + gamma * k * lr
        late = LatePhase(k, gamma)
        # |1 - lambda h|^2T and the members' |1 - eta_phi h|^2T fall below e^-2settle.
        slow = min(-np.log(np.abs(1 - u * curved).clip(0.1).max()) for u in (rate, member_lr))
        steps = int(np.ceil(s.settle / slow))
        row = {
            "members": k,
            "gamma_rule": name,
            "lr": lr,
            "member_lr": member_lr,
            "effective_lr": rate,
        }
        row |= {"batch_size": s.batch_size, "curve": sgd_floor(rate, k * s.batch_size, problem)}
        phase = Phase(late, lr, steps, s.batch_size, member_lr)
        rows.append(row | {"kind": "exact", "loss": steady(problem, phase).loss, "stderr": 0.0})
        if not quick(problem, k, steps, s.replicas):
            continue
        program = constant(late, lr, steps, batch_size=s.batch_size, member_lr=member_lr)
        run = sample(problem, program, [steps], replicas=s.replicas, seed=s.seed * 1000 + index)
        rows.append(row | {"kind": "sample", "loss": run.loss[0], "stderr": run.stderr[0]})
    lowest = 0.8 * min(row["effective_lr"] for row in rows)
    for rate in np.geomspace(lowest, 1.94 / unit, 300):
        loss = sgd_floor(rate, 1.0, problem)  # of a batch of K B = 1
        rows.append({"kind": "curve", "effective_lr": rate, "loss": loss, "stderr": 0.0})
    fixed = {"directions": problem.directions, "replicas": s.replicas, "seed": s.seed}
    return pd.DataFrame(rows).assign(**fixed)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the losses before and after the collapse, and their ratio to the curve.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        Three panels.
    """
    with context():
        figure = new_figure(PAGE, 2.9)
        before, after, left = figure.subplots(1, 3)
        panels.scattered(table, ax=before)
        panels.collapsed(table, ax=after)
        panels.remainder(table, ax=left)
        panel_letters([before, after, left])
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check that every setting lies on the curve of SGD.

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
    run = table[table["kind"] == "sample"]
    spread = exact.groupby("lr")["loss"].agg(lambda loss: loss.max() / loss.min())
    return [
        identical(
            f"exact steady state of {len(exact)} settings equals SGD's closed form at "
            "(lambda, K B)",
            exact["loss"], exact["curve"],
        ),
        agrees(
            "literal K-member simulations lie on the same closed form",
            run["loss"], run["curve"], run["stderr"],
        ),
        between(
            "before the collapse: largest over smallest loss at one base learning rate",
            float(spread.min()), 4.0, np.inf,
        ),
    ]  # fmt: skip

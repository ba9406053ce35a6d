"""Multiplicative members: quasi-steady and long-run floors, and how far the first order reaches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import multiplicative as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import MultiplicativeLatePhase
from nqm.problems.quadratic import Problem
from nqm.program import Phase, constant
from nqm.solvers.closure import moment_closure
from nqm.solvers.multiplicative_long_run import balance_point
from nqm.solvers.sample import sample
from nqm.solvers.steady import steady
from paper_repro.control import paired_error
from paper_repro.study import Z_LIMIT, Claim, Scale, between, estimate, slope

TITLE = "Multiplicative members: the floor that comes late, and the reach of the first order"
SUMMARY = (
    "w_k = theta phi_k first settles on the additive floor, which falls like 1/K, but noise slides "
    "theta and phi along theta phi = w* until they balance, and the long-run floor falls only like "
    "K^(-1/2); a moment closure (lines in b) follows the way; larger ensembles take longer, and "
    "K = 16 is still on its way after 60 000 cycles. "
    "The first-order theory errs in proportion to the noise variance (c): at eta = 0.4 by 0.3 % at "
    "v = 1e-3 and 11 % at v = 0.1 for the average member, and less for the mean model."
)


@dataclass(frozen=True)
class Settings:
    """One direction, h = w* = 1; gamma = 1/K, eta_phi = eta_theta = lr, B = 1; start at w*."""

    lr: float = 0.1
    noise_variance: float = 0.02
    members: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    sampled: tuple[int, ...] = (1, 2, 4, 8, 16)
    cycles: int = 60_000
    long_cycles: int = 240_000
    replicas: int = 192
    bins: int = 14
    closed: int = 60_000  # cycles that the moment closure follows
    error_members: int = 4
    error_lrs: tuple[float, ...] = (0.1, 0.2, 0.4)
    variances: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    error_settle: float = 4.0
    error_window: int = 100
    error_replicas: int = 8_000
    seed: int = 5


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer sampled ensemble sizes, variances, cycles and replicas.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(
            sampled=(1, 2, 4), long_cycles=60_000, closed=2_000, replicas=64, error_lrs=(0.4,),
            variances=(1e-3, 3e-3, 1e-2, 3e-2), error_replicas=2_000,
        )  # fmt: skip
    return Settings()


def compute(scale: Scale) -> pd.DataFrame:
    """Compute floors, losses over time, and errors of the first-order theory.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        Column ``panel`` names the panel of a row. ``floors`` and ``course`` have ``members``,
        ``kind`` (``first_order``, ``long_run`` or one of the samples), ``loss`` and ``stderr``;
        ``error`` has the relative error of the first order as ``loss``, by ``lr``, ``variance`` and
        ``series``.
    """
    s = settings(scale)
    problem = Problem([1.0], s.noise_variance, minimum=1.0, initial_variance=0.0)
    rows: list[dict[str, Any]] = []
    for k in s.members:
        algorithm = MultiplicativeLatePhase(k, gamma="mean")
        quasi = steady(problem, Phase(algorithm, s.lr, 1)).loss
        floor = balance_point(problem, algorithm, s.lr).loss
        row = {"panel": "floors", "members": k, "lr": s.lr, "variance": s.noise_variance}
        rows.append(row | {"kind": "first_order", "loss": quasi, "stderr": 0.0})
        rows.append(row | {"kind": "long_run", "loss": floor, "stderr": 0.0})
        if k in s.sampled:
            course = _course(problem, k, s)
            scaled = {"quasi_steady": quasi, "long_run": floor}
            rows += [row | {"panel": "course", "kind": "sample"} | scaled | one for one in course]
            closed = _closed(problem, k, s)
            rows += [row | {"panel": "course", "kind": "closure"} | scaled | one for one in closed]
            ends = [(course[-1], "sample, long")]
            ends.append((_nearest(course, 300), "sample, short"))
            rows += [row | {"kind": kind} | one for one, kind in ends]
    for i, lr in enumerate(s.error_lrs):
        for j, v in enumerate(s.variances):
            found = paired_error(
                s.error_members, lr, v, settle=int(s.error_settle / lr), window=s.error_window,
                replicas=s.error_replicas, seed=(s.seed, i, j),
            )  # fmt: skip
            row = {"panel": "error", "kind": "sample", "members": s.error_members}
            row |= {"lr": lr, "variance": v, "until": int(s.error_settle / lr) + s.error_window}
            for series, (error, stderr) in found.items():
                rows.append(row | {"series": series, "loss": error, "stderr": stderr})
    return pd.DataFrame(rows).assign(replicas=s.replicas, seed=s.seed)


def _course(problem: Problem, k: int, s: Settings) -> list[dict[str, Any]]:
    """Loss averaged over windows that grow with time; errors from the spread over replicas."""
    cycles = s.long_cycles if k >= 8 else s.cycles
    edges = np.unique(np.geomspace(50, cycles, s.bins + 1).round().astype(int))
    edges = np.unique(np.r_[edges, s.cycles])
    windows = [np.unique(np.linspace(a, b, 60).round().astype(int)) for a, b in pairwise(edges)]
    program = constant(MultiplicativeLatePhase(k, gamma="mean"), s.lr, cycles)
    wanted = np.unique(np.concatenate(windows))
    run = sample(problem, program, wanted.tolist(), replicas=s.replicas, seed=s.seed * 100 + k)
    assert run.samples is not None
    rows = []
    for window in windows:
        each = run.samples[np.isin(run.steps, window)].mean(axis=0)
        stderr = float(each.std(ddof=1) / np.sqrt(each.size))
        rows.append(
            {
                "loss": float(each.mean()),
                "stderr": stderr,
                "step": float(np.sqrt(window[0] * window[-1])),
                "until": int(window[-1]),
            }
        )
    return rows


def _closed(problem: Problem, k: int, s: Settings) -> list[dict[str, Any]]:
    """Loss by the moment closure, at steps that grow with time."""
    at = np.unique(np.geomspace(50, s.closed, 40).round().astype(int))
    program = constant(MultiplicativeLatePhase(k, gamma="mean"), s.lr, int(at[-1]))
    found = moment_closure(problem, program, at.tolist())
    return [
        {"loss": float(loss), "stderr": 0.0, "step": float(step), "until": int(step)}
        for step, loss in zip(at, found.loss, strict=True)
    ]


def _nearest(course: list[dict[str, Any]], step: float) -> dict[str, Any]:
    return min(course, key=lambda row: abs(np.log(row["step"] / step)))


def draw(table: pd.DataFrame) -> Figure:
    """Draw the floors, the losses over time, and the errors of the first order.

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
        axes = figure.subplots(1, 3)
        panels.floors(table[table["panel"] == "floors"], ax=axes[0])
        panels.course(table[table["panel"] == "course"], ax=axes[1])
        panels.first_order_error(table[table["panel"] == "error"], ax=axes[2])
        panel_letters(list(axes))
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check the floors, their exponents in K, and the exponent of the error in the noise variance.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    floors = table[table["panel"] == "floors"]
    by = {kind: rows.set_index("members")["loss"] for kind, rows in floors.groupby("kind")}
    long_run, quasi = by["long_run"], by["first_order"]
    large = long_run[long_run.index >= 16]
    course = table[(table["panel"] == "course") & (table["kind"] == "sample")]
    at_60k = course[course["until"] == 60_000].set_index("members")
    found = [
        between("quasi-steady floor: exponent of K", slope(quasi.index, quasi), -1.001, -0.999),
        between("long-run floor, K from 16 to 64: exponent of K (law: -1/2)",
                slope(large.index, large), -0.56, -0.44),
    ]  # fmt: skip
    for k in (1, 2, 4):
        text = f"K = {k}: simulated E u^2 up to 60 000 cycles against the balance point"
        measured, stderr = 2 * at_60k["loss"][k], 2 * at_60k["stderr"][k]
        found.append(estimate(text, measured, 2 * long_run[k], stderr))
    if 16 in at_60k.index:
        text = "K = 16 at 60 000 cycles, as a fraction of the way from quasi-steady to long-run"
        way = (at_60k["loss"][16] - quasi[16]) / (long_run[16] - quasi[16])
        found.append(between(text, float(way), 0.5, 0.95))
    closed = table[(table["panel"] == "course") & (table["kind"] == "closure")]
    course = course[course["until"] <= closed["until"].max()]
    for k, rows in course.groupby("members"):
        own = closed[closed["members"] == k]
        line = np.interp(np.log(rows["step"]), np.log(own["step"]), own["loss"])
        beyond = np.abs(rows["loss"] / line - 1.0) - Z_LIMIT * rows["stderr"] / line
        text = f"K = {k}: largest error of the moment closure beyond {Z_LIMIT} standard errors"
        found.append(between(text, float(beyond.clip(lower=0.0).max()), 0.0, 0.02))
    errors = table[(table["panel"] == "error") & (table["series"] == "average member")]
    for lr, rows in errors[errors["variance"].between(9e-4, 1.1e-2)].groupby("lr"):
        text = f"average member, eta = {lr:g}: exponent of v in the first order's relative error"
        found.append(between(text, slope(rows["variance"], rows["loss"].abs()), 0.85, 1.15))
    small = table[(table["panel"] == "error") & (table["variance"] <= 1.1e-3)]
    text = "largest relative error of the first order for v <= 1e-3"
    found.append(between(text, float(small["loss"].abs().max()), 0.0, 0.01))
    return found

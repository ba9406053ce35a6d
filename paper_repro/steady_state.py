"""Steady-state expected loss against ensemble size, additive and multiplicative side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import floors as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import SGD, Ensemble, LatePhase, MultiplicativeLatePhase
from nqm.problems.quadratic import FLAT, Problem
from nqm.problems.spectra import harmonic
from nqm.program import Phase, constant
from nqm.solvers.multiplicative_long_run import balance_point
from nqm.solvers.sample import sample
from nqm.solvers.steady import steady
from paper_repro.study import Claim, Scale, agrees, between, close, identical, quick

TITLE = "Steady-state loss against ensemble size"
SUMMARY = (
    "At a fixed learning rate eta the mean model's steady loss falls like 1/K, and so does that of "
    "the mean of K independent runs (or, the same thing at steady state, of SGD at eta on a K-fold "
    "minibatch), while the average member's falls only towards the loss of SGD at equal data (rate "
    "eta, batch B, K steps in place of one), which does not depend on K; SGD on batch K B at "
    "lambda = eta_phi + gamma K eta_theta, here 2 eta, coincides with the mean model. "
    "Multiplicative members follow the same lines to first order in the noise, until their balance "
    "drifts to the long-run floors (dotted), higher for the mean model and lower for its members."
)


@dataclass(frozen=True)
class Settings:
    """gamma = 1/K and eta_phi = eta_theta = lr, so lambda = 2 lr; B = 1; w* = 1 throughout."""

    directions: int = 8
    noise_scale: float = 0.004
    minimum: float = 1.0
    lrs: tuple[float, ...] = (0.05, 0.15, 0.45)
    compared_lr: float = 0.15
    members: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    settle: float = 3.0
    replicas: int = 600
    seed: int = 1


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has fewer ensemble sizes, rates and replicas.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(members=(1, 4, 16), lrs=(0.15, 0.45), replicas=150)
    return Settings()


def steps_for(lr: float, problem: Problem, s: Settings) -> int:
    """Return the cycles that reduce the start to e^(-2 settle) in the flattest direction.

    Parameters
    ----------
    lr : float
        Learning rate of base and members.
    problem : Problem
        Its least curvature > 0 is that of the flattest direction.
    s : Settings
        Its ``settle``.

    Returns
    -------
    int
    """
    h = problem.curvature
    return int(np.ceil(s.settle / (lr * h[h > FLAT * h.max()].min())))


def _cases(lr: float, k: int) -> Iterator[tuple[str, str, Any, float, int]]:
    """(model, series, algorithm, rate, batch size) of everything compared at one (lr, K)."""
    yield "additive", "mean model", LatePhase(k, gamma="mean"), lr, 1
    yield "multiplicative", "mean model", MultiplicativeLatePhase(k, gamma="mean"), lr, 1
    yield "both", "K runs", Ensemble(k), lr, 1
    yield "both", "SGD, lr, K B", SGD(), lr, k
    yield "both", "SGD, lambda, K B", SGD(), 2.0 * lr, k
    yield "both", "SGD, equal data", SGD(), lr, 1


def compute(scale: Scale) -> pd.DataFrame:
    """Compute steady states of every method for every (lr, K), by theory and Monte Carlo.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        By ``model`` (``additive``, ``multiplicative``, ``both``), ``series``, ``members`` and
        ``lr``: ``loss``, ``stderr`` and ``kind`` (``exact``, ``first_order``, ``long_run`` or
        ``sample``).
    """
    s = settings(scale)
    h = harmonic(s.directions)
    problem = Problem(h, s.noise_scale * h, minimum=s.minimum, initial_variance=0.0)
    table = _table(problem, s, ("additive", "multiplicative", "both"))
    return table.assign(noise_scale=s.noise_scale, minimum=s.minimum)


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
        As `compute` returns it, without multiplicative members, whose first order needs noise that
        is small beside the minimum. Runs are simulated from the minimum, where that is quick.
    """
    s, unit = settings(scale), float(problem.curvature.max())
    s = replace(s, lrs=tuple(lr / unit for lr in s.lrs), compared_lr=s.compared_lr / unit)
    settled = problem.replace(initial_mean=0.0, initial_variance=0.0, initial_correlation=None)
    return _table(settled, s, ("additive", "both"))


def _table(problem: Problem, s: Settings, models: tuple[str, ...]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    seed = s.seed * 1000
    for lr in s.lrs:
        for k in s.members:
            for model, series, algorithm, rate, batch in _cases(lr, k):
                members = series == "mean model"
                if model not in models:
                    continue
                if not members and series != "SGD, lambda, K B" and lr != s.compared_lr:
                    continue
                seed += 1
                row = {
                    "model": model,
                    "series": series,
                    "members": k,
                    "lr": lr,
                    "effective_lr": rate,
                }
                row |= {"batch_size": batch, "steps": 0}
                exact = steady(problem, Phase(algorithm, rate, 1, batch))
                found = {"mean model": exact.loss, "average member": exact.member_loss}
                rows += _rows(row, str(exact.kind), found, (0.0, 0.0), members)
                if series == "SGD, lambda, K B" and lr != s.compared_lr:
                    continue
                steps = steps_for(lr, problem, s)
                if not quick(problem, k, steps, s.replicas):
                    continue
                program = constant(algorithm, rate, steps, batch_size=batch)
                run = sample(problem, program, [steps], replicas=s.replicas, seed=seed)
                found = {"mean model": run.loss[0], "average member": run.member_loss[0]}
                errors = (float(run.stderr[0]), float(run.member_stderr[0]))
                rows += _rows(row | {"steps": steps}, "sample", found, errors, members)
                if model == "multiplicative":
                    point = balance_point(problem, algorithm, lr)
                    found = {"mean model": point.loss, "average member": point.member_loss}
                    rows += _rows(row, "long_run", found, (0.0, 0.0), members)
    table = pd.DataFrame(rows).assign(directions=problem.directions)
    return table.assign(replicas=s.replicas, seed=s.seed)


def _rows(
    row: dict[str, Any],
    kind: str,
    found: dict[str, float],
    errors: tuple[float, float],
    members: bool,
) -> list[dict[str, Any]]:
    """One row for the mean model, and one for the average member where there are members."""
    both = [
        row | {"series": series, "kind": kind, "loss": float(loss), "stderr": error}
        for (series, loss), error in zip(found.items(), errors, strict=True)
    ]
    return both if members else [both[0] | {"series": row["series"]}]


def draw(table: pd.DataFrame) -> Figure:
    """Draw mean models by rate, simulation over theory, and all methods at one rate.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        Six panels; three if there are no multiplicative members.
    """
    models = [name for name in ("additive", "multiplicative") if (table["model"] == name).any()]
    with context():
        figure = new_figure(PAGE if len(models) > 1 else 4.6, 6.4)
        axes = figure.subplots(
            3, len(models), sharex=True, sharey="row", height_ratios=(3, 1.6, 3), squeeze=False
        )
        for model, column in zip(models, axes.T, strict=True):
            panels.by_rate(table[table["model"] == model], ax=column[0])
            column[0].set_title(f"{model}: mean model")
            panels.ratio(table[table["model"] == model], ax=column[1])
            lr = float(table.loc[table["series"] == "K runs", "lr"].iloc[0])
            own = table["model"].isin([model, "both"]) & (table["lr"] == lr)
            panels.compared(table[own], ax=column[2])
            column[2].set_title(rf"{model}, all methods at $\eta$ = {lr:.3g}")
        handles, labels = axes[2, -1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(models) + 1)
        panel_letters(list(axes.flat))
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        for ax in axes[:2].flat:
            ax.set_xlabel("")
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check simulation against theory, and identities between the methods.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    keys = ["model", "series", "members", "lr"]
    wide = table[table["kind"] == "sample"].merge(
        table[table["kind"].isin(["exact", "first_order"])], on=keys, suffixes=("", "_theory")
    )
    linear = wide[wide["model"] != "multiplicative"]
    product = wide[wide["model"] == "multiplicative"]
    exact = table[table["kind"] == "exact"].set_index(keys)["loss"].sort_index()
    late, sgd = exact["additive", "mean model"], exact["both", "SGD, lambda, K B"]
    runs, batch = exact["both", "K runs"], exact["both", "SGD, lr, K B"]
    lr, largest = float(min(table["lr"])), int(max(table["members"]))
    one = exact["both", "SGD, equal data", 1]
    return [
        agrees(
            "additive late-phase, K runs and SGD: simulation against exact theory",
            linear["loss"], linear["loss_theory"], linear["stderr"],
        ),
        identical("mean model = SGD at lambda on batch K B", late, sgd),
        identical("mean of K runs = SGD at eta on batch K B, at steady state", runs, batch),
        close(
            f"K x (mean model at K = {largest}) / (mean model at K = 1), eta = {lr:g}",
            float(late[largest, lr] / late[1, lr]) * largest, 1.0, 1e-12,
        ),
        between(
            "late-phase at K = 2 over SGD at eta and equal data (break-even is near K = 2)",
            float(late[largest, one.index[0]] * largest / 2 / one.iloc[0]), 1.0, 1.2,
        ),
        between(
            "multiplicative, noise small and run short: mean of simulation / first order",
            float((product["loss"] / product["loss_theory"]).mean()), 0.95, 1.05,
        ),
    ]  # fmt: skip

"""Every method at equal data: the same examples, the same minibatch, its own best rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from figures import ranking as panels
from figures.style import PAGE, context, new_figure
from nqm.algorithms import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Algorithm,
    Ensemble,
    HeavyBall,
    LatePhase,
    LocalSGD,
    Lookahead,
    Nesterov,
    PolynomialAverage,
    ScheduleFree,
)
from nqm.problems.quadratic import Problem
from nqm.problems.spectra import harmonic, power_law, power_noise, two_cluster
from nqm.program import Phase, Program, steps_for
from nqm.schedule import Linear
from nqm.solvers.moments import solve
from nqm.solvers.sample import sample
from nqm.tuning.constant_lr import best_lr
from nqm.tuning.information import program_bound
from nqm.tuning.stability import stability_edge
from paper_repro.study import Claim, Scale, agrees, between, identical

TITLE = "Which averaging wins at equal data"
SUMMARY = (
    "Expected final loss of every method after the same number of examples in minibatches of the "
    "same size, each at its own best constant rate, over that of SGD at its best constant rate: "
    "theory as ticks, simulation as markers, the best linearly decayed SGD dashed, what no linear "
    "method could reach dotted. "
    "Averages over the iterates of one run win, the longer the larger the noise; parallel members "
    "are a larger batch, which pays for itself only near the end of training."
)

#: Averages over time that are compared as one.
MEANS = ["ema", "polyak", "swa", "polynomial"]


@dataclass(frozen=True)
class Settings:
    """Noise is C = scale * H; the start N(0, 1) in every direction."""

    spectra: tuple[str, ...] = ("harmonic", "power law", "two clusters")
    directions: int = 100
    noise_scale: tuple[tuple[str, float], ...] = (("small noise", 0.01), ("large noise", 10.0))
    exponent: float = 1.5
    outliers: int = 10
    bulk_value: float = 0.02
    examples: int = 2000
    batch_size: int = 4
    momentum: float = 0.9
    decay: float = 0.99
    members: int = 5
    clients: int = 4
    late_share: float = 0.4
    window: int = 5
    points: int = 11
    # With two curvatures alone the loss of oscillating methods swings with the rate.
    cluster_points: int = 31
    replicas: int = 40
    seed: int = 11


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has one spectrum, fewer directions, examples, rates and replicas.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(("harmonic",), 40, examples=800, points=5, replicas=20)
    return Settings()


@dataclass(frozen=True)
class Method:
    """One row of the figure.

    Attributes
    ----------
    family, label : str
    algorithm : Algorithm
        Whose stability edge bounds the search.
    program : callable
        From a rate to a program that costs the budget; late-phase weights take lambda.
    twin : callable, optional
        SGD on minibatches of K B, which the theory says is the same.
    """

    family: str
    label: str
    algorithm: Algorithm
    program: Callable[[float], Program]
    twin: Callable[[float], Program] | None = None


def methods(s: Settings) -> dict[str, Method]:
    """Return every method by name; further parameters have their usual values.

    Parameters
    ----------
    s : Settings
        Budget of examples, batch size, and the parameters of the methods.

    Returns
    -------
    dict of str to Method
        In the order of the table.
    """
    total = steps_for(SGD(), s.examples, batch_size=s.batch_size)
    late_steps = round(s.late_share * total)
    k, wide = s.members, s.members * s.batch_size

    def phase(algorithm: Algorithm, lr: float, share: float = 1.0, batch_size: int = 0) -> Phase:
        """Part of the budget; a late-phase rate is lambda, half of it from each set of weights."""
        batch_size = batch_size or s.batch_size
        steps = steps_for(algorithm, round(share * s.examples), batch_size=batch_size)
        if isinstance(algorithm, LatePhase):
            return Phase(algorithm, lr / 2, steps, batch_size, member_lr=lr / 2)
        return Phase(algorithm, lr, steps, batch_size)

    def whole(family: str, label: str, algorithm: Algorithm) -> Method:
        return Method(family, label, algorithm, lambda lr: Program((phase(algorithm, lr),)))

    def ending(label: str, family: str, last: Algorithm, share: float) -> Method:
        """SGD first, `last` on the last share of the examples."""
        return Method(
            family,
            label,
            SGD(),
            lambda lr: Program((phase(SGD(), lr, 1.0 - share), phase(last, lr, share))),
        )

    def twin(method: Method, share: float) -> Method:
        """The same with SGD on minibatches of K B in place of the members."""

        def program(lr: float) -> Program:
            first = (phase(SGD(), lr, 1.0 - share),) if share < 1.0 else ()
            return Program((*first, phase(SGD(), lr, share, wide)))

        return Method(method.family, method.label, SGD(), method.program, program)

    def decayed(lr: float) -> Program:
        return Program((Phase(SGD(), Linear(lr, lr / total, total), total, s.batch_size),))

    time, runs = "mean over time", "mean over runs"
    every = max(1, late_steps // (2 * s.window))
    return {
        "sgd": whole("last iterate", "SGD, constant rate", SGD()),
        "sgd_linear": Method("last iterate", "SGD, linear decay", SGD(), decayed),
        "heavy_ball": whole("last iterate", f"heavy ball {s.momentum:g}", HeavyBall(s.momentum)),
        "nesterov": whole("last iterate", f"Nesterov {s.momentum:g}", Nesterov(s.momentum)),
        "ema": whole(time, f"EMA {s.decay:g}", EMA(SGD(), s.decay)),
        "polyak": whole(time, "mean of all iterates", SWA(SGD())),
        "swa": ending("SWA, last half", time, SWA(SGD()), 0.5),
        "lawa": whole(time, f"LAWA, {s.window} snapshots", LAWA(SGD(), every, s.window)),
        "polynomial": whole(time, "polynomial average 3", PolynomialAverage(SGD(), 3.0)),
        "schedule_free": whole(time, "schedule-free 0.9", ScheduleFree(0.9)),
        "lookahead": whole(time, "Lookahead 5, 0.5", Lookahead(SGD(), 5, 0.5)),
        "local_sgd": whole(runs, f"local SGD, {s.clients} x 10", LocalSGD(s.clients, 10)),
        "ensemble": twin(whole(runs, f"mean of {k} runs", Ensemble(k)), 1.0),
        "late_phase": twin(
            whole(runs, f"late-phase {k}, all along", LatePhase(k, gamma="mean")), 1.0
        ),
        "late_phase_end": twin(
            ending(
                f"late-phase {k}, last {s.late_share:.0%}",
                runs,
                LatePhase(k, gamma="mean"),
                s.late_share,
            ),
            s.late_share,
        ),
    }


def problems(s: Settings) -> dict[tuple[str, str], Problem]:
    """Return the problems by spectrum and noise; their largest curvature is 1.

    Parameters
    ----------
    s : Settings
        Names of the spectra and scales of the noise.

    Returns
    -------
    dict of (str, str) to Problem
        Key: name of the spectrum, name of the noise.
    """
    bulk = s.directions - s.outliers
    every: dict[str, tuple[ArrayLike, ArrayLike]] = {
        "harmonic": (harmonic(s.directions), 1.0),
        "power law": (power_law(s.directions, s.exponent), 1.0),
        "two clusters": two_cluster(s.outliers, bulk, bulk_value=s.bulk_value),
    }
    return {
        (spectrum, noise): Problem(h, power_noise(h, scale), count)
        for (noise, scale), spectrum in product(s.noise_scale, s.spectra)
        for h, count in [every[spectrum]]
    }


def final(problem: Problem, program: Program) -> float:
    """Return the exact expected loss after the last step.

    Parameters
    ----------
    problem : Problem
    program : Program

    Returns
    -------
    float
    """
    return float(solve(problem, program, [program.steps]).loss[0])


def compute(scale: Scale) -> pd.DataFrame:
    """Compute the best rate and final loss of every method on every problem.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        Two rows (kind ``exact`` and ``sample``) for each method, spectrum and noise: ``lr``,
        ``edge`` (the stability edge), ``steps``, ``examples``, ``loss``, ``stderr``, ``bound``
        (the least that a linear method could reach), and in exact rows ``twin``, the loss of SGD
        on minibatches of K B (NaN without members).
    """
    s = settings(scale)
    return _ranked(problems(s), s)


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
    s = replace(settings(scale), directions=problem.directions)
    return _ranked({("the given problem", "its noise"): problem}, s)


def _ranked(every: dict[tuple[str, str], Problem], s: Settings) -> pd.DataFrame:
    """Table of `compute` for these problems, which share their largest curvature."""
    rows: list[dict[str, Any]] = []
    largest = max(float(problem.curvature.max()) for problem in every.values())
    sharpest = Problem([largest], 0.0)
    edges = {name: stability_edge(sharpest, m.algorithm) for name, m in methods(s).items()}
    for (spectrum, noise), problem in every.items():
        expanded = problem.expanded()
        points = s.points if problem.directions > 2 else s.cluster_points
        for name, method in methods(s).items():
            edge = edges[name]
            best = best_lr(problem, method.program, edge / 1000, edge, points=points)
            program = method.program(best.lr)
            row: dict[str, Any] = {"method": name, "family": method.family, "label": method.label}
            row |= {"spectrum": spectrum, "noise": noise, "lr": best.lr, "edge": edge}
            row |= {"steps": program.steps, "examples": program.examples([program.steps])[0]}
            row["bound"] = program_bound(problem, program, [program.steps])[0]
            twin = final(problem, method.twin(best.lr)) if method.twin else np.nan
            exact = {"kind": "exact", "loss": final(problem, program), "stderr": 0.0, "twin": twin}
            seed = 1000 * s.seed + len(rows)
            run = sample(expanded, program, [program.steps], replicas=s.replicas, seed=seed)
            drawn = {"kind": "sample", "loss": run.loss[0], "stderr": run.stderr[0]}
            rows += [row | exact, row | drawn | {"twin": np.nan}]
    return pd.DataFrame(rows).assign(budget=s.examples, directions=s.directions)


def draw(table: pd.DataFrame) -> Figure:
    """Draw one panel per problem, with rows in the order of their mean rank.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        Six panels at full scale.
    """
    with context():
        wide, high = table["spectrum"].nunique(), table["noise"].nunique()
        figure = new_figure(PAGE if wide > 1 else 5.2, 0.4 + 2.9 * high)
        panels.page(table, figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check simulation against theory, members against a larger batch, and the ranking.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    exact, run = (
        table[table["kind"] == kind].reset_index(drop=True) for kind in ("exact", "sample")
    )
    twins = exact.dropna(subset="twin")
    ratio = panels.ratios(exact)
    quiet, loud = (ratio.xs(name, axis=1, level="noise") for name in ("small noise", "large noise"))
    late, sgd = ratio.loc["late_phase_end"].to_numpy(), ratio.loc["sgd"].to_numpy()
    decay, late_means = (ratio.loc[name].to_numpy() for name in ("sgd_linear", MEANS[2:]))
    return [
        agrees(
            "simulated final loss of every method on every problem against exact moments",
            run["loss"], exact["loss"], run["stderr"],
        ),
        identical("every method draws the same number of examples",
                  exact["examples"], exact["budget"]),
        between("loss of every method over the information bound, least over all problems",
                np.min(exact["loss"] / exact["bound"]), 1.0, np.inf),
        identical("K runs and additive late-phase weights equal SGD on minibatches of K B at the "
                  "same lambda and the same number of examples",
                  twins["loss"], twins["twin"], 1e-9),
        between("mean of K runs over tuned SGD at equal data, least over all problems",
                np.min(ratio.loc["ensemble"].to_numpy() / sgd), 1.0, np.inf),
        between("late-phase in the last part over tuned SGD, largest over all problems",
                np.max(late / sgd), 0.0, 1.0),
        between("late-phase in the last part over SWA of the last half, least over all problems",
                np.min(late / ratio.loc["swa"].to_numpy()), 1.0, np.inf),
        between("EMA, SWA, mean of all iterates and polynomial average over tuned SGD, largest "
                "under large noise", loud.loc[MEANS].to_numpy().max(), 0.0, 0.9),
        between("polynomial average and SWA of the last half over linearly decayed SGD, largest "
                "over all problems", np.max(late_means / decay), 0.0, 1.0),
        between("mean of all iterates over the best of all methods, largest under large noise",
                np.max(loud.loc["polyak"].to_numpy() / loud.min().to_numpy()), 1.0, 1.0),
        between("Nesterov momentum over tuned SGD, largest under small noise",
                np.max(quiet.loc["nesterov"].to_numpy()), 0.0, 0.95),
    ]  # fmt: skip

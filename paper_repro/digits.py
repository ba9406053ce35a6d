"""Real data: late-phase training of a linear regression on handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from figures import digits as panels
from figures.style import PAGE, context, new_figure, panel_letters
from nqm.algorithms import LatePhase
from nqm.problems.quadratic import Problem
from nqm.program import constant
from nqm.solvers.moments import solve
from paper_repro.least_squares import Data, exact, train
from paper_repro.study import Claim, Scale, agrees, between

TITLE = "Real data: linear regression on handwritten digits"
SUMMARY = (
    "Actual minibatch SGD (K = 1) and late-phase training of a linear regression of the indicator "
    "of one digit follow the additive theory, with curvature and noise measured from the data, at "
    "small rates and for many members; at larger rates the loss lies above it, most of all during "
    "SGD's transient. The excess is the state-dependent noise that the additive picture leaves out "
    "(a gradient's variance grows with the distance from the minimum, because one example's "
    "Hessian is not the mean one): exact second moments with that noise (solid) meet every marker."
)


@dataclass(frozen=True)
class Settings:
    """scikit-learn's digits, pixels / 16 and an intercept; start at w = 0, gamma = 1/K.

    K members have runs / K replicas.
    """

    digit: int = 0
    lrs: tuple[float, ...] = (0.01, 0.02, 0.04, 0.06)
    shown_lr: float = 0.04
    members: tuple[int, ...] = (1, 4, 16)
    batch_size: int = 2
    cycles: int = 400
    marks: int = 9
    runs: int = 2400
    seed: int = 6


def settings(scale: Scale) -> Settings:
    """Return the parameters of this figure.

    Parameters
    ----------
    scale : Scale
        `Scale.SMOKE` has two rates, two ensemble sizes, 40 cycles and a third of the runs.

    Returns
    -------
    Settings
    """
    if scale is Scale.SMOKE:
        return Settings(lrs=(0.01, 0.04), members=(1, 4), cycles=40, marks=5, runs=800)
    return Settings()


def load(digit: int) -> Data:
    """Load pixels in [0, 1] with an intercept, and the indicator of one digit.

    Parameters
    ----------
    digit : int
        0 to 9.

    Returns
    -------
    Data
        Features of shape (1797, 65); the target is 1 where the image shows `digit`, else 0.
    """
    from sklearn.datasets import load_digits

    images = load_digits()
    features = np.column_stack([images.data / 16.0, np.ones(len(images.data))])
    return Data(features, (images.target == digit).astype(float))


def compute(scale: Scale) -> pd.DataFrame:
    """Compute training, its exact second moments, and the additive theory.

    Parameters
    ----------
    scale : Scale
        Passed to `settings`.

    Returns
    -------
    DataFrame
        A row for each kind (``sample``, ``exact``, ``additive``), rate, ensemble size and recorded
        cycle (``step``): ``loss`` and ``member_loss`` above the minimum, their standard errors,
        ``examples``, and ``additive_loss``, the additive theory at the same point.
    """
    s = settings(scale)
    data = load(s.digit)
    problem = Problem.from_linear_regression(data.features, data.target)
    marks = np.unique(np.geomspace(1, s.cycles, s.marks).round().astype(int)).tolist()
    steps = np.unique(np.r_[marks, np.geomspace(1, s.cycles, 60).round().astype(int)]).tolist()
    rng = np.random.default_rng(s.seed)
    # The matrices are small: a second BLAS thread gains nothing, and waits where cores are busy.
    with threadpool_limits(1):
        frames = [
            _case(data, problem, s, lr, k, marks, steps, rng) for lr in s.lrs for k in s.members
        ]
    table = pd.concat(frames, ignore_index=True)
    table["examples"] = table["step"] * table["members"] * s.batch_size
    reference = table[table["kind"] == "additive"]
    keys = ["lr", "members", "step"]
    table = table.merge(
        reference[[*keys, "loss"]].rename(columns={"loss": "additive_loss"}), on=keys
    )
    fixed = {
        "batch_size": s.batch_size,
        "digit": s.digit,
        "shown_lr": s.shown_lr,
        "seed": s.seed,
        "largest_curvature": problem.curvature[0],
        "directions": problem.directions,
        "irreducible_loss": problem.irreducible_loss,
    }
    return table.assign(**fixed)


def _case(  # noqa: PLR0913
    data: Data,
    problem: Problem,
    s: Settings,
    lr: float,
    k: int,
    marks: list[int],
    steps: list[int],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """All three kinds of rows for one (lr, K)."""
    start, replicas = np.zeros(data.features.shape[1]), s.runs // k
    how: dict[str, Any] = {"members": k, "lr": lr, "batch_size": s.batch_size}
    additive = solve(
        problem, constant(LatePhase(k, gamma="mean"), lr, s.cycles, batch_size=s.batch_size), steps
    )
    known, member_known = exact(data, start, at=steps, **how)
    run, member_run = train(data, start, at=marks, replicas=replicas, rng=rng, **how)
    parts = [
        pd.DataFrame({"step": steps, "loss": additive.loss, "member_loss": additive.member_loss}),
        pd.DataFrame({"step": steps, "loss": known, "member_loss": member_known}),
        pd.DataFrame(
            {"step": marks, "loss": run.mean(axis=1), "member_loss": member_run.mean(axis=1)}
        ),
    ]
    for part, kind in zip(parts, ("additive", "exact", "sample"), strict=True):
        part["kind"] = kind
        part[["stderr", "member_stderr"]] = 0.0
    parts[2]["stderr"] = run.std(axis=1, ddof=1) / np.sqrt(replicas)
    parts[2]["member_stderr"] = member_run.std(axis=1, ddof=1) / np.sqrt(replicas)
    return pd.concat(parts).assign(lr=lr, members=k, rate=2.0 * lr, replicas=replicas)


def draw(table: pd.DataFrame) -> Figure:
    """Draw the loss over time, at the end, and both relative to the additive theory.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    Figure
        Four panels.
    """
    with context():
        figure = new_figure(PAGE, 5.2)
        axes = figure.subplots(2, 2)
        one = table[table["lr"] == table["shown_lr"]]
        lr, last = table["shown_lr"].iloc[0], table["step"].max()
        late = table[table["step"] == last]
        panels.transient(one, ax=axes[0, 0])
        axes[0, 0].set_title(rf"from $w = 0$, $\eta$ = {lr:g}")
        panels.against_members(late, ax=axes[0, 1])
        axes[0, 1].set_title(f"after {last} cycles")
        panels.ratio(one, x="step", ax=axes[1, 0])
        axes[1, 0].set_title(rf"over the additive theory, $\eta$ = {lr:g}")
        panels.ratio(late, x="lr", ax=axes[1, 1])
        axes[1, 1].set_title(f"over the additive theory, after {last} cycles")
        panel_letters(list(axes.flat))
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check training against its exact moments, and where the additive theory fails.

    Parameters
    ----------
    table : DataFrame
        As `compute` returns it.

    Returns
    -------
    list of Claim
        In the order of the report.
    """
    keys = ["lr", "members", "step"]
    known = table[table["kind"] == "exact"]
    wide = table[table["kind"] == "sample"].merge(known, on=keys, suffixes=("", "_exact"))
    ratio = known.assign(ratio=known["loss"] / known["additive_loss"])
    late = ratio[ratio["step"] == ratio["step"].max()]
    sgd = late[late["members"] == 1].sort_values("lr")["ratio"]
    gentle = late[late["lr"] == late["lr"].min()].set_index("members")["ratio"]
    course = ratio[(ratio["lr"] == ratio["shown_lr"]) & (ratio["members"] == 1)]
    crowd = int(table["members"].max())
    end = sgd.iloc[-1]
    text = f"additive theory at the smallest rate and K = {crowd}: exact loss over it, at the end"
    return [
        agrees("training on the data against its exact second moments, mean model",
               wide["loss"], wide["loss_exact"], wide["stderr"]),
        agrees("the same, average member",
               wide["member_loss"], wide["member_loss_exact"], wide["member_stderr"]),
        between(text, float(gentle[crowd]), 1.0, 1.03),
        between("SGD: least growth of exact / additive from one rate to the next, at the end",
                float((sgd.to_numpy()[1:] / sgd.to_numpy()[:-1]).min()), 1.0, np.inf),
        between("SGD at the largest rate: exact / additive, at the end", float(end), 1.03, np.inf),
        between("SGD: largest exact / additive on the way, over that at the end",
                float(course["ratio"].max() / course.sort_values("step")["ratio"].iloc[-1]),
                1.0, np.inf),
    ]  # fmt: skip

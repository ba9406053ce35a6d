"""Model size and number of steps with the least loss within a budget of compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nqm.errors import NQMError
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import Problem, numbers_above_zero
from nqm.program import Phase, one_phase
from nqm.schedule import Constant
from nqm.solvers.moments import solve
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class ComputeOptimal:
    """Best model sizes of many budgets.

    Attributes
    ----------
    loss_exponent, size_exponent : float
        Slopes of log loss and log size against log compute over all budgets, by least squares.
    best : DataFrame
        A row per budget: compute, features (the best size, between those tried), loss.
    table : DataFrame
        A row per budget and size: compute, features, step, examples, loss.
    """

    loss_exponent: float
    size_exponent: float
    best: pd.DataFrame = field(repr=False)
    table: pd.DataFrame = field(repr=False)

    __repr__ = short_repr
    _repr_html_ = short_html


def compute_optimal(
    problems: Mapping[int, Problem | LeastSquares],
    phase: Phase,
    budgets: Sequence[float],
    *,
    progress: Callable[[int], None] | None = None,
) -> ComputeOptimal:
    """Find the model size that has the least loss within each budget of compute.

    Compute is the number of trained weights times the number of examples (Paquette et al. 2024,
    "4+3 phases of compute-optimal neural scaling laws", section 1.2, counts 6 FLOPs for each); the
    loss includes the irreducible part. Between the sizes tried, the best size and its loss are
    those of a parabola through the three best points in log size and log loss.

    Parameters
    ----------
    problems : mapping of int to Problem or LeastSquares
        Problem of each model size, e.g. from `random_features_equivalent`; at least three.
    phase : Phase
        Method, constant batch size and rates; its steps are the longest run considered.
    budgets : sequence of float
        Budgets of compute, > 0; at least two.
    progress : callable, optional
        Called with 1 after each size.

    Returns
    -------
    ComputeOptimal
        Best sizes, all losses, and the exponents.

    Raises
    ------
    NQMError
        If there are fewer than three sizes or two budgets, if the batch size changes, or if a
        budget's best size is the smallest or the largest of those that it affords.
    """
    where = "compute_optimal"
    if len(problems) < 3:
        raise NQMError(f"{where}.problems must have at least three sizes; got {len(problems)}")
    phase = one_phase(f"{where}.phase", phase)
    spent = np.unique(numbers_above_zero(f"{where}.budgets", budgets))
    if spent.size < 2:
        raise NQMError(f"{where}.budgets must have at least two entries; got {spent.size}")
    if not isinstance(phase.batch_size, Constant):
        raise NQMError(f"{where}.phase: the batch size must be constant")
    batch_size = phase.batch_size.value
    frames = []
    for size, problem in sorted(problems.items()):
        numbers_above_zero(f"{where}.problems", [size])
        problem = any_problem(where, problem)
        steps = np.floor(spent / (size * batch_size) * (1 + 1e-12))
        kept = (steps >= 1) & (steps <= phase.steps)
        at = np.unique(steps[kept].astype(np.int64)).tolist()
        if at:
            found = solve(problem, phase, at)
            losses = dict(zip(at, found.loss + problem.irreducible_loss, strict=True))
            rows = pd.DataFrame({"compute": spent[kept], "features": size, "step": steps[kept]})
            rows["examples"] = rows["step"] * batch_size
            frames.append(rows.assign(loss=[losses[int(step)] for step in steps[kept]]))
        if progress is not None:
            progress(1)
    if not frames:
        raise NQMError(f"{where}: no budget affords a step of any size; raise the budgets")
    table = pd.concat(frames, ignore_index=True).astype({"step": np.int64})
    lost = spent[~np.isin(spent, table["compute"])]
    if lost.size:
        raise NQMError(f"{where}: no size affords a step within the budget {lost[0]:g}")
    best = pd.DataFrame([_best(rows) for _, rows in table.groupby("compute")])
    loss_exponent, size_exponent = (
        float(np.polyfit(np.log(best["compute"]), np.log(best[name]), 1)[0])
        for name in ("loss", "features")
    )
    return ComputeOptimal(loss_exponent, size_exponent, best, table)


def _best(rows: pd.DataFrame) -> dict[str, float]:
    """Best size of one budget, by the parabola through the three points about the least loss."""
    compute = float(rows["compute"].iloc[0])
    finite = rows[np.isfinite(rows["loss"])]
    size, loss = np.log(finite["features"].to_numpy(float)), np.log(finite["loss"].to_numpy())
    least = int(np.argmin(loss)) if loss.size else 0
    if not 0 < least < loss.size - 1:
        raise NQMError(
            f"compute_optimal: at the budget {compute:g} the best size is at the end of those that "
            "it affords; add sizes there, raise phase.steps, or change the budgets"
        )
    at = slice(least - 1, least + 2)
    a, b, c = np.polyfit(size[at] - size[least], loss[at], 2)
    shift = -b / (2 * a)
    values = np.exp([size[least] + shift, c + shift * b / 2])
    return {"compute": compute, "features": float(values[0]), "loss": float(values[1])}

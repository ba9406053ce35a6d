"""Critical batch size: beyond it, larger batches save few steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.optimize import curve_fit

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError, check_number
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem, numbers_above_zero
from nqm.program import Phase
from nqm.result import Status
from nqm.tuning.steps_to_target import OutOfReachError, fewest_steps


@dataclass(frozen=True)
class CriticalBatch:
    """Fit of steps = least_steps * (1 + critical / batch size) (McCandlish et al. 2018, eq. 2.11).

    Attributes
    ----------
    critical : float
        Batch size at which twice the least number of steps, and of examples, is needed.
    least_steps, least_examples : float
        Limits of large and of small batches.
    table : DataFrame
        A row for each batch size: batch_size, lr (best), step, examples, status (reached, or
        not_reached within `max_steps`), and the fit's step. NaN where not reached; such a batch
        size has no part in the fit.
    """

    critical: float
    least_steps: float
    least_examples: float
    table: pd.DataFrame = field(repr=False)


def critical_batch_size(
    problem: Problem | LeastSquares,
    algorithm: Algorithm,
    target: float,
    batch_sizes: Sequence[float],
    *,
    points: int = 25,
    max_steps: int = 10**7,
) -> CriticalBatch:
    """Fit the batch size beyond which more examples per step save few steps.

    For each batch size, the constant learning rate that reaches `target` in the fewest steps is
    searched below the stability edge.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss must reach the target.
    algorithm : Algorithm
        Linear method that runs at constant rates.
    target : float
        Expected loss to reach, > 0 and below the loss at the start.
    batch_sizes : sequence of float
        Batch sizes to fit, > 0; at least three must reach the target.
    points : int
        Number of learning rates of the grid of each batch size.
    max_steps : int
        Largest number of steps considered.

    Returns
    -------
    CriticalBatch
        Fitted constants, and the best rate and step of every batch size.

    Raises
    ------
    NQMError
        If fewer than three batch sizes reach the target, if the start already does, or if the fit
        fails.
    """
    problem = any_problem("critical_batch_size", problem)
    check_number("critical_batch_size.target", target, low=0.0, closed_low=False)
    sizes = numbers_above_zero("critical_batch_size.batch_sizes", batch_sizes)
    if target >= problem.initial_loss:
        raise NQMError(
            f"critical_batch_size: the target {target:g} is met at the start, whose loss is "
            f"{problem.initial_loss:g}; lower the target"
        )
    rows = []
    for batch_size in map(float, sizes):
        phase = Phase(algorithm, 1.0, max_steps, batch_size)
        try:
            lr, found = fewest_steps(problem, phase, target, points=points)
            rows.append((batch_size, lr, found.step, found.examples, str(Status.REACHED)))
        except OutOfReachError:
            rows.append((batch_size, np.nan, np.nan, np.nan, str(Status.NOT_REACHED)))
    table = pd.DataFrame(rows, columns=["batch_size", "lr", "step", "examples", "status"])
    reached = table["status"] == Status.REACHED
    if reached.sum() < 3:
        raise NQMError(
            f"critical_batch_size: {reached.sum()} of {sizes.size} batch sizes reach the target "
            f"{target:g}; three are needed: raise the target, max_steps or the batch sizes"
        )
    used_sizes = table.loc[reached, "batch_size"].to_numpy()
    log_steps = np.log(table.loc[reached, "step"].to_numpy())

    def model(b: FloatArray, log_least: float, log_critical: float) -> FloatArray:
        return np.asarray(log_least + np.log1p(np.exp(log_critical) / b))

    guess = (log_steps.min(), float(np.median(np.log(used_sizes))))
    try:
        with np.errstate(over="ignore"), warnings.catch_warnings(action="ignore"):
            fit, _ = curve_fit(model, used_sizes, log_steps, p0=guess)
    except RuntimeError:
        raise NQMError(
            "critical_batch_size: the steps at these batch sizes do not follow "
            "least (1 + critical / B); take batch sizes from well below to well above the critical"
        ) from None
    least, critical = float(np.exp(fit[0])), float(np.exp(fit[1]))
    fitted = np.exp(model(table["batch_size"].to_numpy(), *fit))
    table["fit"] = np.where(reached, fitted, np.nan)
    return CriticalBatch(critical, least, least * critical, table)

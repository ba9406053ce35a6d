"""Search for the best constant learning rate, alone or together with a momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import check_memory
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import Problem
from nqm.program import Program, as_program
from nqm.solvers.moments import solve


@dataclass(frozen=True)
class Best:
    """The best setting found and how flat the optimum is.

    Attributes
    ----------
    lr : float
        Learning rate of least expected loss.
    loss : float
        Expected loss at `lr`.
    momentum : float
        NaN when only the learning rate was searched.
    flat_low, flat_high : float
        Rates between which the loss stays within 10 % of the best.
    at_edge : bool
        Whether the best rate lies at an end of the searched range.
    evaluated : DataFrame
        Columns lr, loss (and momentum): every setting that was evaluated.
    """

    lr: float
    loss: float
    flat_low: float
    flat_high: float
    at_edge: bool
    momentum: float = float("nan")
    evaluated: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    def table(self) -> pd.DataFrame:
        """Tabulate the result without `evaluated`.

        Returns
        -------
        DataFrame
            One row with columns lr, momentum, loss, flat_low, flat_high, at_edge.
        """
        names = ("lr", "momentum", "loss", "flat_low", "flat_high", "at_edge")
        return pd.DataFrame({name: [getattr(self, name)] for name in names})


def best_lr(
    problem: Problem | LeastSquares,
    make_program: Callable[[float], Program],
    low: float,
    high: float,
    *,
    points: int = 41,
) -> Best:
    """Find the learning rate in [low, high] of least expected loss at the end of a program.

    Evaluates a geometric grid, then searches between the neighbours of its best point.
    `make_program` decides whether rates are compared at equal steps or at equal numbers of examples
    (see `Program` and `nqm.program.steps_for`).

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss is minimised.
    make_program : callable
        Takes a learning rate and returns the `Program` to evaluate at that rate.
    low, high : float
        Ends of the range, 0 < low <= high; `stability_edge` is a natural upper end.
    points : int
        Number of rates of the grid, >= 3.

    Returns
    -------
    Best
        Best rate, its loss, and all evaluated rates.

    Raises
    ------
    NQMError
        If every rate in the range diverges, or an argument is out of range or of a wrong type.
    """
    check_number("best_lr.low", low, low=0.0, closed_low=False)
    check_number("best_lr.high", high, low=low, closed_low=False)
    check_integer("best_lr.points", points, 3)
    check_memory("best_lr.points", points, points)
    problem = any_problem("best_lr", problem)
    _callable("best_lr.make_program", make_program)
    rows: list[tuple[float, float]] = []

    def loss(lr: float) -> float:
        program = as_program("best_lr: what make_program returns", make_program(lr))
        with np.errstate(over="ignore", invalid="ignore"):
            value = float(solve(problem, program, [program.steps]).loss[-1])
        value = value if np.isfinite(value) else np.inf
        rows.append((lr, value))
        return value

    grid = np.geomspace(low, high, points)
    losses = np.array([loss(float(lr)) for lr in grid])
    if not np.isfinite(losses).any():
        raise NQMError(f"best_lr: every rate in {low:g}..{high:g} diverges; lower the range")
    best = int(np.argmin(losses))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    minimize_scalar(
        lambda z: min(loss(float(np.exp(z))), 1e300),
        bounds=(np.log(left), np.log(right)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    table = pd.DataFrame(rows, columns=["lr", "loss"]).sort_values("lr", ignore_index=True)
    winner = min(rows, key=lambda row: row[1])
    flat = table.loc[table["loss"] <= 1.1 * winner[1], "lr"]
    return Best(
        lr=winner[0],
        loss=winner[1],
        flat_low=float(flat.min()),
        flat_high=float(flat.max()),
        at_edge=bool(winner[0] <= grid[0] * 1.001 or winner[0] >= grid[-1] / 1.001),
        evaluated=table,
    )


def best_lr_and_momentum(
    problem: Problem | LeastSquares,
    make_program: Callable[[float, float], Program],
    low: float,
    high: float,
    *,
    momenta: Sequence[float] = tuple(1.0 - np.geomspace(1.0, 1e-3, 13)),
    points: int = 31,
) -> Best:
    """Find the learning rate and momentum of least expected loss at the end of a program.

    Calls `best_lr` for each momentum of `momenta`, then searches between the neighbours of the best
    one, on the scale of log(1 - momentum).

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss is minimised.
    make_program : callable
        Takes (learning rate, momentum) and returns the `Program` to evaluate.
    low, high : float
        Ends of the range of learning rates, 0 < low <= high.
    momenta : sequence of float
        Momenta of the grid, in [0, 1).
    points : int
        Number of rates of the grid of each momentum, >= 3.

    Returns
    -------
    Best
        Best rate and momentum, their loss, and all evaluated settings.

    Raises
    ------
    NQMError
        If every rate diverges at some momentum, or an argument is out of range or of a wrong type.
    """
    problem = any_problem("best_lr_and_momentum", problem)
    _callable("best_lr_and_momentum.make_program", make_program)

    def at(momentum: float) -> Best:
        return best_lr(problem, lambda lr: make_program(lr, momentum), low, high, points=points)

    found = {float(m): at(float(m)) for m in momenta}
    order = sorted(found)
    best = min(found, key=lambda m: found[m].loss)
    i = order.index(best)
    left, right = order[max(i - 1, 0)], order[min(i + 1, len(order) - 1)]
    if right > left:
        # Search in log(1 - momentum), the natural scale of a memory.
        def loss(z: float) -> float:
            momentum = 1.0 - float(np.exp(z))
            found[momentum] = at(momentum)
            return found[momentum].loss

        bounds = (np.log1p(-right), np.log1p(-left))
        minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    best = min(found, key=lambda m: found[m].loss)
    parts = [b.evaluated.assign(momentum=m) for m, b in found.items()]
    winner = found[best]
    return Best(
        lr=winner.lr,
        loss=winner.loss,
        flat_low=winner.flat_low,
        flat_high=winner.flat_high,
        at_edge=winner.at_edge,
        momentum=best,
        evaluated=pd.concat(parts, ignore_index=True),
    )


def _callable(where: str, value: object) -> None:
    if not callable(value):
        raise NQMError(
            f"{where} must be a function that returns a program; got {type(value).__name__}"
        )

"""Fit a noisy quadratic problem to a logged loss curve, and forecast other programs with bands.

The expected loss of a linear method is linear in what is not known::

    L(t) = L_inf + sum_j a_j b_j(t) + sum_j v_j n_j(t),   a, v, L_inf >= 0

h_j is a grid of curvatures, b_j(t) the loss of one direction that starts at distance 1 without
noise, n_j(t) that of one that starts at the minimum with noise of variance 1: both are exact
moments of the program under which the curve was logged. The densities a (where the start lies) and
v (where the noise is) are found by non-negative least squares. One curve does not tell them apart:
at a constant rate a_j, v_j and L_inf are confounded. A forecast is linear in the same unknowns, so
that its band is the range of forecasts of all densities that fit the log as well as its noise
allows (a profile likelihood): wide where the log does not say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.algorithms import Algorithm
from nqm.errors import NQMError, check_integer, check_number
from nqm.problems.quadratic import Problem
from nqm.program import Phase, Program, as_program
from nqm.words import short_html, short_repr

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
#: Least number of records that are fitted.
LEAST_RECORDS = 10
#: Least relative error of a record: what a grid of curvatures in place of a spectrum costs.
ROUNDING = 1e-4
#: Candidates for the strength of smoothing, times the mean square of the columns.
SMOOTHING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Log:
    """Losses of a run, and the program that it ran.

    Parameters
    ----------
    steps : array_like of int, shape (n,)
        Steps of the records, increasing; at least `LEAST_RECORDS`.
    losses : array_like, shape (n,)
        Losses > 0 at these steps: of the evaluated weights, on training data. A mean over the last
        minibatches is good enough where the loss changes little over them.
    program : Program, Phase or sequence of Phase
        Linear methods only.

    Raises
    ------
    NQMError
        If the records are too few, not finite, not positive, or outside the program, or a method is
        not linear.
    """

    steps: NDArray[np.int64]
    losses: Array
    program: Program

    __repr__ = short_repr
    _repr_html_ = short_html

    def __init__(
        self,
        steps: ArrayLike,
        losses: ArrayLike,
        program: Program | Phase | Sequence[Phase],
    ):
        made = as_program("Log: program", program)
        for phase in made.phases:
            if not isinstance(phase.algorithm, Algorithm):
                raise NQMError(
                    f"Log: {type(phase.algorithm).__name__} is not linear: it has no exact "
                    "moments to fit"
                )
        t, y = _records(steps, losses, made)
        for name, value in (("steps", t), ("losses", y), ("program", made)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class FittedCurve:
    """A noisy quadratic problem that explains the loss curves of one network.

    Attributes
    ----------
    curvature : ndarray, shape (J,)
        Grid of curvatures.
    start : ndarray, shape (J,)
        Density a of the start's squared distance from the minimum, >= 0.
    noise : ndarray, shape (J,)
        Density v of the variance of one example's gradient, >= 0.
    floor : float
        Loss L_inf at the minimum.
    logs : tuple of Log
        What was fitted.
    error : float
        Standard deviation of one record's relative error.
    correlation : float
        Sum of the residuals' autocorrelations, >= 1: n / correlation of n records are independent.
    """

    curvature: Array
    start: Array
    noise: Array
    floor: float
    logs: tuple[Log, ...]
    error: float
    correlation: float
    _fit: _Fit = field(repr=False)

    __repr__ = short_repr
    _repr_html_ = short_html

    @cached_property
    def problem(self) -> Problem:
        """The problem, for everything else that `nqm` computes; its losses lie above `floor`.

        Returns
        -------
        Problem
            Its entries are a quadrature of densities: only expected losses are known.
        """
        return Problem(
            self.curvature,
            self.noise,
            initial_variance=self.start,
            irreducible_loss=self.floor,
            expected_losses_only=True,
        )

    @property
    def sharpest_noise(self) -> float:
        """Largest curvature of the grid with noise; 0 without any."""
        return float(self.curvature[self.noise > 0].max(initial=0.0))

    def problem_table(self) -> pd.DataFrame:
        """The problem as a table for ``problem.file``, without the floor.

        Returns
        -------
        DataFrame
            Columns curvature, noise_variance, initial_variance; points without start or noise are
            left out.
        """
        import pandas as pd

        table = pd.DataFrame(
            {
                "curvature": self.curvature,
                "noise_variance": self.noise,
                "initial_variance": self.start,
            }
        )
        return table[(self.start > 0) | (self.noise > 0)].reset_index(drop=True)

    def table(self) -> pd.DataFrame:
        """The records beside the fit.

        Returns
        -------
        DataFrame
            Columns log (its number), step, loss, predicted.
        """
        import pandas as pd

        theta = np.concatenate((self.start, self.noise, [self.floor]))
        parts = [
            pd.DataFrame(
                {"log": index, "step": log.steps, "loss": log.losses,
                 "predicted": _design(self.curvature, log.program, log.steps) @ theta}
            )
            for index, log in enumerate(self.logs)
        ]  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def forecast(
        self,
        program: Program | Phase | Sequence[Phase],
        at: Sequence[int] | None = None,
        *,
        level: float = 0.95,
    ) -> pd.DataFrame:
        """Forecast the loss under another program from the same start.

        Parameters
        ----------
        program : Program, Phase or sequence of Phase
            Any linear methods, schedules and batch sizes.
        at : sequence of int, optional
            Steps to record; about 100 by default.
        level : float
            Confidence of the band, in (0, 1).

        Returns
        -------
        DataFrame
            Columns step, examples, loss (with the floor), lower, upper. The band takes the log's
            noise and what the log does not determine into account, not that a network is no
            quadratic.

        Raises
        ------
        NQMError
            If a method has no exact moments, or a rate is unstable on the fitted curvatures.
        """
        import pandas as pd
        from scipy.stats import norm

        check_number("forecast: level", level, low=0.0, high=1.0, closed_low=False)
        program = as_program("forecast: program", program)
        wanted = program.recorded(at)
        rows = _design(self.curvature, program, wanted)
        if not np.isfinite(rows).all():
            raise NQMError("forecast: a rate is unstable on the fitted curvatures; lower it")
        slack = float(norm.ppf(0.5 + level / 2)) ** 2 * self.correlation
        centre = np.concatenate((self.start, self.noise, [self.floor]))
        bands = [self._fit.range(row, centre, self.error, slack) for row in rows]
        low, high = np.array(bands).T
        return pd.DataFrame(
            {
                "step": wanted,
                "examples": program.examples(wanted),
                "loss": rows @ centre,
                "lower": low,
                "upper": high,
            }
        )


def fit_loss_curves(*logs: Log, directions: int = 40) -> FittedCurve:
    """Find the densities of start and noise over curvature that explain logged loss curves.

    Parameters
    ----------
    *logs : Log
        Runs from the same start, best under different schedules or batch sizes.
    directions : int
        Points of the grid of curvatures, from a thirtieth of the reciprocal of the summed rates to
        nine tenths of the stability edge of the largest rate.

    Returns
    -------
    FittedCurve

    Raises
    ------
    NQMError
        If there is no log, or a method has no exact moments.
    """
    check_integer("fit_loss_curves: directions", directions, 5)
    if not logs:
        raise NQMError("fit_loss_curves needs a Log")
    h = _grid([log.program for log in logs], directions)
    columns = np.vstack([_design(h, log.program, log.steps) for log in logs])
    losses = np.concatenate([log.losses for log in logs])
    fit = _Fit(columns, losses, directions)
    theta = fit.solve(fit.best_smoothing())
    free = max(1, len(losses) - int((fit.closest > 0).sum()))
    residuals = np.split(columns @ theta / losses - 1.0, np.cumsum([len(x.steps) for x in logs]))
    return FittedCurve(
        h,
        theta[:directions],
        theta[directions : 2 * directions],
        float(theta[-1]),
        logs,
        max(math.sqrt(fit.misfit(fit.closest) / free), ROUNDING),
        max(_correlation(one) for one in residuals[:-1]),
        fit,
    )


def _records(steps: ArrayLike, losses: ArrayLike, program: Program) -> tuple[Any, Array]:
    t, y = np.asarray(steps), np.asarray(losses, dtype=float)
    if t.ndim != 1 or t.shape != y.shape:
        raise NQMError(
            f"Log: steps and losses must be lists of equal length; got shapes {t.shape} "
            f"and {y.shape}"
        )
    if len(t) < LEAST_RECORDS:
        raise NQMError(f"Log needs at least {LEAST_RECORDS} records; got {len(t)}")
    if not np.issubdtype(t.dtype, np.integer):
        if not np.isfinite(t).all() or (t != np.round(t)).any():
            raise NQMError("Log: steps must be whole numbers")
        t = t.astype(np.int64)
    if (np.diff(t) <= 0).any():
        raise NQMError("Log: steps must increase")
    if t[0] < 0 or t[-1] > program.steps:
        raise NQMError(
            f"Log: steps must lie in 0 to {program.steps}, the program's; got {t[0]} to {t[-1]}"
        )
    if not np.isfinite(y).all() or (y <= 0).any():
        raise NQMError("Log: losses must be finite and > 0; drop diverged records")
    return t, y


def _grid(programs: Sequence[Program], directions: int) -> Array:
    """Curvatures that the programs can tell apart, evenly in their logarithm."""
    from nqm.tuning.stability import stability_edge

    one = Problem([1.0], 1.0)
    tops, totals = [], []
    for program in programs:
        total = 0.0
        for phase in program.phases:
            rates = phase.settings(0, phase.steps)[:, 0] if phase.steps else np.zeros(1)
            if rates.max() > 0:
                edge = stability_edge(one, phase.algorithm)  # type: ignore[arg-type]
                tops.append(edge / rates.max())
            total += float(rates.sum())
        totals.append(total)
    total = max(totals)
    high = 0.9 * min(min(tops), 1e6 / total)
    return np.geomspace(min(1.0 / (30.0 * total), high / 1e3), high, directions)


def _design(h: Array, program: Program, at: Iterable[int]) -> Array:
    """Columns b_j, n_j and 1 at the records, shape (n, 2 J + 1)."""
    from nqm.solvers.moments import solve

    parts, steps = [], list(map(int, at))
    for variance, noise in ((1.0, 0.0), (0.0, 1.0)):
        problem = Problem(h, noise, initial_variance=variance)
        found = solve(problem, program, steps)
        assert found.weight_mean is not None
        assert found.weight_variance is not None
        second = found.weight_mean**2 + found.weight_variance
        parts.append(0.5 * h * second)
    return np.hstack([*parts, np.ones((len(steps), 1))])


def _correlation(residuals: Array) -> float:
    """Integrated autocorrelation of residuals, at least 1 (window where it first falls below 0)."""
    centred = residuals - residuals.mean()
    power = float(centred @ centred)
    if power == 0.0:
        return 1.0
    total = 1.0
    for lag in range(1, len(centred) // 2):
        r = float(centred[lag:] @ centred[:-lag]) / power
        if r <= 0:
            break
        total += 2.0 * r
    return total


class _Fit:
    """Non-negative least squares of relative residuals, with smooth densities."""

    def __init__(self, columns: Array, losses: Array, directions: int):
        self.directions = directions
        self.scaled = columns / losses[:, None]
        self.norms = np.maximum(np.sqrt((self.scaled**2).sum(0)), 1e-300)
        self.unit = self.scaled / self.norms
        second = np.diff(np.eye(directions), 2, axis=0)
        rough = np.zeros((2 * len(second), columns.shape[1]))
        rough[: len(second), :directions] = second
        rough[len(second) :, directions : 2 * directions] = second
        self.rough = rough

    def solve(self, smoothing: float, keep: NDArray[np.bool_] | None = None) -> Array:
        """Unknowns (a, v, L_inf) that fit the kept records."""
        from scipy.optimize import nnls

        unit = self.unit if keep is None else self.unit[keep]
        stacked = np.vstack((unit, math.sqrt(smoothing) * self.rough))
        target = np.concatenate((np.ones(len(unit)), np.zeros(len(self.rough))))
        found, _ = nnls(stacked, target, maxiter=50 * unit.shape[1])
        return np.asarray(found / self.norms)

    def best_smoothing(self) -> float:
        """Strength with the least error on records left out in blocks, each between others."""
        n = len(self.unit)
        block = np.arange(n) * 8 // n
        errors = []
        for smoothing in SMOOTHING:
            total = 0.0
            for one in range(1, 7):
                theta = self.solve(smoothing, block != one)
                total += float(((self.scaled[block == one] @ theta - 1.0) ** 2).sum())
            errors.append(total)
        return SMOOTHING[int(np.argmin(errors))]

    def range(self, row: Array, centre: Array, error: float, slack: float) -> tuple[float, float]:
        """Least and largest ``row @ theta`` whose squares exceed those of the best fit by `slack`.

        In units of the squared error; no smoothing, so that the log alone decides.
        """
        allowed = self.misfit(self.closest) + slack * error**2
        value = float(row @ centre)
        ends = []
        for sign in (-1.0, 1.0):
            ends.append(self._end(row, sign, allowed, value))
        return min(ends[0], value), max(ends[1], value)

    @cached_property
    def closest(self) -> Array:
        """Unknowns of the least misfit, without smoothing."""
        return self.solve(0.0)

    def misfit(self, theta: Array) -> float:
        """Sum of squared relative residuals."""
        return float(((self.scaled @ theta - 1.0) ** 2).sum())

    def _end(self, row: Array, sign: float, allowed: float, value: float) -> float:
        """Farthest value on one side that a fit within the allowed misfit reaches.

        A row that pulls the value to a far target is added with more and more weight; on the path
        of its weights the misfit grows, and a bisection finds where it is what is allowed.
        """
        from scipy.optimize import nnls

        target = 0.0 if sign < 0 else 4.0 * value
        pull = row / self.norms
        ones = np.ones(len(self.unit))

        def at(weight: float) -> Array:
            stacked = np.vstack((self.unit, weight * pull / value))
            goal = np.append(ones, weight * target / value)
            found, _ = nnls(stacked, goal, maxiter=50 * self.unit.shape[1])
            return np.asarray(found / self.norms)

        low, high = -6.0, 4.0
        reached = value
        for _ in range(18):
            middle = 0.5 * (low + high)
            theta = at(10.0**middle)
            if self.misfit(theta) <= allowed:
                low, reached = middle, float(row @ theta)
            else:
                high = middle
        return reached

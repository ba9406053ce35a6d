"""Steady states: the limit of the expected loss at constant or cyclic rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
import pandas as pd

from nqm.algorithms.averaging import LAWA, SWA
from nqm.algorithms.base import Algorithm
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.wrapper import Wrapper
from nqm.errors import NQMError
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, one_phase
from nqm.result import WITHIN_RANGE, Kind, Status
from nqm.solvers import moving_window
from nqm.solvers._kernels.powers import stationary_exact
from nqm.solvers.first_order_range import first_order_errors
from nqm.solvers.moments import Map, phase_cycles, power, whole_period
from nqm.solvers.multiplicative_long_run import balance_point
from nqm.transition import readout, spectral_radius
from nqm.words import short_html, short_repr

if TYPE_CHECKING:
    from nqm.distribution import LossDistribution
    from nqm.solvers.least_squares.moments import CoupledSteady

#: Share of the start's loss at which the start counts as forgotten.
FORGOTTEN = 1e-3
#: A number of steps after which every finite window is full; a multiple of any usual period.
LONG = 720_720


@dataclass(frozen=True)
class Steady:
    """Steady state at the end of a cycle of the rates (after any step when they are constant).

    Attributes
    ----------
    loss, member_loss : float
        Expected loss of the mean model and of the average member; NaN where unstable.
    weight_variance, deviation_variance : ndarray, shape (d,)
        Variance of the evaluated weights, and of a member about them. NaN along flat directions,
        which diffuse without end and have no loss.
    weight_mean : ndarray, shape (d,)
        Limit of the mean distance from the minimum: 0 except for methods that pull to another
        point. A pull to the start of the phase counts as one to the start of the problem.
    status : Status
        FINISHED, or DIVERGED when some curved direction is unstable.
    radius : float
        Largest spectral radius of one cycle over curved directions.
    kind : Kind
        EXACT, or FIRST_ORDER for multiplicative late-phase weights.
    problem, phase : Problem, Phase
        The arguments of `steady`.
    """

    loss: float
    member_loss: float
    status: Status
    radius: float
    kind: Kind
    weight_variance: FloatArray = field(repr=False)
    deviation_variance: FloatArray = field(repr=False)
    weight_mean: FloatArray = field(repr=False)
    problem: Problem = field(repr=False)
    phase: Phase = field(repr=False)

    __repr__ = short_repr
    _repr_html_ = short_html

    @cached_property
    def distribution(self) -> LossDistribution:
        """Distribution of the mean model's loss from run to run: standard deviation, quantiles.

        Raises
        ------
        NQMError
            If the phase is unstable, or if directions are correlated and too many for their
            covariance to be computed (`nqm.solvers.correlated`).
        """
        from nqm.distribution import LossDistribution
        from nqm.solvers.correlated import steady_pairs

        if self.status is Status.DIVERGED:
            raise NQMError("an unstable phase has no steady distribution; lower its learning rate")
        variance = self.weight_variance
        if self.problem.correlated:
            variance = steady_pairs(self.problem, self.phase) + np.diag(np.nan_to_num(variance))
        return LossDistribution(self.problem, self.weight_mean, variance)

    @cached_property
    def in_range(self) -> bool:
        """Whether a first-order steady state is estimated to be within 5 % of the true loss.

        The true loss is that of a run when it has forgotten its start, to a share of 1e-3 in the
        slowest direction: from there on noise moves it slowly to the long-run floor. True for
        exact results; False where unstable.
        """
        if self.kind is Kind.EXACT:
            return True
        if self.status is Status.DIVERGED:
            return False
        period = whole_period(self.phase)
        cycles = 1 + int(math.log(FORGOTTEN) / (2.0 * math.log(max(self.radius, 1e-300))))
        run = replace(self.phase, steps=period * cycles)
        second = np.nan_to_num(self.weight_mean**2 + self.weight_variance)[None]
        errors = first_order_errors(self.problem, Program((run,)), [run.steps], second)
        return bool(errors[0] <= WITHIN_RANGE)

    def table(self) -> pd.DataFrame:
        """Tabulate the losses.

        Returns
        -------
        DataFrame
            One row with columns loss, member_loss, radius, status, kind, in_range.
        """
        return pd.DataFrame(
            {
                "loss": [self.loss],
                "member_loss": [self.member_loss],
                "radius": [self.radius],
                "status": [str(self.status)],
                "kind": [str(self.kind)],
                "in_range": [self.in_range],
            }
        )


@overload
def steady(problem: Problem, phase: Phase) -> Steady: ...


@overload
def steady(problem: LeastSquares, phase: Phase) -> CoupledSteady: ...


def steady(problem: Problem | LeastSquares, phase: Phase) -> Steady | CoupledSteady:
    """Compute the steady state of a phase that is continued without end.

    Solves S = A S A' + Q over one cycle of rates, by doubling. For elementwise multiplicative
    late-phase weights this is the quasi-steady state to first order; `nqm.balance_point` is their
    long-run floor, reached after a time of order 1 / (lr^2 v).

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem of d directions.
    phase : Phase
        Constant or cyclic rates and batch size; its `steps` have no effect.

    Returns
    -------
    Steady or `nqm.solvers.least_squares.moments.CoupledSteady`
        The second one for least squares. An unstable phase has losses of NaN and says so in
        `status`.

    Raises
    ------
    NQMError
        If the rates never repeat, or if the method averages over all its past (SWA, schedule-free):
        the variance of such an average keeps falling as one over the number of steps.
    """
    phase = one_phase("steady.phase", phase)
    problem = any_problem("steady", problem)
    if isinstance(problem, LeastSquares):
        from nqm.solvers.least_squares import (
            moments as least_squares,  # which builds on this module
        )

        return least_squares.steady(problem, phase)
    check_settles(phase.algorithm)
    # The snapshots of a long window are not carried along: its mean is found afterwards.
    window = _long_window(problem, phase)
    carried = phase if window is None else replace(phase, algorithm=window.inner)
    modes, starts, cycles = phase_cycles(problem, carried)
    curved = problem.curvature > 0
    mask = phase.algorithm.member_mask(problem) if isinstance(phase.algorithm, Algorithm) else None
    variances, means, radius = [], [], 0.0
    for mode, start, (matrix, noise, low) in zip(modes, starts, cycles, strict=True):
        here = curved if mode.name == "mean" or mask is None else curved & (mask > 0)
        mean, variance = np.full((2, problem.directions), np.nan)
        mean[curved], variance[curved] = 0.0, 0.0
        names = mode.algorithm.coordinates
        still = np.array([name in mode.algorithm.constants for name in names])
        moving = matrix[np.ix_(here, ~still, ~still)]
        moving_low = low[np.ix_(here, ~still, ~still)]
        radius = max(radius, float(spectral_radius(moving).max(initial=0.0)))
        if radius < 1.0:
            c = readout(mode.algorithm, LONG * mode.algorithm.time.period)
            solved = np.empty_like(moving)
            kicks = np.ascontiguousarray(noise[np.ix_(here, ~still, ~still)])
            stationary_exact(
                np.ascontiguousarray(moving), kicks, np.ascontiguousarray(moving_low), solved
            )
            pull = (
                _response(moving, moving_low, matrix[np.ix_(here, ~still, still)]).swapaxes(1, 2)
                @ c[~still]
            )
            pull += c[still]
            mean[here] = np.einsum("dk,dk->d", pull, start.mean[here][:, still])
            fixed = start.started[np.ix_(here, still, still)]
            if window is None:
                variance[here] = np.einsum("i,dij,j->d", c[~still], solved, c[~still])
            else:
                one = Map(np.ascontiguousarray(moving), kicks, np.ascontiguousarray(moving_low))
                apart = power(one, window.every, exact=True)
                variance[here] = _mean_variance(apart, solved, c, window.window)
            variance[here] += np.einsum("dk,dkl,dl->d", pull, fixed, pull)
        else:
            variance[here] = np.nan
        variances.append(variance)
        means.append(mean)
    losses = [
        float(problem.weight[curved] @ (m[curved] ** 2 + v[curved]))
        for m, v in zip(means, variances, strict=True)
    ]
    stable = radius < 1.0
    deviation = variances[1] if len(variances) > 1 else np.where(curved, 0.0, np.nan)
    return Steady(
        loss=losses[0] if stable else np.nan,
        member_loss=sum(losses) if stable else np.nan,
        status=Status.FINISHED if stable else Status.DIVERGED,
        radius=radius if window is None else radius**window.every,
        kind=Kind.EXACT if isinstance(phase.algorithm, Algorithm) else Kind.FIRST_ORDER,
        weight_variance=variances[0],
        deviation_variance=deviation,
        weight_mean=means[0],
        problem=problem,
        phase=phase,
    )


def _long_window(problem: Problem, phase: Phase) -> LAWA | None:
    """The average of a phase if its window is long and nothing pulls its weights."""
    algorithm = phase.algorithm
    if not isinstance(algorithm, LAWA) or algorithm.constants:
        return None
    return algorithm if moving_window.is_long(problem, phase) else None


def _mean_variance(step: Map, settled: FloatArray, weights: FloatArray, window: int) -> FloatArray:
    """Variance (d,) of the mean of the last snapshots, `step` apart, in the steady state `settled`.

    From the steady state a running sum of the weights is carried through as many snapshots.
    """
    d, n = settled.shape[:2]
    lift = np.vstack([np.eye(n), weights])  # the state after a step, and the weights there
    matrix, noise, low = np.zeros((3, d, n + 1, n + 1))
    matrix[:, :, :n], low[:, :, :n] = lift @ step.matrix, lift @ step.low
    matrix[:, n, n] = 1.0
    noise[...] = lift @ step.noise @ lift.T
    many = power(Map(matrix, noise, low), window)
    row = many.matrix[:, n, :n]
    total = np.einsum("di,dij,dj->d", row, settled, row) + many.noise[:, n, n]
    return np.asarray(total / window**2)


def _response(moving: FloatArray, low: FloatArray, pulled: FloatArray) -> FloatArray:
    """Limit of the moving coordinates per unit of each constant one, (d, n, constants)."""
    identity = np.eye(moving.shape[-1])
    return np.asarray(np.linalg.solve((identity - moving) - low, pulled))


def settle(problem: Problem, phase: Phase) -> pd.DataFrame:
    """Tabulate the steady state and, if there is one, the long-run floor.

    Elementwise multiplicative late-phase weights have one, at constant rates and batch size.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem of d directions.
    phase : Phase
        Constant or cyclic rates and batch size; its `steps` have no effect.

    Returns
    -------
    DataFrame
        Columns loss, member_loss, radius (for least squares kappa as well), status, kind, in_range;
        one row for the steady state and one of kind "long_run" for the floor.
    """
    now = steady(problem, phase)
    table = now.table()
    algorithm = phase.algorithm
    if not isinstance(algorithm, MultiplicativeLatePhase) or now.status is Status.DIVERGED:
        return table
    if whole_period(phase) > 1:
        return table
    lr, member_lr, batch_size = phase.settings(0, 1)[0]
    try:
        floor = balance_point(problem, algorithm, lr, member_lr, batch_size=batch_size)
    except NQMError:  # no stable balance point
        loss, member_loss, status = np.nan, np.nan, Status.DIVERGED
    else:
        loss, member_loss, status = floor.loss, floor.member_loss, Status.FINISHED
    row = table.assign(
        loss=loss,
        member_loss=member_loss,
        radius=np.nan,
        status=str(status),
        kind=str(Kind.LONG_RUN),
        in_range=True,
    )
    return pd.concat([table, row], ignore_index=True)


def check_settles(algorithm: object) -> None:
    """Refuse a method that averages over all its past and so has no steady state.

    Parameters
    ----------
    algorithm : object
        Any method, with its averages around it.

    Raises
    ------
    NQMError
        For SWA, and for methods each of whose steps differs from the last (schedule-free).
    """
    if isinstance(algorithm, Algorithm) and algorithm.time.update_never_repeats:
        raise NQMError(
            f"{type(algorithm).__name__} has no steady state: each of its steps differs from the "
            "last; run it for a number of steps"
        )
    while isinstance(algorithm, Wrapper):
        if isinstance(algorithm, SWA):
            raise NQMError(
                "swa has no steady state: its variance falls as 1 / snapshots; "
                "run it for a number of steps, or use lawa or ema"
            )
        algorithm = algorithm.inner

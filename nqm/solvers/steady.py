"""Steady states: where the expected loss settles at constant or cyclic rates."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nqm.algorithms.averaging import SWA
from nqm.algorithms.base import Algorithm
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.wrapper import Wrapper
from nqm.balance import balance_point
from nqm.errors import NQMError
from nqm.problem import FloatArray, Problem
from nqm.program import Phase
from nqm.result import Kind, Status
from nqm.solvers import _kernels
from nqm.solvers.moments import phase_cycles, whole_period
from nqm.transition import readout, spectral_radius

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
        which diffuse for ever but cost nothing.
    status : Status
        FINISHED, or DIVERGED when some curved direction is unstable.
    radius : float
        Largest spectral radius of one cycle over curved directions.
    kind : Kind
        EXACT, or FIRST_ORDER for multiplicative late-phase weights.
    """

    loss: float
    member_loss: float
    status: Status
    radius: float
    kind: Kind
    weight_variance: FloatArray = field(repr=False)
    deviation_variance: FloatArray = field(repr=False)

    def table(self) -> pd.DataFrame:
        """One row."""
        return pd.DataFrame(
            {
                "loss": [self.loss],
                "member_loss": [self.member_loss],
                "radius": [self.radius],
                "status": [str(self.status)],
                "kind": [str(self.kind)],
            }
        )


def steady(problem: Problem, phase: Phase) -> Steady:
    """Steady state of a phase that goes on for ever; its `steps` are not looked at.

    The fixed point of S = A S A' + Q over one cycle of rates, by doubling. For elementwise
    multiplicative late-phase weights this is the quasi-steady state of the first order; the
    long-run floor, reached after a time of order 1 / (lr^2 v), is `nqm.balance_point`.

    Raises
    ------
    NQMError
        For rates that never repeat, and for a uniform average (SWA), whose variance keeps
        falling as one over the number of snapshots.
    """
    check_settles(phase.algorithm)
    modes, cycles = phase_cycles(problem, phase)
    curved = problem.curvature > 0
    variances, radius = [], 0.0
    for mode, (matrix, noise) in zip(modes, cycles, strict=True):
        here = spectral_radius(matrix[curved])
        radius = max(radius, float(here.max(initial=0.0)))
        fixed = np.full_like(noise, np.nan)
        if radius < 1.0:
            solved = np.empty((int(curved.sum()), *noise.shape[1:]))
            _kernels.stationary(matrix[curved], noise[curved], solved)
            fixed[curved] = solved
        c = readout(mode.algorithm, LONG * mode.algorithm.period)
        variances.append(np.einsum("i,dij,j->d", c, fixed, c))
    losses = [float(problem.weight[curved] @ v[curved]) for v in variances]
    stable = radius < 1.0
    deviation = variances[1] if len(variances) > 1 else np.where(curved, 0.0, np.nan)
    return Steady(
        loss=losses[0] if stable else np.nan,
        member_loss=sum(losses) if stable else np.nan,
        status=Status.FINISHED if stable else Status.DIVERGED,
        radius=radius,
        kind=Kind.EXACT if isinstance(phase.algorithm, Algorithm) else Kind.FIRST_ORDER,
        weight_variance=variances[0],
        deviation_variance=deviation,
    )


def settle(problem: Problem, phase: Phase) -> pd.DataFrame:
    """`steady` as a table, with a second row for the long-run floor where there is one.

    Elementwise multiplicative late-phase weights have one, at constant rates and batch size.
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
        found = (np.nan, np.nan, Status.DIVERGED)
    else:
        found = (floor.loss, floor.member_loss, Status.FINISHED)
    loss, member_loss, status = found
    row = table.assign(
        loss=loss,
        member_loss=member_loss,
        radius=np.nan,
        status=str(status),
        kind=str(Kind.LONG_RUN),
    )
    return pd.concat([table, row], ignore_index=True)


def check_settles(algorithm: object) -> None:
    """Raise NQMError for a uniform average, which has no steady state."""
    while isinstance(algorithm, Wrapper):
        if isinstance(algorithm, SWA):
            raise NQMError(
                "swa has no steady state: its variance falls as 1 / snapshots; "
                "run it for a number of steps, or use lawa or ema"
            )
        algorithm = algorithm.inner

"""First order of late-phase weights that multiply all directions by one number phi_k.

The scalar couples every direction, so the moments are dense. About theta0 phi0 = w*,

    xbar' = xbar - (b I + a theta0 theta0') (H xbar + ebar),    b = gamma K lr phi0^2, a = member_lr

and a member differs from the mean model only along theta0, by s theta0 with
s' = s - a theta0' (H theta0 s + e).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.errors import NQMError
from nqm.problems.correlation import covariance
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program
from nqm.result import Kind, Trajectory, runaway
from nqm.solvers import _kernels

#: Dense powers lose one unit in the last place per step: 1e-9 after this many steps.
MOST_STEPS = 10**7
#: Dense matrices beyond this many directions would take gigabytes and minutes.
LARGEST = 1_000


def scalar_first_order(problem: Problem, phase: Phase, at: Sequence[int]) -> Trajectory:
    """Compute the first-order expected loss of one phase of scalar factors.

    Valid if noise, spread and displacement are small compared with w*.

    Parameters
    ----------
    problem : Problem
        Of multiplicity 1 and at most 1000 directions; the phase begins at its start.
    phase : Phase
        `MultiplicativeLatePhase` with a scalar factor at constant rates and batch size.
    at : sequence of int
        Steps to record, at most 10^7.

    Returns
    -------
    Trajectory
        Of kind "first_order".

    Raises
    ------
    NQMError
        If a rate or the batch size is not constant, or a stated limit is exceeded.
    """
    algorithm, program = phase.algorithm, Program((phase,))
    assert isinstance(algorithm, MultiplicativeLatePhase)
    algorithm.check(problem)
    if any(period != 1 for _, _, period in phase.segments()) or len(list(phase.segments())) > 1:
        raise NQMError("the first order of scalar factors needs constant rates and batch size")
    if problem.directions > LARGEST or np.any(problem.multiplicity != 1.0):
        raise NQMError(
            f"the first order of scalar factors needs multiplicity 1 and at most {LARGEST} "
            f"directions; got {problem.directions}; use method 'sample'"
        )
    if max(at) > MOST_STEPS:
        raise NQMError(
            f"the first order of scalar factors loses digits beyond {MOST_STEPS:.0e} steps; "
            f"got {max(at)}; record earlier ones"
        )
    lr, member_lr, batch_size = phase.settings(0, 1)[0]
    k, h, theta = algorithm.members, problem.curvature, problem.minimum / algorithm.factor
    v = covariance(problem.noise_correlation, problem.noise_variance) / batch_size
    pull = algorithm.base_scale * k * lr * algorithm.factor**2 * np.eye(h.size)
    pull += member_lr * np.outer(theta, theta)
    mean_step = (np.eye(h.size) - pull * h, pull @ (v / k) @ pull.T)
    moment = theta**2 @ h
    noise = member_lr**2 * (theta @ v @ theta) * (1.0 - 1.0 / k)
    member_step = np.array([[1.0 - member_lr * moment]]), np.array([[noise]])
    spread = algorithm.factor**2 * algorithm.spread
    start = covariance(problem.initial_correlation, problem.initial_variance)
    start = start + spread / k * np.outer(theta, theta)
    start_member = np.array([[spread * (1.0 - 1.0 / k)]])

    rows = []
    for step in at:
        many, added = _power(mean_step, step)
        mean = many @ problem.initial_mean
        started = many @ start @ many.T
        whole = started + added
        decay, kick = _power(member_step, step)
        deviation = float((decay @ start_member @ decay.T + kick)[0, 0])
        curved = h[:, None] * whole
        bias = 0.5 * float(h @ (mean**2 + np.diag(started)))
        variance = 0.5 * float(h @ np.diag(added))
        spread_of_loss = 0.5 * np.sum(curved * curved.T) + (h * mean) @ whole @ (h * mean)
        member = bias + variance + 0.5 * moment * deviation
        rows.append((bias + variance, bias, variance, member, np.sqrt(spread_of_loss)))
    loss, bias_, variance_, member_loss, loss_sd = np.array(rows).T
    zeros = np.zeros(len(rows))
    return Trajectory(
        problem=problem,
        kind=Kind.FIRST_ORDER,
        steps=np.array(at, dtype=np.int64),
        examples=program.examples(at),
        loss=loss,
        bias=bias_,
        variance=variance_,
        member_loss=member_loss,
        stated_sd=loss_sd,
        stderr=zeros,
        member_stderr=zeros,
        runaway=runaway(problem, program),
    )


def _power(step: tuple[FloatArray, FloatArray], steps: int) -> tuple[FloatArray, FloatArray]:
    matrix, noise = (np.ascontiguousarray(part)[None] for part in step)
    many, added = np.empty_like(matrix), np.empty_like(noise)
    with np.errstate(over="ignore", invalid="ignore"):
        _kernels.power(matrix, noise, steps, many, added)
    return many[0], added[0]

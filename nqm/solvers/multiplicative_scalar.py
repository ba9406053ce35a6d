"""First order of late-phase weights that multiply all directions by one number phi_k.

The scalar couples every direction, so the moments are dense. About theta0 phi0 = w*,

    xbar' = xbar - (b I + a theta0 theta0') (H xbar + ebar),    b = gamma K lr phi0^2, a = member_lr

and a member differs from the mean model only along theta0, by s theta0 with
s' = s - a theta0' (H theta0 s + e).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.errors import NQMError
from nqm.problems.correlation import covariance
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program
from nqm.result import Kind, Trajectory, runaway
from nqm.solvers._kernels import powers
from nqm.solvers.closure_elementwise import start_nodes
from nqm.solvers.first_order_range import NOISE, NUDGE, arrival

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
    mean_step, member_step, theta = step_maps(problem, phase)
    k, h = algorithm.members, problem.curvature
    moment = theta**2 @ h
    spread = algorithm.factor**2 * algorithm.spread
    start = covariance(problem.initial_correlation, problem.initial_variance)
    start = start + spread / k * np.outer(theta, theta)
    start_member = np.array([[spread * (1.0 - 1.0 / k)]])

    rows = []
    for step in at:
        many, added = power(mean_step, step)
        mean = many @ problem.initial_mean
        started = many @ start @ many.T
        whole = started + added
        decay, kick = power(member_step, step)
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
        range_errors=partial(scalar_errors, problem, phase, at),
    )


Step = tuple[FloatArray, FloatArray]


def step_maps(problem: Problem, phase: Phase) -> tuple[Step, Step, FloatArray]:
    """Matrix and noise of one step of the mean model and of a member's deviation.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    phase : Phase
        Scalar factors at constant rates and batch size.

    Returns
    -------
    mean_step : tuple of ndarray, shapes (d, d)
        A and Q of S' = A S A' + Q.
    member_step : tuple of ndarray, shapes (1, 1)
        The same of a member's factor less the members' mean.
    theta : ndarray, shape (d,)
        Base weights about which the first order is taken.
    """
    algorithm = phase.algorithm
    assert isinstance(algorithm, MultiplicativeLatePhase)
    lr, member_lr, batch_size = phase.settings(0, 1)[0]
    k, h, theta = algorithm.members, problem.curvature, problem.minimum / algorithm.factor
    v = covariance(problem.noise_correlation, problem.noise_variance) / batch_size
    pull = algorithm.base_scale * k * lr * algorithm.factor**2 * np.eye(h.size)
    pull += member_lr * np.outer(theta, theta)
    noise = member_lr**2 * (theta @ v @ theta) * (1.0 - 1.0 / k)
    member_step = np.array([[1.0 - member_lr * (theta**2 @ h)]]), np.array([[noise]])
    return (np.eye(h.size) - pull * h, pull @ (v / k) @ pull.T), member_step, theta


def power(step: Step, steps: int) -> Step:
    """Combine equal steps.

    Parameters
    ----------
    step : tuple of ndarray
        A and Q of one step.
    steps : int
        Number of steps.

    Returns
    -------
    tuple of ndarray
        A and Q of all of them.
    """
    matrix, noise = (np.ascontiguousarray(part)[None] for part in step)
    many, added = np.empty_like(matrix), np.empty_like(noise)
    with np.errstate(over="ignore", invalid="ignore"):
        powers.power(matrix, noise, steps, many, added)
    return many[0], added[0]


def scalar_errors(problem: Problem, phase: Phase, at: Sequence[int]) -> FloatArray:
    """Estimate the relative error of `scalar_first_order`, as `nqm.solvers.first_order_range` does.

    Slopes by y come from the first order about another pair: factor / sqrt(y).

    Parameters
    ----------
    problem, phase, at
        As in `scalar_first_order`.

    Returns
    -------
    ndarray, shape (records,)
        Infinite where it is unstable.
    """
    algorithm = phase.algorithm
    assert isinstance(algorithm, MultiplicativeLatePhase)
    mean_step, member_step, theta = step_maps(problem, phase)
    lr, member_lr, batch_size = phase.settings(0, 1)[0]
    k, h, w, factor = algorithm.members, problem.curvature, problem.minimum, algorithm.factor
    v = covariance(problem.noise_correlation, problem.noise_variance) / batch_size
    size = np.linalg.norm(w)
    scaled, a = algorithm.base_scale * lr, member_lr * theta @ theta
    one = scalar_first_order(problem, phase, at)
    changed = [
        replace(phase, algorithm=replace(algorithm, factor=factor * np.exp(-0.5 * nudge)))
        for nudge in (-NUDGE, NUDGE)
    ]
    changed.append(replace(phase, member_lr=member_lr * np.exp(NUDGE)))
    low, high, faster = (scalar_first_order(problem, each, at) for each in changed)
    with np.errstate(all="ignore"):

        def logs(name: str) -> tuple[FloatArray, FloatArray]:
            """First and second derivative of the logarithm of a loss by log y."""
            x, y, z = (np.log(getattr(each, name)) for each in (low, one, high))
            return (z - x) / (2.0 * NUDGE), (z - 2.0 * y + x) / NUDGE**2

        slopes = {name: logs(name) for name in ("bias", "variance", "member_loss")}
        first_slope = np.log(faster.bias / one.bias) / NUDGE
        spread = w @ covariance(problem.initial_correlation, problem.initial_variance) @ w / size**2
        beside = (problem.initial_variance.sum() - spread) / size**2  # the rest of the start
        share, x, offset = start_nodes(bool(spread > 0.0), algorithm.spread > 0.0)
        first = 1.0 + (w @ problem.initial_mean / size + np.sqrt(spread) * x) / size
        across = (1.0 + np.sqrt(algorithm.spread / k) * offset) ** 2
        across = across + algorithm.spread * (1.0 - 1.0 / k)
        kb = k * scaled * factor**2
        log_y = np.log(arrival(np.array(a), np.array(kb), first**2, across)).ravel()
        started_at = share * ((first - 1.0) ** 2 + (across - 1.0) ** 2 / 4.0).ravel()
        started_at = started_at / started_at.sum() if started_at.sum() > 0.0 else share

        found = []
        for i, steps in enumerate(at):
            many, s = power(mean_step, steps)
            decay, kick = power(member_step, steps)
            seen = (h[:, None] * s) * h + v / k  # E gbar gbar'
            own = (theta @ v @ theta) * (1.0 - 1.0 / k) + (theta**2 @ h) ** 2 * kick[0, 0]
            slide = scaled**2 * k**2 * factor**2 * np.trace(seen)
            slide -= scaled * member_lr * k * (theta @ seen @ theta + own)
            slide /= theta @ theta + scaled * k * factor**2 / member_lr
            drift = float(np.clip(steps * slide, -3.0, 3.0))
            started = algorithm.spread * (1.0 - 1.0 / k)
            apart = started * decay[0, 0] ** 2 + kick[0, 0] / factor**2
            near = NOISE * (w @ s @ w / size**4 + apart)

            def off(name: str, ys: FloatArray, weights: FloatArray, i: int = i) -> float:
                if not getattr(one, name)[i] > 0.0:
                    return 0.0
                slope, bend = slopes[name]
                return float(abs(weights @ np.expm1(slope[i] * ys + 0.5 * bend[i] * ys**2)))

            drifted = np.array([drift]), np.ones(1)
            bias = off("bias", log_y, started_at) + off("bias", *drifted)
            if one.bias[i] > 0.0:
                early = started_at @ np.expm1(first_slope[i] * np.log(first**2).ravel())
                bias = max(bias, float(abs(early)))
            bias *= one.bias[i] / one.loss[i]
            noise = off("variance", log_y, share) + off("variance", *drifted)
            change = near + bias + noise * one.variance[i] / one.loss[i]
            pushed = np.abs(many @ w) * started + np.abs(w) * apart
            shift = np.abs(many @ problem.initial_mean)
            push = 0.5 * h @ (pushed**2 + 2.0 * pushed * shift) + one.bias[i] * beside
            member = near + bias + off("member_loss", log_y, share) + off("member_loss", *drifted)
            found.append(max(change + push / one.loss[i], member + push / one.member_loss[i]))
        errors = np.array(found)
    return np.where(np.isfinite(errors), errors, np.inf)

"""Gaussian moment closure of multiplicative late-phase weights w_k = theta phi_k.

The step is a polynomial, so that moments of one order need higher ones without end. Here theta and
the phi_k are taken as jointly Gaussian before every step, and their first two moments are moved
exactly. Members are exchangeable: phi_k = phibar + d_k, where the d_k are independent of theta and
phibar, and only S = sum d_k^2 acts on theta. With E S = (K - 1) D, Var S = 2 (K - 1) D^2 for
D = Var phi_k - Cov(phi_k, phi_l), and with b = lr gamma and a = member_lr,

    theta'  = theta (1 - b h (K phibar^2 + S)) + b h w* K phibar - b sum phi_j e_j
    phibar' = phibar (1 - a h theta^2) + a h w* theta - a theta ebar
    d_k'    = d_k (1 - a h theta^2) - a theta (e_k - ebar).

So six numbers per direction serve any K: the means and covariances of (theta, phibar), and D.
Expectations over (theta, phibar) are sums over Gauss-Hermite nodes, which are exact for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nqm.algorithms.base import Algorithm
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.errors import NQMError
from nqm.limits import check_walk
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program, goes_on
from nqm.result import Kind, Trajectory, runaway
from nqm.solvers.moments import solve
from nqm.words import short_html, short_repr

_Z, _WEIGHT = np.polynomial.hermite_e.hermegauss(5)  # exact up to degree 9
_FIRST, _SECOND = (part.reshape(-1, 1) for part in np.meshgrid(_Z, _Z, indexing="ij"))
_SHARE = np.outer(_WEIGHT, _WEIGHT).ravel() / (2.0 * np.pi)


@dataclass(frozen=True)
class _Moments:
    """Of (theta, phibar) and of the members' deviation, arrays (d,)."""

    theta: FloatArray
    phi: FloatArray
    var_theta: FloatArray
    cross: FloatArray
    var_phi: FloatArray
    apart: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    def nodes(self) -> tuple[FloatArray, FloatArray]:
        """Values of theta and phibar at the nodes, (25, d)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            top = np.sqrt(self.var_theta)
            lower = np.where(top > 0.0, self.cross / top, 0.0)
            rest = np.sqrt(np.maximum(self.var_phi - lower**2, 0.0))
        return self.theta + top * _FIRST, self.phi + lower * _FIRST + rest * _SECOND


def moment_closure(
    problem: Problem,
    program: Program | Phase | Sequence[Phase],
    at: Sequence[int] | None = None,
) -> Trajectory:
    """Approximate the expected loss of multiplicative late-phase weights by a moment closure.

    It follows the drift from the quasi-steady state to the long-run floor, which the first order
    (`nqm.solve`) does not show. Its error grows with noise and rate, as the weights become less
    Gaussian.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares) with minimum w* != 0.
    program : Program, Phase or sequence of Phase
        Phases of linear methods, whose moments are exact, then one or more phases of
        `MultiplicativeLatePhase` with coupling "elementwise".
    at : sequence of int, optional
        Steps of the whole program to record; about 100 by default.

    Returns
    -------
    Trajectory
        Of kind "closure"; `bias` and `variance` are NaN.

    Raises
    ------
    NQMError
        For a scalar factor, another order of phases, or too many steps.
    """
    problem = additive_only("moment_closure", problem)
    program = as_program("moment_closure.program", program)
    wanted = program.recorded(at)
    before, late = _divided(program)
    start = sum(phase.steps for phase in before)
    check_walk("moment_closure: the phases", program.steps - start, "their moments are closed anew")
    columns: list[tuple[float, float, float]] = []
    mean, variance = problem.initial_mean, problem.initial_variance
    if before:
        early = [step for step in wanted if step < start]
        exact = solve(problem, Program(tuple(before)), [*early, start])
        assert exact.weight_mean is not None
        assert exact.weight_variance is not None
        mean, variance = exact.weight_mean[-1], exact.weight_variance[-1]
        rows = zip(exact.loss, exact.member_loss, exact.loss_sd, strict=True)
        columns += list(rows)[: len(early)]
    pending = [step for step in wanted if step >= start]
    position, old, moments = start, None, None
    with np.errstate(over="ignore", invalid="ignore"):
        for phase in late:
            algorithm = phase.algorithm
            assert isinstance(algorithm, MultiplicativeLatePhase)
            algorithm.check(problem)
            if moments is None or old is None or not goes_on(old, phase):
                if moments is not None:
                    mean, variance = _weights(problem, moments)
                moments = _start(problem, algorithm, mean, variance)
            settings = phase.settings(0, phase.steps)
            if pending and pending[0] == position and old is None:
                columns.append(_read(problem, algorithm, moments))
                pending.pop(0)
            for lr, member_lr, batch_size in settings:
                if not pending:
                    break
                moments = _step(problem, algorithm, moments, lr, member_lr, batch_size)
                position += 1
                if pending[0] == position:
                    columns.append(_read(problem, algorithm, moments))
                    pending.pop(0)
            old = phase
    loss, member_loss, sd = np.array(columns).T
    unknown, zeros = np.full(len(wanted), np.nan), np.zeros(len(wanted))
    return Trajectory(
        problem=problem,
        kind=Kind.CLOSURE,
        steps=np.array(wanted, dtype=np.int64),
        examples=program.examples(wanted),
        loss=loss,
        bias=unknown,
        variance=unknown,
        member_loss=member_loss,
        stated_sd=sd,
        stderr=zeros,
        member_stderr=zeros,
        runaway=runaway(problem, program),
    )


def _divided(program: Program) -> tuple[list[Phase], list[Phase]]:
    """Linear phases, then multiplicative ones."""
    linear = [isinstance(phase.algorithm, Algorithm) for phase in program.phases]
    count = linear.index(False) if False in linear else len(linear)
    before, late = list(program.phases[:count]), list(program.phases[count:])
    for phase in late:
        algorithm = phase.algorithm
        if not isinstance(algorithm, MultiplicativeLatePhase):
            raise NQMError(
                "moment_closure.program must end with phases of MultiplicativeLatePhase; got "
                f"{type(algorithm).__name__} after one: use nqm.sample"
            )
        if algorithm.scalar:
            raise NQMError(
                "moment_closure is derived for coupling = 'elementwise'; got 'scalar': use "
                "nqm.sample"
            )
    if not late:
        raise NQMError(
            "moment_closure.program must have a phase of MultiplicativeLatePhase; got linear "
            "methods alone, whose moments are exact: use nqm.solve"
        )
    return before, late


def _start(
    problem: Problem, algorithm: MultiplicativeLatePhase, mean: FloatArray, variance: FloatArray
) -> _Moments:
    """Theta = w / factor, phi_k = factor (1 + sqrt(spread) normal)."""
    factor, one = algorithm.factor, np.ones(problem.directions)
    spread = factor**2 * algorithm.spread * one
    return _Moments(
        theta=(problem.minimum + mean) / factor,
        phi=factor * one,
        var_theta=variance / factor**2,
        cross=0.0 * one,
        var_phi=spread / algorithm.members,
        apart=spread,
    )


def _step(
    problem: Problem,
    algorithm: MultiplicativeLatePhase,
    moments: _Moments,
    lr: float,
    member_lr: float,
    batch_size: float,
) -> _Moments:
    k, b, h, w = algorithm.members, algorithm.base_scale * lr, problem.curvature, problem.minimum
    v, spread = problem.noise_variance / batch_size, (algorithm.members - 1) * moments.apart
    theta, phi = moments.nodes()
    kept = 1.0 - member_lr * h * theta**2
    pull = b * h * theta
    new_theta = theta - pull * (k * phi**2 + spread) + b * h * w * k * phi  # S at its mean
    new_phi = kept * phi + member_lr * h * w * theta
    mean_theta, mean_phi = _SHARE @ new_theta, _SHARE @ new_phi
    off_theta, off_phi = new_theta - mean_theta, new_phi - mean_phi
    square_theta = _SHARE @ theta**2
    scatter = 2.0 * spread * moments.apart  # Var S
    return _Moments(
        theta=mean_theta,
        phi=mean_phi,
        var_theta=_SHARE @ (off_theta**2 + pull**2 * scatter)
        + b**2 * v * (k * (_SHARE @ phi**2) + spread),
        cross=_SHARE @ (off_theta * off_phi) + b * member_lr * v * (_SHARE @ (theta * phi)),
        var_phi=_SHARE @ off_phi**2 + member_lr**2 * v / k * square_theta,
        apart=(_SHARE @ kept**2) * moments.apart + member_lr**2 * v * square_theta,
    )


def _weights(problem: Problem, moments: _Moments) -> tuple[FloatArray, FloatArray]:
    """Mean and variance of the mean model's distance from the minimum."""
    theta, phi = moments.nodes()
    off = theta * phi - problem.minimum
    mean = _SHARE @ off
    return mean, _SHARE @ (off - mean) ** 2


def _read(
    problem: Problem, algorithm: MultiplicativeLatePhase, moments: _Moments
) -> tuple[float, float, float]:
    """Loss of the mean model and of the average member, and the standard deviation of the first."""
    theta, phi = moments.nodes()
    square = (theta * phi - problem.minimum) ** 2
    mean = _SHARE @ square
    apart = (1.0 - 1.0 / algorithm.members) * moments.apart * (_SHARE @ theta**2)
    variance = 0.25 * problem.curvature**2 * (_SHARE @ (square - mean) ** 2)
    sd = np.nan if problem.correlated else float(np.sqrt(problem.multiplicity @ variance))
    weight = problem.weight
    return float(weight @ mean), float(weight @ (mean + apart)), sd

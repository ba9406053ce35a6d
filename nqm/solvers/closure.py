"""Gaussian moment closure of multiplicative late-phase weights w_k = theta phi_k.

The step is a polynomial, so that moments of one order need higher ones without end. Here theta and
the phi_k are taken as jointly Gaussian before every step, and their first two moments are moved
exactly, for one factor per direction (`nqm.solvers.closure_elementwise`) or one for all directions
(`nqm.solvers.closure_scalar`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nqm.algorithms.base import Algorithm
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.errors import NQMError
from nqm.limits import check_walk, check_work
from nqm.problems.correlation import covariance
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program, goes_on
from nqm.result import Kind, Trajectory, runaway
from nqm.solvers.closure_elementwise import Elementwise
from nqm.solvers.closure_scalar import Mixture
from nqm.solvers.moments import solve
from nqm.solvers.multiplicative_scalar import LARGEST


def moment_closure(
    problem: Problem,
    program: Program | Phase | Sequence[Phase],
    at: Sequence[int] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Approximate the expected loss of multiplicative late-phase weights by a moment closure.

    It follows the drift from the quasi-steady state to the long-run floor, which the first order
    (`nqm.solve`) does not show. Its error grows with noise and rate, as the weights become less
    Gaussian.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares) with minimum w* != 0; for a scalar factor of
        multiplicity 1 and at most 1000 directions.
    program : Program, Phase or sequence of Phase
        Phases of linear methods, whose moments are exact, then one or more phases of
        `MultiplicativeLatePhase` with one coupling.
    at : sequence of int, optional
        Steps of the whole program to record; about 100 by default.
    progress : callable, optional
        Called with the number of steps done since the last call.

    Returns
    -------
    Trajectory
        Of kind "closure"; `bias` and `variance` are NaN.

    Raises
    ------
    NQMError
        For another order of phases, both couplings in one program, or too much work.
    """
    problem = additive_only("moment_closure", problem)
    program = as_program("moment_closure.program", program)
    wanted = program.recorded(at)
    before, late = _divided(program)
    start = sum(phase.steps for phase in before)
    scalar = _check(problem, late, program.steps - start)
    columns: list[tuple[float, float, float]] = []
    mean, spread = problem.initial_mean, problem.initial_variance
    if scalar:
        spread = covariance(problem.initial_correlation, spread)
    if before:
        early = [step for step in wanted if step < start]
        exact = solve(problem, Program(tuple(before)), [*early, start], progress=progress)
        if scalar:
            *_, (mean, spread) = exact.weight_moments()
        else:
            assert exact.weight_mean is not None
            assert exact.weight_variance is not None
            mean, spread = exact.weight_mean[-1], exact.weight_variance[-1]
        rows = zip(exact.loss, exact.member_loss, exact.loss_sd, strict=True)
        columns += list(rows)[: len(early)]
    columns += _late(problem, late, (mean, spread), [s - start for s in wanted if s >= start],
                     progress)  # fmt: skip
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


def _late(
    problem: Problem,
    phases: Sequence[Phase],
    weights: tuple[FloatArray, FloatArray],
    pending: list[int],
    progress: Callable[[int], None] | None,
) -> list[tuple[float, float, float]]:
    """Losses of multiplicative phases at steps `pending`, from weights of given moments."""
    found: list[tuple[float, float, float]] = []
    position, old = 0, None
    moments: Elementwise | Mixture | None = None
    with np.errstate(over="ignore", invalid="ignore"):
        for phase in phases:
            algorithm = phase.algorithm
            assert isinstance(algorithm, MultiplicativeLatePhase)
            if moments is None or old is None or not goes_on(old, phase):
                weights = weights if moments is None else moments.weights(problem)
                make = Mixture if algorithm.scalar else Elementwise
                moments = make.start(problem, algorithm, *weights)
            if pending and pending[0] == position and old is None:
                found.append(moments.losses(problem, algorithm))
                pending = pending[1:]
            told = position
            for lr, member_lr, batch_size in phase.settings(0, phase.steps):
                if not pending:
                    return found
                moments = moments.step(problem, algorithm, lr, member_lr, batch_size)
                position += 1
                if pending[0] == position:
                    found.append(moments.losses(problem, algorithm))
                    pending = pending[1:]
                    if progress is not None:
                        progress(position - told)
                    told = position
            old = phase
    return found


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
                f"{type(algorithm).__name__} after one: use nqm.sample (method 'sample')"
            )
    if not late:
        raise NQMError(
            "moment_closure.program must have a phase of MultiplicativeLatePhase; got linear "
            "methods alone, whose moments are exact: use nqm.solve (method 'jump')"
        )
    return before, late


def _check(problem: Problem, late: Sequence[Phase], steps: int) -> bool:
    """Check the multiplicative phases; returns whether their factor is a scalar."""
    scalars = []
    for phase in late:
        assert isinstance(phase.algorithm, MultiplicativeLatePhase)
        phase.algorithm.check(problem)
        scalars.append(phase.algorithm.scalar)
    if len(set(scalars)) > 1:
        raise NQMError(
            "moment_closure.program must have one coupling in all phases of "
            "MultiplicativeLatePhase; got both: use nqm.sample (method 'sample')"
        )
    check_walk("moment_closure: the phases", steps, "their moments are closed anew")
    if not scalars[0]:
        return False
    d = problem.directions
    if d > LARGEST or np.any(problem.multiplicity != 1.0):
        raise NQMError(
            f"the closure of scalar factors needs multiplicity 1 and at most {LARGEST} "
            f"directions; got {d}; use nqm.sample (method 'sample')"
        )
    check_work("moment_closure: the phases' steps", steps, 200.0 * steps * d**2,
               "of a dense covariance")  # fmt: skip
    return True

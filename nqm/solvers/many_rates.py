"""Exact moments of programs that differ in their rates alone, in one call.

Their directions are put side by side, as the directions of one problem, each with its own rates,
and all programs are visited together (`nqm.solvers.moments.visit`). What is done to a direction
does not depend on the others, to the last bit; sums over directions are taken for each program by
itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program
from nqm.result import WITHIN_RANGE, Kind, Status, runaway
from nqm.schedule import Constant, Schedule
from nqm.solvers import moving_window
from nqm.solvers.first_order_range import first_order_errors
from nqm.solvers.moments import CHUNK, SMALL, TABLE, Law, check_sizes, law_of, visit
from nqm.transition import embedding
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class Losses:
    """Results of L programs at their records, arrays (L, records) unless stated.

    Attributes
    ----------
    steps, examples : ndarray, shape (records,)
        Of every program.
    loss, member_loss, bias, variance, loss_sd : ndarray
        See `nqm.result.Trajectory`.
    lost : ndarray of bool
        Whether the status is DIVERGED.
    in_range : ndarray of bool
        As of `Trajectory`.
    kind : Kind
        Of every program.
    """

    steps: NDArray[np.int64]
    examples: FloatArray
    loss: FloatArray
    member_loss: FloatArray
    bias: FloatArray
    variance: FloatArray
    loss_sd: FloatArray
    lost: NDArray[np.bool_]
    in_range: NDArray[np.bool_]
    kind: Kind

    __repr__ = short_repr
    _repr_html_ = short_html

    def columns(self) -> Iterator[dict[str, list[Any]]]:
        """Make the columns of `Trajectory.table` of each program.

        Yields
        ------
        dict of str to list
            Values by name, in the order of the table.
        """
        steps, examples = self.steps.tolist(), self.examples.tolist()
        zeros, kind = [0.0] * len(steps), [str(self.kind)] * len(steps)
        words = str(Status.FINISHED), str(Status.DIVERGED)
        parts = self.loss, self.member_loss, self.bias, self.variance, self.loss_sd
        rows = zip(*(part.tolist() for part in (*parts, self.lost, self.in_range)), strict=True)
        for loss, member, bias, variance, sd, lost, inside in rows:
            yield {
                "step": steps,
                "examples": examples,
                "loss": loss,
                "member_loss": member,
                "bias": bias,
                "variance": variance,
                "loss_sd": sd,
                "stderr": zeros,
                "member_stderr": zeros,
                "status": [words[one] for one in lost],
                "kind": kind,
                "in_range": inside,
            }


def fits(problem: Problem | LeastSquares, program: Program, at: list[int]) -> bool:
    """Tell whether `solve_rates` knows programs of this kind.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem of d directions.
    program : Program
        Phases; what their rates are does not matter.
    at : list of int
        Steps to record, rising and distinct.

    Returns
    -------
    bool
        Whether directions are independent, all methods have moments of their own in each of them,
        exact or to first order, and few coordinates, and no average of a long window is computed
        by runs of its own.

    Raises
    ------
    NQMError
        If `nqm.solve` refuses the program.
    """
    if isinstance(problem, LeastSquares) or problem.correlated or problem.expected_losses_only:
        return False
    only = program.phases[0].algorithm
    if len(program.phases) == 1 and isinstance(only, MultiplicativeLatePhase) and only.scalar:
        return False
    if moving_window.fits(problem, program):
        return False
    laws = [law_of(phase, problem) for phase in program.phases]
    check_sizes(problem, laws, at, jump=True)
    return all(_law_fits(law) for law in laws)


def _law_fits(law: Law) -> bool:
    chains = [mode.algorithm for mode in law.algorithm.modes()]
    # Where members exist in some directions alone, their spread is not known of all programs.
    spread = law.scales is not None and any(embedding(chain)[1].any() for chain in chains)
    return not spread and all(len(chain.coordinates) <= SMALL for chain in chains)


def most(problem: Problem, program: Program) -> int:
    """Number of programs whose moments take little memory together.

    Parameters
    ----------
    problem : Problem
        Problem of d directions.
    program : Program
        One of them.

    Returns
    -------
    int
        At least 1.
    """
    walked, composed = 0, 0
    for phase in program.phases:
        walked = max(walked, 0 if phase.constant else phase.steps)
        lengths = [period for _, _, period in phase.segments() if period is not None]
        chains = [mode.algorithm for mode in law_of(phase, problem).algorithm.modes()]
        matrix = max(len(chain.coordinates) for chain in chains) ** 2
        composed = max(composed, max(lengths, default=0) * matrix * problem.directions)
    numbers = 16 * problem.directions + 4 * min(walked, TABLE) + min(composed, CHUNK)
    return max(1, min(1000, CHUNK // numbers))


#: For one phase lr and member_lr (of no effect for a method without) of every program.
Rates = tuple[Sequence[Schedule], Sequence[Schedule]]


def solve_rates(
    problem: Problem, program: Program, rates: Sequence[Rates], at: list[int]
) -> Losses:
    """Compute what `nqm.solve` does for every program, to the last bit.

    Parameters
    ----------
    problem : Problem
        Problem of d directions.
    program : Program
        Phases, for which `fits`.
    rates : sequence of (sequence of Schedule, sequence of Schedule)
        For each phase lr and member_lr (of no effect for a method without) of every program, which
        divide the phase into the same segments.
    at : list of int
        Steps to record, rising and distinct.

    Returns
    -------
    Losses
        Of all programs.
    """
    count = len(rates[0][0])
    laws = [law_of(phase, problem) for phase in program.phases]
    # Every mode asks for the same ones.
    settings = [
        functools.lru_cache(maxsize=1)(partial(_settings, phase, own))
        for phase, own in zip(program.phases, rates, strict=True)
    ]
    found = visit(_stacked(problem, count), laws, at, settings, count, moments=not program.linear)
    one = {name: values.T for name, values in found.losses.items()}
    with np.errstate(invalid="ignore"):
        lost = ~np.isfinite(one["loss"]) | (one["loss"] > runaway(problem, program))
    inside = np.ones((count, len(at)), dtype=bool)
    if not program.linear:
        second = (found.mean**2 + found.variance).reshape(len(at), count, -1)
        for i in range(count):
            own_program = _program(program, rates, i)
            errors = first_order_errors(problem, own_program, at, second[:, i])
            inside[i] = errors <= WITHIN_RANGE
    return Losses(
        steps=np.array(at, dtype=np.int64),
        examples=program.examples(at),
        kind=Kind.EXACT if program.linear else Kind.FIRST_ORDER,
        loss=one["loss"],
        member_loss=one["member_loss"],
        bias=one["bias"],
        variance=one["variance"],
        loss_sd=one["stated_sd"],
        lost=lost | one["unstable"],
        in_range=inside,
    )


def _program(program: Program, rates: Sequence[Rates], i: int) -> Program:
    """The program of number i."""
    phases = []
    for phase, (lr, member_lr) in zip(program.phases, rates, strict=True):
        own = None if phase.member_lr is None else member_lr[i]
        phases.append(replace(phase, lr=lr[i], member_lr=own))
    return Program(tuple(phases))


def _stacked(problem: Problem, count: int) -> Problem:
    """All directions, `count` times one after the other."""

    def tiled(values: FloatArray) -> FloatArray:
        return np.tile(values, count)

    return Problem(
        tiled(problem.curvature),
        tiled(problem.noise_variance),
        initial_mean=tiled(problem.initial_mean),
        initial_variance=tiled(problem.initial_variance),
        minimum=tiled(problem.minimum),
        multiplicity=tiled(problem.multiplicity),
    )


def _settings(phase: Phase, rates: Rates, start: int, stop: int) -> FloatArray:
    """Rates and batch size of every program, (L, steps, rates + 1)."""
    steps = np.arange(start, stop)
    own = phase.settings(start, stop)
    whole = np.empty((len(rates[0]), *own.shape))
    whole[:, :, -1] = own[:, -1]
    for i, schedules in enumerate(rates[: own.shape[1] - 1]):
        given: Sequence[Any] = schedules
        first = given[0]
        if all(schedule is first for schedule in given):
            whole[:, :, i] = first(steps)
        elif all(type(schedule) is Constant for schedule in given):
            whole[:, :, i] = np.array([schedule.value for schedule in given])[:, None]
        else:
            whole[:, :, i] = [schedule(steps) for schedule in given]
    return whole

"""Exact moments of programs that differ in their rates alone, in one call.

Their directions are put side by side, as the directions of one problem; where rates are constant,
with factors on its rates. Where they are not, all programs are walked together.
All that `nqm.solvers.moments` does to a direction is the same there, to the last bit; sums over
directions are taken for each program by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program
from nqm.result import Kind, Status, runaway
from nqm.schedule import Constant, Schedule
from nqm.solvers.moments import (
    CHUNK,
    SMALL,
    TABLE,
    Law,
    Moments,
    Walker,
    at_start,
    check_sizes,
    hand_over,
    law_of,
)
from nqm.solvers.polynomial_walk import polynomials, square_weight
from nqm.step_polynomial import KINDS
from nqm.transition import spectral_radius
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
    """

    steps: NDArray[np.int64]
    examples: FloatArray
    loss: FloatArray
    member_loss: FloatArray
    bias: FloatArray
    variance: FloatArray
    loss_sd: FloatArray
    lost: NDArray[np.bool_]

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
        zeros, kind = [0.0] * len(steps), [str(Kind.EXACT)] * len(steps)
        inside = [True] * len(steps)
        words = str(Status.FINISHED), str(Status.DIVERGED)
        parts = self.loss, self.member_loss, self.bias, self.variance, self.loss_sd, self.lost
        for loss, member, bias, variance, sd, lost in zip(
            *(part.tolist() for part in parts), strict=True
        ):
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
        Whether directions are independent, all methods linear and of few coordinates, the same in
        all directions; and every stretch of a phase has steps that are all the same, or rates that
        never repeat in steps that are polynomials.

    Raises
    ------
    NQMError
        If `nqm.solve` refuses the program.
    """
    if isinstance(problem, LeastSquares) or problem.correlated or problem.expected_losses_only:
        return False
    if not all(_phase_fits(problem, phase) for phase in program.phases):
        return False
    check_sizes(problem, [law_of(phase, problem) for phase in program.phases], at, jump=True)
    return True


def _phase_fits(problem: Problem, phase: Phase) -> bool:
    algorithm = phase.algorithm
    return (
        isinstance(algorithm, Algorithm)
        and all(len(mode.algorithm.coordinates) <= SMALL for mode in algorithm.modes())
        and algorithm.member_mask(problem) is None
        and all(
            period == 1 if phase.still(start, stop) else period is None and _walks(phase)
            for start, stop, period in phase.segments()
        )
    )


def _walks(phase: Phase) -> bool:
    """Whether all steps are polynomials in the rates."""
    algorithm: Any = phase.algorithm
    times = algorithm.time.reduced(np.arange(min(phase.steps, KINDS + 1)))
    return all(polynomials(mode, times) is not None for mode in algorithm.modes())


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
    walked = max((0 if phase.constant else phase.steps for phase in program.phases), default=0)
    numbers = 16 * problem.directions + 4 * min(walked, TABLE)
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
    stacked = _stacked(problem, count)
    laws = [law_of(phase, problem) for phase in program.phases]
    sums = np.zeros((len(at), 2, count, 4))
    unstable = np.zeros((len(at), count), dtype=bool)
    pending, row, offset, age = list(at), 0, 0, 0
    shape = count, problem.directions
    states = at_start(laws[0].algorithm, stacked)
    with np.errstate(over="ignore", invalid="ignore"):
        for index, (law, rate) in enumerate(zip(laws, rates, strict=True)):
            if index:
                states, age = hand_over(stacked, states, laws[index - 1], law, age)
            # Every mode asks for the same ones.
            settings = functools.lru_cache(maxsize=1)(partial(_settings, law.phase, rate))
            walking = Walker(stacked, law, states, age, count, settings)
            if pending and pending[0] == 0:
                row, _ = 1, pending.pop(0)
                sums[0, : len(states)] = _read(problem, states, age, shape)
            for start, stop, period in law.phase.segments():
                before = _losses(problem, states[0], age + start, shape)
                walker, unsteady = walking, None
                if period is not None:
                    own = _law(law, settings(start, start + 1)[:, 0], problem.directions)
                    walker = Walker(stacked, own, states, age)
                legs = walking.legs((start, stop, period), offset, pending, jump=True)
                for position, target, records in legs:
                    here = slice(row, row + len(records))
                    if period is None:
                        seen = walking.walk(position, target, at=records)
                        for mode, found in enumerate(seen):
                            sums[here, mode] = found.sums
                    else:
                        _jump(walker, position, target, start, count)
                        if records:
                            sums[row, : len(states)] = _read(problem, states, age + target, shape)
                    if records and period is not None:
                        if unsteady is None:
                            unsteady = _unsteady(problem, walker, start, shape)
                        loss = sums[row, 0, :, :2].sum(axis=1) + sums[row, 0, :, 2]
                        unstable[row] = unsteady & ~(loss <= before)
                    row += len(records)
            offset, age = offset + law.phase.steps, age + law.phase.steps
        bias, variance = sums[:, 0, :, :2].sum(axis=2), sums[:, 0, :, 2]
        loss = bias + variance
        member = loss + sums[:, 1, :, :3].sum(axis=2) if len(states) > 1 else loss
        lost = ~np.isfinite(loss) | (loss > runaway(problem, program)) | unstable
        loss_sd = np.sqrt(sums[:, 0, :, 3])
    steps, examples = np.array(at, dtype=np.int64), program.examples(at)
    return Losses(steps, examples, loss.T, member.T, bias.T, variance.T, loss_sd.T, lost.T)


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


def _law(law: Law, rates: FloatArray, directions: int) -> Law:
    """The law of a phase with rate 1, and with the rates as factors."""
    used = law.algorithm.rate_count
    scales = [np.ones(directions)] * used if law.scales is None else law.scales
    factors = [np.outer(rates[:, i], scales[i]).reshape(-1) for i in range(used)]
    member_lr = None if law.phase.member_lr is None else 1.0
    return Law(replace(law.phase, lr=1.0, member_lr=member_lr), law.algorithm, tuple(factors))


def _jump(walker: Walker, position: int, target: int, start: int, count: int) -> None:
    """Take equal steps; a program at rest stays there even if its matrix overflows."""
    resting = []
    for state in walker.states:
        moving = state.mean.any(axis=1) | state.started.any(axis=(1, 2))
        resting.append(np.repeat(~moving.reshape(count, -1).any(axis=1), moving.size // count))
    walker.jump(position, target, start, 1)
    for state, rest in zip(walker.states, resting, strict=True):
        if rest.any():
            state.mean[rest], state.started[rest] = 0.0, 0.0


def _weights(
    states: Moments, age: int, shape: tuple[int, int]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Moments of the evaluated weights, (L, d) each."""
    mean, started, noisy = (part.reshape(shape) for part in states.weights(age))
    return mean, started, noisy


def _losses(problem: Problem, state: Moments, age: int, shape: tuple[int, int]) -> FloatArray:
    mean, started, noisy = _weights(state, age, shape)
    return np.array([problem.weight @ row for row in mean**2 + started + noisy])


def _read(problem: Problem, states: list[Moments], age: int, shape: tuple[int, int]) -> FloatArray:
    """Sums of `nqm.solvers.polynomial_walk.Seen` for every mode and program, (modes, L, 4)."""
    weight, square = problem.weight, square_weight(problem)
    out = np.empty((len(states), shape[0], 4))
    for mode, state in enumerate(states):
        mean, started, noisy = _weights(state, age, shape)
        variance, squared = started + noisy, mean**2
        scatter = variance * (0.5 * variance + squared)
        # One by one, as a product of matrices need not round as that of its rows.
        for i in range(shape[0]):
            out[mode, i] = (
                weight @ squared[i],
                weight @ started[i],
                weight @ noisy[i],
                square @ scatter[i],
            )
    return out


def _unsteady(
    problem: Problem, walker: Walker, start: int, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Whether each program amplifies some direction that has curvature."""
    curved, found = problem.curvature > 0, np.zeros(shape[0], dtype=bool)
    for state in walker.states:
        matrix = walker.cycle(state.mode, start, 1).matrix
        matrix = matrix.reshape(*shape, *matrix.shape[1:])[:, curved]
        found |= (spectral_radius(matrix) > 1.0 + 1e-12).any(axis=1)
    return found

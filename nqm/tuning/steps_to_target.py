"""Number of steps to a target loss, at given rates and at the best constant rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nqm.errors import NQMError, check_number
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program, one_phase
from nqm.result import Status
from nqm.solvers.moments import PhaseWalk, solve
from nqm.solvers.steady import check_settles, steady

if TYPE_CHECKING:
    from nqm.solvers.least_squares.moments import CoupledPhaseWalk
from nqm.tuning.stability import searched_edge

#: Relative distance from the floor at which a loss has settled.
SETTLED = 1e-9

#: Multiplications that a full scan for the first crossing may cost (about a second).
SCAN_BUDGET = 2e8


@dataclass(frozen=True)
class Crossing:
    """Step at which the expected loss meets a target.

    Attributes
    ----------
    status : Status
        REACHED, NOT_REACHED (within the phase's steps) or DIVERGED.
    step, examples : float
        Steps and examples up to the crossing; NaN unless reached.
    loss : float
        Expected loss at that step.
    floor : float
        Steady-state loss; NaN if there is none. A target below it can be met only by a temporary
        minimum of the loss.
    scanned : bool
        Whether the loss was evaluated at every step before the crossing (for a last crossing, at
        every step of the phase). Otherwise it was evaluated on a grid of steps 5 % apart and inside
        the bracket, and a shorter oscillation across the target may have been missed.
    """

    status: Status
    step: float
    examples: float
    loss: float
    floor: float
    scanned: bool


def steps_to_target(
    problem: Problem | LeastSquares,
    phase: Program | Phase | Sequence[Phase],
    target: float,
    *,
    crossing: str = "first",
) -> Crossing:
    """Find the first (or last) step at which the expected loss falls to `target` or below.

    The loss need not fall monotonically (momentum, starts below the floor), so bisection would be
    wrong: a geometric grid of steps brackets the crossing, then every step inside is evaluated.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss is followed.
    phase : Phase, Program or sequence of Phase
        Method and rates; its `steps` are the largest number considered. 10**9 is quick at constant
        rates, but least squares takes each step one by one. Steps of a program of several phases
        are counted from its start.
    target : float
        Expected loss to reach, > 0.
    crossing : {"first", "last"}
        "first" is the first step at or below the target; "last" is the step from which the loss
        stays at or below the target until the end of the phase.

    Returns
    -------
    Crossing
        Its `status` says whether the target was reached.

    Raises
    ------
    NQMError
        If an argument is out of range, or the method has no exact moments.
    """
    check_number("target", target, low=0.0, closed_low=False)
    if crossing not in ("first", "last"):
        raise NQMError(f"crossing must be 'first' or 'last'; got {crossing!r}")
    program = as_program("steps_to_target.phase", phase)
    problem = any_problem("steps_to_target", problem)
    floor = _floor(problem, program.phases[-1])
    walk = _walk(problem, program)
    if crossing == "last":
        return _last(walk, program, target, floor)
    before, lost = 0, Status.NOT_REACHED
    begun = program.steps - program.phases[-1].steps
    for step, loss in walk.at(_grid(program)):
        if loss <= target:
            scanned = walk.cost(step) <= SCAN_BUDGET
            start = 0 if scanned else before
            while step - start > walk.longest_scan:
                finer = [start + (step - start) * i // 100 for i in range(101)]
                losses = [loss for _, loss in walk.at(finer)]
                first = next(i for i, loss in enumerate(losses) if i and loss <= target)
                start, step = finer[first - 1], finer[first]
            path = walk.path(start, step)
            hit = int(np.flatnonzero(path <= target)[0])
            return _crossed(program, start + hit, float(path[hit]), floor, scanned)
        before = step
        if not np.isfinite(loss):
            lost = Status.DIVERGED
            break
        if step > begun and target < floor and abs(loss - floor) <= SETTLED * floor:
            break
    # Minima between grid points count as crossings too, where a full scan is affordable.
    scanned = walk.cost(before) <= SCAN_BUDGET
    if scanned:
        path = walk.path(0, before)
        dips = np.flatnonzero(path <= target)
        if dips.size:
            return _crossed(program, int(dips[0]), float(path[dips[0]]), floor, True)
    return Crossing(lost, np.nan, np.nan, np.nan, floor, scanned)


class ProgramWalk:
    """Expected loss of a program of several phases, at chosen steps or at every step."""

    longest_scan = 10**4  #: every step of a scan is a record

    def __init__(self, problem: Problem | LeastSquares, program: Program):
        self.problem, self.program = problem, program

    def cost(self, steps: int) -> float:
        """Estimate the cost of evaluating every step; see `PhaseWalk.cost`.

        Parameters
        ----------
        steps : int
            Number of steps.

        Returns
        -------
        float
            Multiplications, to order of magnitude.
        """
        return float(steps) * (20_000 + 10 * self.problem.directions)

    def at(self, steps: Iterable[int]) -> Iterator[tuple[int, float]]:
        """Compute the expected loss at chosen steps.

        Parameters
        ----------
        steps : iterable of int
            Increasing numbers of steps, >= 0.

        Yields
        ------
        step : int
            Number of steps.
        loss : float
            Expected loss after them.
        """
        found = solve(self.problem, self.program, list(steps))
        yield from zip(found.steps.tolist(), found.loss.tolist(), strict=True)

    def path(self, start: int, stop: int) -> FloatArray:
        """Compute the expected loss at every step of a range.

        Parameters
        ----------
        start, stop : int
            First and last number of steps.

        Returns
        -------
        ndarray, shape (stop - start + 1,)
            Expected losses.
        """
        return solve(self.problem, self.program, range(start, stop + 1)).loss


def _walk(
    problem: Problem | LeastSquares, program: Program
) -> PhaseWalk | CoupledPhaseWalk | ProgramWalk:
    """Losses of a program at any steps."""
    if len(program.phases) > 1:
        return ProgramWalk(problem, program)
    if isinstance(problem, LeastSquares):
        from nqm.solvers.least_squares.moments import (
            CoupledPhaseWalk,  # which builds on this module
        )

        return CoupledPhaseWalk(problem, program.phases[0])
    return PhaseWalk(problem, program.phases[0])


def _last(
    walk: PhaseWalk | CoupledPhaseWalk | ProgramWalk,
    program: Program,
    target: float,
    floor: float,
) -> Crossing:
    """Step from which on the loss stays at or below the target until the horizon."""
    grid = _grid(program)
    losses = np.array([loss for _, loss in walk.at(grid)])
    if not losses[-1] <= target:
        lost = Status.NOT_REACHED if np.isfinite(losses[-1]) else Status.DIVERGED
        return Crossing(lost, np.nan, np.nan, np.nan, floor, False)
    above = np.flatnonzero(~(losses <= target))
    bracket = (0, 0) if above.size == 0 else (int(grid[above[-1]]), int(grid[above[-1] + 1]))
    # An excursion above the target between grid points counts too, where a scan is affordable.
    scanned = walk.cost(program.steps) <= SCAN_BUDGET
    start, stop = (0, program.steps) if scanned else bracket
    while stop - start > walk.longest_scan:
        finer = [start + (stop - start) * i // 100 for i in range(101)]
        losses = np.array([loss for _, loss in walk.at(finer)])
        last = int(np.flatnonzero(~(losses[:-1] <= target))[-1])
        start, stop = finer[last], finer[last + 1]
    path = walk.path(start, stop)
    high = np.flatnonzero(~(path <= target))
    index = 0 if high.size == 0 else int(high[-1]) + 1
    return _crossed(program, start + index, float(path[index]), floor, scanned)


def _crossed(program: Program, step: int, loss: float, floor: float, scanned: bool) -> Crossing:
    examples = float(program.examples([step])[0])
    return Crossing(Status.REACHED, step, examples, loss, floor, scanned)


class OutOfReachError(NQMError):
    """No rate reaches the target within the steps of the phase."""


def fewest_steps(
    problem: Problem | LeastSquares,
    phase: Phase,
    target: float,
    *,
    points: int = 41,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, Crossing]:
    """Find the constant learning rate at which a phase meets `target` in the fewest steps.

    Evaluates a geometric grid below the stability edge, then 17 rates between the neighbours of the
    best one.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss is followed.
    phase : Phase
        Its `lr` is replaced by each rate tried; its `steps` are the largest number considered.
    target : float
        Expected loss to reach, > 0.
    points : int
        Number of rates of the grid.
    progress : callable, optional
        Called with 1 after each rate is evaluated.

    Returns
    -------
    lr : float
        Best rate.
    crossing : Crossing
        First crossing of the target at that rate.

    Raises
    ------
    OutOfReachError
        An NQMError: no rate reaches the target within the steps of the phase.
    """
    phase = one_phase("fewest_steps.phase", phase)
    problem = any_problem("fewest_steps", problem)
    edge = searched_edge(problem, phase)
    best: tuple[float, Crossing] | None = None
    # From fast to slow; each next rate is followed only up to the best step so far.
    grid = np.geomspace(0.999 * edge, 1e-5 * edge, points)
    report = progress or (lambda count: None)
    for lr in map(float, grid):
        best = _sooner(best, problem, phase, lr, target)
        report(1)
    if best is None:
        raise OutOfReachError(
            f"target {target:g} is below what any rate reaches in {phase.steps} steps; "
            "raise the target, the steps or the batch size"
        )
    at = int(np.argmin(np.abs(grid - best[0])))
    ends = grid[max(at - 1, 0)], grid[min(at + 1, points - 1)]
    for lr in map(float, np.geomspace(*ends, 17)):
        best = _sooner(best, problem, phase, lr, target)
        report(1)
    assert best is not None
    return best


def _sooner(
    best: tuple[float, Crossing] | None,
    problem: Problem | LeastSquares,
    phase: Phase,
    lr: float,
    target: float,
) -> tuple[float, Crossing] | None:
    steps = phase.steps if best is None else int(best[1].step)
    found = steps_to_target(problem, replace(phase, lr=lr, steps=steps), target)
    if found.status is Status.REACHED and (best is None or found.step < best[1].step):
        return lr, found
    return best


def _floor(problem: Problem | LeastSquares, phase: Phase) -> float:
    try:
        check_settles(phase.algorithm)
        return steady(problem, phase).loss
    except NQMError:
        return float("nan")


def _grid(program: Program) -> list[int]:
    """0, 1, 2, ... then growing by 5 %, from the start of every phase to its end."""
    points, offset = {0}, 0
    for phase in program.phases:
        inside = 0
        while inside < phase.steps:
            inside = min(phase.steps, max(inside + 1, int(inside * 1.05)))
            points.add(offset + inside)
        offset += phase.steps
    return sorted(points)

"""Exact expected loss and steady state of one-pass least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError
from nqm.limits import check_memory, check_walk
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray
from nqm.program import Phase, Program
from nqm.result import Kind, Status, Trajectory, runaway
from nqm.schedule import Segment
from nqm.solvers.least_squares.jump import Jump, pays, step_cost
from nqm.solvers.least_squares.packed import (
    Coupled,
    Cycle,
    Repeated,
    cycle,
    moving,
    pack,
    pair,
    unpack,
)
from nqm.solvers.moments import Law, Moments, at_start, hand_over, law_of, whole_period
from nqm.solvers.steady import LONG, check_settles
from nqm.transition import origins, readout

#: Most entries of the maps of distinct steps held at once.
CHUNK = 300_000
#: Longest cycle whose stability is computed while solving; beyond it only the loss shows it.
LONGEST_CYCLE = 64
WHY_WALKED = "their maps do not repeat, or are too large to be multiplied (condense the problem)"


def solve(
    problem: LeastSquares,
    program: Program,
    at: Sequence[int] | None = None,
    *,
    jump: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Compute the exact expected loss at the recorded steps.

    Steps that repeat go together by powers of their map where that is cheaper than one by one
    (`nqm.solvers.least_squares.jump`); `condense` makes that so for a problem of many directions.

    `bias` is the loss with noiseless labels, which includes the noise of drawing inputs;
    `variance` is the loss of a start at the minimum, due to noisy labels. Both follow the same
    linear map. The weights are not Gaussian here, so `loss_sd` is NaN and there are no quantiles.

    Parameters
    ----------
    problem : LeastSquares
        One-pass least-squares problem of d directions.
    program : Program
        Phases of linear methods that draw one minibatch per member and step.
    at : sequence of int, optional
        Steps of the whole program to record; about 100 by default.
    jump : bool
        Take repeating steps together where that is cheaper; if False, take every step.
    progress : callable, optional
        Called with the number of steps done since the last call.

    Returns
    -------
    Trajectory
        Loss and its parts at each record, of kind "exact".

    Raises
    ------
    NQMError
        If a method is not linear or draws several minibatches in a step, or if it would take too
        much memory or time.
    """
    wanted = program.recorded(at)
    laws = [linear_law(phase, problem) for phase in program.phases]
    check_memory("the number of steps in record.at", len(wanted), 8.0 * len(wanted))
    check_walk("phase.steps", _walked(problem, laws, wanted[-1], jump), WHY_WALKED)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        rows = list(_visit(problem, laws, wanted, jump, progress))
    columns: dict[str, Any] = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    zeros = np.zeros(len(rows))
    return Trajectory(
        problem=problem.additive(),
        kind=Kind.EXACT,
        steps=np.array(wanted, dtype=np.int64),
        examples=program.examples(wanted),
        stated_sd=np.full(len(rows), np.nan),
        stderr=zeros,
        member_stderr=zeros,
        runaway=runaway(problem.additive(), program),
        **columns,
    )


def linear_law(phase: Phase, problem: LeastSquares) -> Law:
    """Reduce a phase to a linear algorithm on the problem with additive noise.

    Parameters
    ----------
    phase : Phase
        Method, rates and batch size.
    problem : LeastSquares
        Problem that the method must fit.

    Returns
    -------
    Law
        The linear algorithm and factors on its rates.

    Raises
    ------
    NQMError
        If the method is not linear, or does not fit the problem.
    """
    if not isinstance(phase.algorithm, Algorithm):
        name = type(phase.algorithm).__name__
        raise NQMError(f"least squares needs a linear method; {name} has no exact moments")
    return law_of(phase, problem.additive())


class _Walk:
    """State of all modes of one phase: means (n, d) and second moments (2, N, d).

    The first part of the moments is due to the start, the second to noisy labels (and to the
    method's own noise).
    """

    def __init__(
        self,
        problem: LeastSquares,
        law: Law,
        states: list[Moments],
        age: int,
        jumps: dict[int, Jump] | None = None,
    ):
        self.problem, self.age = problem, age
        self.coupled = Coupled(problem, law)
        #: By first step of a stretch on which steps repeat; another walk of the phase may share it.
        self._jumps = {} if jumps is None else jumps
        self.mean = np.concatenate([state.mean.T for state in states])
        self.moment = np.stack(
            [
                np.concatenate([pack(_second(state)) for state in states]),
                np.concatenate([pack(state.noisy) for state in states]),
            ]
        )

    def advance(self, start: int, stop: int, stretch: Segment, horizon: int) -> None:
        """Take steps [start, stop) of a stretch of the phase; `horizon` steps are wanted in all."""
        first, last, period = stretch
        if period is not None and pays(self.coupled, min(last, horizon) - first, period):
            aligned = min(stop, first + -(-(start - first) // period) * period)
            cycles = (stop - aligned) // period
            self.walk(start, aligned)
            start = aligned + cycles * period
            if cycles:
                self._jump(first, period, cycles)
        self.walk(start, stop)

    def _jump(self, first: int, period: int, cycles: int) -> None:
        """Take whole cycles of the stretch that begins at step `first`."""
        if first not in self._jumps:
            self._jumps.clear()  # stretches follow each other, and one takes memory
            self._jumps[first] = Jump(self.coupled, first, period, self.age)
        jump = self._jumps[first]
        self.moment = jump.moments(cycles, self.moment)
        if self.mean.any():
            self.mean = jump.means(cycles, self.mean)

    def walk(self, start: int, stop: int, path: FloatArray | None = None) -> None:
        """Take steps [start, stop); write the first mode's loss after each into `path`."""
        here, chain = self.coupled.packed[0], self.coupled.modes[0].algorithm
        seen = self.problem.weight
        squares: dict[int, FloatArray] = {}
        done = 0
        chunk = max(1, CHUNK // self.coupled.entries)
        modes, d = len(self.coupled.modes), self.problem.directions
        labels = np.zeros((modes, 2))
        labels[0, 1] = self.problem.label_noise
        moves = bool(self.mean.any())
        for first in range(start, stop, chunk):
            steps, kind = self.coupled.steps(first, min(first + chunk, stop), self.age)
            many, size = len(steps.moment), steps.moment.shape[1]
            sight = steps.sight.reshape(many, modes, size * d)
            gain = steps.gain.reshape(many, modes, size * d)
            own = steps.own if steps.own.any() else None
            moment = self.moment
            for k in kind:
                numbers = sight[k] @ moment.reshape(2, size * d).T + labels
                moment = np.einsum("nkd,pkd->pnd", steps.moment[k], moment)
                moment += (numbers.T @ gain[k]).reshape(2, size, d)
                if own is not None:
                    moment[1] += own[k]
                if moves:
                    self.mean = np.einsum("nkd,kd->nd", steps.matrix[k], self.mean)
                if path is not None:
                    age = self.age + start + done + 1
                    if not chain.time.weights_never_repeat:
                        age %= chain.time.period
                    if age not in squares:
                        squares = {age: _square(chain, age)}
                    path[done] = squares[age] @ (moment[0, here] + moment[1, here]) @ seen
                    done += 1
            self.moment = moment

    def states(self) -> list[Moments]:
        """State as `nqm.solvers.moments` stores it, for the start of the next phase."""
        out = []
        blocks = zip(self.coupled.modes, self.coupled.coordinates, self.coupled.packed, strict=True)
        for mode, where, here in blocks:
            mean = np.ascontiguousarray(self.mean[where].T)
            first, second = (unpack(part[here], mean.shape[1]) for part in self.moment)
            out.append(Moments(mode, mean, first - mean[:, :, None] * mean[:, None, :], second))
        return out

    def losses(self, age: int) -> FloatArray:
        """Expected loss (M, 2) of each mode: the part due to the start, and to noise."""
        weight = self.problem.weight
        return np.array(
            [
                self.moment[:, here].transpose(0, 2, 1) @ _square(mode.algorithm, age) @ weight
                for mode, here in zip(self.coupled.modes, self.coupled.packed, strict=True)
            ]
        )


class CoupledPhaseWalk:
    """Expected loss of one phase from the problem's start."""

    longest_scan = 10**4  #: a step costs as much as a record that powers reach

    def __init__(self, problem: LeastSquares, phase: Phase):
        self.problem, self.law = problem, linear_law(phase, problem)
        self._segments = list(phase.segments())
        self._jumps: dict[int, Jump] = {}

    def cost(self, steps: int) -> float:
        """Estimate the cost of taking every step, to order of magnitude.

        Parameters
        ----------
        steps : int
            Number of steps.

        Returns
        -------
        float
            Multiplications, with 20 000 per step for overhead.
        """
        return float(steps) * step_cost(Coupled(self.problem, self.law))

    def _walk(self) -> _Walk:
        states = at_start(self.law.algorithm, self.problem.additive())
        return _Walk(self.problem, self.law, states, 0, self._jumps)

    def _advance(self, walk: _Walk, start: int, stop: int) -> None:
        """Take steps [start, stop) of the phase."""
        for segment in self._segments:
            here, there = max(start, segment[0]), min(stop, segment[1])
            if here < there:
                walk.advance(here, there, segment, self.law.phase.steps)

    def at(self, steps: Iterable[int]) -> Iterator[tuple[int, float]]:
        """Compute the expected loss at chosen steps, lazily.

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
        walk, position = self._walk(), 0
        for step in steps:
            with np.errstate(over="ignore", invalid="ignore", under="ignore"):
                self._advance(walk, position, step)
                loss = float(walk.losses(step)[0].sum())
            position = step
            yield step, loss

    def path(self, start: int, stop: int) -> FloatArray:
        """Compute the expected loss at every step of a range.

        Parameters
        ----------
        start, stop : int
            First and last number of steps.

        Returns
        -------
        ndarray, shape (stop - start + 1,)
            Expected loss after start, start + 1, ..., stop steps.
        """
        walk, out = self._walk(), np.empty(stop - start + 1)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            self._advance(walk, 0, start)
            out[0] = walk.losses(start)[0].sum()
            walk.walk(start, stop, out[1:])
        return out


def _walked(problem: LeastSquares, laws: list[Law], horizon: int, jump: bool) -> int:
    """Number of steps of `horizon` that are taken one by one."""
    if not jump:
        return horizon
    walked = 0
    for law in laws:
        coupled = Coupled(problem, law)
        for start, stop, period in law.phase.segments():
            steps = min(stop, horizon) - start
            if steps > 0 and (period is None or not pays(coupled, steps, period)):
                walked += steps
        horizon -= law.phase.steps
    return walked


def _second(state: Moments) -> FloatArray:
    """Second moment (d, n, n) due to the start."""
    return state.started + state.mean[:, :, None] * state.mean[:, None, :]


def _square(algorithm: Algorithm, age: int) -> FloatArray:
    """Coefficients of the evaluated weights' square on the packed moments."""
    c = readout(algorithm, age)[:, None]
    return pair(c, c)[:, 0]


def _visit(
    problem: LeastSquares,
    laws: list[Law],
    wanted: list[int],
    jump: bool,
    progress: Callable[[int], None] | None,
) -> Iterator[dict[str, Any]]:
    """One row per wanted step, in order; the end of a phase belongs to that phase."""
    additive = problem.additive()
    states, age, offset, pending = at_start(laws[0].algorithm, additive), 0, 0, list(wanted)
    if not any(origins(law.algorithm).any() for law in laws):
        # Means matter only if some coordinate begins at the origin: it correlates with the rest.
        for state in states:
            state.started = _second(state)
            state.mean = np.zeros_like(state.mean)
    for index, law in enumerate(laws):
        if index:
            states, age = hand_over(additive, states, laws[index - 1], law, age)
        walk = _Walk(problem, law, states, age)
        if index == 0 and pending and pending[0] == 0:
            pending.pop(0)
            yield _row(walk.losses(age), unstable=False)
        for start, stop, period in law.phase.segments():
            position, before = start, walk.losses(age + start)[0].sum()
            judged: Cycle | None = None
            while position < stop and pending:
                inside = pending[0] <= offset + stop
                target = pending[0] - offset if inside else stop
                horizon = wanted[-1] - offset if jump else 0
                walk.advance(position, target, (start, stop, period), horizon)
                if progress is not None:
                    progress(target - position)
                position = target
                if inside:
                    pending.pop(0)
                    if judged is None and period is not None and period <= LONGEST_CYCLE:
                        judged = cycle(walk.coupled, start, period, age)
                    losses = walk.losses(age + position)
                    grown = not losses[0].sum() <= before
                    yield _row(losses, unstable=grown and judged is not None and not judged.stable)
        states = walk.states()
        offset, age = offset + law.phase.steps, age + law.phase.steps


def _row(losses: FloatArray, *, unstable: bool) -> dict[str, Any]:
    bias, variance = losses[0]
    return {
        "loss": bias + variance,
        "bias": bias,
        "variance": variance,
        "member_loss": losses.sum(),
        "unstable": unstable,
    }


@dataclass(frozen=True)
class CoupledSteady:
    """Steady state at the end of a cycle of the rates (after any step when they are constant).

    Attributes
    ----------
    loss, member_loss : float
        Expected loss of the mean model and of the average member; NaN where unstable.
    status : Status
        FINISHED, or DIVERGED.
    radius, kappa : float
        Stable if both are below 1, see `nqm.solvers.least_squares.packed.Cycle`.
    second_moment, deviation : ndarray, shape (d,)
        Second moment of the evaluated weights' distance from the minimum, and of the distance of a
        member from the mean model. NaN along flat directions.
    """

    loss: float
    member_loss: float
    status: Status
    radius: float
    kappa: float
    second_moment: FloatArray = field(repr=False)
    deviation: FloatArray = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Tabulate the losses and the stability.

        Returns
        -------
        DataFrame
            One row with columns loss, member_loss, radius, kappa, status, kind, in_range.
        """
        names = ("loss", "member_loss", "radius", "kappa")
        row: dict[str, Any] = {name: [getattr(self, name)] for name in names}
        row |= {"status": [str(self.status)], "kind": [str(Kind.EXACT)], "in_range": [True]}
        return pd.DataFrame(row)


def steady(problem: LeastSquares, phase: Phase) -> CoupledSteady:
    """Compute the steady state of a phase that is continued without end.

    The response of every direction to a unit of each number 2 L of the cycle is computed first;
    these numbers then solve one small linear system. SGD: E u_i^2 = w_i s2 / (1 - kappa) and
    2 L = kappa s2 / (1 - kappa).

    Parameters
    ----------
    problem : LeastSquares
        One-pass least-squares problem of d directions.
    phase : Phase
        Linear method at constant or cyclic rates and batch size; its `steps` have no effect.

    Returns
    -------
    CoupledSteady
        Losses of NaN, and `status` DIVERGED, if the phase is unstable.

    Raises
    ------
    NQMError
        If the rates never repeat, if the method is not linear, or if it averages over all its past.
    """
    check_settles(phase.algorithm)
    law = linear_law(phase, problem)
    coupled, period = Coupled(problem, law), whole_period(phase)
    check_memory("the period", period, 3.0 * period * coupled.entries)
    steps, kind = coupled.steps(0, period, 0)
    free = moving(coupled, steps, driving=False)
    repeated = Repeated(problem, steps, kind, free)
    judged, modes = repeated.judge(), len(coupled.modes)
    start = _Walk(problem, law, at_start(law.algorithm, problem.additive()), 0).moment.sum(axis=0)
    moments = np.full_like(start, np.nan)
    curved = problem.curvature > 0
    if judged.stable:
        fixed = np.setdiff1d(np.arange(len(start)), free)
        pulled = np.einsum("rnkd,kd->rnd", steps.moment[:, free[:, None], fixed], start[fixed])
        numbers, response = repeated.respond((pulled + steps.own[:, free])[kind][..., curved])
        bred, seen = numbers[:, :-1], numbers[:, -1]
        labels = np.zeros(bred.shape[0])
        labels[::modes] = problem.label_noise
        driving = labels + np.linalg.solve(np.eye(labels.size) - bred, bred @ labels + seen)
        moments[fixed] = start[fixed]
        moments[np.ix_(free, curved)] = np.tensordot(driving, response[:-1], 1) + response[-1]
    squares = [
        moments[here].T @ _square(mode.algorithm, LONG * mode.algorithm.time.period)
        for mode, here in zip(coupled.modes, coupled.packed, strict=True)
    ]
    squares += [np.where(curved, 0.0, np.nan)] if modes == 1 else []
    weight = problem.weight[curved]
    losses = [float(weight @ square[curved]) for square in squares]
    return CoupledSteady(
        loss=losses[0],
        member_loss=sum(losses) if judged.stable else np.nan,
        status=Status.FINISHED if judged.stable else Status.DIVERGED,
        radius=judged.radius,
        kappa=judged.kappa,
        second_moment=squares[0],
        deviation=squares[1],
    )

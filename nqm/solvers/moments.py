"""Exact first and second moments, walked step by step or jumped by powers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm, Mode, Nonlinear
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.time_dependence import TimeDependence, is_last_of_period
from nqm.errors import NQMError
from nqm.limits import check_memory, check_walk, check_work
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import FOREVER, Phase, Program, as_program, goes_on, resumes
from nqm.result import Kind, Trajectory, runaway
from nqm.schedule import Segment
from nqm.solvers import moving_window
from nqm.solvers._kernels.moment_steps import propagate_moments
from nqm.solvers._kernels.polynomial_steps import WIDE
from nqm.solvers._kernels.powers import compose_exact, power_exact
from nqm.solvers.first_order_range import first_order_errors
from nqm.solvers.multiplicative_scalar import scalar_first_order
from nqm.solvers.polynomial_walk import Layout, Seen, State, Steps, walk
from nqm.transition import (
    Transition,
    embedding,
    extract,
    noise_moment,
    origins,
    readout,
    resumption,
    spectral_radius,
)
from nqm.words import short_html, short_repr

#: Coordinates of a chain up to which only the number of steps is limited, not the work in a step.
SMALL = 16
#: Most entries of the transition matrices held at once while walking: they stay in the cache.
CHUNK = 400_000
#: Most coefficients of steps that are polynomials, and most numbers walked over, at once.
TABLE, WALKED = 400_000, 200_000_000

Progress = Callable[[int], None]


class Map(NamedTuple):
    """Transition of one or many steps, arrays (d, n, n): z -> A z and S -> A S A' + Q.

    `matrix` is A, `noise` is Q; `low` is the part of A below the precision of a double.
    """

    matrix: FloatArray
    noise: FloatArray
    low: FloatArray


#: Takes a time t; returns the transition of step t.
Step = Callable[[int], Map]


@dataclass
class Moments:
    """First two moments of one mode: mean (d, n) and covariance (d, n, n) in two parts.

    `started` is the covariance that the random start causes (without gradient noise), `noisy` the
    one that gradient noise causes. They are separate because a difference would lose digits.
    `root` (d, n) is a vector u with `started` = u u', as long as one is known. `still` holds the
    coordinates that were 0 when the method started (`nqm.step_polynomial.ties`).
    """

    mode: Mode
    mean: FloatArray
    started: FloatArray
    noisy: FloatArray
    root: FloatArray | None = None
    still: tuple[int, ...] = ()

    __repr__ = short_repr
    _repr_html_ = short_html

    def weights(self, age: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Moments of the evaluated weights.

        Parameters
        ----------
        age : int
            Steps since the method started.

        Returns
        -------
        mean, started, noisy : ndarray, shape (d,)
            Mean, and the variance due to the start and to gradient noise.
        """
        c = readout(self.mode.algorithm, age)
        used = np.flatnonzero(c)
        if used.size > SMALL:
            started, noisy = (
                np.einsum("i,dij,j->d", c, part, c) for part in (self.started, self.noisy)
            )
            return self.mean @ c, started, noisy
        # Term by term, so that a direction's numbers do not depend on how many others there are.
        mean, started, noisy = np.zeros((3, len(self.mean)))
        for i in used:
            mean += c[i] * self.mean[:, i]
            for j in used[used <= i]:
                factor = c[i] * c[j] * (1.0 if i == j else 2.0)
                started += factor * self.started[:, i, j]
                noisy += factor * self.noisy[:, i, j]
        return mean, started, noisy


@dataclass(frozen=True)
class Law:
    """A phase reduced to a linear algorithm and, optionally, factors (d,) on each of its rates."""

    phase: Phase
    algorithm: Algorithm
    scales: tuple[FloatArray, ...] | None

    def transition(
        self, problem: Problem, mode: Mode, settings: FloatArray, t: Any, *, exact: bool = False
    ) -> tuple[Transition, FloatArray]:
        """Extract the transition of step t at several settings.

        Parameters
        ----------
        problem : Problem
            Its curvatures are used.
        mode : Mode
            Mean model or member deviation.
        settings : ndarray, shape (rows, rates + 1) or (rows, d, rates + 1)
            Rates, then the batch size, of each row; of each direction, if several programs lie
            side by side, which have one batch size.
        t : int or ndarray
            Time of the step, reduced modulo the period.
        exact : bool
            Keep the matrix in two doubles, because it will be raised to a power.

        Returns
        -------
        transition : Transition
            Arrays of shape (rows, d, ...).
        share : ndarray, shape (rows, 1)
            Noise variance of the mode relative to that of one example's gradient.
        """
        if settings.ndim == 2:
            settings = settings[:, None]
        rates: Any = tuple(settings[..., i] for i in range(settings.shape[2] - 1))
        if self.scales is not None:
            copies = problem.directions // self.scales[0].size
            scales = [np.tile(scale, copies) for scale in self.scales]
            rates = tuple(rate * scale for rate, scale in zip(rates, scales, strict=True))
        lr = rates if self.algorithm.rate_count == 2 else rates[0]
        transition = extract(mode.algorithm, problem.curvature[None, :], lr, t, exact=exact)
        return transition, mode.noise_share / settings[:, :1, -1]

    def step(
        self, problem: Problem, mode: Mode, settings: FloatArray, t: Any, *, exact: bool = False
    ) -> Map:
        """Compute A and Q of step t at several settings; parameters as in `transition`.

        Parameters
        ----------
        problem, mode, settings, t, exact
            See `transition`.

        Returns
        -------
        Map
            Arrays of shape (rows, d, n, n).
        """
        transition, share = self.transition(problem, mode, settings, t, exact=exact)
        variance = share * problem.noise_variance
        return Map(transition.matrix, noise_moment(transition, variance), transition.low)


def law_of(phase: Phase, problem: Problem) -> Law:
    """Reduce a phase to a linear algorithm, to first order for multiplicative late-phase weights.

    Parameters
    ----------
    phase : Phase
        Method, rates and batch size.
    problem : Problem
        Problem that the method must fit.

    Returns
    -------
    Law
        The linear algorithm and factors on its rates.

    Raises
    ------
    NQMError
        If the method has no exact moments, or does not fit the problem.
    """
    algorithm = phase.algorithm
    if isinstance(algorithm, MultiplicativeLatePhase):
        if algorithm.scalar:
            raise NQMError(
                "late_phase_multiplicative with coupling = 'scalar' couples all directions: "
                "its first order is known for a program of this one phase; use method 'sample'"
            )
        late, lr_scale, member_scale = algorithm.first_order(problem)
        return Law(phase, late, (lr_scale, member_scale))
    if isinstance(algorithm, Nonlinear):
        name = type(algorithm).__name__
        raise NQMError(f"{name} has no exact moments; use method 'sample'")
    algorithm.check(problem)
    mask = algorithm.member_mask(problem)
    return Law(phase, algorithm, None if mask is None else (np.ones_like(mask), mask))


def begin(
    algorithm: Algorithm,
    problem: Problem,
    mean: FloatArray,
    started: FloatArray,
    noisy: FloatArray,
) -> list[Moments]:
    """State at the start of a phase, for weights with given moments.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of the phase.
    problem : Problem
        Gives the minimum and the directions in which members exist.
    mean, started, noisy : ndarray, shape (d,)
        Mean of the weights' distance from the minimum, and its variance due to the start and to
        gradient noise.

    Returns
    -------
    list of Moments
        One entry for each mode.
    """
    states = []
    for mode in algorithm.modes():
        draws, normals = embedding(mode.algorithm)
        outer, origin = draws @ draws.T, origins(mode.algorithm)
        alone = draws.shape[1] == 1 and not normals.any()
        first, begun = np.outer(mean, draws.sum(axis=1)), started[:, None, None] * outer
        if origin.any():
            first += np.outer(-problem.minimum, origin)
        if normals.any():
            begun += _fresh(algorithm, problem, normals)
        states.append(
            Moments(
                mode,
                first,
                begun,
                noisy[:, None, None] * outer if noisy.any() else np.zeros_like(begun),
                np.outer(np.sqrt(started), draws) if alone else None,
                _still(draws, normals, origin),
            )
        )
    return states


def _still(*parts: FloatArray) -> tuple[int, ...]:
    """Coordinates that start at 0, as all these coefficients of theirs are 0."""
    moved = np.column_stack(parts).any(axis=1)
    return tuple(np.flatnonzero(~moved).tolist())


def _fresh(algorithm: Algorithm, problem: Problem, normals: FloatArray) -> FloatArray:
    """Covariance (d, n, n) of fresh normals in the start; 0 where members are not replicated."""
    mask = algorithm.member_mask(problem)
    scale = np.ones(problem.directions) if mask is None else mask
    return np.asarray(scale[:, None, None] * (normals @ normals.T))


def at_start(algorithm: Algorithm, problem: Problem) -> list[Moments]:
    """State at the start of the first phase, drawn as the problem states.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of the phase.
    problem : Problem
        Gives mean and variance of the start.

    Returns
    -------
    list of Moments
        One entry for each mode.
    """
    variance = problem.initial_variance
    return begin(algorithm, problem, problem.initial_mean, variance, np.zeros_like(variance))


def hand_over(
    problem: Problem, states: list[Moments], old: Law, new: Law, age: int
) -> tuple[list[Moments], int]:
    """State at the start of the next phase; `Phase` defines which coordinates are kept.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    states : list of Moments
        State at the end of the old phase.
    old, new : Law
        The two phases.
    age : int
        Steps of the old phase's method so far.

    Returns
    -------
    states : list of Moments
        One entry for each mode of the new method.
    age : int
        Steps of its method so far: `age` if the method continues, else 0.

    Raises
    ------
    NQMError
        If the new phase needs independent draws of the problem's start.
    """
    kept = goes_on(old.phase, new.phase)
    if kept and old.algorithm.coordinates == new.algorithm.coordinates:
        modes = new.algorithm.modes()
        # Coordinates that were tied may differ once other steps begin.
        return [
            replace(state, mode=mode, still=state.still if mode == state.mode else ())
            for mode, state in zip(modes, states, strict=True)
        ], age
    if not kept:
        check_own_starts(new.algorithm)
    fresh = begin(new.algorithm, problem, *states[0].weights(age))
    if resumes(old.phase, new.phase):
        for state, start in zip(states, fresh, strict=False):
            _carry(problem, state, start, new.algorithm, age)
    return fresh, 0


def check_own_starts(algorithm: Algorithm) -> None:
    """Refuse a later phase that needs independent draws of the problem's start.

    Parameters
    ----------
    algorithm : Algorithm
        Method of a phase that is not the first.

    Raises
    ------
    NQMError
        For an `Ensemble` whose members have starts of their own.
    """
    if any(embedding(mode.algorithm)[0].shape[1] > 1 for mode in algorithm.modes()):
        raise NQMError(
            "ensemble.starts = 'own' draws the problem's start and must be in the first phase; "
            "use 'common' in later ones"
        )


def _carry(
    problem: Problem, state: Moments, start: Moments, algorithm: Algorithm, age: int
) -> None:
    """Set `start` from `state`: [kept; new coordinates] = lift @ state + fresh noise."""
    old, new = state.mode.algorithm, start.mode.algorithm
    lift, normals = resumption(old, new, age)
    origin = origins(new, old.coordinates)
    start.mean = np.ascontiguousarray(state.mean @ lift.T + np.outer(-problem.minimum, origin))
    start.still = _still(lift, normals, origin)
    started, noisy = (
        np.einsum("ij,djk,lk->dil", lift, part, lift) for part in (state.started, state.noisy)
    )
    start.started = np.ascontiguousarray(started + _fresh(algorithm, problem, normals))
    start.root = None
    start.noisy = np.ascontiguousarray(noisy)


class Walker:
    """Advances all modes through one phase, of one program or of several side by side.

    `problem` holds the directions of all programs then, one after the other, and `settings` (steps
    [start, stop) -> (programs, stop - start, rates + 1)) their rates. `moments` tells whether those
    by direction are recorded.
    """

    def __init__(
        self,
        problem: Problem,
        law: Law,
        states: list[Moments],
        age: int,
        programs: int = 1,
        settings: Callable[[int, int], FloatArray] | None = None,
        *,
        moments: bool = True,
    ):
        self.problem, self.law, self.states, self.age = problem, law, states, age
        self.programs, self.directions = programs, problem.directions // programs
        self.settings = settings or (lambda *steps: law.phase.settings(*steps)[None])
        self.moments = moments
        self.cycle_start = -1
        self.cycles: list[Map] = []
        self.many, self.powers = 0, self.cycles

    def rows(self, start: int, stop: int) -> FloatArray:
        """Settings of all programs at the steps [start, stop), in one row for each step."""
        return self.settings(start, stop).swapaxes(0, 1).reshape(stop - start, -1)

    def step(self, mode: Mode, rows: FloatArray, t: Any, *, exact: bool) -> Map:
        """Compute A and Q of step t at settings as `rows` returns them; see `Law.transition`."""
        if self.programs > 1:
            each = rows.reshape(len(rows), self.programs, -1)
            rows = np.repeat(each, self.directions, axis=1)
        return self.law.step(self.problem, mode, rows, t, exact=exact)

    def losses(self, age: int) -> FloatArray:
        """Expected loss of each program now, (programs,)."""
        mean, started, noisy = self.states[0].weights(age)
        second, weight = mean**2 + started + noisy, self.problem.weight[: self.directions]
        return np.array([weight @ row for row in second.reshape(self.programs, -1)])

    def seen(self, age: int) -> list[Seen]:
        """Record the evaluated weights of each mode now."""
        return [
            Seen.of(
                self.problem,
                *state.weights(age),
                self.programs,
                moments=self.moments and index == 0,
            )
            for index, state in enumerate(self.states)
        ]

    def walk(
        self,
        start: int,
        stop: int,
        losses: FloatArray | None = None,
        at: Sequence[int] = (),
    ) -> list[Seen]:
        """Take steps [start, stop) one by one.

        Parameters
        ----------
        start, stop : int
            First step of the phase, and the last one plus 1.
        losses : ndarray, shape (stop - start,), optional
            The first mode's losses are added to it.
        at : sequence of int
            Steps to record, rising, in (start, stop].

        Returns
        -------
        list of Seen
            The records of each mode; moments by direction of the first one only.
        """
        return [
            self._walk_mode(i, start, stop, losses if i == 0 else None, at)
            for i in range(len(self.states))
        ]

    def _walk_mode(
        self, index: int, start: int, stop: int, losses: FloatArray | None, at: Sequence[int]
    ) -> Seen:
        """Take steps [start, stop) of one mode."""
        state = self.states[index]
        n = len(state.mode.algorithm.coordinates)
        groups = len(self.layout.factors)
        # As long for several programs as for one, so that all is rounded alike.
        chunk = max(1, min(TABLE // (groups * n**2), WALKED // (self.directions * n**2)))
        seen = []
        wanted = np.asarray(at, dtype=np.int64)
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            here = wanted[(wanted > first) & (wanted <= last)]
            out = None if losses is None else losses[first - start : last - start]
            moments = index == 0 and self.moments
            found = self._walk_polynomial(state, first, last, out, here, moments=moments)
            if found is None:
                found = self._walk_piecewise(state, first, last, out, here, moments=moments)
            seen.append(found)
        return Seen.joined(seen, self.problem.directions, self.programs)

    def _walk_polynomial(
        self,
        state: Moments,
        start: int,
        stop: int,
        losses: FloatArray | None,
        at: NDArray[np.int64],
        *,
        moments: bool,
    ) -> Seen | None:
        """Take steps whose matrices are polynomials; None, with nothing done, if they are not."""
        algorithm = state.mode.algorithm
        t = self.age + np.arange(start, stop)
        readout = np.zeros((t.size, len(algorithm.coordinates)))
        record = np.full(t.size, -1)
        record[at - start - 1] = np.arange(at.size)
        asked = at - start - 1 if losses is None else np.arange(t.size)
        if asked.size:
            readout[asked] = _readouts(algorithm, t[asked] + 1)
        steps = Steps(
            self.settings(start, stop), self.law.algorithm.time.reduced(t), readout, record
        )
        mutable = State(state.mean, state.started, state.noisy, state.root, state.still)
        return walk(self.problem, self.layout, state.mode, mutable, steps, losses, moments=moments)

    @cached_property
    def layout(self) -> Layout:
        """Where the directions lie while they are walked."""
        return Layout.of(self.law.scales, self.directions, self.programs)

    def _walk_piecewise(
        self,
        state: Moments,
        start: int,
        stop: int,
        losses: FloatArray | None,
        at: NDArray[np.int64],
        *,
        moments: bool,
    ) -> Seen:
        """Take steps of any method: their matrices are extracted first, for each distinct step."""
        seen, begin = [], start
        for step in [*at, stop]:
            self._extract_and_walk(
                state, begin, step, None if losses is None else losses[begin - start :]
            )
            weights = state.weights(self.age + step)
            seen.append(Seen.of(self.problem, *weights, self.programs, moments=moments))
            begin = step
        return Seen.joined(seen[:-1], self.problem.directions, self.programs)

    def _extract_and_walk(
        self, state: Moments, start: int, stop: int, losses: FloatArray | None
    ) -> None:
        begun = start
        size = len(state.mode.algorithm.coordinates)
        chunk = max(1, CHUNK // (self.problem.directions * size * size))
        while start < stop:
            until = min(stop, start + chunk)
            residue = self.law.algorithm.time.reduced(self.age + np.arange(start, until))
            (matrix, noise, _), kind = self.kinds(state.mode, self.rows(start, until), residue)
            read, out = None, None
            if losses is not None:
                t = self.age + np.arange(start, until) + 1
                read = _readouts(state.mode.algorithm, t)
                out = losses[start - begun : until - begun]
            self.apply(state, matrix, noise, kind, read, out)
            start = until

    def apply(
        self,
        state: Moments,
        matrix: FloatArray,
        noise: FloatArray,
        kind: Any,
        read: FloatArray | None = None,
        losses: FloatArray | None = None,
    ) -> None:
        """Take the steps `kind` of one mode; add their losses to `losses` if it is given."""
        record = losses is not None
        added = losses if losses is not None else np.zeros(kind.size)
        reads = read if read is not None else np.zeros((1, 1))
        state.root = None
        parts = [(np.zeros_like(state.mean), state.noisy, noise)]
        moving = state.mean.any(axis=1) | state.started.any(axis=(1, 2))
        moving = moving.reshape(self.programs, -1).any(axis=1)
        if moving.any():
            parts.append((state.mean, state.started, np.zeros_like(noise)))
        for mean, covariance, drive in parts:
            propagate_moments(
                matrix, drive, kind, mean, covariance, reads, record, self.problem.weight, added
            )
        if moving.any() and not moving.all():
            # A program at rest stays there, beside others that move, even if its matrix overflows.
            rest = np.repeat(~moving, self.directions)
            state.mean[rest], state.started[rest] = 0.0, 0.0

    def kinds(
        self, mode: Mode, settings: FloatArray, residue: Any, *, exact: bool = False
    ) -> tuple[Map, Any]:
        """Distinct transitions of these steps, and the index of each step's transition."""

        def step(rows: FloatArray, t: Any) -> Map:
            return self.step(mode, rows, t, exact=exact)

        distinct, kind = distinct_steps(mode.algorithm, settings, residue, step)
        return Map(*distinct), kind

    def stretch(self, start: int, stop: int) -> None:
        """Take steps [start, stop); at constant rates, equal steps by powers."""
        phase, algorithm = self.law.phase, self.law.algorithm
        length = stop - start
        if length <= 0:
            return
        if algorithm.time.products(length) > length / 8 or not phase.still(start, stop):
            self.walk(start, stop)
            return
        for state in self.states:
            step = self.step_at(state.mode, start)
            self.leap(state, compose_span(step, algorithm.time, self.age + start, self.age + stop))

    def march(self, start: int, at: Sequence[int], *, jump: bool) -> list[Seen]:
        """Take the steps of a stretch whose rates do not repeat, to the last of the steps `at`.

        Parameters
        ----------
        start : int
            First step.
        at : sequence of int
            Steps to record, rising, > `start`.
        jump : bool
            Compute equal steps by powers where that is quicker.

        Returns
        -------
        list of Seen
            As `walk` returns them.
        """
        phase, products = self.law.phase, self.law.algorithm.time.products
        length = at[-1] - start
        if not jump or products(length) > length / 8 or not phase.still(start, at[-1]):
            return self.walk(start, at[-1], at=at)
        seen: list[list[Seen]] = []
        for step in at:
            self.stretch(start, step)
            start = step
            seen.append(self.seen(self.age + step))
        return [
            Seen.joined(rows, self.problem.directions, self.programs)
            for rows in zip(*seen, strict=True)
        ]

    def reach(self, jump: bool) -> int:
        """Steps that are taken at once; fewer in many directions, so that progress is told."""
        if jump and self.law.phase.constant:
            return FOREVER
        size = max(len(state.mode.algorithm.coordinates) for state in self.states)
        return max(1, WALKED // (self.directions * size**2))

    def legs(
        self, segment: Segment, offset: int, pending: list[int], *, jump: bool
    ) -> Iterator[tuple[int, int, list[int]]]:
        """Divide a stretch into legs, each of which ends at a record.

        Parameters
        ----------
        segment : tuple
            As `Phase.segments` yields them.
        offset : int
            Step at which the phase begins.
        pending : list of int
            Steps still to record, rising, counted from the start of the program; those of a leg are
            removed after it.
        jump : bool
            Whether repeating steps are computed by powers.

        Yields
        ------
        position, target : int
            First and last step of the leg.
        records : list of int
            Steps of the phase to record; if the stretch repeats, at most `target`.
        """
        position, stop, period = segment
        walked = not jump or period is None
        batch = max(1, CHUNK // max(self.directions, WIDE))
        while position < stop and pending:
            end = min(stop, position + self.reach(jump)) if walked else stop
            most = min(batch if walked else 1, len(pending))
            count = bisect_right(pending, offset + end, hi=most)
            records = [step - offset for step in pending[:count]]
            target = records[-1] if count else end
            yield position, target, records
            del pending[:count]
            position = target

    def step_at(self, mode: Mode, start: int) -> Step:
        """Function from an age to the transition of its step, at the settings of step `start`."""
        settings = self.rows(start, start + 1)

        def step(t: int) -> Map:
            rows = self.step(mode, settings, t, exact=True)
            return Map(*(array[0] for array in rows))

        return step

    def leap(self, state: Moments, many: Map) -> None:
        """Take many steps of one mode by their common transition."""
        self.apply(state, many.matrix[None], many.noise[None], np.zeros(1, dtype=np.int64))

    def jump(self, start: int, stop: int, origin: int, period: int) -> None:
        """Take steps [start, stop) of a stretch with period `period` from `origin`, by powers."""
        if self.cycle_start != origin:
            self.cycle_start = origin
            self.cycles = [self.cycle(state.mode, origin, period) for state in self.states]
            self.many, self.powers = 0, []
        boundary = start + (-(start - origin)) % period
        whole = max(0, stop - boundary) // period
        if not whole:
            self.stretch(start, stop)
            return
        self.stretch(start, boundary)
        if self.many != whole:  # records are often equally far apart
            self.many, self.powers = whole, [power(step, whole) for step in self.cycles]
        for state, many in zip(self.states, self.powers, strict=True):
            self.leap(state, many)
        self.stretch(boundary + whole * period, stop)

    def cycle(self, mode: Mode, origin: int, period: int) -> Map:
        """Transition of one whole period."""
        phase, algorithm, stop = self.law.phase, self.law.algorithm, origin + period
        if phase.still(origin, stop):
            step = self.step_at(mode, origin)
            return compose_span(step, algorithm.time, self.age + origin, self.age + stop)
        # As long for several programs as for one, so that all is rounded alike.
        size = self.directions * len(mode.algorithm.coordinates) ** 2
        chunk, whole = max(1, CHUNK // size), None
        for first in range(origin, stop, chunk):
            settings = self.rows(first, min(first + chunk, stop))
            times = self.age + np.arange(first, first + len(settings))
            steps, kind = self.kinds(mode, settings, algorithm.time.reduced(times), exact=True)
            whole = then(whole, compose_steps(steps, kind))
        assert whole is not None
        return whole

    def limit(self, mode: Mode, start: int) -> FloatArray:
        """Transition matrix at late times of steps that never repeat; settings as of `start`."""
        settings = self.rows(start, start + 1)
        times = mode.algorithm.time.one_cycle()
        steps = [self.step(mode, settings, t, exact=False) for t in times]
        together = Map(*map(np.concatenate, zip(*steps, strict=True)))
        return compose_steps(together, range(len(steps))).matrix


def distinct_steps(
    algorithm: Algorithm,
    settings: FloatArray,
    residue: Any,
    step: Callable[[FloatArray, Any], tuple[FloatArray, ...]],
) -> tuple[tuple[FloatArray, ...], Any]:
    """Call `step` once for each distinct pair of settings and time.

    Parameters
    ----------
    algorithm : Algorithm
        Its time dependence groups times that one call can cover.
    settings : ndarray, shape (T, rates + 1)
        Rates, then the batch size, of each step.
    residue : ndarray of int, shape (T,)
        Time of each step, reduced modulo the period.
    step : callable
        Takes settings (rows, rates + 1) and their common time; returns arrays (rows, ...).

    Returns
    -------
    arrays : tuple of ndarray, shape (distinct, ...)
        Results of `step`.
    kind : ndarray of int, shape (T,)
        Row of `arrays` of each step.
    """
    rows = np.column_stack([settings, residue])
    if (rows == rows[0]).all():  # the common case, without the sorting
        rows, kind = rows[:1], np.zeros(len(rows), dtype=np.int64)
    else:
        rows, kind = np.unique(rows, axis=0, return_inverse=True)
    computed = []
    kind = kind.reshape(-1)
    order = np.empty(len(rows), dtype=np.int64)
    filled = 0
    for chosen, t in algorithm.time.groups(rows[:, -1]):
        computed.append(step(rows[chosen, :-1], t))
        order[chosen] = np.arange(filled, filled + chosen.size)
        filled += chosen.size
    return tuple(np.concatenate(part) for part in zip(*computed, strict=True)), order[kind]


def _readouts(algorithm: Algorithm, t: NDArray[np.int64]) -> FloatArray:
    """Readout after each of t steps, (T, n)."""
    if algorithm.time.weights_never_repeat:
        return np.array([readout(algorithm, int(a)) for a in t])
    residues, which = np.unique(t % algorithm.time.period, return_inverse=True)
    return np.array([readout(algorithm, int(a)) for a in residues])[which]


def compose_steps(steps: Map, kind: Iterable[int]) -> Map:
    """Compose steps, one after the other.

    Parameters
    ----------
    steps : Map
        Distinct transitions, arrays (s, d, n, n).
    kind : iterable of int
        Index of each step, in order; at least one.

    Returns
    -------
    Map
        Their composition, arrays (d, n, n).
    """
    whole: Map | None = None
    for k in kind:
        whole = then(whole, Map(*(part[k] for part in steps)))
    assert whole is not None
    return whole


class _Spans:
    """Transitions of many steps of a method whose steps differ only at the ends of its periods.

    Between two ends of the longest period only the shorter periods matter, so the steps there
    repeat sooner: that stretch is composed and raised to a power by itself.
    """

    def __init__(self, step: Step, periods: tuple[int, ...]):
        self.step, self.periods = step, periods
        self.steps: dict[tuple[bool, ...], Map] = {}
        self.cycles: dict[tuple[int, ...], Map] = {}

    def span(self, periods: tuple[int, ...], first: int, last: int) -> Map | None:
        """Steps [first, last), none of which ends a period that is not among `periods`."""
        if first >= last:
            return None
        if not periods:
            return power(self.one(first), last - first, exact=True)
        whole = math.lcm(*periods)
        if last - first <= 2 * whole:
            return self.cut(periods, first, last)
        start = -(-first // whole) * whole
        count = (last - start) // whole
        if periods not in self.cycles:
            cycle = self.cut(periods, start, start + whole)
            assert cycle is not None
            self.cycles[periods] = cycle
        many = power(self.cycles[periods], count, exact=True)
        head = then(self.cut(periods, first, start), many)
        return then(head, self.cut(periods, start + count * whole, last))

    def cut(self, periods: tuple[int, ...], first: int, last: int) -> Map | None:
        """Compose the same steps, cut at the ends of the longest of `periods`."""
        composed: Map | None = None
        longest = periods[-1]
        while first < last:
            end = (first // longest + 1) * longest - 1
            composed = then(composed, self.span(periods[:-1], first, min(end, last)))
            if end < last:
                composed = then(composed, self.one(end))
            first = end + 1
        return composed

    def one(self, t: int) -> Map:
        """Transition of step t."""
        ends = tuple(is_last_of_period(t, period) for period in self.periods)
        if ends not in self.steps:
            self.steps[ends] = self.step(t)
        return self.steps[ends]


def compose_span(step: Step, time: TimeDependence, first: int, last: int) -> Map:
    """Compose the steps [first, last) at equal settings, equal ones by powers.

    Parameters
    ----------
    step : callable
        Takes a time; returns the transition of its step.
    time : TimeDependence
        Periods of the method.
    first, last : int
        Times of the first step, and of the last one plus 1; first < last.

    Returns
    -------
    Map
        Arrays (d, n, n).
    """
    periods = time.distinct_periods
    composed: Map | None = None
    if periods is None:
        for t in range(first, last):
            composed = then(composed, step(t))
    else:
        composed = _Spans(step, periods).span(periods, first, last)
    assert composed is not None
    return composed


def then(first: Map | None, second: Map | None) -> Map | None:
    """Compose two transitions.

    Parameters
    ----------
    first, second : Map or None
        In the order in which they are applied; None is the identity.

    Returns
    -------
    Map or None
        Their composition, arrays (d, n, n).
    """
    if first is None or second is None:
        return second if first is None else first
    out = Map(*(np.empty_like(part) for part in first))
    compose_exact(*first, *second, *out)
    return out


def power(step: Map, count: int, *, exact: bool = False) -> Map:
    """Raise a transition to a power, in O(log count).

    Parameters
    ----------
    step : Map
        Transition, arrays (d, n, n).
    count : int
        Number of equal steps, >= 0.
    exact : bool
        Use two doubles however small `count`, because the result will be raised to a power again.

    Returns
    -------
    Map
        Transition of `count` steps.
    """
    if count == 1:
        return step
    out = Map(*(np.empty_like(part) for part in step))
    power_exact(*step, count, exact, *out)
    return out


class PhaseWalk:
    """Expected loss of one phase from the problem's start, at chosen steps or at every step."""

    #: Most steps scanned one by one; a longer bracket is cut by a finer grid first.
    longest_scan = 10**6

    def __init__(self, problem: Problem, phase: Phase):
        self.problem, self.law = problem, law_of(phase, problem)
        self.segments = list(phase.segments())
        check_size("phase", problem, self.law, phase.steps, 1, jump=True)

    def _start(self) -> Walker:
        states = at_start(self.law.algorithm, self.problem)
        return Walker(self.problem, self.law, states[:1], 0)

    def _to(self, walker: Walker, position: int, target: int) -> None:
        for start, stop, period in self.segments:
            until = min(stop, target)
            if position < until and start <= position:
                if period is None:
                    walker.stretch(position, until)
                else:
                    walker.jump(position, until, start, period)
                position = until

    def cost(self, steps: int) -> float:
        """Estimate the cost of evaluating every step, to order of magnitude.

        Parameters
        ----------
        steps : int
            Number of steps.

        Returns
        -------
        float
            Multiplications, with a constant per step that is larger for steps that never repeat.
        """
        algorithm = self.law.algorithm.modes()[0].algorithm
        time = algorithm.time
        besides = 5_000 if time.weights_never_repeat or time.update_never_repeats else 200
        if time.update_never_repeats and time.period > 1:
            besides = 40_000  # extracted one by one
        return float(steps) * (besides + self.problem.directions * len(algorithm.coordinates) ** 2)

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
        walker, position = self._start(), 0
        for step in steps:
            with np.errstate(over="ignore", invalid="ignore"):
                self._to(walker, position, step)
                loss = float(walker.losses(step)[0])
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
        walker = self._start()
        out = np.zeros(stop - start + 1)
        with np.errstate(over="ignore", invalid="ignore"):
            self._to(walker, 0, start)
            out[0] = walker.losses(start)[0]
            walker.walk(start, stop, out[1:])
        return out


def phase_cycles(
    problem: Problem, phase: Phase
) -> tuple[tuple[Mode, ...], list[Moments], list[Map]]:
    """Modes of a phase, their start and the transition of one period of each.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    phase : Phase
        Its `steps` have no effect.

    Returns
    -------
    modes : tuple of Mode
        Mean model and, with members, one member's deviation.
    starts : list of Moments
        State of each mode at the start.
    cycles : list of Map
        Transition of one period of each mode.

    Raises
    ------
    NQMError
        If the rates of the phase never repeat, or its method has no exact moments.
    """
    law = law_of(replace(phase, steps=FOREVER), problem)
    period = whole_period(phase)
    walker = Walker(problem, law, [], 0)
    modes = law.algorithm.modes()
    cycles = [walker.cycle(mode, 0, period) for mode in modes]
    return modes, at_start(law.algorithm, problem), cycles


def whole_period(phase: Phase) -> int:
    """Number of steps after which the rates and the method of a phase repeat.

    Parameters
    ----------
    phase : Phase
        Its `steps` have no effect.

    Returns
    -------
    int
        Period in steps, >= 1.

    Raises
    ------
    NQMError
        If they never repeat, or the period is too long to compose.
    """
    long = replace(phase, steps=FOREVER)
    segments = list(long.segments())
    if len(segments) != 1 or segments[0][2] is None:
        raise NQMError("a steady state needs constant or cyclic rates and batch size")
    period = segments[0][2]
    walked = float(period)
    if isinstance(phase.algorithm, Algorithm) and long.still(0, FOREVER):
        walked = phase.algorithm.time.products(period)
    check_walk("phase: the period", walked, "it is composed of its steps")
    return period


def solve(
    problem: Problem | LeastSquares,
    program: Program | Phase | Sequence[Phase],
    at: Sequence[int] | None = None,
    *,
    jump: bool = True,
    progress: Progress | None = None,
) -> Trajectory:
    """Compute the exact expected loss at the recorded steps.

    Multiplicative late-phase weights are replaced by their first-order approximation, and the
    result's `kind` says so (with a scalar factor only as a program's one phase).

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem of d directions.
    program : Program, Phase or sequence of Phase
        Phases that are run from the problem's start.
    at : sequence of int, optional
        Steps of the whole program to record; about 100 by default.
    jump : bool
        Compute repeating steps by powers of their transition, in O(log steps); if False, take every
        step. Least squares, whose directions are coupled, also does where that is cheaper.
    progress : callable, optional
        Called with the number of steps done since the last call.

    Returns
    -------
    Trajectory
        Loss and its parts at each record; `kind` is "exact" or "first_order".

    Raises
    ------
    NQMError
        If a method has no exact moments or does not fit the problem, or if it would take too much
        memory or time.
    """
    program = as_program("solve.program", program)
    problem = any_problem("solve", problem)
    if isinstance(problem, LeastSquares):
        from nqm.solvers.least_squares import (
            moments as least_squares,  # which builds on this module
        )

        return least_squares.solve(problem, program, at, jump=jump, progress=progress)
    wanted = program.recorded(at)
    only = program.phases[0]
    if (
        len(program.phases) == 1
        and isinstance(only.algorithm, MultiplicativeLatePhase)
        and only.algorithm.scalar
    ):
        return scalar_first_order(problem, only, wanted)
    if jump and moving_window.fits(problem, program):
        return moving_window.solve(problem, program, wanted, partial(solve, problem))
    laws = [law_of(phase, problem) for phase in program.phases]
    check_sizes(problem, laws, wanted, jump=jump)
    found = visit(problem, laws, wanted, jump=jump, progress=progress)
    columns: dict[str, Any] = {name: values[:, 0] for name, values in found.losses.items()}
    columns |= {"weight_mean": found.mean, "weight_variance": found.variance}
    zeros = np.zeros(len(wanted))
    pairs = None
    if problem.correlated:
        from nqm.solvers.correlated import pair_covariances  # which is built on this module

        columns["stated_sd"] = None
        pairs = partial(pair_covariances, problem, program, wanted)
    errors = None
    if not program.linear:
        second = columns["weight_mean"] ** 2 + columns["weight_variance"]
        errors = partial(first_order_errors, problem, program, wanted, second)
    return Trajectory(
        problem=problem,
        kind=Kind.EXACT if program.linear else Kind.FIRST_ORDER,
        pairs=pairs,
        range_errors=errors,
        steps=np.array(wanted, dtype=np.int64),
        examples=program.examples(wanted),
        stderr=zeros,
        member_stderr=zeros,
        runaway=runaway(problem, program),
        **columns,
    )


def check_sizes(problem: Problem, laws: Sequence[Law], wanted: list[int], *, jump: bool) -> None:
    """Refuse a program whose exact moments would take too much memory or time.

    Parameters
    ----------
    problem : Problem
        Gives the number of directions.
    laws : sequence of Law
        Its phases.
    wanted : list of int
        Steps to record, rising.
    jump : bool
        Whether repeating steps are computed by powers.

    Raises
    ------
    NQMError
        If a limit of `nqm.limits` is exceeded.
    """
    check_memory(
        "the number of steps in record.at", len(wanted), 2.0 * len(wanted) * problem.directions
    )
    left = wanted[-1]
    for index, law in enumerate(laws):
        steps = min(left, law.phase.steps)
        check_size(f"phase.{index}", problem, law, steps, len(wanted), jump=jump)
        left -= steps


def check_size(
    where: str, problem: Problem, law: Law, steps: int, records: int, *, jump: bool
) -> None:
    """Refuse a phase whose exact moments would take too much memory or time.

    Parameters
    ----------
    where : str
        Name of the phase in messages.
    problem : Problem
        Gives the number of directions.
    law : Law
        The phase.
    steps : int
        Steps to take.
    records : int
        Recorded steps among them.
    jump : bool
        Whether repeating steps are computed by powers.

    Raises
    ------
    NQMError
        If a limit of `nqm.limits` is exceeded.
    """
    algorithm = law.algorithm
    n = max(len(mode.algorithm.coordinates) for mode in algorithm.modes())
    entries = float(problem.directions) * n**2
    name = f"{where}.algorithm: numbers per direction in the state of {type(algorithm).__name__}"
    fix = "take fewer members, clients or snapshots (window)"
    check_memory(name, n, 8.0 * entries, fix)
    walked, jumps = 0.0, 0.0
    for start, stop, period in law.phase.segments():
        length = min(stop, steps) - start
        if length <= 0:
            break
        if not jump:
            walked += length
        elif law.phase.still(start, stop):
            count = algorithm.time.products(length)
            once = algorithm.time.products(algorithm.time.period)
            walked += count if period is None else min(count, once * (1.0 + records))
            jumps += 2.0 * math.log2(length + 1.0) * (1.0 + min(records, length))
        else:
            walked += length if period is None else min(length, period * (1.0 + records))
            jumps += 0.0 if period is None else 2.0 * math.log2(length / period + 1.0)
    check_walk(f"{where}.steps", walked, "their rates do not repeat soon enough to be jumped")
    if n > SMALL:
        work = (min(walked, steps) + jumps) * 3.0 * entries * n
        check_work(name, n, work, "in dense matrices", fix)


@dataclass(frozen=True)
class Visited:
    """What is seen of P programs at their records.

    Attributes
    ----------
    losses : dict of str to ndarray, shape (records, P)
        `loss`, `bias`, `variance`, `member_loss`, `stated_sd` and `unstable` of
        `nqm.result.Trajectory`.
    mean, variance : ndarray, shape (records, P d) or (0, P d)
        Moments of the evaluated weights, if they are asked for.
    """

    losses: dict[str, Any]
    mean: FloatArray
    variance: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html


def visit(  # noqa: PLR0913 - options, by keyword
    problem: Problem,
    laws: Sequence[Law],
    wanted: list[int],
    settings: Sequence[Callable[[int, int], FloatArray]] | None = None,
    programs: int = 1,
    *,
    jump: bool = True,
    moments: bool = True,
    progress: Progress | None = None,
) -> Visited:
    """Take one program, or several that differ in their rates alone, past all records.

    Parameters
    ----------
    problem : Problem
        Of d directions for each of P programs, one program after the other.
    laws : sequence of Law
        The phases; of several programs those of one of them.
    wanted : list of int
        Steps to record, rising; the end of a phase belongs to that phase.
    settings : sequence of callable, optional
        As of `Walker`, for each phase; of several programs.
    programs : int
        P.
    jump : bool
        Whether repeating steps are computed by powers.
    moments : bool
        Whether the moments by direction are asked for.
    progress : callable, optional
        Called with the number of steps done since the last call.

    Returns
    -------
    Visited
        All records.
    """
    states = at_start(laws[0].algorithm, problem)
    offset, age, pending = 0, 0, list(wanted)
    parts: list[tuple[dict[str, Any], FloatArray, FloatArray]] = []
    with np.errstate(over="ignore", invalid="ignore"):
        for index, law in enumerate(laws):
            if index:
                states, age = hand_over(problem, states, laws[index - 1], law, age)
            own = settings[index] if settings is not None else None
            walker = Walker(problem, law, states, age, programs, own, moments=moments)
            if index == 0 and pending and pending[0] == 0:
                pending.pop(0)
                parts.append(_read(walker.seen(age), np.zeros(programs, bool), np.zeros(programs)))
            for start, stop, period in law.phase.segments():
                before = walker.losses(age + start)
                unsteady: NDArray[np.bool_] | None = None
                legs = walker.legs((start, stop, period), offset, pending, jump=jump)
                for position, target, records in legs:
                    if not jump or period is None:
                        seen = walker.march(position, records or [target], jump=jump)
                    else:
                        walker.jump(position, target, start, period)
                        seen = walker.seen(age + target)
                    if progress is not None:
                        progress(target - position)
                    if records:
                        if unsteady is None:
                            unsteady = _unstable(walker, start, period)
                        parts.append(_read(seen, unsteady, before))
            offset, age = offset + law.phase.steps, age + law.phase.steps
    columns, mean, variance = zip(*parts, strict=True)
    losses = {name: np.concatenate([one[name] for one in columns]) for name in columns[0]}
    return Visited(losses, np.concatenate(mean), np.concatenate(variance))


def _unstable(walker: Walker, start: int, period: int | None) -> NDArray[np.bool_]:
    """Whether a stretch at repeating rates amplifies some direction that has curvature."""
    law, found = walker.law, np.zeros(walker.programs, dtype=bool)
    never_repeats = law.algorithm.time.update_never_repeats
    if period is None and not (never_repeats and law.phase.constant):
        return found
    curved = walker.problem.curvature[: walker.directions] > 0
    for state in walker.states:
        if found.all():
            break
        if period is None:
            matrix = walker.limit(state.mode, start)
        else:
            matrix = walker.cycle(state.mode, start, period).matrix
        matrix = matrix.reshape(walker.programs, -1, *matrix.shape[1:])[:, curved]
        found |= (spectral_radius(matrix) > 1.0 + 1e-12).any(axis=1)
    return found


def _read(
    seen: list[Seen], unsteady: NDArray[np.bool_], before: FloatArray
) -> tuple[dict[str, Any], FloatArray, FloatArray]:
    """Columns of some records, and the mean model's moments; `before` is the loss of the start."""
    sums = [each.sums for each in seen]
    bias, added = sums[0][:, :, :2].sum(axis=2), sums[0][:, :, 2]
    loss = bias + added
    member = loss
    for other in sums[1:]:
        member = member + other[:, :, :3].sum(axis=2)
    columns = {
        "loss": loss,
        "bias": bias,
        "variance": added,
        "member_loss": member,
        "stated_sd": np.sqrt(sums[0][:, :, 3]),
        "unstable": unsteady & ~(loss <= before),
    }
    return columns, seen[0].mean, seen[0].variance

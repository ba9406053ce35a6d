"""Programs: phases in sequence, each with a method, rates, a batch size and a number of steps."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nqm.algorithms.base import Algorithm, Nonlinear, Optimizer
from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.limits import check_memory
from nqm.problems.quadratic import FloatArray
from nqm.schedule import Constant, PerStep, Schedule, Segment, as_schedule
from nqm.transition import minibatches
from nqm.words import html_table

#: Number of steps that stands for a phase without end.
FOREVER = 10**18


@dataclass(frozen=True)
class Phase:
    """One algorithm, run for `steps` steps.

    A phase keeps the values of the coordinates that the phase before it also has, by name: so a
    late phase continues the members of a late phase before it, and SWA continues the run that it
    averages. All other coordinates start from the weights that the earlier phase evaluates:
    late-phase members are spawned from them, and an average becomes the iterate. A plain
    optimizer's momentum becomes that of the late-phase base weights, and the members' momentum
    starts at zero, as in the paper.

    Parameters
    ----------
    algorithm : Algorithm or Nonlinear
        Training or averaging method.
    lr : float, array_like or Schedule
        Learning rate, > 0, by step of this phase; an array has one for every step.
    steps : int
        Number of steps, >= 0. One step of K members is one cycle: every member steps once.
    batch_size : float, array_like or Schedule
        Examples of one minibatch, > 0.
    member_lr : float or Schedule, optional
        Learning rate of late-phase members; `lr` by default.
    restart : bool
        Start from the evaluated weights even if the state could be kept (members are spawned
        again).
    """

    algorithm: Algorithm | Nonlinear
    lr: float | Schedule
    steps: int
    batch_size: float | Schedule = 1
    member_lr: float | Schedule | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, Algorithm | Nonlinear):
            raise NQMError(f"phase.algorithm must be an algorithm; got {self.algorithm!r:.60}")
        check_integer("phase.steps", self.steps, 0)
        object.__setattr__(self, "lr", as_schedule(self.lr, "phase.lr"))
        object.__setattr__(self, "batch_size", as_schedule(self.batch_size, "phase.batch_size"))
        _check_batch_sizes(self.batch_size, self.steps)
        if self.member_lr is not None:
            if self.algorithm.rate_count == 1:
                name = type(self.algorithm).__name__
                raise NQMError(f"phase.member_lr is for late-phase weights; {name} has none")
            object.__setattr__(self, "member_lr", as_schedule(self.member_lr, "phase.member_lr"))
        for name in ("lr", "member_lr", "batch_size"):
            given = getattr(self, name)
            if isinstance(given, PerStep) and len(given.values) < self.steps < FOREVER:
                raise NQMError(
                    f"phase.{name} holds {len(given.values)} values for {self.steps} steps; give "
                    "one for every step"
                )

    def _repr_html_(self) -> str:
        """Table that a notebook shows."""
        return _phases_html("Phase", [self])

    @property
    def minibatches(self) -> float:
        """Number of minibatches that one step draws."""
        if isinstance(self.algorithm, Nonlinear):
            return self.algorithm.minibatches
        return minibatches(self.algorithm)

    def _schedules(self) -> list[Schedule]:
        used: list[Any] = [self.lr]
        if self.algorithm.rate_count == 2:
            used.append(self.lr if self.member_lr is None else self.member_lr)
        return [*used, self.batch_size]

    @property
    def least_batch_size(self) -> float:
        """A lower bound of the batch size; its first value if no bound is known."""
        schedule: Any = self.batch_size
        return schedule.least or float(schedule(0))

    def settings(self, start: int, stop: int) -> FloatArray:
        """Learning rate(s) and batch size of the steps [start, stop).

        Parameters
        ----------
        start, stop : int
            First step of this phase, and the last one plus 1.

        Returns
        -------
        ndarray, shape (stop - start, 2 or 3)
            Columns lr, member_lr if the algorithm has two rates, and batch size (examples).
        """
        t = np.arange(start, stop)
        return np.stack([schedule(t) for schedule in self._schedules()], axis=1)

    @property
    def constant(self) -> bool:
        """Whether rates and batch size are the same at every step."""
        return all(len(s) == 0 or (len(s) == 1 and s[0][2] == 1) for s in self._segments)

    def still(self, start: int, stop: int) -> bool:
        """Tell whether rates and batch size are the same at all steps [start, stop).

        Parameters
        ----------
        start, stop : int
            First step of this phase, and the last one plus 1.

        Returns
        -------
        bool
            False if any of them changes inside.
        """
        return all(
            a <= start and stop <= b and p == 1
            for a, b, p in (_segment_at(start, segments) for segments in self._segments)
        )

    def examples(self, steps: int) -> float:
        """Count the examples drawn in the first `steps` steps.

        Parameters
        ----------
        steps : int
            Steps of this phase, >= 0.

        Returns
        -------
        float
            Examples of all minibatches together.
        """
        total = 0.0
        schedule: Any = self.batch_size
        if isinstance(schedule, Constant):
            return self.minibatches * (steps * schedule.value)
        for start, stop, period in schedule.segments(steps):
            if period is not None and stop - start > period:
                cycles, rest = divmod(stop - start, period)
                total += cycles * float(schedule(np.arange(start, start + period)).sum())
                stop = start + rest
            total += float(schedule(np.arange(start, stop)).sum())
        return self.minibatches * total

    def segments(self) -> Iterator[Segment]:
        """Divide the phase into stretches on which rates, batch size and algorithm repeat.

        Yields
        ------
        start, stop : int
            First step of the stretch, and the last one plus 1.
        period : int or None
            Steps after which all of them repeat; None if they do not within the stretch.
        """
        method_period: int | None = 1
        if isinstance(self.algorithm, Algorithm):
            time = self.algorithm.time
            method_period = None if time.update_never_repeats else time.period
        edges = sorted({edge for segments in self._segments for s in segments for edge in s[:2]})
        for start, stop in itertools.pairwise(edges):
            period: int | None = method_period
            for segments in self._segments:
                repeats = _segment_at(start, segments)[2]
                period = None if period is None or repeats is None else math.lcm(period, repeats)
            yield start, stop, period if period is not None and period < stop - start else None

    @cached_property
    def _segments(self) -> list[list[Segment]]:
        """The segments of each schedule."""
        return [list(schedule.segments(self.steps)) for schedule in self._schedules()]


def _segment_at(step: int, segments: list[Segment]) -> Segment:
    """The segment that contains a step; an empty one for a phase without steps."""
    if not segments:
        return 0, 0, None
    return segments[max(bisect_right(segments, step, key=lambda s: s[0]) - 1, 0)]


def _check_batch_sizes(schedule: Any, steps: int) -> None:
    """Raise NQMError if a batch would be empty at one of the first million steps."""
    if schedule.least > 0.0:
        return
    empty = np.flatnonzero(~(schedule(np.arange(min(steps, 10**6))) > 0.0))
    if empty.size:
        raise NQMError(
            f"phase.batch_size must be > 0 at every step; {type(schedule).__name__} gives "
            f"{float(schedule(empty[0])):g} at step {empty[0]}"
        )


def _phases_html(title: str, phases: Sequence[Phase]) -> str:
    """A row for each phase; of a constant schedule its value."""

    def words(schedule: Any) -> Any:
        return schedule.value if isinstance(schedule, Constant) else schedule

    rows = []
    for number, one in enumerate(phases):
        two = one.algorithm.rate_count == 2
        member_lr = words(one.lr if one.member_lr is None else one.member_lr) if two else ""
        row = (number, one.algorithm, one.steps, words(one.lr), member_lr, words(one.batch_size))
        rows.append(row)
    header = ("phase", "method", "steps", "lr", "member_lr", "batch_size")
    return html_table(title, header, rows)


def _size(of: Sized) -> int:
    """``len``, which a range of 2^63 steps or more does not have."""
    return (of.stop - of.start) // of.step if isinstance(of, range) else len(of)


def goes_on(old: Phase, new: Phase) -> bool:
    """Tell whether phase `new` keeps the whole state of phase `old`; it may add coordinates.

    Parameters
    ----------
    old, new : Phase
        Two phases in sequence.

    Returns
    -------
    bool
        False if `new.restart`.
    """
    if new.restart:
        return False
    if isinstance(new.algorithm, Nonlinear) or isinstance(old.algorithm, Nonlinear):
        return isinstance(new.algorithm, Nonlinear) and new.algorithm.continues(old.algorithm)
    return set(old.algorithm.coordinates) <= set(new.algorithm.coordinates)


def resumes(old: Phase, new: Phase) -> bool:
    """Tell whether phase `new` keeps the coordinates of equal name of phase `old`.

    It does if it keeps the whole state, and after a plain optimizer, whose momentum becomes that of
    the base weights.

    Parameters
    ----------
    old, new : Phase
        Two phases in sequence.

    Returns
    -------
    bool
        False if `new.restart`.
    """
    plain = isinstance(old.algorithm, Optimizer) and isinstance(new.algorithm, Algorithm)
    return goes_on(old, new) or (plain and not new.restart)


@dataclass(frozen=True)
class Program:
    """Phases that are run one after another.

    Parameters
    ----------
    phases : sequence of Phase
        At least one phase.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        phases = self.phases
        if not isinstance(phases, Sequence):
            raise NQMError(f"program.phases must be a list of phases; got {shown(phases)}")
        object.__setattr__(self, "phases", tuple(phases))
        if not self.phases:
            raise NQMError("a program needs at least one phase; got none")
        for index, phase in enumerate(self.phases):
            one_phase(f"program.phases[{index}]", phase)

    def _repr_html_(self) -> str:
        """Table that a notebook shows."""
        return _phases_html(f"Program of {self.steps} steps", self.phases)

    @property
    def steps(self) -> int:
        """Number of steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def linear(self) -> bool:
        """Whether every phase has exact moments."""
        return all(isinstance(phase.algorithm, Algorithm) for phase in self.phases)

    def examples(self, steps: Sequence[int]) -> FloatArray:
        """Count the examples drawn up to each step of the whole program.

        Parameters
        ----------
        steps : sequence of int
            Steps of the whole program.

        Returns
        -------
        ndarray, shape (len(steps),)
            Examples since the start of the program.
        """
        counts = []
        for step in steps:
            total, left = 0.0, int(step)
            for phase in self.phases:
                here = min(left, phase.steps)
                total, left = total + phase.examples(here), left - here
            counts.append(total)
        return np.array(counts)

    def recorded(self, at: Sequence[int] | None) -> list[int]:
        """Check the steps to record.

        Parameters
        ----------
        at : sequence of int, optional
            Steps of the whole program; about 100, both ends included, by default.

        Returns
        -------
        list of int
            Rising and distinct.

        Raises
        ------
        NQMError
            If an entry is not a whole number, or lies outside of the program.
        """
        if at is None:
            return sorted({int(step) for step in np.linspace(0, self.steps, 101).round()})
        if not isinstance(at, Iterable):
            raise NQMError(f"record.at must be a list of steps; got {shown(at)}")
        if isinstance(at, Sized):
            check_memory("the number of steps in record.at", _size(at), 8.0 * _size(at))
        try:
            steps = sorted({int(step) for step in at})
        except (TypeError, ValueError, OverflowError):
            raise NQMError(f"record.at must hold whole steps; got {shown(at)}") from None
        if not steps or any(int(step) != step for step in at):
            raise NQMError(f"record.at must hold whole steps; got {shown(list(at))}")
        if steps[0] < 0 or steps[-1] > self.steps:
            bad = steps[0] if steps[0] < 0 else steps[-1]
            raise NQMError(f"record.at must lie in 0..{self.steps}, the program's steps; got {bad}")
        return steps


def one_phase(where: str, value: object) -> Phase:
    """Check that an argument is a phase.

    Parameters
    ----------
    where : str
        Name of the argument, for the message.
    value : object
        The argument.

    Returns
    -------
    Phase
        `value` itself.

    Raises
    ------
    NQMError
        If it is not a `Phase`.
    """
    if not isinstance(value, Phase):
        raise NQMError(f"{where} must be a Phase{_instead(value)}")
    return value


def as_program(where: str, value: Program | Phase | Sequence[Phase]) -> Program:
    """Turn an argument into a program: a program, one phase or a list of phases.

    Parameters
    ----------
    where : str
        Name of the argument, for the message.
    value : Program, Phase or sequence of Phase
        The argument.

    Returns
    -------
    Program
        `value` itself if it is one already.

    Raises
    ------
    NQMError
        If it is none of these.
    """
    if isinstance(value, Program):
        return value
    if isinstance(value, Phase):
        return Program((value,))
    if isinstance(value, list | tuple):
        return Program(tuple(value))
    raise NQMError(f"{where} must be a Program, a Phase or a list of phases{_instead(value)}")


def _instead(value: object) -> str:
    """End of a message, ``"; got SGD(): do this"``, with a fix if the intention is clear."""
    hint = ""
    if isinstance(value, Algorithm | Nonlinear):
        hint = ", which has no rate and no steps: give Phase(algorithm, lr, steps)"
    elif isinstance(value, Program):
        hint = ": give one of its phases"
    return f"; got {shown(value)}{hint}"


def constant(
    algorithm: Algorithm | Nonlinear, lr: float, steps: int, *, batch_size: float = 1, **more: Any
) -> Program:
    """Build a program of one phase at constant rates.

    Parameters
    ----------
    algorithm : Algorithm or Nonlinear
        Training or averaging method.
    lr : float
        Learning rate, > 0.
    steps : int
        Number of steps, >= 0.
    batch_size : float
        Examples of one minibatch, > 0.
    **more
        Other fields of `Phase`.

    Returns
    -------
    Program
        With one phase.
    """
    return Program((Phase(algorithm, lr, steps, batch_size, **more),))


def steps_for(
    algorithm: Algorithm | Nonlinear, examples: float, *, batch_size: float | Schedule = 1
) -> int:
    """Count the whole steps that use at most `examples` examples, to compare at equal data.

    Parameters
    ----------
    algorithm : Algorithm or Nonlinear
        Method; K members with minibatches of their own use K minibatches per step.
    examples : float
        Data budget, >= 0.
    batch_size : float, array_like or Schedule
        Examples of one minibatch, > 0.

    Returns
    -------
    int
        Number of steps.

    Raises
    ------
    NQMError
        If an argument is out of range, or an array of batch sizes is used up before the budget.
    """
    check_number("steps_for.examples", examples, low=0.0)
    phase = Phase(algorithm, 1.0, 1, batch_size)
    size: Any = phase.batch_size
    if isinstance(size, Constant):
        return int(examples // phase.examples(1))
    low, high = 0, 1
    while phase.examples(high) <= examples:
        low, high = high, 2 * high
        summed = sum(stop - start for start, stop, period in size.segments(high) if period is None)
        check_memory("the number of steps in steps_for.examples", high, 3.0 * summed)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if phase.examples(middle) <= examples else (low, middle)
    if isinstance(size, PerStep) and low > len(size.values):
        raise NQMError(
            f"phase.batch_size holds {len(size.values)} values, which are used up before "
            f"{examples:g} examples; give more or lower examples"
        )
    return low

"""Schedules: a value for every step, used for learning rates and for batch sizes.

A schedule is called with a step, or an array of steps, counted from the start of its phase. Its
`segments` divide the first `steps` steps into stretches on which the value is periodic: there a
solver takes powers of one period's transition instead of every step.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from nqm.errors import NQMError, check_integer, check_number, check_word, shown
from nqm.problems.quadratic import FloatArray

#: (start, stop, period): on [start, stop) the value repeats every `period` steps; never if None.
Segment = tuple[int, int, int | None]


class Schedule(ABC):
    """Value >= 0 for every step of a phase; a schedule of batch sizes must be > 0 at every step."""

    @abstractmethod
    def __call__(self, step: ArrayLike) -> FloatArray:
        """Value at a step.

        Parameters
        ----------
        step : array_like of int
            0-based within the phase.

        Returns
        -------
        ndarray, shape of `step`
            Value at each step.
        """

    @property
    def least(self) -> float:
        """A lower bound of the values; 0 if none is known."""
        return 0.0

    def segments(self, steps: int) -> Iterator[Segment]:
        """Divide [0, steps) into stretches on which the schedule is periodic; by default none is.

        Parameters
        ----------
        steps : int
            Length of the phase.

        Yields
        ------
        start, stop : int
            First step of the stretch, and the last one plus 1.
        period : int or None
            Steps after which the value repeats; None for never.
        """
        yield 0, steps, None


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Parameters
    ----------
    value : float
        The value, > 0.
    """

    value: float

    def __post_init__(self) -> None:
        _positive("Constant.value", self.value)

    def __call__(self, step: ArrayLike) -> FloatArray:
        return np.full(np.shape(step), self.value, dtype=np.float64)

    @property
    def least(self) -> float:
        return self.value

    def segments(self, steps: int) -> Iterator[Segment]:
        yield 0, steps, 1


@dataclass(frozen=True)
class Piecewise(Schedule):
    """``values[i]`` from ``boundaries[i-1]`` to ``boundaries[i]``; one value more than boundaries.

    Parameters
    ----------
    values : tuple of float
        Value of each piece, >= 0, not all 0.
    boundaries : tuple of int
        First step of each piece but the first, increasing.
    """

    values: tuple[float, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            check_number("Piecewise.values", value, low=0.0)
        _some_above_zero("Piecewise.values", *self.values)
        if len(self.values) != len(self.boundaries) + 1:
            raise NQMError(
                f"Piecewise.values needs one entry more than boundaries; "
                f"got {len(self.values)} and {len(self.boundaries)}"
            )
        for boundary in self.boundaries:
            check_integer("Piecewise.boundaries", boundary, 1)
        edges = (0, *self.boundaries)
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise NQMError(f"Piecewise.boundaries must increase from above 0; got {edges[1:]}")

    def __call__(self, step: ArrayLike) -> FloatArray:
        index = np.searchsorted(np.asarray(self.boundaries), np.asarray(step), side="right")
        return np.asarray(self.values, dtype=np.float64)[index]

    @property
    def least(self) -> float:
        return min(self.values)

    def segments(self, steps: int) -> Iterator[Segment]:
        edges = [0, *(b for b in self.boundaries if b < steps), steps]
        for start, stop in itertools.pairwise(edges):
            yield start, stop, 1


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From `start` to `end` over `over` steps, then constant; subclasses state the way."""

    start: float
    end: float
    over: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(f"{name}.start", self.start, low=0.0)
        check_number(f"{name}.end", self.end, low=0.0)
        _some_above_zero(f"{name}.start and {name}.end", self.start, self.end)
        check_integer(f"{name}.over", self.over, 1)

    def _done(self, step: ArrayLike) -> FloatArray:
        """Share of the change that is over."""
        return np.minimum(np.asarray(step, dtype=np.float64) / self.over, 1.0)

    @property
    def least(self) -> float:
        return min(self.start, self.end)

    def segments(self, steps: int) -> Iterator[Segment]:
        yield from _then_flat(self.over, steps)


@dataclass(frozen=True)
class Linear(_Ramp):
    """From `start` to `end` in a straight line over `over` steps, then constant.

    Parameters
    ----------
    start, end : float
        First and final value, >= 0, not both 0.
    over : int
        Steps of the change, >= 1.
    """

    def __call__(self, step: ArrayLike) -> FloatArray:
        done = self._done(step)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine from `start` down to `end` over `over` steps, then constant (SGDR, 2017).

    Parameters
    ----------
    start, end : float
        First and final value, >= 0, not both 0.
    over : int
        Steps of the change, >= 1.
    """

    def __call__(self, step: ArrayLike) -> FloatArray:
        done = self._done(step)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + np.cos(np.pi * done))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up to `peak`, a plateau, a linear decay to `end`, then constant.

    Step t of the warm-up has peak * (t + 1) / warmup, so the first rate is not zero.

    Parameters
    ----------
    peak : float
        Value of the plateau, > 0.
    end : float
        Value after the decay, >= 0.
    warmup, stable, decay : int
        Steps of each part; `decay` >= 1.
    """

    peak: float
    end: float
    warmup: int
    stable: int
    decay: int

    def __post_init__(self) -> None:
        _positive("WarmupStableDecay.peak", self.peak)
        check_number("WarmupStableDecay.end", self.end, low=0.0)
        for name, minimum in (("warmup", 0), ("stable", 0), ("decay", 1)):
            check_integer(f"WarmupStableDecay.{name}", getattr(self, name), minimum)

    def __call__(self, step: ArrayLike) -> FloatArray:
        t = np.asarray(step, dtype=np.float64)
        rise = np.minimum((t + 1.0) / max(self.warmup, 1), 1.0) if self.warmup else 1.0
        fall = np.clip((t - self.warmup - self.stable) / self.decay, 0.0, 1.0)
        return np.asarray(self.peak * rise + (self.end - self.peak) * fall)

    @property
    def least(self) -> float:
        return min(self.peak / max(self.warmup, 1), self.end)

    def segments(self, steps: int) -> Iterator[Segment]:
        plateau = self.warmup + self.stable
        edges = [0, self.warmup, plateau, plateau + self.decay, steps]
        kinds: list[int | None] = [None, 1, None, 1]
        for start, stop, kind in zip(edges, edges[1:], kinds, strict=False):
            if start < min(stop, steps):
                yield start, min(stop, steps), kind


@dataclass(frozen=True)
class Cyclic(Schedule):
    """Cycles of `period` steps from `high` to `low`, each beginning at `high` (snapshots, SGDR).

    Parameters
    ----------
    high, low : float
        First and last value of a cycle; high > 0, low >= 0.
    period : int
        Steps of a cycle, >= 1.
    shape : {"cosine", "linear", "triangle"}
        Fall by half a cosine, fall linearly, or fall and rise linearly (FGE).
    """

    high: float
    low: float
    period: int
    shape: str = "cosine"

    def __post_init__(self) -> None:
        _positive("Cyclic.high", self.high)
        check_number("Cyclic.low", self.low, low=0.0)
        check_integer("Cyclic.period", self.period, 1)
        if self.shape not in ("cosine", "linear", "triangle"):
            raise NQMError(
                f"Cyclic.shape must be 'cosine', 'linear' or 'triangle'; got {self.shape!r}"
            )

    def __call__(self, step: ArrayLike) -> FloatArray:
        # The last step of a cycle, after which a snapshot is taken, has the lowest value.
        # Fractions of a step are allowed: after a cycle's last step its value is kept.
        inside = np.minimum(np.mod(np.asarray(step), self.period) / max(self.period - 1, 1), 1.0)
        if self.shape == "cosine":
            height = 0.5 * (1.0 + np.cos(np.pi * inside))
        elif self.shape == "linear":
            height = 1.0 - inside
        else:
            height = np.abs(1.0 - 2.0 * inside)
        return np.asarray(self.low + (self.high - self.low) * height)

    @property
    def least(self) -> float:
        return min(self.high, self.low)

    def segments(self, steps: int) -> Iterator[Segment]:
        yield 0, steps, self.period


@dataclass(frozen=True)
class Power(Schedule):
    """``start * (1 + t / over)^-exponent``: a power of time, without end.

    Exponent 1 is the inverse-time decay of Robbins & Monro (1951), 1/2 the inverse root; `over`
    is the number of steps after which the value has fallen by a factor of 2^exponent.

    Parameters
    ----------
    start : float
        Value of the first step, > 0.
    over : int
        Scale of time in steps, >= 1.
    exponent : float
        > 0.
    """

    start: float
    over: int
    exponent: float = 1.0

    def __post_init__(self) -> None:
        _positive("Power.start", self.start)
        check_integer("Power.over", self.over, 1)
        _positive("Power.exponent", self.exponent)

    def __call__(self, step: ArrayLike) -> FloatArray:
        passed = 1.0 + np.asarray(step, dtype=np.float64) / self.over
        return np.asarray(self.start * passed**-self.exponent)


@dataclass(frozen=True)
class Exponential(_Ramp):
    """From `start` to `end` by an equal factor each step over `over` steps, then constant.

    Parameters
    ----------
    start, end : float
        First and final value, > 0.
    over : int
        Steps of the change, >= 1.
    """

    def __post_init__(self) -> None:
        _positive("Exponential.start", self.start)
        _positive("Exponential.end", self.end)
        check_integer("Exponential.over", self.over, 1)

    def __call__(self, step: ArrayLike) -> FloatArray:
        done = self._done(step)
        return np.asarray(self.start ** (1.0 - done) * self.end**done)


@dataclass(frozen=True)
class PerStep(Schedule):
    """An array of values, one for every step; a list in a phase is read as this.

    Parameters
    ----------
    values : array_like
        Value of each step, >= 0, not all 0. A phase with more steps is refused.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        try:
            values = np.asarray(self.values, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.full(1, np.nan)
        if values.ndim != 1 or not values.size or not np.all(np.isfinite(values) & (values >= 0)):
            raise NQMError(f"PerStep.values must hold numbers >= 0; got {shown(self.values)}")
        _some_above_zero("PerStep.values", float(values.max()))
        object.__setattr__(self, "values", tuple(values.tolist()))

    @cached_property
    def _array(self) -> FloatArray:
        return np.array(self.values)

    def __call__(self, step: ArrayLike) -> FloatArray:
        place = np.minimum(np.asarray(step).astype(np.int64), len(self.values) - 1)
        return np.asarray(self._array[place])

    @property
    def least(self) -> float:
        return min(self.values)

    def segments(self, steps: int) -> Iterator[Segment]:
        yield from _then_flat(len(self.values), steps)


@dataclass(frozen=True)
class Cooldown(Schedule):
    """Any schedule, whose values fall to a share `end` of themselves in the steps after `begin`.

    With done = (t - begin) / over the factor is 1 - (1 - end) f: f = done ("linear"), sqrt(done)
    ("sqrt", the 1 - sqrt cooldown of Hägele et al. 2024, "Scaling laws and compute-optimal
    training beyond fixed training durations"), or (1 - cos(pi done)) / 2 ("cosine").

    Parameters
    ----------
    of : Schedule or float
        Schedule whose values are multiplied by the factor.
    begin : int
        First step of the cooldown, which still has the factor 1, >= 0.
    over : int
        Steps of the cooldown, >= 1.
    end : float
        Factor at its end and later, in [0, 1].
    shape : {"sqrt", "linear", "cosine"}
        How the factor falls.
    """

    of: float | Schedule
    begin: int
    over: int
    end: float = 0.0
    shape: str = "sqrt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", as_schedule(self.of, "Cooldown.of"))
        check_integer("Cooldown.begin", self.begin, 0)
        check_integer("Cooldown.over", self.over, 1)
        check_number("Cooldown.end", self.end, low=0.0, high=1.0)
        check_word("Cooldown.shape", self.shape, tuple(_FALLS))

    @property
    def _whole(self) -> Schedule:
        """The schedule that is cooled down."""
        assert isinstance(self.of, Schedule)
        return self.of

    def __call__(self, step: ArrayLike) -> FloatArray:
        t = np.asarray(step, dtype=np.float64)
        done = np.clip((t - self.begin) / self.over, 0.0, 1.0)
        return np.asarray((1.0 - (1.0 - self.end) * _FALLS[self.shape](done)) * self._whole(step))

    @property
    def least(self) -> float:
        return self.end * self._whole.least

    def segments(self, steps: int) -> Iterator[Segment]:
        fallen = self.begin + self.over
        for start, stop, period in self._whole.segments(steps):
            edges = sorted({start, stop, *(e for e in (self.begin, fallen) if start < e < stop)})
            for first, last in itertools.pairwise(edges):
                cools = self.begin <= first < fallen
                if cools and last - first > 1:
                    yield first, last, None
                else:
                    yield first, last, period


#: How far a cooldown has gone, by the share of its steps that is done.
_FALLS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "sqrt": np.sqrt,
    "linear": np.asarray,
    "cosine": lambda done: 0.5 * (1.0 - np.cos(np.pi * done)),
}


@dataclass(frozen=True)
class Warmup(Schedule):
    """Linear warm-up over `steps` steps of any schedule, which is not delayed by it.

    The factor at step t is (t + 1) / steps, as in the common training recipes.

    Parameters
    ----------
    steps : int
        Steps of the warm-up, >= 1.
    then : Schedule
        Schedule whose values are multiplied by the factor.
    """

    steps: int
    then: Schedule

    def __post_init__(self) -> None:
        check_integer("Warmup.steps", self.steps, 1)
        object.__setattr__(self, "then", as_schedule(self.then, "Warmup.then"))

    def __call__(self, step: ArrayLike) -> FloatArray:
        rise = np.minimum((np.asarray(step, dtype=np.float64) + 1.0) / self.steps, 1.0)
        return np.asarray(rise * self.then(step))

    @property
    def least(self) -> float:
        return self.then.least / self.steps

    def segments(self, steps: int) -> Iterator[Segment]:
        risen = self.steps if self.steps > 1 else 0  # a warm-up of one step changes nothing
        if risen:
            yield 0, min(risen, steps), None
        for start, stop, period in self.then.segments(steps):
            if stop > risen:
                yield max(start, risen), stop, period


@dataclass(frozen=True)
class Joined(Schedule):
    """Schedules one after another, each counting its own steps from zero.

    Parameters
    ----------
    parts : tuple of Schedule
        The schedules, in order.
    lengths : tuple of int
        Steps of every part but the last, which has no end.
    """

    parts: tuple[Schedule, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.lengths) + 1:
            raise NQMError(
                f"Joined needs one part more than lengths; "
                f"got {len(self.parts)} parts and {len(self.lengths)} lengths"
            )
        parts = tuple(as_schedule(part, "Joined.parts") for part in self.parts)
        object.__setattr__(self, "parts", parts)
        for length in self.lengths:
            check_integer("Joined.lengths", length, 1)
        check_number("the sum of Joined.lengths", sum(self.lengths), high=2**53)

    @cached_property
    def _begins(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """First step of each part."""
        return np.cumsum([0, *self.lengths], dtype=np.int64)

    def __call__(self, step: ArrayLike) -> FloatArray:
        t = np.asarray(step)
        part = np.searchsorted(self._begins[1:], t, side="right")
        value = np.empty(t.shape, dtype=np.float64)
        for index in np.unique(part).tolist():
            chosen = part == index
            value[chosen] = self.parts[index](t[chosen] - self._begins[index])
        return value

    @property
    def least(self) -> float:
        return min(part.least for part in self.parts)

    def segments(self, steps: int) -> Iterator[Segment]:
        offset = 0
        for index, schedule in enumerate(self.parts):
            left = steps - offset
            if left <= 0:
                return
            length = min(self.lengths[index], left) if index < len(self.lengths) else left
            for start, stop, period in schedule.segments(length):
                yield offset + start, offset + stop, period
            offset += length


def as_schedule(value: float | Schedule | Any, where: str) -> Schedule:
    """Turn a number into a `Constant` and a list into a `PerStep`; return a schedule unchanged.

    Parameters
    ----------
    value : float, array_like or Schedule
        Number > 0, one number for every step, or a schedule.
    where : str
        Name of the field, for the message.

    Returns
    -------
    Schedule
        `value` itself if it is one already.

    Raises
    ------
    NQMError
        If it is none of these.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0:
        try:
            return PerStep(cast(Any, value))
        except NQMError as error:
            raise NQMError(f"{where}: {error}") from None
    _positive(where, value)
    return Constant(float(value))


def _positive(where: str, value: float) -> None:
    check_number(where, value, low=0.0, closed_low=False)


def _some_above_zero(where: str, *values: float) -> None:
    if not any(values):
        raise NQMError(f"{where} must not all be 0: nothing would be trained")


def _then_flat(over: int, steps: int) -> Iterator[Segment]:
    yield 0, min(over, steps), None
    if steps > over:
        yield over, steps, 1


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "piecewise": Piecewise,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WarmupStableDecay,
    "cyclic": Cyclic,
    "power": Power,
    "exponential": Exponential,
    "per_step": PerStep,
    "cooldown": Cooldown,
    "warmup": Warmup,
    "joined": Joined,
}

"""What an algorithm is: a literal `update`, from which everything else is read.

An algorithm that is linear in its state and in the noise states `update` once, with nothing but
`+`, `-` and multiplication by constants. Run on numbers it *is* the algorithm; run on unit
vectors it yields its transition matrices (see `nqm.transition`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import MEMBERS

if TYPE_CHECKING:
    from nqm.problems.quadratic import FloatArray, Problem

#: One coordinate of the state: a number, an array over directions, or a linear form.
Value = Any
State = tuple[Value, ...]
#: One learning rate, or the pair (lr, member_lr) for methods that take two.
Rate = Any


class Gradient(Protocol):
    """Minibatch gradient: ``gradient(x)`` draws a new minibatch, a named `batch` is drawn once."""

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        """Noisy gradient at x of a minibatch of `size` times the phase's batch size."""
        ...

    def normal(self) -> Value:
        """A fresh standard normal of the method's own, untouched by the batch size."""
        ...


@dataclass(frozen=True)
class Mode:
    """One of the independent parts an algorithm splits into.

    Attributes
    ----------
    name : {"mean", "deviation"}
        The mean model, or one member's deviation from it.
    algorithm : Algorithm
        A single chain with the law of that part.
    noise_share : float
        Its noise variance in units of one minibatch's.
    """

    name: str
    algorithm: Algorithm
    noise_share: float


class Algorithm(ABC):
    """A training or averaging method, linear in its state and in the noise."""

    #: How many learning rates `update` takes: 1, or 2 for (lr, member_lr).
    rates: ClassVar[int] = 1

    @property
    @abstractmethod
    def coordinates(self) -> tuple[str, ...]:
        """Names of the state; equal names are carried over from one phase to the next."""

    @property
    def period(self) -> int:
        """Steps after which `update` repeats itself; 1 when it does not look at t."""
        return 1

    @property
    def beats(self) -> tuple[int, ...] | None:
        """Numbers n such that `update` asks of t only whether step t is the last of n steps.

        None where it may ask for more of the remainder modulo `period`.
        """
        return () if self.period == 1 else None

    @property
    def counts_steps(self) -> bool:
        """Whether `weights` looks at t beyond its remainder modulo `period` (snapshots do)."""
        return False

    @property
    def ages(self) -> bool:
        """Whether `update` looks at t beyond its remainder modulo `period`.

        No two steps are alike then: jumps walk, and there is no steady state. With period 1
        `update` must take an array of times t.
        """
        return False

    @property
    def constants(self) -> tuple[str, ...]:
        """Coordinates that `update` never moves (what weights are pulled to)."""
        return ()

    @property
    def at_origin(self) -> tuple[str, ...]:
        """Those `constants` that stand at the origin of weight space, -w* in our coordinates.

        `embed` returns 0 for them; the solvers, who know the problem, put them there.
        """
        return ()

    def check(self, problem: Problem) -> None:
        """Raise NQMError where the method makes no sense on this problem."""
        return

    def replicated(self, problem: Problem) -> FloatArray | None:
        """1 in directions that have members of their own and 0 elsewhere, (d,); None if all do."""
        return None

    @property
    def rate_count(self) -> int:
        """Learning rates this method takes (a wrapper takes its inner method's)."""
        return self.rates

    @property
    def member_count(self) -> int:
        """Members K behind the evaluated weights; 0 for a single chain."""
        return 0

    @abstractmethod
    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        """State after step t (0-based), as the paper prints it."""

    @abstractmethod
    def weights(self, state: State, t: int) -> Value:
        """The weights that are evaluated once t steps are done."""

    @abstractmethod
    def embed(self, draw: Callable[[], Value], normal: Callable[[], Value]) -> State:
        """Start of a phase from plain weights.

        Parameters
        ----------
        draw : callable
            ``draw()`` returns the weights handed over; a second call is a second independent
            draw of the start.
        normal : callable
            ``normal()`` returns a fresh standard normal.
        """

    def resume(
        self,
        known: Mapping[str, Value],
        draw: Callable[[], Value],
        normal: Callable[[], Value],
    ) -> State:
        """Start of a phase that goes on: `known` coordinates are kept, the others begin."""
        fresh = self.embed(draw, normal)
        return tuple(known.get(n, x) for n, x in zip(self.coordinates, fresh, strict=True))

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        """Weights of the members behind the evaluated ones; empty for a single chain."""
        return ()

    def modes(self) -> tuple[Mode, ...]:
        """Independent chains that carry all second moments; a single chain is its own."""
        return (Mode("mean", self, 1.0),)


class Nonlinear:
    """A method that is not linear in state and noise: Monte Carlo, and stated approximations."""

    rate_count: ClassVar[int] = 1

    @property
    def minibatches(self) -> int:
        """Minibatches one step draws."""
        return 1

    @property
    def member_count(self) -> int:
        """Members behind the evaluated weights; 0 for a single chain."""
        return 0

    def continues(self, old: object) -> bool:
        """Whether a phase of this method goes on from the state of a phase of `old`."""
        return False


class Optimizer(Algorithm):
    """A first-order optimizer in PyTorch's form: buffers, a direction, ``x - lr * direction``."""

    #: Names of the buffers, zero at the start.
    buffers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        """Direction to go against, and the new buffers, given the gradient g."""

    @property
    def coordinates(self) -> tuple[str, ...]:
        return ("x", *self.buffers)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, *buffers = state
        step, new = self.direction(tuple(buffers), gradient(x))
        return (x - lr * step, *new)

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Callable[[], Value], normal: Callable[[], Value]) -> State:
        return (draw(), *self.no_buffers())

    def no_buffers(self) -> State:
        """Buffers at the start."""
        return (0.0,) * len(self.buffers)


def check_fraction(where: str, value: float, *, closed_high: bool = False) -> None:
    """Raise NQMError unless value lies in [0, 1), or in [0, 1] if `closed_high`."""
    check_number(where, value, low=0.0, high=1.0, closed_high=closed_high)


def check_algorithm(where: str, value: object, kind: Any = Algorithm) -> None:
    """Raise NQMError unless value is an algorithm of the given kind."""
    if not isinstance(value, kind):
        raise NQMError(f"{where} must be an {kind.__name__}; got {type(value).__name__}")


def check_members(where: str, value: int) -> None:
    """Raise NQMError unless value is a count of members, each a coordinate with a name, from 1."""
    check_integer(where, value, 1)
    if value > MEMBERS:
        raise NQMError(f"{where} must be at most {MEMBERS}, as each has a name; got {value}")


def ends(t: int, every: int) -> bool:
    """Whether step t is the last of `every` steps (of 1, whatever the array of times t)."""
    return every == 1 or (t + 1) % every == 0


def average(values: tuple[Value, ...]) -> Value:
    """Plain mean of the members."""
    return sum(values[1:], start=values[0]) * (1.0 / len(values))

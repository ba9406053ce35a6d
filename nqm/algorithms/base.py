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

from nqm.algorithms.time_dependence import TimeDependence
from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import MEMBERS

if TYPE_CHECKING:
    from nqm.problems.quadratic import FloatArray, Problem

#: One coordinate of the state: a number, an array over directions, or a linear form.
Value = Any
#: The state of a method in one direction: its coordinates, in the order of their names.
State = tuple[Value, ...]
#: One learning rate, or the pair (lr, member_lr) for methods that take two.
Rate = Any
#: ``draw()`` returns the weights a phase starts from; ``normal()`` a fresh standard normal.
Draw = Callable[[], Value]


class Gradient(Protocol):
    """Minibatch gradient of the loss at some weights."""

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        """Noisy gradient at x.

        Parameters
        ----------
        x : Value
            Displacement of the weights from the minimum.
        batch : int, optional
            Name of the minibatch within this step, which is drawn once; a new minibatch by default.
        size : float
            Examples of the minibatch, in units of the phase's batch size.
        """
        ...

    def normal(self) -> Value:
        """A fresh standard normal of the method's own, which no batch size scales.

        Returns
        -------
        Value
        """
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


def same_rates(rates: Rate) -> Rate:
    """The rates unchanged.

    Parameters
    ----------
    rates : float, or pair of floats

    Returns
    -------
    float, or pair of floats
    """
    return rates


@dataclass(frozen=True)
class LimitingCase:
    """A setting at which one method has the expected loss of another, at every step.

    Attributes
    ----------
    setting : str
        In words, e.g. "momentum = 0".
    algorithm : Algorithm or Nonlinear
        The method at this setting.
    equals : Algorithm or Nonlinear
        The method it then equals.
    rates, equal_rates : callable
        From rates ``lr``, or ``(lr, member_lr)`` where `algorithm` takes two, to those at which
        `algorithm` and `equals` are run; the rates themselves by default.
    batch_size : float
        Batch size of `equals`, in units of that of `algorithm`.
    every : int
        They agree after every so many steps.
    until : int, optional
        They agree up to this step; for ever by default.
    members : bool
        Whether the average member's loss agrees too.
    """

    setting: str
    algorithm: Algorithm | Nonlinear
    equals: Algorithm | Nonlinear
    rates: Callable[[Rate], Rate] = same_rates
    equal_rates: Callable[[Rate], Rate] = same_rates
    batch_size: float = 1.0
    every: int = 1
    until: int | None = None
    members: bool = True


class Algorithm(ABC):
    """A training or averaging method, linear in its state and in the noise.

    A method states `coordinates`, `update`, `weights` and `embed` (an `Optimizer` its `direction`),
    and its `limits` and `stability_edge`. The other members have defaults that fit a single chain
    whose steps are all alike.
    """

    @property
    @abstractmethod
    def coordinates(self) -> tuple[str, ...]:
        """Names of the state; equal names are carried over from one phase to the next."""

    @abstractmethod
    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        """State after one step, as the paper prints it.

        Parameters
        ----------
        state : tuple
            As many entries as `coordinates`.
        gradient : Gradient
        lr : float, or pair of floats
            As many learning rates as `rate_count`.
        t : int
            Step number within the phase, 0-based.

        Returns
        -------
        tuple
            As many entries as `coordinates`.
        """

    @abstractmethod
    def weights(self, state: State, t: int) -> Value:
        """The weights that are evaluated once t steps are done.

        Parameters
        ----------
        state : tuple
            As many entries as `coordinates`.
        t : int
            Steps done.

        Returns
        -------
        Value
            Displacement from the minimum.
        """

    @abstractmethod
    def embed(self, draw: Draw, normal: Draw) -> State:
        """Start of a phase from plain weights.

        Parameters
        ----------
        draw : callable
            ``draw()`` returns the weights handed over; a second call is a second independent
            draw of the start.
        normal : callable
            ``normal()`` returns a fresh standard normal.

        Returns
        -------
        tuple
            As many entries as `coordinates`.
        """

    def limits(self) -> tuple[LimitingCase, ...]:
        """Settings at which this method equals another one; all else as it is here.

        Returns
        -------
        tuple of LimitingCase
            Empty only for a method without parameters.
        """
        return ()

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        """Smallest constant learning rate that is not stable, in closed form.

        Parameters
        ----------
        curvature : ndarray, shape (d,)
            h > 0.
        member_lr_ratio : float or ndarray, shape (d,)
            member_lr / lr, for methods that take two rates.

        Returns
        -------
        ndarray, shape (d,), or None
            Edge of each direction, infinity where every rate is stable; None where no closed form
            is known. `nqm.stability_edge` finds it from the spectral radius in any case.
        """
        return None

    @property
    def time(self) -> TimeDependence:
        """How `update` and `weights` depend on the step number; not at all by default."""
        return TimeDependence()

    @property
    def rate_count(self) -> int:
        """Learning rates that `update` takes: 1, or 2 for (lr, member_lr)."""
        return 1

    @property
    def constants(self) -> Mapping[str, str]:
        """Coordinates that `update` never moves, and where they are: "start" or "origin".

        `embed` gives those at the "start". It returns 0 for those at the origin of weight space,
        -w* in our coordinates: the solvers, who know the problem, put them there.
        """
        return {}

    def check(self, problem: Problem) -> None:
        """Refuse a problem on which the method makes no sense; by default none.

        Parameters
        ----------
        problem : Problem

        Raises
        ------
        NQMError
        """
        return

    @property
    def member_count(self) -> int:
        """Members K behind the evaluated weights; 0 for a single chain."""
        return 0

    def member_mask(self, problem: Problem) -> FloatArray | None:
        """Which directions have members of their own.

        Parameters
        ----------
        problem : Problem

        Returns
        -------
        ndarray, shape (d,), or None
            1 or 0; None if all directions have members of their own.
        """
        return None

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        """Weights of the members behind the evaluated ones; empty for a single chain.

        Parameters
        ----------
        state : tuple
            As many entries as `coordinates`.
        t : int
            Steps done.

        Returns
        -------
        tuple of Value
            K displacements from the minimum.
        """
        return ()

    def modes(self) -> tuple[Mode, ...]:
        """Independent chains that carry all second moments; a single chain is its own.

        Returns
        -------
        tuple of Mode
            The mean model first.
        """
        return (Mode("mean", self, 1.0),)

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        """Start of a phase that goes on: `known` coordinates are kept, the others begin.

        Parameters
        ----------
        known : mapping of str to Value
            Coordinates of the phase before, by name.
        draw, normal : callable
            As for `embed`.

        Returns
        -------
        tuple
            As many entries as `coordinates`.
        """
        fresh = self.embed(draw, normal)
        return tuple(known.get(n, x) for n, x in zip(self.coordinates, fresh, strict=True))


class Nonlinear:
    """A method that is not linear in state and noise: Monte Carlo, and stated approximations.

    Attributes
    ----------
    rate_count : int
        Learning rates that a step takes: 1, or 2 for (lr, member_lr).
    """

    rate_count: ClassVar[int] = 1

    @property
    def minibatches(self) -> int:
        """Minibatches one step draws."""
        return 1

    @property
    def member_count(self) -> int:
        """Members behind the evaluated weights; 0 for a single chain."""
        return 0

    def limits(self) -> tuple[LimitingCase, ...]:
        """Settings at which this method equals another one; all else as it is here.

        Returns
        -------
        tuple of LimitingCase
        """
        return ()

    def continues(self, old: object) -> bool:
        """Whether a phase of this method goes on from the state of a phase of `old`.

        Parameters
        ----------
        old : Algorithm or Nonlinear
            The method of the phase before.

        Returns
        -------
        bool
        """
        return False


class Optimizer(Algorithm):
    """A first-order optimizer in PyTorch's form: buffers, a direction, ``x - lr * direction``.

    Attributes
    ----------
    buffers : tuple of str
        Names of the buffers, zero at the start.
    """

    #: Names of the buffers, zero at the start.
    buffers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        """Direction to go against, and the new buffers.

        Parameters
        ----------
        buffers : tuple
            As many entries as `buffers`.
        g : Value
            Minibatch gradient at the current weights.

        Returns
        -------
        direction : Value
            What is multiplied by the learning rate and subtracted from the weights.
        buffers : tuple
            After the step.
        """

    @property
    def coordinates(self) -> tuple[str, ...]:
        return ("x", *self.buffers)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        x, *buffers = state
        step, new = self.direction(tuple(buffers), gradient(x))
        return (x - lr * step, *new)

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Draw, normal: Draw) -> State:
        return (draw(), *self.no_buffers())

    def no_buffers(self) -> State:
        """Buffers at the start: zeros.

        Returns
        -------
        tuple of float
        """
        return (0.0,) * len(self.buffers)


class Around(Algorithm):
    """A method around an inner one: what it does not state itself is the inner method's.

    Attributes
    ----------
    inner : Algorithm
    """

    inner: Algorithm

    @property
    def coordinates(self) -> tuple[str, ...]:
        return self.inner.coordinates

    @property
    def time(self) -> TimeDependence:
        return self.inner.time

    @property
    def rate_count(self) -> int:
        return self.inner.rate_count

    @property
    def constants(self) -> Mapping[str, str]:
        return self.inner.constants

    @property
    def member_count(self) -> int:
        return self.inner.member_count

    def check(self, problem: Problem) -> None:
        self.inner.check(problem)

    def member_mask(self, problem: Problem) -> FloatArray | None:
        return self.inner.member_mask(problem)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return self.inner.stability_edge(curvature, member_lr_ratio)

    def weights(self, state: State, t: int) -> Value:
        return self.inner.weights(state, t)

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return self.inner.member_weights(state, t)

    def embed(self, draw: Draw, normal: Draw) -> State:
        return self.resume({}, draw, normal)

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        return self.inner.resume(known, draw, normal)


def check_fraction(where: str, value: float, *, closed_high: bool = False) -> None:
    """Raise NQMError unless value lies in [0, 1), or in [0, 1] if `closed_high`.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : float
    closed_high : bool

    Raises
    ------
    NQMError
    """
    check_number(where, value, low=0.0, high=1.0, closed_high=closed_high)


def check_algorithm(where: str, value: object, kind: Any = Algorithm) -> None:
    """Raise NQMError unless value is an algorithm of the given kind.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : object
    kind : type
        `Algorithm`, or a subclass.

    Raises
    ------
    NQMError
    """
    if not isinstance(value, kind):
        raise NQMError(f"{where} must be an {kind.__name__}; got {type(value).__name__}")


def check_members(where: str, value: int) -> None:
    """Raise NQMError unless value is a number of members; each is a coordinate with a name.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : int

    Raises
    ------
    NQMError
        Also above `nqm.limits.MEMBERS`.
    """
    check_integer(where, value, 1)
    if value > MEMBERS:
        raise NQMError(f"{where} must be at most {MEMBERS}, as each has a name; got {value}")


def average(values: tuple[Value, ...]) -> Value:
    """Plain mean of the members.

    Parameters
    ----------
    values : tuple of Value
        At least one.

    Returns
    -------
    Value
    """
    return sum(values[1:], start=values[0]) * (1.0 / len(values))

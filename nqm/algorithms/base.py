"""Base classes of algorithms: a literal `update`, from which transition matrices are extracted.

An algorithm that is linear in its state and in the noise defines `update` once, by `+`, `-` and
multiplication with constants only. Applied to numbers, `update` is the algorithm; applied to unit
vectors, it gives the transition matrices (see `nqm.transition`).
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
#: ``draw()`` returns the weights from which a phase starts; ``normal()`` a fresh standard normal.
Draw = Callable[[], Value]


class Gradient(Protocol):
    """Minibatch gradient of the loss at some weights."""

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        """Compute the noisy gradient at x.

        Parameters
        ----------
        x : Value
            Displacement of the weights from the minimum.
        batch : int, optional
            Number of the minibatch within this step: equal numbers are the same minibatch. A new
            minibatch by default.
        size : float
            Examples of the minibatch, in units of the phase's batch size.

        Returns
        -------
        Value
            Gradient at `x` on that minibatch.
        """
        ...

    def normal(self) -> Value:
        """Draw a fresh standard normal for noise of the method itself, independent of batch size.

        Returns
        -------
        Value
            The draw.
        """
        ...


@dataclass(frozen=True)
class Mode:
    """One of the independent parts into which an algorithm decomposes.

    Attributes
    ----------
    name : {"mean", "deviation"}
        The mean model, or one member's deviation from it.
    algorithm : Algorithm
        A single chain with the distribution of that part.
    noise_share : float
        Its noise variance, in units of the noise variance of one minibatch.
    """

    name: str
    algorithm: Algorithm
    noise_share: float


def same_rates(rates: Rate) -> Rate:
    """Return the rates unchanged.

    Parameters
    ----------
    rates : float, or pair of floats
        lr, or (lr, member_lr).

    Returns
    -------
    float, or pair of floats
        `rates`.
    """
    return rates


@dataclass(frozen=True)
class LimitingCase:
    """Setting at which one method has the expected loss of another, at every step.

    Attributes
    ----------
    setting : str
        In words, e.g. "momentum = 0".
    algorithm : Algorithm or Nonlinear
        The method at this setting.
    equals : Algorithm or Nonlinear
        The method to which it is equal there.
    rates, equal_rates : callable
        From rates ``lr``, or ``(lr, member_lr)`` where `algorithm` takes two, to those at which
        `algorithm` and `equals` are run; the rates themselves by default.
    batch_size : float
        Batch size of `equals`, in units of that of `algorithm`.
    every : int
        The losses agree after every `every` steps.
    until : int, optional
        The losses agree up to this step; without end by default.
    members : bool
        Whether the average member's loss agrees as well.
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

    A method defines `coordinates`, `update`, `weights` and `embed` (an `Optimizer` its
    `direction`), and its `limits` and `stability_edge`. The defaults of the other members are right
    for a single chain whose steps are all equal.
    """

    @property
    @abstractmethod
    def coordinates(self) -> tuple[str, ...]:
        """Names of the coordinates; equal names are kept from one phase to the next."""

    @abstractmethod
    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        """Compute the state after one step, written as in the paper.

        Parameters
        ----------
        state : tuple
            As many entries as `coordinates`.
        gradient : Gradient
            Minibatch gradient of the loss.
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
        """Compute the weights that are evaluated after t steps.

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
        """Compute the state at the start of a phase from plain weights.

        Parameters
        ----------
        draw : callable
            ``draw()`` returns the weights of the phase before; a second call is a second
            independent draw of the start.
        normal : callable
            ``normal()`` returns a fresh standard normal.

        Returns
        -------
        tuple
            As many entries as `coordinates`.
        """

    def limits(self) -> tuple[LimitingCase, ...]:
        """Settings at which this method equals another one; other settings as they are here.

        Returns
        -------
        tuple of LimitingCase
            Empty only for a method without parameters.
        """
        return ()

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        """Compute the smallest constant learning rate that is not stable, in closed form.

        Parameters
        ----------
        curvature : ndarray, shape (d,)
            Eigenvalues h > 0 of the Hessian.
        member_lr_ratio : float or ndarray, shape (d,)
            member_lr / lr, for methods with two rates.

        Returns
        -------
        ndarray, shape (d,), or None
            Learning rate for each direction, infinite if every rate is stable; None if no closed
            form is known. `nqm.stability_edge` computes it from the spectral radius in any case.
        """
        return None

    @property
    def time(self) -> TimeDependence:
        """Dependence of `update` and `weights` on the step number; none by default."""
        return TimeDependence()

    @property
    def rate_count(self) -> int:
        """Number of learning rates of `update`: 1, or 2 for (lr, member_lr)."""
        return 1

    @property
    def independent_noise(self) -> bool:
        """Whether the gradient noise of every step is fresh, as bounds by examples suppose."""
        return True

    @property
    def constants(self) -> Mapping[str, str]:
        """Coordinates that `update` never changes, and their position: "start" or "origin".

        `embed` sets those at the "start". For those at the origin of weight space it returns 0; the
        solvers, which know the problem, replace this by -w*, the origin in our coordinates.
        """
        return {}

    def check(self, problem: Problem) -> None:
        """Refuse a problem to which the method does not apply; by default none.

        Parameters
        ----------
        problem : Problem
            Problem of the run.

        Raises
        ------
        NQMError
            If the method does not apply.
        """
        return

    @property
    def member_count(self) -> int:
        """Number K of members whose mean is evaluated; 0 for a single chain."""
        return 0

    def member_mask(self, problem: Problem) -> FloatArray | None:
        """Mark the directions that have members of their own.

        Parameters
        ----------
        problem : Problem
            Gives curvatures and number of directions.

        Returns
        -------
        ndarray, shape (d,), or None
            1 with members, 0 without; None if all directions have members.
        """
        return None

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        """Compute the weights of each member; empty for a single chain.

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
        """Decompose the method into independent chains that determine all second moments.

        Returns
        -------
        tuple of Mode
            The mean model first; the method itself if it is a single chain.
        """
        return (Mode("mean", self, 1.0),)

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        """Compute the start of a phase that keeps the `known` coordinates of the phase before.

        The other coordinates start as `embed` sets them.

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
        Number of learning rates of a step: 1, or 2 for (lr, member_lr).
    """

    rate_count: ClassVar[int] = 1

    @property
    def minibatches(self) -> int:
        """Number of minibatches that one step draws."""
        return 1

    @property
    def member_count(self) -> int:
        """Number K of members whose mean is evaluated; 0 for a single chain."""
        return 0

    def limits(self) -> tuple[LimitingCase, ...]:
        """Settings at which this method equals another one; other settings as they are here.

        Returns
        -------
        tuple of LimitingCase
            At least one for a method with parameters.
        """
        return ()

    def continues(self, old: object) -> bool:
        """Tell whether a phase of this method keeps the state of a phase of `old`.

        Parameters
        ----------
        old : Algorithm or Nonlinear
            The method of the phase before.

        Returns
        -------
        bool
            True if members or buffers are kept.
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
        """Compute the direction of a step, and the new buffers.

        Parameters
        ----------
        buffers : tuple
            As many entries as `buffers`.
        g : Value
            Minibatch gradient at the current weights.

        Returns
        -------
        direction : Value
            Multiplied by the learning rate and subtracted from the weights.
        buffers : tuple
            Buffers after the step.
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
        """Buffers at the start.

        Returns
        -------
        tuple of float
            Zeros, as many as `buffers`.
        """
        return (0.0,) * len(self.buffers)


class Around(Algorithm):
    """A method around an inner one: members that it does not define are those of the inner method.

    Attributes
    ----------
    inner : Algorithm
        The inner method.
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
    def independent_noise(self) -> bool:
        return self.inner.independent_noise

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
    """Check that a value lies in [0, 1), or in [0, 1] if `closed_high`.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : float
        The value that the user gave.
    closed_high : bool
        Whether 1 is allowed.

    Raises
    ------
    NQMError
        If it does not.
    """
    check_number(where, value, low=0.0, high=1.0, closed_high=closed_high)


def check_algorithm(where: str, value: object, kind: Any = Algorithm) -> None:
    """Check that a value is an algorithm of a given kind.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : object
        The value that the user gave.
    kind : type
        `Algorithm`, or a subclass.

    Raises
    ------
    NQMError
        If it is not.
    """
    if not isinstance(value, kind):
        raise NQMError(f"{where} must be an {kind.__name__}; got {type(value).__name__}")


def check_members(where: str, value: int) -> None:
    """Check a number of members, each of which is a named coordinate.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : int
        The value that the user gave.

    Raises
    ------
    NQMError
        If it is not an integer from 1 to `nqm.limits.MEMBERS`.
    """
    check_integer(where, value, 1)
    if value > MEMBERS:
        raise NQMError(f"{where} must be at most {MEMBERS}, as each has a name; got {value}")


def average(values: tuple[Value, ...]) -> Value:
    """Compute the mean of the members.

    Parameters
    ----------
    values : tuple of Value
        Weights of each member, at least one.

    Returns
    -------
    Value
        Their unweighted mean.
    """
    return sum(values[1:], start=values[0]) * (1.0 / len(values))

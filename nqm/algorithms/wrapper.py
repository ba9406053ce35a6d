"""Base of averages: an inner algorithm, and coordinates that follow its weights."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from nqm.algorithms.base import (
    Algorithm,
    Around,
    Draw,
    Gradient,
    Mode,
    Rate,
    State,
    Value,
    average,
    check_algorithm,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError


@dataclass(frozen=True)
class Wrapper(Around):
    """Inner state, then the `kept` coordinates of each chain: each member, or the single chain.

    Parameters
    ----------
    inner : Algorithm
        Method whose weights are followed; not itself an average over all its past.
    """

    inner: Algorithm = dataclasses.field(default_factory=SGD)

    def __post_init__(self) -> None:
        check_algorithm(f"{type(self).__name__}.inner", self.inner)
        if self.inner.time.weights_never_repeat or self.inner.time.update_never_repeats:
            raise NQMError(
                f"{type(self).__name__}.inner must not average snapshots itself, as "
                f"{type(self.inner).__name__} does: its mean would change with every snapshot taken"
            )

    @property
    @abstractmethod
    def kept(self) -> tuple[str, ...]:
        """Names of the coordinates that are added for one chain."""

    @abstractmethod
    def begin(self, x: Value) -> State:
        """Compute the kept coordinates at the start.

        Parameters
        ----------
        x : Value
            The chain's weights.

        Returns
        -------
        tuple
            As many entries as `kept`.
        """

    @abstractmethod
    def keep(self, kept: State, x: Value, t: int) -> State:
        """Compute the kept coordinates after step t.

        Parameters
        ----------
        kept : tuple
            The kept coordinates before the step.
        x : Value
            The chain's weights after step t.
        t : int
            Step number, 0-based.

        Returns
        -------
        tuple
            As many entries as `kept`.
        """

    @abstractmethod
    def read(self, kept: State, x: Value, t: int) -> Value:
        """Compute the weights of one chain that are evaluated after t steps.

        Parameters
        ----------
        kept : tuple
            The kept coordinates.
        x : Value
            The chain's own weights.
        t : int
            Steps done.

        Returns
        -------
        Value
            Displacement from the minimum.
        """

    @property
    def coordinates(self) -> tuple[str, ...]:
        k = self.member_count
        labels = [f"{i + 1}/{k}" for i in range(k)] or [""]
        return (*self.inner.coordinates, *(name + label for label in labels for name in self.kept))

    def _chains(self, inner: State, t: int) -> tuple[Value, ...]:
        """Weights of each chain: each member, or the single chain."""
        return self.inner.member_weights(inner, t) or (self.inner.weights(inner, t),)

    def _split(self, state: State) -> tuple[State, list[State]]:
        """Split into the inner method's coordinates and the kept ones of each chain."""
        first, size = len(self.inner.coordinates), len(self.kept)
        starts = range(first, len(state), size)
        return state[:first], [state[i : i + size] for i in starts]

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        inner, kept = self._split(state)
        inner = self.inner.update(inner, gradient, lr, t)
        chains = self._chains(inner, t + 1)
        new = (self.keep(a, x, t) for a, x in zip(kept, chains, strict=True))
        return (*inner, *chain.from_iterable(new))

    def _averages(self, state: State, t: int) -> tuple[Value, ...]:
        """Evaluated weights of each chain."""
        inner, kept = self._split(state)
        chains = self._chains(inner, t)
        return tuple(self.read(a, x, t) for a, x in zip(kept, chains, strict=True))

    def weights(self, state: State, t: int) -> Value:
        return average(self._averages(state, t))

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return self._averages(state, t) if self.member_count else ()

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        # An average starts from its own member, not from the mean of the members.
        inner = self.inner.resume(known, draw, normal)
        begun = (self.begin(x) for x in self._chains(inner, 0))
        fresh = (*inner, *chain.from_iterable(begun))
        return tuple(known.get(n, x) for n, x in zip(self.coordinates, fresh, strict=True))

    def modes(self) -> tuple[Mode, ...]:
        # By linearity the average of the mean model is the mean of the members' averages.
        return tuple(
            dataclasses.replace(mode, algorithm=dataclasses.replace(self, inner=mode.algorithm))
            for mode in self.inner.modes()
        )

"""A wrapper runs an inner algorithm and keeps something beside it."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

from nqm.algorithms.base import (
    Algorithm,
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
from nqm.problems.quadratic import FloatArray, Problem


@dataclass(frozen=True)
class Wrapper(Algorithm):
    """State = inner state, then what is kept; members of the inner algorithm are wrapped each."""

    inner: Algorithm = dataclasses.field(default_factory=SGD)

    def __post_init__(self) -> None:
        check_algorithm(f"{type(self).__name__}.inner", self.inner)
        if self.inner.counts_steps or self.inner.ages:
            raise NQMError(
                f"{type(self).__name__}.inner must not average snapshots itself, as "
                f"{type(self.inner).__name__} does: its mean would change with every snapshot taken"
            )

    @property
    @abstractmethod
    def kept(self) -> tuple[str, ...]:
        """Names of the coordinates kept for one chain."""

    @abstractmethod
    def begin(self, x: Value) -> State:
        """What is kept at the start, from a chain's weights x."""

    @abstractmethod
    def keep(self, kept: State, x: Value, t: int) -> State:
        """What is kept after step t, which led the chain to weights x."""

    @abstractmethod
    def read(self, kept: State, x: Value, t: int) -> Value:
        """Evaluated weights once t steps are done, x being the chain's own."""

    @property
    def member_count(self) -> int:
        return self.inner.member_count

    @property
    def coordinates(self) -> tuple[str, ...]:
        k = self.member_count
        labels = [f"{i + 1}/{k}" for i in range(k)] or [""]
        return (*self.inner.coordinates, *(name + label for label in labels for name in self.kept))

    @property
    def period(self) -> int:
        return self.inner.period

    @property
    def beats(self) -> tuple[int, ...] | None:
        return self.inner.beats

    @property
    def rate_count(self) -> int:
        return self.inner.rate_count

    @property
    def constants(self) -> tuple[str, ...]:
        return self.inner.constants

    @property
    def at_origin(self) -> tuple[str, ...]:
        return self.inner.at_origin

    def check(self, problem: Problem) -> None:
        self.inner.check(problem)

    def replicated(self, problem: Problem) -> FloatArray | None:
        return self.inner.replicated(problem)

    def _chains(self, inner: State, t: int) -> tuple[Value, ...]:
        return self.inner.member_weights(inner, t) or (self.inner.weights(inner, t),)

    def _split(self, state: State) -> tuple[State, list[State]]:
        first, size = len(self.inner.coordinates), len(self.kept)
        starts = range(first, len(state), size)
        return state[:first], [state[i : i + size] for i in starts]

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        inner, kept = self._split(state)
        inner = self.inner.update(inner, gradient, lr, t)
        chains = self._chains(inner, t + 1)
        new = (self.keep(a, x, t) for a, x in zip(kept, chains, strict=True))
        return (*inner, *chain.from_iterable(new))

    def _reads(self, state: State, t: int) -> tuple[Value, ...]:
        inner, kept = self._split(state)
        chains = self._chains(inner, t)
        return tuple(self.read(a, x, t) for a, x in zip(kept, chains, strict=True))

    def weights(self, state: State, t: int) -> Value:
        return average(self._reads(state, t))

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return self._reads(state, t) if self.member_count else ()

    def embed(self, draw: Callable[[], Value], normal: Callable[[], Value]) -> State:
        return self.resume({}, draw, normal)

    def resume(
        self,
        known: Mapping[str, Value],
        draw: Callable[[], Value],
        normal: Callable[[], Value],
    ) -> State:
        # What is kept begins from each running member, not from their mean.
        inner = self.inner.resume(known, draw, normal)
        begun = (self.begin(x) for x in self._chains(inner, 0))
        fresh = (*inner, *chain.from_iterable(begun))
        return tuple(known.get(n, x) for n, x in zip(self.coordinates, fresh, strict=True))

    def modes(self) -> tuple[Mode, ...]:
        # Linearity: the wrapped mean is the mean of the wrapped members.
        return tuple(
            dataclasses.replace(mode, algorithm=dataclasses.replace(self, inner=mode.algorithm))
            for mode in self.inner.modes()
        )

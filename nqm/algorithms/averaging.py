"""Averages of the iterates of one run: EMA, SWA (Polyak-Ruppert), LAWA, polynomial decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nqm.algorithms.base import State, Value, check_fraction, check_members, ends
from nqm.algorithms.wrapper import Wrapper
from nqm.errors import check_integer, check_number


@dataclass(frozen=True)
class EMA(Wrapper):
    """a' = beta a + (1 - beta) x', a starting at x; a is evaluated (Polyak averaging, EMA)."""

    beta: float = 0.99
    kept = ("ema",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("EMA.beta", self.beta)

    def begin(self, x: Value) -> State:
        return (x,)

    def keep(self, kept: State, x: Value, t: int) -> State:
        return (self.beta * kept[0] + (1.0 - self.beta) * x,)

    def read(self, kept: State, x: Value, t: int) -> Value:
        return kept[0]


@dataclass(frozen=True)
class _Snapshots(Wrapper):
    """Shared by averages of snapshots taken after every `every`-th step."""

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(f"{type(self).__name__}.every", self.every, 1)

    @property
    def period(self) -> int:
        return math.lcm(self.inner.period, self.every)

    @property
    def beats(self) -> tuple[int, ...] | None:
        return None if self.inner.beats is None else (*self.inner.beats, self.every)

    @property
    def counts_steps(self) -> bool:
        return True

    def due(self, t: int) -> bool:
        """Whether step t ends with a snapshot."""
        return ends(t, self.every)


@dataclass(frozen=True)
class SWA(_Snapshots):
    """Uniform mean of a snapshot every `every` steps (Izmailov et al. 2018); 1 is Polyak-Ruppert.

    A running sum is kept and divided only when read: the transition stays constant and the
    textbook formula's cancellation at small lr h N never arises. Before the first snapshot the
    current weights are evaluated.
    """

    @property
    def kept(self) -> tuple[str, ...]:
        return (f"snapshot_sum every {self.every}",)

    def begin(self, x: Value) -> State:
        return (0.0,)

    def keep(self, kept: State, x: Value, t: int) -> State:
        return (kept[0] + x,) if self.due(t) else kept

    def read(self, kept: State, x: Value, t: int) -> Value:
        taken = t // self.every
        return kept[0] * (1.0 / taken) if taken else x


@dataclass(frozen=True)
class LAWA(_Snapshots):
    """Mean of the latest `window` snapshots, one every `every` steps (Kaddour 2022).

    Until the window is full the snapshots taken so far are averaged.
    """

    window: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_members("LAWA.window", self.window)

    @property
    def kept(self) -> tuple[str, ...]:
        names = (f"snapshot{i + 1}/{self.window}" for i in range(self.window))
        return tuple(f"{name} every {self.every}" for name in names)

    def begin(self, x: Value) -> State:
        return (0.0,) * self.window

    def keep(self, kept: State, x: Value, t: int) -> State:
        return (x, *kept[:-1]) if self.due(t) else kept

    def read(self, kept: State, x: Value, t: int) -> Value:
        taken = min(t // self.every, self.window)
        return sum(kept[1:taken], start=kept[0]) * (1.0 / taken) if taken else x


@dataclass(frozen=True)
class PolynomialAverage(Wrapper):
    """a_t = a_(t-1) + (eta + 1) / (t + eta) (x_t - a_(t-1)): late iterates count more.

    Shamir & Zhang 2013, "Polynomial-decay averaging". eta 0 is the uniform (Polyak-Ruppert) mean
    of all iterates, and eta -> infinity the last one. Stepped one by one: no two steps are alike.
    """

    eta: float = 3.0
    kept = ("polynomial average",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("PolynomialAverage.eta", self.eta, low=0.0)

    @property
    def ages(self) -> bool:
        return True

    def begin(self, x: Value) -> State:
        return (x,)

    def keep(self, kept: State, x: Value, t: int) -> State:
        share = (self.eta + 1.0) / (t + 1.0 + self.eta)
        return ((1.0 - share) * kept[0] + share * x,)

    def read(self, kept: State, x: Value, t: int) -> Value:
        return kept[0]

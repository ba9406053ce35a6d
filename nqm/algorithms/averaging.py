"""Averages of the iterates of one run: EMA, SWA (Polyak-Ruppert), LAWA, polynomial decay.

An average is stable if its inner method is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nqm.algorithms.base import LimitingCase, State, Value, check_fraction, check_members
from nqm.algorithms.time_dependence import TimeDependence, is_last_of_period
from nqm.algorithms.wrapper import Wrapper
from nqm.errors import check_integer, check_number


@dataclass(frozen=True)
class EMA(Wrapper):
    """a' = decay a + (1 - decay) x', a starting at x; a is evaluated (Polyak averaging, EMA).

    Parameters
    ----------
    inner : Algorithm
        Method that makes the iterates x; each member has an average of its own.
    decay : float
        Share of the average that a step keeps, in [0, 1).
    """

    decay: float = 0.99
    kept = ("ema",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("EMA.decay", self.decay)

    def begin(self, x: Value) -> State:
        return (x,)

    def keep(self, kept: State, x: Value, t: int) -> State:
        return (self.decay * kept[0] + (1.0 - self.decay) * x,)

    def read(self, kept: State, x: Value, t: int) -> Value:
        return kept[0]

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("decay = 0", replace(self, decay=0.0), self.inner),)


@dataclass(frozen=True)
class _Snapshots(Wrapper):
    """Base of averages of snapshots, which are taken after every `every`-th step."""

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(f"{type(self).__name__}.every", self.every, 1)

    @property
    def time(self) -> TimeDependence:
        return replace(self.inner.time.with_period(self.every), weights_never_repeat=True)

    def takes_snapshot(self, t: int) -> bool:
        """Tell whether a snapshot is taken after step t."""
        return is_last_of_period(t, self.every)


@dataclass(frozen=True)
class SWA(_Snapshots):
    """Uniform mean of a snapshot every `every` steps (Izmailov et al. 2018); 1 is Polyak-Ruppert.

    The state is a running sum, divided only when it is evaluated: the transition is constant, and
    there is none of the cancellation of the textbook formula at small lr h N. Before the first
    snapshot the current weights are evaluated.

    Parameters
    ----------
    inner : Algorithm
        Method that makes the iterates; each member has an average of its own.
    every : int
        Steps between snapshots, >= 1.
    """

    @property
    def kept(self) -> tuple[str, ...]:
        return (f"snapshot_sum every {self.every}",)

    def begin(self, x: Value) -> State:
        return (0.0,)

    def keep(self, kept: State, x: Value, t: int) -> State:
        return (kept[0] + x,) if self.takes_snapshot(t) else kept

    def read(self, kept: State, x: Value, t: int) -> Value:
        snapshots = t // self.every
        return kept[0] * (1.0 / snapshots) if snapshots else x

    def limits(self) -> tuple[LimitingCase, ...]:
        late = replace(self, every=1000)
        return (LimitingCase("before the first snapshot", late, self.inner, until=999),)


@dataclass(frozen=True)
class LAWA(_Snapshots):
    """Mean of the latest `window` snapshots, one every `every` steps (Kaddour 2022).

    Until the window is full, the snapshots taken so far are averaged.

    Parameters
    ----------
    inner : Algorithm
        Method that makes the iterates; each member has an average of its own.
    every : int
        Steps between snapshots, >= 1.
    window : int
        Number of snapshots that are averaged, >= 1.
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
        return (x, *kept[:-1]) if self.takes_snapshot(t) else kept

    def read(self, kept: State, x: Value, t: int) -> Value:
        snapshots = min(t // self.every, self.window)
        return sum(kept[1:snapshots], start=kept[0]) * (1.0 / snapshots) if snapshots else x

    def limits(self) -> tuple[LimitingCase, ...]:
        full = (self.window + 1) * self.every
        return (
            LimitingCase("window = 1, every = 1", replace(self, every=1, window=1), self.inner),
            LimitingCase(
                "until the window is full", self, SWA(self.inner, self.every), until=full - 1
            ),
        )


@dataclass(frozen=True)
class PolynomialAverage(Wrapper):
    """a_t = a_(t-1) + (eta + 1) / (t + eta) (x_t - a_(t-1)): late iterates have more weight.

    Shamir & Zhang 2013, "Polynomial-decay averaging". eta = 0 is the uniform (Polyak-Ruppert) mean
    of all iterates, and eta -> infinity the last one. No two steps are equal, so solvers take each
    of them.

    Parameters
    ----------
    inner : Algorithm
        Method that makes the iterates x; each member has an average of its own.
    eta : float
        Exponent of the weights of iterates, >= 0.
    """

    eta: float = 3.0
    kept = ("polynomial average",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("PolynomialAverage.eta", self.eta, low=0.0)

    @property
    def time(self) -> TimeDependence:
        return replace(self.inner.time, update_never_repeats=True)

    def begin(self, x: Value) -> State:
        return (x,)

    def keep(self, kept: State, x: Value, t: int) -> State:
        share = (self.eta + 1.0) / (t + 1.0 + self.eta)
        return ((1.0 - share) * kept[0] + share * x,)

    def read(self, kept: State, x: Value, t: int) -> Value:
        return kept[0]

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("eta = 0", replace(self, eta=0.0), SWA(self.inner)),)

"""Gradient noise that is correlated in time, for any linear method."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nqm.algorithms.base import (
    Algorithm,
    Around,
    Draw,
    Gradient,
    LimitingCase,
    Mode,
    Rate,
    State,
    Value,
    check_algorithm,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import check_number


@dataclass(frozen=True)
class CorrelatedNoise(Around):
    """e' = correlation e + sqrt(1 - correlation^2) fresh noise, in place of fresh gradient noise.

    A first-order autoregression: noises that are s steps apart have the correlation
    correlation^s, and each has the variance v / B of fresh noise once it has forgotten the start,
    where e = 0 (after t steps it has 1 - correlation^(2 t) of it). Each minibatch of a step has a
    noise of its own, which is a further coordinate. Batches that share examples with the last
    ones, or come from a slowly changing source, have a positive correlation; drawing without
    replacement makes a weak negative one (`shuffled_steady` is exact for it).

    SGD's steady state is multiplied by (1 + r c) / (1 - r c), with r = 1 - lr h and c the
    correlation.

    Parameters
    ----------
    inner : Algorithm
        Method that is driven by this noise.
    correlation : float
        Of the noises of two steps in sequence, in (-1, 1).
    """

    inner: Algorithm = field(default_factory=SGD)
    correlation: float = 0.5

    def __post_init__(self) -> None:
        check_algorithm("CorrelatedNoise.inner", self.inner)
        check_number(
            "CorrelatedNoise.correlation",
            self.correlation,
            low=-1.0,
            high=1.0,
            closed_low=False,
            closed_high=False,
        )

    @property
    def coordinates(self) -> tuple[str, ...]:
        count = len(self._sizes)
        return (*self.inner.coordinates, *(f"noise {i + 1}/{count}" for i in range(count)))

    @property
    def independent_noise(self) -> bool:
        return self.correlation == 0.0

    @property
    def _sizes(self) -> tuple[float, ...]:
        return _minibatch_sizes(self.inner)

    def _inner(self, state: State) -> State:
        return state[: len(self.inner.coordinates)]

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        moving, old = self._inner(state), state[len(self.inner.coordinates) :]
        zero, scale = 0.0 * state[0], math.sqrt(1.0 - self.correlation**2)
        fresh = [gradient(zero, i, size) for i, size in enumerate(self._sizes)]
        noise = [self.correlation * e + scale * f for e, f in zip(old, fresh, strict=True)]
        driven = _Driven(gradient, fresh, noise)
        return (*self.inner.update(moving, driven, lr, t), *noise)

    def weights(self, state: State, t: int) -> Value:
        return self.inner.weights(self._inner(state), t)

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return self.inner.member_weights(self._inner(state), t)

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        begun = self.inner.resume(known, draw, normal)
        names = self.coordinates[len(begun) :]
        return (*begun, *(known.get(name, 0.0) for name in names))

    def modes(self) -> tuple[Mode, ...]:
        modes = self.inner.modes()
        if len(modes) == 1:
            return (Mode("mean", self, 1.0),)
        # The mean of the members' noises is such a noise itself, and so are deviations from it.
        return tuple(
            replace(mode, algorithm=_NoiseMode(mode.algorithm, self.correlation, mode.name))
            for mode in modes
        )

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("correlation = 0", replace(self, correlation=0.0), self.inner),)


@dataclass(frozen=True)
class _NoiseMode(CorrelatedNoise):
    """The noise of a mean model or a deviation, under a name of its own."""

    mode: str = ""

    @property
    def coordinates(self) -> tuple[str, ...]:
        return tuple(f"{name} {self.mode}" for name in super().coordinates)


class _Driven:
    """Gradient with given noise in place of that of its minibatches."""

    def __init__(self, gradient: Gradient, fresh: list[Value], noise: list[Value]):
        self.gradient, self.fresh, self.noise = gradient, fresh, noise
        self.drawn = _Numbers()

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        """Compute the gradient at x; see `Gradient`."""
        i = self.drawn.number(batch)
        # The gradient of the same minibatch less its noise is the exact one.
        return self.gradient(x, i, size) - self.fresh[i] + self.noise[i]

    def normal(self) -> Value:
        """Return a fresh standard normal."""
        return self.gradient.normal()


class _Numbers:
    """Minibatches of one step, numbered in the order in which they are first used."""

    def __init__(self) -> None:
        self.count = 0
        self.named: dict[int, int] = {}

    def number(self, batch: int | None) -> int:
        if batch is not None and batch in self.named:
            return self.named[batch]
        number, self.count = self.count, self.count + 1
        if batch is not None:
            self.named[batch] = number
        return number


class _Sizes:
    """Gradient that notes the size of each minibatch, and returns 0."""

    def __init__(self) -> None:
        self.drawn = _Numbers()
        self.sizes: list[float] = []

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        if self.drawn.number(batch) == len(self.sizes):
            self.sizes.append(size)
        return 0.0

    def normal(self) -> Value:
        return 0.0


@functools.lru_cache(maxsize=256)
def _minibatch_sizes(algorithm: Algorithm) -> tuple[float, ...]:
    """Sizes of the minibatches of one step, in batch sizes."""
    seen = _Sizes()
    rates: Rate = 0.0 if algorithm.rate_count == 1 else (0.0, 0.0)
    algorithm.update((0.0,) * len(algorithm.coordinates), seen, rates, 0)
    return tuple(seen.sizes)

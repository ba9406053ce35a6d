"""A pull towards the origin of weight space, or towards where the phase started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from nqm.algorithms.base import (
    Algorithm,
    Gradient,
    Mode,
    Optimizer,
    Rate,
    State,
    Value,
    check_algorithm,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError, check_number
from nqm.problems.quadratic import FloatArray, Problem

Draw = Callable[[], Value]


@dataclass(frozen=True)
class WeightDecay(Algorithm):
    """L2 penalty ``decay/2 |w - anchor|^2`` on any method, or the decoupled decay of AdamW.

    Coupled: every gradient is g + decay (w - anchor), as ``weight_decay`` of ``torch.optim.SGD``.
    Decoupled (Loshchilov & Hutter 2019): an optimizer's step, then w <- w - lr decay (w_old -
    anchor), which differs only with momentum. The weights settle at
    w* + (anchor - w*) decay / (h + decay); the reported loss is the problem's, without the penalty.

    Parameters
    ----------
    inner : Algorithm
        Of members, every w_k is pulled. An `Optimizer` if decoupled.
    decay : float
        >= 0.
    toward : {"origin", "start"}
        w = 0, which ``problem.minimum`` places, or the weights the phase starts with (L2-SP, Li et
        al. 2018).
    decoupled : bool
    """

    inner: Algorithm = field(default_factory=SGD)
    decay: float = 1e-2
    toward: str = "origin"
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_algorithm("WeightDecay.inner", self.inner)
        if self.inner.counts_steps or self.inner.ages:
            name = type(self.inner).__name__
            raise NQMError(
                f"WeightDecay.inner must not be an average; put it inside {name} instead"
            )
        check_number("WeightDecay.decay", self.decay, low=0.0)
        if self.toward not in ("origin", "start"):
            raise NQMError(f"WeightDecay.toward must be 'origin' or 'start'; got {self.toward!r}")
        if self.decoupled:
            check_algorithm("WeightDecay.inner of a decoupled decay", self.inner, Optimizer)

    @property
    def rate_count(self) -> int:
        return self.inner.rate_count

    @property
    def period(self) -> int:
        return self.inner.period

    @property
    def beats(self) -> tuple[int, ...] | None:
        return self.inner.beats

    @property
    def member_count(self) -> int:
        return self.inner.member_count

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (*self.inner.coordinates, f"anchor at {self.toward}")

    @property
    def constants(self) -> tuple[str, ...]:
        return (*self.inner.constants, f"anchor at {self.toward}")

    @property
    def at_origin(self) -> tuple[str, ...]:
        here = (f"anchor at {self.toward}",) if self.toward == "origin" else ()
        return (*self.inner.at_origin, *here)

    def check(self, problem: Problem) -> None:
        self.inner.check(problem)

    def replicated(self, problem: Problem) -> FloatArray | None:
        return self.inner.replicated(problem)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        *moving, anchor = state
        if not self.decoupled:
            pulled = _Penalised(gradient, self.decay, anchor)
            return (*self.inner.update(tuple(moving), pulled, lr, t), anchor)
        x, *buffers = self.inner.update(tuple(moving), gradient, lr, t)
        return (x - lr * self.decay * (moving[0] - anchor), *buffers, anchor)

    def weights(self, state: State, t: int) -> Value:
        return self.inner.weights(state[:-1], t)

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return self.inner.member_weights(state[:-1], t)

    def embed(self, draw: Draw, normal: Draw) -> State:
        return self.resume({}, draw, normal)

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        inner = self.inner.resume(known, draw, normal)
        start = self.inner.weights(inner, 0) if self.toward == "start" else 0.0
        return (*inner, known.get(self.coordinates[-1], start))

    def modes(self) -> tuple[Mode, ...]:
        mean, *deviations = self.inner.modes()
        return (
            Mode(mean.name, replace(self, inner=mean.algorithm), mean.noise_share),
            *(
                Mode(mode.name, _DecayedDeviation(mode.algorithm, self.decay), mode.noise_share)
                for mode in deviations
            ),
        )


@dataclass(frozen=True)
class _DecayedDeviation(Algorithm):
    """A member's deviation from the mean is pulled to 0: all members share the anchor."""

    inner: Algorithm
    decay: float

    @property
    def rate_count(self) -> int:
        return self.inner.rate_count

    @property
    def period(self) -> int:
        return self.inner.period

    @property
    def beats(self) -> tuple[int, ...] | None:
        return self.inner.beats

    @property
    def coordinates(self) -> tuple[str, ...]:
        return self.inner.coordinates

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        return self.inner.update(state, _Penalised(gradient, self.decay, 0.0), lr, t)

    def weights(self, state: State, t: int) -> Value:
        return self.inner.weights(state, t)

    def embed(self, draw: Draw, normal: Draw) -> State:
        return self.inner.embed(draw, normal)

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        return self.inner.resume(known, draw, normal)


@dataclass(frozen=True)
class _Penalised:
    """Gradient of the loss and the penalty."""

    gradient: Gradient
    decay: float
    anchor: Value

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        return self.gradient(x, batch, size) + self.decay * (x - self.anchor)

    def normal(self) -> Value:
        return self.gradient.normal()

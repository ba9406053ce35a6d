"""Weight decay towards the origin of weight space, or towards the start of the phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nqm.algorithms.base import (
    Algorithm,
    Around,
    Draw,
    Gradient,
    LimitingCase,
    Mode,
    Optimizer,
    Rate,
    State,
    Value,
    check_algorithm,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError, check_number
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class WeightDecay(Around):
    """L2 penalty ``decay/2 |w - anchor|^2`` on any method, or the decoupled decay of AdamW.

    Coupled: every gradient is g + decay (w - anchor), as ``weight_decay`` of ``torch.optim.SGD``.
    Decoupled (Loshchilov & Hutter 2019): an optimizer's step, then w <- w - lr decay (w_old -
    anchor), which differs only with momentum. The weights settle at
    w* + (anchor - w*) decay / (h + decay); the reported loss is the problem's, without the penalty.

    Parameters
    ----------
    inner : Algorithm
        Method to which decay is added, for every member w_k; an `Optimizer` if decoupled.
    decay : float
        Coefficient of the penalty, >= 0.
    toward : {"origin", "start"}
        Anchor: w = 0, which lies at -``problem.minimum`` from the minimum, or the weights at the
        start of the phase (L2-SP, Li et al. 2018).
    decoupled : bool
        Whether the decay is applied after the optimizer's step, as in AdamW.
    """

    inner: Algorithm = field(default_factory=SGD)
    decay: float = 1e-2
    toward: str = "origin"
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_algorithm("WeightDecay.inner", self.inner)
        if self.inner.time.weights_never_repeat or self.inner.time.update_never_repeats:
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
    def coordinates(self) -> tuple[str, ...]:
        return (*self.inner.coordinates, f"anchor at {self.toward}")

    @property
    def constants(self) -> Mapping[str, str]:
        return {**self.inner.constants, f"anchor at {self.toward}": self.toward}

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

    def limits(self) -> tuple[LimitingCase, ...]:
        decoupled = WeightDecay(SGD(), self.decay, self.toward, True)
        return (
            LimitingCase("decay = 0", replace(self, decay=0.0), self.inner),
            LimitingCase(
                "decoupled, inner = SGD()", decoupled, replace(decoupled, decoupled=False)
            ),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        if not self.decoupled:  # the penalty's curvature is decay
            return self.inner.stability_edge(curvature + self.decay, member_lr_ratio)
        edge = self.inner.stability_edge(curvature)
        # At the eigenvalue -1 of an optimizer 2 = lr (2 / edge + decay).
        return None if edge is None else 1.0 / (1.0 / edge + self.decay / 2.0)


@dataclass(frozen=True)
class _DecayedDeviation(Around):
    """A member's deviation from the mean decays to 0, because all members share the anchor."""

    inner: Algorithm
    decay: float

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        return self.inner.update(state, _Penalised(gradient, self.decay, 0.0), lr, t)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return self.inner.stability_edge(curvature + self.decay, member_lr_ratio)


@dataclass(frozen=True)
class _Penalised:
    """Gradient of the loss plus the penalty."""

    gradient: Gradient
    decay: float
    anchor: Value

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        return self.gradient(x, batch, size) + self.decay * (x - self.anchor)

    def normal(self) -> Value:
        return self.gradient.normal()

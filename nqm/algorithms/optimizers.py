"""SGD, heavy ball and Nesterov momentum, with PyTorch's conventions."""

from __future__ import annotations

from dataclasses import dataclass

from nqm.algorithms.base import Optimizer, State, Value, check_fraction


@dataclass(frozen=True)
class SGD(Optimizer):
    """x' = x - lr g (Robbins & Monro 1951)."""

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        return g, ()


@dataclass(frozen=True)
class HeavyBall(Optimizer):
    """b' = momentum b + g;  x' = x - lr b' (Polyak 1964, as in ``torch.optim.SGD``)."""

    momentum: float = 0.9
    buffers = ("b",)

    def __post_init__(self) -> None:
        check_fraction("HeavyBall.momentum", self.momentum)

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        b = self.momentum * buffers[0] + g
        return b, (b,)


@dataclass(frozen=True)
class Nesterov(Optimizer):
    """b' = momentum b + g;  x' = x - lr (g + momentum b') (``torch.optim.SGD(nesterov=True)``).

    The stored x is the shifted point at which the gradient is taken, as in PyTorch.
    """

    momentum: float = 0.9
    buffers = ("b",)

    def __post_init__(self) -> None:
        check_fraction("Nesterov.momentum", self.momentum)

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        b = self.momentum * buffers[0] + g
        return g + self.momentum * b, (b,)

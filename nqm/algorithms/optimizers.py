"""SGD, heavy ball, Nesterov and quasi-hyperbolic momentum, with PyTorch's conventions.

At each stability edge the transition has the eigenvalue -1: a step takes x to -x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nqm.algorithms.base import LimitingCase, Optimizer, Rate, State, Value, check_fraction
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class SGD(Optimizer):
    """x' = x - lr g (Robbins & Monro 1951)."""

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        return g, ()

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return 2.0 / curvature


@dataclass(frozen=True)
class HeavyBall(Optimizer):
    """b' = momentum b + g;  x' = x - lr b' (Polyak 1964, as in ``torch.optim.SGD``).

    Parameters
    ----------
    momentum : float
        Share of the buffer that a step keeps, in [0, 1).
    """

    momentum: float = 0.9
    buffers = ("b",)

    def __post_init__(self) -> None:
        check_fraction("HeavyBall.momentum", self.momentum)

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        b = self.momentum * buffers[0] + g
        return b, (b,)

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("momentum = 0", replace(self, momentum=0.0), SGD()),)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return 2.0 * (1.0 + self.momentum) / curvature


@dataclass(frozen=True)
class Nesterov(Optimizer):
    """b' = momentum b + g;  x' = x - lr (g + momentum b') (``torch.optim.SGD(nesterov=True)``).

    The stored x is the shifted point at which the gradient is taken, as in PyTorch.

    Parameters
    ----------
    momentum : float
        Share of the buffer that a step keeps, in [0, 1).
    """

    momentum: float = 0.9
    buffers = ("b",)

    def __post_init__(self) -> None:
        check_fraction("Nesterov.momentum", self.momentum)

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        b = self.momentum * buffers[0] + g
        return g + self.momentum * b, (b,)

    def limits(self) -> tuple[LimitingCase, ...]:
        return (LimitingCase("momentum = 0", replace(self, momentum=0.0), SGD()),)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return 2.0 * (1.0 + self.momentum) / ((1.0 + 2.0 * self.momentum) * curvature)


@dataclass(frozen=True)
class QuasiHyperbolicMomentum(Optimizer):
    """m' = momentum m + (1 - momentum) g;  x' = x - lr ((1 - nu) g + nu m') (Ma & Yarats 2019).

    "Quasi-hyperbolic momentum and Adam for deep learning". A step is 1 - nu times a step of SGD
    plus nu times a step of momentum whose buffer is a mean of gradients (PyTorch's dampening).

    Parameters
    ----------
    momentum : float
        Share of the buffer that a step keeps, in [0, 1); the paper's beta.
    nu : float
        Weight of the mean gradient, in [0, 1].
    """

    momentum: float = 0.999
    nu: float = 0.7
    buffers = ("mean gradient",)

    def __post_init__(self) -> None:
        check_fraction("QuasiHyperbolicMomentum.momentum", self.momentum)
        check_fraction("QuasiHyperbolicMomentum.nu", self.nu, closed_high=True)

    def direction(self, buffers: State, g: Value) -> tuple[Value, State]:
        m = self.momentum * buffers[0] + (1.0 - self.momentum) * g
        return (1.0 - self.nu) * g + self.nu * m, (m,)

    def limits(self) -> tuple[LimitingCase, ...]:
        def undamped(rates: Rate) -> Rate:
            return rates * (1.0 - self.momentum)

        momentum = self.momentum
        return (
            LimitingCase("nu = 0", replace(self, nu=0.0), SGD()),
            LimitingCase("momentum = 0", replace(self, momentum=0.0), SGD()),
            LimitingCase(
                "nu = 1", replace(self, nu=1.0), HeavyBall(momentum), equal_rates=undamped
            ),
            LimitingCase(
                "nu = momentum",
                replace(self, nu=momentum),
                Nesterov(momentum),
                equal_rates=undamped,
            ),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        # Gitman et al. 2019, "Understanding the role of momentum in stochastic gradient methods".
        return (
            2.0
            * (1.0 + self.momentum)
            / ((1.0 + self.momentum * (1.0 - 2.0 * self.nu)) * curvature)
        )

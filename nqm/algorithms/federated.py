"""Federated training that fights client drift: FedProx and SCAFFOLD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nqm.algorithms.base import (
    Draw,
    Gradient,
    LimitingCase,
    Rate,
    State,
    Value,
)
from nqm.algorithms.local import Federated, LocalSGD
from nqm.algorithms.lookahead import edge_with_rounds
from nqm.algorithms.optimizers import SGD
from nqm.algorithms.time_dependence import is_last_of_period
from nqm.errors import check_number
from nqm.problems.quadratic import FloatArray


@dataclass(frozen=True)
class FedProx(Federated):
    """Federated training with a pull of every client towards the server's model.

    ::

        x_k <- inner step on the gradient  g_k(x_k) + prox (x_k - server)

    Li et al. 2020, "Federated optimization in heterogeneous networks". The pull shortens the way
    that a client drifts in a round, and with it the error of the fixed point, and slows the round
    down. With one local step it does nothing: the gradient is taken at the server's model.

    With inner and outer SGD, outer_lr 1 and a = 1 - lr (c_k h + prox), a round takes client k from
    the server's x to r_k x + g_k x_k*, where r_k = a^H + (1 - a^H) prox / (c_k h + prox) and
    g_k = 1 - r_k; the fixed point is sum p_k g_k x_k* / sum p_k g_k for shares p.

    Parameters
    ----------
    prox : float
        Coefficient of the proximal term (mu of the paper), >= 0.
    """

    prox: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("FedProx.prox", self.prox, low=0.0)

    def local_gradient(self, gradient: Gradient, server: Value) -> Gradient:
        return _Corrected(gradient, lambda x: self.prox * (x - server))

    def limits(self) -> tuple[LimitingCase, ...]:
        def federated(method: FedProx) -> Federated:
            return Federated(
                method.clients, method.local_steps, method.inner, method.outer, method.outer_lr,
                method.curvatures, method.shifts, method.shares,
            )  # fmt: skip

        free, every_step = replace(self, prox=0.0), replace(self, local_steps=1)
        return (
            LimitingCase("prox = 0", free, federated(free)),
            LimitingCase("local_steps = 1", every_step, federated(every_step)),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        outer_edge = self._outer_edge()
        if outer_edge is None or not isinstance(self.inner, SGD):
            return None
        if self.local_steps == 1:
            return outer_edge / curvature
        if len(set(self.client_curvatures)) == 1:
            # A round sees the curvature (1 - a^H) h / (h + prox) with a = 1 - lr (h + prox).
            local = curvature + self.prox
            return edge_with_rounds(
                self.inner, self.local_steps, outer_edge * local / curvature, local
            )
        if self.local_steps > 2:
            return None
        # A round sees 2 u - m u^2, u = lr h, with m the mean of c_k (c_k + prox / h).
        mean_square = self.mean_of(tuple(c * c for c in self.client_curvatures))
        square = mean_square + self.prox / curvature
        below = np.maximum(1.0 - square * outer_edge, 0.0)
        edge = np.where(square * outer_edge >= 1.0, 2.0, 1.0 - np.sqrt(below))
        return edge / square / curvature


@dataclass(frozen=True)
class Scaffold(Federated):
    """Federated training with control variates: no client drift, whatever the local steps.

    ::

        x_k <- inner step on the gradient  g_k(x_k) - control_k + control
        control_k <- mean of the round's g_k           after every local_steps-th step
        control <- mean_k control_k

    Karimireddy et al. 2020, with every client taking part in every round. With inner SGD at a
    constant rate the mean of the round's gradients is option II of the paper,
    control_k - control + (server - x_k) / (local_steps lr); stated so, it needs no division by the
    rate and holds for schedules and inner momentum too. Controls begin at 0.

    The corrections sum to zero over the clients, so that clients that do not differ are plain local
    SGD. Of clients that do, the fixed point is the minimum of their mean loss.
    """

    @property
    def _controls(self) -> int:
        """Number of coordinates that hold controls, and gradients gathered in this round."""
        return 2 * self.clients

    @property
    def coordinates(self) -> tuple[str, ...]:
        *moving, origin = super().coordinates
        kept = (
            f"{name} client {k + 1}/{self.clients}"
            for name in ("control", "gathered")
            for k in range(self.clients)
        )
        return (*moving, *kept, origin)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        *moving, origin = state
        kept = tuple(moving[-self._controls :])
        controls, gathered = kept[: self.clients], kept[self.clients :]
        server, clients = self.split(tuple(moving))
        control = self.mean_of(controls)
        gradients = tuple(
            client_gradient(client[0])
            for client, client_gradient in zip(
                clients, self.client_gradients(gradient, origin), strict=True
            )
        )
        clients = tuple(
            self._corrected_step(client, g - own + control, lr)
            for client, g, own in zip(clients, gradients, controls, strict=True)
        )
        gathered = tuple(
            total + g * (1.0 / self.local_steps)
            for total, g in zip(gathered, gradients, strict=True)
        )
        if is_last_of_period(t, self.local_steps):
            controls, gathered = gathered, (0.0,) * self.clients
        return (*self.shared(server, clients, t), *controls, *gathered, origin)

    def _corrected_step(self, client: State, g: Value, lr: Rate) -> State:
        x, *buffers = client
        step, new = self.inner.direction(tuple(buffers), g)
        return (x - lr * step, *new)

    def embed(self, draw: Draw, normal: Draw) -> State:
        *moving, origin = super().embed(draw, normal)
        return (*moving, *((0.0,) * self._controls), origin)

    def limits(self) -> tuple[LimitingCase, ...]:
        def local(method: Scaffold) -> LocalSGD:
            return LocalSGD(
                method.clients, method.local_steps, method.inner, method.outer, method.outer_lr
            )

        equal = replace(self, curvatures=(), shifts=(), shares=())
        every_step = replace(self, local_steps=1)
        federated = Federated(
            self.clients,
            1,
            self.inner,
            self.outer,
            self.outer_lr,
            self.curvatures,
            self.shifts,
            self.shares,
        )
        return (
            LimitingCase("clients that do not differ", equal, local(equal), members=False),
            LimitingCase("local_steps = 1", every_step, federated),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        """Smallest constant learning rate that is not stable, in closed form where it is known.

        With inner SGD the clients' mean is local SGD's, and a control's distance from the mean is
        multiplied by 1 - (1 - r^H) / (H (1 - r)) in a round, r = 1 - lr h: stable up to lr h = 2
        at least.
        """
        edge = super().stability_edge(curvature, member_lr_ratio)
        one_step = self.local_steps == 1
        if edge is None or one_step:
            return edge
        equal = len(set(self.client_curvatures)) == 1
        known = equal and (self.clients == 1 or bool(np.all(edge * curvature <= 2.0 + 1e-12)))
        return edge if known else None


@dataclass(frozen=True)
class _Corrected:
    """Gradient of a loss with a term added to it."""

    gradient: Gradient
    added: Callable[[Value], Value]

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        return self.gradient(x, batch, size) + self.added(x)

    def normal(self) -> Value:
        return self.gradient.normal()

"""Clients that train separately and are averaged at intervals: local SGD, FedAvg, DiLoCo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from nqm.algorithms.base import (
    Algorithm,
    Draw,
    Gradient,
    LimitingCase,
    Mode,
    Optimizer,
    Rate,
    State,
    Value,
    average,
    check_algorithm,
    check_members,
)
from nqm.algorithms.lookahead import Lookahead, edge_with_rounds
from nqm.algorithms.optimizers import SGD
from nqm.algorithms.time_dependence import TimeDependence, is_last_of_period
from nqm.errors import NQMError, check_integer, check_number
from nqm.problems.quadratic import FloatArray, Problem


@dataclass(frozen=True)
class LocalSGD(Algorithm):
    """Clients take `local_steps` steps each, then a server steps to their mean (DiLoCo, FedAvg).

    ::

        x_k <- inner step on client k's minibatch       every step
        delta = server - mean_k x_k                     after every local_steps-th step
        server <- outer step at rate outer_lr with delta as its gradient;  x_k <- server

    Stich 2019 (local SGD); McMahan et al. 2017 (FedAvg: outer_lr 1, outer SGD); Douillard et al.
    2023 (DiLoCo: outer Nesterov momentum). One client with outer SGD is Lookahead. The mean of the
    clients is evaluated, which after a round is the server's model. Averaging does not change the
    clients' momentum.

    Parameters
    ----------
    clients : int
        Number M of clients, >= 1.
    local_steps : int
        Steps H of each client between averages, >= 1.
    inner, outer : Optimizer
        Optimizer of each client, and of the server.
    outer_lr : float
        Learning rate of the server, > 0.
    """

    clients: int = 8
    local_steps: int = 10
    inner: Optimizer = field(default_factory=SGD)
    outer: Optimizer = field(default_factory=SGD)
    outer_lr: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_members(f"{name}.clients", self.clients)
        check_integer(f"{name}.local_steps", self.local_steps, 1)
        check_algorithm(f"{name}.inner", self.inner, Optimizer)
        check_algorithm(f"{name}.outer", self.outer, Optimizer)
        check_number(f"{name}.outer_lr", self.outer_lr, low=0.0, closed_low=False)

    @property
    def member_count(self) -> int:
        return self.clients

    @property
    def time(self) -> TimeDependence:
        return self.inner.time.with_period(self.local_steps)

    @property
    def server(self) -> tuple[str, ...]:
        """Names of the server's coordinates."""
        return ("server", *(f"server {name}" for name in self.outer.buffers))

    @property
    def coordinates(self) -> tuple[str, ...]:
        m, names = self.clients, self.inner.coordinates
        return (*self.server, *(f"{n} client {k + 1}/{m}" for k in range(m) for n in names))

    def split(self, state: State) -> tuple[State, tuple[State, ...]]:
        """Split a state into the coordinates of the server and of each client.

        Parameters
        ----------
        state : tuple
            As many entries as `coordinates`.

        Returns
        -------
        server : tuple
            As many entries as `server`.
        clients : tuple of tuple
            Coordinates of each client.
        """
        first, size = len(self.server), len(self.inner.coordinates)
        return state[:first], tuple(
            state[first + k * size : first + (k + 1) * size] for k in range(self.clients)
        )

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        server, clients = self.split(state)
        clients = tuple(self.inner.update(client, gradient, lr, t) for client in clients)
        return self.shared(server, clients, t)

    def shared(self, server: State, clients: tuple[State, ...], t: int) -> State:
        """Average the clients if step t is the last of a round.

        Parameters
        ----------
        server : tuple
            Coordinates of the server.
        clients : tuple of tuple
            Coordinates of each client after its own step t.
        t : int
            Step number, 0-based.

        Returns
        -------
        tuple
            As many entries as `coordinates`.
        """
        if is_last_of_period(t, self.local_steps):
            delta = server[0] - self.mean_of(tuple(client[0] for client in clients))
            step, buffers = self.outer.direction(server[1:], delta)
            server = (server[0] - self.outer_lr * step, *buffers)
            clients = tuple((server[0], *client[1:]) for client in clients)
        return (*server, *chain.from_iterable(clients))

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return tuple(client[0] for client in self.split(state)[1])

    def weights(self, state: State, t: int) -> Value:
        return self.mean_of(tuple(client[0] for client in self.split(state)[1]))

    def mean_of(self, values: tuple[Value, ...]) -> Value:
        """Mean over the clients, as the server takes it.

        Parameters
        ----------
        values : tuple of Value
            One for each client.

        Returns
        -------
        Value
        """
        return average(values)

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        client = self.inner.embed(lambda: x, normal)
        return (x, *self.outer.no_buffers(), *(client * self.clients))

    def modes(self) -> tuple[Mode, ...]:
        m = self.clients
        return (
            Mode("mean", _MeanWorker(self), 1.0 / m),
            Mode("deviation", _WorkerDeviation(self), 1.0 - 1.0 / m),
        )

    def limits(self) -> tuple[LimitingCase, ...]:
        alone = replace(self, clients=1, outer=SGD(), outer_lr=1.0)
        every_step = replace(self, local_steps=1, outer=SGD(), outer_lr=1.0)
        slow = min(self.outer_lr, 1.0)
        return (
            LimitingCase("clients = 1, outer step 1", alone, self.inner),
            LimitingCase(
                "local_steps = 1, outer step 1", every_step, self.inner, batch_size=self.clients
            ),
            LimitingCase(
                "clients = 1, outer = SGD()",
                replace(alone, outer_lr=slow),
                Lookahead(self.inner, self.local_steps, slow),
                every=self.local_steps,
            ),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        outer_edge = self._outer_edge()
        if outer_edge is None:
            return None
        return edge_with_rounds(self.inner, self.local_steps, outer_edge, curvature)

    def _outer_edge(self) -> float | None:
        """Largest curvature at which the server's step is stable."""
        edge = self.outer.stability_edge(np.ones(1))
        return None if edge is None else float(edge[0]) / self.outer_lr


@dataclass(frozen=True)
class _MeanWorker(Algorithm):
    """The clients' mean and the server: the same method with one client."""

    local: LocalSGD

    @property
    def coordinates(self) -> tuple[str, ...]:
        m, names = self.local.clients, self.local.inner.coordinates
        return (*self.local.server, *(f"{n} clients/{m}" for n in names))

    @property
    def time(self) -> TimeDependence:
        return self.local.time

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        first = len(self.local.server)
        client = self.local.inner.update(state[first:], gradient, lr, t)
        return self.local.shared(state[:first], (client,), t)

    def weights(self, state: State, t: int) -> Value:
        return state[len(self.local.server)]

    def embed(self, draw: Draw, normal: Draw) -> State:
        x = draw()
        return (x, *self.local.outer.no_buffers(), *self.local.inner.embed(lambda: x, normal))


@dataclass(frozen=True)
class _WorkerDeviation(Algorithm):
    """A client's distance from the mean: the inner optimizer, reset to 0 after every round."""

    local: LocalSGD

    @property
    def coordinates(self) -> tuple[str, ...]:
        return tuple(f"{n} deviation/{self.local.clients}" for n in self.local.inner.coordinates)

    @property
    def time(self) -> TimeDependence:
        return self.local.time

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        d, *buffers = self.local.inner.update(state, gradient, lr, t)
        return (0.0 if is_last_of_period(t, self.local.local_steps) else d, *buffers)

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Draw, normal: Draw) -> State:
        return (0.0, *self.local.inner.no_buffers())


@dataclass(frozen=True)
class Federated(LocalSGD):
    """Local SGD on clients that differ: client k's loss is 1/2 c_k h (w - w* (1 + shift_k))^2.

    With more than one local step the fixed point drifts away from the minimum w* of the clients'
    mean loss (client drift; Charles & Konecny 2021). The loss is that of `Problem`, which is the
    mean client's up to a constant: curvatures must average to 1 and curvature * shift to 0. Each
    client has the gradient noise of the problem.

    Parameters
    ----------
    curvatures : tuple of float
        Client k's curvature in units of the problem's, one for each client, >= 0.
    shifts : tuple of float
        Distance of client k's minimum from w*, in units of w* (``problem.minimum``).
    shares : tuple of float
        Weight of each client in the mean loss and in the server's mean, > 0, which sum to 1; equal
        by default. All means above are then weighted.
    """

    curvatures: tuple[float, ...] = ()
    shifts: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        method = type(self).__name__
        for name in ("curvatures", "shifts", "shares"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values))
            if len(values) not in (0, self.clients):
                raise NQMError(
                    f"{method}.{name} must hold one number for each of the {self.clients} "
                    f"clients; got {len(values)}"
                )
            low = -math.inf if name == "shifts" else 0.0
            for value in values:
                check_number(f"{method}.{name}", value, low=low, closed_low=name != "shares")
        if self.shares and abs(sum(self.shares) - 1.0) > 1e-9:
            raise NQMError(f"{method}.shares must sum to 1; got {sum(self.shares):g}")
        mean = self.mean_of(self.client_curvatures)
        pulls = (c * s for c, s in zip(self.client_curvatures, self.client_shifts, strict=True))
        pull = self.mean_of(tuple(pulls)) * self.clients
        if abs(mean - 1.0) > 1e-9:
            raise NQMError(f"{method}.curvatures must average to 1; got {mean:g}")
        if abs(pull) > 1e-9 * (1.0 + max(map(abs, self.client_shifts))):
            raise NQMError(
                f"{method}.shifts times curvatures must sum to 0, or w* is not the minimum of the "
                f"clients' mean loss; got {pull:g}"
            )

    def check(self, problem: Problem) -> None:
        """Refuse a problem with w* = 0 if clients have shifts, which are in units of w*.

        Parameters
        ----------
        problem : Problem
            Problem of the run.

        Raises
        ------
        NQMError
            If a shift is not 0 and `problem.minimum` is 0 in every direction.
        """
        method = type(self).__name__
        if any(self.shifts) and not np.any(problem.minimum):
            raise NQMError(
                f"{method}.shifts are in units of problem.minimum, which is 0; set e.g. minimum = 1"
            )

    @property
    def client_curvatures(self) -> tuple[float, ...]:
        """Relative curvature c_k of each client; 1 by default."""
        return self.curvatures or (1.0,) * self.clients

    @property
    def client_shifts(self) -> tuple[float, ...]:
        """Relative shift of each client's minimum; 0 by default."""
        return self.shifts or (0.0,) * self.clients

    def mean_of(self, values: tuple[Value, ...]) -> Value:
        if not self.shares:
            return super().mean_of(values)
        first, *others = (value * share for value, share in zip(values, self.shares, strict=True))
        return sum(others, start=first)

    @property
    def member_count(self) -> int:
        return 0  # clients that differ have no common mean and deviation

    @property
    def constants(self) -> Mapping[str, str]:
        return {"origin": "origin"}

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (*super().coordinates, "origin")

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        *moving, origin = state
        server, clients = self.split(tuple(moving))
        clients = tuple(
            self.inner.update(client, self.local_gradient(own, server[0]), lr, t)
            for client, own in zip(clients, self.client_gradients(gradient, origin), strict=True)
        )
        return (*self.shared(server, clients, t), origin)

    def client_gradients(self, gradient: Gradient, origin: Value) -> tuple[Gradient, ...]:
        """Gradient of each client's own loss.

        Parameters
        ----------
        gradient : Gradient
            Of the problem's loss.
        origin : Value
            The origin of weight space, -w*.

        Returns
        -------
        tuple of Gradient
            One for each client.
        """
        # Client k's minimum is at shift_k w*.
        return tuple(
            _Client(gradient, c, -s * origin)
            for c, s in zip(self.client_curvatures, self.client_shifts, strict=True)
        )

    def local_gradient(self, gradient: Gradient, server: Value) -> Gradient:
        """What a client's inner optimizer takes for its gradient; here its own loss's.

        Parameters
        ----------
        gradient : Gradient
            Of the client's own loss.
        server : Value
            The server's weights.

        Returns
        -------
        Gradient
        """
        return gradient

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return ()

    def embed(self, draw: Draw, normal: Draw) -> State:
        return (*super().embed(draw, normal), 0.0)

    def modes(self) -> tuple[Mode, ...]:
        return (Mode("mean", self, 1.0),)

    def limits(self) -> tuple[LimitingCase, ...]:
        equal = replace(self, curvatures=(), shifts=(), shares=())
        local = LocalSGD(self.clients, self.local_steps, self.inner, self.outer, self.outer_lr)
        return (LimitingCase("clients that do not differ", equal, local, members=False),)

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        if len(set(self.client_curvatures)) == 1:
            return super().stability_edge(curvature)
        outer_edge = self._outer_edge()
        if outer_edge is None or self.local_steps > 2 or not isinstance(self.inner, SGD):
            return None
        if self.local_steps == 1:  # clients differ in the place of their minimum only
            return outer_edge / curvature
        # A round sees the curvature 2 u - m u^2, u = lr h, with m the mean of c_k^2: it is 0 again
        # at u = 2 / m, and before that it may rise to outer_edge.
        mean_square = float(self.mean_of(tuple(c * c for c in self.client_curvatures)))
        below = 1.0 - mean_square * outer_edge
        edge = 2.0 if below <= 0.0 else 1.0 - math.sqrt(below)
        return edge / mean_square / curvature


@dataclass(frozen=True)
class _Client:
    """Gradient of one client's loss."""

    gradient: Gradient
    curvature: float
    minimum: Value

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        return self.gradient(self.curvature * (x - self.minimum), batch, size)

    def normal(self) -> Value:
        return self.gradient.normal()

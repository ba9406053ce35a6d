"""K exchangeable members whose mean is the model: independent runs and late-phase weights.

Each class defines the literal K-member algorithm and its two modes. If the minibatch noise of
members has correlation q (0 with own minibatches, 1 with a shared one), the mean model has the
noise variance q + (1 - q) / K and is independent of a member's deviation, which has
(1 - q)(1 - 1 / K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    check_fraction,
    check_members,
)
from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError, check_integer, check_number
from nqm.gamma import base_scale, check_gamma
from nqm.problems.quadratic import FloatArray, Problem

_SHARED = {"own": 0.0, "shared": 1.0}


@dataclass(frozen=True)
class Ensemble(Algorithm):
    """Mean of K independent runs; one step is one step of each run.

    Parameters
    ----------
    members : int
        Number K of runs, >= 1.
    inner : Optimizer
        Optimizer of each run.
    starts : {"common", "own"}
        Whether all runs start from the same weights, or each from its own draw of the problem's
        start (first phase only).
    """

    members: int = 10
    inner: Optimizer = field(default_factory=SGD)
    starts: str = "common"

    def __post_init__(self) -> None:
        check_members("Ensemble.members", self.members)
        check_algorithm("Ensemble.inner", self.inner, Optimizer)
        if self.starts not in ("common", "own"):
            raise NQMError(f"Ensemble.starts must be 'common' or 'own'; got {self.starts!r}")

    @property
    def member_count(self) -> int:
        return self.members

    @property
    def coordinates(self) -> tuple[str, ...]:
        names = self.inner.coordinates
        return tuple(f"{n}{k + 1}/{self.members}" for k in range(self.members) for n in names)

    def _split(self, state: State) -> tuple[State, ...]:
        size = len(self.inner.coordinates)
        return tuple(state[k * size : (k + 1) * size] for k in range(self.members))

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        runs = (self.inner.update(run, gradient, lr, t) for run in self._split(state))
        return tuple(chain.from_iterable(runs))

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        return tuple(self.inner.weights(run, t) for run in self._split(state))

    def weights(self, state: State, t: int) -> Value:
        return average(self.member_weights(state, t))

    def embed(self, draw: Draw, normal: Draw) -> State:
        starts = (self.inner.embed(x, normal) for x in self._starts(draw))
        return tuple(chain.from_iterable(starts))

    def _starts(self, draw: Draw) -> list[Draw]:
        if self.starts == "own":
            return [draw] * self.members
        x = draw()
        return [lambda: x] * self.members

    def modes(self) -> tuple[Mode, ...]:
        k = self.members
        return (
            Mode("mean", _RunsMode(self, "mean"), 1.0 / k),
            Mode("deviation", _RunsMode(self, "deviation"), 1.0 - 1.0 / k),
        )

    def limits(self) -> tuple[LimitingCase, ...]:
        common = replace(self, starts="common")
        return (
            LimitingCase("members = 1", replace(self, members=1), self.inner),
            LimitingCase(
                "starts = 'common'", common, self.inner, batch_size=self.members, members=False
            ),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        return self.inner.stability_edge(curvature)


@dataclass(frozen=True)
class _RunsMode(Algorithm):
    """The mean of K runs, or run 1's deviation from it: the inner optimizer from another start."""

    runs: Ensemble
    mode: str

    @property
    def coordinates(self) -> tuple[str, ...]:
        return tuple(f"{n} {self.mode}/{self.runs.members}" for n in self.runs.inner.coordinates)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        return self.runs.inner.update(state, gradient, lr, t)

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Draw, normal: Draw) -> State:
        starts = tuple(start() for start in self.runs._starts(draw))
        mean = average(starts)
        return self.runs.inner.embed(
            lambda: mean if self.mode == "mean" else starts[0] - mean, normal
        )


@dataclass(frozen=True)
class LatePhase(Algorithm):
    """Additive late-phase weights w_k = theta + phi_k; one step is one cycle over the K members.

    ::

        g_k = gradient at w_k on member k's minibatch
        phi_k <- phi_k - member_lr * direction(g_k)
        theta <- theta - lr * direction(gamma * sum_k g_k)

    von Oswald et al. 2021, section 2 and Fig. 5. The mean model w = theta + mean_k phi_k is
    evaluated. With plain SGD it obeys w' = w - lambda g with lambda = member_lr + gamma K lr: it
    has the distribution of plain SGD at rate lambda with batch size K B.

    Parameters
    ----------
    members : int
        Number K of members, >= 1.
    gamma : {"sum", "mean"} or float
        Scale of the summed base gradient: 1, 1 / K, or a number >= 0.
    minibatch : {"own", "shared"} or float
        Whether each member draws its own minibatch or all share one; or the share q in [0, 1] of
        a minibatch's examples that all members have in common (the correlation of their noise).
    spread : float
        Variance of the members' initial offsets phi_k, >= 0.
    inner : Optimizer
        Optimizer of theta and of every phi_k, with the same momentum for both.
    directions : float or tuple of int, optional
        Directions that have members (all by default): the sharpest ones, up to this fraction of
        all, or by index. Elsewhere theta alone is trained, by the same summed gradient.
    """

    rate_count = 2

    members: int = 10
    gamma: str | float = "sum"
    minibatch: str | float = "own"
    spread: float = 0.0
    inner: Optimizer = field(default_factory=SGD)
    directions: float | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_members("LatePhase.members", self.members)
        check_gamma("LatePhase.gamma", self.gamma)
        check_number("LatePhase.spread", self.spread, low=0.0)
        check_algorithm("LatePhase.inner", self.inner, Optimizer)
        if isinstance(self.minibatch, str) and self.minibatch not in _SHARED:
            raise NQMError(
                "LatePhase.minibatch must be 'own', 'shared' or a number in [0, 1]; "
                f"got {self.minibatch!r}"
            )
        check_fraction("LatePhase.minibatch", self.shared, closed_high=True)
        if isinstance(self.directions, Sequence):
            object.__setattr__(self, "directions", tuple(self.directions))
            for index in self.directions:
                check_integer("LatePhase.directions", index, 0)
        elif self.directions is not None:
            check_fraction("LatePhase.directions", self.directions, closed_high=True)

    @property
    def shared(self) -> float:
        """q: share of a minibatch's examples that all members use (correlation of their noise)."""
        if isinstance(self.minibatch, str):
            return _SHARED[self.minibatch]
        return self.minibatch

    def member_mask(self, problem: Problem) -> FloatArray | None:
        """Mark the directions that have members, as `directions` states.

        Parameters
        ----------
        problem : Problem
            Gives curvatures, multiplicities and number of directions.

        Returns
        -------
        ndarray, shape (d,), or None
            1 with members, 0 without; None if all directions have members.

        Raises
        ------
        NQMError
            If an index in `directions` is not below d.
        """
        if self.directions is None:
            return None
        mask = np.zeros(problem.directions)
        if isinstance(self.directions, tuple):
            beyond = [i for i in self.directions if i >= mask.size]
            if beyond:
                raise NQMError(
                    f"LatePhase.directions must lie in 0..{mask.size - 1}, the problem's; "
                    f"got {beyond[0]}"
                )
            mask[list(self.directions)] = 1.0
            return mask
        order = np.argsort(-problem.curvature, kind="stable")
        counted = np.cumsum(problem.multiplicity[order])
        mask[order] = counted <= self.directions * counted[-1] * (1.0 + 1e-12)
        return mask

    @property
    def base_scale(self) -> float:
        """Factor gamma_theta on the summed gradient of the base weights."""
        return base_scale(self.gamma, self.members)

    @property
    def member_count(self) -> int:
        return self.members

    @property
    def coordinates(self) -> tuple[str, ...]:
        buffers = self.inner.buffers
        names = ["theta", *buffers]
        for k in range(self.members):
            names += [f"{n}{k + 1}/{self.members}{self._where}" for n in ("phi", *buffers)]
        return tuple(names)

    @property
    def _where(self) -> str:
        # Members of other directions have other names: a next phase does not keep them.
        return "" if self.directions is None else f" in {self.directions}"

    def _gradient(self, gradient: Gradient, x: Value) -> Value:
        """Gradient on a member's minibatch: mean over its own examples and the common ones."""
        q = self.shared
        if q in (0.0, 1.0):
            return gradient(x, 0 if q else None)
        return q * gradient(x, 0, q) + (1.0 - q) * gradient(x, None, 1.0 - q)

    def _split(self, state: State) -> tuple[State, tuple[State, ...]]:
        size = 1 + len(self.inner.buffers)
        parts = tuple(state[i * size : (i + 1) * size] for i in range(self.members + 1))
        return parts[0], parts[1:]

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        base_lr, member_lr = lr
        base, members = self._split(state)
        g = tuple(self._gradient(gradient, base[0] + phi[0]) for phi in members)
        summed = self.base_scale * sum(g[1:], start=g[0])
        step, buffers = self.inner.direction(base[1:], summed)
        new = [base[0] - base_lr * step, *buffers]
        for phi, g_k in zip(members, g, strict=True):
            step, buffers = self.inner.direction(phi[1:], g_k)
            new += (phi[0] - member_lr * step, *buffers)
        return tuple(new)

    def member_weights(self, state: State, t: int) -> tuple[Value, ...]:
        base, members = self._split(state)
        return tuple(base[0] + phi[0] for phi in members)

    def weights(self, state: State, t: int) -> Value:
        base, members = self._split(state)
        return base[0] + average(tuple(phi[0] for phi in members))

    def embed(self, draw: Draw, normal: Draw) -> State:
        none = self.inner.no_buffers()
        scale = math.sqrt(self.spread)
        state = [draw(), *none]
        for _ in range(self.members):
            state += (scale * normal() if self.spread else 0.0, *none)
        return tuple(state)

    def modes(self) -> tuple[Mode, ...]:
        k, q = self.members, self.shared
        return (
            Mode("mean", _MeanModel(self), q + (1.0 - q) / k),
            Mode("deviation", _Deviation(self), (1.0 - q) * (1.0 - 1.0 / k)),
        )

    def mean_rate(self, rates: Rate) -> Rate:
        """Effective learning rate of the mean model: lambda = member_lr + gamma K lr.

        Parameters
        ----------
        rates : pair of floats
            (lr, member_lr).

        Returns
        -------
        float
            lambda.
        """
        lr, member_lr = rates
        return member_lr + self.base_scale * self.members * lr

    def limits(self) -> tuple[LimitingCase, ...]:
        plain = replace(self, minibatch="own", spread=0.0, directions=None)
        one, shared = replace(plain, members=1), replace(plain, minibatch="shared")
        return (
            LimitingCase("members = 1", one, self.inner, equal_rates=one.mean_rate),
            LimitingCase(
                "minibatch = 'own'",
                plain,
                self.inner,
                equal_rates=self.mean_rate,
                batch_size=self.members,
                members=False,
            ),
            LimitingCase("minibatch = 'shared'", shared, self.inner, equal_rates=self.mean_rate),
            LimitingCase(
                "minibatch = 0", replace(self, minibatch=0.0), replace(self, minibatch="own")
            ),
            LimitingCase(
                "minibatch = 1", replace(self, minibatch=1.0), replace(self, minibatch="shared")
            ),
            LimitingCase(
                "directions = 1", replace(self, directions=1.0), replace(self, directions=None)
            ),
        )

    def stability_edge(self, curvature: FloatArray, member_lr_ratio: Any = 1.0) -> Any:
        # The mean model has rate lambda, the members' deviations member_lr, which is smaller.
        inner = self.inner.stability_edge(curvature)
        if inner is None:
            return None
        with np.errstate(divide="ignore"):  # with lambda = 0 every rate is stable
            return inner / self.mean_rate((1.0, np.asarray(member_lr_ratio)))


@dataclass(frozen=True)
class _MeanModel(Algorithm):
    """w = theta + mean phi, driven by one gradient through both optimizers.

    The state is the sum of theta and mean phi. Separately they have no steady state, because one
    combination of them never changes.
    """

    late: LatePhase
    rate_count = 2

    @property
    def coordinates(self) -> tuple[str, ...]:
        k, buffers = f"{self.late.members}{self.late._where}", self.late.inner.buffers
        return (f"w/{k}", *buffers, *(f"{name} mean/{k}" for name in buffers))

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        base_lr, member_lr = lr
        inner, size = self.late.inner, len(self.late.inner.buffers)
        w, base, mean = state[0], state[1 : 1 + size], state[1 + size :]
        g = gradient(w)
        base_step, base = inner.direction(base, (self.late.base_scale * self.late.members) * g)
        mean_step, mean = inner.direction(mean, g)
        return (w - base_lr * base_step - member_lr * mean_step, *base, *mean)

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Draw, normal: Draw) -> State:
        none = self.late.inner.no_buffers()
        spread = math.sqrt(self.late.spread / self.late.members)
        w = draw() + spread * normal() if self.late.spread else draw()
        return (w, *none, *none)


@dataclass(frozen=True)
class _Deviation(Algorithm):
    """d = phi_k - mean phi: the inner optimizer at the member rate, from the initial spread."""

    late: LatePhase
    rate_count = 2

    @property
    def coordinates(self) -> tuple[str, ...]:
        k = f"{self.late.members}{self.late._where}"
        return (f"d/{k}", *(f"{name} deviation/{k}" for name in self.late.inner.buffers))

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        return self.late.inner.update(state, gradient, lr[1], t)

    def weights(self, state: State, t: int) -> Value:
        return state[0]

    def embed(self, draw: Draw, normal: Draw) -> State:
        spread = math.sqrt(self.late.spread * (1.0 - 1.0 / self.late.members))
        d = spread * normal() if self.late.spread else 0.0
        return (d, *self.late.inner.no_buffers())

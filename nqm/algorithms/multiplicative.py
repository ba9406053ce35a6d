"""Multiplicative late-phase weights w_k = theta * phi_k: not linear, so only Monte Carlo is exact.

::

    g_k = gradient at w_k on member k's minibatch
    phi_k <- phi_k - member_lr * theta * g_k      (summed over directions for a scalar phi_k)
    theta <- theta - lr * gamma * sum_k phi_k g_k

Analytic results are approximations, and `kind` of a result says which one: the first order in noise
and displacement about theta phi = w* (here), or the long-run balance of
`nqm.solvers.multiplicative_long_run`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from nqm.algorithms.base import LimitingCase, Nonlinear, Rate
from nqm.algorithms.members import LatePhase
from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError, check_integer, check_number
from nqm.gamma import base_scale, check_gamma
from nqm.problems.quadratic import FloatArray, Problem


@dataclass(frozen=True)
class MultiplicativeLatePhase(Nonlinear):
    """Late-phase weights that multiply the base (rank-one and BatchNorm-scale members).

    The phase starts at theta = w / factor, phi_k = factor * (1 + sqrt(spread) * normal).

    Parameters
    ----------
    members : int
        Number K of members, >= 1.
    gamma : {"sum", "mean"} or float
        Scale of the summed base gradient: 1, 1 / K, or a number >= 0.
    factor : float
        Value with which phi starts, > 0.
    spread : float
        Variance of the members' relative initial offsets, >= 0.
    coupling : {"elementwise", "scalar"}
        One phi_k per direction, or one number per member for all directions.
    """

    rate_count: ClassVar[int] = 2

    members: int = 10
    gamma: str | float = "sum"
    factor: float = 1.0
    spread: float = 0.0
    coupling: str = "elementwise"

    def __post_init__(self) -> None:
        name = "MultiplicativeLatePhase"
        check_integer(f"{name}.members", self.members, 1)
        check_gamma(f"{name}.gamma", self.gamma)
        check_number(f"{name}.factor", self.factor, low=0.0, closed_low=False)
        check_number(f"{name}.spread", self.spread, low=0.0)
        if self.coupling not in ("elementwise", "scalar"):
            raise NQMError(
                f"{name}.coupling must be 'elementwise' or 'scalar'; got {self.coupling!r}"
            )

    @property
    def base_scale(self) -> float:
        """Factor gamma_theta on the summed gradient of the base weights."""
        return base_scale(self.gamma, self.members)

    @property
    def scalar(self) -> bool:
        """Whether a member has one number phi_k for all directions, which couples them."""
        return self.coupling == "scalar"

    @property
    def minibatches(self) -> int:
        return self.members

    @property
    def member_count(self) -> int:
        return self.members

    def continues(self, old: object) -> bool:
        """Tell whether members are kept from the phase before.

        Parameters
        ----------
        old : Algorithm or Nonlinear
            The method of the phase before.

        Returns
        -------
        bool
            True for equal numbers of members, factor and coupling.
        """
        return isinstance(old, MultiplicativeLatePhase) and (
            (self.members, self.factor, self.coupling) == (old.members, old.factor, old.coupling)
        )

    def check(self, problem: Problem) -> None:
        """Refuse quadrature nodes, and w* = 0 in a direction, where both gradients vanish.

        Parameters
        ----------
        problem : Problem
            Problem of the run.

        Raises
        ------
        NQMError
            If w* is 0 along a direction of curvature > 0.
        """
        problem.check_distribution("late_phase_multiplicative")
        if np.any((problem.minimum == 0.0) & (problem.curvature > 0)):
            raise NQMError(
                "late_phase_multiplicative needs problem.minimum != 0 in every direction; "
                "set e.g. minimum = 1.0"
            )

    def first_order(self, problem: Problem) -> tuple[LatePhase, FloatArray, FloatArray]:
        """Find the additive late-phase weights with the same moments to first order in the noise.

        About theta0 phi0 = w* member k changes by phi0 d(theta) + theta0 d(phi_k), which is the
        additive model with rates lr * phi0^2 and member_lr * theta0^2 in each direction
        (elementwise coupling). Its relative error is proportional to the noise variance. It is
        valid if noise and displacement are small compared with w*, until the balance of theta and
        phi has drifted (`nqm.solvers.multiplicative_long_run`).

        Parameters
        ----------
        problem : Problem
            With w* != 0 in every direction of curvature > 0.

        Returns
        -------
        algorithm : LatePhase
            The additive method.
        lr_scale, member_lr_scale : ndarray, shape (d,)
            Factors on the phase's two rates.

        Raises
        ------
        NQMError
            If `check` refuses the problem, or for spread > 0 if w* differs between directions.
        """
        self.check(problem)
        theta = problem.minimum / self.factor
        # The spread of w_k is theta0^2 factor^2 spread = w*^2 spread, one number per direction.
        spread = self.spread * problem.minimum**2
        if self.spread and np.ptp(spread):
            raise NQMError(
                "the first-order approximation with spread > 0 needs one problem.minimum for all "
                "directions; use method 'sample'"
            )
        late = LatePhase(self.members, self.gamma, spread=float(spread.flat[0]))
        return late, np.full_like(theta, self.factor**2), theta**2

    def limits(self) -> tuple[LimitingCase, ...]:
        def members_still(rates: Rate) -> Rate:
            return rates[0], 1e-300  # rates must be > 0; this one changes no number

        def base_rate(rates: Rate) -> Rate:
            return rates[0] * self.base_scale * self.members * self.factor**2

        return (
            LimitingCase(
                "member_lr -> 0",
                replace(self, spread=0.0),
                SGD(),
                rates=members_still,
                equal_rates=base_rate,
                batch_size=self.members,
            ),
        )

    def stability_edge(self, problem: Problem, member_lr_ratio: float = 1.0) -> FloatArray:
        """Compute the smallest lr that is unstable to first order about theta phi = w*.

        For elementwise coupling.

        Parameters
        ----------
        problem : Problem
            With a minimum w* away from 0; its curvature must be > 0.
        member_lr_ratio : float
            member_lr / lr.

        Returns
        -------
        ndarray, shape (d,)
            ``2 / (h (gamma K phi^2 + ratio theta^2))``.
        """
        late, lr_scale, member_lr_scale = self.first_order(problem)
        edge = late.stability_edge(
            problem.curvature * lr_scale, member_lr_ratio * member_lr_scale / lr_scale
        )
        return np.asarray(edge)

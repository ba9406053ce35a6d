"""Optimizers that are not linear, and noise that is not Gaussian: Monte Carlo only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nqm.algorithms.base import LimitingCase, Nonlinear, Rate, check_fraction
from nqm.algorithms.optimizers import HeavyBall
from nqm.errors import NQMError, check_number

if TYPE_CHECKING:
    from nqm.problems.quadratic import FloatArray, Problem


@dataclass(frozen=True, kw_only=True)
class Sampled(Nonlinear, ABC):
    """Base of these optimizers: one minibatch per step, its noise, and the weights' precision.

    Parameters
    ----------
    dof : float, optional
        Degrees of freedom, > 2, of Student-t gradient noise, scaled to the variance v / B of a
        minibatch; normal noise by default. It is the tail of the minibatch's noise for any B.
    pitch : float
        Weights are stochastically rounded to multiples of this after every step; 0 for no rounding.
        The grid contains the origin of weight space, which lies at -``problem.minimum`` from the
        minimum.
    """

    dof: float | None = None
    pitch: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.dof is not None:
            check_number(f"{name}.dof", self.dof, low=2.0, closed_low=False)
        check_number(f"{name}.pitch", self.pitch, low=0.0)

    def check(self, problem: Problem) -> None:
        """Refuse quadrature nodes, and correlated noise if the noise shall have heavy tails.

        Parameters
        ----------
        problem : Problem
            Problem of the run.

        Raises
        ------
        NQMError
            If `dof` is stated and the noise is correlated.
        """
        problem.check_distribution(type(self).__name__)
        if self.dof is not None and problem.noise_correlation is not None:
            raise NQMError(
                f"{type(self).__name__}.dof: heavy tails are drawn by direction, but the noise of "
                "this problem is correlated; drop dof or problem.noise_correlation"
            )

    @property
    @abstractmethod
    def rule(self) -> tuple[int, float, float, float]:
        """Number of the compiled rule; momentum; threshold or beta2; epsilon."""

    @abstractmethod
    def stability_edge(self, curvature: FloatArray) -> FloatArray | None:
        """Compute the smallest learning rate at which weights grow without bound.

        Parameters
        ----------
        curvature : ndarray, shape (d,)
            Eigenvalues h > 0 of the Hessian.

        Returns
        -------
        ndarray, shape (d,), or None
            Infinite if every step is bounded for any gradient; None if nothing is known.
        """

    @property
    def tail(self) -> float:
        """Degrees of freedom of the noise; infinite for normal noise."""
        return math.inf if self.dof is None else self.dof

    def continues(self, old: object) -> bool:
        """Tell whether buffers are kept from the phase before.

        Parameters
        ----------
        old : Algorithm or Nonlinear
            The method of the phase before.

        Returns
        -------
        bool
            True for a method of the same class.
        """
        return type(old) is type(self)


@dataclass(frozen=True)
class SampledSGD(Sampled):
    """SGD or heavy ball by Monte Carlo: clipped gradients, heavy-tailed noise, true rounding.

    ``g <- g min(1, threshold / |g|)`` over all directions; b' = momentum b + g; x' = x - lr b'.

    Parameters
    ----------
    momentum : float
        Share of the buffer that a step keeps, in [0, 1).
    threshold : float, optional
        Largest norm of a gradient, > 0; no clipping by default (Zhang et al. 2020, "Why gradient
        clipping accelerates training").
    """

    momentum: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("SampledSGD.momentum", self.momentum)
        if self.threshold is not None:
            check_number("SampledSGD.threshold", self.threshold, low=0.0, closed_low=False)

    @property
    def rule(self) -> tuple[int, float, float, float]:
        return 0, self.momentum, math.inf if self.threshold is None else self.threshold, 0.0

    def limits(self) -> tuple[LimitingCase, ...]:
        # A linear method: its expected loss depends on the noise's variance, not on its tail.
        plain, linear = replace(self, threshold=None, pitch=0.0), HeavyBall(self.momentum)
        return (
            LimitingCase("no threshold, pitch = 0", plain, linear),
            LimitingCase("threshold large", replace(plain, threshold=1e12), linear),
            LimitingCase("pitch small", replace(plain, pitch=1e-12), linear),
        )

    def stability_edge(self, curvature: FloatArray) -> FloatArray | None:
        if self.threshold is not None:
            return np.full_like(curvature, np.inf)
        return np.asarray(HeavyBall(self.momentum).stability_edge(curvature))


@dataclass(frozen=True)
class SignSGD(Sampled):
    """b' = momentum b + g;  x' = x - lr sign(b') (signSGD, Signum; Bernstein et al. 2018).

    The mean step is lr erf(h x / (sd(e) sqrt 2)) for normal noise without momentum: near the
    minimum it is SGD at rate lr sqrt(2 / pi) / sd(e), with noise of variance lr^2 for any batch.

    Parameters
    ----------
    momentum : float
        Share of the buffer that a step keeps, in [0, 1).
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("SignSGD.momentum", self.momentum)

    @property
    def rule(self) -> tuple[int, float, float, float]:
        return 1, self.momentum, 0.0, 0.0

    def limits(self) -> tuple[LimitingCase, ...]:
        adam = Adam(0.0, 0.0, 1e-150, dof=self.dof, pitch=self.pitch)
        return (LimitingCase("momentum = 0", replace(self, momentum=0.0), adam),)

    def stability_edge(self, curvature: FloatArray) -> FloatArray | None:
        return np.full_like(curvature, np.inf)


@dataclass(frozen=True)
class Adam(Sampled):
    """x' = x - lr m / (sqrt(s) + epsilon) with bias-corrected means m of g and s of g^2.

    Kingma & Ba 2015, direction by direction: the basis is that of the curvature.

    Parameters
    ----------
    beta1, beta2 : float
        Decay of the means of g and of g^2, in [0, 1).
    epsilon : float
        Added to the root of s, > 0.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("Adam.beta1", self.beta1)
        check_fraction("Adam.beta2", self.beta2)
        check_number("Adam.epsilon", self.epsilon, low=0.0, closed_low=False)

    @property
    def rule(self) -> tuple[int, float, float, float]:
        return 2, self.beta1, self.beta2, self.epsilon

    def limits(self) -> tuple[LimitingCase, ...]:
        large = 1e12

        def times_epsilon(rates: Rate) -> Rate:
            return rates * large

        gradient = replace(self, beta1=0.0, epsilon=large)
        sign = replace(self, beta1=0.0, beta2=0.0, epsilon=1e-150)
        return (
            LimitingCase(
                "beta1 = 0, epsilon large",
                gradient,
                SampledSGD(dof=self.dof, pitch=self.pitch),
                rates=times_epsilon,
            ),
            LimitingCase(
                "beta1 = beta2 = 0, epsilon small", sign, SignSGD(dof=self.dof, pitch=self.pitch)
            ),
        )

    def stability_edge(self, curvature: FloatArray) -> FloatArray | None:
        # |m| <= (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) sqrt(s), by Cauchy-Schwarz.
        bounded = self.beta1 == 0.0 or self.beta1**2 < self.beta2
        return np.full_like(curvature, np.inf) if bounded else None

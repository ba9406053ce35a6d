"""One-pass least squares with Gaussian inputs: gradient noise that depends on the weights.

Inputs x ~ N(0, H), labels y = x'w* + e with Var e = s2, every example used once. A minibatch of B
examples has the gradient 1/B sum x (x'u - e) at the displacement u = w - w*, whose mean is H u and
whose noise has, by Wick's theorem, the covariance

    1/B (H u u' H + (u'Hu + s2) H).

So along an eigendirection the noise variance is (h_i^2 u_i^2 + h_i (2 L + s2)) / B: it grows with
the loss L of all directions, and h_i s2, due to noisy labels, remains at the minimum. Second
moments still obey a closed equation, but it couples the directions (`nqm.solvers.least_squares`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.limits import check_memory
from nqm.problems.quadratic import FloatArray, Problem, Quadratic
from nqm.words import short_repr

_VECTORS = ("curvature", "multiplicity", "initial_mean", "initial_variance", "minimum")


@dataclass(frozen=True, eq=False, init=False)
class LeastSquares(Quadratic):
    """Linear regression on a stream of Gaussian inputs, in the eigenbasis of their covariance.

    Every vector but the first may be a scalar; all are stored as read-only float64 arrays.

    Parameters
    ----------
    curvature : array_like, shape (d,)
        Eigenvalues h of the inputs' covariance, >= 0.
    label_noise : float
        Variance s2 of the labels about the best linear prediction, >= 0.
    initial_mean, initial_variance : array_like, shape (d,)
        Start of the displacement from w* (N(0, 1) by default).
    multiplicity : array_like, shape (d,)
        Number of equal directions that each entry stands for, > 0 (1 by default).
    minimum : array_like, shape (d,)
        Position w*; used by weight decay towards the origin only.

    Raises
    ------
    NQMError
        On a negative curvature or variance, a NaN, or lengths that do not match.
    """

    curvature: FloatArray
    label_noise: float
    initial_mean: FloatArray
    initial_variance: FloatArray
    multiplicity: FloatArray
    minimum: FloatArray

    __repr__ = short_repr

    def __init__(
        self,
        curvature: ArrayLike,
        label_noise: float = 0.0,
        initial_mean: ArrayLike = 0.0,
        initial_variance: ArrayLike = 1.0,
        multiplicity: ArrayLike = 1.0,
        minimum: ArrayLike = 0.0,
    ):
        check_number("problem.label_noise", label_noise, low=0.0)
        checked = Problem(
            curvature, 0.0, multiplicity, initial_mean, initial_variance, minimum
        )  # checks the vectors
        for name in _VECTORS:
            object.__setattr__(self, name, getattr(checked, name))
        object.__setattr__(self, "label_noise", float(label_noise))

    @property
    def irreducible_loss(self) -> float:
        """Loss s2 / 2 of the best weights; no reported loss includes it."""
        return 0.5 * self.label_noise

    def _noise_words(self) -> dict[str, str]:
        """What a notebook shows of the gradient noise."""
        return {"label noise": f"{self.label_noise:.6g}"}

    def additive(self) -> Problem:
        """Replace the noise by its value at the minimum, v_i = h_i s2, for all weights.

        Returns
        -------
        Problem
            The same quadratic loss; its noise does not depend on the weights.
        """
        return Problem(
            self.curvature,
            self.label_noise * self.curvature,
            self.multiplicity,
            self.initial_mean,
            self.initial_variance,
            self.minimum,
            self.irreducible_loss,
        )

    def key(self) -> str:
        """Content key, equal for equal problems only.

        Returns
        -------
        str
            16 hexadecimal digits.
        """
        digest = hashlib.sha256(b"least squares")
        for name in _VECTORS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        digest.update(np.float64(self.label_noise).tobytes())
        return digest.hexdigest()[:16]


def any_problem(where: str, problem: object) -> Problem | LeastSquares:
    """Check that `problem` is a Problem or a LeastSquares.

    Parameters
    ----------
    where : str
        Name of the calling function, for the error message.
    problem : object
        Value that the user gave.

    Returns
    -------
    Problem or LeastSquares
        `problem` itself.

    Raises
    ------
    NQMError
        If it is anything else.
    """
    if not isinstance(problem, Problem | LeastSquares):
        raise NQMError(
            f"{where}: problem must be a Problem or a LeastSquares; got {shown(problem)}"
        )
    return problem


def additive_only(where: str, problem: object) -> Problem:
    """Check that `problem` has noise independent of the weights.

    Parameters
    ----------
    where : str
        Name of the calling function, for the error message.
    problem : object
        Value that the user gave.

    Returns
    -------
    Problem
        `problem` itself.

    Raises
    ------
    NQMError
        If it is a LeastSquares or anything else.
    """
    if isinstance(problem, LeastSquares):
        raise NQMError(
            f"{where} needs a Problem, whose noise does not depend on the weights; a LeastSquares "
            "has solve, sample, steady, stability_edge, best_lr, best_piecewise and "
            "steps_to_target, and its additive() is a Problem with the noise of the minimum"
        )
    if not isinstance(problem, Problem):
        raise NQMError(f"{where}: problem must be a Problem; got {shown(problem)}")
    return problem


def power_law(
    directions: int, alpha: float = 1.0, beta: float = 1.0, label_noise: float = 0.0
) -> LeastSquares:
    """Least squares with h_j = j^(-2 alpha) and w*_j = j^(-beta), started at w = 0.

    These are the source and capacity conditions of kernel regression.

    Parameters
    ----------
    directions : int
        Number d of directions.
    alpha, beta : float
        Exponents of the spectrum and of the target coefficients, >= 0.
    label_noise : float
        Variance of the labels about the best linear prediction, >= 0.

    Returns
    -------
    LeastSquares
        With `minimum` w* and the start at weights 0.

    Raises
    ------
    NQMError
        If an argument is out of range, or a curvature would underflow to 0.
    """
    check_integer("power_law.directions", directions, 1)
    check_memory("power_law.directions", directions, 6.0 * directions)
    curvature, target = power_laws(directions, alpha, beta, "power_law")
    return LeastSquares(curvature, label_noise, -target, 0.0, minimum=target)


def power_laws(size: int, alpha: float, beta: float, where: str) -> tuple[FloatArray, FloatArray]:
    """Compute a spectrum and a target that fall as powers of their index j = 1 ... size.

    Parameters
    ----------
    size : int
        Number of entries.
    alpha, beta : float
        Exponents, >= 0.
    where : str
        Name of the calling function, for the error message.

    Returns
    -------
    spectrum, target : ndarray, shape (size,)
        j^(-2 alpha) and j^(-beta).

    Raises
    ------
    NQMError
        If an exponent is negative, or the last entry of the spectrum would underflow to 0.
    """
    check_number(f"{where}.alpha", alpha, low=0.0)
    check_number(f"{where}.beta", beta, low=0.0)
    j = np.arange(1.0, size + 1)
    if not j[-1] ** (-2.0 * alpha) > 0.0:
        raise NQMError(f"{where}.alpha must leave curvatures above 0; got {alpha!r}")
    return j ** (-2.0 * alpha), j**-beta

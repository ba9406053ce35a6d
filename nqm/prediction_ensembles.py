"""What averaging the predictions of noisy copies of one model does to the cross-entropy.

K members have the weights w + e_k with independent errors e_k ~ (0, S). To second order in e,

    mean member           L + tr(HS) / 2
    mean of K weights     L + tr(HS) / (2 K)
    mean of K predictions L + tr(HS) / 2 - (1 - 1/K) tr(FS) / 2

with H the Hessian of the loss and F the mean of g g' over examples, g the gradient of one example's
loss, both on the data where the loss is measured: an example's log-probability varies by g'e, and
averaging probabilities gains half the variance of the log-probability that it averages away. Where
the predicted probabilities are right, tr(FS) = tr(HS) (Bartlett's identity), and no ensemble is
better than the model without errors. Where the model is too sure of itself, as on test data, F is
the larger one, and an ensemble of enough members gains.

The second half is about errors that rounding to a grid makes (low-precision ensembles, Nam & Lee
2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nqm.errors import NQMError, check_integer, check_number, check_word, shown
from nqm.problems.quadratic import FloatArray, finite_numbers


@dataclass(frozen=True)
class PredictionEnsemble:
    """Losses of members that are one model with independent errors on its weights.

    Leading order in the size of the errors; see the module for the formulas.

    Parameters
    ----------
    loss : float
        Mean cross-entropy L of the model without errors.
    hessian_trace : float
        tr(HS), twice the rise of one member's loss; negative only where L has negative curvature.
    gradient_trace : float
        tr(FS), the mean over examples of the variance of their loss, >= 0.

    Raises
    ------
    NQMError
        If a number is not finite, or `gradient_trace` is negative.
    """

    loss: float
    hessian_trace: float
    gradient_trace: float

    def __post_init__(self) -> None:
        check_number("PredictionEnsemble.loss", self.loss)
        check_number("PredictionEnsemble.hessian_trace", self.hessian_trace)
        check_number("PredictionEnsemble.gradient_trace", self.gradient_trace, low=0.0)

    @property
    def member_loss(self) -> float:
        """Expected loss of one member."""
        return self.loss + 0.5 * self.hessian_trace

    def ambiguity(self, members: int) -> float:
        """How far the ensemble of predictions is below its mean member.

        Parameters
        ----------
        members : int
            K >= 1.

        Returns
        -------
        float
            (1 - 1/K) tr(FS) / 2.
        """
        check_integer("members", members, 1)
        return 0.5 * (1.0 - 1.0 / members) * self.gradient_trace

    def ensemble_loss(self, members: int) -> float:
        """Expected loss of the mean of the members' predicted probabilities.

        Parameters
        ----------
        members : int
            K >= 1.

        Returns
        -------
        float
        """
        return self.member_loss - self.ambiguity(members)

    def weight_mean_loss(self, members: int) -> float:
        """Expected loss of the mean of the members' weights.

        Parameters
        ----------
        members : int
            K >= 1.

        Returns
        -------
        float
        """
        check_integer("members", members, 1)
        return self.loss + 0.5 * self.hessian_trace / members

    @property
    def break_even(self) -> float:
        """Members above which the ensemble is better than the model without errors.

        tr(FS) / (tr(FS) - tr(HS)); infinity where no number of members is enough.
        """
        apart = self.gradient_trace - self.hessian_trace
        return self.gradient_trace / apart if apart > 0.0 else math.inf


#: Ways to round weights to a grid: up with probability the fraction; to the nearest; two members
#: rounded by u and 1 - u; Gaussian errors with the variance of stochastic rounding.
ROUNDINGS = ("stochastic", "nearest", "antithetic", "gaussian")


def rounding_error(
    rounding: str, members: int = 1, fraction: ArrayLike | None = None
) -> float | FloatArray:
    """Mean square error of a weight, averaged over K rounded copies, in units of pitch^2.

    With f the fraction of a cell at which the weight lies and n = min(f, 1 - f): stochastic
    f (1 - f) / K, nearest n^2 for any K, K / 2 antithetic pairs (f (1 - f) - n^2) / K. The means
    over f are 1 / (6 K), 1 / 12 and 1 / (12 K).

    Parameters
    ----------
    rounding : {"stochastic", "nearest", "antithetic", "gaussian"}
        Gaussian errors have the variance of stochastic rounding.
    members : int
        Copies K >= 1, with independent errors but for antithetic pairs: then K is even.
    fraction : array_like, optional
        f, in [0, 1]; by default the mean over weights spread evenly over a cell.

    Returns
    -------
    float, or ndarray of the shape of `fraction`

    Raises
    ------
    NQMError
        On an unknown word, an odd number of antithetic members, or a fraction outside [0, 1].
    """
    check_word("rounding", rounding, ROUNDINGS)
    check_integer("members", members, 1)
    if rounding == "antithetic" and members % 2:
        raise NQMError(f"members must be even, as antithetic rounding makes pairs; got {members}")
    spread: float | FloatArray = 1.0 / 6.0
    nearest: float | FloatArray = 1.0 / 12.0
    if fraction is not None:
        f = finite_numbers("fraction", fraction)
        if not np.all((f >= 0.0) & (f <= 1.0)):
            raise NQMError(f"fraction must lie in [0, 1]; got {shown(fraction)}")
        spread, nearest = f * (1.0 - f), np.minimum(f, 1.0 - f) ** 2
    if rounding == "nearest":
        return nearest
    return (spread - nearest if rounding == "antithetic" else spread) / members


def rounding_cost(
    curvature: ArrayLike,
    pitch: ArrayLike,
    rounding: str,
    members: int = 1,
    fraction: ArrayLike | None = None,
) -> float:
    """Expected rise of a quadratic loss when K rounded copies of the weights are averaged.

    Half the sum of curvature * pitch^2 * `rounding_error`: for one model tr(H) pitch^2 / 12 if
    rounded stochastically, tr(H) pitch^2 / 24 to the nearest, and the mean of an antithetic pair
    tr(H) pitch^2 / 48, half that of two independent copies. The mean of two stochastic copies costs
    what one nearest copy does, and K copies of b bits need the memory of one of K b bits, whose
    pitch is 2^((K - 1) b) times finer: averaging rounded weights does not pay on a quadratic.

    Parameters
    ----------
    curvature : array_like
        Diagonal of the Hessian H in the coordinates that are rounded; its trace if `pitch` and
        `fraction` are the same for all.
    pitch : array_like
        Distance of the grid's points, >= 0; one, or one for each weight.
    rounding, members, fraction
        As for `rounding_error`.

    Returns
    -------
    float

    Raises
    ------
    NQMError
        As for `rounding_error`, and if shapes do not match or a number is not finite.
    """
    error = rounding_error(rounding, members, fraction)
    h, step = finite_numbers("curvature", curvature), finite_numbers("pitch", pitch)
    if not np.all(step >= 0.0):
        raise NQMError(f"pitch must be >= 0; got {shown(pitch)}")
    try:
        return float(0.5 * np.sum(h * step**2 * error))
    except ValueError:
        raise NQMError(
            f"curvature, pitch and fraction must have one shape; got {h.shape}, {step.shape} and "
            f"{np.shape(error)}"
        ) from None

"""The long run of multiplicative late-phase weights: noise balances the two factors.

The loss depends on w_k = theta phi_k alone, so all pairs with theta phi = w* form a valley. The
exact drift of theta^2 / (gamma lr) - sum phi_k^2 / member_lr,

    gamma lr G^2 - member_lr theta^2 sum g_k^2,      G = sum phi_j g_j,

has mean zero at one point of the valley, where the pair settles after a time of order
1 / (lr^2 v): with a = member_lr theta^2, b = gamma lr phi^2 and lambda = a + K b,

    b K^2 E gbar^2 = a K E g_k^2,
    E gbar^2 = (v / K) 2 / (2 - lambda h),   E g_k^2 = E gbar^2 + v (1 - 1 / K) 2 / (2 - a h).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.errors import NQMError, check_number
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.result import Kind


@dataclass(frozen=True)
class Balance:
    """Long-run floor of multiplicative late-phase weights.

    Attributes
    ----------
    ratio : ndarray, shape (d,)
        theta^2 / phi^2 at the balance point.
    effective_lr, effective_member_lr : ndarray, shape (d,)
        Effective rate lambda = a + K b of the mean model, and a of a member, at that point.
    loss, member_loss : float
        Steady loss of the mean model and of the average member there, to first order in v.
    kind : Kind
        LONG_RUN.
    """

    ratio: FloatArray
    effective_lr: FloatArray
    effective_member_lr: FloatArray
    loss: float
    member_loss: float
    kind: Kind = field(default=Kind.LONG_RUN)


def balance_point(
    problem: Problem,
    algorithm: MultiplicativeLatePhase,
    lr: float,
    member_lr: float | None = None,
    *,
    batch_size: float = 1,
) -> Balance:
    """Compute the point to which noise drives theta and phi in the long run, and its loss.

    At small rates a = b, so ``lambda -> (K + 1) |w*| sqrt(gamma lr member_lr)``: with
    gamma = 1 / K and equal rates the mean model's floor falls like K^(-1/2), not like 1 / K.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares) with minimum w* != 0 in every direction.
    algorithm : MultiplicativeLatePhase
        With coupling "elementwise" and gamma > 0.
    lr : float
        Constant learning rate of the base weights theta, > 0.
    member_lr : float, optional
        Constant learning rate of the members' factors phi_k, > 0; equal to `lr` by default.
    batch_size : float
        Examples of one minibatch, > 0.

    Returns
    -------
    Balance
        Balance point and steady losses there.

    Raises
    ------
    NQMError
        For a scalar factor, gamma = 0, w* = 0, or rates without a stable balance point.
    """
    problem = additive_only("balance_point", problem)
    if not isinstance(algorithm, MultiplicativeLatePhase):
        raise NQMError(
            "balance_point.algorithm must be a MultiplicativeLatePhase; "
            f"got {type(algorithm).__name__}"
        )
    if algorithm.scalar:
        raise NQMError("the balance point is derived for coupling = 'elementwise' only")
    algorithm.check(problem)
    member_lr = lr if member_lr is None else member_lr
    check_number("balance.lr", lr, low=0.0, closed_low=False)
    check_number("balance.member_lr", member_lr, low=0.0, closed_low=False)
    check_number("balance.batch_size", batch_size, low=0.0, closed_low=False)
    k, scaled = algorithm.members, algorithm.base_scale * lr
    if scaled == 0.0:
        raise NQMError("the balance point needs gamma > 0; with gamma = 0 theta does not change")
    ratio = np.array(
        [
            _ratio(h, abs(w), k, scaled, member_lr)
            for h, w in zip(problem.curvature, problem.minimum, strict=True)
        ]
    )
    size = np.abs(problem.minimum)
    a = member_lr * size * np.sqrt(ratio)
    rate = a + k * scaled * size / np.sqrt(ratio)
    h, v = problem.curvature, problem.noise_variance / batch_size
    # weight * variance with h cancelled, so that flat directions give their limit.
    half = 0.5 * problem.multiplicity * v
    loss = half * rate / (k * (2.0 - rate * h))
    deviation = half * a * (1.0 - 1.0 / k) / (2.0 - a * h)
    curved = h > 0
    return Balance(
        ratio=ratio,
        effective_lr=rate,
        effective_member_lr=a,
        loss=float(loss[curved].sum()),
        member_loss=float((loss + deviation)[curved].sum()),
    )


def _ratio(h: float, size: float, k: int, scaled: float, member_lr: float) -> float:
    """theta^2 / phi^2 of one direction, by root search on its logarithm."""
    if h == 0.0:
        return scaled / member_lr
    pull, push = member_lr * size, k * scaled * size

    def drift(log_ratio: float) -> float:
        root = np.exp(0.5 * log_ratio)
        a, b = pull * root, push / (k * root)
        mean = 2.0 / (k * (2.0 - (a + k * b) * h))
        member = mean + (1.0 - 1.0 / k) * 2.0 / (2.0 - a * h)
        return float(np.log(b * k * mean) - np.log(a * member))

    # lambda = pull r + push / r with r = theta / phi; it is stable between the roots of
    # lambda h = 2. At the lower one b K > a and the drift is positive, at the upper one negative.
    inside = 1.0 - pull * push * h * h
    if inside <= 0.0:
        raise NQMError(
            f"no stable balance point along curvature {h:.3g}: lambda h >= "
            f"{2 * np.sqrt(pull * push) * h:.3g} everywhere; lower lr, member_lr or gamma"
        )
    upper = (1.0 + np.sqrt(inside)) / (h * pull)
    lower = push / (pull * upper)
    margin = 1e-9 * np.log(upper / lower)
    low, high = 2 * np.log(lower) + margin, 2 * np.log(upper) - margin
    return float(np.exp(brentq(drift, low, high, xtol=1e-13)))

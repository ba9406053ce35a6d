"""How far the first order of multiplicative late-phase weights is off: an estimate, not a bound.

About theta phi = w* the mean model descends at the rate lambda = a + K b with a = member_lr
theta^2 and b = gamma lr phi^2, and a member's deviation at the rate a. The first order keeps these
rates. In truth they become a y and K b / y with y = theta^2 phi0^2 / (theta0^2 phi^2)^(1/2):

- Noise drifts log y. With Q = theta^2 / (gamma lr) - sum phi_k^2 / member_lr, dQ / dlog y = w*^2
  (1 / b + K / a), and E Delta Q is known at quasi-steady noise
  (`nqm.solvers.multiplicative_long_run`).
- A start off the minimum by x sets out with theta0^2 = (w* + x)^2 / factor^2, and descent keeps Q:
  a y^2 - (a (1 + x / w*)^2 - K b) y - K b = 0. Its loss decays at another rate, and it arrives at
  another floor.
- Mean squares of the noise are not small beside w*^2.

Starts are followed at Gauss-Hermite nodes. The tests compare the estimate with the moment closure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.problems.correlation import covariance
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, goes_on

#: Largest estimated relative error of a first-order loss that counts as within its range.
WITHIN = 0.05
#: Settings looked at between two records.
LOOKS = 16
_Z, _WEIGHT = np.polynomial.hermite_e.hermegauss(5)
_SHARE = _WEIGHT / np.sqrt(2.0 * np.pi)


@dataclass
class _Members:
    """Estimates since the members' start, for one factor per direction; arrays (nodes, d) or (d,).

    Attributes
    ----------
    problem, algorithm
        As in the phase.
    share : ndarray, shape (nodes, 1)
        Probability of a start.
    along, across : ndarray
        (1 + x / w*)^2, and K phi^2 / factor^2 of the members' mean, by start.
    mean_square : ndarray
        Square of the mean model's first displacement, by start.
    log_first, log_last, log_apart : ndarray
        Sums of log (1 - rate h)^2 with the first rate, the last rate, and a member's own.
    log_kept, log_kept_apart : ndarray, shape (d,)
        The same sums of the first order.
    drift : ndarray, shape (d,)
        Change of log y due to noise.
    """

    problem: Problem
    algorithm: MultiplicativeLatePhase
    share: FloatArray
    along: FloatArray
    across: FloatArray
    mean_square: FloatArray
    log_first: FloatArray
    log_last: FloatArray
    log_apart: FloatArray
    log_kept: FloatArray
    log_kept_apart: FloatArray
    drift: FloatArray
    settings: FloatArray

    @classmethod
    def start(
        cls,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        mean: FloatArray,
        variance: FloatArray,
    ) -> _Members:
        w = _minimum(problem)
        sd = np.sqrt(algorithm.spread / algorithm.members)
        zs = (_Z, _Z if algorithm.spread else np.zeros(1))
        x, zeta = (part.reshape(-1, 1) for part in np.meshgrid(*zs, indexing="ij"))
        shares = _SHARE, _SHARE if algorithm.spread else np.ones(1)
        along = 1.0 + (mean + np.sqrt(variance) * x) / w
        across = 1.0 + sd * zeta + 0.0 * along
        zeros = np.zeros_like(along)
        flat = np.zeros(problem.directions)
        return cls(
            problem, algorithm, np.outer(*shares).reshape(-1, 1), along**2,
            across**2 + algorithm.spread * (1.0 - 1.0 / algorithm.members),
            w**2 * (along * across - 1.0) ** 2, zeros, zeros, zeros, flat, flat, flat,
            np.zeros(3),
        )  # fmt: skip

    def rates(self, settings: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A and K b of the first order, (d,)."""
        lr, member_lr, _ = settings
        algorithm, square = self.algorithm, _minimum(self.problem) ** 2
        kb = algorithm.members * algorithm.base_scale * lr * algorithm.factor**2
        return member_lr * square / algorithm.factor**2, np.full_like(square, kb)

    def arrival(self, a: FloatArray, kb: FloatArray) -> FloatArray:
        """Y at which descent arrives, by start."""
        q, product = a * self.along - kb * self.across, a * kb
        root = np.sqrt(q**2 + 4.0 * product)
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.where(q > 0.0, (q + root) / (2.0 * a), 2.0 * kb / (root - q))
        return np.where(a + kb > 0.0, np.where(np.isfinite(y), y, self.along), 1.0)

    def advance(self, settings: FloatArray, steps: float) -> None:
        """Take `steps` steps at (lr, member_lr, batch size)."""
        h, k = self.problem.curvature, self.algorithm.members
        a, kb = self.rates(settings)
        y = self.arrival(a, kb)

        def fall(rate: FloatArray) -> FloatArray:
            with np.errstate(divide="ignore"):
                return np.asarray(2.0 * steps * np.log(np.abs(1.0 - rate * h)))

        self.log_first = self.log_first + fall(a * self.along + kb * self.across)
        self.log_last = self.log_last + fall(a * y + kb / y)
        self.log_apart = self.log_apart + fall(a * y)
        self.log_kept = self.log_kept + fall(a + kb)
        self.log_kept_apart = self.log_kept_apart + fall(a)
        v = self.problem.noise_variance / settings[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            g_mean = 2.0 * v / (k * (2.0 - (a + kb) * h))
            g_member = g_mean + 2.0 * v * (1.0 - 1.0 / k) / (2.0 - a * h)
            speed = a * kb / ((a + kb) * _minimum(self.problem) ** 2)
            slide = np.where(a * kb > 0.0, speed * (kb * g_mean - a * g_member), 0.0)
        self.drift = self.drift + steps * slide
        self.settings = settings

    def error(self, second: FloatArray, member_second: FloatArray) -> float:
        """Estimated relative error of the loss or the average member's, the larger one.

        `second` and `member_second` are first-order second moments of mean model and deviation.
        """
        h, weight, k = self.problem.curvature, self.problem.weight, self.algorithm.members
        a, kb = self.rates(self.settings)
        y = self.arrival(a, kb)

        def floors(y: FloatArray) -> tuple[FloatArray, FloatArray]:
            rate, own = a * y + kb / y, a * y
            with np.errstate(divide="ignore", invalid="ignore"):
                found = rate / (2.0 - rate * h), own / (2.0 - own * h)
            return found[0], found[1]

        w_square = _minimum(self.problem) ** 2
        start = float(np.sum(self.share * self.mean_square, axis=0) @ weight)
        del start
        kept = np.sum(self.share * self.mean_square, axis=0) * np.exp(self.log_kept)
        moved = [
            np.abs(np.sum(self.share * self.mean_square * np.exp(log), axis=0) - kept)
            for log in (self.log_first, self.log_last)
        ]
        apart = w_square * self.algorithm.spread * (1.0 - 1.0 / k)
        kept_apart = apart * np.exp(self.log_kept_apart)
        moved_apart = np.abs(apart * np.sum(self.share * np.exp(self.log_apart), axis=0) - kept_apart)
        noise = np.maximum(second - kept, 0.0)
        noise_apart = np.maximum(member_second - kept_apart, 0.0)
        near = (noise + noise_apart) / w_square
        off = []
        for before, after, drifted in zip(
            floors(np.ones(1)), floors(y), floors(np.exp(np.clip(self.drift, -3, 3))), strict=True
        ):
            with np.errstate(divide="ignore", invalid="ignore"):
                part = np.abs(np.sum(self.share * after, axis=0) / before - 1.0)
                part = part + np.abs(drifted / before - 1.0)
            off.append(np.where(before > 0.0, part, 0.0) + near)
        change = weight @ (np.maximum(*moved) + noise * off[0])
        member_change = change + weight @ (moved_apart + noise_apart * off[1])
        loss, member_loss = weight @ second, weight @ (second + member_second)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.array([change / loss, member_change / member_loss])
        return float(np.where(np.isnan(found), np.inf, found).max()) if loss > 0.0 else 0.0


def _minimum(problem: Problem) -> FloatArray:
    """W*, and 1 where there is no curvature, whose value has no effect."""
    return np.where(problem.curvature > 0.0, problem.minimum, 1.0)

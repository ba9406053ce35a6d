"""The distribution of the loss over runs, without simulation.

With Gaussian weights the loss sum_i m_i h_i x_i^2 / 2 is a weighted sum of non-central
chi-squares. Its distribution function is an integral over the characteristic function
(Imhof 1961, "Computing the distribution of quadratic forms in normal variables", eq. 3.2).
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

from nqm.errors import check_number
from nqm.problem import FloatArray, Problem

#: Quantiles this far out are beyond the integral's accuracy.
TAIL = 1e-6
#: Below this size the integrand's amplitude no longer matters.
NEGLIGIBLE = 1e-11


class LossDistribution:
    """Distribution of the loss for independent Gaussian directions.

    Parameters
    ----------
    problem : Problem
    mean, variance : ndarray, shape (d,)
        Moments of the weights' displacement by direction.
    """

    def __init__(self, problem: Problem, mean: FloatArray, variance: FloatArray):
        moving = (problem.weight > 0) & (variance > 0)
        still = (problem.weight > 0) & ~moving
        self.offset = float(problem.weight[still] @ mean[still] ** 2)
        scale = 0.5 * problem.curvature[moving] * variance[moving]
        self.count = problem.multiplicity[moving]
        self.shift = mean[moving] ** 2 / variance[moving]
        self.mean = float(np.sum(self.count * scale * (1.0 + self.shift)))
        self.sd = float(np.sqrt(np.sum(2.0 * self.count * scale**2 * (1.0 + 2.0 * self.shift))))
        # In units of its own standard deviation from here on.
        self.scale = scale / self.sd if self.sd else scale

    def _polar(self, u: float) -> tuple[float, float]:
        """Phase and modulus of the characteristic function in Imhof's form."""
        x = self.scale * u
        x2 = x * x
        phase = 0.5 * np.sum(self.count * (np.arctan(x) + self.shift * x / (1.0 + x2)))
        size = 0.5 * np.sum(self.count * (0.5 * np.log1p(x2) + self.shift * x2 / (1.0 + x2)))
        return float(phase), float(np.exp(-size))

    def cdf(self, loss: float) -> float:
        """Probability that the loss is at most `loss`."""
        if not self.sd:
            return float(loss >= self.offset)
        x = (loss - self.offset) / self.sd
        if x <= 0.0:
            return 0.0

        def whole(u: float) -> float:
            phase, size = self._polar(u)
            return float(np.sin(phase - 0.5 * x * u)) * size / u

        def part(wave: str, u: float) -> float:
            phase, size = self._polar(u)
            return float(np.sin(phase) if wave == "cos" else -np.cos(phase)) * size / u

        end = 1.0
        while self._polar(end)[1] / end > NEGLIGIBLE and end < 64.0:
            end *= 2.0
        total = quad(whole, 0.0, end, limit=400, epsabs=1e-10)[0]
        if self._polar(end)[1] / end > NEGLIGIBLE:
            # Few directions: the modulus falls slowly, so the rest is a Fourier integral with a
            # smooth amplitude, sin(phase - w u) = sin(phase) cos(w u) - cos(phase) sin(w u).
            for wave in ("cos", "sin"):
                total += quad(
                    lambda u, wave=wave: part(wave, u), end, np.inf,
                    weight=wave, wvar=0.5 * x, limlst=200, epsabs=1e-10,
                )[0]  # fmt: skip
        return float(np.clip(0.5 - total / np.pi, 0.0, 1.0))

    def quantile(self, level: float) -> float:
        """Loss that a share `level` of runs stays below."""
        check_number("quantile.level", level, low=TAIL, high=1.0 - TAIL)
        if not self.sd:
            return self.offset
        low, high = self.offset, self.offset + self.mean + 4.0 * self.sd
        while self.cdf(high) < level:
            high += 8.0 * self.sd
        root = brentq(
            lambda x: self.cdf(x) - level, low, high, xtol=1e-9 * self.sd + 1e-300, rtol=1e-10
        )
        return float(root)


def loss_quantile(problem: Problem, mean: FloatArray, variance: FloatArray, level: float) -> float:
    """Quantile of the loss for Gaussian weights with these moments by direction."""
    return LossDistribution(problem, mean, variance).quantile(level)

"""Moments of multiplicative late-phase weights with one factor per direction, taken as Gaussian.

Members are exchangeable: phi_k = phibar + d_k, where the d_k are independent of theta and phibar,
and only S = sum d_k^2 acts on theta. With E S = (K - 1) D, Var S = 2 (K - 1) D^2 for
D = Var phi_k - Cov(phi_k, phi_l), and with b = lr gamma and a = member_lr,

    theta'  = theta (1 - b h (K phibar^2 + S)) + b h w* K phibar - b sum phi_j e_j
    phibar' = phibar (1 - a h theta^2) + a h w* theta - a theta ebar
    d_k'    = d_k (1 - a h theta^2) - a theta (e_k - ebar).

So six numbers per direction serve any K: the means and covariances of (theta, phibar), and D.
Expectations over (theta, phibar) are sums over Gauss-Hermite nodes, which are exact for them.

Descent takes every start to the hyperbola theta phibar = w*, to a place that depends on the start.
A Gaussian spread along a hyperbola would have a loss of its own, so that the moments are followed
apart for every start at Gauss-Hermite nodes of the weights and of the members' mean factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.problems.quadratic import FloatArray, Problem
from nqm.words import short_html, short_repr

_Z, _WEIGHT = np.polynomial.hermite_e.hermegauss(5)  # exact up to degree 9
_FIRST, _SECOND = (part.reshape(-1, 1) for part in np.meshgrid(_Z, _Z, indexing="ij"))
_FIRST, _SECOND = _FIRST[:, :, None], _SECOND[:, :, None]
_SHARE = np.outer(_WEIGHT, _WEIGHT).ravel() / (2.0 * np.pi)


def _mean(values: FloatArray) -> FloatArray:
    """Expectation over the nodes, (25, starts, d) to (starts, d)."""
    return np.tensordot(_SHARE, values, axes=1)


def start_nodes(weights: bool, factors: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nodes of the random start: of the weights, and of the members' mean factor.

    Parameters
    ----------
    weights, factors : bool
        Whether each of them is random.

    Returns
    -------
    share : ndarray, shape (starts,)
        Probabilities.
    weight, factor : ndarray, shape (starts, 1)
        Standard normal variables at the nodes.
    """
    one = np.zeros(1), np.ones(1)
    normal = _Z, _WEIGHT / np.sqrt(2.0 * np.pi)
    (x, p), (y, q) = (normal if drawn else one for drawn in (weights, factors))
    first, second = np.meshgrid(x, y, indexing="ij")
    return np.outer(p, q).ravel(), first.reshape(-1, 1), second.reshape(-1, 1)


@dataclass(frozen=True)
class Elementwise:
    """Moments of (theta, phibar) and of the members' deviation by start, arrays (starts, d).

    Attributes
    ----------
    share : ndarray, shape (starts,)
        Probability of each start.
    theta, phi : ndarray, shape (starts, d)
        Means.
    var_theta, cross, var_phi : ndarray, shape (starts, d)
        Covariance.
    apart : ndarray, shape (starts, d)
        D, the variance of a member's factor less the covariance of two of them.
    """

    share: FloatArray
    theta: FloatArray
    phi: FloatArray
    var_theta: FloatArray
    cross: FloatArray
    var_phi: FloatArray
    apart: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def start(
        cls,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        mean: FloatArray,
        covariance: FloatArray,
    ) -> Elementwise:
        """Begin members: theta = w / factor, phi_k = factor (1 + sqrt(spread) normal).

        Parameters
        ----------
        problem : Problem
            Gives the minimum.
        algorithm : MultiplicativeLatePhase
            Gives factor, spread and members.
        mean : ndarray, shape (d,)
            Mean of the weights' distance from the minimum.
        covariance : ndarray, shape (d, d) or (d,)
            Their covariance, or its diagonal; the rest has no effect.

        Returns
        -------
        Elementwise
        """
        factor, spread = algorithm.factor, algorithm.spread
        variance = covariance if covariance.ndim == 1 else np.diag(covariance)
        share, x, offset = start_nodes(bool(np.any(variance > 0.0)), spread > 0.0)
        zeros = np.zeros((len(share), problem.directions))
        return cls(
            share=share,
            theta=(problem.minimum + mean + np.sqrt(variance) * x) / factor,
            phi=zeros + factor * (1.0 + np.sqrt(spread / algorithm.members) * offset),
            var_theta=zeros,
            cross=zeros,
            var_phi=zeros,
            apart=zeros + factor**2 * spread,
        )

    def _nodes(self) -> tuple[FloatArray, FloatArray]:
        """Values of theta and phibar at the nodes, (25, starts, d)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            top = np.sqrt(self.var_theta)
            lower = np.where(top > 0.0, self.cross / top, 0.0)
            rest = np.sqrt(np.maximum(self.var_phi - lower**2, 0.0))
        return self.theta + top * _FIRST, self.phi + lower * _FIRST + rest * _SECOND

    def step(
        self,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        lr: float,
        member_lr: float,
        batch_size: float,
    ) -> Elementwise:
        """Take one step.

        Parameters
        ----------
        problem : Problem
            Noisy quadratic problem.
        algorithm : MultiplicativeLatePhase
            The method.
        lr, member_lr, batch_size : float
            Settings of the step.

        Returns
        -------
        Elementwise
            Moments after it.
        """
        k, b, h, w = (
            algorithm.members,
            algorithm.base_scale * lr,
            problem.curvature,
            problem.minimum,
        )
        v, spread = problem.noise_variance / batch_size, (algorithm.members - 1) * self.apart
        theta, phi = self._nodes()
        kept = 1.0 - member_lr * h * theta**2
        pull = b * h * theta
        new_theta = theta - pull * (k * phi**2 + spread) + b * h * w * k * phi  # S at its mean
        new_phi = kept * phi + member_lr * h * w * theta
        mean_theta, mean_phi = _mean(new_theta), _mean(new_phi)
        off_theta, off_phi = new_theta - mean_theta, new_phi - mean_phi
        square_theta = _mean(theta**2)
        scatter = 2.0 * spread * self.apart  # Var S
        return Elementwise(
            share=self.share,
            theta=mean_theta,
            phi=mean_phi,
            var_theta=_mean(off_theta**2 + pull**2 * scatter)
            + b**2 * v * (k * _mean(phi**2) + spread),
            cross=_mean(off_theta * off_phi) + b * member_lr * v * _mean(theta * phi),
            var_phi=_mean(off_phi**2) + member_lr**2 * v / k * square_theta,
            apart=_mean(kept**2) * self.apart + member_lr**2 * v * square_theta,
        )

    def weights(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        """Moments of the mean model's distance from the minimum.

        Parameters
        ----------
        problem : Problem
            Gives the minimum.

        Returns
        -------
        mean, variance : ndarray, shape (d,)
        """
        theta, phi = self._nodes()
        off = theta * phi - problem.minimum
        mean = self.share @ _mean(off)
        return mean, self.share @ _mean((off - mean) ** 2)

    def losses(
        self, problem: Problem, algorithm: MultiplicativeLatePhase
    ) -> tuple[float, float, float]:
        """Loss of the mean model and of the average member, and the first's standard deviation.

        Parameters
        ----------
        problem : Problem
            Noisy quadratic problem.
        algorithm : MultiplicativeLatePhase
            Gives the number of members.

        Returns
        -------
        loss, member_loss, loss_sd : float
            The last is NaN for correlated directions.
        """
        theta, phi = self._nodes()
        square = (theta * phi - problem.minimum) ** 2
        mean = self.share @ _mean(square)
        apart = (1.0 - 1.0 / algorithm.members) * (self.share @ (self.apart * _mean(theta**2)))
        variance = 0.25 * problem.curvature**2 * (self.share @ _mean((square - mean) ** 2))
        sd = np.nan if problem.correlated else float(np.sqrt(problem.multiplicity @ variance))
        weight = problem.weight
        return float(weight @ mean), float(weight @ (mean + apart)), sd

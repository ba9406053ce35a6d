"""Moments of multiplicative late-phase weights with one factor for all directions, as Gaussian.

The factor couples the directions, so that the covariance of theta is dense. With phi_k = phibar +
d_k, S = sum d_k^2 and D as in `nqm.solvers.closure_elementwise`, and N = theta' H theta,

    theta'  = theta (1 - b h (K phibar^2 + S)) + b h w* K phibar - b sum phi_j e_j
    phibar' = phibar (1 - a N) + a theta' H w* - a theta' ebar
    d_k'    = d_k (1 - a N) - a theta' (e_k - ebar).

Given phibar, theta is Gaussian with a mean linear in phibar and a fixed covariance P, theta' is
linear in theta and phibar' quadratic, whose moments are closed forms; the expectation over phibar
is a sum over Gauss-Hermite nodes. Both are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.problems import correlation
from nqm.problems.quadratic import FloatArray, Problem
from nqm.solvers.closure_elementwise import start_nodes
from nqm.words import short_html, short_repr

_Z, _WEIGHT = np.polynomial.hermite_e.hermegauss(5)  # exact up to degree 9
_SHARE = _WEIGHT / np.sqrt(2.0 * np.pi)


@dataclass(frozen=True)
class Scalar:
    """Moments of theta (d,) and phibar, and of the members' deviation.

    Attributes
    ----------
    theta : ndarray, shape (d,)
        Mean of the base weights.
    phi : float
        Mean of the members' mean factor.
    var_theta : ndarray, shape (d, d)
        Covariance of the base weights.
    cross : ndarray, shape (d,)
        Covariance of base weights and mean factor.
    var_phi, apart : float
        Variance of the mean factor; D, the variance of one factor less the covariance of two.
    """

    theta: FloatArray
    phi: float
    var_theta: FloatArray
    cross: FloatArray
    var_phi: float
    apart: float

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def starts(
        cls,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        mean: FloatArray,
        covariance: FloatArray,
    ) -> tuple[FloatArray, list[Scalar]]:
        """Begin members: theta = w / factor, phi_k = factor (1 + sqrt(spread) normal).

        Descent takes every start to theta phibar = w*, to a place that depends on w*' w and on
        phibar. Both are conditioned on.

        Parameters
        ----------
        problem : Problem
            Gives the minimum.
        algorithm : MultiplicativeLatePhase
            Gives factor, spread and members.
        mean : ndarray, shape (d,)
            Mean of the weights' distance from the minimum.
        covariance : ndarray, shape (d, d) or (d,)
            Their covariance; a diagonal alone stands for independent directions.

        Returns
        -------
        share : ndarray, shape (starts,)
            Probabilities.
        list of Scalar
            Moments for each start.
        """
        factor, spread = algorithm.factor, algorithm.spread
        dense = covariance if covariance.ndim == 2 else np.diag(covariance)
        with np.errstate(invalid="ignore"):
            toward = dense @ problem.minimum / np.sqrt(problem.minimum @ dense @ problem.minimum)
        drawn = bool(np.isfinite(toward).all())
        toward = toward if drawn else np.zeros(problem.directions)
        share, x, offset = start_nodes(drawn, spread > 0.0)
        size = np.sqrt(spread / algorithm.members)
        rest = (dense - np.outer(toward, toward)) / factor**2
        zeros = np.zeros(problem.directions)
        return share, [
            cls(
                theta=(problem.minimum + mean + toward * along) / factor,
                phi=factor * (1.0 + size * of_phi),
                var_theta=rest,
                cross=zeros,
                var_phi=0.0,
                apart=factor**2 * spread,
            )
            for along, of_phi in zip(x.ravel().tolist(), offset.ravel().tolist(), strict=True)
        ]

    def _given_phi(self) -> tuple[FloatArray, Iterator[tuple[float, float, FloatArray]]]:
        """P, and by node its probability, phibar and the mean of theta given phibar."""
        slope = self.cross / self.var_phi if self.var_phi > 0.0 else 0.0 * self.cross
        rest = self.var_theta - np.outer(slope, self.cross)
        off = np.sqrt(max(self.var_phi, 0.0)) * _Z
        return rest, (
            (share, self.phi + x, self.theta + slope * x)
            for share, x in zip(_SHARE.tolist(), off.tolist(), strict=True)
        )

    def step(
        self,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        lr: float,
        member_lr: float,
        batch_size: float,
    ) -> Scalar:
        """Take one step.

        Parameters
        ----------
        problem : Problem
            Noisy quadratic problem of multiplicity 1.
        algorithm : MultiplicativeLatePhase
            The method.
        lr, member_lr, batch_size : float
            Settings of the step.

        Returns
        -------
        Scalar
            Moments after it.
        """
        k, b, a = algorithm.members, algorithm.base_scale * lr, member_lr
        h, w = problem.curvature, problem.minimum
        v = correlation.covariance(problem.noise_correlation, problem.noise_variance) / batch_size
        spread = (k - 1) * self.apart
        scatter = 2.0 * spread * self.apart  # Var S
        rest, nodes = self._given_phi()
        bent = rest * h  # P H
        trace, squared = np.trace(bent), np.sum(bent * bent.T)
        pulled = bent @ w  # P H w*
        c_square = (h * w) @ pulled
        raw = self.var_theta + np.outer(self.theta, self.theta)  # E theta theta'

        means, shares = [], []
        var_theta, cross = np.zeros_like(raw), np.zeros_like(h)
        var_phi = square_kept = square_phi = 0.0
        phi_theta = np.zeros_like(h)
        for share, phi, mu in nodes:
            moved = bent @ mu  # P H mu
            n_mean, n_square = mu @ (h * mu) + trace, 2.0 * squared + 4.0 * (h * mu) @ moved
            n_c = 2.0 * (h * w) @ moved  # Cov(N, theta' H w*)
            r = 1.0 - b * h * (k * phi**2 + spread)
            new_theta = r * mu + b * h * k * phi * w
            new_phi = phi * (1.0 - a * n_mean) + a * (mu @ (h * w))
            means.append(np.append(new_theta, new_phi))
            shares.append(share)
            var_theta += share * np.outer(r, r) * rest
            cross += share * r * (a * pulled - 2.0 * a * phi * moved)
            var_phi += float(share * a**2 * (phi**2 * n_square - 2.0 * phi * n_c + c_square))
            square_kept += float(share * ((1.0 - a * n_mean) ** 2 + a**2 * n_square))
            square_phi += share * phi**2
            phi_theta += share * phi * mu
        between = np.array(means)
        mean = np.array(shares) @ between
        between = between - mean
        dense = (between.T * np.array(shares)) @ between
        var_theta += dense[:-1, :-1] + b**2 * scatter * np.outer(h, h) * raw
        var_theta += b**2 * (k * square_phi + spread) * v
        along = float(np.sum(v * raw))  # E theta' v theta
        return Scalar(
            theta=mean[:-1],
            phi=float(mean[-1]),
            var_theta=var_theta,
            cross=cross + dense[:-1, -1] + a * b * (v @ phi_theta),
            var_phi=float(var_phi + dense[-1, -1] + a**2 * along / k),
            apart=float(square_kept * self.apart + a**2 * along),
        )

    def weights(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        """Moments of the mean model's distance from the minimum.

        Parameters
        ----------
        problem : Problem
            Gives the minimum.

        Returns
        -------
        mean : ndarray, shape (d,)
        covariance : ndarray, shape (d, d)
        """
        rest, nodes = self._given_phi()
        found = [(share, phi, phi * mu - problem.minimum) for share, phi, mu in nodes]
        mean = np.sum([share * off for share, _, off in found], axis=0)
        covariance = np.zeros_like(rest)
        for share, phi, off in found:
            covariance += share * (phi**2 * rest + np.outer(off - mean, off - mean))
        return mean, covariance

    def losses(
        self, problem: Problem, algorithm: MultiplicativeLatePhase
    ) -> tuple[float, float, float]:
        """Loss of the mean model and of the average member, and the mean square of the first.

        Parameters
        ----------
        problem : Problem
            Noisy quadratic problem.
        algorithm : MultiplicativeLatePhase
            Gives the number of members.

        Returns
        -------
        loss, member_loss, square : float
            The last is the mean square of the first.
        """
        h = problem.curvature
        rest, nodes = self._given_phi()
        bent = rest * h
        trace, squared = np.trace(bent), np.sum(bent * bent.T)
        loss = square = 0.0
        for share, phi, mu in nodes:
            off = h * (phi * mu - problem.minimum)
            mean = 0.5 * (off @ (phi * mu - problem.minimum) + phi**2 * trace)
            variance = 0.5 * phi**4 * squared + phi**2 * off @ rest @ off
            loss += share * mean
            square += share * (mean**2 + variance)
        theta_square = self.theta**2 + np.diag(self.var_theta)
        apart = (1.0 - 1.0 / algorithm.members) * self.apart * 0.5 * float(h @ theta_square)
        return float(loss), float(loss + apart), float(square)


@dataclass(frozen=True)
class Mixture:
    """Moments for several starts, with their probabilities.

    Attributes
    ----------
    share : ndarray, shape (starts,)
        Probabilities.
    parts : list of Scalar
        Moments for each start.
    """

    share: FloatArray
    parts: list[Scalar]

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def start(
        cls,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        mean: FloatArray,
        covariance: FloatArray,
    ) -> Mixture:
        """Begin members from weights of given moments; parameters as in `Scalar.starts`.

        Parameters
        ----------
        problem, algorithm, mean, covariance
            See `Scalar.starts`.

        Returns
        -------
        Mixture
        """
        return cls(*Scalar.starts(problem, algorithm, mean, covariance))

    def step(
        self,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        lr: float,
        member_lr: float,
        batch_size: float,
    ) -> Mixture:
        """Take one step; parameters as in `Scalar.step`.

        Parameters
        ----------
        problem, algorithm, lr, member_lr, batch_size
            See `Scalar.step`.

        Returns
        -------
        Mixture
        """
        settings = algorithm, lr, member_lr, batch_size
        return Mixture(self.share, [part.step(problem, *settings) for part in self.parts])

    def weights(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        """Moments of the mean model's distance from the minimum.

        Parameters
        ----------
        problem : Problem
            Gives the minimum.

        Returns
        -------
        mean : ndarray, shape (d,)
        covariance : ndarray, shape (d, d)
        """
        means, covariances = zip(*(part.weights(problem) for part in self.parts), strict=True)
        mean = self.share @ np.array(means)
        between = np.array(means) - mean
        inside = np.tensordot(self.share, np.array(covariances), axes=1)
        return mean, inside + (between.T * self.share) @ between

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
        """
        each = np.array([part.losses(problem, algorithm) for part in self.parts])
        loss, member_loss, square = self.share @ each
        return float(loss), float(member_loss), float(np.sqrt(max(square - loss**2, 0.0)))

"""Curvature and gradient noise averaged over the Gaussian of the weights in one training.

To leading order in lr / B, three things change the averages: the covariance of the weights, the
displacement of their mean by the noise (`neural.bridge.drift`), which is of the same order, and the
displacement by noise-free descent. The change is measured in one training
(`neural.bridge.measure_smoothing`). For any other training the change with the covariance is scaled
with it, that with the mean and that of curvature with the displacements, and that of noise along
descent with its trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neural.bridge.config import Training
from neural.bridge.drift import Drift, descended
from neural.bridge.noise_free_path import NoiseFreePath
from neural.bridge.scatter import covariance, rest_trace
from neural.bridge.shared_base import mean_model
from neural.curvature.gradient_noise import STIFF
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.spectrum import Eigenpairs

FloatArray = NDArray[np.float64]
#: Number of moments of the path, denser towards its end, of which the noise is summed.
MOMENTS = 200


@dataclass(frozen=True)
class Kinks:
    """Curvature and loss added by kinks of the loss in one training (`neural.bridge.kinks`).

    Attributes
    ----------
    pairs : ndarray, shape (k,)
        Curvature added along each eigenpair.
    rest : float
        Curvature added along every direction beyond the eigenpairs; eigenpairs of low curvature
        have this value as well.
    cost_ratio : float
        Loss added by kinks, divided by half of the trace of added curvature times covariance: 1 if
        kinks are spread evenly, 2 if all lie at the mean.
    log2_slope : float
        Increase of this ratio for every halving of the standard deviation.
    """

    pairs: FloatArray
    rest: float
    cost_ratio: float = 1.0
    log2_slope: float = 0.0

    @classmethod
    def none(cls) -> Kinks:
        """Values for a smooth loss.

        Returns
        -------
        Kinks
            Without added curvature; fits any number of eigenpairs.
        """
        return cls(np.zeros(1), 0.0)


@dataclass(frozen=True)
class Change:
    """Difference of curvature and noise between two places, or of averages over them.

    Attributes
    ----------
    curvature, noise : ndarray, shape (k, k)
        Change of the Hessian, and of the covariance of one example's gradient, along the
        checkpoint's eigenpairs.
    trace : float
        Change of the trace of the whole noise covariance.
    """

    curvature: FloatArray
    noise: FloatArray
    trace: float


@dataclass(frozen=True)
class Smoothing:
    """Change of curvature and noise from the checkpoint to averages over a training's weights.

    Attributes
    ----------
    local : LocalQuadratic
        Slope, curvature and noise at the checkpoint.
    training : Training
        The training in which the change was measured. Methods that take a training scale the
        change to that one.
    width : Change
        From the mean of the weights to the average over their covariance.
    mean : Change
        From the end of noise-free descent to the mean of the weights, which noise displaces.
    descent : tuple of Change
        From the checkpoint to the knots of noise-free descent, of which the last one is its end.
    drift : Drift, optional
        Force that displaces the mean; by default there is no such displacement.
    kinks : Kinks
        Curvature and loss added by kinks; none by default.
    far : NoiseFreePath, optional
        The path to whose knots `descent` is the change; by default the quadratic's descent in
        `training`.
    path : NoiseFreePath, optional
        Noise-free path of `training`; its end replaces that of descent on the quadratic.
    """

    local: LocalQuadratic
    training: Training
    width: Change
    mean: Change
    descent: tuple[Change, ...]
    drift: Drift | None = None
    kinks: Kinks = field(default_factory=Kinks.none)
    far: NoiseFreePath | None = None
    path: NoiseFreePath | None = None

    @cached_property
    def _width_scales(self) -> dict[Training, float]:
        """Results of `width_scale`, each of which takes an eigendecomposition."""
        return {}

    @cached_property
    def _covariance(self) -> FloatArray:
        return self._scatter(self.training)

    def _scatter(self, training: Training) -> FloatArray:
        """Covariance of the weights `at_descent`, along the checkpoint's eigenpairs."""
        there = self.at_descent(training)
        turn = self.local.pairs.vectors.T @ there.pairs.vectors
        return np.asarray(turn @ covariance(there, training) @ turn.T)

    @cached_property
    def _descent(self) -> FloatArray:
        return descended(self.local, self.training)

    @cached_property
    def _push(self) -> FloatArray:
        assert self.drift is not None
        return self.drift.displacement(self.training)

    def width_scale(self, training: Training) -> float:
        """Covariance of the weights in another training, relative to the measured one's.

        Parameters
        ----------
        training : Training
            The other training.

        Returns
        -------
        float
            At most the ratio of lr / B, which it reaches when all directions are stationary.
        """
        if training not in self._width_scales:
            stationary = training.noise_ratio(self.training)
            with np.errstate(over="ignore", invalid="ignore"):  # beyond the edge of stability
                scale = _projection(self._covariance, self._scatter(training))
            self._width_scales[training] = (
                min(scale, stationary) if np.isfinite(scale) else stationary
            )
        return self._width_scales[training]

    def mean_scale(self, training: Training) -> float:
        """Displacement of the mean by noise in another training, relative to the measured one's.

        Parameters
        ----------
        training : Training
            The other training.

        Returns
        -------
        float
            0 without a drift.
        """
        if self.drift is None:
            return 0.0
        stationary = training.noise_ratio(self.training)
        scale = _projection(self._push, self.drift.displacement(training))
        return float(np.clip(scale, -stationary, stationary)) if np.isfinite(scale) else stationary

    def _descent_shares(self, training: Training) -> FloatArray:
        """Shares of `descent` in the change of curvature by descent in another training."""
        if self.far is not None:
            return self.far.shares(training, training.steps)
        # What lies beyond the measured descent is not extrapolated.
        scale = _projection(self._descent, descended(self.local, training))
        return np.clip([scale], 0.0, 1.0)

    def _curvature_of_descent(self, training: Training) -> FloatArray:
        """Change of the curvature by noise-free descent in another training, (k, k)."""
        changes = [change.curvature for change in self.descent]
        return np.asarray(np.tensordot(self._descent_shares(training), changes, 1))

    def _noise_shares(self, training: Training) -> FloatArray:
        """Shares of `descent` in the change of the noise by descent in another training."""
        if self.far is None:
            return self._descent_shares(training)
        return self.far.noise_shares(training, training.steps)

    def remembered(self, training: Training, curvature: FloatArray) -> FloatArray:
        """Part of the noise's change by descent that the scatter at the end remembers.

        The scatter along two directions i, j is a sum over steps t of their noise then, with the
        weight ((1 - lr h_i) (1 - lr h_j))^(T - t), h at the end. The noise changes with its trace.

        Parameters
        ----------
        training : Training
            The other training.
        curvature : ndarray, shape (k,)
            h, of every direction.

        Returns
        -------
        ndarray, shape (n, k, k)
            Means of `NoiseFreePath.noise_shares` over the steps with these weights: shares of the
            changes in `descent`.
        """
        if self.far is None:
            shares = self._noise_shares(training)[:, None, None]
            return np.broadcast_to(shares, (len(shares), len(curvature), len(curvature)))
        ages = np.unique(np.geomspace(1.0, training.steps, MOMENTS).round()) - 1.0
        spans = np.diff(ages, append=training.steps)
        left = np.abs(1.0 - np.clip(training.effective_lr * curvature, 0.0, 2.0))
        weights = left ** (ages + 0.5 * (spans - 1.0))[:, None]
        done = self.far.noise_shares(training, training.steps - ages - 0.5 * (spans - 1.0))
        whole = weights.T @ (spans[:, None] * weights)
        return np.stack([weights.T @ ((spans * d)[:, None] * weights) / whole for d in done.T])

    def mean_hessian(
        self, training: Training, width_part: float = 1.0, mean_part: float = 0.0
    ) -> FloatArray:
        """Mean Hessian over the weights of another training.

        Parameters
        ----------
        training : Training
            The other training.
        width_part : float
            Fraction of the change with the covariance that is included; in the loss it is one half.
        mean_part : float
            Where the weights are centred: 0 is the end of descent, 1 the mean displaced by noise.

        Returns
        -------
        ndarray, shape (k, k)
            Along the checkpoint's eigenpairs, without the curvature added by kinks.
        """
        change = width_part * self.width_scale(training) * self.width.curvature
        change = change + mean_part * self.mean_scale(training) * self.mean.curvature
        change = change + self._curvature_of_descent(training)
        return np.asarray(np.diag(self.local.pairs.values) + change)

    def seen_by(self, training: Training, mean_part: float = 1.0) -> LocalQuadratic:
        """The local model with curvature and noise averaged over the weights of a training.

        If the change is scaled to a far larger covariance, a curvature may become negative. It is
        then set to zero, or to the most negative curvature of the checkpoint: a calculation to
        leading order does not tell more.

        Parameters
        ----------
        training : Training
            The other training.
        mean_part : float
            Fraction of the mean's displacement by noise at which the average is taken, in [0, 1].

        Returns
        -------
        LocalQuadratic
            With eigenpairs of the averaged curvature, kinks included.
        """
        return self._averaged(
            training,
            self.kinks,
            (self.width, self.width_scale(training)),
            (self.mean, mean_part * self.mean_scale(training)),
        )

    def at_descent(self, training: Training) -> LocalQuadratic:
        """The local model where noise-free descent ends, without kinks.

        Parameters
        ----------
        training : Training
            The training.

        Returns
        -------
        LocalQuadratic
            Its noise is that which the scatter at the end remembers.
        """
        return self._averaged(training, Kinks.none())

    def _averaged(
        self, training: Training, kinks: Kinks, *changes: tuple[Change, float]
    ) -> LocalQuadratic:
        """The local model where descent ends, with kinks, and changes times their factors."""
        local = self.local
        along = local.pairs.values + kinks.pairs
        curvature = self._curvature_of_descent(training)
        curvature = curvature + sum(scale * change.curvature for change, scale in changes)
        size, turn = np.linalg.eigh(np.diag(along) + curvature)
        size, turn = size[::-1], turn[:, ::-1]
        size = np.maximum(size, min(float(local.pairs.values.min(initial=0.0)), 0.0))
        noise = local.noise + sum(scale * change.noise for change, scale in changes)
        remembered = self.remembered(training, size)
        by_descent = np.zeros_like(noise)
        for shares, change in zip(remembered, self.descent, strict=True):
            by_descent += shares * (turn.T @ change.noise @ turn)
        noise = turn.T @ noise @ turn + by_descent
        power, axes = np.linalg.eigh(0.5 * (noise + noise.T))
        # Differences and rounding may make a variance negative; it is set to zero.
        noise = axes @ (np.maximum(power, 0.0)[:, None] * axes.T)
        trace = local.noise_trace + sum(scale * change.trace for change, scale in changes)
        beyond = [change.trace - float(np.trace(change.noise)) for change in self.descent]
        trace += float(np.trace(by_descent)) + float(remembered[:, -1, -1] @ beyond)
        return replace(
            local,
            pairs=Eigenpairs(size, local.pairs.vectors @ turn, local.pairs.residuals),
            noise=noise,
            slope=turn.T @ local.slope,
            draws=tuple(replace(draw, values=draw.values + kinks.rest) for draw in local.draws),
            noise_trace=max(trace, float(np.trace(noise))),
        )

    def along_mean_path(self, drift: Drift) -> Drift:
        """The drift recomputed with the Hessian averaged along the path of the mean.

        Where the Hessian is H + s M after a fraction s of the displacement m, (H + M / 2) m
        balances the force, and the loss of the mean rises by m' (H + M / 3) m / 2: half of the
        change counts in the force balance, a third of it in the loss.

        Parameters
        ----------
        drift : Drift
            Measured with `seen_by` of its training.

        Returns
        -------
        Drift
            With another `local` and `loss_curvature`; the force is the same.
        """
        seen = self.seen_by(drift.training, 0.5)
        turn = seen.pairs.vectors.T @ drift.local.pairs.vectors
        curvature = np.diag(self.local.pairs.values + self.kinks.pairs)
        curvature += self.mean_scale(drift.training) / 3.0 * self.mean.curvature
        curvature += self._curvature_of_descent(drift.training)
        across = self.local.pairs.vectors.T @ seen.pairs.vectors
        first, second = (
            replace(half, values=half.values + self.kinks.rest) for half in drift.force_rest
        )
        return replace(
            drift,
            local=seen,
            force_top=(turn @ drift.force_top[0], turn @ drift.force_top[1]),
            force_rest=(first, second),
            loss_curvature=across.T @ curvature @ across,
        )

    def excess_parts(
        self, training: Training, steps: Sequence[int], seen: LocalQuadratic
    ) -> list[tuple[float, float]]:
        """Parts of a run's excess loss that do not fall as 1 / K, or not alone.

        The covariance S settles by the mean curvature, H + D, while the loss of Gaussian weights is
        1/2 tr((H + D / 2) S), with D proportional to S. The mean of K members has the excess
        (excess - part) / K + part / (2 K^2). Kinks have half their curvature times the covariance.

        Parameters
        ----------
        training : Training
            The run's training.
        steps : sequence of int
            Numbers of steps after which the covariance is taken.
        seen : LocalQuadratic
            `seen_by` of the training.

        Returns
        -------
        list of (float, float)
            For each of `steps`, the part due to the change of curvature with the covariance, and
            the part due to kinks, which is at least 0.
        """
        vectors, of_mean = self.local.pairs.vectors.T, mean_model(seen)
        turn = vectors @ seen.pairs.vectors
        change = turn.T @ (self.width_scale(training) * self.width.curvature) @ turn
        turn = vectors @ of_mean.pairs.vectors
        along = (turn * self.kinks.pairs[:, None] * turn).sum(0)
        parts = {}
        for when in set(steps):
            now = replace(training, steps=when)
            scatter = covariance(of_mean, now)
            top = float(along @ np.diag(scatter))
            kinks = 0.5 * (top + self.kinks.rest * rest_trace(of_mean, now))
            parts[when] = 0.5 * float(np.sum(change * scatter)), max(kinks, 0.0)
        return [parts[when] for when in steps]

    def noise_growth(self, training: Training) -> float:
        """Relative increase of the gradient-noise trace caused by the scatter of the weights.

        The increased noise widens the scatter in turn. This second-order effect, about the square
        of the result, is left out.

        Parameters
        ----------
        training : Training
            The training whose weights scatter.

        Returns
        -------
        float
            Relative to the trace at the end of noise-free descent; 0.1 is 10 %.
        """
        change = self.width_scale(training) * self.width.trace
        change += self.mean_scale(training) * self.mean.trace
        traces = [each.trace for each in self.descent]
        at_descent = self.local.noise_trace + float(self._noise_shares(training) @ traces)
        return change / max(at_descent, 1e-300)

    def kink_fraction(self) -> float:
        """Sum of the curvature that kinks add along the stiff eigenpairs, relative to their own.

        Returns
        -------
        float
            0.1 is 10 %.
        """
        stiff = self.local.pairs.values >= STIFF * self.local.largest
        added = np.broadcast_to(self.kinks.pairs, stiff.shape)[stiff].sum()
        return float(added / np.abs(self.local.pairs.values[stiff]).sum())


def _projection(there: FloatArray, here: FloatArray) -> float:
    """Coefficient of the projection of `here` onto `there`; 1 if they are the same."""
    return float(np.sum(there * here) / max(float(np.sum(there * there)), 1e-300))

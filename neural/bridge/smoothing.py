"""Curvature and gradient noise averaged over the Gaussian of the weights in one training.

To leading order in lr / B the averages change with the covariance and with where the noise has
pushed the mean (`neural.bridge.drift`), which are of the same order; and with where descent without
noise takes the weights. They are measured in one training, along the known eigenpairs: at both ends
of random displacements around the mean, at the mean, and at the end of descent. For any other
training the first part is scaled with the covariance, the others with the displacements.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neural.bridge.config import Training
from neural.bridge.drift import Drift, descended
from neural.bridge.scatter import covariance, displacement, rest_trace
from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.gradient_noise import STIFF
from neural.curvature.local_quadratic import LocalQuadratic, vector
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import Eigenpairs, Progress
from nqm.errors import check_integer

FloatArray = NDArray[np.float64]
NAMES = ("curvature", "noise", "trace")


@dataclass(frozen=True)
class Kinks:
    """What kinks of the loss add to the curvature in one training (`neural.bridge.kinks`).

    Attributes
    ----------
    pairs : ndarray, shape (k,)
        Curvature added along the eigenpairs.
    rest : float
        Curvature added beyond them; flat pairs share it.
    cost_ratio : float
        Loss that kinks add, over half of that curvature times the covariance: 1 where kinks are
        spread evenly, 2 if all lie at the mean.
    log2_slope : float
        How much larger this ratio is after every halving of the standard deviation.
    """

    pairs: FloatArray
    rest: float
    cost_ratio: float = 1.0
    log2_slope: float = 0.0

    @classmethod
    def none(cls) -> Kinks:
        """Kinks of a smooth loss: no added curvature, for any number of eigenpairs.

        Returns
        -------
        Kinks
        """
        return cls(np.zeros(1), 0.0)


@dataclass(frozen=True)
class Change:
    """How curvature and noise along the eigenpairs change.

    Attributes
    ----------
    curvature, noise : ndarray, shape (k, k)
        Less the value at the checkpoint.
    trace : float
        The same of the whole noise's trace.
    """

    curvature: FloatArray
    noise: FloatArray
    trace: float


@dataclass(frozen=True)
class Smoothing:
    """How curvature and noise, averaged over a training's weights, differ from the checkpoint's.

    Attributes
    ----------
    local : LocalQuadratic
        At the checkpoint.
    training : Training
        In which it was measured.
    width, mean, descent : Change
        With the covariance of the weights, with where the noise has pushed their mean, and with
        where descent without noise ends.
    drift : Drift, optional
        What pushes the mean; by default nothing does.
    kinks : Kinks
        Of the loss; none by default.
    """

    local: LocalQuadratic
    training: Training
    width: Change
    mean: Change
    descent: Change
    drift: Drift | None = None
    kinks: Kinks = field(default_factory=Kinks.none)

    @cached_property
    def _covariance(self) -> FloatArray:
        return covariance(self.local, self.training)

    @cached_property
    def _descent(self) -> FloatArray:
        return descended(self.local, self.training)

    @cached_property
    def _push(self) -> FloatArray:
        assert self.drift is not None
        return self.drift.displacement(self.training)

    def width_scale(self, training: Training) -> float:
        """Covariance of the weights in another training, in units of that in the measured one.

        At most the ratio of lr / B, which it reaches once all directions are stationary.

        Parameters
        ----------
        training : Training

        Returns
        -------
        float
        """
        stationary = training.noise_ratio(self.training)
        with np.errstate(over="ignore", invalid="ignore"):  # beyond the edge of stability
            scale = _projection(self._covariance, covariance(self.local, training))
        return min(scale, stationary) if np.isfinite(scale) else stationary

    def mean_scale(self, training: Training) -> float:
        """Displacement of the mean by the noise in another training, in units of the measured one.

        Parameters
        ----------
        training : Training

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

    def descent_scale(self, training: Training) -> float:
        """Displacement by noise-free descent in another training, in units of the measured one.

        Parameters
        ----------
        training : Training

        Returns
        -------
        float
            At least 0.
        """
        scale = _projection(self._descent, descended(self.local, training))
        longest = max(training.effective_lr / self.training.effective_lr, 1.0)
        return float(np.clip(scale, 0.0, longest))

    def mean_hessian(self, training: Training, width_part: float = 1.0) -> FloatArray:
        """Mean second derivatives over the weights of another training, centred where descent ends.

        Parameters
        ----------
        training : Training
        width_part : float
            Fraction of the change with the covariance that is included; in the loss it is one half.

        Returns
        -------
        ndarray, shape (k, k)
        """
        change = width_part * self.width_scale(training) * self.width.curvature
        change = change + self.descent_scale(training) * self.descent.curvature
        return np.asarray(np.diag(self.local.pairs.values) + change)

    def seen_by(self, training: Training, mean_part: float = 1.0) -> LocalQuadratic:
        """The local model with curvature and noise averaged over the weights of a training.

        Scaled to a far larger covariance, the change may make a curvature negative. It is then set
        to zero: leading order gives no more than that.

        Parameters
        ----------
        training : Training
        mean_part : float
            Fraction of its displacement by the noise that the mean has covered.

        Returns
        -------
        LocalQuadratic
        """
        parts = (
            (self.width, self.width_scale(training)),
            (self.mean, mean_part * self.mean_scale(training)),
            (self.descent, self.descent_scale(training)),
        )
        local = self.local
        along = local.pairs.values + self.kinks.pairs
        change = np.sum([scale * part.curvature for part, scale in parts], axis=0)
        size, turn = np.linalg.eigh(np.diag(along) + change)
        size, turn = size[::-1], turn[:, ::-1]
        size = np.maximum(size, min(float(local.pairs.values.min(initial=0.0)), 0.0))
        noise = local.noise + np.sum([scale * part.noise for part, scale in parts], axis=0)
        noise = turn.T @ noise @ turn
        power, axes = np.linalg.eigh(0.5 * (noise + noise.T))
        noise = axes @ (np.maximum(power, 0.0)[:, None] * axes.T)  # differences, and rounding
        trace = local.noise_trace + sum(scale * part.trace for part, scale in parts)
        return replace(
            local,
            pairs=Eigenpairs(size, local.pairs.vectors @ turn, local.pairs.residuals),
            noise=noise,
            slope=turn.T @ local.slope,
            draws=tuple(
                replace(draw, values=draw.values + self.kinks.rest) for draw in local.draws
            ),
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
        """
        seen = self.seen_by(drift.training, 0.5)
        turn = seen.pairs.vectors.T @ drift.local.pairs.vectors
        curvature = np.diag(self.local.pairs.values + self.kinks.pairs)
        curvature += self.mean_scale(drift.training) / 3.0 * self.mean.curvature
        curvature += self.descent_scale(drift.training) * self.descent.curvature
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

    def curvature_change_part(self, training: Training, steps: int, seen: LocalQuadratic) -> float:
        """Part of a run's excess loss that is due to the change of curvature with the covariance.

        The covariance S settles by the mean curvature, H + D, while the loss of Gaussian weights is
        1/2 tr((H + D / 2) S), with D proportional to S. The mean of K members has the excess
        (excess - part) / K + part / (2 K^2).

        Parameters
        ----------
        training : Training
        steps : int
            Number of steps after which the covariance is taken.
        seen : LocalQuadratic
            `seen_by` of the training.

        Returns
        -------
        float
        """
        turn = self.local.pairs.vectors.T @ seen.pairs.vectors
        change = turn.T @ (self.width_scale(training) * self.width.curvature) @ turn
        return 0.5 * float(np.sum(change * covariance(seen, replace(training, steps=steps))))

    def kink_part(self, training: Training, steps: int, seen: LocalQuadratic) -> float:
        """Part of a run's excess loss due to kinks: half their curvature times the covariance.

        Parameters
        ----------
        training : Training
        steps : int
            Number of steps after which the covariance is taken.
        seen : LocalQuadratic
            `seen_by` of the training.

        Returns
        -------
        float
        """
        now = replace(training, steps=steps)
        turn = self.local.pairs.vectors.T @ seen.pairs.vectors
        along = (turn * self.kinks.pairs[:, None] * turn).sum(0)
        top = float(along @ np.diag(covariance(seen, now)))
        return max(0.5 * (top + self.kinks.rest * rest_trace(seen, now)), 0.0)

    def noise_growth(self, training: Training) -> float:
        """Relative increase of the gradient-noise trace caused by the scatter of the weights.

        The increased noise widens the scatter in turn. This second-order effect, about the square
        of the result, is left out.

        Parameters
        ----------
        training : Training

        Returns
        -------
        float
        """
        change = self.width_scale(training) * self.width.trace
        change += self.mean_scale(training) * self.mean.trace
        calm = self.local.noise_trace + self.descent_scale(training) * self.descent.trace
        return change / max(calm, 1e-300)

    def kink_fraction(self) -> float:
        """Curvature that kinks add along the stiff eigenpairs, relative to their own.

        Returns
        -------
        float
        """
        stiff = self.local.pairs.values >= STIFF * self.local.largest
        added = np.broadcast_to(self.kinks.pairs, stiff.shape)[stiff].sum()
        return float(added / np.abs(self.local.pairs.values[stiff]).sum())


def _projection(there: FloatArray, here: FloatArray) -> float:
    """Coefficient of `here` along `there`: 1 if they are the same."""
    return float(np.sum(there * here) / max(float(np.sum(there * there)), 1e-300))


def measure_smoothing(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    *,
    drift: Drift | None = None,
    displacements: int = 4,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Smoothing:
    """Measure curvature and noise averaged over the weights of one training.

    Parameters
    ----------
    risk : EmpiricalRisk
    local : LocalQuadratic
        Of this risk.
    training : Training
    drift : Drift, optional
        Tells the mean of the weights; where descent ends by default.
    displacements : int
        Random displacements: at both ends of each, and at the mean, k Hessian products and the
        noise along k directions.
    seed : int
    cache : Cache, optional
        Keeps what is found, and gives it when asked again.
    progress : callable, optional
        Told that one more end is done.

    Returns
    -------
    Smoothing

    Raises
    ------
    NQMError
        If there is no displacement.
    """
    check_integer("averaging_displacements", displacements, 1)
    vectors = local.pairs.vectors
    calm = risk.weights + vector(risk, descended(local, training))
    centre, pushed = calm, 0.0
    if drift is not None:
        mean = drift.displacement(training)
        centre, pushed = calm + vector(risk, mean), float(np.linalg.norm(mean))

    def averages() -> dict[str, Any]:
        rng = np.random.default_rng([seed, 4])
        found = []
        for _ in range(displacements):
            moved = vector(risk, displacement(local, training, rng))
            for sign in (1.0, -1.0):
                found.append(_along(risk.at(centre + sign * moved), vectors))
                if progress is not None:
                    progress(1)
        there = tuple(np.mean(part, axis=0) for part in zip(*found, strict=True))
        here = np.diag(local.pairs.values), local.noise, local.noise_trace
        end = _along(risk.at(calm), vectors)
        middle = end if drift is None else _along(risk.at(centre), vectors)
        parts = {"width": (there, middle), "mean": (middle, end), "descent": (end, here)}
        return {
            f"{part}-{name}": one - other
            for part, (after, before) in parts.items()
            for name, one, other in zip(NAMES, after, before, strict=True)
        }

    found = (cache or Cache()).of(risk, seed=seed)(
        "averages",
        averages,
        training=training,
        displacements=displacements,
        local=local.key(),
        pushed=f"{pushed:.8g}",
    )
    width, mean_change, descent = (
        Change(found[f"{part}-curvature"], found[f"{part}-noise"], float(found[f"{part}-trace"]))
        for part in ("width", "mean", "descent")
    )
    return Smoothing(local, training, width, mean_change, descent, drift)


def _along(risk: EmpiricalRisk, vectors: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Curvature and noise along some directions, (k, k) each, and the noise's whole trace."""
    population = 1.0 - 1.0 / risk.examples
    noise = population * gradient_noise.covariance(risk, vectors)
    if vectors.shape[1] == risk.size:
        h = risk.curvature_matrix().double().cpu().numpy()
        return vectors.T @ h @ vectors, noise, float(np.trace(noise))
    products = [risk.curvature_product(vector(risk, v)) for v in vectors.T]
    curvature = vectors.T @ torch.stack(products, 1).double().cpu().numpy()
    trace = population * gradient_noise.trace(risk)
    return 0.5 * (curvature + curvature.T), noise, trace

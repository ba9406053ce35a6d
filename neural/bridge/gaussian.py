"""The Gaussian of the weights in one training, and the local quadratic averaged over it.

To leading order in lr / B the weights of a training are Gaussian. Noise-free descent and the drift
(`neural.bridge.drift`) move their mean, noise gives them a covariance (`neural.bridge.scatter`),
and both change the mean curvature and noise (`neural.bridge.smoothing`, `neural.bridge.kinks`). A
`WeightGaussian` holds all of this for one training; predictions are computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from neural.bridge.balance import balance_work, balanced
from neural.bridge.config import Training
from neural.bridge.drift import (
    Drift,
    calm_end,
    measure_drift,
    passes_at_displacements,
    slopes_at,
)
from neural.bridge.kinks import KINKED, find_kinks
from neural.bridge.measure_smoothing import half_of, measure_descent, measure_smoothing
from neural.bridge.noise_free_path import NoiseFreePath
from neural.bridge.scatter import covariance, edge_of, largest_stable_lr
from neural.bridge.shared_base import SharedBaseQuadratic
from neural.bridge.smoothing import Kinks, Smoothing
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import PRODUCT, TOGETHER, EmpiricalRisk
from neural.curvature.spectrum import Progress

FloatArray = NDArray[np.float64]
#: Growth of the noise beyond which curvature and noise are averaged anew at the grown scatter. This
#: is repeated until the growth changes by less than `SETTLED`, at most `ROUNDS` times, and as long
#: as it changes by less each time.
GROWTH, SETTLED, ROUNDS = 0.1, 0.03, 3


@dataclass(frozen=True)
class WeightGaussian:
    """Gaussian N(mean, S) of the weights after one training.

    Attributes
    ----------
    training : Training
        The training.
    checkpoint : LocalQuadratic
        Slope, curvature and noise where the training starts.
    drift : Drift
        Force of the noise on the mean, with the curvature along its path.
    smoothing : Smoothing, optional
        Change of curvature and noise over the weights, with this training's kinks; no change by
        default.
    path : NoiseFreePath, optional
        Noise-free training of the loss itself; its end replaces that of descent on the quadratic.
    settles : bool
        False where averages over the scatter that follows from the ones before lead ever further
        away. The Gaussian is then that of the first averages.
    """

    training: Training
    checkpoint: LocalQuadratic
    drift: Drift
    smoothing: Smoothing | None = None
    path: NoiseFreePath | None = None
    settles: bool = True

    @cached_property
    def local(self) -> LocalQuadratic:
        """Curvature and noise averaged over the Gaussian."""
        smoothing = self.smoothing
        return self.checkpoint if smoothing is None else smoothing.seen_by(self.training)

    @cached_property
    def stable(self) -> bool:
        """Whether the learning rate is below the edge of stability of the averaged curvature."""
        return self.training.lr < largest_stable_lr(self.local, self.training)

    @cached_property
    def covariance(self) -> FloatArray:
        """S along the eigenpairs of `local`, shape (k, k)."""
        return covariance(self.local, self.training)

    @cached_property
    def mean(self) -> FloatArray:
        """Displacement of the mean from the checkpoint, shape (p,)."""
        by_descent = calm_end(self.checkpoint, self.training, self.path)
        return np.asarray(by_descent + self.drift.displacement(self.training))

    @property
    def members(self) -> int | None:
        """Number of late-phase members whose mean this is; None for independent runs."""
        local = self.checkpoint
        return local.members if isinstance(local, SharedBaseQuadratic) else None

    @property
    def noise_growth(self) -> float:
        """Relative increase of the gradient-noise trace over the Gaussian; NaN if not measured.

        Infinite where the averaged curvature is unstable, or averages do not settle: there the
        scatter has no bound.
        """
        if self.smoothing is None:
            return np.nan
        bounded = self.stable and self.settles
        return self.smoothing.noise_growth(self.training) if bounded else np.inf

    @property
    def kink_fraction(self) -> float:
        """Curvature added by kinks, relative (`Smoothing.kink_fraction`); NaN if not measured."""
        return np.nan if self.smoothing is None else self.smoothing.kink_fraction()

    def scaled_to(self, training: Training) -> WeightGaussian:
        """The Gaussian of another training, scaled from the measurement for this one.

        The covariance is that of the other training. The force on the mean is scaled with lr / B,
        the change of curvature and noise with covariance and displacement.

        Parameters
        ----------
        training : Training
            The other training.

        Returns
        -------
        WeightGaussian
        """
        return replace(self, training=training)


def measure_averages(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    still: Smoothing,
    *,
    displacements: int = 64,
    averaging_displacements: int = 2,
    lanczos_steps: int = 10,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Smoothing | None:
    """Average curvature and noise over the weights of one training; other trainings scale them.

    Parameters
    ----------
    risk : EmpiricalRisk
        See `measure_drift`.
    still : Smoothing
        Result of `measure_descent` for this training.
    displacements : int
        See `measure_drift`.
    averaging_displacements : int
        The `displacements` of `measure_smoothing`, whose `noise_displacements` are `half_of`
        `displacements`; for 0 nothing is measured.
    lanczos_steps, seed, cache
        See `measure_drift`.
    progress : callable, optional
        Called with the work done since the last call, in gradients.

    Returns
    -------
    Smoothing or None
        With the kinks of this training; None if `averaging_displacements` is 0.

    Raises
    ------
    NQMError
        If `displacements` is below 2, or `averaging_displacements` below 0.
    """
    if not averaging_displacements:
        return None
    reference = still.training
    drift = measure_drift(
        risk,
        still.at_descent(reference),
        reference,
        path=still.path,
        displacements=displacements,
        lanczos_steps=lanczos_steps,
        seed=seed,
        cache=cache,
        progress=progress,
    )
    smoothing = measure_smoothing(
        risk,
        still,
        drift=drift,
        displacements=averaging_displacements,
        noise_displacements=half_of(displacements),
        seed=seed,
        cache=cache,
        progress=progress,
    )
    return replace(smoothing, kinks=find_kinks(drift, smoothing))


def measure_gaussian(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    averages: Smoothing | None = None,
    *,
    path: NoiseFreePath | None = None,
    displacements: int = 64,
    averaging_displacements: int = 0,
    lanczos_steps: int = 10,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> WeightGaussian:
    """Measure the Gaussian of one training; drift and kinks are measured at its own covariance.

    The averages of another training are scaled to this one. Where kinks matter they are measured
    again around the displaced mean (`neural.bridge.kinks`). Where the noise grows by more than
    `GROWTH`, the force is corrected at the displaced mean (`neural.bridge.balance`), averages are
    measured anew at the scatter that follows from them, and drift and kinks once more, until the
    growth settles. Each round costs all of these measurements. Where it does not settle, as near
    the edge of stability, the first averages are kept.

    Parameters
    ----------
    risk, local, training
        See `measure_drift`.
    averages : Smoothing, optional
        Result of `measure_averages`; by default curvature and noise are those of the checkpoint.
    path
        See `measure_drift`.
    displacements, averaging_displacements, lanczos_steps, seed, cache, progress
        See `measure_averages`; drift and kinks are computed from the same gradients. With 0
        `averaging_displacements` nothing is measured anew.

    Returns
    -------
    WeightGaussian

    Raises
    ------
    NQMError
        If `displacements` is below 2.
    """

    def drift_at(seen: LocalQuadratic) -> Drift:
        if training.lr >= largest_stable_lr(seen, training):  # nothing will be predicted
            seen = local
        return measure_drift(
            risk,
            seen,
            training,
            path=path,
            displacements=displacements,
            lanczos_steps=lanczos_steps,
            seed=seed,
            cache=cache,
            progress=progress,
        )

    def with_kinks(smoothing: Smoothing, kinks: Kinks, drift: Drift) -> WeightGaussian:
        smoothing = replace(smoothing, kinks=kinks)
        return WeightGaussian(training, local, smoothing.along_mean_path(drift), smoothing, path)

    def over(
        smoothing: Smoothing, drift: Drift
    ) -> tuple[WeightGaussian, Callable[[Smoothing], Kinks]]:
        """The Gaussian, and a function that finds its kinks by other averages."""
        kinks_by = partial(find_kinks, drift)
        found = with_kinks(smoothing, kinks_by(smoothing), drift)
        if not (found.stable and found.kink_fraction > KINKED):
            return found, kinks_by
        slopes = slopes_at(
            risk,
            drift,
            found.mean,
            displacements=displacements,
            seed=seed,
            cache=cache,
            progress=progress,
        )
        kinks_by = partial(find_kinks, replace(drift, slopes=slopes), mean_part=1.0)
        return with_kinks(smoothing, kinks_by(smoothing), drift), kinks_by

    if averages is None:
        return WeightGaussian(training, local, drift_at(local), path=path)

    def at_balance(found: WeightGaussian) -> WeightGaussian:
        drift = balanced(
            risk,
            found.drift,
            found.local,
            calm_end(local, training, path),
            displacements=max(half_of(displacements), 2),
            lanczos_steps=lanczos_steps,
            seed=seed,
            cache=cache,
            progress=progress,
        )
        return replace(found, drift=drift)

    drift = drift_at(averages.seen_by(training))
    found, kinks_by = over(averages, drift)
    if not (averaging_displacements and found.stable and abs(found.noise_growth) > GROWTH):
        return found
    first, change = found, abs(found.noise_growth)
    found = at_balance(found)
    still = measure_descent(
        risk,
        local,
        training,
        path=path,
        far=averages.far,
        seed=seed,
        cache=cache,
        progress=progress,
    )
    for _ in range(ROUNDS):
        before = found.noise_growth
        own = measure_smoothing(
            risk,
            still,
            drift=found.drift,
            scatter=found.local,
            displacements=averaging_displacements,
            noise_displacements=half_of(displacements),
            seed=seed,
            cache=cache,
            progress=progress,
        )
        drift = drift_at(replace(own, kinks=kinks_by(own)).seen_by(training))
        found, kinks_by = over(own, drift)
        if not abs(found.noise_growth - before) < change:
            return replace(first, settles=False)
        found, change = at_balance(found), abs(found.noise_growth - before)
        if change < SETTLED:
            break
    return found


def rounds_to_come(averages: Smoothing | None, training: Training) -> int:
    """How often `measure_gaussian` measures averages anew, at most.

    Parameters
    ----------
    averages, training
        See `measure_gaussian`.

    Returns
    -------
    int
        By the averages of the other training. Its kinks are left out, since this one's may be less.
    """
    if averages is None or not abs(averages.noise_growth(training)) > GROWTH:
        return 0
    sharpest = float(np.linalg.eigvalsh(averages.mean_hessian(training))[-1])
    return ROUNDS if training.lr < edge_of(sharpest, training) else 0


def work_of_balance(local: LocalQuadratic, displacements: int, lanczos_steps: int) -> int:
    """Work of one correction of the force by the balance, in gradients, for a progress bar.

    Parameters
    ----------
    local, displacements, lanczos_steps
        See `measure_drift`.

    Returns
    -------
    int
    """
    passes = balance_work(max(half_of(displacements), 2), local.examples)
    return passes + _products_of_a_force(local, lanczos_steps)


def gradients_and_products(local: LocalQuadratic, displacements: int, lanczos_steps: int) -> int:
    """Work of one measurement of the drift, in gradients, for a progress bar.

    Parameters
    ----------
    local, displacements, lanczos_steps
        See `measure_drift`.

    Returns
    -------
    int
    """
    work = passes_at_displacements(displacements, local.examples)
    if isinstance(local, SharedBaseQuadratic) and not local.complete:
        work += PRODUCT * displacements
    return work + _products_of_a_force(local, lanczos_steps)


def _products_of_a_force(local: LocalQuadratic, lanczos_steps: int) -> int:
    """Hessian products, counted in gradients, for both measurements outside the eigenpairs."""
    return 0 if local.complete else 2 * TOGETHER * lanczos_steps


def nearest_gaussians(
    gaussians: Sequence[WeightGaussian], training: Training
) -> list[tuple[float, WeightGaussian]]:
    """The one or two Gaussians measured nearest to a training, scaled to it, with their weights.

    Between two measured learning rates the weights are linear in log lr; outside their range, the
    nearest Gaussian has weight 1.

    Parameters
    ----------
    gaussians : sequence of WeightGaussian
        Measured at different learning rates.
    training : Training
        The training to predict.

    Returns
    -------
    list of (float, WeightGaussian)
        Weights and Gaussians; the weights add up to 1.
    """
    gaussians = sorted(gaussians, key=lambda gaussian: gaussian.training.lr)
    x = np.log([gaussian.training.effective_lr for gaussian in gaussians])
    place = float(np.interp(np.log(training.effective_lr), x, np.arange(len(x))))
    lower = int(place)
    fraction = place - lower
    near = [(1.0 - fraction, gaussians[lower])]
    if fraction > 0.0:
        near.append((fraction, gaussians[lower + 1]))
    return [(weight, gaussian.scaled_to(training)) for weight, gaussian in near]

"""Curvature and noise as weights that scatter see them: averages over the scatter.

To leading order in lr / B the averages move by the width of the scatter and by where the noise has
pushed its mean (`neural.drift`), which are of the same order; and by where descent without noise
takes the weights. They are measured at one scatter, along the known eigenpairs: at both ends of
random displacements around its mean, at the mean, and at the end of descent. For any other scatter
the first part is scaled with the covariance, the others with the displacements.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neural import noise as gradient_noise
from neural.curvature import Landscape
from neural.drift import Drift, descended
from neural.local_model import Kept, LocalModel, fingerprint, vector
from neural.noise import STIFF
from neural.spectrum import Eigenpairs, Progress
from nqm.errors import check_integer

FloatArray = NDArray[np.float64]
NAMES = ("curvature", "noise", "trace")


@dataclass(frozen=True)
class Kinks:
    """What kinks of the loss add to the curvature at the scatter of one training (`neural.kinks`).

    Attributes
    ----------
    pairs : ndarray, shape (k,)
        Along the eigenpairs.
    rest : float
        Along the scatter's part that is left; flat pairs share it.
    cost : float
        What they cost, over half of that curvature with the scatter: 1 where kinks are spread
        evenly, 2 on the spot of a kink.
    octave : float
        By how much more for every halving of the scatter's width.
    """

    pairs: FloatArray
    rest: float
    cost: float = 1.0
    octave: float = 0.0

    @classmethod
    def none(cls) -> Kinks:
        """Those of a smooth loss, whatever the number of eigenpairs."""
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
    """How curvature and noise along the eigenpairs change under scatter.

    Attributes
    ----------
    local : LocalModel
        At the checkpoint.
    lr, batch_size, steps : float
        Of the scatter at which it was measured.
    width, mean, descent : Change
        By the width of the scatter, by where the noise has pushed its mean, and by where descent
        without noise ends.
    drift : Drift, optional
        What pushes the mean; by default nothing does.
    kinks : Kinks
        Of the loss; none by default.
    momentum : float
        Of the optimiser; rates are effective ones, lr / (1 - momentum).
    """

    local: LocalModel
    lr: float
    batch_size: float
    steps: float
    width: Change
    mean: Change
    descent: Change
    drift: Drift | None = None
    kinks: Kinks = field(default_factory=Kinks.none)
    momentum: float = 0.0

    def scales(self, lr: float, batch_size: float) -> tuple[float, float]:
        """How wide, and how far from the checkpoint, another scatter is beside this one.

        Both are the ratio of lr / B at most, as they are once all directions have settled. Before
        that they are less at low rates: its covariance and the displacement of its mean, projected
        on those at which the two parts were measured.
        """
        return self._wide(lr, batch_size), self._far(lr, batch_size)

    def _settled(self, lr: float, batch_size: float) -> float:
        return (lr / batch_size) / (self.lr / self.batch_size)

    @cached_property
    def _scatter(self) -> FloatArray:
        """Along the eigenpairs, at which it was measured."""
        return self.local.scatter(self.lr, self.batch_size, self.steps, self.momentum)

    @cached_property
    def _descent(self) -> FloatArray:
        """Where descent without noise ended when it was measured."""
        return descended(self.local, self.lr, self.steps)

    @cached_property
    def _push(self) -> FloatArray:
        """Where the noise had pushed the mean."""
        assert self.drift is not None
        return self.drift.moved(self.lr, self.batch_size, self.steps)

    def _wide(self, lr: float, batch_size: float) -> float:
        settled = self._settled(lr, batch_size)
        with np.errstate(over="ignore", invalid="ignore"):  # beyond the edge of stability
            here = self.local.scatter(lr, batch_size, self.steps, self.momentum)
            wide = _part(self._scatter, here)
        return min(wide, settled) if np.isfinite(wide) else settled

    def _far(self, lr: float, batch_size: float) -> float:
        if self.drift is None:
            return 0.0
        settled = self._settled(lr, batch_size)
        far = _part(self._push, self.drift.moved(lr, batch_size, self.steps))
        return float(np.clip(far, -settled, settled)) if np.isfinite(far) else settled

    def _gone(self, lr: float) -> float:
        """How far descent without noise goes at another rate beside this one's."""
        gone = _part(self._descent, descended(self.local, lr, self.steps))
        return float(np.clip(gone, 0.0, max(lr / self.lr, 1.0)))

    def smooth(self, lr: float, batch_size: float, width: float = 1.0) -> FloatArray:
        """Mean second derivatives over another scatter that nothing pushes, shape (k, k).

        Parameters
        ----------
        lr, batch_size : float
        width : float
            So much of the change by the scatter's width: half of it counts in the loss.
        """
        change = width * self._wide(lr, batch_size) * self.width.curvature
        change = change + self._gone(lr) * self.descent.curvature
        return np.asarray(np.diag(self.local.pairs.values) + change)

    def at(self, lr: float, batch_size: float, way: float = 1.0) -> LocalModel:
        """The local model as the scatter of another rate sees it.

        A direction that the change, scaled to a far larger scatter, would turn downwards is taken
        for flat: leading order says no more than that.

        Parameters
        ----------
        lr, batch_size : float
        way : float
            Where on the way that the noise pushes it the mean is taken to be; at its end by
            default.
        """
        wide, far = self.scales(lr, batch_size)
        parts = (self.width, wide), (self.mean, way * far), (self.descent, self._gone(lr))
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
        pairs = Eigenpairs(size, local.pairs.vectors @ turn, local.pairs.residuals)
        trace = local.noise_trace + sum(scale * part.trace for part, scale in parts)
        rest = self.kinks.rest
        return replace(
            local,
            pairs=pairs,
            noise=noise,
            slope=turn.T @ local.slope,
            draws=tuple(replace(draw, values=draw.values + rest) for draw in local.draws),
            noise_trace=max(trace, float(np.trace(noise))),
        )

    def hold(self, drift: Drift) -> Drift:
        """A drift with the curvature that the mean meets on its way, which changes as it goes.

        Where curvature is H + s M after a part s of the way m, the force is held by the mean of it,
        (H + M / 2) m, and the loss of the mean, without scatter, rises by m' (H + M / 3) m / 2.
        """
        lr, batch_size = drift.lr, drift.batch_size
        seen = self.at(lr, batch_size, 0.5)
        turn = seen.pairs.vectors.T @ drift.local.pairs.vectors
        climb = np.diag(self.local.pairs.values + self.kinks.pairs)
        climb += self._far(lr, batch_size) / 3.0 * self.mean.curvature
        climb += self._gone(lr) * self.descent.curvature
        across = self.local.pairs.vectors.T @ seen.pairs.vectors
        first, second = (replace(half, values=half.values + self.kinks.rest) for half in drift.rest)
        return replace(
            drift,
            local=seen,
            top=(turn @ drift.top[0], turn @ drift.top[1]),
            rest=(first, second),
            climb=across.T @ climb @ across,
        )

    def share(
        self, lr: float, batch_size: float, steps: float, seen: LocalModel | None = None
    ) -> float:
        """Part of a run's excess that is due to the change of curvature with the scatter's width.

        The scatter S settles by the mean curvature, H + D, while the loss of a Gaussian scatter is
        1/2 tr((H + D / 2) S), D itself in proportion to the scatter: of K members the excess is
        (excess - share) / K + share / (2 K^2). `seen` is `at` of the same rate, where it is known.
        """
        seen = self.at(lr, batch_size) if seen is None else seen
        turn = self.local.pairs.vectors.T @ seen.pairs.vectors
        change = turn.T @ (self._wide(lr, batch_size) * self.width.curvature) @ turn
        return 0.5 * float(np.sum(change * seen.scatter(lr, batch_size, steps, self.momentum)))

    def creases(
        self, lr: float, batch_size: float, steps: float, seen: LocalModel | None = None
    ) -> float:
        """Part of a run's excess that is due to kinks: half their curvature with its scatter.

        `seen` is `at` of the same rate, where it is known.
        """
        seen = self.at(lr, batch_size) if seen is None else seen
        turn = self.local.pairs.vectors.T @ seen.pairs.vectors
        along = (turn * self.kinks.pairs[:, None] * turn).sum(0)
        scatter = np.diag(seen.scatter(lr, batch_size, steps, self.momentum))
        rest = self.kinks.rest * seen.rest_scatter(lr, batch_size, steps, self.momentum)
        return max(0.5 * (float(along @ scatter) + rest), 0.0)

    def growth(self, lr: float, batch_size: float) -> float:
        """By which part of itself the noise grows under scatter.

        Noise that scatters weights, which makes noise: what leading order leaves out is of the size
        of the square of this.
        """
        wide, far = self.scales(lr, batch_size)
        change = wide * self.width.trace + far * self.mean.trace
        calm = self.local.noise_trace + self._gone(lr) * self.descent.trace
        return change / max(calm, 1e-300)

    def creased(self) -> float:
        """What kinks add to the curvature along the stiff eigenpairs, as a part of it."""
        stiff = self.local.pairs.values >= STIFF * self.local.largest
        added = np.broadcast_to(self.kinks.pairs, stiff.shape)[stiff].sum()
        return float(added / np.abs(self.local.pairs.values[stiff]).sum())


def _part(there: FloatArray, here: FloatArray) -> float:
    """How far `here` goes along `there`: 1 where they are the same, 0 where nothing moves."""
    return float(np.sum(there * here) / max(float(np.sum(there * there)), 1e-300))


def measure_smoothing(
    landscape: Landscape,
    local: LocalModel,
    lr: float,
    batch_size: float,
    steps: float,
    *,
    drift: Drift | None = None,
    momentum: float = 0.0,
    samples: int = 4,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Smoothing:
    """Measure the averages at the scatter of so many steps of SGD.

    Parameters
    ----------
    landscape : Landscape
    local : LocalModel
        Of this landscape.
    lr, batch_size, steps : float
        The scatter. With momentum b, lr is the effective rate lr / (1 - b).
    drift : Drift, optional
        Tells the mean of the scatter; the checkpoint by default.
    momentum : float
        Of the optimiser.
    samples : int
        Random displacements, looked at both ends: at each, and at the mean, k Hessian products and
        the noise along k directions.
    seed : int
    folder : Path, optional
        Keeps what is found, and gives it when asked again.
    progress : callable, optional
        Told that one more end is done.
    """
    check_integer("samples", samples, 1)
    kept = Kept(folder, f"{fingerprint(landscape)}-{seed}")
    vectors = local.pairs.vectors

    calm = landscape.weights + vector(landscape, descended(local, lr, steps))
    centre, where = calm, 0.0
    if drift is not None:
        mean = drift.moved(lr, batch_size, steps)
        centre, where = calm + vector(landscape, mean), float(np.linalg.norm(mean))

    def averages() -> dict[str, Any]:
        rng = np.random.default_rng([seed, 4])
        found = []
        for _ in range(samples):
            displaced = local.displacement(rng, lr, batch_size, steps, momentum=momentum)
            moved = vector(landscape, displaced)
            for sign in (1.0, -1.0):
                found.append(_along(landscape.at(centre + sign * moved), vectors))
                if progress is not None:
                    progress(1)
        there = tuple(np.mean(part, axis=0) for part in zip(*found, strict=True))
        here = np.diag(local.pairs.values), local.noise, local.noise_trace
        end = _along(landscape.at(calm), vectors)
        middle = end if drift is None else _along(landscape.at(centre), vectors)
        parts = {"width": (there, middle), "mean": (middle, end), "descent": (end, here)}
        return {
            f"{part}-{name}": one - other
            for part, (after, before) in parts.items()
            for name, one, other in zip(NAMES, after, before, strict=True)
        }

    basis = f"{len(local.pairs.values)}-{len(local.draws)}-{where:.8g}"
    heavy = f"-{momentum}" if momentum else ""
    stage = f"changes-{lr:.8g}-{batch_size}-{steps}{heavy}-{samples}-{basis}"
    found = kept(stage, averages)
    width, pushed, gone = (
        Change(found[f"{part}-curvature"], found[f"{part}-noise"], float(found[f"{part}-trace"]))
        for part in ("width", "mean", "descent")
    )
    return Smoothing(
        local, lr, batch_size, steps, width, pushed, gone, drift=drift, momentum=momentum
    )


def _along(landscape: Landscape, vectors: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Curvature and noise along some directions, (k, k) each, and the noise's whole trace."""
    population = 1.0 - 1.0 / landscape.examples
    noise = population * gradient_noise.covariance(landscape, vectors)
    if vectors.shape[1] == landscape.size:
        h = landscape.curvature_matrix().double().cpu().numpy()
        return vectors.T @ h @ vectors, noise, float(np.trace(noise))
    products = [landscape.curvature_product(vector(landscape, v)) for v in vectors.T]
    curvature = vectors.T @ torch.stack(products, 1).double().cpu().numpy()
    trace = population * gradient_noise.trace(landscape)
    return 0.5 * (curvature + curvature.T), noise, trace

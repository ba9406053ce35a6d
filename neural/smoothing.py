"""Curvature and noise as weights that scatter see them: averages over the scatter.

To leading order in lr / B the averages move in proportion to it, by the width of the scatter and by
where the noise has pushed its mean (`neural.drift`), which are of the same order. They are measured
at one scatter, at both ends of random displacements around that mean, along the known eigenpairs,
and scaled to any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neural import noise as gradient_noise
from neural.curvature import Landscape
from neural.local_model import Kept, LocalModel, fingerprint, vector
from neural.spectrum import Eigenpairs, Progress
from nqm.errors import check_integer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Kinks:
    """What kinks of the loss add to the curvature (`neural.kinks`).

    It is taken not to depend on the size of the scatter.

    Attributes
    ----------
    pairs : ndarray, shape (k,)
        Along the eigenpairs.
    rest : float
        Along the scatter's part that is left.
    """

    pairs: FloatArray
    rest: float


@dataclass(frozen=True)
class Smoothing:
    """How curvature and noise along the eigenpairs change under scatter.

    Attributes
    ----------
    local : LocalModel
        At the centre.
    lr, batch_size : float
        Of the scatter at which it was measured.
    curvature, noise : ndarray, shape (k, k)
        Mean over the scatter less the value at the checkpoint.
    trace : float
        The same of the whole noise's trace.
    width : ndarray, shape (k, k)
        The part of `curvature` that is due to the width of the scatter, not to where its mean is.
    kinks : Kinks, optional
        Of the loss; none of a smooth one.
    """

    local: LocalModel
    lr: float
    batch_size: float
    curvature: FloatArray
    noise: FloatArray
    trace: float
    width: FloatArray
    kinks: Kinks | None = None

    def at(self, lr: float, batch_size: float) -> LocalModel:
        """The local model as the scatter of another rate sees it.

        A direction that the change, scaled to a far larger scatter, would turn downwards is taken
        for flat: leading order says no more than that.
        """
        scale = (lr / batch_size) / (self.lr / self.batch_size)
        local, kinks = self.local, self.kinks
        along = local.pairs.values if kinks is None else local.pairs.values + kinks.pairs
        size, turn = np.linalg.eigh(np.diag(along) + scale * self.curvature)
        size, turn = size[::-1], turn[:, ::-1]
        size = np.maximum(size, min(float(local.pairs.values.min(initial=0.0)), 0.0))
        noise = turn.T @ (local.noise + scale * self.noise) @ turn
        power, axes = np.linalg.eigh(0.5 * (noise + noise.T))
        noise = axes @ (np.maximum(power, 0.0)[:, None] * axes.T)  # differences, and rounding
        pairs = Eigenpairs(size, local.pairs.vectors @ turn, local.pairs.residuals)
        trace = max(local.noise_trace + scale * self.trace, float(np.trace(noise)))
        rest = 0.0 if kinks is None else kinks.rest
        return replace(
            local,
            pairs=pairs,
            noise=noise,
            slope=turn.T @ local.slope,
            draws=tuple(replace(draw, values=draw.values + rest) for draw in local.draws),
            noise_trace=trace,
        )

    def share(
        self, lr: float, batch_size: float, steps: float, seen: LocalModel | None = None
    ) -> float:
        """Part of a run's excess that is due to the change of curvature with the scatter's width.

        The scatter S settles by the mean curvature, H + D, while the loss of a Gaussian scatter is
        1/2 tr((H + D / 2) S), D itself in proportion to the scatter: of K members the excess is
        (excess - share) / K + share / (2 K^2). `seen` is `at` of the same rate, where it is known.
        """
        scale = (lr / batch_size) / (self.lr / self.batch_size)
        seen = self.at(lr, batch_size) if seen is None else seen
        turn = self.local.pairs.vectors.T @ seen.pairs.vectors
        change = turn.T @ (scale * self.width) @ turn
        return 0.5 * float(np.sum(change * seen.scatter(lr, batch_size, steps)))

    def growth(self, lr: float, batch_size: float) -> float:
        """By which part of itself the noise grows under scatter.

        Noise that scatters weights, which makes noise: what leading order leaves out is of the size
        of the square of this.
        """
        scale = (lr / batch_size) / (self.lr / self.batch_size)
        return scale * self.trace / max(self.local.noise_trace, 1e-300)

    def creased(self) -> float:
        """What kinks add to the curvature along the eigenpairs, as a part of it."""
        added = 0.0 if self.kinks is None else float(self.kinks.pairs.sum())
        return added / float(np.abs(self.local.pairs.values).sum())


def measure_smoothing(
    landscape: Landscape,
    local: LocalModel,
    lr: float,
    batch_size: float,
    steps: float,
    *,
    mean: FloatArray | None = None,
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
    mean : ndarray, shape (p,), optional
        Of the scatter, from the checkpoint (`neural.drift.Drift.moved`); the checkpoint by default.
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

    centre = landscape.weights
    if mean is not None:
        centre = centre + vector(landscape, mean)

    def averages() -> dict[str, Any]:
        rng = np.random.default_rng([seed, 4])
        found = []
        for _ in range(samples):
            moved = vector(landscape, local.displacement(rng, lr, batch_size, steps))
            for sign in (1.0, -1.0):
                found.append(_along(landscape.at(centre + sign * moved), vectors))
                if progress is not None:
                    progress(1)
        curvature, noise, trace = (np.mean(part, axis=0) for part in zip(*found, strict=True))
        still = np.diag(local.pairs.values)
        middle = still if mean is None else _along(landscape.at(centre), vectors)[0]
        return {
            "curvature": curvature - still,
            "noise": noise - local.noise,
            "trace": trace - local.noise_trace,
            "width": curvature - middle,
        }

    where = 0.0 if mean is None else float(np.linalg.norm(mean))
    basis = f"{len(local.pairs.values)}-{len(local.draws)}-{where:.8g}"
    stage = f"averages-{lr:.8g}-{batch_size}-{steps}-{samples}-{basis}"
    found = kept(stage, averages)
    parts = (found[name] for name in ("curvature", "noise", "trace", "width"))
    curvature, noise, trace, width = parts
    return Smoothing(local, lr, batch_size, curvature, noise, float(trace), width)


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

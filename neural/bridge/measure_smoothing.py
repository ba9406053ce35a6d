"""Measurement of the averages that `neural.bridge.smoothing` scales to other trainings.

In one training, along the known eigenpairs: where noise-free descent ends (and where its noise
turns round), then at both ends of random displacements with the covariance there, around the mean,
and at the mean.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neural.bridge.config import Training
from neural.bridge.drift import SAMPLE, Drift, calm_end
from neural.bridge.noise_free_path import NoiseFreePath
from neural.bridge.scatter import displacements as displacements_of
from neural.bridge.scatter import matched_normals
from neural.bridge.smoothing import Change, Smoothing
from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import LocalQuadratic, vector
from neural.curvature.risk import TOGETHER, EmpiricalRisk
from neural.curvature.sampling import ExampleSamples, sampled_part
from neural.curvature.spectrum import Progress
from nqm.errors import check_integer
from nqm.progress import times

FloatArray = NDArray[np.float64]
NAMES = ("curvature", "noise", "trace")

#: Work of the gradients of single examples, in gradients of their mean; about.
PASS = 2


def measure_smoothing(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    still: Smoothing,
    *,
    drift: Drift | None = None,
    scatter: LocalQuadratic | None = None,
    displacements: int = 4,
    noise_displacements: int = 0,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Smoothing:
    """Measure curvature and noise averaged over the weights of one training.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    still : Smoothing
        Result of `measure_descent` for this training.
    drift : Drift, optional
        Force that displaces the mean of the weights; by default the mean is where descent ends.
    scatter : LocalQuadratic, optional
        Local model that gives the covariance of the displacements; by default `at_descent`.
    displacements : int
        Number of random displacements, at least 1. At both ends of each, and at the mean, k Hessian
        products and the noise along k directions are computed; the products at the ends are those
        of a sample of `SAMPLE` examples where there are many more (`neural.curvature.sampling`).
    noise_displacements : int
        Number of random displacements at whose ends the noise is computed, if larger: it costs far
        less than curvature, and differs more between displacements.
    seed, cache
        See `neural.bridge.drift.measure_drift`.
    progress : callable, optional
        Called with the work done since the last call, in gradients (`averaging_work`).

    Returns
    -------
    Smoothing
        Without kinks.

    Raises
    ------
    NQMError
        If `displacements` is below 1.
    """
    check_integer("averaging_displacements", displacements, 1)
    local, training, path = still.local, still.training, still.path
    seen, vectors = scatter or still.at_descent(training), local.pairs.vectors
    descent_end = risk.weights + vector(risk, calm_end(local, training, path))
    centre, pushed = descent_end, 0.0
    if drift is not None:
        by_noise = drift.displacement(training)
        centre, pushed = descent_end + vector(risk, by_noise), float(np.linalg.norm(by_noise))
    count = max(displacements, noise_displacements)

    def averages() -> dict[str, Any]:
        if path is still.far:
            start = zip(NAMES, _at_checkpoint(local), strict=True)
            descent: Any = [old + getattr(still.descent[-1], name) for name, old in start]
        else:
            descent = _along(risk.at(descent_end), vectors, progress)
        mean = descent if drift is None else _along(risk.at(centre), vectors, progress)
        rng, drawn = np.random.default_rng([seed, 4]), displacements_of(seen, training)
        normals = matched_normals(seen, training, rng, count)
        moves = (vector(risk, drawn(rng, None, normal)) for normal in normals)
        samples = None if local.complete else ExampleSamples(risk.at(centre), SAMPLE, [seed, 8])
        curvature, noise = np.zeros((2, *local.noise.shape))
        trace = 0.0
        for i, moved in enumerate(moves):
            ends = centre + moved, centre - moved
            for end in ends:
                own_noise, own_trace = _noise(risk.at(end), vectors, progress)
                noise, trace = noise + own_noise / (2 * count), trace + own_trace / (2 * count)
            if i >= displacements:
                continue
            part = risk if samples is None else samples.draw(i % 2, i // 2)
            # The curvature of the same examples at both ends and in the middle: its change differs
            # little between samples.
            alone = part.factors is not None
            curvature -= _curvature(part, vectors, None) if alone else mean[0]
            for end in ends:
                curvature += 0.5 * _curvature(part.at(end), vectors, None if alone else progress)
            if alone and progress is not None:
                progress(_work_at(risk, local))
        averaged = mean[0] + curvature / displacements, noise, trace
        return _differences("width", averaged, mean) | _differences("mean", mean, descent)

    found = (cache or Cache()).of(risk, seed=seed)(
        "averages",
        averages,
        training=training,
        displacements=displacements,
        noise_displacements=count,
        local=local.key(),
        seen=seen.key(),
        pushed=f"{pushed:.8g}",
        sample=SAMPLE,
    )
    width, mean = _change(found, "width"), _change(found, "mean")
    return replace(still, width=width, mean=mean, drift=drift)


def measure_descent(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    *,
    path: NoiseFreePath | None = None,
    far: NoiseFreePath | None = None,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Smoothing:
    """Measure how curvature and noise change along descent, before `measure_smoothing`.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    local : LocalQuadratic
        Measured on this risk.
    training : Training
        The training whose weights curvature and noise will be averaged over.
    path : NoiseFreePath, optional
        Noise-free training of the loss itself; its end replaces that of descent on the quadratic.
    far : NoiseFreePath, optional
        Path of the training that descends farthest; the change by descent is that to its knots. By
        default it is that of `training` on the quadratic.
    seed, cache, progress
        See `measure_smoothing`.

    Returns
    -------
    Smoothing
        Its changes with covariance and mean are zero.
    """
    vectors = local.pairs.vectors
    places = far.places if far is not None else calm_end(local, training, path)[None]
    stored = (cache or Cache()).of(risk, seed=seed)

    def change_at(moved: FloatArray) -> Change:
        def there() -> dict[str, Any]:
            found = _along(risk.at(risk.weights + vector(risk, moved)), vectors, progress)
            return _differences("descent", found, _at_checkpoint(local))

        length = f"{float(np.linalg.norm(moved)):.8g}"
        return _change(stored("descent", there, local=local.key(), moved=length), "descent")

    zero = np.zeros_like(local.noise)
    none, changes = Change(zero, zero, 0.0), tuple(change_at(moved) for moved in places)
    return Smoothing(local, training, none, none, changes, far=far, path=path)


def _at_checkpoint(local: LocalQuadratic) -> tuple[FloatArray, FloatArray, float]:
    """Curvature and noise there, as `_along` gives them."""
    return np.diag(local.pairs.values), local.noise, local.noise_trace


def _differences(change: str, after: Any, before: Any) -> dict[str, Any]:
    """Arrays of a change, for the cache."""
    values = zip(NAMES, after, before, strict=True)
    return {f"{change}-{name}": new - old for name, new, old in values}


def _change(stored: dict[str, Any], name: str) -> Change:
    curvature, noise, trace = (stored[f"{name}-{what}"] for what in NAMES)
    return Change(curvature, noise, float(trace))


def half_of(displacements: int) -> int:
    """Number of displacements at which noise is measured, of those at which gradients are.

    Parameters
    ----------
    displacements : int

    Returns
    -------
    int
        It takes all examples at each of them, where gradients take a sample.
    """
    return (displacements + 1) // 2


def averaging_work(
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    displacements: int,
    noise_displacements: int = 0,
    knots: int = 1,
) -> int:
    """Work that `measure_smoothing` reports with a drift, in gradients, for a progress bar.

    Parameters
    ----------
    risk, local, displacements, noise_displacements
        See `measure_smoothing`.
    knots : int
        Number of places of descent that are measured.

    Returns
    -------
    int
    """
    each = TOGETHER * (risk.matrix_work if local.complete else len(local.pairs.values))
    noises = 2 * max(displacements, noise_displacements) + knots + 1
    return (knots + 1) * each + displacements * _work_at(risk, local) + noises * PASS


def _work_at(risk: EmpiricalRisk, local: LocalQuadratic) -> int:
    """Work of the curvature for one displacement."""
    each = TOGETHER * (risk.matrix_work if local.complete else len(local.pairs.values))
    part = 1.0 if local.complete else sampled_part(risk.examples, SAMPLE)
    return 2 * each if part == 1.0 else math.ceil(3.0 * part * each)


def _along(
    risk: EmpiricalRisk, vectors: FloatArray, progress: Progress | None
) -> tuple[FloatArray, FloatArray, float]:
    """Curvature and noise along directions, (k, k) each, and the trace of the whole noise."""
    return _curvature(risk, vectors, progress), *_noise(risk, vectors, progress)


def _curvature(risk: EmpiricalRisk, vectors: FloatArray, progress: Progress | None) -> FloatArray:
    """Curvature along directions, (k, k)."""
    products = times(progress, TOGETHER)
    if vectors.shape[1] == risk.size:
        h = risk.curvature_matrix(products).double().cpu().numpy()
        return np.asarray(vectors.T @ h @ vectors)
    rows = torch.from_numpy(np.ascontiguousarray(vectors.T)).to(risk.weights)
    curvature = vectors.T @ risk.curvature_products(rows, products).double().cpu().numpy().T
    return np.asarray(0.5 * (curvature + curvature.T))


def _noise(
    risk: EmpiricalRisk, vectors: FloatArray, progress: Progress | None
) -> tuple[FloatArray, float]:
    """Noise along directions, (k, k), and the trace of the whole noise."""
    noise, trace = gradient_noise.covariance_and_trace(risk, vectors)
    if progress is not None:
        progress(PASS)
    return noise, trace

"""The force balance, measured where the mean of the weights lies.

The mean gradient over the scatter d of the weights, G(m) = E[gradient(w + m + d)], is the force at
m = 0 (`neural.bridge.drift`), and the mean m moves until G(m) vanishes. The prediction takes
G(m) - G(0) = H m, with a Hessian averaged over few displacements: where it is uncertain, so is m,
and on average the loss of m is too large, as the inverse of a mean is less than the mean of
inverses. But G(m) - G(0) can be measured at the predicted m by gradients alone, at many more
displacements and in all directions. What it has beyond H m is added to the force. It begins to act
as the mean moves, later than the force itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.drift import SAMPLE, Drift, draw_index
from neural.bridge.response import Function, flat_below_zero, response
from neural.bridge.scatter import displacements as displacements_of
from neural.bridge.scatter import matched_normals, noise_age
from neural.curvature.cache import Cache
from neural.curvature.lanczos import LanczosNodes, lanczos_together
from neural.curvature.local_quadratic import LocalQuadratic, vector
from neural.curvature.risk import TOGETHER, EmpiricalRisk
from neural.curvature.sampling import ExampleSamples, sampled_part
from neural.curvature.spectrum import Progress, products
from nqm.progress import times

FloatArray = NDArray[np.float64]
#: Number of steps at which the course of the displacement is computed.
TIMES = 32


def balanced(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    drift: Drift,
    seen: LocalQuadratic,
    calm: FloatArray,
    *,
    displacements: int,
    lanczos_steps: int = 10,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Correct the force by the mean gradient at the displaced mean.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    drift : Drift
        Result of `Smoothing.along_mean_path`.
    seen : LocalQuadratic
        Local model that gives the covariance of the displacements.
    calm : ndarray, shape (p,)
        Where the force was measured: displacement by training without noise.
    displacements : int
        Number of random displacements, at least 2. Each takes six gradients, of the examples of
        `measure_drift`.
    lanczos_steps, seed, cache, progress
        See `neural.bridge.drift.measure_drift`.

    Returns
    -------
    Drift
        With the corrected force, in both of its measurements.
    """
    training, pairs = drift.training, drift.local.pairs
    age, lag = noise_age(drift.local, training), _lag(drift)
    now, later = (
        flat_below_zero(response(training, training.steps, delay)) for delay in (age, lag)
    )

    def part(h: FloatArray) -> FloatArray:
        """Displacement by a force that begins later, over that by the force."""
        psi = now(h)
        return np.divide(later(h), psi, out=np.ones_like(psi), where=psi > 0.0)

    moved = drift.displacement_twice(training)
    restored = [-force for force in _applied(drift, lambda h: h * now(h))]
    centre = risk.at(risk.weights + vector(risk, calm))
    stored = (cache or Cache()).of(risk, seed=seed)

    def measured() -> dict[str, Any]:
        samples = ExampleSamples(centre, SAMPLE, [seed, 9])
        rng, drawn = np.random.default_rng([seed, 5]), displacements_of(seen, training)
        counts = (displacements + 1) // 2, displacements // 2
        normals = [matched_normals(seen, training, rng, count) for count in counts]
        ends = [vector(risk, one) for one in moved]
        sums = np.zeros((2, risk.size))

        def secant(examples: EmpiricalRisk, at: Tensor, end: Tensor) -> FloatArray:
            change = examples.gradient(at + end) - examples.gradient(at)
            return np.asarray(change.double().cpu().numpy())

        for i in range(displacements):
            half = i % 2
            d = vector(risk, drawn(rng, draw_index(seen, i), normals[half][i // 2]))
            sample, end = samples.draw(half, i // 2), ends[half]
            sides = [secant(sample, centre.weights + sign * d, end) for sign in (1.0, -1.0)]
            # All examples give the change without scatter, once.
            sums[half] += 0.5 * (sides[0] + sides[1]) - secant(sample, centre.weights, end)
            if progress is not None:
                work = balance_work(displacements, risk.examples)
                progress(work * (i + 1) // displacements - work * i // displacements)
        whole = [secant(centre, centre.weights, end) for end in ends]
        return {"changes": sums / np.array(counts)[:, None] + whole}

    settings = {"training": training, "displacements": displacements, "sample": SAMPLE}
    settings |= {"local": seen.key(), "moved": f"{float(np.linalg.norm(moved[0])):.8g}"}
    beyond = stored("balance", measured, **settings)["changes"] - restored

    tops = [
        top + part(pairs.values) * (pairs.vectors.T @ extra)
        for top, extra in zip(drift.force_top, beyond, strict=True)
    ]
    rest = drift.force_rest
    if not drift.local.complete:
        outside = [
            nodes.apply(np.ones_like) + part(np.zeros(1)) * extra
            for nodes, extra in zip(rest, beyond, strict=True)
        ]

        def lanczos() -> dict[str, Any]:
            apply = products(risk, times(progress, TOGETHER))
            halves = lanczos_together(apply, outside, lanczos_steps, pairs.vectors)
            return {f"{i}-{n}": a for i, half in enumerate(halves) for n, a in vars(half).items()}

        found = stored("balanced", lanczos, lanczos_steps=lanczos_steps, **settings)
        names = ("values", "amplitudes", "vectors")
        first, second = (LanczosNodes(*(found[f"{i}-{name}"] for name in names)) for i in (0, 1))
        rest = (first, second)
    return replace(drift, force_top=(tops[0], tops[1]), force_rest=rest)


def balance_work(displacements: int, examples: int) -> int:
    """Work of the gradients that `balanced` takes at displacements, in gradients of all examples.

    Parameters
    ----------
    displacements : int
        See `balanced`.
    examples : int
        Number of examples, N.

    Returns
    -------
    int
    """
    return int(np.ceil(6.0 * displacements * sampled_part(examples, SAMPLE)))


def _applied(drift: Drift, function: Function) -> list[FloatArray]:
    """A function of the Hessian applied to both measurements of the force, (p,) each."""
    pairs = drift.local.pairs
    return [
        pairs.vectors @ (function(pairs.values) * top) + rest.apply(function)
        for top, rest in zip(drift.force_top, drift.force_rest, strict=True)
    ]


def _lag(drift: Drift) -> float:
    """Steps after which a constant force does what one does that grows with the displacement.

    The displacement after every step is compared with that after the last one by the loss of both.
    """
    steps, age = drift.training.steps, noise_age(drift.local, drift.training)
    last = flat_below_zero(response(drift.training, steps, age))
    times = (np.arange(TIMES) + 0.5) * steps / TIMES
    course = [flat_below_zero(response(drift.training, time, age)) for time in times]

    def mean(h: FloatArray) -> FloatArray:
        return np.asarray(np.mean([psi(h) for psi in course], axis=0))

    first, second = _applied(drift, lambda h: h * last(h))
    whole, part = (
        sum(float(a @ b) for a, b in zip(_applied(drift, psi), (second, first), strict=True))
        for psi in (last, mean)
    )
    return steps * (1.0 - min(max(part / whole, 0.0), 1.0)) if whole > 0.0 else 0.0

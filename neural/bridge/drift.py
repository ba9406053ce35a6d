"""The drift: a mean force on the weights, caused by gradient noise and third derivatives.

A quadratic loss has no such force. Around weights that scatter with covariance S the mean gradient
is g + 1/2 T:S, with T the tensor of third derivatives. The force f = 1/2 T:S moves the mean of any
number of runs away from the minimum of the loss. Averaging K members divides the scatter by K but
does not change this displacement. Its loss is the *floor*,

    1/2 f' psi^2 H f,      psi = (1 - (1 - lr H)^t) / H,

after t steps of SGD, and 1/2 f' H^-1 f in the end; heavy ball and averages over time have a psi of
their own (`neural.bridge.response`). f is measured on the network, by mean gradients at both ends
of random displacements of covariance S, and at both ends of half of each: 4/3 of their difference.
For a smooth loss that is 1/2 T:S. At kinks of the loss any scatter exerts a force, however narrow,
and training without noise meets this force as well; it cancels in the difference. S is proportional
to lr / B, f to S, and the floor to f squared: f is measured at the covariance of each training, and
scaled with lr / B to other trainings near by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neural.bridge.config import SHUFFLED, Training
from neural.bridge.noise_free_path import NoiseFreePath
from neural.bridge.response import Function, When, flat_below_zero, response
from neural.bridge.scatter import displacements as displacements_of
from neural.bridge.scatter import matched_normals, noise_age
from neural.bridge.shared_base import SharedBaseQuadratic
from neural.bridge.shuffled import order_force
from neural.curvature.cache import Cache
from neural.curvature.lanczos import LanczosNodes, lanczos_together
from neural.curvature.local_quadratic import LocalQuadratic, vector
from neural.curvature.risk import PRODUCT, TOGETHER, EmpiricalRisk
from neural.curvature.sampling import ExampleSamples, sampled_part
from neural.curvature.spectrum import Progress, operator, products
from nqm.errors import check_integer
from nqm.progress import times

FloatArray = NDArray[np.float64]
#: Number of examples whose gradients are measured at one displacement.
SAMPLE = 128
#: Fields of `Slopes`.
SLOPES = ("displacements", "differences", "beyond", "rises")


@dataclass(frozen=True)
class Slopes:
    """Odd part of the gradients at both ends of n random displacements.

    Attributes
    ----------
    displacements : ndarray, shape (n, k)
        Along the local model's eigenpairs.
    differences : ndarray, shape (n, k)
        Half of the difference of the gradients at both ends, along the eigenpairs.
    beyond : ndarray, shape (3,)
        With d the part of a displacement beyond the eigenpairs: the sums over displacements of d'd,
        of d'Hd by the local model (for late-phase members by the checkpoint's Hessian), and of d'
        times half of the difference of the gradients.
    rises : ndarray, shape (2,)
        Sums over displacements of the mean loss at both ends minus the loss in the middle; first
        for the displacements, then for displacements of half the length.
    """

    displacements: FloatArray
    differences: FloatArray
    beyond: FloatArray
    rises: FloatArray


@dataclass(frozen=True)
class Drift:
    """Mean force of the gradient noise on the weights, measured twice.

    The two measurements use independent halves of the displacements: a product of the two is free
    of the bias that the square of a noisy estimate has.

    Attributes
    ----------
    local : LocalQuadratic
        Local model at which the force was measured.
    training : Training
        Training at whose covariance the force was measured.
    force_top : tuple of ndarray, shape (k,)
        Both measurements along the local model's eigenpairs.
    force_rest : tuple of LanczosNodes
        Both measurements beyond them.
    slopes : Slopes
        Odd part of the same gradients, from which `neural.bridge.kinks` measures kinks; the force
        is their even part.
    loss_curvature : ndarray, shape (k, k), optional
        Curvature along the eigenpairs that turns the displacement of the mean into loss
        (`Smoothing.along_mean_path`); by default that of `local`, which balances the force.
    """

    local: LocalQuadratic
    training: Training
    force_top: tuple[FloatArray, FloatArray]
    force_rest: tuple[LanczosNodes, LanczosNodes]
    slopes: Slopes
    loss_curvature: FloatArray | None = None

    def _response(self, training: Training, when: When) -> Function:
        """Response to a force that builds up with the scatter: it acts later by the noise's age."""
        return flat_below_zero(response(training, when, noise_age(self.local, training)))

    def floor(self, training: Training, when: When) -> float:
        """Loss caused by the drift in the mean of any number of members.

        Parameters
        ----------
        training : Training
            The force is scaled to its learning rate and batch size.
        when : float or TimeAverage
            Number of steps, or an average over time.

        Returns
        -------
        float
        """
        psi, h = self._response(training, when), np.maximum(self.local.pairs.values, 0.0)
        first, second = (psi(h) * half for half in self.force_top)
        curved = h * second if self.loss_curvature is None else self.loss_curvature @ second
        value = first @ curved
        if len(self.force_rest[0].values):
            moved = self.force_rest[0].apply(lambda h: psi(h) ** 2 * np.maximum(h, 0.0))
            value += moved @ self.force_rest[1].apply(np.ones_like)
        return 0.5 * float(value) * training.noise_ratio(self.training) ** 2

    def cross(self, training: Training, when: When, path: NoiseFreePath | None = None) -> float:
        """Change of the mean's loss by the drift acting along the slope that descent leaves.

        Parameters
        ----------
        training, when
            See `floor`.
        path : NoiseFreePath, optional
            Its slope is used in place of that on the quadratic.

        Returns
        -------
        float
        """
        if path is not None:
            return float(path.slope(training, when) @ self.displacement(training, when))
        pushed = self._response(training, when)
        descended = flat_below_zero(response(training, when))

        def function(h: FloatArray) -> FloatArray:
            return pushed(h) * (descended(h) * h - 1.0)

        local = self.local
        force = 0.5 * (self.force_top[0] + self.force_top[1])
        value = local.slope @ (function(local.pairs.values) * force)
        if len(local.gradient.values) and len(self.force_rest[0].values):
            moved = local.gradient.apply(function)
            value += 0.5 * sum(float(moved @ half.apply(np.ones_like)) for half in self.force_rest)
        return float(value) * training.noise_ratio(self.training)

    def displacement(self, training: Training, when: When | None = None) -> FloatArray:
        """Displacement of the mean by the force, -psi f.

        Parameters
        ----------
        training, when
            See `floor`; by default `when` is the number of steps of the training.

        Returns
        -------
        ndarray, shape (p,)
        """
        first, second = self.displacement_twice(training, when)
        return np.asarray(0.5 * (first + second))

    def displacement_twice(
        self, training: Training, when: When | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """`displacement` by each of the two measurements of the force.

        Parameters
        ----------
        training, when
            See `displacement`.

        Returns
        -------
        first, second : ndarray, shape (p,)
        """
        psi = self._response(training, training.steps if when is None else when)
        pairs, scale = self.local.pairs, -training.noise_ratio(self.training)
        moved = []
        for top, rest in zip(self.force_top, self.force_rest, strict=True):
            total = pairs.vectors @ (psi(pairs.values) * top)
            if len(rest.values):
                total = total + rest.apply(psi)
            moved.append(np.asarray(scale * total))
        return moved[0], moved[1]


def descent(local: LocalQuadratic, training: Training, when: When) -> float:
    """Change of the loss by noise-free gradient descent on the quadratic.

    Parameters
    ----------
    local : LocalQuadratic
        Slope and curvature at the checkpoint.
    training : Training
        Gives the effective learning rate.
    when : float or TimeAverage
        Number of steps, or an average over time.

    Returns
    -------
    float
        At most 0 if no curvature is negative and the learning rate is stable.
    """
    psi = response(training, when)
    h, _, g = local.points()
    return float(g @ (0.5 * psi(h) ** 2 * h - psi(h)))


def descended(local: LocalQuadratic, training: Training, when: When | None = None) -> FloatArray:
    """Displacement by noise-free gradient descent on the quadratic after a training, -psi g.

    Negative curvature is replaced by zero: the loss, unlike the quadratic, is bounded from below.
    Beyond the edge of stability descent is taken to have converged.

    Parameters
    ----------
    local : LocalQuadratic
        Slope and curvature at the checkpoint.
    training : Training
        Gives the effective learning rate and the number of steps.
    when : float or TimeAverage, optional
        Number of steps, or an average over time; by default the training's number of steps.

    Returns
    -------
    ndarray, shape (p,)
    """
    bounded = _bounded_response(training, when)
    moved = local.pairs.vectors @ (bounded(local.pairs.values) * local.slope)
    if len(local.gradient.values):
        moved = moved + local.gradient.apply(bounded)
    return np.asarray(-moved)


def calm_end(
    local: LocalQuadratic,
    training: Training,
    path: NoiseFreePath | None = None,
    when: When | None = None,
) -> FloatArray:
    """Displacement by training without noise: on its path, or `descended` where that is not known.

    Parameters
    ----------
    local, training
        See `descended`.
    path : NoiseFreePath, optional
        Noise-free training of the loss itself.
    when : float or TimeAverage, optional
        See `descended`.

    Returns
    -------
    ndarray, shape (p,)
    """
    if path is None:
        return descended(local, training, when)
    return path.displacement(training, training.steps if when is None else when)


def _bounded_response(training: Training, when: When | None = None) -> Function:
    """The `response` of a loss that is bounded from below; see `descended`."""
    psi = response(training, training.steps if when is None else when)
    edge = 2.0 * (1.0 + training.momentum) / training.lr

    def bounded(h: FloatArray) -> FloatArray:
        return np.where(h < edge, psi(np.clip(h, 0.0, edge)), 1.0 / np.maximum(h, edge))

    return bounded


def measure_drift(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    *,
    path: NoiseFreePath | None = None,
    displacements: int = 64,
    lanczos_steps: int = 10,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Measure the force at the covariance of a training from the checkpoint.

    The displacements are centred where noise-free descent ends by the local model, not at the
    checkpoint: weights to which noise-free training has converged lie on more kinks than weights
    that scatter.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    local : LocalQuadratic
        Measured on this risk.
    training : Training
        The training whose covariance the displacements have.
    path : NoiseFreePath, optional
        Noise-free training of the loss itself; its end replaces that of descent on the quadratic.
    displacements : int
        Number of random displacements, at least 2. Each takes four gradients: at both ends, and at
        both ends of half of it, of a sample of `SAMPLE` examples where there are many more
        (`neural.curvature.sampling`).
    lanczos_steps : int
        Hessian products for each of the two measurements of the force.
    seed : int
        Seed of the displacements.
    cache : Cache, optional
        Stores the results, and returns them if they are asked for again.
    progress : callable, optional
        Called with the work done since the last call, in gradients.

    Returns
    -------
    Drift

    Raises
    ------
    NQMError
        If `displacements` is below 2.
    """
    check_integer("displacements", displacements, 2)
    # `local.key()` distinguishes local models of one checkpoint that are averaged over different
    # trainings (`Smoothing.seen_by`), by their spectrum and noise.
    settings: dict[str, Any] = {"training": training, "displacements": displacements}
    settings |= {"local": local.key(), "sample": SAMPLE}
    if path is not None:
        settings["path"] = f"{float(path.lengths[-1]):.8g}"
    stored = (cache or Cache()).of(risk, seed=seed)
    known = local.pairs.vectors
    centre = risk.weights + vector(risk, calm_end(local, training, path))

    def sampled() -> dict[str, Any]:
        found = _at_displacements(
            risk, risk.at(centre), local, training, displacements, seed, progress
        )
        # With a shared base the members' own minibatches act on the mean by less; not derived.
        if training.sampling == SHUFFLED and not isinstance(local, SharedBaseQuadratic):
            found["forces"] += order_force(risk.at(centre), local, training)
        return found

    gradients = stored("slopes", sampled, **settings)
    forces = gradients["forces"]

    def lanczos() -> dict[str, Any]:
        apply = products(risk, times(progress, TOGETHER))
        halves = lanczos_together(apply, list(forces), lanczos_steps, known)
        return {f"{i}-{name}": a for i, half in enumerate(halves) for name, a in vars(half).items()}

    force = stored("force", lanczos, lanczos_steps=lanczos_steps, **settings)
    rest = [
        LanczosNodes(*(force[f"{half}-{name}"] for name in ("values", "amplitudes", "vectors")))
        for half in (0, 1)
    ]
    top = (known.T @ forces[0], known.T @ forces[1])
    slopes = Slopes(*(np.asarray(gradients[name]) for name in SLOPES))
    return Drift(local, training, top, (rest[0], rest[1]), slopes)


def slopes_at(
    risk: EmpiricalRisk,
    drift: Drift,
    moved: FloatArray,
    *,
    displacements: int,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Slopes:
    """Measure the slopes of a drift again, at the same displacements around another centre.

    Parameters
    ----------
    risk : EmpiricalRisk
        See `measure_drift`.
    drift : Drift
        Result of `measure_drift`.
    moved : ndarray, shape (p,)
        The centre, relative to the checkpoint.
    displacements, seed, cache, progress
        See `measure_drift`.

    Returns
    -------
    Slopes
    """
    local, training = drift.local, drift.training
    settings = {"training": training, "displacements": displacements, "sample": SAMPLE}
    settings |= {"local": local.key(), "moved": f"{float(np.linalg.norm(moved)):.8g}"}
    centre = risk.at(risk.weights + vector(risk, moved))

    def measured() -> dict[str, Any]:
        found = _at_displacements(risk, centre, local, training, displacements, seed, progress)
        return {name: found[name] for name in SLOPES}

    found = (cache or Cache()).of(risk, seed=seed)("slopes_at_mean", measured, **settings)
    return Slopes(*(np.asarray(found[name]) for name in SLOPES))


def _at_displacements(
    risk: EmpiricalRisk,
    centre: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    displacements: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Sums of the gradients' even part, for the force, and the fields of `Slopes`."""
    known, apply = local.pairs.vectors, operator(risk, times(progress, PRODUCT))
    samples = ExampleSamples(centre, SAMPLE, [seed, 7])
    work = passes_at_displacements(displacements, risk.examples)
    rng, drawn = np.random.default_rng([seed, 3]), displacements_of(local, training)
    # The two measurements of the force must be independent.
    counts = (displacements + 1) // 2, displacements // 2
    normals = [matched_normals(local, training, rng, count) for count in counts]
    halves, rises = np.zeros((2, risk.size)), np.zeros(2)
    moved, differences, beyond = [], [], np.zeros(3)
    for i in range(displacements):
        draw = draw_index(local, i)
        d, part = drawn(rng, draw, normals[i % 2][i // 2]), samples.draw(i % 2, i // 2)
        odd, even, loss = _both_ends(part, d)
        _, near_even, near_loss = _both_ends(part, 0.5 * d)
        middle = part.loss()
        rises += loss - middle, near_loss - middle
        halves[i % 2] += (even - near_even) / 0.75
        moved.append(known.T @ d)
        differences.append(known.T @ odd)
        if draw is not None:
            outside, rest = d - known @ moved[-1], local.draws[draw]
            if isinstance(local, SharedBaseQuadratic):
                bent = outside @ apply(outside)
            else:  # exact, as d lies in the span of the draw's vectors
                bent = rest.values @ (rest.vectors.T @ outside) ** 2
            beyond += np.array([outside @ outside, bent, outside @ odd])
        if progress is not None:
            progress(work * (i + 1) // displacements - work * i // displacements)
    return {
        "forces": halves / np.array(counts)[:, None],
        "displacements": moved,
        "differences": differences,
        "beyond": beyond,
        "rises": rises,
    }


def passes_at_displacements(displacements: int, examples: int) -> int:
    """Number of gradients of all examples that cost as much as those at the displacements.

    Parameters
    ----------
    displacements : int
        See `measure_drift`.
    examples : int
        Number of examples, N.

    Returns
    -------
    int
    """
    return math.ceil(4.0 * displacements * sampled_part(examples, SAMPLE))


def _both_ends(risk: EmpiricalRisk, moved: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Half of the difference of the gradients at both ends, their mean, and the mean loss."""
    step = vector(risk, moved)
    ends = [risk.loss_and_gradient(risk.weights + sign * step) for sign in (1.0, -1.0)]
    (loss, _), (other_loss, _) = ends
    plus, minus = (slope.double().cpu().numpy() for _, slope in ends)
    return 0.5 * (plus - minus), 0.5 * (plus + minus), 0.5 * (loss + other_loss)


def draw_index(local: LocalQuadratic, sample: int) -> int | None:
    """Index of the noise draw for a displacement; the two halves share none if there are two."""
    count = len(local.draws)
    if not count or not len(local.draws[0].values):
        return None
    own = range(count)[sample % 2 :: 2] or range(count)
    return own[sample // 2 % len(own)]

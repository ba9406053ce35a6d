"""Covariance of the weights in one training, along the directions of a local quadratic.

With R = 1 - lr H and C the noise of a minibatch, t steps of SGD from a fixed start give the
weights the covariance S = lr^2 sum over s < t of R^s C R^s. For heavy ball, R^s is replaced by the
response of heavy ball to one step's noise after s further steps.

Negative curvature counts as zero here. On a quadratic it would let the scatter grow exponentially;
the loss, which is bounded from below, bends back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from neural.bridge.config import SHUFFLED, Training
from neural.bridge.iterate_averages import TimeAverage
from neural.bridge.shared_base import SharedBaseQuadratic
from neural.bridge.shuffled import scatter_sums, sums_at_end
from neural.curvature.local_quadratic import LocalQuadratic
from nqm import Problem, stability_edge

FloatArray = NDArray[np.float64]
#: Variances below this fraction of the largest are rounding errors and are set to zero.
ROUNDING = 1e-12
#: Random displacements for each direction along which their second moments are made exact.
PER_EXACT = 2
#: Steps of heavy ball whose responses are in memory together.
BLOCK = 2048


def covariance(
    local: LocalQuadratic, training: Training, when: int | TimeAverage | None = None
) -> FloatArray:
    """Covariance of the weights along the eigenpairs.

    Parameters
    ----------
    local : LocalQuadratic
        Gives curvature and noise. With a `SharedBaseQuadratic` it is the covariance of one member.
    training : Training
        Gives learning rate, batch size, momentum and number of steps.
    when : int or TimeAverage, optional
        Number of steps after which, or average over the steps of the training; by default the end
        of the training, of shuffled epochs the mean over the places in an epoch.

    Returns
    -------
    ndarray, shape (k, k)
    """
    if isinstance(local, SharedBaseQuadratic):
        mean = covariance(local.mean_model, training, when)
        across = local.pairs.vectors.T @ local.apart.pairs.vectors
        apart = across @ covariance(local.apart, training, when) @ across.T
        return local.mixed(mean, apart)
    training = _until(training, when)
    lr, steps = training.effective_lr, training.steps
    u = lr * np.maximum(local.pairs.values, 0.0)
    if isinstance(when, TimeAverage):
        sums = _averaged_sums(u, training, when, local.examples, joint=True)
    elif training.sampling == SHUFFLED:
        sums = _shuffled_sums(u, training, local.examples, when)
    elif training.momentum:
        sums = _heavy_ball_sums(u, training, joint=True)
    else:
        joint = np.outer(1.0 - u, 1.0 - u)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            sums = np.where(joint == 1.0, float(steps), (1.0 - joint**steps) / (1.0 - joint))
    return np.asarray(lr**2 / training.batch_size * local.noise * sums)


def rest_trace(local: LocalQuadratic, training: Training) -> float:
    """Trace of the covariance of the weights beyond the eigenpairs.

    Parameters
    ----------
    local, training
        See `covariance`.

    Returns
    -------
    float
        In units of the weights squared.
    """
    if not local.draws:
        return 0.0
    lr = training.effective_lr
    squares = [
        draw.amplitudes**2 @ noise_sums(lr * np.maximum(draw.values, 0.0), training, local.examples)
        for draw in local.draws
    ]
    return local.draw_scale * lr**2 / training.batch_size * float(np.mean(squares))


def matched_normals(
    local: LocalQuadratic, training: Training, rng: np.random.Generator, count: int
) -> FloatArray:
    """Draw standard normals along the eigenpairs for random displacements that are averaged over.

    What scatter changes in the loss, in curvature and in noise is quadratic in a displacement to
    leading order, and mostly due to few directions, so that its mean over few displacements is
    uncertain. Along the directions that carry most of the loss of the scatter, as many as
    half of the displacements, the second moments of these normals are therefore exactly 1 and
    uncorrelated, with each other and with all other directions. Means of quadratic functions have
    no bias by this, whichever function it is.

    Parameters
    ----------
    local, training
        See `covariance`.
    rng : Generator
        Source of the random numbers.
    count : int
        Number of displacements.

    Returns
    -------
    ndarray, shape (count, k)
        Arguments of `displacements`; for a `SharedBaseQuadratic` those of the mean and of a
        member's distance from it, side by side.
    """
    if isinstance(local, SharedBaseQuadratic):
        each = (local.mean_model, local.apart)
        return np.hstack([matched_normals(of, training, rng, count) for of in each])
    vectors, h = local.pairs.vectors, np.maximum(local.pairs.values, 0.0)
    normals = np.array([vectors.T @ rng.standard_normal(len(vectors)) for _ in range(count)])
    exact = min(count // PER_EXACT, len(h))
    if not exact:
        return normals
    root = _root(covariance(local, training))
    axes = np.linalg.eigh(_symmetric(root @ (h[:, None] * root)))[1][:, -exact:]
    along = normals @ axes
    size, turn = np.linalg.eigh(along.T @ along / count)
    matched = along @ (turn / np.sqrt(size)) @ turn.T
    others = normals - along @ axes.T
    others -= matched @ (matched.T @ others) / count
    # What is orthogonal to the matched normals has count - exact of the count degrees of freedom.
    return np.asarray(matched @ axes.T + np.sqrt(count / (count - exact)) * others)


def displacements(
    local: LocalQuadratic, training: Training, when: int | TimeAverage | None = None
) -> Callable[..., FloatArray]:
    """Make a function that draws random displacements of the weights, of shape (p,).

    The covariance is exact along the eigenpairs. Beyond them a displacement is made from one draw
    of the noise, whose diagonal is exact. The symmetric root of the covariance is used: the signs
    of eigenvectors differ between processors, and so the displacement does not depend on them.

    Parameters
    ----------
    local, training, when
        See `covariance`.

    Returns
    -------
    callable
        Takes a generator, the index of a draw or None for a random one and, optionally, one of the
        `matched_normals` in place of normals from the generator.
    """
    if isinstance(local, SharedBaseQuadratic):
        mean = displacements(local.mean_model, training, when)
        apart = displacements(local.apart, training, when)
        share = 1.0 / local.members

        def member(
            rng: np.random.Generator, draw: int | None = None, normal: FloatArray | None = None
        ) -> FloatArray:
            first, second = None, None
            if normal is not None:
                first, second = np.split(normal, [len(local.mean_model.pairs.values)])
            moved = np.sqrt(share) * mean(rng, draw, first)
            return np.asarray(moved + np.sqrt(1.0 - share) * apart(rng, None, second))

        return member
    vectors = local.pairs.vectors
    root = _root(covariance(local, training, when))
    lr = training.effective_lr
    scale = local.draw_scale * lr**2 / training.batch_size

    def drawn(
        rng: np.random.Generator, draw: int | None = None, normal: FloatArray | None = None
    ) -> FloatArray:
        if normal is None:
            normal = vectors.T @ rng.standard_normal(len(vectors))
        moved = vectors @ (root @ normal)
        if local.draws and len(local.draws[0].values):
            noise = local.draws[rng.integers(len(local.draws)) if draw is None else draw]
            u = lr * np.maximum(noise.values, 0.0)
            sums = noise_sums(u, training, local.examples, when)
            moved = moved + noise.vectors @ (np.sqrt(scale * sums) * noise.amplitudes)
        return np.asarray(moved)

    return drawn


def largest_stable_lr(local: LocalQuadratic, training: Training) -> float:
    """Learning rate at the edge of stability of the training's optimizer on the quadratic.

    Parameters
    ----------
    local : LocalQuadratic
        Gives the curvature.
    training : Training
        Gives the momentum.

    Returns
    -------
    float
        Learning rate of the optimizer, not the effective one.
    """
    return edge_of(float(local.points()[0].max(initial=0.0)), training)


def edge_of(largest: float, training: Training) -> float:
    """`largest_stable_lr` by the largest curvature, whose direction becomes unstable first.

    Parameters
    ----------
    largest : float
        Largest curvature.
    training : Training
        Gives the momentum.

    Returns
    -------
    float
    """
    return float(stability_edge(Problem([max(largest, 1e-300)], [0.0]), training.algorithm))


def noise_sums(
    u: FloatArray, training: Training, examples: int, when: int | TimeAverage | None = None
) -> FloatArray:
    """Variance that the training's noisy steps accumulate, in units of the variance of one step.

    For SGD it is the sum over t < steps of (1 - lr h)^(2t).

    Parameters
    ----------
    u : ndarray
        Effective learning rate times curvature, lr h.
    training : Training
        Gives momentum, number of steps and sampling.
    examples : int
        Number of examples of a shuffled epoch.
    when : int or TimeAverage, optional
        See `covariance`.

    Returns
    -------
    ndarray, shape of `u`
    """
    training = _until(training, when)
    if isinstance(when, TimeAverage):
        return _averaged_sums(u, training, when, examples, joint=False)
    if training.sampling == SHUFFLED:
        return np.diag(_shuffled_sums(u, training, examples, when))
    if training.momentum:
        return _heavy_ball_sums(u, training, joint=False)
    r, steps = (1.0 - u) ** 2, training.steps
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(np.abs(1.0 - r) < 1e-12, float(steps), (1.0 - r**steps) / (1.0 - r))


def responses(u: FloatArray, training: Training, average: TimeAverage | None = None) -> FloatArray:
    """Displacement by unit noise in every step, in units of the effective rate.

    Parameters
    ----------
    u, training
        See `noise_sums`.
    average : TimeAverage, optional
        Average over the steps of the training.

    Returns
    -------
    ndarray, shape (steps, k)
        Of the last weights, or of the average; the last step first.
    """
    if average is not None:
        return np.concatenate(list(_averaged_responses(u, training, average)))
    beta = training.momentum
    rows = np.empty((training.steps, len(u)))
    before, now = np.zeros(len(u)), np.full(len(u), 1.0 - beta)
    with np.errstate(invalid="ignore", over="ignore"):
        for row in rows:
            row[:] = now
            before, now = now, (1.0 + beta - (1.0 - beta) * u) * now - beta * before
    return rows


def noise_age(local: LocalQuadratic, training: Training) -> float:
    """Mean age of the noise that a training's scatter consists of at its end, weighted by its loss.

    With S(s) the scatter after s of T steps it is the sum over s < T of
    1 - tr(H S(s)) / tr(H S(T)): a force proportional to tr(H S(s)) has moved a flat direction as
    far as one that has its final strength, but begins so many steps later.

    Parameters
    ----------
    local : LocalQuadratic
        Gives curvature and noise; of late-phase members, those of their mean.
    training : Training
        Gives learning rate, momentum and number of steps.

    Returns
    -------
    float
        In steps, from 1 to (T + 1) / 2 without momentum; 0 if nothing scatters, or beyond the edge
        of stability.
    """
    h, v, _ = local.points()
    if training.sampling == SHUFFLED:  # after one epoch the scatter has settled
        return 0.0
    h, v = h[h > 0.0], v[h > 0.0]
    beta = training.momentum
    if training.lr * h.max(initial=0.0) >= 2.0 * (1.0 + beta):
        return 0.0
    c = 1.0 + beta - training.lr * h
    # State: squares and product of the last two r (see `_heavy_ball_sums`), S(s), sum of earlier S.
    step = np.zeros((len(h), 5, 5))
    step[:, 0, 0], step[:, 0, 1], step[:, 0, 2] = c**2, -2.0 * c * beta, beta**2
    step[:, 1, 0], step[:, 1, 1] = c, -beta
    step[:, 2, 0] = 1.0
    step[:, 3, 0], step[:, 3, 3] = 1.0, 1.0
    step[:, 4, 3], step[:, 4, 4] = 1.0, 1.0
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing scatters
        after = np.linalg.matrix_power(step, training.steps)[..., 0]
        age = training.steps - np.divide(*(h * v @ after[:, 4:2:-1]))
    return float(age) if np.isfinite(age) else 0.0


def _until(training: Training, when: int | TimeAverage | None) -> Training:
    """The training up to a number of steps."""
    return replace(training, steps=when) if isinstance(when, int) else training


def _shuffled_sums(
    u: FloatArray, training: Training, examples: int, when: int | TimeAverage | None
) -> FloatArray:
    """`noise_sums` of shuffled epochs for all pairs of directions: over places, or at a step."""
    rows = responses(u, training)
    if when is None:
        return scatter_sums(rows, examples, training)
    return sums_at_end(rows, examples, training.batch_size, joint=True)


def _heavy_ball_sums(u: FloatArray, training: Training, joint: bool) -> FloatArray:
    """`noise_sums` of heavy ball, with the effective rate; `joint` for all pairs of directions.

    Noise of size 1 has moved the weights by r_a times the optimizer's rate after a steps, with
    r_0 = 0, r_1 = 1 and r_(a+1) = (1 + b - (1 - b) u) r_a - b r_(a-1). A filter runs through many
    steps of a direction at once: step by step, the loop took most of a search for the best rate.
    """
    beta, steps = training.momentum, training.steps
    total = np.zeros((len(u), len(u)) if joint else len(u))
    factors = [np.array([1.0, (1.0 - beta) * each - 1.0 - beta, beta]) for each in u]
    states = [np.zeros(2)] * len(u)
    pulse = np.zeros(min(steps, BLOCK))
    pulse[0] = 1.0 - beta
    with np.errstate(invalid="ignore", over="ignore"):
        for done in range(0, steps, BLOCK):
            block = np.empty((len(u), min(steps - done, BLOCK)))
            for i, factor in enumerate(factors):
                block[i], states[i] = lfilter([1.0], factor, pulse[: block.shape[1]], zi=states[i])
            pulse[0] = 0.0
            total += block @ block.T if joint else (block**2).sum(1)
    return total


def _averaged_sums(
    u: FloatArray, training: Training, average: TimeAverage, examples: int, joint: bool
) -> FloatArray:
    """`noise_sums` of an average over time; `joint` for all pairs of directions."""
    if training.sampling == SHUFFLED:
        rows = responses(u, training, average)
        return sums_at_end(rows, examples, training.batch_size, joint)
    total = np.zeros((len(u), len(u)) if joint else len(u))
    with np.errstate(invalid="ignore", over="ignore"):
        for block in _averaged_responses(u, training, average):
            total += block.T @ block if joint else (block**2).sum(0)
    return total


def _averaged_responses(
    u: FloatArray, training: Training, average: TimeAverage
) -> Iterator[FloatArray]:
    """`responses` of an average over time, some steps at a time.

    Noise of size 1 in step s moves the average by the effective rate times y_s, the sum over
    t >= s of the weight of w_t times r_(t - s + 1) (see `_heavy_ball_sums`). The recursion of r
    gives y_s from the two steps after it.
    """
    beta = training.momentum
    after, now = np.zeros(len(u)), np.zeros(len(u))
    weights = average.weights()[::-1]
    with np.errstate(invalid="ignore", over="ignore"):
        for part in np.array_split(weights, max(len(weights) // 512, 1)):
            block = np.empty((len(part), len(u)))
            for row, weight in zip(block, part, strict=True):
                own = (1.0 - beta) * weight
                after, now = now, (1.0 + beta - (1.0 - beta) * u) * now - beta * after + own
                row[:] = now
            yield block


def _root(matrix: FloatArray) -> FloatArray:
    """Symmetric root of a covariance, whose negative eigenvalues are rounding errors."""
    size, turn = np.linalg.eigh(_symmetric(matrix))
    return np.asarray(turn * np.sqrt(np.where(size > ROUNDING * size[-1], size, 0.0)) @ turn.T)


def _symmetric(matrix: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (matrix + matrix.T))

"""Shuffled epochs: minibatches drawn without replacement, whose noise cancels over an epoch.

With a fixed noise vector for every example, the n minibatches of an epoch have exchangeable noises
that sum to zero: their covariance is v' n / (n - 1) (I - 1 1' / n), with the variance
v' = (v / B) (N - B) / (N - 1) of a minibatch of B out of N. One epoch of z' = A z + C e then adds

    v' n / (n - 1) [ sum_j A^j C C' A'^j - (1/n) (sum_j A^j C) (sum_j A^j C)' ],

independent of other epochs. Directions that relax in less than an epoch hardly change; slower ones
lose most of their noise (the two regimes of Kuehn & Rosenow 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError, check_integer
from nqm.limits import check_memory, check_walk
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, one_phase
from nqm.solvers.moments import whole_period
from nqm.transition import extract, readout, spectral_radius
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class ShuffledSteady:
    """Steady state under shuffled epochs.

    Attributes
    ----------
    loss : float
        Expected loss of the evaluated weights, mean over the steps of an epoch.
    loss_at_end : float
        The same at the end of an epoch, where the noise has just cancelled.
    weight_variance : ndarray, shape (d,)
        Variance of the evaluated weights, mean over the steps of an epoch.
    radius : float
        Largest spectral radius of one step; losses are infinite if it is 1 or larger.
    """

    loss: float
    loss_at_end: float
    weight_variance: FloatArray
    radius: float

    __repr__ = short_repr
    _repr_html_ = short_html


def shuffled_steady(problem: Problem, phase: Phase, examples: int) -> ShuffledSteady:
    """Compute the steady state when every epoch is a random permutation of the examples.

    Parameters
    ----------
    problem : Problem
        Its `noise_variance` is the variance of one example's gradient over the N examples.
    phase : Phase
        Linear method at constant rates and batch size; its `steps` have no effect. K members, each
        with minibatches of its own from one shuffled epoch, equal one model on minibatches of K B.
    examples : int
        N: examples of an epoch, a multiple of the examples of one step.

    Returns
    -------
    ShuffledSteady
        Losses and variances; infinite if the phase is unstable.

    Raises
    ------
    NQMError
        If the epoch is not a whole number of at least two steps, or the phase is not constant.
    """
    problem = additive_only("shuffled_steady", problem)
    phase = one_phase("shuffled_steady.phase", phase)
    check_integer("examples", examples, 2)
    algorithm = phase.algorithm
    if (
        not isinstance(algorithm, Algorithm)
        or whole_period(phase) != 1
        or algorithm.time.weights_never_repeat
    ):
        raise NQMError(
            "shuffled epochs need a linear method at constant rates that is the same every step"
        )
    mode = algorithm.modes()[0]
    per_step = phase.examples(1)
    steps = round(examples / per_step)
    if steps < 2 or steps * per_step != examples:
        raise NQMError(
            f"examples must be at least two steps of {per_step:g} examples each; got {examples}"
        )
    check_walk("shuffled_steady.examples", steps, "an epoch is composed of its steps")
    check_memory("shuffled_steady.examples", examples, 4.0 * steps * problem.directions)
    rates = phase.settings(0, 1)[0]
    lr = tuple(np.asarray(rate) for rate in rates[:-1])
    transition = extract(mode.algorithm, problem.curvature, lr if len(lr) > 1 else lr[0])
    a, c = transition.matrix, transition.noise
    if c.shape[-1] != 1 or transition.own.any():
        raise NQMError(
            f"shuffled epochs need one minibatch and no noise of its own in a step of "
            f"{type(algorithm).__name__}"
        )
    radius = float(spectral_radius(a)[problem.curvature > 0].max(initial=0.0))
    if radius >= 1.0:
        diverged = np.full(problem.directions, np.inf)
        return ShuffledSteady(np.inf, np.inf, diverged, radius)
    # The minibatch of one step has the noise of B / mode.noise_share examples.
    share = mode.noise_share / float(rates[-1])
    variance = problem.noise_variance * share * (examples - 1.0 / share) / (examples - 1.0)
    scale = (variance * steps / (steps - 1.0))[:, None, None]
    read = readout(mode.algorithm, 1)

    power = np.broadcast_to(np.eye(a.shape[-1]), a.shape).copy()
    summed, spread = np.zeros_like(c), np.zeros_like(a)
    path = []
    for _ in range(steps):
        summed = a @ summed + c
        spread = a @ spread @ np.swapaxes(a, -1, -2) + c @ np.swapaxes(c, -1, -2)
        power = a @ power
        added = scale * (spread - summed @ np.swapaxes(summed, -1, -2) / steps)
        path.append(
            (np.einsum("i,dij->dj", read, power), np.einsum("i,dij,j->d", read, added, read))
        )
    end = _fixed_point(power, added, problem.curvature > 0)
    variances = [np.einsum("di,dij,dj->d", lift, end, lift) + fresh for lift, fresh in path]
    mean = np.mean(variances, axis=0)
    weight = 0.5 * problem.curvature * problem.multiplicity
    return ShuffledSteady(float(weight @ mean), float(weight @ variances[-1]), mean, radius)


def _fixed_point(a: FloatArray, q: FloatArray, curved: NDArray[np.bool_]) -> FloatArray:
    """Solve S = A S A' + Q for every curved direction, (d, n, n); 0 along flat ones."""
    n = a.shape[-1]
    kron = np.einsum("dij,dkl->dikjl", a, a).reshape(-1, n * n, n * n)
    system = np.eye(n * n) - kron
    system[~curved] = np.eye(n * n)
    right = np.where(curved[:, None, None], q, 0.0).reshape(-1, n * n, 1)
    return np.asarray(np.linalg.solve(system, right).reshape(-1, n, n))

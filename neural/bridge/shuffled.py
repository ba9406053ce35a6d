"""Shuffled epochs: the scatter that is left of them, and the force of their order on the mean.

Without replacement the n minibatches of an epoch have noises e that add up to zero,
E[e_j e_k'] = -E[e e'] / (n - 1) for j != k, and different epochs are independent. With r_a the
displacement by unit noise after a steps (of SGD it is (1 - lr h)^(a - 1) in units of the rate):

- The covariance of the weights loses what cancels: in place of C / B times the sum of r_a r_a' it
  is C / B N / (N - 1) times [sum r_a r_a' - sum over epochs R R' / n], with R the sum of r_a over
  the steps of one epoch. The excess takes it after each step (`sums_at_end`), the force on the
  mean as averaged over the places in an epoch (`scatter_sums`).
- The minibatches that are still to come differ from those just used, and so does their curvature:
  the mean gradient where the weights are is larger by

      f = lr / (n - 1) E[(H_b - H) F e_b],     F = 1/n sum over a < n of (n - a) r_a,

  with H_b, e_b those of one minibatch. For small lr h n it is a quarter of lr times the gradient of
  the trace of the noise covariance (Smith et al. 2021, "On the origin of implicit regularization
  in stochastic gradient descent", ICLR); directions that settle within an epoch have less.

Draws with replacement have neither.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import Training
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import EmpiricalRisk

FloatArray = NDArray[np.float64]


def scatter_sums(responses: FloatArray, examples: int, training: Training) -> FloatArray:
    """Variance that noisy steps accumulate in shuffled epochs, in units of one step's.

    Parameters
    ----------
    responses : ndarray, shape (T, k)
        Displacement by unit noise after 1 ... T steps. Only whole epochs count where there is one;
        of less than an epoch it is the variance at its end.
    examples : int
        Number of examples, N.
    training : Training
        Gives the batch size.

    Returns
    -------
    ndarray, shape (k, k)
        For all pairs of directions; the covariance is this times that of a minibatch drawn with
        replacement.
    """
    n = examples // training.batch_size
    steps = len(responses) // n * n
    if not steps:
        return sums_at_end(responses, examples, training.batch_size, joint=True)
    r = responses[:steps]
    # At place k of an epoch, ages up to steps - n + k count.
    weight = np.minimum(1.0, (steps - np.arange(steps)) / n)
    total = np.cumsum(r, 0)
    total[n:] -= total[:-n].copy()  # sums over one epoch, or what there is of it
    sums = (weight[:, None] * r).T @ r - total.T @ total / n**2
    return np.asarray(examples / (examples - 1.0) * sums)


def sums_at_end(
    responses: FloatArray, examples: int, batch_size: int, joint: bool = False
) -> FloatArray:
    """Variance that the noisy steps of shuffled epochs have accumulated at the end, exactly.

    Parameters
    ----------
    responses : ndarray, shape (T, k)
        Displacement by unit noise in each of T steps from the beginning of an epoch on, the last
        step first.
    examples, batch_size : int
        Number of examples of an epoch, and of a minibatch.
    joint : bool
        For all pairs of directions.

    Returns
    -------
    ndarray, shape (k,), or (k, k) if `joint`
        In units of the variance of a minibatch drawn with replacement.
    """
    n = examples // batch_size
    starts = np.append(0, np.arange(len(responses) % n or n, len(responses), n))
    of_epochs = np.add.reduceat(responses, starts)
    if joint:
        sums = responses.T @ responses - of_epochs.T @ of_epochs / n
    else:
        sums = (responses**2).sum(0) - (of_epochs**2).sum(0) / n
    return np.asarray(examples / (examples - 1.0) * sums)


def order_force(risk: EmpiricalRisk, local: LocalQuadratic, training: Training) -> FloatArray:
    """Mean force of the order of shuffled epochs on the weights, f above.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss, at the weights around which training scatters.
    local : LocalQuadratic
        Gives the directions that may settle within an epoch; all others have the curvature 0 here.
    training : Training
        Gives learning rate, momentum and batch size.

    Returns
    -------
    ndarray, shape (p,)
        In the units of the gradient.
    """
    n = risk.examples // training.batch_size
    h = np.append(local.pairs.values, 0.0)
    response, before, held = np.ones_like(h), np.zeros_like(h), np.zeros_like(h)
    for age in range(1, n):
        held += (n - age) / n * response
        c = 1.0 + training.momentum - training.lr * h
        response, before = c * response - training.momentum * before, response
    to = risk.weights
    vectors = torch.from_numpy(np.ascontiguousarray(local.pairs.vectors)).to(to)
    more = torch.from_numpy(held[:-1] - held[-1]).to(to)
    mean = risk.gradient() - risk.decay_gradient(to)

    def filtered(gradients: Tensor) -> Tensor:
        noise: Tensor = gradients - mean
        return float(held[-1]) * noise + (noise @ vectors * more) @ vectors.T

    # The curvature that all examples share cancels: the filtered noise adds up to zero.
    product = risk.example_products(filtered).double().cpu().numpy()
    examples, size = risk.examples, training.batch_size
    share = (examples - size) / (examples - 1.0) / size
    return np.asarray(training.lr / (n - 1.0) * share * product)

"""Minibatch SGD and late-phase training of a linear regression: run literally, and exactly.

The loss L(w) = 1/(2 N) |X w - y|^2 of real data is exactly quadratic. One example's gradient
x (x'u - r), with u = w - w* and the residual r at the minimum, has the state-dependent covariance

    E_n[x x' (x'u - r)^2] - H u u' H,

of which the additive picture keeps the value at u = 0. Averaged over u it needs only the first two
moments of u, so the expected loss follows exactly, for K members as for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Data:
    """Features X (N, p), target y (N,)."""

    features: Array
    target: Array

    def minimum(self) -> Array:
        """Return the weights of least loss (the shortest such vector).

        Returns
        -------
        ndarray, shape (p,)
        """
        return np.asarray(np.linalg.lstsq(self.features, self.target, rcond=None)[0])

    def loss(self, weights: Array) -> Array:
        """Return the full training loss, 1/(2 N) |X w - y|^2.

        Parameters
        ----------
        weights : ndarray, shape (..., p)

        Returns
        -------
        ndarray, shape (...)
        """
        residual = weights @ self.features.T - self.target
        return np.asarray(0.5 * np.mean(residual**2, axis=-1))


def train(  # noqa: PLR0913
    data: Data,
    start: Array,
    *,
    members: int,
    lr: float,
    batch_size: int,
    at: Sequence[int],
    replicas: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Train additive late-phase weights, drawing examples with replacement.

    gamma is 1/K, and the base and the members have the same rate.

    Parameters
    ----------
    data : Data
        N examples with p features.
    start : ndarray, shape (p,)
        Weights of every replica and member at cycle 0.
    members : int
        K; 1 is plain SGD at rate 2 lr.
    lr : float
        Learning rate of the base and of the members.
    batch_size : int
        Examples in a member's minibatch.
    at : sequence of int
        Cycles after which losses are recorded; 0 is the start.
    replicas : int
        Number of independent runs.
    rng : Generator
        Source of the minibatches.

    Returns
    -------
    loss, member_loss : ndarray, shape (len(at), replicas)
        Full training loss minus its minimum: mean model, and average member.
    """
    x, y = data.features, data.target
    lowest = float(data.loss(data.minimum()))
    theta = np.tile(start, (replicas, 1))
    phi = np.zeros((replicas, members, x.shape[1]))
    losses, member_losses = [], []
    for cycle in range(max(at) + 1):
        if cycle in at:
            w = theta[:, None, :] + phi
            losses.append(data.loss(w.mean(axis=1)) - lowest)
            member_losses.append(data.loss(w).mean(axis=1) - lowest)
        batch = rng.integers(len(y), size=(replicas, members, batch_size))
        xb = x[batch]
        error = (xb @ (theta[:, None, :] + phi)[..., None])[..., 0] - y[batch]
        gradient = (error[..., None, :] @ xb)[..., 0, :] / batch_size
        phi -= lr * gradient
        theta -= lr * gradient.mean(axis=1)
    return np.array(losses), np.array(member_losses)


def exact(
    data: Data, start: Array, *, members: int, lr: float, batch_size: int, at: Sequence[int]
) -> tuple[Array, Array]:
    """Compute the expected losses of `train` from the noise of the data.

    Parameters
    ----------
    data : Data
        N examples with p features.
    start : ndarray, shape (p,)
        Weights of every replica and member at cycle 0.
    members : int
        K; 1 is plain SGD at rate 2 lr.
    lr : float
        Learning rate of the base and of the members.
    batch_size : int
        Examples in a member's minibatch.
    at : sequence of int
        Cycles after which losses are recorded; 0 is the start.

    Returns
    -------
    loss, member_loss : ndarray, shape (len(at),)
        Expected full training loss minus its minimum: mean model, and average member.
    """
    h, basis = np.linalg.eigh(data.features.T @ data.features / len(data.target))
    x = data.features @ basis
    optimum = data.minimum()
    residual = data.target - data.features @ optimum
    mean = basis.T @ (start - optimum)
    second = np.outer(mean, mean)  # of the mean model
    spread = np.zeros_like(second)  # of a member about it
    fast, slow = 1.0 - 2.0 * lr * h, 1.0 - lr * h
    losses, member_losses = [], []
    for cycle in range(max(at) + 1):
        if cycle in at:
            losses.append(0.5 * h @ np.diag(second))
            member_losses.append(0.5 * h @ np.diag(second + spread))
        both = second + spread
        square = np.einsum("ni,ni->n", x @ both, x) - 2.0 * residual * (x @ mean) + residual**2
        square = np.maximum(square, 0.0)  # a mean of squares; rounding may say otherwise
        scaled = x * np.sqrt(square / len(x))[:, None]
        noise = scaled.T @ scaled - np.outer(h, h) * both
        noise /= batch_size
        second = np.outer(fast, fast) * second + (2.0 * lr) ** 2 / members * noise
        spread = np.outer(slow, slow) * spread + lr**2 * (1.0 - 1.0 / members) * noise
        mean = fast * mean
    return np.array(losses), np.array(member_losses)

"""Error of the first-order theory of multiplicative members, measured by a control variate.

Both the multiplicative model and its first-order (additive) model are run on the *same* noise.
The mean of the second is known exactly, so the difference of their losses is the error of the
theory, with far less scatter than either loss has.
"""

from __future__ import annotations

import numpy as np


def paired_error(
    members: int,
    lr: float,
    variance: float,
    *,
    settle: int,
    window: int,
    replicas: int,
    seed: tuple[int, ...],
) -> dict[str, tuple[float, float]]:
    """Measure the relative error of the first order: its loss against the multiplicative one.

    One direction with h = w* = 1, theta = phi_k = 1 at the start, gamma = 1 / K, equal rates.

    Parameters
    ----------
    members : int
        K.
    lr : float
        Learning rate of base and members.
    variance : float
        Noise variance of a minibatch.
    settle, window : int
        Cycles left out, then cycles averaged over.
    replicas : int
        Independent pairs of runs.
    seed : tuple of int
        Seed of the noise.

    Returns
    -------
    dict
        ``mean model`` and ``average member``: the loss of the multiplicative model over that of the
        first order, minus one, and its standard error.
    """
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    theta, phi = np.ones(replicas), np.ones((members, replicas))
    linear = np.zeros((members, replicas))  # the members of the first-order model
    noise = np.empty_like(phi)
    names = ("mean model", "average member")
    difference = {name: np.zeros(replicas) for name in names}
    known = dict.fromkeys(names, 0.0)
    mean_square, spread = 0.0, 0.0  # exact moments of the first-order model
    for cycle in range(settle + window):
        rng.standard_normal(out=noise)
        noise *= np.sqrt(variance)
        gradient = theta * phi - 1.0 + noise
        pull = (phi * gradient).mean(axis=0)
        phi -= lr * theta * gradient
        theta -= lr * pull
        gradient = linear + noise
        linear -= lr * (gradient + gradient.mean(axis=0))
        mean_square = (1.0 - 2.0 * lr) ** 2 * mean_square + (2.0 * lr) ** 2 * variance / members
        spread = (1.0 - lr) ** 2 * spread + lr**2 * variance * (1.0 - 1.0 / members)
        if cycle >= settle:
            w = theta * phi - 1.0
            difference["mean model"] += w.mean(axis=0) ** 2 - linear.mean(axis=0) ** 2
            difference["average member"] += (w**2 - linear**2).mean(axis=0)
            known["mean model"] += mean_square
            known["average member"] += mean_square + spread
    found = {}
    for name in names:
        relative = difference[name] / known[name]
        stderr = relative.std(ddof=1) / np.sqrt(replicas)
        found[name] = (float(relative.mean()), float(stderr))
    return found

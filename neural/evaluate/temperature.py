"""Temperature scaling: one number that corrects a classifier's confidence (Guo et al. 2017)."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from neural.evaluate.metrics import nll

#: Temperatures that are searched.
LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """Temperature T that minimises the negative log-likelihood of ``log_probs / T``.

    The loss is convex in 1 / T, so that there is one minimum.

    Parameters
    ----------
    log_probs : Tensor, shape (N, C)
        Logits or log-probabilities.
    labels : Tensor of integers, shape (N,)

    Returns
    -------
    float
        In [0.05, 20]; above 1 for a classifier that is too sure of itself.

    Raises
    ------
    NQMError
        See `neural.evaluate.accuracy`.
    """
    rows = log_probs.double()

    def loss(log_t: float) -> float:
        return nll(rows / math.exp(log_t), labels)

    bounds = math.log(LOWEST), math.log(HIGHEST)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def tuned_nll(
    log_probs: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor] | None = None
) -> tuple[float, float]:
    """Negative log-likelihood at a tuned temperature.

    Parameters
    ----------
    log_probs : Tensor, shape (N, C)
        Logits or log-probabilities.
    labels : Tensor of integers, shape (N,)
    held_out : tuple of (Tensor, Tensor), optional
        Log-probabilities and labels on which the temperature is fitted. Without it, two-fold: each
        half of the examples (the even, the odd) is judged at the temperature of the other.

    Returns
    -------
    nll : float
        In nats.
    temperature : float
        Without `held_out`, the geometric mean of the two.

    Raises
    ------
    NQMError
        See `neural.evaluate.accuracy`; and if two-fold tuning has fewer than two examples.
    """
    if held_out is not None:
        temperature = fit_temperature(*held_out)
        return nll(log_probs.double() / temperature, labels), temperature
    index = torch.arange(len(labels))
    halves = index[::2], index[1::2]
    fitted = [fit_temperature(log_probs[half], labels[half]) for half in halves]
    losses = [
        nll(log_probs[half].double() / t, labels[half]) * len(half)
        for half, t in zip(halves, reversed(fitted), strict=True)
    ]
    return sum(losses) / len(labels), math.sqrt(fitted[0] * fitted[1])

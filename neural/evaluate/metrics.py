"""How good predicted probabilities are: accuracy, likelihood, Brier score, calibration.

Every function takes log-probabilities or, since ``log_softmax`` leaves those alone, plain logits.
Sums run in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nqm.errors import NQMError, check_integer


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class (the first of equals) is the label.

    Parameters
    ----------
    log_probs : Tensor, shape (N, C)
        Logits or log-probabilities. A row with a NaN counts as wrong.
    labels : Tensor of integers, shape (N,)

    Raises
    ------
    NQMError
        If the shapes do not fit, there is no example, or a label is not a class.
    """
    log_probs, labels = _checked(log_probs, labels)
    return float(correct(log_probs, labels).double().mean())


def nll(log_probs: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats; parameters as in `accuracy`."""
    log_probs, labels = _checked(log_probs, labels)
    return float(-log_probs.gather(1, labels[:, None]).mean())


def brier(log_probs: Tensor, labels: Tensor) -> float:
    """Mean over examples of the squared error summed over classes (Brier 1950), in [0, 2].

    Parameters as in `accuracy`.
    """
    log_probs, labels = _checked(log_probs, labels)
    probs = log_probs.exp()
    hit = probs.gather(1, labels[:, None])[:, 0]
    return float((probs.square().sum(1) - hit.square() + (1 - hit).square()).mean())


def ece(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the predicted class (Guo et al. 2017, eq. 3).

    The mean over equal-width bins ((m - 1) / bins, m / bins] of confidence, weighted by their
    share of examples, of |accuracy - confidence|. Confidence 1 belongs to the last bin.

    Parameters
    ----------
    log_probs, labels
        As in `accuracy`.
    bins : int
        At least 1.
    """
    check_integer("ece: bins", bins, 1)
    log_probs, labels = _checked(log_probs, labels)
    confidence = log_probs.max(1).values.exp()
    if not confidence.isfinite().all():
        return math.nan
    gap = correct(log_probs, labels).double() - confidence
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return float(torch.bincount(index, weights=gap, minlength=bins).abs().sum() / len(gap))


def classification_metrics(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy``, ``nll``, ``brier`` and ``ece`` (15 bins) by name; takes what they take."""
    log_probs, labels = _checked(log_probs, labels)
    return {rule.__name__: rule(log_probs, labels) for rule in (accuracy, nll, brier, ece)}


def bits_per_character(nll: float) -> float:
    """A mean negative log-likelihood per character in nats, as bits: nll / ln 2."""
    return nll / math.log(2)


def correct(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Whether each row's largest entry is at its label; never so for a row with a NaN.

    Parameters
    ----------
    log_probs : Tensor, shape (N, C)
    labels : Tensor of integers, shape (N,)

    Returns
    -------
    Tensor of bool, shape (N,)
    """
    return (log_probs.argmax(1) == labels) & ~log_probs.isnan().any(1)


def _checked(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log-probabilities in float64 and labels as int64, once their shapes fit."""
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not log_probs.numel():
        raise NQMError(
            "metrics: expected log_probs (N, C) and labels (N,) with N, C >= 1; got shapes "
            f"{tuple(log_probs.shape)} and {tuple(labels.shape)}; flatten other dimensions first"
        )
    if labels.is_floating_point():
        raise NQMError(f"metrics: labels must be integers; got {labels.dtype}; use labels.long()")
    classes, low, high = log_probs.shape[1], int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise NQMError(
            f"metrics: labels must lie in 0..{classes - 1} (log_probs has {classes} columns); "
            f"got {low}..{high}"
        )
    return log_probs.double().log_softmax(1), labels.long()

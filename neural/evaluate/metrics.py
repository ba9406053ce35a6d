"""Metrics of predicted probabilities: accuracy, likelihood, Brier score, calibration.

Every function takes log-probabilities or logits: ``log_softmax`` does not change log-probabilities.
Sums are computed in float64. Examples with the label -100 are left out, as in torch's losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nqm.errors import NQMError, check_integer

#: Label of examples that are left out, the default of `torch.nn.functional.cross_entropy`.
IGNORED = -100


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Compute the fraction of examples whose most probable class is the label.

    Parameters
    ----------
    log_probs : Tensor, shape (N, C)
        Logits or log-probabilities. Of equal entries the first counts as the most probable class;
        a row with a NaN is counted as wrong.
    labels : Tensor of integers, shape (N,)
        Class numbers; -100 for an example that is left out.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    NQMError
        If the shapes do not fit, all examples are left out, or a label is not a class.
    """
    log_probs, labels = _checked(log_probs, labels, probabilities=True)
    return float(correct(log_probs, labels).double().mean())


def nll(log_probs: Tensor, labels: Tensor) -> float:
    """Compute the mean negative log-likelihood of the labels.

    Parameters
    ----------
    log_probs, labels
        See `accuracy`.

    Returns
    -------
    float
        In nats.
    """
    return float(losses(log_probs, labels).mean())


def losses(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each label.

    Parameters
    ----------
    log_probs, labels
        See `accuracy`.

    Returns
    -------
    Tensor of float64, shape (N,)
        In nats; without the examples that are left out.
    """
    log_probs, labels = _checked(log_probs, labels)
    return -log_probs.gather(1, labels[:, None])[:, 0]


def brier(log_probs: Tensor, labels: Tensor) -> float:
    """Compute the Brier score: squared error summed over classes, mean over examples (Brier 1950).

    Parameters
    ----------
    log_probs, labels
        See `accuracy`.

    Returns
    -------
    float
        In [0, 2].
    """
    log_probs, labels = _checked(log_probs, labels)
    probs = log_probs.exp()
    hit = probs.gather(1, labels[:, None])[:, 0]
    return float((probs.square().sum(1) - hit.square() + (1 - hit).square()).mean())


def ece(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error of the predicted class (Guo et al. 2017, eq. 3).

    It is the mean of ``|accuracy - confidence|`` over bins ((m - 1) / bins, m / bins] of
    confidence, weighted by the number of examples in a bin.

    Parameters
    ----------
    log_probs, labels
        See `accuracy`.
    bins : int
        Number of bins of equal width, at least 1.

    Returns
    -------
    float
        In [0, 1]; NaN if a confidence is not finite.
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
    """Compute `accuracy`, `nll`, `brier` and `ece` (15 bins).

    Parameters
    ----------
    log_probs, labels
        See `accuracy`.

    Returns
    -------
    dict of str to float
        Value by name of the function.
    """
    log_probs, labels = _checked(log_probs, labels)
    return {rule.__name__: rule(log_probs, labels) for rule in (accuracy, nll, brier, ece)}


def bits_per_character(nll: float) -> float:
    """Convert nats per character to bits per character: nll / ln 2.

    Parameters
    ----------
    nll : float
        Mean negative log-likelihood per character, in nats.

    Returns
    -------
    float
        In bits.
    """
    return nll / math.log(2)


def correct(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Tell for each row whether its largest entry is at the label.

    Parameters
    ----------
    log_probs, labels
        See `accuracy`.

    Returns
    -------
    Tensor of bool, shape (N,)
        False for a row with a NaN.
    """
    return (log_probs.argmax(1) == labels) & ~log_probs.isnan().any(1)


def refuse_probabilities(where: str, log_probs: Tensor) -> None:
    """Check that values are not probabilities, in the place of logits or log-probabilities.

    With probabilities in their place the metrics would be wrong without an error.

    Parameters
    ----------
    where : str
        Name of the function, for the message.
    log_probs : Tensor, shape (..., C)
        The values to check.

    Raises
    ------
    NQMError
        If every row sums to 1 and has no negative entry.
    """
    if log_probs.shape[-1] < 2 or not log_probs.numel():
        return
    half = log_probs.dtype in (torch.float16, torch.bfloat16)
    apart = (log_probs.detach().double().sum(-1) - 1.0).abs()
    if bool((log_probs >= 0).all()) and bool((apart < (0.02 if half else 1e-4)).all()):
        raise NQMError(
            f"{where}: expected logits or log-probabilities; got rows that sum to 1, which are "
            "probabilities; take their logarithm, p.log()"
        )


def _checked(
    log_probs: Tensor, labels: Tensor, *, probabilities: bool = False
) -> tuple[Tensor, Tensor]:
    """Normalised log-probabilities in float64 and labels as int64, without ignored examples."""
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not log_probs.numel():
        raise NQMError(
            "metrics: expected log_probs (N, C) and labels (N,) with N, C >= 1; got shapes "
            f"{tuple(log_probs.shape)} and {tuple(labels.shape)}; flatten other dimensions first"
        )
    if labels.is_floating_point():
        raise NQMError(f"metrics: labels must be integers; got {labels.dtype}; use labels.long()")
    if not log_probs.is_floating_point():
        raise NQMError(f"metrics: log_probs must be real; got {log_probs.dtype}")
    if not probabilities:
        refuse_probabilities("metrics", log_probs)
    labels = labels.long()
    counted = labels != IGNORED
    if not bool(counted.any()):
        raise NQMError(f"metrics: every label is {IGNORED}, so that no example is left")
    log_probs, labels = log_probs[counted], labels[counted]
    classes, low, high = log_probs.shape[1], int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise NQMError(
            f"metrics: labels must lie in 0..{classes - 1} (log_probs has {classes} columns), or "
            f"be {IGNORED} for an example that is left out; got {low}..{high}"
        )
    return log_probs.double().log_softmax(1), labels

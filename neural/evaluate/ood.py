"""Out-of-distribution (OOD) detection: a score per example, and metrics of its separation."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neural.evaluate.metrics import refuse_probabilities
from nqm.errors import NQMError, check_number


def entropy_score(logits: Tensor, epsilon: float = 0.0) -> Tensor:
    """Compute the entropy of the predicted distribution; larger means more likely OOD.

    Parameters
    ----------
    logits : Tensor, shape (..., C)
        Logits or log-probabilities.
    epsilon : float
        Added to the probability inside the logarithm, ``-sum p log(p + epsilon)``; at least 0. The
        paper's published code uses 1e-5; 0 is exact.

    Returns
    -------
    Tensor of float64, shape (...)
        In nats.

    Raises
    ------
    NQMError
        If `epsilon` is negative, or probabilities are given.
    """
    check_number("entropy_score: epsilon", epsilon, low=0)
    refuse_probabilities("entropy_score", logits)
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    inside = (probs + epsilon).log() if epsilon else log_probs
    # A class of probability 0 contributes 0, also where its logarithm is -inf.
    return -torch.where(probs == 0, 0.0, probs * inside).sum(-1)


def ood_metrics(in_scores: ArrayLike | Tensor, out_scores: ArrayLike | Tensor) -> dict[str, float]:
    """Compute ``auroc``, ``aupr`` and ``fpr95`` with OOD as the positive class.

    auroc: probability that an OOD score exceeds an in-distribution one; ties count one half.
    aupr: average precision, the step-wise area under precision against recall.
    fpr95: fraction of in-distribution scores >= t, where t is the largest threshold at which at
    least 95 % of the OOD scores are >= t, i.e. the ceil(0.95 n)-th largest of n OOD scores.

    Parameters
    ----------
    in_scores, out_scores : array_like or Tensor, shapes (M,) and (N,)
        Scores of in-distribution and OOD examples; larger means more likely OOD, e.g. from
        `entropy_score`.

    Returns
    -------
    dict of str to float
        Each in [0, 1]; all NaN if a score is NaN (a diverged model).

    Raises
    ------
    NQMError
        If one of the sets is empty or not one-dimensional.
    """
    inside, outside = (_numbers(x) for x in (in_scores, out_scores))
    if inside.ndim != 1 or outside.ndim != 1 or not inside.size or not outside.size:
        raise NQMError(
            "ood_metrics: expected one score per example, at least one in each set; got shapes "
            f"{inside.shape} and {outside.shape}"
        )
    if np.isnan(inside).any() or np.isnan(outside).any():
        return {"auroc": math.nan, "aupr": math.nan, "fpr95": math.nan}
    from sklearn.metrics import average_precision_score, roc_auc_score

    # Ranks instead of values: the areas depend on ranks only, and scores may be infinite.
    ranks = np.unique(np.concatenate([inside, outside]), return_inverse=True)[1]
    positive = np.repeat([0, 1], [inside.size, outside.size])
    caught = -(-95 * outside.size // 100)
    threshold = np.sort(outside)[outside.size - caught]
    return {
        "auroc": float(roc_auc_score(positive, ranks)),
        "aupr": float(average_precision_score(positive, ranks)),
        "fpr95": float((inside >= threshold).mean()),
    }


def _numbers(scores: ArrayLike | Tensor) -> NDArray[np.float64]:
    """Convert scores, an array or a tensor on any device, to an array."""
    if isinstance(scores, Tensor):
        scores = scores.detach().to("cpu", torch.float64).numpy()
    return np.asarray(scores, dtype=np.float64)

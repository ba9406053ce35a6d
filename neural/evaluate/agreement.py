"""How far classifiers agree with the labels and with one another, beyond chance.

The measures themselves are scikit-learn's and SciPy's; here predictions are checked and put into
their form. Every function takes log-probabilities or logits, as `neural.evaluate.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.evaluate.metrics import _checked, correct
from nqm.errors import NQMError


class McNemar(NamedTuple):
    """Comparison of two classifiers on the same examples (McNemar 1947).

    Attributes
    ----------
    first, second : int
        Examples that only the first, or only the second one, has right.
    p_value : float
        Two-sided probability of a split at least as uneven, if either is right as often: exact, by
        the binomial distribution; 1 if they never differ.
    """

    first: int
    second: int
    p_value: float


def macro_f1(log_probs: Tensor, labels: Tensor) -> float:
    """Compute the F1 score of every class, averaged with equal weights.

    Parameters
    ----------
    log_probs : Tensor, shape (N, C)
        Logits or log-probabilities.
    labels : Tensor of integers, shape (N,)
        Class numbers; -100 for an example that is left out.

    Returns
    -------
    float
        In [0, 1]; classes that are neither predicted nor present are left out.

    Raises
    ------
    NQMError
        As `neural.evaluate.accuracy`; and if a row has a NaN, and thus no predicted class.
    """
    from sklearn.metrics import f1_score

    predicted, truth = _classes(log_probs, labels)
    return float(f1_score(truth, predicted, average="macro"))


def kappa(log_probs: Tensor, labels: Tensor) -> float:
    """Compute Cohen's kappa of predicted classes and labels (Cohen 1960).

    Parameters
    ----------
    log_probs, labels
        See `macro_f1`.

    Returns
    -------
    float
        In [-1, 1]: 1 for full agreement, 0 for that of independent guesses with the same class
        frequencies; NaN if all predictions and all labels are one class.

    Raises
    ------
    NQMError
        See `macro_f1`.
    """
    return _kappa(*_classes(log_probs, labels))


def kappa_matrix(log_probs: Sequence[Tensor], labels: Tensor) -> NDArray[np.float64]:
    """Compute Cohen's kappa between the predicted classes of every two classifiers.

    Parameters
    ----------
    log_probs : sequence of K tensors, shape (N, C)
        Logits or log-probabilities of each classifier.
    labels : Tensor of integers, shape (N,)
        Only says which examples are left out.

    Returns
    -------
    ndarray, shape (K, K)
        Symmetric; NaN where both always predict one class.

    Raises
    ------
    NQMError
        See `macro_f1`.
    """
    classes = [_classes(one, labels)[0] for one in log_probs]
    return np.array([[_kappa(a, b) for b in classes] for a in classes])


def mcnemar(a: Tensor, b: Tensor, labels: Tensor) -> McNemar:
    """Test whether two classifiers are right equally often, by the examples on which they differ.

    Parameters
    ----------
    a, b : Tensor, shape (N, C)
        Logits or log-probabilities of the two, on the same examples.
    labels : Tensor of integers, shape (N,)

    Returns
    -------
    McNemar

    Raises
    ------
    NQMError
        As `neural.evaluate.accuracy`, or if the shapes differ.
    """
    from scipy.stats import binomtest

    if a.shape != b.shape:
        raise NQMError(f"mcnemar: a and b must have one shape; got {_shape(a)} and {_shape(b)}")
    right = [correct(*_checked(one, labels, probabilities=True)) for one in (a, b)]
    first = int((right[0] & ~right[1]).sum())
    second = int((right[1] & ~right[0]).sum())
    p_value = 1.0 if first + second == 0 else float(binomtest(first, first + second).pvalue)
    return McNemar(first, second, p_value)


def _classes(log_probs: Tensor, labels: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows, truth = _checked(log_probs, labels, probabilities=True)
    if bool(rows.isnan().any()):
        bad = int(rows.isnan().any(1).sum())
        raise NQMError(f"metrics: {bad} of {len(rows)} rows have a NaN, and thus no class")
    return rows.argmax(1).numpy(force=True), truth.numpy(force=True)


def _kappa(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    from sklearn.metrics import cohen_kappa_score

    if a.min() == a.max() == b.min() == b.max():
        return math.nan  # agreement by chance is full
    return float(cohen_kappa_score(a, b))


def _shape(rows: Tensor) -> tuple[int, ...]:
    return tuple(torch.as_tensor(rows).shape)

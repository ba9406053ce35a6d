"""Losses of single examples: cross-entropy, and what its targets must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neural.evaluate.metrics import IGNORED
from nqm.errors import NQMError

#: (output, targets) -> one loss per example, shape (B,).
ExampleLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of each example; for a window of text, the mean over its symbols.

    Parameters
    ----------
    output : Tensor, shape (B, ..., C)
        Logits.
    targets : Tensor of int64, shape (B, ...)
        Class numbers; symbols with the label -100 are left out of the mean.

    Returns
    -------
    Tensor, shape (B,)
        In nats.
    """
    return _cross_entropy(output, targets, 0.0)


def _cross_entropy(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    flat = nn.functional.cross_entropy(
        output.flatten(0, -2),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    counted = (targets != IGNORED).reshape(len(targets), -1)
    return flat.view(len(targets), -1).sum(1) / counted.sum(1)


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """`cross_entropy` with label smoothing, as it is trained.

    Attributes
    ----------
    smoothing : float
        Probability that is spread over all classes, in [0, 1].
    """

    smoothing: float

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each example; see `cross_entropy`.

        Parameters
        ----------
        output : Tensor, shape (B, ..., C)
            Logits.
        targets : Tensor of int64, shape (B, ...)
            Class numbers.

        Returns
        -------
        Tensor, shape (B,)
        """
        return _cross_entropy(output, targets, self.smoothing)


def is_cross_entropy(loss: ExampleLoss) -> bool:
    """Tell whether a loss is `cross_entropy`, with or without label smoothing.

    Parameters
    ----------
    loss : callable

    Returns
    -------
    bool
    """
    return loss is cross_entropy or isinstance(loss, SmoothedCrossEntropy)


def check_batches(batches: Sequence[Any], loss: ExampleLoss) -> None:
    """Check that examples can be counted and, for cross-entropy, that targets are labels.

    Parameters
    ----------
    batches : sequence of (inputs, targets)
        The data.
    loss : callable
        The loss.

    Raises
    ------
    NQMError
        If there is no batch, one is no pair, targets are no tensor with a row for each example, or
        they are no labels.
    """
    if not batches:
        raise NQMError("an empirical risk needs data; got no batch")
    for batch in batches:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            size = f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
            raise NQMError(
                "batches must be pairs (inputs, targets), as [(x, y)], or [((a, b), y)] and "
                f"[({{'name': a}}, y)] for other arguments; got a {type(batch).__name__}{size}"
            )
    targets = [part for _, part in batches]
    counts = set()
    for labels in targets:
        if not isinstance(labels, Tensor) or labels.ndim == 0 or not len(labels):
            got = (
                f"shape {tuple(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise NQMError(
                "targets of an empirical risk must be a tensor with a row for each example; got "
                f"{got}"
            )
        if labels.is_meta:
            raise NQMError("targets have no values (device 'meta'); give data on a real device")
        if not is_cross_entropy(loss):
            continue
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise NQMError(
                f"targets must be integer labels; got {labels.dtype}; pass a loss of your own, "
                "e.g. loss=torch.nn.CrossEntropyLoss(reduction='none') for probabilities"
            )
        counted = labels != IGNORED
        if bool((counted & (labels < 0)).any()):
            raise NQMError(
                f"labels must be 0 or more, or {IGNORED} for none; got {int(labels[counted].min())}"
            )
        counts |= set(counted.reshape(len(labels), -1).sum(1).tolist())
    if len(counts) > 1 or 0 in counts:
        raise NQMError(
            f"examples have {min(counts)} to {max(counts)} labels other than {IGNORED}, so that "
            "their mean is not that of a minibatch; cut all to one number, or pass your own loss"
        )


def check_labels(labels: Iterable[Tensor], classes: int) -> None:
    """Check that a model has a logit for every label.

    Parameters
    ----------
    labels : iterable of Tensor
        Class numbers of each batch, at least 0 or -100.
    classes : int
        Number of logits.

    Raises
    ------
    NQMError
        If a label is too large.
    """
    largest = max(int(of_batch.max()) for of_batch in labels)
    if largest >= classes:
        raise NQMError(
            f"labels must lie in 0..{classes - 1}, since the model gives {classes} logits; got "
            f"{largest}"
            + ("; for one logit pass a loss such as BCEWithLogitsLoss" if classes == 1 else "")
        )

"""Judge models: log-probabilities on a set, and the metrics of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from neural.combine.data import Parts, Source
from neural.combine.members import Members
from neural.combine.repair import Repair
from neural.evaluate import Score, predict, score


def judged(members: Members, state: Mapping[str, Tensor], repair: Repair, parts: Parts) -> Score:
    """Loss and accuracy of merged weights on the held-out data.

    Parameters
    ----------
    members : Members
    state : mapping of str to Tensor
        A state dict.
    repair : Repair
    parts : Parts
        Needs `held_out`.

    Returns
    -------
    Score
    """
    model = repaired(members, state, repair, parts)
    return score(model, parts.required("held_out", "choosing")())


def repaired(
    members: Members,
    state: Mapping[str, Tensor],
    repair: Repair,
    parts: Parts,
    weights: Tensor | None = None,
) -> nn.Module:
    """A model with merged weights, repaired.

    Parameters
    ----------
    members : Members
    state : mapping of str to Tensor
        A state dict.
    repair : Repair
    parts : Parts
    weights : Tensor, optional
        Of the members, shape (N,), if the state is their weighted mean.

    Returns
    -------
    Module
        In evaluation mode.
    """
    model = members.with_state(state)
    repair(model, parts, members, weights)
    return model.eval()


def log_probs(model: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a model on a set.

    Parameters
    ----------
    model : Module
    source : callable
        Makes the batches.

    Returns
    -------
    log_probs : Tensor of float32, shape (n, C)
    labels : Tensor of int64, shape (n,)
    """
    logits, labels = predict(model, source())
    return logits.log_softmax(-1), labels

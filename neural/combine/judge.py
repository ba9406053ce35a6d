"""Judge models: log-probabilities on a set, and the metrics of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from neural.combine.cells import Arrays, Cells
from neural.combine.data import Parts, Source
from neural.combine.members import Members
from neural.combine.repair import Repair
from neural.combine.surrogate import Surrogate, make_surrogate
from neural.evaluate import Score, predict, score
from neural.late_phase.members import Batch
from nqm.progress import Progress


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


class Judge:
    """Log-probabilities of models on several sets, each kept in a cell.

    Parameters
    ----------
    sets : mapping of str to callable
        Sets by name; each makes its batches.
    cells : Cells
        Where they are kept.

    Attributes
    ----------
    labels : dict of str to Tensor
        Labels of every set that a model was judged on.
    """

    def __init__(self, sets: Mapping[str, Source], cells: Cells):
        self.sets, self.cells = dict(sets), cells
        self.labels: dict[str, Tensor] = {}

    def surrogate(
        self,
        what: Mapping[str, Any],
        loss: float,
        build: Callable[[], tuple[nn.Module, Tensor, Mapping[str, Tensor]]],
        batches: Callable[[], Sequence[Batch]],
        progress: Progress | None = None,
    ) -> Surrogate:
        """Model of the loss about a model, each direction kept in a cell.

        Parameters
        ----------
        what : mapping
            What it is about.
        loss : float
            Loss of the model on all data, in nats.
        build : callable
            Makes the model, the offsets of its weights and those of its statistics; called only if
            the whole is missing.
        batches : callable
            Makes the data of the derivatives.
        progress : callable, optional
            See `neural.combine.surrogate.make_surrogate`.

        Returns
        -------
        Surrogate
        """
        key = {**what, "kind": "expansion"}

        def measure() -> Arrays:
            model, offsets, statistics = build()
            made = make_surrogate(
                model,
                offsets,
                batches(),
                statistics,
                keep=lambda name, make: self.cells.on_data({**key, "part": name}, make),
                progress=progress,
            )
            return made.arrays()

        return Surrogate.of_arrays(loss, self.cells.on_data(key, measure))

    def __call__(
        self, what: Mapping[str, Any], build: Callable[[], nn.Module]
    ) -> dict[str, Tensor]:
        """Log-probabilities of a model on every set.

        Parameters
        ----------
        what : mapping
            What the model is made of.
        build : callable
            Makes the model; called once, and only if a set is missing.

        Returns
        -------
        dict of str to Tensor, shape (n, C)
            By set.
        """
        built = cache(build)
        found = {}
        for name, source in self.sets.items():

            def compute(source: Source = source) -> Arrays:
                rows, labels = log_probs(built(), source)
                return {"log_probs": rows.numpy(), "labels": labels.numpy()}

            cell = self.cells.on_data({**what, "data": name}, compute)
            found[name] = torch.from_numpy(cell["log_probs"])
            self.labels[name] = torch.from_numpy(cell["labels"])
        return found

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
    about : mapping
        What identifies the data. It has an entry of its own in keys: names in it may be any.

    Attributes
    ----------
    labels : dict of str to Tensor
        Labels of every set that a model was judged on.
    """

    def __init__(self, sets: Mapping[str, Source], cells: Cells, about: Mapping[str, Any]):
        self.sets, self.cells, self.about = dict(sets), cells, dict(about)
        self.labels: dict[str, Tensor] = {}

    def kept(self, what: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """Arrays of a cell that depends on the data.

        Parameters
        ----------
        what : mapping
            What else they depend on.
        make : callable
            Computes them.

        Returns
        -------
        dict of str to ndarray
        """
        return self.cells.get({**what, "about": self.about}, make)

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
                keep=lambda name, make: self.kept({**key, "part": name}, make),
                progress=progress,
            )
            return made.arrays()

        return Surrogate.of_arrays(loss, self.kept(key, measure))

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

            cell = self.kept({**what, "data": name}, compute)
            found[name] = torch.from_numpy(cell["log_probs"])
            self.labels[name] = torch.from_numpy(cell["labels"])
        return found

"""What a merged model needs before it is used: statistics that belong to its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neural.combine.data import Parts
from neural.combine.members import Members
from neural.late_phase.averaging import recompute_statistics
from nqm.errors import check_integer


class Repair(ABC):
    """A change of a merged model that uses data and leaves its weights' meaning.

    Attributes
    ----------
    name : str
        In tables and options. A class attribute.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(
        self, model: nn.Module, parts: Parts, members: Members, weights: Tensor | None
    ) -> None:
        """Repair a merged model.

        Parameters
        ----------
        model : Module
            Changed in place.
        parts : Parts
            Needs `train` unless the model has nothing to repair.
        members : Members
            Those that were merged.
        weights : Tensor or None
            Their weights, shape (N,); None if the model is no weighted mean of them.

        Raises
        ------
        NQMError
            If there are no training data, or the model cannot be repaired.
        """


@dataclass(frozen=True)
class Nothing(Repair):
    """The merged model as it is: BatchNorm statistics are the mean of the members'."""

    name: ClassVar[str] = "none"

    def __call__(
        self, model: nn.Module, parts: Parts, members: Members, weights: Tensor | None
    ) -> None:
        """Do nothing; see `Repair`."""


@dataclass(frozen=True)
class Statistics(Repair):
    """BatchNorm statistics computed anew from training data (Izmailov et al. 2018, section 3.2).

    Attributes
    ----------
    batches : int, optional
        Minibatches of training data at most; one epoch by default.
    """

    name: ClassVar[str] = "statistics"

    batches: int | None = None

    def __post_init__(self) -> None:
        if self.batches is not None:
            check_integer("Statistics.batches", self.batches, 1)

    def __call__(
        self, model: nn.Module, parts: Parts, members: Members, weights: Tensor | None
    ) -> None:
        """Recompute the statistics; a model without BatchNorm stays as it is. See `Repair`."""
        if has_statistics(model):
            train = parts.required("train", "recomputing BatchNorm statistics")
            recompute_statistics(model, islice(train(), self.batches))


@dataclass(frozen=True)
class Rescale(Repair):
    """Each hidden unit gets the mean and deviation of the members' (REPAIR, Jordan et al. 2022).

    With BatchNorm this is what `Statistics` does. See `neural.combine.rescale`.

    Attributes
    ----------
    batches : int
        Minibatches of training data at most; each is read once for every member and layer.
    """

    name: ClassVar[str] = "rescale"

    batches: int = 20

    def __post_init__(self) -> None:
        check_integer("Rescale.batches", self.batches, 1)

    def __call__(
        self, model: nn.Module, parts: Parts, members: Members, weights: Tensor | None
    ) -> None:
        """Rescale the units; see `Repair`. Without weights all members count alike."""
        from neural.combine.rescale import rescale

        train = parts.required("train", "rescaling hidden units")
        count = len(members)
        share = [1.0 / count] * count if weights is None else weights.tolist()
        some = list(islice(train(), self.batches))
        fixed = rescale(members.model, members.states(), share, model.state_dict(), some)
        model.load_state_dict(fixed.state_dict())


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has BatchNorm layers with running statistics.

    Parameters
    ----------
    model : Module

    Returns
    -------
    bool
    """
    return any(
        isinstance(layer, _BatchNorm) and layer.running_mean is not None
        for layer in model.modules()
    )


#: Name -> repair.
REPAIRS: dict[str, Repair] = {one.name: one for one in (Nothing(), Statistics(), Rescale())}

"""What a merged model needs before it is used: statistics that belong to its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from neural.combine.data import Parts
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
    def __call__(self, model: nn.Module, parts: Parts) -> None:
        """Repair a merged model.

        Parameters
        ----------
        model : Module
            Changed in place.
        parts : Parts
        """


@dataclass(frozen=True)
class Nothing(Repair):
    """The merged model as it is: BatchNorm statistics are the mean of the members'."""

    name: ClassVar[str] = "none"

    def __call__(self, model: nn.Module, parts: Parts) -> None:
        """Do nothing.

        Parameters
        ----------
        model : Module
        parts : Parts
        """


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

    def __call__(self, model: nn.Module, parts: Parts) -> None:
        """Recompute the statistics; a model without BatchNorm stays as it is.

        Parameters
        ----------
        model : Module
            Changed in place.
        parts : Parts
            Needs `train` if the model has BatchNorm.

        Raises
        ------
        NQMError
            If there are no training data.
        """
        if has_statistics(model):
            train = parts.required("train", "recomputing BatchNorm statistics")
            recompute_statistics(model, islice(train(), self.batches))


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
REPAIRS: dict[str, Repair] = {one.name: one for one in (Nothing(), Statistics())}

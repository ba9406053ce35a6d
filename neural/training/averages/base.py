"""What an average over time is to a training run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

from neural.late_phase.averaging import recompute_statistics
from neural.late_phase.members import Batch, LatePhase
from neural.late_phase.reparametrize import RankOne, parametrized
from nqm.errors import check_integer

State = TypeVar("State", bound=nn.Module)


@dataclass(frozen=True)
class Average(ABC, Generic[State]):
    """A way to make models of the weights that a run goes through.

    A subclass is a frozen dataclass; its fields are its options, the entries of the table
    ``[average]`` beside ``method``. What it has taken so far is no field of it but its *state*: any
    module, which checkpoints save and load by its `state_dict`. A run calls ::

        state = average.begin(module)                    # before the first call of the next two
        average.step(state, module)                      # after a base step
        average.end_epoch(state, module, epoch)          # after an epoch
        models = average.models(state, epoch_of_batches) # once, at the end of training

    where ``module`` is what is trained: the network, or `neural.LatePhase` with all its members.

    Attributes
    ----------
    method : str
        Its name in recipes and results. A class attribute.
    every_step : bool
        True if `step` takes weights, False if `end_epoch` alone does. A class attribute.
    start_epoch : int
        `step` and `end_epoch` are called when more than so many epochs are done.
    """

    method: ClassVar[str]
    every_step: ClassVar[bool] = False

    start_epoch: int = 0

    def __post_init__(self) -> None:
        check_integer(f"{type(self).__name__}.start_epoch", self.start_epoch, 0)

    @abstractmethod
    def begin(self, module: nn.Module) -> State:
        """State that has taken no weights yet.

        Parameters
        ----------
        module : Module
            What is trained. It is not to be changed, nor kept without a copy.

        Returns
        -------
        Module
            Its `state_dict` has the same names and shapes however much was taken.
        """

    def step(self, state: State, module: nn.Module) -> None:
        """Take weights after a step of the base, if at all.

        Parameters
        ----------
        state : Module
            Changed in place.
        module : Module
            What is trained.
        """

    def end_epoch(self, state: State, module: nn.Module, epoch: int) -> None:
        """Take weights at the end of an epoch, if at all.

        Parameters
        ----------
        state : Module
            Changed in place.
        module : Module
            What is trained.
        epoch : int
            Epochs done, from ``start_epoch + 1`` to the last of the run.
        """

    @abstractmethod
    def models(self, state: State, batches: Callable[[], Iterable[Batch]]) -> dict[str, nn.Module]:
        """Models that come out, which the run evaluates.

        Parameters
        ----------
        state : Module
            May be changed in place.
        batches : callable
            Minibatches of one epoch of training data, anew at every call.

        Returns
        -------
        dict
            Name in the results -> module that returns logits. The one called `method` is the single
            model of the run: the network's own class, with its own names of weights. Others are
            called ``{method}_...``.
        """


class MeanWeights(Average[AveragedModel]):
    """An average whose state is torch's `AveragedModel`: one mean of all weights."""

    def models(
        self, state: AveragedModel, batches: Callable[[], Iterable[Batch]]
    ) -> dict[str, nn.Module]:
        """The model with the mean weights; its BatchNorm statistics are recomputed.

        Parameters
        ----------
        state : AveragedModel
            Mean of the weights; its statistics change in place.
        batches : callable
            Minibatches of one epoch of training data, anew at every call.

        Returns
        -------
        dict of str to Module
            Name in the results -> network (see `single_models`).
        """
        recompute_statistics(state.module, batches())
        return single_models(state.module, self.method)


def single_models(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """One network, or late-phase members averaged in every way that can differ.

    Parameters
    ----------
    module : Module
    name : str
        Name of the network, or of the mean of the members' weights.

    Returns
    -------
    dict
        Name -> network. ``{name}_outputs``: BatchNorm averaged by its outputs; ``{name}_product``:
        rank-1 factors averaged as matrices (see `neural.LatePhase.averaged`).
    """
    if not isinstance(module, LatePhase):
        return {name: module}
    models = {name: module.averaged()}
    if any("running_var" in buffer for buffer in module.selection.buffers):
        models[f"{name}_outputs"] = module.averaged(batchnorm="outputs")
    if any(isinstance(one, RankOne) for *_, one in parametrized(module.model)):
        models[f"{name}_product"] = module.averaged(rank1="product")
    return models

"""Base class of averages over time in training runs."""

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
from neural.training.distributed import Parts
from nqm.errors import check_integer

State = TypeVar("State", bound=nn.Module)


@dataclass(frozen=True)
class Average(ABC, Generic[State]):
    """A method that makes models from the weights along a training run.

    A subclass is a frozen dataclass. Its fields are its options: the entries of the table
    ``[average]`` beside ``method``. The average itself is stored in its *state*, any module, which
    checkpoints save and load by its `state_dict`. A run calls ::

        state = average.begin(module)                    # before the first call of the next two
        average.step(state, module)                      # after a base step
        average.end_epoch(state, module, epoch)          # after an epoch
        models = average.models(state, epoch_of_batches) # once, at the end of training

    where ``module`` is the network, or `neural.LatePhase` with all its members.

    Attributes
    ----------
    method : str
        Name in recipes and results. A class attribute.
    every_step : bool
        True if `step` updates the average, False if only `end_epoch` does. A class attribute.
    start_epoch : int
        Number of epochs before the average begins: `step` and `end_epoch` are called when more
        epochs are done.
    """

    method: ClassVar[str]
    every_step: ClassVar[bool] = False

    start_epoch: int = 0

    def __post_init__(self) -> None:
        check_integer(f"{type(self).__name__}.start_epoch", self.start_epoch, 0)

    @abstractmethod
    def begin(self, module: nn.Module) -> State:
        """Make a state without any weights in the average.

        Parameters
        ----------
        module : Module
            The module that is trained. It must not be changed, or stored without a copy.

        Returns
        -------
        Module
            The state. Names and shapes of its `state_dict` must not change with updates.
        """

    def step(self, state: State, module: nn.Module) -> None:
        """Update the average after a base step; does nothing by default.

        Parameters
        ----------
        state : Module
            The state; changed in place.
        module : Module
            The module that is trained.
        """

    def end_epoch(self, state: State, module: nn.Module, epoch: int) -> None:
        """Update the average at the end of an epoch; does nothing by default.

        Parameters
        ----------
        state : Module
            The state; changed in place.
        module : Module
            The module that is trained.
        epoch : int
            Number of epochs done, from ``start_epoch + 1`` to the last of the run.
        """

    @abstractmethod
    def models(self, state: State, batches: Callable[[], Iterable[Batch]]) -> dict[str, nn.Module]:
        """Make the models that the run evaluates.

        Parameters
        ----------
        state : Module
            The state; may be changed in place.
        batches : callable
            Returns the minibatches of one epoch of training data at every call.

        Returns
        -------
        dict of str to Module
            Name in the results -> module that returns logits. The one named `method` is the single
            model of the run: an instance of the network's class with the same names of weights.
            Others are named ``{method}_...``.
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
            Returns the minibatches of one epoch of training data at every call.

        Returns
        -------
        dict of str to Module
            Name in the results -> network (see `single_models`).
        """
        parts = batches if isinstance(batches, Parts) else None
        weights = None if parts is None else parts.weights
        recompute_statistics(state.module, batches(), batch_weights=weights)
        if parts is not None:
            parts.average_statistics(state.module)
        return single_models(state.module, self.method)


def single_models(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """Make the single models of a module: the network itself, or all averages of its members.

    Parameters
    ----------
    module : Module
        A network, or `neural.LatePhase`.
    name : str
        Name of the network, or of the mean of the members' weights.

    Returns
    -------
    dict of str to Module
        Name -> network. ``{name}_outputs``: BatchNorm averaged by its outputs; ``{name}_product``:
        rank-1 factors averaged as matrices (see `neural.LatePhase.averaged`).
    """
    if not isinstance(module, LatePhase):
        return {name: module}
    models = {name: module.averaged()}
    if any("running_var" in buffer for buffer in module.selection.buffers):
        models[f"{name}_outputs"] = module.averaged(batchnorm="outputs")
    if any(isinstance(factors, RankOne) for *_, factors in parametrized(module.model)):
        models[f"{name}_product"] = module.averaged(rank1="product")
    return models

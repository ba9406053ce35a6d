"""Stochastic weight averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

from neural.late_phase import averaging
from neural.training.averages.base import MeanWeights


@dataclass(frozen=True)
class SWA(MeanWeights):
    """Mean of the weights at the ends of epochs, with equal weights (Izmailov et al. 2018).

    Attributes
    ----------
    start_epoch : int
        Number of epochs before the first one that is averaged.
    """

    method: ClassVar[str] = "swa"

    def begin(self, module: nn.Module) -> AveragedModel:
        """Make a mean without any weights in it.

        Parameters
        ----------
        module : Module
            The network, or `neural.LatePhase`.

        Returns
        -------
        AveragedModel
            The state, a copy of the module.
        """
        return averaging.swa(module)

    def end_epoch(self, state: AveragedModel, module: nn.Module, epoch: int) -> None:
        """Add the present weights to the mean.

        Parameters
        ----------
        state : AveragedModel
            The mean; changes in place.
        module : Module
            The network, or `neural.LatePhase`.
        epoch : int
            Number of epochs done; not used, since all epochs have the same weight.
        """
        state.update_parameters(module)

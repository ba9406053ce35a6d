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
    """Mean of the weights at the end of each epoch, all counted alike (Izmailov et al. 2018).

    Attributes
    ----------
    start_epoch : int
        Epochs done before the first one that is averaged.
    """

    method: ClassVar[str] = "swa"

    def begin(self, module: nn.Module) -> AveragedModel:
        """Start a mean that holds no weights yet.

        Parameters
        ----------
        module : Module
            The network, or `neural.LatePhase`.

        Returns
        -------
        AveragedModel
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
            Epochs done; all epochs count alike.
        """
        state.update_parameters(module)

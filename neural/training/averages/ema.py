"""Exponential moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

from neural.late_phase import averaging
from neural.training.averages.base import MeanWeights
from nqm.errors import check_number


@dataclass(frozen=True)
class EMA(MeanWeights):
    """Exponential moving average of weights and buffers, one update for each base step.

    Attributes
    ----------
    start_epoch : int
        Number of epochs before the first step that is averaged.
    decay : float
        Share of the average that an update keeps, in [0, 1).
    """

    method: ClassVar[str] = "ema"
    every_step: ClassVar[bool] = True

    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("EMA.decay", self.decay, low=0.0, high=1.0, closed_high=False)

    def begin(self, module: nn.Module) -> AveragedModel:
        """Make an average without any weights in it; the first update copies the weights.

        Parameters
        ----------
        module : Module
            The network, or `neural.LatePhase`.

        Returns
        -------
        AveragedModel
            The state, a copy of the module.
        """
        return averaging.ema(module, self.decay)

    def step(self, state: AveragedModel, module: nn.Module) -> None:
        """Update the average: decay * average + (1 - decay) * weights.

        Parameters
        ----------
        state : AveragedModel
            The average; changes in place.
        module : Module
            The network, or `neural.LatePhase`, after a base step.
        """
        state.update_parameters(module)

"""Averages over time, and the statistics an averaged model needs.

SWA and EMA are torch's own `AveragedModel`. It averages whatever parameters a module has, a
`LatePhase` with its stacked members included: late-phase weights with SWA on top, as in the paper,
is ``swa(late)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neural.late_phase import Batch, LatePhase
from neural.rows import arguments
from nqm.errors import check_number

_Tensors = tuple[Tensor, ...] | list[Tensor]


def swa(module: nn.Module) -> AveragedModel:
    """Equal-weight running mean of parameters (Izmailov et al. 2018).

    Call ``.update_parameters(module)`` at every snapshot; ``.module`` is the average. Its running
    statistics are those of the last snapshot until `recompute_statistics` is called.
    """
    return AveragedModel(module)


def ema(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and running statistics; counters are copied.

    Parameters
    ----------
    module : Module
    decay : float
        In [0, 1): ``average <- decay average + (1 - decay) module`` at every update.
    """
    check_number("decay", decay, low=0.0, high=1.0, closed_high=False)
    smooth = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def average(kept: _Tensors, new: _Tensors, updates: Tensor | int) -> None:
        if kept[0].is_floating_point():
            smooth(kept, new, updates)
        else:
            # Counters and indices are whole numbers, which a mean would round.
            for one, value in zip(kept, new, strict=True):
                one.copy_(value)

    return AveragedModel(module, multi_avg_fn=average, use_buffers=True)


@torch.no_grad()
def recompute_statistics(module: nn.Module, batches: Iterable[Batch]) -> None:
    """Reset BatchNorm statistics and take them anew: plain means over one pass of the data.

    Parameters
    ----------
    module : Module
        Changed in place. Every member of a `LatePhase` runs on every batch, as in the official
        code. Of an `AveragedModel` it is the average that is run.
    batches : iterable of (inputs, targets)
        Training data; targets are not used.
    """
    if isinstance(module, AveragedModel):
        module = module.module
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return
    momenta = {layer: layer.momentum for layer in layers}
    training = {layer: layer.training for layer in module.modules()}
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
            layer.momentum = None  # cumulative
        if isinstance(module, LatePhase):
            _reset_members(module)
        for inputs, _ in batches:
            _run(module, inputs)
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for one, mode in training.items():
            one.training = mode


def _run(module: nn.Module, inputs: Any) -> None:
    args, kwargs = arguments(inputs)
    if not isinstance(module, LatePhase):
        module(*args, **kwargs)
        return
    module.training = True  # its own switch: keep the statistics a member has updated
    for k in range(module.members):
        module(*args, member=k, **kwargs)


def _reset_members(late: LatePhase) -> None:
    for key, value in late.statistics.named_buffers():
        path, _, name = key.replace("/", ".").rpartition(".")
        if isinstance(late.model.get_submodule(path), _BatchNorm):
            value.fill_(1.0 if name == "running_var" else 0.0)

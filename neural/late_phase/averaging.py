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
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import Batch, LatePhase
from neural.late_phase.ready import check_ready, checked_statistics
from neural.late_phase.rows import arguments
from nqm.errors import NQMError, check_number

_Tensors = tuple[Tensor, ...] | list[Tensor]


def swa(module: nn.Module) -> AveragedModel:
    """Running mean of parameters, all snapshots counted alike (Izmailov et al. 2018).

    Parameters
    ----------
    module : Module
        It is copied.

    Returns
    -------
    AveragedModel
        Call ``.update_parameters(module)`` at every snapshot; ``.module`` is the average. Its
        buffers are those of the last snapshot until `recompute_statistics` is called.

    Raises
    ------
    NQMError
        If the module cannot be copied: a script module, sharded or uninitialised weights.
    """
    check_ready(module, "swa")
    return AveragedModel(duplicate(module))


def ema(module: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and buffers.

    Copied, and not averaged, are whole numbers, and numbers that are not finite in the average or
    in the module: masks of -inf, observers that have seen no data.

    Parameters
    ----------
    module : Module
        It is copied.
    decay : float
        Share of the average that an update keeps, in [0, 1):
        ``average <- decay average + (1 - decay) module``.

    Returns
    -------
    AveragedModel
        Call ``.update_parameters(module)`` after every step; the first call copies the module.
        ``.module`` is the average.

    Raises
    ------
    NQMError
        If `decay` lies outside [0, 1), or the module cannot be copied.
    """
    check_ready(module, "ema")
    check_number("decay", decay, low=0.0, high=1.0, closed_high=False)
    smooth = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def average(kept: _Tensors, new: _Tensors, updates: Tensor | int) -> None:
        if kept[0].is_floating_point() or kept[0].is_complex():
            odd = [~(one.isfinite() & v.isfinite()) for one, v in zip(kept, new, strict=True)]
            smooth(kept, new, updates)
            for one, value, where in zip(kept, new, odd, strict=True):
                one.copy_(torch.where(where, value, one))
        else:
            # Counters and indices are whole numbers, which a mean would round.
            for one, value in zip(kept, new, strict=True):
                one.copy_(value)

    return AveragedModel(duplicate(module), multi_avg_fn=average, use_buffers=True)


@torch.no_grad()
def recompute_statistics(
    module: nn.Module,
    batches: Iterable[Batch],
    *,
    by_size: bool = False,
    dropout: bool = False,
) -> None:
    """Compute BatchNorm statistics anew: means over one pass of the data.

    Parameters
    ----------
    module : Module
        Changed in place. Every member of a `LatePhase` runs on every batch, as in the official
        code. For an `AveragedModel` the average is run.
    batches : iterable of (inputs, targets)
        Training data. Targets are not used.
    by_size : bool
        True: weigh each minibatch by its number of examples, so that a short last one counts less,
        as the official code does. False: every minibatch counts the same, as in torch's
        `update_bn`. The size is the length of the first axis of the first tensor of the inputs.
    dropout : bool
        True: leave dropout on, as the official code does. False: off, as when the averaged model is
        used.

    Raises
    ------
    NQMError
        If there is no batch (an iterator is empty after its first use), or if `by_size` is True and
        the inputs hold no tensor. The statistics then stay as they are, and also if a forward pass
        fails.
    """
    if isinstance(module, AveragedModel):
        module = module.module
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return
    momenta = {layer: layer.momentum for layer in layers}
    training = {layer: layer.training for layer in module.modules()}
    held = [(buffer, buffer.clone()) for buffer in module.buffers()]
    seen = 0
    try:
        module.eval()
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.reset_running_stats()
                layer.train()
                layer.momentum = None  # cumulative
            elif dropout and isinstance(layer, _DropoutNd):
                layer.train()
        if isinstance(module, LatePhase):
            _reset_members(module)
        for inputs, _ in batches:
            size = _size(inputs) if by_size else 1
            seen += size
            for layer in layers if by_size else ():
                layer.momentum = size / seen
            _run(module, inputs)
        if not seen:
            raise NQMError(
                "recompute_statistics: there is no batch, and the statistics stay as they are; an "
                "iterator is empty after its first use: give a list or a loader"
            )
    except BaseException:
        for buffer, value in held:
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for one, mode in training.items():
            one.training = mode


def _size(inputs: Any) -> int:
    """Examples of a minibatch."""
    for leaf in pytree.tree_leaves(arguments(inputs)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise NQMError("recompute_statistics: by_size needs a tensor in the inputs of every minibatch")


def _run(module: nn.Module, inputs: Any) -> None:
    args, kwargs = arguments(inputs)
    if not isinstance(module, LatePhase):
        with checked_statistics():
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

"""Averages over time, and BatchNorm statistics of averaged models.

SWA and EMA are torch's `AveragedModel`. It averages all parameters of a module, also the stacked
weights of a `LatePhase`: ``swa(late)`` is SWA of late-phase weights as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from neural.batches import Adapter, arguments, pairs
from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import LatePhase
from neural.late_phase.ready import check_ready, checked_statistics
from nqm.errors import NQMError, check_number

_Tensors = tuple[Tensor, ...] | list[Tensor]


def swa(module: nn.Module) -> AveragedModel:
    """Make a mean of parameters in which all snapshots have the same weight (Izmailov et al. 2018).

    Parameters
    ----------
    module : Module
        The module; it is copied.

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
    """Make an exponential moving average of parameters and buffers.

    Integers are copied instead of averaged, and so are numbers that are not finite in the average
    or in the module, e.g. masks of -inf.

    Parameters
    ----------
    module : Module
        The module; it is copied.
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

    def average(means: _Tensors, new: _Tensors, updates: Tensor | int) -> None:
        if means[0].is_floating_point() or means[0].is_complex():
            pairs = zip(means, new, strict=True)
            infinite = [~(mean.isfinite() & value.isfinite()) for mean, value in pairs]
            smooth(means, new, updates)
            for mean, value, where in zip(means, new, infinite, strict=True):
                mean.copy_(torch.where(where, value, mean))
        else:
            # Counters and indices are integers; their mean would be rounded.
            for mean, value in zip(means, new, strict=True):
                mean.copy_(value)

    return AveragedModel(duplicate(module), multi_avg_fn=average, use_buffers=True)


@torch.no_grad()
def recompute_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    by_size: bool = False,
    dropout: bool = False,
    batch: Adapter | None = None,
    batch_weights: Sequence[float] | None = None,
) -> None:
    """Recompute BatchNorm statistics as means over one pass of the data.

    After an error the statistics are those from before the call.

    Parameters
    ----------
    module : Module
        The module; its statistics are changed in place. Every member of a `LatePhase` runs on every
        batch, as in the official code. For an `AveragedModel` the average runs.
    batches : iterable of (inputs, targets)
        Training data; targets are not used.
    by_size : bool
        True: weight each minibatch by its number of examples, as in the official code. False: all
        minibatches have the same weight, as in torch's `update_bn`. The number of examples is the
        length of the first axis of the first tensor of the inputs.
    dropout : bool
        True: run with dropout, as in the official code. False: without, as in evaluation.
    batch : callable, optional
        Makes a pair (inputs, targets) of a minibatch as `batches` yields it; see
        `LatePhase.cycles`. For inputs alone: ``lambda b: (b, None)``.
    batch_weights : sequence of float, optional
        Another weight > 0 of each minibatch, e.g. where several processes have shares of unequal
        size.

    Raises
    ------
    NQMError
        If there is no batch (an iterator is empty after its first use), if a batch is no pair and
        `batch` makes none of it, or if `by_size` is True and the inputs hold no tensor.
    """
    if isinstance(module, AveragedModel):
        module = module.module
    for weight in batch_weights or ():
        check_number("batch_weights", weight, low=0.0, closed_low=False)
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return
    momenta = {layer: layer.momentum for layer in layers}
    training = {layer: layer.training for layer in module.modules()}
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    counting = _Counting()
    hooks: list[Any] = [layer.register_forward_pre_hook(counting) for layer in layers]
    compiled = module._compiled if isinstance(module, LatePhase) else None
    try:
        module.eval()
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.reset_running_stats()
                layer.train()
            elif dropout and isinstance(layer, _DropoutNd):
                layer.train()
        if isinstance(module, LatePhase):
            counting.members = _reset_members(module)
            module._compiled = None  # it would be compiled anew for every momentum
        for number, (inputs, _) in enumerate(pairs("recompute_statistics", batches, batch)):
            counting.weight = _size(inputs) if by_size else 1
            if batch_weights is not None:
                if number == len(batch_weights):
                    raise NQMError(
                        f"batch_weights must have one number for each minibatch; got {number}"
                    )
                counting.weight = batch_weights[number]
            counting.empty = False
            _run(module, inputs, counting)
        if counting.empty:
            raise NQMError(
                "recompute_statistics: there is no batch, and the statistics stay as they are; an "
                "iterator is empty after its first use, so give a list or a loader"
            )
    except BaseException:
        for buffer, value in saved:
            buffer.copy_(value)
        raise
    finally:
        if isinstance(module, LatePhase):
            module._compiled = compiled
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for submodule, mode in training.items():
            submodule.training = mode


class _Counting:
    """Gives a layer, before it runs, the momentum that makes its statistics a cumulative mean.

    Torch's own cumulative mean (momentum None) reads a counter of every layer in every minibatch,
    and a GPU would be waited for each time.
    """

    def __init__(self) -> None:
        self.weight: float = 1
        self.empty = True
        #: Layers with statistics for each member, and the member that runs.
        self.members: set[nn.Module] = set()
        self.member = 0
        self._seen: dict[tuple[nn.Module, int], float] = {}

    def __call__(self, layer: _BatchNorm, args: Any) -> None:
        key = (layer, self.member if layer in self.members else 0)
        self._seen[key] = self._seen.get(key, 0) + self.weight
        layer.momentum = self.weight / self._seen[key]


def _size(inputs: Any) -> int:
    """Number of examples of a minibatch."""
    for leaf in pytree.tree_leaves(arguments(inputs)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise NQMError("recompute_statistics: by_size needs a tensor in the inputs of every minibatch")


def _run(module: nn.Module, inputs: Any, counting: _Counting) -> None:
    args, kwargs = arguments(inputs)
    if not isinstance(module, LatePhase):
        with checked_statistics():
            module(*args, **kwargs)
        return
    module.training = True  # of `LatePhase` alone: it then stores the members' new statistics
    for counting.member in range(module.members):
        module(*args, member=counting.member, **kwargs)


def _reset_members(late: LatePhase) -> set[nn.Module]:
    """Reset the members' statistics; return the layers that have them."""
    layers: set[nn.Module] = set()
    for key, value in late.statistics.named_buffers():
        path, _, name = key.replace("/", ".").rpartition(".")
        layer = late.model.get_submodule(path)
        if isinstance(layer, _BatchNorm):
            value.fill_(1.0 if name == "running_var" else 0.0)
            layers.add(layer)
    return layers

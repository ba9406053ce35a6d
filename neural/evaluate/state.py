"""Change a model's weights, measure, and restore the model bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from neural.evaluate.predict import Batches, Score, score
from nqm.errors import NQMError

#: A loss: batches over which cross-entropy is averaged in eval mode, or a function of the model
#: that returns a loss, or a loss and an accuracy, and is called without autograd.
Loss = Batches | Callable[[nn.Module], float | Score]
#: Called after each change of the weights, e.g. to recompute BatchNorm statistics.
Recompute = Callable[[nn.Module], object]


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore a model's parameters, buffers and modes on exit, also after an exception.

    Parameters
    ----------
    model : Module
        The model.

    Yields
    ------
    callable
        Restores parameters and buffers when called.
    """
    saved = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
    modes = {module: module.training for module in model.modules()}

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(saved[name])

    try:
        yield restore
    finally:
        restore()
        for module, mode in modes.items():
            module.training = mode


def scorer(loss: Loss) -> Callable[[nn.Module], Score]:
    """Make a function of the model from a loss or batches.

    Parameters
    ----------
    loss : batches or callable
        See `Loss`.

    Returns
    -------
    callable
        Maps a model to its `Score`; accuracy is NaN if `loss` returns a number only.

    Raises
    ------
    NQMError
        If `loss` is an iterator, which could be read only once.
    """
    if not callable(loss):
        if isinstance(loss, Iterator):
            raise NQMError(
                "loss: batches are read once per evaluation, so they must be a list or a loader; "
                "got an iterator; use list(batches)"
            )
        return lambda model: score(model, loss)

    def run(model: nn.Module) -> Score:
        with torch.no_grad():
            value = loss(model)
        return value if isinstance(value, Score) else Score(float(value), math.nan)

    return run


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

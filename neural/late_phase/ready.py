"""Checks that models and minibatches can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nqm.errors import NQMError


def check_ready(model: nn.Module, what: str) -> None:
    """Check that a model's weights can be replicated and copied.

    Parameters
    ----------
    model : Module
        The model.
    what : str
        Name of the caller, for the message.

    Raises
    ------
    NQMError
        If the model is no `Module`, or has weights that cannot be replicated or copied.
    """
    if not isinstance(model, nn.Module):
        raise NQMError(f"{what} takes a torch.nn.Module; got {type(model).__name__}")
    for path, module in model.named_modules():
        where = f" ({path})" if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise NQMError(
                f"{what} takes a Python module; got a script module{where}; script the result"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NQMError(f"{what} takes a model whose weights are whole; got sharded ones{where}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise NQMError(
                f"{what}: {name} has no shape yet; first run the model once on a minibatch"
            )
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise NQMError(f"{what} takes a model whose weights are whole; {name} is sharded")


@contextmanager
def checked_statistics() -> Iterator[None]:
    """Turn torch's error about one value per channel into an NQMError.

    BatchNorm cannot compute the variance of one value. Whether a channel of a minibatch of one
    example has one value depends on the layers before it, so only a forward pass shows it.

    Yields
    ------
    None
        None

    Raises
    ------
    NQMError
        If a layer in training mode gets one value per channel.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise NQMError(
            "BatchNorm got one value per channel, which has no variance: a minibatch, or a piece "
            "of one, holds too few examples; use drop_last=True in the loader, another batch size, "
            "or fewer micro_batches"
        ) from None


def is_recurrent(model: nn.Module) -> bool:
    """Whether a model has recurrent layers, which run in kernels of their own.

    Parameters
    ----------
    model : Module

    Returns
    -------
    bool
    """
    return any(isinstance(layer, nn.RNNBase) for layer in model.modules())

"""Models that can be trained with weights put in their places; others are told so in one line."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nqm.errors import NQMError


def check_ready(model: nn.Module, what: str) -> None:
    """Raise NQMError where a model's weights cannot be replicated or copied.

    Parameters
    ----------
    model : Module
    what : str
        Who asks.
    """
    if not isinstance(model, nn.Module):
        raise NQMError(f"{what} takes a torch.nn.Module; got {type(model).__name__}")
    for path, module in model.named_modules():
        where = f" ({path})" if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise NQMError(
                f"{what} takes a Python module; got a script module{where}: script the result"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NQMError(f"{what} takes a model whose weights are whole; got sharded ones{where}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise NQMError(
                f"{what}: {name} has no shape yet; run the model once, on a minibatch, before"
            )
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise NQMError(f"{what} takes a model whose weights are whole; {name} is sharded")

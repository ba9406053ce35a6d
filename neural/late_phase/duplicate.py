"""Copies of models that have run: what autograd computed is copied by value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_M = TypeVar("_M", bound=nn.Module)


class _ResultsByValue(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = value = tensor.detach().clone()
            return value
        return func(*args, **(kwargs or {}))


def results_by_value() -> TorchFunctionMode:
    """Context in which `copy.deepcopy` also copies tensors with a history, by their values.

    Returns
    -------
    TorchFunctionMode
    """
    return _ResultsByValue()


def duplicate(model: _M) -> _M:
    """Deep copy of a module that may hold results of its last forward pass.

    Weight and spectral normalisation by hooks, parametrized recurrent layers and caches hold
    tensors with a history, which `copy.deepcopy` refuses. Their values are copied; the next
    forward pass of the copy computes them anew from its own weights.

    Parameters
    ----------
    model : Module
        It does not change.

    Returns
    -------
    Module
    """
    with results_by_value():
        return copy.deepcopy(model)

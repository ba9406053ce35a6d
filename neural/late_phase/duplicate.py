"""Deep copies of models after a forward pass, with computed tensors copied by value."""

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
    """Make `copy.deepcopy` copy tensors with an autograd history, too, by their values.

    Returns
    -------
    TorchFunctionMode
        To be used in a ``with`` statement.
    """
    return _ResultsByValue()


def duplicate(model: _M) -> _M:
    """Make a deep copy of a module that may hold results of its last forward pass.

    Weight and spectral normalisation by hooks, parametrized recurrent layers and caches hold
    tensors with an autograd history, which `copy.deepcopy` refuses. Their values are copied; the
    next forward pass of the copy computes new ones from its own weights.

    Parameters
    ----------
    model : Module
        The module; it is not changed.

    Returns
    -------
    Module
        The copy.
    """
    with results_by_value():
        return copy.deepcopy(model)

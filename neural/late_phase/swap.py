"""Other tensors in a model's places for a while; afterwards every place holds what it held.

`torch.func.functional_call` does this by name, and loses the model's own parameters where one
module goes by two names. Here a place is a module and a name in it, and comes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: A module and the name of a parameter or buffer in it.
Place = tuple[nn.Module, str]


def places(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """All places of some parameters and buffers: a tied weight has several.

    Parameters
    ----------
    model : Module
    names : iterable of str
        Any of the names of a tensor, as `named_parameters` and `named_buffers` print them.

    Returns
    -------
    dict
        Name -> its places, each once.
    """
    wanted = set(names)
    held: dict[str, Tensor] = {}
    of: dict[int, dict[tuple[int, str], Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{path}.{own}" if path else own
                if name in wanted:
                    held[name] = tensor
                of.setdefault(id(tensor), {})[id(module), own] = (module, own)
    return {name: tuple(of[id(held[name])].values()) for name in names}


@contextmanager
def swapped(
    where: Mapping[str, tuple[Place, ...]], tensors: MutableMapping[str, Tensor]
) -> Iterator[None]:
    """Put tensors into a model's places until the block is left.

    If the block assigns another tensor to a place (``self.count = self.count + 1``), that tensor is
    written to `tensors`.

    Parameters
    ----------
    where : mapping
        Name -> places of the tensor (see `places`).
    tensors : mapping
        Name -> tensor; may change.

    Yields
    ------
    None
        None
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            for module, own in where[name]:
                held: dict[str, Any] = (
                    module._parameters if own in module._parameters else module._buffers
                )
                kept.append((held, own, held[own]))
                held[own] = tensor
        yield
    finally:
        for name in tensors:
            module, own = where[name][0]
            now = module._parameters.get(own, module._buffers.get(own))
            if now is not None:
                tensors[name] = now
        for held, own, before in kept:
            held[own] = before


def call(
    function: Callable[..., Any],
    where: Mapping[str, tuple[Place, ...]],
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call a function of the model while other tensors are in its places.

    Parameters
    ----------
    function : callable
    where : mapping
        Name -> places of the tensor (see `places`).
    tensors : mapping
        Name -> tensor.
    args, kwargs : tuple, mapping
        Arguments of `function`.

    Returns
    -------
    object
        The result of `function`.
    """
    with swapped(where, dict(tensors)):
        return function(*args, **(kwargs or {}))

"""Put other tensors into a model for a while, and restore its own afterwards.

`torch.func.functional_call` does this by name, and loses the model's own parameters if one module
has two names. Here a place is a module and a name in it, and every place is treated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: A module and the name of a parameter or buffer in it.
Place = tuple[nn.Module, str]


def places(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """List all places of some parameters and buffers; a tied weight has several.

    Parameters
    ----------
    model : Module
        The model.
    names : iterable of str
        Names of tensors as in `named_parameters` and `named_buffers`; any name of a tied one.

    Returns
    -------
    dict of str to tuple of Place
        Places by name, each place once.
    """
    wanted = set(names)
    chosen: dict[str, Tensor] = {}
    of: dict[int, dict[tuple[int, str], Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{path}.{own}" if path else own
                if name in wanted:
                    chosen[name] = tensor
                of.setdefault(id(tensor), {})[id(module), own] = (module, own)
    return {name: tuple(of[id(chosen[name])].values()) for name in names}


@contextmanager
def swapped(
    where: Mapping[str, tuple[Place, ...]], tensors: MutableMapping[str, Tensor]
) -> Iterator[None]:
    """Put tensors into a model's places inside the block.

    If the block assigns another tensor to a place (``self.count = self.count + 1``), that tensor is
    written to `tensors`.

    Parameters
    ----------
    where : mapping of str to tuple of Place
        Places of each tensor by its name (see `places`).
    tensors : mutable mapping of str to Tensor
        Tensors by name; may be changed.

    Yields
    ------
    None
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            for module, own in where[name]:
                registry: dict[str, Any] = (
                    module._parameters if own in module._parameters else module._buffers
                )
                saved.append((registry, own, registry[own]))
                registry[own] = tensor
        yield
    finally:
        for name in tensors:
            module, own = where[name][0]
            now = module._parameters.get(own, module._buffers.get(own))
            if now is not None:
                tensors[name] = now
        for registry, own, before in saved:
            registry[own] = before


def call(
    function: Callable[..., Any],
    where: Mapping[str, tuple[Place, ...]],
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call a function while other tensors are in a model's places.

    Parameters
    ----------
    function : callable
        The model, or a function that uses it.
    where, tensors
        See `swapped`; here `tensors` is not changed.
    args : tuple
        Positional arguments of `function`.
    kwargs : mapping, optional
        Keyword arguments of `function`.

    Returns
    -------
    object
        The result of `function`.
    """
    with swapped(where, dict(tensors)):
        return function(*args, **(kwargs or {}))

"""Minibatches of any form as pairs (inputs, targets).

Loaders yield pairs, dicts, longer tuples, dataclasses or objects of their own. What takes a loader
takes ``batch`` beside it: a function of one minibatch as the loader yields it, which returns the
pair. Without it only pairs are accepted, so that no dict of two keys is taken for one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nqm.errors import NQMError

#: (inputs, targets); inputs is one argument, a tuple of arguments or a dict of keyword arguments.
Batch = tuple[Any, Any]
#: Makes a pair of a minibatch as the loader yields it.
Adapter = Callable[[Any], Batch]


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert a batch's inputs to positional and keyword arguments of the model.

    Parameters
    ----------
    inputs : object
        A mapping of keyword arguments, a tuple or list of positional arguments, or one argument.

    Returns
    -------
    (tuple of object, dict of str to object)
        Positional and keyword arguments.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def pairs(who: str, loader: Iterable[Any], batch: Adapter | None = None) -> Iterator[Batch]:
    """Yield the minibatches of a loader as pairs.

    Parameters
    ----------
    who : str
        Name of the caller, for the message.
    loader : iterable
        Minibatches.
    batch : callable, optional
        Makes a pair of one of them; without it they must be pairs.

    Yields
    ------
    Batch
        Inputs and targets.

    Raises
    ------
    NQMError
        If a minibatch is no pair, or `batch` returns none.
    """
    for one in loader:
        yield as_pair(who, one, batch)


def as_pair(who: str, one: Any, batch: Adapter | None = None) -> Batch:
    """Make a pair of one minibatch.

    Parameters
    ----------
    who : str
        Name of the caller, for the message.
    one : object
        The minibatch.
    batch : callable, optional
        Makes a pair of it; without it, it must be a pair.

    Returns
    -------
    Batch
        Inputs and targets; mappings of other classes as dicts.

    Raises
    ------
    NQMError
        If it is no pair, or `batch` returns none.
    """
    if batch is not None:
        if not callable(batch):
            raise NQMError(f"{who}: batch must be a function of one minibatch; got {batch!r:.60}")
        given = one
        try:
            one = batch(given)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise NQMError(
                f"{who}: batch fails on {_described(given)} ({type(error).__name__}: "
                f"{' '.join(str(error).split()):.100})"
            ) from error
        if not _is_pair(one):
            raise NQMError(
                f"{who}: batch must return a pair (inputs, targets); got {_described(one)} "
                f"for {_described(given)}"
            )
    elif not _is_pair(one):
        raise NQMError(
            f"{who}: a minibatch is a pair (inputs, targets); got {_described(one)}; "
            f"give batch=lambda b: {_hint(one)} or the like"
        )
    inputs, targets = one
    return _plain(inputs), _plain(targets)


def _is_pair(one: Any) -> bool:
    return isinstance(one, tuple | list) and len(one) == 2


def _plain(value: Any) -> Any:
    # Mappings of other classes, e.g. those of tokenizers, are no containers for torch.
    other = isinstance(value, Mapping) and not isinstance(value, dict)
    return dict(value) if other else value


def _described(one: Any) -> str:
    kind = type(one).__name__
    if isinstance(one, Mapping):
        return f"a {kind} of {', '.join(map(repr, one))}"[:120]
    return f"a {kind} of {len(one)}" if isinstance(one, tuple | list) else f"a {kind}"


def _hint(one: Any) -> str:
    """Two likely parts of a minibatch."""
    if isinstance(one, Mapping):
        first, last = ([*map(repr, one), "'x'", "'y'"])[:2]
        return f"(b[{first}], b[{last}])"
    if isinstance(one, tuple | list):
        return "(b[:-1], b[-1])" if len(one) > 1 else "(b[0], None)"
    if isinstance(one, Tensor):
        return "(b, None)"
    names = [entry.name for entry in dataclasses.fields(one)] if _is_dataclass(one) else []
    first, last = [*names, "x", "y"][:2]
    return f"(b.{first}, b.{last})"


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to the tensors inside tuples, lists, mappings and dataclasses.

    Parameters
    ----------
    function : callable
        Takes a tensor.
    tree : object
        Inputs, targets, or both.

    Returns
    -------
    object
        The same structure with the results; mappings of other classes become dicts. Objects of
        other kinds are kept.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, Mapping):
            return map_tensors(function, dict(value))
        if _is_dataclass(value):
            twin = copy.copy(value)
            for entry in dataclasses.fields(value):
                if hasattr(value, entry.name):
                    mapped = map_tensors(function, getattr(value, entry.name))
                    object.__setattr__(twin, entry.name, mapped)  # frozen ones too
            return twin
        return value

    return pytree.tree_map(leaf, tree)


def safe_to_keep(loader: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield minibatches of a loader, copied if the loader would overwrite them.

    Some loaders write every minibatch into the same memory. The first `count` minibatches are
    copied; if two of them share memory, all later ones are copied too.

    Parameters
    ----------
    loader : iterable of batches
        Minibatches (inputs, targets).
    count : int
        Number of minibatches that the caller stores at a time.

    Yields
    ------
    Batch
        The next minibatch, or a copy.
    """
    first: list[Batch] = []
    copies = True
    for batch in loader:
        if copies and len(first) < count:
            first.append(batch)  # stored, so that its memory is not used for another batch
            if len(first) == count:
                memory = [_memory(stored) for stored in first]
                copies = sum(map(len, memory)) > len(set().union(*memory))
            yield _copied(batch)
            if len(first) == count and not copies:
                first.clear()
        else:
            yield _copied(batch) if copies else batch


def _memory(batch: Batch) -> set[int]:
    """Addresses of the tensors of a minibatch."""
    found: set[int] = set()

    def note(x: Tensor) -> Tensor:
        if x.layout is torch.strided:
            found.add(x.data_ptr())
        return x

    map_tensors(note, batch)
    return found


def _copied(batch: Batch) -> Batch:
    return cast(Batch, map_tensors(lambda x: x.clone(), batch))

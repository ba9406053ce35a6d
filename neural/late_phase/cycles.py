"""Store minibatches of a loader until there is one for every member."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: (inputs, targets); inputs is one tensor, a tuple of arguments or a dict of keyword arguments.
Batch = tuple[Any, Any]


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
                memory = [{x.data_ptr() for x in _tensors(stored)} for stored in first]
                copies = sum(map(len, memory)) > len(set().union(*memory))
            yield _copied(batch)
            if len(first) == count and not copies:
                first.clear()
        else:
            yield _copied(batch) if copies else batch


def _tensors(batch: Batch) -> list[Tensor]:
    return [
        x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.layout == torch.strided
    ]


def _copied(batch: Batch) -> Batch:
    copied = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
    return cast(Batch, copied)

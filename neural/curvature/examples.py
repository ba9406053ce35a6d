"""Batches as rows: which tensors of a batch have one entry for each example, and its slices.

Inputs may be a tensor, or tuples, lists and mappings of tensors, nested at will. Slicing examples
out of a batch is right only if it is known where they are: every tensor must have them along its
first axis, or be a single number, which all examples share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from neural.late_phase.members import Batch
from neural.late_phase.rows import arguments
from nqm.errors import NQMError

#: Makes inputs of their tensors.
MakeInputs = Callable[[Sequence[Tensor]], Any]
#: Makes a batch of its inputs' tensors, and of the targets, which come last.
MakeBatch = Callable[[Sequence[Tensor]], Batch]
#: What a batch may hold besides tensors with rows: examples share it.
_SHARED = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def input_rows(inputs: Any, count: int | None = None) -> tuple[list[Tensor], MakeInputs]:
    """Tensors that have a row for each example, and how to rebuild inputs from such tensors.

    Parameters
    ----------
    inputs : Tensor, or tuple, list or mapping of what is passed to the model
    count : int, optional
        Number of examples; the length of the first tensor by default.

    Returns
    -------
    tensors : list of Tensor
        Each of length `count`.
    make : callable
        Rebuilds inputs from a list of such tensors, of any common length.

    Raises
    ------
    NQMError
        If a tensor has another length, or `inputs` hold an object in which examples cannot be told
        apart.
    """
    leaves, spec = pytree.tree_flatten(_plain(arguments(inputs)))
    held = [isinstance(one, Tensor) and one.ndim > 0 for one in leaves]
    for leaf, rows in zip(leaves, held, strict=True):
        if rows and count is None:
            count = len(leaf)
        if rows and len(leaf) != count:
            raise NQMError(
                f"a batch of {count} examples holds an input of shape {tuple(leaf.shape)}; the "
                "first axis of all must be the examples': transpose it, or repeat what they share"
            )
        if not isinstance(leaf, _SHARED):
            raise NQMError(
                f"a batch's inputs hold a {type(leaf).__name__}, in which examples cannot be told "
                "apart; give tensors, or tuples, lists or mappings of them"
            )

    def make(tensors: Sequence[Tensor]) -> Any:
        if isinstance(inputs, Tensor):
            return tensors[0]
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if rows else leaf for leaf, rows in zip(leaves, held, strict=True)], spec
        )
        return kwargs or args

    return [leaf for leaf, rows in zip(leaves, held, strict=True) if rows], make


def rows(batch: Batch) -> tuple[list[Tensor], MakeBatch]:
    """`input_rows` of a batch; the targets are the last of the tensors.

    Parameters
    ----------
    batch : (inputs, targets)

    Returns
    -------
    tensors : list of Tensor
    make : callable
        Rebuilds a batch from a list of such tensors.
    """
    inputs, targets = batch
    tensors, make = input_rows(inputs, len(targets))
    return [*tensors, targets], lambda given: (make(given[:-1]), given[-1])


def joined(batches: Sequence[Batch]) -> tuple[list[Tensor], MakeBatch]:
    """`rows` of all batches, concatenated.

    Parameters
    ----------
    batches : sequence of (inputs, targets)
        At least one.

    Returns
    -------
    tensors : list of Tensor
    make : callable
        Rebuilds a batch from a list of such tensors.

    Raises
    ------
    NQMError
        If batches differ in structure, in what their examples share, or in an example's shape.
    """
    taken = [rows(batch) for batch in batches]
    parts, make = [tensors for tensors, _ in taken], taken[0][1]
    first = _stated(batches[0])
    for batch, tensors in zip(batches, parts, strict=True):
        shapes = [one.shape[1:] for one in tensors]
        if _stated(batch) != first or shapes != [one.shape[1:] for one in parts[0]]:
            raise NQMError(
                "batches differ in the structure of their inputs, or in an example's shape (of "
                "padded texts, say); pad all to one length"
            )
    return [torch.cat(column) for column in zip(*parts, strict=True)], make


def content(batches: Iterable[Batch]) -> list[Any]:
    """All that batches hold, tensors and other values, in order.

    Parameters
    ----------
    batches : iterable of (inputs, targets)

    Returns
    -------
    list
    """
    return [leaf for batch in batches for leaf in pytree.tree_leaves(_tree(batch))]


class EachRow:
    """A function of every row of its arguments; results are stacked.

    By `vmap`, or one row after the other where that cannot go, as where a forward pass branches on
    a tensor's value.

    Parameters
    ----------
    function : callable
        Of tensors, one row of each argument; gives tensors.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.together = True

    def of(self, args: Sequence[Tensor]) -> Any:
        """Results for all rows of the arguments.

        Parameters
        ----------
        args : sequence of Tensor
            Of one length.

        Returns
        -------
        Tensor, or tree of Tensor
            Stacked along the first axis.
        """
        return self(*args)

    def __call__(self, *args: Tensor) -> Any:
        """Results of all rows."""
        if self.together:
            try:
                return vmap(self.function)(*args)
            except RuntimeError:  # if rows fail by themselves as well, they say why
                self.together = False
        found = [self.function(*row) for row in zip(*args, strict=True)]
        return pytree.tree_map(lambda *each: torch.stack(each), *found)


def _tree(batch: Batch) -> Any:
    inputs, targets = batch
    return _plain(arguments(inputs)), targets


def _stated(batch: Batch) -> tuple[Any, list[Any]]:
    """Structure, and what the examples share."""
    leaves, spec = pytree.tree_flatten(_tree(batch))
    shared = [
        (one.item() if one.ndim == 0 else None) if isinstance(one, Tensor) else one
        for one in leaves
    ]
    return spec, shared


def _plain(tree: Any) -> Any:
    """Any mapping within as a dict, which pytrees know."""
    if isinstance(tree, Mapping):
        return {name: _plain(value) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_plain, tree))
    return type(tree)(map(_plain, tree)) if type(tree) in (tuple, list) else tree

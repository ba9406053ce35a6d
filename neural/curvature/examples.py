"""Split batches into examples: the tensors of a batch that have one row for each example.

Inputs may be a tensor, or tuples, lists and mappings of tensors, nested at will. Every tensor must
have the examples along its first axis, or be a single number, which all examples share.
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
from nqm.runs.interrupts import let_through

#: Rebuilds inputs from their tensors.
MakeInputs = Callable[[Sequence[Tensor]], Any]
#: Rebuilds a batch from the tensors of its inputs and the targets, which come last.
MakeBatch = Callable[[Sequence[Tensor]], Batch]
#: Types of the values in a batch that all examples may share.
_SHARED = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def input_rows(inputs: Any, count: int | None = None) -> tuple[list[Tensor], MakeInputs]:
    """List the tensors with a row for each example, and make a function that rebuilds the inputs.

    Parameters
    ----------
    inputs : Tensor, or tuple, list or mapping
        Arguments of the model.
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
        If a tensor has another length, or `inputs` hold an object of a type that cannot be split
        into examples.
    """
    leaves, spec = pytree.tree_flatten(_plain(arguments(inputs)))
    has_rows = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves]
    for leaf, rows in zip(leaves, has_rows, strict=True):
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
        remaining = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [
                next(remaining) if rows else leaf
                for leaf, rows in zip(leaves, has_rows, strict=True)
            ],
            spec,
        )
        return kwargs or args

    return [leaf for leaf, rows in zip(leaves, has_rows, strict=True) if rows], make


def rows(batch: Batch) -> tuple[list[Tensor], MakeBatch]:
    """Apply `input_rows` to a batch.

    Parameters
    ----------
    batch : (inputs, targets)
        The batch.

    Returns
    -------
    tensors : list of Tensor
        Those of the inputs, then the targets.
    make : callable
        Rebuilds a batch from a list of such tensors.
    """
    inputs, targets = batch
    tensors, make = input_rows(inputs, len(targets))
    return [*tensors, targets], lambda some: (make(some[:-1]), some[-1])


def joined(batches: Sequence[Batch]) -> tuple[list[Tensor], MakeBatch]:
    """Apply `rows` to all batches, and concatenate the tensors.

    Parameters
    ----------
    batches : sequence of (inputs, targets)
        At least one.

    Returns
    -------
    tensors : list of Tensor
        Those of the inputs, then the targets; the examples of all batches in order.
    make : callable
        Rebuilds a batch from a list of such tensors.

    Raises
    ------
    NQMError
        If batches differ in structure, in the values that examples share, or in an example's shape.
    """
    split = [rows(batch) for batch in batches]
    each, make = [tensors for tensors, _ in split], split[0][1]
    first = _structure(batches[0])
    for batch, tensors in zip(batches, each, strict=True):
        shapes = [tensor.shape[1:] for tensor in tensors]
        if _structure(batch) != first or shapes != [tensor.shape[1:] for tensor in each[0]]:
            raise NQMError(
                "batches differ in the structure of their inputs, or in an example's shape (of "
                "padded texts, say); pad all to one length"
            )
    return [torch.cat(column) for column in zip(*each, strict=True)], make


def content(batches: Iterable[Batch]) -> list[Any]:
    """List all tensors and other values that batches hold, in order.

    Parameters
    ----------
    batches : iterable of (inputs, targets)
        The batches.

    Returns
    -------
    list
        Tensors, and values of other types.
    """
    return [leaf for batch in batches for leaf in pytree.tree_leaves(_tree(batch))]


class EachRow:
    """Apply a function to every row of its arguments, and stack the results.

    By `vmap`; if `vmap` fails, e.g. because a forward pass branches on a tensor's value, one row
    after the other.

    Parameters
    ----------
    function : callable
        Takes tensors, one row of each argument; returns a tensor or a tree of tensors.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.together = True

    def of(self, args: Sequence[Tensor]) -> Any:
        """Apply the function to all rows of the arguments, given as one sequence.

        Parameters
        ----------
        args : sequence of Tensor
            Arguments of equal length.

        Returns
        -------
        Tensor, or tree of Tensor
            Results, stacked along the first axis.
        """
        return self(*args)

    def __call__(self, *args: Tensor) -> Any:
        """Apply the function to all rows of the arguments.

        Parameters
        ----------
        *args : Tensor
            Arguments of equal length.

        Returns
        -------
        Tensor, or tree of Tensor
            Results, stacked along the first axis.
        """
        if self.together:
            try:
                return vmap(self.function)(*args)
            except RuntimeError as error:  # a row that fails by itself raises its own error below
                let_through(error)
                self.together = False
        results = [self.function(*row) for row in zip(*args, strict=True)]
        return pytree.tree_map(lambda *each: torch.stack(each), *results)


def _tree(batch: Batch) -> Any:
    inputs, targets = batch
    return _plain(arguments(inputs)), targets


def _structure(batch: Batch) -> tuple[Any, list[Any]]:
    """Structure of a batch, and the values that its examples share."""
    leaves, spec = pytree.tree_flatten(_tree(batch))
    shared = [
        (leaf.item() if leaf.ndim == 0 else None) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    return spec, shared


def _plain(tree: Any) -> Any:
    """Convert all mappings within to dicts, which torch's pytrees support."""
    if isinstance(tree, Mapping):
        return {name: _plain(value) for name, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_plain, tree))
    return type(tree)(map(_plain, tree)) if type(tree) in (tuple, list) else tree

"""Memory of derivatives, and how many examples fit a budget together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nqm.limits import memory_limit

#: Memory of a Hessian product over that which one forward pass keeps (values, their tangents, the
#: backward pass of both, and temporary tensors): 9 was counted for a convolutional net.
PASSES = 10


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Measure what a forward pass keeps for its backward pass, weights excluded.

    Parameters
    ----------
    model : Module
        Its own tensors are not counted.
    run : callable
        Runs the forward pass.

    Returns
    -------
    int
        Bytes.
    """
    kept: dict[int, int] = {}
    held = []  # storages that are freed could be counted as one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    return sum(size for key, size in kept.items() if key not in own)


def fitting(each: float, most: int) -> int:
    """How many of equal parts may be in memory together.

    Parameters
    ----------
    each : float
        Bytes of one.
    most : int
        Largest number.

    Returns
    -------
    int
        At least 1: what does not fit alone is tried alone.
    """
    return max(1, min(most, int(memory_limit() / max(each, 1.0))))

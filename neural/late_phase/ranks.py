"""Average gradients over several processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    Parameters
    ----------
    parameters : iterable of Parameter
        Parameters, the same in every process; their gradients are changed in place. Those without
        a gradient are left out.
    """
    average([p.grad for p in parameters if p.grad is not None])


def average(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the processes.

    Parameters
    ----------
    tensors : sequence of Tensor
        Of the same shapes in every process; changed in place.
    """
    if not tensors:
        return
    # All in one message: many small messages would be slower.
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for x, mean in zip(tensors, torch.split(flat, [x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))

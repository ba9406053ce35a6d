"""Average gradients over several processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    Parameters
    ----------
    parameters : iterable of Parameter
        Parameters, the same in every process; their gradients are changed in place. Those without
        a gradient are left out.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    # All gradients in one message: many small messages would be slower.
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, mean in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))

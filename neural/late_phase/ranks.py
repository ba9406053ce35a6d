"""Gradients of several processes made one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of every gradient over the processes, in place.

    Parameters
    ----------
    parameters : iterable of Parameter
        The same ones, with gradients, in every process.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    # One message for all: many small ones would wait for each other.
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, mean in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))

"""Several processes on one run: started by ``torchrun``, each with its share of every minibatch."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join() -> tuple[int, int]:
    """Join the processes ``torchrun`` started; (rank, world), (0, 1) for a process on its own."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def summed(value: Tensor) -> Tensor:
    """Sum of a tensor over the processes, the same in all of them."""
    total = value.clone()
    dist.all_reduce(total)
    return total


def share_weights(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            dist.broadcast(value, 0)


def local_rank() -> int:
    """Which of this machine's GPUs is this process's own."""
    return int(os.environ.get("LOCAL_RANK", "0"))

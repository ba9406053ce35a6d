"""Several processes that train one run, started by ``torchrun``; each has a part of minibatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neural.late_phase.members import Batch
from nqm.errors import NQMError


def join(device: torch.device | None = None) -> tuple[int, int]:
    """Join the processes that ``torchrun`` started.

    Parameters
    ----------
    device : torch.device, optional
        Device of this process: GPUs talk by NCCL, and a CPU by Gloo, which is the default.

    Returns
    -------
    rank, world : int
        Number of this process, and number of all processes; (0, 1) without ``torchrun``.

    Raises
    ------
    NQMError
        If torch cannot connect the processes, or a variable of ``torchrun`` is wrong.
    """
    if processes() == 1:
        return 0, 1
    if not dist.is_initialized():
        try:
            on_gpu = device is not None and device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo")
        except (ValueError, RuntimeError) as error:  # a missing variable, or no connection
            raise NQMError(
                f"WORLD_SIZE = {processes()} asks for several processes, and they cannot be joined "
                f"({error!s:.150}); start them by torchrun, or unset WORLD_SIZE"
            ) from None
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """End the connection to the other processes, if there is one, at the end of the work."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """Number of processes that ``torchrun`` has started.

    Returns
    -------
    int
        At least 1; 1 without ``torchrun``.

    Raises
    ------
    NQMError
        If a variable that ``torchrun`` sets is not a whole number.
    """
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(least))
        if not (text.isascii() and text.isdigit() and least <= int(text) < 2**31):
            raise NQMError(
                f"the environment variable {name} must be a whole number >= {least}; got "
                f"{text!r:.40}; unset it, or start by torchrun"
            )
    return int(os.environ.get("WORLD_SIZE", "1"))


def summed(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes.

    Parameters
    ----------
    value : Tensor
        Summand of this process, with the same shape in all processes; it is not changed.

    Returns
    -------
    Tensor
        The sum, the same in all processes.
    """
    total = value.clone()
    dist.all_reduce(total)
    return total


def share_weights(module: nn.Module) -> None:
    """Copy parameters and buffers of the first process to all others.

    Parameters
    ----------
    module : Module
        The module; changed in place in all processes but the first.
    """
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            dist.broadcast(value, 0)


@dataclass(frozen=True)
class Parts:
    """Training data of which every process of a run has its part.

    Attributes
    ----------
    make : callable
        Returns the minibatches of one epoch, this process's part of each.
    world : int
        Number of processes of the run.
    weights : sequence of float
        Weight of the part of each minibatch: the mean over processes of weighted means over parts
        is the mean over examples (see `neural.data.sampling.EpochPlan.weight`).
    """

    make: Callable[[], Iterable[Batch]]
    world: int
    weights: Sequence[float]

    def __call__(self) -> Iterable[Batch]:
        """Minibatches of one epoch.

        Returns
        -------
        iterable of (inputs, targets)
        """
        return self.make()

    def average_statistics(self, module: nn.Module) -> None:
        """Replace weighted means of the parts' statistics by the mean over all processes.

        Parameters
        ----------
        module : Module
            Its buffers of floating-point numbers are changed in place.
        """
        if self.world == 1:
            return
        with torch.no_grad():
            for value in module.buffers():
                if value.is_floating_point():
                    value *= sum(self.weights) / len(self.weights)
                    dist.all_reduce(value)
                    value /= self.world


def local_rank() -> int:
    """Number of this process on its machine, which is also the number of its GPU.

    Returns
    -------
    int
        From 0; 0 without ``torchrun``.
    """
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Number of processes of ``torchrun`` on this machine.

    Returns
    -------
    int
        At least 1; 1 without ``torchrun``.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isascii() and text.isdigit() else 1

"""BatchNorm over the minibatches of all processes, instead of each process's part."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nqm.errors import NQMError

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm with statistics of all processes: torch's on GPUs, its formulas on a CPU.

    Torch has no such layer for CPUs. In training all processes must run it equally often.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a minibatch, of which each process has a part of any size.

        Parameters
        ----------
        input : Tensor, shape (B, C, ...)
            This process's part.

        Returns
        -------
        Tensor, shape (B, C, ...)

        Raises
        ------
        ValueError
            If all parts together have a single value per channel.
        """
        if input.is_cuda or not self.training:
            result: Tensor = super().forward(input)
            return result
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_tensor(float(x.numel() // x.shape[1]))
        dist.all_reduce(count)
        if count < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training; got {tuple(x.shape)} here"
            )
        mean = _summed(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = _summed(centred.square().sum(axes)) / count
        self._note(mean.detach(), variance.detach() * count / (count - 1))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        assert momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _Summed(torch.autograd.Function):
    """Sum over processes. Each process's loss depends on it, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


def _summed(value: Tensor) -> Tensor:
    return cast(Tensor, _Summed.apply(value))  # type: ignore[no-untyped-call]


def synchronise(model: nn.Module) -> nn.Module:
    """Replace BatchNorm layers by ones with statistics of all processes.

    Parameters
    ----------
    model : Module
        The model; it is changed in place, and its parameters and buffers stay the same objects.

    Returns
    -------
    Module
        The model, or the new layer if the model is a BatchNorm layer itself.

    Raises
    ------
    NQMError
        If a layer is of a class of its own, which may do more than BatchNorm.
    """
    if isinstance(model, _PLAIN) and type(model) in _PLAIN:
        return _like(model)
    if isinstance(model, _BatchNorm):
        raise NQMError(
            f"train.sync_batchnorm does not know the layer {type(model).__name__}; leave it out"
        )
    for name, child in model.named_children():
        setattr(model, name, synchronise(child))
    return model


def _like(layer: _BatchNorm) -> SyncBatchNorm:
    made = SyncBatchNorm(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    made._parameters, made._buffers = layer._parameters, layer._buffers
    made.training = layer.training
    return made

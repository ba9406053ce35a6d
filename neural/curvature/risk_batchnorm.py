"""The loss that training with BatchNorm sees: of whole minibatches, with their own statistics.

In training mode an example's loss depends on the minibatch it is in. So the minibatch is the
example: fixed groups of so many examples, each with the mean loss of its group. Slope, curvature
and noise (between groups) are then those of any risk, and a training on it draws groups.
Left out is that training forms new groups in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from neural.curvature.examples import input_rows, joined
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.members import Batch
from nqm.errors import NQMError, check_integer


class BatchNormRisk(EmpiricalRisk):
    """Mean over fixed groups of examples of a group's mean loss, with the group's statistics.

    Everything but BatchNorm is in evaluation mode; running statistics are neither used nor
    touched. Parameters and methods are those of `EmpiricalRisk`, where an example is now a group:
    inputs and targets have shape (groups, size, ...), as `grouped` makes them, `examples` counts
    groups, and `loss` gives one number per group.
    """

    def _output(self, w: Tensor, inputs: Any) -> Tensor:
        """Outputs of every group by itself, shape (groups, size, ...)."""
        output = super()._output
        tensors, make = input_rows(inputs)
        return torch.stack([output(w, make(group)) for group in zip(*tensors, strict=True)])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block, except that BatchNorm uses the statistics of its input.

        Yields
        ------
        None
        """
        layers = [layer for layer in self.model.modules() if isinstance(layer, _BatchNorm)]
        with super().evaluating():
            try:
                for layer in layers:
                    vars(layer)["forward"] = _with_own_statistics(layer)
                yield
            finally:
                for layer in layers:
                    vars(layer).pop("forward", None)


def grouped(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Examples in groups of `size`, in their order; a last incomplete group is dropped.

    Parameters
    ----------
    batches : sequence of (inputs, targets)
    size : int
        Examples of a group, at least 2.

    Returns
    -------
    list of (inputs, targets)
        One group each, of shapes (1, size, ...).

    Raises
    ------
    NQMError
        If `size` is below 2 or above the number of examples.
    """
    check_integer("size", size, 2)
    tensors, make = joined(batches)
    count = len(tensors[-1])
    if count < size:
        raise NQMError(f"size must be at most the {count} examples; got {size}")
    groups = zip(*(torch.split(one[: count // size * size], size) for one in tensors), strict=True)
    return [make([one[None] for one in group]) for group in groups]


def _with_own_statistics(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """A BatchNorm layer's forward pass with the statistics of its input, in plain operations.

    Torch's own kernel, which does not, loses terms of third derivatives and of forward derivatives
    that are taken twice.
    """

    def forward(x: Tensor) -> Tensor:
        over = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + layer.eps)
        if not layer.affine:
            return y
        shape = [1, -1] + [1] * (x.dim() - 2)
        return y * layer.weight.view(shape) + layer.bias.view(shape)

    return forward

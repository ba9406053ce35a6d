"""Loss of whole minibatches with BatchNorm in training mode.

In training mode an example's loss depends on the minibatch it is in. A risk is therefore made of
fixed groups of examples: a group takes the place of an example, and its loss is the mean loss of
the group. Slope, curvature and noise (between groups) are computed as for any risk, and training on
it draws groups. One effect is not included: real training forms new groups in every epoch.
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
    """Mean loss of fixed groups of examples, where BatchNorm uses the statistics of the group.

    All other layers are in evaluation mode; running statistics are neither used nor changed.
    Parameters and methods are those of `EmpiricalRisk`, with groups in the place of examples:
    inputs and targets have shape (groups, size, ...), as `grouped` makes them, `examples` is the
    number of groups, and `loss` returns one number per group.
    """

    def output(self, w: Tensor, inputs: Any) -> Tensor:
        """Outputs of the groups, each computed separately, shape (groups, size, ...)."""
        output = super().output
        tensors, make = input_rows(inputs)
        return torch.stack([output(w, make(group)) for group in zip(*tensors, strict=True)])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode; BatchNorm uses the statistics of its input.

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
    """Split examples into groups, in their order; an incomplete last group is left out.

    Parameters
    ----------
    batches : sequence of (inputs, targets)
        The examples.
    size : int
        Number of examples of a group, at least 2.

    Returns
    -------
    list of (inputs, targets)
        One group in each entry, of shapes (1, size, ...).

    Raises
    ------
    NQMError
        If `size` is below 2 or above the number of examples, or the batches cannot be joined.
    """
    check_integer("size", size, 2)
    tensors, make = joined(batches)
    count = len(tensors[-1])
    if count < size:
        raise NQMError(f"size must be at most the {count} examples; got {size}")
    used = count // size * size
    groups = zip(*(torch.split(tensor[:used], size) for tensor in tensors), strict=True)
    return [make([tensor[None] for tensor in group]) for group in groups]


def _with_own_statistics(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Make a BatchNorm layer's forward pass with the statistics of its input.

    It uses plain operations: torch's own kernel loses terms of third derivatives and of forward
    derivatives that are taken twice.
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

"""Clip the gradient of one minibatch at a time, over the shared and one member's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nqm.errors import NQMError

#: Added to a norm before it is divided by, as in `torch.nn.utils.clip_grad_norm_`.
EPSILON = 1e-6


@contextmanager
def clipped(
    shared: Sequence[nn.Parameter],
    stacked: Sequence[nn.Parameter],
    member: int,
    norm: float | Tensor,
    average: Callable[[list[Tensor]], None],
) -> Iterator[None]:
    """Clip the gradient that the block computes, and add it to the earlier ones.

    The norm is that of `torch.nn.utils.clip_grad_norm_` on the network of one member: over the
    shared weights and the member's own.

    Parameters
    ----------
    shared : sequence of Parameter
        Weights that all members share.
    stacked : sequence of Parameter, shape (K, ...)
        Weights of the members; other rows of their gradients are not changed.
    member : int
        Number of the member whose minibatch the block runs.
    norm : float or Tensor, shape ()
        Largest norm.
    average : callable
        Averages tensors over processes, in place, before they are clipped.

    Yields
    ------
    None

    Raises
    ------
    NQMError
        If a shared weight has a sparse gradient.
    """
    earlier = [p.grad for p in shared]
    for p in shared:
        p.grad = None
    yield
    with torch.no_grad():
        grads = [p.grad for p in shared if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise NQMError("clip_norm takes dense gradients; make embeddings with sparse=False")
        grads += [p.grad[member] for p in stacked if p.grad is not None]  # views
        average(grads)
        scale_to(grads, norm)
        for p, before in zip(shared, earlier, strict=True):
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)


def scale_to(grads: Sequence[Tensor], norm: float | Tensor) -> None:
    """Scale tensors so that their common norm is at most `norm`.

    Parameters
    ----------
    grads : sequence of Tensor
        Changed in place.
    norm : float or Tensor, shape ()
        Largest norm over all of them.
    """
    if grads:
        total = nn.utils.get_total_norm(grads)
        limit = norm.to(total.device) if isinstance(norm, Tensor) else norm
        factor = (limit / (total + EPSILON)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.to(g.device))

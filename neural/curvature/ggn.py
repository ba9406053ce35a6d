"""The generalised Gauss-Newton matrix of a loss: products with vectors, and the dense matrix.

G = sum_n J_n' H_n J_n, with J_n the Jacobian of example n's output in the weights and H_n the
Hessian of its loss in that output (Schraudolph 2002). It is the Hessian of the loss of the network
linearised in its weights. The full Hessian has a second term, sum_n (gradient of the loss in the
output) times (second derivative of the output in the weights). If the loss is convex in the output,
like cross-entropy, G has no negative eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from neural.curvature.examples import EachRow, rows

#: Rows or columns of the examples' Jacobians that are computed together; memory is proportional to
#: them.
JACOBIAN_ROWS = 160


def ggn_product(
    output: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], w: Tensor, v: Tensor
) -> Tensor:
    """Compute G v: forward to the outputs, through the Hessian of the loss, and back.

    Parameters
    ----------
    output : callable
        Maps the weights to an output of any shape.
    loss : callable
        Maps the output to one number.
    w : Tensor, shape (p,)
        The weights at which G is taken.
    v : Tensor, shape (p,)
        The vector.

    Returns
    -------
    Tensor, shape (p,)
    """
    moved = _slope(output, w, v)
    pulled: tuple[Any, ...] = vjp(output, w)
    here, back = pulled
    product: Tensor = back(_bent(loss, here, moved))[0]
    return product


def ggn_matrix(
    output: Callable[[Tensor, Any], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    inputs: Any,
    targets: Tensor,
    *,
    at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Compute the dense matrix G, summed over a batch; for few weights.

    An example takes one backward pass for each entry of its output (10 for an image of ten
    classes), or one forward pass for each weight, whichever are fewer: a window of text has symbols
    times alphabet entries. Besides G, the Jacobians of a few examples are in memory.

    Parameters
    ----------
    output : callable
        (w, inputs) -> outputs, shape (B, ...); an example's output depends on that example alone.
    loss : callable
        (outputs, targets) -> one loss per example, shape (B,).
    w : Tensor, shape (p,)
        The weights at which G is taken.
    inputs, targets
        The batch, examples along the first axis of every tensor (`neural.curvature.examples`).
    at_once : int, optional
        Rows or columns of the Jacobians that are computed together; `JACOBIAN_ROWS` by default.
    progress : callable, optional
        Called with the number of examples done since the last call.

    Returns
    -------
    Tensor of float64, shape (p, p)
    """
    tensors, make = rows((inputs, targets))
    limit = at_once or JACOBIAN_ROWS

    def jacobian_of(*row: Tensor) -> tuple[Tensor, Tensor]:
        """J and H J of one example, shape (entries of the output, p) each."""
        x, y = make([tensor[None] for tensor in row])

        def of_weights(w: Tensor) -> Tensor:
            return output(w, x)[0]

        def of_output(out: Tensor) -> Tensor:
            return loss(out[None], y)[0]

        here = of_weights(w)
        if here.numel() <= len(w):
            jacobian = jacrev(of_weights, chunk_size=limit)(w)
        else:
            units = torch.eye(len(w)).to(w)
            along = partial(_slope, of_weights, w)
            jacobian = vmap(along, out_dims=-1, chunk_size=limit)(units)
        bent = vmap(lambda u: _bent(of_output, here, u), in_dims=-1, out_dims=-1)(jacobian)
        return jacobian.reshape(-1, len(w)), bent.reshape(-1, len(w))

    each = EachRow(jacobian_of)
    with torch.no_grad():
        entries = output(w, make([tensor[:1] for tensor in tensors])[0]).numel()
        count = max(limit // min(entries, len(w)), 1)
        total = w.new_zeros(len(w), len(w), dtype=torch.float64)
        for block in zip(*(torch.split(tensor, count) for tensor in tensors), strict=True):
            jacobian, bent = each(*block)
            total.addmm_(jacobian.flatten(0, 1).double().T, bent.flatten(0, 1).double())
            if progress is not None:
                progress(len(block[0]))
    return (total + total.T).mul_(0.5)


def _slope(output: Callable[[Tensor], Tensor], w: Tensor, v: Tensor) -> Tensor:
    """Differentiate an output along a direction."""
    slope: Tensor = jvp(output, (w,), (v,))[1]
    return slope


def _bent(loss: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    """Multiply the Hessian of a loss in the output by a change of the output."""
    change: Tensor = jvp(grad(loss), (at,), (along,))[1]
    return change

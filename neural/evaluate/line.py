"""Loss and accuracy along the straight line between two sets of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neural.evaluate.state import Loss, Recompute, borrowed, scorer
from nqm.errors import NQMError, check_number

#: Eleven evenly spaced positions.
TENTHS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class Line:
    """Loss and accuracy at positions on a line; arrays have shape (points,).

    Attributes
    ----------
    position : ndarray
        Position on the line: 0 at the start, 1 at the end.
    loss : ndarray
        Loss of the model with the weights at these positions.
    accuracy : ndarray
        Accuracy in [0, 1]; NaN if the loss function returns a loss only.
    """

    position: NDArray[np.float64]
    loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def barrier(self) -> float:
        """Largest excess of the loss over the straight line between its ends, at least 0.

        max_t L(t) - ((1 - t) L(0) + t L(1)) over the measured positions (Entezari et al. 2022).
        """
        chord = (1 - self.position) * self.loss[0] + self.position * self.loss[-1]
        return float((self.loss - chord).max())


def interpolate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], t: float
) -> dict[str, Tensor]:
    """Compute (1 - t) start + t end for every real or complex tensor; exact at t = 0 and t = 1.

    Parameters
    ----------
    start, end : mapping of str to Tensor
        State dicts with the same names and shapes.
    t : float
        Position on the line; values outside [0, 1] extrapolate.

    Returns
    -------
    dict of str to Tensor
        State dict. Tensors of integers (counters) are copied from the nearer end.

    Raises
    ------
    NQMError
        If names or shapes differ, or `t` is not finite.
    """
    check_number("interpolate: t", t)
    _check_alike(start, end, "the end's")
    nearer = start if t < 0.5 else end
    return {
        name: torch.lerp(tensor, end[name].to(tensor), t)
        if tensor.is_floating_point() or tensor.is_complex()
        else nearer[name].clone()
        for name, tensor in start.items()
    }


def loss_line(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    loss: Loss,
    positions: Sequence[float] = TENTHS,
    *,
    buffers: bool = True,
    recompute: Recompute | None = None,
) -> Line:
    """Evaluate `model` with weights on the line from `start` to `end`.

    Parameters
    ----------
    model : Module
        The model. It is restored bit for bit, also after an exception.
    start, end : mapping of str to Tensor
        State dicts of the model, e.g. of a member and of the average.
    loss : batches or callable
        Batches over which cross-entropy is averaged in eval mode, or ``loss(model)`` returning a
        float or a `Score`.
    positions : sequence of float
        Increasing, from 0 to 1.
    buffers : bool
        If True, interpolate buffers (BatchNorm statistics) too; otherwise those of the model are
        used.
    recompute : callable, optional
        ``recompute(model)`` is called before the evaluation at every position, the ends included,
        e.g. to recompute BatchNorm statistics.

    Returns
    -------
    Line

    Raises
    ------
    NQMError
        If the state dicts do not fit, the positions are wrong, or `loss` is an iterator.
    """
    t = np.asarray(positions, dtype=np.float64)
    if t.ndim != 1 or t.size < 2 or t[0] != 0 or t[-1] != 1 or not (np.diff(t) > 0).all():
        raise NQMError(f"loss_line: positions must increase from 0 to 1; got {list(positions)}")
    run, scores = scorer(loss), []
    with borrowed(model) as restore:
        own = model.state_dict()
        _check_alike(own, start, "the start's")
        _check_alike(own, end, "the end's")
        unchanged = set() if buffers else {name for name, _ in model.named_buffers()}
        for position in t:
            restore()
            state = interpolate(start, end, float(position))
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    if name not in unchanged:
                        tensor.copy_(state[name])
            if recompute is not None:
                recompute(model)
            scores.append(run(model))
    return Line(t, np.array([s.loss for s in scores]), np.array([s.accuracy for s in scores]))


def _check_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], whose: str) -> None:
    different = sorted(set(a) ^ set(b)) or [n for n in a if a[n].shape != b[n].shape]
    if different:
        name = different[0]
        shapes = [tuple(s[name].shape) if name in s else "nothing" for s in (a, b)]
        raise NQMError(
            f"loss_line: {whose} {name!r} does not fit: expected {shapes[0]}, got {shapes[1]}; "
            "both ends must be state dicts of the model"
        )

"""Loss scaling of half precision, by `torch.amp.GradScaler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from neural.late_phase.ready import is_recurrent
from nqm.errors import NQMError


def check_scaler(scaler: Any, bases: Sequence[Optimizer]) -> GradScaler | None:
    """Return the scaler, or None if there is none or it is switched off.

    Parameters
    ----------
    scaler : GradScaler or None
        As given by the caller.
    bases : sequence of Optimizer
        Optimizers of the base.

    Returns
    -------
    GradScaler or None

    Raises
    ------
    NQMError
        If it is no scaler, or none is given although the base's optimizer has one (accelerate).
    """
    if scaler is None:
        for base in bases:
            own = getattr(base, "scaler", None)
            if isinstance(own, GradScaler) and own.is_enabled():
                raise NQMError(
                    "base_optimizer unscales gradients in float16, which step has not scaled; give "
                    "step scaler=accelerator.scaler"
                )
        return None
    if not isinstance(scaler, GradScaler):
        raise NQMError(f"scaler must be a torch.amp.GradScaler; got a {type(scaler).__name__}")
    return scaler if scaler.is_enabled() else None


def unscaled_half(dtype: torch.dtype | None, model: nn.Module, device: torch.device) -> str | None:
    """Say why gradients without a scale may vanish in float16, if a pass computes in it.

    Parameters
    ----------
    dtype : dtype or None
        Type of autocast; with None the caller's autocast counts.
    model : Module
        The model.
    device : device
        Where it runs.

    Returns
    -------
    str or None
        One line; None if nothing computes in float16.
    """
    kind = device.type
    if dtype is None and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    lost = "gradients below 6e-8 are lost; give step scaler=torch.amp.GradScaler()"
    if dtype is torch.float16:
        return f"autocast in float16 without a scaler: {lost}"
    if dtype is not torch.bfloat16 or kind != "cuda":
        return None
    if is_recurrent(model):
        return (
            "autocast runs recurrent layers in float16 on a GPU, whatever its type, and without a "
            f"scaler {lost}, or no autocast"
        )
    return None


def unscale(scaler: GradScaler, several: Sequence[Optimizer]) -> bool:
    """Divide the gradients of some optimizers by the scale, and update the scale.

    Parameters
    ----------
    scaler : GradScaler
        The scaler of the losses.
    several : sequence of Optimizer
        Their gradients are changed in place.

    Returns
    -------
    bool
        Whether every gradient is finite; else no step must be taken.

    Raises
    ------
    NQMError
        If weights are in float16: their gradients cannot be unscaled.
    """
    grads = []
    for optimizer in several:
        try:
            scaler.unscale_(optimizer)
        except ValueError as error:
            raise NQMError(
                f"scaler: {error} Hold the weights in float32, and give step autocast=torch.float16"
            ) from None
        for group in optimizer.param_groups:
            grads += [p.grad for p in group["params"] if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    finite = torch.stack([g.isfinite().all() for g in dense]).all()
    scaler.update()
    return bool(finite)

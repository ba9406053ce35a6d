"""Weighted sums of state dicts, of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

#: Sums of half-precision numbers are formed in these.
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def add_weighted(
    terms: Iterable[tuple[float, Mapping[str, Tensor]]], *, double: bool = False
) -> dict[str, Tensor]:
    """Sum of factor times state dict; of whole numbers (counters, indices) the largest.

    Parameters
    ----------
    terms : iterable of (float, state dict)
        At least one; all of one architecture.
    double : bool
        Form sums in double precision; otherwise in the type of the numbers, and of half precision
        in float32.

    Returns
    -------
    dict of str to Tensor
        New tensors, in the types in which sums are formed.
    """
    total: dict[str, Tensor] = {}
    for factor, state in terms:
        for name, value in state.items():
            if not (value.is_floating_point() or value.is_complex()):
                total[name] = torch.maximum(total[name], value) if name in total else value.clone()
                continue
            kind = _WIDER.get(value.dtype, value.dtype)
            wide = value.to(torch.promote_types(kind, torch.float64) if double else kind)
            if name in total:
                total[name].add_(wide, alpha=factor)
            else:
                total[name] = wide * factor
    return total

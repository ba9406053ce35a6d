"""Networks of a few weights, and the data for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neural.models import build

Batches = list[tuple[Tensor, Tensor]]


def net() -> nn.Module:
    """Four numbers to three classes, over LayerNorm."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def batches(count: int = 2) -> Batches:
    """Minibatches for `net`."""
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(count)]


def images(count: int, rows: int = 6) -> Batches:
    """Minibatches of 2 x 6 x 6 numbers in three classes."""
    return [(torch.randn(rows, 2, 6, 6), torch.randint(3, (rows,))) for _ in range(count)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def size(name: str, **options: Any) -> int:
    """Parameters of a model, counted without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, **options).parameters())

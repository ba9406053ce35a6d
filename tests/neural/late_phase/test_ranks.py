"""Late-phase weights beside torch's data parallelism: halves of minibatches, the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from neural import LatePhase
from tests.tiny_runs import together

#: Sums over rows in another order.
SAME = 1e-12
KINDS: dict[str, dict[str, Any]] = {
    "inside": {}, "outside": {}, "mean": {"gamma": "mean"}, "idle": {"idle_steps": "every"},
    "clipped": {}, "clipped idle": {"idle_steps": "first"},
}  # fmt: skip


def train_kind(kind: str, rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(rank if world > 1 else 0)  # ranks that begin apart are made one by torch
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    held = DistributedDataParallel(model) if world > 1 and kind != "outside" else model
    if kind == "outside" and world > 1:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        held = model
    late = LatePhase(held, 2, "norm+head", noise=0.1, **KINDS[kind])
    if kind == "outside" and world > 1:
        DistributedDataParallel(late)
    base = torch.optim.SGD(held.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    own = late.optimizer_like(base)
    draw = torch.Generator().manual_seed(5)
    for count in (2, 2, 1, 2):
        batches = []
        for _ in range(count):
            x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
            y = torch.randint(3, (8,), generator=draw)
            part = slice(rank * 8 // world, (rank + 1) * 8 // world)
            batches.append((x[part], y[part]))
        # Between the smallest and the largest norm of these minibatches.
        norm = 0.6 if kind.startswith("clipped") else None
        late.step(batches, functional.cross_entropy, base, own, clip_norm=norm)
    assert type(late.averaged()) is nn.Sequential
    return [p.detach() for p in (*late.stacked.values(), *model.parameters())]


def train_kinds(rank: int, world: int) -> dict[str, list[list[float]]]:
    weights = {kind: train_kind(kind, rank, world) for kind in KINDS}
    return {kind: [p.flatten().tolist() for p in some] for kind, some in weights.items()}


def test_two_processes_are_one():
    first, second = together(2, train_kinds)
    for kind in KINDS:
        alone = [p.flatten() for p in train_kind(kind, 0, 1)]
        for one, other, expected in zip(first[kind], second[kind], alone, strict=True):
            assert one == other
            torch.testing.assert_close(
                torch.tensor(one, dtype=torch.float64), expected, rtol=SAME, atol=SAME
            )


@pytest.mark.parametrize("fused", [False, True])
def test_data_parallel_on_one_device_passes_through(fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    batches = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(2)]
    plain = LatePhase(model, 2, noise=0.1)
    expected = plain.accumulate(batches, functional.cross_entropy)
    wrapped = LatePhase(nn.DataParallel(model), 2, noise=0.1)
    torch.testing.assert_close(
        wrapped.accumulate(batches, functional.cross_entropy, fused=fused), expected
    )

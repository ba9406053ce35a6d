"""The benchmark of a GPU at full size: its work waits for nothing and fits the card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from meter import CUDA, gpu

from benchmarks.gpu import KINDS, Bench, work

#: Not compiled; the fused members are the quick one.
WORK = [
    pytest.param(kind, marks=() if kind == "fused" else pytest.mark.slow)
    for kind in KINDS
    if "compiled" not in kind
]


@pytest.mark.parametrize("kind", WORK)
def test_work_of_the_benchmark(kind: str) -> None:
    with gpu() as meter:
        run, images = work("resnet20", kind, torch.bfloat16, Bench(CUDA, 1.0, Path()))
        run()
        meter.clear()
        run()
        assert images == 1280
        assert not meter.waits
        assert not meter.layouts
        assert 0 < meter.peak < 20 * 2**30

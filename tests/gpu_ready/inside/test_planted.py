"""The checks see the faults that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from full_size import state
from meter import CUDA, Meter, gpu
from torch import Tensor, nn

from neural.late_phase import members
from neural.training.task import Task


def planted(change: Any) -> Meter:
    """What the meter counts in a step of a small net whose input is changed first."""
    with gpu() as meter:
        train_state = state("cifar10_bn", 'model.name="wrn-10-1"', "late_phase.members=2")
        layers = train_state.model.modules()
        first = next(layer for layer in layers if isinstance(layer, nn.Conv2d))
        batch = next(train_state.task.stream.epoch(0))
        train_state.step([batch])
        first.register_forward_pre_hook(lambda _, args: (change(args[0]),))
        meter.clear()
        train_state.step([batch])
        return meter


def on_host(x: Tensor) -> Tensor:
    return x[torch.arange(len(x))]


def read(x: Tensor) -> Tensor:
    return x * float(x.mean() > 0)


def masked(x: Tensor) -> Tensor:
    x[x < 0] = 0.0
    return x


def plain_layout(x: Tensor) -> Tensor:
    return x.contiguous()


def test_nothing_is_planted() -> None:
    meter = planted(lambda x: x)
    assert not meter.waits
    assert not meter.layouts


@pytest.mark.parametrize(
    ("change", "words"),
    [(on_host, "an index is on the host"), (read, "a number is read"),
     (masked, "a mask is an index")],
)  # fmt: skip
def test_a_wait_is_seen(change: Any, words: str) -> None:
    assert planted(change).waits[words] >= 1


def test_another_layout_is_seen() -> None:
    assert planted(plain_layout).layouts


@pytest.mark.parametrize("fused", ["false", "true"])
def test_another_layout_of_stacked_kernels_is_seen(
    monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    spawn = members._spawn
    monkeypatch.setattr(members, "_spawn", lambda *args: spawn(*args).contiguous())
    changes = ['model.name="wrn-10-1"', "late_phase.members=2", f"late_phase.fused={fused}"]
    with gpu() as meter:
        train_state = state("cifar10_baselines", *changes, arm="late_phase_all")
        batch = next(train_state.task.stream.epoch(0))
        train_state.spawn()
        train_state.step([batch] * 2)
        assert any(name.startswith("weights") for name in meter.layouts)


def test_a_tensor_on_the_host_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="at least two devices"):
        planted(lambda x: x + torch.zeros(1, 3, 1, 1))


def test_a_hidden_float_in_the_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Task.loss
    monkeypatch.setattr(Task, "loss", lambda self, o, y: loss(self, o, y) + 0.0 * float(o.sum()))
    assert planted(lambda x: x).waits["a number is read"] == 1


def test_memory_is_counted_and_freed() -> None:
    with gpu() as meter:
        before = meter.live
        one = torch.zeros(1024, device=CUDA)
        assert meter.live == before + 4096
        view = one[:3]
        del one
        assert meter.live == before + 4096
        del view
        assert meter.live == before
        assert meter.peak >= before + 4096

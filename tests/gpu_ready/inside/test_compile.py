"""Compiled training: one graph before T0, one for all members after it, and no break in them."""

from __future__ import annotations

import pytest
import torch
from torch import _dynamo as dynamo
from torch._dynamo.utils import counters

from neural.training.recipe import load_recipe
from neural.training.state import TrainState
from neural.training.task import Runtime, open_task

SLOW = ["cifar100_rank1", "cifar10_hypernet", "transformer_python_docs"]


@pytest.mark.parametrize(
    "recipe", ["cifar10_bn", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_one_graph_serves_all_members(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(  # only the graphs matter, not how they are run
        torch, "compile", lambda model, **options: compiled(model, backend="eager", **options)
    )
    dynamo.reset()
    counters.clear()
    changes = ["train.compile=true", "late_phase.members=3"]
    run = load_recipe(recipe, "smoke", changes).arms["late_phase"]
    train_state = TrainState(run, open_task(run, Runtime()), Runtime())
    batch = next(train_state.task.stream.epoch(0))
    for _ in range(2):
        train_state.step([batch])
    train_state.spawn()
    for _ in range(2):
        train_state.step([batch] * 3)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]

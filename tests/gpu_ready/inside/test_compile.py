"""Compiled training: one graph before T0, one for all members after it, and no break in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo
from torch._dynamo.utils import counters

from neural.training.recipe import load_recipe
from neural.training.state import TrainState
from neural.training.task import Runtime, open_task

SLOW = ["cifar100_rank1", "cifar10_hypernet", "transformer_python_docs"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    "recipe", ["cifar10_bn", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_one_graph_serves_all_members(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, as at scale gpu."""
    compiled = torch.compile
    monkeypatch.setattr(  # only the graphs matter, not how they are run
        torch, "compile", lambda model, **options: compiled(model, backend="eager", **options)
    )
    changes = ["train.compile=true", "late_phase.members=3", 'train.precision="bfloat16"']
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


def test_a_short_minibatch_leaves_the_graphs_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph for any size, made at the end of the first epoch, would serve all later steps."""
    compiled = torch.compile
    made: list[torch.fx.GraphModule] = []
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        made.append(graph)
        number = len(made) - 1

        def run(*args: Any) -> Any:
            ran.append(number)
            return graph(*args)

        return run

    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compiled(model, backend=backend, **options)
    )
    changes = ["train.compile=true", "late_phase.members=2"]
    run = load_recipe("digits_lora", "smoke", changes).arms["late_phase"]
    train_state = TrainState(run, open_task(run, Runtime()), Runtime())
    x, y = next(train_state.task.stream.epoch(0))
    for rows in (16, 16, 10, 16, 16):
        train_state.step([(x[:rows], y[:rows])])
    assert ran == [0, 0, 1, 0, 0]
    ran.clear()
    train_state.spawn()
    for rows in (16, 10, 16):
        train_state.step([(x[:rows], y[:rows])] * 2)
    assert ran == [2, 2, 3, 3, 2, 2]

"""Stepping some rows of stacked weights, against one optimizer of torch's for each member."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neural.late_phase.member_steps import OWN, step_members
from tests.tolerances import IDENTITY

MEMBERS = 3
SHAPES = ((4,), (2, 3))
#: Members that step, one entry a call: all, some, each alone, the same twice.
CALLS = ([0, 1, 2], [0], [0, 2], [1], [0, 1, 2], [2], [1, 2], [0, 1, 2])
Make = Callable[[Sequence[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, weight_decay=0.02),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.1, weight_decay=0.1),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, betas=(0.5, 0.7), amsgrad=True),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1, centered=True),
}


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def stacked() -> list[nn.Parameter]:
    return [nn.Parameter(normal(i, MEMBERS, *shape)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_rows_move_as_members_with_an_optimizer_each(kind: str) -> None:
    weights = stacked()
    rows = [[nn.Parameter(w[k].detach().clone()) for w in weights] for k in range(MEMBERS)]
    optimizer, own = OPTIMIZERS[kind](weights), [OPTIMIZERS[kind](row) for row in rows]
    for call, chosen in enumerate(CALLS):
        for i, weight in enumerate(weights):
            weight.grad = normal(100 * call + i, *weight.shape)
        before = [weight.detach().clone() for weight in weights]
        step_members(optimizer, weights, chosen)
        for k in range(MEMBERS):
            if k in chosen:
                for weight, row in zip(weights, rows[k], strict=True):
                    assert weight.grad is not None
                    row.grad = weight.grad[k].clone()
                own[k].step()
            for weight, row, old in zip(weights, rows[k], before, strict=True):
                torch.testing.assert_close(weight[k], row, rtol=IDENTITY, atol=IDENTITY)
                assert k in chosen or torch.equal(weight[k], old[k])
        if call == len(CALLS) // 2:  # through a checkpoint
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = OPTIMIZERS[kind](weights)
            optimizer.load_state_dict(state)
    counts = [float(sum(k in chosen for chosen in CALLS)) for k in range(MEMBERS)]
    for weight in weights:
        if "step" in optimizer.state[weight]:
            assert optimizer.state[weight][OWN] == {"step": counts}
        else:
            assert OWN not in optimizer.state[weight]


def test_members_that_step_together_leave_torchs_state_alone() -> None:
    weights = stacked()
    optimizer = OPTIMIZERS["adam"](weights)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        step_members(optimizer, weights, range(MEMBERS))
    for state in optimizer.state.values():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}

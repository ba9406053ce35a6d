"""Step some of K stacked members with one optimizer.

For a stacked weight of shape (K, ...) the state of an optimizer has two kinds of entries:

- tensors of the weight's shape (momentum, Adam's moments): row k belongs to member k;
- single numbers (Adam's count of steps): one for all K members.

To step some members only, `step_members` lets the optimizer step all of them, and then restores the
rows of the other members in the weights and in the optimizer's state.

Single numbers need more. When members have taken different numbers of steps, each has its own
value. These values are stored in the optimizer's state beside torch's entries, under `OWN`::

    optimizer.state[weight]["step"]     # tensor(3.), torch's: of the members stepped last
    optimizer.state[weight]["members"]  # {"step": [3.0, 2.0, 2.0]}, ours: of each member

There the optimizer's `state_dict` saves them. Members with equal values are stepped together, after
the optimizer's number has been set to their value. As long as all members have taken the same
number of steps there is no such entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: Entry of a weight's optimizer state: name of a single number -> its value for each member.
OWN = "members"
_Own = dict[str, list[float]]


def step_members(
    optimizer: Optimizer, weights: Sequence[nn.Parameter], chosen: Sequence[int]
) -> None:
    """Step some members; weights and optimizer state of the others do not change.

    Parameters
    ----------
    optimizer : Optimizer
        Optimizer of `weights`; it must be elementwise.
    weights : sequence of Parameter, shape (K, ...)
        Stacked weights; row k belongs to member k.
    chosen : sequence of int
        Numbers of the members to step, each from 0 to K - 1.
    """
    members = len(weights[0])
    if any(OWN in optimizer.state.get(weight, {}) for weight in weights):
        groups = _equal_numbers(optimizer, weights, chosen)
    elif len(chosen) == members:
        optimizer.step()
        return
    else:
        groups = [list(chosen)]
    for group in groups:
        _step_group(optimizer, weights, group, members)


def _equal_numbers(
    optimizer: Optimizer, weights: Sequence[nn.Parameter], chosen: Sequence[int]
) -> list[list[int]]:
    """Group the chosen members by their single numbers."""
    groups: dict[tuple[float, ...], list[int]] = {}
    owns: list[_Own] = [optimizer.state.get(weight, {}).get(OWN, {}) for weight in weights]
    for k in chosen:
        numbers = tuple(values[k] for own in owns for values in own.values())
        groups.setdefault(numbers, []).append(k)
    return list(groups.values())


def _step_group(
    optimizer: Optimizer, weights: Sequence[nn.Parameter], group: Sequence[int], members: int
) -> None:
    """Step members whose single numbers are equal."""
    others = torch.tensor([k for k in range(members) if k not in group], dtype=torch.long)
    others = others.to(weights[0].device)
    before = []
    for weight in weights:
        state = optimizer.state.get(weight, {})
        single = _single_numbers(state, weight)
        own: _Own = state.get(OWN) or {name: [float(v)] * members for name, v in single.items()}
        for name, value in single.items():
            value.fill_(own[name][group[0]])
        rows = {name: value[others] for name, value in _stacked_state(state, weight).items()}
        before.append((weight.detach()[others], rows, own))
    optimizer.step()
    with torch.no_grad():
        for weight, (old_values, old_rows, own) in zip(weights, before, strict=True):
            state = optimizer.state.get(weight, {})
            weight[others] = old_values
            for name, value in _stacked_state(state, weight).items():
                # Entries that this step has created are zero for members that have not stepped.
                value[others] = old_rows.get(name, 0)
            for name, value in _single_numbers(state, weight).items():
                numbers = own.setdefault(name, [0.0] * members)
                for k in group:
                    numbers[k] = float(value)
            if own:
                state[OWN] = own


def _stacked_state(state: dict[str, Any], weight: nn.Parameter) -> dict[str, Tensor]:
    """Entries of a weight's optimizer state that have a row for every member, (K, ...)."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if value.shape == weight.shape}


def _single_numbers(state: dict[str, Any], weight: nn.Parameter) -> dict[str, Tensor]:
    """Entries of a weight's optimizer state that are one number for all members."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {
        name: value
        for name, value in tensors.items()
        if value.numel() == 1 and value.shape != weight.shape
    }

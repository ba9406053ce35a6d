"""Independent oracle: late-phase weights as the paper's Figure 5 prints them, in plain PyTorch.

Nothing here imports the library. Every member is a deep copy of the whole model with a
`torch.optim` optimizer of its own, whose state is empty at release; the base weights are copied
into a member before its turn. Slow, and free of stacking, indexing and functional calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LiteralLatePhase:
    """K members on top of `model`, whose own optimizer is the base optimizer.

    ``make(copy, names)`` returns the optimizer of one member, on the parameters called `names`.
    `idle` says on which turns idle members take a step with a gradient of zero; a member does so
    only after its first own turn.
    """

    def __init__(
        self,
        model: nn.Module,
        members: int,
        parameters: Collection[str],
        buffers: Collection[str],
        make: Callable[[nn.Module, Collection[str]], Optimizer],
        *,
        gamma: float = 1.0,
        idle: str = "none",
        clip: float | None = None,
    ):
        self.model, self.gamma, self.idle, self.clip = model, gamma, idle, clip
        self.norms: list[float] = []
        self.own, self.own_buffers = set(parameters), set(buffers)
        self.copies = [copy.deepcopy(model) for _ in range(members)]
        self.had_turn: set[int] = set()
        self.optimizers = [make(one, self.own) for one in self.copies]

    def step(
        self,
        batches: Sequence[tuple[Any, Tensor]],
        loss_fn: Callable[[Any, Tensor], Tensor],
        base_optimizer: Optimizer,
    ) -> list[float]:
        """Members 0, 1, ... take their turns; the base steps if every one has had its turn."""
        losses = []
        total = {n: torch.zeros_like(p) for n, p in self._shared(self.model).items()}
        for k, (inputs, targets) in enumerate(batches):
            member = self.copies[k]
            self._hand_over(self.model, member)
            member.zero_grad()
            loss = loss_fn(member(inputs), targets)
            loss.backward()
            losses.append(loss.item())
            if self.clip is not None:  # the whole network of this member, as in plain training
                self.norms.append(float(nn.utils.clip_grad_norm_(member.parameters(), self.clip)))
            for name, parameter in self._shared(member).items():
                total[name] += parameter.grad
            self.optimizers[k].step()
            self.had_turn.add(k)
            self._hand_over(member, self.model, weights=False)
            if self.idle == "every" or (self.idle == "first" and k == 0):
                self._step_idle(k)
        if len(batches) == len(self.copies):
            for name, parameter in self.model.named_parameters():
                parameter.grad = None if name in self.own else self.gamma * total[name]
            base_optimizer.step()
        return losses

    def _step_idle(self, active: int) -> None:
        for k, (member, optimizer) in enumerate(zip(self.copies, self.optimizers, strict=True)):
            # Before its first turn a member's gradients are None, and torch skips it.
            if k != active and k in self.had_turn:
                for name, parameter in member.named_parameters():
                    parameter.grad = torch.zeros_like(parameter) if name in self.own else None
                optimizer.step()

    def _shared(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if n not in self.own}

    def _hand_over(self, source: nn.Module, target: nn.Module, weights: bool = True) -> None:
        """Copy the shared weights, and the shared buffers."""
        with torch.no_grad():
            if weights:
                for name, value in self._shared(source).items():
                    target.get_parameter(name).copy_(value)
            for name, value in source.named_buffers():
                if name not in self.own_buffers:
                    target.get_buffer(name).copy_(value)

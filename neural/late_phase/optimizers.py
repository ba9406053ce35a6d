"""What a step needs of optimizers, found out before anything moves."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nqm.errors import NQMError

#: Optimizers that keep members apart, as seen on a few numbers.
_APART: weakref.WeakSet[Any] = weakref.WeakSet()


def listed(optimizers: Optimizer | Sequence[Optimizer], what: str) -> list[Optimizer]:
    """One optimizer, or several, as a list.

    Raises
    ------
    NQMError
        Where one of them is none, or steps only with a closure, as L-BFGS does.
    """
    several: list[Any] = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    for one in several:
        if not hasattr(one, "param_groups") or not callable(getattr(one, "step", None)):
            raise NQMError(f"{what} must be an optimizer; got {type(one).__name__}")
        # Of the class: a scheduler puts a function of its own in front of `step`.
        _, *given = inspect.signature(type(one).step).parameters.values()
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in given):
            raise NQMError(
                f"{what}: {type(one).__name__} steps with a closure, which evaluates the loss "
                "anew; use an optimizer that steps on given gradients"
            )
    if not several:
        raise NQMError(f"{what} must be an optimizer; got an empty list")
    return several


def parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """What some optimizers work on."""
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper, as accelerate and Lightning put around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_apart(optimizer: Optimizer, members: int) -> None:
    """Whether a member's step depends on its own gradient alone.

    Two steps of a copy of the optimizer on a few numbers of every weight, with two sets of
    gradients that differ in all members but the first: its steps must be the same.

    Raises
    ------
    NQMError
        Where members are mixed, as by Muon and Adafactor, which treat stacked weights as matrices.
    """
    if optimizer in _APART:
        return
    name = type(optimizer).__name__
    try:
        one, other = (_first_member(optimizer, members, seed) for seed in (1, 2))
    except Exception as error:  # of an optimizer that takes no such weights
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(
            f"member_optimizer: {name} cannot be tried on a few numbers ({reason:.100}); use "
            "late.accumulate and step it yourself"
        ) from None
    for a, b in zip(one, other, strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise NQMError(
                f"member_optimizer: {name} mixes members (it does not work on every number by "
                "itself); use SGD, Adam or their kin"
            )
    _APART.add(optimizer)


def _first_member(optimizer: Optimizer, members: int, seed: int) -> list[Tensor]:
    """Member 0's numbers after two steps; the other members' gradients go with the seed."""
    memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}
    inner = unwrapped(optimizer)
    memo[id(inner.state)] = memo[id(optimizer.state)]
    few: list[nn.Parameter] = []
    for p in parameters([inner]):
        shape = (len(p), *(min(size, 3) for size in p.shape[1:]))
        memo[id(p)] = small = nn.Parameter(p.detach().new_full(shape, 0.5))
        few.append(small)
    twin = copy.deepcopy(inner, memo)
    twin._optimizer_step_pre_hooks.clear()
    twin._optimizer_step_post_hooks.clear()
    # A scheduler's own `step` would move the optimizer that this is a copy of.
    vars(twin).pop("step", None)
    own, others = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for _ in range(2):
        for p in few:
            grad = torch.randn(p.shape, generator=others)
            grad[0] = torch.randn(p.shape[1:], generator=own)
            p.grad = grad.to(p)
        twin.step()
    return [p.detach()[0].clone() for p in few]

"""What a step needs of optimizers, found out before anything moves."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nqm.errors import NQMError

#: Optimizers that keep members apart, as seen on a few numbers.
_APART: weakref.WeakSet[Any] = weakref.WeakSet()


def listed(optimizers: Optimizer | Sequence[Optimizer], what: str) -> list[Optimizer]:
    """Return one optimizer or several as a list.

    Parameters
    ----------
    optimizers : Optimizer or sequence of Optimizer
    what : str
        Name of the argument, for the message.

    Returns
    -------
    list of Optimizer

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
    """All parameters of some optimizers.

    Parameters
    ----------
    optimizers : iterable of Optimizer

    Returns
    -------
    list of Tensor
    """
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper of accelerate or Lightning.

    Parameters
    ----------
    optimizer : Optimizer
        An optimizer, wrapped or not.

    Returns
    -------
    Optimizer
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def another(
    base: Optimizer,
    base_weight: Callable[[str], nn.Parameter],
    stacked: Mapping[str, Tensor],
    changes: Mapping[str, Any],
) -> Optimizer:
    """New optimizer on stacked weights, with the parameter groups and settings of the base's.

    Parameters
    ----------
    base : Optimizer
        If it wraps an optimizer, the one inside is taken.
    base_weight : callable
        Name of a weight -> the parameter of the model, which `base` may hold.
    stacked : mapping
        Name -> weights of all members, (K, ...). Those whose parameter `base` does not hold get its
        defaults.
    changes : mapping
        Settings that differ.

    Returns
    -------
    Optimizer
        Of the same class, with empty state.

    Raises
    ------
    NQMError
        If `base` is several optimizers, or none can be made from these settings.
    """
    if isinstance(base, list | tuple):
        raise NQMError(
            "optimizer_like takes one optimizer; make several on late.member_parameters()"
        )
    (base,) = listed(base, "base_optimizer")
    base = unwrapped(base)
    groups: list[dict[str, Any]] = []
    left = dict(stacked)
    for group in base.param_groups:
        held = {id(p) for p in group["params"]}
        names = [name for name in left if id(base_weight(name)) in held]
        if names:
            # What a scheduler notes in a group belongs to its own optimizer.
            other = ("params", "param_names", "initial_lr")
            own = {n: copy.deepcopy(v) for n, v in group.items() if n not in other}
            groups.append({**own, "params": [left.pop(name) for name in names]})
    if left:
        groups.append({**copy.deepcopy(base.defaults), "params": list(left.values())})
    for group in groups:
        group.update(changes)
    make = cast(Callable[..., Optimizer], type(base))
    try:
        return make(groups, **({"lr": groups[0]["lr"]} if "lr" in groups[0] else {}))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(
            f"optimizer_like cannot make another {type(base).__name__} "
            f"({reason:.100}); make it on late.member_parameters()"
        ) from None


def check(
    bases: Sequence[Optimizer],
    member: Optimizer,
    shared: Sequence[nn.Parameter],
    stacked: Sequence[nn.Parameter],
) -> None:
    """Raise NQMError unless the optimizers fit the weights, and members are kept apart.

    Parameters
    ----------
    bases : sequence of Optimizer
        Of the base.
    member : Optimizer
        Of the members.
    shared : sequence of Parameter
        Weights that all members share.
    stacked : sequence of Parameter, shape (K, ...)
        Weights of the members.

    Raises
    ------
    NQMError
        If an optimizer lacks weights, holds weights of another, or mixes members.
    """
    own = {id(p) for p in stacked}
    listed([member], "member_optimizer")
    held = {id(p) for p in parameters([member])}
    if not held or not held <= own:
        raise NQMError(
            "member_optimizer must be made on late.member_parameters(); see optimizer_like"
        )
    check_apart(member, len(stacked[0]))
    base = {id(p) for p in parameters(bases)}
    if own & base:
        raise NQMError("base_optimizer must be made on the model's parameters, not on late's")
    trained = [p for p in shared if p.requires_grad]
    if trained and not any(id(p) in base for p in trained):
        raise NQMError(
            "base_optimizer holds no shared weight of late.model, which would never move; make "
            "it on the parameters of the very model that LatePhase was given"
        )


def check_apart(optimizer: Optimizer, members: int) -> None:
    """Check that a member's step depends on its own gradient alone.

    A copy of the optimizer takes two steps on a few numbers of every weight, with two sets of
    gradients that differ in all members but the first. The first member's steps must be equal.

    Parameters
    ----------
    optimizer : Optimizer
        It does not change.
    members : int
        K.

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

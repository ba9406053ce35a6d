"""Checks of the optimizers of a step, and optimizers of the members."""

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

#: Entry of a parameter group of the members' optimizer that follows the base's: index of the base's
#: group, and ratio of the rates. There the optimizer's `state_dict` saves them.
FOLLOWS = "follows"
#: Optimizers that have passed `check_apart`.
_APART: weakref.WeakSet[Any] = weakref.WeakSet()


def listed(optimizers: Optimizer | Sequence[Optimizer], what: str) -> list[Optimizer]:
    """Return one optimizer or several as a list.

    Parameters
    ----------
    optimizers : Optimizer or sequence of Optimizer
        The optimizers.
    what : str
        Name of the argument, for the message.

    Returns
    -------
    list of Optimizer
        At least one.

    Raises
    ------
    NQMError
        If there is none, if an entry is no optimizer, or if it steps only with a closure, like
        L-BFGS.
    """
    several: list[Any] = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    for optimizer in several:
        name = type(optimizer).__name__
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise NQMError(f"{what} must be an optimizer; got {name}")
        # That of the class: a scheduler replaces the `step` of the object.
        _, *options = inspect.signature(type(optimizer).step).parameters.values()
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in options):
            raise NQMError(
                f"{what}: {name} steps with a closure, which computes the loss again; use an "
                "optimizer that steps with the gradients it finds"
            )
    if not several:
        raise NQMError(f"{what} must be an optimizer; got an empty list")
    return several


def parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """List all parameters of some optimizers.

    Parameters
    ----------
    optimizers : iterable of Optimizer
        The optimizers.

    Returns
    -------
    list of Tensor
        In the order of optimizers and groups.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [p for group in groups for p in group["params"]]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a wrapper of accelerate or Lightning.

    Parameters
    ----------
    optimizer : Optimizer
        An optimizer, wrapped or not.

    Returns
    -------
    Optimizer
        The inner one, or `optimizer` itself if it is no wrapper.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def another(
    base: Optimizer,
    base_weight: Callable[[str], nn.Parameter],
    stacked: Mapping[str, Tensor],
    changes: Mapping[str, Any],
    *,
    follow: bool = False,
) -> Optimizer:
    """Make an optimizer of stacked weights with parameter groups and settings of the base's.

    Parameters
    ----------
    base : Optimizer
        Optimizer of the base. If it wraps an optimizer, the inner one is used.
    base_weight : callable
        Maps the name of a weight to the parameter of the model.
    stacked : mapping of str to Tensor
        Weights of all members by name, (K, ...). If `base` does not have the parameter of the model
        of the same name, its default settings are used.
    changes : mapping of str to object
        Settings that differ.
    follow : bool
        Whether it takes over the other settings of `base` before each of its steps.

    Returns
    -------
    Optimizer
        Of the same class, with empty state.

    Raises
    ------
    NQMError
        If `base` is several optimizers, or none can be made from these settings; with `follow` also
        if `base` lacks a weight, or its rate is 0 and another one is to follow it.
    """
    if isinstance(base, list | tuple):
        raise NQMError(
            "optimizer_like takes one optimizer; make several on late.member_parameters()"
        )
    (base,) = listed(base, "base_optimizer")
    base = unwrapped(base)
    groups: list[dict[str, Any]] = []
    remaining = dict(stacked)
    for index, group in enumerate(base.param_groups):
        in_group = {id(p) for p in group["params"]}
        names = [name for name in remaining if id(base_weight(name)) in in_group]
        if names:
            # A scheduler's entry "initial_lr" belongs to the base optimizer.
            other = ("params", "param_names", "initial_lr")
            own = {n: copy.deepcopy(v) for n, v in group.items() if n not in other}
            if follow:
                own[FOLLOWS] = [index, _ratio(changes.get("lr"), group.get("lr"))]
            groups.append({**own, "params": [remaining.pop(name) for name in names]})
    if remaining and follow:
        raise NQMError(
            f"optimizer_like: base_optimizer does not have {next(iter(remaining))}, so that its "
            "members have no rate to follow; make it on all parameters of the model, or set follow "
            "to False"
        )
    if remaining:
        groups.append({**copy.deepcopy(base.defaults), "params": list(remaining.values())})
    for group in groups:
        group.update(changes)
    make = cast(Callable[..., Optimizer], type(base))
    try:
        own_optimizer = make(groups, **({"lr": groups[0]["lr"]} if "lr" in groups[0] else {}))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(
            f"optimizer_like cannot make another {type(base).__name__} "
            f"({reason:.100}); make it on late.member_parameters()"
        ) from None
    if follow:
        fixed = {*changes, "params", "param_names"} - {"lr"}

        begun = [group[FOLLOWS] for group in groups]

        def take_over(optimizer: Optimizer, *_: Any) -> None:
            _take_over(base, optimizer, fixed, begun)

        own_optimizer.register_step_pre_hook(take_over)
    return own_optimizer


def _ratio(own: Any, base: Any) -> float:
    if own is None or base is None:
        return 1.0
    if not float(base):
        raise NQMError(
            "optimizer_like: lr follows the base's rate in its present ratio, and that rate is 0 "
            "now; make the members' optimizer at another time, or leave lr out"
        )
    return float(own) / float(base)


def _take_over(
    base: Optimizer, own: Optimizer, fixed: set[str], begun: Sequence[list[Any]]
) -> None:
    """Take over the settings that the groups of the base's optimizer have now."""
    for group, first in zip(own.param_groups, begun, strict=True):
        # A state that was saved without `follow` has no such entry.
        index, ratio = group.setdefault(FOLLOWS, first)
        for name, value in base.param_groups[index].items():
            if name in fixed or name not in group:
                continue
            new = value * ratio if name == "lr" else value
            if isinstance(group[name], Tensor):
                group[name].copy_(new)  # in place, as captured steps read it there
            else:
                group[name] = copy.deepcopy(new)


def check(
    bases: Sequence[Optimizer],
    member: Optimizer,
    shared: Sequence[nn.Parameter],
    stacked: Sequence[nn.Parameter],
) -> None:
    """Check that the optimizers have the right weights and do not mix members.

    Parameters
    ----------
    bases : sequence of Optimizer
        Optimizers of the base.
    member : Optimizer
        Optimizer of the members.
    shared : sequence of Parameter
        Weights that all members share.
    stacked : sequence of Parameter, shape (K, ...)
        Weights of the members.

    Raises
    ------
    NQMError
        If an optimizer does not have its weights, has weights of the other, or mixes members.
    """
    for optimizer in (*bases, member):
        # That of accelerate does nothing inside `accumulate` but at its last minibatch.
        state = getattr(optimizer, "gradient_state", None)
        if not getattr(state, "sync_gradients", True):
            raise NQMError(
                "base_optimizer would skip this step; leave accelerator.accumulate out: a cycle "
                "accumulates by itself, and micro_batches cuts its minibatches into pieces"
            )
    check_members(member, stacked)
    own = {id(p) for p in stacked}
    base = {id(p) for p in parameters(bases)}
    if own & base:
        raise NQMError("base_optimizer must be made on the model's parameters, not on late's")
    trained = [p for p in shared if p.requires_grad]
    if trained and not any(id(p) in base for p in trained):
        raise NQMError(
            "base_optimizer holds no shared weight of late.model, so that none would be trained; "
            "make it on the parameters of the very model that LatePhase was given"
        )


def check_members(member: Optimizer, stacked: Sequence[nn.Parameter]) -> None:
    """Check that the members' optimizer has their weights and does not mix them.

    Parameters
    ----------
    member : Optimizer
        Optimizer of the members.
    stacked : sequence of Parameter, shape (K, ...)
        Weights of the members.

    Raises
    ------
    NQMError
        If it has other weights, or mixes members.
    """
    listed([member], "member_optimizer")
    stepped = {id(p) for p in parameters([member])}
    if not stepped or not stepped <= {id(p) for p in stacked}:
        raise NQMError(
            "member_optimizer must be made on late.member_parameters(); see optimizer_like"
        )
    check_apart(member, len(stacked[0]))


def check_apart(optimizer: Optimizer, members: int) -> None:
    """Check that a member's step depends on its own gradient only.

    A copy of the optimizer takes two steps on a few numbers of every weight, with two sets of
    gradients that are equal for the first member only. The first member's steps must be equal.

    Parameters
    ----------
    optimizer : Optimizer
        The optimizer; it is not changed.
    members : int
        Number of members, K.

    Raises
    ------
    NQMError
        If members are mixed, e.g. by Muon and Adafactor, which treat stacked weights as matrices,
        or if the copy cannot take the steps.
    """
    if optimizer in _APART:
        return
    name = type(optimizer).__name__
    try:
        first, second = (_first_member(optimizer, members, seed) for seed in (1, 2))
    except Exception as error:  # an optimizer may refuse weights of such shapes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(
            f"member_optimizer: {name} cannot be tried on a few numbers ({reason:.100}); use "
            "late.accumulate and step it yourself"
        ) from None
    for a, b in zip(first, second, strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise NQMError(
                f"member_optimizer: {name} mixes members, as it is not elementwise; use SGD, Adam "
                "or a similar optimizer"
            )
    _APART.add(optimizer)


def _first_member(optimizer: Optimizer, members: int, seed: int) -> list[Tensor]:
    """Member 0's numbers after two steps; the other members' gradients depend on the seed."""
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
    # A `step` that a scheduler has put there would step the original optimizer.
    vars(twin).pop("step", None)
    own, others = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for _ in range(2):
        for p in few:
            grad = torch.randn(p.shape, generator=others)
            grad[0] = torch.randn(p.shape[1:], generator=own)
            p.grad = grad.to(p)
        twin.step()
    return [p.detach()[0].clone() for p in few]

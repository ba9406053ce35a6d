"""Optimizers that a step cannot use are told before anything moves; the others do as alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn import functional

from neural import LatePhase
from nqm import NQMError
from tests.tiny_nets import batches, net
from tests.tolerances import IDENTITY, agree

Make = Callable[[Any], optim.Optimizer]


pytestmark = pytest.mark.usefixtures("double")


def refuses(late: LatePhase, base: Any, own: Any, message: str) -> None:
    """One line, and no weight has moved."""
    before = copy.deepcopy(late.state_dict())
    with pytest.raises(NQMError, match=message) as caught:
        late.step(batches(), functional.cross_entropy, base, own)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in late.state_dict().items())


def sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1)


def test_optimizers_that_need_a_closure():
    model = net()
    late = LatePhase(model, 2, "norm")
    for base, own, which in (
        (optim.LBFGS(model.parameters()), sgd(late.member_parameters()), "base"),
        (sgd(model.parameters()), optim.LBFGS(late.member_parameters()), "member"),
    ):
        refuses(late, base, own, f"{which}_optimizer: LBFGS steps with a closure")
    with pytest.raises(NQMError, match="LBFGS steps with a closure"):
        late.optimizer_like(optim.LBFGS(model.parameters()))
    refuses(late, model, sgd(late.member_parameters()), "base_optimizer must be an optimizer; got")
    refuses(late, [], sgd(late.member_parameters()), "got an empty list")


class Norms(optim.Optimizer):
    """Divides a gradient by its norm, of all members together if it is given them stacked."""

    def __init__(self, parameters: Any, lr: float = 0.1):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad / p.grad.norm())


class Later(optim.Optimizer):
    """Mixes members from the second step on."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                last = self.state[p].setdefault("last", torch.zeros_like(p))
                p.data.sub_(0.1 * (p.grad + last.mean()))
                last.copy_(p.grad)


MIXING: dict[str, Make] = {
    "Muon": lambda p: optim.Muon(p, lr=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "Norms": Norms,
    "Later": Later,
}


@pytest.mark.parametrize("name", list(MIXING))
def test_optimizers_that_mix_members(name):
    model = net()
    late = LatePhase(model, 2, "norm")
    own = MIXING[name](late.member_parameters())
    refuses(late, sgd(model.parameters()), own, f"member_optimizer: {name} mixes members")


APART: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": optim.Adagrad, "Adadelta": optim.Adadelta, "Adamax": optim.Adamax,
    "NAdam": optim.NAdam, "RAdam": optim.RAdam, "Rprop": optim.Rprop, "ASGD": optim.ASGD,
}  # fmt: skip


@pytest.mark.parametrize("name", list(APART))
def test_the_trial_of_an_optimizer_leaves_it_as_it_was(name):
    """Against one that has never been tried; schedulers and hooks see the real steps alone."""
    model, seen = net(), []
    late = LatePhase(model, 2, "norm+head", noise=0.1)
    own = APART[name](late.member_parameters())
    twins = [nn.Parameter(p.detach().clone()) for p in late.member_parameters()]
    plain = APART[name](twins)
    own.register_step_pre_hook(lambda *_: seen.append(len(seen)))
    schedule = optim.lr_scheduler.StepLR(own, 1, 0.5)
    base = optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(3)
    for count in (1, 2):
        late.step(batches(), functional.cross_entropy, base, own)
        for p, q in zip(late.member_parameters(), twins, strict=True):
            q.grad = p.grad
        plain.step()
        for group in plain.param_groups:
            group["lr"] = group["lr"] * 0.5
        schedule.step()
        assert len(seen) == count
        for p, q in zip(late.member_parameters(), twins, strict=True):
            agree(p.detach(), q.detach(), IDENTITY)


def test_an_optimizer_of_another_model():
    """A base that holds none of the shared weights would leave them where they are, for ever."""
    late = LatePhase(net(), 2, "norm")
    own = sgd(late.member_parameters())
    refuses(late, sgd(net().parameters()), own, "base_optimizer holds no shared weight")
    only = sgd(late.model[1].parameters())  # the selected ones, whose places are taken
    refuses(late, only, own, "base_optimizer holds no shared weight")
    model = late.model
    late.load_state_dict(copy.deepcopy(late.state_dict()), assign=True)
    refuses(late, sgd(model.parameters()), own, "member_optimizer must be made on late")
    frozen = net().requires_grad_(False)
    frozen[1].requires_grad_(True)
    late = LatePhase(frozen, 2, "norm")  # nothing is shared and trained
    late.step(batches(), functional.cross_entropy, sgd(frozen[1].parameters()),
              sgd(late.member_parameters()))  # fmt: skip


def test_several_base_optimizers_are_one_with_groups():
    model = net()
    late, twin = (LatePhase(copy.deepcopy(model), 2, "norm+head") for _ in range(2))
    parts = [late.model[0].weight], [late.model[0].bias]
    bases = [optim.SGD(parts[0], lr=0.1, momentum=0.9), optim.Adam(parts[1], lr=0.02)]
    other = [
        optim.SGD([twin.model[0].weight], lr=0.1, momentum=0.9),
        optim.Adam([twin.model[0].bias], lr=0.02),
    ]
    owns = sgd(late.member_parameters()), sgd(twin.member_parameters())
    for _ in range(2):
        cycle = batches()
        late.step(cycle, functional.cross_entropy, bases, owns[0])
        twin.accumulate(cycle, functional.cross_entropy)
        for one in (owns[1], *other):
            one.step()
    for p, q in zip(late.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(NQMError, match="optimizer_like takes one optimizer"):
        late.optimizer_like(bases)


class Wrapper(optim.Optimizer):
    """Steps an optimizer inside, as libraries for several devices do."""

    def __init__(self, optimizer: optim.Optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class Sharp(optim.Optimizer):
    """Its constructor wants more than groups and a rate."""

    def __init__(self, parameters: Any, inner: Any, rho: float = 0.05):
        super().__init__(parameters, {"rho": rho})

    def step(self, closure: Any = None) -> None:
        raise AssertionError


def test_members_optimizers_like_those_of_a_wrapper():
    model = net()
    late = LatePhase(model, 2, "norm")
    own = late.optimizer_like(Wrapper(optim.SGD(model.parameters(), lr=0.3, momentum=0.9)))
    assert type(own) is optim.SGD
    assert (own.param_groups[0]["lr"], own.param_groups[0]["momentum"]) == (0.3, 0.9)
    wrapped = Wrapper(sgd(late.member_parameters()))
    before = [p.detach().clone() for p in late.member_parameters()]
    late.step(batches(), functional.cross_entropy, Wrapper(sgd(model.parameters())), wrapped)
    moved = zip(before, late.member_parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in moved)
    with pytest.raises(NQMError, match=r"cannot make another Sharp .*; make it on late\."):
        late.optimizer_like(Sharp(model.parameters(), sgd))
    late = LatePhase(model, 2, "head")
    with pytest.raises(NQMError, match="cannot make another Muon"):
        late.optimizer_like(optim.Muon([model[0].weight], lr=0.1))

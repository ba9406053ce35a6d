"""The published training of CIFAR and ImageNet, from its description, beside ours in float64.

Written from what the official repository does (seijin-kobayashi/late-phase-weights, torch 1.4):
gradients are set to zero and not to None, so that optimizers step on them; here with plain tensors,
`torch.autograd.grad` and SGD spelled out. Nothing of the library is used on that side.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neural import LatePhase
from tests.tiny_nets import Batches, images, state_of
from tests.tolerances import IDENTITY, agree

Weights = dict[str, Tensor]
NORM, HEAD = ("1.weight", "1.bias", "4.weight", "4.bias"), ("7.weight", "7.bias")
STATISTICS = tuple(f"{i}.running_{n}" for i in (1, 4) for n in ("mean", "var"))


pytestmark = pytest.mark.usefixtures("double")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def forward(w: Weights, x: Tensor, training: bool = True) -> Tensor:
    """The network written out; running statistics in `w` are updated in place."""
    for conv, norm in (("0", "1"), ("3", "4")):
        x = functional.conv2d(x, w[f"{conv}.weight"])
        mean, var = w[f"{norm}.running_mean"], w[f"{norm}.running_var"]
        x = functional.batch_norm(x, mean, var, w[f"{norm}.weight"], w[f"{norm}.bias"], training)
        x = x.relu()
    return functional.linear(x.flatten(1), w["7.weight"], w["7.bias"])


def slopes(w: Weights, names: Sequence[str], x: Tensor, y: Tensor) -> Weights:
    """Gradient of a minibatch's mean loss with respect to some weights."""
    own = {name: w[name].clone().requires_grad_() for name in names}
    loss = functional.cross_entropy(forward(w | own, x), y)
    return dict(zip(names, torch.autograd.grad(loss, list(own.values())), strict=True))


def sgd_step(
    w: Weights, gradient: Weights, buffers: Weights, lr: float, decay: float, nesterov: bool
) -> None:
    """SGD with momentum 0.9 as torch has it: the first buffer is the gradient itself."""
    for name, slope in gradient.items():
        d = slope + decay * w[name]
        buffers[name] = 0.9 * buffers[name] + d if name in buffers else d
        w[name] = w[name] - lr * (d + 0.9 * buffers[name] if nesterov else buffers[name])


def zeros(w: Weights, names: Sequence[str]) -> Weights:
    return {name: torch.zeros_like(w[name]) for name in names}


def check(late: LatePhase, base: Weights, members: list[Weights], shared: Sequence[str]) -> None:
    for name in shared:
        agree(late.model.state_dict()[name], base[name], IDENTITY)
    own = late._weights() | late._statistics()
    for name in (*late.selection.parameters, *STATISTICS):
        for k, member in enumerate(members):
            agree(own[name][k].detach(), member[name], IDENTITY)


# ------------------------------------------------------------------ CIFAR

K, EPOCHS, RELEASE, PER_EPOCH = 3, 5, 2, 7
DECAY = 5e-4


def cifar_lr(epoch: int) -> float:
    """0.1, linear from epoch 1 on to 0.01 at epoch 4, then flat; a step per epoch."""
    return 0.1 * (1.0 - 0.9 * min(max(epoch - 1, 0) / 3, 1.0))


class Cifar:
    """BatchNorm and head in K copies from `RELEASE` on, each with an optimizer of its own.

    The base steps after member K - 1, on the sum of the members' gradients; the counter of members
    restarts with every epoch, and what the base has gathered by then is thrown away. On member 0's
    turn all member optimizers step, those of idle members on zeros.
    """

    def __init__(self, model: nn.Module, member_decay: float):
        self.base = state_of(model)
        self.buffers: Weights = {}
        self.shared = ("0.weight", "3.weight")
        self.own = (*NORM, *HEAD)
        self.decay = member_decay
        self.members: list[Weights] = []

    def epoch(self, number: int, data: Batches) -> None:
        lr = cifar_lr(number)
        if number < RELEASE:
            for x, y in data:
                gradient = slopes(self.base, (*self.shared, *self.own), x, y)
                sgd_step(self.base, gradient, self.buffers, lr, DECAY, nesterov=True)
            return
        if not self.members:
            self.members = [{n: v.clone() for n, v in self.base.items()} for _ in range(K)]
            self.moments: list[Weights] = [{} for _ in range(K)]
            self.gradients: list[Weights | None] = [None] * K
        total = zeros(self.base, self.shared)
        for i, (x, y) in enumerate(data):
            k = i % K
            member = self.members[k]
            member.update({name: self.base[name] for name in self.shared})
            gradient = slopes(member, (*self.shared, *self.own), x, y)
            self.gradients[k] = {name: gradient[name] for name in self.own}
            for name in self.shared:
                total[name] = total[name] + gradient[name]
            for j in range(K) if k == 0 else [k]:
                held = self.gradients[j]
                if held is not None:  # torch leaves alone what has no gradient yet
                    sgd_step(self.members[j], held, self.moments[j], lr, self.decay, nesterov=True)
                    self.gradients[j] = zeros(member, self.own)
            if k == K - 1:
                sgd_step(self.base, total, self.buffers, lr, DECAY, nesterov=True)
                total = zeros(self.base, self.shared)

    def predict(self, x: Tensor) -> Tensor:
        """The outputs of the K copies averaged inside every layer, in evaluation mode."""
        for conv, norm in (("0", "1"), ("3", "4")):
            x = functional.conv2d(x, self.base[f"{conv}.weight"])
            x = self._mean(lambda m, x=x, norm=norm: functional.batch_norm(
                x, m[f"{norm}.running_mean"], m[f"{norm}.running_var"], m[f"{norm}.weight"],
                m[f"{norm}.bias"])).relu()  # fmt: skip
        x = x.flatten(1)
        return self._mean(lambda m: functional.linear(x, m["7.weight"], m["7.bias"]))

    def _mean(self, layer: object) -> Tensor:
        return sum(layer(member) for member in self.members) / K  # type: ignore[operator]


@pytest.mark.parametrize("member_decay", [5e-4, 5e-3])
def test_cifar(member_decay):
    """5e-3 is the published configuration of CIFAR-100 without SWA, 5e-4 the others'."""
    model = network()
    official = Cifar(model, member_decay)
    base = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=DECAY, nesterov=True
    )
    late = own = None
    for epoch in range(EPOCHS):
        data = images(PER_EPOCH, rows=8)
        official.epoch(epoch, data)
        if epoch == RELEASE:
            late = LatePhase(model, K, "batchnorm+head", idle_steps="first", leftover="members")
            own = late.optimizer_like(base, weight_decay=member_decay)
        for optimizer in (base, own):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = cifar_lr(epoch)
        if late is None:
            for x, y in data:
                base.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                base.step()
            continue
        for cycle in late.cycles(data):
            late.step(cycle, functional.cross_entropy, base, own)
        check(late, official.base, official.members, official.shared)
    x = images(1, rows=8)[0][0]
    single = late.averaged(batchnorm="outputs").eval()
    agree(single(x).detach(), official.predict(x), IDENTITY)
    apart = [m["1.weight"] for m in official.members]
    assert not torch.equal(apart[0], apart[1])


# ------------------------------------------------------------------ ImageNet

SPLIT, LR, WEIGHT_DECAY = 2, 0.01, 1e-2  # the published decay, 1e-4, would show less


@pytest.mark.parametrize("idle_matters", [False, True])
def test_imagenet(idle_matters):
    """BatchNorm in K copies, all of them in one SGD object that steps on every minibatch.

    A minibatch is run in two halves whose gradients are summed; the rates are lr / split for the
    members and lr / (split K) for the base, on sums. SGD multiplies its decay with the rate, too:
    on mean gradients it is decay / split and decay / (split K), 5e-5 and 5e-6 for 1e-4 and K = 10.
    """
    model = network()
    base_weights, shared = state_of(model), ("0.weight", "3.weight", *HEAD)
    members = [{n: v.clone() for n, v in base_weights.items()} for _ in range(K)]
    base_buffers: Weights = {}
    moments: list[Weights] = [{} for _ in range(K)]
    gradients: list[Weights | None] = [None] * K

    late = LatePhase(
        model, K, "batchnorm", gamma="mean", idle_steps="every" if idle_matters else "none"
    )
    base = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY / (SPLIT * K)
    )
    own = late.optimizer_like(base, weight_decay=WEIGHT_DECAY / SPLIT)

    for cycle in range(6):
        base_lr = LR if cycle < 3 else 0.1 * LR  # of the base alone
        base.param_groups[0]["lr"] = base_lr
        data = images(K, rows=8)
        total = zeros(base_weights, shared)
        for k, (x, y) in enumerate(data):
            member = members[k]
            member.update({name: base_weights[name] for name in shared})
            held = zeros(member, NORM)
            for half in (slice(4), slice(4, 8)):
                gradient = slopes(member, (*shared, *NORM), x[half], y[half])
                held = {name: held[name] + gradient[name] for name in NORM}
                total = {name: total[name] + gradient[name] for name in shared}
            gradients[k] = held
            for j in range(K) if idle_matters else [k]:
                slope = gradients[j]
                if slope is not None:
                    sgd_step(members[j], slope, moments[j], LR / SPLIT, WEIGHT_DECAY, False)
                    gradients[j] = zeros(member, NORM)
        sgd_step(base_weights, total, base_buffers, base_lr / (SPLIT * K), WEIGHT_DECAY, False)
        late.step(data, functional.cross_entropy, base, own, micro_batches=SPLIT)
        check(late, base_weights, members, shared)

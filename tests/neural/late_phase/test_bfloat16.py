"""Gradients in bfloat16 autocast lie from those of float32 by what rounding explains, not more.

A number that is rounded to eight bits moves by up to half a unit in the last place, evenly
distributed. With mantissas m distributed as 1 / m, its relative change has the root mean square
``2^-8 sqrt(E[1 / m^2] / 3)`` with ``E[1 / m^2] = 3 / (8 ln 2)``. The reference is the same net in
float32 with a random relative change of that size on every tensor that autocast rounds, forwards
and backwards.
"""

from __future__ import annotations

import copy
from math import log, sqrt
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from neural import LatePhase  # noqa: E402

#: Root mean square of the relative change of a number that is rounded to bfloat16.
CHANGE = 2.0**-8 * sqrt(3.0 / (8.0 * log(2.0)) / 3.0)
#: Ratio of the lengths of two random vectors, of whose entries a few large ones dominate: within
#: 1.25 for four nets on three kinds of processors.
FACTOR = 1.5


class Rounded(torch.autograd.Function):
    """Random changes, as rounding makes them, of a tensor and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        ctx.generator = generator
        return x * (1.0 + CHANGE * torch.randn(x.shape, generator=generator))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * (1.0 + CHANGE * torch.randn(grad.shape, generator=ctx.generator)), None


class Net(nn.Module):
    """Two convolutions with BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, 16, 3, padding=1, bias=False) for width in (1, 16)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.head = nn.Linear(16, 10)
        self.generator: torch.Generator | None = None

    def rounded(self, x: Tensor) -> Tensor:
        return x if self.generator is None else Rounded.apply(x, self.generator)

    def forward(self, x: Tensor) -> Tensor:
        r = self.rounded
        x = r(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = r(norm(r(functional.conv2d(x, r(conv.weight), padding=1)))).relu()
        return r(functional.linear(r(x.mean((2, 3))), r(self.head.weight), r(self.head.bias)))


def gradients(
    net: Net, data: Any, autocast: torch.dtype | None = None, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolutions, and (members, weights) of the members' own weights."""
    net = copy.deepcopy(net)
    if seed is not None:
        net.generator = torch.Generator().manual_seed(seed)
    late = LatePhase(net, 2, "batchnorm+head", noise=0.1, seed=3).train()
    late.accumulate(data, lambda o, y: functional.cross_entropy(o.float(), y), autocast=autocast)
    base = [p.grad.flatten() for name, p in net.named_parameters() if name.startswith("convs")]
    return torch.cat(base), torch.cat([p.grad.flatten(1) for p in late.member_parameters()], 1)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_gradients_lie_as_far_apart_as_rounding_explains() -> None:
    torch.set_default_dtype(torch.float32)
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        net = Net()
        data = [(torch.randn(64, 1, 8, 8), torch.randint(10, (64,))) for _ in range(2)]
        exact = gradients(net, data)
        low, changed = gradients(net, data, torch.bfloat16), gradients(net, data, seed=seed)
        # base, and both members by themselves
        for index in (slice(None), 0, 1):
            part = 0 if index == slice(None) else 1
            gap = distance(low[part][index], exact[part][index])
            ratios.append(gap / distance(changed[part][index], exact[part][index]))
    assert min(ratios) > 1.0 / FACTOR  # it does compute in bfloat16
    assert max(ratios) < FACTOR

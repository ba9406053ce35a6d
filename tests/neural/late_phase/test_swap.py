"""Other tensors in a model's places: wherever they are used, and nothing is lost afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neural import LatePhase, ema, recompute_statistics, swa
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.swap import call, places, swapped
from tests.tolerances import IDENTITY, agree

pytestmark = pytest.mark.usefixtures("double")


class Plain(nn.Module):
    """Two of its layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 4)
        self.head, self.extra = nn.Linear(4, 3), nn.Linear(4, 3)
        self.extra.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.tanh(self.norm(self.first(x))))
        return self.head(x) + torch.tanh(self.extra(x))


class Twice(Plain):
    """The same layers, registered once more in a block and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.first, self.norm, nn.Tanh())
        self.layers = nn.ModuleList([self.head, self.block])


def pair() -> tuple[Plain, Twice]:
    plain, twice = Plain(), Twice()
    own = plain.state_dict()
    twice.load_state_dict({**twice.state_dict(), **own})
    return plain, twice


def data(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(7, 4), torch.randint(3, (7,))) for _ in range(count)]


def held(model: nn.Module) -> list[tuple[str, int]]:
    return [
        (f"{path}.{name}", id(tensor))
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    ]


@pytest.mark.parametrize("select", ["batchnorm+head", "all"])
@pytest.mark.parametrize("fused", [False, True])
def test_training_with_modules_under_two_names_is_that_under_one(select, fused):
    """A model that registers its layers once does the same, by the same numbers."""
    lates = [LatePhase(model, 2, select, noise=0.3, seed=1) for model in pair()]
    batches = data()
    seen = []
    for late in lates:
        before = held(late.model)
        base = torch.optim.SGD(late.model.parameters(), lr=0.1, momentum=0.9)
        own = late.optimizer_like(base)
        losses = [
            late.step(cycle, functional.cross_entropy, base, own, fused=fused)
            for cycle in late.cycles(batches)
        ]
        assert held(late.model) == before
        with torch.no_grad():
            late.eval()(batches[0][0], member=1)
        assert held(late.model) == before
        single = late.averaged()
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in single.parameters())
        seen.append((torch.stack(losses), single))
    agree(seen[1][0], seen[0][0], IDENTITY)
    ours = seen[1][1].state_dict()
    for name, value in seen[0][1].state_dict().items():
        agree(ours[name], value, IDENTITY)


def test_everything_else_works_with_modules_under_two_names():
    plain, twice = (LatePhase(model, 2, "batchnorm+head", noise=0.3, seed=1) for model in pair())
    batches = data()
    for late in (plain, twice):
        late(batches[0][0], member=0)
        recompute_statistics(late, batches)
        average = ema(late, 0.5)
        average.update_parameters(late)
        swa(late).update_parameters(late)
    for k in range(2):
        x = batches[0][0]
        agree(twice.eval().member(k)(x).detach(), plain.eval().member(k)(x).detach(), IDENTITY)
        agree(copy.deepcopy(twice)(x, member=k).detach(), plain(x, member=k).detach(), IDENTITY)


def test_a_landscape_of_a_model_with_modules_under_two_names():
    """Against torch's own backward pass of the model itself."""
    _, model = pair()
    batches, before = data(2), held(model)
    risk = EmpiricalRisk(model, batches, "batchnorm+head")
    slope = risk.gradient()
    assert held(model) == before
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    functional.cross_entropy(model(x), y).backward()
    expected = [model.get_parameter(name).grad.flatten() for name in risk.shapes]
    agree(slope, torch.cat(expected), IDENTITY)


def test_a_tensor_goes_into_every_place_once():
    _, model = pair()
    where = places(model, ["head.weight", "norm.running_mean"])
    assert [(type(module), own) for module, own in where["head.weight"]] == [
        (nn.Linear, "weight"), (nn.Linear, "weight")
    ]  # fmt: skip
    assert where["norm.running_mean"] == ((model.norm, "running_mean"),)
    assert places(model, ["layers.1.1.weight"])["layers.1.1.weight"] == ((model.norm, "weight"),)
    value = torch.zeros(3, 4)
    with swapped(where, {"head.weight": value}):
        assert model.head.weight is value
        assert model.extra.weight is value
    with pytest.raises(RuntimeError):  # of a forward pass that fails
        call(model, where, {"head.weight": value}, (torch.ones(2, 9),))
    assert model.head.weight is model.extra.weight
    assert isinstance(model.head.weight, nn.Parameter)


class Counting(nn.Module):
    """Writes a new tensor over its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + x.sum()
        return self.count


def test_a_buffer_that_is_replaced_is_handed_over():
    model = Counting()
    state = {"count": torch.tensor(5.0)}
    with swapped(places(model, ["count"]), state):
        model(torch.ones(2))
    assert (float(state["count"]), float(model.count)) == (7.0, 0.0)
    kept = {"count": torch.tensor(1.0)}
    assert float(call(model, places(model, ["count"]), kept, (torch.ones(1),))) == 2.0
    assert float(kept["count"]) == 1.0

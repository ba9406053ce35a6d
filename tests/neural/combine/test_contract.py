"""Laws that every rule of the roster keeps."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from neural.combine import Members, merge
from neural.combine.data import Parts
from neural.combine.pool import POOLS
from neural.combine.repair import REPAIRS
from neural.combine.rules import RULES, Linear
from neural.combine.weigh import WEIGHTS
from nqm import NQMError

State = dict[str, Tensor]


class Net(nn.Module):
    """Convolution, BatchNorm, a tied weight, a counter and a mask: all kinds of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        x = self.tied(self.inner(x).tanh())
        return self.head(x)


def data(seed: int = 0, count: int = 12) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(count, 2, 5, 5, generator=g), torch.randint(3, (count,), generator=g))
        for _ in range(2)
    ]


PARTS = Parts(test=lambda: data(1), train=lambda: data(2), held_out=lambda: data(3))


def states(count: int) -> list[State]:
    """Members a little apart from a common start, the last state dict returned being the start."""
    torch.manual_seed(0)
    start = Net()
    start(data(4)[0][0])  # statistics that are not those of the beginning
    made = []
    for k in range(count):
        torch.manual_seed(k + 1)
        one = copy.deepcopy(start)
        with torch.no_grad():
            for p in one.parameters():
                p.add_(0.1 * torch.randn_like(p))
        one(data(5 + k)[0][0])
        made.append(one.state_dict())
    return [*made, start.state_dict()]


def members(count: int = 3) -> Members:
    *held, start = states(count)
    return Members.of_states(Net(), held, ancestor=start)


@pytest.mark.parametrize("name", [name for name in RULES if name != "task_arithmetic"])
def test_one_member_comes_back_bit_for_bit(name: str) -> None:
    held = members(1)
    merged = RULES[name](held, PARTS).state
    for key, value in held.state(0).items():
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("name", [name for name in RULES if name != "task_arithmetic"])
def test_equal_members_give_themselves(name: str) -> None:
    one, _, start = states(2)
    held = Members.of_states(Net(), {"a": one, "b": one, "c": one}, ancestor=start)
    merged = RULES[name](held, PARTS).state
    # Stock of equal displacements has cosine 1; a decaying rate of AME only reaches the members.
    room = {"ame_adagrad": 1e-2, "ame_adam": 1e-2}.get(name, 1e-6)
    for key in dict(Net().named_parameters()):
        torch.testing.assert_close(merged[key], one[key], rtol=room, atol=room)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.ordered])
def test_the_order_of_members_does_not_matter(name: str) -> None:
    *held, start = states(3)
    results = [
        RULES[name](Members.of_states(Net(), [held[i] for i in order], ancestor=start), PARTS).state
        for order in permutations(range(3))
    ]
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_merged_models_load_strictly_and_keep_counters(name: str) -> None:
    held = members()
    merged = RULES[name](held, PARTS).state
    Net().load_state_dict(merged, strict=True)
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    assert int(merged["norm.num_batches_tracked"]) == 2
    assert torch.equal(merged["mask"], Net().mask)
    assert torch.equal(merged["tied.weight"], merged["inner.weight"])
    assert all(bool(merged[key].isfinite().all()) for key in merged if key != "mask")


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_needs_is_asked_for(name: str) -> None:
    rule = RULES[name]
    *held, _ = states(2)
    bare = Members.of_states(Net(), held)
    nothing = Parts(test=lambda: data(1))
    if rule.needs:
        with pytest.raises(NQMError, match="needs") as error:
            rule(bare, nothing)
        assert "\n" not in str(error.value)
    else:
        rule(bare, nothing)


def test_the_streaming_mean_is_that_of_the_stack() -> None:
    held = members(4)
    weights = [0.4, -0.1, 0.5, 0.2]
    merged = Linear()(held, PARTS).state
    given = merge(held, weights=weights).state_dict()
    for name in dict(Net().named_parameters()):
        stacked = torch.stack([held.state(i)[name].double() for i in range(4)])
        torch.testing.assert_close(merged[name].double(), stacked.mean(0), rtol=1e-6, atol=1e-7)
        mean = torch.tensordot(torch.tensor(weights, dtype=torch.float64), stacked, 1)
        torch.testing.assert_close(given[name].double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_single(half: torch.dtype) -> None:
    """Sums of half-precision numbers would stop growing; the mean of 4097 ones is one."""
    model = nn.Linear(1, 1, bias=False).to(half)
    ones = [{"weight": torch.ones(1, 1, dtype=half)}] * 4097
    merged = merge(Members.of_states(model, ones)).state_dict()
    assert merged["weight"].dtype == half
    assert float(merged["weight"]) == 1.0


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_predictions_are_shares(name: str) -> None:
    weights = WEIGHTS[name](members(), PARTS)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(weights.min()) >= 0.0


@pytest.mark.parametrize("name", POOLS)
def test_pools_of_equal_rows_and_of_one(name: str) -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    third = torch.full((3,), 1.0 / 3.0, dtype=torch.float64)
    torch.testing.assert_close(POOLS[name]([rows] * 3, third), rows.double(), rtol=1e-6, atol=1e-6)
    one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    pooled = POOLS[name]([rows + 1.0, rows], one)
    torch.testing.assert_close(pooled, rows.double().log_softmax(1), rtol=1e-12, atol=1e-12)


def test_pools_are_the_means_that_they_name() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 6, 4, generator=g, dtype=torch.float64).log_softmax(-1)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mixture = torch.einsum("k,knc->nc", weights, rows.exp())
    torch.testing.assert_close(POOLS["probabilities"](rows, weights).exp(), mixture)
    geometric = torch.einsum("k,knc->nc", weights, rows).softmax(-1)
    torch.testing.assert_close(POOLS["logits"](rows, weights).exp(), geometric)


@pytest.mark.parametrize("name", REPAIRS)
def test_repairs_leave_a_model_without_statistics_alone(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))
    before = copy.deepcopy(model.state_dict())
    held = Members.of_states(model, [before, nn.Linear(50, 3).state_dict(prefix="1.")])
    REPAIRS[name](model, PARTS, held, None)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_repaired_statistics_are_those_of_the_data() -> None:
    model = Net()
    held = members()
    REPAIRS["statistics"](model, PARTS, held, None)
    with torch.no_grad():
        seen = [model.conv(x).transpose(0, 1).flatten(1) for x, _ in data(2)]
    mean = torch.stack([rows.mean(1) for rows in seen]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    with pytest.raises(NQMError, match="BatchNorm statistics needs training data"):
        REPAIRS["statistics"](model, Parts(test=lambda: data(1)), held, None)

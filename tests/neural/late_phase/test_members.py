"""Late-phase training against the literal algorithm, and against the noisy-quadratic law."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nqm
from neural import LatePhase
from nqm import NQMError, Phase, Program
from tests import literal
from tests.literal_torch import LiteralLatePhase
from tests.tiny_nets import Batches, images
from tests.tolerances import IDENTITY, agree, within_error

MEMBERS = 3


pytestmark = pytest.mark.usefixtures("double")


def convnet() -> nn.Module:
    """BatchNorm twice; no bias in front of it, whose gradient is rounding noise to Adam."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def points(count: int, rows: int = 6) -> Batches:
    return [(torch.randn(rows, 4), torch.randint(3, (rows,))) for _ in range(count)]


loss_fn = functional.cross_entropy

# ------------------------------------------------------------------ against the literal algorithm

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, SGD),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
}
#: Weight decay of the second parameter group, as a pattern of names.
SECOND_GROUP = ("[03].weight", {"weight_decay": 0.3, "lr": 0.02})


def optimizer_on(
    kind: str, model: nn.Module, names: Collection[str], **changes: float
) -> torch.optim.Optimizer:
    """Optimizer with two parameter groups on the weights called `names`."""
    make, settings = OPTIMIZERS[kind]
    pattern, second = SECOND_GROUP
    groups: list[dict[str, Any]] = []
    for chosen, own in ((False, {}), (True, second)):
        held = [
            p for n, p in model.named_parameters()
            if n in names and fnmatchcase(n, pattern) is chosen
        ]  # fmt: skip
        if held:
            groups.append({**settings, **own, **changes, "params": held})
    return make(groups, lr=settings["lr"])


class Pair:
    """The library and the literal algorithm from one pre-trained state."""

    def __init__(
        self,
        kind: str = "sgd",
        select: str = "batchnorm+head",
        gamma: str | float = "sum",
        idle: str = "none",
        noise: float = 0.0,
        leftover: str = "carry",
        **changes: float,
    ):
        model = convnet()
        names = {n for n, _ in model.named_parameters()}
        base = optimizer_on(kind, model, names)
        for inputs, targets in images(3):
            base.zero_grad()
            loss_fn(model(inputs), targets).backward()
            base.step()
        self.twin = copy.deepcopy(model)
        self.twin_base = optimizer_on(kind, self.twin, names)
        self.twin_base.load_state_dict(copy.deepcopy(base.state_dict()))
        self.base = base
        self.late = LatePhase(
            model, MEMBERS, select, gamma=gamma, idle_steps=idle, noise=noise, leftover=leftover
        )
        self.own = self.late.optimizer_like(base, **changes)
        self.literal = LiteralLatePhase(
            self.twin,
            MEMBERS,
            self.late.selection.parameters,
            self.late.selection.buffers,
            lambda one, own: optimizer_on(kind, one, own, **changes),
            gamma={"sum": 1.0, "mean": 1.0 / MEMBERS}.get(str(gamma), gamma),
            idle=idle,
        )
        with torch.no_grad():  # the draw is tested by itself
            for name in self.late.selection.parameters:
                for k, one in enumerate(self.literal.copies):
                    one.get_parameter(name).copy_(self.row(name)[k])

    def row(self, name: str) -> Tensor:
        return self.late._weights()[name].detach()

    def step(self, batches: Batches) -> None:
        losses = self.late.step(batches, loss_fn, self.base, self.own)
        expected = self.literal.step(batches, loss_fn, self.twin_base)
        assert losses.shape == (len(batches),)
        agree(losses, expected, IDENTITY)

    def check(self) -> None:
        shared = set(self.literal._shared(self.twin))
        for name, value in self.twin.named_parameters():
            if name in shared:
                agree(self.late.model.get_parameter(name).detach(), value.detach(), IDENTITY)
        for name in self.late.selection.parameters:
            for k, one in enumerate(self.literal.copies):
                agree(self.row(name)[k], one.get_parameter(name).detach(), IDENTITY)
        for name, value in self.late._statistics().items():
            for k, one in enumerate(self.literal.copies):
                agree(value[k], one.get_buffer(name), IDENTITY)
        for name, value in self.twin.named_buffers():
            if name not in self.late.selection.buffers:
                agree(self.late.model.get_buffer(name), value, IDENTITY)
        self.check_moments()

    def check_moments(self) -> None:
        for name in self.late.selection.parameters:
            state = self.own.state[self.late._weights()[name]]
            for k, (one, own) in enumerate(
                zip(self.literal.copies, self.literal.optimizers, strict=True)
            ):
                expected = own.state[one.get_parameter(name)]
                counts = {n: v[k] for n, v in state.get("members", {}).items()}
                for key in state.keys() - {"members"}:
                    row = counts.get(key, state[key]) if key == "step" else state[key][k]
                    if expected:
                        agree(row, expected[key], IDENTITY)
                    else:  # it has not stepped yet
                        assert not np.any(np.asarray(row))


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("select", ["batchnorm+head", "all", "name:*weight"])
@pytest.mark.parametrize("gamma", ["sum", "mean", 0.37])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_cycles_are_the_literal_algorithm(kind, gamma, select, noise):
    """Two parameter groups; base momentum is carried into the late phase."""
    pair = Pair(kind, select, gamma, noise=noise)
    for _ in range(4):
        pair.step(images(MEMBERS))
    pair.check()


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_members_have_their_own_settings(kind):
    pair = Pair(kind, weight_decay=0.4, lr=0.003)
    for _ in range(3):
        pair.step(images(MEMBERS))
    pair.check()
    assert all(group["weight_decay"] == 0.4 for group in pair.own.param_groups)


def test_optimizer_like_mirrors_groups_and_leaves_schedules_behind():
    model = convnet()
    base = torch.optim.SGD(
        [
            {"params": [("conv", model[0].weight), ("scale", model[1].weight)], "lr": 0.3},
            {"params": [("bn", model[4].weight)], "weight_decay": 0.2, "momentum": 0.5},
        ],
        lr=0.1,
        weight_decay=0.02,
    )
    torch.optim.lr_scheduler.StepLR(base, 1)
    late = LatePhase(model, 2, "batchnorm+head")
    own = late.optimizer_like(base)
    weights = late._weights()
    of = {id(p): group for group in own.param_groups for p in group["params"]}
    assert len(of) == len(late.member_parameters())
    first, second, rest = (of[id(weights[n])] for n in ("1.weight", "4.weight", "8.weight"))
    assert (first["lr"], first["weight_decay"]) == (0.3, 0.02)
    assert (second["lr"], second["weight_decay"], second["momentum"]) == (0.1, 0.2, 0.5)
    assert (rest["lr"], rest["weight_decay"], rest["momentum"]) == (0.1, 0.02, 0.0)
    assert all("initial_lr" not in group for group in own.param_groups)
    torch.optim.lr_scheduler.StepLR(own, 1)


def test_changing_the_rate_of_one_optimizer_leaves_the_other():
    model = convnet()
    base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    own = LatePhase(model, 2).optimizer_like(base)
    base.param_groups[0]["lr"].fill_(0.5)
    assert float(own.param_groups[0]["lr"]) == 0.1


# ------------------------------------------------------------------ left-over batches


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_leftover_batches_move_the_first_members_alone(kind):
    """Two epochs of seven batches and three members, as in the official code."""
    pair = Pair(kind, leftover="members")
    for _ in range(2):
        cycles = list(pair.late.cycles(images(7)))
        assert [len(cycle) for cycle in cycles] == [3, 3, 1]
        for cycle in cycles[:2]:
            pair.step(cycle)
        base = copy.deepcopy([p.detach() for p in pair.late.model.parameters()])
        rows = {n: pair.row(n).clone() for n in pair.late.selection.parameters}
        states = copy.deepcopy(pair.own.state_dict()["state"])
        pair.step(cycles[2])
        now = [p.detach() for p in pair.late.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(base, now, strict=True))
        for name, before in rows.items():
            assert torch.equal(pair.row(name)[1:], before[1:])
            assert not torch.equal(pair.row(name)[0], before[0])
        for index, state in pair.own.state_dict()["state"].items():
            for key, value in state.items():
                if key not in ("step", "members"):
                    assert torch.equal(value[1:], states[index][key][1:])
                    assert not torch.equal(value[0], states[index][key][0])
    pair.check()


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_the_very_first_cycle_may_be_short(kind):
    """Members without a turn have no moments yet; theirs begin at zero."""
    pair = Pair(kind)
    for count in (2, 3, 1, 3):
        pair.step(images(count))
        pair.check()


def test_step_counts_of_members_survive_a_checkpoint():
    pair = Pair("adam")
    pair.step(images(1))
    pair.step(images(3))
    state = copy.deepcopy(pair.own.state_dict())
    pair.own = pair.late.optimizer_like(pair.base)
    pair.own.load_state_dict(state)
    pair.step(images(3))
    pair.check()
    counts = [own["members"]["step"] for own in pair.own.state.values()]
    assert counts == [[3.0, 2.0, 2.0]] * len(counts)


def numbered(cycles: Iterable[list[tuple[Any, Any]]]) -> list[list[int]]:
    return [[inputs for inputs, _ in cycle] for cycle in cycles]


def test_cycles_keep_order_and_treat_leftovers_as_told():
    loader = [(i, None) for i in range(5)]
    drop, short, carry = (
        LatePhase(convnet(), 3, leftover=word) for word in ("drop", "members", "carry")
    )
    assert numbered(list(drop.cycles(loader))) == [[0, 1, 2]]
    assert numbered(list(drop.cycles(loader))) == [[0, 1, 2]]
    assert numbered(list(short.cycles(loader))) == [[0, 1, 2], [3, 4]]
    assert numbered(list(short.cycles(loader[:3]))) == [[0, 1, 2]]
    assert numbered(list(carry.cycles(loader))) == [[0, 1, 2]]
    assert numbered(list(carry.cycles(loader))) == [[3, 4, 0], [1, 2, 3]]
    assert numbered(list(carry.cycles(loader[:1]))) == []
    assert numbered(list(carry.cycles(loader[:1]))) == [[4, 0, 0]]


@pytest.mark.filterwarnings("error")  # the middle of an epoch may hold less than one cycle
def test_one_call_may_treat_leftovers_in_its_own_way():
    late = LatePhase(convnet(), 3)
    loader = [(i, None) for i in range(9)]
    assert numbered(late.cycles(loader[:5], "members")) == [[0, 1, 2], [3, 4]]
    assert numbered(late.cycles(loader[:5], "drop")) == [[0, 1, 2]]
    assert numbered(late.cycles(loader[:5])) == [[0, 1, 2]]
    # Carried, as the object does.
    assert numbered(late.cycles(loader[5:])) == [[3, 4, 5], [6, 7, 8]]
    with pytest.raises(NQMError, match="did you mean 'carry'"):
        list(late.cycles(loader[:5], "carries"))


@pytest.mark.parametrize(
    ("leftover", "expected"),
    [("carry", [[0, 1, 2]]), ("drop", [[0, 1, 2]]), ("members", [[0, 1, 2], [3, 4]])],
)
def test_nothing_is_carried_out_of_the_last_call(leftover, expected):
    late = LatePhase(convnet(), 3, leftover=leftover)
    loader = [(i, None) for i in range(5)]
    assert numbered(list(late.cycles(loader, last=True))) == expected
    assert numbered(list(late.cycles(loader, last=True))) == expected
    few = numbered(list(late.cycles(loader[3:], last=True)))
    assert few == ([[3, 4]] if leftover == "members" else [])
    assert "carried" not in late.state_dict()


@pytest.mark.parametrize("select", ["batchnorm+head", "all"])
@pytest.mark.parametrize("idle", ["first", "every"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_idle_members_step_on_zero_gradients_as_under_torch_1(kind, idle, select):
    """Momentum and weight decay act on them; a short cycle included."""
    pair = Pair(kind, select, idle=idle, noise=0.1)
    for count in (3, 3, 2, 3):
        pair.step(images(count))
    pair.check()


def test_idle_steps_matter():
    """Without gradient only decay moves members, by (1 - lr wd) per step taken.

    In the first cycle idle members step only after their own turn; in the second all do.
    """
    lr, decay = 0.1, 0.2
    taken = {
        "none": ([1, 1, 1], [2, 2, 2]),
        "first": ([1, 1, 1], [2, 3, 3]),
        "every": ([3, 2, 1], [6, 5, 4]),
    }
    for idle, cycles in taken.items():
        model = nn.Linear(2, 2)
        start = model.weight.detach().clone()
        late = LatePhase(model, 3, "head", idle_steps=idle)
        base = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)
        own = late.optimizer_like(base)
        batches = [(torch.zeros(1, 2), torch.zeros(1))] * 3
        for steps in cycles:
            late.step(batches, lambda y, t: 0 * y.sum(), base, own)
            for k, count in enumerate(steps):
                expected = start * (1 - lr * decay) ** count
                agree(late._weights()["weight"][k].detach(), expected, IDENTITY)


def test_members_that_had_their_turn_survive_a_checkpoint():
    pair = Pair("sgd", idle="every")
    pair.step(images(2))  # member 2 has had none
    states = copy.deepcopy([pair.late.state_dict(), pair.own.state_dict()])
    pair.late._had_turn = [False] * MEMBERS
    for one, state in zip((pair.late, pair.own), states, strict=True):
        one.load_state_dict(state)
    for count in (1, 3, 2):
        pair.step(images(count))
        pair.check()


# ------------------------------------------------------------------ how a minibatch is run


@pytest.mark.parametrize(("rows", "pieces"), [(6, 2), (7, 3), (5, 8)])
def test_micro_batches_give_the_gradient_of_the_whole(rows, pieces):
    whole = LatePhase(perceptron(), MEMBERS, "name:2.*", noise=0.3, gamma="mean")
    cut = copy.deepcopy(whole)
    batches = points(MEMBERS, rows)
    losses = whole.accumulate(batches, loss_fn)
    agree(cut.accumulate(batches, loss_fn, micro_batches=pieces), losses, IDENTITY)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            agree(other.grad, one.grad, IDENTITY)


def test_accumulate_leaves_weights_and_scales_the_base_alone():
    late = LatePhase(perceptron(), MEMBERS, "head", gamma=0.25)
    plain = LatePhase(copy.deepcopy(late.model), MEMBERS, "head")
    before = copy.deepcopy(late.state_dict())
    batches = points(MEMBERS)
    late.accumulate(batches, loss_fn)
    late.accumulate(batches, loss_fn)  # starts anew, adds nothing up
    plain.accumulate(batches, loss_fn)
    assert all(torch.equal(before[name], value) for name, value in late.state_dict().items())
    agree(late.model[0].weight.grad, 0.25 * plain.model[0].weight.grad, IDENTITY)
    for one, other in zip(late.member_parameters(), plain.member_parameters(), strict=True):
        agree(one.grad, other.grad, IDENTITY)
    assert late.model[4].weight.grad is None


def test_inputs_need_not_be_tensors():
    """A minibatch that is not cut may be anything that the model takes."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 1)

        def forward(self, text: str, times: float = 1.0) -> Tensor:
            return times * self.head(torch.tensor([float(one) for one in text.split()]))

    late = LatePhase(Reader(), 2, "head")
    batches = [(("1 2", 3.0), None), ({"text": "2 1", "times": 0.5}, None)]
    losses = late.accumulate(batches, lambda out, _: out.square().mean())
    head = late.model.head
    expected = [3.0 * head(torch.tensor([1.0, 2.0])), 0.5 * head(torch.tensor([2.0, 1.0]))]
    agree(losses, [float(one.detach()) ** 2 for one in expected], IDENTITY)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_run_the_members_own_weights(reentrant):
    """Layers are run again in the backward pass, when a functional call is long over."""

    class Frugal(nn.Module):
        def __init__(self, frugal: bool) -> None:
            super().__init__()
            self.first, self.second, self.frugal = nn.Linear(4, 5), nn.Linear(5, 3), frugal

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            if not self.frugal:
                return torch.tanh(self.second(x))
            run_again = lambda x: torch.tanh(self.second(x))  # noqa: E731
            return checkpoint(run_again, x, use_reentrant=reentrant)

    usual, frugal = (LatePhase(Frugal(one), MEMBERS, "all", noise=0.5) for one in (False, True))
    frugal.load_state_dict(usual.state_dict())
    batches = points(MEMBERS)
    expected = usual.accumulate(batches, loss_fn)
    agree(frugal.accumulate(batches, loss_fn), expected, IDENTITY)
    for one, other in zip(frugal.member_parameters(), usual.member_parameters(), strict=True):
        agree(one.grad, other.grad, IDENTITY)


def test_evaluation_and_no_grad_leave_statistics_alone():
    late = LatePhase(convnet(), MEMBERS)
    before = copy.deepcopy(dict(late.statistics.named_buffers()))
    late.eval()
    for k in range(MEMBERS):
        late(images(1)[0][0], member=k)
    late.fused([inputs for inputs, _ in images(MEMBERS)])
    assert all(torch.equal(before[n], b) for n, b in late.statistics.named_buffers())
    late.train()
    late(images(1)[0][0], member=1)
    moved = {
        n: (before[n] != b).flatten(1).any(1)
        for n, b in late.statistics.named_buffers()
        if b.ndim > 1
    }
    assert all(rows.tolist() == [False, True, False] for rows in moved.values())


# ------------------------------------------------------------------ precision and compilation


def test_members_are_kept_in_float32_at_least():
    model = convnet().to(torch.bfloat16)
    late = LatePhase(model, 2, "batchnorm+head")
    assert {p.dtype for p in late.member_parameters()} == {torch.float32}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(x.bfloat16(), y) for x, y in images(2)]
    for fused in (False, True):
        late.step(batches, loss_fn, base, late.optimizer_like(base), fused=fused)
        assert {p.grad.dtype for p in late.member_parameters()} == {torch.float32}
    assert {p.dtype for p in late.averaged().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in LatePhase(convnet(), 2).member_parameters()} == {torch.float64}


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_runs_in_bfloat16_and_differentiates_in_float32(fused):
    late = LatePhase(convnet().float(), MEMBERS)
    seen = []
    late.model[8].register_forward_hook(lambda *given: seen.append(given[2].dtype))
    batches = [(x.float(), y) for x, y in images(MEMBERS)]
    losses = late.accumulate(batches, loss_fn, fused=fused, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert losses.isfinite().all()
    reference = copy.deepcopy(late)
    exact = reference.accumulate(batches, loss_fn)
    agree(losses, exact, 2e-2)  # eight bits
    grads = [p.grad for p in late.parameters() if p.grad is not None]
    assert len(grads) == len([p for p in reference.parameters() if p.grad is not None])
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in grads)


def test_one_compiled_graph_serves_all_members():
    torch._dynamo.reset()
    late = LatePhase(convnet(), 10, noise=0.2)
    eager = copy.deepcopy(late)
    counter = CompileCounter()
    late.compile(backend=counter)
    batches = images(10)
    losses = late.accumulate(batches, loss_fn)
    agree(losses, eager.accumulate(batches, loss_fn), IDENTITY)
    for k in range(10):
        inputs = batches[k][0]
        as_tensor = late(inputs, member=torch.tensor(k))
        agree(as_tensor.detach(), eager(inputs, member=k).detach(), IDENTITY)
    assert counter.frame_count == 1
    for one, other in zip(late.parameters(), eager.parameters(), strict=True):
        if other.grad is not None:
            agree(one.grad, other.grad, IDENTITY)
    for one, other in zip(late.buffers(), eager.buffers(), strict=True):
        agree(one, other, IDENTITY)


def test_a_copy_of_a_compiled_module_runs_its_own_weights():
    torch._dynamo.reset()
    late = LatePhase(perceptron(), 2, "head")
    late.compile(backend="eager")
    inputs = points(1)[0][0]
    before = late(inputs, member=0).detach()
    twin = copy.deepcopy(late)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(inputs, member=0).any()
    assert torch.equal(late(inputs, member=0).detach(), before)


# ------------------------------------------------------------------ starting members


def test_without_noise_members_are_the_model():
    model = convnet()
    model(images(1)[0][0])  # running statistics that differ from their start
    late = LatePhase(model, MEMBERS)
    for name, value in (late._weights() | late._statistics()).items():
        for row in value:
            assert torch.equal(row, model.state_dict()[name])


class Bag(nn.Module):
    """Tensors of several shapes, large enough to measure a standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(3.0 * torch.randn(40, 50))
        self.kernel = nn.Parameter(0.1 * torch.randn(20, 8, 3, 3))
        self.vector = nn.Parameter(2.0 + torch.randn(400))
        self.nothing = nn.Parameter(torch.zeros(300))
        self.values = nn.Parameter(torch.ones(30, 30))  # the name of a dictionary's method


@pytest.mark.parametrize("rule", ["rms", "fan_in"])
def test_standard_deviation_of_the_perturbation(rule):
    bag, sigma, members = Bag(), 0.3, 20
    late = LatePhase(bag, members, "all", noise=sigma, noise_rule=rule, seed=3)
    fan_in = {"matrix": 50, "kernel": 72, "vector": 400, "nothing": 300, "values": 30}
    for name, stacked in late._weights().items():
        value = bag.get_parameter(name).detach()
        size = math.sqrt(float((value**2).mean())) if rule == "rms" else fan_in[name] ** -0.5
        moved = stacked.detach() - value
        n = moved.numel()
        # Standard errors of a mean, and of a mean square, of n normal numbers.
        within_error(moved.mean(), 0.0, sigma * size / math.sqrt(n))
        within_error(
            moved.square().mean(), (sigma * size) ** 2, (sigma * size) ** 2 * math.sqrt(2 / n)
        )
        for k in range(members):  # no member is special
            within_error(
                moved[k].square().mean(),
                (sigma * size) ** 2,
                (sigma * size) ** 2 * math.sqrt(2 * members / n),
            )
        if size:
            a, b = moved[0].flatten(), moved[1].flatten()
            within_error((a * b).mean(), 0.0, (sigma * size) ** 2 / math.sqrt(len(a)))


def test_the_seed_decides_the_perturbation():
    bag = Bag()
    draws = [LatePhase(bag, 2, "all", noise=0.1, seed=s)._weights()["matrix"] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_training_resumes_bit_for_bit(kind):
    model = convnet()
    make, settings = OPTIMIZERS[kind]
    base = make(model.parameters(), **settings)
    late = LatePhase(model, MEMBERS, noise=0.1)
    own = late.optimizer_like(base)
    epochs = [images(MEMBERS) for _ in range(4)]
    for batches in epochs[:2]:
        late.step(batches, loss_fn, base, own)
    saved = copy.deepcopy([one.state_dict() for one in (late, base, own)])
    fresh_model = convnet()
    fresh_base = make(fresh_model.parameters(), **settings)
    fresh = LatePhase(fresh_model, MEMBERS, noise=0.1, seed=9)
    fresh_own = fresh.optimizer_like(fresh_base)
    for one, state in zip((fresh, fresh_base, fresh_own), saved, strict=True):
        one.load_state_dict(state)
    for batches in epochs[2:]:
        losses = late.step(batches, loss_fn, base, own)
        assert torch.equal(fresh.step(batches, loss_fn, fresh_base, fresh_own), losses)
    again = fresh.state_dict()
    assert list(again) == list(late.state_dict())
    assert all(torch.equal(again[name], value) for name, value in late.state_dict().items())


def test_shared_parameters_stay_the_objects_they_were():
    model = convnet()
    before = {n: id(p) for n, p in model.named_parameters()}
    LatePhase(model, 2)
    assert {n: id(p) for n, p in model.named_parameters()} == before


@given(members=st.integers(2, 6), seed=st.integers(0, 99), select=st.sampled_from(["all", "head"]))
def test_spread_is_the_relative_distance_from_the_mean(members, seed, select):
    late = LatePhase(perceptron(), members, select, noise=0.5, seed=seed)
    flat = np.concatenate(
        [w.detach().reshape(members, -1).numpy() for w in late.member_parameters()], axis=1
    )
    mean = flat.mean(axis=0)
    expected = np.sqrt(np.mean(np.sum((flat - mean) ** 2, axis=1)) / np.sum(mean**2))
    agree(late.spread(), expected, IDENTITY)


def test_members_that_agree_have_no_spread():
    assert LatePhase(perceptron(), 2, "head").spread() == 0.0


# ------------------------------------------------------------------ mistakes

MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "one member": (lambda: LatePhase(convnet(), 1), "members must be an integer >= 2; got 1"),
    "no number": (lambda: LatePhase(convnet(), 2.0), r"members must be an integer >= 2; got 2\.0"),
    "gamma word": (lambda: LatePhase(convnet(), 2, gamma="men"), "did you mean 'mean'"),
    "gamma sign": (lambda: LatePhase(convnet(), 2, gamma=-1.0), r"gamma must lie in \[0"),
    "noise": (lambda: LatePhase(convnet(), 2, noise=-0.1), r"noise must lie in \[0"),
    "noise nan": (lambda: LatePhase(convnet(), 2, noise=math.nan), r"noise must lie in \[0"),
    "noise rule": (lambda: LatePhase(convnet(), 2, noise_rule="fanin"), "did you mean 'fan_in'"),
    "idle": (lambda: LatePhase(convnet(), 2, idle_steps="all"), "idle_steps 'all' is unknown"),
    "seed": (lambda: LatePhase(convnet(), 2, seed=-1), "seed must be an integer >= 0"),
    "member": (lambda: LatePhase(convnet(), 2)(torch.ones(1), member=2), r"must lie in 0 \.\. 1"),
    "plain member": (lambda: LatePhase(convnet(), 2).member(-1), r"must lie in 0 \.\. 1"),
    "leftover": (lambda: LatePhase(convnet(), 2, leftover="carries"), "mean 'carry'"),
    "batchnorm": (lambda: LatePhase(convnet(), 2).averaged(batchnorm="x"), "'x' is unknown"),
    "rank1": (lambda: LatePhase(convnet(), 2).averaged(rank1="factor"), "did you mean 'factors'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MISTAKES))
def test_mistakes_are_one_line(case):
    make, message = MISTAKES[case]
    with pytest.raises(NQMError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_mistakes_of_a_step():
    model = convnet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    late = LatePhase(model, 2)
    own = late.optimizer_like(base)
    mixed = torch.optim.SGD([*model.parameters(), *late.member_parameters()], lr=0.1)
    with pytest.raises(NQMError, match="member_optimizer must be made on late"):
        late.step(images(2), loss_fn, own, base)
    with pytest.raises(NQMError, match="member_optimizer must be made on late"):
        late.step(images(2), loss_fn, base, mixed)
    with pytest.raises(NQMError, match="base_optimizer must be made on the model's parameters"):
        late.step(images(2), loss_fn, mixed, own)
    for count in (0, 3):
        with pytest.raises(NQMError, match=r"1 \.\. 2 minibatches.*got " + str(count)):
            late.step(images(count), loss_fn, base, own)
    with pytest.raises(NQMError, match="set micro_batches to 1"):
        late.step(images(2), loss_fn, base, own, fused=True, micro_batches=2)
    with pytest.raises(NQMError, match="micro_batches must be an integer >= 1"):
        late.step(images(2), loss_fn, base, own, micro_batches=0)
    late.idle_steps = "first"
    with pytest.raises(NQMError, match="fused needs idle_steps='none'"):
        late.step(images(2), loss_fn, base, own, fused=True)
    with pytest.raises(NQMError, match="micro_batches must be an integer >= 1"):
        late.step(images(2), loss_fn, base, own, micro_batches=0)


# ------------------------------------------------------------------ the noisy-quadratic law

REPLICAS, STEPS, K = 3000, 12, 4


class Additive(nn.Module):
    """w = theta + phi for many replicas at once; the late-phase weight is phi."""

    def __init__(self, start: np.ndarray, phi: np.ndarray | float = 0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.from_numpy(start))
        self.phi = nn.Parameter(torch.full_like(self.theta, 1.0) * phi)

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.theta + self.phi, noise


class Multiplicative(Additive):
    """w = theta phi."""

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.theta * self.phi, noise


class Whole(Additive):
    """w = phi: nothing is shared."""

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.phi, noise


def run(
    problem: nqm.Problem,
    model: Additive,
    gamma: str | float,
    lr: float,
    member_lr: float,
    *,
    momentum: float = 0.0,
    minimum: np.ndarray | float = 0.0,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Train on 1/2 sum h (w - w*)^2 + noise w; the members' w - w*, and the noise drawn."""
    h, centre = torch.tensor(problem.curvature), torch.as_tensor(minimum)
    late = LatePhase(model, K, "name:phi", gamma=gamma, **settings)
    base = torch.optim.SGD([model.theta, model.phi], lr=lr, momentum=momentum)
    own = late.optimizer_like(base, lr=member_lr)

    def loss_fn(output: tuple[Tensor, Tensor], _: object) -> Tensor:
        w, noise = output
        return (0.5 * h * (w - centre) ** 2 + noise * w).sum()

    @torch.no_grad()
    def members() -> np.ndarray:
        weights = [late(torch.zeros(1), member=k)[0] for k in range(K)]
        return (torch.stack(weights) - centre).numpy()

    generator = np.random.default_rng(11)
    noise = generator.standard_normal((STEPS, K, *model.theta.shape))
    noise = noise * np.sqrt(problem.noise_variance)
    path = [members()]
    for draws in noise:
        late.step([(torch.from_numpy(one), None) for one in draws], loss_fn, base, own)
        path.append(members())
    return np.stack(path), noise


def replicas(problem: nqm.Problem) -> np.ndarray:
    normal = np.random.default_rng(5).standard_normal((REPLICAS, problem.directions))
    return problem.initial_mean + np.sqrt(problem.initial_variance) * normal


class Drawn:
    """Stands in for a random generator of the literal simulators: hands out given noise."""

    def __init__(self, noise: np.ndarray, first: list[np.ndarray]):
        self.queue = [*first, *noise]

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        one = self.queue.pop(0)
        assert one.shape == tuple(shape)
        return one


def check_law(
    path: np.ndarray, expected: np.ndarray, exact: nqm.Trajectory, problem: nqm.Problem
) -> None:
    """The path number by number, and its mean losses within their standard errors."""
    agree(path, expected, IDENTITY)
    h, at = problem.curvature, exact.steps
    for weights, mean, error in (
        (path.mean(axis=1)[at], exact.loss, exact.stderr),
        (path[at], exact.member_loss, exact.member_stderr),
    ):
        losses = (weights**2 @ (0.5 * h)).reshape(len(at), -1, REPLICAS).mean(axis=1)
        own = losses.std(axis=1, ddof=1) / np.sqrt(REPLICAS)
        within_error(losses.mean(axis=1), mean, np.hypot(own, error))


@pytest.mark.parametrize("gamma", ["sum", "mean"])
def test_additive_members_obey_the_exact_law(problem, gamma):
    """Base and members with momentum, in law SGD on the mean model (nqm.LatePhase)."""
    spread, scale = 0.4, {"sum": 1.0, "mean": 1.0 / K}[gamma]
    start, sigma = replicas(problem), math.sqrt(spread * problem.directions)
    # The fan-in rule gives a zero phi an offset of variance sigma^2 / d.
    path, noise = run(
        problem, Additive(start), gamma, 0.05, 0.2, momentum=0.6, noise=sigma, noise_rule="fan_in"
    )  # fmt: skip
    unit = np.sqrt(problem.noise_variance)
    first = (path[0] - start) / math.sqrt(spread)
    expected = literal.late_phase(
        problem.curvature, problem.noise_variance, start, 0.05, 1, STEPS,
        Drawn(noise / unit, [first]), members=K, member_lr=0.2, gamma=scale, spread=spread,
        inner="heavy_ball", momentum=0.6,
    )[1]  # fmt: skip
    inner = nqm.HeavyBall(0.6)
    algorithm = nqm.LatePhase(K, scale, spread=spread, inner=inner)
    exact = nqm.solve(
        problem, Program((Phase(algorithm, 0.05, STEPS, member_lr=0.2),)), [0, 1, 4, STEPS]
    )
    check_law(path, expected, exact, problem)


def test_members_that_share_nothing_are_an_ensemble(problem):
    start = replicas(problem)
    path, noise = run(problem, Whole(start, torch.from_numpy(start)), "sum", 0.7, 0.1)
    unit = (noise / np.sqrt(problem.noise_variance)).swapaxes(0, 1)  # run by run
    expected = literal.ensemble(
        problem.curvature, problem.noise_variance, start, 0.1, 1, STEPS,
        Drawn(unit.reshape(-1, *start.shape), []), members=K,
    )[1]  # fmt: skip
    exact = nqm.solve(problem, Program((Phase(nqm.Ensemble(K), 0.1, STEPS),)), [1, 5, STEPS])
    check_law(path, expected, exact, problem)


def test_multiplicative_members_follow_the_recursion_and_its_samples():
    problem = nqm.Problem(
        curvature=[1.0, 0.3], noise_variance=[0.5, 0.2], initial_mean=[0.5, -0.4],
        initial_variance=[0.1, 0.2], minimum=[2.0, -1.5],
    )  # fmt: skip
    start, minimum = replicas(problem), np.array([2.0, -1.5])
    model = Multiplicative(start + minimum, 1.0)
    path, noise = run(problem, model, "mean", 0.1, 0.05, minimum=minimum)
    zeros = np.zeros((K, *start.shape))
    expected = literal.late_phase_multiplicative(
        problem.curvature, problem.noise_variance, start, 0.1, 1, STEPS,
        Drawn(noise / np.sqrt(problem.noise_variance), [zeros]), minimum=minimum, members=K,
        member_lr=0.05, gamma=1 / K,
    )[1]  # fmt: skip
    program = Program(
        (Phase(nqm.MultiplicativeLatePhase(K, gamma="mean"), 0.1, STEPS, member_lr=0.05),)
    )
    drawn = nqm.sample(problem, program, [1, 5, STEPS], replicas=4000, seed=2)
    check_law(path, expected, drawn, problem)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_minibatches_multiply_their_losses(fused: bool) -> None:
    """Every gradient is linear in its member's loss, and the base's in the weighted sum."""
    late = LatePhase(perceptron(), 2, gamma="sum", select="head")
    batches = points(2)
    grads = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 3.0)):
        losses = late.accumulate(batches, loss_fn, fused=fused, batch_weights=weights)
        assert losses.shape == (2,)
        grads.append([p.grad.clone() for p in late.parameters() if p.grad is not None])
    for first, second, both in zip(*grads, strict=True):
        agree(both, 0.5 * first + 3.0 * second, IDENTITY)
    with pytest.raises(NQMError, match="one number for each of the 2 minibatches; got 1"):
        late.accumulate(batches, loss_fn, batch_weights=(1.0,))


def test_a_notebook_shows_what_each_member_has_of_its_own():
    """Linear 4-6 has 30 weights, 6-6 has 42, 6-3 has 21."""
    shown = LatePhase(perceptron(), 5, "head", gamma="mean")._repr_html_()
    assert "<b>LatePhase of 5 members</b>" in shown
    for text in ("Sequential", ">93<", ">21 (22.58%)<", "4.weight, 4.bias", ">mean<"):
        assert text in shown
    assert len(shown) < 2000

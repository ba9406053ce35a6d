"""A training loop of one's own: minibatches of any form, clipping, schedules, scaled losses."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim import lr_scheduler

from neural import LatePhase, recompute_statistics
from neural.evaluate import mc_dropout, predict, predict_members, score, score_text
from neural.late_phase.scaler import unscaled_half
from nqm import NQMError
from tests.literal_torch import LiteralLatePhase
from tests.tiny_nets import batches, net, state_of
from tests.tolerances import IDENTITY, agree

pytestmark = pytest.mark.usefixtures("double")


# ------------------------------------------------------------------ minibatches of any form


@dataclass(frozen=True)
class Sample:
    image: Tensor
    label: Tensor


Three = namedtuple("Three", "image label weight")

#: Form of a minibatch -> how it is made, the function that makes a pair of it, and how messages
#: name it and the function.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any], str]] = {
    "dict": (
        lambda x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"]),
        r"got a dict of 'image', 'label'; give batch=lambda b: \(b\['image'\], b\['label'\]\)",
    ),
    "mapping of a tokenizer": (
        lambda x, y: UserDict(image=x, label=y), lambda b: (b["image"], b["label"]),
        r"got a UserDict of 'image', 'label'; give batch=lambda b: \(b\['image'\]",
    ),
    "dataclass": (
        Sample, lambda b: (b.image, b.label),
        r"got a Sample; give batch=lambda b: \(b\.image, b\.label\)",
    ),
    "triple": (
        lambda x, y: (x, y, torch.ones(len(x))), lambda b: b[:2],
        r"got a tuple of 3; give batch=lambda b: \(b\[:-1\], b\[-1\]\)",
    ),
    "named triple": (
        lambda x, y: Three(x, y, None), lambda b: (b.image, b.label), "got a Three of 3; give batch"
    ),
    "one tensor": (
        lambda x, y: torch.cat([x, y[:, None].to(x)], 1),
        lambda b: (b[:, :4].contiguous(), b[:, 4].long()),
        r"got a Tensor; give batch=lambda b: \(b, None\)",
    ),
}  # fmt: skip


def begun(model: nn.Module, members: int = 3, **options: Any) -> tuple[LatePhase, Any, Any]:
    base = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    late = LatePhase(model, members, "norm+head", noise=0.1, **options)
    return late, base, late.optimizer_like(base)


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_minibatches_of_other_forms_train_and_evaluate_as_pairs_do(form):
    make, batch, told = FORMS[form]
    # Two rows at a time: a tensor, too, could then be taken for a pair.
    plain = [(torch.randn(2, 4), torch.randint(3, (2,))) for _ in range(6)]
    loader = [make(x, y) for x, y in plain]
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    late, base, own = begun(model)
    other, other_base, other_own = begun(copy.deepcopy(model))
    torch.manual_seed(1)
    for cycle in late.cycles(plain):
        expected = late.step(cycle, functional.cross_entropy, base, own)
    torch.manual_seed(1)
    for cycle in other.cycles(loader, batch=batch):
        found = other.step(cycle, functional.cross_entropy, other_base, other_own)
    assert torch.equal(found, expected)
    recompute_statistics(late, plain)
    recompute_statistics(other, loader, batch=batch)
    assert equal(late, other)
    single, twin = late.averaged(), other.averaged()
    recompute_statistics(single, plain, by_size=True)
    recompute_statistics(twin, loader, by_size=True, batch=batch)
    assert equal(single, twin)
    for a, b in (
        (predict(single, plain), predict(twin, loader, batch=batch)),
        (predict_members(late, 3, plain), predict_members(other, 3, loader, batch=batch)),
        (mc_dropout(single, plain, 2), mc_dropout(twin, loader, 2, batch=batch)),
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert score(single, plain) == score(twin, loader, batch=batch)
    assert score_text(single, plain) == score_text(twin, loader, batch=batch)
    before = state_of(other)
    for use in (
        lambda: list(other.cycles(loader)),
        lambda: other.step(loader[:3], functional.cross_entropy, other_base, other_own),
        lambda: other.accumulate(loader[:3], functional.cross_entropy),
        lambda: recompute_statistics(other, loader),
        lambda: predict(twin, loader),
        lambda: predict_members(other, 3, loader),
        lambda: score(twin, loader),
        lambda: mc_dropout(twin, loader, 2),
    ):
        with pytest.raises(NQMError, match=told) as error:
            use()
        assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_what_is_no_adapter_is_told():
    late = LatePhase(net(), 2, "norm")
    with pytest.raises(NQMError, match="cycles: batch must be a function of one minibatch; got 3"):
        list(late.cycles(batches(), batch=3))
    with pytest.raises(NQMError, match=r"batch must return a pair .*; got a Tensor for a tuple"):
        list(late.cycles(batches(), batch=lambda b: b[0]))
    with pytest.raises(NQMError, match=r"cycles: batch fails on a tuple of 2 \(KeyError: 'x'\)"):
        list(late.cycles(batches(), batch=lambda b: {}["x"]))
    with pytest.raises(NQMError, match=r"a cycle is a list of minibatches: .*; got a Tensor"):
        late.accumulate(batches(1)[0], functional.cross_entropy)
    with pytest.raises(NQMError, match="predict: labels must be a tensor; got a NoneType"):
        predict(net(), [x for x, _ in batches()], batch=lambda b: (b, None))
    with pytest.raises(NQMError, match=r"must return a tensor of logits, .*; got a tuple"):
        predict(nn.Identity(), [((batches()[0][0],), 0)], batch=lambda b: ({"input": b[0]}, 0))


class Scored(nn.Module):
    """Takes keyword arguments and gives an object with logits, as models of text do."""

    Output = namedtuple("Output", "loss logits")

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.inner(pixels)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return self.wrap(self.Output(loss, logits))


@pytest.mark.parametrize("wrap", [lambda out: out, lambda out: out._asdict()])
def test_models_that_return_objects_with_logits_and_their_own_loss(wrap):
    model = Scored(wrap)
    plain = batches(4)
    loader = [{"pixels": x, "labels": y} for x, y in plain]
    late, base, own = begun(model, 2)
    twin, twin_base, twin_own = begun(copy.deepcopy(model.inner), 2)

    def own_loss(output: Any, targets: None) -> Tensor:
        return output["loss"] if isinstance(output, dict) else output.loss

    for cycle in late.cycles(loader, batch=lambda b: (b, None)):
        found = late.step(cycle, own_loss, base, own)
    for cycle in twin.cycles(plain):
        expected = twin.step(cycle, functional.cross_entropy, twin_base, twin_own)
    assert torch.equal(found, expected)
    single = late.averaged()
    given = score(single, loader, batch=lambda b: ({"pixels": b["pixels"]}, b["labels"]))
    assert given == score(twin.averaged(), plain)


@pytest.mark.parametrize("wrap", [lambda x: Sample(x, x), lambda x: UserDict(image=x)])
def test_a_loader_that_fills_a_dataclass_or_mapping_again(wrap):
    held = torch.zeros(2)

    def loader() -> Iterator[tuple[Any, None]]:
        for k in range(6):
            held.fill_(k)
            yield wrap(held), None

    cycles = LatePhase(net(), 3, "norm").cycles(loader())
    inputs = [[x for x, _ in cycle] for cycle in cycles]
    values = [[float((x["image"] if isinstance(x, dict) else x.image)[0]) for x in cycle]
              for cycle in inputs]  # fmt: skip
    assert values == [[0, 1, 2], [3, 4, 5]]


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize(
    ("late_options", "step_options"),
    [
        ({}, {}),
        ({"gamma": "mean"}, {}),
        ({}, {"micro_batches": 3}),
        ({"idle_steps": "first"}, {}),
        ({"idle_steps": "every"}, {"micro_batches": 2}),
    ],
)
def test_clipping_is_that_of_each_members_network(late_options, step_options):
    """As `clip_grad_norm_` clips the whole model in plain training, minibatch by minibatch."""

    def make(model: nn.Module, names: Any) -> optim.Optimizer:
        own = [p for n, p in model.named_parameters() if n in names]
        return optim.SGD(own, lr=0.1, momentum=0.9)

    model, clip = net(), 1.0
    twin = copy.deepcopy(model)
    late, base, own = begun(model, **late_options)
    literal = LiteralLatePhase(
        twin, 3, late.selection.parameters, late.selection.buffers, make, clip=clip,
        gamma=1 / 3 if late.gamma == "mean" else 1.0, idle=late.idle_steps,
    )  # fmt: skip
    with torch.no_grad():
        for name, rows in late._weights().items():
            for row, one in zip(rows, literal.copies, strict=True):
                one.get_parameter(name).copy_(row)
    twin_base = optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    options = {"clip_norm": clip, **step_options}
    for count in (3, 3, 2, 3):
        given = batches(count)
        losses = late.step(given, functional.cross_entropy, base, own, **options)
        agree(losses, literal.step(given, functional.cross_entropy, twin_base), IDENTITY)
    assert min(literal.norms) < clip < max(literal.norms)
    for name, rows in late._weights().items():
        for row, one in zip(rows, literal.copies, strict=True):
            agree(row.detach(), one.get_parameter(name).detach(), IDENTITY)
    for name in ("0.weight", "0.bias"):
        agree(late.model.get_parameter(name).detach(),
              literal.model.get_parameter(name).detach(), IDENTITY)  # fmt: skip


def test_what_clipping_cannot_do_is_told():
    late, base, own = begun(net(), 2)
    for norm in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(NQMError, match="clip_norm must"):
            late.step(batches(), functional.cross_entropy, base, own, clip_norm=norm)
    with pytest.raises(
        NQMError, match=r"fused computes the base's gradient of all .* fused to Fal"
    ):
        late.step(batches(), functional.cross_entropy, base, own, fused=True, clip_norm=1.0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    late = LatePhase(model, 2, "head")
    given = [(torch.randint(9, (6, 2)), torch.randint(3, (6,))) for _ in range(2)]
    with pytest.raises(NQMError, match=r"clip_norm takes dense gradients; .* sparse=False"):
        late.accumulate(given, functional.cross_entropy, clip_norm=1.0)


# ------------------------------------------------------------------ the base's scheduler


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "cosine": lambda base: lr_scheduler.CosineAnnealingLR(base, 7),
    "one cycle, momentum too": lambda base: lr_scheduler.OneCycleLR(base, 0.2, total_steps=9),
    "a rate for each group": lambda base: lr_scheduler.LambdaLR(
        base, [lambda t: 0.5**t, lambda t: 1.0 / (1 + t)]
    ),
}


@pytest.mark.parametrize("ratio", [1.0, 0.25])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_members_follow_the_bases_scheduler(name, ratio):
    """Against rates and momentum written into the members' optimizer by hand."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    runs = []
    for one in (model, twin):
        groups = [{"params": one[:2].parameters(), "lr": 0.1}, {"params": one[2].parameters()}]
        base = optim.SGD(groups, lr=0.04, momentum=0.9, weight_decay=0.01)
        schedule = SCHEDULERS[name](base)
        for _ in range(2):
            base.step()
            schedule.step()
        runs.append((LatePhase(one, 2, "norm+head", noise=0.1), base, schedule))
    (late, base, schedule), (other, other_base, other_schedule) = runs
    changes = {} if ratio == 1.0 else {"lr": ratio * base.param_groups[0]["lr"]}
    own = late.optimizer_like(base, follow=True, weight_decay=0.0, **changes)
    ratios = [1.0 if ratio == 1.0 else changes["lr"] / g["lr"] for g in base.param_groups]
    own_by_hand = other.optimizer_like(other_base, weight_decay=0.0)
    for count in range(5):
        given = batches()
        for to, group, share in zip(own_by_hand.param_groups, other_base.param_groups, ratios,
                                    strict=True):  # fmt: skip
            to["lr"], to["momentum"] = group["lr"] * share, group["momentum"]
        late.step(given, functional.cross_entropy, base, own)
        other.step(given, functional.cross_entropy, other_base, own_by_hand)
        schedule.step()
        other_schedule.step()
        assert all(torch.equal(p, q) for p, q in zip(late.parameters(), other.parameters(),
                                                     strict=True))  # fmt: skip
        assert {group["weight_decay"] for group in own.param_groups} == {0.0}
        if count == 2:  # a checkpoint, loaded into new objects whose rates are others
            state = copy.deepcopy([base.state_dict(), own.state_dict()])
            base.param_groups[0]["lr"] = 3.0
            own = late.optimizer_like(base, follow=True, weight_decay=0.0, lr=1.0)
            base.load_state_dict(state[0])
            own.load_state_dict(state[1])


def test_members_that_have_nothing_to_follow():
    model = net()
    late = LatePhase(model, 2, "norm+head")
    part = optim.SGD(model[:2].parameters(), lr=0.1)
    with pytest.raises(NQMError, match=r"optimizer_like: base_optimizer does not have 2\.weight"):
        late.optimizer_like(part, follow=True)
    cold = optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(NQMError, match="in its present ratio, and that rate is 0 now"):
        late.optimizer_like(cold, follow=True, lr=0.1)
    own = late.optimizer_like(cold, follow=True)
    cold.param_groups[0]["lr"] = 0.3
    late.step(batches(), functional.cross_entropy, cold, own)
    assert own.param_groups[0]["lr"] == 0.3
    own.load_state_dict(late.optimizer_like(cold).state_dict())  # saved without following
    cold.param_groups[0]["lr"] = 0.2
    late.step(batches(), functional.cross_entropy, cold, own)
    assert own.param_groups[0]["lr"] == 0.2
    capturable = optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    own = late.optimizer_like(capturable, follow=True)
    held = own.param_groups[0]["lr"]
    capturable.param_groups[0]["lr"].fill_(0.025)
    late.step(batches(), functional.cross_entropy, capturable, own)
    assert own.param_groups[0]["lr"] is held
    assert float(held) == 0.025


# ------------------------------------------------------------------ scaled losses


def test_a_power_of_two_as_scale_changes_nothing():
    late, base, own = begun(net(), 2)
    other, other_base, other_own = begun(copy.deepcopy(late.model), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for count in (2, 1, 2):
        given = batches(count)
        expected = other.step(given, functional.cross_entropy, other_base, other_own)
        found = late.step(given, functional.cross_entropy, base, own, scaler=scaler)
        assert torch.equal(found, expected)
        assert equal(late, other)
    assert scaler.get_scale() == 2.0**11  # after two steps whose gradients were finite
    given = batches()
    other.step(given, functional.cross_entropy, other_base, other_own, clip_norm=0.5)
    late.step(given, functional.cross_entropy, base, own, scaler=scaler, clip_norm=0.5)
    for p, q in zip(late.parameters(), other.parameters(), strict=True):
        # torch's 1e-6 in the norm's denominator is not scaled
        agree(p.detach(), q.detach(), 1e-6)
    off = torch.amp.GradScaler("cpu", enabled=False)
    twin, twin_base, twin_own = begun(copy.deepcopy(late.model), 2)
    third, third_base, third_own = begun(copy.deepcopy(late.model), 2)
    twin.step(given, functional.cross_entropy, twin_base, twin_own, scaler=off)
    third.step(given, functional.cross_entropy, third_base, third_own)
    assert equal(twin, third)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"fused": True}])
def test_an_overflow_moves_neither_base_nor_members(options):
    late, base, own = begun(net(), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def explodes(output: Tensor, targets: Tensor) -> Tensor:
        # infinite gradients for the second minibatch only
        return functional.cross_entropy(output, targets) * (
            torch.inf if (targets == 2).all() else 1
        )

    before = state_of(late)
    given = [(batches()[0][0], torch.full((6,), label)) for label in (1, 2)]
    late.step(given, explodes, base, own, scaler=scaler, **options)
    assert all(torch.equal(before[name], value) for name, value in late.state_dict().items())
    assert not base.state
    assert not own.state
    assert scaler.get_scale() == 4.0
    losses = late.step(given[:1] * 2, explodes, base, own, scaler=scaler, **options)
    assert losses.isfinite().all()
    assert not torch.equal(before["model.0.weight"], late.model[0].weight)


def test_half_precision_on_weights_in_float32():
    """Gradients that vanish in float16 without a scale; the same steps as in float32 with one."""
    torch.set_default_dtype(torch.float32)
    late, base, own = begun(net(), 2)
    other, other_base, other_own = begun(copy.deepcopy(late.model), 2)

    def tiny(output: Tensor, targets: Tensor) -> Tensor:
        return 1e-7 * functional.cross_entropy(output.float(), targets)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    given = batches()
    late.step(given, tiny, base, own, autocast=torch.float16, scaler=scaler)
    other.step(given, tiny, other_base, other_own)
    for p, q in zip(late.model[0].parameters(), other.model[0].parameters(), strict=True):
        # ten bits of the mantissa, over a few layers
        torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02 * float(q.grad.abs().max()))
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("idle_steps", ["none", "every"])
def test_float16_without_a_scaler_is_told_once(idle_steps):
    torch.set_default_dtype(torch.float32)
    late, base, own = begun(net(), 2, idle_steps=idle_steps)
    with (
        pytest.warns(UserWarning, match="below 6e-8 are lost; give step scaler="),
        torch.autocast("cpu", torch.float16),
    ):
        late.step(batches(), functional.cross_entropy, base, own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.step(batches(), functional.cross_entropy, base, own, autocast=torch.float16)
    late.step(batches(), functional.cross_entropy, base, own, autocast=torch.bfloat16)


def test_recurrent_layers_are_in_float16_on_a_gpu_alone():
    text, image = nn.Sequential(nn.LSTM(2, 3)), nn.Sequential(nn.Linear(2, 3))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert "whatever its type" in unscaled_half(torch.bfloat16, text, gpu)
    for model, device, kind in (
        (text, cpu, torch.bfloat16), (image, gpu, torch.bfloat16), (text, gpu, None)
    ):  # fmt: skip
        assert unscaled_half(kind, model, device) is None


def test_what_a_scaler_cannot_do_is_told():
    late, base, own = begun(net(), 2)
    with pytest.raises(NQMError, match=r"scaler must be a torch\.amp\.GradScaler; got a int"):
        late.step(batches(), functional.cross_entropy, base, own, scaler=3)
    scaler = torch.amp.GradScaler("cpu")
    base.scaler = scaler  # as the optimizer of accelerate has one
    with pytest.raises(NQMError, match=r"give step scaler=accelerator\.scaler"):
        late.step(batches(), functional.cross_entropy, base, own)
    late, base, own = begun(net(), 2, idle_steps="every")
    with pytest.raises(NQMError, match="scaler needs idle_steps='none'; got 'every'"):
        late.step(batches(), functional.cross_entropy, base, own, scaler=scaler)
    late, base, own = begun(net().half(), 2)
    given = [(x.half(), y) for x, y in batches()]
    with pytest.raises(NQMError, match=r"unscale FP16 gradients\. Hold the weights in float32"):
        late.step(given, functional.cross_entropy, base, own, scaler=scaler)


# ------------------------------------------------------------------ a loop that is not ours


def test_a_members_weights_in_place_are_its_forward_pass():
    """Gradients and running statistics of a hand-written loop are those of `accumulate`."""
    # No bias before BatchNorm: its gradient would be 0, and rounding alone be compared.
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3))
    late, base, own = begun(model, 2)
    other, *_ = begun(copy.deepcopy(model), 2)
    given = batches()
    other.accumulate(given, functional.cross_entropy)
    late.eval()
    model.train()  # a trainer knows the model alone
    for k, (x, y) in enumerate(given):
        with late.as_member(k) as held:
            assert held is model
            loss = functional.cross_entropy(model(x), y)
            (0.25 * loss).backward(retain_graph=True)
            (0.75 * loss).backward()
    for p, q in zip(late.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            agree(p.grad, q.grad, IDENTITY)
    assert equal(late, other)
    with pytest.raises(NQMError, match=r"member must lie in 0 \.\. 1; got 2"), late.as_member(2):
        raise AssertionError
    weight = model[2].weight
    with pytest.raises(RuntimeError, match="shapes cannot"), late.as_member(1):
        model(torch.ones(2, 3))
    assert model[2].weight is weight
    for name, use in (
        ("averaged", late.averaged),
        ("member", lambda: late.member(0)),
        ("state_dict", late.state_dict),
        ("deepcopy", lambda: copy.deepcopy(late)),
        ("optimizer_like", lambda: late.optimizer_like(base)),
        ("finish_cycle", lambda: late.finish_cycle(own, 2)),
        ("step", lambda: late.accumulate(given, functional.cross_entropy)),
    ):
        with (
            pytest.raises(NQMError, match=f"^{name} inside `with late.as_member"),
            late.as_member(1),
        ):
            use()
        assert model[2].weight is weight
    late.averaged()


@pytest.mark.parametrize("gamma", ["sum", "mean"])
def test_a_loop_by_hand_is_step(gamma):
    """Also where a trainer has divided the losses, and where a cycle is not complete."""
    late, base, own = begun(net(), 2, gamma=gamma)
    other, other_base, other_own = begun(copy.deepcopy(late.model), 2, gamma=gamma)
    for count in (2, 1, 2):
        given = batches(count)
        other.step(given, functional.cross_entropy, other_base, other_own)
        for k, (x, y) in enumerate(given):
            with late.as_member(k):
                (functional.cross_entropy(late.model(x), y) / 4.0).backward()
        if late.finish_cycle(own, count, divided_by=4.0):
            base.step()
        base.zero_grad()
        for p, q in zip(late.parameters(), other.parameters(), strict=True):
            agree(p.detach(), q.detach(), IDENTITY)
    for wrong, told in (
        ((own, 3), "finish_cycle: count must be at most 2; got 3"),
        ((own, 0), "finish_cycle: count must be"),
        ((base, 2), r"member_optimizer must be made on late\.member_parameters"),
        ((own, 2), "finish_cycle: the members have no gradient"),
    ):
        with pytest.raises(NQMError, match=told):
            late.finish_cycle(*wrong)
    late, base, own = begun(net(), 2, idle_steps="every")
    with pytest.raises(NQMError, match="finish_cycle needs idle_steps='none'"):
        late.finish_cycle(own, 2)

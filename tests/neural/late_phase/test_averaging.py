"""One model out of K members, and averages over time, against closed forms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

from neural import LatePhase, add_lora, add_rank1, ema, fold, recompute_statistics, swa
from nqm import NQMError
from tests.tolerances import IDENTITY, agree

MEMBERS = 3
#: Affine maps are composed in another order.
AFFINE = 1e-10


pytestmark = pytest.mark.usefixtures("double")


class ConvNet(nn.Module):
    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.norm1 = nn.BatchNorm2d(4, **norm)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.norm2 = nn.BatchNorm2d(5, **norm)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def images(rows: int = 6) -> Tensor:
    return 1.0 + 2.0 * torch.randn(rows, 2, 6, 6)


def apart(model: nn.Module, select: str = "batchnorm+head", members: int = MEMBERS) -> LatePhase:
    """Members that differ in weights and statistics."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    late = LatePhase(model, members, select, noise=0.3, seed=1)
    with torch.no_grad():
        for name, value in late._statistics().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand_like(value))
            elif name.endswith("running_mean"):
                value.copy_(torch.randn_like(value))
            else:
                value.copy_(torch.arange(members))
    return late


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in now)


# ------------------------------------------------------------------ one model


@given(
    members=st.integers(2, 5),
    select=st.sampled_from(["all", "head", "batchnorm", "batchnorm+head", "bias", "name:conv*"]),
)
def test_averaged_weights_and_statistics_are_means(members, select):
    late = apart(ConvNet(), select, members)
    state = late.averaged().state_dict()
    own = late._weights() | late._statistics()
    for name, value in state.items():
        if name not in own:
            assert torch.equal(value, late.model.state_dict()[name])
        elif value.is_floating_point():
            rows = [own[name][k].detach() for k in range(members)]
            agree(value, sum(rows) / members, IDENTITY)
        else:
            assert int(value) == members - 1


@pytest.mark.parametrize("how", ["averaged", "outputs", "member"])
def test_a_plain_module_that_any_code_takes(how):
    late = apart(ConvNet(), "all")
    before = snapshot(late)
    single = {
        "averaged": late.averaged,
        "outputs": lambda: late.averaged(batchnorm="outputs"),
        "member": lambda: late.member(1),
    }[how]()
    assert type(single) is ConvNet
    assert ConvNet().load_state_dict(single.state_dict(), strict=True)
    assert single.training
    for p in single.parameters():
        p.data.zero_()
    assert unchanged(late, before)
    assert not late.eval().averaged().training


def test_averaging_heads_is_averaging_outputs():
    late = apart(ConvNet(), "head").eval()
    x = images()
    mean = sum(late(x, member=k) for k in range(MEMBERS)) / MEMBERS
    agree(late.averaged()(x).detach(), mean.detach(), IDENTITY)


@pytest.mark.parametrize("select", ["batchnorm+head", "all", "head"])
def test_identical_members_average_to_the_model(select):
    model = ConvNet()
    model(images())
    before = snapshot(model)
    late = LatePhase(model, 4, select)
    for batchnorm in ("weights", "outputs"):
        after = late.averaged(batchnorm=batchnorm).state_dict()
        for name, value in before.items():
            agree(after[name], value, IDENTITY)


@pytest.mark.parametrize("select", ["batchnorm+head", "all"])
def test_members_alone_do_as_within(select):
    late = apart(ConvNet(), select).eval()
    x = images()
    for k in range(MEMBERS):
        agree(late.member(k)(x).detach(), late(x, member=k).detach(), IDENTITY)


NORMS: dict[str, tuple[dict[str, Any], str]] = {
    "scale and shift": ({}, "batchnorm"),
    "scale alone": ({}, "name:norm*.weight"),
    "shift alone": ({}, "name:norm*.bias"),
    "no scale": ({"affine": False}, "batchnorm+head"),
}


@pytest.mark.parametrize("case", list(NORMS))
def test_batchnorm_outputs_are_averaged_layer_by_layer(case):
    """The mean of K affine maps, whichever of their parts are replicated."""
    norm, select = NORMS[case]
    late = apart(ConvNet(**norm), select).eval()
    single = late.averaged(batchnorm="outputs")
    members = [late.member(k) for k in range(MEMBERS)]
    for layer, width in (("norm1", 4), ("norm2", 5)):
        x = 1.0 + 2.0 * torch.randn(7, width, 3, 3)
        outputs = [member.get_submodule(layer)(x) for member in members]
        mean = (sum(outputs) / MEMBERS).detach()
        agree(single.get_submodule(layer)(x).detach(), mean, AFFINE)
        by_weights = late.averaged().get_submodule(layer)(x).detach()
        assert (by_weights - mean).abs().max() > 1e-3  # close to it, and not the same


def test_batchnorm_without_shift_and_with_a_scale_of_zero():
    late = apart(nn.Sequential(nn.BatchNorm1d(3, bias=False), nn.Linear(3, 2)), "batchnorm").eval()
    with torch.no_grad():
        late._weights()["0.weight"][:, 1] = 0.0
    x = torch.randn(9, 3)
    mean = sum(late.member(k)[0](x) for k in range(MEMBERS)) / MEMBERS
    agree(late.averaged(batchnorm="outputs")[0](x).detach(), mean.detach(), AFFINE)


def test_shared_batchnorm_is_left_as_it_is():
    late = apart(ConvNet(), "head")
    before = snapshot(late.model)
    after = late.averaged(batchnorm="outputs").state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before if "norm" in n)


# ------------------------------------------------------------------ weights of another form


def test_factors_and_products_by_hand():
    """W = 1; (s, r) = (1, 1) and (3, 5): factors 2 * 3 = 6, products (1 + 15) / 2 = 8."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    add_rank1(model)
    late = LatePhase(model, 2, "rank1")
    with torch.no_grad():
        late._weights()["parametrizations.weight.0.s"][1] = 3.0
        late._weights()["parametrizations.weight.0.r"][1] = 5.0
    assert late.averaged().weight.item() == 6.0
    assert late.averaged(rank1="product").weight.item() == 8.0
    assert [late.member(k).weight.item() for k in range(2)] == [1.0, 15.0]


@pytest.mark.parametrize("make", [ConvNet, Recurrent])
@pytest.mark.parametrize("rank1", ["factors", "product"])
def test_averaged_factors_fold_into_plain_layers(make, rank1):
    model = make()
    plain = list(model.state_dict())
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = add_rank1(model)
    late = LatePhase(model, MEMBERS, "rank1", noise=0.4)
    x = images() if make is ConvNet else torch.randn(6, 7, 4)
    late(x, member=0).sum().backward()  # a layer that has run must copy, too
    before = snapshot(late)
    single = late.averaged(rank1=rank1)
    assert type(single) is make
    assert not any(parametrize.is_parametrized(module) for module in single.modules())
    assert sorted(single.state_dict()) == sorted(plain)
    make().load_state_dict(single.state_dict(), strict=True)
    for name in names:
        path, _, own = name.rpartition(".")
        s, r = (late._weights()[f"{path}.parametrizations.{own}.0.{f}"].detach() for f in "sr")
        factors = torch.einsum("o,i->oi", s.mean(0), r.mean(0))
        products = torch.einsum("ko,ki->oi", s, r) / MEMBERS
        mean = factors if rank1 == "factors" else products
        mean = mean.reshape(mean.shape + (1,) * (weights[name].ndim - 2))
        agree(single.get_parameter(name).detach(), weights[name] * mean, IDENTITY)
    single(x)
    assert unchanged(late, before)
    for k in range(MEMBERS):  # and the original goes on
        agree(late.eval()(x, member=k).detach(), late.member(k)(x).detach(), IDENTITY)
    fold(copy.deepcopy(model))
    model(x)


@pytest.mark.parametrize("make", [ConvNet, Recurrent])
def test_adding_factors_and_updates_changes_nothing_until_trained(make):
    model = make().eval()
    x = images() if make is ConvNet else torch.randn(6, 7, 4)
    before, keys = model(x).detach(), set(model.state_dict())
    for add in (add_rank1, add_lora):
        changed = copy.deepcopy(model)
        before_ids = {id(p) for p in changed.parameters()}
        names = add(changed)
        assert before_ids <= {id(p) for p in changed.parameters()}  # an optimizer goes on
        assert names
        assert set(names) <= keys
        agree(changed(x).detach(), before, IDENTITY)
        folded = fold(changed)
        assert {id(p) for p in folded.parameters()} == before_ids
        assert set(folded.state_dict()) == keys
        agree(folded(x).detach(), before, IDENTITY)


def test_low_rank_update_by_hand():
    """W + alpha / rank B A."""
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()
    add_lora(model, rank=2, alpha=6.0)
    low = model.parametrizations["weight"][0]
    with torch.no_grad():
        low.B.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
        low.A.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]]))
    update = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 5.0]])
    agree(model.weight.detach(), weight + 3.0 * update, IDENTITY)
    agree(fold(model).weight.detach(), weight + 3.0 * update, IDENTITY)


def test_the_rank1_form_is_that_of_batch_ensemble():
    """((x * r) W^T) * s, activations instead of weights."""
    model = nn.Linear(4, 3, bias=False)
    weight = model.weight.detach().clone()
    add_rank1(model)
    factors = model.parametrizations["weight"][0]
    with torch.no_grad():
        factors.s.copy_(torch.randn(3))
        factors.r.copy_(torch.randn(4))
    x = torch.randn(5, 4)
    expected = (x * factors.r) @ weight.T * factors.s
    agree(model(x).detach(), expected.detach(), IDENTITY)


def test_where_and_its_mistakes():
    model = Recurrent()
    assert add_rank1(model, "lstm.weight_hh*") == ["lstm.weight_hh_l0", "lstm.weight_hh_l1"]
    with pytest.raises(NQMError, match=r"'fc.\*' matches no weight of a Linear"):
        add_rank1(model, "fc.*")
    with pytest.raises(NQMError, match="rank must be an integer >= 1; got 0"):
        add_lora(model, 0)


# ------------------------------------------------------------------ models of other libraries


def train_once(model: nn.Module, fresh: nn.Module, select: str, fused: bool) -> None:
    late = LatePhase(model, 2, select)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {n: p.detach().clone() for n, p in late.named_parameters()}
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(4, (2,))) for _ in range(2)]
    own = late.optimizer_like(base)
    losses = late.step(batches, functional.cross_entropy, base, own, fused=fused)
    assert losses.isfinite().all()
    moved = [n for n, p in late.named_parameters() if not torch.equal(p, before[n])]
    assert any(n.startswith("stacked.") for n in moved)
    assert any(n.startswith("model.") for n in moved)
    single = late.averaged(batchnorm="outputs").eval()
    assert type(single) is type(fresh)
    fresh.load_state_dict(single.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(batches[0][0]), single(batches[0][0]))


@pytest.mark.parametrize("fused", [False, True])
def test_torchvision_resnet18(fused):
    pytest.importorskip(
        "neural.models._torchvision",
        reason="torchvision is imported through neural.models._torchvision",
    )
    if not find_spec("torchvision"):
        pytest.skip("torchvision is not installed")
    from neural.models._torchvision import import_torchvision

    torch.set_default_dtype(torch.float32)
    make = import_torchvision().models.resnet18
    train_once(make(num_classes=4), make(num_classes=4), "batchnorm+head", fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "select"), [
    ("resnet10t", "batchnorm+head"), ("vit_tiny_patch16_224", "layernorm+head"),
])  # fmt: skip
def test_timm_models(name, select, fused):
    if not find_spec("timm"):
        pytest.skip("timm is not installed")
    pytest.importorskip(
        "neural.models._torchvision",
        reason="timm imports torchvision, see neural.models._torchvision",
    )
    from neural.models._torchvision import import_torchvision

    import_torchvision()
    import timm

    torch.set_default_dtype(torch.float32)
    size = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
    models = [timm.create_model(name, pretrained=False, num_classes=4, **size) for _ in range(2)]
    train_once(models[0], models[1], select, fused)


# ------------------------------------------------------------------ averages over time


def walk(late: LatePhase, steps: int) -> Iterator[dict[str, Tensor]]:
    """Training in which everything moves; every snapshot of the state."""
    base = torch.optim.SGD(late.model.parameters(), lr=0.1)
    own = late.optimizer_like(base)
    for _ in range(steps):
        batches = [(images(), torch.randint(3, (6,))) for _ in range(late.members)]
        late.step(batches, functional.cross_entropy, base, own)
        yield snapshot(late)


def test_swa_is_the_running_mean_of_base_and_members():
    late = LatePhase(ConvNet(), MEMBERS, noise=0.1)
    average, seen = swa(late), []
    for state in walk(late, 5):
        average.update_parameters(late)
        seen.append(state)
    parameters = {n for n, _ in late.named_parameters()}
    for name, value in average.module.state_dict().items():
        mean = sum(state[name] for state in seen) / len(seen)
        agree(value, mean if name in parameters else seen[-1][name], IDENTITY)
    mean_head = sum(s["stacked.head/weight"] for s in seen) / len(seen)
    single = average.module.averaged()
    agree(single.head.weight.detach(), mean_head.mean(0), IDENTITY)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.7, 0.99])
def test_ema_is_the_closed_form(decay):
    """First snapshot, then decay^(n-1) x_1 + (1 - decay) sum_i decay^(n-i) x_i; counters copied."""
    late = LatePhase(ConvNet(), 10, noise=0.1)
    average, seen = ema(late, decay), []
    for state in walk(late, 4):
        average.update_parameters(late)
        seen.append(state)
    n = len(seen)
    weights = [decay ** (n - 1), *((1 - decay) * decay ** (n - i) for i in range(2, n + 1))]
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            agree(value, sum(w * s[name] for w, s in zip(weights, seen, strict=True)), IDENTITY)
        else:
            assert torch.equal(value, seen[-1][name])
    assert average.module.index.tolist() == list(range(10))
    x = images()
    for k in range(10):
        expected = average.module.eval().member(k)(x).detach()
        agree(average.module(x, member=k).detach(), expected, IDENTITY)


def test_averages_of_recurrent_rank1_members():
    model = Recurrent()
    add_rank1(model)
    late = LatePhase(model, 2, "rank1")
    x = torch.randn(6, 7, 4)
    late(x, member=0).sum().backward()
    for average in (swa(late), ema(late, 0.5), swa(model)):
        assert average.module is not late
    agree(swa(late).module(x, member=0).detach(), late(x, member=0).detach(), IDENTITY)


@pytest.mark.parametrize("decay", [1.0, -0.1, True])
def test_decay_is_a_number_below_one(decay):
    with pytest.raises(NQMError, match=r"decay must lie in \[0, 1\)"):
        ema(nn.Linear(1, 1), decay)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(images(rows), torch.zeros(rows)) for rows in range(4, 4 + count)]


def modes(module: nn.Module) -> list[tuple[bool, Any]]:
    return [(m.training, getattr(m, "momentum", None)) for m in module.modules()]


def test_statistics_of_a_plain_model_are_those_of_torch():
    model = ConvNet(momentum=0.3)
    for x, _ in batches():
        model(x)
    model.norm2.eval()
    reference, before, data = copy.deepcopy(model), modes(model), batches()
    update_bn(data, reference)
    recompute_statistics(model, data)
    assert modes(model) == before
    for name, value in reference.state_dict().items():
        agree(model.state_dict()[name], value, IDENTITY)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("select", ["batchnorm+head", "all", "name:norm1.weight"])
def test_every_member_sees_every_batch(select, training):
    late = apart(ConvNet(momentum=0.3), select).train(training)
    members, before, data = [late.member(k) for k in range(MEMBERS)], modes(late), batches()
    weights = {n: p.detach().clone() for n, p in late.named_parameters()}
    recompute_statistics(late, data)
    assert modes(late) == before
    assert all(torch.equal(p, weights[n]) for n, p in late.named_parameters())
    for k, member in enumerate(members):
        update_bn(data, member)
        for name, value in late._statistics().items():
            agree(value[k], member.get_buffer(name), IDENTITY)


def test_statistics_of_an_average_over_time():
    late, data = apart(ConvNet()), batches()
    average = swa(late)
    average.update_parameters(late)
    recompute_statistics(average, data)
    recompute_statistics(late, data)
    for name, value in late._statistics().items():
        assert torch.equal(average.module._statistics()[name], value)


def test_shared_statistics_are_means_over_members_and_batches():
    late, data = apart(ConvNet(), "name:conv1.*"), batches()
    recompute_statistics(late, data)
    means = []
    for x, _ in data:
        for k in range(MEMBERS):
            means.append(late.member(k).conv1(x).mean((0, 2, 3)).detach())
    agree(late.model.norm1.running_mean, sum(means) / len(means), IDENTITY)


def test_statistics_of_other_layers_stay():
    """Instance normalisation keeps statistics, too; they are not asked for."""
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), norm, nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )
    late = apart(model, "norm")
    before = {n: b.clone() for n, b in late._statistics().items()}
    data = batches()
    recompute_statistics(late, data)
    after = late._statistics()
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("1."))
    # Dropout would not be seen here; instance statistics of evaluation mode are.
    for k in range(MEMBERS):
        member = late.member(k).eval()
        means = [member[1](member[0](x)).mean((0, 2, 3)).detach() for x, _ in data]
        agree(after["2.running_mean"][k], sum(means) / len(means), IDENTITY)


def test_modes_and_momenta_come_back_after_an_exception():
    late = LatePhase(ConvNet(momentum=0.3), 2)
    before = modes(late)
    with pytest.raises(RuntimeError):
        recompute_statistics(late, [(torch.zeros(3, 7, 6, 6), torch.zeros(3))])
    assert modes(late) == before
    plain = nn.Linear(2, 2)
    recompute_statistics(plain, iter(()))
    assert plain.training


@pytest.mark.parametrize("kind", ["plain", "members", "average"])
def test_no_batch_leaves_the_statistics(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    wrap: dict[str, Any] = {
        "plain": lambda m: m, "members": lambda m: LatePhase(m, 2), "average": swa,
    }  # fmt: skip
    module = wrap[kind](model)
    stream = iter([(torch.randn(8, 4) + 2.0, None)])
    recompute_statistics(module, stream)
    before = [buffer.clone() for buffer in module.buffers()]
    assert any(bool((one.abs() > 0.1).any()) for one in before)
    modes = [one.training for one in module.modules()]
    wrong = [(torch.randn(8, 3), None)]
    for data, error, told in ((stream, NQMError, "no batch"), (wrong, RuntimeError, "shapes")):
        with pytest.raises(error, match=told):
            recompute_statistics(module, data)
        for one, buffer in zip(before, module.buffers(), strict=True):
            assert torch.equal(one, buffer)
        assert [one.training for one in module.modules()] == modes


def test_minibatches_may_count_by_their_size() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3).double()
    parts = [torch.randn(n, 3, dtype=torch.double) for n in (8, 8, 2)]
    for by_size, weights in ((False, [1, 1, 1]), (True, [8, 8, 2])):
        recompute_statistics(layer, [(part, None) for part in parts], by_size=by_size)
        share = torch.tensor(weights).double() / sum(weights)
        for name, each in (
            ("running_mean", [part.mean(0) for part in parts]),
            ("running_var", [part.var(0) for part in parts]),
        ):
            found = getattr(layer, name)
            agree(found, (share[:, None] * torch.stack(each)).sum(0), IDENTITY)
    assert layer.momentum == 0.1


def test_dropout_is_off_unless_it_is_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    data = [(torch.ones(4000, 1), None)]
    recompute_statistics(model, data)
    assert cast(Tensor, model[1].running_var).item() == 0.0
    recompute_statistics(model, data, dropout=True)
    # Ones become 0 or 2: variance 1, with a standard error of 1 / sqrt(4000) of the mean.
    assert cast(Tensor, model[1].running_var).item() == pytest.approx(1.0, abs=0.01)
    assert cast(Tensor, model[1].running_mean).item() == pytest.approx(1.0, abs=0.1)
    assert model.training


@pytest.mark.parametrize(
    ("by_size", "weights"), [(False, [1.0, 1.0, 1.0]), (True, [8.0, 8.0, 2.0])]
)
def test_statistics_that_members_share_are_means_over_members_too(by_size, weights):
    """A first layer without members of its own gets the same input from each of them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    late = LatePhase(model, members=2, select="head", noise=0.5)
    parts = [torch.randn(n, 4, dtype=torch.float64) for n in (8, 8, 2)]
    recompute_statistics(late, [(part, None) for part in parts], by_size=by_size)
    first = np.average([part.mean(0).numpy() for part in parts], axis=0, weights=weights)
    np.testing.assert_allclose(model[0].running_mean.numpy(), first, rtol=1e-12)
    seen = [[functional.linear(functional.batch_norm(part, None, None, training=True, eps=1e-5),
                               late.stacked["1/weight"][k], late.stacked["1/bias"][k]).mean(0)
             for k in range(2)] for part in parts]  # fmt: skip
    last = np.average([torch.stack(both).mean(0).detach().numpy() for both in seen], axis=0,
                      weights=weights)  # fmt: skip
    np.testing.assert_allclose(model[2].running_mean.numpy(), last, rtol=1e-10)


def test_a_layer_that_runs_twice_counts_both():
    layer = nn.BatchNorm1d(3)
    module = nn.Sequential(layer, layer).double()
    data = torch.randn(8, 3, dtype=torch.float64) * 2.0
    recompute_statistics(module, [(data, None)])
    # The second pass sees the result of the first: mean 0 and variance v / (v + eps).
    v = data.var(0)
    biased = data.var(0, correction=0)
    second = v / (biased + layer.eps)
    torch.testing.assert_close(layer.running_var, (v + second) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_mean, data.mean(0) / 2, rtol=1e-12, atol=1e-15)
    assert int(layer.num_batches_tracked) == 2

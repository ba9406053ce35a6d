"""Copies of models that have been trained, whatever they hold on to; pickles; weights folded."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from neural import LatePhase, add_lora, add_rank1, ema, fold, swa
from neural.late_phase.duplicate import duplicate
from tests.tolerances import IDENTITY, agree

pytestmark = pytest.mark.usefixtures("double")


class Recurrent(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)
        wrap(self.lstm)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None])[0][:, -1])


class Cache(nn.Module):
    """Keeps what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["hidden"] = [torch.tanh(self.first(x))]
        return self.head(self.seen["hidden"][0])


def net(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))


def hooked(wrap: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: net(wrap)


HOLDING: dict[str, Callable[[], nn.Module]] = {
    "weight_norm by hooks": hooked(nn.utils.weight_norm),
    "spectral_norm by hooks": hooked(nn.utils.spectral_norm),
    "weight_norm": hooked(parametrizations.weight_norm),
    "spectral_norm": hooked(parametrizations.spectral_norm),
    "orthogonal": hooked(parametrizations.orthogonal),
    "weight_norm of a recurrent layer": lambda: Recurrent(
        lambda lstm: parametrizations.weight_norm(lstm, "weight_hh_l0")
    ),
    "rank-1 of a recurrent layer": lambda: Recurrent(add_rank1),
    "a cache": Cache,
}


def trained(model: nn.Module, select: str) -> LatePhase:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    late = LatePhase(model, 2, select, noise=0.1)
    own = late.optimizer_like(base)
    for _ in range(2):
        batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
        late.step(batches, functional.cross_entropy, base, own)
    return late.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("select", ["head", "all"])
@pytest.mark.parametrize("case", list(HOLDING))
def test_one_model_comes_out_of_every_training(case, select):
    late = trained(HOLDING[case](), select)
    x = torch.randn(6, 4)
    for k in range(2):
        expected = late(x, member=k).detach()
        if select == "all" and case.startswith("spectral_norm"):
            single = late.member(k)  # its vectors are exact, those of training come close
            single(x)
            top = torch.linalg.matrix_norm(single[0].weight.detach(), 2)
            agree(top, 1.0, IDENTITY)
        else:
            agree(late.member(k)(x).detach(), expected, IDENTITY)
        agree(copy.deepcopy(late)(x, member=k).detach(), expected, IDENTITY)
        agree(swa(late).module(x, member=k).detach(), expected, IDENTITY)
    kept = late.model.state_dict()
    ours = late.averaged()
    if select == "head":  # the mean of heads is the mean of outputs
        mean = (late(x, member=0) + late(x, member=1)) / 2
        agree(ours(x).detach(), mean.detach(), IDENTITY)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert all(torch.equal(kept[name], v) for name, v in late.model.state_dict().items())
    average = ema(late, 0.5)
    average.update_parameters(late)
    agree(average.module.averaged()(x).detach(), late.averaged()(x).detach(), IDENTITY)


def test_a_duplicate_computes_from_its_own_weights():
    model = HOLDING["a cache"]()
    x = torch.randn(2, 4)
    expected = model(x)
    twin = duplicate(model)
    assert not twin.seen["hidden"][0].requires_grad
    assert torch.equal(twin.seen["hidden"][0], model.seen["hidden"][0])
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.first.weight.zero_()
        twin.first.bias.zero_()
    assert torch.equal(twin(x), twin.head.bias.expand(2, 3))
    assert torch.equal(model(x), expected)


# ------------------------------------------------------------------ weights with factors


class Language(nn.Module):
    """Its output layer is tied to its embedding, as is common."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x)))


@pytest.mark.parametrize("add", [
    lambda model: add_rank1(model, "head*"), lambda model: add_lora(model, 2, where="head*"),
], ids=["rank1", "lora"])  # fmt: skip
def test_factors_on_a_tied_weight_leave_the_other_layer_alone(add):
    """By hand: the head is W (s r') or W + B A, the embedding is W."""
    model = Language()
    add(model)
    term = "lora" if hasattr(model.head.parametrizations.weight[0], "A") else "rank1"
    late = LatePhase(model, 3, term, noise=0.4)
    w, x = model.embedding.weight.detach().clone(), torch.randint(7, (4, 5))

    def by_hand(one: Callable[[str], Tensor]) -> Tensor:
        factors = {
            n: one(f"head.parametrizations.weight.0.{n}") for n in ("sr", "BA")[term == "lora"]
        }
        if term == "rank1":
            head = w * torch.outer(factors["s"], factors["r"])
        else:
            head = w + factors["B"] @ factors["A"]
        return model.norm(functional.embedding(x, w)).detach() @ head.T

    stacked = {name: value.detach() for name, value in late._weights().items()}
    with pytest.warns(UserWarning, match=r"head\.weight is tied to another layer's weight"):
        members = [late.member(k) for k in range(3)]
    singles = {
        "factors": late.averaged(), "product": late.averaged(rank1="product"),
        "folded": fold(copy.deepcopy(model)),
    }  # fmt: skip
    for k, single in enumerate(members):
        agree(single(x).detach(), by_hand(lambda n, k=k: stacked[n][k]), IDENTITY)
        agree(late(x, member=k).detach(), by_hand(lambda n, k=k: stacked[n][k]), IDENTITY)
    agree(singles["factors"](x).detach(), by_hand(lambda n: stacked[n].mean(0)), IDENTITY)
    each = [by_hand(lambda n, k=k: stacked[n][k]) for k in range(3)]
    agree(singles["product"](x).detach(), sum(each) / 3, IDENTITY)
    agree(singles["folded"](x).detach(), model(x).detach(), IDENTITY)
    for single in [*members, *singles.values()]:
        assert torch.equal(single.embedding.weight, w)
    assert torch.equal(model.embedding.weight, w)
    assert model.head.parametrizations.weight.original is model.embedding.weight


def test_low_rank_updates_by_hand():
    """W = 1, (B, A) = (1, 2) and (3, 4): factors 1 + 2 * 3 = 7, products 1 + (2 + 12) / 2 = 8."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    add_lora(model, 1)
    late = LatePhase(model, 2, "lora")
    with torch.no_grad():
        late._weights()["parametrizations.weight.0.B"].copy_(torch.tensor([[[1.0]], [[3.0]]]))
        late._weights()["parametrizations.weight.0.A"].copy_(torch.tensor([[[2.0]], [[4.0]]]))
    assert late.averaged().weight.item() == 7.0
    assert late.averaged(rank1="product").weight.item() == 8.0


def test_a_weight_trained_by_its_update_alone_is_trainable_once_folded():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).requires_grad_(False)
    add_lora(model, 2, where="1.*")
    single = LatePhase(model, 2, "lora").averaged()
    assert {n: p.requires_grad for n, p in single.named_parameters()} == {
        "0.weight": False, "0.bias": False, "1.weight": True, "1.bias": False,
    }  # fmt: skip


@pytest.mark.parametrize("add", [add_rank1, lambda model: add_lora(model, 2)])
@pytest.mark.parametrize("make", [lambda: net(lambda layer: layer), lambda: Recurrent(lambda _: 0)])
def test_models_with_factors_are_pickled(make, add):
    model = make()
    add(model)
    late = LatePhase(model, 2, "all", noise=0.3)
    x = torch.randn(5, 4)
    expected = late(x, member=1)
    stream = io.BytesIO()
    torch.save(late, stream)
    stream.seek(0)
    for twin in (pickle.loads(pickle.dumps(late)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x, member=1), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            single = twin.averaged()
        agree(single(x).detach(), late.averaged()(x).detach(), IDENTITY)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(late(x, member=1), expected)
    copied = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model))))
    assert torch.equal(copied(x), model(x))

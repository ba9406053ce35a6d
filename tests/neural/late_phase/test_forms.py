"""Late-phase weights of every form: types, buffers, sparse gradients, data that does not divide."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from neural import LatePhase, add_lora, add_rank1, ema, swa
from neural.late_phase.merge import mean_products
from nqm import NQMError
from tests.literal_torch import LiteralLatePhase
from tests.tiny_nets import batches, net
from tests.tolerances import IDENTITY, agree

pytestmark = pytest.mark.usefixtures("double")


# ------------------------------------------------------------------ types


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_members_stay_wide_whatever_the_model_becomes(kind):
    late = LatePhase(net().float(), 2, "norm", noise=1e-4)
    before = [p.detach().clone() for p in late.member_parameters()]
    kept = late.member_parameters()
    late.to(kind)
    assert late.model[0].weight.dtype == kind
    for p, q, value in zip(late.member_parameters(), kept, before, strict=True):
        assert p is q
        assert p.dtype == torch.float32
        assert torch.equal(p, value)  # not rounded on the way
    assert late(torch.randn(2, 4).to(kind), member=0).dtype == kind
    assert late.averaged()[1].weight.dtype == kind
    late.double()
    assert all(p.dtype == torch.float64 for p in late.parameters())


@pytest.mark.parametrize("member", [np.int64(1), np.uint8(1), 1])
def test_a_member_is_any_integer(member):
    late = LatePhase(net(), 2, "norm", noise=0.3)
    x = torch.randn(2, 4)
    assert torch.equal(late(x, member=member), late(x, member=1))
    assert torch.equal(late.member(member)(x), late.member(1)(x))


@pytest.mark.parametrize("member", [1.0, True, "1", None])
def test_a_member_is_no_other_thing(member):
    late = LatePhase(net(), 2, "norm")
    for use in (lambda: late(torch.randn(2, 4), member=member), lambda: late.member(member)):
        with pytest.raises(NQMError, match="member must be an integer; got"):
            use()


class Waves(nn.Module):
    """A complex weight for every frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.w, 4))


def test_complex_weights():
    """Mean, perturbation and average over time of both parts."""
    model = Waves()
    late = LatePhase(model, 4000, "name:w", noise=0.3)
    w, start = late._weights()["w"].detach(), model.w.detach().clone()
    agree(torch.view_as_real(late.averaged().w.detach()), torch.view_as_real(w.mean(0)), IDENTITY)
    size = 0.3 * float(start.abs().square().mean().sqrt())
    moved = (w - start).abs().square().mean(0).numpy() / size**2
    # A mean of 4000 exponential numbers of mean 1: 4.5 standard errors.
    assert np.abs(moved - 1.0).max() < 4.5 / np.sqrt(4000)
    average = ema(model, 0.75)
    average.update_parameters(model)
    with torch.no_grad():
        model.w.add_(2.0 - 4.0j)
    average.update_parameters(model)
    agree(torch.view_as_real(average.module.w.detach()),
          torch.view_as_real(start + (0.5 - 1.0j)), IDENTITY)  # fmt: skip
    apart = LatePhase(model, 2, "name:w")
    with torch.no_grad():
        apart._weights()["w"].copy_(torch.tensor([[1 + 1j], [1 - 1j]]).expand(2, 3))
    assert apart.spread() == pytest.approx(1.0)


def test_an_outer_autocast_is_kept():
    late = LatePhase(net().float(), 2, "norm")
    seen: list[torch.dtype] = []

    def loss_fn(out: Tensor, targets: Tensor) -> Tensor:
        seen.append(out.dtype)
        return functional.cross_entropy(out.float(), targets)

    given = [(x.float(), y) for x, y in batches(2)]
    for fused in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            late.accumulate(given, loss_fn, fused=fused)
            late.accumulate(given, loss_fn, fused=fused, autocast=torch.bfloat16)
        late.accumulate(given, loss_fn, fused=fused)
    assert seen == 2 * ([torch.bfloat16] * 4 + [torch.float32] * 2)


class Lookup(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize("fused", [False, True])
def test_members_of_a_sparse_embedding(fused):
    dense, sparse = (LatePhase(Lookup(kind), 2, "name:embedding.*") for kind in (False, True))
    sparse.load_state_dict(dense.state_dict())
    given = [(torch.randint(9, (6, 2)), torch.randint(3, (6,))) for _ in range(2)]
    for late in (dense, sparse):
        late.accumulate(given, functional.cross_entropy, fused=fused)
    for p, q in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            agree(q.grad.to_dense(), p.grad, IDENTITY)


def test_models_that_cannot_be_trained_so_are_told():
    lazy = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
    uses = {
        "LatePhase": lambda m: LatePhase(m, 2, "all"), "add_rank1": add_rank1, "swa": swa,
        "ema": lambda m: ema(m, 0.9),
    }  # fmt: skip
    for name, use in uses.items():
        with pytest.raises(NQMError, match=rf"{name}: 0\.weight has no shape yet; first run the"):
            use(lazy)
    lazy(torch.randn(2, 4))
    assert LatePhase(lazy, 2, "all").selection.parameters[0] == "0.weight"
    script = torch.jit.script(nn.Linear(4, 3).float())
    with pytest.raises(NQMError, match="LatePhase takes a Python module; got a script module"):
        LatePhase(nn.Sequential(script, nn.Linear(3, 3)), 2, "head")
    with pytest.raises(NQMError, match=r"takes a torch\.nn\.Module; got function"):
        LatePhase(lambda x: x, 2)


# ------------------------------------------------------------------ buffers


def test_members_have_their_own_vectors_of_spectral_normalisation():
    """As deep copies of the model do, each trained by itself on its own minibatches."""

    def make(model: nn.Module, names: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for n, p in model.named_parameters() if n in names], lr=0.1)

    model = nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    late = LatePhase(model, 3, "name:0.*", noise=0.2)
    own = late.optimizer_like(base)
    literal = LiteralLatePhase(twin, 3, late.selection.parameters, late.selection.buffers, make)
    with torch.no_grad():
        for name, rows in late._weights().items():
            for row, one in zip(rows, literal.copies, strict=True):
                one.get_parameter(name).copy_(row)
    twin_base = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(5):
        given = batches(3)
        losses = late.step(given, functional.cross_entropy, base, own)
        agree(losses, literal.step(given, functional.cross_entropy, twin_base), IDENTITY)
    for name, rows in late._statistics().items():
        assert name.endswith(("_u", "_v"))
        assert not torch.equal(rows[0], rows[1])
        for row, one in zip(rows, literal.copies, strict=True):
            agree(row, one.get_buffer(name), IDENTITY)
    single = late.eval().averaged()
    mean = late._weights()["0.parametrizations.weight.original"].detach().mean(0)
    agree(single[0].weight.detach(), mean / torch.linalg.matrix_norm(mean, 2), IDENTITY)


class Quantised(nn.Module):
    """A mask of -inf, a range that begins infinite, a table of whole numbers, beside a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("table", torch.arange(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.low = torch.minimum(self.low, x.min())
        return ((x @ x.T + self.mask).softmax(-1) @ x)[:, self.table] * self.scale


def test_averages_keep_what_is_not_finite():
    model = Quantised()
    mask = model.mask.clone()
    late = LatePhase(model, 2, "all")
    keys = list(late.state_dict())
    assert "statistics./table" not in keys
    averages = [ema(model, 0.75), swa(model), ema(late, 0.75)]
    for one in averages:
        one.update_parameters(late if one is averages[2] else model)
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 6.0], [7.0, 8.0, 9.0]])
    model(x)
    late(2 * x, member=1)
    assert late._statistics()["low"].tolist() == [torch.inf, -10.0]
    for one in averages:
        one.update_parameters(late if one is averages[2] else model)
        assert torch.equal(one.module.state_dict().get("mask", mask), mask)
    assert averages[0].module.low == -5.0  # infinity and -5: the newest
    model(x - 4.0)
    averages[0].update_parameters(model)
    assert averages[0].module.low == -5.0 + 0.25 * (-9.0 + 5.0)
    assert averages[2].module._statistics()["low"].tolist() == [torch.inf, -10.0]
    single = late.averaged()
    assert torch.equal(single.mask, mask)
    assert torch.equal(single.table, torch.arange(3))
    assert single(x).isfinite().all()


def test_factors_of_another_library_are_averaged_when_asked_for():
    """The mean of B A is not the mean of B times that of A: the caller says which is meant."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 3).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))

    late = LatePhase(nn.Sequential(Adapted()), 2, "name:*lora*", noise=0.5)
    with pytest.raises(NQMError, match=r"averaged: 0\.lora_A\.default\.weight is a factor"):
        late.averaged()
    single = late.averaged(rank1="factors")
    name = "0.lora_A.default.weight"
    agree(single.get_parameter(name).detach(), late._weights()[name].detach().mean(0), IDENTITY)
    late.member(0)


def test_the_mean_of_low_rank_updates_is_that_of_concatenated_factors():
    """Sum w_k s B_k A_k = [B_1 ... B_K] [w_1 s A_1; ...; w_K s A_K], peft's combination "cat"."""
    model = nn.Sequential(nn.Linear(5, 4))
    base = model[0].weight.detach().clone()
    (name,) = add_lora(model, rank=2, alpha=6.0)
    scale = 3.0
    down, up = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    prefix = "0.parametrizations.weight.0"
    with torch.no_grad():
        found = mean_products(model, {f"{prefix}.A": down, f"{prefix}.B": up})[name]
    wide_down = torch.cat([scale / 3 * one for one in down], 0)
    wide_up = torch.cat(list(up), 1)
    assert wide_down.shape == (6, 5)
    agree(found, base + wide_up @ wide_down, IDENTITY)
    # The product of mean factors lacks their covariance, sum (B_k - mean B) (A_k - mean A) / 3.
    of_means = base + scale * up.mean(0) @ down.mean(0)
    covariance = sum((b - up.mean(0)) @ (a - down.mean(0)) for a, b in zip(down, up, strict=True))
    agree(found - of_means, scale / 3 * covariance, IDENTITY)
    assert (found - of_means).norm() > 0.1 * (found - base).norm()


# ------------------------------------------------------------------ data that does not divide


def test_carried_minibatches_are_resumed():
    """Against training without a break: five minibatches, three members, two epochs."""
    data = [batches(5), batches(5)]

    def begin() -> tuple[LatePhase, Any, Any]:
        torch.manual_seed(4)
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        late = LatePhase(model, 3, "norm")
        return late, base, late.optimizer_like(base)

    def train(parts: tuple[LatePhase, Any, Any], epoch: int) -> int:
        late, base, own = parts
        cycles = late.cycles(data[epoch])
        return len([late.step(one, functional.cross_entropy, base, own) for one in cycles])

    whole = begin()
    assert [train(whole, epoch) for epoch in range(2)] == [1, 2]
    first = begin()
    train(first, 0)
    stream = io.BytesIO()
    torch.save([one.state_dict() for one in first], stream)
    stream.seek(0)
    second = begin()
    list(second[0].cycles(batches(2)))  # what it carries itself is not the checkpoint's
    for one, state in zip(second, torch.load(stream, weights_only=True), strict=True):
        one.load_state_dict(state)
    assert train(second, 1) == 2
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
    average = swa(second[0])
    average.load_state_dict(average.state_dict())
    list(second[0].cycles(batches(2)))
    assert "carried" not in second[0].state_dict()


@pytest.mark.parametrize("leftover", ["members", "drop"])
def test_more_members_than_minibatches_are_told_and_carried(leftover):
    """Else nothing, or the members alone, would ever train."""
    late = LatePhase(net(), 5, "norm", leftover=leftover)
    loader = [(k, None) for k in range(3)]
    full, rest = [0, 1, 2, 0, 1], [[2]] if leftover == "members" else []
    for _ in range(2):
        with pytest.warns(UserWarning, match="3 minibatches make no cycle of 5 members"):
            assert list(late.cycles(loader)) == []
        cycles = [[k for k, _ in one] for one in late.cycles(loader)]
        assert cycles == [full, *rest]


@pytest.mark.parametrize("buffers", [1, 2, 7])
def test_a_loader_that_fills_its_buffers_again(buffers):
    """Members wait for each other, and each keeps its own minibatch."""
    held = [torch.zeros(2) for _ in range(buffers)]

    def loader() -> Iterator[tuple[Tensor, int]]:
        for k in range(12):
            yield held[k % buffers].fill_(k), k

    late = LatePhase(net(), 3, "norm")
    seen = [[float(x[0]) for x, _ in cycle] for cycle in late.cycles(loader())]
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]

"""One forward pass for all members: the same numbers as member by member, for every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import agree
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from neural import LatePhase, add_lora, add_rank1
from nqm import NQMError

MEMBERS = 3
#: Sums over rows are taken in another order, by other kernels.
FUSED = 1e-10


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------ models, one for every kind


def image(rows: int) -> Tensor:
    return torch.randn(rows, 2, 6, 6)


def vector(rows: int) -> Tensor:
    return torch.randn(rows, 4)


def sequence(rows: int) -> Tensor:
    return torch.randn(rows, 7, 4)


def tokens(rows: int) -> Tensor:
    return torch.randint(5, (rows, 7))


def convnet(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 6, 3), norm(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def perceptron(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 3))


def with_rank1(model: nn.Module, where: str = "*") -> nn.Module:
    add_rank1(model, where)
    return model


def with_lora(model: nn.Module) -> nn.Module:
    add_lora(model, 2)
    return model


class Recurrent(nn.Module):
    """A recurrent layer, batch first or time first, with or without a state of its own making."""

    def __init__(
        self, make: type[nn.RNNBase] = nn.LSTM, batch_first: bool = True, state: bool = False
    ) -> None:
        super().__init__()
        self.rnn = make(4, 5, 2, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(10 + 5, 3)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        start: Any = None
        if self.state:
            start = x.mean(1)[:, :1].expand(-1, 5).repeat(4, 1, 1)
            start = (start, 2 * start) if isinstance(self.rnn, nn.LSTM) else start
        batch_first = self.rnn.batch_first
        out, last = self.rnn(x if batch_first else x.transpose(0, 1), start)
        out = out.mean(1 if batch_first else 0)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat([out, last[-1]], 1))


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.templates = nn.Parameter(0.3 * torch.randn(4, 2, 2, 3, 3))


class BankConv(nn.Module):
    """Convolution with the weight sum_j e_j T_j; the templates T are shared among layers."""

    def __init__(self, bank: Bank):
        super().__init__()
        self.bank = bank
        self.embedding = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, torch.tensordot(self.embedding, self.bank.templates, 1))


def bank_net() -> nn.Module:
    bank = Bank()
    return nn.Sequential(
        BankConv(bank), nn.BatchNorm2d(2), nn.ReLU(), BankConv(bank), nn.Flatten(), nn.Linear(8, 3)
    )


class Transformer(nn.Module):
    """A class token held by the model itself, and a block with attention."""

    def __init__(self, batch_first: bool = True, mask: bool = False) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(4, 3)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        hidden = (x[:, :, 0] > 1.0) if self.mask else None
        order = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if self.mask else None
        x = x if self.block.self_attn.batch_first else x.transpose(0, 1)
        x = self.block(x, src_mask=order, src_key_padding_mask=hidden)
        x = x if self.block.self_attn.batch_first else x.transpose(0, 1)
        return self.head(x[:, -1])


class Attention(nn.Module):
    """Attention alone, time first; its weights over positions are used, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        out, weights = self.attention(x, x, x)
        return out.mean(0)[:, :3] + weights.std((1, 2))[:, None]


class Tied(nn.Module):
    """Embedding and decoder are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.mix(self.embedding(x)))).mean(1)


class Windows(nn.Module):
    """Positions are folded into the rows in front of the normalised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.head(self.norm(x.flatten(0, 1)))
        return flat.view(*x.shape[:2], 3).mean(1)


class Named(nn.Module):
    """Two arguments and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.norm(x) + shift), "size": shift.abs().mean()}


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


Case = tuple[Callable[[], nn.Module], str, Callable[[int], Any]]
CASES: dict[str, Case] = {
    "BatchNorm2d and head": (convnet, "batchnorm+head", image),
    "BatchNorm1d": (lambda: perceptron(nn.BatchNorm1d), "batchnorm", vector),
    "BatchNorm1d on sequences": (Windows, "batchnorm+head", sequence),
    "BatchNorm without scale": (
        lambda: convnet(lambda n: nn.BatchNorm2d(n, affine=False)), "norm+head", image),
    "BatchNorm without statistics": (
        lambda: convnet(lambda n: nn.BatchNorm2d(n, track_running_stats=False)), "norm", image),
    "BatchNorm, cumulative": (
        lambda: convnet(lambda n: nn.BatchNorm2d(n, momentum=None)), "batchnorm", image),
    "BatchNorm shared": (convnet, "head", image),
    "BatchNorm without statistics shared": (
        lambda: convnet(lambda n: nn.BatchNorm2d(n, track_running_stats=False)), "head", image),
    "InstanceNorm": (
        lambda: convnet(lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)),
        "norm", image),
    "InstanceNorm shared": (
        lambda: convnet(lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)),
        "head", image),
    "LayerNorm": (lambda: perceptron(nn.LayerNorm), "layernorm+head", vector),
    "GroupNorm": (lambda: convnet(group_norm), "groupnorm", image),
    "RMSNorm": (lambda: perceptron(nn.RMSNorm), "rmsnorm", vector),
    "rank-1 on Linear": (lambda: with_rank1(perceptron(nn.LayerNorm)), "rank1", vector),
    "rank-1 on Conv, BatchNorm shared": (lambda: with_rank1(convnet()), "rank1", image),
    "rank-1 and BatchNorm": (lambda: with_rank1(convnet()), "rank1+batchnorm+head", image),
    "rank-1 on LSTM": (lambda: with_rank1(Recurrent()), "rank1", sequence),
    "rank-1 on LSTM, time first": (
        lambda: with_rank1(Recurrent(batch_first=False), "rnn.*"), "rank1", sequence),
    "rank-1 on LSTM with state": (lambda: with_rank1(Recurrent(state=True)), "rank1", sequence),
    "rank-1 on GRU, time first, with state": (
        lambda: with_rank1(Recurrent(nn.GRU, False, True)), "rank1", sequence),
    "weights of LSTM": (Recurrent, "name:rnn.weight*", sequence),
    "LoRA": (lambda: with_lora(convnet()), "lora", image),
    "LoRA on LSTM": (lambda: with_lora(Recurrent()), "lora+head", sequence),
    "template bank": (bank_net, "embedding", image),
    "template bank and BatchNorm": (bank_net, "embedding+batchnorm+head", image),
    "head": (lambda: perceptron(nn.LayerNorm), "head", vector),
    "biases": (Recurrent, "bias", sequence),
    "biases of attention": (Transformer, "bias", sequence),
    "class token": (Transformer, "name:cls_token", sequence),
    "output layer of attention": (Transformer, "name:*out_proj*", sequence),
    "attention and LayerNorm": (Transformer, "name:block.self_attn*+layernorm+head", sequence),
    "attention, with masks": (lambda: Transformer(mask=True), "bias", sequence),
    "attention, time first": (Attention, "all", sequence),
    "whole block, time first, with masks": (
        lambda: Transformer(False, True), "name:block.self_attn*+head", sequence),
    "tied weights": (Tied, "name:embedding.weight", tokens),
    "tied weights by their other name": (Tied, "name:decoder.weight", tokens),
    "whole network": (convnet, "all", image),
    "whole transformer": (Transformer, "all", sequence),
    "whole tied network": (Tied, "all", tokens),
}  # fmt: skip


def members_of(case: str, noise: float = 0.3) -> LatePhase:
    """Members that differ in weights and statistics."""
    make, select, _ = CASES[case]
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.add_(torch.rand_like(b))
    late = LatePhase(model, MEMBERS, select, noise=noise)
    with torch.no_grad():
        for value in late._statistics().values():
            value.add_(
                torch.rand_like(value) if value.is_floating_point() else torch.arange(MEMBERS)
            )
    return late


def batches_of(case: str, sizes: tuple[int, ...]) -> list[tuple[Any, Tensor]]:
    return [(CASES[case][2](rows), torch.randint(3, (rows,))) for rows in sizes]


def same_state(one: LatePhase, other: LatePhase) -> None:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            # Where the gradient is 0 in truth, as of a bias in front of BatchNorm.
            assert torch.allclose(p.grad, q.grad, rtol=FUSED, atol=1e-12), name
    for (_, b), (_, c) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        agree(b, c, FUSED)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 5, 2)], ids=["equal", "unequal"])
@pytest.mark.parametrize("case", list(CASES))
def test_fused_is_member_by_member(case, sizes):
    """Losses, base and member gradients, own and shared running statistics."""
    fused = members_of(case)
    apart = copy.deepcopy(fused)
    loss_fn = functional.cross_entropy
    for _ in range(2):
        batches = batches_of(case, sizes)
        expected = apart.accumulate(batches, loss_fn)
        agree(fused.accumulate(batches, loss_fn, fused=True), expected, FUSED)
        same_state(fused, apart)
    assert expected.std() > 0.01
    grads = [p.grad for p in fused.member_parameters()]
    assert all(g is not None and g.any() for g in grads)


@pytest.mark.parametrize("case", list(CASES))
def test_fused_in_evaluation_mode(case):
    late = members_of(case).eval()
    inputs = [x for x, _ in batches_of(case, (4, 3, 5))]
    before = copy.deepcopy(late.state_dict())
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            outputs = late.fused(inputs)
            for k, one in enumerate(inputs):
                agree(outputs[k].detach(), late(one, member=k).detach(), FUSED)
    assert all(torch.equal(before[n], v) for n, v in late.state_dict().items())


#: Kinds for which vmap has rules, and no shared running statistics are written.
BATCHABLE = [
    "BatchNorm2d and head", "BatchNorm1d", "BatchNorm1d on sequences", "LayerNorm", "GroupNorm",
    "RMSNorm", "rank-1 on Linear", "rank-1 and BatchNorm", "template bank and BatchNorm", "head",
    "class token", "attention and LayerNorm", "tied weights", "whole network", "LoRA",
    "BatchNorm without statistics",
]  # fmt: skip


@pytest.mark.parametrize("case", BATCHABLE)
def test_fused_is_vmap_over_stacked_members(case):
    """torch.func is the oracle: it knows nothing of slices."""
    late = members_of(case)
    shared_statistics = set(dict(late.model.named_buffers())) - set(late.selection.buffers)
    if shared_statistics:
        late.model.eval()  # vmap cannot write them
    model = late.model
    twin = copy.deepcopy(model)
    own = {n: w.detach().clone().requires_grad_() for n, w in late._weights().items()}
    statistics = {n: b.clone() for n, b in late._statistics().items()}
    shared = {
        n: p.detach().clone().requires_grad_() for n, p in twin.named_parameters() if n not in own
    }
    batches = batches_of(case, (4, 4, 4))
    inputs, targets = (torch.stack(parts) for parts in zip(*batches, strict=True))

    def loss(own: Any, statistics: Any, x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(twin, {**shared, **own, **statistics}, (x,))
        return functional.cross_entropy(out, y)

    losses = vmap(loss)(own, statistics, inputs, targets)
    losses.sum().backward()
    agree(late.accumulate(batches, functional.cross_entropy, fused=True), losses.detach(), FUSED)
    for name, weight in own.items():
        assert torch.allclose(late._weights()[name].grad, weight.grad, rtol=FUSED, atol=1e-12)
    for name, weight in shared.items():
        grad = model.get_parameter(name).grad
        assert torch.allclose(grad, weight.grad, rtol=FUSED, atol=1e-12)
    for name, value in statistics.items():
        agree(late._statistics()[name], value, FUSED)


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_several_arguments_and_results(form):
    late = LatePhase(Named(), MEMBERS, noise=0.3)
    apart = copy.deepcopy(late)
    given = [(vector(rows), vector(rows)) for rows in (3, 4, 5)]
    if form == "dict":
        inputs: list[Any] = [{"x": x, "shift": shift} for x, shift in given]
    else:
        inputs = [{"tuple": tuple, "list": list}[form](one) for one in given]
    batches = [
        (one, torch.randint(3, (len(pair[0]),))) for one, pair in zip(inputs, given, strict=True)
    ]

    def loss_fn(out: dict[str, Tensor], targets: Tensor) -> Tensor:
        return functional.cross_entropy(out["out"], targets)

    agree(late.accumulate(batches, loss_fn, fused=True), apart.accumulate(batches, loss_fn), FUSED)
    same_state(late, apart)


# ------------------------------------------------------------------ nothing is left behind


def marks(model: nn.Module) -> dict[str, list[str]]:
    return {path: sorted(vars(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize("case", ["BatchNorm2d and head", "whole transformer", "rank-1 on LSTM"])
def test_every_layer_is_as_before(case):
    late = members_of(case)
    model = late.model
    before, keys = marks(model), list(late.state_dict())
    types = [type(module) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    late.fused([x for x, _ in batches_of(case, (4, 4, 4))])
    assert marks(model) == before
    assert list(late.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all("forward" not in vars(module) for module in model.modules())


def test_every_layer_is_as_before_after_an_exception():
    late = members_of("BatchNorm2d and head")
    before, layer = marks(late.model), late.model[4]

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = layer.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        late.fused([x for x, _ in batches_of("BatchNorm2d and head", (4, 4, 4))])
    handle.remove()
    assert marks(late.model) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_of_the_users_own_is_kept():
    late = members_of("head")
    head = late.model[3]
    usual = head.forward
    head.forward = lambda x: 2.0 * usual(x)
    mine = head.forward
    inputs = [vector(4) for _ in range(MEMBERS)]
    outputs = late.fused(inputs)
    assert head.forward is mine
    for k, one in enumerate(inputs):
        agree(outputs[k].detach(), late(one, member=k).detach(), FUSED)


def test_hooks_run_once_around_all_rows():
    late = members_of("BatchNorm2d and head")
    seen: list[tuple[str, int, int]] = []
    for path, module in late.model.named_modules():
        module.register_forward_hook(
            lambda _, args, out, path=path: seen.append((path, len(args[0]), len(out)))
        )
    late.fused([image(rows) for rows in (3, 4, 5)])
    assert sorted(seen) == sorted((path, 12, 12) for path, _ in late.model.named_modules())


# ------------------------------------------------------------------ what it cannot do, it says


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(0, 1)).mean(0)


class Borrowed(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.embedding(x).mean(1), self.embedding.weight)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).mean()


def test_minibatches_that_cannot_be_told_apart_are_an_error():
    inputs = [sequence(4) for _ in range(MEMBERS)]
    with pytest.raises(NQMError, match=r"LayerNorm has the 12 rows .* axis 0"):
        LatePhase(TimeFirst(), MEMBERS, "layernorm").fused(inputs)
    with pytest.raises(NQMError, match="the model's output has the 12 rows"):
        LatePhase(Scalar(), MEMBERS, "head").fused(inputs)
    with pytest.raises(NQMError, match="one minibatch per member, 3; got 2"):
        LatePhase(Scalar(), MEMBERS, "head").fused(inputs[:2])
    with pytest.raises(NQMError, match="minibatches that hold a tensor with rows"):
        LatePhase(Scalar(), MEMBERS, "head").fused([1.0, 2.0, 3.0])


def test_a_weight_used_outside_its_layer_is_an_error():
    late = LatePhase(Borrowed(), MEMBERS, "all")
    batches = [(tokens(4), torch.randint(5, (4,))) for _ in range(MEMBERS)]
    late.accumulate(batches, functional.cross_entropy)
    with pytest.raises(NQMError, match=r"embedding\.weight is used outside the layer"):
        late.accumulate(batches, functional.cross_entropy, fused=True)


def test_short_cycles_run_member_by_member():
    late = members_of("BatchNorm2d and head")
    apart = copy.deepcopy(late)
    batches = batches_of("BatchNorm2d and head", (4, 4))
    losses = late.accumulate(batches, functional.cross_entropy, fused=True)
    assert torch.equal(losses, apart.accumulate(batches, functional.cross_entropy))
    same_state(late, apart)

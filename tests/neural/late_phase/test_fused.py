"""One forward pass for all members: the same numbers as member by member, for every kind."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from neural import LatePhase, add_lora, add_rank1
from nqm import NQMError
from tests.tolerances import agree

MEMBERS = 3
#: Sums over rows are taken in another order, by other kernels.
FUSED = 1e-10


pytestmark = pytest.mark.usefixtures("double")


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


#: The model itself holds a weight of the members: it runs as a whole.
WHOLE = ("class token", "whole transformer")


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
        if case in WHOLE:
            losses = fused.accumulate(batches, loss_fn, fused=True)
        else:
            losses = quietly(fused, batches)
        agree(losses, expected, FUSED)
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


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "UserDict"])
def test_several_arguments_and_results(form):
    late = LatePhase(Named(), MEMBERS, noise=0.3)
    apart = copy.deepcopy(late)
    given = [(vector(rows), vector(rows)) for rows in (3, 4, 5)]
    if form in ("dict", "UserDict"):
        kind = {"dict": dict, "UserDict": UserDict}[form]
        inputs: list[Any] = [kind(x=x, shift=shift) for x, shift in given]
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
    inputs = [image(rows) for rows in (3, 4, 5)]
    seen: list[tuple[str, int, int]] = []
    for path, module in late.model.named_modules():
        module.register_forward_hook(
            lambda _, args, out, path=path: seen.append((path, len(args[0]), len(out)))
        )
    late.fused(inputs)  # hooks see the passes that are compared, too
    seen.clear()
    late.fused(inputs)
    assert sorted(seen) == sorted((path, 12, 12) for path, _ in late.model.named_modules())


# ------------------------------------------------------------------ where rows are unclear


class Positions(nn.Module):
    """A table looked up by position: what is looked up has as many entries as there may be rows."""

    def __init__(self) -> None:
        super().__init__()
        self.symbol, self.position = nn.Embedding(5, 4), nn.Embedding(24, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.symbol(x) + self.position(torch.arange(x.shape[1]))
        return self.head(torch.tanh(self.norm(x)).mean(1))


class RelativeBias(nn.Module):
    """Weights over positions from a table that pairs of positions look up."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.table, self.value = nn.Embedding(2 * length, 1), nn.Linear(4, 4)
        self.head, self.length = nn.Linear(4, 3), length

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(self.length)
        bias = self.table(i[:, None] - i + self.length)[..., 0].softmax(-1)
        return self.head((bias @ self.value(x)).mean(1))


class Contrast(nn.Module):
    """Every row is seen beside the mean of its minibatch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x - x.mean(0))


class Backwards(nn.Module):
    """Positions folded into the rows as the outer axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(0, 1)
        return self.head(self.norm(flat)).view(x.shape[1], len(x), 3).mean(0)


class TimeFirstText(nn.Module):
    """Its input is (time, batch), as in many published language models."""

    def __init__(self) -> None:
        super().__init__()
        self.symbol, self.rnn, self.head = nn.Embedding(5, 4), nn.LSTM(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.symbol(x))[0]).mean(1)


class Borrowed(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.embedding(x).mean(1), self.embedding.weight)


class Scalar(nn.Module):
    """A loss of its own, as transformers libraries give it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).square().mean()


class Counting(nn.Module):
    """A shared buffer moves with every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1.0
        return self.head(x)


class Deciding(nn.Module):
    """Takes one way or the other by the sign of a sum; at first the sums of all agree."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if x.sum() > -100.0 else -x)


UNCLEAR: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], Any], str]] = {
    "positions": (Positions, "all", lambda n: torch.randint(5, (n, 12)), "used by position"),
    "positions alone": (
        Positions, "name:position.*", lambda n: torch.randint(5, (n, 24)), "used by position"),
    "pairs of positions": (
        lambda: RelativeBias(12), "all", lambda n: torch.randn(n, 12, 4), "used by position"),
    "rows that mix": (Contrast, "head", vector, "change the output of another"),
    "positions outside": (Backwards, "layernorm", sequence, "change the output of another"),
    "time first": (
        TimeFirstText, "head", lambda n: torch.randint(5, (n, 7)), "change the output of another"),
    "a borrowed weight": (Borrowed, "all", tokens, "change the output of another"),
    "class token": (Transformer, "name:cls_token", sequence, "itself uses members' weights"),
    "no rows": (Scalar, "head", vector, "output holds a tensor without rows"),
    "a counter": (Counting, "head", vector, "buffer passes would take other values"),
    "a decision": (Deciding, "head", vector, "decides by numbers in its tensors"),
    "one common number": (
        lambda: Named(), "head", lambda n: (vector(n), torch.randn(n)), "does not run on all"),
}  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("case", list(UNCLEAR))
def test_where_rows_are_unclear_members_run_one_by_one(case, noise):
    """Told once, before anything is trained; members that still agree hide nothing."""
    make, select, draw, reason = UNCLEAR[case]
    fused = LatePhase(make(), MEMBERS, select, noise=noise)
    apart = copy.deepcopy(fused)

    def loss_fn(out: Any, targets: Tensor) -> Tensor:
        out = out["out"] if isinstance(out, dict) else out
        return functional.cross_entropy(out, targets) if out.ndim else out

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            batches = [(draw(4), torch.randint(3, (4,))) for _ in range(MEMBERS)]
            losses = fused.accumulate(batches, loss_fn, fused=True)
            assert torch.equal(losses, apart.accumulate(batches, loss_fn))
            same_state(fused, apart)
    (one,) = told
    assert reason in str(one.message)
    assert "members run one by one" in str(one.message)


def quietly(late: LatePhase, batches: list[Any], loss_fn: Any = functional.cross_entropy) -> Tensor:
    """One fused pass, and no warning that it was none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return late.accumulate(batches, loss_fn, fused=True)


class Masked(nn.Module):
    """A mask of positions beside the data, common to all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.norm(self.attention(x, x, x, attn_mask=mask)[0]).mean(1))


@pytest.mark.parametrize("length", [8, 5])
def test_an_input_common_to_all_rows(length):
    late = LatePhase(Masked(), 2, "norm+head", noise=0.3)
    apart = copy.deepcopy(late)
    mask = torch.ones(length, length).triu(1).bool()
    batches = [((torch.randn(4, length, 4), mask), torch.randint(3, (4,))) for _ in range(2)]
    expected = apart.accumulate(batches, functional.cross_entropy)
    agree(quietly(late, batches), expected, FUSED)
    same_state(late, apart)
    other = [batches[0], ((batches[1][0][0], mask.T), batches[1][1])]
    expected = apart.accumulate(other, functional.cross_entropy)
    with pytest.warns(UserWarning, match="differs between minibatches"):
        assert torch.equal(late.accumulate(other, functional.cross_entropy, fused=True), expected)


@pytest.mark.parametrize("rows", [4, 5])
def test_inputs_in_a_mapping_of_another_library(rows):
    """Their shapes are seen, and new ones are tried anew."""
    late = LatePhase(Positions(), 2, "norm+head", noise=0.3)
    apart = copy.deepcopy(late)
    for count in (rows, rows + 1):
        batches = [
            (UserDict(x=torch.randint(5, (count, 3))), torch.randint(3, (count,))) for _ in range(2)
        ]
        expected = apart.accumulate(batches, functional.cross_entropy)
        agree(quietly(late, batches), expected, FUSED)
        pieces = late.accumulate(batches, functional.cross_entropy, micro_batches=2)
        agree(pieces, expected, FUSED)


def test_settings_that_differ_between_minibatches_reach_their_member():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, times: float) -> Tensor:
            return times * self.head(x)

    late = LatePhase(Scaled(), 2, "head")
    inputs = [(vector(4), 1.0), (vector(4), 3.0)]
    with pytest.warns(UserWarning, match="differs between minibatches"):
        outputs = late.fused(inputs)
    for (x, times), out in zip(inputs, outputs, strict=True):
        agree(out.detach(), (times * late.model.head(x)).detach(), FUSED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.fused([(vector(4), 2.0), (vector(4), 2.0)])


class Routed(nn.Module):
    """As many rows go through a layer as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0.0
        out = x[:, :3].clone()
        return out.masked_scatter(chosen[:, None].expand(-1, 3), self.head(x[chosen]))


def test_shapes_that_depend_on_the_data_are_told_before_anything_moves():
    x = vector(4)
    x[:, 0] = 1.0  # at first all rows are chosen, and nothing shows
    late = LatePhase(Routed(), 2, "head", noise=0.3)
    assert len(late.fused([x, x])) == 2
    other = x.clone()
    other[:3, 0] = -1.0
    batches = [(x, torch.randint(3, (4,))), (other, torch.randint(3, (4,)))]
    with pytest.raises(NQMError, match=r"head \(Linear\) is given shapes that depend on the data"):
        late.accumulate(batches, functional.cross_entropy, fused=True)
    apart = [(other, torch.randint(3, (4,))), (x, torch.randint(3, (4,)))]
    fresh = LatePhase(Routed(), 2, "head")
    with pytest.warns(UserWarning, match="members run one by one"):
        fresh.accumulate(apart, functional.cross_entropy, fused=True)


def test_shared_layers_run_once_and_chance_stays_the_models():
    """Dropout does not hide the rows; the comparison draws no number of the caller's."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
    late = LatePhase(model, MEMBERS, "head")
    batches = [(vector(4), torch.randint(3, (4,))) for _ in range(MEMBERS)]
    torch.manual_seed(3)
    first = quietly(late, batches)
    runs: list[int] = []
    model[0].register_forward_hook(lambda _, args, out: runs.append(len(out)))
    torch.manual_seed(3)
    assert torch.equal(quietly(late, batches), first)
    assert runs == [4 * MEMBERS]
    torch.manual_seed(3)
    hidden = model[1](model[0](torch.cat([x for x, _ in batches])))
    outputs = model[3](torch.tanh(hidden)).split(4)
    losses = [functional.cross_entropy(o, y) for o, (_, y) in zip(outputs, batches, strict=True)]
    agree(first, torch.stack(losses).detach(), FUSED)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_run_slices_again(reentrant):
    class Frugal(nn.Module):
        def __init__(self, frugal: bool) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
            self.frugal = frugal

        def part(self, x: Tensor) -> Tensor:
            return torch.tanh(self.last(torch.tanh(self.norm(x))))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if not self.frugal:
                return self.part(x)
            return checkpoint(self.part, x, use_reentrant=reentrant)

    usual, frugal = (LatePhase(Frugal(f), MEMBERS, "norm+head", noise=0.5) for f in (False, True))
    frugal.load_state_dict(usual.state_dict())
    batches = [(vector(4), torch.randint(3, (4,))) for _ in range(MEMBERS)]
    expected = usual.accumulate(batches, functional.cross_entropy)
    agree(quietly(frugal, batches), expected, FUSED)
    same_state(frugal, usual)


def test_mistakes_of_the_inputs():
    late = LatePhase(Scalar(), MEMBERS, "head")
    with pytest.raises(NQMError, match="one minibatch per member, 3; got 2"):
        late.fused([vector(4), vector(4)])


def test_short_cycles_run_member_by_member():
    late = members_of("BatchNorm2d and head")
    apart = copy.deepcopy(late)
    batches = batches_of("BatchNorm2d and head", (4, 4))
    losses = late.accumulate(batches, functional.cross_entropy, fused=True)
    assert torch.equal(losses, apart.accumulate(batches, functional.cross_entropy))
    same_state(late, apart)

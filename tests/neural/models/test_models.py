"""The models: sizes, weights at the start, forward passes written out, and their registry."""

from __future__ import annotations

import copy
import inspect
import io
import math
import os
import pickle
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from neural.models import MODELS, build
from neural.models.fast_cnn import whiten_
from neural.models.hyper_wrn import TemplateBank, TemplateConv2d, orthogonal_embeddings
from neural.models.layers import pad_channels
from neural.models.resnet_cifar import PaddedShortcut, load_published
from nqm import NQMError
from tests.tiny_nets import size
from tests.tolerances import IDENTITY, SIGMAS, agree, within_error

#: One or more small members of every family: name, options, shape of an image or None for text.
ROSTER: list[tuple[str, dict[str, Any], tuple[int, ...] | None]] = [
    ("resnet8", {}, (3, 32, 32)),
    ("resnet8", {"width": 8, "shortcut": "B", "norm": "group"}, (1, 28, 28)),
    ("wrn-10-1", {}, (3, 32, 32)),
    ("wrn-10-2", {"norm": "group"}, (1, 28, 28)),
    ("pyramidnet-8-12", {}, (3, 32, 32)),
    ("pyramidnet-8", {"alpha": 7.5}, (1, 28, 28)),
    ("hyper_wrn-10-1", {}, (3, 32, 32)),
    ("hyper_wrn-16-2", {}, (1, 28, 28)),
    ("fast_cnn", {"width": 8}, (3, 32, 32)),
    ("fast_cnn", {"width": 16}, (1, 28, 28)),
    ("digits_cnn", {}, (1, 8, 8)),
    ("digits_cnn", {"norm": "group"}, (3, 8, 8)),
    ("mlp", {}, (1, 8, 8)),
    ("mlp", {"hidden": (12, 9), "activation": "tanh", "norm": "batch"}, (1, 8, 8)),
    ("mlp", {"hidden": (), "size": 4}, (3, 4, 4)),
    ("lstm_lm", {"hidden": 12, "embedding": 5}, None),
    ("transformer_lm", {"width": 16, "layers": 2, "context": 8}, None),
    ("transformer_lm", {"width": 16, "layers": 1, "context": 8, "norm": "rms"}, None),
]
CLASSES = 7
EACH = pytest.mark.parametrize(
    ("name", "options", "shape"),
    ROSTER,
    ids=[f"{name}-{'-'.join(map(str, options.values()))}" for name, options, _ in ROSTER],
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, options: dict[str, Any], shape: tuple[int, ...] | None) -> nn.Module:
    channels = {} if shape is None else {"channels": shape[0]}
    return build(name, classes=CLASSES, **channels, **options).double()


def inputs(shape: tuple[int, ...] | None, number: int = 4) -> Tensor:
    if shape is None:
        return torch.randint(CLASSES, (number, 8))
    return torch.randn(number, *shape, dtype=torch.float64)


# --- every model ---


def test_the_roster_has_every_family() -> None:
    covered = {re.sub(r"-?\d.*", "", name) for name, *_ in ROSTER}
    assert covered == set(MODELS)


@EACH
def test_logits_and_head(name: str, options: Any, shape: Any) -> None:
    model, x = make(name, options, shape), inputs(shape)
    heads: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_hook(lambda *call: heads.append(call[2]))
    logits = model(x)
    assert logits.shape == ((4, CLASSES) if shape else (4, 8, CLASSES))
    # The last linear map is the output layer: what it returns are the logits, up to a constant.
    factor = options.get("logit_scale", 1 / 9) if name == "fast_cnn" else 1.0
    agree(logits.detach(), factor * heads[0].detach(), IDENTITY)


@EACH
def test_one_step_lowers_the_loss_as_its_gradient_says(name: str, options: Any, shape: Any) -> None:
    model, x = make(name, options, shape), inputs(shape)
    target = torch.randint(CLASSES, x.shape[: 1 if shape else 2]).flatten()

    def loss() -> Tensor:
        return functional.cross_entropy(model(x).flatten(0, -2), target)

    before = loss()
    before.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    square = sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)
    lr = 1e-5 * before.item() / square
    torch.optim.SGD(trained, lr=lr).step()
    # First order: the loss falls by lr |g|^2. The step is small but kinks and curvature remain.
    agree(before.item() - loss().item(), lr * square, 0.02)


@EACH
def test_a_deep_copy_is_equal_and_separate(name: str, options: Any, shape: Any) -> None:
    model, x = make(name, options, shape).eval(), inputs(shape)
    twin = copy.deepcopy(model)
    logits = model(x)
    assert torch.equal(twin(x), logits)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(model(x), logits)
    assert not torch.equal(twin(x), logits)


@EACH
def test_a_state_dict_holds_every_tensor_once_and_restores(
    name: str, options: Any, shape: Any
) -> None:
    model, x = make(name, options, shape).eval(), inputs(shape)
    state = model.state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    other = make(name, options, shape).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet8", (3, 32, 32)),
        ("wrn-10-1", (3, 32, 32)),
        ("fast_cnn", (3, 32, 32)),
        ("digits_cnn", (1, 8, 8)),
        ("mlp", (1, 8, 8)),
        ("lstm_lm", None),
        ("transformer_lm", None),
    ],
)
def test_dropout_acts_in_training_only(name: str, shape: Any) -> None:
    options = {"width": 8} if name == "fast_cnn" else {}
    plain = make(name, options, shape).eval()
    dropped = make(name, options | {"dropout": 0.4}, shape)
    dropped.load_state_dict(plain.state_dict())
    x = inputs(shape)
    assert not torch.allclose(dropped(x), dropped(x))
    plain.load_state_dict(dropped.state_dict())  # the running statistics moved meanwhile
    agree(dropped.eval()(x).detach(), plain(x).detach(), IDENTITY)


def test_dropout_of_a_wide_resnet_is_between_the_convolutions() -> None:
    model = make("wrn-10-1", {"dropout": 0.4}, (3, 32, 32))
    block = next(iter(model.get_submodule("group1").children()))
    seen: dict[str, Tensor] = {}
    for name in ("bn2", "conv2"):
        block.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: out if name == "bn2" else given[0]})
        )
    model(inputs((3, 32, 32), 2))
    active, kept = torch.relu(seen["bn2"]), seen["conv2"]
    alive = active > 0
    survived = kept[alive] != 0
    agree(kept[alive][survived].detach(), (active[alive][survived] / 0.6).detach(), IDENTITY)
    share = survived.double().mean()
    within_error(float(share), 0.6, math.sqrt(0.6 * 0.4 / int(alive.sum())))


@pytest.mark.parametrize("name", ["resnet8", "wrn-10-1", "digits_cnn"])
def test_group_norm_keeps_images_apart_in_groups_of_eight_channels(name: str) -> None:
    model = make(name, {"norm": "group"}, (3, 32, 32)).train()
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert norms
    assert all(m.num_channels == 8 * m.num_groups for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = inputs((3, 32, 32))
    agree(model(x)[:1].detach(), model(x[:1]).detach(), IDENTITY)


# --- sizes ---


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        # He et al. 2016, table 6, prints 0.27 M for ResNet-20 and 0.85 M for 56; to the digit:
        # akamaster/pytorch_resnet_cifar10 and imgclsmob (option B).
        ("resnet20", {}, 269_722),
        ("resnet56", {}, 853_018),
        ("resnet20", {"shortcut": "B"}, 272_474),
        # hypnettorch; imgclsmob
        ("wrn-28-10", {}, 36_479_194),
        ("wrn-28-10", {"classes": 100}, 36_536_884),
        # imgclsmob
        ("pyramidnet-110-48", {}, 1_772_706),
        ("pyramidnet-110-84", {}, 3_904_446),
        ("pyramidnet-110-270", {}, 28_485_477),
        ("pyramidnet-110-270", {"classes": 100}, 28_511_307),
    ],
)
def test_published_sizes(name: str, options: dict[str, Any], published: int) -> None:
    assert size(name, **{"classes": 10} | options) == published


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")]
)
def test_resnet_sizes_as_he_et_al_print_them(depth: int, millions: str) -> None:
    digits = len(millions.partition(".")[2])
    assert f"{size(f'resnet{depth}', classes=10) / 1e6:.{digits}f}" == millions


def test_late_phase_weights_of_wrn_28_10() -> None:
    with torch.device("meta"):
        model = build("wrn-28-10", classes=10)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(p.numel() for m in norms for p in m.parameters()) == 17_952
    assert sum(p.numel() for p in model.get_submodule("linear").parameters()) == 6_410


small = st.integers(1, 4)


@given(n=small, w=st.integers(1, 12), c=st.sampled_from([1, 3]), k=st.integers(1, 20))
def test_resnet_size_in_closed_form(n: int, w: int, c: int, k: int) -> None:
    convs = (
        c * w
        + (2 * n) * w**2
        + sum(
            inner * outer + (2 * n - 1) * outer**2 for inner, outer in ((w, 2 * w), (2 * w, 4 * w))
        )
    )
    norms = 2 * (w + 2 * n * (w + 2 * w + 4 * w))
    expected = 9 * convs + norms + (4 * w + 1) * k
    assert size(f"resnet{6 * n + 2}", classes=k, channels=c, width=w) == expected


@given(n=small, w=st.integers(1, 12), c=st.sampled_from([1, 3]), k=st.integers(1, 20))
def test_wide_resnet_size_in_closed_form(n: int, w: int, c: int, k: int) -> None:
    widths = [16, 16 * w, 32 * w, 64 * w]
    expected = 9 * c * 16 + 2 * widths[-1] + (widths[-1] + 1) * k
    for i, o in pairwise(widths):
        expected += 9 * (i * o + (2 * n - 1) * o * o)  # convolutions
        expected += 2 * (i + (2 * n - 1) * o)  # norms: the first acts on the input
        expected += i * o if i != o else 0
    assert size(f"wrn-{6 * n + 4}-{w}", classes=k, channels=c) == expected


@given(s=st.integers(2, 60), e=st.integers(1, 30), h=st.integers(1, 40))
def test_lstm_size_in_closed_form(s: int, e: int, h: int) -> None:
    expected = s * e + 4 * h * (e + h + 2) + s * (h + 1)
    assert size("lstm_lm", classes=s, embedding=e, hidden=h) == expected


def test_lstm_of_the_paper_has_1_56_million_parameters() -> None:
    assert f"{size('lstm_lm', classes=205) / 1e6:.2f}" == "1.56"


@given(s=st.integers(2, 40), w=st.integers(1, 6), n=small, t=st.integers(1, 50))
def test_transformer_size_in_closed_form(s: int, w: int, n: int, t: int) -> None:
    d = 4 * w
    # attention 4 (d^2 + d), perceptron 8 d^2 + 5 d, two norms of 2 d
    layer = 4 * (d * d + d) + 8 * d * d + 5 * d + 4 * d
    expected = s * d + t * d + n * layer + 2 * d + s * (d + 1)
    assert size("transformer_lm", classes=s, width=d, layers=n, context=t) == expected
    without_shift = size("transformer_lm", classes=s, width=d, layers=n, context=t, norm="rms")
    assert without_shift == expected - (2 * n + 1) * d


def test_digits_cnn_is_small() -> None:
    assert 5_000 <= size("digits_cnn", classes=10, channels=1) <= 20_000


# --- weights at the start ---


def fan_in(weight: Tensor) -> int:
    return weight[0].numel()


@pytest.mark.parametrize(
    "name", ["resnet20", "wrn-16-4", "pyramidnet-20-48", "digits_cnn", "mlp", "hyper_wrn-10-1"]
)
def test_weights_start_kaiming_normal(name: str) -> None:
    model = build(name, classes=100, **{"size": 16} if name == "mlp" else {})
    checked = 0
    for label, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach().double()
            gain = 1.0 if name == "mlp" and label == "linear" else 2.0
            check_normal(weight, gain / fan_in(weight))
            assert module.bias is None or not module.bias.any()
            checked += 1
        if isinstance(module, TemplateBank):
            templates = module.templates.detach().double()
            check_normal(templates, 2.0 / templates[0, 0].numel())
            checked += 1
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert checked >= 2


def check_normal(sample: Tensor, variance: float) -> None:
    """Mean 0, the given variance, and a normal's kurtosis 3, within their standard errors."""
    n = sample.numel()
    within_error(float(sample.mean()), 0.0, math.sqrt(variance / n))
    within_error(float(sample.square().mean()), variance, variance * math.sqrt(2 / n))
    fourth = float((sample**4).mean()) / variance**2
    within_error(fourth, 3.0, math.sqrt(96 / n))  # E x^8 - 9 = 105 - 9


def test_tanh_perceptron_starts_with_variance_one_over_fan_in() -> None:
    model = build("mlp", classes=50, channels=1, size=16, hidden=(300,), activation="tanh")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().double()
            check_normal(weight, 1.0 / fan_in(weight))


def test_an_mlp_says_which_images_it_takes() -> None:
    model = build("mlp", classes=3, channels=1)
    with pytest.raises(NQMError, match=r"1 x 8 x 8; got 3 x 12 x 12; set model.size = 12$"):
        model(torch.zeros(2, 3, 12, 12))
    assert model(torch.zeros(2, 64)).shape == (2, 3)  # rows


def test_transformer_starts_near_a_uniform_prediction() -> None:
    model = build("transformer_lm", classes=205)
    tokens = torch.randint(205, (4, 64))
    loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    # Logits have variance 128 x 0.02^2 = 0.05, which adds half of it to log 205.
    agree(loss.item(), math.log(205) + 0.5 * 128 * 0.02**2, 0.01)


# --- forward passes, written out ---


def randomise_norms(model: nn.Module) -> None:
    """Give normalisation layers weights and statistics that no mistake leaves alone."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.add_(0.3 * torch.randn_like(tensor))
            assert module.running_var is not None
            module.running_var.mul_(0.5 + torch.rand_like(module.running_var))


def norm(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """BatchNorm in evaluation by its definition."""

    def part(of: str) -> Tensor:
        return s[f"{name}.{of}"].view(1, -1, 1, 1)

    scaled = (x - part("running_mean")) / torch.sqrt(part("running_var") + 1e-5)
    return part("weight") * scaled + part("bias")


def conv(s: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = s[f"{name}.weight"]
    return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def head(s: dict[str, Tensor], x: Tensor) -> Tensor:
    return x.flatten(2).mean(-1) @ s["linear.weight"].T + s["linear.bias"]


def resnet_literal(s: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    x = norm(s, "bn1", conv(s, "conv1", x)).relu()
    for stage in (1, 2, 3):
        for k in range(blocks):
            at = f"layer{stage}.{k}"
            stride = 2 if stage > 1 and k == 0 else 1
            y = norm(s, f"{at}.bn1", conv(s, f"{at}.conv1", x, stride)).relu()
            y = norm(s, f"{at}.bn2", conv(s, f"{at}.conv2", y))
            if f"{at}.shortcut.0.weight" in s:
                x = norm(s, f"{at}.shortcut.1", conv(s, f"{at}.shortcut.0", x, stride))
            elif stride == 2:
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = (y + x).relu()
    return head(s, x)


def wide_resnet_literal(s: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    x = conv(s, "conv1", x)
    for group in (1, 2, 3):
        for k in range(blocks):
            at = f"group{group}.{k}"
            stride = 2 if group > 1 and k == 0 else 1
            a = norm(s, f"{at}.bn1", x).relu()
            y = norm(s, f"{at}.bn2", conv(s, f"{at}.conv1", a, stride)).relu()
            y = conv(s, f"{at}.conv2", y)
            x = y + (conv(s, f"{at}.shortcut", a, stride) if f"{at}.shortcut.weight" in s else x)
    return head(s, norm(s, "bn", x).relu())


def pyramidnet_literal(s: dict[str, Tensor], x: Tensor, per_group: int) -> Tensor:
    x = norm(s, "bn", conv(s, "conv", x))
    for k in range(3 * per_group):
        at = f"blocks.{k}"
        stride = 2 if k in (per_group, 2 * per_group) else 1
        y = conv(s, f"{at}.conv1", norm(s, f"{at}.bn1", x), stride)
        y = norm(s, f"{at}.bn3", conv(s, f"{at}.conv2", norm(s, f"{at}.bn2", y).relu()))
        if stride == 2:
            x = (
                x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
            ) / 4
        y[:, : x.shape[1]] += x
        x = y
    return head(s, norm(s, "bn_last", x).relu())


@pytest.mark.parametrize(
    ("name", "options", "literal", "blocks"),
    [
        ("resnet14", {}, resnet_literal, 2),
        ("resnet14", {"shortcut": "B"}, resnet_literal, 2),
        ("wrn-16-1", {}, wide_resnet_literal, 2),
        ("wrn-16-2", {}, wide_resnet_literal, 2),
        ("pyramidnet-14-20", {}, pyramidnet_literal, 2),
    ],
)
def test_forward_written_out(name: str, options: Any, literal: Any, blocks: int) -> None:
    model = make(name, options, (3, 16, 16)).eval()
    randomise_norms(model)
    x = inputs((3, 16, 16), 2)
    with torch.no_grad():
        agree(model(x), literal(model.state_dict(), x, blocks), IDENTITY)


@given(inputs=st.integers(1, 5), extra=st.integers(0, 6), side=st.integers(1, 7))
def test_option_a_shortcut_is_slicing_and_padding(inputs: int, extra: int, side: int) -> None:
    x = torch.randn(2, inputs, side, side)
    y = PaddedShortcut(inputs, inputs + extra, 2)(x)
    expected = np.zeros((2, inputs + extra, (side + 1) // 2, (side + 1) // 2), dtype=np.float32)
    expected[:, extra // 2 : extra // 2 + inputs] = x.numpy()[:, :, ::2, ::2]
    np.testing.assert_array_equal(y, expected)
    assert not list(PaddedShortcut(1, 2, 2).parameters())


def test_pad_channels() -> None:
    x = torch.ones(1, 2, 1, 1)
    assert pad_channels(x, 5, before=1).flatten().tolist() == [0, 1, 1, 0, 0]


# --- template banks ---


def test_a_mixed_weight_is_the_sum_over_templates() -> None:
    bank = TemplateBank(5, 4, 3, 3).double()
    layer = TemplateConv2d(bank, torch.randn(2, 5).double(), stride=2)
    e, T = layer.embedding.detach().numpy(), bank.templates.detach().numpy()
    expected = np.zeros((4, 6, 3, 3))
    for j in range(5):
        expected[:, :3] += e[0, j] * T[j]  # the first half of the input channels
        expected[:, 3:] += e[1, j] * T[j]
    agree(layer.weight.detach(), expected, IDENTITY)
    x = torch.randn(2, 6, 8, 8).double()
    reference = functional.conv2d(x, torch.tensor(expected), stride=2, padding=1)
    agree(layer(x).detach(), reference, IDENTITY)
    assert [name for name, _ in layer.named_parameters()] == ["embedding"]


@given(chunks=st.integers(1, 20), templates=st.integers(1, 20))
def test_embeddings_start_orthogonal_with_unit_mean_length(chunks: int, templates: int) -> None:
    e = orthogonal_embeddings(chunks, templates).double()
    assert e.shape == (chunks, templates)
    agree(float(e.norm(dim=1).mean()), 1.0, 1e-5)  # float32
    short = e.T @ e if chunks > templates else e @ e.T
    gap = short - short[0, 0] * torch.eye(len(short), dtype=torch.float64)
    assert float(gap.abs().max()) < 1e-5 * float(short[0, 0])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("chunks", [1, 2])
def test_templates_in_channels_last_mix_the_same_weight_in_that_layout(
    chunks: int, kernel: int
) -> None:
    bank = TemplateBank(5, 4, 3, kernel).double()
    embedding = torch.randn(chunks, 5).double()
    templates = bank.templates.detach().clone()
    bank.channels_last_()
    assert torch.equal(bank.templates, templates)
    weight = bank(embedding)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # w[:, 3 c + i] = sum_t e[c, t] T[t, :, i]
    expected = torch.einsum("ct,toihw->ocihw", embedding, templates).flatten(1, 2)
    agree(weight.detach(), expected, IDENTITY)
    weight.square().sum().backward()
    gradient = torch.einsum("ct,ocihw->toihw", embedding, 2.0 * expected.unflatten(1, (chunks, 3)))
    agree(bank.templates.grad, gradient, IDENTITY)


@pytest.mark.parametrize(("name", "blocks"), [("hyper_wrn-10-1", 1), ("hyper_wrn-16-2", 2)])
def test_a_hypernetwork_net_is_the_wide_resnet_of_its_mixed_weights(name: str, blocks: int) -> None:
    hyper = make(name, {}, (3, 16, 16)).eval()
    randomise_norms(hyper)
    plain = make(name.removeprefix("hyper_"), {}, (3, 16, 16)).eval()
    state = {k: v for k, v in hyper.state_dict().items() if k in plain.state_dict()}
    for label, module in hyper.named_modules():
        if isinstance(module, TemplateConv2d):
            state[f"{label}.weight"] = module.weight.detach()
    plain.load_state_dict(state, strict=True)  # every convolution is mixed, nothing else is left
    x = inputs((3, 16, 16), 2)
    with torch.no_grad():
        agree(hyper(x), plain(x), IDENTITY)


def test_banks_of_hyper_wrn_28_10() -> None:
    with torch.device("meta"):
        model = build("hyper_wrn-28-10", classes=10)
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".templates")}
    # Sizes of the embeddings: supplement of the late-phase paper; templates of group 1 halved.
    expected = {
        (10, 16, 3, 3, 3),
        (7, 160, 16, 3, 3), (14, 160, 80, 3, 3), (14, 320, 160, 3, 3), (14, 640, 320, 3, 3),
        (7, 160, 16, 1, 1), (7, 320, 160, 1, 1), (7, 640, 320, 1, 1),
    }  # fmt: skip
    assert shapes == expected
    embeddings = [p.shape for name, p in model.named_parameters() if name.endswith(".embedding")]
    assert len(embeddings) == 28  # 1 + 8 + 8 + 8 convolutions and 3 shortcuts
    # Published for whole templates in group 1: 42 rows, 556 weights, 37.46 M. Halving them turns 7
    # rows of 14 there into 14, and drops half of 14 templates of 160 x 160 x 9.
    assert sum(shape[0] for shape in embeddings) == 42 + 7
    assert sum(shape.numel() for shape in embeddings) == 556 + 7 * 14
    banks = sum(math.prod(shape) for shape in expected)
    assert f"{(banks + 14 * 160 * 80 * 9) / 1e6:.2f}" == "37.46"
    total = sum(p.numel() for p in model.parameters())
    assert total == banks + 556 + 7 * 14 + 17_952 + 6_410


# --- the fast net ---


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening(channels: int) -> None:
    model = build("fast_cnn", classes=CLASSES, channels=channels, width=8).double()
    # Smooth, correlated images: running sums of noise, channels mixed.
    images = torch.randn(20, channels, 18, 18, dtype=torch.float64).cumsum(2).cumsum(3) / 10
    images = torch.einsum("dc,nchw->ndhw", torch.randn(channels, channels).double(), images)
    eps = 1e-3
    whiten_(model, images.float(), eps=eps)  # type: ignore[arg-type]
    x = images.float().double()
    layer = model.get_submodule("whiten")
    y = layer(x).detach().transpose(0, 1).flatten(1)
    half = 4 * channels
    agree(y[half:], -y[:half], IDENTITY)
    corners = [x[:, :, i : 17 + i, j : 17 + j] for i in (0, 1) for j in (0, 1)]
    p = torch.stack(corners, 2).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1).numpy()
    values = np.linalg.eigvalsh(p @ p.T / p.shape[1])
    second = (y[:half] @ y[:half].T / y.shape[1]).numpy()
    np.testing.assert_allclose(second, np.diag(values / (values + eps)), atol=1e-9)
    weights = [name for name, q in model.named_parameters() if not q.requires_grad]
    assert weights == ["whiten.weight"]


def test_fast_blocks_start_by_passing_their_input_on() -> None:
    model = make("fast_cnn", {"width": 32}, (3, 32, 32))
    x = torch.randn(1, 24, 8, 8, dtype=torch.float64)
    first = model.get_submodule("block1.conv1")(x)
    agree(first[:, :24].detach(), x, IDENTITY)
    assert first[:, 24:].abs().min() > 0


@pytest.mark.parametrize(
    ("shape", "eps", "message"),
    [((2, 1, 8, 8), 1e-3, "must have shape"), ((2, 3, 8, 8), 0.0, "eps must lie")],
)
def test_whitening_refuses(shape: tuple[int, ...], eps: float, message: str) -> None:
    model = build("fast_cnn", classes=2, width=4)
    with pytest.raises(NQMError, match=message):
        whiten_(model, torch.zeros(shape), eps=eps)  # type: ignore[arg-type]


# --- language models ---


def test_lstm_by_its_recursion() -> None:
    model = make("lstm_lm", {"hidden": 6, "embedding": 4}, None)
    s = model.state_dict()
    tokens = inputs(None, 3)
    h, c = torch.zeros(3, 6).double(), torch.zeros(3, 6).double()
    expected = []
    for t in range(tokens.shape[1]):
        z = s["embedding.weight"][tokens[:, t]] @ s["lstm.weight_ih_l0"].T + s["lstm.bias_ih_l0"]
        z = z + h @ s["lstm.weight_hh_l0"].T + s["lstm.bias_hh_l0"]
        i, f, g, o = z.split(6, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        expected.append(h @ s["linear.weight"].T + s["linear.bias"])
    with torch.no_grad():
        agree(model(tokens), torch.stack(expected, 1), IDENTITY)


@given(cut=st.integers(1, 7))
def test_lstm_carries_its_state_over_a_cut(cut: int) -> None:
    model = make("lstm_lm", {"hidden": 5, "embedding": 4, "layers": 2}, None)
    tokens = inputs(None, 2)
    with torch.no_grad():
        whole = model(tokens)
        first, state = model(tokens[:, :cut], return_state=True)
        second = model(tokens[:, cut:], state)
        agree(torch.cat([first, second], 1), whole, IDENTITY)
        assert not torch.allclose(model(tokens[:, cut:]), second)  # a new window forgets


@given(position=st.integers(1, 7), norm=st.sampled_from(["layer", "rms"]))
def test_transformer_is_causal(position: int, norm: str) -> None:
    model = make("transformer_lm", {"width": 16, "layers": 2, "context": 8, "norm": norm}, None)
    tokens = inputs(None, 2)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % CLASSES
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    agree(a[:, :position], b[:, :position], IDENTITY)
    assert ((a - b)[:, position:].abs().amax(-1) > 0).all()  # and every later symbol sees it


def test_transformer_attention_by_its_definition() -> None:
    model = make("transformer_lm", {"width": 8, "heads": 2, "layers": 1, "context": 8}, None)
    block = model.get_submodule("blocks.0")
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = block.get_submodule("qkv")(x)[0].split(8, dim=1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            score = (q[:, part] @ k[:, part].T) / 2.0  # sqrt of 4 entries a head
            score = score.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            heads.append(score.softmax(1) @ v[:, part])
        expected = block.get_submodule("out")(torch.cat(heads, 1))
        agree(block.attend(x)[0], expected, IDENTITY)  # type: ignore[operator]


def test_transformer_refuses_a_text_beyond_its_context() -> None:
    model = build("transformer_lm", classes=5, context=4, width=8)
    with pytest.raises(NQMError, match="at most context=4 symbols; got 5"):
        model(torch.zeros(1, 5, dtype=torch.int64))


# --- published weights ---


def published_names(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the published files."""

    def layer(conv: str, bn: str, inputs: int, outputs: int) -> Iterator[Any]:
        yield f"module.{conv}.weight", (outputs, inputs, 3, 3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"module.{bn}.{part}", (outputs,)

    yield from layer("conv1", "bn1", 3, 16)
    inputs = 16
    for stage, outputs in ((1, 16), (2, 32), (3, 64)):
        for k in range(blocks):
            for i in (1, 2):
                at = f"layer{stage}.{k}"
                yield from layer(f"{at}.conv{i}", f"{at}.bn{i}", inputs, outputs)
                inputs = outputs
    yield "module.linear.weight", (10, 64)
    yield "module.linear.bias", (10,)


def write_published(path: Path, depth: int) -> dict[str, Tensor]:
    names = published_names((depth - 2) // 6)
    state = {name: 0.1 + torch.rand(shape) for name, shape in names}
    torch.save({"best_prec1": 91.0, "state_dict": state}, path)
    return state


@pytest.mark.parametrize("depth", [20, 32])
def test_published_names_load_strictly(tmp_path: Path, depth: int) -> None:
    state = write_published(tmp_path / "net.th", depth)
    loaded = load_published(tmp_path / "net.th", depth).state_dict()
    counters = {name for name in loaded if name.endswith("num_batches_tracked")}
    assert {f"module.{name}" for name in loaded.keys() - counters} == state.keys()
    assert all(torch.equal(loaded[name.removeprefix("module.")], v) for name, v in state.items())


def test_damaged_published_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.th"
    write_published(path, 20)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(NQMError, match="not a PyTorch checkpoint"):
            load_published(path, 20)
        # The old format is a bare pickle; noise after its first bytes fails in many ways.
        path.write_bytes(b"\x80\x02" + rng.bytes(length % 97))
        with pytest.raises(NQMError, match="not a PyTorch checkpoint"):
            load_published(path, 20)
    torch.save({"state_dict": {"module.conv1.weight": 3}}, path)
    with pytest.raises(NQMError, match="not the weights of a ResNet-20"):
        load_published(path, 20)


class Trap:
    """A pickle that would write a file when opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_published_weights_refuse(tmp_path: Path) -> None:
    path, sprung = tmp_path / "net.th", tmp_path / "sprung"
    with pytest.raises(NQMError, match=r"net\.th: no such file"):
        load_published(path, 20)
    path.write_text("not a checkpoint")
    with pytest.raises(NQMError, match="not a PyTorch checkpoint of plain tensors"):
        load_published(path, 20)
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    with pytest.raises(NQMError, match="not a PyTorch checkpoint of plain tensors"):
        load_published(path, 20)
    assert not sprung.exists()
    torch.save([1.0], path)
    with pytest.raises(NQMError, match="expected a dictionary with a 'state_dict'"):
        load_published(path, 20)
    write_published(path, 32)
    with pytest.raises(NQMError, match=r"not the weights of a ResNet-20.*check the depth"):
        load_published(path, 20)


@pytest.mark.parametrize(
    ("file", "depth", "published"),
    [("resnet20-12fca82f.th", 20, 0.9173), ("resnet32-d509ac18.th", 32, 0.9263)],
)
def test_published_weights_reach_their_published_accuracy(
    file: str, depth: int, published: float
) -> None:
    data = Path(os.environ.get("NQM_DATA", "missing"))
    weights, images = data / "resnet_cifar10" / file, data / "cifar10_lossless_part_webp.npz"
    if not (weights.exists() and images.exists()):
        pytest.skip("needs published weights and CIFAR-10 images in the folder NQM_DATA")
    image = pytest.importorskip("PIL.Image")
    with np.load(images) as archive:
        mosaic = np.asarray(image.open(io.BytesIO(archive["webp_test"].tobytes())).convert("RGB"))
        labels = torch.from_numpy(archive["y_test"]).long()
    rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
    tiles = mosaic.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    x = torch.from_numpy(tiles[: len(labels)].copy()).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = load_published(weights, depth).eval()
    with torch.no_grad():
        right = torch.cat([model((b - mean) / std).argmax(1) for b in x.split(256)]) == labels
    error = math.sqrt(published * (1 - published) / len(labels))
    assert abs(float(right.double().mean()) - published) < SIGMAS * error


# --- the registry ---


def test_names_carry_sizes() -> None:
    assert size("wrn-16-2", classes=10) == size("wrn", classes=10, depth=16, width=2)
    assert size("wrn-16", classes=10, width=2) == size("wrn-16-2", classes=10)
    assert size("resnet-20", classes=10) == size("resnet20", classes=10)
    assert size("pyramidnet-20-48", classes=10) == size("pyramidnet-20", classes=10, alpha=48)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_documents_its_options(family: str) -> None:
    cls = MODELS[family].load()
    document = inspect.getdoc(cls) or ""
    assert MODELS[family].description
    for option in MODELS[family].options():
        assert option in document, option
    assert set(MODELS[family].sizes) <= set(MODELS[family].options())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt20", {}, "unknown model 'resnt20'; did you mean 'resnet20'"),
        ("resnet-20-3", {}, "expected resnet-DEPTH"),
        ("mlp-3", {}, "unknown model 'mlp-3'; expected mlp"),
        ("", {}, "unknown model ''; known: "),
        ("wrn-28-10", {"wdth": 1}, "has no option 'wdth'; did you mean 'width'"),
        ("resnet20", {"depth": 8}, "already 20 by its name; got depth=8"),
        ("resnet19", {}, "resnet.depth must be 6 n [+] 2; got 19; nearest: 14 and 20"),
        ("wrn-27-10", {}, "wrn.depth must be 6 n [+] 4; got 27; nearest: 22 and 28"),
        ("wrn-2-10", {}, "wrn.depth must be an integer >= 10; got 2"),
        ("wrn", {"width": 0}, "wrn.width must be an integer >= 1"),
        ("wrn", {"dropout": 1.0}, "wrn.dropout must lie in"),
        ("resnet20", {"norm": "bach"}, "norm must be 'batch' or 'group'; got 'bach'; did you mean"),
        ("resnet20", {"norm": "group", "groups": 5}, "groups must divide the 16 channels"),
        ("resnet20", {"groups": 4}, "groups belongs to norm='group'"),
        ("resnet20", {"shortcut": "C"}, "resnet.shortcut must be 'A' or 'B'; got 'C'"),
        ("resnet20", {"channels": 0}, "resnet.channels must be an integer >= 1"),
        ("resnet20", {"classes": 0}, "resnet.classes must be an integer >= 1"),
        ("pyramidnet", {"alpha": -1}, "pyramidnet.alpha must lie in"),
        ("fast_cnn", {"momentum": 0.0}, "fast_cnn.momentum must lie in"),
        ("mlp", {"hidden": (3, 0)}, "mlp.hidden must be an integer >= 1; got 0"),
        ("mlp", {"hidden": 3}, r"mlp.hidden must be a list; got 3"),
        ("mlp", {"norm": ["batch"]}, r"mlp.norm must be one of 'none', 'batch', 'layer'; got \["),
        ("mlp", {"activation": {}}, r"mlp.activation must be one of 'relu', 'tanh'; got \{\}"),
        ("resnet20", {"norm": 3}, "resnet.norm must be one of 'batch', 'group'; got 3"),
        ("resnet600002", {}, "resnet.depth must be at most 10000; got 600002"),
        ("lstm_lm", {"layers": 10**9}, "lstm_lm.layers must be at most 10000"),
        ("mlp", {"activation": "gelu"}, "mlp.activation must be 'relu' or 'tanh'"),
        ("mlp", {"norm": "group"}, "mlp.norm must be 'none', 'batch' or 'layer'"),
        ("lstm_lm", {"hidden": 0}, "lstm_lm.hidden must be an integer >= 1"),
        ("lstm_lm", {"dropout": -0.1}, "lstm_lm.dropout must lie in"),
        ("transformer_lm", {"heads": 3}, "heads must divide width=128; got 3"),
        ("transformer_lm", {"norm": "batch"}, "norm must be 'layer' or 'rms'"),
        ("torchvison:resnet18", {}, "unknown library 'torchvison'.*did you mean 'torchvision'"),
    ],
)
def test_mistakes_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NQMError, match=message) as caught:
        build(name, **{"classes": 10} | options)
    assert "\n" not in str(caught.value)


def test_a_template_convolution_refuses_an_embedding_of_another_bank() -> None:
    with pytest.raises(NQMError, match=r"shape \(chunks, 5\); got \(2, 4\)"):
        TemplateConv2d(TemplateBank(5, 2, 2, 3), torch.zeros(2, 4))

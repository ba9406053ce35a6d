"""Which names a selection stands for, written out by hand for small models."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from neural import LatePhase, add_lora, add_rank1
from neural.late_phase.select import TERMS, select
from nqm import NQMError


class MyRMSNorm(nn.Module):
    """As language-model libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.layer = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.mine = MyRMSNorm()
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 3)
        self.conv.weight.requires_grad_(False)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(*paths: str) -> set[str]:
    return {f"{path}.{name}" for path in paths for name in STATISTICS}


def affine(*paths: str) -> set[str]:
    return {f"{path}.{name}" for path in paths for name in ("weight", "bias")}


RMS = {"rms.weight", "mine.weight"}
HEAD = affine("head")
BIASES = {
    "conv.bias", "batch.bias", "instance.bias", "layer.bias", "group.bias", "lstm.bias_ih_l0",
    "lstm.bias_hh_l0", "attention.in_proj_bias", "attention.out_proj.bias", "head.bias",
}  # fmt: skip
EXPECTED = {
    "batchnorm": (affine("batch"), statistics("batch", "plain")),
    "layernorm": (affine("layer"), set()),
    "groupnorm": (affine("group"), set()),
    "rmsnorm": (RMS, set()),
    "norm": (
        affine("batch", "instance", "layer", "group") | RMS,
        statistics("batch", "plain", "instance"),
    ),
    "head": (HEAD, set()),
    "bias": (BIASES, statistics("batch", "instance")),
    "embedding": ({"embedding"}, set()),
    "batchnorm+head": (affine("batch") | HEAD, statistics("batch", "plain")),
    " head + layernorm ": (affine("layer") | HEAD, set()),
    "name:batch.weight": ({"batch.weight"}, statistics("batch")),
    "name:lstm.weight_?h_l0": ({"lstm.weight_ih_l0", "lstm.weight_hh_l0"}, set()),
    "name:head.*+embedding": (HEAD | {"embedding"}, set()),
}


@pytest.mark.parametrize("what", list(EXPECTED))
def test_names_selected(what):
    chosen = select(Net(), what)
    parameters, buffers = EXPECTED[what]
    assert set(chosen.parameters) == parameters
    assert set(chosen.buffers) == buffers
    assert select(Net(), what.split("+")) == chosen


def test_all_is_every_trainable_parameter_in_the_models_order():
    model = Net()
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "conv.weight" not in expected
    assert list(select(model, "all").parameters) == expected
    assert set(select(model, "all").buffers) == statistics("batch", "instance")


def test_order_and_repetition_do_not_matter():
    one = select(Net(), "head+batchnorm+head")
    assert one == select(Net(), ["batchnorm", "head"])
    assert len(set(one.parameters)) == len(one.parameters)


@pytest.mark.parametrize(("add", "names"), [
    (add_rank1, ("s", "r")), (add_lora, ("A", "B")),
])  # fmt: skip
def test_factors(add, names):
    model = Net()
    add(model, where="head.weight")
    term = "rank1" if add is add_rank1 else "lora"
    path = "head.parametrizations.weight"
    assert set(select(model, term).parameters) == {f"{path}.0.{name}" for name in names}
    # The head is the layer with all it is made of.
    assert set(select(model, "head").parameters) == {
        "head.bias", f"{path}.original", *(f"{path}.0.{name}" for name in names)
    }  # fmt: skip


def test_the_head_of_a_model_that_is_one():
    assert set(select(nn.Linear(2, 2), "head").parameters) == {"weight", "bias"}


def test_a_tied_weight_goes_by_any_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "decoder": nn.Linear(4, 5)})
    model["decoder"].weight = model["embedding"].weight
    for what in ("name:decoder.weight", "name:embedding.weight", "name:*.weight"):
        assert select(model, what).parameters == ("embedding.weight",)
    assert set(select(model, "head").parameters) == {"embedding.weight", "decoder.bias"}


def test_frozen_weights_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert set(select(model, "all").parameters) == {"1.weight", "1.bias"}
    assert select(model, "all").buffers == ()
    with pytest.raises(NQMError, match="holds no trainable weight"):
        LatePhase(model, 2, "batchnorm")


@given(pattern=st.text("weightbias.*?head", min_size=1, max_size=8))
def test_a_pattern_is_a_glob_over_names(pattern):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    names = tuple(n for n, _ in model.named_parameters() if fnmatchcase(n, pattern))
    if names:
        assert select(model, f"name:{pattern}").parameters == names
    else:
        with pytest.raises(NQMError, match="matches nothing in Sequential"):
            select(model, f"name:{pattern}")


@pytest.mark.parametrize(("what", "message"), [
    ("batchnrom", r"select: 'batchnrom' is unknown; did you mean 'batchnorm'\?"),
    ("batchnorm+heda", r"'heda' is unknown; did you mean 'head'\?"),
    ("xyzzy", r"'xyzzy' is unknown; known: .*name:PATTERN"),
    ("", "'' is unknown"),
    ([], r"\[\] holds no trainable weight of Sequential"),
    ("layernorm", "'layernorm' matches nothing in Sequential; it has batchnorm$"),
    ("head", "'head' matches nothing in Sequential; select it by name"),
    ("rank1", r"matches nothing in Sequential; call neural.add_rank1\(model\) first"),
    ("lora", r"matches nothing in Sequential; call neural.add_lora\(model, rank\) first"),
    ("name:fc.*", "'name:fc.*' matches nothing in Sequential"),
])  # fmt: skip
def test_mistakes_are_one_line(what, message):
    with pytest.raises(NQMError, match=message) as caught:
        LatePhase(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)), 2, what)
    assert "\n" not in str(caught.value)


class T5LayerNorm(MyRMSNorm):
    """As another library calls it."""


class FilterResponseNorm(nn.Module):
    """A normalisation with a threshold of its own, and with scales of shape (1, C, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.tau = (nn.Parameter(torch.ones(1, 4, 1, 1)) for _ in range(2))
        self.register_buffer("seen", torch.zeros(4))


class PreNormBlock(nn.Module):
    """Begins with a normalisation, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.norm, self.linear = (
            nn.Parameter(torch.ones(4)),
            T5LayerNorm(),
            nn.Linear(4, 4),
        )


class NormalizedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))


@pytest.mark.parametrize(("what", "names"), [
    ("norm", {"0.weight", "1.scale", "1.tau", "2.norm.weight", "4.weight"}),
    ("layernorm", {"0.weight", "2.norm.weight"}),
    ("rmsnorm", {"4.weight"}),
])  # fmt: skip
def test_normalisations_of_other_libraries(what, names):
    """By what they are called and hold; blocks and layers with a norm in their name stay out."""
    parts = [T5LayerNorm(), FilterResponseNorm(), PreNormBlock(), NormalizedLinear(), MyRMSNorm()]
    chosen = select(nn.Sequential(*parts), what)
    assert set(chosen.parameters) == names
    assert set(chosen.buffers) == ({"1.seen"} if what == "norm" else set())


def test_what_a_model_has_is_told():
    convnext = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.raises(
        NQMError, match=r"'batchnorm' matches nothing in .*; it has layernorm, head$"
    ):
        select(convnext, "batchnorm")
    other = nn.Sequential(nn.Conv2d(2, 4, 3), T5LayerNorm(), FilterResponseNorm())
    with pytest.raises(NQMError, match="'groupnorm' matches nothing in Sequential; it has"):
        select(other, "groupnorm")
    with pytest.raises(NQMError, match=r"'batchnorm' matches nothing in Conv2d$"):
        select(nn.Conv2d(2, 4, 3), "batchnorm")


def test_buffers_beside_a_selected_weight_go_with_it():
    """Those of the layer itself, and of what computes its weight; no other layer's."""
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4)))
    model[1].register_buffer("mask", torch.ones(4))
    path = "0.parametrizations.weight"
    assert set(select(model, f"name:{path}.original").buffers) == {f"{path}.0._u", f"{path}.0._v"}
    assert set(select(model, "name:1.bias").buffers) == {"1.mask"}


@pytest.mark.parametrize("term", list(TERMS))
def test_every_term_told_about_is_known(term):
    model = Net()
    if term in ("rank1", "lora"):
        {"rank1": add_rank1, "lora": add_lora}[term](model)
    assert select(model, term).parameters

"""Configurations: there and back, and one line for every mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neural.training.averages import EMA, SWA
from neural.training.config import (
    DataConfig,
    EvaluateConfig,
    LatePhaseConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    build,
    describe,
)
from neural.training.optim import make_optimizer, set_lr
from nqm import keys
from nqm.errors import NQMError
from nqm.schedule import (
    SCHEDULES,
    Constant,
    Cooldown,
    Cosine,
    Cyclic,
    Exponential,
    Joined,
    Linear,
    PerStep,
    Piecewise,
    Power,
    Warmup,
    WarmupStableDecay,
)
from tests.tiny_runs import LATE, mapping

# --- there and back ------------------------------------------------------------------------------

rates = st.floats(1e-6, 10.0)
counts = st.integers(1, 300)


@st.composite
def piecewise(draw: st.DrawFn) -> Piecewise:
    edges = sorted(draw(st.sets(counts, max_size=4)))
    values = draw(st.lists(rates, min_size=len(edges) + 1, max_size=len(edges) + 1))
    return Piecewise(tuple(values), tuple(edges))


@st.composite
def joined(draw: st.DrawFn) -> Joined:
    parts = draw(st.lists(simple, min_size=1, max_size=3))
    lengths = draw(st.lists(counts, min_size=len(parts) - 1, max_size=len(parts) - 1))
    return Joined(tuple(parts), tuple(lengths))


flat = st.integers(0, 20)
simple = st.one_of(
    st.builds(Constant, rates),
    piecewise(),
    st.builds(Linear, rates, rates, counts),
    st.builds(Cosine, rates, rates, counts),
    st.builds(WarmupStableDecay, rates, rates, flat, flat, counts),
    st.builds(Cyclic, rates, rates, counts, st.sampled_from(["cosine", "linear", "triangle"])),
)
schedules = st.one_of(
    simple,
    joined(),
    st.builds(Warmup, counts, simple),
    st.builds(Cooldown, simple, counts, counts, st.floats(0.0, 1.0), st.sampled_from(["sqrt"])),
    st.builds(Power, rates, counts, rates),
    st.builds(Exponential, rates, rates, counts),
    st.builds(PerStep, st.lists(rates, min_size=1, max_size=4)),
)
fractions = st.floats(0.0, 0.999)
parts = st.none() | st.integers(1, 1000)


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    epochs = draw(st.integers(2, 300))
    idle = draw(st.sampled_from(["none", "first", "every"]))
    late = draw(
        st.none()
        | st.builds(
            LatePhaseConfig,
            start_epoch=st.integers(0, epochs - 1),
            members=st.integers(2, 50),
            select=st.sampled_from(["batchnorm+head", "name:*.weight"]),
            gamma=st.sampled_from(["sum", "mean", 1.0, 0.3]),
            **draw(  # without noise its rule is refused
                st.fixed_dictionaries({"noise": st.just(st.just(0.0))})
                | st.fixed_dictionaries(
                    {
                        "noise": st.just(st.floats(0.01, 2.0)),
                        "noise_rule": st.just(st.sampled_from(["rms", "fan_in"])),
                    }
                )
            ),
            idle_steps=st.just(idle),
            leftover=st.sampled_from(["carry", "members", "drop"]),
            fused=st.booleans() if idle == "none" else st.just(False),
            member_lr=st.none() | schedules,
            weight_decay=st.none() | fractions,
        )
    )
    first = late.start_epoch if late is not None else 0
    start = st.integers(first, epochs - 1)
    average = draw(st.none() | st.builds(SWA, start) | st.builds(EMA, start, fractions))
    optimizer = draw(
        st.fixed_dictionaries({"optimizer": st.just("sgd"), "momentum": fractions})
        | st.fixed_dictionaries(
            {
                "optimizer": st.sampled_from(["adam", "adamw"]),
                "betas": st.tuples(fractions, fractions),
            }
        )
    )
    values = st.recursive(
        st.integers(-9, 9) | st.booleans() | st.text(max_size=3) | rates,
        lambda inner: st.lists(inner, max_size=2),
        max_leaves=3,
    )
    names = st.sampled_from(["width", "norm", "dropout", "hidden", "options"])
    decay = draw(st.floats(0.0, 1.0))
    return RunConfig(
        draw(
            st.builds(
                DataConfig,
                st.text(max_size=5),
                counts,
                st.lists(st.sampled_from(["crop", "flip"]), max_size=2).map(tuple),
                st.integers(0, 16),
                st.sampled_from(["shuffle", "replacement", "stream"]),
                parts,
                parts,
                counts,
            )
        ),
        draw(
            st.builds(
                ModelConfig,
                st.text(max_size=5),
                st.dictionaries(names, values),
                st.none() | st.sampled_from(["a.pt", "b/c d.pth"]),
                st.none() | st.just("lstm.*"),
                st.none() | st.integers(1, 8),
            )
        ),
        draw(
            st.builds(
                TrainConfig,
                epochs=st.just(epochs),
                lr=schedules,
                lr_every=st.sampled_from(["epoch", "step"]),
                **{name: st.just(value) for name, value in optimizer.items()},
                nesterov=st.booleans(),
                weight_decay=st.just(decay),
                no_decay=st.sampled_from(["", "norm+bias"] if decay else [""]),
                label_smoothing=fractions,
                clip_norm=st.none() if late is not None and late.fused else st.none() | rates,
                precision=st.sampled_from(["float32", "bfloat16", "float64"]),
                channels_last=st.booleans(),
                compile=st.booleans(),
                micro_batches=st.just(1) if late is not None and late.fused else counts,
            )
        ),
        late,
        average,
        draw(
            st.builds(
                EvaluateConfig, counts, counts, st.just(("svhn",)) | st.just(()), st.booleans(),
                st.booleans(), st.booleans(), st.integers(0, 9),
            )
        ),
        draw(st.integers(0, 2**40)),
    )  # fmt: skip


@given(runs())
def test_description_builds_the_same_run(run: RunConfig) -> None:
    stated = describe(run)
    assert build(stated) == run
    assert describe(build(stated)) == stated
    # A run is found again by this key: every part of it counts.
    assert keys.key(describe(replace(run, seed=run.seed + 1))) != keys.key(stated)


@given(runs())
def test_description_survives_json(run: RunConfig) -> None:
    import json

    again = json.loads(json.dumps(describe(run)))
    assert build(again) == run
    assert keys.key(again) == keys.key(describe(run))


def test_every_schedule_is_generated() -> None:
    known = {Constant, Piecewise, Linear, Cosine, WarmupStableDecay, Cyclic, Joined, Warmup}
    known |= {Cooldown, Power, Exponential, PerStep}
    assert known == set(SCHEDULES.values())


@given(schedules)
def test_late_phase_has_schedules_of_its_own(schedule: Any) -> None:
    late = LatePhaseConfig(start_epoch=0, member_lr=schedule)
    run = RunConfig(DataConfig("digits"), ModelConfig("mlp"), TrainConfig(3, schedule), late)
    stated = describe(run)
    assert stated["late_phase"]["member_lr"] == stated["train"]["lr"]
    assert build(stated) == run


def test_defaults_are_the_papers() -> None:
    run = build(mapping(late_phase={"start_epoch": 1}))
    train, late = run.train, run.late_phase
    assert late is not None
    assert (train.optimizer, train.momentum, train.nesterov) == ("sgd", 0.9, True)
    assert train.weight_decay == 5e-4
    assert late.member_lr is None
    assert late.weight_decay is None
    assert (late.gamma, late.noise, late.select) == ("sum", 0.0, "batchnorm+head")


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"optimiser": {}}, ("optimiser",)),
    ({"train": {"learning_rate": 0.1}}, ("train.learning_rate",)),
    ({"train": {"epoch": 3}}, ("train.epoch ", "did you mean 'epochs'")),
    ({"train": {"epochs": 0}}, ("train.epochs", ">= 1", "0")),
    ({"train": {"epochs": 2.5}}, ("train.epochs", "whole number", "2.5")),
    ({"train": {"epochs": True}}, ("train.epochs", "whole number", "True")),
    ({"train": {"epochs": 2**70}}, ("train.epochs", "2^53")),
    ({"train": {"lr": "0.1"}}, ("train.lr", "a number", "'0.1'")),
    ({"train": {"lr": 0.0}}, ("train.lr", "0.0")),
    ({"train": {"lr": -1}}, ("train.lr", "-1")),
    ({"train": {"lr": float("nan")}}, ("train.lr", "nan")),
    ({"train": {"lr": {"schedule": "linaer"}}}, ("train.lr.schedule", "did you mean 'linear'")),
    ({"train": {"lr": {"start": 0.1}}}, ("train.lr.schedule is missing",)),
    ({"train": {"lr": {"schedule": "linear", "start": 1}}}, ("train.lr.end is missing",)),
    ({"train": {"lr_every": "minute"}}, ("train.lr_every", "'minute'", "epoch, step")),
    ({"train": {"optimizer": "adamx"}}, ("train.optimizer", "'adamx'", "did you mean")),
    ({"train": {"precision": "float16"}}, ("train.precision", "bfloat16")),
    ({"train": {"momentum": 1.0}}, ("train.momentum", "[0, 1)", "1.0")),
    ({"train": {"weight_decay": -0.1}}, ("train.weight_decay", "-0.1")),
    ({"train": {"label_smoothing": 2}}, ("train.label_smoothing", "[0, 1]")),
    ({"train": {"clip_norm": 0.0}}, ("train.clip_norm", "0.0")),
    ({"train": {"micro_batches": 0}}, ("train.micro_batches", ">= 1")),
    ({"train": {"betas": [0.9]}}, ("train.betas", "two numbers", "[0.9]")),
    ({"train": {"betas": [0.9, 1.0]}}, ("train.betas", "[0, 1)", "1.0")),
    ({"train": {"nesterov": 1}}, ("train.nesterov", "true or false")),
    ({"train": 3}, ("train must be a table", "3")),
    ({"data": {"batch_size": 0}}, ("data.batch_size", ">= 1")),
    ({"data": {"augment": "crop"}}, ("data.augment", "list of texts")),
    ({"data": {"augment": ["crp"]}}, ("data.augment", "did you mean 'crop'")),
    ({"data": {"cutout": -1}}, ("data.cutout", ">= 0")),
    ({"data": {"sampling": "shufle"}}, ("data.sampling", "did you mean 'shuffle'")),
    ({"data": {"train_examples": 0}}, ("data.train_examples", ">= 1")),
    ({"data": {"train_examples": "all"}}, ("data.train_examples", "whole number")),
    ({"model": {"width": 3}}, ("model.name is missing",)),
    ({"model": {"name": 3}}, ("model.name", "text")),
    ({"model": {"name": "mlp", "lora": 0}}, ("model.lora", ">= 1")),
    ({"model": {"name": "mlp", "classes": 3}}, ("model.classes", "leave it out")),
    ({"model": "mlp"}, ("model must be a table",)),
    ({"late_phase": {}}, ("late_phase.start_epoch is missing",)),
    ({"late_phase": {"start_epoch": 3}}, ("late_phase.start_epoch", "epoch 3", "got 3")),
    ({"late_phase": {"start_epoch": -1}}, ("late_phase.start_epoch", ">= 0", "-1")),
    ({"late_phase": LATE | {"members": 1}}, ("late_phase.members", ">= 2", "1")),
    ({"late_phase": LATE | {"gamma": "summ"}}, ("late_phase.gamma", "did you mean 'sum'")),
    ({"late_phase": LATE | {"gamma": -1.0}}, ("late_phase.gamma", "-1.0")),
    ({"late_phase": LATE | {"noise": -1.0}}, ("late_phase.noise", "-1.0")),
    ({"late_phase": LATE | {"noise_rule": "max"}}, ("late_phase.noise_rule", "fan_in, rms")),
    ({"late_phase": LATE | {"idle_steps": "all"}}, ("late_phase.idle_steps", "'all'")),
    ({"late_phase": LATE | {"leftover": "keep"}}, ("late_phase.leftover", "'keep'")),
    ({"late_phase": LATE | {"weight_decay": -1.0}}, ("late_phase.weight_decay", "-1.0")),
    ({"late_phase": LATE | {"member_lr": "fast"}}, ("late_phase.member_lr", "a number")),
    ({"late_phase": LATE | {"fused": True, "idle_steps": "first"}}, ("late_phase.fused", "none")),
    (
        {"late_phase": LATE | {"fused": True}, "train": {"clip_norm": 1.0}},
        ("late_phase.fused", "train.clip_norm", "leave one out"),
    ),
    (
        {"late_phase": LATE | {"fused": True}, "train": {"micro_batches": 2}},
        ("late_phase.fused", "train.micro_batches", "2"),
    ),
    ({"average": {}}, ("average.method is missing",)),
    ({"average": {"method": "mean"}}, ("average.method", "ema, swa")),
    ({"average": {"method": "ema", "decay": 1.0}}, ("average.decay", "[0, 1)")),
    ({"average": {"method": "swa", "start_epoch": 3}}, ("average.start_epoch", "epoch 3")),
    (
        {"late_phase": LATE, "average": {"method": "swa", "start_epoch": 0}},
        ("average.start_epoch", "late_phase.start_epoch", "got 0"),
    ),
    ({"train": {"T0": 3}}, ("train.T0", "T0 is late_phase.start_epoch")),
    ({"late_phase": {"start_epoch": 1, "K": 3}}, ("late_phase.K", "K is late_phase.members")),
    ({"train": {"wd": 0.1}}, ("train.wd", "wd is train.weight_decay")),
    ({"train": {"members": 3}}, ("train.members", "members is late_phase.members")),
    ({"data": {"epochs": 3}}, ("data.epochs", "epochs is train.epochs")),
    ({"lr": 0.1}, ("lr is not a known key", "lr is train.lr")),
    ({"evaluate": {"every": 0}}, ("evaluate.every", ">= 1")),
    ({"evaluate": {"ood": "svhn"}}, ("evaluate.ood", "list of texts")),
    ({"evaluate": {"mc_dropout": -1}}, ("evaluate.mc_dropout", ">= 0")),
    ({"seed": -1}, ("seed", ">= 0", "-1")),
    ({"seed": 0.5}, ("seed", "whole number")),
    ({"seed": "one"}, ("seed", "whole number")),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistake_is_one_line(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(NQMError) as caught:
        build(mapping(**change))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert "Config" not in message, message  # keys, not classes


@pytest.mark.parametrize("section", ["data", "model", "train"])
def test_missing_section(section: str) -> None:
    incomplete = mapping()
    del incomplete[section]
    with pytest.raises(NQMError, match=rf"^{section} is missing; add a \[{section}\] table$"):
        build(incomplete)


def test_start_epochs_at_their_limits() -> None:
    build(mapping(late_phase=LATE | {"start_epoch": 0}))
    build(mapping(late_phase=LATE | {"start_epoch": 2}))
    late = LATE | {"start_epoch": 2}
    build(mapping(late_phase=late, average={"method": "swa", "start_epoch": 2}))


# --- optimizers ----------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 2)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_spared_weights_do_not_decay(optimizer: str) -> None:
    net = Net()
    net.first.bias.requires_grad_(False)
    config = TrainConfig(
        1, Constant(0.25), optimizer=optimizer, weight_decay=0.5, no_decay="norm+bias", momentum=0.0
    )
    made = make_optimizer(net, config)
    held = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    decays = {name: held.get(id(p)) for name, p in net.named_parameters()}
    assert decays == {
        "first.weight": 0.5, "first.bias": None, "norm.weight": 0.0, "norm.bias": 0.0,
        "head.weight": 0.5, "head.bias": 0.0,
    }  # fmt: skip
    assert {group["lr"] for group in made.param_groups} == {0.25}
    set_lr(made, 0.125)
    assert {group["lr"] for group in made.param_groups} == {0.125}
    # On a gradient of zero SGD only shrinks: w <- (1 - lr decay) w.
    if optimizer == "sgd":
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        made.step()
        for name, p in net.named_parameters():
            shrunk = 1 - 0.125 * (decays[name] or 0.0)
            torch.testing.assert_close(p.detach(), shrunk * before[name])


# --- settings that nothing reads -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"optimizer": "adam", "momentum": 0.5}}, "train.momentum would be ignored"),
        ({"train": {"betas": [0.5, 0.9]}}, "train.betas would be ignored"),
        (
            {"train": {"no_decay": "bias", "weight_decay": 0.0}},
            r"train.no_decay would be ignored \(weight_decay = 0\)",
        ),
        ({"late_phase": LATE | {"noise_rule": "fan_in"}}, "late_phase.noise_rule would be ignored"),
        (
            {"model": {"name": "timm:resnet18", "pretrained": True, "checkpoint": "a.pt"}},
            "model.pretrained would be ignored",
        ),
        ({"late_phase": {"T0": 1}}, "late_phase.T0 is not a known key; T0 is late_phase.start"),
        ({"late_phase": LATE | {"K": 4}}, "late_phase.K .*; K is late_phase.members"),
        ({"T0": 3}, "^T0 is not a known key; T0 is late_phase.start_epoch"),
        ({"data": {"mean": [float("nan")]}}, r"data.mean must be a finite number; got nan"),
        ({"data": {"std": [0.0]}}, r"data.std must lie in \(0, inf\); got 0.0"),
        ({"data": {"std": [float("inf")]}}, "data.std"),
        ({"data": {"mean": []}}, "data.mean must hold a number for each channel"),
        ({"model": {"name": "mlp", "checkpoint": ""}}, "model.checkpoint must be the path"),
        ({"train": {"epochs": 2**40}}, "train.epochs must be at most 1000000"),
    ],
)
def test_what_would_be_ignored_or_makes_no_sense_is_refused(
    sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(NQMError, match=words):
        build(mapping(**sections))


def test_no_momentum_is_none_for_every_optimizer() -> None:
    build(mapping(train={"optimizer": "adamw", "momentum": 0.0, "nesterov": False}))

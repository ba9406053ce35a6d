"""The scale gpu: one rule for all recipes, what is stated is kept, and no CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from neural.training.config import describe
from neural.training.experiment import dry_run, run_experiment
from neural.training.gpu_scale import SETTINGS, check_device, choose
from neural.training.recipe import Recipe, load_recipe, recipe_names
from neural.training.show import describe_recipe, overview, text
from neural.training.sweep import build, work
from neural.training.task import Runtime
from nqm.cli import main
from nqm.errors import NQMError


def settings(recipe: Recipe) -> tuple[set[object], ...]:
    """Values of precision, channels_last, compile and fused over the arms."""
    runs = recipe.arms.values()
    train = [{getattr(run.train, name) for run in runs} for name in ("precision", "channels_last")]
    compiled = {run.train.compile for run in runs}
    return *train, compiled, {run.late_phase.fused for run in runs if run.late_phase}


@pytest.mark.parametrize("name", recipe_names())
def test_nothing_but_speed_and_precision_differs_from_scale_full(name: str) -> None:
    full, gpu = load_recipe(name), load_recipe(name, "gpu")
    assert (gpu.scale, gpu.seeds, gpu.title) == ("gpu", full.seeds, full.title)
    assert list(gpu.arms) == list(full.arms)
    for arm, run in gpu.arms.items():
        mine, theirs = describe(run), describe(full.arms[arm])
        for entry in SETTINGS:
            section, key = entry.split(".")
            for mapping in (mine, theirs):
                mapping.get(section, {}).pop(key, None)
        assert mine == theirs
        assert not (run.train.compile and run.late_phase and run.late_phase.fused)
    chosen = {entry: choice.value for entry, choice in choose(gpu.arms.values()).items()}
    for entry, value in chosen.items():  # what `show` says is what is trained, in all arms
        section, key = entry.split(".")
        held = {getattr(getattr(run, section), key) for run in gpu.arms.values()
                if getattr(run, section) is not None}  # fmt: skip
        assert held <= {value}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10_bn", ({"bfloat16"}, {True}, {True}, {False})),
        ("cifar100_hypernet", ({"bfloat16"}, {True}, {True}, {False})),
        ("imagenet_resnet50", ({"bfloat16"}, {True}, {True}, {False})),
        ("transformer_python_docs", ({"bfloat16"}, {False}, {True}, {False})),
        ("enwik8_lstm_rank1", ({"float32"}, {False}, {False}, {False})),  # which clips
        ("digits_mlp", ({"float64"}, {False}, {True}, {False})),  # which states float64
    ],
)
def test_the_rule(name: str, expected: tuple[set[object], ...]) -> None:
    assert settings(load_recipe(name, "gpu")) == expected


def test_recurrent_members_are_fused_where_nothing_clips() -> None:
    runs = load_recipe("enwik8_lstm_rank1").arms.values()
    assert "clip_norm" in choose(list(runs))["late_phase.fused"].reason
    free = [replace(run, train=replace(run.train, clip_norm=None)) for run in runs]
    assert choose(free)["late_phase.fused"].value is True


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["late_phase.fused=true"], ({"bfloat16"}, {True}, {False}, {True})),
        (["train.sync_batchnorm=true"], ({"bfloat16"}, {True}, {False}, {False})),
        (['train.precision="float64"'], ({"float64"}, {True}, {True}, {False})),
        (["train.compile=false"], ({"bfloat16"}, {True}, {False}, {False})),
        (["train.channels_last=false"], ({"bfloat16"}, {False}, {True}, {False})),
        (['train.precision="float32"'], ({"float32"}, {True}, {True}, {False})),
    ],
)
def test_what_is_asked_for_is_kept(overrides: list[str], expected: tuple[set[object], ...]) -> None:
    assert settings(load_recipe("cifar10_bn", "gpu", overrides)) == expected


def test_members_that_cannot_be_fused_run_one_by_one() -> None:
    for change in ("train.micro_batches=2", 'late_phase.idle_steps="first"'):
        assert settings(load_recipe("enwik8_lstm_rank1", "gpu", [change]))[-1] == {False}


RECIPE = """
seeds = 2
[data]
name = "digits"
[model]
name = "digits_cnn"
[train]
epochs = 4
lr = 0.1
[arm.base]
"""


def test_a_recipe_of_ones_own_has_the_scale_and_may_add_to_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE)
    assert settings(load_recipe(str(file), "gpu"))[:3] == ({"bfloat16"}, {True}, {True})
    file.write_text(RECIPE + "[scale.gpu]\ntrain.compile = false\ndata.batch_size = 64\n")
    made = load_recipe(str(file), "gpu")
    assert settings(made)[:3] == ({"bfloat16"}, {True}, {False})
    assert made.arms["base"].data.batch_size == 64
    assert load_recipe(str(file)).arms["base"].data.batch_size == 128


def test_a_cpu_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    recipe, told = load_recipe("digits_bn", "gpu"), "scale gpu is for a GPU, and the device is cpu"
    for call in (lambda: run_experiment(recipe, tmp_path / "out"), lambda: dry_run(recipe)):
        with pytest.raises(NQMError, match=told):
            call()
    cell = build({"recipe": "digits_bn", "scale": "gpu"})
    trained = work(tmp_path / "out", Runtime()).solve
    with pytest.raises(NQMError, match=told):
        trained(cell, "0" * 16)
    command = ["neural", "train", "digits_bn", "--scale", "gpu", "--device", "cpu"]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {told}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    check_device("gpu", torch.device("cuda", 1))
    check_device("cpu", torch.device("cpu"))


def test_it_is_shown_with_its_reasons() -> None:
    content = describe_recipe(load_recipe("enwik8_lstm_rank1", "gpu"), 0.25)
    shown = text(content)
    assert list(content["gpu"]) == list(SETTINGS)
    for entry, choice in content["gpu"].items():
        assert f"  {entry} = {choice['value']!r}: {choice['reason']}\n" in shown
    assert "gpu" not in describe_recipe(load_recipe("digits_bn"), 0.25)


def test_the_table_of_all_recipes_has_both_scales() -> None:
    (row,) = overview("full", 0.25, None, "cifar10_bn").to_dict("records")
    assert row["scale gpu"] == "bfloat16, channels_last, compile"
    # The rate of bfloat16 is twice that of TF32.
    assert float(row["h on an H100"]) == pytest.approx(2.0 * float(row["gpu: h"]), rel=0.1)
    full, gpu = (float(str(row[key]).split()[0]) for key in ("memory", "gpu: memory"))
    assert 0.5 < gpu / full < 0.7  # activations are halved, weights are not
    assert "scale gpu" not in overview("smoke", 0.25, None, "digits_bn")


def test_a_section_that_only_an_arm_has(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text_net = RECIPE.replace("digits_cnn", "lstm_lm").replace("digits", "python_docs")
    file.write_text(text_net + "[arm.late.late_phase]\nstart_epoch = 2\nmembers = 3\n")
    made = load_recipe(str(file), "gpu")
    assert made.arms["base"].late_phase is None
    assert settings(made) == ({"float32"}, {False}, {False}, {True})

"""Recipes: those that come with the package, how arms are put together, and mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from neural.data import DATASETS
from neural.training.config import build, describe
from neural.training.experiment import jobs
from neural.training.recipe import SCALES, load_recipe, make_recipe, recipe_names
from nqm.errors import NQMError
from nqm.schedule import Constant, Linear
from tests.tiny_runs import LATE, mapping


def scales_of(name: str) -> list[str]:
    found = []
    for scale in SCALES:
        try:
            load_recipe(name, scale)
        except NQMError as error:
            if "has no scale" not in str(error):
                raise
        else:
            found.append(scale)
    return found


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipe_holds_together(name: str) -> None:
    scales = scales_of(name)
    assert "full" in scales
    assert "smoke" in scales
    for scale in scales:
        recipe = load_recipe(name, scale)
        assert recipe.name == name
        assert recipe.scale == scale
        assert recipe.title
        assert len(recipe.title) < 100
        assert recipe.seeds
        assert recipe.arms
        for run in recipe.arms.values():
            assert build(describe(run)) == run
            assert run.data.name in DATASETS
            for other in run.evaluate.ood:
                assert other in DATASETS
        # Branches of one arm may differ in their seeds alone.
        different = [(name.partition("/")[0], describe(run)) for name, run in recipe.arms.items()]
        for i, (arm, one) in enumerate(different):
            before = [other for name, other in different[:i] if name != arm]
            assert scale != "full" or one not in before, "two arms of a recipe are the same run"
        for group in jobs(recipe):
            known = set()
            for job in group:
                assert job.start is None or job.start[0] in known
                known.add(job.arm)
    arms = {scale: list(load_recipe(name, scale).arms) for scale in scales}
    assert all(names == arms["full"] for names in arms.values())
    full, smoke = (load_recipe(name, scale) for scale in ("full", "smoke"))
    for arm in full.arms:
        assert smoke.arms[arm].train.epochs <= full.arms[arm].train.epochs


def test_names_are_the_files() -> None:
    folder = Path(__file__).parents[3] / "neural/recipes"
    assert recipe_names() == sorted(path.stem for path in folder.glob("*.toml"))
    assert "digits_bn" in recipe_names()


# --- how arms are put together -------------------------------------------------------------------


def with_arms(arms: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {**mapping(**sections), "arm": arms}


def test_optional_sections_are_for_those_that_use_them() -> None:
    sections = {"late_phase": LATE, "average": {"method": "swa", "start_epoch": 1}}
    made = make_recipe(
        "r",
        with_arms(
            {"a": {}, "b": {"use": ["late_phase"]}, "c": {"use": ["average", "late_phase"]}},
            **sections,
        ),
    )
    assert list(made.arms) == ["a", "b", "c"]
    assert made.arms["a"] == build(mapping())
    assert made.arms["b"] == build(mapping(late_phase=LATE))
    assert made.arms["c"] == build(mapping(**sections))


def test_arms_that_were_not_asked_for_may_be_impossible() -> None:
    """Members that start in epoch 12 of 3 are no reason to refuse the base."""
    short = ("train.epochs=3", "average.start_epoch=1")
    for arms in ((), ("base", "late_phase"), ("bass",)):  # the last is no arm at all
        with pytest.raises(NQMError, match=r"^arm\.late_phase: late_phase\.start_epoch"):
            load_recipe("digits_bn", overrides=short, arms=arms)
    assert list(load_recipe("digits_bn", overrides=short, arms=("base",)).arms) == ["base"]
    both = load_recipe("digits_bn", arms=("base",)).arms
    assert list(both) == ["base", "late_phase"], "they are left out only if they must be"


def test_arm_changes_only_what_it_says() -> None:
    line = {"schedule": "linear", "start": 0.1, "end": 0.01, "over": 20}
    other = {"schedule": "constant", "value": 0.3}
    sections = {"train": {"lr": line}, "late_phase": LATE}
    original = with_arms(
        {
            "plain": {},
            "entry": {"train": {"lr": {"over": 7}, "weight_decay": 0.0}},
            "whole": {"train": {"lr": other}},
            "number": {"train": {"lr": 0.2}},
            "own": {"late_phase": {"start_epoch": 2, "members": 5}},
            "used": {"use": ["late_phase"], "late_phase": {"members": 5}},
            "model": {"model": {"hidden": [3, 3]}},
        },
        **sections,
    )
    untouched = copy.deepcopy(original)
    arms = make_recipe("r", original).arms
    assert original == untouched
    assert arms["plain"].train.lr == Linear(0.1, 0.01, 20)
    assert arms["entry"].train.lr == Linear(0.1, 0.01, 7)
    assert arms["entry"].train.weight_decay == 0.0
    assert arms["whole"].train.lr == Constant(0.3)
    assert arms["number"].train.lr == Constant(0.2)
    assert arms["own"] == build(
        mapping(train={"lr": line}, late_phase={"start_epoch": 2, "members": 5})
    )
    assert arms["used"] == build(mapping(train={"lr": line}, late_phase=LATE | {"members": 5}))
    assert arms["model"].model.options == {"hidden": [3, 3]}
    assert arms["plain"].model.options == {"hidden": [8]}


FILE = """
title = "A title"
seeds = [3, 1]
[data]
name = "digits"
[model]
name = "mlp"
[train]
epochs = 9
lr = 0.1
[late_phase]
start_epoch = 5
[arm.base]
[arm.late]
use = ["late_phase"]
train.weight_decay = 0.25
[scale.smoke]
seeds = 1
train.epochs = 4
late_phase.start_epoch = 2
arm.late.train.weight_decay = 0.125
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    return path


def test_recipe_of_ones_own(file: Path) -> None:
    recipe = load_recipe(str(file))
    assert (recipe.name, recipe.title, recipe.scale) == ("mine", "A title", "full")
    assert recipe.seeds == (3, 1)
    assert recipe.arms["late"].train.weight_decay == 0.25
    assert recipe.arms["base"].late_phase is None


def test_scale_changes_the_recipe_and_overrides_come_last(file: Path) -> None:
    smoke = load_recipe(str(file), "smoke")
    assert smoke.seeds == (0,)
    assert smoke.arms["late"].train.epochs == 4
    assert smoke.arms["late"].train.weight_decay == 0.125
    changed = load_recipe(
        str(file),
        "smoke",
        ["train.epochs=6", "late_phase.members=4", "arm.late.train.weight_decay=0", "seeds=2"],
    )
    late = changed.arms["late"]
    assert late.late_phase is not None
    assert (late.train.epochs, late.late_phase.members, late.train.weight_decay) == (6, 4, 0.0)
    assert changed.seeds == (0, 1)
    assert changed.arms["base"].train.weight_decay == 5e-4


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "sections", "words"),
    [
        ({}, {}, ("recipe r has no arm", "[arm.NAME]")),
        ({"a": 3}, {}, ("arm.a must be a table",)),
        ({"a": {"use": "late_phase"}}, {"late_phase": LATE}, ("arm.a.use", "list of texts")),
        ({"a": {"use": ["latephase"]}}, {"late_phase": LATE}, ("arm.a.use", "'late_phase'?")),
        ({"a": {"use": ["average"]}}, {}, ("arm.a.use", "'average'")),
        ({"a": {"use": ["train"]}}, {}, ("arm.a.use", "'train'")),
        ({"a": {}, "b": {"train": {"epoch": 1}}}, {}, ("arm.b", "train.epoch ", "'epochs'?")),
        ({"a": {}}, {"train": {"momentum": 2.0}}, ("arm.a", "train.momentum", "2.0")),
        (
            {"a": {"use": ["late_phase"]}},
            {"late_phase": LATE | {"start_epoch": 9}},
            ("arm.a", "late_phase.start_epoch", "epoch 3", "got 9"),
        ),
        ({"a": {"average": {"start_epoch": 2}}}, {}, ("arm.a", "average.method is missing")),
        ({"a": {"data": 3}}, {}, ("arm.a", "data must be a table")),
        ({"a": {}}, {"seeds": 0}, ("seeds", ">= 1")),
        ({"a": {}}, {"seeds": []}, ("seeds", "[]")),
        ({"a": {}}, {"seeds": [1, 1]}, ("seeds", "different", "[1, 1]")),
        ({"a": {}}, {"seeds": [-1]}, ("seeds", "[-1]")),
        ({"a": {}}, {"seeds": ["x"]}, ("seeds.0", "whole number")),
        ({"a": {}}, {"seeds": True}, ("seeds", "True")),
        ({"a": {}}, {"title": 3}, ("title", "text")),
        ({"a": {}}, {"titel": "x"}, ("titel is not a known key",)),
        ({"a": {}}, {"late_phase": LATE}, ("late_phase would be ignored", 'use = ["late_phase"]')),
        ({"a": {}}, {"evaluate": {"line": True}}, ("evaluate.line would be ignored",)),
    ],
)
def test_mistake_is_one_line(
    arms: dict[str, Any], sections: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(NQMError) as caught:
        make_recipe("r", with_arms(arms, **sections))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_mistakes_in_the_call(file: Path) -> None:
    for arguments, words in [
        (("digits_bm",), ("'digits_bm'", "did you mean 'digits_bn'")),
        (("missing.toml",), ("missing.toml", "no such file")),
        ((str(file), "smok"), ("'smok'", "did you mean 'smoke'")),
        ((str(file), "cpu"), ("mine has no scale 'cpu'", "full, gpu, smoke")),
        ((str(file), "full", ["train.epochs"]), ("key=value",)),
        ((str(file), "full", ["train.epochs=many"]), ("train.epochs", "'many'")),
        ((str(file), "full", ["train.epochs.x=1"]), ("train.epochs",)),
    ]:
        with pytest.raises(NQMError) as caught:
            load_recipe(*arguments)  # type: ignore[arg-type]
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scale = 3", ("scale must be a table",)),
        ("scale.smoke = 3", ("scale.smoke must be a table",)),
        ("scale.smokey.seeds = 1", ("scale.smokey", "did you mean 'smoke'")),
        ("= 3", ("not valid TOML",)),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{text}\n{FILE.partition('[scale.smoke]')[0]}")
    with pytest.raises(NQMError) as caught:
        load_recipe(str(path), "smoke")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)

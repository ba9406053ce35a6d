"""Branches of an arm: what is drawn, which runs they are, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neural.combine.sources import open_members
from neural.training.branches import BranchesConfig
from neural.training.config import build
from neural.training.experiment import jobs, run_experiment
from neural.training.load_run import reopen
from neural.training.recipe import Recipe
from neural.training.sweep import build as build_cell
from neural.training.train import train
from nqm.errors import NQMError
from tests.tiny_runs import assert_equal, mapping, recipe, tiny, weights

VARY: dict[str, Any] = {
    "train.lr": {"log": [1e-3, 1e-1]},
    "train.weight_decay": {"uniform": [0.0, 1e-3]},
    "data.augment": [["crop"], []],
}


def soup(count: int = 3, vary: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    branches = {"count": count, "vary": VARY if vary is None else vary}
    return recipe({"base": {}, "soup": {"use": ["branches"]}}, branches=branches, **sections)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    train(tiny(seed=5), folder)
    return folder / "model.pt"


# --- what is drawn -------------------------------------------------------------------------------


def test_draws_are_spread_over_their_ranges() -> None:
    """Quantiles of a uniform share; three of four thousand draws' standard errors are 0.024."""
    drawn = [BranchesConfig(count=1, vary=VARY, seed=3).settings(i) for i in range(4000)]
    shares = {
        "log": [math.log10(one["train.lr"] / 1e-3) / 2 for one in drawn],
        "uniform": [one["train.weight_decay"] / 1e-3 for one in drawn],
    }
    for share in shares.values():
        assert min(share) >= 0.0
        assert max(share) <= 1.0
        np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75],
                                   atol=0.024)  # fmt: skip
    crops = np.mean([one["data.augment"] == ["crop"] for one in drawn])
    assert abs(crops - 0.5) < 0.024
    correlation = np.corrcoef(shares["log"], shares["uniform"])[0, 1]
    assert abs(correlation) < 3 / math.sqrt(4000)


def test_draws_depend_on_seed_and_branch_alone() -> None:
    few, many = soup(3), soup(11)
    for i in range(3):
        assert few.arms[f"soup/branch{i}"] == many.arms[f"soup/branch{i:02d}"]
    assert len({float(run.train.lr(0)) for run in many.arms.values()}) == 12
    settings = [BranchesConfig(count=2, vary=VARY, seed=s).settings(0) for s in (0, 1)]
    assert settings[0]["train.lr"] != settings[1]["train.lr"]


def test_a_branch_is_the_recipe_with_its_entries_set() -> None:
    made = soup()
    assert list(made.arms) == ["base", "soup/branch0", "soup/branch1", "soup/branch2"]
    for i in range(3):
        drawn = BranchesConfig(count=3, vary=VARY).settings(i)
        changed = mapping(
            train={"lr": drawn["train.lr"], "weight_decay": drawn["train.weight_decay"]},
            data={"augment": drawn["data.augment"]},
        )
        assert made.arms[f"soup/branch{i}"] == build(changed)


# --- which runs they are -------------------------------------------------------------------------


def test_branches_of_a_checkpoint_differ_by_seed_and_share_their_start(
    start: Path, tmp_path: Path
) -> None:
    model = {"name": "mlp", "hidden": [8], "checkpoint": str(start)}
    made = soup(2, {}, model=model, train={"epochs": 1}, seeds=2)
    seeds = {
        (job.arm, job.seed): job.run.seed for group in jobs(made) for job in group
    }  # N seed + branch: no two ingredients draw the same minibatches
    assert seeds == {
        ("base", 0): 0, ("base", 1): 1,
        ("soup/branch0", 0): 0, ("soup/branch1", 0): 1,
        ("soup/branch0", 1): 2, ("soup/branch1", 1): 3,
    }  # fmt: skip
    table = run_experiment(made, tmp_path, arms=["soup"])
    assert set(table["arm"]) == {"soup/branch0", "soup/branch1"}
    members = open_members([f"{tmp_path}/soup/*/seed0"]).members
    assert [member.name for member in members] == ["branch0/seed0", "branch1/seed0"]
    one, other = (dict(member.read()) for member in members)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert members.ancestor is not None
    assert_equal(dict(members.ancestor.read()), weights(start.parent))
    # A branch is an ordinary run: alone it is the same.
    train(tiny(seed=3, model=model, train={"epochs": 1}), tmp_path / "alone")
    assert_equal(weights(tmp_path / "alone"), weights(tmp_path / "soup/branch1/seed1"))
    assert reopen(tmp_path / "soup/branch1/seed1").run.seed == 3


def test_branches_without_a_checkpoint_start_from_their_seed() -> None:
    made = soup(2)
    assert [job.run.seed for job in jobs(made)[0]] == [0, 0, 0]


def test_folder_of_branches_is_told_apart_from_a_run(start: Path, tmp_path: Path) -> None:
    model = {"name": "mlp", "hidden": [8], "checkpoint": str(start)}
    made = soup(1, {}, model=model, train={"epochs": 1})
    run_experiment(made, tmp_path, arms=["soup/branch0"])
    with pytest.raises(NQMError, match=r"give one of its runs: .*soup/branch0/seed0"):
        reopen(tmp_path)
    with pytest.raises(NQMError, match=r"has no arm 'soap'; did you mean 'soup'"):
        run_experiment(made, tmp_path, arms=["soap"])


def test_a_sweep_takes_one_branch(start: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        f"""
[data]
name = "digits"
[model]
name = "mlp"
hidden = [8]
checkpoint = "{start}"
[train]
epochs = 1
lr = 0.1
[branches]
count = 3
vary = {{ "train.lr" = [0.1, 0.2] }}
[arm.soup]
use = ["branches"]
"""
    )
    cell = build_cell({"recipe": str(file), "arm": "soup/branch1", "seed": 2})
    assert cell.run.seed == 7
    with pytest.raises(NQMError, match=r"arm 'soup' is not one of recipe mine.*soup/branch0"):
        build_cell({"recipe": str(file)})


# --- refused before the first step ---------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"count": 0}, ("branches.count",)),
    ({"count": 10**9}, ("branches.count", "10000")),
    ({"seed": -1}, ("branches.seed",)),
    ({"sed": 1}, ("branches.sed", "seed")),
    ({"vary": 3}, ("branches.vary",)),
    ({"vary": {"train.lr": 0.1}}, ("branches.vary.train.lr", "{log = [a, b]}", "0.1")),
    ({"vary": {"train.lr": {"log": [0.0, 1.0]}}}, ("branches.vary.train.lr.log",)),
    ({"vary": {"train.lr": {"log": [0.2, 0.1]}}}, ("branches.vary.train.lr.log", "not fall")),
    ({"vary": {"train.lr": {"log": [0.1]}}}, ("branches.vary.train.lr.log", "two numbers")),
    ({"vary": {"train.lr": {"normal": [0, 1]}}}, ("branches.vary.train.lr",)),
    ({"vary": {"train.lr": {"uniform": [0, float("inf")]}}}, ("branches.vary.train.lr.uniform",)),
    ({"vary": {"train.lr": []}}, ("branches.vary.train.lr", "at least one")),
    ({"vary": {"seed": [1, 2]}}, ("branches.vary.seed cannot vary",)),
    ({"vary": {"model.checkpoint": ["a", "b"]}}, ("branches.vary.model.checkpoint cannot vary",)),
    ({"vary": {"train.lrr": [1, 2]}}, ("arm.soup: branch0: train.lrr", "lr")),
    ({"vary": {"train.momentum": [0.5, 2.0]}}, ("train.momentum", "2.0")),
    ({"vary": {"train.lr.start": [0.5, 2.0]}}, ("train.lr.start", "not a table")),
    ({"vary": {"late_phase.members": [2, 3]}}, ("branches.vary.late_phase.members", "no such")),
    ({"vary": {"train": [{}], "train.lr": [0.1]}}, ("branches.vary.train overlaps",)),
    ({"vary": {"train.lr": [0.1, 0.2]}}, ("same run as another branch", "model.checkpoint")),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_refused(changes: dict[str, Any], told: tuple[str, ...]) -> None:
    branches = {"count": 3, "vary": VARY} | changes
    with pytest.raises(NQMError) as caught:
        recipe({"soup": {"use": ["branches"]}}, branches=branches)
    assert "\n" not in str(caught.value)
    for part in told:
        assert part in str(caught.value)

"""Runs on disk are found again after a setting was added, or a default changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neural.bridge.config import BridgeConfig, Plan, Training
from neural.curvature.cache import Cache
from neural.models import MODELS
from neural.models.small_cnn import MLP
from neural.training import config
from neural.training.averages import AVERAGES
from neural.training.config import (
    EvaluateConfig,
    LatePhaseConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    build,
    describe,
    restore,
    run_key,
)
from neural.training.load_run import reopen
from neural.training.run_folder import RunFolder, open_run
from neural.training.snapshots import SnapshotsConfig
from neural.training.sweep import work
from neural.training.task import Runtime
from neural.training.train import train
from nqm import keys
from nqm.errors import NQMError
from nqm.keys import omits
from nqm.runs.sweep import Sweep
from tests.key_defaults import check, networks
from tests.nqm.test_keys import extended
from tests.tiny_runs import LATE, mapping, tiny

AVERAGE: dict[str, Any] = {"method": "swa", "start_epoch": 1}
WHOLE: dict[str, Any] = {"late_phase": LATE, "average": AVERAGE}
#: What no run has together with the parts of `WHOLE`.
SNAPSHOTS: dict[str, Any] = {"kind": "chain", "members": 2, "first_epochs": 2, "cycle_epochs": 1}

SPELLINGS: dict[str, dict[str, Any]] = {
    "a default": {"train": {"momentum": 0.9, "nesterov": True}},
    "a number": {"train": {"lr": 5e-2, "weight_decay": 0.0005}},
    "a schedule": {"train": {"lr": {"schedule": "constant", "value": 0.05}}},
    "a section of defaults": {"evaluate": {}},
    "a section that states them": {"evaluate": {"every": 1, "ood": []}},
    "a default of the model": {"model": {"name": "mlp", "hidden": [8], "dropout": 0}},
    "the seed": {"seed": 0},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_run_has_one_key(name: str) -> None:
    assert run_key(tiny(**SPELLINGS[name])) == run_key(tiny())


def test_every_part_of_a_run_counts() -> None:
    others = [
        tiny(**WHOLE), tiny(late_phase=LATE), tiny(average=AVERAGE), tiny(seed=1), tiny(),
        tiny(average=AVERAGE | {"method": "ema"}), tiny(average={"method": "swa"}),
        tiny(train={"lr": {"schedule": "linear", "start": 0.05, "end": 0.05, "over": 3}}),
        tiny(model={"name": "mlp", "hidden": [8], "dropout": 0.1}), tiny(model={"name": "mlp"}),
        tiny(evaluate={"every": 2}), tiny(data={"train_examples": 99}),
        tiny(late_phase=LATE | {"members": 4}), tiny(late_phase={"start_epoch": 1}),
        tiny(snapshots=SNAPSHOTS), tiny(snapshots=SNAPSHOTS | {"kind": "star"}),
        tiny(snapshots=SNAPSHOTS | {"reset_optimizer": False}),
    ]  # fmt: skip
    assert len({run_key(run) for run in others}) == len(others)


# --- a new setting -----------------------------------------------------------------------------


def section(name: str, cls: type) -> Callable[[pytest.MonkeyPatch], None]:
    def add(patch: pytest.MonkeyPatch) -> None:
        patch.setitem(config.SECTIONS, name, extended(cls, sharpness_radius=0.0))

    return add


def of_the_average(patch: pytest.MonkeyPatch) -> None:
    method = AVERAGE["method"]
    patch.setitem(AVERAGES, method, extended(AVERAGES[method], sharpness_radius=0.0))


def of_the_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config, "ModelConfig", extended(ModelConfig, ema_head=False))


def of_a_model_of_ours(patch: pytest.MonkeyPatch) -> None:
    class Other(MLP):
        def __init__(self, classes: int, channels: int, skip: bool = False, **more: Any) -> None:
            super().__init__(classes, channels, **more)

    patch.setattr(type(MODELS["mlp"]), "load", lambda family: Other)
    patch.setattr(type(MODELS["mlp"]), "options", lambda family: ("skip", "hidden", "dropout"))


ADDITIONS = {
    "train": section("train", TrainConfig),
    "late_phase": section("late_phase", LatePhaseConfig),
    "average": of_the_average,
    "evaluate": section("evaluate", EvaluateConfig),
    "model": of_the_model,
    "a model's class": of_a_model_of_ours,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(**WHOLE), folder)
    return folder


@pytest.mark.parametrize("name", ADDITIONS)
def test_a_run_is_resumed_after_a_setting_was_added(
    name: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_key(tiny(**WHOLE))
    ADDITIONS[name](monkeypatch)
    run = build(mapping(**WHOLE))
    assert run_key(run) == before
    stamp = (trained / "result.parquet").stat().st_mtime_ns
    assert train(run, trained).status == "finished"  # which only reads a finished run
    assert (trained / "result.parquet").stat().st_mtime_ns == stamp
    assert run_key(open_run(trained)[0]) == before


def test_a_run_with_snapshots_is_found_after_a_setting_was_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tiny(snapshots=SNAPSHOTS)
    stated = describe(before)
    section("snapshots", SnapshotsConfig)(monkeypatch)
    assert run_key(restore(stated)) == run_key(build(mapping(snapshots=SNAPSHOTS)))
    assert run_key(build(mapping(snapshots=SNAPSHOTS))) == run_key(before)


def test_a_new_setting_counts_where_it_is_used(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ADDITIONS["train"](monkeypatch)
    run = build(mapping(**WHOLE, train={"sharpness_radius": 0.05}))
    words = r"was trained with train\.sharpness_radius = 0\.0, you ask for 0\.05; use --out OTHER"
    with pytest.raises(NQMError, match=words):
        train(run, trained)


def test_a_run_of_before_there_were_digests_is_resumed(trained: Path, tmp_path: Path) -> None:
    """As versions wrote it whose key was that of all settings."""
    stated = json.loads((trained / "run.json").read_text())
    del stated["digest"]
    stated["key"] = keys.key(stated["config"])
    (tmp_path / "run.json").write_text(json.dumps(stated | {"status": None}))
    assert RunFolder(tmp_path, tiny(**WHOLE)).status is None
    assert open_run(tmp_path)[0] == tiny(**WHOLE)
    with pytest.raises(NQMError, match=r"late_phase\.members = 3, you ask for 8; use --out OTHER"):
        RunFolder(tmp_path, tiny(**WHOLE | {"late_phase": LATE | {"members": 8}}))
    stated["config"]["seed"] = 5
    (tmp_path / "run.json").write_text(json.dumps(stated))
    with pytest.raises(NQMError, match="was changed after training"):
        open_run(tmp_path)
    with pytest.raises(NQMError, match="was changed after training"):
        RunFolder(tmp_path, tiny(**WHOLE, seed=5))


def test_a_setting_that_no_longer_exists_is_named(trained: Path, tmp_path: Path) -> None:
    stated = json.loads((trained / "run.json").read_text())
    stated["config"]["train"]["dampening"] = 0.1
    (tmp_path / "run.json").write_text(json.dumps(stated))
    with pytest.raises(NQMError, match=r"train\.dampening = 0\.1, you ask for none; use --out"):
        train(tiny(**WHOLE), tmp_path)


def test_a_run_of_an_older_default_is_not_taken_for_one_of_the_new(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, later = run_key(tiny()), run_key(tiny(train={"momentum": 0.95}))
    new = omits(momentum=0.9)(extended(TrainConfig, momentum=0.95))
    monkeypatch.setitem(config.SECTIONS, "train", new)
    words = r"was trained with train\.momentum = 0\.9, you ask for 0\.95; use --out OTHER"
    with pytest.raises(NQMError, match=words):
        train(build(mapping(**WHOLE)), trained)
    assert train(build(mapping(**WHOLE, train={"momentum": 0.9})), trained).status == "finished"
    assert run_key(build(mapping(train={"momentum": 0.9}))) == before
    assert run_key(build(mapping())) == later
    # A run from before there was the entry had what was then the default.
    stated = describe(tiny())
    del stated["train"]["momentum"]
    assert (restore(stated).train.momentum, build(stated).train.momentum) == (0.9, 0.95)


def test_an_entry_that_is_none_against_its_default_is_kept() -> None:
    clipped = extended(TrainConfig, clip_norm=1.0)
    run = replace(tiny(), train=clipped(3, tiny().train.lr, clip_norm=None))
    assert describe(run)["train"]["clip_norm"] is None
    assert "clip_norm" not in describe(tiny())["train"]


def test_no_default_has_changed_unsaid() -> None:
    check("key_defaults_neural.json", networks())


# --- sweeps, bridges and their caches ------------------------------------------------------------

SWEEP = {"recipe": "digits_bn", "scale": "smoke"}


def test_a_cell_of_a_sweep_keeps_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = Sweep(SWEEP, {"seed": [0, 1]}, work=work(tmp_path / "runs", Runtime()))
    before = cells.stamp, [cells.work.key(case.mapping, ".") for case in cells.cases()]
    for name in ("train", "late_phase", "evaluate"):
        ADDITIONS[name](monkeypatch)
    after = cells.stamp, [cells.work.key(case.mapping, ".") for case in cells.cases()]
    assert after[1] == before[1]
    assert after[0].key == before[0].key
    after[0].check(tmp_path / "t.csv", before[0].metadata())
    other = Sweep(SWEEP | {"train": {"epochs": 7}}, cells.axes, work=cells.work).stamp
    with pytest.raises(NQMError, match=r"was computed with train\.epochs = \d+, you ask for 7; "):
        other.check(tmp_path / "t.csv", before[0].metadata())


def test_a_stage_of_a_bridge_is_found_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> dict[str, Any]:
        calls.append("computed")
        return {}

    cache = Cache(tmp_path)
    settings: dict[str, Any] = {"training": Training(0.1, 4, 10), "plan": Plan(runs=20)}
    cache("stage", compute, **settings)
    more = extended(Training, dampening=0.0)(0.1, 4, 10)
    cache("stage", compute, training=more, plan=extended(Plan, pairs=False)(runs=20), control=None)
    assert len(calls) == 1, "a new setting at its default is no other result"
    cache("stage", compute, **settings | {"training": replace(more, dampening=0.1)})
    assert len(calls) == 2
    changed = omits(momentum=0.0)(extended(Training, momentum=0.5))
    cache("stage", compute, **settings | {"training": changed(0.1, 4, 10, 0.0)})
    assert len(calls) == 2, "the old default, stated"
    cache("stage", compute, **settings | {"training": changed(0.1, 4, 10)})
    assert len(calls) == 3


def test_values_of_equal_entries_and_another_class_are_others(tmp_path: Path) -> None:
    one, other = extended(Plan), extended(Plan)
    other.__name__ = "AnotherPlan"
    cache = Cache(tmp_path)
    cache("stage", dict, plan=one())
    cache("stage", dict, plan=other())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_bridge_keeps_its_key() -> None:
    from neural.bridge.pipeline import _stamp

    run, one, plan = tiny(), BridgeConfig(steps=7), Plan(runs=20)
    before = _stamp(run, one, plan)
    more = extended(BridgeConfig, orders=2)(steps=7)
    assert _stamp(run, more, extended(Plan, pairs=False)(runs=20)).key == before.key
    assert _stamp(run, replace(more, orders=3), plan).key != before.key
    assert _stamp(run, replace(one, examples=2000), plan).key == before.key
    others = [_stamp(run, one, replace(plan, seed=1)), _stamp(tiny(seed=1), one, plan)]
    assert before.key not in {other.key for other in others}
    with pytest.raises(NQMError, match=r"was computed with plan\.seed = 0, you ask for 1; "):
        others[0].check(Path("bridge.parquet"), before.metadata())


# --- what `nqm neural evaluate` writes -----------------------------------------------------------


def test_a_measurement_is_found_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neural.training.load_run import evaluate_run
    from nqm.files import locked

    opened, out = reopen(trained), tmp_path / "t.csv"
    with locked(out), pytest.raises(NQMError, match=r"t\.csv is being written by process"):
        evaluate_run(opened, EvaluateConfig(), out)
    assert not out.exists()
    first = evaluate_run(opened, EvaluateConfig(), out)
    kept = out.read_bytes()
    more = extended(EvaluateConfig, adversarial=False)
    assert evaluate_run(opened, more(), out).equals(first)
    with pytest.raises(NQMError, match=r"computed with evaluate\.line = false, you ask for true"):
        evaluate_run(opened, EvaluateConfig(line=True), out)
    assert out.read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    plain = replace(opened, late=None)
    with pytest.raises(NQMError, match="this run has no members"):
        evaluate_run(plain, EvaluateConfig(line=True))


def test_types_of_sections_are_those_of_a_run() -> None:
    """What the additions above replace is what a run is built of."""
    run = tiny(**WHOLE)
    other = tiny(snapshots=SNAPSHOTS)
    for name, cls in config.SECTIONS.items():
        assert isinstance(getattr(other if name == "snapshots" else run, name), cls)
    assert isinstance(run, RunConfig)

"""Folders of runs as they are found: damaged, unfinished, or not of a run at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from neural.training import checkpoint
from neural.training.config import EvaluateConfig
from neural.training.experiment import run_experiment
from neural.training.load_run import export, measure, open_finished, reopen
from nqm import keys
from nqm.cli import main
from nqm.errors import NQMError
from nqm.progress import Lines
from nqm.table import read_table
from tests.tiny_runs import LATE, recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_experiment(recipe({"base": {}, "late": {"late_phase": LATE}}), out, seeds=[0])
    return out


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "late" / "seed0", tmp_path / "run")
    return tmp_path / "run"


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change entries of run.json; None removes one."""

    def edit(run: Path) -> None:
        stated = json.loads((run / "run.json").read_text())
        for name, value in changes.items():
            if value is ...:
                del stated[name]
            else:
                stated[name] = value
        (run / "run.json").write_text(json.dumps(stated))

    return edit


def other_model(run: Path) -> None:
    stated = json.loads((run / "run.json").read_text())
    stated["config"]["model"]["hidden"] = [9]
    stated["digest"] = keys.key(stated["config"])  # as if the files of two runs were mixed up
    (run / "run.json").write_text(json.dumps(stated))


def held(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change entries of a file of tensors; without any it is emptied."""

    def edit(run: Path) -> None:
        state = checkpoint.load(run / name) if changes else {}
        first = next(iter(state), "")
        for what, value in changes.items():
            state[first if what == "first" else what] = value
        checkpoint.save(run / name, state)

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "config is a number": (edited(config=3), r"run.json cannot be read \(its config is 3\)"),
    "config is missing": (edited(config=...), r"run.json cannot be read \(it has no config\)"),
    "config is of something else": (edited(config={"a": 1}), "run.json is damaged: .*a"),
    "status is missing": (edited(status=...), r"run.json cannot be read \(it has no status\)"),
    "status is a number": (edited(status=1), r"run.json cannot be read \(its status is 1\)"),
    "status is unknown": (edited(status="done"), r"cannot be read \(its status is 'done'\)"),
    "unfinished": (edited(status=None), "is not finished; train it on first"),
    "diverged": (edited(status="diverged"), "is diverged"),
    "another model": (other_model, r"does not fit .* has shape \(8, 64\), not \(9, 64\)"),
    "empty": (held("model.pt"), "model.pt (does not fit|is no model)"),
    "a number": (held("model.pt", first=1), "model.pt (does not fit|is no model).* holds a int"),
    "a shape": (held("model.pt", first=torch.zeros(3)), r"does not fit .* has shape \(3,\)"),
    "whole numbers": (
        held("model.pt", first=torch.zeros(8, 64, dtype=torch.long)), "is torch.int64, not"
    ),
    "one too many": (held("model.pt", more=torch.zeros(3)), "'more', which the model does not"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_told_in_one_line(name: str, run: Path, tmp_path: Path) -> None:
    damage, told = DAMAGES[name]
    damage(run)
    out = tmp_path / "x.safetensors"
    for action in (lambda: reopen(run), lambda: export(run, out)):
        with pytest.raises(NQMError, match=told) as error:
            action()
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_members_are_looked_at_as_well(run: Path) -> None:
    held("late.pt", first=torch.zeros(2))(run)
    with pytest.raises(NQMError, match=r"late\.pt does not fit the model of its run\.json"):
        reopen(run)


@pytest.mark.parametrize("command", ["bridge", "evaluate", "export"])
def test_commands_name_the_run_to_give(command: str, runs: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x.safetensors")] if command != "evaluate" else []
    for folder, told in (
        (runs / "late", f"is an arm; give one of its runs: {runs / 'late' / 'seed0'}"),
        (runs, f"is an experiment; give one of its runs: {runs / 'base' / 'seed0'}"),
        (tmp_path, "is not the folder of a run: it holds no run.json"),
    ):
        done = CliRunner().invoke(main, ["neural", command, str(folder), *out])
        assert done.exit_code == 2, done.output
        assert done.stderr.strip().splitlines() == [f"error: {folder} {told}"]


def test_a_finished_run_is_opened(runs: Path, tmp_path: Path) -> None:
    assert open_finished(runs / "late" / "seed0").late_phase is not None
    opened = reopen(runs / "late" / "seed0")
    assert opened.late is not None
    written = export(runs / "base" / "seed0", tmp_path / "x.safetensors")
    assert written.stat().st_size > 0


def test_an_evaluation_tells_how_far_it_is(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines, "FIRST", 0.0)
    monkeypatch.setattr(Lines, "EVERY", 0.0)
    command = ["neural", "evaluate", str(runs / "late" / "seed0"), "--flatness", "--line"]
    done = CliRunner().invoke(main, [*command, "--threads", "1"])
    assert done.exit_code == 0, done.output
    shares = [int(share) for share in re.findall(r" evaluation: (\d+) %", done.stderr)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 60 < shares[-1] < 100
    assert len(shares) > 5
    assert "evaluation" not in done.stdout


def test_runs_in_float64_are_measured_again_as_they_were(tmp_path: Path) -> None:
    """The models of a run have the type of its weights: no digit is lost, and its images fit."""
    double = recipe({"late": {"late_phase": LATE}}, train={"precision": "float64"})
    run_experiment(double, tmp_path, seeds=[0])
    folder = tmp_path / "late" / "seed0"
    opened = reopen(folder)
    assert opened.late is not None
    for net in (opened.model, opened.late):
        assert {p.dtype for p in net.parameters()} == {torch.float64}
    held = checkpoint.load(folder / "model.pt")
    assert all(torch.equal(p, held[name]) for name, p in opened.model.named_parameters())
    done = CliRunner().invoke(main, ["neural", "evaluate", str(folder), "--threads", "1"])
    assert done.exit_code == 0, done.output
    single = read_table(folder / "result.parquet").query("weights == 'averaged'")
    again = measure(opened, EvaluateConfig()).set_index("metric")["value"]
    for metric in ("accuracy", "nll"):
        (value,) = single.query("metric == @metric and data == 'test'")["value"]
        assert again[metric] == pytest.approx(value, rel=1e-12)

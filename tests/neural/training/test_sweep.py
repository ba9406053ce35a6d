"""Sweeps of training runs: the value beside a result is the one that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neural.training.sweep import build, work
from neural.training.task import Runtime
from nqm.errors import NQMError
from nqm.runs.sweep import Sweep

BASE = {"recipe": "digits_bn", "scale": "smoke"}


def test_what_is_changed_is_in_the_run() -> None:
    run = build({**BASE, "seed": 3, "late_phase": {"members": 7}, "train": {"lr": 0.125}}).run
    assert run.late_phase is not None
    assert (run.seed, run.late_phase.members, float(run.train.lr(9))) == (3, 7, 0.125)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": "base", "late_phase": {"members": 5}}, "late_phase changes nothing"),
        ({"data": {"nam": "digits"}}, "data.nam is not a known key"),
    ],
)
def test_what_changes_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NQMError, match=words):
        build({**BASE, **changes})


def test_what_an_arm_states_itself_is_changed_there(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        'data = {name = "digits", batch_size = 32}\nmodel = {name = "mlp", hidden = [8]}\n'
        "train = {epochs = 1, lr = 0.1}\n[arm.fast]\ntrain.lr = 0.5\n"
    )
    base = {"recipe": "own.toml"}
    assert build({**base, "train": {"epochs": 2}}, tmp_path).run.train.epochs == 2
    with pytest.raises(NQMError, match=r"train\.lr changes nothing: .*change arm\.fast\.train\.lr"):
        build({**base, "train": {"lr": 0.2}}, tmp_path)


def test_values_that_make_the_same_run_are_refused(tmp_path: Path) -> None:
    cells = Sweep(BASE, {"title": ["one", "two"]}, work=work(tmp_path / "runs", Runtime()))
    with pytest.raises(NQMError, match=r"case 1 .* is the same run as case 0"):
        cells.write(tmp_path / "t.csv")
    assert list(tmp_path.iterdir()) == []

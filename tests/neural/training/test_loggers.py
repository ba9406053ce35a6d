"""Numbers that loggers are told, against a training loop and the history; loggers of packages."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from neural.training import loggers
from neural.training import train as training
from neural.training.experiment import run_experiment
from neural.training.loggers import LoggedRun, load_logger
from neural.training.state import TrainState
from neural.training.task import Runtime
from neural.training.train import train
from nqm.errors import NQMError, NQMWarning
from tests.tiny_runs import BATCHES, CNN, LATE, assert_same_run, recipe, tiny

SWA = {"method": "swa", "start_epoch": 1}


def read(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "log.csv")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Training loss of every minibatch, in order."""
    found: list[float] = []
    original = TrainState.step

    def step(self: TrainState, batches: Any) -> Any:
        values = original(self, batches)
        found.extend(values.tolist())
        return values

    monkeypatch.setattr(TrainState, "step", step)
    return found


def test_points_between_evaluations_are_means_of_the_losses(
    tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOOK_EVERY", 3)
    run = tiny(evaluate={"every": 2}, train={"epochs": 4}, average=SWA)
    outcome = train(run, tmp_path / "run", Runtime(loggers=("csv",)))
    table = read(tmp_path / "run")
    points = table[table["train_loss"].notna()]
    # After the first step and every third one from there, and at the ends of epochs.
    steps = sorted({*range(1, 4 * BATCHES + 1, 3), *range(BATCHES, 4 * BATCHES + 1, BATCHES)})
    assert points["step"].tolist() == steps
    means = [np.mean(losses[a:b]) for a, b in zip([0, *steps], steps, strict=False)]
    np.testing.assert_allclose(points["train_loss"], means, rtol=1e-6)  # losses in float32
    np.testing.assert_allclose(points["epoch"], np.array(steps) / BATCHES, rtol=1e-12)
    assert points["lr"].eq(0.05).all()
    rows = table[table["loss"].notna()]
    for name in ("step", "loss", "accuracy", "spread", "average_loss", "average_accuracy"):
        assert rows[name].tolist() == pytest.approx(outcome.history[name].tolist(), rel=1e-12)
    assert outcome.history["epoch"].tolist() == [2, 4]


def test_loggers_do_not_disturb_training(tmp_path: Path) -> None:
    run = tiny(model=CNN | {"dropout": 0.3}, late_phase=LATE)
    train(run, tmp_path / "plain")
    train(run, tmp_path / "logged", Runtime(loggers=("csv",)))
    (tmp_path / "logged/log.csv").unlink()
    assert_same_run(tmp_path / "plain", tmp_path / "logged")


def test_a_run_that_goes_on_has_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    monkeypatch.setattr(training, "LOOK_EVERY", 1)
    runtime = Runtime(loggers=("csv",))
    train(tiny(), tmp_path / "whole", runtime)
    original = TrainState.step
    left = 10

    def step(self: TrainState, batches: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise StopError
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", step)
        times = iter(range(10**6))
        patch.setattr(training.time, "monotonic", lambda: 25.0 * next(times))  # checkpoints: few
        with pytest.raises(StopError):
            train(tiny(), tmp_path / "run", runtime)
    assert len(read(tmp_path / "run")) > 8
    with open(tmp_path / "run/log.csv", "a", encoding="utf-8") as stream:
        stream.write("11,2.75,0.")  # half a row
    train(tiny(), tmp_path / "run", runtime)
    assert (tmp_path / "run/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_tensorboard_holds_the_points_and_the_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(training, "LOOK_EVERY", 2)
    outcome = train(tiny(), tmp_path / "run", Runtime(loggers=("tensorboard", "csv")))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))  # type: ignore[no-untyped-call]
    events.Reload()  # type: ignore[no-untyped-call]

    def curve(name: str) -> dict[int, float]:
        scalars = events.Scalars(name)  # type: ignore[no-untyped-call]
        return {scalar.step: scalar.value for scalar in scalars}

    table = read(tmp_path / "run")
    points = table[table["train_loss"].notna()].set_index("step")["train_loss"]
    assert curve("train_loss") == pytest.approx(points.to_dict(), rel=1e-6)  # kept in float32
    assert len(points) > len(outcome.history)
    accuracies = outcome.history.set_index("step")["accuracy"]
    assert curve("accuracy") == pytest.approx(accuracies.to_dict(), rel=1e-6)


class FakeRun:
    """What `wandb.init` returns, with what it was told."""

    def __init__(self, **settings: Any):
        self.settings, self.rows, self.code = settings, [], None

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.rows.append((step, numbers))

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Weights & Biases, without the package and the service."""
    made: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        made.append(FakeRun(**settings))
        return made[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "neural.training.loggers.wandb", raising=False)
    return made


def test_weights_and_biases_has_one_run_for_each_run(tmp_path: Path, wandb: list[FakeRun]) -> None:
    made = recipe({"base": {}, "late": {"use": ["late_phase"]}}, late_phase=LATE)
    run_experiment(made, tmp_path, Runtime(loggers=("wandb",)))
    assert [run.settings["name"] for run in wandb] == ["base/seed0", "late/seed0"]
    assert len({run.settings["id"] for run in wandb}) == 2
    base = wandb[0]
    assert base.settings["resume"] == "allow"
    assert base.settings["config"]["train"]["lr"] == {"schedule": "constant", "value": 0.05}
    assert base.code == 0
    steps = [step for step, _ in base.rows]
    assert steps == sorted(steps)  # the service drops steps that go back
    last: dict[str, float] = {}
    for _, numbers in base.rows:
        last |= numbers
    history = pd.read_parquet(tmp_path / "base/seed0/history.parquet")
    assert last["accuracy"] == history["accuracy"].iloc[-1]
    diverged = tmp_path / "lost"
    train(tiny(train={"lr": 1e30}), diverged, Runtime(loggers=("wandb",)))
    assert wandb[-1].code == 1


def package(folder: Path, name: str, target: str, code: str) -> None:
    """An installed package with one entry point."""
    (folder / f"{name}.py").write_text(code)
    (folder / f"{name}-1.0.dist-info").mkdir()
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    (folder / f"{name}-1.0.dist-info/METADATA").write_text(about)
    points = f"[{loggers.GROUP}]\n{name} = {target}\n"
    (folder / f"{name}-1.0.dist-info/entry_points.txt").write_text(points)


CODE = """
from pathlib import Path

class Count:
    def __init__(self, run):
        self.path, self.calls = run.folder / "calls", 0

    def log(self, step, numbers):
        self.calls += 1
        if self.path.parent.name == "bad":
            raise ValueError("no more room")

    def close(self, status):
        self.path.write_text(f"{self.calls} {status}")
"""


def test_a_package_adds_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    package(tmp_path / "site", "counting_logger", "counting_logger:Count", CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    runtime = Runtime(loggers=("counting_logger",))
    train(tiny(), tmp_path / "run", runtime)
    # Points after the first step and at three ends of epochs, and three evaluations.
    assert (tmp_path / "run/calls").read_text() == "7 finished"
    with pytest.warns(NQMWarning, match=r"Count has stopped \(ValueError: no more room\)"):
        assert train(tiny(), tmp_path / "bad", runtime).status == "finished"


def test_a_logger_that_is_not_there_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, words: str) -> None:
        with pytest.raises(NQMError, match=words):
            load_logger(name)
        for start in (train, run_experiment):
            given: Any = tiny() if start is train else recipe({"base": {}})
            with pytest.raises(NQMError, match=words):
                start(given, tmp_path / "run", Runtime(loggers=(name,)))  # type: ignore[operator]
        assert not (tmp_path / "run").exists()

    refused("cvs", "did you mean 'csv'")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "neural.training.loggers.wandb", raising=False)
    refused("wandb", "--log wandb needs a package .*: pip install wandb$")
    (tmp_path / "site").mkdir()
    package(tmp_path / "site", "broken_logger", "broken_logger:Count", "1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    refused("broken_logger", "--log broken_logger cannot be loaded: ZeroDivisionError")


def test_a_damaged_csv_is_written_anew(tmp_path: Path) -> None:
    run = LoggedRun(tmp_path, "a/seed0", "0", {}, 5)
    (tmp_path / "log.csv").write_text("what,is,this\n1,2,3\n" + os.linesep)
    logger = load_logger("csv")(run)
    logger.log(6, {"train_loss": 0.5})
    logger.close("finished")
    assert read(tmp_path)["step"].tolist() == [6]

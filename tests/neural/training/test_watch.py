"""The state of runs from their files, as a table and as lines."""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from neural.training import monitor, watch
from neural.training.experiment import run_experiment
from neural.training.run_progress import FILE, RunProgress, read_progress, write_progress
from neural.training.state import TrainState
from neural.training.train import train
from neural.training.watch import (
    Display,
    Plan,
    Planned,
    RunState,
    Watch,
    line,
    summary,
    table,
    time_left,
    write_plan,
)
from nqm.cli import main
from nqm.files import locked
from nqm.table import read_table
from tests.tiny_runs import LATE, recipe, tiny

HALF = RunProgress(1.5, 3, 0.75, 1, 0.5, 0.875, 40.0)


def begun(folder: Path, progress: RunProgress | None = None) -> None:
    """The files of a run that was begun and is not complete."""
    folder.mkdir(parents=True)
    stated = {"key": "", "versions": {}, "status": None, "config": {"train": {"epochs": 3}}}
    (folder / "run.json").write_text(json.dumps(stated))
    if progress is not None:
        write_progress(folder, progress)


def seen(out: Path) -> dict[tuple[str, str], RunState]:
    return {(state.name, state.seed): state for state in Watch(out).look()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny(), folder)
    return folder


def test_every_state_is_told_from_the_files(tmp_path: Path, finished: Path) -> None:
    planned = [Planned(f"{arm}/seed{k}", 1, 3) for k in (0, 1) for arm in ("base", "late")]
    write_plan(tmp_path, Plan(runs=tuple(planned)))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/seed0").symlink_to(finished)
    begun(tmp_path / "late/seed0", HALF)
    begun(tmp_path / "base/seed1")
    begun(tmp_path / "more/branch2/seed7", HALF)  # of an earlier command
    train(tiny(train={"lr": 1e30}), tmp_path / "lost/seed0")
    with locked(tmp_path / "late/seed0", folder=True):
        states = seen(tmp_path)
    assert {name: state.state for name, state in states.items()} == {
        ("base", "0"): "finished",
        ("late", "0"): "running",
        ("base", "1"): "killed",
        ("late", "1"): "waiting",
        ("lost", "0"): "diverged",
        ("more/branch2", "7"): "killed",
    }
    last = read_table(finished / "history.parquet").iloc[-1]
    shown = states["base", "0"].progress
    assert (shown.epoch, shown.loss, shown.accuracy) == (3, last["loss"], last["accuracy"])
    assert states["late", "0"].progress == HALF
    assert states["late", "1"].progress.epoch == 1  # where the other run hands over
    assert states["late", "1"].progress.epochs == 3
    assert seen(tmp_path)["late", "0"].state == "killed"  # the lock is free


def test_a_killed_training_is_told_with_what_it_had_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception for a signal: either frees the lock and leaves the files as they are."""
    folder = tmp_path / "base/seed4"
    original = TrainState.step

    def step(self: TrainState, batches: Any) -> Any:
        if self.done == 6:
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", step)
        patch.setattr(monitor, "WRITE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), folder)
    (state,) = Watch(tmp_path).look()
    assert (state.name, state.seed, state.state) == ("base", "4", "killed")
    assert state.progress.epoch == 1.0  # four minibatches; nothing was written since
    assert state.progress.epochs == 3
    history = read_table(folder / "history.parquet")
    assert state.progress.accuracy == history["accuracy"].iloc[-1]
    train(tiny(), folder)
    (state,) = Watch(tmp_path).look()
    assert state.state == "finished"
    assert not (folder / FILE).exists()


@pytest.mark.parametrize("where", ["", "base", "base/seed3"])
def test_one_run_has_its_name_wherever_one_looks_from(tmp_path: Path, where: str) -> None:
    begun(tmp_path / "base/seed3", HALF)
    (state,) = Watch(tmp_path / where).look()
    assert (state.name, state.seed, state.progress) == ("base", "3", HALF)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff", b'{"epoch": "x"}', b'{"epoch": true}', b"[" * 100_000],
    ids=["empty", "open", "list", "null", "bytes", "text", "logical", "deep"],
)
def test_damaged_files_are_passed_over(tmp_path: Path, content: bytes) -> None:
    begun(tmp_path / "base/seed0")
    for name in (f"base/seed0/{FILE}", "runs.json"):
        (tmp_path / name).write_bytes(content)
    assert read_progress(tmp_path / "base/seed0") is None
    assert [state.state for state in Watch(tmp_path).look()] == ["killed"]
    (tmp_path / "base/seed0/run.json").write_bytes(content)
    assert [state.state for state in Watch(tmp_path).look()] == ["killed"]


def test_a_plan_leads_nowhere_else(tmp_path: Path) -> None:
    begun(tmp_path / "other/seed0")
    (tmp_path / "out").mkdir()
    away = [str(tmp_path / "other/seed0"), "../other/seed0"]
    write_plan(tmp_path / "out", Plan(runs=tuple(Planned(folder, 0, 3) for folder in away)))
    assert Watch(tmp_path / "out").look() == []


def test_time_left_shares_the_work_among_the_runs_that_go_on() -> None:
    def state(name: str, epoch: float, pace: float) -> RunState:
        return RunState("a", "0", name, RunProgress(epoch, 10, seconds_per_epoch=pace))

    nan = math.nan
    one = state("running", 4.0, 2.0)
    assert one.progress.left == 12.0
    assert time_left([one]) == 12.0
    # 12 + 5 * 4 seconds of the two that go on, and 10 epochs at their mean of 3, over two.
    two = [one, state("running", 5.0, 4.0), state("waiting", 0.0, nan), state("finished", 10, nan)]
    assert time_left(two) == (12 + 20 + 30) / 2
    # Never less than what the slowest alone still needs.
    assert time_left([state("running", 9.0, 1.0), state("running", 0.0, 8.0)]) == 80.0
    assert math.isnan(time_left([state("waiting", 0.0, nan)]))


def test_a_line_says_all_there_is() -> None:
    running = RunState("late_phase", "3", "running", HALF)
    assert line(running) == (
        "late_phase, seed 3: epoch 1.5 of 3, training loss 0.7500, test loss 0.5000, "
        "accuracy 87.50 %, 1:00 left"
    )
    early = RunState("x", "", "running", RunProgress(2.0, 3))
    assert line(early) == "x: epoch 2 of 3"
    assert summary([running, early]) == "2 running; about 1:00 left"  # 60 s and 40 s, side by side
    assert "the command that began them" in summary([RunState("x", "", "killed", HALF)])


def test_lines_of_a_training_have_the_numbers_of_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((monitor, "WRITE_EVERY"), (watch, "LINE_EVERY"), (watch, "LOOK_EVERY")):
        monkeypatch.setattr(module, name, 0.0)
    made = recipe({"base": {}, "late": {"use": ["late_phase"]}}, late_phase=LATE, seeds=[5, 6])
    said: list[str] = []
    display = Display(tmp_path, live=False, write=said.append)
    run_experiment(made, tmp_path, progress=display)
    display.update()
    history = read_table(tmp_path / "history.parquet")
    for arm in ("base", "late"):
        for seed in (5, 6):
            own = [text for text in said if f" {arm}, seed {seed}: " in text]
            rows = history[(history["arm"] == arm) & (history["seed"] == seed)]
            # The run of `late` begins where `base` has done one epoch; its members take three of
            # four minibatches at a time, so that its second epoch ends within a step.
            epochs = ["1", "2", "3"] if arm == "base" else ["2.5", "3"]
            assert [re.findall(r"epoch (\S+) of 3", text) for text in own] == [
                *([epoch] for epoch in epochs), []
            ]  # fmt: skip
            for text, (_, row) in zip(own, rows[-len(epochs) :].iterrows(), strict=False):
                if not math.isnan(row["train_loss"]):  # there was a step
                    assert f"training loss {row['train_loss']:.4f}" in text
                assert f"test loss {row['loss']:.4f}, accuracy {100 * row['accuracy']:.2f}" in text
            assert " finished, " in own[-1]
            assert f"accuracy {100 * rows['accuracy'].iloc[-1]:.2f} %" in own[-1]
    again: list[str] = []
    display = Display(tmp_path, live=False, write=again.append)
    run_experiment(made, tmp_path, progress=display)
    display.update()
    assert [text.partition(" ")[2] for text in again] == ["4 of 4 runs are complete already\n"]


def test_lines_are_throttled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    said: list[str] = []
    display = Display(tmp_path, live=False, write=said.append)
    begun(tmp_path / "base/seed0")
    told = []
    with locked(tmp_path / "base/seed0", folder=True):
        # Ten epochs a second, for twenty seconds; then one epoch of ten minutes.
        moments = [(100 + k / 10, float(k)) for k in range(200)]
        moments += [(120 + 30 * k, 200 + k / 20) for k in range(20)]
        for now, epoch in moments:
            write_progress(tmp_path / "base/seed0", RunProgress(epoch, 300))
            before = len(said)
            display("training", 0.0)
            told += [now] * (len(said) - before)
    gaps = [b - a for a, b in pairwise(told)]
    assert min(gaps) >= watch.LINE_EVERY
    assert max(gaps) <= watch.LONG + 30
    assert len(told) == 4 + 4  # of the twenty seconds, and of the ten minutes


def test_the_live_table_is_drawn_over_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("LINES", "9")
    for seed in range(20):
        begun(tmp_path / f"base/seed{seed}", HALF)
    frames: list[str] = []
    display = Display(tmp_path, live=True, write=frames.append)
    with ExitStack() as stack:
        stack.enter_context(locked(tmp_path / "base/seed19", folder=True))
        display.update()
        display.update()
    first, second = frames
    shown = first.removeprefix("\x1b[J").splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in shown]
    assert len(shown) < 9
    assert max(map(len, plain)) < 50
    assert any("running" in text for text in plain)  # of twenty, the one that goes on is shown
    assert "... and 15 more runs" in plain
    assert second == f"\x1b[{len(shown)}F{first}"


def test_an_experiment_that_is_locked_goes_on_by_itself(tmp_path: Path) -> None:
    write_plan(tmp_path, Plan(runs=(Planned("base/seed0", 0, 3),)))
    looking = Watch(tmp_path)
    with locked(tmp_path, folder=True):  # its workers are just starting
        assert table(looking.look(), busy=looking.busy)[-1] == "1 waiting"
    assert "no process trains now" in table(looking.look(), busy=looking.busy)[-1]


def test_all_runs_are_in_the_whole_table(tmp_path: Path) -> None:
    for seed in range(12):
        begun(tmp_path / f"base/seed{seed}", HALF)
    lines = table(Watch(tmp_path).look(), style=False)
    assert len(lines) == 1 + 12 + 1
    assert lines[1].split() == [
        "base", "0", "killed", "###.......", "1/3", "0.7500", "0.5000", "87.50", "%",
    ]  # fmt: skip


def test_the_command(tmp_path: Path, finished: Path) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(main, ["neural", "watch", *arguments])
        return done.exit_code, done.stdout, done.stderr

    code, out, _ = call(str(finished.parent), "--once")
    assert code == 0
    assert "finished" in out
    assert out.splitlines()[-1] == "1 finished"
    assert call(str(finished.parent))[1] == out  # no terminal
    (tmp_path / "empty").mkdir()
    assert call(str(tmp_path / "empty"))[2].startswith("error: there is no run below")
    assert call(str(tmp_path / "none"))[2].startswith("error:")
    assert call(str(tmp_path / "none"))[0] == 2

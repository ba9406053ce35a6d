"""SIGTERM and SIGUSR1: a checkpoint, exit code 75, and the same run bit for bit afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from neural.training.state import TrainState
from neural.training.task import Runtime
from neural.training.train import train
from nqm.cli import main
from nqm.runs import interrupts
from tests.tiny_runs import LATE, assert_same_run, in_process, tiny, together

BASE = """
[data]
name = "digits"
batch_size = 32
train_examples = 100
test_examples = 60
[model]
name = "digits_cnn"
width = 4
[train]
epochs = 3
lr = 0.05
[late_phase]
start_epoch = 1
members = 3
select = "batchnorm+head"
[arm.base]
[arm.late]
use = ["late_phase"]
"""


def signalled(after: int, number: int) -> None:
    """Let this process get a signal, twice as batch systems send it, in a step of training."""
    original, left = TrainState.step, after

    def step(self: TrainState, batches: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return original(self, batches)

    TrainState.step = step  # type: ignore[method-assign]


def command(folder: Path, *more: str, after: int = 0, number: int = 0) -> tuple[int, str]:
    if after:
        signalled(after, number)
    answer = CliRunner().invoke(
        main,
        ["neural", "train", str(folder / "r.toml"), "--out", str(folder / "out"),
         "--threads", "1", "--device", "cpu", *more],
    )  # fmt: skip
    return answer.exit_code, answer.stderr


def killed_command(folder: Path, after: int, number: int) -> tuple[int, str]:
    return command(folder, after=after, number=number)


#: The rehearsal takes no step: before T0, at its last minibatch, among the members, in the other
#: arm's first epochs.
@pytest.mark.parametrize(
    ("after", "number"),
    [(2, signal.SIGTERM), (4, signal.SIGUSR1), (6, signal.SIGTERM), (14, signal.SIGUSR1)],
)
def test_a_stopped_command_goes_on_bit_for_bit(tmp_path: Path, after: int, number: int) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.toml").write_text(BASE)
    assert command(tmp_path / "whole")[0] == 0
    code, (status, told) = in_process(killed_command, tmp_path / "stopped", after, number)
    assert (code, status) == (0, 75)
    # Before it there may be lines of epochs.
    assert told.splitlines()[-1] == (
        f"stopped by {signal.Signals(number).name}; the same command continues from its checkpoint"
    )
    assert len(list(tmp_path.glob("stopped/out/*/seed0/checkpoint.pt"))) == 1
    assert command(tmp_path / "stopped")[0] == 0
    for arm in ("base", "late"):
        assert_same_run(*(tmp_path / name / "out" / arm / "seed0" for name in ("whole", "stopped")))


def killed_workers(folder: Path) -> tuple[int, str]:
    """Signal this process as soon as two seeds are in training in processes of their own."""

    def wait_and_kill() -> None:
        wanted = [folder / f"out/base/seed{k}/run.json" for k in (0, 1)]
        while not all(path.exists() for path in wanted):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_kill, daemon=True).start()
    seeds = ["--seed", "0", "--seed", "1"]
    return command(
        folder, "--workers", "2", "--set", "train.epochs=100000", "--arm", "base", *seeds
    )


@pytest.mark.slow
def test_workers_stop_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(BASE)
    assert in_process(killed_workers, tmp_path)[1][0] == 75
    assert len(list(tmp_path.glob("out/base/seed*/checkpoint.pt"))) == 2


def train_signalled(rank: int, world: int, folder: Path) -> str:
    """Only the second of two processes gets the signal, in its first group of members."""
    if rank == 1:
        signalled(5, signal.SIGTERM)
    run = tiny(train={"precision": "float64", "epochs": 9}, late_phase=LATE)
    with interrupts.stops_later():
        try:
            return train(run, folder, Runtime(rank=rank, world=world)).status
        except interrupts.Stopped as error:
            return f"{error.code} {(folder / 'checkpoint.pt').exists()}"


def test_all_processes_stop_together(tmp_path: Path) -> None:
    assert together(2, train_signalled, tmp_path) == ["75 True"] * 2


def test_nothing_is_noted_outside() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with interrupts.stops_later():
        assert not interrupts.stop_asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.stop_asked()
    assert signal.getsignal(signal.SIGUSR1) == before
    with interrupts.stops_later():
        assert not interrupts.stop_asked()

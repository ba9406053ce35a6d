"""Sweeps of training runs: the value beside a result is the one that made it."""

from __future__ import annotations

import pickle
import tempfile
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from neural.training import cli_options, sweep
from neural.training.sweep import Remote, build, work
from neural.training.task import Runtime
from nqm.cli import main
from nqm.errors import NQMError
from nqm.runs.sweep import Sweep

BASE = {"recipe": "digits_bn", "scale": "smoke"}
OWN = (
    'data = {name = "digits", batch_size = 32}\nmodel = {name = "mlp", hidden = [8]}\n'
    "train = {epochs = 1, lr = 0.1}\n[arm.fast]\ntrain.lr = 0.5\n"
)


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
    (tmp_path / "own.toml").write_text(OWN)
    base = {"recipe": "own.toml"}
    assert build({**base, "train": {"epochs": 2}}, tmp_path).run.train.epochs == 2
    with pytest.raises(NQMError, match=r"train\.lr changes nothing: .*change arm\.fast\.train\.lr"):
        build({**base, "train": {"lr": 0.2}}, tmp_path)


def test_values_that_make_the_same_run_are_refused(tmp_path: Path) -> None:
    cells = Sweep(BASE, {"title": ["one", "two"]}, work=work(tmp_path / "runs", Runtime()))
    with pytest.raises(NQMError, match=r"case 1 .* is the same run as case 0"):
        cells.write(tmp_path / "t.csv")
    assert list(tmp_path.iterdir()) == []


class Elsewhere(Executor):
    """What a worker of a cluster gets: everything as bytes."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        made, given, named = pickle.loads(pickle.dumps((fn, args, kwargs)))
        done.set_result(pickle.loads(pickle.dumps(made(*given, **named))))
        return done


def test_workers_of_a_cluster_make_the_same_table(tmp_path: Path) -> None:
    axes = {"seed": [0, 1]}
    base = {"recipe": "own.toml", "arm": "fast"}
    (tmp_path / "own.toml").write_text(OWN)
    here = work(tmp_path / "runs", Runtime())
    Sweep(base, axes, tmp_path, here).write(tmp_path / "here.parquet")
    there = work(tmp_path / "more", Runtime(), Remote("cpu"))
    Sweep(base, axes, tmp_path, there).write(tmp_path / "there.parquet", Elsewhere())
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_each_worker_of_a_machine_takes_its_own_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def worker(visible: str | None = None) -> list[Any]:
        own: list[Any] = []
        monkeypatch.setattr(sweep, "_GPU", own)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert sweep._own_gpu() == sweep._own_gpu() == own[0]
        return own

    first, second = worker(), worker()
    assert (first[0], second[0]) == ("cuda:0", "cuda:1")
    with pytest.raises(NQMError, match=r"all 2 GPUs of .* are taken .*; start one"):
        worker()
    first[1].__exit__(None, None, None)  # as at the end of its process
    assert worker()[0] == "cuda:0"
    # As dask-cuda starts them: the first that each sees is its own.
    shown = [worker("0,1"), worker("1,0")]
    assert [own[0] for own in shown] == ["cuda:0", "cuda:0"]
    asked: list[Any] = []
    monkeypatch.setattr(cli_options, "make_runtime", lambda *a, **k: asked.append((a, k)))
    Remote(threads=3).runtime()
    assert asked == [(("cuda:0", None, 3), {"trains": True, "data_workers": None})]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sweep._own_gpu() == "cpu"


@pytest.mark.slow
def test_the_command_on_a_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    file = tmp_path / "s.toml"
    (tmp_path / "own.toml").write_text(OWN)
    file.write_text('recipe = "own.toml"\n[sweep]\nseed = [0, 1, 2]\n')
    command = ["neural", "sweep", str(file), "--device", "cpu", "--threads", "1", "--out"]
    assert CliRunner().invoke(main, [*command, str(tmp_path / "here.csv")]).exit_code == 0
    with distributed.LocalCluster(
        2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask")
    ) as cluster:
        there = [*command, str(tmp_path / "there.csv"), "--scheduler", cluster.scheduler_address]
        answer = CliRunner().invoke(main, there)
    assert answer.exit_code == 0, answer.stderr
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()

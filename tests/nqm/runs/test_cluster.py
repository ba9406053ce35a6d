"""Sweeps on a real Dask scheduler and two workers, started here on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nqm.cli import main
from nqm.errors import NQMError
from nqm.runs.cluster import connected
from nqm.runs.sweep import Sweep

pytest.importorskip("distributed")

PROBLEM = {"curvature": [1.0, 0.1], "noise_variance": 1.0, "initial_mean": 1.0}
PHASE = {"algorithm": "sgd", "lr": 0.1, "steps": 20, "batch_size": 4}
BASE = {"problem": PROBLEM, "phase": [PHASE], "record": {"at": [20]}}


def dask(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[int]]]:
    """Address of a scheduler, and the process groups of its two workers."""
    folder = tmp_path_factory.mktemp("dask")
    information = folder / "scheduler.json"
    common = ["--scheduler-file", str(information)]
    processes = [dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", *common)]
    try:
        for _ in range(300):
            if information.exists():
                break
            time.sleep(0.1)
        for name in ("one", "two"):
            local = ["--local-directory", str(folder), "--name", name]
            single = ["--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--no-nanny"]
            processes.append(dask("worker", *common, *local, *single))
        from distributed import Client

        with Client(scheduler_file=str(information), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield address, [process.pid for process in processes[1:]]
    finally:
        for process in reversed(processes):
            stop(process)


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes(cluster: tuple[str, list[int]], tmp_path: Path) -> None:
    cells = Sweep(BASE, {"phase.0.lr": [0.01 * i for i in range(1, 30)]})
    cells.write(tmp_path / "here.parquet")
    with connected(cluster[0]) as executor:
        cells.write(tmp_path / "there.parquet", executor)
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(
    cluster: tuple[str, list[int]], tmp_path: Path
) -> None:
    # Monte Carlo cells of some tenths of a second: the second worker dies while it has work.
    heavy = BASE | {"method": "sample", "replicas": 4000, "seed": 1}
    heavy["phase"] = [PHASE | {"steps": 400}]
    heavy["record"] = {"at": [400]}
    cells = Sweep(heavy, {"phase.0.lr": [0.01 * i for i in range(1, 25)]})
    cells.write(tmp_path / "here.parquet")
    seen = 0

    def kill_one(count: int) -> None:
        nonlocal seen
        seen += count
        if seen == 4:
            os.killpg(cluster[1][1], signal.SIGKILL)

    with connected(cluster[0]) as executor:
        cells.write(tmp_path / "there.parquet", executor, kill_one)
    assert seen == len(cells)
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


@pytest.mark.slow
def test_the_command_line(cluster: tuple[str, list[int]], tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        "[problem]\ncurvature = [1.0]\nnoise_variance = 1.0\n[[phase]]\n"
        'algorithm = "sgd"\nlr = 0.1\nsteps = 5\n[sweep]\n"phase.0.lr" = [0.1, 0.2]\n'
    )
    out = tmp_path / "grid.csv"
    words = ["sweep", str(file), "--out", str(out), "--scheduler", cluster[0]]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert out.exists()
    wrong = CliRunner().invoke(main, [*words, "--workers", "2"])
    assert wrong.exit_code == 2
    assert "drop --workers" in wrong.output


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:9", "nonsense", "", "tcp://", "tcp://[::1", "ucx://127.0.0.1:9", "inproc://x",
     "tls://127.0.0.1:9"],
)  # fmt: skip
def test_no_scheduler_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nqm.runs.cluster.PATIENCE", 1)
    with pytest.raises(NQMError, match="no Dask scheduler answers"), connected(address):
        pass

"""A bridge in several processes: the same numbers, resumable, mistakes told in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from neural.bridge import pipeline, workers
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.pipeline import open_target, run_bridge
from neural.bridge.workers import Bridged, fill_cache, side_by_side
from neural.curvature.cache import Cache
from neural.training.experiment import run_experiment
from neural.training.task import Runtime
from nqm.cli import main
from nqm.errors import NQMError
from nqm.progress import Progress
from tests.tiny_risks import tanh_risk
from tests.tiny_runs import recipe

PLAN = Plan(members=(1, 2), runs=4, records=2)
SMALL = BridgeConfig(
    select="head", examples=60, eigenpairs=6, noise_samples=2, lanczos_steps=4, displacements=4,
    lr_times_sharpness=(0.1, 0.3), batch_sizes=(10,), steps=20,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_experiment(recipe({"base": {}}), out, seeds=[0])
    return out / "base" / "seed0"


def in_this_process(
    work: workers.Work, count: int, workers: int, device: torch.device, stage: str,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """`run_in_workers` without starting processes; the last piece comes first."""
    for index in reversed(range(count)):
        work(index, device, lambda name, share: progress and progress(name, share))


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (SMALL, PLAN),
        (SMALL, Plan((2, 3), runs=6, records=1, late_phase="head")),
        (
            replace(
                SMALL,
                select="name:linear.bias",
                optimizer="adamw",
                batch_sizes=(5, 10),
                minimise=50,
            ),
            PLAN,
        ),
    ],
)
def test_workers_compute_all_that_the_tables_need(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: BridgeConfig, plan: Plan
) -> None:
    alone = run_bridge(open_target(str(run), Runtime()), config, plan, Runtime(), tmp_path / "one")
    monkeypatch.setattr(workers, "run_in_workers", in_this_process)
    filled: list[set[str]] = []

    def fill(bridged: Bridged, *args: Any) -> None:
        fill_cache(bridged, *args)
        filled.append({path.name for path in bridged.folder.iterdir()})

    monkeypatch.setattr(pipeline, "fill_cache", fill)
    both = run_bridge(
        open_target(str(run), Runtime()), config, plan, Runtime(), tmp_path / "two", workers=2
    )
    for name in ("table", "course", "best", "spectrum"):
        # At a minimum the slope is rounding, and its products depend on where arrays are aligned.
        pd.testing.assert_frame_equal(
            getattr(both, name), getattr(alone, name), rtol=1e-12, atol=1e-25, obj=name
        )
    files = {path.name for path in (tmp_path / "one" / "kept").iterdir()}
    assert {path.name for path in (tmp_path / "two" / "kept").iterdir()} == files
    # Nothing is left to this process but the density of the figure, which no training needs.
    assert {name.partition("-")[0] for name in files - filled[0]} == {"density"}


def test_the_path_of_every_rate_counts_in_the_progress_of_its_training() -> None:
    told: list[tuple[str, float]] = []
    progress = workers._joined(
        {workers.WITHOUT_NOISE: 1.0, "train": 3.0}, lambda *given: told.append(given)
    )
    stages = ("lr = 0.1, without noise", 0.5), ("averages", 1.0), ("train", 1.0)
    for stage, share in stages:
        progress(stage, share)
    assert told == [("without noise", 0.125), ("train", 1.0)]


@pytest.mark.slow
def test_processes_change_no_number(run: Path, tmp_path: Path) -> None:
    alone = run_bridge(open_target(str(run), Runtime()), SMALL, PLAN, Runtime(), tmp_path / "one")
    told: list[tuple[str, float]] = []
    both = run_bridge(
        open_target(str(run), Runtime()), SMALL, PLAN, Runtime(), tmp_path / "two",
        workers=2, progress=lambda stage, share: told.append((stage, share)),
    )  # fmt: skip
    pd.testing.assert_frame_equal(both.table, alone.table, check_exact=True)
    pd.testing.assert_frame_equal(both.course, alone.course, check_exact=True)
    shares = [share for stage, share in told if stage == "2 trainings, 2 at a time"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    # A bridge that was killed goes on: what is finished is read, and the tables are the same.
    kept = tmp_path / "two" / "kept"
    (lost,) = sorted(kept.glob("training-*"))[:1]
    lost.unlink()
    for path in (tmp_path / "two").glob("*.parquet"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    again = run_bridge(
        open_target(str(run), Runtime()), SMALL, PLAN, Runtime(), tmp_path / "two", workers=2
    )
    pd.testing.assert_frame_equal(again.table, alone.table, check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert lost.exists()


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_line(run: Path, tmp_path: Path) -> None:
    words = ["neural", "bridge", str(run), "--out", str(tmp_path), "--workers", "2"]
    words += ["--select", "head", "--examples", "60", "--members", "1"]
    for setting in (
        "bridge.eigenpairs=6", "bridge.lr_times_sharpness=[0.1,0.3]", "plan.runs=2",
        "bridge.noise_samples=1", "bridge.lanczos_steps=3", "bridge.displacements=2",
        "bridge.averaging_displacements=0", "bridge.steps=5",
    ):  # fmt: skip
        words += ["--set", setting]
    assert CliRunner().invoke(main, words).exit_code == 0
    (broken,) = sorted((tmp_path / "kept").glob("slopes-*"))[:1]
    broken.write_bytes(b"no archive")
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if "is damaged" in line]
    assert len(lines) == 1
    assert broken.name in lines[0]
    assert "Traceback" not in result.output


def test_a_network_that_cannot_be_sent_is_told(tmp_path: Path) -> None:
    risk = tanh_risk()

    class Local(nn.Linear):
        """A class that another process cannot import."""

    risk.model.add_module("extra", Local(1, 1))
    bridged = Bridged(risk, risk, SMALL, PLAN, Cache(tmp_path).folder or tmp_path)
    with pytest.raises(NQMError, match=r"cannot be sent to other processes .*; use --workers 1"):
        fill_cache(bridged, 2, CPU)


def test_processes_for_small_nets(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_target(str(run), Runtime())
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(3)), raising=False)

    def count(config: BridgeConfig, plan: Plan = PLAN) -> int | None:
        return side_by_side(opened.model, opened.task, config, plan)

    long = replace(SMALL, steps=5000)
    assert count(SMALL) == 1, "two trainings of 80 minibatches are over before a process starts"
    assert count(long) == 2, "one for each training"
    rates = (0.1, 0.2, 0.3, 0.4)
    assert count(replace(long, lr_times_sharpness=rates)) == 3, "one for each processor"
    members = Plan((2, 3), runs=6, records=1, late_phase="head")
    assert count(long, members) == 3, "each K has trainings of its own"
    assert count(replace(long, batch_sizes=(10**9,))) is None
    monkeypatch.setattr(workers, "memory_limit", lambda: 2 * workers.PROCESS)
    assert count(replace(long, lr_times_sharpness=rates)) == 2, "as memory allows"


def test_operations_of_a_view_of_a_weight_are_counted(run: Path) -> None:
    """The counter of torch fails on such a view as the input of a module, without gradients."""
    opened = open_target(str(run), Runtime())

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(1, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.flatten(1).unflatten(1, (-1, 8))
            query = self.query.expand(len(x), -1, -1)
            mean: torch.Tensor = self.attention(query, rows, rows)[0]
            return mean.flatten(1)

    config = replace(SMALL, batch_sizes=(10**9,))
    assert side_by_side(Query(), opened.task, config, PLAN) is None
    assert side_by_side(Query(), opened.task, SMALL, PLAN) == 1

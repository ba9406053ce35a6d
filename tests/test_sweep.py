"""Sweeps: the grid, any executor, and being killed at any moment."""

import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nqm.errors import NQMError
from nqm.sweep import Sweep, read_axes
from nqm.table import read_metadata, read_table

BASE: dict[str, Any] = {
    "problem": {"curvature": [1.0], "noise_variance": [2.0], "initial_variance": 3.0},
    "phase": [{"algorithm": "sgd", "lr": 0.1, "batch_size": 4, "steps": 5}],
    "record": {"at": [0, 5]},
}
RATES = [0.1, 0.5, 3.0]
BATCHES = [1, 4]


def grid(**changes: Any) -> Sweep:
    return Sweep(BASE | changes, {"phase.0.lr": RATES, "phase.0.batch_size": BATCHES})


def monte_carlo() -> Sweep:
    return grid(method="sample", replicas=40, seed=3)


def textbook(lr: float, batch_size: int, steps: int) -> float:
    """E x^2 / 2 of scalar SGD: s' = (1 - lr h)^2 s + lr^2 v / B."""
    s = 3.0
    for _ in range(steps):
        s = (1.0 - lr) ** 2 * s + lr**2 * 2.0 / batch_size
    return s / 2.0


def test_rows_are_cases_and_steps_in_order() -> None:
    table = grid().run()
    assert list(table.columns[:4]) == ["lr", "batch_size", "case", "step"]
    assert table["lr"].tolist() == [lr for lr in RATES for _ in range(4)]
    assert table["batch_size"].tolist() == [1, 1, 4, 4] * 3
    assert table["step"].tolist() == [0, 5] * 6
    assert table["case"].nunique() == 6
    for row in table.to_dict("records"):
        expected = textbook(row["lr"], row["batch_size"], row["step"])
        assert row["loss"] == pytest.approx(expected, rel=1e-12)


def test_a_diverged_cell_is_a_row() -> None:
    long = BASE["phase"][0] | {"steps": 10_000}
    table = grid(phase=[long], record={"at": [10_000]}).run()
    diverged = table[table["lr"] == 3.0]
    assert set(diverged["status"]) == {"diverged"}
    assert set(table.loc[table["lr"] < 2.0, "status"]) == {"finished"}


def test_columns_of_axes() -> None:
    two = {"phase": [BASE["phase"][0], BASE["phase"][0]]}
    schedule = {"schedule": "linear", "start": 0.1, "end": 0.01, "over": 5}
    axes = {"phase.0.lr": [0.1], "phase.1.lr": [0.2, schedule], "problem.curvature.0": [1.0]}
    table = Sweep(BASE | two, axes).run()
    assert list(table.columns[:4]) == ["phase.0.lr", "phase.1.lr", "problem.curvature.0", "case"]
    assert [json.loads(text) for text in table["phase.1.lr"].unique()] == [0.2, schedule]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_any_executor_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    sweep = monte_carlo()
    names = [tmp_path / f"{kind}.{suffix}" for kind in ("serial", "threads", "processes")]
    plain = sweep.run(names[0])
    with ThreadPoolExecutor(2) as threads:
        sweep.run(names[1], threads)
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        sweep.run(names[2], processes)
    assert names[0].read_bytes() == names[1].read_bytes() == names[2].read_bytes()
    pd.testing.assert_frame_equal(plain, sweep.run(), check_exact=True)


def test_every_monte_carlo_cell_has_its_own_stream() -> None:
    table = monte_carlo().run()
    starts = table.loc[table["step"] == 0, "loss"]  # all cells start from the same law
    assert starts.nunique() == len(starts)
    other = grid(method="sample", replicas=40, seed=4).run()
    assert (other["loss"] != table["loss"]).all()


KILLED = """
import json, os, signal, sys
from nqm.sweep import Sweep
base, axes, out, after = json.loads(sys.argv[1])
done = 0
def told(count):
    global done
    done += count
    if done == after:
        os.kill(os.getpid(), signal.SIGKILL)
Sweep(base, axes).run(out, progress=told)
"""


def kill(sweep: Sweep, out: Path, after: int) -> None:
    """Run in another process that is killed once `after` cells are done."""
    arguments = json.dumps([sweep.base, sweep.axes, str(out), after])
    process = subprocess.run([sys.executable, "-c", KILLED, arguments], check=False)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_killed_sweep_resumes_to_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    sweep = monte_carlo()
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    sweep.run(whole)
    kill(sweep, out, 3)
    journal = Path(f"{out}.journal.jsonl")
    assert not out.exists()
    assert len(journal.read_text().splitlines()) == 4  # the header and three cells
    journal.write_text(journal.read_text() + '[3, {"case": ["0')  # a torn line
    told: list[int] = []
    sweep.run(out, progress=told.append)
    assert told == [3, 1, 1, 1]  # finished cells were not computed again
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_floats_that_are_not_numbers_survive_the_journal(tmp_path: Path) -> None:
    rates = {"phase.0.lr": [0.1, 1e60]}
    sweep = Sweep(BASE | {"method": "sample", "replicas": 4}, rates)
    plain = sweep.run()
    assert not all(math.isfinite(value) for value in plain["loss"])
    kill(sweep, tmp_path / "t.parquet", 2)
    pd.testing.assert_frame_equal(sweep.run(tmp_path / "t.parquet"), plain, check_exact=True)


def test_a_finished_sweep_returns_at_once(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    first = grid().run(out)
    stamp = out.stat().st_mtime_ns
    told: list[int] = []
    again = grid().run(out, progress=told.append)
    assert told == [6]
    assert out.stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    metadata = read_metadata(out)
    assert metadata["config"] == BASE
    assert metadata["axes"] == {"phase.0.lr": RATES, "phase.0.batch_size": BATCHES}


def test_another_sweep_never_overwrites(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    journal = Path(f"{out}.journal.jsonl")
    kill(grid(), out, 2)
    kept = journal.read_bytes()
    with pytest.raises(NQMError, match="another configuration"):
        grid(seed=1).run(out)
    assert journal.read_bytes() == kept
    grid().run(out)
    kept = out.read_bytes()
    with pytest.raises(NQMError, match="another configuration"):
        grid(seed=1).run(out)
    assert out.read_bytes() == kept
    out.write_text("mine")
    with pytest.raises(NQMError, match=r"t\.csv"):
        grid().run(out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("content", ["notes\nof mine\n", "notes", '[1, 2]\n"x"\n'])
def test_a_foreign_journal_is_left_alone(tmp_path: Path, content: str) -> None:
    journal = tmp_path / "t.csv.journal.jsonl"
    journal.write_text(content)
    with pytest.raises(NQMError, match="journal"):
        grid().run(tmp_path / "t.csv")
    assert journal.read_text() == content


def test_a_bad_value_fails_before_anything_is_computed(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    with pytest.raises(
        NQMError, match=r"case 1 \(phase\.0\.lr = -1\): phase\.0\.lr must lie"
    ) as caught:
        Sweep(BASE, {"phase.0.lr": [0.1, -1]}).run(out)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NQMError, match=r"phase\.0\.momentm is not a known key"):
        Sweep(BASE, {"phase.0.momentm": [0.1]}).run(out)
    # Known to the solver only: the multiplicative model about a minimum at zero.
    with pytest.raises(NQMError, match=r"case 1 .*minimum != 0"):
        Sweep(BASE, {"phase.0.algorithm": ["sgd", "late_phase_multiplicative"]}).run(out)
    assert list(tmp_path.iterdir()) == []


def test_the_key_sees_the_content_of_files(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("curvature,noise_variance\n1.0,0.5\n")
    base = {"phase": BASE["phase"], "problem": {}}
    sweep = Sweep(base, {"problem.file": ["p.csv"]}, tmp_path)
    before = sweep.key
    assert len(sweep.run()) > 0
    (tmp_path / "p.csv").write_text("curvature,noise_variance\n1.0,0.25\n")
    assert sweep.key != before


def test_axes_of_a_sweep_table() -> None:
    axes = read_axes(
        {
            "phase.0.lr": {"geomspace": [1e-3, 1.0, 4]},
            "problem": {"initial_mean": {"linspace": [0, 1, 5]}},
            "phase.0.members": {"range": [1, 10, 3]},
            "phase.0.gamma": [0.1, 0.2],
        }
    )
    assert axes["phase.0.lr"] == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert axes["problem.initial_mean"] == [0, 0.25, 0.5, 0.75, 1]
    assert axes["phase.0.members"] == [1, 4, 7, 10]
    assert axes["phase.0.gamma"] == [0.1, 0.2]


@pytest.mark.parametrize(
    "table",
    [
        {},
        3,
        {"phase.0.lr": 0.1},
        {"phase.0.lr": {"geomspace": [0, 1, 3]}},
        {"phase.0.lr": {"geomspace": [1, 2]}},
        {"phase.0.lr": {"linspace": [0, 1, 2.5]}},
        {"phase.0.lr": {"range": [0, 1, 0]}},
        {"phase.0.lr": {"range": [0, 1, -1]}},
    ],
)
def test_bad_axes(table: Any) -> None:
    with pytest.raises(NQMError, match="sweep"):
        read_axes(table)


def test_empty_axes_and_axes_that_change_columns() -> None:
    with pytest.raises(NQMError, match="at least one value"):
        Sweep(BASE, {"phase.0.lr": []})
    with pytest.raises(NQMError, match="same columns"):
        Sweep(BASE, {"record.quantiles": [[0.5], [0.1]]})


def test_a_sweep_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        """
        [problem]
        curvature = 1.0
        noise_variance = 2.0
        initial_variance = 3.0
        [[phase]]
        algorithm = "sgd"
        lr = 0.1
        steps = 5
        [sweep]
        phase.0.lr = [0.1, 0.5]
        "phase.0.batch_size" = {geomspace = [1, 4, 3]}
        """
    )
    table = Sweep.from_file(path, ["record.at=[5]"]).run(tmp_path / "t.csv")
    assert len(table) == 6
    for row in read_table(tmp_path / "t.csv").to_dict("records"):
        expected = textbook(row["lr"], row["batch_size"], 5)
        assert row["loss"] == pytest.approx(expected, rel=1e-12)
    path.write_text("[problem]\ncurvature = 1.0\n")
    with pytest.raises(NQMError, match=r"no \[sweep\] table"):
        Sweep.from_file(path)

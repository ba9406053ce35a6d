"""Sweeps: the grid, any executor, and being killed at any moment."""

import json
import math
import re
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nqm
from nqm.errors import NQMError
from nqm.runs.journal import Journal
from nqm.runs.sweep import THEORY, Sweep, Work, read_axes
from nqm.table import Stamp, read_metadata, read_table

BASE: dict[str, Any] = {
    "problem": {"curvature": [1.0], "noise_variance": [2.0], "initial_variance": 3.0},
    "phase": [{"algorithm": "sgd", "lr": 0.1, "batch_size": 4, "steps": 5}],
    "record": {"at": [0, 5]},
}
STAMP = Stamp("key", "1")
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


@pytest.mark.parametrize("suffix", [pytest.param("csv", marks=pytest.mark.slow), "parquet"])
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
from nqm.runs.sweep import Sweep
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


@pytest.mark.parametrize("suffix", ["csv", pytest.param("parquet", marks=pytest.mark.slow)])
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
    with pytest.raises(
        NQMError, match="was computed with seed = its default, you ask for 1; move it away or use"
    ):
        grid(seed=1).run(out)
    assert journal.read_bytes() == kept
    grid().run(out)
    kept = out.read_bytes()
    with pytest.raises(
        NQMError, match="was computed with seed = its default, you ask for 1; move it away or use"
    ):
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


# --- one row, one value ----------------------------------------------------------------------

TWICE = BASE | {"phase": [BASE["phase"][0], BASE["phase"][0] | {"lr": 0.2}]}
OVERLAPS = {
    ("phase.0.lr", "phase.-2.lr"): "the same entry",
    ("phase.0.lr", "phase.00.lr"): "the same entry",
    ("phase.1", "phase.-1"): "the same entry",
    ("phase.0.lr", "phase.0"): "a part of",
    ("phase", "phase.-1.lr"): "a part of",
    ("problem", "problem.noise_variance.0"): "a part of",
    ("new", "new.entry"): "a part of",
}


@pytest.mark.parametrize("names", OVERLAPS)
@pytest.mark.parametrize("turn", [1, -1])
def test_axes_that_overlap_are_refused_with_both_names(names: tuple[str, str], turn: int) -> None:
    one, other = names[::turn]
    with pytest.raises(NQMError, match=OVERLAPS[names]) as caught:
        Sweep(TWICE, {one: [0.1, 0.3], other: [0.1, 0.3]})
    assert set(re.findall(r"sweep\.([^ ,;]+)", str(caught.value))) == {one, other}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sweep", "no axis"),
        ("sweep.phase.0.lr", "no axis"),
        ("record", "same columns"),
        ("record.quantiles.0", "same columns"),
        ("phase.2.lr", "index"),
        ("phase.².lr", "index"),
        ("phase.--1.lr", "index"),
        ("phase." + "9" * 5000, "index"),
        (".".join("a" * 100), "at most 64 parts"),
    ],
)
def test_axes_that_are_none(name: str, words: str) -> None:
    with pytest.raises(NQMError, match=words) as caught:
        Sweep(TWICE | {"record": {"at": [0], "quantiles": [0.5]}}, {name: [0.1]}).run()
    assert "\n" not in str(caught.value)


def test_one_table_in_two_places_is_changed_in_one() -> None:
    # A Python caller may put one dictionary in twice; each row's rates are its own all the same.
    same = BASE["phase"][0]
    axes = {"phase.0.lr": [0.1, 0.5], "phase.1.lr": [0.2, 0.4]}
    for row in (
        Sweep(BASE | {"phase": [same, same], "record": {"at": [10]}}, axes).run().itertuples()
    ):
        s = 3.0
        for lr in [row[1]] * 5 + [row[2]] * 5:
            s = (1.0 - lr) ** 2 * s + lr**2 * 2.0 / 4
        assert row.loss == pytest.approx(s / 2.0, rel=1e-12)


def test_two_values_of_one_run_are_refused() -> None:
    with pytest.raises(NQMError, match=r"case 2 \(phase\.0\.lr = 1\.0\) is the same run as case 1"):
        Sweep(BASE, {"phase.0.lr": [0.1, 1, 1.0]}).run()


def test_columns_that_are_called_as_the_results_are() -> None:
    class Fixed(dict[str, Any]):
        def check(self) -> None:
            pass

    work = Work(
        lambda mapping, folder: Fixed(mapping),
        lambda mapping, folder: json.dumps(mapping, sort_keys=True),
        lambda run, key: pd.DataFrame({"loss": [run["loss"] * 2], "step": [run["a"]["step"]]}),
        lambda mapping, folder: dict(mapping),
    )
    table = Sweep({}, {"loss": [1, 2], "a.step": [3]}, work=work).run()
    assert table.columns.tolist() == ["sweep.loss", "a.step", "case", "loss", "step"]
    assert (2 * table["sweep.loss"]).tolist() == table["loss"].tolist() == [2, 4]


def test_integers_that_a_column_does_not_hold(tmp_path: Path) -> None:
    axes = {"problem.initial_variance": [1, 10**25]}
    for name in ("t.csv", "t.parquet"):
        table = Sweep(BASE, axes).run(tmp_path / name)
        assert table["initial_variance"].unique().tolist() == [1.0, 1e25]


# --- sizes -----------------------------------------------------------------------------------

TOO_MANY = [
    {"geomspace": [1e-3, 1.0, 10**12]},
    {"linspace": [0, 1, 10**18]},
    {"linspace": [-1e308, 1.7e308, 5]},
    {"range": [0, 10**18, 1]},
    {"range": [-1e308, 1e308, 1e-3]},
    {"range": [0, 1.0, 5e-324]},
    {"range": [0, 2**999, 0.5]},
    {"geomspace": [1, 2**1000, 2**999]},
]


@pytest.mark.parametrize("grid", TOO_MANY)
def test_grids_that_are_too_large(grid: dict[str, list[float]]) -> None:
    with pytest.raises(NQMError, match=r"sweep\.phase\.0\.lr\."):
        read_axes({"phase.0.lr": grid})


def test_more_cells_than_there_may_be() -> None:
    many = {f"phase.0.{name}": list(range(1, 1001)) for name in ("lr", "steps", "batch_size")}
    with pytest.raises(NQMError, match="1000 x 1000 x 1000 = 1000000000 cells"):
        Sweep(BASE, many)
    with pytest.raises(NQMError, match="is there twice"):
        read_axes({"phase.0.lr": [0.1], "phase": {"0": {"lr": [0.2]}}})


# --- cells that differ in rates alone are computed together ---------------------------------

#: Methods of one step to the next: plain, with momentum, averages, members, clients.
ALIKE: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"algorithm": "sgd"}],
    "decay": [{"algorithm": "weight_decay", "decay": 0.1}],
    "heavy_ball": [{"algorithm": "heavy_ball", "momentum": 0.9}],
    "ema": [{"algorithm": "ema", "decay": 0.9, "inner": {"algorithm": "heavy_ball"}}],
    "late": [{"algorithm": "late_phase", "members": 3, "gamma": 0.4, "member_lr": 0.02}],
    "two": [
        {"algorithm": "sgd", "batch_size": 2},
        {"algorithm": "late_phase", "members": 5, "inner": {"algorithm": "nesterov"}},
    ],
    "ensemble": [{"algorithm": "ensemble", "members": 3, "starts": "own"}],
}
#: Rates from tiny to far beyond the edge.
MANY_RATES = [0.001, 0.1, 0.3, 0.5, 1.0, 1.5, 2, 2.5, 4.0, 1e40]


def one_by_one(sweep: Sweep) -> Sweep:
    return Sweep(sweep.base, sweep.axes, work=replace(THEORY, alike=None))


def spectrum(directions: int) -> dict[str, Any]:
    problem: dict[str, Any] = {"spectrum": {"name": "harmonic", "directions": directions}}
    return problem | {"noise": {}, "minimum": 0.7, "initial_mean": 0.2}


@pytest.mark.parametrize("directions", [1, 5])
@pytest.mark.parametrize("name", ALIKE)
def test_cells_together_are_cells_one_by_one(name: str, directions: int) -> None:
    phases = [{"lr": 0.5, "steps": 40} | phase for phase in ALIKE[name]]
    axes: dict[str, list[Any]] = {"phase.0.lr": MANY_RATES}
    if len(phases) > 1:
        axes |= {"phase.1.batch_size": [2, 1], "phase.1.lr, phase.1.member_lr": [[0.1, 2], [3, 1]]}
    base = {"problem": spectrum(directions), "phase": phases, "record": {"at": [0, 1, 17, 40]}}
    if len(phases) > 1:
        base["record"] = {"at": [3, 40, 60, 80]}
    sweep = Sweep(base, axes)
    group = next(iter(sweep._grouped()[0]))
    assert len(group.index) == len(MANY_RATES) * (2 if len(phases) > 1 else 1)
    table = sweep.run()
    assert {"finished", "diverged"} == set(table["status"])
    pd.testing.assert_frame_equal(table, one_by_one(sweep).run(), check_exact=True)


COSINE = {"schedule": "cosine", "start": 0.5, "end": 0.01, "over": 25}
WSD = {"schedule": "wsd", "peak": 1.0, "end": 0.0}
WSD |= {"warmup": 5, "stable": 20, "decay": 10}
INNER = {"algorithm": "heavy_ball", "momentum": 0.5}
CYCLIC = {"schedule": "cyclic", "high": 0.5, "low": 0.05, "period": 6}
LATE = {"algorithm": "late_phase", "members": 3, "gamma": "mean", "inner": INNER}
TIMES = {"algorithm": "late_phase_multiplicative", "members": 3, "gamma": "mean"}
SCHEDULED: dict[str, tuple[list[dict[str, Any]], dict[str, list[Any]]]] = {
    "sgd": ([{"algorithm": "sgd", "lr": COSINE}], {"phase.0.lr.start": MANY_RATES}),
    "both ends": (
        [{"algorithm": "ema", "decay": 0.9, "inner": INNER, "lr": COSINE}],
        {"phase.0.lr.start": MANY_RATES[:4], "phase.0.lr.end": MANY_RATES[1:4]},
    ),
    "a plateau": ([{"algorithm": "heavy_ball", "lr": WSD}], {"phase.0.lr.peak": MANY_RATES}),
    "members": (
        [{"algorithm": "late_phase", "members": 3, "inner": INNER, "lr": 0.1, "member_lr": COSINE}],
        {"phase.0.lr": MANY_RATES, "phase.0.members": [1, 4]},
    ),
    "a later phase": (
        [{"algorithm": "sgd", "lr": 0.5}, {"algorithm": "nesterov", "lr": COSINE}],
        {"phase.0.lr": MANY_RATES[:5], "phase.1.lr.start": MANY_RATES[2:5]},
    ),
    "cycles": (
        [{"algorithm": "ema", "decay": 0.9, "inner": INNER, "lr": CYCLIC}],
        {"phase.0.lr.high": MANY_RATES},
    ),
    "cycles of members": (
        [{"algorithm": "sgd", "lr": 0.3}, LATE | {"lr": CYCLIC, "member_lr": 0.1}],
        {"phase.1.lr.high": MANY_RATES[1:], "phase.0.lr": MANY_RATES[:2]},
    ),
    "members in some directions": (
        [LATE | {"directions": 0.5, "lr": COSINE, "member_lr": 0.1}],
        {"phase.0.lr.start": MANY_RATES},
    ),
    "members in some directions, at one rate": (
        [LATE | {"directions": [0, 1], "lr": 0.1}],
        {"phase.0.lr": MANY_RATES, "phase.0.member_lr": [0.2, 0.7]},
    ),
    "multiplicative": ([TIMES | {"lr": COSINE}], {"phase.0.lr.start": MANY_RATES}),
    "multiplicative, at one rate": (
        [{"algorithm": "sgd", "lr": 0.2}, TIMES | {"lr": 0.1, "member_lr": 0.05}],
        {"phase.1.lr": MANY_RATES, "phase.1.member_lr": [0.05, 0.2]},
    ),
    "a method that never repeats": (
        [{"algorithm": "schedule_free", "lr": 0.1}],
        {"phase.0.lr": MANY_RATES},
    ),
    "a period": (
        [{"algorithm": "lookahead", "k": 4, "inner": INNER, "lr": 0.1}],
        {"phase.0.lr": MANY_RATES},
    ),
    "an average of all": (
        [
            {"algorithm": "sgd", "lr": 0.2},
            {"algorithm": "swa", "every": 7, "lr": COSINE | {"over": 40}},
        ],
        {"phase.1.lr.start": MANY_RATES},
    ),
}


@pytest.mark.parametrize("directions", [2, 130])
@pytest.mark.parametrize("name", SCHEDULED)
def test_scheduled_cells_together_are_cells_one_by_one(name: str, directions: int) -> None:
    phases, axes = SCHEDULED[name]
    phases = [{"steps": 40} | phase for phase in phases]
    base = {"problem": spectrum(directions), "phase": phases, "record": {"at": [0, 3, 17, 40]}}
    sweep = Sweep(base, axes)
    assert len(next(iter(sweep._grouped()[0])).index) >= 8
    table, alone = sweep.run(), one_by_one(sweep)
    pd.testing.assert_frame_equal(table, alone.run(), check_exact=True)
    assert sweep.key == alone.key


#: A rate as a number or a schedule, and the entry that an axis may change.
SHAPES: list[tuple[Any, str]] = [
    (0.2, ""),
    (COSINE, ".start"),
    (COSINE, ".end"),
    (WSD, ".peak"),
    (CYCLIC, ".high"),
    ({"schedule": "power", "start": 0.4, "over": 3}, ".start"),
]
METHODS: list[dict[str, Any]] = [
    {"algorithm": "nesterov", "momentum": 0.8},
    {"algorithm": "ema", "decay": 0.7, "inner": INNER},
    {"algorithm": "swa", "every": 2},
    {"algorithm": "lawa", "window": 2, "every": 3},
    {"algorithm": "lookahead", "k": 4, "inner": INNER},
    {"algorithm": "schedule_free"},
    LATE,
    LATE | {"directions": 0.5, "gamma": 0.3},
    TIMES,
]


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.sampled_from(METHODS), st.sampled_from(SHAPES)), min_size=1, max_size=3),
    st.lists(st.floats(1e-3, 3.0), min_size=8, max_size=9, unique=True),
    st.integers(1, 4),
    st.sets(st.integers(0, 20), min_size=1, max_size=4),
)
def test_any_cells_together_are_cells_one_by_one(
    stages: list[Any], rates: list[float], directions: int, at: set[int]
) -> None:
    phases = [method | {"lr": rate, "steps": 20} for method, (rate, _) in stages]
    axis = ", ".join(f"phase.{i}.lr{entry}" for i, (_, (_, entry)) in enumerate(stages))
    values = [rate if len(stages) == 1 else [rate] * len(stages) for rate in rates]
    base = {"problem": spectrum(directions), "phase": phases, "record": {"at": sorted(at)}}
    sweep = Sweep(base, {axis: values})
    assert len(next(iter(sweep._grouped()[0])).index) == len(rates)
    pd.testing.assert_frame_equal(sweep.run(), one_by_one(sweep).run(), check_exact=True)


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("over", [5, 6, 7, 8, 9, 10, 11, 12]),  # where the schedule ends
        ("start", [*MANY_RATES, -1.0]),  # a mistake, which its cell tells
    ],
)
def test_cells_whose_schedules_differ_in_time_are_computed_one_by_one(
    entry: str, values: list[float]
) -> None:
    base = BASE | {"phase": [{"algorithm": "sgd", "lr": COSINE, "steps": 20}]}
    sweep = Sweep(base | {"record": {"at": [20]}}, {f"phase.0.lr.{entry}": values})
    assert not list(sweep._grouped()[0])
    if min(values) < 0.0:
        with pytest.raises(NQMError, match=r"case 10 .*start"):
            sweep.run()
    else:
        pd.testing.assert_frame_equal(sweep.run(), one_by_one(sweep).run(), check_exact=True)


def test_a_chain_at_rest_stays_there_beside_others_that_move() -> None:
    """Lr h = 1 takes the start to 0 exactly; the matrix of the next phase overflows."""
    base = BASE | {"phase": [BASE["phase"][0], {"algorithm": "sgd", "lr": 9.0, "steps": 10**4}]}
    rates = [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    sweep = Sweep(base | {"record": {"at": [10**4 + 5]}}, {"phase.0.lr": rates})
    assert sweep.run()["bias"].iloc[-1] == 0.0
    pd.testing.assert_frame_equal(sweep.run(), one_by_one(sweep).run(), check_exact=True)


@pytest.mark.parametrize("method", ["jump", "moments"])
def test_cells_together_give_the_same_bytes_by_any_way(tmp_path: Path, method: str) -> None:
    base = BASE | {"method": method}
    axes = {"phase.0.batch_size": [1, 4], "phase.0.lr": [0.1 + i / 50 for i in range(40)]}
    sweep = Sweep(base, axes | {"problem.noise_variance": [[0.5], [2.0]]})
    names = [tmp_path / f"{i}.csv" for i in range(4)]
    one_by_one(sweep).run(names[0])
    sweep.run(names[1])
    with ThreadPoolExecutor(2) as threads:
        sweep.run(names[2], threads)
    kill(sweep, names[3], 70)
    told: list[int] = []
    sweep.run(names[3], progress=told.append)
    assert told == [70] + [1] * 90
    assert len({name.read_bytes() for name in names}) == 1
    assert read_metadata(names[1])["key"] == read_metadata(names[0])["key"]


def test_mistakes_among_cells_together_name_the_cell() -> None:
    rates = [0.1 * i for i in range(1, 12)]
    for axes, words in (
        ({"phase.0.lr": [*rates, -1.0]}, r"case 11 .*phase\.0\.lr must lie in \(0, inf\)"),
        ({"phase.0.lr": [*rates, 0.1]}, r"case 11 .* is the same run as case 0"),
        ({"phase.0.member_lr": rates}, "case 0 .*SGD has none"),
        (
            {"phase.0.lr": rates, "phase.0.batch_size": [1, -1]},
            r"case 1 .*batch_size must lie in \(0",
        ),
    ):
        with pytest.raises(NQMError, match=words):
            Sweep(BASE, axes).run()


# --- the journal -----------------------------------------------------------------------------

DAMAGED = {
    "1": "pair",
    '"text"': "pair",
    "[]": "pair",
    "[1]": "pair",
    "[" * 9999: "JSON",
    "1" * 9999: "JSON",
    "{}": "pair",
    '["1", {"case": ["a"]}]': "index",
    "[true, {}]": "index",
    "[NaN, {}]": "index",
    "[6, {}]": "index",
    "[-1, {}]": "index",
    "[1e0, {}]": "index",
    "[1, []]": "column case",
    '[1, {"loss": [1.0]}]': "column case",
    '[1, {"case": "a"}]': "list",
    '[1, {"case": []}]': "length",
    '[1, {"case": ["a"], "loss": []}]': "length",
    '[1, {"case": ["a"], "loss": [[1]]}]': "no number",
    '[1, {"case": ["a"], "loss": [99999999999999999999]}]': "no number",
    '[1, {"case": ["a"], "loss": ["1.0"]}]': "column loss is not of its type, float64",
    '[1, {"case": ["a"], "loss": [true]}]': "column loss is not of its type, float64",
    '[1, {"case": ["a"], "loss": [1.0], "step": [0.5]}]': "column step is not of its type, int64",
    '[1, {"case": ["a", "b"], "loss": [1, 2]}]': "one case",
    '[1, {"case": [1], "loss": [1]}]': "column case is not of its type, str",
}


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "j"
    with Journal(path, STAMP, 6) as journal:
        journal.add(0, {"case": ["z"], "loss": [1.0]})
    with path.open("a") as stream:
        stream.write(f"{line}\n")
    kept = path.read_bytes()
    with pytest.raises(NQMError, match=DAMAGED[line]) as caught, Journal(path, STAMP, 6):
        pass
    assert f"{path}: line 3 is damaged" in str(caught.value)
    assert path.read_bytes() == kept


def test_lines_that_do_not_fit_each_other(tmp_path: Path) -> None:
    out, path = tmp_path / "t.csv", tmp_path / "t.csv.journal.jsonl"
    kill(grid(), out, 3)
    header, one, two, three = path.read_text().splitlines(keepends=True)
    swapped = three.replace("[2,", "[1,") + two.replace("[1,", "[2,")
    for content, words in (
        (header + one + two + two, "line 4 is damaged .cell 1 is there twice"),
        (header + one + swapped, "line 3 is damaged .cell 1 is case"),
        (header + one + two.replace('"loss"', '"lost"'), "line 3 is damaged .*columns loss, lost"),
    ):
        path.write_text(content)
        with pytest.raises(NQMError, match=words):
            grid().run(out)
    path.write_text(header + three + one)  # in any order
    grid().run(out)
    pd.testing.assert_frame_equal(read_table(out), grid().run(), check_exact=True)


def test_a_cell_that_is_not_where_it_was(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", STAMP, 6) as journal:
        journal.add(0, {"case": ["z"], "loss": [1.0]})
        journal.add(1, {"case": ["y"], "loss": [1.0]})
        with pytest.raises(ValueError, match="already"):
            journal.add(1, {"case": ["y"], "loss": [1.0]})
        with pytest.raises(NQMError, match="not every cell has the columns loss"):
            journal.add(2, {"case": ["y"]})
        # What no lock can keep out: another program writes to the file.
        content = (tmp_path / "j").read_bytes()
        (tmp_path / "j").write_bytes(content.replace(b"[1,", b"[0,"))
        with pytest.raises(NQMError, match="should hold cell 1, not 0"):
            journal[1]
    with Journal(tmp_path / "k", STAMP, 6) as journal:
        journal.add(0, {"case": ["z"], "loss": [1.0]})
        (tmp_path / "k").write_bytes((tmp_path / "k").read_bytes().replace(b"[1.0]", b"[2.0]"))
        with pytest.raises(NQMError, match="it has changed"):
            journal[0]


# --- two at once -----------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, STAMP, 3) as journal:
        journal.add(0, {"case": ["z"], "loss": [1.0]})
        with (
            pytest.raises(NQMError, match=r"j is being written by process"),
            Journal(path, Stamp("k", "1"), 3),
        ):
            pass
        journal.add(1, {"case": ["y"], "loss": [2.0]})
        assert [journal[i]["loss"] for i in (0, 1)] == [[1.0], [2.0]]
    out = tmp_path / "t.csv"

    def second(count: int) -> None:
        for other in (grid(), grid(seed=1)):
            with pytest.raises(NQMError, match=r"t\.csv is being written by process"):
                other.run(out)

    table = grid().run(out, progress=second)
    pd.testing.assert_frame_equal(table, grid().run(), check_exact=True)


@pytest.mark.slow
def test_two_sweeps_at_once_make_one_table(tmp_path: Path) -> None:
    grid().run(tmp_path / "whole.csv")
    arguments = json.dumps([grid().base, grid().axes, str(tmp_path / "t.csv"), -1])
    command = [sys.executable, "-c", KILLED, arguments]
    both = [subprocess.Popen(command, stderr=-1, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert 0 in [process.returncode for process in both]
    for process, stderr in zip(both, errors, strict=True):
        assert process.returncode == 0 or "is being written by process" in stderr
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "whole.csv"]


EQUAL = {
    "problem": {"curvature": [1.0, 0.2], "noise_variance": 0.5},
    "phase": [{"algorithm": "sgd", "lr": 0.3, "steps": 6, "batch_size": 2}],
    "record": {"at": ["end"]},
}


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_axes_that_vary_together(tmp_path, name):
    """Keys between commas: as many cells as rows, a column for each key."""
    pairs = [[2, 12], [4, 6], [8, 3]]
    axes = {"phase.0.batch_size, phase.0.steps": pairs, "phase.0.lr": [0.1, 0.4]}
    table = nqm.Sweep(EQUAL, axes).run(tmp_path / name)
    assert table[["batch_size", "steps", "lr"]].to_numpy().tolist() == [
        [size, steps, lr] for size, steps in pairs for lr in (0.1, 0.4)
    ]
    assert (table["examples"] == 24).all()
    problem = nqm.Problem([1.0, 0.2], 0.5)
    for row in table.itertuples():
        program = nqm.constant(nqm.SGD(), row.lr, row.steps, batch_size=row.batch_size)
        assert row.loss == nqm.solve(problem, program, [row.steps]).loss[0]
    again = nqm.Sweep(EQUAL, axes).run(tmp_path / name)  # found again by its content
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"phase.0.lr, phase.0.steps": [[0.1, 5], [0.2]]}, "lists of 2 values"),
        ({"phase.0.lr, phase.0.steps": [0.1, 0.2]}, "lists of 2 values"),
        ({"phase.0.lr, phase.0.lr": [[0.1, 0.2]]}, "there twice"),
        ({"phase.0.lr,": [[0.1, 0.2]]}, "a key is missing"),
        ({"phase.0.lr, phase.0.steps": [[0.1, 5]], "phase.-1.lr": [0.1]}, "same entry"),
        ({"phase.0.lr, seed": [[0.1, 1], [0.1, 1]]}, "same run"),
    ],
)
def test_mistakes_of_axes_that_vary_together(axes, words):
    with pytest.raises(NQMError, match=words):
        nqm.Sweep(EQUAL, axes).run()


def test_axes_over_whole_phases():
    late = {"algorithm": "late_phase", "members": 2, "gamma": "mean", "lr": 0.1, "steps": 3}
    plain = EQUAL["phase"][0]
    table = nqm.Sweep(EQUAL, {"phase": [[plain], [plain, late]], "seed": [0]}).run()
    assert table["step"].tolist() == [6, 9]
    one = nqm.Sweep(EQUAL, {"phase.0": [plain, plain | {"algorithm": "swa"}]}).run()
    assert len(one) == 2
    assert one["loss"][0] == table["loss"][0]


def test_members_at_equal_data():
    """`examples` in place of steps: K members draw K minibatches a step."""
    base = EQUAL | {
        "phase": [
            EQUAL["phase"][0],
            {"algorithm": "late_phase", "gamma": "mean", "lr": 0.05, "batch_size": 2,
             "examples": 120},
        ]
    }  # fmt: skip
    table = nqm.Sweep(base, {"phase.1.members": [1, 2, 5]}).run()
    assert table["examples"].tolist() == [132, 132, 132]
    assert table["step"].tolist() == [6 + 60, 6 + 30, 6 + 12]

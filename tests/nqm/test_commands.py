"""The commands edge, critical-batch, optimize, soup and bound, against closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nqm.cli import main
from nqm.table import read_metadata, read_table
from tests.tolerances import IDENTITY

H, V = np.array([1.0, 0.5, 0.25]), np.array([1.0, 0.2, 0.1])
FILE = f"""
problem = {{curvature = {H.tolist()}, noise_variance = {V.tolist()}}}

[[phase]]
algorithm = "sgd"
lr = 0.1
batch_size = 8
steps = 50
"""
LATE = """
[[phase]]
algorithm = "late_phase"
members = 10
gamma = "mean"
lr = 0.05
member_lr = 0.15
batch_size = 8
steps = 20
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "sgd.toml"
    path.write_text(FILE)
    return str(path)


@pytest.fixture
def late(tmp_path: Path) -> str:
    path = tmp_path / "late.toml"
    path.write_text(FILE + LATE)
    return str(path)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def rows(*words: str) -> list[dict[str, Any]]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    return [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]


def fails(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def sgd(lr: float, steps: int, batch_size: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Gain of the start and variance due to noise, by the recursion."""
    gain, noise = np.ones(3), np.zeros(3)
    for _ in range(steps):
        gain, noise = (1 - lr * H) * gain, (1 - lr * H) ** 2 * noise + lr**2 * V / batch_size
    return gain, noise


def test_edge(late: str, file: str) -> None:
    # lambda = member_lr + gamma K lr = 3 lr + lr: unstable from 4 lr h = 2 on, and the members,
    # 3 lr h = 2, later.
    first, second = rows("edge", late)
    assert (first["algorithm"], second["algorithm"]) == ("sgd", "late_phase")
    assert first["edge"] == pytest.approx(2.0, rel=1e-9)
    assert second["edge"] == pytest.approx(0.5, rel=1e-9)
    assert (first["peak_lr"], second["peak_lr"]) == (0.1, 0.05)
    heavy = "phase=[{algorithm='heavy_ball', momentum=0.6, lr={schedule='cosine', start=0.3, "
    heavy += "end=0.1, over=9}, steps=9}]"
    (row,) = rows("edge", file, "--set", heavy)
    assert row["edge"] == pytest.approx(2 * 1.6, rel=1e-9)
    assert row["peak_lr"] == 0.3
    fails(call("edge", file, "--set", "phase.0.algorithm=sign_sgd"), "linear algorithm")
    fails(
        call("edge", late, "--set", "phase.1.lr={schedule='linear', start=0.1, end=0.05, over=20}"),
        "phase.1: the edge needs member_lr in proportion to lr",
    )
    least = "problem={inputs='gaussian', curvature=[1.0, 1.0]}"
    (row,) = rows("edge", file, "--set", least, "--set", "phase.0.batch_size=1")
    # E (1 - lr x x')^2 of two equal directions: -2 lr + lr^2 (tr H + 2) = 0.
    assert row["edge"] == pytest.approx(0.5, rel=1e-6)


def test_critical_batch(file: str) -> None:
    words = ["critical-batch", file, "--target", "0.02", "--set", "phase.0.steps=10**6"]
    words[-1] = "phase.0.steps=1000000"
    table = rows(*words, "--batch-sizes", "2,16,128,1024")
    assert [row["batch_size"] for row in table] == [2, 16, 128, 1024]
    for row in table:
        lr, step = row["lr"], row["step"]
        before, at = (
            0.5 * H @ (gain**2 + noise)
            for gain, noise in (sgd(lr, n, row["batch_size"]) for n in (step - 1, step))
        )
        assert at <= 0.02 < before
        fit = row["least_steps"] * (1 + row["critical"] / row["batch_size"])
        assert row["fit"] == pytest.approx(fit, rel=1e-12)
        assert row["least_examples"] == pytest.approx(row["least_steps"] * row["critical"])
        assert row["examples"] == step * row["batch_size"]
    fails(call(*words, "--batch-sizes", "2,x"), "--batch-sizes must be numbers", "2,x")
    fails(call(*words, "--batch-sizes", "2,4"), "three are needed")
    fails(call(*words[:2]), "--target")
    fails(call(*words, "--target", "9"), "is met at the start")


def test_optimize(file: str, late: str) -> None:
    # In one direction the best rates are the Kalman filter's, which no method beats.
    one = "problem={curvature=[0.5], noise_variance=[0.2]}"
    table = rows("optimize", file, "--pieces", "50", "--set", one)
    kalman = 0.25 / (1 + 50 * 0.25 * 8 / 0.2)
    s = 1.0
    for step, row in enumerate(table):
        assert (row["first"], row["last"]) == (step, step)
        assert row["lr"] == pytest.approx(0.5 * s / (0.25 * s + 0.2 / 8), rel=1e-3)
        s = 1 / (1 / s + 0.25 * 8 / 0.2)
        assert row["loss"] == pytest.approx(kalman, rel=1e-6)
        assert row["bound"] == pytest.approx(kalman, rel=1e-12)
        assert row["regret"] == pytest.approx(0.0, abs=1e-6 * kalman)
        assert row["lr_low"] < row["lr"] < row["lr_high"]
    free = rows("optimize", file, "--pieces", "2", "--set", "phase.0.steps=2")
    capped = rows(
        "optimize", file, "--pieces", "2", "--set", "phase.0.steps=2", "--highest-lr", "2"
    )
    assert max(row["lr"] for row in capped) <= 2
    assert free[0]["loss"] <= capped[0]["loss"]
    assert len(rows("optimize", file, "--pieces", "9", "--set", "phase.0.steps=3")) == 3
    joint = rows("optimize", file, "--pieces", "2", "--set", "phase.0.steps=20", "--free", "all")
    rates = rows("optimize", file, "--pieces", "2", "--set", "phase.0.steps=20")
    assert joint[0]["bound"] == pytest.approx(rates[0]["bound"], rel=1e-12)
    assert joint[0]["bound"] < joint[0]["loss"] < rates[0]["loss"]
    assert sum(row["batch_size"] for row in joint) / 2 == pytest.approx(8.0)
    assert {"momentum", "decay"} <= joint[0].keys()
    fails(call("optimize", file, "--free", "lr,mu"), "free 'mu' is unknown")
    fails(call("optimize", late), "one phase")
    fails(call("optimize", file, "--set", "phase.0.algorithm=heavy_ball"), "sgd only", "HeavyBall")
    fails(call("optimize", file, "--pieces", "0"), "pieces")
    fails(call("optimize", file, "--highest-lr", "-1"), "highest_lr")
    changing = "phase.0.batch_size={schedule='linear', start=1.0, end=8.0, over=50}"
    fails(call("optimize", file, "--set", changing), "constant phase.0.batch_size")
    fails(call("optimize", file, "--set", "problem.inputs=gaussian"), "problem")


def test_bound(late: str) -> None:
    table = rows("bound", late, "--set", "record.at=[0, 50, 70]")
    for row, examples in zip(table, (0, 400, 400 + 20 * 10 * 8), strict=True):
        least = 0.5 * np.sum(H / (1 + examples * H**2 / V))
        assert row["examples"] == examples
        assert row["bound"] == pytest.approx(least, rel=IDENTITY)
        assert row["bound_any"] == pytest.approx(least, rel=IDENTITY)
        assert row["regret"] == pytest.approx(row["loss"] - least, rel=1e-9)
    gain, noise = sgd(0.1, 50)
    assert table[1]["loss"] == pytest.approx(0.5 * H @ (gain**2 + noise), rel=1e-12)
    # A mean of the start that is known would help; linear methods do not know it.
    (row,) = rows("bound", late, "--set", "record.at=[70]", "--set", "problem.initial_mean=2.0")
    told = 2000 * H**2 / V
    assert row["bound"] == pytest.approx(0.5 * np.sum(H / (1 / 5 + told)), rel=IDENTITY)
    assert row["bound_any"] == pytest.approx(0.5 * np.sum(H / (1 + told)), rel=IDENTITY)


def test_soup_of_runs(file: str) -> None:
    table = {row["rule"]: row for row in rows("soup", file, "--runs", "5")}
    gain, noise = sgd(0.1, 50)
    own, mean = (0.5 * H @ (gain**2 + noise / n) for n in (1, 5))
    for rule in ("uniform", "greedy", "optimal", "nonnegative"):
        assert table[rule]["loss"] == pytest.approx(mean, rel=1e-9)
        assert table[rule]["ingredients"] == 5
    for rule in ("mean_ingredient", "best_ingredient"):
        assert table[rule]["loss"] == pytest.approx(own, rel=1e-12)


def test_soup_of_a_sweep(file: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    path.write_text(FILE + '\n[sweep]\n"phase.0.lr" = [0.05, 0.4]\n')
    table = {row["rule"]: row["loss"] for row in rows("soup", str(path))}
    (g, q), (k, r) = sgd(0.05, 50), sgd(0.4, 50)
    a, b, c = 0.5 * H @ (g**2 + q), 0.5 * H @ (k**2 + r), 0.5 * H @ (g * k)
    assert table["uniform"] == pytest.approx((a + b + 2 * c) / 4, rel=1e-12)
    assert table["optimal"] == pytest.approx((a * b - c * c) / (a + b - 2 * c), rel=1e-9)
    weights = rows("soup", str(path), "--weights")
    assert [row["ingredient"] for row in weights] == ["0: phase.0.lr=0.05", "1: phase.0.lr=0.4"]
    assert weights[0]["optimal"] == pytest.approx((b - c) / (a + b - 2 * c), rel=1e-9)
    assert sum(row["optimal"] for row in weights) == pytest.approx(1.0)
    fails(call("soup", str(path), "--star", "3"), "drop them or [sweep]")
    fails(call("edge", str(path)), "[sweep]")
    path.write_text(FILE + '\n[sweep]\n"problem.initial_mean" = [0.0, 1.0]\n')
    fails(call("soup", str(path)), "one problem")
    fails(call("soup", file), "give --runs")
    fails(call("soup", file, "--runs", "2", "--star", "2"), "exclude each other")


def test_soup_of_cycles(file: str) -> None:
    gain, noise = sgd(0.1, 50)
    loss = 0.5 * H @ ((gain + gain**2) ** 2 / 4 + (noise * (1 + gain) ** 2 + noise) / 4)
    for kind in ("--snapshots", "--star"):
        table = {row["rule"]: row["loss"] for row in rows("soup", file, kind, "2")}
        assert table["uniform"] == pytest.approx(loss, rel=1e-12)
    fails(call("soup", file, "--snapshots", "0"), "members")


@pytest.mark.parametrize("end", ["csv", "parquet"])
@pytest.mark.parametrize("words", [["edge"], ["bound"], ["soup", "--runs", "2"], ["optimize"]])
def test_tables_are_kept(file: str, tmp_path: Path, end: str, words: list[str]) -> None:
    out = str(tmp_path / f"t.{end}")
    words = [words[0], file, *words[1:]]
    table = rows(*words)
    done = call(*words, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert read_table(out).to_dict("records") == table
    assert read_metadata(out)["config"]["command"]["name"] == words[0]
    kept = Path(out).read_bytes()
    assert call(*words, "--out", out).exit_code == 0
    assert Path(out).read_bytes() == kept
    fails(call("run", file, "--out", out), "was computed with")
    fails(call(*words, "--set", "phase.0.lr=0.2", "--out", out), "phase.0.lr")
    fails(call(*words, "--out", str(tmp_path / "t.xls")), ".parquet or .csv")

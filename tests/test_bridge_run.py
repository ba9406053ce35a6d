"""The bridge's command: from a run to tables and words, resumable, mistakes told in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from tiny_landscapes import tanh_landscape
from tiny_runs import recipe
from torch import nn

from neural.bridge import COLUMNS, Plan
from neural.bridge_run import BridgeConfig, held_out_loss, open_target, run_bridge
from neural.cost import Cost
from neural.experiment import run_experiment
from neural.landscapes import landscape_of
from neural.task import Place
from nqm import SGD, Phase, Program, solve
from nqm.cli import main
from nqm.errors import NQMError
from nqm.spectra import read_problem

PLAN = Plan(members=(1, 2), chains=4, looks=2)
SMALL = BridgeConfig(
    select="head", examples=60, pairs=6, draws=2, products=4, samples=4, rates=(0.1, 0.3),
    batch_sizes=(10, 20), steps=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_experiment(recipe({"base": {}}), out, seeds=[0])
    return out / "base" / "seed0"


def test_a_run_becomes_tables_and_words(run: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    found = run_bridge(
        open_target(str(run), Place()), SMALL, PLAN, Place(), tmp_path,
        told=lambda stage, share: stages.append(stage),
    )  # fmt: skip
    assert list(found.table.columns) == COLUMNS
    # Two rates at the first size, the second size at one rate; two K, and averages over time.
    assert len(found.table) == 3 * 2 * 3
    assert set(found.course["step"]) == {1, 2, 5, 15, 20}
    assert found.table[["measured", "predicted", "test"]].notna().all(axis=None)
    assert {
        "curvature and noise",
        "averages over the scatter",
        "third derivatives",
        "train 1 of 3",
    } <= set(stages)
    assert (tmp_path / "verdict.md").read_text() == "".join(f"- {w}\n" for w in found.words)
    parts = ["curvature and noise", "averages over the scatter", "third derivatives", "training"]
    assert list(found.cost["stage"]) == parts
    assert (found.cost["epochs"] > 0.0).all()
    # The file is the problem, as nqm reads it: the table's excess is its expected loss.
    problem = read_problem(tmp_path / "problem.parquet").replace(initial_mean=0.0)
    config = replace(SMALL, smooth=0, train=False)
    plain = run_bridge(open_target(str(run), Place()), config, PLAN, Place(), tmp_path / "plain")
    row = plain.table.iloc[0]
    phase = Phase(SGD(), float(row["lr"]), 20, batch_size=int(row["batch_size"]))
    losses = solve(problem, Program((phase,)), at=[15, 20]).loss
    assert row["excess"] == pytest.approx(float(np.mean(losses)), rel=1e-9)
    # All directions are counted, and all the noise.
    counted = found.spectrum[found.spectrum["kind"] != "bulk noise"]["count"].sum()
    assert counted == pytest.approx(8 * 10 + 10, rel=1e-9)
    noise = found.spectrum["noise_variance"].sum()
    assert noise == pytest.approx(found.local.noise_trace, rel=1e-9)

    stages.clear()
    again = run_bridge(
        open_target(str(run), Place()), SMALL, PLAN, Place(), tmp_path,
        told=lambda stage, share: stages.append(stage),
    )  # fmt: skip
    assert not stages, "nothing is done twice"
    for name in ("table", "course", "best", "cost"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert again.words == found.words
    (tmp_path / "bridge.parquet").unlink()  # as if stopped before the last table
    late = run_bridge(open_target(str(run), Place()), SMALL, PLAN, Place(), tmp_path)
    pd.testing.assert_frame_equal(late.table, found.table)
    pd.testing.assert_series_equal(late.cost["seconds"], found.cost["seconds"])
    # What another configuration has done is kept; it cost this one nothing.
    less = replace(SMALL, batch_sizes=SMALL.batch_sizes[:1])
    for name in ("bridge", "problem", "spectrum", "course", "best_rate", "cost"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / f"{name}-all.parquet")
    part = run_bridge(open_target(str(run), Place()), less, PLAN, Place(), tmp_path)
    assert (part.cost["epochs"] == 0.0).all()
    assert any("third derivatives kept" in line for line in part.words)
    with pytest.raises(NQMError, match="another configuration"):
        run_bridge(open_target(str(run), Place()), less, Plan((1,), 4), Place(), tmp_path)


def test_prediction_alone_and_a_minimum(run: Path, tmp_path: Path) -> None:
    config = BridgeConfig(
        select="head", examples=60, pairs=None, samples=4, steps=20, rates=(0.2,), settle=300,
        weight_decay=0.02, train=False,
    )  # fmt: skip
    found = run_bridge(open_target(str(run), Place()), config, PLAN, Place(), tmp_path)
    assert found.table["measured"].isna().all()
    assert (found.table["predicted_rise"] > 0).all()
    assert np.abs(found.table["descent"]).max() < 1e-9, "at a minimum there is no descent"
    assert not any("measured" in line for line in found.words)


def test_batchnorm_in_training_mode(run: Path, tmp_path: Path) -> None:
    config = replace(SMALL, group=6, rates=(0.1,), batch_sizes=(1,), test_examples=30)
    found = run_bridge(open_target(str(run), Place()), config, PLAN, Place(), tmp_path)
    assert found.local.examples == 10, "sixty examples in groups of six"
    assert found.table[["predicted", "measured", "test"]].notna().all(axis=None)
    late = replace(PLAN, late_phase="head", members=(2,))
    with pytest.raises(NQMError, match="drop group"):
        run_bridge(open_target(str(run), Place()), config, late, Place(), tmp_path / "late")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples must be an integer >= 2; got 1"),
        ({"smooth": -1}, "smooth must be an integer >= 0; got -1"),
        ({"examples": 1}, "examples must be an integer >= 2; got 1"),
        ({"pairs": -3}, "pairs must be an integer >= 1; got -3"),
        ({"settle_lr": -1.0}, r"settle_lr must lie in \(0, inf\); got -1.0"),
        ({"batch_sizes": (8, 0)}, "batch_size must be an integer >= 1; got 0"),
        (
            {"rates": (0.1, 2.0)},
            r"rates must lie in \(0, 2\), below the edge of stability; got 2.0",
        ),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1.0"),
        ({"curvature": "ggm"}, "did you mean 'ggn'"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NQMError, match=message) as told:
        BridgeConfig(**settings)
    assert "\n" not in str(told.value)


def test_heavy_ball_stands_a_higher_rate() -> None:
    assert BridgeConfig(rates=(5.9,), momentum=0.5).rates == (5.9,)
    with pytest.raises(NQMError, match=r"\(0, 6\)"):
        BridgeConfig(rates=(6.0,), momentum=0.5)


def test_shuffled_epochs_are_checked_before_anything_is_measured(run: Path, tmp_path: Path) -> None:
    config = replace(SMALL, sampling="shuffled", batch_sizes=(7,))
    with pytest.raises(NQMError, match="divides the 60 examples; got 7"):
        run_bridge(open_target(str(run), Place()), config, PLAN, Place(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_cost_is_told_in_epochs_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural.cost._seconds", lambda landscape: 2.0)
    cost = Cost(tanh_landscape(), 0.25, tmp_path, "key")  # an epoch takes eight seconds
    cost.seconds = {"one": 16.0, "kept": 0.0}
    assert cost.table()["epochs"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("examples", [3, None])
def test_loss_of_so_much_of_the_test_set(run: Path, examples: int | None) -> None:
    opened = open_target(str(run), Place())
    landscape = landscape_of(opened.run, opened.model, Place(), select="head", examples=60)
    x, y = map(torch.cat, zip(*opened.task.test(), strict=True))
    x, y = x[:examples].double(), y[:examples]
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(opened.model(x), y))
    found = held_out_loss(landscape, opened.task, examples)(landscape.weights)
    assert found == pytest.approx(expected, rel=1e-12)


def test_trainings_are_a_star() -> None:
    cells = BridgeConfig(rates=(0.1, 0.2, 0.4), batch_sizes=(8, 16, 32), momentum=0.5).trainings(4)
    assert [cell.lr * 4 / 0.5 for cell in cells] == pytest.approx([0.1, 0.2, 0.4, 0.2, 0.2])
    assert [cell.batch_size for cell in cells] == [8, 8, 8, 16, 32]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits_bn"], "starts from random weights"),
        (["digits_bm"], "no recipe is called 'digits_bm'; did you mean 'digits_bn'"),
        (["."], "is not the folder of a run: it holds no run.json"),
        (["RUN", "--select", "norms"], "select: 'norms' is unknown"),
        (["RUN", "--examples", "1"], "examples must be"),
        (["RUN", "--members", "64"], "members must be at most the 32 chains; got 64"),
        (["RUN", "--rate", "-1"], "rates must lie in"),
        (["RUN", "--seed", "-1"], "seed must be an integer >= 0; got -1"),
        (["RUN", "--seed", str(2**70)], "seed must lie in [0, 1e+09]"),
        (["RUN", "--batch-size", str(10**12)], "batch_size = 1000000000000 of 32 chains needs"),
        (["RUN", "--chains", str(10**9)], "chains = 1000000000 of"),
        (["RUN", "--chains", str(10**13)], "chains must lie in [1, 1e+09]"),
        (["RUN", "--steps", str(10**30)], "steps must lie in"),
        (["RUN", "--looks", str(10**9)], "looks must lie in"),
        (["RUN", "--late-phase", "head", "--members", "1"], "members must be at least 2"),
    ],
)
def test_a_mistake_is_one_line(run: Path, tmp_path: Path, words: list[str], told: str) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    out = str(tmp_path / "out")
    done = CliRunner().invoke(main, ["neural", "bridge", *words, "--out", out, "--threads", "1"])
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command(run: Path, tmp_path: Path) -> None:
    words = "--select head --examples 60 --pairs 6 --draws 2 --products 4 --samples 4 --smooth 0"
    words += " --steps 5 --chains 2 --members 1 --members 2 --rate 0.1 --looks 1 --test-examples 10"
    out = tmp_path / "out"
    done = CliRunner().invoke(
        main, ["neural", "bridge", str(run), *words.split(), "--out", str(out), "--threads", "1"]
    )
    assert done.exit_code == 0, done.output
    stages = [line.partition(" ")[2] for line in done.stderr.strip().splitlines()]
    assert stages == ["curvature and noise", "third derivatives", "train 1 of 1", "best rates"]
    assert (out / "verdict.md").read_text().splitlines()[0].removeprefix("- ") in done.stdout
    assert str(out / "bridge.png") in done.stdout

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
from torch import nn

from neural.bridge.comparison import COLUMNS
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.from_run import risk_of_run
from neural.bridge.pipeline import (
    held_out_risk,
    load_config,
    open_target,
    run_bridge,
    split_overrides,
)
from neural.bridge.timing import STAGES, cost_table
from neural.training.experiment import run_experiment
from neural.training.task import Runtime
from nqm import SGD, Phase, Program, solve
from nqm.cli import main
from nqm.errors import NQMError
from nqm.problems.spectra import read_problem
from nqm.progress import Lines
from nqm.table import read_metadata
from tests.tiny_risks import tanh_risk
from tests.tiny_runs import recipe

PLAN = Plan(members=(1, 2), runs=4, records=2)
SMALL = BridgeConfig(
    select="head", examples=60, eigenpairs=6, noise_samples=2, lanczos_steps=4, displacements=4,
    lr_times_sharpness=(0.1, 0.3), batch_sizes=(10, 20), steps=20,
)  # fmt: skip


def spent(folder: Path) -> dict[str, float]:
    """Seconds of all results in a folder, by the name of their stage."""
    found: dict[str, float] = {}
    for path in folder.iterdir():
        with np.load(path) as content:
            stage = path.name.partition("-")[0]
            found[stage] = found.get(stage, 0.0) + float(content["_seconds"])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_experiment(recipe({"base": {}}), out, seeds=[0])
    return out / "base" / "seed0"


def test_a_run_becomes_tables_and_words(run: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    found = run_bridge(
        open_target(str(run), Runtime()), SMALL, PLAN, Runtime(), tmp_path,
        progress=lambda stage, share: stages.append(stage),
    )  # fmt: skip
    assert list(found.table.columns) == COLUMNS
    # Two rates at the first size, the second size at one rate; two K, and averages over time.
    assert len(found.table) == 3 * 2 * 3
    assert set(found.course["step"]) == {1, 2, 5, 15, 20}
    names = ["measured", "predicted", "test_loss", "test_error", "predicted_test_loss"]
    assert found.table[names].notna().all(axis=None)
    assert {"curvature and noise", "averages", "third derivatives", "train 1 of 3"} <= set(stages)
    assert (tmp_path / "verdict.md").read_text() == "".join(f"- {w}\n" for w in found.words)
    # A stage takes as long as all of its results did, each counted once.
    seconds = spent(tmp_path / "kept")
    parts = [stage for stage, kept in STAGES.items() if not set(kept).isdisjoint(seconds)]
    assert {"curvature and noise", "averages", "third derivatives", "test loss"} < set(parts)
    assert set(seconds) <= {stage for kept in STAGES.values() for stage in kept}
    assert list(found.cost["stage"]) == parts
    assert (found.cost["epochs"] > 0.0).all()
    assert found.cost["seconds"].tolist() == pytest.approx(
        [sum(seconds[one] for one in STAGES[stage] if one in seconds) for stage in parts], rel=1e-12
    )
    # The file is the problem, as nqm reads it: the table's excess is its expected loss.
    problem = read_problem(tmp_path / "problem.parquet").replace(initial_mean=0.0)
    config = replace(SMALL, averaging_displacements=0, train=False)
    plain = run_bridge(
        open_target(str(run), Runtime()), config, PLAN, Runtime(), tmp_path / "plain"
    )
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
        open_target(str(run), Runtime()), SMALL, PLAN, Runtime(), tmp_path,
        progress=lambda stage, share: stages.append(stage),
    )  # fmt: skip
    assert not stages, "nothing is done twice"
    for name in ("table", "course", "best", "cost"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert again.words == found.words
    (tmp_path / "bridge.parquet").unlink()  # as if stopped before the last table
    late = run_bridge(open_target(str(run), Runtime()), SMALL, PLAN, Runtime(), tmp_path)
    pd.testing.assert_frame_equal(late.table, found.table)
    pd.testing.assert_series_equal(late.cost["seconds"], found.cost["seconds"])
    # What another configuration has done is not done again, and counts as long as it took then.
    files = set((tmp_path / "kept").iterdir())
    less = replace(SMALL, batch_sizes=SMALL.batch_sizes[:1])
    for name in ("bridge", "problem", "spectrum", "course", "best_lr", "cost"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / f"{name}-all.parquet")
    part = run_bridge(open_target(str(run), Runtime()), less, PLAN, Runtime(), tmp_path)
    assert set((tmp_path / "kept").iterdir()) == files
    before, after = (one.cost.set_index("stage")["seconds"] for one in (found, part))
    for stage in ("curvature and noise", "averages"):
        assert after[stage] == before[stage]
    for stage in ("third derivatives", "training"):  # of two trainings out of three
        assert 0.0 < after[stage] < before[stage]
    with pytest.raises(NQMError, match=r"was computed with plan\.members = .*, you ask for \[1\]"):
        run_bridge(open_target(str(run), Runtime()), less, Plan((1,), 4), Runtime(), tmp_path)


def test_prediction_alone_and_a_minimum(run: Path, tmp_path: Path) -> None:
    config = BridgeConfig(
        select="head", examples=60, eigenpairs=0, displacements=4, steps=20,
        lr_times_sharpness=(0.2,), minimise=300, weight_decay=0.02, train=False,
    )  # fmt: skip
    found = run_bridge(open_target(str(run), Runtime()), config, PLAN, Runtime(), tmp_path)
    assert found.table["measured"].isna().all()
    assert found.table["test_loss"].isna().all()
    assert found.table["predicted_test_loss"].notna().all()
    assert (found.table["predicted_rise"] > 0).all()
    assert np.abs(found.table["descent"]).max() < 1e-9, "at a minimum there is no descent"
    assert not any("measured" in line for line in found.words)


def test_batchnorm_in_training_mode(run: Path, tmp_path: Path) -> None:
    config = replace(
        SMALL, batchnorm_group=6, lr_times_sharpness=(0.1,), batch_sizes=(1,), test_examples=30,
        eigenpairs=3, noise_samples=1, displacements=2, averaging_displacements=1, steps=10,
    )  # fmt: skip
    found = run_bridge(open_target(str(run), Runtime()), config, PLAN, Runtime(), tmp_path)
    assert found.local.examples == 10, "sixty examples in groups of six"
    names = ["predicted", "measured", "test_loss", "predicted_test_loss"]
    assert found.table[names].notna().all(axis=None)
    late = replace(PLAN, late_phase="head", members=(2,))
    with pytest.raises(NQMError, match="drop batchnorm_group"):
        run_bridge(open_target(str(run), Runtime()), config, late, Runtime(), tmp_path / "late")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"displacements": 1}, "displacements must be an integer >= 2; got 1"),
        (
            {"averaging_displacements": -1},
            "averaging_displacements must be an integer >= 0; got -1",
        ),
        ({"examples": 1}, "examples must be an integer >= 2; got 1"),
        ({"eigenpairs": -3}, "eigenpairs must be an integer >= 0; got -3"),
        ({"noise_samples": 0}, "noise_samples must be an integer >= 1; got 0"),
        ({"lanczos_steps": 0}, "lanczos_steps must be an integer >= 1; got 0"),
        ({"minimise": 1.5}, "minimise must be an integer >= 0; got 1.5"),
        ({"batchnorm_group": 1}, "batchnorm_group must be an integer >= 2; got 1"),
        ({"minimise_lr": -1.0}, r"minimise_lr must lie in \(0, inf\); got -1.0"),
        ({"batch_sizes": (8, 0)}, "batch_size must be an integer >= 1; got 0"),
        (
            {"lr_times_sharpness": (0.1, 2.0)},
            r"lr_times_sharpness must lie in \(0, 2\), below the edge of stability; got 2.0",
        ),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1.0"),
        ({"lr_times_sharpness": ("fast",)}, "lr_times_sharpness must be a finite .* got 'fast'"),
        (
            {"lr_times_sharpness": ()},
            r"lr_times_sharpness must have at least one entry .* got \(\)",
        ),
        ({"batch_sizes": (8, 8)}, r"batch_sizes must have at least one entry and no duplicates"),
        ({"curvature": "ggm"}, "did you mean 'ggn'"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NQMError, match=message) as told:
        BridgeConfig(**settings)
    assert "\n" not in str(told.value)


def test_heavy_ball_stands_a_higher_rate() -> None:
    found = BridgeConfig(lr_times_sharpness=(5.9,), momentum=0.5)
    assert found.reference(2.0).lr == pytest.approx(5.9 * 0.5 / 2.0, rel=1e-12)
    with pytest.raises(NQMError, match=r"\(0, 6\)"):
        BridgeConfig(lr_times_sharpness=(6.0,), momentum=0.5)


def test_shuffled_epochs_are_checked_before_anything_is_measured(run: Path, tmp_path: Path) -> None:
    config = replace(SMALL, sampling="shuffled", batch_sizes=(7,))
    with pytest.raises(NQMError, match=r"divides the 60 examples.*got 7"):
        run_bridge(open_target(str(run), Runtime()), config, PLAN, Runtime(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_cost_is_told_in_epochs_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neural.bridge.timing._seconds", lambda risk: 2.0)
    log = {
        ("slopes", "one"): 16.0, ("slopes", "other"): 4.0, ("force", "one"): 3.0,
        ("eigenpairs", "one"): 8.0, ("balance", "one"): 1.0, ("a new one", "one"): 100.0,
    }  # fmt: skip
    found = cost_table(tanh_risk(), 0.25, log)  # an epoch takes eight seconds
    assert found["stage"].tolist() == ["curvature and noise", "third derivatives", "a new one"]
    assert found["seconds"].tolist() == [8.0, 24.0, 100.0]
    assert found["epochs"].tolist() == [1.0, 3.0, 12.5]


TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "transformer": (
        {"name": "transformer_lm", "context": 8, "width": 8, "heads": 2, "layers": 1},
        "layernorm+head",
    ),
    "LSTM": ({"name": "lstm_lm", "embedding": 4, "hidden": 4, "rank1": "lstm.*"}, "rank1"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_networks_that_read_a_text(kind: str, tmp_path: Path) -> None:
    model, select = TEXTS[kind]
    data = {
        "name": "python_docs", "length": 8, "batch_size": 16, "train_examples": 600,
        "test_examples": 300,
    }  # fmt: skip
    run_experiment(
        recipe({"base": {}}, data=data, model=model, train={"epochs": 1, "lr": 0.1}),
        tmp_path, seeds=[0],
    )  # fmt: skip
    target, out = str(tmp_path / "base" / "seed0"), tmp_path / "bridge"
    config = replace(
        SMALL, select=select, examples=12, batch_sizes=(4,), lr_times_sharpness=(0.1,), steps=4,
        eigenpairs=4, averaging_displacements=1, test_examples=8, weight_decay=0.0,
    )  # fmt: skip
    opened = open_target(target, Runtime())
    found = run_bridge(opened, config, PLAN, Runtime(), out)
    names = ["predicted", "measured", "predicted_test_loss", "test_loss"]
    assert np.isfinite(found.table[names]).all(axis=None)
    # The measured weights are the model's own: their loss is that of the run's model.
    plain = open_target(target, Runtime())
    options: dict[str, Any] = {"select": "head", "examples": 12, "weight_decay": 0.0}
    risk = risk_of_run(plain.run, plain.model, Runtime(), **options)
    assert found.local.loss == pytest.approx(risk.loss(), rel=1e-5)
    if select == "rank1":  # factors of both LSTM weights: 16 + 4 each
        assert len(found.local.pairs.vectors) == 40
        again = run_bridge(opened, config, PLAN, Runtime(), tmp_path / "again")
        assert len(again.local.pairs.vectors) == 40


@pytest.mark.parametrize("examples", [3, 0])
def test_loss_of_so_much_of_the_test_set(run: Path, examples: int) -> None:
    opened = open_target(str(run), Runtime())
    risk = risk_of_run(opened.run, opened.model, Runtime(), select="head", examples=60)
    x, y = map(torch.cat, zip(*opened.task.test(), strict=True))
    x, y = x[: examples or None].double(), y[: examples or None]
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(opened.model(x), y))
    found = held_out_risk(risk, opened.task, examples).loss()
    assert found == pytest.approx(expected, rel=1e-12)


def test_trainings_are_a_star() -> None:
    cells = BridgeConfig(
        lr_times_sharpness=(0.1, 0.2, 0.4), batch_sizes=(8, 16, 32), momentum=0.5
    ).trainings(4)
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
        (["RUN", "--members", "64"], "members must be at most the 32 runs; got 64"),
        (["RUN", "--set", "bridge.lr_times_sharpness=[-1.0]"], "lr_times_sharpness must lie in"),
        (
            ["RUN", "--set", "bridge.lr_times_sharpness=[]"],
            "lr_times_sharpness must have at least one entry",
        ),
        (["RUN", "--set", "plan.late_phase=head", "--members", "1"], "members must be at least 2"),
        (["RUN", "--set", "bridge.K=3"], "bridge.K is not a known key; K is plan.members"),
        (["RUN", "--set", "bridge.pairs=3"], "bridge.pairs is not a known key"),
        (
            ["RUN", "--set", "bridge.stepz=3"],
            "bridge.stepz is not a known key; did you mean 'steps'",
        ),
        (["RUN", "--set", "bridge.steps=2.5"], "bridge.steps must be a whole number; got 2.5"),
        (["RUN", "--set", "model.width=3"], "model.width cannot be changed"),
        (["RUN", "--set", "brigde.steps=3"], "brigde.steps cannot be changed"),
        (["RUN", "--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["RUN", "--seed", "-1"], "plan: seed must be an integer >= 0; got -1"),
        (["RUN", "--seed", str(2**70)], "plan.seed must lie within"),
        (
            ["RUN", "--set", f"bridge.batch_sizes=[{10**12}]"],
            "batch_size = 1000000000000 of 32 runs needs",
        ),
        (["RUN", "--set", f"plan.runs={10**9}"], "runs = 1000000000 of"),
        (["RUN", "--set", f"plan.runs={10**13}"], "runs must lie in [1, 1e+09]"),
        (["RUN", "--set", f"bridge.steps={10**30}"], "bridge.steps must lie within"),
        (["RUN", "--set", f"plan.records={10**9}"], "records must be at most 1e+06"),
        (["RUN", "--set", f"bridge.noise_samples={10**9}"], "noise_samples must be at most 1e+06"),
        (["RUN", "--set", "plan.late_phase=hed"], "plan.late_phase: select: 'hed' is unknown"),
        (["RUN", "--out", "RUN"], "is the folder of a run and takes no other results"),
    ],
)
def test_a_mistake_is_one_line(run: Path, tmp_path: Path, words: list[str], told: str) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    out = str(tmp_path / "out")
    done = CliRunner().invoke(main, ["neural", "bridge", "--out", out, "--threads", "1", *words])
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines, "FIRST", 0.0)
    path, out = tmp_path / "bridge.toml", tmp_path / "out"
    path.write_text(
        "[bridge]\nexamples = 600\neigenpairs = 6\nnoise_samples = 2\nlanczos_steps = 4\n"
        "displacements = 4\naveraging_displacements = 0\nlr_times_sharpness = [0.05, 0.1, 0.2]\n"
        "[plan]\nruns = 2\nrecords = 5\n"
    )
    words = f"--config {path} --select head --examples 60 --members 1 --members 2 --seed 3"
    words += " --memory 3 --set bridge.steps=5 --set plan.records=1 --set bridge.test_examples=10"
    done = CliRunner().invoke(
        main, ["neural", "bridge", str(run), *words.split(), "--out", str(out), "--threads", "1"]
    )
    assert done.exit_code == 0, done.output
    lines = [line.partition(" ")[2] for line in done.stderr.strip().splitlines()]
    stages = list(dict.fromkeys(line.partition(":")[0] for line in lines))
    trained = [f"train {i} of 3" for i in (1, 2, 3)]
    before = ["curvature and noise", "third derivatives", "test loss"]
    stages = [stage for stage in stages if not stage.endswith(", without noise")]
    assert stages == [*before, *trained, "best learning rates", "density"]
    stated = read_metadata(out / "bridge.parquet")["config"]
    expected = {
        "select": "head", "examples": 60, "steps": 5, "test_examples": 10, "eigenpairs": 6,
        "lr_times_sharpness": [0.05, 0.1, 0.2], "train": True, "momentum": 0.0,
    }  # fmt: skip
    assert expected.items() <= stated["bridge"].items()
    assert {"members": [1, 2], "records": 1, "runs": 2, "seed": 3}.items() <= stated["plan"].items()
    assert (out / "verdict.md").read_text().splitlines()[0].removeprefix("- ") in done.stdout
    assert str(out / "bridge.png") in done.stdout


def test_the_settings_are_a_file_and_what_changes_it(tmp_path: Path) -> None:
    assert load_config() == (BridgeConfig(), Plan())
    path = tmp_path / "bridge.toml"
    path.write_text("[bridge]\nsteps = 7\nmomentum = 0\n[plan]\nmembers = [1, 3]\n")
    assert load_config(path) == (BridgeConfig(steps=7, momentum=0.0), Plan(members=(1, 3)))
    config, plan = load_config(path, ["bridge.steps=9", "plan.late_phase=head", "plan.members=[2]"])
    assert (config.steps, plan.members, plan.late_phase) == (9, (2,), "head")
    # Of late-phase members a single one is no average.
    assert load_config(overrides=["plan.late_phase=head"])[1].members == (2, 4, 8, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bridge]\nrates = [0.1]", "bridge.rates is not a known key; "),
        (
            "[bridge]\neigenpair = 4",
            "bridge.eigenpair is not a known key; did you mean 'eigenpairs'",
        ),
        ("[plan]\nchains = 4", "plan.chains is not a known key; "),
        ("[plan]\nmember = [2]", "plan.member is not a known key; did you mean 'members'"),
        ("[brigde]\nsteps = 4", "brigde is not a known key; did you mean 'bridge'"),
        ("bridge = 4", "bridge must be a table; got 4"),
        ("[bridge]\nsteps = 'many'", "bridge.steps must be a whole number; got 'many'"),
        ("[bridge]\ntrain = 1", "bridge.train must be true or false; got 1"),
        (
            "[bridge]\nlr_times_sharpness = [0.1, 'x']",
            "bridge.lr_times_sharpness.1 must be a number",
        ),
        ("[bridge]\ndisplacements = 1", "bridge: displacements must be an integer >= 2; got 1"),
        ("[plan]\nmembers = []", "plan: members must have at least one entry"),
        ("[bridge", "is not valid TOML"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(text)
    with pytest.raises(NQMError) as told:
        load_config(path)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_settings_of_the_bridge_are_told_from_those_of_the_recipe() -> None:
    given = ["bridge.steps=4", "model.checkpoint=bridge.pt", " plan.runs = 8", "data.name=plan"]
    assert split_overrides(given) == ([given[0], given[2]], [given[1], given[3]])

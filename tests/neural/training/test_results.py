"""Finished trainings found on disk, and compared in words; intervals against SciPy's."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import stats

from figures import runs as pictures
from neural.training.experiment import run_experiment
from neural.training.results import collect, find_runs, histories, starts
from neural.training.results_table import compare, text
from neural.training.summary import per_seed, summarise
from neural.training.train import train
from nqm.cli import main
from nqm.errors import NQMError
from nqm.table import read_table
from tests.tiny_runs import LATE, recipe, tiny

ARMS: dict[str, Any] = {
    "plain": {},
    "late": {"use": ["late_phase", "average"]},  # not in the order of the alphabet
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "tiny"
    average = {"method": "swa", "start_epoch": 1}
    run_experiment(recipe(ARMS, late_phase=LATE, average=average, seeds=2), folder)
    return folder


def call(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["neural", "results", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


# --- which runs ----------------------------------------------------------------------------------


def test_the_runs_of_an_experiment_give_its_own_tables(out: Path) -> None:
    runs, incomplete = find_runs([out])
    assert incomplete == 0
    pd.testing.assert_frame_equal(collect(runs), read_table(out / "results.parquet"))
    pd.testing.assert_frame_equal(histories(runs), read_table(out / "history.parquet"))
    assert starts(runs) == {"late": 1}


@pytest.mark.parametrize(
    ("below", "arms"),
    [
        (["."], ["plain", "late"]),
        (["late", "plain"], ["late", "plain"]),
        (["late"], ["late"]),
        (["late/seed1"], ["late"]),
        (["late/seed1", "plain/seed1"], ["late", "plain"]),
        (["late/seed1", "late"], ["late"]),
    ],
)
def test_arms_are_named_by_what_the_folders_have_in_common(
    out: Path, below: list[str], arms: list[str]
) -> None:
    runs, _ = find_runs([out / name for name in below])
    assert list(dict.fromkeys(run.arm for run in runs)) == arms
    assert len({run.folder.path for run in runs}) == len(runs)
    assert all(run.folder.path.name == f"seed{run.seed}" for run in runs)


def test_two_experiments_side_by_side(out: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(out, tmp_path / name)
    found, _ = find_runs([tmp_path / "b", tmp_path / "a"])
    arms = list(dict.fromkeys(run.arm for run in found))
    assert arms == ["b/plain", "b/late", "a/plain", "a/late"]
    compared = compare(collect(found), "a/plain")
    copied = compared[(compared["arm"] == "b/plain") & (compared["weights"] == "iterate")]
    assert copied["difference"].tolist() == [0.0] * len(copied)
    assert all("equal in each of 2 seeds" in said for said in copied["verdict"])


def test_cells_of_a_sweep_are_named_by_their_settings(tmp_path: Path) -> None:
    for folder, lr, seed in (("x1", 0.05, 0), ("x2", 0.05, 1), ("x3", 0.02, 0)):
        train(tiny(train={"lr": lr, "epochs": 1}, seed=seed), tmp_path / "t.csv.runs" / folder)
    found, _ = find_runs([tmp_path / "t.csv.runs"])
    assert [(run.arm, run.seed) for run in found] == [
        ("train.lr.value=0.05", 0),
        ("train.lr.value=0.05", 1),
        ("train.lr.value=0.02", 0),
    ]


def test_runs_that_are_no_arm_are_refused(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "plain", tmp_path / "plain")
    train(tiny(train={"epochs": 1}, seed=2), tmp_path / "plain/seed2")
    with pytest.raises(NQMError, match=r"different settings \(.*epochs.*\)"):
        find_runs([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NQMError, match="no run at or below"):
        find_runs([tmp_path / "empty"])


# --- numbers -------------------------------------------------------------------------------------


def values(arm: str, weights: str, own: list[float], metric: str = "accuracy") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": arm, "seed": range(len(own)), "status": "finished", "weights": weights,
            "member": -1, "data": "test", "metric": metric, "value": own,
        }
    )  # fmt: skip


def verdicts(table: pd.DataFrame, metric: str = "accuracy") -> list[str]:
    made = compare(table)
    return [said for said in made.loc[made["metric"] == metric, "verdict"] if said]


def test_intervals_stay_within_the_range_of_their_metric() -> None:
    high, low = [0.99, 1.0, 0.97], [0.001, 0.012, 0.002]
    plain = stats.t.interval(0.95, 2, np.mean(high), stats.sem(high))
    assert plain[1] > 1
    for metric, own, ends in (
        ("accuracy", high, (plain[0], 1.0)),
        ("ece", low, (0.0, stats.t.interval(0.95, 2, np.mean(low), stats.sem(low))[1])),
        ("nll", low, (0.0, stats.t.interval(0.95, 2, np.mean(low), stats.sem(low))[1])),
        ("nll", [8.0, 9.0], (8.5 - stats.t.ppf(0.975, 1) / 2, 8.5 + stats.t.ppf(0.975, 1) / 2)),
    ):
        table = values("a", "iterate", own, metric)
        for made in (summarise(table, metric), per_seed(table, metric)):
            found = made[["low", "high"]].iloc[0].astype(float)
            expected = max(ends[0], 0.0), ends[1]
            np.testing.assert_allclose(found, expected, rtol=1e-12)


BASE = [0.900, 0.910, 0.905, 0.915, 0.895]


def test_a_verdict_has_the_ends_of_the_paired_interval() -> None:
    own = [0.906, 0.912, 0.911, 0.917, 0.900]
    table = pd.concat([values("base", "iterate", BASE), values("late", "averaged", own)])
    [said] = verdicts(table)
    test = stats.ttest_rel(own, BASE)
    ends = test.confidence_interval(0.95)
    assert ends.low > 0
    assert said == (
        f"late (averaged) better than base (iterate) by 0.42 points of accuracy, "
        f"95 % interval {100 * ends.low:.2f} to {100 * ends.high:.2f}, 5 seeds"
    )
    # The same numbers as a loss: more is worse.
    losses = [values("base", "iterate", BASE, "nll"), values("late", "averaged", own, "nll")]
    [said] = verdicts(pd.concat(losses), "nll")
    assert said.startswith("late (averaged) worse than base (iterate) by 0.0042 nats of test loss")
    assert said.endswith(f"95 % interval {ends.low:.4f} to {ends.high:.4f}, 5 seeds")
    turned = pd.concat([values("base", "iterate", own), values("late", "averaged", BASE)])
    [said] = verdicts(turned)
    assert said.startswith("late (averaged) worse than base (iterate) by 0.42 points")
    assert f"interval {100 * ends.low:.2f} to {100 * ends.high:.2f}" in said


def test_where_the_interval_holds_0_no_difference_is_seen() -> None:
    own = [0.910, 0.905, 0.909, 0.911, 0.893]
    ends = stats.ttest_rel(own, BASE).confidence_interval(0.95)
    assert ends.low < 0 < ends.high
    [said] = verdicts(pd.concat([values("a", "iterate", BASE), values("b", "iterate", own)]))
    assert said == (
        "no difference seen between b (iterate) and a (iterate): 0.06 points of accuracy, "
        f"95 % interval {100 * ends.low:.2f} to {100 * ends.high:.2f}, 5 seeds"
    )


@pytest.mark.parametrize(
    ("base", "own", "said"),
    [
        ([0.5], [0.75], "b (iterate) above a (iterate) by 25.00 points of accuracy; of one seed"),
        ([0.5], [0.25], "b (iterate) below a (iterate) by 25.00 points of accuracy; of one seed"),
        ([0.5], [0.5], "b (iterate) equal to a (iterate); of one seed there is no interval"),
        ([0.5, 0.25], [0.5, 0.25], "b (iterate) and a (iterate) are equal in each of 2 seeds"),
        ([0.5, 0.25], [0.625, 0.375], "b (iterate) better than a (iterate) by 12.50 points of"),
    ],
)
def test_few_seeds_claim_nothing(base: list[float], own: list[float], said: str) -> None:
    made = verdicts(pd.concat([values("a", "iterate", base), values("b", "iterate", own)]))
    assert [one.startswith(said) for one in made] == [True]
    assert "interval 12" not in made[0]


def test_the_reference_can_be_chosen() -> None:
    table = pd.concat([values("a", "iterate", BASE), values("b", "averaged", BASE[::-1])])
    made = compare(table, "b")
    assert made.loc[made["arm"] == "b", "difference"].isna().all()
    assert made.loc[made["arm"] == "a", "verdict"].str.contains(r"and b \(averaged\)").all()
    with pytest.raises(NQMError, match="there is no arm 'c'"):
        compare(table, "c")


# --- as lines ------------------------------------------------------------------------------------


def lines_of(style: bool) -> list[str]:
    table = pd.concat(
        [
            values("base", "iterate", [0.9, 0.8]),
            values("base", "iterate", [0.5, 0.25], "nll"),
            values("late", "averaged", [0.9, 0.82]),
            values("late", "averaged", [0.5, 0.5], "nll"),
            values("late", "ensemble", [1.0, 1.0]),
            values("late", "ensemble", [0.125, 0.125], "nll"),
        ]
    )
    lost = {"arm": "late", "seed": 7, "status": "diverged", "member": -1}
    lost |= {"weights": "", "data": "", "metric": "", "value": math.nan}
    return text(pd.concat([table, pd.DataFrame([lost])]), style=style)


def test_the_best_single_model_is_marked_in_every_column() -> None:
    lines = lines_of(style=False)
    # Half of the interval of two numbers is t times half of their distance.
    reach = [stats.t.ppf(0.975, 1) * 5, stats.t.ppf(0.975, 1) * 4]
    assert [line.split() for line in lines[:5]] == [
        ["model", "accuracy", "%", "nll", "seeds"],
        ["base:", "iterate", "85.00", f"[{85 - reach[0]:.2f},", "100.00]", "0.3750*", "2"],
        ["late:", "averaged", "86.00", f"[{86 - reach[1]:.2f},", "100.00]*", "0.5000", "2"],
        ["These", "take", "several", "networks", "or", "passes", "for", "one", "prediction:"],
        ["late:", "ensemble", "100.00", "[100.00,", "100.00]", "0.1250", "2"],
    ]
    assert lines[-1] == "diverged: late, seed 7"
    assert len({len(line) for line in (*lines[:3], lines[4])}) == 1  # the columns are aligned


def test_on_a_terminal_the_best_is_bold() -> None:
    lines = lines_of(style=True)
    bold = [re.findall(r"\x1b\[1m(.*?)\x1b\[0m", line) for line in lines]
    assert [one.strip() for one in bold[1]] == ["0.3750"]
    assert bold[2][0].startswith("86.00 [")
    assert bold[4] == []
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    starred = lines_of(style=False)
    assert [line.split() for line in plain[:3]] == [
        [word.removesuffix("*") for word in line.split()] for line in starred[:3]
    ]


def test_nothing_to_compare_is_said(out: Path) -> None:
    lost = {"arm": "a", "seed": 0, "status": "diverged", "weights": "", "member": -1}
    table = pd.DataFrame([lost | {"data": "", "metric": "", "value": math.nan}])
    assert text(table) == ["diverged: a, seed 0"]
    assert list(compare(table).columns) == list(compare(collect(find_runs([out])[0])).columns)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_what_training_printed(out: Path, tmp_path: Path) -> None:
    code, said, errors = call(out, "--out", tmp_path / "pictures")
    assert code == 0, errors
    assert said.splitlines()[0] == "tiny"
    assert "late: swa" in said
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "comparison.png", "comparison.pdf",
    }  # fmt: skip
    code, told, _ = call(out / "plain", out / "late", "--json")
    document = json.loads(told)
    made = pd.DataFrame(document["rows"], columns=document["columns"])
    own = summarise(read_table(out / "results.parquet"))
    found = made[made["metric"] == "accuracy"].reset_index(drop=True)
    np.testing.assert_allclose(found["mean"], own["mean"], rtol=1e-12)
    assert found["weights"].tolist() == own["weights"].tolist()


def test_what_is_not_complete_is_left_out_and_said(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "tiny")
    file = tmp_path / "tiny/late/seed1/run.json"
    file.write_text(file.read_text().replace('"finished"', "null"))
    code, said, errors = call(tmp_path / "tiny")
    assert code == 0
    assert errors.startswith("1 run is not complete and left out")
    assert "of one seed there is no interval" in said
    assert call(tmp_path / "tiny/late/seed1")[2].endswith("error: no run is complete yet\n")
    assert call(tmp_path / "tiny", "--reference", "plane")[2].endswith("did you mean 'plain'?\n")
    assert call(tmp_path / "tiny", "--out", tmp_path / "tiny/late/seed0")[0] == 2


# --- the picture ---------------------------------------------------------------------------------


def test_curves_have_t0_and_the_average_over_time(out: Path) -> None:
    history = read_table(out / "history.parquet")
    ax = matplotlib.figure.Figure().subplots()
    pictures.over_epochs(history, ax=ax, starts={"late": 1})
    drawn = {line.get_gid(): line for line in ax.lines}
    assert {"plain/mean", "late/mean", "late/average", "late/T0"} <= set(drawn)
    assert not {"plain/average", "plain/T0"} & set(drawn)
    assert list(drawn["late/T0"].get_xdata()) == [1, 1]
    late = history[history["arm"] == "late"].groupby("epoch")["average_accuracy"].mean()
    expected = late.dropna()
    assert expected.index.tolist() == [2, 3]
    np.testing.assert_allclose(drawn["late/average"].get_ydata(), expected, rtol=1e-12)
    names = [entry.get_text() for entry in ax.get_legend().get_texts()]
    assert names == ["plain", "late", "average over time", "$T_0$: members begin"]


def test_the_last_point_of_the_average_is_its_result(out: Path) -> None:
    """Without BatchNorm there is no statistic to recompute."""
    results, history = (read_table(out / f"{name}.parquet") for name in ("results", "history"))
    rows = results[(results["weights"] == "swa") & (results["data"] == "test")]
    for metric, column in (("accuracy", "average_accuracy"), ("nll", "average_loss")):
        own = rows[rows["metric"] == metric].set_index("seed")["value"]
        last = history[(history["arm"] == "late") & (history["epoch"] == 3)]
        np.testing.assert_allclose(
            own.loc[[0, 1]], last.set_index("seed").loc[[0, 1], column], rtol=1e-6  # float32
        )  # fmt: skip

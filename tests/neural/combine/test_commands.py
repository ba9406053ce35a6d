"""``nqm neural members | merge | ensemble | compare`` as a user calls them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from neural.evaluate import predict
from neural.training.experiment import run_experiment
from neural.training.load_run import reopen
from nqm.cli import main
from nqm.table import read_table
from tests.tiny_runs import CNN, LATE, recipe
from tests.tolerances import agree


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of a small CNN with BatchNorm, and a run with late-phase members."""
    out = tmp_path_factory.mktemp("runs")
    made = recipe({"base": {}, "late": {"late_phase": LATE}}, model=CNN)
    run_experiment(made, out, seeds=[0, 1, 2])
    return out


def call(*words: object) -> Result:
    return CliRunner().invoke(main, ["neural", *map(str, words), "--threads", "1"])


def shown(*words: object) -> str:
    done = call(*words)
    assert done.exit_code == 0, done.output
    return done.stdout  # progress, which a loaded machine shows, is on the other stream


def test_members_of_a_pattern(runs: Path, tmp_path: Path) -> None:
    out = shown("members", f"{runs}/base/seed*", "--out", tmp_path / "members.csv")
    table = read_table(tmp_path / "members.csv")
    assert list(table["member"]) == ["seed0", "seed1", "seed2"]
    flat = torch.stack(
        [torch.cat([p.detach().flatten() for p in reopen(runs / "base" / f"seed{k}").model
                    .parameters()]) for k in range(3)]
    ).double()  # fmt: skip
    agree(table["norm"], flat.norm(dim=1).numpy(), 1e-5)
    agree(table["distance"], (flat - flat.mean(0)).norm(dim=1).numpy(), 1e-5)
    for k in range(3):
        result = read_table(runs / "base" / f"seed{k}" / "result.parquet")
        own = result[result["metric"] == "nll"]["value"].iloc[0]
        assert table["nll"][k] == pytest.approx(own, rel=1e-6)
    assert "seed2" in out


def test_barriers_are_those_of_merges_along_the_line(runs: Path, tmp_path: Path) -> None:
    members = [runs / "base" / f"seed{k}" for k in range(2)]
    shown(
        "members", *members, "--barrier", "first", "--repair", "none", "--out", tmp_path / "m.csv"
    )
    found = read_table(tmp_path / "m.csv")["barrier_to_first"]
    first, second = (reopen(one).model.state_dict() for one in members)
    run = reopen(members[0])
    images = torch.cat([x for x, _ in run.task.test()])
    labels = torch.cat([y for _, y in run.task.test()])

    def loss(t: float) -> float:
        mixed = {n: (1 - t) * first[n] + t * second[n] for n in first if "num_" not in n}
        run.model.load_state_dict(mixed, strict=False)
        with torch.no_grad():
            logits = run.model.eval()(images).double()
        return float(-logits.log_softmax(1).gather(1, labels[:, None]).mean())

    ends = loss(0.0), loss(1.0)
    excess = [loss(k / 10) - (1 - k / 10) * ends[0] - k / 10 * ends[1] for k in range(11)]
    agree(found, np.array([0.0, max(excess)]), 1e-4)
    assert found[1] > 0.01  # seeds apart do not share a basin

    shown("members", *members, "--barrier", "mean", "--out", tmp_path / "mean.csv")
    assert (read_table(tmp_path / "mean.csv")["barrier_to_mean"] >= 0).all()


def test_merge_writes_the_mean_with_its_own_statistics(runs: Path, tmp_path: Path) -> None:
    members = [runs / "base" / f"seed{k}" for k in range(3)]
    file = tmp_path / "soup.safetensors"
    out = shown("merge", *members, "--out", file)
    assert out.splitlines()[-1] == str(file)
    soup = load_file(file)
    states = [reopen(one).model.state_dict() for one in members]
    model = reopen(members[0]).model
    for name, _ in model.named_parameters():
        torch.testing.assert_close(soup[name], torch.stack([s[name] for s in states]).mean(0))
    name = next(n for n in soup if n.endswith("running_var"))
    assert not torch.allclose(soup[name], torch.stack([s[name] for s in states]).mean(0))
    plain = tmp_path / "plain.safetensors"
    shown("merge", *members, "--repair", "none", "--weights", "1,0,0", "--out", plain)
    assert all(torch.equal(value, states[0][n]) for n, value in load_file(plain).items())
    again = call("merge", *members, "--out", file)
    assert again.exit_code != 0
    assert "exists; move it away" in again.output


def test_half_precision_is_averaged_in_single_and_written_in_half(
    runs: Path, tmp_path: Path
) -> None:
    states = [reopen(runs / "base" / f"seed{k}").model.state_dict() for k in range(3)]
    halves = [{n: v.half() if v.is_floating_point() else v for n, v in s.items()} for s in states]
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for file, state in zip(files, halves, strict=True):
        save_file(state, file)
    like = ("--like", runs / "base" / "seed0", "--repair", "none")
    shown("merge", *files, *like, "--out", tmp_path / "soup.safetensors")
    soup = load_file(tmp_path / "soup.safetensors")
    for name, _ in reopen(runs / "base" / "seed0").model.named_parameters():
        mean = torch.stack([state[name].double() for state in halves]).mean(0)
        assert soup[name].dtype == torch.float16
        # The mean itself is right to single precision, so that it rounds to a neighbour at most.
        torch.testing.assert_close(soup[name].double(), mean, rtol=5e-4, atol=1e-7)
    # One member of another type: the model's own.
    shown("merge", *files[:2], runs / "base" / "seed2", *like, "--out", tmp_path / "m.safetensors")
    mixed = load_file(tmp_path / "m.safetensors")
    assert {mixed[name].dtype for name in soup if soup[name].is_floating_point()} == {torch.float32}


def test_ensemble_is_the_deep_ensemble_of_the_experiment(runs: Path) -> None:
    out = shown("ensemble", f"{runs}/base/seed*")
    found = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    results = read_table(runs / "results.parquet")
    rows = results[(results["arm"] == "base") & (results["weights"] == "deep_ensemble_iterate")]
    for metric, value in zip(rows["metric"], rows["value"], strict=True):
        assert found[metric] == pytest.approx(value, abs=6e-5)


def test_weights_by_accuracy_are_in_proportion_to_it(runs: Path) -> None:
    members = [runs / "base" / f"seed{k}" for k in range(3)]
    out = shown("ensemble", *members, "--weights", "accuracy", "--held-out", "0.4")
    task = reopen(members[0]).task
    held, rest = task.images.split(round(0.4 * len(task.images)), 0)
    logits, labels = {}, {}
    for part, images in (("held", held), ("rest", rest)):
        rows = [predict(reopen(one).model, task.normalised(images)) for one in members]
        logits[part], labels[part] = [z for z, _ in rows], rows[0][1]
    right = torch.stack([(z.argmax(1) == labels["held"]).double().mean() for z in logits["held"]])
    share = right / right.sum()
    pooled = sum(w * z.double().softmax(1) for w, z in zip(share, logits["rest"], strict=True))
    expected = -pooled.log().gather(1, labels["rest"][:, None]).mean()
    found = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    assert found["nll"] == pytest.approx(float(expected), abs=6e-5)


def test_compare_goes_on_and_is_read_again(runs: Path, tmp_path: Path) -> None:
    words = ("compare", f"{runs}/late/seed0#members", "--rules", "uniform,greedy,fisher",
             "--set", 'combine.repair=["statistics","none"]', "--set", "rule.fisher.examples=50",
             "--set", "combine.held_out=0.3", "--shift", "gaussian_noise")  # fmt: skip
    first = shown(*words, "--out", tmp_path / "one")
    table = read_table(tmp_path / "one" / "compare.parquet")
    assert (tmp_path / "one" / "compare.png").stat().st_size > 10_000
    assert set(table["rule"]) == {"member", "mean_member", "uniform", "greedy", "fisher",
                                  "ensemble"}  # fmt: skip
    assert set(table["data"]) == {"test", "gaussian_noise 3"}
    assert set(table.loc[table["rule"] == "uniform", "repair"]) == {"statistics", "none"}
    assert (table["epochs_total"] == 3.0).all()  # members share the run's epochs
    # Every set of data has predictions of its own.
    test, noisy = (
        table[(table["data"] == name) & (table["rule"] == "uniform")]["nll"].to_numpy()
        for name in ("test", "gaussian_noise 3")
    )
    assert (np.abs(test - noisy) > 1e-6).all()
    # Killed after some cells were written: the same table, from what is there.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "compare.parquet").unlink()
    for path in sorted((tmp_path / "two" / "cells").iterdir())[::2]:
        path.unlink()
    second = shown(*words, "--out", tmp_path / "two")
    pd.testing.assert_frame_equal(read_table(tmp_path / "two" / "compare.parquet"), table)
    assert second.replace("two", "one") == first
    assert shown(*words, "--out", tmp_path / "one") == first
    other = call("compare", f"{runs}/late/seed0#members", "--rules", "uniform",
                 "--out", tmp_path / "one")  # fmt: skip
    assert "combine.rules" in other.output
    assert "nothing was overwritten" in other.output


def test_growth_ends_at_the_comparison_and_begins_at_one_member(runs: Path, tmp_path: Path) -> None:
    words = ("compare", f"{runs}/base/seed*", "--rules", "uniform", "--no-predict", "--growth",
             "--set", 'combine.repair=["none"]', "--out", tmp_path)  # fmt: skip
    out = shown(*words)
    grown, table = (read_table(tmp_path / f"{n}.parquet") for n in ("growth", "compare"))
    assert str(tmp_path / "growth.png") in out
    for rule in ("member", "uniform", "ensemble"):
        assert list(grown.loc[grown["rule"] == rule, "members"]) == [1, 2, 3]
    names = ["accuracy", "nll", "nll_tuned", "ece", "brier"]
    for rule in ("uniform", "ensemble"):
        last = grown[(grown["rule"] == rule) & (grown["members"] == 3)]
        agree(last[names].to_numpy(), table.loc[table["rule"] == rule, names].to_numpy(), 1e-9)
    first = grown.loc[grown["members"] == 1, names].to_numpy()
    assert (np.abs(first - first[0]) < 1e-6).all()
    # Two members: the mean of the two models' probabilities.
    task = reopen(runs / "base" / "seed0").task
    rest = task.images.split(round(0.2 * len(task.images)), 0)[1]
    found = [
        predict(reopen(runs / "base" / f"seed{k}").model, task.normalised(rest)) for k in (0, 1)
    ]
    mean = torch.stack([z.double().softmax(1) for z, _ in found]).mean(0)
    expected = -mean.log().gather(1, found[0][1][:, None]).mean()
    two = grown[(grown["rule"] == "ensemble") & (grown["members"] == 2)]
    assert two["nll"].item() == pytest.approx(float(expected), rel=1e-5)
    assert shown(*words) == out


def test_statistics_of_a_soup_matter_and_predictions_are_near(runs: Path, tmp_path: Path) -> None:
    shown("compare", f"{runs}/late/seed0#members", "--out", tmp_path)
    table = read_table(tmp_path / "compare.parquet")
    soup = table[table["rule"] == "uniform"].iloc[0]
    assert soup["predicted"] == pytest.approx(soup["nll"], rel=1e-6)
    assert np.isfinite(table.loc[table["rule"] == "ensemble", "predicted"]).all()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("members", "nowhere.pt"), "nothing states the architecture"),
        (("members", "RUN", "--barrier", "mean"), "needs two members; got one"),
        (("compare", "RUN"), "at least two members"),
        (("compare", "RUN", "RUN2", "--rules", "stock"), "needs the model from which"),
        (("compare", "RUN", "RUN2", "--rules", "best_of_all"), "combine.rules"),
        (("compare", "RUN", "RUN2", "--shift", "rain"), "rain"),
        (("compare", "RUN", "RUN2", "--set", "combine.held_out=0.001"), "images on both sides"),
        (("compare", "RUN", "RUN2", "--out", "RUN"), "takes no other results"),
        (("merge", "RUN", "RUN2", "--weights", "1,x", "--out", "a.safetensors"), "--weights must"),
        (("merge", "RUN", "RUN2", "--out", "a.pt"), "must end in .safetensors"),
        (("merge", "RUN", "RUN2", "--rule", "unifrom", "--out", "a.safetensors"), "uniform"),
        (("ensemble", "RUN", "RUN2", "--weights", "2,-1"), "weights must be >= 0"),
        (("ensemble", "RUN", "RUN2", "--weights", "1"), "weights must be 2 numbers"),
        (("ensemble", "RUN", "RUN2", "--weights", "acuracy"), "accuracy"),
        (("ensemble", "RUN", "RUN2", "--weights", "best", "--held-out", "0"), "held_out"),
    ],
)
def test_mistakes_are_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": runs / "base" / "seed0", "RUN2": runs / "base" / "seed1"}
    done = call(*(places.get(word, word) for word in words))
    assert done.exit_code != 0
    assert told in done.output
    assert "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # told before anything is made
